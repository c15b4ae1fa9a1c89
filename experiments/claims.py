"""Do the documents say what the tables show? `python -m experiments.claims [--ledger docs/claims.yaml]`

The ledger has, for each page, sentences and the cells that they rest on:

    docs/security.md:
      complete: [Measured]                      # sections whose every number has to be claimed or given
      given: ["94 people"]                      # what no table shows: settings, sizes, dates, literature
      claims:
        - says: the sentence as it stands there, whatever breaks its lines
          cells:
            - {table: tables/security_lfw.csv, row: {anonymizer: exact, view: ...}, column: ours, prints: "0.52"}

`table` is below results/. `row` and `column` (`ours`, if none is named) have to choose one number. Bounds, one or more: `at_least`,
`at_most`, `between: [low, high]`, or `prints`, digits that stand in the sentence and are the cell's, rounded to as many. `52 %` is
a share. A sentence that is gone, a cell that is none or several, a bound that is broken, and a number that nobody claims are one
line each, and exit code 1.
"""

import argparse
import csv
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from experiments.harness.command import CHECKOUT
from keyanon.errors import BadData, UserError

BOUNDS = {"at_least", "at_most", "between", "prints"}
FIELDS = {"table", "row", "column", *BOUNDS}
Rows = Callable[[Path], list[dict[str, str]]]
SLACK = 1e-9  # of floats read from decimal digits


class BadLedger(BadData):
    """The ledger cannot be read."""


@dataclass(frozen=True)
class Cell:
    """A number that a sentence rests on, and what it has to be."""

    table: str
    row: Mapping[str, str]
    column: str
    bounds: Mapping[str, Any]

    def __str__(self) -> str:
        return f"{self.table} [{', '.join(self.row.values())}] {self.column}"


@dataclass(frozen=True)
class Claim:
    """A sentence of a page, and what it rests on."""

    says: str
    cells: Sequence[Cell]


@dataclass(frozen=True)
class Page:
    """What a page claims, which of its sections are to be claimed whole, and what is given there."""

    path: str
    claims: Sequence[Claim]
    complete: Sequence[str] = ()
    given: Sequence[str] = ()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.claims",
        description="Check the claims of the documents against the committed tables.",
    )
    parser.add_argument("--ledger", type=Path, default=CHECKOUT / "docs" / "claims.yaml", help="the file of claims")
    parser.add_argument("--root", type=Path, default=CHECKOUT, help="what holds the pages and results/")
    options = parser.parse_args(arguments)
    try:
        pages = read_ledger(options.ledger)
        rows = cache(read_rows)  # each table once
        broken = [
            line
            for page in pages
            for line in (*broken_claims(page, options.root, rows), *unclaimed(page, options.root))
        ]
    except UserError as error:
        raise SystemExit(f"claims: {error}") from error
    for line in broken:
        print(line)
    claims = [claim for page in pages for claim in page.claims]
    cells = sum(len(claim.cells) for claim in claims)
    print(f"{len(claims)} claims on {cells} cells: {len(broken) or 'none'} broken")
    if broken:
        raise SystemExit(1)


def read_ledger(path: Path) -> list[Page]:
    """The pages of a file; BadLedger names what is no claim."""
    try:
        return [
            Page(
                page,
                [Claim(squeezed(one["says"]), [cell_of(cell) for cell in one["cells"]]) for one in entry["claims"]],
                entry.get("complete", ()),
                [squeezed(text) for text in entry.get("given", ())],
            )
            for page, entry in yaml.safe_load(path.read_text("utf-8")).items()
        ]
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
        raise BadLedger(f"{path}: no pages with claims (says, cells): {type(error).__name__}: {error}") from error


def cell_of(entry: Mapping[str, Any]) -> Cell:
    bounds = {name: entry[name] for name in entry.keys() & BOUNDS}
    if not bounds or entry.keys() - FIELDS:
        raise BadLedger(f"{dict(entry)}: a cell has table, row, column, and a bound: {', '.join(sorted(BOUNDS))}")
    row = {name: str(value) for name, value in entry["row"].items()}
    return Cell(entry["table"], row, entry.get("column", "ours"), bounds)


def broken_claims(page: Page, root: Path, rows: Rows) -> Iterator[str]:
    """What is wrong with a page's claims, a line each."""
    text = squeezed(read_page(page, root))
    for claim in page.claims:
        if claim.says not in text:
            yield f"{page.path}: does not say {claim.says!r}"
        for cell in claim.cells:
            for fault in faults(cell, claim.says, root, rows):
                yield f"{page.path}: {claim.says!r}: {fault}"


def faults(cell: Cell, sentence: str, root: Path, rows: Rows) -> Iterator[str]:
    value = number(cell, root, rows)
    if isinstance(value, str):
        yield value
        return
    for name, bound in cell.bounds.items():
        if name == "prints" and not printed_in(sentence, bound):
            yield f"does not print {bound}"
        elif not holds(name, bound, value):
            yield f"{cell} is {value:g}, not {name.replace('_', ' ')} {bound}"


def unclaimed(page: Page, root: Path) -> Iterator[str]:
    """A line for each sentence or row of the page's complete sections that has a digit, and is neither claimed nor given."""
    sections = dict(re.findall(r"^#+ (.+?)\n(.*?)(?=^#|\Z)", read_page(page, root), re.MULTILINE | re.DOTALL))
    known = [*(claim.says for claim in page.claims), *page.given]
    for heading in page.complete:
        if heading not in sections:
            yield f"{page.path}: has no section {heading!r}"
        for unit in units(sections.get(heading, "")):
            if re.search(r"\d", bare(unit)) and not any(text in unit or unit in text for text in known):
                yield f"{page.path}: nothing in the ledger for {unit!r}"


def units(section: str) -> list[str]:
    """The sentences of a section's paragraphs and lists, and the rows of its tables; code is none."""
    prose = re.sub(r"^ {4}\S.*$", "", section, flags=re.MULTILINE)
    blocks = [squeezed(block) for block in re.split(r"\n\s*\n|\n(?=\s*(?:[-*|]|\d+\.)\s)", prose)]
    found: list[str] = []
    for block in blocks:
        row, text = block.startswith("|"), re.sub(r"^(?:[-*]|\d+\.) ", "", block)
        found += [block] if row else re.split(r"(?<=[.!?])\**\s+(?=[\[A-Z`*])", text)
    return [sentence for sentence in found if sentence]


def bare(sentence: str) -> str:
    """A sentence without code, places of links, and words that have a digit."""
    text = re.sub(r"`[^`]*`|\]\([^)]*\)", " ", sentence)
    return re.sub(r"[A-Za-z_][\w-]*\d[\w-]*", " ", text)


def read_page(page: Page, root: Path) -> str:
    path = root / page.path
    return path.read_text("utf-8") if path.is_file() else ""


def number(cell: Cell, root: Path, rows: Rows) -> float | str:
    """The cell's number, or what is wrong with it."""
    path = root / "results" / cell.table
    if not path.is_file():
        return f"{path.relative_to(root)} does not exist"
    found = [row for row in rows(path) if all(row.get(name) == value for name, value in cell.row.items())]
    if len(found) != 1:
        return f"{cell}: {len(found)} rows fit"
    try:
        return float(found[0][cell.column])
    except (KeyError, TypeError, ValueError):
        return f"{cell}: {found[0].get(cell.column)!r} is no number"


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def holds(name: str, bound: Any, value: float) -> bool:
    if name == "prints":
        return abs(value - decimal(bound)[0]) <= decimal(bound)[1] / 2 * (1 + SLACK) + SLACK * abs(value)
    low, high = {"at_least": (bound, float("inf")), "at_most": (-float("inf"), bound), "between": bound}[name]
    return float(low) <= value <= float(high)


def decimal(digits: str) -> tuple[float, float]:
    """The value that printed digits stand for, and one step of their last place."""
    plain, share = re.sub(r"[,\s%]", "", str(digits)), 0.01 if str(digits).endswith("%") else 1.0
    mantissa, _, exponent = plain.partition("e")
    step = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
    return float(plain) * share, step * share


def printed_in(sentence: str, digits: str) -> bool:
    """Whether the digits stand in a sentence, and are no part of a longer number."""
    return re.search(rf"(?<![\d.]){re.escape(str(digits))}(?!\.?\d)", sentence) is not None


def squeezed(text: str) -> str:
    """Text with one space wherever there is any."""
    return " ".join(text.split())


if __name__ == "__main__":
    main()
