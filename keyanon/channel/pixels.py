"""The only place where value ranges change: bytes 0 .. 255 <-> floats in [-1, 1], and PNG files with a public header.

The header travels in a private ancillary chunk of the PNG (PNG specification 3, chunk naming conventions: `kaNO`, not
safe to copy after the pixels were edited), so any viewer shows the picture and any editor drops the chunk.
"""

import functools
import io
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from jaxtyping import Float, UInt8
from PIL import ImageCms
from PIL.PngImagePlugin import PngInfo
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor

from keyanon.channel.chunks import HEADER_CHUNK, MAX_PIXELS, public_header, too_large
from keyanon.channel.headers import MAX_BYTES
from keyanon.channel.whole import write_whole
from keyanon.finite import finite
from keyanon.types import BadPicture, Picture, PictureBytes, Source

Kernel = Literal["lanczos", "bilinear"]  # of a resize
# Of what Pillow knows, these alone are opened: others start programs (EPS), or nobody here has tried them on hostile files.
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "AVIF")  # MPO among JPEG
READS, BYTES_A_READ = 2**17, 2**10  # a reader may ask so many times, and once more for so many bytes of the file
PASSES = 4  # and for all the file's bytes so many times
MAX_SCANS = 100  # of a progressive JPEG, each of which goes over all pixels; encoders write some ten
MAX_EXIF, MAX_EXIF_BYTES = 16, 2**20  # blocks in a JPEG, which Pillow joins one by one, and bytes of all
MAX_AVIF = 2**25  # bytes: Pillow makes a number of each two of the EXIF data before anyone can look at them
MAX_TAG_VALUES = 2**20  # numbers in the tags of a TIFF, each of which becomes an object
UNREADABLE = (  # what Pillow raises on bad files
    OSError,
    SyntaxError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    RuntimeError,
    EOFError,
    MemoryError,
    struct.error,
    zlib.error,
    PIL.Image.DecompressionBombError,
)
HEAD = 16  # bytes that tell a format
HEIC_BRANDS = {b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"}
PROFILE_MODES = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK", "LAB": "LAB"}  # of Pillow, by an ICC profile's colour space
PLAIN_MODES = {"1": "L", "P": "RGB", "YCbCr": "RGB", "HSV": "RGB"}
BITS_PER_SAMPLE, PHOTOMETRIC, TILE_WIDTH, TILE_LENGTH, SAMPLE_FORMAT = 258, 262, 322, 323, 339  # tags of TIFF 6.0
WHITE_IS_ZERO, UNSIGNED = 0, 1
BYTE_LIKE = (1, 2, 6, 7)  # types of TIFF 6.0 of one byte


def to_bytes(images: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """Clip floats to [-1, 1] and round them to the nearest of 256 levels; raises NotFinite, for NaN is no level."""
    finite(images if images.dim() > 3 else images[None], "pixels")
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def to_floats(images: UInt8[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The float of each of the 256 levels; to_bytes(to_floats(x)) = x."""
    return images.float() / 127.5 - 1


def resize(picture: PIL.Image.Image, size: int, kernel: Kernel = "lanczos") -> PIL.Image.Image:
    """A square picture of `size` pixels a side: centre crop to a square, then Pillow's resize, which smooths before it shrinks.

    `bilinear` is torchvision's Resize of a Pillow picture, byte for byte, where the picture is square.
    """
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    box = (left, top, left + side, top + side)
    return picture.resize((size, size), PIL.Image.Resampling[kernel.upper()], box=box)


def open_rgb(path: Path, data: bytes | None = None) -> PIL.Image.Image:
    """A picture file of any common format in sRGB, 8 bits, upright as its EXIF data says; BadPicture names the file.

    A colour profile is applied. Transparent pixels show white behind them. 16 bits are brought to 8. What has no one reading is
    refused: several frames or pages (but for the second pictures in a camera's MPO), floats, and whole numbers of 32 bits.

    The file may come from a stranger: refused before it is decoded is what has more bytes, pixels, scans or pieces than any
    picture needs (benchmarks/hostile_pictures.py).

    Args:
        path: of the file.
        data: its bytes where `path` only names it, as inside an archive.
    """
    data = Source(path).read() if data is None else data
    try:
        refuse_floods(data)
        with PIL.Image.open(Measured(data), formats=FORMATS) as picture:
            too_large(picture.size)
            # `is_animated` looks for a second one, `n_frames` would count them all
            if getattr(picture, "is_animated", False) and picture.format != "MPO":
                raise ValueError("it has several frames or pages; save the one that is meant as a file of its own")
            if isinstance(picture, TiffImageFile):
                refuse_odd_numbers(picture.tag_v2)
            picture.load()  # EXIF may stand behind the pixels
            if len(picture.info.get("exif", b"")) > MAX_EXIF_BYTES:
                raise ValueError(f"its EXIF data have more than {MAX_EXIF_BYTES:,} bytes; save it without them")
            profile = picture.info.get("icc_profile")
            return on_white(PIL.ImageOps.exif_transpose(picture), profile)
    except PIL.UnidentifiedImageError as error:
        what = "it is a HEIC picture; save it as PNG or JPEG, for instance with the package pillow-heif"
        known = f"of no format that is read here ({', '.join(FORMATS)}), or damaged at its beginning"
        what = what if is_heic(data[:HEAD]) else known
        raise BadPicture(f"{path}: not a readable picture ({what})") from error
    except PIL.Image.DecompressionBombError as error:
        few = f"{error} At most {MAX_PIXELS:,} are read; make it smaller, or crop it"
        raise BadPicture(f"{path}: not a readable picture ({few})") from error
    except UNREADABLE as error:
        raise BadPicture(f"{path}: not a readable picture ({error})") from error


class Measured(io.BytesIO):
    """A picture's bytes, of which no reader can make endless work: ValueError for one that takes them in too many pieces.

    Floods of chunks, markers, blocks or pages cost a reader some calls each, whatever the format.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.calls, self.bytes = READS + len(data) // BYTES_A_READ, PASSES * len(data) + READS

    def read(self, size: int | None = -1, /) -> bytes:
        found = super().read(size)
        self.calls -= 1
        self.bytes -= len(found)
        if self.calls < 0 or self.bytes < 0:
            raise ValueError("it is in more pieces than any picture needs; save it anew, as PNG or JPEG")
        return found


def refuse_floods(data: bytes) -> None:
    """ValueError for what costs Pillow much more than the bytes that it reads."""
    if data.startswith(b"\xff\xd8"):
        for what, mark, most in (("scans", b"\xff\xda", MAX_SCANS), ("blocks of EXIF", b"Exif\0\0", MAX_EXIF)):
            if (count := data.count(mark)) > most:
                raise ValueError(f"it has {count} {what}, and at most {most} are read; save it anew, as PNG or JPEG")
    if data[4:8] == b"ftyp" and len(data) > MAX_AVIF:
        raise ValueError(f"an AVIF of more than {MAX_AVIF:,} bytes; save it anew, as PNG or JPEG")
    if data[:2] in (b"II", b"MM"):
        values = tag_values(data)
        if values > MAX_TAG_VALUES:
            raise ValueError(f"its tags have {values:,} values, and at most {MAX_TAG_VALUES:,} are read; save it anew")


def tag_values(data: bytes) -> int:
    """How many numbers the tags of a TIFF's first page claim to hold, less those that stay bytes; 0 where there is no page."""
    order, big = {b"II": "<", b"MM": ">"}[data[:2]], 43 in (data[2], data[3])
    first, count, entry = ("Q", "Q", "HHQ8x") if big else ("L", "H", "HHL4x")
    place = 8 if big else 4
    try:
        (place,) = struct.unpack_from(order + first, data, place)
        (entries,) = struct.unpack_from(order + count, data, place)
        begin, size = place + struct.calcsize(order + count), struct.calcsize(order + entry)
        page = data[begin : begin + min(entries, len(data)) * size]
    except (struct.error, OverflowError):
        return 0
    whole = struct.iter_unpack(order + entry, page[: len(page) // size * size])
    return sum(values for _, kind, values in whole if kind not in BYTE_LIKE)


def refuse_odd_numbers(tags: Mapping[int, Any]) -> None:
    """ValueError for a TIFF file of numbers that Pillow would take for others: it reads them as they are, from 0 for black on."""
    formats, bits = np.atleast_1d(tags.get(SAMPLE_FORMAT, UNSIGNED)), np.atleast_1d(tags.get(BITS_PER_SAMPLE, 1))
    if (formats != UNSIGNED).any():
        raise ValueError(
            "its pixels are signed numbers or floats, and nothing tells which is white; save it with 8 or 16 bits"
        )
    if tags.get(TILE_WIDTH, 0) * tags.get(TILE_LENGTH, 0) > MAX_PIXELS:
        raise ValueError("its tiles are larger than any picture that is read; save it anew")
    if not np.isin(bits, (1, 2, 4, 8, 16)).all():
        raise ValueError(f"its pixels have {bits.max()} bits; save it with 8 or 16")
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO and bits.max() == 16:
        raise ValueError("its 16 bits are 0 for white; save it with 0 for black")


def is_heic(head: bytes) -> bool:
    """Whether a file that begins so is one of the HEIF family, other than AVIF, which Pillow reads (ISO/IEC 23008-12)."""
    return head[4:8] == b"ftyp" and head[8:12] in HEIC_BRANDS


def on_white(picture: PIL.Image.Image, profile: bytes | None) -> PIL.Image.Image:
    """A picture of any mode as RGB, with white behind transparent pixels; ValueError where its numbers have no one reading."""
    if picture.mode.startswith("I;16") and "transparency" not in picture.info:
        nearest = (np.asarray(picture).astype(np.uint32) + 128) // 257
        return in_srgb(PIL.Image.fromarray(nearest.astype(np.uint8)), profile)
    if picture.mode[0] in "IF":
        raise ValueError(
            f"its pixels are numbers of mode {picture.mode}, and nothing tells which is white; save it with 8 or 16 bits"
        )
    if not picture.has_transparency_data:
        return in_srgb(picture, profile)
    picture = picture.convert("LA" if picture.mode in ("L", "LA", "La") else "RGBA")
    *colours, alpha = picture.split()
    colour = in_srgb(PIL.Image.merge("RGB" if len(colours) == 3 else "L", colours), profile)
    white = PIL.Image.new("RGB", picture.size, "white")
    white.paste(colour, mask=alpha)
    return white


def in_srgb(picture: PIL.Image.Image, profile: bytes | None) -> PIL.Image.Image:
    """An opaque picture in sRGB; without a profile its numbers are taken for sRGB, or for CIELAB where that is its mode."""
    if profile is None and picture.mode != "LAB":
        return picture.convert("RGB")
    picture = picture.convert(PLAIN_MODES.get(picture.mode, picture.mode))
    try:
        if picture.mode == "LAB":
            own, space = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")), "LAB"
        else:
            if b"mpet" in (profile or b""):
                raise ValueError("it has chains of multi-process elements, of any length for each pixel")
            own = ImageCms.getOpenProfile(io.BytesIO(profile or b""))
            space = own.profile.xcolor_space.strip()
        if picture.mode == "L" and space == "RGB":
            picture = picture.convert("RGB")
        if picture.mode != PROFILE_MODES.get(space):
            raise ValueError(f"it is for {space}, the pixels are {picture.mode}")
        if space == "RGB" and is_srgb(profile or b""):
            return picture
        # as the profile has it: tables made in advance are some levels off in the dark
        flags = ImageCms.Flags.NOOPTIMIZE
        seen = ImageCms.profileToProfile(picture, own, ImageCms.createProfile("sRGB"), outputMode="RGB", flags=flags)
        assert seen is not None
        return seen
    except (ImageCms.PyCMSError, OSError, ValueError) as error:
        raise ValueError(
            f"its colour profile cannot be used: {error}; save it in sRGB, or without a profile"
        ) from error


@functools.lru_cache(64)
def is_srgb(profile: bytes) -> bool:
    """Whether a profile changes no colour by more than one level: such a picture keeps its bytes."""
    steps = np.linspace(0, 255, 17).round().astype(np.uint8)
    colours = PIL.Image.fromarray(np.stack(np.meshgrid(steps, steps, steps), -1).reshape(17, -1, 3))
    seen = ImageCms.profileToProfile(
        colours, ImageCms.getOpenProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB"), outputMode="RGB"
    )
    return bool(np.abs(np.asarray(seen).astype(int) - np.asarray(colours)).max() <= 1)


def from_pil(picture: PIL.Image.Image) -> Picture:
    pixels = torch.from_numpy(np.array(picture, dtype=np.uint8)).permute(2, 0, 1)
    return to_floats(pixels[None])[0]


def write_png(path: Path, pixels: PictureBytes, header: bytes = b"", *, public: bool = False) -> None:
    """Write one picture (3 h w, uint8) so that the file appears whole or not at all, for its owner alone unless `public`."""
    write_whole(path, png_bytes(pixels, header), public=public)


def png_bytes(pixels: PictureBytes, header: bytes = b"") -> bytes:
    """One picture (3 h w, uint8) as a PNG file with a public header."""
    if len(header) > MAX_BYTES:
        raise ValueError(f"its header would have {len(header)} bytes; it can have at most {MAX_BYTES}")
    info = PngInfo()
    if header:
        info.add(HEADER_CHUNK, header)
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy()).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def read_png(path: Path, data: bytes | None = None) -> tuple[PictureBytes, bytes]:
    """One picture (3 h w, uint8) and its public header, b"" where the file has none; BadPicture names the file.

    Its chunks have to be those that a published file may hold (keyanon/channel/chunks.py), which is looked at before it is decoded.

    Args:
        path: of the file.
        data: its bytes where they are already read.
    """
    data = Source(path).read() if data is None else data
    try:
        header = public_header(data)
        with PIL.Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
            if picture.mode == "P" and np.asarray(picture).max() >= len(picture.getpalette() or []) // 3:
                raise ValueError("it has pixels of colours that its palette lacks, which viewers show as they like")
            pixels = np.array(picture.convert("RGB"), dtype=np.uint8)
    except UNREADABLE as error:
        raise BadPicture(f"{path}: not a readable picture ({error})") from error
    return torch.from_numpy(pixels).permute(2, 0, 1), header


def jpeg(pixels: PictureBytes, quality: int) -> PictureBytes:
    """One picture (3 h w, uint8) after a JPEG round trip at `quality` (Pillow's tables, 4:2:0)."""
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy()).save(buffer, "JPEG", quality=quality)
    with PIL.Image.open(buffer) as picture:
        return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
