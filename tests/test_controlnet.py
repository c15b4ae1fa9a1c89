"""The control network on tiny components in its layout: what it adds to the frozen network, and what the method sees of it."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from safetensors.torch import load_file, save_file

from experiments.harness.preflight import missing_parts
from keyanon.attacks.views import NoKey, WrongKey
from keyanon.channel.keys import experiment_key
from keyanon.channel.pixels import from_pil
from keyanon.diffusion.controlnet import AUTHORS, FILE, ControlNetwork, MaskControl, convert
from keyanon.diffusion.model import BadModel, LatentDiffusion
from keyanon.diffusion.solvers import DDIM
from keyanon.methods.signflip import SignFlip
from keyanon.types import Reversible
from keyanon.weights import MissingWeights, WrongWeights
from tests.conftest import LDM_NOISE, CentreFace, smooth_picture

KEYS, IDS = [experiment_key()] * 2, ["a", "b"]
ENCODER = ("conv_in", "down_blocks", "mid_block")


def beside(unet: UNet2DModel) -> ControlNetwork:
    """A control network as its training begins: the frozen network's encoder, and zero convolutions."""
    network = ControlNetwork(unet.config, 2)
    for part in ENCODER:
        getattr(network, part).load_state_dict(getattr(unet, part).state_dict())
    return network


@pytest.fixture
def model(tiny_ldm, tmp_path) -> LatentDiffusion:
    folder = Path(shutil.copytree(tiny_ldm, tmp_path / "ldm"))
    return LatentDiffusion(str(folder), noise=LDM_NOISE)


def with_weights(model: LatentDiffusion, network: ControlNetwork) -> LatentDiffusion:
    path = Path(model.source, FILE)
    path.parent.mkdir()
    save_file(network.state_dict(), path)
    return model


def random_network(unet: UNet2DModel) -> ControlNetwork:
    torch.manual_seed(7)
    network = beside(unet)
    with torch.no_grad():
        for parameter in [*network.hint.parameters(), *network.skips.parameters(), *network.middle.parameters()]:
            parameter.add_(torch.randn_like(parameter) / 4)
    return network


@pytest.fixture
def controlled(model) -> LatentDiffusion:
    return with_weights(model, random_network(model.unet))


@pytest.fixture
def pictures() -> torch.Tensor:
    return torch.stack([from_pil(smooth_picture(seed)) for seed in range(2)])


def faces(pictures: torch.Tensor) -> torch.Tensor:
    return CentreFace().mask(pictures, (64, 64))


Z = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_a_network_of_zeros_leaves_the_frozen_one_as_it_is(model, pictures):
    network = beside(model.unet)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    up, down = MaskControl().denoisers(with_weights(model, network), faces(pictures))
    for t in (1, 500):
        torch.testing.assert_close(up(Z, t), model.eps(Z, t))
        torch.testing.assert_close(down(Z, t), model.eps(Z, t))


def test_before_training_it_doubles_the_bare_skips(model, pictures):
    """Its encoder is the frozen one's and its zero convolutions give nothing, so c_i is s_i for conv_in and the downsampler."""
    _, eps = MaskControl().denoisers(with_weights(model, beside(model.unet)), faces(pictures))
    unet = UNet2DModel.from_pretrained(Path(model.source, "unet"))
    for block in unet.up_blocks:  # the first skip of each is a bare one: the downsampler's, and conv_in's
        block.register_forward_pre_hook(lambda _, given: (given[0], (2 * given[1][0], *given[1][1:]), *given[2:]))
    with torch.no_grad():
        torch.testing.assert_close(eps(Z, 300), unet(Z, 300).sample)
    assert not torch.allclose(eps(Z, 300), model.eps(Z, 300))


def test_other_masks_give_other_noise_and_no_gradient_is_kept(controlled, pictures):
    none = torch.zeros_like(faces(pictures))
    one, other = (MaskControl().denoisers(controlled, mask)[1] for mask in (faces(pictures), none))
    assert not torch.allclose(one(Z, 300), other(Z, 300))
    assert not one(Z.clone().requires_grad_(True), 300).requires_grad
    mixed = torch.cat([faces(pictures)[:1], none[1:]])
    both = MaskControl().denoisers(controlled, mixed)[1](Z, 300)
    torch.testing.assert_close(both, torch.stack([one(Z, 300)[0], other(Z, 300)[1]]))


def test_a_network_that_predicts_v_is_turned_to_noise(controlled, pictures):
    as_v = LatentDiffusion(controlled.source, noise={**LDM_NOISE, "prediction_type": "v_prediction"})
    abar = as_v.schedule.abar[300]
    as_noise, as_velocity = (MaskControl().denoisers(m, faces(pictures))[1](Z, 300) for m in (controlled, as_v))
    torch.testing.assert_close(as_velocity, abar**0.5 * as_noise + (1 - abar) ** 0.5 * Z)


def test_the_method_shows_the_mask_where_it_is_told_to(controlled, pictures):
    method = SignFlip(controlled, DDIM(4), CentreFace(), control=MaskControl())
    assert isinstance(method, Reversible)
    up, down = method.denoisers(pictures)
    torch.testing.assert_close(up(Z, 300), down(Z, 300))
    down_only = replace(method, control=MaskControl(inversion=False))
    up, same = down_only.denoisers(pictures)
    torch.testing.assert_close(up(Z, 300), controlled.eps(Z, 300))
    torch.testing.assert_close(same(Z, 300), down(Z, 300))
    made = [m.anonymize(pictures, KEYS, IDS).images for m in (method, down_only, replace(method, control=None))]
    assert not any(torch.equal(a, b) for a, b in ((made[0], made[1]), (made[0], made[2]), (made[1], made[2])))


def test_the_contract_of_the_method(controlled, pictures):
    method = SignFlip(controlled, DDIM(4), CentreFace(), control=MaskControl())
    before = controlled.evaluations.total()
    published = method.anonymize(pictures, KEYS, IDS)
    assert controlled.evaluations.total() - before == 2 * 2 * 4
    recovered = method.recover(published, KEYS)
    assert recovered.shape == pictures.shape
    assert torch.equal(method.anonymize(pictures[1:], KEYS[1:], IDS[1:]).images, published.images[1:])
    for attack in (WrongKey(), NoKey()):
        assert not torch.equal(attack(published, KEYS, method), recovered)


def test_a_solver_that_splits_its_batch_is_refused(controlled, pictures):
    eps, _ = MaskControl().denoisers(controlled, faces(pictures))
    with pytest.raises(ValueError, match=r"set solver\.tolerance=null"):
        eps(Z[:1], 300)


def test_missing_weights_are_told_at_once(model, pictures):
    method = SignFlip(model, DDIM(4), CentreFace(), control=MaskControl())
    (message,) = missing_parts(method)
    assert f"no file {model.folder / FILE}" in message
    assert missing_parts(replace(method, control=None)) == []
    with pytest.raises(MissingWeights, match="control network: no file"):
        method.anonymize(pictures, KEYS, IDS)
    (message,) = missing_parts(replace(method, backbone=LatentDiffusion("/nowhere/model")))
    assert "/nowhere/model" in message  # of the control network nothing can be said yet


def test_the_weights_are_part_of_the_model_s_digest(controlled, tiny_ldm):
    assert controlled.sha256 != LatentDiffusion(str(tiny_ldm)).sha256


def test_a_checkpoint_of_the_authors_is_converted(model, tmp_path):
    """Their names, read off their code: the frozen network, its whole copy, and the time embedding twice."""
    network = random_network(model.unet)
    unet = model.unet.state_dict()
    theirs = {f"{part}.{name}": value for part in ("trained_unet", "control_copy_unet") for name, value in unet.items()}
    theirs |= {f"time_embedding.{name}": value for name, value in model.unet.time_embedding.state_dict().items()}
    for their_name, our_name in AUTHORS.items():
        for name, value in network.state_dict().items():
            if name.startswith(our_name):
                theirs[their_name + name.removeprefix(our_name)] = value
    torch.save(theirs, tmp_path / "controlnet_epoch_15.pth")
    path = convert(tmp_path / "controlnet_epoch_15.pth", model.source)
    converted = load_file(path)
    assert converted.keys() == network.state_dict().keys()
    assert all(torch.equal(converted[name], value) for name, value in network.state_dict().items())
    assert "control_copy_unet_hint_block.3.2.weight" in theirs  # 3: first layer, two halvings, last layers
    assert MaskControl().lacking(model) is None


def test_another_file_is_refused(model, tmp_path):
    torch.save({"control_copy_unet.conv_in.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(WrongWeights, match=r"other\.pth: not the weights of a control network for"):
        convert(tmp_path / "other.pth", model.source)
    assert not Path(model.source, FILE).exists()


def test_a_network_for_another_autoencoder_is_refused(model, pictures):
    with_weights(model, ControlNetwork(model.unet.config, 3))
    with pytest.raises(BadModel, match=r"model\.safetensors: brings masks to \(8, 8\), latents are \(16, 16\)"):
        MaskControl().denoisers(model, faces(pictures))


@pytest.mark.parametrize(
    "other", [{"num_class_embeds": 3}, {"time_embedding_type": "fourier"}, {"center_input_sample": True}]
)
def test_networks_of_other_kinds_are_refused(model, other):
    with pytest.raises(BadModel, match="plain UNet2DModel alone"):
        ControlNetwork(dict(model.unet.config) | other, 2)
