"""Tables of the paper's numbers beside ours: `python -m experiments.tables [EXPERIMENT ...] [--runs FOLDER ...]`.

    run folders --collect--> results/scores/<experiment>.parquet             (committed)
    scores + results/paper/<experiment>.yaml --table--> results/tables/<experiment>.{md,tex,csv}
    run folders --> results/scores/<experiment>.costs.csv --> results/tables/<experiment>.costs.md    (of one machine)

A table is a pure function of committed files. The CSV has every cell, one a row; Markdown and LaTeX show the same cells
as a paper would: anonymizers and views down, scorers across, our number with its interval, the paper's with its verdict
below.
"""

import argparse
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from tabulate import LATEX_ESCAPE_RULES, tabulate

from keyanon.channel.whole import write_whole
from keyanon.run_folder import read_costs

RESULTS = Path("results")
CELL = ["dataset", "anonymizer", "view", "scorer", "statistic"]
STATISTICS = ["experiment", "dataset", "anonymizer", "notes", *CELL[2:], "n", "undefined", "value", "low", "high"]
COSTS = ["dataset", "anonymizer", "view", "pictures", "seconds", "evaluations", "device", "processor", "threads"]
METHODS = [
    "dataset", "anonymizer", "kind", "recovery_input", "key_bits", "effective_key_bits", "code_licence",
    "weights_licence", "source",
]  # fmt: skip
SCORES = ["dataset", "anonymizer", "id", "view", "scorer", "value"]
TIDY = ["experiment", *CELL, "n", "undefined", "ours", "ci_low", "ci_high", "paper", "tolerance", "verdict"]
BITS = {"key_bits": "Int64", "effective_key_bits": "Int64"}
CERTAINTIES = ("seen-in-notebook", "read-off-figure", "second-hand", "unconfirmed")


@dataclass(frozen=True)
class Reference:
    """One number of the paper: its cell, how near ours has to come and why, where it is from, and how sure that is."""

    dataset: str
    anonymizer: str
    view: str
    scorer: str
    statistic: str
    paper: float
    tolerance: float
    why_tolerance: str
    source: str
    certainty: str
    std: float | None = None  # over pictures, where the paper prints it: shown, not compared
    note: str = ""

    @property
    def cell(self) -> tuple[str, ...]:
        return (self.dataset, self.anonymizer, self.view, self.scorer, self.statistic)


def table(statistics: pd.DataFrame, paper: Sequence[Reference], experiment: str) -> pd.DataFrame:
    """Every measured cell and every cell of the paper, one a row, with the columns TIDY.

    Verdicts: `within` the tolerance (inclusive), `outside` it (also where ours is undefined for every picture),
    `no-reference` for a cell that the paper does not have, `not-run` for one of the paper's that nobody ran. Cells of
    the paper come first, in the order of its file, then the others, sorted. ValueError where a cell was measured twice.
    """
    measured = {tuple(row[key] for key in CELL): row for row in statistics.to_dict("records")}
    if len(measured) < len(statistics):
        twice = statistics[statistics.duplicated(CELL)].iloc[0]
        raise ValueError(f"{experiment}: measured twice: {' '.join(twice[CELL])}; start again from its run folders")
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


# The paper's numbers and our runs


def read_paper(path: Path) -> list[Reference]:
    """The references of one file of results/paper, checked; ValueError names file, entry and what is wrong."""
    entries = yaml.safe_load(path.read_text("utf-8"))
    if not isinstance(entries, list):
        raise ValueError(f"{path}: expected a list of cells, found {type(entries).__name__}")
    references = []
    for number, entry in enumerate(entries, 1):
        try:
            references.append(reference(entry))
        except ValueError as error:
            raise ValueError(f"{path}, entry {number}: {error}") from error
    for cell, count in Counter(r.cell for r in references).items():
        if count > 1:
            raise ValueError(f"{path}: {count} entries for one cell: {' '.join(cell)}; keep one")
    return references


def reference(entry: object) -> Reference:
    if not isinstance(entry, dict):
        raise ValueError(f"expected keys and values, found {entry!r}")
    known = {field.name: field for field in fields(Reference)}
    if unknown := sorted(entry.keys() - known.keys()):
        raise ValueError(f"unknown key {', '.join(map(str, unknown))}; known are {', '.join(known)}")
    if missing := [name for name, field in known.items() if field.default is MISSING and name not in entry]:
        raise ValueError(f"missing key {', '.join(missing)}")
    for name, value in entry.items():
        number = known[name].type is not str
        if isinstance(value, bool) or not isinstance(value, int | float if number else str):
            raise ValueError(f"{name} is {value!r}; expected a {'number' if number else 'text'}")
        if number and not math.isfinite(float(value)):
            raise ValueError(f"{name} is {value}; expected a finite number")
    if entry["tolerance"] < 0:
        raise ValueError(f"tolerance is {entry['tolerance']}; expected 0 or more")
    if entry["certainty"] not in CERTAINTIES:
        raise ValueError(f"certainty is {entry['certainty']!r}; expected one of {', '.join(CERTAINTIES)}")
    return Reference(**entry)


def collect(runs: Sequence[Path], experiment: str) -> pd.DataFrame:
    """The statistics of run folders, one cell (dataset, anonymizer) each, with the columns STATISTICS.

    Raises:
        FileNotFoundError: a folder is no finished run.
        ValueError: two folders hold the same cell.
    """
    frames, seen = [], dict[tuple[str, str], Path]()
    for run in runs:
        about = read_about(run)
        cell = (about["dataset"], about["anonymizer"])
        if cell in seen:
            raise ValueError(f"{experiment}: {seen[cell]} and {run} are both {' '.join(cell)}; name one of them")
        seen[cell] = run
        keys = {"experiment": experiment, "dataset": cell[0], "anonymizer": cell[1]}
        frames.append(read_parquet(run, "statistics").assign(**keys, notes="\n".join(about["title_notes"])))
    return pd.concat(frames, ignore_index=True)[STATISTICS]


def collect_scores(runs: Sequence[Path]) -> pd.DataFrame:
    """The per-picture scores of run folders with the columns SCORES."""
    frames = []
    for run in runs:
        about = read_about(run)
        frames.append(read_parquet(run, "scores").assign(dataset=about["dataset"], anonymizer=about["anonymizer"]))
    return pd.concat(frames, ignore_index=True)[SCORES]


def collect_costs(runs: Sequence[Path]) -> pd.DataFrame:
    """What anonymizing and recovering took a picture, in seconds and network evaluations, with the columns COSTS."""
    frames = []
    for run in runs:
        about, spent = read_about(run), read_costs(run).to_pandas().groupby("view", as_index=False).sum()
        spent[["seconds", "evaluations"]] = spent[["seconds", "evaluations"]].div(spent["pictures"], axis=0)
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


def read_about(run: Path) -> dict[str, Any]:
    path = run / "run.json"
    if not path.is_file():
        raise FileNotFoundError(f"{run}: no run.json there; name run folders, as results/runs/<signature>")
    about: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return about


def read_parquet(run: Path, name: str) -> pd.DataFrame:
    path = run / f"{name}.parquet"
    if not path.is_file():
        raise FileNotFoundError(
            f"{run}: no {path.name} there; the run is not finished: start its experiment again to resume it"
        )
    return pd.read_parquet(path)


# A table for readers: a section for each dataset, a grid for each statistic

CLEAN, ANONYMIZED, RECOVERED, ATTACKED, INVERTED = (
    "Clean pictures",
    "Anonymized",
    "Recovered with the right key",
    "Attacks and wrong keys",
    "Inverted noise",
)
RECOGNIZERS = ("facenet", "arcface", "adaface", "mobilefacenet", "dlib", "sface")
KINDS = ("control", "irreversible", "keyless", "keyed")  # keyanon.types.About
STATISTIC_NAMES = {
    "std": "standard deviation",
    "set": "over the whole set",
    "w2_squared": "squared 2-Wasserstein distance to pairs of strangers",
    "cosine_between_keys": "mean cosine between two keys of one picture",
    "frechet": "Fréchet distance of the embeddings to those of clean pictures",
}
LEGEND = (
    "Ours with its 95 % bootstrap interval in brackets. reconstructed: D(E(x)), what the autoencoder alone makes of a picture. "
    "n: pictures or comparisons that count; undefined: those that "
    "could not be measured, such as pictures where no face was found. ↑: higher is better, ↓: lower is better."
)


@dataclass(frozen=True)
class Grid:
    title: str
    header: list[str]
    rows: list[list[str]]


def grids(cells: pd.DataFrame, paper: Mapping[tuple[str, ...], Reference], kinds: Mapping[str, str]) -> Iterator[Grid]:
    """One dataset's rows of a table as grids: anonymizers and views down, scorers across. Where the kinds of anonymizers are
    known, those of a kind stand together under its name.
    """
    rows: list[Any] = sorted(cells.itertuples(), key=lambda row: KINDS.index(kinds.get(row.anonymizer, KINDS[0])))
    means = {(row.anonymizer, row.view, row.scorer) for row in rows if row.statistic == "mean"}
    spreads = {(row.anonymizer, row.view, row.scorer): row.ours for row in rows if row.statistic == "std"}
    groups: dict[tuple[str, str, bool], dict[tuple[str, str], dict[str, Any]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        behind_mean = row.statistic == "std" and (row.anonymizer, row.view, row.scorer) in means
        if not (behind_mean and row.verdict == "no-reference"):
            group = groups[aim(row.view), row.statistic, is_recognizer(row.scorer)]
            group[row.anonymizer, row.view][row.scorer] = row
    order = (CLEAN, ANONYMIZED, RECOVERED, ATTACKED, INVERTED)
    for (wanted, statistic, identity), lines in sorted(groups.items(), key=lambda item: order.index(item[0][0])):
        scorers = list(dict.fromkeys(scorer for line in lines.values() for scorer in line))
        columns = [f"{scorer} {arrow(wanted, scorer, statistic)}".rstrip() for scorer in scorers]
        body: list[list[str]] = []
        heading = ""
        for (anonymizer, view), line in lines.items():
            if kinds.get(anonymizer, "") != heading:
                heading = kinds[anonymizer]
                body.append([f"*{heading}*", *[""] * (4 + len(scorers))])
            ran = [row for row in line.values() if row.verdict != "not-run"]
            ours, theirs = dict.fromkeys(scorers, ""), dict.fromkeys(scorers, "")
            for scorer, row in line.items():
                spread = spreads.get((anonymizer, view, scorer), math.nan) if statistic == "mean" else math.nan
                ours[scorer] = ours_text(row, spread)
                theirs[scorer] = paper_text(row, paper.get(tuple(getattr(row, key) for key in CELL)))
            counts = [between([row.n for row in ran]), between([row.undefined for row in ran])]
            body.append([anonymizer, view, "ours", *counts, *ours.values()])
            if any(theirs.values()):
                body.append(["", "", "paper", "", "", *theirs.values()])
        title = f"{wanted}: {statistic_name(statistic, identity)}"
        if any("±" in text for line in body for text in line):
            title += " ± standard deviation"
        yield Grid(title, ["anonymizer", "view", "", "n", "undefined", *columns], body)


def side_by_side(cells: pd.DataFrame, kinds: Mapping[str, str], costs: pd.DataFrame) -> Grid:
    """One dataset's methods, one a row: what published pictures show, what comes back of the file, and what it takes.

    Columns that name no view are of the anonymized pictures.
    """
    measured = {(row.anonymizer, row.view, row.scorer, row.statistic): row for row in cells.itertuples()}
    seconds: dict[Any, float] = costs.set_index(["anonymizer", "view"])["seconds"].to_dict()
    recognizers = [scorer for scorer in cells.scorer.unique() if is_recognizer(scorer)]
    rates = [statistic for statistic in cells.statistic.unique() if re.fullmatch(r"tar@far=[\d.e-]+", statistic)]
    columns = {
        "detected": ("anonymized", "detected", "mean"),
        **{f"{name} cosine": ("anonymized", name, "mean") for name in recognizers},
        **{
            f"{name} {statistic_name(rate, True)}": ("anonymized", name, rate) for rate in rates for name in recognizers
        },
        **{f"{name}, recovered": ("recovered", name, "mean") for name in ("psnr_face", "ssim_face")},
        **{f"{name} cosine, recovered": ("recovered", name, "mean") for name in recognizers},
        **{
            f"{name} cosine, {view.replace('_', ' ')}": (view, name, "mean")
            for view in ("wrong_key", "no_key")
            for name in recognizers
        },
    }
    columns = {name: place for name, place in columns.items() if any(cell[1:] == place for cell in measured)}
    body: list[list[str]] = []
    heading = ""
    for method in sorted(cells.anonymizer.unique(), key=lambda name: (KINDS.index(kinds.get(name, KINDS[0])), name)):
        if kinds.get(method, "") != heading:
            heading = kinds[method]
            body.append([f"*{heading}*", *[""] * (len(columns) + 3)])
        found = [measured.get((method, *place)) for place in columns.values()]
        side = measured.get((method, "anonymized", "header_bytes", "mean"))
        times = [seconds.get((method, view)) for view in ("anonymized", "recovered")]
        line = [method, *("-" if row is None else ours_text(row, math.nan) for row in found)]
        body.append(
            [*line, "-" if side is None else f"{side.ours:.0f}", *("-" if t is None else f"{t:.3g}" for t in times)]
        )
    titles = [f"{name} {arrow(aim(place[0]), *place[1:])}".rstrip() for name, place in columns.items()]
    header = ["anonymizer", *titles, "side bytes", "seconds to anonymize", "to recover"]
    return Grid("Methods side by side", header, body)


def originals_once(cells: pd.DataFrame) -> pd.DataFrame:
    """One dataset's cells, with those of the originals once where they are the same under all its methods."""
    clean = cells[(cells.view == "original") & (cells.verdict == "no-reference")]
    each = [rows.drop(columns="anonymizer").reset_index(drop=True) for _, rows in clean.groupby("anonymizer")]
    if not 1 < len(each) == cells.anonymizer.nunique() or not all(rows.equals(each[0]) for rows in each):
        return cells
    return pd.concat([each[0].assign(anonymizer="all methods"), cells.drop(clean.index)])


def aim(view: str) -> str:
    if view in ("original", "reconstructed"):
        return CLEAN
    if view == "anonymized":
        return ANONYMIZED
    if view.startswith("noise"):
        return INVERTED
    return RECOVERED if view.startswith(("recovered", "jpeg")) else ATTACKED


def is_recognizer(scorer: str) -> bool:
    return scorer.startswith(RECOGNIZERS)


def arrow(aim: str, scorer: str, statistic: str) -> str:
    """↑ where higher is better, ↓ where lower is, else nothing: recovery wants likeness, the rest wants none."""
    name = statistic.partition("@")[0]
    if scorer == "detected":
        return "↑"
    if scorer == "fid" or name in ("w2_squared", "cosine_between_keys", "frechet"):
        return "↓"
    faithful = aim in (CLEAN, RECOVERED)
    if is_recognizer(scorer) and name in ("mean", "tar", "d_sys", "eer"):
        return "↑" if faithful != (name == "eer") else "↓"
    if faithful and name == "mean" and scorer in ("psnr", "ssim", "mae", "lpips"):
        return "↑" if scorer in ("psnr", "ssim") else "↓"
    return ""


def statistic_name(statistic: str, identity: bool) -> str:
    if statistic == "mean":
        return "cosine similarity to the original, mean" if identity else "picture measures, mean"
    name, _, far = statistic.partition("@far=")
    if far:
        return f"{'TAR' if name == 'tar' else name} at FAR {far}"
    return STATISTIC_NAMES.get(statistic, statistic)


def ours_text(row: Any, spread: float) -> str:
    if row.verdict == "not-run":
        return "not run"
    if math.isnan(row.ours):
        return "undefined"
    sigma = "" if math.isnan(spread) else f" ± {digits(spread)}"
    interval = "" if math.isnan(row.ci_low) else f" [{digits(row.ci_low)}, {digits(row.ci_high)}]"
    return digits(row.ours) + sigma + interval


def paper_text(row: Any, theirs: Reference | None) -> str:
    if theirs is None:
        return ""
    sigma = "" if theirs.std is None else f" ± {theirs.std:.6g}"
    return f"{theirs.paper:.6g}{sigma}" + ("" if row.verdict == "not-run" else f" ({row.verdict})")


def digits(value: float) -> str:
    """Four significant digits, trailing zeros kept."""
    return f"{value:#.4g}".rstrip(".")


def between(counts: Sequence[int]) -> str:
    low, high = min(counts, default=0), max(counts, default=0)
    return str(low) if low == high else f"{low} to {high}"


def titles(rows: pd.DataFrame, statistics: pd.DataFrame) -> dict[str, str]:
    """A title for each dataset: its name and its runs' notes, each with its anonymizers where not all share it."""
    named = {}
    for dataset in rows.dataset.unique():
        runs = statistics[statistics.dataset == dataset].drop_duplicates("anonymizer")
        about: dict[str, list[str]] = defaultdict(list)
        for anonymizer, notes in zip(runs.anonymizer, runs.notes, strict=True):
            for note in notes.splitlines():
                about[note].append(anonymizer)
        parts = [note if len(who) == len(runs) else f"{note} ({', '.join(who)})" for note, who in about.items()]
        named[dataset] = ": ".join([dataset, "; ".join(parts)]) if parts else dataset
    return named


def summary(rows: pd.DataFrame) -> str:
    count = rows.verdict.value_counts().to_dict()
    within, outside, absent = (count.get(name, 0) for name in ("within", "outside", "not-run"))
    printed = within + outside + absent
    if printed == 0:
        return f"The paper has no number for any of the {len(rows)} cells."
    return f"Of {printed} published numbers {within} within tolerance, {outside} outside, {absent} not run."


def consumed(methods: pd.DataFrame, rows: pd.DataFrame) -> Grid:
    """What each method needs and gives, with the header's bytes as they were measured, on each dataset."""
    measured = rows[(rows.scorer == "header_bytes") & (rows.statistic == "mean")]
    body: list[list[str]] = []
    every = methods.drop_duplicates("anonymizer").to_dict("records")
    for method in sorted(every, key=lambda row: (KINDS.index(row["kind"]), row["anonymizer"])):
        sizes = measured[measured.anonymizer == method["anonymizer"]].ours
        side = " / ".join(f"{size:.0f}" for size in sizes) or "-"
        bits = ["-" if pd.isna(method[name]) else str(method[name]) for name in BITS]
        text = [str(method[name]) for name in METHODS[1:] if name not in BITS]
        body.append([*text[:3], side, *bits, *text[3:]])
    side = f"side bytes ({' / '.join(dict.fromkeys(measured.dataset))})"
    reads = ["recovery reads", side, "key bits", "effective"]
    header = ["anonymizer", "kind", *reads, "code licence", "weights licence", "source"]
    return Grid("What each method needs and gives", header, body)


def sections(
    rows: pd.DataFrame,
    headings: Mapping[str, str],
    paper: Sequence[Reference],
    methods: pd.DataFrame,
    costs: pd.DataFrame,
) -> Iterator[tuple[str, list[Grid]]]:
    """Each dataset's heading and grids."""
    by_cell = {reference.cell: reference for reference in paper}
    kinds = dict(zip(methods.anonymizer, methods.kind, strict=True))
    for dataset, heading in headings.items():
        cells = rows[rows.dataset == dataset]
        compared = [side_by_side(cells, kinds, costs[costs.dataset == dataset])] if len(kinds) > 1 else []
        yield heading, [*compared, *grids(originals_once(cells), by_cell, kinds)]


def markdown(
    rows: pd.DataFrame,
    shown: Sequence[tuple[str, list[Grid]]],
    paper: Sequence[Reference],
    methods: pd.DataFrame,
) -> str:
    parts = [f"# {rows.experiment.iloc[0]}", summary(rows), LEGEND]
    if not methods.empty:
        grid = consumed(methods, rows)
        parts += [f"## {grid.title}", tabulate(grid.rows, grid.header, tablefmt="pipe", disable_numparse=True)]
    for heading, found in shown:
        parts.append(f"## {heading}")
        for grid in found:
            parts += [f"### {grid.title}", tabulate(grid.rows, grid.header, tablefmt="pipe", disable_numparse=True)]
    if paper:
        parts += ["## Where the published numbers are from", origins(paper)]
    return "\n\n".join(parts) + "\n"


def origins(paper: Sequence[Reference]) -> str:
    """Tolerance and source of every reference; scorers that share them share a line."""
    shared: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for r in paper:
        line = (r.dataset, r.anonymizer, r.view, r.statistic, f"{r.tolerance:.6g}", r.why_tolerance)
        shared[(*line, r.certainty, r.source, r.note)].append(r.scorer)
    header = [
        "dataset",
        "anonymizer",
        "view",
        "statistic",
        "tolerance",
        "why",
        "certainty",
        "source",
        "note",
        "scorers",
    ]
    lines = [[*line, ", ".join(scorers)] for line, scorers in shared.items()]
    return tabulate(lines, header, tablefmt="pipe", disable_numparse=True)


def latex(experiment: str, shown: Sequence[tuple[str, list[Grid]]]) -> str:
    r"""The grids as floats to \input; needs the packages booktabs and graphicx."""
    parts = ["% needs \\usepackage{booktabs,graphicx}"]
    for heading, found in shown:
        for grid in found:
            tabular = tabulate(grid.rows, grid.header, tablefmt="latex_booktabs", disable_numparse=True)
            caption = "".join(LATEX_ESCAPE_RULES.get(c, c) for c in f"{experiment}, {heading}. {grid.title}.")
            fitted = f"\\resizebox{{\\ifdim\\width>\\linewidth\\linewidth\\else\\width\\fi}}{{!}}{{%\n{tabular}}}"
            parts.append(f"\\begin{{table}}\n\\centering\n\\caption{{{caption}}}\n{fitted}\n\\end{{table}}")
    symbols = str.maketrans({"↑": r"$\uparrow$", "↓": r"$\downarrow$", "±": r"$\pm$"})
    return "\n\n".join(parts).translate(symbols) + "\n"


def write(
    rows: pd.DataFrame,
    headings: Mapping[str, str],
    paper: Sequence[Reference],
    methods: pd.DataFrame,
    costs: pd.DataFrame,
    folder: Path,
) -> None:
    """Write <experiment>.md, .tex and .csv into `folder`; each appears whole."""
    folder.mkdir(parents=True, exist_ok=True)
    experiment, shown = rows.experiment.iloc[0], list(sections(rows, headings, paper, methods, costs))
    texts = {
        "md": markdown(rows, shown, paper, methods),
        "tex": latex(experiment, shown),
        "csv": rows.to_csv(index=False, float_format="%.6g", lineterminator="\n"),
    }
    for suffix, text in texts.items():
        write_whole(folder / f"{experiment}.{suffix}", text.encode())


# The command


def build(experiment: str, runs: Sequence[Path] = (), results: Path = RESULTS) -> pd.DataFrame:
    """Commit the scores of `runs`, if any are given, then write the experiment's tables from what is committed."""
    scores, references = results / "scores" / f"{experiment}.parquet", results / "paper" / f"{experiment}.yaml"
    if runs:
        commit(experiment, collect(runs, experiment), collect_scores(runs), results)
    if not scores.is_file() and not references.is_file():
        raise FileNotFoundError(
            f"{experiment}: neither {scores} nor {references} exists; "
            f"run `python -m experiments.run experiment={experiment}`"
        )
    statistics = pd.read_parquet(scores) if scores.is_file() else pd.DataFrame(columns=STATISTICS)
    paper = read_paper(references) if references.is_file() else []
    path = results / "scores" / f"{experiment}.methods.csv"
    if runs and not (found := collect_methods(runs)).empty:
        write_whole(path, found.to_csv(index=False).encode())
    methods = pd.read_csv(path, dtype=BITS) if path.is_file() else pd.DataFrame(columns=METHODS)
    path = results / "scores" / f"{experiment}.costs.csv"
    if runs and not (spent := collect_costs(runs)).empty:
        write_whole(path, spent.to_csv(index=False, float_format="%.4g").encode())
    costs = pd.read_csv(path) if path.is_file() else pd.DataFrame(columns=COSTS)
    if not costs.empty:
        write_costs(experiment, costs, results)
    rows = table(statistics, paper, experiment)
    write(rows, titles(rows, statistics), paper, methods, costs, results / "tables")
    return rows


def commit(experiment: str, statistics: pd.DataFrame, scores: pd.DataFrame, results: Path = RESULTS) -> None:
    """Write what a table is made from, with the columns STATISTICS and SCORES."""
    (results / "scores").mkdir(parents=True, exist_ok=True)
    for table, suffix in ((statistics, "parquet"), (scores, "scores.parquet")):
        write_whole(results / "scores" / f"{experiment}.{suffix}", table.to_parquet(index=False))


def write_costs(experiment: str, costs: pd.DataFrame, results: Path = RESULTS) -> None:
    """The table of committed costs: they are of one machine and one moment, and no part of the paper's tables."""
    shown = tabulate(costs.values.tolist(), COSTS, tablefmt="pipe", floatfmt=".4g")
    (results / "tables").mkdir(parents=True, exist_ok=True)
    title = f"# {experiment}: cost of a picture\n\nSeconds and network evaluations, means over the pictures.\n\n"
    write_whole(results / "tables" / f"{experiment}.costs.md", f"{title}{shown}\n".encode())


def known_experiments(results: Path = RESULTS) -> list[str]:
    """Every experiment with committed scores or with numbers of the paper."""
    scores = {path.stem for path in (results / "scores").glob("*.parquet") if not path.stem.endswith(".scores")}
    return sorted(scores | {path.stem for path in (results / "paper").glob("*.yaml")})


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.tables", description="Write the tables of committed scores."
    )
    parser.add_argument(
        "experiments", nargs="*", metavar="EXPERIMENT", help="default: all that have scores or paper numbers"
    )
    parser.add_argument("--runs", nargs="+", type=Path, default=[], help="run folders to collect scores from first")
    options = parser.parse_args(arguments)
    if options.runs and len(options.experiments) != 1:
        parser.error("--runs needs the one experiment that the runs belong to")
    try:
        for experiment in options.experiments or known_experiments():
            rows = build(experiment, options.runs)
            print(f"{RESULTS / 'tables' / experiment}.md: {summary(rows)}")
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(f"tables: {error}") from error


if __name__ == "__main__":
    main()
