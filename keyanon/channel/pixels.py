"""The only place where value ranges change: bytes 0 .. 255 <-> floats in [-1, 1], and PNG files with a public header.

The header travels in a private ancillary chunk of the PNG (PNG specification 3, chunk naming conventions: `kaNO`, not
safe to copy after the pixels were edited), so any viewer shows the picture and any editor drops the chunk.
"""

import functools
import io
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from jaxtyping import Float, UInt8
from PIL import ImageCms
from PIL.PngImagePlugin import PngInfo
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor

from keyanon.channel.whole import write_whole
from keyanon.finite import finite
from keyanon.types import BadPicture, Picture, PictureBytes

HEADER_CHUNK = b"kaNO"  # the capital O is the bit "not safe to copy"
MAX_HEADER, MAX_FILE = 2**20, 2**29  # bytes
UNREADABLE = (  # what Pillow raises on bad files
    OSError,
    SyntaxError,
    ValueError,
    IndexError,
    TypeError,
    struct.error,
    PIL.Image.DecompressionBombError,
    RuntimeError,
    EOFError,
    KeyError,
)
HEAD = 16  # bytes that tell a format
HEIC_BRANDS = {b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"}
PROFILE_MODES = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK", "LAB": "LAB"}  # of Pillow, by an ICC profile's colour space
PLAIN_MODES = {"1": "L", "P": "RGB", "YCbCr": "RGB", "HSV": "RGB"}
BITS_PER_SAMPLE, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF 6.0
WHITE_IS_ZERO, UNSIGNED = 0, 1


def to_bytes(images: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """Clip floats to [-1, 1] and round them to the nearest of 256 levels; raises NotFinite, for NaN is no level."""
    finite(images if images.dim() > 3 else images[None], "pixels")
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def to_floats(images: UInt8[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The float of each of the 256 levels; to_bytes(to_floats(x)) = x."""
    return images.float() / 127.5 - 1


def resize(picture: PIL.Image.Image, size: int) -> PIL.Image.Image:
    """A square picture of `size` pixels a side: centre crop to a square, then Lanczos."""
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    box = (left, top, left + side, top + side)
    return picture.resize((size, size), PIL.Image.Resampling.LANCZOS, box=box)


def open_rgb(path: Path, data: bytes | None = None) -> PIL.Image.Image:
    """A picture file of any common format in sRGB, 8 bits, upright as its EXIF data says; BadPicture names the file.

    A colour profile is applied. Transparent pixels show white behind them. 16 bits are brought to 8. What has no one reading is
    refused: several frames or pages (but for the second pictures in a camera's MPO), floats, and whole numbers of 32 bits.

    Args:
        path: of the file.
        data: its bytes where `path` only names it, as inside an archive.
    """
    try:
        with PIL.Image.open(path if data is None else io.BytesIO(data)) as picture:
            frames = getattr(picture, "n_frames", 1)
            if frames > 1 and picture.format != "MPO":
                raise ValueError(f"it has {frames} frames or pages; save the one that is meant as a file of its own")
            if isinstance(picture, TiffImageFile):
                refuse_odd_numbers(picture.tag_v2)
            profile = picture.info.get("icc_profile")
            return on_white(PIL.ImageOps.exif_transpose(picture), profile)
    except PIL.UnidentifiedImageError as error:
        head = path.read_bytes()[:HEAD] if data is None else data[:HEAD]
        what = "it is a HEIC picture; save it as PNG or JPEG, for instance with the package pillow-heif"
        what = what if is_heic(head) else "of no format that is read here, or damaged at its beginning"
        raise BadPicture(f"{path}: not a readable picture ({what})") from error
    except UNREADABLE as error:
        raise BadPicture(f"{path}: not a readable picture ({error})") from error


def refuse_odd_numbers(tags: Mapping[int, Any]) -> None:
    """ValueError for a TIFF file of numbers that Pillow would take for others: it reads them as they are, from 0 for black on."""
    formats, bits = np.atleast_1d(tags.get(SAMPLE_FORMAT, UNSIGNED)), np.atleast_1d(tags.get(BITS_PER_SAMPLE, 1))
    if (formats != UNSIGNED).any():
        raise ValueError(
            "its pixels are signed numbers or floats, and nothing tells which is white; save it with 8 or 16 bits"
        )
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
        sixteen = np.asarray(picture).astype(np.float64)
        return in_srgb(PIL.Image.fromarray((sixteen / 257).round().astype(np.uint8)), profile)
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


def write_png(path: Path, pixels: PictureBytes, header: bytes = b"") -> None:
    """Write one picture (3 h w, uint8) so that the file appears whole or not at all."""
    write_whole(path, png_bytes(pixels, header))


def png_bytes(pixels: PictureBytes, header: bytes = b"") -> bytes:
    """One picture (3 h w, uint8) as a PNG file with a public header."""
    if len(header) > MAX_HEADER:
        raise ValueError(f"its header would have {len(header)} bytes; it can have at most {MAX_HEADER}")
    info = PngInfo()
    if header:
        info.add(HEADER_CHUNK, header)
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy()).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def read_png(path: Path, data: bytes | None = None) -> tuple[PictureBytes, bytes]:
    """One picture (3 h w, uint8) and its public header, b"" where the file has none; BadPicture names the file.

    `data` are the file's bytes where they are already read.
    A file of more than 512 MiB is not looked into; two headers, or one of more than 1 MiB, are refused.
    """
    try:
        size = path.stat().st_size if data is None else len(data)
        if size > MAX_FILE:
            raise ValueError(f"its {size} bytes are more than {MAX_FILE}")
        with PIL.Image.open(path if data is None else io.BytesIO(data)) as picture:
            picture.load()
            headers = [chunk[1] for chunk in getattr(picture, "private_chunks", []) if chunk[0] == HEADER_CHUNK]
            if len(headers) > 1:
                raise ValueError(f"it has {len(headers)} headers, and nothing tells which is the picture's")
            if headers and len(headers[0]) > MAX_HEADER:
                raise ValueError(f"its header has {len(headers[0])} bytes; it can have at most {MAX_HEADER}")
            # what optimizers of files leave of 8-bit RGB without loss, and nothing else
            if picture.mode not in ("RGB", "L", "P", "1") or picture.has_transparency_data:
                raise ValueError(f"it has pixels of mode {picture.mode}, or transparent ones; published files are RGB")
            pixels = np.array(picture.convert("RGB"), dtype=np.uint8)
    except UNREADABLE as error:
        raise BadPicture(f"{path}: not a readable picture ({error})") from error
    return torch.from_numpy(pixels).permute(2, 0, 1), headers[0] if headers else b""


def jpeg(pixels: PictureBytes, quality: int) -> PictureBytes:
    """One picture (3 h w, uint8) after a JPEG round trip at `quality` (Pillow's tables, 4:2:0)."""
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy()).save(buffer, "JPEG", quality=quality)
    with PIL.Image.open(buffer) as picture:
        return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
