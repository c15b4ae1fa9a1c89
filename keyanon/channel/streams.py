"""From a key's stream to secret signs and normal numbers."""

import numpy as np
import torch
from jaxtyping import Int8
from torch import Tensor

from keyanon.context import Context
from keyanon.types import Key

SIGNS = "signs"


def signs(key: Key, context: Context, shape: tuple[int, ...]) -> Int8[Tensor, "..."]:
    """The secret signs k in {-1, +1} of one latent (eq. 3), uniform and independent under a random key."""
    d = int(np.prod(shape))
    bits = np.unpackbits(np.frombuffer(key.stream(context, SIGNS, -(-d // 8)), np.uint8))[:d]
    return torch.from_numpy(2 * bits.astype(np.int8) - 1).view(shape)


def normals(key: Key, context: Context, purpose: str, shape: tuple[int, ...]) -> Tensor:
    """Pseudorandom standard normal numbers in float64, by Box and Muller's formula from 32-bit words of the key stream."""
    d = int(np.prod(shape))
    words = np.frombuffer(key.stream(context, purpose, 8 * -(-d // 2)), "<u4").reshape(2, -1).astype(np.float64)
    radius, angle = np.sqrt(-2 * np.log((words[0] + 0.5) / 2**32)), 2 * np.pi * words[1] / 2**32
    return torch.from_numpy(np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:d]).view(shape)


def ciphered(data: bytes, key: Key, context: Context, purpose: str) -> bytes:
    """Encrypts, and decrypts."""
    return bytes(a ^ b for a, b in zip(data, key.stream(context, purpose, len(data)), strict=True))
