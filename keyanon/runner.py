"""Make, then measure. Killed, each of these goes on as it was:

    prepare     clean pictures and the faces on them, kept once for a dataset and shared by all runs
    generate    every view of them that a method makes
    check_faces the faces that are on them, and those that were published in clear
    enrol       their embeddings, and the gallery's, kept once for a recognizer and shared by all runs
    score       what scorers and recognizers say of each view, beside the original (measures of whole sets enrol the views, too)
    observe     whatever else an experiment takes down of each picture

A folder holds one sub-folder of PNG files for each view (original, mask; anonymized, recovered, one per attack). Whatever is kept
is kept under what it is made of (`RunFiles`): of another picture of the same name, or by a part with other settings, it is not
there. Batches are padded to one size, so a picture's numbers do not depend on which pictures are left to do. Every secret and nonce
hangs on its id.

While a batch is computed, a few threads read the next one's pictures and write the last one's; memory holds three batches, however
many pictures there are.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np
import torch
from torch.nn.functional import cosine_similarity

from keyanon.batching import begun_ahead, filled, padded
from keyanon.channel.pixels import to_bytes, to_floats
from keyanon.faces.detection import FindsAll
from keyanon.faces.finding import Finder
from keyanon.faces.recognition import describing
from keyanon.finite import within
from keyanon.measures.clear import SAME_PICTURE, in_clear
from keyanon.measures.scorers import Against
from keyanon.run_folder import (
    ANONYMIZED,
    CLEAN,
    IO_WORKERS,
    MASK,
    ORIGINAL,
    RECONSTRUCTED,
    RECOVERED,
    RunFiles,
    stacked,
)
from keyanon.sources import Digests
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
    PictureBytes,
    Place,
    ReadsFloats,
    Recognizer,
    Reconstructs,
    Reversible,
    Scorer,
    Scores,
    SetScorer,
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
        "faces published in clear at their own place: found on the original, or by second_detector on the published picture, and "
        f"alike by {SAME_PICTURE} or more",
    ),
}


@dataclass
class Writes:
    """Pictures that are being written, and the folders that keep record of them."""

    folders: Sequence[RunFiles]
    under_way: deque[Future[None]] = field(default_factory=deque)

    def wait_for(self, left: int = 0) -> None:
        """Wait until no more than `left` are under way; what went wrong in one is raised."""
        try:
            while len(self.under_way) > left:
                self.under_way.popleft().result()
        finally:
            for files in self.folders:
                files.keep_files()


@contextmanager
def writing(*folders: RunFiles) -> Iterator[tuple[Executor, Writes]]:
    """Threads that read and write, and what they write, all of it done and written down at the end of the block."""
    writes = Writes(folders)
    with ThreadPoolExecutor(IO_WORKERS) as pool:
        yield pool, writes
        writes.wait_for()


def identify(
    contents: dict[str, str], digests: Digests, dataset: Dataset, ids: Sequence[str], unread: bool = True
) -> dict[str, str]:
    """Put into `contents` what the files of pictures hold today; returns why some of them cannot be told, by id.

    Without `unread`, files that would have to be read for that are left out.
    """
    bad: dict[str, str] = {}

    def tell(id: str) -> None:
        try:
            digest = digests.of(dataset.source(id)) if unread else digests.known(dataset.source(id))
        except BadPicture as error:
            bad[id] = str(error)
            digest = None
        contents.pop(id, None)
        if digest is not None:
            contents[id] = digest

    with ThreadPoolExecutor(IO_WORKERS) as pool:
        for _ in pool.map(tell, dict.fromkeys(ids)):
            pass
    digests.keep()
    return bad


class ChangedPicture(BadPicture):
    """A picture whose file was written while it was read."""


def load_as(dataset: Dataset, id: str, content: str, digests: Digests) -> Picture:
    """A picture, read from a file of these bytes; raises ChangedPicture if they are others by now."""
    picture, source = dataset.load(id), dataset.source(id)
    if digests.of(source) != content:
        raise ChangedPicture(f"{source.path} changed while it was read; start again when it is whole")
    return picture


def prepare(
    originals: RunFiles,
    contents: dict[str, str],
    digests: Digests,
    dataset: Dataset,
    ids: Sequence[str],
    parser: FaceParser,
    batch_size: int,
    device: str = "cpu",
    finder: Finder | None = None,
) -> dict[str, str]:
    """Write the pictures `ids` as PNG files, each with the mask of its faces; returns why pictures were skipped, by id.

    What each picture's file holds today goes to `contents`, by which `originals` tells its pictures apart. A picture is skipped
    when it cannot be read, shows no face to `parser`, which works on `device`, or is refused by `finder`; it is tried again once
    its bytes have changed.
    """
    skipped = identify(contents, digests, dataset, ids, unread=False)
    before = originals.ever_skipped()

    def done(id: str) -> bool:
        return (id, contents[id]) in before or all(originals.has(view, id) for view in (ORIGINAL, MASK))

    def load(id: str) -> Picture | None:
        """The picture; None where it turns out to be one that was prepared or skipped."""
        contents[id] = digests.of(dataset.source(id))
        try:
            return None if done(id) else load_as(dataset, id, contents[id], digests)
        except ChangedPicture:
            del contents[id]
            raise

    pending = [id for id in ids if id not in skipped and not (id in contents and done(id))]
    with writing(originals) as (pool, writes):
        for batch, pictures in begun_ahead(pending, batch_size, "find faces", lambda batch: loading(pool, load, batch)):
            writes.wait_for(2 * batch_size)
            digests.keep()
            bad: dict[str, str] = {}
            good, loaded = readable(batch, pictures, bad)
            if good:
                images = padded(torch.stack(loaded), batch_size)
                with within("finding faces", good):
                    faces = parser.mask(images.to(device), (images.shape[-2], images.shape[-1])).cpu()
                bad |= {id: "no face found" for id, face in zip(good, faces, strict=False) if not face.any()}
                if finder is not None:
                    reasons = finder.refused(images[: len(good)].to(device))
                    bad |= {id: reason for id, reason in zip(good, reasons, strict=True) if reason is not None}
                keep = [i for i, id in enumerate(good) if id not in bad]
                names = [good[i] for i in keep]
                writes.under_way += originals.write_all(pool, ORIGINAL, names, to_bytes(images[keep]))
                writes.under_way += originals.write_all(pool, MASK, names, face_pictures(faces[keep]))
            originals.write_skipped({id: reason for id, reason in bad.items() if id in contents})
            skipped |= bad
    digests.keep()
    return {id: reason for id in ids if (reason := skipped.get(id) or before.get((id, contents.get(id, ""))))}


def generate(
    files: RunFiles,
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
    among the folder's costs.
    """
    views = [ANONYMIZED]
    if isinstance(method, Reversible):
        views += [RECOVERED, *attacks]
    if isinstance(method, Reconstructs):
        views += [RECONSTRUCTED]
    pending = [id for id in ids if not all(files.has(view, id) for view in views)]
    title = "anonymize and recover" if isinstance(method, Reversible) else "anonymize"
    with writing(files) as (pool, writes):
        ahead = begun_ahead(
            pending, batch_size, title, lambda batch: originals.reading(pool, ORIGINAL, filled(batch, batch_size))
        )
        for batch, reading in ahead:
            writes.wait_for(len(views) * batch_size)
            images, names, keys = to_floats(stacked(reading).images), filled(batch, batch_size), [key] * batch_size
            todo = [view for view in views if not all(files.has(view, id) for id in batch)]
            published = None
            if ANONYMIZED in todo:
                todo = views  # all are made from the file that is about to be made
            elif any(reads_floats(attacks.get(view)) for view in todo):
                with within(f"{type(method).__name__}, anonymize", names):
                    published = method.anonymize(images, keys, names)  # for its floats, which no file holds
            if ANONYMIZED in todo:
                with (
                    within(f"{type(method).__name__}, anonymize", names),
                    costs_kept(files, batch, ANONYMIZED, batch_size, evaluations),
                ):
                    published = method.anonymize(images, keys, names)
                # Before the pictures: a run killed in between makes them, and measures, again.
                files.write_scores(batch, {(ANONYMIZED, name): values for name, values in published.measured.items()})
                # The file is the channel: it has to be there before anybody recovers.
                writes.under_way += files.write_all(pool, ANONYMIZED, batch, published.images, published.headers)
                writes.wait_for()
            if RECONSTRUCTED in todo and isinstance(method, Reconstructs):
                with within(f"{type(method).__name__}, reconstruct", names):
                    out = to_bytes(method.reconstruct(images))
                writes.under_way += files.write_all(pool, RECONSTRUCTED, batch, out)
            if not isinstance(method, Reversible):
                continue
            on_file = stacked(files.reading(pool, ANONYMIZED, names), published.floats if published else None)
            if RECOVERED in todo:
                with (
                    within(f"{type(method).__name__}, recover", names),
                    costs_kept(files, batch, RECOVERED, batch_size, evaluations),
                ):
                    out = to_bytes(method.recover(on_file, keys))
                writes.under_way += files.write_all(pool, RECOVERED, batch, out)
            for view, attack in attacks.items():
                if view in todo:
                    with within(f"{type(method).__name__}, attack {view}", names):
                        out = to_bytes(attack(on_file, keys, method))
                    writes.under_way += files.write_all(pool, view, batch, out)


def reads_floats(attack: object) -> bool:
    return isinstance(attack, ReadsFloats) and attack.reads_floats


def check_faces(
    files: RunFiles,
    originals: RunFiles,
    ids: Sequence[str],
    finder: Finder,
    second: FindsAll,
    batch_size: int,
    device: str = "cpu",
) -> dict[str, int]:
    """Count the faces on the prepared pictures `ids`, and those that their published pictures in `files` show in clear.

    `second` searches the published pictures; it should be another detector than `finder` has. Both counts are scores. Returns the
    pictures with faces in clear, and how many.
    """
    there = files.scored(ids).get((ANONYMIZED, IN_CLEAR), np.zeros(len(ids), bool))
    pending = [id for id, done in zip(ids, there, strict=True) if not done]

    def begin(batch: Sequence[str]) -> list[list[Future[tuple[PictureBytes, bytes]]]]:
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
            values = {place: torch.tensor(count, dtype=torch.float32) for place, count in counts.items()}
            files.write_scores(batch, values)
    rows = files.scores(ids).to_pylist()
    return {row["id"]: int(row["value"]) for row in rows if row["scorer"] == IN_CLEAR and row["value"]}


def enrol(
    files: RunFiles,
    load: Callable[[str], Picture],
    ids: Sequence[str],
    name: str,
    recognizer: Recognizer | SetScorer,
    batch_size: int,
    device: str = "cpu",
    finder: Finder | None = None,
    view: str = CLEAN,
) -> dict[str, str]:
    """Embed the clean pictures `ids`, or a `view` of them, with one recognizer, called `name`, into `files`; returns why pictures
    were skipped.

    The pictures are rounded to 8 bits first, as those that are compared with them are. Of several faces that `finder` finds the
    largest is embedded; without it the recognizer chooses.
    """
    known, skipped = set(files.embeddings(view=view)["id"].to_pylist()), files.skipped()
    pending = [id for id in dict.fromkeys(ids) if id not in known and id not in skipped]
    with ThreadPoolExecutor(IO_WORKERS) as pool:
        ahead = begun_ahead(pending, batch_size, f"{name}: enrol", lambda batch: loading(pool, load, batch))
        for batch, pictures in ahead:
            bad: dict[str, str] = {}
            good, loaded = readable(batch, pictures, bad)
            changed = {id for id, got in zip(batch, pictures, strict=True) if isinstance(got.result(), ChangedPicture)}
            files.write_skipped({id: reason for id, reason in bad.items() if id not in changed})
            skipped |= bad
            if good:
                images = to_floats(to_bytes(padded(torch.stack(loaded), batch_size))).to(device)
                chosen = recognizer if finder is None else describing(recognizer, finder, images)
                with within(f"embedding by {name}", good):
                    embeddings = chosen.embed(images)
                files.write_embeddings(good, {(view, name): embeddings})
    return {id: skipped[id] for id in ids if id in skipped}


def score(
    files: RunFiles,
    pictures: Mapping[str, RunFiles],
    views: Sequence[str],
    ids: Sequence[str],
    scorers: Mapping[str, Scorer],
    recognizers: Mapping[str, Recognizer],
    enrolled: Mapping[str, RunFiles],
    batch_size: int,
    device: str = "cpu",
    finder: Finder | None = None,
) -> None:
    """Score `views` of the pictures `ids` against their originals, on `device`; rows and embeddings go to `files`.

    `pictures` says where each view's files are, those of original, mask and what else scorers compare with included. A
    recognizer's score is the cosine of view and original, which is among the `enrolled`. Where `finder` finds several faces on the
    original, it describes on every view the one that is enrolled.
    """
    there = {view: set(at.ids(view)) for view, at in pictures.items()}
    place, names = {id: i for i, id in enumerate(ids)}, [*scorers, *recognizers]
    done, none = files.scored(ids), np.zeros(len(ids), bool)
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

    def begin(batch: Sequence[str]) -> dict[str, list[Future[tuple[PictureBytes, bytes]]]]:
        """The pictures that scoring the batch needs, by view, being read."""
        wanted = [ORIGINAL, MASK, *lacking(batch), *compared]
        here = [view for view in dict.fromkeys(wanted) if there.get(view, set()).issuperset(batch)]
        return {view: pictures[view].reading(pool, view, filled(batch, batch_size)) for view in here}

    left = [id for id in ids if lacking([id])]
    clean = {name: enrolled[name].vectors(left) for name in recognizers}
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
            values: dict[Place, Scores] = {}
            vectors: dict[Place, Embeddings] = {}
            for view, lacks in todo.items():
                images = to_floats(read[view].images).to(device)
                for name in lacks:
                    if recognizer := describers.get(name):
                        with within(f"recognizer {name} of the view {view}", batch):
                            vectors[view, name] = embedding = recognizer.embed(images)
                        own = torch.stack([clean[name][id] for id in filled(batch, batch_size)]).to(embedding)
                        values[view, name] = cosine_similarity(embedding, own)
                        continue
                    scorer = scorers[name]
                    reference = references.get(scorer.view if isinstance(scorer, Against) else ORIGINAL)
                    nothing = torch.full((batch_size,), torch.nan)
                    values[view, name] = nothing if reference is None else scorer(images, reference, face)
                if view == ANONYMIZED:
                    values[view, HEADER_BYTES] = torch.tensor([float(len(header)) for header in read[view].headers])
            # The embeddings go first: a run killed in between scores the batch again and finds both.
            files.write_embeddings(batch, vectors)
            fresh = {name: [id for id in batch if not done.get(name, none)[place[id]]] for name in values}
            files.write_scores(batch, values, fresh)


def unscored(
    files: RunFiles,
    pictures: Mapping[str, RunFiles],
    views: Sequence[str],
    ids: Sequence[str],
    names: Sequence[str],
) -> list[str]:
    """Of the pictures `ids` those that lack a view, or a number of the scorers and recognizers called `names`."""
    done, none = files.scored(ids), np.zeros(len(ids), bool)
    lacking = np.zeros(len(ids), bool)
    for view in views:
        there = set(pictures[view].ids(view))
        lacking |= np.array([id not in there for id in ids], bool)
        for name in names:
            lacking |= ~done.get((view, name), none)
    return [id for id, lacks in zip(ids, lacking, strict=True) if lacks]


def observe(
    files: RunFiles,
    originals: RunFiles,
    ids: Sequence[str],
    observer: Callable[[Sequence[str], Image, Mask], Observed],
    batch_size: int,
    title: str,
) -> None:
    """Keep what `observer` says of the prepared pictures `ids`: it is given a batch's ids, pictures and faces (b 1 h w) at a time.

    Pictures and faces are filled up beyond the ids with copies of the last.
    """
    done = files.measured()
    pending = [id for id in ids if id not in done]

    def begin(
        batch: Sequence[str],
    ) -> tuple[list[Future[tuple[PictureBytes, bytes]]], list[Future[tuple[PictureBytes, bytes]]]]:
        names = filled(batch, batch_size)
        return originals.reading(pool, ORIGINAL, names), originals.reading(pool, MASK, names)

    with ThreadPoolExecutor(IO_WORKERS) as pool:
        for batch, (pictures, masks) in begun_ahead(pending, batch_size, title, begin):
            face = stacked(masks).images[:, :1] > 127
            with within(title, batch):
                found = observer(batch, to_floats(stacked(pictures).images), face)
            files.write_embeddings(batch, found.vectors)
            files.write_scores(batch, found.values)
            # Last: of a batch that was killed in between everything is looked at again.
            files.write_measured(batch)


def loading(
    pool: Executor, load: Callable[[str], Picture | None], ids: Sequence[str]
) -> list[Future[Picture | BadPicture | None]]:
    """Start reading pictures."""

    def attempt(id: str) -> Picture | BadPicture | None:
        try:
            return load(id)
        except BadPicture as bad:
            return bad

    return [pool.submit(attempt, id) for id in ids]


def readable(
    ids: Sequence[str], pictures: Sequence[Future[Picture | BadPicture | None]], skipped: dict[str, str]
) -> tuple[list[str], list[Picture]]:
    """Of pictures that are being read those that can be, and their ids; the others go to `skipped`, but for None."""
    results = [(id, future.result()) for id, future in zip(ids, pictures, strict=True)]
    skipped |= {id: str(got) for id, got in results if isinstance(got, BadPicture)}
    good = [(id, got) for id, got in results if got is not None and not isinstance(got, BadPicture)]
    return [id for id, _ in good], [picture for _, picture in good]


@contextmanager
def costs_kept(
    files: RunFiles, ids: Sequence[str], view: str, batch_size: int, evaluations: Callable[[], int]
) -> Iterator[None]:
    """Keep what the block costs, which makes a view of these pictures, filled up to a batch."""
    time, evaluated = perf_counter(), evaluations()
    yield
    files.write_costs(ids, view, (perf_counter() - time) / batch_size, (evaluations() - evaluated) / batch_size)


def face_pictures(faces: Mask) -> Bytes:
    """Masks as black and white pictures."""
    return (faces.to(torch.uint8) * 255).expand(-1, 3, -1, -1).cpu()
