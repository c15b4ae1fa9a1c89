"""Keyed, invertible maps of the inverted noise inside the face.

    sign flip      z' = k * z,  k in {-1, +1}^d                                    arXiv 2510.01031, eq. 3: shows |z| to everyone
    noise flip     the same with k = -1 for a small share of the cells             arXiv 2407.10459: shows |z|, and most of z
    permutation    z'_c = P_c z_c,  P_c a random order of the channel's d cells of the face: shows the values of z_c, sorted
    DCT sign flip  z'_c = C^T (k_c * C z_c),  C the orthonormal DCT over the d cells:        shows |C z_c|
    band rotation  z'_c = Q_c z_c / r_c,  Q_c ~ Haar(O(d)),  r_c = |z_c| / sqrt(d),  for each channel c: shows nothing

All but the last keep the law N(0, I): given the key, they are orthogonal maps. The rotation gives the sphere of radius sqrt(d) in
place of it, which is N(0, I) but for the spread of its norm (1 / sqrt(2 d) of it). What tells them apart is the law of z' given a
z that is no such draw, as inverted photographs are none.

Given r_c, Q_c z_c is uniform on a sphere whatever z_c is: under a uniform key the rotated channels carry nothing of the face but
the r_c, and these travel encrypted. Divided by r_c the channels have the norm of the noise that the network was trained on;
inverted photographs have not, and flipped signs keep their uneven magnitudes. Channels of a block-DCT latent are frequency bands:
a rotation inside each does not carry an error of a weak band over into a strong one.

A wrong key decrypts other norms. The code is the distribution function of log r, so random bits give norms as pictures have them
 (the idea of honey encryption, Juels and Ristenpart, EUROCRYPT 2014).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Int64
from scipy.fft import dct, idct
from torch import Tensor

from keyanon.channel.headers import BadHeader
from keyanon.channel.streams import normals, signs
from keyanon.settings import Share, checked
from keyanon.types import Key, Latent, Mask, Secret

# log r is roughly logistic over channels of inverted photographs, with outliers at 5 deviations. 16 pictures each: mean 0.21 and
# deviation 0.18 on CelebA-HQ, 0.14 and 0.16 on UTKFace with faces128; 0.12 and 0.13 on CelebA-HQ with faces128_kl.
LOG_NORM, LOG_NORM_SCALE = 0.13, 0.085
CODE_BYTES = 3


@checked
@dataclass(frozen=True)
class SignFlipping:
    """The paper's, its own inverse.

    Leaks |z|, cell for cell, whatever the key: for k is all that z' = k * z hides, and |k| = 1. So two files of one photograph,
    or a file and the photograph, are matched by their |z|; and with k reused one known pair gives k = sign(z z').
    """

    secret: ClassVar[Secret] = "signs of cells"

    def apply(self, zT: Latent, mask: Mask, keys: Sequence[Key], nonces: Sequence[bytes]) -> tuple[Latent, list[bytes]]:
        k = torch.stack([signs(key, nonce, tuple(zT.shape[1:])) for key, nonce in zip(keys, nonces, strict=True)])
        return torch.where(mask, k.to(zT) * zT, zT), [b""] * len(zT)

    def undo(
        self, zT: Latent, mask: Mask, keys: Sequence[Key], nonces: Sequence[bytes], sent: Sequence[bytes]
    ) -> Latent:
        return self.apply(zT, mask, keys, nonces)[0]


@checked
@dataclass(frozen=True)
class NoiseFlipping:
    """DiffStega's noise flip: each number is negated with the chance `share`, by the key; its own inverse.

    Leaks |z| as the sign flip does, and with the share 0.05 of their code 19 signs of 20: without any key z' = z but for these.
    """

    share: Share = 0.05
    secret: ClassVar[Secret] = "flips of cells"

    def apply(self, zT: Latent, mask: Mask, keys: Sequence[Key], nonces: Sequence[bytes]) -> tuple[Latent, list[bytes]]:
        shape = tuple(zT.shape[1:])
        chosen = torch.stack([flips(key, nonce, shape, self.share) for key, nonce in zip(keys, nonces, strict=True)])
        return torch.where(mask & chosen.to(zT.device), -zT, zT), [b""] * len(zT)

    def undo(
        self, zT: Latent, mask: Mask, keys: Sequence[Key], nonces: Sequence[bytes], sent: Sequence[bytes]
    ) -> Latent:
        return self.apply(zT, mask, keys, nonces)[0]


@checked
@dataclass(frozen=True)
class Unchanged:
    """No transform: all that one without a key can undo."""

    secret: ClassVar[Secret] = "none"

    def apply(self, zT: Latent, mask: Mask, keys: Sequence[Key], nonces: Sequence[bytes]) -> tuple[Latent, list[bytes]]:
        return zT, [b""] * len(zT)

    def undo(
        self, zT: Latent, mask: Mask, keys: Sequence[Key], nonces: Sequence[bytes], sent: Sequence[bytes]
    ) -> Latent:
        return zT


@checked
@dataclass(frozen=True)
class Permutation:
    """The cells of the face in a keyed order, another one in each channel.

    Leaks the sorted values of each channel, whatever the key: an order is all that it hides. So norm, mean, kurtosis and every
    other symmetric function of z_c are seen, and two files of one photograph are matched by them. With the order reused one known
    pair gives it away where the values differ.
    """

    secret: ClassVar[Secret] = "order of cells"

    def apply(self, zT: Latent, mask: Mask, keys: Sequence[Key], nonces: Sequence[bytes]) -> tuple[Latent, list[bytes]]:
        out = zT.clone()
        for z, cells, key, nonce in zip(out, mask[:, 0], keys, nonces, strict=True):
            face = z[:, cells]
            z[:, cells] = face.gather(1, orders(key, nonce, *face.shape).to(z.device))
        return out, [b""] * len(zT)

    def undo(
        self, zT: Latent, mask: Mask, keys: Sequence[Key], nonces: Sequence[bytes], sent: Sequence[bytes]
    ) -> Latent:
        out = zT.clone()
        for z, cells, key, nonce in zip(out, mask[:, 0], keys, nonces, strict=True):
            face = z[:, cells]
            z[:, cells] = face.scatter(1, orders(key, nonce, *face.shape).to(z.device), face)
        return out


@checked
@dataclass(frozen=True)
class DctSignFlipping:
    """Signs of the orthonormal DCT (type II) of each channel's face, its cells taken row by row; its own inverse.

    Leaks |C z_c|, coefficient for coefficient, whatever the key, just as the flip of signs leaks |z|: two files of one photograph
    are matched by it, and with k reused one known pair gives k. In the cells themselves magnitudes are mixed, and an error of a
    weak coefficient stays in a weak coefficient.
    """

    secret: ClassVar[Secret] = "signs of frequencies"

    def apply(self, zT: Latent, mask: Mask, keys: Sequence[Key], nonces: Sequence[bytes]) -> tuple[Latent, list[bytes]]:
        out = zT.clone()
        for z, cells, key, nonce in zip(out, mask[:, 0], keys, nonces, strict=True):
            face = z[:, cells].double().cpu().numpy()
            if face.size:
                flipped = signs(key, nonce, face.shape).numpy() * dct(face, norm="ortho")
                z[:, cells] = torch.from_numpy(idct(flipped, norm="ortho")).to(z)
        return out, [b""] * len(zT)

    def undo(
        self, zT: Latent, mask: Mask, keys: Sequence[Key], nonces: Sequence[bytes], sent: Sequence[bytes]
    ) -> Latent:
        return self.apply(zT, mask, keys, nonces)[0]


Involution = SignFlipping | NoiseFlipping | DctSignFlipping | Unchanged  # their own inverses, which send nothing along


@checked
@dataclass(frozen=True)
class BandRotation:
    """A rotation of each channel's face, with its norm taken out and sent encrypted.

    Leaks nothing of the face: for z_c / |z_c| of any law, Q_c z_c / |z_c| with Haar Q_c is uniform on the sphere and independent
    of z_c (a Haar Q_c and Q_c R have one law, for every rotation R that takes one z_c to another). The key being pseudorandom
    and not uniform, this holds for all who cannot tell the key stream from random bytes. With Q_c reused, d known pairs of the
    same mask give it away by least squares.
    """

    secret: ClassVar[Secret] = "rotation"

    def apply(self, zT: Latent, mask: Mask, keys: Sequence[Key], nonces: Sequence[bytes]) -> tuple[Latent, list[bytes]]:
        out, sent = zT.clone(), []
        for z, cells, key, nonce in zip(out, mask[:, 0], keys, nonces, strict=True):
            face = z[:, cells].double().cpu()
            code = coded(face.square().mean(1).sqrt())
            turned = torch.einsum("cij,cj->ci", rotations(key, nonce, *face.shape), face / decoded(code)[:, None])
            z[:, cells] = turned.to(z)
            sent.append(ciphered(code, key, nonce))
        return out, sent

    def undo(
        self, zT: Latent, mask: Mask, keys: Sequence[Key], nonces: Sequence[bytes], sent: Sequence[bytes]
    ) -> Latent:
        """Raises BadHeader where what was sent does not fit the latent."""
        out = zT.clone()
        for z, cells, key, nonce, code in zip(out, mask[:, 0], keys, nonces, sent, strict=True):
            if len(code) != CODE_BYTES * len(z):
                raise BadHeader(
                    f"the header carries {len(code)} bytes of norms, {CODE_BYTES * len(z)} are expected: the file was published "
                    "with another model or method"
                )
            face = z[:, cells].double().cpu()
            back = torch.einsum("cji,cj->ci", rotations(key, nonce, *face.shape), face)
            z[:, cells] = (back * decoded(ciphered(code, key, nonce))[:, None]).to(z)
        return out


def flips(key: Key, nonce: bytes, shape: tuple[int, ...], share: float) -> Bool[Tensor, "c u v"]:
    """True with the chance `share`, to 2^-32."""
    words = np.frombuffer(key.stream(nonce, "noise flip", 4 * int(np.prod(shape))), "<u4")
    return torch.from_numpy(words < round(share * 2**32)).view(shape)


def orders(key: Key, nonce: bytes, channels: int, d: int) -> Int64[Tensor, "c d"]:
    """A random order of d cells for each channel: that of 64-bit words, two of which are equal with a chance below d^2 / 2^64."""
    words = np.frombuffer(key.stream(nonce, "permutation", 8 * channels * d), "<u8").reshape(channels, d)
    return torch.from_numpy(words.argsort(axis=1, kind="stable"))


def rotations(key: Key, nonce: bytes, channels: int, d: int) -> Tensor:
    """Independent orthogonal matrices (c d d), Haar-distributed under a uniform key (Mezzadri, Notices AMS 54(5), 2007)."""
    q, r = torch.linalg.qr(normals(key, nonce, "rotation", (channels, d, d)))
    haar: Tensor = q * r.diagonal(dim1=1, dim2=2).sign()[:, None, :]
    return haar


def coded(norms: Tensor) -> bytes:
    """The distribution function of log r in 24 bits a channel."""
    steps = 256**CODE_BYTES
    share = torch.sigmoid((norms.double().clamp(min=1e-9).log() - LOG_NORM) / LOG_NORM_SCALE)
    codes = (share * steps).long().clamp(0, steps - 1).tolist()
    return b"".join(code.to_bytes(CODE_BYTES, "little") for code in codes)


def decoded(code: bytes) -> Tensor:
    """Norms whose code this is; the sender divides by these too, so that nothing is lost by their rounding."""
    codes = [int.from_bytes(code[i : i + CODE_BYTES], "little") for i in range(0, len(code), CODE_BYTES)]
    share = (torch.tensor(codes, dtype=torch.float64) + 0.5) / 256**CODE_BYTES
    norms: Tensor = (LOG_NORM + LOG_NORM_SCALE * share.logit()).exp()
    return norms


def ciphered(code: bytes, key: Key, nonce: bytes) -> bytes:
    """Encrypts, and decrypts."""
    return bytes(a ^ b for a, b in zip(code, key.stream(nonce, "norms", len(code)), strict=True))
