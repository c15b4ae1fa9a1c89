"""Files that appear whole or not at all."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from uuid import uuid4


def write_whole(path: Path, data: bytes) -> None:
    """Write a file beside its place, then rename it: a reader, or a run that resumes, never sees half of it.

    Of several that write one file at once, on any machines, each writes the whole, and the last one's stays.
    """
    partial = path.with_name(
        f"{uuid4().hex}.partial"
    )  # not longer than a name that may be as long as a file system allows
    try:
        partial.write_bytes(data)
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def write_first(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file beside its place, and put it there if nothing is.

    Of several that do so at once, one's is everybody's.
    """
    drawn = path.with_name(f"{uuid4().hex}.partial")
    try:
        write(drawn)
        with suppress(FileExistsError):
            path.hardlink_to(drawn)  # whole, and only if nobody was first
    finally:
        drawn.unlink(missing_ok=True)
