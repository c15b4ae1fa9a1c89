"""Keyed, invertible maps of the inverted noise inside the face.

    sign flip      z' = k * z,  k in {-1, +1}^d                                    arXiv 2510.01031, eq. 3: shows |z| to everyone
    band rotation  z'_c = Q_c z_c / r_c,  Q_c ~ Haar(O(d)),  r_c = |z_c| / sqrt(d),  for each channel c with its d cells of the face

Given r_c, Q_c z_c is uniform on a sphere whatever z_c is: under a uniform key the rotated channels carry nothing of the face but
the r_c, and these travel encrypted. Divided by r_c the channels have the norm of the noise that the network was trained on;
inverted photographs have not, and flipped signs keep their uneven magnitudes. Channels of a block-DCT latent are frequency bands:
a rotation inside each does not carry an error of a weak band over into a strong one.

A wrong key decrypts other norms. The code is the distribution function of log r, so random bits give norms as pictures have them
 (the idea of honey encryption, Juels and Ristenpart, EUROCRYPT 2014).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from keyanon.headers import BadHeader
from keyanon.keys import normals, signs
from keyanon.types import Key, Latent, Mask

# log r is roughly logistic over channels of inverted photographs, with outliers at 5 deviations. 16 pictures each: mean 0.21 and
# deviation 0.18 on CelebA-HQ, 0.14 and 0.16 on UTKFace with faces128; 0.12 and 0.13 on CelebA-HQ with faces128_kl.
LOG_NORM, LOG_NORM_SCALE = 0.13, 0.085
CODE_BYTES = 3


class Transform(Protocol):
    """`apply` at the sender gives the latents and what the receiver needs to `undo` it (public, b"" for nothing)."""

    def apply(
        self, zT: Latent, mask: Mask, keys: Sequence[Key], nonces: Sequence[bytes]
    ) -> tuple[Latent, list[bytes]]: ...

    def undo(
        self, zT: Latent, mask: Mask, keys: Sequence[Key], nonces: Sequence[bytes], sent: Sequence[bytes]
    ) -> Latent: ...


@dataclass(frozen=True)
class SignFlipping:
    """The paper's, its own inverse."""

    def apply(self, zT: Latent, mask: Mask, keys: Sequence[Key], nonces: Sequence[bytes]) -> tuple[Latent, list[bytes]]:
        k = torch.stack([signs(key, nonce, tuple(zT.shape[1:])) for key, nonce in zip(keys, nonces, strict=True)])
        return torch.where(mask, k.to(zT) * zT, zT), [b""] * len(zT)

    def undo(
        self, zT: Latent, mask: Mask, keys: Sequence[Key], nonces: Sequence[bytes], sent: Sequence[bytes]
    ) -> Latent:
        return self.apply(zT, mask, keys, nonces)[0]


@dataclass(frozen=True)
class BandRotation:
    """A rotation of each channel's face, with its norm taken out and sent encrypted."""

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
