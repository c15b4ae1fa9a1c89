"""Run one cell of a table, or with -m / an experiment file many: `python -m experiments.run dataset=celebahq`.

Preflight, then make every view, then score it, then average, then write the table. Any number of shards may do so in one
folder at once: each makes and scores its own pictures, and the last to end averages over all.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from experiments.harness.command import experiment, start
from experiments.harness.errors import FacesInClear

log = logging.getLogger(__name__)

MEASURES = ("attacks", "recognizers", "scorers")
KNOWN_KEY = "take key=file key.path=PATH, and make the file with: python -m experiments.keys new PATH"
SHEET_ROWS = 8
SHOWN_IN_CLEAR = 10
SHEET_VIEWS = ("original", "mask", "anonymized", "recovered", "wrong_key")


@experiment("config", "attacks", "recognizers", "scorers")
def main(cfg: DictConfig) -> int:
    return start(cfg, run)


def run(cfg: DictConfig, choices: Mapping[str, Any], swept: Sequence[str] = (), command: Sequence[str] = ()) -> Path:
    """One cell, or one shard of it: the run folder, with the table written if no other shard is still to do that.

    `swept` is what tells the cell from others of its sweep: it is in its name. `command` would run this cell alone.
    """
    # Here, so that `--help` and a wrong argument are answered at once.
    import pandas as pd

    from experiments.harness.made import made
    from experiments.harness.meaning import Meanings, meanings
    from experiments.harness.names import row_label
    from experiments.harness.provenance import made_of, signature
    from experiments.harness.session import Result, begin, fill, plain, show
    from experiments.harness.shards import Incomplete, sharded
    from experiments.harness.statistics import (
        Threshold,
        as_listed,
        averages,
        between_sets,
        scores_of_enrolled,
        told_apart,
        verification,
    )
    from keyanon import runner
    from keyanon.attacks.views import by_view
    from keyanon.channel.keys import experiment_key
    from keyanon.measures import clear
    from keyanon.measures.scorers import Against
    from keyanon.run_folder import ANONYMIZED, MASK, ORIGINAL, RECOVERED
    from keyanon.types import probes_of

    key, method, second = (made(cfg, group) for group in ("key", "anonymizer", "second_detector"))
    separability = made(cfg, "separability")
    attacks = by_view(made(cfg, "attacks"))
    threshold: Threshold = made(cfg, "threshold")
    # by what it is: a file may hold it, too
    known = KNOWN_KEY if key == experiment_key(cfg.key.get("seed", 0)) and method.about.kind == "keyed" else None
    session = begin(cfg, choices, command, method, second, known_key=known)
    gallery, probes = session.dataset.gallery, probes_of(session.dataset)
    compared = list(dict.fromkeys([*gallery, *probes] if gallery and threshold.calibration == "all" else gallery))
    settings = {"anonymizer": plain(cfg.anonymizer), "key": key.fingerprint}
    measures = {group: plain(cfg[group]) for group in MEASURES}
    row = row_label(choices["anonymizer"], swept)
    made_by = {view: signature(made_of(settings_of(attack), attack)) for view, attack in attacks.items()}
    search = session.made_of({"second_detector": plain(cfg.second_detector)}, second, clear.in_clear)
    made_by |= dict.fromkeys((runner.FACES, runner.IN_CLEAR), signature(search))
    cell = session.cell(row, settings, notes_of(cfg, choices), method, measures, made_by=made_by)
    in_clear: dict[str, int] = {}

    def work(ids: Sequence[str]) -> None:
        files = cell.files
        runner.generate(files, session.originals, ids, method, key, attacks, cfg.batch_size, cell.evaluations)
        in_clear.update(
            runner.check_faces(files, session.originals, ids, session.finder, second, cfg.batch_size, cfg.device)
        )
        enrolled = session.enrol(ids, sharded(compared, cfg.shard))
        session.score_originals(ids)
        views = files.views()
        pictures = {ORIGINAL: session.originals, MASK: session.originals} | dict.fromkeys(views, files)
        runner.score(
            files,
            pictures,
            views,
            ids,
            session.scorers,
            session.recognizers,
            enrolled,
            cfg.batch_size,
            cfg.device,
            session.finder,
        )
        loops = {name: scorer for name, scorer in session.scorers.items() if isinstance(scorer, Against)}
        runner.score(files, pictures, [ORIGINAL], ids, loops, {}, {}, cfg.batch_size, cfg.device)
        session.look_at_originals(ids)
        session.look_at_views(cell, ids)

    def conclude(ids: Sequence[str]) -> Result:
        files = cell.files
        names = [*session.scorers, *session.recognizers]
        pictures = dict.fromkeys(views := files.views(), files)
        lacking = runner.unscored(files, pictures, views, ids, names)
        if lacking := lacking or runner.unscored(files, pictures, [ANONYMIZED], ids, [runner.IN_CLEAR]):
            raise Incomplete(lacking)
        for view in views:
            files.check(view, ids, session.digests)
        enrolled = session.enrol(ids, compared)
        session.score_originals(ids)
        clean, seen = session.look_at_originals(ids), session.look_at_views(cell, ids)
        own, made = (at.scores(ids).to_pandas() for at in (session.originals, files))
        scores = pd.concat([own, scores_of_enrolled(enrolled, ids), made], ignore_index=True)
        scores = scores.sort_values(["view", "scorer", "id"], ignore_index=True)
        listed = session.listed(ids)
        statistics = [
            *averages(as_listed(scores, listed), session.people),
            *verification(files, enrolled, gallery, listed, probes, session.people, threshold),
            *between_sets(session.set_scorers, clean, seen, listed),
            *(told_apart(separability, files, enrolled, ids) if separability else ()),
        ]
        search = runner.MEASURES[runner.IN_CLEAR]
        searched = replace(search, label=f"{search.label} (second_detector: {second!r})")
        said = meanings({**session.scorers, **session.set_scorers}, session.recognizers, attacks, method, cfg.far)
        said |= Meanings(scorers={runner.IN_CLEAR: searched}, statistics=separability.summaries if separability else {})
        return Result(statistics, scores, said, draw_sheets(session.originals, files, ids))

    views = [ANONYMIZED, RECOVERED, *attacks]
    if fill(session, cell, work, conclude, views, passes=len(views)):
        show(session, [cell])
    if in_clear:
        message = in_clear_message(cell, in_clear)
        if not (method.about.publishes_faces or cfg.allow_faces_in_clear):
            raise FacesInClear(message)
        log.warning(message)
    return cell.folder


def in_clear_message(cell: Any, in_clear: Mapping[str, int]) -> str:
    """Which pictures show faces in clear, and what to do."""
    shown = ", ".join(f"{id} ({count})" for id, count in list(in_clear.items())[:SHOWN_IN_CLEAR])
    more = f" and {len(in_clear) - SHOWN_IN_CLEAR} more" if len(in_clear) > SHOWN_IN_CLEAR else ""
    return (
        f"{sum(in_clear.values())} faces are in clear on {len(in_clear)} published pictures: {shown}{more}. All are counted as "
        f"faces_in_clear in {cell.folder / 'scores.parquet'}. Do not publish these pictures; take a parser or method that treats "
        "every face, or set allow_faces_in_clear=true"
    )


def notes_of(cfg: DictConfig, choices: Mapping[str, Any]) -> list[str]:
    """What a reader of the table must know: stand-ins and reduced settings."""
    from experiments.harness.session import model_notes

    backbone = cfg.anonymizer.get("backbone")
    name = choices["backbone"] if backbone == cfg.backbone else backbone and backbone.source
    notes = [*map(str, cfg.notes), *model_notes(backbone, name, choices["parser"])]
    if choices["key"] == "experiment":
        notes.append("published experiment key")
    if choices["nonce"] != "per_image" and "nonces" in cfg.anonymizer:
        notes.append(f"key streams shared: nonce={choices['nonce']}")
    return notes


def draw_sheets(originals: Any, files: Any, ids: Sequence[str]) -> dict[str, Path]:
    """The first pictures side by side: "all" views that show what the method does, and the "anonymized" one alone.

    Nothing where there is no picture.
    """
    from experiments.harness.plots import contact_sheet
    from keyanon.run_folder import ANONYMIZED

    shown = [id for id in ids if files.has(ANONYMIZED, id)][:SHEET_ROWS]
    places = {view: originals if view in ("original", "mask") else files for view in SHEET_VIEWS}
    there = {view: at for view, at in places.items() if shown and all(at.has(view, id) for id in shown)}
    if ANONYMIZED not in there:
        return {}
    sheets = {"all": files.folder / "contact_sheet.png", "anonymized": files.folder / "anonymized_sheet.png"}
    columns = {view: list(at.read_all(view, shown)) for view, at in there.items()}
    contact_sheet(columns, sheets["all"])
    contact_sheet({ANONYMIZED: columns[ANONYMIZED]}, sheets["anonymized"], public=True)
    return sheets


def settings_of(attack: Any) -> dict[str, str]:
    """What an attack is and does: a function with its arguments, or an object with its fields."""
    what, settings = (attack.func, attack.keywords) if isinstance(attack, partial) else (type(attack), vars(attack))
    return {"what": f"{what.__module__}.{what.__qualname__}", **{name: repr(value) for name, value in settings.items()}}


if __name__ == "__main__":
    main()
