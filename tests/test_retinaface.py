"""RetinaFace's arithmetic with numbers that make its answers known, and what is measured with a detector's boxes and points."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from keyanon.channel.pixels import to_floats
from keyanon.faces import detection
from keyanon.faces.detection import Detection, RetinaFaceDetector, retinaface
from keyanon.faces.retinaface import RetinaFace, anchors
from keyanon.measures.scorers import Against, BoxDistance, LandmarkDistance, MaskOverlap
from keyanon.types import Image, Mask
from keyanon.weights import WrongWeights

SIDE = 64
BOX = (
    1.0,
    -2.0,
    math.log(2) / 0.2,
    math.log(3) / 0.2,
)  # a tenth of a side right, two up; twice as wide, thrice as high
POINTS = tuple(float(number) for number in range(10))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file in the public layout, whose heads see nothing: they say BOX and POINTS of each anchor; one scale is sure."""
    torch.manual_seed(0)
    network = RetinaFace()
    for heads, said in ((network.ClassHead, (0.0, -9.0)), (network.BboxHead, BOX), (network.LandmarkHead, POINTS)):
        for head in heads:
            torch.nn.init.zeros_(head.conv1x1.weight)
            head.conv1x1.bias.data = torch.tensor(said * 2)
    network.ClassHead[2].conv1x1.bias.data = torch.tensor([0.0, 3.0, 0.0, -9.0])  # anchors of 256 px, 32 px apart
    path = tmp_path_factory.mktemp("weights") / "Resnet50_Final.pth"
    torch.save({f"module.{name}": value for name, value in network.state_dict().items()}, path)
    return path


def test_anchors_stand_in_the_middle_of_their_cells():
    found = anchors((64, 96))
    assert len(found) == 2 * (8 * 12 + 4 * 6 + 2 * 3)
    assert found[0].tolist() == [4, 4, 16]
    assert found[1].tolist() == [4, 4, 32]
    assert found[2].tolist() == [12, 4, 16]
    assert found[-1].tolist() == [80, 48, 512]
    assert len(anchors((256, 256))) == 2688


def test_heads_are_read_against_their_anchors(weights):
    network = retinaface(weights)
    surest, boxes, points = network(torch.full((1, 3, SIDE, SIDE), 128.0))
    places = anchors((SIDE, SIDE))
    sure = torch.sigmoid(torch.tensor(3.0))
    assert (surest > 0.5).sum() == 4  # two by two cells
    assert surest.max().item() == pytest.approx(sure.item())
    assert not network.training
    for (x, y, side), box, five in zip(places.tolist(), boxes[0].tolist(), points[0].tolist(), strict=True):
        cx, cy = x + 0.1 * side, y - 0.2 * side
        assert box == pytest.approx([cx - side, cy - 1.5 * side, cx + side, cy + 1.5 * side], rel=1e-4, abs=1e-3)
        flat = [(x, y)[i % 2] + 0.1 * POINTS[i] * side for i in range(10)]
        assert np.ravel(five).tolist() == pytest.approx(flat, rel=1e-4, abs=1e-3)


def test_a_detector_gives_the_surest_face_and_forgets_those_that_it_covers(weights, monkeypatch):
    monkeypatch.setattr(detection, "resolve", lambda *_: weights)
    pictures = to_floats(torch.randint(0, 256, (2, 3, SIDE, SIDE), dtype=torch.uint8))
    faces = RetinaFaceDetector().faces(pictures)
    assert [len(found) for found in faces] == [1, 1]  # the four boxes of 512 x 768 px overlap
    (face,) = faces[0]
    assert face.score == pytest.approx(1 / (1 + math.exp(-3)))
    assert (face.box.shape, face.points.shape) == ((4,), (5, 2))
    assert RetinaFaceDetector(threshold=0.99).detect(pictures) == [None, None]
    assert [card.name for card in RetinaFaceDetector().cards()] == ["retinaface_r50"]


def test_another_file_is_refused(tmp_path):
    torch.save({"fc.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(WrongWeights, match=r"other\.pth: not the weights of RetinaFace"):
        retinaface(tmp_path / "other.pth")


@dataclass(frozen=True)
class Brightest:
    """A detector for tests: the face stands around the brightest pixel; black pictures have none."""

    def detect(self, images: Image) -> list[Detection | None]:
        found: list[Detection | None] = []
        for picture in images.sum(1):
            row, column = divmod(int(picture.argmax()), picture.shape[1])
            centre = np.array([column, row], float)
            around = np.array([[-2, -2], [2, -2], [0, 0], [-2, 2], [2, 2]], float)
            found.append(
                Detection(np.concatenate([centre - 4, centre + 4]), centre + around, 1.0)
                if picture.max() > -3
                else None
            )
        return found

    def cards(self) -> tuple[()]:
        return ()


def dots(*places: tuple[int, int] | None) -> Image:
    """Black pictures with one white pixel, at (x, y), or none."""
    pictures = torch.full((len(places), 3, 32, 32), -1.0)
    for picture, place in zip(pictures, places, strict=True):
        if place is not None:
            picture[:, place[1], place[0]] = 1
    return pictures


NO_MASK = torch.zeros(3, 1, 32, 32, dtype=torch.bool)
ORIGINAL, MOVED = dots((10, 10), (10, 10), (10, 10)), dots((10, 10), (13, 14), None)


def test_boxes_and_points_are_so_many_pixels_apart():
    for scorer in (BoxDistance(Brightest()), LandmarkDistance(Brightest())):
        here, moved, lost = scorer(MOVED, ORIGINAL, NO_MASK).tolist()
        assert (here, moved) == (0, pytest.approx(5))
        assert math.isnan(lost)


def test_the_authors_sum_the_five_points_along_each_axis_and_put_lost_faces_into_the_corner():
    boxes = BoxDistance(Brightest(), lost="corner")(MOVED, ORIGINAL, NO_MASK)
    assert boxes.tolist() == pytest.approx([0, 5, 10 * math.sqrt(2)])
    points = LandmarkDistance(Brightest(), "summed", "corner")(MOVED, ORIGINAL, NO_MASK)
    assert points.tolist() == pytest.approx([0, 5 * (3 + 4) / 2, 5 * 10])
    against = Against("anonymized", BoxDistance(Brightest()))
    assert against(MOVED, MOVED, NO_MASK)[:2].tolist() == [0, 0]
    assert against.meaning.label.endswith("to the view anonymized")


@dataclass(frozen=True)
class Bright:
    """A parser for tests: what is not black is face."""

    def mask(self, images: Image, size: tuple[int, int]) -> Mask:
        return images.mean(1, keepdim=True) > -1


@pytest.mark.parametrize(("rows", "iou", "dice"), [(16, 1, 1), (8, 1 / 2, 2 / 3), (0, 0, 0)])
def test_masks_overlap_by_so_much(rows, iou, dice):
    original, view = torch.full((2, 1, 3, 32, 32), -1.0)
    original[:, :, :16] = 1
    view[:, :, :rows] = 1
    assert MaskOverlap(Bright(), "iou")(view, original, NO_MASK).tolist() == pytest.approx([iou])
    assert MaskOverlap(Bright(), "dice")(view, original, NO_MASK).tolist() == pytest.approx([dice])


def test_where_no_mask_is_found_nothing_can_be_said():
    black = dots(None)
    for measure in ("iou", "dice"):
        assert MaskOverlap(Bright(), measure)(black, black, NO_MASK).isnan().all()
