"""Mirror a finished cell to Weights & Biases: `wandb=online`, `wandb=offline` or `wandb=off`.

A copy for looking at: tables are made of the files below results/ alone. What gets here is numbers, a contact sheet and
a configuration without secrets; wandb's own collection of the command line, the host, the code and the console is
switched off, because a password given on the command line would travel with it.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import pandas as pd

from keyanon.errors import MissingPackage

SECRET = re.compile(r"key|pass|secret|token|credential|auth|seed|salt|nonce", re.IGNORECASE)
PLACE = re.compile(r"(^|_)(path|root|dir|folder|file|home|cache)s?($|_)", re.IGNORECASE)
PATH_LIKE = re.compile(r"~|\.{0,2}[/\\]|[A-Za-z]:[/\\]|file:")


class Tracker(Protocol):
    def __call__(
        self, signature: str, config: Mapping[str, Any], statistics: pd.DataFrame, sheet: Path | None
    ) -> None: ...


@dataclass(frozen=True)
class Off:
    """Tracks nothing and imports nothing."""

    def __call__(self, signature: str, config: Mapping[str, Any], statistics: pd.DataFrame, sheet: Path | None) -> None:
        return


@dataclass(frozen=True)
class Wandb:
    """One wandb run for each run folder, named by its signature, so that a resumed run continues it."""

    mode: Literal["online", "offline"]
    project: str

    def __call__(self, signature: str, config: Mapping[str, Any], statistics: pd.DataFrame, sheet: Path | None) -> None:
        """Log `statistics` (columns view, scorer, statistic, value ...) as scalars and as a table, and the sheet.

        Raises:
            MissingPackage: the package wandb is not installed.
        """
        try:
            import wandb
        except ModuleNotFoundError as error:
            remedy = "pip install 'keyanon[wandb]', or run with wandb=off"
            raise MissingPackage(f"wandb={self.mode}: the package wandb is not installed; {remedy}") from error

        names = statistics["view"] + "/" + statistics["scorer"] + "/" + statistics["statistic"]
        defined = {name: value for name, value in zip(names, statistics["value"], strict=True) if not math.isnan(value)}
        # its metadata would hold the command line, the host and the user
        private = wandb.Settings(
            console="off", disable_git=True, save_code=False, x_disable_meta=True, x_disable_stats=True
        )
        with wandb.init(
            project=self.project,
            mode=self.mode,
            id=signature,
            name=signature,
            resume="allow",
            config=public_config(config),
            settings=private,
        ) as run:
            pictures = {"contact_sheet": wandb.Image(str(sheet))} if sheet else {}
            run.log({**defined, **pictures, "statistics": wandb.Table(dataframe=statistics)})


def public_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy without the entries that could hold a secret or tell of this machine, at any depth.

    Left out: names that speak of keys, passwords, tokens or seeds (a key's fingerprint stays), names and values that
    are places on a disk, and values that are not plain numbers, texts, lists or mappings.
    """
    return {str(name): public_value(value) for name, value in config.items() if is_public(str(name), value)}


def public_value(value: Any) -> Any:
    if isinstance(value, Mapping):
        return public_config(value)
    if isinstance(value, list | tuple):
        return [public_value(item) for item in value if is_plain(item)]
    return value


def is_public(name: str, value: object) -> bool:
    secret = SECRET.search(name) and not name.endswith("fingerprint")
    return not secret and not PLACE.search(name) and is_plain(value)


def is_plain(value: object) -> bool:
    if isinstance(value, str):
        return not PATH_LIKE.match(value)
    return value is None or isinstance(value, bool | int | float | list | tuple | Mapping)
