"""Pictures under other names than their files have, which are often their owners': `dataset.rename=hash`.

    id   = K.stream(SHA-256(name), "name", 10 bytes), in hex
    K    = FOLDER/key, drawn at first need and readable by its owner alone: who guesses a name cannot check it without

FOLDER/HASH.csv says which id is which name, so that the owner finds a picture again. It belongs to no published folder.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal

from keyanon.channel.keys import BadKey, MasterKey, read_key, write_new_key
from keyanon.channel.whole import write_first, write_whole
from keyanon.context import Context
from keyanon.errors import BadPicture
from keyanon.settings import Name, Setting, checked
from keyanon.sheets import csv_text
from keyanon.types import Dataset, Picture, Source, is_benchmark, is_synthetic, notes_of, passed_over, probes_of

Kind = Annotated[
    Callable[..., Dataset], Setting("a class of datasets", lambda given: isinstance(given, partial | type))
]
ID_BYTES = 10  # among a million pictures two share an id with probability 4e-13


@checked
def opened(dataset: Kind, rename: Literal["hash"] | None, names: Name, **settings: Any) -> Dataset:
    """A dataset made with `settings`, under its own names or renamed; `names` is the private folder of key and names."""
    made = dataset(**settings)
    return made if rename is None else Renamed(made, Path(names))


@dataclass(frozen=True)
class Renamed:
    """A dataset whose ids tell nothing of its pictures' names. Order, people and pictures stay."""

    dataset: Dataset
    names: Path

    @cached_property
    def ids(self) -> Sequence[str]:
        return [self._ids[name] for name in self.dataset.ids]

    @cached_property
    def probes(self) -> Sequence[str]:
        return [self._ids[name] for name in probes_of(self.dataset)]

    @cached_property
    def gallery(self) -> Sequence[str]:
        return [self._ids[name] for name in self.dataset.gallery]

    def identity(self, id: str) -> str | None:
        return self.dataset.identity(self._names.get(id, id))

    def load(self, id: str) -> Picture:
        """Raises BadPicture, whose message tells the id in the place of the file."""
        picture: Picture = self._read(id, self.dataset.load)
        return picture

    def source(self, id: str) -> Source:
        """What the dataset says that a picture is read from; raises BadPicture as `load`."""
        source: Source = self._read(id, self.dataset.source)
        return source

    def _read(self, id: str, read: Callable[[str], Any]) -> Any:
        if id not in self._names:
            raise BadPicture(f"{id}: no picture has this id")
        try:
            return read(self._names[id])
        except BadPicture as error:
            reason = without_file(str(error), self._names[id])
            raise BadPicture(f"{id}: {reason}; {self.table} says which file it is") from None

    @property
    def notes(self) -> Sequence[str]:
        return notes_of(self.dataset)

    @property
    def passed_over(self) -> Mapping[str, int]:
        return passed_over(self.dataset)

    @property
    def synthetic(self) -> bool:
        return is_synthetic(self.dataset)

    @property
    def is_benchmark(self) -> bool:
        return is_benchmark(self.dataset)

    @cached_property
    def table(self) -> Path:
        """The file that says which id is which name: id,name."""
        rows = [(id, name) for name, id in sorted(self._ids.items())]
        data = csv_text(["id", "name"], rows).encode("utf-8", "surrogateescape")
        path = self.names / f"{sha256(data).hexdigest()[:12]}.csv"
        if not path.exists() or path.read_bytes() != data:
            write_whole(path, data)
        return path

    @cached_property
    def _ids(self) -> dict[str, str]:
        key = key_of(self.names)
        every = dict.fromkeys([*self.dataset.ids, *self.dataset.gallery])
        digests = {name: sha256(name.encode("utf-8", "surrogateescape")).digest() for name in every}
        return {name: key.stream(Context(digest), "name", ID_BYTES).hex() for name, digest in digests.items()}

    @cached_property
    def _names(self) -> dict[str, str]:
        return {id: name for name, id in self._ids.items()}


def without_file(message: str, name: str) -> str:
    """What is said of a file, less the places where its path stands."""
    left = re.sub(rf"[^'\"(:]*{re.escape(name)}\.\w+", "...", message).removeprefix("...: ")
    return "cannot be used" if name in left and len(name) > 2 else left


def key_of(folder: Path) -> MasterKey:
    """The folder's key, drawn if there is none; of several that draw one at once, one's is everybody's."""
    path = folder / "key"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        write_first(path, write_new_key)
    try:
        return read_key(path)
    except BadKey as error:
        remedy = f"put it back from a copy, or delete {folder}, and all pictures get new names"
        raise BadKey(f"{path}: the key of pictures' names cannot be read; {remedy} ({error})") from None
