"""Bytes and floats, resizing, and PNG files with a header."""

import io
import random
import struct
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from PIL import ImageCms

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


def values(path: Path) -> np.ndarray:
    picture = open_rgb(path)
    assert picture.mode == "RGB"
    return np.asarray(picture).astype(float)


COLOURS = np.random.default_rng(3).integers(0, 256, (12, 20, 3), dtype=np.uint8)
DEEP = np.random.default_rng(4).integers(0, 2**16, (12, 20, 3), dtype=np.uint16)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "1", "CMYK", "YCbCr"])
def test_open_rgb_of_every_mode(tmp_path, mode):
    path = save(tmp_path / ("x.tif" if mode in ("CMYK", "YCbCr") else "x.png"), mode)
    assert open_rgb(path).mode == "RGB"


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("x.png", {}),
        ("x.bmp", {}),
        ("x.tif", {}),
        ("x.tiff", {"compression": "tiff_lzw"}),
        ("x.webp", {"lossless": True}),
    ],
)
def test_lossless_files_have_opencvs_values(tmp_path, name, settings):
    cv2 = pytest.importorskip("cv2")
    PIL.Image.fromarray(COLOURS).save(tmp_path / name, **settings)
    assert (values(tmp_path / name) == COLOURS).all()
    assert (values(tmp_path / name) == cv2.imread(str(tmp_path / name))[..., ::-1]).all()


@pytest.mark.parametrize(("name", "off"), [("x.jpg", 2), ("x.jpe", 2), ("x.jfif", 2), ("x.avif", 12), ("x.mpo", 2)])
def test_lossy_files_are_near(tmp_path, name, off):
    smooth = np.asarray(PIL.Image.fromarray(COLOURS[:3, :3]).resize((40, 40), PIL.Image.Resampling.BICUBIC))
    form = {"x.avif": "AVIF", "x.mpo": "MPO"}.get(name, "JPEG")
    more = {"save_all": True, "append_images": [PIL.Image.new("RGB", (40, 40))]} if form == "MPO" else {}
    PIL.Image.fromarray(smooth).save(tmp_path / name, form, quality=100, **more)
    assert np.abs(values(tmp_path / name) - smooth).mean() < off


@pytest.mark.parametrize("name", ["x.png", "x.tif"])
@pytest.mark.parametrize("channels", [1, 3])
def test_16_bits_become_8(tmp_path, name, channels):
    """To the nearest level where one channel is read, and to the next where Pillow drops the low byte of three."""
    cv2 = pytest.importorskip("cv2")
    deep = DEEP[..., 0] if channels == 1 else DEEP
    cv2.imwrite(str(tmp_path / name), deep if channels == 1 else deep[..., ::-1])
    expected = np.broadcast_to(deep.reshape(12, 20, channels) / 257, (12, 20, 3))
    assert np.abs(values(tmp_path / name) - expected).max() <= (0.5 if channels == 1 else 1)


@pytest.mark.parametrize("byteorder", ["<", ">"])
def test_16_bits_of_either_byte_order(tmp_path, byteorder):
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(tmp_path / "x.tif", DEEP[..., 0], byteorder=byteorder)
    assert np.abs(values(tmp_path / "x.tif")[..., 1] - DEEP[..., 0] / 257).max() <= 0.5


@pytest.mark.parametrize(
    ("dtype", "settings"),
    [
        (np.float32, {}), (np.float64, {}), (np.int8, {}), (np.int16, {}), (np.int32, {}), (np.uint32, {}),
        (np.uint16, {"photometric": "miniswhite"}),
    ],
)  # fmt: skip
def test_numbers_of_which_nothing_tells_white_are_refused(tmp_path, dtype, settings):
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(tmp_path / "x.tif", COLOURS[..., 0].astype(dtype), **settings)
    with pytest.raises(BadPicture, match=r"x\.tif: not a readable picture \("):
        open_rgb(tmp_path / "x.tif")


def test_white_may_be_zero_in_8_bits(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(tmp_path / "x.tif", COLOURS[..., 0], photometric="miniswhite")
    assert (values(tmp_path / "x.tif")[..., 0] == 255.0 - COLOURS[..., 0]).all()


@pytest.mark.parametrize(
    "kind", ["RGBA", "LA", "P", "P with an alpha of its own", "RGB with a transparent colour", "premultiplied"]
)
def test_white_is_behind_transparent_pixels(tmp_path, kind):
    """a c + (1 - a) 255, whatever colour the file hides where it is transparent."""
    name, settings = "x.png", {}
    alpha = np.tile(np.linspace(0, 255, 20).astype(np.uint8), (12, 1))
    colour = COLOURS.astype(float)
    if kind == "RGBA":
        picture = PIL.Image.fromarray(np.dstack([COLOURS, alpha]))
    elif kind == "WebP":
        picture, name = PIL.Image.fromarray(np.dstack([COLOURS, alpha])), "x.webp"
        settings = {"lossless": True, "exact": True}
    elif kind == "LA":
        picture = PIL.Image.fromarray(np.dstack([COLOURS[..., 0], alpha]))
        colour = np.repeat(colour[..., :1], 3, 2)
    elif kind == "RGB with a transparent colour":
        picture, settings = PIL.Image.fromarray(COLOURS), {"transparency": tuple(COLOURS[3, 4].tolist())}
        alpha = np.where((COLOURS[3, 4] == COLOURS).all(-1), 0, 255)
    else:
        picture = PIL.Image.fromarray(COLOURS // 64 * 64).quantize(64)
        colour, index = np.asarray(picture.convert("RGB")).astype(float), np.asarray(picture)
        opacity = [0, 128] + [255] * 62 if kind != "P" else [0] + [255] * 63
        settings = {"transparency": bytes(opacity) if kind != "P" else 0}
        alpha = np.asarray(opacity)[index]
    picture.save(tmp_path / name, **settings)
    a = alpha[..., None] / 255
    assert np.abs(values(tmp_path / name) - (a * colour + (1 - a) * 255)).max() <= 1


def test_a_gif_of_one_frame_is_read(tmp_path):
    picture = PIL.Image.fromarray(COLOURS).quantize(32)
    picture.save(tmp_path / "x.gif")
    assert (values(tmp_path / "x.gif") == np.asarray(picture.convert("RGB"))).all()


@pytest.mark.parametrize("name", ["x.gif", "x.webp", "x.png", "x.tif", "x.avif"])
def test_several_frames_are_refused(tmp_path, name):
    first, second = PIL.Image.new("RGB", (20, 20), "red"), PIL.Image.new("RGB", (20, 20), "blue")
    first.save(tmp_path / name, save_all=True, append_images=[second])
    with pytest.raises(BadPicture, match=r"it has several frames or pages"):
        open_rgb(tmp_path / name)


def test_cmyk_without_a_profile(tmp_path):
    plates = np.random.default_rng(1).integers(0, 256, (12, 20, 4), dtype=np.uint8)
    PIL.Image.fromarray(plates, "CMYK").save(tmp_path / "x.tif")
    c, k = plates[..., :3] / 255.0, plates[..., 3:] / 255.0
    assert np.abs(values(tmp_path / "x.tif") - 255 * (1 - c) * (1 - k)).max() <= 1


def test_lab_has_scikit_images_colours(tmp_path):
    color = pytest.importorskip("skimage.color")
    lab = np.array([[[50, 20, -20], [80, -10, 30], [30, 0, 0], [60, 40, 10]]], float)
    raw = np.concatenate([lab[..., :1] * 2.55, lab[..., 1:] + 128], 2).round().astype(np.uint8)
    PIL.Image.merge("LAB", [PIL.Image.fromarray(raw[..., i]) for i in range(3)]).save(tmp_path / "x.tif")
    # its white is D65's: adaptation to it moves these colours by some levels
    assert np.abs(values(tmp_path / "x.tif") - 255 * color.lab2rgb(lab)).max() < 6


# A file's colours: of a profile with sRGB's primaries and a gamma of 1, level v shows what sRGB has at 255 f(v / 255).


def curve(linear: np.ndarray) -> np.ndarray:
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def profile_of(space: str, gamma: float) -> bytes:
    """A minimal ICC 2 profile: one curve, and sRGB's primaries adapted to D50 where it has three colours."""

    def fixed(*values: float) -> bytes:
        return b"XYZ " + bytes(4) + b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    trc = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    text = b"desc" + bytes(4) + struct.pack(">I", 5) + b"test\0" + bytes(4 + 4 + 2 + 1 + 67)
    tags = {
        b"desc": text + bytes(-len(text) % 4),
        b"wtpt": fixed(0.9642, 1, 0.8249),
        b"cprt": b"text" + bytes(4) + b"none",
    }
    if space == "GRAY":
        tags[b"kTRC"] = trc
    else:
        primaries = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.7141))
        for letter, xyz in zip(b"rgb", primaries, strict=True):
            tags |= {bytes([letter]) + b"XYZ": fixed(*xyz), bytes([letter]) + b"TRC": trc}
    place, table, body = 128 + 4 + 12 * len(tags), b"", b""
    for name, data in tags.items():
        table += name + struct.pack(">II", place + len(body), len(data))
        body += data
    head = struct.pack(
        ">I4sI4s4s4s12s4s",
        place + len(body),
        bytes(4),
        0x02100000,
        b"mntr",
        space.encode().ljust(4),
        b"XYZ ",
        bytes(12),
        b"acsp",
    )
    head = head.ljust(68, b"\0") + struct.pack(">iii", *(round(v * 65536) for v in (0.9642, 1, 0.8249)))
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "RGBA", "grey with a profile for RGB", "palette", "16 bits"])
def test_a_colour_profile_is_applied(tmp_path, mode):
    grey = mode in ("L", "LA", "16 bits")
    profile = profile_of("GRAY" if grey else "RGB", 1.0)
    colours = COLOURS if mode in ("RGB", "RGBA") else np.repeat(COLOURS[..., :1], 3, 2)
    one, opaque = PIL.Image.fromarray(colours[..., 0].copy()), PIL.Image.new("L", (20, 12), 255)
    if mode == "palette":
        picture = PIL.Image.fromarray(colours // 32 * 32).quantize(16)
        colours = np.asarray(picture.convert("RGB"))
    elif mode == "16 bits":
        picture = PIL.Image.fromarray(colours[..., 0].astype(np.uint16) * 257)
    else:
        picture = PIL.Image.fromarray(colours) if mode in ("RGB", "RGBA") else one
        if mode in ("LA", "RGBA"):
            picture.putalpha(opaque)
    picture.save(tmp_path / "x.png", icc_profile=profile)
    assert np.abs(values(tmp_path / "x.png") - 255 * curve(colours / 255)).max() <= 1.5


def test_a_profile_that_is_srgb_changes_nothing(tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    PIL.Image.fromarray(COLOURS).save(tmp_path / "x.png", icc_profile=profile)
    assert (values(tmp_path / "x.png") == COLOURS).all()


@pytest.mark.parametrize("profile", [b"no profile", profile_of("GRAY", 1.0)], ids=["broken", "of other colours"])
def test_a_profile_that_cannot_be_used_is_named(tmp_path, profile):
    PIL.Image.fromarray(COLOURS).save(tmp_path / "x.jpg", icc_profile=profile)
    with pytest.raises(BadPicture, match=r"x\.jpg.*colour profile cannot be used"):
        open_rgb(tmp_path / "x.jpg")


@pytest.mark.parametrize("brand", [b"heic", b"mif1", b"heix"])
def test_heic_is_named_with_a_remedy(tmp_path, brand):
    (tmp_path / "x.heic").write_bytes(b"\0\0\0\x18ftyp" + brand + bytes(100))
    for data in (None, (tmp_path / "x.heic").read_bytes()):
        with pytest.raises(BadPicture, match=r"x\.heic.*HEIC.*pillow-heif"):
            open_rgb(tmp_path / "x.heic", data)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.gif", "x.webp", "x.tif", "x.bmp", "x.avif"])
def test_a_damaged_file_is_a_picture_or_a_bad_picture(tmp_path, name):
    """Whatever Pillow makes of the damage, no other error comes out."""
    PIL.Image.fromarray(COLOURS).save(tmp_path / name)
    data, rng = (tmp_path / name).read_bytes(), np.random.default_rng(0)
    for _ in range(12):
        bad = bytearray(data[: rng.integers(1, len(data) + 1)])
        for place in rng.integers(0, len(bad), 4):
            bad[place] = rng.integers(256)
        try:
            assert open_rgb(tmp_path / name, bytes(bad)).mode == "RGB"
        except BadPicture as error:
            assert str(tmp_path / name) in str(error)


@pytest.mark.parametrize("mode", ["L", "P"])
def test_what_optimizers_leave_of_a_published_file_is_read(tmp_path, mode):
    picture = PIL.Image.fromarray(COLOURS).convert(mode)
    picture.save(tmp_path / "x.png")
    assert (read_png(tmp_path / "x.png")[0].permute(1, 2, 0).numpy() == np.asarray(picture.convert("RGB"))).all()


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


@pytest.mark.parametrize("header", [b"", b"\x00", bytes(range(256)) * 256])
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


def test_a_header_that_no_reader_takes_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="header would have 65537 bytes"):
        write_png(tmp_path / "x.png", noise(), bytes(2**16 + 1))
    assert list(tmp_path.iterdir()) == []


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


def test_greys_read_as_rgb_without_header(tmp_path):
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
