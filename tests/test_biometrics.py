"""Biometric measures against Gaussian truths, scikit-learn, brute force and hand-made cases."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import norm, wasserstein_distance
from sklearn.metrics import roc_curve

from keyanon.measures.biometrics import (
    Verification,
    cosine,
    d_sys,
    eer,
    mean_statistic,
    p10_statistic,
    quantile_statistic,
    rank_k,
    rate_statistic,
    std_statistic,
    threshold_at_far,
    verification_statistics,
    w2_squared,
)

NAN = math.nan


def gaussians(distance, n=20_000, seed=0):
    generator = np.random.default_rng(seed)
    return generator.normal(distance, 1, n), generator.normal(0, 1, n)


def people(persons, noise, dimension=32, seed=0):
    """Two unit embeddings of each person, `noise` times as far from it as it is long."""
    generator = np.random.default_rng(seed)
    centre = generator.normal(size=(persons, dimension))
    rows = [centre + noise * generator.normal(size=centre.shape) for _ in range(2)]
    return [row / np.linalg.norm(row, axis=1, keepdims=True) for row in rows]


def by_name(statistics):
    return {statistic.statistic: statistic for statistic in statistics}


def test_cosine_of_a_missing_face_is_nan_and_leaves_the_others_alone():
    scores = cosine([[1, 0], [NAN, NAN]], [[0.6, 0.8], [1, 0]])
    np.testing.assert_allclose(scores, [[0.6, 1], [NAN, NAN]])


@pytest.mark.parametrize("far", [0.001, 0.01, 0.1, 0.5])
def test_threshold_lets_exactly_the_share_through(far):
    _, impostor = gaussians(0)
    threshold = threshold_at_far(impostor, far)
    assert np.mean(impostor > threshold) == pytest.approx(far, abs=1e-12)
    assert threshold == pytest.approx(norm.isf(far), abs=0.15)
    assert np.sum((impostor > threshold) != (impostor > np.quantile(impostor, 1 - far))) <= 1


def test_threshold_with_ties_stays_below_the_share():
    impostor = np.array([0.0] * 6 + [0.5] * 3 + [0.9])
    assert threshold_at_far(impostor, 0.2) == 0.5  # of two allowed, the tie of three takes none
    assert threshold_at_far(impostor, 0.4) == 0.0


def test_threshold_ignores_missing_faces_and_refuses_too_few():
    scores = np.arange(1000.0)
    assert threshold_at_far(np.append(scores, [NAN] * 500), 0.001) == 998
    assert math.isnan(threshold_at_far(scores[:999], 0.001))
    assert math.isnan(threshold_at_far([], 0.1))
    with pytest.raises(ValueError, match="between 0 and 1"):
        threshold_at_far(scores, 0)


def test_accepted_and_threshold_are_a_point_of_sklearns_curve():
    genuine, impostor = gaussians(2, 3000)
    false, true, _ = roc_curve([1] * 3000 + [0] * 3000, np.concatenate([genuine, impostor]), drop_intermediate=False)
    for far in (0.001, 0.02, 0.3):
        accepted = np.mean(genuine > threshold_at_far(impostor, far))
        assert accepted == pytest.approx(true[false <= far + 1e-12].max())


@pytest.mark.parametrize("distance", [0, 1, 2, 4])
def test_eer_of_gaussians(distance):
    assert eer(*gaussians(distance)) == pytest.approx(norm.cdf(-distance / 2), abs=0.006)


def test_eer_is_where_sklearns_curve_meets_the_diagonal():
    genuine, impostor = np.round(gaussians(1.5, 400), 1)  # rounding makes ties
    false, true, _ = roc_curve([1] * 400 + [0] * 400, np.concatenate([genuine, impostor]), drop_intermediate=False)
    place = np.linspace(0, 1, 200_001)
    gap = np.abs(1 - np.interp(place, false, true) - place)
    assert eer(genuine, impostor) == pytest.approx(place[gap.argmin()], abs=1e-5)


def test_eer_extremes():
    assert eer([2, 3], [0, 1]) == 0
    assert eer([0, 1], [2, 3]) == 1
    assert eer([1, 1], [1, 1]) == 0.5
    assert eer([2, NAN], [0, NAN]) == 0
    assert math.isnan(eer([NAN], [0]))


def test_rank_k():
    scores = np.array([[0.9, 0.8, 0.1], [0.9, 0.8, 0.1], [0.5, 0.5, 0.1], [NAN, NAN, NAN], [0.9, 0.8, 0.1]])
    probes, gallery = ["ann", "bob", "ann", "bob", "zoe"], ["ann", "bob", "cid"]
    np.testing.assert_equal(rank_k(scores, probes, gallery), [1, 0, 0, 0, NAN])
    np.testing.assert_equal(rank_k(scores, probes, gallery, k=2), [1, 1, 1, 0, NAN])


def test_rank_1_takes_the_best_of_several_pictures():
    assert rank_k(np.array([[0.2, 0.5, 0.9]]), ["ann"], ["ann", "bob", "ann"]).tolist() == [1]


def test_d_sys_of_disjoint_and_of_equal_scores():
    mated, other = gaussians(100, 1000)
    assert d_sys(mated, other) == 1
    assert d_sys(other, other) == 0
    assert d_sys(*gaussians(0, 1000)) < 0.15
    assert d_sys(*gaussians(0, 100_000)) < 0.02
    assert math.isnan(d_sys([], other))


@pytest.mark.parametrize("distance", [0.5, 1, 2])
@pytest.mark.parametrize("omega", [1, 0.2])
def test_d_sys_of_gaussians(distance, omega):
    def density(score):
        ratio = omega * math.exp(norm.logpdf(score, distance) - norm.logpdf(score))
        return max(0, 2 * ratio / (1 + ratio) - 1) * norm.pdf(score, distance)

    truth = quad(density, -10, 12, limit=200)[0]
    assert d_sys(*gaussians(distance, 200_000), omega=omega) == pytest.approx(truth, abs=0.01)


def test_w2_squared_of_gaussians_and_of_unequal_sizes():
    assert w2_squared(*gaussians(3, 50_000)) == pytest.approx(9, abs=0.15)
    assert w2_squared([0, 1], [0, 0, 1, 1]) == 0
    assert w2_squared([0], [1, 3]) == 5
    assert w2_squared([0, NAN], [2]) == 4
    a, b = np.random.default_rng(0).random((2, 30))
    assert w2_squared(a, b[:20] + 5) >= wasserstein_distance(a, b[:20] + 5) ** 2


def test_mean_has_the_interval_of_its_standard_error():
    values = np.random.default_rng(1).normal(3, 2, 400)
    mean = mean_statistic(values)
    assert (mean.statistic, mean.n, mean.undefined) == ("mean", 400, 0)
    assert mean.value == values.mean()
    error = 1.96 * values.std() / 20
    assert mean.high - mean.value == pytest.approx(error, rel=0.1)
    assert mean.value - mean.low == pytest.approx(error, rel=0.1)


def test_interval_widens_when_pictures_are_one_persons():
    of_person = np.random.default_rng(2).normal(size=100)
    groups = [f"person {n % 100}" for n in range(1000)]
    grouped, single = mean_statistic(np.tile(of_person, 10), groups), mean_statistic(np.tile(of_person, 10))
    assert grouped.value == pytest.approx(single.value)
    assert (grouped.high - grouped.low) / (single.high - single.low) == pytest.approx(math.sqrt(10), rel=0.1)


def test_the_tenth_percentile_is_numpys_with_the_interval_of_order_statistics():
    values = np.random.default_rng(4).uniform(0, 1, 2001)
    low = p10_statistic(values)
    assert low.statistic == "p10"
    assert low.value == np.quantile(values, 0.1)
    assert (low.high - low.low) / 2 == pytest.approx(1.96 * math.sqrt(0.1 * 0.9 / 2001), rel=0.25)


def test_median_and_spread():
    values = np.random.default_rng(3).normal(5, 2, 2001)
    median, spread = quantile_statistic(values), std_statistic(values)
    assert median.value == np.median(values)
    assert (median.high - median.low) / 2 == pytest.approx(1.96 * 1.2533 * 2 / math.sqrt(2001), rel=0.25)
    assert spread.value == pytest.approx(values.std())
    assert (spread.high - spread.low) / 2 == pytest.approx(1.96 * 2 / math.sqrt(2 * 2001), rel=0.15)


@pytest.mark.parametrize("statistic", [mean_statistic, quantile_statistic, std_statistic])
def test_undefined_values_are_counted_and_left_out(statistic):
    groups = ["a", "a", "b", "c"]
    measured = statistic([1, 3, NAN, 5], groups)
    assert (measured.n, measured.undefined) == (3, 1)
    assert measured == replace(statistic([1, 3, 5], ["a", "a", "c"]), undefined=1)
    nothing = statistic([NAN, NAN])
    assert (nothing.n, nothing.undefined) == (0, 2)
    assert all(math.isnan(number) for number in (nothing.value, nothing.low, nothing.high))


def test_one_identity_has_no_interval():
    alone = mean_statistic([1, 2], ["ann", "ann"])
    assert alone.value == 1.5
    assert math.isnan(alone.low)
    with pytest.raises(ValueError, match="1 groups for 2 values"):
        mean_statistic([1, 2], ["ann"])


def test_draws_follow_the_seed():
    values = np.random.default_rng(4).normal(size=50)
    assert mean_statistic(values, seed=1) == mean_statistic(values, seed=1) != mean_statistic(values, seed=2)


def test_a_rate_of_zero_has_the_exact_binomial_interval():
    none, everyone = rate_statistic([0] * 100, None, 0, "x"), rate_statistic([1] * 100, None, 0, "x")
    assert (none.low, everyone.high) == (0, 1)
    assert (1 - none.high) ** 100 == pytest.approx(0.025)
    assert everyone.low == pytest.approx(1 - none.high)
    assert rate_statistic([0] * 100, ["ann", "bob"] * 50, 0, "x").high == pytest.approx(1 - math.sqrt(0.025))


def test_verification_is_made_of_the_plain_measures():
    probe, gallery = people(150, 0.9)
    probe[3] = NAN
    ids = [f"person {n // 3}" for n in range(150)]  # three unlike pictures of each
    measured = by_name(verification_statistics(probe, gallery, ids, ids, probe, far=0.01))
    scores, same = cosine(probe, gallery), np.equal.outer(ids, ids)
    genuine, impostor = scores[same], scores[~same]
    threshold = threshold_at_far(impostor, 0.01)
    rejecting = np.mean(genuine > threshold)
    accepting = rejecting + np.mean(np.isnan(genuine))
    named = rank_k(cosine(probe, gallery), ids, ids)
    assert list(measured) == [
        "tar@far=0.01",
        "tar@far=0.01 (unfound accepted)",
        "threshold@far=0.01",
        "eer",
        "rank1",
        "genuine mean",
        "impostor mean",
    ]
    assert measured["tar@far=0.01"].value == pytest.approx(rejecting)
    assert measured["tar@far=0.01 (unfound accepted)"].value == pytest.approx(accepting)
    assert measured["threshold@far=0.01"].value == threshold
    assert measured["eer"].value == eer(genuine, impostor)
    assert measured["rank1"].value == named.mean()
    assert measured["genuine mean"].value == pytest.approx(np.nanmean(genuine))
    assert measured["impostor mean"].value == pytest.approx(np.nanmean(impostor))
    counts = {name: (statistic.n, statistic.undefined) for name, statistic in measured.items()}
    assert counts == {
        "tar@far=0.01": (450, 3),
        "tar@far=0.01 (unfound accepted)": (450, 3),
        "threshold@far=0.01": (21_903, 147),
        "eer": (22_350, 150),
        "rank1": (150, 1),
        "genuine mean": (447, 3),
        "impostor mean": (21_903, 147),
    }
    assert all(statistic.low <= statistic.value <= statistic.high for statistic in measured.values())


def test_verification_takes_its_threshold_from_clean_probes():
    probe, gallery = people(300, 0.6)
    strangers = people(300, 0.6, seed=1)[0]
    ids = [str(n) for n in range(300)]
    clean = by_name(verification_statistics(probe, gallery, ids, ids, probe))
    anonymized = by_name(verification_statistics(strangers, gallery, ids, ids, probe))
    assert clean["threshold@far=0.001"] == anonymized["threshold@far=0.001"]
    assert clean["tar@far=0.001"].value > 0.9
    assert anonymized["tar@far=0.001"].value < 0.02
    assert anonymized["eer"].value == pytest.approx(0.5, abs=0.06)
    threshold = clean["threshold@far=0.001"].value
    fixed = by_name(verification_statistics(strangers, gallery, ids, ids, threshold))
    assert fixed["tar@far=0.001"] == anonymized["tar@far=0.001"]
    assert fixed["threshold@far=0.001"].value == threshold


def test_verification_without_enough_impostors_says_nan():
    probe, gallery = people(20, 0.5)
    ids = [str(n) for n in range(20)]
    measured = by_name(verification_statistics(probe, gallery, ids, ids, probe, far=0.001))  # 380 impostors
    assert math.isnan(measured["threshold@far=0.001"].value)
    assert math.isnan(measured["tar@far=0.001"].value)
    assert not math.isnan(measured["eer"].value)
    one = by_name(verification_statistics(probe[:1], gallery[:1], ["0"], ["0"], probe[:1]))
    assert math.isnan(one["eer"].value)
    assert one["impostor mean"].n == 0


def test_verification_of_nobody_found():
    probe, gallery = people(60, 0.5)
    ids = [str(n) for n in range(60)]
    measured = by_name(verification_statistics(np.full_like(probe, NAN), gallery, ids, ids, probe, far=0.01))
    assert measured["tar@far=0.01"].value == 0
    assert measured["tar@far=0.01 (unfound accepted)"].value == 1
    assert measured["rank1"].value == 0
    assert measured["rank1"].undefined == 60
    assert math.isnan(measured["genuine mean"].value)


def test_verification_names_a_wrong_number_of_identities():
    probe, gallery = people(5, 0.5)
    with pytest.raises(ValueError, match="identities for"):
        verification_statistics(probe, gallery, ["a"] * 4, ["a"] * 5, probe)


def test_intervals_agree_with_drawing_persons_one_set_at_a_time():
    """Against the draw that the first-order weights stand for: every pair of drawn persons compared anew."""
    persons, resamples = 60, 400
    probe, gallery = people(persons, 1.2, dimension=16)
    ids = [str(n) for n in range(persons)]
    measured = by_name(verification_statistics(probe, gallery, ids, ids, probe, far=0.02))
    scores = cosine(probe, gallery)
    generator = np.random.default_rng(5)
    drawn = {"threshold@far=0.02": [], "eer": [], "impostor mean": []}
    for _ in range(resamples):
        chosen = generator.integers(0, persons, persons)
        genuine = scores[chosen, chosen]
        table = scores[np.ix_(chosen, chosen)]
        impostor = table[chosen[:, None] != chosen[None, :]]
        drawn["threshold@far=0.02"].append(threshold_at_far(impostor, 0.02))
        drawn["eer"].append(eer(genuine, impostor))
        drawn["impostor mean"].append(impostor.mean())
    for name, values in drawn.items():
        low, high = np.percentile(values, [2.5, 97.5])
        width = measured[name].high - measured[name].low
        assert 0.6 < width / (high - low) < 1.3, name
        assert measured[name].low < np.median(values) < measured[name].high, name


def test_tar_interval_covers_the_truth_about_as_often_as_it_says():
    truth, covered = norm.sf(1), 0
    for seed in range(100):
        hits = np.random.default_rng(seed).normal(size=200) > 1
        rate = rate_statistic(hits, None, 0, "tar", resamples=300)
        covered += rate.low <= truth <= rate.high
    assert 86 <= covered <= 100


def test_comparisons_know_who_is_who():
    trial = Verification(np.zeros((2, 3)), np.array([0, 1]), np.array([1, 0, 1]), 2)
    assert trial.same.tolist() == [[False, True, False], [True, False, True]]
