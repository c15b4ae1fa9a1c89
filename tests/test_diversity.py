from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from experiments.diversity import between_keys, embeddings_under_keys, statistics_of, strangers
from experiments.harness import settings
from experiments.harness.made import made
from keyanon.channel.keys import experiment_key
from keyanon.diffusion.controlnet import MaskControl
from keyanon.diffusion.solvers import DDIM
from keyanon.errors import UserError
from keyanon.methods.exact import Exact
from keyanon.types import Published
from tests.conftest import ROOT


def unit(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal(shape)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def measured(versions: np.ndarray, clean: np.ndarray) -> dict[str, float]:
    people = [str(i) for i in range(clean.shape[1])]
    return {one.statistic: one.value for one in statistics_of(versions, clean[0], people)}


def test_keys_that_change_nothing():
    clean = unit((1, 200, 64))
    found = measured(np.repeat(clean, 3, axis=0), clean)
    assert found["cosine_between_keys"] == pytest.approx(1)
    # cosines of strangers on the sphere of 64 dimensions have mean 0 and variance 1/64
    assert found["w2_squared"] == pytest.approx(1 + 1 / 64, abs=0.01)
    assert found["frechet"] == pytest.approx(0, abs=0.02)


def test_keys_that_make_strangers():
    found = measured(unit((4, 200, 64), 1), unit((1, 200, 64)))
    assert found["cosine_between_keys"] == pytest.approx(0, abs=0.02)
    assert found["w2_squared"] == pytest.approx(0, abs=1e-3)


def test_pairs_of_keys_and_of_strangers():
    assert between_keys(unit((4, 5, 8))).shape == (6, 5)
    clean = np.stack([unit((8,), 0)] * 2 + [unit((8,), 1)] * 2)
    assert (strangers(clean, ["a", "a", "b", "b"]) < 0.999).all()


def test_every_key_gets_its_embedding():
    def anonymize(images, keys, ids):
        shade = torch.tensor([key.secret[0] for key in keys], dtype=torch.uint8)
        return Published(shade[:, None, None, None].expand(-1, 3, 4, 4), (b"",) * len(ids))

    recognizer = SimpleNamespace(embed=lambda images: images.mean((2, 3)))
    measure = embeddings_under_keys(SimpleNamespace(anonymize=anonymize), {"r": recognizer}, 3)
    found = measure(["a", "b"], torch.zeros(3, 3, 4, 4), torch.ones(3, 1, 4, 4, dtype=torch.bool)).vectors
    shades = [experiment_key(seed).secret[0] / 127.5 - 1 for seed in range(3)]
    assert [found[str(seed), "r"][1, 0].item() for seed in range(3)] == pytest.approx(shades, abs=1e-6)


def test_default_compares_the_papers_method_with_the_exact_one():
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("diversity")
        methods = instantiate(cfg.methods, _convert_="all")
        assert methods["signflip"].solver == DDIM(50)
        assert isinstance(methods["exact"], Exact)
        assert methods["exact"].solver.tolerance is not None
        with pytest.raises(UserError, match="keys_per_picture=1"):
            settings.check(compose("diversity", overrides=["keys_per_picture=1"]))


def test_the_paper_s_experiment_has_its_variant_and_a_method_can_be_left_out():
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("diversity", overrides=["experiment=diversity"])
        settings.check(cfg)
        assert (cfg.keys_per_picture, cfg.limit, cfg.dataset.size) == (10, 1000, 256)
        methods = made(cfg, "methods")
        assert [name for name, method in methods.items() if method is not None] == ["signflip_controlnet"]
        assert methods["signflip_controlnet"].control == MaskControl(inversion=True)
        assert made(compose("diversity", overrides=["methods.exact=null"]), "methods")["exact"] is None
