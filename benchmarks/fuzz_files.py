"""What a receiver makes of files that were never published: `python -m benchmarks.fuzz_files [--files N]`.

N files, in turn of eight kinds, go through the reader of files and a method's recovery, with the right key, as in a run. The
published file has every part that a header can have. Its picture is scrambled: that is quick to recover, and goes the way of all
methods. Anything but a recovery, a BadPicture or a BadHeader of one line ends the run. So does a recovery from a file that shows
other pixels or has another header. Counted: files that were refused, and files that show and say just what was published.
Measured: results/benchmarks/fuzz_files.csv.
"""

import argparse
import io
import random
import re
import resource
import struct
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import PIL.Image
import torch
from tqdm import tqdm

from benchmarks.fuzz_headers import KEY, report
from keyanon.channel.chunks import HEADER_CHUNK, SIGNATURE
from keyanon.channel.headers import BadHeader, Header, seal
from keyanon.channel.pixels import png_bytes, read_png
from keyanon.channel.streams import signs
from keyanon.context import Context
from keyanon.faces.parsing import EllipseParser
from keyanon.methods.baselines.scrambling import Scrambling
from keyanon.types import BadPicture, PictureBytes, Published

METHOD = Scrambling(EllipseParser(), block=4)
COLUMNS = ["kind", "files", "refused", "as_published", "slowest_ms", "peak_mib"]
STRANGE = (
    b"gAMA",
    b"cHRM",
    b"sRGB",
    b"iCCP",
    b"tRNS",
    b"bKGD",
    b"pHYs",
    b"eXIf",
    b"tIME",
    b"tEXt",
    b"zTXt",
    b"iTXt",
    b"acTL",
    b"prVt",
)
Chunks = list[tuple[bytes, bytes]]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz_files", description=__doc__)
    parser.add_argument("--files", type=int, default=20_000, help="of all kinds (default: %(default)s)")
    args = parser.parse_args()
    start = time.perf_counter()
    rows, messages = fuzz(args.files)
    report(rows, messages, start)


def fuzz(files: int, seed: int = 0) -> tuple[list[dict[str, object]], Counter[str]]:
    """A row for each kind, and the messages of all refusals, without numbers and chunks' names."""
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    slowest, peaks, messages = dict.fromkeys(KINDS, 0.0), dict.fromkeys(KINDS, 0.0), Counter[str]()
    for i in tqdm(range(files), "files", disable=not sys.stderr.isatty()):
        kind = list(KINDS)[i % len(KINDS)]
        data = KINDS[kind](random.Random(f"{seed} {i}"))
        start = time.perf_counter()
        refusal = refused(data)
        slowest[kind] = max(slowest[kind], time.perf_counter() - start)
        peaks[kind] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # of the process, up to now
        counts[kind]["as_published" if refusal is None else "refused"] += 1
        if refusal is not None:
            assert refusal.isprintable(), refusal
            messages[re.sub(r"\d+", "N", re.sub(r"chunk (['\"]).*?\1", "chunk X", refusal))] += 1
    rows = [
        (
            kind,
            found.total(),
            found["refused"],
            found["as_published"],
            round(1000 * slowest[kind], 1),
            round(peaks[kind]),
        )
        for kind, found in counts.items()
    ]
    return [dict(zip(COLUMNS, row, strict=True)) for row in rows], messages


def refused(data: bytes) -> str | None:
    """Why the owner of the key gets nothing from a file; None where he gets the original, from what was published."""
    published, header = specimen()
    try:
        pixels, found = read_png(Path("file.png"), data)
        METHOD.recover(Published(pixels[None], (found,)), [KEY])
    except (BadPicture, BadHeader) as error:
        return str(error)
    if not torch.equal(pixels, published) or found != header:
        raise AssertionError(f"a changed file was recovered: {data.hex()}")
    return None


@cache
def specimen() -> tuple[PictureBytes, bytes]:
    """A scrambled picture and its header, with every part."""
    original = signs(KEY, Context(b"specimen"), (1, 3, 64, 64)).float() / 2
    out = METHOD.anonymize(original, [KEY], ["specimen"])
    header = Header.unpack(out.headers[0])
    full = replace(header, sent=bytes(63), seam=bytes(96), residual=bytes(range(80)), tag=b"")
    return out.images[0], seal([full], out.images, [KEY], authenticate=True)[0]


@cache
def file() -> bytes:
    return png_bytes(*specimen())


def chunks_of(data: bytes) -> Chunks:
    found, place = [], len(SIGNATURE)
    while place < len(data):
        size, name = struct.unpack_from(">I4s", data, place)
        found.append((name, data[place + 8 : place + 8 + size]))
        place += 12 + size
    return found


def joined(chunks: Chunks) -> bytes:
    """A PNG of these chunks, each with its right checksum."""
    return SIGNATURE + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )


def bits(data: bytes, draw: random.Random, most: int = 8) -> bytes:
    changed = bytearray(data)
    for bit in draw.sample(range(8 * len(data)), min(draw.randint(1, most), 8 * len(data))):
        changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def flipped(draw: random.Random) -> bytes:
    """1 to 8 bits of the file."""
    return bits(file(), draw)


def repaired(draw: random.Random) -> bytes:
    """1 to 3 bits of a chunk, or of its name, whose checksum is made right again."""
    chunks = chunks_of(file())
    place = draw.randrange(len(chunks))
    name, body = chunks[place]
    chunks[place] = (name, bits(body, draw, 3)) if body and draw.random() < 0.9 else (bits(name, draw, 1), body)
    return joined(chunks)


def cut(draw: random.Random) -> bytes:
    """Cut anywhere, or with bytes behind it."""
    whole = file()
    if draw.random() < 0.5:
        return whole[: draw.randrange(len(whole))]
    return whole + draw.randbytes(draw.choice([1, 12, 1000, 10**6]))


def rearranged(draw: random.Random) -> bytes:
    """A chunk taken out, doubled, moved or split, or one more."""
    chunks = chunks_of(file())
    place, other = draw.randrange(len(chunks)), draw.randrange(len(chunks))
    match draw.randrange(5):
        case 0:
            del chunks[place]
        case 1:
            chunks.insert(other, chunks[place])
        case 2:
            chunks.insert(other, chunks.pop(place))
        case 3:
            name, body = chunks[place]
            half = len(body) // 2
            chunks[place : place + 1] = [(name, body[:half]), (name, body[half:])]
        case _:
            chunks.insert(other, (draw.choice(STRANGE), draw.randbytes(draw.choice([0, 4, 9, 300]))))
    return joined(chunks)


def with_header(header: bytes) -> bytes:
    return joined([(name, header if name == HEADER_CHUNK else body) for name, body in chunks_of(file())])


def other_header(draw: random.Random) -> bytes:
    """A header with 1 to 3 bits flipped, cut, of another picture, without its tag, of the other version, or that says otherwise."""
    pixels, packed = specimen()
    header = Header.unpack(packed)
    match draw.randrange(6):
        case 0:
            return with_header(bits(packed, draw, 3))
        case 1:
            return with_header(packed[: draw.randrange(len(packed))])
        case 2:
            return with_header(seal([header], (pixels + 1)[None], [KEY], authenticate=True)[0])
        case 3:
            return with_header(replace(header, tag=b"").pack())
        case 4:
            return with_header(replace(header, description=None).pack())
        case _:
            told = (header.description or b"").replace(b'"block":4', b'"block":%d' % draw.choice([1, 2, 8, 16]))
            return with_header(replace(header, description=told).pack())


def other_pixels(draw: random.Random) -> bytes:
    """One to four bytes of the picture changed, or the picture turned or cropped; a good header of before."""
    pixels, header = specimen()
    changed = pixels.clone()
    if draw.random() < 0.8:
        for _ in range(draw.randint(1, 4)):
            changed.view(-1)[draw.randrange(changed.numel())] += draw.randint(1, 255)
    else:
        changed = draw.choice([pixels.flip(1), pixels.transpose(1, 2), pixels[:, :60], pixels.roll(1, 2)]).contiguous()
    return png_bytes(changed, header)


def rewritten(draw: random.Random) -> bytes:
    """The same pixels and header, packed in another way: what optimizers do, and readers have to read."""
    pixels, header = specimen()
    picture = PIL.Image.fromarray(pixels.permute(1, 2, 0).numpy())
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=draw.randrange(10))
    chunks = [each for each in chunks_of(buffer.getvalue()) if each[0] != b"IDAT"]
    stream = b"".join(body for name, body in chunks_of(buffer.getvalue()) if name == b"IDAT")
    step = draw.choice([len(stream), 100, 1000])
    chunks[1:1] = [(b"IDAT", stream[i : i + step]) for i in range(0, len(stream), step)]
    chunks.insert(draw.choice([1, len(chunks) - 1]), (HEADER_CHUNK, header))
    return joined(chunks)


def anything(draw: random.Random) -> bytes:
    """Random bytes behind a right beginning, or none."""
    start = draw.choice([b"", SIGNATURE, joined(chunks_of(file())[:1]), joined(chunks_of(file())[:2])])
    return start + draw.randbytes(draw.choice([0, 20, 2000]))


KINDS: dict[str, Callable[[random.Random], bytes]] = {
    "bits flipped": flipped,
    "bits flipped, checksums right": repaired,
    "cut or longer": cut,
    "chunks rearranged": rearranged,
    "another header": other_header,
    "other pixels": other_pixels,
    "rewritten without loss": rewritten,
    "random": anything,
}


if __name__ == "__main__":
    main()
