"""From configurations to parts: what cannot be made is told in one line, which names the setting, its value and what it can be."""

import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from inspect import signature
from pydoc import ErrorDuringImport, locate
from typing import Any, get_origin

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.harness.errors import user_error
from keyanon.errors import BadSetting
from keyanon.settings import LATER, BadArgument, Name, check_arguments, refuse

OF_HYDRA = {"_target_", "_partial_", "_convert_", "_recursive_", "_args_"}
OF_OTHERS = "diffusers."  # the classes of other packages that configurations name


@functools.cache
def kinds() -> dict[str, Any]:
    """What the groups of configurations make."""
    # here: torch takes seconds, which a command's help does not need
    from keyanon.channel.keys import MasterKey
    from keyanon.diffusion.model import LatentDiffusion
    from keyanon.diffusion.solvers import Solver
    from keyanon.faces.detection import DlibCnnDetector
    from keyanon.faces.finding import Finder
    from keyanon.measures.separability import Separability
    from keyanon.types import Anonymizer, Attack, Dataset, FaceParser, Recognizer, Scorer, SetScorer

    return {
        "anonymizer": Anonymizer, "attacks": dict[str, Attack | dict[str, Attack]], "backbone": LatentDiffusion, "dataset": Dataset,
        "finder": Finder, "key": MasterKey, "methods": dict[str, Anonymizer | None], "parser": FaceParser,
        "recognizers": dict[str, Recognizer], "scorers": dict[str, Scorer | SetScorer], "second_detector": DlibCnnDetector,
        "security": dict[str, Any], "separability": Separability | None, "solver": Solver,
    }  # fmt: skip


def made(cfg: DictConfig, group: str, **settings: Any) -> Any:
    """The part that a group of a configuration says; `settings` overrule the group's own.

    Raises:
        UserError: it cannot be made, or is of another kind than the group's. A bug in a part stays the error that it is.
    """
    kind, node = kinds().get(group, Any), cfg.get(group)
    if node is None and get_origin(kind) is dict:
        return {}
    try:
        for place, target in targets(node, group):
            check_target(place, target, settings if place == group else {})
        part = instantiate(node, **settings, _convert_="all") if OmegaConf.is_config(node) else node
    except (InstantiationException, OmegaConfBaseException) as error:
        if (message := refusal(error)) is None:
            raise
        raise BadSetting(message) from error
    refuse(group, part, kind)
    return part


def targets(node: Any, place: str) -> Iterator[tuple[str, DictConfig]]:
    """Whatever below a node names a class or a function, with its place, which is where a command line sets it."""
    if OmegaConf.is_dict(node):
        if "_target_" in node:
            yield place, node
        for name in node:
            yield from targets(node[name], place_of(node[name]) or f"{place}.{name}")
    elif OmegaConf.is_list(node):
        for number, one in enumerate(node):
            yield from targets(one, f"{place}[{number}]")


def place_of(node: Any) -> str:
    """`backbone` also where it is anonymizer.backbone=${backbone}."""
    return str(node._get_full_key(None)) if OmegaConf.is_config(node) else ""


def check_target(place: str, node: DictConfig, settings: Mapping[str, Any]) -> None:
    """Raises BadSetting for a class that is not there, and for settings that it does not take; those that are parts come later."""
    part = found(f"{place}._target_", node["_target_"])
    given = {str(name): node[name] for name in node if name not in OF_HYDRA}
    given = {name: LATER if any(targets(value, "")) else plain(value) for name, value in given.items()}
    args, partial = plain(node.get("_args_", ())), plain(node.get("_partial_", False))
    refuse(f"{place}._args_", args, Sequence[Any])
    refuse(f"{place}._partial_", partial, bool)
    check_arguments(part, place, args, {**given, **settings}, some=partial)


def plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def found(place: str, name: Any) -> Callable[..., Any]:
    """The class or function of that name."""
    refuse(place, name, Name)
    try:
        part = locate(name)
    except (ErrorDuringImport, ImportError, ValueError) as error:
        raise BadSetting(f"{place}={name}: {error}") from error
    if not callable(part):
        raise BadSetting(f"{place}={name}: there is no such class or function")
    try:
        signature(part)
    except ValueError as error:  # of some that are built into Python
        raise BadSetting(f"{place}={name}: {error}") from error
    return part


def refusal(error: Exception) -> str | None:
    """What a user reads of a part that could not be made; None of a bug.

    Classes of other packages refuse their settings with exceptions of all kinds; ours do so with a UserError.
    """
    said, cause = str(error), error.__cause__
    place = told.group(1) if (told := re.search(r"^full_key: (.+)$", said, re.MULTILINE)) else "config"
    if isinstance(cause, BadArgument):
        return f"{place}{cause.said}"
    if (message := user_error(error)) is not None:
        return message
    told = re.search(r"target '([\w.]+)'", said)
    of_others = told is not None and told.group(1).startswith(OF_OTHERS)
    return f"{place}: {' '.join(str(cause or said).split())}" if of_others or cause is None else None
