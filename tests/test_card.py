"""benchmarks/card.sh from end to end on a CPU with a tiny model: every step runs, and says whether it did. No time is tested."""

import csv
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from benchmarks.card import Check
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def model(tiny_block_dct, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("card") / "model"
    shutil.copytree(tiny_block_dct, folder)
    shutil.copytree(ROOT / "keyanon" / "assets" / "faces128" / "scheduler", folder / "scheduler", dirs_exist_ok=True)
    (folder / "model_index.json").write_text("{}")
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("KEYANON_CARD"), reason="a minute of new processes: KEYANON_CARD=1")
def test_all_steps_of_the_script_run(model, tmp_path):
    faces, out = tmp_path / "faces", tmp_path / "out"
    faces.mkdir()
    chosen = sorted((ROOT / "keyanon" / "assets" / "faces").glob("*.webp"))[:8]
    for path in chosen:
        shutil.copy(path, faces)
    heldout = tmp_path / "heldout.txt"
    heldout.write_text("".join(f"{path.stem}\n" for path in chosen[-2:]))
    given = {"DEVICE": "cpu", "QUICK": str(heldout), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = ["sh", str(ROOT / "benchmarks" / "card.sh"), "0", str(out), str(faces), str(model)]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command, env={**os.environ, **given, "PYTHONPATH": path}, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line for line in done.stdout.splitlines() if line.endswith(": done")] == [
        "== agreement: done", "== faces128: done", "== training: done", "== samples: done",
    ]  # fmt: skip
    with (out / "agreement.csv").open() as file:
        checks = list(csv.DictReader(file))
    assert {row["value"] for row in checks if row["unit"] == "share of equal numbers"} == {"1.0"}
    assert {row["holds"] for row in checks} == {"yes"}
    assert (out / "model" / "unet" / "diffusion_pytorch_model.safetensors").is_file()
    with tarfile.open(out / "samples.tar") as tar:
        assert tar.getnames() == ["0000.webp"]
    again = subprocess.run(
        command,
        env={**os.environ, **given, "PYTHONPATH": path, "PYTHON": "false"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert again.returncode == 1
    assert again.stdout.count(": FAILED") == 4


@pytest.mark.parametrize(
    ("value", "bar", "higher", "holds"),
    [
        (40, 40, True, True), (41, 40, True, True), (39, 40, True, False), (1, None, True, True),
        (1, 2, False, True), (3, 2, False, False), (float("nan"), 40, True, False), (float("nan"), 40, False, False),
    ],
)  # fmt: skip
def test_a_check_holds_at_its_bar_on_the_better_side(value, bar, higher, holds):
    assert Check("c", "cpu", "cuda", value, "dB", bar, higher).holds is holds


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_recorded_network_computes_what_the_plain_one_does(model):
    from keyanon.diffusion.model import LatentDiffusion

    plain, recorded = (LatentDiffusion(str(model), device="cuda", compile=how) for how in (False, "graphs"))
    z = torch.randn(3, 21, 16, 16, device="cuda")
    for t in (10, 700):
        torch.testing.assert_close(recorded.eps(z, t), plain.eps(z, t))
    first = recorded.eps(z, 10)
    kept = first.clone()
    recorded.eps(-z, 10)
    assert torch.equal(first, kept)
