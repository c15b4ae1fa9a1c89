"""Face detection, alignment and recognition: pictures in, unit rows out, and rows of NaN where no face was found.

With `lengths` "raw" rows are as long as the network gives them. Whoever takes cosines of such rows makes them unit rows first.

No face found is a result, counted in every table, unless a detector's `enrolment` says "lowered": so every picture gets a box, as
in the authors' code. Pictures are clipped and rounded to 8 bits first, as a published file is. Coordinates are in pixels of the
picture given, x to the right and y down.

Models run on the device of the pictures given to them, and are loaded at first use: making an object needs no weights.
"""

from collections.abc import Callable, Sequence
from dataclasses import Field, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torch.nn.functional import normalize

from keyanon.errors import BadData
from keyanon.faces.backbones import FaceTransformer, IResNet, load_face_transformer, load_iresnet
from keyanon.faces.detection import (
    AtPlaces,
    Detection,
    Detector,
    DlibDetector,
    FindsAll,
    KnownPlaces,
    MtcnnDetector,
    Points,
    RgbArray,
    import_dlib,
    to_pixels,
)
from keyanon.faces.finding import Finder
from keyanon.faces.onnx import open_onnx
from keyanon.finite import finite, within
from keyanon.settings import checked
from keyanon.types import Embeddings, Image, Recognizer
from keyanon.weights import Card, named, resolve

Alignment = Literal["least_squares", "ransac"]
Lengths = Literal["unit", "raw"]


@checked
@dataclass(frozen=True)
class FaceNet:
    """FaceNet (Inception-ResNet v1) of facenet-pytorch, 512 numbers: the face's box, margin 14, 160 px, not aligned.

    The paper's recognizer, with its preprocessing. Its network makes unit rows itself, so there are no others. `weights` is a path
    to the card's file; other weights have a Card of their own.
    """

    card: str | Card
    detector: Detector = field(default_factory=lambda: MtcnnDetector(padding=0.0))
    weights: str | None = None

    @property
    def name(self) -> str:
        return named(self.card).name

    def cards(self) -> tuple[Card, ...]:
        return (named(self.card), *self.detector.cards())

    def embed(self, images: Image) -> Embeddings:
        crops = crops_of(images, self.detector, lambda pixels, face: box_crop(pixels, face.box, 160))
        return _network_rows(crops, self._model, 512, images.device)

    @cached_property
    def _model(self) -> Any:
        from facenet_pytorch import InceptionResnetV1

        state = torch.load(resolve(named(self.card), self.weights), map_location="cpu", weights_only=True)
        model = InceptionResnetV1(pretrained=None)
        model.load_state_dict({key: value for key, value in state.items() if not key.startswith("logits.")})
        return model.eval().requires_grad_(False)


@checked
@dataclass(frozen=True)
class AdaFaceViT:
    """AdaFace's vision transformer of CVLface, 512 numbers, preprocessed as the paper has it: the face's box, not aligned.

    Margin 14, 112 px, (x - 127.5) / 128. Its own authors align the face (Kim et al., arXiv 2204.00964). `weights` is a path to the
    card's file, `lengths` that of the rows: 1, or the network's own.
    """

    card: str | Card = "adaface_vit"
    detector: Detector = field(default_factory=lambda: MtcnnDetector(padding=0.0))
    weights: str | None = None
    lengths: Lengths = "unit"

    @property
    def name(self) -> str:
        return named(self.card).name

    def cards(self) -> tuple[Card, ...]:
        return (named(self.card), *self.detector.cards())

    def embed(self, images: Image) -> Embeddings:
        net = self._network
        crops = crops_of(images, self.detector, lambda pixels, face: box_crop(pixels, face.box, 112))
        return _network_rows(crops, net, net.dimension, images.device, self.lengths)

    @cached_property
    def _network(self) -> FaceTransformer:
        return load_face_transformer(resolve(named(self.card), self.weights))


@checked
@dataclass(frozen=True)
class ArcFace:
    """ArcFace's residual network as InsightFace publishes it for PyTorch, in single precision; fed as ArcFaceOnnx is.

    `weights` is a path to the card's file, a backbone.pth.
    """

    card: str | Card
    detector: Detector = field(default_factory=MtcnnDetector)
    weights: str | None = None
    alignment: Alignment = "least_squares"
    lengths: Lengths = "unit"

    @property
    def name(self) -> str:
        return named(self.card).name

    def cards(self) -> tuple[Card, ...]:
        return (named(self.card), *self.detector.cards())

    def embed(self, images: Image) -> Embeddings:
        net = self._network
        crops = crops_of(images, self.detector, lambda pixels, face: arcface_crop(pixels, face.points, self.alignment))
        return _network_rows(crops, net, net.dimension, images.device, self.lengths)

    @cached_property
    def _network(self) -> IResNet:
        return load_iresnet(resolve(named(self.card), self.weights))


@checked
@dataclass(frozen=True)
class ArcFaceOnnx:
    """Any ArcFace-family network in ONNX: five points onto the 112 px template, (x / 255 - 0.5) / 0.5, RGB.

    `alignment` is how a similarity is fitted to the points: by "least_squares" to all five, as InsightFace does, or by "ransac",
    as the authors do. `weights` is a path to the card's file. `lengths` is that of the rows: 1, or the network's own.
    """

    card: str | Card
    detector: Detector = field(default_factory=MtcnnDetector)
    weights: str | None = None
    alignment: Alignment = "least_squares"
    lengths: Lengths = "unit"
    added_fields: ClassVar = ("alignment", "lengths")

    @property
    def name(self) -> str:
        return named(self.card).name

    def cards(self) -> tuple[Card, ...]:
        return (named(self.card), *self.detector.cards())

    def embed(self, images: Image) -> Embeddings:
        session = open_onnx(self._path, images.device)
        dimension = arcface_dimension(self._path, session)
        crops = crops_of(images, self.detector, lambda pixels, face: arcface_crop(pixels, face.points, self.alignment))
        return _rows(crops, lambda batch: run_arcface(session, batch), dimension, images.device, self.lengths)

    @cached_property
    def _path(self) -> Path:
        return resolve(named(self.card), self.weights)


@checked
@dataclass(frozen=True)
class DlibResNet:
    """dlib's face recognition network, 128 numbers, from its 150 px chip aligned by 68 landmarks.

    dlib compares by distance (same person below 0.6); rows here are made unit and compared by cosine, where impostors
    lie high (mean 0.84 on LFW): use a threshold calibrated on clean pairs, as every table does. With `lengths` "raw" they stay as
    long as dlib makes them.
    """

    card: str | Card = "dlib"
    detector: "DlibDetector | KnownPlaces | AtPlaces" = field(default_factory=DlibDetector)
    weights: str | None = None
    lengths: Lengths = "unit"
    added_fields: ClassVar = ("lengths",)

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
        return _rows(rows, lambda batch: batch, 128, images.device, self.lengths)

    def _describe(self, pixels: RgbArray, landmarks: Points) -> Tensor:
        dlib = import_dlib()
        parts = [dlib.point(int(x), int(y)) for x, y in landmarks]
        shape = dlib.full_object_detection(dlib.rectangle(0, 0, pixels.shape[1], pixels.shape[0]), parts)
        return torch.tensor(list(self._model.compute_face_descriptor(pixels, shape)))

    @cached_property
    def _model(self) -> Any:
        return import_dlib().face_recognition_model_v1(str(resolve(named(self.card), self.weights)))


@runtime_checkable
class Detects(Recognizer, Protocol):
    """A recognizer, a dataclass, that embeds the face that its detector finds."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def detector(self) -> Detector: ...


def with_places_of(images: Image, recognizer: Recognizer) -> Recognizer:
    """`recognizer`, looking for faces where they are on `images`, whatever is there now; one without a detector as it is."""
    if not isinstance(recognizer, Detects):
        return recognizer
    return replace(recognizer, detector=KnownPlaces(tuple(recognizer.detector.detect(images))))


def at_places(recognizer: Recognizer, places: Sequence[Points | None]) -> Recognizer:
    """`recognizer`, describing of each picture the face at a known place, a box (4,); its own choice where that is None.

    One without a detector is given back as it is.
    """
    known = any(place is not None for place in places)
    if not known or not isinstance(recognizer, Detects) or not isinstance(recognizer.detector, FindsAll):
        return recognizer
    return replace(recognizer, detector=AtPlaces(recognizer.detector, tuple(places)))


def describing(recognizer: Recognizer, finder: Finder, originals: Image) -> Recognizer:
    """`recognizer`, describing on every view of these pictures the face that it describes on the originals.

    On an original of several faces that is the largest; on its views it is the face at that place, and none is no face. Originals
    of one face leave the recognizer its own choice. So do all with the authors' enrolment: some face is found on every view.
    """
    if not isinstance(recognizer, Detects):
        return recognizer
    if isinstance(recognizer.detector, MtcnnDetector) and recognizer.detector.enrolment == "lowered":
        return recognizer
    return at_places(recognizer, [faces[0].box if len(faces) > 1 else None for faces in finder.found(originals)])


def crops_of(
    images: Image, detector: Detector, cut: Callable[[RgbArray, Detection], Tensor | None]
) -> list[Tensor | None]:
    """What `cut` makes of each picture and the face that a detector finds there; None where it finds none."""
    found = zip(to_pixels(images), detector.detect(images), strict=True)
    return [None if face is None else cut(pixels, face) for pixels, face in found]


def box_crop(pixels: RgbArray, box: Points, size: int) -> Tensor:
    """A face box with facenet-pytorch's margin of 14, (3, size, size), (x - 127.5) / 128."""
    from facenet_pytorch import extract_face, fixed_image_standardization

    face: Tensor = extract_face(PIL.Image.fromarray(pixels), box, image_size=size, margin=14)
    standard: Tensor = fixed_image_standardization(face)
    return standard


def arcface_crop(pixels: RgbArray, points: Points, alignment: Alignment = "least_squares") -> Tensor | None:
    """A face on the ArcFace template, (3, 112, 112) in [-1, 1], black outside the picture; None if no similarity fits the points.

    With "ransac" OpenCV's robust estimator may leave out points as outliers. It draws the same samples at every call.
    """
    import cv2
    from insightface.utils.face_align import arcface_dst, norm_crop

    points = points.astype(np.float32)
    if alignment == "least_squares":
        face = norm_crop(pixels, points, image_size=112)
    else:
        similarity, _ = cv2.estimateAffinePartial2D(points, arcface_dst)
        if similarity is None:
            return None
        face = cv2.warpAffine(pixels, similarity, (112, 112), borderValue=0)
    return torch.from_numpy(face).permute(2, 0, 1).float() / 127.5 - 1


def arcface_dimension(path: Path, session: Any) -> int:
    """The length of a network's embedding; BadData names the file that is no ArcFace network."""
    inputs, outputs = session.get_inputs(), session.get_outputs()
    taken, given = [tensor.shape for tensor in inputs], [tensor.shape for tensor in outputs]
    one_row = len(given) == 1 and len(given[0]) == 2 and isinstance(given[0][1], int)
    if len(taken) != 1 or list(taken[0][1:]) != [3, 112, 112] or not one_row:
        raise BadData(
            f"{path}: an ArcFace network takes (n, 3, 112, 112) and gives (n, d); this takes {taken}, gives {given}"
        )
    return int(given[0][1])


def run_arcface(session: Any, crops: Tensor) -> Tensor:
    """Rows of a batch of crops; one at a time where the graph has a fixed batch size of 1."""
    (taken,) = session.get_inputs()
    step = 1 if taken.shape[0] == 1 else len(crops)
    runs = [session.run(None, {taken.name: part.numpy()})[0] for part in torch.split(crops, step)]
    return torch.from_numpy(np.concatenate(runs))


def _rows(
    crops: Sequence[Tensor | None],
    encode: Callable[[Tensor], Tensor],
    dimension: int,
    device: torch.device,
    lengths: Lengths = "unit",
) -> Embeddings:
    """Rows where there is a crop, of length 1 or raw, and rows of NaN where there is none."""
    rows = torch.full((len(crops), dimension), torch.nan, device=device)
    found = [i for i, crop in enumerate(crops) if crop is not None]
    if found:
        batch = torch.stack([crop for crop in crops if crop is not None])
        with within("the recognizer's network", rows=torch.tensor(found)):
            embedded = finite(encode(batch).to(device, torch.float32), "an embedding")
            rows[found] = embedded if lengths == "raw" else normalize(embedded)
    return rows


def _network_rows(
    crops: Sequence[Tensor | None],
    network: torch.nn.Module,
    dimension: int,
    device: torch.device,
    lengths: Lengths = "unit",
) -> Embeddings:
    """`_rows` by a network in PyTorch."""

    def encode(batch: Tensor) -> Tensor:
        with torch.inference_mode():
            rows: Tensor = network.to(device)(batch.to(device))
        return rows

    return _rows(crops, encode, dimension, device, lengths)
