"""Controls, between which every method has to lie: nothing done, and no face left.

`Identity` publishes the picture. `Blackout` and `MeanFace` are filters for `keyanon.methods.baselines.classical.Obfuscation`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import torch

from keyanon.channel.pixels import to_bytes
from keyanon.faces.alignment import FACES128_TEMPLATE, align
from keyanon.faces.datasets import bundled_faces
from keyanon.faces.finding import Finder, shares
from keyanon.settings import checked
from keyanon.types import About, Image, Key, Mask, Picture, Published
from keyanon.weights import Card


@checked
@dataclass(frozen=True)
class Identity:
    """No anonymization at all: what a measure says when everything is shown."""

    @property
    def about(self) -> About:
        return About("control", "-", None, None, "-", "-", "-", publishes_faces=True)

    def anonymize(self, images: Image, keys: Sequence[Key], ids: Sequence[str]) -> Published:
        return Published(to_bytes(images).cpu(), (b"",) * len(ids))


@checked
@dataclass(frozen=True)
class Blackout:
    """Black in place of the face."""

    def __call__(self, images: Image, face: Mask) -> Image:
        return torch.full_like(images, -1)


@checked
@dataclass(frozen=True)
class MeanFace:
    """The same face for everyone: the mean of the 256 synthetic faces that the package ships, and so nobody's.

    It is turned, scaled and shifted to the five points of each face. Where none is found the picture counts as aligned, as the
    bundled faces are. Beyond the mean picture's border its edge is continued.
    """

    finder: Finder = field(default_factory=Finder)

    def cards(self) -> tuple[Card, ...]:
        return self.finder.cards()

    def __call__(self, images: Image, face: Mask) -> Image:
        mean, (height, width) = mean_of_the_bundled_faces(), images.shape[-2:]
        side = max(height, width)
        out = torch.empty_like(images)
        for picture, mask, faces in zip(out, face, self.finder.chosen(images), strict=True):
            templates = [(each.any.points + 0.5) / side for each in faces] or [FACES128_TEMPLATE]
            points = FACES128_TEMPLATE * mean.shape[-1] - 0.5
            pasted = [align(mean, points, side, template)[:, :height, :width].to(images) for template in templates]
            picture[:] = pasted[0]
            for part, other in zip(shares(mask, faces)[1:], pasted[1:], strict=True):
                picture[:] = torch.where(part, other, picture)
        return out


@cache
def mean_of_the_bundled_faces() -> Picture:
    """3 x 128 x 128."""
    faces = bundled_faces()
    return torch.stack([faces.load(id) for id in faces.ids]).mean(0)
