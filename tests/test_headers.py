"""The header's format, its parser under hostile bytes, and what its tag accepts."""

import hmac
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from benchmarks import fuzz_files
from benchmarks.fuzz_headers import KEY, PIXELS, fuzz, specimen
from keyanon.attacks.views import FlippedSigns
from keyanon.channel.headers import (
    FIXED,
    MAX_BYTES,
    MAX_DESCRIPTION,
    MAX_PARTS,
    TAG_BYTES,
    BadHeader,
    Header,
    canonical,
    seal,
    unseal,
)
from keyanon.channel.keys import MasterKey, Recipe, experiment_key
from keyanon.context import Context

NONCES = st.binary(min_size=24, max_size=24)
MASKS = st.tuples(st.integers(1, 64), st.integers(1, 64)).flatmap(lambda size: arrays(bool, (1, *size)))
RECIPES = st.builds(
    Recipe, st.binary(min_size=16, max_size=16), st.integers(1, 9), st.integers(64, 99), st.integers(1, 8)
)
CHANGED = "not the picture's key, or picture or header were changed"


def same(a: Header, b: Header) -> bool:
    masks = (a.mask is None and b.mask is None) or torch.equal(a.mask, b.mask)
    return masks and replace(a, mask=None) == replace(b, mask=None)


PARTS = st.binary(max_size=99)


DESCRIPTIONS = st.none() | st.dictionaries(st.text(max_size=9), st.integers() | st.text(max_size=9)).map(canonical)


@given(NONCES, st.none() | MASKS, PARTS, PARTS, st.none() | RECIPES, st.booleans(), PARTS, DESCRIPTIONS)
def test_round_trip(nonce, mask, sent, seam, recipe, tagged, residual, description):
    cells = None if mask is None else torch.from_numpy(mask)
    header = Header(nonce, cells, sent, seam, recipe, bytes(32 * tagged), residual, description)
    assert same(Header.unpack(header.pack()), header)


@pytest.mark.parametrize("size", [(1, 1), (256, 256), (1, 256)])
def test_masks_of_every_size_travel(size):
    mask = torch.rand(1, *size, generator=torch.Generator().manual_seed(0)) > 0.5
    assert same(Header.unpack(Header(bytes(24), mask).pack()), Header(bytes(24), mask))


def test_what_would_not_be_read_back_is_not_packed():
    noise = torch.rand(1, 256, 256) > 0.5
    told = canonical({"": np.random.default_rng(0).bytes(MAX_DESCRIPTION // 2 - 4).hex() + "x"})
    assert len(told) == MAX_DESCRIPTION
    full = Header(bytes(24), noise, bytes(MAX_PARTS - 9), b"seam", Recipe(bytes(16)), bytes(32), b"added", told)
    assert len(full.pack()) <= MAX_BYTES
    assert same(Header.unpack(full.pack()), full)
    with pytest.raises(BadHeader, match="no room"):
        Header(bytes(24), None, b"", bytes(MAX_PARTS + 1)).pack()


@given(st.binary(max_size=200), st.integers(0, 255))
@example(bytes(24) + b"\xff\xff" + zlib.compress(bytes(10**7)), 1)
def test_any_bytes_give_a_header_or_a_message(data, flags):
    for candidate in (data, *(b"KA" + bytes([version, flags]) + data for version in (2, 3))):
        try:
            Header.unpack(candidate)
        except BadHeader as error:
            assert str(error)
            assert "\n" not in str(error)


@given(st.data())
def test_every_truncation_extension_and_flipped_bit_is_refused(data):
    packed = specimen()
    cut = packed[: data.draw(st.integers(0, len(packed) - 1))]
    longer = packed + data.draw(st.binary(min_size=1, max_size=50))
    flipped = bytearray(packed)
    flipped[data.draw(st.integers(0, len(packed) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    for changed in (cut, longer, bytes(flipped)):
        with pytest.raises(BadHeader):
            unseal([changed], PIXELS, [KEY], authenticate=True)


def test_a_fuzz_run_accepts_nothing_that_was_not_published():
    rows, messages = fuzz(600)
    assert sum(row["inputs"] for row in rows) == 6 * 600
    assert all(row["recovered"] == 0 for row in rows)
    assert {row["kind"]: row["parsed"] for row in rows if row["kind"] in ("replayed", "random")} == {
        "replayed": 600,
        "random": 0,
    }
    assert len(messages) > 5


def test_no_changed_file_is_recovered_and_every_file_that_is_packed_otherwise_is():
    rows, messages = fuzz_files.fuzz(400)
    assert [row["as_published"] for row in rows if row["kind"] == "rewritten without loss"] == [50]
    assert [row["refused"] for row in rows if row["kind"] in ("bits flipped", "another header", "other pixels")] == [
        50
    ] * 3
    assert len(messages) > 10


def test_a_bomb_inflates_no_further_than_its_mask(monkeypatch):
    inflated = []
    monkeypatch.setattr(zlib, "decompressobj", lambda make=zlib.decompressobj: Counting(make(), inflated))
    for rows, columns in ((0, 0), (255, 255)):
        bomb = Header(bytes(24), torch.ones(1, 1, 1, dtype=torch.bool), description=None).pack()[:FIXED]
        bomb += bytes([rows, columns]) + zlib.compress(bytes(30_000_000), 9)
        with pytest.raises(BadHeader, match="mask cannot be read"):
            Header.unpack(bomb)
    assert inflated == [2, 8193]
    bomb = zlib.compress(bytes(30_000_000), 9)
    with pytest.raises(BadHeader, match="cannot be read"):
        Header.unpack(b"KA\3\0" + bytes(24) + len(bomb).to_bytes(2, "little") + bomb)
    assert inflated[2:] == [MAX_DESCRIPTION + 1]


class Counting:
    """A decompressor that notes how much comes out of it."""

    def __init__(self, inner, counts):
        self.inner, self.counts = inner, counts

    def decompress(self, *args):
        out = self.inner.decompress(*args)
        self.counts.append(len(out))
        return out

    def __getattr__(self, name):
        return getattr(self.inner, name)


def test_messages():
    recipe = Recipe(bytes(16), 1, 64, 1)
    with_recipe = Header(bytes(24), None, b"", b"", recipe, description=None).pack()
    silent = Header(bytes(24), description=None)
    greedy = with_recipe[: FIXED + 4] + (2**32 - 1).to_bytes(4, "little") + with_recipe[FIXED + 8 :]
    for data, message in (
        (b"", "no keyanon header"),
        (b"KA", "does not begin as one"),
        (b"KA\x01" + bytes(40), "version 1: this program reads versions 2 and 3"),
        (b"KA\x09" + bytes(40), "version 9"),
        (b"KA\x02\x80" + bytes(24), "flags 128 mean nothing"),
        (Header(bytes(24)).pack()[:-1], "cut short"),
        (silent.pack()[:-1], "cut short"),
        (Header(bytes(24)).pack() + b"!", "does not end where it should"),
        (silent.pack() + b"!", "does not end where it should"),
        (Header(bytes(24), None, b"sent").pack()[:-1], "cut short"),
        (Header(bytes(24), torch.ones(1, 4, 4, dtype=torch.bool)).pack() + b"!", "mask cannot be read"),
        (bytes(MAX_BYTES + 1), "65537 bytes; it can have at most 65536"),
        (greedy, "asks for 4294967295 KiB of memory"),
        (with_recipe[:FIXED] + b"\x10" + with_recipe[FIXED + 1 :], "version 16 of Argon2"),
    ):
        with pytest.raises(BadHeader, match=message):
            Header.unpack(data)


KNOWN = bytes.fromhex(
    "4b41021f000102030405060708090a0b0c0d0e0f1011121314151617"  # KA, version 2, all flags, nonce
    "1304030000000100000102030405060708090a0b0c0d0e0f"  # Argon2 0x13, 4 lanes, 3 passes, 64 MiB, salt
    "040073656e7404007365616d"  # "sent", "seam"
    "030378da634b0000006e0067"  # a mask of 4 x 4
    "99865003f70c433001613aa798c3b4c61e9e0dcfc3625b8aabb9783db3c8e682"
)


def test_known_answer(key):
    """Committed bytes of version 2: files published today have to be read tomorrow."""
    pixels = torch.arange(48, dtype=torch.uint8).view(1, 3, 4, 4)
    (header,) = unseal([KNOWN], pixels, [key], authenticate=True)
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[:, 1:3, 1:3] = True
    assert same(
        header, Header(bytes(range(24)), mask, b"sent", b"seam", Recipe(bytes(range(16))), KNOWN[-32:], b"", None)
    )
    (packed,) = seal([header], pixels, [MasterKey(key.secret, header.recipe)], authenticate=True)
    assert packed[:66] == KNOWN[:66]  # then zlib, of which there are several


KNOWN_3 = bytes.fromhex(
    "4b41033f000102030405060708090a0b0c0d0e0f1011121314151617"  # KA, version 3, all flags, nonce
    "200078daab56ca4d2dc9c84f51b2aa564ace492c2e56b2528a50aaad0500686f0820"  # what the file says of itself
    "1304030000000100000102030405060708090a0b0c0d0e0f"  # Argon2 0x13, 4 lanes, 3 passes, 64 MiB, salt
    "040073656e7404007365616d0800726573696475616c"  # "sent", "seam", "residual"
    "030378da634b0000006e0067"  # a mask of 4 x 4
    "1ba4fd810ac6f3478b516771c17da5030bcc1ee873d40db94fb1b59dfc5cd164"
)


def test_known_answer_of_version_3(key):
    pixels = torch.arange(48, dtype=torch.uint8).view(1, 3, 4, 4)
    (header,) = unseal([KNOWN_3], pixels, [key], authenticate=True)
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[:, 1:3, 1:3] = True
    parts = (b"sent", b"seam", Recipe(bytes(range(16))), KNOWN_3[-32:], b"residual", b'{"method":{"class":"X"}}')
    assert same(header, Header(bytes(range(24)), mask, *parts))
    assert header.context == Context(bytes(range(24)), b'{"method":{"class":"X"}}')
    (packed,) = seal([header], pixels, [MasterKey(key.secret, header.recipe)], authenticate=True)
    assert same(replace(Header.unpack(packed), tag=b""), replace(header, tag=b""))


def test_the_tag_of_version_3_is_bound_to_what_the_file_says(key):
    """The construction spelled out with hmac (RFC 2104, RFC 5869); another description is another key of the tag."""
    nonce, body, told = bytes(range(24)), KNOWN_3[:-32], b'{"method":{"class":"X"}}'
    info = b"".join(len(part).to_bytes(8, "little") + part for part in (b"tag", nonce, told))
    subkey = hmac.digest(hmac.digest(b"keyanon/3", key.secret, "sha256"), info + b"\x01", "sha256")
    stream = Cipher(algorithms.ChaCha20(subkey, bytes(16)), mode=None).encryptor().update(bytes(32))
    sizes = [number.to_bytes(4, "little") for number in (len(body), 4, 4)]
    assert hmac.digest(stream, sizes[0] + body + sizes[1] + sizes[2] + bytes(range(48)), "sha256") == KNOWN_3[-32:]


def test_the_tag_is_hmac_of_header_and_pixels_under_a_key_of_its_own(key):
    """The construction spelled out with hmac (RFC 2104, RFC 5869)."""
    nonce, body = bytes(range(24)), KNOWN[:-32]
    subkey = hmac.digest(hmac.digest(nonce, key.secret, "sha256"), b"keyanon/1|tag\x01", "sha256")
    stream = Cipher(algorithms.ChaCha20(subkey, bytes(16)), mode=None).encryptor().update(bytes(32))
    sizes = [number.to_bytes(4, "little") for number in (len(body), 4, 4)]
    assert hmac.digest(stream, sizes[0] + body + sizes[1] + sizes[2] + bytes(range(48)), "sha256") == KNOWN[-32:]


def test_a_tag_accepts_only_its_key_its_header_and_its_pixels(key):
    pixels = torch.randint(0, 256, (2, 3, 8, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    headers = [Header(bytes(24)), Header(b"1" * 24, None, b"sent")]
    first, second = seal(headers, pixels, [key, key], authenticate=True)
    assert len(first) == FIXED + 2 + len(zlib.compress(b"{}", 9)) + TAG_BYTES
    assert unseal([first, second], pixels, [key, key], authenticate=True)[1].sent == b"sent"
    one = pixels.clone()
    one[1, 2, 7, 5] ^= 1
    turned = pixels.transpose(-1, -2).reshape(2, 3, 6, 8)
    for data, images, keys in (
        ([first, second], one, [key, key]),
        ([first, first], pixels, [key, key]),
        ([first, second], pixels, [key, key.with_bit_flipped(255)]),
    ):
        with pytest.raises(BadHeader, match=f"picture 2 of 2: this is {CHANGED}"):
            unseal(data, images, keys, authenticate=True)
        assert len(unseal(data, images, keys, authenticate=False)) == 2
    for images in (turned[:1], pixels[:1].reshape(1, 3, 6, 8)):
        with pytest.raises(BadHeader, match=f"^this is {CHANGED}"):
            unseal([first], images, [key], authenticate=True)


def test_the_tag_is_tied_to_the_whole_key_not_to_its_signs(key):
    (packed,) = seal([Header(bytes(24))], PIXELS, [key], authenticate=True)
    assert unseal([packed], PIXELS, [FlippedSigns(key, 1.0)], authenticate=True)
    with pytest.raises(BadHeader, match=CHANGED):
        unseal([packed], PIXELS, [experiment_key()], authenticate=True)


def test_a_tag_cannot_be_taken_off(key):
    """Who strips the tag and says so in the flags gets the message for tagless files, not a recovery."""
    (packed,) = seal([Header(bytes(24))], PIXELS, [key], authenticate=True)
    (tagless,) = seal([Header(bytes(24))], PIXELS, [key], authenticate=False)
    assert tagless == packed[:3] + b"\0" + packed[4:-TAG_BYTES]
    with pytest.raises(BadHeader, match="carries no tag"):
        unseal([tagless], PIXELS, [key], authenticate=True)


def test_a_passwords_recipe_travels(key):
    recipe = Recipe(b"0123456789abcdef")
    for authenticate in (True, False):
        (packed,) = seal([Header(bytes(24))], PIXELS, [replace(key, recipe=recipe)], authenticate)
        assert Header.unpack(packed).recipe == recipe
