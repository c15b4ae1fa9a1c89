"""LDFA on tiny components in the real layouts: diffusers' samplers, the steps it runs, what it leaves alone."""

from dataclasses import dataclass, replace

import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler, EulerDiscreteScheduler, UNet2DConditionModel
from hydra.utils import instantiate

from experiments.harness.preflight import missing_parts
from keyanon.channel.keys import MasterKey
from keyanon.channel.pixels import to_bytes
from keyanon.diffusion.model import BadModel, LatentDiffusion
from keyanon.faces.detection import Detection
from keyanon.faces.finding import Finder
from keyanon.methods.baselines.ldfa import FaceBox, Ldfa, feathered, window
from keyanon.methods.baselines.sampling import keyed_normals, mean, spread
from keyanon.types import Anonymizer
from tests.conftest import CentreFace
from tests.test_configs import composed

IDS = ("a", "b")


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture
def core(model) -> Ldfa:
    return Ldfa(model, CentreFace(), size=None, steps=4, feather=1.0)


def seen_by_network(monkeypatch) -> list[tuple[torch.Tensor, int]]:
    """What eps is asked, filled as it goes."""
    asked, eps = [], LatentDiffusion.eps
    monkeypatch.setattr(LatentDiffusion, "eps", lambda self, z, t: asked.append((z, t)) or eps(self, z, t))
    return asked


@pytest.mark.parametrize("kind", [EulerDiscreteScheduler, EulerAncestralDiscreteScheduler])
def test_both_samplers_are_diffusers_own(kind):
    scheduler = kind(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, timestep_spacing="leading")
    scheduler.set_timesteps(10)
    abar = scheduler.alphas_cumprod.double()
    eta = 0.0 if kind is EulerDiscreteScheduler else 1.0
    for i, t in enumerate(scheduler.timesteps):
        z, e = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(i))
        now = abar[int(t)].item()
        after = abar[int(scheduler.timesteps[i + 1])].item() if i < 9 else 1.0
        here, there = ((level**0.5, (1 - level) ** 0.5) for level in (now, after))
        scheduler.scale_model_input(z / here[0], t)
        theirs = scheduler.step(e, t, z / here[0], generator=torch.Generator().manual_seed(5)).prev_sample
        noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(5))
        ours = mean(z, e, here, there, eta) + spread(here, there, eta) * noise
        torch.testing.assert_close(ours / there[0], theirs, rtol=1e-4, atol=1e-4)


def test_three_quarters_of_fifty_steps_are_thirty_seven(model, images, key, monkeypatch):
    asked = seen_by_network(monkeypatch)
    Ldfa(model, CentreFace(), size=None, feather=1.0).anonymize(images, [key] * 2, IDS)
    expected = [round(i * 999 / 49) for i in range(37)]
    assert [t for _, t in asked] == expected[::-1]
    assert expected[-1] == 734
    assert model.evaluations == dict.fromkeys(expected, 2)


def test_it_starts_from_the_original_at_the_noise_of_its_strength(core, images, key, monkeypatch):
    asked = seen_by_network(monkeypatch)
    core.anonymize(images, [key] * 2, IDS)
    noise = keyed_normals(core, [key] * 2, IDS, images, "ldfa", (1, 3, 16, 16))[:, 0]
    abar = core.backbone.schedule.abar[666]  # the third of the timesteps 0, 333, 666, 999
    expected = abar**0.5 * core.backbone.encode(images) + (1 - abar) ** 0.5 * noise
    assert asked[0][1] == 666
    torch.testing.assert_close(asked[0][0], expected)


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral"])
def test_a_single_step_by_hand(core, images, key, sampler):
    """At the lowest level both samplers go straight to x_0 of the face and z_0 of the rest."""
    method, model = replace(core, steps=2, strength=0.5, feather=0, sampler=sampler), core.backbone
    z0, abar = model.encode(images), model.schedule.abar[0]
    shape = (2 if sampler == "euler_ancestral" else 1, 3, 16, 16)
    noise = keyed_normals(method, [key] * 2, IDS, images, "ldfa", shape)[:, 0]
    z = abar**0.5 * z0 + (1 - abar) ** 0.5 * noise
    face = CentreFace().mask(images, (16, 16))
    x0 = torch.where(face, (z - (1 - abar) ** 0.5 * model.eps(z, 0)) / abar**0.5, z0)
    expected = torch.where(CentreFace().mask(images, (64, 64)), model.decode(x0), images)
    difference = method.anonymize(images, [key] * 2, IDS).images.int() - to_bytes(expected).int()
    assert difference.abs().max() <= 1  # rounded after other sums


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral"])
def test_only_the_face_changes(core, images, key, sampler):
    method = replace(core, sampler=sampler)
    assert isinstance(method, Anonymizer)
    published = method.anonymize(images, [key] * 2, IDS)
    face = CentreFace().mask(images, (64, 64)).expand_as(images)
    assert torch.equal(published.images[~face], to_bytes(images)[~face])
    assert (published.images[face] != to_bytes(images)[face]).float().mean() > 0.9
    assert published.headers == (b"", b"")


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral"])
def test_a_picture_s_result_hangs_on_its_id_and_not_on_its_batch(core, images, key, sampler):
    method = replace(core, sampler=sampler)
    both = method.anonymize(images, [key] * 2, IDS).images
    assert torch.equal(method.anonymize(images[1:], [key], IDS[1:]).images, both[1:])
    assert torch.equal(method.anonymize(images.flip(0), [key] * 2, IDS[::-1]).images, both.flip(0))
    assert not torch.equal(method.anonymize(images[1:], [key], ["c"]).images, both[1:])
    assert not torch.equal(method.anonymize(images[1:], [MasterKey(bytes(32))], IDS[1:]).images, both[1:])


def test_without_a_face_the_picture_stays(core, key):
    black = torch.full((1, 3, 64, 64), -1.0)
    for method in (core, replace(core, size=64)):
        assert not method.anonymize(black, [key], ["black"]).images.any()


def test_a_plain_stable_diffusion_repaints_the_square_around_the_face(tiny_sd, images, key):
    method = Ldfa(LatentDiffusion(str(tiny_sd)), CentreFace(), size=24, padding=4, steps=2, feather=1.0)
    published = method.anonymize(images, [key] * 2, IDS).images
    face = CentreFace().mask(images, (64, 64)).expand_as(images)
    assert torch.equal(published[~face], to_bytes(images)[~face])
    assert not torch.equal(published[face], to_bytes(images)[face])
    assert torch.equal(method.anonymize(images[1:], [key], IDS[1:]).images, published[1:])


def test_an_inpainting_network_sees_the_mask_and_the_rest_of_the_picture(tiny_sd_inpainting, images, key, monkeypatch):
    model = LatentDiffusion(str(tiny_sd_inpainting))
    method = Ldfa(model, CentreFace(), size=None, steps=2, feather=1.0, sampler="euler_ancestral", strength=1.0)
    asked, images = seen_by_network(monkeypatch), images[..., :32, :32]
    published = method.anonymize(images, [key] * 2, IDS).images
    face = CentreFace().mask(images, (32, 32))
    for z, _ in asked:
        assert z.shape == (2, 9, 16, 16)
        assert torch.equal(z[:, 4:5] > 0, CentreFace().mask(images, (16, 16)))
        torch.testing.assert_close(z[:, 5:], model.encode(images * ~face))
    changed = images + face * torch.rand(images.shape, generator=torch.Generator().manual_seed(3)) * 0.1
    torch.testing.assert_close(model.encode(changed * ~face), model.encode(images * ~face))
    assert torch.equal(published.masked_select(~face), to_bytes(images).masked_select(~face))
    assert len(asked) == 2


def test_a_network_of_another_kind_is_refused(tiny_sd, images, key, tmp_path):
    for part in ("vae", "scheduler", "tokenizer", "text_encoder"):
        (tmp_path / part).symlink_to(tiny_sd / part)
    config = UNet2DConditionModel.load_config(tiny_sd / "unet")
    UNet2DConditionModel.from_config(config, in_channels=5, out_channels=4).save_pretrained(tmp_path / "unet")
    with pytest.raises(BadModel, match="5 input channels on latents of 4"):
        Ldfa(LatentDiffusion(str(tmp_path)), CentreFace(), size=None, feather=1.0).anonymize(images, [key] * 2, IDS)


@dataclass(frozen=True)
class OneBox:
    """A detector that finds the same box on every picture that is not black."""

    def detect(self, images):
        box, points = torch.tensor([10.2, -3.0, 30.4, 25.0]).double().numpy(), torch.zeros(5, 2).double().numpy()
        return [Detection(box, points, 1.0) if image.max() > -1 else None for image in images]

    def faces(self, images):
        return [() if face is None else (face,) for face in self.detect(images)]

    def cards(self):
        return ()


def test_the_box_of_a_detector(images):
    mask = FaceBox(Finder(mtcnn=OneBox(), unpadded=OneBox(), dlib=OneBox())).mask(
        torch.cat([images, torch.full((1, 3, 64, 64), -1.0)]), (64, 64)
    )
    expected = torch.zeros(64, 64, dtype=torch.bool)
    expected[0:25, 10:30] = True
    assert torch.equal(mask[0, 0], expected)
    assert torch.equal(mask[1], mask[0])
    assert not mask[2].any()


def test_the_square_around_a_face_stays_in_the_picture():
    mask = torch.zeros(1, 60, 80, dtype=torch.bool)
    mask[0, 20:30, 30:50] = True
    assert window(mask, 5) == (slice(10, 40), slice(25, 55))
    assert window(mask, 15) == (slice(0, 50), slice(15, 65))
    assert window(mask, 40) == (slice(0, 60), slice(0, 80))
    assert window(mask, None) == window(torch.zeros_like(mask), 5) == (slice(None), slice(None))
    mask[0, 0, 70] = True
    rows, columns = window(mask, 3)
    assert (rows.start, columns.stop) == (0, 74)


def test_the_soft_edge_is_half_at_the_border_and_one_within():
    soft = feathered(CentreFace().mask(torch.ones(1, 3, 64, 64), (64, 64)), 2.0)
    assert soft[0, 0, 32, 32] == pytest.approx(1)
    assert soft[0, 0, 32, 15:17].mean() == pytest.approx(0.5, abs=1e-3)
    assert soft[0, 0, 0, 0] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("change", "message"), [({"strength": 0.1}, "runs 0 of 4"), ({"sampler": "heun"}, "'heun'")])
def test_arguments_that_make_no_sense_are_refused(core, change, message):
    with pytest.raises(ValueError, match=message):
        replace(core, **change)


@pytest.mark.parametrize(
    ("name", "source"),
    [("ldfa_repo", "stable-diffusion-v1-5/stable-diffusion-v1-5"), ("ldfa_inpaint", "stable-diffusion-inpainting")],
)
@pytest.mark.usefixtures("nothing_fetched")
def test_missing_weights_are_named(name, source):
    method = instantiate(composed(f"anonymizer={name}").anonymizer, _convert_="all")
    (message,) = missing_parts(method)
    assert source in message
    assert "OpenRAIL" in message
    assert (method.executed, method.about.kind, method.about.code_licence) == (37, "irreversible", "MIT")
