"""Is it the same person? Thresholds, TAR at a FAR, EER, rank-k, unlinkability, and 95 % intervals over identities.

Embeddings are unit rows (n d), all NaN where no face was found. A score is the cosine of a probe and a gallery row,
NaN where either is missing. A comparison is genuine where both show the same person, else an impostor's; it is accepted
where its score is above the threshold. What cannot be compared is never dropped in silence: a TAR comes twice, with
these comparisons rejected and accepted, and a `Statistic` counts them.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from keyanon.errors import BadSetting
from keyanon.types import Summary

Floats = NDArray[np.floating[Any]]
Codes = NDArray[np.intp]
Bools = NDArray[np.bool_]
Rule = Literal["order", "quantile"]  # how impostor scores set a threshold
RESAMPLES = 1000
AVERAGES = {"mean": Summary(), "std": Summary("standard deviation", "none"), "median": Summary(), "p10": Summary()}
WHOLE_SET = "set"  # the statistic of a measure that compares sets of pictures
GRID = 400  # thresholds that stand for an ROC curve while identities are drawn again


@dataclass(frozen=True)
class Statistic:
    """One number of a table with its 95 % interval (NaN where there is none).

    `n` pictures or comparisons make up the value. `undefined` could not be measured: averages leave them out of n,
    rates hold them in n, as rejected or as accepted.
    """

    statistic: str
    n: int
    undefined: int
    value: float
    low: float
    high: float


def unit(rows: Floats) -> Floats:
    """Rows (n d) made as long as 1, as torch.nn.functional.normalize does; those of NaN or zeros stay what they are."""
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12))


def cosine(probe: ArrayLike, gallery: ArrayLike) -> Floats:
    """All cosines (n m) of unit rows (n d) and (m d); NaN where a row is."""
    return np.asarray(probe, np.float64) @ np.asarray(gallery, np.float64).T


def threshold_at_far(impostor: ArrayLike, far: float, rule: Rule = "order") -> float:
    """The score above which impostors are accepted at the rate `far`.

    `order`: the lowest impostor score above which lies at most the share `far` of them, the (k+1)-th highest of n scores, k =
    floor(far n). The false accept rate is never above `far`, and below it only where far n is not whole or scores are tied.

    `quantile`: the authors' quantile(impostor, 1 - far), on the line between two neighbouring scores; there a score at the
    threshold is accepted. It lies at most one gap between scores below that of `order`: of n = 2,557,136 scores 0.135 of it. Where
    far n is whole it lies the share `far` of a gap above. With few comparisons gaps are wide, and printed digits may move.

    NaN where far n < 1: so few comparisons cannot tell such a rate. NaN scores do not count.
    """
    if not 0 < far < 1:
        raise BadSetting(f"a false accept rate lies between 0 and 1, not at {far}")
    scores = _defined(impostor)
    allowed = math.floor(far * scores.size + 1e-9)
    if allowed < 1:
        return math.nan
    if rule == "quantile":
        return float(np.quantile(scores, 1 - far))
    place = scores.size - 1 - allowed
    return float(np.partition(scores, place)[place])


def eer(genuine: ArrayLike, impostor: ArrayLike) -> float:
    """Equal error rate in [0, 1]: where false accepts and false rejects meet on the piecewise linear ROC curve.

    NaN scores do not count; NaN where either side has no score.
    """
    same, other = np.sort(_defined(genuine)), np.sort(_defined(impostor))
    if same.size == 0 or other.size == 0:
        return math.nan
    thresholds = np.concatenate([[-np.inf], np.unique(np.concatenate([same, other]))])
    false_accept = 1 - np.searchsorted(other, thresholds, side="right") / other.size
    false_reject = np.searchsorted(same, thresholds, side="right") / same.size
    return float(_crossing(false_accept, false_reject))


def rank_k(scores: Floats, probe_ids: Sequence[str], gallery_ids: Sequence[str], k: int = 1) -> Floats:
    """For each probe (n,) 1 where one of its own pictures is among the gallery's k nearest, else 0.

    A tie with a stranger is a miss, and so is a probe without a face; NaN where the gallery does not hold the person.
    """
    same = np.asarray(probe_ids)[:, None] == np.asarray(gallery_ids)[None, :]
    own = np.where(same & ~np.isnan(scores), scores, -np.inf).max(axis=1)
    strangers = np.count_nonzero(~same & (scores >= own[:, None]), axis=1)
    return np.where(same.any(axis=1), np.isfinite(own) & (strangers < k), np.nan)


def d_sys(mated: ArrayLike, nonmated: ArrayLike, omega: float = 1.0) -> float:
    """Linkability of a system in [0, 1]: 0 where mated and non-mated scores are alike, 1 where they never overlap.

    D(s) = max(0, 2 LR(s) ω / (1 + LR(s) ω) - 1) and D_sys = ∫ D(s) p(s | mated) ds, with LR = p(s | mated) / p(s |
    non-mated) and ω = p(mated) / p(non-mated) (Gomez-Barrero et al., General framework to evaluate unlinkability in
    biometric template protection systems, IEEE TIFS 13(6), 2018). Densities are histograms of min(100, n / 10) bins
    over the common range, n the smaller set's size. Their noise reads as linkability: where the truth is 0, about 0.1
    up to 1,000 scores a side and 0.02 at 10,000. NaN scores do not count; NaN where either side has no score.
    """
    same, other = _defined(mated), _defined(nonmated)
    if same.size == 0 or other.size == 0:
        return math.nan
    everything = np.concatenate([same, other])
    edges = np.histogram_bin_edges(everything, bins=max(2, min(100, min(same.size, other.size) // 10)))
    p_mated = np.histogram(same, edges)[0] / same.size
    p_nonmated = np.histogram(other, edges)[0] / other.size
    # 2 LR ω / (1 + LR ω) - 1, multiplied through by p(s | non-mated), which may be 0.
    weighted = omega * p_mated
    total = weighted + p_nonmated
    local = np.divide(weighted - p_nonmated, total, out=np.zeros_like(total), where=total > 0)
    return float(np.sum(np.maximum(local, 0) * p_mated))


def w2_squared(a: ArrayLike, b: ArrayLike) -> float:
    """Squared 2-Wasserstein distance between two samples of scores (any sizes): ∫ (F_a⁻¹(u) - F_b⁻¹(u))² du."""
    first, second = np.sort(_defined(a)), np.sort(_defined(b))
    if first.size == 0 or second.size == 0:
        return math.nan
    steps = np.union1d(np.arange(first.size + 1) / first.size, np.arange(second.size + 1) / second.size)
    middle = (steps[1:] + steps[:-1]) / 2
    gap = first[(middle * first.size).astype(int)] - second[(middle * second.size).astype(int)]
    return float(np.sum(gap**2 * np.diff(steps)))


# Statistics: a value, and the 2.5 and 97.5 percentiles of it when identities are drawn again with replacement, because
# pictures of one person are not independent. `groups` names the identity of each value; without it each stands alone.
def mean_statistic(
    values: ArrayLike,
    groups: Sequence[str] | None = None,
    name: str = "mean",
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Statistic:
    data, codes, count, undefined = _grouped(values, groups)
    weights = _weights(count, resamples, seed)
    means = _ratio(weights @ np.bincount(codes, data, count), weights @ np.bincount(codes, minlength=count))
    return Statistic(name, data.size, undefined, _mean(data), *_interval(means, count))


def std_statistic(
    values: ArrayLike, groups: Sequence[str] | None = None, name: str = "std", resamples: int = RESAMPLES, seed: int = 0
) -> Statistic:
    """The spread of the values around their mean (divided by n), not the error of the mean."""
    data, codes, count, undefined = _grouped(values, groups)
    centred = data - _mean(data)  # so that the difference of squares below loses no digits
    weights = _weights(count, resamples, seed)
    n = weights @ np.bincount(codes, minlength=count)
    mean = _ratio(weights @ np.bincount(codes, centred, count), n)
    square = _ratio(weights @ np.bincount(codes, centred**2, count), n)
    spreads = np.sqrt(np.maximum(square - mean**2, 0))
    return Statistic(name, data.size, undefined, math.sqrt(_mean(centred**2)), *_interval(spreads, count))


def quantile_statistic(
    values: ArrayLike,
    groups: Sequence[str] | None = None,
    q: float = 0.5,
    name: str = "median",
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Statistic:
    """The q-quantile (linear between values, as numpy's); of resamples the value where the weights add up to q."""
    data, codes, count, undefined = _grouped(values, groups)
    if data.size == 0:
        return Statistic(name, 0, undefined, math.nan, math.nan, math.nan)
    order = np.argsort(data)
    drawn = np.cumsum(_weights(count, resamples, seed)[:, codes[order]], axis=1)
    quantiles = data[order][np.argmax(drawn >= drawn[:, -1:] * q, axis=1)]
    return Statistic(name, data.size, undefined, float(np.quantile(data, q)), *_interval(quantiles, count))


def p10_statistic(values: ArrayLike, groups: Sequence[str] | None = None) -> Statistic:
    """The 10th percentile: how the worst tenth fares, where more is better."""
    return quantile_statistic(values, groups, 0.1, "p10")


def rate_statistic(
    hits: ArrayLike, groups: Sequence[str] | None, undefined: int, name: str, resamples: int = RESAMPLES, seed: int = 0
) -> Statistic:
    """The share of true values, of which `undefined` were decided by a rule and not measured.

    Drawing again cannot show what never happened: a share of exactly 0 or 1 gets the exact binomial (Clopper-Pearson)
    interval of as many trials as there are identities.
    """
    rate = mean_statistic(np.asarray(hits, np.float64), groups, name, resamples, seed)
    low, high = rate.low, rate.high
    if rate.value in (0, 1):
        width = 1 - 0.025 ** (1 / (rate.n if groups is None else len(set(groups))))
        low, high = (0.0, width) if rate.value == 0 else (1 - width, 1.0)
    return Statistic(name, rate.n, undefined, rate.value, low, high)


@dataclass(frozen=True)
class Verification:
    """All probes against the whole gallery: scores (n m), and the person on each row and column, numbered from 0."""

    scores: Floats
    rows: Codes
    columns: Codes
    persons: int

    @property
    def same(self) -> Bools:
        return np.equal.outer(self.rows, self.columns)

    @staticmethod
    def of(
        probe: ArrayLike, gallery: ArrayLike, probe_ids: Sequence[str], gallery_ids: Sequence[str]
    ) -> "Verification":
        """Of embeddings (n d) and (m d), and who is on them."""
        labels, codes = np.unique([*probe_ids, *gallery_ids], return_inverse=True)
        scores, named = cosine(probe, gallery), (len(probe_ids), len(gallery_ids))
        if scores.shape != named:
            raise ValueError(f"{scores.shape} comparisons, but identities for {named}")
        return Verification(scores, codes[: named[0]], codes[named[0] :], len(labels))


def verification_statistics(
    probe: ArrayLike,
    gallery: ArrayLike,
    probe_ids: Sequence[str],
    gallery_ids: Sequence[str],
    calibration: ArrayLike,
    far: float = 1e-3,
    resamples: int = RESAMPLES,
    seed: int = 0,
    calibration_ids: Sequence[str] | None = None,
    rule: Rule = "order",
) -> list[Statistic]:
    """All probes against the whole gallery.

    A row that is given several times counts as often; as draws are of identities, its intervals get no narrower for that.

    Args:
        probe: embeddings (n d) of the pictures under test, such as the anonymized ones.
        gallery: embeddings (m d) of the clean enrolment pictures.
        probe_ids: the identity on each probe.
        gallery_ids: the identity on each gallery picture.
        calibration: clean embeddings (k d), whose impostor scores against the gallery set the threshold; or a number, the
            threshold itself. Clean probes are their own calibration.
        far: the false accept rate of the threshold, a share.
        resamples: how often identities are drawn again.
        seed: of these draws.
        calibration_ids: the identity on each picture of the calibration; None where it is of the probes, in their order.
        rule: how impostor scores set the threshold (`threshold_at_far`); `quantile` accepts a score at it.

    Returns:
        `tar@far=…`, the same `(unfound accepted)`, `threshold@far=…`, `eer`, `rank1`, `genuine mean`, `impostor mean`.
        n counts comparisons, for `rank1` the probes whose person the gallery holds. A value is NaN where nothing can be
        said: no genuine or no impostor comparison, or fewer than 1 / far impostors for the threshold and the TAR.

    The intervals of the TAR hold the threshold fixed (its own is given), that of `rank1` the gallery. A picture that
    stands both among the probes and in the gallery is compared with itself, as in the authors' LFW protocol.
    """
    trial, given = Verification.of(probe, gallery, probe_ids, gallery_ids), np.asarray(calibration, np.float64)
    weights = _weights(trial.persons, resamples, seed)

    threshold = Statistic(f"threshold@far={far:g}", 0, 0, float("nan" if given.ndim else given), math.nan, math.nan)
    if given.ndim:
        clean = Verification.of(given, gallery, probe_ids if calibration_ids is None else calibration_ids, gallery_ids)
        threshold = _threshold_statistic(clean, _weights(clean.persons, resamples, seed), far, rule)
    scores, same = trial.scores, trial.same
    genuine = scores[same]
    persons = np.asarray(probe_ids)[np.nonzero(same)[0]].tolist()
    # Without a threshold nothing is accepted or rejected: no comparison counts, and the rate of none is NaN.
    ruled = slice(0, 0) if math.isnan(threshold.value) else slice(None)
    passed = genuine >= threshold.value if rule == "quantile" else genuine > threshold.value
    accepted, unfound = passed[ruled], np.isnan(genuine)[ruled]
    named = rank_k(scores, probe_ids, gallery_ids)
    held = ~np.isnan(named)
    holders, faceless = np.asarray(probe_ids)[held].tolist(), np.asarray(np.isnan(scores).all(axis=1))[held]

    def rate(hits: Bools | Floats, groups: Sequence[str], undefined: Bools, name: str) -> Statistic:
        return rate_statistic(hits, groups, int(np.count_nonzero(undefined)), name, resamples, seed)

    return [
        rate(accepted, persons[ruled], unfound, f"tar@far={far:g}"),
        rate(accepted | unfound, persons[ruled], unfound, f"tar@far={far:g} (unfound accepted)"),
        threshold,
        _eer_statistic(trial, weights),
        rate(named[held], holders, faceless, "rank1"),
        mean_statistic(genuine, persons, "genuine mean", resamples, seed),
        _impostor_mean_statistic(trial, weights),
    ]


def verification_summaries(far: float) -> dict[str, Summary]:
    """What `verification_statistics` at `far` gives, by name."""
    return {
        f"tar@far={far:g}": Summary(f"TAR at FAR {far:g}", "alike"),
        f"tar@far={far:g} (unfound accepted)": Summary(f"TAR at FAR {far:g} (unfound accepted)", "alike"),
        f"threshold@far={far:g}": Summary(f"threshold at FAR {far:g}", "none"),
        "eer": Summary(direction="apart"),
        "rank1": Summary(direction="alike"),
        "genuine mean": Summary(direction="alike"),
        "impostor mean": Summary(direction="none"),
    }


# An impostor comparison has two identities. Of persons drawn v and w times it should weigh v w; here it weighs
# v + w - 1, the same to first order: what a draw changes is a sum over persons, and all draws are one matrix product.
def _threshold_statistic(trial: Verification, weights: Floats, far: float, rule: Rule) -> Statistic:
    impostor = trial.scores[~trial.same]
    scores, name = _defined(impostor), f"threshold@far={far:g}"
    undefined, value = impostor.size - scores.size, threshold_at_far(impostor, far, rule)
    if math.isnan(value):
        return Statistic(name, scores.size, undefined, value, math.nan, math.nan)
    grid = _grid(scores, 1 - far * np.append(0, np.geomspace(0.1, min(10, 1 / far), GRID)))
    thresholds = grid[np.argmax(_false_accepts(trial, weights, grid) <= far, axis=1)]
    return Statistic(name, scores.size, undefined, value, *_interval(thresholds, trial.persons))


def _eer_statistic(trial: Verification, weights: Floats) -> Statistic:
    genuine, impostor = _defined(trial.scores[trial.same]), _defined(trial.scores[~trial.same])
    n, value = genuine.size + impostor.size, eer(genuine, impostor)
    if math.isnan(value):
        return Statistic("eer", n, trial.scores.size - n, value, math.nan, math.nan)
    levels = np.linspace(0, 1, GRID)
    grid = np.union1d(_grid(genuine, levels), _grid(impostor, levels))
    accepts = weights @ _above(trial.scores, trial.same, trial.rows, trial.persons, grid)
    rates = _crossing(_false_accepts(trial, weights, grid), 1 - _ratio(accepts, accepts[:, :1]))
    return Statistic("eer", n, trial.scores.size - n, value, *_interval(rates, trial.persons))


def _impostor_mean_statistic(trial: Verification, weights: Floats) -> Statistic:
    impostor = ~trial.same
    counted = impostor & ~np.isnan(trial.scores)

    def resampled_sums(table: Floats) -> Floats:
        by_row = np.bincount(trial.rows, table.sum(axis=1), trial.persons)
        by_column = np.bincount(trial.columns, table.sum(axis=0), trial.persons)
        total: Floats = weights @ (by_row + by_column - table.sum() / trial.persons)
        return total

    means = _ratio(resampled_sums(np.where(counted, trial.scores, 0)), resampled_sums(counted.astype(np.float64)))
    n, everything = int(counted.sum()), int(impostor.sum())
    value = _mean(trial.scores[counted])
    return Statistic("impostor mean", n, everything - n, value, *_interval(means, trial.persons))


def _false_accepts(trial: Verification, weights: Floats, grid: Floats) -> Floats:
    """The false accept rate (b t) of each draw at each threshold of the grid, whose first is -inf."""
    by_row = _above(trial.scores, ~trial.same, trial.rows, trial.persons, grid)
    by_column = _above(trial.scores.T, ~trial.same.T, trial.columns, trial.persons, grid)
    accepts = weights @ (by_row + by_column - by_row.sum(axis=0) / trial.persons)
    return _ratio(accepts, accepts[:, :1])


def _above(scores: Floats, chosen: Bools, rows: Codes, persons: int, grid: Floats) -> Floats:
    """How many chosen scores of each person's rows lie above each threshold of the grid (persons t)."""
    chosen = chosen & ~np.isnan(scores)
    passed = np.searchsorted(grid, scores[chosen])  # as many thresholds lie below the score
    cells = rows[np.nonzero(chosen)[0]] * (grid.size + 1) + passed
    tally = np.bincount(cells, minlength=persons * (grid.size + 1)).reshape(persons, grid.size + 1)
    return tally[:, ::-1].cumsum(axis=1)[:, ::-1][:, 1:].astype(np.float64)


def _grid(scores: Floats, levels: Floats) -> Floats:
    return np.union1d([-np.inf], np.quantile(scores, levels))


def _crossing(false_accept: Floats, false_reject: Floats) -> Floats:
    """The common value of both rates (… t) over rising thresholds, from (1, 0) to (0, 1), lines drawn between them."""
    gap = false_reject - false_accept
    right = np.argmax(gap >= 0, axis=-1, keepdims=True)
    left = np.maximum(right - 1, 0)

    def at(curve: Floats, place: Codes) -> Floats:
        return np.take_along_axis(curve, place, axis=-1)[..., 0]

    rise = at(gap, right) - at(gap, left)
    share = np.divide(-at(gap, left), rise, out=np.zeros_like(rise), where=rise > 0)
    return at(false_accept, left) + share * (at(false_accept, right) - at(false_accept, left))


def _grouped(values: ArrayLike, groups: Sequence[str] | None) -> tuple[Floats, Codes, int, int]:
    """The defined values, the number of each one's group, how many groups, and how many values are undefined."""
    data = np.asarray(values, np.float64)
    if groups is not None and len(groups) != data.size:
        raise ValueError(f"{len(groups)} groups for {data.size} values")
    defined = ~np.isnan(data)
    if groups is None:
        codes, count = np.arange(defined.sum()), int(defined.sum())
    else:
        labels, codes = np.unique(np.asarray(groups, dtype=str)[defined], return_inverse=True)
        count = len(labels)
    return data[defined], codes, count, int((~defined).sum())


@functools.lru_cache(maxsize=2)
def _weights(count: int, resamples: int, seed: int) -> Floats:
    """How often each of `count` identities comes up in each draw (resamples count), the same for every statistic."""
    generator = np.random.default_rng(seed)
    weights = np.empty((resamples, count), np.float32)
    for draw in weights:
        draw[:] = np.bincount(generator.integers(0, count, count), minlength=count) if count else 0
    weights.flags.writeable = False
    return weights


def _interval(drawn: Floats, count: int) -> tuple[float, float]:
    """The middle 95 % of the draws; NaN for fewer than two identities, whose draws are all alike."""
    if count < 2 or np.isnan(drawn).all():
        return math.nan, math.nan
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return float(low), float(high)


def _ratio(numerator: Floats, denominator: Floats) -> Floats:
    """NaN where a draw holds nothing to divide by."""
    denominator = np.broadcast_to(denominator, numerator.shape)
    quotient: Floats = np.full(numerator.shape, np.nan)
    np.divide(numerator, denominator, out=quotient, where=denominator > 0)
    return quotient


def _mean(data: Floats) -> float:
    return float(data.mean()) if data.size else math.nan


def _defined(scores: ArrayLike) -> Floats:
    flat = np.asarray(scores, np.float64).ravel()
    return flat[~np.isnan(flat)]
