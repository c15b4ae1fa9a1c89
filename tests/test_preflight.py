"""What the cells of a sweep lack is told at once, before the first of them starts."""

import sys

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import open_dict, read_write

from experiments.fetch import needed, to_fetch
from experiments.harness import preflight
from experiments.harness.preflight import NOT_READY, WholeSweep, choices
from tests.test_configs import CONF


def begin(swept: dict[str, str], *overrides: str) -> None:
    """What Hydra does before the first cell."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", list(overrides), return_hydra_config=True)
        with read_write(config), open_dict(config):
            config.hydra.sweeper.params = swept
        WholeSweep().on_multirun_start(config)


def test_a_sweep_of_which_nothing_is_missing_begins():
    begin({"anonymizer": "identity,signflip"}, "parser=ellipse", "recognizers=[]", "scorers=[psnr]")


def test_everything_that_any_cell_lacks_is_told_once(capsys):
    swept = {"anonymizer": "identity,signflip,g2face", "dataset": "bundled,lfw", "solver.steps": "2,3"}
    with pytest.raises(SystemExit) as ended:
        begin(swept, "parser=ellipse", "recognizers=[]", "scorers=[psnr]", "backbone.source=/nowhere/model")
    assert ended.value.code == NOT_READY
    told = capsys.readouterr().err
    assert told.count("\n- ") == 3
    for name in ("diffusion model /nowhere/model", "g2face: not here", "dataset lfw: "):
        assert told.count(name) == 1, told


def test_pictures_and_the_order_that_a_dataset_takes_them_in_are_told_at_once(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("KEYANON_CACHE", str(tmp_path))
    given = ("parser=ellipse", "recognizers=[]", "scorers=[psnr]", "protocol=authors")
    (tmp_path / "0.jpg").touch()
    for root, count in (("/nowhere", 2), (str(tmp_path), 1)):
        monkeypatch.setenv("KEYANON_CELEBAHQ", root)
        with pytest.raises(SystemExit) as ended:
            begin({"dataset": "celebahq", "limit": "1,2"}, *given)
        assert ended.value.code == NOT_READY
        told = capsys.readouterr().err
        assert told.count("\n- ") == count, told
        assert told.count("fetch celebahq_order") == 1
        assert ("there is no folder /nowhere" in told) == (count == 2)
    begin({"dataset": "celebahq"}, *given, "protocol.order=numbers")


def test_the_order_of_a_dataset_is_fetched_with_the_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("KEYANON_CACHE", str(tmp_path))
    for order, there in (("authors", True), ("numbers", False)):
        cards, _ = to_fetch(needed(["separability"], [f"protocol.order={order}"]))
        assert ("celebahq_order" in cards) == there


def test_what_an_override_is_in_each_cell():
    parsed = OverridesParser.create().parse_overrides(["a=x,y", "b.c=[1,2]", "+d=range(1,3)", "~e"])
    assert list(map(choices, parsed)) == [["a=x", "a=y"], ["b.c=[1,2]"], ["+d=1", "+d=2"], ["~e"]]


def test_shards_are_not_looked_at_one_by_one(monkeypatch):
    composed = []

    def counting(*arguments, **named):
        composed.append(arguments)
        return compose(*arguments, **named)

    monkeypatch.setattr(preflight, "compose", counting)
    swept = {"anonymizer": "identity,signflip", "shard": ",".join(f"{i}/32" for i in range(1, 33))}
    begin(swept, "parser=ellipse", "recognizers=[]", "scorers=[psnr]")
    assert len(composed) == 2


@pytest.mark.parametrize(
    ("swept", "told"),
    [
        ({"solver.steps": "2,2"}, "signflip,solver.steps=2 of bundled in the table default: a value is given twice"),
        ({"experiment": "smoke,quickstart"}, "signflip of bundled in the table t: "),
        ({"solver.steps": "2,3", "name": "a,a/b"}, "name=a/b: it names files and a folder"),
        ({"runs": "a,b"}, "runs= names one folder for all cells of a sweep"),
    ],
)
def test_cells_that_would_be_one_row_and_tables_that_are_no_file_are_refused(swept, told, capsys):
    with pytest.raises(SystemExit) as ended:
        begin(
            swept, "parser=ellipse", "recognizers=[]", "scorers=[psnr]", *(["name=t"] if "experiment" in swept else [])
        )
    assert ended.value.code == NOT_READY
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    "given", ["key.seed=0,1", "dataset.size=64,128", "scorers=[psnr],[mae]", "limit=1,2", "batch_size=1,2"]
)
def test_whatever_a_sweep_varies_tells_its_rows_apart(given):
    name, _, values = given.partition("=")
    swept = {"anonymizer": "glob(*_blur)", "far": "0.1,0.01", name: values}
    begin(swept, "parser=ellipse", "recognizers=[]", "scorers=[psnr]")


def test_the_last_word_on_a_setting_counts(monkeypatch):
    composed = []
    monkeypatch.setattr(
        preflight, "compose", lambda *given, **named: composed.append(given[1]) or compose(*given, **named)
    )
    begin({"anonymizer": "identity,signflip"}, "parser=ellipse", "anonymizer=identity")
    assert composed == [["anonymizer=identity", "parser=ellipse"]]


def test_a_package_that_the_tracker_needs_is_told_before_the_work(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(SystemExit):
        begin({"limit": "1,2"}, "parser=ellipse", "recognizers=[]", "scorers=[psnr]", "wandb=offline")
    assert "wandb=offline: the package wandb is not installed; pip install" in capsys.readouterr().err


def test_a_size_that_a_method_cannot_take_is_told_with_those_it_can(capsys):
    with pytest.raises(SystemExit) as ended:
        begin(
            {"anonymizer": "signflip,exact,identity"},
            "dataset.size=100",
            "parser=ellipse",
            "recognizers=[]",
            "scorers=[psnr]",
        )
    assert ended.value.code == NOT_READY
    told = capsys.readouterr().err
    assert told.count("\n- ") == 1
    assert "pictures of 100 pixels a side: bundled:faces128 takes multiples of 32, such as 96 or 128" in told
