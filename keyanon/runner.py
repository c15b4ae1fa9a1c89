"""Make, then measure. Killed, each of these goes on as it was:

    prepare     clean pictures and the faces on them, kept once for a dataset and shared by all runs
    generate    every view of them that a method makes
    check_faces the faces that are on them, and those that were published in clear
    enrol       their embeddings, and the gallery's, kept once for a recognizer and shared by all runs
    score       what scorers and recognizers say of each view, beside the original
    observe     whatever else an experiment takes down of each picture

A folder holds one sub-folder of PNG files for each view (original, mask; anonymized, recovered, one per attack). Batches are padded
to one size, so a picture's numbers do not depend on which pictures are left to do. Every secret and nonce hangs on its id.

While a batch is computed, a few threads read the next one's pictures and write the last one's; memory holds three batches, however
many pictures there are.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

import numpy as np
import pyarrow as pa
import torch

from keyanon.attacks.views import FloatChannel
from keyanon.batching import begun_ahead, filled, padded
from keyanon.channel.pixels import to_bytes, to_floats
from keyanon.faces.detection import FindsAll
from keyanon.faces.finding import Finder
from keyanon.faces.recognition import describing
from keyanon.measures.clear import SAME_PICTURE, in_clear
from keyanon.measures.scorers import Against
from keyanon.run_folder import (
    ANONYMIZED,
    CLEAN,
    COST_SCHEMA,
    EMBEDDING_SCHEMA,
    IO_WORKERS,
    MASK,
    ORIGINAL,
    RECONSTRUCTED,
    RECOVERED,
    SCORE_SCHEMA,
    RunFiles,
    embedding_rows,
    measured_ids,
    parts,
    score_rows,
    scored,
    stacked,
    vectors_of,
    write_measured,
    write_part,
)
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
    Measure,
    Observed,
    Picture,
    Recognizer,
    Reconstructs,
    Reversible,
    Scorer,
    Scores,
    View,
)

HEADER_BYTES = "header_bytes"  # a score of every anonymized picture
FACES, IN_CLEAR = "faces", "faces_in_clear"  # scores of every original and of its anonymized picture
VIEWS = {
    ORIGINAL: View("clean"),
    RECONSTRUCTED: View("clean"),
    ANONYMIZED: View("anonymized"),
    RECOVERED: View("recovered"),
}
MEASURES = {
    HEADER_BYTES: Measure("cost", "bytes", "lower", "what a file carries besides its pixels"),
    FACES: Measure("detection", "", "none", "faces found by MTCNN (0.6, 0.7, 0.7) or dlib's HOG detector (0)"),
    IN_CLEAR: Measure(
        "detection",
        "",
        "lower",
        f"faces published in clear: found on the original, or on the published picture by second_detector (dlib's network, 0), and "
        f"alike there by {SAME_PICTURE} or more",
    ),
}


def prepare(
    originals: RunFiles,
    dataset: Dataset,
    ids: Sequence[str],
    parser: FaceParser,
    batch_size: int,
    device: str = "cpu",
    finder: Finder | None = None,
) -> dict[str, str]:
    """Write the pictures `ids` as PNG files, each with the mask of its faces; returns why pictures were skipped, by id.

    A picture is skipped when it cannot be read, shows no face to `parser`, which works on `device`, or is refused by `finder`.
    """
    for view in (ORIGINAL, MASK):
        (originals.folder / view).mkdir(parents=True, exist_ok=True)
    skipped, there = originals.skipped(), set(originals.ids(ORIGINAL)) & set(originals.ids(MASK))
    pending = [id for id in ids if id not in skipped and id not in there]
    with ThreadPoolExecutor(IO_WORKERS) as pool:
        writes: deque[Future[None]] = deque()
        ahead = begun_ahead(pending, batch_size, "find faces", lambda batch: loading(pool, dataset.load, batch))
        for batch, pictures in ahead:
            wait_for(writes, 2 * batch_size)
            bad: dict[str, str] = {}
            good, loaded = readable(batch, pictures, bad)
            if good:
                images = padded(torch.stack(loaded), batch_size)
                faces = parser.mask(images.to(device), (images.shape[-2], images.shape[-1])).cpu()
                bad |= {id: "no face found" for id, face in zip(good, faces, strict=False) if not face.any()}
                if finder is not None:
                    reasons = finder.refused(images[: len(good)].to(device))
                    bad |= {id: reason for id, reason in zip(good, reasons, strict=True) if reason is not None}
                keep = [i for i, id in enumerate(good) if id not in bad]
                names = [good[i] for i in keep]
                writes += originals.write_all(pool, ORIGINAL, names, to_bytes(images[keep]))
                writes += originals.write_all(pool, MASK, names, face_pictures(faces[keep]))
            originals.write_skipped(bad)
            skipped |= bad
        wait_for(writes)
    return {id: skipped[id] for id in ids if id in skipped}


def generate(
    folder: Path,
    originals: RunFiles,
    ids: Sequence[str],
    method: Anonymizer,
    key: Key,
    attacks: Mapping[str, Attack],
    batch_size: int,
    evaluations: Callable[[], int] = lambda: 0,
) -> None:
    """Write every view of the prepared pictures `ids`.

    `evaluations` counts the pictures that the method's networks have seen so far; what each batch cost of these and of time is kept
    in the folder's `costs`.
    """
    views = [ANONYMIZED]
    if isinstance(method, Reversible):
        views += [RECOVERED, *attacks]
    if isinstance(method, Reconstructs):
        views += [RECONSTRUCTED]
    for view in views:
        (folder / view).mkdir(parents=True, exist_ok=True)
    files = RunFiles(folder)
    there = {view: set(files.ids(view)) for view in views}
    pending = [id for id in ids if not all(id in there[view] for view in views)]
    with ThreadPoolExecutor(IO_WORKERS) as pool:
        writes: deque[Future[None]] = deque()
        title = "anonymize and recover" if isinstance(method, Reversible) else "anonymize"
        ahead = begun_ahead(
            pending, batch_size, title, lambda batch: originals.reading(pool, ORIGINAL, filled(batch, batch_size))
        )
        for batch, reading in ahead:
            wait_for(writes, len(views) * batch_size)
            images, names, keys = to_floats(stacked(reading).images), filled(batch, batch_size), [key] * batch_size
            todo = [view for view in views if not there[view].issuperset(batch)]
            published = None
            if ANONYMIZED in todo or any(isinstance(attacks.get(view), FloatChannel) for view in todo):
                with costs_kept(folder, ANONYMIZED, batch_size, evaluations):
                    published = method.anonymize(images, keys, names)
                # Before the pictures: a run killed in between makes them, and measures, again.
                measured = {(ANONYMIZED, name): values for name, values in published.measured.items()}
                write_part(folder / "scores", score_rows(batch, measured))
                # The file is the channel: it has to be there before anybody recovers.
                wait_for(deque(files.write_all(pool, ANONYMIZED, batch, published.images, published.headers)))
            if RECONSTRUCTED in todo and isinstance(method, Reconstructs):
                writes += files.write_all(pool, RECONSTRUCTED, batch, to_bytes(method.reconstruct(images)))
            if not isinstance(method, Reversible):
                continue
            on_file = stacked(files.reading(pool, ANONYMIZED, names), published.floats if published else None)
            if RECOVERED in todo:
                with costs_kept(folder, RECOVERED, batch_size, evaluations):
                    out = method.recover(on_file, keys)
                writes += files.write_all(pool, RECOVERED, batch, to_bytes(out))
            for view, attack in attacks.items():
                if view in todo:
                    writes += files.write_all(pool, view, batch, to_bytes(attack(on_file, keys, method)))
        wait_for(writes)


def check_faces(
    folder: Path,
    originals: RunFiles,
    ids: Sequence[str],
    finder: Finder,
    second: FindsAll,
    batch_size: int,
    device: str = "cpu",
) -> dict[str, int]:
    """Count the faces on the prepared pictures `ids`, and those that their published pictures in `folder` show in clear.

    `second` searches the published pictures; it should be another detector than `finder` has. Both counts are scores. Returns the
    pictures with faces in clear, and how many.
    """
    files, there = RunFiles(folder), scored(folder, ids).get((ANONYMIZED, IN_CLEAR), np.zeros(len(ids), bool))
    pending = [id for id, done in zip(ids, there, strict=True) if not done]

    def begin(batch: Sequence[str]) -> list[list[Future[tuple[Bytes, bytes]]]]:
        return [originals.reading(pool, ORIGINAL, batch), files.reading(pool, ANONYMIZED, batch)]

    with ThreadPoolExecutor(IO_WORKERS) as pool:
        for batch, reading in begun_ahead(pending, batch_size, "search for faces in clear", begin):
            before, after = (to_floats(stacked(pictures).images).to(device) for pictures in reading)
            found = finder.found(before)
            again = zip(before, after, found, second.faces(after), strict=True)
            clear = [
                in_clear(x, y, [*(face.box for face in faces), *(face.box for face in more)])
                for x, y, faces, more in again
            ]
            counts = {(ORIGINAL, FACES): [len(faces) for faces in found], (ANONYMIZED, IN_CLEAR): clear}
            write_part(
                folder / "scores",
                score_rows(batch, {place: torch.tensor(count, dtype=torch.float32) for place, count in counts.items()}),
            )
    table = parts(folder / "scores", SCORE_SCHEMA, scorer=IN_CLEAR)
    left = dict(zip(table["id"].to_pylist(), table["value"].to_pylist(), strict=True))
    return {id: int(left[id]) for id in ids if left[id]}


def enrol(
    folder: Path,
    load: Callable[[str], Picture],
    ids: Sequence[str],
    name: str,
    recognizer: Recognizer,
    batch_size: int,
    device: str = "cpu",
    finder: Finder | None = None,
) -> dict[str, str]:
    """Embed the clean pictures `ids` with one recognizer, called `name`, into `folder`; returns why pictures were skipped.

    The pictures are rounded to 8 bits first, as those that are compared with them are. Of several faces that `finder` finds the
    largest is embedded; without it the recognizer chooses.
    """
    files = RunFiles(folder)
    known = set(parts(folder / "embeddings", EMBEDDING_SCHEMA, ["id"])["id"].to_pylist())
    skipped = files.skipped()
    pending = [id for id in dict.fromkeys(ids) if id not in known and id not in skipped]
    with ThreadPoolExecutor(IO_WORKERS) as pool:
        ahead = begun_ahead(pending, batch_size, f"{name}: enrol", lambda batch: loading(pool, load, batch))
        for batch, pictures in ahead:
            bad: dict[str, str] = {}
            good, loaded = readable(batch, pictures, bad)
            files.write_skipped(bad)
            skipped |= bad
            if good:
                images = to_floats(to_bytes(padded(torch.stack(loaded), batch_size))).to(device)
                chosen = recognizer if finder is None else describing(recognizer, finder, images)
                write_part(folder / "embeddings", embedding_rows(good, {(CLEAN, name): chosen.embed(images)}))
    return {id: skipped[id] for id in ids if id in skipped}


def score(
    folder: Path,
    pictures: Mapping[str, RunFiles],
    views: Sequence[str],
    ids: Sequence[str],
    scorers: Mapping[str, Scorer],
    recognizers: Mapping[str, Recognizer],
    enrolled: Mapping[str, Path],
    batch_size: int,
    device: str = "cpu",
    finder: Finder | None = None,
) -> None:
    """Score `views` of the pictures `ids` against their originals, on `device`; rows and embeddings go to part files in `folder`.

    `pictures` says where each view's files are, those of original, mask and what else scorers compare with included. A
    recognizer's score is the cosine of view and original, which is `enrolled` in its folder. Where `finder` finds several faces
    on the original, it describes on every view the one that is enrolled.
    """
    there = {view: set(files.ids(view)) for view, files in pictures.items()}
    place, done, none = {id: i for i, id in enumerate(ids)}, scored(folder, ids), np.zeros(len(ids), bool)
    names = [*scorers, *recognizers]
    compared = [scorer.view for scorer in scorers.values() if isinstance(scorer, Against)]

    def lacking(batch: Sequence[str]) -> dict[str, list[str]]:
        """By view the scorers that some picture of the batch lacks."""
        lines = [place[id] for id in batch]
        found = {
            view: [name for name in names if not done.get((view, name), none)[lines].all()]
            for view in views
            if there[view].issuperset(batch)
        }
        return {view: lacks for view, lacks in found.items() if lacks}

    def begin(batch: Sequence[str]) -> dict[str, list[Future[tuple[Bytes, bytes]]]]:
        """The pictures that scoring the batch needs, by view, being read."""
        wanted = [ORIGINAL, MASK, *lacking(batch), *compared]
        here = [view for view in dict.fromkeys(wanted) if there.get(view, set()).issuperset(batch)]
        return {view: pictures[view].reading(pool, view, filled(batch, batch_size)) for view in here}

    left = [id for id in ids if lacking([id])]
    clean = {name: vectors_of(enrolled[name] / "embeddings", left) for name in recognizers}
    with ThreadPoolExecutor(IO_WORKERS) as pool:
        for batch, reading in begun_ahead(left, batch_size, "score", begin):
            todo, read = lacking(batch), {view: stacked(being_read) for view, being_read in reading.items()}
            face = (read[MASK].images[:, :1] > 127).to(device)
            references = {
                view: to_floats(read[view].images).to(device) for view in {ORIGINAL, *compared} if view in read
            }
            describers = {
                name: recognizer if finder is None else describing(recognizer, finder, references[ORIGINAL])
                for name, recognizer in recognizers.items()
            }
            values: dict[tuple[str, str], Scores] = {}
            vectors: dict[tuple[str, str], Embeddings] = {}
            for view, lacks in todo.items():
                images = to_floats(read[view].images).to(device)
                for name in lacks:
                    if recognizer := describers.get(name):
                        vectors[view, name] = embedding = recognizer.embed(images)
                        own = torch.stack([clean[name][id] for id in filled(batch, batch_size)]).to(embedding)
                        values[view, name] = (embedding * own).sum(1)
                        continue
                    scorer = scorers[name]
                    reference = references.get(scorer.view if isinstance(scorer, Against) else ORIGINAL)
                    nothing = torch.full((batch_size,), torch.nan)
                    values[view, name] = nothing if reference is None else scorer(images, reference, face)
                if view == ANONYMIZED:
                    values[view, HEADER_BYTES] = torch.tensor([float(len(header)) for header in read[view].headers])
            # The embeddings go first: a run killed in between scores the batch again and finds both.
            write_part(folder / "embeddings", embedding_rows(batch, vectors))
            rows = score_rows(batch, values)
            fresh = [
                not done.get((view, name), none)[place[id]]
                for id, view, name in zip(
                    *(rows[column].to_pylist() for column in ("id", "view", "scorer")), strict=True
                )
            ]
            write_part(folder / "scores", rows.filter(pa.array(fresh, pa.bool_())))


def observe(
    folder: Path,
    originals: RunFiles,
    ids: Sequence[str],
    observer: Callable[[Sequence[str], Image, Mask], Observed],
    batch_size: int,
    title: str,
) -> None:
    """Keep what `observer` says of the prepared pictures `ids`: it is given a batch's ids, pictures and faces (b 1 h w) at a time.

    Pictures and faces are filled up beyond the ids with copies of the last.
    """
    done = measured_ids(folder)
    pending = [id for id in ids if id not in done]

    def begin(batch: Sequence[str]) -> tuple[list[Future[tuple[Bytes, bytes]]], list[Future[tuple[Bytes, bytes]]]]:
        names = filled(batch, batch_size)
        return originals.reading(pool, ORIGINAL, names), originals.reading(pool, MASK, names)

    with ThreadPoolExecutor(IO_WORKERS) as pool:
        for batch, (pictures, masks) in begun_ahead(pending, batch_size, title, begin):
            face = stacked(masks).images[:, :1] > 127
            found = observer(batch, to_floats(stacked(pictures).images), face)
            write_part(folder / "embeddings", embedding_rows(batch, found.vectors))
            write_part(folder / "scores", score_rows(batch, found.values))
            # Last: of a batch that was killed in between everything is looked at again.
            write_measured(folder, batch)


def loading(pool: Executor, load: Callable[[str], Picture], ids: Sequence[str]) -> list[Future[Picture | BadPicture]]:
    """Start reading pictures."""

    def attempt(id: str) -> Picture | BadPicture:
        try:
            return load(id)
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


def wait_for(writes: deque[Future[None]], left: int = 0) -> None:
    """Wait until no more than `left` writes are under way; what went wrong in one is raised."""
    while len(writes) > left:
        writes.popleft().result()


@contextmanager
def costs_kept(folder: Path, view: str, pictures: int, evaluations: Callable[[], int]) -> Iterator[None]:
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


def face_pictures(faces: Mask) -> Bytes:
    """Masks as black and white pictures."""
    return (faces.to(torch.uint8) * 255).expand(-1, 3, -1, -1).cpu()
