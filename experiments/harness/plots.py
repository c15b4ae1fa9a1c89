"""Figures: the contact sheet that shows at a glance what a run did, the sweep of right signs, and wrong keys beside strangers."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import Tensor

from keyanon.attacks.pairs import FRESH, IMPOSTORS, STRANGERS, WRONG_KEYS
from keyanon.channel.whole import write_whole

GAP = 4
FONT_SIZE = 14
# Lines of the figure of wrong keys: what each is called, the views whose cosines it is of, and how it is drawn.
BESIDE_WRONG_KEYS = {
    "wrong keys, four kinds": (WRONG_KEYS, "-"),
    "fresh faces, same background": ((FRESH,), "--"),
    "strangers, clean": ((STRANGERS,), ":"),
    "impostors, clean": ((IMPOSTORS,), "-."),
}


def contact_sheet(columns: Mapping[str, Sequence[Tensor]], path: Path, *, public: bool = False) -> None:
    """Write a labelled grid: a column for each view, a row for each picture; as PNG every pixel as it is.

    Args:
        columns: pictures (3 h w, uint8) of each view, the same ones in the same order.
        path: a PNG, or a smaller, lossy WebP by its suffix; its folder is made if it does not exist.
        public: it shows no original, and others may read it.

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
    sheet.save(buffer, path.suffix[1:], quality=85)  # of WebP; PNG has none
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, buffer.getvalue(), public=public)


def share_curve(statistics: pd.DataFrame, prefix: str, path: Path) -> bool:
    """Write the cosine, and the share that is accepted, over the share in the views' names as SVG.

    Args:
        statistics: rows with view, scorer, statistic, value, low and high; counted are those of views as "right signs  98.0 %",
            the statistic `mean` and those that begin with `tar@`.
        prefix: of the views' names, as "right signs ".
        path: the SVG; nothing is written, and False returned, if there is no such view.
    """
    share = statistics["view"].str.extract(rf"^{prefix}\s*([\d.]+) %$")[0].astype(float)
    rows = statistics.assign(share=share).dropna(subset="share").sort_values("share")
    panels = {
        "cosine to a clean picture": rows["statistic"] == "mean",
        "share accepted": rows["statistic"].str.startswith("tar@"),
    }
    if rows.empty:
        return False
    told_apart = [
        column for column in ("dataset", "protocol", "anonymizer") if column in rows and rows[column].nunique() > 1
    ]
    figure = Figure(figsize=(9, 3.5), dpi=100, layout="constrained")
    for axes, (title, chosen) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for names_of_line, line in rows[chosen].groupby([*told_apart, "scorer"]):
            axes.plot(line["share"], line["value"], marker="o", markersize=3, label=" ".join(map(str, names_of_line)))
            axes.fill_between(line["share"], line["low"], line["high"], alpha=0.2)
        names = rows.loc[chosen, "statistic"].unique()
        axes.set(
            xlabel=f"{prefix.strip()}, %", ylabel=title if names[:1] == ["mean"] else f"{title} ({', '.join(names)})"
        )
        axes.grid(alpha=0.3)
        axes.legend()
    write_svg(figure, path)
    return True


def wrong_key_curves(pairs: pd.DataFrame, path: Path) -> bool:
    """Write distribution functions of cosines to the right person as SVG: under wrong keys, and of those who are somebody else.

    Args:
        pairs: rows with dataset, protocol, anonymizer, view, scorer and score, as scores/NAME.pairs.parquet has them; counted are
            the views of BESIDE_WRONG_KEYS. A panel for each method, protocol and recognizer. Titles name protocols
            where there are several.
        path: the SVG; nothing is written, and False returned, if no cosine is under a wrong key.
    """
    rows = pairs.dropna(subset="score")
    if not rows["view"].isin(WRONG_KEYS).any():
        return False
    methods = rows[["dataset", "protocol", "anonymizer"]].drop_duplicates().itertuples(index=False)
    several = rows["protocol"].nunique() > 1
    places, scorers = sorted(map(tuple, methods)), sorted(rows["scorer"].unique())
    figure = Figure(figsize=(4.5 * len(scorers), 3.2 * len(places)), dpi=100, layout="constrained")
    panels = figure.subplots(len(places), len(scorers), squeeze=False, sharex="col")
    for (dataset, protocol, anonymizer), line in zip(places, panels, strict=True):
        for scorer, axes in zip(scorers, line, strict=True):
            place = ["dataset", "protocol", "anonymizer", "scorer"]
            own = rows[(rows[place] == (dataset, protocol, anonymizer, scorer)).all(axis=1)]
            for name, (views, style) in BESIDE_WRONG_KEYS.items():
                cosines = own.loc[own["view"].isin(views), "score"]
                if len(cosines):
                    axes.ecdf(cosines, linestyle=style, label=f"{name} ({len(cosines)})")
            title = ", ".join([anonymizer, dataset, *([protocol] if several else [])])
            axes.set(title=title, xlabel=f"{scorer}: cosine to the right person", ylabel="share up to")
            axes.grid(alpha=0.3)
            axes.legend(fontsize="small", loc="lower right")
    write_svg(figure, path)
    return True


def write_svg(figure: Figure, path: Path) -> None:
    """Write a figure, the same bytes for the same numbers; its folder is made if it does not exist."""
    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "keyanon"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, buffer.getvalue(), public=True)
