"""A key that anyone can compute is fit for a benchmark's pictures alone, and a run on others says so before all else."""

import logging
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from experiments.harness.session import begin
from keyanon.channel.keys import experiment_key, write_key, write_new_key
from keyanon.faces.datasets import Folder, PairsFolder
from keyanon.types import Benchmark
from tests.conftest import ROOT, smooth_picture

WARNING = (
    "anyone can compute the key of this run (key=experiment), and its pictures are no benchmark's: it protects nobody; "
)
RUN = [
    "name=tiny", "dataset.size=64", "anonymizer=scrambling", "parser=ellipse", "recognizers=[]", "scorers=[mae]", "attacks=[]",
    "limit=1", "allow_faces_in_clear=true",
]  # fmt: skip


@pytest.fixture
def own(tmp_path) -> str:
    (tmp_path / "own").mkdir()
    smooth_picture(0).save(tmp_path / "own" / "Jane.png")
    (tmp_path / "own" / "notes.txt").touch()  # which is told of, too
    return f"dataset.root={tmp_path / 'own'}"


def first_line(folder: Path) -> str:
    (log,) = (folder / "results/runs/log").rglob("*.log")
    return log.read_text().splitlines()[0]


def test_ones_own_pictures_under_the_key_of_experiments(command_in_process, tmp_path, own):
    done = command_in_process(*RUN, "dataset=folder", own)
    assert done.returncode == 0, done.stderr
    assert (
        WARNING + "take key=file key.path=PATH, and make the file with: python -m experiments.keys new PATH"
        in first_line(tmp_path)
    )
    assert "WARNING" in first_line(tmp_path)


@pytest.mark.parametrize("published", [True, False])
def test_the_key_counts_and_not_the_way_it_was_chosen(command_in_process, tmp_path, own, published):
    path = tmp_path / "key"
    write_key(path, experiment_key(0)) if published else write_new_key(path)
    done = command_in_process(*RUN, "dataset=folder", own, "key=file", f"key.path={path}")
    assert done.returncode == 0, done.stderr
    assert (WARNING in first_line(tmp_path)) == published


def test_a_benchmarks_pictures_need_no_warning(command_in_process, tmp_path):
    done = command_in_process(*RUN, "dataset=bundled")
    assert done.returncode == 0, done.stderr
    assert WARNING not in done.stdout + done.stderr


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "conf/dataset").glob("*.yaml")))
def test_every_dataset_but_a_folder_is_a_benchmarks(name):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        dataset = instantiate(compose("config", overrides=[f"dataset={name}"]).dataset)
    assert isinstance(dataset, Benchmark)
    assert dataset.is_benchmark == (name != "folder")


@pytest.mark.parametrize("kind", [Folder, PairsFolder])
def test_a_list_of_ones_own_makes_no_benchmark(kind, tmp_path):
    (tmp_path / "list.txt").write_text("Jane")
    assert not kind(str(tmp_path), list=str(tmp_path / "list.txt")).is_benchmark
    assert not kind(str(tmp_path)).is_benchmark
    assert kind(str(tmp_path), list="lfw_gray").is_benchmark


def test_the_keys_of_the_security_experiment_are_known_too(tmp_path, own, caplog, monkeypatch):
    from experiments import security

    asked = []

    def stop(*arguments, **named):
        asked.append(begin(*arguments, **named))
        raise InterruptedError

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(security, "begin", stop)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        asked_for = ["dataset=folder", own, "dataset.size=128", "recognizers=[]", "parser=ellipse"]
        cfg = compose("security", asked_for, return_hydra_config=True)
        choices = dict(cfg.hydra.runtime.choices)
    with caplog.at_level(logging.WARNING), pytest.raises(InterruptedError):
        security.run(cfg, choices)
    assert caplog.messages[0] == WARNING + "its files are for this experiment alone, give them to nobody"
