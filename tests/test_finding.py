"""Which faces are on a picture: found, paired, chosen, and shared by every part that asks."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from keyanon.errors import BadSetting
from keyanon.faces.detection import AtPlaces, Detection, nearest, overlap
from keyanon.faces.finding import Finder, paired, shares
from keyanon.faces.recognition import Detects, at_places, describing
from keyanon.types import Embeddings, Image
from tests.conftest import PixelRecognizer

SMALL, LARGE, FAR = (np.array(box, float) for box in ([2, 2, 12, 12], [20, 20, 50, 50], [52, 2, 62, 12]))


def seen(box: np.ndarray, score: float = 1.0) -> Detection:
    return Detection(box, np.zeros((5, 2)), score)


@dataclass(frozen=True, eq=False)
class Sees:
    """A detector that sees the same faces on every picture that is not black."""

    all: tuple[Detection, ...]

    def faces(self, images: Image) -> list[tuple[Detection, ...]]:
        return [self.all if image.max() > -1 else () for image in images]

    def detect(self, images: Image) -> list[Detection | None]:
        return [faces[0] if faces else None for faces in self.faces(images)]

    def cards(self) -> tuple[()]:
        return ()


@dataclass(frozen=True)
class BoxRecognizer:
    """Describes a face by its box."""

    detector: Sees | AtPlaces

    def embed(self, images: Image) -> Embeddings:
        nothing = torch.full((4,), torch.nan)
        found = self.detector.detect(images)
        return torch.stack([nothing if face is None else torch.tensor(face.box).float() for face in found])


PICTURES = torch.stack([torch.zeros(3, 64, 64), torch.full((3, 64, 64), -1.0)])


def finder(choice: str = "all") -> Finder:
    shifted = seen(LARGE + 2)
    return Finder(choice, Sees((seen(LARGE),)), Sees((seen(SMALL), shifted)), Sees((shifted, seen(FAR))))


def test_what_two_detectors_find_is_one_list_of_faces_the_largest_first():
    faces, none = finder().found(PICTURES)
    assert none == ()
    assert [face.box.tolist() for face in faces] == [LARGE.tolist(), SMALL.tolist(), FAR.tolist()]
    assert [(face.mtcnn is not None, face.dlib is not None) for face in faces] == [(1, 1), (1, 0), (0, 1)]


@pytest.mark.parametrize(
    ("choice", "chosen", "refused"), [("all", 3, False), ("largest", 1, False), ("one_or_skip", 1, True)]
)
def test_a_choice_does_what_it_says(choice, chosen, refused):
    asked = finder(choice)
    assert [len(faces) for faces in asked.chosen(PICTURES)] == [chosen, 0]
    assert [len(faces) for faces in asked.found(PICTURES)] == [3, 0]
    reason, nothing = asked.refused(PICTURES)
    assert (reason is not None and "3 faces found" in reason) == refused
    assert nothing is None


def test_a_choice_that_nobody_knows_is_refused():
    with pytest.raises(BadSetting, match="choice='first': expected one of all, largest, one_or_skip"):
        Finder("first")


def test_each_face_is_paired_once():
    close = seen(LARGE + 1)
    faces = list(paired([seen(LARGE), close], [seen(LARGE)]))
    assert len(faces) == 2
    assert sum(face.dlib is not None for face in faces) == 1


def test_overlap_is_intersection_over_union():
    assert overlap(LARGE, LARGE) == 1
    assert overlap(LARGE, SMALL) == 0
    assert overlap(np.array([0, 0, 2, 2.0]), np.array([1, 0, 3, 2.0])) == pytest.approx(1 / 3)
    assert nearest([seen(SMALL), seen(FAR)], LARGE) is None


def test_shares_part_a_mask_among_the_faces():
    faces = finder().found(PICTURES)[0]
    mask = torch.ones(1, 64, 64, dtype=torch.bool)
    parts = shares(mask, faces)
    assert torch.equal(torch.stack(parts).sum(0), mask.int())
    for part, face in zip(parts, faces, strict=True):
        across, down = ((face.box[:2] + face.box[2:]) / 2).astype(int)
        assert part[0, down, across]
    (halved,) = {tuple(part.shape) for part in shares(mask[:, ::2, ::2], faces, 0.5)}
    assert halved == (1, 32, 32)
    assert torch.equal(shares(mask[:, ::2, ::2], faces, 0.5)[0], parts[0][:, ::2, ::2])
    assert shares(mask, faces[:1]) == [mask]


def test_every_view_is_described_by_the_face_that_the_original_is_described_by():
    """The recognizer would choose the small face by itself; on a view without the large one it must not take another."""
    asked, recognizer = finder(), BoxRecognizer(Sees((seen(SMALL), seen(LARGE))))
    assert isinstance(recognizer, Detects)
    both = describing(recognizer, asked, PICTURES)
    assert both.embed(PICTURES)[0].tolist() == LARGE.tolist()
    gone = describing(BoxRecognizer(Sees((seen(SMALL),))), asked, PICTURES)
    assert gone.embed(PICTURES)[0].isnan().all()


def test_one_face_leaves_a_recognizer_its_own_choice():
    one = Finder("all", Sees((seen(LARGE),)), Sees(()), Sees(()))
    recognizer = BoxRecognizer(Sees((seen(SMALL), seen(LARGE))))
    assert describing(recognizer, one, PICTURES) is recognizer
    assert describing(PixelRecognizer(), finder(), PICTURES) == PixelRecognizer()
    mixed = at_places(recognizer, [LARGE, None]).embed(PICTURES[:1].repeat(2, 1, 1, 1))
    assert mixed.tolist() == [LARGE.tolist(), SMALL.tolist()]
