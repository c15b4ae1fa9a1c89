"""Every experiment goes on where it was killed, and gives in shards the table that it gives in one piece."""

import multiprocessing
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pytest
from hydra import compose, initialize_config_dir

import experiments.diversity
import experiments.gaussianity
import experiments.run
import experiments.security
from keyanon.channel import whole
from tests.conftest import ROOT, smooth_picture

pytestmark = pytest.mark.no_cover  # mostly Hydra's code, which coverage's tracer would make three times as slow

RUNS = {
    "config": experiments.run.run,
    "gaussianity": experiments.gaussianity.run,
    "diversity": experiments.diversity.run,
    "security": experiments.security.run,
}
CHOICES = {
    "dataset": "bundled", "protocol": "ours",
    "backbone": "faces128", "parser": "ellipse", "anonymizer": "signflip", "key": "experiment",
    "nonce": "per_image",
}  # fmt: skip
SMALL = [
    "dataset=bundled", "parser=ellipse", "solver.steps=1", "limit=3", "batch_size=2", "name=tiny",
]  # fmt: skip
PIXEL = ["recognizers=[]", "+recognizers.pixel._target_=tests.conftest.PixelRecognizer"]
SETS = ["+scorers.brightness._target_=tests.conftest.Brightness"]
CHEAP = {
    "config": [*SMALL, *PIXEL, "scorers=[mae,psnr_face]", *SETS,
        "separability={_target_: keyanon.measures.separability.Separability, draws: [1], repeats: 2, first: [1], linear: [1]}",
        "attacks=[wrong_key]"],
    "gaussianity": [*SMALL, "inversions.naive.steps=[1]", "inversions.exact.steps=[]", "limit=2"],
    "diversity": [*SMALL, *PIXEL, "~methods.exact", "keys_per_picture=2"],
    "security": [
        *SMALL, *PIXEL, "~methods.exact", "+thresholds.pixel=0.9",
        "security=[linkage,known_plaintext,identities,password_dictionary]",
        "security.known_plaintext.pairs=[1,2]",
        "security.password_dictionary={settings: [{iterations: 1, memory: 1, lanes: 1}], guesses: 2}",
    ],
}  # fmt: skip
TIMES = ("t=1, 1 MiB, p=1",)  # of the machine, not of the pictures


def run(experiment: str, model: Path, *more: str) -> None:
    overrides = [*CHEAP[experiment], f"backbone.source={model}", "+backbone.chunk=1", *more]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose(experiment, overrides=overrides)
    RUNS[experiment](cfg, CHOICES)


def table() -> pd.DataFrame:
    rows = pd.read_csv("results/runs/tiny/tables/tiny.csv")
    return rows[~rows["scorer"].isin(TIMES)].reset_index(drop=True)


def photographs(folder: Path, first: int) -> Path:
    """Two pictures each of three people, numbered from `first` on."""
    folder.mkdir(exist_ok=True)
    for i in range(6):
        smooth_picture(first + i, 128).save(folder / f"P{i // 2}_000{i % 2 + 1}.png")
    return folder


@pytest.mark.parametrize("experiment", RUNS)
def test_other_pictures_of_the_same_names_give_the_table_of_a_new_run(
    experiment, tiny_block_dct, tmp_path, monkeypatch
):
    """Also in a gallery, and for what was taken down of each picture before."""

    def pairs(folder: Path) -> list[str]:
        return ["dataset=lfw_gray_128", f"dataset.root={folder}", "~dataset.list"]

    tables = {}
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        pictures = photographs(tmp_path / "pictures", first=0 if name == "old" else 10)
        run(experiment, tiny_block_dct, *pairs(pictures))
        tables[name] = table()
    assert not tables["old"].equals(tables["new"])
    monkeypatch.chdir(tmp_path / "old")
    run(experiment, tiny_block_dct, *pairs(pictures))
    pd.testing.assert_frame_equal(table(), tables["new"], rtol=1e-5)


@pytest.mark.parametrize("experiment", ["config", "diversity", "security"])
def test_lengths_of_embeddings_move_the_protocols_name_and_separability_alone(
    experiment, tiny_block_dct, tmp_path, monkeypatch
):
    pictures = photographs(tmp_path / "pictures", first=0)
    own = [
        "dataset=lfw_gray_128",
        f"dataset.root={pictures}",
        "~dataset.list",
        "+recognizers.pixel.lengths=${protocol.lengths}",
    ]
    if experiment != "diversity":
        own.append("far=0.3")
    tables = {}
    for lengths in ("unit", "raw"):
        (tmp_path / lengths).mkdir()
        monkeypatch.chdir(tmp_path / lengths)
        run(experiment, tiny_block_dct, *own, f"protocol.lengths={lengths}")
        tables[lengths] = table()
    unit, raw = tables.values()
    assert (set(unit["protocol"]), set(raw["protocol"])) == ({"ours"}, {"ours,lengths=raw"})
    learned = unit["statistic"].str.contains("svm|linear")
    moved = (unit["ours"] - raw["ours"]).abs() > 0.1
    assert moved.any() == (experiment == "config")
    same = [column for column in unit.columns if column != "protocol"]
    pd.testing.assert_frame_equal(unit.loc[~learned, same], raw.loc[~learned, same], rtol=0, atol=1e-6)


def killed_at_write(number: int, experiment: str, model: Path) -> None:
    """Run until so many files are written, and then end as by `kill -9`."""
    left = [number]
    write_whole = whole.write_whole

    def counting(path: Path, data: bytes, **options: bool) -> None:
        write_whole(path, data, **options)
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    for module in modules_with("write_whole"):
        module.write_whole = counting
    run(experiment, model)


def modules_with(name: str) -> Sequence[object]:
    import sys

    ours = [module for key, module in sys.modules.items() if key.startswith(("keyanon", "experiments"))]
    return [module for module in ours if hasattr(module, name)]


@pytest.mark.parametrize("experiment", RUNS)
def test_in_shards_and_killed_it_makes_the_table_of_one_piece(experiment, tiny_block_dct, tmp_path, monkeypatch):
    def inside(name: str) -> None:
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)

    inside("whole")
    run(experiment, tiny_block_dct)
    whole = table()

    inside("shards")
    for shard in ("2/2", "1/2"):
        run(experiment, tiny_block_dct, f"shard={shard}")
    pd.testing.assert_frame_equal(table(), whole, rtol=1e-5)
    assert "without the shards" not in Path("results/runs/tiny/tables/tiny.md").read_text()

    inside("killed")
    process = multiprocessing.get_context("fork").Process(  # forked: no imports to wait for
        target=killed_at_write, args=(12, experiment, tiny_block_dct)
    )
    process.start()
    process.join(300)
    assert process.exitcode == -signal.SIGKILL
    assert not Path("results/runs/tiny/tables/tiny.csv").exists()
    run(experiment, tiny_block_dct)
    pd.testing.assert_frame_equal(table(), whole, rtol=1e-5)
