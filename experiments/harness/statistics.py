"""From one number per picture to the numbers of a table: means and rates with 95 % intervals over identities."""

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from keyanon.channel.whole import write_whole
from keyanon.measures import biometrics
from keyanon.measures.biometrics import Floats, Statistic
from keyanon.runner import ORIGINAL, read_parts
from keyanon.types import Dataset

COLUMNS = ["view", "scorer", "statistic", "n", "undefined", "value", "low", "high"]


def write_statistics(
    folder: Path, galleries: Mapping[str, Path], dataset: Dataset, ids: Sequence[str], far: float
) -> pd.DataFrame:
    """scores.parquet and statistics.parquet of a run folder, of the pictures `ids`, from its parts and the recognizers'
    `galleries`; returns the statistics.
    """
    scores = of(ids, read_parts(folder / "scores")).to_pandas()
    rows = [
        {"view": view, "scorer": scorer, **asdict(statistic)}
        for view, scorer, statistic in [
            *averages(scores, dataset),
            *verification(folder, galleries, dataset, ids, far),
        ]
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


def verification(
    folder: Path, galleries: Mapping[str, Path], dataset: Dataset, ids: Sequence[str], far: float
) -> Iterator[tuple[str, str, Statistic]]:
    """Rates of each view against the clean gallery, at the threshold that clean pictures give; nothing without a gallery.

    Memory holds one recognizer's embeddings at a time.
    """
    for recognizer, place in sorted(galleries.items()):
        gallery, probes = read_parts(place / "embeddings"), of(ids, read_parts(folder / "embeddings", recognizer))
        if not (gallery.num_rows and probes.num_rows):
            continue
        enrolled, enrolled_people = vectors(gallery), people(gallery, dataset)
        clean = probes.filter(pc.equal(probes["view"], ORIGINAL))
        clean_vectors = vectors(clean)
        for view in sorted(pc.unique(probes["view"]).to_pylist()):
            seen = probes.filter(pc.equal(probes["view"], view))
            calibration = clean_vectors[pc.index_in(seen["id"], value_set=clean["id"]).to_numpy()]
            for statistic in biometrics.verification_statistics(
                vectors(seen), enrolled, people(seen, dataset), enrolled_people, calibration, far
            ):
                yield view, recognizer, statistic


def of(ids: Sequence[str], rows: pa.Table) -> pa.Table:
    return rows.filter(pc.is_in(rows["id"], value_set=pa.array(ids, pa.string())))


def vectors(rows: pa.Table) -> Floats:
    """Embeddings (n d)."""
    values = np.concatenate([chunk.flatten().to_numpy() for chunk in rows["embedding"].chunks])
    return values.reshape(rows.num_rows, -1).astype(np.float64)


def people(rows: pa.Table, dataset: Dataset) -> list[str]:
    return [dataset.identity(id) or id for id in rows["id"].to_pylist()]
