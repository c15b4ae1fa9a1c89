"""Figures of pictures: the contact sheet that shows at a glance what a run did."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
from torch import Tensor

from keyanon.images import write_whole

GAP = 4
FONT_SIZE = 14


def contact_sheet(columns: Mapping[str, Sequence[Tensor]], path: Path) -> None:
    """Write a labelled grid as PNG: a column for each view, a row for each picture, every pixel as it is.

    Args:
        columns: pictures (3 h w, uint8) of each view, the same ones in the same order.
        path: the PNG; its folder is made if it does not exist.

    Raises:
        ValueError: no pictures, or a view has more of them than another.
    """
    counts = {view: len(pictures) for view, pictures in columns.items()}
    if len(set(counts.values())) != 1 or 0 in counts.values():
        raise ValueError(f"{path}: a contact sheet needs the same pictures of every view, got {counts}")
    font = PIL.ImageFont.load_default(FONT_SIZE)
    top = FONT_SIZE + 2 * GAP
    height = max(picture.shape[1] for pictures in columns.values() for picture in pictures)
    widths = {
        view: max(round(font.getlength(view)), *(picture.shape[2] for picture in pictures))
        for view, pictures in columns.items()
    }
    rows = next(iter(counts.values()))
    size = (GAP + sum(width + GAP for width in widths.values()), top + rows * (height + GAP))
    sheet = PIL.Image.new("RGB", size, "white")
    draw = PIL.ImageDraw.Draw(sheet)
    left = GAP
    for view, pictures in columns.items():
        draw.text((left + widths[view] / 2, GAP), view, fill="black", font=font, anchor="ma")
        for row, picture in enumerate(pictures):
            pixels = PIL.Image.fromarray(picture.permute(1, 2, 0).cpu().numpy())
            sheet.paste(pixels, (left + (widths[view] - pixels.width) // 2, top + row * (height + GAP)))
        left += widths[view] + GAP
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, buffer.getvalue())
