"""The exact loop: what is recovered from a real PNG file, and what both sides have to agree on."""

import logging
from dataclasses import replace

import pytest
import torch

from keyanon.attacks.views import FloatChannel, NoKey, WrongKey, without_authentication
from keyanon.channel.description import described
from keyanon.channel.headers import BadHeader, Header
from keyanon.channel.keys import Nobody, experiment_key
from keyanon.channel.nonces import contexts_of, nonce_for
from keyanon.channel.pixels import read_png, to_bytes, to_floats, write_png
from keyanon.context import Context
from keyanon.diffusion.model import LatentDiffusion
from keyanon.diffusion.solvers import DDIM
from keyanon.faces.datasets import bundled_faces
from keyanon.measures.scorers import psnr_face
from keyanon.methods.exact import Exact, filled, pixels, public_noise
from keyanon.methods.refinement import Refinement, ToneCurve
from keyanon.methods.seams import Seam
from keyanon.methods.transforms import BandRotation
from keyanon.types import Published, Reconstructs, Reversible
from tests.conftest import CentreFace

KEYS = [experiment_key()] * 2


def exact(model: LatentDiffusion) -> Exact:
    return Exact(
        model,
        DDIM(10, "karras", 5e-7),
        CentreFace(),
        BandRotation(),
        Refinement(ToneCurve(0.95, 1.5)),
        Seam(),
        floor=None,
    )


@pytest.fixture(scope="module")
def method(tiny_block_dct) -> Exact:
    return exact(LatentDiffusion(str(tiny_block_dct), chunk=2))


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    dataset = bundled_faces()
    return torch.stack([dataset.load(id) for id in dataset.ids[:2]])


@pytest.fixture(scope="module")
def published(method, pictures) -> Published:
    return method.anonymize(pictures, KEYS, ["a", "b"])


@pytest.fixture(scope="module")
def face(method, pictures):
    return pixels(method.parser.mask(pictures, (16, 16)), pictures)


def test_contract(method, pictures, published, face):
    assert isinstance(method, Reversible)
    assert isinstance(method, Reconstructs)
    assert published.images.dtype == torch.uint8
    assert torch.equal(published.images[~face.expand_as(pictures)], to_bytes(pictures)[~face.expand_as(pictures)])
    assert (psnr_face(to_floats(published.images), pictures, face) < 25).all()


def test_latents_come_back_exactly(method, pictures):
    mask = method.parser.mask(pictures, (16, 16))
    contexts = contexts_of(method, nonce_for, KEYS, "ab", pictures)
    known, z0 = method.known(pictures, mask, contexts), method.backbone.encode(pictures)
    there, sent = method.turn(z0, known, KEYS, contexts)
    headers = [
        Header(each.nonce, m, code, description=each.description)
        for each, m, code in zip(contexts, mask, sent, strict=True)
    ]
    back = method.turn_back(there, known, headers, KEYS)
    error = ((back - z0) * mask).square().sum((1, 2, 3)) / (mask * z0).square().sum((1, 2, 3))
    assert (-10 * error.log10() > 80).all()


def test_the_face_comes_back_from_the_file(method, pictures, published, face, tmp_path):
    for i, (image, header) in enumerate(zip(published.images, published.headers, strict=True)):
        write_png(tmp_path / f"{i}.png", image, header)
    read = [read_png(tmp_path / f"{i}.png") for i in range(2)]
    received = Published(torch.stack([image for image, _ in read]), tuple(header for _, header in read))
    recovered = method.recover(received, KEYS)
    assert (psnr_face(recovered, method.reconstruct(pictures), face) > 40).all()


def test_the_bundled_model_brings_a_face_back_and_shows_none_to_others(pictures, face):
    model, solver, key = LatentDiffusion("bundled:faces128", chunk=1), DDIM(10, "karras", 1e-5), KEYS[:1]
    method = replace(exact(model), solver=solver)
    picture, face = pictures[:1], face[:1]
    published = method.anonymize(picture, key, ["a"])
    recovered = method.recover(published, key)
    assert psnr_face(recovered, method.reconstruct(picture), face) > 40
    assert psnr_face(to_floats(published.images), picture, face) < 25
    assert psnr_face(WrongKey()(published, key, method), picture, face) < 25


def test_a_residual_brings_back_what_rounding_loses(method, pictures, face):
    rounded = replace(method, refinement=None, seam=None)
    with_residual = replace(rounded, residual=0.005)
    quality = []
    for sender in (rounded, with_residual):
        published = sender.anonymize(pictures, KEYS, ["a", "b"])
        recovered = sender.recover(published, KEYS)
        quality.append(psnr_face(recovered, sender.reconstruct(pictures), face))
    assert (quality[1] > quality[0] + 6).all()


def test_floats_come_back_as_well(method, pictures, published, face):
    recovered = FloatChannel()(published, KEYS, method)
    assert (psnr_face(recovered, method.reconstruct(pictures), face) > 55).all()


def test_a_wrong_key_does_not_give_the_face(method, pictures, published, face):
    assert (psnr_face(WrongKey()(published, KEYS, method), pictures, face) < 25).all()


def test_without_a_key_the_published_face_is_all_there_is(method, published, face):
    """The loop closes: inverted and denoised as it is, z'_T gives z'_0 again."""
    floats, headers = to_floats(published.images), [Header.unpack(header) for header in published.headers]
    seen = NoKey()(published, [Nobody()] * 2, method)
    decoded = method.face(method.latents(floats, headers), floats, torch.stack([header.mask for header in headers]))
    assert (psnr_face(seen, decoded, face) > 55).all()
    as_received = method.received(floats, headers)
    assert (psnr_face(seen.clamp(-1, 1), as_received.clamp(-1, 1), face) > 40).all()


def test_a_picture_does_not_depend_on_its_batch(method, pictures, published):
    alone = method.anonymize(pictures[1:], KEYS[1:], ["b"])
    assert alone.headers == published.headers[1:]
    assert torch.equal(alone.images, published.images[1:])


def test_what_is_verified_is_what_the_receiver_gets(method, pictures, face):
    sender = replace(method, floor=0.0, solver=DDIM(2, "karras"))
    published = sender.anonymize(pictures, KEYS, ["a", "b"])
    recovered = sender.recover(published, KEYS)
    achieved = psnr_face(
        to_floats(to_bytes(recovered)),
        to_floats(to_bytes(sender.reconstruct(pictures))),
        face,
    )
    torch.testing.assert_close(published.measured["verified_psnr"].float(), achieved)
    assert published.measured["attempts"].tolist() == [1, 1]


def test_below_the_floor_nonces_are_drawn_again_and_the_best_is_kept(method, pictures, published, caplog):
    hopeless = replace(method, floor=99.0, attempts=2, refinement=None, solver=DDIM(2, "karras"))
    with caplog.at_level(logging.WARNING):
        out = hopeless.anonymize(pictures, KEYS, ["a", "b"])
    assert out.measured["attempts"].tolist() == [2, 2]
    assert "a: comes back at" in caplog.text
    tries = [hopeless.publish(pictures, method.parser.mask(pictures, (16, 16)), KEYS, ["a", "b"], n) for n in range(2)]
    best = torch.stack([one.measured["verified_psnr"] for one in tries]).amax(0)
    torch.testing.assert_close(out.measured["verified_psnr"], best)
    assert len({header for one in tries for header in one.headers}) == 4


@pytest.mark.parametrize("background", ["scaled", "noised"])
def test_both_sides_know_the_same_background(method, pictures, published, background):
    one = replace(method, background=background)
    header = [Header.unpack(header) for header in published.headers]
    mask, contexts = torch.stack([h.mask for h in header]), [h.context for h in header]
    sender, receiver = one.known(pictures, mask, contexts), one.known(to_floats(published.images), mask, contexts)
    for mine, theirs in zip(sender.trajectory, receiver.trajectory, strict=True):
        assert torch.equal(mine, theirs)


def test_the_fill_looks_at_the_background_only(pictures, face):
    other = torch.where(face, torch.rand_like(pictures), pictures)
    assert torch.equal(filled(pictures, face), filled(other, face))
    assert torch.equal(filled(pictures, face)[~face.expand_as(pictures)], pictures[~face.expand_as(pictures)])
    everything = torch.ones_like(face)
    assert torch.equal(filled(pictures, everything), torch.zeros_like(pictures))


def test_public_noise_is_normal_and_a_function_of_the_nonce():
    noise = public_noise(Context(bytes(24)), (21, 64, 64))
    assert torch.equal(noise, public_noise(Context(bytes(24)), (21, 64, 64)))
    assert not torch.equal(noise, public_noise(Context(bytes(23) + b"\1"), (21, 64, 64)))
    assert noise.mean().abs() < 0.02
    assert (noise.std() - 1).abs() < 0.01
    assert ((noise**4).mean() - 3).abs() < 0.1


def test_headers_without_a_mask_and_cropped_pictures_are_refused(method, published):
    cropped, tagless = replace(published, images=published.images[..., :120, :120]), without_authentication(method)
    with pytest.raises(BadHeader, match="no face mask"):
        tagless.recover(
            replace(published, headers=(Header(bytes(24), description=described(method)).pack(),) * 2), KEYS
        )
    with pytest.raises(BadHeader, match="resized or cropped"):
        tagless.recover(cropped, KEYS)
    with pytest.raises(BadHeader, match="cannot tell which"):
        method.recover(cropped, KEYS)
    with pytest.raises(BadHeader, match="no keyanon header"):
        method.recover(replace(published, headers=(b"", b"")), KEYS)
