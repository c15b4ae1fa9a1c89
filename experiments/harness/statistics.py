"""From one number per picture to the numbers of a table: means and rates with 95 % intervals over identities."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from pandas.api.types import is_numeric_dtype

from experiments.harness.frames import read_csv
from keyanon.attacks.case import Pairs
from keyanon.channel.whole import write_whole
from keyanon.errors import BadData
from keyanon.measures import biometrics
from keyanon.measures.biometrics import WHOLE_SET, Floats, Rule, Statistic, unit
from keyanon.measures.separability import Separability
from keyanon.run_folder import ANONYMIZED, ORIGINAL, RunFiles
from keyanon.settings import Share, checked
from keyanon.types import SetScorer

People = Callable[[Iterable[str]], Sequence[str]]  # who is on each picture

NAMES = {"id", "experiment", "dataset", "protocol", "anonymizer", "view", "scorer", "statistic"}
NUMBERS = {"n", "undefined", "value", "low", "high", "pictures", "seconds", "evaluations"}
COLUMNS = ["view", "scorer", "statistic", "n", "undefined", "value", "low", "high"]


@checked
@dataclass(frozen=True)
class Threshold:
    """How the threshold of verification is set.

    Args:
        far: the false accept rate, a share.
        calibration: whose clean impostor scores set it: `anonymized`, those of the view's own pictures; `all`, those of every probe
            of the dataset, also where fewer are anonymized.
        rule: how they set the threshold (keyanon.measures.biometrics.threshold_at_far).
    """

    far: Share
    calibration: Literal["anonymized", "all"]
    rule: Rule


PAIRS = ["view", "scorer", "comparison", "first", "person", "second", "score"]


def write_parquets(
    folder: Path, statistics: Sequence[tuple[str, str, Statistic]], scores: pd.DataFrame, pairs: Sequence[Pairs] = ()
) -> pd.DataFrame:
    """statistics.parquet, by view and scorer, scores.parquet, and pairs.parquet of a cell that has any; returns the statistics."""
    rows = [{"view": view, "scorer": scorer, **asdict(statistic)} for view, scorer, statistic in statistics]
    table = pd.DataFrame(rows, columns=COLUMNS)
    for name, frame in (("scores", scores), ("statistics", table)):
        write_whole(folder / f"{name}.parquet", frame.to_parquet(index=False))
    if pairs:
        write_whole(folder / "pairs.parquet", pairs_table(pairs).to_parquet(index=False))
    else:
        (folder / "pairs.parquet").unlink(missing_ok=True)  # of another question's result, in whose place this comes
    return table


def pairs_table(pairs: Sequence[Pairs]) -> pd.DataFrame:
    """Scores of pairs, one a row, with the columns PAIRS: pictures and people are numbers."""
    frames = []
    for one in pairs:
        comparison, first, second = (place.ravel().astype(np.int16) for place in np.indices(one.scores.shape))
        columns = (
            one.view,
            one.scorer,
            comparison,
            first,
            one.people[first].astype(np.int16),
            second,
            one.scores.ravel(),
        )
        frames.append(pd.DataFrame(dict(zip(PAIRS, columns, strict=True))))
    return pd.concat(frames, ignore_index=True)


def pairs_of(table: pd.DataFrame) -> list[Pairs]:
    """The scores of pairs that `pairs_table` wrote down."""
    found = []
    for (view, scorer), rows in table.groupby(["view", "scorer"], sort=False, observed=True):
        shape = tuple(int(rows[name].max()) + 1 for name in ("comparison", "first", "second"))
        scores = rows["score"].to_numpy(np.float32).reshape(shape)
        people = rows["person"].to_numpy(np.intp).reshape(shape)[0, :, 0]
        found.append(Pairs(str(view), str(scorer), people, scores))
    return found


def read_frame(path: Path, columns: Sequence[str], **reading: Any) -> pd.DataFrame:
    """These columns of a Parquet or CSV file; BadData where it is none, or holds something else in them."""
    try:
        frame = pd.read_parquet(path, **reading) if path.suffix == ".parquet" else read_csv(path, **reading)
    except (pa.ArrowException, OSError, ValueError) as error:  # pandas' own are ValueErrors
        raise BadData(f"{path}: cannot be read as a table ({' '.join(str(error).split())[:300]})") from error
    if lacking := [name for name in columns if name not in frame.columns]:
        raise BadData(f"{path}: no column {', '.join(lacking)}; it has {', '.join(map(str, frame.columns))}")
    for name in columns if len(frame) else ():
        fits = (
            is_numeric_dtype(frame[name]) if name in NUMBERS else all(isinstance(value, str) for value in frame[name])
        )
        if name in NUMBERS | NAMES and not fits:
            raise BadData(
                f"{path}: the column {name} holds other things than {'numbers' if name in NUMBERS else 'names'}"
            )
    return frame[list(columns)]


def as_listed(scores: pd.DataFrame, listed: Iterable[str]) -> pd.DataFrame:
    """The rows of pictures' numbers (id, view, scorer, value), each as often as its picture is `listed`."""
    counts = Counter(listed)
    return scores.loc[scores.index.repeat(scores["id"].map(counts))]


def averages(scores: pd.DataFrame, people: People) -> Iterator[tuple[str, str, Statistic]]:
    """Mean, spread, median and 10th percentile of each view and scorer; `people` says who is on pictures."""
    for (view, scorer), rows in scores.groupby(["view", "scorer"], sort=True):
        values, who = rows["value"].to_numpy(), people(rows["id"])
        for statistic in (
            biometrics.mean_statistic,
            biometrics.std_statistic,
            biometrics.quantile_statistic,
            biometrics.p10_statistic,
        ):
            yield str(view), str(scorer), statistic(values, who)


def scores_of_enrolled(enrolled: Mapping[str, RunFiles], ids: Sequence[str]) -> pd.DataFrame:
    """Each recognizer's cosine of originals with themselves: 1, or NaN where it finds no face."""
    frames = [pd.DataFrame({"id": [], "view": [], "scorer": [], "value": []})]
    for name, files in enrolled.items():
        rows = rows_of(ids, files.embeddings())
        own = {"id": rows["id"].to_pylist(), "view": ORIGINAL, "scorer": name}
        frames.append(pd.DataFrame(own | {"value": np.square(unit(vectors(rows))).sum(1)}))
    return pd.concat(frames[1:] or frames, ignore_index=True)


def verification(
    files: RunFiles,
    enrolled: Mapping[str, RunFiles],
    gallery: Sequence[str],
    probes: Sequence[str],
    every: Sequence[str],
    people: People,
    threshold: Threshold,
) -> Iterator[tuple[str, str, Statistic]]:
    """Rates of each view against the clean gallery, at the threshold that clean pictures give; nothing without a gallery.

    A picture counts as often as it is among `gallery` and `probes`. `every` probe of the dataset is what calibration `all` takes.
    Memory holds one recognizer's embeddings at a time.
    """
    for recognizer, place in sorted(enrolled.items()):
        known = place.embeddings()
        portraits, clean = rows_as_listed(gallery, known), rows_as_listed(probes, known)
        if not (portraits.num_rows and clean.num_rows):
            continue
        gallery_vectors, gallery_people = unit(vectors(portraits)), people(portraits["id"].to_pylist())
        made = rows_of(probes, files.embeddings(recognizer))
        views = {ORIGINAL: clean} | {view: rows_as_listed(probes, rows) for view, rows in by_view(made).items()}
        for view, seen in sorted(views.items()):
            ids = seen["id"].to_pylist()
            calibration = rows_as_listed(every if threshold.calibration == "all" else ids, known)
            for statistic in biometrics.verification_statistics(
                unit(vectors(seen)),
                gallery_vectors,
                people(ids),
                gallery_people,
                unit(vectors(calibration)),
                threshold.far,
                calibration_ids=people(calibration["id"].to_pylist()),
                rule=threshold.rule,
            ):
                yield view, recognizer, statistic


def between_sets(
    scorers: Mapping[str, SetScorer],
    originals: Mapping[str, RunFiles],
    views: Mapping[str, RunFiles],
    ids: Sequence[str],
) -> Iterator[tuple[str, str, Statistic]]:
    """Each view's features against the originals', in the order of `ids`. Memory holds one measure's features at a time."""
    for name, scorer in scorers.items():
        clean = vectors(rows_as_listed(ids, originals[name].embeddings()))
        for view, seen in by_view(views[name].embeddings()).items():
            value, used = scorer.compare(vectors(rows_as_listed(ids, seen)), clean)
            yield view, name, Statistic(WHOLE_SET, used, len(ids) - used, value, math.nan, math.nan)


def told_apart(
    separability: Separability, files: RunFiles, enrolled: Mapping[str, RunFiles], ids: Sequence[str]
) -> Iterator[tuple[str, str, Statistic]]:
    """How each recognizer's embeddings tell anonymized pictures from clean ones, and what they take the other views for.

    Lengths count here, and nowhere else: the classifiers learn from the embeddings as the recognizer gave them.
    """
    for recognizer, place in sorted(enrolled.items()):
        seen = by_view(files.embeddings(recognizer))
        views = {view: vectors(rows_as_listed(ids, rows)) for view, rows in seen.items()}
        anonymized = views.pop(ANONYMIZED)
        clean = vectors(rows_as_listed(ids, place.embeddings()))
        for view, statistic in separability.statistics(clean, anonymized, views):
            yield view or ANONYMIZED, recognizer, statistic


def by_view(rows: pa.Table) -> dict[str, pa.Table]:
    """The rows of each view."""
    return {view: rows.filter(pc.equal(rows["view"], view)) for view in pc.unique(rows["view"]).to_pylist()}


def rows_of(ids: Sequence[str], rows: pa.Table) -> pa.Table:
    return rows.filter(pc.is_in(rows["id"], value_set=pa.array(ids, pa.string())))


def rows_as_listed(ids: Sequence[str], rows: pa.Table) -> pa.Table:
    """The rows of pictures that have one each: one for each time that a picture is listed, in that order."""
    return rows.take(pc.index_in(pa.array(ids, pa.string()), value_set=rows["id"]).drop_null())


def vectors(rows: pa.Table) -> Floats:
    """Embeddings (n d), as long as the recognizer gave them."""
    values = np.concatenate([chunk.flatten().to_numpy() for chunk in rows["embedding"].chunks])
    return values.reshape(rows.num_rows, -1).astype(np.float64)
