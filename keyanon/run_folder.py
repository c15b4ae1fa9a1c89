"""What a run keeps, in folders: pictures as PNG files by view and id, rows as Parquet parts; each under what it is made of.

Of every file and every row it is written down which picture it is of (the digest of that picture's bytes) and what made it, where
the folder's own name does not say that. Only what fits today's question is there; all else counts as not done, and is made again.

A file is done when its row is there and its size fits; its bytes are checked when it is read. Files and parts appear whole. Any
number of processes may work in one folder at once, each on pictures of its own: what they take down (files, scores, embeddings,
costs, skipped pictures) are part files, named by their content, which nobody writes again.
"""

import threading
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor

from keyanon.channel.pixels import png_bytes, read_png, to_floats
from keyanon.channel.whole import write_whole
from keyanon.finite import bounded, within
from keyanon.parts import Damaged, digest, read_parts, write_part
from keyanon.sheets import csv_text
from keyanon.sources import Digests
from keyanon.types import BadPicture, Bytes, Image, Picture, PictureBytes, Place, Published, Scores, Source

ORIGINAL, MASK, ANONYMIZED, RECOVERED = "original", "mask", "anonymized", "recovered"
CLEAN = "clean"  # of embeddings: originals and gallery alike
RECONSTRUCTED = "reconstructed"  # D(E(x)): no recovery through an autoencoder can be better
SECONDS, EVALUATIONS = "seconds", "evaluations"  # what a picture of a view cost
IO_WORKERS = 4
LONGEST_NAME = 255  # bytes, on all common file systems

# `content`: the digest of the picture's bytes. `by`: signatures of what made view and number, "" where the folder's name says it.
_KEYED = [("id", pa.string()), ("content", pa.string())]
_NUMBERED = [*_KEYED, ("view", pa.string()), ("scorer", pa.string()), ("by", pa.string())]
SCORE_SCHEMA = pa.schema([*_NUMBERED, ("value", pa.float64())])
EMBEDDING_SCHEMA = pa.schema([*_NUMBERED, ("embedding", pa.list_(pa.float32()))])
FILE_SCHEMA = pa.schema(
    [*_KEYED, ("view", pa.string()), ("by", pa.string()), ("sha256", pa.string()), ("size", pa.int64())]
)
ID_SCHEMA = pa.schema(_KEYED)
SKIPPED_SCHEMA = pa.schema([*_KEYED, ("reason", pa.string())])


@dataclass(frozen=True)
class Written:
    """A file as it was written."""

    content: str
    by: str
    sha256: str
    size: int


@dataclass(frozen=True)
class RunFiles:
    """A folder's pictures and rows, of today's pictures and parts.

    Args:
        folder: where they are.
        contents: by id the digest of the picture's bytes; an id that is not in it is of no bytes in particular.
        made_by: by the name of a view, scorer or recognizer the signature of what makes it, where the folder's name does not say.
        apart: keep files of one id and different contents beside each other, as runs on two datasets at once need it.
    """

    folder: Path
    contents: Mapping[str, str] = field(default_factory=dict)
    made_by: Mapping[str, str] = field(default_factory=dict)
    apart: bool = False

    # Files

    def path(self, view: str, id: str, suffix: str = ".png") -> Path:
        return self.folder / view / file_name(f"{id}~{self.contents.get(id, '')}" if self.apart else id, suffix)

    def has(self, view: str, id: str, suffix: str = ".png") -> bool:
        """Whether the file is there that today's question asks for, as far as its size tells."""
        wanted = self._wanted(view, id)
        if not wanted:
            return False
        try:
            return self.path(view, id, suffix).stat().st_size in {written.size for written in wanted}
        except FileNotFoundError:
            return False

    def ids(self, view: str) -> list[str]:
        """The pictures whose file of a view is there."""
        return sorted(id for known, id in list(self._files) if known == view and self.has(view, id))

    def views(self) -> list[str]:
        """The views that a method has made, in the order of tables."""
        found = {view for view, id in list(self._files) if self.has(view, id)}
        rest = found - {ORIGINAL, MASK, ANONYMIZED, RECOVERED}
        return [*(view for view in (ANONYMIZED, RECOVERED) if view in found), *sorted(rest)]

    def write(self, view: str, id: str, data: bytes, suffix: str = ".png") -> None:
        """Write a file, which others can read if it is of what is published; `keep_files` writes down that it is there."""
        path = self.path(view, id, suffix)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, data, public=view == ANONYMIZED)
        written = Written(self.contents.get(id, ""), self._by(view), digest(data), len(data))
        with self._lock:
            self._files[view, id].append(written)
            self._fresh.append({"id": id, "view": view, **vars(written)})

    def keep_files(self) -> None:
        """Write down which files have been written since the last time."""
        with self._lock:
            rows = self._fresh[:]
            self._fresh.clear()
        write_part(self.folder / "files", pa.Table.from_pylist(rows, FILE_SCHEMA))

    def data(self, view: str, id: str, suffix: str = ".png") -> bytes:
        """A file's bytes; raises Damaged if they are not those that were written."""
        path = self.path(view, id, suffix)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise Damaged(path) from None
        if digest(data) not in {written.sha256 for written in self._wanted(view, id)}:
            raise Damaged(path)
        return data

    def check(self, view: str, ids: Sequence[str], digests: Digests) -> None:
        """Raise Damaged if a file is not what was written; files are read if they may have changed since they were read last."""
        for id in ids:
            path = self.path(view, id)
            try:
                found = digests.of(Source(path))
            except BadPicture:
                raise Damaged(path) from None
            if not any(written.sha256.startswith(found) for written in self._wanted(view, id)):
                raise Damaged(path)
        digests.keep()

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

        def write(id: str, picture: PictureBytes, header: bytes) -> None:
            self.write(view, id, png_bytes(picture, header))

        return [pool.submit(write, *entry) for entry in zip(ids, pixels, headers, strict=False)]

    def reading(self, pool: Executor, view: str, ids: Sequence[str]) -> list[Future[tuple[Bytes, bytes]]]:
        """Start reading pictures as a receiver does, with their headers."""
        return [pool.submit(self._read, view, id) for id in ids]

    def load(self, id: str, view: str = ORIGINAL) -> Picture:
        """A prepared original, or another view of it."""
        return to_floats(self._read(view, id)[0])

    def read(self, view: str, ids: Sequence[str]) -> Published:
        """Pictures with their headers, as one batch."""
        with ThreadPoolExecutor(IO_WORKERS) as pool:
            return stacked(self.reading(pool, view, ids))

    def read_all(self, view: str, ids: Sequence[str]) -> Bytes:
        return self.read(view, ids).images

    def _read(self, view: str, id: str) -> tuple[PictureBytes, bytes]:
        return read_png(self.path(view, id), self.data(view, id))

    def _wanted(self, view: str, id: str) -> list[Written]:
        """What was written under a name for today's question."""
        content, by = self.contents.get(id, ""), self._by(view)
        with self._lock:
            return [one for one in self._files.get((view, id), ()) if one.content == content and one.by == by]

    def _by(self, *names: str) -> str:
        return "".join(self.made_by.get(name, "") for name in names)

    @cached_property
    def _files(self) -> dict[tuple[str, str], list[Written]]:
        """All that was ever written, by view and id."""
        found = defaultdict[tuple[str, str], list[Written]](list)
        for row in read_parts(self.folder / "files", FILE_SCHEMA).to_pylist():
            view, id = row.pop("view"), row.pop("id")
            found[view, id].append(Written(**row))
        return found

    @cached_property
    def _fresh(self) -> list[dict[str, object]]:
        return []

    @cached_property
    def _lock(self) -> threading.Lock:
        return threading.Lock()

    def reread(self) -> None:
        """Look again at which files there are: other processes may have written some."""
        with self._lock:
            self.__dict__.pop("_files", None)

    # Rows

    def write_scores(
        self,
        ids: Sequence[str],
        values: Mapping[Place, Scores],
        only: Mapping[Place, Sequence[str]] | None = None,
        folder: str = "scores",
    ) -> None:
        """Keep numbers by view and scorer, those of all the ids or of `only` some; columns may be filled up beyond the ids.

        Raises NotFinite for one that is infinite.
        """
        for (view, scorer), column in values.items():
            with within(f"score {scorer} of the view {view}", ids):
                bounded(column, "a number that is to be stored")
        rows = [
            {**self._key(id), "view": view, "scorer": scorer, "by": self._by(view, scorer), "value": value}
            for (view, scorer), column in values.items()
            for id, value in zip(ids, column.tolist(), strict=False)
            if only is None or id in only[view, scorer]
        ]
        write_part(self.folder / folder, pa.Table.from_pylist(rows, SCORE_SCHEMA))

    def write_costs(self, ids: Sequence[str], view: str, seconds: float, evaluations: float) -> None:
        """Keep what each picture of a view cost."""
        costs = {SECONDS: seconds, EVALUATIONS: evaluations}
        values = {(view, name): torch.full((len(ids),), cost, dtype=torch.float64) for name, cost in costs.items()}
        self.write_scores(ids, values, folder="costs")

    def write_embeddings(self, ids: Sequence[str], vectors: Mapping[Place, Tensor]) -> None:
        """Keep vectors (n d) by view and scorer; these may be filled up beyond the ids."""
        tables = [EMBEDDING_SCHEMA.empty_table()]
        contents = [self.contents.get(id, "") for id in ids]
        for (view, scorer), rows in vectors.items():
            values = rows[: len(ids)].flatten(1).to("cpu", torch.float32).numpy()
            ends = np.arange(len(ids) + 1, dtype=np.int32) * values.shape[1]
            column = pa.ListArray.from_arrays(ends, values.ravel())
            same = [[name] * len(ids) for name in (view, scorer, self._by(view, scorer))]
            tables.append(pa.table([list(ids), contents, *same, column], EMBEDDING_SCHEMA))
        write_part(self.folder / "embeddings", pa.concat_tables(tables))

    def scores(self, ids: Sequence[str], folder: str = "scores") -> pa.Table:
        """Today's numbers of some pictures: id, view, scorer, value, each once, sorted by view, scorer, id."""
        rows = self._numbered(read_parts(self.folder / folder, SCORE_SCHEMA)).select(["id", "view", "scorer", "value"])
        return rows.filter(pc.is_in(rows["id"], value_set=pa.array(ids, pa.string())))

    def costs(self, ids: Sequence[str]) -> list[dict[str, object]]:
        """What pictures cost: for each view how many, and the means of seconds and evaluations a picture."""
        rows = self.scores(ids, "costs").group_by(["view", "scorer"]).aggregate([("value", "mean"), ("id", "count")])
        costs = defaultdict[str, dict[str, object]](dict)
        for row in rows.to_pylist():
            costs[row["view"]] |= {"view": row["view"], "pictures": row["id_count"], row["scorer"]: row["value_mean"]}
        return list(costs.values())

    def embeddings(self, scorer: str | None = None, view: str | None = None) -> pa.Table:
        """Today's vectors, optionally of one scorer or view: id, view, scorer, embedding, each once, sorted by view, scorer, id."""
        table = read_parts(self.folder / "embeddings", EMBEDDING_SCHEMA)
        for column, wanted in (("scorer", scorer), ("view", view)):
            table = table if wanted is None else table.filter(pc.equal(table[column], wanted))
        return self._numbered(table).select(["id", "view", "scorer", "embedding"])

    def vectors(self, ids: Sequence[str]) -> dict[str, Tensor]:
        """The vectors (d,) of some pictures by id, from a folder that holds one view and scorer."""
        rows = self.embeddings()
        rows = rows.filter(pc.is_in(rows["id"], value_set=pa.array(ids, pa.string())))
        vectors = [torch.tensor(vector.values.to_numpy()) for vector in rows["embedding"]]
        return dict(zip(rows["id"].to_pylist(), vectors, strict=True))

    def scored(self, ids: Sequence[str]) -> dict[Place, NDArray[np.bool_]]:
        """Which of the pictures `ids` have a score, by view and scorer."""
        columns = ["id", "content", "view", "scorer", "by"]
        table = self._todays(read_parts(self.folder / "scores", SCORE_SCHEMA, columns))
        places = table.append_column("place", pc.index_in(table["id"], value_set=pa.array(ids, pa.string())))
        known = places.filter(pc.is_valid(places["place"])).group_by(["view", "scorer"]).aggregate([("place", "list")])
        done: dict[Place, NDArray[np.bool_]] = {}
        for view, scorer, found in zip(known["view"], known["scorer"], known["place_list"], strict=True):
            done[view.as_py(), scorer.as_py()] = np.isin(np.arange(len(ids)), found.values.to_numpy())
        return done

    def measured(self) -> set[str]:
        """The pictures of which everything is kept that an experiment takes down."""
        return set(self._todays(read_parts(self.folder / "measured", ID_SCHEMA))["id"].to_pylist())

    def write_measured(self, ids: Sequence[str]) -> None:
        write_part(self.folder / "measured", pa.Table.from_pylist([self._key(id) for id in ids], ID_SCHEMA))

    def skipped(self) -> dict[str, str]:
        """Why today's pictures were skipped, by id."""
        reasons = sorted(self.ever_skipped().items())
        return {id: reason for (id, content), reason in reasons if content == self.contents.get(id, "")}

    def ever_skipped(self) -> dict[tuple[str, str], str]:
        """Why pictures were skipped, by id and content."""
        rows = read_parts(self.folder / "skipped", SKIPPED_SCHEMA).to_pylist()
        return {(row["id"], row["content"]): row["reason"] for row in rows}

    def write_skipped(self, skipped: Mapping[str, str]) -> None:
        rows = [{**self._key(id), "reason": reason} for id, reason in skipped.items()]
        write_part(self.folder / "skipped", pa.Table.from_pylist(rows, SKIPPED_SCHEMA))

    def list_skipped(self, skipped: Mapping[str, str]) -> None:
        """Write skipped.csv, for people to read."""
        write_whole(self.folder / "skipped.csv", csv_text(["id", "reason"], sorted(skipped.items())).encode())

    def _key(self, id: str) -> dict[str, str]:
        return {"id": id, "content": self.contents.get(id, "")}

    def _todays(self, table: pa.Table) -> pa.Table:
        """The rows that are of today's pictures and, where they have a scorer, of today's view and scorer."""
        ids = pc.unique(table["id"])
        todays = pa.array([self.contents.get(id, "") for id in ids.to_pylist()], pa.string())
        fits = pc.equal(table["content"], todays.take(pc.index_in(table["id"], value_set=ids).combine_chunks()))
        if "scorer" in table.column_names:
            pairs = table.select(["view", "scorer"]).group_by(["view", "scorer"]).aggregate([])
            for view, scorer in zip(pairs["view"].to_pylist(), pairs["scorer"].to_pylist(), strict=True):
                here = pc.and_(pc.equal(table["view"], view), pc.equal(table["scorer"], scorer))
                stale = pc.and_(here, pc.not_equal(table["by"], self._by(view, scorer)))
                fits = pc.and_not(fits, stale)
        return table.filter(fits)

    def _numbered(self, table: pa.Table) -> pa.Table:
        """Today's rows, each (id, view, scorer) once, sorted by view, scorer, id."""
        table = self._todays(table)
        names = table.select(["view", "scorer", "id"]).append_column("row", pa.array(np.arange(table.num_rows)))
        last = names.group_by(["view", "scorer", "id"]).aggregate([("row", "max")])
        order = last.sort_by([(name, "ascending") for name in ("view", "scorer", "id")])
        return table.take(order["row_max"])


def file_name(id: str, suffix: str) -> str:
    """A picture's name as a file's: a long one is cut, and told apart by a digest; what would nest folders is not."""
    name = id.replace("%", "%25").replace("/", "%2F")
    if len(f"{name}{suffix}".encode()) <= LONGEST_NAME:
        return f"{name}{suffix}"
    end = f"~{digest(id.encode())[:16]}{suffix}"
    return name.encode()[: LONGEST_NAME - len(end)].decode(errors="ignore") + end


def stacked(pictures: Sequence[Future[tuple[PictureBytes, bytes]]], floats: Image | None = None) -> Published:
    """Pictures that are being read, as one batch."""
    read = [future.result() for future in pictures]
    return Published(torch.stack([pixels for pixels, _ in read]), tuple(header for _, header in read), floats)
