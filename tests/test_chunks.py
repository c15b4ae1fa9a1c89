"""What a published PNG may hold: whatever makes a viewer show something else than the tag covers is refused."""

import random
import struct
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from benchmarks.hostile_pictures import chunk
from keyanon.channel.chunks import MAX_CHUNKS, SIGNATURE, chunks
from keyanon.channel.pixels import png_bytes, read_png
from keyanon.types import BadPicture
from tests.conftest import ROOT

PIXELS = torch.randint(0, 256, (3, 12, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
HEADER = b"header"
WHOLE = png_bytes(PIXELS, HEADER)
# Ancillary chunks of PNG 3 and its extensions, of APNG, those of old programs, and private ones; with bodies that readers take.
CHUNKS = {
    b"gAMA": struct.pack(">I", 10_000),
    b"cHRM": struct.pack(">8I", *[30_000] * 8),
    b"sRGB": b"\0",
    b"iCCP": b"x\0\0" + zlib.compress(bytes(128)),
    b"cICP": bytes([9, 16, 0, 1]),
    b"mDCV": bytes(24),
    b"cLLI": bytes(8),
    b"sBIT": bytes([5, 5, 5]),
    b"tRNS": bytes(6),
    b"bKGD": bytes(6),
    b"hIST": bytes(2),
    b"sPLT": b"x\0\x08",
    b"pHYs": struct.pack(">IIB", 1, 9, 0),
    b"sCAL": b"\x011\x00" + b"9",
    b"oFFs": struct.pack(">iiB", 50, 50, 0),
    b"pCAL": b"x\0" + bytes(10),
    b"sTER": b"\0",
    b"eXIf": b"II*\0" + struct.pack("<LHHHLHHL", 8, 1, 0x0112, 3, 1, 6, 0, 0),  # lying on its side
    b"tIME": bytes([7, 208, 1, 1, 0, 0, 0]),
    b"tEXt": b"Title\0another person",
    b"zTXt": b"Title\0\0" + zlib.compress(b"another person"),
    b"iTXt": b"XML:com.adobe.xmp\0\0\0\0\0<x/>",
    b"acTL": struct.pack(">II", 1, 0),
    b"fcTL": struct.pack(">IIIIIHHBB", 0, 20, 12, 0, 0, 1, 1, 0, 0),
    b"fdAT": struct.pack(">I", 1) + zlib.compress(bytes(12 * 61)),
    b"iDOT": bytes(28),
    b"CgBI": bytes(4),
    b"gIFg": bytes(4),
    b"dSIG": b"x",
    b"vpAg": bytes(9),
    b"caBX": b"x",
    b"kaNo": b"header",
    b"KANO": b"header",
    b"DDAT": b"x",
}


def bad(tmp_path: Path, data: bytes, match: str) -> None:
    (tmp_path / "x.png").write_bytes(data)
    with pytest.raises(BadPicture, match=match) as error:
        read_png(tmp_path / "x.png")
    assert str(error.value).startswith(f"{tmp_path / 'x.png'}: not a readable picture (")
    assert "\n" not in str(error.value)


def built(*parts: tuple[bytes, bytes]) -> bytes:
    return SIGNATURE + b"".join(chunk(name, body) for name, body in parts)


def parts(data: bytes = WHOLE) -> list[tuple[bytes, bytes]]:
    return [(name, bytes(body)) for name, body in chunks(data)]


@pytest.mark.parametrize("place", ["first", "before the pixels", "after the pixels"])
@pytest.mark.parametrize("name", CHUNKS, ids=lambda name: name.decode())
def test_any_other_chunk_is_refused_by_name(tmp_path, name, place):
    """Most leave the decoded pixels, and so the tag, as they were."""
    every = parts()
    at = {"first": 1, "before the pixels": [n for n, _ in every].index(b"IDAT"), "after the pixels": len(every) - 1}[
        place
    ]
    every.insert(at, (name, CHUNKS[name]))
    bad(
        tmp_path,
        built(*every),
        rf"the chunk '{name.decode()}'.*published files hold only IHDR, PLTE, IDAT, IEND, kaNO; take the",
    )


def test_published_files_hold_what_is_allowed():
    assert [name for name, _ in parts()] == [b"IHDR", b"kaNO", b"IDAT", b"IEND"]
    published = sorted((ROOT / "tests/published").glob("*/*.png"))
    assert len(published) == 12
    for path in published:
        assert {name for name, _ in parts(path.read_bytes())} == {b"IHDR", b"kaNO", b"IDAT", b"IEND"}
        assert read_png(path)[1]


# Rewritten without loss, as optimizers do


def same(tmp_path: Path, data: bytes, expected: np.ndarray, header: bytes = HEADER) -> None:
    (tmp_path / "x.png").write_bytes(data)
    pixels, found = read_png(tmp_path / "x.png")
    assert found == header
    assert (pixels.permute(1, 2, 0).numpy() == expected).all()


def shape(depth: int, colours: int, interlacing: int = 0, width: int = 20, height: int = 12) -> tuple[bytes, bytes]:
    return b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, interlacing)


RGB = PIXELS.permute(1, 2, 0).numpy()


def packed(rows: np.ndarray, level: int = 6) -> bytes:
    """Rows of bytes, each unfiltered."""
    return zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows), level)


@pytest.mark.parametrize("pieces", [1, 7, 200])
@pytest.mark.parametrize("at", [1, -1])
def test_other_pieces_and_another_place_of_the_header(tmp_path, pieces, at):
    data = packed(RGB.reshape(12, 60), 1)
    step = -(-len(data) // pieces)
    every = [shape(8, 2), *((b"IDAT", data[i : i + step]) for i in range(0, len(data), step)), (b"IEND", b"")]
    every.insert(at if at > 0 else len(every) - 1, (b"kaNO", HEADER))
    same(tmp_path, built(*every), RGB)


def test_other_filters(tmp_path):
    rows, above = b"", np.zeros(60, np.uint8)
    for row in RGB.reshape(12, 60):
        rows += b"\2" + (row - above).tobytes()
        above = row
    same(tmp_path, built(shape(8, 2), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")), RGB, b"")


def test_interlaced(tmp_path):
    data = b""
    for top, left, down, right in (
        (0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)
    ):  # fmt: skip
        data += b"".join(b"\0" + row.tobytes() for row in RGB[top::down, left::right])
    same(tmp_path, built(shape(8, 2, 1), (b"IDAT", zlib.compress(data)), (b"IEND", b"")), RGB, b"")


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
@pytest.mark.parametrize("colours", [0, 3])
def test_grey_and_palette_of_every_depth(tmp_path, depth, colours):
    index = np.random.default_rng(depth).integers(0, 2**depth, (12, 24), dtype=np.uint8)
    each = 8 // depth
    weights = (2 ** (depth * np.arange(each)[::-1])).astype(np.uint8)
    rows = (index.reshape(12, -1, each) * weights).sum(-1).astype(np.uint8)
    palette = np.random.default_rng(9).integers(0, 256, (2**depth, 3), dtype=np.uint8)
    grey = np.repeat((index * (255 // (2**depth - 1)))[..., None], 3, -1)
    own = [(b"PLTE", palette.tobytes())] if colours == 3 else []
    data = built(shape(depth, colours, 0, 24), *own, (b"kaNO", HEADER), (b"IDAT", packed(rows)), (b"IEND", b""))
    same(tmp_path, data, palette[index] if colours == 3 else grey)


# What else is refused


@pytest.mark.parametrize(
    ("depth", "colours", "bytes_a_pixel"),
    [(16, 0, 2), (16, 2, 6), (8, 4, 2), (8, 6, 4), (16, 6, 8), (8, 7, 3), (3, 0, 1)],
)
def test_other_pixels_than_the_tag_covers_are_refused(tmp_path, depth, colours, bytes_a_pixel):
    """Pillow drops the low byte of 16-bit RGB, and a viewer does not."""
    data = packed(np.zeros((12, 20 * bytes_a_pixel), np.uint8))
    bad(
        tmp_path,
        built(shape(depth, colours), (b"IDAT", data), (b"IEND", b"")),
        rf"{depth} bits of colour type {colours}.*8 bits",
    )


@pytest.mark.parametrize("byte", [10, 11, 12])  # compression, filters, interlacing
def test_another_way_of_packing_is_refused(tmp_path, byte):
    head = bytearray(parts()[0][1])
    head[byte] = 2
    bad(tmp_path, built((b"IHDR", bytes(head)), *parts()[1:]), "packed in another way")


@pytest.mark.parametrize(("width", "height"), [(2**13 + 1, 2**13), (2**31 - 1, 2**31 - 1), (0, 5), (5, 0)])
def test_too_many_pixels_and_none_are_refused_before_they_are_unpacked(tmp_path, width, height):
    data = built(shape(8, 2, 0, width, height), *parts()[1:])
    bad(tmp_path, data, rf"it has {width} x {height} pixels, and at most 67,108,864 are read; make it smaller")


def test_the_order_of_chunks(tmp_path):
    head, header, pixels, end = parts()
    palette = (b"PLTE", bytes(6))
    indexed = built(shape(1, 3), palette, (b"IDAT", packed(np.zeros((12, 3), np.uint8))), end)
    assert read_png(Path("x"), indexed)[0].shape == PIXELS.shape
    for every, match in (
        ([header, head, pixels, end], "first chunk, and no other, has to be IHDR"),
        ([head, head, pixels, end], "first chunk, and no other, has to be IHDR"),
        ([head, header, pixels], "cut short: it has no chunk IEND"),
        ([], "cut short: it has no chunk IEND"),
        ([head, header, header, pixels, end], "it has 2 headers"),
        ([head, header, pixels, end, header], "something stands in its end, or behind it"),
        ([head, header, pixels, (b"IEND", b"x")], "something stands in its end, or behind it"),
        ([head, (b"IDAT", pixels[1][:9]), header, (b"IDAT", pixels[1][9:]), end], "not in one piece"),
        ([head, palette, pixels, end], "a palette that no pixel of it needs"),
        ([shape(1, 3), palette, palette, pixels, end], "a palette that no pixel of it needs"),
        ([shape(8, 3), pixels, end], "not a readable"),  # no palette
        ([head, end], "not a readable"),  # no pixels
        ([head, (b"kaNO", bytes(2**16 + 1)), pixels, end], "its header has 65537 bytes; it can have at most 65536"),
    ):
        bad(tmp_path, built(*every), match)
    bad(tmp_path, WHOLE + b"\0", "something stands in its end, or behind it")


def test_a_colour_beyond_the_palette_is_refused(tmp_path):
    rows = np.full((12, 20), 2, np.uint8)
    data = built(shape(8, 3), (b"PLTE", bytes(6)), (b"IDAT", packed(rows)), (b"IEND", b""))
    bad(tmp_path, data, "colours that its palette lacks")


def test_a_flood_of_chunks_is_refused(tmp_path):
    head, *rest = parts()
    bad(tmp_path, built(head, *[(b"IDAT", b"")] * MAX_CHUNKS, *rest), f"more than {MAX_CHUNKS} chunks")


def test_a_long_header_is_not_copied_and_a_wrong_length_not_believed(tmp_path):
    claims = WHOLE[:33] + struct.pack(">I", 2**31 - 1) + b"kaNO and then nothing"
    bad(tmp_path, claims, "the chunk 'kaNO' claims 2147483647 bytes")


def test_other_formats_are_refused(tmp_path):
    for form in ("JPEG", "TIFF", "BMP", "GIF", "WEBP"):
        PIL.Image.fromarray(RGB).save(tmp_path / "y", form)
        bad(tmp_path, (tmp_path / "y").read_bytes(), "it is no PNG, as published files are")


def test_any_bit_that_is_changed_is_noticed(tmp_path):
    """By a checksum, whatever part of the file it is in."""
    draw = random.Random(0)
    for _ in range(300):
        changed = bytearray(WHOLE)
        changed[draw.randrange(len(WHOLE))] ^= 1 << draw.randrange(8)
        with pytest.raises(BadPicture):
            read_png(tmp_path / "x.png", bytes(changed))
