"""Names made of what a user typed: of tables, rows and folders. Different ones stay different, and safe where they are used."""

import re
from collections.abc import Sequence
from hashlib import sha256

from keyanon.errors import BadSetting

PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=,@+-]*")
LONGEST = 100  # characters: a file system takes 255 bytes, and signatures and suffixes come behind
SHARED = {"contents", "embeddings", "log", "names", "originals"}  # folders of all experiments, beside those of each


def file_name(text: str) -> str:
    """A name for a file or folder: the text itself where it is short and plain, else what is plain of it and a hash of the whole.

    Different texts have different names: a plain text has no `~`.
    """
    if PLAIN.fullmatch(text) and len(text) <= LONGEST:
        return text
    digest = sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    plain = re.sub(r"[^A-Za-z0-9._=,@+-]+", "_", text).lstrip(".-")
    return f"{plain[: LONGEST - 13]}~{digest}"


def row_label(method: str, overrides: Sequence[str] = ()) -> str:
    """A row of a table: the method, and what tells it from others of its sweep. One line; different rows differ."""
    return ",".join([method, *map(printable, overrides)])


def printable(text: str) -> str:
    """The text with what cannot be printed, and the backslash, written as Python's escapes."""
    return "".join(c if c.isprintable() and c != "\\" else c.encode("unicode_escape").decode() for c in text)


def check_table_name(name: object) -> None:
    """Refuse a name= that is no name of a file, or that of a folder which all experiments share; raises BadSetting."""
    if not (isinstance(name, str | int | float) and PLAIN.fullmatch(str(name)) and len(str(name)) <= LONGEST):
        raise BadSetting(
            f"name={name}: it names files and a folder; take at most {LONGEST} letters, digits and ._=,@+-, a letter or digit first"
        )
    if str(name) in SHARED:
        raise BadSetting(f"name={name}: the folder of this name is shared by all experiments; take another name")
