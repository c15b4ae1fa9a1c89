"""What every command's own settings can be, checked before any work: nonsense is one line that names setting, value and remedy."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from keyanon.errors import BadSetting


@dataclass(frozen=True)
class Setting:
    """What a value has to be, in words, and whether it is."""

    wanted: str
    fits: Callable[[Any], bool]


def whole(value: Any, least: int = 1) -> bool:
    return type(value) is int and value >= least


def number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def shard(value: Any) -> bool:
    found = re.fullmatch(r"(\d+)/(\d+)", value) if isinstance(value, str) else None
    return found is not None and 1 <= int(found[1]) <= int(found[2])


COUNT = Setting("a whole number from 1 on", whole)
COUNT_OR_ALL = Setting("a whole number from 1 on, or null for all", lambda value: value is None or whole(value))
PAIR = Setting("a whole number from 2 on", lambda value: whole(value, 2))
# Top-level settings of all commands in conf/*.yaml; groups, whose parts check their own, are no concern of this.
SETTINGS: Mapping[str, Setting] = {
    "limit": COUNT_OR_ALL,
    "threads": COUNT_OR_ALL,
    "batch_size": COUNT,
    "shard": Setting("i/n, with whole numbers 1 <= i <= n, as in 1/4", shard),
    "device": Setting("cpu, cuda, cuda:1, mps, ...", lambda value: text(value) and is_device(value)),
    "far": Setting("a number between 0 and 1", lambda value: number(value) and 0 < value < 1),
    "files": PAIR,
    "keys_per_picture": PAIR,
    "name": Setting("a name", text),
    "runs": Setting("a folder", text),
    "notes": Setting("a list of texts", lambda value: isinstance(value, list)),
    "faces": Setting("all, largest or one_or_skip", lambda value: value in ("all", "largest", "one_or_skip")),
    "allow_faces_in_clear": Setting("true or false", lambda value: isinstance(value, bool)),
    "thresholds": Setting(
        "a number from -1 to 1 for each recognizer",
        lambda value: isinstance(value, dict) and all(number(one) and -1 <= one <= 1 for one in value.values()),
    ),
}
# A dataset's, where it has them
SIZE = Setting("a whole number of pixels from 16 on", lambda value: whole(value, 16))


def is_device(name: str) -> bool:
    """Whether PyTorch knows a device of this kind; whether this machine has it shows when it is used."""
    import torch

    try:
        torch.device(name)
    except RuntimeError:
        return False
    return True


def check(cfg: DictConfig) -> None:
    """Raises BadSetting for the first setting that cannot be used."""
    given = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(given, dict)
    for name, setting in SETTINGS.items():
        if name in given:
            # one by one: a group elsewhere may be told of a variable that is not set
            refuse(name, OmegaConf.to_container(cfg[name]) if OmegaConf.is_config(cfg[name]) else cfg[name], setting)
    if "size" in (given.get("dataset") or {}):
        refuse("dataset.size", cfg.dataset.size, SIZE)


def refuse(name: str, value: Any, setting: Setting) -> None:
    if not setting.fits(value):
        raise BadSetting(f"{name}={value!r}: expected {setting.wanted}")
