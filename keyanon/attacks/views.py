"""What others make of a published picture; each attack, or bad channel, gives one more view.

Every attack sees the published file and its header. Those with a wrong key measure what a guess gives away, the one without a key
what there is to see for all; the JPEG ones hand a damaged file to the rightful owner. None of them looks at the tag, which would
stop them all.

The authors hand on the decoder's floats in the place of the file, and find the face on these (docs/protocol.md): `channel` and
`mask`. A method without floats of its own is recovered from its bytes all the same.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal, TypeVar

import numpy as np
import torch

from keyanon.channel.headers import FIXED
from keyanon.channel.keys import KEY_BYTES, MasterKey
from keyanon.channel.pixels import jpeg, to_floats
from keyanon.channel.streams import SIGNS
from keyanon.context import Context
from keyanon.errors import BadSetting
from keyanon.settings import Quality, Setting, Share, Shares, checked, whole
from keyanon.types import (
    Attack,
    Authenticates,
    Image,
    Key,
    Published,
    RecoversFloats,
    Reversible,
    RunsWithoutKey,
    View,
)

Qualities = Annotated[Sequence[Quality], Setting("a list of whole numbers from 1 to 100, at least one", len)]
AnyReversible = TypeVar("AnyReversible", bound=Reversible)
Channel = Literal["file", "floats"]


def by_view(attacks: Mapping[str, Attack | Mapping[str, Attack]]) -> dict[str, Attack]:
    """Attacks by the view that each makes, from those of a configuration, where one entry may make several views."""
    views: dict[str, Attack] = {}
    for name, attack in attacks.items():
        views |= attack if isinstance(attack, Mapping) else {name: attack}
    return views


@checked
@dataclass(frozen=True)
class WrongKey:
    """Recovery with a random, unrelated master key, another one for each picture and `trial`.

    Args:
        channel: what it is tried on, the 8-bit "file" or, as the authors do, the "floats".
        mask: what the face is looked for on where the channel is "floats".
    """

    trial: Annotated[int, whole(0, 10**9)] = 0
    channel: Channel = "file"
    mask: Channel = "file"
    meaning: ClassVar = View("attacked")

    @property
    def reads_floats(self) -> bool:
        return self.channel == "floats"

    def __call__(self, published: Published, keys: Sequence[Key], method: Reversible) -> Image:
        # Of the header only what comes before the pixels are known: a tag would make the key depend on their last bit.
        starts = [header[:FIXED] for header in published.headers]
        wrong = [MasterKey(hashlib.sha256(b"wrong key %d|" % self.trial + start).digest()) for start in starts]
        return received(published, wrong, method, self.channel, self.mask)


@checked
@dataclass(frozen=True)
class NearKey:
    """Recovery with the nearest wrong master key: one bit of it differs. `channel` and `mask` as for WrongKey."""

    bit: Annotated[int, whole(0, 8 * KEY_BYTES - 1)] = 0
    channel: Channel = "file"
    mask: Channel = "file"
    meaning: ClassVar = View("attacked")

    @property
    def reads_floats(self) -> bool:
        return self.channel == "floats"

    def __call__(self, published: Published, keys: Sequence[Key], method: Reversible) -> Image:
        near = [key.with_bit_flipped(self.bit) for key in keys if isinstance(key, MasterKey)]
        if len(near) != len(keys):
            raise BadSetting("near_key flips a bit of a master key; this run has other keys")
        return received(published, near, method, self.channel, self.mask)


@checked
@dataclass(frozen=True)
class PartialKey:
    """Recovery by one who holds the right signs but for a fraction of them, which are wrong (1.0: every sign).

    A method that draws no signs from its key (rotation, permutation, noise flip) is recovered as with the right key.
    """

    wrong: Share

    @property
    def meaning(self) -> View:
        return View("attacked", f"{100 * self.wrong:g} % wrong signs")

    def __call__(self, published: Published, keys: Sequence[Key], method: Reversible) -> Image:
        partial = [FlippedSigns(key, self.wrong) for key in keys]
        return without_authentication(method).recover(published, partial)


@checked
def wrong_signs(share: Shares) -> dict[str, PartialKey]:
    """One view for each share of wrong signs: wrong_signs_0p1, ..., wrong_signs_1."""
    return {f"wrong_signs_{each:g}".replace(".", "p"): PartialKey(each) for each in share}


@checked
@dataclass(frozen=True)
class NoKey:
    """What one sees who runs the receiver without any key, where that gives anything; else the published picture, which is all
    that such a one has: of a scrambled face, of an encrypted crop, of a program that asks for a key, of ready-made pictures.
    """

    meaning: ClassVar = View("attacked")

    def __call__(self, published: Published, keys: Sequence[Key], method: Reversible) -> Image:
        return method.without_key(published) if isinstance(method, RunsWithoutKey) else to_floats(published.images)


@checked
@dataclass(frozen=True)
class Jpeg:
    """Recovery with the right key from a file that was saved as JPEG on its way.

    `mask`: what the face is looked for on, the "compressed" picture or, as the authors do, the sender's "floats".
    """

    quality: Quality
    mask: Literal["compressed", "floats"] = "compressed"

    @property
    def meaning(self) -> View:
        return View("recovered", f"JPEG {self.quality}")

    @property
    def reads_floats(self) -> bool:
        return self.mask == "floats"

    def __call__(self, published: Published, keys: Sequence[Key], method: Reversible) -> Image:
        damaged = torch.stack([jpeg(picture, self.quality) for picture in published.images])
        receiver, arrived = without_authentication(method), replace(published, images=damaged)
        if self.mask == "floats" and isinstance(receiver, RecoversFloats):
            return receiver.recover_floats(arrived, keys, to_floats(damaged), floats_of(published))
        return receiver.recover(arrived, keys)


@checked
def jpegs(quality: Qualities, mask: Literal["compressed", "floats"] = "compressed") -> dict[str, Jpeg]:
    """One view for each quality: jpeg50, jpeg75, ..."""
    return {f"jpeg{each}": Jpeg(each, mask) for each in quality}


@checked
@dataclass(frozen=True)
class FloatChannel:
    """Recovery with the right key from the decoder's unrounded floats, as the authors measure it. No file carries these.

    A method whose output is made of bytes has no other floats than these bytes. `mask`: what the face is looked for on.
    """

    mask: Channel = "file"
    meaning: ClassVar = View("recovered")
    reads_floats: ClassVar = True

    def __call__(self, published: Published, keys: Sequence[Key], method: Reversible) -> Image:
        floats_of(published)
        return received(published, keys, method, "floats", self.mask)


def received(published: Published, keys: Sequence[Key], method: Reversible, channel: Channel, mask: Channel) -> Image:
    """What is recovered over a channel, whatever the tag; from floats with the mask of the floats, or of the file."""
    receiver = without_authentication(method)
    if channel == "file" or not isinstance(receiver, RecoversFloats):
        return receiver.recover(published, keys)
    floats = floats_of(published)
    return receiver.recover_floats(published, keys, floats, floats if mask == "floats" else to_floats(published.images))


def floats_of(published: Published) -> Image:
    """What the sender's decoder gave; BadSetting where there is none."""
    if published.floats is None:
        raise BadSetting(
            "this anonymizer publishes no floats: leave recovered_float out, and set protocol.channel=file "
            "protocol.jpeg_mask=compressed"
        )
    return published.floats


def without_authentication(method: AnyReversible) -> AnyReversible:
    """The method as one uses it who does not look at the tag: an attacker, or an owner of a damaged file."""
    return replace(method, authenticate=False) if isinstance(method, Authenticates) else method


@dataclass(frozen=True)
class FlippedSigns:
    """The right key with a fraction of the signs, drawn at random for each picture, wrong: what a partial attack would hold."""

    key: Key
    fraction: float

    def stream(self, context: Context, purpose: str, size: int) -> bytes:
        right = self.key.stream(context, purpose, size)
        if purpose != SIGNS:
            return right
        wrong = np.zeros(8 * size, np.uint8)
        wrong[: round(self.fraction * 8 * size)] = 1
        seed = int.from_bytes(hashlib.sha256(b"flipped signs" + context.nonce).digest()[:8], "big")
        np.random.default_rng(seed).shuffle(wrong)
        return bytes(a ^ b for a, b in zip(right, np.packbits(wrong).tobytes(), strict=True))
