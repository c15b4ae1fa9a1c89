"""Alignment against known transforms, preprocessing against the libraries it follows, rows of NaN, and real faces."""

import importlib.util
import os
import sys
import tarfile
import warnings
from collections import defaultdict
from dataclasses import dataclass, replace
from hashlib import file_digest
from pathlib import Path

import cv2
import numpy as np
import onnx
import PIL.Image
import pytest
import torch
from onnx import TensorProto, helper

import keyanon  # noqa: F401  (before facenet_pytorch: it makes torchvision importable)
from keyanon.channel.pixels import from_pil, resize
from keyanon.errors import BadSetting
from keyanon.faces.alignment import FACES128_TEMPLATE, align
from keyanon.faces.backbones import load_face_transformer, load_iresnet
from keyanon.faces.detection import AtPlaces, Detection, DlibDetector, MtcnnDetector, import_dlib, to_pixels
from keyanon.faces.finding import Finder
from keyanon.faces.onnx import open_onnx
from keyanon.faces.recognition import (
    AdaFaceViT,
    ArcFace,
    ArcFaceOnnx,
    DlibResNet,
    FaceNet,
    arcface_crop,
    box_crop,
    describing,
    with_places_of,
)
from keyanon.types import BadPicture, Recognizer
from keyanon.weights import Card, MissingWeights, Release, locate, missing, named
from tests.conftest import PixelRecognizer
from tests.test_backbones import save_tiny_face_transformer, save_tiny_iresnet

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("KEYANON_DATA", ROOT.parent / "shared" / "data"))


@dataclass(frozen=True)
class Given:
    """A detector that is told where the face is: nowhere on a black picture."""

    detection: Detection

    def detect(self, images):
        return [self.detection if image.max() > -1 else None for image in images]

    def cards(self):
        return ()


@pytest.fixture(scope="module")
def astronaut() -> torch.Tensor:
    """A 256 px picture with one face (NASA, public domain; scikit-image ships it)."""
    data = pytest.importorskip("skimage.data")
    picture = PIL.Image.fromarray(data.astronaut()).crop((96, 0, 352, 256))
    return from_pil(picture)[None]


@pytest.fixture(scope="module")
def dlib_detector() -> DlibDetector:
    reason = missing(named("dlib_landmarks68"))
    if reason or importlib.util.find_spec("dlib") is None:
        pytest.skip(reason or "dlib is not installed")
    return DlibDetector()


def picture(size: int = 128, seed: int = 0) -> torch.Tensor:
    coarse = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic").clamp(-1, 1)[0]


def own_card(path: Path) -> Card:
    with path.open("rb") as file:
        digest = file_digest(file, "sha256").hexdigest()
    return Card(path.stem, path.name, Release(path.as_uri()), digest, "none", "nothing", "test")


def tiny_arcface(path: Path, batch: int | str = "n", size: int = 112) -> Card:
    """A network without weights: its 48 numbers are means over squares of 28 px."""
    inputs = [helper.make_tensor_value_info("input", TensorProto.FLOAT, [batch, 3, size, size])]
    outputs = [helper.make_tensor_value_info("output", TensorProto.FLOAT, [batch, 48])]
    nodes = [
        helper.make_node("AveragePool", ["input"], ["pooled"], kernel_shape=[28, 28], strides=[28, 28]),
        helper.make_node("Flatten", ["pooled"], ["output"]),
    ]
    graph = helper.make_graph(nodes, "tiny", inputs, outputs)
    onnx.save(helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 17)]), path)
    return own_card(path)


# Alignment


def test_points_already_on_the_template_leave_the_picture_alone():
    image = picture()
    torch.testing.assert_close(align(image, FACES128_TEMPLATE * 128 - 0.5, 128), image, atol=1e-5, rtol=0)


def test_a_shifted_face_is_shifted_back():
    image = picture()
    moved = torch.roll(image, (5, -3), dims=(1, 2))
    aligned = align(moved, FACES128_TEMPLATE * 128 - 0.5 + [-3, 5], 128)
    torch.testing.assert_close(aligned[:, 8:-8, 8:-8], image[:, 8:-8, 8:-8], atol=1e-5, rtol=0)


def test_a_turned_face_is_turned_back():
    image = picture()
    points = FACES128_TEMPLATE * 128 - 0.5
    turned = torch.rot90(image, 1, dims=(1, 2))  # (x, y) -> (y, 127 - x)
    aligned = align(turned, np.stack([points[:, 1], 127 - points[:, 0]], 1), 128)
    torch.testing.assert_close(aligned, image, atol=1e-5, rtol=0)


def test_a_loose_picture_is_smoothed_before_it_is_made_smaller():
    checkers = (torch.arange(512)[:, None] + torch.arange(512)[None, :]) % 2 * 2.0 - 1
    aligned = align(checkers.expand(3, -1, -1), FACES128_TEMPLATE * 512 - 0.5, 128)
    assert aligned.shape == (3, 128, 128)
    assert aligned.abs().max() < 0.1


def test_the_edge_is_continued_beyond_the_picture():
    aligned = align(torch.full((3, 64, 64), 0.5), FACES128_TEMPLATE * 32 + 40, 128)
    torch.testing.assert_close(aligned, torch.full((3, 128, 128), 0.5))


def test_five_equal_points_are_no_face():
    with pytest.raises(BadPicture, match="cannot be aligned"):
        align(picture(), np.zeros((5, 2)), 128)


# Detectors


@pytest.mark.parametrize("select", ["center_weighted_size", "largest"])
@pytest.mark.parametrize("padding", [0.0, 0.25])
def test_mtcnn_finds_the_one_face(astronaut, select, padding):
    (face,) = MtcnnDetector(select, padding).detect(astronaut)
    left_eye, right_eye, nose, left_mouth, right_mouth = face.points
    assert left_eye[0] < nose[0] < right_eye[0]
    assert left_eye[1] < nose[1] < left_mouth[1]
    assert left_mouth[0] < right_mouth[0]
    np.testing.assert_allclose(face.points.mean(0), [129, 123], atol=4)
    assert face.box[0] < left_eye[0]
    assert face.box[3] > left_mouth[1]
    assert face.score > 0.9


def test_the_rule_chooses_among_two_faces(astronaut):
    small = torch.nn.functional.interpolate(astronaut, scale_factor=0.6, mode="bilinear", antialias=True)
    both = torch.zeros(1, 3, 256, 640)
    both[..., :256] = astronaut
    both[..., 54:207, 256:409] = small  # in the middle
    (large,) = MtcnnDetector("largest").detect(both)
    (central,) = MtcnnDetector("center_weighted_size").detect(both)
    np.testing.assert_allclose(large.points[:, 0].mean(), 129, atol=4)
    np.testing.assert_allclose(central.points[:, 0].mean(), 256 + 0.6 * 129, atol=4)


@pytest.mark.parametrize(
    "empty",
    [torch.zeros(1, 3, 128, 128), torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1],
    ids=["grey", "noise"],
)
def test_no_face_is_none(empty):
    assert MtcnnDetector().detect(empty) == [None]


def test_a_picture_smaller_than_any_face_is_none():
    assert MtcnnDetector().detect(torch.zeros(2, 3, 12, 12)) == [None, None]
    assert MtcnnDetector(enrolment="lowered").detect(torch.zeros(2, 3, 12, 12)) == [None, None]


def chosen_by_the_authors(picture: torch.Tensor) -> tuple[np.ndarray, np.ndarray, int]:
    """The paper's authors' choice, by facenet-pytorch's own MTCNN: box, points, and how often thresholds had to fall.

    Thresholds fall by 0.8, then by 0.8 ** 2 more, and so on. Of several faces found at once center_weighted_size chooses, of
    several found later the likeliest is taken.
    """
    from facenet_pytorch import MTCNN

    mtcnn = MTCNN(margin=14, select_largest=False, selection_method="center_weighted_size")
    shown = PIL.Image.fromarray(to_pixels(picture)[0])
    attempt = 0
    boxes, scores, points = mtcnn.detect(shown, landmarks=True)
    while boxes is None:
        attempt += 1
        mtcnn.thresholds = [threshold * 0.8**attempt for threshold in mtcnn.thresholds]
        boxes, scores, points = mtcnn.detect(shown, landmarks=True)
        if boxes is not None:
            best = [int(np.argmax(scores))]
            boxes, scores, points = boxes[best], scores[best], points[best]
    box, _, five = mtcnn.select_boxes(boxes, scores, points, shown, method=mtcnn.selection_method)
    return box[0].astype(float), five[0].astype(float), attempt


def beside(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return torch.cat([left, right], dim=-1)


@pytest.mark.parametrize("case", ["face", "two faces", "faint", "two faint", "noise", "smooth"])
def test_with_lowered_thresholds_the_authors_choice_is_found(astronaut, case):
    small = torch.nn.functional.interpolate(astronaut, (96, 96), mode="bilinear", antialias=True)
    faint = 0.2 * torch.nn.functional.avg_pool2d(small, 7, 1, 3) + 0.7
    images = {
        "face": astronaut,
        "two faces": beside(astronaut, 0.5 * astronaut.flip(-1)),
        "faint": faint,
        "two faint": beside(faint, faint.flip(-1)),
        "noise": torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1,
        "smooth": picture(64)[None],
    }[case]
    box, points, attempts = chosen_by_the_authors(images)
    detector = MtcnnDetector(padding=0.0, enrolment="lowered")
    (face,) = detector.detect(images)
    np.testing.assert_allclose(face.box, box, rtol=1e-6)
    np.testing.assert_allclose(face.points, points, rtol=1e-6)
    (fixed,) = MtcnnDetector(padding=0.0).detect(images)
    assert (fixed is None) == (attempts > 0) == (case not in {"face", "two faces"})
    if attempts:
        assert len(detector.faces(images)[0]) == 1
    # The next picture is looked at with the thresholds of the first.
    (again,) = detector.detect(astronaut)
    np.testing.assert_array_equal(again.box, MtcnnDetector(padding=0.0).detect(astronaut)[0].box)


def test_thresholds_fall_a_limited_number_of_times(monkeypatch):
    blank = torch.zeros(1, 3, 32, 32)
    assert MtcnnDetector(enrolment="lowered").detect(blank)[0] is not None
    looks = []
    looked = MtcnnDetector._looked

    def counted(self, picture, thresholds):
        looks.append(thresholds[0] / 0.6)
        return looked(self, picture, thresholds)

    monkeypatch.setattr(MtcnnDetector, "_looked", counted)
    monkeypatch.setattr("keyanon.faces.detection.LOWERINGS", 3)
    assert MtcnnDetector(enrolment="lowered").detect(blank) == [None]
    np.testing.assert_allclose(looks, [1, 0.8, 0.8**3, 0.8**6])
    assert MtcnnDetector().detect(blank) == [None]
    assert len(looks) == 5


def test_another_enrolment_alignment_or_length_is_refused():
    with pytest.raises(BadSetting, match="enrolment='never': expected one of fixed, lowered"):
        MtcnnDetector(enrolment="never")
    for kind in (ArcFace, ArcFaceOnnx):
        with pytest.raises(BadSetting, match="alignment='affine': expected one of least_squares, ransac"):
            kind("mobilefacenet", alignment="affine")
    for kind in (AdaFaceViT, ArcFace, ArcFaceOnnx, DlibResNet):
        with pytest.raises(BadSetting, match="lengths='long': expected one of unit, raw"):
            kind("mobilefacenet", lengths="long")


def test_with_lowered_thresholds_each_view_is_described_by_the_recognizers_own_choice(astronaut):
    both = beside(astronaut, astronaut.flip(-1))
    finder = Finder("all", MtcnnDetector(), MtcnnDetector(), MtcnnDetector())
    fixed, lowered = (AdaFaceViT(detector=MtcnnDetector(padding=0.0, enrolment=how)) for how in ("fixed", "lowered"))
    assert isinstance(describing(fixed, finder, both).detector, AtPlaces)
    assert describing(lowered, finder, both) is lowered


@pytest.mark.weights
def test_dlib_agrees_with_mtcnn_on_the_points(astronaut, dlib_detector):
    (mine,), (other,) = dlib_detector.detect(astronaut), MtcnnDetector().detect(astronaut)
    np.testing.assert_allclose(mine.points, other.points, atol=5)
    (landmarks,) = dlib_detector.landmarks68(astronaut)
    assert landmarks.shape == (68, 2)
    assert landmarks[8, 1] == landmarks[:, 1].max()  # the chin is lowest
    assert dlib_detector.detect(torch.zeros(1, 3, 128, 128)) == [None]
    assert dlib_detector.landmarks68(torch.zeros(1, 3, 128, 128)) == [None]
    assert [card.name for card in dlib_detector.cards()] == ["dlib_landmarks68"]


def test_aligned_faces_land_on_the_template(astronaut):
    (face,) = MtcnnDetector().detect(astronaut)
    aligned = align(astronaut[0], face.points, 128)
    (again,) = MtcnnDetector().detect(aligned[None])
    np.testing.assert_allclose(again.points / 128, FACES128_TEMPLATE, atol=0.06)


def test_without_dlib_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "dlib", None)
    with pytest.raises(ImportError, match=r"keyanon\[offline\]"):
        import_dlib()


# Recognizers


@pytest.fixture(scope="module")
def face() -> Given:
    points = FACES128_TEMPLATE * 100 + 14
    return Given(Detection(np.array([20.0, 10.0, 110.0, 120.0]), points, 1.0))


def some_with_a_face() -> torch.Tensor:
    return torch.stack([picture(seed=1), -torch.ones(3, 128, 128), picture(seed=2)])


def check_raw_rows(recognizer: Recognizer, expected: torch.Tensor) -> None:
    """Raw, the row of `picture(seed=1)` is as the network gives it; another differs in length, and a lost face stays lost."""
    images, raw = some_with_a_face(), replace(recognizer, lengths="raw")
    rows = raw.embed(images)
    torch.testing.assert_close(rows[0], expected, atol=1e-5, rtol=1e-5)
    long, lost, other = rows.norm(dim=1)
    assert lost.isnan()
    assert abs(long - other) > 1e-3
    assert (rows[[0, 2]].norm(dim=1) - 1).abs().min() > 1e-3
    unit = torch.nn.functional.normalize(rows)
    torch.testing.assert_close(recognizer.embed(images), unit, atol=1e-6, rtol=0, equal_nan=True)


def check_rows(recognizer: Recognizer, dimension: int) -> None:
    images = some_with_a_face()
    rows = recognizer.embed(images)
    assert rows.shape == (3, dimension)
    assert rows[1].isnan().all()
    torch.testing.assert_close(rows[[0, 2]].norm(dim=1), torch.ones(2))
    assert (rows[0] - rows[2]).abs().max() > 1e-3
    alone = torch.cat([recognizer.embed(image[None]) for image in images])
    torch.testing.assert_close(alone, rows, equal_nan=True, atol=1e-5, rtol=0)
    assert recognizer.embed(images[1:2]).isnan().all()


@pytest.mark.parametrize("batch", [1, "n"])
def test_arcface_embeds_the_crop_that_insightface_makes(tmp_path, face, batch):
    recognizer = ArcFaceOnnx(tiny_arcface(tmp_path / "tiny.onnx", batch), face, str(tmp_path / "tiny.onnx"))
    check_rows(recognizer, 48)
    image = picture(seed=1)[None]
    crop = arcface_crop(to_pixels(image)[0], face.detection.points)
    expected = torch.nn.functional.avg_pool2d(crop, 28).flatten()
    torch.testing.assert_close(recognizer.embed(image)[0], expected / expected.norm(), atol=1e-5, rtol=0)
    check_raw_rows(recognizer, expected)
    assert recognizer.name == "tiny"
    assert [card.name for card in recognizer.cards()] == ["tiny"]


@pytest.mark.parametrize(("batch", "sizes"), [("n", [3]), (1, [1, 1, 1])])
def test_a_network_sees_all_faces_of_a_batch_at_once_if_it_can(tmp_path, face, monkeypatch, batch, sizes):
    path, seen = tmp_path / "tiny.onnx", []
    recognizer = ArcFaceOnnx(tiny_arcface(path, batch), face, str(path))
    session = open_onnx(path, torch.device("cpu"))

    class Watched:
        get_inputs, get_outputs = session.get_inputs, session.get_outputs

        def run(self, wanted, given):
            seen.extend(len(part) for part in given.values())
            return session.run(wanted, given)

    monkeypatch.setattr("keyanon.faces.recognition.open_onnx", lambda path, device: Watched())
    rows = recognizer.embed(torch.stack([picture(seed=i) for i in range(3)]))
    assert rows.isfinite().all()
    assert seen == sizes


def test_a_missing_provider_is_told_once_and_the_session_is_kept(tmp_path):
    tiny_arcface(tmp_path / "tiny.onnx")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        sessions = [open_onnx(tmp_path / "tiny.onnx", torch.device("meta")) for _ in range(3)]
    assert [str(warning.message)[:9] for warning in told] == ["tiny.onnx"]
    assert sessions[0] is sessions[1] is sessions[2]


@pytest.mark.parametrize("threads", [1, 2])
def test_onnxruntime_has_as_many_threads_as_pytorch(tmp_path, threads):
    tiny_arcface(tmp_path / "tiny.onnx")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        session = open_onnx(tmp_path / "tiny.onnx", torch.device("cpu"))
    finally:
        torch.set_num_threads(before)
    assert session.get_session_options().intra_op_num_threads == threads


def test_the_arcface_crop_is_the_face_on_the_112_template():
    from insightface.utils.face_align import arcface_dst

    pixels = to_pixels(picture(112)[None])[0]
    crop = arcface_crop(pixels, arcface_dst.astype(float))
    torch.testing.assert_close(crop, torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1, atol=1.1 / 127.5, rtol=0)


ARCFACE_TEMPLATE = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]], np.float32
)


def authors_crop(pixels: np.ndarray, points: np.ndarray) -> torch.Tensor:
    """As the paper's authors align a face for ArcFace, in OpenCV's own calls."""
    similarity, _ = cv2.estimateAffinePartial2D(points.astype(np.float32), ARCFACE_TEMPLATE)
    face = cv2.warpAffine(pixels, similarity, (112, 112), borderValue=0)
    return (torch.tensor(face).permute(2, 0, 1).float() / 255 - 0.5) / 0.5


def scattered(seed: int) -> np.ndarray:
    """The template turned, resized, moved, and each point off by up to a few pixels."""
    draw = np.random.default_rng(seed)
    angle, scale, noise = draw.normal(0, 0.3), draw.uniform(0.5, 2), draw.uniform(0, 5)
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return ARCFACE_TEMPLATE @ turn.T + draw.uniform(-20, 60, 2) + draw.normal(0, noise, (5, 2))


def test_ransac_is_opencvs_own_whatever_ran_before():
    pixels = to_pixels(picture(160, seed=3)[None])[0]
    sets = [scattered(seed) for seed in range(100)]
    cv2.setRNGSeed(1)
    first = [arcface_crop(pixels, points, "ransac") for points in sets]
    cv2.setRNGSeed(2)
    again = [arcface_crop(pixels, points, "ransac") for points in reversed(sets)][::-1]
    for one, other, points in zip(first, again, sets, strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, authors_crop(pixels, points), atol=1e-6, rtol=0)
    used = [cv2.estimateAffinePartial2D(p.astype(np.float32), ARCFACE_TEMPLATE)[1].sum() for p in sets]
    assert 10 < used.count(5) < 60  # all five, and so least squares too
    least = [arcface_crop(pixels, points) for points in sets]
    apart = [float((one - other).abs().mean()) for one, other in zip(first, least, strict=True)]
    assert max(apart) > 0.1


def test_points_that_fit_are_aligned_alike_and_an_outlier_is_left_out_by_ransac_alone():
    pixels = to_pixels(picture(160, seed=3)[None])[0]
    points = ARCFACE_TEMPLATE.astype(float) * 1.1 + [3, 7]
    least, robust = (arcface_crop(pixels, points, how) for how in ("least_squares", "ransac"))
    torch.testing.assert_close(least, robust, atol=2.1 / 127.5, rtol=0)
    moved = points + np.array([[0, 0], [0, 0], [25.0, 0], [0, 0], [0, 0]])
    torch.testing.assert_close(arcface_crop(pixels, moved, "ransac"), robust, atol=2.1 / 127.5, rtol=0)
    assert (arcface_crop(pixels, moved) - least).abs().mean() > 0.05


def test_points_that_no_similarity_fits_give_no_row(tmp_path):
    points = np.full((5, 2), 60.0)
    assert arcface_crop(to_pixels(picture()[None])[0], points, "ransac") is None
    nowhere = Given(Detection(np.array([20.0, 10.0, 110.0, 120.0]), points, 1.0))
    card = tiny_arcface(tmp_path / "tiny.onnx")
    recognizer = ArcFaceOnnx(card, nowhere, str(tmp_path / "tiny.onnx"), "ransac")
    assert recognizer.embed(picture()[None]).isnan().all()


@pytest.mark.data
def test_68_pictures_are_aligned_as_the_authors_do():
    detector, used = MtcnnDetector(padding=0.0), []
    for image in (image for pair in zip(*lfw_pairs(34), strict=True) for image in pair):
        (pixels,) = to_pixels(torch.nn.functional.interpolate(image, (112, 112), mode="area"))
        (face,) = detector.detect(image)
        points = face.points / 2
        torch.testing.assert_close(
            arcface_crop(pixels, points, "ransac"), authors_crop(pixels, points), atol=1e-6, rtol=0
        )
        used.append(int(cv2.estimateAffinePartial2D(points.astype(np.float32), ARCFACE_TEMPLATE)[1].sum()))
    assert len(used) == 68
    assert used.count(5) < 20


def test_a_network_of_another_shape_is_refused(tmp_path, face):
    card = tiny_arcface(tmp_path / "wide.onnx", size=224)
    with pytest.raises(ValueError, match=r"wide\.onnx.*224"):
        ArcFaceOnnx(card, face, str(tmp_path / "wide.onnx")).embed(some_with_a_face())


@pytest.fixture(scope="module")
def facenet(tmp_path_factory, face) -> FaceNet:
    from facenet_pytorch import InceptionResnetV1

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("facenet") / "random.pt"
    state = InceptionResnetV1(pretrained=None).state_dict()
    torch.save(state | {"logits.weight": torch.zeros(3, 512), "logits.bias": torch.zeros(3)}, path)
    return FaceNet(own_card(path), face, str(path))


def test_facenet_rows_are_those_of_facenet_pytorch(facenet, face):
    check_rows(facenet, 512)
    image = picture(seed=1)[None]
    crop = box_crop(to_pixels(image)[0], face.detection.box, 160)
    assert crop.shape == (3, 160, 160)
    assert -127.5 / 128 <= crop.min() < crop.max() <= 127.5 / 128
    with torch.no_grad():
        expected = facenet._model(crop[None])[0]
    torch.testing.assert_close(expected.norm(), torch.ones(()))  # by itself: raw rows would be the same
    torch.testing.assert_close(facenet.embed(image)[0], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("alignment", ["least_squares", "ransac"])
def test_arcface_rows_are_those_of_its_network(tmp_path, face, alignment):
    path = save_tiny_iresnet(tmp_path / "backbone.pth")
    recognizer = ArcFace(own_card(path), face, str(path), alignment)
    check_rows(recognizer, 16)
    image = picture(seed=1)[None]
    crop = arcface_crop(to_pixels(image)[0], face.detection.points, alignment)
    raw = load_iresnet(path)(crop[None])
    torch.testing.assert_close(recognizer.embed(image), torch.nn.functional.normalize(raw), atol=1e-6, rtol=0)
    check_raw_rows(recognizer, raw[0])
    assert [card.name for card in recognizer.cards()] == ["backbone"]


def test_adaface_rows_are_those_of_its_network_on_the_box(tmp_path, face):
    path = save_tiny_face_transformer(tmp_path / "model.safetensors")
    recognizer = AdaFaceViT(own_card(path), face, str(path))
    check_rows(recognizer, 16)
    image = picture(seed=1)[None]
    crop = box_crop(to_pixels(image)[0], face.detection.box, 112)
    assert crop.shape == (3, 112, 112)
    assert -127.5 / 128 <= crop.min() < crop.max() <= 127.5 / 128
    raw = load_face_transformer(path)(crop[None])
    expected = torch.nn.functional.normalize(raw)
    torch.testing.assert_close(recognizer.embed(image), expected, atol=1e-6, rtol=0)
    check_raw_rows(recognizer, raw[0])
    moved = replace(face.detection, points=face.detection.points + 9)
    torch.testing.assert_close(replace(recognizer, detector=Given(moved)).embed(image), expected, atol=1e-6, rtol=0)


def test_the_box_crop_of_112_is_that_of_facenet_pytorchs_mtcnn(astronaut):
    """Its own forward, box and crop in one, with the settings of the paper's authors."""
    from facenet_pytorch import MTCNN

    theirs = MTCNN(image_size=112, margin=14, select_largest=False, selection_method="center_weighted_size")
    pixels = to_pixels(astronaut)[0]
    (found,) = MtcnnDetector(padding=0.0).detect(astronaut)
    torch.testing.assert_close(box_crop(pixels, found.box, 112), theirs(PIL.Image.fromarray(pixels)), atol=1e-6, rtol=0)


def test_the_facenet_margin_is_14_of_160():
    pixels = np.zeros((200, 200, 3), np.uint8)
    pixels[20:180, 20:180] = 255  # the box grown by 7 of 146 pixels a side
    crop = box_crop(pixels, np.array([27.0, 27.0, 173.0, 173.0]), 160)
    assert (crop == 127.5 / 128).all()
    assert (box_crop(pixels, np.array([25.0, 25.0, 173.0, 173.0]), 160)[:, :, 0] < 0).any()


def test_a_mirrored_picture_gives_a_mirrored_crop(astronaut):
    mirrored = astronaut.flip(-1)
    detector = MtcnnDetector()
    crops = [arcface_crop(to_pixels(x)[0], detector.detect(x)[0].points) for x in (astronaut, mirrored)]
    assert (crops[0] - crops[1].flip(-1)).abs().mean() < 0.1


@pytest.mark.weights
def test_dlib_rows(astronaut, dlib_detector):
    recognizer = DlibResNet(detector=dlib_detector)
    assert [card.name for card in recognizer.cards()] == ["dlib", "dlib_landmarks68"]
    rows = recognizer.embed(torch.cat([astronaut, astronaut.flip(-1), torch.zeros_like(astronaut)]))
    assert rows.shape == (3, 128)
    torch.testing.assert_close(rows[:2].norm(dim=1), torch.ones(2))
    assert rows[0] @ rows[1] > 0.95
    assert rows[2].isnan().all()
    torch.testing.assert_close(recognizer.embed(astronaut)[0], rows[0])
    raw = replace(recognizer, lengths="raw").embed(astronaut)[0]
    assert raw.norm() > 1.05
    torch.testing.assert_close(raw / raw.norm(), rows[0])


def test_rows_for_missing_weights_say_what_is_missing(monkeypatch, tmp_path, face):
    monkeypatch.setenv("KEYANON_CACHE", str(tmp_path))
    monkeypatch.setenv("KEYANON_OFFLINE", "1")
    with pytest.raises(MissingWeights, match="facenet_vggface2"):
        FaceNet("facenet_vggface2", face).embed(some_with_a_face())


@pytest.mark.data
@pytest.mark.weights
@pytest.mark.parametrize("name", ["mobilefacenet", "dlib"])
def test_same_people_score_above_different_people(name, dlib_detector):
    """TAR over impostors' 99th percentile on 25 pairs of LFW (measured on 350 pairs: see the class)."""
    if locate(named(name)) is None:
        pytest.skip(missing(named(name)))
    recognizer = DlibResNet(detector=dlib_detector) if name == "dlib" else ArcFaceOnnx(name)
    first, second = (torch.cat([recognizer.embed(image) for image in images]) for images in lfw_pairs(25))
    similarity = (first @ second.T).numpy()
    genuine, impostor = np.diag(similarity), similarity[~np.eye(25, dtype=bool)]
    assert np.isnan(genuine).sum() <= 3
    assert np.nanmean(genuine) > np.nanmean(impostor) + 0.05
    assert np.mean(genuine[~np.isnan(genuine)] > np.nanquantile(impostor, 0.99)) > 0.85


def lfw_pairs(count: int) -> list[list[torch.Tensor]]:
    archive = DATA / "lfw-gray" / "pairs.tar"
    if not archive.is_file():
        pytest.skip(f"{archive} is not there (KEYANON_DATA)")
    people = defaultdict(list)
    with tarfile.open(archive) as tar:
        members = sorted((member for member in tar if member.name.endswith(".webp")), key=lambda member: member.name)
        for member in members[: 2 * count]:
            opened = PIL.Image.open(tar.extractfile(member)).convert("RGB")
            people[Path(member.name).stem.rsplit("_", 1)[0]].append(from_pil(resize(opened, 224))[None])
    pairs = list(people.values())
    return [[pair[0] for pair in pairs], [pair[1] for pair in pairs]]


# Configs


@pytest.mark.parametrize("protocol", ["ours", "authors"])
@pytest.mark.parametrize("path", sorted((ROOT / "conf" / "recognizers").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recognizer_config_is_made_without_weights(path, protocol, monkeypatch, tmp_path):
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    monkeypatch.setenv("KEYANON_CACHE", str(tmp_path))
    choices = OmegaConf.load(ROOT / "conf" / "protocol" / f"{protocol}.yaml")
    config = OmegaConf.create({"protocol": choices, "recognizers": OmegaConf.load(path)})
    made = instantiate(config.recognizers, _convert_="all")
    assert list(made) == [path.stem]
    recognizer = made[path.stem]
    assert isinstance(recognizer, Recognizer)
    assert recognizer.name == path.stem
    assert all(isinstance(card, Card) for card in recognizer.cards())
    assert recognizer.cards()
    if isinstance(recognizer.detector, MtcnnDetector):
        assert recognizer.detector.enrolment == choices.enrolment
    if isinstance(recognizer, ArcFace | ArcFaceOnnx):
        assert recognizer.alignment == choices.alignment
    if not isinstance(recognizer, FaceNet):
        assert recognizer.lengths == choices.lengths


def test_the_rate_of_faces_found_does_not_follow_the_protocol():
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    text = (ROOT / "conf" / "scorers" / "detected.yaml").read_text()
    assert "protocol" not in text
    assert instantiate(OmegaConf.create(text)).detected.detector.enrolment == "fixed"


def test_a_recognizer_looks_where_the_face_was(tmp_path):
    face = Detection(np.array([32.0, 24, 96, 104]), np.array([[48.0, 52], [80, 52], [64, 70], [52, 86], [76, 86]]), 1.0)
    shown, gone = torch.stack([picture(seed=1), picture(seed=2)]), torch.full((2, 3, 128, 128), -1.0)
    card = tiny_arcface(tmp_path / "tiny.onnx")
    recognizer = ArcFaceOnnx(card, Given(face), str(tmp_path / "tiny.onnx"))
    assert recognizer.embed(gone).isnan().all()
    looking = with_places_of(shown, recognizer)
    assert not looking.embed(gone + 0.1).isnan().any()
    torch.testing.assert_close(looking.embed(shown), recognizer.embed(shown))
    with pytest.raises(ValueError, match="1 pictures, and the faces of 2 are known"):
        looking.embed(shown[:1])
    assert with_places_of(gone, recognizer).embed(shown).isnan().all()
    assert with_places_of(shown, PixelRecognizer()) == PixelRecognizer()
