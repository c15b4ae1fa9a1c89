"""A run is what it is made of: after any history of a folder, a run gives what it gives in an empty folder."""

import os
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import hypothesis
import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from omegaconf import DictConfig, OmegaConf
from torch.nn.functional import adaptive_avg_pool2d, normalize

from experiments.harness import results
from experiments.harness.command import mended
from experiments.harness.shards import Incomplete
from experiments.run import run
from keyanon import runner
from keyanon.channel import whole
from keyanon.errors import BadData
from keyanon.types import Embeddings, Image, Mask, Scores
from tests.conftest import ROOT, smooth_picture

pytestmark = pytest.mark.no_cover  # mostly Hydra's code, which coverage's tracer would make three times as slow

CHOICES = {
    "dataset": "folder", "protocol": "ours",
    "backbone": "faces128", "parser": "ellipse", "anonymizer": "scrambling", "key": "experiment",
    "nonce": "per_image",
}  # fmt: skip
SIZE = 32
ASKED = [
    "dataset=folder", "dataset.rename=null", f"dataset.size={SIZE}", "parser=ellipse", "anonymizer=scrambling",
    "attacks=[wrong_key,jpeg]",
    "attacks.jpeg.quality=[50]", "recognizers=[]",
    "+recognizers.pixel={_target_: tests.test_identity.Grid, grid: 8}",
    "scorers=[]", "+scorers.mae={_target_: tests.test_identity.Power, power: 1}", "batch_size=2", "name=tiny",
]  # fmt: skip
# What a user may change between two runs: any of these, one value for another.
VARIED: Mapping[str, tuple[object, ...]] = {
    "limit": (None, 2),
    "batch_size": (2, 3),
    "parser.centre": ([0.5, 0.4], [0.5, 0.6]),
    "attacks.jpeg.quality": ([50], [50, 20]),
    "attacks.wrong_key.trial": (0, 1),
    "key.seed": (0, 1),
    "scorers.mae.power": (1, 2),
    "recognizers.pixel.grid": (8, 4),
    "dataset.crop": (None, [0, 0, 0.5, 0.5]),
}
STORED = {".png", ".parquet", ".json", ".csv"}
SEQUENCES = int(os.environ.get("KEYANON_SEQUENCES", "10"))


@dataclass(frozen=True)
class Power:
    """A scorer with a setting: the mean of |view - original| ** power."""

    power: int = 1

    def __call__(self, view: Image, original: Image, face: Mask) -> Scores:
        return ((view - original).abs() ** self.power).mean((1, 2, 3))


@dataclass(frozen=True)
class Grid:
    """A recognizer with a setting: a grey picture on `grid` x `grid` cells; it finds no face on a black one."""

    grid: int = 8

    def embed(self, images: Image) -> Embeddings:
        rows = adaptive_avg_pool2d(images.mean(1, keepdim=True), self.grid).flatten(1)
        unit = normalize(rows - rows.mean(1, keepdim=True))
        return torch.where((images.amax((1, 2, 3)) > -1)[:, None], unit, torch.nan)


@cache
def composed() -> DictConfig:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", overrides=ASKED)


def configured(root: Path, runs: Path, **changes: object) -> DictConfig:
    cfg = composed().copy()
    for name, value in {"dataset.root": str(root), "runs": str(runs), **changes}.items():
        OmegaConf.update(cfg, name, value, force_add=True)
    return cfg


def outcome(cfg: DictConfig) -> dict[str, object]:
    """What a user gets to read of a run: every number, what the title says, how many pictures, which were skipped."""
    folder: list[Path] = []
    mended(lambda: folder.append(run(cfg, CHOICES)))
    about = results.read_about(folder[-1])
    scores = pd.read_parquet(folder[-1] / "scores.parquet")
    return {
        "scores": {(row.id, row.view, row.scorer): round(row.value, 6) for row in scores.fillna(9).itertuples()},
        "statistics": pd.read_parquet(folder[-1] / "statistics.parquet").to_csv(float_format="%.5g"),
        "notes": about["title_notes"],
        "pictures": about["pictures"],
        "counted": {cost["view"]: cost["pictures"] for cost in about["costs"]},
        "skipped": [line.partition(",")[0] for line in (folder[-1] / "skipped.csv").read_text().splitlines()],
    }


class Killed(BaseException):
    """As if the process were gone."""


@contextmanager
def killed_at_write(number: int) -> Iterator[None]:
    """The process ends before the file of this number is written."""
    left = [number]
    modules = [module for name, module in sys.modules.items() if name.startswith(("keyanon", "experiments"))]
    writers = [module for module in modules if hasattr(module, "write_whole")]
    write_whole = whole.write_whole

    def counting(path: Path, data: bytes, **options: bool) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        write_whole(path, data, **options)

    for module in writers:
        module.write_whole = counting
    try:
        with suppress(Killed):
            yield
    finally:
        for module in writers:
            module.write_whole = write_whole


def damaged(data: bytes, how: str, place: int) -> bytes:
    match how:
        case "emptied":
            return b""
        case "cut":
            return data[: place % max(len(data), 1)]
        case _:
            flipped = bytearray(data)
            if flipped:
                flipped[place % len(flipped)] ^= 1 << place % 8
            return bytes(flipped)


class History(RuleBasedStateMachine):
    """A folder of pictures and one of runs, and whatever happens to them."""

    def __init__(self) -> None:
        super().__init__()
        self.home = Path(tempfile.mkdtemp())
        self.pictures, self.runs = self.home / "pictures", self.home / "runs"
        self.changes: dict[str, object] = {}
        self.number = 0

    def teardown(self) -> None:
        shutil.rmtree(self.home)

    @initialize()
    def begin(self) -> None:
        self.pictures.mkdir()
        for id in ("a", "b", "c"):
            self.draw(id)

    def draw(self, id: str) -> None:
        self.number += 1
        smooth_picture(self.number, SIZE).save(self.pictures / f"{id}.png")

    def spare(self, place: int) -> Path | None:
        """A picture that may be taken away: without two that can be read there is nothing to run on."""
        paths = sorted(path for path in self.pictures.iterdir() if path.stem not in "ab")
        return paths[place % len(paths)] if paths else None

    @rule(id=st.sampled_from("abcde"))
    def add_or_replace_a_picture(self, id: str) -> None:
        self.draw(id)

    @rule(place=st.integers(0, 99))
    def swap_two_pictures_and_keep_the_times(self, place: int) -> None:
        paths = sorted(self.pictures.iterdir())
        one, other = paths[place % len(paths)], paths[(place + 1) % len(paths)]
        about, data = one.stat(), (one.read_bytes(), other.read_bytes())
        for path, bytes_ in ((one, data[1]), (other, data[0])):
            path.write_bytes(bytes_)
            os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))

    @rule(place=st.integers(0, 99))
    def delete_a_picture(self, place: int) -> None:
        if path := self.spare(place):
            path.unlink()

    @rule(place=st.integers(0, 99))
    def spoil_a_picture(self, place: int) -> None:
        if path := self.spare(place):
            path.write_bytes(b"no picture")

    @rule(name=st.sampled_from(sorted(VARIED)), place=st.integers(0, 3))
    def change_an_argument(self, name: str, place: int) -> None:
        self.changes[name] = VARIED[name][place % len(VARIED[name])]

    @rule()
    def move_the_pictures(self) -> None:
        self.number += 1
        self.pictures = self.pictures.rename(self.home / f"moved{self.number}")

    @rule(how=st.sampled_from(["emptied", "cut", "flipped", "deleted"]), place=st.integers(0, 10**6))
    def damage_what_is_stored(self, how: str, place: int) -> None:
        stored = sorted(path for path in self.runs.rglob("*.*") if path.is_file() and path.suffix in STORED)
        if stored:
            path = stored[place % len(stored)]
            if how == "deleted":
                path.unlink()
            else:
                path.write_bytes(damaged(path.read_bytes(), how, place))

    @rule(number=st.integers(0, 40))
    def be_killed(self, number: int) -> None:
        with killed_at_write(number):
            outcome(configured(self.pictures, self.runs, **self.changes))

    @rule(shard=st.sampled_from(["1/2", "2/2"]))
    def run_a_shard(self, shard: str) -> None:
        with suppress(BadData):  # none of its pictures can be used
            mended(lambda: run(configured(self.pictures, self.runs, **self.changes, shard=shard), CHOICES))

    @rule()
    def run_and_compare(self) -> None:
        cfg = configured(self.pictures, self.runs, **self.changes)
        fresh = outcome(configured(self.pictures, self.home / "fresh", **self.changes))
        shutil.rmtree(self.home / "fresh")
        assert outcome(cfg) == fresh
        assert outcome(cfg) == fresh  # again, with nothing to do


def test_after_any_history_a_run_gives_what_it_gives_in_an_empty_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    seed = int(os.environ.get("KEYANON_SEED", random.SystemRandom().randrange(2**32)))
    with capsys.disabled():
        print(f"KEYANON_SEED={seed} KEYANON_SEQUENCES={SEQUENCES} repeats this")
    run_state_machine_as_test(
        hypothesis.seed(seed)(History),
        settings=hypothesis.settings(
            max_examples=SEQUENCES, stateful_step_count=8, deadline=None, database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
        ),
    )  # fmt: skip


def test_a_picture_replaced_in_the_middle_of_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number, id in enumerate("abc"):
        smooth_picture(number, SIZE).save(pictures / f"{id}.png")
    generate = runner.generate

    def replacing(*given, **named):
        generate(*given, **named)
        smooth_picture(9, SIZE).save(pictures / "b.png")

    monkeypatch.setattr(runner, "generate", replacing)
    found = outcome(configured(pictures, tmp_path / "runs"))
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert found == outcome(configured(pictures, tmp_path / "fresh"))


def test_pictures_that_never_rest_end_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    numbers = iter(range(100))
    generate = runner.generate

    def replace() -> None:
        smooth_picture(next(numbers), SIZE).save(tmp_path / "pictures" / "a.png")

    def replacing(*given, **named):
        generate(*given, **named)
        replace()

    replace()
    monkeypatch.setattr(runner, "generate", replacing)
    with pytest.raises(Incomplete, match="1 pictures, such as a, change while the run goes on"):
        outcome(configured(tmp_path / "pictures", tmp_path / "runs"))


@pytest.fixture
def folders(tmp_path, monkeypatch) -> tuple[Path, Path]:
    """A folder of three pictures, and one for runs."""
    monkeypatch.chdir(tmp_path)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number, id in enumerate("abc"):
        smooth_picture(number, SIZE).save(pictures / f"{id}.png")
    return pictures, tmp_path / "runs"


def cell_of(runs: Path, method: str = "scrambling") -> Path:
    (folder,) = runs.glob(f"tiny/folder-{method}*")
    return folder


def test_every_run_looks_at_the_bytes_of_its_files(folders, caplog):
    pictures, runs = folders
    cfg = configured(pictures, runs)
    first = outcome(cfg)
    for view in ("anonymized", "recovered", "wrong_key"):
        path = cell_of(runs) / view / "b.png"
        data = path.read_bytes()
        path.write_bytes(damaged(data, "flipped", len(data) // 2))
        assert outcome(cfg) == first
        assert path.read_bytes() == data
        assert f"{path} is damaged or lost" in caplog.text


def test_no_file_stays_of_a_picture_that_is_gone_changed_or_was_not_asked_for(folders, caplog):
    pictures, runs = folders
    outcome(configured(pictures, runs))
    (pictures / "a.png").unlink()
    (pictures / "b.png").write_text("no picture")
    smooth_picture(7, SIZE).save(pictures / "c.png")
    outcome(configured(pictures, runs))
    folder = cell_of(runs)
    assert [path.name for path in (folder / "anonymized").iterdir()] == ["c.png"]
    assert sorted(path.name for path in (folder / "outdated" / "anonymized").iterdir()) == ["a.png", "b.png"]
    assert "was of other pictures (3), whose results it replaces" in caplog.text
    for number, id in enumerate("abd"):
        smooth_picture(number, SIZE).save(pictures / f"{id}.png")
    outcome(configured(pictures, runs, limit=2))
    assert (folder / "anonymized" / "c.png").exists()  # of a picture that is there, and was not asked for
    assert outcome(configured(pictures, runs)) == outcome(configured(pictures, runs.with_name("fresh")))


def test_two_folders_of_the_same_names_share_what_is_shared_in_peace(folders, caplog):
    pictures, runs = folders
    other = pictures.with_name("other")
    shutil.copytree(pictures, other)
    smooth_picture(8, SIZE).save(other / "a.png")
    for _ in range(2):
        found = [outcome(configured(place, runs, name=place.name)) for place in (pictures, other)]
        fresh = [outcome(configured(place, runs.with_name("fresh"), name=place.name)) for place in (pictures, other)]
        assert found == fresh
    assert "damaged" not in caplog.text
    assert found[0]["scores"] != found[1]["scores"]


def title(runs: Path) -> str:
    return (runs / "tiny" / "tables" / "tiny.md").read_text()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, None),
        ({"recognizers.pixel.grid": 4}, "rows of different folder: pixel"),
        ({"scorers.mae.power": 2}, "rows of different folder: mae"),
        ({"dataset.size": 40}, "rows of different folder: dataset.size"),
        ({"dataset.root": "other"}, "rows of different folder: pictures"),
        ({"limit": 2}, "rows of different folder: pictures"),
    ],
    ids=str,
)
def test_a_table_of_rows_that_do_not_compare_says_so(folders, changes, told):
    pictures, runs = folders
    shutil.copytree(pictures, "other")
    smooth_picture(8, SIZE).save("other/a.png")
    outcome(configured(pictures, runs))
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        blurred = compose("config", overrides=[*ASKED, "anonymizer=pixelate"])
    for name, value in {"dataset.root": str(pictures), "runs": str(runs), **changes}.items():
        OmegaConf.update(blurred, name, value, force_add=True)
    run(blurred, CHOICES | {"anonymizer": "pixelate"})
    assert ("rows of different" in title(runs)) == (told is not None)
    assert told is None or told in title(runs)


def test_the_last_run_of_a_row_counts_whatever_its_files_times_say(folders):
    pictures, runs = folders
    outcome(configured(pictures, runs, **{"key.seed": 0}))
    (older,) = runs.glob("tiny/folder-scrambling*")
    outcome(configured(pictures, runs, **{"key.seed": 1}))
    (newer,) = set(runs.glob("tiny/folder-scrambling*")) - {older}
    os.utime(older / "run.json")
    assert list(results.latest_cells(runs / "tiny")) == [newer]
