"""What a run keeps, in folders: pictures as PNG files by view and id, rows as Parquet parts.

A file that exists is done: files appear whole. Any number of processes may work in one folder at once, each on pictures of its own:
what they take down (scores, embeddings, costs, skipped pictures) are part files, named by their content, which nobody writes again.
"""

import csv
import hashlib
import io
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from keyanon.channel.pixels import read_png, to_floats, write_png
from keyanon.channel.whole import write_whole
from keyanon.types import Bytes, Image, Picture, Published, Scores

ORIGINAL, MASK, ANONYMIZED, RECOVERED = "original", "mask", "anonymized", "recovered"
CLEAN = "clean"  # of embeddings: originals and gallery alike
RECONSTRUCTED = "reconstructed"  # D(E(x)): no recovery through an autoencoder can be better
SCORE_SCHEMA = pa.schema([("id", pa.string()), ("view", pa.string()), ("scorer", pa.string()), ("value", pa.float64())])
EMBEDDING_SCHEMA = pa.schema(
    [("id", pa.string()), ("view", pa.string()), ("scorer", pa.string()), ("embedding", pa.list_(pa.float32()))]
)
COST_SCHEMA = pa.schema(
    [("view", pa.string()), ("pictures", pa.int64()), ("seconds", pa.float64()), ("evaluations", pa.int64())]
)
ID_SCHEMA = pa.schema([("id", pa.string())])
SKIPPED_SCHEMA = pa.schema([("id", pa.string()), ("reason", pa.string())])
IO_WORKERS = 4


def score_rows(ids: Sequence[str], values: Mapping[tuple[str, str], Scores]) -> pa.Table:
    """Rows of SCORE_SCHEMA, of values by view and scorer; these may be filled up beyond the ids."""
    rows = [
        {"id": id, "view": view, "scorer": scorer, "value": value}
        for (view, scorer), column in values.items()
        for id, value in zip(ids, column.tolist(), strict=False)
    ]
    return pa.Table.from_pylist(rows, SCORE_SCHEMA)


def embedding_rows(ids: Sequence[str], vectors: Mapping[tuple[str, str], Tensor]) -> pa.Table:
    """Rows of EMBEDDING_SCHEMA, of vectors (n d) by view and scorer; these may be filled up beyond the ids."""
    tables = [EMBEDDING_SCHEMA.empty_table()]
    for (view, scorer), rows in vectors.items():
        values = rows[: len(ids)].flatten(1).to("cpu", torch.float32).numpy()
        ends = np.arange(len(ids) + 1, dtype=np.int32) * values.shape[1]
        column = pa.ListArray.from_arrays(ends, values.ravel())
        tables.append(pa.table([pa.array(ids), [view] * len(ids), [scorer] * len(ids), column], EMBEDDING_SCHEMA))
    return pa.concat_tables(tables)


def vectors_of(folder: Path, ids: Sequence[str]) -> dict[str, Tensor]:
    """The vectors (d,) of some pictures by id, from part files that hold one view and scorer."""
    table = parts(folder, EMBEDDING_SCHEMA, ["id", "embedding"])
    rows = table.filter(pc.is_in(table["id"], value_set=pa.array(ids, pa.string())))
    vectors = [torch.tensor(vector.values.to_numpy()) for vector in rows["embedding"]]
    return dict(zip(rows["id"].to_pylist(), vectors, strict=True))


def measured_ids(folder: Path) -> set[str]:
    """The pictures of which everything is kept that an experiment takes down."""
    return set(parts(folder / "measured", ID_SCHEMA)["id"].to_pylist())


def write_measured(folder: Path, ids: Sequence[str]) -> None:
    write_part(folder / "measured", pa.table([pa.array(ids, pa.string())], ID_SCHEMA))


@dataclass(frozen=True)
class RunFiles:
    """The pictures of one run folder, by view and id."""

    folder: Path

    def path(self, view: str, id: str) -> Path:
        return self.folder / view / f"{id}.png"

    def has(self, view: str, id: str) -> bool:
        return self.path(view, id).exists()

    def ids(self, view: str) -> list[str]:
        return sorted(path.stem for path in (self.folder / view).glob("*.png"))

    def views(self) -> list[str]:
        """The views that a method has made, in the order of tables."""
        found = {path.name for path in self.folder.iterdir() if path.is_dir() and any(path.glob("*.png"))}
        rest = found - {ORIGINAL, MASK, ANONYMIZED, RECOVERED}
        return [*(view for view in (ANONYMIZED, RECOVERED) if view in found), *sorted(rest)]

    def write_all(
        self,
        pool: Executor,
        view: str,
        ids: Sequence[str],
        pixels: Iterable[Tensor],
        headers: Sequence[bytes] | None = None,
    ) -> list[Future[None]]:
        """Start writing pictures."""
        headers = headers or [b""] * len(ids)
        pictures = zip(ids, pixels, headers, strict=False)
        return [pool.submit(write_png, self.path(view, id), picture, header) for id, picture, header in pictures]

    def reading(self, pool: Executor, view: str, ids: Sequence[str]) -> list[Future[tuple[Bytes, bytes]]]:
        """Start reading pictures as a receiver does, with their headers."""
        return [pool.submit(read_png, self.path(view, id)) for id in ids]

    def load(self, id: str) -> Picture:
        """A prepared original."""
        return to_floats(read_png(self.path(ORIGINAL, id))[0])

    def read(self, view: str, ids: Sequence[str]) -> Published:
        """Pictures with their headers, as one batch."""
        with ThreadPoolExecutor(IO_WORKERS) as pool:
            return stacked(self.reading(pool, view, ids))

    def read_all(self, view: str, ids: Sequence[str]) -> Bytes:
        return self.read(view, ids).images

    def skipped(self) -> dict[str, str]:
        """Why pictures were skipped, by id."""
        table = parts(self.folder / "skipped", SKIPPED_SCHEMA).sort_by("id")
        return dict(zip(table["id"].to_pylist(), table["reason"].to_pylist(), strict=True))

    def write_skipped(self, skipped: Mapping[str, str]) -> None:
        lines = [{"id": id, "reason": reason} for id, reason in skipped.items()]
        write_part(self.folder / "skipped", pa.Table.from_pylist(lines, SKIPPED_SCHEMA))

    def list_skipped(self, skipped: Mapping[str, str]) -> None:
        """Write skipped.csv, for people to read."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(["id", "reason"])
        writer.writerows(sorted(skipped.items()))
        write_whole(self.folder / "skipped.csv", buffer.getvalue().encode())


def stacked(pictures: Sequence[Future[tuple[Bytes, bytes]]], floats: Image | None = None) -> Published:
    """Pictures that are being read, as one batch."""
    read = [future.result() for future in pictures]
    return Published(torch.stack([pixels for pixels, _ in read]), tuple(header for _, header in read), floats)


def read_costs(folder: Path) -> pa.Table:
    """All rows of a run folder's costs."""
    return parts(folder / "costs", COST_SCHEMA)


def write_part(folder: Path, table: pa.Table) -> None:
    """Write rows to a file named by their content: whole or not at all, and never twice under two names."""
    if table.num_rows == 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    data = buffer.getvalue()
    write_whole(folder / f"{hashlib.sha256(data).hexdigest()[:16]}.parquet", data)


def parts(
    folder: Path,
    schema: pa.Schema,
    columns: Sequence[str] | None = None,
    scorer: str | None = None,
    view: str | None = None,
) -> pa.Table:
    """The rows of all part files as they were written, optionally only some columns, or the rows of one scorer or view."""
    columns = columns or schema.names
    tables = [pa.schema([schema.field(name) for name in columns]).empty_table()]
    for path in sorted(folder.glob("*.parquet")):
        part = pq.ParquetFile(path).read(use_threads=False)  # a part is small: threads only cost memory
        for column, wanted in (("scorer", scorer), ("view", view)):
            part = part if wanted is None else part.filter(pc.equal(part[column], wanted))
        tables.append(part.select(columns))
    return pa.concat_tables(tables)


def read_parts(folder: Path, scorer: str | None = None, view: str | None = None) -> pa.Table:
    """All rows of all part files, optionally of one scorer or view, each (id, view, scorer) once, sorted by view, scorer, id."""
    table = parts(folder, EMBEDDING_SCHEMA if folder.name == "embeddings" else SCORE_SCHEMA, scorer=scorer, view=view)
    names = table.select(["view", "scorer", "id"]).append_column("row", pa.array(np.arange(table.num_rows)))
    last = names.group_by(["view", "scorer", "id"]).aggregate([("row", "max")])
    order = last.sort_by([(name, "ascending") for name in ("view", "scorer", "id")])
    return table.take(order["row_max"])


def scored(folder: Path, ids: Sequence[str]) -> dict[tuple[str, str], NDArray[np.bool_]]:
    """Which of the pictures `ids` have a score, by view and scorer."""
    table = parts(folder / "scores", SCORE_SCHEMA, ["id", "view", "scorer"])
    places = table.append_column("place", pc.index_in(table["id"], value_set=pa.array(ids, pa.string())))
    known = places.filter(pc.is_valid(places["place"])).group_by(["view", "scorer"]).aggregate([("place", "list")])
    done: dict[tuple[str, str], NDArray[np.bool_]] = {}
    for view, scorer, found in zip(known["view"], known["scorer"], known["place_list"], strict=True):
        done[view.as_py(), scorer.as_py()] = np.isin(np.arange(len(ids)), found.values.to_numpy())
    return done
