"""PRO-Face S: an invertible network hides a picture, under a key, in a blurred copy of itself.

    c = W obfuscate(x),  s = W x,  k = W key          W: orthonormal Haar transform; key: one secret sign per pixel
    (y, z) = f(c, s; k)                               x' = W^T y is published, z thrown away
    (., s') = f^-1(y, (k, k, k); k)                   W^T s' is what recovery gives

f is three blocks of four dense subnets each, 1,073,040 parameters:

    y1 = e(psi(x2, k)) x1 + phi(x2, k),   y2 = e(rho(y1, k)) x2 + eta(y1, k),   e(s) = exp(2 tanh(s / 2))

Recovery is exact only where z = (k, k, k): training brings z near it. The whole picture is processed, whatever is face in it; it is
meant for face crops. Written anew from a description of https://github.com/lixionga/ProFace, folder `FacePrivacy/PRO-Face S`
(commit 791e815), which has no licence; the authors' weights were not to be had. Ours are trained by
experiments/train_proface_s.py, and differ from theirs in the size (128 pixels), the obfuscations (no face swaps), the data, the
length of training and the perceptual loss, which is 1 - SSIM, where theirs is a pretrained network's.
"""

import functools
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float, Int8
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import leaky_relu, pixel_shuffle, pixel_unshuffle

from keyanon.batching import CHUNK, in_chunks
from keyanon.channel.description import opened
from keyanon.channel.headers import Header, seal
from keyanon.channel.nonces import Nonces, contexts_of, nonce_for
from keyanon.channel.pixels import to_bytes, to_floats
from keyanon.channel.streams import signs
from keyanon.context import Context
from keyanon.errors import BadSetting
from keyanon.finite import finite
from keyanon.measures.scorers import psnr, ssim
from keyanon.methods.baselines.classical import Filter
from keyanon.settings import Count, Device, checked, whole
from keyanon.types import About, Image, Key, Measure, Published
from keyanon.weights import Card, named, resolve

Bands = Float[Tensor, "b _ u v"]  # Haar bands of a picture, four for each channel, half its height and width
Signs = Float[Tensor, "b 1 h w"]  # -1 or +1
TRAINED = 128  # pixels a side, of the pictures ours were trained on
COLOUR, KEY = 12, 4  # bands of a picture, of a key
AUTHORS_SALT, AUTHORS_ITERATIONS = b"\x01", 10
PASSWORD_BYTES = 32
MEASURES = {
    "obfuscated_psnr": Measure("picture", "dB", "higher", "PSNR of the published picture to the mere obfuscation"),
    "obfuscated_ssim": Measure("picture", "", "higher", "SSIM of the published picture to the mere obfuscation"),
}
HAAR = torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2  # its own inverse


@checked
@dataclass(frozen=True)
class ProFaceS:
    """The method with a classical obfuscation; every picture needs an even height and width.

    Args:
        obfuscator: what the published picture shall look like; it gets the whole picture, and the receiver needs nothing of it.
        card: the network: the name of a card of keyanon/cards.yaml, or a Card of your own. `weights` is a path to its file.
        kdf: "hkdf" draws each picture's signs from the key and a public nonce (keyanon/channel/keys.py). "authors"
            is their setting:
            PBKDF2-HMAC-SHA512, 10 iterations, the same constant salt for all, and so the same signs for all pictures of a key.
            Who knows one recovers all others, and a guess at a password costs 10 hashes (in their test it is the number 0).
            How they turn salt and password to bytes is not known; here the password is 32 bytes of the key's stream.
        nonces: which pictures share their signs, under "hkdf".
        authenticate: publish with a tag, and refuse to recover without a good one.
        chunk: pictures at a time on a CPU.
    """

    obfuscator: Filter
    card: str | Card = "proface_s"
    weights: str | None = None
    kdf: Literal["hkdf", "authors"] = "hkdf"
    nonces: Nonces = nonce_for
    authenticate: bool = True
    device: Device = "cpu"
    chunk: Count = CHUNK
    senders: ClassVar = ("obfuscator",)

    def anonymize(self, images: Image, keys: Sequence[Key], ids: Sequence[str]) -> Published:
        """Published pictures of `images` under one key each; `measured` is how like the mere obfuscation they are."""
        _check_even(images)
        contexts = contexts_of(self, self.nonces, keys, ids, images)
        everywhere = torch.ones_like(images[:, :1], dtype=torch.bool)
        covers = self.obfuscator(images, everywhere)
        hidden = torch.cat([covers, images, self.signs(keys, contexts, images)], 1).to(self.device)
        floats = finite(in_chunks(self._hide, hidden, chunk=self.chunk), "the hiding network")
        floats, published = floats.cpu(), to_bytes(floats).cpu()
        headers = [Header(each.nonce, description=each.description) for each in contexts]
        sealed = seal(headers, published, keys, self.authenticate)
        view, covers, everywhere = to_floats(published), covers.cpu(), everywhere.cpu()
        measured = {
            "obfuscated_psnr": psnr(view, covers, everywhere),
            "obfuscated_ssim": ssim(view, covers, everywhere),
        }
        return Published(published, sealed, floats, measured)

    def wrong_size(self, size: int) -> str | None:
        """What a preflight says of a size that the network cannot take."""
        return odd(f"{size}x{size}") if size % 2 else None

    def recover(self, published: Published, keys: Sequence[Key]) -> Image:
        """Original pictures from published files and their keys; raises BadHeader."""
        return self.receive(to_floats(published.images), published, keys)

    def recover_floats(self, published: Published, keys: Sequence[Key], images: Image, seen: Image) -> Image:
        """The same from other pixels, such as the network's unrounded output, of which the authors measure recovery."""
        return self.receive(images, published, keys)

    def receive(self, images: Image, published: Published, keys: Sequence[Key]) -> Image:
        _check_even(images)
        headers = opened(published, keys, self, self.authenticate)
        return self.reveal(images, self.signs(keys, [header.context for header in headers], images))

    def without_key(self, published: Published) -> Image:
        """What the network reveals for zeros, the mean of all keys: the face between stripes."""
        images = to_floats(published.images)
        _check_even(images)
        return self.reveal(images, torch.zeros_like(images[:, :1]))

    def reveal(self, images: Image, signs: Signs) -> Image:
        out = in_chunks(self._reveal, torch.cat([images, signs], 1).to(self.device), chunk=self.chunk)
        return finite(out, "the revealing network").cpu()

    def signs(self, keys: Sequence[Key], contexts: Sequence[Context], images: Image) -> Signs:
        """One secret sign for each pixel."""
        draw = {"hkdf": signs, "authors": authors_signs}[self.kdf]
        shape = (1, *images.shape[-2:])
        return torch.stack([draw(key, each, shape) for key, each in zip(keys, contexts, strict=True)]).to(images)

    def _hide(self, pictures: Tensor) -> Image:
        covers, originals, key = pictures.split([3, 3, 1], 1)
        with torch.no_grad():
            return hide(self.network, covers, originals, key)

    def _reveal(self, pictures: Tensor) -> Image:
        published, key = pictures.split([3, 1], 1)
        with torch.no_grad():
            return reveal(self.network, published, key)

    @cached_property
    def network(self) -> "HidingNetwork":
        return _load(resolve(self.cards()[0], self.weights), self.device)

    def cards(self) -> tuple[Card, ...]:
        return (named(self.card),)

    @property
    def about(self) -> About:
        """The key as it enters the network has one bit per pixel; both ways to draw it start from a master key of 256 bits."""
        return About(
            kind="keyed",
            recovery_input="8-bit file + header",
            key_bits=TRAINED**2,
            effective_key_bits=256,
            code_licence="none stated",
            weights_licence=self.cards()[0].licence,
            source="https://github.com/lixionga/ProFace",
            measures=MEASURES,
        )


def hide(net: "HidingNetwork", covers: Image, originals: Image, key: Signs) -> Image:
    """Protected pictures, unclipped: like `covers`, with `originals` in them."""
    bands, _ = net(haar(covers), haar(originals), haar(key))
    return unhaar(bands)


def reveal(net: "HidingNetwork", published: Image, key: Signs) -> Image:
    """What `published` hides under this key, unclipped."""
    k = haar(key)
    _, bands = net.inverse(haar(published), k.repeat(1, COLOUR // KEY, 1, 1), k)
    return unhaar(bands)


@checked
class HidingNetwork(nn.Module):
    """f: the bands of cover and original (b 12 u v each) to those of the protected picture and z, for a key's (b 4 u v).

    It begins as the identity.
    """

    def __init__(self, blocks: Annotated[int, whole(1, 64)] = 3, growth: Annotated[int, whole(1, 1024)] = 32) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Coupling(growth) for _ in range(blocks)])

    def forward(self, cover: Bands, original: Bands, k: Bands) -> tuple[Bands, Bands]:
        for block in self.blocks:
            cover, original = block(cover, original, k)
        return cover, original

    def inverse(self, protected: Bands, z: Bands, k: Bands) -> tuple[Bands, Bands]:
        for block in reversed(self.blocks):
            assert isinstance(block, Coupling)
            protected, z = block.inverse(protected, z, k)
        return protected, z


class Coupling(nn.Module):
    """Two affine coupling layers, each half scaled and shifted by what the other half and the key say."""

    def __init__(self, growth: int) -> None:
        super().__init__()
        self.psi, self.phi, self.rho, self.eta = (DenseBlock(growth) for _ in range(4))

    def forward(self, x1: Bands, x2: Bands, k: Bands) -> tuple[Bands, Bands]:
        y1 = gain(self.psi(x2, k)) * x1 + self.phi(x2, k)
        return y1, gain(self.rho(y1, k)) * x2 + self.eta(y1, k)

    def inverse(self, y1: Bands, y2: Bands, k: Bands) -> tuple[Bands, Bands]:
        x2 = (y2 - self.eta(y1, k)) / gain(self.rho(y1, k))
        return (y1 - self.phi(x2, k)) / gain(self.psi(x2, k)), x2


class DenseBlock(nn.Module):
    """Five 3x3 convolutions, each of which sees the input and all earlier outputs; the last begins at zero."""

    def __init__(self, growth: int) -> None:
        super().__init__()
        widths = [COLOUR + KEY + growth * i for i in range(5)]
        self.grow = nn.ModuleList([nn.Conv2d(width, growth, 3, padding=1) for width in widths[:-1]])
        self.last = nn.Conv2d(widths[-1], COLOUR, 3, padding=1)
        with torch.no_grad():
            for parameter in self.last.parameters():
                parameter.zero_()

    def forward(self, x: Bands, k: Bands) -> Bands:
        x = torch.cat([x, k], 1)
        for conv in self.grow:
            x = torch.cat([x, leaky_relu(conv(x), 0.2)], 1)
        out: Bands = self.last(x)
        return out


def gain(s: Bands) -> Bands:
    """e(s), between e^-2 and e^2."""
    return torch.exp(2 * torch.tanh(s / 2))


def haar(images: Float[Tensor, "b c h w"]) -> Bands:
    """The orthonormal Haar transform: for each channel mean, horizontal, vertical and diagonal detail of each 2 x 2 pixels."""
    cells = pixel_unshuffle(images, 2).unflatten(1, (-1, 4))
    return torch.einsum("ij,bcjuv->bciuv", HAAR.to(cells), cells).flatten(1, 2)


def unhaar(bands: Bands) -> Float[Tensor, "b c h w"]:
    cells = bands.unflatten(1, (-1, 4))
    return pixel_shuffle(torch.einsum("ij,bcjuv->bciuv", HAAR.to(cells), cells).flatten(1, 2), 2)


def authors_signs(key: Key, context: Context, shape: tuple[int, ...]) -> Int8[Tensor, "..."]:
    """The same signs for all nonces: PBKDF2 as the authors set it."""
    everybody = Context(b"", None if context.description is None else b"")
    d = math.prod(shape)
    password = key.stream(everybody, "password", PASSWORD_BYTES)
    derived = hashlib.pbkdf2_hmac("sha512", password, AUTHORS_SALT, AUTHORS_ITERATIONS, -(-d // 8))
    bits = np.unpackbits(np.frombuffer(derived, np.uint8))[:d]
    return torch.from_numpy(2 * bits.astype(np.int8) - 1).view(shape)


@functools.cache
def _load(path: Path, device: str) -> HidingNetwork:
    net = HidingNetwork()
    net.load_state_dict(load_file(path))  # in half precision, to single
    return net.to(device).eval().requires_grad_(False)


def _check_even(images: Image) -> None:
    height, width = images.shape[-2:]
    if height % 2 or width % 2:
        raise BadSetting(odd(f"{width}x{height}"))


def odd(size: str) -> str:
    return f"PRO-Face S halves pictures: {size} pixels is odd; set an even dataset.size"
