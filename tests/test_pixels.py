"""Bytes and floats, resizing, and PNG files with a header."""

import io
import random
import struct
import zlib

import numpy as np
import PIL.Image
import pytest
import torch

from keyanon.channel.pixels import (
    HEADER_CHUNK,
    from_pil,
    jpeg,
    open_rgb,
    read_png,
    resize,
    to_bytes,
    to_floats,
    write_png,
)
from keyanon.types import BadPicture


def noise(side=24, seed=0):
    return torch.randint(0, 256, (3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def save(path, mode, size=(20, 20), **options):
    PIL.Image.new(mode, size).save(path, **options)
    return path


def chunks(data):
    """Names of a PNG's chunks in their order."""
    place, names = 8, []
    while place < len(data):
        (length,) = struct.unpack(">I", data[place : place + 4])
        names.append(data[place + 4 : place + 8])
        place += 12 + length
    return names


def test_every_level_survives():
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    floats = to_floats(levels)
    assert (floats.min(), floats.max()) == (-1, 1)
    assert torch.equal(to_bytes(floats), levels)


def test_to_bytes_clips_and_rounds_to_the_nearest():
    floats = torch.tensor([-7, -1, -1 + 0.9 / 255, -1 + 1.1 / 255, 1, 7]).reshape(1, 1, 1, 6)
    assert to_bytes(floats).flatten().tolist() == [0, 0, 0, 1, 255, 255]


def test_rounding_errs_by_half_a_level():
    floats = torch.linspace(-1, 1, 4096).reshape(1, 1, 64, 64)
    assert (to_floats(to_bytes(floats)) - floats).abs().max() <= 1 / 255 + 1e-6


def test_resize_takes_the_centre_of_a_long_picture():
    picture = PIL.Image.new("RGB", (90, 30), "red")
    picture.paste("blue", (30, 0, 60, 30))
    small = from_pil(resize(picture, 16))
    assert small.shape == (3, 16, 16)
    assert (small[:, :, 4:-4] == torch.tensor([-1, -1, 1])[:, None, None]).all()  # further out Lanczos sees some red
    assert torch.allclose(small, small.flip(-1), atol=2 / 255)
    assert small[2].min() > 0


def test_resize_to_its_own_size_changes_nothing():
    pixels = noise()
    picture = PIL.Image.fromarray(pixels.permute(1, 2, 0).numpy())
    assert torch.equal(to_bytes(from_pil(resize(picture, 24))), pixels)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "1", "CMYK"])
def test_open_rgb_of_every_mode(tmp_path, mode):
    path = save(tmp_path / ("x.tif" if mode == "CMYK" else "x.png"), mode)
    assert open_rgb(path).mode == "RGB"


def test_open_rgb_turns_a_picture_upright(tmp_path):
    picture = PIL.Image.new("RGB", (40, 20), "white")
    picture.paste("black", (0, 0, 20, 20))
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # orientation: the camera stood on its side
    picture.save(tmp_path / "x.png", exif=exif)
    upright = open_rgb(tmp_path / "x.png")
    assert upright.size == (20, 40)
    assert upright.getpixel((10, 5)) == (0, 0, 0)


def test_open_rgb_of_bytes(tmp_path):
    data = save(tmp_path / "x.png", "RGB").read_bytes()
    assert open_rgb(tmp_path / "a.tar" / "x.png", data).size == (20, 20)


@pytest.mark.parametrize("read", [open_rgb, read_png])
def test_unreadable_files_are_bad_pictures(tmp_path, read):
    whole = tmp_path / "whole.png"
    write_png(whole, noise(64))
    data = whole.read_bytes()
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 0xFF
    for broken in (b"", b"hello", data[:200], data[: len(data) // 2], bytes(flipped)):
        path = tmp_path / "broken.png"
        path.write_bytes(broken)
        with pytest.raises(BadPicture, match=r"broken\.png: not a readable picture"):
            read(path)
    with pytest.raises(BadPicture, match=r"gone\.png"):
        read(tmp_path / "gone.png")


@pytest.mark.parametrize("read", [open_rgb, read_png])
def test_a_decompression_bomb_is_a_bad_picture(tmp_path, read, monkeypatch):
    write_png(tmp_path / "bomb.png", noise(64))
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(BadPicture, match=r"bomb\.png"):
        read(tmp_path / "bomb.png")


@pytest.mark.parametrize("header", [b"", b"\x00", bytes(range(256)) * 300])
def test_png_round_trip_with_header(tmp_path, header):
    write_png(tmp_path / "x.png", noise(), header)
    pixels, back = read_png(tmp_path / "x.png")
    assert pixels.dtype == torch.uint8
    assert torch.equal(pixels, noise())
    assert back == header


def test_header_chunk_is_ancillary_private_and_dies_with_an_edit(tmp_path):
    """The bits that PNG gives to the case of the four letters, and what an editor makes of them."""
    ancillary, private, reserved, safe_to_copy = (chr(letter).islower() for letter in HEADER_CHUNK)
    assert (ancillary, private, reserved, safe_to_copy) == (True, True, False, False)
    write_png(tmp_path / "x.png", noise(), b"secret")
    assert HEADER_CHUNK in chunks((tmp_path / "x.png").read_bytes())
    with PIL.Image.open(tmp_path / "x.png") as picture:
        picture.save(tmp_path / "edited.png")
    assert read_png(tmp_path / "edited.png")[1] == b""
    assert torch.equal(read_png(tmp_path / "edited.png")[0], noise())


def test_header_after_the_pixels_is_found_too(tmp_path):
    write_png(tmp_path / "x.png", noise())
    data = (tmp_path / "x.png").read_bytes()
    body = HEADER_CHUNK + b"late"
    chunk = struct.pack(">I", 4) + body + struct.pack(">I", zlib.crc32(body))
    end = data.index(b"IEND") - 4
    (tmp_path / "x.png").write_bytes(data[:end] + chunk + data[end:])
    assert read_png(tmp_path / "x.png")[1] == b"late"


def with_chunks(data, *chunks):
    """A PNG's bytes with chunks put before its end."""
    added = b""
    for name, body in chunks:
        added += struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    end = data.index(b"IEND") - 4
    return data[:end] + added + data[end:]


def test_oversized_and_ambiguous_headers_are_bad_pictures(tmp_path, monkeypatch):
    path = tmp_path / "x.png"
    write_png(path, noise(), b"header")
    data = path.read_bytes()
    huge_claim = data[: data.index(b"IEND") - 4] + struct.pack(">I", 2**31 - 1) + HEADER_CHUNK + b"and then nothing"
    for broken, message in (
        (with_chunks(data, (HEADER_CHUNK, b"another")), "it has 2 headers"),
        (huge_claim, "not a readable picture"),
        (with_chunks(data, (b"iCCP", b"")), "not a readable picture"),  # an IndexError in Pillow
    ):
        path.write_bytes(broken)
        with pytest.raises(BadPicture, match=message):
            read_png(path)
    write_png(path, noise())
    path.write_bytes(with_chunks(path.read_bytes(), (HEADER_CHUNK, bytes(2**20 + 1))))
    with pytest.raises(BadPicture, match="header has 1048577 bytes"):
        read_png(path)
    monkeypatch.setattr("keyanon.channel.pixels.MAX_FILE", 1000)
    with pytest.raises(BadPicture, match="are more than 1000"):
        read_png(path)
    with pytest.raises(ValueError, match="header would have 1048577 bytes"):
        write_png(path, noise(), bytes(2**20 + 1))


def test_a_png_with_bytes_changed_at_random_is_read_or_a_bad_picture(tmp_path):
    path, draw = tmp_path / "x.png", random.Random(0)
    write_png(path, noise(), bytes(200))
    data, read = path.read_bytes(), 0
    for _ in range(1000):
        changed = bytearray(data)
        for _ in range(draw.randint(1, 5)):
            changed[draw.randrange(len(data))] = draw.randrange(256)
        path.write_bytes(bytes(changed[: draw.choice([draw.randrange(len(data)), len(data)])]))
        try:
            pixels, _ = read_png(path)
        except BadPicture as error:
            assert "x.png" in str(error)
        else:
            assert pixels.dtype == torch.uint8
            read += 1
    assert read < 1000


def test_other_formats_and_greys_read_as_rgb_without_header(tmp_path):
    grey = noise()[0].numpy()
    PIL.Image.fromarray(grey).save(tmp_path / "x.png")
    pixels, header = read_png(tmp_path / "x.png")
    assert header == b""
    assert torch.equal(pixels, torch.from_numpy(np.stack([grey] * 3)))


def test_writing_leaves_no_half_file(tmp_path):
    write_png(tmp_path / "x.png", noise(seed=0))
    write_png(tmp_path / "x.png", noise(seed=1))
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]
    assert torch.equal(read_png(tmp_path / "x.png")[0], noise(seed=1))
    with pytest.raises(FileNotFoundError):
        write_png(tmp_path / "nowhere" / "x.png", noise())


def test_equal_pictures_make_equal_files(tmp_path):
    for name in ("a.png", "b.png"):
        write_png(tmp_path / name, noise(), b"header")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_jpeg_is_pillows_and_gets_worse_with_quality():
    grey = torch.full((3, 32, 32), 128, dtype=torch.uint8)
    assert torch.equal(jpeg(grey, 90), grey)
    smooth = torch.from_numpy(np.array(PIL.Image.linear_gradient("L").resize((64, 64)))).expand(3, 64, 64).contiguous()
    errors = [(jpeg(smooth, quality).float() - smooth.float()).square().mean() for quality in (100, 75, 20)]
    assert errors == sorted(errors)
    buffer = io.BytesIO()
    PIL.Image.fromarray(noise().permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=50)
    assert torch.equal(jpeg(noise(), 50).permute(1, 2, 0), torch.from_numpy(np.array(PIL.Image.open(buffer))))
