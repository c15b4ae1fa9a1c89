"""The backbone on tiny components saved in the real layouts."""

import inspect
import json

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel
from safetensors.torch import load_file

from keyanon.batching import in_chunks
from keyanon.diffusion.block_dct import BlockDCT
from keyanon.diffusion.model import HONOURED, BadModel, LatentDiffusion, arithmetic, needed_of, scheduler
from keyanon.weights import MissingWeights
from tests.conftest import LDM_NOISE, save_tiny_stable_diffusion


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_ldm_layout(tiny_ldm, images):
    model = LatentDiffusion(str(tiny_ldm), noise=LDM_NOISE)
    z0 = model.encode(images)
    assert z0.shape == (2, 3, 16, 16)
    assert model.latent_size(images) == (16, 16)
    assert model.decode(z0).shape == images.shape
    assert not torch.equal(model.decode(z0), model.decode(z0, quantize=False))
    expected = UNet2DModel.from_pretrained(tiny_ldm / "unet")(z0, 500).sample
    torch.testing.assert_close(model.eps(z0, 500), expected.detach())
    assert model.schedule.abar_clean == 1.0
    assert model.schedule.abar[-1] == pytest.approx(DDIMScheduler(**LDM_NOISE).alphas_cumprod[-1].item())
    assert model.missing() is None


def test_subfolder_and_digest(tiny_ldm, tmp_path):
    (tmp_path / "ffhq-diffusers").symlink_to(tiny_ldm)
    there, here = LatentDiffusion(str(tmp_path), "ffhq-diffusers"), LatentDiffusion(str(tiny_ldm))
    assert there.sha256 == here.sha256
    assert len(here.sha256) == 64


def test_stable_diffusion_layout_with_the_empty_prompt(tmp_path, images):
    model = LatentDiffusion(str(save_tiny_stable_diffusion(tmp_path)))
    z0 = model.encode(images)
    assert z0.shape == (2, 4, 32, 32)
    assert model.latent_size(images) == (32, 32)
    assert model.decode(z0).shape == images.shape
    assert model.condition is not None
    assert model.condition.shape == (1, 7, 16)
    assert model.eps(z0, 1).shape == z0.shape
    assert model.schedule.offset == 1


def test_v_prediction_becomes_eps(tiny_ldm, images):
    """With v = a e - s z0 and z = a z0 + s e, the identity a v + s z = e turns one into the other."""
    model = LatentDiffusion(str(tiny_ldm), noise={**LDM_NOISE, "prediction_type": "v_prediction"})
    z = model.encode(images)
    v = UNet2DModel.from_pretrained(tiny_ldm / "unet")(z, 300).sample.detach()
    abar = model.schedule.abar[300]
    torch.testing.assert_close(model.eps(z, 300), abar**0.5 * v + (1 - abar) ** 0.5 * z)


def test_block_dct_layout(tmp_path, images):
    latent = BlockDCT(luma=2, chroma=1, mean=[0.5, 0, 0, 0], std=[2.0, 1, 1, 1])
    latent.save_config(tmp_path / "latent")
    UNet2DModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    ).to(torch.float16).save_pretrained(tmp_path / "unet")  # fmt: skip
    model = LatentDiffusion(str(tmp_path), noise=LDM_NOISE)
    z = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(model.encode(model.decode(z)), z, atol=1e-5, rtol=0)
    assert model.latent_size(images) == (8, 8)
    assert model.eps(z, 10).dtype == torch.float32


def test_bf16_stays_near_fp32_and_returns_fp32(tiny_ldm, images):
    full, half = (LatentDiffusion(str(tiny_ldm), noise=LDM_NOISE, precision=p) for p in ("fp32", "bf16"))
    z = full.encode(images)
    assert half.eps(z, 100).dtype == torch.float32
    assert (half.eps(z, 100) - full.eps(z, 100)).abs().mean() < 0.02


def test_the_old_name_of_a_bundled_model_is_told_the_new_one():
    with pytest.raises(BadModel, match="backbone.source=embedded:faces128: .* bundled:faces128$"):
        LatentDiffusion("embedded:faces128")


def test_a_bundled_model_that_is_none_is_told_those_there_are():
    assert LatentDiffusion("bundled:faces128").missing() is None
    assert (
        LatentDiffusion("bundled:faces")
        .missing()
        .endswith("no such model; it has faces128, faces128_kl, faces128_large, faces128_vq")
    )


def test_missing_model_says_what_and_how(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = LatentDiffusion("someone/some-model", "part", licence="MIT")
    with pytest.raises(MissingWeights) as raised:
        _ = model.folder
    for text in (model.missing(), str(raised.value)):
        assert text is not None
        assert "someone/some-model (folder part)" in text
        assert "MIT" in text
        assert "hf download someone/some-model" in text


def test_incomplete_folders_are_refused(tiny_ldm, tmp_path):
    (tmp_path / "unet").symlink_to(tiny_ldm / "unet")
    model = LatentDiffusion(str(tmp_path))
    with pytest.raises(BadModel, match="no autoencoder"):
        _ = model.autoencoder
    with pytest.raises(BadModel, match=r"backbone\.noise"):
        _ = model.schedule


UNHONOURED = {
    "prediction_type": "sample", "timestep_spacing": "trailing", "clip_sample": True, "thresholding": True,
    "rescale_betas_zero_snr": True,
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), UNHONOURED.items())
def test_what_the_solvers_do_not_honour_of_a_scheduler_is_named(tiny_ldm, tmp_path, name, value):
    given = LatentDiffusion(str(tiny_ldm), noise={**LDM_NOISE, name: value})
    (tmp_path / "unet").symlink_to(tiny_ldm / "unet")
    DDIMScheduler(**{**LDM_NOISE, name: value}).save_pretrained(tmp_path / "scheduler")
    for model, where in ((given, "backbone.noise"), (LatentDiffusion(str(tmp_path)), "scheduler_config.json")):
        with pytest.raises(BadModel, match=f"{where}: {name}={value} is not honoured"):
            _ = model.schedule
        assert f"{name}={value}" in str(model.missing())  # so the preflight says it


def test_every_argument_of_ddim_is_honoured_or_refused():
    """Those that make the noise, those that are honoured in one value, and those that only say more about a refused one."""
    noise = {
        "num_train_timesteps",
        "beta_start",
        "beta_end",
        "beta_schedule",
        "trained_betas",
        "set_alpha_to_one",
        "steps_offset",
    }
    beside = {"dynamic_thresholding_ratio", "clip_sample_range", "sample_max_value"}
    assert set(inspect.signature(DDIMScheduler).parameters) == noise | beside | UNHONOURED.keys()
    assert UNHONOURED.keys() <= HONOURED.keys()


def test_what_a_scheduler_leaves_out_is_as_its_class_has_it():
    with pytest.raises(BadModel, match=r"x: clip_sample=True \(by default of DDIMScheduler\)"):
        scheduler({"beta_schedule": "scaled_linear"}, "x")
    with pytest.raises(BadModel, match=r"timestep_spacing=linspace \(by default of EulerDiscreteScheduler\)"):
        scheduler({"_class_name": "EulerDiscreteScheduler"}, "x")
    with pytest.raises(BadModel, match="FlowMatchEulerDiscreteScheduler has no noise schedule"):
        scheduler({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "x")
    with pytest.raises(BadModel, match="NoSuchScheduler has no noise schedule"):
        scheduler({"_class_name": "NoSuchScheduler"}, "x")
    with pytest.raises(BadModel, match="x: no noise schedule can be made"):
        scheduler({"clip_sample": False, "beta_schedule": "cubic"}, "x")


# As the repositories of the published models have it: of CompVis/ldm-celebahq-256 and stable-diffusion-v1-5.
LDM_CELEBAHQ = {
    "_class_name": "DDIMScheduler", "_diffusers_version": "0.0.4", "beta_end": 0.0195, "beta_schedule": "scaled_linear",
    "beta_start": 0.0015, "clip_sample": False, "num_train_timesteps": 1000, "timestep_values": None, "trained_betas": None,
}  # fmt: skip
STABLE_DIFFUSION = {
    "_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "beta_start": 0.00085, "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
    "trained_betas": None, "clip_sample": False,
}  # fmt: skip


@pytest.mark.parametrize("config", [LDM_CELEBAHQ, STABLE_DIFFUSION])
def test_schedulers_of_the_published_models_go_on_working(config):
    ours, theirs = scheduler(config, "x"), DDIMScheduler.from_config(config)
    assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)
    assert ours.config.steps_offset == theirs.config.steps_offset
    assert ours.config.set_alpha_to_one == theirs.config.set_alpha_to_one


def test_sizes_are_multiples_of_what_autoencoder_and_network_halve(tiny_ldm, tiny_block_dct, tiny_sd):
    ldm, dct, sd = (LatentDiffusion(str(folder), noise=LDM_NOISE) for folder in (tiny_ldm, tiny_block_dct, tiny_sd))
    assert [model.multiple for model in (ldm, dct, sd)] == [8, 8, 2]  # 4 x 2, 8 x 1, 2 and any number of cells
    assert LatentDiffusion("bundled:faces128").multiple == 32
    for model in (ldm, dct, sd):
        for size in range(2 * model.multiple, 4 * model.multiple + 1):
            pictures = torch.zeros(1, 3, size, size)
            if message := model.wrong_size(size):
                lower = size // model.multiple * model.multiple
                assert f"{size} pixels" in message
                assert f"{lower} or {lower + model.multiple}" in message
                continue
            z = model.encode(pictures)
            assert model.eps(z, 10).shape == z.shape
            assert model.decode(z).shape == pictures.shape
    with pytest.raises((RuntimeError, AssertionError)):  # what the message spares the user
        ldm.eps(ldm.encode(torch.zeros(1, 3, 20, 20)), 10)


def test_noise_of_a_picture_does_not_depend_on_the_batch(tiny_ldm):
    """To the last bit on one thread: sizes around and beyond the chunk."""
    model = LatentDiffusion(str(tiny_ldm), noise=LDM_NOISE)
    z = torch.randn(18, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    whole = model.eps(z, 400)
    for size in (1, 3, 7, 8, 9, 17):
        assert torch.equal(model.eps(z[:size], 400), whole[:size])
        assert torch.equal(model.eps(z[1 : 1 + size], 400), whole[1 : 1 + size])


def too_much(most: int):
    """A hook that is out of memory at more than `most` pictures; the sizes it saw are in its list."""
    seen: list[int] = []

    def hook(module, args, output=None):
        seen.append(len(args[0]))
        if len(args[0]) > most:
            raise torch.OutOfMemoryError("out of memory, as a test has it")

    return hook, seen


def test_a_batch_that_does_not_fit_is_halved_and_gives_the_same(tiny_ldm, caplog):
    model, small = (LatentDiffusion(str(tiny_ldm), noise=LDM_NOISE) for _ in range(2))
    z = torch.randn(7, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    hook, seen = too_much(most=1)
    small.unet.register_forward_hook(hook)
    torch.testing.assert_close(small.eps(z, 400), model.eps(z, 400), atol=1e-5, rtol=0)
    assert seen == [8, 4, 2, *[1] * 7]
    assert small.evaluations[400] == 7
    assert "4 pictures at once do not fit the memory, going on with 2" in caplog.text
    seen.clear()
    small.eps(z, 300)
    assert seen == [1] * 7  # remembered
    seen.clear()
    small.decode(z)
    assert list(small.fits.values()) == [1]  # the network's; the autoencoder's is its own


def test_one_picture_that_does_not_fit_is_an_error(tiny_ldm):
    model = LatentDiffusion(str(tiny_ldm), noise=LDM_NOISE)
    hook, seen = too_much(most=0)
    model.unet.register_forward_hook(hook)
    with pytest.raises(torch.OutOfMemoryError):
        model.eps(torch.randn(3, 3, 16, 16), 400)
    assert seen == [8, 4, 2, 1]


def test_where_gradients_are_wanted_the_error_reaches_who_asked():
    hook, seen = too_much(most=2)

    def f(x):
        hook(None, (x,))
        return x.square()

    x = torch.randn(4, 2, requires_grad=True)
    with pytest.raises(torch.OutOfMemoryError):
        in_chunks(f, x)
    assert seen == [8]
    fits: dict[str, int] = {}
    torch.testing.assert_close(in_chunks(f, x.detach(), fits=fits), x.detach().square())
    assert list(fits.values()) == [2]


def test_parts_of_several_tensors_stay_together():
    a, b = torch.arange(10.0), torch.arange(10.0) * 10
    assert torch.equal(in_chunks(lambda x, y: x + y, a, b), a + b)


def test_arithmetic_is_put_back():
    def now():
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32

    before = now()
    with arithmetic("tf32"):
        assert now() == ("high", True)
        with arithmetic("fp32"):
            assert now() == ("highest", False)
        assert now() == ("high", True)
    assert now() == before


@pytest.mark.slow
def test_compiled_networks_compute_the_same(tiny_ldm, tmp_path):
    """Up to rounding, and as independent of the batch as others."""
    (tmp_path / "vqvae").symlink_to(tiny_ldm / "vqvae")
    UNet2DModel(
        sample_size=16, in_channels=3, out_channels=3, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), mid_block_type=None,
    ).save_pretrained(tmp_path / "unet")  # fmt: skip
    plain, compiled = (LatentDiffusion(str(tmp_path), noise=LDM_NOISE, compile=on, chunk=2) for on in (False, True))
    z = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    whole = compiled.eps(z, 400)
    torch.testing.assert_close(whole, plain.eps(z, 400), atol=1e-5, rtol=1e-4)
    assert not torch.equal(whole, compiled.eps(z, 100))
    for size in (1, 2):
        assert torch.equal(compiled.eps(z[:size], 400), whole[:size])
        assert torch.equal(compiled.eps(z[-size:], 400), whole[-size:])


OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def test_the_old_layout_is_the_same_model(tiny_ldm, tmp_path):
    """As CompVis/ldm-celebahq-256 has it: pickled tensors, older names of attention's weights, a config of diffusers 0.0.4."""
    renamed = 0
    for part in ("unet", "vqvae"):
        state = load_file(tiny_ldm / part / "diffusion_pytorch_model.safetensors")
        old = {}
        for name, value in state.items():
            for new, before in OLD_NAMES.items():
                if f".attentions.0.{new}." in name or f".attentions.1.{new}." in name:
                    name, renamed = name.replace(f".{new}.", f".{before}."), renamed + 1
            old[name] = value
        (tmp_path / part).mkdir()
        torch.save(old, tmp_path / part / "diffusion_pytorch_model.bin")
        config = json.loads((tiny_ldm / part / "config.json").read_text())
        known = {
            "act_fn", "attention_head_dim", "block_out_channels", "down_block_types", "in_channels", "layers_per_block",
            "latent_channels", "norm_num_groups", "num_vq_embeddings", "out_channels", "sample_size", "up_block_types",
        }  # fmt: skip
        config = {name: value for name, value in config.items() if name in known | {"_class_name"}}
        (tmp_path / part / "config.json").write_text(json.dumps(config | {"_diffusers_version": "0.0.4"}))
    assert renamed >= 8
    new, old = (LatentDiffusion(str(folder), noise=LDM_NOISE) for folder in (tiny_ldm, tmp_path))
    pictures = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    z = new.encode(pictures)
    assert torch.equal(old.encode(pictures), z)
    assert torch.equal(old.eps(z, 400), new.eps(z, 400))
    assert torch.equal(old.decode(z), new.decode(z))


def test_of_a_repository_only_what_a_model_is_read_from_is_fetched():
    listed = [
        "README.md", "keys/key_1.npy", "controlnet_epoch_15.pth", "m/unet/config.json", "m/unet/diffusion_pytorch_model.bin",
        "m/unet/diffusion_pytorch_model.safetensors", "m/unet/diffusion_pytorch_model.fp16.safetensors", "m/vqvae/config.json",
        "m/vqvae/diffusion_pytorch_model.bin", "m/scheduler/scheduler_config.json", "m/safety_checker/model.safetensors",
        "unet/config.json",
    ]  # fmt: skip
    assert needed_of(listed, "m") == [
        "m/unet/diffusion_pytorch_model.safetensors", "m/unet/config.json",
        "m/vqvae/diffusion_pytorch_model.bin", "m/vqvae/config.json", "m/scheduler/scheduler_config.json",
    ]  # fmt: skip
    assert needed_of(listed, "") == ["unet/config.json"]
