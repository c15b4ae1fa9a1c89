"""The paper's Table 1, whole, on tiny components saved in exactly the layouts of the real ones."""

import shutil
from dataclasses import replace
from hashlib import file_digest
from pathlib import Path

import pandas as pd
import PIL.Image
import pytest
import torch
from hydra import compose, initialize_config_dir

from experiments.run import run
from keyanon import weights
from keyanon.faces.datasets import read_list
from tests.conftest import ROOT, save_tiny_ldm
from tests.test_backbones import save_tiny_face_transformer, save_tiny_iresnet
from tests.test_parsing import colour_parser

CHOICES = {
    "dataset": "celebahq", "protocol": "ours",
    "anonymizer": "signflip", "backbone": "ldm_ffhq", "parser": "bisenet", "key": "experiment",
    "nonce": "per_image",
}  # fmt: skip


def install(monkeypatch: pytest.MonkeyPatch, name: str, file: Path) -> None:
    """Put a stand-in into the weights' cache under the card's own file name, and its digest into the card."""
    card = weights.CARDS[name]
    place = weights.cache() / card.name / card.filename
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(file, place)
    with place.open("rb") as opened:
        digest = file_digest(opened, "sha256").hexdigest()
    monkeypatch.setitem(weights.CARDS, name, replace(card, sha256=digest))


@pytest.fixture
def everything(tmp_path, monkeypatch) -> Path:
    """LDM-FFHQ's repository, CelebAMask-HQ, the weights of the paper's four recognizers and the BiSeNet parser."""
    from facenet_pytorch import InceptionResnetV1
    from skimage.data import astronaut

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KEYANON_CACHE", str(tmp_path / "cache"))
    save_tiny_ldm(tmp_path / "repository" / "ffhq-diffusers")
    folder = tmp_path / "CelebAMask-HQ" / "CelebA-HQ-img"
    folder.mkdir(parents=True)
    face = PIL.Image.fromarray(astronaut()).crop((110, 10, 350, 250))
    for i in range(3):
        face.rotate(3 * i).resize((300, 300)).save(folder / f"{i}.jpg")
    torch.manual_seed(0)
    for name in ("facenet_vggface2", "facenet_casia"):
        state = InceptionResnetV1(pretrained=None).state_dict() | {"logits.weight": torch.zeros(5, 512)}
        torch.save(state, tmp_path / "facenet.pt")
        install(monkeypatch, name, tmp_path / "facenet.pt")
    for name, make in (
        ("arcface_r50", save_tiny_iresnet),
        ("adaface_vit", save_tiny_face_transformer),
        ("bisenet", colour_parser),
    ):
        make(tmp_path / "tiny")
        install(monkeypatch, name, tmp_path / "tiny")
    (tmp_path / "order").write_text(str([f"{name}.jpg" for name in read_list("celebahq")]))
    install(monkeypatch, "celebahq_order", tmp_path / "order")
    return tmp_path


@pytest.mark.slow
def test_table1_runs_through_to_its_table(everything):
    overrides = [
        "experiment=table1", f"dataset.root={everything / 'CelebAMask-HQ'}", "dataset.size=64",
        f"backbone.source={everything / 'repository'}", "solver.steps=2", "batch_size=3", "limit=3",
        "notes=[tiny components with random weights]",
    ]  # fmt: skip
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        folder = run(compose("config", overrides=overrides), CHOICES)
    table = pd.read_csv("results/runs/table1/tables/table1.csv")
    views = {"original", "reconstructed", "anonymized", "recovered", "recovered_float", "wrong_key", "near_key"}
    assert set(table["view"]) == views
    assert {"facenet_vggface2", "facenet_casia", "arcface_r50", "adaface_vit", "psnr", "detected"} <= set(
        table["scorer"]
    )
    clean = table[(table["view"] == "original") & (table["statistic"] == "mean")].set_index("scorer")["ours"]
    assert clean["facenet_vggface2"] == pytest.approx(1)
    assert clean["arcface_r50"] == pytest.approx(1)
    assert clean["adaface_vit"] == pytest.approx(1)
    run_here = table[table["verdict"] != "not-run"]  # the paper's other cells stand beside
    assert (run_here["n"] + run_here["undefined"])[run_here["statistic"] == "mean"].eq(3).all()
    assert "tiny components with random weights" in Path("results/runs/table1/tables/table1.md").read_text()
    assert pd.read_csv(folder / "skipped.csv").empty
