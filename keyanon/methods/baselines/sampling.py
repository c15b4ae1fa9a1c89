"""What the diffusion rivals share: one step down with fresh noise, an inpainting network's extra inputs, noise by id.

From level (a, s) to (a', s') with share eta of fresh noise (DDIM, arXiv 2010.02502, eq. 12 and 16):

    sigma = eta s'/s sqrt(1 - a^2/a'^2),      z' = a' (z - s e) / a + sqrt(s'^2 - sigma^2) e + sigma n

In the variable z / a and the noise level s / a this is Euler's method for eta = 0 and the ancestral Euler method for eta = 1, so
that one formula is every sampler used here.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate

from keyanon.channel.nonces import contexts_of, nonce_for
from keyanon.channel.streams import normals
from keyanon.diffusion.model import BadModel, LatentDiffusion
from keyanon.diffusion.solvers import move
from keyanon.types import Anonymizer, Denoiser, Image, Key, Latent, Mask

Level = tuple[float, float]  # (a, s)


def step(z: Latent, e: Latent, here: Level, there: Level, eta: float, noise: Latent) -> Latent:
    """z' of the formula above."""
    sigma = spread(here, there, eta)
    return mean(z, e, here, there, eta) + sigma * noise


def mean(z: Latent, e: Latent, here: Level, there: Level, eta: float) -> Latent:
    """z' without its fresh noise."""
    a, s = there
    return move(z, e, here, (a, math.sqrt(max(s**2 - spread(here, there, eta) ** 2, 0.0))))


def spread(here: Level, there: Level, eta: float) -> float:
    """sigma."""
    return eta * there[1] / here[1] * math.sqrt(max(1 - (here[0] / there[0]) ** 2, 0.0))


def denoiser(backbone: LatentDiffusion, images: Image, mask: Mask) -> Denoiser:
    """eps(z, t) of a model that may be an inpainting one; `mask` (b 1 h w) is True on the pixels to be made.

    An inpainting network sees the latent, the mask (each cell's first pixel) and the encoded picture with the masked pixels
    at mid grey: 2 c + 1 channels.
    """
    kept = backbone.encode(images * ~mask)
    channels = backbone.unet.config.in_channels
    if channels == kept.shape[1]:
        return backbone.eps
    if channels != 2 * kept.shape[1] + 1:
        raise BadModel(
            f"{backbone.source}: a network of {channels} input channels on latents of {kept.shape[1]} is neither a plain "
            "nor an inpainting one"
        )
    given = torch.cat([interpolate(mask.to(kept), kept.shape[-2:], mode="nearest"), kept], 1)
    return lambda z, t: backbone.eps(torch.cat([z, given], 1), t)


def keyed_normals(
    method: Anonymizer, keys: Sequence[Key], ids: Sequence[str], images: Image, purpose: str, shape: tuple[int, ...]
) -> Tensor:
    """Standard normal numbers (b, *shape): each picture's from its own key, id and pixels, and the method, whatever its batch.

    The rivals draw theirs from a seed that they forget. Ours come from the key so that a run repeats; nothing recovers with it.
    """
    contexts = contexts_of(method, nonce_for, keys, ids, images)
    noise = [normals(key, context, purpose, shape) for key, context in zip(keys, contexts, strict=True)]
    return torch.stack(noise).to(images.device, torch.float32)


def resized(images: Float[Tensor, "b c h w"], size: tuple[int, int]) -> Float[Tensor, "b c u v"]:
    """Bicubic, smoothed where it makes smaller; the same pictures where they have that size."""
    if images.shape[-2:] == size:
        return images
    return interpolate(images, size, mode="bicubic", align_corners=False, antialias=True)
