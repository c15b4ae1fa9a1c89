"""Draw the bundled faces, and measure the bundled model: `python -m experiments.faces --data /path/to/utkface128`.

Two thousand samples of an unconditional model are compared with the pictures it was trained on and with those held out: how
many show a face, how far their embeddings lie from real ones (Frechet distance, beside that of two halves of real pictures), and
how near the nearest training picture comes (beside how near it comes to held-out ones). The first samples that pass the rule become
the bundled dataset: a face is found, no earlier one of them looks like it, no training picture comes nearer than a bound.
"""

import argparse
import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from experiments.harness.command import in_one_line
from experiments.harness.plots import contact_sheet
from experiments.harness.training import load_pictures
from keyanon.channel.pixels import to_bytes, to_floats
from keyanon.channel.whole import write_whole
from keyanon.diffusion.model import LatentDiffusion
from keyanon.diffusion.solvers import DDIM
from keyanon.errors import BadSetting
from keyanon.faces.alignment import FACES128_TEMPLATE
from keyanon.faces.detection import Detection, MtcnnDetector
from keyanon.faces.recognition import ArcFaceOnnx
from keyanon.measures.scorers import PSNR_CEILING, frechet_distance, psnr
from keyanon.settings import refuse, whole
from keyanon.types import Bytes, Image

BATCH = 32
SIDE = 128
DISTINCT, UNSEEN = 0.5, 0.6  # largest cosine to another bundled face, and to a training picture


class TemplateDetector:
    """Finds every face where the model's aligned crops have it: for embedding tens of thousands of such crops."""

    def detect(self, images: Image) -> list[Detection | None]:
        side = images.shape[-1]
        face = Detection(np.array([0.0, 0.0, side, side]), FACES128_TEMPLATE * side, 1.0)
        return [face] * len(images)

    def cards(self) -> tuple[()]:
        return ()


def draw(model: LatentDiffusion, count: int, steps: int, seed: int, batch: int = BATCH) -> Bytes:
    """`count` samples (n 3 h w), `batch` at a time; the i-th is a function of seed and i alone, up to rounding on a GPU."""
    channels, size = model.unet.config.in_channels, model.unet.config.sample_size
    parts = []
    for start in tqdm(range(0, count, batch), "draw", unit="batch", disable=None):
        generators = [torch.Generator().manual_seed(seed + i) for i in range(start, min(start + batch, count))]
        noise = torch.stack([torch.randn(channels, size, size, generator=g) for g in generators])
        parts.append(
            to_bytes(model.decode(DDIM(steps).sample(model.eps, model.schedule, noise.to(model.device)))).cpu()
        )
    return torch.cat(parts)


def embed(recognizer: ArcFaceOnnx, pictures: Bytes, title: str) -> NDArray[np.float64]:
    """Unit rows (n d), NaN where no face is found."""
    parts = tqdm(pictures.split(BATCH), title, unit="batch", disable=None)
    return np.concatenate([recognizer.embed(to_floats(part)).double().numpy() for part in parts])


def choose(
    found: NDArray[np.bool_], embeddings: NDArray[np.float64], nearest: NDArray[np.float64], count: int
) -> list[int]:
    """The first `count` samples that pass the rule."""
    chosen: list[int] = []
    for i in np.flatnonzero(found & (nearest <= UNSEEN)):
        if not chosen or (embeddings[chosen] @ embeddings[i]).max() <= DISTINCT:
            chosen.append(int(i))
        if len(chosen) == count:
            return chosen
    raise BadSetting(
        f"only {len(chosen)} of {len(found)} samples pass the rule, {count} are wanted; draw more (--samples)"
    )


def nearest_cosine(probe: NDArray[np.float64], gallery: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of each row of `probe` (n d), the largest cosine to a row of `gallery`."""
    return np.concatenate([(part @ gallery.T).max(1) for part in np.array_split(probe, max(1, len(probe) // 256))])


def quantiles(values: NDArray[np.float64]) -> dict[str, float]:
    defined = values[~np.isnan(values)]
    return {
        name: round(float(np.quantile(defined, q)), 4) for name, q in (("median", 0.5), ("p99", 0.99), ("max", 1.0))
    }


def webp(pixels: Tensor) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(buffer, "WEBP", quality=90, method=6)
    return buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.faces", description="Draw and measure bundled faces.")
    parser.add_argument("--data", required=True, help="the folder of the training pictures (UTKFace, 128 px)")
    parser.add_argument("--heldout", default="utkface128_heldout")
    parser.add_argument("--backbone", default="bundled:faces128")
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=int, default=256, help="how many to choose; 0 only measures the model")
    parser.add_argument("--out", type=Path, default=Path("keyanon/assets/faces"), help="where the chosen faces go")
    parser.add_argument(
        "--report", type=Path, default=Path("keyanon/assets/faces128"), help="... and what was measured"
    )
    args = parser.parse_args()
    with in_one_line():
        measure(args)


def measure(args: argparse.Namespace) -> None:
    for name, least in (("samples", 1), ("steps", 1), ("seed", 0), ("keep", 0)):
        refuse(f"--{name}", getattr(args, name), whole(least, 10**6))
    train, heldout = load_pictures(args.data, SIDE, args.heldout)
    model = LatentDiffusion(args.backbone)
    samples = draw(model, args.samples, args.steps, args.seed)
    fixed, searched = (ArcFaceOnnx("mobilefacenet", d) for d in (TemplateDetector(), MtcnnDetector(padding=0.25)))
    aligned = {name: embed(fixed, part, name) for name, part in (("training", train), ("held out", heldout))}
    drawn, found_at = embed(fixed, samples, "samples"), embed(searched, samples, "detect")
    found, found_real = ~np.isnan(found_at).any(1), ~np.isnan(embed(searched, heldout, "detect held out")).any(1)
    nearest = nearest_cosine(drawn, aligned["training"])

    shuffled = np.random.default_rng(args.seed).permutation(len(aligned["training"]))
    # as many real pictures as samples, where there are fewer of these: the distance falls with their number
    half = min(len(samples), len(aligned["held out"]))
    reconstructed = to_floats(to_bytes(model.decode(model.encode(to_floats(heldout)))))
    everywhere = torch.ones(len(heldout), 1, SIDE, SIDE, dtype=torch.bool)
    back = embed(fixed, to_bytes(reconstructed), "held out, reconstructed")
    report = {
        "model": args.backbone,
        "model_sha256": model.sha256,
        "samples": {"count": len(samples), "ddim_steps": args.steps, "seed": args.seed},
        "autoencoder_heldout": {
            "psnr_db_mean": round(float(psnr(reconstructed, to_floats(heldout), everywhere).mean()), 2),
            "psnr_db_ceiling": round(PSNR_CEILING, 2),
            "cosine_mean": round(float((back * aligned["held out"]).sum(1).mean()), 4),
        },
        "detected": {"samples": round(float(found.mean()), 4), "heldout": round(float(found_real.mean()), 4)},
        "frechet_distance": {
            "samples_to_heldout": round(frechet_distance(drawn, aligned["held out"]), 4),
            "training_to_heldout": round(
                frechet_distance(aligned["training"][shuffled[:half]], aligned["held out"]), 4
            ),
        },
        "nearest_training_cosine": {
            "samples": quantiles(nearest),
            "heldout": quantiles(nearest_cosine(aligned["held out"], aligned["training"])),
        },
    }
    if args.keep:
        chosen = choose(np.asarray(found), found_at, nearest, args.keep)
        rule = {"largest_cosine_between": DISTINCT, "largest_cosine_to_training": UNSEEN}
        report["bundled"] = {"kept": len(chosen), **rule}
        write_faces(args.out, samples, chosen)
    write_whole(args.report / "report.json", json.dumps(report, indent=2).encode() + b"\n", public=True)
    sheet(samples, args.report / "samples.webp")
    print(json.dumps(report, indent=2))


def sheet(samples: Bytes, path: Path) -> None:
    """The first 64 samples, as they came."""
    contact_sheet({f"{c}": list(samples[c:64:8]) for c in range(8)}, path, public=True)


def write_faces(folder: Path, samples: Bytes, chosen: Sequence[int]) -> None:
    """One WebP file a face, named by its place among the samples; faces of an earlier model are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.webp"):
        old.unlink()
    for i in chosen:
        write_whole(folder / f"{i:04d}.webp", webp(samples[i]), public=True)


if __name__ == "__main__":
    main()
