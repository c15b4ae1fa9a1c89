"""Which pictures share a key stream: the public nonce of each picture."""

import hashlib
import logging
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from keyanon.channel.keys import NONCE_BYTES
from keyanon.errors import BadSetting
from keyanon.types import Dataset, Key, Picture

log = logging.getLogger(__name__)


@runtime_checkable
class Nonces(Protocol):
    """Which pictures share a key stream: those of equal nonces."""

    def __call__(self, key: Key, id: str, picture: Picture, attempt: int = 0) -> bytes: ...


def nonce_for(key: Key, id: str, picture: Picture, attempt: int = 0) -> bytes:
    """The nonce of a picture, its own: pseudorandom, and a function of key, id, pixels and the attempt at publishing it.

    So a run repeats to the last bit, and two different pictures never share a key stream (the idea of RFC 5297).
    """
    name = f"{id}|{attempt}" if attempt else id
    digest = hashlib.sha256(name.encode() + b"\0" + picture.cpu().float().numpy().tobytes()).digest()
    return key.stream(digest, "nonce", NONCE_BYTES)


@dataclass(frozen=True)
class PerIdentity:
    """One key stream for all pictures of a person, at every attempt. Equal nonces also show which pictures belong together."""

    dataset: Dataset

    def __post_init__(self) -> None:
        log.warning(
            "one key stream for each person: who has one picture of a person before and after can undo the others, and "
            "all can see which pictures show the same person"
        )

    def __call__(self, key: Key, id: str, picture: Picture, attempt: int = 0) -> bytes:
        person = self.dataset.identity(id)
        if person is None:
            raise BadSetting(f"nonce=per_identity: the dataset does not say who is on {id}; take nonce=per_image")
        return key.stream(hashlib.sha256(person.encode()).digest(), "nonce|identity", NONCE_BYTES)


@dataclass(frozen=True)
class OneForAll:
    """One key stream for every picture and attempt: the paper's single secret key."""

    def __post_init__(self) -> None:
        log.warning("one key stream for all pictures: who has one picture before and after can undo all others")

    def __call__(self, key: Key, id: str, picture: Picture, attempt: int = 0) -> bytes:
        return key.stream(b"", "nonce|all", NONCE_BYTES)
