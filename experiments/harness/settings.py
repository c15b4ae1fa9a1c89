"""What every command's own settings can be, checked before any work: nonsense is one line that names setting, value and remedy."""

import re
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from keyanon.settings import DEVICE, SIZE, SOME_TEXT, Setting, is_number, refuse, whole


def shard(value: Any) -> bool:
    found = re.fullmatch(r"(\d+)/(\d+)", value) if isinstance(value, str) else None
    return found is not None and 1 <= int(found[1]) <= int(found[2])


def inversion(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == {"tolerance", "steps"} and isinstance(value["steps"], list)


COUNT = whole()
COUNT_OR_ALL = Setting("a whole number from 1 on, or null for all", lambda value: value is None or COUNT.fits(value))
PAIR = whole(2)
SWITCH = Setting("true or false", lambda value: isinstance(value, bool))
# Top-level settings of all commands in conf/*.yaml; groups, whose parts check their own, are no concern of this.
SETTINGS: Mapping[str, Setting] = {
    "limit": COUNT_OR_ALL,
    "threads": Setting(
        "a whole number from 1 to 1024, all, or null for the device's own choice",
        lambda value: value in (None, "all") or whole(1, 1024).fits(value),
    ),
    "batch_size": Setting(
        "a whole number from 1 on, or null for the device's own choice",
        lambda value: value is None or COUNT.fits(value),
    ),
    "shard": Setting("i/n, with whole numbers 1 <= i <= n, as in 1/4", shard),
    "device": DEVICE,
    "far": Setting("a number between 0 and 1", lambda value: is_number(value) and 0 < value < 1),
    "files": PAIR,
    "keys_per_picture": PAIR,
    "name": SOME_TEXT,
    "runs": SOME_TEXT,
    "notes": Setting("a list of texts", lambda value: isinstance(value, list)),
    "faces": Setting("all, largest or one_or_skip", lambda value: value in ("all", "largest", "one_or_skip")),
    "allow_faces_in_clear": SWITCH,
    "long": SWITCH,
    "estimate_only": SWITCH,
    "inversions": Setting(
        "names, with a tolerance and a list of steps each",
        lambda value: isinstance(value, dict) and all(inversion(one) for one in value.values()),
    ),
    "thresholds": Setting(
        "a number from -1 to 1 for each recognizer",
        lambda value: isinstance(value, dict) and all(is_number(one) and -1 <= one <= 1 for one in value.values()),
    ),
}


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
