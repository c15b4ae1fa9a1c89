"""How much the keyed loop amplifies an error of the published latent: `python -m benchmarks.loop_gain [options]`.

White noise of standard deviation sigma is added to z'_0 on the face, and recovery goes on from there:

    G = mean |z_0 recovered - z_0|^2 / sigma^2 on the face, in dB, for each picture;   median and 90th percentile over pictures

Pictures are the package's synthetic faces, the background's path is known on both sides (keyanon/methods/exact.py).
Sigma = 0 gives what
the loop loses by itself, as mean |z_0 recovered - z_0|^2 / mean |z_0|^2 in dB. Measured: results/benchmarks/loop_gain.csv.
"""

import argparse
import csv
import sys

import torch

from keyanon.channel.headers import Header
from keyanon.channel.keys import experiment_key
from keyanon.channel.nonces import contexts_of, nonce_for
from keyanon.diffusion.model import LatentDiffusion
from keyanon.diffusion.solvers import DDIM
from keyanon.faces.datasets import bundled_faces
from keyanon.faces.parsing import EllipseParser
from keyanon.methods.exact import Exact
from keyanon.methods.transforms import BandRotation, SignFlipping

SIGMAS = (0.0, 1e-3, 1e-2, 1e-1)
SOLVERS = {
    "naive, 50 leading": DDIM(50),
    "exact, 50 leading": DDIM(50, tolerance=1e-6),
    "exact, 20 Karras": DDIM(20, "karras", 1e-6),
    "exact, 10 Karras": DDIM(10, "karras", 1e-6),
}
TRANSFORMS = {"sign flip": SignFlipping(), "band rotation": BandRotation()}
COLUMNS = ["backbone", "pictures", "solver", "transform", "sigma", "median_db", "p90_db"]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loop_gain", description=__doc__)
    parser.add_argument("--backbone", default="bundled:faces128", help="folder, hub id or bundled:NAME")
    parser.add_argument("--count", type=int, default=8, help="pictures")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    backbone, dataset = LatentDiffusion(args.backbone, device=args.device), bundled_faces()
    ids = list(dataset.ids[: args.count])
    images = torch.stack([dataset.load(id) for id in ids]).to(args.device)
    mask = EllipseParser().mask(images, backbone.latent_size(images))
    keys = [experiment_key()] * len(ids)
    z0 = backbone.encode(images)
    count = mask.sum((1, 2, 3)) * z0.shape[1]

    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(COLUMNS)
    for solver_name, solver in SOLVERS.items():
        for transform_name, transform in TRANSFORMS.items():
            method = Exact(backbone, solver, EllipseParser(), transform, refinement=None)
            contexts = contexts_of(method, nonce_for, keys, ids, images)
            known = method.known(images, mask, contexts)
            there, sent = method.turn(z0, known, keys, contexts)
            headers = [
                Header(each.nonce, m, code, description=each.description)
                for each, m, code in zip(contexts, mask.cpu(), sent, strict=True)
            ]
            for sigma in SIGMAS:
                noise = torch.randn(z0.shape, generator=torch.Generator().manual_seed(0)).to(z0)
                back = method.turn_back(there + sigma * noise, known, headers, keys)
                error = ((back - z0) * mask).square().sum((1, 2, 3)) / count
                per = sigma**2 if sigma else (z0 * mask).square().sum((1, 2, 3)) / count
                gain = 10 * (error / per).log10()
                numbers = [f"{gain.quantile(q).item():.1f}" for q in (0.5, 0.9)]
                writer.writerow([args.backbone, len(ids), solver_name, transform_name, sigma, *numbers])
                sys.stdout.flush()


if __name__ == "__main__":
    main()
