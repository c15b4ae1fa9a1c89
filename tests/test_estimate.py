"""How long a run takes, told before it starts; and what a device is given to do at a time."""

import os

import pytest
import torch

from experiments.harness import estimate
from experiments.harness.estimate import Estimate, batch_size, duration, network_seconds, threads
from keyanon import settings
from keyanon.diffusion.model import LatentDiffusion
from keyanon.settings import checked, device_of, usable_device
from tests.test_run import SMALL, overrides


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.4, "0 s"), (99, "99 s"), (101, "2 min"), (5999, "100 min"), (2 * 3600, "2.0 h"), (10**6, "12 days")],
)
def test_durations_in_words(seconds, said):
    assert duration(seconds) == said


def test_only_a_long_run_on_a_cpu_is_stopped_and_only_unless_it_is_asked_for():
    short, long = (Estimate(30_000, 500, seconds, "cpu") for seconds in (3600, 3601))
    assert short.too_long("cpu", allowed=False) == []
    assert long.too_long("cpu", allowed=True) == long.too_long("cuda:1", allowed=False) == []
    [message] = long.too_long("cpu", allowed=False)
    assert "about 60 min for 30,000 pictures of 500 network evaluations each" in message
    assert "long=true" in message


def test_a_cpu_works_as_it_always_did():
    assert batch_size("cpu", 10_000) == 8
    assert [threads("cpu", asked) for asked in (None, 3, "all")] == [1, 3, None]


@pytest.mark.parametrize(
    ("gib", "pictures", "chosen"),
    [(78, 30_000, 256), (24, 30_000, 64), (7, 30_000, 16), (1, 30_000, 8), (78, 5, 8), (78, 1, 1)],
)
def test_a_card_is_given_what_its_memory_holds(monkeypatch, gib, pictures, chosen):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (gib << 30, 80 << 30))
    assert batch_size("cuda", pictures) == chosen


def test_the_measurement_counts_as_no_evaluation(tiny_ldm):
    from tests.conftest import LDM_NOISE

    model = LatentDiffusion(str(tiny_ldm), noise=LDM_NOISE)
    state = torch.get_rng_state()
    assert network_seconds(model, 64, 2) > 0
    assert model.evaluations.total() == 0
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.no_cover
def test_a_run_too_long_for_a_cpu_is_not_begun_until_asked_for(command_in_process, tiny_ldm, tmp_path, monkeypatch):
    from tests.conftest import smooth_picture

    (tmp_path / "faces").mkdir()
    smooth_picture(0).save(tmp_path / "faces" / "a.png")
    monkeypatch.setattr(estimate, "HOUR", 1e-9)
    monkeypatch.setattr(estimate, "FEW", 0)
    asked = overrides(tmp_path / "faces", tiny_ldm)
    stopped = command_in_process(*asked)
    assert stopped.returncode == 2
    assert "To start it all the same: long=true" in stopped.stderr
    assert "1 pictures of 12 network evaluations each" in stopped.stderr
    assert not list(tmp_path.glob("results/runs/tiny/*/anonymized"))
    told = command_in_process(*asked, "estimate_only=true")
    assert (told.returncode, "tiny, signflip of folder: about" in told.stdout) == (0, True)
    assert not list(tmp_path.glob("results/runs/tiny/*/anonymized"))
    assert command_in_process(*asked, "long=true").returncode == 0


@checked
def on(device: settings.Device = "cpu") -> str:
    return device


def test_auto_is_the_card_that_computes_or_the_cpu(monkeypatch, caplog):
    usable_device.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert on(device="auto") == device_of("auto") == "cpu"
    assert on(device="cuda:3") == "cuda:3"
    usable_device.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no kernel image")))
    assert device_of("auto") == "cpu"
    assert "the card cannot be used, going on with the CPU: no kernel image" in caplog.text
    usable_device.cache_clear()


def test_small_runs_need_no_estimate(command_in_process):
    done = command_in_process("name=small", *SMALL, "estimate_only=true")
    assert done.returncode == 0
    assert "small, pixelate of bundled: about" in done.stdout
    assert os.sep not in done.stdout.split("about")[1]
