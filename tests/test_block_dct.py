import importlib

import numpy as np
import pytest
import torch
from scipy.fft import dctn

from keyanon.diffusion.block_dct import BlockDCT, block_dct_filters, ycc_rotation


def test_filters_are_orthonormal():
    filters = block_dct_filters(15, 3).flatten(1)
    torch.testing.assert_close(filters @ filters.T, torch.eye(21, dtype=torch.float64))


def test_coefficients_equal_scipys_dct():
    pixels = torch.rand(1, 3, 8, 8, dtype=torch.float64)
    plane = torch.einsum("pc,chw->phw", ycc_rotation(), pixels[0]).numpy()
    expected = dctn(plane[0], norm="ortho")
    z = BlockDCT(luma=64, chroma=1).encode(pixels)[0, :, 0, 0].numpy()
    assert np.allclose(np.sort(z[:64]), np.sort(expected.ravel()))
    assert z[0] == pytest.approx(expected[0, 0])


def test_all_coefficients_give_the_picture_back():
    pixels = torch.rand(2, 3, 16, 24) * 2 - 1
    latent = BlockDCT(luma=64, chroma=64)
    torch.testing.assert_close(latent.decode(latent.encode(pixels)), pixels, atol=1e-5, rtol=0)


def test_every_latent_comes_back_from_its_picture():
    latent = BlockDCT(10, 3, mean=[1.0] * 16, std=[0.5] * 16)
    z = torch.randn(2, 16, 3, 4)
    torch.testing.assert_close(latent.encode(latent.decode(z)), z, atol=1e-5, rtol=0)


def test_grey_pictures_have_no_colour_coefficients():
    grey = torch.rand(1, 1, 8, 8).expand(1, 3, 8, 8)
    assert BlockDCT(10, 3).encode(grey)[:, 10:].abs().max() < 1e-6


def test_wrong_statistics_are_refused():
    with pytest.raises(ValueError, match="mean has 3 values for 16 channels"):
        BlockDCT(10, 3, mean=[0.0] * 3)


def test_earlier_models_find_it_under_its_old_name():
    """Their model_index.json names the module keyanon.block_dct."""
    assert importlib.import_module("keyanon.block_dct").BlockDCT is BlockDCT
