"""Which pictures share a key stream: the public nonce of each picture.

    nonce = K.stream(SHA-256(length, settings | length, id | length, attempt | length, shape | length, pixels), "nonce", 24 bytes)

`settings` is everything that decides what the method publishes of a picture. So a run repeats to the last bit, and two files that
differ never share a key stream (the idea of RFC 5297).
"""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from keyanon.channel.description import described, everything
from keyanon.context import NONCE_BYTES, Context, joined
from keyanon.errors import BadSetting
from keyanon.types import Dataset, Image, Key, Picture

log = logging.getLogger(__name__)


@runtime_checkable
class Nonces(Protocol):
    """Which pictures share a key stream: those of equal nonces, if they are made with equal settings."""

    def __call__(self, key: Key, settings: bytes, id: str, picture: Picture, attempt: int = 0) -> bytes: ...


def nonce_for(key: Key, settings: bytes, id: str, picture: Picture, attempt: int = 0) -> bytes:
    """The nonce of a picture, its own: pseudorandom, and a function of key, settings, id, pixels and attempt at publishing."""
    pixels = picture.cpu().float()
    shape = str(tuple(pixels.shape))
    told = joined(
        settings, id.encode("utf-8", "surrogateescape"), b"%d" % attempt, shape.encode(), pixels.numpy().tobytes()
    )
    return key.stream(Context(hashlib.sha256(told).digest()), "nonce", NONCE_BYTES)


def contexts_of(
    method: Any, nonces: Nonces, keys: Sequence[Key], ids: Sequence[str], pictures: Image, attempt: int = 0
) -> list[Context]:
    """What selects the key streams of pictures that a method is about to publish."""
    description, settings = described(method), everything(method)
    return [
        Context(nonces(key, settings, id, picture, attempt), description)
        for key, id, picture in zip(keys, ids, pictures, strict=True)
    ]


@dataclass(frozen=True)
class PerIdentity:
    """One key stream for all pictures of a person, at every attempt. Equal nonces also show which pictures belong together."""

    dataset: Dataset

    def __post_init__(self) -> None:
        log.warning(
            "one key stream for each person: who has one picture of a person before and after can undo the others, and "
            "all can see which pictures show the same person"
        )

    def __call__(self, key: Key, settings: bytes, id: str, picture: Picture, attempt: int = 0) -> bytes:
        person = self.dataset.identity(id)
        if person is None:
            raise BadSetting(f"nonce=per_identity: the dataset does not say who is on {id}; take nonce=per_image")
        return key.stream(Context(hashlib.sha256(person.encode()).digest()), "nonce|identity", NONCE_BYTES)


@dataclass(frozen=True)
class OneForAll:
    """One key stream for every picture and attempt: the paper's single secret key."""

    def __post_init__(self) -> None:
        log.warning("one key stream for all pictures: who has one picture before and after can undo all others")

    def __call__(self, key: Key, settings: bytes, id: str, picture: Picture, attempt: int = 0) -> bytes:
        return key.stream(Context(b""), "nonce|all", NONCE_BYTES)
