"""Classifiers on embeddings: the truth where it is known, and the authors' notebook written down anew."""

import math

import numpy as np
import pytest
import torch
from sklearn.svm import SVC

from keyanon.errors import BadSetting
from keyanon.measures.separability import SEED, Separability


def faces(count: int, shift: float = 0.0, seed: int = 0, size: int = 16) -> np.ndarray:
    """Unit rows that share a direction by more or less."""
    rows = np.random.default_rng(seed).normal(size=(count, size)) + shift * np.eye(size)[0]
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def found(measure: Separability, *sets, **others) -> dict:
    return {(view, one.statistic): one for view, one in measure.statistics(*sets, others)}


def test_far_sets_are_told_apart_and_recovered_pictures_are_none_of_the_anonymized():
    clean, anonymized, back = faces(60, -90, 0, 256), faces(60, 90, 1, 256), faces(60, -90, 2, 256)
    statistics = found(Separability((5, 20), 2, (20,), (8,)), clean, anonymized, recovered=back, wrong=anonymized)
    values = {name: one.value for name, one in statistics.items()}
    assert values == {
        (None, "svm_accuracy_of_2@train=5"): 1,
        (None, "svm_accuracy_of_2@train=20"): 1,
        (None, "svm_accuracy@train=20"): 1,
        (None, "linear_accuracy@train=8"): 1,
        ("recovered", "svm_anonymized@train=5"): 0,
        ("recovered", "svm_anonymized@train=20"): 0,
        ("wrong", "svm_anonymized@train=5"): 1,
        ("wrong", "svm_anonymized@train=20"): 1,
    }
    assert statistics[None, "svm_accuracy_of_2@train=20"].n == 80
    assert statistics[None, "svm_accuracy@train=20"].n == 70  # 5 of the 60 are set aside


@pytest.mark.parametrize("same", [True, False])
def test_what_differs_in_nothing_is_told_apart_by_guessing(same):
    clean = faces(600)
    anonymized = clean if same else faces(600, seed=1)
    for statistic in found(Separability((10, 40), 5), clean, anonymized).values():
        assert statistic.value == pytest.approx(0.5, abs=1e-12 if same else 0.06)


def notebook_split(clean, anonymized, size, aside):
    x = np.concatenate([clean[:size], anonymized[:size]])
    y = np.concatenate([np.zeros(size), np.ones(size)])
    rest = len(clean) - size - aside
    tested = np.concatenate([clean[size + aside :], anonymized[size + aside :]])
    return x, y, tested, np.concatenate([np.zeros(rest), np.ones(rest)])


def test_the_notebooks_svm_on_the_first_pictures():
    clean, anonymized = faces(200), faces(200, 0.8, seed=1)
    x, y, tested, truth = notebook_split(clean, anonymized, 40, 10)
    expected = np.mean(SVC(kernel="linear").fit(x, y).predict(tested) == truth)
    ours = found(Separability(), clean, anonymized)[None, "svm_accuracy@train=40"]
    assert 0.55 < expected < 1
    assert (ours.value, ours.n) == (pytest.approx(expected, abs=1e-12), 300)


def test_the_notebooks_svms_on_random_draws():
    clean, anonymized, recovered = faces(200), faces(200, 0.8, seed=1), faces(200, 0.3, seed=2)
    generator, accuracies, shares = np.random.default_rng(SEED), [], []
    for _ in range(5):
        order = generator.permutation(200)
        x, y, tested, truth = notebook_split(clean[order], anonymized[order], 20, 0)
        svm = SVC(kernel="linear").fit(x, y)
        accuracies.append(np.mean(svm.predict(tested) == truth))
        shares.append(svm.predict(recovered).mean())
    ours = found(Separability((20,)), clean, anonymized, recovered=recovered)
    assert ours[None, "svm_accuracy_of_5@train=20"].value == pytest.approx(np.mean(accuracies), abs=1e-12)
    assert ours["recovered", "svm_anonymized@train=20"].value == pytest.approx(np.mean(shares), abs=1e-12)


@pytest.mark.parametrize("length", [1, 25])
def test_the_notebooks_linear_layer(length):
    """The notebook prints losses of 0.853, 0.425 and 0.026 at the epochs 1, 11 and 91, which unit rows are too short for."""
    clean, anonymized = (length * rows for rows in (faces(200, size=512), faces(200, 4, seed=1, size=512)))
    x, y, tested, truth = (torch.tensor(part).float() for part in notebook_split(clean, anonymized, 8, 2))
    torch.manual_seed(SEED)
    linear = torch.nn.Linear(512, 1, bias=True)
    optimizer = torch.optim.Adam(linear.parameters(), lr=1e-3, weight_decay=1e-4)
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = torch.nn.BCEWithLogitsLoss()(linear(x), y[:, None])
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
    beginning, later, end = (losses[epoch - 1] for epoch in (1, 11, 91))
    if length == 1:
        assert beginning == pytest.approx(math.log(2), abs=0.01)
        assert end > 0.4
    else:
        assert abs(beginning - math.log(2)) > 0.03
        assert later < 0.45
        assert end < 0.03
    expected = ((torch.sigmoid(linear(tested)) >= 0.5).float()[:, 0] == truth).float().mean().item()
    before = torch.get_rng_state()
    ours = found(Separability(), clean, anonymized)[None, "linear_accuracy@train=8"]
    assert (ours.value, ours.n) == (pytest.approx(expected, abs=1e-6), 380)
    assert torch.equal(torch.get_rng_state(), before), "nobody else's random numbers change"


def test_pictures_without_a_face_and_sets_that_are_too_small_are_counted_and_undefined():
    clean, anonymized, recovered = faces(30), faces(30, seed=1), faces(30, seed=2)
    clean[3], anonymized[4], recovered[:10] = math.nan, math.nan, math.nan
    ours = found(Separability((5, 28)), clean, anonymized, recovered=recovered)
    five = ours[None, "svm_accuracy_of_5@train=5"]
    assert (five.n, five.undefined) == (46, 4)
    assert (ours["recovered", "svm_anonymized@train=5"].n, ours["recovered", "svm_anonymized@train=5"].undefined) == (
        20,
        10,
    )
    for name in ("svm_accuracy_of_5@train=28", "svm_accuracy@train=40"):
        assert math.isnan(ours[None, name].value)
        assert ours[None, name].n == 0
    assert math.isnan(ours["recovered", "svm_anonymized@train=28"].value)


def test_every_statistic_has_a_label():
    measure = Separability((5, 7), 3, (9,), (4,))
    assert {name for _, name in found(measure, faces(40), faces(40, seed=1), other=faces(3))} == set(measure.summaries)
    with pytest.raises(BadSetting, match=r"draws=\(\): expected a list of whole numbers"):
        Separability(())
