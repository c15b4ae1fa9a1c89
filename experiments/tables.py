"""Tables of the paper's numbers beside ours: `python -m experiments.tables [EXPERIMENT ...] [--runs FOLDER ...]`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from experiments.harness.layout import summary
from experiments.harness.results import RESULTS, build, known_experiments
from keyanon.errors import UserError


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
    except UserError as error:
        raise SystemExit(f"tables: {error}") from error


if __name__ == "__main__":
    main()
