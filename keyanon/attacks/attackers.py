"""The attacks of the security battery: what attackers learn from published files (experiments/security.py runs them).

    linkage             files of one photograph under different keys, and a file beside its photograph, told from those of others
    known_plaintext     some originals are known, and the key stream is one for all, as the authors have it; or has nonces
    reused_rotations    the same against rotations, from pictures with one mask
    right_signs         recovery by one who holds a share of the right signs, and the share a recognizer needs
    seed_search         the authors' keys come from 32 bits: found by trying, from one known pair
    identities          who recognizers see on files, on pictures recovered with wrong keys, on a fresh face in the same
                        background, and where the face is blanked
    background_only     the same, by one who knows where the blanked face was
    learned             attackers who train on pairs of other people, with keys of their own or under the victims' key stream
    key_search          the best of many wrong keys by a recognizer's word, for the right suspect and for another one
    noise_oracle        does z_T look more like noise under the right key?
    tampering           files changed on their way: refused by the tag? and what would come out without one
    password_dictionary what a dictionary costs by Argon2id, on this machine

Each is a function of a Case, or of nothing for the dictionary, and yields what it found; conf/battery and conf/dictionary hold
their settings. keyanon/attacks/leakage.py and keyanon/attacks/learned.py have the attackers themselves, and say what they know.

Bars: AUC 0.5 and D_sys 0 tell nothing; strangers, the wrong suspect and the fresh face are the controls.
"""

import hashlib
import logging
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from keyanon.attacks import leakage
from keyanon.attacks.leakage import NonceOff, OneStream, SeededSigns
from keyanon.attacks.learned import deanonymizer, noise_features, ridge
from keyanon.attacks.views import NearKey, PartialKey, WrongKey, without_authentication
from keyanon.batching import batches
from keyanon.channel.headers import Header
from keyanon.channel.keys import SALT_BYTES, MasterKey, Recipe, experiment_key
from keyanon.channel.pixels import to_bytes, to_floats
from keyanon.channel.streams import normals, signs
from keyanon.faces.parsing import EllipseParser
from keyanon.faces.recognition import with_places_of
from keyanon.measures.biometrics import (
    Floats,
    Statistic,
    cosine,
    mean_statistic,
    quantile_statistic,
    rate_statistic,
    verification_statistics,
)
from keyanon.measures.gaussianity import MEASURES, generator_of, measure
from keyanon.measures.scorers import psnr_face
from keyanon.methods.exact import pixels
from keyanon.types import Attack, Image, Key, KeyedNoise, Latent, Mask, Published, Recognizer, Verifies

SEEDS = 2**32
DICTIONARY = 2**30
WRONG_KEYS = ("wrong key", "key off by one bit", "password off by one bit", "nonce off by one bit")
COMPARED = ("anonymized", *WRONG_KEYS, "face blanked, its place known")
CONTROLS = ("strangers", "fresh face")
PASSWORD = "everyone may know this password"
HOUR, YEAR = 3600, 365.25 * 86400  # seconds
MIB = 1024  # KiB
ORACLES = tuple(name for name in MEASURES if name != "ks_passed")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """One number of the table, and the pictures' own values behind it where there are any."""

    view: str
    scorer: str
    statistic: Statistic
    values: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Files:
    """Published pictures, one key each, and what anyone computes from them.

    `encoded` are the pictures as the method encodes them, `zT` is z'_T, `mask` the face's cells.
    """

    images: Image
    headers: tuple[bytes, ...]
    keys: Sequence[Key]
    encoded: Image
    zT: Latent
    mask: Mask

    def first(self, count: int) -> "Files":
        images, headers, keys = self.images[:count], self.headers[:count], self.keys[:count]
        return Files(images, headers, keys, self.encoded[:count], self.zT[:count], self.mask[:count])


@dataclass(frozen=True)
class People:
    """The pictures, who is on them, and how recognizers see them (rows by recognizer).

    `suspects` are the clean pictures by which each person is looked for: one of the gallery where people are `enrolled` in one,
    else the photograph itself. `others`: for each picture the place of the next one of somebody else.
    """

    ids: list[str]
    names: list[str]
    pictures: Image
    recognizers: Mapping[str, Recognizer]
    clean: Mapping[str, Floats]
    suspects: Mapping[str, Floats]
    gallery: Mapping[str, Floats]
    gallery_names: list[str]
    thresholds: Mapping[str, float]
    enrolled: bool

    @property
    def others(self) -> list[int]:
        n = len(self.ids)
        return [
            next(j % n for j in range(i + 1, i + n) if self.names[j % n] != name) for i, name in enumerate(self.names)
        ]

    @property
    def firsts(self) -> list[int]:
        """The place of each person's first picture: values there do not depend on each other by who is on them."""
        return [i for i, name in enumerate(self.names) if name not in self.names[:i]]

    def own(self, name: str, rows: Floats) -> Floats:
        """Cosines of pictures and their own suspects."""
        return np.asarray((rows * self.suspects[name]).sum(1))

    def first(self, count: int) -> "People":
        clean, suspects = ({name: rows[:count] for name, rows in seen.items()} for seen in (self.clean, self.suspects))
        return replace(
            self,
            ids=self.ids[:count],
            names=self.names[:count],
            pictures=self.pictures[:count],
            clean=clean,
            suspects=suspects,
        )


@dataclass(frozen=True)
class Case:
    """A method under attack: `files` are those of each key, `public` gives so many pictures of people who are not tested."""

    method: KeyedNoise
    people: People
    files: list[Files]
    public: Callable[[int], tuple[list[str], Image]]
    batch_size: int
    far: float

    def first(self, count: int | None) -> "Case":
        """The case of the first pictures alone."""
        if count is None or count >= len(self.people.ids):
            return self
        return replace(self, people=self.people.first(count), files=[files.first(count) for files in self.files])

    def batches(self, title: str, function: Callable[..., Any], *columns: Any) -> Any:
        return in_batches(title, self.batch_size, function, *columns)

    def publish(self, keys: Sequence[Key], method: KeyedNoise | None = None) -> Files:
        """Files of the first pictures, one for each key."""
        people = self.people.first(len(keys))
        return publish(method or self.method, people.pictures, keys, people.ids, self.batch_size)

    def originals(
        self, pictures: Image, headers: Sequence[bytes], method: KeyedNoise | None = None
    ) -> tuple[Latent, Mask]:
        """z_T of photographs, by one who has them and the headers of their files."""
        found: tuple[Latent, Mask] = self.batches("invert", (method or self.method).noise, pictures, headers)
        return found

    def attacked(self, title: str, attack: Attack, files: Files) -> Image:
        out: Image = self.batches(
            title,
            lambda x, headers, keys: attack(Published(to_bytes(x), headers), keys, self.method),
            files.images,
            files.headers,
            files.keys,
        )
        return out

    def recovered(self, title: str, files: Files, keys: Sequence[Key]) -> Image:
        receiver = without_authentication(self.method)
        out: Image = self.batches(
            title,
            lambda x, headers, keys: receiver.recover(Published(to_bytes(x), headers), keys),
            files.images,
            files.headers,
            keys,
        )
        return out

    def redrawn(
        self, title: str, files: Files, zT: Latent, rows: slice = slice(None), method: KeyedNoise | None = None
    ) -> Image:
        """The pictures of other noise in the files' backgrounds."""
        redraw = (method or self.method).redraw
        out: Image = self.batches(title, redraw, files.encoded[rows], files.headers[rows], zT)
        return out


def linkage(case: Case, *, pictures: int | None) -> Iterator[Found]:
    """The attacker has two files under independent keys, or a file and a candidate photograph, and no key: do they belong together?

    By |z_T| in three forms and by what recognizers see, who see the public background as well (unlinkability: ISO/IEC 24745;
    D_sys: Gomez-Barrero et al., IEEE TIFS 13(6), 2018). Photographs are inverted with their own file's header, though an
    attacker would use that of the file he compares with: what the two share by that can only count against the method.
    """
    case = case.first(pictures)
    first, files = case.files[0], case.files
    z, mask = case.originals(case.people.pictures, first.headers)
    for name, likeness in LIKENESSES.items():
        pairs = [(a, b) for i, a in enumerate(files) for b in files[i + 1 :]]
        between = np.stack([likeness(a.zT, a.mask, b.zT, b.mask) for a, b in pairs])
        source = likeness(z, mask, first.zT, first.mask)[None]
        for view, scores in (("linkage of two files", between), ("file and its photograph", source)):
            yield from (Found(view, name, statistic) for statistic in leakage.linkage_statistics(scores))
    for name, recognizer in case.people.recognizers.items():
        rows = [embeddings_of(recognizer, one.images) for one in files]
        between = np.stack([cosine(a, b) for i, a in enumerate(rows) for b in rows[i + 1 :]])
        source = cosine(case.people.clean[name], rows[0])[None]
        for view, scores in (("linkage of two files", between), ("file and its photograph", source)):
            yield from (Found(view, name, statistic) for statistic in leakage.linkage_statistics(scores))


def by_norms(a: Latent, in_a: Mask, b: Latent, in_b: Mask) -> Floats:
    return leakage.feature_likeness(leakage.channel_norms(a, in_a), leakage.channel_norms(b, in_b))


def by_magnitudes(a: Latent, in_a: Mask, b: Latent, in_b: Mask) -> Floats:
    one, other = leakage.sorted_magnitudes(a, in_a), leakage.sorted_magnitudes(b, in_b)
    return leakage.feature_likeness(one, other)


LIKENESSES = {"layout of |z|": leakage.layout_likeness, "channel norms": by_norms, "sorted |z|": by_magnitudes}


def known_plaintext(case: Case, *, pictures: int | None, pairs: Sequence[int]) -> Iterator[Found]:
    """The attacker has m files with their originals, and wants other files of the same master key.

    `key signs`: the share that he finds (0.5: none); then what they make of the other files. With one key stream for all pictures
    (the authors' code uses its keys again, from batch to batch and for both datasets), and with a nonce for each. Rotations have
    no signs: what he draws counts alone, and `reused_rotations` has the attack that fits them.
    """
    case = case.first(pictures)
    fits = [m for m in pairs if m < len(case.people.ids)]
    if not fits:
        log.warning("known plaintext: no number of pairs in %s leaves one of %d pictures", pairs, len(case.people.ids))
        return
    ids, targets = case.people.ids[max(fits) :], slice(max(fits), None)
    reused = case.publish([OneStream(key) for key in case.files[0].keys])
    for stream, files in (("one key stream", reused), ("nonces", case.files[0])):
        z, mask = case.originals(case.people.pictures, files.headers)
        face = pixels(mask[targets], case.people.pictures)
        for m in fits:
            view = f"known plaintext, {stream}, {m:2} pairs"
            found = leakage.voted_signs(z[:m], files.zT[:m], mask[:m] & files.mask[:m])
            if case.method.transform.secret == "signs of cells":
                nonces = [Header.unpack(header).nonce for header in files.headers[targets]]
                shares = [
                    leakage.share_right(found, signs(key, nonce, tuple(found.shape)), inside)
                    for key, nonce, inside in zip(files.keys[targets], nonces, files.mask[targets, 0], strict=True)
                ]
                yield averaged(case, view, "key signs", shares, ids)
            guess = torch.where(found == 0, signs(experiment_key(1), b"coins", tuple(found.shape)), found)
            inside = files.mask[targets].expand_as(files.zT[targets])
            turned = torch.where(inside, files.zT[targets] * guess, files.zT[targets])
            yield from likeness_to_originals(case, view, case.redrawn(view, files, turned, targets), face, targets)


def likeness_to_originals(case: Case, view: str, out: Image, face: Mask, targets: slice) -> Iterator[Found]:
    """How like their originals the pictures `out` are that somebody without the key has recovered."""
    ids = case.people.ids[targets]
    yield averaged(case, view, "psnr_face", psnr_face(out, case.people.pictures[targets], face).tolist(), ids)
    for name, recognizer in case.people.recognizers.items():
        cosines = (embeddings_of(recognizer, out) * case.people.clean[name][targets]).sum(1)
        yield averaged(case, view, name, cosines, ids)


def reused_rotations(
    case: Case, *, pairs: Sequence[int], targets: int, centre: tuple[float, float], axes: tuple[float, float]
) -> Iterator[Found]:
    """Known plaintext against rotations: m pairs with one mask show Q_c, and so does a channel's encrypted norm its key bytes.

    All pictures get the same ellipse, as an attacker asks for who has a service publish pictures of his choice: under one key
    stream rotations repeat only where the faces have equally many cells d. Each channel's Q_c is the orthogonal map that takes
    the known z_T to the known z'_T best; d pairs determine it. `cosine of z_T`: of what he finds in other files to the
    truth, the mean over channels.
    """
    method = case.method
    if method.transform.secret != "rotation":
        return
    most, n = max(pairs), max(pairs) + targets
    if n > len(case.people.ids):
        log.warning(
            "reused rotations: %d pairs and %d targets are more than %d pictures", most, targets, len(case.people.ids)
        )
        return
    case = case.first(n)
    method = replace(without_verification(method), parser=EllipseParser(centre, axes))
    rest = slice(most, None)
    for stream, wrap in (("one key stream", OneStream), ("nonces", lambda key: key)):
        files = case.publish([wrap(key) for key in case.files[0].keys], method)
        z, mask = case.originals(case.people.pictures, files.headers, method)
        cells, sent = mask[0, 0], [Header.unpack(header).sent for header in files.headers]
        face = pixels(mask[rest], case.people.pictures)
        for m in pairs:
            view = f"reused rotations, {stream}, {m:3} pairs, {int(cells.sum())} cells"
            turned = files.zT[rest].clone()
            turned[:, :, cells] = leakage.rotated_back(
                z[:m, :, cells], files.zT[:m, :, cells], sent[:m], turned[:, :, cells], sent[most:]
            )
            alike = torch.cosine_similarity(turned[:, :, cells], z[rest][:, :, cells], dim=2).mean(1)
            yield averaged(case, view, "cosine of z_T", alike.tolist(), case.people.ids[rest])
            yield from likeness_to_originals(case, view, case.redrawn(view, files, turned, rest, method), face, rest)


def right_signs(case: Case, *, pictures: int | None, shares: Sequence[float]) -> Iterator[Found]:
    """The attacker has a share of the right signs, 0.5 being none: does a recognizer accept what he recovers?

    Wrong signs leave cos(z_T, what he has) = 1 - 2 h, h their share. Only for keys that are signs: rotations have none, and a
    master key has no neighbours (`identities` has those that differ in a bit).
    """
    if case.method.transform.secret not in ("signs of cells", "signs of frequencies"):
        return
    case = case.first(pictures)
    files, people = case.files[0], case.people
    cosines: dict[str, list[Floats]] = {name: [] for name in people.recognizers}
    for share in shares:
        view = f"right signs {100 * share:5.1f} %"
        recovered = case.attacked(view, PartialKey(1 - share), files)
        for name, recognizer in people.recognizers.items():
            own = people.own(name, embeddings_of(recognizer, recovered))
            cosines[name].append(own)
            yield averaged(case, view, name, own)
            unfound = int(np.isnan(own).sum())
            accepted = rate_statistic(own > people.thresholds[name], people.names, unfound, f"tar@far={case.far:g}")
            yield Found(view, name, accepted)
    for name in people.recognizers:
        needed = leakage.share_needed(shares, np.stack(cosines[name], axis=1), people.thresholds[name])
        view, label = "right signs needed", f"median share to pass at far={case.far:g}"
        statistic = quantile_statistic(needed, people.names, 0.5, label)
        yield Found(view, name, statistic, dict(zip(people.ids, needed.tolist(), strict=True)))


def seed_search(case: Case, *, pictures: int, tried: int) -> Iterator[Found]:
    """The attacker has one file with its original, whose key was drawn as the authors do: their 32-bit seeds, tried in turn.

    Tried is a small range that holds the seed; from the rate follows the time for all of them. An agreement above 6.2 deviations
    is more than the luckiest of 2^32 wrong seeds has.
    """
    if case.method.transform.secret != "signs of cells":
        return
    case = case.first(pictures)
    count = len(case.people.ids)
    keys = [SeededSigns(tried * (i + 1) // (count + 1)) for i in range(count)]
    files = case.publish(keys)
    z, mask = case.originals(case.people.pictures, files.headers)
    results = [
        leakage.seed_search(a * b, (here & there)[0], range(tried))
        for a, b, here, there in zip(z, files.zT, mask, files.mask, strict=True)
    ]
    ids, view = case.people.ids, "32-bit seed search"
    right = [float(seed == key.seed) for (seed, _, _), key in zip(results, keys, strict=True)]
    yield averaged(case, view, f"right seed of {tried}", right, ids)
    yield averaged(case, view, "agreement in deviations", [agreement for _, agreement, _ in results], ids)
    yield averaged(case, view, "seeds per second", [rate for _, _, rate in results], ids)
    yield averaged(case, view, f"hours for {SEEDS:,}", [SEEDS / rate / HOUR for _, _, rate in results], ids)


def identities(case: Case, *, pictures: int | None) -> Iterator[Found]:
    """The attacker has a recognizer and a clean picture of everyone: whom does he see, with no key or a wrong one?

    Mean, 90th percentile and maximum of the cosine to the right person, TAR, rank 1. `distribution_tests` then asks whether
    wrong keys look like strangers. A mean colour in the face's place leaves background, hair and outline, which most often is no
    face to a detector (undefined; `background_only` goes on there).
    """
    case = case.first(pictures)
    files, people = case.files[0], case.people
    fresh = torch.stack(
        [
            normals(experiment_key(1), Header.unpack(header).nonce, "fresh face", tuple(files.zT.shape[1:]))
            for header in files.headers
        ]
    )
    fresh = torch.where(files.mask.expand_as(files.zT), fresh.to(files.zT), files.zT)
    seen: dict[str, Image] = {"original": people.pictures} if people.enrolled else {}
    seen |= {
        "anonymized": files.images,
        "recovered": case.recovered("recover", files, files.keys),
        "wrong key": case.attacked("wrong key", WrongKey(), files),
        "key off by one bit": case.attacked("near key", NearKey(), files),
        "password off by one bit": case.recovered("password", files, [published_key(off=True)] * len(files.headers)),
        "nonce off by one bit": case.recovered("nonce", files, [NonceOff(key) for key in files.keys]),
        "fresh face": case.redrawn("fresh", files, fresh),
        "face blanked": without_faces(case),
    }
    for name, recognizer in people.recognizers.items():
        strangers = (people.clean[name] * people.suspects[name][people.others]).sum(1)
        yield averaged(case, "strangers", name, strangers)
        rows = {view: embeddings_of(recognizer, images) for view, images in seen.items()}
        for view, probes in rows.items():
            own = people.own(name, probes)
            yield averaged(case, view, name, own)
            yield Found(view, name, quantile_statistic(own, people.names, 0.9, "p90"))
            defined = own[~np.isnan(own)]
            most = float(defined.max()) if defined.size else np.nan
            yield Found(view, name, Statistic("max", defined.size, own.size - defined.size, most, np.nan, np.nan))
            yield from identification(case, view, name, probes)


def without_faces(case: Case) -> Image:
    """The photographs with the mean colour of the rest where the parser sees the face."""
    pictures, (u, v) = case.people.pictures, case.files[0].zT.shape[-2:]
    mask = case.batches("mask", lambda x: case.method.parser.mask(x, (u, v)), pictures)
    return leakage.blanked(pictures, pixels(mask, pictures))


def distribution_tests(case: Case, found: Sequence[Found]) -> Iterator[Found]:
    """Are cosines to the right person distributed as those of strangers? Two-sample tests of what was found, one picture a person.

    Strangers: each clean picture beside one of somebody else, as many and as independent. Impostors: each beside everybody else's,
    which depend on each other and are so many that their distribution is as good as known. Fresh faces: of other noise in the same
    background, alike to wrong keys where these tell no more than the background does; a generated face may well be less like
    everyone than people are. `wrong keys, all four` takes the four kinds together, four faces a person.
    """
    people, places = case.people, case.people.firsts
    means = {(one.view, one.scorer): one.values for one in found if one.statistic.statistic == "mean"}
    for name in people.recognizers:
        cosines = {
            view: firsts(people, own)
            for (view, by), own in means.items()
            if by == name and view in (*COMPARED, *CONTROLS)
        }
        strange = np.not_equal.outer([people.names[i] for i in places], people.gallery_names)
        controls = {"impostors": cosine(people.clean[name][places], people.gallery[name])[strange]}
        controls |= {view: cosines.pop(view) for view in CONTROLS if view in cosines}
        if cosines.keys() >= set(WRONG_KEYS):
            cosines["wrong keys, all four"] = np.concatenate([cosines[view] for view in WRONG_KEYS])
        for view, own in cosines.items():
            for control, others in controls.items():
                for statistic in leakage.kolmogorov_smirnov(own, others):
                    yield Found(view, f"{name} beside {control}", statistic)


def firsts(people: People, values: Mapping[str, float]) -> Floats:
    """Of values by picture those of each person's first one, NaN where a picture has none."""
    return np.array([values.get(people.ids[i], np.nan) for i in people.firsts])


def background_only(case: Case, *, pictures: int | None) -> Iterator[Found]:
    """The attacker knows where the face was, sees hair, background and outline, and the mean colour in the face's place.

    Recognizers are shown where the original's face was, as they find none. This is the part of recognition that no key takes away.
    """
    case = case.first(pictures)
    people, hidden = case.people, without_faces(case)
    rows = {
        name: embeddings_of(with_places_of(people.pictures, one), hidden) for name, one in people.recognizers.items()
    }
    yield from recognition(case, "face blanked, its place known", rows)
    for name, probes in rows.items():
        statistic = quantile_statistic(people.own(name, probes), people.names, 0.9, "p90")
        yield Found("face blanked, its place known", name, statistic)


def learned(case: Case, *, pictures: int | None, people: int, steps: int) -> Iterator[Found]:
    """The attacker trains on pairs of other people, and looks for the right one among clean pictures.

    A ladder of what he knows: nothing beyond a recognizer (ignorant), pairs under keys of his own, a new one for each picture,
    or pairs under the victims' key stream, which is then one for all. By recognizer: cosine to the right person, AUC to it beside
    that to a stranger, TAR, rank 1. The background is there in all of them.
    """
    case = case.first(pictures)
    method, victims, who = case.method, case.files[0], case.people
    ids, photographs = case.public(people)
    if len(ids) < people:
        log.warning("learned: the dataset has pictures of %d other people, %d are asked for", len(ids), people)
        return
    clean = {name: embeddings_of(recognizer, photographs) for name, recognizer in who.recognizers.items()}
    yield from recognition(
        case, "learned: ignorant", {n: embeddings_of(r, victims.images) for n, r in who.recognizers.items()}
    )
    own = [experiment_key(10_000 + i) for i in range(len(ids))]
    one = OneStream(victims.keys[0])
    # A picture that comes back badly is published all the same: another nonce would be no other stream, and the attacker's own
    # pictures need not come back.
    quick = without_verification(method)
    for pairs_of, keys, files in (
        ("own keys", own, victims),
        ("one key stream", [one] * len(ids), case.publish([one] * len(who.ids), quick)),
    ):
        train = publish(quick, photographs, keys, ids, case.batch_size)
        network = deanonymizer(photographs, train.images, pixels(train.mask, train.images), steps)
        restored = network(files.images, pixels(files.mask, files.images))
        guesses: dict[str, dict[str, Floats]] = defaultdict(dict)
        for name, recognizer in who.recognizers.items():
            seen: dict[str, tuple[Any, Any]] = {
                "parrot": (embeddings_of(recognizer, train.images), embeddings_of(recognizer, files.images)),
                "from |z_T|": (magnitudes(train), magnitudes(files)),
                "from z_T": (noise(train), noise(files)),
                "from the mask alone": (mask_cells(train), mask_cells(files)),
                "from the original pixels": (photographs.flatten(1), who.pictures.flatten(1)),
            }
            for learner, (pairs, probes) in seen.items():
                guesses[learner][name] = ridge(pairs, clean[name])(probes)
            guesses["de-anonymizer"][name] = embeddings_of(recognizer, restored)
        for learner, rows in guesses.items():
            yield from recognition(case, f"learned: {pairs_of}, {len(ids)} others, {learner}", rows)
        face = pixels(files.mask, who.pictures)
        view = f"learned: {pairs_of}, {len(ids)} others, de-anonymizer"
        yield averaged(case, view, "psnr_face", psnr_face(restored, who.pictures, face).tolist())


def magnitudes(files: Files) -> Floats:
    return noise_features(files.zT, files.mask, "magnitudes")


def noise(files: Files) -> Floats:
    return noise_features(files.zT, files.mask, "noise")


def mask_cells(files: Files) -> Floats:
    """The masks' cells (n u*v)."""
    return np.asarray(files.mask.flatten(1).double().cpu().numpy())


def recognition(case: Case, view: str, rows: Mapping[str, Floats]) -> Iterator[Found]:
    """How well embeddings, by recognizer, tell who is on the pictures."""
    people = case.people
    for name, probes in rows.items():
        own, other = people.own(name, probes), (probes * people.suspects[name][people.others]).sum(1)
        yield averaged(case, view, name, own)
        yield Found(view, name, leakage.auc_statistic(own[:, None], other[:, None]))
        yield from identification(case, view, name, probes)


def identification(case: Case, view: str, name: str, probes: Floats) -> Iterator[Found]:
    """TAR and rank 1 among the gallery."""
    people = case.people
    calibration = people.clean[name] if people.enrolled else people.thresholds[name]
    for statistic in verification_statistics(
        probes, people.gallery[name], people.names, people.gallery_names, calibration, case.far
    ):
        if statistic.statistic.startswith(("tar", "rank1")):
            yield Found(view, name, statistic)


def key_search(case: Case, *, pictures: int, guesses: int) -> Iterator[Found]:
    """The attacker tries wrong keys until a recognizer sees a suspect in the picture. If he comes as far with another suspect, that
    proves nothing; what the right suspect has ahead, the background gives him (`identities`, fresh face).
    """
    case = case.first(pictures)
    files, people = case.files[0], case.people
    tries = [case.attacked("key search", WrongKey(trial), files) for trial in range(1, guesses + 1)]
    for name, recognizer in people.recognizers.items():
        rows = np.stack([embeddings_of(recognizer, images) for images in tries])  # keys, pictures, entries
        suspects = {"the right suspect": people.suspects[name], "another suspect": people.suspects[name][people.others]}
        best = {who: best_of((rows * wanted).sum(2)) for who, wanted in suspects.items()}
        for who, values in best.items():
            yield averaged(case, f"best of {guesses} wrong keys for {who}", name, values)
        right, other = best.values()
        view = f"best of {guesses} wrong keys, right suspect and another"
        yield averaged(case, f"{view}: difference", name, right - other)
        yield Found(view, name, leakage.auc_statistic(right[:, None], other[:, None]))


def best_of(cosines: Floats) -> Floats:
    """The highest over the first axis; NaN where none is defined."""
    filled = np.where(np.isnan(cosines), -np.inf, cosines).max(axis=0)
    return np.where(np.isfinite(filled), filled, np.nan)


def noise_oracle(case: Case, *, pictures: int | None, wrong_keys: int) -> Iterator[Found]:
    """The attacker tells the right key from a wrong one by statistics of z_T inside the face, without drawing a picture. An AUC far
    from 0.5, to either side, verifies guesses: then only the cost of a guess protects passwords.
    """
    case = case.first(pictures)
    files = case.files[0]
    trials = [files.keys, *([experiment_key(1000 + i)] * len(files.headers) for i in range(wrong_keys))]
    values = {name: np.empty((len(files.headers), len(trials))) for name in ORACLES}
    for column, keys in enumerate(trials):
        zT = case.method.undo(files.zT, files.mask, files.headers, keys).double().cpu().numpy()
        for row, (id, z, inside) in enumerate(zip(case.people.ids, zT, files.mask[:, 0].cpu().numpy(), strict=True)):
            found = measure(z, inside, generator_of(id, "oracle"))
            for name in ORACLES:
                values[name][row, column] = found[name]
    for name, table in values.items():
        yield Found("right key told by z_T", name, leakage.auc_statistic(table[:, :1], table[:, 1:]))


def tampering(case: Case, *, pictures: int | None) -> Iterator[Found]:
    """The attacker changes files on their way to the owner, who has the right key and looks at tags: are they refused?

    One bit of a pixel; every bit of the header, one at a time; another file's header; no tag; no header. An owner who looks at
    no tags gets `psnr_face` of the changed pixel.
    """
    case = case.first(pictures)
    files, people = case.files[0], case.people
    changed = leakage.one_bit_off_pictures(files.images, files.headers)
    views: dict[str, tuple[Image, list[list[bytes]]]] = {
        "nothing changed": (files.images, [[header] for header in files.headers]),
        "one bit of a pixel": (changed, [[header] for header in files.headers]),
        "one bit of the header": (files.images, [leakage.one_bit_off_headers(header) for header in files.headers]),
        "the header of another file": (files.images, [[files.headers[i]] for i in people.others]),
        "no tag": (files.images, [[leakage.without_tag(header)] for header in files.headers]),
        "no header": (files.images, [[b""] for _ in files.headers]),
    }
    for what, (images, tried) in views.items():
        refused = [
            leakage.is_refused(header, picture, key)
            for picture, headers, key in zip(to_bytes(images), tried, files.keys, strict=True)
            for header in headers
        ]
        owners = [name for name, headers in zip(people.names, tried, strict=True) for _ in headers]
        yield Found(f"tampering: {what}", "refused", rate_statistic(refused, owners, 0, "rate"))
    back = case.recovered("tampered", replace(files, images=changed), files.keys)
    face = pixels(files.mask, people.pictures)
    yield averaged(case, "tampering: one bit of a pixel", "psnr_face", psnr_face(back, people.pictures, face).tolist())


def password_dictionary(*, settings: Sequence[Mapping[str, int]], guesses: int) -> Iterator[Found]:
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
        yield Found("password dictionary", name, cost)
        yield Found("password dictionary", name, Statistic("years for 2^30 guesses", cost.n, 0, *years))


# Keys, pictures in, values out


def published_key(off: bool = False) -> MasterKey:
    """The key of a password that everyone may know, or of one that differs from it in a single bit."""
    salt = hashlib.sha256(b"keyanon experiment salt").digest()[:SALT_BYTES]
    return Recipe(salt).derive(PASSWORD[:-1] + chr(ord(PASSWORD[-1]) ^ off))


def averaged(case: Case, view: str, scorer: str, values: Any, ids: Sequence[str] | None = None) -> Found:
    """The mean over pictures, by default all of them, with its interval over people."""
    ids = case.people.ids if ids is None else ids
    people = dict(zip(case.people.ids, case.people.names, strict=True))
    numbers = [float(value) for value in values]
    statistic = mean_statistic(numbers, [people[id] for id in ids])
    return Found(view, scorer, statistic, dict(zip(ids, numbers, strict=True)))


def embeddings_of(recognizer: Recognizer, images: Image) -> Floats:
    rows: Floats = recognizer.embed(images).double().cpu().numpy()
    return rows


def in_batches(title: str, size: int, function: Callable[..., Any], *columns: Any) -> Any:
    """A function of tensors, or lists, with one entry for each picture: a tensor, or a tuple of them, put together again."""
    parts, start = [], 0
    for batch in batches([""] * len(columns[0]), size, title):
        parts.append(function(*(column[start : start + len(batch)] for column in columns)))
        start += len(batch)
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def publish(method: KeyedNoise, pictures: Image, keys: Sequence[Key], ids: Sequence[str], batch_size: int) -> Files:
    headers: list[bytes] = []

    def anonymized(x: Image, keys: Sequence[Key], ids: Sequence[str]) -> tuple[Image, Image, Latent, Mask]:
        out = method.anonymize(x, keys, ids)
        headers.extend(out.headers)
        encoded = method.encoded_pictures(out)
        return to_floats(out.images), encoded, *method.noise(encoded, out.headers)

    images, encoded, zT, mask = in_batches("publish", batch_size, anonymized, pictures, keys, ids)
    return Files(images, tuple(headers), keys, encoded, zT, mask)


def without_verification(method: KeyedNoise) -> KeyedNoise:
    """The method as one runs it who publishes a picture under the first nonce, however badly it comes back."""
    return replace(method, floor=None) if isinstance(method, Verifies) else method
