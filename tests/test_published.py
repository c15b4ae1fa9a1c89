"""Files that earlier versions published are recovered by this one. The face is the bundled one `0000`, synthetic."""

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from keyanon.channel.keys import Recipe, experiment_key
from keyanon.channel.pixels import read_png
from keyanon.faces.datasets import bundled_faces
from keyanon.measures.scorers import psnr
from keyanon.types import Published
from tests.conftest import ROOT

PUBLISHED = Path(__file__).with_name("published")
PASSWORD = "everyone may know this password"
RECIPES = {"v2": Recipe(bytes(range(16)), 1, 64, 1), "v3": Recipe(bytes(range(16)))}
# dB to the original when the files were published, on one machine; another one rounds a little differently
RECOVERED = {
    "v2": {
        "signflip": 19.4,
        "noise_flip": 28.4,
        "exact": 46.6,
        "scrambling": 58.9,
        "encrypted_crop": 58.9,
        "proface_s": 33.0,
    },
    "v3": {
        "signflip": 17.1,
        "noise_flip": 27.9,
        "exact": 45.7,
        "scrambling": 58.9,
        "encrypted_crop": 58.9,
        "proface_s": 33.0,
    },
}


@pytest.mark.parametrize(
    ("version", "method"), [(version, name) for version, files in RECOVERED.items() for name in files]
)
def test_a_file_of_an_earlier_version_is_recovered(version: str, method: str):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        overrides = [f"anonymizer={method}", "+backbone.chunk=1"]  # one picture needs no copies beside it
        anonymizer = instantiate(compose("config", overrides=overrides).anonymizer, _convert_="all")
    pixels, header = read_png(PUBLISHED / version / f"{method}.png")
    assert header[2] == int(version[1:])
    key = RECIPES[version].derive(PASSWORD) if method == "exact" else experiment_key(0)
    recovered = anonymizer.recover(Published(pixels[None], (header,)), [key])
    original = bundled_faces().load("0000")[None]
    everywhere = torch.ones_like(original[:, :1], dtype=torch.bool)
    assert psnr(recovered.clamp(-1, 1), original, everywhere).item() == pytest.approx(
        RECOVERED[version][method], abs=0.3
    )
