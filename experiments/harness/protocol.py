"""Which protocol a run measures by: the choices of conf/protocol, by name."""

import re
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from experiments.harness.command import CONF, config_of
from keyanon.settings import checked

AUTHORS, OURS = "authors", "ours"  # the paper's numbers are of the first


@checked
@dataclass(frozen=True)
class Choices:
    """Where the authors' way to measure and ours differ. Parts take each by interpolation; here all are checked, used or not."""

    resize: Literal["lanczos", "bilinear"]
    order: Literal["numbers", "authors"]
    edition: Literal["any", "deep-funneled"]
    pairs: Literal["distinct", "repeated"]
    calibration: Literal["anonymized", "all"]
    threshold: Literal["order", "quantile"]
    enrolment: Literal["fixed", "lowered"]
    alignment: Literal["least_squares", "ransac"]
    ssim: Literal["inside", "whole"]
    landmarks: Literal["euclidean", "summed"]
    lost_face: Literal["undefined", "corner"]
    channel: Literal["file", "floats"]
    float_mask: Literal["file", "floats"]
    jpeg_mask: Literal["compressed", "floats"]
    looks_at: Literal["faces", "picture"]
    lengths: Literal["unit", "raw"]


# What a run may have otherwise than its experiment and still measure the same: where things lie, and what they run on.
ELSEWHERE = {"root", "names", "rename", "weights", "device", "compile", "licence"}
OF_THE_RUN = {
    "allow_faces_in_clear", "batch_size", "estimate_only", "key", "long", "name", "notes", "protocol", "runs", "shard",
    "threads", "wandb",
}  # fmt: skip
SHOWN = 3


def measured_by(cfg: DictConfig, choices: Mapping[str, Any]) -> str:
    """What tables name a run's protocol: its label, and for the authors' all that the run has otherwise than its experiment.

    `authors,solver.steps=2` is no reproduction: the paper's number has no verdict beside it. An experiment is the file of
    conf/experiment of the run's name.
    """
    label = protocol_label(cfg.protocol, choices["protocol"])
    if label != AUTHORS or not (CONF / "experiment" / f"{cfg.name}.yaml").is_file():
        return label
    own = leaves(experiment_as_it_stands(str(cfg.name), choices))
    here = leaves(cfg)
    otherwise = [f"{path}{shown(here[path])}" for path in own.keys() & here.keys() if own[path] != here[path]]
    more = [f"{len(otherwise) - SHOWN} more"] if len(otherwise) > SHOWN else []
    return ",".join([label, *sorted(otherwise)[:SHOWN], *more])


def experiment_as_it_stands(name: str, choices: Mapping[str, Any]) -> DictConfig:
    """An experiment's configuration for the dataset and the method of a run, without anything that the run sets."""
    asked = [f"{group}={choices[group]}" for group in ("dataset", "anonymizer") if group in choices]
    begun = GlobalHydra.instance().is_initialized()  # as in every command, where it can be begun only once
    with nullcontext() if begun else initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(config_of(name), [f"experiment={name}", *asked])


def leaves(cfg: DictConfig) -> dict[str, Any]:
    """What of a configuration decides the outcome, by its path."""
    found: dict[str, Any] = {}

    def walk(node: Any, path: str) -> None:
        if isinstance(node, Mapping):
            for name, value in node.items():
                if str(name) not in (ELSEWHERE if path else OF_THE_RUN | ELSEWHERE):
                    walk(value, f"{path}.{name}".lstrip("."))
        else:
            found[path] = node

    walk(OmegaConf.to_container(cfg), "")  # references stay: each setting counts once
    return found


def shown(value: Any) -> str:
    """A value as a table may show it: numbers and plain words, and no place on a disk."""
    text = str(value)
    return f"={text}" if re.fullmatch(r"[\w.+-]{1,20}", text) else ""


def protocol_label(protocol: DictConfig, chosen: str) -> str:
    """The name of the `chosen` file of conf/protocol, and what was set otherwise: `ours`, or `ours,ssim=whole`."""
    path = CONF / "protocol" / f"{chosen}.yaml"
    named: Any = OmegaConf.load(path) if path.is_file() else protocol
    set_otherwise = [f"{name!s}={value}" for name, value in protocol.items() if named.get(str(name)) != value]
    return ",".join([chosen, *set_otherwise])
