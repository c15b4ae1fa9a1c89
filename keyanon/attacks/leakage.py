"""What attackers without the key, or with a part of it, learn from published files: tensors and arrays in, numbers out.

Everyone knows model, sampler, files and headers (Kerckhoffs). So everyone computes z'_T, the noise of a published picture, and
draws the picture of any other noise into the same background. What the holder of the key can do beyond that is to undo the keyed
transform. `keyanon.types.KeyedNoise` has these three.

What an attack finds is an area under the ROC curve (0.5: nothing, 1: certainty), a D_sys (0: nothing, 1: certainty), a share of
key bits (0.5: nothing), a cosine to be set beside that of strangers, or a time.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from time import perf_counter

import numpy as np
import torch
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from jaxtyping import Bool, Float, Int8
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import orthogonal_procrustes
from scipy.spatial.distance import cdist
from torch import Tensor

from keyanon.channel.headers import BadHeader, Header, unseal
from keyanon.channel.pixels import to_bytes, to_floats
from keyanon.context import NONCE_BYTES, Context
from keyanon.measures.biometrics import RESAMPLES, Floats, Statistic, d_sys
from keyanon.methods.transforms import coded, decoded
from keyanon.types import Image, Key, Latent, Mask, PictureBytes, Secret, Summary

Rows = NDArray[np.intp]
QUANTILES = np.linspace(0, 1, 33)  # stand for the values of a channel
FEWEST_CELLS = 8  # in common; fewer tell nothing
COMPARED_SIGNS = 512
DRAWS = 9999  # of a test by random signs
LEVELS = 1000  # at most, where distribution functions are compared
CHUNK = 1000  # draws at a time


# Linkage: do two files show one photograph? Does a file show this photograph?
def layout_likeness(a: Latent, in_a: Mask, b: Latent, in_b: Mask) -> Floats:
    """How alike |z| is, cell by cell, for all pictures of `a` and `b`: (n m), NaN where their faces share no FEWEST_CELLS.

    Pearson's correlation over the common cells, averaged over channels. Flipped signs leave it at 1 up to what the loop loses;
    it is the attack that signs cannot answer (recovery by phase retrieval works on the same |z|).
    """
    first, second = (z.abs().double().cpu().numpy() for z in (a, b))
    here, there = (mask[:, 0].cpu().numpy() for mask in (in_a, in_b))
    return np.array([[correlation(x, y, p & q) for y, q in zip(second, there)] for x, p in zip(first, here)])  # noqa: B905


def correlation(x: Floats, y: Floats, inside: NDArray[np.bool_]) -> float:
    if inside.sum() < FEWEST_CELLS:
        return math.nan
    p, q = x[:, inside], y[:, inside]
    p, q = p - p.mean(1, keepdims=True), q - q.mean(1, keepdims=True)
    return float(np.mean((p * q).sum(1) / np.maximum(np.linalg.norm(p, axis=1) * np.linalg.norm(q, axis=1), 1e-12)))


def channel_norms(zT: Latent, mask: Mask) -> Floats:
    """log of the root mean square of each channel in the face (n c): what rotations leave, if nothing takes it out."""
    rows = [np.log(np.square(face).mean(1) + 1e-12) / 2 for face in faces(zT, mask)]
    return np.stack(rows)


def published_norms(zT: Latent, mask: Mask, secret: Secret) -> Floats:
    """log of the norms (n c) that a transform gives out for z_T, in floats: 0 but for the rounding of their code where it takes
    norms out.
    """
    norms = channel_norms(zT, mask)
    if secret != "rotation":
        return norms
    given = np.stack([decoded(coded(torch.from_numpy(row).exp())).log().numpy() for row in norms])
    return np.asarray(norms - given)


def sorted_magnitudes(zT: Latent, mask: Mask) -> Floats:
    """Quantiles of |z| in each channel of the face (n c*q): what permutations and flipped signs leave."""
    rows = [np.quantile(np.abs(face), QUANTILES, axis=1).ravel() for face in faces(zT, mask)]
    return np.stack(rows)


def faces(zT: Latent, mask: Mask) -> list[Floats]:
    """The values (c d) in each picture's face; one cell of NaN where there is none."""
    inside = [z[:, cells].double().cpu().numpy() for z, cells in zip(zT, mask[:, 0], strict=True)]
    return [face if face.size else np.full((len(face), 1), math.nan) for face in inside]


def feature_likeness(a: Floats, b: Floats) -> Floats:
    """Minus the distance of all rows of `a` (n k) and `b` (m k), each column in units of its spread over all of them."""
    spread = np.nanstd(np.concatenate([a, b]), axis=0)
    unit = np.where(spread > 0, spread, 1)
    return -np.asarray(cdist(a / unit, b / unit))


SUMMARIES = {
    "auc": Summary(direction="none"),  # 0.5 tells nothing; above and below tell
    "d_sys": Summary(direction="lower"),
    "d_sys by chance": Summary(direction="none"),
    "ks_d": Summary("largest gap of distribution functions, people's mean", "none"),
    "ks_p": Summary("p of that gap, by signs of people drawn at random", "none"),
}


def linkage_statistics(scores: Floats, people: Sequence[Hashable] | Rows, seed: int = 0) -> list[Statistic]:
    """Are the scores (p n n) of one photograph (diagonals) above those of two? For p comparisons of n photographs of `people`.

    `auc`: the chance that they are, 0.5 for systems that do not link. `d_sys` (Gomez-Barrero et al., IEEE TIFS 13(6), 2018) is
    never below 0 and above it by chance alone: `d_sys by chance` is the mean, and the middle 95 %, of what it says when
    photographs are paired with others. Bars: 1.0 where it links with certainty; 0.55 and 0.1 for leak-free. With
    few photographs D_sys says little either way: below 100 scores of one photograph it has fewer than 10 bins, and it gave 0.18
    to 7 that an AUC of 1 told apart. Photographs drawn again would put copies of a score into one bin, and D_sys above
    itself: its interval is the jackknife's.

    People are drawn again, or left out, with all their photographs. A photograph drawn twice counts twice; with its own copy it
    makes no pair of two.
    """
    n = scores.shape[-1]
    same, defined = np.eye(n, dtype=bool), ~np.isnan(scores)
    levels, codes = np.unique(np.where(defined, scores, 0), return_inverse=True)
    codes = codes.reshape(scores.shape)

    def weighted_auc(rows: Rows) -> float:
        times = np.bincount(rows, minlength=n).astype(np.float64)
        both = np.where(same, np.diag(times), np.outer(times, times)) * defined

        def tally(chosen: NDArray[np.bool_]) -> Floats:
            return np.bincount(codes[:, chosen].ravel(), both[:, chosen].ravel(), levels.size).astype(np.float64)

        mated, other = tally(same), tally(~same)
        total = mated.sum() * other.sum()
        return float(mated @ (other.cumsum() - other / 2) / total) if total else math.nan

    def d_sys_of(rows: Rows) -> float:
        picked = scores[:, rows[:, None], rows[None]]
        one = np.eye(len(rows), dtype=bool)
        return d_sys(picked[:, one], picked[:, ~one])

    def shifted(by: int) -> float:
        moved = np.roll(scores, by, axis=2)
        return d_sys(moved[:, same], moved[:, ~same])

    mated = scores[:, same]
    undefined = int(np.isnan(mated).sum())
    counted, everyone = (mated.size - undefined, undefined), np.arange(n)
    chance = np.array([shifted(by) for by in range(1, n)])
    known = chance[~np.isnan(chance)]
    middle = (float(known.mean()), *map(float, np.percentile(known, [2.5, 97.5]))) if known.size else (math.nan,) * 3
    return [
        Statistic("auc", *counted, weighted_auc(everyone), *interval(weighted_auc, people, seed=seed)),
        Statistic("d_sys", *counted, d_sys_of(everyone), *jackknife_interval(d_sys_of, people)),
        Statistic("d_sys by chance", *counted, *middle),
    ]


def auc(mated: ArrayLike, nonmated: ArrayLike) -> float:
    """The chance that a score of the first is above one of the second, ties counted half; NaN scores do not count."""
    same, other = (values[~np.isnan(values)] for values in map(np.ravel, map(np.asarray, (mated, nonmated))))
    if same.size == 0 or other.size == 0:
        return math.nan
    ranked = np.sort(other)
    below, up_to = (np.searchsorted(ranked, same, side) for side in ("left", "right"))
    return float((below + up_to).mean() / (2 * other.size))


def auc_statistic(
    right: ArrayLike, wrong: ArrayLike, people: Sequence[Hashable] | Rows, name: str = "auc", seed: int = 0
) -> Statistic:
    """`auc` of values (n a) against values (n b) of the same n pictures, with the interval of `people` drawn again."""
    first, second = np.asarray(right, np.float64), np.asarray(wrong, np.float64)
    undefined = int(np.isnan(first).sum())

    def at(rows: Rows) -> float:
        return auc(first[rows], second[rows])

    return Statistic(
        name, first.size - undefined, undefined, at(np.arange(len(first))), *interval(at, people, seed=seed)
    )


def rows_by_person(people: Sequence[Hashable] | Rows) -> list[Rows]:
    """The rows of each person, in the order in which they first come."""
    rows: dict[Hashable, list[int]] = {}
    for row, who in enumerate(people):
        rows.setdefault(who, []).append(row)
    return [np.array(own) for own in rows.values()]


def interval(
    value: Callable[[Rows], float], people: Sequence[Hashable] | Rows, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """The middle 95 % of `value` when people are drawn again with replacement, each with all rows; NaN for fewer than two.

    What somebody learned before stays as it is: intervals of learners are those of one trained attacker.
    """
    generator, own = np.random.default_rng(seed), rows_by_person(people)
    if (n := len(own)) < 2:
        return math.nan, math.nan
    draws = (generator.integers(0, n, n) for _ in range(resamples))
    values = np.array([value(np.concatenate([own[i] for i in draw])) for draw in draws])
    if np.isnan(values).all():
        return math.nan, math.nan
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return float(low), float(high)


def jackknife_interval(value: Callable[[Rows], float], people: Sequence[Hashable] | Rows) -> tuple[float, float]:
    """`value`, within [0, 1], and 1.96 standard errors to both sides, from leaving out each person in turn, with all rows."""
    everyone, own = np.arange(len(people)), rows_by_person(people)
    middle, n = value(everyone), len(own)
    if n < 3 or math.isnan(middle):
        return math.nan, math.nan
    without = np.array([value(np.delete(everyone, rows)) for rows in own])
    error = math.sqrt((n - 1) / n * np.square(without - without.mean()).sum())
    return max(0.0, middle - 1.96 * error), min(1.0, middle + 1.96 * error)


# Known plaintext: some originals and their files are known, and the key stream is one for all
@dataclass(frozen=True)
class OneStream:
    """A key as the authors use theirs: one stream for all pictures, whatever their nonces."""

    key: Key

    def stream(self, context: Context, purpose: str, size: int) -> bytes:
        return self.key.stream(Context(bytes(NONCE_BYTES)), purpose, size)


def voted_signs(originals: Latent, published: Latent, mask: Mask) -> Int8[Tensor, "c u v"]:
    """k as m pairs (m c u v) of z_T and z'_T show it in their faces (m 1 u v): 0 where none of them has a face.

    sign(sum_j z_j z'_j): each pair votes for its sign(z z') with the weight |z z'|, as small entries are mostly error.
    """
    votes = (originals.double() * published.double() * mask).sum(0)
    return votes.sign().to(torch.int8)


def share_right(found: Tensor, truth: Tensor, inside: Bool[Tensor, "u v"]) -> float:
    """The share of right signs (c u v) inside; a sign not found (0) is half right, as a coin would have it. NaN for no cell."""
    agreement = (found * truth)[:, inside].double()
    return float(((1 + agreement) / 2).mean())


def rotated_back(
    originals: Float[Tensor, "m c d"],
    published: Float[Tensor, "m c d"],
    sent: Sequence[bytes],
    turned: Float[Tensor, "t c d"],
    turned_sent: Sequence[bytes],
) -> Float[Tensor, "t c d"]:
    """The faces (t c d) of `turned`, rotated back and with their norms, as m known pairs (m c d) of one key stream show them.

    Q_c by the orthogonal Procrustes problem, min_Q |Q z_c - z'_c|^2 (Schoenemann, Psychometrika 31, 1966); with fewer pairs than
    cells it is free on what they do not span, and any rotation will do there. Norms are sent XORed with bytes of the same
    stream, so a known norm gives these bytes; each is taken from the pair where most others agree.
    """
    out = np.empty(tuple(turned.shape))
    a, b, c = (z.double().cpu().numpy() for z in (originals, published, turned))
    for i in range(a.shape[1]):
        turn, _ = orthogonal_procrustes(b[:, i], a[:, i])
        out[:, i] = c[:, i] @ turn
    known = [coded(face.square().mean(1).sqrt()) for face in originals.double().cpu()]
    streams = [
        bytes(p ^ q for p, q in zip(code, cipher, strict=True)) for code, cipher in zip(known, sent, strict=True)
    ]
    stream = [Counter(column).most_common(1)[0][0] for column in zip(*streams, strict=True)]
    norms = torch.stack([decoded(bytes(p ^ q for p, q in zip(stream, code, strict=True))) for code in turned_sent])
    return (torch.from_numpy(out) * norms[:, :, None]).to(turned)


# The authors' keys: 32 bits
@dataclass(frozen=True)
class SeededSigns:
    """The authors' keys: torch's CPU generator from a seed below 2^32, Bernoulli(0.5) for each sign."""

    seed: int

    def stream(self, context: Context, purpose: str, size: int) -> bytes:
        bits = seeded_bits(torch.Generator(), self.seed, torch.full((8 * size,), 0.5))
        return np.packbits(bits.numpy().astype(np.uint8)).tobytes()


def seeded_bits(generator: torch.Generator, seed: int, half: Tensor) -> Tensor:
    """One 0 or 1 for each entry of `half`; the first ones do not depend on how many there are."""
    return torch.bernoulli(half, generator=generator.manual_seed(seed))


def seed_search(
    products: Float[Tensor, "c u v"], inside: Bool[Tensor, "u v"], seeds: Iterable[int]
) -> tuple[int, float, float]:
    """The seed whose signs agree best with one known pair's `products` z z' (c u v) in the face, how well, and seeds/s.

    Each of the first COMPARED_SIGNS signs of the face counts with the weight |z z'|. The agreement is in standard deviations of
    what a wrong seed has; the luckiest of 2^32 wrong ones has about 6.2. One thread, no accelerator: a lower bound of what an
    attacker does. -1 and NaN where there is no face.
    """
    places = inside.expand_as(products).flatten().nonzero()[:COMPARED_SIGNS, 0]
    if len(places) == 0:
        return -1, math.nan, math.nan
    weights = products.flatten()[places]
    spread, half, generator = weights.norm(), torch.full((int(places[-1]) + 1,), 0.5), torch.Generator()
    best, agreement, tried, started = -1, -math.inf, 0, perf_counter()
    for seed in seeds:
        k = 2 * seeded_bits(generator, seed, half)[places] - 1
        deviations = (k.dot(weights) / spread).item()
        best, agreement = (seed, deviations) if deviations > agreement else (best, agreement)
        tried += 1
    return best, agreement, tried / (perf_counter() - started)


# Wrong keys
@dataclass(frozen=True)
class NonceOff:
    """The right key with a nonce that differs in one bit."""

    key: Key
    bit: int = 0

    def stream(self, context: Context, purpose: str, size: int) -> bytes:
        off = bytearray(context.nonce)
        off[self.bit // 8] ^= 1 << (self.bit % 8)
        return self.key.stream(replace(context, nonce=bytes(off)), purpose, size)


def kolmogorov_smirnov(
    a: ArrayLike,
    people_a: Sequence[Hashable] | Rows,
    b: ArrayLike,
    people_b: Sequence[Hashable] | Rows,
    draws: int = DRAWS,
    seed: int = 0,
) -> list[Statistic]:
    """Are values `a` and `b` distributed alike, of people who have any number of them on both sides? A two-sample test by person.

        D_i(t)  = share of person i's values in a up to t - share of those in b
        ks_d    = sup_t |mean_i D_i(t)|
        ks_p    = (1 + draws in which random signs s_i give sup_t |mean_i s_i D_i(t)| >= ks_d) / (1 + draws)

    With one value on each side, that is the permutation test of pairs by the distance of Kolmogorov and Smirnov. With more, it is a
    wild bootstrap of clusters with Rademacher signs (Liu, Annals of Statistics 16(4), 1988): one person's values may depend on
    each other as they will, people must not. `t` are all values, or LEVELS of them. n counts people; who lacks a side is
    undefined. NaN is left out.
    """
    values = np.concatenate([np.ravel(a), np.ravel(b)]).astype(np.float64)
    side = np.arange(values.size) < np.size(a)
    labels, who = np.unique(np.concatenate([list(people_a), list(people_b)]), return_inverse=True)
    defined = ~np.isnan(values)
    counts = [np.bincount(who[defined & here], minlength=len(labels)) for here in (side, ~side)]
    both = (counts[0] > 0) & (counts[1] > 0)
    n, kept = int(both.sum()), defined & both[who]
    found = (math.nan, math.nan)
    if n:
        t = np.unique(values[kept])
        t = t[np.unique(np.linspace(0, t.size - 1, LEVELS).astype(int))]
        shares = [
            distribution_functions(values[kept & here], who[kept & here], len(labels), t)[both]
            for here in (side, ~side)
        ]
        gaps, generator = (shares[0] - shares[1]) / n, np.random.default_rng(seed)
        largest = float(np.abs(gaps.sum(0)).max())
        beyond = 0
        for start in range(0, draws, CHUNK):
            flips = 2.0 * generator.integers(0, 2, (min(CHUNK, draws - start), n)) - 1
            beyond += int((np.abs(flips @ gaps).max(1) >= largest - 1e-9).sum())
        found = (largest, (1 + beyond) / (1 + draws))
    return [
        Statistic(name, n, len(labels) - n, value, math.nan, math.nan)
        for name, value in zip(("ks_d", "ks_p"), found, strict=True)
    ]


def distribution_functions(values: Floats, people: Rows, count: int, t: Floats) -> Floats:
    """The share of each of `count` people's values that are up to each of the rising `t` (count t); NaN of nobody's values."""
    tally = np.zeros((count, t.size + 1))
    np.add.at(tally, (people, np.searchsorted(t, values)), 1)
    with np.errstate(invalid="ignore"):
        shares: Floats = tally[:, :-1].cumsum(1) / tally.sum(1, keepdims=True)
    return shares


def share_needed(shares: ArrayLike, cosines: ArrayLike, threshold: float) -> Floats:
    """The least share of right signs at which each picture's cosines (n s) pass the threshold, drawn as a line over the rising
    shares (s); the first share where it is passed from the start, NaN where it never is.
    """
    x, y = np.asarray(shares, np.float64), np.asarray(cosines, np.float64)
    needed = np.full(len(y), math.nan)
    for i, row in enumerate(y):
        known = ~np.isnan(row)
        at, height = x[known], row[known]
        above = np.flatnonzero(height > threshold)
        if above.size and above[0] == 0:
            needed[i] = at[0]
        elif above.size:
            j = above[0]
            rise = (threshold - height[j - 1]) / (height[j] - height[j - 1])
            needed[i] = at[j - 1] + rise * (at[j] - at[j - 1])
    return needed


# What is left without a face
def blanked(images: Image, face: Mask) -> Image:
    """The face's pixels (b 1 h w) in the mean colour of the others."""
    rest = (~face).to(images)
    mean = (images * rest).sum((2, 3), keepdim=True) / rest.sum((2, 3), keepdim=True).clamp(min=1)
    return torch.where(face, mean, images)


# Changed files
def one_bit_off_pictures(images: Image, headers: Sequence[bytes]) -> Image:
    """Pictures with the lowest bit of one byte changed, somewhere else in each."""
    pixels = to_bytes(images)
    for picture, header in zip(pixels, headers, strict=True):
        place = int.from_bytes(hashlib.sha256(header).digest()[:8], "big") % picture.numel()
        picture.view(-1)[place] ^= 1
    return to_floats(pixels)


def one_bit_off_headers(header: bytes) -> list[bytes]:
    """All headers that differ from this one in one bit."""
    number, size = int.from_bytes(header, "big"), len(header)
    return [(number ^ (1 << bit)).to_bytes(size, "big") for bit in range(8 * size)]


def without_tag(header: bytes) -> bytes:
    return replace(Header.unpack(header), tag=b"").pack()


def is_refused(header: bytes, picture: PictureBytes, key: Key) -> bool:
    """Whether the owner of the key, who looks at tags, is told that something is wrong."""
    try:
        unseal([header], picture[None], [key], authenticate=True)
    except BadHeader:
        return True
    return False


# Passwords
def argon2_seconds(iterations: int, memory: int, lanes: int, guesses: int) -> list[float]:
    """What each of `guesses` passwords costs on this machine by Argon2id (RFC 9106), `memory` in KiB; raises MemoryError."""
    seconds = []
    for i in range(guesses):
        started = perf_counter()
        Argon2id(salt=bytes(16), length=32, iterations=iterations, lanes=lanes, memory_cost=memory).derive(b"%d" % i)
        seconds.append(perf_counter() - started)
    return seconds
