"""Shared pieces: tiny diffusion models in the real layouts, saved once per session, and the place of the real faces."""

import gc
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import PIL.Image
import pytest
import torch
from numpy.typing import ArrayLike
from threadpoolctl import threadpool_limits
from torch.nn.functional import adaptive_avg_pool2d, normalize

if os.environ.get("KEYANON_SHAPES"):  # `make shapes`: the shapes and types that annotations state are checked in tests
    from jaxtyping import install_import_hook

    import tests.shapes  # noqa: F401  imported by its package's name alone otherwise

    install_import_hook("keyanon", "tests.shapes.checked")

import keyanon  # noqa: F401  installs the torchvision shim before anything imports diffusers or torchmetrics
from experiments.run import main
from keyanon.channel.keys import MasterKey
from keyanon.types import Embeddings, Features, Image, Mask, Measure

if TYPE_CHECKING:
    from keyanon.diffusion.model import LatentDiffusion

ROOT = Path(__file__).resolve().parents[1]
# Models are too small for more threads than one, and the tests' workers share the cores.
torch.set_num_threads(1)
gc.freeze()  # what is imported stays: to look through it again and again takes a twentieth of the tests' time
gc.set_threshold(100_000, 50, 50)
threadpool_limits(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start


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


@pytest.fixture
def model(tiny_ldm: Path) -> "LatentDiffusion":
    from keyanon.diffusion.model import LatentDiffusion  # here: xdist's controller needs no diffusers

    return LatentDiffusion(str(tiny_ldm), noise=LDM_NOISE, chunk=2)


@pytest.fixture(scope="session")
def tiny_block_dct(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The latent and the schedule of the bundled faces128 with a small random network for its own of 12 million weights.

    It predicts v near 0, as the best denoiser of standard normal latents does: what it draws has about the latents' spread.
    """
    from diffusers import UNet2DModel

    folder, bundled = tmp_path_factory.mktemp("block_dct"), ROOT / "keyanon" / "assets" / "faces128"
    for part in ("latent", "scheduler"):
        shutil.copytree(bundled / part, folder / part)
    torch.manual_seed(0)
    net = UNet2DModel(
        sample_size=16, in_channels=21, out_channels=21, block_out_channels=(16,), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), add_attention=False,
    )  # fmt: skip
    with torch.no_grad():
        net.conv_out.weight.mul_(0.1)
    net.save_pretrained(folder / "unet")
    return folder


def save_tiny_stable_diffusion(folder: Path) -> Path:
    """An AutoencoderKL (f = 2), a conditional network, a tokenizer of three words and its encoder, in Stable Diffusion's layout."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4, sample_size=64,
    ).save_pretrained(folder / "vae")  # fmt: skip
    UNet2DConditionModel(
        sample_size=32, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=16, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=4,
    ).save_pretrained(folder / "unet")  # fmt: skip
    DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1, clip_sample=False
    ).save_pretrained(folder / "scheduler")
    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2}
    tokens = folder / "tokenizer"
    tokens.mkdir()
    (tokens / "vocab.json").write_text(json.dumps(vocabulary))
    (tokens / "merges.txt").write_text("#version: 0.2\n")
    transformers.CLIPTokenizer(
        str(tokens / "vocab.json"), str(tokens / "merges.txt"), model_max_length=7
    ).save_pretrained(tokens)
    config = transformers.CLIPTextConfig(
        vocab_size=3, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=7, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    transformers.CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    return folder


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_stable_diffusion(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="session")
def tiny_sd_inpainting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stable Diffusion's layout with a network that also takes a mask and a masked picture."""
    from diffusers import UNet2DConditionModel

    folder = save_tiny_stable_diffusion(tmp_path_factory.mktemp("inpainting"))
    torch.manual_seed(1)
    UNet2DConditionModel.from_config(
        UNet2DConditionModel.load_config(folder / "unet"), in_channels=9, out_channels=4
    ).save_pretrained(folder / "unet")
    return folder


@pytest.fixture
def nothing_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine without network on which no weights lie."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("KEYANON_CACHE", str(tmp_path))


@pytest.fixture
def command_in_process(tmp_path, monkeypatch, capsys) -> Iterator[Callable[..., SimpleNamespace]]:
    """`python -m experiments.run` in the folder of the test, without the seconds of a new process."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    monkeypatch.chdir(tmp_path)
    for name in ("HF_HUB_OFFLINE", "KEYANON_OFFLINE"):
        monkeypatch.setenv(name, "1")
    # Coverage traces, and Hydra takes that for a debugger, which is shown errors in full.
    monkeypatch.setattr("hydra._internal.utils.is_under_debugger", lambda: False)

    def start(*arguments: str) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["run.py", "--config-path", str(ROOT / "conf"), *arguments])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code
        printed = capsys.readouterr()
        return SimpleNamespace(returncode=code, stdout=printed.out, stderr=printed.err)

    yield start
    root.handlers[:] = handlers  # Hydra's own would go on writing to a stream that is closed
    root.setLevel(level)


@dataclass(frozen=True)
class CentreFace:
    """Finds "the face" in the middle of every picture that is not black: a parser for tests."""

    def mask(self, images: Image, size: tuple[int, int]) -> Mask:
        mask = torch.zeros(len(images), 1, *size, dtype=torch.bool)
        mask[..., size[0] // 4 : -(size[0] // 4), size[1] // 4 : -(size[1] // 4)] = True
        return mask & (images.amax((1, 2, 3)) > -1).view(-1, 1, 1, 1)


@dataclass(frozen=True)
class PixelRecognizer:
    """Unit or raw rows of a small grey version of the picture; NaN for a black one: a recognizer for tests."""

    lengths: str = "unit"

    def embed(self, images: Image) -> Embeddings:
        grey = adaptive_avg_pool2d(images.mean(1, keepdim=True), 8).flatten(1)
        raw = grey - grey.mean(1, keepdim=True)
        rows = raw if self.lengths == "raw" else normalize(raw)
        return torch.where((images.amax((1, 2, 3)) > -1)[:, None], rows, torch.nan)


@dataclass(frozen=True)
class Brightness:
    """A measure of two sets of pictures for tests: how far apart their mean levels are."""

    meaning: ClassVar = Measure("picture", "", "lower", "mean levels apart")

    def embed(self, images: Image) -> Features:
        return images.mean((1, 2, 3))[:, None]

    def compare(self, view: ArrayLike, original: ArrayLike) -> tuple[float, int]:
        return abs(float(np.mean(view) - np.mean(original))), len(np.asarray(view))


def smooth_picture(seed: int, size: int = 64) -> PIL.Image.Image:
    """A random smooth colour picture."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return PIL.Image.fromarray(coarse).resize((size, size), PIL.Image.Resampling.BICUBIC)


@pytest.fixture
def same_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise that does not depend on the method's settings, so that these can be compared."""
    for name in ("described", "everything"):
        monkeypatch.setattr(f"keyanon.channel.nonces.{name}", lambda method: b"")
