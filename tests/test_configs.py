"""Every YAML under conf/ composes, and every leaf that names a class becomes an object. New files are found by themselves."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException, InstantiationException, MissingConfigException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from experiments.harness.command import config_of
from experiments.harness.preflight import missing_parts
from experiments.harness.provenance import signature
from experiments.run import settings_of
from keyanon.attacks.views import FloatChannel, Jpeg, NearKey, PartialKey, WrongKey, by_view
from keyanon.channel.keys import write_new_key
from tests.conftest import ROOT

CONF = ROOT / "conf"
LEAVES = sorted(path.relative_to(CONF).with_suffix("").as_posix() for path in CONF.rglob("*.yaml"))
TREE = [leaf for leaf in LEAVES if "/" in leaf and not leaf.startswith(("train/", "hydra/"))]
MERGED = {"attacks", "recognizers", "scorers", "security"}
# Whose leaves tests/test_contract.py makes objects of, each by itself, and holds against what they promise
UNDER_CONTRACT = {"anonymizer", "ablation", "dataset", "solver", "parser", "nonce"}
OF_DATASETS = {"condition"}  # parts of a dataset: tests/test_disturbed.py


def composed(*overrides: str, config: str = "config"):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(config, overrides=list(overrides), return_hydra_config=False)


@pytest.mark.parametrize(
    "leaf", [leaf for leaf in TREE if leaf.partition("/")[0] not in MERGED | UNDER_CONTRACT | OF_DATASETS]
)
def test_leaf_composes_and_instantiates(leaf: str, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("KEYANON_PASSWORD", "what key=password reads")
    group, _, name = leaf.rpartition("/")
    overrides = [f"{group}={name}"]
    if leaf == "key/file":
        write_new_key(tmp_path / "key")
        overrides.append(f"key.path={tmp_path / 'key'}")
    cfg = composed(*overrides, config=config_of(name) if group == "experiment" else "config")
    OmegaConf.resolve(cfg)
    if group != "experiment":
        instantiated(cfg.get(group, cfg))


@pytest.mark.parametrize("group", sorted(MERGED))
def test_leaves_of_which_any_number_can_be_chosen_compose_and_instantiate(group: str):
    names = [leaf.partition("/")[2] for leaf in TREE if leaf.startswith(f"{group}/")]
    for name in names:
        only = list(OmegaConf.load(CONF / group / f"{name}.yaml"))
        assert only == [name], f"{group}/{name}.yaml must hold exactly one entry, named {name}"
    cfg = composed(f"{group}=[{','.join(names)}]", config="security" if group == "security" else "config")
    OmegaConf.resolve(cfg)
    assert list(cfg[group]) == names
    instantiated(cfg[group])


def instantiated(node: DictConfig) -> None:
    made = instantiate(node, _convert_="all")
    assert made is not None
    missing_parts(made)  # raises if it names a card that is none


def test_one_file_of_an_attack_makes_all_its_views():
    made = by_view(
        instantiate(
            composed("attacks=[jpeg,wrong_signs,wrong_key]", "attacks.jpeg.quality=[50,75]").attacks, _convert_="all"
        )
    )
    shares = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 1)
    signs = {f"wrong_signs_{share}".replace(".", "p"): PartialKey(share) for share in shares}
    assert made == {"jpeg50": Jpeg(50), "jpeg75": Jpeg(75), **signs, "wrong_key": WrongKey()}


@pytest.mark.parametrize(
    ("experiment", "views"),
    [
        ("jpeg", ["recovered_float", "jpeg100", "jpeg90", "jpeg75", "jpeg50"]),
        ("wrong_keys", ["recovered_float", "wrong_key", "near_key"]),
        ("lossy", ["jpeg100", "jpeg95", "jpeg90", "jpeg75", "jpeg50"]),
        ("bundled_celebahq", ["recovered_float", "wrong_key", "jpeg90", "wrong_signs_0p1"]),
        ("table2", ["recovered_float", "wrong_key", "near_key", "jpeg100", "jpeg90", "jpeg75", "jpeg50"]),
    ],
)
def test_views_of_experiments_are_those_of_their_tables(experiment: str, views: list[str]):
    attacks = composed(f"experiment={experiment}").attacks
    assert list(by_view(instantiate(attacks, _convert_="all"))) == views


@pytest.mark.parametrize(("protocol", "asked"), [("ours", False), ("authors", True)])
def test_a_protocol_says_what_its_views_are_made_of(protocol: str, asked: bool):
    attacks = "attacks=[recovered_float,wrong_key,near_key,jpeg]"
    cfg = composed(f"protocol={protocol}", attacks, "parser=bisenet")
    views = by_view(instantiate(cfg.attacks, _convert_="all"))
    channel = "floats" if asked else "file"
    assert views["recovered_float"] == FloatChannel(channel)
    assert views["wrong_key"] == WrongKey(channel=channel, mask=channel)
    assert views["near_key"] == NearKey(channel=channel, mask=channel)
    assert views["jpeg50"] == Jpeg(50, "floats" if asked else "compressed")
    assert cfg.parser.looks_at == ("picture" if asked else "faces")


def test_a_view_by_another_protocol_is_another_view():
    """What a run would take from an earlier one goes by a view's signature."""
    signatures = []
    for choice in ("channel=file", "channel=floats", "float_mask=floats", "jpeg_mask=floats"):
        cfg = composed("attacks=[recovered_float,wrong_key,near_key,jpeg]", f"protocol.{choice}")
        views = by_view(instantiate(cfg.attacks, _convert_="all"))
        signatures.append({view: signature(settings_of(attack)) for view, attack in views.items()})
    ours, *others = signatures
    changed = [{view.rstrip("0123456789") for view in ours if ours[view] != other[view]} for other in others]
    assert changed == [{"wrong_key", "near_key"}, {"recovered_float", "wrong_key", "near_key"}, {"jpeg"}]


@pytest.mark.parametrize("choice", ["channel=tape", "float_mask=compressed", "jpeg_mask=file"])
def test_a_choice_that_a_protocol_does_not_have_is_refused(choice: str):
    cfg = composed("attacks=[recovered_float,wrong_key,jpeg]", f"protocol.{choice}")
    with pytest.raises(InstantiationException, match=f"='{choice.partition('=')[2]}': expected one of"):
        instantiate(cfg.attacks, _convert_="all")


@pytest.mark.parametrize("old", ["jpeg90", "wrong_signs_0p1"])
def test_an_attack_by_its_former_name_is_a_clear_error(old: str):
    with pytest.raises(MissingConfigException, match=f"Could not load 'attacks/{old}'"):
        composed(f"attacks=[{old}]")


def swept() -> list[tuple[str, str]]:
    """Each experiment with each value that it sweeps over."""
    cells = []
    for leaf in LEAVES:
        if leaf.startswith("experiment/"):
            params = OmegaConf.select(OmegaConf.load(CONF / f"{leaf}.yaml"), "hydra.sweeper.params") or {}
            experiment = f"experiment={leaf.removeprefix('experiment/')}"
            cells += [(experiment, f"{name}={value}") for name, values in params.items() for value in values.split(",")]
    return cells


@pytest.mark.parametrize(("experiment", "override"), swept())
def test_every_cell_of_a_sweep_composes_and_instantiates(experiment: str, override: str):
    assert instantiate(composed(experiment, override).anonymizer, _convert_="all") is not None


@pytest.mark.parametrize("leaf", [leaf for leaf in LEAVES if leaf.startswith("train/")])
def test_training_composes(leaf: str):
    with initialize_config_dir(str(CONF / "train"), version_base="1.3"):
        cfg = compose(leaf.removeprefix("train/"), overrides=["data.root=anywhere"])
    OmegaConf.resolve(cfg)
    parts = [part for part in ("latent", "vae", "unet", "network", "obfuscators", "scheduler") if part in cfg]
    assert len({"vae", "unet", "network"} & set(parts)) == 1
    for part in parts:
        instantiate(cfg[part], _convert_="all")


@pytest.mark.parametrize("leaf", [leaf for leaf in LEAVES if leaf.startswith("hydra/")])
def test_launcher_composes(leaf: str):
    group, _, name = leaf.rpartition("/")
    composed(f"{group}={name}")


def test_there_are_leaves():
    assert len(TREE) > 30
    assert {leaf.partition("/")[0] for leaf in TREE} >= UNDER_CONTRACT


def test_the_old_name_of_the_attackers_group_is_refused():
    with pytest.raises(HydraException, match="Could not override 'battery'"):
        composed("battery=[linkage]", config="security")


def test_attackers_are_chosen_in_their_order():
    assert list(composed("security=[tampering,linkage]", config="security").security) == ["tampering", "linkage"]
