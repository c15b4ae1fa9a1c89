"""What pictures from strangers cost that were made to cost much: `python -m benchmarks.hostile_pictures [NAME ...]`.

Each specimen is read in a process of its own: as an input picture (`open_rgb`), and a PNG as a published file (`read_png`) too.
Two of them, `png_64_megapixels` and `jpeg_at_all_limits`, are within every limit: they show what may be asked for at most. Seconds
and the growth of the process's peak memory are those of reading alone. Measured: results/benchmarks/hostile_pictures.csv.
"""

import argparse
import csv
import io
import multiprocessing
import re
import struct
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image

from keyanon.channel.chunks import MAX_PIXELS, SIGNATURE
from keyanon.channel.pixels import open_rgb, read_png
from keyanon.types import BadPicture

COLUMNS = ["specimen", "bytes", "read_as", "outcome", "seconds", "peak_mib"]
FLOOD = 24_000_000  # bytes
TIMEOUT = 300  # seconds
READERS: dict[str, Callable[[Path], object]] = {"input": open_rgb, "published": read_png}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hostile_pictures", description=__doc__)
    parser.add_argument("names", nargs="*", help="of specimens (default: all)")
    writer = csv.DictWriter(sys.stdout, COLUMNS, lineterminator="\n")
    writer.writeheader()
    with tempfile.TemporaryDirectory() as folder:
        for name in parser.parse_args().names or SPECIMENS:
            path = Path(folder, f"{name}.png")  # no reader goes by the suffix
            path.write_bytes(SPECIMENS[name](FLOOD))
            for reader in READERS if name.startswith("png") else ["input"]:
                writer.writerow(
                    {"specimen": name, "bytes": path.stat().st_size, "read_as": reader, **cost(reader, path)}
                )
                sys.stdout.flush()
            path.unlink()


def cost(reader: str, path: Path) -> dict[str, object]:
    """Outcome, seconds and memory of one reading, in a fresh process."""
    fresh = multiprocessing.get_context("spawn")
    told, tells = fresh.Pipe(duplex=False)
    process = fresh.Process(target=read, args=(reader, path, tells))
    process.start()
    tells.close()
    try:
        row: dict[str, object] = told.recv() if told.poll(TIMEOUT) else {"outcome": f"killed after {TIMEOUT} s"}
    except EOFError:
        row = {"outcome": "the process died"}
    process.kill()
    process.join()
    return row


def read(reader: str, path: Path, tells: "multiprocessing.connection.Connection") -> None:
    forget_peak()
    before, start = peak(), time.perf_counter()
    try:
        READERS[reader](path)
        outcome = "read"
    except BadPicture:
        outcome = "refused"
    except Exception as error:
        outcome = type(error).__name__
    seconds = time.perf_counter() - start
    tells.send({"outcome": outcome, "seconds": round(seconds, 2), "peak_mib": round(peak() - before)})


def peak() -> float:
    """The most memory that this process had, in MiB; Linux alone tells it since `forget_peak`."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s*(\d+)", status)[1]) / 2**10  # type: ignore[index]


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


# Pieces


def chunk(name: bytes, body: bytes = b"") -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(width: int, height: int, before: bytes = b"", among: bytes = b"", after: bytes = b"") -> bytes:
    """A black PNG, with chunks before, among and after its pixels."""
    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(1 + 3 * width)) for _ in range(height)) + packer.flush()
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    half = len(rows) // 2
    pixels = chunk(b"IDAT", rows[:half]) + among + chunk(b"IDAT", rows[half:])
    return SIGNATURE + head + before + pixels + after + chunk(b"IEND")


def saved(form: str, width: int = 16, height: int = 16, **options: object) -> bytes:
    """A black picture as Pillow saves it."""
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (width, height)).save(buffer, form, **options)
    return buffer.getvalue()


def with_scans(data: bytes, count: int) -> bytes:
    """A progressive JPEG whose last scan comes again, until there are `count`."""
    last = data.rindex(b"\xff\xda")
    again = count - data.count(b"\xff\xda")
    return data[:-2] + data[last:-2] * again + data[-2:]


def tiff(tags: dict[int, tuple[int, int, int]], rest: bytes = b"", pages: int = 1) -> bytes:
    """A TIFF of one grey pixel a page; of the tags type, count, and value or place."""
    plain = {
        256: (3, 1, 1),
        257: (3, 1, 1),
        258: (3, 1, 8),
        259: (3, 1, 1),
        262: (3, 1, 1),
        273: (4, 1, 8),
        279: (4, 1, 1),
    }
    every = sorted({**plain, **tags}.items())
    size = 2 + 12 * len(every) + 4
    out = [b"II*\0" + struct.pack("<L", 12) + b"\0\0\0\0"]
    for page in range(pages):
        place = 12 + (page + 1) * size if page + 1 < pages else 0
        entries = b"".join(struct.pack("<HHLL", tag, *entry) for tag, entry in every)
        out.append(struct.pack("<H", len(every)) + entries + struct.pack("<L", place))
    return b"".join(out) + rest


def gif(size: int) -> bytes:
    first = saved("GIF", 1, 1)
    image = first.index(b"\x2c")
    return first[:-1] + first[image:-1] * (size // (len(first) - image)) + b";"


def webp(size: int) -> bytes:
    """An animation of so many frames of one pixel."""
    still = saved("WEBP", 1, 1, lossless=True)[12:]
    frame = struct.pack("<4sL", b"ANMF", 16 + len(still)) + bytes(16) + still
    body = struct.pack("<4sLB9x", b"VP8X", 10, 2) + struct.pack("<4sL6x", b"ANIM", 6) + frame * (size // len(frame))
    return struct.pack("<4sL", b"RIFF", 4 + len(body)) + b"WEBP" + body


def exif(size: int, tag: int = 0x0112) -> bytes:
    """EXIF data of one tag, by default the orientation, of as many values as there is room for."""
    return (
        b"II*\0" + struct.pack("<LHHHLLL", 8, 1, tag, 3, size // 2, 26, 0) + np.arange(size // 2, dtype="<u2").tobytes()
    )


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n%%EOF\n"
SIDE = 8192  # of a square of MAX_PIXELS
SPECIMENS: dict[str, Callable[[int], bytes]] = {
    "png_64_megapixels": lambda _: png(SIDE, MAX_PIXELS // SIDE),
    "png_13000_squared": lambda _: png(13_000, 13_000),
    "png_30000_squared": lambda _: png(30_000, 30_000),
    "png_empty_chunks": lambda size: png(16, 16, chunk(b"teSt") * (size // 12)),
    "png_empty_chunks_after": lambda size: png(16, 16, after=chunk(b"teSt") * (size // 12)),
    "png_empty_idat": lambda size: png(16, 16, among=chunk(b"IDAT") * (size // 12)),
    "png_long_header": lambda size: png(16, 16, chunk(b"kaNO", bytes(size))),
    "png_header_of_500_mb": lambda _: png(16, 16, chunk(b"kaNO", bytes(500_000_000))),
    "png_profile_bomb": lambda size: png(16, 16, chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(20 * size), 9))),
    "png_text_bombs": lambda _: png(
        16, 16, b"".join(chunk(b"zTXt", b"%d\0\0" % i + zlib.compress(bytes(2**20), 9)) for i in range(1000))
    ),
    "png_exif_values": lambda size: png(16, 16, chunk(b"eXIf", exif(size))),
    "png_frames": lambda size: png(16, 16, after=chunk(b"fcTL", bytes(26)) * (size // 38)),
    "jpeg_at_all_limits": lambda _: with_scans(saved("JPEG", SIDE, SIDE, progressive=True), 100),
    "jpeg_scans": lambda _: with_scans(saved("JPEG", SIDE, SIDE, progressive=True), 5000),
    "jpeg_65500_squared": lambda _: saved("JPEG", 100, 100).replace(
        struct.pack(">HH", 100, 100), struct.pack(">HH", 65_500, 65_500)
    ),
    "jpeg_markers": lambda size: b"\xff\xd8" + b"\xff\xe5\0\2" * (size // 4) + saved("JPEG")[2:],
    "jpeg_fill_bytes": lambda size: b"\xff\xd8" + b"\xff" * size + saved("JPEG")[2:],
    "jpeg_exif_blocks": lambda size: (
        b"\xff\xd8" + (b"\xff\xe1\xff\xffExif\0\0" + bytes(65_527)) * (size // 65_537) + saved("JPEG")[2:]
    ),
    "gif_frames": gif,
    "gif_comments": lambda size: saved("GIF", 1, 1)[:-1] + b"\x21\xfe\x01a\0" * (size // 5) + b";",
    "tiff_pages": lambda size: tiff({}, pages=size // 90),
    "tiff_offsets": lambda size: tiff({273: (4, size // 8, 102), 279: (4, size // 8, 102)}, bytes(size)),
    "tiff_bits": lambda size: tiff({258: (3, size // 2, 102)}, bytes(size)),
    "tiff_one_text": lambda size: tiff({270: (2, size, 102)}, bytes(size)),
    "tiff_huge_tile": lambda _: tiff(
        {259: (3, 1, 8), 322: (4, 1, 40_000), 323: (4, 1, 40_000), 324: (4, 1, 150), 325: (4, 1, 10**6)},
        bytes(48) + zlib.compress(bytes(10**9), 9),
    ),
    # of another tag, or Pillow would shorten it as it saves
    "avif_exif_values": lambda size: saved("AVIF", exif=exif(size, 0x0113)).replace(b"\x13\1\3\0", b"\x12\1\3\0"),
    "webp_frames": webp,
    "webp_16383_squared": lambda _: saved("WEBP", 16_383, 16_383, lossless=True, quality=0, method=0),
    "bmp_claims_60000_squared": lambda _: saved("BMP")[:18] + struct.pack("<ll", 60_000, 60_000) + saved("BMP")[26:],
    "eps": lambda _: EPS,
}


if __name__ == "__main__":
    main()
