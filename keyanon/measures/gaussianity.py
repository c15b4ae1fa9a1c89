"""Is noise Gaussian? Statistics of a latent's entries, compared with N(0, I).

ks_d                    largest gap between the distribution functions of its entries and of N(0, 1) (Kolmogorov, Smirnov)
ks_passed               1 where that gap does not reject N(0, I) at 5 %: its entries are independent, so dependent neighbours can be
                        the reason as well as another law; severe, as a latent has thousands of entries
mmd2                    squared maximum mean discrepancy between its 2 x 2 patches and as many of normal noise
kl_gaussian_fit         Kullback-Leibler divergence from N(0, 1) of a normal law with the mean and variance of its entries
kl_knn                  the same of its 2 x 2 patches from N(0, I), whatever their law, by the distances to 5th nearest neighbours
mean, variance, skewness, excess_kurtosis     of its entries; 0, 1, 0, 0 for N(0, 1)
neighbour_correlation   of vertically and horizontally adjacent entries of a channel, averaged over channels
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from scipy.spatial import KDTree
from scipy.spatial.distance import pdist, squareform
from scipy.special import digamma, gammaln

from keyanon.types import Measure

Floats = NDArray[np.floating[Any]]

Bools = NDArray[np.bool_]

LEVEL = 0.05  # of the Kolmogorov-Smirnov test

PATCH = 2
NEIGHBOURS = 5

MEASURES = {
    "ks_d": Measure("noise", "", "lower", "largest gap to the distribution function of N(0, 1)"),
    "ks_passed": Measure("noise", "", "higher", "1 where that gap does not reject N(0, 1) at 5 %"),
    "mmd2": Measure("noise", "", "lower", "squared maximum mean discrepancy to normal noise"),
    "kl_gaussian_fit": Measure(
        "noise", "nats", "lower", "Kullback-Leibler divergence from N(0, 1) of a Gaussian fit to the entries"
    ),
    "kl_knn": Measure(
        "noise", "nats", "lower", "Kullback-Leibler divergence of patches from N(0, I), by 5th nearest neighbours"
    ),
    "mean": Measure("noise", label="of the entries, 0 for N(0, 1)"),
    "variance": Measure("noise", label="of the entries, 1 for N(0, 1)"),
    "skewness": Measure("noise", label="of the entries, 0 for N(0, 1)"),
    "excess_kurtosis": Measure("noise", label="of the entries, 0 for N(0, 1)"),
    "neighbour_correlation": Measure("noise", label="of adjacent entries, 0 for N(0, I)"),
}


def measure(z: Floats, inside: Bools, generator: np.random.Generator) -> dict[str, float]:
    """MEASURES of one latent (c u v) over its cells `inside` (u v); all NaN where these hold no more than NEIGHBOURS patches.

    `generator` draws the normal patches of mmd2.
    """
    values, pieces = z[:, inside].ravel(), patches(z, inside)
    if len(pieces) <= NEIGHBOURS:
        return dict.fromkeys(MEASURES, np.nan)
    ks = stats.ks_1samp(values, stats.norm.cdf)
    numbers = (
        ks.statistic,
        ks.pvalue >= LEVEL,
        mmd2(pieces, generator.standard_normal(pieces.shape)),
        kl_gaussian_fit(values),
        kl_knn(pieces),
        values.mean(),
        values.var(),
        stats.skew(values),
        stats.kurtosis(values),
        neighbour_correlation(z, inside),
    )
    return dict(zip(MEASURES, map(float, numbers), strict=True))


def mmd2(x: Floats, y: Floats) -> float:
    """Squared maximum mean discrepancy of two samples (n d) and (m d), unbiased, so it may be negative.

    The kernel is exp(-|a - b|^2 / (2 s^2)), s the median distance in the pooled sample (Gretton et al., A kernel two-sample
    test, JMLR 13, 2012, lemma 6).
    """
    squared = pdist(np.concatenate([x, y]), "sqeuclidean")
    kernel = squareform(np.exp(-squared / (2 * np.median(squared))))  # 0 on the diagonal: no point is its own neighbour
    n, m = len(x), len(y)
    within = kernel[:n, :n].sum() / (n * (n - 1)) + kernel[n:, n:].sum() / (m * (m - 1))
    return float(within - 2 * kernel[:n, n:].mean())


def kl_gaussian_fit(values: Floats) -> float:
    """KL(N(m, v) || N(0, 1)) = (v + m^2 - 1 - log v) / 2 in nats, with the values' mean m and variance v."""
    mean, variance = values.mean(), values.var()
    return float((variance + mean**2 - 1 - np.log(variance)) / 2)


def kl_knn(x: Floats, k: int = NEIGHBOURS) -> float:
    """KL(P || N(0, I)) in nats of the law P of a sample (n d), by the distances to k-th nearest neighbours; may be negative.

        - H + d log(2 pi) / 2 + mean |x|^2 / 2        H = psi(n) - psi(k) + log(volume of the unit ball) + d mean log(distance)

    H is the estimate of P's entropy by Kozachenko and Leonenko, Problems of Information Transmission 23(2), 1987. Here the normal
    law is known. The estimate of Wang, Kulkarni and Verdu, IEEE Transactions on Information Theory 55(5), 2009, takes a sample of
    it, which has no points far out: 4,000 of N(0, 4) gave 0.59 for 0.81. Equal points have no density, and count as the nearest
    that numbers can be.
    """
    n, d = x.shape
    distance = KDTree(x).query(x, [k + 1])[0][:, 0]  # the nearest is the point itself
    volume = d / 2 * np.log(np.pi) - gammaln(d / 2 + 1)
    entropy = digamma(n) - digamma(k) + volume + d * np.log(np.maximum(distance, np.finfo(np.float64).tiny)).mean()
    return float(d * np.log(2 * np.pi) / 2 + np.square(x).sum(1).mean() / 2 - entropy)


def patches(z: Floats, inside: Bools) -> Floats:
    """The patches (n PATCH^2) of every channel of a latent (c u v) that lie whole inside (u v), side by side."""

    def tiled(planes: Any) -> Any:
        channels, rows, columns = len(planes), planes.shape[1] // PATCH, planes.shape[2] // PATCH
        cut = planes[:, : rows * PATCH, : columns * PATCH].reshape(channels, rows, PATCH, columns, PATCH)
        return cut.swapaxes(2, 3).reshape(channels, rows * columns, PATCH**2)

    taken: Floats = tiled(z)[:, tiled(inside[None])[0].all(axis=1)].reshape(-1, PATCH**2)
    return taken


def neighbour_correlation(z: Floats, inside: Bools) -> float:
    """Pearson's correlation of vertically and horizontally adjacent cells of a latent (c u v), averaged over its channels.

    Both cells of a pair lie inside (u v).
    """
    down, across = inside[1:] & inside[:-1], inside[:, 1:] & inside[:, :-1]
    first = np.concatenate([z[:, :-1][:, down], z[:, :, :-1][:, across]], axis=1)
    second = np.concatenate([z[:, 1:][:, down], z[:, :, 1:][:, across]], axis=1)
    return float(np.mean([stats.pearsonr(a, b).statistic for a, b in zip(first, second, strict=True)]))


def generator_of(id: str, purpose: str) -> np.random.Generator:
    """Random numbers that hang on a picture's id."""
    return np.random.default_rng([*purpose.encode(), *id.encode()])
