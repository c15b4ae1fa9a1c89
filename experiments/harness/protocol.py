"""Which protocol a run measures by: the choices of conf/protocol, by name."""

from omegaconf import DictConfig, OmegaConf

from experiments.harness.command import CHECKOUT

AUTHORS, OURS = "authors", "ours"  # the paper's numbers are of the first


def protocol_label(protocol: DictConfig, chosen: str) -> str:
    """The name of the `chosen` file of conf/protocol, and what was set otherwise: `ours`, or `ours,ssim=whole`."""
    path = CHECKOUT / "conf" / "protocol" / f"{chosen}.yaml"
    named = OmegaConf.load(path) if path.is_file() else protocol
    return ",".join([chosen, *(f"{name}={value}" for name, value in protocol.items() if named.get(name) != value)])
