"""A GPU against the CPU, and samples of a model drawn on it: `python -m benchmarks.card agreement|samples` (benchmarks/card.sh).

    agreement   whether a GPU computes what the CPU does: signs under the key to the bit, one evaluation of the network, D(E(x)),
                files published on one and recovered on the other. A row a check, written as they come. Those with a bar have to
                keep it, else it ends with code 1. The paper's loop amplifies rounding, so its pictures have no bar.
    samples     64 samples of a model as a sheet, and all of them as WebP files in a tar

Pictures are the package's synthetic faces, and the face is an ellipse.
"""

import argparse
import csv
import io
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.throughput import EXACT, SIGNFLIP, conditions, faces
from experiments.faces import draw, sheet, webp
from keyanon.channel.keys import experiment_key
from keyanon.channel.nonces import contexts_of, nonce_for
from keyanon.channel.pixels import to_bytes, to_floats
from keyanon.channel.whole import write_whole
from keyanon.diffusion.model import LatentDiffusion, Precision
from keyanon.diffusion.solvers import DDIM
from keyanon.faces.parsing import EllipseParser
from keyanon.measures.scorers import psnr_face
from keyanon.methods.exact import Exact
from keyanon.methods.refinement import Refinement, ToneCurve
from keyanon.methods.seams import Seam
from keyanon.methods.signflip import SignFlip
from keyanon.methods.transforms import BandRotation, SignFlipping
from keyanon.types import Bytes

SIDE = 128


@dataclass(frozen=True)
class Check:
    """What was found, for the worst picture; it holds at `bar` or beyond, on the side that is better."""

    check: str
    sender: str
    receiver: str
    value: float
    unit: str
    bar: float | None = None
    higher: bool = True

    @property
    def holds(self) -> bool:
        """NaN never does."""
        return self.bar is None or (self.value >= self.bar if self.higher else self.value <= self.bar)


def agreement(model: str, device: str, methods: Sequence[str], count: int, steps: int) -> Iterator[Check]:
    """Checks of `device` against the CPU, cheapest first."""
    images, keys, ids = faces(count, SIDE), [experiment_key()] * count, [str(i) for i in range(count)]

    def backbone(where: str, precision: Precision = "fp32", graphs: bool = False) -> LatentDiffusion:
        return LatentDiffusion(model, device=where, precision=precision, compile="graphs" if graphs else False)

    cpu, gpu = backbone("cpu"), backbone(device)
    z0 = cpu.encode(images)
    yield Check("E(x)", "cpu", device, apart(gpu.encode(images), z0), "largest difference", 1e-4, False)
    yield Check(
        "D(E(x))", "cpu", device, apart(gpu.decode(z0.to(device)), cpu.decode(z0)), "largest difference", 1e-4, False
    )
    noise = torch.randn(z0.shape, generator=torch.Generator().manual_seed(1))
    expected = cpu.eps(noise, 500)
    ways: list[tuple[Precision, bool, float]] = [("fp32", False, 1e-4), ("tf32", False, 1e-2), ("bf16", False, 5e-2)]
    if torch.device(device).type == "cuda":
        ways += [("fp32", True, 1e-4), ("bf16", True, 5e-2)]
    for precision, graphs, bar in ways:
        found = backbone(device, precision, graphs).eps(noise.to(device), 500).cpu()
        error = ((found - expected).norm() / expected.norm()).item()
        name = f"{device} {precision}{', graphs' if graphs else ''}"
        yield Check("one evaluation of the network", "cpu fp32", name, error, "relative error", bar, False)

    def flip(where: LatentDiffusion) -> SignFlip:
        return SignFlip(where, DDIM(steps), EllipseParser(), mask_at_recovery="header")

    def exact(where: LatentDiffusion) -> Exact:
        solver, refinement = DDIM(10, "karras", 5e-7), Refinement(ToneCurve(0.95, 1.5))
        return Exact(
            where,
            solver,
            EllipseParser(),
            BandRotation(),
            refinement,
            Seam(),
            background="noised",
            floor=None,
            attempts=1,
        )

    contexts, mask = (
        contexts_of(flip(cpu), nonce_for, keys, ids, images),
        EllipseParser().mask(images, cpu.latent_size(images)),
    )
    signed = [SignFlipping().apply(noise.to(d), mask.to(d), keys, contexts)[0].cpu() for d in ("cpu", device)]
    yield Check("signs under the key", "cpu", device, equal(*signed), "share of equal numbers", 1.0)

    ways_of: dict[str, tuple[Callable[[LatentDiffusion], SignFlip | Exact], float | None]]
    ways_of = {SIGNFLIP: (flip, None), EXACT: (exact, 40.0)}
    for name in methods:
        method, bar = ways_of[name]
        here, there = method(cpu), method(gpu)
        published = {"cpu": here.anonymize(images, keys, ids), device: there.anonymize(images, keys, ids)}
        one, other = (published[where].images for where in ("cpu", device))
        whole = torch.ones(count, 1, SIDE, SIDE, dtype=torch.bool)
        yield Check(f"{name}: published", "cpu", device, least(other, one, whole), "dB, worst picture")
        yield Check(f"{name}: published", "cpu", device, equal(other, one), "share of equal bytes")
        receivers = {"cpu": here, device: there}
        face = EllipseParser().mask(images, (SIDE, SIDE))
        ceiling = to_bytes(here.reconstruct(images))
        for sender, receiver in (("cpu", "cpu"), (device, device), ("cpu", device), (device, "cpu")):
            back = to_bytes(receivers[receiver].recover(published[sender], keys))
            yield Check(
                f"{name}: recovered, to D(E(x))", sender, receiver, least(back, ceiling, face), "dB, worst picture", bar
            )


def apart(found: Tensor, expected: Tensor) -> float:
    return (found.cpu() - expected.cpu()).abs().max().item()


def equal(found: Tensor, expected: Tensor) -> float:
    return (found == expected).double().mean().item()


def least(found: Bytes, expected: Bytes, where: Tensor) -> float:
    return psnr_face(to_floats(found), to_floats(expected), where).min().item()


def write_samples(model: str, device: str, count: int, batch: int, out: Path) -> None:
    samples = draw(LatentDiffusion(model, device=device), count, steps=50, seed=0, batch=batch)
    if count >= 64:
        sheet(samples, out / "samples.webp")
    with ThreadPoolExecutor() as pool, tarfile.open(out / "samples.tar", "w") as tar:
        for i, data in enumerate(pool.map(webp, samples)):
            member = tarfile.TarInfo(f"{i:04d}.webp")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.card", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["agreement", "samples"])
    parser.add_argument("--model", default="bundled:faces128")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, required=True, help="a folder")
    parser.add_argument("--methods", nargs="+", choices=[SIGNFLIP, EXACT], default=[SIGNFLIP, EXACT])
    parser.add_argument("--count", type=int, default=8, help="pictures, or samples")
    parser.add_argument("--steps", type=int, default=50, help="of the paper's loop, in each direction")
    parser.add_argument("--batch", type=int, default=32, help="samples at once")
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.what == "samples":
        write_samples(args.model, args.device, args.count, args.batch, args.out)
        return
    found: list[Check] = []
    begin = time.monotonic()
    for check in agreement(args.model, args.device, args.methods, args.count, args.steps):
        found.append(check)
        print(f"{time.monotonic() - begin:.0f} s  {check}{'' if check.holds else '  FAILS'}", flush=True)
        write(found, args.device, args.out / "agreement.csv")
    if not all(check.holds for check in found):
        sys.exit(1)


def write(found: Sequence[Check], device: str, path: Path) -> None:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    where = {name: conditions(device)[name] for name in ("device", "torch")}
    table.writerow([*where, *(name for name in asdict(found[0]) if name != "higher"), "holds"])
    for check in found:
        values = asdict(replace(check, value=float(f"{check.value:.4g}")))
        del values["higher"]
        table.writerow(
            [*where.values(), *("" if v is None else v for v in values.values()), "yes" if check.holds else "no"]
        )
    write_whole(path, text.getvalue().encode(), public=True)


if __name__ == "__main__":
    main()
