"""What do attackers learn from published files? `python -m experiments.security dataset=lfw_gray_128`

The paper's method and the exact one, side by side, under the attacks of keyanon/attacks/attackers.py. Published
files, and what each
attack found, are kept in a run folder for each method: a run that was stopped goes on where it was, and `~methods.exact` in one
process and `~methods.signflip` in another, then neither, is the same table sooner. Per-picture values go to
results/scores/NAME.scores.parquet, the shares of right signs to results/plots, and the table is made from committed statistics as
any other.
"""

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import pandas as pd
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from safetensors import safe_open
from safetensors.torch import save
from tabulate import tabulate

from experiments import tables
from experiments.harness import preflight, provenance
from experiments.harness.plots import share_curve
from experiments.run import shown
from keyanon import runner
from keyanon.attacks.attackers import (
    Case,
    Files,
    Found,
    People,
    distribution_tests,
    embeddings_of,
    in_batches,
    publish,
    published_key,
)
from keyanon.channel.keys import experiment_key
from keyanon.channel.pixels import to_bytes, to_floats
from keyanon.channel.whole import write_whole
from keyanon.measures.biometrics import Floats, Statistic, cosine, threshold_at_far
from keyanon.types import Dataset, FaceParser, Image, Key, KeyedNoise, Published, Recognizer

log = logging.getLogger(__name__)


@hydra.main(config_path="../conf", config_name="security", version_base="1.3")
def main(cfg: DictConfig) -> None:
    shown(lambda: run(cfg, dict(HydraConfig.get().runtime.choices)), cfg.name)


def run(cfg: DictConfig, choices: Mapping[str, Any]) -> pd.DataFrame:
    """Publish, attack, write the scores and the table; returns the table's cells."""
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    methods, recognizers, battery, dictionary, parser = (
        instantiate(part, _convert_="all")
        for part in (cfg.methods, cfg.recognizers, cfg.battery, cfg.get("dictionary"), cfg.parser)
    )
    problems = preflight.missing_parts(methods, recognizers, parser)
    dataset = preflight.open_dataset(cfg.dataset, choices["dataset"], problems)
    preflight.stop_if(problems)
    assert dataset is not None

    skipped: dict[str, str] = {}
    people = gathered(dataset, parser, recognizers, cfg, skipped)

    def public(count: int) -> tuple[list[str], Image]:
        rest = [id for id in dataset.ids[cfg.limit :] if (dataset.identity(id) or id) not in people.names]
        ids, pictures = with_faces(dataset, parser, rest[:count], skipped)
        while len(ids) < count and (rest := rest[count:]):
            more, shown = with_faces(dataset, parser, rest[:count], skipped)
            ids, pictures = [*ids, *more], torch.cat([pictures, shown])
        return ids[:count], pictures[:count]

    asked = {"far": cfg.far, "recognizers": plain(cfg.recognizers), "thresholds": people.thresholds, "files": cfg.files}
    found: list[tuple[str, Found]] = []
    for name, method in methods.items():
        folder = Path(cfg.runs) / cfg.name / f"{choices['dataset']}-{name}-{signature(cfg, name, method, people)}"
        files = [kept_files(folder, i, method, people, key, cfg.batch_size) for i, key in enumerate(keys(cfg.files))]
        case = Case(method, people, files, public, cfg.batch_size, cfg.far)
        ours: list[Found] = []
        for attack, settings in cfg.battery.items():
            path = folder / f"{attack}-{provenance.signature(asked | plain(settings))}.json"
            log.info("%s: %s", name, attack)
            ours += kept_findings(path, battery[attack], case)
        found += [(name, one) for one in [*ours, *distribution_tests(case, ours)]]
    for id, reason in skipped.items():
        log.warning("skipped %s: %s", id, reason)
    if dictionary:
        found += [("Argon2id", one) for one in dictionary()]

    thresholds = ", ".join(f"{name} {value:.4f}" for name, value in people.thresholds.items())
    notes = [f"backbone {choices['backbone']}", f"mask from {choices['parser']}", f"{len(people.ids)} pictures"]
    notes += [f"{cfg.files} files each", f"thresholds at FAR {cfg.far:g}: {thresholds}"]
    if not people.enrolled:
        notes.append("suspects are the photographs themselves")
    if choices["backbone"].startswith("faces128"):
        notes.insert(0, "bundled model, which stands in for LDM-FFHQ")
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
    rows = tables.build(cfg.name)
    write_whole(Path("results/tables") / f"{cfg.name}.beside.md", beside(rows, [*methods, "Argon2id"]).encode())
    share_curve(statistics, "right signs ", Path("results/plots") / f"{cfg.name}.svg")
    return rows


def beside(rows: pd.DataFrame, methods: Sequence[str]) -> str:
    """A table's cells in Markdown, a column for each method: value, interval and the number of pictures or comparisons."""
    lines: dict[tuple[str, str, str], dict[str, str]] = {}
    every: list[Any] = list(rows.itertuples())
    for row in every:
        line = lines.setdefault((row.view, row.scorer, row.statistic), dict.fromkeys(methods, ""))
        line[row.anonymizer] = f"{tables.ours_text(row, np.nan)}; {row.n}"
    body = [[text.replace("|", "\\|") for text in (*cell, *line.values())] for cell, line in lines.items()]
    table = tabulate(body, ["attack", "by", "statistic", *methods], tablefmt="pipe", disable_numparse=True)
    about = "Each cell: value [95 % interval]; n. keyanon/attacks/attackers.py says what each attacker knows and does."
    return f"# {rows.experiment.iloc[0]}: methods side by side\n\n{about}\n\n{table}\n"


def keys(count: int) -> list[Key]:
    """Published keys: the first comes from a password, the others are as random."""
    return [published_key(), *(experiment_key(i) for i in range(1, count))]


def plain(node: DictConfig) -> Any:
    return OmegaConf.to_container(node, resolve=True)


def signature(cfg: DictConfig, name: str, method: KeyedNoise, people: People) -> str:
    """Of what a method's published files depend on."""
    question = {"dataset": plain(cfg.dataset), "method": plain(cfg.methods[name]), "pictures": people.ids}
    return provenance.signature(question | {"weights": [model.sha256 for model in preflight.models(method)]})


# What is kept, and not made again


def kept_files(folder: Path, place: int, method: KeyedNoise, people: People, key: Key, batch_size: int) -> Files:
    """All pictures' files under one key."""
    path, count = folder / f"files-{place}.safetensors", len(people.ids)
    if not path.exists():
        files = publish(method, people.pictures, [key] * count, people.ids, batch_size)
        kept = {"images": to_bytes(files.images), "zT": files.zT.cpu(), "mask": files.mask.cpu()}
        packed = {"headers": json.dumps([header.hex() for header in files.headers])}
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, save({name: tensor.contiguous() for name, tensor in kept.items()}, packed))
        return files
    with safe_open(path, "pt") as file:
        images, zT, mask = to_floats(file.get_tensor("images")), file.get_tensor("zT"), file.get_tensor("mask")
        headers = tuple(bytes.fromhex(header) for header in json.loads(file.metadata()["headers"]))

    def encoded(x: Image, packed: tuple[bytes, ...]) -> Image:
        return method.encoded_pictures(Published(to_bytes(x), packed))

    read = in_batches("read", batch_size, encoded, images, headers)
    return Files(images, headers, [key] * count, read, zT, mask)


def kept_findings(path: Path, attack: Callable[[Case], Iterator[Found]], case: Case) -> list[Found]:
    """What an attack found, in this run or in one before."""
    if not path.exists():
        write_whole(path, json.dumps([asdict(one) for one in attack(case)]).encode())
    return [Found(**one | {"statistic": Statistic(**one["statistic"])}) for one in json.loads(path.read_text("utf-8"))]


# Who is attacked


def with_faces(
    dataset: Dataset, parser: FaceParser, ids: Sequence[str], skipped: dict[str, str]
) -> tuple[list[str], Image]:
    """Those of the pictures that can be read and show a face, as bytes have them; why others do not goes to `skipped`."""
    good, loaded = runner.load(dataset, ids, skipped)
    if not good:
        return [], torch.empty(0)
    pictures = to_floats(to_bytes(torch.stack(loaded)))
    shown = parser.mask(pictures, (pictures.shape[-2], pictures.shape[-1])).flatten(1).any(1).tolist()
    skipped |= {id: "no face found" for id, face in zip(good, shown, strict=True) if not face}
    return [id for id, face in zip(good, shown, strict=True) if face], pictures[torch.tensor(shown)]


def gathered(
    dataset: Dataset,
    parser: FaceParser,
    recognizers: Mapping[str, Recognizer],
    cfg: DictConfig,
    skipped: dict[str, str],
) -> People:
    """The pictures and their gallery, as recognizers see them; ValueError where there are not two people to tell apart."""
    ids, pictures = with_faces(dataset, parser, dataset.ids[: cfg.limit], skipped)
    names = [dataset.identity(id) or id for id in ids]
    if len(set(names)) < 2:
        raise ValueError(f"{len(set(names))} person on {len(ids)} readable pictures; linkage and strangers need two")
    clean = {name: embeddings_of(recognizer, pictures) for name, recognizer in recognizers.items()}
    if not dataset.gallery:
        thresholds = {name: float(cfg.thresholds[name]) for name in recognizers}
        return People(ids, names, pictures, recognizers, clean, clean, clean, names, thresholds, enrolled=False)
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
    return People(ids, names, pictures, recognizers, clean, suspects, gallery, gallery_names, thresholds, enrolled=True)


if __name__ == "__main__":
    main()
