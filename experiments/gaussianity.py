"""Is the inverted noise z_T Gaussian? `python -m experiments.gaussianity dataset=celebahq_mini_128`

The sampler makes faces of noise from N(0, I), a law that flipped signs leave as it is; of other noise neither is sure. So every
picture's z_T, over the whole latent and inside the face mask, where the key acts, is compared with N(0, I) by the statistics of
keyanon/measures/gaussianity.py, and

    round_trip              |sample(z_T) - z_0| / |z_0|: how far this inversion is from undoing the sampler

A row of the table is a solver; normal noise in the place of z_T is the control. Per-picture values go to
results/runs/NAME/scores/NAME.scores.parquet, and the table is made from them as any other.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
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
from experiments.harness.statistics import averages
from keyanon import runner
from keyanon.diffusion.model import LatentDiffusion
from keyanon.diffusion.solvers import Solver
from keyanon.measures.biometrics import AVERAGES
from keyanon.measures.gaussianity import MEASURES, PATCH, generator_of, measure
from keyanon.types import FaceParser, Image, Mask, Measure, Observed, View

CONTROL = "standard normal"
WHOLE, FACE = "noise", "noise in the face"
ROUND_TRIP = {"round_trip": Measure("noise", "", "lower", "|sample(z_T) - z_0| / |z_0|")}
MEANINGS = Meanings(dict.fromkeys((WHOLE, FACE), View("noise")), {**MEASURES, **ROUND_TRIP}, AVERAGES)


def noise_statistics(
    backbone: LatentDiffusion, parser: FaceParser, solver: Solver | None
) -> Callable[[Sequence[str], Image, Mask], Observed]:
    """Takes down MEASURES of each picture's z_T by one solver, or of normal noise in its place without one."""

    def observe(ids: Sequence[str], images: Image, _: Mask) -> Observed:
        z0, n = backbone.encode(images), len(ids)
        faces = parser.mask(images, backbone.latent_size(images))[:n, 0].cpu().numpy()
        values: dict[tuple[str, str], torch.Tensor] = {}
        if solver is None:
            noise = np.stack([generator_of(id, "control").standard_normal(z0.shape[1:]) for id in ids])
        else:
            zT = solver.invert(backbone.eps, backbone.schedule, z0)[-1]
            error = (solver.sample(backbone.eps, backbone.schedule, zT) - z0).flatten(1).norm(dim=1)
            values[WHOLE, "round_trip"] = error / z0.flatten(1).norm(dim=1)
            noise = zT[:n].double().cpu().numpy()
        for view in (WHOLE, FACE):
            found = [
                measure(z, np.ones_like(face) if view == WHOLE else face, generator_of(id, view))
                for id, z, face in zip(ids, noise, faces, strict=True)
            ]
            values |= {(view, name): torch.tensor([one[name] for one in found]) for name in MEASURES}
        return Observed(values)

    return observe


@experiment("gaussianity")
def main(cfg: DictConfig) -> int:
    return start(cfg, run)


def run(cfg: DictConfig, choices: Mapping[str, Any], swept: Sequence[str] = (), command: Sequence[str] = ()) -> Path:
    """Measure every row's pictures, write the scores and the table; the folder of the rows."""
    backbone: LatentDiffusion = made(cfg, "backbone")
    solvers: dict[str, Solver | None] = {CONTROL: None} | {
        # the number right-aligned, since a table sorts its rows as text
        f"{name} inversion, {steps:3} steps": made(cfg, "solver", steps=steps, tolerance=inversion.tolerance)
        for name, inversion in cfg.inversions.items()
        for steps in inversion.steps
    }
    session = begin(cfg, choices, command, backbone)
    cells = [row(session, row_label(name, swept), solver, backbone) for name, solver in solvers.items()]
    written = [fill_row(session, cell, solver, backbone) for cell, solver in zip(cells, solvers.values(), strict=True)]
    if all(written):
        show(session, cells)
    return Path(cfg.runs) / str(cfg.name)


def row(session: Session, name: str, solver: Solver | None, backbone: LatentDiffusion) -> Cell:
    cfg, choices = session.cfg, session.choices
    notes = [
        *map(str, cfg.notes),
        *stand_in_notes(cfg.backbone),
        *model_notes(cfg.backbone, choices["backbone"], choices["parser"]),
    ]
    settings = {"backbone": plain(cfg.backbone), "solver": repr(solver)}
    return session.cell(
        name, settings, [*notes, f"mmd2 and kl_knn of {PATCH} x {PATCH} patches"], (backbone, solver, measure)
    )


def fill_row(session: Session, cell: Cell, solver: Solver | None, backbone: LatentDiffusion) -> bool:
    measures, size = noise_statistics(backbone, session.parser, solver), session.cfg.batch_size

    def work(ids: Sequence[str]) -> None:
        runner.observe(cell.files, session.originals, ids, measures, size, cell.row)

    def conclude(ids: Sequence[str]) -> Result:
        if lost := set(ids) - cell.files.measured():
            raise Incomplete(sorted(lost))
        scores = cell.files.scores(ids).to_pandas()
        return Result(list(averages(scores, session.people)), scores, MEANINGS)

    return fill(session, cell, work, conclude)


if __name__ == "__main__":
    main()
