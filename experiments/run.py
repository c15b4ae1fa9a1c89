"""Run one cell of a table, or with -m / an experiment file many: `python -m experiments.run dataset=celebahq`.

Preflight, then make every view, then score it, then average, then write the table.
"""

import errno
import json
import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from experiments import preflight, provenance, tables
from experiments.plots import contact_sheet
from experiments.statistics import write_statistics
from experiments.tracking import Tracker
from keyanon import runner
from keyanon.diffusion import BadModel, LatentDiffusion
from keyanon.headers import BadHeader
from keyanon.images import write_whole
from keyanon.keys import BadKey, MasterKey
from keyanon.types import BadPicture, Dataset, Recognizer
from keyanon.weights import MissingWeights, WrongWeights

log = logging.getLogger(__name__)

FAILED = 1
UNTOLD = {
    "experiment", "dataset", "name", "notes", "runs", "limit", "shard", "batch_size", "device", "threads",
    "key", "wandb", "hydra", "recognizers", "scorers", "attacks", "backbone.source", "backbone.subfolder",
}  # fmt: skip
SHEET_ROWS, SHOWN_SKIPPED = 8, 10
SHEET_VIEWS = (runner.ORIGINAL, runner.MASK, runner.ANONYMIZED, runner.RECOVERED, "wrong_key")
READABLE = (
    BadKey,
    BadHeader,
    BadModel,
    BadPicture,
    MissingWeights,
    WrongWeights,
    FileNotFoundError,
    ValueError,
    OSError,
)


@hydra.main(config_path="../conf", config_name="config", version_base="1.3")
def main(cfg: DictConfig) -> None:
    try:
        job = HydraConfig.get()
        swept = telling(job.overrides.task) if job.mode == RunMode.MULTIRUN else []
        folder = run(cfg, dict(job.runtime.choices), swept)
        print(Path("results/tables", f"{cfg.name}.md").read_text("utf-8"))
        print(f"pictures side by side: {folder / 'contact_sheet.png'}")
        print(what_it_ran_on(cfg, dict(job.runtime.choices), folder))
    except READABLE as error:
        log.debug("", exc_info=True)
        remedy = f"; free some below {cfg.runs} and start again to resume" if is_full_disk(error) else ""
        print(f"keyanon: {error}{remedy}", file=sys.stderr)
        sys.exit(FAILED)


def shown(experiment: Callable[[], object], name: str) -> None:
    """Run an experiment that writes the table `name`, and print the table; what a reader can mend is said in one line."""
    try:
        experiment()
        print(Path("results/tables", f"{name}.md").read_text("utf-8"))
    except READABLE as error:
        print(f"keyanon: {error}", file=sys.stderr)
        sys.exit(FAILED)


def run(cfg: DictConfig, choices: dict[str, Any], swept: Sequence[str] = ()) -> Path:
    """One cell: the run folder, with its table written. What it sets apart from the others of its sweep is in its name."""
    started = time.monotonic()
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
        ids = sharded(dataset.ids[: cfg.limit], cfg.shard)
        problems += preflight.missing_disk(Path(cfg.runs), len(ids), 4 + len(attacks), cfg.dataset.size)
    preflight.stop_if(problems)
    assert dataset is not None

    models = [part for part in preflight.walk(method) if isinstance(part, LatentDiffusion)]
    question = {
        "dataset": OmegaConf.to_container(cfg.dataset, resolve=True),
        "anonymizer": OmegaConf.to_container(cfg.anonymizer, resolve=True),
        "parser": OmegaConf.to_container(cfg.parser, resolve=True),
        "key": key.fingerprint,
        "weights": [model.sha256 for model in models] + own_weights(method),
    }
    dataset_name, anonymizer_name = choices["dataset"], ",".join([choices["anonymizer"], *swept])
    signature = provenance.signature(question)
    folder: Path = Path(cfg.runs) / cfg.name / f"{dataset_name}-{anonymizer_name}-{signature}"
    folder.mkdir(parents=True, exist_ok=True)
    log.info("%s: %d pictures, key %s", folder, len(ids), key.fingerprint)
    same_attacks(folder, OmegaConf.to_container(cfg.attacks, resolve=True))

    def evaluations() -> int:
        return sum(model.evaluations.total() for model in models)

    skipped = runner.generate(folder, dataset, ids, method, key, attacks, parser, cfg.batch_size, evaluations)
    if ids and all(id in skipped for id in ids):
        raise ValueError(f"none of the {len(ids)} pictures could be used; the first, {ids[0]}: {skipped[ids[0]]}")
    generated = time.monotonic()
    runner.score(folder, ids, scorers, recognizers, cfg.batch_size)
    galleries, unenrolled = enrolled(cfg, dataset_name, dataset, recognizers)
    statistics = write_statistics(folder, galleries, dataset, cfg.far)
    for id, reason in list(skipped.items())[:SHOWN_SKIPPED]:
        log.warning("skipped %s: %s", id, reason)
    log.info("%d of %d pictures skipped, all listed in %s", len(skipped), len(ids), folder / "skipped.csv")
    for id, reason in list(unenrolled.items())[:SHOWN_SKIPPED]:
        log.warning("not in the gallery: %s: %s", id, reason)

    record = {
        "experiment": cfg.name,
        "dataset": dataset_name,
        "anonymizer": anonymizer_name,
        "title_notes": title_notes(cfg, choices, len(ids)),
        "question": question,
        "about": asdict(method.about),
        "seconds": {"generate": generated - started, "score": time.monotonic() - generated},
        "batch_size": cfg.batch_size,
        "device": cfg.device,
        **provenance.record(),
    }
    write_whole(folder / "run.json", json.dumps(record, indent=2).encode() + b"\n")
    sheet = draw_sheet(folder, ids)
    tracker(f"{cfg.name}-{folder.name}", record, statistics, sheet)
    rows = tables.build(cfg.name, latest_cells(folder))
    log.info("%s.md: %s", Path("results/tables") / cfg.name, tables.summary(rows))
    return folder


def enrolled(
    cfg: DictConfig, dataset_name: str, dataset: Dataset, recognizers: Mapping[str, Recognizer]
) -> tuple[list[Path], dict[str, str]]:
    """Folders with the gallery's embeddings, one a recognizer, shared by all runs; and the pictures that could not be used."""
    if not dataset.gallery:
        return [], {}
    folders: list[Path] = []
    skipped: dict[str, str] = {}
    for name, recognizer in recognizers.items():
        question = {
            "dataset": OmegaConf.to_container(cfg.dataset, resolve=True),
            "recognizer": OmegaConf.to_container(cfg.recognizers[name], resolve=True),
        }
        folders += [Path(cfg.runs) / "galleries" / f"{dataset_name}-{name}-{provenance.signature(question)}"]
        skipped |= runner.enrol(folders[-1], dataset, name, recognizer, cfg.batch_size)
    return folders, skipped


def telling(overrides: Sequence[str]) -> list[str]:
    """Of the overrides of a sweep's cell those that tell it from the others, where dataset and anonymizer do not."""

    def tells(override: str) -> bool:
        key = override.lstrip("+~").partition("=")[0]
        return key != "anonymizer" and not any(f"{key}.".startswith(f"{untold}.") for untold in UNTOLD)

    return [override for override in overrides if tells(override)]


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


def is_full_disk(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno == errno.ENOSPC


def sharded(ids: Sequence[str], shard: str) -> list[str]:
    """Every n-th id from the i-th on, for shard i/n."""
    try:
        i, n = (int(part) for part in shard.split("/"))
    except ValueError:
        raise ValueError(f"shard={shard}: expected i/n, as 1/3") from None
    if not 1 <= i <= n:
        raise ValueError(f"shard={shard}: i goes from 1 to n")
    return list(ids[i - 1 :: n])


def latest_cells(folder: Path) -> list[Path]:
    """The finished run folders beside `folder`, the latest of each dataset and anonymizer; `folder` is the latest."""
    cells: dict[tuple[str, str], Path] = {}
    for path in sorted(folder.parent.glob("*/run.json"), key=lambda path: path.stat().st_mtime):
        about = json.loads(path.read_text())
        cells[about["dataset"], about["anonymizer"]] = path.parent
    return sorted(cells.values())


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
    path = folder / "attacks.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    for view, settings in attacks.items():
        if known.get(view, settings) != settings:
            raise ValueError(
                f"{folder / view} holds pictures of this attack with other settings; rename the attack or delete it"
            )
    write_whole(path, json.dumps(known | attacks, indent=2).encode())


def own_weights(method: Any) -> list[str | None]:
    """SHA-256 of the weights that a method brings besides a diffusion model."""
    return [card.sha256 for card in method.cards()] if hasattr(method, "cards") else []


def model_name(cfg: DictConfig, choices: Mapping[str, Any]) -> str | None:
    """The diffusion model that the method runs on; None for methods without one."""
    if "backbone" not in cfg.anonymizer:
        return None
    return str(choices["backbone"] if cfg.anonymizer.backbone == cfg.backbone else cfg.anonymizer.backbone.source)


def title_notes(cfg: DictConfig, choices: dict[str, Any], pictures: int) -> list[str]:
    """What a reader of the table must know: stand-ins and reduced settings."""
    notes = [str(note) for note in cfg.notes]
    if model := model_name(cfg, choices):
        notes += [f"backbone {model}", f"mask from {choices['parser']}"]
        if (precision := cfg.anonymizer.backbone.get("precision", "fp32")) != "fp32":
            notes.append(f"network in {precision}")
    if choices["key"] == "experiment":
        notes.append("published experiment key")
    if choices["nonce"] != "per_image" and "nonces" in cfg.anonymizer:
        notes.append(f"key streams shared: nonce={choices['nonce']}")
    return [*notes, f"{pictures} pictures"] if cfg.limit is not None else notes


if __name__ == "__main__":
    torch.manual_seed(0)  # nothing here draws from it; what a library draws shall at least repeat
    main()
