"""What do attackers learn from published files? `python -m experiments.security dataset=lfw_gray_128`

The paper's method and the exact one, side by side, under the attackers of keyanon/attacks/attackers.py. Published files, what each
attacker knows, and what it took down of each picture are kept in a run folder for each method. Per-picture values go to
scores/NAME.scores.parquet below results/runs/NAME, scores of pairs to scores/NAME.pairs.parquet (experiments/pairs.py makes their
numbers again), the shares of right signs to plots/ there, and the table is made as any other.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from omegaconf import DictConfig
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save
from tabulate import tabulate

from experiments.harness import layout, provenance, results
from experiments.harness.command import experiment, start
from experiments.harness.made import made
from experiments.harness.meaning import Meanings
from experiments.harness.names import row_label
from experiments.harness.plots import share_curve
from experiments.harness.session import (
    Cell,
    Result,
    Session,
    begin,
    fill,
    model_notes,
    plain,
    show,
    stand_in_notes,
)
from experiments.harness.shards import Incomplete
from experiments.harness.statistics import read_frame
from keyanon import runner
from keyanon.attacks.attackers import VIEWS, published_key, summaries
from keyanon.attacks.case import Attacker, Case, Files, Found, Knowledge, Learns, Pairs, People, Taken, Victims, publish
from keyanon.attacks.pairs import compared_cosines, statistics_of_pairs
from keyanon.batching import batches, filled
from keyanon.channel.keys import experiment_key
from keyanon.channel.pixels import png_bytes, to_floats
from keyanon.channel.whole import write_whole
from keyanon.errors import BadSetting
from keyanon.measures.biometrics import Floats, cosine, threshold_at_far, unit
from keyanon.parts import Damaged
from keyanon.run_folder import ORIGINAL, RunFiles
from keyanon.settings import refuse
from keyanon.types import COSINE, Bytes, Image, Key, KeyedNoise, Mask, Observed, View

log = logging.getLogger(__name__)

KNOWN_KEY = "its files are for this experiment alone, give them to nobody"
TENSORS = ".safetensors"
DICTIONARY = "Argon2id"  # the row of what a password costs, which is no method's


@experiment("security", "recognizers")
def main(cfg: DictConfig) -> int:
    return start(cfg, run)


def run(cfg: DictConfig, choices: Mapping[str, Any], swept: Sequence[str] = (), command: Sequence[str] = ()) -> Path:
    """Publish, attack, write the scores and the table; the folder of the rows."""
    methods, attackers = made(cfg, "methods"), made(cfg, "security")
    dictionary = attackers.pop("password_dictionary", None)  # of passwords, whatever the method: a row of its own
    refuse("methods", methods, dict[str, KeyedNoise])
    refuse("security", attackers, dict[str, Attacker])
    session = begin(cfg, choices, command, methods, known_key=KNOWN_KEY)
    skipped = session.prepare(session.ids)
    ids = [id for id in session.ids if id not in skipped]
    people = people_of(session, ids)
    notes, place = notes_of(session, people), Path(cfg.runs, str(cfg.name))
    cells: list[Cell] = []
    written: list[bool] = []
    for name, method in methods.items():
        settings = {"attackers": plain(cfg.security), "far": cfg.far}
        cells.append(
            session.cell(row_label(name, swept), {"method": plain(cfg.methods[name])}, notes, method, settings, ids)
        )
        written.append(attacked(session, cells[-1], method, attackers, people))
    if dictionary is not None:
        cells.append(
            session.cell(
                row_label(DICTIONARY, swept), {"dictionary": plain(cfg.security.password_dictionary)}, notes, ids=[]
            )
        )
        written.append(fill(session, cells[-1], lambda _: None, lambda _: result(session, list(dictionary()))))
    if all(written):
        beside = methods_beside(cfg.name, [cell.row for cell in cells], place)
        write_whole(place / "tables" / f"{cfg.name}.beside.md", beside.encode(), public=True)
        statistics = read_frame(place / "scores" / f"{cfg.name}.parquet", results.STATISTICS)
        share_curve(statistics, "right signs ", place / "plots" / f"{cfg.name}.svg")
        show(session, cells)
    return place


def notes_of(session: Session, people: People) -> list[str]:
    """What a reader of the table must know."""
    cfg, choices = session.cfg, session.choices
    thresholds = ", ".join(f"{name} {value:.4f}" for name, value in people.thresholds.items())
    notes = [
        *map(str, cfg.notes),
        *stand_in_notes(cfg.backbone),
        *model_notes(cfg.backbone, choices["backbone"], choices["parser"]),
    ]
    notes += [f"{len(people.ids)} pictures", f"{cfg.files} files each", f"thresholds at FAR {cfg.far:g}: {thresholds}"]
    return notes if people.enrolled else [*notes, "suspects are the photographs themselves"]


def people_of(session: Session, ids: Sequence[str]) -> People:
    """Who is on prepared pictures, as recognizers see them; BadSetting where there are not two people to tell apart."""
    names, gallery_ids = session.people(ids), list(session.dataset.gallery)
    if len(set(names)) < 2:
        raise BadSetting(f"{len(set(names))} person on {len(ids)} readable pictures; linkage and strangers need two")
    embeddings = {
        name: enrolled.vectors([*ids, *gallery_ids]) for name, enrolled in session.enrol(ids, gallery_ids).items()
    }
    clean = {name: stacked(seen, ids) for name, seen in embeddings.items()}
    if not gallery_ids:
        thresholds = {name: float(session.cfg.thresholds[name]) for name in clean}
        return People(ids, names, clean, clean, clean, names, thresholds, enrolled=False)
    portraits = [id for id in gallery_ids if all(id in seen for seen in embeddings.values())]
    gallery, gallery_names = (
        {name: stacked(seen, portraits) for name, seen in embeddings.items()},
        session.people(portraits),
    )
    strange = np.not_equal.outer(names, gallery_names)
    thresholds = {
        name: threshold_at_far(cosine(clean[name], gallery[name])[strange], session.cfg.far) for name in clean
    }
    places = [gallery_names.index(name) for name in names]
    suspects = {name: rows[places] for name, rows in gallery.items()}
    return People(ids, names, clean, suspects, gallery, gallery_names, thresholds, enrolled=True)


def stacked(vectors: Mapping[str, torch.Tensor], ids: Sequence[str]) -> Floats:
    """Unit rows (n d) of pictures."""
    return unit(torch.stack([vectors[id] for id in ids]).double().numpy())


def attacked(
    session: Session, cell: Cell, method: KeyedNoise, attackers: Mapping[str, Attacker], people: People
) -> bool:
    """Publish a method's files, let attackers look at this shard's, and conclude once all shards have; whether it was written."""
    files = PublishedFiles(session, cell.files, method, keys(session.cfg.files))
    case = Case(method, session.recognizers, people, files.victims, files.public, files.photographs, session.cfg.far)
    notes = {
        name: RunFiles(cell.folder / f"{name}-{notes_signature(session, name, attacker, people)}", cell.contents)
        for name, attacker in attackers.items()
    }

    def work(ids: Sequence[str]) -> None:
        files.publish(ids)
        for name, attacker in attackers.items():
            chosen = set(attacker.chosen(case))
            done = notes[name].measured()  # here: an attacker may train for minutes before it looks at a picture
            mine = [id for id in ids if id in chosen and id not in done]
            if not mine:
                continue
            knowledge = knowledge_of(notes[name].folder, attacker, case)
            attack = attacker.attack(case, knowledge)

            def observed(batch: Sequence[str], images: Image, _: Mask, attack: Any = attack) -> Observed:
                found: Observed = attack(files.read(filled(batch, len(images)), images))
                return found

            runner.observe(
                notes[name], session.originals, mine, observed, session.cfg.batch_size, f"{cell.row}: {name}"
            )

    def conclude(ids: Sequence[str]) -> Result | None:
        made: list[Found | Pairs] = []
        if len(set(people.of(ids).names)) < 2:  # of the shards that are done
            log.warning("%s: fewer than two people so far; nothing to conclude yet", cell.row)
            return None
        for name, attacker in attackers.items():
            wanted, done = set(attacker.chosen(case)), set(ids)
            chosen = [id for id in people.ids if id in wanted and id in done]
            if lost := set(chosen) - notes[name].measured():
                raise Incomplete(sorted(lost))
            if chosen:
                made += attacker.conclude(case, taken_from(notes[name], chosen))
        found = [one for one in made if isinstance(one, Found)]
        pairs = [*(one for one in made if isinstance(one, Pairs)), *compared_cosines(case, found)]
        return result(session, [*found, *statistics_of_pairs(pairs)], pairs)

    return fill(session, cell, work, conclude)


def notes_signature(session: Session, name: str, attacker: Attacker, people: People) -> str:
    """A signature of what an attacker's notes depend on, besides the method's files; one that learns needs to know all pictures."""
    question = provenance.made_of(plain(session.cfg.security[name]), attacker) | {"recognizers": session.made_by}
    if isinstance(attacker, Learns):
        question["pictures"] = {id: session.contents[id] for id in people.ids}
    return provenance.signature(question)


def knowledge_of(folder: Path, attacker: Attacker, case: Case) -> Knowledge:
    """What an attacker has learned, in this run, in one before, or in another shard."""
    path = folder / "knowledge.safetensors"
    if not isinstance(attacker, Learns):
        return {}
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, save({name: tensor.contiguous() for name, tensor in attacker.learn(case).items()}))
    try:
        return load_file(path)
    except (OSError, SafetensorError):
        raise Damaged(path) from None


def taken_from(notes: RunFiles, ids: Sequence[str]) -> Taken:
    """What was taken down of pictures."""
    scores = notes.scores(ids).to_pandas().set_index(["view", "scorer", "id"])["value"]

    def values(view: str, scorer: str) -> Floats:
        found: Floats = scores[view, scorer].reindex(ids).to_numpy(np.float64)
        return found

    def vectors(view: str, scorer: str) -> Floats:
        rows = notes.embeddings(scorer, view)
        of = dict(zip(rows["id"].to_pylist(), rows["embedding"], strict=True))
        return np.array([of[id].values.to_numpy() for id in ids if id in of], np.float64)

    return Taken(ids, values, vectors)


def result(session: Session, found: Sequence[Found], pairs: Sequence[Pairs] = ()) -> Result:
    scores = pd.DataFrame(
        [(id, one.view, one.scorer, value) for one in found for id, value in one.values.items()],
        columns=["id", "view", "scorer", "value"],
    )
    said = Meanings(
        {one.view: VIEWS.get(one.view, View("attacked")) for one in found},
        {one.scorer: COSINE if one.scorer in session.recognizers else one.measure for one in found},
        summaries(session.cfg.far),
    )
    return Result([(one.view, one.scorer, one.statistic) for one in found], scores, said, pairs=pairs)


def keys(count: int) -> list[Key]:
    """Published keys: the first comes from a password, the others are as random."""
    return [published_key(), *(experiment_key(i) for i in range(1, count))]


@dataclass(frozen=True)
class PublishedFiles:
    """The files of prepared pictures under each key, kept in a folder with what anyone computes from them."""

    session: Session
    files: RunFiles
    method: KeyedNoise
    keys: Sequence[Key]

    def publish(self, ids: Sequence[str]) -> None:
        """Publish those of the pictures that are not published yet."""

        def published(id: str) -> bool:
            places = range(len(self.keys))
            return all(self.files.has(f"file{i}", id) and self.files.has(f"noise{i}", id, TENSORS) for i in places)

        size = self.session.cfg.batch_size
        for batch in batches([id for id in ids if not published(id)], size, "publish"):
            images = to_floats(self.session.originals.read_all(ORIGINAL, filled(batch, size)))
            for i, key in enumerate(self.keys):
                made = publish(self.method, images, [key] * size, filled(batch, size))
                for row, id in enumerate(batch):
                    kept = {"zT": made.zT[row].cpu(), "mask": made.mask[row].cpu()}
                    noise = save({name: part.contiguous() for name, part in kept.items()})
                    self.files.write(f"noise{i}", id, noise, TENSORS)
                    self.files.write(f"file{i}", id, png_bytes(made.published.images[row], made.headers[row]))
            self.files.keep_files()

    def read(self, ids: Sequence[str], pictures: Image) -> Victims:
        """The files of pictures that are published."""
        made = []
        for i, key in enumerate(self.keys):
            published = self.files.read(f"file{i}", ids)
            kept = [load(self.files.data(f"noise{i}", id, TENSORS)) for id in ids]
            zT, mask = (torch.stack([one[name] for one in kept]).to(self.session.cfg.device) for name in ("zT", "mask"))
            made.append(Files(published, [key] * len(ids), self.method.encoded_pictures(published), zT, mask))
        return Victims(ids, pictures, made)

    def victims(self, ids: Sequence[str]) -> Iterator[Victims]:
        """Pictures, whichever shard they belong to, a batch at a time."""
        self.publish(ids)
        size = self.session.cfg.batch_size
        for first in range(0, len(ids), size):
            batch = list(ids[first : first + size])
            yield self.read(batch, to_floats(self.session.originals.read_all(ORIGINAL, batch)))

    def public(self, count: int) -> list[str]:
        """The ids of so many pictures of people who are not under attack, from the rest of the dataset."""
        session = self.session
        victims = set(session.people(session.ids))
        rest = [id for id in session.dataset.ids[len(session.ids) :] if session.people([id])[0] not in victims]
        found: list[str] = []
        while len(found) < count and rest:
            asked, rest = rest[: count - len(found)], rest[count - len(found) :]
            skipped = session.prepare(asked)
            found += [id for id in asked if id not in skipped]
        return found

    def photographs(self, ids: Sequence[str]) -> Bytes:
        """Prepared originals."""
        return self.session.originals.read_all(ORIGINAL, ids)


def methods_beside(experiment: str, methods: Sequence[str], place: Path) -> str:
    """A table's cells in Markdown, a column for each method, `methods` first: value, interval, number of pictures or pairs."""
    rows = results.build(experiment, (), place, results.PAPER)
    several = rows.dataset.nunique() > 1

    def column_of(row: Any) -> str:
        return f"{row.dataset} {row.anonymizer}" if several else str(row.anonymizer)

    order = [*methods, *rows.anonymizer]
    columns = dict.fromkeys(
        column_of(row) for row in sorted(rows.itertuples(), key=lambda row: order.index(row.anonymizer))
    )
    lines: dict[tuple[str, str, str], dict[str, str]] = {}
    every: list[Any] = list(rows.itertuples())
    for row in every:
        line = lines.setdefault((row.view, row.scorer, row.statistic), dict.fromkeys(columns, ""))
        line[column_of(row)] = f"{layout.ours_text(row, np.nan)}; {row.n}"
    body = [[layout.celled(text) for text in (*cell, *line.values())] for cell, line in lines.items()]
    table = tabulate(
        body, ["attack", "by", "statistic", *map(layout.celled, columns)], tablefmt="pipe", disable_numparse=True
    )
    about = "Each cell: value [95 % interval]; n. keyanon/attacks/attackers.py says what each attacker knows and does."
    return f"# {experiment}: methods side by side\n\n{about}\n\n{table}\n"


if __name__ == "__main__":
    main()
