"""Rows as Parquet part files, each named by the SHA-256 of its bytes: whole, never written twice, and checked when it is read.

Any number of processes may add parts to one folder at once.
"""

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from keyanon.channel.whole import write_whole
from keyanon.errors import UserError

DIGITS = 16  # hex digits of the digest in a part's name


class Damaged(UserError):
    """A stored file that is not what was written. Whoever stored it can make it again once it is removed."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.path = path

    def __str__(self) -> str:
        return f"{self.path} is damaged or lost: its bytes are not those that were written. Start again what wrote it"


def digest(data: bytes) -> str:
    """The SHA-256 by which stored bytes are known again."""
    return hashlib.sha256(data).hexdigest()


def write_part(folder: Path, table: pa.Table) -> None:
    """Write rows to a file named by their content: whole or not at all, and never twice under two names."""
    if table.num_rows == 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    data = buffer.getvalue()
    write_whole(folder / f"{digest(data)[:DIGITS]}.parquet", data)


def read_parts(folder: Path, schema: pa.Schema, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of all part files, by default with all columns of `schema`; Damaged where a file is not what its name says."""
    columns = columns or schema.names
    tables = [pa.schema([schema.field(name) for name in columns]).empty_table()]
    for path in sorted(folder.glob("*.parquet")):
        data = path.read_bytes()
        if digest(data)[:DIGITS] != path.stem:
            raise Damaged(path)
        try:
            # a part is small: threads only cost memory
            table = pq.ParquetFile(io.BytesIO(data)).read(columns=list(columns), use_threads=False)
            tables.append(table.select(list(columns)).cast(tables[0].schema))
        except (pa.ArrowException, OSError, KeyError, ValueError) as error:
            raise Damaged(path) from error
    return pa.concat_tables(tables)
