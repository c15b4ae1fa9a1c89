"""NaN and infinity end a run with picture, step and method; NaN as "cannot be measured" goes on."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from keyanon.attacks.views import WrongKey
from keyanon.channel.pixels import to_bytes
from keyanon.diffusion.model import LatentDiffusion
from keyanon.diffusion.solvers import DDIM
from keyanon.faces.datasets import Folder
from keyanon.faces.parsing import EllipseParser
from keyanon.finite import NotFinite, bounded, finite, within
from keyanon.methods.signflip import SignFlip
from keyanon.run_folder import RunFiles
from keyanon.runner import generate, observe, prepare
from keyanon.sources import Digests
from keyanon.types import Observed
from tests.conftest import smooth_picture
from tests.test_contract import IDS, KEY, composed, made, names
from tests.test_solvers import SCHEDULE, gaussian_eps

BAD = pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])


@BAD
def test_the_entry_is_named_and_whoever_knows_more_says_so(bad):
    values = torch.zeros(5, 2, 3)
    assert finite(values, "here") is values
    values[1, 0, 2] = values[4, 1, 1] = bad
    with pytest.raises(NotFinite, match=r"^here: NaN or infinity for picture 1 of its batch \(counted from 0\), 4 of"):
        finite(values, "here")
    with (
        pytest.raises(
            NotFinite, match=r"^M, step 3, here: NaN or infinity for picture b, c\. Remedy: .*weights"
        ) as found,
        within("M", ["a", "b", "c"]),  # filled up with c
        within("step 3", rows=torch.tensor([2, 1, 0, 3, 4])),
    ):
        finite(values, "here")
    assert found.value.rows == [1, 4]


def test_undefined_is_no_error_and_infinite_is(tmp_path):
    bounded(torch.tensor([1.0, torch.nan]), "a score")
    files = RunFiles(tmp_path, {"a": "1", "b": "2"})
    files.write_scores(["a", "b"], {("recovered", "psnr"): torch.tensor([1.0, torch.nan])})
    with pytest.raises(NotFinite, match="score psnr of the view recovered.*picture b"):
        files.write_scores(["a", "b"], {("recovered", "psnr"): torch.tensor([1.0, torch.inf])})


@BAD
def test_no_byte_stands_for_it(bad):
    images = torch.zeros(3, 3, 4, 4)
    images[2, 1, 0, 0] = bad
    with pytest.raises(NotFinite, match="pixels.*picture 2"):
        to_bytes(images)
    with pytest.raises(NotFinite):
        to_bytes(images[2])


@BAD
@pytest.mark.parametrize("way", ["inversion", "exact inversion", "sampling"])
def test_a_solver_names_picture_and_step_though_others_have_left_the_batch(bad, way):
    """The second picture's network fails at the third step; the others have no noise, and converge before it."""
    eps, z = gaussian_eps(torch.tensor(0.5), SCHEDULE), torch.ones(3, 1, 4, 4)
    z[1] *= -1
    exact = way == "exact inversion"
    solver = DDIM(5, tolerance=1e-6 if exact else None)
    failing = solver.timesteps(SCHEDULE)[2]

    def network(z: torch.Tensor, t: int) -> torch.Tensor:
        second = (z.amax((1, 2, 3)) < 0)[:, None, None, None]
        fails = t == failing and not (exact and len(z) == 3)
        return finite(torch.where(second, bad if fails else eps(z, t), 0), f"the network at timestep {t}")

    where = rf"{way.split()[-1]}, step 3 of 5, the network at timestep {failing}"
    with pytest.raises(NotFinite, match=where) as found:
        solver.sample(network, SCHEDULE, z) if way == "sampling" else solver.invert(network, SCHEDULE, z)
    assert found.value.rows == [1]


@pytest.fixture(scope="module")
def broken(tmp_path_factory, tiny_block_dct) -> Path:
    """The tiny model with one weight that is no number."""
    folder = tmp_path_factory.mktemp("broken") / "model"
    shutil.copytree(tiny_block_dct, folder)
    (file,) = (folder / "unet").glob("*.safetensors")
    weights = load_file(file)
    weights["conv_out.bias"][0] = torch.nan
    save_file(weights, file, {"format": "pt"})
    return folder


@pytest.mark.parametrize("name", names("anonymizer"))
def test_every_method_that_runs_the_backbone_stops(name, broken):
    cfg = composed(f"anonymizer={name}", "parser=ellipse", f"backbone.source={broken}", "+backbone.chunk=1")
    if cfg.anonymizer.get("backbone", {}).get("source") != str(broken):
        pytest.skip("does not run on this backbone")
    method, images = made(cfg.anonymizer), torch.zeros(3, 3, 64, 64)
    with pytest.raises(NotFinite, match=r"the denoising network at timestep \d+: NaN or infinity for picture 0 of"):
        method.anonymize(images, [KEY] * 3, IDS)
    images[1, 0, 5, 5] = torch.nan
    with pytest.raises(NotFinite, match=r"(pixels|the encoder): NaN or infinity for picture 1 of"):
        method.anonymize(images, [KEY] * 3, IDS)


def test_the_runner_names_ids_and_method_and_publishes_nothing(tmp_path, broken, tiny_block_dct, monkeypatch):
    monkeypatch.setattr(LatentDiffusion, "sha256", "one")  # or recovery would say that this is another model
    for i in range(3):
        smooth_picture(i).save(tmp_path / f"face{i}.png")
    dataset, contents = Folder(str(tmp_path), 64), {id: id for id in ("face0", "face1", "face2")}
    originals, run = RunFiles(tmp_path / "originals", contents), RunFiles(tmp_path / "run", contents)
    prepare(originals, contents, Digests(tmp_path / "contents"), dataset, dataset.ids, EllipseParser(), 2)
    method = SignFlip(LatentDiffusion(str(broken), chunk=1), DDIM(2), EllipseParser())
    with pytest.raises(NotFinite, match=r"^SignFlip, anonymize, inversion, step 1 of 2, .* picture face0, face1\."):
        generate(run, originals, dataset.ids, method, KEY, {}, 2)
    assert run.ids("anonymized") == []
    whole = SignFlip(LatentDiffusion(str(tiny_block_dct), chunk=1), DDIM(2), EllipseParser())
    generate(run, originals, dataset.ids, whole, KEY, {}, 2)
    for path in (tmp_path / "run" / "recovered").glob("*.png"):
        path.unlink()
    with pytest.raises(NotFinite, match=r"^SignFlip, recover, inversion, .* picture face0, face1\."):
        generate(run, originals, dataset.ids, method, KEY, {"wrong_key": WrongKey()}, 2)
    assert run.ids("recovered") == []

    def observer(ids, images, _):
        images = images.clone()
        images[1] = torch.nan
        return Observed({("view", "scorer"): finite(images, "the decoder")})

    with pytest.raises(NotFinite, match=r"^reading, the decoder: .*picture face1\."):
        observe(RunFiles(tmp_path / "observed", contents), originals, dataset.ids, observer, 2, "reading")
