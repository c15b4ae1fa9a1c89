"""Scorers against closed forms, skimage and torchmetrics, on random pictures."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from experiments.fetch import to_fetch
from experiments.harness.preflight import missing_parts
from keyanon.channel.pixels import to_bytes, to_floats
from keyanon.errors import MissingPackage
from keyanon.faces.detection import Detection
from keyanon.measures.scorers import (
    FID,
    LPIPS,
    PSNR_CEILING,
    Detected,
    frechet_distance,
    mae,
    psnr,
    psnr_face,
    ssim,
    ssim_face,
)
from keyanon.weights import CARDS, Card, Release, WrongWeights

PLAIN = [psnr, ssim, psnr_face, ssim_face, mae]


@pytest.fixture
def pictures():
    """Smooth pictures, the same with noise of growing strength, and a face of 20 x 24 pixels on each."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(3, 3, 8, 8, generator=generator) * 2 - 1
    original = torch.nn.functional.interpolate(coarse, (48, 64), mode="bicubic").clamp(-1, 1)
    strength = torch.tensor([0.02, 0.1, 0.4])[:, None, None, None]
    view = (original + strength * torch.randn(original.shape, generator=generator)).clamp(-1, 1)
    face = torch.zeros(3, 1, 48, 64, dtype=torch.bool)
    face[:, :, 10:30, 20:44] = True
    return view, original, face


def unit(image):
    return ((image + 1) / 2).permute(1, 2, 0).double().numpy()


def skimage_ssim(view, original):
    return structural_similarity(
        unit(view),
        unit(original),
        data_range=1,
        channel_axis=-1,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        full=True,
    )


def test_psnr_equals_skimages(pictures):
    view, original, face = pictures
    for score, a, b in zip(psnr(view, original, face), view, original, strict=True):
        assert score == pytest.approx(peak_signal_noise_ratio(unit(b), unit(a), data_range=1), abs=1e-4)


def test_ssim_equals_skimages(pictures):
    view, original, face = pictures
    for score, a, b in zip(ssim(view, original, face), view, original, strict=True):
        assert score == pytest.approx(skimage_ssim(a, b)[0], abs=1e-4)


@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_measures_of_files_are_the_authors(pictures, dtype, near):
    """Their pictures come as 8-bit tensors; torchmetrics clips them to (0, 255), which makes them floats of that range."""
    from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

    view, original, face = pictures
    files = [to_bytes(view), to_bytes(original)]
    floats = [file.to(dtype) / 127.5 - 1 for file in files]
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # what clipping makes of bytes
    try:
        their_ssim = StructuralSimilarityIndexMeasure(data_range=(0, 255.0), reduction="none")(*files)
        their_psnr = PeakSignalNoiseRatio(data_range=(0, 255.0), reduction="none", dim=(1, 2, 3))(*files)
    finally:
        torch.set_default_dtype(before)
    torch.testing.assert_close(ssim(*floats, face, mean_over="whole"), their_ssim, atol=near, rtol=0)
    torch.testing.assert_close(psnr(*floats, face), their_psnr, atol=near, rtol=near)
    assert (ssim(*floats, face, mean_over="whole") - ssim(*floats, face)).abs().max() > 1e-4


def test_rounding_to_8_bits_moves_the_mean_error_of_a_recovery_by_nothing_that_is_printed(pictures):
    """The authors take it of the decoder's floats, we of the file: at their 0.1074 the printed digits are the same."""
    original = to_floats(to_bytes(pictures[1])).repeat(1, 1, 8, 8)
    noise = 0.135 * torch.randn(original.shape, generator=torch.Generator().manual_seed(2))  # mean error about 0.1
    view, face = (original + noise).clamp(-1, 1), torch.ones(3, 1, 1, 1, dtype=torch.bool)
    torch.testing.assert_close(
        mae(to_floats(to_bytes(view)), original, face), mae(view, original, face), atol=3e-5, rtol=0
    )


def test_ssim_face_is_the_mean_of_skimages_map_over_the_face(pictures):
    view, original, face = pictures
    for score, a, b, mask in zip(ssim_face(view, original, face), view, original, face[:, 0].numpy(), strict=True):
        assert score == pytest.approx(skimage_ssim(a, b)[1][mask].mean(), abs=1e-4)


def test_a_shift_of_one_level_has_a_known_psnr_and_error():
    original = torch.zeros(1, 3, 16, 16)
    view, face = original + 2 / 255, torch.ones(1, 1, 16, 16, dtype=torch.bool)
    assert psnr(view, original, face).item() == pytest.approx(20 * math.log10(255), abs=1e-3)  # 48.13 dB
    assert mae(view, original, face).item() == pytest.approx(2 / 255)


def test_equal_pictures_get_the_best_finite_scores(pictures):
    _, original, face = pictures
    assert psnr(original, original, face).tolist() == pytest.approx([PSNR_CEILING] * 3)
    assert psnr_face(original, original, face).tolist() == pytest.approx([PSNR_CEILING] * 3)
    assert ssim(original, original, face).tolist() == pytest.approx([1] * 3)
    assert ssim_face(original, original, face).tolist() == pytest.approx([1] * 3)
    assert mae(original, original, face).tolist() == [0] * 3


def test_the_ceiling_is_what_rounding_costs():
    generator = torch.Generator().manual_seed(1)
    original = torch.rand(1, 3, 256, 256, generator=generator) * 1.9 - 0.95
    error = (to_floats(to_bytes(original)) - original).square().mean()
    assert (10 * torch.log10(4 / error)).item() == pytest.approx(PSNR_CEILING, abs=0.05)


@pytest.mark.parametrize(("whole", "face_only"), [(psnr, psnr_face), (ssim, ssim_face)])
def test_face_scores_see_the_face_and_nothing_else(pictures, whole, face_only):
    view, original, face = pictures
    inner = torch.zeros_like(face)
    inner[:, :, 16:24, 26:38] = True  # so far inside that no window reaches out
    pasted = torch.where(face, view, original)
    assert torch.allclose(face_only(pasted, original, inner), face_only(view, original, inner))
    assert (whole(pasted, original, face) > whole(view, original, face)).all()


def test_face_psnr_of_the_whole_picture_is_psnr(pictures):
    view, original, face = pictures
    assert torch.allclose(psnr_face(view, original, torch.ones_like(face)), psnr(view, original, face))


def test_no_face_is_nan_for_that_picture_only(pictures):
    view, original, face = pictures
    face[1] = False
    for scorer in (psnr_face, ssim_face):
        assert scorer(view, original, face).isnan().tolist() == [False, True, False]
    for scorer in (psnr, ssim, mae):
        assert not scorer(view, original, face).isnan().any()


@pytest.mark.parametrize("scorer", PLAIN)
def test_scores_do_not_depend_on_the_batch_and_follow_the_noise(pictures, scorer):
    view, original, face = pictures
    together = scorer(view, original, face)
    assert together.shape == (3,)
    alone = torch.cat([scorer(view[i : i + 1], original[i : i + 1], face[i : i + 1]) for i in range(3)])
    assert torch.allclose(together, alone, atol=1e-5)
    order = together.diff()
    assert (order > 0).all() if scorer is mae else (order < 0).all()


class Corners(torch.nn.Module):
    """A network of 12 features: a picture's mean over blocks of 2 x 2 to a channel, in double precision."""

    num_features = 12

    def forward(self, pictures):
        return torch.nn.functional.adaptive_avg_pool2d(pictures.double(), 2).flatten(1)


def test_fid_is_torchmetrics():
    from torchmetrics.image.fid import FrechetInceptionDistance

    generator = torch.Generator().manual_seed(3)
    original = torch.randint(0, 256, (60, 3, 8, 8), dtype=torch.uint8, generator=generator)
    view = torch.randint(40, 256, (60, 3, 8, 8), dtype=torch.uint8, generator=generator)
    theirs = FrechetInceptionDistance(feature=Corners(), normalize=False)
    theirs.update(original, real=True)
    theirs.update(view, real=False)
    ours, count = FID().compare(Corners()(view), Corners()(original))
    assert count == 60
    assert ours == pytest.approx(theirs.compute().item(), rel=1e-6)


def test_fid_is_the_mean_over_its_parts():
    generator = np.random.default_rng(4)
    view, original = generator.normal(1, 1, (70, 5)), generator.normal(0, 1, (70, 5))
    each = [frechet_distance(view[i : i + 30], original[i : i + 30]) for i in (0, 30)]
    assert FID(parts=30).compare(view, original) == (pytest.approx(np.mean(each)), 60)
    assert FID(parts=1000).compare(view, original) == (pytest.approx(frechet_distance(view, original)), 70)
    assert FID().compare(original, original) == (pytest.approx(0, abs=1e-12), 70)
    assert math.isnan(FID().compare(view[:1], original[:1])[0])
    assert "2,500 pictures" in FID(parts=2500).meaning.label


def test_fid_looks_through_torchmetrics_network(tmp_path, monkeypatch):
    """With random numbers in torch-fidelity's layout, read from a file of the card's."""
    from torch_fidelity import feature_extractor_inceptionv3 as fidelity
    from torchmetrics.image.fid import FrechetInceptionDistance, NoTrainInceptionV3

    torch.manual_seed(0)
    with monkeypatch.context() as patch:
        patch.setattr(fidelity, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(NoTrainInceptionV3, "load_state_dict", lambda *_: None)
        network = NoTrainInceptionV3("inception-v3-compat", ["2048"])
    path = tmp_path / "inception.pth"
    torch.save(network.state_dict(), path)
    theirs = FrechetInceptionDistance(feature=2048, feature_extractor_weights_path=str(path)).inception
    pictures = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    ours = FID(card=random_card(path), weights=str(path)).embed(to_floats(pictures))
    assert ours.shape == (2, 2048)
    assert ours.std() > 0
    torch.testing.assert_close(ours, theirs(pictures))
    with pytest.raises(WrongWeights, match="fid_inception"):
        FID(weights=str(path)).embed(to_floats(pictures))


def test_fid_says_what_it_lacks(monkeypatch):
    assert FID().missing() is None
    assert [card.name for card in FID().cards()] == ["fid_inception"]
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert "keyanon[fid]" in FID().missing()
    with pytest.raises(MissingPackage, match="torch-fidelity"):
        FID(weights="elsewhere").embed(torch.zeros(1, 3, 8, 8))


@pytest.fixture
def random_alexnet(tmp_path):
    """AlexNet's layers with random numbers, as a file: the arithmetic of LPIPS does not care."""
    from torchvision.models import alexnet  # cannot be imported before keyanon

    path = tmp_path / "hub" / "checkpoints" / "alexnet-owt-7be5be79.pth"
    path.parent.mkdir(parents=True)
    torch.manual_seed(0)
    torch.save(alexnet(weights=None).state_dict(), path)
    return path


def random_card(path):
    return Card("random", path.name, Release("https://example.org"), None, "none", "nothing", "none")


def test_lpips_equals_torchmetrics(pictures, random_alexnet, monkeypatch, tmp_path):
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity  # nor this

    view, original, face = pictures
    scores = LPIPS(random_card(random_alexnet), str(random_alexnet))(view, original, face)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # where torchmetrics takes AlexNet from
    reference = LearnedPerceptualImagePatchSimilarity(net_type="alex")
    expected = [reference(a[None], b[None]).item() for a, b in zip(view, original, strict=True)]
    assert scores.tolist() == pytest.approx(expected, rel=1e-4)
    assert (scores.diff() > 0).all()


def test_lpips_of_equal_pictures_and_of_a_single_one(pictures, random_alexnet):
    view, original, face = pictures
    lpips = LPIPS(random_card(random_alexnet), str(random_alexnet))
    assert lpips(original, original, face).tolist() == [0, 0, 0]
    assert lpips(view[:1], original[:1], face[:1]).shape == (1,)


def test_lpips_tells_a_preflight_what_it_lacks(random_alexnet, tmp_path):
    assert missing_parts(LPIPS(weights=str(random_alexnet))) == []
    [message] = missing_parts(LPIPS(weights=str(tmp_path / "gone.pth")))
    assert "lpips_alexnet" in message


def test_lpips_is_among_what_can_be_fetched(nothing_fetched):
    cards, _ = to_fetch([LPIPS()])
    assert list(cards) == ["lpips_alexnet"]


def test_lpips_refuses_a_file_that_is_not_alexnet(pictures, random_alexnet):
    with pytest.raises(WrongWeights, match="lpips_alexnet"):
        LPIPS(weights=str(random_alexnet))(*pictures)


def test_frechet_distance_of_gaussians_with_known_moments():
    generator = np.random.default_rng(0)
    standard = generator.normal(size=(400, 6))
    standard -= standard.mean(axis=0)
    white = standard @ np.linalg.inv(np.linalg.cholesky(np.cov(standard.T))).T  # mean 0, covariance 1, exactly
    scale, shift = np.array([1, 2, 3, 4, 5, 6.0]), np.arange(6.0)
    assert frechet_distance(white, white) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(white, white + shift) == pytest.approx(np.sum(shift**2))
    assert frechet_distance(white, white * scale + shift) == pytest.approx(np.sum(shift**2) + np.sum((scale - 1) ** 2))


def test_frechet_distance_by_its_formula():
    generator = np.random.default_rng(1)
    a, b = generator.normal(size=(50, 5)), generator.normal(size=(70, 5)) @ generator.normal(size=(5, 5)) + 1
    covariance = [np.cov(rows.T) for rows in (a, b)]
    root = sqrtm(covariance[0] @ covariance[1]).real
    truth = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(covariance[0] + covariance[1] - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(truth)
    assert frechet_distance(b, a) == pytest.approx(truth)


def test_frechet_distance_of_fewer_pictures_than_dimensions():
    rows = np.random.default_rng(2).normal(size=(10, 64))
    assert frechet_distance(rows, rows + 0.5) == pytest.approx(64 * 0.25)


def test_frechet_distance_leaves_missing_faces_out():
    rows = np.random.default_rng(3).normal(size=(20, 4))
    holed = np.vstack([rows, np.full((3, 4), np.nan)])
    assert frechet_distance(holed, rows * 2) == pytest.approx(frechet_distance(rows, rows * 2))
    assert math.isnan(frechet_distance(rows, holed[19:]))


@dataclass(frozen=True)
class Bright:
    """Finds a "face" on bright pictures."""

    def detect(self, images):
        return [Detection(np.zeros(4), np.zeros((5, 2)), 1.0) if image.mean() > 0 else None for image in images]

    def cards(self):
        return (CARDS["dlib"],)


def test_detected_is_one_where_the_detector_finds_a_face():
    view = torch.stack([torch.full((3, 8, 8), 0.5), torch.full((3, 8, 8), -0.5)])
    detected = Detected(Bright())
    assert detected(view, view, torch.ones(2, 1, 8, 8, dtype=torch.bool)).tolist() == [1.0, 0.0]
    assert detected.cards() == (CARDS["dlib"],)
