"""From a machine with nothing to the paper's tables by make, killed on the way: see tests/rehearsal.py."""

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from experiments.brought import datasets, missing
from tests.rehearsal import ARGS, Machine, bring, machine, wait_for

pytestmark = [pytest.mark.no_cover, pytest.mark.xdist_group("rehearsal")]
EXPERIMENTS = [
    ("diversity", "celebahq"), ("jpeg", "lfw"), ("recovery", "lfw"), ("separability", "celebahq"),
    ("table1", "celebahq"), ("table1", "lfw"), ("table2", "lfw"), ("wrong_keys", "lfw"),
]  # fmt: skip
FEW = "recognizers=[arcface_r50,adaface_vit]"


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Iterator[Machine]:
    with machine(tmp_path_factory.mktemp("machine")) as made:
        yield made


@pytest.fixture
def brought(here) -> Machine:
    if "KEYANON_LFW" not in here.environment:
        here.environment |= bring(here.folder / "data")
    return here


def asked_before(here: Machine) -> list[str]:
    return [path for _, path, _ in here.site.asked]


def test_on_a_machine_with_nothing_one_message_says_what_to_bring(here):
    for target in ("reproduce-table1", "reproduce-all"):
        begun = time.monotonic()
        code, printed = here.make(target)
        assert (code, time.monotonic() - begun < 10) == (2, True)
        assert printed.count("keyanon:") == 1
        assert printed.count("CelebA-HQ: not here. To be had: CelebAMask-HQ.zip") == 1
        assert printed.count("export KEYANON_CELEBAHQ=/path") == 1
        assert printed.count("export KEYANON_LFW=/path") == 1
    assert not here.cache.exists()
    assert here.site.asked == []


def test_nothing_is_fetched_before_the_licences_are_accepted(brought):
    code, printed = brought.make("reproduce-table1")
    assert code == 2
    assert "CelebAMask-HQ is for non-commercial research" in printed
    assert "nothing was fetched: accept the licences above with ACCEPT_LICENCES=1" in printed
    assert brought.site.asked == []


def test_table1_from_nothing_killed_twice(brought):
    """While it fetches a release, and while it runs; nothing that was done is done again."""
    site, runs = brought.site, brought.checkout / "results" / "runs" / "table1"
    site.stall = "vggface2.pt"
    process = brought.start("reproduce-table1", ACCEPT_LICENCES="1")
    partial = brought.cache / "facenet_vggface2.partial" / "20180402-114759-vggface2.pt.partial"
    wait_for(lambda: site.stalled.is_set() and partial.is_file() and partial.stat().st_size > 10**6, process)
    brought.kill(process)
    have, site.stall = partial.stat().st_size, None
    process = brought.start("reproduce-table1", ACCEPT_LICENCES="1")
    wait_for(lambda: list(runs.glob("*/anonymized/*.png")), process)
    brought.kill(process)
    assert [span for _, path, span in site.asked if path.endswith("vggface2.pt")] == [None, f"bytes={have}-"]
    made = {path: path.stat().st_mtime_ns for path in runs.glob("*/anonymized/*.png")}
    before = len(site.asked)
    code, printed = brought.make("reproduce-table1")
    assert code == 0, printed
    assert len(site.asked) == before  # all weights are here, and no licence is asked for again
    assert brought.tables() == ["table1"]
    assert {path: path.stat().st_mtime_ns for path in made} == made
    # of the repository only the model
    assert not [path for path in asked_before(brought) if "keys/" in path or "landmarks" in path]
    table = (brought.checkout / "results" / "tables" / "table1.md").read_text()
    assert "rehearsal on random weights" in table
    assert all(name in table for name in ("facenet_casia", "adaface_vit", "lfw"))


def test_table2_goes_on_in_a_download_of_the_hub_that_was_killed(brought):
    """Whose own library would begin the file again."""
    site, hub = brought.site, Path(brought.environment["HF_HOME"])
    assert len(list(hub.rglob("blobs/*"))) == 4
    [snapshot] = hub.rglob("snapshots/*/ffhq-diffusers/unet/*.safetensors")
    blob = snapshot.resolve()
    snapshot.unlink()
    blob.with_name(f"{blob.name}.fetched.partial").write_bytes(blob.read_bytes()[:100_000])
    blob.unlink()
    code, printed = brought.make("reproduce-table2", ACCEPT_LICENCES="1", ARGS=f"{ARGS} {FEW}")
    assert code == 0, printed
    asked = [(method, span) for method, path, span in site.asked if "/unet/diffusion" in path]
    assert ("GET", "bytes=100000-") in asked
    assert brought.tables() == ["table1", "table2"]


def test_all_says_how_long_each_takes_and_goes_to_all_tables(brought):
    """With the two recognizers whose stand-ins are small; `make rehearsal` has all four, and each command as a process."""
    code, printed = brought.make("reproduce-all", ACCEPT_LICENCES="1", ARGS=f"{ARGS} {FEW}")
    assert code == 0, printed
    begin = printed.index("diversity --runs")
    for name, dataset in EXPERIMENTS:
        assert re.search(rf"^{name}, signflip\w* of {dataset}: about", printed[:begin], re.MULTILINE), name
    assert brought.tables() == sorted({name for name, _ in EXPERIMENTS})
    asked = [path for path in asked_before(brought) if path.endswith("/controlnet_epoch_15.pth")]
    assert asked
    assert all("/segmentation_masks/" in path for path in asked)


def test_which_pictures_an_experiment_asks_for():
    assert datasets("table1") == ["celebahq", "lfw"]
    assert datasets("table2") == ["lfw"]


@pytest.mark.parametrize(
    ("variable", "experiment", "picture"),
    [
        ("KEYANON_CELEBAHQ", "diversity", "CelebA-HQ-img/0.jpg"),
        ("KEYANON_CELEBAHQ", "diversity", "0.png"),
        ("KEYANON_LFW", "table2", "Ada_Able/Ada_Able_0001.jpg"),
        ("KEYANON_LFW", "table2", "lfw-deepfunneled/lfw-deepfunneled/Ada_Able/Ada_Able_0001.jpg"),
    ],
)
def test_a_folder_without_pictures_is_not_what_is_to_be_brought(monkeypatch, tmp_path, variable, experiment, picture):
    monkeypatch.setenv(variable, str(tmp_path / "gone"))
    assert f"there is no folder {tmp_path / 'gone'}" in missing([experiment])[0]
    monkeypatch.setenv(variable, str(tmp_path))
    (tmp_path / "README.txt").touch()
    assert f"{tmp_path} holds none of its pictures; looked for" in missing([experiment])[0]
    (tmp_path / picture).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / picture).touch()
    assert missing([experiment]) == []
