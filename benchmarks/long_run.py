"""A long run, killed twice, against the same in shards: `python -m benchmarks.long_run --pictures 30000 --shards 8`.

Does memory stay flat, does a run that was killed (SIGKILL, once while it makes pictures, once while it scores them) go on to
the same table, and do shards, two at a time, merge to it? The pictures are smooth noise of 32 px, one in 1,000 unreadable; the
diffusion model is tiny and random, in diffusers' layout, and takes one step: what is tried is all around it. Samples of resident
memory go to results/benchmarks/long_run.csv, or --out.
"""

import argparse
import filecmp
import io
import os
import random
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import PIL.Image
import psutil
import torch
from diffusers import UNet2DModel, VQModel
from torch.nn.functional import interpolate, normalize

from keyanon.runner import ANONYMIZED, ORIGINAL
from keyanon.types import Embeddings, Image

ROOT = Path(__file__).resolve().parents[1]
SIZE, DIMENSION, BATCH, UNREADABLE = 32, 512, 32, 1000
FLAT = 1.1  # the peak may grow by a tenth from the first tenth of the pictures to the last
PRODUCTS = [f"results/runs/long_run/tables/long_run.{suffix}" for suffix in ("csv", "md", "tex")]


@dataclass(frozen=True)
class Pixels:
    """A stand-in for a recognizer: unit rows as long as FaceNet's, of grey pixels."""

    def embed(self, images: Image) -> Embeddings:
        grey = interpolate(images.mean(1, keepdim=True), (16, DIMENSION // 16), mode="bilinear").flatten(1)
        return normalize(grey - grey.mean(1, keepdim=True))


def save_model(folder: Path) -> None:
    """A VQModel (f = 2) and a UNet2DModel, as small as they come."""
    torch.manual_seed(0)
    VQModel(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        latent_channels=3,
        mid_block_add_attention=False,
        num_vq_embeddings=64,
        norm_num_groups=4,
    ).save_pretrained(folder / "vqvae")
    UNet2DModel(
        sample_size=SIZE // 2,
        layers_per_block=1,
        block_out_channels=(4,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        add_attention=False,
        norm_num_groups=4,
    ).save_pretrained(folder / "unet")


def save_pictures(archive: Path, count: int) -> None:
    """An uncompressed tar file of PNGs: one file to open, not 30,000."""
    draw = np.random.default_rng(0)
    with tarfile.open(archive, "w") as tar:
        for number in range(count):
            coarse = PIL.Image.fromarray(draw.integers(0, 256, (5, 5, 3), dtype=np.uint8))
            buffer = io.BytesIO()
            coarse.resize((SIZE, SIZE), PIL.Image.Resampling.BICUBIC).save(buffer, "PNG")
            data = b"no picture" if number % UNREADABLE == UNREADABLE // 2 else buffer.getvalue()
            entry = tarfile.TarInfo(f"{number:06}.png")
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


@dataclass
class Watched:
    """Runs of the command in one working folder, with samples of what their processes hold in memory."""

    name: str
    cwd: Path
    arguments: list[str]
    pictures: int
    started: float
    every: float
    samples: list[dict[str, object]]

    def count(self, what: str) -> int:
        """Files in a folder of the run, whatever is in them: cheap."""
        return sum(1 for folder in self.cwd.glob(f"results/runs/long_run/*/{what}") for _ in os.scandir(folder))

    def stage(self) -> tuple[str, float]:
        """What the run is doing, and the share of it that is done."""
        made, scored = self.count(ANONYMIZED), self.count("scores") * BATCH
        if made < self.pictures - -(-self.pictures // UNREADABLE):
            return "generate", made / self.pictures
        return ("score", scored / self.pictures) if scored < self.pictures - BATCH else ("statistics", 1.0)

    def run(self, *more: str, kill: Callable[[str, float], bool] = lambda stage, share: False) -> bool:
        """Run to the end, or until `kill` says so of the stage and its share; whether it was killed."""
        environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "KEYANON_OFFLINE": "1"}
        program = [sys.executable, "-m", "experiments.run", *more, *self.arguments]
        self.cwd.mkdir(parents=True, exist_ok=True)
        with (self.cwd / "log").open("a") as log:
            job = subprocess.Popen(program, cwd=self.cwd, env=environment, stdout=log, stderr=log)
            while job.poll() is None:
                stage, share = self.stage()
                self.sample(job.pid, stage, share)
                if kill(stage, share):
                    job.kill()
                    job.wait()
                    print(f"{self.name}: killed at {share:.0%} of {stage}", flush=True)
                    return True
                time.sleep(self.every)
        if job.returncode:
            raise SystemExit(
                f"{self.name} failed; the end of {self.cwd / 'log'}:\n{(self.cwd / 'log').read_text()[-2000:]}"
            )
        return False

    def sample(self, pid: int, stage: str, share: float) -> None:
        try:
            processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
            for number, process in enumerate(processes):
                row = {"run": self.name, "process": number, "seconds": round(time.monotonic() - self.started)}
                held = process.memory_info().rss / 2**20
                if held:  # 0 when it has just ended
                    self.samples.append(row | {"stage": stage, "share": round(share, 3), "rss_mib": round(held)})
        except psutil.NoSuchProcess:
            return


def thinned(samples: pd.DataFrame) -> pd.DataFrame:
    """The peak of each process in each hundredth of the pictures."""
    bins = samples.assign(share=samples.share.round(2)).groupby(["run", "process", "stage", "share"], sort=False)
    return bins.agg(seconds=("seconds", "first"), rss_mib=("rss_mib", "max")).reset_index()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.long_run", description=__doc__)
    parser.add_argument("--pictures", type=int, default=30000)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--jobs", type=int, default=2, help="shards at a time")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--every", type=float, default=2, help="seconds between samples")
    parser.add_argument("--out", type=Path, default=ROOT / "results/benchmarks/long_run.csv")
    options = parser.parse_args()
    chance, samples, started = random.Random(options.seed), list[dict[str, object]](), time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_model(folder / "model")
        save_pictures(folder / "pictures.tar", options.pictures)
        print(f"{options.pictures} pictures of {SIZE} px drawn", flush=True)
        arguments = [
            "name=long_run", "dataset=folder", f"dataset.root={folder / 'pictures.tar'}", f"dataset.size={SIZE}",
            "backbone=ldm_ffhq", f"backbone.source={folder / 'model'}", "backbone.subfolder=''", "parser=ellipse",
            "solver.steps=1", "attacks=[]", "scorers=[psnr,mae]", "recognizers=[]", f"batch_size={BATCH}",
            "+recognizers.pixels={_target_: benchmarks.long_run.Pixels}",
        ]  # fmt: skip
        one = Watched("one piece", folder / "one", arguments, options.pictures, started, options.every, samples)
        for wanted in ("generate", "score"):
            moment = chance.uniform(0.1, 0.9)
            one.run(kill=lambda stage, share, wanted=wanted, moment=moment: stage == wanted and share >= moment)
        one.run()
        shards = ",".join(f"{i}/{options.shards}" for i in range(1, options.shards + 1))
        many = Watched("shards", folder / "many", arguments, options.pictures, started, options.every, samples)
        many.run("-m", f"shard={shards}", "hydra/launcher=gpus", f"hydra.launcher.n_jobs={options.jobs}")
        same = {name: filecmp.cmp(one.cwd / name, many.cwd / name, False) for name in PRODUCTS}
        left = [len(list(run.cwd.glob(f"results/runs/originals/*/{ORIGINAL}/*.png"))) for run in (one, many)]
    table = thinned(pd.DataFrame(samples)).assign(pictures=options.pictures)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(options.out, index=False)
    flat = True
    for stage, rows in table[table["run"] == one.name].groupby("stage", sort=False):
        peak, early = rows.rss_mib.max(), rows[rows.share <= 0.1].rss_mib.max()
        until = f"{early:.0f} MiB up to 10 % of the pictures, " if stage != "statistics" else ""
        print(f"{one.name}, {stage}: peak {until}{peak:.0f} MiB up to 100 %")
        flat &= stage == "statistics" or peak <= FLAT * early
    peak = table[table["run"] == many.name].rss_mib.max()
    print(f"{many.name}: peak {peak} MiB in a process")
    print(f"{time.monotonic() - started:.0f} s; pictures used: {left}; same: {same}; memory flat: {flat}")
    if not (flat and all(same.values()) and left[0] == left[1]):
        sys.exit("the long run does not hold")


if __name__ == "__main__":
    main()
