"""Names that are made of what a user typed: every cell of a sweep is a row, a folder and a tracked run of its own."""

import string

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hypothesis import given, settings
from hypothesis import strategies as st
from tabulate import tabulate

from experiments.harness.command import row_overrides
from experiments.harness.layout import celled
from experiments.harness.names import LONGEST, check_table_name, file_name, row_label
from experiments.harness.preflight import choices
from experiments.harness.tracking import wandb_id, without_places
from keyanon.errors import BadSetting

ODD = st.text(
    st.one_of(st.sampled_from("/\\,.=~ '\"|<#%:?*\n\té\u2028"), st.characters(exclude_characters="\0")), max_size=40
)
# What Hydra's grammar has for values: texts in quotes, numbers, lists and mappings.
QUOTED = ODD.map(lambda text: QuotedString(text, Quote.single).with_quotes())
VALUES = st.one_of(
    QUOTED,
    st.integers().map(str),
    st.floats(allow_nan=False).map(str),
    st.sampled_from(["null", "true", "/data/a", "/data/b", "a/b", "a_b", "[]", "{}"]),
    st.lists(QUOTED, max_size=3).map(lambda items: f"[{','.join(items)}]"),
    st.lists(QUOTED, max_size=2).map(lambda items: f"{{a:[{','.join(items)}]}}"),
)


@given(st.lists(ODD | st.text(string.ascii_letters, min_size=90, max_size=300), min_size=2, max_size=2, unique=True))
@settings(deadline=None)
def test_different_texts_name_different_files_and_runs(texts):
    names = [file_name(text) for text in texts]
    assert names[0] != names[1]
    for text, name in zip(texts, names, strict=True):
        assert name.isascii()
        assert len(name) <= LONGEST
        assert not set(name) & set("/\\\0 \n:*?\"<>|'")
        assert name not in ("", ".", "..")
        assert not name.startswith((".", "-"))
        assert file_name(text) == name  # the same in every process
        # wandb 0.31: 1 to 128 characters, none of :;,#?/'
        assert wandb_id(text).isalnum()
        assert len(wandb_id(text)) == 32
    assert wandb_id(texts[0]) != wandb_id(texts[1])


@given(st.lists(VALUES, min_size=2, max_size=4, unique=True), st.lists(VALUES, min_size=2, max_size=2, unique=True))
@settings(deadline=None, max_examples=60)
def test_every_cell_of_a_sweep_is_a_row_of_its_own(firsts, seconds):
    one, two = OverridesParser.create().parse_overrides([f"+a.b={','.join(firsts)}", f"c={','.join(seconds)}"])
    cells = [[first, second] for first in choices(one) for second in choices(two)]
    labels = [row_label("exact", row_overrides(["dataset=x", *cell], ["a.b", "c"])) for cell in cells]
    assert len(set(labels)) == len(cells) == len(firsts) * len(seconds)
    assert all(label.isprintable() and label.startswith("exact,a.b=") for label in labels)
    table = tabulate([[celled(label)] for label in labels], ["row"], tablefmt="pipe", disable_numparse=True)
    assert len(table.splitlines()) == 2 + len(labels)


def test_a_plain_row_names_its_folder():
    assert file_name("bundled-signflip,solver.steps=20") == "bundled-signflip,solver.steps=20"
    assert file_name("folder-exact,dataset.root=/faces/a").startswith("folder-exact,dataset.root=_faces_a~")


@pytest.mark.parametrize(
    "name", ["a/b", "..", "", " ", "-m", "x" * 101, "a\nb", "originals", "embeddings", "log", "names", None]
)
def test_a_table_that_is_no_file_is_refused(name):
    with pytest.raises(BadSetting, match="name="):
        check_table_name(name)


@pytest.mark.parametrize("name", ["table1", "kl,steps=10", "a.b", 7])
def test_a_plain_table_is_not(name):
    check_table_name(name)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ("exact,dataset.root=/faces/anna/x,solver.steps=2", "exact,dataset.root=...,solver.steps=2"),
        ("exact,dataset.root='/faces/anna, x'", "exact,dataset.root=..."),
        ("exact,+a=[1,~/x],b=2", "exact,+a=...,b=2"),
        ("exact,solver.steps=2", "exact,solver.steps=2"),
    ],
)
def test_no_place_on_a_disk_is_told_in_a_row(row, told):
    assert without_places(row) == told
