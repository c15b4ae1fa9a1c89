"""How alike two pictures are, one number each: PSNR, SSIM, mean absolute error, LPIPS; and how far apart two sets are.

Every scorer takes (view, original, face) as `keyanon.types.Scorer` has it: RGB in [-1, 1], and the original's face at
pixel size. `*_face` measures on the face only, NaN where there is none: a background pasted back lifts numbers of whole
pictures.
"""

import functools
import importlib.util
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from keyanon.channel.pixels import to_bytes
from keyanon.errors import MissingPackage
from keyanon.faces.detection import Detector, Points
from keyanon.finite import finite
from keyanon.settings import Count, Name, checked
from keyanon.types import FaceParser, Features, Image, Mask, Measure, Scorer, Scores, declared, declares
from keyanon.weights import Card, named, resolve

PSNR_CEILING = 10 * math.log10(12 * 255**2)  # 58.9 dB
NO_FIDELITY = 'torch-fidelity, which FID needs, is not installed. Remedy: `pip install "keyanon[fid]"`.'
SSIM_BORDER = 5  # pixels: half of its window


@declares(Measure("picture", "dB", "alike", "peak signal-to-noise ratio"))
def psnr(view: Image, original: Image, face: Mask) -> Scores:
    """Peak signal-to-noise ratio in dB over the whole picture, up to PSNR_CEILING; higher is more alike.

    Equal pictures have an infinite ratio, and then no mean. They get the ceiling, the ratio that rounding to 8 bits
    alone leaves (a mean squared error of 1/12 of a squared level): files do not know their pictures any better.
    """
    return psnr_face(view, original, torch.ones_like(face))


@declares(Measure("picture", "dB", "alike", "peak signal-to-noise ratio on the face"))
def psnr_face(view: Image, original: Image, face: Mask) -> Scores:
    """`psnr` over the face's pixels; NaN where there are none."""
    error = _mean_where(face, (view - original).square())
    return (10 * torch.log10(4 / error)).clamp(max=PSNR_CEILING)


@declares(Measure("picture", "", "alike", "structural similarity"))
def ssim(view: Image, original: Image, face: Mask, mean_over: Literal["inside", "whole"] = "inside") -> Scores:
    """Structural similarity over the whole picture, in [-1, 1], 1 for equal pictures; higher is more alike.

    As Wang et al., IEEE TIP 13(4), 2004: Gaussian window of σ = 1.5 on 11 x 11 pixels, K = 0.01 and 0.03, biased
    variances; for each colour channel of RGB in [0, 1], then their mean. NaN for pictures of less than 11 pixels.

    Args:
        view: pictures to compare.
        original: what they are compared with.
        face: not looked at.
        mean_over: `inside`: the windows that lie inside the picture. Equals skimage's structural_similarity(
            gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1, channel_axis=...). `whole`: those
            around every pixel, with the picture mirrored at its border. Equals torchmetrics', which the authors report.
    """
    similarities = _ssim_map(view, original)
    inside = slice(SSIM_BORDER, -SSIM_BORDER) if mean_over == "inside" else slice(None)
    return similarities[..., inside, inside].mean(dim=(1, 2, 3))


@declares(Measure("picture", "", "alike", "structural similarity on the face"))
def ssim_face(view: Image, original: Image, face: Mask) -> Scores:
    """`ssim` over the windows centred on the face's pixels, mirrored at the picture's border; NaN where it has none."""
    return _mean_where(face, _ssim_map(view, original))


@checked
@dataclass(frozen=True)
class Against:
    """A scorer that compares with another view of the same picture instead of with the original.

    Against `reconstructed`, D(E(x)), it tells what recovery loses from what the autoencoder loses.
    """

    view: Name
    scorer: Scorer

    @property
    def meaning(self) -> object:
        alone = declared(self.scorer)
        return replace(alone, label=f"{alone.label}, to the view {self.view}") if isinstance(alone, Measure) else None

    def __call__(self, view: Image, original: Image, face: Mask) -> Scores:
        """`original` is the picture of that other view here."""
        return self.scorer(view, original, face)


@declares(Measure("picture", "", "apart", "mean absolute error on the scale [-1, 1]"))
def mae(view: Image, original: Image, face: Mask) -> Scores:
    """Mean absolute error over the whole picture on the [-1, 1] scale, so in [0, 2]; lower is more alike."""
    return (view - original).abs().mean(dim=(1, 2, 3))


@checked
@dataclass(frozen=True)
class LPIPS:
    """Learned perceptual distance over the whole picture, from 0 (equal), rarely above 1; lower is more alike.

    Zhang et al., CVPR 2018, version 0.1 on AlexNet: torchmetrics ships the linear heads, `card` (or the file `weights`) is
    AlexNet. It is read at the first call; raises MissingWeights, WrongWeights.
    """

    card: str | Card = "lpips_alexnet"
    weights: str | None = None
    meaning: ClassVar = Measure("picture", "", "apart", "learned perceptual distance")

    def cards(self) -> tuple[Card, ...]:
        return (named(self.card),)

    def __call__(self, view: Image, original: Image, face: Mask) -> Scores:
        network = _alexnet_lpips(self.card, self.weights).to(view.device)
        distances: Tensor = network(view, original)  # b 1 1 1
        return distances.flatten()


@checked
@dataclass(frozen=True)
class Detected:
    """1 where `detector` finds a face on the view, else 0; the mean is the detection rate, higher is better."""

    detector: Detector
    meaning: ClassVar = Measure("detection", "", "higher", "1 where a face is found, else 0")

    def cards(self) -> tuple[Card, ...]:
        return self.detector.cards()

    def __call__(self, view: Image, original: Image, face: Mask) -> Scores:
        return torch.tensor([float(found is not None) for found in self.detector.detect(view)])


@checked
@dataclass(frozen=True)
class BoxDistance:
    """How far apart the centres of the faces' boxes are that `detector` finds on view and original, in pixels.

    Where one shows no face: `undefined` gives NaN; `corner` takes its centre for (0, 0), as the authors do.
    """

    detector: Detector
    lost: Literal["undefined", "corner"] = "undefined"
    meaning: ClassVar = Measure("detection", "px", "lower", "how far the face's box is from the original's")

    def __call__(self, view: Image, original: Image, face: Mask) -> Scores:
        seen, clean = (
            places([None if each is None else each.box for each in self.detector.detect(images)], (4,), self.lost)
            for images in (view, original)
        )
        centres = [(boxes[:, :2] + boxes[:, 2:]) / 2 for boxes in (seen, clean)]
        distances: Scores = torch.linalg.vector_norm(centres[0] - centres[1], dim=1)
        return distances


@checked
@dataclass(frozen=True)
class LandmarkDistance:
    """How far apart the five points are that `detector` finds on view and original, in pixels.

    Args:
        detector: finds the points.
        norm: `euclidean`: the mean distance of a point. `summed`: the authors', who add up the five points' distances along
            each axis, and average these two sums: about three times as much.
        lost: as BoxDistance's.
    """

    detector: Detector
    norm: Literal["euclidean", "summed"] = "euclidean"
    lost: Literal["undefined", "corner"] = "undefined"
    meaning: ClassVar = Measure("detection", "px", "lower", "how far the face's five points are from the original's")

    def __call__(self, view: Image, original: Image, face: Mask) -> Scores:
        seen, clean = (
            places([None if each is None else each.points for each in self.detector.detect(images)], (5, 2), self.lost)
            for images in (view, original)
        )
        apart = seen - clean
        return apart.norm(dim=2).mean(1) if self.norm == "euclidean" else apart.abs().sum(1).mean(1)


@checked
@dataclass(frozen=True)
class MaskOverlap:
    """How much the faces overlap that `parser` marks on view and original, from 0 to 1 (equal); NaN where it marks none.

    `iou` is the intersection over the union, `dice` twice the intersection over the sum of both.
    """

    parser: FaceParser
    measure: Literal["iou", "dice"] = "iou"

    @property
    def meaning(self) -> Measure:
        name = {"iou": "intersection over union", "dice": "Dice coefficient"}[self.measure]
        return Measure("detection", "", "higher", f"{name} of the face masks of view and original")

    def __call__(self, view: Image, original: Image, face: Mask) -> Scores:
        size = (view.shape[-2], view.shape[-1])
        seen, clean = (self.parser.mask(images, size).flatten(1) for images in (view, original))
        shared, marked = (seen & clean).sum(1), seen.sum(1) + clean.sum(1)
        return shared / (marked - shared) if self.measure == "iou" else 2 * shared / marked


def places(found: Sequence[Points | None], shape: tuple[int, ...], lost: Literal["undefined", "corner"]) -> Tensor:
    """Points or boxes of each picture (b *shape)."""
    nowhere = np.full(shape, math.nan if lost == "undefined" else 0.0)
    return torch.from_numpy(np.stack([nowhere if each is None else each for each in found])).float()


@checked
@dataclass(frozen=True)
class FID:
    """Fréchet distance between what Inception sees in two sets of pictures, from 0 (equal); it grows with fewer pictures.

    Heusel et al., NeurIPS 2017, as torchmetrics 1.9 has it: TensorFlow's Inception of 2015 in torch-fidelity's file (`card`,
    or the file `weights`), 2,048 features of RGB bytes, enlarged to 299 px antialiased. Other implementations enlarge
    otherwise: only numbers of the same one compare.

    Args:
        parts: the mean over consecutive parts of so many pictures, as the authors take it on CelebA-HQ; None for all at once.
            What is left beyond the last whole part does not count. Fewer pictures are one part.
        card: of the network.
        weights: its file's path; None looks where cards are kept.

    Raises, at the first call: MissingPackage, MissingWeights, WrongWeights.
    """

    parts: Count | None = None
    card: str | Card = "fid_inception"
    weights: str | None = None

    @property
    def meaning(self) -> Measure:
        over = "" if self.parts is None else f", mean over parts of {self.parts:,} pictures"
        return Measure("picture", "", "lower", f"Fréchet inception distance{over}")

    def cards(self) -> tuple[Card, ...]:
        return (named(self.card),)

    def missing(self) -> str | None:
        """What a preflight says where torch-fidelity, which has the network's layers, is not installed."""
        return None if importlib.util.find_spec("torch_fidelity") else NO_FIDELITY

    def embed(self, images: Image) -> Features:
        """2,048 features of each picture."""
        network = _inception(self.card, self.weights).to(images.device)
        features: Features = network(to_bytes(images))
        return finite(features, "Inception")

    def compare(self, view: ArrayLike, original: ArrayLike) -> tuple[float, int]:
        """The distance of features (n d), (n d), NaN of fewer than two pictures; and how many pictures are in it."""
        rows, clean = np.asarray(view), np.asarray(original)
        size = len(rows) if self.parts is None else min(self.parts, len(rows))
        starts = range(0, len(rows) - size + 1, max(size, 1))
        distances = [frechet_distance(rows[start : start + size], clean[start : start + size]) for start in starts]
        return float(np.mean(distances)), size * len(distances)


def frechet_distance(a: ArrayLike, b: ArrayLike) -> float:
    """Fréchet distance of the Gaussians fitted to two sets of embeddings (n d), (m d): from 0, in their unit squared.

    |μ_a - μ_b|² + tr(Σ_a + Σ_b - 2 (Σ_a Σ_b)^½), in float64, with covariances divided by n - 1 (Heusel et al., NeurIPS
    2017; on Inception features it is the FID). Rows of NaN are left out; NaN where fewer than two rows stay.
    """
    first, second = (np.asarray(rows, np.float64) for rows in (a, b))
    first, second = (rows[~np.isnan(rows).any(axis=1)] for rows in (first, second))
    if min(len(first), len(second)) < 2:
        return math.nan
    # With Σ = RᵀR from the QR decomposition of centred rows, tr (Σ_a Σ_b)^½ is the sum of R_a R_bᵀ's singular values.
    root_a, root_b = _root(first), _root(second)
    common = np.linalg.svdvals(root_a @ root_b.T).sum()
    apart = np.square(first.mean(axis=0) - second.mean(axis=0)).sum()
    return float(apart + np.square(root_a).sum() + np.square(root_b).sum() - 2 * common)


def _root(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """The upper triangle R whose RᵀR is the covariance of the rows."""
    return np.asarray(np.linalg.qr(rows - rows.mean(axis=0), mode="r")) / math.sqrt(len(rows) - 1)


def _ssim_map(view: Image, original: Image) -> Image:
    """The similarity of the windows around each pixel. In [0, 1], as black has to be 0 in its term of luminance."""
    from torchmetrics.functional.image import structural_similarity_index_measure  # seconds, which PSNR has no need of

    _, similarities = structural_similarity_index_measure(
        (view + 1) / 2, (original + 1) / 2, data_range=1.0, reduction="none", return_full_image=True
    )
    return similarities


def _mean_where(mask: Mask, values: Image) -> Scores:
    """The mean over channels and the mask's pixels (b 1 h w) of each picture; 0 / 0 = NaN where it has none."""
    return (values * mask).sum(dim=(1, 2, 3)) / (mask.sum(dim=(1, 2, 3)) * values.shape[1])


@functools.cache
def _inception(card: str | Card, path: str | None) -> torch.nn.Module:
    """Torchmetrics' network. It unpickles whatever its file holds: it gets one that we write from checked numbers."""
    if not importlib.util.find_spec("torch_fidelity"):
        raise MissingPackage(NO_FIDELITY)
    from torchmetrics.image.fid import NoTrainInceptionV3

    safe = io.BytesIO()
    torch.save(torch.load(resolve(named(card), path), map_location="cpu", weights_only=True), safe)
    safe.seek(0)
    network: torch.nn.Module = NoTrainInceptionV3("inception-v3-compat", ["2048"], safe)  # type: ignore[arg-type]
    return network.requires_grad_(False)


@functools.cache
def _alexnet_lpips(card: str | Card, path: str | None) -> torch.nn.Module:
    """Torchmetrics' network would download and unpickle AlexNet: it gets AlexNet from a checked file."""
    from torchmetrics.functional.image.lpips import _NoTrainLpips

    alexnet = torch.load(resolve(named(card), path), map_location="cpu", weights_only=True)
    network = _NoTrainLpips(net="alex", pnet_rand=True)
    layers = {name: alexnet[f"features.{name.partition('.')[2]}"] for name in network.net.state_dict()}
    network.net.load_state_dict(layers)
    return network
