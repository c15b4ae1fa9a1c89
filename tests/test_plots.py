import numpy as np
import pandas as pd
import PIL.Image
import pytest
import torch

from experiments.harness.plots import contact_sheet, share_curve, wrong_key_curves


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


def test_curve_shows_the_shares_and_nothing_else(tmp_path):
    def row(view: str, statistic: str, value: float) -> dict[str, object]:
        return {
            "view": view,
            "scorer": "pixel",
            "statistic": statistic,
            "value": value,
            "low": value - 0.1,
            "high": value + 0.1,
        }

    others = [row("wrong key", "mean", 0.1), row("right signs needed", "median share to pass at far=0.001", 0.9)]
    swept = [
        row(f"right signs {share:5.1f} %", name, share / 100)
        for share in (50, 98, 100)
        for name in ("mean", "tar@far=0.001")
    ]
    assert not share_curve(pd.DataFrame(others), "right signs ", tmp_path / "none.svg")
    assert not (tmp_path / "none.svg").exists()
    paths = [tmp_path / "new" / f"{i}.svg" for i in range(3)]
    assert share_curve(pd.DataFrame(others + swept), "right signs ", paths[0])
    assert share_curve(pd.DataFrame(swept), "right signs ", paths[1])
    assert share_curve(pd.DataFrame(swept[:-2]), "right signs ", paths[2])
    assert paths[0].read_bytes() == paths[1].read_bytes() != paths[2].read_bytes()


def test_wrong_keys_are_drawn_beside_those_who_are_somebody_else(tmp_path):
    def rows(view: str, scores: list[float]) -> pd.DataFrame:
        about = {"dataset": "people", "protocol": "ours", "anonymizer": "exact", "view": view, "scorer": "pixel"}
        return pd.DataFrame({**about, "score": scores})

    wrong, strangers = rows("wrong key", [0.1, 0.2, float("nan")]), rows("strangers", [0.0, 0.3])
    other = rows("linkage of two files", [0.9])
    assert not wrong_key_curves(pd.concat([strangers, other]), tmp_path / "none.svg")
    assert not wrong_key_curves(other.head(0), tmp_path / "none.svg")
    assert not (tmp_path / "none.svg").exists()
    paths = [tmp_path / "new" / f"{i}.svg" for i in range(5)]
    assert wrong_key_curves(pd.concat([wrong, strangers, other]), paths[0])
    assert wrong_key_curves(pd.concat([strangers, wrong]), paths[1])
    assert wrong_key_curves(pd.concat([wrong, rows("strangers", [0.0, 0.4])]), paths[2])
    assert wrong_key_curves(pd.concat([wrong, wrong.assign(anonymizer="signflip"), strangers]), paths[3])
    assert wrong_key_curves(pd.concat([wrong, wrong.assign(protocol="authors"), strangers]), paths[4])
    assert paths[0].read_bytes() == paths[1].read_bytes() != paths[2].read_bytes()
    drawn = [path.read_text() for path in paths]
    assert "wrong keys, four kinds (2)" in drawn[0]
    assert "strangers, clean (2)" in drawn[0]
    assert "fresh faces" not in drawn[0]
    assert ("signflip, people" in drawn[0], "signflip, people" in drawn[3]) == (False, True)
    protocols = ("exact, people, ours", "exact, people, authors")  # a panel each, named where there are several
    assert [all(name in svg for name in protocols) for svg in (drawn[0], drawn[4])] == [False, True]
    assert "wrong keys, four kinds (2)" in drawn[4]
