"""Whatever is a bad input ends in the project's own error: settings of all parts of conf/, files of all readers, commands.

What a value may do: be usable, or raise a UserError. A bare KeyError, TypeError, RuntimeError, ValueError is a bug.
"""

import io
import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from inspect import Parameter, signature
from pathlib import Path
from random import Random
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hydra.utils import get_object
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from experiments import tables, train_gpu
from experiments.harness import results
from experiments.harness.made import made, targets
from experiments.harness.meaning import read_meanings
from experiments.harness.paper import read_paper
from experiments.harness.preflight import walk
from experiments.harness.shards import Shards
from keyanon import weights
from keyanon.channel.headers import Header
from keyanon.channel.keys import Recipe, read_key
from keyanon.channel.pixels import open_rgb, read_png
from keyanon.diffusion.model import LatentDiffusion
from keyanon.errors import UserError
from keyanon.faces.datasets import Folder, read_list, read_pairs
from keyanon.faces.onnx import open_onnx
from keyanon.parts import digest, read_parts
from keyanon.run_folder import FILE_SCHEMA
from tests.conftest import smooth_picture
from tests.test_configs import CONF, LEAVES, MERGED, TREE, composed

# Derandomized: a test that fails once fails again.
FUZZ = settings(
    max_examples=25, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
HOSTILE = [
    "text", "", " ", "a\0b", "${nothing}", "../..",
    0, 1, -1, 3, 0.5, 10.0, -0.5, 1e-9, 1e300, 10**400, 10**9, math.nan, math.inf, -math.inf,
    True, False, None, [], [1], ["a", None], [math.nan], {}, {"a": 1}, {"_target_": "nowhere.Nothing"},
    {"_target_": "builtins.dict"}, {"_target_": "keyanon.methods.baselines.controls.Blackout"},
]  # fmt: skip


def raises_ours(work: Callable[[], Any]) -> Any:
    """What the work gives; None where it refuses. Any exception that is no UserError goes on."""
    try:
        return work()
    except UserError as error:
        assert str(error).strip()
        return None


# Settings of parts


# Of the classes of other packages: what they make of a huge number fills the memory.
OURS = ("keyanon.", "experiments.")
SMALL = [value for value in HOSTILE if not isinstance(value, int | float) or abs(value) < 20]
GROUPS = [*sorted({leaf.partition("/")[0] for leaf in TREE} - {"experiment", "ablation"}), "finder", "second_detector"]
TRAINING = [leaf for leaf in LEAVES if leaf.startswith("train/")]


def configs(group: str) -> Iterator[DictConfig]:
    """Configurations with each leaf of a group. Hydra composes those that have defaults; the others are put in their place."""
    names = [path.stem for path in sorted((CONF / group).glob("*.yaml"))]
    if group in MERGED:
        yield composed(f"{group}=[{','.join(names)}]", config="security" if group == "security" else "config")
        return
    base = composed("attacks=[]", "recognizers=[]", "scorers=[]")
    for name in names:
        alone = OmegaConf.load(CONF / group / f"{name}.yaml")
        OmegaConf.set_struct(base, False)
        base[group] = alone
        yield composed(f"{group}={name}") if "defaults" in alone else base
    if not names:
        yield base


def settings_of(group: str, cfg: DictConfig) -> Iterator[tuple[str, DictConfig, str, str]]:
    """Every setting of every class that a group names: what it is called, and where the configuration has it."""
    alone = OmegaConf.create({group: OmegaConf.to_container(cfg, resolve=True)[group]})
    for place, node in targets(alone[group], group):
        target = node["_target_"]
        for name in ({*map(str, node), *taken(target), "nobody_knows_this"}) - {"_convert_", "_recursive_"}:
            yield f"{target}.{name}", alone, place, name


def taken(target: str) -> set[str]:
    part = get_object(target)
    own = part.__module__.startswith(("keyanon", "experiments"))
    return {one.name for one in signature(part).parameters.values() if own and one.kind is not Parameter.VAR_KEYWORD}


@pytest.fixture(autouse=True)
def nothing_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("HF_HUB_OFFLINE", "KEYANON_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("KEYANON_PASSWORD", "what key=password reads")


def walk_settings(group: str, cfg: DictConfig, seen: set[str]) -> list[str]:
    """A value is usable or refused; an unknown name, and a class that is not there, are refused by their place."""
    found: list[str] = []
    for setting, alone, place, name in settings_of(group, cfg):
        if setting in seen or setting.startswith("experiments.keys."):  # whose file of salts has its own tests
            continue
        seen.add(setting)
        before = OmegaConf.to_container(alone)
        values = HOSTILE if setting.startswith(OURS) else SMALL
        for value in Random(setting).sample(values, 2):
            changed = OmegaConf.create(before)
            OmegaConf.update(changed, f"{place}.{name}", value, merge=False, force_add=True)
            try:
                made(changed, group)
                wrong = "taken" if name == "nobody_knows_this" else ""
            except UserError as error:
                wrong = "" if str(error).strip() else "nothing is said"
            except Exception as error:
                wrong = repr(error)[:200]
            if wrong:
                found.append(f"{place}.{name}={repr(value)[:60]} ({setting}): {wrong}")
    return found


@pytest.mark.parametrize("group", GROUPS)
def test_a_setting_of_a_part_is_usable_or_refused(group: str):
    seen, found = set[str](), list[str]()
    for cfg in configs(group):
        found += walk_settings(group, cfg, seen)
    assert len(seen) > 3
    assert not found, "\n".join(found)


@settings(FUZZ, max_examples=10)
@given(data=st.data())
def test_a_constructor_takes_or_refuses_anything(data: st.DataObject):
    """Library users, who need no configuration: the same classes, and more values."""
    anything = st.sampled_from(HOSTILE) | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=5)
    for target, arguments in constructors().items():
        name = data.draw(st.sampled_from([*sorted(arguments), "nobody_knows_this"]))
        value = data.draw(anything)
        try:
            get_object(target)(**{**arguments, name: value})
        except UserError as error:
            assert str(error).strip()
        except Exception as error:
            raise AssertionError(f"{target}({name}={value!r})") from error
        else:
            assert name != "nobody_knows_this"


@cache
def constructors() -> dict[str, dict[str, Any]]:
    """Of every class of ours that configurations name, arguments that it takes."""
    found: dict[str, dict[str, Any]] = {}
    for group in set(GROUPS) - {"key", "dataset", "nonce"}:
        for cfg in configs(group):
            for part in walk([made(cfg, group)]):
                if is_dataclass(part) and type(part).__module__.startswith("keyanon"):
                    arguments = {field.name: getattr(part, field.name) for field in fields(part) if field.init}
                    found.setdefault(f"{type(part).__module__}.{type(part).__qualname__}", arguments)
    assert len(found) > 50
    return {name: found[name] for name in sorted(found)}


@pytest.mark.parametrize("leaf", TRAINING)
def test_a_setting_of_training_is_usable_or_refused(leaf: str):
    cfg = OmegaConf.load(CONF / f"{leaf}.yaml")
    seen, found = set[str](), list[str]()
    for group in ("latent", "vae", "unet", "network", "obfuscators", "scheduler"):
        if group in cfg:
            found += walk_settings(group, OmegaConf.create({group: cfg[group]}), seen)
    assert len(seen) > 3
    assert not found, "\n".join(found)


# Files


def parquet(frame: pd.DataFrame) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pandas(frame, preserve_index=False), buffer)
    return buffer.getvalue()


def png(size: int = 32) -> bytes:
    buffer = io.BytesIO()
    smooth_picture(0, size).save(buffer, "PNG")
    return buffer.getvalue()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
JUNK = (
    st.binary(max_size=200)
    | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass"))
    | JSON.map(lambda value: json.dumps(value).encode())
    | st.sampled_from(
        [
            b"",
            b"\xff\xfe",
            b"\0" * 600,
            b"[" * 3000,
            b"0..99999999999999",
            b"a 1 " + b"9" * 5000,
            b"{",
            b"- &a [*a]",
            b"? {}: 1",
        ]
    )
    | st.sampled_from(
        [png(), parquet(pd.DataFrame({"a": [1]})), b"what,name\n1,2,3\n", b"id,view,scorer,value\n1,2,3,x\n"]
    )
)


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """A file cut short, or with some bytes changed, or something else altogether."""
    if draw(st.booleans()):
        return draw(JUNK)
    data = bytearray(whole[: draw(st.integers(0, len(whole)))] if draw(st.booleans()) else whole)
    for place in draw(st.lists(st.integers(0, max(len(data) - 1, 0)), max_size=4)) if data else []:
        data[place] = draw(st.integers(0, 255))
    return bytes(data)


def read_part(path: Path) -> object:
    """As a stranger would store it: under the name that its bytes have."""
    data = path.read_bytes()
    folder = path.parent / digest(data)[:20]
    folder.mkdir(exist_ok=True)
    (folder / f"{digest(data)[:16]}.parquet").write_bytes(data)
    return read_parts(folder, FILE_SCHEMA)


def read_run(path: Path) -> object:
    """A run folder, all of whose files are this one, and whose run.json says so."""
    run = path.parent / "run"
    run.mkdir(exist_ok=True)
    for name in results.KEPT:
        (run / name).write_bytes(path.read_bytes())
    results.write_about(run, {"dataset": "a", "protocol": "ours", "anonymizer": "b", "title_notes": []})
    return [
        refused(lambda: results.collect([run], "x")),
        refused(lambda: results.collect_scores([run])),
        refused(lambda: results.collect_meanings([run])),
    ]


def read_about(path: Path) -> object:
    """run.json as it is, and signed by whoever wrote it."""
    run = path.parent / "about"
    run.mkdir(exist_ok=True)
    (run / "run.json").write_bytes(path.read_bytes())
    refused(lambda: results.read_about(run))
    try:
        told = json.loads(path.read_bytes())
        results.write_about(run, {"dataset": "a", **told} if isinstance(told, dict) else {"title_notes": told})
    except (ValueError, RecursionError):
        return None
    return refused(lambda: results.read_about(run))


def read_committed(path: Path) -> object:
    """The files that a table is made of."""
    place = path.parent / "committed" / "scores"
    place.mkdir(parents=True, exist_ok=True)
    for suffix in ("parquet", "methods.csv", "costs.csv", "meanings.csv"):
        shutil.rmtree(place)
        place.mkdir()
        if suffix != "parquet":
            (place / "x.parquet").write_bytes(parquet(pd.DataFrame(columns=results.STATISTICS)))
        (place / f"x.{suffix}").write_bytes(path.read_bytes())
        refused(lambda: results.build("x", (), place.parent, place.parent))
    return None


def read_shard(path: Path) -> object:
    shards = Shards(path.parent, 1, "asked")
    shards.path("1/1").parent.mkdir(exist_ok=True)
    shards.path("1/1").write_bytes(path.read_bytes())
    return shards.closed()


def read_tar(path: Path) -> object:
    path.with_suffix(".tar").write_bytes(path.read_bytes())
    dataset = Folder(str(path.with_suffix(".tar")), 16)
    return [dataset.load(id) for id in dataset.ids]


PAPER = (CONF.parent / "results" / "paper" / "table2.yaml").read_bytes()
CARDS = Path(weights.__file__).with_name("cards.yaml").read_bytes()
READERS: dict[str, tuple[Callable[[Path], object], bytes]] = {
    "a header": (lambda path: Header.unpack(path.read_bytes()), b"KA\x02\x00" + bytes(40)),
    "a recipe": (lambda path: Recipe.unpack(path.read_bytes()), Recipe(bytes(16)).pack()),
    "a key": (read_key, bytes(32)),
    "a published picture": (lambda path: read_png(path), png()),
    "a picture": (lambda path: open_rgb(path, path.read_bytes()), png()),
    "a list of ids": (lambda path: read_list(str(path)), b"# ids\n1\n2..5\n"),
    "a file of pairs": (lambda path: list(read_pairs(path)), b"2\nAnn_B\t1\t2\nAnn\t1\tBo\t2\n"),
    "a tar file": (read_tar, b""),
    "rows of a run": (read_part, b""),
    "files of a run": (read_run, parquet(pd.DataFrame({"id": ["a"], "view": ["b"], "scorer": ["c"], "value": [1.0]}))),
    "run.json": (read_about, b'{"dataset": "a"}'),
    "committed scores": (read_committed, parquet(pd.DataFrame([dict.fromkeys(results.STATISTICS, "a")]))),
    "a shard": (read_shard, b'{"state": "done"}'),
    "meanings": (read_meanings, b"what,name,role,kind,unit,direction,label\nview,a,clean,,,,\n"),
    "numbers of the paper": (read_paper, PAPER),
    "cards": (weights.read_cards, CARDS),
    "a network in ONNX": (lambda path: open_onnx(path, torch.device("cpu")), b"\x08\x07"),
}


def refused(work: Callable[[], object]) -> object:
    """What the work gives, None where it is refused in the project's own words; anything else goes on."""
    try:
        return work()
    except UserError as error:
        assert str(error).strip()
        return None


@pytest.mark.parametrize("reader", READERS)
def test_a_file_is_read_or_refused(reader: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch):
    monkeypatch.setattr(results, "PATIENCE", 1)
    read, whole = READERS[reader]

    @FUZZ
    @given(data=damaged(whole))
    def fuzz(data: bytes) -> None:
        path = tmp_path_factory.mktemp("file") / "file.yaml"
        path.write_bytes(data)
        refused(lambda: read(path))

    fuzz()


# Folders of models

MODEL_FILES = [
    "latent/config.json",
    "unet/config.json",
    "scheduler/scheduler_config.json",
    "unet/diffusion_pytorch_model.safetensors",
]


def use(folder: Path) -> None:
    """As a run does: its preflight, and then a picture there and back."""
    model = LatentDiffusion(str(folder))
    if model.missing() or model.wrong_size(64):
        return
    z = model.encode(torch.zeros(1, 3, 64, 64))
    model.decode(model.eps(z, len(model.schedule.abar) // 2))


@pytest.mark.parametrize("name", MODEL_FILES)
def test_a_model_is_used_or_refused(name: str, tiny_block_dct: Path, tmp_path_factory: pytest.TempPathFactory):
    whole = (tiny_block_dct / name).read_bytes()
    values: Any = json.loads(whole) if name.endswith("json") else {}
    spoiled = st.none() | st.tuples(st.sampled_from(sorted(values) or [""]), st.sampled_from(SMALL[:-3]))

    @settings(FUZZ, max_examples=15)
    @given(data=damaged(whole[:5000]), change=spoiled)
    def fuzz(data: bytes, change: tuple[str, Any] | None) -> None:
        folder = tmp_path_factory.mktemp("model") / "copy"
        shutil.copytree(tiny_block_dct, folder, copy_function=lambda a, b: Path(b).symlink_to(a))
        (folder / name).unlink()
        (folder / name).write_bytes(
            data if change is None or not values else json.dumps(values | dict([change])).encode()
        )
        refused(lambda: use(folder))

    fuzz()


@pytest.mark.parametrize("name", ["conv_in.weight", "conv_out.bias"])
@pytest.mark.parametrize("how", ["missing", "another shape", "another name"])
def test_weights_of_another_network_are_refused(name: str, how: str, tiny_block_dct: Path, tmp_path: Path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_block_dct, tmp_path / "model")
    path = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    tensor = state.pop(name)
    if how != "missing":
        state[name if how == "another shape" else f"{name}s"] = tensor[:3].clone()
    save_file(state, path)
    with pytest.raises(UserError, match="unet"):
        use(tmp_path / "model")


# Commands


@pytest.mark.parametrize(
    "overrides",
    [
        ["anonymizer=pixelate", "anonymizer.filter.block=10.0"],
        ["anonymizer=pixelate", "+anonymizer.filter.blok=10"],
        ["anonymizer._target_=keyanon.nothing.Here"],
        ["anonymizer=pixelate", "anonymizer.filter=text"],
        ["key.seed=text"],
        ["key=file", "key.path=nowhere"],
        ["backbone.device=toaster"],
        ["dataset.size=${nothing}"],
        ["dataset=folder", "dataset.root=nowhere"],
        ["dataset=folder", "dataset.crop=[0,0,2,1]"],
        ["attacks=[jpeg]", "attacks.jpeg.quality=[101]"],
        ["solver.steps=3"],
        ["solver.steps=100000"],
        ["threads=1000000000000"],
        ["second_detector=null"],
        ["+recognizers.dlib.card=[1]"],
    ],
)
def test_a_command_ends_in_one_line(overrides: list[str], command_in_process):
    done = command_in_process("parser=ellipse", "recognizers=[dlib]", "scorers=[psnr]", "limit=2", *overrides)
    told = done.stderr.strip()
    assert done.returncode not in (0, None), done
    assert "Traceback" not in told + done.stdout
    assert len(told) < 1000


@pytest.mark.parametrize(
    ("main", "arguments"),
    [
        (tables.main, ["nothing_of_this_name"]),
        (tables.main, ["x", "--runs", "nowhere"]),
        (train_gpu.main, ["network", "--model", "nowhere", "--data", "nowhere", "--out", "out"]),
        (
            train_gpu.main,
            ["network", "--model", "bundled:faces128", "--data", "nowhere", "--out", "out", "--batch", "-1"],
        ),
        (
            train_gpu.main,
            ["network", "--model", "bundled:faces128", "--data", "nowhere", "--out", "out", "--minutes", "nan"],
        ),
        (weights.main, ["fetch", "nothing"]),
    ],
)
def test_a_command_with_arguments_ends_in_one_line(main: Callable[..., object], arguments: list[str], capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code not in (0, None)
