"""Run one cell of a table, or with -m / an experiment file many: `python -m experiments.run dataset=celebahq`.

Preflight, then make every view, then score it, then average, then write the table. Any number of shards may do so in one
folder at once: each makes and scores its own pictures, and the last to end averages over all.
"""

import json
import logging
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import CompactHydraException
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from experiments import tables
from experiments.harness import preflight, provenance
from experiments.harness.errors import is_full_disk, user_error
from experiments.harness.plots import contact_sheet
from experiments.harness.shards import FailedShard, Shards, numbers, one_line, settled, sharded
from experiments.harness.statistics import write_statistics
from experiments.harness.tracking import Tracker
from keyanon import runner
from keyanon.channel.keys import MasterKey
from keyanon.channel.whole import write_whole
from keyanon.errors import BadData, BadSetting
from keyanon.types import Anonymizer, Dataset, NeedsWeights, Recognizer

log = logging.getLogger(__name__)

FAILED = 1
UNTOLD = {
    "experiment", "dataset", "name", "notes", "runs", "limit", "shard", "batch_size", "device", "threads",
    "key", "wandb", "hydra", "recognizers", "scorers", "attacks", "backbone.source", "backbone.subfolder",
}  # fmt: skip
MEASURES = ("attacks", "recognizers", "scorers")
SHEET_ROWS, SHOWN_SKIPPED = 8, 10
SHEET_VIEWS = (runner.ORIGINAL, runner.MASK, runner.ANONYMIZED, runner.RECOVERED, "wrong_key")


@hydra.main(config_path="../conf", config_name="config", version_base="1.3")
def main(cfg: DictConfig) -> None:
    torch.manual_seed(0)  # nothing here draws from it; what a library draws shall at least repeat
    job = HydraConfig.get()
    sweep = job.mode == RunMode.MULTIRUN
    cards = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    cfg.device = own_card(cfg.device, job.job.num, cards) if sweep else cfg.device
    try:
        swept = telling(job.overrides.task) if sweep and varied(job) else []
        run(cfg, dict(job.runtime.choices), swept, alone(job))
    except Exception as error:
        failed = isinstance(error, FailedShard)
        if (reason := str(error) if failed else user_error(error)) is None or (sweep and failed):
            raise
        log.debug("", exc_info=True)
        remedy = f"; free some below {cfg.runs} and start again to resume" if is_full_disk(error) else ""
        message = f"keyanon: {reason}{remedy}"
        if sweep:  # an exit would take the other jobs along
            raise CompactHydraException(message) from error
        print(message, file=sys.stderr)
        sys.exit(FAILED)


def shown(experiment: Callable[[], object], name: str) -> None:
    """Run an experiment that writes the table `name`, and print the table; what a reader can mend is said in one line."""
    try:
        experiment()
        print(Path("results/tables", f"{name}.md").read_text("utf-8"))
    except Exception as error:
        if (message := user_error(error)) is None:
            raise
        print(f"keyanon: {message}", file=sys.stderr)
        sys.exit(FAILED)


@dataclass(frozen=True)
class Cell:
    """One cell: what was asked, of which pictures, and the folder and shards that hold what came out."""

    cfg: DictConfig
    choices: dict[str, Any]
    method: Anonymizer
    dataset: Dataset
    ids: Sequence[str]
    recognizers: Mapping[str, Recognizer]
    question: dict[str, Any]
    anonymizer: str
    folder: Path
    shards: Shards
    tracker: Tracker


def run(cfg: DictConfig, choices: dict[str, Any], swept: Sequence[str] = (), arguments: Sequence[str] = ()) -> Path:
    """One cell, or one shard of it: the run folder, with the table written if no other shard is still to do that.

    `swept` is what tells the cell from others of its sweep: it is in its name. `arguments` would start this cell alone.
    """
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    key: MasterKey = instantiate(cfg.key)
    method = instantiate(cfg.anonymizer, _convert_="all")
    parser = instantiate(cfg.parser)
    # "all": plain containers, or OmegaConf would take the dataclasses in them for structured configs
    attacks, recognizers, scorers = (
        instantiate(group, _convert_="all") for group in (cfg.attacks, cfg.recognizers, cfg.scorers)
    )
    tracker: Tracker = instantiate(cfg.wandb)

    problems = preflight.missing_parts(method, parser, recognizers, scorers)
    dataset = preflight.open_dataset(cfg.dataset, choices["dataset"], problems)
    if dataset is not None:
        ids = dataset.ids[: cfg.limit]
        mine = sharded(ids, cfg.shard)
        problems += preflight.missing_disk(Path(cfg.runs), len(mine), 4 + len(attacks), cfg.dataset.size)
    preflight.stop_if(problems)
    assert dataset is not None

    models = preflight.models(method)
    question = {
        "dataset": OmegaConf.to_container(cfg.dataset, resolve=True),
        "anonymizer": OmegaConf.to_container(cfg.anonymizer, resolve=True),
        "parser": OmegaConf.to_container(cfg.parser, resolve=True),
        "key": key.fingerprint,
        "weights": [model.sha256 for model in models] + own_weights(method),
    }
    name = ",".join([choices["anonymizer"], *swept])
    folder: Path = Path(cfg.runs) / cfg.name / f"{choices['dataset']}-{name}-{provenance.signature(question)}"
    folder.mkdir(parents=True, exist_ok=True)
    log.info("%s: %d pictures, key %s", folder, len(mine), key.fingerprint)
    measures = {group: OmegaConf.to_container(cfg[group], resolve=True) for group in MEASURES}
    same_attacks(folder, measures["attacks"])
    _, count = numbers(cfg.shard)
    shards = Shards(folder, count, provenance.signature({"ids": list(ids), **measures}))
    cell = Cell(cfg, choices, method, dataset, ids, recognizers, question, name, folder, shards, tracker)

    def evaluations() -> int:
        return sum(model.evaluations.total() for model in models)

    try:
        with shards.recorded(cfg.shard) as status:
            started = time.monotonic()
            skipped = runner.generate(
                folder, dataset, mine, method, key, attacks, parser, cfg.batch_size, evaluations, cfg.device
            )
            generated = time.monotonic()
            runner.score(folder, mine, scorers, recognizers, cfg.batch_size, cfg.device)
            _, unenrolled = enrolled(cell, sharded(dataset.gallery, cfg.shard))
            seconds = {"generate": generated - started, "score": time.monotonic() - generated}
            status |= {"pictures": len(mine), "skipped": len(skipped), "seconds": seconds}
    except Exception as error:
        publish_if_last(cell)
        if count == 1:
            raise
        log.log(logging.DEBUG if user_error(error) else logging.ERROR, "", exc_info=True)
        raise FailedShard(f"shard {cfg.shard}: {one_line(error)}", shards, arguments) from error
    for id, reason in list(skipped.items())[:SHOWN_SKIPPED]:
        log.warning("skipped %s: %s", id, reason)
    for id, reason in list(unenrolled.items())[:SHOWN_SKIPPED]:
        log.warning("not in the gallery: %s: %s", id, reason)
    publish_if_last(cell)
    for line in shards.unfinished(arguments):
        log.warning(line)
    return folder


def publish_if_last(cell: Cell) -> None:
    """The cell's table, of the shards that are done, if none is running. Shards that end at once all write it: the same."""
    settled(cell.shards.closed, lambda done: publish(cell, done) if done else None)


def publish(cell: Cell, done: Sequence[str]) -> None:
    """The cell's statistics and record, of its shards that are `done`, and the table of all cells."""
    cfg, folder, statuses = cell.cfg, cell.folder, cell.shards.read()
    there = {id for shard in done for id in sharded(cell.ids, shard)}
    ids, files = [id for id in cell.ids if id in there], runner.RunFiles(folder)
    skipped = files.skipped()
    if ids and all(id in skipped for id in ids):
        raise BadData(f"none of the {len(ids)} pictures could be used; the first, {ids[0]}: {skipped[ids[0]]}")
    files.list_skipped()
    log.info(
        "%d of %d pictures skipped, all listed in %s", len(there & skipped.keys()), len(ids), folder / "skipped.csv"
    )
    galleries, _ = enrolled(cell, cell.dataset.gallery)
    statistics = write_statistics(folder, galleries, cell.dataset, ids, cfg.far)
    lacking = [f"{shard} ({status['state']})" for shard, status in statuses.items() if shard not in done]
    record = {
        "experiment": cfg.name,
        "dataset": cell.choices["dataset"],
        "anonymizer": cell.anonymizer,
        "title_notes": title_notes(cfg, cell.choices, len(ids), lacking),
        "question": cell.question,
        "about": asdict(cell.method.about),
        "seconds": {what: sum(statuses[shard]["seconds"][what] for shard in done) for what in ("generate", "score")},
        "batch_size": cfg.batch_size,
        "device": torch.device(cfg.device).type,
        **provenance.record(),
    }
    write_whole(folder / "run.json", json.dumps(record, indent=2).encode() + b"\n")
    sheet = draw_sheet(folder, ids)
    cell.tracker(f"{cfg.name}-{folder.name}", record, statistics, sheet)
    # Cells of a sweep may end at once as well.
    settled(lambda: latest_cells(folder), lambda cells: tables.build(cfg.name, sorted(cells)))
    print(Path("results/tables", f"{cfg.name}.md").read_text("utf-8"))
    print(f"pictures side by side: {folder / 'contact_sheet.png'}")
    print(what_it_ran_on(cfg, cell.choices, folder))


def enrolled(cell: Cell, ids: Sequence[str]) -> tuple[dict[str, Path], dict[str, str]]:
    """Folders with the embeddings of the gallery's pictures `ids`, one a recognizer, shared by all runs; and the pictures
    that could not be used.
    """
    folders: dict[str, Path] = {}
    skipped: dict[str, str] = {}
    for name, recognizer in cell.recognizers.items() if ids else ():
        question = {
            "dataset": cell.question["dataset"],
            "recognizer": OmegaConf.to_container(cell.cfg.recognizers[name], resolve=True),
        }
        folders[name] = (
            Path(cell.cfg.runs) / "galleries" / f"{cell.choices['dataset']}-{name}-{provenance.signature(question)}"
        )
        batch_size, device = cell.cfg.batch_size, cell.cfg.device
        skipped |= runner.enrol(folders[name], cell.dataset, ids, name, recognizer, batch_size, device)
    return folders, skipped


def own_card(device: str, job: int, cards: int) -> str:
    """The card for a sweep's job where there are several and none is named: one after the other."""
    place = torch.device(device)
    return f"{device}:{job % cards}" if cards > 1 and place.type != "cpu" and place.index is None else device


def varied(job: HydraConf) -> list[str]:
    """Of what a job's sweep varies that which tells cells apart, as solver.steps does and shards do not."""
    asked = OmegaConf.load(Path(job.runtime.cwd, job.sweep.dir, "multirun.yaml")).hydra
    given = [*(f"{name}={value}" for name, value in (asked.sweeper.params or {}).items()), *asked.overrides.task]
    parsed = OverridesParser.create().parse_overrides(given)
    return telling([each.get_key_element() for each in parsed if each.is_sweep_override()])


def alone(job: HydraConf) -> list[str]:
    """The arguments that start a job's cell by itself, but for the shard: under the name that it has in its sweep."""
    overrides = [override for override in job.overrides.task if override.partition("=")[0] != "shard"]
    if job.mode != RunMode.MULTIRUN or not (names := varied(job)):
        return overrides
    # A sweep over one value is still a sweep.
    one = [re.sub("=(.*)", r"=choice(\1)", each) if each.partition("=")[0] in names else each for each in overrides]
    return ["-m", *one]


def telling(overrides: Sequence[str]) -> list[str]:
    """Of the overrides of a sweep's cell those that tell it from the others, where dataset and anonymizer do not."""

    def tells(override: str) -> bool:
        key = override.lstrip("+~").partition("=")[0]
        return key != "anonymizer" and not any(f"{key}.".startswith(f"{untold}.") for untold in UNTOLD)

    return [override.lstrip("+") for override in overrides if tells(override)]


def what_it_ran_on(cfg: DictConfig, choices: dict[str, Any], folder: Path) -> str:
    """One line: pictures, model, device, time."""
    about = json.loads((folder / "run.json").read_text("utf-8"))
    pictures = len(runner.RunFiles(folder).ids(runner.ANONYMIZED))
    model = model_name(cfg, choices)
    what = f"{pictures} pictures of {about['dataset']} by {about['anonymizer']}" + (
        f" with the model {model}" if model else ""
    )
    where = f"{cfg.device} ({about['processor']}, {about['threads']} threads), torch {about['packages']['torch']}"
    return f"ran on: {what}; {where}; {sum(about['seconds'].values()):.0f} s"


def latest_cells(folder: Path) -> dict[Path, int]:
    """The finished run folders beside `folder`, the latest of each dataset and anonymizer, and when they were finished."""
    cells: dict[tuple[str, str], tuple[int, Path]] = {}
    for when, path in sorted((path.stat().st_mtime_ns, path) for path in folder.parent.glob("*/run.json")):
        about = json.loads(path.read_text())
        cells[about["dataset"], about["anonymizer"]] = when, path.parent
    return {path: when for when, path in cells.values()}


def draw_sheet(folder: Path, ids: Sequence[str]) -> Path | None:
    """The first pictures in each view that shows what the method does, side by side; None where there is no picture."""
    files = runner.RunFiles(folder)
    shown = [id for id in ids if files.has(runner.ANONYMIZED, id)][:SHEET_ROWS]
    views = [view for view in SHEET_VIEWS if shown and all(files.has(view, id) for id in shown)]
    if not views:
        return None
    path = folder / "contact_sheet.png"
    contact_sheet({view: list(files.read_all(view, shown)) for view in views}, path)
    return path


def same_attacks(folder: Path, attacks: Any) -> None:
    """Refuse to mix two attacks under one view's name: pictures made with other settings are already there."""
    (folder / "attacks").mkdir(parents=True, exist_ok=True)
    for view, settings in attacks.items():
        path = folder / "attacks" / f"{view}.json"
        if not path.exists():
            write_whole(path, json.dumps(settings, indent=2).encode())
        elif json.loads(path.read_text()) != settings:
            raise BadSetting(
                f"{folder / view} holds pictures of this attack with other settings; rename the attack or delete it"
            )


def own_weights(method: Any) -> list[str | None]:
    """SHA-256 of the weights that a method brings besides a diffusion model."""
    return [card.sha256 for card in method.cards()] if isinstance(method, NeedsWeights) else []


def model_name(cfg: DictConfig, choices: Mapping[str, Any]) -> str | None:
    """The diffusion model that the method runs on; None for methods without one."""
    if "backbone" not in cfg.anonymizer:
        return None
    return str(choices["backbone"] if cfg.anonymizer.backbone == cfg.backbone else cfg.anonymizer.backbone.source)


def title_notes(cfg: DictConfig, choices: dict[str, Any], pictures: int, lacking: Sequence[str]) -> list[str]:
    """What a reader of the table must know: stand-ins, reduced settings, and shards that are not in it."""
    notes = [str(note) for note in cfg.notes]
    if model := model_name(cfg, choices):
        notes += [f"backbone {model}", f"mask from {choices['parser']}"]
        if (precision := cfg.anonymizer.backbone.get("precision", "fp32")) != "fp32":
            notes.append(f"network in {precision}")
    if choices["key"] == "experiment":
        notes.append("published experiment key")
    if choices["nonce"] != "per_image" and "nonces" in cfg.anonymizer:
        notes.append(f"key streams shared: nonce={choices['nonce']}")
    if cfg.limit is not None or lacking:
        notes.append(f"{pictures} pictures")
    return [*notes, f"without the shards {', '.join(lacking)}"] if lacking else notes


if __name__ == "__main__":
    main()
