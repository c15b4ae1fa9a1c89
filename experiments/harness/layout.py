"""A table for readers, in Markdown and LaTeX: a section for each dataset, a grid for each statistic."""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from tabulate import LATEX_ESCAPE_RULES, tabulate

from experiments.harness.meaning import Meanings
from experiments.harness.paper import CELL, Reference
from keyanon.types import COSINE, Measure, Summary

METHODS = [
    "dataset", "anonymizer", "kind", "recovery_input", "key_bits", "effective_key_bits", "code_licence",
    "weights_licence", "source",
]  # fmt: skip
BITS = {"key_bits": "Int64", "effective_key_bits": "Int64"}
ROLES = {
    "clean": "Clean pictures",
    "anonymized": "Anonymized",
    "recovered": "Recovered with the right key",
    "attacked": "Attacks and wrong keys",
    "noise": "Inverted noise",
    "": "Views of no declared role",
}
SUBJECTS = {  # of a grid's title: the first kind that stands in the grid
    "identity": COSINE.label,
    "picture": "picture measures",
    "noise": "measures of the noise",
}
KINDS = ("control", "irreversible", "keyless", "keyed")  # keyanon.types.About
LEGEND = (
    "Ours with its 95 % bootstrap interval in brackets. reconstructed: D(E(x)), what the autoencoder alone makes of a picture. "
    "protocol: how it was measured (conf/protocol). n: pictures or comparisons that count; undefined: those that "
    "could not be measured, such as pictures where no face was found. ↑: higher is better, ↓: lower is better."
)


@dataclass(frozen=True)
class Grid:
    title: str
    header: list[str]
    rows: list[list[str]]


def sections(
    rows: pd.DataFrame,
    headings: Mapping[str, str],
    paper: Sequence[Reference],
    methods: pd.DataFrame,
    costs: pd.DataFrame,
    meanings: Meanings,
) -> Iterator[tuple[str, list[Grid]]]:
    """Each dataset's heading and grids."""
    by_cell = {reference.cell: reference for reference in paper}
    kinds = dict(zip(methods.anonymizer, methods.kind, strict=True))
    for dataset, heading in headings.items():
        cells = rows[rows.dataset == dataset]
        compared = [side_by_side(cells, kinds, costs[costs.dataset == dataset], meanings)] if len(kinds) > 1 else []
        each = [originals_once(cells[cells.protocol == protocol]) for protocol in cells.protocol.unique()]
        yield heading, [*compared, *grids(pd.concat(each), by_cell, kinds, meanings)]


def grids(
    cells: pd.DataFrame, paper: Mapping[tuple[str, ...], Reference], kinds: Mapping[str, str], meanings: Meanings
) -> Iterator[Grid]:
    """One dataset's rows of a table as grids: anonymizers and views down, scorers across. Where the kinds of anonymizers are
    known, those of a kind stand together under its name.
    """
    rows: list[Any] = sorted(cells.itertuples(), key=lambda row: KINDS.index(kinds.get(row.anonymizer, KINDS[0])))
    means = {line_of(row, row.scorer) for row in rows if row.statistic == "mean"}
    spreads = {line_of(row, row.scorer): row.ours for row in rows if row.statistic == "std"}
    groups: dict[tuple[str, str, bool], dict[tuple[str, ...], dict[str, Any]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        behind_mean = row.statistic == "std" and line_of(row, row.scorer) in means
        if not (behind_mean and row.verdict == "no-reference"):
            group = groups[role_of(row.view, meanings), row.statistic, is_identity(row.scorer, meanings)]
            group[line_of(row)][row.scorer] = row
    order = list(ROLES)
    for (role, statistic, _), lines in sorted(groups.items(), key=lambda item: order.index(item[0][0])):
        scorers = list(dict.fromkeys(scorer for line in lines.values() for scorer in line))
        summary = meanings.statistics.get(statistic)
        columns = [f"{name} {arrow(role, meanings.scorers.get(name), summary)}".rstrip() for name in scorers]
        body: list[list[str]] = []
        heading = ""
        for (anonymizer, protocol, view), line in lines.items():
            if kinds.get(anonymizer, "") != heading:
                heading = kinds[anonymizer]
                body.append([f"*{heading}*", *[""] * (5 + len(scorers))])
            ran = [row for row in line.values() if row.verdict != "not-run"]
            ours, theirs = dict.fromkeys(scorers, ""), dict.fromkeys(scorers, "")
            for scorer, row in line.items():
                spread = spreads.get(line_of(row, scorer), math.nan) if statistic == "mean" else math.nan
                ours[scorer] = ours_text(row, spread)
                theirs[scorer] = paper_text(row, paper.get(tuple(getattr(row, key) for key in CELL)))
            counts = [between([row.n for row in ran]), between([row.undefined for row in ran])]
            body.append([anonymizer, protocol, view_label(view, meanings), "measured", *counts, *ours.values()])
            if any(theirs.values()):
                body.append(["", "", "", "paper", "", "", *theirs.values()])
        title = f"{ROLES[role]}: {subject(statistic, scorers, meanings)}"
        if any("±" in text for line in body for text in line):
            title += " ± standard deviation"
        yield Grid(title, ["anonymizer", "protocol", "view", "", "n", "undefined", *columns], body)


def line_of(row: Any, *scorer: str) -> tuple[str, ...]:
    """Which line of a grid a cell stands in, and which of its columns."""
    return (row.anonymizer, row.protocol, row.view, *scorer)


def side_by_side(cells: pd.DataFrame, kinds: Mapping[str, str], costs: pd.DataFrame, meanings: Meanings) -> Grid:
    """One dataset's methods, one a row: what published pictures show, what comes back of the file, and what it takes.

    Columns that name no view are of the anonymized pictures.
    """
    measured = {(row.anonymizer, row.protocol, row.view, row.scorer, row.statistic): row for row in cells.itertuples()}
    seconds: dict[Any, float] = costs.set_index(["anonymizer", "protocol", "view"])["seconds"].to_dict()
    recognizers = [scorer for scorer in cells.scorer.unique() if is_identity(scorer, meanings)]
    rates = [statistic for statistic in cells.statistic.unique() if re.fullmatch(r"tar@far=[\d.e-]+", statistic)]
    columns = {
        "detected": ("anonymized", "detected", "mean"),
        **{f"{name} cosine": ("anonymized", name, "mean") for name in recognizers},
        **{
            f"{name} {statistic_label(rate, meanings)}": ("anonymized", name, rate)
            for rate in rates
            for name in recognizers
        },
        **{f"{name}, recovered": ("recovered", name, "mean") for name in ("psnr_face", "ssim_face")},
        **{f"{name} cosine, recovered": ("recovered", name, "mean") for name in recognizers},
        **{
            f"{name} cosine, {view.replace('_', ' ')}": (view, name, "mean")
            for view in ("wrong_key", "no_key")
            for name in recognizers
        },
    }
    columns = {name: place for name, place in columns.items() if any(cell[2:] == place for cell in measured)}
    body: list[list[str]] = []
    heading = ""
    methods = set(zip(cells.anonymizer, cells.protocol, strict=True))
    for method, protocol in sorted(methods, key=lambda row: (KINDS.index(kinds.get(row[0], KINDS[0])), *row)):
        if kinds.get(method, "") != heading:
            heading = kinds[method]
            body.append([f"*{heading}*", *[""] * (len(columns) + 4)])
        found = [measured.get((method, protocol, *place)) for place in columns.values()]
        side = measured.get((method, protocol, "anonymized", "header_bytes", "mean"))
        times = [seconds.get((method, protocol, view)) for view in ("anonymized", "recovered")]
        line = [method, protocol, *("-" if row is None else ours_text(row, math.nan) for row in found)]
        body.append(
            [*line, "-" if side is None else f"{side.ours:.0f}", *("-" if t is None else f"{t:.3g}" for t in times)]
        )
    titles = [f"{name} {arrow_of(*place, meanings)}".rstrip() for name, place in columns.items()]
    header = ["anonymizer", "protocol", *titles, "side bytes", "seconds to anonymize", "to recover"]
    return Grid("Methods side by side", header, body)


def originals_once(cells: pd.DataFrame) -> pd.DataFrame:
    """One dataset's cells by one protocol, with those of the originals once where they are the same under all its methods."""
    clean = cells[(cells.view == "original") & (cells.verdict == "no-reference")]
    each = [rows.drop(columns="anonymizer").reset_index(drop=True) for _, rows in clean.groupby("anonymizer")]
    if not 1 < len(each) == cells.anonymizer.nunique() or not all(rows.equals(each[0]) for rows in each):
        return cells
    return pd.concat([each[0].assign(anonymizer="all methods"), cells.drop(clean.index)])


def role_of(view: str, meanings: Meanings) -> str:
    return meanings.views[view].role if view in meanings.views else ""


def view_label(view: str, meanings: Meanings) -> str:
    return (meanings.views[view].label if view in meanings.views else "") or view


def is_identity(scorer: str, meanings: Meanings) -> bool:
    return scorer in meanings.scorers and meanings.scorers[scorer].kind == "identity"


def arrow(role: str, measure: Measure | None, summary: Summary | None) -> str:
    """↑ where higher is better, ↓ where lower is, else nothing.

    Likeness to the original is good on clean and recovered views. On others, likeness of persons is bad, and likeness of pictures
    neither. Nothing for names that nobody declared.
    """
    if measure is None or summary is None:
        return ""
    direction = summary.direction or measure.direction
    if direction in ("alike", "apart"):
        if role in ("clean", "recovered"):
            return "↑" if direction == "alike" else "↓"
        if role in ("anonymized", "attacked") and measure.kind == "identity":
            return "↓" if direction == "alike" else "↑"
    return {"higher": "↑", "lower": "↓"}.get(direction, "")


def arrow_of(view: str, scorer: str, statistic: str, meanings: Meanings) -> str:
    return arrow(role_of(view, meanings), meanings.scorers.get(scorer), meanings.statistics.get(statistic))


def statistic_label(statistic: str, meanings: Meanings) -> str:
    return (meanings.statistics[statistic].label if statistic in meanings.statistics else "") or statistic


def subject(statistic: str, scorers: Sequence[str], meanings: Meanings) -> str:
    """What a grid shows: its statistic, and of what, unless the statistic is no measure's value."""
    label, summary = statistic_label(statistic, meanings), meanings.statistics.get(statistic)
    if summary is None or summary.direction is not None:
        return label
    kinds = {meanings.scorers[scorer].kind for scorer in scorers if scorer in meanings.scorers}
    return f"{next((text for kind, text in SUBJECTS.items() if kind in kinds), 'measures')}, {label}"


def legend(rows: pd.DataFrame, meanings: Meanings) -> str:
    """What each scorer of a table is, as far as it says so, and the names that nobody declared."""
    named: dict[str, list[str]] = defaultdict(list)
    for scorer in sorted(set(rows.scorer) & meanings.scorers.keys()):
        measure = meanings.scorers[scorer]
        text = ", in ".join(part for part in (measure.label, measure.unit) if part)
        named[text].append(scorer)
    parts = [f"{', '.join(scorers)}: {text}" for text, scorers in named.items() if text]
    known = {"view": meanings.views, "scorer": meanings.scorers, "statistic": meanings.statistics}
    strange = [name for column, names in known.items() for name in sorted(set(rows[column]) - names.keys())]
    lines = [f"Scorers. {'; '.join(parts)}."] if parts else []
    lines += [f"Not declared, and so without an arrow: {', '.join(strange)}."] if strange else []
    return "\n\n".join(map(inline, lines))


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
        runs = statistics[statistics.dataset == dataset].drop_duplicates(["protocol", "anonymizer"])
        several = runs.protocol.nunique() > 1
        about: dict[str, list[str]] = defaultdict(list)
        for anonymizer, protocol, notes in zip(runs.anonymizer, runs.protocol, runs.notes, strict=True):
            for note in notes.splitlines():
                about[note].append(f"{anonymizer} by {protocol}" if several else anonymizer)
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


def markdown(
    rows: pd.DataFrame,
    shown: Sequence[tuple[str, list[Grid]]],
    paper: Sequence[Reference],
    methods: pd.DataFrame,
    meanings: Meanings,
) -> str:
    parts = [f"# {rows.experiment.iloc[0]}", summary(rows), LEGEND]
    if explained := legend(rows, meanings):
        parts.append(explained)
    if not methods.empty:
        grid = consumed(methods, rows)
        parts += [f"## {grid.title}", piped(grid)]
    for heading, found in shown:
        parts.append(f"## {inline(heading)}")
        for grid in found:
            parts += [f"### {inline(grid.title)}", piped(grid)]
    if paper:
        parts += ["## Where the published numbers are from", origins(paper)]
    return "\n\n".join(parts) + "\n"


def piped(grid: Grid) -> str:
    """A grid in Markdown."""
    header, *rows = (list(map(celled, line)) for line in (grid.header, *grid.rows))
    return tabulate(rows, header, tablefmt="pipe", disable_numparse=True)


def celled(text: str) -> str:
    """A text as Markdown shows it within a cell, where a bar would begin another one."""
    return inline(text).replace("|", "\\|")


def inline(text: str) -> str:
    """A text as Markdown shows it, where `<` would begin a tag and `](` a link."""
    for special in "\\<":
        text = text.replace(special, f"\\{special}")
    return on_one_line(text).replace("](", "]\\(")


def on_one_line(text: str) -> str:
    """A line's end within a cell would end the table in Markdown, and the paragraph in LaTeX."""
    return " ".join(text.splitlines())


def origins(paper: Sequence[Reference]) -> str:
    """Tolerance and source of every reference; scorers that share them share a line."""
    shared: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for r in paper:
        line = (r.dataset, r.protocol, r.anonymizer, r.view, r.statistic, f"{r.tolerance:.6g}", r.why_tolerance)
        shared[(*line, r.certainty, r.source, r.note)].append(r.scorer)
    header = [
        "dataset",
        "protocol",
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
            lines = [list(map(on_one_line, line)) for line in (grid.header, *grid.rows)]
            tabular = tabulate(lines[1:], lines[0], tablefmt="latex_booktabs", disable_numparse=True)
            caption = "".join(
                LATEX_ESCAPE_RULES.get(c, c) for c in on_one_line(f"{experiment}, {heading}. {grid.title}.")
            )
            fitted = f"\\resizebox{{\\ifdim\\width>\\linewidth\\linewidth\\else\\width\\fi}}{{!}}{{%\n{tabular}}}"
            parts.append(f"\\begin{{table}}\n\\centering\n\\caption{{{caption}}}\n{fitted}\n\\end{{table}}")
    symbols = str.maketrans({"↑": r"$\uparrow$", "↓": r"$\downarrow$", "±": r"$\pm$"})
    return "\n\n".join(parts).translate(symbols) + "\n"
