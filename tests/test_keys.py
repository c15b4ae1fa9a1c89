"""Known answers, and properties that hold for every key and nonce."""

import hashlib
import hmac
import io
import re
import subprocess
import sys
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from argon2.low_level import Type, hash_secret_raw
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import keys as command
from keyanon.attacks.views import FlippedSigns
from keyanon.channel.headers import BadHeader, Header, seal, unseal
from keyanon.channel.keys import BadKey, MasterKey, Recipe, experiment_key, read_key, write_key, write_new_key
from keyanon.channel.nonces import OneForAll, PerIdentity, nonce_for
from keyanon.channel.pixels import write_png
from keyanon.channel.streams import normals, signs
from keyanon.context import Context, joined
from keyanon.errors import UserError
from tests.conftest import ROOT

SECRETS, NONCES = st.binary(min_size=32, max_size=32), st.binary(min_size=24, max_size=24)
SALT = bytes(range(16))
COSTS = ("passes", "memory", "lanes")
CHEAP = Recipe(SALT, 1, 64, 2)


def test_hkdf_as_rfc_5869_has_it():
    """Appendix A.1."""
    info = bytes(range(0xF0, 0xFA))
    derived = HKDF(hashes.SHA256(), 42, salt=bytes(range(13)), info=info).derive(b"\x0b" * 22)
    expected = "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865"
    assert derived.hex() == expected


def test_chacha20_as_rfc_8439_has_it():
    """Appendix A.1, vectors 1 (whose counter and nonce are ours) and 3 (a key that is not zero)."""
    for secret, counter, expected in (
        (bytes(32), 0, "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"),
        (bytes(31) + b"\1", 1, "3aeb5224ecf849929b9d828db1ced4dd832025e8018b8160b82284f3c949aa5a"),
    ):
        start = counter.to_bytes(4, "little") + bytes(12)
        assert Cipher(algorithms.ChaCha20(secret, start), mode=None).encryptor().update(bytes(32)).hex() == expected


def test_argon2id_as_rfc_9106_and_its_reference_have_it():
    """RFC 9106, 5.3, which needs a secret and associated data; and test.c of the reference implementation."""
    vector = Argon2id(
        salt=b"\2" * 16, length=32, iterations=3, lanes=4, memory_cost=32, ad=b"\4" * 12, secret=b"\3" * 8
    ).derive(b"\1" * 32)
    assert vector.hex() == "0d640df58d78766c08c037a34a8b53c9d01ef0452d75b65eb52520e96b01e659"
    reference = hash_secret_raw(b"password", b"somesalt", 2, 256, 1, 32, Type.ID)
    assert reference.hex() == "9dfeb910e80bad0311fee20f9c0e2b12c17987b4cac90c2ef54d5b3021c68bfe"


@settings(max_examples=20, deadline=None)
@given(
    st.text(min_size=1), st.binary(min_size=16, max_size=16), st.integers(1, 3), st.integers(32, 80), st.integers(1, 4)
)
def test_a_password_is_derived_as_another_library_does(password, salt, passes, memory, lanes):
    composed = unicodedata.normalize("NFC", password)
    theirs = Argon2id(salt=salt, length=32, iterations=passes, lanes=lanes, memory_cost=memory).derive(
        composed.encode()
    )
    assert Recipe(salt, passes, memory, lanes).derive(password).secret == theirs


def test_a_password_gives_the_same_key_however_it_is_typed():
    assert CHEAP.derive("caf\u00e9") == CHEAP.derive("cafe\u0301")
    others = {CHEAP.derive("cafe").secret, Recipe(SALT[::-1], 1, 64, 2).derive("caf\u00e9").secret}
    others |= {replace(CHEAP, **{name: getattr(CHEAP, name) * 2}).derive("caf\u00e9").secret for name in COSTS}
    assert len(others | {CHEAP.derive("caf\u00e9").secret}) == 6


def test_known_answer_of_a_password():
    """The default costs, those of RFC 9106's second recommendation."""
    assert (Recipe(SALT).passes, Recipe(SALT).memory, Recipe(SALT).lanes) == (3, 65536, 4)
    assert Recipe(SALT).derive("correct horse battery staple").fingerprint == "0ae5209940f2a750"


@given(st.binary(max_size=40) | st.binary(min_size=23, max_size=23).map(lambda rest: b"\x13" + rest))
def test_any_bytes_give_a_recipe_within_bounds_or_a_message(data):
    try:
        recipe = Recipe.unpack(data)
    except BadKey as error:
        assert str(error).isprintable()
    else:
        assert recipe.pack() == data
        assert recipe.memory * recipe.passes <= 16 * 2**20


@pytest.mark.parametrize(
    ("costs", "message"),
    [
        ((1, 2**22 + 1, 1), "asks for 4194305 KiB of memory; it can be 8 to 4194304"),
        ((1001, 64, 1), "1001 passes"),
        ((1000, 2**20, 1), "KiB of memory times passes"),
        ((0, 64, 1), "0 passes"),
        ((1, 31, 4), "31 KiB of memory"),
        ((1, 2**16, 65), "65 lanes"),
        ((1, 64, 0), "0 lanes"),
    ],
)
def test_absurd_recipes_are_refused_before_anything_is_allocated(costs, message):
    with pytest.raises(BadKey, match=message):
        Recipe(SALT, *costs)
    with pytest.raises(BadKey, match="16 bytes, this one 3"):
        Recipe(b"abc")
    with pytest.raises(BadKey, match="empty"):
        CHEAP.derive("")
    with pytest.raises(BadKey, match=r"^the password is not text$"):
        CHEAP.derive("secret\udcff")


@pytest.mark.parametrize(
    ("description", "salt", "info"),
    [
        (None, bytes(range(24)), b"keyanon/1|signs"),  # header version 2
        (b"{}", b"keyanon/3", b"\5" + bytes(7) + b"signs\x18" + bytes(7) + bytes(range(24)) + b"\2" + bytes(7) + b"{}"),
    ],
)
def test_stream_is_hkdf_then_chacha20(key, description, salt, info):
    """The construction spelled out with hmac (RFC 5869) instead of the library's HKDF."""
    extracted = hmac.digest(salt, key.secret, "sha256")
    expanded = hmac.digest(extracted, info + b"\x01", "sha256")
    expected = Cipher(algorithms.ChaCha20(expanded, bytes(16)), mode=None).encryptor().update(bytes(100))
    assert key.stream(Context(bytes(range(24)), description), "signs", 100) == expected


def test_known_answers(key):
    """Committed bits: a change of library or platform that alters a key stream must not pass."""
    here, silent = Context(bytes(range(24)), b"{}"), Context(bytes(24), None)
    assert key.stream(here, "signs", 16).hex() == "dc7332dea2a354356c75e8fbeb2c283f"
    assert key.fingerprint == "8c031bca33c9e184"
    k = signs(key, here, (3, 64, 64))
    assert hashlib.sha256(k.numpy().tobytes()).hexdigest()[:16] == "8f7975582c6d98de"
    picture = torch.arange(48).view(3, 4, 4) / 24 - 1
    assert nonce_for(key, b"settings", "id", picture).hex() == "0f02b9be3bb9df748518fdcddddee5da71cf3cc82cebd29d"
    assert nonce_for(key, b"settings", "id", picture, 1).hex() == "d390e5efa346e5b40df1afc69a2cbca72e179a7698699138"
    assert OneForAll()(key, b"settings", "id", picture).hex() == "00c3bb8b1d130bf295d44ac775f1343b6a60564a80970faf"
    assert [f"{x:.9f}" for x in normals(key, here, "rotation", (2,))] == ["-1.827415395", "0.382956084"]
    # of header version 2
    assert key.stream(replace(silent, nonce=bytes(range(24))), "signs", 16).hex() == "bc4a4d638eeed854a622bd1347f4e3ba"
    k = signs(key, silent, (3, 64, 64))
    assert hashlib.sha256(k.numpy().tobytes()).hexdigest()[:16] == "96975f2b297a0d59"
    assert [f"{x:.9f}" for x in normals(key, silent, "rotation", (2,))] == ["0.124040409", "-1.707882311"]


@given(SECRETS, NONCES)
def test_signs_are_signs_and_their_own_inverse(secret, nonce):
    k = signs(MasterKey(secret), Context(nonce), (3, 8, 8))
    assert set(k.unique().tolist()) == {-1, 1}
    assert (k * k == 1).all()


def test_signs_are_balanced_and_unrelated_between_nonces_and_near_keys(key):
    k = signs(key, Context(bytes(24)), (100_000,)).float()
    assert abs(k.mean()) < 4 / np.sqrt(100_000)
    for other in (
        signs(key, Context(b"1" * 24), (100_000,)),
        signs(key, Context(bytes(24), b"{}"), (100_000,)),
        signs(key.with_bit_flipped(), Context(bytes(24)), (100_000,)),
    ):
        assert abs((k * other).mean()) < 4 / np.sqrt(100_000)


@given(SECRETS, NONCES, st.sampled_from([0.0, 0.01, 0.25, 1.0]))
def test_flipped_signs_flip_that_fraction(secret, nonce, fraction):
    key, here = MasterKey(secret), Context(nonce)
    wrong = signs(FlippedSigns(key, fraction), here, (4000,)) != signs(key, here, (4000,))
    assert wrong.float().mean() == pytest.approx(fraction, abs=1e-9)
    assert FlippedSigns(key, fraction).stream(here, "other", 8) == key.stream(here, "other", 8)


@given(SECRETS, st.integers(0, 255))
def test_near_key_differs_in_one_bit(secret, bit):
    near = MasterKey(secret).with_bit_flipped(bit)
    assert sum((a ^ b).bit_count() for a, b in zip(secret, near.secret, strict=True)) == 1


def test_nonce_is_a_function_of_key_settings_id_pixels_and_attempt(key):
    """As joined strings: no id is taken for an attempt ("a|1" was), no shape for another one."""
    picture = torch.zeros(3, 4, 6)
    nonce = nonce_for(key, b"s", "a", picture)
    assert nonce == nonce_for(key, b"s", "a", picture.clone())
    others = [
        nonce_for(key, b"s", "b", picture),
        nonce_for(key, b"t", "a", picture),
        nonce_for(key, b"s", "a", picture, 1),
        nonce_for(key, b"s", "a|1", picture),
        nonce_for(key, b"s", "a", picture + 1),
        nonce_for(key, b"s", "a", picture.reshape(3, 6, 4)),
        nonce_for(experiment_key(), b"s", "a", picture),
    ]
    assert len({nonce, *others}) == 8
    assert len(nonce) == 24
    told = joined(b"s", b"a", b"0", b"(3, 4, 6)", picture.numpy().tobytes())
    assert nonce == key.stream(Context(hashlib.sha256(told).digest()), "nonce", 24)


@dataclass(frozen=True)
class Album:
    """Pictures named person-number; nobody knows who is on a nameless one."""

    def identity(self, id):
        return id.partition("-")[0] or None


def test_scopes_share_key_streams_as_they_say_and_warn_once(key, caplog):
    pictures = torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4), torch.zeros(3, 4, 4)])
    ids = ["ann-1", "ann-2", "bob-1"]
    with caplog.at_level("WARNING"):
        one, person = OneForAll(), PerIdentity(Album())
        for scope, streams in ((nonce_for, 3), (person, 2), (one, 1)):
            nonces = [scope(key, b"", id, picture) for id, picture in zip(ids, pictures, strict=True)]
            assert len(set(nonces)) == streams
            assert {len(nonce) for nonce in nonces} == {24}
            assert not {scope(experiment_key(), b"", id, pictures[0]) for id in ids} & set(nonces)
            again = scope(key, b"", ids[0], pictures[0], 1)
            assert (again == nonces[0]) is (streams < 3)
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        "one key stream for all pictures",
        "one key stream for each person",
    ]
    assert person(key, b"", "ann-1", pictures[0]) == person(key, b"", "ann-2", pictures[1])
    with pytest.raises(ValueError, match="does not say who is on -3; take nonce=per_image"):
        person(key, b"", "-3", pictures[0])


def test_secret_is_not_in_repr(key):
    assert key.secret.hex() not in repr(key)
    assert repr(key.secret) not in repr(key)


def test_key_file_round_trip(tmp_path):
    key = write_new_key(tmp_path / "key")
    assert read_key(tmp_path / "key") == key
    with pytest.raises(BadKey, match="never overwritten"):
        write_new_key(tmp_path / "key")


def test_bad_key_files_are_refused_with_a_remedy(tmp_path):
    path = tmp_path / "key"
    with pytest.raises(BadKey, match="no key file .* make one with"):
        read_key(path)
    for content, message in (
        ("ab" * 31, "holds 31 bytes"),
        ("password", "not a key file"),
        ("é" * 32, "not a key file"),
    ):
        path.write_text(content)
        path.chmod(0o600)
        with pytest.raises(BadKey, match=message):
            read_key(path)
    path.write_text("ab" * 32)
    path.chmod(0o644)
    with pytest.raises(BadKey, match="chmod 600"):
        read_key(path)
    path.write_text("ab" * 32 + "\n13")
    path.chmod(0o600)
    with pytest.raises(BadKey, match="recipe has 24 bytes, this one 1"):
        read_key(path)
    with pytest.raises(BadKey, match="32 bytes"):
        MasterKey(b"short")


def test_a_password_key_keeps_its_recipe_in_its_file(tmp_path):
    key = CHEAP.derive("secret words")
    write_key(tmp_path / "key", key)
    assert read_key(tmp_path / "key") == key
    assert read_key(tmp_path / "key").recipe == CHEAP
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600


@pytest.fixture
def run(monkeypatch, capsys):
    """The command line: what it prints, and what it exits with."""

    def once(*arguments, stdin=""):
        monkeypatch.setattr("sys.argv", ["keys", *map(str, arguments)])
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        try:
            command.main()
        except SystemExit as exit:
            return capsys.readouterr().out, exit.code
        return capsys.readouterr().out, None

    return once


def test_the_command_runs_as_a_module(tmp_path):
    line = [sys.executable, "-m", "experiments.keys", "derive", tmp_path / "key", "--passes", "4"]
    done = subprocess.run(line, input="my secret\n", cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (read_key(tmp_path / "key").fingerprint + "\n", "")


def test_the_commands_make_keys_and_print_only_fingerprints(run, tmp_path):
    costs = ("--passes", 4, "--lanes", 2)
    made = [
        run("new", tmp_path / "random"),
        run("derive", tmp_path / "derived", *costs, stdin="my secret\n"),
    ]
    for result, name in zip(made, ("random", "derived"), strict=True):
        assert result == (read_key(tmp_path / name).fingerprint + "\n", None)
        assert result == run("fingerprint", tmp_path / name)
    assert read_key(tmp_path / "derived").recipe.derive("my secret") == read_key(tmp_path / "derived")
    assert read_key(tmp_path / "derived").recipe.salt != bytes(16)

    pixels = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    for authenticate in (True, False):
        header = seal([Header(bytes(24))], pixels, [read_key(tmp_path / "derived")], authenticate)[0]
        write_png(tmp_path / f"{authenticate}.png", pixels[0], header)
    told = run("derive", tmp_path / "again", "--picture", tmp_path / "True.png", stdin="my secret")
    assert told == made[1]
    assert (tmp_path / "again").read_bytes() == (tmp_path / "derived").read_bytes()
    salt = read_key(tmp_path / "derived").recipe.salt.hex()
    assert run("derive", tmp_path / "salted", *costs, "--salt", salt, stdin="my secret") == made[1]

    for arguments, stdin, message in (
        (("new", tmp_path / "random"), "", "never overwritten"),
        (("new", tmp_path / "nowhere" / "key"), "", "No such file"),
        (("derive", tmp_path / "x", *costs), "\n", "password is empty"),
        (("derive", tmp_path / "x", "--memory", 2**33), "?\n", "KiB of memory"),
        (("derive", tmp_path / "x", "--picture", tmp_path / "True.png"), "other", "not the picture's key"),
        (
            ("derive", tmp_path / "x", "--picture", tmp_path / "False.png"),
            "my secret",
            "no tag tells who wrote the recipe",
        ),
        (("derive", tmp_path / "x", "--memory", 8, "--lanes", 1), "?\n", "guesses are cheap"),
        (("derive", tmp_path / "x", "--passes", 2), "?\n", "guesses are cheap"),
        (("derive", tmp_path / "x", "--salt", "ab"), "?\n", "--salt: expected 32 hex digits"),
        (("derive", tmp_path / "x", "--picture", tmp_path / "random"), "?", "not a readable picture"),
        (("fingerprint", tmp_path / "x"), "", "no key file"),
    ):
        printed, code = run(*arguments, stdin=stdin)
        assert printed == ""
        assert message in code
        assert "\n" not in code
        assert not (tmp_path / "x").exists()


def test_keys_of_published_pictures(tmp_path, key):
    pixels = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    path = tmp_path / "x.png"
    write_png(path, pixels[0], seal([Header(bytes(24))], pixels, [key], True)[0])
    with pytest.raises(BadKey, match="does not come from a password"):
        command.key_of(path, "p")
    write_png(path, pixels[0])
    with pytest.raises(BadHeader, match="no keyanon header"):
        command.key_of(path, "p")


def test_a_terminal_is_asked_twice(monkeypatch):
    monkeypatch.setattr("sys.stdin", Terminal())
    answers = iter(["a", "a", "a", "b"])
    monkeypatch.setattr("getpass.getpass", lambda _: next(answers))
    assert command.asked_password() == "a"
    with pytest.raises(BadKey, match="differ"):
        command.asked_password()


def test_the_recipe_of_a_strangers_file_is_not_taken(tmp_path, run):
    """Somebody takes the tag off a published file, and writes a recipe in whose guesses cost nothing, or a salt that he knows."""
    pixels, path = torch.zeros(1, 3, 8, 8, dtype=torch.uint8), tmp_path / "x.png"
    own = Recipe(SALT).derive("my secret")
    (sealed,) = seal([Header(bytes(24))], pixels, [own], authenticate=True)
    for recipe in (Recipe(SALT[::-1], 1, 8, 1), Recipe(SALT[::-1])):
        forged = replace(Header.unpack(sealed), recipe=recipe, tag=b"")
        for header in (forged, replace(forged, tag=bytes(32))):
            write_png(path, pixels[0], header.pack())
            for weak in ([], ["--weak"]):
                printed, message = run("derive", tmp_path / "key", "--picture", path, *weak, stdin="my secret")
                assert printed == ""
                assert re.search("no tag tells|guesses are cheap|not the picture's key", message)
                assert not (tmp_path / "key").exists()


def test_a_weak_recipe_opens_files_and_publishes_none(tmp_path, run, monkeypatch):
    pixels, path = torch.zeros(1, 3, 8, 8, dtype=torch.uint8), tmp_path / "x.png"
    key = CHEAP.derive("p")
    with pytest.raises(BadKey, match="nothing is published under this key: .* 1 passes over 64 KiB"):
        seal([Header(bytes(24))], pixels, [key], authenticate=True)
    with monkeypatch.context() as before:  # as an earlier version published it
        before.setattr(Recipe, "weak", False)
        (sealed,) = seal([Header(bytes(24), description=None)], pixels, [key], authenticate=True)
    write_png(path, pixels[0], sealed)
    assert unseal([sealed], pixels, [key], authenticate=True)
    assert (
        "guesses are cheap; the default is 3 passes over 65536 KiB"
        in run("derive", tmp_path / "key", "--picture", path, stdin="p")[1]
    )
    assert run("derive", tmp_path / "key", "--picture", path, "--weak", stdin="p") == (key.fingerprint + "\n", None)
    assert read_key(tmp_path / "key") == key


@pytest.mark.parametrize(
    ("costs", "weak"),
    [
        ((3, 65536, 4), False),
        ((3, 65536, 1), False),
        ((1, 2**21, 4), False),
        ((2, 65536, 4), True),
        ((9, 32768, 4), True),
    ],
)
def test_weak_is_less_memory_or_less_work_than_the_default(costs, weak):
    assert Recipe(SALT, *costs).weak is weak


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_password_from_the_environment(monkeypatch, caplog, tmp_path):
    monkeypatch.setattr("sys.stdin", io.StringIO())
    kept = str(tmp_path / "run" / "salt")
    settings = {"variable": "SOME_PASSWORD", "kept": kept, "passes": 3, "memory": 65536, "lanes": 4}
    with pytest.raises(BadKey, match="set the environment variable SOME_PASSWORD"):
        command.password_key(salt=SALT.hex(), **settings)
    monkeypatch.setenv("SOME_PASSWORD", "hush hush")
    assert command.password_key(salt=SALT.hex(), **settings) == Recipe(SALT).derive("hush hush")
    with pytest.raises(BadKey, match="expected 32 hex digits"):
        command.password_key(salt="salt", **settings)
    with pytest.raises(BadKey, match="key.passes=3, key.memory=64: .*guesses are cheap"):
        command.password_key(salt=SALT.hex(), **settings | {"memory": 64})
    with caplog.at_level("INFO"):
        fresh = command.password_key(salt=None, **settings)
    assert (tmp_path / "run" / "salt").read_text().strip() == fresh.recipe.salt.hex()
    with ThreadPoolExecutor(4) as pool:  # a run's shards
        assert set(pool.map(lambda _: command.password_key(salt=None, **settings), range(8))) == {fresh}
        elsewhere = settings | {"kept": str(tmp_path / "other" / "salt")}
        others = set(pool.map(lambda _: command.password_key(salt=None, **elsewhere), range(8)))
    assert len(others) == 1
    assert others != {fresh}
    assert (tmp_path / "run" / "salt").stat().st_mode & 0o777 == 0o600
    for wrong, message in (
        ({"kept": ""}, "kept='': expected a text that is not empty"),
        ({"kept": str(tmp_path)}, "key.kept=.*: no file to keep the password's salt in"),
        ({"kept": str(tmp_path / "run" / "salt" / "x")}, "key.kept=.*: no file"),
        ({"passes": 3.0}, "passes=3.0: expected a whole number"),
        ({"variable": None}, "variable=None"),
    ):
        with pytest.raises(UserError, match=message):
            command.password_key(salt=None, **settings | wrong)
    (tmp_path / "run" / "salt").write_bytes(b"dam\xffaged")
    with pytest.raises(BadKey, match="salt: expected 32 hex digits"):
        command.password_key(salt=None, **settings)
    assert "hush" not in caplog.text
