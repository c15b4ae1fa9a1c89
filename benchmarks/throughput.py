"""Pictures per second of anonymize and recover: `python -m benchmarks.throughput [options]` (`make bench`).

The pictures are noise and the face is an ellipse: speed depends on neither, nor on what the weights were trained on.
"""

import argparse
import csv
import sys
import time

import torch

from keyanon.anonymizers import SignFlip
from keyanon.diffusion import LatentDiffusion
from keyanon.images import to_floats
from keyanon.keys import experiment_key
from keyanon.parsing import EllipseParser
from keyanon.solvers import DDIM

COLUMNS = ["backbone", "device", "precision", "threads", "steps", "batch", "direction", "repeat", "images_per_s"]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.throughput", description=__doc__)
    parser.add_argument("--backbone", default="embedded:faces128", help="folder, hub id or embedded:NAME")
    parser.add_argument("--size", type=int, default=128, help="picture side in pixels")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--precision", choices=["fp32", "tf32", "bf16"], default="fp32")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    backbone = LatentDiffusion(args.backbone, precision=args.precision, device=args.device)
    method = SignFlip(backbone, DDIM(args.steps), EllipseParser(), mask_at_recovery="header")
    writer = csv.DictWriter(sys.stdout, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for batch in args.batch:
        images = torch.rand(batch, 3, args.size, args.size, generator=torch.Generator().manual_seed(0)) * 2 - 1
        keys, ids = [experiment_key()] * batch, [str(i) for i in range(batch)]
        published = method.anonymize(images, keys, ids)  # warms up; results reach the host, so the device is done
        for repeat in range(args.repeat):
            start = time.perf_counter()
            method.anonymize(images, keys, ids)
            middle = time.perf_counter()
            method.recover(to_floats(published.images), published.headers, keys)
            end = time.perf_counter()
            for direction, seconds in (("anonymize", middle - start), ("recover", end - middle)):
                row = (args.backbone, args.device, args.precision, torch.get_num_threads(), args.steps, batch)
                values = (*row, direction, repeat, f"{batch / seconds:.3g}")
                writer.writerow(dict(zip(COLUMNS, values, strict=True)))


if __name__ == "__main__":
    main()
