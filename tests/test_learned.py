"""Learners against what can be learned: all of it, where files hold a map of the identity; nothing, where they are noise."""

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp
from sklearn.linear_model import Ridge
from torch.nn.functional import interpolate

from keyanon.attacks.learned import STRENGTHS, deanonymizer, duals, noise_features, ridge
from keyanon.channel.pixels import to_bytes, to_floats
from keyanon.measures.biometrics import unit

TRAINED, UNSEEN = slice(0, 160), slice(160, 240)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def people(mean: float = 0.0, n: int = 240, d: int = 24) -> np.ndarray:
    """Clean embeddings of strangers whose cosines are about mean^2 / (1 + mean^2)."""
    return unit(mean * unit(normal(1, d, seed=7)) + unit(normal(n, d, seed=8)))


def cosines(guesses: np.ndarray, clean: np.ndarray) -> np.ndarray:
    return (guesses * clean).sum(1)


# Regression onto embeddings


def test_duals_are_ridge_regression():
    x, y = normal(30, 80), normal(30, 4, seed=1)
    scale = np.square(np.linalg.svd(x)[1]).mean()
    for strength, dual in zip(STRENGTHS, duals(x, y, STRENGTHS), strict=True):
        reference = Ridge(alpha=strength * scale, fit_intercept=False).fit(x, y)
        np.testing.assert_allclose(x.T @ dual, reference.coef_.T, atol=1e-8)


def test_a_parrot_undoes_a_fixed_map_of_embeddings():
    clean = people(mean=1.0)
    seen = unit(clean @ np.linalg.qr(normal(24, 24))[0] + 0.02 * normal(240, 24, seed=2))
    guess = ridge(seen[TRAINED], clean[TRAINED])
    assert cosines(seen, clean)[UNSEEN].mean() < 0.2
    assert cosines(guess(seen[UNSEEN]), clean[UNSEEN]).min() > 0.9
    assert guess.heldout > 0.9


@pytest.mark.parametrize("mean", [0.0, 2.3])
def test_on_noise_a_guess_is_a_stranger(mean):
    """Also where strangers' cosines are high, as dlib's: a guess of the mean would have those of a friend."""
    clean, seen = people(mean), normal(240, 40)
    guess = ridge(seen[TRAINED], clean[TRAINED])
    own = cosines(guess(seen[UNSEEN]), clean[UNSEEN])
    strangers = (clean[TRAINED] @ clean[UNSEEN].T).ravel()
    assert abs(own.mean() - strangers.mean()) < 0.07
    assert abs(own.mean() - mean**2 / (1 + mean**2)) < 0.07
    assert ks_2samp(own, strangers).pvalue > 0.01
    assert abs(guess.heldout) < 0.1


def test_guesses_are_unit_rows_and_lost_faces_stay_lost():
    clean, seen = people(), people() @ normal(24, 24)
    guess = ridge(seen[TRAINED], clean[TRAINED])
    lost_seen, lost_clean = seen.copy(), clean.copy()
    lost_seen[[3, 50]], lost_clean[[50, 90]] = np.nan, np.nan
    kept = np.delete(np.arange(160), [3, 50, 90])
    fewer, same = ridge(lost_seen[TRAINED], lost_clean[TRAINED]), ridge(seen[kept], clean[kept])
    assert np.array_equal(fewer(seen), same(seen))
    assert not np.array_equal(fewer(seen), guess(seen))
    out = guess(lost_seen)
    assert np.isnan(out).all(1).nonzero()[0].tolist() == [3, 50]
    np.testing.assert_allclose(np.linalg.norm(np.delete(out, [3, 50], axis=0), axis=1), 1)


def test_too_few_faces():
    clean = people(n=12)
    seen = clean.copy()
    seen[2:5] = np.nan
    with pytest.raises(ValueError, match="9 of 12 pairs have a face on both pictures; a regression needs 10"):
        ridge(seen, clean)


def test_equal_features_say_nothing():
    guess = ridge(np.ones((20, 3)), people(n=20))
    assert guess.heldout == 0
    np.testing.assert_allclose(guess(np.ones((1, 3)))[0], unit(guess.mean[None])[0])


def test_ridge_repeats():
    clean, seen = people(), normal(240, 300)
    first, second = (ridge(seen[TRAINED], clean[TRAINED]) for _ in range(2))
    assert np.array_equal(first(seen), second(seen))


def flipped(one_key: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """z_T and z'_T of flipped signs, under one key or one for each picture, with faces that differ a little."""
    z = torch.from_numpy(normal(240, 2, 6, 6))
    signs = torch.from_numpy(np.sign(normal(1 if one_key else 240, 2, 6, 6, seed=3)))
    mask = torch.ones(240, 1, 6, 6, dtype=torch.bool)
    mask[::2, :, 0] = False
    return z, torch.where(mask, signs * z, z), mask


@pytest.mark.parametrize("one_key", [True, False])
@pytest.mark.parametrize("held_by", ["magnitudes", "noise"])
def test_what_flipped_signs_leave(one_key, held_by):
    """Magnitudes show what they hold under any key, the noise itself what it holds under one key."""
    z, published, mask = flipped(one_key)
    held = z.abs() - z.abs().mean() if held_by == "magnitudes" else z
    clean = unit(np.asarray((held * mask).flatten(1)) @ normal(72, 24, seed=4))
    own = {}
    for of in ("magnitudes", "noise"):
        features = noise_features(published, mask, of)
        own[of] = cosines(ridge(features[TRAINED], clean[TRAINED])(features[UNSEEN]), clean[UNSEEN]).mean()
    shown, hidden = own.pop(held_by), own.popitem()[1]
    assert shown > 0.8 if held_by == "magnitudes" or one_key else abs(shown) < 0.1
    assert abs(hidden) < 0.1


def test_noise_features_leave_out_the_background():
    z, published, mask = flipped(one_key=False)
    inside = noise_features(published, mask, "noise").reshape(240, 2, 6, 6)
    assert np.array_equal(inside != 0, np.broadcast_to(mask.numpy(), inside.shape))
    assert np.array_equal(noise_features(z, mask, "magnitudes"), noise_features(published, mask, "magnitudes"))


# Regression onto pictures


def smooth(n: int, seed: int = 0, size: int = 32) -> torch.Tensor:
    coarse = torch.from_numpy(normal(n, 3, 4, 4, seed=seed)).float()
    return to_floats(to_bytes(0.4 * interpolate(coarse, (size, size), mode="bicubic")))


def centre(n: int, size: int = 32) -> torch.Tensor:
    face = torch.zeros(n, 1, size, size, dtype=torch.bool)
    face[:, :, size // 4 : -size // 4, size // 4 : -size // 4] = True
    return face


def error(images: torch.Tensor, originals: torch.Tensor, face: torch.Tensor) -> float:
    return float((images - originals).abs()[face.expand_as(images)].mean())


def inverted(originals: torch.Tensor) -> torch.Tensor:
    return -originals


def one_key(originals: torch.Tensor) -> torch.Tensor:
    """Each pixel and colour has its sign, the same in all pictures."""
    return originals * torch.from_numpy(np.sign(normal(1, *originals.shape[1:], seed=5))).float()


@pytest.mark.parametrize("distorted", [inverted, one_key])
def test_a_deanonymizer_undoes_what_is_the_same_in_all_pictures(distorted):
    originals, face = smooth(240), centre(240)
    published = torch.where(face, distorted(originals), originals)
    restore = deanonymizer(originals[TRAINED], published[TRAINED], face[TRAINED], steps=120)
    restored = restore(published[UNSEEN], face[UNSEEN])
    unseen, inside = originals[UNSEEN], face[UNSEEN]
    assert error(restored, unseen, inside) < 0.25 * error(published[UNSEEN], unseen, inside)
    assert torch.equal(restored[~inside.expand_as(restored)], unseen[~inside.expand_as(restored)])


def test_a_deanonymizer_finds_nothing_in_noise():
    originals, face = smooth(240), centre(240)
    published = to_floats(to_bytes(smooth(240, seed=6)))  # another picture, in the background as well
    restore = deanonymizer(originals[TRAINED], published[TRAINED], face[TRAINED], steps=60)
    restored = restore(published[UNSEEN], face[UNSEEN])
    rows = [np.asarray((images * face[UNSEEN]).flatten(1)) for images in (restored, originals[UNSEEN])]
    guess, truth = (unit(row - row.mean(0)) for row in rows)
    assert abs(cosines(guess, truth).mean()) < 0.1


def test_training_repeats_and_leaves_the_global_generator_alone():
    originals, face = smooth(20), centre(20)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = deanonymizer(originals, -originals, face, steps=3)(-originals, face)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second = deanonymizer(originals, -originals, face, steps=3)(-originals, face)
    other = deanonymizer(originals, -originals, face, steps=3, seed=1)(-originals, face)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_what_is_restored_does_not_depend_on_the_batch():
    originals, face = smooth(20), centre(20)
    restore = deanonymizer(originals, -originals, face, steps=3)
    alone = torch.cat([restore(-originals[i : i + 1], face[i : i + 1]) for i in range(20)])
    torch.testing.assert_close(restore(-originals, face), alone, atol=1e-5, rtol=0)


def test_a_picture_without_a_face_stays_as_it_is():
    originals = smooth(20)
    restore = deanonymizer(originals, -originals, centre(20), steps=1)
    assert torch.equal(restore(originals, torch.zeros_like(centre(20))), originals)
