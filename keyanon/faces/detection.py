"""Where faces are: boxes and landmarks by MTCNN, by dlib's two detectors, and by RetinaFace."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray
from torch import Tensor

from keyanon.channel.pixels import to_bytes
from keyanon.errors import MissingPackage
from keyanon.faces.backbones import reading
from keyanon.faces.retinaface import RetinaFace
from keyanon.finite import finite
from keyanon.settings import Factor, Share, checked, number
from keyanon.types import Image
from keyanon.weights import Card, named, resolve

Points = NDArray[np.float64]  # (n, 2): x, y in pixels
RgbArray = NDArray[np.uint8]  # (h, w, 3) RGB
LOWERINGS = 10  # at most; the authors know no end


@dataclass(frozen=True, eq=False)
class Detection:
    """One face: `box` (4,) left, top, right, bottom; `points` (5, 2) eyes, nose tip, mouth corners; a `score`.

    `landmarks` (68, 2), where the detector has them, in the iBUG 300-W scheme: 0-16 jaw, 17-26 brows, 27-35 nose,
    36-47 eyes, 48-67 mouth.
    """

    box: Points
    points: Points
    score: float
    landmarks: Points | None = None


@runtime_checkable
class Detector(Protocol):
    def detect(self, images: Image) -> list[Detection | None]:
        """The face of each picture, None where there is none."""
        ...

    def cards(self) -> tuple[Card, ...]:
        """The weights it needs besides those that its library ships."""
        ...


@runtime_checkable
class FindsAll(Detector, Protocol):
    def faces(self, images: Image) -> list[tuple[Detection, ...]]:
        """All faces of each picture; the first of them is the one that `detect` gives."""
        ...


@checked
@dataclass(frozen=True)
class MtcnnDetector:
    """facenet-pytorch's MTCNN with its own weights and thresholds (0.6, 0.7, 0.7; faces of 20 px or more).

    `enrolment` is what happens where no face is found: with "fixed" there is none, with "lowered" all thresholds fall until one
    is found, as the authors have it, and the likeliest of those found then is the only one. After ten times, at 0.8 ** 55 of the
    thresholds, there is none either; blank pictures had one by the ninth.

    `select` is which of several faces comes first: the authors' "center_weighted_size" (area minus twice the squared distance from
    the centre) or "largest". `padding` repeats the picture's edge around it before looking, as a fraction of its
    shorter side. 0 is the authors' protocol. Tight crops need 0.25: at 0 as many faces are found, but with points so
    far off that mobilefacenet's TAR at FAR 1e-3 on 350 LFW pairs falls from 0.963 to 0.819 (0.15 and 0.5, mirrored or
    black margins do as well as 0.25). Pictures are looked at one by one, so that a result does not depend on its
    batch.

    Found, with either padding: 499 of 500 UTKFace at 128 px, 698 of 700 LFW at 224 px, 28 of 28 CelebA-HQ at 256 and at
    128 px, none on 308 pictures without a face (noise, textures, animals). Enlarging to 256 px finds no more.
    """

    select: Literal["center_weighted_size", "largest"] = "center_weighted_size"
    padding: Annotated[float, number(0, 4)] = 0.25
    enrolment: Literal["fixed", "lowered"] = "fixed"
    added_fields: ClassVar = ("enrolment",)

    def detect(self, images: Image) -> list[Detection | None]:
        return [first(faces) for faces in self.faces(images)]

    def faces(self, images: Image) -> list[tuple[Detection, ...]]:
        return [self._faces(pixels, images.device) for pixels in to_pixels(images)]

    def cards(self) -> tuple[Card, ...]:
        return ()

    def _faces(self, pixels: RgbArray, device: torch.device) -> tuple[Detection, ...]:
        model = self._model
        padded, margin = pad(pixels, self.padding)
        if min(padded.shape[:2]) < model.min_face_size:
            return ()
        model.device = device
        model.to(device)
        picture = PIL.Image.fromarray(padded)
        boxes, scores, points, lowered = self._found(picture)
        if boxes is None:
            return ()
        # The library puts the boxes in its own order and then takes one: it says which, by its box.
        select = "probability" if lowered else self.select
        (chosen,), _, _ = model.select_boxes(boxes, scores, points, picture, method=select)
        order = sorted(range(len(boxes)), key=lambda i: not np.array_equal(boxes[i], chosen))
        return tuple(
            Detection(boxes[i].astype(float) - margin, points[i].astype(float) - margin, float(scores[i]))
            for i in (order[:1] if lowered else order)
        )

    def _found(self, picture: PIL.Image.Image) -> tuple[Any, Any, Any, bool]:
        """Boxes (None where no face is found), scores, points, and whether thresholds had to fall."""
        thresholds = [0.6, 0.7, 0.7]
        found = self._looked(picture, thresholds)
        attempt = 0
        while found[0] is None and self.enrolment == "lowered" and attempt < LOWERINGS:
            attempt += 1  # each time the authors multiply by one more factor of 0.8 than before
            thresholds = [threshold * 0.8**attempt for threshold in thresholds]
            found = self._looked(picture, thresholds)
        return *found, attempt > 0

    def _looked(self, picture: PIL.Image.Image, thresholds: list[float]) -> Any:
        self._model.thresholds = thresholds
        return self._model.detect(picture, landmarks=True)

    @cached_property
    def _model(self) -> Any:
        from facenet_pytorch import MTCNN

        return MTCNN(keep_all=True).eval()


@checked
@dataclass(frozen=True)
class DlibDetector:
    """dlib's frontal face detector (HOG, threshold 0, 80 px or more) with its 68 landmarks; the largest face comes first.

    The picture's edge is repeated around it by a quarter of its shorter side before looking: without, it found 113 of
    120 LFW crops and 118 of 120 UTKFace, with it 118 and 119; half, mirrored or black margins and enlarging to 256 px
    gain no more. Found in all: 495 of 500 UTKFace at 128 px, 682 of 700 LFW at 224 px, 28 of 28 CelebA-HQ at 256 and
    at 128 px, none on 308 pictures without a face.
    """

    weights: str | None = None

    def detect(self, images: Image) -> list[Detection | None]:
        return [first(faces) for faces in self.faces(images)]

    def faces(self, images: Image) -> list[tuple[Detection, ...]]:
        return [self._faces(pixels) for pixels in to_pixels(images)]

    def landmarks68(self, images: Image) -> list[Points | None]:
        """The 68 landmarks (68, 2) of each picture, None where there is no face."""
        return [None if face is None else face.landmarks for face in self.detect(images)]

    def cards(self) -> tuple[Card, ...]:
        return (named("dlib_landmarks68"),)

    def _faces(self, pixels: RgbArray) -> tuple[Detection, ...]:
        padded, margin = pad(pixels, 0.25)
        boxes, scores, _ = self._finder.run(padded, 0)
        largest_first = sorted(range(len(boxes)), key=lambda i: -boxes[i].area())
        return tuple(self._described(padded, margin, boxes[i], scores[i]) for i in largest_first)

    def _described(self, padded: RgbArray, margin: int, box: Any, score: float) -> Detection:
        landmarks = np.array([[p.x, p.y] for p in self._predictor(padded, box).parts()], float) - margin
        return Detection(edges(box) - margin, five_points(landmarks), score, landmarks)

    @cached_property
    def _finder(self) -> Any:
        return import_dlib().get_frontal_face_detector()

    @cached_property
    def _predictor(self) -> Any:
        return import_dlib().shape_predictor(str(resolve(named("dlib_landmarks68"), self.weights)))


@checked
@dataclass(frozen=True)
class DlibCnnDetector:
    """dlib's convolutional detector (max-margin): boxes without landmarks, the surest first.

    Found on composed pictures: all of 20 faces of 96 px or more, 18 of 80 px, 5 of 64 px, and nothing else. It shares nothing with
    the other two, which find the faces to treat. `threshold` is the confidence from which a box counts; dlib's own is 0.
    """

    threshold: Factor = 0.0
    weights: str | None = None

    def detect(self, images: Image) -> list[Detection | None]:
        return [first(faces) for faces in self.faces(images)]

    def faces(self, images: Image) -> list[tuple[Detection, ...]]:
        return [self._faces(pixels) for pixels in to_pixels(images)]

    def cards(self) -> tuple[Card, ...]:
        return (named("dlib_cnn"),)

    def _faces(self, pixels: RgbArray) -> tuple[Detection, ...]:
        nowhere = np.full((5, 2), np.nan)
        found = [each for each in self._network(pixels, 0) if each.confidence >= self.threshold]
        found.sort(key=lambda each: -each.confidence)
        return tuple(Detection(edges(each.rect), nowhere, each.confidence) for each in found)

    @cached_property
    def _network(self) -> Any:
        return import_dlib().cnn_face_detection_model_v1(str(resolve(named("dlib_cnn"), self.weights)))


@checked
@dataclass(frozen=True)
class RetinaFaceDetector:
    """RetinaFace on ResNet-50, the surest face first: what the authors measure detection, boxes and landmarks with.

    `threshold` is the confidence from which a face counts, the authors' by default. Pictures keep their size. Boxes that overlap a
    surer one by more than 0.4 (intersection over union) are the same face.
    """

    threshold: Share = 0.5
    weights: str | None = None

    def detect(self, images: Image) -> list[Detection | None]:
        return [first(faces) for faces in self.faces(images)]

    def faces(self, images: Image) -> list[tuple[Detection, ...]]:
        with torch.no_grad():
            found = retinaface(resolve(named("retinaface_r50"), self.weights)).to(images.device)(
                to_bytes(images).float()
            )
        surest = finite(found[0], "RetinaFace")
        return [self._faces(*each) for each in zip(surest.cpu(), found[1].cpu(), found[2].cpu(), strict=True)]

    def cards(self) -> tuple[Card, ...]:
        return (named("retinaface_r50"),)

    def _faces(self, surest: Tensor, boxes: Tensor, points: Tensor) -> tuple[Detection, ...]:
        from torchvision.ops import nms

        sure = surest > self.threshold
        surest, boxes, points = surest[sure], boxes[sure].double(), points[sure].double()
        kept = nms(boxes, surest.double(), 0.4).tolist()
        return tuple(Detection(boxes[i].numpy(), points[i].numpy(), float(surest[i])) for i in kept)


@cache
def retinaface(path: Path) -> RetinaFace:
    """The network with its weights; raises WrongWeights."""
    network = RetinaFace().eval()
    with reading(path, "the weights of RetinaFace on ResNet-50"):
        state = torch.load(path, map_location="cpu", weights_only=True)
        network.load_state_dict({name.removeprefix("module."): value for name, value in state.items()})
    return network.requires_grad_(False)


@dataclass(frozen=True, eq=False)
class KnownPlaces:
    """A detector that looks at no picture: the faces are known, one for each picture it is asked about, in their order."""

    found: tuple[Detection | None, ...]

    def detect(self, images: Image) -> list[Detection | None]:
        if len(images) != len(self.found):
            raise ValueError(f"{len(images)} pictures, and the faces of {len(self.found)} are known")
        return list(self.found)

    def landmarks68(self, images: Image) -> list[Points | None]:
        return [None if face is None else face.landmarks for face in self.detect(images)]

    def cards(self) -> tuple[Card, ...]:
        return ()


@dataclass(frozen=True, eq=False)
class AtPlaces:
    """Of a detector's faces on each picture the one at a known place, a box (4,); its own choice where the place is None.

    A face is at a place if it overlaps it by a tenth (intersection over union); of several the one that does most.
    """

    detector: FindsAll
    places: tuple[Points | None, ...]

    def detect(self, images: Image) -> list[Detection | None]:
        return [
            first(faces) if place is None else nearest(faces, place)
            for faces, place in zip(self.detector.faces(images), self.places, strict=True)
        ]

    def landmarks68(self, images: Image) -> list[Points | None]:
        return [None if face is None else face.landmarks for face in self.detect(images)]

    def cards(self) -> tuple[Card, ...]:
        return self.detector.cards()


def first(faces: Sequence[Detection]) -> Detection | None:
    return faces[0] if faces else None


def nearest(faces: Sequence[Detection], place: Points) -> Detection | None:
    """The face that overlaps a box most, None where none does by a tenth."""
    best = max(faces, key=lambda face: overlap(face.box, place), default=None)
    return best if best is not None and overlap(best.box, place) >= 0.1 else None


def overlap(a: Points, b: Points) -> float:
    """Intersection over union of two boxes."""
    shared = area(np.concatenate([np.maximum(a[:2], b[:2]), np.minimum(a[2:], b[2:])]))
    return shared / (area(a) + area(b) - shared) if shared else 0.0


def area(box: Points) -> float:
    """Of a box in square pixels; 0 of one whose right is left of its left."""
    width, height = np.maximum(box[2:] - box[:2], 0)
    return float(width * height)


def edges(rectangle: Any) -> Points:
    """A rectangle of dlib's as a box."""
    return np.array([rectangle.left(), rectangle.top(), rectangle.right(), rectangle.bottom()], float)


def five_points(landmarks: Points) -> Points:
    """Eyes' centres, nose tip and mouth corners (5, 2) of 68 landmarks."""
    eyes = landmarks[36:42].mean(0), landmarks[42:48].mean(0)
    return np.stack([*eyes, landmarks[30], landmarks[48], landmarks[54]])


def pad(pixels: RgbArray, fraction: float) -> tuple[RgbArray, int]:
    """The picture with its edge repeated around it, and the width of that margin in pixels."""
    margin = round(fraction * min(pixels.shape[:2]))
    return np.pad(pixels, ((margin, margin), (margin, margin), (0, 0)), mode="edge"), margin


def to_pixels(images: Image) -> list[RgbArray]:
    return list(to_bytes(images).permute(0, 2, 3, 1).contiguous().cpu().numpy())


def import_dlib() -> Any:
    # Its networks' threads do not outlive a fork, and a forked process would wait for them for ever. 0: the caller does the work.
    os.environ.setdefault("DLIB_NUM_THREADS", "0")
    try:
        import dlib
    except ImportError as error:
        raise MissingPackage('dlib is not installed. Remedy: `pip install "keyanon[offline]"`.') from error
    return dlib
