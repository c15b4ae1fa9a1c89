"""The jump at the face's border, faded into the face by the sender and taken out again by the receiver.

A drawn face ends at the border of its cells, where another picture begins. For each edge k between a cell of the face and one
outside, at its midpoint m_k,

    d_k = mean over the edge of (x outside - x' inside)              3 numbers, in the header: a byte each
    c(p) = sum_k w_k(p) d_k / (sum_k w_k(p) + fade),   w_k(p) = exp(-|p - m_k|^2 / 2 reach^2)

and the file carries x' + c on the face's pixels. Close to an edge c is about its jump, further inside nothing. Anyone can compute c
from the header, and x' from c: it says nothing that the published picture does not say. (After the membranes of Poisson image
editing, Pérez et al., SIGGRAPH 2003; a sum of Gaussians rather than a harmonic function, to stay near the border.)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from keyanon.channel.headers import BadHeader
from keyanon.settings import Positive, checked
from keyanon.types import Image, Mask

LEVEL = 1 / 64  # of a jump, on the pictures' scale: a byte holds -2 .. 2
FADE = 0.3
SIDES = ((0, 1), (0, -1), (1, 0), (-1, 0))


@checked
@dataclass(frozen=True)
class Seam:
    """Softens the border of the face.

    Args:
        reach: of c into the face, in cells.
    """

    reach: Positive = 1.0

    def jumps(self, images: Image, decoded: Image, mask: Mask) -> list[bytes]:
        """d for each picture: 3 bytes an edge, edges in the order of `edges`; `images` outside, `decoded` inside."""
        size = images.shape[-1] // mask.shape[-1]
        codes = []
        for image, inside, cells in zip(images.cpu(), decoded.cpu(), mask[:, 0].cpu(), strict=True):
            means = [
                (
                    strip(image, row + down, column + right, (-down, -right), size)
                    - strip(inside, row, column, (down, right), size)
                ).mean(1)
                for row, column, down, right in edges(cells)
            ]
            jumps = torch.stack(means) if means else torch.zeros(0, 3)
            codes.append((jumps / LEVEL).round().clamp(-127, 127).to(torch.int8).numpy().tobytes())
        return codes

    def membrane(self, codes: Sequence[bytes], mask: Mask, like: Image) -> Image:
        """c (b 3 h w), float32 from double precision; raises BadHeader where the codes do not fit the mask's border."""
        return torch.stack(
            [self._membrane(code, cells, like) for code, cells in zip(codes, mask[:, 0].cpu(), strict=True)]
        ).to(like)

    def _membrane(self, code: bytes, cells: Tensor, like: Image) -> Float[Tensor, "3 h w"]:
        there = edges(cells)
        if len(code) != 3 * len(there):
            raise BadHeader(
                f"the header carries {len(code)} bytes for the face's border, {3 * len(there)} are expected: it is damaged"
            )
        d = torch.from_numpy(np.frombuffer(code, np.int8).astype(np.float64)).view(-1, 3) * LEVEL
        height, width = like.shape[-2:]
        size = width // cells.shape[1]
        middle = torch.tensor([(row + 0.5 + down / 2, column + 0.5 + right / 2) for row, column, down, right in there])
        middle = middle.double().view(-1, 2) * size
        rows, columns = torch.arange(height) + 0.5, torch.arange(width) + 0.5
        # The Gaussian of a distance is a product of one for each axis.
        down, across = (
            torch.exp(-(axis[None] - middle[:, k, None]).square() / (2 * (self.reach * size) ** 2))
            for k, axis in enumerate((rows, columns))
        )
        weight = down.T @ across
        return torch.einsum("kc,kh,kw->chw", d, down, across) / (weight + FADE)


def edges(cells: Tensor) -> list[tuple[int, int, int, int]]:
    """(row, column, down, right) of each side of a face's cell (u v) with a cell beyond it that is not of the face."""
    height, width = cells.shape
    face = cells.tolist()
    return [
        (row, column, down, right)
        for row in range(height)
        for column in range(width)
        for down, right in SIDES
        if face[row][column]
        and 0 <= row + down < height
        and 0 <= column + right < width
        and not face[row + down][column + right]
    ]


def strip(
    picture: Float[Tensor, "3 h w"], row: int, column: int, side: tuple[int, int], size: int
) -> Float[Tensor, "3 n"]:
    """The cell's pixels along one of its sides."""
    cell = picture[:, row * size : (row + 1) * size, column * size : (column + 1) * size]
    down, right = side
    if down:
        return cell[:, -1 if down > 0 else 0, :]
    return cell[:, :, -1 if right > 0 else 0]
