"""Networks of recognizers: names and sizes of the published weights, embeddings of the published code, and wrong files."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from keyanon.faces.backbones import FaceTransformer, IResNet, TransformerBlock, load_face_transformer, load_iresnet
from keyanon.weights import WrongWeights

TINY_STAGES = [(4, 1), (4, 2), (8, 1), (8, 1)]
R50_STAGES = [(64, 3), (128, 4), (256, 14), (512, 3)]


def chirps(net: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Numbers for a network, the same on every machine: a chirp along each tensor."""
    state = {}
    for place, (name, value) in enumerate(net.state_dict().items()):
        if not value.is_floating_point():
            state[name] = value
            continue
        chirp = torch.cos(torch.arange(value.numel(), dtype=torch.float64) ** 2 * 0.7 + place).view(value.shape)
        if value.ndim > 1:
            state[name] = (chirp * value[0].numel() ** -0.5).float()
        else:
            state[name] = (float(name.endswith(("weight", "running_var"))) + 0.3 * chirp).float()
    return state


def save_tiny_iresnet(path: Path) -> Path:
    """A backbone.pth of 16 numbers an embedding."""
    torch.save(chirps(IResNet(4, TINY_STAGES, 16)), path)
    return path


def save_tiny_face_transformer(path: Path) -> Path:
    """A model.safetensors of 16 numbers an embedding, with two heads."""
    state = chirps(FaceTransformer(patch=28, width=64, depth=2, hidden=96, dimension=16))
    save_file({f"model.net.{name}": value for name, value in state.items()}, path)
    return path


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    along = torch.arange(112) / 112
    across = torch.sin(9 * along)[:, None] * torch.cos(5 * along + 1)[None]
    return torch.stack(
        [torch.stack([across, across.T, -across]), torch.stack([across.flip(0), across, along.expand(112, -1)])]
    )


def test_r50_has_the_names_and_the_size_of_the_published_file():
    with torch.device("meta"):
        state = IResNet(64, R50_STAGES, 512).state_dict()
    assert len(state) == 475
    # 174,680,546 bytes by the hub's record, of which the format itself takes some
    size = sum(value.numel() * value.element_size() for value in state.values())
    assert 0.999 * 174_680_546 < size < 174_680_546
    block = {name for name in state if name.startswith("layer3.0.")}
    weights = {f"layer3.0.{part}.weight" for part in ("conv1", "conv2", "prelu", "downsample.0")}
    numbers = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    norms = {f"layer3.0.{bn}.{part}" for bn in ("bn1", "bn2", "bn3", "downsample.1") for part in numbers}
    assert block == weights | norms
    outside = {name.partition(".")[0] for name in state}
    assert outside == {"conv1", "bn1", "prelu", "layer1", "layer2", "layer3", "layer4", "bn2", "fc", "features"}
    assert state["layer4.2.conv2.weight"].shape == (512, 512, 3, 3)
    assert state["fc.weight"].shape == (512, 512 * 7 * 7)


def test_the_face_transformer_has_the_names_and_sizes_of_cvlface_base():
    with torch.device("meta"):
        state = FaceTransformer(patch=8, width=512, depth=24, hidden=1536, dimension=512).state_dict()
    block = {name.removeprefix("blocks.23.") for name in state if name.startswith("blocks.23.")}
    assert block == {"attn.qkv.weight"} | {
        f"{layer}.{part}"
        for layer in ("norm1", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
        for part in ("weight", "bias")
    }
    outside = {name: tuple(value.shape) for name, value in state.items() if not name.startswith("blocks.")}
    assert outside["patch_embed.proj.weight"] == (512, 3, 8, 8)
    assert outside["pos_embed"] == (1, 196, 512)
    assert outside["feature.0.weight"] == (512, 512 * 196)
    numbers = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    head = {"feature.0.weight", "feature.2.weight", *(f"feature.{n}.{part}" for n in (1, 3) for part in numbers)}
    assert {name for name in outside if name.startswith(("norm", "feature"))} == {"norm.weight", "norm.bias"} | head


# Of the same weights by InsightFace's and CVLface's own modules: the first five numbers of two pictures.
INSIGHTFACE = [
    [-1.3017258644, -0.9598930478, -0.0950774699, -1.1247242689, 0.8220483065],
    [-1.6501618624, -1.2579700947, -1.0012142658, -1.2568749189, 0.7562730312],
]
CVLFACE = [
    [-0.2233221829, 0.1485745758, 0.5803551674, -1.1194307804, -0.3823822737],
    [-0.1469954401, -0.1828268200, -0.0597230755, -1.1374683380, -0.3235955238],
]


def test_embeddings_are_those_of_the_published_code(tmp_path, pictures):
    with torch.inference_mode():
        resnet = load_iresnet(save_tiny_iresnet(tmp_path / "backbone.pth"))(pictures)
        transformer = load_face_transformer(save_tiny_face_transformer(tmp_path / "model.safetensors"))(pictures)
    assert resnet.shape == transformer.shape == (2, 16)
    torch.testing.assert_close(resnet[:, :5], torch.tensor(INSIGHTFACE), atol=1e-5, rtol=0)
    torch.testing.assert_close(transformer[:, :5], torch.tensor(CVLFACE), atol=1e-5, rtol=0)


def test_a_block_of_the_transformer_is_pytorchs_own():
    torch.manual_seed(0)
    block = TransformerBlock(96, 48)
    theirs = torch.nn.TransformerEncoderLayer(
        96, 3, 48, dropout=0, activation=torch.nn.functional.relu6, batch_first=True, norm_first=True
    )
    names = {
        "attn.qkv.weight": "self_attn.in_proj_weight", "attn.proj.weight": "self_attn.out_proj.weight",
        "attn.proj.bias": "self_attn.out_proj.bias", "mlp.fc1.weight": "linear1.weight", "mlp.fc1.bias": "linear1.bias",
        "mlp.fc2.weight": "linear2.weight", "mlp.fc2.bias": "linear2.bias",
    }  # fmt: skip
    state = {names.get(name, name): value for name, value in block.state_dict().items()}
    theirs.load_state_dict(state | {"self_attn.in_proj_bias": torch.zeros(3 * 96)})
    tokens = 3 * torch.randn(2, 7, 96)
    torch.testing.assert_close(block(tokens), theirs.train()(tokens), atol=1e-5, rtol=1e-5)


def test_a_network_has_the_sizes_of_its_file_and_computes_in_single_precision(tmp_path, pictures):
    state = torch.load(save_tiny_iresnet(tmp_path / "backbone.pth"), weights_only=True)
    torch.save(
        {name: value.half() if value.is_floating_point() else value for name, value in state.items()},
        tmp_path / "half.pth",
    )
    net = load_iresnet(tmp_path / "half.pth")
    assert net.dimension == 16
    assert [len(stack) for stack in (net.layer1, net.layer2, net.layer3, net.layer4)] == [1, 2, 1, 1]
    rows = net(pictures)
    assert rows.dtype == torch.float32
    assert not rows.requires_grad
    torch.testing.assert_close(rows[:, :5], torch.tensor(INSIGHTFACE), atol=0.02, rtol=0)


def test_making_a_network_draws_no_random_numbers(tmp_path):
    paths = save_tiny_iresnet(tmp_path / "backbone.pth"), save_tiny_face_transformer(tmp_path / "model.safetensors")
    torch.manual_seed(0)
    before = torch.get_rng_state()
    load_iresnet(paths[0]), load_face_transformer(paths[1])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "other", "lacking", "more", "another size"])
def test_a_file_that_is_no_such_network_is_named(tmp_path, damage):
    resnet = save_tiny_iresnet(tmp_path / "backbone.pth")
    transformer = save_tiny_face_transformer(tmp_path / "model.safetensors")
    states = torch.load(resnet, weights_only=True), load_file(transformer)
    bad = tmp_path / "bad.pth", tmp_path / "bad.safetensors"
    for path, state, good in zip(bad, states, (resnet, transformer), strict=True):
        last = [name for name in state if name.endswith(".bias")][-1]
        changed = {
            "other": {"weight": torch.zeros(3)},
            "lacking": {name: value for name, value in state.items() if name != last},
            "more": state | {last + "2": torch.zeros(3)},
            "another size": {name: value[:, :-1].contiguous() if value.ndim == 3 or name == "fc.weight" else value
                             for name, value in state.items()},
        }  # fmt: skip
        if damage in changed:
            save_file(changed[damage], path) if path is bad[1] else torch.save(changed[damage], path)
        else:
            path.write_bytes({"empty": b"", "text": b"<html>", "cut": good.read_bytes()[:-500]}[damage])
    with pytest.raises(WrongWeights, match=r"bad\.pth: not a backbone of InsightFace"):
        load_iresnet(bad[0])
    with pytest.raises(WrongWeights, match=r"bad\.safetensors: not a vision transformer of CVLface"):
        load_face_transformer(bad[1])
