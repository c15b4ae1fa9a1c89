"""Verification as the authors' notebook computes it: every listed pair counts, thresholds come from all clean pictures."""

import json
from collections import Counter
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir
from torch.nn.functional import normalize

import experiments.run
from experiments.harness.statistics import (
    Threshold,
    as_listed,
    averages,
    scores_of_enrolled,
    told_apart,
    verification,
)
from keyanon.channel.pixels import read_png, to_floats
from keyanon.errors import BadSetting
from keyanon.faces.datasets import LFW
from keyanon.measures.biometrics import threshold_at_far, verification_statistics
from keyanon.measures.separability import Separability
from keyanon.run_folder import ANONYMIZED, CLEAN, RunFiles
from tests.conftest import ROOT, PixelRecognizer, smooth_picture

PAIRS = 60
FAR = 0.03  # where scores of pictures that are listed again are not the next ones
AUTHORS = Threshold(FAR, "all", "quantile")
OURS = Threshold(FAR, "anonymized", "order")


def authors_threshold(clean, gallery, names, gallery_names, far):
    """The quantile of the clean scores of two names: all rows against all rows."""
    scores = normalize(clean, dim=1) @ normalize(gallery, dim=1).T
    return torch.quantile(scores[np.not_equal.outer(names, gallery_names)], 1 - far).item()


def authors_rate(seen, gallery, names, gallery_names, threshold):
    """The share of comparisons of one name that reach the threshold."""
    scores = normalize(seen, dim=1) @ normalize(gallery, dim=1).T
    return (scores[np.equal.outer(names, gallery_names)] >= threshold).double().mean().item()


@pytest.fixture(scope="module")
def listing():
    """Pairs (gallery id, probe id) of 25 persons, many of them listed several times and some pictures on both sides."""
    generator = np.random.default_rng(0)
    people = generator.integers(0, 25, PAIRS)
    numbers = generator.integers(1, 4, (PAIRS, 2))
    return [(f"P{who:02}_{a:04}", f"P{who:02}_{b:04}") for who, (a, b) in zip(people, numbers, strict=True)]


def person(ids):
    return [id.partition("_")[0] for id in ids]


def embedded(ids, seed, noise):
    """A unit vector of each picture, near its person's."""
    centres = torch.randn(25, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    spread = torch.randn(len(ids), 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return normalize(centres[[int(id[1:3]) for id in ids]] + noise * spread, dim=1)


@pytest.fixture
def stored(listing, tmp_path):
    """Each picture once, clean and anonymized, as a run keeps them; of the first 40 pairs alone for the second."""
    ids = sorted({id for pair in listing for id in pair})
    probes = [second for _, second in listing]
    clean, made = RunFiles(tmp_path / "clean"), RunFiles(tmp_path / "made")
    clean.write_embeddings(ids, {(CLEAN, "net"): embedded(ids, 1, 0.8)})
    anonymized = sorted(set(probes[:40]))
    made.write_embeddings(anonymized, {(ANONYMIZED, "net"): embedded(anonymized, 2, 1.6)})
    return clean, made


def rows(files, ids):
    vectors = files.vectors(ids)
    return torch.stack([vectors[id] for id in ids]).double()


def longer(files, folder, ids, view):
    """The same embeddings, each by a factor of its own longer."""
    known, factors = files.vectors(ids), np.random.default_rng(7).uniform(0.5, 30, len(ids))
    rows = torch.stack([factor * known[id] for id, factor in zip(ids, factors, strict=True)])
    copy = RunFiles(folder)
    copy.write_embeddings(ids, {(view, "net"): rows})
    return copy


def measured(stored, gallery, probes, every, threshold):
    clean, made = stored
    found = verification(made, {"net": clean}, gallery, probes, every, person, threshold)
    return {(view, statistic.statistic): statistic for view, _, statistic in found}


@pytest.mark.parametrize("limit", [40, 15])
def test_rates_are_the_authors_with_repetitions_and_the_threshold_of_all_clean_pictures(listing, stored, limit):
    gallery, probes = map(list, zip(*listing, strict=True))
    assert len(set(probes[:limit])) < limit
    assert len(set(gallery)) < len(gallery)
    clean, made = stored
    portraits, first = rows(clean, gallery), probes[:limit]
    threshold = authors_threshold(rows(clean, probes), portraits, person(probes), person(gallery), FAR)
    expected = {
        view: authors_rate(rows(files, first), portraits, person(first), person(gallery), threshold)
        for view, files in (("original", clean), (ANONYMIZED, made))
    }
    found = measured(stored, gallery, first, probes, AUTHORS)
    genuine = sum(person(gallery).count(name) for name in person(first))
    for view, rate in expected.items():
        assert found[view, f"threshold@far={FAR}"].value == pytest.approx(threshold, abs=1e-6)
        assert found[view, f"tar@far={FAR}"].value == pytest.approx(rate, abs=1e-6)
        assert found[view, f"tar@far={FAR}"].n == genuine
        assert found[view, "impostor mean"].n == limit * PAIRS - genuine
    assert 0 < expected[ANONYMIZED] < expected["original"] < 1


def test_every_choice_of_the_protocol_moves_something(listing, stored):
    gallery, probes = map(list, zip(*listing, strict=True))
    first, place = probes[:15], (ANONYMIZED, f"threshold@far={FAR}")
    choices = {
        "authors": ("all", "quantile"),
        "of the run alone": ("anonymized", "quantile"),
        "order": ("all", "order"),
    }
    found = {
        name: measured(stored, gallery, first, probes, Threshold(FAR, *choice))[place]
        for name, choice in choices.items()
    }
    sides = (sorted(set(side)) for side in (gallery, first, probes))
    found["once"] = measured(stored, *sides, Threshold(FAR, "all", "quantile"))[place]
    assert len({one.value for one in found.values()}) == len(found)
    assert found["authors"].n == found["order"].n > found["once"].n > found["of the run alone"].n
    with pytest.raises(BadSetting, match="calibration='some': expected one of anonymized, all"):
        Threshold(0.01, "some", "order")
    with pytest.raises(BadSetting, match="rule='median': expected one of order, quantile"):
        Threshold(0.01, "all", "median")


@pytest.mark.parametrize("threshold", [AUTHORS, OURS])
def test_separability_alone_sees_how_long_embeddings_are(listing, stored, tmp_path, threshold):
    gallery, probes = map(list, zip(*listing, strict=True))
    clean, made = stored
    raw = (
        longer(clean, tmp_path / "raw", sorted({*gallery, *probes}), CLEAN),
        longer(made, tmp_path / "raw made", sorted(set(probes[:40])), ANONYMIZED),
    )
    found, of_raw = (measured(files, gallery, probes[:40], probes, threshold) for files in (stored, raw))
    assert found.keys() == of_raw.keys()
    for place, statistic in found.items():
        assert astuple(of_raw[place])[1:] == pytest.approx(astuple(statistic)[1:], abs=1e-6, nan_ok=True), place
    assert scores_of_enrolled({"net": raw[0]}, probes)["value"].to_numpy() == pytest.approx(1)

    ids = sorted(set(probes[:40]))
    told, of_raw = (
        [statistic for _, _, statistic in told_apart(Separability((5, 10), 3, (10,), (8,)), files, {"net": own}, ids)]
        for own, files in (stored, raw)
    )
    assert [one.statistic for one in told] == [one.statistic for one in of_raw]
    assert all(one.value != other.value for one, other in zip(told, of_raw, strict=True))


def test_clean_pictures_of_the_run_set_the_threshold_where_no_more_are_asked(listing, stored):
    gallery, probes = (list(dict.fromkeys(side)) for side in zip(*listing, strict=True))
    first = probes[:15]
    clean, made = (rows(files, first) for files in stored)
    expected = verification_statistics(made, rows(stored[0], gallery), person(first), person(gallery), clean, FAR)
    found = measured(stored, gallery, first, probes, OURS)
    for statistic in expected:
        ours = astuple(found[ANONYMIZED, statistic.statistic])
        assert ours == (statistic.statistic, *(pytest.approx(value, abs=1e-6) for value in astuple(statistic)[1:]))


def test_means_are_over_all_listed_rows(listing):
    probes = [second for _, second in listing]
    ids = sorted(set(probes))
    value = dict(zip(ids, np.random.default_rng(1).normal(size=len(ids)), strict=True))
    scores = pd.DataFrame({"id": ids, "view": ANONYMIZED, "scorer": "net", "value": [value[id] for id in ids]})
    over_rows = {one.statistic: one for _, _, one in averages(as_listed(scores, probes), person)}
    expected = np.array([value[id] for id in probes])
    assert (over_rows["mean"].n, over_rows["mean"].value) == (PAIRS, pytest.approx(expected.mean()))
    assert over_rows["std"].value == pytest.approx(expected.std())
    assert over_rows["median"].value == pytest.approx(np.median(expected))
    pd.testing.assert_frame_equal(as_listed(scores, ids), scores)


def test_listing_a_picture_again_says_nothing_new_of_its_person(listing):
    """Draws are of persons: with every row given twice comparisons are four times as many, values and intervals what they were."""
    ids = [f"P{n:02}_0001" for n in range(25)]
    probe, gallery = embedded(ids, 1, 1.5), embedded(ids, 2, 1.5)
    once = verification_statistics(probe, gallery, ids, ids, probe, 0.05)
    twice = verification_statistics(
        *(rows.repeat(2, 1) for rows in (probe, gallery)), ids * 2, ids * 2, probe.repeat(2, 1), 0.05
    )
    for one, two in zip(once, twice, strict=True):
        assert two.n == (2 if one.statistic == "rank1" else 4) * one.n
        assert two.value == pytest.approx(one.value), one.statistic
        assert (two.low, two.high) == pytest.approx((one.low, one.high), rel=0.01), (
            one.statistic
        )  # thresholds are of a grid
    assert once[0].low < once[0].value < once[0].high


@pytest.mark.parametrize("far", [0.001, 0.01, 0.1])
@pytest.mark.parametrize("n", [1000, 1001, 1337, 20_000])
def test_the_two_rules_are_at_most_one_score_apart(far, n):
    scores = np.random.default_rng(n).normal(size=n)
    order, quantile = (threshold_at_far(scores, far, rule) for rule in ("order", "quantile"))
    assert quantile == pytest.approx(torch.quantile(torch.tensor(scores), 1 - far).item(), abs=1e-12)
    ranked = np.sort(scores)
    place = np.searchsorted(ranked, order)
    assert ranked[place - 1] <= quantile <= order + far * (ranked[place + 1] - order) + 1e-12


def test_a_score_at_the_threshold_is_accepted_by_the_authors_rule_alone():
    rows, ids = np.eye(3), ["a", "b", "c"]
    rates = {
        rule: verification_statistics(rows, rows, ids, ids, rows, 0.5, rule=rule)[0].value
        for rule in ("order", "quantile")
    }
    assert rates == {"order": 1, "quantile": 1}
    apart = np.array([[0.0, 1, 0], [1, 0, 0], [0, 0, 1]])  # genuine scores 0, 0 and 1; impostors' 1, 1 and 0
    rates = {rule: verification_statistics(apart, rows, ids, ids, rows, 0.5, rule=rule)[0].value for rule in rates}
    assert rates == {"order": pytest.approx(1 / 3), "quantile": 1}


def miniature(folder: Path) -> Path:
    """LFW as the authors have it: four people, seven pairs, pictures that are listed again."""
    rows = ["P0,1,2", "P0,3,2", "P1,1,2", "P0,1,3", "P2,1,2", "P1,1,2", "P3,2,1"]
    for who, number in ((who, number) for who in range(4) for number in (1, 2, 3)):
        path = folder / "imgs" / f"P{who}" / f"P{who}_{number:04}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        smooth_picture(10 * who + number, 250).save(path, quality=95)
    (folder / "matchpairs.csv").write_text("\n".join(["name,i,j", *rows]))
    return folder


CHOICES = {
    "dataset": "lfw", "protocol": "ours", "backbone": "faces128", "parser": "ellipse", "anonymizer": "signflip",
    "key": "experiment", "nonce": "per_image",
}  # fmt: skip


def run(*overrides: str) -> Path:
    """The first three pairs anonymized, by the authors' choices."""
    small = [
        "dataset=lfw", "dataset.size=128", "protocol.pairs=repeated", "protocol.calibration=all", "protocol.threshold=quantile",
        "far=0.1", "limit=3", "parser=ellipse", "solver.steps=1", "name=tiny", "recognizers=[]",
        "+recognizers.pixel._target_=tests.conftest.PixelRecognizer", "scorers=[mae]", "attacks=[]",
    ]  # fmt: skip
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", [*small, *overrides])
    return experiments.run.run(cfg, CHOICES)


@pytest.mark.no_cover
def test_a_run_by_the_authors_protocol(tiny_block_dct, tmp_path, monkeypatch):
    """The threshold is of all seven pairs, and what is written down is what the files say; in shards as well."""
    monkeypatch.chdir(tmp_path)
    root = miniature(tmp_path / "lfw")
    there = (f"dataset.root={root}", f"backbone.source={tiny_block_dct}")
    folder = run(*there)

    faces = LFW(str(root), size=128, counted="repeated")
    embed = PixelRecognizer().embed
    clean, gallery = (
        embed(torch.stack([faces.load(id) for id in ids])).double() for ids in (faces.probes, faces.gallery)
    )
    who, known, first = (list(map(faces.identity, ids)) for ids in (faces.probes, faces.gallery, faces.probes[:3]))
    anonymized = [read_png(folder / ANONYMIZED / f"{id}.png")[0] for id in faces.probes[:3]]
    seen = embed(to_floats(torch.stack(anonymized))).double()
    threshold = authors_threshold(clean, gallery, who, known, 0.1)

    statistics = pd.read_parquet(folder / "statistics.parquet")
    chosen = (statistics["view"] == ANONYMIZED) & (statistics["scorer"] == "pixel")
    of_anonymized = statistics[chosen].set_index("statistic")
    assert of_anonymized.loc["threshold@far=0.1", "value"] == pytest.approx(threshold, abs=1e-6)
    expected = authors_rate(seen, gallery, first, known, threshold)
    assert of_anonymized.loc["tar@far=0.1", "value"] == pytest.approx(expected, abs=1e-6)
    assert of_anonymized.loc["tar@far=0.1", "n"] == 2 * 3 + 2  # of P0, P0 and P1: three and two are in the gallery
    assert of_anonymized.loc["mean", "n"] == 3
    cosines = (seen * clean[:3]).sum(1)
    assert of_anonymized.loc["mean", "value"] == pytest.approx(cosines.mean().item(), abs=1e-6)
    assert len(list((folder / ANONYMIZED).glob("*.png"))) == 2  # once, though it is listed twice
    notes = json.loads((folder / "run.json").read_text())["title_notes"]
    assert "LFW, edition not told by its folder (dataset.edition)" in notes
    assert "7 pairs as often as they are listed" in notes
    assert Counter(faces.probes)["P0_0002"] == 2

    shards = [run(*there, "runs=sharded", f"shard={i}/2") for i in (1, 2)]
    assert shards[0] == shards[1]
    pd.testing.assert_frame_equal(pd.read_parquet(shards[1] / "statistics.parquet"), statistics)
