"""What only a person can bring to experiments, told before anything is installed or fetched: `python -m experiments.brought table1`

Needs no package but Python's own: `make reproduce-table1` begins with it on a machine that has nothing. It looks whether a folder
holds pictures in their places; the preflight, whether they are the right ones.
"""

import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from keyanon.faces import obtain

CONF = Path(__file__).resolve().parents[1] / "conf"
NOT_READY = 2  # exit code, as the preflight's
# By the variable that names the folder: what it is called, where it is to be had, an example, and where its pictures lie below.
COLLECTIONS = {
    "KEYANON_CELEBAHQ": ("CelebA-HQ", obtain.CELEBAHQ, "/path/to/CelebAMask-HQ", ("CelebA-HQ-img/*.jpg", "*.jpg", "*.png")),
    "KEYANON_LFW": ("LFW", obtain.LFW, "/path/to/lfw", ("*/*.jpg", "*/*/*.jpg", "*/*/*/*.jpg")),
    "KEYANON_FFHQ": (
        "FFHQ", obtain.FFHQ.format(version="images1024x1024"), "/path/to/ffhq", ("*.png", "*/*.png", "*/*/*.png"),
    ),
    "KEYANON_DATA": (
        "trial faces", "28 CelebA-HQ pictures or 1,300 grey LFW pairs, see docs/tutorial.md.", "/path/to/data", ("*/*",),
    ),
}  # fmt: skip


def datasets(name: str) -> list[str]:
    """The datasets that an experiment asks for: `override /dataset: celebahq`, or those of a sweep, `dataset: celebahq,lfw`."""
    texts = [path.read_text("utf-8") for path in places(name)]
    found = re.findall(r"^ *(?:- )?(?:override )?/?dataset: *([\w, ]+)$", "\n".join(texts[:1]), re.MULTILINE)
    found = found or re.findall(r"^ *- dataset: *(\w+)$", "\n".join(texts[1:]), re.MULTILINE)
    return list(dict.fromkeys(one.strip() for each in found for one in each.split(",")))


def places(name: str) -> list[Path]:
    """The files that say what an experiment is, its own first; raises SystemExit where there is none."""
    found = [path for path in (CONF / "experiment" / f"{name}.yaml", CONF / f"{name}.yaml") if path.is_file()]
    if not found:
        raise SystemExit(f"keyanon: there is no experiment {name!r}, which conf/experiment/{name}.yaml would be")
    return found


def missing(names: Iterable[str]) -> list[str]:
    """A line for each collection of pictures that is not here."""
    wanted = dict.fromkeys(dataset for name in names for dataset in datasets(name))
    texts = [(CONF / "dataset" / f"{dataset}.yaml").read_text("utf-8") for dataset in wanted]
    lines: dict[str, None] = {}
    for variable in dict.fromkeys(found for text in texts for found in re.findall(r"oc\.env:(KEYANON_\w+)", text)):
        name, source, example, pictures = COLLECTIONS[variable]
        folder = os.environ.get(variable)
        if (why := lacking(folder, pictures)) is None:
            continue
        say = f"{name}: {why}. To be had: {source}\n  Then say where it is: export {variable}={folder or example}"
        lines[say] = None
    return list(lines)


def lacking(folder: str | None, pictures: Sequence[str]) -> str | None:
    """Why a folder is no collection; None where any of the patterns finds a picture below it."""
    if not folder:
        return "not here"
    place = Path(folder).expanduser()
    if not place.is_dir():
        return f"there is no folder {folder}"
    if not any(True for pattern in pictures for _ in place.glob(pattern)):
        return f"{folder} holds none of its pictures; looked for {', '.join(pictures)}"
    return None


def main(names: Sequence[str]) -> int:
    lines = missing(names)
    if not lines:
        return 0
    print(
        "keyanon: nothing was fetched or installed. These pictures only you can bring:",
        *(f"- {line}" for line in lines),
        "Everything else is fetched by the same command, once they are there.",
        sep="\n",
        file=sys.stderr,
    )
    return NOT_READY


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
