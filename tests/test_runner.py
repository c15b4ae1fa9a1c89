"""Make, then measure: resumed, sharded and rebatched runs give the same numbers."""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from torch import Tensor

from keyanon.attacks.views import FloatChannel, WrongKey
from keyanon.batching import begun_ahead
from keyanon.channel.headers import Header
from keyanon.channel.keys import experiment_key
from keyanon.channel.pixels import from_pil, open_rgb, read_png, to_bytes, to_floats
from keyanon.channel.whole import write_whole
from keyanon.diffusion.model import LatentDiffusion
from keyanon.diffusion.solvers import DDIM
from keyanon.measures.scorers import Against
from keyanon.methods.signflip import SignFlip
from keyanon.parts import write_part
from keyanon.run_folder import SCORE_SCHEMA, RunFiles
from keyanon.runner import enrol, generate, prepare, score
from keyanon.sources import Digests
from keyanon.types import About, Embeddings, Image, Picture, Source
from tests.conftest import LDM_NOISE, CentreFace, PixelRecognizer, smooth_picture

ATTACKS = {
    "recovered_float": FloatChannel(),
    "wrong_key": WrongKey(channel="floats"),
}  # which no file carries: made again
MADE = ["anonymized", "recovered", "reconstructed", *ATTACKS]
VIEWS = ["original", "mask", *MADE]
BLACK, BROKEN = "p3", "p5"
CONTENTS: dict[str, str] = {}  # of the one dataset of this module


@dataclass(frozen=True)
class Pictures:
    """Eight pictures, one black and one corrupt, and a gallery of two."""

    root: Path
    enrolled: Sequence[str] = ("g0", "g1")

    @property
    def ids(self) -> list[str]:
        return [f"p{i}" for i in range(8)]

    @property
    def gallery(self) -> Sequence[str]:
        return self.enrolled

    def identity(self, id: str) -> str | None:
        return None

    def source(self, id: str) -> Source:
        return Source(self.root / f"{id}.png")

    def load(self, id: str) -> Picture:
        return from_pil(open_rgb(self.root / f"{id}.png"))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """With several, kernels divide a batch's work by position, and pictures round differently in another place of it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Pictures:
    root = tmp_path_factory.mktemp("pictures")
    for i, id in enumerate([*(f"p{i}" for i in range(8)), "g0", "g1"]):
        smooth_picture(i).save(root / f"{id}.png")
    smooth_picture(0).point(lambda _: 0).save(root / f"{BLACK}.png")
    (root / f"{BROKEN}.png").write_text("not a picture")
    return Pictures(root)


@pytest.fixture(scope="module")
def method(tiny_ldm) -> SignFlip:
    # Not quantized: a codebook turns the last bit of a latent into another entry.
    return SignFlip(LatentDiffusion(str(tiny_ldm), noise=LDM_NOISE), DDIM(2), CentreFace(), quantize=False)


def mae(view, original, face):
    return (view - original).abs().mean((1, 2, 3))


def prepared(folder) -> RunFiles:
    """Where a test's run has its originals; other runs share theirs."""
    return RunFiles(folder / "prepared", CONTENTS)


def made(folder) -> RunFiles:
    return RunFiles(folder, CONTENTS)


def files_of(folder, view) -> RunFiles:
    return prepared(folder) if view in ("original", "mask") else made(folder)


def run(folder, dataset, method, ids=None, batch_size=3):
    ids = dataset.ids if ids is None else ids
    digests = Digests(folder / "contents")
    skipped = prepare(prepared(folder), CONTENTS, digests, dataset, ids, CentreFace(), batch_size)
    good = [id for id in ids if id not in skipped]
    generate(made(folder), prepared(folder), good, method, experiment_key(), ATTACKS, batch_size)
    score_all(folder, good, {"mae": mae}, {"pixels": PixelRecognizer()}, batch_size)
    return skipped


def score_all(folder, ids, scorers, recognizers, batch_size, views=None):
    enrolled = {name: RunFiles(folder / "enrolled" / name, CONTENTS) for name in recognizers}
    for name, recognizer in recognizers.items():
        enrol(enrolled[name], prepared(folder).load, ids, name, recognizer, batch_size)
    views_made = made(folder).views()
    pictures = {view: files_of(folder, view) for view in ("original", "mask", *views_made)}
    views = views_made if views is None else views
    score(made(folder), pictures, views, ids, scorers, recognizers, enrolled, batch_size)


def scores(folder) -> dict[tuple[str, str, str], float]:
    rows = made(folder).scores(list(CONTENTS)).to_pylist()
    return {(row["id"], row["view"], row["scorer"]): row["value"] for row in rows}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, dataset, method) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    assert set(run(folder, dataset, method)) == {BLACK, BROKEN}
    return folder


def test_all_views_and_scores_are_there(whole, dataset, tmp_path):
    good = [id for id in dataset.ids if id not in {BLACK, BROKEN}]
    assert all(files_of(whole, view).ids(view) == good for view in VIEWS)
    expected = {(id, view, scorer) for id in good for view in MADE for scorer in ("mae", "pixels")}
    assert set(scores(whole)) == expected | {(id, "anonymized", "header_bytes") for id in good}
    assert {scores(whole)[id, "anonymized", "header_bytes"] for id in good} == {
        len(read_png(whole / "anonymized" / "p0.png")[1])
    }
    shutil.copytree(whole, tmp_path / "copy")
    score_all(tmp_path / "copy", good, {"mae": mae}, {}, 3, views=["original"])
    assert all(scores(tmp_path / "copy")[id, "original", "mae"] == 0 for id in good)


@dataclass
class Counting:
    """A recognizer, or a scorer, that counts the batches it has seen."""

    inner: Callable[..., Tensor]
    batches: int = 0

    def embed(self, images: Image) -> Embeddings:
        return self(images)

    def __call__(self, *pictures: Tensor) -> Tensor:
        self.batches += 1
        return self.inner(*pictures)


def test_the_gallery_is_embedded_once_as_8_bit_pictures(tmp_path, dataset):
    recognizer = Counting(PixelRecognizer().embed)
    with_broken = replace(dataset, enrolled=["g0", BROKEN, "g1"])
    assert set(enrol(RunFiles(tmp_path), with_broken.load, with_broken.gallery, "pixels", recognizer, 2)) == {BROKEN}
    assert recognizer.batches == 2
    assert set(enrol(RunFiles(tmp_path), with_broken.load, with_broken.gallery, "pixels", recognizer, 2)) == {BROKEN}
    assert recognizer.batches == 2
    rows = RunFiles(tmp_path).embeddings().to_pylist()
    assert [(row["view"], row["scorer"], row["id"]) for row in rows] == [("clean", "pixels", id) for id in ("g0", "g1")]
    rounded = to_floats(to_bytes(dataset.load("g1")[None]))
    torch.testing.assert_close(torch.tensor(rows[1]["embedding"]), PixelRecognizer().embed(rounded)[0])


def test_only_what_is_pending_is_scored(whole, tmp_path, dataset):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    old, new, recognizer = Counting(mae), Counting(mae), Counting(PixelRecognizer().embed)
    score_all(folder, made(folder).ids("anonymized"), {"mae": old, "more": new}, {"pixels": recognizer}, batch_size=3)
    assert (old.batches, recognizer.batches) == (0, 0)
    assert new.batches == 2 * len(MADE)  # six pictures
    assert {name: value for name, value in scores(folder).items() if name[2] != "more"} == scores(whole)


def test_skipped_pictures_are_recorded_with_a_reason(whole):
    skipped = prepared(whole).skipped()
    assert skipped[BLACK] == "no face found"
    assert "p5.png: not a readable picture" in skipped[BROKEN]


def test_published_files_carry_headers_and_others_none(whole):
    header = Header.unpack(read_png(whole / "anonymized" / "p0.png")[1])
    assert len(header.tag) == 32
    assert json.loads(header.description)["method"]["class"] == "SignFlip"
    assert read_png(whole / "recovered" / "p0.png")[1] == b""


def test_shards_at_once_lose_no_skipped_picture(whole, tmp_path, dataset, tiny_ldm, method):
    other = replace(method, backbone=LatentDiffusion(str(tiny_ldm), noise=LDM_NOISE))
    halves = [[BLACK, "p0", "p1", "p2"], [BROKEN, "p4", "p6", "p7"]]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda args: run(tmp_path, dataset, *args), zip((method, other), halves, strict=True)))
    assert scores(tmp_path) == scores(whole)
    assert prepared(tmp_path).skipped() == prepared(whole).skipped()


def test_skipped_pictures_of_others_stay(tmp_path):
    ours, theirs = RunFiles(tmp_path), RunFiles(tmp_path)
    assert ours.skipped() == theirs.skipped() == {}
    ours.write_skipped({"a": "cut"})
    theirs.write_skipped({"b": "no face found"})
    assert ours.skipped() == {"a": "cut", "b": "no face found"}
    ours.list_skipped(ours.skipped())
    assert (tmp_path / "skipped.csv").read_text() == "id,reason\na,cut\nb,no face found\n"


def test_the_next_batch_is_begun_before_one_is_handed_out_and_no_further():
    events: list[str] = []
    for batch, begun in begun_ahead(["a", "b", "c", "d", "e"], 2, "", lambda batch: events.append("".join(batch))):
        assert begun is None
        events.append(f"use {''.join(batch)}")
    assert events == ["ab", "cd", "use ab", "e", "use cd", "use e"]
    assert list(begun_ahead([], 2, "", events.append)) == []


def test_a_picture_that_cannot_be_written_stops_the_run(tmp_path, dataset, method, monkeypatch):
    def full(path, data, **options):
        if path.parent.name == "recovered":
            raise OSError("no space left")
        write_whole(path, data, **options)

    monkeypatch.setattr("keyanon.run_folder.write_whole", full)
    with pytest.raises(OSError, match="no space left"):
        run(tmp_path, dataset, method)
    monkeypatch.undo()
    run(tmp_path, dataset, method)


def test_rows_are_read_each_once(tmp_path):
    first = [("p1", "recovered", "mae", 1.0), ("p0", "recovered", "mae", 2.0), ("p0", "original", "psnr", math.nan)]
    for lines in (first, [first[0], ("p9", "original", "psnr", 4.0)]):
        rows = [(id, "", view, scorer, "", value) for id, view, scorer, value in lines]
        table = [dict(zip(SCORE_SCHEMA.names, row, strict=True)) for row in rows]
        write_part(tmp_path / "scores", pa.Table.from_pylist(table, SCORE_SCHEMA))
    read = [tuple(row.values()) for row in RunFiles(tmp_path).scores(["p0", "p1", "p9"]).to_pylist()]
    assert [line[:3] for line in read] == [
        ("p0", "original", "psnr"), ("p9", "original", "psnr"), ("p0", "recovered", "mae"), ("p1", "recovered", "mae"),
    ]  # fmt: skip
    assert math.isnan(read[0][3])
    assert [line[3] for line in read[1:]] == [4.0, 2.0, 1.0]
    done = {name: marks.tolist() for name, marks in RunFiles(tmp_path).scored(["p0", "p1", "p2"]).items()}
    assert done == {("recovered", "mae"): [True, True, False], ("original", "psnr"): [True, False, False]}


def test_a_killed_run_goes_on_to_the_same_bits(whole, tmp_path, dataset, method):
    folder = tmp_path / "killed"
    shutil.copytree(whole, folder)
    for path in [*folder.rglob("p4.png"), *folder.glob("wrong_key/p[0-2].png"), *folder.glob("anonymized/p7.png")]:
        path.unlink()
    for part in list(folder.glob("scores/*"))[:1] + list(folder.glob("embeddings/*"))[:1]:
        part.unlink()
    (folder / "recovered" / "p4.png.partial").write_bytes(b"half a file")
    run(folder, dataset, method)
    assert scores(folder) == scores(whole)
    for view in VIEWS:
        for id in files_of(whole, view).ids(view):
            assert (
                files_of(folder, view).path(view, id).read_bytes() == files_of(whole, view).path(view, id).read_bytes()
            )


def test_a_finished_run_does_nothing(whole, dataset, method):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*.png")}
    run(whole, dataset, method)
    assert before == {path: path.stat().st_mtime_ns for path in whole.rglob("*.png")}


def test_a_view_that_an_earlier_run_left_unfinished_is_not_scored(whole, tmp_path, dataset, method):
    folder = tmp_path / "unfinished"
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("scores", "embeddings"))
    (folder / "other_attack").mkdir()
    shutil.copy(folder / "recovered" / "p0.png", folder / "other_attack")
    run(folder, dataset, method)
    assert scores(folder) == scores(whole)


def test_shards_in_any_order_give_the_whole(whole, tmp_path, dataset, method):
    for i in (2, 0, 1):
        run(tmp_path, dataset, method, dataset.ids[i::3])
    assert scores(tmp_path) == scores(whole)


@pytest.mark.parametrize("batch_size", [1, 7])
def test_batch_size_does_not_matter(whole, tmp_path, dataset, method, batch_size):
    run(tmp_path, dataset, method, batch_size=batch_size)
    ours, theirs = scores(tmp_path), scores(whole)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value == pytest.approx(theirs[name], abs=1e-4)


def test_an_irreversible_method_has_no_recovered_view(tmp_path, dataset, method):
    @dataclass(frozen=True)
    class Anonymize:
        method: SignFlip

        @property
        def about(self) -> About:
            return self.method.about

        def anonymize(self, images, keys, ids):
            return replace(self.method.anonymize(images, keys, ids), floats=None)

    run(tmp_path, dataset, Anonymize(method), ["p0"])
    assert made(tmp_path).views() == ["anonymized"]
    assert torch.equal(read_png(prepared(tmp_path).path("original", "p0"))[0].float() / 127.5 - 1, dataset.load("p0"))


@dataclass(frozen=True)
class Measuring:
    """A method that takes something down while it publishes."""

    method: SignFlip

    @property
    def about(self) -> About:
        return self.method.about

    def anonymize(self, images, keys, ids):
        published = self.method.anonymize(images, keys, ids)
        return replace(published, measured={"length": torch.tensor([float(len(id)) for id in ids])})


def test_what_a_method_measures_becomes_scores_of_the_anonymized_pictures(tmp_path, dataset, method):
    run(tmp_path, dataset, Measuring(method))
    measured = {
        id: value
        for (id, view, scorer), value in scores(tmp_path).items()
        if (view, scorer) == ("anonymized", "length")
    }
    assert measured == dict.fromkeys(made(tmp_path).ids("anonymized"), 2.0)


def test_scorers_can_compare_with_the_reconstruction(whole, tmp_path, dataset, method):
    folder = tmp_path / "copy"
    shutil.copytree(whole, folder)
    good = made(folder).ids("anonymized")
    score_all(folder, good, {"loop": Against("reconstructed", mae)}, {}, 2, views=["original", *MADE])
    found = {key: value for key, value in scores(folder).items() if key[2] == "loop"}
    assert {value for (_, view, _), value in found.items() if view == "reconstructed"} == {0}
    assert all(found[id, "original", "loop"] == scores(folder)[id, "reconstructed", "mae"] for id, _, _ in found)

    shutil.rmtree(folder / "reconstructed")
    score_all(folder, good, {"absent": Against("reconstructed", mae)}, {}, 2)
    assert all(math.isnan(value) for key, value in scores(folder).items() if key[2] == "absent")
