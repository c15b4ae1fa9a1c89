"""Attackers that learn from pairs: they have photographs with their published files, of people who are not the victims.

Who knows the method has as many pairs as he likes under keys of his own (`informed`); where all pictures share one key stream, as
the authors use theirs, his pairs may carry the victims' key as well. Numbers for one who learns nothing flatter a method
(arXiv 2304.01635). Three learners, after each of which a recognizer compares with clean pictures as ever:

    parrot          e(x') -> e(x)            ridge regression between a recognizer's rows         (Newton et al., TKDE 17(2), 2005)
    magnitudes      |z'_T| on M -> e(x)      the same, from all that flipped signs leave of the noise; or from z'_T itself
    deanonymizer    x', P -> x on P          a small U-Net, whose pictures the recognizer embeds

`ridge(e(x'), e(x))` is the parrot, `ridge(noise_features(z'_T, M, "magnitudes"), e(x))` the second. Fitting repeats to the last bit
on one thread.
"""

import itertools
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.nn.functional import interpolate, pixel_shuffle, pixel_unshuffle, silu
from torch.optim.lr_scheduler import OneCycleLR

from keyanon.channel.pixels import to_bytes, to_floats
from keyanon.errors import BadSetting
from keyanon.measures.biometrics import Floats, unit
from keyanon.types import Image, Latent, Mask

FOLDS = 5
STRENGTHS = np.logspace(-3, 3, 13)  # of the ridge, in units of the mean eigenvalue of the features' Gram matrix
CELL = 4  # pixels a side that the network takes as one
WIDTHS = (48, 64, 96)  # channels at 1/4, 1/8 and 1/16 of the picture's size
BATCH, RATE = 16, 3e-3


# Regression onto embeddings
@dataclass(frozen=True, eq=False)
class Guess:
    """Features of published files (n k) in, guesses (n d) of the clean embeddings out: unit rows, NaN where features are.

    A regression that knows little stays near the mean, and near the mean cosines are high for everyone. So a guess keeps its
    direction from the mean, and its distance is that of clean embeddings: one that knows nothing has the cosines of a stranger.
    `heldout` is what the attacker himself can expect: the mean cosine, seen from the mean, on pairs left out of the fit.
    """

    centre: Floats  # k
    weights: Floats  # k d
    mean: Floats  # d
    radius: float
    heldout: float

    def __call__(self, features: ArrayLike) -> Floats:
        away = (np.asarray(features, np.float64) - self.centre) @ self.weights
        rows = self.mean + self.radius * unit(away)
        return unit(rows)


def ridge(features: ArrayLike, clean: ArrayLike) -> Guess:
    """Ridge regression from features (m k) to clean embeddings (m d), in its dual form: k may be far above m.

    Rows with a NaN on either side are left out. The strength is the one whose guesses point best on FOLDS parts left out in
    turn; parts are runs of rows, so that a person's pictures, side by side, are left out together. BadSetting for fewer than
    2 FOLDS pairs.
    """
    x, y = np.asarray(features, np.float64), np.asarray(clean, np.float64)
    known = ~np.isnan(np.concatenate([x, y], axis=1)).any(axis=1)
    x, y = x[known], y[known]
    if len(x) < 2 * FOLDS:
        raise BadSetting(f"{len(x)} of {len(known)} pairs have a face on both pictures; a regression needs {2 * FOLDS}")
    heldout = np.zeros(len(STRENGTHS))
    for part in np.array_split(np.arange(len(x)), FOLDS):
        rest = np.delete(np.arange(len(x)), part)
        centre, mean = x[rest].mean(0), y[rest].mean(0)
        truth = unit(y[part] - mean)
        for i, dual in enumerate(duals(x[rest] - centre, y[rest] - mean, STRENGTHS)):
            guess = (x[part] - centre) @ (x[rest] - centre).T @ dual
            heldout[i] += (unit(guess) * truth).sum() / len(x)
    best = int(heldout.argmax())
    centre, mean = x.mean(0), y.mean(0)
    (dual,) = duals(x - centre, y - mean, STRENGTHS[best : best + 1])
    radius = float(np.sqrt(np.square(y - mean).sum(1).mean()))
    return Guess(centre, (x - centre).T @ dual, mean, radius, float(heldout[best]))


def duals(x: Floats, y: Floats, strengths: Floats) -> list[Floats]:
    """(x x^T + s I)^-1 y, for each strength s in units of the mean eigenvalue of x x^T."""
    values, vectors = np.linalg.eigh(x @ x.T)
    turned = vectors.T @ y
    unit_of_strength = max(float(values.mean()), 1e-12)
    return [vectors @ (turned / (values.clip(0) + s * unit_of_strength)[:, None]) for s in strengths]


def noise_features(zT: Latent, mask: Mask, of: Literal["magnitudes", "noise"]) -> Floats:
    """|z'_T| or z'_T of every cell and channel (n c*u*v), 0 outside the face.

    Flipped signs leave the magnitudes under any key; with one key stream for all pictures z'_T itself is a fixed linear map of z_T.
    Zeros show the face's outline too: what it gives away by itself, regression from the mask alone tells.
    """
    inside = torch.where(mask, zT.abs() if of == "magnitudes" else zT, 0.0)
    return np.asarray(inside.flatten(1).double().cpu().numpy())


# Regression onto pictures
@dataclass(frozen=True, eq=False)
class Deanonymizer:
    net: "Restorer"

    @torch.no_grad()
    def __call__(self, published: Image, face: Mask) -> Image:
        """Published pictures with the face's pixels (n 1 h w) as the network thinks they were."""
        parts = zip(published.split(BATCH), face.split(BATCH), strict=True)
        restored = torch.cat([self.net(seen(images, inside)) for images, inside in parts])
        return torch.where(face, restored.clamp(-1, 1), published)


def deanonymizer(originals: Image, published: Image, face: Mask, steps: int = 500, seed: int = 0) -> Deanonymizer:
    """A U-Net trained on m pairs by the mean of |x - net(x', P)| over the face's pixels P (m 1 h w), `steps` batches of BATCH.

    Pictures are never mirrored or shifted: a key used again sits at fixed places. Trains where the pictures are; sides are
    multiples of 16.
    """
    device, inputs = published.device, seen(published, face)
    with torch.random.fork_rng(devices=[]):  # modules draw their first weights from the global generator
        torch.manual_seed(seed)
        net = Restorer(published.shape[-2] // CELL, published.shape[-1] // CELL)
    net.to(device)
    drawn = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(net.parameters(), RATE, weight_decay=1e-2)
    schedule = OneCycleLR(optimizer, RATE, total_steps=steps)
    for _ in range(steps):
        rows = torch.randint(len(inputs), (BATCH,), generator=drawn).to(device)
        inside = face[rows]
        error = (net(inputs[rows]) - originals[rows]).abs() * inside
        loss = error.sum() / (3 * inside.sum()).clamp(min=1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return Deanonymizer(net.eval().requires_grad_(False))


def seen(published: Image, face: Mask) -> Tensor:
    """What the network sees (n 4 h w): the picture as its file has it, and where the face is."""
    return torch.cat([to_floats(to_bytes(published)), face.to(published)], 1)


class Restorer(nn.Module):
    """A U-Net over cells of CELL x CELL pixels, (n 4 h w) -> (n 3 h w)."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        sizes = [(rows >> level, columns >> level) for level in range(len(WIDTHS))]
        wider = list(itertools.pairwise(WIDTHS))
        self.stem = nn.Conv2d(4 * CELL**2, WIDTHS[0], 3, padding=1)
        self.down = nn.ModuleList(Block(width, size) for width, size in zip(WIDTHS, sizes, strict=True))
        self.shrink = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in wider)
        self.join = nn.ModuleList(nn.Conv2d(a + b, a, 1) for a, b in wider)
        self.up = nn.ModuleList(Block(width, size) for width, size in zip(WIDTHS[:-1], sizes[:-1], strict=True))
        self.out = nn.Conv2d(WIDTHS[0], 3 * CELL**2, 3, padding=1)

    def forward(self, pictures: Tensor) -> Tensor:
        h, kept = self.down[0](self.stem(pixel_unshuffle(pictures, CELL))), []
        for shrink, block in zip(self.shrink, self.down[1:], strict=True):
            kept.append(h)
            h = block(shrink(h))
        for skip, join, block in zip(reversed(kept), reversed(self.join), reversed(self.up), strict=True):
            h = block(join(torch.cat([skip, interpolate(h, scale_factor=2.0)], 1)))
        return pixel_shuffle(self.out(h), CELL)


class Block(nn.Module):
    """A residual block with a scale and a shift for each place: what a key does there is no convolution."""

    def __init__(self, width: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.norm = nn.GroupNorm(8, width, affine=False)
        self.scale, self.shift = nn.Parameter(torch.ones(width, *size)), nn.Parameter(torch.zeros(width, *size))

    def forward(self, h: Tensor) -> Tensor:
        out: Tensor = h + self.second(silu(self.norm(self.first(h)) * self.scale + self.shift))
        return out
