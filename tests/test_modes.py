"""Who can read what a run leaves: others what is published, and numbers; its owner alone what shows or names an original."""

import os
import stat
from pathlib import Path

import pytest
import torch

from keyanon.channel.pixels import write_png
from keyanon.channel.whole import write_whole
from tests.conftest import smooth_picture

RUN = [
    "name=tiny", "dataset=folder", "dataset.size=64", "anonymizer=scrambling", "parser=ellipse", "recognizers=[]", "scorers=[mae]",
    "attacks=[wrong_key,jpeg]", "attacks.jpeg.quality=[75]", "allow_faces_in_clear=true",
]  # fmt: skip


@pytest.fixture(params=[0o022, 0o000, 0o077], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_files_are_private_unless_it_is_said(tmp_path, umask):
    pixels = torch.zeros(3, 8, 8, dtype=torch.uint8)
    write_whole(tmp_path / "kept", b"x")
    write_png(tmp_path / "kept.png", pixels)
    write_whole(tmp_path / "shown", b"x", public=True)
    write_png(tmp_path / "shown.png", pixels, public=True)
    for name, wanted in (
        ("kept", 0o600),
        ("kept.png", 0o600),
        ("shown", 0o666 & ~umask),
        ("shown.png", 0o666 & ~umask),
    ):
        assert mode(tmp_path / name) == wanted


def test_a_file_that_is_written_again_gets_the_mode_of_what_it_holds_now(tmp_path):
    path = tmp_path / "x"
    path.touch(0o666)
    write_whole(path, b"an original")
    assert mode(path) == 0o600


def test_every_file_of_every_view_of_a_run(command_in_process, tmp_path):
    (tmp_path / "own").mkdir()
    for seed in range(2):
        smooth_picture(seed).save(tmp_path / "own" / f"Jane Doe {seed}.png")
    before = os.umask(0o022)
    try:
        done = command_in_process(*RUN, f"dataset.root={tmp_path / 'own'}")
    finally:
        os.umask(before)
    assert done.returncode == 0, done.stderr
    runs = tmp_path / "results/runs"
    for view in ("original", "mask", "anonymized", "recovered", "wrong_key", "jpeg75"):
        assert len([*runs.rglob(f"{view}/*.png")]) == 2
    files = [
        path for path in runs.rglob("*") if path.is_file() and path.suffix not in (".log", ".yaml")
    ]  # which are Hydra's
    others_read = {path for path in files if mode(path) != 0o600}
    published = {*runs.rglob("anonymized/*.png"), *runs.rglob("anonymized_sheet.png")}
    assert others_read == published | {*runs.glob("tiny/tables/*"), *runs.glob("tiny/scores/*")}
    assert {mode(path) for path in others_read} == {0o644}
    assert {mode(path) for path in runs.rglob("names/*")} == {0o600}
