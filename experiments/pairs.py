"""Make the numbers of pairs again, from the committed scores: `python -m experiments.pairs NAME [--results FOLDER]`.

Linkage (AUC, D_sys, what D_sys is by chance) and the two-sample tests of a security experiment, with their intervals, are made of
scores/NAME.pairs.parquet alone, which holds numbers and no names. Each is compared with tables/NAME.csv, digit by digit: what
differs is listed, and ends with exit code 1. Cells whose pairs an earlier run did not keep are counted: exit code 3.
"""

import argparse
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd

from experiments.harness.errors import SKIPPED
from experiments.harness.paper import CELL
from experiments.harness.results import RESULTS, ROW
from experiments.harness.statistics import PAIRS, pairs_of, read_frame
from keyanon.attacks.pairs import PHOTOGRAPH, TWO_FILES, statistics_of_pairs
from keyanon.errors import BadData, MissingData, UserError

NUMBERS = ["n", "undefined", "ours", "ci_low", "ci_high"]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.pairs", description="Make linkage and two-sample tests again from scores of pairs."
    )
    parser.add_argument("experiment", metavar="NAME", help="a security experiment with committed scores of pairs")
    place = "whose scores/ and tables/: results/runs/NAME, or (default) the committed ones"
    parser.add_argument("--results", type=Path, default=RESULTS, help=place)
    options = parser.parse_args(arguments)
    try:
        made = made_again(options.results / "scores" / f"{options.experiment}.pairs.parquet")
        path = options.results / "tables" / f"{options.experiment}.csv"
        table = printed(path)
        different = list(differences(made, table))
    except UserError as error:
        raise SystemExit(f"pairs: {error}") from error
    for line in different:
        print(line)
    print(f"{len(made) - len(different)} of {len(made)} cells are equal to those of {path}")
    if lacking := len(of_pairs(table).difference(made.index)):
        print(f"{lacking} more cells there are of pairs whose scores were not kept: an earlier run's")
    if different:
        raise SystemExit(1)
    if lacking:
        raise SystemExit(SKIPPED)


def made_again(path: Path) -> pd.DataFrame:
    """The cells that scores of pairs give, as a table prints them."""
    if not path.is_file():
        raise MissingData(
            f"{path} does not exist: the experiment has no scores of pairs, or was run before they were kept"
        )
    rows = []
    kept = read_frame(path, [*ROW, *PAIRS])
    if kept.empty:
        raise BadData(f"{path}: no scores of pairs in it")
    for row, pairs in kept.groupby(ROW, sort=False, observed=True):
        for one in statistics_of_pairs(pairs_of(pairs)):
            s = one.statistic
            cell = (*row, one.view, one.scorer, s.statistic)
            rows.append((*cell, s.n, s.undefined, s.value, s.low, s.high))
    text = pd.DataFrame(rows, columns=[*CELL, *NUMBERS]).to_csv(index=False, float_format="%.6g")
    return text_table(text.splitlines())


def printed(path: Path) -> pd.DataFrame:
    """A table's cells, as they are printed."""
    if not path.is_file():
        raise MissingData(f"{path} does not exist; make it: python -m experiments.tables {path.stem}")
    return text_table(path.read_text("utf-8").splitlines())


def text_table(lines: Sequence[str]) -> pd.DataFrame:
    rows = pd.read_csv(io.StringIO("\n".join(lines)), dtype=str, keep_default_na=False)
    if missing := {*CELL, *NUMBERS} - set(rows.columns):
        raise BadData(f"a table without the columns {', '.join(sorted(missing))}")
    return rows.set_index(CELL)[NUMBERS]


def of_pairs(table: pd.DataFrame) -> pd.Index:
    """The cells of a table that are made of pairs: linkage and two-sample tests."""
    views, statistics = (table.index.get_level_values(name) for name in ("view", "statistic"))
    linkage = views.isin([TWO_FILES, PHOTOGRAPH]) & statistics.isin(["auc", "d_sys", "d_sys by chance"])
    return table.index[linkage | statistics.isin(["ks_d", "ks_p"])]


def differences(made: pd.DataFrame, table: pd.DataFrame) -> Iterator[str]:
    """A line for each cell that the table has not, or has otherwise."""
    for cell, numbers in made.iterrows():
        name = ", ".join(map(str, cell)) if isinstance(cell, tuple) else str(cell)
        if cell not in table.index:
            yield f"{name}: {' '.join(numbers)} by the pairs, not in the table"
        elif (theirs := table.loc[[cell]].iloc[0]).tolist() != numbers.tolist():
            yield f"{name}: {' '.join(numbers)} by the pairs, {' '.join(theirs)} in the table"


if __name__ == "__main__":
    main()
