"""How different two keys make one picture: `python -m experiments.diversity dataset=celebahq_mini_128`

Every picture is anonymized under several keys by every method, and recognizers embed it:

    cosine_between_keys     mean cosine of two anonymizations of one picture, as the authors' notebook has it
    w2_squared              squared 2-Wasserstein distance of these cosines' distribution to that of pairs of strangers, clean
                            pictures paired at random: 0 where two keys make two strangers
    frechet                 Fréchet distance between the embeddings of all anonymized and of all clean pictures; it grows with fewer
                            pictures, so it compares methods on the same ones and nothing else

The mean cosine of each picture goes to results/scores/NAME.scores.parquet, the table is made as any other.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from typing import Any

import hydra
import numpy as np
import pandas as pd
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from numpy.typing import NDArray
from omegaconf import DictConfig

from experiments.harness import preflight, results
from experiments.harness.meaning import Meanings
from experiments.run import shown
from keyanon import runner
from keyanon.batching import batches, filled, padded
from keyanon.channel.keys import experiment_key
from keyanon.channel.pixels import to_floats
from keyanon.measures.biometrics import Statistic, mean_statistic, w2_squared
from keyanon.measures.scorers import frechet_distance
from keyanon.types import COSINE, Anonymizer, Dataset, Recognizer, Summary

Vectors = NDArray[np.float64]  # (keys, pictures, d): unit rows; of NaN where no face was found
SHUFFLES = 20  # of the clean pictures, whose pairs are the strangers

SUMMARIES = {
    "cosine_between_keys": Summary("mean cosine between two keys of one picture", "lower"),
    "w2_squared": Summary("squared 2-Wasserstein distance to pairs of strangers", "lower"),
    "frechet": Summary("Fréchet distance of the embeddings to those of clean pictures", "lower"),
}

log = logging.getLogger(__name__)


def embeddings_of(
    dataset: Dataset,
    ids: Sequence[str],
    methods: Mapping[str, Anonymizer],
    recognizers: Mapping[str, Recognizer],
    keys: int,
    batch_size: int,
) -> tuple[dict[tuple[str, str], Vectors], list[str], dict[str, str]]:
    """Embeddings by method ("clean" for the pictures themselves) and recognizer; the pictures' ids; and why others were skipped."""
    parts: dict[tuple[str, str], list[Vectors]] = {}
    done: list[str] = []
    skipped: dict[str, str] = {}
    for batch in batches(ids, batch_size, "anonymize"):
        good, pictures = runner.load(dataset, batch, skipped)
        if not good:
            continue
        done += good
        images = padded(torch.stack(pictures), batch_size)
        names = filled(good, batch_size)
        views = {"clean": [images]}
        for name, method in methods.items():
            views[name] = [
                to_floats(method.anonymize(images, [experiment_key(seed)] * batch_size, names).images)
                for seed in range(keys)
            ]
        for name, versions in views.items():
            for seen_by, recognizer in recognizers.items():
                vectors = [recognizer.embed(version)[: len(good)].double().cpu().numpy() for version in versions]
                parts.setdefault((name, seen_by), []).append(np.stack(vectors))
    return {cell: np.concatenate(vectors, axis=1) for cell, vectors in parts.items()}, done, skipped


def between_keys(vectors: Vectors) -> Vectors:
    """Cosines (pairs, pictures) of all pairs of keys."""
    return np.stack([(a * b).sum(1) for a, b in combinations(vectors, 2)])


def strangers(clean: Vectors, people: Sequence[str]) -> Vectors:
    """Cosines of clean pictures paired at random, no one with another picture of the same person."""
    generator, who = np.random.default_rng(0), np.asarray(people)
    orders = [generator.permutation(len(who)) for _ in range(SHUFFLES)]
    return np.concatenate([(clean[0] * clean[0][order]).sum(1)[who != who[order]] for order in orders])


def statistics_of(
    vectors: Mapping[tuple[str, str], Vectors], people: Sequence[str]
) -> list[tuple[str, str, Statistic]]:
    """(method, recognizer, statistic), the three measures of each."""
    out = []
    for (method, recognizer), versions in vectors.items():
        if method == "clean":
            continue
        clean, cosines = vectors["clean", recognizer], between_keys(versions)
        pooled = versions.reshape(-1, versions.shape[-1])
        found = {
            "w2_squared": w2_squared(cosines.ravel(), strangers(clean, people)),
            "frechet": frechet_distance(pooled, clean[0]),
        }
        out.append((method, recognizer, mean_statistic(np.nanmean(cosines, axis=0), people, "cosine_between_keys")))
        count, lost = int(np.isfinite(cosines).sum()), int(np.isnan(cosines).sum())
        out += [
            (method, recognizer, Statistic(name, count, lost, value, np.nan, np.nan)) for name, value in found.items()
        ]
    return out


@hydra.main(config_path="../conf", config_name="diversity", version_base="1.3")
def main(cfg: DictConfig) -> None:
    shown(lambda: run(cfg, dict(HydraConfig.get().runtime.choices)), cfg.name)


def run(cfg: DictConfig, choices: Mapping[str, Any]) -> pd.DataFrame:
    """Measure, write the scores and the table; returns the table's cells."""
    if cfg.keys_per_picture < 2:
        raise ValueError(f"keys_per_picture={cfg.keys_per_picture}: it takes two to compare")
    torch.set_num_threads(cfg.threads or torch.get_num_threads())
    methods, recognizers = (instantiate(part, _convert_="all") for part in (cfg.methods, cfg.recognizers))
    problems = preflight.missing_parts(methods, recognizers)
    dataset = preflight.open_dataset(cfg.dataset, choices["dataset"], problems)
    preflight.stop_if(problems)
    assert dataset is not None

    vectors, ids, skipped = embeddings_of(
        dataset, dataset.ids[: cfg.limit], methods, recognizers, cfg.keys_per_picture, cfg.batch_size
    )
    for id, reason in skipped.items():
        log.warning("skipped %s: %s", id, reason)
    if not ids:
        raise ValueError(f"dataset {choices['dataset']}: not one picture could be read; the reasons are above")
    people = [dataset.identity(id) or id for id in ids]
    common = {"dataset": choices["dataset"], "view": runner.ANONYMIZED}
    notes = [
        f"backbone {choices['backbone']}",
        f"{len(ids)} pictures, {cfg.keys_per_picture} published keys each",
        *cfg.notes,
    ]
    statistics = pd.DataFrame(
        [
            {"anonymizer": method, "scorer": recognizer, **asdict(statistic)}
            for method, recognizer, statistic in statistics_of(vectors, people)
        ]
    ).assign(experiment=cfg.name, notes="\n".join(notes), **common)
    scores = pd.DataFrame(
        [
            {"anonymizer": method, "scorer": recognizer, "id": id, "value": value}
            for (method, recognizer), versions in vectors.items()
            if method != "clean"
            for id, value in zip(ids, np.nanmean(between_keys(versions), axis=0), strict=True)
        ]
    ).assign(**common)
    said = Meanings(runner.VIEWS, dict.fromkeys(recognizers, COSINE), SUMMARIES)
    results.commit(cfg.name, statistics[results.STATISTICS], scores[results.SCORES], said)
    return results.build(cfg.name)


if __name__ == "__main__":
    main()
