"""Salar et al.: inpaint the face while pulling its attributes toward a synthetic face (arXiv 2509.14866).

    M    the face's parts, less what is kept;   Stable Diffusion 2's inpainting network sees M and the picture without M
    z    = a z_0 + s n at the last timestep,  z_0 = E(x)
    each step, with x_0 = (z - s eps) / a:
    g    = gradient in x_0 of the sum over FaRL's tokens of the mean squared difference between those of D(x_0) and of the target
    z   := DDIM's step with eta = 1  -  sigma * pull * g
    D(z), the whole picture: nothing is pasted back

As in their code (parham1998/Face-Anonymization): the grid is that of the first latent diffusion code, every (T // steps)-th
timestep from 1, which for 45 steps are 46; the guidance scale of 0 leaves the empty prompt alone; FaRL gets pictures in [-1, 1]
without CLIP's normalization. Their repulsion from the source has weight 0 and is left out. They draw z_0 from the encoder's
distribution, we take its mean.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate, max_pool2d

from keyanon.channel.pixels import from_pil, open_rgb, resize, to_bytes
from keyanon.diffusion.model import LatentDiffusion
from keyanon.diffusion.solvers import NoiseSchedule
from keyanon.finite import finite
from keyanon.methods.baselines.sampling import Level, denoiser, keyed_normals, resized, spread, step
from keyanon.settings import Count, Factor, Pixels, Share, Size, checked
from keyanon.types import About, FaceParser, Image, Key, Latent, Mask, Picture, Published, Source
from keyanon.weights import Card, MissingWeights, WrongWeights, named, resolve


@checked
@dataclass(frozen=True)
class Farl:
    """FaRL's image tower (arXiv 2112.03109), a CLIP ViT-B/16. `weights` is a path to the card's file."""

    card: str | Card = "farl_b16_ep64"
    weights: str | None = None

    def cards(self) -> tuple[Card, ...]:
        return (named(self.card),)

    def tokens(self, images: Image) -> Tensor:
        """The last block's tokens (b 197 768) of pictures, before the last normalization; gradients reach the pictures."""
        model = self._model.to(images.device)
        side = model.config.image_size
        small = interpolate(images, (side, side), mode="bilinear", align_corners=False, antialias=True)
        tokens: Tensor = model(pixel_values=small).last_hidden_state
        return tokens

    @cached_property
    def _model(self) -> Any:
        try:
            from transformers import CLIPVisionConfig, CLIPVisionModel
        except ImportError:
            raise MissingWeights(
                "FaRL needs the package transformers: pip install 'keyanon[stable-diffusion]'"
            ) from None
        path = resolve(named(self.card), self.weights)
        state = torch.load(path, map_location="cpu", weights_only=True)
        try:
            visual = {
                key.removeprefix("visual."): value.float()
                for key, value in state["state_dict"].items()
                if key.startswith("visual.")
            }
            width, _, patch, _ = visual["conv1.weight"].shape
            config = CLIPVisionConfig(
                hidden_size=width,
                intermediate_size=visual["transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
                num_hidden_layers=len(
                    {key.split(".")[2] for key in visual if key.startswith("transformer.resblocks.")}
                ),
                num_attention_heads=width // 64,  # as CLIP's own loader counts them
                image_size=patch * round((len(visual["positional_embedding"]) - 1) ** 0.5),
                patch_size=patch,
                hidden_act="quick_gelu",
            )
            model = CLIPVisionModel(config)
            values = in_transformers_names(visual)
            model.load_state_dict(
                {name: values[name] for name in model.state_dict()}
            )  # the file holds other parts besides
        except KeyError as error:
            raise WrongWeights(f"{path}: not FaRL's file, it has no {error}") from error
        return model.eval().requires_grad_(False)


@checked
@dataclass(frozen=True)
class Salar:
    """The method on Stable Diffusion 2's inpainting model.

    Args:
        backbone: a Stable Diffusion inpainting model.
        parser: the face's parts (theirs: skin, brows, eyes, nose, mouth and lips of CelebAMask-HQ's classes).
        farl: whose tokens compare attributes.
        target: a picture file of a synthetic face; theirs come with their code, by sex.
        keep: finds what to leave alone (theirs: glasses), None for nothing; `dilation` is the side in pixels of the square it
            grows by.
        size: pixels a side at which the model works.
        steps, eta: of DDIM.
        pull: factor of the gradient.
    """

    backbone: LatentDiffusion
    parser: FaceParser
    farl: Farl
    target: str | None
    keep: FaceParser | None = None
    dilation: Pixels = 7
    size: Size = 512
    steps: Count = 45
    eta: Share = 1.0
    pull: Factor = 0.8

    @property
    def about(self) -> About:
        return About.irreversible(
            code_licence="none",
            weights_licence=f"{self.backbone.licence}; {named(self.farl.card).licence}",
            source="Salar et al., ICASSP 2026, arXiv 2509.14866; parham1998/Face-Anonymization",
        )

    def wrong_size(self, size: int) -> str | None:
        """What a preflight says of a size that the model cannot take."""
        return self.backbone.wrong_size(self.size)

    def sources(self, id: str) -> list[Source]:
        """The target's picture."""
        return [Source(Path(self.target))] if self.target is not None and Path(self.target).is_file() else []

    def missing(self) -> str | None:
        """What a preflight says if there is no target picture, None if there is one."""
        if self.target is not None and Path(self.target).is_file():
            return None
        return (
            f"anonymizer.target={self.target}: no picture file. Salar et al. pull every face toward one synthetic face: "
            "set anonymizer.target to a picture of one (theirs: parham1998/Face-Anonymization, assets/target_images)"
        )

    def anonymize(self, images: Image, keys: Sequence[Key], ids: Sequence[str]) -> Published:
        images = images.to(self.backbone.device)
        work = resized(images, (self.size, self.size))
        eps = denoiser(self.backbone, work, self.region(work))
        wanted = self.farl.tokens(self.face.to(work)[None])
        timesteps, levels = self.grid(self.backbone.schedule)
        z = self.backbone.encode(work)
        noise = keyed_normals(self, keys, ids, images, "salar", (1 + len(timesteps), *z.shape[1:]))
        abar = self.backbone.schedule.abar[-1]
        z = abar**0.5 * z + (1 - abar) ** 0.5 * noise[:, 0]
        for i in range(len(timesteps), 0, -1):
            e, (a, s) = eps(z, timesteps[i - 1]), levels[i]
            gradient = pulled((z - s * e) / a, self.decode, self.farl.tokens, wanted)
            finite(gradient, f"the gradient at timestep {timesteps[i - 1]}")
            z = step(z, e, levels[i], levels[i - 1], self.eta, noise[:, i])
            z = z - spread(levels[i], levels[i - 1], self.eta) * self.pull * gradient
        out = resized(self.backbone.decode(z), (images.shape[-2], images.shape[-1]))
        return Published(to_bytes(out).cpu(), (b"",) * len(ids))

    def region(self, images: Image) -> Mask:
        """What is made anew, at the pictures' size."""
        size = (images.shape[-2], images.shape[-1])
        mask = self.parser.mask(images, size).to(images.device)
        if self.keep is None:
            return mask
        kept = self.keep.mask(images, size).to(images)
        return mask & (max_pool2d(kept, self.dilation, stride=1, padding=self.dilation // 2) == 0)

    def grid(self, schedule: NoiseSchedule) -> tuple[list[int], list[Level]]:
        """The timesteps, ascending, and (a, s) of the levels 0 .. N; level 0 is the schedule's first timestep."""
        total = len(schedule.abar)
        timesteps = list(range(1, total, total // self.steps))
        return timesteps, [(schedule.abar[t] ** 0.5, (1 - schedule.abar[t]) ** 0.5) for t in (0, *timesteps)]

    def decode(self, latents: Latent) -> Image:
        """D(z) with gradients."""
        autoencoder = self.backbone.autoencoder
        images: Image = autoencoder.decode(latents / autoencoder.config.scaling_factor).sample
        return images

    @cached_property
    def face(self) -> Picture:
        """The target, square at the model's size."""
        if (problem := self.missing()) is not None:
            raise MissingWeights(problem)
        return from_pil(resize(open_rgb(Path(str(self.target))), self.size))


def pulled(x0: Latent, decode: Callable[[Latent], Image], tokens: Callable[[Image], Tensor], wanted: Tensor) -> Latent:
    """g: the gradient in x0 of the sum over tokens of the mean squared difference to `wanted` (1 n d).

    Picture by picture: the decoder's activations of one at 512 px take some 10 GB in fp32.
    """
    gradients = []
    for one in x0.split(1):
        with torch.enable_grad():
            free = one.detach().requires_grad_(True)
            distance = (tokens(decode(free)) - wanted).square().mean(2).sum()
            gradients.append(torch.autograd.grad(distance, free)[0])
    return torch.cat(gradients)


def in_transformers_names(visual: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parts of CLIP's image tower under the names of transformers' CLIPVisionModel; other parts keep some name."""
    simple = {
        "class_embedding": "embeddings.class_embedding",
        "conv1.weight": "embeddings.patch_embedding.weight",
        "positional_embedding": "embeddings.position_embedding.weight",
    }
    parts = {
        "ln_pre": "pre_layrnorm", "ln_post": "post_layernorm", "transformer.resblocks": "encoder.layers", "ln_1": "layer_norm1",
        "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2", "attn.out_proj": "self_attn.out_proj",
    }  # fmt: skip
    out: dict[str, Tensor] = {}
    for key, value in visual.items():
        name = simple.get(key, key)
        for old, new in parts.items():
            name = name.replace(old, new)
        if "attn.in_proj_" in key:
            for letter, third in zip("qkv", value.chunk(3), strict=True):
                out[name.replace("attn.in_proj_", f"self_attn.{letter}_proj.")] = third
        else:
            out[name] = value
    return out
