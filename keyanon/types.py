"""The vocabulary of the project on one screen: tensor aliases, and the Protocols that the parts of an experiment satisfy.

Everything hangs on a picture's id, never on its position in a batch: keys, nonces, files, rows.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, Protocol, TypeVar, runtime_checkable

from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from keyanon.errors import BadPicture as BadPicture
from keyanon.errors import UserError as UserError

Picture = Float[Tensor, "3 h w"]  # one RGB picture in [-1, 1]
Image = Float[Tensor, "b 3 h w"]  # RGB in [-1, 1]
PictureBytes = UInt8[Tensor, "3 h w"]  # one RGB picture as published: 0 .. 255
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
        measures: what the method takes down while publishing (`Published.measured`), by name, and what it means.
    """

    kind: Literal["control", "irreversible", "keyless", "keyed"]
    recovery_input: str
    key_bits: int | None
    effective_key_bits: int | None
    code_licence: str
    weights_licence: str
    source: str
    measures: Mapping[str, "Measure"] = field(default_factory=dict)

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


# What the names in a table mean. Whoever makes a view, a measure or a statistic says so; a table guesses nothing from a name.

Role = Literal["clean", "anonymized", "recovered", "attacked", "noise"]
Kind = Literal["picture", "identity", "detection", "cost", "noise", "attack"]
Direction = Literal["alike", "apart", "higher", "lower", "none"]
Part = TypeVar("Part")


@dataclass(frozen=True)
class View:
    """What a view shows.

    Args:
        role: its place in a table. On `clean` and `recovered` views likeness to the original is wanted, on others it is not.
        label: shown instead of the view's name; "" shows the name.
    """

    role: Role
    label: str = ""


@dataclass(frozen=True)
class Measure:
    """What a number of one picture means.

    Args:
        kind: `picture` (likeness of pictures), `identity` (likeness of persons), `detection` (is there a face), `cost` (time,
            bytes, tries), `noise` (of the inverted noise), or `attack` (what an attacker reaches).
        unit: "dB", "bytes", ...; "" for none.
        direction: `alike` or `apart` where higher means more or less like the original, which is good on some views and bad on
            others; `higher` or `lower` where that is better on every view; `none` where neither is.
        label: what it is, in words, for a table's legend.
    """

    kind: Kind
    unit: str = ""
    direction: Direction = "none"
    label: str = ""


@dataclass(frozen=True)
class Summary:
    """What a statistic tells of a measure's values.

    Args:
        label: shown instead of the statistic's name; "" shows the name.
        direction: as a measure's; None for that of the measure, as a mean has it.
    """

    label: str = ""
    direction: Direction | None = None


COSINE = Measure(
    "identity", "", "alike", "cosine similarity to the original"
)  # of every recognizer: `keyanon.runner.score`


def declares(meaning: View | Measure) -> Callable[[Part], Part]:
    """Say what a scorer or an attack means that is a function. One that is a class has an attribute `meaning` itself."""

    def declaring(part: Part) -> Part:
        part.meaning = meaning  # type: ignore[attr-defined]
        return part

    return declaring


def declared(part: object) -> object:
    """What a scorer or an attack says that it means, also through functools.partial; None where it says nothing."""
    return getattr(part.func if isinstance(part, partial) else part, "meaning", None)
