"""Files that appear whole or not at all."""

from pathlib import Path
from uuid import uuid4


def write_whole(path: Path, data: bytes) -> None:
    """Write a file beside its place, then rename it: a reader, or a run that resumes, never sees half of it.

    Of several that write one file at once, on any machines, each writes the whole, and the last one's stays.
    """
    partial = path.with_name(f"{path.name}.{uuid4().hex[:8]}.partial")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
