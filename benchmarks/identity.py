"""What it costs that a run is what it is made of: `python -m benchmarks.identity --pictures 30000`.

Pictures of noise, 128 px, are hashed, prepared, and looked at again by a second run. Reported are seconds for all pictures, and
their share in a run whose method takes `--seconds` a picture (the bundled model on a CPU takes some tenths). Rows go to
results/benchmarks/identity.csv.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import PIL.Image

from keyanon import runner
from keyanon.faces.datasets import Folder
from keyanon.faces.parsing import EllipseParser
from keyanon.run_folder import MASK, ORIGINAL, RunFiles
from keyanon.sources import Digests

SIZE = 128


def save_pictures(folder: Path, count: int) -> None:
    """Noise does not compress: files as large as photographs of twice the size."""
    draw = np.random.default_rng(0)
    for number in range(count):
        PIL.Image.fromarray(draw.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).save(folder / f"{number:05}.png")


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=30000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=0.1, help="that the method takes a picture")
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks/identity.csv"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        pictures = Path(home, "pictures")
        pictures.mkdir()
        save_pictures(pictures, args.pictures)
        time.sleep(3)  # digests of files that were written a moment ago are not remembered
        dataset = Folder(str(pictures), SIZE)
        ids = dataset.ids

        def fresh() -> tuple[dict[str, str], Digests, RunFiles]:
            contents: dict[str, str] = {}
            return contents, Digests(Path(home, "contents")), RunFiles(Path(home, "originals"), contents)

        def prepare() -> None:
            contents, digests, originals = fresh()
            runner.prepare(originals, contents, digests, dataset, ids, EllipseParser(), args.batch)

        def look() -> None:
            contents, digests, originals = fresh()
            runner.identify(contents, digests, dataset, ids, unread=False)
            assert all(originals.has(view, id) for view in (ORIGINAL, MASK) for id in ids)

        rows = {
            "hash every file, for the first time": seconds(
                lambda: runner.identify({}, Digests(Path(home, "other")), dataset, ids)
            ),
            "prepare: read, find faces, write, hash": seconds(prepare),
            "a second run: prepare again, nothing to do": seconds(prepare),
            "see which files are there": seconds(look),
        }
    table = pd.DataFrame({"what": rows.keys(), "pictures": args.pictures, "seconds": rows.values()})
    whole = args.pictures * args.seconds
    table["percent_of_run"] = 100 * table["seconds"] / whole
    args.out.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(args.out, index=False, float_format="%.3g")
    print(table.to_string(index=False))


if __name__ == "__main__":
    main()
