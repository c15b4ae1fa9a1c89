"""Latent diffusion models in the layout of diffusers: encode, decode, and eps(z, t).

    z0 = E(x),   x = D(z0),   eps(z_t, t) the noise in z_t

One class reads them all: LDM-FFHQ and LDM-CelebAHQ (VQModel + UNet2DModel), Stable Diffusion with an empty prompt (AutoencoderKL +
UNet2DConditionModel), and this project's own models on the block-DCT latent. A network trained to predict v is turned to eps:
eps = a v + s z_t (arXiv 2202.00512, appendix D).
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from importlib.resources import files
from inspect import signature
from pathlib import Path
from typing import Annotated, Any, Literal

import diffusers
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel, UNet2DModel, VQModel
from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
from jaxtyping import Float, Shaped
from torch import Tensor

from keyanon.batching import CHUNK, in_chunks
from keyanon.diffusion.block_dct import BLOCK, BlockDCT
from keyanon.diffusion.graphs import Recorded
from keyanon.diffusion.solvers import DDIM, NoiseSchedule, Solver
from keyanon.errors import UserError
from keyanon.finite import finite
from keyanon.settings import Count, Device, Name, checked, fits, refuse, whole
from keyanon.types import Image, Latent
from keyanon.weights import MissingWeights, WrongWeights, fetch_blob, offline

log = logging.getLogger(__name__)
Precision = Literal["fp32", "tf32", "bf16"]
WEIGHT_FILES = ("*.safetensors", "*.bin")
# as diffusers and transformers name them
WEIGHT_NAMES = (
    "diffusion_pytorch_model.safetensors", "model.safetensors", "diffusion_pytorch_model.bin", "pytorch_model.bin",
)  # fmt: skip
PARTS = ("unet", "vqvae", "vae", "latent", "scheduler", "text_encoder", "tokenizer")
DDIM_ARGUMENTS = signature(DDIMScheduler).parameters.keys()
# Of what schedulers can be asked for besides their noise: what the solvers do. They do not clip z_0, they choose timesteps
# themselves, and they divide by the signal at the last one.
HONOURED: Mapping[str, tuple[Any, ...]] = {
    "prediction_type": ("epsilon", "v_prediction"),
    "timestep_spacing": ("leading",),
    "clip_sample": (False,),
    "thresholding": (False,),
    "rescale_betas_zero_snr": (False,),
    **dict.fromkeys(
        [f"use_{kind}" for kind in ("karras_sigmas", "exponential_sigmas", "beta_sigmas", "lu_lambdas")], (False,)
    ),
    "use_flow_sigmas": (False,),
    "timestep_scaling": (),  # of consistency models
}


class BadModel(UserError):
    """A model folder that lacks a part or holds one this project cannot use."""


@checked
@dataclass(frozen=True)
class LatentDiffusion:
    """An unconditional latent diffusion model; nothing is read until it is first used.

    Args:
        source: a folder, a hub id, or `bundled:NAME` for a model that this package ships.
        subfolder: where in the repository the model is, "" for its top.
        noise: noise schedule for repositories that ship none (the authors take LDM-CelebAHQ's for LDM-FFHQ); arguments of
            diffusers' DDIMScheduler. What the solvers do not honour, of this or of the model's own, is refused (`HONOURED`).
        precision: of the denoising network's arithmetic. Latents, the solver and the autoencoder stay in fp32.
        licence: of the weights, for the message when they are missing.
        compile: the denoising network by torch.compile, at its first use: minutes, and a C++ compiler on a CPU. Results differ
            from the uncompiled network's by rounding: sender and receiver should do the same. Gains: docs/performance.md.
            "graphs" compiles nothing: on a GPU its kernels are recorded and launched at once (keyanon/diffusion/graphs.py).
        chunk: pictures at a time on a CPU. Another size rounds differently: sender and receiver should do the same.
    """

    source: Name
    subfolder: str = ""
    noise: Mapping[str, Any] | None = None
    precision: Precision = "fp32"
    device: Device = "cpu"
    licence: str = "see the model's page"
    revision: str | None = None
    compile: bool | Literal["graphs"] = False
    chunk: Count = CHUNK
    evaluations: Counter[int] = field(default_factory=Counter, init=False, repr=False, compare=False)
    """How many pictures the network has seen at each timestep."""
    fits: dict[str, int] = field(default_factory=dict, init=False, repr=False, compare=False)
    """How many pictures can be encoded, decoded, ... at once, where it turned out that there are too many for the memory."""

    def __post_init__(self) -> None:
        kind, _, name = self.source.partition(":")
        if kind == "embedded":  # its name in earlier versions; the hub has no such model
            raise BadModel(
                f"backbone.source={self.source}: models that this package ships are now called bundled:{name}"
            )

    def encode(self, images: Image) -> Latent:
        """z0 = E(x): the mean where the encoder gives a distribution, unquantized where it has a codebook.

        Gradients reach pictures that ask for them; the weights ask for none.
        """
        z0 = in_chunks(self._encode, images.to(self.device), chunk=self.chunk, fits=self.fits)
        return finite(z0, "the encoder")

    def _encode(self, images: Image) -> Latent:
        autoencoder = self.autoencoder
        with arithmetic("fp32"):
            encoded = autoencoder.encode(images)
        if isinstance(autoencoder, BlockDCT):
            z0: Latent = encoded
        elif isinstance(autoencoder, VQModel):
            z0 = encoded.latents
        else:
            z0 = encoded.latent_dist.mode() * autoencoder.config.scaling_factor
        return z0

    def decode(self, latents: Latent, quantize: bool = True) -> Image:
        """x = D(z0), unclipped; `quantize` snaps to the codebook first, where there is one, as diffusers does by default."""
        with torch.no_grad(), arithmetic("fp32"):
            images = in_chunks(lambda part: self._decode(part, quantize), latents, chunk=self.chunk, fits=self.fits)
        return finite(images, "the decoder")

    def _decode(self, latents: Latent, quantize: bool) -> Image:
        autoencoder = self.autoencoder
        if isinstance(autoencoder, BlockDCT):
            images: Image = autoencoder.decode(latents)
        elif isinstance(autoencoder, VQModel):
            images = autoencoder.decode(latents, force_not_quantize=not quantize).sample
        else:
            images = autoencoder.decode(latents / autoencoder.config.scaling_factor).sample
        return images

    def latent_size(self, images: Shaped[Tensor, "b _ h w"]) -> tuple[int, int]:
        """(rows, columns) of the latents of `images`."""
        autoencoder, (height, width) = self.autoencoder, images.shape[-2:]
        learned = not isinstance(autoencoder, BlockDCT)
        factor = 2 ** (len(autoencoder.config.block_out_channels) - 1) if learned else BLOCK
        return height // factor, width // factor

    def eps(self, z: Float[Tensor, "b _ u v"], t: int) -> Latent:
        """The network's estimate of the noise in z at the timestep t, in fp32."""
        self.evaluations[t] += len(z)
        out = in_chunks(
            lambda part: self._network(part, t), z, chunk=self.chunk, fits=self.fits, few_sizes=bool(self.compile)
        )
        return self.as_noise(out, z, t)

    def as_noise(self, out: Latent, z: Float[Tensor, "b _ u v"], t: int) -> Latent:
        """The noise in z, of what a network that predicts what this one does says of it; an inpainting one sees more channels.

        Raises NotFinite.
        """
        if self._predicts_v:
            abar = self.schedule.abar[t]
            out = abar**0.5 * out + (1 - abar) ** 0.5 * z
        return finite(out, f"the denoising network at timestep {t}")

    def _network(self, z: Latent, t: int) -> Float[Tensor, "b _ u v"]:
        with torch.no_grad(), arithmetic(self.precision):
            steps = torch.full((z.shape[0],), t, device=z.device)
            prompt = () if self.condition is None else (self.condition.expand(z.shape[0], -1, -1),)
            out: Latent = self.unet(z.to(self._dtype), steps, *prompt).sample.float()
        return out.clone() if self.compile else out  # a CUDA graph overwrites what it gave at the next call

    @cached_property
    def schedule(self) -> NoiseSchedule:
        return NoiseSchedule.of(self._scheduler)

    @cached_property
    def autoencoder(self) -> Any:
        for name, kind in (("latent", BlockDCT), ("vqvae", VQModel), ("vae", AutoencoderKL)):
            if (self.folder / name / "config.json").is_file():
                kind = {"VQModel": VQModel, "AutoencoderKL": AutoencoderKL}.get(self._class_of(name), kind)
                if kind is BlockDCT:
                    with readable(self.folder / name):
                        return BlockDCT.from_config(BlockDCT.load_config(self.folder / name))
                net = loaded(kind, self.folder / name)
                return net.to(self.device, memory_format=torch.channels_last).eval().requires_grad_(False)
        raise BadModel(f"{self.folder}: no autoencoder (expected one of the folders latent, vqvae, vae)")

    @cached_property
    def unet(self) -> Any:
        if not (self.folder / "unet" / "config.json").is_file():
            raise BadModel(f"{self.folder}: no denoising network (expected the folder unet)")
        kind = {"UNet2DModel": UNet2DModel, "UNet2DConditionModel": UNet2DConditionModel}.get(self._class_of("unet"))
        if kind is None:
            raise BadModel(f"{self.folder}/unet: {self._class_of('unet')} is no network this project runs")
        net = loaded(kind, self.folder / "unet", torch_dtype=self._dtype)
        net = net.to(self.device, memory_format=torch.channels_last).eval().requires_grad_(False)
        if self.compile == "graphs":
            return Recorded(net)
        return compiled(net) if self.compile else net

    @cached_property
    def condition(self) -> Tensor | None:
        """The text encoder's answer to the empty prompt (1 tokens d), None for an unconditional network."""
        if self._class_of("unet") != "UNet2DConditionModel":
            return None
        try:
            from transformers import CLIPTextModel, CLIPTokenizer
        except ImportError:
            raise BadModel(
                f"{self.source} needs the package transformers: pip install 'keyanon[stable-diffusion]'"
            ) from None
        encoder = loaded(CLIPTextModel, self.folder / "text_encoder").eval()
        with readable(self.folder / "tokenizer"), torch.no_grad():
            tokenizer = CLIPTokenizer.from_pretrained(self.folder / "tokenizer")
            tokens = tokenizer("", padding="max_length", return_tensors="pt", max_length=tokenizer.model_max_length)
            embedding: Tensor = encoder(tokens.input_ids).last_hidden_state
        return embedding.to(self.device, self._dtype)

    @cached_property
    def sha256(self) -> str:
        """One digest over the names and contents of the configuration and weight files."""
        digest = hashlib.sha256()
        for path in sorted(self.folder.glob("*/*")):
            if path.suffix in {".json", ".safetensors", ".bin"}:
                with path.open("rb") as file:
                    part = hashlib.file_digest(file, "sha256").digest()
                digest.update(f"{path.parent.name}/{path.name}".encode() + part)
        return digest.hexdigest()

    @cached_property
    def folder(self) -> Path:
        """Where the model is on this machine, fetched from the hub if need be; raises MissingWeights."""
        found = self._local()
        if found is not None:
            return found
        if not self.source.startswith("bundled:") and not Path(self.source).is_absolute() and not offline():
            try:
                about = HfApi().model_info(self.source, revision=self.revision)
                needed = needed_of([each.rfilename for each in about.siblings or ()], self.subfolder)
                for name in needed:
                    if name.endswith(WEIGHT_NAMES):
                        fetch_blob(self.source, name, about.sha or "main")
                top = snapshot_download(self.source, revision=self.revision, allow_patterns=needed)
                return Path(top) / self.subfolder
            except WrongWeights:
                raise
            except Exception as error:
                raise MissingWeights(f"{self._message()}\n  download failed: {error}") from error
        raise MissingWeights(self._message())

    def fetch(self) -> None:
        """Have the model on this machine; raises MissingWeights, and WrongWeights of a file that is not the hub's."""
        _ = self.folder

    def missing(self) -> str | None:
        """What a preflight says if the model is not on this machine, or its scheduler not to be honoured; downloads nothing."""
        if self._local() is None:
            return self._message()
        try:
            _ = self.schedule, self.multiple
        except UserError as error:
            return str(error)
        return None

    @property
    def multiple(self) -> int:
        """Sides of pictures, in pixels, are multiples of it: the autoencoder divides them, and an unconditional network again."""
        found = (self.folder / name / "config.json" for name in ("latent", "vqvae", "vae"))
        autoencoder = next((config(path) for path in found if path.is_file()), {})
        network = config(self.folder / "unet" / "config.json")
        halvings = len(widths(autoencoder, self.folder)) - 1
        factor = 2**halvings if halvings >= 0 else BLOCK
        # a conditional network rounds up as it halves, and cuts as it doubles
        conditional = self._class_of("unet") == "UNet2DConditionModel"
        return factor if conditional else factor * 2 ** (len(widths(network, self.folder)) - 1)

    def wrong_size(self, size: int) -> str | None:
        """What a preflight says of pictures of `size` pixels a side that the model cannot take, None if it can."""
        if self._local() is None or size % self.multiple == 0:
            return None
        lower, upper = size // self.multiple * self.multiple, (size // self.multiple + 1) * self.multiple
        can = f"{lower} or {upper}" if lower else str(upper)
        return (
            f"pictures of {size} pixels a side: {self.source} takes multiples of {self.multiple}, such as {can}. "
            "Set dataset.size, or the method's own size"
        )

    def wrong_steps(self, solver: Solver) -> str | None:
        """What a preflight says of a solver whose steps the model's schedule does not have, None where it has them."""
        if self._local() is None or not isinstance(solver, DDIM):
            return None
        try:
            solver.timesteps(self.schedule)
        except UserError as error:
            return str(error)
        return None

    def _local(self) -> Path | None:
        if self.source.startswith("bundled:"):
            folder = assets() / self.source.removeprefix("bundled:")
        elif Path(self.source).is_dir():
            folder = Path(self.source) / self.subfolder
        else:
            name = "/".join(filter(None, (self.subfolder, "unet", "config.json")))
            try:
                found = try_to_load_from_cache(self.source, name, revision=self.revision)
            except ValueError:  # a path that is no folder, and no hub's id either
                return None
            if not isinstance(found, str):
                return None
            folder = Path(found).parents[1]
            # a download that was cut off leaves some files of the snapshot
            if not any(has_weights(folder / part) for part in ("vqvae", "vae")):
                return None
        return folder if has_weights(folder / "unet") else None

    def _message(self) -> str:
        if self.source.startswith("bundled:"):
            names = sorted(folder.parent.name for folder in assets().glob("*/unet"))
            return f"backbone.source={self.source}: this package ships no such model; it has {', '.join(names)}"
        where = f"{self.source} (folder {self.subfolder})" if self.subfolder else self.source
        name = self.source.rstrip("/").split("/")[-1]
        return (
            f"diffusion model {where}: not on this machine. Licence: {self.licence}.\n"
            f"  `python -m keyanon.weights fetch --all EXPERIMENT` fetches what is needed of it, hf download {self.source} all "
            f"of it (or set backbone.source to a folder that holds {name}'s files)"
        )

    def _class_of(self, part: str) -> str:
        path = self.folder / part / "config.json"
        name = config(path).get("_class_name")
        if not isinstance(name, str):
            raise BadModel(f"{path}: it names no class (_class_name); it is no model of diffusers")
        return name

    @property
    def _dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    @cached_property
    def _scheduler(self) -> Any:
        path = self.folder / "scheduler" / "scheduler_config.json"
        if path.is_file():
            return scheduler(config(path), str(path))
        if self.noise is None:
            raise BadModel(
                f"{self.folder}: no folder scheduler, and backbone.noise does not say which noise schedule to use"
            )
        return scheduler(self.noise, "backbone.noise")

    @property
    def _predicts_v(self) -> bool:
        return bool(self._scheduler.config.prediction_type == "v_prediction")


def has_weights(folder: Path) -> bool:
    return any(path.is_file() for pattern in WEIGHT_FILES for path in folder.glob(pattern))


def needed_of(listed: Sequence[str], subfolder: str) -> list[str]:
    """Of a repository's files those that a model in its `subfolder` is read from: one weight file a part, safetensors if there is.

    Copies in half precision, without averaging or for other programs are left out, and so is whatever else is there.
    """
    found: list[str] = []
    for part in PARTS:
        prefix = "/".join(filter(None, (subfolder, part))) + "/"
        names = [name.removeprefix(prefix) for name in listed if name.startswith(prefix)]
        weights = [name for name in WEIGHT_NAMES if name in names]
        others = [name for name in names if name.endswith((".json", ".txt"))]
        found += [prefix + name for name in [*weights[:1], *others]]
    return found


def scheduler(config: Mapping[str, Any], where: str) -> Any:
    """The DDIM scheduler with the noise schedule of a config; BadModel where it asks for what the solvers do not do.

    What the config leaves out is as the scheduler that it names has it.
    """
    name = config.get("_class_name", "DDIMScheduler")
    named = getattr(diffusers, name, None) if isinstance(name, str) else None
    defaults = (
        {}
        if not isinstance(named, type)
        else {key: value.default for key, value in signature(named).parameters.items()}
    )
    if not {"beta_schedule", "prediction_type"} <= defaults.keys():
        raise BadModel(f"{where}: {name} has no noise schedule that this project runs; it runs that of DDIMScheduler")
    asked = {key: config.get(key, default) for key, default in defaults.items()}
    for key, can in HONOURED.items():
        if key in asked and asked[key] not in can:
            raise BadModel(
                f"{where}: {key}={asked[key]}{'' if key in config else f' (by default of {name})'} is not honoured by the solvers "
                f"here, which have {key}={' or '.join(map(str, can))}. Another value in a copy of the model makes it another one"
            )
    refuse(f"{where}: num_train_timesteps", asked["num_train_timesteps"], Annotated[int, whole(1, 100_000)])
    try:
        return DDIMScheduler(**{key: value for key, value in asked.items() if key in DDIM_ARGUMENTS})
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise BadModel(f"{where}: no noise schedule can be made of it ({error})") from error


def config(path: Path) -> dict[str, Any]:
    """What a model's JSON says; raises BadModel."""
    with readable(path):
        read = json.loads(path.read_text("utf-8"))
    if not isinstance(read, dict):
        raise BadModel(f"{path}: expected names and values, found {type(read).__name__}")
    return read


def widths(config: Mapping[str, Any], folder: Path) -> list[int]:
    """The channels of a network's blocks, none of one without; raises BadModel."""
    found = config.get("block_out_channels", [])
    if not fits(list[Annotated[int, whole(1, 10**5)]], found) or len(found) > 16:
        raise BadModel(f"{folder}: block_out_channels={found!r:.99}: expected at most 16 whole numbers from 1 on")
    return list(found)


def loaded(kind: Any, folder: Path, **settings: Any) -> Any:
    """A network of diffusers or transformers with all its weights; raises BadModel where the folder's files do not give that."""
    with readable(folder):
        net, about = kind.from_pretrained(folder, output_loading_info=True, local_files_only=True, **settings)
    # which they would draw at random, with no more than a warning
    if missing := sorted(about["missing_keys"]):
        raise BadModel(f"{folder}: {len(missing)} of the network's weights are not in its file, such as {missing[0]}")
    return net


@contextmanager
def readable(place: Path) -> Iterator[None]:
    """Loaders of other packages raise all kinds of exceptions where a model's files are damaged, or none of theirs: BadModel."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise BadModel(f"{place}: cannot be read as part of a model ({' '.join(str(error).split())[:300]})") from error


def assets() -> Path:
    """The folder of what this package ships."""
    return Path(str(files("keyanon"))) / "assets"


@contextmanager
def arithmetic(precision: Precision) -> Iterator[None]:
    """Products of fp32 numbers in TF32 for "tf32" and in fp32 otherwise, where PyTorch's own default is TF32 for convolutions."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def compiled(net: torch.nn.Module) -> Any:
    """`net` through torch.compile, for few sizes of the batch and never in part: on a CPU with the convolutions' weights laid out
    once and for all, elsewhere as CUDA graphs, which launch all kernels at once.
    """
    on_cpu = next(net.parameters()).device.type == "cpu"
    how: dict[str, Any] = {"options": {"freezing": True}} if on_cpu else {"mode": "reduce-overhead"}
    return torch.compile(net, dynamic=False, fullgraph=True, **how)
