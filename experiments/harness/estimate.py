"""How long a run takes on this machine, measured before it starts; and what a device is given to do at a time."""

import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from experiments.harness.made import made
from keyanon.batching import CHUNK
from keyanon.diffusion.model import LatentDiffusion
from keyanon.errors import BadPicture
from keyanon.faces.recognition import describing
from keyanon.measures.scorers import Against

if TYPE_CHECKING:
    from experiments.harness.session import Cell, Session

log = logging.getLogger(__name__)

HOUR = 3600
FEW = 8  # pictures, which are begun without: to measure would take a good part of their time
MOST = 256  # pictures at a time: on an H100 more gained nothing
PER_GIB = 4  # pictures of 256 pixels, in the autoencoder, which needs the most; what does not fit is halved
QUICK = 1  # second: a network faster than that is timed a second time, without what the first call prepares


@dataclass(frozen=True)
class Estimate:
    """How long `pictures` take, which are still to be made: each so many evaluations of the network."""

    pictures: int
    evaluations: int
    seconds: float
    device: str
    at_least: bool = False
    """The method's solver repeats evaluations until they agree: they are more."""

    def __str__(self) -> str:
        how = "at least" if self.at_least else "about"
        return (
            f"{how} {duration(self.seconds)} for {self.pictures:,} pictures of {self.evaluations:,} network evaluations each "
            f"on {self.device}"
        )

    def too_long(self, device: str, allowed: bool) -> list[str]:
        """A message where a CPU would take more than an hour and nobody has asked for that."""
        if allowed or torch.device(device).type != "cpu" or self.seconds <= HOUR:
            return []
        return [
            f"it takes {self}. To start it all the same: long=true (make: LONG=1). Faster: a GPU, or fewer pictures (limit=...)"
        ]


def threads(device: str, asked: int | Literal["all"] | None) -> int | None:
    """CPU threads of a run; None for PyTorch's own number. Its own choice is 1 on a CPU: results are then the same to the bit."""
    if asked is None:
        return 1 if torch.device(device).type == "cpu" else None
    return None if asked == "all" else asked


def batch_size(device: str, pictures: int) -> int:
    """Pictures at a time of a run whose own choice it is: on a GPU by its memory, and a power of two."""
    if torch.device(device).type != "cuda":
        return CHUNK
    free, _ = torch.cuda.mem_get_info(device)
    fits = min(MOST, max(CHUNK, PER_GIB * (free >> 30)))
    return int(min(1 << (fits.bit_length() - 1), 1 << (max(pictures, 1) - 1).bit_length()))


def measured(session: "Session", cell: "Cell", left: Sequence[str], passes: int) -> Estimate:
    """How long the pictures `left` take, `passes` times through the method: one evaluation of each network is timed, one search for
    faces and one scoring.

    A pass is one inversion and one sampling. The autoencoder, a few hundredths of it, is left out.
    """
    models = [model for model in cell.models if isinstance(model, LatentDiffusion)]
    steps = getattr(cell.solver, "steps", 0)
    evaluations = 2 * steps * passes if models else 0
    at_least = getattr(cell.solver, "tolerance", None) is not None
    where = device_name(session.cfg.device)
    if not left:
        return Estimate(0, evaluations, 0.0, where, at_least)
    size = min(session.cfg.batch_size, len(left))
    seconds = (
        sum(network_seconds(model, session.cfg.dataset.size, session.cfg.batch_size) for model in models) * evaluations
    )
    once, each = looking_seconds(session, left[:size])
    seconds += once + each * (passes + 1)
    return Estimate(len(left), evaluations, seconds * len(left), where, at_least)


def network_seconds(model: LatentDiffusion, size: int, batch: int) -> float:
    """What one evaluation costs for a picture of `size` pixels a side, `batch` at a time."""
    rows, columns = model.latent_size(torch.zeros(1, 3, size, size))
    z = torch.randn(batch, latent_channels(model), rows, columns, generator=torch.Generator().manual_seed(0))
    z, before = z.to(model.device), model.evaluations.copy()
    last = len(model.schedule.abar) - 1
    seconds = timed(lambda: model.eps(z, last), model.device)
    if seconds < QUICK * batch:
        seconds = timed(lambda: model.eps(z, last), model.device)
    model.evaluations.clear()
    model.evaluations.update(before)
    return seconds / batch


def latent_channels(model: LatentDiffusion) -> int:
    """Of the network's answer, which has as many as the latents; an inpainting one is given more."""
    return int(model.unet.config.out_channels)


def looking_seconds(session: "Session", ids: Sequence[str]) -> tuple[float, float]:
    """What it costs a picture to look for faces, and a picture and view to be scored, on the first pictures that can be read."""
    pictures = []
    for id in ids:
        try:
            pictures.append(session.dataset.load(id))
        except BadPicture:
            continue
    if not pictures:
        return 0.0, 0.0
    images = torch.stack(pictures).to(session.cfg.device)
    face = torch.ones_like(images[:, :1], dtype=torch.bool)
    alone = [scorer for scorer in session.scorers.values() if not isinstance(scorer, Against)]
    # of published pictures, which not every experiment makes
    second = made(session.cfg, "second_detector") if "second_detector" in session.cfg else None

    def look(batch: torch.Tensor) -> None:
        session.parser.mask(batch, (batch.shape[-2], batch.shape[-1]))
        session.finder.found(batch)
        if second is not None:
            second.faces(batch)

    def score(batch: torch.Tensor) -> None:
        for recognizer in session.recognizers.values():
            describing(recognizer, session.finder, batch).embed(batch)
        for scorer in alone:
            scorer(batch, batch, face[: len(batch)])

    def seconds(work: Callable[[torch.Tensor], None]) -> float:
        try:
            work(images[:1])  # loads the networks
            return timed(lambda: work(images), session.cfg.device) / len(images)
        except Exception:  # comes again in the work itself, whose shard it then is that failed
            log.debug("not timed", exc_info=True)
            return 0.0

    return seconds(look), seconds(score)


def timed(work: Callable[[], Any], device: str) -> float:
    """Seconds."""
    started = time.perf_counter()
    work()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def device_name(device: str) -> str:
    if torch.device(device).type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({torch.get_num_threads()} of {os.cpu_count()} threads)"


def duration(seconds: float) -> str:
    """In words that a reader plans with: 40 s, 12 min, 3.5 h, 12 days."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / HOUR:.1f} h" if seconds < 72 * HOUR else f"{seconds / HOUR / 24:.0f} days"
