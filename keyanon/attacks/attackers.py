"""The attackers of `python -m experiments.security`: what each learns from published files (keyanon/attacks/case.py).

    Linkage             files of one photograph under different keys, and a file beside its photograph, told from those of others
    KnownPlaintext      some originals are known, and the key stream is one for all, as the authors have it; or has nonces
    ReusedRotations     the same against rotations, from pictures with one mask
    RightSigns          recovery by one who holds a share of the right signs, and the share a recognizer needs
    SeedSearch          the authors' keys come from 32 bits: found by trying, from one known pair
    Identities          who recognizers see on files, on pictures recovered with wrong keys, on a fresh face in the same
                        background, and where the face is blanked
    BackgroundOnly      the same, by one who knows where the blanked face was
    Learned             attackers who train on pairs of other people, with keys of their own or under the victims' key stream
    KeySearch           the best of many wrong keys by a recognizer's word, for the right suspect and for another one
    NoiseOracle         does z_T look more like noise under the right key?
    Tampering           files changed on their way: refused by the tag? and what would come out without one
    password_dictionary what a dictionary costs by Argon2id, on this machine

conf/security holds their settings. keyanon/attacks/leakage.py and learned.py have their arithmetic, pairs.py the
statistics of pairs.

Bars: AUC 0.5 and D_sys 0 tell nothing; strangers, the wrong suspect and the fresh face are the controls.
"""

import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Annotated, cast

import numpy as np
import torch
from numpy.typing import NDArray

from keyanon.attacks import leakage
from keyanon.attacks.case import (
    Case,
    Files,
    Found,
    Knowledge,
    Pairs,
    People,
    Taken,
    Victims,
    joined,
    publish,
    without_verification,
)
from keyanon.attacks.leakage import NonceOff, OneStream, SeededSigns
from keyanon.attacks.learned import deanonymizer, noise_features, ridge
from keyanon.attacks.pairs import PHOTOGRAPH, TWO_FILES, WRONG_KEYS, numbered, rounded
from keyanon.attacks.views import NearKey, PartialKey, WrongKey, without_authentication
from keyanon.channel.headers import Header
from keyanon.channel.keys import SALT_BYTES, MasterKey, Recipe, experiment_key
from keyanon.channel.pixels import to_bytes, to_floats
from keyanon.channel.streams import normals, signs
from keyanon.context import Context
from keyanon.faces.parsing import EllipseParser
from keyanon.faces.recognition import with_places_of
from keyanon.measures.biometrics import (
    AVERAGES,
    Floats,
    Statistic,
    cosine,
    mean_statistic,
    quantile_statistic,
    rate_statistic,
    verification_statistics,
    verification_summaries,
)
from keyanon.measures.gaussianity import MEASURES, generator_of, measure
from keyanon.measures.scorers import psnr_face
from keyanon.methods.exact import pixels
from keyanon.settings import Count, Counts, Positive, Setting, Share, Shares, checked
from keyanon.types import (
    Image,
    Key,
    KeyedNoise,
    Latent,
    Mask,
    Measure,
    Observed,
    Place,
    Published,
    Scores,
    Summary,
    View,
    declared,
)

SEEDS = 2**32
Argon2 = Annotated[
    Mapping[str, Count],
    Setting(
        "iterations, memory (MiB) and lanes, whole numbers from 1 on",
        lambda one: one.keys() == {"iterations", "memory", "lanes"},
    ),
]
DICTIONARY = 2**30
PASSWORD = "everyone may know this password"
HOUR, YEAR = 3600, 365.25 * 86400  # seconds
MIB = 1024  # KiB
ORACLES = tuple(name for name in MEASURES if name != "ks_passed")
VIEWS = {"original": View("clean"), "anonymized": View("anonymized"), "recovered": View("recovered")}  # others: attacks
FACE = cast(Measure, declared(psnr_face))
COST = Measure("cost")
STREAMS: Mapping[str, Callable[[Key], Key]] = {"one key stream": OneStream, "nonces": lambda key: key}

log = logging.getLogger(__name__)


def summaries(far: float) -> dict[str, Summary]:
    """What the statistics of these attackers tell, by name."""
    return {
        **AVERAGES,
        **verification_summaries(far),
        **leakage.SUMMARIES,
        "p90": Summary(),
        "max": Summary(),
        "rate": Summary(direction="none"),
        f"median share to pass at far={far:g}": Summary(direction="none"),
        "seconds per guess": Summary(direction="none"),
        "years for 2^30 guesses": Summary(direction="none"),
    }


@checked
@dataclass(frozen=True)
class Linkage:
    """The attacker has two files under independent keys, or a file and a candidate photograph, and no key: do they belong together?

    By |z_T| in three forms and by what recognizers see, who see the public background as well (unlinkability: ISO/IEC 24745;
    D_sys: Gomez-Barrero et al., IEEE TIFS 13(6), 2018). Photographs are inverted with their own file's header, though an
    attacker would use that of the file he compares with: what the two share by that can only count against the method.

    `norms in floats` is by what no file shows: each channel's norm as the transform gives it out, before there is a picture. Of
    two files of one photograph it is the same but for what their nonces do to the background; `largest residue` says how far it
    is from 1, in logarithms.
    """

    pictures: Count | None

    def chosen(self, case: Case) -> Sequence[str]:
        return case.people.ids[: self.pictures]

    def attack(self, case: Case, knowledge: Knowledge) -> Callable[[Victims], Observed]:
        def observe(victims: Victims) -> Observed:
            vectors: dict[Place, torch.Tensor] = {}
            for i, files in enumerate(victims.files):
                view = f"file {i}"
                z, mask = case.method.noise(victims.pictures, files.headers)
                if i == 0:
                    vectors |= {("photograph", "noise"): z, ("photograph", "mask"): mask.float()}
                residues = leakage.published_norms(z, mask, case.method.transform.secret)
                vectors[view, IN_FLOATS] = torch.from_numpy(residues)
                vectors |= {(view, "noise"): files.zT, (view, "mask"): files.mask.float()}
                vectors |= case.embed(view, files.images)
            return Observed(vectors=vectors)

        return observe

    def conclude(self, case: Case, taken: Taken) -> Iterator[Found | Pairs]:
        people = case.people.of(taken.ids)
        numbers, views = numbered(people.names), [f"file {i}" for i in range(file_count(taken))]
        photograph, *files = (noise_taken(taken, view) for view in ("photograph", *views))
        for name, likeness in LIKENESSES.items():
            yield Pairs(
                TWO_FILES, name, numbers, rounded(np.stack([likeness(*a, *b) for a, b in combinations(files, 2)]))
            )
            yield Pairs(PHOTOGRAPH, name, numbers, rounded(likeness(*photograph, *files[0])[None]))
        for name in case.recognizers:
            rows = [taken.vectors(view, name) for view in views]
            yield Pairs(TWO_FILES, name, numbers, rounded(np.stack([cosine(a, b) for a, b in combinations(rows, 2)])))
            yield Pairs(PHOTOGRAPH, name, numbers, rounded(cosine(people.clean[name], rows[0])[None]))
        norms = [taken.vectors(view, IN_FLOATS) for view in views]
        between = np.stack([leakage.feature_likeness(a, b) for a, b in combinations(norms, 2)])
        yield Pairs(TWO_FILES, IN_FLOATS, numbers, rounded(between))
        residue = np.abs(norms[0]).max(1)
        yield people.averaged(IN_FLOATS, "largest residue", residue)
        yield largest(IN_FLOATS, "largest residue", residue)


IN_FLOATS = "norms in floats"


def largest(view: str, scorer: str, values: Floats) -> Found:
    """The highest of all that are defined."""
    defined = values[~np.isnan(values)]
    most = float(defined.max()) if defined.size else np.nan
    return Found(view, scorer, Statistic("max", defined.size, values.size - defined.size, most, np.nan, np.nan))


def file_count(taken: Taken) -> int:
    """How many files of each picture were looked at."""
    count = 0
    while taken.vectors(f"file {count}", "mask").size:
        count += 1
    return count


def noise_taken(taken: Taken, view: str) -> tuple[Latent, Mask]:
    """The noise (n c cells 1) and the face's cells (n 1 cells 1) that were taken down."""
    mask = torch.from_numpy(taken.vectors(view, "mask") > 0)[:, None, :, None]
    noise = torch.from_numpy(taken.vectors(view, "noise").astype(np.float32))
    return noise.view(len(mask), -1, mask.shape[2], 1), mask


def by_norms(a: Latent, in_a: Mask, b: Latent, in_b: Mask) -> Floats:
    return leakage.feature_likeness(leakage.channel_norms(a, in_a), leakage.channel_norms(b, in_b))


def by_magnitudes(a: Latent, in_a: Mask, b: Latent, in_b: Mask) -> Floats:
    one, other = leakage.sorted_magnitudes(a, in_a), leakage.sorted_magnitudes(b, in_b)
    return leakage.feature_likeness(one, other)


LIKENESSES = {"layout of |z|": leakage.layout_likeness, "channel norms": by_norms, "sorted |z|": by_magnitudes}


@checked
@dataclass(frozen=True)
class KnownPlaintext:
    """The attacker has m files with their originals, and wants other files of the same master key.

    `key signs`: the share that he finds (0.5: none); then what they make of the other files. With one key stream for all pictures
    (the authors' code uses its keys again, from batch to batch and for both datasets), and with a nonce for each. Rotations have
    no signs: what he draws counts alone, and `ReusedRotations` has the attack that fits them.
    """

    pictures: Count | None
    pairs: Counts

    def split(self, case: Case) -> tuple[list[int], Sequence[str], Sequence[str]]:
        """The numbers of pairs that leave a picture to attack, the pictures that are known, and those that are not."""
        ids = case.people.ids[: self.pictures]
        fits = [m for m in self.pairs if m < len(ids)]
        most = max(fits, default=len(ids))
        return fits, ids[:most], ids[most:]

    def chosen(self, case: Case) -> Sequence[str]:
        fits, known, targets = self.split(case)
        if not fits:
            log.warning("known plaintext: no number of pairs in %s leaves one of %d pictures", self.pairs, len(known))
        return targets

    def published(self, case: Case, stream: str, victims: Victims) -> Files:
        if stream == "nonces":
            return victims.files[0]
        return publish(case.method, victims.pictures, wrapped(stream, victims.files[0].keys), victims.ids)

    def learn(self, case: Case) -> Knowledge:
        """k as it shows in m pairs, for each stream and m."""
        fits, known, _ = self.split(case)
        knowledge: Knowledge = {}
        for stream in STREAMS:
            originals, files = [], []
            for victims in case.victims(known):
                files.append(self.published(case, stream, victims))
                originals.append(case.method.noise(victims.pictures, files[-1].headers))
            z, mask = (torch.cat(parts) for parts in zip(*originals, strict=True))
            seen = joined(files)
            for m in fits:
                knowledge[f"{stream}, {m}"] = leakage.voted_signs(z[:m], seen.zT[:m], mask[:m] & seen.mask[:m])
        return knowledge

    def attack(self, case: Case, knowledge: Knowledge) -> Callable[[Victims], Observed]:
        fits, _, _ = self.split(case)

        def observe(victims: Victims) -> Observed:
            values: dict[Place, Scores] = {}
            vectors: dict[Place, torch.Tensor] = {}
            for stream in STREAMS:
                files = self.published(case, stream, victims)
                _, mask = case.method.noise(victims.pictures, files.headers)
                face = pixels(mask, victims.pictures)
                for m in fits:
                    view, found = pairs_view(stream, m), knowledge[f"{stream}, {m}"]
                    if case.method.transform.secret == "signs of cells":
                        values[view, "key signs"] = torch.tensor(
                            [
                                leakage.share_right(found, signs(key, context, tuple(found.shape)), inside)
                                for key, context, inside in zip(
                                    files.keys, files.contexts, files.mask[:, 0], strict=True
                                )
                            ]
                        )
                    coins = signs(experiment_key(1), Context(b"coins"), tuple(found.shape))
                    guess = torch.where(found == 0, coins, found).to(files.zT)
                    inside = files.mask.expand_as(files.zT)
                    turned = torch.where(inside, files.zT * guess, files.zT)
                    out = case.method.redraw(files.encoded, files.headers, turned)
                    values[view, "psnr_face"] = psnr_face(out, victims.pictures, face)
                    vectors |= case.embed(view, out)
            return Observed(values, vectors)

        return observe

    def conclude(self, case: Case, taken: Taken) -> Iterator[Found]:
        people, (fits, _, _) = case.people.of(taken.ids), self.split(case)
        for stream in STREAMS:
            for m in fits:
                view = pairs_view(stream, m)
                if case.method.transform.secret == "signs of cells":
                    yield people.averaged(view, "key signs", taken.values(view, "key signs"))
                yield from likeness_to_originals(case, people, taken, view)


def wrapped(stream: str, keys: Sequence[Key]) -> list[Key]:
    return [STREAMS[stream](key) for key in keys]


def pairs_view(stream: str, m: int) -> str:
    return f"known plaintext, {stream}, {m:2} pairs"


def likeness_to_originals(case: Case, people: People, taken: Taken, view: str) -> Iterator[Found]:
    """How like their originals the pictures are that somebody without the key has recovered."""
    yield people.averaged(view, "psnr_face", taken.values(view, "psnr_face"), FACE)
    for name in case.recognizers:
        yield people.averaged(view, name, (taken.vectors(view, name) * people.clean[name]).sum(1))


@checked
@dataclass(frozen=True)
class ReusedRotations:
    """Known plaintext against rotations: m pairs with one mask show Q_c, and so does a channel's encrypted norm its key bytes.

    All pictures get the same ellipse, as an attacker asks for who has a service publish pictures of his choice: under one key
    stream rotations repeat only where the faces have equally many cells d. Each channel's Q_c is the orthogonal map that takes
    the known z_T to the known z'_T best; d pairs determine it. `cosine of z_T`: of what he finds in other files to the
    truth, the mean over channels.
    """

    pairs: Counts
    targets: Count
    centre: tuple[Share, Share]
    axes: tuple[Positive, Positive]

    def chosen(self, case: Case) -> Sequence[str]:
        if case.method.transform.secret != "rotation":
            return []
        most, n, ids = max(self.pairs), max(self.pairs) + self.targets, case.people.ids
        if n > len(ids):
            log.warning(
                "reused rotations: %d pairs and %d targets are more than %d pictures", most, self.targets, len(ids)
            )
            return []
        return ids[most:n]

    def method(self, case: Case) -> KeyedNoise:
        return replace(without_verification(case.method), parser=EllipseParser(self.centre, self.axes))

    def learn(self, case: Case) -> Knowledge:
        """z_T, z'_T and what the transform sent along, of the known pairs inside the ellipse, for each stream."""
        method, known, knowledge = self.method(case), case.people.ids[: max(self.pairs)], Knowledge()
        for stream in STREAMS:
            parts: dict[str, list[torch.Tensor]] = {"z": [], "zT": [], "sent": []}
            for victims in case.victims(known):
                files = publish(method, victims.pictures, wrapped(stream, victims.files[0].keys), victims.ids)
                z, mask = method.noise(victims.pictures, files.headers)
                cells = mask[0, 0]
                parts["z"].append(z[:, :, cells])
                parts["zT"].append(files.zT[:, :, cells])
                parts["sent"].append(torch.stack([torch.tensor(list(sent)) for sent in sent_along(files)]))
            knowledge |= {f"{stream}, {name}": torch.cat(rows) for name, rows in parts.items()}
        return knowledge

    def attack(self, case: Case, knowledge: Knowledge) -> Callable[[Victims], Observed]:
        method = self.method(case)

        def observe(victims: Victims) -> Observed:
            values: dict[Place, Scores] = {}
            vectors: dict[Place, torch.Tensor] = {}
            for stream in STREAMS:
                files = publish(method, victims.pictures, wrapped(stream, victims.files[0].keys), victims.ids)
                truth, mask = method.noise(victims.pictures, files.headers)
                cells, face = mask[0, 0], pixels(mask, victims.pictures)
                z, zT, sent = (knowledge[f"{stream}, {name}"] for name in ("z", "zT", "sent"))
                known_sent = [bytes(row) for row in sent.tolist()]
                for m in self.pairs:
                    view, turned = rotations_view(stream, m), files.zT.clone()
                    turned[:, :, cells] = leakage.rotated_back(
                        z[:m], zT[:m], known_sent[:m], turned[:, :, cells], sent_along(files)
                    )
                    alike = torch.cosine_similarity(turned[:, :, cells], truth[:, :, cells], dim=2).mean(1)
                    out = method.redraw(files.encoded, files.headers, turned)
                    values[view, "cosine of z_T"], values[view, "psnr_face"] = (
                        alike,
                        psnr_face(out, victims.pictures, face),
                    )
                    values[view, "cells"] = torch.full((len(truth),), float(cells.sum()))
                    vectors |= case.embed(view, out)
            return Observed(values, vectors)

        return observe

    def conclude(self, case: Case, taken: Taken) -> Iterator[Found]:
        people = case.people.of(taken.ids)
        for stream in STREAMS:
            for m in self.pairs:
                kept = rotations_view(stream, m)
                view = f"{kept}, {int(taken.values(kept, 'cells')[0])} cells"
                yield people.averaged(view, "cosine of z_T", taken.values(kept, "cosine of z_T"))
                yield from (replace(one, view=view) for one in likeness_to_originals(case, people, taken, kept))


def rotations_view(stream: str, m: int) -> str:
    return f"reused rotations, {stream}, {m:3} pairs"


def sent_along(files: Files) -> list[bytes]:
    """What the keyed transform sent along."""
    return [Header.unpack(header).sent for header in files.headers]


@checked
@dataclass(frozen=True)
class RightSigns:
    """The attacker has a share of the right signs, 0.5 being none: does a recognizer accept what he recovers?

    Wrong signs leave cos(z_T, what he has) = 1 - 2 h, h their share. Only for keys that are signs: rotations have none, and a
    master key has no neighbours (`Identities` has those that differ in a bit).
    """

    pictures: Count | None
    shares: Shares

    def chosen(self, case: Case) -> Sequence[str]:
        has_signs = case.method.transform.secret in ("signs of cells", "signs of frequencies")
        return case.people.ids[: self.pictures] if has_signs else []

    def attack(self, case: Case, knowledge: Knowledge) -> Callable[[Victims], Observed]:
        def observe(victims: Victims) -> Observed:
            files, vectors = victims.files[0], dict[Place, torch.Tensor]()
            for share in self.shares:
                recovered = PartialKey(1 - share)(files.published, files.keys, case.method)
                vectors |= case.embed(share_view(share), recovered)
            return Observed(vectors=vectors)

        return observe

    def conclude(self, case: Case, taken: Taken) -> Iterator[Found]:
        people = case.people.of(taken.ids)
        for name, threshold in people.thresholds.items():
            cosines = [people.own(name, taken.vectors(share_view(share), name)) for share in self.shares]
            for share, own in zip(self.shares, cosines, strict=True):
                yield people.averaged(share_view(share), name, own)
                unfound = int(np.isnan(own).sum())
                accepted = rate_statistic(own > threshold, people.names, unfound, f"tar@far={case.far:g}")
                yield Found(share_view(share), name, accepted)
            needed = leakage.share_needed(self.shares, np.stack(cosines, axis=1), threshold)
            statistic = quantile_statistic(needed, people.names, 0.5, f"median share to pass at far={case.far:g}")
            values = dict(zip(people.ids, needed.tolist(), strict=True))
            yield Found("right signs needed", name, statistic, values)


def share_view(share: float) -> str:
    return f"right signs {100 * share:5.1f} %"


@checked
@dataclass(frozen=True)
class SeedSearch:
    """The attacker has one file with its original, whose key was drawn as the authors do: their 32-bit seeds, tried in turn.

    Tried is a small range that holds the seed; from the rate follows the time for all of them. An agreement above 6.2 deviations
    is more than the luckiest of 2^32 wrong seeds has.
    """

    pictures: Count | None
    tried: Count

    def chosen(self, case: Case) -> Sequence[str]:
        return case.people.ids[: self.pictures] if case.method.transform.secret == "signs of cells" else []

    def seed(self, id: str) -> int:
        """A picture's own, among those that are tried."""
        return int.from_bytes(hashlib.sha256(b"seed|" + id.encode()).digest()[:8], "big") % self.tried

    def attack(self, case: Case, knowledge: Knowledge) -> Callable[[Victims], Observed]:
        def observe(victims: Victims) -> Observed:
            keys = [SeededSigns(self.seed(id)) for id in victims.ids]
            files = publish(case.method, victims.pictures, keys, victims.ids)
            z, mask = case.method.noise(victims.pictures, files.headers)
            results = {
                id: leakage.seed_search(a * b, (here & there)[0], range(self.tried))
                for id, a, b, here, there in zip(victims.ids, z, files.zT, mask, files.mask, strict=True)
            }
            rows = [results[id] for id in victims.ids]
            return Observed(
                {
                    (SEARCH, "right seed"): torch.tensor(
                        [float(seed == self.seed(id)) for id, (seed, _, _) in zip(victims.ids, rows, strict=True)]
                    ),
                    (SEARCH, "agreement in deviations"): torch.tensor([agreement for _, agreement, _ in rows]),
                    (SEARCH, "seeds per second"): torch.tensor([rate for _, _, rate in rows]),
                }
            )

        return observe

    def conclude(self, case: Case, taken: Taken) -> Iterator[Found]:
        people, rates = case.people.of(taken.ids), taken.values(SEARCH, "seeds per second")
        yield people.averaged(SEARCH, f"right seed of {self.tried}", taken.values(SEARCH, "right seed"))
        yield people.averaged(SEARCH, "agreement in deviations", taken.values(SEARCH, "agreement in deviations"))
        yield people.averaged(SEARCH, "seeds per second", rates, COST)
        yield people.averaged(SEARCH, f"hours for {SEEDS:,}", SEEDS / rates / HOUR, COST)


SEARCH = "32-bit seed search"


@checked
@dataclass(frozen=True)
class Identities:
    """The attacker has a recognizer and a clean picture of everyone: whom does he see, with no key or a wrong one?

    Mean, 90th percentile and maximum of the cosine to the right person, TAR, rank 1. keyanon/attacks/pairs.py then asks
    whether wrong keys look like strangers. A mean colour in the face's place leaves background, hair and outline, which most
    often is no face to a detector (undefined; `BackgroundOnly` goes on there).
    """

    pictures: Count | None

    def chosen(self, case: Case) -> Sequence[str]:
        return case.people.ids[: self.pictures]

    def attack(self, case: Case, knowledge: Knowledge) -> Callable[[Victims], Observed]:
        receiver = without_authentication(case.method)

        def observe(victims: Victims) -> Observed:
            files = victims.files[0]
            other_password = [published_key(off=True)] * len(files.keys)
            seen: dict[str, Image] = {
                "anonymized": files.images,
                "recovered": receiver.recover(files.published, files.keys),
                "wrong key": WrongKey()(files.published, files.keys, case.method),
                "key off by one bit": NearKey()(files.published, files.keys, case.method),
                "password off by one bit": receiver.recover(files.published, other_password),
                "nonce off by one bit": receiver.recover(files.published, [NonceOff(key) for key in files.keys]),
                "fresh face": case.method.redraw(files.encoded, files.headers, fresh_noise(files)),
                "face blanked": without_faces(case, victims),
            }
            return Observed(
                vectors={place: rows for view, x in seen.items() for place, rows in case.embed(view, x).items()}
            )

        return observe

    def conclude(self, case: Case, taken: Taken) -> Iterator[Found]:
        people = case.people.of(taken.ids)
        for name in case.recognizers:
            strangers = (people.clean[name] * people.other_suspects(name)).sum(1)
            yield people.averaged("strangers", name, strangers)
            rows = {"original": people.clean[name]} if people.enrolled else {}
            rows |= {view: taken.vectors(view, name) for view in SEEN}
            for view, probes in rows.items():
                own = people.own(name, probes)
                yield people.averaged(view, name, own)
                yield Found(view, name, quantile_statistic(own, people.names, 0.9, "p90"))
                yield largest(view, name, own)
                yield from identification(case, people, view, name, probes)


SEEN = ("anonymized", "recovered", *WRONG_KEYS, "fresh face", "face blanked")


def fresh_noise(files: Files) -> Latent:
    """z'_T with other noise in the face."""
    shape = tuple(files.zT.shape[1:])
    fresh = torch.stack([normals(experiment_key(1), context, "fresh face", shape) for context in files.contexts])
    return torch.where(files.mask.expand_as(files.zT), fresh.to(files.zT), files.zT)


def without_faces(case: Case, victims: Victims) -> Image:
    """The photographs with the mean colour of the rest where the parser sees the face."""
    rows, columns = victims.files[0].zT.shape[-2:]
    mask = case.method.parser.mask(victims.pictures, (rows, columns))
    return leakage.blanked(victims.pictures, pixels(mask, victims.pictures))


@checked
@dataclass(frozen=True)
class BackgroundOnly:
    """The attacker knows where the face was, sees hair, background and outline, and the mean colour in the face's place.

    Recognizers are shown where the original's face was, as they find none. This is the part of recognition that no key takes away.
    """

    pictures: Count | None

    def chosen(self, case: Case) -> Sequence[str]:
        return case.people.ids[: self.pictures]

    def attack(self, case: Case, knowledge: Knowledge) -> Callable[[Victims], Observed]:
        def observe(victims: Victims) -> Observed:
            hidden = without_faces(case, victims)
            shown = {name: with_places_of(victims.pictures, one) for name, one in case.recognizers.items()}
            return Observed(vectors=replace(case, recognizers=shown).embed(BLANKED, hidden))

        return observe

    def conclude(self, case: Case, taken: Taken) -> Iterator[Found]:
        people = case.people.of(taken.ids)
        rows = {name: taken.vectors(BLANKED, name) for name in case.recognizers}
        yield from recognition(case, people, BLANKED, rows)
        for name, probes in rows.items():
            statistic = quantile_statistic(people.own(name, probes), people.names, 0.9, "p90")
            yield Found(BLANKED, name, statistic)


BLANKED = "face blanked, its place known"


@checked
@dataclass(frozen=True)
class Learned:
    """The attacker trains on pairs of other people, and looks for the right one among clean pictures.

    A ladder of what he knows: nothing beyond a recognizer (ignorant), pairs under keys of his own, a new one for each picture,
    or pairs under the victims' key stream, which is then one for all. By recognizer: cosine to the right person, AUC to it beside
    that to a stranger, TAR, rank 1. The background is there in all of them.
    """

    pictures: Count | None
    people: Count
    steps: Count

    def chosen(self, case: Case) -> Sequence[str]:
        ids = case.public(self.people)
        if len(ids) < self.people:
            log.warning("learned: the dataset has pictures of %d other people, %d are asked for", len(ids), self.people)
            return []
        return case.people.ids[: self.pictures]

    def learn(self, case: Case) -> Knowledge:
        """The pairs to train on: photographs of other people, and their files under each choice of keys."""
        ids = case.public(self.people)
        photographs = case.photographs(ids)
        (victims,) = (batch for _, batch in zip(range(1), case.victims(case.people.ids[:1]), strict=False))
        choices: dict[str, list[Key]] = {
            "own keys": [experiment_key(10_000 + i) for i in range(len(ids))],
            "one key stream": [OneStream(victims.files[0].keys[0])] * len(ids),
        }
        knowledge: Knowledge = {"photographs": photographs}
        # A picture that comes back badly is published all the same: another nonce would be no other stream, and the attacker's own
        # pictures need not come back.
        method, size = without_verification(case.method), len(victims.pictures)
        for pairs_of, keys in choices.items():
            parts = []
            for start in range(0, len(ids), size):
                rows = slice(start, start + size)
                parts.append(publish(method, to_floats(photographs[rows]), keys[rows], ids[rows]))
            files = joined(parts)
            knowledge |= {f"{pairs_of}, images": files.published.images, f"{pairs_of}, zT": files.zT}
            knowledge[f"{pairs_of}, mask"] = files.mask
        return knowledge

    def attack(self, case: Case, knowledge: Knowledge) -> Callable[[Victims], Observed]:
        photographs = to_floats(knowledge["photographs"])
        clean = {name: to_rows(one) for (_, name), one in case.embed("", photographs).items()}
        quick = without_verification(case.method)
        guesses, networks = {}, {}
        for pairs_of in PAIRS:
            images = to_floats(knowledge[f"{pairs_of}, images"])
            zT, mask = knowledge[f"{pairs_of}, zT"], knowledge[f"{pairs_of}, mask"]
            networks[pairs_of] = deanonymizer(photographs, images, pixels(mask, images), self.steps)
            seen = {name: to_rows(one) for (_, name), one in case.embed("", images).items()}
            for name, embeddings in clean.items():
                for learner, features in learners(seen[name], zT, mask, photographs).items():
                    guesses[pairs_of, learner, name] = ridge(features, embeddings)

        def observe(victims: Victims) -> Observed:
            own = victims.files[0]
            vectors: dict[Place, torch.Tensor] = dict(case.embed(IGNORANT, own.images))
            values: dict[Place, Scores] = {}
            reused = publish(quick, victims.pictures, wrapped("one key stream", own.keys), victims.ids)
            for pairs_of, files in zip(PAIRS, (own, reused), strict=True):
                seen = {name: to_rows(one) for (_, name), one in case.embed("", files.images).items()}
                for name in case.recognizers:
                    for learner, features in learners(seen[name], files.zT, files.mask, victims.pictures).items():
                        guess = guesses[pairs_of, learner, name](features)
                        vectors[self.view(pairs_of, learner), name] = torch.from_numpy(guess)
                view, restored = (
                    self.view(pairs_of, RESTORER),
                    networks[pairs_of](files.images, files.face(files.images)),
                )
                vectors |= case.embed(view, restored)
                values[view, "psnr_face"] = psnr_face(restored, victims.pictures, files.face(victims.pictures))
            return Observed(values, vectors)

        return observe

    def conclude(self, case: Case, taken: Taken) -> Iterator[Found]:
        people = case.people.of(taken.ids)
        views = [IGNORANT, *(self.view(pairs_of, learner) for pairs_of in PAIRS for learner in (*LEARNERS, RESTORER))]
        for view in views:
            yield from recognition(case, people, view, {name: taken.vectors(view, name) for name in case.recognizers})
        for pairs_of in PAIRS:
            view = self.view(pairs_of, RESTORER)
            yield people.averaged(view, "psnr_face", taken.values(view, "psnr_face"), FACE)

    def view(self, pairs_of: str, learner: str) -> str:
        return f"learned: {pairs_of}, {self.people} others, {learner}"


IGNORANT, RESTORER = "learned: ignorant", "de-anonymizer"
PAIRS = ("own keys", "one key stream")
LEARNERS = ("parrot", "from |z_T|", "from z_T", "from the mask alone", "from the original pixels")


def learners(seen: Floats, zT: Latent, mask: Mask, photographs: Image) -> dict[str, NDArray[np.floating]]:
    """The features that each learner regresses from."""
    cells = np.asarray(mask.flatten(1).double().cpu().numpy())
    features = (
        seen,
        noise_features(zT, mask, "magnitudes"),
        noise_features(zT, mask, "noise"),
        cells,
        photographs.flatten(1).numpy(),
    )
    return dict(zip(LEARNERS, features, strict=True))


def to_rows(embeddings: torch.Tensor) -> Floats:
    found: Floats = embeddings.double().cpu().numpy()
    return found


def recognition(case: Case, people: People, view: str, probes: Mapping[str, Floats]) -> Iterator[Found]:
    """How well embeddings, by recognizer, tell who is on the pictures."""
    for name, seen in probes.items():
        own, other = people.own(name, seen), (seen * people.other_suspects(name)).sum(1)
        yield people.averaged(view, name, own)
        yield Found(view, name, leakage.auc_statistic(own[:, None], other[:, None], people.names))
        yield from identification(case, people, view, name, seen)


def identification(case: Case, people: People, view: str, name: str, probes: Floats) -> Iterator[Found]:
    """TAR and rank 1 among the gallery."""
    calibration = people.clean[name] if people.enrolled else people.thresholds[name]
    for statistic in verification_statistics(
        probes, people.gallery[name], people.names, people.gallery_names, calibration, case.far
    ):
        if statistic.statistic.startswith(("tar", "rank1")):
            yield Found(view, name, statistic)


@checked
@dataclass(frozen=True)
class KeySearch:
    """The attacker tries wrong keys until a recognizer sees a suspect in the picture.

    If he comes as far with another suspect, that proves nothing; what the right suspect has ahead, the background gives him
    (`Identities`, fresh face).
    """

    pictures: Count
    guesses: Count

    def chosen(self, case: Case) -> Sequence[str]:
        return case.people.ids[: self.pictures]

    def attack(self, case: Case, knowledge: Knowledge) -> Callable[[Victims], Observed]:
        def observe(victims: Victims) -> Observed:
            files, vectors = victims.files[0], dict[Place, torch.Tensor]()
            for trial in range(1, self.guesses + 1):
                vectors |= case.embed(f"key {trial}", WrongKey(trial)(files.published, files.keys, case.method))
            return Observed(vectors=vectors)

        return observe

    def conclude(self, case: Case, taken: Taken) -> Iterator[Found]:
        people = case.people.of(taken.ids)
        for name in case.recognizers:
            tries = np.stack([taken.vectors(f"key {trial}", name) for trial in range(1, self.guesses + 1)])
            suspects = {
                "the right suspect": people.suspects[name],
                "another suspect": people.other_suspects(name),
            }
            best = {who: best_of((tries * wanted).sum(2)) for who, wanted in suspects.items()}
            for who, values in best.items():
                yield people.averaged(f"best of {self.guesses} wrong keys for {who}", name, values)
            right, other = best.values()
            view = f"best of {self.guesses} wrong keys, right suspect and another"
            yield people.averaged(f"{view}: difference", name, right - other)
            yield Found(view, name, leakage.auc_statistic(right[:, None], other[:, None], people.names))


def best_of(cosines: Floats) -> Floats:
    """The highest over the first axis; NaN where none is defined."""
    filled = np.where(np.isnan(cosines), -np.inf, cosines).max(axis=0)
    return np.where(np.isfinite(filled), filled, np.nan)


@checked
@dataclass(frozen=True)
class NoiseOracle:
    """The attacker tells the right key from a wrong one by statistics of z_T inside the face, without drawing a picture.

    An AUC far from 0.5, to either side, verifies guesses: then only the cost of a guess protects passwords.
    """

    pictures: Count | None
    wrong_keys: Count

    def chosen(self, case: Case) -> Sequence[str]:
        return case.people.ids[: self.pictures]

    def attack(self, case: Case, knowledge: Knowledge) -> Callable[[Victims], Observed]:
        def observe(victims: Victims) -> Observed:
            files, values = victims.files[0], dict[Place, Scores]()
            trials: list[Sequence[Key]] = [files.keys]
            trials += [[experiment_key(1000 + i)] * len(files.keys) for i in range(self.wrong_keys)]
            for number, keys in enumerate(trials):
                zT = case.method.undo(files.zT, files.mask, files.headers, keys).double().cpu().numpy()
                found = [
                    measure(z, inside, generator_of(id, "oracle"))
                    for id, z, inside in zip(victims.ids, zT, files.mask[:, 0].cpu().numpy(), strict=True)
                ]
                values |= {(f"key {number}", name): torch.tensor([one[name] for one in found]) for name in ORACLES}
            return Observed(values)

        return observe

    def conclude(self, case: Case, taken: Taken) -> Iterator[Found]:
        people = case.people.of(taken.ids)
        for name in ORACLES:
            table = np.stack([taken.values(f"key {number}", name) for number in range(self.wrong_keys + 1)], axis=1)
            statistic = leakage.auc_statistic(table[:, :1], table[:, 1:], people.names)
            yield Found("right key told by z_T", name, statistic, measure=MEASURES[name])


@checked
@dataclass(frozen=True)
class Tampering:
    """The attacker changes files on their way to the owner, who has the right key and looks at tags: are they refused?

    One bit of a pixel; every bit of the header, one at a time; another file's header; no tag; no header. An owner who looks at
    no tags gets `psnr_face` of the changed pixel.
    """

    pictures: Count | None

    def chosen(self, case: Case) -> Sequence[str]:
        return case.people.ids[: self.pictures]

    def attack(self, case: Case, knowledge: Knowledge) -> Callable[[Victims], Observed]:
        receiver = without_authentication(case.method)

        def observe(victims: Victims) -> Observed:
            files, other = victims.files[0], victims.files[1]
            changed = leakage.one_bit_off_pictures(files.images, files.headers)
            same = [[header] for header in files.headers]
            tried: dict[str, tuple[Image, list[list[bytes]]]] = {
                "nothing changed": (files.images, same),
                "one bit of a pixel": (changed, same),
                "one bit of the header": (files.images, [leakage.one_bit_off_headers(h) for h in files.headers]),
                "the header of another file": (files.images, [[header] for header in other.headers]),
                "no tag": (files.images, [[leakage.without_tag(header)] for header in files.headers]),
                "no header": (files.images, [[b""] for _ in files.headers]),
            }
            values: dict[Place, Scores] = {}
            for what, (images, headers) in tried.items():
                refused = [
                    float(sum(leakage.is_refused(header, picture, key) for header in own))
                    for picture, own, key in zip(to_bytes(images), headers, files.keys, strict=True)
                ]
                values[what, "refused"] = torch.tensor(refused)
                values[what, "tried"] = torch.tensor([float(len(own)) for own in headers])
            back = receiver.recover(Published(to_bytes(changed), files.headers), files.keys)
            values[CHANGED, "psnr_face"] = psnr_face(back, victims.pictures, files.face(victims.pictures))
            return Observed(values)

        return observe

    def conclude(self, case: Case, taken: Taken) -> Iterator[Found]:
        people = case.people.of(taken.ids)
        for what in TAMPERED:
            refused, tried = (taken.values(what, name).astype(int) for name in ("refused", "tried"))
            hits = np.concatenate([np.arange(n) < k for k, n in zip(refused, tried, strict=True)])
            owners = [name for name, n in zip(people.names, tried, strict=True) for _ in range(n)]
            yield Found(f"tampering: {what}", "refused", rate_statistic(hits, owners, 0, "rate"))
        yield people.averaged(f"tampering: {CHANGED}", "psnr_face", taken.values(CHANGED, "psnr_face"), FACE)


CHANGED = "one bit of a pixel"
TAMPERED = ("nothing changed", CHANGED, "one bit of the header", "the header of another file", "no tag", "no header")


@checked
def password_dictionary(*, settings: Sequence[Argon2], guesses: Count) -> Iterator[Found]:
    """Cost of a guess, one after the other, and of 2^30 of them. What does not fit into memory is left out, with a warning."""
    for one in settings:
        name = f"t={one['iterations']}, {one['memory']} MiB, p={one['lanes']}"
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // (MIB * MIB)
        if 2 * one["memory"] > free:
            log.warning("Argon2id %s not measured: %d MiB of memory are free, twice its need is asked for", name, free)
            continue
        seconds = leakage.argon2_seconds(one["iterations"], one["memory"] * MIB, one["lanes"], guesses)
        cost = mean_statistic(seconds, name="seconds per guess")
        years = [bound * DICTIONARY / YEAR for bound in (cost.value, cost.low, cost.high)]
        yield Found("password dictionary", name, cost, measure=COST)
        yield Found("password dictionary", name, Statistic("years for 2^30 guesses", cost.n, 0, *years), measure=COST)


def published_key(off: bool = False) -> MasterKey:
    """The key of a password that everyone may know, or of one that differs from it in a single bit."""
    salt = hashlib.sha256(b"keyanon experiment salt").digest()[:SALT_BYTES]
    return Recipe(salt).derive(PASSWORD[:-1] + chr(ord(PASSWORD[-1]) ^ off))
