"""The solver against a closed-form denoiser, and against diffusers' two schedulers."""

import math
import weakref
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from keyanon.diffusion.solvers import DDIM, Known, NoiseSchedule, StoredTrajectory, anderson
from keyanon.errors import BadSetting
from tests.conftest import LDM_NOISE

SCHEDULE = NoiseSchedule.of(DDIMScheduler(**LDM_NOISE))


def gaussian_eps(variance: Tensor, schedule: NoiseSchedule = SCHEDULE):
    """The exact denoiser of data ~ N(0, variance): eps(z, t) = s z / (a^2 variance + s^2)."""

    def eps(z: Tensor, t: int) -> Tensor:
        abar = schedule.abar[t]
        return math.sqrt(1 - abar) * z / (abar * variance + 1 - abar)

    return eps


def test_equals_diffusers_schedulers_over_50_and_50_steps():
    eps = gaussian_eps(torch.linspace(0.05, 4.0, 3 * 8 * 8).view(1, 3, 8, 8))
    z0 = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for offset, to_one in ((0, True), (1, False)):
        forward = DDIMScheduler(**LDM_NOISE, steps_offset=offset, set_alpha_to_one=to_one)
        inverse = DDIMInverseScheduler.from_config(forward.config)
        forward.set_timesteps(50)
        inverse.set_timesteps(50)
        schedule = NoiseSchedule.of(forward)
        z = z0
        for t in inverse.timesteps:
            z = inverse.step(eps(z, int(t)), t, z).prev_sample
        trajectory = DDIM(50).invert(eps, schedule, z0)
        torch.testing.assert_close(trajectory[-1], z, atol=1e-4, rtol=0)
        for t in forward.timesteps:
            z = forward.step(eps(z, int(t)), t, z, eta=0.0).prev_sample
        torch.testing.assert_close(DDIM(50).sample(eps, schedule, trajectory[-1]), z, atol=1e-4, rtol=0)


def test_round_trip_error_halves_when_the_steps_double():
    eps = gaussian_eps(torch.full((1, 1, 4, 4), 0.25, dtype=torch.float64))
    z0 = torch.randn(1, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    errors = []
    for steps in (25, 50, 100, 200):  # divisors of 1000: else "leading" spacing stops early
        solver = DDIM(steps)
        back = solver.sample(eps, SCHEDULE, solver.invert(eps, SCHEDULE, z0)[-1])
        errors.append(((back - z0).norm() / z0.norm()).item())
    for coarse, fine in pairwise(errors):
        assert coarse / fine == pytest.approx(2, rel=0.12)


def test_inversion_of_gaussian_data_tends_to_unit_variance():
    variance = torch.full((1, 1, 1, 1), 0.5, dtype=torch.float64)
    z0 = variance.sqrt()  # one standard deviation of the data goes to one of the noise
    zT = DDIM(500).invert(gaussian_eps(variance), SCHEDULE, z0)[-1]
    assert zT.item() == pytest.approx(1, abs=0.02)


def test_constant_noise_is_inverted_exactly():
    e = torch.randn(1, 3, 4, 4, dtype=torch.float64)
    solver, z0 = DDIM(10), torch.randn(1, 3, 4, 4, dtype=torch.float64)
    back = solver.sample(lambda z, t: e, SCHEDULE, solver.invert(lambda z, t: e, SCHEDULE, z0)[-1])
    torch.testing.assert_close(back, z0)


def test_known_region_ends_on_its_own_trajectory():
    eps = gaussian_eps(torch.ones(1, 3, 4, 4))
    solver, z0 = DDIM(10), torch.randn(1, 3, 4, 4)
    trajectory = solver.invert(eps, SCHEDULE, z0)
    mask = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    mask[..., :2] = True
    out = solver.sample(eps, SCHEDULE, -trajectory[-1], Known(mask, trajectory))
    torch.testing.assert_close(out[..., 2:], z0[..., 2:])
    torch.testing.assert_close(out[..., :2], -solver.sample(eps, SCHEDULE, trajectory[-1])[..., :2])


DIVISORS = [n for n in range(1, 1001) if 1000 % n == 0]


@given(st.sampled_from(DIVISORS) | st.integers(1, 1000), st.integers(0, 1))
@settings(max_examples=40, deadline=None)
def test_timesteps_equal_diffusers_leading_spacing(steps, offset):
    scheduler = DDIMScheduler(**LDM_NOISE, steps_offset=offset)
    if 1000 % steps or (offset and steps == 1000):  # here diffusers stops early, or asks for timestep 1000 of 0 .. 999
        with pytest.raises(BadSetting, match=rf"solver\.steps={steps}"):
            DDIM(steps).timesteps(NoiseSchedule.of(scheduler))
        return
    scheduler.set_timesteps(steps)
    assert DDIM(steps).timesteps(NoiseSchedule.of(scheduler)) == scheduler.timesteps.tolist()[::-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_stored_trajectory_gives_back_what_it_was_given(dtype):
    latents = [torch.randn(2, 3, 4, 4).to(dtype) for _ in range(5)]
    latents[2] = latents[2].to(memory_format=torch.channels_last)
    latents[3][0, 0, 0, 0] = torch.nan
    trajectory = StoredTrajectory(latents[0])
    for z in latents[1:]:
        trajectory.append(z)
    assert len(trajectory) == 5
    for level in (3, 0, -1, 2, 4, -5, 1):
        torch.testing.assert_close(trajectory[level], latents[level], rtol=0, atol=0, equal_nan=True)
    trajectory.append(latents[1])  # reading does not move the place where the next one goes
    assert torch.equal(trajectory[5], latents[1])
    assert torch.equal(trajectory[4], latents[4])
    for level in (6, -7):
        with pytest.raises(IndexError):
            trajectory[level]


def test_a_stored_trajectory_holds_no_latent_in_memory():
    """Of the latents that were appended, only the first is alive: it tells shape and device."""
    trajectory = StoredTrajectory(torch.zeros(1, 3, 4, 4))
    z = torch.ones(1, 3, 4, 4)
    gone = weakref.ref(z)
    trajectory.append(z)
    del z
    assert gone() is None
    a, b = trajectory[1], trajectory[1]
    a += 1
    assert torch.equal(b, torch.ones(1, 3, 4, 4))  # what is read belongs to the reader


def test_a_step_count_that_does_not_divide_is_told_those_that_do():
    with pytest.raises(BadSetting, match=r"solver\.steps=30 does not divide .* 1000 .* take 25 or 40, or .*karras"):
        DDIM(30).levels(SCHEDULE)
    assert len(DDIM(30, "karras").levels(SCHEDULE)) == 31


def test_a_schedule_that_leaves_no_signal_is_refused():
    with pytest.raises(BadSetting, match="signal variance"):
        NoiseSchedule.of(DDIMScheduler(**LDM_NOISE, rescale_betas_zero_snr=True))


@pytest.mark.parametrize("name", ["steps", "max_evaluations", "memory"])
@pytest.mark.parametrize("value", [0, -3, 2.5, 10.0, "10", True, None, math.nan])
def test_counts_of_a_solver_are_whole_numbers(name, value):
    with pytest.raises(BadSetting, match=rf"DDIM\.{name}={value!r}: expected"):
        DDIM(**{name: value})


@pytest.mark.parametrize(
    "settings", [{"spacing": "linspace"}, {"tolerance": 0}, {"tolerance": math.nan}, {"tolerance": "1e-5"}]
)
def test_other_nonsense_of_a_solver_is_named(settings):
    ((name, value),) = settings.items()
    with pytest.raises(BadSetting, match=rf"DDIM\.{name}={value!r}: expected"):
        DDIM(**settings)


def test_more_steps_than_timesteps_is_refused():
    with pytest.raises(ValueError, match="1000 timesteps"):
        DDIM(1001).timesteps(SCHEDULE)


def test_anderson_solves_a_linear_fixed_point_for_each_picture():
    """z = A z + b has the solution (I - A)^-1 b; a plain iteration with this spectral radius would need hundreds."""
    generator = torch.Generator().manual_seed(0)
    q, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=generator))
    A = q @ torch.diag(torch.tensor([0.98, -0.9, 0.5, 0.3, -0.2, 0.1], dtype=torch.float64)) @ q.T
    b = torch.randn(3, 6, dtype=torch.float64, generator=generator)
    z, residual = anderson(lambda z, rows: z @ A.T + b[rows], torch.zeros(3, 6, dtype=torch.float64), 1e-10, 40, 6)
    assert (residual <= 1e-10).all()
    torch.testing.assert_close(z, torch.linalg.solve(torch.eye(6, dtype=torch.float64) - A, b.T).T, atol=1e-7, rtol=0)


def test_anderson_says_what_did_not_converge():
    z, residual = anderson(lambda z, rows: 3 * z + 1, torch.ones(2, 1), 1e-6, 1, 5)
    assert (residual > 1e-6).all()
    assert torch.isfinite(z).all()


@pytest.mark.parametrize("spacing", ["leading", "karras"])
@pytest.mark.parametrize("closed", [False, True])
def test_exact_inversion_is_the_inverse_of_sampling(spacing, closed):
    """On the closed-form denoiser the implicit inverse undoes the sampler, with and without a known background."""
    eps = gaussian_eps(torch.linspace(0.05, 4.0, 3 * 8 * 8, dtype=torch.float64).view(1, 3, 8, 8))
    z0 = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    solver = DDIM(10, spacing, tolerance=1e-12)
    mask = torch.zeros(2, 1, 8, 8, dtype=torch.bool)
    mask[..., 2:6, 2:6] = True
    known = Known(mask, [a * z0 for a, _ in solver.levels(SCHEDULE)]) if closed else None
    back = solver.sample(eps, SCHEDULE, solver.invert(eps, SCHEDULE, z0, known)[-1], known)
    torch.testing.assert_close(back, z0, atol=1e-8, rtol=0)
    naive = DDIM(10, spacing)
    rough = naive.sample(eps, SCHEDULE, naive.invert(eps, SCHEDULE, z0, known)[-1], known)
    assert (rough - z0).norm() > 1e-2 * z0.norm()


def test_inversion_that_cannot_converge_warns_and_counts(caplog):
    solver = DDIM(2, tolerance=1e-9, max_evaluations=2)
    z0 = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    solver.invert(lambda z, t: torch.sin(20 * z), SCHEDULE, z0)
    assert "did not converge for 2 of 2 pictures" in caplog.text


def test_karras_spacing_is_even_in_sigma_to_the_seventh():
    t = DDIM(10, "karras").timesteps(SCHEDULE)
    assert t[0] == 0
    assert t[-1] == 999
    assert t == sorted(set(t))
    root = [((1 / SCHEDULE.abar[i] - 1) ** 0.5) ** (1 / 7) for i in t]
    gaps = [b - a for a, b in pairwise(root)]
    assert max(gaps) / min(gaps) < 1.3
    with pytest.raises(ValueError, match="fewer steps"):
        DDIM(900, "karras").timesteps(SCHEDULE)
