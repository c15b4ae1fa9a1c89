"""A training run: its pictures, its loop, and its state, from which it goes on where it was stopped."""

import json
import logging
import math
import signal
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from diffusers.training_utils import EMAModel
from huggingface_hub import load_state_dict_from_file, save_torch_state_dict
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from keyanon.channel.pixels import to_bytes, to_floats
from keyanon.errors import BadData
from keyanon.faces.datasets import Folder, read_list
from keyanon.settings import Count, Device, Factor, Name, Pixels, Positive, Share, Size, number, refuse, whole
from keyanon.types import Bytes, Image

log = logging.getLogger(__name__)

LOG_STEPS = 100
ABSENT = object()
Number = Annotated[float, number(0, 1e9)]
# Of the commands that train; what their parts take, these check themselves.
SETTINGS: Mapping[str, Any] = {
    "out": Name, "export": Name, "device": Device, "threads": Annotated[int, whole(1, 1024)], "compile": bool, "rounded": bool,
    "seed": Annotated[int, whole(0, 10**9)], "minutes": Number, "steps": Count, "batch_size": Annotated[int, whole(2, 10**6)],
    "learning_rate": Annotated[float, number(1e-12, 10)], "warmup_steps": Count, "ema_decay": Share, "save_every_minutes": Number,
    "kl_weight": Number, "roundtrip_weight": Number, "roundtrip_noise": Number, "weight": Mapping[str, Factor],
    "begin_with": Name | None, "autoencoder": Name, "data.root": Name, "data.size": Size, "data.heldout": Name,
    "data.scale": tuple[Positive, Positive], "data.shift": Share, "data.crop": Pixels,
}  # fmt: skip


def check(cfg: DictConfig) -> None:
    """Raises BadSetting for the first setting that cannot be used."""
    for name, hint in SETTINGS.items():
        value = OmegaConf.select(cfg, name, default=ABSENT, throw_on_missing=True)
        if value is not ABSENT:
            refuse(name, OmegaConf.to_container(value) if OmegaConf.is_config(value) else value, hint)


def load_pictures(root: str, size: int, heldout: str) -> tuple[Bytes, Bytes]:
    """All pictures below `root` (a folder, of tar files or not): those to train on, and those of the list `heldout`."""
    dataset, excluded = Folder(root, size), set(read_list(heldout))
    train = [id for id in dataset.ids if id not in excluded]
    with ThreadPoolExecutor() as pool:
        read = [list(pool.map(lambda id: to_bytes(dataset.load(id)), ids)) for ids in (train, sorted(excluded))]
    if not all(read):
        raise BadData(f"{root}: {len(read[0])} pictures to train on and {len(read[1])} held out; it takes some of both")
    return torch.stack(read[0]), torch.stack(read[1])


def augment(images: Image, scale: tuple[float, float], shift: float, generator: torch.Generator) -> Image:
    """Mirror half of the pictures; zoom and shift all a little, mirroring what lies beyond the border."""
    b = images.shape[0]
    zoom = torch.empty(b).uniform_(*scale, generator=generator)
    flip = torch.randint(0, 2, (b,), generator=generator) * 2.0 - 1
    move = torch.empty(b, 2).uniform_(-2 * shift, 2 * shift, generator=generator)
    return moved(images, *(drawn.to(images.device) for drawn in (zoom, flip, move)))


def moved(images: Image, zoom: Tensor, flip: Tensor, move: Tensor) -> Image:
    """Each picture enlarged by `zoom` (b), mirrored where `flip` (b) is -1 and moved by `move` (b 2), in half widths.

    Mirroring pixels, before the transform, gives the odd horizontal DCT columns their sign by itself. Bicubic: bilinear takes 5 to
    10 % off the middle frequencies of the block DCT, and a model learns that.
    """
    theta = torch.zeros(len(images), 2, 3, device=images.device)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = flip / zoom, 1 / zoom, move
    grid = affine_grid(theta, list(images.shape), align_corners=False)
    return grid_sample(images, grid, mode="bicubic", padding_mode="reflection", align_corners=False)


def halved(net: Any) -> Any:
    """A copy on the CPU in half precision; its config does not say where on this machine the network was read."""
    config = {name: value for name, value in net.config.items() if name != "_name_or_path"}
    half = type(net).from_config(config)
    half.load_state_dict(net.state_dict())
    return half.to(torch.float16)


@dataclass
class Training:
    """What is saved and resumed."""

    net: torch.nn.Module
    ema: EMAModel
    optimizer: torch.optim.Optimizer
    step: int = 0

    def save(self, folder: Path) -> None:
        """Write the whole state as safetensors of at most 15 MB each, replacing the previous state once complete."""
        parameters = list(self.net.named_parameters())
        state: dict[str, Tensor] = {}
        for (name, parameter), shadow in zip(parameters, self.ema.shadow_params, strict=True):
            state[f"net.{name}"], state[f"ema.{name}"] = parameter.detach(), shadow
            for moment, value in self.optimizer.state[parameter].items():
                state[f"{moment}.{name}"] = value
        partial = folder.with_name(folder.name + ".partial")
        partial.mkdir(parents=True, exist_ok=True)
        for old in partial.iterdir():
            old.unlink()
        state = {name: value.cpu().contiguous().clone() for name, value in state.items()}
        save_torch_state_dict(state, partial, max_shard_size="15MB")
        (partial / "training.json").write_text(json.dumps({"step": self.step, "ema_step": self.ema.optimization_step}))
        if folder.exists():
            for old in folder.iterdir():
                old.unlink()
            folder.rmdir()
        partial.rename(folder)

    def resume(self, folder: Path) -> None:
        try:
            self._resume(folder)
        except Exception as error:  # loaders raise exceptions of all kinds where a file is damaged or another network's
            raise BadData(f"{folder}: no state of this training ({error}); remove it to begin anew") from error

    def _resume(self, folder: Path) -> None:
        state: dict[str, Tensor] = {}
        for shard in sorted(folder.glob("*.safetensors")):
            state |= load_state_dict_from_file(shard)
        counters = json.loads((folder / "training.json").read_text())
        self.step, self.ema.optimization_step = counters["step"], counters["ema_step"]
        for (name, parameter), shadow in zip(self.net.named_parameters(), self.ema.shadow_params, strict=True):
            parameter.data.copy_(state[f"net.{name}"])
            shadow.copy_(state[f"ema.{name}"])
            self.optimizer.state[parameter] = {
                moment: state[f"{moment}.{name}"].to(parameter.device if moment != "step" else "cpu")
                for moment in ("step", "exp_avg", "exp_avg_sq")
            }


@dataclass(frozen=True)
class Task:
    """What to train: the network, its loss on a batch of pictures at one step, and what is written when it is saved."""

    net: Any
    loss: Callable[[Image, torch.Generator], Tensor]
    export: Callable[[], None]


def fit(cfg: DictConfig, task: Task, optimizer: torch.optim.Optimizer, pictures: Bytes) -> None:
    """Train until `minutes`, or `steps` where there are any, are over or somebody stops it; goes on from the state in `out`."""
    device, out, parameters = torch.device(cfg.device), Path(cfg.out), task.net.parameters
    ema = EMAModel(parameters(), decay=cfg.ema_decay, use_ema_warmup=True, power=0.75)
    training = Training(task.net, ema, optimizer)
    if (out / "state").exists():
        training.resume(out / "state")
        log.info("resumed at step %d", training.step)

    stop = False

    def request_stop(*_: Any) -> None:
        nonlocal stop
        stop = True

    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, request_stop)

    def save() -> None:
        training.save(out / "state")
        ema.store(parameters())
        ema.copy_to(parameters())
        task.export()
        ema.restore(parameters())
        log.info("saved at step %d", training.step)

    begin = saved = window = time.monotonic()
    losses: list[float] = []
    while not stop and time.monotonic() - begin < cfg.minutes * 60 and training.step < cfg.get("steps", math.inf):
        # The generator hangs on the step, so that a resumed run draws what an uninterrupted one would.
        generator = torch.Generator().manual_seed(cfg.seed * 1_000_003 + training.step)
        indices = torch.randint(0, len(pictures), (cfg.batch_size,), generator=generator)
        images = augment(to_floats(pictures[indices].to(device)), tuple(cfg.data.scale), cfg.data.shift, generator)
        for group in optimizer.param_groups:
            group["lr"] = cfg.learning_rate * min(1.0, (training.step + 1) / cfg.warmup_steps)
        loss = task.loss(images, generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters(), 1.0)
        optimizer.step()
        ema.step(parameters())
        training.step += 1
        losses.append(loss.item())
        if training.step % LOG_STEPS == 0:
            now = time.monotonic()
            rate = LOG_STEPS * cfg.batch_size / (now - window)
            log.info("step %d  loss %.4f  %.1f pictures/s", training.step, np.mean(losses[-LOG_STEPS:]), rate)
            losses, window = losses[-LOG_STEPS:], now
        if time.monotonic() - saved > cfg.save_every_minutes * 60:
            save()
            saved = time.monotonic()
    save()
