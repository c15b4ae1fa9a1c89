"""Scores of pairs, and what is made of them: linkage, and whether cosines under wrong keys are distributed as those of strangers.

Both are kept as they are used, rounded, without names: a reader makes the same numbers again (`python -m experiments.pairs`).
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from keyanon.attacks import leakage
from keyanon.attacks.case import Case, Found, Pairs
from keyanon.measures.biometrics import Floats, cosine
from keyanon.types import COSINE

TWO_FILES, PHOTOGRAPH = "linkage of two files", "file and its photograph"
WRONG_KEYS = ("wrong key", "key off by one bit", "password off by one bit", "nonce off by one bit")
ALL_FOUR = "wrong keys, all four"
COMPARED = ("anonymized", *WRONG_KEYS, "face blanked, its place known")
IMPOSTORS = "impostors"
STRANGERS, FRESH = "strangers", "fresh face"
CONTROLS = (IMPOSTORS, STRANGERS, FRESH)
QUANTILES = 100  # that stand for a person's impostors
FINENESS = 25  # steps of a rounded score to a deviation of all, about


def rounded(scores: Floats) -> NDArray[np.float32]:
    """Scores in whole steps of one digit, about FINENESS to their spread, so that files of them are small."""
    spread = float(np.nanstd(scores)) if np.isfinite(scores).any() else 0.0
    step = float(f"{spread / FINENESS:.0e}") if spread > 0 else 1.0
    return (np.round(scores / step) * step).astype(np.float32)


def numbered(names: Sequence[str]) -> NDArray[np.intp]:
    """A number for each person, the same for the same name."""
    return np.unique(np.asarray(names, dtype=str), return_inverse=True)[1]


def compared_cosines(case: Case, found: Sequence[Found]) -> Iterator[Pairs]:
    """The cosines to the right person that were found in each view, and those of impostors.

    Strangers: each clean picture beside one of somebody else. Impostors: each beside everybody else's, of which QUANTILES are
    kept. Fresh faces: of other noise in the same background, alike to wrong keys where these tell no more than the background
    does; a generated face may well be less like everyone than people are.
    """
    people = case.people
    numbers, names = numbered(people.names), np.asarray(people.names)
    means = {(one.view, one.scorer): one.values for one in found if one.statistic.statistic == "mean"}
    for name in case.recognizers:
        seen = {view: means[view, name] for view in (*COMPARED, *CONTROLS) if (view, name) in means}
        if not seen:
            continue
        others = cosine(people.clean[name], people.gallery[name])
        strange = names[:, None] != np.asarray(people.gallery_names)
        rows = np.stack([quantiles(row[here]) for row, here in zip(others, strange, strict=True)])
        yield Pairs(IMPOSTORS, name, numbers, rows[None].astype(np.float32))
        for view, values in seen.items():
            own = np.array([values.get(id, np.nan) for id in people.ids])
            yield Pairs(view, name, numbers, own[None, :, None].astype(np.float32))


def quantiles(values: Floats) -> Floats:
    """QUANTILES of the values, each one of them; NaN where there is none."""
    defined = np.sort(values[~np.isnan(values)])
    if defined.size == 0:
        return np.full(QUANTILES, np.nan)
    places = (np.arange(QUANTILES) + 0.5) / QUANTILES * defined.size
    chosen: Floats = defined[places.astype(int)]
    return chosen


def statistics_of_pairs(pairs: Sequence[Pairs]) -> Iterator[Found]:
    """The numbers of a table that are made of pairs."""
    for one in pairs:
        if one.view in (TWO_FILES, PHOTOGRAPH):
            for statistic in leakage.linkage_statistics(one.scores.astype(np.float64), one.people.tolist()):
                yield Found(one.view, one.scorer, statistic)
    for scorer in dict.fromkeys(one.scorer for one in pairs):
        yield from distribution_tests({one.view: one for one in pairs if one.scorer == scorer}, scorer)


def distribution_tests(views: Mapping[str, Pairs], scorer: str) -> Iterator[Found]:
    """Are cosines to the right person distributed as those of the controls? Two-sample tests by person.

    `wrong keys, all four` takes the four kinds together, four faces a person.
    """
    first = {view: [views[view]] for view in COMPARED if view in views}
    if first.keys() >= set(WRONG_KEYS):
        first[ALL_FOUR] = [views[view] for view in WRONG_KEYS]
    for view, own in first.items():
        for control in CONTROLS:
            if control in views:
                for statistic in leakage.kolmogorov_smirnov(*by_person(own), *by_person([views[control]])):
                    yield Found(view, f"{scorer} beside {control}", statistic, measure=COSINE)


def by_person(pairs: Sequence[Pairs]) -> tuple[Floats, NDArray[np.intp]]:
    """All values, and whose each of them is."""
    values = np.concatenate([one.scores.ravel() for one in pairs]).astype(np.float64)
    owners = [np.broadcast_to(one.people[None, :, None], one.scores.shape).ravel() for one in pairs]
    return values, np.concatenate(owners)
