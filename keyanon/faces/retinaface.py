"""RetinaFace on ResNet-50 (Deng et al., CVPR 2020), in the layout of the public weights `Resnet50_Final.pth`.

    picture -> ResNet-50 -> three scales, 8, 16 and 32 px a cell -> pyramid of 256 channels -> context of three sizes -> heads

Two anchors stand at each cell. The heads say of each whether it is a face, and where box and five points lie from it.
"""

from collections.abc import Sequence
from itertools import product

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import interpolate, relu

from keyanon.types import Image

WIDTH = 256  # channels of the pyramid
STRIDES = (8, 16, 32)  # pixels a cell
ANCHORS = ((16, 32), (64, 128), (256, 512))  # their sides in pixels, by scale
SPREAD = (0.1, 0.2)  # what the heads' numbers are of: the anchor's side for places, a logarithm for sizes
MEAN_BGR = (104.0, 117.0, 123.0)


def convolution(inside: int, outside: int, size: int, rectified: bool = True) -> nn.Sequential:
    layers = [nn.Conv2d(inside, outside, size, padding=size // 2, bias=False), nn.BatchNorm2d(outside)]
    return nn.Sequential(*layers, *([nn.ReLU()] if rectified else []))


class Pyramid(nn.Module):
    """Each scale with what the coarser one says of it."""

    def __init__(self) -> None:
        super().__init__()
        self.output1, self.output2, self.output3 = (convolution(channels, WIDTH, 1) for channels in (512, 1024, 2048))
        self.merge1, self.merge2 = (convolution(WIDTH, WIDTH, 3) for _ in range(2))

    def forward(self, fine: Tensor, middle: Tensor, coarse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        coarse = self.output3(coarse)
        middle = self.output2(middle)
        middle = self.merge2(middle + interpolate(coarse, middle.shape[-2:]))
        fine = self.output1(fine)
        return self.merge1(fine + interpolate(middle, fine.shape[-2:])), middle, coarse


class Context(nn.Module):
    """Windows of 3, 5 and 7 cells side by side."""

    def __init__(self) -> None:
        super().__init__()
        quarter = WIDTH // 4
        self.conv3X3 = convolution(WIDTH, WIDTH // 2, 3, rectified=False)
        self.conv5X5_1 = convolution(WIDTH, quarter, 3)
        self.conv5X5_2 = convolution(quarter, quarter, 3, rectified=False)
        self.conv7X7_2 = convolution(quarter, quarter, 3)
        self.conv7x7_3 = convolution(quarter, quarter, 3, rectified=False)

    def forward(self, x: Tensor) -> Tensor:
        near = self.conv5X5_1(x)
        return relu(torch.cat([self.conv3X3(x), self.conv5X5_2(near), self.conv7x7_3(self.conv7X7_2(near))], dim=1))


class Head(nn.Module):
    """So many numbers of each anchor."""

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.numbers = numbers
        self.conv1x1 = nn.Conv2d(WIDTH, 2 * numbers, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv1x1(x).permute(0, 2, 3, 1).reshape(len(x), -1, self.numbers)  # type: ignore[no-any-return]


class RetinaFace(nn.Module):
    """Faces of pictures, an anchor a row; modules are named as in the public weights."""

    def __init__(self) -> None:
        super().__init__()
        from torchvision.models import resnet50
        from torchvision.models._utils import IntermediateLayerGetter

        self.body = IntermediateLayerGetter(resnet50(weights=None), {f"layer{i}": str(i) for i in (2, 3, 4)})
        self.fpn = Pyramid()
        self.ssh1, self.ssh2, self.ssh3 = (Context() for _ in STRIDES)
        self.ClassHead, self.BboxHead, self.LandmarkHead = (
            nn.ModuleList(Head(numbers) for _ in STRIDES) for numbers in (2, 4, 10)
        )

    def forward(self, images: Image) -> tuple[Float[Tensor, "b n"], Float[Tensor, "b n 4"], Float[Tensor, "b n 5 2"]]:
        """Of bytes as floats, RGB in [0, 255]: how sure each anchor is of a face, its box and its five points in pixels."""
        bgr = images.flip(1) - torch.tensor(MEAN_BGR, device=images.device)[:, None, None]
        scales = self.fpn(*self.body(bgr).values())
        seen = [part(scale) for part, scale in zip((self.ssh1, self.ssh2, self.ssh3), scales, strict=True)]
        faces, boxes, points = (
            torch.cat([head(x) for head, x in zip(heads, seen, strict=True)], dim=1)
            for heads in (self.ClassHead, self.BboxHead, self.LandmarkHead)
        )
        places = anchors(images.shape[-2:]).to(images)
        centre, side = places[:, :2], places[:, 2:]
        middle = centre + boxes[..., :2] * SPREAD[0] * side
        half = side * (boxes[..., 2:] * SPREAD[1]).exp() / 2
        where = centre[:, None] + points.unflatten(-1, (5, 2)) * SPREAD[0] * side[:, None]
        return faces.softmax(-1)[..., 1], torch.cat([middle - half, middle + half], dim=-1), where


def anchors(shape: Sequence[int]) -> Float[Tensor, "n 3"]:
    """Centre (x, y) and side in pixels of all anchors of a picture of this height and width, in the order of the heads."""
    height, width = shape
    found = [
        ((column + 0.5) * stride, (row + 0.5) * stride, float(side))
        for stride, sides in zip(STRIDES, ANCHORS, strict=True)
        for row, column, side in product(range(-(-height // stride)), range(-(-width // stride)), sides)
    ]
    return torch.tensor(found)
