"""The claim ledger: what the documents say is what the tables show, and whatever moves is told."""

import shutil
from pathlib import Path

import pytest
import yaml

from experiments.claims import BadLedger, Page, bare, decimal, holds, main, printed_in, read_ledger, unclaimed, units
from tests.conftest import ROOT

LEDGER = ROOT / "docs" / "claims.yaml"


def test_the_documents_say_what_the_tables_show(capsys):
    main([])
    assert capsys.readouterr().out.endswith("none broken\n")


SAID = next(
    claim.says for page in read_ledger(LEDGER) for claim in page.claims if claim.says.startswith("Faces come back")
)


def test_the_ledger_is_about_every_document_with_numbers():
    pages = {page.path: page for page in read_ledger(LEDGER)}
    assert {"README.md", "docs/security.md", "docs/method.md", "docs/protocol.md"} <= pages.keys()
    assert sum(len(page.claims) for page in pages.values()) >= 40
    assert all(claim.cells for page in pages.values() for claim in page.claims)
    assert "What was found" in pages["README.md"].complete
    assert {"Conclusions", "Measured"} <= set(pages["docs/security.md"].complete)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Pages, ledger and tables that can be broken."""
    for page in read_ledger(LEDGER):
        (tmp_path / page.path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / page.path, tmp_path / page.path)
        for table in {cell.table for claim in page.claims for cell in claim.cells}:
            (tmp_path / "results" / table).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / "results" / table, tmp_path / "results" / table)
    return tmp_path


def told(root: Path, capsys: pytest.CaptureFixture[str], ledger: Path = LEDGER) -> list[str]:
    """The lines about what is broken, of which there are some."""
    with pytest.raises(SystemExit) as stopped:
        main(["--ledger", str(ledger), "--root", str(root)])
    assert stopped.value.code == 1
    *lines, total = capsys.readouterr().out.splitlines()
    assert total.endswith(f"{len(lines)} broken")
    return lines


def changed(path: Path, old: str, new: str) -> None:
    text = path.read_text("utf-8")
    assert text.count(old) == 1
    path.write_text(text.replace(old, new), "utf-8")


KURTOSIS = "exact,right key told by z_T,excess_kurtosis,auc,113,0,0.989124"


def test_a_cell_that_moved_is_told(copy, capsys):
    changed(copy / "results/tables/security_lfw.csv", KURTOSIS, KURTOSIS.replace("0.989124", "0.979124"))
    lines = told(copy, capsys)
    assert len(lines) == 3  # of the three sentences that rest on it
    assert all("excess_kurtosis, auc] ours is 0.979124, not prints 0.989" in line for line in lines)


def test_a_cell_that_moved_within_its_digits_is_not(copy, capsys):
    changed(copy / "results/tables/security_lfw.csv", KURTOSIS, KURTOSIS.replace("0.989124", "0.989312"))
    main(["--root", str(copy)])
    assert "none broken" in capsys.readouterr().out


def test_a_sentence_that_changed_is_told(copy, capsys):
    changed(copy / "README.md", SAID, SAID.replace(" at ", " at 1"))
    lines = told(copy, capsys)
    assert any(line.startswith(f"README.md: does not say '{SAID}'") for line in lines)
    assert any(
        line.startswith(f"README.md: nothing in the ledger for '{SAID.replace(' at ', ' at 1')}'") for line in lines
    )


def test_a_sentence_may_break_its_lines_otherwise(copy, capsys):
    changed(copy / "README.md", SAID, SAID.replace(" ", "\n", 2))
    main(["--root", str(copy)])


def test_a_row_that_is_gone_or_there_twice_is_told(copy, capsys):
    table = copy / "results/tables/quickstart.csv"
    lines = table.read_text("utf-8").splitlines(keepends=True)
    (row,) = [line for line in lines if ",signflip,recovered,psnr_face,mean," in line]
    table.write_text("".join(line for line in lines if line != row), "utf-8")
    assert told(copy, capsys) == [
        f"README.md: '{SAID}': tables/quickstart.csv [signflip, recovered, psnr_face, mean] ours: 0 rows fit"
    ]
    table.write_text("".join([*lines, row]), "utf-8")
    assert told(copy, capsys)[0].endswith("2 rows fit")


def test_a_number_that_nobody_claims_is_told(copy, capsys):
    changed(copy / "docs/security.md", "## Measured\n", "## Measured\n\nNobody was recognized in 99 % of all worlds.\n")
    assert told(copy, capsys) == [
        "docs/security.md: nothing in the ledger for 'Nobody was recognized in 99 % of all worlds.'"
    ]


def test_a_table_or_column_that_is_gone_is_told(copy, capsys, tmp_path):
    cells = [
        {"table": "tables/none.csv", "row": {"view": "x"}, "at_most": 1},
        {"table": "tables/quickstart.csv", "row": {"view": "recovered", "scorer": "psnr", "statistic": "mean"}, "column": "us",
         "at_most": 1},
    ]  # fmt: skip
    ledger = tmp_path / "mine.yaml"
    ledger.write_text(yaml.safe_dump({"README.md": {"claims": [{"says": "# keyanon", "cells": cells}]}}))
    first, second = told(copy, capsys, ledger)
    assert "results/tables/none.csv does not exist" in first
    assert second.endswith("us: None is no number")


@pytest.mark.parametrize(
    "text", ["", "- a", "a.md: {claims: [{says: a}]}", "a: [", "a.md: {claims: [{says: a, cells: [{}]}]}"]
)
def test_a_ledger_that_is_none_is_one_line(text, tmp_path):
    ledger = tmp_path / "ledger.yaml"
    ledger.write_text(text)
    with pytest.raises(BadLedger):
        read_ledger(ledger)
    with pytest.raises(SystemExit, match="claims: "):
        main(["--ledger", str(ledger)])


@pytest.mark.parametrize(
    ("digits", "value", "same"),
    [
        ("0.52", 0.5249, True), ("0.52", 0.525, True), ("0.52", 0.5251, False), ("98 %", 0.9797, True), ("98 %", 0.9749, False),
        ("8,352", 8351.81, True), ("8,352", 8353, False), ("-0.002", -0.0021, True), ("0", 0.0, True), ("1e-11", 1.2e-11, True),
        ("1e-11", 2e-11, False), ("0.50", float("nan"), False),
    ],
)  # fmt: skip
def test_printed_digits_are_the_cells(digits, value, same):
    assert holds("prints", digits, value) is same


def test_bounds_are_inclusive():
    assert holds("at_least", 1, 1.0)
    assert holds("at_most", 1, 1.0)
    assert holds("between", [0.5, 1], 0.5)
    assert not holds("between", [0.5, 1], 1.01)
    assert decimal("0.06") == pytest.approx((0.06, 0.01))


def test_digits_stand_whole_in_the_sentence():
    assert printed_in("it is 0.52, a guess", "0.52")
    assert printed_in("| 0.52 [0.44, 0.61] |", "0.44")
    assert not printed_in("it is 0.521", "0.52")
    assert not printed_in("it is 10.52", "0.52")


def test_sections_are_taken_sentence_by_sentence(tmp_path):
    section = "One is 1. Two\nis 2.\n\n1. **Third** is 3.\n2. Fourth.\n\n    code 5\n\n| row 6. A | 7 |\n* Last `8` is [x](9.md).\n"
    sentences = ["One is 1.", "Two is 2.", "**Third** is 3.", "Fourth.", "| row 6. A | 7 |", "Last `8` is [x](9.md)."]
    assert units(section) == sentences
    assert [any(c.isdigit() for c in bare(text)) for text in units(section)] == [True, True, True, False, True, False]
    (tmp_path / "a.md").write_text("# Top\n\n## Here\n\n" + section + "\n## There\n\nNine is 9.\n")
    lines = list(unclaimed(Page("a.md", [], ["Here", "Gone"], ["One is 1.", "row 6"]), tmp_path))
    assert [line.partition("a.md: ")[2] for line in lines] == [
        "nothing in the ledger for 'Two is 2.'",
        "nothing in the ledger for '**Third** is 3.'",
        "has no section 'Gone'",
    ]
