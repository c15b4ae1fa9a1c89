"""Keyed transforms: inverses, what they preserve, what they hide, and what their headers carry."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.fft import dct
from scipy.stats import kstest

from keyanon.channel.headers import BadHeader
from keyanon.channel.keys import MasterKey, experiment_key
from keyanon.channel.streams import orders
from keyanon.context import Context
from keyanon.methods.transforms import (
    BandRotation,
    DctSignFlipping,
    NoiseFlipping,
    Permutation,
    SignFlipping,
    Unchanged,
    ciphered,
    coded,
    decoded,
    rotations,
)

CONTEXTS = [Context(bytes([i]) * 24) for i in range(2)]
KEYS = [experiment_key()] * 2
ISOMETRIES = [SignFlipping(), NoiseFlipping(0.5), Permutation(), DctSignFlipping()]
TRANSFORMS = [*ISOMETRIES, BandRotation()]


@pytest.fixture
def noise():
    generator = torch.Generator().manual_seed(0)
    zT = torch.randn(2, 5, 8, 8, generator=generator) * torch.tensor([0.5, 0.9, 1.0, 1.3, 2.0]).view(1, 5, 1, 1)
    mask = torch.zeros(2, 1, 8, 8, dtype=torch.bool)
    mask[0, :, 2:6, 1:7] = True
    mask[1, :, :5] = True
    return zT, mask


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_undoing_gives_the_noise_back_and_leaves_the_rest_alone(transform, noise):
    zT, mask = noise
    turned, sent = transform.apply(zT, mask, KEYS, CONTEXTS)
    outside = ~mask.expand_as(zT)
    assert torch.equal(turned[outside], zT[outside])
    assert (turned - zT)[mask.expand_as(zT)].abs().mean() > 0.3
    torch.testing.assert_close(transform.undo(turned, mask, KEYS, CONTEXTS, sent), zT, atol=2e-6, rtol=0)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_picture_does_not_depend_on_its_batch(transform, noise):
    zT, mask = noise
    turned, sent = transform.apply(zT, mask, KEYS, CONTEXTS)
    alone, sent_alone = transform.apply(zT[1:], mask[1:], KEYS[1:], CONTEXTS[1:])
    assert torch.equal(alone, turned[1:])
    assert sent_alone == sent[1:]


@given(st.binary(min_size=32, max_size=32), st.integers(0, 2**32 - 1), st.sets(st.integers(0, 35), max_size=36))
def test_every_transform_inverts_under_any_key_on_any_mask(secret, seed, inside):
    generator = torch.Generator().manual_seed(seed)
    zT = torch.randn(1, 3, 6, 6, generator=generator)
    mask = torch.zeros(36, dtype=torch.bool)
    mask[list(inside)] = True
    arguments = (mask.view(1, 1, 6, 6), [MasterKey(secret)], CONTEXTS[:1])
    for transform in ISOMETRIES:
        turned, sent = transform.apply(zT, *arguments)
        torch.testing.assert_close(transform.undo(turned, *arguments, sent), zT, atol=1e-5, rtol=0)


@pytest.mark.parametrize("transform", ISOMETRIES)
def test_given_the_key_a_transform_is_an_orthogonal_map_of_each_channel(transform):
    """Orthogonal maps, and no others, leave N(0, I) as it is."""
    d, mask = 24, torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    mask[0, 0, 1:5, 1:7] = True
    columns = []
    for i in range(d):
        unit = torch.zeros(1, 2, 8, 8, dtype=torch.float64)
        unit[:, :, mask[0, 0]] = torch.eye(d, dtype=torch.float64)[i]
        columns.append(transform.apply(unit, mask, KEYS[:1], CONTEXTS[:1])[0][0, :, mask[0, 0]])
    q = torch.stack(columns, dim=-1)  # channels, to, from
    torch.testing.assert_close(q @ q.mT, torch.eye(d, dtype=torch.float64).expand(2, d, d), atol=1e-12, rtol=0)
    assert not torch.equal(q[0], q[1])


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_standard_normal_noise_stays_so(transform):
    """Its entries, and sums of neighbours, which tell of dependence. One in 1,000 right ones fails; a shift by 0.1 always does.

    Over 30 seeds the p-values of the rotation, which is normal but for its norm, were as uniform as those of the others.
    """
    n, mask = 40, torch.ones(40, 1, 8, 8, dtype=torch.bool)
    zT = torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    keys, nonces = [experiment_key(i) for i in range(n)], [Context(bytes(24))] * n
    turned, _ = transform.apply(zT, mask, keys, nonces)
    assert kstest(turned.flatten().numpy(), "norm").pvalue > 1e-3
    assert kstest(((turned[..., 1::2] + turned[..., ::2]) / 2**0.5).flatten().numpy(), "norm").pvalue > 1e-3
    assert kstest((turned + 0.1).flatten().numpy(), "norm").pvalue < 1e-6


def test_orders_are_uniform():
    """Each cell comes to each place equally often, and no order of three is preferred."""
    found = torch.cat([orders(experiment_key(i), Context(bytes(24)), "permutation", 300, 3) for i in range(20)])
    assert torch.equal(found.sort(1).values, torch.arange(3).expand(6000, 3))
    counts = torch.bincount(found[:, 0] * 3 + found[:, 1], minlength=9)
    assert counts[[0, 4, 8]].tolist() == [0, 0, 0]
    expected = counts[[1, 2, 3, 5, 6, 7]]
    assert (expected - 1000).square().sum() / 1000 < 20.5  # chi-squared of 5 degrees, p = 0.001


@pytest.mark.parametrize("share", [0.0, 0.05, 0.3, 1.0])
def test_a_noise_flip_negates_its_share_and_undoes_itself(share):
    zT = torch.randn(2, 3, 100, 100, generator=torch.Generator().manual_seed(3))
    everywhere = torch.ones(2, 1, 100, 100, dtype=torch.bool)
    flip = NoiseFlipping(share)
    turned, sent = flip.apply(zT, everywhere, KEYS, CONTEXTS)
    assert sent == [b"", b""]
    assert torch.equal(turned.abs(), zT.abs())
    negated = turned != zT
    deviation = (share * (1 - share) / zT[0].numel()) ** 0.5
    for picture in negated:
        assert abs(picture.double().mean().item() - share) <= 5 * deviation
    assert torch.equal(flip.apply(turned, everywhere, KEYS, CONTEXTS)[0], zT)
    if 0 < share < 1:
        assert not torch.equal(negated[0], negated[1])
        other = flip.apply(zT, everywhere, [experiment_key(1)] * 2, CONTEXTS)[0] != zT
        common = (negated & other).double().mean().item()
        assert common == pytest.approx(share**2, abs=0.01)


def test_a_noise_flip_of_more_than_everything_is_refused():
    with pytest.raises(ValueError, match="share=5: expected a number from 0 to 1"):
        NoiseFlipping(5)


def test_nothing_changes_without_a_transform(noise):
    zT, mask = noise
    nothing, sent = Unchanged().apply(zT, mask, KEYS, CONTEXTS)
    assert torch.equal(nothing, zT)
    assert torch.equal(Unchanged().undo(zT, mask, KEYS, CONTEXTS, sent), zT)


def test_what_each_transform_leaks(noise):
    """What its docstring says is there under any key, to the last bit that rounding leaves."""
    zT, mask = noise
    face = mask[0, 0]

    def seen(transform, i):
        return transform.apply(zT, mask, [experiment_key(i)] * 2, CONTEXTS)[0][0, :, face]

    def spectrum(z):
        return torch.from_numpy(dct(z.double().numpy(), norm="ortho")).abs()

    leaks = {"magnitudes": torch.abs, "values": lambda z: z.sort(1).values, "spectrum": spectrum}
    owners = {SignFlipping(): "magnitudes", Permutation(): "values", DctSignFlipping(): "spectrum"}
    for transform, leak in owners.items():
        for name, feature in leaks.items():
            a, b = (feature(seen(transform, i)) for i in (1, 2))
            assert torch.allclose(a, b, atol=1e-5) == (name == leak)
    for feature in leaks.values():
        a, b = (feature(seen(BandRotation(), i)) for i in (1, 2))
        assert not torch.allclose(a, b, atol=1e-2)


def test_rotated_channels_have_the_norm_of_noise(noise):
    zT, mask = noise
    turned, sent = BandRotation().apply(zT, mask, KEYS, CONTEXTS)
    for z, cells, code in zip(turned, mask[:, 0], sent, strict=True):
        assert len(code) == 6 * 5
        torch.testing.assert_close(z[:, cells].square().mean(1).sqrt(), torch.ones(5), atol=5e-7, rtol=0)


def test_rotations_are_orthogonal_and_haar():
    """Their traces have variance 1, and their entries that of a coordinate on the sphere."""
    q = torch.cat([rotations(experiment_key(i), Context(bytes(24)), 50, 8) for i in range(20)])
    torch.testing.assert_close(q.mT @ q, torch.eye(8, dtype=torch.float64).expand(1000, 8, 8), atol=1e-12, rtol=0)
    trace = q.diagonal(dim1=1, dim2=2).sum(1)
    assert abs(trace.mean().item()) < 0.12
    assert abs(trace.var().item() - 1) < 0.2
    # (1 + q_11) / 2 ~ Beta((d-1)/2, (d-1)/2)
    assert kstest(((1 + q[:, 0, 0]) / 2).numpy(), "beta", (3.5, 3.5)).pvalue > 1e-3


def test_the_turned_noise_says_nothing_of_magnitudes(noise):
    """|z| of two keys is as alike as chance has it, where flipped signs keep it whole."""
    zT, mask = noise
    inside = mask.expand_as(zT)
    zT = zT * torch.linspace(0.2, 2, 8)  # magnitudes with a layout

    def likeness(transform):
        a, b = (transform.apply(zT, mask, [experiment_key(i)] * 2, CONTEXTS)[0][inside].abs() for i in (1, 2))
        return torch.corrcoef(torch.stack([a, b]))[0, 1].item()

    assert likeness(SignFlipping()) == pytest.approx(1)
    assert abs(likeness(BandRotation())) < 0.15


@given(st.lists(st.floats(0.35, 2.8), min_size=1, max_size=30))
def test_norms_survive_their_code(norms):
    there = decoded(coded(torch.tensor(norms, dtype=torch.float64)))
    torch.testing.assert_close(there, torch.tensor(norms, dtype=torch.float64), rtol=5e-3, atol=0)


@given(st.lists(st.floats(0, 1e30), min_size=1, max_size=4))
def test_no_norm_breaks_the_code(norms):
    """Divided out to 2e-7 between e^-10 and e^10, and held there beyond."""
    asked = torch.tensor(norms, dtype=torch.float64)
    off = decoded(coded(asked)).log() - asked.log().clamp(-10, 10)
    assert off.abs().max() < 2e-7


@given(st.binary(min_size=32, max_size=32), st.binary(min_size=126, max_size=126))
def test_norms_are_encrypted_and_a_wrong_key_gives_norms_as_pictures_have_them(secret, code):
    key = MasterKey(secret)
    hidden = ciphered(code, key, CONTEXTS[0], "norms")
    assert hidden != code
    assert ciphered(hidden, key, CONTEXTS[0], "norms") == code
    wrong = decoded(ciphered(hidden, experiment_key(5), CONTEXTS[0], "norms"))
    assert (wrong.log().abs() <= 10).all()
    assert ((wrong > 0.5) & (wrong < 2.5)).double().mean() > 0.7


def test_norms_of_another_model_are_refused(noise):
    zT, mask = noise
    with pytest.raises(BadHeader, match="4 bytes of norms, 30 are expected"):
        BandRotation().undo(zT, mask, KEYS, CONTEXTS, [bytes(4)] * 2)
