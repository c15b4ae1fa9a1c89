import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from keyanon.headers import BadHeader, Header

NONCES = st.binary(min_size=24, max_size=24)
MASKS = st.tuples(st.integers(1, 64), st.integers(1, 64)).flatmap(lambda size: arrays(bool, (1, *size)))


@given(NONCES, MASKS)
def test_round_trip(nonce, mask):
    back = Header.unpack(Header(nonce, torch.from_numpy(mask)).pack())
    assert back.nonce == nonce
    assert back.mask is not None
    assert torch.equal(back.mask, torch.from_numpy(mask))
    assert Header.unpack(Header(nonce).pack()) == Header(nonce)


@given(st.binary(max_size=200))
def test_any_bytes_give_a_header_or_a_message(data):
    for candidate in (data, b"KA\x01\x01" + data, b"KA\x01\x00" + data):
        try:
            Header.unpack(candidate)
        except BadHeader as error:
            assert str(error)


def test_messages():
    for data, message in ((b"", "no keyanon header"), (b"KA", "damaged"), (b"KA\x09" + bytes(40), "version 9")):
        with pytest.raises(BadHeader, match=message):
            Header.unpack(data)
