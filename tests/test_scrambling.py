"""Scrambling moves bytes under a key: what stays, what the key brings back, and what is refused."""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from keyanon.attacks.views import NoKey
from keyanon.channel.description import described
from keyanon.channel.headers import BadHeader, Header, seal
from keyanon.channel.keys import MasterKey, Nobody
from keyanon.channel.nonces import OneForAll
from keyanon.channel.pixels import to_bytes, to_floats
from keyanon.channel.streams import orders
from keyanon.context import Context
from keyanon.methods.baselines.scrambling import Scrambling, cut, joined
from keyanon.types import Image, Mask, Published, Reversible
from tests.conftest import CentreFace

KEY, OTHER = MasterKey(bytes(32)), MasterKey(bytes(31) + b"\1")


@dataclass(frozen=True)
class Fixed:
    """Finds the cells that it is told."""

    cells: tuple[tuple[bool, ...], ...]

    def mask(self, images: Image, size: tuple[int, int]) -> Mask:
        cells = torch.tensor(self.cells)
        assert cells.shape == size
        return cells.expand(len(images), 1, *size)


def noise(*size: int, seed: int = 0) -> Image:
    levels = torch.randint(0, 256, size, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return to_floats(levels)


def published(method: Scrambling, images: Image, key: MasterKey = KEY):
    return method.anonymize(images, [key] * len(images), [f"id{i}" for i in range(len(images))])


def recovered(method: Scrambling, sent, key: MasterKey = KEY) -> torch.Tensor:
    return to_bytes(method.recover(sent, [key] * len(sent.images)))


MASKS = st.tuples(st.integers(1, 6), st.integers(1, 6)).flatmap(lambda size: arrays(bool, size))


@settings(deadline=None)
@given(MASKS, st.sampled_from([1, 2, 5]), st.booleans(), st.booleans(), st.integers(0, 99))
def test_the_key_brings_every_bit_back(cells, block, inside, negative, seed):
    method = Scrambling(Fixed(tuple(map(tuple, cells.tolist()))), block, inside, negative)
    images = noise(2, 3, *(block * n for n in cells.shape), seed=seed)
    sent = published(method, images)
    original = to_bytes(images)
    assert torch.equal(recovered(method, sent), original)
    face = torch.from_numpy(cells).repeat_interleave(block, 0).repeat_interleave(block, 1)
    assert torch.equal(sent.images[..., ~face], original[..., ~face])
    if not negative:
        before, after = (pixels[..., face].sort(-1).values for pixels in (original, sent.images))
        assert torch.equal(before, after)


def test_whole_blocks_move():
    images = noise(1, 3, 64, 64)
    before, after = (
        cut(pixels, 8)[0, 2:6, 2:6].reshape(16, -1)
        for pixels in (to_bytes(images), published(Scrambling(CentreFace()), images).images)
    )
    assert sorted(map(tuple, before.tolist())) == sorted(map(tuple, after.tolist()))
    assert not torch.equal(before, after)


def test_pixels_move_inside_their_block():
    images = noise(1, 3, 64, 64)
    before, after = (
        cut(pixels, 8)[0, 2:6, 2:6].reshape(16, 64, 3).tolist()
        for pixels in (to_bytes(images), published(Scrambling(CentreFace(), inside=True), images).images)
    )
    assert sorted(sorted(block) for block in before) == sorted(sorted(block) for block in after)
    assert not {str(block) for block in before} & {str(block) for block in after}


def test_about_half_of_the_blocks_are_inverted():
    images = noise(1, 3, 256, 256)
    before, after = (
        cut(pixels, 4)[0, 16:48, 16:48].reshape(1024, -1).tolist()
        for pixels in (to_bytes(images), published(Scrambling(CentreFace(), 4, negative=True), images).images)
    )
    plain = {tuple(block) for block in before}
    inverted = {tuple(255 - value for value in block) for block in before}
    kinds = [(tuple(block) in plain, tuple(block) in inverted) for block in after]
    assert set(kinds) == {(True, False), (False, True)}
    assert 400 < kinds.count((False, True)) < 624  # 512 ± 7 deviations


def test_orders_are_orders_and_hang_on_key_nonce_and_purpose():
    drawn = [
        orders(key, Context(nonce), purpose, 3, 50)
        for key, nonce, purpose in ((KEY, b"a", "p"), (OTHER, b"a", "p"), (KEY, b"b", "p"), (KEY, b"a", "q"))
    ]
    for order in drawn:
        assert torch.equal(order.sort(1).values, torch.arange(50).expand(3, 50))
    rows = [tuple(row) for order in drawn for row in order.tolist()]
    assert len(set(rows)) == len(rows)
    assert torch.equal(drawn[0], orders(KEY, Context(b"a"), "p", 3, 50))


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_cutting_and_joining_are_inverse(rows, columns, block):
    pixels = to_bytes(noise(2, 3, rows * block, columns * block))
    assert torch.equal(joined(cut(pixels, block), block), pixels)
    first = cut(pixels, block)[0, -1, -1].T.reshape(3, block, block)
    assert torch.equal(first, pixels[0, :, -block:, -block:])


def test_a_wrong_key_is_refused_or_gives_something_else():
    images = noise(2, 3, 64, 64)
    tagged, plain = Scrambling(CentreFace()), Scrambling(CentreFace(), authenticate=False)
    with pytest.raises(BadHeader, match="picture 1 of 2: this is not the picture's key"):
        recovered(tagged, published(tagged, images), OTHER)
    wrong = recovered(plain, published(plain, images), OTHER)
    assert (wrong != to_bytes(images))[..., 16:48, 16:48].float().mean() > 0.8
    assert torch.equal(wrong[..., :16, :], to_bytes(images)[..., :16, :])


def test_without_a_key_the_scrambled_picture_is_all_there_is():
    method = Scrambling(CentreFace())
    sent = published(method, noise(2, 3, 64, 64))
    assert torch.equal(to_bytes(NoKey()(sent, [Nobody()] * 2, method)), sent.images)


def test_a_changed_picture_is_refused_or_comes_back_but_for_the_change():
    images = noise(1, 3, 64, 64)
    method = Scrambling(CentreFace())
    sent = published(method, images)
    changed = sent.images.clone()
    changed[0, 0, 30, 30] ^= 1
    with pytest.raises(BadHeader, match="changed after publishing"):
        recovered(method, replace(sent, images=changed))
    back = recovered(replace(method, authenticate=False), replace(sent, images=changed))
    assert (back != to_bytes(images)).sum() == 1


def test_pictures_are_scrambled_apart_unless_they_share_a_nonce():
    twice = noise(1, 3, 64, 64).expand(2, -1, -1, -1)
    apart, alike = (
        published(method, twice).images
        for method in (Scrambling(CentreFace()), Scrambling(CentreFace(), nonces=OneForAll()))
    )
    assert not torch.equal(apart[0], apart[1])
    assert torch.equal(alike[0], alike[1])
    assert torch.equal(published(Scrambling(CentreFace()), twice[1:]).images[0], apart[0])  # its batch does not matter


def test_a_picture_without_a_face_stays_as_it_is():
    images = torch.full((1, 3, 64, 64), -1.0)
    method = Scrambling(CentreFace(), inside=True, negative=True)
    sent = published(method, images)
    assert torch.equal(sent.images, to_bytes(images))
    assert torch.equal(recovered(method, sent), sent.images)


def test_files_of_other_methods_are_refused():
    pixels = to_bytes(noise(1, 3, 64, 64))
    method = Scrambling(CentreFace())
    ours = described(method)
    for header in (
        Header(bytes(24), description=None),
        Header(bytes(24), torch.ones(1, 16, 16, dtype=torch.bool), description=ours),
    ):
        with pytest.raises(BadHeader, match="no mask of the 8x8 blocks"):
            method.recover(Published(pixels, seal([header], pixels, [KEY], authenticate=True)), [KEY])


@pytest.mark.parametrize(("size", "block"), [((60, 64), 8), ((64, 60), 8), ((16, 272), 1)])
def test_pictures_that_are_no_whole_number_of_blocks_are_refused(size, block):
    with pytest.raises(ValueError, match=f"anonymizer.block={block}.*{size[0]}x{size[1]}"):
        published(Scrambling(CentreFace(), block), noise(1, 3, *size))


def test_what_it_is():
    method = Scrambling(CentreFace())
    assert isinstance(method, Reversible)
    assert method.about.kind == "keyed"
    sent = published(method, noise(1, 3, 64, 64))
    assert torch.equal(to_bytes(sent.floats), sent.images)
