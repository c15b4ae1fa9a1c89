"""The models that the package ships: complete, of a bounded size, and doing what their cards say."""

import json
from pathlib import Path

import pytest
import torch

from experiments.train import load_agreeing
from keyanon.diffusion.model import LatentDiffusion
from keyanon.faces.datasets import bundled_faces
from keyanon.measures.scorers import psnr
from tests.conftest import ROOT

ASSETS = ROOT / "keyanon" / "assets"
MODELS = sorted(path.parent.name for path in ASSETS.glob("*/model_index.json"))


def size(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20


def test_the_models_are_small():
    assert MODELS == ["faces128", "faces128_kl", "faces128_large", "faces128_vq"]
    assert all(size(ASSETS / name) <= 60 for name in MODELS)
    assert sum(size(ASSETS / name) for name in MODELS) <= 130


@pytest.mark.parametrize("name", MODELS)
def test_a_model_shows_its_faces_and_predicts_noise(name):
    model, dataset = LatentDiffusion(f"bundled:{name}"), bundled_faces()
    images = torch.stack([dataset.load(id) for id in dataset.ids[:4]])
    z0 = model.encode(images)
    assert z0.shape[2:] == model.latent_size(images) == (model.unet.config.sample_size,) * 2
    assert 0.5 < z0.std() < 1.6
    assert (psnr(model.decode(z0).clamp(-1, 1), images, torch.ones(4, 1, 128, 128, dtype=torch.bool)) > 25).all()

    noise = torch.randn(z0.shape, generator=torch.Generator().manual_seed(0))
    abar = model.schedule.abar[500]
    predicted = model.eps(abar**0.5 * z0 + (1 - abar) ** 0.5 * noise, 500)
    assert (predicted - noise).square().mean() < 0.3  # 1 for a network that knows nothing


@pytest.mark.parametrize("name", MODELS)
def test_the_report_is_of_these_weights(name):
    report = json.loads((ASSETS / name / "report.json").read_text())
    assert report["model_sha256"] == LatentDiffusion(f"bundled:{name}").sha256
    assert (ASSETS / name / "README.md").is_file()


def test_trained_weights_are_taken_over_where_shapes_agree():
    trained, net = (
        torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 4)),
        torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Linear(4, 4)),
    )
    first = net[0].weight.clone()
    load_agreeing(net, trained.state_dict())
    assert torch.equal(net[0].weight, first)
    assert torch.equal(net[1].weight, trained[1].weight)
    assert torch.equal(net[0].bias, trained[0].bias)
