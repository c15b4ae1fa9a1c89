"""Shared pieces: a tiny latent diffusion model in the real layout, saved once per session, and the place of the real faces."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from torch.nn.functional import adaptive_avg_pool2d, normalize

import keyanon  # noqa: F401  installs the torchvision shim before anything imports diffusers or torchmetrics
from keyanon.keys import MasterKey
from keyanon.types import Embeddings, Image, Mask

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real faces, which is not part of the repository."""
    folder = Path(os.environ.get("KEYANON_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real faces at {folder}; set KEYANON_DATA")
    return folder


@pytest.fixture
def key() -> MasterKey:
    return MasterKey(bytes(range(32)))


def save_tiny_ldm(folder: Path) -> Path:
    """A VQModel (f = 4) and a UNet2DModel with random weights in exactly the layout of LDM-FFHQ's repository: no scheduler."""
    from diffusers import UNet2DModel, VQModel

    torch.manual_seed(0)
    VQModel(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16),
        latent_channels=3,
        num_vq_embeddings=64,
        norm_num_groups=4,
    ).save_pretrained(folder / "vqvae")
    UNet2DModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=4,
    ).save_pretrained(folder / "unet")
    return folder


LDM_NOISE = {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195, "clip_sample": False}


@pytest.fixture(scope="session")
def tiny_ldm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_ldm(tmp_path_factory.mktemp("ldm"))


@dataclass(frozen=True)
class CentreFace:
    """Finds "the face" in the middle of every picture that is not black: a parser for tests."""

    def mask(self, images: Image, size: tuple[int, int]) -> Mask:
        mask = torch.zeros(len(images), 1, *size, dtype=torch.bool)
        mask[..., size[0] // 4 : -(size[0] // 4), size[1] // 4 : -(size[1] // 4)] = True
        return mask & (images.amax((1, 2, 3)) > -1).view(-1, 1, 1, 1)


@dataclass(frozen=True)
class PixelRecognizer:
    """Unit rows of a small grey version of the picture; NaN for a black one: a recognizer for tests."""

    def embed(self, images: Image) -> Embeddings:
        rows = adaptive_avg_pool2d(images.mean(1, keepdim=True), 8).flatten(1)
        unit = normalize(rows - rows.mean(1, keepdim=True))
        return torch.where((images.amax((1, 2, 3)) > -1)[:, None], unit, torch.nan)


def smooth_picture(seed: int, size: int = 64) -> PIL.Image.Image:
    """A random smooth colour picture."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return PIL.Image.fromarray(coarse).resize((size, size), PIL.Image.Resampling.BICUBIC)
