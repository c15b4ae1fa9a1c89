"""The loop of arXiv 2510.01031 as its authors run it, for comparison: diffusers' schedulers step by step, nothing made faster.

Parameters and latents in fp32 and PyTorch's default memory layout, products as PyTorch's defaults have them (TF32 in convolutions
of a GPU), every latent kept on the device, attention as diffusers loads it, float pictures from one direction to the other.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMInverseScheduler, DDIMScheduler, UNet2DModel, VQModel
from torch import Tensor

from keyanon.diffusion.block_dct import BlockDCT
from keyanon.types import Image, Latent, Mask


@dataclass
class AuthorsLoop:
    """50 + 50 evaluations of the network a picture, for any unconditional model folder with a scheduler.

    Args:
        folder: unet, scheduler, and one of latent (the block DCT, which has no weights), vqvae, vae.
    """

    folder: Path
    device: str
    steps: int = 50
    evaluations: int = 0

    @cached_property
    def unet(self) -> Any:
        return UNet2DModel.from_pretrained(self.folder / "unet", torch_dtype=torch.float32).to(self.device).eval()

    @cached_property
    def autoencoder(self) -> Any:
        if (self.folder / "latent").is_dir():
            return BlockDCT.from_config(BlockDCT.load_config(self.folder / "latent"))
        name, kind = ("vqvae", VQModel) if (self.folder / "vqvae").is_dir() else ("vae", AutoencoderKL)
        return kind.from_pretrained(self.folder / name).to(self.device).eval()

    @torch.no_grad()
    def flip(self, images: Image, mask: Mask, signs: Tensor) -> Image:
        """Pictures in, unclipped pictures out; the same in both directions. `signs` is -1 or 1 in the latents' shape."""
        down = DDIMScheduler.from_pretrained(self.folder / "scheduler")
        up = DDIMInverseScheduler.from_config(down.config)
        for scheduler in (down, up):
            scheduler.set_timesteps(self.steps, device=self.device)
        z = self.encode(images.to(self.device))
        mask, signs = mask.to(self.device), signs.to(self.device)
        path = [z]
        for t in up.timesteps:
            z = up.step(self.noise(z, t), t, z).prev_sample
            path.append(z)
        z = torch.where(mask, signs * z, z)
        for level, t in zip(reversed(range(self.steps)), down.timesteps, strict=True):
            z = down.step(self.noise(z, t), t, z, eta=0.0).prev_sample
            z = torch.where(mask, z, path[level])
        return self.decode(z)

    def noise(self, z: Latent, t: Tensor) -> Latent:
        self.evaluations += len(z)
        out: Latent = self.unet(z, t).sample
        return out

    def encode(self, images: Image) -> Latent:
        encoded = self.autoencoder.encode(images)
        if isinstance(self.autoencoder, AutoencoderKL):
            encoded = encoded.latent_dist.mode() * self.autoencoder.config.scaling_factor
        z0: Latent = encoded.latents if isinstance(self.autoencoder, VQModel) else encoded
        return z0

    def decode(self, z: Latent) -> Image:
        if isinstance(self.autoencoder, AutoencoderKL):
            z = z / self.autoencoder.config.scaling_factor
        decoded = self.autoencoder.decode(z)
        images: Image = decoded if isinstance(self.autoencoder, BlockDCT) else decoded.sample
        return images
