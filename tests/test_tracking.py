import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.utils import instantiate

from experiments.harness.names import file_name, row_label
from experiments.harness.plots import contact_sheet
from experiments.harness.tracking import Off, Pictures, Wandb, public_config, wandb_id, without_places
from keyanon.errors import BadSetting
from tests.conftest import smooth_picture

ROOT = Path(__file__).parents[1]
STATISTICS = pd.DataFrame(
    [
        ("recovered", "psnr", "mean", 4, 0, 31.25, 30.0, 32.0),
        ("recovered", "arcface_r50", "mean", 0, 4, *[float("nan")] * 3),
    ],
    columns=["view", "scorer", "statistic", "n", "undefined", "value", "low", "high"],
)


def everything_below(folder: Path) -> bytes:
    return b"".join(str(path).encode() + path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_public_config_keeps_settings_and_drops_secrets_at_any_depth():
    config = {
        "anonymizer": {
            "_target_": "keyanon.methods.signflip.SignFlip",
            "steps": 50,
            "master_key": "cafe",
            "guidance": None,
        },
        "attacks": [{"quality": 75, "password": "hunter2"}],
        "key": {"fingerprint": "ab12", "bytes": "cafe"},
        "key_fingerprint": "ab12",
        "api_token": "t",
        "apiKey": "t",
        "passphrase": "t",
        "seed": 3,
        "dataset": {"name": "lfw", "root": "faces", "cache_dir": "c", "list": "/etc/list.txt", "there": "~/x"},
        "where": Path("faces"),
        "raw": b"cafe",
        "sizes": (1, 2.5, True, "/etc/secret"),
    }
    assert public_config(config) == {
        "anonymizer": {"_target_": "keyanon.methods.signflip.SignFlip", "steps": 50, "guidance": None},
        "attacks": [{"quality": 75}],
        "key_fingerprint": "ab12",
        "dataset": {"name": "lfw"},
        "sizes": [1, 2.5, True],
    }


PROGRAM = {
    "_target_": "keyanon.methods.baselines.external.ReversibleExternal",
    "name": "external",
    "command": ["python", "driver.py", "--api=tok-command", "{images}", "{output}", "{key}"],
    "recovery": ["python", "driver.py", "tok-recovery", "{images}", "{output}", "{key}"],
    "needs": ["janes_model.pt"],
    "environment": ["JANES_PROXY"],
    "obtain": "ask jane for it",
    "logs": "janes_logs",
    "source": "https://jane:tok-url@example.org/x/y?sig=tok-query#tok-fragment",
    "size": 256,
}
PRIVATE = ("tok-", "jane", "Jane", "JANE")


def test_no_word_of_a_program_and_no_credential_of_an_address_leaves():
    config = {
        "question": {
            "settings": {"anonymizer": {"visible": PROGRAM}},
            "dataset": {"list": "janes_list", "names": "runs/names"},
        },
        "about": {"recovery_input": "8-bit file", "source": "git+ssh://tok-user:x@example.org/repository"},
        "anonymizer": "external,anonymizer.command=[python,jane.py,tok-1],anonymizer.size=64",
        "title_notes": ["see ftp://jane:tok-2@example.org/z?tok-3 there", "https://example.org/public/page"],
    }
    public = public_config(config)
    assert not any(private in repr(public) for private in PRIVATE)
    assert public["question"]["settings"]["anonymizer"]["visible"] == {
        "_target_": PROGRAM["_target_"], "name": "external", "source": "https://...@example.org/x/y?...", "size": 256,
    }  # fmt: skip
    assert public["about"] == {"recovery_input": "8-bit file", "source": "git+ssh://...@example.org/repository"}
    assert public["anonymizer"] == "external,anonymizer.command=...,anonymizer.size=64"
    assert public["title_notes"][1] == "https://example.org/public/page"


@pytest.mark.parametrize(
    "setting", ["anonymizer.command", "anonymizer.recovery", "anonymizer.environment", "key.seed", "key.variable"]
)
def test_a_row_and_its_folder_tell_no_word_of_it(setting):
    row = row_label("external", [f"{setting}=[python,jane.py,'tok-1, x',tok-2]", "solver.steps=2"])
    for text in (row, file_name(f"folder-{row}"), file_name(row) + "-0123abcd"):
        shown = without_places(text)
        assert not any(private in shown for private in PRIVATE)
        assert shown.endswith(f"external,{setting}=...,solver.steps=2") or "~" in text or text.endswith("-0123abcd")


def test_public_config_leaves_its_argument_alone():
    config = {"a": {"password": "hunter2"}}
    public_config(config)
    assert config == {"a": {"password": "hunter2"}}


@pytest.mark.parametrize("name", ["online", "offline", "off"])
def test_every_choice_on_the_command_line_makes_its_tracker(name):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        tracker = instantiate(compose(overrides=[f"+wandb={name}"]).wandb)
    assert tracker == (Off() if name == "off" else Wandb(mode=name, project="keyanon", pictures=None))


def test_off_imports_nothing_and_writes_nothing(tmp_path):
    code = """
import sys, pandas
from experiments.harness.tracking import Off
Off()("abc", {}, pandas.DataFrame(), None)
assert "wandb" not in sys.modules, "wandb was imported"
"""
    subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"], check=True, cwd=tmp_path
    )
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ModuleNotFoundError, match=r"wandb=offline.*keyanon\[wandb\].*wandb=off"):
        Wandb("offline", "keyanon")("abc", {}, STATISTICS, None)


def test_offline_writes_the_numbers_and_no_secret(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setattr(sys, "argv", ["run", "key.password=hunter2-argv"])
    sheet = tmp_path / "sheet.png"
    contact_sheet({"original": [torch.zeros(3, 8, 8, dtype=torch.uint8)]}, sheet)
    config = {"anonymizer": {"steps": 50, "password": "hunter2-config"}, "wandb_note": "a public remark"}
    for _ in range(2):  # a resumed run
        Wandb("offline", "keyanon-test")("5ignature", config, STATISTICS, sheet)

    runs = [path for path in (tmp_path / "wandb").rglob("*.wandb") if "latest-run" not in path.parts]
    names = [path.name for path in runs]
    assert names == [f"run-{wandb_id('5ignature')}.wandb"] * 2  # one id, so that `wandb sync` makes one run of them
    written = everything_below(tmp_path / "wandb")
    for public in (b"recovered/psnr/mean", b"a public remark", b"contact_sheet", b"5ignature"):
        assert public in written
    assert b"hunter2" not in written
    assert b"recovered/arcface_r50/mean" not in written  # undefined: no scalar, only a row of the table
    assert list((tmp_path / "wandb").rglob("*.png"))
    assert list((tmp_path / "wandb").rglob("*.table.json"))


# From end to end


@dataclass(frozen=True)
class Kept:
    """A tracker that keeps what it is given below `folder`; it fails if there is no such folder."""

    folder: str
    pictures: Pictures | None = None

    def __call__(self, signature, config, statistics, sheet) -> None:
        (Path(self.folder) / "signature").write_text(signature)
        (Path(self.folder) / "sheet").write_text(sheet.name if sheet else "none")


CHEAP = [
    "name=tiny", "anonymizer=pixelate", "parser=ellipse", "recognizers=[]", "scorers=[mae]", "attacks=[]", "limit=1",
]  # fmt: skip
KEPT = ["wandb._target_=tests.test_tracking.Kept", "+wandb.folder=kept"]


@pytest.mark.parametrize(
    ("asked", "bundled", "real"),
    [
        ([], "contact_sheet.png", "none"),
        (["+wandb.pictures=none"], "none", "none"),
        (["+wandb.pictures=anonymized"], "anonymized_sheet.png", "anonymized_sheet.png"),
        (["+wandb.pictures=all"], "contact_sheet.png", "contact_sheet.png"),
    ],
)
def test_no_real_face_leaves_the_machine_unless_asked(command_in_process, tmp_path, asked, bundled, real):
    (tmp_path / "kept").mkdir()
    faces = f"dataset.root={ROOT / 'keyanon' / 'assets' / 'faces'}"  # for all that a folder says, they may be anybody's
    for dataset, expected in ((["dataset=bundled"], bundled), (["dataset=folder", faces, "dataset.size=128"], real)):
        done = command_in_process(*CHEAP, *KEPT, *dataset, *asked)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "kept" / "sheet").read_text() == expected


def test_a_tracker_that_fails_costs_no_table(command_in_process, tmp_path):
    done = command_in_process("-m", *CHEAP, *KEPT, "anonymizer.filter.block=10,20")
    assert done.returncode == 0, done.stderr
    rows = pd.read_csv(tmp_path / "results/runs/tiny/tables/tiny.csv")["anonymizer"]
    assert set(rows) == {"pixelate,anonymizer.filter.block=10", "pixelate,anonymizer.filter.block=20"}
    [first, _] = [line for line in done.stdout.splitlines() if "not mirrored" in line]
    assert "FileNotFoundError" in first
    assert "start the same command again, or take wandb=off" in first


def test_a_row_of_any_characters_gets_to_wandb(command_in_process, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="the extra wandb is not installed")
    wandb.teardown()  # it reads its settings once a process
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path))
    roots = []
    for name in ("Anna, b:c#d", "e'f"):
        (tmp_path / name / "x").mkdir(parents=True)
        smooth_picture(len(roots)).save(tmp_path / name / "x" / "secret-name.png")
        roots.append(QuotedString(str(tmp_path / name / "x"), Quote.single).with_quotes())
    own = ["dataset=folder", "dataset.size=64", f"dataset.root={','.join(roots)}", "wandb=offline"]
    done = command_in_process("-m", *CHEAP, *own)
    assert done.returncode == 0, done.stderr
    assert "not mirrored" not in done.stdout + done.stderr
    assert pd.read_csv(tmp_path / "results/runs/tiny/tables/tiny.csv")["anonymizer"].nunique() == 2
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 2
    sent = b"".join(path.read_bytes() for path in (tmp_path / "wandb").rglob("run-*.wandb"))
    assert b"pixelate" in sent
    for private in (b"Anna", b"secret-name", b"contact_sheet"):
        assert private not in sent


def test_another_choice_of_pictures_is_refused():
    with pytest.raises(BadSetting, match=r"Wandb\.pictures='faces': expected one of none, anonymized, all"):
        Wandb("offline", "keyanon", "faces")


@pytest.mark.parametrize(
    "setting", ["dataset.root=alice_smith", "anonymizer.target=bob.png", "x.cache_dir=here", "a=/b"]
)
def test_a_row_tells_no_place_with_or_without_slashes(setting):
    assert (
        without_places(f"signflip,{setting},solver.steps=2")
        == f"signflip,{setting.partition('=')[0]}=...,solver.steps=2"
    )
