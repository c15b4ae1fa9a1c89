"""The backbone on tiny components saved in the real layouts."""

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel

from keyanon.batching import in_chunks
from keyanon.diffusion.block_dct import BlockDCT
from keyanon.diffusion.model import BadModel, LatentDiffusion, arithmetic
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
    assert LatentDiffusion("bundled:faces").missing().endswith("no such model; it has faces128, faces128_kl")


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
    odd = LatentDiffusion(str(tmp_path), noise={**LDM_NOISE, "prediction_type": "sample"})
    with pytest.raises(BadModel, match="prediction_type sample"):
        odd.eps(torch.randn(1, 3, 16, 16), 0)


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
