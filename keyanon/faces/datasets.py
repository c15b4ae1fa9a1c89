"""Faces by id, in a committed order: CelebA-HQ, FFHQ, LFW, two pictures a person, any folder, or what packages ship.

Which pictures and in which order is said by a list, `keyanon/faces/lists/NAME.txt` or a file of your own; without a list ids
are sorted, so that no order ever comes from a disk. Pictures stay where they were downloaded. A dataset can be made
without them: it looks for them when it is first asked, and then raises MissingData where none of its pictures is
there, and BadPicture for a single one that is missing or broken.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
import PIL.Image

from keyanon.channel.pixels import Kernel, from_pil, open_rgb, resize
from keyanon.errors import BadData, BadPicture, BadSetting, MissingData
from keyanon.faces.alignment import align
from keyanon.faces.detection import MtcnnDetector
from keyanon.faces.layouts import (
    CELEBAHQ,
    DEV_MATCHES,
    DEV_PAIRS,
    FFHQ_LAYOUTS,
    LFW_LAYOUT,
    SUFFIXES,
    VIEW2_PAIRS,
    Edition,
    Layout,
    Member,
    Wanted,
    lfw_layout,
    lfw_pair_files,
    members,
    passed_over,
    person,
)
from keyanon.settings import Crop, Name, Names, Size, checked
from keyanon.types import Picture, Source
from keyanon.weights import Card, MissingWeights, Package, missing, named, resolve

LISTS = Path(__file__).with_name("lists")
MOST = 10**7  # ids in a span of a list
SMALLEST = 16  # pixels: a picture with a shorter side shows no face


@checked
@dataclass(frozen=True)
class CelebAHQ:
    """CelebA-HQ, 1024 px, as CelebAMask-HQ has it (CelebA-HQ-img/0.jpg to 29999.jpg), or flat: N.jpg or N.png.

    Lee et al., MaskGAN, CVPR 2020, https://github.com/switchablenorms/CelebAMask-HQ. It comes without identities. The
    authors resize bilinearly, we with Lanczos.

    Args:
        root: the folder that holds the pictures.
        size: of the pictures, pixels.
        list: the pictures and their order.
        crop: as fractions of the picture.
        resize: the kernel.
        order: `numbers`, that of `list`; `authors`, which the card celebahq_order has, of the list `celebahq` alone.
    """

    root: str | None
    size: Size = 256
    list: Name = "celebahq"
    crop: Crop | None = None
    resize: Kernel = "lanczos"
    order: Literal["numbers", "authors"] = "numbers"

    def __post_init__(self) -> None:
        if self.order == "authors" and self.list != "celebahq":
            raise BadSetting(
                f"order=authors is of list=celebahq; with list={self.list} take order=numbers, its own order"
            )

    @cached_property
    def ids(self) -> Sequence[str]:
        ids = CELEBAHQ.present(self.root, read_list(self.list))
        return ids if self.order == "numbers" else authors_order(ids)

    def cards(self) -> tuple[Card, ...]:
        return () if self.order == "numbers" else (named("celebahq_order"),)

    @property
    def gallery(self) -> Sequence[str]:
        return ()

    @property
    def is_benchmark(self) -> bool:
        return True

    def identity(self, id: str) -> str | None:
        return None

    def source(self, id: str) -> Source:
        return Source(CELEBAHQ.find(self.root, id))

    def load(self, id: str) -> Picture:
        source = self.source(id)
        return prepare(opened(source), source.path, self.size, self.crop, self.resize)


@checked
@dataclass(frozen=True)
class FFHQ:
    """FFHQ in its official folders of 1000, images1024x1024/00000/00000.png or thumbnails128x128/..., or flat.

    Karras et al., StyleGAN, CVPR 2019, https://github.com/NVlabs/ffhq-dataset.
    """

    root: str | None
    size: Size = 256
    version: Literal["images1024x1024", "thumbnails128x128"] = "images1024x1024"
    list: Name = "ffhq"
    crop: Crop | None = None
    resize: Kernel = "lanczos"

    @cached_property
    def ids(self) -> Sequence[str]:
        return FFHQ_LAYOUTS[self.version].present(self.root, read_list(self.list))

    @property
    def gallery(self) -> Sequence[str]:
        return ()

    @property
    def is_benchmark(self) -> bool:
        return True

    def identity(self, id: str) -> str | None:
        return None

    def source(self, id: str) -> Source:
        return Source(FFHQ_LAYOUTS[self.version].find(self.root, id))

    def load(self, id: str) -> Picture:
        source = self.source(id)
        return prepare(opened(source), source.path, self.size, self.crop, self.resize)


@checked
@dataclass(frozen=True)
class LFW:
    """Labeled Faces in the Wild, 250 px, Person/Person_0001.jpg, in the pairs of its official files.

    Huang et al., 2007, https://vis-www.cs.umass.edu/lfw. The first picture of each pair is in the gallery, the second
    is anonymized. A picture may be both. Where the pictures may lie: `keyanon.faces.layouts.LFW_FOLDERS`.

    Args:
        root: the folder that holds the pictures and the files of pairs.
        size: of the pictures, pixels.
        pairs: `dev`, the 1,100 + 500 matches of DevTrain and DevTest, which are the authors' 1,600; `view2`, 10 folds of 300
            matches and then 300 mismatches; or names of files in `root`. Files are in LFW's own format or CSV (name,i,j for a
            match, name,i,name,j for a mismatch).
        mismatches: take the pairs of two persons too.
        counted: `distinct`: each picture is listed once, where it first comes up (of `dev` 1,484 in the gallery, 1,477 anonymized);
            `repeated`: it is in the gallery, and among the probes, as often as the pairs list it (1,600 and 1,600).
        edition: of the pictures. `any` takes the one that is there, and refuses several. Another is refused where the place of
            the pictures tells that they are of another edition.
        transform: `authors`: Resize 256, CenterCrop 200, Resize, bilinear; `lanczos`: `crop`, then one Lanczos resize.
        crop: only with `lanczos`.
    """

    root: str | None
    size: Size = 256
    pairs: Literal["dev", "view2"] | Names = "dev"
    mismatches: bool = False
    counted: Literal["distinct", "repeated"] = "distinct"
    edition: Wanted = "any"
    transform: Literal["authors", "lanczos"] = "authors"
    crop: Crop | None = None

    def __post_init__(self) -> None:
        if self.transform == "authors" and self.crop is not None:
            raise BadSetting("the authors' transform has a crop of its own; take transform=lanczos with crop")

    @cached_property
    def comparisons(self) -> Sequence[tuple[str, str]]:
        """The listed pairs (gallery id, probe id), in the files' order, with repetitions."""
        sets = {"dev": DEV_PAIRS if self.mismatches else DEV_MATCHES, "view2": VIEW2_PAIRS}
        given = [self.pairs] if not isinstance(self.pairs, str) else lfw_pair_files(self.root, sets[self.pairs])
        (names, pairs), *others = [(each, self._read(each)) for each in given]
        for more, found in others:
            if found != pairs:
                one, two = " and ".join(names), " and ".join(more)
                raise BadData(
                    f"{self.root}: {one} and {two} should hold the same pairs, and do not. Set dataset.pairs=[FILE, ...]"
                )
        return pairs

    def _read(self, names: Sequence[str]) -> Sequence[tuple[str, str]]:
        listed = [pair for name in names for pair in read_pairs(LFW_LAYOUT.file(self.root, name))]
        wanted = [(a, b) for a, b in listed if self.mismatches or person(a) == person(b)]
        if not wanted:
            raise BadData(f"{self.root}: no pairs in {', '.join(names)}")
        return wanted

    @cached_property
    def _place(self) -> tuple[Layout, Edition | None]:
        return lfw_layout(self.root, [id for pair in self.comparisons for id in pair], self.edition)

    @cached_property
    def ids(self) -> Sequence[str]:
        _ = self._place  # no use in ids without pictures
        return distinct(second for _, second in self.comparisons)

    @cached_property
    def probes(self) -> Sequence[str]:
        return self.ids if self.counted == "distinct" else tuple(second for _, second in self.comparisons)

    @cached_property
    def gallery(self) -> Sequence[str]:
        firsts = tuple(first for first, _ in self.comparisons)
        return distinct(firsts) if self.counted == "distinct" else firsts

    @property
    def notes(self) -> Sequence[str]:
        taken = " (dataset.edition)" if self.edition == "any" else f", taken for {self.edition}"
        note = f"LFW, {self._place[1] or 'edition not told by its folder' + taken}"
        return (
            [note] if self.counted == "distinct" else [note, f"{len(self.probes):,} pairs as often as they are listed"]
        )

    @property
    def is_benchmark(self) -> bool:
        return True

    def identity(self, id: str) -> str | None:
        return person(id)

    def source(self, id: str) -> Source:
        return Source(self._place[0].find(self.root, id))

    def load(self, id: str) -> Picture:
        source = self.source(id)
        picture = opened(source)
        if self.transform == "lanczos":
            return prepare(picture, source.path, self.size, self.crop)
        bilinear = PIL.Image.Resampling.BILINEAR
        cropped = picture.resize((256, 256), bilinear).crop((28, 28, 228, 228))
        return from_pil(cropped.resize((self.size, self.size), bilinear))


@checked
@dataclass(frozen=True)
class PairsFolder:
    """Two pictures of each person, Person_Name_0001.webp: the first by name is in the gallery, the second anonymized.

    `root` is a folder of pictures or of tar files, or a tar file. Without `list` all of its pictures are taken.
    """

    root: str | None
    size: Size = 256
    list: Name | None = None
    crop: Crop | None = None

    @cached_property
    def ids(self) -> Sequence[str]:
        return tuple(second for _, second in self._pairs)

    @cached_property
    def gallery(self) -> Sequence[str]:
        return tuple(first for first, _ in self._pairs)

    @property
    def is_benchmark(self) -> bool:
        return is_committed(self.list)

    def identity(self, id: str) -> str | None:
        return person(id)

    def source(self, id: str) -> Source:
        return member(self._members, id, self.root).source

    def load(self, id: str) -> Picture:
        found = member(self._members, id, self.root)
        return prepare(opened(found.source, found.path), found.path, self.size, self.crop)

    @cached_property
    def passed_over(self) -> Mapping[str, int]:
        """What lies in the folder and is none of its pictures, and how many of each kind."""
        return passed_over(self.root, [*self.ids, *self.gallery])

    @cached_property
    def _members(self) -> dict[str, "Member"]:
        return members(self.root)

    @cached_property
    def _pairs(self) -> Sequence[tuple[str, str]]:
        pictures = defaultdict(set)
        for id in listed(self._members, self.list, self.root):
            pictures[person(id)].add(id)
        for name, ids in pictures.items():
            if len(ids) != 2:
                raise BadData(f"{self.root}: {name} has {len(ids)} pictures ({', '.join(sorted(ids))}), expected 2")
        return [(min(ids), max(ids)) for _, ids in sorted(pictures.items())]


@checked
@dataclass(frozen=True)
class Folder:
    """A folder of pictures or of tar files, or a tar file; ids are file names without suffix, sorted unless listed."""

    root: str | None
    size: Size = 256
    list: Name | None = None
    crop: Crop | None = None
    synthetic: bool = False  # nobody on the pictures is real

    @cached_property
    def ids(self) -> Sequence[str]:
        return listed(self._members, self.list, self.root)

    @property
    def gallery(self) -> Sequence[str]:
        return ()

    @property
    def is_benchmark(self) -> bool:
        return self.synthetic or is_committed(self.list)

    def identity(self, id: str) -> str | None:
        return None

    def source(self, id: str) -> Source:
        return member(self._members, id, self.root).source

    def load(self, id: str) -> Picture:
        found = member(self._members, id, self.root)
        return prepare(opened(found.source, found.path), found.path, self.size, self.crop)

    @cached_property
    def passed_over(self) -> Mapping[str, int]:
        """What lies in the folder and is none of its pictures, and how many of each kind."""
        return passed_over(self.root, [*self.ids, *self.gallery])

    @cached_property
    def _members(self) -> dict[str, "Member"]:
        return members(self.root)


@checked
def bundled_faces(size: Size = 128) -> Folder:
    """256 synthetic faces that the bundled model drew and this package ships (experiments/faces.py); nobody's pictures."""
    return Folder(str(Path(__file__).parents[1] / "assets" / "faces"), size, synthetic=True)


@checked
@dataclass(frozen=True)
class InstalledPhotographs:
    """Nine faces of real people, on the photographs (`PHOTOGRAPHS`) that packages keyanon depends on ship.

    Each is found by MTCNN when it is loaded, and aligned as UTKFace is, which the bundled model knows. None of them is
    part of this repository, and the photographs remain their owners': publish no picture made of them without asking.
    """

    size: Size = 128

    @cached_property
    def ids(self) -> Sequence[str]:
        files = {photograph.file for photograph in PHOTOGRAPHS.values()}
        if not any(file.find() for file in files):
            packages = " ".join(sorted({file.requirement for file in files}))
            raise MissingData(
                f"none of the photographs is installed; looked for {', '.join(sorted(map(str, files)))}. "
                f"Remedy: `pip install {packages}`"
            )
        return tuple(PHOTOGRAPHS)

    @property
    def gallery(self) -> Sequence[str]:
        return ()

    @property
    def is_benchmark(self) -> bool:
        return True

    def identity(self, id: str) -> str | None:
        return None

    def source(self, id: str) -> Source:
        if id not in PHOTOGRAPHS:
            raise BadPicture(f"there is no photograph {id}; there are {', '.join(PHOTOGRAPHS)}")
        path = PHOTOGRAPHS[id].file.find()
        if path is None:
            raise BadPicture(f"{id} is missing: {PHOTOGRAPHS[id].file}")
        return Source(path)

    def load(self, id: str) -> Picture:
        source = self.source(id)
        picture = from_pil(opened(source))
        left, top, right, bottom = pixels(PHOTOGRAPHS[id].crop, picture.shape[2], picture.shape[1])
        (face,) = self._detector.detect(picture[None, :, top:bottom, left:right])
        if face is None:
            raise BadPicture(f"{source.path}: no face found for {id}")
        return align(picture, face.points + np.array([left, top]), self.size)

    @cached_property
    def _detector(self) -> MtcnnDetector:
        return MtcnnDetector()


def distinct(ids: Iterable[str]) -> Sequence[str]:
    """Each once, where it first comes up."""
    return tuple(dict.fromkeys(ids))


def is_committed(name: str | None) -> bool:
    """Whether a list is one of those in LISTS: of a benchmark's pictures, not of somebody's own."""
    return name is not None and (LISTS / f"{name}.txt").is_file()


def read_list(name: str) -> tuple[str, ...]:
    """The ids of the committed list `name`, or of the file at the path `name`.

    One id a line, with or without a picture's suffix; `#` begins a comment; `0..29999` stands for all whole numbers
    from the first to the last, `00000..69999` for the same with as many digits each.
    """
    committed = LISTS / f"{name}.txt"
    path = committed if committed.is_file() else Path(name).expanduser()
    if not path.is_file():
        there = ", ".join(sorted(file.stem for file in LISTS.glob("*.txt")))
        raise MissingData(f"no list of ids {name!r}: neither a file nor one of the committed lists {there}")
    ids: list[str] = []
    for line in text_lines(path):
        entry = line.partition("#")[0].strip()
        if span := re.fullmatch(r"(\d{1,9})\.\.(\d{1,9})", entry):
            first, last = span.groups()
            if int(last) - int(first) > MOST:
                raise BadData(f"{path}: {entry} stands for more than {MOST} ids")
            ids += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
        elif entry:
            suffix = PurePosixPath(entry).suffix
            ids.append(entry.removesuffix(suffix) if suffix.lower() in SUFFIXES else entry)
    if not ids:
        raise BadData(f"{path}: a list without ids")
    if len(set(ids)) < len(ids):
        raise BadData(f"{path}: {Counter(ids).most_common(1)[0][0]} is listed twice")
    return tuple(ids)


def authors_order(ids: Sequence[str]) -> tuple[str, ...]:
    """CelebA-HQ's ids in the authors' order, from the file of the card celebahq_order; raises BadData where it lists others.

    It fetches nothing, unlike what runs on weights: a preflight asks for ids before licences are accepted.
    """
    card = named("celebahq_order")
    if (message := missing(card)) is not None:
        raise MissingWeights(message)
    path = resolve(card)
    order = tuple(re.findall(r"(\d+)\.jpg", " ".join(text_lines(path))))
    if sorted(order) != sorted(ids):
        raise BadData(
            f"{path}: expected the {len(ids):,} pictures of CelebA-HQ in another order, each once; "
            f"found {len(order):,} names, {len(set(order) & set(ids)):,} of these pictures"
        )
    return order


def text_lines(path: Path) -> list[str]:
    """Of a text file in UTF-8, with or without a byte-order mark, whatever ends its lines; BadData names another encoding."""
    data = path.read_bytes()
    try:
        return re.split(r"\r\n|\r|\n", data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise BadData(f"{path}, line {line}: not in UTF-8 ({error.reason}); save it in UTF-8") from error


def read_pairs(path: Path) -> Iterator[tuple[str, str]]:
    """The pairs of ids in a file of LFW's format, or the same as CSV; counts and column names are passed over."""
    for number, line in enumerate(text_lines(path), 1):
        fields = [field for field in re.split(r"[\t, ]+", line.strip()) if field]
        match fields:
            case [name, i, j] if is_number(i) and is_number(j):
                yield lfw_id(name, i), lfw_id(name, j)
            case [first, i, second, j] if is_number(i) and is_number(j):
                yield lfw_id(first, i), lfw_id(second, j)
            case [*counts] if number > 1 and not all(map(is_number, counts)):
                raise BadData(f"{path}, line {number}: {line!r} is no pair (name i j, or name i name j)")


def is_number(text: str) -> bool:
    return text.isdecimal() and len(text) < 10


def lfw_id(name: str, number: str) -> str:
    return f"{name}_{int(number):04}"


def prepare(picture: PIL.Image.Image, path: Path, size: int, crop: Crop | None, kernel: Kernel = "lanczos") -> Picture:
    """Crop to fractions (to the nearest pixel), then a square of `size` pixels."""
    if crop is not None:
        picture = picture.crop(pixels(crop, *picture.size))
    if min(picture.size) < SMALLEST:
        raise BadPicture(f"{path}: {picture.width} x {picture.height} pixels, less than {SMALLEST}")
    return from_pil(resize(picture, size, kernel))


def pixels(crop: Crop, width: int, height: int) -> tuple[int, int, int, int]:
    """A crop in pixels, to the nearest."""
    left, top, right, bottom = crop
    return round(left * width), round(top * height), round(right * width), round(bottom * height)


@dataclass(frozen=True)
class Photograph:
    """A picture file in a package, and the part of it around one face: the only one there."""

    file: Package
    crop: Crop = (0, 0, 1, 1)


GROUP = Package("insightface", "insightface", "data/images/t1.jpg")

# All the faces whose box, as MtcnnDetector finds it on the whole photograph, is at least 80 px wide; one package after
# the other, and in the group from left to right.
PHOTOGRAPHS = {
    "skimage-astronaut": Photograph(Package("scikit-image", "skimage", "data/astronaut.png")),
    "matplotlib-grace_hopper": Photograph(
        Package("matplotlib", "matplotlib", "mpl-data/sample_data/grace_hopper.jpg"),
    ),
    "insightface-Tom_Hanks_54745": Photograph(
        Package("insightface", "insightface", "data/images/Tom_Hanks_54745.png"),
    ),
    "insightface-t1-0": Photograph(GROUP, (0.00, 0.24, 0.18, 0.50)),
    "insightface-t1-1": Photograph(GROUP, (0.17, 0.11, 0.33, 0.37)),
    "insightface-t1-2": Photograph(GROUP, (0.32, 0.23, 0.49, 0.53)),
    "insightface-t1-3": Photograph(GROUP, (0.54, 0.32, 0.70, 0.60)),
    "insightface-t1-4": Photograph(GROUP, (0.68, 0.00, 0.82, 0.29)),
    "insightface-t1-5": Photograph(GROUP, (0.85, 0.25, 1.00, 0.51)),
}


def listed(found: dict[str, Member], name: str | None, root: str | None) -> Sequence[str]:
    """All ids found, sorted; or those of the list `name`, if a single one of them was found."""
    if name is None:
        return tuple(sorted(found))
    ids = read_list(name)
    if not any(id in found for id in ids):
        raise MissingData(f"{root} holds none of the {len(ids)} pictures of the list {name}, such as {ids[0]}")
    return ids


def member(found: dict[str, Member], id: str, root: str | None) -> Member:
    """The picture `id` of a folder, while its file is there; raises BadPicture."""
    if id not in found:
        raise BadPicture(f"{root} holds no picture {id}")
    if not found[id].source.path.is_file():
        raise BadPicture(f"{found[id].source.path} is gone since the folder was listed")
    return found[id]


def opened(source: Source, name: Path | None = None) -> PIL.Image.Image:
    return open_rgb(name or source.path, source.read())
