"""The vocabulary of the project: tensor aliases, and the Protocols that the parts of an experiment satisfy.

Everything hangs on a picture's id, never on its position in a batch: keys, nonces, files, rows. Whatever a caller may ask of a part
is in a Protocol below; what a part can do besides its first one, it shows by meeting another.
"""

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeVar, runtime_checkable

from jaxtyping import Bool, Float, UInt8
from numpy.typing import ArrayLike
from torch import Tensor

from keyanon.context import Context
from keyanon.errors import BadPicture as BadPicture
from keyanon.errors import UserError as UserError
from keyanon.settings import Bits, checked

if TYPE_CHECKING:
    from keyanon.weights import Card

Picture = Float[Tensor, "3 h w"]  # one RGB picture in [-1, 1]
Image = Float[Tensor, "b 3 h w"]  # RGB in [-1, 1]
PictureBytes = UInt8[Tensor, "3 h w"]  # one RGB picture as published: 0 .. 255
Bytes = UInt8[Tensor, "b 3 h w"]  # RGB as published: 0 .. 255
Mask = Bool[Tensor, "b 1 _ _"]  # True on the face, at latent or at pixel size
Latent = Float[Tensor, "b c u v"]  # 3 x 64 x 64 for the 256 px latent diffusion models
Embeddings = Float[Tensor, "b d"]  # unit rows, but where asked for raw ones; a row of NaN where no face was found
Features = Float[Tensor, "b d"]  # what a network sees in pictures, at any scale
Scores = Float[Tensor, " b"]  # one number per picture, NaN where it cannot be measured
Place = tuple[str, str]  # of a number in a table: view and scorer
Denoiser = Callable[[Latent, int], Latent]  # eps(z, t): the noise in z at the integer timestep t
MAX_FILE = 2**28  # bytes of a picture's file: MAX_PIXELS of 24 bits as they are, and some
Secret = Literal["signs of cells", "signs of frequencies", "flips of cells", "order of cells", "rotation", "none"]


@dataclass(frozen=True)
class Published:
    """What an anonymizer gives to the public, one entry per picture: of these a receiver gets `images` and `headers`.

    `floats` is the decoder's unrounded, unclipped output. No file carries it: only the authors' float protocol reads it.
    `measured` are numbers the sender takes down while publishing, one per picture, by name: they become scores.
    """

    images: Bytes
    headers: tuple[bytes, ...]  # b"" where the method needs none
    floats: Image | None = None
    measured: Mapping[str, Scores] = field(default_factory=dict)


@dataclass(frozen=True)
class Observed:
    """What was taken down of a batch's pictures, by view and scorer: numbers and vectors, one for each picture.

    Both may be filled up beyond the pictures, as the batch is.
    """

    values: Mapping[Place, Scores] = field(default_factory=dict)
    vectors: Mapping[Place, Tensor] = field(default_factory=dict)


@checked
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
        publishes_faces: a control that leaves faces in clear on purpose: a run says so, and does not fail.
    """

    kind: Literal["control", "irreversible", "keyless", "keyed"]
    recovery_input: str
    key_bits: Bits | None
    effective_key_bits: Bits | None
    code_licence: str
    weights_licence: str
    source: str
    measures: Mapping[str, "Measure"] = field(default_factory=dict)
    publishes_faces: bool = False

    @staticmethod
    def irreversible(code_licence: str, weights_licence: str, source: str) -> "About":
        """Of a method without a key, whose pictures nobody recovers."""
        return About("irreversible", "-", None, None, code_licence, weights_licence, source)


# What goes in


@runtime_checkable
class Key(Protocol):
    """A secret that yields pseudorandom bytes, the same on every device, for a public context and a named purpose."""

    def stream(self, context: Context, purpose: str, size: int) -> bytes: ...


@dataclass(frozen=True)
class Source:
    """The bytes on disk that a picture is read from: a whole file, or `size` bytes of one that begin at `offset`."""

    path: Path
    offset: int = 0
    size: int | None = None

    def read(self) -> bytes:
        """The bytes; raises BadPicture where they cannot be had, or are more than any picture has, which are not read."""
        try:
            with self.path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size if self.size is None else self.size
                if size > MAX_FILE:
                    raise BadPicture(
                        f"{self.path}: it has {size:,} bytes, and at most {MAX_FILE:,} are read; make the picture smaller"
                    )
                file.seek(self.offset)
                return file.read(size)
        except OSError as error:
            raise BadPicture(f"{self.path}: not to be read ({error.strerror or error})") from error


@runtime_checkable
class Dataset(Protocol):
    """Pictures by id, in a committed order.

    `ids` are the pictures to anonymize, each once; `gallery` the clean enrolment pictures they are verified against (empty where
    the protocol has none), each as often as it counts; `identity` tells who is on a picture, None where the dataset does not say.
    """

    @property
    def ids(self) -> Sequence[str]: ...

    @property
    def gallery(self) -> Sequence[str]: ...

    def identity(self, id: str) -> str | None: ...

    def source(self, id: str) -> Source:
        """The bytes on disk that `load` reads, and nothing else of the disk; raises BadPicture where they are missing."""
        ...

    def load(self, id: str) -> Picture:
        """The picture at the dataset's size; raises BadPicture."""
        ...


@runtime_checkable
class Synthetic(Protocol):
    """A dataset that says whether nobody on its pictures is real."""

    @property
    def synthetic(self) -> bool: ...


@runtime_checkable
class Benchmark(Protocol):
    """A dataset that says whether its pictures are those of a benchmark, which anyone can have: they need no protection."""

    @property
    def is_benchmark(self) -> bool: ...


@runtime_checkable
class Repeats(Protocol):
    """A dataset whose pictures may count several times: each is anonymized once, but compared and averaged as often as listed."""

    @property
    def probes(self) -> Sequence[str]:
        """`ids`, each as often as it counts, in the order of the list."""
        ...


@runtime_checkable
class Noted(Protocol):
    """A dataset that knows what a reader of its numbers must be told: which edition it is, how its pictures count."""

    @property
    def notes(self) -> Sequence[str]: ...


@runtime_checkable
class ListsFolder(Protocol):
    """A dataset of what it finds in a folder, which tells what it passes over there."""

    @property
    def passed_over(self) -> Mapping[str, int]: ...


def is_synthetic(dataset: Dataset) -> bool:
    """Whether a dataset says that nobody on its pictures is real."""
    return isinstance(dataset, Synthetic) and dataset.synthetic


def is_benchmark(dataset: Dataset) -> bool:
    """Whether a dataset says that its pictures are a benchmark's."""
    return isinstance(dataset, Benchmark) and dataset.is_benchmark


def probes_of(dataset: Dataset) -> Sequence[str]:
    """A dataset's pictures, each as often as it counts."""
    return dataset.probes if isinstance(dataset, Repeats) else dataset.ids


def notes_of(dataset: Dataset) -> Sequence[str]:
    """What a dataset says that a reader must be told."""
    return dataset.notes if isinstance(dataset, Noted) else []


def passed_over(dataset: Dataset) -> Mapping[str, int]:
    """What a dataset tells that it passes over; nothing where it tells nothing."""
    return dataset.passed_over if isinstance(dataset, ListsFolder) else {}


@runtime_checkable
class FaceParser(Protocol):
    def mask(self, images: Image, size: tuple[int, int]) -> Mask:
        """True on the face at `size` (rows, columns), which may be the latent's; all False where there is no face."""
        ...


# Methods


@runtime_checkable
class Anonymizer(Protocol):
    @property
    def about(self) -> About: ...

    def anonymize(self, images: Image, keys: Sequence[Key], ids: Sequence[str]) -> Published: ...


@runtime_checkable
class Reversible(Anonymizer, Protocol):
    def recover(self, published: Published, keys: Sequence[Key]) -> Image:
        """The original faces from published files, their bytes and headers: no ids, no side information.

        Raises BadHeader.
        """
        ...


@runtime_checkable
class RecoversFloats(Protocol):
    """A reversible method that can also read what was never in a file, such as the sender's unrounded floats, as the authors do."""

    def recover_floats(self, published: Published, keys: Sequence[Key], images: Image, seen: Image) -> Image:
        """As `recover`, from `images` in the place of the file's pixels, whose tag is looked at all the same.

        A method that looks for the face anew looks for it on `seen`: the same pictures, by another way.
        """
        ...


@runtime_checkable
class RunsWithoutKey(Protocol):
    """A reversible method that gives something also to one who runs the receiver without any key, and says what."""

    def without_key(self, published: Published) -> Image: ...


@runtime_checkable
class Authenticates(Protocol):
    """A reversible method, a dataclass, that publishes a tag and refuses what does not fit it, if `authenticate` is True."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def authenticate(self) -> bool: ...


@runtime_checkable
class Verifies(Protocol):
    """A method, a dataclass, that recovers before it publishes and tries again below `floor` dB; None verifies nothing."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def floor(self) -> float | None: ...


@runtime_checkable
class Reconstructs(Protocol):
    """A method that sends pictures through an autoencoder, and can show what that alone does to them."""

    def reconstruct(self, images: Image) -> Image: ...


@runtime_checkable
class Transform(Protocol):
    """A keyed map of the noise inside the face, and its inverse.

    `secret` is what the key draws, and so what an attacker looks for.
    """

    @property
    def secret(self) -> Secret: ...

    def apply(
        self, zT: Latent, mask: Mask, keys: Sequence[Key], contexts: Sequence[Context]
    ) -> tuple[Latent, list[bytes]]:
        """The sender's: z'_T, and what the receiver needs to undo it (public, b"" for nothing)."""
        ...

    def undo(
        self, zT: Latent, mask: Mask, keys: Sequence[Key], contexts: Sequence[Context], sent: Sequence[bytes]
    ) -> Latent:
        """The receiver's: z_T."""
        ...


@runtime_checkable
class KeyedNoise(Reversible, Protocol):
    """A reversible method that keys the noise z_T of a diffusion model: what everyone who knows it computes from its files.

    Everyone knows model, sampler, parser, files and headers (Kerckhoffs). All but `undo` take no key. A dataclass, so that an
    attacker can take another parser.
    """

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def parser(self) -> FaceParser: ...

    @property
    def transform(self) -> Transform: ...

    def encoded_pictures(self, published: Published) -> Image:
        """The pictures that the receiver encodes, as the files' bytes and headers give them."""
        ...

    def noise(self, images: Image, headers: Sequence[bytes]) -> tuple[Latent, Mask]:
        """z'_T of `encoded_pictures` and the face's cells; of originals z_T, by one who has them and the headers of their files."""
        ...

    def redraw(self, images: Image, headers: Sequence[bytes], zT: Latent) -> Image:
        """The pictures that the sampler makes of `zT` inside the face of `encoded_pictures`."""
        ...

    def undo(self, zT: Latent, mask: Mask, headers: Sequence[bytes], keys: Sequence[Key]) -> Latent:
        """z_T, if these are the right keys of z'_T."""
        ...


# What a run asks of any part, however deep in its method


@runtime_checkable
class ReadsFiles(Protocol):
    """A part that reads more than the picture to treat it: pictures made before, a program of others."""

    def sources(self, id: str) -> "Sequence[Source]":
        """The files that decide what becomes of a picture besides its own, those of them that are there."""
        ...


@runtime_checkable
class NeedsFiles(Protocol):
    """A part that needs more than Python: weights, a program, pictures."""

    def missing(self) -> str | None:
        """What is not on this machine and how to get it, None where all is here; downloads nothing."""
        ...


@runtime_checkable
class Fetchable(NeedsFiles, Protocol):
    """A part whose files can be had by the network, but have no card: a diffusion model of a hub."""

    @property
    def source(self) -> str: ...

    @property
    def licence(self) -> str: ...

    def fetch(self) -> None:
        """Have the files on this machine; raises MissingWeights, WrongWeights."""
        ...


@runtime_checkable
class TakesSizes(Protocol):
    """A method or a model that takes pictures of some sizes alone."""

    def wrong_size(self, size: int) -> str | None:
        """Which sizes it can take, where it cannot take square pictures of `size` pixels a side; None where it can."""
        ...


@runtime_checkable
class NeedsWeights(Protocol):
    """A part that runs on weights with cards; its own comes first, then those of its parts."""

    def cards(self) -> "tuple[Card, ...]": ...


@runtime_checkable
class TakesWeights(NeedsWeights, Protocol):
    """A part whose own card's file may lie at a path of the user's; None looks where cards are kept."""

    @property
    def weights(self) -> str | None: ...


@runtime_checkable
class Model(Protocol):
    """A diffusion model: which weights it has, and how many pictures its network has seen at each timestep."""

    @property
    def sha256(self) -> str: ...

    @property
    def evaluations(self) -> Counter[int]: ...


# Measures and attacks


@runtime_checkable
class Recognizer(Protocol):
    def embed(self, images: Image) -> Embeddings: ...


@runtime_checkable
class Scorer(Protocol):
    def __call__(self, view: Image, original: Image, face: Mask) -> Scores:
        """One number per picture of `view`; `face` is the original's face mask at pixel size."""
        ...


@runtime_checkable
class SetScorer(Protocol):
    """A measure of two whole sets of pictures. What it looks at is kept for each picture, and compared when all are there."""

    def embed(self, images: Image) -> Features: ...

    def compare(self, view: ArrayLike, original: ArrayLike) -> tuple[float, int]:
        """Of the sets' features (n d), a row a picture in the dataset's order: the measure, and how many pictures it is of."""
        ...


@runtime_checkable
class Attack(Protocol):
    def __call__(self, published: Published, keys: Sequence[Key], method: Reversible) -> Image:
        """What an attacker, or a receiver over a bad channel, makes of published pictures: one more view."""
        ...


@runtime_checkable
class ReadsFloats(Protocol):
    """An attack that may read the sender's floats, which no file carries, and says whether it does."""

    @property
    def reads_floats(self) -> bool: ...


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
