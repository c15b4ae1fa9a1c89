"""Further training at toy size on a CPU: a network on the block-DCT latent, a VQ decoder; and, on a GPU, the fused norms."""

import copy
import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from safetensors.torch import load_file

from experiments import train_gpu
from experiments.harness import graphs
from experiments.harness.graphs import Diverged, Fit, Pictures, training
from experiments.harness.training import augment, load_pictures, moved
from keyanon.channel.pixels import to_floats
from keyanon.diffusion.model import LatentDiffusion
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def faces(tmp_path_factory) -> Path:
    """Eight of the package's synthetic faces; two are held out."""
    root = tmp_path_factory.mktemp("faces")
    chosen = sorted((ROOT / "keyanon" / "assets" / "faces").glob("*.webp"))[:8]
    for path in chosen:
        shutil.copy(path, root)
    (root / "heldout.txt").write_text("".join(f"{path.stem}\n" for path in chosen[-2:]))
    return root


def trained(part: str, model: Path, faces: Path, out: Path, rate: str = "0.1") -> list[dict[str, str]]:
    """The report of a run of less than a tenth of a second, one round of steps, after which `out` is a model."""
    given = ["--model", str(model), "--data", str(faces), "--heldout", str(faces / "heldout.txt"), "--out", str(out)]
    train_gpu.main([part, *given, "--minutes", "0.001", "--batch", "2", "--learning-rate", rate, "--device", "cpu"])
    with (out / "training.csv").open() as file:
        return list(csv.DictReader(file))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value.half() for name, value in load_file(folder / "diffusion_pytorch_model.safetensors").items()}


def with_index(model: Path, folder: Path, scheduler: Path) -> Path:
    shutil.copytree(model, folder)
    shutil.copytree(scheduler, folder / "scheduler", dirs_exist_ok=True)
    (folder / "model_index.json").write_text("{}")
    return folder


def test_a_network_is_trained_further_into_a_complete_model(tiny_block_dct, faces, tmp_path):
    bundled = ROOT / "keyanon" / "assets" / "faces128"
    model = with_index(tiny_block_dct, tmp_path / "model", bundled / "scheduler")
    rows = trained("network", model, faces, tmp_path / "out")
    assert [list(row) for row in rows] == [["seconds", "step", "pictures", "heldout_loss"]] * 2
    assert int(rows[-1]["pictures"]) == 2 * int(rows[-1]["step"]) > 0
    result = LatentDiffusion(str(tmp_path / "out"))
    z = result.encode(torch.zeros(1, 3, 128, 128))
    assert result.eps(z, 10).isfinite().all()
    assert "_name_or_path" not in json.loads((tmp_path / "out" / "unet" / "config.json").read_text())
    with pytest.raises(SystemExit, match="out exists already"):
        trained("network", model, faces, tmp_path / "out")
    with pytest.raises(SystemExit, match="decoder needs one of the folders vqvae"):
        trained("decoder", model, faces, tmp_path / "other")


def test_a_network_learns(tiny_block_dct, faces):
    torch.manual_seed(0)
    pictures, heldout = load_pictures(str(faces), 128, str(faces / "heldout.txt"))
    part = train_gpu.network(tiny_block_dct, Pictures(pictures), heldout.repeat(2, 1, 1, 1), 4)
    before, fit = part.measure(), Fit(list(part.net.parameters()), part.loss)
    assert part.measure() == before
    fit.run(3e-3, 1.0, 20)
    assert part.measure()["heldout_loss"] < 0.99 * before["heldout_loss"]


def test_a_decoder_is_trained_and_the_encoder_stays(tiny_ldm, faces, tmp_path, monkeypatch):
    monkeypatch.setattr(graphs, "REPLAYS", 2)
    bundled = ROOT / "keyanon" / "assets" / "faces128"
    model = with_index(tiny_ldm, tmp_path / "model", bundled / "scheduler")
    rows = trained("decoder", model, faces, tmp_path / "out", rate="1")
    assert [int(row["step"]) for row in rows] == [0, 2]
    assert all(float(row["psnr"]) > 5 and 0 < float(row["roundtrip_rms"]) < 1 for row in rows)
    before, after = (weights(folder / "vqvae") for folder in (model, tmp_path / "out"))
    fixed = [name for name in before if name.startswith(("encoder", "quant_conv"))]
    assert fixed
    for name in fixed:
        assert torch.equal(after[name], before[name])
    assert not torch.equal(after["decoder.conv_out.weight"], before["decoder.conv_out.weight"])
    assert not torch.equal(after["quantize.embedding.weight"], before["quantize.embedding.weight"])


def test_the_average_follows_the_weights_and_swapping_twice_changes_nothing():
    weight = torch.nn.Parameter(torch.ones(3))
    fit = Fit([weight], lambda: weight.square().sum())
    assert torch.equal(weight.detach(), torch.ones(3)), "warming up left something behind"
    fit.run(0.1, 0.5, 1)
    first = weight.detach().clone()
    assert (first < 1).all()
    torch.testing.assert_close(fit.average[0], (1 + first) / 2)
    assert fit.total == 3
    fit.swap()
    torch.testing.assert_close(weight.detach(), (1 + first) / 2)
    fit.swap()
    assert torch.equal(weight.detach(), first)


def test_a_loss_that_is_not_finite_ends_it_by_name():
    weight = torch.nn.Parameter(torch.ones(1))
    fit = Fit([weight], lambda: weight.sum() * float("nan"))
    with pytest.raises(Diverged, match="the loss is nan after 200 steps"):
        list(training(fit, 1, 0.1, 0.1, dict))


def test_pictures_are_drawn_as_augment_draws_them():
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8)
    plain = to_floats(pixels)
    drawn = Pictures(pixels).draw(8, (1.0, 1.0), 0.0)
    mirrored = [torch.allclose(picture, plain[0].flip(-1), atol=1e-5) for picture in drawn]
    assert 0 < sum(mirrored) < 8
    assert all(
        mirror or torch.allclose(picture, plain[0], atol=1e-5) for mirror, picture in zip(mirrored, drawn, strict=True)
    )
    one = torch.ones(1)
    torch.testing.assert_close(moved(plain, one, one, torch.zeros(1, 2)), plain)
    assert augment(plain, (0.9, 1.1), 0.1, torch.Generator().manual_seed(0)).shape == plain.shape


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="Triton's kernels need a GPU")
def test_fused_norms_compute_what_the_plain_ones_do():
    from experiments.harness.fused_norm import fuse

    torch.manual_seed(0)
    plain = UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=8,
    ).to("cuda", memory_format=torch.channels_last)  # fmt: skip
    fused = copy.deepcopy(plain)
    fuse(fused)
    assert fused.state_dict().keys() == plain.state_dict().keys()
    z, t = torch.randn(2, 3, 8, 8, device="cuda"), torch.tensor([3, 700], device="cuda")
    outs = [net(z.contiguous(memory_format=torch.channels_last), t).sample for net in (plain, fused)]
    torch.testing.assert_close(outs[1], outs[0], atol=1e-4, rtol=1e-4)
    for out in outs:
        out.square().mean().backward()
    for a, b in zip(plain.parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, atol=1e-5, rtol=1e-3)
