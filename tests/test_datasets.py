"""Datasets on small folders made here in the published layouts; the committed lists; the real folders, if there."""

import os
import shutil
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from keyanon.channel.pixels import from_pil, to_bytes
from keyanon.errors import BadData, BadSetting, MissingData
from keyanon.faces import datasets
from keyanon.faces.alignment import FACES128_TEMPLATE
from keyanon.faces.datasets import (
    FFHQ,
    LFW,
    LISTS,
    PHOTOGRAPHS,
    CelebAHQ,
    Folder,
    InstalledPhotographs,
    PairsFolder,
    Photograph,
    prepare,
    read_list,
    read_pairs,
)
from keyanon.faces.detection import MtcnnDetector
from keyanon.types import BadPicture, Dataset, ListsFolder, Repeats, Source
from keyanon.weights import CARDS, MissingWeights, Package, WrongWeights
from tests.conftest import ROOT

DATA = Path(os.environ.get("KEYANON_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


def draw(path, side=32, seed=None):
    """A picture of one colour, or noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if seed is None:
        PIL.Image.new("RGB", (side, side), (200, 100, 50)).save(path, quality=95)
    else:
        pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(path, quality=95)
    return path


def note(path, *lines):
    path.write_text("\n".join(lines) + "\n")
    return str(path)


# Lists


def test_list_of_names_numbers_and_comments(tmp_path):
    path = note(tmp_path / "mine.txt", "# rule", "593.jpg", "", "0008..0011  # four", "a.b_0001")
    assert read_list(path) == ("593", "0008", "0009", "0010", "0011", "a.b_0001")


def test_range_without_leading_zeros(tmp_path):
    assert read_list(note(tmp_path / "x.txt", "8..11")) == ("8", "9", "10", "11")


def test_bad_lists_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"x\.txt: 3 is listed twice"):
        read_list(note(tmp_path / "x.txt", "1..5", "3"))
    with pytest.raises(ValueError, match="without ids"):
        read_list(note(tmp_path / "y.txt", "# nothing"))
    with pytest.raises(FileNotFoundError, match=r"'nolist'.*celebahq, celebahq_mini"):
        read_list("nolist")


@pytest.mark.parametrize(
    ("name", "count", "first", "last"),
    [
        ("celebahq", 30_000, "0", "29999"),
        ("celebahq_mini", 28, "005735", "196930"),
        ("ffhq", 70_000, "00000", "69999"),
        ("lfw_gray", 2600, "Abdel_Nasser_Assidi_0001", None),
        ("utkface128_heldout", 1000, None, None),
    ],
)
def test_committed_lists(name, count, first, last):
    ids = read_list(name)
    assert len(ids) == len(set(ids)) == count
    assert first in (None, ids[0])
    assert last in (None, ids[-1])


def test_every_list_says_its_rule():
    assert all(path.read_text().startswith("# ") for path in LISTS.glob("*.txt"))


def test_lfw_gray_lists_two_pictures_of_each_person():
    ids = read_list("lfw_gray")
    assert list(ids) == sorted(ids)
    assert set(Counter(id.rpartition("_")[0] for id in ids).values()) == {2}


# Pictures


def test_crop_then_resize():
    picture = PIL.Image.new("RGB", (100, 100), "white")
    picture.paste("black", (20, 30, 70, 80))
    inside = prepare(picture, Path("x"), 50, (0.2, 0.3, 0.7, 0.8))
    assert inside.shape == (3, 50, 50)
    assert (inside == -1).all()
    assert (prepare(picture, Path("x"), 100, (0, 0, 1, 1)) == from_pil(picture)).all()


def test_crop_of_a_list_from_a_config():
    assert prepare(PIL.Image.new("RGB", (64, 64)), Path("x"), 32, [0.25, 0, 1, 0.75]).shape == (3, 32, 32)


@pytest.mark.parametrize("crop", [(-0.1, 0, 1, 1), (0, 0, 1, 1.2), (0.5, 0, 0.5, 1)])
def test_crop_outside_the_picture_is_refused(crop):
    with pytest.raises(ValueError, match="fractions"):
        Folder("x", 32, crop=crop)


@pytest.mark.parametrize("side", [1024, 304, 128])
@pytest.mark.parametrize("crop", [None, (0.125, 0.25, 0.75, 0.875)])
def test_bilinear_resize_is_torchvisions_to_the_byte(tmp_path, side, crop):
    from torchvision.transforms import Resize  # cannot be imported before keyanon

    draw(tmp_path / "CelebA-HQ-img" / "0.jpg", side, seed=1)
    draw(tmp_path / "00000.png", side, seed=1)
    for kind, id in ((CelebAHQ, "0"), (FFHQ, "00000")):
        faces = kind(str(tmp_path), size=256, crop=crop, resize="bilinear")
        with PIL.Image.open(faces.source(id).path) as picture:
            cut = picture.convert("RGB")
        if crop is not None:
            cut = cut.crop(tuple(round(share * side) for share in crop))
        expected = np.asarray(Resize((256, 256))(cut))
        assert np.array_equal(to_bytes(faces.load(id)).permute(1, 2, 0).numpy(), expected)
        assert not torch.equal(kind(str(tmp_path), size=256, crop=crop).load(id), faces.load(id))
    with pytest.raises(ValueError, match=r"resize='nearest': expected one of lanczos, bilinear"):
        CelebAHQ("x", resize="nearest")


def test_tiny_picture_is_bad():
    with pytest.raises(BadPicture, match=r"face\.png: 8 x 40 pixels"):
        prepare(PIL.Image.new("RGB", (8, 40)), Path("face.png"), 32, None)


# CelebA-HQ and FFHQ


@pytest.mark.parametrize("place", ["CelebA-HQ-img/{}.jpg", "{}.jpg", "{}.png"])
def test_celebahq_layouts(tmp_path, place):
    draw(tmp_path / place.format(7))
    faces = CelebAHQ(str(tmp_path), size=16)
    assert isinstance(faces, Dataset)
    assert (len(faces.ids), faces.ids[593], len(faces.gallery), faces.identity("7")) == (30_000, "593", 0, None)
    assert faces.load("7").shape == (3, 16, 16)
    assert faces.load("7").mean(dim=(1, 2)).tolist() == pytest.approx(
        [200 / 127.5 - 1, 100 / 127.5 - 1, 50 / 127.5 - 1], abs=0.03
    )
    with pytest.raises(BadPicture, match=r"CelebA-HQ: 8 is missing; looked for .*CelebA-HQ-img/8\.jpg"):
        faces.load("8")


def test_celebahq_in_the_order_of_a_list_file(tmp_path):
    draw(tmp_path / "593.jpg")
    order = note(tmp_path / "order.txt", "593.jpg", "11544.jpg", "10464.jpg")
    assert CelebAHQ(str(tmp_path), list=order).ids == ("593", "11544", "10464")


ORDER = CARDS["celebahq_order"]


def write_order(folder, names):
    """Names in the format of the authors' file, where the cache keeps it."""
    path = folder / ORDER.name / ORDER.filename
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(str([f"{name}.jpg" for name in names]))
    return path


@pytest.fixture
def order(tmp_path, monkeypatch):
    """CelebA-HQ in the authors' order, of which nothing is here but one picture; and a cache without its file."""
    monkeypatch.setenv("KEYANON_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(CARDS, ORDER.name, replace(ORDER, sha256=None))
    draw(tmp_path / "593.jpg")
    return CelebAHQ(str(tmp_path), order="authors")


def test_celebahq_in_the_authors_order(order, tmp_path):
    names = read_list("celebahq")
    mixed = names[593:] + names[:593]
    write_order(tmp_path / "cache", mixed)
    assert order.ids == mixed
    assert order.cards() == (CARDS["celebahq_order"],)
    plain = CelebAHQ(str(tmp_path))
    assert plain.ids == names
    assert plain.cards() == ()


def test_the_authors_order_is_not_fetched_unasked(order, tmp_path):
    with pytest.raises(MissingWeights, match=r"celebahq_order: not found.*keyanon\.weights fetch celebahq_order"):
        _ = order.ids
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("spoiled", "found"),
    [
        (lambda names: names[:-1], "29,999 names, 29,999 of these"),
        (lambda names: (*names, "7"), "30,001 names, 30,000 of these"),
        (lambda names: (*names[:-1], "7"), "30,000 names, 29,999 of these"),
        (lambda names: (*names[:-1], "30000"), "30,000 names, 29,999 of these"),
        (lambda names: (), "0 names"),
    ],
)
def test_an_order_of_other_pictures_is_refused(order, tmp_path, spoiled, found):
    path = write_order(tmp_path / "cache", spoiled(read_list("celebahq")))
    with pytest.raises(BadData, match=rf"{path}: expected the 30,000 pictures of CelebA-HQ in another order.*{found}"):
        _ = order.ids


def test_another_file_in_the_place_of_the_authors_order_is_refused(order, tmp_path, monkeypatch):
    monkeypatch.setitem(CARDS, ORDER.name, ORDER)
    write_order(tmp_path / "cache", read_list("celebahq"))
    with pytest.raises(WrongWeights, match="is not the file of the card"):
        _ = order.ids


def test_an_order_is_of_its_own_list():
    with pytest.raises(
        BadSetting, match=r"order=authors is of list=celebahq; with list=celebahq_mini take order=numbers"
    ):
        CelebAHQ("x", list="celebahq_mini", order="authors")
    with pytest.raises(BadSetting, match="order='random': expected one of numbers, authors"):
        CelebAHQ("x", order="random")


@pytest.mark.parametrize("path", sorted((ROOT / "conf" / "dataset").glob("*.yaml")), ids=lambda path: path.stem)
@pytest.mark.parametrize("protocol", ["ours", "authors"])
def test_a_config_takes_its_choices_from_the_protocol(path, protocol):
    """All that the authors do otherwise with a dataset: none may be left at a class's default, or set by hand."""
    taken = {
        CelebAHQ: {"resize": "resize"}, FFHQ: {"resize": "resize"}, LFW: {"counted": "pairs", "edition": "edition"}
    }  # fmt: skip
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", [f"dataset={path.stem}", f"protocol={protocol}"])
    kind = instantiate(cfg.dataset.dataset, _convert_="all").func if "dataset" in cfg.dataset else None
    wanted = dict(taken.get(kind, {}))
    if kind is CelebAHQ and cfg.dataset.list == "celebahq":
        wanted["order"] = "order"
    assert {name: cfg.dataset.get(name) for name in wanted} == {name: cfg.protocol[one] for name, one in wanted.items()}
    if kind is CelebAHQ and "order" not in wanted:
        assert "order" not in cfg.dataset  # which has a list of its own


def test_missing_collections_say_what_to_do(tmp_path):
    draw(tmp_path / "holiday.jpg")
    with pytest.raises(
        FileNotFoundError, match=r"none of the 30000.*CelebA-HQ-img/0\.jpg.*dataset\.root.*KEYANON_CELEBAHQ.*https"
    ):
        _ = CelebAHQ(str(tmp_path)).ids
    with pytest.raises(FileNotFoundError, match=r"no folder given.*KEYANON_CELEBAHQ"):
        _ = CelebAHQ(None).ids
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere.*KEYANON_FFHQ"):
        _ = FFHQ(str(tmp_path / "nowhere")).ids
    with pytest.raises(FileNotFoundError, match=r"pairsDevTrain\.txt.*KEYANON_LFW.*vis-www"):
        _ = LFW(str(tmp_path)).ids
    with pytest.raises(FileNotFoundError, match=r"no folder of pictures given.*dataset\.root"):
        _ = Folder(None).ids


@pytest.mark.parametrize("version", ["images1024x1024", "thumbnails128x128"])
def test_ffhq_layouts(tmp_path, version):
    draw(tmp_path / version / "12000" / "12345.png", seed=1)
    draw(tmp_path / version / "54321.png", seed=2)
    faces = FFHQ(str(tmp_path), size=16, version=version)
    assert (len(faces.ids), faces.ids[12345]) == (70_000, "12345")
    assert not torch.equal(faces.load("12345"), faces.load("54321"))
    with pytest.raises(BadPicture, match="00001 is missing"):
        faces.load("00001")
    inner = FFHQ(str(tmp_path / version), size=16, version=version)
    assert torch.equal(inner.load("12345"), faces.load("12345"))


def test_a_broken_file_is_a_bad_picture(tmp_path):
    (tmp_path / "0.jpg").write_bytes(draw(tmp_path / "1.jpg", 64, seed=0).read_bytes()[:1000])
    with pytest.raises(BadPicture, match=r"0\.jpg: not a readable picture"):
        CelebAHQ(str(tmp_path)).load("0")


# LFW


@pytest.fixture
def lfw(tmp_path):
    """A miniature of LFW: six pictures, its three files of pairs, tabs and counts as in the originals."""
    for name, count in (("Ann_Lee", 3), ("Bob", 2), ("Cid_de_la_Mar", 1)):
        for number in range(1, count + 1):
            draw(tmp_path / name / f"{name}_{number:04}.jpg", 250, seed=number)
    note(
        tmp_path / "pairsDevTrain.txt",
        "2",
        "Ann_Lee\t1\t2",
        "Ann_Lee\t3\t2",
        "Ann_Lee\t1\tBob\t1",
        "Bob\t2\tCid_de_la_Mar\t1",
    )
    note(tmp_path / "pairsDevTest.txt", "1", "Bob\t1\t2", "Cid_de_la_Mar\t1\tAnn_Lee\t3")
    note(tmp_path / "pairs.txt", "2\t1", "Bob\t1\t2", "Bob\t1\tAnn_Lee\t2", "Ann_Lee\t1\t3", "Cid_de_la_Mar\t1\tBob\t2")
    return tmp_path


def test_lfw_takes_the_matched_pairs(lfw):
    faces = LFW(str(lfw))
    assert isinstance(faces, Dataset)
    assert faces.comparisons == [
        ("Ann_Lee_0001", "Ann_Lee_0002"),
        ("Ann_Lee_0003", "Ann_Lee_0002"),
        ("Bob_0001", "Bob_0002"),
    ]
    assert faces.ids == ("Ann_Lee_0002", "Bob_0002")  # once, though it is in two pairs
    assert faces.gallery == ("Ann_Lee_0001", "Ann_Lee_0003", "Bob_0001")
    assert faces.identity("Cid_de_la_Mar_0001") == "Cid_de_la_Mar"


@pytest.mark.parametrize("pairs", ["view2", ["pairs.txt"]])
def test_lfw_view_2_keeps_mismatches_and_order(lfw, pairs):
    faces = LFW(str(lfw), pairs=pairs, mismatches=True)
    same = [faces.identity(a) == faces.identity(b) for a, b in faces.comparisons]
    assert same == [True, False, True, False]
    assert faces.comparisons[3] == ("Cid_de_la_Mar_0001", "Bob_0002")
    assert faces.ids == ("Bob_0002", "Ann_Lee_0002", "Ann_Lee_0003")


def test_lfw_pairs_as_csv(lfw):
    note(lfw / "matchpairs.csv", "name,i,j", "Ann_Lee,1,2", "Bob,1,2")
    assert LFW(str(lfw), pairs=["matchpairs.csv"]).ids == ("Ann_Lee_0002", "Bob_0002")


def test_lfw_counts_pictures_once_or_as_often_as_they_are_listed(lfw):
    once, often = LFW(str(lfw)), LFW(str(lfw), counted="repeated")
    assert isinstance(often, Repeats)
    assert once.probes == once.ids == often.ids  # a picture is anonymized once
    assert often.probes == ("Ann_Lee_0002", "Ann_Lee_0002", "Bob_0002")
    assert often.gallery == ("Ann_Lee_0001", "Ann_Lee_0003", "Bob_0001")
    note(lfw / "pairsDevTest.txt", "1", "Bob\t1\t2", "Ann_Lee\t1\t3")
    assert LFW(str(lfw), counted="repeated").gallery[::3] == ("Ann_Lee_0001", "Ann_Lee_0001")
    assert LFW(str(lfw)).gallery == ("Ann_Lee_0001", "Ann_Lee_0003", "Bob_0001")
    assert once.notes == ["LFW, edition not told by its folder (dataset.edition)"]
    assert often.notes[1:] == ["3 pairs as often as they are listed"]
    with pytest.raises(ValueError, match=r"counted='thrice': expected one of distinct, repeated"):
        LFW("x", counted="thrice")


KAGGLE = {
    "matchpairsDevTrain.csv": ("name,imagenum1,imagenum2", "Ann_Lee,1,2", "Ann_Lee,3,2"),
    "matchpairsDevTest.csv": ("name,imagenum1,imagenum2", "Bob,1,2"),
    "mismatchpairsDevTrain.csv": ("name,imagenum1,name,imagenum2", "Ann_Lee,1,Bob,1", "Bob,2,Cid_de_la_Mar,1"),
    "mismatchpairsDevTest.csv": ("name,imagenum1,name,imagenum2", "Cid_de_la_Mar,1,Ann_Lee,3"),
    "pairs.csv": ("name,imagenum1,imagenum2,", "Bob,1,2,", "Bob,1,Ann_Lee,2", "Ann_Lee,1,3,", "Cid_de_la_Mar,1,Bob,2"),
}
PEOPLE = ("Ann_Lee", "Bob", "Cid_de_la_Mar")


def moved(lfw, folder):
    """The miniature's pictures in a folder below it, which is what tells editions apart."""
    (lfw / "aside").mkdir()
    for name in PEOPLE:
        (lfw / name).rename(lfw / "aside" / name)
    (lfw / folder).parent.mkdir(parents=True, exist_ok=True)
    (lfw / "aside").rename(lfw / folder)
    return lfw


def without_official_pairs(lfw):
    for path in lfw.glob("pairs*.txt"):
        path.unlink()


@pytest.mark.parametrize("mismatches", [False, True])
def test_lfw_as_kaggle_packs_it(lfw, mismatches):
    official = LFW(str(lfw), mismatches=mismatches).comparisons
    view2 = LFW(str(lfw), pairs="view2", mismatches=mismatches).comparisons
    without_official_pairs(moved(lfw, "lfw-deepfunneled/lfw-deepfunneled"))
    for name, lines in KAGGLE.items():
        (lfw / name).write_bytes("\r\n".join([*lines, ""]).encode())
    faces = LFW(str(lfw), mismatches=mismatches)
    assert faces.comparisons == official
    assert LFW(str(lfw), pairs="view2", mismatches=mismatches).comparisons == view2
    assert faces.notes == ["LFW, deep-funneled"]
    assert faces.load("Bob_0002").shape == (3, 256, 256)


def test_lfw_as_the_authors_have_it(lfw):
    official = LFW(str(lfw)).comparisons
    without_official_pairs(moved(lfw, "imgs"))
    note(lfw / "matchpairs.csv", "name,i,j", "Ann_Lee,1,2", "Ann_Lee,3,2", "Bob,1,2")
    faces = LFW(str(lfw), counted="repeated")
    assert faces.comparisons == official
    assert "edition not told" in faces.notes[0]
    taken = LFW(str(lfw), edition="deep-funneled")  # whoever has them may know
    assert taken.notes == ["LFW, edition not told by its folder, taken for deep-funneled"]
    assert taken.source("Bob_0002").path == lfw / "imgs" / "Bob" / "Bob_0002.jpg"
    assert faces.load("Bob_0002").shape == (3, 256, 256)
    with pytest.raises(FileNotFoundError, match=r"holds no pairs.*mismatchpairsDevTrain\.csv"):
        _ = LFW(str(lfw), mismatches=True).ids


@pytest.mark.parametrize(
    ("folder", "edition"),
    [("lfw", "plain"), ("lfw_funneled", "funneled"), ("lfw-deepfunneled", "deep-funneled")],
)
def test_lfw_editions_by_their_folders(lfw, folder, edition):
    faces = LFW(str(moved(lfw, folder)))
    assert faces.ids == ("Ann_Lee_0002", "Bob_0002")
    assert faces.notes == [f"LFW, {edition}"]
    assert faces.source("Bob_0002").path == lfw / folder / "Bob" / "Bob_0002.jpg"
    other = "plain" if edition == "funneled" else "funneled"
    refused = rf"no pictures of the edition {other}, but {folder} \({edition}\): dataset\.edition={edition} takes them"
    with pytest.raises(FileNotFoundError, match=refused):
        _ = LFW(str(lfw), edition=other).ids
    assert LFW(str(lfw), edition=edition).ids == faces.ids


def test_the_authors_edition_is_asked_for_by_their_protocol(lfw):
    """Below the root it may be any, and is taken for theirs; what is known to be another is refused, and said how to take it."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        ours, authors = (
            compose("config", ["dataset=lfw", f"protocol={name}", f"dataset.root={lfw}"]).dataset
            for name in ("ours", "authors")
        )
    below = instantiate(authors, _convert_="all")
    assert below.notes[0] == "LFW, edition not told by its folder, taken for deep-funneled"
    moved(lfw, "lfw")
    assert instantiate(ours, _convert_="all").notes == ["LFW, plain"]
    with pytest.raises(MissingData, match=r"dataset\.edition=plain takes them\. .*deep-funneled, .*from https") as told:
        _ = instantiate(authors, _convert_="all").ids
    assert "\n" not in str(told.value)
    assert instantiate(authors, edition="plain", _convert_="all").notes[0] == "LFW, plain"


@pytest.mark.parametrize(
    ("name", "told"), [("lfw_funneled", "funneled"), ("lfw", "edition not told"), ("x", "edition")]
)
def test_a_root_may_tell_the_edition_by_its_name(lfw, name, told):
    assert told in LFW(str(lfw.rename(lfw.with_name(name)))).notes[0]


def test_two_editions_in_one_place_are_refused_until_one_is_chosen(lfw):
    moved(lfw, "lfw")
    shutil.copytree(lfw / "lfw", lfw / "lfw_funneled")
    draw(lfw / "lfw_funneled" / "Bob" / "Bob_0002.jpg", 250, seed=9)
    with pytest.raises(
        BadData, match=r"several folders: lfw \(plain\), lfw_funneled \(funneled\)\. Set dataset\.edition"
    ):
        _ = LFW(str(lfw)).ids
    plain, funneled = (LFW(str(lfw), edition=edition) for edition in ("plain", "funneled"))
    assert plain.ids == funneled.ids
    assert not torch.equal(plain.load("Bob_0002"), funneled.load("Bob_0002"))
    shutil.copytree(lfw / "lfw", lfw / "imgs")
    assert LFW(str(lfw), edition="plain").notes == ["LFW, plain"]
    shutil.rmtree(lfw / "lfw_funneled")
    (lfw / "lfw").rename(lfw / "lfw-deepfunneled")
    shutil.copytree(lfw / "lfw-deepfunneled", lfw / "lfw-deepfunneled" / "lfw-deepfunneled")
    with pytest.raises(BadData, match="Move all but one elsewhere"):
        _ = LFW(str(lfw), edition="deep-funneled").ids
    with pytest.raises(ValueError, match="edition='aligned': expected one of any, plain, funneled, deep-funneled"):
        LFW("x", edition="aligned")
    with pytest.raises(ValueError, match="edition=None: expected one of any"):
        LFW("x", edition=None)


def test_lfw_pairs_that_should_be_the_same_and_are_not(lfw):
    note(lfw / "matchpairs.csv", "name,i,j", "Ann_Lee,1,2", "Bob,1,2")
    with pytest.raises(
        BadData, match=r"pairsDevTrain\.txt and pairsDevTest\.txt and matchpairs\.csv should hold the same"
    ):
        _ = LFW(str(lfw)).ids
    note(lfw / "matchpairs.csv", "name,i,j", "Ann_Lee,1,2", "Ann_Lee,3,2", "Bob,1,2")
    assert LFW(str(lfw)).ids == ("Ann_Lee_0002", "Bob_0002")


def test_lfw_that_is_not_here_says_where_to_get_it_and_what_was_looked_for(lfw):
    moved(lfw, "elsewhere")
    with pytest.raises(
        FileNotFoundError, match=r"looked for .*lfw-deepfunneled/lfw-deepfunneled/.*KEYANON_LFW.*research only"
    ):
        _ = LFW(str(lfw)).ids
    without_official_pairs(lfw)
    with pytest.raises(FileNotFoundError, match=r"pairsDevTest\.txt, or for matchpairsDevTrain\.csv and .*kaggle\.com"):
        _ = LFW(str(lfw)).ids


@pytest.mark.data
def test_the_real_lfw_has_the_authors_counts():
    """1,600 probes and as many in the gallery: 2,864 genuine comparisons, as every rate that they print says."""
    if not os.environ.get("KEYANON_LFW"):
        pytest.skip("no LFW; set KEYANON_LFW")
    often, once = (LFW(os.environ["KEYANON_LFW"], counted=counted) for counted in ("repeated", "distinct"))
    assert comparisons(often) == (1600, 1600, 2864, 2_557_136)
    assert comparisons(once) == (1477, 1484, 2243, 2_189_625)
    assert len(set(often.probes[:1000])) == 922
    assert often.probes[0] == "Aaron_Peirsol_0002"
    assert often.identity(often.probes[-1]) == "Zoran_Djindjic"


def comparisons(faces):
    """How many probes and gallery pictures there are, and how many genuine and impostor comparisons of all with all."""
    ours, theirs = (Counter(map(faces.identity, ids)) for ids in (faces.probes, faces.gallery))
    genuine = sum(count * theirs[name] for name, count in ours.items())
    return len(faces.probes), len(faces.gallery), genuine, len(faces.probes) * len(faces.gallery) - genuine


def test_lfw_pairs_that_are_none(lfw):
    path = Path(note(lfw / "odd.txt", "1", "Ann_Lee 1"))
    with pytest.raises(ValueError, match=r"odd\.txt, line 2: 'Ann_Lee 1' is no pair"):
        list(read_pairs(path))
    note(lfw / "none.txt", "0")
    with pytest.raises(ValueError, match=r"no pairs in none\.txt"):
        _ = LFW(str(lfw), pairs=["none.txt"]).ids


def test_lfw_in_a_subfolder_as_scikit_learn_leaves_it(lfw):
    (lfw / "home").mkdir()
    for folder in ("Ann_Lee", "Bob", "Cid_de_la_Mar"):
        (lfw / folder).rename(lfw / "home" / folder)
    (lfw / "home").rename(lfw / "lfw")
    assert LFW(str(lfw)).load("Bob_0002").shape == (3, 256, 256)


def test_lfw_transform_is_the_authors(lfw):
    from torchvision import transforms  # cannot be imported before keyanon

    authors = transforms.Compose(
        [
            transforms.Resize((256, 256)),
            transforms.CenterCrop(200),
            transforms.Resize((256, 256)),
            transforms.ToTensor(),
            transforms.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )
    with PIL.Image.open(lfw / "Bob" / "Bob_0001.jpg") as picture:
        expected = authors(picture.convert("RGB"))
    assert torch.allclose(LFW(str(lfw)).load("Bob_0001"), expected, atol=1e-6)
    assert not torch.allclose(LFW(str(lfw), transform="lanczos").load("Bob_0001"), expected, atol=0.1)


def test_lfw_arguments_that_contradict():
    with pytest.raises(ValueError, match="transform=lanczos"):
        LFW("x", crop=(0, 0, 1, 1))
    with pytest.raises(ValueError, match="'nearest'"):
        LFW("x", transform="nearest")


# Folders and tar files


def packed(folder, archive):
    with tarfile.open(archive, "w") as tar:
        for path in sorted(folder.iterdir(), reverse=True):
            tar.add(path, f"inside/{path.name}")
    return str(archive)


@pytest.fixture
def pairs(tmp_path):
    folder = tmp_path / "pairs"
    for seed, name in enumerate(("Zoe_0004", "Zoe_0001", "Al_Ba_0011", "Al_Ba_0002")):
        draw(folder / f"{name}.png", seed=seed)
    return folder


def test_pairs_folder(pairs):
    faces = PairsFolder(str(pairs), size=16)
    assert isinstance(faces, Dataset)
    assert (faces.gallery, faces.ids) == (("Al_Ba_0002", "Zoe_0001"), ("Al_Ba_0011", "Zoe_0004"))
    assert faces.identity("Al_Ba_0011") == "Al_Ba"


def test_a_tar_file_holds_what_the_folder_holds(pairs, tmp_path):
    folder, archive = PairsFolder(str(pairs)), PairsFolder(packed(pairs, tmp_path / "pairs.tar"))
    assert (folder.ids, folder.gallery) == (archive.ids, archive.gallery)
    for id in (*folder.ids, *folder.gallery):
        assert torch.equal(folder.load(id), archive.load(id))
    assert PairsFolder(str(tmp_path)).ids == archive.ids  # a folder of tar files


def test_broken_picture_in_a_tar_file_is_named(pairs, tmp_path):
    (pairs / "Zoe_0004.png").write_bytes(b"no picture")
    faces = PairsFolder(packed(pairs, tmp_path / "pairs.tar"))
    with pytest.raises(BadPicture, match=r"pairs\.tar/inside/Zoe_0004\.png"):
        faces.load("Zoe_0004")
    assert faces.load("Zoe_0001").shape == (3, 256, 256)


def test_compressed_tar_file_is_refused(pairs, tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w:gz") as tar:
        tar.add(pairs / "Zoe_0001.png")
    with pytest.raises(ValueError, match=r"x\.tar: not an uncompressed tar file"):
        _ = Folder(str(tmp_path / "x.tar")).ids


@pytest.mark.parametrize("extra", ["Zoe_0009", "Solo_0001"])
def test_pairs_of_three_or_of_one_are_refused(pairs, extra):
    draw(pairs / f"{extra}.png")
    with pytest.raises(ValueError, match=r"(Zoe has 3|Solo has 1) pictures \(.*\), expected 2"):
        _ = PairsFolder(str(pairs)).ids


def test_pairs_by_list(pairs, tmp_path):
    draw(pairs / "Solo_0001.png")
    wanted = note(tmp_path / "wanted.txt", "Zoe_0001", "Zoe_0004", "Gone_0001", "Gone_0002")
    faces = PairsFolder(str(pairs), list=wanted)
    assert faces.ids == ("Gone_0002", "Zoe_0004")
    with pytest.raises(BadPicture, match="holds no picture Gone_0002"):
        faces.load("Gone_0002")


def test_folder_sorts_and_passes_over_other_files(tmp_path):
    for name in ("b.PNG", "a10.jpg", "a2.webp", "Z.png"):
        draw(tmp_path / name)
    note(tmp_path / "readme.md", "no picture")
    (tmp_path / "._a2.webp").write_bytes(b"left by another system")
    faces = Folder(str(tmp_path), size=32, crop=(0, 0, 0.5, 0.5))
    assert isinstance(faces, Dataset)
    assert faces.ids == ("Z", "a10", "a2", "b")
    assert (faces.gallery, faces.identity("b"), faces.load("b").shape) == ((), None, (3, 32, 32))


def test_folder_by_list(tmp_path):
    draw(tmp_path / "b.png")
    draw(tmp_path / "a.png")
    assert Folder(str(tmp_path), list=note(tmp_path / "l.txt", "b", "c", "a")).ids == ("b", "c", "a")
    with pytest.raises(FileNotFoundError, match="holds none of the 1 pictures of the list"):
        _ = Folder(str(tmp_path), list=note(tmp_path / "m.txt", "x")).ids


def test_two_pictures_of_one_id_are_refused(tmp_path):
    draw(tmp_path / "a.png")
    draw(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match=r"two pictures have the id a: .*a\.jpg and .*a\.png"):
        _ = Folder(str(tmp_path)).ids


NAMES = [
    "a" * 251, "é" * 125, "un nom avec des espaces", "a.b", "a.b.c", "-rf", "--limit=2", "日本", "Ünïcode", "Unicode", "UNICODE",
    "e\u0301", "\u00e9", "#1", "a,b", "100%", "x=1",
]  # fmt: skip


def test_any_name_that_a_disk_can_hold_is_an_id(tmp_path):
    for number, name in enumerate(NAMES):
        draw(tmp_path / f"{name}.png", seed=number)
    faces = Folder(str(tmp_path), size=32)
    assert faces.ids == tuple(sorted(NAMES))
    assert len({faces.source(id).read() for id in faces.ids}) == len(NAMES)
    for number, name in enumerate(NAMES):
        pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        assert torch.equal(faces.load(name), from_pil(PIL.Image.fromarray(pixels)))
    archive = Folder(packed(tmp_path, tmp_path.parent / "named.tar"), size=32)
    assert archive.ids == faces.ids


@pytest.mark.parametrize("name", [b"caf\xe9.png", b"a\nb.png"])
def test_a_name_that_no_file_of_ours_can_hold_is_refused(tmp_path, name):
    (tmp_path / os.fsdecode(name)).write_bytes(draw(tmp_path / "a.png").read_bytes())
    with pytest.raises(BadData, match="rename it"):
        _ = Folder(str(tmp_path)).ids


def test_what_a_folder_holds_besides_is_counted(tmp_path):
    for name in ("a.png", "b.JPG", "sub/c.png", "sub/deep/d.webp", ".hidden/e.png", "f.heic"):
        draw(tmp_path / name) if name != "f.heic" else (tmp_path / name).write_bytes(b"\0\0\0\x18ftypheic")
    for name in ("notes.md", "raw.CR2", "raw2.CR2", "none", ".DS_Store", "sub/readme.md"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "folder.png").mkdir()
    faces = Folder(str(tmp_path), size=32)
    assert isinstance(faces, ListsFolder)
    assert faces.ids == ("a", "b", "f")
    assert faces.passed_over == {
        "files with the suffix .CR2": 2, "files with the suffix .md": 1, "files with the suffix none": 1,
        "pictures in subfolders": 2,
    }  # fmt: skip
    with pytest.raises(BadPicture, match=r"f\.heic.*HEIC"):
        faces.load("f")
    listed = Folder(str(tmp_path), list=note(tmp_path.parent / "two.txt", "a", "b"))
    assert listed.passed_over["pictures that the list leaves out"] == 1
    (tmp_path / "in").mkdir()
    for name in ("x.png", "y.txt"):
        draw(tmp_path / "in" / name) if name == "x.png" else (tmp_path / "in" / name).write_bytes(b"")
    assert Folder(packed(tmp_path / "in", tmp_path / "x.tar")).passed_over == {"files with the suffix .txt": 1}
    assert Folder(str(Path(LISTS).parents[1] / "assets" / "faces")).passed_over.keys() <= {"files with the suffix .md"}


@pytest.mark.parametrize("encoded", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lists_and_pairs_as_other_systems_write_them(tmp_path, encoded, end):
    path = tmp_path / "x.txt"
    path.write_bytes(end.join(["Zoé_0001.JPG  ", "b.Png\t", "", "# end", "3..4"]).encode(encoded))
    assert read_list(str(path)) == ("Zoé_0001", "b", "3", "4")
    path.write_bytes(end.join(["2", "Zoé\t1\t2 ", "Bob,1,Zoé,3", ""]).encode(encoded))
    assert list(read_pairs(path)) == [("Zoé_0001", "Zoé_0002"), ("Bob_0001", "Zoé_0003")]


@pytest.mark.parametrize("encoded", ["latin-1", "utf-16"])
def test_lists_and_pairs_in_another_encoding_are_named(tmp_path, encoded):
    (tmp_path / "x.txt").write_bytes("a\nZoé\t1\t2\n".encode(encoded))
    for read in (lambda: read_list(str(tmp_path / "x.txt")), lambda: list(read_pairs(tmp_path / "x.txt"))):
        with pytest.raises(BadData, match=r"x\.txt, line \d: not in UTF-8"):
            read()


def test_folder_without_pictures(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no picture; looked for \*\.bmp"):
        _ = Folder(str(tmp_path)).ids
    with pytest.raises(FileNotFoundError, match=r"there is no .*gone"):
        _ = Folder(str(tmp_path / "gone")).ids


# Where the bytes are


def sourced(root, kind):
    """A dataset of one class with a picture of some id, and that id."""
    if kind in ("folder", "tar"):
        draw(root / "folder" / "Al_0001.png", seed=1)
        place = packed(root / "folder", root / "x.tar") if kind == "tar" else str(root / "folder")
        return Folder(place, size=32), "Al_0001"
    if kind == "pairs":
        for number in (1, 2):
            draw(root / f"Al_000{number}.png", seed=number)
        return PairsFolder(str(root), size=32), "Al_0002"
    if kind == "lfw":
        for number in (1, 2):
            draw(root / "Al" / f"Al_000{number}.jpg", seed=number)
        note(root / "pairs.txt", "1", "Al 1 2")
        return LFW(str(root), size=32, pairs=["pairs.txt"]), "Al_0002"
    draw(root / {"celebahq": "CelebA-HQ-img/7.jpg", "ffhq": "images1024x1024/00000/00007.png"}[kind], seed=1)
    return (CelebAHQ(str(root), size=32), "7") if kind == "celebahq" else (FFHQ(str(root), size=32), "00007")


@pytest.mark.parametrize("kind", ["celebahq", "ffhq", "lfw", "pairs", "folder", "tar"])
def test_a_picture_is_read_from_its_source_and_from_nothing_else(tmp_path, kind):
    faces, id = sourced(tmp_path, kind)
    source, picture = faces.source(id), faces.load(id)
    bytes_on_disk = source.path.read_bytes()
    size = len(source.read())
    assert size == (source.size or len(bytes_on_disk))
    inside = bytearray(bytes_on_disk)
    inside[source.offset : source.offset + size] = bytes(size)
    outside = bytearray(b"\xa5" * len(bytes_on_disk))
    outside[source.offset : source.offset + size] = source.read()
    source.path.write_bytes(outside)
    assert torch.equal(faces.load(id), picture)
    source.path.write_bytes(inside)
    with pytest.raises(BadPicture):
        faces.load(id)
    source.path.unlink()
    with pytest.raises(BadPicture):
        faces.source(id)
    with pytest.raises(BadPicture):
        faces.source("nobody")
    with pytest.raises(BadPicture, match="not to be read"):
        Source(tmp_path).read()


# Photographs that packages ship

GONE = Package("no-such-package", "no_such_package", "data/face.png")


@pytest.mark.weights
@pytest.mark.parametrize("id", PHOTOGRAPHS)
def test_photographs_are_framed_as_utkface(id):
    if PHOTOGRAPHS[id].file.find() is None:
        pytest.skip(f"not installed: {PHOTOGRAPHS[id].file}")
    picture = InstalledPhotographs(size=128).load(id)
    assert picture.shape == (3, 128, 128)
    assert -1 <= picture.min() < picture.max() <= 1
    (face,) = MtcnnDetector().detect(picture[None])
    points = (face.points + 0.5) / 128
    # a turned head has its eyes closer together, so theirs is only the middle; upright is 3 px at most
    assert points[:2].mean(0) == pytest.approx(FACES128_TEMPLATE[:2].mean(0), abs=0.04)
    assert points[0, 1] == pytest.approx(points[1, 1], abs=0.03)
    assert np.linalg.norm(points - FACES128_TEMPLATE, axis=1).mean() < 0.11


@pytest.mark.weights
def test_photographs_show_nine_different_faces():
    faces = InstalledPhotographs(size=32)
    assert isinstance(faces, Dataset)
    assert faces.ids[0] == "skimage-astronaut"
    assert faces.ids[-6:] == tuple(f"insightface-t1-{i}" for i in range(6))
    assert (faces.gallery, faces.identity("skimage-astronaut")) == ((), None)
    group = torch.stack([faces.load(id) for id in faces.ids[-6:]]).flatten(1)
    assert torch.pdist(group, 1).min() / group.shape[1] > 0.1  # mean difference of the most alike, in [0, 2]
    with pytest.raises(BadPicture, match=r"no photograph nobody; there are skimage-astronaut"):
        faces.load("nobody")


@pytest.mark.weights
def test_one_package_missing_is_a_bad_picture(monkeypatch):
    monkeypatch.setitem(PHOTOGRAPHS, "insightface-t1-0", Photograph(GONE))
    faces = InstalledPhotographs()
    assert len(faces.ids) == len(PHOTOGRAPHS)
    with pytest.raises(BadPicture, match=r"insightface-t1-0 is missing: Python package no-such-package: .*face\.png"):
        faces.load("insightface-t1-0")


@pytest.mark.weights
def test_photograph_without_a_face_is_a_bad_picture(monkeypatch):
    sky = Photograph(PHOTOGRAPHS["matplotlib-grace_hopper"].file, (0.7, 0, 1, 0.3))
    monkeypatch.setitem(PHOTOGRAPHS, "sky", sky)
    with pytest.raises(BadPicture, match=r"grace_hopper\.jpg: no face found for sky"):
        InstalledPhotographs().load("sky")


def test_no_package_at_all_names_them(monkeypatch):
    other = Package("another>=2", "another_package", "x.jpg")
    monkeypatch.setattr(datasets, "PHOTOGRAPHS", {"a": Photograph(GONE), "b": Photograph(other)})
    with pytest.raises(
        FileNotFoundError, match=r"none of the photographs.*face\.png.*`pip install another>=2 no-such-pa"
    ):
        _ = InstalledPhotographs().ids


# The real thing


@pytest.mark.data
@pytest.mark.parametrize(
    ("dataset", "count", "gallery"),
    [
        (CelebAHQ(str(DATA / "celebahq-mini"), 128, "celebahq_mini", (0.178, 0.289, 0.827, 0.938)), 28, 0),
        (PairsFolder(str(DATA / "lfw-gray"), 128, "lfw_gray"), 1300, 1300),
        (Folder(str(DATA / "utkface128"), 128, "utkface128_heldout"), 1000, 0),
    ],
    ids=["celebahq_mini", "lfw_gray", "utkface_heldout"],
)
def test_shipped_folders(dataset, count, gallery):
    if not DATA.is_dir():
        pytest.skip(f"no faces at {DATA}; set KEYANON_DATA")
    assert (len(dataset.ids), len(dataset.gallery)) == (count, gallery)
    for id in (dataset.ids[0], dataset.ids[-1]):
        picture = dataset.load(id)
        assert picture.shape == (3, 128, 128)
        assert -1 <= picture.min() < picture.max() <= 1
