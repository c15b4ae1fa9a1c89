import pytest
import torch

from keyanon.channel.headers import BadHeader
from keyanon.methods.residuals import coded, decoded


@pytest.fixture
def mask() -> torch.Tensor:
    mask = torch.zeros(2, 1, 6, 6, dtype=torch.bool)
    mask[0, 0, 1:4, 2:5] = True
    mask[1, 0, 2:, 1:] = True
    return mask


def test_errors_come_back_to_half_a_step_and_nothing_outside_the_face(mask):
    error = 0.1 * torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    codes = coded(error, mask, 0.01)
    back = decoded(codes, mask, error, 0.01)
    assert ((back - error)[mask.expand_as(error)].abs() <= 0.005 + 1e-6).all()
    assert (back[~mask.expand_as(error)] == 0).all()
    assert len(codes[0]) < len(codes[1])  # 36 numbers, 80 numbers


def test_what_does_not_fit_is_refused(mask):
    error = torch.zeros(2, 4, 6, 6)
    codes = coded(error, mask, 0.01)
    bomb = coded(torch.zeros(1, 4, 200, 200), torch.ones(1, 1, 200, 200, dtype=torch.bool), 0.01)[0]
    for bad in (codes[::-1], [b"", codes[1]], [codes[0], b"not zlib"], [bomb, codes[1]], [codes[0], codes[1][:-6]]):
        with pytest.raises(BadHeader, match="residual does not fit"):
            decoded(bad, mask, error, 0.01)
