"""Shards, one after the other, at once, failed and run again: one table. Hydra's launchers start them, on a card each."""

import json
import shlex
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import OmegaConf

from experiments.harness.command import card_of_job, command_of_cell, swept_names
from experiments.harness.shards import FailedShard, Shards, until_unchanged
from keyanon import runner
from keyanon.channel.whole import write_whole
from keyanon.types import Scores
from tests.conftest import smooth_picture
from tests.test_run import command, in_process

pytestmark = pytest.mark.no_cover  # mostly Hydra's code, which coverage's tracer would make three times as slow

PICTURES = 5


@pytest.fixture(scope="module")
def faces(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("faces")
    for i in range(PICTURES):
        smooth_picture(i).save(root / f"face{i}.png")
    (root / "broken.jpg").write_text("this is not a picture")
    return root


def overrides(faces: Path, tiny_ldm: Path, *more: str) -> list[str]:
    return [
        "dataset=folder", f"dataset.root={faces}", "dataset.rename=null",
        "dataset.size=32", "backbone=ldm_ffhq", f"backbone.source={tiny_ldm}",
        "backbone.subfolder=''", "parser=ellipse", "solver.steps=1", "recognizers=[]", "scorers=[mae]", "attacks=[]",
        "batch_size=2", "name=tiny", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def whole(faces, tiny_ldm, tmp_path_factory) -> Path:
    """The folder where one process made the table."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        in_process(overrides(faces, tiny_ldm))
    return folder


def same_tables(folder: Path, other: Path) -> bool:
    tables = [Path("results/runs/tiny/tables", f"tiny.{suffix}") for suffix in ("csv", "md", "tex")]
    return all((folder / table).read_bytes() == (other / table).read_bytes() for table in tables)


@pytest.mark.parametrize(("launcher", "plugin"), [("gpus", "joblib"), ("slurm_local", "submitit")])
def test_shards_at_once_give_the_table_of_one_process(whole, faces, tiny_ldm, tmp_path, launcher, plugin):
    pytest.importorskip(f"hydra_plugins.hydra_{plugin}_launcher", reason="the extra cluster is not installed")
    done = command("-m", *overrides(faces, tiny_ldm), "shard=1/2,2/2", f"hydra/launcher={launcher}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert same_tables(tmp_path, whole)
    [folder] = tmp_path.glob("results/runs/tiny/*signflip*")
    statuses = [json.loads((folder / "shards" / f"{i}of2.json").read_text()) for i in (1, 2)]
    assert [(status["state"], status["pictures"]) for status in statuses] == [("done", 3), ("done", 3)]
    assert sum(status["skipped"] for status in statuses) == 1
    assert (folder / "skipped.csv").read_text().startswith("id,reason\nbroken,")


@dataclass(frozen=True)
class Dislikes:
    """A scorer that fails at white pictures, until there is a file `mended`."""

    def __call__(self, view, original, face) -> Scores:
        if (original.amin((1, 2, 3)) > 0.99).any() and not Path("mended").exists():
            raise ValueError("too white")
        return original.mean((1, 2, 3))


def test_a_failed_shard_is_named_at_the_end_and_its_command_mends_the_table(command_in_process, tiny_ldm, tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(4):
        smooth_picture(i).save(pictures / f"face{i}.png")
    smooth_picture(2).point(lambda _: 255).save(pictures / "face2.png")
    dislikes = "+scorers.dislikes={_target_: tests.test_launchers.Dislikes}"
    settings = [each for each in overrides(pictures, tiny_ldm, dislikes) if each != "solver.steps=1"]
    failed = command_in_process("-m", *settings, "shard=1/2,2/2", "solver.steps=1,2")
    assert failed.returncode == 1
    named = failed.stderr[failed.stderr.index("Error executing job") :].splitlines()
    assert "shard 1/2: ValueError: too white" in named
    [again] = [line for line in named if line.startswith("- shard 1/2 failed (ValueError: too white); again: ")]
    assert "Traceback" not in failed.stderr
    # The others have run, and the table has them and says what it lacks.
    assert "2 pictures; without the shards 1/2 (failed)" in (tmp_path / "results/runs/tiny/tables/tiny.md").read_text()

    (tmp_path / "mended").touch()
    program, _, _, *rest = shlex.split(again.partition("again: ")[2])
    assert program == "python"
    mended = command_in_process(*rest)
    assert mended.returncode == 0, mended.stderr
    assert sorted(path.name for path in tmp_path.glob("results/runs/tiny/*/run.json")) == ["run.json"] * 2
    table = (tmp_path / "results/runs/tiny/tables/tiny.csv").read_text()
    assert ",4,0," in table
    assert table.count("signflip,solver.steps=1") > 0


def status(folder: Path, shard: str) -> dict[str, object]:
    return json.loads((folder / "shards" / f"{shard}.json").read_text())


def test_a_table_has_the_shards_that_are_done_and_says_so(whole, faces, tiny_ldm, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    table = Path("results/runs/tiny/tables/tiny.md")
    folder = in_process(overrides(faces, tiny_ldm, "shard=1/3"))
    assert "2 pictures; without the shards 2/3 (missing), 3/3 (missing)" in table.read_text()
    assert "shard 2/3 is missing: python -m experiments.run shard=2/3" in caplog.text

    with monkeypatch.context() as patch:
        patch.setattr(runner, "generate", raising(OSError("no space\nleft")))
        with pytest.raises(FailedShard, match="shard 2/3: OSError: no space"):
            in_process(overrides(faces, tiny_ldm, "shard=2/3"))
    assert status(folder, "2of3")["state"] == "failed"
    assert status(folder, "2of3")["error"] == "OSError: no space"
    assert "without the shards 2/3 (failed), 3/3 (missing)" in table.read_text()

    # As long as a shard runs, nobody makes the table; not even of one that died unseen.
    shards = Shards(folder, 3, str(status(folder, "1of3")["asked"]))
    shards.write(
        "3/3",
        {"state": "running", "asked": shards.asked, "host": "node7", "started": "then", "error": "", "seconds": 0},
    )
    caplog.clear()
    before = table.read_bytes()
    in_process(overrides(faces, tiny_ldm, "shard=2/3"))
    assert table.read_bytes() == before
    assert "shard 3/3 runs on node7 since then; should it have died: python -m experiments.run shard=3/3" in caplog.text

    in_process(overrides(faces, tiny_ldm, "shard=3/3"))
    assert same_tables(tmp_path, whole)


def raising(error: Exception):
    def fails(*_: object) -> None:
        raise error

    return fails


def test_more_pictures_or_scorers_ask_all_shards_again(faces, tiny_ldm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for shard in ("shard=1/2", "shard=2/2"):
        in_process(overrides(faces, tiny_ldm, shard, "limit=4"))
    folder = in_process(overrides(faces, tiny_ldm, "shard=1/2"))
    asked = str(status(folder, "1of2")["asked"])
    assert Shards(folder, 2, asked).closed() == ["1/2"]
    assert "3 pictures; without the shards 2/2 (missing)" in Path("results/runs/tiny/tables/tiny.md").read_text()


def test_a_run_of_fewer_pictures_counts_no_others(whole, faces, tiny_ldm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    in_process(overrides(faces, tiny_ldm, "limit=3"))
    of_three = Path("results/runs/tiny/tables/tiny.csv").read_bytes()
    in_process(overrides(faces, tiny_ldm))
    assert (
        Path("results/runs/tiny/tables/tiny.csv").read_bytes()
        == (whole / "results/runs/tiny/tables/tiny.csv").read_bytes()
    )
    in_process(overrides(faces, tiny_ldm, "limit=3"))
    assert Path("results/runs/tiny/tables/tiny.csv").read_bytes() == of_three


def test_of_those_that_act_at_once_the_last_has_seen_all():
    """Two shards, or cells, that end together: whoever writes last writes what both have done."""
    done, written = [1], list[list[int]]()

    def write(seen: list[int]) -> None:
        if len(written) == 0:
            done.append(2)  # the other one ends while this one writes
        written.append(seen)

    until_unchanged(lambda: list(done), write)
    assert written == [[1], [1, 2]]


def test_a_file_that_many_write_at_once_is_whole(tmp_path):
    def write(number: int) -> None:
        write_whole(tmp_path / "file", bytes([number]) * 100_000)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(100)))
    assert len(set((tmp_path / "file").read_bytes())) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("device", "job", "cards", "expected"),
    [
        ("cuda", 0, 4, "cuda:0"),
        ("cuda", 5, 4, "cuda:1"),
        ("cuda", 5, 1, "cuda"),  # as in a SLURM job, which sees its own card only
        ("cuda:2", 5, 4, "cuda:2"),
        ("cpu", 5, 4, "cpu"),
        ("cpu", 5, 0, "cpu"),
    ],
)
def test_each_job_of_a_sweep_gets_the_next_card(device, job, cards, expected):
    assert card_of_job(device, job, cards) == expected


def job_of(folder: Path, given: list[str], params: dict[str, str], of_this: list[str]):
    record = {"hydra": {"sweeper": {"params": params}, "overrides": {"task": given}}}
    OmegaConf.save(OmegaConf.create(record), folder / "multirun.yaml")
    place = {"runtime": {"cwd": str(folder)}, "sweep": {"dir": "."}, "job": {"name": "run"}}
    return OmegaConf.create({"mode": RunMode.MULTIRUN, **place, "overrides": {"task": of_this}})


@pytest.mark.parametrize(
    ("asked", "params", "task", "tells", "again"),
    [
        (["parser=ellipse", "shard=1/2,2/2"], {}, ["parser=ellipse", "shard=2/2"], [], ["parser=ellipse"]),
        (["dataset=a,b"], {}, ["dataset=b"], [], ["dataset=b"]),
        (
            ["parser=ellipse", "+solver.steps=1,2", "shard=1/2,2/2"],
            {},
            ["parser=ellipse", "+solver.steps=2", "shard=1/2"],
            ["solver.steps"],
            ["-m", "parser=ellipse", "+solver.steps=choice(2)"],
        ),
        (
            ["experiment=e"],
            {"solver.steps": "10,20"},
            ["solver.steps=20", "experiment=e"],
            ["solver.steps"],
            ["-m", "solver.steps=choice(20)", "experiment=e"],
        ),
    ],
)
def test_a_cell_alone_has_the_name_it_has_in_its_sweep(tmp_path, asked, params, task, tells, again):
    job = partial(job_of, tmp_path)
    assert swept_names(job(asked, params, task)) == tells
    assert command_of_cell(job(asked, params, task)) == ["python", "-m", "experiments.run", *again]
    # Started again, it is a sweep in which the same tells.
    given = [override for override in again if override != "-m"]
    assert swept_names(job(given, {}, task)) == tells


def test_a_cell_alone_may_have_null_for_what_its_sweep_varies(tmp_path):
    """Hydra makes no choice of one null."""
    cell = ["+anonymizer.refinement.jpeg=null", "name='a b'", "solver.steps=2"]
    job = job_of(tmp_path, ["+anonymizer.refinement.jpeg=null,100", "name='a b'", "solver.steps=1,2"], {}, cell)
    [_, _, _, multirun, *again] = command_of_cell(job)
    assert multirun == "-m"
    [params] = [each for each in OverridesParser.create().parse_overrides(again) if each.is_hydra_override()]
    swept = {name: str(value) for name, value in OmegaConf.create(dict(params.value())).items()}
    assert swept == {"+anonymizer.refinement.jpeg": "null", "solver.steps": "2"}
    assert swept_names(job_of(tmp_path, ["name='a b'"], swept, cell)) == swept_names(job)
