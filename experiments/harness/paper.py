"""The paper's numbers, which are data: results/paper/NAME.yaml, one entry a cell."""

from collections import Counter
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

import yaml

from experiments.harness.protocol import AUTHORS
from keyanon.errors import BadData
from keyanon.settings import is_number

CELL = ["dataset", "protocol", "anonymizer", "view", "scorer", "statistic"]
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
    protocol: str = AUTHORS
    std: float | None = None  # over pictures, where the paper prints it: shown, not compared
    note: str = ""

    @property
    def cell(self) -> tuple[str, ...]:
        return (self.dataset, self.protocol, self.anonymizer, self.view, self.scorer, self.statistic)


def read_paper(path: Path) -> list[Reference]:
    """The references of one file of results/paper, checked; BadData names file, entry and what is wrong."""
    try:
        entries = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise BadData(f"{path}: not YAML in UTF-8 ({' '.join(str(error).split())})") from error
    if not isinstance(entries, list):
        raise BadData(f"{path}: expected a list of cells, found {type(entries).__name__}")
    references = []
    for number, entry in enumerate(entries, 1):
        try:
            references.append(reference(entry))
        except ValueError as error:
            raise BadData(f"{path}, entry {number}: {error}") from error
    for cell, count in Counter(r.cell for r in references).items():
        if count > 1:
            raise BadData(f"{path}: {count} entries for one cell: {' '.join(cell)}; keep one")
    return references


def reference(entry: object) -> Reference:
    if not isinstance(entry, dict):
        raise ValueError(f"expected keys and values, found {entry!r}")
    known = {field.name: field for field in fields(Reference)}
    if unknown := sorted(map(str, entry.keys() - known.keys())):
        raise ValueError(f"unknown key {', '.join(unknown)}; known are {', '.join(known)}")
    if missing := [name for name, field in known.items() if field.default is MISSING and name not in entry]:
        raise ValueError(f"missing key {', '.join(missing)}")
    for name, value in entry.items():
        number = known[name].type is not str
        if isinstance(value, bool) or not isinstance(value, int | float if number else str):
            raise ValueError(f"{name} is {value!r}; expected a {'number' if number else 'text'}")
        if number and not is_number(value):
            raise ValueError(f"{name} is {value}; expected a finite number")
    if entry["tolerance"] < 0:
        raise ValueError(f"tolerance is {entry['tolerance']}; expected 0 or more")
    if entry["certainty"] not in CERTAINTIES:
        raise ValueError(f"certainty is {entry['certainty']!r}; expected one of {', '.join(CERTAINTIES)}")
    return Reference(**entry)
