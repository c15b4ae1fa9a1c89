"""Fetch all weights that experiments need: `python -m keyanon.weights fetch --all table1 [solver.steps=2 ...]` hands over to this.

The library has cards and does not know experiments; which cards and models one needs shows when its parts are made. So the walk
over these parts is here, and shares the preflight's.

Nothing is fetched before the licences are accepted: ACCEPT_LICENCES=1, or a yes at a terminal. Only what is needed is fetched, and
a download that was cut off goes on. Pictures are no concern of this: experiments.brought asks for them. The order of a dataset is.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig

from experiments.harness.command import CONF, FAILED, config_of, given, in_one_line
from experiments.harness.made import made
from experiments.harness.preflight import GROUPS, NOT_READY, choices, missing_parts, walk
from keyanon import weights
from keyanon.errors import UserError
from keyanon.weights import Card, Package


def cells(name: str, overrides: Sequence[str]) -> Iterator[DictConfig]:
    """The configurations that an experiment runs: one, or those of its sweep.

    It is run by the command of its own name, where there is one, else by experiments.run.
    """
    config = config_of(name)
    asked = [f"experiment={name}", *overrides]
    if config == name and not (CONF / "experiment" / f"{name}.yaml").is_file():
        asked = list(overrides)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose(config, asked, return_hydra_config=True)
        if cfg.hydra.mode != RunMode.MULTIRUN:
            yield cfg
            return
        parsed = OverridesParser.create(GlobalHydra.instance().config_loader()).parse_overrides(given(cfg.hydra))
        swept = {each.get_key_element(): each for each in parsed}
        for cell in map(list, product(*map(choices, swept.values()))):
            yield compose(config, [f"experiment={name}", *overrides, *cell], return_hydra_config=True)


def needed(names: Sequence[str], overrides: Sequence[str]) -> list[Any]:
    """All parts that experiments are made of."""
    parts: list[Any] = []
    for cfg in (cfg for name in names for cfg in cells(name, overrides)):
        groups = GROUPS if "anonymizer" in cfg or "methods" in cfg else (*GROUPS, "backbone")
        parts += [made(cfg, group) for group in (*groups, "dataset") if group in cfg]
    return parts


def to_fetch(parts: Sequence[Any]) -> tuple[dict[str, Card], dict[str, Any]]:
    """What is not here and can be fetched: cards by name, models by where they come from."""
    from keyanon.types import Fetchable, NeedsWeights, TakesWeights

    cards: dict[str, Card] = {}
    models: dict[str, Any] = {}
    for part in walk(parts):
        if isinstance(part, NeedsWeights):
            own = 1 if isinstance(part, TakesWeights) and part.weights is not None else 0
            cards |= {card.name: card for card in part.cards()[own:] if weights.locate(card) is None}
        if (
            isinstance(part, Fetchable)
            and ":" not in part.source
            and not Path(part.source).is_absolute()
            and part.missing()
        ):
            models[part.source] = part
    return {name: card for name, card in cards.items() if not isinstance(card.origin, Package)}, models


def stop(title: str, problems: Sequence[str]) -> int:
    print(f"keyanon: {title}:", *(f"- {problem}" for problem in problems), sep="\n", file=sys.stderr)
    return NOT_READY


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m keyanon.weights fetch --all", description="Fetch what experiments need."
    )
    parser.add_argument("names", nargs="+", metavar="EXPERIMENT", help="such as table1; and settings, such as limit=2")
    asked = parser.parse_args(arguments).names
    names, overrides = ([one for one in asked if ("=" in one) == setting] for setting in (False, True))
    for name in names:
        if not any((CONF / place).is_file() for place in (f"experiment/{name}.yaml", f"{name}.yaml")):
            parser.error(f"there is no experiment {name!r}, which conf/experiment/{name}.yaml would be")
    parts = needed(names, overrides)
    cards, models = to_fetch(parts)
    listed = [f"{card.name}: {card.source}  [{card.licence}]" for card in cards.values()]
    listed += [f"{name}: the model alone, from the hub  [{model.licence}]" for name, model in models.items()]
    if listed and weights.offline():
        return stop("these weights are not here, and KEYANON_OFFLINE or HF_HUB_OFFLINE forbids to fetch them", listed)
    if listed and not weights.accepted(listed):
        print("keyanon: nothing was fetched: accept the licences above with ACCEPT_LICENCES=1", file=sys.stderr)
        return NOT_READY
    failed: list[str] = []
    fetches = {name: partial(weights.resolve, card) for name, card in cards.items()}
    for name, fetch in (fetches | {name: model.fetch for name, model in models.items()}).items():
        try:
            fetch()
            print(f"{name}: here", flush=True)
        except UserError as error:
            failed.append(str(error))
    if failed := failed or missing_parts(*parts):
        stop("not all could be fetched; the same command goes on where it was", failed)
        return FAILED
    print(f"all weights are here of {', '.join(names)}")
    return 0


if __name__ == "__main__":
    with in_one_line():
        sys.exit(main())
