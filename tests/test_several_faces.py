"""Several faces on a picture: every shipped method treats each of them, or the run says which are in clear."""

import numpy as np
import pandas as pd
import PIL.Image
import pytest
import torch

from benchmarks.several_faces import Composed, composed
from keyanon.channel.keys import experiment_key
from keyanon.channel.pixels import to_bytes, to_floats
from keyanon.faces.finding import Finder
from keyanon.measures.clear import SAME_PICTURE, alike, in_clear
from keyanon.types import Image
from tests.test_contract import composed as config
from tests.test_contract import made, names

pytestmark = pytest.mark.weights
# These leave faces by design, or hide little: what is asked of them is that the check sees it.
LEAVES_FACES = {"identity", "noise_flip"}
TINY = ["backbone=faces128", "+backbone.chunk=1"]


@pytest.fixture(scope="module")
def pictures() -> list[Composed]:
    """One to four faces of 56 to 72 px on 192 px."""
    rng = np.random.default_rng(3)
    return [composed(192, rng.integers(56, 73, n), "noisy", rng) for n in (1, 2, 3, 4)]


@pytest.fixture(scope="module")
def originals(pictures) -> Image:
    return to_floats(to_bytes(torch.stack([each.picture for each in pictures])))


def left(pictures: list[Composed], originals: Image, published: Image) -> list[int]:
    """Faces in clear, by the places at which they were put."""
    return [
        sum(alike(x, y, place) >= SAME_PICTURE for place in each.places)
        for each, x, y in zip(pictures, originals, published, strict=True)
    ]


@pytest.mark.parametrize("name", names("anonymizer"))
def test_no_face_is_left_and_what_is_left_is_counted(name, pictures, originals, tiny_block_dct):
    cfg = config(f"anonymizer={name}", *TINY, f"backbone.source={tiny_block_dct}")
    if "strength" in cfg.anonymizer:
        cfg.anonymizer.steps = 4  # of two the one that is run is the lowest, and changes nothing
    method, finder = made(cfg.anonymizer), made(cfg.finder)
    assert made(cfg.parser).mask(originals, (192, 192)).flatten(1).any(1).all(), "refused"
    published = to_floats(method.anonymize(originals, [experiment_key()] * 4, list("abcd")).images)
    clear = left(pictures, originals, published)
    found = zip(originals, published, finder.found(originals), strict=True)
    counted = [in_clear(x, y, [face.box for face in faces]) for x, y, faces in found]
    if name in LEAVES_FACES:
        assert all(counted) == all(clear)
    else:
        assert clear == counted == [0, 0, 0, 0]


@pytest.mark.parametrize("name", ["gaussian_blur", "eye_mask", "mean_face", "box_blur", "scrambling_full"])
def test_the_largest_is_one_whoever_looks_for_it(name, pictures, originals):
    """Parser and method choose the same one: all others are left, and each of them is counted."""
    cfg = config(f"anonymizer={name}", "faces=largest")
    published = to_floats(made(cfg.anonymizer).anonymize(originals, [experiment_key()] * 4, list("abcd")).images)
    found = Finder("largest").found(originals)
    assert [len(faces) for faces in found] == [1, 2, 3, 4]
    for x, y, faces in zip(originals, published, found, strict=True):
        assert alike(x, y, faces[0].box) < SAME_PICTURE
        assert in_clear(x, y, [face.box for face in faces]) == len(faces) - 1


@pytest.mark.parametrize("parser", names("parser"))
def test_a_parsers_mask_is_on_every_face_that_counts(parser, pictures, originals):
    if parser in ("ellipse", "everywhere"):
        pytest.skip("looks for no face")
    for choice in ("all", "largest"):
        cfg = config(f"parser={parser}", f"faces={choice}")
        masks, faces = made(cfg.parser).mask(originals, (192, 192)), made(cfg.finder).found(originals)
        for (mask,), found in zip(masks, faces, strict=True):
            centres = [((face.box[:2] + face.box[2:]) / 2).astype(int) for face in found]
            on = [bool(mask[down, across]) for across, down in centres]
            assert on == ([True] * len(found) if choice == "all" else [True] + [False] * (len(found) - 1))


@pytest.fixture
def album(tmp_path, pictures) -> list[str]:
    """What asks for a run on a folder of a picture of one face and one of two."""
    folder = tmp_path / "album"
    folder.mkdir()
    for name, each in zip("ab", pictures, strict=False):
        PIL.Image.fromarray(to_bytes(each.picture).permute(1, 2, 0).numpy()).save(folder / f"{name}.png")
    return [
        "dataset=folder", f"dataset.root={folder}", "dataset.rename=null", "dataset.size=192", "name=album", "attacks=[]",
        "recognizers=[]", "scorers=[psnr_face]",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "code", "in_clear_of"),
    [
        (["anonymizer=deface_mosaic"], 0, {"a": 0, "b": 0}),
        (["anonymizer=deface_mosaic", "faces=largest"], 4, {"a": 0, "b": 1}),
        (["anonymizer=deface_mosaic", "faces=largest", "allow_faces_in_clear=true"], 0, {"a": 0, "b": 1}),
        (["anonymizer=deface_mosaic", "faces=one_or_skip"], 3, {"a": 0}),
        (["anonymizer=identity"], 0, {"a": 1, "b": 2}),
        (["anonymizer=blackout", "faces=largest"], 4, {"a": 0, "b": 1}),
    ],
    ids=["all", "largest", "allowed", "one", "identity", "control"],
)
def test_a_run_counts_faces_and_says_what_is_in_clear(album, tmp_path, command_in_process, settings, code, in_clear_of):
    run = command_in_process(*album, *settings)
    assert run.returncode == code, run.stderr
    assert ("1 faces are in clear on 1 published pictures: b (1)" in run.stderr) == (code == 4)
    (scores,) = (pd.read_parquet(path) for path in tmp_path.glob("results/runs/album/*/scores.parquet"))
    values = {
        (view, name): part.set_index("id").value.to_dict() for (view, name), part in scores.groupby(["view", "scorer"])
    }
    assert values["anonymized", "faces_in_clear"] == in_clear_of
    assert values["original", "faces"] == {"a": 1, **({"b": 2} if "b" in in_clear_of else {})}
    if "b" not in in_clear_of:
        (listed,) = tmp_path.glob("results/runs/album/*/skipped.csv")
        assert "b,2 faces found" in listed.read_text()


def test_a_sweep_ends_with_the_code_of_its_cells_and_writes_all_of_them(album, tmp_path, command_in_process):
    run = command_in_process("-m", *album, "anonymizer=deface_mosaic", "faces=largest,all")
    assert run.returncode == 4, run.stderr
    assert len(list(tmp_path.glob("results/runs/album/*/run.json"))) == 2
