"""A command line: which cell of a sweep this is, on which card, and what of an error a user gets to see.

Imports nothing heavy: a command's help and its complaints about arguments come at once.
"""

import logging
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import CompactHydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from experiments.harness.errors import FACES_IN_CLEAR, FacesInClear, is_full_disk, user_error
from experiments.harness.shards import FailedShard

log = logging.getLogger(__name__)

FAILED = 1  # exit code
# What tells no rows of a table apart: it has a column, or a title, or no influence on results.
NOT_IN_ROW_NAMES = {
    "experiment", "dataset", "name", "notes", "runs", "limit", "shard", "batch_size", "device", "threads",
    "key", "wandb", "hydra", "recognizers", "scorers", "attacks", "backbone.source", "backbone.subfolder",
    "allow_faces_in_clear",
}  # fmt: skip

Run = Callable[[DictConfig, dict[str, str], Sequence[str], Sequence[str]], object]


def start(cfg: DictConfig, run: Run) -> int:
    """Run an experiment: run(cfg, choices, what tells its row from others of its sweep, the command that runs it alone).

    What a user can mend is one line on stderr, and exit code 1. A bug shows its traceback. Faces in clear end a finished run with
    exit code 4; of a cell of a sweep the code is returned, and the sweep ends with it (`preflight.WholeSweep`).
    """
    import torch

    torch.manual_seed(0)  # nothing here draws from it; what a library draws shall at least repeat
    job = HydraConfig.get()
    sweep = job.mode == RunMode.MULTIRUN
    cards = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    cfg.device = card_of_job(cfg.device, job.job.num, cards) if sweep else cfg.device
    try:
        swept = row_overrides(job.overrides.task) if sweep and swept_names(job) else []
        run(cfg, dict(job.runtime.choices), swept, command_of_cell(job))
    except FacesInClear as found:
        print(f"keyanon: {found}", file=sys.stderr)
        if not sweep:  # an exit would take the other jobs along
            sys.exit(FACES_IN_CLEAR)
        return FACES_IN_CLEAR
    except Exception as error:
        message = one_line_for_user(error, cfg.runs)
        if message is None:
            raise
        log.debug("", exc_info=True)
        if sweep and isinstance(error, FailedShard):
            raise
        if sweep:  # an exit would take the other jobs along
            raise CompactHydraException(message) from error
        print(message, file=sys.stderr)
        sys.exit(FAILED)
    return 0


def one_line_for_user(error: Exception, runs: str) -> str | None:
    """What a user reads of an error that can be mended; None of a bug."""
    if is_full_disk(error):
        return f"keyanon: {error}; free some below {runs} and start again to resume"
    message = str(error) if isinstance(error, FailedShard) else user_error(error)
    return None if message is None else f"keyanon: {message}"


def card_of_job(device: str, job: int, cards: int) -> str:
    """The card for a sweep's job where there are several and none is named: one after the other."""
    kind, _, index = device.partition(":")
    return f"{device}:{job % cards}" if cards > 1 and kind != "cpu" and not index else device


def swept_names(job: HydraConf) -> list[str]:
    """Of what a job's sweep varies that which tells rows apart, as solver.steps does and shards do not."""
    asked = OmegaConf.load(Path(job.runtime.cwd, job.sweep.dir, "multirun.yaml")).hydra
    given = [*(f"{name}={value}" for name, value in (asked.sweeper.params or {}).items()), *asked.overrides.task]
    parsed = OverridesParser.create().parse_overrides(given)
    return row_overrides([each.get_key_element() for each in parsed if each.is_sweep_override()])


def command_of_cell(job: HydraConf) -> list[str]:
    """The command that runs a job's cell by itself, but for the shard: under the name that it has in its sweep."""
    program = ["python", "-m", f"experiments.{job.job.name}"]
    overrides = [override for override in job.overrides.task if override.partition("=")[0] != "shard"]
    if job.mode != RunMode.MULTIRUN or not (names := swept_names(job)):
        return [*program, *overrides]
    # A sweep over one value is still a sweep.
    one = [
        re.sub("=(.*)", r"=choice(\1)", each) if each.partition("=")[0].lstrip("+") in names else each
        for each in overrides
    ]
    return [*program, "-m", *one]


def row_overrides(overrides: Sequence[str]) -> list[str]:
    """Of the overrides of a sweep's cell those that tell its row from others, where dataset and anonymizer do not."""

    def counts(override: str) -> bool:
        key = override.lstrip("+~").partition("=")[0]
        return key != "anonymizer" and not any(f"{key}.".startswith(f"{name}.") for name in NOT_IN_ROW_NAMES)

    return [override.lstrip("+") for override in overrides if counts(override)]
