"""Data frames as CSV files that a spreadsheet does not run, and back."""

from pathlib import Path
from typing import Any

import pandas as pd

from keyanon.sheets import inert, restored


def csv_of(frame: pd.DataFrame, **options: Any) -> bytes:
    """As DataFrame.to_csv without the index, with keyanon.sheets.inert texts."""
    texts = frame.select_dtypes(exclude="number").columns
    return bytes(
        frame.assign(**{name: frame[name].map(inert) for name in texts})
        .to_csv(index=False, lineterminator="\n", **options)
        .encode()
    )


def read_csv(path: Path, **options: Any) -> pd.DataFrame:
    """As pandas.read_csv, with the texts that `csv_of` was given."""
    frame = pd.read_csv(path, **options)
    texts = frame.select_dtypes(exclude="number").columns
    back: pd.DataFrame = frame.assign(**{name: frame[name].map(restored) for name in texts})
    return back
