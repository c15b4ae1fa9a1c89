"""The authors' method, written down anew from its description as small reference functions, beside ours: equal to 1e-8 in fp64.

Tiny VQModel and UNet2DModel with random weights, 10 + 10 steps, both directions: without and with the control network; the right
key, wrong ones and JPEG by their protocol (mask from unclipped floats). Their code is not here: what it does is in docs/method.md.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler, UNet2DModel, VQModel
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, conv2d, interpolate, silu

from keyanon.attacks.views import FloatChannel, Jpeg, NearKey, WrongKey
from keyanon.channel.headers import Header
from keyanon.channel.keys import MasterKey, experiment_key
from keyanon.channel.pixels import from_pil, jpeg
from keyanon.channel.streams import signs
from keyanon.diffusion.controlnet import ControlNetwork
from keyanon.diffusion.model import LatentDiffusion
from keyanon.diffusion.solvers import DDIM
from keyanon.faces.parsing import CLASSES, PAPER_CLASSES, BiSeNetParser, reduce_mask
from keyanon.methods.signflip import SignFlip
from tests.conftest import LDM_NOISE, save_tiny_ldm, smooth_picture
from tests.test_controlnet import checkpoint, control_of
from tests.test_parsing import colour_parser

STEPS, SIZE, IDS = 10, 64, ["a", "b"]
KEYS = [experiment_key()] * 2
Eps = Callable[[Tensor, Tensor], Tensor]
EXACT = {"atol": 1e-8, "rtol": 0}


# The reference


def tent(size: int, out: int) -> Tensor:
    """Bilinear reduction of `size` cells to `out` as a matrix: each weighs what a triangle twice as wide as its cell covers."""
    scale = size / out
    centres, cells = (torch.arange(out).double() + 0.5) * scale, torch.arange(size).double() + 0.5
    weights = (1 - (cells[None] - centres[:, None]).abs() / scale).clamp(min=0)
    return weights / weights.sum(1, keepdim=True)


def touched(labels: Tensor, size: int) -> Tensor:
    """A mask (b 1 h w) of the cells that a face touches, however little."""
    weights = tent(labels.shape[-1], size)
    return weights @ labels.double() @ weights.T > 0


def schedulers() -> tuple[DDIMInverseScheduler, DDIMScheduler]:
    down = DDIMScheduler(**LDM_NOISE)
    up = DDIMInverseScheduler.from_config(down.config)
    for each in (up, down):
        each.alphas_cumprod = each.alphas_cumprod.double()
        each.set_timesteps(STEPS)
    return up, down


def inverted(eps: Eps, z: Tensor) -> list[Tensor]:
    scheduler, _ = schedulers()
    path = [z]
    for t in scheduler.timesteps:
        path.append(scheduler.step(eps(path[-1], t), t, path[-1]).prev_sample)
    return path


def sampled(eps: Eps, z: Tensor, path: list[Tensor], mask: Tensor) -> Tensor:
    """After each step the picture's own path is written back outside the mask."""
    _, scheduler = schedulers()
    for level, t in zip(reversed(range(STEPS)), scheduler.timesteps, strict=True):
        z = scheduler.step(eps(z, t), t, z, eta=0.0).prev_sample
        z = mask * z + ~mask * path[level]
    return z


def decoded(vq: VQModel, z: Tensor) -> Tensor:
    """By the nearest entry of the codebook in each cell."""
    codes = vq.quantize.embedding.weight
    nearest = torch.cdist(z.permute(0, 2, 3, 1).reshape(-1, z.shape[1]), codes).argmin(1)
    quantized = codes[nearest].view(len(z), *z.shape[2:], -1).permute(0, 3, 1, 2)
    return vq.decoder(vq.post_quant_conv(quantized))


@dataclass
class Reference:
    """The method: pictures, signs of a key and the face's cells in, pictures out; the same in both directions."""

    vq: VQModel
    unet: UNet2DModel
    copy: UNet2DModel | None = None
    added: dict[str, Tensor] | None = None
    inversion: bool = True

    def flipped(self, pictures: Tensor, k: Tensor, mask: Tensor, labels: Callable[[Tensor], Tensor]) -> Tensor:
        def frozen(z: Tensor, t: Tensor) -> Tensor:
            return self.unet(z, t).sample

        def steered(z: Tensor, t: Tensor) -> Tensor:
            return self.steered(z, t, touched(labels(pictures), SIZE).double().expand(-1, 3, -1, -1))

        down = frozen if self.copy is None else steered
        path = inverted(down if self.inversion else frozen, self.vq.encode(pictures).latents)
        zT = torch.where(mask, k * path[-1], path[-1])
        return decoded(self.vq, sampled(down, zT, path, mask))

    def steered(self, z: Tensor, t: Tensor, hint: Tensor) -> Tensor:
        """The frozen network, to whose skips and middle those of a copy of its encoder are added."""

        def conv(name: str, x: Tensor, **options: int) -> Tensor:
            return conv2d(x, self.added[f"{name}.weight"].double(), self.added[f"{name}.bias"].double(), **options)

        block, skip_of, middle_of = (
            f"control_copy_unet_{part}" for part in ("hint_block", "down_zero_convs", "mid_zero_conv")
        )
        seen = silu(conv(f"{block}.0.0", hint, padding=1))
        for i in (1, 2):
            seen = silu(conv(f"{block}.{i}.0", seen, padding=1, stride=2))
            seen = conv(f"{block}.{i}.2", seen, padding=1)
        seen = conv(f"{block}.3.2", silu(conv(f"{block}.3.0", seen, padding=1)))
        time = self.unet.time_embedding(self.unet.time_proj(t.expand(len(z))).to(z))
        h = self.copy.conv_in(z) + seen
        skips, convolutions = [h], 0
        for down in self.copy.down_blocks:
            h, out = down(h, time)
            for i, skip in enumerate(out):
                behind_resnet = i < len(down.resnets)
                skips.append(conv(f"{skip_of}.{convolutions}", skip) if behind_resnet else skip)
                convolutions += behind_resnet
        middle = conv(middle_of, self.copy.mid_block(h, time))
        hooks = [self.unet.mid_block.register_forward_hook(lambda _, __, out: out + middle)]

        def add(up: torch.nn.Module, given: tuple[Tensor, tuple[Tensor, ...], Tensor]) -> tuple[object, ...]:
            hidden, own, *rest = given
            mine = [skips.pop() for _ in up.resnets][::-1]
            return hidden, tuple(a + b for a, b in zip(own, mine, strict=True)), *rest

        hooks += [up.register_forward_pre_hook(add) for up in self.unet.up_blocks]
        try:
            return self.unet(z, t).sample
        finally:
            for hook in hooks:
                hook.remove()


# Ours beside it


def reddish(pictures: Tensor) -> Tensor:
    """What counts as a face: squares that are redder than the picture's mean, of colours as they are, unclipped."""
    coarse = adaptive_avg_pool2d(pictures[:, :1], 4)
    redder = coarse > coarse.mean((2, 3), keepdim=True)
    return redder.repeat_interleave(SIZE // 4, 2).repeat_interleave(SIZE // 4, 3)


@dataclass(frozen=True)
class Reddish:
    def mask(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        return reduce_mask(reddish(images), size, "bilinear>0")


@pytest.fixture
def fp64(monkeypatch) -> None:
    """All that would be in fp32 is in fp64: ours asks for fp32 by name."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    monkeypatch.setattr(LatentDiffusion, "_dtype", torch.float64)


@pytest.fixture
def ldm(fp64, tmp_path) -> tuple[LatentDiffusion, VQModel, UNet2DModel]:
    """Ours, and the components of the reference, from one folder. Codes and pictures are as widely spread as the latents are."""
    folder = save_tiny_ldm(tmp_path / "ldm")
    torch.manual_seed(3)
    vq = VQModel.from_pretrained(folder / "vqvae")
    with torch.no_grad():
        vq.quantize.embedding.weight.normal_(std=0.5)
        vq.decoder.conv_out.weight.mul_(3)
    vq.save_pretrained(folder / "vqvae")
    ours = LatentDiffusion(str(folder), noise=LDM_NOISE)
    ours.autoencoder.double()
    vq, unet = (
        kind.from_pretrained(folder / part).double() for kind, part in ((VQModel, "vqvae"), (UNet2DModel, "unet"))
    )
    return ours, vq.requires_grad_(False), unet.requires_grad_(False)


@pytest.fixture
def pictures(fp64) -> Tensor:
    return torch.stack([from_pil(smooth_picture(seed, SIZE)) for seed in range(2)])


def signs_of(keys: list[MasterKey], headers: tuple[bytes, ...]) -> Tensor:
    contexts = [Header.unpack(header).context for header in headers]
    return torch.stack([signs(key, context, (3, 16, 16)) for key, context in zip(keys, contexts, strict=True)]).double()


def compared(ours: SignFlip, reference: Reference, pictures: Tensor) -> None:
    """Anonymized pictures, and what comes back of the floats with right and wrong keys and of a JPEG."""
    published = ours.anonymize(pictures, KEYS, IDS)
    k, mask = signs_of(KEYS, published.headers), touched(reddish(pictures), 16)
    anonymized = reference.flipped(pictures, k, mask, reddish)
    assert published.floats.dtype == torch.float64
    torch.testing.assert_close(published.floats, anonymized, **EXACT)
    parsed = touched(reddish(anonymized), 16)
    assert 0.1 < parsed.double().mean() < 0.9
    assert not torch.equal(parsed, mask)  # what the receiver parses is another mask than the sender's
    assert anonymized.abs().max() > 1  # so that clipping would show

    def received(image: Tensor, keys: list[MasterKey]) -> Tensor:
        return reference.flipped(image, signs_of(keys, published.headers), parsed, reddish)

    near = [key.with_bit_flipped() for key in KEYS]
    damaged = torch.stack([jpeg(each, 75) for each in published.images]).double() / 127.5 - 1
    for attack, expected in (
        (FloatChannel("floats"), received(anonymized, KEYS)),
        (NearKey(channel="floats", mask="floats"), received(anonymized, near)),
        (Jpeg(75, "floats"), received(damaged, KEYS)),
    ):
        torch.testing.assert_close(attack(published, KEYS, ours), expected, **EXACT)
    wrong = WrongKey(channel="floats", mask="floats")(published, KEYS, ours)
    assert not torch.allclose(wrong, received(anonymized, KEYS), atol=1e-3)


def test_the_method_is_the_authors(ldm, pictures):
    ours, vq, unet = ldm
    compared(SignFlip(ours, DDIM(STEPS), Reddish()), Reference(vq, unet), pictures)


@pytest.mark.parametrize("inversion", [True, False])
def test_the_variant_with_a_control_network_is_the_authors(ldm, pictures, inversion, tmp_path):
    backbone, vq, unet = ldm
    torch.manual_seed(5)
    network = ControlNetwork(unet.config, 2)
    with torch.no_grad():
        for parameter in [*network.hint.parameters(), *network.skips.parameters(), *network.middle.parameters()]:
            parameter.add_(torch.randn_like(parameter) / 8)
    state = checkpoint(unet, network)
    copy = UNet2DModel.from_config(unet.config)
    theirs = {name.removeprefix("control_copy_unet."): value for name, value in state.items()}
    copy.load_state_dict({name: theirs[name] for name in copy.state_dict()})
    control = replace(control_of(Path(tmp_path, "controlnet_epoch_15.pth"), state), inversion=inversion)
    reference = Reference(vq, unet, copy.double().requires_grad_(False), state, inversion)
    compared(SignFlip(backbone, DDIM(STEPS), Reddish(), control=control), reference, pictures)


def test_the_face_s_cells_are_the_authors(tmp_path):
    """From unclipped pictures to a parser's classes to cells: 512 px, ImageNet's colours, 13 classes, bilinear, then > 0."""
    card = colour_parser(tmp_path / "colours.onnx")
    pictures = 2.5 * torch.stack([from_pil(smooth_picture(seed, 256)) for seed in range(4)])
    unit = pictures / 2 + 0.5
    large = interpolate(
        unit, (512, 512), mode="bilinear", align_corners=False
    )  # enlarged: with or without antialiasing
    seen = (large - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(
        3, 1, 1
    )
    session = onnxruntime.InferenceSession(tmp_path / "colours.onnx")
    classes = np.concatenate([session.run(None, {"input": each[None].numpy()})[0] for each in seen]).argmax(1)
    labels = torch.from_numpy(np.isin(classes, [CLASSES.index(name) for name in PAPER_CLASSES]))[:, None]
    parser = BiSeNetParser(looks_at="picture", card=card, weights=str(tmp_path / "colours.onnx"))
    for size in (64, 256):
        mask = parser.mask(pictures, (size, size))
        assert 0.1 < mask.double().mean() < 0.9
        assert torch.equal(mask, touched(labels, size))
    clipped = parser.mask(pictures.clamp(-1, 1), (64, 64))
    assert not torch.equal(clipped, parser.mask(pictures, (64, 64)))


def test_a_jpeg_is_what_another_library_makes():
    """The authors' torchvision has libjpeg's defaults, as Pillow and OpenCV have: quality's tables, 4:2:0."""
    cv2 = pytest.importorskip("cv2")
    picture = np.array(smooth_picture(0, 256))
    for quality in (100, 90, 75, 50):
        _, data = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
        ours = jpeg(torch.from_numpy(picture).permute(2, 0, 1), quality)
        assert np.array_equal(ours.permute(1, 2, 0).numpy(), cv2.imdecode(data, cv2.IMREAD_COLOR)[..., ::-1])
