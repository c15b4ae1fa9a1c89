"""Attacks against what is known of them: identical and independent features, flips without noise, seeds that were drawn."""

import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ks_2samp, mannwhitneyu, permutation_test

from keyanon.attacks import leakage, pairs
from keyanon.attacks.leakage import (
    NonceOff,
    OneStream,
    SeededSigns,
    auc,
    auc_statistic,
    blanked,
    channel_norms,
    feature_likeness,
    is_refused,
    jackknife_interval,
    kolmogorov_smirnov,
    layout_likeness,
    linkage_statistics,
    one_bit_off_headers,
    one_bit_off_pictures,
    published_norms,
    rotated_back,
    seed_search,
    share_needed,
    share_right,
    sorted_magnitudes,
    voted_signs,
    without_tag,
)
from keyanon.channel.headers import Header, seal
from keyanon.channel.keys import experiment_key
from keyanon.channel.pixels import to_bytes, to_floats
from keyanon.channel.streams import signs
from keyanon.context import NONCE_BYTES, Context
from keyanon.diffusion.model import LatentDiffusion
from keyanon.diffusion.solvers import DDIM
from keyanon.faces.datasets import bundled_faces
from keyanon.methods.exact import Exact
from keyanon.methods.refinement import Refinement, ToneCurve
from keyanon.methods.seams import Seam
from keyanon.methods.signflip import SignFlip
from keyanon.methods.transforms import BandRotation, Permutation, SignFlipping
from tests.conftest import CentreFace

KEYS = [experiment_key(i) for i in range(8)]
CONTEXTS = [Context(bytes([i]) * NONCE_BYTES) for i in range(8)]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def everywhere(n: int) -> torch.Tensor:
    return torch.ones(n, 1, 8, 8, dtype=torch.bool)


def by_name(statistics):
    return {statistic.statistic: statistic for statistic in statistics}


# Linkage


def linked(transform, likeness) -> dict:
    """Two files each of 8 photographs' noise under independent keys, with channel norms as inverted photographs have them and
    a small error of the loop.
    """
    zT, mask = normal(8, 6, 8, 8) * (0.13 + 0.18 * normal(8, 6, 1, 1, seed=1)).exp(), everywhere(8)
    a, b = (transform.apply(zT, mask, [experiment_key(10 * k + i) for i in range(8)], CONTEXTS)[0] for k in (1, 2))
    a, b = (z + 1e-3 * normal(*zT.shape, seed=seed) for seed, z in enumerate((a, b), start=2))
    return by_name(linkage_statistics(likeness(a, b, mask)[None], range(8)))


def by_layout(a, b, mask):
    return layout_likeness(a, mask, b, mask)


def by_norms(a, b, mask):
    return feature_likeness(channel_norms(a, mask), channel_norms(b, mask))


def by_values(a, b, mask):
    return feature_likeness(sorted_magnitudes(a, mask), sorted_magnitudes(b, mask))


@pytest.mark.parametrize(
    ("transform", "likeness", "certain"),
    [
        (SignFlipping(), by_layout, True),
        (SignFlipping(), by_norms, True),
        (SignFlipping(), by_values, True),
        (Permutation(), by_layout, False),
        (Permutation(), by_norms, True),
        (Permutation(), by_values, True),
        (BandRotation(), by_layout, False),
        (BandRotation(), by_norms, False),
        (BandRotation(), by_values, False),
    ],
)
def test_each_transform_is_linked_by_what_it_leaks_and_by_nothing_else(transform, likeness, certain):
    found = linked(transform, likeness)
    assert found["auc"].n == 8
    if certain:
        assert found["auc"].value == 1
        assert (found["auc"].low, found["auc"].high) == (1, 1)
        assert found["d_sys"].value > found["d_sys by chance"].high
    else:
        assert found["auc"].low < 0.5 < found["auc"].high
        assert found["d_sys by chance"].low <= found["d_sys"].value <= found["d_sys by chance"].high


def test_independent_scores_do_not_link():
    found = by_name(linkage_statistics(np.random.default_rng(0).standard_normal((6, 40, 40)), range(40)))
    assert found["auc"].n == 240
    assert found["auc"].value == pytest.approx(0.5, abs=0.06)
    assert found["d_sys"].value == pytest.approx(found["d_sys by chance"].value, abs=0.1)


def test_d_sys_is_1_where_scores_never_overlap():
    scores = np.random.default_rng(0).random((10, 20, 20)) + 3 * np.eye(20)
    found = by_name(linkage_statistics(scores, range(20)))
    assert (found["auc"].value, found["d_sys"].value, found["d_sys"].n) == (1, 1, 200)


def test_auc_is_the_chance_to_be_above():
    assert auc([3, 4], [1, 2]) == 1
    assert auc([1, 2], [3, 4]) == 0
    assert auc([1, 2], [1, 2]) == 0.5
    assert auc([2, math.nan], [1, 3, math.nan]) == 0.5
    assert math.isnan(auc([], [1]))
    a, b = np.random.default_rng(1).integers(0, 9, (2, 50))
    assert auc(a, b[:30]) == pytest.approx(mannwhitneyu(a, b[:30]).statistic / (50 * 30), abs=1e-12)
    generator = np.random.default_rng(0)  # Phi(1 / sqrt 2)
    shifted = auc_statistic(generator.standard_normal((300, 2)) + 1, generator.standard_normal((300, 3)), range(300))
    assert shifted.value == pytest.approx(0.7602, abs=0.03)
    assert shifted.low < 0.7602 < shifted.high


def test_only_the_common_part_of_two_faces_is_compared():
    z, left, right = normal(1, 3, 8, 8), everywhere(1), everywhere(1)
    left[..., 6:], right[..., :2] = False, False
    other = z.clone()
    other[~right.expand_as(z)] = 99
    assert layout_likeness(z, left, -other, right)[0, 0] == pytest.approx(1)
    right[..., 2:7] = False
    assert math.isnan(layout_likeness(z, left, z, right)[0, 0])


def test_a_picture_without_a_face_is_undefined():
    z, mask = normal(3, 2, 8, 8), everywhere(3)
    mask[1] = False
    for likeness in (by_layout, by_norms, by_values):
        found = by_name(linkage_statistics(likeness(z, z, mask)[None], range(3)))
        assert (found["auc"].n, found["auc"].undefined, found["auc"].value) == (2, 1, 1)


# Known plaintext


def test_one_pair_gives_the_key_away_where_there_is_no_noise():
    z, k = normal(1, 3, 8, 8), signs(KEYS[0], CONTEXTS[0], (3, 8, 8))
    found = voted_signs(z, k * z, everywhere(1))
    assert torch.equal(found, k)
    assert share_right(found, k, everywhere(1)[0, 0]) == 1
    assert share_right(-found, k, everywhere(1)[0, 0]) == 0


def test_more_pairs_give_more_of_a_noisy_key():
    """Both latents with white error of variance e^2: the votes' signs are right with arccos(-1 / (1 + e^2)) / pi for one pair."""
    z, k, error = normal(20, 8, 8, 8), signs(KEYS[0], CONTEXTS[0], (8, 8, 8)), 0.7
    seen = [k * z + error * normal(*z.shape, seed=1), z + error * normal(*z.shape, seed=2)]
    shares = [
        share_right(voted_signs(seen[1][:m], seen[0][:m], everywhere(m)), k, everywhere(1)[0, 0]) for m in (1, 5, 20)
    ]
    assert shares[0] == pytest.approx(math.acos(-1 / (1 + error**2)) / math.pi, abs=0.05)
    assert shares[0] + 0.05 < shares[1] < shares[2]
    assert shares[2] > 0.99


def test_cells_outside_every_face_are_guessed():
    z, mask = normal(2, 3, 8, 8), everywhere(2)
    mask[..., :4] = False
    k = signs(KEYS[0], CONTEXTS[0], (3, 8, 8))
    found = voted_signs(z, k * z, mask)
    assert (found[..., :4] == 0).all()
    assert share_right(found, k, everywhere(1)[0, 0]) == 0.75
    assert math.isnan(share_right(found, k, ~everywhere(1)[0, 0]))


def test_keys_that_forget_their_nonce_and_keys_that_mistake_it():
    assert OneStream(KEYS[0]).stream(CONTEXTS[1], "signs", 9) == OneStream(KEYS[0]).stream(CONTEXTS[2], "signs", 9)
    assert KEYS[0].stream(CONTEXTS[1], "signs", 9) != KEYS[0].stream(CONTEXTS[2], "signs", 9)
    off = NonceOff(KEYS[0], bit=9).stream(Context(bytes(NONCE_BYTES)), "signs", 9)
    assert off == KEYS[0].stream(Context(b"\0\2" + bytes(NONCE_BYTES - 2)), "signs", 9)


# Seeds


@given(st.integers(0, 2**32 - 1))
def test_seeded_signs_are_torchs(seed):
    torch.manual_seed(seed)
    k = 2 * torch.bernoulli(torch.full((3, 8, 8), 0.5)) - 1
    assert torch.equal(signs(SeededSigns(seed), CONTEXTS[0], (3, 8, 8)).float(), k)


def test_the_seed_is_found_from_one_noisy_pair():
    inside = everywhere(1)[0, 0]
    inside[:, :3] = False
    k = signs(SeededSigns(1234), CONTEXTS[0], (6, 8, 8))
    z = normal(6, 8, 8)
    seed, agreement, rate = seed_search(z * (k * z + normal(6, 8, 8, seed=1)), inside, range(2000))
    assert seed == 1234
    assert agreement > 6.2
    assert rate > 0
    # 240 signs without noise: sum |z|^2 / sqrt(sum z^4) is about sqrt(240 / 3)
    assert seed_search(z * k * z, inside, [1234])[1] == pytest.approx(80**0.5, rel=0.1)
    assert seed_search(z * k * z, inside, range(1234))[1] < 5
    assert seed_search(z, torch.zeros_like(inside), range(9))[0] == -1


# Wrong keys, blanked faces, passwords


def dependent(generator: np.random.Generator, people: int, each: int, alike: float = 0.95) -> np.ndarray:
    """Standard normal values (people each), those of one person with the correlation `alike`."""
    own, rest = generator.standard_normal((people, 1)), generator.standard_normal((people, each))
    return np.sqrt(alike) * own + np.sqrt(1 - alike) * rest


def p_value(a: np.ndarray, b: np.ndarray, draws: int = 199) -> float:
    whose = [np.repeat(np.arange(len(side)), side.shape[1]) for side in (a, b)]
    return by_name(kolmogorov_smirnov(a, whose[0], b, whose[1], draws=draws))["ks_p"].value


@pytest.mark.parametrize(("each", "pooled_at_least"), [((4, 1), 0.1), ((4, 4), 0.3)])
def test_a_person_seen_four_times_counts_once(each, pooled_at_least):
    """Both sides have one law: 5 % of the tests may reject it. The pooled test, as it was, rejects it far more often."""
    generator, trials = np.random.default_rng(0), 300
    sides = [[dependent(generator, 40, m) for m in each] for _ in range(trials)]
    rejected = np.mean([p_value(a, b) <= 0.05 for a, b in sides])
    assert abs(rejected - 0.05) < 3 * math.sqrt(0.05 * 0.95 / trials)
    assert np.mean([ks_2samp(a.ravel(), b.ravel()).pvalue <= 0.05 for a, b in sides]) > pooled_at_least


def test_a_shift_is_found():
    generator = np.random.default_rng(1)
    found = [p_value(dependent(generator, 40, 4) + 1, dependent(generator, 40, 1)) <= 0.05 for _ in range(30)]
    assert np.mean(found) > 0.9


def test_a_persons_whole_distribution_is_a_control():
    """One value a person beside many of each, as impostors are: the level holds."""
    generator, trials = np.random.default_rng(2), 300
    rejected = [
        p_value(generator.standard_normal((40, 1)), generator.standard_normal((40, 100))) <= 0.05 for _ in range(trials)
    ]
    assert abs(np.mean(rejected) - 0.05) < 3 * math.sqrt(0.05 * 0.95 / trials)


def test_few_people_as_all_their_signs_have_it():
    generator = np.random.default_rng(3)
    a, b = generator.standard_normal((7, 3)) + 0.5, generator.standard_normal((7, 2))
    t = np.concatenate([a.ravel(), b.ravel()])
    gaps = (a[:, :, None] <= t).mean(1) - (b[:, :, None] <= t).mean(1)
    every = np.array([np.abs(np.array(signs_) @ gaps / 7).max() for signs_ in product((-1, 1), repeat=7)])
    exact = np.mean(every >= every[-1] - 1e-9)
    found = by_name(kolmogorov_smirnov(a, np.repeat(range(7), 3), b, np.repeat(range(7), 2)))
    assert found["ks_d"].value == pytest.approx(every[-1])
    assert found["ks_p"].value == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 9999))


def test_one_value_each_is_scipys_permutation_of_pairs():
    generator = np.random.default_rng(4)
    a, b = generator.standard_normal(9) + 0.8, generator.standard_normal(9)

    def distance(x, y):
        return ks_2samp(x, y).statistic

    how = {"permutation_type": "samples", "n_resamples": np.inf, "alternative": "greater", "vectorized": False}
    theirs = permutation_test((a, b), distance, **how)
    ours = by_name(kolmogorov_smirnov(a, range(9), b, range(9)))
    assert ours["ks_d"].value == pytest.approx(theirs.statistic)
    assert ours["ks_p"].value == pytest.approx(
        theirs.pvalue, abs=4 * math.sqrt(theirs.pvalue * (1 - theirs.pvalue) / 9999)
    )


def test_only_the_order_of_values_counts():
    generator = np.random.default_rng(5)
    a, b, whose = (
        generator.standard_normal(1500),
        generator.standard_normal(1500),
        range(1500),
    )  # more than LEVELS values
    once, again = (kolmogorov_smirnov(f(a), whose, f(b), whose, draws=99) for f in (lambda x: x, np.exp))
    assert once == again


def test_people_who_lack_a_side_are_counted_and_left_out():
    a, b = [1.0, 2.0, math.nan, 4.0], [2.0, 3.0, 9.0, 9.0]
    found = by_name(kolmogorov_smirnov(a, ["p", "q", "r", "s"], b, ["p", "q", "r", "t"]))
    assert (found["ks_p"].n, found["ks_p"].undefined) == (2, 3)
    assert list(found.values()) == [replace(one, undefined=3) for one in kolmogorov_smirnov(a[:2], "pq", b[:2], "pq")]
    nobody = by_name(kolmogorov_smirnov([math.nan], "p", [1.0], "p"))
    assert (nobody["ks_p"].n, nobody["ks_p"].undefined) == (0, 1)
    assert math.isnan(nobody["ks_p"].value)


def test_share_needed():
    shares = [0.5, 0.7, 0.9, 1.0]
    rows = [[0, 0.2, 0.6, 0.7], [0.5, 0.6, 0.7, 0.8], [0, 0.1, 0.2, 0.3], [math.nan, 0, 0.4, math.nan]]
    np.testing.assert_allclose(share_needed(shares, rows, 0.4), [0.8, 0.5, math.nan, math.nan])
    np.testing.assert_allclose(share_needed(shares, rows, 0.2)[3], 0.8)


def test_a_blanked_face_has_the_colour_of_the_rest():
    images, face = normal(2, 3, 4, 4), torch.zeros(2, 1, 4, 4, dtype=torch.bool)
    face[:, :, 1:3, 1:3] = True
    other = torch.where(face, torch.tensor(5.0), images)
    assert torch.equal(blanked(images, face), blanked(other, face))
    rest = images[0, 1][~face[0, 0]]
    torch.testing.assert_close(blanked(images, face)[0, 1, 1, 1], rest.mean())
    assert torch.equal(blanked(images, face)[0, 1][~face[0, 0]], rest)


def test_argon2_costs_time():
    assert len(leakage.argon2_seconds(1, 64, 4, 3)) == 3


# What anyone computes from a file


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    dataset = bundled_faces()
    return to_floats(to_bytes(torch.stack([dataset.load(id) for id in dataset.ids[:2]])))


@pytest.fixture(scope="module")
def backbone(tiny_block_dct) -> LatentDiffusion:
    return LatentDiffusion(str(tiny_block_dct), chunk=2)


@pytest.fixture(scope="module")
def exact(backbone) -> Exact:
    return Exact(
        backbone,
        DDIM(10, "karras", 1e-5),
        CentreFace(),
        BandRotation(),
        Refinement(ToneCurve(0.95, 1.5)),
        Seam(),
        floor=None,
    )


def test_the_key_is_all_that_the_exact_methods_files_keep_back(exact, pictures):
    """With it, what anyone computes is what the receiver does."""
    picture, key, wrong_key = pictures[:1], KEYS[:1], KEYS[1:2]
    published = exact.anonymize(picture, key, ["a"])
    encoded, headers = exact.encoded_pictures(published), published.headers
    zT, mask = exact.noise(encoded, headers)
    original, _ = exact.noise(picture, headers)
    found, wrong = (exact.undo(zT, mask, headers, k) for k in (key, wrong_key))

    def error(z):
        return ((z - original) * mask).square().sum() / (original * mask).square().sum()

    assert error(found) < 0.01
    assert error(wrong) > 0.5
    torch.testing.assert_close(exact.redraw(encoded, headers, found), exact.recover(published, key), atol=1e-3, rtol=0)


def test_the_papers_magnitudes_are_there_for_all_to_see(backbone, pictures):
    method = SignFlip(backbone, DDIM(5), CentreFace())
    published = method.anonymize(pictures, KEYS[:2], ["a", "b"])
    images, headers, keys = method.encoded_pictures(published), published.headers, KEYS[:2]
    zT, mask = method.noise(images, headers)
    original, there = method.noise(pictures, headers)
    likeness = layout_likeness(original, there, zT, mask)
    assert (likeness.diagonal() > likeness.max(axis=1) - 1e-12).all()
    for receiver in (method, replace(method, reinject=False)):
        back = receiver.redraw(images, headers, receiver.undo(zT, mask, headers, keys))
        received = receiver.receive(images, [Header.unpack(header) for header in headers], keys)
        torch.testing.assert_close(back, received, atol=1e-4, rtol=0)


def test_known_pairs_show_a_rotation_that_is_used_again():
    """d pairs give Q_c and the norms' key bytes; fewer give the part of a face that they span; a nonce for each gives nothing."""
    d, channels, m = 12, 3, 12
    z = torch.randn(m + 1, channels, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = torch.ones(m + 1, 1, 4, 3, dtype=torch.bool)
    one, contexts = [experiment_key(3)] * (m + 1), [Context(bytes([i]) * 24) for i in range(m + 1)]

    def rotated(with_contexts: list[Context], known: int) -> torch.Tensor:
        turned, sent = BandRotation().apply(z, mask, one, with_contexts)
        a, b = z.flatten(2), turned.flatten(2)
        return rotated_back(a[:known], b[:known], sent[:known], b[m:], sent[m:])

    truth = z[m:].flatten(2)
    torch.testing.assert_close(rotated([Context(bytes(24))] * (m + 1), d), truth)
    part = torch.cosine_similarity(rotated([Context(bytes(24))] * (m + 1), d // 2).flatten(), truth.flatten(), dim=0)
    assert 0.3 < part < 0.95
    assert (
        torch.cosine_similarity(rotated(contexts, d).flatten(), truth.flatten(), dim=0).abs() < 0.45
    )  # 2.7 deviations of 36


def test_changes_are_small_and_refused():
    key, other = experiment_key(0), experiment_key(1)
    picture = torch.full((1, 3, 8, 8), 128, dtype=torch.uint8)
    (header,) = seal([Header(bytes(24))], picture, [key], authenticate=True)
    changed = to_bytes(one_bit_off_pictures(to_floats(picture), [header]))
    assert (changed != picture).sum() == 1
    assert (changed.int() - picture.int()).abs().max() == 1
    near = one_bit_off_headers(header)
    assert len(set(near)) == 8 * len(header)
    assert {len(one) for one in near} == {len(header)}
    assert not is_refused(header, picture[0], key)
    assert is_refused(header, picture[0], other)
    assert is_refused(header, changed[0], key)
    assert is_refused(without_tag(header), picture[0], key)
    assert all(is_refused(one, picture[0], key) for one in near)


def test_jackknife_of_a_mean_is_its_standard_error():
    values = np.random.default_rng(0).random(50)
    low, high = jackknife_interval(lambda rows: float(values[rows].mean()), range(50))
    error = values.std(ddof=1) / math.sqrt(50)
    np.testing.assert_allclose((low, high), (values.mean() - 1.96 * error, values.mean() + 1.96 * error))
    assert jackknife_interval(lambda rows: 1.0, range(9)) == (1.0, 1.0)
    assert math.isnan(jackknife_interval(lambda rows: 1.0, [0, 0, 1, 1])[0])  # four pictures, but two people


def test_intervals_are_of_people_not_of_their_pictures():
    """Four copies of each person's picture tell nothing new: the intervals stay, where pictures alone would halve them."""
    generator = np.random.default_rng(0)
    own, other, whose = generator.standard_normal((40, 1)) + 0.5, generator.standard_normal((40, 1)), np.arange(40)
    once = auc_statistic(own, other, whose)
    four = auc_statistic(np.repeat(own, 4, 0), np.repeat(other, 4, 0), np.repeat(whose, 4))
    assert (four.value, four.low, four.high) == pytest.approx((once.value, once.low, once.high))
    alone = auc_statistic(np.repeat(own, 4, 0), np.repeat(other, 4, 0), range(160))
    assert alone.high - alone.low < 0.7 * (once.high - once.low)
    scores = generator.standard_normal((1, 12, 12)) + np.eye(12)
    statistic, _, _ = linkage_statistics(scores, range(12))
    together = linkage_statistics(np.repeat(np.repeat(scores, 3, 1), 3, 2), np.repeat(np.arange(12), 3))[0]
    separate = linkage_statistics(np.repeat(np.repeat(scores, 3, 1), 3, 2), range(36))[0]
    assert together.high - together.low > 0.8 * (statistic.high - statistic.low) > separate.high - separate.low


# Scores of pairs


def test_rounding_keeps_what_a_table_shows():
    generator = np.random.default_rng(0)
    for scale in (1e-4, 0.07, 9.0):
        scores = scale * (generator.standard_normal((1, 60, 60)) + np.eye(60))
        coarse = pairs.rounded(scores)
        assert np.abs(coarse - scores).max() <= scale / 25
        assert np.unique(coarse).size < 400
        for exact, kept in zip(
            linkage_statistics(scores, range(60)), linkage_statistics(coarse, range(60)), strict=True
        ):
            assert kept.value == pytest.approx(exact.value, abs=0.05 if "d_sys" in kept.statistic else 0.005)
    assert np.isnan(pairs.rounded(np.full((1, 2, 2), np.nan))).all()
    assert not pairs.rounded(np.zeros((1, 2, 2))).any()


def test_a_persons_impostors_are_some_of_them():
    values = np.random.default_rng(0).standard_normal(1299)
    chosen = pairs.quantiles(np.append(values, math.nan))
    assert set(chosen) <= set(values)
    assert ks_2samp(chosen, values).statistic <= 1 / pairs.QUANTILES
    np.testing.assert_array_equal(np.unique(pairs.quantiles(values[:3])), np.sort(values[:3]))
    assert np.isnan(pairs.quantiles(values[:0])).all()


@pytest.mark.parametrize(("transform", "hidden"), [(SignFlipping(), False), (BandRotation(), True)])
def test_norms_that_a_transform_gives_out_are_what_its_noise_shows(transform, hidden):
    z, mask = 1.2 * normal(4, 3, 8, 8), everywhere(4)
    turned, _ = transform.apply(z.double(), mask, KEYS[:4], CONTEXTS[:4])
    given = published_norms(z.double(), mask, transform.secret)
    np.testing.assert_allclose(channel_norms(turned, mask), given, atol=1e-11)
    assert bool(np.abs(given).max() < 1e-6) == hidden
