"""Recovery that is exact: the paper's keyed flip in a loop that can be inverted, from the published 8-bit file.

    M   the face's cells of the latent, in the public header;   P its pixels.  The file carries x untouched outside P
    b   = x outside P, a smooth fill inside P                         the same on both sides, since P is in the header
    w_i = a_i E(b)  (+ s_i n, n from the public nonce)                the known trajectory outside M, at every i

    anonymize:  z_0 = E(x);  z_T by the exact inverse of the sampler on M, along w;  z'_T = K z_T;  z'_0 by the sampler along w
                c from the jumps between D(z'_0) and x at the border, sent in the header  (keyanon/methods/seams.py)
                x' in {0 .. 255}^n with x' = x outside P and E(x' - c) = z'_0 on M        (keyanon/methods/refinement.py)
                what pixels lack of z'_0 sent along where the autoencoder asks for it     (keyanon/methods/residuals.py)
    recover:    z'_0 = E(x' - c);  z'_T by the exact inverse along w;  z_T = K^-1 z'_T;  z_0 by the sampler along w;  D(z_0) on P

Against arXiv 2510.01031 (eq. 3 to 7): there the background's trajectory comes from inverting the whole picture, which the
receiver's picture no longer is, so that no solver can invert their loop; the inversion is a first iterate; the face is looked
for anew; and the picture is rounded and clipped after the loop. Each of these can be had back by an argument.

Anonymizing ends by recovering from the very bytes it is about to publish. A picture that comes back worse than `floor` is made
again under a fresh nonce, and the best of `attempts` is published.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from keyanon.channel.description import opened
from keyanon.channel.headers import Header, face_masks, seal
from keyanon.channel.keys import KEY_BYTES, MasterKey, Nobody
from keyanon.channel.nonces import Nonces, contexts_of, nonce_for
from keyanon.channel.pixels import to_bytes, to_floats
from keyanon.channel.streams import normals
from keyanon.context import Context
from keyanon.diffusion.model import LatentDiffusion
from keyanon.diffusion.solvers import Known, Solver
from keyanon.finite import finite
from keyanon.measures.scorers import psnr_face
from keyanon.methods import residuals
from keyanon.methods.refinement import Refinement
from keyanon.methods.seams import Seam
from keyanon.methods.transforms import Unchanged
from keyanon.settings import Count, Factor, Positive, checked
from keyanon.types import About, FaceParser, Image, Key, Latent, Mask, Measure, Published, Transform

log = logging.getLogger(__name__)
MEASURES = {
    "verified_psnr": Measure("picture", "dB", "higher", "PSNR of what comes back to D(E(x)), as the sender found it"),
    "attempts": Measure("cost", "", "lower", "nonces tried"),
    "refined_psnr": Measure("picture", "dB", "higher", "PSNR of the refined picture to the unrefined one"),
}
FILL_POOLS = (
    2,
    4,
    8,
    16,
    32,
    64,
)  # pixels: the fill takes the mean over the smallest neighbourhood that holds background


@checked
@dataclass(frozen=True)
class Exact:
    """The keyed method with a loop that closes.

    Args:
        backbone, solver, parser: the diffusion model; a solver with a tolerance, for anything exact; what finds the face.
        transform: of the noise inside the face, under the key.
        background: the known trajectory, "scaled" (w_i = a_i E(b)) or "noised" (with noise from the public nonce, as the network
            saw it in training).
        refinement: of the published picture; None rounds and clips.
        seam: softens the face's border; None leaves the jumps.
        residual: step, in the latent's units, of what the pixels lack of the latent and the header carries; None sends none.
        floor: dB between what is recovered and D(E(x)), over P; a picture below it gets a fresh nonce. None verifies nothing.
        attempts: at most so many nonces.
        nonces: which pictures share a key stream.
        authenticate: publish with a tag, and refuse to recover without a good one.
    """

    backbone: LatentDiffusion
    solver: Solver
    parser: FaceParser
    transform: Transform
    refinement: Refinement | None
    seam: Seam | None = None
    residual: Positive | None = None
    background: Literal["scaled", "noised"] = "scaled"
    floor: Factor | None = 40.0
    attempts: Count = 3
    nonces: Nonces = nonce_for
    authenticate: bool = True
    senders: ClassVar = ("parser",)  # the mask is in the header

    @property
    def about(self) -> About:
        return About(
            "keyed",
            "8-bit file + header",
            256,
            256,
            "-",
            self.backbone.licence,
            "arXiv 2510.01031, and this project",
            MEASURES,
        )

    def wrong_size(self, size: int) -> str | None:
        """What a preflight says of a size, or of steps, that the model cannot take."""
        return self.backbone.wrong_size(size) or self.backbone.wrong_steps(self.solver)

    def anonymize(self, images: Image, keys: Sequence[Key], ids: Sequence[str]) -> Published:
        """Published pictures of `images`, which count as their nearest bytes.

        `measured` has for each picture the achieved dB ("verified_psnr"), the nonces tried ("attempts"), and the dB
        between the refined and the unrefined picture ("refined_psnr").
        """
        images = to_floats(to_bytes(images)).to(self.backbone.device)
        mask = self.parser.mask(images, self.backbone.latent_size(images)).to(images.device)
        best = self.publish(images, mask, keys, ids, attempt=0)
        for attempt in range(1, self.attempts if self.floor is not None else 1):
            again = [i for i, dB in enumerate(best.measured["verified_psnr"].tolist()) if dB < self.floor]
            if not again:
                break
            fresh = self.publish(images[again], mask[again], [keys[i] for i in again], [ids[i] for i in again], attempt)
            best = best_of_both(best, fresh, again)
        if self.floor is not None:
            for id, dB in zip(ids, best.measured["verified_psnr"].tolist(), strict=True):
                if dB < self.floor:
                    log.warning(
                        "%s: comes back at %.1f dB, below the floor of %.1f, after %d nonces",
                        id,
                        dB,
                        self.floor,
                        self.attempts,
                    )
        return best

    def publish(self, images: Image, mask: Mask, keys: Sequence[Key], ids: Sequence[str], attempt: int) -> Published:
        """One attempt: pictures, headers, and what was measured on them."""
        contexts = contexts_of(self, self.nonces, keys, ids, images, attempt)
        free = pixels(mask, images)
        known, z0 = self.known(images, mask, contexts), self.backbone.encode(images)
        target, sent = self.turn(z0, known, keys, contexts)
        decoded = self.backbone.decode(target, quantize=False)
        jumps = self.seam.jumps(images, decoded, mask) if self.seam is not None else [b""] * len(ids)
        headers = [
            Header(each.nonce, m, code, jump, description=each.description)
            for each, m, code, jump in zip(contexts, mask.cpu(), sent, jumps, strict=True)
        ]
        added = self.added(headers, images)
        floats = torch.where(free, decoded + added, images)
        published, measured = to_bytes(floats), {}
        if self.refinement is not None:
            rounded, published = published, self.refinement(self.backbone, target, floats, added, free, mask)
            floats = torch.where(free, self.refinement.tone.compress(floats), images)
            everywhere = torch.ones_like(free)
            measured["refined_psnr"] = psnr_face(to_floats(published), to_floats(rounded), everywhere)
        if self.residual is not None:
            error = target - self.read(to_floats(published), headers)
            codes = residuals.coded(error, mask, self.residual)
            headers = [replace(header, residual=code) for header, code in zip(headers, codes, strict=True)]
        if self.floor is not None:
            back = self.receive(to_floats(published), headers, keys)
            ceiling = self.face(z0, images, mask)
            measured["verified_psnr"] = psnr_face(bytewise(back), bytewise(ceiling), free)
        measured["attempts"] = torch.full((len(ids),), attempt + 1.0)
        measured = {name: values.double().cpu() for name, values in measured.items()}
        sealed = seal(headers, published, keys, self.authenticate)
        return Published(published.cpu(), sealed, floats.cpu(), measured)

    def recover(self, published: Published, keys: Sequence[Key]) -> Image:
        """Original faces from published files and their keys; raises BadHeader."""
        return self.open(to_floats(published.images), published, keys)

    def recover_floats(self, published: Published, keys: Sequence[Key], images: Image, seen: Image) -> Image:
        """The same from other pixels, such as the decoder's output, which no refinement has touched; the mask is the header's."""
        return self.open(images, published, keys)

    def open(self, images: Image, published: Published, keys: Sequence[Key]) -> Image:
        headers = self.opened(published, keys, self.authenticate)
        return self.receive(images.to(self.backbone.device), headers, keys).cpu()

    def opened(self, published: Published, keys: Sequence[Key], authenticate: bool) -> list[Header]:
        """The headers of files of this method, as large as they were published."""
        headers = opened(published, keys, self, authenticate)
        face_masks(headers, self.backbone.latent_size(published.images))  # each is there, and fits
        return headers

    def without_key(self, published: Published) -> Image:
        """Published pictures inverted and denoised with their noise as it is."""
        nobody = [Nobody()] * len(published.images)
        headers = self.opened(published, nobody, authenticate=False)
        images = to_floats(published.images).to(self.backbone.device)
        return replace(self, transform=Unchanged()).receive(images, headers, nobody).cpu()

    def encoded_pictures(self, published: Published) -> Image:
        """Published pictures by the tone curve, with c taken off."""
        return self.received(to_floats(published.images), [Header.unpack(header) for header in published.headers])

    def noise(self, images: Image, headers: Sequence[bytes]) -> tuple[Latent, Mask]:
        """z'_T of `encoded_pictures` and the face's cells; of originals z_T, by one who has them and the headers of their files."""
        images = images.to(self.backbone.device)
        known, z0 = self.known_of_files(images, headers), self.backbone.encode(images)
        return self.solver.invert(self.backbone.eps, self.backbone.schedule, z0, known)[-1].cpu(), known.mask.cpu()

    def redraw(self, images: Image, headers: Sequence[bytes], zT: Latent) -> Image:
        """The pictures that the sampler makes of `zT` inside the face of `encoded_pictures`."""
        images, zT = images.to(self.backbone.device), zT.to(self.backbone.device)
        known = self.known_of_files(images, headers)
        z0 = self.solver.sample(self.backbone.eps, self.backbone.schedule, zT, known)
        return self.face(z0, images, known.mask).cpu()

    def undo(self, zT: Latent, mask: Mask, headers: Sequence[bytes], keys: Sequence[Key]) -> Latent:
        """z_T, if these are the right keys of z'_T."""
        unpacked = [Header.unpack(header) for header in headers]
        contexts, sent = [header.context for header in unpacked], [header.sent for header in unpacked]
        return self.transform.undo(zT, mask, keys, contexts, sent)

    def known_of_files(self, images: Image, headers: Sequence[bytes]) -> Known:
        """The face's cells and the background's way through the levels, of packed headers."""
        unpacked = [Header.unpack(header) for header in headers]
        return self.known(images, self.masks(unpacked, images), [header.context for header in unpacked])

    def reconstruct(self, images: Image) -> Image:
        """D(E(x)) on the face's pixels, the best that any recovery through this autoencoder can be."""
        images = images.to(self.backbone.device)
        mask = self.parser.mask(images, self.backbone.latent_size(images)).to(images.device)
        return self.face(self.backbone.encode(images), images, mask).cpu()

    def masks(self, headers: Sequence[Header], images: Image) -> Mask:
        """The cells of the face."""
        return face_masks(headers, self.backbone.latent_size(images)).to(images.device)

    def receive(self, images: Image, headers: Sequence[Header], keys: Sequence[Key]) -> Image:
        """What the holder of the keys makes of published pictures."""
        mask = self.masks(headers, images)
        known = self.known(images, mask, [header.context for header in headers])
        return self.face(self.turn_back(self.latents(images, headers), known, headers, keys), images, mask)

    def latents(self, images: Image, headers: Sequence[Header]) -> Latent:
        """z'_0 of published pictures, as their receiver knows it."""
        z0 = self.read(images, headers)
        if self.residual is None:
            return z0
        mask = self.masks(headers, images)
        return z0 + residuals.decoded([header.residual for header in headers], mask, z0, self.residual)

    def read(self, images: Image, headers: Sequence[Header]) -> Latent:
        """What their pixels encode to."""
        return self.backbone.encode(self.received(images, headers))

    def received(self, images: Image, headers: Sequence[Header]) -> Image:
        """Published pictures with what their bytes stand for on the face, and c taken off."""
        free = pixels(self.masks(headers, images), images)
        read = self.refinement.tone.expand(images) if self.refinement is not None else images
        return torch.where(free, read - self.added(headers, images), images)

    def added(self, headers: Sequence[Header], images: Image) -> Image:
        """c: what the receiver takes off the face's pixels."""
        if self.seam is None:
            return torch.zeros_like(images)
        return self.seam.membrane([header.seam for header in headers], self.masks(headers, images), images)

    def turn(
        self, z0: Latent, known: Known, keys: Sequence[Key], contexts: Sequence[Context]
    ) -> tuple[Latent, list[bytes]]:
        """z'_0, and what the transform sends along."""
        zT = self.solver.invert(self.backbone.eps, self.backbone.schedule, z0, known)[-1]
        turned, sent = self.transform.apply(zT, known.mask, keys, contexts)
        finite(turned, "the keyed transform")
        return self.solver.sample(self.backbone.eps, self.backbone.schedule, turned, known), sent

    def turn_back(self, z0: Latent, known: Known, headers: Sequence[Header], keys: Sequence[Key]) -> Latent:
        """z_0."""
        turned = self.solver.invert(self.backbone.eps, self.backbone.schedule, z0, known)[-1]
        contexts, sent = [header.context for header in headers], [header.sent for header in headers]
        zT = finite(self.transform.undo(turned, known.mask, keys, contexts, sent), "the keyed transform, undone")
        return self.solver.sample(self.backbone.eps, self.backbone.schedule, zT, known)

    def known(self, images: Image, mask: Mask, contexts: Sequence[Context]) -> Known:
        """w_0 .. w_N: all of it public."""
        z = self.backbone.encode(filled(images, pixels(mask, images)))
        levels = self.solver.levels(self.backbone.schedule)
        if self.background == "scaled":
            return Known(mask, Forward(z, None, levels))
        noise = torch.stack([public_noise(each, tuple(z.shape[1:])) for each in contexts]).to(z)
        return Known(mask, Forward(z, noise, levels))

    def face(self, z0: Latent, images: Image, mask: Mask) -> Image:
        """D(z_0) on the face's pixels, `images` elsewhere.

        A learned decoder also looks at the cells around the face, and they at the face's pixels: these cells are encoded
        once more with the decoded face in place.
        """
        free = pixels(mask, images)

        def decoded_in(surroundings: Image) -> Image:
            z = torch.where(mask, z0, self.backbone.encode(surroundings))
            return torch.where(free, self.backbone.decode(z, quantize=False), images)

        return decoded_in(decoded_in(filled(images, free)))


@dataclass(frozen=True)
class Forward:
    """The trajectory w_i = a_i z + s_i n, or a_i z without noise: each level is made when it is asked for, none is kept."""

    z: Latent
    noise: Latent | None
    levels: list[tuple[float, float]]

    def __len__(self) -> int:
        return len(self.levels)

    def __getitem__(self, level: int) -> Latent:
        a, s = self.levels[level]
        return a * self.z if self.noise is None else a * self.z + s * self.noise


def pixels(mask: Mask, images: Image) -> Mask:
    """The pixels (b 1 h w) of the mask's cells."""
    return interpolate(mask.float(), images.shape[-2:], mode="nearest-exact") > 0


def filled(images: Image, free: Mask) -> Image:
    """`images` with smooth surroundings on the free pixels, a function of the other pixels alone."""
    kept = (~free).to(images)
    known = images * kept
    out = known
    missing = free
    for size in FILL_POOLS:
        if size > images.shape[-1]:
            break
        weight = avg_pool2d(kept, size)
        mean = avg_pool2d(known, size) / weight.clamp(min=1e-12)
        here, there = (interpolate(part, images.shape[-2:], mode="nearest-exact") for part in (mean, weight))
        found = missing & (there > 0)
        out = torch.where(found, here, out)
        missing = missing & ~found
    return out


def public_noise(context: Context, shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers that anyone can compute from a header."""
    return normals(MasterKey(bytes(KEY_BYTES)), context, "background", shape)


def bytewise(images: Image) -> Image:
    return to_floats(to_bytes(images))


def best_of_both(best: Published, fresh: Published, again: Sequence[int]) -> Published:
    """`best` with those of its pictures `again` replaced that came back better in `fresh`."""
    images, floats, headers = best.images.clone(), best.floats, list(best.headers)
    assert floats is not None
    assert fresh.floats is not None
    floats, measured = floats.clone(), {name: values.clone() for name, values in best.measured.items()}
    for j, i in enumerate(again):
        measured["attempts"][i] = fresh.measured["attempts"][j]
        if fresh.measured["verified_psnr"][j] > measured["verified_psnr"][i]:
            images[i], floats[i], headers[i] = fresh.images[j], fresh.floats[j], fresh.headers[j]
            for name in measured.keys() - {"attempts"}:
                measured[name][i] = fresh.measured[name][j]
    return Published(images, tuple(headers), floats, measured)
