"""How different two keys make one picture: `python -m experiments.diversity dataset=celebahq_mini_128`

Every picture is anonymized under several keys by every method, and recognizers embed it:

    cosine_between_keys     mean cosine of two anonymizations of one picture, as the authors' notebook has it
    w2_squared              squared 2-Wasserstein distance of these cosines' distribution to that of pairs of strangers, clean
                            pictures paired at random: 0 where two keys make two strangers
    frechet                 Fréchet distance between the embeddings of all anonymized and of all clean pictures; it grows with fewer
                            pictures, so it compares methods on the same ones and nothing else

A row of the table is a method. The mean cosine of each picture goes to results/runs/NAME/scores/NAME.scores.parquet.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.compute as pc
from omegaconf import DictConfig

from experiments.harness.command import experiment, start
from experiments.harness.made import made
from experiments.harness.meaning import Meanings
from experiments.harness.names import row_label
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
from experiments.harness.statistics import rows_of, vectors
from keyanon import runner
from keyanon.batching import filled
from keyanon.channel.keys import experiment_key
from keyanon.channel.pixels import to_floats
from keyanon.measures.biometrics import Floats, Statistic, mean_statistic, unit, w2_squared
from keyanon.measures.scorers import frechet_distance
from keyanon.run_folder import ANONYMIZED
from keyanon.types import COSINE, Anonymizer, Embeddings, Image, Mask, Observed, Recognizer, Summary

Vectors = Floats  # (keys, pictures, d): unit rows; of NaN where no face was found
SUMMARIES = {
    "cosine_between_keys": Summary("mean cosine between two keys of one picture", "lower"),
    "w2_squared": Summary("squared 2-Wasserstein distance to pairs of strangers", "lower"),
    "frechet": Summary("Fréchet distance of the embeddings to those of clean pictures", "lower"),
}
SHUFFLES = 20  # of the clean pictures, whose pairs are the strangers


def embeddings_under_keys(
    method: Anonymizer, recognizers: Mapping[str, Recognizer], keys: int
) -> Callable[[Sequence[str], Image, Mask], Observed]:
    """Anonymizes each picture under so many published keys, and takes down the embeddings: views "0", "1", ..."""

    def observe(ids: Sequence[str], images: Image, _: Mask) -> Observed:
        names, size = filled(ids, len(images)), len(images)
        found: dict[tuple[str, str], Embeddings] = {}
        for seed in range(keys):
            published = to_floats(method.anonymize(images, [experiment_key(seed)] * size, names).images)
            found |= {(str(seed), name): recognizer.embed(published) for name, recognizer in recognizers.items()}
        return Observed(vectors=found)

    return observe


def between_keys(vectors: Vectors) -> Vectors:
    """Cosines (pairs, pictures) of all pairs of keys."""
    return np.stack([(a * b).sum(1) for a, b in combinations(vectors, 2)])


def strangers(clean: Floats, people: Sequence[str]) -> Vectors:
    """Cosines of clean pictures (n d) paired at random, no one with another picture of the same person."""
    generator, who = np.random.default_rng(0), np.asarray(people)
    orders = [generator.permutation(len(who)) for _ in range(SHUFFLES)]
    return np.concatenate([(clean * clean[order]).sum(1)[who != who[order]] for order in orders])


def statistics_of(versions: Vectors, clean: Floats, people: Sequence[str]) -> list[Statistic]:
    """The three measures of pictures under several keys, beside the clean ones (n d)."""
    cosines = between_keys(versions)
    pooled = versions.reshape(-1, versions.shape[-1])
    found = {
        "w2_squared": w2_squared(cosines.ravel(), strangers(clean, people)),
        "frechet": frechet_distance(pooled, clean),
    }
    count, lost = int(np.isfinite(cosines).sum()), int(np.isnan(cosines).sum())
    return [
        mean_statistic(np.nanmean(cosines, axis=0), people, "cosine_between_keys"),
        *(Statistic(name, count, lost, value, np.nan, np.nan) for name, value in found.items()),
    ]


@experiment("diversity", "recognizers")
def main(cfg: DictConfig) -> int:
    return start(cfg, run)


def run(cfg: DictConfig, choices: Mapping[str, Any], swept: Sequence[str] = (), command: Sequence[str] = ()) -> Path:
    """Measure every method, write the scores and the table; the folder of the rows."""
    methods: dict[str, Anonymizer] = {name: part for name, part in made(cfg, "methods").items() if part is not None}
    session = begin(cfg, choices, command, methods)
    cells = [row(session, name, method, swept) for name, method in methods.items()]
    written = [fill_row(session, cell, method) for cell, method in zip(cells, methods.values(), strict=True)]
    if all(written):
        show(session, cells)
    return Path(cfg.runs) / str(cfg.name)


def row(session: Session, name: str, method: Anonymizer, swept: Sequence[str]) -> Cell:
    cfg, choices = session.cfg, session.choices
    notes = stand_in_notes(cfg.backbone) + model_notes(
        cfg.methods[name].get("backbone"), choices["backbone"], choices["parser"]
    )
    notes += [f"{cfg.keys_per_picture} published keys for each picture", *map(str, cfg.notes)]
    settings = {"method": plain(cfg.methods[name]), "keys": cfg.keys_per_picture, "recognizers": session.made_by}
    return session.cell(row_label(name, swept), settings, notes, method)


def fill_row(session: Session, cell: Cell, method: Anonymizer) -> bool:
    cfg, keys = session.cfg, session.cfg.keys_per_picture

    def work(ids: Sequence[str]) -> None:
        session.enrol(ids)
        measures = embeddings_under_keys(method, session.recognizers, keys)
        runner.observe(cell.files, session.originals, ids, measures, cfg.batch_size, f"{cell.row}: {keys} keys")

    def conclude(ids: Sequence[str]) -> Result:
        statistics: list[tuple[str, str, Statistic]] = []
        scores = [pd.DataFrame(columns=["id", "view", "scorer", "value"])] if not session.recognizers else []
        if lost := set(ids) - cell.files.measured():
            raise Incomplete(sorted(lost))
        for name, enrolled in session.enrol(ids).items():
            clean, rows = (rows_of(ids, files.embeddings(name)) for files in (enrolled, cell.files))
            order = clean["id"].to_pylist()
            seen = [rows.filter(pc.equal(rows["view"], str(seed))) for seed in range(keys)]
            versions = np.stack([unit(vectors(one)) for one in seen])
            found = statistics_of(versions, unit(vectors(clean)), session.people(order))
            statistics += [(ANONYMIZED, name, statistic) for statistic in found]
            means = np.nanmean(between_keys(versions), axis=0)
            scores.append(pd.DataFrame({"id": order, "view": ANONYMIZED, "scorer": name, "value": means}))
        said = Meanings(runner.VIEWS, dict.fromkeys(session.recognizers, COSINE), SUMMARIES)
        return Result(statistics, pd.concat(scores, ignore_index=True), said)

    return fill(session, cell, work, conclude, passes=keys)


if __name__ == "__main__":
    main()
