"""The trainer at toy size: an autoencoder, a diffusion model in its latent, both resumed and loaded as any other model."""

import json
import logging
import signal
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from experiments.train import train
from keyanon.diffusion.model import LatentDiffusion
from tests.conftest import ROOT

TINY_VAE = ["vae.block_out_channels=[4,4,4,8]", "vae.norm_num_groups=2", "vae.latent_channels=4"]
TINY_UNET = [
    "unet.block_out_channels=[8,8,8]", "unet.layers_per_block=1", "unet.attention_head_dim=4", "unet.norm_num_groups=4",
    "unet.in_channels=4", "unet.out_channels=4", f"begin_with={ROOT / 'keyanon' / 'assets' / 'faces128_kl'}",
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


@pytest.fixture
def trained(faces, tmp_path, monkeypatch, caplog):
    """Trains a configuration of conf/train for a few steps, and gives what it logged."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # a stop is for the tests, not for the training

    def short(config: str, *more: str) -> str:
        overrides = [
            f"data.root={faces}", f"data.heldout={faces / 'heldout.txt'}", "+steps=3", "compile=false", "threads=1", "batch_size=2",
            f"out={tmp_path / 'run' / config}", f"export={tmp_path / 'model'}",
        ]  # fmt: skip
        with initialize_config_dir(str(ROOT / "conf" / "train"), version_base="1.3"):
            cfg = compose(config, overrides=[*overrides, *more])
        caplog.clear()
        with caplog.at_level(logging.INFO):
            train(cfg)
        return caplog.text

    return short


def test_autoencoder_then_diffusion_then_resumed(trained, tmp_path):
    assert "7 training pictures" in trained("faces128_kl_autoencoder", *TINY_VAE)
    vae = json.loads((tmp_path / "model" / "vae" / "config.json").read_text())
    unet = [*TINY_UNET, f"autoencoder={tmp_path / 'model'}"]
    assert "begin with trained weights" in trained("faces128_kl", *unet)
    model = LatentDiffusion(str(tmp_path / "model"))
    z = model.encode(torch.zeros(1, 3, 128, 128))
    assert z.shape == (1, 4, 16, 16)
    assert model.eps(z, 10).isfinite().all()
    assert model.autoencoder.config.scaling_factor == vae["scaling_factor"] != 0.18215

    steps = json.loads((tmp_path / "run" / "faces128_kl" / "state" / "training.json").read_text())["step"]
    assert steps == 3
    assert "resumed at step 3" in trained("faces128_kl", *unet, "steps=4")
