"""Train a model further on one GPU, in the minutes that there are.

    python -m experiments.train_gpu network --model bundled:faces128_large --batch 512 --minutes 7 --data FOLDER --out FOLDER
    python -m experiments.train_gpu decoder --model bundled:faces128_vq --batch 128 --minutes 2 --data FOLDER --out FOLDER

    network   the denoising network on a fixed latent: v-prediction, as experiments.train has it
    decoder   decoder and codebook of a VQ autoencoder; its encoder, and so the latent, stays as it is, to the bit

The decoder's loss asks for the picture from codes, half of the batch, and from the latent itself. It also asks that the encoder
reads from what is published the latent it was drawn from (D: decoder, E: encoder, r: the rounding of 8 bits):

    |x - D(z)|_1 + mean |code - E(x)|^2 + rms(E(clip(D(z')) + r) - z'),  z' = E(x) + s eps

Whole steps are CUDA graphs (experiments/harness/graphs.py). On a CPU the same steps run one by one, for trying. Every minute the
folder `out` becomes a complete model, of averaged weights in half precision; `training.csv` in it is the report. No optimizer state
is kept: a model that is trained further begins with fresh moments.
"""

import argparse
import csv
import io
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DModel, VQModel
from torch import Tensor
from torch.nn.functional import conv2d

from experiments.harness.graphs import Fit, Pictures, Row, training
from experiments.harness.training import halved, load_pictures
from keyanon.channel.pixels import to_bytes, to_floats
from keyanon.channel.whole import write_whole
from keyanon.diffusion.block_dct import BLOCK, BlockDCT, block_dct_filters
from keyanon.diffusion.model import LatentDiffusion
from keyanon.errors import BadSetting, UserError
from keyanon.settings import DEVICE, number, refuse, whole
from keyanon.types import Bytes, Image

SIDE = 128
KINDS = {"network": ("latent", "vqvae"), "decoder": ("vqvae",)}  # autoencoders that each part can be trained with
MEASURED = 512  # held-out pictures
DRAWN_NOISE = 0.3  # largest s of the decoder's loss


@dataclass(frozen=True)
class Part:
    """A part of a model that is trained, its loss on a batch of its own, and what is measured of it on held-out pictures."""

    name: str
    net: Any
    loss: Callable[[], Tensor]
    measure: Callable[[], dict[str, float]]


def network(folder: Path, pictures: Pictures, heldout: Bytes, batch: int) -> Part:
    """The denoising network: v-prediction, timesteps stratified over the batch, channels weighted as in experiments.train."""
    device = pictures.pixels.device
    net = on(device, UNet2DModel.from_pretrained(folder / "unet"))
    if device.type == "cuda":
        from experiments.harness.fused_norm import fuse  # Triton is there with PyTorch's builds for GPUs alone

        fuse(net)
    encode, weight = encoder(folder, device)
    abar = DDIMScheduler.from_pretrained(folder / "scheduler").alphas_cumprod.to(device)
    strata = torch.arange(batch, device=device)  # pictures come in random order, so these need not

    def missed(z0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        a, s = abar[t].sqrt().view(-1, 1, 1, 1), (1 - abar[t]).sqrt().view(-1, 1, 1, 1)
        with autocast(device):
            predicted = net((a * z0 + s * noise).contiguous(memory_format=torch.channels_last), t).sample
        mean: Tensor = (weight * (predicted.float() - (a * noise - s * z0)).square()).mean()
        return mean

    def timesteps(uniform: Tensor) -> Tensor:
        return ((strata + uniform) / batch * len(abar)).long().clamp(max=len(abar) - 1)

    def loss() -> Tensor:
        z0 = encode(pictures.draw(batch, (0.88, 1.12), 0.05))
        return missed(z0, timesteps(torch.rand(batch, device=device)), torch.randn_like(z0))

    @torch.no_grad()
    def measure() -> dict[str, float]:
        """The loss with fixed noise, in batches of the training's shape, for which cuDNN has chosen already."""
        generator, losses = torch.Generator().manual_seed(11), []
        for part in heldout[: max(1, MEASURED // batch) * batch].split(batch):
            z0 = encode(to_floats(part.to(device)))
            t = timesteps(torch.rand(batch, generator=generator).to(device))[: len(z0)]
            losses.append(missed(z0, t, torch.randn(z0.shape, generator=generator).to(device)).item())
        return {"heldout_loss": sum(losses) / len(losses)}

    return Part("unet", net, loss, measure)


def decoder(folder: Path, pictures: Pictures, heldout: Bytes, batch: int) -> Part:
    """Decoder and codebook of a VQ autoencoder, in fp32, or TF32 for convolutions."""
    device, half = pictures.pixels.device, batch // 2
    net = on(device, VQModel.from_pretrained(folder / "vqvae"))
    for fixed in (net.encoder, net.quant_conv):
        fixed.requires_grad_(False)
    book = net.quantize.embedding.weight

    def encode(images: Tensor) -> Tensor:
        latents: Tensor = net.encode(images.contiguous(memory_format=torch.channels_last)).latents
        return latents

    def decode(latents: Tensor) -> Tensor:
        images: Tensor = net.decoder(net.post_quant_conv(latents.contiguous(memory_format=torch.channels_last)))
        return images

    def loss() -> Tensor:
        with torch.no_grad():
            images = pictures.draw(batch, (0.8, 1.25), 0.05)
            latents = encode(images)
            rows = latents.permute(0, 2, 3, 1).reshape(-1, latents.shape[1])
            nearest = [
                torch.addmm(book.square().sum(1), part, book.T, alpha=-2).argmin(1) for part in rows.split(32768)
            ]
            codes = torch.cat(nearest)
            coded = book[codes].view(latents.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)
            uses = torch.zeros(len(book), device=device).index_add_(0, codes, torch.ones(len(rows), device=device))
            sums = torch.zeros_like(book).index_add_(0, codes, rows)
            noise = DRAWN_NOISE * torch.rand(half, 1, 1, 1, device=device) * torch.randn_like(latents[:half])
            drawn, rounding = latents[:half] + noise, (torch.rand_like(images[:half]) - 0.5) / 127.5
            begun = torch.cat([coded[:half], latents[half:], drawn])
        # mean |code - E(x)|^2 over all rows, by counts and sums: its gradient needs no scatter
        apart = ((uses[:, None] * book.square() - 2 * book * sums).sum() + rows.square().sum()) / rows.numel()
        decoded = decode(begun)
        read = encode(decoded[batch:].clamp(-1, 1) + rounding)
        missed = (read - drawn).square().mean((1, 2, 3)).add(1e-8).sqrt().mean()
        total: Tensor = (decoded[:batch] - images).abs().mean() + apart + missed
        return total

    @torch.no_grad()
    def measure() -> dict[str, float]:
        """PSNR of D(E(x)) in dB, without and with codes, and the rms of E(D(z)) - z, after rounding to 8 bits as well."""
        found = []
        for part in heldout[:MEASURED].split(batch):
            images = to_floats(part.to(device))
            latents = encode(images)
            plain, coded = decode(latents).clamp(-1, 1), net.decode(latents).sample.clamp(-1, 1)
            errors = [(view - images).square().mean((1, 2, 3)) for view in (plain, coded)]
            rounded = to_floats(to_bytes(plain))
            missed = [(encode(view) - latents).square().mean((1, 2, 3)) for view in (plain, rounded)]
            found.append(torch.stack([-10 * (error / 4).log10() for error in errors] + missed, 1))
        psnr, psnr_coded, missed, missed_rounded = torch.cat(found).mean(0).tolist()
        return {
            "psnr": psnr, "psnr_quantized": psnr_coded, "roundtrip_rms": missed**0.5, "roundtrip_rms_8bit": missed_rounded**0.5,
        }  # fmt: skip

    return Part("vqvae", net, loss, measure)


def encoder(folder: Path, device: torch.device) -> tuple[Callable[[Image], Tensor], Tensor]:
    """E on the device alone, and the weight of each channel in the loss (1 c 1 1)."""
    if not (folder / "latent").is_dir():
        net = on(device, VQModel.from_pretrained(folder / "vqvae")).requires_grad_(False)

        def encode(images: Image) -> Tensor:
            with torch.no_grad(), autocast(device):
                latents: Tensor = net.encode(images.contiguous(memory_format=torch.channels_last)).latents
            return latents.float()

        return encode, torch.ones(1, 1, 1, 1, device=device)
    config = BlockDCT.load_config(folder / "latent")
    # BlockDCT holds its constants on the CPU, from where a recorded step cannot fetch them
    filters = block_dct_filters(config["luma"], config["chroma"]).float().to(device)
    mean, std = (torch.tensor(config[name], device=device).view(1, -1, 1, 1) for name in ("mean", "std"))
    return (lambda images: (conv2d(images, filters, stride=BLOCK) - mean) / std), std.sqrt() / std.sqrt().mean()


def on(device: torch.device, net: Any) -> Any:
    return net.to(device, torch.float32, memory_format=torch.channels_last).eval()


def autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)  # a cache would outlive the recorded step


def write(source: Path, part: Part, report: Sequence[Row], out: Path) -> None:
    """The model in `source` with one part as it is now, and the report, in place of what is in `out`; as a whole."""
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    for other in ("latent", "vqvae", "scheduler", "unet"):
        if (source / other).is_dir() and other != part.name:
            shutil.copytree(source / other, partial / other)
    shutil.copyfile(source / "model_index.json", partial / "model_index.json")
    halved(part.net).save_pretrained(partial / part.name)
    text = io.StringIO()
    table = csv.DictWriter(text, list(dict.fromkeys(name for row in report for name in row)), lineterminator="\n")
    table.writeheader()
    table.writerows({name: f"{value:.6g}" for name, value in row.items()} for row in report)
    write_whole(partial / "training.csv", text.getvalue().encode(), public=True)
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.train_gpu", description="Train a model further.")
    parser.add_argument("part", choices=["network", "decoder"])
    parser.add_argument(
        "--model", required=True, help="a folder in diffusers' layout, or bundled:NAME; it is only read"
    )
    parser.add_argument("--data", required=True, help="the folder of the training pictures (UTKFace, 128 px)")
    parser.add_argument("--heldout", default="utkface128_heldout")
    parser.add_argument("--out", type=Path, required=True, help="the folder of the trained model; it must not exist")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args(arguments)
    try:
        train(args)
    except UserError as error:
        raise SystemExit(f"train_gpu: {error}") from error


def train(args: argparse.Namespace) -> None:
    refuse("--minutes", args.minutes, number(0, 1e6))
    refuse("--batch", args.batch, whole(2, 10**6))
    refuse("--learning-rate", args.learning_rate, number(1e-12, 10))
    refuse("--seed", args.seed, whole(0, 2**63 - 1))
    refuse("--device", args.device, DEVICE)
    source = LatentDiffusion(args.model).folder
    if args.out.exists():
        raise BadSetting(f"--out {args.out} exists already; choose another folder, or remove it")
    if not any((source / kind).is_dir() for kind in KINDS[args.part]):
        raise BadSetting(
            f"--model {args.model}: {args.part} needs one of the folders {', '.join(KINDS[args.part])} there"
        )
    torch.manual_seed(args.seed)
    torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
    trained_on, heldout = load_pictures(args.data, SIDE, args.heldout)
    pictures = Pictures(trained_on.to(args.device))
    part = {"network": network, "decoder": decoder}[args.part](source, pictures, heldout, args.batch)
    fit = Fit([p for p in part.net.parameters() if p.requires_grad], part.loss)
    report: list[Row] = []
    for row in training(fit, args.batch, args.learning_rate, args.minutes, part.measure):
        report.append(row)
        print("  ".join(f"{name} {value:.5g}" for name, value in row.items()), flush=True)
        if "loss" not in row and row["step"]:  # the network holds the averaged weights
            write(source, part, report, args.out)


if __name__ == "__main__":
    main()
