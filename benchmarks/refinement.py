"""What the 8-bit picture loses of the latent it carries, and what refining it costs.

Pictures are the package's synthetic faces, latents z* their faces after a key flip (10 Karras steps, exactly inverted). Columns:
root mean square error of the face's cells, in the latent's units and weighted by what the decoder makes of the channels; the same,
worst picture; PSNR of the face against the clipped and rounded D(z*), median and worst; seconds a picture.
"""

import argparse
import csv
import sys
import time

import torch
from torch import Tensor

from keyanon.channel.keys import experiment_key
from keyanon.channel.pixels import to_bytes
from keyanon.context import Context
from keyanon.diffusion.model import LatentDiffusion
from keyanon.diffusion.solvers import DDIM, Known
from keyanon.faces.datasets import bundled_faces
from keyanon.faces.parsing import EllipseParser
from keyanon.methods.exact import pixels
from keyanon.methods.refinement import Refinement, ToneCurve, channel_weights
from keyanon.methods.transforms import SignFlipping

COLUMNS = ["knee", "reach", "pull", "rms", "rms_worst", "weighted", "weighted_worst", "psnr", "psnr_worst", "seconds"]
USUAL, WIDE = ToneCurve(), ToneCurve(0.95, 1.35)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.refinement", description=__doc__)
    parser.add_argument("--backbone", default="bundled:faces128", help="folder, hub id or bundled:NAME")
    parser.add_argument("--count", type=int, default=8, help="pictures")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    backbone = LatentDiffusion(args.backbone, device=args.device)
    dataset = bundled_faces()
    images = torch.stack([dataset.load(id) for id in dataset.ids[: args.count]]).to(args.device)
    cells = EllipseParser().mask(images, backbone.latent_size(images))
    free = pixels(cells, images)

    solver, z0 = DDIM(10, "karras", 1e-5), backbone.encode(images)
    keys, contexts = [experiment_key()] * len(z0), [Context(bytes([i]) * 24) for i in range(len(z0))]
    path = solver.invert(backbone.eps, backbone.schedule, z0)
    zT, _ = SignFlipping().apply(path[-1], cells, keys, contexts)
    target = solver.sample(backbone.eps, backbone.schedule, zT, Known(cells, path))
    start = torch.where(free, backbone.decode(target), images)
    plain, weights = to_bytes(start), channel_weights(backbone, target)[:, None, None]

    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(COLUMNS)
    for tone, pull in ((USUAL, None), (USUAL, 0.1), (USUAL, 0.01), (WIDE, 0.1), (WIDE, 0.01)):
        begin = time.perf_counter()
        out = (
            plain
            if pull is None
            else Refinement(tone, pull)(backbone, target, start, torch.zeros_like(start), free, cells)
        )
        seconds = (time.perf_counter() - begin) / len(out)
        error = (backbone.encode(tone.read(out, free)) - target) * cells
        rms, weighted = over(error, cells), over(error * weights, cells)
        psnr = 20 * torch.log10(255 / over((out.float() - plain.float()) * free, free))
        ends = ((rms, rms.max()), (weighted, weighted.max()), (psnr, psnr.min()))
        cells_of_row = [f"{value:.3g}" for all, worst in ends for value in (all.median().item(), worst.item())]
        writer.writerow([tone.knee, tone.reach, "" if pull is None else pull, *cells_of_row, f"{seconds:.2g}"])


def over(error: Tensor, mask: Tensor) -> Tensor:
    """Root mean square of each picture's error over the mask."""
    return (error.square().flatten(1).sum(1) / (mask.flatten(1).sum(1) * error.shape[1])).sqrt()


if __name__ == "__main__":
    main()
