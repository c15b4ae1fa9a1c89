"""What each way to run the network faster gains by itself on a CPU: `python -m benchmarks.levers [options]`.

The same weights and the same 16 random latents, in parts of so many: contiguous or channels-last memory, fused projections of the
attention, bf16, compiled, compiled with the weights laid out beforehand (freezing). The first row is the authors' way. All take
turns; medians over the repeats, per picture. With one thread the time of the processor hardly depends on what else the machine
does. Measured: results/benchmarks/levers.csv.
"""

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention, FusedAttnProcessor2_0

from benchmarks.throughput import backbone_of, device_name, faces, noise

PICTURES = 16
COLUMNS = ["device", "torch", "threads", "network", "way", "at_once", "wall_ms", "cpu_ms", "wall_ratio", "cpu_ratio"]
WAYS = ("contiguous", "channels-last", "channels-last fused", "contiguous bf16", "channels-last bf16")
COMPILED = ("channels-last compiled", "channels-last compiled frozen", "channels-last bf16 compiled frozen")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.levers", description=__doc__)
    parser.add_argument("--network", choices=["faces128", "faces128_kl", "ldm256"], default="faces128")
    parser.add_argument("--at-once", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--compiled", action="store_true", help="the compiled ones as well: minutes for each")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--scratch", type=Path, default=Path(".cache/benchmarks"), help="for ldm256's random weights")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    backbone = backbone_of(args.network, args.scratch)
    z = noise(backbone, faces(PICTURES, 256 if args.network == "ldm256" else 128))
    ways = [*WAYS, *COMPILED] if args.compiled else [*WAYS]
    jobs: dict[tuple[str, int], Callable[[], None]] = {("authors", 5): calls(backbone.folder, "contiguous", z[:5], 5)}
    jobs |= {(way, size): calls(backbone.folder, way, z, size) for way in ways for size in args.at_once}
    wall: dict[tuple[str, int], list[float]] = {key: [] for key in jobs}
    cpu: dict[tuple[str, int], list[float]] = {key: [] for key in jobs}
    with torch.no_grad():
        for repeat in range(args.repeats + 1):
            for key, job in jobs.items():
                start, busy = time.perf_counter(), time.process_time()
                job()
                if repeat:  # the first one warms up
                    count = 5 if key[0] == "authors" else PICTURES
                    wall[key].append(1000 * (time.perf_counter() - start) / count)
                    cpu[key].append(1000 * (time.process_time() - busy) / count)
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(COLUMNS)
    for key in jobs:
        medians = [statistics.median(clock[key]) for clock in (wall, cpu)]
        ratios = [
            statistics.median(clock["authors", 5]) / median for clock, median in zip((wall, cpu), medians, strict=True)
        ]
        numbers = [*(f"{value:.2f}" for value in (*medians, *ratios))]
        writer.writerow([device_name("cpu"), torch.__version__, args.threads, args.network, *key, *numbers])


def calls(folder: Path, way: str, z: torch.Tensor, size: int) -> Callable[[], None]:
    """One evaluation of all of z, `size` pictures at once."""
    words = way.split()
    kind = torch.bfloat16 if "bf16" in words else torch.float32
    net: Any = UNet2DModel.from_pretrained(folder / "unet", torch_dtype=kind).eval().requires_grad_(False)
    if "channels-last" in words:
        net = net.to(memory_format=torch.channels_last)
    if "fused" in words:
        for module in net.modules():
            if isinstance(module, Attention):
                module.fuse_projections()
                module.set_processor(FusedAttnProcessor2_0())
    if "compiled" in words:
        net = torch.compile(net, dynamic=False, fullgraph=True, options={"freezing": "frozen" in words})

    def evaluate() -> None:
        for part in z.split(size):
            net(part.to(kind), torch.full((len(part),), 500)).sample.float()

    return evaluate


if __name__ == "__main__":
    main()
