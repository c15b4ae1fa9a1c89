"""What is kept of results, and the tables made of it.

    run folders --collect--> scores/<experiment>.parquet
    scores + results/paper/<experiment>.yaml --table--> tables/<experiment>.{md,tex,csv}
    run folders --> scores/<experiment>.pairs.parquet                (scores of pairs, of which experiments.pairs makes cells again)
    pairs --> plots/<experiment>.wrong_keys.svg                      (cosines under wrong keys beside those of others)
    run folders --> scores/<experiment>.meanings.csv                 (what its names mean, as declared)
    run folders --> scores/<experiment>.costs.csv --> tables/<experiment>.costs.md    (of one machine)

A run writes them below its own results/runs/<experiment>. Those of results/ itself are committed: only
`python -m experiments.tables <experiment> --runs ...` writes these.

A table is a pure function of its scores and the paper's numbers. The CSV has every cell, one a row; Markdown and LaTeX show the
same cells as a paper would: anonymizers and views down, scorers across, our number with its interval, the paper's with its verdict
below.
"""

import json
import operator
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import pandas as pd
from tabulate import tabulate

from experiments.harness.command import CHECKOUT
from experiments.harness.frames import csv_of
from experiments.harness.layout import BITS, METHODS, celled, latex, markdown, sections, titles
from experiments.harness.meaning import Meanings, read_meanings
from experiments.harness.paper import CELL, Reference, read_paper
from experiments.harness.plots import BESIDE_WRONG_KEYS, wrong_key_curves
from experiments.harness.protocol import OURS
from experiments.harness.provenance import PRESENTATION
from experiments.harness.statistics import PAIRS, read_frame
from keyanon.channel.whole import write_whole
from keyanon.errors import BadData, MissingData
from keyanon.parts import Damaged, digest
from keyanon.settings import fits

RESULTS = CHECKOUT / "results"  # wherever a command is started
PAPER = RESULTS / "paper"
# Of a finished run, besides run.json, which has their digests.
KEPT = ("statistics.parquet", "scores.parquet", "pairs.parquet", "meanings.csv")
PAIRS_AT_ONCE = 100_000  # rows of pairs that share a dictionary in a file: few enough to be of few comparisons
PATIENCE = 20  # tenths of a second
ROW = CELL[:3]  # what tells the rows of a table apart
STATISTICS = ["experiment", *ROW, "notes", *CELL[3:], "n", "undefined", "value", "low", "high"]
COSTS = [*ROW, "view", "pictures", "seconds", "evaluations", "device", "processor", "threads"]
SCORES = [*ROW, "id", "view", "scorer", "value"]
KEPT_COLUMNS = {  # of a run
    "statistics": [*CELL[3:], "n", "undefined", "value", "low", "high"],
    "scores": SCORES[3:],
    "pairs": PAIRS,
}
ABOUT = {
    "dataset": str,
    "protocol": str,
    "anonymizer": str,
    "title_notes": list[str],
    "files": dict[str, str],
}  # what run.json has at least
TIDY = ["experiment", *CELL, "n", "undefined", "ours", "ci_low", "ci_high", "paper", "tolerance", "verdict"]


def build(
    experiment: str, runs: Sequence[Path] = (), results: Path = RESULTS, paper_numbers: Path | None = None
) -> pd.DataFrame:
    """Keep the scores of `runs` below `results`, if any are given, then write the experiment's tables from what is kept.

    `paper_numbers` is the folder of the paper's, results/paper if None.
    """
    numbers = results / "paper" if paper_numbers is None else paper_numbers
    scores, references = results / "scores" / f"{experiment}.parquet", numbers / f"{experiment}.yaml"
    if runs:
        commit(experiment, collect(runs, experiment), collect_scores(runs), collect_meanings(runs), results)
    if not scores.is_file() and not references.is_file():
        raise MissingData(
            f"{experiment}: neither {scores} nor {references} exists; "
            f"run `python -m experiments.run experiment={experiment}`"
        )
    statistics = read_frame(scores, STATISTICS) if scores.is_file() else pd.DataFrame(columns=STATISTICS)
    paper = read_paper(references) if references.is_file() else []
    path = results / "scores" / f"{experiment}.methods.csv"
    if runs and not (found := collect_methods(runs)).empty:
        write_whole(path, csv_of(found), public=True)
    methods = read_frame(path, METHODS, dtype=BITS) if path.is_file() else pd.DataFrame(columns=METHODS)
    path = results / "scores" / f"{experiment}.pairs.parquet"
    if runs and not (compared := collect_pairs(runs)).empty:
        write_whole(
            path, compared.to_parquet(index=False, compression="zstd", row_group_size=PAIRS_AT_ONCE), public=True
        )
    if path.is_file():
        views = [view for views, _ in BESIDE_WRONG_KEYS.values() for view in views]
        compared = read_frame(path, [*ROW, *PAIRS], filters=[("view", "in", views)])
        wrong_key_curves(compared, results / "plots" / f"{experiment}.wrong_keys.svg")
    path = results / "scores" / f"{experiment}.costs.csv"
    if runs and not (spent := collect_costs(runs)).empty:
        write_whole(path, csv_of(spent, float_format="%.4g"), public=True)
    costs = read_frame(path, COSTS) if path.is_file() else pd.DataFrame(columns=COSTS)
    if not costs.empty:
        write_costs(experiment, costs, results)
    meanings = read_meanings(numbers / "meanings.csv") if paper else Meanings()
    meanings |= read_meanings(results / "scores" / f"{experiment}.meanings.csv")
    rows = table(statistics, paper, experiment)
    if rows.empty:
        write_nothing(experiment, rows, results / "tables")
        return rows
    write(rows, titles(rows, statistics), paper, methods, costs, meanings, results / "tables")
    return rows


def commit(
    experiment: str, statistics: pd.DataFrame, scores: pd.DataFrame, meanings: Meanings, results: Path = RESULTS
) -> None:
    """Write what a table is made from, with the columns STATISTICS and SCORES."""
    (results / "scores").mkdir(parents=True, exist_ok=True)
    for table, suffix in ((statistics, "parquet"), (scores, "scores.parquet")):
        write_whole(results / "scores" / f"{experiment}.{suffix}", table.to_parquet(index=False), public=True)
    write_whole(results / "scores" / f"{experiment}.meanings.csv", meanings.csv(), public=True)


def write(
    rows: pd.DataFrame,
    headings: Mapping[str, str],
    paper: Sequence[Reference],
    methods: pd.DataFrame,
    costs: pd.DataFrame,
    meanings: Meanings,
    folder: Path,
) -> None:
    """Write <experiment>.md, .tex and .csv into `folder`; each appears whole."""
    folder.mkdir(parents=True, exist_ok=True)
    experiment, shown = rows.experiment.iloc[0], list(sections(rows, headings, paper, methods, costs, meanings))
    texts = {
        "md": markdown(rows, shown, paper, methods, meanings),
        "tex": latex(experiment, shown),
    }
    for suffix, text in texts.items():
        write_whole(folder / f"{experiment}.{suffix}", text.encode(), public=True)
    write_whole(folder / f"{experiment}.csv", csv_of(rows, float_format="%.6g"), public=True)


def write_nothing(experiment: str, rows: pd.DataFrame, folder: Path) -> None:
    """The table of a run that only made files: it says so."""
    folder.mkdir(parents=True, exist_ok=True)
    text = f"# {experiment}\n\nNothing was measured: no recognizers, scorers or attackers were asked for.\n"
    write_whole(folder / f"{experiment}.md", text.encode(), public=True)
    write_whole(folder / f"{experiment}.csv", csv_of(rows), public=True)


def write_costs(experiment: str, costs: pd.DataFrame, results: Path = RESULTS) -> None:
    """The table of committed costs: they are of one machine and one moment, and no part of the paper's tables."""
    cells = costs.map(lambda cell: celled(cell) if isinstance(cell, str) else cell)
    shown = tabulate(cells.values.tolist(), COSTS, tablefmt="pipe", floatfmt=".4g")
    (results / "tables").mkdir(parents=True, exist_ok=True)
    title = f"# {experiment}: cost of a picture\n\nSeconds and network evaluations, means over the pictures.\n\n"
    write_whole(results / "tables" / f"{experiment}.costs.md", f"{title}{shown}\n".encode(), public=True)


def known_experiments(results: Path = RESULTS) -> list[str]:
    """Every experiment with scores or with numbers of the paper."""
    scores = {
        path.stem for path in (results / "scores").glob("*.parquet") if not path.stem.endswith((".scores", ".pairs"))
    }
    return sorted(scores | {path.stem for path in (results / "paper").glob("*.yaml")})


def table(statistics: pd.DataFrame, paper: Sequence[Reference], experiment: str) -> pd.DataFrame:
    """Every measured cell and every cell of the paper, one a row, with the columns TIDY.

    Verdicts: `within` the tolerance (inclusive), `outside` it (also where ours is undefined for every picture),
    `no-reference` for a cell that the paper does not have, such as one by another protocol, `not-run` for one of the paper's
    that nobody ran. Cells of the paper come first, in the order of its file, then the others, sorted. BadData where a cell was
    measured twice.
    """
    measured = {tuple(row[key] for key in CELL): row for row in statistics.to_dict("records")}
    if len(measured) < len(statistics):
        twice = statistics[statistics.duplicated(CELL)].iloc[0]
        raise BadData(f"{experiment}: measured twice: {' '.join(twice[CELL])}; start again from its run folders")
    printed = {reference.cell: reference for reference in paper}
    rows = []
    for cell in [*printed, *sorted(measured.keys() - printed.keys())]:
        ours, theirs = measured.get(cell), printed.get(cell)
        row: dict[str, Any] = {"experiment": experiment, **dict(zip(CELL, cell, strict=True)), "n": 0, "undefined": 0}
        if ours:
            row |= {"n": ours["n"], "undefined": ours["undefined"]}
            row |= {"ours": ours["value"], "ci_low": ours["low"], "ci_high": ours["high"]}
        if theirs:
            row |= {"paper": theirs.paper, "tolerance": theirs.tolerance}
        rows.append(row | {"verdict": verdict(ours["value"] if ours else None, theirs)})
    return pd.DataFrame(rows, columns=TIDY).astype({"n": int, "undefined": int})


def verdict(ours: float | None, theirs: Reference | None) -> str:
    if theirs is None:
        return "no-reference"
    if ours is None:
        return "not-run"
    # 0.4 - 0.1 > 0.3 in binary: a difference of exactly the tolerance has to stay within it
    return "within" if abs(ours - theirs.paper) <= theirs.tolerance * (1 + 1e-9) else "outside"


# From run folders


def row_of(about: Mapping[str, Any]) -> dict[str, str]:
    """The row of a table that a run is: its dataset, protocol and anonymizer."""
    return {name: about[name] for name in ROW}


def latest_cells(folder: Path) -> dict[Path, int]:
    """The finished cells of an experiment, the latest of each row, and when they were finished."""
    cells: dict[tuple[str, ...], tuple[int, Path]] = {}
    abouts = {path.parent: read_about(path.parent) for path in folder.glob("*/run.json")}
    for run, about in sorted(abouts.items(), key=lambda item: (item[1].get("finished", 0), item[0])):
        cells[tuple(row_of(about).values())] = about.get("finished", 0), run
    return {run: when for when, run in cells.values()}


def collect(runs: Sequence[Path], experiment: str) -> pd.DataFrame:
    """The statistics of run folders, one row (ROW) each, with the columns STATISTICS.

    Raises:
        MissingData: a folder is no finished run.
        BadData: two folders hold the same cell.
    """
    frames, seen = [], dict[tuple[str, ...], Path]()
    abouts = {run: read_about(run) for run in runs}
    mixed = notes_of_mixed(list(abouts.values()))
    for run, about in abouts.items():
        cell = tuple(row_of(about).values())
        if cell in seen:
            raise BadData(f"{experiment}: {seen[cell]} and {run} are both {' '.join(cell)}; name one of them")
        seen[cell] = run
        keys = {"experiment": experiment, **row_of(about)}
        frames.append(read_parquet(run, "statistics").assign(**keys, notes="\n".join([*about["title_notes"], *mixed])))
    return pd.concat(frames, ignore_index=True)[STATISTICS]


def notes_of_mixed(abouts: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a reader must know where rows of one table were made by different versions of the same code or package."""
    versions = defaultdict[str, set[str]](set)
    settings = defaultdict[str, set[str]](set)  # of one dataset
    for about in abouts:
        question = about.get("question", {})
        for name, version in {**question.get("code", {}), **question.get("packages", {})}.items():
            versions[name].add(version)
        of_dataset = {f"dataset.{name}": value for name, value in question.get("dataset", {}).items()}
        asked = {**of_dataset, **about.get("made_by", {}), "pictures": about.get("contents", "")}
        for name, value in asked.items():
            if name.partition(".")[2] not in PRESENTATION:
                settings[f"{about['dataset']}: {name}"].add(json.dumps(value))
    return [
        f"rows of different {what}{', '.join(mixed)}"
        for what, seen in (("versions of ", versions), ("", settings))
        if (mixed := sorted(name for name, found in seen.items() if len(found) > 1))
    ]


def collect_scores(runs: Sequence[Path]) -> pd.DataFrame:
    """The per-picture scores of run folders with the columns SCORES."""
    frames = []
    for run in runs:
        about = read_about(run)
        frames.append(read_parquet(run, "scores").assign(**row_of(about)))
    return pd.concat(frames, ignore_index=True)[SCORES]


def collect_pairs(runs: Sequence[Path]) -> pd.DataFrame:
    """The scores of pairs of run folders, behind the columns ROW; no row for runs that have none."""
    frames = [pd.DataFrame(columns=[*ROW, *PAIRS])]
    for run in runs:
        about = read_about(run)
        if (run / "pairs.parquet").is_file():
            rows = read_parquet(run, "pairs").assign(**row_of(about))
            frames.append(rows[frames[0].columns])
    return pd.concat(frames[1:] or frames, ignore_index=True)


def collect_costs(runs: Sequence[Path]) -> pd.DataFrame:
    """What anonymizing and recovering took a picture, in seconds and network evaluations, with the columns COSTS."""
    frames = []
    for run in runs:
        about = read_about(run)
        spent = pd.DataFrame(about.get("costs", []), columns=["view", "pictures", "seconds", "evaluations"])
        frames.append(spent.assign(**{name: about.get(name, "") for name in COSTS if name not in spent}))
    costs: pd.DataFrame = pd.concat(frames, ignore_index=True).reindex(columns=COSTS)
    return costs


def collect_methods(runs: Sequence[Path]) -> pd.DataFrame:
    """What each method needs and gives, with the columns METHODS; no row for runs that did not take it down."""
    abouts = [read_about(run) for run in runs]
    rows = [
        about["about"] | {"dataset": about["dataset"], "anonymizer": about["anonymizer"]}
        for about in abouts
        if "about" in about
    ]
    return pd.DataFrame(rows, columns=METHODS).astype(BITS)


def collect_meanings(runs: Sequence[Path]) -> Meanings:
    """What the names of run folders mean; nothing of runs that did not take it down."""
    return reduce(operator.or_, (read_meanings(checked(run, "meanings.csv")) for run in runs), Meanings())


def write_about(run: Path, about: Mapping[str, Any]) -> None:
    """Write run.json, last of a finished run's files: what was run, and the digests of the files that are its result."""
    told = {**about, "files": {name: digest((run / name).read_bytes()) for name in KEPT if (run / name).is_file()}}
    write_whole(run / "run.json", signed(told))


def signed(about: Mapping[str, Any]) -> bytes:
    """The one way to write what a run is about, with its digest."""
    whole = {**about, "sha256": digest(json.dumps(about).encode())}
    return json.dumps(whole, indent=2).encode() + b"\n"


def read_about(run: Path) -> dict[str, Any]:
    """What run.json says; Damaged where it is not what was written."""
    path = run / "run.json"
    if not path.is_file():
        raise MissingData(f"{run}: no run.json there; name run folders, as results/runs/<signature>")
    data = path.read_bytes()
    try:
        about: dict[str, Any] = json.loads(data)
        del about["sha256"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise Damaged(path) from None
    intact = signed(about) == data
    about.setdefault("protocol", OURS)  # of runs from before protocols had names
    if not intact or not all(fits(hint, about.get(name)) for name, hint in ABOUT.items()):
        raise Damaged(path)
    return about


def checked(run: Path, name: str) -> Path:
    """A file of a finished run; Damaged where it is not the one that run.json is about.

    While another process writes the result anew, its files are for a moment ahead of its run.json.
    """
    path = run / name
    for _ in range(PATIENCE):
        if not path.is_file():
            raise MissingData(
                f"{run}: no {name} there; the run is not finished: start its experiment again to resume it"
            )
        if read_about(run)["files"].get(name) == digest(path.read_bytes()):
            return path
        time.sleep(0.1)
    raise Damaged(path)


def read_parquet(run: Path, name: str) -> pd.DataFrame:
    return read_frame(checked(run, f"{name}.parquet"), KEPT_COLUMNS[name])
