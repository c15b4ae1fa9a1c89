"""Files that appear whole or not at all. They are private unless it is said that they are to be published."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

PRIVATE, PUBLIC = 0o600, 0o666  # modes of new files, less what the user's umask takes away: 0644 with the usual one


def write_whole(path: Path, data: bytes, *, public: bool = False) -> None:
    """Write a file beside its place, then rename it: a reader, or a run that resumes, never sees half of it.

    Its owner alone can read it, unless it is `public`: most that a run keeps shows or names whom it was to hide. Of several that
    write one file at once, on any machines, each writes the whole, and the last one's stays.
    """
    # not longer than a name that may be as long as a file system allows
    partial = path.with_name(f"{uuid4().hex}.partial")
    try:
        with os.fdopen(
            os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, PUBLIC if public else PRIVATE), "wb"
        ) as file:
            file.write(data)
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
