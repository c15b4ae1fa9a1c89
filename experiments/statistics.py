"""From one number per picture to the numbers of a table: means and rates with 95 % intervals over identities."""

import io
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd

from keyanon import biometrics
from keyanon.biometrics import Statistic
from keyanon.images import write_whole
from keyanon.runner import GALLERY, ORIGINAL, read_parts
from keyanon.types import Dataset

COLUMNS = ["view", "scorer", "statistic", "n", "undefined", "value", "low", "high"]


def write_statistics(folder: Path, galleries: Sequence[Path], dataset: Dataset, far: float) -> pd.DataFrame:
    """scores.parquet and statistics.parquet of a run folder, from its parts and those of `galleries`; returns the statistics."""
    scores = read_parts(folder / "scores").to_pandas()
    embeddings = pd.concat([read_parts(place / "embeddings").to_pandas() for place in (folder, *galleries)])
    rows = [
        {"view": view, "scorer": scorer, **asdict(statistic)}
        for view, scorer, statistic in [*averages(scores, dataset), *verification(embeddings, dataset, far)]
    ]
    statistics = pd.DataFrame(rows)[COLUMNS]
    for name, table in (("scores", scores), ("statistics", statistics)):
        buffer = io.BytesIO()
        table.to_parquet(buffer, index=False)
        write_whole(folder / f"{name}.parquet", buffer.getvalue())
    return statistics


def averages(scores: pd.DataFrame, dataset: Dataset) -> Iterator[tuple[str, str, Statistic]]:
    """Mean, spread, median and 10th percentile of each view and scorer."""
    for (view, scorer), rows in scores.groupby(["view", "scorer"], sort=True):
        values, people = rows["value"].to_numpy(), [dataset.identity(id) or id for id in rows["id"]]
        for statistic in (
            biometrics.mean_statistic,
            biometrics.std_statistic,
            biometrics.quantile_statistic,
            biometrics.p10_statistic,
        ):
            yield str(view), str(scorer), statistic(values, people)


def verification(embeddings: pd.DataFrame, dataset: Dataset, far: float) -> Iterator[tuple[str, str, Statistic]]:
    """Rates of each view against the clean gallery, at the threshold that clean pictures give; nothing without a gallery."""
    for recognizer, rows in embeddings.groupby("scorer", sort=True):
        gallery, clean = rows[rows["view"] == GALLERY], rows[rows["view"] == ORIGINAL]
        if gallery.empty:
            continue
        for view, probes in rows[rows["view"] != GALLERY].groupby("view", sort=True):
            calibration = clean.set_index("id").loc[probes["id"]]
            for statistic in biometrics.verification_statistics(
                stack(probes),
                stack(gallery),
                people(probes, dataset),
                people(gallery, dataset),
                stack(calibration),
                far,
            ):
                yield str(view), str(recognizer), statistic


def stack(rows: pd.DataFrame) -> np.ndarray:
    return np.stack([np.asarray(row, np.float64) for row in rows["embedding"]])


def people(rows: pd.DataFrame, dataset: Dataset) -> list[str]:
    return [dataset.identity(id) or id for id in rows["id"]]
