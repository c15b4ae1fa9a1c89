"""What the names in a table mean, as the parts of an experiment declare it; kept beside the results, so that tables guess nothing.

One row a name: whether it is a view, a scorer or a statistic, and the fields of keyanon.types.View, Measure and Summary.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

import pandas as pd

from experiments.harness.frames import csv_of
from experiments.harness.statistics import read_frame
from keyanon import runner
from keyanon.errors import BadData
from keyanon.measures.biometrics import AVERAGES, WHOLE_SET, verification_summaries
from keyanon.types import (
    COSINE,
    Anonymizer,
    Attack,
    Direction,
    Kind,
    Measure,
    Recognizer,
    Role,
    Scorer,
    SetScorer,
    Summary,
    View,
    declared,
)

COLUMNS = ["what", "name", "role", "kind", "unit", "direction", "label"]
ALLOWED = {"role": get_args(Role), "kind": get_args(Kind), "direction": get_args(Direction)}


@dataclass(frozen=True)
class Meanings:
    """What views, scorers (recognizers among them) and statistics mean, by name. Names that nobody declared are absent."""

    views: Mapping[str, View] = field(default_factory=dict)
    scorers: Mapping[str, Measure] = field(default_factory=dict)
    statistics: Mapping[str, Summary] = field(default_factory=dict)

    def __or__(self, other: "Meanings") -> "Meanings":
        """Both; where they differ, the other."""
        return Meanings(
            {**self.views, **other.views},
            {**self.scorers, **other.scorers},
            {**self.statistics, **other.statistics},
        )

    def csv(self) -> bytes:
        """The rows, in an order that depends on nothing else."""
        groups: dict[str, Mapping[str, View | Measure | Summary]] = {
            "view": self.views,
            "scorer": self.scorers,
            "statistic": self.statistics,
        }
        rows = [
            {"what": what, "name": name, **asdict(meaning)}
            for what, group in groups.items()
            for name, meaning in sorted(group.items())
        ]
        return csv_of(pd.DataFrame(rows, columns=COLUMNS))


def meanings(
    scorers: Mapping[str, Scorer | SetScorer],
    recognizers: Mapping[str, Recognizer],
    attacks: Mapping[str, Attack],
    method: Anonymizer,
    far: float,
) -> Meanings:
    """What the parts of a run declare, and what the runner declares of the views and numbers that it makes itself."""
    attacked, measured = ({name: declared(part) for name, part in parts.items()} for parts in (attacks, scorers))
    return Meanings(
        {**runner.VIEWS, **{name: view for name, view in attacked.items() if isinstance(view, View)}},
        {
            **runner.MEASURES,
            **method.about.measures,
            **{name: measure for name, measure in measured.items() if isinstance(measure, Measure)},
            **dict.fromkeys(recognizers, COSINE),
        },
        {**AVERAGES, **verification_summaries(far), WHOLE_SET: Summary("over the whole set")},
    )


def read_meanings(path: Path) -> Meanings:
    """The rows of a file, none where it is missing; BadData names the row that says what no table knows."""
    if not path.is_file():
        return Meanings()
    groups: dict[str, dict[str, Any]] = {"view": {}, "scorer": {}, "statistic": {}}
    rows = read_frame(path, COLUMNS, dtype=str, keep_default_na=False).to_dict("records")
    for row in rows:
        if row["what"] not in READERS:
            raise BadData(f"{path}: {row['name']} is a {row['what']!r}; expected one of {', '.join(READERS)}")
        for column, allowed in ALLOWED.items():
            if row[column] and row[column] not in allowed:
                raise BadData(
                    f"{path}: {row['name']} has the {column} {row[column]!r}; expected one of {', '.join(allowed)}"
                )
        groups[row["what"]][row["name"]] = READERS[row["what"]](row)
    return Meanings(groups["view"], groups["scorer"], groups["statistic"])


READERS: dict[str, Callable[[Mapping[Any, Any]], View | Measure | Summary]] = {
    "view": lambda row: View(row["role"], row["label"]),
    "scorer": lambda row: Measure(row["kind"], row["unit"], row["direction"], row["label"]),
    "statistic": lambda row: Summary(row["label"], row["direction"] or None),
}
