"""Every published number of the paper's own method is a cell that the experiment of its file makes, measured as the authors do."""

from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
from hydra.utils import instantiate
from omegaconf import DictConfig

from experiments.fetch import cells
from experiments.harness.paper import read_paper
from experiments.harness.protocol import protocol_label
from keyanon.attacks.views import by_view
from keyanon.types import SetScorer

ROOT = Path(__file__).parents[1]
PAPER = {path.stem: read_paper(path) for path in sorted((ROOT / "results" / "paper").glob("*.yaml"))}
OWN = {name: {each.cell for each in all if each.anonymizer.startswith("signflip")} for name, all in PAPER.items()}
REPRODUCED = [name for name, cells in OWN.items() if cells]
RECOGNIZED = {"facenet_vggface2", "facenet_casia", "arcface_r50", "adaface_vit"}


def measured(cfg: DictConfig) -> Iterator[tuple[str, ...]]:
    """What a run makes: dataset, protocol, anonymizer, view, scorer, statistic."""
    chosen = cfg.hydra.runtime.choices
    row = (chosen["dataset"], protocol_label(cfg.protocol, chosen["protocol"]))
    if "methods" in cfg:
        for method, scorer in product(cfg.methods, cfg.recognizers):
            yield from (
                (*row, method, "anonymized", scorer, statistic) for statistic in ("cosine_between_keys", "w2_squared")
            )
        return
    views = ["original", "anonymized", "recovered", *by_view(instantiate(cfg.attacks, _convert_="all"))]
    pairs = cfg.dataset.dataset._target_.endswith(".LFW")
    rates = [f"{name}@far={cfg.far:g}" for name in ("tar", "threshold")] if pairs else []
    told = instantiate(cfg.separability).summaries if cfg.separability else {}
    statistics = {name: ["mean", *rates, *told] for name in cfg.recognizers}
    for name, node in cfg.scorers.items():
        statistics[name] = ["set" if isinstance(instantiate(node, _convert_="all"), SetScorer) else "mean"]
    for view, (scorer, names) in product(views, statistics.items()):
        yield from ((*row, chosen["anonymizer"], view, scorer, statistic) for statistic in names)


@pytest.mark.parametrize("name", REPRODUCED)
def test_an_experiment_makes_every_cell_that_its_paper_file_has(name: str):
    cfgs = list(cells(name, []))
    lacking = OWN[name] - {cell for cfg in cfgs for cell in measured(cfg)}
    assert not lacking, "\n".join(map(" ".join, sorted(lacking)))
    for cfg in cfgs:
        assert (cfg.name, cfg.hydra.runtime.choices["protocol"]) == (name, "authors")
        assert set(cfg.recognizers) <= RECOGNIZED
        assert cfg.backbone.source == "PolLabarbarie/diffusion-signflip-anon-face"
        assert cfg.solver.steps == 50


def test_how_many_numbers_of_its_own_the_paper_has():
    counts = {name: len(OWN[name]) for name in REPRODUCED}
    assert counts == {
        "diversity": 6, "jpeg": 10, "recovery": 17, "separability": 22, "table1": 6, "table2": 16, "wrong_keys": 6,
    }  # fmt: skip


def test_what_is_compared_is_what_was_published():
    """Ours with another network, variant or way to measure is no cell of the paper's."""
    names = {each.scorer for all in PAPER.values() for each in all if each.anonymizer.startswith("signflip")}
    assert "arcface_r50_webface600k" not in names
    assert {each.protocol for name in REPRODUCED for each in PAPER[name]} == {"authors"}
    for name in ("wrong_keys", "jpeg", "diversity", "separability"):
        assert {cell[2] for cell in OWN[name]} == {"signflip_controlnet"}
