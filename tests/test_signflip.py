"""Sign flip and attacks on a tiny real model: what must hold whatever the weights are."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch.nn.functional import adaptive_max_pool2d

from keyanon.attacks.views import FloatChannel, Jpeg, NearKey, NoKey, PartialKey, WrongKey, without_authentication
from keyanon.channel.headers import BadHeader, Header, seal
from keyanon.channel.keys import BadKey, Nobody, Recipe, experiment_key
from keyanon.channel.nonces import OneForAll
from keyanon.channel.pixels import from_pil, jpeg, to_bytes, to_floats
from keyanon.context import Context
from keyanon.diffusion.model import LatentDiffusion
from keyanon.diffusion.solvers import DDIM, Known
from keyanon.methods.signflip import SignFlip
from keyanon.methods.transforms import NoiseFlipping, Permutation
from keyanon.types import Published, Reversible, RunsWithoutKey
from tests.conftest import LDM_NOISE, CentreFace, smooth_picture

IDS = ["a", "b", "c"]


@pytest.fixture(scope="module")
def method(tiny_ldm) -> SignFlip:
    return SignFlip(LatentDiffusion(str(tiny_ldm), noise=LDM_NOISE), DDIM(4), CentreFace())


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    return torch.stack([from_pil(smooth_picture(seed)) for seed in range(3)])


@pytest.fixture(scope="module")
def published(method, pictures) -> Published:
    return method.anonymize(pictures, [experiment_key()] * 3, IDS)


def test_contract(method, pictures, published):
    assert isinstance(method, Reversible)
    assert published.images.shape == pictures.shape
    assert published.images.dtype == torch.uint8
    assert len(set(published.headers)) == 3
    assert published.floats is not None
    torch.testing.assert_close(to_bytes(published.floats), published.images)


def test_a_picture_does_not_depend_on_its_batch(method, pictures, published):
    for i, id in enumerate(IDS):
        alone = method.anonymize(pictures[i : i + 1], [experiment_key()], [id])
        assert Header.unpack(alone.headers[0]).nonce == Header.unpack(published.headers[i]).nonce
        assert (alone.images[0].int() - published.images[i].int()).abs().max() <= 1


def test_each_picture_gets_its_own_key(method, pictures):
    keys = [experiment_key(0), experiment_key(1), experiment_key(0)]
    mixed, same = method.anonymize(pictures, keys, IDS), method.anonymize(pictures, [keys[0]] * 3, IDS)
    assert torch.equal(mixed.images[0], same.images[0])
    assert not torch.equal(mixed.images[1], same.images[1])


def test_flipping_twice_is_no_flip(method, pictures):
    """Recovery is the same map: with the flip undone before sampling, what is left is plain inversion and sampling."""
    backbone, solver = method.backbone, method.solver
    z0 = backbone.encode(pictures)
    path = solver.invert(backbone.eps, backbone.schedule, z0)
    plain = backbone.decode(solver.sample(backbone.eps, backbone.schedule, path[-1]))
    no_face = torch.zeros(3, 1, 16, 16, dtype=torch.bool)
    without = replace(method, reinject=False)
    torch.testing.assert_close(without.flip(pictures, no_face, [experiment_key()] * 3, [Context(bytes(24))] * 3), plain)


def test_background_comes_back_where_it_is_reinjected(method, pictures):
    """With an empty mask every level is the picture's own path, so the result is D(E(x)) exactly."""
    no_face = torch.zeros(3, 1, 16, 16, dtype=torch.bool)
    out = method.flip(pictures, no_face, [experiment_key()] * 3, [Context(bytes(24))] * 3)
    torch.testing.assert_close(out, method.backbone.decode(method.backbone.encode(pictures)))


def test_mask_travels_in_the_header_when_asked(method, pictures):
    sender = replace(method, mask_at_recovery="header")
    published = sender.anonymize(pictures, [experiment_key()] * 3, IDS)
    mask = Header.unpack(published.headers[0]).mask
    assert mask is not None
    assert torch.equal(mask, CentreFace().mask(pictures[:1], (16, 16))[0])
    assert sender.recover(published, [experiment_key()] * 3).shape == pictures.shape
    keys = [experiment_key()] * 3
    headers = [replace(Header.unpack(header), mask=None) for header in published.headers]
    without = replace(published, headers=seal(headers, published.images, keys, authenticate=True))
    with pytest.raises(BadHeader, match="no face mask"):
        sender.recover(without, keys)
    with pytest.raises(BadHeader, match='picture 1 of 3: .*mask_at_recovery="header", here "reparsed"'):
        method.recover(published, keys)


def test_stripped_header_is_refused(method, published):
    with pytest.raises(BadHeader, match="no keyanon header"):
        method.recover(replace(published, headers=(b"",) * 3), [experiment_key()] * 3)


def test_nothing_is_computed_for_a_wrong_key_or_a_changed_picture(method, published):
    keys, images = [experiment_key()] * 3, published.images.clone()
    images[1, 0, 5, 5] ^= 1
    changed = replace(published, images=images)
    mixed = replace(published, headers=(published.headers[0], published.headers[2], published.headers[2]))
    before = method.backbone.evaluations.total()
    for files, held in ((published, [keys[0], experiment_key(1), keys[2]]), (changed, keys), (mixed, keys)):
        with pytest.raises(BadHeader, match="picture 2 of 3: .* cannot tell which"):
            method.recover(files, held)
    assert method.backbone.evaluations.total() == before
    assert without_authentication(method).recover(changed, keys).shape == images.shape


def test_tagless_pictures_come_back_to_who_does_not_ask_for_tags(method, pictures, published):
    keys, tagless = [experiment_key()] * 3, replace(method, authenticate=False)
    without = tagless.anonymize(pictures, keys, IDS)
    assert [len(header) for header in without.headers] == [len(without.headers[0])] * 3
    with pytest.raises(BadHeader, match="picture 1 of 3: the header carries no tag"):
        method.recover(without, keys)
    recovered = method.recover(published, keys)
    torch.testing.assert_close(tagless.recover(without, keys), recovered)
    wrong = tagless.recover(without, [experiment_key(1)] * 3)
    assert not torch.equal(wrong, recovered)


def test_a_receiver_with_the_file_and_the_password_alone(method, pictures):
    key = Recipe(bytes(16)).derive("open sesame")
    published = method.anonymize(pictures[:1], [key], ["a"])
    recipe = Header.unpack(published.headers[0]).recipe
    assert recipe is not None
    received = method.recover(published, [recipe.derive("open sesame")])
    torch.testing.assert_close(received, method.recover(published, [key]))
    with pytest.raises(BadHeader, match="not the picture's key"):
        method.recover(published, [recipe.derive("open barley")])


def test_pictures_share_a_key_stream_where_they_are_told_to(method, pictures):
    shared = replace(method, nonces=OneForAll()).anonymize(pictures, [experiment_key()] * 3, IDS)
    assert len({Header.unpack(header).nonce for header in shared.headers}) == 1


def test_attacks_are_what_they_say(method, published):
    keys = [experiment_key()] * 3
    recovered, insisting = method.recover(published, keys), without_authentication(method)
    torch.testing.assert_close(PartialKey(0.0)(published, keys, method), recovered)
    assert published.floats is not None
    as_float = insisting.recover_floats(published, keys, published.floats, to_floats(published.images))
    torch.testing.assert_close(FloatChannel()(published, keys, method), as_float)
    assert not torch.equal(as_float, recovered)
    near = [key.with_bit_flipped() for key in keys]
    torch.testing.assert_close(NearKey()(published, keys, method), insisting.recover(published, near))
    for attack in (WrongKey(), WrongKey(1), NearKey(), PartialKey(0.5), Jpeg(50)):
        assert not torch.equal(attack(published, keys, method), recovered)
    assert not torch.equal(WrongKey()(published, keys, method), WrongKey(1)(published, keys, method))


@dataclass(frozen=True)
class Beyond:
    """Finds "the face" where a picture is brighter than white: on unclipped floats alone."""

    def mask(self, images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        return adaptive_max_pool2d(images.amax(1, keepdim=True), size) > 1


def test_the_face_is_looked_for_where_the_protocol_says(method, pictures):
    """On which pictures a mask is found, of which only the floats show one: it decides what comes back, and nothing else does."""
    keys, blind = [experiment_key()] * 3, without_authentication(replace(method, parser=Beyond()))
    published = blind.anonymize(pictures, keys, IDS)
    floats = to_floats(published.images)
    floats[:, :, :32] += 2
    sent = replace(published, floats=floats)
    damaged = torch.stack([jpeg(picture, 75) for picture in sent.images])
    face, no_face = Beyond().mask(floats, (16, 16)), torch.zeros(3, 1, 16, 16, dtype=torch.bool)
    contexts = [Header.unpack(header).context for header in sent.headers]

    def expected(images, mask, using=keys):
        return blind.flip(images, mask, using, contexts)

    near = [key.with_bit_flipped() for key in keys]
    for attack, result in (
        (FloatChannel(), expected(floats, no_face)),
        (FloatChannel("floats"), expected(floats, face)),
        (NearKey(channel="floats"), expected(floats, no_face, near)),
        (NearKey(channel="floats", mask="floats"), expected(floats, face, near)),
        (Jpeg(75), expected(to_floats(damaged), no_face)),
        (Jpeg(75, "floats"), expected(to_floats(damaged), face)),
    ):
        torch.testing.assert_close(attack(sent, keys, blind), result)
    on_file, on_floats, with_theirs = (
        WrongKey(channel=channel, mask=mask)(sent, keys, blind)
        for channel, mask in (("file", "floats"), ("floats", "file"), ("floats", "floats"))
    )
    torch.testing.assert_close(on_file, WrongKey()(sent, keys, blind))  # its face is the file's in any case
    assert not torch.allclose(on_floats, on_file)
    assert not torch.allclose(with_theirs, on_floats)


@pytest.mark.parametrize(
    ("attack", "reads"),
    [
        (WrongKey(), False),
        (WrongKey(channel="floats"), True),
        (NearKey(mask="floats"), False),
        (NearKey(channel="floats"), True),
        (Jpeg(50), False),
        (Jpeg(50, "floats"), True),
        (FloatChannel(), True),
    ],
)
def test_who_reads_floats_says_so_and_misses_them(method, published, attack, reads):
    assert attack.reads_floats == reads
    as_file = replace(published, floats=None)
    if reads:
        with pytest.raises(ValueError, match=r"publishes no floats: .* protocol\.channel=file"):
            attack(as_file, [experiment_key()] * 3, method)
    else:
        assert attack(as_file, [experiment_key()] * 3, method).shape == published.images.shape


def test_a_channel_that_is_none_is_refused():
    with pytest.raises(ValueError, match="channel"):
        WrongKey(channel="tape")
    with pytest.raises(ValueError, match="mask"):
        Jpeg(50, "published")


def test_without_a_key_the_picture_is_inverted_and_denoised_as_it_is(method, published):
    """All signs +1: plain inversion and sampling, which is not the recovery; and no key is asked for anything."""
    backbone, solver, floats = method.backbone, method.solver, to_floats(published.images)
    path = solver.invert(backbone.eps, backbone.schedule, backbone.encode(floats))
    mask = method.parser.mask(floats, backbone.latent_size(floats))
    plain = solver.sample(backbone.eps, backbone.schedule, path[-1], Known(mask, path))
    assert isinstance(method, RunsWithoutKey)
    seen = NoKey()(published, [Nobody()] * 3, method)
    torch.testing.assert_close(seen, backbone.decode(plain))
    assert not torch.equal(seen, method.recover(published, [experiment_key()] * 3))


def test_who_draws_from_nobody_s_key_is_told():
    with pytest.raises(BadKey, match="no key here to draw signs from"):
        Nobody().stream(Context(bytes(24)), "signs", 8)


def test_a_noise_flip_of_nothing_is_no_key(method, pictures, published):
    keys = [experiment_key()] * 3
    flipping = replace(method, transform=NoiseFlipping(0.0))
    headers = [Header.unpack(header) for header in published.headers]
    torch.testing.assert_close(
        flipping.receive(to_floats(published.images), headers, keys), method.without_key(published)
    )
    some = replace(method, transform=NoiseFlipping(0.3))
    sent = some.anonymize(pictures, keys, IDS)
    assert not torch.equal(sent.images, published.images)
    assert not torch.equal(WrongKey()(sent, keys, some), some.recover(sent, keys))


def test_only_a_transform_that_undoes_itself_will_do(method):
    with pytest.raises(ValueError, match=r"Permutation\(\) is not its own inverse; take one of SignFlipping, "):
        replace(method, transform=Permutation())
