"""Face detection, alignment and recognition: pictures in, unit rows out, and rows of NaN where no face was found.

A detector's thresholds are never lowered until something turns up: no face found is a result, counted in every table.
(The authors' code does lower them, so that every picture gets a box.) Pictures are clipped and rounded to 8 bits
first, as a published file is. Coordinates are in pixels of the picture given, x to the right and y down.

Models run on the device of the pictures given to them, and are loaded at first use: making an object needs no weights.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from keyanon.images import to_bytes
from keyanon.types import BadPicture, Embeddings, Image, Picture, Recognizer
from keyanon.weights import Card, named, open_onnx, resolve

Points = NDArray[np.float64]  # (n, 2): x, y in pixels
Pixels = NDArray[np.uint8]  # (h, w, 3) RGB

# Eyes, nose tip, mouth corners (left on the picture first) on UTKFace's aligned crops at 128 px, in fractions of the
# side: the mean of MtcnnDetector's points on 599 of 600 random pictures; they scatter by 0.02 (eyes) to 0.04 (mouth)
# around it.
FACES128_TEMPLATE: Points = np.array(
    [[0.3067, 0.2977], [0.6993, 0.2967], [0.4982, 0.5320], [0.3262, 0.7051], [0.6794, 0.7045]]
)


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


class Detector(Protocol):
    def detect(self, images: Image) -> list[Detection | None]:
        """The face of each picture, None where there is none."""
        ...

    def cards(self) -> tuple[Card, ...]:
        """The weights it needs besides those that its library ships."""
        ...


@dataclass(frozen=True)
class MtcnnDetector:
    """facenet-pytorch's MTCNN with its own weights and thresholds (0.6, 0.7, 0.7; faces of 20 px or more).

    `select` picks among several faces: the authors' "center_weighted_size" (area minus twice the squared distance from
    the centre) or "largest". `padding` repeats the picture's edge around it before looking, as a fraction of its
    shorter side. 0 is the authors' protocol. Tight crops need 0.25: at 0 as many faces are found, but with points so
    far off that mobilefacenet's TAR at FAR 1e-3 on 350 LFW pairs falls from 0.963 to 0.819 (0.15 and 0.5, mirrored or
    black margins do as well as 0.25). Pictures are looked at one by one, so that a result does not depend on its
    batch.

    Found, with either padding: 499 of 500 UTKFace at 128 px, 698 of 700 LFW at 224 px, 28 of 28 CelebA-HQ at 256 and at
    128 px, none on 308 pictures without a face (noise, textures, animals). Enlarging to 256 px finds no more.
    """

    select: Literal["center_weighted_size", "largest"] = "center_weighted_size"
    padding: float = 0.25

    def detect(self, images: Image) -> list[Detection | None]:
        return [self._detect(pixels, images.device) for pixels in to_pixels(images)]

    def cards(self) -> tuple[Card, ...]:
        return ()

    def _detect(self, pixels: Pixels, device: torch.device) -> Detection | None:
        model = self._model
        padded, margin = pad(pixels, self.padding)
        if min(padded.shape[:2]) < model.min_face_size:
            return None
        model.device = device
        picture = PIL.Image.fromarray(padded)
        boxes, scores, points = model.to(device).detect(picture, landmarks=True)
        if boxes is None:
            return None
        boxes, score, points = model.select_boxes(boxes, scores, points, picture, method=self.select)
        return Detection(boxes[0].astype(float) - margin, points[0].astype(float) - margin, float(score))

    @cached_property
    def _model(self) -> Any:
        from facenet_pytorch import MTCNN

        return MTCNN(keep_all=True).eval()


@dataclass(frozen=True)
class DlibDetector:
    """dlib's frontal face detector (HOG) with its 68 landmarks; the largest face where there are several.

    The picture's edge is repeated around it by a quarter of its shorter side before looking: without, it found 113 of
    120 LFW crops and 118 of 120 UTKFace, with it 118 and 119; half, mirrored or black margins and enlarging to 256 px
    gain no more. Found in all: 495 of 500 UTKFace at 128 px, 682 of 700 LFW at 224 px, 28 of 28 CelebA-HQ at 256 and
    at 128 px, none on 308 pictures without a face.
    """

    weights: str | None = None

    def detect(self, images: Image) -> list[Detection | None]:
        return [self._detect(pixels) for pixels in to_pixels(images)]

    def landmarks68(self, images: Image) -> list[Points | None]:
        """The 68 landmarks (68, 2) of each picture, None where there is no face."""
        return [None if face is None else face.landmarks for face in self.detect(images)]

    def cards(self) -> tuple[Card, ...]:
        return (named("dlib_landmarks68"),)

    def _detect(self, pixels: Pixels) -> Detection | None:
        padded, margin = pad(pixels, 0.25)
        boxes, scores, _ = self._finder.run(padded, 0)
        if not boxes:
            return None
        best = max(range(len(boxes)), key=lambda i: boxes[i].area())
        box = np.array([boxes[best].left(), boxes[best].top(), boxes[best].right(), boxes[best].bottom()], float)
        landmarks = np.array([[p.x, p.y] for p in self._predictor(padded, boxes[best]).parts()], float) - margin
        return Detection(box - margin, five_points(landmarks), scores[best], landmarks)

    @cached_property
    def _finder(self) -> Any:
        return import_dlib().get_frontal_face_detector()

    @cached_property
    def _predictor(self) -> Any:
        return import_dlib().shape_predictor(str(resolve(named("dlib_landmarks68"), self.weights)))


@dataclass(frozen=True)
class FaceNet:
    """FaceNet (Inception-ResNet v1) of facenet-pytorch, 512 numbers: the face's box, margin 14, 160 px, not aligned.

    The paper's recognizer, with its preprocessing. `weights` is a path to the card's file; other weights have a Card of
    their own.
    """

    card: str | Card
    detector: Detector = MtcnnDetector(padding=0.0)
    weights: str | None = None

    @property
    def name(self) -> str:
        return named(self.card).name

    def cards(self) -> tuple[Card, ...]:
        return (named(self.card), *self.detector.cards())

    def embed(self, images: Image) -> Embeddings:
        faces = self.detector.detect(images)
        found = zip(to_pixels(images), faces, strict=True)
        crops = [None if face is None else facenet_crop(pixels, face.box) for pixels, face in found]
        return _rows(crops, lambda batch: self._encode(batch.to(images.device)), 512, images.device)

    def _encode(self, crops: Tensor) -> Tensor:
        with torch.inference_mode():
            rows: Tensor = self._model.to(crops.device)(crops)
        return rows

    @cached_property
    def _model(self) -> Any:
        from facenet_pytorch import InceptionResnetV1

        state = torch.load(resolve(named(self.card), self.weights), map_location="cpu", weights_only=True)
        model = InceptionResnetV1(pretrained=None)
        model.load_state_dict({key: value for key, value in state.items() if not key.startswith("logits.")})
        return model.eval().requires_grad_(False)


@dataclass(frozen=True)
class ArcFaceOnnx:
    """Any ArcFace-family network in ONNX: five points onto the 112 px template, (x / 255 - 0.5) / 0.5, RGB.

    Aligned by InsightFace's own norm_crop (a least-squares similarity, black outside the picture); the authors fit
    the same transform with OpenCV's robust estimator. `weights` is a path to the card's file.
    """

    card: str | Card
    detector: Detector = MtcnnDetector()
    weights: str | None = None

    @property
    def name(self) -> str:
        return named(self.card).name

    def cards(self) -> tuple[Card, ...]:
        return (named(self.card), *self.detector.cards())

    def embed(self, images: Image) -> Embeddings:
        session = open_onnx(self._path, images.device)
        dimension = arcface_dimension(self._path, session)
        faces = self.detector.detect(images)
        found = zip(to_pixels(images), faces, strict=True)
        crops = [None if face is None else arcface_crop(pixels, face.points) for pixels, face in found]
        return _rows(crops, lambda batch: run_arcface(session, batch), dimension, images.device)

    @cached_property
    def _path(self) -> Path:
        return resolve(named(self.card), self.weights)


@dataclass(frozen=True)
class DlibResNet:
    """dlib's face recognition network, 128 numbers, from its 150 px chip aligned by 68 landmarks.

    dlib compares by distance (same person below 0.6); rows here are made unit and compared by cosine, where impostors
    lie high (mean 0.84 on LFW): use a threshold calibrated on clean pairs, as every table does.
    """

    card: str | Card = "dlib"
    detector: "DlibDetector | KnownPlaces" = DlibDetector()
    weights: str | None = None

    @property
    def name(self) -> str:
        return named(self.card).name

    def cards(self) -> tuple[Card, ...]:
        return (named(self.card), *self.detector.cards())

    def embed(self, images: Image) -> Embeddings:
        landmarks = self.detector.landmarks68(images)
        rows = [
            None if points is None else self._describe(pixels, points)
            for pixels, points in zip(to_pixels(images), landmarks, strict=True)
        ]
        return _rows(rows, lambda batch: batch, 128, images.device)

    def _describe(self, pixels: Pixels, landmarks: Points) -> Tensor:
        dlib = import_dlib()
        parts = [dlib.point(int(x), int(y)) for x, y in landmarks]
        shape = dlib.full_object_detection(dlib.rectangle(0, 0, pixels.shape[1], pixels.shape[0]), parts)
        return torch.tensor(list(self._model.compute_face_descriptor(pixels, shape)))

    @cached_property
    def _model(self) -> Any:
        return import_dlib().face_recognition_model_v1(str(resolve(named(self.card), self.weights)))


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


def with_places_of(images: Image, recognizer: Recognizer) -> Recognizer:
    """`recognizer`, looking for faces where they are on `images`, whatever is there now; one without a detector as it is."""
    if not isinstance(recognizer, FaceNet | ArcFaceOnnx | DlibResNet):
        return recognizer
    return replace(recognizer, detector=KnownPlaces(tuple(recognizer.detector.detect(images))))


def align(picture: Picture, points: Points, size: int, template: Points = FACES128_TEMPLATE) -> Picture:
    """The picture turned, scaled and shifted so that its five `points` come to lie on `template`, `size` pixels a side.

    `template` (5, 2) is in fractions of the side. Least-squares similarity; smoothed before it is made smaller; the
    picture's edge is continued where the result reaches beyond it.
    """
    from skimage.filters import gaussian
    from skimage.transform import SimilarityTransform, warp

    transform = SimilarityTransform.from_estimate(points, template * size - 0.5)
    if not transform:
        raise BadPicture(f"these five points cannot be aligned: {points.tolist()} ({transform})")
    pixels = picture.permute(1, 2, 0).double().cpu().numpy()
    blur = max(0.0, (1 / transform.scale - 1) / 2)
    smooth = gaussian(pixels, blur, mode="nearest", channel_axis=-1) if blur else pixels
    warped = warp(smooth, transform.inverse, output_shape=(size, size), order=1, mode="edge")
    return torch.from_numpy(warped).permute(2, 0, 1).to(picture)


def five_points(landmarks: Points) -> Points:
    """Eyes' centres, nose tip and mouth corners (5, 2) of 68 landmarks."""
    eyes = landmarks[36:42].mean(0), landmarks[42:48].mean(0)
    return np.stack([*eyes, landmarks[30], landmarks[48], landmarks[54]])


def facenet_crop(pixels: Pixels, box: Points) -> Tensor:
    """A face box with facenet-pytorch's margin of 14, (3, 160, 160), (x - 127.5) / 128."""
    from facenet_pytorch import extract_face, fixed_image_standardization

    face: Tensor = extract_face(PIL.Image.fromarray(pixels), box, image_size=160, margin=14)
    standard: Tensor = fixed_image_standardization(face)
    return standard


def arcface_crop(pixels: Pixels, points: Points) -> Tensor:
    """A face on the ArcFace template, (3, 112, 112) in [-1, 1]."""
    from insightface.utils.face_align import norm_crop

    face = norm_crop(pixels, points.astype(np.float32), image_size=112)
    return torch.from_numpy(face).permute(2, 0, 1).float() / 127.5 - 1


def arcface_dimension(path: Path, session: Any) -> int:
    """The length of a network's embedding; ValueError names the file that is no ArcFace network."""
    inputs, outputs = session.get_inputs(), session.get_outputs()
    taken, given = [tensor.shape for tensor in inputs], [tensor.shape for tensor in outputs]
    one_row = len(given) == 1 and len(given[0]) == 2 and isinstance(given[0][1], int)
    if len(taken) != 1 or list(taken[0][1:]) != [3, 112, 112] or not one_row:
        raise ValueError(
            f"{path}: an ArcFace network takes (n, 3, 112, 112) and gives (n, d); this takes {taken}, gives {given}"
        )
    return int(given[0][1])


def run_arcface(session: Any, crops: Tensor) -> Tensor:
    """Rows of a batch of crops; one at a time where the graph has a fixed batch size of 1."""
    (taken,) = session.get_inputs()
    step = 1 if taken.shape[0] == 1 else len(crops)
    runs = [session.run(None, {taken.name: part.numpy()})[0] for part in torch.split(crops, step)]
    return torch.from_numpy(np.concatenate(runs))


def pad(pixels: Pixels, fraction: float) -> tuple[Pixels, int]:
    """The picture with its edge repeated around it, and the width of that margin in pixels."""
    margin = round(fraction * min(pixels.shape[:2]))
    return np.pad(pixels, ((margin, margin), (margin, margin), (0, 0)), mode="edge"), margin


def to_pixels(images: Image) -> list[Pixels]:
    return list(to_bytes(images).permute(0, 2, 3, 1).contiguous().cpu().numpy())


def import_dlib() -> Any:
    try:
        import dlib
    except ImportError as error:
        raise ImportError('dlib is not installed. Remedy: `pip install "keyanon[offline]"`.') from error
    return dlib


def _rows(
    crops: Sequence[Tensor | None], encode: Callable[[Tensor], Tensor], dimension: int, device: torch.device
) -> Embeddings:
    """Unit rows where there is a crop, rows of NaN where there is none."""
    rows = torch.full((len(crops), dimension), torch.nan, device=device)
    found = [i for i, crop in enumerate(crops) if crop is not None]
    if found:
        batch = torch.stack([crop for crop in crops if crop is not None])
        rows[found] = normalize(encode(batch).to(device, torch.float32))
    return rows
