"""NullFace: noise that leads back, identity that is pushed away, on tiny components in the real layouts."""

from dataclasses import dataclass, replace
from hashlib import file_digest
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from hydra.utils import instantiate

from experiments.harness.preflight import missing_parts
from keyanon.channel.pixels import to_bytes
from keyanon.diffusion.model import BadModel, LatentDiffusion
from keyanon.diffusion.solvers import NoiseSchedule
from keyanon.methods.baselines.nullface import FaceIdAdapter, NoiseInversion, NullFace, NullFaceCore
from keyanon.methods.baselines.sampling import keyed_normals
from keyanon.types import Anonymizer, Image, Mask
from keyanon.weights import CARDS
from tests.conftest import CentreFace, PixelRecognizer
from tests.test_configs import composed

IDS = ("a", "b")
SHORT = NoiseInversion(steps=10, skip=7)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


@dataclass(frozen=True)
class Nowhere:
    def mask(self, images: Image, size: tuple[int, int]) -> Mask:
        return torch.zeros(len(images), 1, *size, dtype=torch.bool)


def attentions(unet: UNet2DConditionModel) -> list[tuple[int, str, torch.nn.Module]]:
    names = [name.removesuffix(".processor") for name in unet.attn_processors]
    return [(i, name, unet.get_submodule(name)) for i, name in enumerate(names)]


def save_tiny_adapter(path: Path, unet: UNet2DConditionModel, embedding: int = 64, low_rank: bool = True) -> Path:
    """Random weights under exactly the names of ip-adapter-faceid_sd15.bin."""
    generator = torch.Generator().manual_seed(2)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    width = unet.config.cross_attention_dim
    proj = {
        "proj.0.weight": random(2 * embedding, embedding), "proj.0.bias": random(2 * embedding),
        "proj.2.weight": random(4 * width, 2 * embedding), "proj.2.bias": random(4 * width),
        "norm.weight": torch.ones(width), "norm.bias": torch.zeros(width),
    }  # fmt: skip
    parts = {}
    for number, name, attention in attentions(unet):
        hidden = attention.to_q.weight.shape[0]
        if name.endswith("attn2"):
            for short in ("to_k_ip", "to_v_ip"):
                parts[f"{number}.{short}.weight"] = random(hidden, width)
        for short in ("to_q", "to_k", "to_v", "to_out") if low_rank else ():
            layer = attention.to_out[0] if short == "to_out" else getattr(attention, short)
            parts[f"{number}.{short}_lora.down.weight"] = random(2, layer.weight.shape[1])
            parts[f"{number}.{short}_lora.up.weight"] = random(layer.weight.shape[0], 2)
    torch.save({"image_proj": proj, "ip_adapter": parts}, path)
    return path


def own_adapter(path: Path) -> FaceIdAdapter:
    with path.open("rb") as opened:
        card = replace(CARDS["ip_adapter_faceid_sd15"], sha256=file_digest(opened, "sha256").hexdigest())
    return FaceIdAdapter(card=card, weights=str(path))


@pytest.fixture(scope="module")
def adapter_file(tiny_sd, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("adapter") / "adapter.bin"
    return save_tiny_adapter(path, UNet2DConditionModel.from_pretrained(tiny_sd / "unet"))


@pytest.fixture
def method(tiny_sd, adapter_file) -> NullFace:
    return NullFace(
        LatentDiffusion(str(tiny_sd)),
        own_adapter(adapter_file),
        PixelRecognizer(),
        CentreFace(),
        SHORT,
        32,
        mask_delay=1,
    )


# The inversion


def test_the_stored_noise_leads_back_along_the_path(model, images):
    """Every latent of the path comes back; below the lowest the network's estimate is all that is missing."""
    z0, schedule = model.encode(images), model.schedule
    noise = torch.randn(2, 3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    start, stored = SHORT.invert(model.eps, schedule, z0, noise)
    visited = []
    back = SHORT.replay(lambda z, t: visited.append(z) or model.eps(z, t), schedule, start, stored)
    timesteps, levels = SHORT.grid(schedule)
    assert timesteps == [0, 100, 200]
    for z, i in zip(visited, (3, 2, 1), strict=True):
        torch.testing.assert_close(z, levels[i][0] * z0 + levels[i][1] * noise[:, i - 1], rtol=0, atol=1e-4)
    a, s = levels[1]
    torch.testing.assert_close(back, z0 + s / a * (noise[:, 0] - model.eps(visited[-1], 0)), rtol=0, atol=1e-4)
    assert torch.equal(stored[0], torch.zeros_like(z0))


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_a_network_that_is_right_gets_the_input_back_exactly(eta):
    """Where there is one picture only, the true eps is known: the replay ends at the picture itself."""
    schedule = NoiseSchedule(tuple(torch.linspace(0.99, 0.01, 1000, dtype=torch.float64).tolist()))
    z0, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 30, 4, 8, 8)
    inversion = NoiseInversion(eta=eta)

    def eps(z: torch.Tensor, t: int) -> torch.Tensor:
        return (z - schedule.abar[t] ** 0.5 * z0) / (1 - schedule.abar[t]) ** 0.5

    start, stored = inversion.invert(eps, schedule, z0, noise)
    torch.testing.assert_close(inversion.replay(eps, schedule, start, stored), z0, rtol=0, atol=1e-4)


def test_the_noise_of_a_step_by_hand():
    """Where eps is 0, the mean of DDPM's step is a'/a z and its variance (1 - abar')/(1 - abar) (1 - abar/abar')."""
    schedule = NoiseSchedule((0.9, 0.5), offset=0)
    z0, noise = torch.randn(1, 1, 2, 2), torch.randn(1, 2, 1, 2, 2)
    _, stored = NoiseInversion(steps=2, skip=0).invert(lambda z, t: torch.zeros_like(z), schedule, z0, noise)
    z1, z2 = 0.9**0.5 * z0 + 0.1**0.5 * noise[:, 0], 0.5**0.5 * (z0 + noise[:, 1])
    variance = 0.1 / 0.5 * (1 - 0.5 / 0.9)
    torch.testing.assert_close(stored[1], (z1 - (0.9 / 0.5) ** 0.5 * z2) / variance**0.5)


def test_the_default_schedule_is_diffusers_ddim_with_the_last_thirty_of_a_hundred_steps(tiny_sd):
    timesteps, levels = NoiseInversion().grid(LatentDiffusion(str(tiny_sd)).schedule)
    assert timesteps == [1 + 10 * i for i in range(30)]
    assert len(levels) == 31


@pytest.mark.parametrize("change", [{"skip": 100}, {"eta": 0.0}])
def test_an_inversion_of_nothing_is_refused(change):
    with pytest.raises(ValueError, match="steps=100"):
        NoiseInversion(**change)


# The core


@pytest.mark.usefixtures("same_noise")
def test_the_core_without_a_face_is_the_replay(model, images, key):
    core = NullFaceCore(model, Nowhere(), SHORT, mask_delay=0)
    assert isinstance(core, Anonymizer)
    noise = keyed_normals(core, [key] * 2, IDS, images, "nullface", (3, 3, 8, 8))
    start, stored = SHORT.invert(model.eps, model.schedule, model.encode(images), noise)
    expected = to_bytes(model.decode(SHORT.replay(model.eps, model.schedule, start, stored)))
    before = model.evaluations.total()
    assert torch.equal(core.anonymize(images, [key] * 2, IDS).images, expected)
    assert model.evaluations.total() - before == 2 * (2 + 3)
    face = replace(core, parser=CentreFace()).anonymize(images, [key] * 2, IDS).images
    assert not torch.equal(face, expected)
    everywhere = replace(core, mask_delay=3).anonymize(images, [key] * 2, IDS).images
    assert torch.equal(
        everywhere, replace(core, parser=CentreFace(), mask_delay=3).anonymize(images, [key] * 2, IDS).images
    )
    assert not torch.equal(everywhere, face)


def test_a_picture_s_result_hangs_on_its_id_and_not_on_its_batch(model, images, key):
    core = NullFaceCore(model, CentreFace(), SHORT, mask_delay=1)
    both = core.anonymize(images, [key] * 2, IDS).images
    assert torch.equal(core.anonymize(images[1:], [key], IDS[1:]).images, both[1:])
    assert torch.equal(core.anonymize(images.flip(0), [key] * 2, IDS[::-1]).images, both.flip(0))
    assert not torch.equal(core.anonymize(images[1:], [key], ["c"]).images, both[1:])


# The method


def test_the_negated_embedding_and_no_identity_reach_the_network(method, images, key):
    seen = []
    method.unet.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["added_cond_kwargs"]["image_embeds"][0]), with_kwargs=True
    )
    method.anonymize(images, [key] * 2, IDS)
    embeddings = PixelRecognizer().embed(images)
    assert len(seen) == 2 + 2 * 3
    for number, rows in enumerate(seen):
        pushed = number >= 2 and number % 2 == 1
        expected = -embeddings if pushed else torch.zeros_like(embeddings)
        torch.testing.assert_close(rows[:2, 0], expected)
    z = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    away, toward, nobody = (method.eps(z, 101, sign * embeddings) for sign in (-1, 1, 0))
    for one, other in ((away, toward), (away, nobody), (toward, nobody)):
        assert (one - other).abs().max() > 1e-4


@pytest.mark.usefixtures("same_noise")
def test_without_guidance_the_input_comes_back(method, images, key):
    """As far as the last step goes: with the network's estimate in place of the noise."""
    noise, nobody = keyed_normals(method, [key] * 2, IDS, images, "nullface", (3, 4, 16, 16)), torch.zeros(2, 64)
    schedule, z0 = method.backbone.schedule, method.backbone.encode(images)
    levels = SHORT.grid(schedule)[1]
    (a, s), (a0, s0) = levels[1], levels[0]
    z1 = a * z0 + s * noise[:, 0]
    e = method.eps(z1, 1, nobody)
    sigma = s0 / s * (1 - (a / a0) ** 2) ** 0.5
    last = a0 * (z1 - s * e) / a + (s0**2 - sigma**2) ** 0.5 * e
    published = replace(method, guidance=0.0).anonymize(images, [key] * 2, IDS).images
    difference = published.int() - to_bytes(method.backbone.decode(last)).int()
    assert difference.abs().max() <= 1
    assert not torch.equal(method.anonymize(images, [key] * 2, IDS).images, published)


@pytest.mark.usefixtures("same_noise")
def test_the_mask_counts_after_its_delay(method, images, key):
    def published(**change):
        return replace(method, **change).anonymize(images, [key] * 2, IDS).images

    assert torch.equal(published(parser=Nowhere(), mask_delay=0), published(guidance=0.0))
    assert torch.equal(published(parser=Nowhere(), mask_delay=3), published(mask_delay=3))
    assert not torch.equal(published(mask_delay=0), published(mask_delay=3))


@pytest.mark.usefixtures("same_noise")
def test_without_a_face_nothing_is_pushed(method, key, caplog):
    black = torch.full((1, 3, 32, 32), -1.0)
    published = method.anonymize(black, [key], ["black"]).images
    assert torch.equal(published, replace(method, guidance=0.0).anonymize(black, [key], ["black"]).images)
    assert "black: no face found" in caplog.text


def test_the_method_s_result_hangs_on_the_id_and_not_on_the_batch(method, images, key):
    both = method.anonymize(images, [key] * 2, IDS).images
    assert torch.equal(method.anonymize(images[1:], [key], IDS[1:]).images, both[1:])
    assert not torch.equal(method.anonymize(images[1:], [key], ["c"]).images, both[1:])


def test_the_attached_network_is_the_one_that_diffusers_pipeline_makes(tiny_sd, tmp_path):
    """Without low-rank parts, which diffusers leaves out here: same answer to the same embedding."""
    plain = UNet2DConditionModel.from_pretrained(tiny_sd / "unet").eval()
    path = save_tiny_adapter(tmp_path / "plain.bin", plain, low_rank=False)
    backbone = LatentDiffusion(str(tiny_sd))
    ours = NullFace(backbone, own_adapter(path), PixelRecognizer(), CentreFace(), SHORT)
    pipeline = StableDiffusionPipeline(
        backbone.autoencoder, None, None, plain, None, None, None, requires_safety_checker=False
    )
    state = torch.load(path, weights_only=True)
    pipeline.load_ip_adapter(state, subfolder=None, weight_name=None, image_encoder_folder=None)
    z, e = torch.randn(2, 4, 16, 16), torch.randn(2, 64)
    with torch.no_grad():
        conditions = {"image_embeds": [e[:, None]]}
        theirs = plain(z, 7, backbone.condition.expand(2, -1, -1), added_cond_kwargs=conditions).sample
    torch.testing.assert_close(ours.eps(z, 7, e), theirs, rtol=1e-4, atol=1e-5)
    pipeline.set_ip_adapter_scale(0.3)
    weaker = replace(ours, backbone=LatentDiffusion(str(tiny_sd)), adapter=replace(ours.adapter, scale=0.3))
    with torch.no_grad():
        theirs = plain(z, 7, backbone.condition.expand(2, -1, -1), added_cond_kwargs=conditions).sample
    torch.testing.assert_close(weaker.eps(z, 7, e), theirs, rtol=1e-4, atol=1e-5)


def test_the_low_rank_parts_are_added_to_the_weights(tiny_sd, adapter_file, method):
    base = UNet2DConditionModel.from_pretrained(tiny_sd / "unet")
    parts = torch.load(adapter_file, weights_only=True)["ip_adapter"]
    assert len(attentions(base)) > 1
    for number, name, attention in attentions(base):
        changed = method.unet.get_submodule(name)
        for short in ("to_q", "to_k", "to_v", "to_out"):
            before, after = (m.to_out[0] if short == "to_out" else getattr(m, short) for m in (attention, changed))
            down, up = (parts[f"{number}.{short}_lora.{side}.weight"] for side in ("down", "up"))
            torch.testing.assert_close(after.weight, before.weight + up @ down)


def test_an_unconditional_model_is_refused(model, adapter_file, images, key):
    method = NullFace(model, own_adapter(adapter_file), PixelRecognizer(), CentreFace(), SHORT, 32)
    with pytest.raises(BadModel, match="nullface_core"):
        method.anonymize(images, [key] * 2, IDS)


@pytest.mark.usefixtures("nothing_fetched")
def test_missing_weights_are_named():
    method = instantiate(composed("anonymizer=nullface", "parser=ellipse").anonymizer, _convert_="all")
    text = "\n".join(missing_parts(method))
    for name in (
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "ip-adapter-faceid_sd15.bin",
        "arcface_r50_webface600k",
        "buffalo_l",
    ):
        assert name in text
    assert method.about.code_licence == "AGPL-3.0"
    core = instantiate(composed("anonymizer=nullface_core", "parser=ellipse").anonymizer, _convert_="all")
    assert missing_parts(core) == []
    assert "fresh noise" in core.about.source
