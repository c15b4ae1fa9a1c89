"""No name of a stranger's file runs in a spreadsheet, a Markdown page or LaTeX."""

import csv
import io
import re

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.harness.frames import csv_of, read_csv
from experiments.harness.layout import Grid, celled, latex, piped
from experiments.harness.meaning import Meanings, read_meanings
from keyanon.faces.renaming import Renamed
from keyanon.run_folder import RunFiles
from keyanon.sheets import csv_text, inert, restored
from keyanon.types import View

FORMULAS = [
    "=1+1", "+1+1", "-1+1", "@SUM(A1)", "=cmd|' /C calc'!A0", '=HYPERLINK("http://x?"&A1,"name")', "\t=1", "\r=1", "\n=1", "\tx",
    "\rx", ' =1+1', '"=1+1', "'=1+1", "\u201c=1+1", "  '\"@x", "\uff1d1+1", "\uff0d1+1", "-2+3+cmd|' /C calc'!A0", "=", "a;=1+1",
    'a"; "=1+1', "-1-1;x",
]  # fmt: skip
HARMLESS = [
    "Jane Doe_0001",
    "a=b",
    "x-1",
    "-",
    "+",
    "5",
    "-5",
    "+3.5e-2",
    "-inf",
    "nan",
    "",
    "e@mail",
    "no face; found",
    "1;2",
]


def runs(text: str) -> bool:
    """Whether a cell, or a part of it that is one where semicolons part cells, begins as a formula."""
    return any(
        re.match(r"[\s\"'\u201c\u201d\u2018\u2019]*[=+\-@\uff1d\uff0b\uff0d\uff20].", part, re.DOTALL)
        and not part.startswith("'")
        for part in text.split(";")
    )


@pytest.mark.parametrize("text", FORMULAS)
def test_formulas_become_texts_that_can_be_had_back(text):
    if text != "=":
        assert inert(text) != text
    assert not runs(str(inert(text)))
    assert str(inert(text))[:1] not in "\t\r\n"
    assert restored(inert(text)) == text


@pytest.mark.parametrize("cell", [*HARMLESS, 5, -5, -0.25, float("-inf"), None])
def test_numbers_and_other_texts_stay(cell):
    assert inert(cell) == cell
    assert restored(cell) == cell


@given(st.text(st.sampled_from("=+-@;'\"\t\r\n a1\uff1d\u201c")))
def test_any_text_comes_back_and_none_runs(text):
    assert restored(inert(text)) == text
    try:
        float(text)
    except ValueError:
        assert not runs(str(inert(text)).replace("\n", ";").replace("\r", ";").replace("\t", ";"))


def cells(data: bytes) -> list[str]:
    return [cell for row in csv.reader(io.StringIO(data.decode(), newline="")) for cell in row]


@pytest.mark.parametrize("name", [text for text in FORMULAS if text.isprintable()])
def test_every_list_of_names(tmp_path, name):
    class Strange:
        ids, gallery = (name,), ()

    RunFiles(tmp_path).list_skipped({name: f"{name}: no face"})
    (tmp_path / "names").mkdir()
    lists = [tmp_path / "skipped.csv", Renamed(Strange(), tmp_path / "names").table]
    for path in lists:
        found = cells(path.read_bytes())
        assert any(restored(cell) == name for cell in found)
        assert not any(map(runs, found))


def test_every_table(tmp_path):
    names = [text for text in FORMULAS if text.isprintable()] + HARMLESS[:2]
    frame = pd.DataFrame(
        {
            "name": names,
            "value": [-1.5] * len(names),
            "count": pd.array([-1, *[None] * (len(names) - 1)], "Int64"),
        }
    )
    (tmp_path / "x.csv").write_bytes(csv_of(frame))
    assert not any(runs(cell) for cell in cells((tmp_path / "x.csv").read_bytes()) if cell not in ("-1.5", "-1"))
    assert b",-1.5,-1\n" in (tmp_path / "x.csv").read_bytes()
    assert read_csv(tmp_path / "x.csv", dtype={"count": "Int64"}).equals(frame)
    meanings = Meanings({name: View("attacked", name) for name in names})
    (tmp_path / "meanings.csv").write_bytes(meanings.csv())
    assert not any(map(runs, cells(meanings.csv())))
    assert read_meanings(tmp_path / "meanings.csv") == meanings


def test_csv_text_quotes_what_parts_cells():
    assert csv_text(["id", "reason"], [("a,=1", 'b"=1'), (-1, "-1")]) == 'id,reason\n"a,=1","b""=1"\n-1,-1\n'


HOSTILE = [
    "<script>alert(1)</script>",
    "[x](javascript:alert(1))",
    "![](http://example.org/x)",
    "a|b",
    "two\n\nlines",
    "\\<b>",
    "a\u2028b",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_no_name_runs_in_markdown(name):
    text = celled(name)
    assert len(text.splitlines()) == 1
    assert not re.search(r"(?<!\\)(\\\\)*[<|]", text)
    assert "](" not in text
    table = piped(Grid("", [name, "b"], [[name, "1"]]))
    assert len(table.splitlines()) == 3


@pytest.mark.parametrize(
    "name", [*HOSTILE, r"\input{/etc/passwd}", "$x$", "a & b % c", r"\write18{rm}", "^^M", "~#_{}"]
)
def test_no_name_runs_in_latex(name):
    text = latex("x", [(name, [Grid(name, [name, "b"], [[name, "1"]])])])
    for command in (r"\input{", r"\write18", "$x$", "^^", "& b %"):
        assert command not in text
    assert "\n\n" not in text.partition(r"\begin{table}")[2]
