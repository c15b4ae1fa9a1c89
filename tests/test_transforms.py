"""Keyed transforms: inverses, what they preserve, what they hide, and what their headers carry."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kstest

from keyanon.headers import BadHeader
from keyanon.keys import MasterKey, experiment_key
from keyanon.transforms import BandRotation, SignFlipping, ciphered, coded, decoded, rotations

NONCES = [bytes([i]) * 24 for i in range(2)]
KEYS = [experiment_key()] * 2


@pytest.fixture
def noise():
    generator = torch.Generator().manual_seed(0)
    zT = torch.randn(2, 5, 8, 8, generator=generator) * torch.tensor([0.5, 0.9, 1.0, 1.3, 2.0]).view(1, 5, 1, 1)
    mask = torch.zeros(2, 1, 8, 8, dtype=torch.bool)
    mask[0, :, 2:6, 1:7] = True
    mask[1, :, :5] = True
    return zT, mask


@pytest.mark.parametrize("transform", [SignFlipping(), BandRotation()])
def test_undoing_gives_the_noise_back_and_leaves_the_rest_alone(transform, noise):
    zT, mask = noise
    turned, sent = transform.apply(zT, mask, KEYS, NONCES)
    outside = ~mask.expand_as(zT)
    assert torch.equal(turned[outside], zT[outside])
    assert (turned - zT)[mask.expand_as(zT)].abs().mean() > 0.3
    torch.testing.assert_close(transform.undo(turned, mask, KEYS, NONCES, sent), zT, atol=2e-6, rtol=0)


@pytest.mark.parametrize("transform", [SignFlipping(), BandRotation()])
def test_a_picture_does_not_depend_on_its_batch(transform, noise):
    zT, mask = noise
    turned, sent = transform.apply(zT, mask, KEYS, NONCES)
    alone, sent_alone = transform.apply(zT[1:], mask[1:], KEYS[1:], NONCES[1:])
    assert torch.equal(alone, turned[1:])
    assert sent_alone == sent[1:]


def test_rotated_channels_have_the_norm_of_noise(noise):
    zT, mask = noise
    turned, sent = BandRotation().apply(zT, mask, KEYS, NONCES)
    for z, cells, code in zip(turned, mask[:, 0], sent, strict=True):
        assert len(code) == 3 * 5
        torch.testing.assert_close(z[:, cells].square().mean(1).sqrt(), torch.ones(5), atol=2e-3, rtol=0)


def test_rotations_are_orthogonal_and_haar():
    """Their traces have variance 1, and their entries that of a coordinate on the sphere."""
    q = torch.cat([rotations(experiment_key(i), bytes(24), 50, 8) for i in range(20)])
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
        a, b = (transform.apply(zT, mask, [experiment_key(i)] * 2, NONCES)[0][inside].abs() for i in (1, 2))
        return torch.corrcoef(torch.stack([a, b]))[0, 1].item()

    assert likeness(SignFlipping()) == pytest.approx(1)
    assert abs(likeness(BandRotation())) < 0.15


@given(st.lists(st.floats(0.35, 2.8), min_size=1, max_size=30))
def test_norms_survive_their_code(norms):
    there = decoded(coded(torch.tensor(norms, dtype=torch.float64)))
    torch.testing.assert_close(there, torch.tensor(norms, dtype=torch.float64), rtol=5e-3, atol=0)


@given(st.lists(st.floats(0, 1e30), min_size=1, max_size=4))
def test_no_norm_breaks_the_code(norms):
    there = decoded(coded(torch.tensor(norms, dtype=torch.float64)))
    assert ((there > 0.2) & (there < 5)).all()


@given(st.binary(min_size=32, max_size=32), st.binary(min_size=63, max_size=63))
def test_norms_are_encrypted_and_a_wrong_key_gives_norms_as_pictures_have_them(secret, code):
    key = MasterKey(secret)
    hidden = ciphered(code, key, NONCES[0])
    assert hidden != code
    assert ciphered(hidden, key, NONCES[0]) == code
    wrong = decoded(ciphered(hidden, experiment_key(5), NONCES[0]))
    assert ((wrong > 0.2) & (wrong < 5)).all()


def test_norms_of_another_model_are_refused(noise):
    zT, mask = noise
    with pytest.raises(BadHeader, match="4 bytes of norms, 15 are expected"):
        BandRotation().undo(zT, mask, KEYS, NONCES, [bytes(4)] * 2)
