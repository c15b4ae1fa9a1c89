"""The probability-flow ODE in both directions: deterministic DDIM (arXiv 2010.02502, eq. 12 with sigma = 0).

On the levels 0 = clean < 1 < ... < N, with a_i = sqrt(abar_i) and s_i = sqrt(1 - abar_i), one step down is

    z_{i-1} = S_i(z_i) = a_{i-1} (z_i - s_i e) / a_i + s_{i-1} e,      e = eps(z_i, t_i)                                (eq. 4)

and the paper's inversion goes up with the noise predicted at the level it leaves (arXiv 2510.01031, eq. 5):

    z_i = a_i (z_{i-1} - s_{i-1} e) / a_{i-1} + s_i e,                 e = eps(z_{i-1}, t_i)                            (eq. 5)

Going up and down again gives z back only as the steps become small. A latent region that is known at every level (the
background) can be written back after each step down (eq. 7).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from keyanon.types import Denoiser, Latent, Mask


@dataclass(frozen=True)
class NoiseSchedule:
    """abar_t for t = 0 .. T-1 (signal variance left at t), abar of the clean level, and the first timestep of a grid."""

    abar: tuple[float, ...]
    abar_clean: float = 1.0
    offset: int = 0

    @classmethod
    def of(cls, scheduler: Any) -> "NoiseSchedule":
        """From a diffusers scheduler; `set_alpha_to_one` and `steps_offset` are the choices that matter here."""
        abar = tuple(scheduler.alphas_cumprod.double().tolist())
        clean = 1.0 if scheduler.config.set_alpha_to_one else abar[0]
        return cls(abar, clean, scheduler.config.steps_offset)


@dataclass(frozen=True)
class Known:
    """What is known of a latent while it is sampled: outside `mask`, z_i = path[i] for the levels i = 0 .. N."""

    mask: Mask
    path: Sequence[Latent]

    def write_back(self, z: Latent, level: int) -> Latent:
        """M * z + (1 - M) * path[level]   (eq. 7)."""
        return torch.where(self.mask, z, self.path[level])


class Solver(Protocol):
    """Both directions of one discretization of the flow."""

    def invert(self, eps: Denoiser, schedule: NoiseSchedule, z0: Latent) -> list[Latent]: ...

    def sample(self, eps: Denoiser, schedule: NoiseSchedule, zT: Latent, known: Known | None = None) -> Latent: ...


@dataclass(frozen=True)
class DDIM:
    """N DDIM steps on timesteps spaced as diffusers' "leading": 0, T/N, 2T/N, ... plus the schedule's offset."""

    steps: int = 50

    def timesteps(self, schedule: NoiseSchedule) -> list[int]:
        """t_1 .. t_N, ascending."""
        if not 1 <= self.steps <= len(schedule.abar):
            raise ValueError(f"solver.steps={self.steps}: the schedule has {len(schedule.abar)} timesteps")
        stride = len(schedule.abar) // self.steps
        return [min(i * stride + schedule.offset, len(schedule.abar) - 1) for i in range(self.steps)]

    def levels(self, schedule: NoiseSchedule) -> list[tuple[float, float]]:
        """(a_i, s_i) for i = 0 .. N."""
        abar = [schedule.abar_clean, *(schedule.abar[t] for t in self.timesteps(schedule))]
        return [(value**0.5, (1 - value) ** 0.5) for value in abar]

    def invert(self, eps: Denoiser, schedule: NoiseSchedule, z0: Latent) -> list[Latent]:
        """The whole path z_0 .. z_N of eq. 5, N evaluations of eps."""
        levels, path = self.levels(schedule), [z0]
        for i, t in enumerate(self.timesteps(schedule), start=1):
            path.append(move(path[-1], eps(path[-1], t), levels[i - 1], levels[i]))
        return path

    def sample(self, eps: Denoiser, schedule: NoiseSchedule, zT: Latent, known: Known | None = None) -> Latent:
        """z_0 of eq. 4 from z_N = zT, N evaluations of eps, with the known region written back at every level."""
        levels, timesteps = self.levels(schedule), self.timesteps(schedule)
        z = zT if known is None else known.write_back(zT, self.steps)
        for i in range(self.steps, 0, -1):
            z = move(z, eps(z, timesteps[i - 1]), levels[i], levels[i - 1])
            if known is not None:
                z = known.write_back(z, i - 1)
        return z


def move(z: Latent, e: Latent, here: tuple[float, float], there: tuple[float, float]) -> Latent:
    """From level (a, s) to level (a', s') along the noise e: a' (z - s e) / a + s' e."""
    (a, s), (a_there, s_there) = here, there
    return (a_there / a) * z + (s_there - a_there * s / a) * e
