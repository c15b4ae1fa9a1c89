"""Pictures per second of anonymize, recover and score, beside the authors' loop: `python -m benchmarks.throughput` (`make bench`).

    on a CPU, minutes:                  python -m benchmarks.throughput
    on a GPU, 4 minutes:                python -m benchmarks.throughput --preset gpu --device cuda --seconds 240
    the same rehearsed without a GPU:   python -m benchmarks.throughput --preset gpu --networks faces128 --batches 4 --steps 2
                                            --repeats 1 --scratch /tmp/keyanon --output /tmp/t.csv --plot /tmp/t.svg

Each network is measured with each method, precision and batch size, compiled and not:

    authors     their loop as they run it (benchmarks/authors.py): fp32, batches of 5, not compiled, nothing else
    signflip    the paper's method by this project: the same evaluations of the network
    exact       this project's method as conf/anonymizer/exact.yaml has it, one attempt a picture, not verified: as many
                evaluations as its inversion needs, so on trained weights only, and not in bf16, which is no use to it

The largest batch is also measured with a compiled network, and on a GPU with one recorded as CUDA graphs. All cells of a network
take turns, so that what else the machine does hits all of them: each once as soon as it is ready, then in rounds. The table is
written whenever it has grown. With `--seconds` the rounds go on until the time is used, each network having its share of it; a cell
whose turn comes too late is left out, and said. Pictures are the package's synthetic faces, the face is an ellipse. A row has the
median over the repeats and the slowest and fastest; `ratio` is evaluations of the network a second over the authors' in the same
direction, which is the ratio of pictures a second where the methods evaluate equally often. `cpu_s_per_picture` is the time of all
cores, and `cpu_ratio` the same ratio by it: with one thread, on a machine that others use as well, this is the number to trust.
`tflops` are multiply-adds of the network counted twice, `share` is their part of what a large matrix product reaches here in the
same precision. `peak_mb`: on a GPU what PyTorch had allocated at most for weights and work; on a CPU the resident memory of a
process that does nothing else, of 2 steps. `load`: processes that wanted to run when the row was measured.
"""

import argparse
import csv
import io
import itertools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from matplotlib.figure import Figure
from tabulate import tabulate
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import interpolate
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import ldm256
from benchmarks.authors import AuthorsLoop
from experiments.harness.plots import write_svg
from keyanon.channel.keys import experiment_key
from keyanon.channel.pixels import to_bytes, to_floats
from keyanon.channel.whole import write_whole
from keyanon.diffusion.model import LatentDiffusion, Precision, arithmetic
from keyanon.diffusion.solvers import DDIM
from keyanon.faces.datasets import bundled_faces
from keyanon.faces.parsing import EllipseParser
from keyanon.measures.scorers import psnr, ssim
from keyanon.methods.exact import Exact
from keyanon.methods.refinement import Refinement, ToneCurve
from keyanon.methods.seams import Seam
from keyanon.methods.signflip import SignFlip
from keyanon.methods.transforms import BandRotation
from keyanon.types import Image, Latent

ROOT = Path(__file__).resolve().parents[1]
METHODS = AUTHORS, SIGNFLIP, EXACT = "authors", "signflip", "exact"
EVALUATE, ANONYMIZE, RECOVER, SCORE = "evaluate", "anonymize", "recover", "score"
AUTHORS_BATCH = 5
SIZES = {"faces128": 128, "faces128_kl": 128, "ldm256": 256}  # pixels
PRESETS: dict[str, dict[str, Any]] = {
    "cpu": {
        "networks": ["faces128", "ldm256"],
        "precisions": ["fp32", "bf16"],
        "compiled": ["fp32", "bf16"],
        "graphs": [],
        "batches": [8],
        "steps": 10,
        "slow_steps": 0,
    },
    "gpu": {
        "networks": ["faces128", "ldm256"],
        "precisions": ["fp32", "tf32", "bf16"],
        "compiled": [],
        "graphs": ["fp32", "tf32", "bf16"],
        "batches": [64],
        "steps": 50,
        "slow_steps": 10,
    },
}
COLUMNS = [
    "device", "torch", "threads", "load", "network", "method", "precision", "compiled", "batch", "steps", "direction",
    "repeats", "pictures_per_s", "slowest", "fastest", "evaluations_per_picture", "evaluations_per_s", "ratio",
    "cpu_s_per_picture", "cpu_ratio", "tflops", "share", "first_s", "peak_mb",
]  # fmt: skip
SHOWN = [
    "network", "method", "precision", "compiled", "batch", "direction", "pictures_per_s", "evaluations_per_s", "ratio",
    "cpu_ratio", "share", "peak_mb",
]  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """What is measured: one way to do the work, on one network."""

    network: str
    method: str
    precision: Precision
    batch: int
    steps: int
    compiled: bool | Literal["graphs"]

    @property
    def directions(self) -> tuple[str, ...]:
        """`evaluate` is one call of the network."""
        if self.steps == 0:
            return (EVALUATE,)
        return (ANONYMIZE, RECOVER) if self.method == EXACT else (EVALUATE, ANONYMIZE, RECOVER)


class Job(Protocol):
    """The work of a cell. It ends when the device is done; `evaluations` counts what the network has seen so far."""

    def evaluate(self) -> None: ...

    def anonymize(self) -> None: ...

    def recover(self) -> None: ...

    @property
    def evaluations(self) -> int: ...


def main() -> None:
    args = arguments()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.only is not None:
        work = job(Cell(**json.loads(args.only)), args.device, args.scratch)
        for direction in Cell(**json.loads(args.only)).directions:
            getattr(work, direction)()
        print(resident())
        return
    rows: list[dict[str, Any]] = []
    begin = time.monotonic()
    for place, network in enumerate(args.networks, 1):
        end = begin + args.seconds * place / len(args.networks) if args.seconds is not None else None
        found: list[dict[str, Any]] = []
        for found in measured(cells(network, args), args, end):
            write_csv(rows + found, args.output)
        rows += [*found, *scored(network, args)]
        torch.compiler.reset()  # what was compiled is gone with its cells
        write_csv(rows, args.output)
    draw(rows, args.plot)
    print(tabulate([[row[name] for name in SHOWN] for row in rows], SHOWN))


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.throughput",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--preset", choices=PRESETS, default="cpu", help="what the next options are by default")
    parser.add_argument("--networks", nargs="+", choices=SIZES)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--precisions", nargs="+", choices=["fp32", "tf32", "bf16"])
    parser.add_argument("--batches", nargs="+", type=int, help="pictures at once; the authors' are 5")
    parser.add_argument("--steps", type=int, help="of DDIM in each direction, for authors and signflip")
    parser.add_argument(
        "--slow-steps", type=int, help="the same for ldm256, which is not measured exact at fewer than 10"
    )
    parser.add_argument("--compiled", nargs="*", choices=["fp32", "tf32", "bf16"], help="with a compiled network, too")
    parser.add_argument("--graphs", nargs="*", choices=["fp32", "tf32", "bf16"], help="with CUDA graphs, too")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, help="of all: then --repeats does not count")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="of the CPU; by default PyTorch's own number")
    parser.add_argument("--no-memory", action="store_true", help="leave out the processes that measure a CPU's memory")
    parser.add_argument("--scratch", type=Path, default=Path(".cache/benchmarks"), help="for ldm256's random weights")
    parser.add_argument("--output", type=Path, default=ROOT / "results/benchmarks/throughput.csv")
    parser.add_argument("--plot", type=Path, default=ROOT / "results/plots/throughput.svg")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # a cell, by the process that is started for its memory
    args = parser.parse_args(given)
    for name, value in PRESETS[args.preset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def cells(network: str, args: argparse.Namespace) -> list[Cell]:
    steps = args.slow_steps if network == "ldm256" else args.steps
    out = [Cell(network, AUTHORS, "fp32", AUTHORS_BATCH, steps, False)] if AUTHORS in args.methods else []
    for method, precision, batch in itertools.product(args.methods, args.precisions, args.batches):
        if method == AUTHORS or (method == EXACT and (network == "ldm256" or precision == "bf16")):
            continue
        out += [Cell(network, method, precision, batch, steps, False)]
        if batch == max(args.batches):
            also: list[bool | Literal["graphs"]] = [True] * (precision in args.compiled)
            also += ["graphs"] * (precision in args.graphs)
            out += [Cell(network, method, precision, batch, steps, how) for how in also]
    return out


def measured(
    chosen: Sequence[Cell], args: argparse.Namespace, end: float | None = None
) -> Iterator[list[dict[str, Any]]]:
    """The rows of one network, a direction of a cell each, whenever there are more or better ones; the cells take turns.

    `end` is when to stop, by the monotonic clock; the first cell is measured in any case.
    """
    jobs: dict[Cell, Job] = {}
    first, peak = {}, {}
    seconds: dict[tuple[Cell, str], list[float]] = {}
    busy: dict[tuple[Cell, str], list[float]] = {}
    evaluated: dict[tuple[Cell, str], float] = {}

    def late() -> bool:
        return end is not None and time.monotonic() > end

    def turn(cell: Cell) -> None:
        for direction in cell.directions:
            before, cpu, start = jobs[cell].evaluations, time.process_time(), time.perf_counter()
            getattr(jobs[cell], direction)()
            seconds.setdefault((cell, direction), []).append(time.perf_counter() - start)
            busy.setdefault((cell, direction), []).append(time.process_time() - cpu)
            evaluated[cell, direction] = (jobs[cell].evaluations - before) / cell.batch

    on_cpu = torch.device(args.device).type == "cpu"
    for cell in chosen:
        if jobs and late():
            print(f"left out, for want of time: {cell}", file=sys.stderr)
            continue
        before = 0 if on_cpu else torch.accelerator.memory_allocated(args.device)
        jobs[cell] = job(cell, args.device, args.scratch)
        start = time.perf_counter()
        if not on_cpu:
            torch.accelerator.reset_peak_memory_stats(args.device)
        for direction in cell.directions:
            getattr(jobs[cell], direction)()
        first[cell] = time.perf_counter() - start
        if not on_cpu:
            peak[cell] = torch.accelerator.max_memory_allocated(args.device) - before
        elif not args.no_memory:
            peak[cell] = memory_of(cell, args)
        print(f"ready: {cell}, {first[cell]:.0f} s", file=sys.stderr)
        turn(cell)
        yield rows_of(seconds, busy, evaluated, first, peak, args)
    for _ in range(args.repeats - 1) if end is None else itertools.count():
        for cell in jobs:
            if late():
                return
            turn(cell)
            yield rows_of(seconds, busy, evaluated, first, peak, args)


def rows_of(
    seconds: Mapping[tuple[Cell, str], Sequence[float]],
    busy: Mapping[tuple[Cell, str], Sequence[float]],
    evaluated: Mapping[tuple[Cell, str], float],
    first: Mapping[Cell, float],
    peak: Mapping[Cell, int],
    args: argparse.Namespace,
) -> list[dict[str, Any]]:
    """A row for each direction of each cell, from the times of its turns."""
    begun = next(iter(seconds))[0]
    by_wall, by_cpu = (
        {key: evaluated[key] * key[0].batch / statistics.median(times) for key, times in clock.items()}
        for clock in (seconds, busy)
    )
    rows = []
    for (cell, direction), times in seconds.items():
        theirs = (begun, direction) if begun.method == AUTHORS else None
        rate = cell.batch / statistics.median(times)
        flops = rate * evaluated[cell, direction] * flops_of(cell.network, args.scratch)
        rows.append(
            {
                **conditions(args.device),
                **asdict(cell),
                "compiled": {True: "yes", False: "no"}.get(cell.compiled, cell.compiled),
                "direction": direction,
                "repeats": len(times),
                **rates(cell.batch, times),
                "evaluations_per_picture": f"{evaluated[cell, direction]:.4g}",
                "evaluations_per_s": f"{by_wall[cell, direction]:.4g}",
                "ratio": f"{by_wall[cell, direction] / by_wall[theirs]:.2f}" if theirs else "",
                "cpu_s_per_picture": f"{statistics.median(busy[cell, direction]) / cell.batch:.3g}",
                "cpu_ratio": f"{by_cpu[cell, direction] / by_cpu[theirs]:.2f}" if theirs else "",
                "tflops": f"{flops / 1e12:.3g}",
                "share": f"{flops / matmul_rate(args.device, cell.precision, torch.get_num_threads()):.3f}",
                "first_s": f"{first[cell]:.1f}",
                "peak_mb": f"{peak[cell] / 1e6:.0f}" if cell in peak else "",
            }
        )
    return rows


def scored(network: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each batch size: PSNR and SSIM of pictures of the network's size, against others."""
    rows = []
    for batch in args.batches:
        images = faces(batch, SIZES[network]).to(args.device)
        view, face = images.flip(0), torch.ones_like(images[:, :1], dtype=torch.bool)
        times = []
        for _ in range(args.repeats + 1):
            start = time.perf_counter()
            for scorer in (psnr, ssim):
                scorer(view, images, face).tolist()
            times.append(time.perf_counter() - start)
        what = {"network": network, "method": f"{SCORE}: psnr, ssim", "batch": batch, "direction": SCORE}
        empty = dict.fromkeys(COLUMNS, "")
        rows.append({**empty, **conditions(args.device), **what, "repeats": args.repeats, **rates(batch, times[1:])})
    return rows


def rates(batch: int, times: Sequence[float]) -> dict[str, str]:
    each = {"pictures_per_s": statistics.median(times), "slowest": max(times), "fastest": min(times)}
    return {name: f"{batch / seconds:.4g}" for name, seconds in each.items()}


def conditions(device: str) -> dict[str, Any]:
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "load": f"{os.getloadavg()[0]:.1f}",
    }


@cache
def device_name(device: str) -> str:
    if torch.device(device).type != "cpu":
        return str(torch.get_device_module(device).get_device_name(device))
    known = Path("/proc/cpuinfo")
    names = (
        [line.partition(":")[2].strip() for line in known.read_text().splitlines() if line.startswith("model name")]
        if known.exists()
        else []
    )
    return f"{names[0]}, {len(names)} threads" if names else platform.machine()


def job(cell: Cell, device: str, scratch: Path) -> Job:
    images = faces(cell.batch, SIZES[cell.network])
    backbone = backbone_of(cell.network, scratch, cell.precision, device, cell.compiled)
    if cell.method == AUTHORS:
        return Theirs(AuthorsLoop(backbone.folder, device, cell.steps), images, noise(backbone, images))
    if cell.method == SIGNFLIP:
        return Ours(SignFlip(backbone, DDIM(max(cell.steps, 1)), EllipseParser(), mask_at_recovery="header"), images)
    solver, refinement = DDIM(10, "karras", 5e-7), Refinement(ToneCurve(0.95, 1.5))
    return Ours(
        Exact(backbone, solver, EllipseParser(), BandRotation(), refinement, Seam(), None, "noised", attempts=1), images
    )


class Ours:
    def __init__(self, method: SignFlip | Exact, images: Image) -> None:
        self.method, self.images = method, images
        self.z = noise(method.backbone, images)
        self.keys, self.ids = [experiment_key()] * len(images), [str(i) for i in range(len(images))]

    def evaluate(self) -> None:
        self.method.backbone.eps(self.z, 500).cpu()

    def anonymize(self) -> None:
        self.published = self.method.anonymize(self.images, self.keys, self.ids)

    def recover(self) -> None:
        self.method.recover(self.published, self.keys)

    @property
    def evaluations(self) -> int:
        return self.method.backbone.evaluations.total()


class Theirs:
    def __init__(self, loop: AuthorsLoop, images: Image, z: Latent) -> None:
        self.loop, self.images, self.z = loop, images, z
        self.mask = EllipseParser().mask(images, (z.shape[2], z.shape[3]))
        self.signs = torch.randint(2, z[:1].shape, generator=torch.Generator().manual_seed(0)) * 2.0 - 1

    @torch.no_grad()
    def evaluate(self) -> None:
        self.loop.noise(self.z, torch.tensor(500)).cpu()

    def anonymize(self) -> None:
        self.published = self.loop.flip(self.images, self.mask, self.signs).cpu()

    def recover(self) -> None:
        self.loop.flip(self.published, self.mask, self.signs).cpu()

    @property
    def evaluations(self) -> int:
        return self.loop.evaluations


def backbone_of(
    network: str, scratch: Path, precision: Precision = "fp32", device: str = "cpu", compiled: Any = False
) -> LatentDiffusion:
    source = str(ldm256.saved(scratch / "ldm256", device)) if network == "ldm256" else f"bundled:{network}"
    return LatentDiffusion(source, precision=precision, device=device, compile=compiled)


def noise(backbone: LatentDiffusion, images: Image) -> Latent:
    shape = (len(images), backbone.unet.config.in_channels, *backbone.latent_size(images))
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(backbone.device)


@cache
def faces(count: int, size: int) -> Image:
    dataset = bundled_faces()
    images = torch.stack([dataset.load(id) for id, _ in zip(itertools.cycle(dataset.ids), range(count), strict=False)])
    return to_floats(to_bytes(interpolate(images, (size, size), mode="bilinear", antialias=True)))


def memory_of(cell: Cell, args: argparse.Namespace) -> int:
    """Bytes at most resident in a fresh process that does the cell's work, with 2 steps."""
    short = json.dumps({**asdict(cell), "steps": min(2, cell.steps)})
    threads = ["--threads", str(args.threads)] if args.threads is not None else []
    command = [sys.executable, "-m", "benchmarks.throughput", "--only", short, "--scratch", str(args.scratch), *threads]
    return int(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def resident() -> int:
    """Bytes that this process had in memory at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@cache
def flops_of(network: str, scratch: Path) -> float:
    """Floating-point operations of one evaluation for one picture: two for each multiply-add of convolutions and products."""
    backbone = backbone_of(network, scratch)
    z = noise(backbone, faces(1, SIZES[network]))
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        backbone.unet(z, torch.zeros(1, dtype=torch.long))
    return float(counter.get_total_flops())


@cache
def matmul_rate(device: str, precision: Precision, threads: int) -> float:
    """Operations a second of a large square matrix product, best of 10."""
    side = 2048 if torch.device(device).type == "cpu" else 8192
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(side, side, generator=torch.Generator().manual_seed(i)).to(device, kind) for i in (0, 1))

    def seconds() -> float:
        start = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for the device
        return time.perf_counter() - start

    with arithmetic(precision):
        return 2 * side**3 / min(seconds() for _ in range(10))


def write_csv(rows: Sequence[dict[str, Any]], path: Path) -> None:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, buffer.getvalue().encode(), public=True)


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Evaluations of the network a second over the authors', while anonymizing if that was measured, as bars with their spread."""
    shown = [row for row in rows if row["ratio"] and row["direction"] == (ANONYMIZE if row["steps"] else EVALUATE)]
    networks = list(dict.fromkeys(row["network"] for row in shown))
    if not networks:
        return
    figure = Figure(figsize=(4 * len(networks) + 1, 4), dpi=100, layout="constrained")
    for axes, network in zip(figure.subplots(1, len(networks), squeeze=False)[0], networks, strict=True):
        bars = [row for row in shown if row["network"] == network]
        names = [bar_name(row) for row in bars]
        ratios = [float(row["ratio"]) for row in bars]
        middle, slow, fast = ([float(row[name]) for row in bars] for name in ("pictures_per_s", "slowest", "fastest"))
        spread = [
            [ratio * (m - s) / m for ratio, m, s in zip(ratios, middle, slow, strict=True)],
            [ratio * (f - m) / m for ratio, m, f in zip(ratios, middle, fast, strict=True)],
        ]
        axes.barh(names, ratios, xerr=spread)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.invert_yaxis()
        axes.set(title=network, xlabel="evaluations a second / the authors' loop")
        axes.grid(alpha=0.3, axis="x")
    write_svg(figure, path)


def bar_name(row: dict[str, Any]) -> str:
    compiled = {"yes": ", compiled", "graphs": ", graphs"}.get(row["compiled"], "")
    return f"{row['method']} {row['precision']}{compiled}, {row['batch']}"


if __name__ == "__main__":
    main()
