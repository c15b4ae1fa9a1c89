"""A latent that needs no training: the lowest coefficients of an orthonormal 8x8 block DCT, standardized.

    z[c, u, v] = (<x_ycc[block u, v], basis_c> - mean_c) / std_c,      x = sum_c (std_c z_c + mean_c) basis_c

With the basis orthonormal, E(D(z)) = z to rounding for every z: unlike a learned autoencoder it loses nothing on the way
back, and D(E(x)) is the projection of x on the kept coefficients. Pixels become channels at 1/8 of the size,
as in DCTdiff (arXiv 2412.15032), whose finding that diffusion models train well on such coefficients this rests on.
"""

import math
from collections.abc import Sequence
from typing import Annotated

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import Tensor
from torch.nn.functional import conv2d, conv_transpose2d, normalize

from keyanon.errors import BadSetting
from keyanon.settings import refuse, whole
from keyanon.types import Image, Latent

BLOCK = 8


def ycc_rotation() -> Tensor:
    """3x3 orthogonal matrix, rows luma, blue difference, red difference; grey pixels have no colour difference.

    JPEG's YCbCr is not orthogonal. With its luma weights as first row, an orthogonal matrix would put grey detail in
    the colour planes, which cost 4 dB on faces with three coefficients kept there.
    """
    luma, blue, red = [1.0, 1.0, 1.0], [-1.0, -1.0, 2.0], [1.0, -1.0, 0.0]
    return normalize(torch.tensor([luma, blue, red], dtype=torch.float64))


def dct_matrix(n: int = BLOCK) -> Tensor:
    """n x n orthonormal DCT-II matrix, row k the k-th cosine."""
    k, x = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)[None]
    rows = torch.cos(math.pi * k * (x + 0.5) / n) * math.sqrt(2 / n)
    rows[0] /= math.sqrt(2)
    return rows


def zigzag(n: int = BLOCK) -> list[tuple[int, int]]:
    """The n*n (row, column) frequencies, lowest first: by row + column, then nearest to the diagonal, then row."""
    cells = [(i, j) for i in range(n) for j in range(n)]
    return sorted(cells, key=lambda ij: (ij[0] + ij[1], abs(ij[0] - ij[1]), ij[0]))


def block_dct_filters(luma: int, chroma: int) -> Tensor:
    """Orthonormal analysis filters (luma + 2 chroma, 3, 8, 8): the lowest `luma` and twice `chroma` coefficients."""
    dct, ycc = dct_matrix(), ycc_rotation()
    kept = [(0, ij) for ij in zigzag()[:luma]] + [(plane, ij) for plane in (1, 2) for ij in zigzag()[:chroma]]
    return torch.stack([ycc[plane][:, None, None] * torch.outer(dct[i], dct[j]) for plane, (i, j) in kept])


Kept = Annotated[int, whole(1, BLOCK**2)]  # coefficients of a block


class BlockDCT(ConfigMixin):  # type: ignore[misc]
    """Encoder and decoder of the block-DCT latent; a config file and no weights, as a diffusers scheduler is.

    Args:
        luma: luma coefficients kept of each block.
        chroma: coefficients kept of each of the two colour planes.
        mean, std: per channel, of the training pictures, over which latents then have mean 0 and standard deviation 1.
    """

    config_name = "config.json"

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self, luma: Kept = 10, chroma: Kept = 3, mean: Sequence[float] = (), std: Sequence[float] = ()
    ) -> None:
        for name, count in (("luma", luma), ("chroma", chroma)):
            refuse(f"BlockDCT.{name}", count, Kept)
        channels = luma + 2 * chroma
        for name, values in (("mean", mean), ("std", std)):
            refuse(f"BlockDCT.{name}", values, Sequence[float])
            if len(values) not in (0, channels):
                raise BadSetting(f"BlockDCT: {name} has {len(values)} values for {channels} channels")
        self._filters = block_dct_filters(luma, chroma)
        self._mean = torch.tensor(mean or [0.0] * channels, dtype=torch.float64).view(1, channels, 1, 1)
        self._std = torch.tensor(std or [1.0] * channels, dtype=torch.float64).view(1, channels, 1, 1)

    def encode(self, images: Image) -> Latent:
        """Latents (b, luma + 2 chroma, h / 8, w / 8) of images in [-1, 1]."""
        coefficients = conv2d(images, self._filters.to(images), stride=BLOCK)
        return (coefficients - self._mean.to(images)) / self._std.to(images)

    def decode(self, latents: Latent) -> Image:
        """Images of latents; not clipped to [-1, 1], so that encode(decode(z)) = z."""
        coefficients = latents * self._std.to(latents) + self._mean.to(latents)
        return conv_transpose2d(coefficients, self._filters.to(latents), stride=BLOCK)
