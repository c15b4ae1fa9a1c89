"""A face in clear is told from one that was treated."""

import io

import numpy as np
import PIL.Image
import pytest
import torch
from torchvision.transforms.functional import gaussian_blur

from keyanon.channel.pixels import from_pil, to_bytes
from keyanon.faces.datasets import bundled_faces
from keyanon.measures.clear import SAME_PICTURE, alike, in_clear

BOX = np.array([10.0, 0, 118, 128])


@pytest.fixture(scope="module")
def face() -> torch.Tensor:
    dataset = bundled_faces()
    return dataset.load(dataset.ids[0])


def as_jpeg(picture: torch.Tensor, quality: int) -> torch.Tensor:
    buffer = io.BytesIO()
    PIL.Image.fromarray(to_bytes(picture).permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=quality)
    return from_pil(PIL.Image.open(buffer))


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x,
        lambda x: 0.7 * x - 0.1,
        lambda x: as_jpeg(x, 50),
        lambda x: torch.cat([torch.full_like(x[:, :30], -1), x[:, 30:]], 1),  # a neighbour's bar over the forehead
    ],
    ids=["equal", "darker", "jpeg", "bar above"],
)
def test_what_nobody_treated_is_in_clear(face, view):
    assert alike(face, view(face), BOX) >= SAME_PICTURE
    assert in_clear(face, view(face), [BOX, BOX + 1]) == 1, "a face counts once"


@pytest.mark.parametrize(
    "view",
    [
        lambda x: torch.full_like(x, -1),
        lambda x: gaussian_blur(x, [15, 15], [3.0, 3.0]),
        lambda x: x.flip(2),
        lambda x: torch.cat([x[:, :40], torch.full_like(x[:, 40:64], -1), x[:, 64:]], 1),
    ],
    ids=["black", "blurred", "mirrored", "bar over the eyes"],
)
def test_what_was_treated_is_not(face, view):
    assert alike(face, view(face), BOX) < SAME_PICTURE
    assert in_clear(face, view(face), [BOX]) == 0


def test_a_face_at_the_border_and_an_empty_place():
    picture = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for box in ([-30, -30, 20, 20], [60, 60, 90, 90], [200, 200, 220, 220]):
        assert -1 <= alike(picture, picture, np.array(box, float)) <= 1.0001
    assert in_clear(picture, picture, []) == 0
