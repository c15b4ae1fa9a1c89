"""Train this project's own models: `python -m experiments.train --config-name faces128 data.root=...`.

A diffusion model (configurations with `unet`), in the latent of a fixed or an already trained autoencoder:

    z0 = E(x),  z_t = sqrt(abar_t) z0 + sqrt(1 - abar_t) eps,  v = sqrt(abar_t) eps - sqrt(1 - abar_t) z0
    minimize  sum_c w_c |v_c - net(z_t, t)_c|^2                                       (v: arXiv 2202.00512, eq. 12)

On the block-DCT latent w_c ~ sqrt(std of channel c in pixels) spends the network on the coefficients that carry most of the
picture; on a learned latent w = 1. Timesteps are stratified over the batch.

An autoencoder (configurations with `vae`), without adversary or perceptual loss:

    q(z | x) = N(mu(x), sigma(x)^2),  z = mu + sigma eps                                              (arXiv 1312.6114)
    minimize  |x - D(z)|_1 + lambda KL(q | N(0, 1)) + rho |mu(D(z')) - z'|^2,  z' = z + s eps'

The last term, on half of each batch, asks of the encoder to read from a picture the latent it was drawn from: what is published
is a picture, and what a receiver needs is its latent.

The exported model is the exponential moving average of the weights, in half precision.
"""

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hydra
import torch
from diffusers import AutoencoderKL, UNet2DModel
from diffusers.models.resnet import ResnetBlock2D
from omegaconf import DictConfig
from torch import Tensor

from experiments.harness.command import in_one_line
from experiments.harness.made import made
from experiments.harness.training import Task, check, fit, halved, load_pictures
from keyanon.channel.pixels import to_floats
from keyanon.types import Bytes, Image

log = logging.getLogger(__name__)

STATS_PICTURES = 4096


def diffusion(cfg: DictConfig, pictures: Bytes) -> Task:
    device = torch.device(cfg.device)
    sample = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(cfg.seed))[:STATS_PICTURES]
    if "latent" in cfg:
        raw = made(cfg, "latent")
        coefficients = torch.cat([raw.encode(to_floats(part)) for part in pictures[sample].split(256)])
        std, mean = coefficients.std((0, 2, 3)), coefficients.mean((0, 2, 3))
        latent = made(cfg, "latent", mean=mean.tolist(), std=std.tolist())
        weight = (std.sqrt() / std.sqrt().mean()).view(1, -1, 1, 1).to(device)
        encode = latent.encode
    else:
        latent = AutoencoderKL.from_pretrained(Path(cfg.autoencoder) / "vae").to(device).eval().requires_grad_(False)
        latent.to(memory_format=torch.channels_last)
        weight = torch.ones(1, device=device)

        def encode(images: Image) -> Tensor:
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
                mode: Tensor = latent.encode(images.contiguous(memory_format=torch.channels_last)).latent_dist.mode()
            return mode.float() * float(latent.config.scaling_factor)

    scheduler = made(cfg, "scheduler")
    alpha_bar = scheduler.alphas_cumprod.to(device)
    net = made(cfg, "unet").to(device, memory_format=torch.channels_last)
    if "begin_with" in cfg:
        load_agreeing(net, UNet2DModel.from_pretrained(Path(cfg.begin_with) / "unet").state_dict())
    forward = torch.compile(net) if cfg.compile else net

    def loss(images: Image, generator: torch.Generator) -> Tensor:
        z0, b = encode(images), len(images)
        strata = (torch.randperm(b, generator=generator) + torch.rand(b, generator=generator)) / b
        t = (strata * len(alpha_bar)).long().to(device)
        noise = torch.randn(z0.shape, generator=generator).to(device)
        a, s = alpha_bar[t].sqrt().view(-1, 1, 1, 1), (1 - alpha_bar[t]).sqrt().view(-1, 1, 1, 1)
        z_t, v = a * z0 + s * noise, a * noise - s * z0
        with torch.autocast(device.type, torch.bfloat16):
            prediction = forward(z_t.contiguous(memory_format=torch.channels_last), t).sample
        return torch.mean(weight * (prediction.float() - v) ** 2)

    def export() -> None:
        folder = Path(cfg.export)
        halved(net).save_pretrained(folder / "unet")
        if "latent" in cfg:
            latent.save_config(folder / "latent")
        scheduler.save_pretrained(folder / "scheduler")
        part = ["latent", type(latent).__module__] if "latent" in cfg else ["vae", "diffusers"]
        index = {
            "_class_name": "LDMPipeline",
            part[0]: [part[1], type(latent).__name__],
            "scheduler": ["diffusers", type(scheduler).__name__],
            "unet": ["diffusers", type(net).__name__],
        }
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")

    return Task(net, loss, export)


def autoencoder(cfg: DictConfig, pictures: Bytes) -> Task:
    device = torch.device(cfg.device)
    net = made(cfg, "vae").to(device, memory_format=torch.channels_last)
    with torch.no_grad():
        # As diffusers starts them, the decoder sees noise of sigma = 1 only and learns a constant. So: log sigma^2 = -6,
        # and residual blocks that begin as the identity.
        net.quant_conv.bias[net.config.latent_channels :] = -6.0
        for block in net.modules():
            if isinstance(block, ResnetBlock2D):
                block.conv2.weight.zero_()
                block.conv2.bias.zero_()
                if cfg.compile:
                    # Block by block: compiled as a whole, on a CPU in bf16, the upsampling passes a gradient of zero back.
                    block.compile()

    factor = 2 ** (len(net.config.block_out_channels) - 1)
    shape = (net.config.latent_channels, cfg.data.size // factor, cfg.data.size // factor)

    def loss(images: Image, generator: torch.Generator) -> Tensor:
        noise, shift = torch.randn(2, len(images), *shape, generator=generator).to(device)
        half = len(images) // 2
        with torch.autocast(device.type, torch.bfloat16):
            posterior = net.encode(images.contiguous(memory_format=torch.channels_last)).latent_dist
            z = posterior.mean + posterior.std * noise
            rebuilt = net.decode(z).sample
            drawn = z[:half].detach() + cfg.roundtrip_noise * shift[:half]
            read = net.encode(net.decode(drawn).sample).latent_dist.mean
        distance: Tensor = (rebuilt.float() - images).abs().mean()
        divergence: Tensor = posterior.kl().float().mean() / math.prod(shape)
        missed: Tensor = (read.float() - drawn.float()).square().mean()
        return distance + float(cfg.kl_weight) * divergence + float(cfg.roundtrip_weight) * missed

    def export() -> None:
        """Latents are scaled to a standard deviation of 1 over the training pictures, as in LDM (arXiv 2112.10752, G)."""
        sample = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(cfg.seed))[:256]
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # these shapes shall compile nothing anew
            modes = [net.encode(to_floats(part).to(device)).latent_dist.mode() for part in pictures[sample].split(64)]
        half = halved(net)
        half.register_to_config(scaling_factor=1 / torch.cat(modes).std().item())
        half.save_pretrained(Path(cfg.export) / "vae")

    return Task(net, loss, export)


def load_agreeing(net: Any, trained: Mapping[str, Tensor]) -> None:
    """Give `net` those trained weights that have its names and shapes; the others stay as they were drawn."""
    shapes = {name: value.shape for name, value in net.state_dict().items()}
    agreeing = {name: value for name, value in trained.items() if shapes.get(name) == value.shape}
    net.load_state_dict(agreeing, strict=False)
    log.info("%d of %d tensors begin with trained weights", len(agreeing), len(shapes))


@hydra.main(config_path="../conf/train", config_name=None, version_base="1.3")
def main(cfg: DictConfig) -> None:
    with in_one_line():
        check(cfg)
        train(cfg)


def train(cfg: DictConfig) -> None:
    torch.manual_seed(cfg.seed)
    torch.set_num_threads(cfg.threads)
    pictures, _ = load_pictures(cfg.data.root, cfg.data.size, cfg.data.heldout)
    log.info("%d training pictures", len(pictures))
    task = autoencoder(cfg, pictures) if "vae" in cfg else diffusion(cfg, pictures)
    optimizer = torch.optim.AdamW(task.net.parameters(), lr=cfg.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    fit(cfg, task, optimizer, pictures)


if __name__ == "__main__":
    main()
