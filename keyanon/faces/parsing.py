"""Face masks: which pixels are the face, by a parser's classes, by landmarks, or by a fixed shape; one label map.

Parsers look at pictures one by one, so that a mask does not depend on its batch, and on the device of the pictures. They look at
equal pictures once: a mask is asked for at pixel size, at latent size, and again by every method.

Networks see what they are given: whoever wants the mask of a file's 8 bits hands these. Detectors, and landmarks, are of 8 bits.
"""

import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial import ConvexHull
from skimage.draw import polygon2mask
from torch import Tensor
from torch.nn.functional import interpolate

from keyanon.errors import BadData
from keyanon.faces.detection import Points
from keyanon.faces.finding import Finder
from keyanon.faces.onnx import open_onnx
from keyanon.finite import finite, within
from keyanon.settings import Factor, Positive, checked, number
from keyanon.types import Image, Mask
from keyanon.weights import Card, named, resolve

# CelebAMask-HQ's classes in the order of BiSeNet's outputs (https://github.com/yakhyo/face-parsing, utils/common.py).
CLASSES = (
    "background", "skin", "l_brow", "r_brow", "l_eye", "r_eye", "eye_g", "l_ear", "r_ear", "ear_r",
    "nose", "mouth", "u_lip", "l_lip", "neck", "neck_l", "cloth", "hair", "hat",
)  # fmt: skip
TIGHT = ("skin", "l_brow", "r_brow", "l_eye", "r_eye", "eye_g", "nose", "mouth", "u_lip", "l_lip")
PAPER_CLASSES = (*TIGHT, "l_ear", "r_ear", "neck")  # the authors' 13
WITH_HAIR = (*PAPER_CLASSES, "hair")
REGIONS = {"tight": TIGHT, "paper": PAPER_CLASSES, "with_hair": WITH_HAIR, "glasses": ("eye_g",)}
Region = Literal["tight", "paper", "with_hair", "glasses"]
Reduction = Literal["bilinear>0", "nearest", "area>0.5"]
DLIB_SMALLEST = 80  # pixels: a face whose box is longer should be found by dlib's detector
FRAME = (
    2.0  # sides of the square that a network sees of one of several faces, in its box's longer side: about CelebA-HQ's
)
REMEMBERED = 1024  # pictures, a bit a pixel: more than two batches of any run
_remembered: OrderedDict[tuple[object, bytes], tuple[NDArray[np.uint8], tuple[int, ...]]] = OrderedDict()

IMAGENET_MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
IMAGENET_DEVIATION = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


@checked
@dataclass(frozen=True)
class BiSeNetParser:
    """The authors' parser: BiSeNet (ResNet-34) at 512 px in ONNX, the classes of `region`, brought to size by `reduce`.

    `looks_at`: "picture" shows it the whole picture, as the authors do; it was trained on one large face, and may pass over others.
    "faces" does so only where the finder finds no more than one, and else shows it the square around each that counts.

    `weights` is a path to the card's file.
    """

    region: Region = "paper"
    reduce: Reduction = "bilinear>0"
    looks_at: Literal["faces", "picture"] = "faces"
    card: str | Card = "bisenet"
    weights: str | None = None
    finder: Finder = field(default_factory=Finder)
    added_fields: ClassVar = ("looks_at",)

    def cards(self) -> tuple[Card, ...]:
        return (named(self.card), *self.finder.cards())

    def mask(self, images: Image, size: tuple[int, int]) -> Mask:
        return each_parsed(self, images, size)

    def _parse(self, image: Image) -> Mask:
        if self.looks_at == "picture":
            return self._labels(image)
        return parse_faces(self.finder, image, self._labels)

    def _labels(self, image: Image) -> Mask:
        """The classes' pixels on one picture, at 512 px."""
        session = open_onnx(self._path, image.device)
        logits = session.run(None, {session.get_inputs()[0].name: imagenet512(image).cpu().numpy()})[0]
        finite(torch.from_numpy(logits), "its network")  # or argmax would take NaN for a class
        if logits.shape[1] != len(CLASSES):
            raise BadData(f"{self._path}: a face parser gives {len(CLASSES)} classes, this gives {logits.shape[1]}")
        wanted = [CLASSES.index(name) for name in REGIONS[self.region]]
        return torch.from_numpy(np.isin(logits.argmax(1, keepdims=True), wanted)).to(image.device)

    @cached_property
    def _path(self) -> Path:
        return resolve(named(self.card), self.weights)


@checked
@dataclass(frozen=True)
class SegFormerParser:
    """SegFormer (MiT-B5) at 512 px; its classes are found by name in its config, because their order is its own.

    `weights` is a local folder with the card's files.
    """

    region: Region = "paper"
    reduce: Reduction = "bilinear>0"
    card: str | Card = "segformer"
    weights: str | None = None
    finder: Finder = field(default_factory=Finder)

    def cards(self) -> tuple[Card, ...]:
        return (named(self.card), *self.finder.cards())

    def mask(self, images: Image, size: tuple[int, int]) -> Mask:
        return each_parsed(self, images, size)

    def _parse(self, image: Image) -> Mask:
        return parse_faces(self.finder, image, self._labels)

    def _labels(self, image: Image) -> Mask:
        """The classes' pixels on one picture, at 512 px."""
        model = self._model.to(image.device)
        wanted = class_indices(model.config.id2label, REGIONS[self.region])
        with torch.inference_mode():
            logits = finite(model(pixel_values=imagenet512(image)).logits, "its network")
        labels = interpolate(logits, (512, 512), mode="bilinear", align_corners=False).argmax(1, keepdim=True)
        return torch.isin(labels, torch.tensor(wanted, device=image.device))

    @cached_property
    def _model(self) -> Any:
        from transformers import SegformerForSemanticSegmentation

        folder = resolve(named(self.card), self.weights)
        return SegformerForSemanticSegmentation.from_pretrained(
            folder, local_files_only=True, use_safetensors=True
        ).eval()


@checked
@dataclass(frozen=True)
class LandmarkParser:
    """Faces from dlib's 68 landmarks: jaw to brows, and a forehead above them.

    It needs no parser's weights and covers skin, brows, eyes, glasses, nose, mouth and lips: no ears, neck or hair.
    The forehead is `forehead` times as high as the face from chin to brows: by the rule of thirds the hairline is at
    0.5; 0.4 takes less of the hair in; 0 ends the mask at the brows.

    The finder says which faces. One that MTCNN alone finds, small or turned away, has no landmarks: it gets the ellipse in
    its box. But a picture of which dlib finds no face at all, though they are large enough for it, has none for this parser either.
    """

    forehead: Annotated[float, number(0, 4)] = 0.4
    reduce: Reduction = "bilinear>0"
    finder: Finder = field(default_factory=Finder)

    def cards(self) -> tuple[Card, ...]:
        return self.finder.cards()

    def mask(self, images: Image, size: tuple[int, int]) -> Mask:
        return each_parsed(self, images, size)

    def _parse(self, image: Image) -> Mask:
        height, width = image.shape[-2:]
        mask = np.zeros((height, width), bool)
        (faces,) = self.finder.chosen(image)
        unseen = all(face.dlib is None for face in faces)
        if not unseen or any(max(face.box[2:] - face.box[:2]) < DLIB_SMALLEST for face in faces):
            for face in faces:
                if face.dlib is not None and face.dlib.landmarks is not None:
                    mask |= polygon2mask((height, width), face_outline(face.dlib.landmarks, self.forehead)[:, ::-1])
                else:
                    mask |= box_ellipse(face.box, height, width)
        return torch.from_numpy(mask)[None, None].to(image.device)


@checked
@dataclass(frozen=True)
class EllipseParser:
    """No parser at all: the same ellipse on every picture, seen or not. For aligned crops such as faces128, and tests.

    `centre` and `axes` (half-axes) are in fractions of width and height. The defaults fit the mean LandmarkParser
    mask of 296 UTKFace crops (intersection over union 0.85 with it); forehead and hair above the brows are within.
    """

    centre: tuple[Factor, Factor] = (0.5, 0.4)
    axes: tuple[Positive, Positive] = (0.44, 0.6)
    reduce: Reduction = "bilinear>0"

    def cards(self) -> tuple[Card, ...]:
        return ()

    def mask(self, images: Image, size: tuple[int, int]) -> Mask:
        y, x = (torch.arange(n, device=images.device).add(0.5) / n for n in images.shape[-2:])
        (across, down), (right, low) = self.centre, self.axes
        inside = ((x[None, :] - across) / right) ** 2 + ((y[:, None] - down) / low) ** 2 <= 1
        return reduce_mask(inside.expand(len(images), 1, -1, -1), size, self.reduce)


def each_parsed(parser: BiSeNetParser | SegFormerParser | LandmarkParser, images: Image, size: tuple[int, int]) -> Mask:
    """What a parser sees on each picture; raises NotFinite."""
    masks = []
    for row, image in enumerate(torch.split(images, 1)):
        with within("the face parser", rows=torch.tensor([row])):
            masks.append(reduce_mask(parse(parser, image), size, parser.reduce))
    return torch.cat(masks)


def parse_faces(finder: Finder, image: Image, labels: Callable[[Image], Mask]) -> Mask:
    """What a network marks on one picture (1 3 h w): as it gives it for one face, at the picture's size for several."""
    (found,), (chosen,) = finder.found(image), finder.chosen(image)
    if len(found) < 2:
        return labels(image)
    height, width = image.shape[-2:]
    mask = torch.zeros(1, 1, height, width, dtype=torch.bool, device=image.device)
    for face in chosen:
        centre, half = (face.box[:2] + face.box[2:]) / 2, FRAME * max(face.box[2:] - face.box[:2]) / 2
        left, top = np.maximum(np.round(centre - half), 0).astype(int)
        right, bottom = np.minimum(np.round(centre + half), (width, height)).astype(int)
        seen = labels(image[..., top:bottom, left:right])
        there = interpolate(seen.float(), (int(bottom - top), int(right - left)), mode="bilinear") > 0.5
        # The square may hold a neighbour, whose turn comes or who does not count.
        near = torch.from_numpy(box_ellipse(around(face.box, 1.6), height, width)).to(image.device)
        mask[..., top:bottom, left:right] |= there & near[top:bottom, left:right]
    return mask


def around(box: Points, scale: float) -> Points:
    """A box `scale` times as large about its centre."""
    centre, half = (box[:2] + box[2:]) / 2, scale * (box[2:] - box[:2]) / 2
    return np.concatenate([centre - half, centre + half])


def parse(parser: BiSeNetParser | SegFormerParser | LandmarkParser, image: Image) -> Mask:
    """What a parser sees on one picture (1 3 h w), at the size it works at; remembered for the last REMEMBERED pictures."""
    key = (parser, digest(image))
    if key not in _remembered:
        face = parser._parse(image)
        _remembered[key] = (np.packbits(face.cpu().numpy()), tuple(face.shape))
        if len(_remembered) > REMEMBERED:
            _remembered.popitem(last=False)
    bits, shape = _remembered[key]
    _remembered.move_to_end(key)
    return torch.from_numpy(np.unpackbits(bits, count=math.prod(shape)).reshape(shape).astype(bool)).to(image.device)


def reduce_mask(mask: Mask, size: tuple[int, int], how: Reduction) -> Mask:
    """A mask (b, 1, h, w) at another size.

    "bilinear>0" is the authors' (torchvision's antialiased bilinear, then every cell that the face touches): it
    dilates the face by up to one cell. "nearest" takes each cell's centre, "area>0.5" the majority of its pixels.
    """
    values = mask.float()
    match how:
        case "bilinear>0":
            return interpolate(values, size, mode="bilinear", align_corners=False, antialias=True) > 0
        case "nearest":
            return interpolate(values, size, mode="nearest-exact") > 0
        case "area>0.5":
            return interpolate(values, size, mode="area") > 0.5


def face_outline(landmarks: Points, forehead: float) -> Points:
    """The convex outline (n, 2) around jaw, brows, and the brows moved up the face by `forehead` times its height.

    The height is that from the chin to between the brows; the outer ends of the brows move half as far as the middle.
    """
    jaw, brows, chin = landmarks[:17], landmarks[17:27], landmarks[8]
    up = brows[4:6].mean(0) - chin
    arch = 1 - 0.5 * np.linspace(-1, 1, 10) ** 2
    points = np.concatenate([jaw, brows, brows + forehead * arch[:, None] * up])
    corners: Points = points[ConvexHull(points).vertices]
    return corners


def box_ellipse(box: Points, height: int, width: int) -> NDArray[np.bool_]:
    """The ellipse in a box, on a picture of that size."""
    y, x = np.indices((height, width))
    (across, down), (right, low) = (box[:2] + box[2:]) / 2, np.maximum(box[2:] - box[:2], 1) / 2
    inside: NDArray[np.bool_] = ((x - across) / right) ** 2 + ((y - down) / low) ** 2 <= 1
    return inside


def class_indices(names: dict[int, str], wanted: Collection[str]) -> list[int]:
    """The outputs of a network whose class names are `names` that belong to the `wanted` classes."""
    absent = set(wanted) - set(names.values())
    if absent:
        raise BadData(f"this parser has no class {', '.join(sorted(absent))}; it has {', '.join(names.values())}")
    return [int(index) for index, name in names.items() if name in wanted]


def digest(image: Image) -> bytes:
    """Of a picture's size and values, to the bit."""
    values = finite(image, "pixels").float().cpu().numpy()
    return hashlib.sha256(str(tuple(image.shape)).encode() + values.tobytes()).digest()


def imagenet512(images: Image) -> Tensor:
    """Pictures as they are, unclipped, at 512 px (bilinear), with ImageNet's mean and standard deviation."""
    large = interpolate(images / 2 + 0.5, (512, 512), mode="bilinear", align_corners=False, antialias=True)
    return (large - IMAGENET_MEAN.to(large)) / IMAGENET_DEVIATION.to(large)
