"""What a published PNG may hold, looked at before anything is decoded (PNG specification 3, chapter 5).

    signature | IHDR | [PLTE] | IDAT ... IDAT | IEND,    with at most one kaNO after IHDR and not among the IDAT

The tag covers the pixels and the header. What else a PNG can say makes a viewer show other colours, other sizes or other frames of
the same pixels, and the tag would not notice. So there is nothing else: also no 16 bits, of which the tag covers 8, and no alpha.
"""

import struct
import zlib
from collections.abc import Iterator

from keyanon.channel.headers import MAX_BYTES

SIGNATURE = b"\x89PNG\r\n\x1a\n"
HEADER_CHUNK = b"kaNO"  # the capital O is the bit "not safe to copy"
MAX_CHUNKS = 2**16  # a file of MAX_PIXELS in the pieces of 8 KiB that libpng writes has less than half of that
MAX_PIXELS = 2**26  # 64 megapixels, of any picture that is read
ALLOWED = (b"IHDR", b"PLTE", b"IDAT", b"IEND", HEADER_CHUNK)
GREY, RGB, PALETTE = 0, 2, 3  # colour types
DEPTHS = {GREY: (1, 2, 4, 8), RGB: (8,), PALETTE: (1, 2, 4, 8)}
REMEDY = "take the file as it was published, before an editor or a web site wrote it anew"


def public_header(data: bytes) -> bytes:
    """The public header in the bytes of a published PNG, b"" where it has none; ValueError where it is not as it may be.

    Reads the list of chunks and their checksums, and decodes nothing.
    """
    names: list[bytes] = []
    header, colours = b"", GREY
    for name, body in chunks(data):
        if len(names) == MAX_CHUNKS:
            raise ValueError(f"it has more than {MAX_CHUNKS} chunks; {REMEDY}")
        if name not in ALLOWED:
            raise ValueError(
                f"it has the chunk {name.decode('latin-1')!r}, which can make a viewer show something else; published files hold "
                f"only {', '.join(known.decode() for known in ALLOWED)}; {REMEDY}"
            )
        if (name == b"IHDR") != (not names):
            raise ValueError(f"its first chunk, and no other, has to be IHDR; {REMEDY}")
        if name == b"IHDR":
            colours = colour_type(body)
        elif name == b"PLTE" and (colours != PALETTE or b"PLTE" in names or b"IDAT" in names):
            raise ValueError(f"it has a palette that no pixel of it needs, or two; {REMEDY}")
        elif name == b"IDAT" and b"IDAT" in names and names[-1] != b"IDAT":
            raise ValueError(f"its pixels (IDAT) are not in one piece; {REMEDY}")
        elif name == HEADER_CHUNK:
            if name in names:
                raise ValueError("it has 2 headers, and nothing tells which is the picture's")
            if len(body) > MAX_BYTES:
                raise ValueError(f"its header has {len(body)} bytes; it can have at most {MAX_BYTES}")
            header = bytes(body)
        names.append(name)
    if names[-1:] != [b"IEND"]:
        raise ValueError("it is cut short: it has no chunk IEND at its end")
    return header


def chunks(data: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """Name and content of each chunk, which is not copied; ValueError where one is cut short, damaged, or comes after the end."""
    if not data.startswith(SIGNATURE):
        raise ValueError(f"it is no PNG, as published files are; {REMEDY}")
    place, view = len(SIGNATURE), memoryview(data)
    while place < len(data):
        if len(data) < place + 12:
            raise ValueError("it is cut short, or something was put behind its end")
        size, name = struct.unpack_from(">I4s", data, place)
        end = place + 8 + size
        if end + 4 > len(data):
            raise ValueError(f"it is cut short: the chunk {name.decode('latin-1')!r} claims {size} bytes")
        if zlib.crc32(view[place + 4 : end]) != int.from_bytes(view[end : end + 4], "big"):
            raise ValueError(f"it is damaged: the checksum of its chunk {name.decode('latin-1')!r} is wrong")
        yield name, view[place + 8 : end]
        place = end + 4
        if name == b"IEND" and (size or place < len(data)):
            raise ValueError(f"something stands in its end, or behind it; {REMEDY}")


def colour_type(body: memoryview) -> int:
    """Of the content of an IHDR; ValueError where it is of pixels that no published file has, or of too many."""
    if len(body) != 13:
        raise ValueError("it is damaged: its IHDR does not have 13 bytes")
    width, height, depth, colours, compression, filtering, interlacing = struct.unpack(">IIBBBBB", body)
    too_large((width, height))
    if depth not in DEPTHS.get(colours, ()) or compression or filtering or interlacing > 1:
        raise ValueError(
            f"its pixels have {depth} bits of colour type {colours}, or are packed in another way; published files have pixels of "
            f"RGB, grey or a palette, 8 bits or fewer and no alpha; {REMEDY}"
        )
    return int(colours)


def too_large(size: tuple[int, int]) -> None:
    """ValueError for a picture of more pixels than are read, or of none."""
    width, height = size
    if not 0 < width * height <= MAX_PIXELS:
        raise ValueError(
            f"it has {width} x {height} pixels, and at most {MAX_PIXELS:,} are read; make it smaller, or crop it"
        )
