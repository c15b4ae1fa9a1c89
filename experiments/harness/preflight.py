"""Everything that a run needs and that is not here, found out at once and before any work."""

import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from experiments.harness.command import given, row_names, row_overrides
from experiments.harness.errors import user_error
from experiments.harness.made import made
from experiments.harness.names import check_table_name, row_label
from experiments.harness.protocol import protocol_label
from keyanon import weights
from keyanon.errors import BadSetting

if TYPE_CHECKING:
    # with torch: seconds, before Hydra has read a command's arguments
    from keyanon.types import Anonymizer, Dataset, Model

NOT_READY = 2  # exit code
# The groups whose parts may be missing.
GROUPS = ("anonymizer", "methods", "parser", "finder", "second_detector", "recognizers", "scorers", "protocol", "wandb")
BYTES_PER_VALUE = 1.2  # a PNG of a photograph, against its 3 h w raw bytes, with some air


def passwords_handed_on(key: Mapping[str, Any] | None, *parts: Any) -> list[str]:
    """A message for each program of others that asks for the variable of the password."""
    variable = (key or {}).get("variable")
    programs = [part for part in walk(parts) if variable in getattr(part, "environment", ())]
    return [
        f"{part.name}: anonymizer.environment names {variable}, which holds the password (key.variable); take it out"
        for part in programs
    ]


class WholeSweep(Callback):
    """All that any cell of a sweep lacks, and cells that would be one row, told before its first cell starts (hydra.callbacks).

    A sweep's exit code is the highest that a cell returned, if none failed. Cells that a launcher starts elsewhere say theirs in
    their log alone.
    """

    def __init__(self) -> None:
        self.codes: list[int] = []

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        if (
            config.hydra.mode == RunMode.MULTIRUN
            and job_return.status == JobStatus.COMPLETED
            and job_return.return_value
        ):
            self.codes.append(job_return.return_value)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        if self.codes:
            sys.exit(max(self.codes))

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        loader = GlobalHydra.instance().config_loader()
        parsed = OverridesParser.create(loader).parse_overrides(given(config.hydra))
        # The last word on a key counts, as for Hydra's sweeper. Shards all lack the same.
        asked = {each.get_key_element(): each for each in parsed if each.get_key_element() != "shard"}
        swept = row_names(asked, config.hydra)
        problems: list[str] = []
        if (runs := asked.get("runs")) is not None and runs.is_sweep_override():
            problems.append("runs= names one folder for all cells of a sweep; start one command for each folder")
        rows: dict[tuple[str, ...], list[str]] = {}
        for cell in map(list, product(*map(choices, asked.values()))):
            cfg = compose(config.hydra.job.config_name, cell, return_hydra_config=True)
            problems += bad_name(cfg)
            parts = {group: made(cfg, group) for group in GROUPS if group in cfg}
            problems += missing_parts(*parts.values()) + wrong_sizes(cfg.dataset.size, *parts.values())
            chosen = cfg.hydra.runtime.choices
            open_dataset(cfg, chosen["dataset"], problems)
            label = row_label(chosen.get("anonymizer", "every method"), row_overrides(cell, swept))
            protocol = protocol_label(cfg.protocol, chosen["protocol"])
            row = (str(cfg.runs), str(cfg.name), chosen["dataset"], protocol, label)
            if row in rows:
                differ = [set(one) - set(other) for one, other in ((rows[row], cell), (cell, rows[row]))]
                told = " and ".join(" ".join(sorted(one)) for one in differ if one) or "a value is given twice"
                problems.append(
                    f"two cells of this sweep would be one row, {label} of {chosen['dataset']} in the table {cfg.name}: "
                    f"{told}; leave one out, or give each a table of its own (name=...)"
                )
            rows[row] = cell
        stop_if(list(dict.fromkeys(problems)))


def choices(override: Override) -> list[str]:
    """What an override of a sweep is in its cells."""
    if not override.is_sweep_override():
        return [str(override.input_line)]
    return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]


def bad_name(cfg: DictConfig) -> list[str]:
    """A message if the table's name cannot be one."""
    try:
        check_table_name(cfg.name)
    except BadSetting as error:
        return [str(error)]
    return []


def missing_card(device: str) -> list[str]:
    """A message if a GPU is asked for and there is none that computes."""
    import torch

    asked = torch.device(device)
    if asked.type == "cuda" and (asked.index or 0) >= torch.cuda.device_count():
        return [f"device={device}: no such GPU is here; take device=auto, or cpu"]
    return []


def missing_parts(*parts: Any) -> list[str]:
    """Messages of all models and weights below `parts` that are not on this machine; each says how to get it."""
    from keyanon.types import NeedsFiles, NeedsWeights, TakesWeights

    found: dict[str, None] = {}
    for part in walk(parts):
        if isinstance(part, NeedsFiles):
            message = part.missing()
            found |= {message: None} if message else {}
        if isinstance(part, NeedsWeights):
            for place, card in enumerate(part.cards()):
                path = part.weights if place == 0 and isinstance(part, TakesWeights) else None
                message = weights.missing(card, path)
                found |= {message: None} if message else {}
    return list(found)


def wrong_sizes(size: int, *parts: Any) -> list[str]:
    """Messages of methods and models, alone or by name, that cannot take the dataset's pictures; each says what it can."""
    from keyanon.types import TakesSizes

    each = [one for part in parts for one in (part.values() if isinstance(part, Mapping) else [part])]
    found = [one.wrong_size(size) for one in each if isinstance(one, TakesSizes)]
    return list(dict.fromkeys(message for message in found if message is not None))


def models(method: "Anonymizer | None") -> "list[Model]":
    """The diffusion models of a method."""
    from keyanon.types import Model

    return [part for part in walk(method) if isinstance(part, Model)]


def missing_disk(folder: Path, files: int, size: int) -> list[str]:
    """A message if so many pictures of `size` pixels a side will not fit on the disk of `folder`."""
    existing = next(parent for parent in [folder, *folder.absolute().parents] if parent.exists())
    needed, free = int(files * size * size * 3 * BYTES_PER_VALUE), shutil.disk_usage(existing).free
    if needed <= free:
        return []
    need, have = needed / 1e6, free / 1e6
    return [f"disk: {folder} needs about {need:,.1f} MB and has {have:,.1f} MB; free some, or set runs=/another/disk"]


def open_dataset(cfg: DictConfig, name: str, problems: list[str]) -> "Dataset | None":
    """The dataset; None, and the problems more, where it cannot be read."""
    try:
        dataset: Dataset = made(cfg, "dataset")
        problems += [message for message in missing_parts(dataset) if message not in problems]
        _ = dataset.ids  # read at its first use
    except Exception as error:
        if (message := user_error(error)) is None:
            raise
        if message not in problems:
            problems.append(f"dataset {name}: {message}")
        return None
    return dataset


def stop_if(problems: Sequence[str]) -> None:
    """Print the problems and exit, if there are any."""
    if problems:
        print("keyanon: this run cannot start:", *(f"- {p}" for p in problems), sep="\n", file=sys.stderr)
        sys.exit(NOT_READY)


def walk(node: Any) -> Iterable[Any]:
    """All objects reachable through dataclass fields, mappings and sequences, the outermost first."""
    if isinstance(node, Mapping):
        for value in node.values():
            yield from walk(value)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from walk(value)
    else:
        yield node
        if isinstance(node, partial):
            yield from walk([*node.args, *node.keywords.values()])
        if is_dataclass(node):
            for each in fields(node):
                yield from walk(getattr(node, each.name))
