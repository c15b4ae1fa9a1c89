"""All attackers from pictures to a table, on a few synthetic faces and few steps: every attack runs, and the certain ones find."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hydra import compose, initialize_config_dir

from experiments import pairs
from experiments.harness import results, statistics
from experiments.security import run
from keyanon.attacks.attackers import best_of
from tests.conftest import ROOT

CONF = str(ROOT / "conf")
TINY = [
    "parser=ellipse", "solver.steps=5", "methods.exact.solver.steps=2", "methods.exact.solver.tolerance=null",
    "methods.exact.floor=null", "methods.exact.refinement=null", "recognizers=[]",
    "+recognizers.pixel._target_=tests.conftest.PixelRecognizer", "+thresholds.pixel=0.9", "limit=3", "batch_size=3",
    "security.known_plaintext.pairs=[1,2,20]", "security.reused_rotations={pairs: [1, 2], targets: 1, axes: [0.15, 0.15]}",
    "security.right_signs.shares=[0.5,1]", "security.seed_search={tried: 300, pictures: 1}",
    "security.learned={people: 10, steps: 2}",
    "security.key_search={guesses: 2, pictures: 2}", "security.noise_oracle.wrong_keys=2", "security.tampering.pictures=2",
    "security.password_dictionary={settings: [{iterations: 1, memory: 1, lanes: 1}], guesses: 2}", "name=tiny",
]  # fmt: skip


def in_process(model: Path, *more: str) -> pd.DataFrame:
    overrides = [*TINY, f"backbone.source={model}", "+backbone.chunk=1", *more]
    with initialize_config_dir(CONF, version_base="1.3"):
        cfg = compose("security", overrides=overrides)
    run(cfg, {"dataset": "bundled", "protocol": "ours", "backbone": "faces128", "parser": "ellipse"})
    return pd.read_csv("results/runs/tiny/tables/tiny.csv")


@pytest.fixture(scope="module")
def made(tiny_block_dct: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[pd.Series, Path]:
    """All cells of the table by method, view, scorer and statistic, and the folder that holds its files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder := tmp_path_factory.mktemp("security"))
        table = in_process(tiny_block_dct, "notes=[a tiny run]")
    assert set(table.dataset) == {"bundled"}
    return table.set_index(["anonymizer", "view", "scorer", "statistic"]).sort_index(), folder


def test_every_attack_is_in_the_table(made):
    table, _ = made
    for method in ("signflip", "exact"):
        views = set(table.loc[method].index.get_level_values("view"))
        assert {
            "linkage of two files", "file and its photograph", "wrong key", "key off by one bit", "nonce off by one bit",
            "fresh face", "face blanked", "anonymized", "recovered", "strangers", "right key told by z_T",
            "best of 2 wrong keys for another suspect", "known plaintext, nonces,  2 pairs", "password off by one bit",
            "learned: ignorant", "learned: own keys, 10 others, parrot", "learned: own keys, 10 others, from the mask alone",
             "learned: one key stream, 10 others, de-anonymizer",
            "tampering: one bit of the header", "face blanked, its place known", "wrong keys, all four",
        } <= views  # fmt: skip
        assert any(view.startswith("reused rotations, one key stream,   2 pairs") for view in views) == (
            method == "exact"
        )
        assert ("32-bit seed search" in views) == ("right signs  50.0 %" in views) == (method == "signflip")
        assert "known plaintext, nonces, 20 pairs" not in views  # more than there are pictures
    assert table.loc["Argon2id", "password dictionary", "t=1, 1 MiB, p=1", "seconds per guess"].n == 2
    assert table.n.max() > 0
    assert not table.ours.isna().all()


def test_the_flip_falls_and_the_rotation_does_not(made):
    """Few steps lose much, yet |z_T| links files, one key stream shows its signs, and 32 bits are searched."""
    table, _ = made
    found = table.ours
    layout = {method: found[method, "linkage of two files", "layout of |z|", "auc"] for method in ("signflip", "exact")}
    assert layout["signflip"] == 1
    assert layout["exact"] < 1
    assert found["signflip", "known plaintext, one key stream,  2 pairs", "key signs", "mean"] > 0.65
    assert found["signflip", "known plaintext, nonces,  2 pairs", "key signs", "mean"] == pytest.approx(0.5, abs=0.05)
    assert ("exact", "known plaintext, nonces,  2 pairs", "key signs", "mean") not in found.index
    assert found["signflip", "32-bit seed search", "right seed of 300", "mean"] == 1
    for method in ("signflip", "exact"):
        refused = {view.partition(": ")[2]: value for view, value in found[method, :, "refused", "rate"].items()}
        assert refused.pop("nothing changed") == 0
        assert len(refused) == 5
        assert set(refused.values()) == {1}
    all_right = found["signflip", "right signs 100.0 %", "pixel", "mean"]
    assert all_right == pytest.approx(found["signflip", "recovered", "pixel", "mean"], abs=1e-6)
    assert all_right > found["signflip", "right signs  50.0 %", "pixel", "mean"]


def test_the_table_is_made_from_committed_files(made, monkeypatch):
    _, folder = made
    monkeypatch.chdir(folder)
    path = folder / "results" / "runs" / "tiny" / "tables" / "tiny.md"
    markdown = path.read_text()
    assert "Not declared" not in markdown
    assert "## bundled: a tiny run; backbone faces128" in markdown
    assert "3 pictures; 2 files each; thresholds at FAR 0.001: pixel 0.9000" in markdown
    assert "suspects are the photographs themselves" in markdown
    path.unlink()
    results.build("tiny", results=Path("results/runs/tiny"))
    assert path.read_text() == markdown
    scores = pd.read_parquet("results/runs/tiny/scores/tiny.scores.parquet")
    assert list(scores.columns) == results.SCORES
    assert scores.groupby(["anonymizer", "view", "scorer"]).id.nunique().max() == 3


def test_wrong_keys_are_set_beside_people_and_fresh_faces(made):
    """A person with four wrong keys counts as one."""
    table, _ = made
    for control in ("strangers", "impostors", "fresh face"):
        for view in ("wrong keys, all four", "wrong key"):
            rows = table.loc["exact", view, f"pixel beside {control}"]
            assert set(rows.index) == {"ks_d", "ks_p"}
            assert set(rows.n) == {3}
            assert 0 < rows.ours["ks_p"] <= 1


def test_a_rotations_norms_are_hidden_and_a_flips_are_not(made):
    table, _ = made
    assert table.loc["exact", "norms in floats", "largest residue", "mean"].ours < 1e-2
    assert table.loc["signflip", "norms in floats", "largest residue", "mean"].ours > 5e-2
    assert table.loc["signflip", "linkage of two files", "norms in floats", "auc"].ours == 1


def pairs_again(capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    """Exit code and lines of the command on the tiny run."""
    code = 0
    try:
        pairs.main(["tiny", "--results", "results/runs/tiny"])
    except SystemExit as error:
        code = int(error.code) if isinstance(error.code, int) else 2
    return code, capsys.readouterr().out.splitlines()


def test_a_reader_makes_the_cells_of_pairs_again(made, monkeypatch, capsys):
    """From numbers alone: every cell of linkage and of the two-sample tests, to the last digit printed."""
    table, folder = made
    monkeypatch.chdir(folder)
    code, lines = pairs_again(capsys)
    made_of_pairs = table.reset_index()
    linkage = made_of_pairs.view.isin(["linkage of two files", "file and its photograph"])
    tests = made_of_pairs.statistic.isin(["ks_d", "ks_p"])
    expected = int((linkage | tests).sum())
    assert expected > 40
    assert (code, lines) == (
        0,
        [f"{expected} of {expected} cells are equal to those of results/runs/tiny/tables/tiny.csv"],
    )
    kept = pd.read_parquet("results/runs/tiny/scores/tiny.pairs.parquet")
    assert list(kept.columns) == ["dataset", "protocol", "anonymizer", *statistics.PAIRS]
    assert {str(kept[name].dtype) for name in ("comparison", "first", "person", "second")} == {"int16"}
    assert str(kept["score"].dtype) == "float32"


def test_a_changed_score_and_a_changed_cell_are_told(made, monkeypatch, capsys):
    _, folder = made
    monkeypatch.chdir(folder)
    path = Path("results/runs/tiny/scores/tiny.pairs.parquet")
    before = path.read_bytes()
    scores = pd.read_parquet(path)
    flip = (
        (scores.anonymizer == "signflip") & (scores.view == "linkage of two files") & (scores.scorer == "layout of |z|")
    )
    scores.loc[flip & (scores["first"] == scores.second), "score"] = -1
    try:
        path.write_bytes(scores.to_parquet(index=False))
        code, lines = pairs_again(capsys)
    finally:
        path.write_bytes(before)
    assert code == 1
    assert any(
        line.startswith("bundled, ours, signflip, linkage of two files, layout of |z|, auc: 3 0 0 ")
        and "3 0 1 1 1" in line
        for line in lines
    )


def test_methods_stand_side_by_side(made):
    table, folder = made
    lines = (folder / "results" / "runs" / "tiny" / "tables" / "tiny.beside.md").read_text().splitlines()
    assert lines[4].replace("|", "").split() == ["attack", "by", "statistic", "signflip", "exact", "Argon2id"]
    (line,) = [
        one for one in lines if one.startswith("| linkage of two files ") and "layout of" in one and "| auc " in one
    ]
    assert " 1.000 [1.000, 1.000]; 3 " in line
    assert len(lines) == 6 + len(table.reset_index().drop_duplicates(["view", "scorer", "statistic"]))


def test_a_second_run_takes_what_the_first_has_kept(made, tiny_block_dct, monkeypatch):
    table, folder = made
    monkeypatch.chdir(folder)
    monkeypatch.setattr("experiments.security.publish", None)
    monkeypatch.setattr("keyanon.attacks.attackers.publish", None)
    again = in_process(tiny_block_dct).set_index(["anonymizer", "view", "scorer", "statistic"]).sort_index()
    kept = table.drop(index="Argon2id", level="anonymizer")
    pd.testing.assert_frame_equal(again.drop(index="Argon2id", level="anonymizer"), kept)


def test_lonely_people_are_refused(tiny_block_dct, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="1 person on 1 readable pictures"):
        in_process(tiny_block_dct, "limit=1")


def test_what_is_missing_is_listed_before_any_work(tiny_block_dct, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        in_process(tiny_block_dct, "dataset=folder", f"dataset.root={tmp_path / 'nowhere'}")
    assert "nowhere" in capsys.readouterr().err


def test_default_composes_with_a_solver_for_each_method():
    with initialize_config_dir(CONF, version_base="1.3"):
        cfg = compose("security")
    assert (cfg.methods.signflip.solver.steps, cfg.methods.exact.solver.spacing) == (50, "karras")
    assert set(cfg.security) == {path.stem for path in (ROOT / "conf" / "security").glob("*.yaml")}


@pytest.mark.parametrize("name", ["linkage", "linkage_overexposed"])
def test_linkage_on_many_people_is_a_configuration(name):
    with initialize_config_dir(CONF, version_base="1.3"):
        cfg = compose(name)
    assert (cfg.name, list(cfg.security), list(cfg.methods)) == (name, ["linkage", "identities"], ["signflip", "exact"])
    assert cfg.limit >= 340  # at least 300 of which show a face
    assert cfg.dataset.list == "lfw_gray"
    assert bool(cfg.dataset.get("disturbance")) == (name == "linkage_overexposed")


def test_the_best_of_no_face_is_undefined():
    best = best_of(np.array([[0.1, np.nan, np.nan], [0.3, 0.2, np.nan]]))
    np.testing.assert_array_equal(best, [0.3, 0.2, np.nan])
