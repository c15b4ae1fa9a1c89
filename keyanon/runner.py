"""Make, then measure: generate() writes pictures, score() reads them, enrol() embeds the gallery. Killed, each goes on as it was.

A run folder holds one sub-folder of PNG files for each view (original, mask, anonymized, recovered, one per attack). A file that
exists is done: files appear whole. Batches are padded to one size, so a picture's numbers do not depend on which pictures are left
to do, and every secret and nonce hangs on the picture's id. The gallery is the same for all methods: its embeddings have folders
of their own, which runs share.
"""

import csv
import hashlib
import io
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from tqdm import tqdm

from keyanon import images as channel
from keyanon.attacks import FloatChannel
from keyanon.diffusion import padded
from keyanon.scorers import Against
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
HEADER_BYTES = "header_bytes"  # a score of every anonymized picture: what it carries besides its pixels
IO_WORKERS = 4
PROGRESS = 0.5 if sys.stderr.isatty() else 20  # seconds between lines: a log file is read later


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
) -> dict[str, str]:
    """Write every view of the pictures `ids`; returns why pictures were skipped, by id.

    A picture is skipped when it cannot be read or shows no face to `parser`. `evaluations` counts the pictures that the
    method's networks have seen so far; what each batch cost of these and of time is kept in the folder's `costs`.
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

    pending = [id for id in ids if id not in skipped and not all(files.has(view, id) for view in views)]
    for batch in batches(pending, batch_size, "anonymize and recover"):
        good, pictures = load(dataset, batch, skipped)
        if not good:
            continue
        originals = padded(torch.stack(pictures), batch_size)
        faces = parser.mask(originals, (originals.shape[-2], originals.shape[-1]))
        faceless = [id for id, face in zip(good, faces, strict=False) if not face.any()]
        skipped |= dict.fromkeys(faceless, "no face found")
        keep = [i for i, id in enumerate(good) if id not in faceless]
        if not keep:
            continue
        if faceless:
            originals, faces = padded(originals[keep], batch_size), padded(faces[keep], batch_size)
        good = [good[i] for i in keep]
        files.write_all(ORIGINAL, good, channel.to_bytes(originals))
        files.write_all(MASK, good, face_pictures(faces))

        names, keys = filled(good, batch_size), [key] * batch_size
        todo = [view for view in views if not all(files.has(view, id) for id in good)]
        published = None
        if ANONYMIZED in todo or any(isinstance(attacks.get(view), FloatChannel) for view in todo):
            with spent(folder, ANONYMIZED, batch_size, evaluations):
                published = method.anonymize(originals, keys, names)
            # Before the pictures: a run killed in between makes them, and measures, again.
            write_part(folder / "scores", measurements(good, published.measured))
            files.write_all(ANONYMIZED, good, published.images, published.headers)
        if RECONSTRUCTED in todo and isinstance(method, Reconstructs):
            files.write_all(RECONSTRUCTED, good, channel.to_bytes(method.reconstruct(originals)))
        on_file = files.read_files(ANONYMIZED, names, published.floats if published else None)
        if not isinstance(method, Reversible):
            continue
        if RECOVERED in todo:
            with spent(folder, RECOVERED, batch_size, evaluations):
                out = method.recover(channel.to_floats(on_file.images), on_file.headers, keys)
            files.write_all(RECOVERED, good, channel.to_bytes(out))
        for view, attack in attacks.items():
            if view in todo:
                files.write_all(view, good, channel.to_bytes(attack(on_file, keys, method)))
    files.write_skipped(skipped)
    return {id: reason for id, reason in skipped.items() if id in set(ids)}


def score(
    folder: Path,
    ids: Sequence[str],
    scorers: Mapping[str, Scorer],
    recognizers: Mapping[str, Recognizer],
    batch_size: int,
) -> None:
    """Score every view on disk against the originals: one row per picture, view and scorer, kept in part files.

    A recognizer's score is the cosine of view and original; its embeddings are kept for verification, beside the scores.
    """
    files = RunFiles(folder)
    views = files.views()
    done = {(row["id"], row["view"], row["scorer"]) for row in read_parts(folder / "scores").to_pylist()}
    wanted = [*scorers, *recognizers]
    skipped = files.skipped()

    def pending(batch: Sequence[str], view: str) -> list[str]:
        """The scorers that some picture of the batch lacks on this view."""
        there = [id for id in batch if id not in skipped and files.has(view, id)]
        return [name for name in wanted if any((id, view, name) not in done for id in there)]

    for batch in batches([id for id in ids if any(pending([id], view) for view in views)], batch_size, "score"):
        rows: list[dict[str, object]] = []
        vectors: list[dict[str, object]] = []
        names = filled(batch, batch_size)
        todo = {view: pending(batch, view) for view in views if all(files.has(view, id) for id in batch)}
        original = channel.to_floats(files.read_all(ORIGINAL, names))
        face = files.read_all(MASK, names)[:, :1] > 127
        references: dict[str, Image] = {}  # what each scorer compares with, where there is such a view
        for name, scorer in scorers.items():
            if not isinstance(scorer, Against):
                references[name] = original
            elif all(files.has(scorer.view, id) for id in batch):
                references[name] = channel.to_floats(files.read_all(scorer.view, names))
        embedded = {
            name: recognizer.embed(original)
            for name, recognizer in recognizers.items()
            if any(name in missing for missing in todo.values())
        }
        for view, missing in todo.items():
            on_file = files.read_files(view, names)
            pictures = channel.to_floats(on_file.images)
            values = {
                name: scorer(pictures, references[name], face)
                if name in references
                else torch.full((len(names),), torch.nan)
                for name, scorer in scorers.items()
                if name in missing
            }
            if view == ANONYMIZED:
                values[HEADER_BYTES] = torch.tensor([float(len(header)) for header in on_file.headers])
            for name, clean in embedded.items():
                if name in missing:
                    embedding = clean if view == ORIGINAL else recognizers[name].embed(pictures)
                    values[name] = (embedding * clean).sum(1)
                    vectors += embedding_rows(batch, view, name, embedding)
            rows += [
                {"id": id, "view": view, "scorer": name, "value": float(value)}
                for name, column in values.items()
                for id, value in zip(batch, column, strict=False)
                if (id, view, name) not in done
            ]
        # The embeddings go first: a run killed in between scores the batch again and finds both.
        write_part(folder / "embeddings", pa.Table.from_pylist(vectors, EMBEDDING_SCHEMA))
        write_part(folder / "scores", pa.Table.from_pylist(rows, SCORE_SCHEMA))


def enrol(folder: Path, dataset: Dataset, name: str, recognizer: Recognizer, batch_size: int) -> dict[str, str]:
    """Embed the dataset's gallery with one recognizer, called `name`, into `folder`; returns why pictures were skipped, by id.

    The pictures are rounded to 8 bits first, as those that are compared with them are.
    """
    files = RunFiles(folder)
    known, skipped = set(read_parts(folder / "embeddings")["id"].to_pylist()), files.skipped()
    pending = [id for id in dataset.gallery if id not in known and id not in skipped]
    for batch in batches(pending, batch_size, f"{name}: gallery"):
        good, pictures = load(dataset, batch, skipped)
        if good:
            images = channel.to_floats(channel.to_bytes(padded(torch.stack(pictures), batch_size)))
            vectors = embedding_rows(good, GALLERY, name, recognizer.embed(images))
            write_part(folder / "embeddings", pa.Table.from_pylist(vectors, EMBEDDING_SCHEMA))
    files.write_skipped(skipped)
    return {id: reason for id, reason in skipped.items() if id in set(dataset.gallery)}


def embedding_rows(ids: Sequence[str], view: str, name: str, embeddings: Embeddings) -> list[dict[str, object]]:
    """Rows of EMBEDDING_SCHEMA; `embeddings` may be filled up beyond the ids."""
    return [
        {"id": id, "view": view, "scorer": name, "embedding": row.tolist()}
        for id, row in zip(ids, embeddings, strict=False)
    ]


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

    def write(self, view: str, id: str, pixels: Tensor, header: bytes = b"") -> None:
        channel.write_png(self.path(view, id), pixels, header)

    def write_all(
        self, view: str, ids: Sequence[str], pixels: Iterable[Tensor], headers: Sequence[bytes] | None = None
    ) -> None:
        headers = headers or [b""] * len(ids)
        with ThreadPoolExecutor(IO_WORKERS) as pool:
            list(pool.map(lambda args: self.write(view, *args), zip(ids, pixels, headers, strict=False)))

    def read_all(self, view: str, ids: Sequence[str]) -> Bytes:
        return self.read_files(view, ids).images

    def read_files(self, view: str, ids: Sequence[str], floats: Image | None = None) -> Published:
        """The pictures of a view as a receiver reads them, with their headers."""
        with ThreadPoolExecutor(IO_WORKERS) as pool:
            read = list(pool.map(lambda id: channel.read_png(self.path(view, id)), ids))
        return Published(torch.stack([pixels for pixels, _ in read]), tuple(header for _, header in read), floats)

    def skipped(self) -> dict[str, str]:
        path = self.folder / "skipped.csv"
        if not path.exists():
            return {}
        with path.open(newline="") as file:
            return {row["id"]: row["reason"] for row in csv.DictReader(file)}

    def write_skipped(self, skipped: Mapping[str, str]) -> None:
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(["id", "reason"])
        writer.writerows(sorted((self.skipped() | dict(skipped)).items()))
        channel.write_whole(self.folder / "skipped.csv", buffer.getvalue().encode())


def load(dataset: Dataset, ids: Sequence[str], skipped: dict[str, str]) -> tuple[list[str], list[Picture]]:
    """The pictures that can be read, and their ids; the others go to `skipped`."""

    def attempt(id: str) -> Picture | BadPicture:
        try:
            return dataset.load(id)
        except BadPicture as bad:
            return bad

    with ThreadPoolExecutor(IO_WORKERS) as pool:
        results = list(pool.map(attempt, ids))
    skipped |= {id: str(got) for id, got in zip(ids, results, strict=True) if isinstance(got, BadPicture)}
    good = [(id, got) for id, got in zip(ids, results, strict=True) if not isinstance(got, BadPicture)]
    return [id for id, _ in good], [picture for _, picture in good]


def batches(ids: Sequence[str], size: int, title: str) -> Iterator[list[str]]:
    """Consecutive batches, with a progress bar that counts pictures."""
    with tqdm(total=len(ids), desc=title, unit="image", disable=not ids, mininterval=PROGRESS) as bar:
        for start in range(0, len(ids), size):
            batch = list(ids[start : start + size])
            yield batch
            bar.update(len(batch))


def filled(ids: Sequence[str], size: int) -> list[str]:
    """The ids filled up to `size` with copies of the last, as `padded` fills their pictures."""
    return [*ids, *[ids[-1]] * (size - len(ids))]


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
    tables = [pq.read_table(path, schema=COST_SCHEMA) for path in sorted((folder / "costs").glob("*.parquet"))]
    return pa.concat_tables([COST_SCHEMA.empty_table(), *tables])


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
    channel.write_whole(folder / f"{hashlib.sha256(data).hexdigest()[:16]}.parquet", data)


def read_parts(folder: Path, view: str | None = None) -> pa.Table:
    """All rows of all part files, optionally of one view, each (id, view, scorer) once, sorted by view, scorer, id."""
    schema = EMBEDDING_SCHEMA if folder.name == "embeddings" else SCORE_SCHEMA
    tables = [pq.read_table(path, schema=schema) for path in sorted(folder.glob("*.parquet"))]
    table = pa.concat_tables(tables) if tables else schema.empty_table()
    rows = {(row["view"], row["scorer"], row["id"]): row for row in table.to_pylist() if view in (None, row["view"])}
    return pa.Table.from_pylist([rows[name] for name in sorted(rows)], schema)
