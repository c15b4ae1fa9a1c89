"""The encrypted crop: exact with the key, nothing without it, and honest about its size."""

import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from keyanon.attacks.views import NoKey
from keyanon.channel.description import described
from keyanon.channel.headers import MAX_PARTS, BadHeader, Header, seal
from keyanon.channel.keys import MasterKey, Nobody
from keyanon.channel.nonces import OneForAll
from keyanon.channel.pixels import from_pil, jpeg, read_png, to_bytes, to_floats, write_png
from keyanon.measures.scorers import psnr_face
from keyanon.methods.baselines.classical import GaussianBlur, Obfuscation, Pixelate
from keyanon.methods.baselines.controls import Blackout, Identity
from keyanon.methods.baselines.encrypted_crop import EncryptedCrop, packed, with_crop
from keyanon.methods.baselines.scrambling import Scrambling
from keyanon.types import About, Image, Key, Published, Reversible
from tests.conftest import ROOT, CentreFace, smooth_picture

KEY, OTHER = MasterKey(bytes(32)), MasterKey(bytes(31) + b"\1")
BLURRED = Obfuscation(GaussianBlur(), CentreFace())
METHOD = EncryptedCrop(BLURRED)


def faces(n: int = 1, size: int = 64) -> Image:
    return torch.stack([from_pil(smooth_picture(seed, size)) for seed in range(n)])


def noise(*size: int) -> Image:
    return to_floats(torch.randint(0, 256, size, generator=torch.Generator().manual_seed(0), dtype=torch.uint8))


def published(method: EncryptedCrop, images: Image) -> Published:
    return method.anonymize(images, [KEY] * len(images), [f"id{i}" for i in range(len(images))])


def recovered(method: EncryptedCrop, sent: Published, key: Key = KEY) -> torch.Tensor:
    return to_bytes(method.recover(sent, [key] * len(sent.images)))


def sent_bytes(sent: Published) -> list[bytes]:
    return [Header.unpack(header).sent for header in sent.headers]


@pytest.mark.parametrize("images", [faces(2), noise(2, 3, 40, 64)], ids=["smooth", "noise"])
def test_every_bit_comes_back_from_the_file(images, tmp_path: Path):
    sent = published(METHOD, images)
    assert torch.equal(sent.images, BLURRED.anonymize(images, [KEY] * 2, ["id0", "id1"]).images)
    assert not torch.equal(sent.images, to_bytes(images))
    for i in range(2):
        write_png(tmp_path / f"{i}.png", sent.images[i], sent.headers[i])
    pixels, headers = zip(*(read_png(tmp_path / f"{i}.png") for i in range(2)), strict=True)
    assert torch.equal(recovered(METHOD, Published(torch.stack(pixels), headers)), to_bytes(images))


@settings(deadline=None)
@given(st.tuples(st.integers(1, 12), st.integers(1, 12)).flatmap(lambda size: arrays(bool, size)))
def test_crops_of_every_shape(mask):
    cells = torch.from_numpy(mask)
    original = to_bytes(noise(3, *mask.shape))
    shown = torch.where(cells, original ^ 1, original)
    crop = packed(original, shown, None)
    assert torch.equal(with_crop(shown, crop), original)
    assert (crop == b"") == (not mask.any())
    # only what was changed is in it
    assert torch.equal(with_crop(torch.zeros_like(original), crop), original.where(cells, 0))


@dataclass(frozen=True)
class Dyed:
    """Another visible method: one colour channel of the whole picture."""

    about = About.irreversible("-", "-", "this test")

    def anonymize(self, images: Image, keys, ids) -> Published:
        out = to_bytes(images)
        out[:, 1] = 0
        return Published(out, (b"",) * len(ids))


@pytest.mark.parametrize(
    "visible", [Dyed(), Obfuscation(Blackout(), CentreFace()), Identity(), Scrambling(CentreFace())]
)
def test_any_method_can_be_the_visible_one(visible):
    images = faces(2)
    method = EncryptedCrop(visible)
    assert torch.equal(recovered(method, published(method, images)), to_bytes(images))


def test_a_lossy_crop_is_smaller_and_close():
    images = faces(1, 128)
    lossy = EncryptedCrop(BLURRED, quality=90)
    sent = published(lossy, images)
    back = recovered(lossy, sent)
    face = CentreFace().mask(images, (128, 128))
    assert torch.equal(back.where(~face, 0), to_bytes(images).where(~face, 0))
    assert psnr_face(to_floats(back), images, face) > 35
    sizes = [
        len(header[0]) for header in (published(EncryptedCrop(BLURRED, q), images).headers for q in (None, 90, 50))
    ]
    assert sizes[0] > sizes[1] > sizes[2]


def test_a_wrong_key_is_refused_or_leaves_the_picture_as_it_is():
    images = faces(2)
    sent = published(METHOD, images)
    with pytest.raises(BadHeader, match="picture 1 of 2: this is not the picture's key"):
        recovered(METHOD, sent, OTHER)
    with pytest.raises(BadHeader, match="not the picture's key"):
        recovered(METHOD, sent, KEY.with_bit_flipped(77))
    tagless = replace(METHOD, authenticate=False)
    for tagged in (sent, published(tagless, images)):
        assert torch.equal(recovered(tagless, tagged, OTHER), sent.images)
        assert torch.equal(recovered(tagless, tagged), to_bytes(images))


def test_without_a_key_the_visible_picture_is_all_there_is():
    sent = published(METHOD, faces(2))
    assert torch.equal(to_bytes(NoKey()(sent, [Nobody()] * 2, METHOD)), sent.images)


@pytest.mark.parametrize("place", [5, 30, 45, 200, -1])
def test_a_changed_header_is_refused(place):
    sent = published(METHOD, faces())
    header = bytearray(sent.headers[0])
    header[place] ^= 1
    changed = replace(sent, headers=(bytes(header),))
    with pytest.raises(BadHeader):
        recovered(METHOD, changed)
    # without the tag the cipher still notices: nonce, vector and crop
    if place != -1:
        tagless = replace(METHOD, authenticate=False)
        try:
            assert torch.equal(recovered(tagless, changed), sent.images)
        except BadHeader as error:
            assert "damaged" in str(error)  # the length in front of the crop


def test_a_changed_picture_is_refused_and_its_face_comes_back_without_the_tag():
    images = faces()
    sent = published(METHOD, images)
    damaged = replace(sent, images=jpeg(sent.images[0], 50)[None])
    with pytest.raises(BadHeader, match="changed after publishing"):
        recovered(METHOD, damaged)
    back = recovered(replace(METHOD, authenticate=False), damaged)
    changed = (sent.images != to_bytes(images)).any(1, keepdim=True)
    assert torch.equal(back.where(changed, 0), to_bytes(images).where(changed, 0))
    smaller = replace(sent, images=sent.images[..., :32, :32])
    with pytest.raises(BadHeader, match="reaches beyond the picture"):
        recovered(replace(METHOD, authenticate=False), smaller)


def test_files_of_other_methods_are_refused():
    pixels = to_bytes(faces())
    ours = described(METHOD)
    for header, message in (
        (Header(bytes(24)), "another method: which it does not name, not"),
        (Header(bytes(24), description=None), "no encrypted face"),
        (Header(bytes(24), sent=bytes(99), description=ours), "no encrypted face"),
    ):
        with pytest.raises(BadHeader, match=message):
            METHOD.recover(Published(pixels, seal([header], pixels, [KEY], authenticate=True)), [KEY])


def test_the_header_shows_nothing_but_a_size():
    images = faces(1, 128).expand(2, -1, -1, -1)
    original = to_bytes(images[0])
    sent = published(METHOD, images)
    plain = packed(original, sent.images[0], None)
    first, second = sent_bytes(sent)
    assert len(first) == len(second) == len(plain) + 12 + 16
    # the same face under two nonces: what two random strings have in common
    assert (
        sum(a == b for a, b in zip(first[12:], second[12:], strict=True))
        < len(first) / 256 + 6 * (len(first) / 256) ** 0.5
    )
    assert b"RIFF" in plain
    assert b"RIFF" not in first
    assert len(zlib.compress(first, 9)) >= len(first)
    assert published(METHOD, images[1:]).headers[0] == sent.headers[0]  # its batch does not matter


def test_a_shared_nonce_shares_no_key_stream():
    method = EncryptedCrop(BLURRED, nonces=OneForAll())
    images = noise(2, 3, 32, 32)
    sent = published(method, images)
    first, second = sent_bytes(sent)
    assert first[:12] != second[:12]
    plain = [packed(a, b, None) for a, b in zip(to_bytes(images), sent.images, strict=True)]
    n = min(map(len, plain))
    ciphers = bytes(a ^ b for a, b in zip(first[12 : 12 + n], second[12 : 12 + n], strict=True))
    assert ciphers != bytes(a ^ b for a, b in zip(plain[0][:n], plain[1][:n], strict=True))
    assert torch.equal(recovered(method, sent), to_bytes(images))


def test_a_picture_without_a_face_stays_as_it_is():
    images = torch.full((1, 3, 64, 64), -1.0)
    sent = published(METHOD, images)
    assert torch.equal(sent.images, to_bytes(images))
    assert len(sent_bytes(sent)[0]) == 28
    assert torch.equal(recovered(METHOD, sent), sent.images)


def test_a_crop_that_no_header_holds_is_refused():
    images = noise(1, 3, 320, 320)
    with pytest.raises(
        ValueError, match=rf"id0: its encrypted face has \d+ bytes, a header has room for {MAX_PARTS}.*quality"
    ):
        published(METHOD, images)
    fits = EncryptedCrop(Obfuscation(Pixelate(), CentreFace()), quality=10)
    assert len(published(fits, images).headers[0]) < MAX_PARTS


def test_a_quality_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="quality=101: expected a whole number from 0 to 100 or null"):
        EncryptedCrop(BLURRED, quality=101)


def test_what_it_is():
    assert isinstance(METHOD, Reversible)
    assert METHOD.about.kind == "keyed"
    sent = published(METHOD, faces())
    assert torch.equal(to_bytes(sent.floats), sent.images)


def test_the_visible_method_is_chosen_by_name():
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        overrides = ["anonymizer=encrypted_crop", "anonymizer@anonymizer.visible=blackout", "parser=ellipse"]
        method = instantiate(compose("config", overrides=overrides).anonymizer, _convert_="all")
    assert method.visible.filter == Blackout()
    assert torch.equal(recovered(method, published(method, faces())), to_bytes(faces()))
