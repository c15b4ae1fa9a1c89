import pytest
import torch

from keyanon.channel.headers import BadHeader
from keyanon.methods.seams import FADE, LEVEL, Seam, edges

SIZE = 8


@pytest.fixture
def cells() -> torch.Tensor:
    mask = torch.zeros(1, 1, 6, 6, dtype=torch.bool)
    mask[0, 0, 2:4, 1:5] = True
    return mask


def test_edges_are_the_sides_between_face_and_background(cells):
    assert len(edges(cells[0, 0])) == 2 * (2 + 4)
    assert edges(torch.ones(3, 3, dtype=torch.bool)) == []  # nothing is known beyond the picture's border
    assert edges(torch.tensor([[True, False]])) == [(0, 0, 0, 1)]


def test_a_constant_jump_is_closed_at_the_border_and_fades_inside(cells):
    mask = torch.zeros(1, 1, 6 * 4, 6 * 4, dtype=torch.bool)
    mask[..., 2:22, 2:22] = True
    images, decoded = torch.full((1, 3, 24 * SIZE, 24 * SIZE), 0.5), torch.full((1, 3, 24 * SIZE, 24 * SIZE), 0.25)
    seam = Seam(1.0)
    codes = seam.jumps(images, decoded, mask)
    added = seam.membrane(codes, mask, images)
    # Along a straight border the sum of Gaussians one cell apart, of one cell's deviation, is sqrt(2 pi).
    at_border = 0.25 * 2.5066 / (2.5066 + FADE)
    assert added[0, 0, 2 * SIZE, 12 * SIZE].item() == pytest.approx(at_border, abs=0.003)
    assert added[0, 0, 12 * SIZE, 12 * SIZE].abs() < 1e-6
    assert added.shape == images.shape


def test_codes_keep_jumps_to_half_a_level(cells):
    generator = torch.Generator().manual_seed(0)
    images, decoded = torch.rand(2, 1, 3, 6 * SIZE, 6 * SIZE, generator=generator)
    code = Seam().jumps(images, decoded, cells)[0]
    first = edges(cells[0, 0])[0]
    assert first == (2, 1, 0, -1)
    jump = images[0, :, 2 * SIZE : 3 * SIZE, SIZE - 1].mean(1) - decoded[0, :, 2 * SIZE : 3 * SIZE, SIZE].mean(1)
    read = torch.frombuffer(bytearray(code[:3]), dtype=torch.int8) * LEVEL
    assert (read - jump).abs().max() <= LEVEL / 2 + 1e-6


def test_a_face_without_border_has_no_membrane():
    whole = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    picture = torch.zeros(1, 3, 16, 16)
    assert Seam().jumps(picture, picture + 1, whole) == [b""]
    assert torch.equal(Seam().membrane([b""], whole, picture), picture)


def test_codes_of_another_border_are_refused(cells):
    with pytest.raises(BadHeader, match="35 bytes for the face's border, 36 are expected"):
        Seam().membrane([bytes(35)], cells, torch.zeros(1, 3, 48, 48))
