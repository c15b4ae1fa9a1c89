"""Do the documents say what the tables show? `python -m experiments.claims [--ledger docs/claims.yaml]`

The ledger has, for each page, sentences and the cells that they rest on:

    docs/security.md:
      - says: the sentence as it stands there, whatever breaks its lines
        cells:
          - {table: tables/security_lfw.csv, row: {anonymizer: exact, view: ...}, column: ours, prints: "0.52"}

`table` is below results/. `row` and `column` (`ours`, if none is named) have to choose one number. Bounds, one or more: `at_least`,
`at_most`, `between: [low, high]`, or `prints`, digits that stand in the sentence and are the cell's, rounded to as many. `52 %` is
a share. A sentence that is gone, a cell that is none or several, and a bound that is broken are one line each, and exit code 1.
"""

import argparse
import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from experiments.harness.command import CHECKOUT
from keyanon.errors import BadData, UserError

BOUNDS = {"at_least", "at_most", "between", "prints"}
FIELDS = {"table", "row", "column", *BOUNDS}
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
    """A sentence of a page."""

    page: str
    says: str
    cells: Sequence[Cell]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.claims",
        description="Check the claims of the documents against the committed tables.",
    )
    parser.add_argument("--ledger", type=Path, default=CHECKOUT / "docs" / "claims.yaml", help="the file of claims")
    parser.add_argument("--root", type=Path, default=CHECKOUT, help="what holds the pages and results/")
    options = parser.parse_args(arguments)
    try:
        claims = read_ledger(options.ledger)
        broken = [line for claim in claims for line in faults(claim, options.root)]
    except UserError as error:
        raise SystemExit(f"claims: {error}") from error
    for line in broken:
        print(line)
    cells = sum(len(claim.cells) for claim in claims)
    print(f"{len(claims)} claims on {cells} cells: {len(broken) or 'none'} broken")
    if broken:
        raise SystemExit(1)


def read_ledger(path: Path) -> list[Claim]:
    """The claims of a file; BadLedger names what is no claim."""
    try:
        pages = yaml.safe_load(path.read_text("utf-8"))
        return [
            Claim(page, squeezed(entry["says"]), [cell_of(cell) for cell in entry["cells"]])
            for page, entries in pages.items()
            for entry in entries
        ]
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
        raise BadLedger(f"{path}: not a list of sentences (says, cells) for each page: {error}") from error


def cell_of(entry: Mapping[str, Any]) -> Cell:
    bounds = {name: entry[name] for name in entry.keys() & BOUNDS}
    if not bounds or entry.keys() - FIELDS:
        raise BadLedger(f"{dict(entry)}: a cell has table, row, column, and a bound: {', '.join(sorted(BOUNDS))}")
    row = {name: str(value) for name, value in entry["row"].items()}
    return Cell(entry["table"], row, entry.get("column", "ours"), bounds)


def faults(claim: Claim, root: Path) -> Iterator[str]:
    """What is wrong with a claim, a line each."""
    page = root / claim.page
    if not page.is_file() or claim.says not in squeezed(page.read_text("utf-8")):
        yield f"{claim.page}: does not say {claim.says!r}"
    for cell in claim.cells:
        value = number(cell, root)
        if isinstance(value, str):
            yield f"{claim.page}: {claim.says!r}: {value}"
            continue
        for name, bound in cell.bounds.items():
            if name == "prints" and not printed_in(claim.says, bound):
                yield f"{claim.page}: {claim.says!r}: does not print {bound}"
            elif not holds(name, bound, value):
                yield f"{claim.page}: {claim.says!r}: {cell} is {value:g}, not {name.replace('_', ' ')} {bound}"


def number(cell: Cell, root: Path) -> float | str:
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


def rows(path: Path) -> list[dict[str, str]]:
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
