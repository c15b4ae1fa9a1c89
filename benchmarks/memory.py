"""Memory against the number of steps: `python -m benchmarks.memory [options]`.

`loop` is the paper's loop around a network that does nothing, so that a batch can be so large that the path would count. A row is a
process that anonymizes once and ends: `peak_mb` is its resident memory at most, on a GPU what PyTorch had allocated at most;
`list_mb` is what the path z_0 .. z_N of one inversion would take if it were kept. Measured: results/benchmarks/memory.csv.
"""

import argparse
import csv
import subprocess
import sys

import torch

from benchmarks.throughput import device_name, faces, resident
from keyanon.channel.keys import experiment_key
from keyanon.diffusion.model import LatentDiffusion
from keyanon.diffusion.solvers import DDIM, Known
from keyanon.faces.parsing import EllipseParser
from keyanon.methods.exact import Exact
from keyanon.methods.signflip import SignFlip
from keyanon.methods.transforms import SignFlipping
from keyanon.types import Latent

COLUMNS = ["device", "torch", "network", "method", "batch", "steps", "peak_mb", "list_mb"]
METHODS = ("signflip", "exact", "loop")
TOLERANCE = 0.1  # of the inversion, and coarse: time depends on it, memory does not


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--backbone", default="bundled:faces128", help="folder, hub id or bundled:NAME")
    parser.add_argument("--size", type=int, default=128, help="picture side in pixels")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 50, 200])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--alone", action="store_true", help="measure this process, of one method and number of steps")
    args = parser.parse_args()
    if args.alone:
        print(*peak(args.backbone, args.size, args.methods[0], args.batch, args.steps[0], args.device))
        return
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(COLUMNS)
    for method in args.methods:
        for steps in args.steps:
            options = {
                "backbone": args.backbone,
                "size": args.size,
                "methods": method,
                "batch": args.batch,
                "steps": steps,
            }
            given = [f"--{name}={value}" for name, value in {**options, "device": args.device}.items()]
            command = [sys.executable, "-m", "benchmarks.memory", *given, "--alone"]
            printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()
            numbers = [f"{int(size) / 1e6:.0f}" for size in printed]
            writer.writerow(
                [device_name(args.device), torch.__version__, args.backbone, method, args.batch, steps, *numbers]
            )
            sys.stdout.flush()


def peak(source: str, size: int, name: str, batch: int, steps: int, device: str) -> tuple[int, int]:
    """Bytes: at most in use, and of the latents of one path."""
    backbone, parser = LatentDiffusion(source, device=device), EllipseParser()
    method: SignFlip | Exact = SignFlip(backbone, DDIM(steps), parser)
    if name == "exact":
        solver = DDIM(steps, tolerance=TOLERANCE)
        method = Exact(backbone, solver, parser, SignFlipping(), None, background="noised", floor=None)
    images = faces(batch, size)
    if name == "loop":
        z0, mask = backbone.encode(images), parser.mask(images.to(device), backbone.latent_size(images))
        kept = DDIM(steps).invert(nothing, backbone.schedule, z0)
        DDIM(steps).sample(nothing, backbone.schedule, -kept[-1], Known(mask, kept))
        return in_use(device), (steps + 1) * z0.nbytes
    method.anonymize(images, [experiment_key()] * batch, [str(i) for i in range(batch)])
    path = (steps + 1) * backbone.encode(images).nbytes
    return in_use(device), path


def nothing(z: Latent, t: int) -> Latent:
    return z / 2


def in_use(device: str) -> int:
    return resident() if torch.device(device).type == "cpu" else torch.accelerator.max_memory_allocated(device)


if __name__ == "__main__":
    main()
