"""What do attackers learn from published files? `python -m experiments.security dataset=celebahq_mini_128`

The paper's method and the exact one, side by side, under attack (keyanon/adversaries.py says what each attacker knows):

    linkage           files of one photograph under different keys, and a file beside its photograph, told from those of others
    known_plaintext   some originals are known, and the key stream is one for all, as the authors have it; or has nonces
    right_signs       recovery by one who holds a share of the right signs, and the share a recognizer needs
    seed_search       the authors' keys come from 32 bits: found by trying, from one known pair
    identities        who recognizers see on files, on pictures recovered with wrong keys, on a fresh face in the same background,
                      and where the face is blanked
    key_search        the best of many wrong keys by a recognizer's word, for the right suspect and for another one
    noise_oracle      does z_T look more like noise under the right key?
    passwords         what a dictionary costs by Argon2id, on this machine

Bars: AUC 0.5 and D_sys 0 tell nothing, the wrong suspect and the fresh face are the controls. Per-picture values go to
results/scores/NAME.scores.parquet, and the table is made from committed statistics as any other. Tampering with files is a matter
of headers and their tests.
"""

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import hydra
import numpy as np
import pandas as pd
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor

from experiments import preflight, tables
from experiments.gaussianity import MEASURES, measure
from experiments.gaussianity import drawn as random_numbers
from experiments.run import shown
from keyanon import adversaries, runner
from keyanon import images as channel
from keyanon.adversaries import Method, NonceOff, OneStream, SeededSigns
from keyanon.anonymizers import SignFlip
from keyanon.attacks import NearKey, PartialKey, WrongKey, heedless
from keyanon.biometrics import (
    Floats,
    Statistic,
    cosine,
    mean_statistic,
    quantile_statistic,
    rate_statistic,
    threshold_at_far,
    verification_statistics,
)
from keyanon.exact import pixels
from keyanon.headers import Header
from keyanon.keys import experiment_key, normals, signs
from keyanon.scorers import psnr_face
from keyanon.types import Attack, Dataset, Image, Key, Latent, Mask, Published, Recognizer

SEEDS = 2**32
DICTIONARY = 2**30
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
    """Published pictures, one key each, and what anyone computes from them: z'_T and the face's cells."""

    images: Image
    headers: tuple[bytes, ...]
    keys: Sequence[Key]
    read: Image
    zT: Latent
    mask: Mask


@dataclass(frozen=True)
class People:
    """The pictures, who is on them, and how recognizers see them (rows by recognizer).

    `suspects` are the clean pictures by which each person is looked for: one of the gallery, else the photograph itself.
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
    others: list[int]  # for each picture the place of the next one of somebody else

    @property
    def enrolled(self) -> bool:
        return self.gallery is not self.clean

    def own(self, name: str, rows: Floats, count: int | None = None) -> Floats:
        """Cosines of pictures and their own suspects."""
        return np.asarray((rows * self.suspects[name][:count]).sum(1))


@dataclass(frozen=True)
class Case:
    """A method under attack: `files` are those of each key."""

    method: Method
    people: People
    files: list[Files]
    cfg: DictConfig

    def batches(self, title: str, function: Callable[..., Any], *columns: Any) -> Any:
        return in_batches(title, self.cfg.batch_size, function, *columns)

    def publish(self, keys: Sequence[Key], count: int | None = None) -> Files:
        return publish(self.method, self.people.pictures[:count], keys, self.people.ids[:count], self.cfg.batch_size)

    def originals(self, files: Files) -> tuple[Latent, Mask]:
        """z_T of the photographs of `files`, by who has them."""
        pictures = self.people.pictures[: len(files.images)]
        found: tuple[Latent, Mask] = self.batches(
            "invert", lambda x, headers: adversaries.noise(self.method, x, headers), pictures, files.headers
        )
        return found

    def attacked(self, title: str, attack: Attack, files: Files, count: int | None = None) -> Image:
        out: Image = self.batches(
            title,
            lambda x, headers, keys: attack(Published(channel.to_bytes(x), headers), keys, self.method),
            files.images[:count],
            files.headers[:count],
            files.keys[:count],
        )
        return out

    def recovered(self, title: str, files: Files, keys: Sequence[Key]) -> Image:
        out: Image = self.batches(title, heedless(self.method).recover, files.images, files.headers, keys)
        return out

    def drawn(self, title: str, files: Files, zT: Latent, rows: slice = slice(None)) -> Image:
        out: Image = self.batches(
            title,
            lambda x, headers, z: adversaries.drawn(self.method, x, headers, z),
            files.read[rows],
            files.headers[rows],
            zT,
        )
        return out


def linkage(case: Case) -> Iterator[Found]:
    """The attacker has two files under independent keys, or a file and a candidate photograph, and no key: do they belong together?

    By |z_T| in three forms and by what recognizers see, who see the public background as well (unlinkability: ISO/IEC 24745;
    D_sys: Gomez-Barrero et al., IEEE TIFS 13(6), 2018). Photographs are inverted with their own file's header, though an
    attacker would use that of the file he compares with: what the two share by that can only count against the method.
    """
    first, files = case.files[0], case.files
    z, mask = case.originals(first)
    for name, likeness in LIKENESSES.items():
        pairs = [(a, b) for i, a in enumerate(files) for b in files[i + 1 :]]
        between = np.stack([likeness(a.zT, a.mask, b.zT, b.mask) for a, b in pairs])
        source = likeness(z, mask, first.zT, first.mask)[None]
        for view, scores in (("linkage of two files", between), ("file and its photograph", source)):
            yield from (Found(view, name, statistic) for statistic in adversaries.linkage_statistics(scores))
    for name, recognizer in case.people.recognizers.items():
        rows = [embedded(recognizer, one.images) for one in files]
        between = np.stack([cosine(a, b) for i, a in enumerate(rows) for b in rows[i + 1 :]])
        source = cosine(case.people.clean[name], rows[0])[None]
        for view, scores in (("linkage of two files", between), ("file and its photograph", source)):
            yield from (Found(view, name, statistic) for statistic in adversaries.linkage_statistics(scores))


def by_norms(a: Latent, in_a: Mask, b: Latent, in_b: Mask) -> Floats:
    return adversaries.feature_likeness(adversaries.channel_norms(a, in_a), adversaries.channel_norms(b, in_b))


def by_magnitudes(a: Latent, in_a: Mask, b: Latent, in_b: Mask) -> Floats:
    one, other = adversaries.sorted_magnitudes(a, in_a), adversaries.sorted_magnitudes(b, in_b)
    return adversaries.feature_likeness(one, other)


LIKENESSES = {"layout of |z|": adversaries.layout_likeness, "channel norms": by_norms, "sorted |z|": by_magnitudes}


def known_plaintext(case: Case) -> Iterator[Found]:
    """The attacker has m files with their originals, and wants other files of the same master key.

    `key signs`: the share that he finds (0.5: none); then what they make of the other files. With one key stream for all pictures
    (the authors' code uses its keys again, from batch to batch and for both datasets), and with a nonce for each. Rotations have
    no signs: what he draws counts alone.
    """
    fits = [m for m in case.cfg.pairs if m < len(case.people.ids)]
    if not fits:
        return
    ids, targets = case.people.ids[max(fits) :], slice(max(fits), None)
    reused = case.publish([OneStream(key) for key in case.files[0].keys])
    for stream, files in (("one key stream", reused), ("nonces", case.files[0])):
        z, mask = case.originals(files)
        face = pixels(mask[targets], case.people.pictures)
        for m in fits:
            view = f"known plaintext, {stream}, {m:2} pairs"
            found = adversaries.voted_signs(z[:m], files.zT[:m], mask[:m] & files.mask[:m])
            if isinstance(case.method, SignFlip):
                nonces = [Header.unpack(header).nonce for header in files.headers[targets]]
                shares = [
                    adversaries.share_right(found, signs(key, nonce, tuple(found.shape)), inside)
                    for key, nonce, inside in zip(files.keys[targets], nonces, files.mask[targets, 0], strict=True)
                ]
                yield averaged(case, view, "key signs", shares, ids)
            guess = torch.where(found == 0, signs(experiment_key(1), b"coins", tuple(found.shape)), found)
            inside = files.mask[targets].expand_as(files.zT[targets])
            turned = torch.where(inside, files.zT[targets] * guess, files.zT[targets])
            out = case.drawn(view, files, turned, targets)
            yield averaged(case, view, "psnr_face", psnr_face(out, case.people.pictures[targets], face).tolist(), ids)
            for name, recognizer in case.people.recognizers.items():
                cosines = (embedded(recognizer, out) * case.people.clean[name][targets]).sum(1)
                yield averaged(case, view, name, cosines, ids)


def right_signs(case: Case) -> Iterator[Found]:
    """The attacker has a share of the right signs, 0.5 being none: does a recognizer accept what he recovers?

    Wrong signs leave cos(z_T, what he has) = 1 - 2 h, h their share. Only for keys that are signs: rotations have none, and a
    master key has no neighbours (`identities` has those that differ in a bit).
    """
    if not isinstance(case.method, SignFlip):
        return
    files, shares, people = case.files[0], list(case.cfg.shares), case.people
    cosines: dict[str, list[Floats]] = {name: [] for name in people.recognizers}
    for share in shares:
        view = f"right signs {100 * share:5.1f} %"
        recovered = case.attacked(view, PartialKey(1 - share), files)
        for name, recognizer in people.recognizers.items():
            own = people.own(name, embedded(recognizer, recovered))
            cosines[name].append(own)
            yield averaged(case, view, name, own)
            unfound = int(np.isnan(own).sum())
            accepted = rate_statistic(own > people.thresholds[name], people.names, unfound, f"tar@far={case.cfg.far:g}")
            yield Found(view, name, accepted)
    for name in people.recognizers:
        needed = adversaries.share_needed(shares, np.stack(cosines[name], axis=1), people.thresholds[name])
        view, label = "right signs needed", f"median share to pass at far={case.cfg.far:g}"
        statistic = quantile_statistic(needed, people.names, 0.5, label)
        yield Found(view, name, statistic, dict(zip(people.ids, needed.tolist(), strict=True)))


def seed_search(case: Case) -> Iterator[Found]:
    """The attacker has one file with its original, whose key was drawn as the authors do: their 32-bit seeds, tried in turn.

    Tried is a small range that holds the seed; from the rate follows the time for all of them. An agreement above 6.2 deviations
    is more than the luckiest of 2^32 wrong seeds has.
    """
    if not isinstance(case.method, SignFlip):
        return
    tried, count = case.cfg.seeds.tried, min(case.cfg.seeds.pictures, len(case.people.ids))
    keys = [SeededSigns(tried * (i + 1) // (count + 1)) for i in range(count)]
    files = case.publish(keys, count)
    z, mask = case.originals(files)
    results = [
        adversaries.seed_search(a * b, (here & there)[0], range(tried))
        for a, b, here, there in zip(z, files.zT, mask, files.mask, strict=True)
    ]
    ids, view = case.people.ids[:count], "32-bit seed search"
    right = [float(seed == key.seed) for (seed, _, _), key in zip(results, keys, strict=True)]
    yield averaged(case, view, f"right seed of {tried}", right, ids)
    yield averaged(case, view, "agreement in deviations", [agreement for _, agreement, _ in results], ids)
    yield averaged(case, view, "seeds per second", [rate for _, _, rate in results], ids)
    yield averaged(case, view, f"hours for {SEEDS:,}", [SEEDS / rate / HOUR for _, _, rate in results], ids)


def identities(case: Case) -> Iterator[Found]:
    """The attacker has a recognizer and a clean picture of everyone: whom does he see, with no key or a wrong one?

    Mean, 90th percentile and maximum of the cosine to the right person, TAR, rank 1. Is its law that of strangers? Not even a face
    of fresh noise has that law, if the background tells; so wrong keys are set beside fresh faces as well: alike, they tell no more
    than the background does. A mean colour in the face's place leaves background, hair and outline, which most often is no face to
    a detector (undefined).
    """
    files, people = case.files[0], case.people
    u, v = files.zT.shape[-2:]
    mask = case.batches("mask", lambda x: case.method.parser.mask(x, (u, v)), people.pictures)
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
        "nonce off by one bit": case.recovered("nonce", files, [NonceOff(key) for key in files.keys]),
        "fresh face": case.drawn("fresh", files, fresh),
        "face blanked": adversaries.blanked(people.pictures, pixels(mask, people.pictures)),
    }
    for name, recognizer in people.recognizers.items():
        clean, suspects = people.clean[name], people.suspects[name]
        strangers = (clean * suspects[people.others]).sum(1)
        yield averaged(case, "strangers", name, strangers)
        rows = {view: embedded(recognizer, images) for view, images in seen.items()}
        calibration = clean if people.enrolled else people.thresholds[name]
        for view, probes in rows.items():
            own = people.own(name, probes)
            yield averaged(case, view, name, own)
            yield Found(view, name, quantile_statistic(own, people.names, 0.9, "p90"))
            defined = own[~np.isnan(own)]
            most = float(defined.max()) if defined.size else np.nan
            yield Found(view, name, Statistic("max", defined.size, own.size - defined.size, most, np.nan, np.nan))
            for statistic in verification_statistics(
                probes, people.gallery[name], people.names, people.gallery_names, calibration, case.cfg.far
            ):
                if statistic.statistic.startswith(("tar", "rank1")):
                    yield Found(view, name, statistic)
            for control, values in (("strangers", strangers), ("fresh faces", people.own(name, rows["fresh face"]))):
                if view not in ("original", "recovered", "fresh face"):
                    for statistic in adversaries.same_law(own, values):
                        yield Found(view, f"{name} beside {control}", statistic)


def key_search(case: Case) -> Iterator[Found]:
    """The attacker tries wrong keys until a recognizer sees a suspect in the picture. If he comes as far with another suspect, that
    proves nothing; what the right suspect has ahead, the background gives him (`identities`, fresh face).
    """
    count = min(case.cfg.search.pictures, len(case.people.ids))
    files, people, keys = case.files[0], case.people, case.cfg.search.guesses
    tries = [case.attacked("key search", WrongKey(trial), files, count) for trial in range(1, keys + 1)]
    for name, recognizer in people.recognizers.items():
        rows = np.stack([embedded(recognizer, images) for images in tries])  # keys, pictures, entries
        suspects = {"the right suspect": people.suspects[name], "another suspect": people.suspects[name][people.others]}
        best = {who: best_of((rows * wanted[:count]).sum(2)) for who, wanted in suspects.items()}
        for who, values in best.items():
            yield averaged(case, f"best of {keys} wrong keys for {who}", name, values, people.ids[:count])
        right, other = best.values()
        view = f"best of {keys} wrong keys, right suspect and another"
        yield averaged(case, f"{view}: difference", name, right - other, people.ids[:count])
        yield Found(view, name, adversaries.auc_statistic(right[:, None], other[:, None]))


def best_of(cosines: Floats) -> Floats:
    """The highest over the first axis; NaN where none is defined."""
    filled = np.where(np.isnan(cosines), -np.inf, cosines).max(axis=0)
    return np.where(np.isfinite(filled), filled, np.nan)


def noise_oracle(case: Case) -> Iterator[Found]:
    """The attacker tells the right key from a wrong one by statistics of z_T inside the face, without drawing a picture. An AUC far
    from 0.5, to either side, verifies guesses: then only the cost of a guess protects passwords.
    """
    files = case.files[0]
    trials = [files.keys, *([experiment_key(1000 + i)] * len(files.headers) for i in range(case.cfg.wrong_keys))]
    values = {name: np.empty((len(files.headers), len(trials))) for name in ORACLES}
    for column, keys in enumerate(trials):
        zT = adversaries.unlocked(case.method, files.zT, files.mask, files.headers, keys).double().cpu().numpy()
        for row, (id, z, inside) in enumerate(zip(case.people.ids, zT, files.mask[:, 0].cpu().numpy(), strict=True)):
            found = measure(z, inside, random_numbers(id, "oracle"))
            for name in ORACLES:
                values[name][row, column] = found[name]
    for name, table in values.items():
        yield Found("right key told by z_T", name, adversaries.auc_statistic(table[:, :1], table[:, 1:]))


def passwords(cfg: DictConfig) -> Iterator[Found]:
    """Cost of a guess, one after the other, and of 2^30 of them. What does not fit into memory is left out, with a warning."""
    for one in cfg.passwords:
        name = f"t={one.iterations}, {one.memory} MiB, p={one.lanes}"
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // (MIB * MIB)
        if 2 * one.memory > free:
            log.warning("Argon2id %s not measured: %d MiB of memory are free, twice its need is asked for", name, free)
            continue
        seconds = adversaries.argon2_seconds(one.iterations, one.memory * MIB, one.lanes, cfg.password_guesses)
        cost = mean_statistic(seconds, name="seconds per guess")
        years = [bound * DICTIONARY / YEAR for bound in (cost.value, cost.low, cost.high)]
        yield Found("password dictionary", name, cost)
        yield Found("password dictionary", name, Statistic("years for 2^30 guesses", cost.n, 0, *years))


ATTACKS: dict[str, Callable[[Case], Iterator[Found]]] = {
    "linkage": linkage,
    "known_plaintext": known_plaintext,
    "right_signs": right_signs,
    "seed_search": seed_search,
    "identities": identities,
    "key_search": key_search,
    "noise_oracle": noise_oracle,
}


# Pictures in, values out


def averaged(case: Case, view: str, scorer: str, values: Any, ids: Sequence[str] | None = None) -> Found:
    """The mean over pictures, by default all of them, with its interval over people."""
    ids = case.people.ids if ids is None else ids
    people = dict(zip(case.people.ids, case.people.names, strict=True))
    numbers = [float(value) for value in values]
    statistic = mean_statistic(numbers, [people[id] for id in ids])
    return Found(view, scorer, statistic, dict(zip(ids, numbers, strict=True)))


def embedded(recognizer: Recognizer, images: Image) -> Floats:
    rows: Floats = recognizer.embed(images).double().cpu().numpy()
    return rows


def in_batches(title: str, size: int, function: Callable[..., Any], *columns: Any) -> Any:
    """A function of tensors, or lists, with one entry for each picture: a tensor, or a tuple of them, put together again."""
    parts, start = [], 0
    for batch in runner.batches([""] * len(columns[0]), size, title):
        parts.append(function(*(column[start : start + len(batch)] for column in columns)))
        start += len(batch)
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def publish(method: Method, pictures: Image, keys: Sequence[Key], ids: Sequence[str], batch_size: int) -> Files:
    headers: list[bytes] = []

    def anonymized(x: Image, keys: Sequence[Key], ids: Sequence[str]) -> tuple[Image, Image, Latent, Mask]:
        out = method.anonymize(x, keys, ids)
        headers.extend(out.headers)
        images = channel.to_floats(out.images)
        read = adversaries.received(method, images, out.headers)
        return images, read, *adversaries.noise(method, read, out.headers)

    images, read, zT, mask = in_batches("publish", batch_size, anonymized, pictures, keys, ids)
    return Files(images, tuple(headers), keys, read, zT, mask)


def gathered(
    dataset: Dataset, recognizers: Mapping[str, Recognizer], cfg: DictConfig, skipped: dict[str, str]
) -> People:
    """The pictures and their gallery, as recognizers see them; ValueError where there are not two people to tell apart."""
    ids, loaded = runner.load(dataset, dataset.ids[: cfg.limit], skipped)
    names = [dataset.identity(id) or id for id in ids]
    if len(set(names)) < 2:
        raise ValueError(f"{len(set(names))} person on {len(ids)} readable pictures; linkage and strangers need two")
    pictures = channel.to_floats(channel.to_bytes(torch.stack(loaded)))
    others = [
        next(j % len(ids) for j in range(i + 1, i + len(ids)) if names[j % len(ids)] != names[i])
        for i in range(len(ids))
    ]
    clean = {name: embedded(recognizer, pictures) for name, recognizer in recognizers.items()}
    if not dataset.gallery:
        thresholds = {name: float(cfg.thresholds[name]) for name in recognizers}
        return People(ids, names, pictures, recognizers, clean, clean, clean, names, thresholds, others)
    enrolled, portraits = runner.load(dataset, dataset.gallery, skipped)
    gallery_names = [dataset.identity(id) or id for id in enrolled]
    gallery: dict[str, Floats] = {
        name: in_batches(f"{name}: gallery", cfg.batch_size, recognizer.embed, torch.stack(portraits)).double().numpy()
        for name, recognizer in recognizers.items()
    }
    strange = np.not_equal.outer(names, gallery_names)
    thresholds = {name: threshold_at_far(cosine(clean[name], gallery[name])[strange], cfg.far) for name in recognizers}
    places = [gallery_names.index(name) for name in names]
    suspects = {name: rows[places] for name, rows in gallery.items()}
    return People(ids, names, pictures, recognizers, clean, suspects, gallery, gallery_names, thresholds, others)


@hydra.main(config_path="../conf", config_name="security", version_base="1.3")
def main(cfg: DictConfig) -> None:
    shown(lambda: run(cfg, dict(HydraConfig.get().runtime.choices)), cfg.name)


def run(cfg: DictConfig, choices: Mapping[str, Any]) -> pd.DataFrame:
    """Publish, attack, write the scores and the table; returns the table's cells."""
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    if unknown := set(cfg.battery) - {*ATTACKS, "passwords"}:
        raise ValueError(
            f"battery: there is no {', '.join(sorted(unknown))}; there are {', '.join(ATTACKS)}, passwords"
        )
    methods: dict[str, Method] = instantiate(cfg.methods, _convert_="all")
    recognizers: dict[str, Recognizer] = instantiate(cfg.recognizers, _convert_="all")
    problems = preflight.missing_parts(methods, recognizers)
    dataset = preflight.open_dataset(cfg.dataset, choices["dataset"], problems)
    preflight.stop_if(problems)
    assert dataset is not None

    skipped: dict[str, str] = {}
    people = gathered(dataset, recognizers, cfg, skipped)
    for id, reason in skipped.items():
        log.warning("skipped %s: %s", id, reason)
    found: list[tuple[str, Found]] = []
    for name, method in methods.items():
        keys = [experiment_key(i) for i in range(cfg.files)]
        n = len(people.ids)
        files = [publish(method, people.pictures, [key] * n, people.ids, cfg.batch_size) for key in keys]
        case = Case(method, people, files, cfg)
        for attack in [attack for attack in ATTACKS if attack in cfg.battery]:
            log.info("%s: %s", name, attack)
            found += [(name, one) for one in ATTACKS[attack](case)]
    if "passwords" in cfg.battery:
        found += [("Argon2id", one) for one in passwords(cfg)]

    thresholds = ", ".join(f"{name} {value:.4f}" for name, value in people.thresholds.items())
    notes = [f"backbone {choices['backbone']}", f"mask from {choices['parser']}", f"{len(people.ids)} pictures"]
    notes += [f"{cfg.files} files each", f"thresholds at FAR {cfg.far:g}: {thresholds}"]
    if not people.enrolled:
        notes.append("suspects are the photographs themselves")
    if choices["backbone"].startswith("faces128"):
        notes.insert(0, "embedded model, which stands in for LDM-FFHQ")
    about = {"experiment": cfg.name, "dataset": choices["dataset"], "notes": "\n".join([*map(str, cfg.notes), *notes])}
    statistics = pd.DataFrame(
        [{"anonymizer": row, "view": one.view, "scorer": one.scorer, **asdict(one.statistic)} for row, one in found]
    ).assign(**about)[tables.STATISTICS]
    scores = pd.DataFrame(
        [
            {"anonymizer": row, "id": id, "view": one.view, "scorer": one.scorer, "value": value}
            for row, one in found
            for id, value in one.values.items()
        ],
        columns=[column for column in tables.SCORES if column != "dataset"],
    ).assign(dataset=choices["dataset"])[tables.SCORES]
    tables.commit(cfg.name, statistics, scores)
    return tables.build(cfg.name)


if __name__ == "__main__":
    main()
