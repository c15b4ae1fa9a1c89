"""The benchmarks on the smallest settings: what they compare does the same work, and their files say so. No time is tested."""

import csv
import json

import pytest
import torch

from benchmarks import throughput
from benchmarks.authors import AuthorsLoop
from keyanon.diffusion.model import LatentDiffusion
from keyanon.diffusion.solvers import DDIM, Known
from tests.conftest import LDM_NOISE


@pytest.fixture(scope="module")
def folder(tiny_ldm, tmp_path_factory):
    """The tiny model with a scheduler."""
    from diffusers import DDIMScheduler

    folder = tmp_path_factory.mktemp("with_scheduler")
    for part in ("unet", "vqvae"):
        (folder / part).symlink_to(tiny_ldm / part)
    DDIMScheduler(**LDM_NOISE).save_pretrained(folder / "scheduler")
    return folder


def test_the_authors_loop_and_ours_are_the_same_map(folder):
    """Without a flip both loops are inversion and sampling along the picture's own background: equal up to rounding."""
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mask = torch.zeros(2, 1, 16, 16, dtype=torch.bool)
    mask[..., 4:12, 4:12] = True
    theirs, ours = AuthorsLoop(folder, "cpu", steps=4), LatentDiffusion(str(folder))
    z0 = ours.encode(images)
    for signs in (torch.ones(16, 16), torch.randint(2, (16, 16)) * 2.0 - 1):
        path = DDIM(4).invert(ours.eps, ours.schedule, z0)
        flipped = torch.where(mask, signs * path[-1], path[-1])
        z = DDIM(4).sample(ours.eps, ours.schedule, flipped, Known(mask, path))
        torch.testing.assert_close(theirs.flip(images, mask, signs), ours.decode(z), atol=1e-3, rtol=1e-3)
    assert theirs.evaluations == ours.evaluations.total() == 2 * 2 * 8


def test_cells_cross_what_makes_sense():
    args = throughput.arguments(["--preset", "gpu", "--batches", "2", "8"])
    cells = throughput.cells("faces128", args)
    assert len(cells) == len(set(cells))
    assert [(cell.batch, cell.precision) for cell in cells if cell.method == "authors"] == [(5, "fp32")]
    assert {(cell.precision, cell.batch) for cell in cells if cell.compiled == "graphs"} == {
        ("fp32", 8), ("tf32", 8), ("bf16", 8),
    }  # fmt: skip
    assert not any(cell.compiled is True for cell in cells)
    assert not any(cell.method == "exact" and cell.precision == "bf16" for cell in cells)
    assert not any(cell.method == "exact" for cell in throughput.cells("ldm256", args))


@pytest.mark.weights
def test_rows_and_plot_of_a_small_run(tmp_path, monkeypatch, capsys):
    table, plot = tmp_path / "t.csv", tmp_path / "t.svg"
    given = ["--networks", "faces128", "--methods", "authors", "signflip", "--precisions", "fp32", "--compiled"]
    small = ["--batches", "1", "--steps", "2", "--repeats", "1", "--output", str(table), "--plot", str(plot)]
    monkeypatch.setattr("sys.argv", ["throughput", *given, *small, "--no-memory"])
    throughput.main()
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["direction"]) for row in rows] == [
        ("authors", "evaluate"), ("authors", "anonymize"), ("authors", "recover"),
        ("signflip", "evaluate"), ("signflip", "anonymize"), ("signflip", "recover"), ("score: psnr, ssim", "score"),
    ]  # fmt: skip
    assert [row["evaluations_per_picture"] for row in rows[:6]] == ["1", "4", "4"] * 2
    assert [row["ratio"] for row in rows[:3]] == ["1.00"] * 3
    assert all(float(row["pictures_per_s"]) > 0 for row in rows)
    svg = plot.read_text()
    assert "<svg" in svg
    assert "<image" not in svg
    assert "signflip" in capsys.readouterr().out


@pytest.mark.weights
def test_a_process_that_measures_memory_prints_bytes(monkeypatch, capsys):
    cell = {"network": "faces128", "method": "signflip", "precision": "fp32", "batch": 1, "steps": 1, "compiled": False}
    monkeypatch.setattr("sys.argv", ["throughput", "--only", json.dumps(cell)])
    throughput.main()
    assert int(capsys.readouterr().out) > 100e6


def test_the_256_px_network_has_the_size_of_the_authors():
    from diffusers import UNet2DModel, VQModel

    from benchmarks.ldm256 import UNET, VQVAE

    with torch.device("meta"):
        sizes = [
            sum(p.numel() for p in kind(**config).parameters())
            for kind, config in ((UNet2DModel, UNET), (VQModel, VQVAE))
        ]
    assert [round(size / 1e6, 1) for size in sizes] == [274.1, 55.3]


def test_operations_are_counted_as_by_hand():
    """A 3x3 convolution of 4 to 8 channels on 5x5 pixels, padded, reads 4 and writes 8 channels."""
    from benchmarks.counts import counted, parts

    with torch.device("meta"):
        net = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3, padding=1, bias=False))
    net.forward = lambda z, t: torch.nn.Sequential.forward(net, z)
    assert counted(net, (1, 4, 5, 5), "forward") == (2 * 9 * 4 * 8 * 25, 4 * (4 + 8) * 25)
    assert {name for name, *_ in parts()} == {"faces128", "faces128_kl", "ldm256"}
