"""`make reproduce-...` rehearsed on a machine that has nothing: tiny weights under the real names, from a hub and a mirror on this machine.

    make rehearsal      all targets, from nothing to their tables, killed on the way; what it prints is in docs/tutorial.md

Tests take the pieces (tests/test_rehearsal.py). The cards are the real ones but for the SHA-256 of the stand-ins: KEYANON_CARDS names the
file, and the real cards are left alone.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import file_digest
from pathlib import Path
from urllib.parse import urlsplit

import PIL.Image
import torch
import yaml

from keyanon.faces.datasets import read_list
from keyanon.weights import CARDS, Hub, Release
from tests.conftest import ROOT, save_tiny_ldm
from tests.hub import Site, serving
from tests.test_parsing import colour_parser
from tests.test_recognition import tiny_arcface

HAS = 3  # pictures of CelebA-HQ that the machine has
PEOPLE = ("Ada_Able", "Bo_Baker", "Cy_Cole", "Di_Dean")
SOCKET = "forked.sock"
# Settings of every target: small pictures and one step, for the time; and who reads a table has to know.
ARGS = "solver.steps=1 dataset.size=64 batch_size=2 notes=[rehearsal\\ on\\ random\\ weights]"


def facenet(path: Path) -> None:
    """FaceNet's one architecture, 28 million numbers, drawn by a faster hand than its own; with the classifier that files have."""
    from facenet_pytorch import InceptionResnetV1

    with torch.device("meta"):
        shapes = InceptionResnetV1(pretrained=None).state_dict()
    generator = torch.Generator().manual_seed(len(path.name))
    state = {}
    for name, each in shapes.items():
        if name.endswith(("running_var", "bn.weight")):
            state[name] = torch.ones(each.shape)
        elif name.endswith("num_batches_tracked"):
            state[name] = torch.zeros(each.shape, dtype=torch.long)
        elif each.dim() > 1:
            state[name] = torch.randn(each.shape, generator=generator) * (2 / each[0].numel()) ** 0.5
        else:
            state[name] = torch.zeros(each.shape)
    torch.save(state | {"logits.weight": torch.zeros(5, 512)}, path)


# A stand-in for each card that is fetched: what writes its file. A card of several files gets the one that has the weights, and the
# function writes the others beside it.
STAND_INS: dict[str, Callable[[Path], object]] = {
    "facenet_vggface2": facenet,
    "facenet_casia": facenet,
    "arcface_r50": tiny_arcface,
    "bisenet": colour_parser,
    # the pictures that the machine has stay the first
    "celebahq_order": lambda path: path.write_text(str([f"{n}.jpg" for n in (*range(HAS)[::-1], *range(HAS, 30_000))])),
}
# and for each model of the hub: repository and folder in it
MODELS: dict[str, Callable[[Path], object]] = {
    "PolLabarbarie/diffusion-signflip-anon-face/ffhq-diffusers": save_tiny_ldm
}
BESIDE = {"PolLabarbarie/diffusion-signflip-anon-face/keys/key_1.pt": b"the authors' keys, which nobody needs" * 1000}


def stock(site: Path, cards: Path) -> None:
    """Fill a site with all stand-ins, and write the cards that go with them."""
    entries = {entry["name"]: entry for entry in yaml.safe_load((ROOT / "keyanon" / "cards.yaml").read_text("utf-8"))}
    for name, write in STAND_INS.items():
        card = CARDS[name]
        match card.origin:
            case Release(url=url, member=member):
                place = site / "releases" / urlsplit(url).netloc / urlsplit(url).path.removeprefix("/")
                file = place if member is None else site / "members" / member
            case Hub(repo=repo):
                file = site / "hub" / repo / card.filename
            case other:
                raise TypeError(f"{name}: {other} is not fetched from a site")
        file.parent.mkdir(parents=True, exist_ok=True)
        write(file)
        if isinstance(card.origin, Release) and member is not None:
            place.parent.mkdir(parents=True, exist_ok=True)
            with zipfile.ZipFile(place, "a") as archive:
                archive.write(file, member)
        with file.open("rb") as opened:
            entries[name]["sha256"] = file_digest(opened, "sha256").hexdigest()
    for place_in_hub, save in MODELS.items():
        save(site / "hub" / place_in_hub)
    for place_in_hub, data in BESIDE.items():
        beside = site / "hub" / place_in_hub
        beside.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(data)
    cards.write_text(yaml.safe_dump(list(entries.values())), "utf-8")


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
    pairs = [f"{person}\t1\t2" for person in PEOPLE]
    strangers = [f"{PEOPLE[0]}\t1\t{PEOPLE[1]}\t1", f"{PEOPLE[2]}\t1\t{PEOPLE[3]}\t1"]
    for name, own in (("pairsDevTrain.txt", pairs[:2]), ("pairsDevTest.txt", pairs[2:])):
        (lfw / name).write_text("\n".join(["2", *own, *strangers]) + "\n")
    return {"KEYANON_CELEBAHQ": str(celebahq), "KEYANON_LFW": str(lfw)}


@dataclass
class Machine:
    """A machine that has this checkout, Python's packages and nothing else."""

    folder: Path
    site: Site
    environment: dict[str, str]
    run: str  # make's RUN
    limit: int = 2
    processes: list[int] = field(default_factory=list)

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
            cwd=self.checkout, env=self.environment, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip

    def make(self, *targets: str, **variables: str) -> tuple[int, str]:
        """Exit code of make, and all that was printed."""
        process = self.start(*targets, **variables)
        printed, _ = process.communicate()
        return process.returncode, printed

    def kill(self, process: subprocess.Popen[str]) -> str:
        """SIGKILL make and whatever it started; what was printed until then."""
        for child in [process.pid, *self.children()]:
            with_group = signal.SIGKILL
            try:
                os.killpg(os.getpgid(child), with_group) if child == process.pid else os.kill(child, with_group)
            except ProcessLookupError:
                continue
        return process.communicate()[0]

    def children(self) -> list[int]:
        """The commands that are forked, and not of make's own session."""
        return [int(path.read_text()) for path in self.folder.glob("*.pid")]

    def tables(self) -> list[str]:
        return sorted(path.stem for path in (self.checkout / "results" / "tables").glob("*.csv"))


@contextmanager
def machine(folder: Path, forked: bool = True) -> Iterator[Machine]:
    """A machine with an empty cache, and the site that it fetches from.

    With `forked` its commands are forked from one process that has imported what they import; else each is a process of its own.
    """
    stock(folder / "site", folder / "cards.yaml")
    checkout = folder / "checkout"
    for name in ("experiments", "conf", "results/paper"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    (checkout / "keyanon").symlink_to(ROOT / "keyanon")
    shutil.copy(ROOT / "Makefile", checkout)
    with serving(folder / "site") as site:
        own = {name: value for name, value in os.environ.items() if not name.startswith(("KEYANON_", "HF_", "MAKE"))}
        own.pop("ACCEPT_LICENCES", None)
        own |= {
            "PYTHONPATH": str(checkout), "HF_ENDPOINT": site.url, "HF_HOME": str(folder / "hf"), "KEYANON_MIRROR": f"{site.url}/releases",
            "KEYANON_CACHE": str(folder / "cache"), "KEYANON_CARDS": str(folder / "cards.yaml"), "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "", "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONWARNINGS": "ignore",
        }  # fmt: skip
        if not forked:
            yield Machine(folder, site, own, f"{sys.executable} -m")
            return
        with tempfile.TemporaryDirectory() as short:  # a socket's path has at most 107 characters
            program, socket = ROOT / "tests" / "forked.py", Path(short, SOCKET)
            server = subprocess.Popen([sys.executable, program, "serve", socket], cwd=checkout, env=own)
            try:
                while not socket.exists():
                    if server.poll() is not None:
                        raise RuntimeError(f"{program} ended with {server.returncode}")
                    time.sleep(0.05)
                yield Machine(
                    folder, site, own | {"FORKED_PID": str(folder)}, f"{sys.executable} -SE {program} {socket}"
                )
            finally:
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
            (here.run, "python -m"), (sys.executable, "python"), (here.site.url, "http://hub.local"), (temporary, "/home/you"),
        ]  # fmt: skip
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
