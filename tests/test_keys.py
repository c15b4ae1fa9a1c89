"""Known answers, and properties that hold for every key and nonce."""

import hashlib
import hmac

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from hypothesis import given
from hypothesis import strategies as st

from keyanon.keys import BadKey, FlippedSigns, MasterKey, experiment_key, nonce_for, read_key, signs, write_new_key

SECRETS, NONCES = st.binary(min_size=32, max_size=32), st.binary(min_size=24, max_size=24)


def test_stream_is_hkdf_then_chacha20(key):
    """The construction spelled out with hmac (RFC 5869) instead of the library's HKDF."""
    nonce, info = bytes(24), b"keyanon/1|signs"
    extracted = hmac.digest(nonce, key.secret, "sha256")
    expanded = hmac.digest(extracted, info + b"\x01", "sha256")
    expected = Cipher(algorithms.ChaCha20(expanded, bytes(16)), mode=None).encryptor().update(bytes(100))
    assert key.stream(nonce, "signs", 100) == expected


def test_known_answers(key):
    """Committed bits: a change of library or platform that alters a key stream must not pass."""
    assert key.stream(bytes(range(24)), "signs", 16).hex() == "bc4a4d638eeed854a622bd1347f4e3ba"
    assert key.fingerprint == "3806e947210045e7"
    k = signs(key, bytes(24), (3, 64, 64))
    assert hashlib.sha256(k.numpy().tobytes()).hexdigest()[:16] == "96975f2b297a0d59"


@given(SECRETS, NONCES)
def test_signs_are_signs_and_their_own_inverse(secret, nonce):
    k = signs(MasterKey(secret), nonce, (3, 8, 8))
    assert set(k.unique().tolist()) == {-1, 1}
    assert (k * k == 1).all()


def test_signs_are_balanced_and_unrelated_between_nonces_and_near_keys(key):
    k = signs(key, bytes(24), (100_000,)).float()
    assert abs(k.mean()) < 4 / np.sqrt(100_000)
    for other in (signs(key, b"1" * 24, (100_000,)), signs(key.with_bit_flipped(), bytes(24), (100_000,))):
        assert abs((k * other).mean()) < 4 / np.sqrt(100_000)


@given(SECRETS, NONCES, st.sampled_from([0.0, 0.01, 0.25, 1.0]))
def test_flipped_signs_flip_that_fraction(secret, nonce, fraction):
    key = MasterKey(secret)
    wrong = signs(FlippedSigns(key, fraction), nonce, (4000,)) != signs(key, nonce, (4000,))
    assert wrong.float().mean() == pytest.approx(fraction, abs=1e-9)
    assert FlippedSigns(key, fraction).stream(nonce, "other", 8) == key.stream(nonce, "other", 8)


@given(SECRETS, st.integers(0, 255))
def test_near_key_differs_in_one_bit(secret, bit):
    near = MasterKey(secret).with_bit_flipped(bit)
    assert sum((a ^ b).bit_count() for a, b in zip(secret, near.secret, strict=True)) == 1


def test_nonce_is_a_function_of_key_id_and_pixels(key):
    picture = torch.zeros(3, 4, 4)
    nonce = nonce_for(key, "a", picture)
    assert nonce == nonce_for(key, "a", picture.clone())
    others = [nonce_for(key, "b", picture), nonce_for(key, "a", picture + 1), nonce_for(experiment_key(), "a", picture)]
    assert len({nonce, *others}) == 4
    assert len(nonce) == 24


def test_secret_is_not_in_repr(key):
    assert key.secret.hex() not in repr(key)
    assert repr(key.secret) not in repr(key)


def test_key_file_round_trip(tmp_path):
    key = write_new_key(tmp_path / "key")
    assert read_key(tmp_path / "key") == key
    with pytest.raises(BadKey, match="never overwritten"):
        write_new_key(tmp_path / "key")


def test_bad_key_files_are_refused_with_a_remedy(tmp_path):
    path = tmp_path / "key"
    with pytest.raises(BadKey, match="no key file .* make one with"):
        read_key(path)
    for content, message in (
        ("ab" * 31, "holds 31 bytes"),
        ("password", "not a key file"),
        ("é" * 32, "not a key file"),
    ):
        path.write_text(content)
        path.chmod(0o600)
        with pytest.raises(BadKey, match=message):
            read_key(path)
    path.write_text("ab" * 32)
    path.chmod(0o644)
    with pytest.raises(BadKey, match="chmod 600"):
        read_key(path)
    with pytest.raises(BadKey, match="32 bytes"):
        MasterKey(b"short")
