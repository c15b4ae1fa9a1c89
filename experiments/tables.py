"""Tables of the paper's numbers beside ours: `python -m experiments.tables [EXPERIMENT ...] [--runs FOLDER ...]`.

Without --runs they are made again from their scores: the committed ones, or those below --results. With it, scores and table of a
run take the place of the committed ones. That is for experiments with a committed configuration alone: a run keeps its own.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from experiments.harness.command import CHECKOUT
from experiments.harness.layout import summary
from experiments.harness.results import PAPER, RESULTS, build, known_experiments, latest_cells
from keyanon.channel.whole import write_whole
from keyanon.errors import BadSetting, UserError


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.tables", description="Write the tables of committed scores."
    )
    parser.add_argument(
        "experiments", nargs="*", metavar="EXPERIMENT", help="default: all that have scores or paper numbers"
    )
    from_runs = "collect scores from here first: run folders, or results/runs/EXPERIMENT with the latest of each row"
    parser.add_argument("--runs", nargs="+", type=Path, default=[], help=from_runs)
    place = "whose scores/ and tables/: results/runs/EXPERIMENT, or (default) the committed ones"
    parser.add_argument("--results", type=Path, default=RESULTS, help=place)
    options = parser.parse_args(arguments)
    if options.runs and len(options.experiments) != 1:
        parser.error("--runs needs the one experiment that the runs belong to")
    try:
        for experiment in options.experiments or known_experiments(options.results):
            if options.runs and options.results == RESULTS:
                refuse_uncommitted(experiment)
            runs = [cell for folder in options.runs for cell in cells(folder)]
            rows = build(experiment, runs, options.results, PAPER)
            for folder in options.runs:
                copy_drawn(folder, options.results)
            print(f"{options.results / 'tables' / experiment}.md: {summary(rows)}")
    except UserError as error:
        raise SystemExit(f"tables: {error}") from error


def cells(folder: Path) -> list[Path]:
    """The run folders that a folder stands for: the latest of each row below it, or itself."""
    return sorted(latest_cells(folder)) or [folder]


def copy_drawn(folder: Path, results: Path) -> None:
    """What an experiment made itself of its table, as experiments.security does."""
    for path in (*folder.glob("tables/*.beside.md"), *folder.glob("plots/*.svg")):
        place = results / path.parent.name / path.name
        place.parent.mkdir(parents=True, exist_ok=True)
        write_whole(place, path.read_bytes(), public=True)


def refuse_uncommitted(experiment: str) -> None:
    """Refuse to put scores among the committed ones that no committed file asks for; raises BadSetting."""
    asking = (f"conf/experiment/{experiment}.yaml", f"conf/{experiment}.yaml", f"results/scores/{experiment}.parquet")
    if not any((CHECKOUT / path).is_file() for path in asking):
        raise BadSetting(
            f"{experiment} is no committed experiment: {asking[0]} does not exist. Write it, or read the run's own "
            f"table: results/runs/{experiment}/tables/{experiment}.md"
        )


if __name__ == "__main__":
    main()
