"""What every experiment shares: its parts and pictures, run folders that shards fill, and one way to write a result.

begin     instantiate the parts, list everything that is missing at once, list the pictures
Session   the pictures: prepared once, enrolled once, whatever is run on them
Cell      one row of a table: what was asked, the folder that holds what came out, the shards that fill it
fill      this shard's share of a cell; the last shard to end writes the result
"""

import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from experiments.harness import preflight, provenance, results
from experiments.harness.meaning import Meanings
from experiments.harness.shards import FailedShard, Shards, numbers, one_line, sharded, until_unchanged
from experiments.harness.statistics import write_parquets
from experiments.harness.tracking import Tracker
from keyanon import runner
from keyanon.channel.whole import write_whole
from keyanon.errors import BadData
from keyanon.faces.finding import Finder
from keyanon.measures.biometrics import Statistic
from keyanon.measures.scorers import Against
from keyanon.run_folder import MASK, ORIGINAL, RunFiles, read_parts
from keyanon.types import About, Anonymizer, Dataset, FaceParser, Model, NeedsWeights, Recognizer, Scorer

log = logging.getLogger(__name__)

SHOWN_SKIPPED = 10


@dataclass(frozen=True)
class Result:
    """What a cell comes to: statistics by view and scorer, the pictures' own numbers (id, view, scorer, value), what names mean."""

    statistics: Sequence[tuple[str, str, Statistic]]
    scores: pd.DataFrame
    meanings: Meanings
    sheet: Path | None = None


@dataclass(frozen=True)
class Session:
    """A run of an experiment on a dataset's pictures, of which `mine` are this shard's.

    `command` would run it alone. `parser` finds the faces: a picture without one is skipped.
    """

    cfg: DictConfig
    choices: Mapping[str, Any]
    command: Sequence[str]
    dataset: Dataset
    parser: FaceParser
    recognizers: Mapping[str, Recognizer]
    scorers: Mapping[str, Scorer]
    tracker: Tracker
    ids: Sequence[str]

    @cached_property
    def mine(self) -> list[str]:
        return sharded(self.ids, self.cfg.shard)

    @cached_property
    def finder(self) -> Finder:
        """Which faces are on the pictures, for every part."""
        finder: Finder = instantiate(self.cfg.finder)
        return finder

    @cached_property
    def originals(self) -> RunFiles:
        """The clean pictures and the faces on them, shared by all runs on this dataset with this parser and finder."""
        question = {name: plain(self.cfg[name]) for name in ("dataset", "parser", "finder")}
        return RunFiles(self.shared("originals", self.choices["parser"], question))

    def shared(self, kind: str, name: str, question: Mapping[str, Any]) -> Path:
        """A folder that all runs share that ask the same of the same dataset, in the same place."""
        place = {"place": str(self.cfg.dataset.get("root"))}  # under another name: a signature passes over a `root`
        named = f"{self.choices['dataset']}-{name}-{provenance.signature({**question, **place})}"
        return Path(self.cfg.runs) / kind / named

    def prepare(self, ids: Sequence[str]) -> dict[str, str]:
        """Make pictures ready; returns why some of them are skipped."""
        skipped = runner.prepare(
            self.originals, self.dataset, ids, self.parser, self.cfg.batch_size, self.cfg.device, self.finder
        )
        for id, reason in list(skipped.items())[:SHOWN_SKIPPED]:
            log.warning("skipped %s: %s", id, reason)
        return skipped

    def enrol(self, ids: Sequence[str], gallery: Sequence[str] = ()) -> dict[str, Path]:
        """Folders with the embeddings of prepared pictures and of the gallery, one a recognizer, shared by all runs."""
        folders: dict[str, Path] = {}
        for name, recognizer in self.recognizers.items():
            question = {
                "dataset": plain(self.cfg.dataset),
                "recognizer": plain(self.cfg.recognizers[name]),
                "finder": plain(self.cfg.finder),
            }
            folders[name] = self.shared("embeddings", name, question)
            size, device = self.cfg.batch_size, self.cfg.device
            runner.enrol(folders[name], self.originals.load, ids, name, recognizer, size, device, self.finder)
            lost = runner.enrol(folders[name], self.dataset.load, gallery, name, recognizer, size, device, self.finder)
            for id, reason in list(lost.items())[:SHOWN_SKIPPED]:
                log.warning("not in the gallery: %s: %s", id, reason)
        return folders

    def score_originals(self, ids: Sequence[str]) -> list[Path]:
        """Folders with the originals' own scores, one a scorer, shared by all runs."""
        folders = []
        for name, scorer in self.scorers.items():
            if not isinstance(scorer, Against):
                asked = provenance.signature({"scorer": plain(self.cfg.scorers[name])})
                folders.append(self.originals.folder / "scores" / f"{name}-{asked}")
                views = dict.fromkeys((ORIGINAL, MASK), self.originals)
                size, device = self.cfg.batch_size, self.cfg.device
                runner.score(folders[-1], views, [ORIGINAL], ids, {name: scorer}, {}, {}, size, device)
        return folders

    def people(self, ids: Iterable[str]) -> list[str]:
        """Who is on each picture; a picture of nobody in particular stands for itself."""
        return [self.dataset.identity(id) or id for id in ids]

    def cell(
        self,
        row: str,
        question: Mapping[str, Any],
        notes: Sequence[str] = (),
        method: Any = None,
        measures: Mapping[str, Any] | None = None,
        ids: Sequence[str] | None = None,
    ) -> "Cell":
        """A row of the table, of the session's pictures or some of them (none: it is about no pictures).

        `question` is what decides its pictures, `measures` what else is asked of them.
        """
        asked = {
            "dataset": plain(self.cfg.dataset),
            "parser": plain(self.cfg.parser),
            "originals": self.originals.folder.name,
            **question,
            "weights": weights_of(method),
        }
        name = f"{self.choices['dataset']}-{row.replace(' ', '_')}-{provenance.signature(asked)}"
        folder = Path(self.cfg.runs) / self.cfg.name / name
        folder.mkdir(parents=True, exist_ok=True)
        ids = list(self.ids if ids is None else ids)
        _, count = numbers(self.cfg.shard)
        shards = Shards(folder, count, provenance.signature({"ids": ids, **(measures or {})}))
        return Cell(
            row,
            ids,
            folder,
            asked,
            shards,
            tuple(notes),
            method.about if isinstance(method, Anonymizer) else None,
            preflight.models(method),
        )


@dataclass(frozen=True)
class Cell:
    """One row of a table."""

    row: str
    ids: Sequence[str]
    folder: Path
    question: Mapping[str, Any]
    shards: Shards
    notes: Sequence[str] = ()
    about: About | None = None
    models: Sequence[Model] = field(default=(), repr=False)

    def evaluations(self) -> int:
        """Pictures that the cell's networks have seen so far."""
        return sum(model.evaluations.total() for model in self.models)


def begin(cfg: DictConfig, choices: Mapping[str, Any], command: Sequence[str], *parts: Any, views: int = 4) -> Session:
    """The session of a run, if nothing is missing that it needs: weights of its `parts`, pictures, disk for so many `views`."""
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    # "all": plain containers, or OmegaConf would take the dataclasses in them for structured configs
    parser, recognizers, scorers = (
        instantiate(cfg.get(group, {}), _convert_="all") for group in ("parser", "recognizers", "scorers")
    )
    tracker: Tracker = instantiate(cfg.wandb)
    problems = preflight.missing_parts(*parts, parser, recognizers, scorers)
    dataset = preflight.open_dataset(cfg.dataset, choices["dataset"], problems)
    session = None
    if dataset is not None:
        ids = list(dataset.ids[: cfg.limit])
        session = Session(cfg, choices, command, dataset, parser, recognizers, scorers, tracker, ids)
        problems += preflight.missing_disk(Path(cfg.runs), len(session.mine), views, cfg.dataset.size)
    preflight.stop_if(problems)
    assert session is not None
    return session


def fill(
    session: Session,
    cell: Cell,
    work: Callable[[Sequence[str]], None],
    conclude: Callable[[Sequence[str]], Result | None],
) -> bool:
    """Do this shard's `work` on a cell, and write the result if no other shard is still to do that; whether it was written.

    `work` gets this shard's prepared pictures, `conclude` those of all shards that are done; it gives nothing if these are too few.
    """
    log.info("%s: %d pictures", cell.folder, len(cell.ids))
    mine = sharded(cell.ids, session.cfg.shard)
    written: list[bool] = []

    def publish_if_last() -> None:
        """Of the shards that are done, if none is running. Shards that end at once all write it: the same."""
        until_unchanged(cell.shards.closed, lambda done: written.append(publish(session, cell, conclude, done)))

    try:
        with cell.shards.recorded(session.cfg.shard) as status:
            started = time.monotonic()
            skipped = session.prepare(mine)
            work([id for id in mine if id not in skipped])
            status |= {"pictures": len(mine), "skipped": len(skipped), "seconds": time.monotonic() - started}
    except Exception as error:
        try:
            publish_if_last()
        except Exception:  # the shard's own failure is what a user has to read
            log.warning("%s: no table of the shards that are done", cell.folder, exc_info=True)
        if cell.shards.count == 1:
            raise
        raise FailedShard(f"shard {session.cfg.shard}: {one_line(error)}", cell.shards, session.command) from error
    publish_if_last()
    for line in cell.shards.unfinished(session.command):
        log.warning(line)
    return any(written)


def publish(
    session: Session, cell: Cell, conclude: Callable[[Sequence[str]], Result | None], done: Sequence[str]
) -> bool:
    """Write a cell's result, of its shards that are `done`, and the table of all cells; whether there was one to write."""
    if not done:
        return False
    cfg, folder, statuses = session.cfg, cell.folder, cell.shards.read()
    there = {id for shard in done for id in sharded(cell.ids, shard)}
    skipped = session.originals.skipped() if cell.ids else {}
    ids = [id for id in cell.ids if id in there and id not in skipped]
    if there and not ids:
        first = next(id for id in cell.ids if id in there)
        raise BadData(f"none of the {len(there)} pictures could be used; the first, {first}: {skipped[first]}")
    RunFiles(folder).list_skipped({id: skipped[id] for id in cell.ids if id in there and id in skipped})
    log.info("%d of %d pictures skipped, all listed in %s", len(there) - len(ids), len(there), folder / "skipped.csv")
    if (result := conclude(ids)) is None:
        return False
    statistics = write_parquets(folder, result.statistics, result.scores)
    lacking = [f"{shard} ({status['state']})" for shard, status in statuses.items() if shard not in done]
    record = {
        "experiment": cfg.name,
        "dataset": session.choices["dataset"],
        "anonymizer": cell.row,
        "title_notes": list(dict.fromkeys([*cell.notes, *pictures_notes(cfg, len(there), lacking)])),
        "question": cell.question,
        **({"about": asdict(cell.about)} if cell.about is not None else {}),
        "seconds": sum(statuses[shard]["seconds"] for shard in done),
        "pictures": len(ids),
        "batch_size": cfg.batch_size,
        "device": torch.device(cfg.device).type,
        **provenance.record(),
    }
    write_whole(folder / "meanings.csv", result.meanings.csv())
    write_whole(folder / "run.json", json.dumps(record, indent=2).encode() + b"\n")
    session.tracker(f"{cfg.name}-{folder.name}", record, statistics, result.sheet)
    # Cells of a sweep may end at once as well.
    until_unchanged(lambda: latest_cells(folder.parent), lambda cells: results.build(cfg.name, sorted(cells)))
    return True


def latest_cells(folder: Path) -> dict[Path, int]:
    """The finished cells of an experiment, the latest of each dataset and row, and when they were finished."""
    cells: dict[tuple[str, str], tuple[int, Path]] = {}
    for when, path in sorted((path.stat().st_mtime_ns, path) for path in folder.glob("*/run.json")):
        about = json.loads(path.read_text())
        cells[about["dataset"], about["anonymizer"]] = when, path.parent
    return {path: when for when, path in cells.values()}


def pictures_notes(cfg: DictConfig, pictures: int, lacking: Sequence[str]) -> list[str]:
    """What a reader must know if not all pictures are in the table."""
    notes = [f"{pictures} pictures"] if pictures and (cfg.limit is not None or lacking) else []
    return [*notes, f"without the shards {', '.join(lacking)}"] if lacking else notes


def stand_in_notes(backbone: DictConfig) -> list[str]:
    """Whether the model is a small one of this project in the place of the paper's."""
    return ["bundled model, which stands in for LDM-FFHQ"] if backbone.source.startswith("bundled:") else []


def model_notes(backbone: DictConfig | None, name: str, parser: str) -> list[str]:
    """The diffusion model and what found the faces; nothing for methods without a model."""
    if backbone is None:
        return []
    notes = [f"backbone {name}", f"mask from {parser}"]
    precision = backbone.get("precision", "fp32")
    return notes if precision == "fp32" else [*notes, f"network in {precision}"]


def weights_of(method: Any) -> list[str | None]:
    """SHA-256 of the weights that a method runs on."""
    own = [card.sha256 for card in method.cards()] if isinstance(method, NeedsWeights) else []
    return [model.sha256 for model in preflight.models(method)] + own


def scores_of(folder: Path, ids: Sequence[str]) -> pd.DataFrame:
    """The numbers of some pictures that a folder's parts hold: id, view, scorer, value."""
    scores: pd.DataFrame = read_parts(folder / "scores").to_pandas()
    return scores[scores["id"].isin(set(ids))]


def plain(node: Any) -> Any:
    """A part of the configuration as plain containers, resolved."""
    return OmegaConf.to_container(node, resolve=True)


def show(session: Session, cells: Sequence[Cell]) -> None:
    """Print the table, and what each of its new rows ran on."""
    print(Path("results/tables", f"{session.cfg.name}.md").read_text("utf-8"))
    for cell in cells:
        sheet = cell.folder / "contact_sheet.png"
        if sheet.exists():
            print(f"pictures side by side: {sheet}")
        about = json.loads((cell.folder / "run.json").read_text("utf-8"))
        where = f"{session.cfg.device} ({about['processor']}, {about['threads']} threads), torch {about['packages']['torch']}"
        what = f"{about['pictures']} pictures of {about['dataset']} by {about['anonymizer']}"
        model = next((note for note in cell.notes if note.startswith("backbone ")), "")
        print(f"ran on: {what}{model and f', {model}'}; {where}; {about['seconds']:.0f} s")
