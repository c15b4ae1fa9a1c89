"""Settings of commands that are nonsense are one line before any work, and what a command skipped is in its exit code."""

import math

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from experiments.harness.errors import SKIPPED
from experiments.harness.settings import SETTINGS, check
from keyanon.errors import BadSetting
from tests.conftest import ROOT, smooth_picture

CONFIGS = sorted(path.stem for path in (ROOT / "conf").glob("*.yaml"))
GROUPS = {path.name for path in (ROOT / "conf").iterdir() if path.is_dir()}
# of parts by name, which check their own
PLAIN = {"finder", "inversions", "methods", "second_detector", "separability", "threshold"}
# None of these is a count, a share, a device, a shard, a name or a list of texts.
NONSENSE = [-1, 0, -0.5, 1.5, math.nan, math.inf, True, "", " ", "x y", "0/0", "2/1", "1/", "a/b", {"a": "b"}, [[1]]]


def composed(config: str, *overrides: str):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose(config, overrides=list(overrides))


@pytest.mark.parametrize("config", CONFIGS)
def test_every_setting_of_every_command_is_checked(config):
    own = OmegaConf.load(ROOT / "conf" / f"{config}.yaml").keys() - GROUPS - {"defaults"}
    assert own - PLAIN <= SETTINGS.keys()
    check(composed(config))


@pytest.mark.parametrize("config", CONFIGS)
def test_nonsense_is_named(config):
    """Of each setting every value that it cannot be; the few that it can be are told apart below."""
    whole = composed(config)
    for name in SETTINGS.keys() & whole.keys():
        refused = 0
        for value in NONSENSE:
            cfg = whole.copy()
            OmegaConf.update(cfg, name, value, merge=False, force_add=True)
            try:
                check(cfg)
            except BadSetting as error:
                assert str(error).startswith(f"{name}={value!r}: expected "), error
                refused += 1
        assert refused >= {
            "name": 9,
            "runs": 9,
            "notes": 15,
            "thresholds": 15,
            "allow_faces_in_clear": 15,
            "long": 15,
            "estimate_only": 15,
        }.get(name, len(NONSENSE)), name


@pytest.mark.parametrize(
    "override",
    ["limit=null", "limit=1", "threads=null", "threads=2", "batch_size=512", "shard=1/1", "shard=32/32", "device=cuda:1",
     "device=mps", "far=1e-6", "name=1_a", "notes=[a,b]"],
)  # fmt: skip
def test_sense_is_taken(override):
    check(composed("config", override))


@pytest.mark.parametrize("size", [-1, 0, 15, 64.5, "a"])
def test_a_size_is_a_number_of_pixels(size):
    with pytest.raises(BadSetting, match=r"dataset\.size="):
        check(composed("config", f"dataset.size={size}"))


FILES_ALONE = [
    "anonymizer=gaussian_blur", "parser=ellipse", "dataset=folder", "dataset.size=64", "name=files", "attacks=[]",
]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pictures" / "sub").mkdir(parents=True)
    for i in range(2):
        smooth_picture(i).save(tmp_path / "pictures" / f"{i}.png")
    return tmp_path / "pictures"


@pytest.mark.parametrize("empty", ["[]", "{}"])
def test_a_command_that_only_makes_files(command_in_process, folder, empty):
    done = command_in_process(*FILES_ALONE, f"dataset.root={folder}", f"recognizers={empty}", f"scorers={empty}")
    assert done.returncode == 0, done.stderr
    assert "faces_in_clear" in done.stdout  # which is looked for whatever is asked
    (made,) = folder.parent.glob("results/runs/files/*/anonymized")
    assert len(list(made.iterdir())) == 2


def test_nonsense_stops_a_command_in_one_line(command_in_process):
    done = command_in_process("limit=-1")
    assert (done.returncode, done.stderr.splitlines()) == (
        1, ["keyanon: limit=-1: expected a whole number from 1 on, or null for all"],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("what", "told", "code"),
    [
        ("a broken picture", "1 of 3 pictures skipped", SKIPPED),
        ("a picture in a subfolder", "not read: 1 pictures in subfolders", SKIPPED),
        ("a text", "not read: 1 files with the suffix .md", 0),
    ],
)
def test_the_exit_code_says_that_pictures_were_skipped(command_in_process, folder, what, told, code):
    place = {"a broken picture": "broken.png", "a picture in a subfolder": "sub/3.png", "a text": "readme.md"}[what]
    (folder / place).write_text("no picture")
    asked = [*FILES_ALONE, f"dataset.root={folder}", "recognizers=[]", "scorers=[psnr]"]
    if what == "a broken picture":
        sweep = command_in_process("-m", *asked, "anonymizer=gaussian_blur,blackout")
        assert sweep.returncode == code, sweep.stderr
    for _ in range(2):  # also where all is done already
        done = command_in_process(*asked)
        assert done.returncode == code, done.stderr
        assert told in done.stdout + done.stderr
