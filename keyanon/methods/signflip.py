"""The paper's method: flip signs of the inverted noise inside the face (arXiv 2510.01031).

    z_0 = E(x),   z_0 .. z_T by DDIM inversion                                            (eq. 5)
    z'_T = M * (k * z_T) + (1 - M) * z_T,   k in {-1, +1}^d from the secret key            (eq. 3, 6)
    z'_0 by DDIM sampling, each step followed by z'_t := M * z'_t + (1 - M) * z_t          (eq. 4, 7)
    x' = D(z'_0), published as an 8-bit picture

Recovery is the same map on x', since k * k = 1. It is not exact: the inversion only approximates the sampler, the background's
trajectory of x' is not that of x, the mask is estimated anew, and the autoencoder and 8 bits lie in between.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from keyanon.channel.description import opened
from keyanon.channel.headers import Header, face_masks, seal
from keyanon.channel.keys import Nobody
from keyanon.channel.nonces import Nonces, contexts_of, nonce_for
from keyanon.channel.pixels import to_bytes, to_floats
from keyanon.context import Context
from keyanon.diffusion.controlnet import MaskControl
from keyanon.diffusion.model import LatentDiffusion
from keyanon.diffusion.solvers import Known, Solver
from keyanon.errors import BadSetting
from keyanon.finite import finite
from keyanon.methods.transforms import Involution, SignFlipping, Unchanged
from keyanon.settings import checked
from keyanon.types import About, Denoiser, FaceParser, Image, Key, Latent, Mask, Published, Transform


@checked
@dataclass(frozen=True)
class SignFlip:
    """The method as the authors' code runs it; every choice they made is an argument.

    Args:
        backbone, solver, parser: the diffusion model, the discretization (theirs: 50 DDIM steps), what finds the face. The
            parser holds the classes and how the mask reaches latent size.
        reinject: write the background's own inversion back at every step (eq. 7); without it only the noise outside the
            mask is kept.
        mask_at_recovery: "reparsed" looks for the face on the anonymized picture, as they do; "header" sends the mask along.
        quantize: snap the latent to the autoencoder's codebook before decoding, diffusers' default and theirs.
        control: shows the network the mask of the picture at hand, found by `parser` at pixel size; None shows it none.
        transform: of the noise inside the mask, under the key; one that is its own inverse.
        nonces: which pictures share a key stream.
        source: of the method, for the comparison's columns.
        authenticate: publish with a tag, and refuse to recover without a good one.
    """

    backbone: LatentDiffusion
    solver: Solver
    parser: FaceParser
    reinject: bool = True
    mask_at_recovery: Literal["reparsed", "header"] = "reparsed"
    quantize: bool = True
    control: MaskControl | None = None
    transform: Transform = field(default_factory=SignFlipping)
    nonces: Nonces = nonce_for
    source: str = "arXiv 2510.01031"
    authenticate: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.transform, Involution):
            names = ", ".join(kind.__name__ for kind in get_args(Involution))
            raise BadSetting(f"anonymizer.transform: {self.transform} is not its own inverse; take one of {names}")

    @property
    def about(self) -> About:
        return About("keyed", "8-bit file + header", 256, 256, "no licence given", self.backbone.licence, self.source)

    def wrong_size(self, size: int) -> str | None:
        """What a preflight says of a size, or of steps, that the model cannot take."""
        return self.backbone.wrong_size(size) or self.backbone.wrong_steps(self.solver)

    def anonymize(self, images: Image, keys: Sequence[Key], ids: Sequence[str]) -> Published:
        """Published pictures of `images` under one key each."""
        contexts = contexts_of(self, self.nonces, keys, ids, images)
        images = images.to(self.backbone.device)
        mask = self.parser.mask(images, self.backbone.latent_size(images))
        out = self.flip(images, mask, keys, contexts)
        kept = [m.cpu() if self.mask_at_recovery == "header" else None for m in mask]
        headers = [Header(each.nonce, m, description=each.description) for each, m in zip(contexts, kept, strict=True)]
        published = to_bytes(out).cpu()
        return Published(published, seal(headers, published, keys, self.authenticate), out.cpu())

    def recover(self, published: Published, keys: Sequence[Key]) -> Image:
        """Original faces from published files and their keys; raises BadHeader."""
        return self.receive(to_floats(published.images), opened(published, keys, self, self.authenticate), keys)

    def recover_floats(self, published: Published, keys: Sequence[Key], images: Image, seen: Image) -> Image:
        """The same from other pixels, such as the decoder's unrounded output; a mask that is parsed anew is that of `seen`."""
        return self.receive(images, opened(published, keys, self, self.authenticate), keys, seen)

    def receive(
        self, images: Image, headers: Sequence[Header], keys: Sequence[Key], seen: Image | None = None
    ) -> Image:
        """`seen`: what the face is looked for on, `images` if None. A hint is that of `images`, as theirs is."""
        if self.mask_at_recovery == "header":
            mask = face_masks(headers, self.backbone.latent_size(images))
        else:
            seen = images if seen is None else seen
            mask = self.parser.mask(seen.to(self.backbone.device), self.backbone.latent_size(seen))
        return self.flip(images, mask, keys, [header.context for header in headers]).cpu()

    def without_key(self, published: Published) -> Image:
        """Published pictures inverted and denoised with their noise as it is."""
        nobody = [Nobody()] * len(published.images)
        headers = opened(published, nobody, self, authenticate=False)
        return replace(self, transform=Unchanged()).receive(to_floats(published.images), headers, nobody)

    def flip(self, images: Image, mask: Mask, keys: Sequence[Key], contexts: Sequence[Context]) -> Image:
        """Eq. 3 to 7, the same in both directions: pictures in, unclipped pictures out."""
        up, down = self.denoisers(images)
        z0 = self.backbone.encode(images)
        trajectory = self.solver.invert(up, self.backbone.schedule, z0)
        mask = mask.to(z0.device)
        flipped, _ = self.transform.apply(trajectory[-1], mask, keys, contexts)
        known = Known(mask, trajectory) if self.reinject else None
        finite(flipped, "the keyed transform")
        return self.backbone.decode(self.solver.sample(down, self.backbone.schedule, flipped, known), self.quantize)

    def denoisers(self, images: Image) -> tuple[Denoiser, Denoiser]:
        """eps for inversion and for sampling."""
        if self.control is None:
            return self.backbone.eps, self.backbone.eps
        height, width = images.shape[-2:]
        return self.control.denoisers(self.backbone, self.parser.mask(images, (height, width)))

    def encoded_pictures(self, published: Published) -> Image:
        """The published pictures themselves."""
        return to_floats(published.images)

    def noise(self, images: Image, headers: Sequence[bytes]) -> tuple[Latent, Mask]:
        """z_T of pictures, published or not, and the face's cells as the parser sees them there."""
        known = self.background(images.to(self.backbone.device))
        return known.trajectory[-1].cpu(), known.mask.cpu()

    def redraw(self, images: Image, headers: Sequence[bytes], zT: Latent) -> Image:
        """The pictures that the sampler makes of `zT` inside the face of `images`."""
        images, zT = images.to(self.backbone.device), zT.to(self.backbone.device)
        known, (_, down) = self.background(images), self.denoisers(images)
        path = known if self.reinject else None
        return self.backbone.decode(self.solver.sample(down, self.backbone.schedule, zT, path), self.quantize).cpu()

    def undo(self, zT: Latent, mask: Mask, headers: Sequence[bytes], keys: Sequence[Key]) -> Latent:
        """z_T, if these are the right keys of z'_T."""
        unpacked = [Header.unpack(header) for header in headers]
        return self.transform.undo(zT, mask, keys, [header.context for header in unpacked], [b""] * len(headers))

    def background(self, images: Image) -> Known:
        """The face's cells and the pictures' own inversion, which is the background's way through the levels."""
        up, _ = self.denoisers(images)
        mask = self.parser.mask(images, self.backbone.latent_size(images)).to(images.device)
        return Known(mask, self.solver.invert(up, self.backbone.schedule, self.backbone.encode(images)))

    def reconstruct(self, images: Image) -> Image:
        """D(E(x)): what the autoencoder alone makes of the pictures."""
        return self.backbone.decode(self.backbone.encode(images), self.quantize).cpu()
