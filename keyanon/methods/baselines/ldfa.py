"""LDFA: the face's box repainted by a general diffusion model (arXiv 2302.08931; KIT-MRT/latent_diffusion_face_anonymization).

    x    the picture around the box, at the model's size;  M the box;  m the box with a soft edge, at latent size
    z    = a z_0 + s n at strength of the schedule,  z_0 = E(x)
    each step: x_0 = m (z - s eps(z)) / a + (1 - m) z_0,  then Euler's step towards x_0
    D(z) back into the picture, inside the box alone

z begins with what the strength leaves of the original: colours and pose pass, and how much of the person does depends on it. Any
latent diffusion model will do: on an unconditional one this is LDFA's core.

Where their paper and their code differ: the paper says ancestral Euler, their request to the web interface misses the field's name
and runs Euler; since December 2024 their code sends the mask in place of the picture, and we do as it did before. The interface
counts one step more for the same strength (38 of 50); we count as diffusers does. They find faces with RetinaFace, here it is the
finder; several are repainted one after the other, as theirs are.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms.functional import gaussian_blur

from keyanon.channel.pixels import to_bytes
from keyanon.diffusion.model import LatentDiffusion
from keyanon.diffusion.solvers import NoiseSchedule
from keyanon.errors import BadSetting
from keyanon.faces.finding import Finder, shares
from keyanon.faces.parsing import reduce_mask
from keyanon.methods.baselines.sampling import Level, denoiser, keyed_normals, mean, resized, spread
from keyanon.settings import Count, Share, Size, checked, number, whole
from keyanon.types import About, FaceParser, Image, Key, Mask, Published
from keyanon.weights import Card

ETA = {"euler": 0.0, "euler_ancestral": 1.0}


@checked
@dataclass(frozen=True)
class Ldfa:
    """Inpainting of the face from its noised original.

    Args:
        backbone: any latent diffusion model; a Stable Diffusion inpainting model gets its mask and picture as well.
        parser: what to repaint; theirs is `FaceBox`.
        size: pixels a side at which the model sees the square around the face; None gives it the whole picture as it is.
        padding: pixels of the picture around the face that the square holds besides.
        strength: share of the schedule that is run.
        steps: of the whole schedule.
        sampler: "euler" as their code runs, "euler_ancestral" as they say.
        feather: standard deviation, in pixels at the model's size, of the mask's soft edge.
        finder: tells the faces apart that the model sees one by one, each in a square of its own; not asked where `size` is None.
    """

    backbone: LatentDiffusion
    parser: FaceParser
    size: Size | None = 512
    padding: Annotated[int, whole(0, 8192)] = 32
    strength: Share = 0.75
    steps: Count = 50
    sampler: Literal["euler", "euler_ancestral"] = "euler"
    feather: Annotated[float, number(0, 1000)] = 4.0
    finder: Finder = field(default_factory=Finder)

    def __post_init__(self) -> None:
        if not 1 <= self.executed <= self.steps:
            raise BadSetting(
                f"anonymizer.strength={self.strength} runs {self.executed} of {self.steps} steps; it has to run some"
            )

    @property
    def executed(self) -> int:
        """Steps that are run."""
        return int(self.steps * self.strength)

    @property
    def about(self) -> About:
        return About.irreversible(
            code_licence="MIT",
            weights_licence=self.backbone.licence,
            source="Klemp et al. 2023, arXiv 2302.08931; KIT-MRT/latent_diffusion_face_anonymization",
        )

    def wrong_size(self, size: int) -> str | None:
        """What a preflight says of a size that the model cannot take."""
        return self.backbone.wrong_size(size if self.size is None else self.size)

    def anonymize(self, images: Image, keys: Sequence[Key], ids: Sequence[str]) -> Published:
        """Published pictures; one on which there is no face to repaint stays as it is."""
        images = images.to(self.backbone.device)
        region = self.parser.mask(images, (images.shape[-2], images.shape[-1])).to(images.device)
        if self.size is None:
            return Published(to_bytes(self.repaint(images, region, keys, ids, "ldfa")).cpu(), (b"",) * len(ids))
        parts = [shares(mask, faces) for mask, faces in zip(region, self.finder.chosen(images), strict=True)]
        out = images
        for turn in range(max(map(len, parts))):
            rows = [i for i, each in enumerate(parts) if turn < len(each)]
            mask = torch.stack([parts[i][turn] for i in rows])
            purpose = f"ldfa|face {turn}" if turn else "ldfa"
            new = self.repaint(out[rows], mask, [keys[i] for i in rows], [ids[i] for i in rows], purpose)
            out = out.index_copy(0, torch.tensor(rows, device=out.device), new)
        return Published(to_bytes(out).cpu(), (b"",) * len(ids))

    def repaint(self, images: Image, region: Mask, keys: Sequence[Key], ids: Sequence[str], purpose: str) -> Image:
        """Pictures repainted on `region`, the face of each."""
        whole = (images.shape[-2], images.shape[-1])
        size = whole if self.size is None else (self.size, self.size)
        places = [window(mask, None if self.size is None else self.padding) for mask in region]
        crops, masks, edges = [], [], []
        for image, mask, place in zip(images.split(1), region.split(1), places, strict=True):
            crops.append(resized(image[..., *place], size))
            masks.append(interpolate(mask[..., *place].float(), size, mode="nearest-exact") > 0)
            edges.append(feathered(masks[-1], self.feather))
        painted = self.inpaint(torch.cat(crops), torch.cat(masks), torch.cat(edges), keys, ids, images, purpose)
        out = images.clone()
        for picture, mask, edge, new, place in zip(out, region, edges, painted.split(1), places, strict=True):
            old = picture[..., *place]
            there = (old.shape[-2], old.shape[-1])
            weight = resized(edge, there)[0].clamp(0, 1) * mask[..., *place]
            picture[..., *place] = old + weight * (resized(new, there)[0] - old)
        return out

    def inpaint(
        self,
        crops: Image,
        mask: Mask,
        soft: Tensor,
        keys: Sequence[Key],
        ids: Sequence[str],
        images: Float[Tensor, "b 3 _ _"],
        purpose: str,
    ) -> Image:
        """Pictures repainted on `mask`, with noise that hangs on whole pictures and their ids."""
        z0 = self.backbone.encode(crops)
        eps = denoiser(self.backbone, crops, mask)
        m = interpolate(soft, z0.shape[-2:], mode="area")
        timesteps, levels = self.grid(self.backbone.schedule)
        eta = ETA[self.sampler]
        noise = keyed_normals(self, keys, ids, images, purpose, (self.executed + 1 if eta else 1, *z0.shape[1:]))
        a, s = levels[-1]
        z = a * z0 + s * noise[:, 0]
        for i in range(self.executed, 0, -1):
            a, s = levels[i]
            x0 = m * (z - s * eps(z, timesteps[i - 1])) / a + (1 - m) * z0
            z = mean(z, (z - a * x0) / s, levels[i], levels[i - 1], eta)
            if eta:
                z = z + spread(levels[i], levels[i - 1], eta) * noise[:, i]
        return self.backbone.decode(z)

    def grid(self, schedule: NoiseSchedule) -> tuple[list[int], list[Level]]:
        """The timesteps t_1 .. t_N that are run, ascending, and (a, s) of the levels 0 = clean .. N.

        k-diffusion spaces them evenly from the schedule's first to its last; rounded to integers here.
        """
        whole = torch.linspace(0, len(schedule.abar) - 1, self.steps, dtype=torch.float64).round().long().tolist()
        timesteps = whole[: self.executed]
        return timesteps, [(1.0, 0.0), *((schedule.abar[t] ** 0.5, (1 - schedule.abar[t]) ** 0.5) for t in timesteps)]


@checked
@dataclass(frozen=True)
class FaceBox:
    """Theirs: the whole box of each face, corners and all."""

    finder: Finder = field(default_factory=Finder)

    def cards(self) -> tuple[Card, ...]:
        return self.finder.cards()

    def mask(self, images: Image, size: tuple[int, int]) -> Mask:
        masks = torch.zeros(len(images), 1, *images.shape[-2:], dtype=torch.bool, device=images.device)
        for mask, faces in zip(masks, self.finder.chosen(images), strict=True):
            for face in faces:
                left, top, right, bottom = (max(0, round(float(edge))) for edge in face.box)
                mask[0, top:bottom, left:right] = True
        return reduce_mask(masks, size, "nearest")


def window(mask: Bool[Tensor, "1 h w"], padding: int | None) -> tuple[slice, slice]:
    """(rows, columns) of the square around a mask (1 h w) and its padding, moved into the picture; all of it for None."""
    rows, columns = mask[0].any(1).nonzero().flatten().tolist(), mask[0].any(0).nonzero().flatten().tolist()
    if padding is None or not rows:
        return slice(None), slice(None)
    side = max(rows[-1] - rows[0], columns[-1] - columns[0]) + 1 + 2 * padding

    def around(first: int, last: int, length: int) -> slice:
        start = min(max((first + last + 1 - side) // 2, 0), max(length - side, 0))
        return slice(start, min(start + side, length))

    return around(rows[0], rows[-1], mask.shape[1]), around(columns[0], columns[-1], mask.shape[2])


def feathered(mask: Mask, deviation: float) -> Tensor:
    """The mask in [0, 1], blurred by a Gaussian of that standard deviation in pixels."""
    if deviation == 0:
        return mask.float()
    size = 2 * math.ceil(2.5 * deviation) + 1
    blurred: Tensor = gaussian_blur(mask.float(), [size, size], [deviation, deviation])
    return blurred
