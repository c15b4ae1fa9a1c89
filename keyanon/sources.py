"""What a picture's file holds: the SHA-256 of its bytes, remembered as long as the file is untouched.

What is stored of a picture is stored under this digest, so that another picture of the same name never meets old results. A file is
read again when its inode, size or times differ from those it had when it was read, as git does.
"""

import hashlib
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import pyarrow as pa

from keyanon.errors import BadPicture
from keyanon.parts import read_parts, write_part
from keyanon.types import Source

DIGITS = 16  # hex digits of a digest that are kept
RACY = 2e9  # ns: a file written so shortly before it was read may be written again within one tick of the file system's clock
BLOCK = 2**20  # bytes read at once
DIGEST_SCHEMA = pa.schema([("stamp", pa.string()), ("sha256", pa.string())])


@dataclass(frozen=True)
class Digests:
    """Digests of pictures' files, kept in part files in `folder`, which any number of processes may share."""

    folder: Path
    _fresh: dict[str, str] = field(default_factory=dict, repr=False)

    def of(self, source: Source) -> str:
        """The digest of a picture's bytes, which are read if they may have changed; BadPicture where they cannot be."""
        stamp = stamp_of(source)
        if found := self._fresh.get(stamp) or self._known.get(stamp):
            return found
        digest, after = sha256(source), stamp_of(source)
        if stamp != after:
            raise BadPicture(f"{source.path} changed while it was read; start again when it is whole")
        if time.time_ns() - max(map(int, stamp.split(":")[2:4])) > RACY:
            with self._lock:
                self._fresh[stamp] = digest
        return digest

    def known(self, source: Source) -> str | None:
        """The digest if it is known without reading the file."""
        stamp = stamp_of(source)
        return self._fresh.get(stamp) or self._known.get(stamp)

    def keep(self) -> None:
        """Write down what is new."""
        with self._lock:  # other threads may be reading files
            self._known.update(self._fresh)
            rows = [{"stamp": stamp, "sha256": digest} for stamp, digest in self._fresh.items()]
            self._fresh.clear()
        write_part(self.folder, pa.Table.from_pylist(rows, DIGEST_SCHEMA))

    @cached_property
    def _lock(self) -> threading.Lock:
        return threading.Lock()

    @cached_property
    def _known(self) -> dict[str, str]:
        table = read_parts(self.folder, DIGEST_SCHEMA)
        return dict(zip(table["stamp"].to_pylist(), table["sha256"].to_pylist(), strict=True))


def stamp_of(source: Source) -> str:
    """What changes with a file's bytes, and which of them are meant: inode, size, times (ns), offset, number of bytes."""
    try:
        about = source.path.stat()
    except OSError as error:
        raise BadPicture(f"{source.path}: cannot be read ({error.strerror})") from error
    numbers = about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns, source.offset
    return ":".join(map(str, (*numbers, source.size)))


def sha256(source: Source) -> str:
    """The digest of the bytes on disk."""
    digest, left = hashlib.sha256(), source.size
    try:
        with source.path.open("rb") as file:
            file.seek(source.offset)
            while block := file.read(BLOCK if left is None else min(left, BLOCK)):
                digest.update(block)
                left = None if left is None else left - len(block)
    except OSError as error:
        raise BadPicture(f"{source.path}: cannot be read ({error.strerror})") from error
    return digest.hexdigest()[:DIGITS]


def combined(digests: Iterable[str]) -> str:
    """One digest of several."""
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()[:DIGITS]
