"""What the published picture does not carry of its latent, sent along in the header.

    e = z'_0 - E(x' - c) on the face's cells,    code = zlib(round(e / step)), in 16 bits,    z'_0 = E(x' - c) + step * code

A latent whose decoder ignores some directions cannot be read back from pixels, whatever the bytes: faces128_kl keeps about 5 of 16
numbers of a cell. The loop amplifies what is missing; the residual closes it again, for bytes. It is a function of the published
latent alone, so it shows no more of the original than that does.
"""

import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from keyanon.channel.headers import BadHeader, inflated
from keyanon.types import Latent, Mask


def coded(error: Latent, mask: Mask, step: float) -> list[bytes]:
    """The code of each picture's error on its face: the low bytes of all numbers, then the high ones, which are much alike."""
    codes = (error / step).round().clamp(-(2**15), 2**15 - 1).to(torch.int16).cpu()
    return [
        zlib.compress(code[:, cells].numpy().astype("<i2").reshape(-1).view(np.uint8).reshape(-1, 2).T.tobytes(), 9)
        for code, cells in zip(codes, mask[:, 0].cpu(), strict=True)
    ]


def decoded(codes: Sequence[bytes], mask: Mask, like: Latent, step: float) -> Latent:
    """The errors (b c u v), 0 outside the face; raises BadHeader where a code is not one of its face."""
    out = torch.zeros_like(like)
    for residual, code, cells in zip(out, codes, mask[:, 0], strict=True):
        residual[:, cells] = step * numbers(code, len(residual), int(cells.sum())).to(residual)
    return out


def numbers(code: bytes, channels: int, cells: int) -> Tensor:
    size = 2 * channels * cells
    data = inflated(code, size)
    if data is None or len(data) != size:
        raise BadHeader(
            "the header's residual does not fit the latent: it is damaged, or the file was published with another model or method"
        )
    planes = np.frombuffer(data, np.uint8).reshape(2, -1)
    return torch.from_numpy(planes.T.copy().view("<i2").astype(np.int16).reshape(channels, cells))
