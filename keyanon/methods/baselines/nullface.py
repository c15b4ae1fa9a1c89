"""NullFace: replay a picture's own noise while pushing its identity away (arXiv 2503.08478; hanweikung/nullface).

    z_i  = a_i z_0 + s_i n_i,   n_i independent at every level i = 1 .. N                 the inversion, arXiv 2304.06140
    k_i  = (z_{i-1} - mean_i(z_i, eps(z_i))) / sigma_i,   k_1 = 0                         the noise that a step needs to lead there
    replayed from z_N with the same eps and k, the path comes back; with another eps the picture changes where eps does

    NullFace       u = eps(z, no identity),  c = eps(z, -e),  e = the face's embedding,  eps := u + g (c - u)
    its core       the same replay on an unconditional model, with fresh noise in place of k

Both act on the whole latent for the first `mask_delay` steps and inside the mask after them, and publish what the decoder gives,
background included. The core keeps inversion, schedule, start and masking. It lacks what makes NullFace NullFace: chance alone, and
nothing else, leads it away from the original's identity, from a start that still holds most of the original.

Only the levels that are replayed are inverted: the others' noise is never used. The network's noise estimate at the lowest level is
all that a replay with the same eps lacks of z_0, because k_1 = 0 (as in their code).
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Annotated, Any

import torch
from torch import Tensor

from keyanon.batching import in_chunks
from keyanon.channel.pixels import to_bytes
from keyanon.diffusion.model import BadModel, LatentDiffusion
from keyanon.diffusion.solvers import DDIM, NoiseSchedule
from keyanon.errors import BadSetting
from keyanon.faces.finding import Finder, shares
from keyanon.faces.recognition import at_places
from keyanon.finite import within
from keyanon.methods.baselines.sampling import Level, keyed_normals, mean, resized, spread, step
from keyanon.settings import Count, Factor, Share, Size, checked, whole
from keyanon.types import About, Denoiser, Embeddings, FaceParser, Image, Key, Latent, Mask, Published, Recognizer
from keyanon.weights import Card, named, resolve

log = logging.getLogger(__name__)


@checked
@dataclass(frozen=True)
class NoiseInversion:
    """Edit-friendly inversion of DDPM (arXiv 2304.06140) and its replay.

    Args:
        steps: of the whole schedule, spaced as diffusers' DDIM does.
        skip: of these the noisiest that are left out: the replay starts from the original with the noise of step N = steps - skip.
        eta: share of fresh noise in a step; 1 is DDPM.
    """

    steps: Count = 100
    skip: Annotated[int, whole(0, 10**9)] = 70
    eta: Share = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.skip < self.steps or self.eta <= 0:
            raise BadSetting(
                f"inversion: steps={self.steps}, skip={self.skip}, eta={self.eta}; some steps have to be left, "
                "and some noise to store"
            )

    def grid(self, schedule: NoiseSchedule) -> tuple[list[int], list[Level]]:
        """The timesteps t_1 .. t_N, ascending, and (a, s) of the levels 0 .. N."""
        ddim, kept = DDIM(self.steps), self.steps - self.skip
        return ddim.timesteps(schedule)[:kept], ddim.levels(schedule)[: kept + 1]

    def invert(self, eps: Denoiser, schedule: NoiseSchedule, z0: Latent, noise: Tensor) -> tuple[Latent, list[Latent]]:
        """z_N and [k_1 .. k_N], from the noise n_i = noise[:, i - 1]."""
        timesteps, levels = self.grid(schedule)
        path = [a * z0 + s * noise[:, i - 1] for i, (a, s) in enumerate(levels) if i]
        stored = [torch.zeros_like(z0)]
        for i in range(2, len(levels)):
            with within(f"inversion, step {i} of {len(timesteps)}"):
                e = eps(path[i - 1], timesteps[i - 1])
            predicted = mean(path[i - 1], e, levels[i], levels[i - 1], self.eta)
            stored.append((path[i - 2] - predicted) / spread(levels[i], levels[i - 1], self.eta))
        return path[-1], stored

    def replay(self, eps: Denoiser, schedule: NoiseSchedule, start: Latent, stored: Sequence[Latent]) -> Latent:
        """z_0 from z_N = start with the steps' noise [k_1 .. k_N]."""
        timesteps, levels = self.grid(schedule)
        z = start
        for i in range(len(timesteps), 0, -1):
            with within(f"sampling, step {len(timesteps) - i + 1} of {len(timesteps)}"):
                z = step(z, eps(z, timesteps[i - 1]), levels[i], levels[i - 1], self.eta, stored[i - 1])
        return z


@checked
@dataclass(frozen=True)
class FaceIdAdapter:
    """IP-Adapter-FaceID: cross-attention of a Stable Diffusion 1.5 network to tokens made of a face embedding.

    Args:
        scale: of what the added attention gives.
        weights: a path to the card's file.
    """

    scale: Factor = 1.0
    card: str | Card = "ip_adapter_faceid_sd15"
    weights: str | None = None

    def cards(self) -> tuple[Card, ...]:
        return (named(self.card),)

    def attach(self, unet: Any) -> None:
        """Change the network in place.

        The file's low-rank changes of the attention are added into the weights: diffusers leaves them out, with a warning,
        where the package peft is not installed.
        """
        state = torch.load(resolve(named(self.card), self.weights), map_location="cpu", weights_only=True)
        parts = state["ip_adapter"]
        for number, name in enumerate(list(unet.attn_processors)):
            attention = unet.get_submodule(name.removesuffix(".processor"))
            for short in ("to_q", "to_k", "to_v", "to_out"):
                if f"{number}.{short}_lora.down.weight" in parts:
                    down, up = (parts[f"{number}.{short}_lora.{side}.weight"].float() for side in ("down", "up"))
                    layer = attention.to_out[0] if short == "to_out" else getattr(attention, short)
                    layer.weight.data += (up @ down).to(layer.weight)
        attended = {key: value for key, value in parts.items() if "_lora." not in key}
        # What diffusers' pipelines call; of its public ways in, each needs a whole pipeline.
        unet._load_ip_adapter_weights(
            [{"image_proj": state["image_proj"], "ip_adapter": attended}], low_cpu_mem_usage=False
        )
        for processor in unet.attn_processors.values():
            if hasattr(processor, "scale"):
                processor.scale = [self.scale]
        unet.requires_grad_(False)


@checked
@dataclass(frozen=True)
class NullFace:
    """The method on Stable Diffusion 1.5, prompt "".

    Their picture is cropped to a square and resized to 512 px, which `size` does to square pictures; they find the face
    with InsightFace's detector at 0.1, here it is the recognizer's own.

    Args:
        backbone: a noise-predicting Stable Diffusion.
        adapter: what lets the network see an embedding.
        recognizer: whose unit rows are the identity: InsightFace buffalo_l's, on which the adapter was trained.
        parser: where to change the face.
        inversion: schedule and start.
        size: pixels a side at which the model works.
        guidance: g.
        identity: factor of the embedding: -1 negates it.
        mask_delay: steps before the mask counts.
        finder: tells the faces apart that are pushed away one by one.
    """

    backbone: LatentDiffusion
    adapter: FaceIdAdapter
    recognizer: Recognizer
    parser: FaceParser
    inversion: NoiseInversion
    size: Size = 512
    guidance: Factor = 10.0
    identity: Factor = -1.0
    mask_delay: Annotated[int, whole(0, 10**9)] = 10
    finder: Finder = field(default_factory=Finder)

    @property
    def about(self) -> About:
        return About.irreversible(
            code_licence="AGPL-3.0",
            weights_licence=f"{self.backbone.licence}; {named(self.adapter.card).licence}",
            source="Kung et al., FG 2026, arXiv 2503.08478; hanweikung/nullface",
        )

    def wrong_size(self, size: int) -> str | None:
        """What a preflight says of a size that the model cannot take."""
        return self.backbone.wrong_size(self.size)

    def anonymize(self, images: Image, keys: Sequence[Key], ids: Sequence[str]) -> Published:
        """Published pictures; one without a face to embed goes through with its identity neither pulled nor pushed.

        Of several faces each is pushed away by itself, one after the other, in its part of the mask.
        """
        images = images.to(self.backbone.device)
        work = resized(images, (self.size, self.size))
        masks = self.parser.mask(work, self.backbone.latent_size(work)).to(work.device)
        faces, scale = self.finder.chosen(images), masks.shape[-1] / images.shape[-1]
        parts = [shares(mask, found, scale) for mask, found in zip(masks, faces, strict=True)]
        out = images
        for turn in range(max(map(len, parts))):
            rows = [i for i, each in enumerate(parts) if turn < len(each)]
            places = [faces[i][turn].box if len(parts[i]) > 1 else None for i in rows]
            embeddings = at_places(self.recognizer, places).embed(images[rows]).to(work)
            for i, found in zip(rows, embeddings.isfinite().all(1).tolist(), strict=True):
                if not found:
                    log.warning("%s: no face found to push away; its identity is published", ids[i])
            mask = torch.stack([parts[i][turn] for i in rows])
            purpose = f"nullface|face {turn}" if turn else "nullface"
            own = [keys[i] for i in rows], [ids[i] for i in rows]
            new = self.pushed(out[rows], mask, embeddings.nan_to_num(), *own, purpose)
            out = out.index_copy(0, torch.tensor(rows, device=out.device), new)
        return Published(to_bytes(out).cpu(), (b"",) * len(ids))

    def pushed(
        self, images: Image, mask: Mask, embeddings: Embeddings, keys: Sequence[Key], ids: Sequence[str], purpose: str
    ) -> Image:
        """Pictures with the identity of `embeddings` pushed away, inside the mask from the delay on."""
        z0 = self.backbone.encode(resized(images, (self.size, self.size)))
        schedule = self.backbone.schedule
        masked = delayed(self.inversion.grid(schedule)[0], self.mask_delay)
        nobody = torch.zeros_like(embeddings)

        def guided(z: Latent, t: int) -> Latent:
            u = self.eps(z, t, nobody)
            push = self.guidance * (self.eps(z, t, self.identity * embeddings) - u)
            return u + (push * mask if t in masked else push)

        noise = keyed_normals(
            self, keys, ids, images, purpose, (self.inversion.steps - self.inversion.skip, *z0.shape[1:])
        )
        start, stored = self.inversion.invert(lambda z, t: self.eps(z, t, nobody), schedule, z0, noise)
        out = self.backbone.decode(self.inversion.replay(guided, schedule, start, stored))
        return resized(out, (images.shape[-2], images.shape[-1]))

    def eps(self, z: Latent, t: int, identity: Embeddings) -> Latent:
        """The network's estimate of the noise in z at the timestep t, for faces of those embeddings."""
        self.backbone.evaluations[t] += len(z)
        rows = torch.arange(len(z), device=z.device)
        out = in_chunks(lambda part: self._network(z[part], t, identity[part]), rows, chunk=self.backbone.chunk)
        return self.backbone.as_noise(out, z, t)

    def _network(self, z: Latent, t: int, identity: Embeddings) -> Latent:
        prompt, dtype, times = self.prompt, self.unet.dtype, torch.full((len(z),), t, device=z.device)
        with torch.no_grad():
            out: Latent = self.unet(
                z.to(dtype),
                times,
                prompt.expand(len(z), -1, -1),
                added_cond_kwargs={"image_embeds": [identity[:, None].to(dtype)]},
            ).sample.float()
        return out

    @property
    def prompt(self) -> Tensor:
        """The empty prompt's embedding (1 tokens d)."""
        if self.backbone.condition is None:
            raise BadModel(
                f"{self.backbone.source}: NullFace needs a Stable Diffusion; nullface_core runs on other models"
            )
        return self.backbone.condition

    @cached_property
    def unet(self) -> Any:
        """The backbone's network with the adapter in it: loaded anew, so that the backbone's own stays what it is."""
        unet = replace(self.backbone).unet
        self.adapter.attach(unet)
        return unet


@checked
@dataclass(frozen=True)
class NullFaceCore:
    """NullFace's inversion and replay on any unconditional model; fresh noise where it has its identity guidance.

    Args:
        backbone, parser: any latent diffusion model; where to change the face.
        inversion: schedule and start.
        mask_delay: steps before the mask counts.
    """

    backbone: LatentDiffusion
    parser: FaceParser
    inversion: NoiseInversion
    mask_delay: Annotated[int, whole(0, 10**9)] = 10

    @property
    def about(self) -> About:
        return About.irreversible(
            code_licence="AGPL-3.0",
            weights_licence=self.backbone.licence,
            source="inversion and masking of arXiv 2503.08478; fresh noise for its identity guidance",
        )

    def wrong_size(self, size: int) -> str | None:
        """What a preflight says of a size that the model cannot take."""
        return self.backbone.wrong_size(size)

    def anonymize(self, images: Image, keys: Sequence[Key], ids: Sequence[str]) -> Published:
        images = images.to(self.backbone.device)
        z0, schedule = self.backbone.encode(images), self.backbone.schedule
        mask = self.parser.mask(images, (z0.shape[-2], z0.shape[-1])).to(images.device)
        timesteps, _ = self.inversion.grid(schedule)
        masked = delayed(timesteps, self.mask_delay)
        noise, fresh = (
            keyed_normals(self, keys, ids, images, purpose, (len(timesteps), *z0.shape[1:]))
            for purpose in ("nullface", "fresh")
        )
        start, stored = self.inversion.invert(self.backbone.eps, schedule, z0, noise)
        changed = [
            torch.where(mask, fresh[:, i], stored[i]) if t in masked else fresh[:, i] for i, t in enumerate(timesteps)
        ]
        out = self.backbone.decode(self.inversion.replay(self.backbone.eps, schedule, start, changed))
        return Published(to_bytes(out).cpu(), (b"",) * len(ids))


def delayed(timesteps: Sequence[int], delay: int) -> set[int]:
    """Of ascending timesteps those that come after the first `delay` steps down."""
    return set(timesteps[: max(len(timesteps) - delay, 0)])
