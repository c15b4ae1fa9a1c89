"""Statistics of known distributions, inversion with the closed-form denoiser, and the experiment from pictures to its table."""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir
from scipy import stats
from torch import Tensor

from experiments.gaussianity import CONTROL, FACE, WHOLE, noise_statistics, run
from experiments.harness import results
from keyanon.diffusion.solvers import DDIM, NoiseSchedule
from keyanon.errors import UserError
from keyanon.faces.parsing import EllipseParser
from keyanon.measures.gaussianity import (
    MEASURES,
    generator_of,
    kl_gaussian_fit,
    kl_knn,
    measure,
    mmd2,
    neighbour_correlation,
    patches,
)
from keyanon.types import Source
from tests.conftest import ROOT, smooth_picture
from tests.test_solvers import SCHEDULE, gaussian_eps

SHAPE = (8, 32, 32)
EVERYWHERE = np.ones(SHAPE[1:], dtype=bool)
N = EVERYWHERE.size * SHAPE[0]
TOLERANCES = {"naive": None, "exact": 1e-9}


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def numbers(z, inside=EVERYWHERE) -> dict[str, float]:
    return measure(z, inside, rng(99))


# One latent


def test_normal_noise_looks_normal():
    found = numbers(rng().standard_normal(SHAPE))
    assert list(found) == list(MEASURES)
    assert found["ks_d"] < stats.kstwo.ppf(0.999, N)
    assert found["ks_passed"] == 1
    bounds = {
        "mean": (0, 1),
        "variance": (1, 2),
        "skewness": (0, 6),
        "excess_kurtosis": (0, 24),
    }  # law of large numbers
    for name, (truth, spread) in bounds.items():
        assert found[name] == pytest.approx(truth, abs=4 * (spread / N) ** 0.5), name
    assert abs(found["neighbour_correlation"]) < 4 / (2 * N) ** 0.5
    assert abs(found["mmd2"]) < 4e-4
    assert found["kl_gaussian_fit"] < 8 / N  # 2 N times it is chi-squared with two degrees of freedom
    assert abs(found["kl_knn"]) < 0.1


@pytest.mark.parametrize(
    ("draw", "truths", "largest_gap"),
    [
        # |F - Phi| of unit variance laws is largest at: laplace x = 0.5, uniform x = sqrt(3)
        (lambda g: g.laplace(scale=0.5**0.5, size=SHAPE), {"excess_kurtosis": (3, 0.6), "variance": (1, 0.06)}, None),
        (lambda g: g.uniform(-(3**0.5), 3**0.5, SHAPE), {"excess_kurtosis": (-1.2, 0.05), "variance": (1, 0.03)}, None),
        (lambda g: 2 * g.standard_normal(SHAPE), {"excess_kurtosis": (0, 0.25), "variance": (4, 0.2)}, 0.1613),
        (lambda g: g.standard_normal(SHAPE) + 0.5, {"mean": (0.5, 0.05), "skewness": (0, 0.12)}, 0.1974),
        (lambda g: g.exponential(size=SHAPE) - 1, {"skewness": (2, 0.3), "excess_kurtosis": (6, 3)}, None),
    ],
    ids=["laplace", "uniform", "twice", "shifted", "exponential"],
)
def test_other_noise_does_not(draw, truths, largest_gap):
    found = numbers(draw(rng(1)))
    for name, (truth, near) in truths.items():
        assert found[name] == pytest.approx(truth, abs=near), name
    assert found["ks_passed"] == 0
    assert found["mmd2"] > 6e-4
    assert found["kl_knn"] > 0.05
    if largest_gap is not None:  # Phi(x) - Phi(x / 2) at its maximum; 2 Phi(1/4) - 1
        assert found["ks_d"] == pytest.approx(largest_gap, abs=2 / N**0.5)


def test_ks_is_the_largest_gap_of_the_distribution_functions():
    z = rng(2).standard_normal((1, 6, 6)) + 0.3
    x = np.sort(z.ravel())
    truth, i = stats.norm.cdf(x), np.arange(x.size)
    expected = max((truth - i / x.size).max(), ((i + 1) / x.size - truth).max())
    assert numbers(z, np.ones((6, 6), dtype=bool))["ks_d"] == pytest.approx(expected, abs=1e-12)


def test_only_cells_inside_count():
    inside = EVERYWHERE.copy()
    inside[:, 16:] = False
    z = rng(3).standard_normal(SHAPE)
    loud = np.where(inside, z, 1000.0)
    assert numbers(z, inside) == numbers(loud, inside)
    assert numbers(z, inside) != numbers(z)


@pytest.mark.parametrize("cells", [0, 1, 3])
def test_too_small_a_face_is_undefined(cells):
    inside = np.zeros_like(EVERYWHERE)
    inside[0, :cells] = True
    found = numbers(rng().standard_normal(SHAPE), inside)
    assert list(found) == list(MEASURES)
    assert np.isnan(list(found.values())).all()


def test_neighbour_correlation_of_a_moving_average():
    """Noise averaged over k x k cells correlates (k - 1) / k with its neighbour; the sign of channels does not matter."""
    z = rng(4).standard_normal((4, 129, 129))
    averaged = z[:, 1:, 1:] + z[:, :-1, 1:] + z[:, 1:, :-1] + z[:, :-1, :-1]
    everywhere = np.ones((128, 128), dtype=bool)
    assert neighbour_correlation(averaged, everywhere) == pytest.approx(0.5, abs=0.02)
    assert neighbour_correlation(averaged * [[[-1]], [[2]], [[3]], [[-4]]] + 7, everywhere) == pytest.approx(
        0.5, abs=0.02
    )
    chess = np.indices((128, 128)).sum(0) % 2 * 2.0 - 1
    assert neighbour_correlation(chess[None], everywhere) == pytest.approx(-1)


def test_neighbours_are_not_searched_across_the_edge_of_the_face():
    inside = EVERYWHERE.copy()
    inside[:, 1::4] = False
    z = np.broadcast_to(rng(5).standard_normal((1, 1, 32)), (1, 32, 32)) * inside
    pairs = [(a, a) for a in range(32) if inside[0, a]] * 31
    pairs += [(a, a + 1) for a in range(31) if inside[0, a] and inside[0, a + 1]] * 32
    first, second = (z[0, 0, [pair[side] for pair in pairs]] for side in (0, 1))
    assert neighbour_correlation(z, inside) == pytest.approx(np.corrcoef(first, second)[0, 1])


def test_patches_tile_the_face():
    z = np.arange(2 * 4 * 5, dtype=float).reshape(2, 4, 5)  # the fifth column fits no patch
    inside = np.ones((4, 5), dtype=bool)
    inside[0, 2] = False  # nor does the patch at the top right
    corners = [(0, 0), (2, 0), (2, 2)]
    expected = [z[c, u : u + 2, v : v + 2].ravel() for c in range(2) for u, v in corners]
    np.testing.assert_array_equal(patches(z, inside), expected)


# Maximum mean discrepancy


def test_mmd2_equals_the_double_loop():
    x, y = rng(6).standard_normal((7, 3)), rng(7).standard_normal((5, 3)) + 1
    both = [*x, *y]
    distances = [((a - b) ** 2).sum() ** 0.5 for i, a in enumerate(both) for b in both[:i]]
    squares = np.sort(np.square(distances))
    width = np.median(squares)

    def kernel(a, b):
        return np.exp(-((a - b) ** 2).sum() / (2 * width))

    same_x = sum(kernel(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j) / (7 * 6)
    same_y = sum(kernel(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j) / (5 * 4)
    across = sum(kernel(a, b) for a in x for b in y) / (7 * 5)
    assert mmd2(x, y) == pytest.approx(same_x + same_y - 2 * across, abs=1e-12)
    assert mmd2(x, y) == pytest.approx(mmd2(y, x), abs=1e-12)


def test_mmd2_is_unbiased_under_the_same_law():
    generator = rng(8)
    values = [mmd2(*generator.standard_normal((2, 60, 4))) for _ in range(300)]
    assert abs(np.mean(values)) < 4 * np.std(values) / 300**0.5
    assert min(values) < 0


def test_mmd2_grows_with_a_shift_and_with_correlation():
    x, y = rng(9).standard_normal((2, 800, 4))
    shifted = [mmd2(x + shift, y) for shift in (0, 0.25, 0.5, 1)]
    assert all(far - near > 0.003 for near, far in pairwise(shifted))
    mixed = [mmd2(np.sqrt(1 - r) * x + np.sqrt(r) * x[:, :1], y) for r in (0, 0.3, 0.9)]
    assert all(more - less > 0.001 for less, more in pairwise(mixed))


# Kullback-Leibler divergence


@pytest.mark.parametrize(("mean", "deviation"), [(0, 1), (0.5, 1), (0, 2), (-1, 0.5), (0, 5)])
@pytest.mark.parametrize("d", [1, 4])
def test_kl_of_a_normal_law_is_known(mean, deviation, d):
    truth = (deviation**2 + mean**2 - 1) / 2 - np.log(deviation)
    x = mean + deviation * rng(10).standard_normal((20_000, d))
    near = 0.02 + 0.04 * truth
    assert kl_gaussian_fit(x.ravel()) == pytest.approx(truth, abs=near)
    assert kl_knn(x) == pytest.approx(d * truth, abs=d * near + 0.05 * (d > 1))


def test_kl_by_neighbours_sees_what_a_gaussian_fit_does_not():
    """A uniform law of variance 1 differs from N(0, 1) by log(2 pi e / 12) / 2, and so do correlated entries from free ones."""
    uniform = rng(13).uniform(-(3**0.5), 3**0.5, (20_000, 1))
    assert kl_gaussian_fit(uniform.ravel()) < 1e-3
    assert kl_knn(uniform) == pytest.approx(np.log(2 * np.pi * np.e / 12) / 2, abs=0.03)
    x = rng(15).standard_normal((20_000, 2))
    mixed = np.stack([x[:, 0], 0.8 * x[:, 0] + 0.6 * x[:, 1]], axis=1)
    assert kl_gaussian_fit(mixed.ravel()) < 1e-3
    assert kl_knn(mixed) == pytest.approx(-np.log(1 - 0.8**2) / 2, abs=0.03)


def test_kl_by_neighbours_has_the_entropy_of_scipy():
    x = rng(16).laplace(size=5000)
    entropy = 0.5 * np.log(2 * np.pi) + np.square(x).mean() / 2 - kl_knn(x[:, None])
    assert entropy == pytest.approx(stats.differential_entropy(x), abs=0.05)
    assert entropy == pytest.approx(1 + np.log(2), abs=0.05)


def test_kl_by_neighbours_equals_the_double_loop():
    x, k = rng(17).standard_normal((9, 2)), 2
    distances = [sorted(np.linalg.norm(a - b) for j, b in enumerate(x) if j != i)[k - 1] for i, a in enumerate(x)]
    psi = sum(1 / i for i in range(k, 9))  # psi(9) - psi(2); the unit disc is pi
    entropy = psi + np.log(np.pi) + 2 * np.mean(np.log(distances))
    assert kl_knn(x, k) == pytest.approx(np.log(2 * np.pi) + np.square(x).sum(1).mean() / 2 - entropy, abs=1e-12)


def test_kl_by_neighbours_is_near_zero_under_the_same_law():
    values = [kl_knn(x) for x in rng(18).standard_normal((100, 1000, 4))]
    assert np.mean(values) == pytest.approx(0, abs=0.08)
    assert min(values) < np.mean(values) < max(values) < 0.25
    assert np.isfinite(kl_knn(np.zeros((9, 4))))  # equal points


# Inversion


@dataclass(frozen=True)
class GaussianModel:
    """Pictures are their own latents, independent N(0, variance) entries, and the denoiser is the exact one."""

    variance: float = 0.5
    schedule: NoiseSchedule = SCHEDULE

    def latent_size(self, images: Tensor) -> tuple[int, int]:
        return (images.shape[2], images.shape[3])

    def encode(self, images: Tensor) -> Tensor:
        return images

    def eps(self, z: Tensor, t: int) -> Tensor:
        return gaussian_eps(torch.tensor(self.variance).to(z), self.schedule)(z, t)


@dataclass(frozen=True)
class GaussianPictures:
    variance: float = 0.5
    ids: tuple[str, ...] = ("a", "b", "c")
    gallery: tuple[str, ...] = ()

    def identity(self, id: str) -> None:
        return None

    def source(self, id: str) -> Source:
        return Source(Path(__file__))  # which draws the pictures

    def load(self, id: str) -> Tensor:
        return torch.from_numpy(self.variance**0.5 * generator_of(id, "picture").standard_normal((3, 40, 40)))


@pytest.fixture(scope="module")
def gaussian_data() -> pd.DataFrame:
    """Means of each row and measure, by tolerance and number of steps."""
    solvers = {f"{name} {n}": DDIM(n, tolerance=tol) for name, tol in TOLERANCES.items() for n in (10, 50, 200)}
    data, parser = GaussianPictures(), EllipseParser()
    ids = list(data.ids)
    pictures = torch.stack([data.load(id) for id in ids])
    everywhere = torch.ones(3, 1, 40, 40, dtype=torch.bool)
    means = {}
    for row, solver in {CONTROL: None, **solvers}.items():
        values = noise_statistics(GaussianModel(), parser, solver)(ids, pictures, everywhere).values
        assert len(values) == 2 * len(MEASURES) + (solver is not None)
        means |= {(row, *place): one.double().mean().item() for place, one in values.items()}
    return pd.Series(means)


@pytest.mark.parametrize("name", TOLERANCES)
@pytest.mark.parametrize("view", [WHOLE, FACE])
def test_gaussian_data_inverts_to_standard_normal_noise_as_the_steps_grow(gaussian_data, name, view):
    """Few steps inflate the variance even with the exact denoiser, and since its flow is linear, nothing but the variance."""
    few, more, many = (
        {scorer: gaussian_data[f"{name} {n}", view, scorer] for scorer in MEASURES} for n in (10, 50, 200)
    )
    assert few["variance"] > more["variance"] + 0.05 > many["variance"] + 0.08
    assert many["variance"] == pytest.approx(1, abs=0.06)
    if name == "exact":
        assert few["ks_passed"] == 0
        assert few["ks_d"] > 2 * many["ks_d"]
    for scorer in ("excess_kurtosis", "skewness", "neighbour_correlation"):
        assert few[scorer] == pytest.approx(many[scorer], abs=1e-6)
        assert many[scorer] == pytest.approx(0, abs=4 * (24 / (3 * 4800)) ** 0.5 * (2 if view == FACE else 1))


def test_only_exact_inversion_comes_back(gaussian_data):
    assert gaussian_data["exact 10", WHOLE, "round_trip"] < 1e-7
    assert gaussian_data["naive 10", WHOLE, "round_trip"] > 0.05 > gaussian_data["naive 200", WHOLE, "round_trip"]


def test_the_control_is_normal(gaussian_data):
    for view in (WHOLE, FACE):
        assert gaussian_data[CONTROL, view, "variance"] == pytest.approx(1, abs=0.04)
        assert gaussian_data[CONTROL, view, "mmd2"] == pytest.approx(0, abs=1e-3)


# The experiment


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for i in range(3):
        smooth_picture(i).save(tmp_path / f"face{i}.png")
    (tmp_path / "broken.jpg").write_text("this is not a picture")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def in_process(faces: Path, model: Path, *more: str) -> pd.DataFrame:
    overrides = [
        "dataset=folder", f"dataset.root={faces}", "dataset.rename=null",
        "dataset.size=64", "backbone=ldm_ffhq", f"backbone.source={model}",
        "backbone.subfolder=''", "parser=ellipse", "inversions.naive.steps=[2,4]", "inversions.exact.steps=[4]",
        "name=tiny", *more,
    ]  # fmt: skip
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("gaussianity", overrides=overrides)
    run(cfg, {"dataset": "folder", "protocol": "ours", "backbone": "ldm_ffhq", "parser": "ellipse"})
    return pd.read_csv("results/runs/tiny/tables/tiny.csv")


def test_from_pictures_to_a_table(in_folder, tiny_ldm):
    table = in_process(in_folder, tiny_ldm, "notes=[random weights]")
    rows = ["naive inversion,   2 steps", "naive inversion,   4 steps", "exact inversion,   4 steps"]
    assert set(table.anonymizer) == {*rows, CONTROL}
    assert set(table.view) == {WHOLE, FACE}
    assert (table.n == 3).all()
    assert (table.undefined == 0).all()
    ours = table[table.statistic == "mean"].set_index(["scorer", "view", "anonymizer"]).ours.sort_index()
    assert set(ours["round_trip", WHOLE].index) == set(rows)
    assert not ours["round_trip", WHOLE].isna().any()
    assert ours["variance", WHOLE, CONTROL] == pytest.approx(1, abs=0.2)

    markdown = (in_folder / "results" / "runs" / "tiny" / "tables" / "tiny.md").read_text()
    assert "Not declared" not in markdown
    assert "## folder: random weights; backbone ldm_ffhq; mask from ellipse; mmd2 and kl_knn of 2 x 2" in markdown
    assert "### Inverted noise: measures of the noise, mean" in markdown
    assert "bundled model" not in markdown
    (in_folder / "results" / "runs" / "tiny" / "tables" / "tiny.md").unlink()
    results.build("tiny", results=Path("results/runs/tiny"))
    assert (in_folder / "results" / "runs" / "tiny" / "tables" / "tiny.md").read_text() == markdown


def test_numbers_do_not_depend_on_the_other_pictures(in_folder, tiny_ldm):
    def scores(*overrides: str) -> pd.DataFrame:
        in_process(in_folder, tiny_ldm, "inversions.exact.steps=[]", *overrides)
        frame = pd.read_parquet("results/runs/tiny/scores/tiny.scores.parquet")
        assert list(frame.columns) == results.SCORES
        return frame.set_index(["anonymizer", "view", "scorer", "id"]).value.sort_index()

    whole = scores("batch_size=2")
    first = scores("batch_size=2", "limit=2")  # the unreadable one, and a picture on its own
    assert set(first.index.get_level_values("id")) == {"face0"}
    pd.testing.assert_series_equal(first, whole[first.index], check_exact=True)
    pd.testing.assert_series_equal(scores("batch_size=7"), whole, rtol=1e-4, atol=1e-5)


def test_no_readable_picture_is_said(in_folder, tiny_ldm):
    for path in in_folder.glob("*.png"):
        path.unlink()
    with pytest.raises(UserError, match="none of the 1 pictures could be used; the first, broken"):
        in_process(in_folder, tiny_ldm)


def test_missing_parts_are_listed_before_any_work(in_folder, capsys):
    with pytest.raises(SystemExit, match="2"):
        in_process(in_folder / "nowhere", in_folder / "no_model")
    printed = capsys.readouterr().err
    assert "nowhere" in printed
    assert "no_model" in printed


def test_default_composes_and_names_its_rows():
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("gaussianity")
    assert cfg.backbone.source.startswith("bundled:")
    assert {name: one.tolerance for name, one in cfg.inversions.items()} == {"naive": None, "exact": 1e-5}
