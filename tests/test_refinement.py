from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL
from scipy.optimize import lsq_linear

from keyanon.channel.pixels import to_bytes, to_floats
from keyanon.diffusion.block_dct import BlockDCT
from keyanon.diffusion.model import LatentDiffusion
from keyanon.methods.refinement import Refinement, ToneCurve, channel_weights, descend, project_blocks, through_jpeg


def test_the_usual_curve_reads_bytes_as_usual():
    published = torch.arange(192, dtype=torch.uint8).view(1, 3, 8, 8)
    everywhere = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    assert torch.equal(ToneCurve().read(published, everywhere), to_floats(published))


def test_tone_curve_bends_at_the_knee_and_ends_at_its_reach():
    levels = ToneCurve(0.9, 1.5).levels()
    usual = to_floats(torch.arange(256, dtype=torch.uint8)).double()
    assert (levels.diff() > 0).all()
    assert levels[[0, -1]].tolist() == pytest.approx([-1.5, 1.5])
    assert torch.equal(levels[usual.abs() < 0.9], usual[usual.abs() < 0.9])
    torch.testing.assert_close(levels, -levels.flip(0), atol=1e-6, rtol=0)


def test_tone_curve_leaves_pixels_outside_the_face_alone():
    published = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    left = torch.tensor([[[[True, False], [True, False]]]])
    assert ToneCurve(0.9, 1.5).read(published, left)[0, 0, 0].tolist() == pytest.approx([1.5, 1.0])


@pytest.mark.parametrize(("knee", "reach"), [(1.0, 1.2), (0.9, 0.95), (0.0, 1.2)])
def test_tone_curves_that_lose_values_are_refused(knee, reach):
    with pytest.raises(ValueError, match="tone curve"):
        ToneCurve(knee, reach)


def test_projection_equals_scipys_bounded_least_squares():
    """Feasible and infeasible blocks, one with fixed pixels, against scipy's active-set solver on the stacked problem."""
    generator = torch.Generator().manual_seed(0)
    B = torch.randn(3, 8, generator=generator, dtype=torch.float64)
    start = 1.5 * torch.randn(4, 8, generator=generator, dtype=torch.float64)
    wanted = torch.stack([start[0] @ B.T, start[1] @ B.T, 9 * start[2] @ B.T, start[3] @ B.T])
    low, high = -torch.ones(4, 8, dtype=torch.float64), torch.ones(4, 8, dtype=torch.float64)
    low[3, :4], high[3, :4] = start[3, :4], start[3, :4]
    x = project_blocks(B, wanted, start, low, high, 0.01)
    for i in range(4):
        stacked = torch.cat([B, 0.1 * torch.eye(8).double()]), torch.cat([wanted[i], 0.1 * start[i]])
        apart = 1e-9 * (low[i] == high[i])  # scipy wants every interval open
        solution = lsq_linear(stacked[0], stacked[1], (low[i] - apart, high[i] + apart), tol=1e-14).x
        torch.testing.assert_close(x[i], torch.from_numpy(solution), atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def scene():
    """Two pictures on a small block-DCT latent: z* is a given picture's with noise in 4x4 of 6x6 cells, some of it clipped."""
    autoencoder = BlockDCT(luma=10, chroma=3, std=[4.0, 1.0, 1.0] + [0.3] * 7 + [1.0, 0.2, 0.2] * 2)
    backbone = SimpleNamespace(
        chunk=2,
        fits={},
        autoencoder=autoencoder,
        encode=autoencoder.encode,
        decode=lambda z, quantize=False: autoencoder.decode(z),
    )
    generator = torch.Generator().manual_seed(0)
    given = to_floats(torch.randint(60, 180, (2, 3, 48, 48), generator=generator, dtype=torch.uint8))
    cells = torch.zeros(2, 1, 6, 6, dtype=torch.bool)
    cells[:, :, 1:5, 1:5] = True
    free = cells.repeat_interleave(8, 2).repeat_interleave(8, 3)
    z = autoencoder.encode(given)
    z = torch.where(cells, z + torch.randn(z.shape, generator=generator), z)
    z[0, 0, 2, 2] += 1.0  # a bright block: 22 of its pixels leave [-1, 1]
    start = torch.where(free, autoencoder.decode(z), given)
    return SimpleNamespace(
        backbone=backbone, z=z, start=start, added=torch.zeros_like(start), given=given, free=free, cells=cells
    )


def error(scene, published, tone):
    """Root mean square error of the latent's cells, by what the channels weigh in pixels."""
    e = scene.backbone.encode(tone.read(published, scene.free)) - scene.z
    e = e * channel_weights(scene.backbone, scene.z)[:, None, None]
    return e[scene.cells.expand_as(e)].square().mean().sqrt().item()


def test_channels_of_the_block_dct_weigh_their_deviations(scene):
    weights = channel_weights(scene.backbone, scene.z)
    torch.testing.assert_close(weights.tolist(), list(scene.backbone.autoencoder.config.std), atol=1e-3, rtol=0)


@pytest.mark.parametrize("tone", [ToneCurve(), ToneCurve(0.9, 1.2)])
def test_refined_picture_encodes_to_the_latent(scene, tone):
    assert scene.start.abs().max() > 1.02
    plain = to_bytes(scene.start)
    refined = Refinement(tone)(scene.backbone, scene.z, scene.start, scene.added, scene.free, scene.cells)
    assert error(scene, refined, tone) < 0.3 * error(scene, plain, ToneCurve())
    assert (refined.float() - plain.float()).square().mean().sqrt() < 255 * 10 ** (-45 / 20)


def test_what_the_receiver_takes_off_is_put_on(scene):
    added = 0.1 * torch.sin(torch.arange(48.0)).expand_as(scene.start)
    start = torch.where(scene.free, scene.start + added, scene.start)
    tone = ToneCurve(0.9, 1.5)
    refined = Refinement(tone)(scene.backbone, scene.z, start, added, scene.free, scene.cells)
    e = scene.backbone.encode(tone.read(refined, scene.free) - added * scene.free) - scene.z
    assert e[scene.cells.expand_as(e)].square().mean().sqrt() < 0.005


@pytest.mark.parametrize("quality", [100, 90])
def test_jpeg_in_the_loop_leaves_less_error_behind_jpeg(scene, quality):
    """Each picture on its own is no worse, and both together are better."""

    def errors(refinement):
        published = refinement(scene.backbone, scene.z, scene.start, scene.added, scene.free, scene.cells)
        weights = channel_weights(scene.backbone, scene.z)[:, None, None]
        e = (
            scene.backbone.encode(refinement.tone.read(through_jpeg(published, quality), scene.free)) - scene.z
        ) * weights
        return (e * scene.cells).square().sum((1, 2, 3))

    blind, aware = errors(Refinement()), errors(Refinement(jpeg=quality))
    assert (aware <= blind).all()
    assert aware.sum() < 0.9 * blind.sum()


def test_given_pixels_are_published_untouched(scene):
    """Also where they share a block with free pixels."""
    free = scene.free.clone()
    free[:, :, 8:12, 8:12] = False
    start = torch.where(free, scene.start, scene.given)
    refined = Refinement()(scene.backbone, scene.z, start, scene.added, free, scene.cells)
    untouched = ~free.expand_as(refined)
    assert torch.equal(refined[untouched], to_bytes(scene.given)[untouched])
    assert not torch.equal(refined, to_bytes(start))


def test_a_picture_does_not_depend_on_its_batch(scene):
    both = Refinement()(scene.backbone, scene.z, scene.start, scene.added, scene.free, scene.cells)
    for i in range(2):
        one = slice(i, i + 1)
        alone = Refinement()(
            scene.backbone, scene.z[one], scene.start[one], scene.added[one], scene.free[one], scene.cells[one]
        )
        assert torch.equal(alone[0], both[i])


def test_descent_equals_the_projection(scene):
    """Encoding through gradients alone, the block DCT's solution comes out."""
    encode, pull = scene.backbone.encode, 0.1
    start, z = scene.start.double(), scene.z.double()

    def misfit(x):
        x = x.requires_grad_()
        value = ((encode(x) - z) * scene.cells).square().flatten(1).sum(1)
        (gradient,) = torch.autograd.grad(value.sum(), x)
        return value.detach(), gradient * scene.free / 2

    low, high = (torch.where(scene.free, end, start) for end in (-torch.ones(1).double(), torch.ones(1).double()))
    x = descend(misfit, start, low, high, pull, 300)
    at_optimum = (x - misfit(x.detach())[1] - pull * (x - start)).clamp(low, high)
    torch.testing.assert_close(x.detach(), at_optimum.detach(), atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def learned():
    """A learned autoencoder's encoder with random weights; z* belongs to a picture between the levels, and start is near."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=2,
        norm_num_groups=4,
        mid_block_add_attention=False,
    )
    vae.eval().requires_grad_(False)
    backbone = SimpleNamespace(
        chunk=2,
        fits={},
        autoencoder=vae,
        encode=lambda x: vae.encode(x).latent_dist.mode(),
        decode=lambda z: vae.decode(z).sample,
    )
    given = to_floats(torch.randint(60, 180, (2, 3, 16, 16), dtype=torch.uint8))
    cells = torch.zeros(2, 1, 8, 8, dtype=torch.bool)
    cells[:, :, 2:7, 1:7] = True
    free = cells.repeat_interleave(2, 2).repeat_interleave(2, 3)
    start = torch.where(free, given + 0.3 * torch.rand(given.shape), given)
    z = backbone.encode(start + 0.02 * torch.randn(start.shape) * free)
    return SimpleNamespace(
        backbone=backbone, z=z, start=start, added=torch.zeros_like(start), given=given, free=free, cells=cells
    )


@pytest.mark.parametrize("tone", [ToneCurve(), ToneCurve(0.6, 1.2)])
def test_refined_picture_encodes_to_the_learned_latent(learned, tone):
    refined = Refinement(tone)(learned.backbone, learned.z, learned.start, learned.added, learned.free, learned.cells)
    descent_alone = Refinement(tone, rounding=2)(
        learned.backbone, learned.z, learned.start, learned.added, learned.free, learned.cells
    )
    assert error(learned, refined, tone) < 0.7 * error(learned, descent_alone, tone)
    assert error(learned, descent_alone, tone) < 0.5 * error(learned, to_bytes(learned.start), ToneCurve())
    untouched = ~learned.free.expand_as(refined)
    assert torch.equal(refined[untouched], to_bytes(learned.given)[untouched])


def test_learned_refinement_does_not_depend_on_the_batch(learned):
    both = Refinement()(learned.backbone, learned.z, learned.start, learned.added, learned.free, learned.cells)
    one = slice(1, 2)
    alone = Refinement()(
        learned.backbone, learned.z[one], learned.start[one], learned.added[one], learned.free[one], learned.cells[one]
    )
    assert torch.equal(alone[0], both[1])


def test_encoding_passes_gradients_to_pictures_alone():
    backbone, images = LatentDiffusion("bundled:faces128"), torch.zeros(1, 3, 8, 8)
    assert not backbone.encode(images).requires_grad
    assert backbone.encode(images.requires_grad_()).requires_grad
