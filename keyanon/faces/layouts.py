"""Where collections of faces keep their pictures: published folder layouts, flat folders and tar files."""

import os
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Literal

import PIL.Image

from keyanon.errors import BadData, BadPicture, MissingData
from keyanon.faces import obtain
from keyanon.types import Source

# HEIC among them, so that such a picture is refused by name and counted, not passed over.
SUFFIXES = (
    ".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp", ".avif", ".gif", ".heic", ".heif", ".jfif", ".jpe", ".mpo",
)  # fmt: skip
IN_SUBFOLDERS = "pictures in subfolders"
OF_OTHER_KINDS = "pictures of a kind that is not read, with the suffix"


def person(id: str) -> str:
    """Person_Name of Person_Name_0001."""
    return id.rpartition("_")[0]


# Where pictures are: published folder layouts, and flat folders or tar files.
@dataclass(frozen=True)
class Layout:
    """Where below a root a collection keeps the picture `id` (of `person`), and how to get the collection."""

    name: str
    places: tuple[str, ...]
    variable: str
    source: str

    def paths(self, root: str | None, id: str) -> list[Path]:
        return [self.folder(root) / place.format(id=id, person=person(id)) for place in self.places]

    def folder(self, root: str | None) -> Path:
        if root is None:
            raise MissingData(f"{self.name}: no folder given. {self.remedy}")
        if not Path(root).expanduser().is_dir():
            raise MissingData(f"{self.name}: there is no folder {root}. {self.remedy}")
        return Path(root).expanduser()

    def find(self, root: str | None, id: str) -> Path:
        """The picture's file; raises BadPicture."""
        paths = self.paths(root, id)
        for path in paths:
            if path.is_file():
                return path
        raise BadPicture(f"{self.name}: {id} is missing; looked for {', '.join(map(str, paths))}")

    def present(self, root: str | None, ids: Iterable[str]) -> tuple[str, ...]:
        """The ids as they are, if a single one of the pictures is there; else MissingData."""
        ids = tuple(ids)
        if not any(path.is_file() for id in ids for path in self.paths(root, id)):
            looked = ", ".join(str(path.relative_to(self.folder(root))) for path in self.paths(root, ids[0]))
            raise MissingData(
                f"{self.name}: {root} holds none of the {len(ids)} pictures listed; looked for {looked} and so on. "
                + self.remedy
            )
        return ids

    def file(self, root: str | None, name: str) -> Path:
        path = self.folder(root) / name
        if not path.is_file():
            raise MissingData(f"{self.name}: there is no {path}. {self.remedy}")
        return path

    @property
    def remedy(self) -> str:
        return (
            f"Set dataset.root=/path or {self.variable}, to the folder where it is unpacked. To be had: {self.source}"
        )


CELEBAHQ = Layout(
    name="CelebA-HQ",
    places=("CelebA-HQ-img/{id}.jpg", "{id}.jpg", "{id}.png"),
    variable="KEYANON_CELEBAHQ",
    source=obtain.CELEBAHQ,
)
FFHQ_LAYOUTS = {
    version: Layout(
        name="FFHQ",
        places=(f"{version}/{{id:.2}}000/{{id}}.png", f"{version}/{{id}}.png", "{id:.2}000/{id}.png", "{id}.png"),
        variable="KEYANON_FFHQ",
        source=obtain.FFHQ.format(version=version),
    )
    for version in ("images1024x1024", "thumbnails128x128")
}
Edition = Literal["plain", "funneled", "deep-funneled"]
Wanted = Literal["any", Edition]  # any: the one that is there
# Where LFW's folders of people lie below a root, and which edition that is, for their pixels differ. None: the place does not tell.
LFW_FOLDERS: Mapping[str, Edition | None] = {
    "": None,
    "imgs": None,  # the authors' own
    "lfw": "plain",  # lfw.tgz
    "lfw_funneled": "funneled",  # lfw-funneled.tgz, and scikit-learn
    "lfw-deepfunneled/lfw-deepfunneled": "deep-funneled",  # as Kaggle packs it
    "lfw-deepfunneled": "deep-funneled",  # lfw-deepfunneled.tgz
}
LFW_PLACES = {folder: str(PurePosixPath(folder, "{person}", "{id}.jpg")) for folder in LFW_FOLDERS}
LFW_LAYOUT = Layout(
    name="LFW",
    places=tuple(LFW_PLACES.values()),
    variable="KEYANON_LFW",
    source=obtain.LFW,
)
# Files of the same pairs: the matched ones of DevTrain and then of DevTest, all of both, or View 2's ten folds.
DEV_MATCHES = (
    ("pairsDevTrain.txt", "pairsDevTest.txt"),
    ("matchpairsDevTrain.csv", "matchpairsDevTest.csv"),  # Kaggle's
    ("matchpairs.csv",),  # the authors'
)
DEV_PAIRS = (
    ("pairsDevTrain.txt", "pairsDevTest.txt"),
    ("matchpairsDevTrain.csv", "mismatchpairsDevTrain.csv", "matchpairsDevTest.csv", "mismatchpairsDevTest.csv"),
)
VIEW2_PAIRS = (("pairs.txt",), ("pairs.csv",))


def lfw_edition(root: str | None, folder: str) -> Edition | None:
    """The edition in a folder of LFW_FOLDERS; None where its name does not tell, as a root that somebody called `lfw`."""
    if folder:
        return LFW_FOLDERS[folder]
    name = LFW_LAYOUT.folder(root).absolute().name
    return LFW_FOLDERS.get(name) if name != "lfw" else None


def lfw_layout(root: str | None, ids: Iterable[str], edition: Wanted) -> tuple[Layout, Edition | None]:
    """LFW's layout narrowed to the one folder that holds pictures of `ids`, and its edition, None where its place does not tell.

    A folder whose place does not tell is taken for the edition that is wanted, where no other folder is of it.

    Raises:
        MissingData: no folder holds any of them, or all that do are of another edition.
        BadData: several do, and a picture of one name is not the same in them.
    """
    ids, place = tuple(ids), LFW_LAYOUT.folder(root)
    told: dict[str, Edition | None] = {}
    for folder, pattern in LFW_PLACES.items():
        paths = (place / pattern.format(id=id, person=person(id)) for id in ids)
        if (place / folder).is_dir() and any(path.is_file() for path in paths):
            told[folder] = lfw_edition(root, folder)
    if not told:
        LFW_LAYOUT.present(root, ids)
    # Of a folder whose place does not tell, whoever runs this may know more.
    fitting = [folder for folder in told if edition in ("any", told[folder])] or [
        folder for folder in told if not told[folder]
    ]
    if not fitting:
        there = ", ".join(f"{folder or '.'} ({known})" for folder, known in told.items())
        others = " or ".join(f"dataset.edition={known}" for known in dict.fromkeys(told.values()))
        raise MissingData(
            f"LFW: {place} holds no pictures of the edition {edition}, but {there}: {others} takes them. {LFW_LAYOUT.remedy}"
        )
    if len(fitting) > 1:
        there = ", ".join(f"{folder or '.'} ({told[folder] or 'edition not told'})" for folder in fitting)
        several = len({told[folder] for folder in fitting}) > 1
        remedy = "Set dataset.edition to the one that is meant" if several else "Move all but one elsewhere"
        raise BadData(f"LFW: {place} holds pictures in several folders: {there}. {remedy}.")
    return replace(LFW_LAYOUT, places=(LFW_PLACES[fitting[0]],)), told[fitting[0]]


def lfw_pair_files(root: str | None, sets: Sequence[Sequence[str]]) -> list[Sequence[str]]:
    """Which sets of files of pairs are there, whole; MissingData tells what was looked for."""
    folder = LFW_LAYOUT.folder(root)
    if whole := [names for names in sets if all((folder / name).is_file() for name in names)]:
        return whole
    looked = ", or for ".join(" and ".join(names) for names in sets)
    raise MissingData(f"LFW: {folder} holds no pairs; looked for {looked}. {LFW_LAYOUT.remedy}")


@dataclass(frozen=True)
class Member:
    """A picture file, or the part of an uncompressed tar file that holds one; `path` is what messages call it."""

    path: Path
    source: Source


def members(root: str | None) -> dict[str, Member]:
    """The pictures in a folder, in the tar files of a folder, or in a tar file, by file name without suffix."""
    if root is None:
        raise MissingData("no folder of pictures given. Set dataset.root=/path, to a folder or a tar file")
    place = Path(root).expanduser()
    if not place.exists():
        raise MissingData(f"there is no {place}. Set dataset.root=/path, to a folder of pictures or a tar file")
    found: dict[str, Member] = {}
    for member in listed_members(place):
        if not is_picture(member.path.name):
            continue
        id = member.path.stem
        if id in found:
            raise BadData(f"two pictures have the id {id}: {found[id].path} and {member.path}; rename one of them")
        if (
            not id.isprintable()
        ):  # bytes that are not UTF-8 come as half of a surrogate pair, which no file of ours can hold
            raise BadData(f"{str(member.path)!a}: a name that is not UTF-8, or has control characters; rename it")
        found[id] = member
    if not found:
        raise MissingData(f"{place} holds no picture; looked for *{', *'.join(SUFFIXES)} in it or in its tar files")
    return found


def passed_over(root: str | None, pictures: Iterable[str]) -> dict[str, int]:
    """What lies in a folder and is none of its `pictures`, and how many of each kind; what begins with a dot does not count.

    Pictures in subfolders, pictures that a list leaves out, and files of other kinds.
    """
    place, wanted, counts = Path(root or ".").expanduser(), set(pictures), Counter[str]()
    for member in listed_members(place):
        if member.path.name.startswith("."):
            continue
        if not is_picture(member.path.name):
            suffix = member.path.suffix or "none"
            known = PIL.Image.registered_extensions().get(suffix.lower()) in PIL.Image.OPEN
            counts[f"{OF_OTHER_KINDS} {suffix}" if known else f"files with the suffix {suffix}"] += 1
        elif member.path.stem not in wanted:
            counts["pictures that the list leaves out"] += 1
    for folder, folders, names in os.walk(place):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if Path(folder) != place:
            counts[IN_SUBFOLDERS] += sum(is_picture(name) for name in names)
    return {kind: count for kind, count in sorted(counts.items()) if count}


def is_picture(name: str) -> bool:
    """By its suffix; what begins with a dot was left by a system."""
    return Path(name).suffix.lower() in SUFFIXES and not name.startswith(".")


def listed_members(place: Path) -> Iterator[Member]:
    """The files in a folder and in its tar files, or in a tar file, by name."""
    for file in sorted(place.iterdir()) if place.is_dir() else [place]:
        if file.is_dir():
            continue
        if file.suffix.lower() == ".tar":
            yield from tar_members(file)
        else:
            yield Member(file, Source(file))


def tar_members(archive: Path) -> Iterator[Member]:
    try:
        with tarfile.open(archive, "r:") as tar:
            for part in tar:
                if part.issparse():
                    raise BadData(f"{archive}: {part.name} is stored with holes (a sparse file); pack it again without")
                if part.isfile():
                    yield Member(archive / part.name, Source(archive, part.offset_data, part.size))
    except tarfile.TarError as error:
        raise BadData(f"{archive}: not an uncompressed tar file ({error})") from error
