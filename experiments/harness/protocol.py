"""Which protocol a run measures by: the choices of conf/protocol, by name."""

from dataclasses import dataclass
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf

from experiments.harness.command import CHECKOUT
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


def protocol_label(protocol: DictConfig, chosen: str) -> str:
    """The name of the `chosen` file of conf/protocol, and what was set otherwise: `ours`, or `ours,ssim=whole`."""
    path = CHECKOUT / "conf" / "protocol" / f"{chosen}.yaml"
    named: Any = OmegaConf.load(path) if path.is_file() else protocol
    set_otherwise = [f"{name}={value}" for name, value in protocol.items() if named.get(str(name)) != value]
    return ",".join([chosen, *set_otherwise])
