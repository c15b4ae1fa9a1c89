"""The authors' variant with a face mask as hint: a trainable copy of the network's encoder that tells it where the face is.

    f_0       = conv_in'(z) + hint(M)                       M: the face's pixels, 0 or 1 in three channels
    f_1 ..    = the copy's down blocks on f_0,  m' its middle block
    eps       = the frozen network's decoder on its own skips s_i + c_i and its own middle m + zero(m'),
                c_i = zero_i(f_i) behind a resnet,  c_i = f_i as it is for f_0 and behind a downsampler

zero: 1x1 convolutions that begin at zero; so does the last of hint. After ControlNet (arXiv 2302.05543), which has a zero
convolution on every skip: here f_0 and the downsamplers' reach the decoder bare, so that the network is not the frozen one even
before training.

Written anew from a description and a reading of https://github.com/PLabarbarie/diffusion-signflip-anon (commit 824c55b). The
weights are a checkpoint of the authors, as torch.save writes a state dict: the frozen network, its whole copy, and what is added.
The config of the backbone's `unet` tells the network's shape. None of their checkpoints was at hand: the names in it were read off
their code, and no real one was tried.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from keyanon.batching import in_chunks
from keyanon.diffusion.model import BadModel, LatentDiffusion, arithmetic, config, readable
from keyanon.errors import BadSetting
from keyanon.settings import checked
from keyanon.types import Denoiser, Latent, Mask
from keyanon.weights import Card, WrongWeights, named, resolve

HINT_WIDTH = 16  # channels of the hint's first layer, doubled at each halving of its size


@checked
@dataclass(frozen=True)
class MaskControl:
    """Denoisers that see the face mask.

    Args:
        inversion: the network sees the hint on the way up as well as on the way down; else, the authors' `ddim_inversion=True`,
            on the way down alone, and inversion is that of the frozen network.
        weights: a path to the card's file.
    """

    inversion: bool = True
    card: str | Card = "controlnet_masks"
    weights: str | None = None

    def cards(self) -> tuple[Card, ...]:
        return (named(self.card),)

    def denoisers(self, backbone: LatentDiffusion, mask: Mask) -> tuple[Denoiser, Denoiser]:
        """eps for inverting and for sampling pictures whose face is `mask` (b 1 h w), at pixel size.

        A call counts as one evaluation of the backbone, though it costs about half of one more. Raises MissingWeights,
        WrongWeights.
        """
        control = self.network(backbone)
        hint = in_chunks(control.features, mask.to(backbone.device).float().expand(-1, 3, -1, -1), chunk=backbone.chunk)
        if (size := tuple(hint.shape[-2:])) != backbone.latent_size(mask):
            raise BadModel(f"{named(self.card).name}: brings masks to {size}, latents are {backbone.latent_size(mask)}")

        def eps(z: Latent, t: int) -> Latent:
            if len(z) != len(hint):
                raise BadSetting(
                    "anonymizer.control needs a solver that keeps its batch whole; set solver.tolerance=null"
                )
            backbone.evaluations[t] += len(z)
            with arithmetic(backbone.precision):
                out = in_chunks(
                    lambda part, seen: controlled(backbone.unet, control, part, seen, t),
                    z,
                    hint,
                    chunk=backbone.chunk,
                    fits=backbone.fits,
                )
            return backbone.as_noise(out, z, t)

        return (eps if self.inversion else backbone.eps), eps

    def network(self, backbone: LatentDiffusion) -> "ControlNetwork":
        return _load(self._path, backbone.folder, backbone.device, backbone.unet.dtype)

    @functools.cached_property
    def _path(self) -> Path:
        return resolve(named(self.card), self.weights)


def controlled(unet: UNet2DModel, control: "ControlNetwork", z: Latent, hint: Tensor, t: int) -> Latent:
    """The frozen network's output on z at the timestep t, steered by `control`, which saw the hint's features."""
    with torch.no_grad():
        z, hint = z.to(unet.dtype), hint.to(unet.dtype)
        time = unet.time_embedding(unet.time_proj(torch.full((len(z),), t, device=z.device)).to(unet.dtype))
        added, middle = control(z, hint, time)
        h = unet.conv_in(z)
        skips = [h]
        for block in unet.down_blocks:
            h, out = block(h, time)
            skips += out
        h = unet.mid_block(h, time) + middle
        skips = [skip + more for skip, more in zip(skips, added, strict=True)]
        for block in unet.up_blocks:
            n = len(block.resnets)
            h, skips = block(h, tuple(skips[-n:]), time), skips[:-n]
        noise: Latent = unet.conv_out(unet.conv_act(unet.conv_norm_out(h))).float()
        return noise


class ControlNetwork(nn.Module):
    """The copy of an encoder, for the config of a diffusers UNet2DModel; `halvings` of the hint lead from pixels to latents."""

    def __init__(self, config: Mapping[str, Any], halvings: int) -> None:
        super().__init__()
        if not plain(config):
            raise BadModel(
                "a control network goes with a plain UNet2DModel alone: no classes, no Fourier times, no skip blocks"
            )
        copied = UNet2DModel.from_config(dict(config))
        self.conv_in, self.down_blocks, self.mid_block = copied.conv_in, copied.down_blocks, copied.mid_block
        widths = config["block_out_channels"]
        self.hint = hint_block(widths[0], halvings)
        self.skips = nn.ModuleList(
            [zero(width) for width, block in zip(widths, self.down_blocks, strict=True) for _ in block.resnets]
        )
        self.middle = zero(widths[-1])

    def features(self, hint: Tensor) -> Tensor:
        """Of a hint (b 3 h w), at the latents' size; no gradients."""
        with torch.no_grad():
            out: Tensor = self.hint(hint.to(self.conv_in.weight.dtype)).float()
        return out

    def forward(self, z: Latent, hint: Tensor, time: Tensor) -> tuple[list[Tensor], Tensor]:
        """c_0, c_1 .., and what is added to the middle."""
        h = self.conv_in(z) + hint
        added, convolutions = [h], iter(self.skips)
        for block in self.down_blocks:
            h, out = block(h, time)
            n = len(block.resnets)
            added += [next(convolutions)(skip) for skip in out[:n]] + list(out[n:])
        return added, self.middle(self.mid_block(h, time))


def hint_block(width: int, halvings: int) -> nn.Sequential:
    """From three channels at pixel size to `width` at that of latents; nested as the authors' is."""
    widths = [HINT_WIDTH * 2**i for i in range(halvings + 1)]
    layers = [nn.Sequential(nn.Conv2d(3, HINT_WIDTH, 3, padding=1), nn.SiLU())]
    for i in range(halvings):
        down, same = nn.Conv2d(widths[i], widths[i + 1], 3, 2, 1), nn.Conv2d(widths[i + 1], widths[i + 1], 3, padding=1)
        layers.append(nn.Sequential(down, nn.SiLU(), same))
    layers.append(nn.Sequential(nn.Conv2d(widths[-1], width, 3, padding=1), nn.SiLU(), zero(width)))
    return nn.Sequential(*layers)


def zero(width: int) -> nn.Conv2d:
    layer = nn.Conv2d(width, width, 1)
    nn.init.zeros_(layer.weight)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


def plain(config: Mapping[str, Any]) -> bool:
    blocks = [*config["down_block_types"], *config["up_block_types"]]
    return (
        config.get("_class_name", "UNet2DModel") == "UNet2DModel"
        and config.get("time_embedding_type", "positional") == "positional"
        and config.get("class_embed_type") is None
        and config.get("num_class_embeds") is None
        and not config.get("center_input_sample", False)
        and not any("Skip" in name for name in blocks)
    )


AUTHORS = {
    "control_copy_unet_hint_block.": "hint.",
    "control_copy_unet_down_zero_convs.": "skips.",
    "control_copy_unet_mid_zero_conv.": "middle.",
    "control_copy_unet.conv_in.": "conv_in.",
    "control_copy_unet.down_blocks.": "down_blocks.",
    "control_copy_unet.mid_block.": "mid_block.",
}  # the rest of their checkpoint is the frozen network, and parts of the copy that are never used


def network_of(state: Mapping[str, Tensor], folder: Path, name: str) -> ControlNetwork:
    """The control network of the model in `folder`, of a checkpoint of the authors; WrongWeights where it is another's."""
    renamed = {
        ours + key.removeprefix(theirs): value
        for theirs, ours in AUTHORS.items()
        for key, value in state.items()
        if key.startswith(theirs)
    }
    halvings = len({key.split(".")[1] for key in renamed if key.startswith("hint.")}) - 2
    with readable(folder / "unet"):
        network = ControlNetwork(config(folder / "unet" / "config.json"), max(halvings, 0))
    try:
        network.load_state_dict(renamed)
    except RuntimeError as error:
        raise WrongWeights(f"{name}: not the weights of a control network for {folder / 'unet'}: {error}") from None
    return network


@functools.cache
def _load(checkpoint: Path, folder: Path, device: str, dtype: torch.dtype) -> ControlNetwork:
    with readable(checkpoint):
        # Most of it is the frozen network and never read.
        state = dict(torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True))
    return network_of(state, folder, str(checkpoint)).to(device, dtype).eval().requires_grad_(False)
