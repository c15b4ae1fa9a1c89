"""What others make of a published picture; each attack, or bad channel, gives one more view.

Every attack sees the published file and its header. Those with a wrong key measure what a guess gives away; the JPEG ones hand a
damaged file to the rightful owner.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from keyanon import images as channel
from keyanon.keys import FlippedSigns, MasterKey
from keyanon.types import Image, Key, Published, Reversible


@dataclass(frozen=True)
class WrongKey:
    """Recovery with a random, unrelated master key, another one for each picture and `trial`."""

    trial: int = 0

    def __call__(self, published: Published, keys: Sequence[Key], method: Reversible) -> Image:
        wrong = [
            MasterKey(hashlib.sha256(b"wrong key %d|" % self.trial + header).digest()) for header in published.headers
        ]
        return method.recover(channel.to_floats(published.images), published.headers, wrong)


@dataclass(frozen=True)
class NearKey:
    """Recovery with the nearest wrong master key: one bit of it differs."""

    bit: int = 0

    def __call__(self, published: Published, keys: Sequence[Key], method: Reversible) -> Image:
        near = [key.with_bit_flipped(self.bit) for key in keys if isinstance(key, MasterKey)]
        if len(near) != len(keys):
            raise TypeError("near_key flips a bit of a master key; this run has other keys")
        return method.recover(channel.to_floats(published.images), published.headers, near)


@dataclass(frozen=True)
class PartialKey:
    """Recovery by one who holds the right signs but for a fraction of them, which are wrong (1.0: every sign)."""

    wrong: float

    def __call__(self, published: Published, keys: Sequence[Key], method: Reversible) -> Image:
        partial = [FlippedSigns(key, self.wrong) for key in keys]
        return method.recover(channel.to_floats(published.images), published.headers, partial)


@dataclass(frozen=True)
class Jpeg:
    """Recovery with the right key from a file that was saved as JPEG on its way."""

    quality: int

    def __call__(self, published: Published, keys: Sequence[Key], method: Reversible) -> Image:
        damaged = torch.stack([channel.jpeg(picture, self.quality) for picture in published.images])
        return method.recover(channel.to_floats(damaged), published.headers, keys)


@dataclass(frozen=True)
class FloatChannel:
    """Recovery with the right key from the decoder's unrounded floats, as the authors measure it. No file carries these."""

    def __call__(self, published: Published, keys: Sequence[Key], method: Reversible) -> Image:
        if published.floats is None:
            raise ValueError("recovered_float: this anonymizer publishes no floats")
        return method.recover(published.floats, published.headers, keys)
