"""Alignment against known transforms, preprocessing against the libraries it follows, rows of NaN, and real faces."""

import importlib.util
import os
import sys
import tarfile
import warnings
from collections import defaultdict
from dataclasses import dataclass
from hashlib import file_digest
from pathlib import Path

import numpy as np
import onnx
import PIL.Image
import pytest
import torch
from onnx import TensorProto, helper

import keyanon  # noqa: F401  (before facenet_pytorch: it makes torchvision importable)
from keyanon.channel.pixels import from_pil, resize
from keyanon.faces.alignment import FACES128_TEMPLATE, align
from keyanon.faces.detection import Detection, DlibDetector, MtcnnDetector, import_dlib, to_pixels
from keyanon.faces.onnx import open_onnx
from keyanon.faces.recognition import ArcFaceOnnx, DlibResNet, FaceNet, arcface_crop, facenet_crop, with_places_of
from keyanon.types import BadPicture, Recognizer
from keyanon.weights import Card, MissingWeights, Release, locate, missing, named
from tests.conftest import PixelRecognizer

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
    crop = facenet_crop(to_pixels(image)[0], face.detection.box)
    assert crop.shape == (3, 160, 160)
    assert -127.5 / 128 <= crop.min() < crop.max() <= 127.5 / 128
    with torch.no_grad():
        expected = facenet._model(crop[None])[0]
    torch.testing.assert_close(facenet.embed(image)[0], expected, atol=1e-5, rtol=0)


def test_the_facenet_margin_is_14_of_160():
    pixels = np.zeros((200, 200, 3), np.uint8)
    pixels[20:180, 20:180] = 255  # the box grown by 7 of 146 pixels a side
    crop = facenet_crop(pixels, np.array([27.0, 27.0, 173.0, 173.0]))
    assert (crop == 127.5 / 128).all()
    assert (facenet_crop(pixels, np.array([25.0, 25.0, 173.0, 173.0]))[:, :, 0] < 0).any()


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


@pytest.mark.parametrize("path", sorted((ROOT / "conf" / "recognizers").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recognizer_config_is_made_without_weights(path, monkeypatch, tmp_path):
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    monkeypatch.setenv("KEYANON_CACHE", str(tmp_path))
    made = instantiate(OmegaConf.load(path), _convert_="all")
    assert list(made) == [path.stem]
    recognizer = made[path.stem]
    assert isinstance(recognizer, Recognizer)
    assert recognizer.name == path.stem
    assert all(isinstance(card, Card) for card in recognizer.cards())
    assert recognizer.cards()


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
