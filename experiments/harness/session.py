"""What every experiment shares: its parts and pictures, run folders that shards fill, and one way to write a result.

begin     instantiate the parts, list everything that is missing at once, list the pictures
Session   the pictures: prepared once, enrolled once, whatever is run on them
Cell      one row of a table: what was asked, the folder that holds what came out, the shards that fill it
fill      this shard's share of a cell; the last shard to end writes the result
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from omegaconf import DictConfig, OmegaConf

from experiments.harness import estimate, preflight, provenance, results
from experiments.harness.made import made
from experiments.harness.meaning import Meanings
from experiments.harness.names import file_name
from experiments.harness.protocol import measured_by
from experiments.harness.shards import FailedShard, Incomplete, Shards, numbers, one_line, sharded, until_unchanged
from experiments.harness.statistics import write_parquets
from experiments.harness.tracking import Tracker, shown_outside
from keyanon import runner
from keyanon.attacks.case import Pairs
from keyanon.channel.whole import write_whole
from keyanon.diffusion.solvers import Solver
from keyanon.errors import BadData
from keyanon.faces.finding import Finder
from keyanon.faces.layouts import IN_SUBFOLDERS, OF_OTHER_KINDS
from keyanon.faces.renaming import Renamed
from keyanon.measures.biometrics import Statistic
from keyanon.measures.scorers import Against
from keyanon.parts import Damaged
from keyanon.run_folder import MASK, ORIGINAL, RunFiles
from keyanon.settings import device_of
from keyanon.sources import Digests, combined
from keyanon.types import (
    About,
    Anonymizer,
    Dataset,
    FaceParser,
    Model,
    Picture,
    ReadsFiles,
    Recognizer,
    Scorer,
    SetScorer,
    is_benchmark,
    notes_of,
    passed_over,
    probes_of,
)

log = logging.getLogger(__name__)

SHOWN_SKIPPED = 10
SHOWN_DIFFERENCES = 5
OUTDATED = "outdated"  # files of a cell that are of no picture of today


@dataclass(frozen=True)
class Result:
    """What a cell comes to: statistics by view and scorer, the pictures' own numbers (id, view, scorer, value), what names mean."""

    statistics: Sequence[tuple[str, str, Statistic]]
    scores: pd.DataFrame
    meanings: Meanings
    sheets: Mapping[str, Path] = field(default_factory=dict)  # pictures side by side: "all" views, or "anonymized" ones
    pairs: Sequence[Pairs] = ()  # of which some of the statistics are made


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
    set_scorers: Mapping[str, SetScorer]
    tracker: Tracker
    ids: Sequence[str]

    @cached_property
    def protocol(self) -> str:
        """What numbers are made by, as tables name it."""
        return measured_by(self.cfg, self.choices)

    @cached_property
    def mine(self) -> list[str]:
        return sharded(self.ids, self.cfg.shard)

    @cached_property
    def finder(self) -> Finder:
        """Which faces are on the pictures, for every part."""
        finder: Finder = made(self.cfg, "finder")
        return finder

    @cached_property
    def contents(self) -> dict[str, str]:
        """What the pictures' files hold today, by id, of those that have been looked at."""
        return {}

    @cached_property
    def digests(self) -> Digests:
        return Digests(Path(self.cfg.runs) / "contents")

    @cached_property
    def originals(self) -> RunFiles:
        """The clean pictures and the faces on them, shared by all runs on this dataset with this parser, wherever it lies."""
        return RunFiles(self._originals, self.contents, self.made_by, apart=True)

    @cached_property
    def _originals(self) -> Path:
        return self.shared("originals", self.choices["parser"], {"parser": plain(self.cfg.parser)}, self.parser)

    @cached_property
    def made_by(self) -> dict[str, str]:
        """A signature of what each scorer and recognizer is made of."""
        parts = {"scorers": {**self.scorers, **self.set_scorers}, "recognizers": self.recognizers}
        return {
            name: provenance.signature(self.made_of({group: plain(self.cfg[group][name])}, part))
            for group, named in parts.items()
            for name, part in named.items()
        }

    def shared(self, kind: str, name: str, settings: Mapping[str, Any], part: Any) -> Path:
        """A folder that all runs share that ask the same part, with the same settings, of the same dataset."""
        whole = {"dataset": plain(self.cfg.dataset), **settings}
        asked = provenance.signature(self.made_of(whole, self.dataset, part))
        plain_name = file_name(f"{self.choices['dataset']}-{name}")
        return Path(self.cfg.runs) / kind / f"{plain_name}-{asked}"

    def made_of(self, settings: Mapping[str, Any], *parts: Any) -> dict[str, Any]:
        """What decides the outcome of parts that look for faces."""
        return provenance.made_of({**settings, "finder": plain(self.cfg.finder)}, *parts, self.finder)

    def identify(self, ids: Sequence[str]) -> dict[str, str]:
        """Look at what the pictures' files hold today; returns why some cannot be told."""
        return runner.identify(self.contents, self.digests, self.dataset, ids)

    def identify_known(self, ids: Sequence[str]) -> None:
        """As far as no file has to be read for it."""
        runner.identify(self.contents, self.digests, self.dataset, ids, unread=False)

    def prepare(self, ids: Sequence[str]) -> dict[str, str]:
        """Make pictures ready; returns why some of them are skipped."""
        size, device = self.cfg.batch_size, self.cfg.device
        skipped = runner.prepare(
            self.originals, self.contents, self.digests, self.dataset, ids, self.parser, size, device, self.finder
        )
        for id, reason in list(skipped.items())[:SHOWN_SKIPPED]:
            log.warning("skipped %s: %s", id, reason)
        if skipped:
            log.warning("%d of %d pictures skipped", len(skipped), len(ids), extra={"skipped": len(skipped)})
        return skipped

    def enrol(self, ids: Sequence[str], gallery: Sequence[str] = ()) -> dict[str, RunFiles]:
        """Embed prepared pictures and the gallery: where that is kept, by recognizer, shared by all runs.

        With them goes every other clean picture that is compared.
        """
        lost = self.identify([id for id in gallery if id not in self.contents])
        gallery = [id for id in gallery if id not in lost]

        def load(id: str) -> Picture:
            return runner.load_as(self.dataset, id, self.contents[id], self.digests)

        enrolled: dict[str, RunFiles] = {}
        for name, recognizer in self.recognizers.items():
            settings = {"recognizer": plain(self.cfg.recognizers[name])}
            enrolled[name] = files = RunFiles(self.shared("embeddings", name, settings, recognizer), self.contents)
            size, device = self.cfg.batch_size, self.cfg.device
            runner.enrol(files, self.originals.load, ids, name, recognizer, size, device, self.finder)
            lost |= runner.enrol(files, load, gallery, name, recognizer, size, device, self.finder)
        for id, reason in list(lost.items())[:SHOWN_SKIPPED]:
            log.warning("not compared: %s: %s", id, reason, extra={"skipped": 1})
        return enrolled

    def look_at_originals(self, ids: Sequence[str]) -> dict[str, RunFiles]:
        """What measures of whole sets see in prepared pictures: where that is kept, by measure, shared by all runs."""
        seen: dict[str, RunFiles] = {}
        for name, scorer in self.set_scorers.items():
            settings = {"scorer": plain(self.cfg.scorers[name])}
            seen[name] = files = RunFiles(self.shared("features", name, settings, scorer), self.contents)
            runner.enrol(files, self.originals.load, ids, name, scorer, self.cfg.batch_size, self.cfg.device)
        return seen

    def look_at_views(self, cell: "Cell", ids: Sequence[str]) -> dict[str, RunFiles]:
        """The same of all views of a cell."""
        seen: dict[str, RunFiles] = {}
        for name, scorer in self.set_scorers.items():
            seen[name] = files = replace(cell.files, folder=cell.folder / "features" / name)
            for view in cell.files.views():
                load = partial(cell.files.load, view=view)
                size, device = self.cfg.batch_size, self.cfg.device
                runner.enrol(files, load, ids, name, scorer, size, device, view=view)
        return seen

    def score_originals(self, ids: Sequence[str]) -> None:
        """The originals' own scores, shared by all runs."""
        alone = {name: scorer for name, scorer in self.scorers.items() if not isinstance(scorer, Against)}
        views = dict.fromkeys((ORIGINAL, MASK), self.originals)
        size, device = self.cfg.batch_size, self.cfg.device
        runner.score(self.originals, views, [ORIGINAL], ids, alone, {}, {}, size, device)

    def listed(self, ids: Iterable[str]) -> list[str]:
        """Pictures of the run, each as often as the dataset counts it."""
        asked = set(ids)
        return [id for id in probes_of(self.dataset)[: self.cfg.limit] if id in asked]

    def people(self, ids: Iterable[str]) -> list[str]:
        """Who is on each picture; a picture of nobody in particular stands for itself."""
        return [self.dataset.identity(id) or id for id in ids]

    def cell(
        self,
        row: str,
        settings: Mapping[str, Any],
        notes: Sequence[str] = (),
        method: Any = None,
        measures: Mapping[str, Any] | None = None,
        ids: Sequence[str] | None = None,
        made_by: Mapping[str, str] | None = None,
    ) -> "Cell":
        """A row of the table, of the session's pictures or some of them (none: it is about no pictures).

        `settings` and `method` decide its pictures, `measures` what else is asked of them. `made_by` has signatures of what makes
        some of its views.
        """
        asked = {
            "dataset": plain(self.cfg.dataset),
            "parser": plain(self.cfg.parser),
            "protocol": plain(self.cfg.protocol),
            "originals": self._originals.name,
            **provenance.made_of(settings, method),
        }
        plain_name = file_name(f"{self.choices['dataset']}-{row}")
        name = f"{plain_name}-{provenance.signature(asked)}"
        folder = Path(self.cfg.runs) / self.cfg.name / name
        folder.mkdir(parents=True, exist_ok=True)
        ids = list(self.ids if ids is None else ids)
        _, count = numbers(self.cfg.shard)
        readers = [part for part in preflight.walk(method) if isinstance(part, ReadsFiles)]
        contents = WithFiles(self.contents, self.digests, readers) if readers else self.contents
        made_by = {**self.made_by, **(made_by or {})}
        shards = Shards(folder, count, provenance.signature({"ids": ids, "by": made_by, **(measures or {})}))
        return Cell(
            row,
            ids,
            folder,
            asked,
            shards,
            contents,
            made_by,
            tuple(notes),
            method.about if isinstance(method, Anonymizer) else None,
            preflight.models(method),
            getattr(method, "solver", None),
        )


@dataclass(frozen=True)
class WithFiles(Mapping[str, str]):
    """What pictures hold, with the files that parts of a method read for each."""

    contents: Mapping[str, str]
    digests: Digests
    readers: Sequence[ReadsFiles]

    def __getitem__(self, id: str) -> str:
        sources = [source for reader in self.readers for source in reader.sources(id)]
        return combined([self.contents[id], *map(self.digests.of, sources)])

    def __iter__(self) -> Iterator[str]:
        return iter(self.contents)

    def __len__(self) -> int:
        return len(self.contents)


@dataclass(frozen=True)
class Cell:
    """One row of a table."""

    row: str
    ids: Sequence[str]
    folder: Path
    question: Mapping[str, Any]
    shards: Shards
    contents: Mapping[str, str]
    made_by: Mapping[str, str]
    notes: Sequence[str] = ()
    about: About | None = None
    models: Sequence[Model] = field(default=(), repr=False)
    solver: Solver | None = None

    @property
    def files(self) -> RunFiles:
        """What its folder holds of today's pictures."""
        return RunFiles(self.folder, self.contents, self.made_by)

    def evaluations(self) -> int:
        """Pictures that the cell's networks have seen so far."""
        return sum(model.evaluations.total() for model in self.models)


def begin(
    cfg: DictConfig, choices: Mapping[str, Any], command: Sequence[str], *parts: Any, known_key: str | None = None
) -> Session:
    """The session of a run, if nothing is missing that it needs: weights of its `parts`, pictures.

    `known_key` says what to do about it that anyone can compute the key; None where that is not so, or no picture is published.
    """
    cfg.device = device_of(cfg.device)
    if (threads := estimate.threads(cfg.device, cfg.threads)) is not None:
        torch.set_num_threads(threads)
    made(cfg, "protocol")  # checked, whatever takes its choices
    parser: FaceParser = made(cfg, "parser")
    recognizers: dict[str, Recognizer] = made(cfg, "recognizers")
    all_scorers: dict[str, Scorer | SetScorer] = made(cfg, "scorers")
    tracker: Tracker = made(cfg, "wandb")
    problems = preflight.missing_card(cfg.device)
    problems += preflight.missing_parts(*parts, parser, recognizers, all_scorers, tracker)
    problems += preflight.wrong_sizes(cfg.dataset.size, *parts)
    problems += preflight.passwords_handed_on(cfg.get("key"), *parts)
    dataset = preflight.open_dataset(cfg, choices["dataset"], problems)
    preflight.stop_if(problems)
    assert dataset is not None
    if known_key is not None and not is_benchmark(dataset):
        log.warning(
            "anyone can compute the key of this run (key=experiment), and its pictures are no benchmark's: it protects nobody; %s",
            known_key,
        )
    tell_passed_over(dataset)
    ids = list(dict.fromkeys(probes_of(dataset)[: cfg.limit]))
    if cfg.batch_size is None:
        cfg.batch_size = estimate.batch_size(cfg.device, len(ids))
    of_sets = {name: scorer for name, scorer in all_scorers.items() if isinstance(scorer, SetScorer)}
    scorers = {name: scorer for name, scorer in all_scorers.items() if not isinstance(scorer, SetScorer)}
    return Session(cfg, choices, command, dataset, parser, recognizers, scorers, of_sets, tracker, ids)


def tell_passed_over(dataset: Dataset) -> None:
    """Say what a dataset's folder holds besides its pictures; pictures that nobody left out on purpose count as skipped."""
    for kind, count in passed_over(dataset).items():
        log.warning(
            "not read: %d %s",
            count,
            kind,
            extra={"skipped": count if kind.startswith((IN_SUBFOLDERS, OF_OTHER_KINDS)) else 0},
        )


def fill(
    session: Session,
    cell: Cell,
    work: Callable[[Sequence[str]], None],
    conclude: Callable[[Sequence[str]], Result | None],
    views: Sequence[str] = (),
    passes: int = 0,
) -> bool:
    """Do this shard's `work` on a cell, and write the result if no other shard is still to do that; whether it was written.

    `work` gets this shard's prepared pictures, `conclude` those of all shards that are done; it gives nothing if these are too few,
    and raises Incomplete where rows or files of other shards are lost. `views` is what the work writes, for which the disk has to
    have room. `passes` is how often each picture goes through the method, for the estimate of the time; 0 where nobody knows.
    """
    log.info("%s: %d pictures", cell.folder, len(cell.ids))
    for line in rows_replaced(session, cell):
        log.warning(line)
    mine = sharded(cell.ids, session.cfg.shard)
    preflight.stop_if(missing_disk(session, cell, mine, views))
    if passes and not begun_after_estimate(session, cell, to_make(cell, mine, views), passes):
        return False
    written: list[bool] = []

    def publish_if_last() -> None:
        """Of the shards that are done, if none is running. Shards that end at once all write it: the same."""
        until_unchanged(
            cell.shards.closed, lambda done: written.append(publish_complete(session, cell, conclude, done))
        )

    try:
        with cell.shards.recorded(session.cfg.shard) as status:
            started, before = time.monotonic(), parts_in(cell.folder)
            skipped = session.prepare(mine)
            work([id for id in mine if id not in skipped])
            # What was made stays as it was made, and so does the time that it took.
            status["seconds"] += time.monotonic() - started if parts_in(cell.folder) != before else 0
            status |= {"pictures": len(mine), "skipped": len(skipped)}
    except Damaged:
        raise
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


def to_make(cell: Cell, ids: Sequence[str], views: Sequence[str]) -> list[str]:
    """Of some pictures those that lack a view; of a cell that writes no views, those that are not measured yet."""
    if views:
        return [id for id in ids if not all(cell.files.has(view, id) for view in views)]
    done = cell.files.measured()
    return [id for id in ids if id not in done]


def begun_after_estimate(session: Session, cell: Cell, left: Sequence[str], passes: int) -> bool:
    """Say how long the pictures `left` take; False where no more was asked. Exits where it is too long; says nothing of a few."""
    only = session.cfg.estimate_only
    if not only and len(left) <= estimate.FEW:
        return True
    expected = estimate.measured(session, cell, left, passes)
    if only:
        print(f"{session.cfg.name}, {cell.row} of {session.choices['dataset']}: {expected}")
        return False
    log.info("%s: %s", cell.folder, expected)
    preflight.stop_if(expected.too_long(session.cfg.device, session.cfg.long))
    return True


def missing_disk(session: Session, cell: Cell, ids: Sequence[str], views: Sequence[str]) -> list[str]:
    """A message if there is no room for the files that are still to be written."""
    session.identify_known(ids)
    originals, files = session.originals, cell.files
    left = sum(not originals.has(view, id) for view in (ORIGINAL, MASK) for id in ids)
    left += sum(not files.has(view, id) for view in views for id in ids)
    return preflight.missing_disk(Path(session.cfg.runs), left, session.cfg.dataset.size)


def parts_in(folder: Path) -> set[Path]:
    """What a cell has taken down so far."""
    return set(folder.rglob("*.parquet")) - {folder / name for name in results.KEPT}


def publish_complete(
    session: Session, cell: Cell, conclude: Callable[[Sequence[str]], Result | None], done: Sequence[str]
) -> bool:
    """As `publish`; a shard of which something is lost counts as missing from now on. Raises Incomplete if it is this one."""
    try:
        return publish(session, cell, conclude, done)
    except Incomplete as lost:
        for shard in done:
            if here := set(lost.ids) & set(sharded(cell.ids, shard)):
                log.warning("%s: shard %s has not all it made of %d pictures", cell.folder, shard, len(here))
                cell.shards.path(shard).unlink(missing_ok=True)
        if set(lost.ids) & set(sharded(cell.ids, session.cfg.shard)):
            raise
        return False


def publish(
    session: Session, cell: Cell, conclude: Callable[[Sequence[str]], Result | None], done: Sequence[str]
) -> bool:
    """Write a cell's result, of its shards that are `done`, and the table of all cells; whether there was one to write."""
    if not done:
        return False
    cfg, folder, statuses = session.cfg, cell.folder, cell.shards.read()
    asked = {id for shard in done for id in sharded(cell.ids, shard)}
    there = [id for id in cell.ids if id in asked]
    originals = session.originals
    originals.reread()  # what other shards have prepared since
    skipped = session.identify(there) | originals.skipped()
    ids = [id for id in there if id not in skipped]
    if unprepared := [id for id in ids if not originals.has(ORIGINAL, id)]:
        raise Incomplete(unprepared)
    if there and not ids:
        raise BadData(f"none of the {len(there)} pictures could be used; the first, {there[0]}: {skipped[there[0]]}")
    RunFiles(folder).list_skipped({id: skipped[id] for id in there if id in skipped})
    log.info("%d of %d pictures skipped, all listed in %s", len(there) - len(ids), len(there), folder / "skipped.csv")
    if (result := conclude(ids)) is None:
        return False
    of_pictures = combined(f"{id} {cell.contents[id]}" for id in ids)
    for line in [*pictures_replaced(cell, of_pictures), *moved_aside(session, cell, there, skipped)]:
        log.warning(line)
    statistics = write_parquets(folder, result.statistics, result.scores, result.pairs)
    dataset_notes = notes_of(session.dataset) if there else []
    lacking = [f"{shard} ({status['state']})" for shard, status in statuses.items() if shard not in done]
    record = {
        "experiment": cfg.name,
        "dataset": session.choices["dataset"],
        "protocol": session.protocol,
        "anonymizer": cell.row,
        "title_notes": list(dict.fromkeys([*cell.notes, *dataset_notes, *pictures_notes(cfg, len(there), lacking)])),
        "question": cell.question,
        **({"about": asdict(cell.about)} if cell.about is not None else {}),
        "seconds": sum(statuses[shard]["seconds"] for shard in done),
        "costs": cell.files.costs(ids),
        "pictures": len(ids),
        "contents": of_pictures,
        "made_by": cell.made_by,
        "finished": time.time_ns(),
        "batch_size": cfg.batch_size,
        "device": torch.device(cfg.device).type,
        **provenance.record(),
    }
    write_whole(folder / "meanings.csv", result.meanings.csv())
    results.write_about(folder, record)
    place = folder.parent
    # Cells of a sweep may end at once as well.
    until_unchanged(
        lambda: results.latest_cells(place),
        lambda cells: results.build(str(cfg.name), sorted(cells), place, results.PAPER),
    )
    track(session, cell, record, statistics, result)
    return True


def pictures_replaced(cell: Cell, of_pictures: str) -> list[str]:
    """A line if the row was of other pictures before."""
    if not (cell.folder / "run.json").is_file():
        return []
    before = results.read_about(cell.folder)
    same = before.get("contents") == of_pictures
    return [] if same else [f"{cell.folder}: was of other pictures ({before['pictures']}), whose results it replaces"]


def moved_aside(session: Session, cell: Cell, there: Sequence[str], skipped: Mapping[str, str]) -> list[str]:
    """Move the files of pictures that are gone, changed or skipped out of the views; a line if there are any.

    Those of pictures that were not asked for this time stay.
    """
    files, asked, moved = cell.files, set(there), 0
    named = {files.path("", id).name: id for id in session.dataset.ids}
    for view in files.views():
        for path in sorted((cell.folder / view).glob("*.png")):
            id = named.get(path.name)
            if id is None or (id in asked and (id in skipped or not files.has(view, id))):
                (cell.folder / OUTDATED / view).mkdir(parents=True, exist_ok=True)
                path.replace(cell.folder / OUTDATED / view / path.name)
                moved += 1
    return (
        [f"{moved} files of pictures that are gone or skipped now: moved to {cell.folder / OUTDATED}"] if moved else []
    )


def track(session: Session, cell: Cell, record: Mapping[str, Any], statistics: pd.DataFrame, result: Result) -> None:
    """Mirror a finished cell. The tracker's failure is told and costs nothing else: the table is written by now."""
    sheet = result.sheets.get(shown_outside(session.tracker.pictures, session.dataset))
    try:
        session.tracker(f"{session.cfg.name}-{cell.folder.name}", record, statistics, sheet)
    except Exception as error:
        log.warning(
            "%s: not mirrored by %s: %s; the table is written. To mirror it, start the same command again, or take wandb=off",
            cell.folder, type(session.tracker).__name__, one_line(error),
        )  # fmt: skip
        log.debug("", exc_info=True)


def rows_replaced(session: Session, cell: Cell) -> list[str]:
    """A line if the table has this row from another folder, of other settings, whose place this cell takes."""
    taken = []
    for folder in results.latest_cells(cell.folder.parent):
        about = results.read_about(folder)
        row = {"dataset": session.choices["dataset"], "protocol": session.protocol, "anonymizer": cell.row}
        if folder != cell.folder and results.row_of(about) == row:
            now, then = flat(cell.question), flat(about["question"])
            names = [name for name in {**now, **then} if now.get(name) != then.get(name)]
            told = ", ".join(f"{name} {then.get(name)} -> {now.get(name)}" for name in names[:SHOWN_DIFFERENCES])
            taken.append(
                f"the row {cell.row} of {session.choices['dataset']} in the table {session.cfg.name} was {folder}, and will be "
                f"{cell.folder}: {told}. To keep both rows, name this run (name=...) or sweep over the setting (-m)"
            )
    return taken


def flat(node: Any, name: str = "") -> dict[str, Any]:
    """The leaves of nested mappings, by their paths, as solver.steps."""
    if not isinstance(node, Mapping):
        return {name: node}
    return {
        path: leaf for key, value in node.items() for path, leaf in flat(value, f"{name}.{key}".lstrip(".")).items()
    }


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


def plain(node: Any) -> Any:
    """A part of the configuration as plain containers, resolved."""
    return OmegaConf.to_container(node, resolve=True)


def show(session: Session, cells: Sequence[Cell]) -> None:
    """Print the table, and what each of its new rows ran on."""
    table = Path(session.cfg.runs, str(session.cfg.name), "tables", f"{session.cfg.name}.md")
    print(table.read_text("utf-8"))
    print(f"table: {table}")
    if isinstance(session.dataset, Renamed):
        print(f"names: {session.dataset.table} says which picture is whose; keep it to yourself")
    for cell in cells:
        sheet = cell.folder / "contact_sheet.png"
        if sheet.exists():
            print(f"pictures side by side: {sheet}")
        about = results.read_about(cell.folder)
        where = f"{session.cfg.device} ({about['processor']}, {about['threads']} threads), torch {about['packages']['torch']}"
        what = f"{about['pictures']} pictures of {about['dataset']} by {about['anonymizer']}"
        model = next((note for note in cell.notes if note.startswith("backbone ")), "")
        print(f"ran on: {what}{model and f', {model}'}; {where}; {about['seconds']:.0f} s")
