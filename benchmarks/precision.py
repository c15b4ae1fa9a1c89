"""What recovery loses when the receiver computes otherwise than the sender: `python -m benchmarks.precision [options]`.

The package's synthetic faces are published as 8-bit files by `anonymizer=exact` in fp32, one thread, all pictures in one batch, and
recovered from these bytes by receivers that differ in one thing each; the last rows have a sender that differs as well. Columns:
PSNR of the recovered face to D(E(x)) in dB, median and worst picture, the share of bytes equal to the first row's, evaluations a
picture. Measured: results/benchmarks/precision.csv.
"""

import argparse
import csv
import platform
import sys
from collections.abc import Iterator
from dataclasses import replace

import torch

from keyanon.channel.keys import experiment_key
from keyanon.channel.pixels import to_bytes, to_floats
from keyanon.diffusion.model import LatentDiffusion, Precision
from keyanon.diffusion.solvers import DDIM
from keyanon.faces.datasets import bundled_faces
from keyanon.faces.parsing import EllipseParser
from keyanon.measures.scorers import psnr_face
from keyanon.methods.exact import Exact, pixels
from keyanon.methods.refinement import Refinement, ToneCurve
from keyanon.methods.seams import Seam
from keyanon.methods.transforms import BandRotation
from keyanon.types import Bytes, Published

COLUMNS = ["sender", "receiver", "pictures", "median_db", "worst_db", "bytes_equal", "evaluations", "machine"]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.precision", description=__doc__)
    parser.add_argument("--backbone", default="bundled:faces128", help="folder, hub id or bundled:NAME")
    parser.add_argument("--count", type=int, default=6, help="pictures")
    parser.add_argument("--other-device", default=None, help="of one more receiver, as cuda")
    args = parser.parse_args()

    dataset = bundled_faces()
    ids = list(dataset.ids[: args.count])
    images, keys = torch.stack([dataset.load(id) for id in ids]), [experiment_key()] * len(ids)
    machine = f"{platform.machine()}, torch {torch.__version__}"
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(COLUMNS)

    def method(precision: Precision = "fp32", device: str = "cpu") -> Exact:
        backbone = LatentDiffusion(args.backbone, precision=precision, device=device)
        refinement = Refinement(ToneCurve(0.95, 1.5))
        solver = DDIM(10, "karras", 5e-7)
        return Exact(
            backbone, solver, EllipseParser(), BandRotation(), refinement, Seam(), background="noised", floor=None
        )

    def recovered(receiver: Exact, published: Published, batch_size: int) -> Bytes:
        parts = []
        for at in range(0, len(ids), batch_size):
            part = slice(at, at + batch_size)
            read = Published(published.images[part], published.headers[part])
            parts.append(receiver.recover(read, keys[part]))
        return to_bytes(torch.cat(parts))

    first = None
    reference = method()
    free = pixels(reference.parser.mask(images, reference.backbone.latent_size(images)), images)
    clean = reference.reconstruct(images)

    def settings() -> Iterator[tuple[str, str, Exact, Exact, int, int]]:
        """Names, sender, receiver, the receiver's threads and batch size."""
        whole = len(ids)
        yield "fp32", "the same", reference, reference, 1, whole
        yield "fp32", "the same, once more", reference, method(), 1, whole
        yield "fp32", "one picture at a time", reference, reference, 1, 1
        yield "fp32", "batches of 5", reference, reference, 1, 5
        yield "fp32", "two threads", reference, reference, 2, whole
        yield "fp32", "tolerance 1e-5", reference, with_tolerance(reference, 1e-5), 1, whole
        if args.other_device is not None:
            yield "fp32", args.other_device, reference, method(device=args.other_device), 1, whole
        coarse = with_tolerance(method("bf16"), 1e-3)
        yield "fp32", "bf16 network, tolerance 1e-3", reference, coarse, 1, whole
        yield "bf16 network, tolerance 1e-3", "the same", coarse, coarse, 1, whole

    published: dict[int, Published] = {}
    for sender_name, receiver_name, sender, receiver, threads, batch_size in settings():
        if id(sender) not in published:
            published[id(sender)] = sender.anonymize(images, keys, ids)
        torch.set_num_threads(threads)
        receiver.backbone.evaluations.clear()
        out = recovered(receiver, published[id(sender)], batch_size)
        evaluations = receiver.backbone.evaluations.total() / len(ids)
        torch.set_num_threads(1)
        first = out if first is None else first
        dB = psnr_face(to_floats(out), clean, free)
        numbers = [f"{dB.median().item():.1f}", f"{dB.min().item():.1f}", f"{(out == first).float().mean().item():.6f}"]
        writer.writerow([sender_name, receiver_name, len(ids), *numbers, f"{evaluations:.0f}", machine])
        sys.stdout.flush()


def with_tolerance(method: Exact, tolerance: float) -> Exact:
    assert isinstance(method.solver, DDIM)
    return replace(method, solver=replace(method.solver, tolerance=tolerance))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
