"""`make reproduce-...` on a machine that has nothing: stand-ins under the real names, from a hub and a mirror on this machine.

    make rehearsal      all targets, from nothing to their tables, killed on the way; what it prints is in docs/tutorial.md

Tests take the pieces (tests/test_rehearsal.py). The cards are the real ones but for the SHA-256 of the stand-ins: KEYANON_CARDS
names the file, and the real cards are left alone.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import file_digest
from pathlib import Path
from urllib.parse import urlsplit

import PIL.Image
import yaml

from keyanon.faces.datasets import read_list
from keyanon.weights import CARDS, Hub, Release
from tests import stand_ins
from tests.conftest import ROOT
from tests.hub import Site, serving

HAS = 3  # pictures of CelebA-HQ that the machine has
PEOPLE = ("Ada_Able", "Bo_Baker")  # of LFW
SOCKET = "forked.sock"
# Settings of every target: small pictures and one step, for the time; and who reads a table has to know.
ARGS = "solver.steps=1 dataset.size=64 batch_size=1 notes=[rehearsal\\ on\\ random\\ weights]"
HUB = "PolLabarbarie/diffusion-signflip-anon-face"
# Of that repository nothing of this is asked for.
BESIDE = {
    f"{HUB}/keys/key_1.pt": b"the authors' keys, which nobody needs" * 1000,
    f"{HUB}/{stand_ins.ANY_FOLDER}/landmarks_5/controlnet_epoch_15.pth": b"another control network" * 1000,
}


def stock(site: Path, cards: Path) -> None:
    """Fill a site with all stand-ins, and write the cards that go with them."""
    entries = {entry["name"]: entry for entry in yaml.safe_load((ROOT / "keyanon" / "cards.yaml").read_text("utf-8"))}
    for place_in_hub, save in stand_ins.MODELS.items():
        save(site / "hub" / place_in_hub)
    for place_in_hub, data in BESIDE.items():
        beside = site / "hub" / place_in_hub
        beside.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(data)
    for name, write in stand_ins.CARDS.items():
        match CARDS[name].origin:
            case Release(url=url, member=None):
                file = site / "releases" / urlsplit(url).netloc / urlsplit(url).path.removeprefix("/")
            case Hub(repo=repo, files=(path,)):
                file = site / "hub" / repo / path.replace("*", f"{stand_ins.ANY_FOLDER}/")
            case other:
                raise TypeError(f"{name}: no site has {other}")
        file.parent.mkdir(parents=True, exist_ok=True)
        write(file)
        with file.open("rb") as opened:
            entries[name]["sha256"] = file_digest(opened, "sha256").hexdigest()
    whole = cards.with_suffix(".part")
    whole.write_text(yaml.safe_dump(list(entries.values())), "utf-8")
    whole.replace(cards)


def bring(folder: Path) -> dict[str, str]:
    """What only a person can bring, made of the bundled synthetic faces in the official layouts; the variables that name it."""
    faces = sorted((ROOT / "keyanon" / "assets" / "faces").glob("*.webp"))
    celebahq, lfw = folder / "CelebAMask-HQ", folder / "lfw"
    (celebahq / "CelebA-HQ-img").mkdir(parents=True)
    for place, name in enumerate(read_list("celebahq")[:HAS]):
        PIL.Image.open(faces[place]).resize((512, 512)).save(celebahq / "CelebA-HQ-img" / f"{name}.jpg")
    for place, person in enumerate(PEOPLE):
        (lfw / person).mkdir(parents=True)
        for picture in (1, 2):
            face = PIL.Image.open(faces[HAS + place]).resize((250, 250))
            face.rotate(4 * picture).save(lfw / person / f"{person}_{picture:04}.jpg")
    strangers = f"{PEOPLE[0]}\t1\t{PEOPLE[1]}\t1"
    for name, person in zip(("pairsDevTrain.txt", "pairsDevTest.txt"), PEOPLE, strict=True):
        (lfw / name).write_text(f"1\n{person}\t1\t2\n{strangers}\n")
    return {"KEYANON_CELEBAHQ": str(celebahq), "KEYANON_LFW": str(lfw)}


@dataclass
class Machine:
    """A machine that has this checkout, Python's packages and nothing else."""

    folder: Path
    site: Site
    environment: dict[str, str]
    run: str  # make's RUN
    limit: int = 1

    @property
    def checkout(self) -> Path:
        return self.folder / "checkout"

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    def start(self, *targets: str, **variables: str) -> subprocess.Popen[str]:
        """`make TARGETS` in a session of its own, so that it can be killed with all that it started."""
        asked = {"LIMIT": str(self.limit), "ARGS": ARGS} | variables
        command = ["make", *targets, f"RUN={self.run}", "INSTALLED=", f"PYTHON={sys.executable}"]
        return subprocess.Popen(
            [*command, *(f"{name}={value}" for name, value in asked.items())],
            cwd=self.checkout, env=self.environment, text=True, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def make(self, *targets: str, **variables: str) -> tuple[int, str]:
        """Exit code of make, and all that was printed."""
        process = self.start(*targets, **variables)
        printed, _ = process.communicate()
        return process.returncode, printed

    def kill(self, process: subprocess.Popen[str]) -> str:
        """SIGKILL make and whatever it started; what was printed until then."""
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        for started in self.folder.glob("*.pid"):  # forked commands, which are of no session of make's
            with suppress(ProcessLookupError, FileNotFoundError):
                os.kill(int(started.read_text()), signal.SIGKILL)
        return process.communicate()[0]

    def tables(self) -> list[str]:
        return sorted(path.stem for path in (self.checkout / "results" / "tables").glob("*.csv"))


@contextmanager
def machine(folder: Path, forked: bool = True) -> Iterator[Machine]:
    """A machine with an empty cache, and the site that it fetches from.

    With `forked` its commands are forked from one process that has imported what they import; else each is a process of its own.
    """
    checkout = folder / "checkout"
    for name in ("experiments", "conf", "results/paper"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    (checkout / "keyanon").symlink_to(ROOT / "keyanon")
    shutil.copy(ROOT / "Makefile", checkout)
    # a socket's path has at most 107 characters
    with serving(folder / "site") as site, tempfile.TemporaryDirectory() as short:
        own = {name: value for name, value in os.environ.items() if not name.startswith(("KEYANON_", "HF_", "MAKE"))}
        own.pop("ACCEPT_LICENCES", None)
        own |= {
            "PYTHONPATH": str(checkout), "HF_ENDPOINT": site.url, "KEYANON_MIRROR": f"{site.url}/releases",
            "HF_HOME": str(folder / "hf"), "KEYANON_CACHE": str(folder / "cache"), "KEYANON_CARDS": str(folder / "cards.yaml"),
            "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONWARNINGS": "ignore",
            "FORKED_PID": str(folder),
        }  # fmt: skip
        program, socket = ROOT / "tests" / "forked.py", Path(short, SOCKET)
        command = [sys.executable, str(program), "serve", str(socket)]
        server = subprocess.Popen(command, cwd=checkout, env=own) if forked else None
        try:
            stock(folder / "site", folder / "cards.yaml")
            while server is not None and not socket.exists():
                if server.poll() is not None:
                    raise RuntimeError(f"{program} ended with {server.returncode}")
                time.sleep(0.05)
            python = f"{sys.executable} -SE {program} {socket}" if forked else f"{sys.executable} -m"
            yield Machine(folder, site, own, python)
        finally:
            if server is not None:
                server.kill()
                server.wait()


def wait_for(happened: Callable[[], object], process: subprocess.Popen[str], seconds: float = 120) -> None:
    """Until something has happened; AssertionError where the process ends before, or the time is over."""
    end = time.monotonic() + seconds
    while not happened():
        if process.poll() is not None:
            raise AssertionError(process.communicate()[0])
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def say(title: str, printed: str, neutral: Sequence[tuple[str, str]]) -> None:
    for found, told in neutral:
        printed = printed.replace(found, told)
    kept = [line for line in printed.splitlines() if not line.startswith("make[")]
    print(f"\n$ {title}", *kept, sep="\n", flush=True)


def main() -> int:
    """All targets, from nothing to their tables."""
    with tempfile.TemporaryDirectory() as temporary, machine(Path(temporary), forked=False) as here:
        neutral = [
            (here.run, "python -m"), (sys.executable, "python"), (here.site.url, "http://hub.local"), (temporary, "~"),
        ]  # fmt: skip
        here.limit = 2
        say("make reproduce-table1        # a machine with nothing", here.make("reproduce-table1")[1], neutral)
        here.environment |= bring(here.folder / "data")
        say("make reproduce-table1        # the pictures are there", here.make("reproduce-table1")[1], neutral)
        here.environment["ACCEPT_LICENCES"] = "1"
        here.site.stall = "20180402"
        process = here.start("reproduce-table1")
        wait_for(here.site.stalled.is_set, process)
        time.sleep(1)
        say("make reproduce-table1 ACCEPT_LICENCES=1        # killed while it fetches", here.kill(process), neutral)
        here.site.stall = None
        process = here.start("reproduce-table1")
        wait_for(lambda: list(here.checkout.glob("results/runs/table1/*/anonymized/*.png")), process, 600)
        say("make reproduce-table1 ACCEPT_LICENCES=1        # killed while it runs", here.kill(process), neutral)
        codes = []
        for target in ("reproduce-table1", "reproduce-table2", "reproduce-all"):
            started = time.monotonic()
            code, printed = here.make(target)
            codes.append(code)
            say(f"make {target} ACCEPT_LICENCES=1", printed, neutral)
            print(f"exit code {code}, {time.monotonic() - started:.0f} s; tables: {', '.join(here.tables())}")
        return max(codes)


if __name__ == "__main__":
    sys.exit(main())
