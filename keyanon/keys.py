"""From one master key to the secret signs of each picture.

    K_img = HKDF-SHA256(master, salt = nonce, info = "keyanon/1|" purpose)        RFC 5869
    bits  = ChaCha20(K_img, 0) keystream                                          RFC 8439
    k     = 2 b - 1 in {-1, +1}^d                                                 arXiv 2510.01031, eq. 3

Integer arithmetic only, so a key gives the same bits on every device and platform. The nonce is public and differs from
picture to picture: one known pair of a reused key stream would give the signs away (recovery = original, for all its pictures).
"""

import hashlib
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from jaxtyping import Int8
from torch import Tensor

from keyanon.types import Key, Picture

KEY_BYTES = 32
NONCE_BYTES = 24
SIGNS = "signs"


class BadKey(Exception):
    """A key file that is missing, malformed or readable by others."""


@dataclass(frozen=True)
class MasterKey:
    """32 secret bytes. They are kept out of repr, and nothing here writes them anywhere but to a key file."""

    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.secret) != KEY_BYTES:
            raise BadKey(f"a master key has {KEY_BYTES} bytes, this one {len(self.secret)}")

    def stream(self, nonce: bytes, purpose: str, size: int) -> bytes:
        """`size` pseudorandom bytes for this nonce and purpose."""
        info = b"keyanon/1|" + purpose.encode()
        key = HKDF(hashes.SHA256(), KEY_BYTES, salt=nonce, info=info).derive(self.secret)
        return Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor().update(bytes(size))

    @property
    def fingerprint(self) -> str:
        """16 hex digits that tell keys apart and give nothing away; the only thing of a key that is ever logged."""
        return self.stream(b"", "fingerprint", 8).hex()

    def with_bit_flipped(self, bit: int = 0) -> "MasterKey":
        """The nearest wrong key: one bit of the secret differs."""
        flipped = bytearray(self.secret)
        flipped[bit // 8] ^= 1 << (bit % 8)
        return MasterKey(bytes(flipped))


def experiment_key(seed: int = 0) -> MasterKey:
    """A key that anyone can compute from its seed: experiments on public data repeat with it, and it protects nobody."""
    return MasterKey(hashlib.sha256(b"keyanon experiment key %d" % seed).digest())


def read_key(path: str | Path) -> MasterKey:
    """The master key of a key file: 64 hex digits, readable by its owner alone."""
    path = Path(path)
    try:
        text, mode = path.read_text(encoding="ascii").strip(), path.stat().st_mode
    except FileNotFoundError:
        raise BadKey(f"key.path: no key file {path}; make one with: python -m experiments.keys new {path}") from None
    except UnicodeDecodeError:
        raise BadKey(f"key.path: {path} is not a key file ({2 * KEY_BYTES} hex digits)") from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise BadKey(f"key.path: {path} can be read by others; run: chmod 600 {path}")
    try:
        secret = bytes.fromhex(text)
    except ValueError:
        raise BadKey(f"key.path: {path} is not a key file ({2 * KEY_BYTES} hex digits)") from None
    if len(secret) != KEY_BYTES:
        size = f"{path} holds {len(secret)} bytes, a master key has {KEY_BYTES}"
        raise BadKey(f"key.path: {size}; make one with: python -m experiments.keys new PATH")
    return MasterKey(secret)


def write_new_key(path: str | Path) -> MasterKey:
    """Draw a fresh master key and write it to a new file that only its owner can read; an existing file is refused."""
    key = MasterKey(os.urandom(KEY_BYTES))
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise BadKey(f"{path} exists; a key file is never overwritten") from None
    with os.fdopen(descriptor, "w") as file:
        file.write(key.secret.hex() + "\n")
    return key


def nonce_for(key: Key, id: str, picture: Picture) -> bytes:
    """The nonce of a picture: pseudorandom, and a function of key, id and pixels.

    So a run repeats to the last bit, and two different pictures never share a key stream (the idea of RFC 5297).
    """
    digest = hashlib.sha256(id.encode() + b"\0" + picture.cpu().float().numpy().tobytes()).digest()
    return key.stream(digest, "nonce", NONCE_BYTES)


def signs(key: Key, nonce: bytes, shape: tuple[int, ...]) -> Int8[Tensor, "..."]:
    """The secret signs k in {-1, +1} of one latent (eq. 3), uniform and independent under a random key."""
    d = int(np.prod(shape))
    bits = np.unpackbits(np.frombuffer(key.stream(nonce, SIGNS, -(-d // 8)), np.uint8))[:d]
    return torch.from_numpy(2 * bits.astype(np.int8) - 1).view(shape)


def normals(key: Key, nonce: bytes, purpose: str, shape: tuple[int, ...]) -> Tensor:
    """Pseudorandom standard normal numbers in float64, by Box and Muller's formula from 32-bit words of the key stream."""
    d = int(np.prod(shape))
    words = np.frombuffer(key.stream(nonce, purpose, 8 * -(-d // 2)), "<u4").reshape(2, -1).astype(np.float64)
    radius, angle = np.sqrt(-2 * np.log((words[0] + 0.5) / 2**32)), 2 * np.pi * words[1] / 2**32
    return torch.from_numpy(np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:d]).view(shape)


@dataclass(frozen=True)
class FlippedSigns:
    """The right key with a fraction of the signs, drawn at random for each picture, wrong: what a partial attack would hold."""

    key: Key
    fraction: float

    def stream(self, nonce: bytes, purpose: str, size: int) -> bytes:
        right = self.key.stream(nonce, purpose, size)
        if purpose != SIGNS:
            return right
        wrong = np.zeros(8 * size, np.uint8)
        wrong[: round(self.fraction * 8 * size)] = 1
        seed = int.from_bytes(hashlib.sha256(b"flipped signs" + nonce).digest()[:8], "big")
        np.random.default_rng(seed).shuffle(wrong)
        return bytes(a ^ b for a, b in zip(right, np.packbits(wrong).tobytes(), strict=True))
