"""The only place where value ranges change: bytes 0 .. 255 <-> floats in [-1, 1], and PNG files with a public header.

The header travels in a private ancillary chunk of the PNG (PNG specification 3, chunk naming conventions: `kaNO`, not
safe to copy after the pixels were edited), so any viewer shows the picture and any editor drops the chunk.
"""

import io
import struct
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from jaxtyping import Float, UInt8
from PIL.PngImagePlugin import PngInfo
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
)


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
    """A picture file of any common format as RGB, upright as its EXIF data says; BadPicture names the file.

    `data` are the file's bytes where `path` only names it, as inside an archive.
    """
    try:
        with PIL.Image.open(path if data is None else io.BytesIO(data)) as picture:
            return PIL.ImageOps.exif_transpose(picture).convert("RGB")
    except UNREADABLE as error:
        raise BadPicture(f"{path}: not a readable picture ({error})") from error


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
