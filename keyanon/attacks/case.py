"""A method under attack: whose pictures are attacked, the files they are published in, and what an attacker takes down.

An attacker works in three steps. So pictures can be attacked a batch at a time, in shards, and by a run that was killed before:

    learn       what it needs to know before it looks at a victim, from pictures it has (kept, and shared by the shards)
    attack      a function that looks at a batch of victims, and takes down numbers and vectors of each picture
    conclude    from what was taken down of all victims to the numbers of a table
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from keyanon.channel.headers import Header
from keyanon.channel.pixels import to_floats
from keyanon.context import Context
from keyanon.measures.biometrics import Floats, Statistic, mean_statistic
from keyanon.methods.exact import pixels
from keyanon.types import (
    Bytes,
    Embeddings,
    Image,
    Key,
    KeyedNoise,
    Latent,
    Mask,
    Measure,
    Observed,
    Place,
    Published,
    Recognizer,
    Verifies,
)

ATTACK = Measure("attack")
Knowledge = dict[str, Tensor]


@dataclass(frozen=True)
class Found:
    """One number of the table, and the pictures' own values behind it where there are any."""

    view: str
    scorer: str
    statistic: Statistic
    values: Mapping[str, float] = field(default_factory=dict)
    measure: Measure = ATTACK  # of `scorer`, unless that is a recognizer's name


@dataclass(frozen=True)
class Pairs:
    """Scores (p n m) of n pictures, p times: with m files or photographs, or m values of one picture; NaN where there is none.

    `people` has a number for the person on each of the n pictures. Scores are those that a file of 32-bit floats holds.
    """

    view: str
    scorer: str
    people: NDArray[np.intp]
    scores: NDArray[np.float32]


@dataclass(frozen=True)
class Taken:
    """What was taken down of all pictures `ids`; both functions give one row for each, NaN where there is none."""

    ids: Sequence[str]
    values: Callable[[str, str], Floats]
    vectors: Callable[[str, str], Floats]


@dataclass(frozen=True)
class Files:
    """Published pictures, one key each, and what anyone computes from them.

    `encoded` are the pictures as the method encodes them, `zT` is z'_T, `mask` the face's cells.
    """

    published: Published
    keys: Sequence[Key]
    encoded: Image
    zT: Latent
    mask: Mask

    @property
    def images(self) -> Image:
        return to_floats(self.published.images)

    @property
    def headers(self) -> tuple[bytes, ...]:
        return self.published.headers

    @property
    def contexts(self) -> list[Context]:
        return [Header.unpack(header).context for header in self.headers]

    def face(self, images: Image) -> Mask:
        """The pixels (b 1 h w) of the face's cells."""
        return pixels(self.mask, images)


@dataclass(frozen=True)
class Victims:
    """A batch of pictures under attack, and their files under each key."""

    ids: Sequence[str]
    pictures: Image
    files: Sequence[Files]


@dataclass(frozen=True)
class People:
    """The pictures, who is on them, and how recognizers see them (rows by recognizer).

    `suspects` are the clean pictures by which each person is looked for: one of the gallery where people are `enrolled` in one,
    else the photograph itself.
    """

    ids: Sequence[str]
    names: Sequence[str]
    clean: Mapping[str, Floats]
    suspects: Mapping[str, Floats]
    gallery: Mapping[str, Floats]
    gallery_names: Sequence[str]
    thresholds: Mapping[str, float]
    enrolled: bool

    def other_suspects(self, name: str) -> Floats:
        """For each picture how the recognizer `name` sees the next one of somebody else; NaN where there is nobody else."""
        n, suspects = len(self.ids), self.suspects[name]
        after = [[j % n for j in range(i + 1, i + n) if self.names[j % n] != who] for i, who in enumerate(self.names)]
        return np.stack([suspects[places[0]] if places else np.full_like(suspects[0], np.nan) for places in after])

    def own(self, name: str, rows: Floats) -> Floats:
        """Cosines of pictures and their own suspects."""
        return np.asarray((rows * self.suspects[name]).sum(1))

    def of(self, ids: Sequence[str]) -> "People":
        """Of some of the pictures alone."""
        place = {id: i for i, id in enumerate(self.ids)}
        rows = [place[id] for id in ids]
        clean, suspects = ({name: seen[rows] for name, seen in by.items()} for by in (self.clean, self.suspects))
        return replace(self, ids=list(ids), names=[self.names[i] for i in rows], clean=clean, suspects=suspects)

    def averaged(self, view: str, scorer: str, values: Floats, measure: Measure = ATTACK) -> Found:
        """The mean of one number for each picture, with its interval over people."""
        numbers = [float(value) for value in values]
        statistic = mean_statistic(numbers, self.names)
        return Found(view, scorer, statistic, dict(zip(self.ids, numbers, strict=True)), measure)


@dataclass(frozen=True)
class Case:
    """A method under attack.

    Args:
        method: what published the files.
        recognizers: by name.
        people: who is on the pictures.
        victims: the pictures of some ids with their files, a batch at a time.
        public: ids of so many pictures of people who are not under attack; fewer where there are no more.
        photographs: the original pictures of some ids.
        far: false accept rate of the recognizers' thresholds.
    """

    method: KeyedNoise
    recognizers: Mapping[str, Recognizer]
    people: People
    victims: Callable[[Sequence[str]], Iterator[Victims]]
    public: Callable[[int], list[str]]
    photographs: Callable[[Sequence[str]], Bytes]
    far: float

    def embed(self, view: str, images: Image) -> dict[Place, Embeddings]:
        """How recognizers see pictures, in unit rows."""
        return {(view, name): normalize(recognizer.embed(images)) for name, recognizer in self.recognizers.items()}


@runtime_checkable
class Attacker(Protocol):
    def chosen(self, case: Case) -> Sequence[str]:
        """The ids of the pictures that it attacks; none where it has nothing to attack in this method."""
        ...

    def attack(self, case: Case, knowledge: Knowledge) -> Callable[[Victims], Observed]:
        """A function that takes down what it finds in a batch of victims."""
        ...

    def conclude(self, case: Case, taken: Taken) -> Iterator[Found | Pairs]:
        """The numbers of the table, or the pairs that they are made of, from what was taken down of all the chosen."""
        ...


@runtime_checkable
class Learns(Protocol):
    """An attacker that needs to know something first."""

    def learn(self, case: Case) -> Knowledge: ...


def publish(method: KeyedNoise, pictures: Image, keys: Sequence[Key], ids: Sequence[str]) -> Files:
    """The files of pictures, one key each."""
    out = method.anonymize(pictures, keys, ids)
    return read(method, Published(out.images, out.headers), keys)


def read(method: KeyedNoise, published: Published, keys: Sequence[Key]) -> Files:
    """What anyone computes from files."""
    encoded = method.encoded_pictures(published)
    return Files(published, keys, encoded, *method.noise(encoded, published.headers))


def without_verification(method: KeyedNoise) -> KeyedNoise:
    """The method as one runs it who publishes a picture under the first nonce, however badly it comes back."""
    return replace(method, floor=None) if isinstance(method, Verifies) else method


def joined(batches: Sequence[Files]) -> Files:
    """The files of several batches as one."""
    published = Published(
        torch.cat([files.published.images for files in batches]), tuple(h for files in batches for h in files.headers)
    )
    tensors = (torch.cat([getattr(files, name) for files in batches]) for name in ("encoded", "zT", "mask"))
    return Files(published, [key for files in batches for key in files.keys], *tensors)
