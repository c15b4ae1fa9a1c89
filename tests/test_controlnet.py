"""The control network on tiny components in its layout: what it adds to the frozen network, and what the method sees of it."""

from collections.abc import Callable
from dataclasses import replace
from hashlib import file_digest
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel

from experiments.harness.preflight import missing_parts
from keyanon.attacks.views import NoKey, WrongKey
from keyanon.channel.description import DIGITS, described
from keyanon.channel.keys import experiment_key
from keyanon.channel.pixels import from_pil
from keyanon.diffusion.controlnet import AUTHORS, ControlNetwork, MaskControl
from keyanon.diffusion.model import BadModel, LatentDiffusion
from keyanon.diffusion.solvers import DDIM
from keyanon.methods.signflip import SignFlip
from keyanon.types import Reversible
from keyanon.weights import Card, MissingWeights, Release, WrongWeights
from tests.conftest import LDM_NOISE, CentreFace, smooth_picture

KEYS, IDS = [experiment_key()] * 2, ["a", "b"]
ENCODER = ("conv_in", "down_blocks", "mid_block")


def beside(unet: UNet2DModel) -> ControlNetwork:
    """A control network as its training begins: the frozen network's encoder, and zero convolutions."""
    network = ControlNetwork(unet.config, 2)
    for part in ENCODER:
        getattr(network, part).load_state_dict(getattr(unet, part).state_dict())
    return network


def checkpoint(unet: UNet2DModel, network: ControlNetwork) -> dict[str, torch.Tensor]:
    """As the authors save one, read off their code: the frozen network, its whole copy, and the time embedding twice."""
    theirs = {f"{part}.{k}": v for part in ("trained_unet", "control_copy_unet") for k, v in unet.state_dict().items()}
    theirs |= {f"time_embedding.{name}": value for name, value in unet.time_embedding.state_dict().items()}
    for their_name, our_name in AUTHORS.items():
        for name, value in network.state_dict().items():
            if name.startswith(our_name):
                theirs[their_name + name.removeprefix(our_name)] = value
    return theirs


def control_of(path: Path, state: object) -> MaskControl:
    torch.save(state, path)
    with path.open("rb") as file:
        digest = file_digest(file, "sha256").hexdigest()
    return MaskControl(card=Card("tiny", path.name, Release(path.as_uri()), digest, "none", "", ""), weights=str(path))


@pytest.fixture
def with_weights(model, tmp_path) -> Callable[[ControlNetwork], MaskControl]:
    return lambda network: control_of(tmp_path / "controlnet_epoch_15.pth", checkpoint(model.unet, network))


def random_network(unet: UNet2DModel) -> ControlNetwork:
    torch.manual_seed(7)
    network = beside(unet)
    with torch.no_grad():
        for parameter in [*network.hint.parameters(), *network.skips.parameters(), *network.middle.parameters()]:
            parameter.add_(torch.randn_like(parameter) / 4)
    return network


@pytest.fixture
def control(model, with_weights) -> MaskControl:
    return with_weights(random_network(model.unet))


@pytest.fixture
def pictures() -> torch.Tensor:
    return torch.stack([from_pil(smooth_picture(seed)) for seed in range(2)])


def faces(pictures: torch.Tensor) -> torch.Tensor:
    return CentreFace().mask(pictures, (64, 64))


Z = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_a_network_of_zeros_leaves_the_frozen_one_as_it_is(model, with_weights, pictures):
    network = beside(model.unet)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    up, down = with_weights(network).denoisers(model, faces(pictures))
    for t in (1, 500):
        torch.testing.assert_close(up(Z, t), model.eps(Z, t))
        torch.testing.assert_close(down(Z, t), model.eps(Z, t))


def test_before_training_it_doubles_the_bare_skips(model, with_weights, pictures):
    """Its encoder is the frozen one's and its zero convolutions give nothing, so c_i is s_i for conv_in and the downsampler."""
    _, eps = with_weights(beside(model.unet)).denoisers(model, faces(pictures))
    unet = UNet2DModel.from_pretrained(Path(model.source, "unet"))
    for block in unet.up_blocks:  # the first skip of each is a bare one: the downsampler's, and conv_in's
        block.register_forward_pre_hook(lambda _, given: (given[0], (2 * given[1][0], *given[1][1:]), *given[2:]))
    with torch.no_grad():
        torch.testing.assert_close(eps(Z, 300), unet(Z, 300).sample)
    assert not torch.allclose(eps(Z, 300), model.eps(Z, 300))


def test_other_masks_give_other_noise_and_no_gradient_is_kept(model, control, pictures):
    none = torch.zeros_like(faces(pictures))
    one, other = (control.denoisers(model, mask)[1] for mask in (faces(pictures), none))
    assert not torch.allclose(one(Z, 300), other(Z, 300))
    assert not one(Z.clone().requires_grad_(True), 300).requires_grad
    mixed = torch.cat([faces(pictures)[:1], none[1:]])
    both = control.denoisers(model, mixed)[1](Z, 300)
    torch.testing.assert_close(both, torch.stack([one(Z, 300)[0], other(Z, 300)[1]]))


def test_a_network_that_predicts_v_is_turned_to_noise(model, control, pictures):
    as_v = LatentDiffusion(model.source, noise={**LDM_NOISE, "prediction_type": "v_prediction"})
    abar = as_v.schedule.abar[300]
    as_noise, as_velocity = (control.denoisers(m, faces(pictures))[1](Z, 300) for m in (model, as_v))
    torch.testing.assert_close(as_velocity, abar**0.5 * as_noise + (1 - abar) ** 0.5 * Z)


def test_the_method_shows_the_mask_where_it_is_told_to(model, control, pictures):
    method = SignFlip(model, DDIM(4), CentreFace(), control=control)
    assert isinstance(method, Reversible)
    up, down = method.denoisers(pictures)
    torch.testing.assert_close(up(Z, 300), down(Z, 300))
    down_only = replace(method, control=replace(control, inversion=False))
    up, same = down_only.denoisers(pictures)
    torch.testing.assert_close(up(Z, 300), model.eps(Z, 300))
    torch.testing.assert_close(same(Z, 300), down(Z, 300))
    made = [m.anonymize(pictures, KEYS, IDS).images for m in (method, down_only, replace(method, control=None))]
    assert not any(torch.equal(a, b) for a, b in ((made[0], made[1]), (made[0], made[2]), (made[1], made[2])))


def test_the_contract_of_the_method(model, control, pictures):
    method = SignFlip(model, DDIM(4), CentreFace(), control=control)
    before = model.evaluations.total()
    published = method.anonymize(pictures, KEYS, IDS)
    assert model.evaluations.total() - before == 2 * 2 * 4
    recovered = method.recover(published, KEYS)
    assert recovered.shape == pictures.shape
    assert torch.equal(method.anonymize(pictures[1:], KEYS[1:], IDS[1:]).images, published.images[1:])
    for attack in (WrongKey(), NoKey()):
        assert not torch.equal(attack(published, KEYS, method), recovered)


def test_a_solver_that_splits_its_batch_is_refused(model, control, pictures):
    eps, _ = control.denoisers(model, faces(pictures))
    with pytest.raises(ValueError, match=r"set solver\.tolerance=null"):
        eps(Z[:1], 300)


def test_missing_weights_are_told_at_once(model, pictures, nothing_fetched):
    method = SignFlip(model, DDIM(4), CentreFace(), control=MaskControl())
    (message,) = missing_parts(method)
    assert message.startswith("controlnet_masks: not found.")
    assert "fetch controlnet_masks" in message
    assert missing_parts(replace(method, control=None)) == []
    with pytest.raises(MissingWeights, match="controlnet_masks"):
        method.anonymize(pictures, KEYS, IDS)


def test_the_weights_are_part_of_a_file_s_description(model, control, with_weights):
    method = SignFlip(model, DDIM(4), CentreFace(), control=control)
    other = replace(method, control=with_weights(beside(model.unet)))
    assert described(method) != described(other)
    assert control.cards()[0].sha256[:DIGITS].encode() in described(method)


def test_the_rest_of_a_checkpoint_is_not_needed_and_its_hint_has_its_place(model, control, tmp_path):
    network = random_network(model.unet)
    state = checkpoint(model.unet, network)
    assert "control_copy_unet_hint_block.3.2.weight" in state  # 3: first layer, two halvings, last layers
    needed = {name: value for name, value in state.items() if name.startswith(tuple(AUTHORS))}
    assert needed.keys() < state.keys()
    read = control_of(tmp_path / "needed.pth", needed).network(model).state_dict()
    assert read.keys() == network.state_dict().keys()
    assert all(torch.equal(read[name], value) for name, value in network.state_dict().items())


def test_another_file_is_refused(model, pictures, tmp_path):
    other = control_of(tmp_path / "other.pth", {"control_copy_unet.conv_in.weight": torch.zeros(3)})
    with pytest.raises(WrongWeights, match=r"other\.pth: not the weights of a control network for"):
        other.denoisers(model, faces(pictures))
    code = control_of(tmp_path / "code.pth", MaskControl())  # which to read would run what a stranger wrote
    with pytest.raises(BadModel, match=r"code\.pth: cannot be read as part of a model"):
        code.denoisers(model, faces(pictures))


def test_a_network_for_another_autoencoder_is_refused(model, with_weights, pictures):
    control = with_weights(ControlNetwork(model.unet.config, 3))
    with pytest.raises(BadModel, match=r"tiny: brings masks to \(8, 8\), latents are \(16, 16\)"):
        control.denoisers(model, faces(pictures))


@pytest.mark.parametrize(
    "other", [{"num_class_embeds": 3}, {"time_embedding_type": "fourier"}, {"center_input_sample": True}]
)
def test_networks_of_other_kinds_are_refused(model, other):
    with pytest.raises(BadModel, match="plain UNet2DModel alone"):
        ControlNetwork(dict(model.unet.config) | other, 2)
