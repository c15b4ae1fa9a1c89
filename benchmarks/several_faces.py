"""Pictures of one to six faces through every shipped method that runs here: faces published in clear, and how many unreported.

Each picture is composed of bundled synthetic faces, 48 to 110 px a side, on a plain, noisy or graded ground of 128 px (one or two
faces) or 256 px (up to six). So it is known where faces are. A picture is refused if the parser finds no face on it, or the method
says why it cannot take it. In clear is a face whose place on the published picture is alike by 0.75 (keyanon/measures/clear.py).
Unreported are those on pictures that a run's check does not name. That check looks where MTCNN (0.6, 0.7, 0.7; 20 px) and dlib's
HOG detector (0; 80 px) find faces on the original, and where dlib's network (0) does on the published one.
"""

import argparse
import csv
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from numpy.typing import NDArray

from experiments.harness import preflight
from keyanon.channel.keys import experiment_key
from keyanon.channel.pixels import from_pil, to_bytes, to_floats
from keyanon.errors import UserError
from keyanon.faces.datasets import bundled_faces
from keyanon.faces.detection import DlibCnnDetector, Points
from keyanon.faces.finding import Finder
from keyanon.measures.clear import SAME_PICTURE, alike, in_clear
from keyanon.types import Picture

CONF = Path(__file__).parents[1] / "conf"
COLUMNS = ["method", "pictures", "faces", "refused", "in_clear", "unreported", "seconds", "note"]
SLOW = {"exact", "signflip", "noise_flip", "nullface_core", "ldfa_core"}  # a diffusion model: seconds a picture
GROUNDS = ("plain", "noisy", "graded")


@dataclass(frozen=True, eq=False)
class Composed:
    """A picture and the places of its faces, boxes (4,)."""

    picture: Picture
    places: Sequence[Points]


def compositions(count: int, seed: int = 0) -> Iterator[Composed]:
    """Pictures of 1 to 6 faces, one in four of them 128 px wide and the others 256."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        small = i % 4 == 0
        sides = (
            rng.integers(48, 64, 1 + i // 4 % 2)
            if small
            else rng.integers(48, (110, 110, 90, 80, 76, 76)[i % 6], 1 + i % 6)
        )
        yield composed(128 if small else 256, sides, GROUNDS[i % 3], rng)


def composed(size: int, sides: Sequence[int] | NDArray[np.int64], ground: str, rng: np.random.Generator) -> Composed:
    """A square picture with a bundled face of each side in it, none over another; `ground` is one of GROUNDS."""
    dataset, picture = bundled_faces(), grounds(size, ground, rng)
    places = layout(size, sorted(map(int, sides), reverse=True), rng)
    for place in places:
        left, top, right, bottom = place
        face = to_bytes(dataset.load(dataset.ids[int(rng.integers(len(dataset.ids)))])).permute(1, 2, 0).numpy()
        picture[top:bottom, left:right] = np.asarray(PIL.Image.fromarray(face).resize((right - left, bottom - top)))
    return Composed(from_pil(PIL.Image.fromarray(picture)), [place.astype(float) for place in places])


def layout(size: int, sides: Sequence[int], rng: np.random.Generator) -> list[NDArray[np.int64]]:
    """Squares at random, none over another: all are thrown again until they fit."""
    while True:
        corners = [rng.integers(0, size - side + 1, 2) for side in sides]
        places = [np.concatenate([corner, corner + side]) for corner, side in zip(corners, sides, strict=True)]
        if not any(touches(a, b) for i, a in enumerate(places) for b in places[:i]):
            return places


def touches(a: NDArray[np.int64], b: NDArray[np.int64]) -> bool:
    return bool((np.maximum(a[:2], b[:2]) < np.minimum(a[2:], b[2:])).all())


def grounds(size: int, ground: str, rng: np.random.Generator) -> NDArray[np.uint8]:
    first, last = rng.integers(40, 216, (2, 3))
    share = np.linspace(0, 1, size)[:, None, None] if ground == "graded" else np.zeros((size, 1, 1))
    noise = rng.normal(0, 8, (size, size, 3)) if ground == "noisy" else 0
    return np.broadcast_to(np.clip((1 - share) * first + share * last + noise, 0, 255), (size, size, 3)).astype(
        np.uint8
    )


def row(name: str, pictures: Sequence[Composed], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """One method on pictures, one by one."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", overrides=[f"anonymizer={name}", *overrides])
    method, parser, finder = (instantiate(part, _convert_="all") for part in (cfg.anonymizer, cfg.parser, cfg.finder))
    if problems := preflight.missing_parts(method, parser):
        return {"method": name, "pictures": 0, "note": f"not run: {problems[0].splitlines()[0][:60]}"}
    second, key, count, start = DlibCnnDetector(), experiment_key(), Counter[str](), time.perf_counter()
    for number, each in enumerate(pictures):
        count["pictures"] += 1
        count["faces"] += len(each.places)
        original = to_floats(to_bytes(each.picture))[None]
        left = remaining(method, parser, finder, second, key, original, str(number), each.places)
        count.update(left)
    return {"method": name, **count, "seconds": round(time.perf_counter() - start), "note": method.about.kind}


def remaining(method, parser, finder: Finder, second, key, original, id: str, places) -> dict[str, int]:  # type: ignore[no-untyped-def]
    """Of one picture: whether it is refused, or else its faces in clear and those of them that no check counts."""
    if not parser.mask(original, (original.shape[-2], original.shape[-1])).any():
        return {"refused": 1}
    try:
        published = to_floats(method.anonymize(original, [key], [id]).images)
    except UserError:
        return {"refused": 1}
    clear = sum(alike(original[0], published[0], place) >= SAME_PICTURE for place in places)
    if not clear:
        return {"in_clear": 0}  # nothing that could go unreported
    looked = [face.box for face in (*finder.found(original)[0], *second.faces(published)[0])]
    return {"in_clear": clear, "unreported": 0 if in_clear(original[0], published[0], looked) else clear}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.several_faces", description=__doc__)
    parser.add_argument("--pictures", type=int, default=200, help="for methods without a diffusion model")
    parser.add_argument("--seed", type=int, default=0, help="of the compositions")
    parser.add_argument("--slow", type=int, default=6, help="pictures for methods with one")
    parser.add_argument(
        "--methods", nargs="*", default=sorted(path.stem for path in (CONF / "anonymizer").glob("*.yaml"))
    )
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks/several_faces"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    pictures = list(compositions(args.pictures, args.seed))
    rows: list[dict[str, Any]] = []
    for name in args.methods:
        made = row(name, pictures[: args.slow] if name in SLOW else pictures)
        rows.append(dict.fromkeys(COLUMNS, 0) | made if made["pictures"] else dict.fromkeys(COLUMNS, "") | made)
        print(*rows[-1].values(), flush=True)
        write(rows, args.output)


def write(rows: Sequence[dict[str, Any]], output: Path) -> None:
    with output.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    lines = [COLUMNS, ["---"] * len(COLUMNS), *([row[column] for column in COLUMNS] for row in rows)]
    table = "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
    output.with_suffix(".md").write_text(f"# Faces in clear\n\n{__doc__}\n{table}\n", "utf-8")


if __name__ == "__main__":
    main()
