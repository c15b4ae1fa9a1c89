"""CSV files that a spreadsheet shows and does not run.

A cell that begins with = + - @, a tab or a line's end is a formula to a spreadsheet, which may start programs or send other cells
away (OWASP, CSV Injection). Ids are names of files, which strangers give. So such a text gets an apostrophe before it: for the
spreadsheet it is a text then. Quotes and spaces before the sign do not matter, and what follows a semicolon counts as
well: it begins a cell where numbers have decimal commas. Numbers stay as they are.
"""

import csv
import io
import re
from collections.abc import Iterable, Sequence

SIGNS = "=+\\-@\uff1d\uff0b\uff0d\uff20"  # and their full-width forms
STARTS = rf"(?=[\s\"'\u2018\u2019\u201c\u201d]*([{SIGNS}].|[\t\r\n]))"
FORMULA = re.compile(rf"(^|[;\t\r\n]){STARTS}", re.DOTALL)
MARKED = re.compile(rf"(^|[;\t\r\n])'{STARTS}", re.DOTALL)
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?(inf|nan)", re.IGNORECASE)


def inert(cell: object) -> object:
    """A cell as it is written to a CSV file: a text that a spreadsheet would run has an apostrophe before it."""
    if not isinstance(cell, str) or NUMBER.fullmatch(cell):
        return cell
    return FORMULA.sub(r"\1'", cell)


def restored(cell: object) -> object:
    """The cell that `inert` has made this one of."""
    return MARKED.sub(r"\1", cell) if isinstance(cell, str) else cell


def csv_text(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Rows below the names of their columns as a CSV file that a spreadsheet can open."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([inert(cell) for cell in row] for row in rows)
    return buffer.getvalue()
