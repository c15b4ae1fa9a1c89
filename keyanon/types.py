"""The vocabulary of the project on one screen: tensor aliases, and the Protocols that the parts of an experiment satisfy.

Everything hangs on a picture's id, never on its position in a batch: keys, nonces, files, rows.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from keyanon.errors import BadPicture as BadPicture
from keyanon.errors import UserError as UserError

Picture = Float[Tensor, "3 h w"]  # one RGB picture in [-1, 1]
Image = Float[Tensor, "b 3 h w"]  # RGB in [-1, 1]
Bytes = UInt8[Tensor, "b 3 h w"]  # RGB as published: 0 .. 255
Mask = Bool[Tensor, "b 1 u v"]  # True on the face, at latent or at pixel size
Latent = Float[Tensor, "b c u v"]  # 3 x 64 x 64 for the 256 px latent diffusion models
Embeddings = Float[Tensor, "b d"]  # unit rows; a row of NaN where no face was found
Scores = Float[Tensor, " b"]  # one number per picture, NaN where it cannot be measured
Denoiser = Callable[[Latent, int], Latent]  # eps(z, t): the noise in z at the integer timestep t


@dataclass(frozen=True)
class Published:
    """What an anonymizer gives to the public, one entry per picture.

    `floats` is the decoder's unrounded, unclipped output. No file carries it: only the authors' float protocol reads it.
    `measured` are numbers the sender takes down while publishing, one per picture, by name: they become scores.
    """

    images: Bytes
    headers: tuple[bytes, ...]  # b"" where the method needs none
    floats: Image | None = None
    measured: Mapping[str, Scores] = field(default_factory=dict)


@dataclass(frozen=True)
class About:
    """What a method needs and gives, for the columns of a comparison.

    Args:
        kind: `control` (no anonymization to speak of, or no face left), `irreversible`, `keyless` (everyone recovers who has the
            method: what it takes is hidden in the picture, and no key locks it), or `keyed` (recovers with a key).
        recovery_input: what recovery reads besides the key: "-" where there is none, else "8-bit file", "8-bit file + header", ...
        key_bits: nominal length of the secret, None without one.
        effective_key_bits: what a search has to go through at most; less than nominal where keys are drawn from a small seed.
        code_licence: of the authors' code; what stands here is always our own.
        weights_licence: of what it runs on; "-" for no weights.
        source: paper or repository.
    """

    kind: Literal["control", "irreversible", "keyless", "keyed"]
    recovery_input: str
    key_bits: int | None
    effective_key_bits: int | None
    code_licence: str
    weights_licence: str
    source: str

    @staticmethod
    def irreversible(code_licence: str, weights_licence: str, source: str) -> "About":
        """Of a method without a key, whose pictures nobody recovers."""
        return About("irreversible", "-", None, None, code_licence, weights_licence, source)


@runtime_checkable
class Key(Protocol):
    """A secret that yields pseudorandom bytes, the same on every device, for a public nonce and a named purpose."""

    def stream(self, nonce: bytes, purpose: str, size: int) -> bytes: ...


@runtime_checkable
class Dataset(Protocol):
    """Pictures by id, in a committed order.

    `ids` are the pictures to anonymize; `gallery` the clean enrolment pictures they are verified against (empty where the
    protocol has none); `identity` tells who is on a picture, None where the dataset does not say.
    """

    @property
    def ids(self) -> Sequence[str]: ...

    @property
    def gallery(self) -> Sequence[str]: ...

    def identity(self, id: str) -> str | None: ...

    def load(self, id: str) -> Picture:
        """The picture at the dataset's size; raises BadPicture."""
        ...


@runtime_checkable
class FaceParser(Protocol):
    def mask(self, images: Image, size: tuple[int, int]) -> Mask:
        """True on the face at `size` (rows, columns), which may be the latent's; all False where there is no face."""
        ...


@runtime_checkable
class Anonymizer(Protocol):
    @property
    def about(self) -> About: ...

    def anonymize(self, images: Image, keys: Sequence[Key], ids: Sequence[str]) -> Published: ...


@runtime_checkable
class Reversible(Anonymizer, Protocol):
    def recover(self, images: Image, headers: Sequence[bytes], keys: Sequence[Key]) -> Image:
        """The original faces from published pictures as a receiver reads them: no ids, no side information."""
        ...


@runtime_checkable
class RunsWithoutKey(Protocol):
    """A reversible method that gives something also to one who runs the receiver without any key, and says what."""

    def without_key(self, images: Image, headers: Sequence[bytes]) -> Image: ...


@runtime_checkable
class Reconstructs(Protocol):
    """A method that sends pictures through an autoencoder, and can show what that alone does to them."""

    def reconstruct(self, images: Image) -> Image: ...


@runtime_checkable
class Recognizer(Protocol):
    def embed(self, images: Image) -> Embeddings: ...


class Scorer(Protocol):
    def __call__(self, view: Image, original: Image, face: Mask) -> Scores:
        """One number per picture of `view`; `face` is the original's face mask at pixel size."""
        ...


class Attack(Protocol):
    def __call__(self, published: Published, keys: Sequence[Key], method: Reversible) -> Image:
        """What an attacker, or a receiver over a bad channel, makes of published pictures: one more view."""
        ...
