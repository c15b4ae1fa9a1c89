"""PRO-Face S: what holds whatever the weights are, what the committed weights do, and its training at toy size."""

import hashlib
import logging
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from safetensors.torch import load_file

from experiments.train_proface_s import loss, rms, through_a_file, train, unlike
from keyanon.attacks.views import FloatChannel, NoKey, PartialKey, WrongKey
from keyanon.channel.headers import BadHeader, Header
from keyanon.channel.keys import Nobody, experiment_key
from keyanon.channel.pixels import to_bytes, to_floats
from keyanon.context import Context
from keyanon.faces.datasets import bundled_faces
from keyanon.measures.scorers import psnr, ssim
from keyanon.methods.baselines.classical import GaussianBlur
from keyanon.methods.baselines.proface_s import HidingNetwork, ProFaceS, gain, haar, hide, reveal, unhaar
from keyanon.types import Image, Published, Reversible
from keyanon.weights import WrongWeights, named
from tests.conftest import ROOT

KEY = experiment_key()
BLUR = GaussianBlur()
WEIGHTS = ["proface_s", "proface_s_rounded"]
WEIGHT = {"looks": 0.3, "perceptual": 1.0, "recovers": 0.5, "refuses": 0.2, "margin_perceptual": 0.8, "margin_rms": 0.5}


def drawn(seed: int, *shape: int) -> torch.Tensor:
    """Uniform in [-1, 1]."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def random_signs(seed: int, *shape: int) -> torch.Tensor:
    return drawn(seed, *shape).sign()


def blurred(images: Image) -> Image:
    return BLUR(images, torch.ones_like(images[:, :1], dtype=torch.bool))


def dB(view: Image, original: Image) -> float:
    return psnr(view.clamp(-1, 1), original, torch.ones_like(original[:, :1], dtype=torch.bool)).mean().item()


# The transform


def test_haar_of_one_cell():
    cell = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).view(1, 1, 2, 2)
    assert haar(cell).flatten().tolist() == [5, -1, -2, 0]  # sums and differences over 2


def test_haar_keeps_lengths_and_is_undone():
    x = drawn(0, 2, 3, 16, 12)
    bands = haar(x)
    assert bands.shape == (2, 12, 8, 6)
    torch.testing.assert_close(bands.square().sum(), x.square().sum())
    torch.testing.assert_close(unhaar(bands), x)


def test_haar_is_that_of_pywavelets():
    pywt = pytest.importorskip("pywt")
    x = drawn(0, 1, 1, 16, 12)
    mean, (rows, columns, diagonal) = pywt.dwt2(x[0, 0].numpy(), "haar")
    for ours, theirs in zip(haar(x)[0], (mean, columns, rows, diagonal), strict=True):
        torch.testing.assert_close(ours, torch.from_numpy(theirs))


# The network


@pytest.fixture(scope="module")
def random_net() -> HidingNetwork:
    """Full size, no weight at zero."""
    torch.manual_seed(0)
    net = HidingNetwork().requires_grad_(False)
    for parameter in net.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    return net


def test_number_of_parameters():
    assert sum(parameter.numel() for parameter in HidingNetwork().parameters()) == 1_073_040


def test_the_inverse_is_exact_where_z_is_kept(random_net):
    cover, original, k = haar(drawn(0, 2, 3, 32, 32)), haar(drawn(1, 2, 3, 32, 32)), haar(random_signs(2, 2, 1, 32, 32))
    protected, z = random_net(cover, original, k)
    assert (protected - cover).abs().max() > 0.1
    for back, there in zip(random_net.inverse(protected, z, k), (cover, original), strict=True):
        torch.testing.assert_close(back, there, atol=1e-4, rtol=0)
    _, other = random_net.inverse(protected, z, -k)
    assert (other - original).abs().max() > 0.01


def test_it_begins_as_the_identity():
    covers, originals, key = drawn(0, 1, 3, 16, 16), drawn(1, 1, 3, 16, 16), random_signs(2, 1, 1, 16, 16)
    torch.testing.assert_close(hide(HidingNetwork(), covers, originals, key), covers)


def test_gain():
    s = torch.linspace(-50, 50, 101)
    torch.testing.assert_close(gain(s), torch.exp(2 * 2 * (torch.sigmoid(s) - 0.5)))
    assert gain(torch.zeros(())) == 1
    assert gain(s).max().item() == pytest.approx(math.e**2)


# Keys


def test_signs_of_a_picture_are_its_own_and_even():
    method = ProFaceS(BLUR)
    first, second = method.signs([KEY, KEY], [Context(b"a"), Context(b"b")], torch.zeros(2, 3, 128, 128))
    assert first.shape == (1, 128, 128)
    assert set(first.unique().tolist()) == {-1, 1}
    for each in (first, second, first * second):
        assert abs(each.mean().item()) < 4 / 128  # four standard deviations


def test_authors_signs_are_the_same_for_all_pictures_of_a_key():
    method = ProFaceS(BLUR, kdf="authors")
    first, second, other = method.signs(
        [KEY, KEY, experiment_key(1)], [Context(b"a"), Context(b"b"), Context(b"a")], torch.zeros(3, 3, 16, 16)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    derived = hashlib.pbkdf2_hmac("sha512", KEY.stream(Context(b""), "password", 32), b"\x01", 10, 32)
    bits = [byte >> (7 - i) & 1 for byte in derived for i in range(8)]
    assert first.flatten().tolist() == [2 * bit - 1 for bit in bits]


# The method with the committed weights, on synthetic faces


@pytest.fixture(scope="module")
def faces() -> Image:
    dataset = bundled_faces()
    return torch.stack([dataset.load(id) for id in dataset.ids[:3]])


IDS, KEYS = ["a", "b", "c"], [KEY] * 3


@pytest.fixture(scope="module", params=WEIGHTS)
def method(request) -> ProFaceS:
    return ProFaceS(BLUR, request.param, chunk=3)


@pytest.fixture(scope="module")
def published(method, faces) -> Published:
    return method.anonymize(faces, KEYS, IDS)


def test_contract(method, faces, published):
    assert isinstance(method, Reversible)
    assert published.images.shape == faces.shape
    assert published.floats is not None
    assert torch.equal(to_bytes(published.floats), published.images)
    assert len({Header.unpack(header).nonce for header in published.headers}) == 3
    assert (method.about.kind, method.about.key_bits, method.about.effective_key_bits) == ("keyed", 128 * 128, 256)


def test_it_looks_like_the_obfuscation(faces, published):
    view = to_floats(published.images)
    assert dB(view, blurred(faces)) > 35 > 30 > dB(view, faces)
    torch.testing.assert_close(published.measured["obfuscated_psnr"].mean().item(), dB(view, blurred(faces)))


def test_only_the_key_recovers(method, faces, published):
    tagless = replace(method, authenticate=False)
    recovered = method.recover(published, KEYS)
    wrong = WrongKey()(published, KEYS, tagless)
    half = PartialKey(0.5)(published, KEYS, tagless)  # half of the signs wrong: no better than a guess
    assert dB(recovered, faces) > 28
    assert dB(recovered, faces) > dB(to_floats(published.images), faces) + 5
    assert max(dB(wrong, faces), dB(half, faces)) < 15
    everywhere = torch.ones_like(faces[:, :1], dtype=torch.bool)
    assert ssim(wrong, faces, everywhere).max() < 0.4


def test_without_a_key_the_network_shows_more_than_under_a_wrong_one(method, faces, published):
    """Zeros are the mean of all keys."""
    floats = to_floats(published.images)
    seen = NoKey()(published, [Nobody()] * 3, method)
    zeros = torch.zeros(3, 1, 128, 128)
    torch.testing.assert_close(seen, reveal(method.network, floats, zeros))
    recovered = method.recover(published, KEYS)
    assert dB(WrongKey()(published, KEYS, method), faces) < dB(seen, faces) < dB(recovered, faces) - 10


def test_floats_carry_more_than_bytes(method, faces, published):
    tagless = replace(method, authenticate=False)
    from_floats = FloatChannel()(published, KEYS, tagless)
    from_bytes = method.recover(published, KEYS)
    assert dB(from_floats, faces) > dB(from_bytes, faces)


def test_weights_trained_through_files_lose_less_in_files(faces):
    losses = {}
    for name in WEIGHTS:
        method = ProFaceS(BLUR, name, authenticate=False, chunk=3)
        published = method.anonymize(faces, KEYS, IDS)
        from_bytes = method.recover(published, KEYS)
        losses[name] = dB(FloatChannel()(published, KEYS, method), faces) - dB(from_bytes, faces)
    assert losses["proface_s_rounded"] < losses["proface_s"]


def test_a_picture_does_not_depend_on_its_batch(method, faces, published):
    alone = method.anonymize(faces[1:2], KEYS[:1], IDS[1:2])
    assert torch.equal(alone.images[0], published.images[1])
    assert alone.headers[0] == published.headers[1]


def test_a_changed_picture_or_another_key_is_refused(method, published):
    tampered = published.images.clone()
    tampered[2, 0, 0, 0] ^= 1
    with pytest.raises(BadHeader, match="picture 3 of 3"):
        method.recover(replace(published, images=tampered), KEYS)
    with pytest.raises(BadHeader, match="not the picture's key"):
        method.recover(published, [KEY, KEY, experiment_key(1)])
    bare = replace(method, authenticate=False).anonymize(to_floats(published.images), KEYS, IDS)
    with pytest.raises(BadHeader, match="no tag"):
        method.recover(bare, KEYS)


def test_twice_the_size_and_the_authors_key():
    dataset = bundled_faces(256)
    face = dataset.load(dataset.ids[0])[None]
    method = ProFaceS(BLUR, kdf="authors", chunk=1)
    published = method.anonymize(face, [KEY], ["a"])
    assert dB(method.recover(published, [KEY]), face) > 28


def test_odd_sizes_are_refused():
    with pytest.raises(ValueError, match="65x64 pixels is odd; set an even dataset.size"):
        ProFaceS(BLUR).anonymize(torch.zeros(1, 3, 64, 65), [KEY], ["a"])


def test_other_weights_are_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"other")
    with pytest.raises(WrongWeights, match="proface_s"):
        _ = ProFaceS(BLUR, weights=str(tmp_path / "model.safetensors")).network


def test_cards_tell_where_the_weights_are():
    for name in WEIGHTS:
        card = named(name)
        path = ROOT / "keyanon" / "assets" / name / card.filename
        assert hashlib.sha256(path.read_bytes()).hexdigest() == card.sha256
        assert path.stat().st_size < 4e6
    assert ProFaceS(BLUR, named("proface_s")).cards() == ProFaceS(BLUR).cards()


# Training


def test_a_file_rounds_and_passes_gradients():
    x = drawn(0, 1, 3, 8, 8).mul(1.2).requires_grad_()
    y = through_a_file(x)
    torch.testing.assert_close(y, to_floats(to_bytes(x)))
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_distances():
    x = drawn(0, 2, 3, 32, 32)
    torch.testing.assert_close(unlike(x, x), torch.zeros(2), atol=1e-5, rtol=0)
    everywhere = torch.ones(2, 1, 32, 32, dtype=torch.bool)
    torch.testing.assert_close(unlike(x, x.roll(1)), 1 - ssim(x, x.roll(1), everywhere), atol=0.05, rtol=0)
    assert (unlike(x, -x) > 1).all()
    torch.testing.assert_close(rms(x, x + 0.5), torch.full((2,), 0.5), atol=1e-6, rtol=0)


@pytest.mark.parametrize("rounded", [False, True])
def test_steps_lower_the_loss(faces, rounded):
    torch.manual_seed(0)
    net = HidingNetwork(blocks=1, growth=4)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    originals, covers = faces[:2, :, 48:64, 48:64], blurred(faces[:2])[..., 48:64, 48:64]
    values = []
    for step in range(40):
        value = loss(net, originals, covers, torch.Generator().manual_seed(step), rounded, WEIGHT)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert sum(values[-5:]) < 0.75 * sum(values[:5])


def configured(faces: Path, out: Path, *overrides: str) -> DictConfig:
    tiny = ["network.blocks=1", "network.growth=4", "data.size=32", "data.crop=16", "batch_size=2", "minutes=10"]
    place = [f"data.root={faces}", f"data.heldout={faces / 'heldout.txt'}", f"out={out / 'run'}", f"export={out}"]
    with initialize_config_dir(str(ROOT / "conf" / "train"), version_base="1.3"):
        return compose("proface_s", overrides=[*tiny, *place, *overrides])


def test_a_resumed_run_is_an_uninterrupted_one(tmp_path, caplog):
    folder = tmp_path / "faces"
    folder.mkdir()
    chosen = sorted((ROOT / "keyanon" / "assets" / "faces").glob("*.webp"))[:8]
    for path in chosen:
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "heldout.txt").write_text(chosen[-1].stem + "\n")
    with caplog.at_level(logging.INFO):
        train(configured(folder, tmp_path / "whole", "steps=4"))
        train(configured(folder, tmp_path / "parts", "steps=2"))
        before = load_file(tmp_path / "parts" / "model.safetensors")
        train(configured(folder, tmp_path / "parts", "steps=4"))
    assert "7 training pictures" in caplog.text
    assert "resumed at step 2" in caplog.text
    whole, parts = (load_file(tmp_path / run / "model.safetensors") for run in ("whole", "parts"))
    assert whole.keys() == dict(HidingNetwork(blocks=1).named_parameters()).keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert any(not torch.equal(before[name], parts[name]) for name in parts)

    train(configured(folder, tmp_path / "on", "steps=0", f"begin_with={tmp_path / 'whole' / 'model.safetensors'}"))
    on = load_file(tmp_path / "on" / "model.safetensors")
    assert all(torch.equal(whole[name], on[name]) for name in whole)
