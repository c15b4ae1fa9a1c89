"""Methods of others: what their programs (here tests/stub_method.py) are given and may leave behind, and ready-made pictures."""

import json
import os
import random
import re
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from experiments.harness.paper import read_paper
from experiments.harness.preflight import missing_parts
from keyanon.attacks.views import Jpeg, NearKey, NoKey, WrongKey
from keyanon.channel.headers import BadHeader, Header
from keyanon.channel.keys import MasterKey, Nobody
from keyanon.channel.nonces import OneForAll
from keyanon.channel.pixels import from_pil, to_bytes, to_floats, write_png
from keyanon.context import Context
from keyanon.errors import BadSetting
from keyanon.methods.baselines.external import (
    ENVIRONMENT,
    BadMethod,
    External,
    Ready,
    ReversibleExternal,
    ReversibleReady,
    Secret,
    whole_number,
    without,
)
from keyanon.run_folder import RunFiles
from keyanon.runner import generate, prepare
from keyanon.sources import Digests
from keyanon.types import About, Anonymizer, Image, Published, Reversible, Source
from tests.conftest import ROOT, CentreFace, smooth_picture

KEY = MasterKey(bytes(range(32)))
IDS = ["a b", "über/0001", "../x;rm -rf 日本"]
ABOUT = About("keyed", "8-bit file", 128, 128, "-", "-", "nobody")
OBTAIN = "Get it from example.org; weights: example.org/w."


def noise(*size: int, seed: int = 0) -> Image:
    levels = torch.randint(0, 256, size, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return to_floats(levels)


IMAGES = noise(3, 3, 8, 8)
INVERT = """
import pathlib, sys, PIL.Image, PIL.ImageOps
for path in pathlib.Path(sys.argv[1]).iterdir():
    PIL.ImageOps.invert(PIL.Image.open(path)).save(pathlib.Path(sys.argv[2], path.name))
"""


def command(what: str = "right") -> list[str]:
    return [sys.executable, str(ROOT / "tests" / "stub_method.py"), what, "{images}", "{output}", "{key}"]


@pytest.fixture
def method(tmp_path, monkeypatch) -> ReversibleExternal:
    (tmp_path / "code").mkdir()
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return ReversibleExternal(
        name="stub",
        about=ABOUT,
        command=command(),
        recovery=command(),
        folder=str(tmp_path / "code"),
        obtain=OBTAIN,
        secret=Secret(128),
        timeout=60,
        logs=str(tmp_path / "logs"),
    )


def seen(method: External) -> dict:
    return json.loads(Path(method.folder, "seen.json").read_text())


def logs(method: External) -> list[str]:
    return [path.read_text() for path in sorted(Path(method.logs).iterdir())]


def sent(method: Anonymizer, images: Image = IMAGES, key: MasterKey = KEY, ids=IDS) -> Published:
    return method.anonymize(images, [key] * len(ids), list(ids))


def back(method: Reversible, published: Published, key: MasterKey = KEY) -> torch.Tensor:
    keys = [key] * len(published.images)
    return to_bytes(method.recover(published, keys))


# The program's work


def test_the_key_brings_every_bit_back_and_nothing_is_left(method, tmp_path):
    published = sent(method)
    original = to_bytes(IMAGES)
    assert (published.images != original).float().mean() > 0.9
    assert torch.equal(back(method, published), original)
    assert list((tmp_path / "tmp").iterdir()) == []
    assert isinstance(method, Reversible)


def test_another_key_or_the_nearest_gives_something_else(method):
    published = sent(method)
    original = to_bytes(IMAGES)
    for attack in (WrongKey(), NearKey()):
        assert (to_bytes(attack(published, [KEY] * 3, method)) != original).float().mean() > 0.9
    with pytest.raises(BadHeader, match="not the picture's key"):
        back(method, published, MasterKey(bytes(32)))


def test_a_damaged_file_still_goes_through_the_program(method):
    smooth = torch.stack([from_pil(smooth_picture(seed, 8)) for seed in range(3)])
    published = sent(method, smooth)
    assert Jpeg(50)(published, [KEY] * 3, method).shape == smooth.shape


def test_order_batch_and_repetition_do_not_matter(method):
    together = sent(method)
    assert torch.equal(together.images[2:], sent(method, IMAGES[2:], ids=IDS[2:]).images)
    repeated = sent(method, IMAGES[[1, 0, 0]], ids=[IDS[1], IDS[0], IDS[0]])
    assert torch.equal(repeated.images, together.images[[1, 0, 0]])
    assert len(seen(method)["pictures"]) == 2
    assert torch.equal(back(method, repeated), to_bytes(IMAGES[[1, 0, 0]]))


def test_names_are_whole_numbers_of_their_own(method):
    sent(method)
    names = seen(method)["pictures"]
    assert sorted(f"{whole_number(id.encode())}.png" for id in IDS) == names
    assert all(str(int(name.removesuffix(".png"))) + ".png" == name for name in names)
    assert len({whole_number(b"%d" % i) for i in range(1000)}) == 1000


def test_recovery_sees_none_of_the_names_of_the_originals(method):
    published = sent(method)
    before = seen(method)["pictures"]
    back(method, published)
    assert not set(before) & set(seen(method)["pictures"])


def test_a_method_without_recovery_is_not_reversible_and_publishes_no_header(method):
    fields = {name: value for name, value in vars(method).items() if name not in ("recovery", "authenticate")}
    irreversible = External(**fields)
    assert not isinstance(irreversible, Reversible)
    published = sent(irreversible)
    assert published.headers == (b"",) * 3
    assert not torch.equal(published.images, to_bytes(IMAGES))


def test_a_method_without_key_is_given_none_and_publishes_no_header(method):
    copying = ["sh", "-c", 'cp "$1"/* "$2"', "sh", "{images}", "{output}"]
    keyless = replace(method, secret=None, command=copying, recovery=copying)
    published = sent(keyless)
    assert published.headers == (b"",) * 3
    assert torch.equal(published.images, to_bytes(IMAGES))
    assert torch.equal(back(keyless, published), to_bytes(IMAGES))
    assert torch.equal(back(keyless, published, MasterKey(bytes(32))), to_bytes(IMAGES))


def test_without_a_key_a_method_that_has_none_recovers_and_others_show_what_is_published(method):
    inverting = [sys.executable, "-c", INVERT, "{images}", "{output}"]
    keyless = replace(method, secret=None, command=inverting, recovery=inverting)
    published, nobody = sent(keyless), [Nobody()] * 3
    assert torch.equal(published.images, 255 - to_bytes(IMAGES))
    assert torch.equal(to_bytes(NoKey()(published, nobody, keyless)), to_bytes(IMAGES))
    published = sent(method)
    starts = seen(method)["starts"]
    assert torch.equal(to_bytes(NoKey()(published, nobody, method)), published.images)
    assert seen(method)["starts"] == starts


def test_pictures_are_resized_to_what_the_program_reads(method):
    images = torch.stack([from_pil(smooth_picture(seed, 16)) for seed in range(3)])
    published = sent(replace(method, size=32), images)
    assert seen(method)["sizes"] == [[32, 32]]
    assert published.images.shape == (3, 3, 16, 16)


def test_pictures_of_other_formats_and_places_are_found(method):
    elsewhere = replace(
        method, command=command("elsewhere"), recovery=command("elsewhere"), outputs="anonymous/{name}_any"
    )
    assert torch.equal(back(elsewhere, sent(elsewhere)), to_bytes(IMAGES))


def test_what_else_a_program_leaves_does_not_count(method):
    more = replace(method, command=command("extra"))
    assert torch.equal(back(more, sent(more)), to_bytes(IMAGES))


# Keys


def test_the_key_is_in_a_file_for_its_owner_alone_and_nowhere_else(method, monkeypatch):
    published = sent(method)
    found = seen(method)
    contexts = [Header.unpack(header).context for header in published.headers]
    secrets = [Secret(128).of(KEY, context, "stub") for context in contexts]
    lines = sorted(f"{whole_number(id.encode())}.png {secret}" for id, secret in zip(IDS, secrets, strict=True))
    assert sorted(found["key"].splitlines()) == lines
    assert found["mode"] == "0o600"
    assert found["arguments"][4].startswith("/dev/fd/")
    back(method, published)
    for shown in (*map(str, seen(method)["arguments"]), *found["environment"].values(), *logs(method)):
        assert not any(secret in shown.lower() for secret in secrets)
    assert len(logs(method)) == 2
    for log in logs(method):
        assert "THE KEY IS" in log.upper()
        assert log.count("[key]") == 3
        assert "read 3 pictures" in log
        assert "exit code 0" in log


ALLOWED = {*ENVIRONMENT, "PYTHONUNBUFFERED", "LC_CTYPE"}  # the last is set by Python itself
SECRET_NAMES = [
    "KEYANON_PASSWORD",
    "MYPASS",
    "HF_TOKEN",
    "WANDB_API_KEY",
    "https_proxy",
    "PATHS",
    "path",
    "A B",
    "PYTHONPATH",
]


def test_a_program_is_handed_no_variable_but_the_named_ones(method, monkeypatch):
    """Whatever the variable of a password is called."""
    draw = random.Random(0)
    for name in [*SECRET_NAMES, *("".join(draw.choices("ABCxyz_019", k=draw.randint(1, 9))) for _ in range(200))]:
        if name not in ALLOWED:
            monkeypatch.setenv(name, "the master password")
    for name in ENVIRONMENT:
        if name not in os.environ:
            monkeypatch.setenv(name, "1")
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    sent(method)
    found = seen(method)["environment"]
    assert set(found) <= ALLOWED
    assert set(ENVIRONMENT) - set(found) <= {"LD_LIBRARY_PATH"}
    assert "the master password" not in found.values()


def test_a_variable_that_is_asked_for_is_handed_on(method, monkeypatch):
    monkeypatch.setenv("MY_CACHE", "there")
    sent(replace(method, environment=["MY_CACHE", "NOT_SET"]))
    found = seen(method)["environment"]
    assert found["MY_CACHE"] == "there"
    assert "NOT_SET" not in found
    with pytest.raises(BadSetting, match=r"environment='MY_CACHE': expected a list, of a text that is not empty each"):
        replace(method, environment="MY_CACHE")


COPYING = """
import json, os, pathlib, shutil, sys
pathlib.Path("seen.json").write_text(json.dumps(dict(os.environ)))
for path in pathlib.Path(sys.argv[1]).iterdir():
    shutil.copy(path, sys.argv[2])
"""


@pytest.mark.parametrize("variable", ["KEYANON_PASSWORD", "MYPASS"])
def test_the_password_of_a_run_does_not_reach_a_program(command_in_process, tmp_path, monkeypatch, variable):
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "driver.py").write_text(COPYING)
    monkeypatch.setenv(variable, "the master password")
    asked = [
        "name=tiny", "parser=ellipse", "recognizers=[]", "scorers=[mae]", "attacks=[]", "limit=1", "allow_faces_in_clear=true",
        "key=password", f"key.variable={variable}", "anonymizer=external",
        f"anonymizer.folder={tmp_path / 'code'}", f"anonymizer.command=[{sys.executable},driver.py,'{{images}}','{{output}}']",
    ]  # fmt: skip
    done = command_in_process(*asked)
    assert done.returncode == 0, done.stderr
    assert "the master password" not in json.loads((tmp_path / "code" / "seen.json").read_text()).values()
    done = command_in_process(*asked, f"anonymizer.environment=[{variable}]")
    assert done.returncode != 0
    assert (
        f"anonymizer.environment names {variable}, which holds the password (key.variable); take it out" in done.stderr
    )


def test_no_folder_holds_the_key_while_the_program_runs(method, tmp_path):
    """So none does if keyanon is killed then. The program finds it nowhere below the folder of temporary files."""
    script = 'for key in $(cut -d" " -f2 "$3"); do grep -rF "$key" "$4" && exit 7; done; test -s "$3" && cp "$1"/* "$2"'
    looking = ["sh", "-c", script, "sh", "{images}", "{output}", "{key}", str(tmp_path / "tmp")]
    assert torch.equal(sent(replace(method, command=looking)).images, to_bytes(IMAGES))


def test_many_keys_fit(method):
    copying = ["sh", "-c", 'test $(cut -d" " -f2 < "$3" | tr -d "\\n" | wc -c) = 120000 && cp "$1"/* "$2"', "sh"]
    many = replace(method, secret=Secret(40_000 * 4), command=[*copying, "{images}", "{output}", "{key}"])
    assert torch.equal(sent(many).images, to_bytes(IMAGES))


def test_one_key_for_all_starts_the_program_once(method):
    shared = replace(method, secret=Secret(64, "digits", per_picture=False), nonces=OneForAll())
    published = sent(shared)
    assert seen(shared)["starts"] == 1
    assert int(seen(shared)["key"]) < 2**64
    assert torch.equal(back(shared, published), to_bytes(IMAGES))
    assert seen(shared)["starts"] == 2


def test_a_program_of_one_key_starts_once_for_each_key(method):
    shared = replace(method, secret=Secret(64, per_picture=False))
    published = sent(shared)
    assert seen(shared)["starts"] == 3
    assert torch.equal(back(shared, published), to_bytes(IMAGES))


@pytest.mark.parametrize(
    ("format", "bits", "alphabet", "length"),
    [("hex", 256, "0123456789abcdef", 64), ("hex", 6, "0123456789abcdef", 2), ("bits", 16, "01", 16)],
)
def test_keys_have_their_length_and_alphabet(format, bits, alphabet, length):
    texts = [Secret(bits, format).of(KEY, Context(b"%d" % i), "m") for i in range(200)]
    assert {len(text) for text in texts} == {length}
    assert {letter for text in texts for letter in text} == set(alphabet)
    assert all(int(text, 16 if format == "hex" else 2) < 2**bits for text in texts)
    assert len(set(texts)) > (50 if bits == 6 else 190)


def test_seeds_are_uniform_and_keys_of_two_methods_differ():
    seeds = [int(Secret(10, "digits").of(KEY, Context(b"%d" % i), "m")) for i in range(2000)]
    assert max(seeds) <= 1023
    assert sum(seeds) / len(seeds) == pytest.approx(511.5, abs=4 * 1024 / 12**0.5 / 2000**0.5)
    assert Secret(64).of(KEY, Context(b""), "one") != Secret(64).of(KEY, Context(b""), "other")


@pytest.mark.parametrize(("bits", "format"), [(0, "hex"), (8, "octal")])
def test_impossible_keys_are_refused(bits, format):
    with pytest.raises(
        BadSetting, match=r"Secret\.(bits=0: expected a whole|format='octal': expected one of hex, digits, bits)"
    ):
        Secret(bits, format)


def test_the_longest_secret_is_taken_out_first():
    assert without("ab12 AB1 b1", ["ab1", "ab12"]) == "[key] [key] b1"
    assert without("all of it", []) == "all of it"


# What goes wrong


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (
            "crash",
            r"stub: its program to anonymize failed, exit code 1 after .* The end of .*\.log:(\n  .*)*no memory left",
        ),
        (
            "missing",
            r"stub, .*: expected one picture .* with a suffix of .*, found 0; there are: \d+\.png, \d+\.png\. Each",
        ),
        ("twice", r"stub, .*: expected one picture .*, found 2; there are: (\d+)\.bmp, \1\.png\."),
        ("unreadable", r"stub, .*: .*/\d+\.png: not a readable picture .*; what it printed is in .*\.log"),
        ("large", r"stub, .*: .*/\d+\.png has 16x16 pixels, expected 8x8; anonymizer\.size says"),
    ],
)
def test_what_goes_wrong_is_said_and_nothing_is_left(method, tmp_path, what, message):
    with pytest.raises(BadMethod, match=message) as error:
        sent(replace(method, command=command(what)))
    if what != "crash":  # whose picture it is
        names = {whole_number(id.encode()): id for id in IDS}
        assert f"stub, {names[max(names)]}: " in str(error.value)
    (log,) = logs(method)
    assert "read 3 pictures" in log
    keys = [line.split()[1] for line in seen(method)["key"].splitlines()]
    assert not any(key in (log + str(error.value)).lower() for key in keys)
    assert list((tmp_path / "tmp").iterdir()) == []


def test_what_goes_wrong_at_recovery_is_told_by_place(method):
    published = sent(method)
    with pytest.raises(BadMethod, match=r"stub, picture [123] of 3: expected one picture"):
        back(replace(method, recovery=command("missing")), published)
    assert "-recover-" in sorted(Path(method.logs).iterdir(), key=lambda path: path.stat().st_mtime_ns)[-1].name


def has_ended(pid: int) -> bool:
    """Also of a process that was killed and that a busy machine takes some time to be rid of."""
    stat = Path("/proc", str(pid), "stat")
    for _ in range(100):
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.1)
    return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for the program's child in /proc")
def test_a_program_that_hangs_is_killed_with_its_children(method, tmp_path):
    script = "echo begun; sleep 600 & echo $! > child; wait"
    hanging = ["sh", "-c", script, "sh", "{images}", "{output}", "{key}"]
    with pytest.raises(
        BadMethod, match=r"killed after 2 s; anonymizer\.timeout gives it longer. The end of .*log:\n  begun$"
    ):
        sent(replace(method, command=hanging, timeout=2))
    assert has_ended(int(Path(method.folder, "child").read_text()))
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for the program's child in /proc")
def test_what_a_program_leaves_running_ends_with_it(method):
    sent(replace(method, command=command("child")))
    assert has_ended(int(Path(method.folder, "child").read_text()))


def test_a_run_that_was_stopped_by_a_crash_leaves_no_picture_of_the_batch(method, tmp_path):
    class Three:
        ids, gallery = ("1", "2", "3"), ()

        def identity(self, id):
            return None

        def source(self, id):
            return Source(Path(__file__))  # which draws the pictures

        def load(self, id):
            return IMAGES[int(id) - 1]

    crashing, contents = replace(method, command=command("crash")), {}
    run, originals = (RunFiles(tmp_path / name, contents) for name in ("run", "originals"))
    assert prepare(originals, contents, Digests(tmp_path / "contents"), Three(), Three.ids, CentreFace(), 4) == {}
    with pytest.raises(BadMethod):
        generate(run, originals, Three.ids, crashing, KEY, {}, 4)
    assert run.ids("anonymized") == []
    generate(run, originals, Three.ids, method, KEY, {"wrong_key": WrongKey()}, 4)
    assert torch.equal(run.read_all("recovered", Three.ids), to_bytes(IMAGES))
    assert not torch.equal(run.read_all("wrong_key", Three.ids), to_bytes(IMAGES))


def test_all_that_is_missing_is_said_before_a_run(method, tmp_path):
    assert missing_parts(method) == []
    (message,) = missing_parts(replace(method, folder=None))
    assert message == f"stub: not here: official code (anonymizer.folder). {OBTAIN}"
    gone = replace(method, needs=["test.py", "weights/G.pth"], recovery=["no-such-python", *method.recovery[1:]])
    (message,) = missing_parts(gone)
    assert f"file {tmp_path / 'code' / 'test.py'}, file {tmp_path / 'code' / 'weights/G.pth'}" in message
    assert message.endswith(f"program no-such-python. {OBTAIN}")
    (tmp_path / "code" / "test.py").touch()
    assert "test.py" not in gone.missing()
    with pytest.raises(BadMethod, match="stub: not here: file "):
        sent(gone)


def test_a_program_in_the_folder_of_the_code_is_found_and_one_that_cannot_start_is_named(method):
    script = Path(method.folder, "run.sh")
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    own = replace(method, command=["./run.sh", *method.command[1:]])
    with pytest.raises(BadMethod, match=r"stub: \./run\.sh cannot be started in .*Permission denied"):
        sent(own)
    script.chmod(0o700)
    assert own.missing() is None
    assert torch.equal(back(own, sent(own)), to_bytes(IMAGES))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"command": ["p", "{images}", "{output}"]}, "has the places images, output; expected images, key, output"),
        ({"recovery": ["p", "{images}", "{out}", "{key}"]}, "has the places images, key, out; expected"),
        ({"secret": None}, "has the places images, key, output; expected images, output, each"),
        ({"outputs": "any"}, "outputs='any' does not say where a picture's {name} stands"),
    ],
)
def test_commands_without_their_places_are_refused(method, changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        replace(method, **changes)


def test_no_shell_reads_a_command(method):
    words = [*command(), "; touch", "$(touch here)", "`touch here`", "*"]
    sent(replace(method, command=words))
    assert seen(method)["arguments"][5:] == words[6:]
    assert not Path(method.folder, "here").exists()


# Ready-made pictures


@pytest.fixture
def ready(tmp_path) -> ReversibleReady:
    """Inverted pictures, and the originals as recovered ones."""
    ids = ["a", "a.b", "sub/c"]
    for folder, pixels in (("any", 255 - to_bytes(IMAGES)), ("rec", to_bytes(IMAGES))):
        (tmp_path / folder / "sub").mkdir(parents=True)
        for id, picture in zip(ids, pixels, strict=True):
            write_png(tmp_path / folder / f"{id}.png", picture)
    about = replace(ABOUT, source="github.com/nobody/nothing")
    return ReversibleReady(about=about, anonymized=str(tmp_path / "any"), recovered=str(tmp_path / "rec"))


READY_IDS = ["a", "a.b", "sub/c"]


def test_ready_made_pictures_are_found_by_id(ready):
    published = sent(ready, ids=READY_IDS)
    assert torch.equal(published.images, 255 - to_bytes(IMAGES))
    assert torch.equal(back(ready, published), to_bytes(IMAGES))
    irreversible = Ready(about=ABOUT, anonymized=ready.anonymized)
    assert not isinstance(irreversible, Reversible)
    assert torch.equal(sent(irreversible, ids=READY_IDS).images, published.images)
    assert sent(irreversible, ids=READY_IDS).headers == (b"",) * 3


def test_equal_published_pictures_keep_their_own_recoveries(ready):
    for id in READY_IDS:
        write_png(Path(ready.anonymized, f"{id}.png"), torch.zeros(3, 8, 8, dtype=torch.uint8))
    assert torch.equal(back(ready, sent(ready, ids=READY_IDS)), to_bytes(IMAGES))


def test_without_a_key_ready_made_pictures_are_as_published(ready):
    published = sent(ready, ids=READY_IDS)
    assert torch.equal(to_bytes(NoKey()(published, [Nobody()] * 3, ready)), published.images)


@pytest.mark.parametrize("attack", [WrongKey(), NearKey(), Jpeg(50)])
def test_attacks_on_ready_made_pictures_cannot_be_measured(ready, attack):
    with pytest.raises(BadHeader, match=r"start with attacks=\[\]"):
        attack(sent(ready, ids=READY_IDS), [KEY] * 3, ready)


def test_ready_made_pictures_of_another_size_are_resized_if_asked(ready):
    images = torch.stack([from_pil(smooth_picture(seed, 4)) for seed in range(3)])
    with pytest.raises(BadMethod, match=r"ready-made, a: .*a\.png has 8x8 pixels, expected 4x4; anonymizer\.size"):
        sent(ready, images, ids=READY_IDS)
    assert sent(replace(ready, size=8), images, ids=READY_IDS).images.shape == (3, 3, 4, 4)


def test_missing_and_broken_ready_made_pictures_are_named(ready, tmp_path):
    with pytest.raises(
        BadMethod, match=r"ready-made, z: expected one picture .*any/z with .*, found 0; there are: .*png"
    ):
        sent(ready, IMAGES[:1], ids=["z"])
    (tmp_path / "any" / "a.png").write_bytes(b"")
    with pytest.raises(BadMethod, match=r"ready-made, a: .*a\.png: not a readable picture.*dataset\.list"):
        sent(ready, IMAGES[:1], ids=["a"])
    shutil.copy(tmp_path / "rec" / "a.png", tmp_path / "any" / "a.png")
    (tmp_path / "rec" / "a.png").unlink()
    published = sent(ready, IMAGES[:1], ids=["a"])
    with pytest.raises(BadMethod, match=r"rec/a with a suffix"):
        back(ready, published)


def test_folders_that_are_not_there_are_said_before_a_run(ready):
    assert missing_parts(ready) == []
    (message,) = missing_parts(replace(ready, anonymized=None, recovered="nowhere"))
    assert message.startswith(
        "ready-made pictures: no folder anonymizer.anonymized=None, anonymizer.recovered=nowhere; make its pictures with the "
        "authors' code (github.com/nobody/nothing)"
    )
    with pytest.raises(ValueError, match="does not say where a picture's {id} stands"):
        replace(ready, files="any")


# What is reported of rivals


def test_cells_that_other_files_of_reported_numbers_have_too_agree():
    rivals = {reference.cell: reference for reference in read_paper(ROOT / "results" / "paper" / "rivals.yaml")}
    others = {
        reference.cell: reference
        for name in ("wrong_keys", "diversity")
        for reference in read_paper(ROOT / "results" / "paper" / f"{name}.yaml")
        if not reference.anonymizer.startswith("signflip")
    }
    assert len(others) == 22
    assert all(
        rivals[cell].paper == other.paper and rivals[cell].tolerance == other.tolerance
        for cell, other in others.items()
    )


def test_every_file_of_the_program_decides_its_pictures(method, tmp_path):
    code = tmp_path / "code"
    (code / "pretrained" / "deep").mkdir(parents=True)
    for name in ("helper.py", "driver.sh", "README", "pretrained/w.bin", "pretrained/deep/G.pth"):
        (code / name).write_text(name)
    found = {source.path for source in replace(method, needs=["driver.sh", "pretrained"]).sources("1")}
    named = {code / name for name in ("helper.py", "driver.sh", "pretrained/w.bin", "pretrained/deep/G.pth")}
    assert named <= found
    assert code / "README" not in found
