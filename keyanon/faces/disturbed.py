"""A dataset's pictures under worse conditions: something before the face, other light, fewer pixels; or turned heads alone.

    share       of a face's pixels, chin to forehead (keyanon/faces/parsing.py), that an object covers
    eyes        the distance of the eyes' centres, the unit of all lengths
    yaw         degrees by which a head is turned sideways, estimated from five landmarks; no picture is warped

Sizes are of the face, so that they mean the same in every framing, and everything that is drawn hangs on the picture's id. An
object grows from the same place with its share. Pictures of the gallery stay as they are.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import cos, pi, sin
from typing import Annotated, Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from skimage.draw import polygon2mask
from torch.nn.functional import interpolate

from keyanon.errors import BadPicture
from keyanon.faces.detection import Points
from keyanon.faces.finding import Face, Finder, digest
from keyanon.faces.parsing import box_ellipse, face_outline
from keyanon.settings import Positive, Setting, Share, checked, is_number
from keyanon.types import Dataset, Picture, Source, is_benchmark, is_synthetic, notes_of, passed_over, probes_of

Floats = NDArray[np.float64]

FOREHEAD = 0.4  # of a face's height from chin to brows, as conf/parser/landmarks.yaml has it
DARKEST = 2 / 255  # light that a gain can still turn white; a black picture stays black
OUTSIDE, UNSEEN = "pictures of another yaw", "pictures without a yaw: no face found, or not to be read"

Part = Annotated[float, Setting("a number between 0 and 1, neither of them", lambda x: is_number(x) and 0 < x < 1)]
Span = Annotated[
    Sequence[float], Setting("two rising numbers of degrees from 0 on", lambda s: len(s) == 2 and 0 <= s[0] < s[1])
]

# Eyes' centres, nose tip, mouth corners of a face that looks into the camera: right, down, and towards the camera, in eyes.
# In the picture's plane as the template of ArcFace has them; a nose stands out by 28 mm where eyes are 63 mm apart.
HEAD = np.array(
    [[-0.5, 0.0, 0.0], [0.5, 0.0, 0.0], [0.0, 0.57, 0.45], [-0.41, 1.15, 0.05], [0.41, 1.15, 0.05]], dtype=np.float64
)

_yaws: dict[tuple[Finder, bytes], float] = {}  # a bin is asked for by every cell of a sweep


@runtime_checkable
class Disturbance(Protocol):
    def __call__(self, picture: Picture, id: str, finder: Finder) -> Picture:
        """The picture `id`, disturbed; raises BadPicture where no face is found that it needs."""
        ...


@checked
@dataclass(frozen=True)
class Disturbed:
    """The pictures of a dataset, disturbed; with `yaw` only those whose head is turned by so many degrees, to either side.

    Args:
        disturbance: None leaves pictures as they are.
        yaw: from and below; every picture of the dataset is looked at once, 0.1 to 0.3 s each on a CPU.
        finder: finds the faces, on the pictures as they were.
    """

    dataset: Dataset
    disturbance: Disturbance | None = None
    yaw: Span | None = None
    finder: Finder = field(default_factory=Finder)

    @cached_property
    def ids(self) -> Sequence[str]:
        return self.dataset.ids if self.yaw is None else tuple(id for id in self.dataset.ids if self._in_bin(id))

    @cached_property
    def probes(self) -> Sequence[str]:
        every, chosen = probes_of(self.dataset), frozenset(self.ids)
        return [id for id in every if id in chosen]

    @property
    def gallery(self) -> Sequence[str]:
        return self.dataset.gallery

    def identity(self, id: str) -> str | None:
        return self.dataset.identity(id)

    def source(self, id: str) -> Source:
        return self.dataset.source(id)

    def load(self, id: str) -> Picture:
        picture = self.dataset.load(id)
        if self.disturbance is None or id in self._gallery:
            return picture
        return self.disturbance(picture, id, self.finder)

    @property
    def passed_over(self) -> Mapping[str, int]:
        counts = dict(passed_over(self.dataset))
        if self.yaw is not None:
            unseen = sum(np.isnan(yaw) for yaw in self._yaws.values())
            found = {OUTSIDE: len(self.dataset.ids) - len(self.ids) - unseen, UNSEEN: unseen}
            counts |= {kind: int(count) for kind, count in found.items() if count}
        return counts

    @property
    def notes(self) -> Sequence[str]:
        return notes_of(self.dataset)

    @property
    def synthetic(self) -> bool:
        return is_synthetic(self.dataset)

    @property
    def is_benchmark(self) -> bool:
        return is_benchmark(self.dataset)

    def _in_bin(self, id: str) -> bool:
        assert self.yaw is not None
        low, high = self.yaw
        return bool(low <= abs(self._yaws[id]) < high)  # NaN is in no bin

    @cached_property
    def _yaws(self) -> Mapping[str, float]:
        return {id: self._yaw_of(id) for id in self.dataset.ids}

    def _yaw_of(self, id: str) -> float:
        try:
            image = self.dataset.load(id)[None]
        except BadPicture:
            return float("nan")
        key = (self.finder, digest(image))
        if key not in _yaws:
            (faces,) = self.finder.found(image)
            _yaws[key] = estimated_yaw(faces[0].any.points) if faces else float("nan")
        return _yaws[key]

    @cached_property
    def _gallery(self) -> frozenset[str]:
        return frozenset(self.dataset.gallery)


@checked
def disturbed(
    dataset: Callable[..., Dataset], disturbance: Disturbance | None, yaw: Span | None, finder: Finder, **settings: Any
) -> Disturbed:
    """A dataset made with `settings`, disturbed."""
    return Disturbed(dataset(**settings), disturbance, yaw, finder)


# Where a face is


@dataclass(frozen=True, eq=False)
class Place:
    """A face on a picture: its pixels `inside` (h w), and how far `across` and `down` it every pixel lies (h w), in eyes.

    Both count from between the eyes, whose distance is `eyes` pixels.
    """

    inside: NDArray[np.bool_]
    across: Floats
    down: Floats
    eyes: float


def places(picture: Picture, finder: Finder) -> list[Place]:
    """The faces of a picture that count; raises BadPicture where there is none, or none of which anything is on the picture."""
    (faces,) = finder.chosen(picture[None])
    found = [place for face in faces if (place := placed(face, *picture.shape[1:])).inside.any() and place.eyes > 0]
    if not found:
        raise BadPicture("no face found to disturb")
    return found


def placed(face: Face, height: int, width: int) -> Place:
    left, right = face.any.points[:2]
    eyes = float(np.linalg.norm(right - left))
    unit = (right - left) / max(eyes, 1e-9) ** 2
    y, x = np.indices((height, width))
    x, y = x - (left[0] + right[0]) / 2, y - (left[1] + right[1]) / 2
    if face.dlib is not None and face.dlib.landmarks is not None:
        inside = polygon2mask((height, width), face_outline(face.dlib.landmarks, FOREHEAD)[:, ::-1])
    else:
        inside = box_ellipse(face.box, height, width)
    return Place(inside, x * unit[0] + y * unit[1], y * unit[0] - x * unit[1], eyes)


def estimated_yaw(points: Points) -> float:
    """Degrees by which a face with these five points (5 2) is turned, positive if its nose goes to the right of the picture.

    The rotation of HEAD that gives them in scaled orthographic projection: the affine map by least squares, and the nearest rows
    of a rotation. Roll and pitch do not matter. Real noses are no model's: it is good for bins, not for degrees.
    """
    flat, head = points - points.mean(0), HEAD - HEAD.mean(0)
    affine = np.linalg.lstsq(head, flat, rcond=None)[0].T
    u, _, v = np.linalg.svd(affine, full_matrices=False)
    forward = np.cross(*(u @ v))
    return float(np.degrees(np.arctan2(-forward[0], forward[2])))


def generator_of(id: str, purpose: str) -> np.random.Generator:
    """Random numbers that hang on a picture's id."""
    return np.random.default_rng(list(hashlib.sha256(f"{purpose} {id}".encode()).digest()))


# Something before the face


def covered(picture: Picture, place: Place, order: Floats, share: float, colour: Floats) -> Picture:
    """The pixels that come first in `order` (h w) in `colour` (3 h w or 3 1 1), so far that `share` of the face is covered."""
    wanted = round(share * int(place.inside.sum()))
    if wanted == 0:
        return picture
    sequence = np.argsort(order, axis=None, kind="stable")
    last = np.searchsorted(np.cumsum(place.inside.ravel()[sequence]), wanted)
    hidden = np.zeros(order.size, bool)
    hidden[sequence[: last + 1]] = True
    over = torch.from_numpy(colour.clip(-1, 1)).to(picture).expand_as(picture)
    return torch.where(torch.from_numpy(hidden.reshape(order.shape)).to(picture.device), over, picture)


@checked
@dataclass(frozen=True)
class SurgicalMask:
    """A light blue mask with pleats from the chin upwards, whose edge rises to the nose and falls to the ears."""

    share: Share

    def __call__(self, picture: Picture, id: str, finder: Finder) -> Picture:
        for place in places(picture, finder):
            height = -place.down - 0.4 * np.clip(1 - np.abs(place.across), 0, None)
            pleats = 0.06 * np.sin(2 * pi * place.down / 0.25)
            cloth = np.array([0.1, 0.5, 0.65])[:, None, None] + pleats
            picture = covered(picture, place, np.where(place.inside, height, np.inf), self.share, cloth)
        return picture


@checked
@dataclass(frozen=True)
class Glasses:
    """Dark glasses: two lenses around the eyes, 1.4 times as wide as high, and a bridge between them."""

    share: Share

    def __call__(self, picture: Picture, id: str, finder: Finder) -> Picture:
        for place in places(picture, finder):
            lenses = [np.hypot((place.across - eye) / 1.4, place.down) for eye in (-0.5, 0.5)]
            bridge = np.where(np.abs(place.across) < 0.5, 5 * np.abs(place.down), np.inf)
            order = np.minimum(np.minimum(*lenses), bridge)
            picture = covered(picture, place, order, self.share, np.full((3, 1, 1), -0.85))
        return picture


@checked
@dataclass(frozen=True)
class Hand:
    """A rectangle, 1.6 times as long as wide, with a coarse texture in the colour of the face: somewhere on it, at any angle."""

    share: Share

    def __call__(self, picture: Picture, id: str, finder: Finder) -> Picture:
        for place in places(picture, finder):
            generator = generator_of(id, "hand")
            rows, columns = np.nonzero(place.inside)
            middle, angle = generator.integers(len(rows)), generator.uniform(0, pi)
            at = rows[middle], columns[middle]
            across, down = place.across - place.across[at], place.down - place.down[at]
            along = cos(angle) * across + sin(angle) * down
            beside = cos(angle) * down - sin(angle) * across
            noise = gaussian_filter(generator.standard_normal(place.inside.shape), place.eyes / 20)
            skin = picture.cpu().numpy()[:, place.inside].astype(np.float64).mean(1)[:, None, None]
            texture = skin + 0.2 * noise / noise.std()
            order = np.maximum(np.abs(along) / 1.6, np.abs(beside))
            picture = covered(picture, place, order, self.share, texture)
        return picture


# Light, and what a lens and a sensor leave of it


@checked
@dataclass(frozen=True)
class Exposure:
    """gain * v^gamma of each value v in [0, 1], clipped: darker with a gain below 1 or a gamma above it."""

    gain: Positive = 1.0
    gamma: Positive = 1.0

    def __call__(self, picture: Picture, id: str, finder: Finder) -> Picture:
        return (2 * self.gain * ((picture.clamp(-1, 1) + 1) / 2) ** self.gamma - 1).clamp(-1, 1)


@checked
@dataclass(frozen=True)
class SideLight:
    """Light from one side, by the picture's id: all of it one eyes' distance beside the middle, `least` of it on the other side."""

    least: Share

    def __call__(self, picture: Picture, id: str, finder: Finder) -> Picture:
        place = places(picture, finder)[0]
        side = generator_of(id, "side").choice([-1, 1])
        light = self.least + (1 - self.least) * ((1 + side * place.across) / 2).clip(0, 1)
        return torch.from_numpy(light).to(picture) * (picture + 1) - 1


@checked
@dataclass(frozen=True)
class Blur:
    """A Gaussian blur with a standard deviation of `sigma` eyes."""

    sigma: Positive

    def __call__(self, picture: Picture, id: str, finder: Finder) -> Picture:
        sigma = self.sigma * places(picture, finder)[0].eyes
        smooth = gaussian_filter(picture.cpu().numpy(), (0, sigma, sigma), mode="nearest")
        return torch.from_numpy(smooth).to(picture)


@checked
@dataclass(frozen=True)
class LowResolution:
    """As taken with the eyes `eyes` pixels apart, and enlarged (bicubic); a picture where they are nearer stays as it is."""

    eyes: Positive

    def __call__(self, picture: Picture, id: str, finder: Finder) -> Picture:
        scale = self.eyes / places(picture, finder)[0].eyes
        if scale >= 1:
            return picture
        height, width = picture.shape[1:]
        small = (max(1, round(scale * height)), max(1, round(scale * width)))
        taken = interpolate(picture[None], small, mode="bilinear", align_corners=False, antialias=True)
        return interpolate(taken, (height, width), mode="bicubic", align_corners=False)[0].clamp(-1, 1)


@checked
@dataclass(frozen=True)
class Overexposure:
    """As a camera gives it that exposes for the shadows: clip(g (x + 1) - 1), with a gain g for each picture.

    g turns the share `white` of the picture's middle half white (the smallest of its three colours is 1). The noise of such
    pictures has uneven norms.
    """

    white: Part

    def __call__(self, picture: Picture, id: str, finder: Finder) -> Picture:
        rows, columns = (slice(side // 4, side - side // 4) for side in picture.shape[1:])
        light = picture + 1
        least = torch.quantile(light[:, rows, columns].amin(0).flatten(), 1 - self.white).clamp(min=DARKEST)
        return (2 / least * light - 1).clamp(-1, 1)
