"""What is done to faces without any model: blur, mosaic, median, a bar over the eyes.

    x' = F(x) on the face's pixels,  x elsewhere,  in 8 bits

F is a filter of the picture; faces are a parser's mask, or the finder's boxes or ellipses, or bands over the eyes. No key is used
and nothing comes back. A picture without a face stays as it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool
from skimage.draw import ellipse
from skimage.filters.rank import median
from torch import Tensor
from torch.nn.functional import avg_pool2d, pad
from torchvision.transforms.functional import gaussian_blur

from keyanon.channel.pixels import to_bytes, to_floats
from keyanon.faces.finding import Finder, shares
from keyanon.faces.parsing import reduce_mask
from keyanon.settings import Pixels, Positive, Share, checked, number
from keyanon.types import About, FaceParser, Image, Key, Mask, Picture, Published
from keyanon.weights import Card


@runtime_checkable
class Filter(Protocol):
    def __call__(self, images: Image, face: Mask) -> Image:
        """Pictures of which the pixels of `face`, a mask at pixel size, will be published; a picture's mask may be empty."""
        ...


@checked
@dataclass(frozen=True)
class Obfuscation:
    """A filter on the face.

    Args:
        filter: what the face's pixels become.
        parser: what finds the face; asked for masks at pixel size.
        kind, code_licence, source: what `about` says of the preset.
    """

    filter: Filter
    parser: FaceParser
    kind: Literal["control", "irreversible"] = "irreversible"
    code_licence: str = "-"
    source: str = "-"

    @property
    def about(self) -> About:
        return About(self.kind, "-", None, None, self.code_licence, "-", self.source)

    def anonymize(self, images: Image, keys: Sequence[Key], ids: Sequence[str]) -> Published:
        images = to_floats(to_bytes(images))
        face = self.parser.mask(images, (images.shape[-2], images.shape[-1])).to(images.device)
        out = torch.where(face, self.filter(images, face), images)
        return Published(to_bytes(out).cpu(), (b"",) * len(ids))


# Filters. Sizes are in pixels of a picture whose shorter side is `at`, and scale with the picture.
@checked
@dataclass(frozen=True)
class GaussianBlur:
    """The defaults are PRO-Face S's at test time (https://github.com/lixionga/ProFace): sigma the middle of its 9 to 21."""

    kernel: Pixels = 61
    sigma: Positive = 15.0
    at: Pixels = 256

    def __call__(self, images: Image, face: Mask) -> Image:
        scale = min(images.shape[-2:]) / self.at
        blurred: Tensor = gaussian_blur(images, [odd(self.kernel, scale)] * 2, [self.sigma * scale] * 2)
        return blurred


@checked
@dataclass(frozen=True)
class Median:
    """The median of the square of `size` pixels around each, in each channel; cut off at the picture's border."""

    size: Pixels = 23
    at: Pixels = 256

    def __call__(self, images: Image, face: Mask) -> Image:
        size = odd(self.size, min(images.shape[-2:]) / self.at)
        planes = to_bytes(images).flatten(0, 1).cpu().numpy()
        filtered = np.stack([median(plane, np.ones((size, size), np.uint8)) for plane in planes])
        return to_floats(torch.from_numpy(filtered).view(images.shape)).to(images)


@checked
@dataclass(frozen=True)
class Pixelate:
    """The mean of each square of `block` pixels, counted from the upper left corner; `at` None does not scale with the picture."""

    block: Pixels = 20
    at: Pixels | None = 256

    def __call__(self, images: Image, face: Mask) -> Image:
        height, width = images.shape[-2:]
        block = self.block if self.at is None else max(1, round(self.block * min(height, width) / self.at))
        means = avg_pool2d(images, block, ceil_mode=True, count_include_pad=False)
        return means.repeat_interleave(block, 2).repeat_interleave(block, 3)[..., :height, :width]


@checked
@dataclass(frozen=True)
class BoxBlur:
    """The mean over a rectangle of `share` times the width and height of the face's box, which is mirrored at its border.

    Of several faces each has a box of its own.
    """

    share: Share = 0.5
    finder: Finder = field(default_factory=Finder)

    def cards(self) -> tuple[Card, ...]:
        return self.finder.cards()

    def __call__(self, images: Image, face: Mask) -> Image:
        out = images.clone()
        for original, picture, mask, faces in zip(images, out, face, self.finder.chosen(images), strict=True):
            for (part,) in shares(mask, faces):
                if part.any():
                    place = bounds(part)
                    blurred = self.blurred(original[:, *place])
                    # Boxes may overlap: each face has its own blur.
                    picture[:, *place] = torch.where(part[place], blurred, picture[:, *place])
        return out

    def blurred(self, box: Picture) -> Picture:
        height, width = (max(1, int(self.share * side)) for side in box.shape[1:])
        margins = (width // 2, (width - 1) // 2, height // 2, (height - 1) // 2)
        mean: Tensor = avg_pool2d(pad(box[None], margins, mode="reflect"), (height, width), stride=1)[0]
        return mean


def odd(size: int, scale: float) -> int:
    """The odd number whose half is nearest to the scaled half of `size`."""
    return 2 * round(size // 2 * scale) + 1


def bounds(mask: Bool[Tensor, "h w"]) -> tuple[slice, slice]:
    """The rows and columns from the first to the last where a mask is True somewhere."""
    rows, columns = (slice(int(along.min()), int(along.max()) + 1) for along in mask.nonzero(as_tuple=True))
    return rows, columns


# Regions: parsers that look for a face and not for its outline.
@checked
@dataclass(frozen=True)
class Box:
    """Each face's box with `scale - 1` of its size added on every side and cut off at the picture's border, or the ellipse in it.

    As deface does (https://github.com/ORB-HD/deface, scale_bb): a scale of 1.3 makes the box 1.6 times as wide.
    """

    shape: Literal["rectangle", "ellipse"] = "ellipse"
    scale: Annotated[float, number(0.5, 100)] = 1.3
    finder: Finder = field(default_factory=Finder)

    def cards(self) -> tuple[Card, ...]:
        return self.finder.cards()

    def mask(self, images: Image, size: tuple[int, int]) -> Mask:
        height, width = images.shape[-2:]
        masks = torch.zeros(len(images), 1, height, width, dtype=torch.bool)
        for mask, faces in zip(masks, self.finder.chosen(images), strict=True):
            for face in faces:
                near, far = face.box[:2].astype(int), face.box[2:].astype(int)
                margin = (self.scale - 1) * (far - near)
                left, top = np.maximum(0, np.round(near - margin).astype(int))
                right, bottom = np.minimum((width - 1, height - 1), np.round(far + margin).astype(int))
                if self.shape == "rectangle":
                    mask[0, top:bottom, left:right] = True
                else:
                    down, across = (bottom - top) // 2, (right - left) // 2
                    rows, columns = ellipse(down, across, down, across)
                    mask[0, top + rows, left + columns] = True
        return reduce_mask(masks.to(images.device), size, "bilinear>0")


@checked
@dataclass(frozen=True)
class EyeBand:
    """A bar over the eyes of each face, along the line through their centres; sides in distances between these."""

    width: Positive = 2.0
    height: Positive = 0.7
    finder: Finder = field(default_factory=Finder)

    def cards(self) -> tuple[Card, ...]:
        return self.finder.cards()

    def mask(self, images: Image, size: tuple[int, int]) -> Mask:
        masks = torch.zeros(len(images), 1, *images.shape[-2:], dtype=torch.bool)
        y, x = np.indices(images.shape[-2:])
        for mask, faces in zip(masks, self.finder.chosen(images), strict=True):
            for face in faces:
                first, second = face.any.points[:2]
                middle, (across, down) = (first + second) / 2, second - first
                distance = across**2 + down**2  # squared: the offsets below are scaled by one distance already
                along = (x - middle[0]) * across + (y - middle[1]) * down
                beside = (y - middle[1]) * across - (x - middle[0]) * down
                inside = (abs(along) <= self.width / 2 * distance) & (abs(beside) <= self.height / 2 * distance)
                mask[0] |= torch.from_numpy(inside)
        return reduce_mask(masks.to(images.device), size, "bilinear>0")
