"""Published names tell nothing of the files' names, and their owner can map them back."""

import csv
import multiprocessing
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from experiments.harness.preflight import open_dataset
from keyanon.channel.keys import MasterKey, experiment_key
from keyanon.channel.nonces import PerIdentity
from keyanon.errors import BadPicture, BadSetting
from keyanon.faces.datasets import Folder
from keyanon.faces.renaming import Renamed, opened
from keyanon.types import Dataset, Noted, Repeats, Synthetic
from tests.conftest import ROOT, smooth_picture

NAMES = ["Anna Smith", "Bob", 'größe, "x"', "sub.name"]


@pytest.fixture
def faces(tmp_path) -> Path:
    root = tmp_path / "faces"
    root.mkdir()
    for i, name in enumerate(NAMES):
        smooth_picture(i).save(root / f"{name}.png")
    (root / "Zoe.png").write_text("this is not a picture")
    return root


def renamed(root: Path, names: Path) -> Dataset:
    return opened(Folder, "hash", str(names), root=str(root), size=32)


def test_ids_tell_no_name_and_the_owner_finds_it(faces, tmp_path):
    plain, other = Folder(str(faces), 32), renamed(faces, tmp_path / "runs" / "names")
    assert isinstance(other, Dataset)
    assert len(set(other.ids)) == len(plain.ids)
    assert all(len(id) == 20 and int(id, 16) >= 0 for id in other.ids)
    with other.table.open(newline="", encoding="utf-8") as file:
        found = {row["id"]: row["name"] for row in csv.DictReader(file)}
    assert [found[id] for id in other.ids] == list(plain.ids)  # in the same order, too
    for id in (id for id in other.ids if found[id] != "Zoe"):
        assert torch.equal(other.load(id), plain.load(found[id]))
    assert (tmp_path / "runs" / "names").stat().st_mode & 0o077 == 0
    assert (tmp_path / "runs" / "names" / "key").stat().st_mode & 0o077 == 0


def test_who_guesses_a_name_cannot_check_it_without_the_key(faces, tmp_path):
    one, two = (renamed(faces, tmp_path / name) for name in ("one", "two"))
    assert not set(one.ids) & set(two.ids)
    assert renamed(faces, tmp_path / "one").ids == one.ids  # resumed
    assert isinstance(MasterKey(bytes.fromhex((tmp_path / "one" / "key").read_text())), MasterKey)


def drawn(faces: Path, names: Path, queue) -> None:
    queue.put(list(renamed(faces, names).ids))


def test_shards_that_begin_at_once_name_alike(faces, tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=drawn, args=(faces, tmp_path / "names", queue)) for _ in range(4)]
    for process in processes:
        process.start()
    found = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert all(ids == found[0] for ids in found)
    assert [path.name for path in (tmp_path / "names").iterdir()] == ["key"]


def test_what_is_said_of_a_broken_picture_tells_its_id(faces, tmp_path):
    dataset = renamed(faces, tmp_path / "names")
    [broken] = [id for id in dataset.ids if dataset._names[id] == "Zoe"]
    with pytest.raises(BadPicture, match=broken) as raised:
        dataset.load(broken)
    assert "Zoe" not in str(raised.value)
    assert str(dataset.table) in str(raised.value)
    with pytest.raises(BadPicture, match="no picture has this id"):
        dataset.load("Zoe")


@dataclass(frozen=True)
class TwoPeople:
    ids = ("a1", "a2", "b1")
    gallery = ("a0",)

    def identity(self, id: str) -> str | None:
        return id[0] if id[0] in "ab" else None

    def load(self, id: str) -> torch.Tensor:
        return torch.zeros(3, 32, 32)


def test_people_stay_who_they_are(tmp_path):
    dataset = opened(TwoPeople, "hash", str(tmp_path))
    assert [dataset.identity(id) for id in [*dataset.ids, *dataset.gallery]] == ["a", "a", "b", "a"]
    nonces, picture = PerIdentity(dataset), torch.zeros(3, 2, 2)
    first, second, other = (nonces(experiment_key(), b"", id, picture) for id in dataset.ids)
    assert first == second != other


class OfManyPictures(TwoPeople):
    probes = ("a1", "a1", "a2", "b1", "a1")
    notes = ("an edition",)


def test_pictures_count_as_often_under_other_names(tmp_path):
    dataset, plain = (opened(kind, "hash", str(tmp_path)) for kind in (OfManyPictures, TwoPeople))
    assert isinstance(dataset, Repeats)
    assert isinstance(dataset, Noted)
    first, second, other = dataset.ids
    assert dataset.probes == [first, first, second, other, first]
    assert plain.probes == plain.ids
    assert (dataset.notes, plain.notes) == (("an edition",), [])


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "conf" / "dataset").glob("*.yaml")))
def test_every_dataset_can_be_renamed_and_folders_of_ones_own_are(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        plain, asked = (compose("config", [f"dataset={name}", *more]).dataset for more in ([], ["dataset.rename=hash"]))
    assert plain.rename == ("hash" if name == "folder" else None)
    assert isinstance(instantiate(asked, _convert_="all"), Renamed)
    dataset = instantiate(plain, _convert_="all")
    assert (isinstance(dataset, Synthetic) and dataset.synthetic) == (name == "bundled")
    assert not list(tmp_path.iterdir())  # nothing is written before it is read


def test_another_way_to_rename_is_refused(tmp_path):
    with pytest.raises(BadSetting, match=r"rename='sha256': expected one of hash or null"):
        opened(TwoPeople, "sha256", str(tmp_path))
    problems: list[str] = []
    config = {"_target_": "keyanon.faces.renaming.opened", "rename": "x", "names": "n", "dataset": None}
    assert open_dataset(OmegaConf.create({"dataset": config}), "folder", problems) is None
    assert "dataset.dataset=None" in problems[0]
