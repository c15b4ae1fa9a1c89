"""Make, then measure: generate() writes pictures, score() reads them, enrol() embeds the gallery. Killed, each goes on as it was.

A run folder holds one sub-folder of PNG files for each view (original, mask, anonymized, recovered, one per attack). A file that
exists is done: files appear whole. Batches are padded to one size, so a picture's numbers do not depend on which pictures are left
to do, and every secret and nonce hangs on the picture's id. The gallery is the same for all methods: its embeddings have folders
of their own, which runs share.

Any number of processes may work on one folder at once, each on pictures of its own: what they take down (scores, embeddings,
costs, skipped pictures) are part files, which nobody writes again. While a batch is computed, a few threads read the next one's
pictures and write the last one's; memory holds three batches, however many pictures there are.
"""

import csv
import hashlib
import io
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from keyanon.attacks.views import FloatChannel
from keyanon.batching import begun_ahead, filled, padded
from keyanon.channel.pixels import read_png, to_bytes, to_floats, write_png
from keyanon.channel.whole import write_whole
from keyanon.measures.scorers import Against
from keyanon.types import (
    Anonymizer,
    Attack,
    BadPicture,
    Bytes,
    Dataset,
    Embeddings,
    FaceParser,
    Image,
    Key,
    Mask,
    Picture,
    Published,
    Recognizer,
    Reconstructs,
    Reversible,
    Scorer,
    Scores,
)

ORIGINAL, MASK, ANONYMIZED, RECOVERED, GALLERY = "original", "mask", "anonymized", "recovered", "gallery"
RECONSTRUCTED = "reconstructed"  # D(E(x)): no recovery through an autoencoder can be better
SCORE_SCHEMA = pa.schema([("id", pa.string()), ("view", pa.string()), ("scorer", pa.string()), ("value", pa.float64())])
EMBEDDING_SCHEMA = pa.schema(
    [("id", pa.string()), ("view", pa.string()), ("scorer", pa.string()), ("embedding", pa.list_(pa.float32()))]
)
COST_SCHEMA = pa.schema(
    [("view", pa.string()), ("pictures", pa.int64()), ("seconds", pa.float64()), ("evaluations", pa.int64())]
)
SKIPPED_SCHEMA = pa.schema([("id", pa.string()), ("reason", pa.string())])
HEADER_BYTES = "header_bytes"  # a score of every anonymized picture: what it carries besides its pixels
IO_WORKERS = 4


def generate(
    folder: Path,
    dataset: Dataset,
    ids: Sequence[str],
    method: Anonymizer,
    key: Key,
    attacks: Mapping[str, Attack],
    parser: FaceParser,
    batch_size: int,
    evaluations: Callable[[], int] = lambda: 0,
    device: str = "cpu",
) -> dict[str, str]:
    """Write every view of the pictures `ids`; returns why pictures were skipped, by id.

    A picture is skipped when it cannot be read or shows no face to `parser`. `evaluations` counts the pictures that the
    method's networks have seen so far; what each batch cost of these and of time is kept in the folder's `costs`. On `device` faces
    are looked for; the method has its own.
    """
    views = [ORIGINAL, MASK, ANONYMIZED]
    if isinstance(method, Reversible):
        views += [RECOVERED, *attacks]
    if isinstance(method, Reconstructs):
        views += [RECONSTRUCTED]
    for view in views:
        (folder / view).mkdir(parents=True, exist_ok=True)
    files = RunFiles(folder)
    skipped = files.skipped()
    there = {view: set(files.ids(view)) for view in views}
    pending = [id for id in ids if id not in skipped and not all(id in there[view] for view in views)]
    with ThreadPoolExecutor(IO_WORKERS) as pool:
        writes: deque[Future[None]] = deque()
        ahead = begun_ahead(pending, batch_size, "anonymize and recover", lambda batch: loading(pool, dataset, batch))
        for batch, pictures in ahead:
            settle(writes, len(views) * batch_size)
            bad: dict[str, str] = {}
            good, loaded = readable(batch, pictures, bad)
            if good:
                originals = padded(torch.stack(loaded), batch_size)
                faces = parser.mask(originals.to(device), (originals.shape[-2], originals.shape[-1])).cpu()
                faceless = [id for id, face in zip(good, faces, strict=False) if not face.any()]
                bad |= dict.fromkeys(faceless, "no face found")
            files.write_skipped(bad)
            skipped |= bad
            keep = [i for i, id in enumerate(good) if id not in bad]
            if not keep:
                continue
            if faceless:
                originals, faces = padded(originals[keep], batch_size), padded(faces[keep], batch_size)
            good = [good[i] for i in keep]
            writes += files.write_all(pool, ORIGINAL, good, to_bytes(originals))
            writes += files.write_all(pool, MASK, good, face_pictures(faces))

            names, keys = filled(good, batch_size), [key] * batch_size
            todo = [view for view in views if not there[view].issuperset(good)]
            published = None
            if ANONYMIZED in todo or any(isinstance(attacks.get(view), FloatChannel) for view in todo):
                with spent(folder, ANONYMIZED, batch_size, evaluations):
                    published = method.anonymize(originals, keys, names)
                # Before the pictures: a run killed in between makes them, and measures, again.
                write_part(folder / "scores", measurements(good, published.measured))
                # The file is the channel: it has to be there before anybody recovers.
                settle(deque(files.write_all(pool, ANONYMIZED, good, published.images, published.headers)))
            if RECONSTRUCTED in todo and isinstance(method, Reconstructs):
                writes += files.write_all(pool, RECONSTRUCTED, good, to_bytes(method.reconstruct(originals)))
            if not isinstance(method, Reversible):
                continue
            on_file = stacked(files.reading(pool, ANONYMIZED, names), published.floats if published else None)
            if RECOVERED in todo:
                with spent(folder, RECOVERED, batch_size, evaluations):
                    out = method.recover(on_file, keys)
                writes += files.write_all(pool, RECOVERED, good, to_bytes(out))
            for view, attack in attacks.items():
                if view in todo:
                    writes += files.write_all(pool, view, good, to_bytes(attack(on_file, keys, method)))
        settle(writes)
    wanted = set(ids)
    return {id: reason for id, reason in skipped.items() if id in wanted}


def score(
    folder: Path,
    ids: Sequence[str],
    scorers: Mapping[str, Scorer],
    recognizers: Mapping[str, Recognizer],
    batch_size: int,
    device: str = "cpu",
) -> None:
    """Score every view on disk against the originals, on `device`: one row per picture, view and scorer, kept in part files.

    A recognizer's score is the cosine of view and original; its embeddings are kept for verification, beside the scores.
    """
    files = RunFiles(folder)
    views, wanted, skipped = files.views(), [*scorers, *recognizers], files.skipped()
    there = {view: set(files.ids(view)) for view in {*views, ORIGINAL, MASK}}
    place = {id: i for i, id in enumerate(ids)}
    done = scored(folder, ids)
    none = np.zeros(len(ids), bool)

    def pending(batch: Sequence[str], view: str) -> list[str]:
        """The scorers that some picture of the batch lacks on this view."""
        lines = [place[id] for id in batch if id not in skipped and id in there[view]]
        return [name for name in wanted if not done.get((view, name), none)[lines].all()]

    def todo_of(batch: Sequence[str]) -> dict[str, list[str]]:
        return {view: pending(batch, view) for view in views if there[view].issuperset(batch)}

    def begin(batch: Sequence[str]) -> dict[str, list[Future[tuple[Bytes, bytes]]]]:
        """The pictures that scoring the batch needs, by view, being read."""
        compared = [scorer.view for scorer in scorers.values() if isinstance(scorer, Against)]
        names = [
            ORIGINAL,
            MASK,
            *todo_of(batch),
            *(view for view in compared if there.get(view, set()).issuperset(batch)),
        ]
        return {view: files.reading(pool, view, filled(batch, batch_size)) for view in dict.fromkeys(names)}

    left = [id for id in ids if any(pending([id], view) for view in views)]
    with ThreadPoolExecutor(IO_WORKERS) as pool:
        for batch, reading in begun_ahead(left, batch_size, "score", begin):
            rows: list[dict[str, object]] = []
            vectors: list[pa.Table] = []
            todo = todo_of(batch)
            read = {view: stacked(pictures) for view, pictures in reading.items()}
            original = to_floats(read[ORIGINAL].images).to(device)
            face = (read[MASK].images[:, :1] > 127).to(device)
            references: dict[str, Image] = {}  # what each scorer compares with, where there is such a view
            for name, scorer in scorers.items():
                if not isinstance(scorer, Against):
                    references[name] = original
                elif scorer.view in read:
                    references[name] = to_floats(read[scorer.view].images).to(device)
            of_originals = {
                name: recognizer.embed(original)
                for name, recognizer in recognizers.items()
                if any(name in missing for missing in todo.values())
            }
            for view, missing in todo.items():
                pictures = to_floats(read[view].images).to(device)
                values = {
                    name: scorer(pictures, references[name], face)
                    if name in references
                    else torch.full((batch_size,), torch.nan)
                    for name, scorer in scorers.items()
                    if name in missing
                }
                if view == ANONYMIZED:
                    values[HEADER_BYTES] = torch.tensor([float(len(header)) for header in read[view].headers])
                for name, clean in of_originals.items():
                    if name in missing:
                        embedding = clean if view == ORIGINAL else recognizers[name].embed(pictures)
                        values[name] = (embedding * clean).sum(1)
                        vectors.append(embedding_rows(batch, view, name, embedding))
                rows += [
                    {"id": id, "view": view, "scorer": name, "value": float(value)}
                    for name, column in values.items()
                    for id, value in zip(batch, column, strict=False)
                    if not done.get((view, name), none)[place[id]]
                ]
            # The embeddings go first: a run killed in between scores the batch again and finds both.
            write_part(folder / "embeddings", pa.concat_tables([EMBEDDING_SCHEMA.empty_table(), *vectors]))
            write_part(folder / "scores", pa.Table.from_pylist(rows, SCORE_SCHEMA))


def enrol(
    folder: Path,
    dataset: Dataset,
    ids: Sequence[str],
    name: str,
    recognizer: Recognizer,
    batch_size: int,
    device: str = "cpu",
) -> dict[str, str]:
    """Embed the gallery's pictures `ids` with one recognizer, called `name`, into `folder`; returns why pictures were skipped.

    The pictures are rounded to 8 bits first, as those that are compared with them are.
    """
    files = RunFiles(folder)
    known = set(parts(folder / "embeddings", EMBEDDING_SCHEMA, ["id"])["id"].to_pylist())
    skipped = files.skipped()
    pending = [id for id in ids if id not in known and id not in skipped]
    with ThreadPoolExecutor(IO_WORKERS) as pool:
        ahead = begun_ahead(pending, batch_size, f"{name}: gallery", lambda batch: loading(pool, dataset, batch))
        for batch, pictures in ahead:
            bad: dict[str, str] = {}
            good, loaded = readable(batch, pictures, bad)
            files.write_skipped(bad)
            skipped |= bad
            if good:
                images = to_floats(to_bytes(padded(torch.stack(loaded), batch_size))).to(device)
                write_part(folder / "embeddings", embedding_rows(good, GALLERY, name, recognizer.embed(images)))
    wanted = set(ids)
    return {id: reason for id, reason in skipped.items() if id in wanted}


def embedding_rows(ids: Sequence[str], view: str, name: str, embeddings: Embeddings) -> pa.Table:
    """Rows of EMBEDDING_SCHEMA; `embeddings` may be filled up beyond the ids."""
    values = embeddings[: len(ids)].to("cpu", torch.float32).numpy()
    ends = np.arange(len(ids) + 1, dtype=np.int32) * values.shape[1]
    vectors = pa.ListArray.from_arrays(ends, values.ravel())
    return pa.table([pa.array(ids), [view] * len(ids), [name] * len(ids), vectors], EMBEDDING_SCHEMA)


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
        """The views to score, original first."""
        found = {path.name for path in self.folder.iterdir() if path.is_dir() and any(path.glob("*.png"))}
        rest = found - {ORIGINAL, MASK, ANONYMIZED, RECOVERED}
        return [*(view for view in (ORIGINAL, ANONYMIZED, RECOVERED) if view in found), *sorted(rest)]

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

    def read_all(self, view: str, ids: Sequence[str]) -> Bytes:
        with ThreadPoolExecutor(IO_WORKERS) as pool:
            return stacked(self.reading(pool, view, ids)).images

    def skipped(self) -> dict[str, str]:
        """Why pictures were skipped, by id."""
        table = parts(self.folder / "skipped", SKIPPED_SCHEMA).sort_by("id")
        return dict(zip(table["id"].to_pylist(), table["reason"].to_pylist(), strict=True))

    def write_skipped(self, skipped: Mapping[str, str]) -> None:
        lines = [{"id": id, "reason": reason} for id, reason in skipped.items()]
        write_part(self.folder / "skipped", pa.Table.from_pylist(lines, SKIPPED_SCHEMA))

    def list_skipped(self) -> None:
        """Write skipped.csv, for people to read."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(["id", "reason"])
        writer.writerows(self.skipped().items())
        write_whole(self.folder / "skipped.csv", buffer.getvalue().encode())


def stacked(pictures: Sequence[Future[tuple[Bytes, bytes]]], floats: Image | None = None) -> Published:
    """Pictures that are being read, as one batch."""
    read = [future.result() for future in pictures]
    return Published(torch.stack([pixels for pixels, _ in read]), tuple(header for _, header in read), floats)


def settle(writes: deque[Future[None]], left: int = 0) -> None:
    """Wait until no more than `left` writes are under way; what went wrong in one is raised."""
    while len(writes) > left:
        writes.popleft().result()


def load(dataset: Dataset, ids: Sequence[str], skipped: dict[str, str]) -> tuple[list[str], list[Picture]]:
    """The pictures that can be read, and their ids; the others go to `skipped`."""
    with ThreadPoolExecutor(IO_WORKERS) as pool:
        return readable(ids, loading(pool, dataset, ids), skipped)


def loading(pool: Executor, dataset: Dataset, ids: Sequence[str]) -> list[Future[Picture | BadPicture]]:
    """Start reading pictures of a dataset."""

    def attempt(id: str) -> Picture | BadPicture:
        try:
            return dataset.load(id)
        except BadPicture as bad:
            return bad

    return [pool.submit(attempt, id) for id in ids]


def readable(
    ids: Sequence[str], pictures: Sequence[Future[Picture | BadPicture]], skipped: dict[str, str]
) -> tuple[list[str], list[Picture]]:
    """Of pictures that are being read those that can be, and their ids; the others go to `skipped`."""
    results = [(id, future.result()) for id, future in zip(ids, pictures, strict=True)]
    skipped |= {id: str(got) for id, got in results if isinstance(got, BadPicture)}
    good = [(id, got) for id, got in results if not isinstance(got, BadPicture)]
    return [id for id, _ in good], [picture for _, picture in good]


def measurements(ids: Sequence[str], measured: Mapping[str, Scores]) -> pa.Table:
    """What was taken down while publishing, as scores of the anonymized pictures."""
    rows = [
        {"id": id, "view": ANONYMIZED, "scorer": name, "value": value}
        for name, values in measured.items()
        for id, value in zip(ids, values.tolist(), strict=False)
    ]
    return pa.Table.from_pylist(rows, SCORE_SCHEMA)


@contextmanager
def spent(folder: Path, view: str, pictures: int, evaluations: Callable[[], int]) -> Iterator[None]:
    """Keep what the block costs."""
    time, evaluated = perf_counter(), evaluations()
    yield
    row = {
        "view": view,
        "pictures": pictures,
        "seconds": perf_counter() - time,
        "evaluations": evaluations() - evaluated,
    }
    write_part(folder / "costs", pa.Table.from_pylist([row], COST_SCHEMA))


def read_costs(folder: Path) -> pa.Table:
    """All rows of a run folder's costs."""
    return parts(folder / "costs", COST_SCHEMA)


def face_pictures(faces: Mask) -> Bytes:
    """Masks as black and white pictures."""
    return (faces.to(torch.uint8) * 255).expand(-1, 3, -1, -1).cpu()


def write_part(folder: Path, table: pa.Table) -> None:
    """Write rows to a file named by their content: whole or not at all, and never twice under two names."""
    if table.num_rows == 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    data = buffer.getvalue()
    write_whole(folder / f"{hashlib.sha256(data).hexdigest()[:16]}.parquet", data)


def parts(folder: Path, schema: pa.Schema, columns: Sequence[str] | None = None, scorer: str | None = None) -> pa.Table:
    """The rows of all part files as they were written, optionally only some columns, or one scorer's rows."""
    columns = columns or schema.names
    tables = [pa.schema([schema.field(name) for name in columns]).empty_table()]
    for path in sorted(folder.glob("*.parquet")):
        part = pq.ParquetFile(path).read(use_threads=False)  # a part is small: threads only cost memory
        tables.append((part if scorer is None else part.filter(pc.equal(part["scorer"], scorer))).select(columns))
    return pa.concat_tables(tables)


def read_parts(folder: Path, scorer: str | None = None) -> pa.Table:
    """All rows of all part files, optionally of one scorer, each (id, view, scorer) once, sorted by view, scorer, id."""
    table = parts(folder, EMBEDDING_SCHEMA if folder.name == "embeddings" else SCORE_SCHEMA, scorer=scorer)
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
