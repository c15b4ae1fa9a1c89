"""What names in tables mean is declared by the parts that make them, and kept beside the results."""

import functools
from dataclasses import dataclass
from typing import ClassVar

import pandas as pd
import pytest
import yaml
from hydra.utils import instantiate
from omegaconf import OmegaConf

from experiments.harness.meaning import Meanings, meanings, read_meanings
from keyanon import runner
from keyanon.attacks.views import Jpeg, PartialKey, by_view
from keyanon.measures.scorers import Against, psnr_face
from keyanon.methods.exact import MEASURES
from keyanon.types import COSINE, About, Measure, Summary, View, declared, declares
from tests.conftest import ROOT, PixelRecognizer

TABLES = ROOT / "results"
PSNR = Measure("picture", "dB", "alike", "peak signal-to-noise ratio on the face")


@declares(Measure("picture", "", "apart", "of any name"))
def any_name(view, original, face, power=2):
    return (view - original).abs().pow(power).mean(dim=(1, 2, 3))


@declares(View("recovered", "resized to 75 %"))
def resized(published, keys, method, scale):
    return published


@dataclass(frozen=True)
class Measured:
    """A method that takes something down while publishing."""

    @property
    def about(self) -> About:
        return About("keyed", "-", None, None, "-", "-", "-", MEASURES)


def test_functions_and_classes_declare_also_through_partial():
    @dataclass(frozen=True)
    class Resize:
        meaning: ClassVar = View("attacked")

    assert (
        declared(any_name)
        == declared(functools.partial(any_name, power=1))
        == Measure("picture", "", "apart", "of any name")
    )
    assert declared(functools.partial(resized, scale=0.75)) == View("recovered", "resized to 75 %")
    assert declared(Resize()) == View("attacked")
    assert declared(lambda *_: None) is None


def test_parameters_are_in_a_views_label():
    assert Jpeg(75).meaning == View("recovered", "JPEG 75")
    assert PartialKey(0.1).meaning == View("attacked", "10 % wrong signs")
    assert PartialKey(1).meaning == View("attacked", "100 % wrong signs")


def test_a_scorer_against_another_view_means_what_its_own_scorer_does():
    against = Against("reconstructed", functools.partial(psnr_face)).meaning
    assert (against.kind, against.unit, against.direction) == ("picture", "dB", "alike")
    assert "reconstructed" in against.label
    assert Against("reconstructed", lambda *_: None).meaning is None


def test_meanings_of_a_runs_parts():
    scorers = {"one": functools.partial(any_name), "psnr_face": psnr_face, "mute": lambda *_: None}
    attacks = {"resize75": functools.partial(resized, scale=0.75), "mute": lambda *_: None}
    found = meanings(scorers, {"edgeface": PixelRecognizer()}, attacks, Measured(), 1e-3)
    assert found.views == {
        "original": View("clean"),
        "reconstructed": View("clean"),
        "anonymized": View("anonymized"),
        "recovered": View("recovered"),
        "resize75": View("recovered", "resized to 75 %"),
    }
    assert found.scorers.keys() == {"one", "psnr_face", "edgeface", *runner.MEASURES, *MEASURES}
    assert (found.scorers["edgeface"], found.scorers["psnr_face"]) == (COSINE, PSNR)
    assert found.statistics["tar@far=0.001"] == Summary("TAR at FAR 0.001", "alike")
    assert found.statistics["mean"] == Summary()
    assert meanings({}, {}, {}, Measured(), 0.01).statistics.keys() >= {"tar@far=0.01", "std", "p10"}


def test_files_hold_all_and_do_not_depend_on_order(tmp_path):
    views, scorers = {"b": View("clean", "a, b"), "a": View("noise")}, {"nan": PSNR, "x": Measure("attack")}
    whole = Meanings(views, scorers, {"mean": Summary(), "std": Summary("standard deviation", "none")})
    (tmp_path / "m.csv").write_bytes(whole.csv())
    assert read_meanings(tmp_path / "m.csv") == whole
    turned = Meanings(dict(reversed(views.items())), dict(reversed(scorers.items())), whole.statistics)
    assert turned.csv() == whole.csv()
    assert read_meanings(tmp_path / "none.csv") == Meanings()
    assert (Meanings({"a": View("clean")}) | whole).views == views


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("view,x,lost,,,,", r"m\.csv: x has the role 'lost'; expected one of clean, "),
        ("scorer,x,,money,,none,", r"m\.csv: x has the kind 'money'; expected one of picture, "),
        ("statistic,x,,,,up,", r"m\.csv: x has the direction 'up'; expected one of alike, "),
        ("table,x,,,,,", r"m\.csv: x is a 'table'; expected one of view, scorer, statistic"),
    ],
)
def test_a_file_that_says_what_no_table_knows_is_refused(tmp_path, row, message):
    (tmp_path / "m.csv").write_text(f"what,name,role,kind,unit,direction,label\n{row}\n")
    with pytest.raises(ValueError, match=message):
        read_meanings(tmp_path / "m.csv")


def made(group: str) -> dict:
    files = sorted((ROOT / "conf" / group).glob("*.yaml"))
    given = {"protocol": "ours", "parser": "ellipse"}
    parts = OmegaConf.create({name: OmegaConf.load(ROOT / "conf" / name / f"{of}.yaml") for name, of in given.items()})
    nodes = OmegaConf.merge(parts, *map(OmegaConf.load, files))
    return {name: instantiate(nodes[name], _convert_="all") for name in nodes if name not in given}


@pytest.mark.parametrize("name", sorted(made("scorers")))
def test_every_scorer_says_what_it_is(name):
    measure = declared(made("scorers")[name])
    assert isinstance(measure, Measure)
    assert measure.direction != "none"
    assert measure.label


@pytest.mark.parametrize("name", sorted(by_view(made("attacks"))))
def test_every_attack_says_what_its_view_is(name):
    view = declared(by_view(made("attacks"))[name])
    assert isinstance(view, View)
    assert view.role in ("recovered", "attacked")


def names_in(rows: pd.DataFrame) -> dict[str, set[str]]:
    return {what: set(rows[what]) for what in ("view", "scorer", "statistic")}


def names_of(known: Meanings) -> dict[str, set[str]]:
    return {"view": set(known.views), "scorer": set(known.scorers), "statistic": set(known.statistics)}


@pytest.mark.parametrize("path", sorted((TABLES / "scores").glob("*.meanings.csv")), ids=lambda path: path.name)
def test_every_name_of_committed_scores_is_declared(path):
    scores = path.with_name(path.name.replace(".meanings.csv", ".parquet"))
    known = names_of(read_meanings(path))
    for what, names in names_in(pd.read_parquet(scores)).items():
        assert names <= known[what]


def test_committed_scores_all_have_their_meanings():
    scores = {
        path.stem for path in (TABLES / "scores").glob("*.parquet") if not path.stem.endswith((".scores", ".pairs"))
    }
    assert scores == {path.name.removesuffix(".meanings.csv") for path in (TABLES / "scores").glob("*.meanings.csv")}


@pytest.mark.parametrize("path", sorted((TABLES / "paper").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_name_of_published_numbers_is_declared(path):
    known = read_meanings(TABLES / "paper" / "meanings.csv")
    known |= read_meanings(TABLES / "scores" / f"{path.stem}.meanings.csv")
    for what, names in names_in(pd.DataFrame(yaml.safe_load(path.read_text()))).items():
        assert names <= names_of(known)[what]


def test_what_is_declared_of_published_numbers_is_what_the_parts_declare():
    entries = [entry for path in (TABLES / "paper").glob("*.yaml") for entry in yaml.safe_load(path.read_text())]
    kept = read_meanings(TABLES / "paper" / "meanings.csv")
    used = names_in(pd.DataFrame(entries))
    assert all(names <= used[what] for what, names in names_of(kept).items())
    ours = meanings(made("scorers"), made("recognizers"), by_view(made("attacks")), Measured(), 1e-3)
    for theirs, own in ((kept.views, ours.views), (kept.scorers, ours.scorers), (kept.statistics, ours.statistics)):
        assert {name: theirs[name] for name in theirs.keys() & own.keys()} == {
            name: own[name] for name in theirs.keys() & own.keys()
        }
