"""The probability-flow ODE in both directions: deterministic DDIM (arXiv 2010.02502, eq. 12 with sigma = 0).

On the levels 0 = clean < 1 < ... < N, with a_i = sqrt(abar_i) and s_i = sqrt(1 - abar_i), one step down is

    z_{i-1} = S_i(z_i) = a_{i-1} (z_i - s_i e) / a_i + s_{i-1} e,      e = eps(z_i, t_i)                          (eq. 4)

and the paper's inversion goes up with the noise predicted at the level it leaves (arXiv 2510.01031, eq. 5):

    z_i = U_i(z_{i-1}; e) = a_i (z_{i-1} - s_{i-1} e) / a_{i-1} + s_i e,      e = eps(z_{i-1}, t_i)               (eq. 5)

Going up and down again gives z back only as the steps become small. The exact inverse of S_i is the fixed point

    z_i = U_i(z_{i-1}; eps(z_i, t_i)),

of which eq. 5 is an iterate. We begin with the noise of the step before, which costs no evaluation, and solve it by Anderson
acceleration (Walker and Ni, SIAM J. Numer. Anal. 49(4), 2011; for diffusion: AIDI, arXiv 2309.04907), each picture on its own,
to a tolerance.

A region of the latent that is known at every level (the background) can be written back after each step down (eq. 7). Where both
directions know the same trajectory there, the exact inverse undoes the sampler on the rest.

A trajectory of N + 1 latents is kept off the device, so that memory does not grow with N.
"""

import logging
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from keyanon.errors import BadSetting
from keyanon.finite import within
from keyanon.settings import Count, Setting, checked, whole
from keyanon.types import Denoiser, Latent, Mask

log = logging.getLogger(__name__)
Iterate = Float[Tensor, "b ..."]
Rows = Int64[Tensor, " n"] | slice  # of a batch
ALL = slice(None)
KARRAS_RHO = 7.0  # arXiv 2206.00364, table 1


@checked
@dataclass(frozen=True)
class NoiseSchedule:
    """abar_t for t = 0 .. T-1 (signal variance left at t), abar of the clean level, and the first timestep of a grid."""

    abar: tuple[float, ...]
    abar_clean: float = 1.0
    offset: int = 0

    @classmethod
    def of(cls, scheduler: Any) -> "NoiseSchedule":
        """From a diffusers scheduler; `set_alpha_to_one` and `steps_offset` are the choices that matter here.

        BadSetting where no signal is left at some timestep: each step divides by it.
        """
        abar = tuple(scheduler.alphas_cumprod.double().view(-1).tolist())
        if not abar or not all(0 < value <= 1 for value in abar):
            raise BadSetting(
                f"noise schedule: the signal variance has to be in (0, 1]; it is {min(abar, default=0)} to {max(abar, default=0)}"
            )
        clean = 1.0 if scheduler.config.set_alpha_to_one else abar[0]
        return cls(abar, clean, scheduler.config.steps_offset)


@runtime_checkable
class Trajectory(Protocol):
    """z_0 .. z_N by their level: a list, or what makes or fetches them when they are asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, level: int, /) -> Latent: ...


class StoredTrajectory:
    """z_0 .. z_N, put away as they come: on a CPU into a nameless temporary file, elsewhere into the host's pinned memory.

    The host never waits for a copy.
    """

    def __init__(self, z0: Latent) -> None:
        self._like = z0
        self._host: list[Tensor] = []
        self._length = 0
        self._file = tempfile.TemporaryFile() if z0.device.type == "cpu" else None  # noqa: SIM115  closed with the trajectory
        self.append(z0)

    def append(self, z: Latent) -> None:
        if self._file is None:
            kept = torch.empty(z.shape, dtype=z.dtype, pin_memory=True)
            self._host.append(kept.copy_(z, non_blocking=True))
        else:
            self._file.seek(0, os.SEEK_END)
            self._file.write(as_bytes(z.contiguous()))
        self._length += 1

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, level: int) -> Latent:
        i = range(self._length)[level]
        if self._file is None:
            return self._host[i].to(self._like.device, non_blocking=True)
        z = torch.empty(self._like.shape, dtype=self._like.dtype)
        self._file.seek(i * z.nbytes)
        self._file.readinto(as_bytes(z))
        return z


def as_bytes(z: Tensor) -> memoryview:
    """A contiguous tensor's own memory."""
    return z.detach().view(torch.uint8).numpy().data


@dataclass(frozen=True)
class Known:
    """What is known of a latent on its way: outside `mask`, z_i = trajectory[i] for the levels i = 0 .. N."""

    mask: Mask
    trajectory: Trajectory

    def write_back(self, z: Latent, level: int, rows: Rows = ALL) -> Latent:
        """M * z + (1 - M) * trajectory[level]   (eq. 7), where z holds those rows of the batch."""
        return torch.where(self.mask[rows], z, self.trajectory[level][rows])


@runtime_checkable
class Solver(Protocol):
    """Both directions of one discretization of the flow."""

    def levels(self, schedule: NoiseSchedule) -> list[tuple[float, float]]:
        """(a_i, s_i) for i = 0 .. N."""
        ...

    def invert(self, eps: Denoiser, schedule: NoiseSchedule, z0: Latent, known: Known | None = None) -> Trajectory: ...

    def sample(self, eps: Denoiser, schedule: NoiseSchedule, zT: Latent, known: Known | None = None) -> Latent: ...


@checked
@dataclass(frozen=True)
class DDIM:
    """N steps of DDIM, inverted as the paper does or exactly.

    Args:
        steps: N.
        spacing: "leading" is diffusers' (0, T/N, 2T/N, ... plus the schedule's offset); "karras" spaces sigma = s / a
            evenly in sigma^(1/7) from the noisiest timestep to the cleanest (arXiv 2206.00364, eq. 5), rounded to timesteps.
        tolerance: None inverts by eq. 5, one evaluation a step; a number solves for the fixed point until its residual,
            relative to the picture's latent, is below it.
        max_evaluations: of eps for each exactly inverted step.
        memory: differences of earlier iterates that Anderson's method combines.
    """

    steps: Count = 50
    spacing: Literal["leading", "karras"] = "leading"
    tolerance: Annotated[float, Setting("a number between 0 and 1", lambda value: 0 < value < 1)] | None = None
    max_evaluations: Count = 60
    memory: Annotated[int, whole(1, 1000)] = 8

    def timesteps(self, schedule: NoiseSchedule) -> list[int]:
        """t_1 .. t_N, ascending; raises BadSetting where the schedule has no such."""
        total = len(schedule.abar)
        if not 1 <= self.steps <= total:
            raise BadSetting(f"solver.steps={self.steps}: the schedule has {total} timesteps")
        if self.spacing == "leading":
            stride = total // self.steps
            if total % self.steps:
                can = [n for n in range(1, total + 1) if total % n == 0]
                fewer, more = max(n for n in can if n < self.steps), min(n for n in can if n > self.steps)
                raise BadSetting(
                    f"solver.steps={self.steps} does not divide the schedule's {total} timesteps, and leading spacing would stop "
                    f"before the noise; take {fewer} or {more}, or solver.spacing=karras"
                )
            if not 0 <= schedule.offset < stride:
                raise BadSetting(
                    f"solver.steps={self.steps}: steps {stride} timesteps apart and steps_offset={schedule.offset} of the model's "
                    f"scheduler reach beyond the schedule's {total} timesteps; take fewer steps"
                )
            return [i * stride + schedule.offset for i in range(self.steps)]
        sigma = torch.tensor([(1 / abar - 1) ** 0.5 for abar in schedule.abar], dtype=torch.float64)
        low, high = sigma[0] ** (1 / KARRAS_RHO), sigma[-1] ** (1 / KARRAS_RHO)
        wanted = torch.linspace(low.item(), high.item(), self.steps, dtype=torch.float64) ** KARRAS_RHO
        nearest = (sigma.log()[None] - wanted.log()[:, None]).abs().argmin(1).tolist()
        if len(set(nearest)) < self.steps:
            raise BadSetting(f"solver.steps={self.steps}: Karras spacing needs fewer steps on {total} timesteps")
        return nearest

    def levels(self, schedule: NoiseSchedule) -> list[tuple[float, float]]:
        """(a_i, s_i) for i = 0 .. N."""
        abar = [schedule.abar_clean, *(schedule.abar[t] for t in self.timesteps(schedule))]
        return [(value**0.5, (1 - value) ** 0.5) for value in abar]

    def invert(self, eps: Denoiser, schedule: NoiseSchedule, z0: Latent, known: Known | None = None) -> Trajectory:
        """The whole trajectory z_0 .. z_N upwards, with the known region written in at every level."""
        levels = self.levels(schedule)
        z = z0 if known is None else known.write_back(z0, 0)
        trajectory = StoredTrajectory(z)
        noise = None
        for i, t in enumerate(self.timesteps(schedule), start=1):
            below = z

            def along(e: Latent, rows: Rows, i: int = i, below: Latent = below) -> Latent:
                out = move(below[rows], e, levels[i - 1], levels[i])
                return out if known is None else known.write_back(out, i, rows)

            def up(
                z: Latent, rows: Rows = ALL, t: int = t, i: int = i, along: Callable[[Latent, Rows], Latent] = along
            ) -> Latent:
                with within(f"inversion, step {i} of {self.steps}", rows=rows):
                    return along(eps(z, t), rows)

            if self.tolerance is None:
                z = up(below)
            else:
                z = self.solve(up, up(below) if noise is None else along(noise, ALL), i)
                noise = noise_of_move(below, z, levels[i - 1], levels[i])
            trajectory.append(z)
        return trajectory

    def sample(self, eps: Denoiser, schedule: NoiseSchedule, zT: Latent, known: Known | None = None) -> Latent:
        """z_0 of eq. 4 from z_N = zT, N evaluations of eps, with the known region written back at every level."""
        levels, timesteps = self.levels(schedule), self.timesteps(schedule)
        z = zT if known is None else known.write_back(zT, self.steps)
        for i in range(self.steps, 0, -1):
            with within(f"sampling, step {self.steps - i + 1} of {self.steps}"):
                z = move(z, eps(z, timesteps[i - 1]), levels[i], levels[i - 1])
            if known is not None:
                z = known.write_back(z, i - 1)
        return z

    def solve(self, up: Callable[[Latent, Rows], Latent], start: Latent, level: int) -> Latent:
        """The fixed point of `up` near `start`, each picture until its own residual is small."""
        assert self.tolerance is not None
        z, residual = anderson(up, start, self.tolerance, self.max_evaluations, self.memory)
        failed = int((residual > self.tolerance).sum())
        if failed:
            log.warning(
                "inversion of level %d did not converge for %d of %d pictures (relative residual up to %.1e, asked for %.1e)",
                level, failed, len(residual), residual.max().item(), self.tolerance,
            )  # fmt: skip
        return z


def move(z: Latent, e: Latent, here: tuple[float, float], there: tuple[float, float]) -> Latent:
    """From level (a, s) to level (a', s') along the noise e: a' (z - s e) / a + s' e."""
    (a, s), (a_there, s_there) = here, there
    return (a_there / a) * z + (s_there - a_there * s / a) * e


def noise_of_move(z: Latent, z_there: Latent, here: tuple[float, float], there: tuple[float, float]) -> Latent:
    """The e of `move`, from where it began and where it led."""
    (a, s), (a_there, s_there) = here, there
    return (z_there - (a_there / a) * z) / (s_there - a_there * s / a)


def anderson(
    g: Callable[[Iterate, Rows], Iterate], start: Iterate, tolerance: float, max_evaluations: int, memory: int
) -> tuple[Iterate, Float[Tensor, " b"]]:
    """Solve z = g(z) for each picture of a batch by Anderson acceleration: the iterate and its relative residuals (b,).

    With f_k = g(z_k) - z_k, the next iterate is g(z_k) - (dG) c, c the least-squares solution of (dF) c = f_k over the last
    `memory` differences. A picture that has converged leaves the batch: g gets the latents of the others and their rows. The
    iterate of the smallest residual is returned.
    """
    best = start.clone()
    smallest = start.new_full((len(start),), torch.inf)
    rows, z = torch.arange(len(start), device=start.device), start
    images: list[Tensor] = []  # g(z_k), flat
    residuals: list[Tensor] = []  # f_k, flat
    for _ in range(max_evaluations):
        image = g(z, rows)
        f = (image - z).flatten(1)
        size = f.norm(dim=1) / image.flatten(1).norm(dim=1)
        better = size < smallest[rows]
        best[rows] = torch.where(expand(better, image), image, best[rows])
        smallest[rows] = torch.where(better, size, smallest[rows])
        images, residuals = [*images[-memory:], image.flatten(1)], [*residuals[-memory:], f]
        rough = smallest[rows] > tolerance
        left = int(rough.sum())  # the one time in a round that the host waits for the device
        if left < len(rows):
            if left == 0:
                break
            rough = rough.nonzero_static(size=left)[:, 0]
            rows, f = rows[rough], f[rough]
            images, residuals = ([kept[rough] for kept in history] for history in (images, residuals))
        step = images[-1]
        if len(images) > 1:
            # Sums over a picture's own entries, not matrix products: those round differently for other batch sizes.
            dF = [(b - a).double() for a, b in pairwise(residuals)]
            gram = torch.stack([torch.stack([(u * v).sum(1) for v in dF], 1) for u in dF], 1)
            right = torch.stack([(u * f.double()).sum(1) for u in dF], 1)[:, :, None]
            ridge = (
                1e-12
                * gram.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
                * torch.eye(len(dF), dtype=gram.dtype, device=gram.device)
            )
            c = torch.linalg.lstsq(gram + ridge, right).solution.to(f)
            for k, (a, b) in enumerate(pairwise(images)):
                step = step - c[:, k] * (b - a)
        z = step.view(-1, *start.shape[1:])
    return best, smallest


def expand(flags: Tensor, like: Tensor) -> Tensor:
    return flags.view(-1, *[1] * (like.dim() - 1))
