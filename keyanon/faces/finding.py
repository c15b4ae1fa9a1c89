"""Which faces are on a picture, and which of them count: one decision, which parsers, methods, recognizers and tables share.

    found   = what MTCNN finds, with the picture's edge repeated around it and without, and what dlib's HOG detector finds besides
    chosen  = all of them (`all`), or the one with the largest box (`largest`, `one_or_skip`)

Two boxes show one face if they overlap by a tenth. Under `one_or_skip` a run uses only pictures on which one face is found.

They have the thresholds of their libraries: MTCNN 0.6, 0.7, 0.7 and 20 px, dlib 0 and 80 px. Without the edge MTCNN also finds a
blurred ground (score 0.86): there it has to be sure by 0.9. On one aligned face they find nothing else: no second face on 256
bundled ones, 28 of CelebA-HQ and 150 of LFW.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from keyanon.channel.pixels import to_bytes
from keyanon.faces.detection import Detection, DlibDetector, FindsAll, MtcnnDetector, Points, area, overlap
from keyanon.settings import checked
from keyanon.types import Image
from keyanon.weights import Card

Choice = Literal["all", "largest", "one_or_skip"]
SAME = 0.1  # intersection over union
SURE = 0.9  # score of a face that MTCNN finds without the edge alone
REMEMBERED = 1024  # pictures: a face is looked for by every parser, method, recognizer and check
_remembered: "OrderedDict[tuple[Finder, bytes], tuple[Face, ...]]" = OrderedDict()


@dataclass(frozen=True, eq=False)
class Face:
    """One face, as each detector sees it that finds it; at least one does."""

    mtcnn: Detection | None
    dlib: Detection | None

    @property
    def any(self) -> Detection:
        """As MTCNN sees it, or else as dlib does: a box and five points."""
        found = self.mtcnn or self.dlib
        assert found is not None
        return found

    @property
    def box(self) -> Points:
        return self.any.box


@checked
@dataclass(frozen=True)
class Finder:
    """Finds the faces of a picture, and chooses. See the module."""

    choice: Choice = "all"
    mtcnn: FindsAll = field(default_factory=MtcnnDetector)
    unpadded: FindsAll = field(default_factory=lambda: MtcnnDetector(padding=0.0))
    dlib: FindsAll = field(default_factory=DlibDetector)

    def cards(self) -> tuple[Card, ...]:
        return (*self.mtcnn.cards(), *self.unpadded.cards(), *self.dlib.cards())

    def found(self, images: Image) -> list[tuple[Face, ...]]:
        """All faces of each picture, those with the largest boxes first."""
        return [self._found(image) for image in torch.split(images, 1)]

    def chosen(self, images: Image) -> list[tuple[Face, ...]]:
        """The faces of each picture that count."""
        found = self.found(images)
        return found if self.choice == "all" else [faces[:1] for faces in found]

    def refused(self, images: Image) -> list[str | None]:
        """Why a run must not use a picture, None where it may; a picture without a face is the parser's to refuse."""
        if self.choice != "one_or_skip":
            return [None] * len(images)
        return [
            f"{len(faces)} faces found; faces=one_or_skip takes pictures of one" if len(faces) > 1 else None
            for faces in self.found(images)
        ]

    def _found(self, image: Image) -> tuple[Face, ...]:
        key = (self, digest(image))
        if key not in _remembered:
            (padded,), (unpadded,), (dlib,) = (each.faces(image) for each in (self.mtcnn, self.unpadded, self.dlib))
            sure = [face for face in unpadded if face.score >= SURE]
            more = [face for face in sure if not any(same(face.box, other.box) for other in padded)]
            # One that dlib finds as well was found already, in a place that MTCNN knows less well without the edge.
            more = [face for face in more if not any(same(face.box, other.box) for other in dlib)]
            _remembered[key] = tuple(sorted(paired([*padded, *more], dlib), key=lambda face: -area(face.box)))
            if len(_remembered) > REMEMBERED:
                _remembered.popitem(last=False)
        _remembered.move_to_end(key)
        return _remembered[key]


def paired(mtcnn: Sequence[Detection], dlib: Sequence[Detection]) -> Iterator[Face]:
    """The faces that two detectors found on a picture, each once."""
    left = list(dlib)
    for one in mtcnn:
        best = max(left, key=lambda other: overlap(one.box, other.box), default=None)
        if best is not None and same(one.box, best.box):
            left.remove(best)
            yield Face(one, best)
        else:
            yield Face(one, None)
    for other in left:
        yield Face(None, other)


def same(a: Points, b: Points) -> bool:
    """Whether two boxes show one face."""
    return overlap(a, b) >= SAME


def shares(mask: Bool[Tensor, "1 h w"], faces: Sequence[Face], scale: float = 1.0) -> list[Bool[Tensor, "1 h w"]]:
    """The parts of a picture's mask that belong to each face: to the nearest one, in half sides of its box.

    The mask is `scale` times as large as the picture. All of it, once, where fewer than two faces are known.
    """
    if len(faces) < 2:
        return [mask]
    y, x = np.indices(mask.shape[-2:])
    away = []
    for face in faces:
        box = face.box * scale
        (across, down), (right, low) = (box[:2] + box[2:]) / 2, np.maximum(box[2:] - box[:2], 1) / 2
        away.append(((x - across) / right) ** 2 + ((y - down) / low) ** 2)
    owner = torch.from_numpy(np.argmin(away, 0)).to(mask.device)
    return [mask & (owner == i) for i in range(len(faces))]


def digest(image: Image) -> bytes:
    """Of a picture's size and 8-bit values."""
    return hashlib.sha256(str(tuple(image.shape)).encode() + to_bytes(image).cpu().numpy().tobytes()).digest()
