"""Is the inverted noise z_T Gaussian? `python -m experiments.gaussianity dataset=celebahq_mini_128`

The sampler makes faces of noise from N(0, I), a law that flipped signs leave as it is; of other noise neither is sure. So every
picture's z_T, over the whole latent and inside the face mask, where the key acts, is compared with N(0, I):

    ks_d                    largest gap between the distribution functions of its entries and of N(0, 1) (Kolmogorov, Smirnov)
    ks_passed               1 where that gap does not reject N(0, 1) at 5 %; severe, as a latent has thousands of entries
    mmd2                    squared maximum mean discrepancy between its 2 x 2 patches and as many of normal noise
    mean, variance, skewness, excess_kurtosis     of its entries; 0, 1, 0, 0 for N(0, 1)
    neighbour_correlation   of vertically and horizontally adjacent entries of a channel, averaged over channels
    round_trip              |sample(z_T) - z_0| / |z_0|: how far this inversion is from undoing the sampler

Normal noise in the place of z_T is the control. Per-picture values go to results/scores/NAME.scores.parquet, and the table is
made from them as any other.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import hydra
import numpy as np
import pandas as pd
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig

from experiments.harness import preflight, results
from experiments.harness.meaning import Meanings
from experiments.harness.statistics import averages
from experiments.run import shown
from keyanon import runner
from keyanon.batching import batches, padded
from keyanon.diffusion.model import LatentDiffusion
from keyanon.diffusion.solvers import Solver
from keyanon.measures.biometrics import AVERAGES
from keyanon.measures.gaussianity import MEASURES, PATCH, generator_of, measure
from keyanon.types import Dataset, FaceParser, Measure, View

CONTROL = "standard normal"
WHOLE, FACE = "noise", "noise in the face"
VIEWS = dict.fromkeys((WHOLE, FACE), View("noise"))
ROUND_TRIP = {"round_trip": Measure("noise", "", "lower", "|sample(z_T) - z_0| / |z_0|")}

log = logging.getLogger(__name__)


def measured(
    dataset: Dataset,
    ids: Sequence[str],
    backbone: LatentDiffusion,
    parser: FaceParser,
    solvers: Mapping[str, Solver],
    batch_size: int,
) -> tuple[pd.DataFrame, dict[str, str]]:
    """MEASURES of every picture for each solver, by its row's name, and CONTROL; and why pictures were skipped, by id.

    The columns are row, id, view, scorer, value.
    """
    rows: list[dict[str, Any]] = []
    skipped: dict[str, str] = {}
    for batch in batches(ids, batch_size, "invert"):
        good, pictures = runner.load(dataset, batch, skipped)
        if not good:
            continue
        images = padded(torch.stack(pictures), batch_size)  # one shape for all batches; zip cuts the copies off below
        faces = parser.mask(images, backbone.latent_size(images))[:, 0].cpu().numpy()
        z0 = backbone.encode(images)
        noise = {CONTROL: np.stack([generator_of(id, "control").standard_normal(z0.shape[1:]) for id in good])}
        for name, solver in solvers.items():
            zT = solver.invert(backbone.eps, backbone.schedule, z0)[-1]
            error = (solver.sample(backbone.eps, backbone.schedule, zT) - z0).flatten(1).norm(dim=1)
            round_trip = (error / z0.flatten(1).norm(dim=1)).tolist()
            rows += [
                {"row": name, "id": id, "view": WHOLE, "scorer": "round_trip", "value": value}
                for id, value in zip(good, round_trip, strict=False)
            ]
            noise[name] = zT.double().cpu().numpy()
        for name, latents in noise.items():
            for id, z, face in zip(good, latents, faces, strict=False):
                for view, inside in ((WHOLE, np.ones_like(face)), (FACE, face)):
                    found = measure(z, inside, generator_of(id, view))
                    rows += [
                        {"row": name, "id": id, "view": view, "scorer": scorer, "value": value}
                        for scorer, value in found.items()
                    ]
    return pd.DataFrame(rows, columns=["row", "id", "view", "scorer", "value"]), skipped


@hydra.main(config_path="../conf", config_name="gaussianity", version_base="1.3")
def main(cfg: DictConfig) -> None:
    shown(lambda: run(cfg, dict(HydraConfig.get().runtime.choices)), cfg.name)


def run(cfg: DictConfig, choices: Mapping[str, Any]) -> pd.DataFrame:
    """Measure, write the scores and the table; returns the table's cells."""
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    backbone: LatentDiffusion = instantiate(cfg.backbone, _convert_="all")
    parser: FaceParser = instantiate(cfg.parser)
    solvers: dict[str, Solver] = {
        # the number right-aligned, since a table sorts its rows as text
        f"{name} inversion, {steps:3} steps": instantiate(cfg.solver, steps=steps, tolerance=inversion.tolerance)
        for name, inversion in cfg.inversions.items()
        for steps in inversion.steps
    }
    problems = preflight.missing_parts(backbone, parser)
    dataset = preflight.open_dataset(cfg.dataset, choices["dataset"], problems)
    preflight.stop_if(problems)
    assert dataset is not None
    ids = dataset.ids[: cfg.limit]

    values, skipped = measured(dataset, ids, backbone, parser, solvers, cfg.batch_size)
    for id, reason in skipped.items():
        log.warning("skipped %s: %s", id, reason)
    if values.empty:
        raise ValueError(f"dataset {choices['dataset']}: not one picture could be read; the reasons are above")
    scores = values.rename(columns={"row": "anonymizer"}).assign(dataset=choices["dataset"])[results.SCORES]
    notes = [f"backbone {choices['backbone']}", f"mask from {choices['parser']}", f"{scores.id.nunique()} pictures"]
    notes.append(f"mmd2 of {PATCH} x {PATCH} patches")
    if backbone.source.startswith("bundled:"):
        notes.insert(0, "bundled model, which stands in for LDM-FFHQ")
    if backbone.precision != "fp32":
        notes.append(f"network in {backbone.precision}")
    title = "\n".join([*map(str, cfg.notes), *notes])
    statistics = pd.DataFrame(
        [
            {"anonymizer": row, "view": view, "scorer": scorer, **asdict(statistic)}
            for row, part in scores.groupby("anonymizer")
            for view, scorer, statistic in averages(part, dataset)
        ]
    ).assign(experiment=cfg.name, dataset=choices["dataset"], notes=title)[results.STATISTICS]

    results.commit(cfg.name, statistics, scores, Meanings(VIEWS, {**MEASURES, **ROUND_TRIP}, AVERAGES))
    return results.build(cfg.name)


if __name__ == "__main__":
    main()
