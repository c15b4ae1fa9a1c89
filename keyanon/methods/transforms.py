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

A wrong key decrypts other norms. The code is a distribution function of log r, so random bits give norms as pictures have them
(the idea of honey encryption, Juels and Ristenpart, EUROCRYPT 2014):

    x = (log r - m) / s,    u = x / sqrt(4 + x^2),    code = floor(2^48 (1/2 + (3 u - u^3) / 4))
    back:  u = 2 sin(arcsin(2 (code + 1/2) / 2^48 - 1) / 3),    x = 2 u / sqrt(1 - u^2)

This is Student's t with 4 degrees of freedom. Its tails fall off as powers, so that norms far from all others keep their digits: r
is divided out but for a part of 2e-7 wherever it lies between e^-10 and e^10.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Bool
from scipy.fft import dct, idct
from torch import Tensor

from keyanon.channel.headers import BadHeader
from keyanon.channel.streams import ciphered, normals, orders, signs
from keyanon.context import Context
from keyanon.settings import Share, checked
from keyanon.types import Key, Latent, Mask, Secret

# log r over channels of inverted photographs: LOG_NORM plus LOG_NORM_SCALE times a number of Student's t, 4 degrees of freedom.
LOG_NORM, LOG_NORM_SCALE, MOST = 0.13, 0.10, 10.0  # of |log r|
CODE_BYTES = 6
SILENT_SCALE, SILENT_BYTES = 0.085, 3  # of header version 2, which took it for logistic


@checked
@dataclass(frozen=True)
class SignFlipping:
    """The paper's, its own inverse.

    Leaks |z|, cell for cell, whatever the key: for k is all that z' = k * z hides, and |k| = 1. So two files of one photograph,
    or a file and the photograph, are matched by their |z|; and with k reused one known pair gives k = sign(z z').
    """

    secret: ClassVar[Secret] = "signs of cells"

    def apply(
        self, zT: Latent, mask: Mask, keys: Sequence[Key], contexts: Sequence[Context]
    ) -> tuple[Latent, list[bytes]]:
        k = torch.stack([signs(key, context, tuple(zT.shape[1:])) for key, context in zip(keys, contexts, strict=True)])
        return torch.where(mask, k.to(zT) * zT, zT), [b""] * len(zT)

    def undo(
        self, zT: Latent, mask: Mask, keys: Sequence[Key], contexts: Sequence[Context], sent: Sequence[bytes]
    ) -> Latent:
        return self.apply(zT, mask, keys, contexts)[0]


@checked
@dataclass(frozen=True)
class NoiseFlipping:
    """DiffStega's noise flip: each number is negated with the chance `share`, by the key; its own inverse.

    Leaks |z| as the sign flip does, and with the share 0.05 of their code 19 signs of 20: without any key z' = z but for these.
    """

    share: Share = 0.05
    secret: ClassVar[Secret] = "flips of cells"

    def apply(
        self, zT: Latent, mask: Mask, keys: Sequence[Key], contexts: Sequence[Context]
    ) -> tuple[Latent, list[bytes]]:
        shape = tuple(zT.shape[1:])
        chosen = torch.stack([flips(key, each, shape, self.share) for key, each in zip(keys, contexts, strict=True)])
        return torch.where(mask & chosen.to(zT.device), -zT, zT), [b""] * len(zT)

    def undo(
        self, zT: Latent, mask: Mask, keys: Sequence[Key], contexts: Sequence[Context], sent: Sequence[bytes]
    ) -> Latent:
        return self.apply(zT, mask, keys, contexts)[0]


@checked
@dataclass(frozen=True)
class Unchanged:
    """No transform: all that one without a key can undo."""

    secret: ClassVar[Secret] = "none"

    def apply(
        self, zT: Latent, mask: Mask, keys: Sequence[Key], contexts: Sequence[Context]
    ) -> tuple[Latent, list[bytes]]:
        return zT, [b""] * len(zT)

    def undo(
        self, zT: Latent, mask: Mask, keys: Sequence[Key], contexts: Sequence[Context], sent: Sequence[bytes]
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

    def apply(
        self, zT: Latent, mask: Mask, keys: Sequence[Key], contexts: Sequence[Context]
    ) -> tuple[Latent, list[bytes]]:
        out = zT.clone()
        for z, cells, key, context in zip(out, mask[:, 0], keys, contexts, strict=True):
            face = z[:, cells]
            z[:, cells] = face.gather(1, orders(key, context, "permutation", *face.shape).to(z.device))
        return out, [b""] * len(zT)

    def undo(
        self, zT: Latent, mask: Mask, keys: Sequence[Key], contexts: Sequence[Context], sent: Sequence[bytes]
    ) -> Latent:
        out = zT.clone()
        for z, cells, key, context in zip(out, mask[:, 0], keys, contexts, strict=True):
            face = z[:, cells]
            z[:, cells] = face.scatter(1, orders(key, context, "permutation", *face.shape).to(z.device), face)
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

    def apply(
        self, zT: Latent, mask: Mask, keys: Sequence[Key], contexts: Sequence[Context]
    ) -> tuple[Latent, list[bytes]]:
        out = zT.clone()
        for z, cells, key, context in zip(out, mask[:, 0], keys, contexts, strict=True):
            face = z[:, cells].double().cpu().numpy()
            if face.size:
                flipped = signs(key, context, face.shape).numpy() * dct(face, norm="ortho")
                z[:, cells] = torch.from_numpy(idct(flipped, norm="ortho")).to(z)
        return out, [b""] * len(zT)

    def undo(
        self, zT: Latent, mask: Mask, keys: Sequence[Key], contexts: Sequence[Context], sent: Sequence[bytes]
    ) -> Latent:
        return self.apply(zT, mask, keys, contexts)[0]


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

    def apply(
        self, zT: Latent, mask: Mask, keys: Sequence[Key], contexts: Sequence[Context]
    ) -> tuple[Latent, list[bytes]]:
        out, sent = zT.clone(), []
        for z, cells, key, context in zip(out, mask[:, 0], keys, contexts, strict=True):
            face = z[:, cells].double().cpu()
            code = coded(face.square().mean(1).sqrt())
            turned = torch.einsum("cij,cj->ci", rotations(key, context, *face.shape), face / decoded(code)[:, None])
            z[:, cells] = turned.to(z)
            sent.append(ciphered(code, key, context, "norms"))
        return out, sent

    def undo(
        self, zT: Latent, mask: Mask, keys: Sequence[Key], contexts: Sequence[Context], sent: Sequence[bytes]
    ) -> Latent:
        """Raises BadHeader where what was sent does not fit the latent."""
        out = zT.clone()
        for z, cells, key, context, code in zip(out, mask[:, 0], keys, contexts, sent, strict=True):
            read, size = (decoded, CODE_BYTES) if context.description is not None else (silently_decoded, SILENT_BYTES)
            if len(code) != size * len(z):
                raise BadHeader(
                    f"the header carries {len(code)} bytes of norms, {size * len(z)} are expected: the file was published "
                    "with another model or method"
                )
            face = z[:, cells].double().cpu()
            back = torch.einsum("cji,cj->ci", rotations(key, context, *face.shape), face)
            z[:, cells] = (back * read(ciphered(code, key, context, "norms"))[:, None]).to(z)
        return out


def flips(key: Key, context: Context, shape: tuple[int, ...], share: float) -> Bool[Tensor, "c u v"]:
    """True with the chance `share`, to 2^-32."""
    words = np.frombuffer(key.stream(context, "noise flip", 4 * int(np.prod(shape))), "<u4")
    return torch.from_numpy(words < round(share * 2**32)).view(shape)


def rotations(key: Key, context: Context, channels: int, d: int) -> Tensor:
    """Independent orthogonal matrices (c d d), Haar-distributed under a uniform key (Mezzadri, Notices AMS 54(5), 2007)."""
    q, r = torch.linalg.qr(normals(key, context, "rotation", (channels, d, d)))
    haar: Tensor = q * r.diagonal(dim1=1, dim2=2).sign()[:, None, :]
    return haar


def coded(norms: Tensor) -> bytes:
    """The distribution function of log r in 48 bits a channel."""
    steps = 256**CODE_BYTES
    x = (norms.double().log().clamp(-MOST, MOST) - LOG_NORM) / LOG_NORM_SCALE
    u = x / (4 + x.square()).sqrt()
    codes = ((0.5 + (3 * u - u**3) / 4) * steps).long().clamp(0, steps - 1).tolist()
    return b"".join(code.to_bytes(CODE_BYTES, "little") for code in codes)


def decoded(code: bytes) -> Tensor:
    """Norms whose code this is; the sender divides by these too, so that nothing is lost by their rounding."""
    u = 2 * ((2 * shares(code, CODE_BYTES) - 1).asin() / 3).sin()
    logs = LOG_NORM + LOG_NORM_SCALE * 2 * u / (1 - u.square()).sqrt()
    norms: Tensor = logs.clamp(-MOST, MOST).exp()
    return norms


def silently_decoded(code: bytes) -> Tensor:
    """The same of header version 2."""
    norms: Tensor = (LOG_NORM + SILENT_SCALE * shares(code, SILENT_BYTES).logit()).exp()
    return norms


def shares(code: bytes, size: int) -> Tensor:
    """Whole numbers of `size` bytes as the middles of equal parts of [0, 1], in float64."""
    codes = [int.from_bytes(code[i : i + size], "little") for i in range(0, len(code), size)]
    middles: Tensor = (torch.tensor(codes, dtype=torch.float64) + 0.5) / 256**size
    return middles
