import numpy as np
import PIL.Image
import pytest
import torch

from experiments.plots import contact_sheet


def flat(value: int, size: int = 32) -> torch.Tensor:
    return torch.full((3, size, size), value, dtype=torch.uint8)


def test_every_picture_is_on_the_sheet_pixel_for_pixel(tmp_path):
    generator = torch.Generator().manual_seed(0)
    pictures = {
        view: [torch.randint(0, 256, (3, 32, 32), generator=generator, dtype=torch.uint8) for _ in range(3)]
        for view in ("original", "mask", "anonymized", "recovered", "wrong_key")
    }
    contact_sheet(pictures, tmp_path / "new" / "sheet.png")
    sheet = np.asarray(PIL.Image.open(tmp_path / "new" / "sheet.png"))
    windows = np.lib.stride_tricks.sliding_window_view(sheet, (32, 32, 3)).squeeze(2)
    places = {}
    for view, column in pictures.items():
        for row, picture in enumerate(column):
            found = np.argwhere((windows[:, :, 0, 0] == picture[:, 0, 0].numpy()).all(-1))
            matching = [(y, x) for y, x in found if (windows[y, x] == picture.permute(1, 2, 0).numpy()).all()]
            assert len(matching) == 1, f"{view} {row} is on the sheet {len(matching)} times"
            places[view, row] = matching[0]
    assert len({y for (_, row), (y, _) in places.items() if row == 1}) == 1  # a row is one picture
    lefts = [places[view, 0][1] for view in pictures]
    assert lefts == sorted(lefts)  # columns in the order given


def test_a_column_has_room_for_its_label_and_labels_are_drawn(tmp_path):
    contact_sheet({"a": [flat(255, 8)]}, tmp_path / "short.png")
    contact_sheet({"a_very_long_name_of_a_view": [flat(255, 8)]}, tmp_path / "long.png")
    short, long = (PIL.Image.open(tmp_path / name) for name in ("short.png", "long.png"))
    assert long.width > 3 * short.width
    assert (np.asarray(long) < 128).any()  # all pictures are white: what is dark is the label


def test_views_of_different_sizes_share_a_sheet(tmp_path):
    contact_sheet({"original": [flat(0, 32)], "mask": [flat(0, 16)]}, tmp_path / "sheet.png")
    assert PIL.Image.open(tmp_path / "sheet.png").height >= 32


@pytest.mark.parametrize("columns", [{}, {"original": []}, {"original": [flat(0)], "recovered": []}])
def test_uneven_or_empty_columns_are_refused(tmp_path, columns):
    with pytest.raises(ValueError, match="same pictures of every view"):
        contact_sheet(columns, tmp_path / "sheet.png")
    assert not list(tmp_path.iterdir())
