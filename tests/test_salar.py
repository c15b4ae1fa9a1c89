"""Salar et al.: the guidance gradient, FaRL's tower, and the method on tiny components in the real layouts."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from torch.nn.functional import interpolate, layer_norm, linear

from experiments.harness.preflight import missing_parts
from keyanon.channel.pixels import from_pil, to_bytes
from keyanon.diffusion.model import LatentDiffusion
from keyanon.methods.baselines.salar import Farl, Salar, pulled
from keyanon.methods.baselines.sampling import keyed_normals
from keyanon.types import Anonymizer, Image, Mask
from keyanon.weights import CARDS, MissingWeights, WrongWeights
from tests.conftest import CentreFace, smooth_picture
from tests.test_configs import composed

IDS = ("a", "b")
WIDTH, PATCH, GRID, LAYERS = 64, 16, 2, 2


def clip_state() -> dict[str, torch.Tensor]:
    """Random weights under OpenAI's names, as FaRL's file has them."""
    generator = torch.Generator().manual_seed(4)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    state = {
        "visual.class_embedding": random(WIDTH),
        "visual.positional_embedding": random(GRID**2 + 1, WIDTH),
        "visual.proj": random(WIDTH, 32),
        "visual.conv1.weight": random(WIDTH, 3, PATCH, PATCH),
        "logit_scale": torch.tensor(1.0),
        "visual.other.weight": random(3),  # FaRL's file has more than CLIP's, its users load it loosely
    }
    for name in ("ln_pre", "ln_post"):
        state |= {f"visual.{name}.weight": 1 + random(WIDTH), f"visual.{name}.bias": random(WIDTH)}
    for layer in range(LAYERS):
        block = f"visual.transformer.resblocks.{layer}."
        shapes = {"attn.in_proj_": 3 * WIDTH, "attn.out_proj.": WIDTH, "mlp.c_fc.": 4 * WIDTH, "mlp.c_proj.": WIDTH}
        for name, rows in shapes.items():
            columns = 4 * WIDTH if name == "mlp.c_proj." else WIDTH
            state |= {f"{block}{name}weight": random(rows, columns), f"{block}{name}bias": random(rows)}
        for name in ("ln_1", "ln_2"):
            state |= {f"{block}{name}.weight": 1 + random(WIDTH), f"{block}{name}.bias": random(WIDTH)}
    return state


def clip_tokens(state: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """CLIP's image tower written out, one head of 64."""

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return layer_norm(x, (WIDTH,), state[f"{name}.weight"], state[f"{name}.bias"])

    patches = torch.nn.functional.conv2d(images, state["visual.conv1.weight"], stride=PATCH).flatten(2).mT
    first = state["visual.class_embedding"].expand(len(images), 1, -1)
    x = norm(torch.cat([first, patches], 1) + state["visual.positional_embedding"], "visual.ln_pre")
    for layer in range(LAYERS):
        block = f"visual.transformer.resblocks.{layer}."
        q, k, v = linear(
            norm(x, f"{block}ln_1"), state[f"{block}attn.in_proj_weight"], state[f"{block}attn.in_proj_bias"]
        ).chunk(3, -1)
        attended = (q @ k.mT / WIDTH**0.5).softmax(-1) @ v
        x = x + linear(attended, state[f"{block}attn.out_proj.weight"], state[f"{block}attn.out_proj.bias"])
        hidden = linear(norm(x, f"{block}ln_2"), state[f"{block}mlp.c_fc.weight"], state[f"{block}mlp.c_fc.bias"])
        hidden = hidden * torch.sigmoid(1.702 * hidden)
        x = x + linear(hidden, state[f"{block}mlp.c_proj.weight"], state[f"{block}mlp.c_proj.bias"])
    return x


@pytest.fixture(scope="module")
def farl(tmp_path_factory) -> Farl:
    path = tmp_path_factory.mktemp("farl") / CARDS["farl_b16_ep64"].filename
    torch.save({"state_dict": clip_state()}, path)
    return Farl(weights=str(path))


@pytest.fixture
def images() -> torch.Tensor:
    return torch.stack([from_pil(smooth_picture(seed, 32)) for seed in (1, 2)])


@pytest.fixture
def method(tiny_sd_inpainting, farl, tmp_path) -> Salar:
    smooth_picture(3, 80).save(tmp_path / "target.png")
    target = str(tmp_path / "target.png")
    return Salar(LatentDiffusion(str(tiny_sd_inpainting)), CentreFace(), farl, target, size=32, steps=2)


def test_the_gradient_of_a_linear_toy_is_the_analytic_one():
    """Of sum over n tokens of |F D z - f|^2 / d:  2/d (F D)^T (F D z - f)."""
    generator = torch.Generator().manual_seed(0)
    D, F = torch.randn(12, 8, generator=generator), torch.randn(5 * 6, 12, generator=generator)
    z, wanted = torch.randn(3, 2, 2, 2, generator=generator), torch.randn(1, 5, 6, generator=generator)
    got = pulled(
        z, lambda z: (z.flatten(1) @ D.T).view(-1, 3, 2, 2), lambda x: (x.flatten(1) @ F.T).view(-1, 5, 6), wanted
    )
    residual = z.flatten(1) @ (F @ D).T - wanted.flatten(1)
    torch.testing.assert_close(got, (2 / 6 * residual @ (F @ D)).view_as(z))


def test_farl_is_clip_s_tower_without_its_normalization(farl, images):
    large = interpolate(images, (72, 72), mode="nearest")
    small = interpolate(large, (32, 32), mode="bilinear", antialias=True)
    tokens = farl.tokens(large)
    assert tokens.shape == (2, GRID**2 + 1, WIDTH)
    torch.testing.assert_close(tokens, clip_tokens(clip_state(), small), rtol=1e-4, atol=1e-4)


def test_another_file_is_refused(tmp_path, images):
    torch.save(
        {"state_dict": {key: value for key, value in clip_state().items() if "ln_2" not in key}}, tmp_path / "a.pth"
    )
    with pytest.raises(WrongWeights, match=r"a\.pth: not FaRL's file, it has no .*layer_norm2"):
        Farl(weights=str(tmp_path / "a.pth")).tokens(images)


def test_a_single_step_by_hand(method, images, key):
    model, one = method.backbone, replace(method, steps=1)
    noise = keyed_normals(one, [key] * 2, IDS, images, "salar", (2, 4, 16, 16))
    z0, abar = model.encode(images), model.schedule.abar
    z = abar[-1] ** 0.5 * z0 + (1 - abar[-1]) ** 0.5 * noise[:, 0]
    face = CentreFace().mask(images, (32, 32))
    cells = CentreFace().mask(images, (16, 16)).float()
    e = model.eps(torch.cat([z, cells, model.encode(images * ~face)], 1), 1)
    x0 = (z - (1 - abar[1]) ** 0.5 * e) / abar[1] ** 0.5
    g = pulled(x0, method.decode, method.farl.tokens, method.farl.tokens(method.face[None]))
    sigma = ((1 - abar[0]) / (1 - abar[1]) * (1 - abar[1] / abar[0])) ** 0.5
    z = abar[0] ** 0.5 * x0 + (1 - abar[0] - sigma**2) ** 0.5 * e + sigma * noise[:, 1] - sigma * 0.8 * g
    difference = one.anonymize(images, [key] * 2, IDS).images.int() - to_bytes(model.decode(z)).int()
    assert difference.abs().max() <= 1
    assert g.abs().max() > 0


@pytest.mark.usefixtures("same_noise")
def test_the_pull_pulls(method, images, key):
    """More pull, nearer to the target in FaRL's tokens."""
    assert isinstance(method, Anonymizer)
    wanted = method.farl.tokens(method.face[None])
    distances = []
    for pull in (-2.0, 0.0, 2.0):
        published = replace(method, pull=pull).anonymize(images, [key] * 2, IDS).images
        tokens = method.farl.tokens(published / 127.5 - 1)
        distances.append((tokens - wanted).square().mean().item())
    assert distances[0] > distances[1] > distances[2]


def test_a_picture_s_result_hangs_on_its_id_and_not_on_its_batch(method, images, key):
    both = method.anonymize(images, [key] * 2, IDS).images
    assert torch.equal(method.anonymize(images[1:], [key], IDS[1:]).images, both[1:])
    assert torch.equal(method.anonymize(images.flip(0), [key] * 2, IDS[::-1]).images, both.flip(0))
    assert not torch.equal(method.anonymize(images[1:], [key], ["c"]).images, both[1:])


def test_other_sizes_come_back_at_theirs(method, images, key):
    published = method.anonymize(interpolate(images, (48, 48)), [key] * 2, IDS).images
    assert published.shape == (2, 3, 48, 48)


def test_forty_five_steps_are_the_forty_six_of_latent_diffusion_s_grid(method):
    timesteps, levels = replace(method, steps=45).grid(method.backbone.schedule)
    assert timesteps == [1 + 22 * i for i in range(46)]
    assert levels[0][0] ** 2 == pytest.approx(method.backbone.schedule.abar[0])
    assert levels[-1][0] ** 2 == pytest.approx(method.backbone.schedule.abar[991])


@dataclass(frozen=True)
class Dot:
    """Finds one pixel."""

    def mask(self, images: Image, size: tuple[int, int]) -> Mask:
        mask = torch.zeros(len(images), 1, *size, dtype=torch.bool)
        mask[..., 12, 20] = True
        return mask


def test_what_is_kept_grows_by_its_square(method, images):
    whole, some = method.region(images), replace(method, keep=Dot()).region(images)
    expected = whole.clone()
    expected[..., 9:16, 17:24] = False
    assert torch.equal(some, expected)
    assert (whole ^ some).sum() == 2 * 49


@pytest.mark.parametrize("target", [None, "nowhere/face.png"])
def test_a_missing_target_is_named(method, images, key, target):
    without = replace(method, target=target)
    assert method.missing() is None
    with pytest.raises(MissingWeights, match=f"anonymizer.target={target}: no picture file"):
        without.anonymize(images, [key] * 2, IDS)


@pytest.mark.usefixtures("nothing_fetched")
def test_missing_weights_are_named():
    method = instantiate(composed("anonymizer=salar", "parser=ellipse").anonymizer, _convert_="all")
    text = "\n".join(missing_parts(method))
    for name in (
        "sd2-community/stable-diffusion-2-inpainting",
        Path(CARDS["farl_b16_ep64"].filename).name,
        Path(CARDS["bisenet"].filename).name,
        "anonymizer.target",
    ):
        assert name in text
    assert method.about.code_licence == "none"
    assert (method.keep.region, method.dilation) == ("glasses", 7)
