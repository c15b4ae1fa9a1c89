"""From a key's stream to secret signs, orders and normal numbers, and to a cipher."""

import numpy as np
import torch
from jaxtyping import Int8, Int64
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


def orders(key: Key, context: Context, purpose: str, rows: int, n: int) -> Int64[Tensor, "rows n"]:
    """A random order of n things for each row: that of 64-bit words, two of which are equal with a chance below n^2 / 2^64."""
    words = np.frombuffer(key.stream(context, purpose, 8 * rows * n), "<u8").reshape(rows, n)
    return torch.from_numpy(words.argsort(axis=1, kind="stable"))


def ciphered(data: bytes, key: Key, context: Context, purpose: str) -> bytes:
    """Encrypts, and decrypts."""
    return bytes(a ^ b for a, b in zip(data, key.stream(context, purpose, len(data)), strict=True))
