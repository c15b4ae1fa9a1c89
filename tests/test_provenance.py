"""What a part is made of: settings, weights, code. Each changes its identity, and nothing else does."""

import json
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from experiments.harness import results
from experiments.harness.provenance import PRESENTATION, code_of, made_of, module, signature
from keyanon.errors import BadPicture
from keyanon.measures import scorers
from keyanon.methods.signflip import SignFlip
from keyanon.parts import Damaged, read_parts, write_part
from keyanon.run_folder import LONGEST_NAME, SCORE_SCHEMA, RunFiles, file_name
from keyanon.sources import Digests
from keyanon.types import Source
from keyanon.weights import Card, Release
from tests.conftest import ROOT

GROUPS = ("anonymizer", "attacks", "backbone", "dataset", "parser", "recognizers", "scorers", "security", "solver")
LEAVES = sorted(path.relative_to(ROOT / "conf") for group in GROUPS for path in (ROOT / "conf" / group).glob("*.yaml"))


def leaves(node: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """The values of a configuration that are no containers, and the way to each."""
    if isinstance(node, Mapping | list) and node:
        for key, value in node.items() if isinstance(node, Mapping) else enumerate(node):
            yield from leaves(value, (*way, key))
    else:
        yield way, node


def changed(node: Any, way: tuple[Any, ...]) -> Any:
    copy = json.loads(json.dumps(node))
    place = copy
    for step in way[:-1]:
        place = place[step]
    place[way[-1]] = f"not {place[way[-1]]}"
    return copy


@pytest.mark.parametrize("path", LEAVES, ids=str)
def test_every_argument_counts_but_for_where_things_lie_and_run(path):
    settings = yaml.safe_load((ROOT / "conf" / path).read_text("utf-8"))
    for way, _ in leaves(settings):
        if way and way[0] != "defaults":
            same = signature(settings) == signature(changed(settings, way))
            assert same == bool(PRESENTATION & set(way)), way


def test_no_comment_and_no_docstring_counts_but_every_line_of_code_does(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    package = tmp_path / "rival"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "method.py").write_text("from rival import core\n\nclass Method:\n    pass\n")

    def digest(core: str) -> str:
        (package / "core.py").write_text(core)
        module.cache_clear()
        from rival.method import Method

        found = code_of([Method()])
        assert set(found) == {"rival", "rival.method", "rival.core"}
        return signature(found)

    first = digest("def f(x):\n    return x + 1\n")
    assert digest('"""What it does."""\n\n\ndef f(x):\n    """One more."""\n    return x + 1  # really\n') == first
    assert digest("def f(x):\n    return x + 2\n") != first
    for name in [name for name in sys.modules if name.startswith("rival")]:
        del sys.modules[name]


def test_a_part_is_its_module_and_what_that_imports_and_no_more(model):
    of_scorer = code_of([partial(scorers.mae, x=1)])
    assert "keyanon.measures.scorers" in of_scorer
    assert not {name for name in of_scorer if name.startswith(("keyanon.methods", "experiments"))}
    assert "keyanon.diffusion.model" in code_of([model])


@dataclass(frozen=True)
class Weighted:
    """A part with weights whose digest no card knows."""

    weights: str

    def cards(self) -> tuple[Card, ...]:
        return (Card("w", "w.safetensors", Release("http://nowhere"), None, "-", "-", "-"),)


def test_other_weights_in_the_same_place_are_another_part(tmp_path):
    path = tmp_path / "w.safetensors"
    seen = set()
    for value in (0.0, 1.0):
        save_file({"w": torch.full((3,), value)}, path)
        seen.add(signature(made_of({}, [Weighted(str(path))])))
    assert len(seen) == 2


def test_other_weights_of_a_diffusion_model_are_another_method(tiny_ldm, tmp_path):
    import shutil

    from keyanon.diffusion.model import LatentDiffusion
    from keyanon.diffusion.solvers import DDIM
    from tests.conftest import LDM_NOISE, CentreFace

    def asked(folder: Path) -> str:
        method = SignFlip(LatentDiffusion(str(folder), noise=LDM_NOISE), DDIM(2), CentreFace())
        return signature(made_of({}, method))

    copy = tmp_path / "copy"
    shutil.copytree(tiny_ldm, copy)
    assert asked(copy) == asked(tiny_ldm)
    path = next(copy.glob("unet/*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert asked(copy) != asked(tiny_ldm)


# Stored files


ROWS = [dict(zip(SCORE_SCHEMA.names, (f"id{i}", "c", "view", "psnr", "", i / 7), strict=True)) for i in range(8)]


@pytest.fixture(scope="module")
def part(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    write_part(folder, pa.Table.from_pylist(ROWS, SCORE_SCHEMA))
    (path,) = folder.iterdir()
    return path


@settings(deadline=None)
@given(bit=st.integers(0, 10**9))
def test_no_bit_of_a_part_can_flip_unseen(part, bit):
    data = part.read_bytes()
    flipped = bytearray(data)
    flipped[bit // 8 % len(data)] ^= 1 << bit % 8
    part.write_bytes(flipped)
    try:
        with pytest.raises(Damaged, match=part.name):
            read_parts(part.parent, SCORE_SCHEMA)
    finally:
        part.write_bytes(data)
    assert read_parts(part.parent, SCORE_SCHEMA).num_rows == len(ROWS)


@settings(deadline=None)
@given(length=st.integers(0, 10**6))
def test_no_part_can_be_cut_unseen(part, length):
    data = part.read_bytes()
    part.write_bytes(data[: length % len(data)])
    try:
        with pytest.raises(Damaged, match=part.name):
            read_parts(part.parent, SCORE_SCHEMA)
    finally:
        part.write_bytes(data)


@settings(deadline=None)
@given(bit=st.integers(0, 10**9))
@example(bit=653)  # of an escaped letter, which reads the same
def test_no_bit_of_a_picture_or_of_run_json_can_flip_unseen(bit):
    import tempfile

    with tempfile.TemporaryDirectory() as home:
        files = RunFiles(Path(home), {"a": "of a"})
        files.write("recovered", "a", bytes(range(256)))
        results.write_about(
            Path(home),
            {"dataset": "d", "protocol": "ours", "anonymizer": "m", "seconds": 1.5, "title_notes": ["é"], "files": {}},
        )
        for path, read in (
            (files.path("recovered", "a"), lambda: files.data("recovered", "a")),
            (Path(home, "run.json"), lambda: results.read_about(Path(home))),
        ):
            data = bytearray(path.read_bytes())
            read()
            data[bit // 8 % len(data)] ^= 1 << bit % 8
            path.write_bytes(data)
            with pytest.raises(Damaged, match=path.name):
                read()


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1, max_size=400))
def test_a_file_is_named_by_its_id_as_far_as_file_systems_allow(id):
    name = file_name(id, ".safetensors")
    assert len(name.encode()) <= LONGEST_NAME
    assert "/" not in name
    assert name == f"{id}.safetensors" or "/" in id or "%" in id or len(f"{id}.safetensors".encode()) > LONGEST_NAME


def test_long_names_and_slashes_are_told_apart(tmp_path):
    ids = ["x" * 300, "x" * 301, "a/b", "a%2Fb", "a", "é" * 140]
    assert len({file_name(id, ".png") for id in ids}) == len(ids)
    files = RunFiles(tmp_path)
    for id in ids:
        files.write("view", id, id.encode())
    assert [files.data("view", id) for id in ids] == [id.encode() for id in ids]


# Digests of pictures' files


def test_no_digest_is_lost_while_others_are_written_down(tmp_path, monkeypatch):
    monkeypatch.setattr("keyanon.sources.RACY", -(10**18))
    paths = [tmp_path / f"{i}.png" for i in range(300)]
    for path in paths:
        path.write_bytes(path.name.encode())
    digests = Digests(tmp_path / "contents")
    with ThreadPoolExecutor(4) as pool:
        reading = [pool.submit(digests.of, Source(path)) for path in paths]
        while not all(each.done() for each in reading):
            digests.keep()
    digests.keep()
    again = Digests(tmp_path / "contents")
    assert [again.known(Source(path)) for path in paths] == [each.result() for each in reading]


def test_a_file_is_read_again_only_if_it_may_have_changed(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(b"one")
    digests = Digests(tmp_path / "contents")
    first = digests.of(Source(path))
    assert digests.known(Source(path)) is None  # written a moment ago: it may change within one tick of the clock
    monkeypatch.setattr("keyanon.sources.RACY", -(10**18))
    assert digests.of(Source(path)) == first
    digests.keep()
    again = Digests(tmp_path / "contents")
    monkeypatch.setattr("keyanon.sources.sha256", None)
    assert again.of(Source(path)) == again.known(Source(path)) == first
    monkeypatch.undo()
    path.write_bytes(b"two")
    assert again.known(Source(path)) is None
    assert again.of(Source(path)) != first
    assert again.of(Source(path, 1, 1)) != again.of(Source(path))
    with pytest.raises(BadPicture, match="gone.png: cannot be read"):
        again.of(Source(tmp_path / "gone.png"))
