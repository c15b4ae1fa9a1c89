"""A run is what it is made of: after any history of a folder, a run gives the table that it gives in an empty folder."""

import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
from hydra import compose, initialize_config_dir
from hypothesis import HealthCheck, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from omegaconf import DictConfig, OmegaConf

from experiments.harness.command import mended
from experiments.run import run
from keyanon.channel import whole
from tests.conftest import ROOT, smooth_picture

pytestmark = pytest.mark.no_cover  # mostly Hydra's code, which coverage's tracer would make three times as slow

CHOICES = {
    "dataset": "folder", "backbone": "faces128", "parser": "ellipse", "anonymizer": "scrambling", "key": "experiment",
    "nonce": "per_image",
}  # fmt: skip
SIZE = 32
ASKED = [
    "dataset=folder", f"dataset.size={SIZE}", "parser=ellipse", "anonymizer=scrambling", "attacks=[wrong_key,jpeg]",
    "attacks.jpeg.quality=[50]", "recognizers=[]", "+recognizers.pixel._target_=tests.conftest.PixelRecognizer",
    "scorers=[mae]", "batch_size=2", "name=tiny",
]  # fmt: skip
# What a user may change between two runs: any of these, one value for another.
VARIED: Mapping[str, tuple[object, ...]] = {
    "limit": (None, 2, 3),
    "batch_size": (2, 3),
    "parser.centre": ([0.5, 0.4], [0.5, 0.6]),
    "attacks.jpeg.quality": ([50], [50, 20], [20]),
    "attacks.wrong_key.trial": (0, 1),
    "key.seed": (0, 1),
    "scorers.mae.power": (1, 2),
    "recognizers.pixel.grid": (8, 4),
    "dataset.crop": (None, [0, 0, 0.5, 0.5]),
    "far": (0.001, 0.1),
}


def composed(*more: str) -> DictConfig:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", overrides=[*ASKED, *more])
