"""The command from end to end: a table from pictures, its resumption, and every kind of bad input with its message."""

import base64
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from hydra import compose, initialize_config_dir

from experiments.harness import results
from experiments.harness.command import row_overrides, tell_of_other_place
from experiments.harness.errors import SKIPPED
from experiments.harness.shards import sharded
from experiments.run import main, run
from keyanon.channel.keys import Recipe, write_key, write_new_key
from tests.conftest import ROOT, smooth_picture

pytestmark = pytest.mark.no_cover  # mostly Hydra's code, which coverage's tracer would make three times as slow

CHOICES = {
    "dataset": "folder",
    "protocol": "ours",
    "anonymizer": "signflip",
    "backbone": "ldm_ffhq",
    "parser": "ellipse",
    "key": "experiment",
    "nonce": "per_image",
}


@pytest.fixture(scope="module")
def faces(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("faces")
    for i in range(5):
        smooth_picture(i).save(root / f"face{i}.png")
    (root / "broken.jpg").write_text("this is not a picture")
    (root / "cut.png").write_bytes((root / "face0.png").read_bytes()[:400])
    return root


def overrides(faces: Path, tiny_ldm: Path, *more: str) -> list[str]:
    """A whole small run: LDM-FFHQ's layout with random weights, which the table's title says."""
    return [
        "dataset=folder", f"dataset.root={faces}", "dataset.rename=null", "dataset.size=64", "backbone=ldm_ffhq",
        f"backbone.source={tiny_ldm}", "backbone.subfolder=''", "parser=ellipse", "solver.steps=2", "recognizers=[]",
        "scorers=[mae,psnr_face]", "attacks=[wrong_key]", "batch_size=2", "notes=[random weights stand in for LDM-FFHQ]",
        "name=tiny", *more,
    ]  # fmt: skip


def command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "KEYANON_OFFLINE": "1"}
    program = [sys.executable, "-m", "experiments.run", *arguments]
    return subprocess.run(program, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def in_process(arguments: list[str], **choices: str) -> Path:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return run(
            compose("config", overrides=arguments), CHOICES | choices, command=("python", "-m", "experiments.run")
        )


def test_from_pictures_to_a_table(faces, tiny_ldm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = in_process(overrides(faces, tiny_ldm))
    table = pd.read_csv("results/runs/tiny/tables/tiny.csv")
    assert list(table.columns) == results.TIDY
    assert set(table["view"]) == {"original", "reconstructed", "anonymized", "recovered", "wrong_key"}
    assert (table["n"] == 5).all()
    markdown = Path("results/runs/tiny/tables/tiny.md").read_text()
    assert "random weights stand in for LDM-FFHQ" in markdown
    assert (
        "psnr_face ↑" in markdown.split("### Recovered with the right key: picture measures, mean")[1].splitlines()[2]
    )
    assert "Not declared" not in markdown
    skipped = pd.read_csv(folder / "skipped.csv", index_col="id")["reason"]
    assert set(skipped.index) == {"broken", "cut"}
    record = json.loads((folder / "run.json").read_text())
    assert record["packages"]["torch"]
    assert str(faces) not in (folder / "run.json").read_text() or "root" in record["question"]["dataset"]
    assert (folder / "contact_sheet.png").exists()

    before = Path("results/runs/tiny/tables/tiny.csv").read_bytes()
    assert in_process(overrides(faces, tiny_ldm)) == folder  # the same question: the same folder, nothing to do
    assert Path("results/runs/tiny/tables/tiny.csv").read_bytes() == before


def test_shards_give_the_table_of_the_whole(faces, tiny_ldm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    in_process(overrides(faces, tiny_ldm))
    whole = Path("results/runs/tiny/tables/tiny.csv").read_bytes()
    for i in (3, 1, 2):
        in_process(overrides(faces, tiny_ldm, "runs=sharded", f"shard={i}/3"))
    assert Path("sharded/tiny/tables/tiny.csv").read_bytes() == whole


def test_preflight_lists_everything_missing_at_once(command_in_process):
    result = command_in_process("experiment=table1")
    assert result.returncode == 2
    for name in (
        "PolLabarbarie/diffusion-signflip-anon-face",
        "bisenet",
        "vggface2",
        "casia",
        "arcface_r50",
        "adaface_vit",
        "celebahq",
    ):
        assert name in result.stderr, name
    assert "Traceback" not in result.stderr


def fails(capsys, arguments: list[str], **choices: str) -> tuple[int, str]:
    """Exit code and message of a run that must not start."""
    with pytest.raises(SystemExit) as raised:
        in_process(arguments, **choices)
    return raised.value.code, capsys.readouterr().err


def test_unknown_dataset_root(faces, tiny_ldm, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, message = fails(capsys, overrides(tmp_path / "nowhere", tiny_ldm))
    assert code == 2
    assert "nowhere" in message


def test_no_space_for_the_pictures(faces, tiny_ldm, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10))
    code, message = fails(capsys, overrides(faces, tiny_ldm))
    assert code == 2
    assert "disk:" in message


def test_bad_keys_and_typos_on_the_command_line(command_in_process, faces, tiny_ldm, tmp_path):
    arguments = overrides(faces, tiny_ldm)
    (tmp_path / "short").write_text("abcd")
    (tmp_path / "short").chmod(0o600)
    for extra, code, message in (
        (["key=file", f"key.path={tmp_path / 'none'}"], 1, "no key file"),
        (["key=file", f"key.path={tmp_path / 'short'}"], 1, "holds 2 bytes"),
        (["solver.stepz=3"], 1, "stepz"),
    ):
        result = command_in_process(*arguments, *extra)
        assert result.returncode == code
        assert message in result.stderr
        assert "Traceback" not in result.stderr


def test_a_secret_key_leaves_no_trace_but_its_fingerprint(faces, tiny_ldm, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    key = write_new_key(tmp_path / "secret-key")
    with caplog.at_level("DEBUG"):
        folder = in_process(overrides(faces, tiny_ldm, "key=file", f"key.path={tmp_path / 'secret-key'}"), key="file")
    assert key.fingerprint in (folder / "run.json").read_text()
    written = [path.read_bytes() for path in Path("results").rglob("*") if path.is_file()]
    for trace in (key.secret, key.secret.hex().encode()):
        assert not any(trace in data for data in written)
        assert trace.hex() not in caplog.text
    assert key.secret.hex() not in caplog.text


def command_to_files(arguments: list[str], folder: Path) -> None:
    """The command in a process of its own, a fork of this one: what it prints goes to files."""
    for name, stream in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT, 0o600), stream)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    tempfile.tempdir = None  # to be looked for anew, in the environment
    sys.argv = ["run.py", "--config-path", str(ROOT / "conf"), *arguments]
    main()
    sys.stdout.flush()
    sys.stderr.flush()


@pytest.mark.parametrize("where", ["file", "password"])
def test_keys_and_passwords_are_in_no_file_that_a_whole_run_writes(faces, tiny_ldm, tmp_path, monkeypatch, where):
    """The command as users start it, wandb offline, with home and caches inside the folder that is searched."""
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    recipe = Recipe(bytes(range(16)))
    home = tmp_path / "home"
    home.mkdir()
    for name in (
        "HOME",
        "XDG_CACHE_HOME",
        "XDG_CONFIG_HOME",
        "XDG_DATA_HOME",
        "TMPDIR",
        "WANDB_CACHE_DIR",
        "WANDB_DATA_DIR",
    ):
        monkeypatch.setenv(name, str(home))
    monkeypatch.setenv("KEYANON_PASSWORD", "hunter2 hunter2")
    if where == "file":
        key = write_key(tmp_path.parent / f"{tmp_path.name}-key", recipe.derive("hunter2 hunter2"))
        choice = ["key=file", f"key.path={tmp_path.parent / f'{tmp_path.name}-key'}"]
    else:
        key = recipe.derive("hunter2 hunter2")
        choice = ["key=password", f"key.salt={recipe.salt.hex()}"]
    arguments = overrides(faces, tiny_ldm, *choice, "wandb=offline", "limit=4", "hydra.verbose=true")
    monkeypatch.chdir(tmp_path)
    process = multiprocessing.get_context("fork").Process(target=command_to_files, args=(arguments, home))
    process.start()
    process.join(120)
    assert process.exitcode == SKIPPED, (home / "stderr").read_text()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    written = [str(path.relative_to(tmp_path)).encode() + path.read_bytes() for path in files]
    assert any(path.suffix == ".wandb" for path in files)
    assert any(key.fingerprint.encode() in data for data in written)
    assert any(recipe.salt in data for data in written)  # public: in the published headers
    secret, hexadecimal = key.secret, key.secret.hex()
    spelled = [hexadecimal.encode(), hexadecimal.upper().encode(), base64.b64encode(secret), repr(secret).encode()]
    for trace in [b"hunter2", secret, *spelled]:
        assert not any(trace in data for data in written)


def test_shard_arithmetic():
    ids = list("abcdefg")
    assert sorted(id for i in (1, 2, 3) for id in sharded(ids, f"{i}/3")) == ids
    for wrong in ("0/3", "4/3", "3", "a/b"):
        with pytest.raises(ValueError, match="shard="):
            sharded(ids, wrong)


def test_a_sweep_makes_one_table_with_a_row_for_each_cell(command_in_process, faces, tiny_ldm, tmp_path):
    small = [o for o in overrides(faces, tiny_ldm, "limit=3") if not o.startswith("solver.steps")]
    done = command_in_process("--multirun", *small, "solver.steps=1,2")
    assert done.returncode == SKIPPED, done.stderr
    names = set(pd.read_csv(tmp_path / "results/runs/tiny/tables/tiny.csv")["anonymizer"])
    assert "ran on: 1 pictures of folder by signflip" in done.stdout
    assert names == {"signflip,solver.steps=1", "signflip,solver.steps=2"}


def test_a_sweeps_cells_are_told_apart_by_what_they_vary():
    overrides = ["anonymizer=exact", "dataset.root=/faces", "anonymizer.floor=30", "+parser.forehead=0.5", "limit=3"]
    assert row_overrides(overrides, ["dataset.root", "parser.forehead"]) == [
        "dataset.root=/faces",
        "parser.forehead=0.5",
    ]


def test_pictures_that_all_had_to_be_skipped_are_said_in_one_line(command_in_process, faces, tiny_ldm):
    done = command_in_process(*overrides(faces, tiny_ldm, "limit=2"))
    assert done.returncode == 1
    assert "none of the 2 pictures could be used; the first, broken" in done.stderr
    assert "Traceback" not in done.stderr


SMALL = ["parser=ellipse", "anonymizer=pixelate", "recognizers=[]", "scorers=[mae]", "attacks=[]", "limit=2"]


@pytest.mark.parametrize("experiment", ["quickstart", "smoke", "default"])
def test_a_run_leaves_the_checkout_clean(command_in_process, tmp_path, experiment):
    """Started in a checkout, and in another folder: nothing but what git ignores is new or changed."""

    def status(folder: Path) -> str:
        return subprocess.run(["git", "status", "--porcelain"], cwd=folder, capture_output=True, text=True).stdout

    for folder in ("results/tables", "results/scores"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / f"{experiment}.md").write_text("committed")
    shutil.copy(ROOT / ".gitignore", tmp_path)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a", "-c", "init.defaultBranch=main"]
    for step in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *step], cwd=tmp_path, check=True)
    before = status(ROOT)
    done = command_in_process(*([f"experiment={experiment}"] if experiment != "default" else []), *SMALL)
    assert done.returncode == 0, done.stderr
    assert status(tmp_path) == ""
    assert status(ROOT) == before
    assert f"table: results/runs/{experiment}/tables/{experiment}.md" in done.stdout


def test_in_another_folder_the_papers_rows_are_there(command_in_process, tmp_path):
    done = command_in_process("name=table2", *SMALL)
    assert done.returncode == 0, done.stderr
    assert "Of 16 published numbers 0 within tolerance, 0 outside, 16 not run." in done.stdout
    verdicts = pd.read_csv(tmp_path / "results/runs/table2/tables/table2.csv")["verdict"]
    assert set(verdicts) == {"not-run", "no-reference"}


def test_runs_that_lie_in_the_checkout_are_told_in_another_folder(tmp_path, monkeypatch, caplog):
    (tmp_path / "checkout" / "results" / "runs" / "tiny").mkdir(parents=True)
    monkeypatch.setattr("experiments.harness.command.CHECKOUT", tmp_path / "checkout")
    monkeypatch.chdir(tmp_path)
    for runs, name in (("results/runs", "other"), (tmp_path / "elsewhere", "tiny")):
        tell_of_other_place(Path(runs), name)
    assert not caplog.records
    tell_of_other_place(Path("results/runs"), "tiny")
    assert f"for the other place: runs={tmp_path / 'checkout' / 'results' / 'runs'}" in caplog.text


def test_a_row_of_other_settings_is_not_replaced_without_a_word(command_in_process, tmp_path):
    told: list[list[str]] = []
    for block in (10, 20, 20):
        done = command_in_process("name=tiny", *SMALL, f"anonymizer.filter.block={block}")
        assert done.returncode == 0, done.stderr
        told.append([line for line in done.stdout.splitlines() if "the row pixelate" in line])
    first, second, third = told
    assert not first
    assert not third
    [line] = second
    assert "the row pixelate of bundled in the table tiny was results/runs/tiny/bundled-pixelate-" in line
    assert "anonymizer.filter.block 10 -> 20. To keep both rows, name this run (name=...)" in line
    assert len(list(tmp_path.glob("results/runs/tiny/*/run.json"))) == 2


def test_a_sweep_over_the_name_makes_a_table_for_each(command_in_process, faces, tiny_ldm, tmp_path):
    asked = [each for each in overrides(faces, tiny_ldm, "limit=3") if not each.startswith("name=")]
    done = command_in_process("--multirun", *asked, "name=one,two")
    assert done.returncode == SKIPPED, done.stderr
    assert all((tmp_path / f"results/runs/{name}/tables/{name}.csv").exists() for name in ("one", "two"))
