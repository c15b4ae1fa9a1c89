"""A command line: which cell of a sweep this is, on which card, and what of an error a user gets to see.

Imports nothing heavy: a command's help and its complaints about arguments come at once.
"""

import functools
import logging
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import hydra
from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import CompactHydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from experiments.harness.errors import FACES_IN_CLEAR, SKIPPED, FacesInClear, is_full_disk, user_error
from experiments.harness.names import check_table_name
from experiments.harness.settings import check
from experiments.harness.shards import FailedShard, Incomplete
from keyanon.settings import device_of

log = logging.getLogger(__name__)

FAILED = 1  # exit code
TRIES = 3  # of a run whose pictures change while it goes on
CHECKOUT = Path(__file__).resolve().parents[2]
CONF = CHECKOUT / "conf"
# Of what a sweep can vary, that which no row's name has: it is a column, a table, or a part of one cell.
NOT_IN_ROW_NAMES = {"anonymizer", "dataset", "protocol", "experiment", "name", "runs", "shard", "allow_faces_in_clear"}

EMPTY = re.compile(r"\+*(attacks|recognizers|scorers)=(\[\]|\{\})")  # what somebody types who only wants files
Run = Callable[[DictConfig, dict[str, str], Sequence[str], Sequence[str]], object]


class Tally(logging.Handler):
    """Counts pictures that a log line says were skipped (`extra={"skipped": n}`): what is said is what the exit code shows."""

    skipped = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.skipped += getattr(record, "skipped", 0)


TALLY = Tally()  # of this process


def experiment(config_name: str, *groups: str) -> Callable[[Callable[[DictConfig], int]], Callable[[], None]]:
    """hydra.main for a command on pictures that has the `groups` of which any number can be chosen.

    An empty group may be written as a list or a mapping, and may be one that the command does not have. The exit code is SKIPPED
    where all is done but for pictures that were skipped; jobs that a launcher starts elsewhere count for themselves.
    """

    def decorate(task: Callable[[DictConfig], int]) -> Callable[[], None]:
        main = hydra.main(config_path="../conf", config_name=config_name, version_base="1.3")(task)

        @functools.wraps(task)
        def run_and_exit() -> None:
            empty = {argument: found[1] for argument in sys.argv[1:] if (found := EMPTY.fullmatch(argument))}
            asked = [argument for argument in sys.argv[1:] if argument not in empty or empty[argument] in groups]
            sys.argv[1:] = [f"{empty[argument]}=[]" if argument in empty else argument for argument in asked]
            TALLY.skipped = 0
            main()
            if TALLY.skipped:
                print(f"exit code {SKIPPED}: some pictures were skipped, see above", file=sys.stderr)
                sys.exit(SKIPPED)

        return run_and_exit

    return decorate


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
    logging.getLogger().addHandler(TALLY)  # here: Hydra has just replaced the handlers
    try:
        check(cfg)
        cfg.device = device_of(cfg.device)
        cfg.device = card_of_job(cfg.device, job.job.num, cards) if sweep else cfg.device
        check_table_name(cfg.name)
        tell_of_other_place(Path(cfg.runs), str(cfg.name))
        swept = row_overrides(job.overrides.task, swept_names(job)) if sweep else []
        mended(lambda: run(cfg, dict(job.runtime.choices), swept, command_of_cell(job)))
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


@contextmanager
def in_one_line() -> Iterator[None]:
    """What a user can mend ends a command in one line on stderr, and exit code 1; a bug shows its traceback."""
    try:
        yield
    except Exception as error:
        if (message := user_error(error)) is None:
            raise
        print(f"keyanon: {message}", file=sys.stderr)
        sys.exit(FAILED)


def mended(work: Callable[[], object]) -> None:
    """Do work that goes on where it was: again, where a stored file is damaged or pictures changed in the meantime.

    A damaged file is named and removed, and made again, once.
    """
    from keyanon.parts import Damaged

    removed: set[Path] = set()
    for tries in count(1):
        try:
            work()
            return
        except Damaged as damage:
            if damage.path in removed:
                raise
            log.warning("%s; it was removed", damage)
            damage.path.unlink(missing_ok=True)
            removed.add(damage.path)
        except Incomplete:
            if tries == TRIES:
                raise


def tell_of_other_place(runs: Path, name: str) -> None:
    """Say so where runs of this name lie in the checkout, and this one, started in another folder, does not go on with them."""
    there = CHECKOUT / runs / name
    if there.is_dir() and there.resolve() != (runs / name).resolve():
        here = (runs / name).absolute()
        log.warning(
            "%s is not gone on with: this run goes below %s; for the other place: runs=%s", there, here, there.parent
        )


def config_of(experiment: str) -> str:
    """The configuration of the command that an experiment is for: of its own name where there is one, else experiments.run's."""
    return experiment if (CONF / f"{experiment}.yaml").is_file() else "config"


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
    parsed = OverridesParser.create().parse_overrides(given(asked))
    # The last word on a key counts, as for Hydra's sweeper.
    return row_names({each.get_key_element(): each for each in parsed}, asked)


def row_names(overrides: Mapping[str, Override], hydra: DictConfig) -> list[str]:
    """Of a sweep's overrides those that tell rows apart: which have several values, or are of hydra.sweeper.params."""
    varied = [key for key, each in overrides.items() if each.is_sweep_override() or key in (hydra.sweeper.params or {})]
    return [name for name in map(name_of, varied) if name not in NOT_IN_ROW_NAMES and not name.startswith("protocol.")]


def given(hydra: HydraConf | DictConfig) -> list[str]:
    """All overrides of a sweep, those of an experiment's file first."""
    return [*(f"{name}={value}" for name, value in (hydra.sweeper.params or {}).items()), *hydra.overrides.task]


def command_of_cell(job: HydraConf) -> list[str]:
    """The command that runs a job's cell by itself, but for the shard: under the name that it has in its sweep."""
    program = ["python", "-m", f"experiments.{job.job.name}"]
    overrides = [override for override in job.overrides.task if name_of(override) != "shard"]
    if job.mode != RunMode.MULTIRUN or not (names := swept_names(job)):
        return [*program, *overrides]
    swept = {each: each.partition("=")[::2] for each in overrides if name_of(each) in names}
    if any(value == "null" for _, value in swept.values()):  # of which Hydra makes no choice
        params = [f"{key}:{QuotedString(value, Quote.single).with_quotes()}" for key, value in swept.values()]
        rest = [each for each in overrides if each not in swept]
        return [*program, "-m", *rest, f"hydra.sweeper.params={{{','.join(params)}}}"]
    # A sweep over one value is still a sweep.
    one = {each: f"{key}=choice({value})" for each, (key, value) in swept.items()}
    return [*program, "-m", *(one.get(each, each) for each in overrides)]


def row_overrides(overrides: Sequence[str], names: Sequence[str]) -> list[str]:
    """Of the overrides of a sweep's cell those that tell its row from others: those of `names`."""
    return [override.lstrip("+") for override in overrides if name_of(override) in names]


def name_of(override: str) -> str:
    """What an override sets, as solver.steps of +solver.steps=2."""
    return override.partition("=")[0].lstrip("+~")
