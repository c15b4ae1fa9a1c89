"""Can anonymized pictures be told from clean ones by a recognizer's embeddings alone? Linear classifiers that learn from few.

As the authors' notebook latent_space_shift has it (github.com/PLabarbarie/diffusion-signflip-anon at 66dac01): both versions of
each training picture are learned, all others are tested, and guessing scores 0.5. Embeddings are rows (n d), NaN where no face
was found. Their lengths count: C = 1 and Adam's steps are small or large beside them. The notebook's are as long as the networks
make them (`lengths` of the recognizers).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from keyanon.measures.biometrics import Floats, Statistic
from keyanon.settings import Count, Counts, checked
from keyanon.types import Summary

Labels = NDArray[np.bool_]  # True for anonymized pictures
Classifier = Callable[[Floats], Labels]
SET_ASIDE = 4  # the notebook keeps a fifth of its first pictures for validation, and does not look at them
EPOCHS = 100
SEED = 0  # of the draws and of the layer's first weights, which the notebook leaves open


@checked
@dataclass(frozen=True)
class Separability:
    """How often classifiers tell the anonymized pictures from the clean ones, and what they take other views for.

    Args:
        draws: numbers of training pictures; of each so many are drawn `repeats` times for a linear SVM:
            `svm_accuracy_of_REPEATS@train=N`, the mean accuracy, and `svm_anonymized@train=N`, the mean share of another
            view that these SVMs take for anonymized pictures (in the notebook that of the last SVM alone).
        repeats: see there.
        first: the same with the dataset's first pictures, once: `svm_accuracy@train=N`. A quarter as many that follow are
            neither learned nor tested.
        linear: as `first`, with one linear layer that Adam trains: `linear_accuracy@train=N`.
    """

    draws: Counts = (5, 10, 20, 40, 100)
    repeats: Count = 5
    first: Counts = (40,)
    linear: Counts = (8,)

    @property
    def summaries(self) -> dict[str, Summary]:
        """What the statistics are, by name."""
        learned = "with {} training pictures, anonymized told from clean"
        svm = {
            f"svm_accuracy_of_{self.repeats}@train={n}": f"SVM {learned.format(n)}, {self.repeats} draws"
            for n in self.draws
        }
        svm |= {f"svm_accuracy@train={n}": f"SVM {learned.format(n)}" for n in self.first}
        svm |= {f"linear_accuracy@train={n}": f"linear layer {learned.format(n)}" for n in self.linear}
        svm |= {
            f"svm_anonymized@train={n}": f"taken for anonymized by an SVM with {n} training pictures"
            for n in self.draws
        }
        return {name: Summary(label, "none") for name, label in svm.items()}

    def statistics(
        self, clean: ArrayLike, anonymized: ArrayLike, others: Mapping[str, Floats]
    ) -> Iterator[tuple[str | None, Statistic]]:
        """The accuracies (view None), and the shares of `others` by view.

        `n` counts tested embeddings, both versions of a picture. A picture counts where both versions have a face. NaN where
        too few pictures are there to train and to test.
        """
        pairs = np.stack([np.asarray(clean, np.float64), np.asarray(anonymized, np.float64)])
        both = ~np.isnan(pairs).any(axis=(0, 2))
        pairs, lost = pairs[:, both], 2 * int((~both).sum())
        found = {view: rows[~np.isnan(rows).any(axis=1)] for view, rows in others.items()}
        generator, count = np.random.default_rng(SEED), pairs.shape[1]

        def accuracy(classifiers: Sequence[Classifier], tested: Sequence[Floats], name: str) -> Statistic:
            shares = [correct(tell, test) for tell, test in zip(classifiers, tested, strict=True)]
            n = 2 * tested[0].shape[1] if tested else 0
            return Statistic(name, n, lost, float(np.mean(shares)) if shares else math.nan, math.nan, math.nan)

        for size in self.draws:
            orders = [generator.permutation(count) for _ in range(self.repeats if size < count else 0)]
            svms = [svm(pairs[:, order[:size]]) for order in orders]
            yield (
                None,
                accuracy(
                    svms, [pairs[:, order[size:]] for order in orders], f"svm_accuracy_of_{self.repeats}@train={size}"
                ),
            )
            for view, rows in found.items():
                shares = [float(np.mean(tell(rows))) for tell in svms if len(rows)]
                value = float(np.mean(shares)) if shares else math.nan
                missing = len(others[view]) - len(rows)
                yield view, Statistic(f"svm_anonymized@train={size}", len(rows), missing, value, math.nan, math.nan)
        for kind, sizes, learn in (("svm", self.first, svm), ("linear", self.linear, linear_layer)):
            for size in sizes:
                tested = [rest] if (rest := pairs[:, size + size // SET_ASIDE :]).size else []
                tell = [learn(pairs[:, :size]) for _ in tested]
                yield None, accuracy(tell, tested, f"{kind}_accuracy@train={size}")


def svm(pairs: Floats) -> Classifier:
    """A linear support vector machine (scikit-learn's, C = 1) of clean and anonymized embeddings (2 n d)."""
    from sklearn.svm import SVC  # seconds, which other measures have no need of

    rows, labels = labelled(pairs)
    predict: Any = SVC(kernel="linear").fit(rows, labels).predict
    return lambda rows: np.asarray(predict(rows), bool)


def linear_layer(pairs: Floats) -> Classifier:
    """Logistic regression by 100 steps of Adam on all rows at once, from PyTorch's own first weights."""
    rows, labels = (torch.from_numpy(part).float() for part in labelled(pairs))
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(SEED)
        layer = torch.nn.Linear(rows.shape[1], 1)
        optimizer = torch.optim.Adam(layer.parameters(), lr=1e-3, weight_decay=1e-4)
        for _ in range(EPOCHS):
            optimizer.zero_grad()
            torch.nn.functional.binary_cross_entropy_with_logits(layer(rows)[:, 0], labels).backward()
            optimizer.step()
    weights, bias = (part.detach().double().numpy() for part in (layer.weight[0], layer.bias))
    return lambda rows: np.asarray(rows @ weights + bias >= 0, bool)


def labelled(pairs: Floats) -> tuple[Floats, Labels]:
    """All rows of (2 n d), the clean ones first, and whether each is anonymized."""
    return pairs.reshape(-1, pairs.shape[-1]), np.repeat([False, True], pairs.shape[1])


def correct(tell: Classifier, pairs: Floats) -> float:
    rows, labels = labelled(pairs)
    return float(np.mean(tell(rows) == labels))
