"""The public header: what a receiver needs besides pixels and key, carried in the PNG.

"KA" | version (1) | flags (1) | nonce (24) | [length (2) | sent bytes] | [length (2) | seam bytes]
     | [rows (1) | columns (1) | zlib(mask bits, row by row)]
"""

import zlib
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from keyanon.keys import NONCE_BYTES

MAGIC = b"KA"
VERSION = 1
HAS_MASK, HAS_SENT, HAS_SEAM = 1, 2, 4
FIXED = len(MAGIC) + 2 + NONCE_BYTES


class BadHeader(Exception):
    """A published file without a header, or with one that cannot be read."""


@dataclass(frozen=True)
class Header:
    """The nonce of a picture's key stream and, where the method keeps them, the face mask (1 u v) at latent size, what the
    keyed transform sends along (keyanon/transforms.py), and the jumps at the face's border (keyanon/seams.py).
    """

    nonce: bytes
    mask: Bool[Tensor, "1 u v"] | None = None
    sent: bytes = b""
    seam: bytes = b""

    def pack(self) -> bytes:
        parts = {HAS_SENT: self.sent, HAS_SEAM: self.seam}
        flags = sum(flag for flag, part in parts.items() if part) | (HAS_MASK if self.mask is not None else 0)
        packed = MAGIC + bytes([VERSION, flags]) + self.nonce
        for part in parts.values():
            packed += len(part).to_bytes(2, "little") + part if part else b""
        if self.mask is not None:
            _, u, v = self.mask.shape
            packed += bytes([u, v]) + zlib.compress(np.packbits(self.mask.cpu().numpy()).tobytes(), 9)
        return packed

    @staticmethod
    def unpack(data: bytes) -> "Header":
        if not data:
            raise BadHeader(
                "the file carries no keyanon header: it was not published by keyanon, or an editor removed it"
            )
        if len(data) < FIXED or not data.startswith(MAGIC):
            raise BadHeader("the keyanon header is damaged")
        version, flags = data[2], data[3]
        if version != VERSION:
            raise BadHeader(f"keyanon header version {version}: this program reads version {VERSION}")
        nonce, rest, parts = data[4:FIXED], data[FIXED:], []
        for flag in (HAS_SENT, HAS_SEAM):
            end = 2 + int.from_bytes(rest[:2], "little") if flags & flag else 0
            if len(rest) < end:
                raise BadHeader("the keyanon header is damaged")
            parts.append(rest[2:end])
            rest = rest[end:]
        sent, seam = parts
        if not flags & HAS_MASK:
            return Header(nonce, None, sent, seam)
        try:
            u, v = rest[0], rest[1]
            size = -(-u * v // 8)
            bits = zlib.decompressobj().decompress(rest[2:], size)
            mask = np.unpackbits(np.frombuffer(bits, np.uint8))[: u * v].reshape(1, u, v)
        except (IndexError, ValueError, zlib.error):
            raise BadHeader("the keyanon header's mask is damaged") from None
        return Header(nonce, torch.from_numpy(mask.astype(bool)), sent, seam)
