"""The trainer at toy size: an autoencoder, a diffusion model in its latent, both resumed and loaded as any other model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from keyanon.diffusion.model import LatentDiffusion
from tests.conftest import ROOT

TINY_VAE = ["vae.block_out_channels=[4,4,4,8]", "vae.norm_num_groups=2", "vae.latent_channels=4"]
TINY_UNET = [
    "unet.block_out_channels=[8,8,8]", "unet.layers_per_block=1", "unet.attention_head_dim=4", "unet.norm_num_groups=4",
    "unet.in_channels=4", "unet.out_channels=4", "begin_with=EXPORT",
]  # fmt: skip


@pytest.fixture(scope="module")
def faces(tmp_path_factory) -> Path:
    """Eight of the package's synthetic faces; the last one is held out."""
    root = tmp_path_factory.mktemp("faces")
    chosen = sorted((ROOT / "keyanon" / "assets" / "faces").glob("*.webp"))[:8]
    for path in chosen:
        (root / path.name).write_bytes(path.read_bytes())
    (root / "heldout.txt").write_text(chosen[-1].stem + "\n")
    return root


def train(config: str, faces: Path, out: Path, *more: str) -> str:
    overrides = [
        f"data.root={faces}", f"data.heldout={faces / 'heldout.txt'}", "minutes=0.02", "compile=false", "threads=1", "batch_size=2",
        f"out={out / 'run' / config}", f"export={out / 'model'}",
    ]  # fmt: skip
    more = tuple(item.replace("EXPORT", str(ROOT / "keyanon" / "assets" / "faces128_kl")) for item in more)
    program = [sys.executable, "-m", "experiments.train", "--config-name", config, *overrides, *more]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(program, cwd=out, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr + (out / "run" / config / "train.log").read_text()


def test_autoencoder_then_diffusion_then_resumed(faces, tmp_path):
    assert "7 training pictures" in train("faces128_kl_autoencoder", faces, tmp_path, *TINY_VAE)
    vae = json.loads((tmp_path / "model" / "vae" / "config.json").read_text())
    unet = [*TINY_UNET, f"autoencoder={tmp_path / 'model'}"]
    assert "begin with trained weights" in train("faces128_kl", faces, tmp_path, *unet)
    model = LatentDiffusion(str(tmp_path / "model"))
    z = model.encode(torch.zeros(1, 3, 128, 128))
    assert z.shape == (1, 4, 16, 16)
    assert model.eps(z, 10).isfinite().all()
    assert model.autoencoder.config.scaling_factor == vae["scaling_factor"] != 0.18215

    steps = json.loads((tmp_path / "run" / "faces128_kl" / "state" / "training.json").read_text())["step"]
    assert steps > 0
    assert f"resumed at step {steps}" in train("faces128_kl", faces, tmp_path, *unet)
