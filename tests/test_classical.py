"""Filters against what they must do to plain pictures and against scipy; regions against boxes and eyes at known places."""

import importlib.util
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy import ndimage

from keyanon.channel.keys import MasterKey
from keyanon.channel.pixels import to_bytes, to_floats
from keyanon.faces.alignment import FACES128_TEMPLATE
from keyanon.faces.datasets import bundled_faces
from keyanon.faces.detection import Detection, DlibDetector
from keyanon.faces.finding import Finder
from keyanon.faces.parsing import EllipseParser
from keyanon.methods.baselines.classical import Box, BoxBlur, EyeBand, GaussianBlur, Median, Obfuscation, Pixelate
from keyanon.methods.baselines.controls import Blackout, Identity, MeanFace, mean_of_the_bundled_faces
from keyanon.types import Anonymizer, FaceParser, Image, Mask, Reversible
from keyanon.weights import missing, named
from tests.conftest import CentreFace

KEY = MasterKey(bytes(32))
EYES = FACES128_TEMPLATE * 64 - 0.5


@dataclass(frozen=True)
class Finds:
    """A detector that finds the same face, or none, on every picture that is not black."""

    face: Detection | None

    def detect(self, images: Image) -> list[Detection | None]:
        return [faces[0] if faces else None for faces in self.faces(images)]

    def faces(self, images: Image) -> list[tuple[Detection, ...]]:
        return [(self.face,) if self.face is not None and picture.max() > -1 else () for picture in images]

    def cards(self) -> tuple[()]:
        return ()


def at(face: Detection | None) -> Finder:
    return Finder(mtcnn=Finds(face), unpadded=Finds(None), dlib=Finds(None))


FOUND = at(Detection(np.array([20.0, 16.0, 40.0, 46.0]), EYES, 1.0))
FILTERS = [GaussianBlur(), Median(), Pixelate(), Pixelate(block=7, at=None), BoxBlur(finder=FOUND)]
ALL = [*FILTERS, Blackout(), MeanFace(FOUND)]


def noise(*size: int, seed: int = 0) -> Image:
    levels = torch.randint(0, 256, size, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return to_floats(levels)


def obfuscated(filter, images: Image, parser: FaceParser | None = None) -> torch.Tensor:
    return (
        Obfuscation(filter, parser or CentreFace())
        .anonymize(images, [KEY] * len(images), list("abcdefgh"[: len(images)]))
        .images
    )


def everywhere(images: Image) -> Mask:
    return torch.ones_like(images[:, :1]).bool()


@pytest.mark.parametrize("filter", FILTERS, ids=repr)
@pytest.mark.parametrize("size", [(64, 64), (48, 65), (17, 16)], ids=str)
def test_a_plain_picture_stays_plain(filter, size):
    plain = to_floats(torch.tensor([3, 128, 250], dtype=torch.uint8).view(1, 3, 1, 1).expand(2, 3, *size))
    assert torch.equal(obfuscated(filter, plain), to_bytes(plain))


@pytest.mark.parametrize("filter", ALL, ids=lambda filter: type(filter).__name__)
def test_only_the_face_changes(filter):
    images = noise(3, 3, 64, 64)
    images[1] = -1  # no face
    before = images.clone()
    published = obfuscated(filter, images)
    face = CentreFace().mask(images, (64, 64))
    assert torch.equal(images, before)
    assert torch.equal(published.where(~face, 0), to_bytes(images).where(~face, 0))
    assert torch.equal(published[1], to_bytes(images)[1])
    changed = (published != to_bytes(images)).any(1, keepdim=True)[[0, 2]]
    assert changed[face[[0, 2]]].float().mean() > 0.9


@pytest.mark.parametrize("filter", ALL, ids=lambda filter: type(filter).__name__)
def test_a_picture_does_not_depend_on_its_batch(filter):
    images = noise(3, 3, 64, 64)
    apart = torch.cat([obfuscated(filter, image[None]) for image in images])
    assert torch.equal(obfuscated(filter, images), apart)


def test_pictures_count_as_their_bytes():
    images = noise(1, 3, 64, 64)
    assert torch.equal(obfuscated(Pixelate(), images + 0.001), obfuscated(Pixelate(), images))


@pytest.mark.parametrize(("side", "radius", "sigma"), [(256, 30, 15.0), (128, 15, 7.5)])
def test_gaussian_blur_is_scipys_and_scales(side, radius, sigma):
    images = noise(1, 3, side, side)
    expected = ndimage.gaussian_filter(images[0].double().numpy(), sigma, mode="mirror", radius=radius, axes=(1, 2))
    np.testing.assert_allclose(GaussianBlur()(images, everywhere(images))[0], expected, atol=1e-5)


@pytest.mark.parametrize(("side", "size"), [(128, 13), (64, 7)])
def test_median_is_scipys_inside(side, size):
    images = noise(1, 3, side, side)
    expected = ndimage.median_filter(to_bytes(images)[0].numpy(), size, axes=(1, 2))
    inside = slice(size // 2, -(size // 2))
    filtered = to_bytes(Median()(images, everywhere(images)))[0].numpy()
    np.testing.assert_array_equal(filtered[:, inside, inside], expected[:, inside, inside])


@pytest.mark.parametrize(
    "box", [(slice(10, 50), slice(5, 47)), (slice(0, 64), slice(20, 41)), (slice(3, 4), slice(8, 9))]
)
def test_box_blur_is_scipys_on_the_faces_box(box):
    images = noise(1, 3, 64, 64)
    face = torch.zeros(1, 1, 64, 64, dtype=torch.bool)
    face[0, 0][box] = True
    size = [max(1, (side.stop - side.start) // 2) for side in box]
    crop = images[0][:, *box].double().numpy()
    expected = ndimage.uniform_filter(crop, size, mode="mirror", axes=(1, 2))
    np.testing.assert_allclose(BoxBlur(finder=FOUND)(images, face)[0][:, *box], expected, atol=1e-5)


def test_box_blur_takes_nothing_from_outside_the_box():
    images, other = noise(1, 3, 64, 64), noise(1, 3, 64, 64, seed=1)
    face = CentreFace().mask(images, (64, 64))
    mixed = torch.where(face, images, other)
    assert torch.equal(
        BoxBlur(finder=FOUND)(images, face)[..., 16:48, 16:48], BoxBlur(finder=FOUND)(mixed, face)[..., 16:48, 16:48]
    )


def test_pixelate_gives_the_means_of_blocks():
    images = noise(1, 3, 64, 64)
    out = Pixelate(block=8, at=None)(images, everywhere(images))
    means = images.view(1, 3, 8, 8, 8, 8).mean((3, 5))
    torch.testing.assert_close(out, means.repeat_interleave(8, 2).repeat_interleave(8, 3))
    uneven = Pixelate(block=20, at=None)(images, everywhere(images))
    torch.testing.assert_close(
        uneven[..., 60:, 60:], images[..., 60:, 60:].mean((2, 3), keepdim=True).expand(-1, -1, 4, 4)
    )
    scaled = Pixelate(block=32, at=256)
    assert torch.equal(scaled(images, everywhere(images)), out)


def test_defaces_box_is_larger_by_the_scale_on_every_side():
    mask = Box("rectangle", 1.3, FOUND).mask(noise(1, 3, 64, 64), (64, 64))[0, 0]
    rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    assert (rows[0], rows[-1] + 1, columns[0], columns[-1] + 1) == (7, 55, 14, 46)  # 16 - 9, 46 + 9, 20 - 6, 40 + 6
    assert mask.sum() == (55 - 7) * (46 - 14)
    cut = Box("rectangle", 3.0, FOUND).mask(noise(1, 3, 64, 64), (64, 64))[0, 0]
    assert cut[:63, :63].all()
    assert not cut[63].any()  # deface leaves the last row and column


def test_the_ellipse_fills_its_box():
    images = noise(1, 3, 64, 64)
    inside, box = (Box(shape, 1.3, FOUND).mask(images, (64, 64)) for shape in ("ellipse", "rectangle"))
    assert not (inside & ~box).any()
    assert inside.sum() / box.sum() == pytest.approx(math.pi / 4, abs=0.02)
    assert not Box(finder=FOUND).mask(torch.full_like(images, -1), (64, 64)).any()
    assert Box(finder=FOUND).mask(images, (16, 16)).shape == (1, 1, 16, 16)


def test_the_bar_lies_along_the_eyes():
    images = noise(1, 3, 64, 64)
    level = at(Detection(np.zeros(4), np.array([[20.0, 30.0], [40.0, 30.0], *[[0.0, 0.0]] * 3]), 1.0))
    mask = EyeBand(2.0, 0.7, level).mask(images, (64, 64))[0, 0]
    expected = torch.zeros(64, 64, dtype=torch.bool)
    expected[23:38, 10:51] = True  # the middle of the eyes ± 7 and ± 20
    assert torch.equal(mask, expected)
    upright = at(Detection(np.zeros(4), np.array([[30.0, 20.0], [30.0, 40.0], *[[0.0, 0.0]] * 3]), 1.0))
    assert torch.equal(EyeBand(2.0, 0.7, upright).mask(images, (64, 64))[0, 0], expected.T)
    slanted = at(Detection(np.zeros(4), np.array([[20.0, 22.0], [40.0, 42.0], *[[0.0, 0.0]] * 3]), 1.0))
    assert EyeBand(2.0, 0.7, slanted).mask(images, (64, 64)).sum() == pytest.approx(2 * 0.7 * 800, rel=0.05)
    assert not EyeBand(finder=at(None)).mask(images, (64, 64)).any()


@pytest.mark.weights
def test_the_bar_covers_the_eyes_of_faces():
    reason = missing(named("dlib_landmarks68"))
    if reason or importlib.util.find_spec("dlib") is None:
        pytest.skip(reason or "dlib is not installed")
    faces = bundled_faces()
    images = torch.stack([faces.load(id) for id in faces.ids[:4]])
    masks, found = EyeBand().mask(images, (128, 128)), DlibDetector().landmarks68(images)
    covered = [
        mask[0, y, x].item()
        for mask, landmarks in zip(masks, found, strict=True)
        if landmarks is not None and mask.any()
        for x, y in landmarks[36:48].round().astype(int)
    ]
    assert len(covered) > 30
    assert np.mean(covered) > 0.98


def test_the_mean_face_owes_the_picture_only_its_place():
    mean = MeanFace(FOUND)
    a, b = (mean(noise(1, 3, 64, 64, seed=seed), everywhere(noise(1, 3, 64, 64))) for seed in (0, 1))
    assert torch.equal(a, b)
    faces = bundled_faces()
    expected = torch.stack([faces.load(id) for id in faces.ids]).double().mean(0)
    torch.testing.assert_close(mean_of_the_bundled_faces(), expected.float(), atol=1e-5, rtol=0)
    # a face that lies as on the mean itself gives the mean back
    same = at(Detection(np.zeros(4), FACES128_TEMPLATE * 128 - 0.5, 1.0))
    for finder in (same, at(None)):
        placed = MeanFace(finder)(noise(1, 3, 128, 128), torch.ones(1, 1, 128, 128, dtype=torch.bool))
        torch.testing.assert_close(placed[0], mean_of_the_bundled_faces(), atol=1e-4, rtol=0)


def test_the_mean_face_follows_the_face():
    shift = np.array([10.0, 5.0])
    images = noise(1, 3, 128, 128)
    points = FACES128_TEMPLATE * 128 - 0.5
    moved = MeanFace(at(Detection(np.zeros(4), points + shift, 1.0)))
    torch.testing.assert_close(
        moved(images, everywhere(images))[0, :, 5:, 10:], mean_of_the_bundled_faces()[:, :-5, :-10], atol=1e-4, rtol=0
    )


def test_controls():
    images = noise(2, 3, 64, 64)
    assert torch.equal(Identity().anonymize(images, [KEY] * 2, ["a", "b"]).images, to_bytes(images))
    face = EllipseParser().mask(images, (64, 64)).expand(-1, 3, -1, -1)
    assert (obfuscated(Blackout(), images, EllipseParser())[face] == 0).all()


def test_none_of_them_takes_a_picture_back():
    for method in (Identity(), Obfuscation(GaussianBlur(), CentreFace())):
        assert isinstance(method, Anonymizer)
        assert not isinstance(method, Reversible)
        assert method.about.recovery_input == "-"
    assert Identity().about.kind == Obfuscation(Blackout(), CentreFace(), kind="control").about.kind == "control"
    preset = Obfuscation(BoxBlur(finder=FOUND), CentreFace(), code_licence="MIT", source="somewhere").about
    assert (preset.kind, preset.code_licence, preset.source) == ("irreversible", "MIT", "somewhere")


def test_a_shape_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="shape='square': expected one of rectangle, ellipse"):
        Box("square")  # type: ignore[arg-type]
