"""Disturbances on faces whose landmarks are known; yaw of heads that were turned; the wrapper; every file of conf/condition."""

from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from scipy import stats
from scipy.ndimage import gaussian_filter

from experiments.harness.made import made
from keyanon.channel.pixels import to_bytes
from keyanon.errors import BadPicture, BadSetting
from keyanon.faces.datasets import PairsFolder, bundled_faces
from keyanon.faces.detection import Detection, five_points
from keyanon.faces.disturbed import (
    HEAD,
    OUTSIDE,
    UNSEEN,
    Blur,
    Disturbance,
    Disturbed,
    Exposure,
    Glasses,
    Hand,
    LowResolution,
    Overexposure,
    SideLight,
    SurgicalMask,
    disturbed,
    estimated_yaw,
    places,
)
from keyanon.faces.finding import Finder
from keyanon.faces.renaming import opened
from keyanon.measures.scorers import psnr
from keyanon.types import Dataset, ListsFolder
from tests.conftest import ROOT
from tests.test_datasets import draw

SIZE, EYES = 160, 50.0
# From the mildest on.
SERIES: dict[str, list[Disturbance]] = {
    "surgical mask": [SurgicalMask(share) for share in (0.1, 0.3, 0.5, 0.7)],
    "glasses": [Glasses(share) for share in (0.05, 0.1, 0.2, 0.3)],
    "hand": [Hand(share) for share in (0.1, 0.2, 0.4, 0.8)],
    "darker by a gain": [Exposure(gain=gain) for gain in (0.8, 0.5, 0.25, 0.1)],
    "brighter by a gain": [Exposure(gain=gain) for gain in (1.2, 1.5, 2, 3)],
    "darker by a gamma": [Exposure(gamma=gamma) for gamma in (1.2, 1.5, 2, 3)],
    "side light": [SideLight(least) for least in (0.9, 0.5, 0.2, 0)],
    "blur": [Blur(sigma) for sigma in (0.02, 0.05, 0.1, 0.2)],
    "low resolution": [LowResolution(eyes) for eyes in (40, 24, 12, 6)],
    "overexposure": [Overexposure(white) for white in (0.1, 0.3, 0.5, 0.9)],
}


@dataclass(frozen=True, eq=False)
class Knows:
    """A detector that finds what it is told, on every picture."""

    found: tuple[Detection, ...] = ()

    def faces(self, images):
        return [self.found] * len(images)

    def detect(self, images):
        return [self.found[0] if self.found else None] * len(images)

    def cards(self):
        return ()


def finder_of(*faces: Detection) -> Finder:
    return Finder(mtcnn=Knows(), unpadded=Knows(), dlib=Knows(faces))


def face(centre=(SIZE / 2, 0.35 * SIZE), eyes: float = EYES, roll: float = 0.0) -> Detection:
    """A symmetric face with 68 landmarks whose eyes are `eyes` pixels apart, their middle at `centre`, turned by `roll` degrees."""
    angle = np.linspace(np.pi, 0, 17)
    points = np.zeros((68, 2))
    points[:17] = np.stack([1.2 * np.cos(angle), 1.75 * np.sin(angle)], 1)
    points[17:27] = np.stack([np.linspace(-0.9, 0.9, 10), np.full(10, -0.3)], 1)
    points[27:36] = [(0, 0.57)] * 9
    ring = np.stack([np.cos(np.arange(6) * np.pi / 3), np.sin(np.arange(6) * np.pi / 3)], 1)
    points[36:42], points[42:48] = 0.15 * ring - (0.5, 0), 0.15 * ring + (0.5, 0)
    points[48:] = np.stack([np.linspace(-0.41, 0.41, 20), np.full(20, 1.15)], 1)
    points[54], points[67] = points[67].copy(), points[54].copy()
    turn = np.radians(roll)
    points = eyes * points @ np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]]) + centre
    return Detection(np.concatenate([points.min(0), points.max(0)]), five_points(points), 1.0, points)


def smooth(seed: int = 0, size: int = SIZE) -> torch.Tensor:
    """A picture of coarse and fine noise, in [-0.8, 0.8]."""
    noise = np.random.default_rng(seed).standard_normal((3, size, size))
    mixed = 3 * gaussian_filter(noise, (0, 6, 6)) / 0.05 / 6 + gaussian_filter(noise, (0, 1, 1))
    return torch.from_numpy(0.8 * mixed / np.abs(mixed).max()).float()


# Something before the face


@pytest.mark.parametrize("share", [0.003, 0.1, 0.25, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("kind", [SurgicalMask, Glasses, Hand])
@pytest.mark.parametrize(("eyes", "roll"), [(EYES, 0.0), (33.3, 21.0)])
def test_an_object_covers_its_share_of_the_face_to_the_pixel(share, kind, eyes, roll):
    finder, picture = finder_of(face(eyes=eyes, roll=roll)), smooth()
    (place,) = places(picture, finder)
    changed = (kind(share)(picture, "a", finder) != picture).any(0).numpy()
    assert (changed & place.inside).sum() == round(share * place.inside.sum())


def test_nothing_is_covered_by_no_share():
    assert torch.equal(Hand(0.0)(smooth(), "a", finder_of(face())), smooth())


def covers(disturbance: Disturbance, *points: tuple[float, float]) -> list[bool]:
    """Whether the pixels at these places, in eyes from between the eyes, are covered."""
    picture = smooth()
    changed = (disturbance(picture, "a", finder_of(face())) != picture).any(0)
    return [bool(changed[round(0.35 * SIZE + EYES * y), round(SIZE / 2 + EYES * x)]) for x, y in points]


EYE, OTHER_EYE, BETWEEN, MOUTH, CHIN, BESIDE = (-0.5, 0), (0.5, 0), (0, 0), (0, 1.15), (0, 1.6), (0, 2.0)


def test_objects_are_where_they_belong():
    at = (EYE, OTHER_EYE, BETWEEN, MOUTH, CHIN, BESIDE)
    assert covers(SurgicalMask(0.4), *at) == [False, False, False, True, True, False]
    assert covers(Glasses(0.1), *at) == [True, True, True, False, False, False]


def test_a_mask_rises_to_the_nose():
    assert covers(SurgicalMask(0.45), (0, 0.45), (0.9, 0.45), (-0.9, 0.45)) == [True, False, False]


def test_a_hand_is_a_rectangle_at_any_angle_and_place():
    finder, grey, angles = finder_of(face()), torch.zeros(3, SIZE, SIZE), set()
    for id in "abcdefgh":
        changed = (Hand(0.15)(grey, id, finder) != 0).any(0).numpy().astype(np.uint8)
        rows, columns = np.nonzero(changed)
        if {0, SIZE - 1} & {rows.min(), rows.max(), columns.min(), columns.max()}:
            continue
        _, sides, angle = cv2.minAreaRect(np.stack([columns, rows], 1).astype(np.int32))
        angles.add(round(angle))
        assert changed.sum() / np.prod(np.array(sides) + 1) > 0.93
        assert max(sides) / min(sides) == pytest.approx(1.6, abs=0.12)
    assert len(angles) > 3


def test_every_face_that_counts_is_covered():
    two = (face((50, 50), 25), face((115, 60), 20))
    picture, finder = smooth(), finder_of(*two)
    hidden = SurgicalMask(0.4)(picture, "a", finder)
    for place in places(picture, finder):
        changed = (hidden != picture).any(0).numpy()[place.inside]
        assert changed.mean() == pytest.approx(0.4, abs=0.01)
    largest = Finder("largest", finder.mtcnn, finder.unpadded, finder.dlib)
    assert len(places(picture, largest)) == 1


def test_a_face_without_landmarks_is_the_ellipse_in_its_box():
    known = face()
    bare = Finder(mtcnn=Knows((Detection(known.box, known.points, 1.0),)), unpadded=Knows(), dlib=Knows())
    (place,) = places(smooth(), bare)
    assert place.inside.sum() == pytest.approx(np.pi / 4 * np.prod(known.box[2:] - known.box[:2]), rel=0.02)


# Severity


@pytest.mark.parametrize("name", SERIES)
def test_the_worse_the_farther_from_the_clean_picture(name):
    everywhere = torch.ones(1, 1, SIZE, SIZE, dtype=torch.bool)
    for seed, id in enumerate("abc"):
        picture, finder = smooth(seed), finder_of(face())
        made = [disturbance(picture, id, finder) for disturbance in SERIES[name]]
        away = [float(psnr(one[None], picture[None], everywhere)) for one in made]
        assert away == sorted(away, reverse=True), id
        assert away[0] > away[-1] + 1
        assert all(one.shape == picture.shape and one.abs().max() <= 1 for one in made)


@pytest.mark.parametrize("name", ["surgical mask", "glasses", "hand"])
def test_a_larger_object_covers_all_that_a_smaller_one_does(name):
    picture, finder = smooth(), finder_of(face())
    hidden = [(each(picture, "a", finder) != picture).any(0) for each in SERIES[name]]
    for small, large in pairwise(hidden):
        assert not (small & ~large).any()


@pytest.mark.parametrize("name", SERIES)
def test_what_is_drawn_hangs_on_the_id_alone(name):
    disturbance, picture, finder = SERIES[name][1], smooth(), finder_of(face())
    first = disturbance(picture, "a", finder)
    disturbance(smooth(1), "b", finder)
    assert torch.equal(disturbance(picture.clone(), "a", finder_of(face())), first)
    others = [disturbance(picture, id, finder) for id in "bcdefg"]
    assert (not all(torch.equal(first, other) for other in others)) == (name in ("hand", "side light"))


# Light and sharpness


def test_gain_and_gamma():
    picture = torch.tensor([-1.0, -0.5, 0.0, 1.0]).view(1, 4, 1).expand(3, 4, 1)
    finder = finder_of()
    assert Exposure(gain=2)(picture, "a", finder)[0, :, 0].tolist() == [-1, 0, 1, 1]
    assert Exposure(gamma=2)(picture, "a", finder)[0, :, 0].tolist() == pytest.approx([-1, -0.875, -0.5, 1])
    assert torch.equal(Exposure()(picture, "a", finder), picture)


def test_side_light_falls_from_one_side_to_the_other():
    white = torch.ones(3, SIZE, SIZE)
    lit = SideLight(0.2)(white, "a", finder_of(face()))
    row = ((lit[0, SIZE // 2] + 1) / 2).tolist()
    row = row if row[0] > row[-1] else row[::-1]
    assert row[0] == 1
    assert row[-1] == pytest.approx(0.2)
    assert row == sorted(row, reverse=True)
    assert row[SIZE // 2] == pytest.approx(0.6, abs=0.02)


def test_blur_of_an_edge_is_the_normal_distribution_function():
    edge = torch.ones(3, SIZE, SIZE)
    edge[..., : SIZE // 2] = -1
    x = np.arange(SIZE) - (SIZE - 1) / 2
    expected = 2 * stats.norm.cdf(x / (0.1 * EYES)) - 1
    np.testing.assert_allclose(Blur(0.1)(edge, "a", finder_of(face()))[1, 40], expected, atol=0.005)


def test_low_resolution_keeps_what_it_can_and_no_more():
    finder, flat = finder_of(face()), torch.full((3, SIZE, SIZE), 0.3)
    stripes = torch.ones(3, SIZE, SIZE)
    stripes[..., ::2] = -1
    assert torch.allclose(LowResolution(12)(flat, "a", finder), flat, atol=1e-6)
    assert LowResolution(20)(stripes, "a", finder)[..., 8:-8].abs().max() < 0.1  # two pixels are one
    assert torch.equal(LowResolution(EYES)(stripes, "a", finder), stripes)
    # faces that are half as large lose half as much
    picture, small = smooth(), finder_of(face(eyes=EYES / 2))
    assert torch.equal(LowResolution(20)(picture, "a", finder), LowResolution(10)(picture, "a", small))


def test_half_of_the_middle_turns_white_and_nothing_gets_darker():
    picture = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0)) * 1.2 - 1
    brighter = Overexposure(0.5)(picture, "a", finder_of())
    middle = brighter[:, 8:24, 8:24].amin(0)
    assert (middle == 1).float().mean() == pytest.approx(0.5, abs=0.01)
    assert brighter.max() == 1
    assert (brighter >= picture - 1e-6).all()
    dark = brighter[brighter < 1]  # below white it is one gain for all
    least = torch.quantile((picture + 1)[:, 8:24, 8:24].amin(0).flatten(), 0.5)
    torch.testing.assert_close(dark + 1, (picture[brighter < 1] + 1) * 2 / least)


def test_a_black_picture_stays_black_and_a_white_one_white():
    for level in (-1.0, 1.0):
        flat = torch.full((3, 16, 16), level)
        assert torch.equal(Overexposure(0.5)(flat, "a", finder_of()), flat)


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [(Hand, 1.1), (SurgicalMask, -0.1), (Glasses, "big"), (Exposure, 0), (Blur, 0), (LowResolution, -1), (SideLight, 2)]
    + [(Overexposure, white) for white in (0, 1)],
)  # fmt: skip
def test_sizes_that_are_none_are_refused(kind, wrong):
    with pytest.raises(BadSetting, match=rf"{kind.__name__}\.\w+={wrong!r}: expected a number"):
        kind(wrong)


# Yaw


def turned(yaw: float, pitch: float = 0, roll: float = 0, head=HEAD, scale: float = 30, shift=(70, 60)) -> np.ndarray:
    """A head's points on a picture: turned sideways, then down, then within the picture."""
    y, p, r = np.radians([yaw, pitch, roll])
    sideways = [[np.cos(y), 0, np.sin(y)], [0, 1, 0], [-np.sin(y), 0, np.cos(y)]]
    down = [[1, 0, 0], [0, np.cos(p), -np.sin(p)], [0, np.sin(p), np.cos(p)]]
    within = [[np.cos(r), -np.sin(r), 0], [np.sin(r), np.cos(r), 0], [0, 0, 1]]
    return scale * (head @ np.transpose(np.array(within) @ down @ sideways))[:, :2] + shift


@pytest.mark.parametrize("yaw", [-80, -45, -15, 0, 10, 30, 60, 85])
@pytest.mark.parametrize(("pitch", "roll"), [(0, 0), (20, 0), (-15, 25), (0, -170)])
def test_yaw_of_a_turned_head_is_found_whatever_its_pitch_and_roll(yaw, pitch, roll):
    assert estimated_yaw(turned(yaw, pitch, roll)) == pytest.approx(yaw, abs=1e-6)


@pytest.mark.parametrize("nose", [0.8, 1.2])
@pytest.mark.parametrize("yaw", [-40, -20, 0, 20, 40])
def test_yaw_of_another_nose_is_near(nose, yaw):
    other = HEAD * np.where(np.arange(5)[:, None] == 2, [1, 1, nose], 1) + [0, 0, 0]
    assert estimated_yaw(turned(yaw, head=other)) == pytest.approx(yaw, abs=7)


def test_yaw_of_a_mirrored_face_is_the_opposite():
    points = np.random.default_rng(0).normal(turned(20, 5, 5), 1.5)
    mirrored = (points * [-1, 1])[[1, 0, 2, 4, 3]]
    assert estimated_yaw(mirrored) == pytest.approx(-estimated_yaw(points))


# The wrapper


@pytest.fixture
def pairs(tmp_path: Path) -> dict[str, object]:
    for seed, name in enumerate(("A_B_0001", "A_B_0002", "C_D_0001", "C_D_0002", "E_F_0001", "E_F_0002")):
        draw(tmp_path / f"{name}.png", 48, seed)
    (tmp_path / "E_F_0002.png").write_bytes(b"no picture")
    return {"root": str(tmp_path), "size": 48}


def test_probes_are_disturbed_and_the_gallery_is_not(pairs):
    plain, finder = PairsFolder(**pairs), finder_of(face((24, 17), 15))
    dataset = disturbed(PairsFolder, disturbance=Hand(0.3), yaw=None, finder=finder, **pairs)
    assert isinstance(dataset, Dataset)
    assert isinstance(dataset, ListsFolder)
    assert (dataset.ids, dataset.gallery, dataset.identity("A_B_0002")) == (plain.ids, plain.gallery, "A_B")
    assert torch.equal(dataset.load("A_B_0001"), plain.load("A_B_0001"))
    assert torch.equal(dataset.load("A_B_0002"), Hand(0.3)(plain.load("A_B_0002"), "A_B_0002", finder))
    assert not torch.equal(dataset.load("A_B_0002"), plain.load("A_B_0002"))
    assert dataset.source("A_B_0002") == plain.source("A_B_0002")
    assert (dataset.passed_over, dataset.is_benchmark, dataset.synthetic) == ({}, False, False)
    assert torch.equal(Disturbed(plain).load("A_B_0002"), plain.load("A_B_0002"))


def test_what_a_dataset_says_of_itself_stays(tmp_path):
    inner = bundled_faces()
    outer = Disturbed(inner)
    assert (outer.synthetic, outer.is_benchmark, outer.passed_over) == (True, True, inner.passed_over)


def test_a_picture_without_a_face_is_refused_under_its_own_name(pairs, tmp_path):
    nobody = {"disturbance": Blur(0.1), "yaw": None, "finder": finder_of()}
    dataset = disturbed(PairsFolder, **nobody, **pairs)
    with pytest.raises(BadPicture, match="no face found to disturb"):
        dataset.load("A_B_0002")
    renamed = opened(partial(disturbed, PairsFolder), "hash", str(tmp_path / "names"), **nobody, **pairs)
    with pytest.raises(BadPicture, match="no face found to disturb") as refused:
        renamed.load(renamed.ids[0])
    assert "A_B" not in str(refused.value)


@dataclass(frozen=True, eq=False)
class ByBrightness(Knows):
    """Finds a head turned by 90 degrees times the mean of the picture's values, and none on dark pictures."""

    def faces(self, images):
        heads = [turned(90 * float(image.mean()), scale=12, shift=(24, 18)) for image in images]
        box = np.array([5.0, 5.0, 40.0, 40.0])
        return [
            () if image.mean() < 0 else (Detection(box, head, 1.0),) for image, head in zip(images, heads, strict=True)
        ]


@dataclass(frozen=True)
class Greys:
    """Pictures of one grey each, named by their level in hundredths."""

    ids: tuple[str, ...] = ("-50", "5", "20", "25", "40", "broken")
    gallery: tuple[str, ...] = ("40",)

    def identity(self, id):
        return None

    def source(self, id):
        raise NotImplementedError

    def load(self, id):
        if id == "broken":
            raise BadPicture("broken")
        return torch.full((3, 48, 48), int(id) / 100)


def test_bins_of_yaw_part_the_pictures():
    finder = Finder(mtcnn=ByBrightness(), unpadded=Knows(), dlib=Knows())
    bins = [Disturbed(Greys(), yaw=span, finder=finder) for span in ((0, 15), (15, 30), (30, 90))]
    assert [each.ids for each in bins] == [("5",), ("20", "25"), ("40",)]
    assert bins[1].passed_over == {OUTSIDE: 2, UNSEEN: 2}
    assert bins[1].gallery == ("40",)
    assert torch.equal(bins[1].load("20"), Greys().load("20"))
    for wrong in ((30, 15), (0, 0), (-5, 5), (1,)):
        with pytest.raises(BadSetting, match=r"Disturbed\.yaw=.*two rising numbers"):
            Disturbed(Greys(), yaw=wrong)


@pytest.mark.weights
def test_a_real_detector_places_an_object_on_a_face():
    dataset, finder = bundled_faces(128), Finder()
    for id in dataset.ids[:3]:
        picture = dataset.load(id)
        (place,) = places(picture, finder)
        changed = (Glasses(0.15)(picture, id, finder) != picture).any(0).numpy()
        assert (changed & place.inside).sum() == pytest.approx(0.15 * place.inside.sum(), abs=1)
        assert 30 < place.eyes < 60
        yaws = [estimated_yaw(finder.found(p[None])[0][0].any.points) for p in (picture, picture.flip(-1))]
        assert yaws[0] == pytest.approx(-yaws[1], abs=12)


# Configurations

CONDITIONS = sorted(path.stem for path in (ROOT / "conf" / "condition").glob("*.yaml"))


def composed(*overrides: str):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", overrides=list(overrides))


@pytest.mark.parametrize("condition", CONDITIONS)
def test_every_condition_is_a_disturbance_or_a_bin(condition):
    dataset = "lfw_gray_128_disturbed" if "hand" in condition else "celebahq_mini_128_disturbed"
    part = made(composed(f"dataset={dataset}", f"+condition={condition}"), "dataset")
    assert isinstance(part, Disturbed)
    if condition == "clean":
        assert (part.disturbance, part.yaw) == (None, None)
    else:
        assert (part.disturbance is None) != (part.yaw is None)


def test_a_condition_is_named_as_its_size():
    """hand_20 covers 0.2 of a face, gain_0p25 is one of 0.25, yaw_15_30 goes from 15 to 30 degrees."""
    for name in CONDITIONS:
        node = OmegaConf.load(ROOT / "conf" / "condition" / f"{name}.yaml")
        if node.get("disturbance"):
            (size,) = [value for key, value in node.disturbance.items() if key != "_target_"]
            told = float(name.rpartition("_")[2].replace("p", "."))
            assert size == pytest.approx(told / 100 if "share" in node.disturbance else told), name
        elif name != "clean":
            assert name == "yaw_{}_{}".format(*node.yaw)


def test_the_sweep_goes_through_every_condition_once():
    swept = (
        OmegaConf.load(ROOT / "conf" / "experiment" / "robustness.yaml").hydra.sweeper.params["+condition"].split(",")
    )
    assert sorted(swept) == CONDITIONS
    assert swept[0] == "clean"


def test_a_wrong_size_in_a_configuration_is_told_with_its_place():
    cfg = composed("dataset=lfw_gray_overexposed", "dataset.disturbance.white=1")
    with pytest.raises(BadSetting, match=r"dataset\.disturbance\.white=1: expected a number between 0 and 1"):
        made(cfg, "dataset")


def test_disturbed_bytes_are_bytes(pairs):
    dataset = disturbed(PairsFolder, disturbance=Hand(0.9), yaw=None, finder=finder_of(face((24, 17), 15)), **pairs)
    assert to_bytes(dataset.load("A_B_0002")[None]).shape == (1, 3, 48, 48)
