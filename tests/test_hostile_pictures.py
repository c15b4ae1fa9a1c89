"""Pictures from strangers: no program is started, and what would take much is refused before it is begun."""

import os
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from benchmarks.hostile_pictures import EPS, SPECIMENS, exif, forget_peak, peak, png, saved, tiff, with_scans
from keyanon.channel import pixels
from keyanon.channel.pixels import open_rgb, read_png, tag_values
from keyanon.types import MAX_FILE, BadPicture, Source

SMALL = 4_000_000  # bytes of a flood
READ = {"png_64_megapixels", "jpeg_at_all_limits"}  # for seconds: the benchmark tells
LARGE = READ | {
    "png_header_of_500_mb",
    "png_30000_squared",
    "png_13000_squared",
    "webp_16383_squared",
    "jpeg_scans",
    "tiff_huge_tile",
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="asks Linux for the most memory that was taken")
@pytest.mark.parametrize("name", [name for name in SPECIMENS if name not in LARGE])
def test_a_flood_is_refused_or_read_at_once(tmp_path, name):
    data = SPECIMENS[name](SMALL)
    for read in (open_rgb, read_png):
        forget_peak()
        before, start = peak(), time.process_time()
        try:
            read(tmp_path / "x.png", data)
        except BadPicture as error:
            assert str(error).startswith(f"{tmp_path / 'x.png'}: not a readable picture (")
            assert "\n" not in str(error)
        assert time.process_time() - start < 2
        assert peak() - before < 128  # MiB


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.tif", "x.eps"])
def test_no_program_is_started_for_a_picture(tmp_path, monkeypatch, name):
    """Pillow hands PostScript to Ghostscript, whatever the file is called."""
    program = tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {tmp_path / 'started'}\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)  # it looks once a process
    (tmp_path / name).write_bytes(EPS)
    for read in (open_rgb, read_png):
        with pytest.raises(BadPicture, match=rf"{name}: not a readable picture"):
            read(tmp_path / name)
    assert not (tmp_path / "started").exists()


FORMS = sorted(set(PIL.Image.registered_extensions().values()) & PIL.Image.SAVE.keys())


@pytest.mark.parametrize("form", FORMS)
def test_only_the_formats_that_are_named_are_opened(tmp_path, form):
    """PDF and EPS among those that are not: what a suffix says counts for nothing."""
    mode = {"XBM": "1", "MSP": "1", "PALM": "P"}.get(form, "RGB")
    try:
        PIL.Image.new(mode, (32, 32)).save(tmp_path / "x", form)
    except (OSError, KeyError, ValueError, RuntimeError):
        pytest.skip(f"Pillow writes no {form} here")
    (tmp_path / "x").replace(tmp_path / "x.png")
    if form in (*pixels.FORMATS, "MPO"):
        assert open_rgb(tmp_path / "x.png").size == (32, 32)
    else:
        with pytest.raises(BadPicture, match="of no format that is read here"):
            open_rgb(tmp_path / "x.png")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("read", [open_rgb, read_png])
@pytest.mark.parametrize(("width", "height"), [(8193, 8192), (13_000, 13_000), (30_000, 30_000)])
def test_too_many_pixels_are_named_with_size_limit_and_remedy(tmp_path, read, width, height):
    head = struct.pack(">II", width, height)
    (tmp_path / "x.png").write_bytes(bad_sum_mended(png(16, 16).replace(struct.pack(">II", 16, 16), head, 1)))
    message = rf"x\.png: .*({width} x {height}.*67,108,864|{width * height} pixels).*make it smaller"
    start = time.process_time()
    with pytest.raises(BadPicture, match=message):
        read(tmp_path / "x.png")
    assert time.process_time() - start < 0.5


def bad_sum_mended(data: bytes) -> bytes:
    return data[:29] + struct.pack(">I", zlib.crc32(data[12:29])) + data[33:]


@pytest.mark.parametrize("read", [open_rgb, read_png, lambda path: Source(path).read()])
def test_a_file_of_too_many_bytes_is_not_read(tmp_path, read):
    with (tmp_path / "x.png").open("wb") as file:
        file.truncate(MAX_FILE + 1)
    with pytest.raises(BadPicture, match=r"x\.png: it has 268,435,457 bytes, and at most 268,435,456 are read; make"):
        read(tmp_path / "x.png")


def test_a_part_of_a_large_archive_is_read(tmp_path):
    with (tmp_path / "x.tar").open("wb") as file:
        file.truncate(MAX_FILE + 100)
        file.seek(MAX_FILE)
        file.write(b"picture")
    assert Source(tmp_path / "x.tar", MAX_FILE, 7).read() == b"picture"


def test_scans_of_a_progressive_jpeg_are_counted(tmp_path):
    data = saved("JPEG", 64, 64, progressive=True)
    assert open_rgb(tmp_path / "x", with_scans(data, pixels.MAX_SCANS)).size == (64, 64)
    with pytest.raises(BadPicture, match=r"it has 101 scans, and at most 100 are read; save it anew"):
        open_rgb(tmp_path / "x", with_scans(data, pixels.MAX_SCANS + 1))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF", "GIF", "AVIF", "BMP"])
def test_a_large_picture_of_an_ordinary_program_is_in_few_enough_pieces(tmp_path, form):
    noise = np.random.default_rng(0).integers(0, 256, (1200, 1600, 3), dtype=np.uint8)
    picture = PIL.Image.fromarray(noise if form != "GIF" else noise[..., 0])
    picture.save(tmp_path / "x", form, **({"quality": 95} if form in ("JPEG", "WEBP") else {}))
    data = (tmp_path / "x").read_bytes()
    calls = pixels.READS + len(data) // pixels.BYTES_A_READ
    asked: list[pixels.Measured] = []

    class Kept(pixels.Measured):
        def __init__(self, data: bytes) -> None:
            super().__init__(data)
            asked.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pixels, "Measured", Kept)
        assert open_rgb(tmp_path / "x").size == (1600, 1200)
    assert asked[0].calls > calls / 2
    assert asked[0].bytes > len(data)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_long_exif_data_are_refused_and_ordinary_ones_read(tmp_path, form):
    PIL.Image.new("RGB", (32, 32)).save(tmp_path / "x", form, exif=exif(100))
    assert open_rgb(tmp_path / "x").size == (32, 32)
    PIL.Image.new("RGB", (32, 32)).save(tmp_path / "x", form, exif=exif(2**21))
    with pytest.raises(BadPicture, match="EXIF"):
        open_rgb(tmp_path / "x")


def test_a_long_avif_is_refused_for_its_exif_data_become_numbers_at_once(tmp_path, monkeypatch):
    PIL.Image.new("RGB", (32, 32)).save(tmp_path / "x", "AVIF")
    monkeypatch.setattr(pixels, "MAX_AVIF", (tmp_path / "x").stat().st_size - 1)
    with pytest.raises(BadPicture, match=r"AVIF .* save it anew"):
        open_rgb(tmp_path / "x")


@pytest.mark.parametrize("tag", [322, 323])
def test_a_tile_larger_than_any_picture_is_refused(tmp_path, tag):
    data = tiff(
        {259: (3, 1, 8), 322: (4, 1, 16), 323: (4, 1, 16), 324: (4, 1, 150), 325: (4, 1, 9)} | {tag: (4, 1, 2**28)}
    )
    with pytest.raises(BadPicture, match="tiles"):
        open_rgb(tmp_path / "x", data)


def test_values_of_tags_are_counted_before_they_are_made(tmp_path):
    assert tag_values(tiff({})) == 7
    assert tag_values(tiff({273: (4, 10**9, 8), 270: (2, 10**9, 8)})) == 6 + 10**9
    for broken in (b"II*\0", b"MM\0*" + bytes(3), b"II+\0" + bytes(30), b"MM\0+" + b"\xff" * 30):
        assert tag_values(broken) >= 0
    PIL.Image.new("RGB", (64, 64)).save(tmp_path / "x.tif", big_tiff=True)
    assert 0 < tag_values((tmp_path / "x.tif").read_bytes()) < 100
    with pytest.raises(BadPicture, match="its tags have .* values, and at most 1,048,576 are read"):
        open_rgb(Path("x"), tiff({273: (4, 2**20, 8)}))


def test_a_profile_of_endless_steps_is_refused(tmp_path):
    PIL.Image.new("RGB", (20, 20)).save(tmp_path / "x.png", icc_profile=bytes(128) + b"mpet" + bytes(100))
    with pytest.raises(BadPicture, match="multi-process elements"):
        open_rgb(tmp_path / "x.png")


def test_16_bits_of_three_channels_are_brought_to_8(tmp_path):
    """Pillow keeps the high byte, which is the level to within one."""
    cv2 = pytest.importorskip("cv2")
    deep = np.random.default_rng(0).integers(0, 2**16, (12, 20, 3), dtype=np.uint16)
    cv2.imwrite(str(tmp_path / "x.png"), deep[..., ::-1])
    assert np.abs(np.asarray(open_rgb(tmp_path / "x.png")) - deep / 257).max() <= 1
    with pytest.raises(BadPicture, match="16 bits"):
        read_png(tmp_path / "x.png")
