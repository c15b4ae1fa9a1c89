"""What files say of how they were made: who shares a key stream, what a receiver with other settings is told."""

import json
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from hypothesis import given
from hypothesis import strategies as st

from keyanon.channel.description import CHOICES, PLACES, described, match, settings
from keyanon.channel.headers import MAX_DESCRIPTION, BadHeader, Header, canonical
from keyanon.channel.keys import MasterKey, experiment_key
from keyanon.channel.nonces import contexts_of, nonce_for
from keyanon.context import Context, joined
from keyanon.diffusion.controlnet import MaskControl
from keyanon.diffusion.model import LatentDiffusion
from keyanon.diffusion.solvers import DDIM
from keyanon.errors import BadSetting, UserError
from keyanon.faces.detection import MtcnnDetector
from keyanon.faces.parsing import BiSeNetParser, EllipseParser
from keyanon.faces.recognition import ArcFaceOnnx
from keyanon.methods.baselines.scrambling import Scrambling
from keyanon.methods.signflip import SignFlip
from keyanon.methods.transforms import DctSignFlipping, Permutation
from keyanon.types import Reversible
from tests.test_contract import composed, names

KEY = experiment_key(0)
PICTURE = torch.linspace(-1, 1, 3 * 4 * 6).view(3, 4, 6)
PURPOSES = ("signs", "rotation", "norms", "permutation", "scrambling|blocks", "crop", "id", "tag")
OTHERS = {
    "transform": [DctSignFlipping(), Permutation()],
    "control": [MaskControl()],
    "card": ["proface_s_rounded"],
    "source": ["bundled:faces128"],
    "subfolder": [],
}
KEYED = {"SignFlip", "Exact", "Scrambling", "EncryptedCrop", "ProFaceS", "ReversibleExternal", "ReversibleReady"}


@pytest.fixture(scope="module")
def methods(tiny_block_dct) -> dict[str, Any]:
    """Every keyed method of conf/, on one tiny model."""
    found = {}
    for group in ("anonymizer", "ablation"):
        for name in names(group):
            override = f"{'+' * (group == 'ablation')}{group}={name}"
            model = ["backbone=faces128", f"backbone.source={tiny_block_dct}"]
            cfg = composed(override, "parser=ellipse", *model).anonymizer
            if cfg._target_.rpartition(".")[2] in KEYED:
                method = instantiate(cfg, _convert_="all")
                if isinstance(method, Reversible) and method.about.kind == "keyed":
                    found[f"{group} {name}"] = method
    assert len(found) > 20
    return found


@dataclass(frozen=True)
class Run:
    """What is published once; equal runs publish the same."""

    place: str
    method: Any
    id: str = "a"
    attempt: int = 0
    picture: Any = PICTURE
    key: MasterKey = KEY

    def context(self) -> Context:
        (context,) = contexts_of(self.method, nonce_for, [self.key], [self.id], self.picture[None], self.attempt)
        return context

    def streams(self) -> list[bytes]:
        context = self.context()
        return [self.key.stream(context, purpose, 16) for purpose in PURPOSES]


def changes(part: Any) -> Iterator[tuple[str, Any]]:
    """A part with each of its fields changed in turn, however deep in it, by the field's path."""
    hints = get_type_hints(type(part))
    for field in fields(part):
        if not field.init:
            continue
        value = getattr(part, field.name)
        if is_dataclass(value):
            for path, changed in changes(value):
                yield f"{field.name}.{path}", replace(part, **{field.name: changed})
        for other in OTHERS.get(field.name, other_values(value, hints[field.name])):
            try:
                yield field.name, replace(part, **{field.name: other})
            except (UserError, TypeError, AttributeError):
                continue
            break


def other_values(value: Any, hint: Any) -> Sequence[Any]:
    choices = [each for part in (hint, *get_args(hint)) if get_origin(part) is Literal for each in get_args(part)]
    if choices:
        return [each for each in choices if each != value]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, value * 2]
    if isinstance(value, float):
        return [value * 1.01, value * 0.99, 0.5]
    if isinstance(value, str):
        return [value + "x"]
    if isinstance(value, tuple | list) and value and isinstance(value[0], float):
        return [(value[0] * 0.9, *value[1:])]
    if isinstance(value, tuple | list):
        return [[*value, "more"]]
    return [2, 0.02] if value is None else []


def published_apart(path: str) -> bool:
    """Whether a field decides what is published, but for rounding and for which picture is chosen."""
    return path == "backbone.source" or not set(path.split(".")) & (PLACES | CHOICES)


def kept(part: Any) -> str:
    """All fields that decide what is published, as text."""
    if not is_dataclass(part):
        return repr(part)
    names = [field.name for field in fields(part) if field.init]
    here = [name for name in names if name == "source" or not {name} & (PLACES | CHOICES)]
    return f"{type(part).__name__}({', '.join(f'{name}={kept(getattr(part, name))}' for name in here)})"


def test_runs_that_differ_in_anything_published_share_no_stream(methods):
    """All pairs of some hundred runs: other methods, each field of each changed, another id, attempt, picture, shape, key."""
    runs = [Run(name, method) for name, method in methods.items()]
    for run in list(runs):
        runs += [
            replace(run, place=f"{run.place} {path}", method=other)
            for path, other in changes(run.method)
            if published_apart(path)
        ]
        runs += [
            replace(run, place=f"{run.place}, {name}", **{name: value})
            for name, value in (("id", "b"), ("attempt", 1), ("picture", PICTURE + 1e-3), ("key", experiment_key(1)))
        ]
        runs += [
            replace(run, place=f"{run.place}, transposed", picture=PICTURE.reshape(3, 6, 4)),
            replace(run, place=f"{run.place}, id a|1", id="a|1"),
            replace(run, place=f"{run.place}, id a0", id="a\0"),
        ]
    distinct = {  # configs may make one method under two names
        (kept(run.method), run.id, run.attempt, repr(run.picture.tolist()), run.key.secret): run for run in runs
    }
    seen: dict[bytes, str] = {}
    for run in distinct.values():
        for stream in run.streams():
            assert stream not in seen, f"{run.place} shares a key stream with {seen[stream]}"
            seen[stream] = run.place
    assert len(distinct) * (len(distinct) - 1) // 2 > 10_000


def test_equal_runs_repeat_and_places_choices_and_tags_change_nothing(methods):
    for name, method in methods.items():
        streams = Run(name, method).streams()
        assert Run(name, replace(method)).streams() == streams
        for path, other in changes(method):
            if not published_apart(path):
                assert Run(name, other).streams() == streams, path


def test_what_a_method_leaves_out_is_known():
    """A field that is left out of descriptions and nonces is no choice of its author's alone."""
    assert {"authenticate", "floor", "attempts", "nonces"} == CHOICES
    assert {"device", "chunk", "weights"} <= PLACES
    assert not PLACES & {
        "steps",
        "solver",
        "transform",
        "backbone",
        "parser",
        "mask",
        "quantize",
        "command",
        "block",
        "kdf",
    }


@given(st.lists(st.binary(max_size=5), max_size=5), st.lists(st.binary(max_size=5), max_size=5))
def test_joined_strings_come_apart_in_one_way(a, b):
    assert (joined(*a) == joined(*b)) is (a == b)


@given(st.binary(max_size=4), st.binary(max_size=4), st.sampled_from(["a", "a|1", "a|", "b"]), st.integers(0, 2))
def test_contexts_with_zeros_at_their_ends_and_purposes_with_bars_are_apart(nonce, zeros, purpose, count):
    """HKDF pads a salt with zeros: an empty nonce and one of a zero were one."""
    streams = {
        KEY.stream(Context(first, second), name, 16)
        for first, second, name in (
            (nonce, zeros, purpose),
            (nonce + bytes(count + 1), zeros, purpose),
            (nonce, zeros + bytes(count + 1), purpose),
            (nonce, zeros, purpose + "|1"),
            (nonce, zeros, f"{purpose}|"),
        )
    }
    assert len(streams) == 5


def test_nothing_of_a_machine_or_a_picture_is_said(methods):
    """No path, no name of a picture: a description is as public as the file."""
    for name, method in methods.items():
        text = described(method).decode()
        assert "/" not in text, name
        assert "picture-of-somebody" not in Run(name, method, id="picture-of-somebody").context().description.decode()
        assert len(text) < MAX_DESCRIPTION
        told = json.loads(text)
        assert told.keys() == {"keyanon", "method", "sender"}
        assert told["method"]["class"] == type(method).__name__


def test_another_setting_at_recovery_is_named_with_both_values(methods):
    """Each field that the receiver needs; what the sender alone uses is free."""
    for method in methods.values():
        header = Header(bytes(24), description=described(method))
        match(header, described(method))
        for path, other in changes(method):
            if published_apart(path) and described(other) != described(method):
                name = "sha256" if path == "backbone.source" else path.rpartition(".")[2]
                with pytest.raises(BadHeader, match=rf"other settings: .*{name}.*=.*, here "):
                    match(header, described(other))
            else:
                match(header, described(other))


def test_other_steps_at_recovery_are_named_and_not_run(tiny_block_dct):
    """A file that was published with 8 steps and recovered with 3 passed its tag, and gave another picture."""
    sender = SignFlip(LatentDiffusion(str(tiny_block_dct)), DDIM(8), EllipseParser())
    published = sender.anonymize(torch.zeros(1, 3, 64, 64), [KEY], ["a"])
    for receiver in (replace(sender, solver=DDIM(4)), replace(sender, solver=DDIM(4), authenticate=False)):
        with pytest.raises(BadHeader, match=r"other settings: solver\.steps=8, here 4; recover it with"):
            receiver.recover(published, [KEY])
    other = replace(sender, solver=DDIM(4, "karras", 0.1), quantize=False, reinject=False)
    with pytest.raises(
        BadHeader, match=r"quantize=true, here false; reinject=true, here false; .*; and 2 more; recover"
    ):
        other.recover(published, [KEY])


def test_numbers_of_any_type_count_and_what_cannot_be_told_is_refused():
    """A numpy number left no trace in description and nonce: 8 and 16 shared a key stream."""
    parser = EllipseParser()
    contexts = [Run("", Scrambling(parser, block)).context() for block in (2, np.int64(2), np.int64(3))]
    assert contexts[0] == contexts[1] != contexts[2]
    assert described(Scrambling(parser, np.int64(2))) == described(Scrambling(parser, 2))

    class Stateful:
        def __init__(self) -> None:
            self.strength = 1

        def mask(self, images, size):
            raise AssertionError

    for odd in (Stateful(), lambda images: images, {1, 2}, torch.zeros(2), math.nan, Path("place")):
        with pytest.raises(BadSetting, match="among a method's settings: a file cannot say"):
            settings(odd, public=True)


def test_settings_that_differ_beyond_what_a_message_shows_are_told_apart(tiny_block_dct):
    noise = [{"trained_betas": [*([1e-3] * 40), last]} for last in (0.1, 0.2)]
    one, other = (
        SignFlip(LatentDiffusion(str(tiny_block_dct), noise=each), DDIM(8), EllipseParser()) for each in noise
    )
    with pytest.raises(BadHeader, match=r"backbone\.noise\.trained_betas=\[0\.001, .*\.\.\., here \[0\.001, .*\.\.\.;"):
        match(Header(bytes(24), description=described(one)), described(other))


@given(st.text(max_size=9), st.text(max_size=99))
def test_whatever_a_strangers_file_calls_its_settings_the_message_is_printable(name, value):
    told = json.loads(described(Scrambling(EllipseParser())))
    told["method"][name] = value
    header = Header(bytes(24), description=canonical(told))
    if name in ("block", "class", "inside", "negative"):
        return
    with pytest.raises(BadHeader) as caught:
        match(header, described(Scrambling(EllipseParser())))
    assert str(caught.value).isprintable()
    assert str(caught.value).encode()


def test_methods_that_share_a_key_no_longer_share_its_signs(methods):
    """scrambling_full and signflip both drew `signs`; exact at 10 and at 8 steps drew the same rotations and hid the same norms."""
    exact = methods["anonymizer exact"]
    more = replace(exact, solver=replace(exact.solver, steps=exact.solver.steps + 1))
    for one, other in ((methods["anonymizer signflip"], methods["anonymizer scrambling_full"]), (exact, more)):
        a, b = Run("", one), Run("", other)
        assert a.context().nonce != b.context().nonce
        same_nonce = Context(a.context().nonce, b.context().description)
        assert not {KEY.stream(same_nonce, p, 16) for p in PURPOSES} & set(a.streams())


@pytest.mark.parametrize(
    "told",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"a":NaN}',
        b'{"a": 1}',
        b'{"b":1,"a":1}',
        b'{"a":1,"a":1}',
        b'{"a":1}x',
        '{"a":"é"}'.encode(),
        b'{"a":' + b"[" * 2000 + b"]" * 2000 + b"}",
        b'{"a":"' + b"x" * MAX_DESCRIPTION + b'"}',
    ],
)
def test_a_description_that_is_not_written_in_the_one_way_is_refused(told):
    packed = Header(bytes(24)).pack()
    text = zlib.compress(told, 9)
    with pytest.raises(BadHeader, match="what it says of how the file was made cannot be read"):
        Header.unpack(packed[:28] + len(text).to_bytes(2, "little") + text)
    if len(told) > MAX_DESCRIPTION:
        with pytest.raises(BadHeader, match="no room"):
            Header(bytes(24), description=told).pack()


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    )
)
def test_any_description_leads_to_a_message_of_one_printable_line(told):
    with pytest.raises(BadHeader) as caught:
        match(Header(bytes(24), description=canonical({"method": told})), described(Scrambling(EllipseParser())))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 900


def test_a_field_that_a_class_got_later_is_told_only_where_it_is_not_as_before():
    """Else no file that was published before could be recovered, and every nonce would be another one."""
    for part, changed in (
        (MtcnnDetector(), {"enrolment": "lowered"}),
        (BiSeNetParser(), {"looks_at": "picture"}),
        (ArcFaceOnnx("mobilefacenet"), {"alignment": "ransac", "lengths": "raw"}),
    ):
        assert set(part.added_fields) == changed.keys()
        assert not changed.keys() & settings(part, public=True).keys()
        assert settings(replace(part, **changed), public=False).items() >= changed.items()
