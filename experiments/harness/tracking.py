"""Mirror a finished cell to Weights & Biases: `wandb=online`, `wandb=offline` or `wandb=off`.

A copy for looking at: tables are made of the files of a run alone. What gets here is numbers, a configuration without secrets and
places, and the pictures that `wandb.pictures` names: unless asked, only those of nobody real. wandb's own collection of the command
line, the host, the code and the console is switched off, because a password given on the command line would travel with it.
"""

import importlib.util
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, Protocol

import pandas as pd

from keyanon.errors import MissingPackage
from keyanon.settings import Name, checked
from keyanon.types import Dataset, is_synthetic

SECRET = re.compile(r"key|pass|secret|token|credential|auth|seed|salt|nonce", re.IGNORECASE)
PLACE = re.compile(r"(^|_)(path|root|dir|folder|file|home|cache)s?($|_)", re.IGNORECASE)
# Words of a command may be tokens; files, lists and variables are named as their owner likes.
OWNS = {"command", "recovery", "environment", "needs", "obtain", "logs", "list", "names"}
PATH_LIKE = re.compile(r"~|\.{0,2}[/\\]|[A-Za-z]:[/\\]|file:")
VALUE_IN_ROW = re.compile(
    r"""([\w.]+)=('.*'|".*"|\[.*\]|\{.*\}|.*?(?=,[\w.]+=|$))"""
)  # rather too much of a row's name than too little
# What stands before the host of an address, and behind its path, may be a password or a token.
USER_IN_URL, QUERY_IN_URL = re.compile(r"(\w://)[^/\s]*@"), re.compile(r"(\w://[^\s?#]*)[?#]\S*")
REMEDY = "pip install 'keyanon[wandb]', or run with wandb=off"
PICTURES = ("anonymizer.anonymized", "anonymizer.recovered", "anonymizer.target")  # folders and files of the user
LONGEST_NAME = 128  # characters that wandb shows

Pictures = Literal["none", "anonymized", "all"]


class Tracker(Protocol):
    @property
    def pictures(self) -> Pictures | None: ...

    def __call__(
        self, signature: str, config: Mapping[str, Any], statistics: pd.DataFrame, sheet: Path | None
    ) -> None: ...


@checked
@dataclass(frozen=True)
class Off:
    """Tracks nothing and imports nothing."""

    pictures: Pictures | None = "none"

    def __call__(self, signature: str, config: Mapping[str, Any], statistics: pd.DataFrame, sheet: Path | None) -> None:
        return


@checked
@dataclass(frozen=True)
class Wandb:
    """One wandb run for each run folder, with an id of its signature, so that a resumed run continues it.

    Args:
        mode: whether it is sent at once.
        project: wandb's.
        pictures: the contact sheet's: none, the anonymized ones alone, or all; None: all of a dataset that says nobody on it is
            real, and none of others.
    """

    mode: Literal["online", "offline"]
    project: Name
    pictures: Pictures | None = None

    def missing(self) -> str | None:
        """The package, if it is not installed."""
        if sys.modules.get("wandb") or importlib.util.find_spec("wandb"):
            return None
        return f"wandb={self.mode}: the package wandb is not installed; {REMEDY}"

    def __call__(self, signature: str, config: Mapping[str, Any], statistics: pd.DataFrame, sheet: Path | None) -> None:
        """Log `statistics` (columns view, scorer, statistic, value ...) as scalars and as a table, and the sheet.

        Raises:
            MissingPackage: the package wandb is not installed.
        """
        try:
            import wandb
        except ModuleNotFoundError as error:
            raise MissingPackage(f"wandb={self.mode}: the package wandb is not installed; {REMEDY}") from error

        names = statistics["view"] + "/" + statistics["scorer"] + "/" + statistics["statistic"]
        defined = {name: value for name, value in zip(names, statistics["value"], strict=True) if not math.isnan(value)}
        # its metadata would hold the command line, the host and the user
        private = wandb.Settings(
            console="off", disable_git=True, save_code=False, x_disable_meta=True, x_disable_stats=True
        )
        with wandb.init(
            project=self.project,
            mode=self.mode,
            id=wandb_id(signature),
            name=without_places(signature)[:LONGEST_NAME],
            resume="allow",
            config=public_config(config),
            settings=private,
        ) as run:
            pictures = {"contact_sheet": wandb.Image(str(sheet))} if sheet else {}
            run.log({**defined, **pictures, "statistics": wandb.Table(dataframe=statistics)})


def wandb_id(signature: str) -> str:
    """An id that wandb takes, which allows not every character and not every length: the same for the same signature."""
    return sha256(signature.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def without_places(text: str) -> str:
    """A text, such as a row's name, without the places on a disk, the words of commands and the secrets that it may tell of."""

    def shown(setting: re.Match[str]) -> str:
        name, value = setting.groups()
        hidden = set(value) & set("/\\~") or not is_named_publicly(name.rpartition(".")[2]) or name in PICTURES
        return f"{name}=..." if hidden or name.startswith("key.") else setting[0]

    return VALUE_IN_ROW.sub(shown, QUERY_IN_URL.sub(r"\1?...", USER_IN_URL.sub(r"\1...@", text)))


def shown_outside(pictures: Pictures | None, dataset: Dataset) -> Pictures:
    """Which pictures leave the machine: those that were asked for; else all of a dataset of nobody real, none of others."""
    if pictures is not None:
        return pictures
    return "all" if is_synthetic(dataset) else "none"


def public_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy without the entries that could hold a secret or tell of this machine, at any depth.

    Left out: names that speak of keys, passwords, tokens or seeds (a key's fingerprint stays), names and values that
    are places on a disk, what starts a program of others, and values that are not plain numbers, texts, lists or mappings.
    """
    return {str(name): public_value(value) for name, value in config.items() if is_public(str(name), value)}


def public_value(value: Any) -> Any:
    if isinstance(value, Mapping):
        return public_config(value)
    if isinstance(value, list | tuple):
        return [public_value(item) for item in value if is_plain(item)]
    return without_places(value) if isinstance(value, str) else value


def is_public(name: str, value: object) -> bool:
    return is_named_publicly(name) and is_plain(value)


def is_named_publicly(name: str) -> bool:
    """Whether a setting of this name holds no secret, no place, and nothing that its owner worded."""
    secret = SECRET.search(name) and not name.endswith("fingerprint")
    return not secret and not PLACE.search(name) and name not in OWNS


def is_plain(value: object) -> bool:
    if isinstance(value, str):
        return not PATH_LIKE.match(value)
    return value is None or isinstance(value, bool | int | float | list | tuple | Mapping)
