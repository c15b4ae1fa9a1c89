import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from experiments.harness.layout import METHODS, arrow
from experiments.harness.meaning import Meanings, read_meanings
from experiments.harness.paper import Reference, read_paper
from experiments.harness.protocol import measured_by, protocol_label
from experiments.harness.results import (
    COSTS,
    STATISTICS,
    TIDY,
    build,
    collect,
    known_experiments,
    read_about,
    row_of,
    signed,
    table,
    write_about,
)
from experiments.tables import main
from keyanon.measures.biometrics import AVERAGES, verification_summaries
from keyanon.types import COSINE, About, Measure, Summary, View

ROOT = Path(__file__).parents[1]
PSNR, MAE = Measure("picture", "dB", "alike", "peak signal-to-noise ratio"), Measure("picture", "", "apart")
DECLARED = Meanings(
    {
        "original": View("clean"),
        "anonymized": View("anonymized"),
        "wrong_key": View("attacked"),
        **dict.fromkeys(("recovered", "recovered_float"), View("recovered")),
    },
    {
        "psnr": PSNR,
        "psnr_face": PSNR,
        "fid": Measure("picture", "", "lower"),
        "detected": Measure("detection", "", "higher"),
        **dict.fromkeys(("facenet_vggface2", "arcface_r50", "adaface_vit", "dlib"), COSINE),
    },
    {**AVERAGES, **verification_summaries(1e-3), "set": Summary("over the whole set")},
)
NAN = float("nan")


def cell(view="anonymized", scorer="facenet_vggface2", statistic="mean", value=0.08, **other) -> dict:
    row = {"experiment": "table1", "dataset": "celebahq", "protocol": "authors", "anonymizer": "signflip", "notes": ""}
    row |= {"view": view, "scorer": scorer, "statistic": statistic, "n": 100, "undefined": 0}
    return row | {"value": value, "low": value - 0.01, "high": value + 0.01} | other


def measured(*cells: dict) -> pd.DataFrame:
    return pd.DataFrame(cells, columns=STATISTICS)


def paper(
    view="anonymized", scorer="facenet_vggface2", statistic="mean", value=0.0755, tolerance=0.01, **other
) -> Reference:
    where = ("celebahq", "signflip", view, scorer, statistic)
    return Reference(*where, value, tolerance, "a reason", "a page", "unconfirmed", **other)


def entry(**changes) -> dict:
    return {
        "dataset": "lfw", "anonymizer": "signflip", "view": "anonymized", "scorer": "fid", "statistic": "set",
        "paper": 1, "tolerance": 0.5, "why_tolerance": "w", "source": "s", "certainty": "unconfirmed",
    } | changes  # fmt: skip


def run_folder(folder: Path, dataset="faces128", anonymizer="signflip", notes=(), values=(0.1, 0.2)) -> Path:
    """What the runner leaves behind for one cell."""
    folder.mkdir(parents=True)
    ids = [f"face{i}" for i in range(len(values))]
    scores = pd.DataFrame({"id": ids, "view": "recovered", "scorer": "psnr", "value": values})
    scores.to_parquet(folder / "scores.parquet")
    row = ("recovered", "psnr", "mean", len(values), 0, float(np.mean(values)), min(values), max(values))
    columns = ["view", "scorer", "statistic", "n", "undefined", "value", "low", "high"]
    pd.DataFrame([row], columns=columns).to_parquet(folder / "statistics.parquet")
    (folder / "meanings.csv").write_bytes(Meanings().csv())
    write_about(
        folder,
        {
            "experiment": "another",
            "dataset": dataset,
            "protocol": "ours",
            "anonymizer": anonymizer,
            "title_notes": list(notes),
        },
    )
    return folder


def changed(run: Path, **more: object) -> None:
    """Write the result of a run anew, after one of its files was."""
    write_about(run, read_about(run) | more)


# The rows


@pytest.mark.parametrize(
    ("value", "verdict"),
    [(0.4, "within"), (0.1, "within"), (-0.2, "within"), (0.4001, "outside"), (-0.2001, "outside"), (NAN, "outside")],
)
def test_within_is_inclusive_on_both_sides(value, verdict):
    rows = table(measured(cell(value=value)), [paper(value=0.1, tolerance=0.3)], "table1")
    assert rows.verdict.tolist() == [verdict]


def test_every_cell_of_either_side_has_its_row_the_papers_first_in_their_order():
    references = [paper(scorer="fid", statistic="set"), paper(view="recovered"), paper(view="anonymized")]
    cells = [cell(view="wrong_key"), cell(view="anonymized"), cell(view="recovered", scorer="psnr")]
    cells += [cell(view="wrong_key", dataset="afirst")]
    rows = table(measured(*cells), references, "table1")
    assert list(rows.columns) == TIDY
    assert rows[["dataset", "view", "scorer", "verdict"]].to_numpy().tolist() == [
        ["celebahq", "anonymized", "fid", "not-run"],
        ["celebahq", "recovered", "facenet_vggface2", "not-run"],
        ["celebahq", "anonymized", "facenet_vggface2", "within"],
        ["afirst", "wrong_key", "facenet_vggface2", "no-reference"],
        ["celebahq", "recovered", "psnr", "no-reference"],
        ["celebahq", "wrong_key", "facenet_vggface2", "no-reference"],
    ]
    pd.testing.assert_frame_equal(rows, table(measured(*reversed(cells)), references, "table1"))


def test_a_cell_nobody_ran_is_empty_and_a_measured_one_complete():
    rows = table(measured(cell(n=98, undefined=2)), [paper(view="recovered"), paper()], "table1")
    absent, present = rows.to_dict("records")
    assert (absent["n"], absent["undefined"], absent["verdict"]) == (0, 0, "not-run")
    assert np.isnan([absent["ours"], absent["ci_low"], absent["ci_high"]]).all()
    assert (absent["paper"], absent["tolerance"]) == (0.0755, 0.01)
    assert [present[name] for name in TIDY[7:]] == [98, 2, 0.08, 0.07, 0.09, 0.0755, 0.01, "within"]
    assert set(rows.experiment) == {"table1"}


def test_nothing_measured_and_nothing_printed():
    assert table(measured(), [paper()], "table1").verdict.tolist() == ["not-run"]
    assert table(measured(cell()), [], "table1").verdict.tolist() == ["no-reference"]


def test_a_run_by_another_protocol_is_no_reproduction_of_a_number():
    """Cells of both protocols stand in one table; the paper's number is compared with its own protocol's alone."""
    cells = [cell(protocol=protocol) for protocol in ("ours", "authors", "authors,ssim=inside")]
    rows = table(measured(*cells), [paper()], "table1")
    assert dict(zip(rows.protocol, rows.verdict, strict=True)) == {
        "authors": "within", "authors,ssim=inside": "no-reference", "ours": "no-reference",
    }  # fmt: skip


def test_lines_of_two_protocols_stand_under_each_other_and_their_notes_say_whose_they_are(shown):
    both = [cell(), cell(protocol="ours", value=0.09, notes="8 of 9 pictures")]
    markdown, _ = shown(both, [paper()])
    assert [line[:4] for line in lines_of(markdown, "### Anonymized")[1:]] == [
        ["signflip", "authors", "anonymized", "measured"],
        ["", "", "", "paper"],
        ["signflip", "ours", "anonymized", "measured"],
    ]
    assert "## celebahq: 8 of 9 pictures (signflip by ours)\n" in markdown


def test_a_protocol_is_named_after_its_file_and_what_was_set_otherwise():
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        for override, label in (
            ("protocol=ours", "ours"),
            ("protocol=authors", "authors"),
            ("protocol.ssim=whole", "ours,ssim=whole"),
            ("protocol.ssim=inside", "ours"),
        ):
            cfg = compose("config", overrides=[override], return_hydra_config=True)
            assert protocol_label(cfg.protocol, cfg.hydra.runtime.choices["protocol"]) == label
        choices = [compose("config", overrides=[f"protocol={name}"]).protocol for name in ("ours", "authors")]
    assert choices[0].keys() == choices[1].keys()
    assert all(choices[0][name] != choices[1][name] for name in choices[0] if name != "_target_")


@pytest.mark.parametrize(
    ("overrides", "label"),
    [
        (["experiment=recovery"], "authors"),
        (["experiment=recovery", "dataset.root=/data/lfw", "device=cpu", "batch_size=4", "attacks=[]", "key=password"], "authors"),
        (["experiment=recovery", "limit=2", "solver.steps=2"], "authors,limit=2,solver.steps=2"),
        (["experiment=recovery", "backbone.source=/my/models"], "authors,backbone.source"),
        (["experiment=recovery", "protocol=ours"], "ours"),
        (["experiment=recovery", "parser.region=face_hair"], "authors,parser.region=face_hair"),
        (["experiment=table1", "dataset=lfw"], "authors"),
        (["experiment=wrong_keys", "anonymizer=g2face"], "authors"),
        (["experiment=table2", "dataset.counted=distinct"], "authors,dataset.counted=distinct"),
        (["experiment=table2", "dataset.edition=plain"], "authors,dataset.edition=plain"),
        (["name=table2", "protocol=authors", "dataset=lfw"], "authors,backbone.source,parser._target_"),
        (["protocol=authors", "solver.steps=2"], "authors"),
    ],
)  # fmt: skip
def test_what_an_experiment_was_run_with_otherwise_is_in_its_protocol(overrides, label):
    """Another model, step count, or number of pictures is no reproduction, and so gets no verdict."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", overrides=overrides, return_hydra_config=True)
        choices = dict(cfg.hydra.runtime.choices)
    own = OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])
    assert measured_by(own, choices) == label
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):  # as in a command
        assert measured_by(own, choices) == label


def test_a_run_of_before_protocols_had_names_counts_as_ours(tmp_path):
    run = run_folder(tmp_path / "run")
    about = {name: value for name, value in read_about(run).items() if name != "protocol"}
    (run / "run.json").write_bytes(signed(about))
    assert row_of(read_about(run)) == {"dataset": "faces128", "protocol": "ours", "anonymizer": "signflip"}


def test_a_cell_measured_twice_is_refused():
    with pytest.raises(ValueError, match="measured twice: celebahq authors signflip anonymized facenet_vggface2 mean"):
        table(measured(cell(), cell()), [], "table1")


# The paper's numbers


@pytest.mark.parametrize("path", sorted((ROOT / "results" / "paper").glob("*.yaml")), ids=lambda path: path.stem)
def test_committed_paper_numbers_are_valid_and_plausible(path):
    references = read_paper(path)
    assert references
    for reference in references:
        assert reference.dataset in ("celebahq", "lfw")
        assert 0 < reference.tolerance < max(1, reference.paper)
        if reference.statistic.startswith("tar@"):
            assert 0 <= reference.paper <= 1


def test_rates_of_the_notebook_are_multiples_of_one_in_2864():
    for reference in read_paper(ROOT / "results" / "paper" / "table2.yaml"):
        if reference.statistic.startswith("tar@"):
            accepted = round(reference.paper * 2864)
            assert round(accepted / 2864, 4) == reference.paper


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([entry(tolerence=1)], "entry 1: unknown key tolerence; known are dataset, "),
        ([entry(), {k: v for k, v in entry(view="a").items() if k != "source"}], "entry 2: missing key source"),
        ([entry(), entry()], "2 entries for one cell: lfw authors signflip anonymized fid set"),
        ([entry(certainty="sure")], "certainty is 'sure'; expected one of seen-in-notebook"),
        ([entry(paper="0.1")], "paper is '0.1'; expected a number"),
        ([entry(paper=True)], "paper is True; expected a number"),
        ([entry(paper=NAN)], "paper is nan; expected a finite number"),
        ([entry(std=None)], "std is None; expected a number"),
        ([entry(tolerance=-1)], "tolerance is -1; expected 0 or more"),
        ([entry(scorer=3)], "scorer is 3; expected a text"),
        (["x"], "entry 1: expected keys and values, found 'x'"),
        ({"a": 1}, "expected a list of cells, found dict"),
        (None, "expected a list of cells, found NoneType"),
    ],
)
def test_a_wrong_paper_file_is_named_with_its_fault(tmp_path, entries, message):
    path = tmp_path / "table9.yaml"
    path.write_text(yaml.safe_dump(entries))
    with pytest.raises(ValueError, match=r"table9\.yaml") as error:
        read_paper(path)
    assert message in str(error.value)


# From run folders to files


def test_collect_renames_runs_to_the_experiment_and_keeps_all_rows(tmp_path):
    runs = [run_folder(tmp_path / "a", notes=["note 1", "note 2"]), run_folder(tmp_path / "b", anonymizer="blur")]
    statistics = collect(runs, "table1")
    assert list(statistics.columns) == STATISTICS
    assert statistics[["experiment", "dataset", "anonymizer", "notes"]].to_numpy().tolist() == [
        ["table1", "faces128", "signflip", "note 1\nnote 2"],
        ["table1", "faces128", "blur", ""],
    ]
    assert statistics.value.tolist() == pytest.approx([0.15, 0.15])


def test_two_runs_of_one_cell_are_refused(tmp_path):
    runs = [run_folder(tmp_path / "aaa"), run_folder(tmp_path / "bbb")]
    with pytest.raises(ValueError, match=r"aaa and .*bbb are both faces128 ours signflip"):
        collect(runs, "table1")


@pytest.mark.parametrize("missing", ["run.json", "statistics.parquet", "scores.parquet"])
def test_an_unfinished_run_is_named_and_nothing_is_written(tmp_path, missing):
    run = run_folder(tmp_path / "runs" / "abc")
    (run / missing).unlink()
    with pytest.raises(FileNotFoundError, match=rf"abc: no {missing}"):
        build("table1", [run], tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_tables_rebuild_byte_for_byte_from_committed_scores_without_the_runs(tmp_path):
    results = tmp_path / "results"
    (results / "paper").mkdir(parents=True)
    (results / "paper" / "quick.yaml").write_text(yaml.safe_dump([entry(dataset="faces128")]))
    run = run_folder(tmp_path / "run", values=(1 / 3, NAN, 2e-9))
    first = build("quick", [run], results)
    files = {path.name: path.read_bytes() for path in (results / "tables").iterdir()}
    assert sorted(files) == ["quick.csv", "quick.md", "quick.tex"]
    shutil.rmtree(run)
    shutil.rmtree(results / "tables")
    pd.testing.assert_frame_equal(first, build("quick", results=results))
    assert files == {path.name: path.read_bytes() for path in (results / "tables").iterdir()}
    assert b"\r" not in files["quick.csv"]
    scores = pd.read_parquet(results / "scores" / "quick.scores.parquet")
    assert scores[["dataset", "anonymizer", "id"]].to_numpy().tolist()[0] == ["faces128", "signflip", "face0"]
    assert np.isnan(scores.value[1])
    assert known_experiments(results) == ["quick"]


def test_methods_of_a_kind_stand_together_with_what_they_need(tmp_path):
    abouts = {
        "signflip": About("keyed", "8-bit file + header", 256, 32, "MIT", "-", "arXiv 2510.01031"),
        "blur": About("irreversible", "-", None, None, "-", "-", "deface"),
        "g2face": About("keyless", "8-bit file", None, None, "MIT", "-", "-"),
        "again": About("keyed", "8-bit file", 16, 16, "-", "-", "-"),
        "identity": About("control", "-", None, None, "-", "-", "-"),
    }
    runs = []
    for name, about in abouts.items():
        runs.append(run := run_folder(tmp_path / name, anonymizer=name))
        row = ("anonymized", "header_bytes", "mean", 2, 0, 99.6, NAN, NAN)
        statistics = pd.read_parquet(run / "statistics.parquet")
        if name == "signflip":
            statistics.loc[1] = row
            statistics.to_parquet(run / "statistics.parquet")
        changed(run, about=asdict(about))
    build("rivals", runs, tmp_path / "results")
    markdown = (tmp_path / "results" / "tables" / "rivals.md").read_text()
    lines = [
        [text.strip() for text in line.split("|")[1:-1]] for line in markdown.splitlines() if line.startswith("| ")
    ]
    needs = next(i for i, line in enumerate(lines) if line[0] == "anonymizer")
    assert lines[needs + 1 : needs + 6] == [
        ["identity", "control", "-", "-", "-", "-", "-", "-", "-"],
        ["blur", "irreversible", "-", "-", "-", "-", "-", "-", "deface"],
        ["g2face", "keyless", "8-bit file", "-", "-", "-", "MIT", "-", "-"],
        ["again", "keyed", "8-bit file", "-", "16", "16", "-", "-", "-"],
        ["signflip", "keyed", "8-bit file + header", "100", "256", "32", "MIT", "-", "arXiv 2510.01031"],
    ]
    start = next(i for i, line in enumerate(lines) if line[2:3] == ["recovered"]) - 1
    grid = [line[0] for line in lines[start : start + 9]]
    assert grid == [
        "*control*",
        "identity",
        "*irreversible*",
        "blur",
        "*keyless*",
        "g2face",
        "*keyed*",
        "again",
        "signflip",
    ]
    shutil.rmtree(tmp_path / "results" / "tables")
    build("rivals", results=tmp_path / "results")
    assert (tmp_path / "results" / "tables" / "rivals.md").read_text() == markdown


def test_methods_side_by_side_with_their_costs(tmp_path):
    results = tmp_path / "results"
    (results / "scores").mkdir(parents=True)
    measured(
        cell(scorer="detected", value=1.0),
        cell(scorer="dlib", value=0.25),
        cell(scorer="dlib", statistic="tar@far=0.001", value=0.125),
        cell(scorer="dlib", statistic="tar@far=0.001 (unfound accepted)", value=0.135),
        cell(scorer="header_bytes", value=15172.4),
        cell(scorer="psnr_face", view="recovered", value=22.5),
        cell(scorer="dlib", view="wrong_key", value=0.5, low=NAN, high=NAN),
        cell(scorer="detected", anonymizer="blur", value=0.75),
        *(cell(scorer="psnr", view="original", anonymizer=name, value=58.92) for name in ("signflip", "blur")),
    ).to_parquet(results / "scores" / "rivals.parquet")
    (results / "scores" / "rivals.meanings.csv").write_bytes(DECLARED.csv())
    (results / "scores" / "rivals.methods.csv").write_text(
        f"{','.join(METHODS)}\ncelebahq,signflip,keyed,-,256,256,-,-,-\ncelebahq,blur,irreversible,-,,,-,-,-\n"
    )
    (results / "scores" / "rivals.costs.csv").write_text(
        f"{','.join(COSTS)}\ncelebahq,authors,signflip,anonymized,8,1.2345,100,cpu,x,1\nother,authors,signflip,recovered,8,9,9,cpu,x,1\n"
    )
    build("rivals", results=results)
    markdown = (results / "tables" / "rivals.md").read_text()
    assert lines_of(markdown, "### Methods side by side") == [
        [
            "anonymizer", "protocol", "detected ↑", "dlib cosine ↓", "dlib TAR at FAR 0.001 ↓", "psnr_face, recovered ↑",
            "dlib cosine, wrong key ↓", "side bytes", "seconds to anonymize", "to recover",
        ],
        ["*irreversible*", *[""] * 9],
        ["blur", "authors", "0.7500 [0.7400, 0.7600]", "-", "-", "-", "-", "-", "-", "-"],
        ["*keyed*", *[""] * 9],
        [
            "signflip", "authors", "1.000 [0.9900, 1.010]", "0.2500 [0.2400, 0.2600]", "0.1250 [0.1150, 0.1350]",
            "22.50 [22.49, 22.51]", "0.5000", "15172", "1.23", "-",
        ],
    ]  # fmt: skip
    clean = lines_of(markdown, "### Clean pictures")  # the same for both: said once
    assert clean[1:] == [["all methods", "authors", "original", "measured", "100", "0", "58.92 [58.91, 58.93]"]]


def test_originals_that_differ_are_all_shown(shown):
    cells = [
        cell(scorer="psnr", view="original", anonymizer=name, n=n) for name, n in (("signflip", 100), ("blur", 99))
    ]
    markdown, _ = shown(cells)
    assert [line[0] for line in lines_of(markdown, "### Clean pictures")[1:]] == ["blur", "signflip"]


def test_csv_prints_six_significant_digits(tmp_path):
    run = run_folder(tmp_path / "run", values=(1 / 3, 1 / 3))
    build("quick", [run], tmp_path)
    row = (tmp_path / "tables" / "quick.csv").read_text().splitlines()[1]
    assert row == "quick,faces128,ours,signflip,recovered,psnr,mean,2,0,0.333333,0.333333,0.333333,,,no-reference"


@pytest.mark.parametrize("experiment", known_experiments(ROOT / "results"))
def test_committed_tables_are_up_to_date(experiment, tmp_path):
    for folder in ("paper", "scores"):
        if (ROOT / "results" / folder).is_dir():
            shutil.copytree(ROOT / "results" / folder, tmp_path / folder)
    build(experiment, results=tmp_path)
    for suffix in ("md", "tex", "csv"):
        committed = ROOT / "results" / "tables" / f"{experiment}.{suffix}"
        assert committed.read_text() == (tmp_path / "tables" / committed.name).read_text(), (
            "run `make tables` and commit"
        )


def test_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_folder(tmp_path / "results" / "runs" / "abc")
    for runs in ("results/runs/abc", "results/runs"):  # a run folder, and a folder of them
        main(["quick", "--runs", runs, "--results", "results"])
        assert "results/tables/quick.md: The paper has no number for any of the 1 cells." in capsys.readouterr().out
        (tmp_path / "results" / "tables" / "quick.md").unlink()
    main(["--results", "results"])
    assert (tmp_path / "results" / "tables" / "quick.md").is_file()
    with pytest.raises(SystemExit, match=r"tables: nothing: .*python -m experiments\.run experiment=nothing"):
        main(["nothing"])
    with pytest.raises(
        SystemExit, match=r"quick is no committed experiment: conf/experiment/quick\.yaml does not exist"
    ):
        main(["quick", "--runs", "results/runs/abc"])
    with pytest.raises(SystemExit):
        main(["--runs", "results/runs/abc"])
    assert "--runs needs the one experiment" in capsys.readouterr().err


# For readers


def lines_of(markdown: str, heading: str) -> list[list[str]]:
    """The cells of the grid below a heading, header first."""
    text = markdown.split(heading, 1)[1]
    grid = [line for line in text.split("\n#")[0].splitlines() if line.startswith("|")]
    return [[part.strip() for part in line.strip("|").split("|")] for line in grid if not line.startswith("|:")]


@pytest.fixture
def shown(tmp_path):
    """The Markdown and LaTeX of some cells, through the files."""

    def show(cells: list[dict], references: list[Reference] = (), declared: Meanings = DECLARED) -> tuple[str, str]:
        (tmp_path / "scores").mkdir()
        measured(*cells).to_parquet(tmp_path / "scores" / "table1.parquet")
        (tmp_path / "scores" / "table1.meanings.csv").write_bytes(declared.csv())
        if references:
            (tmp_path / "paper").mkdir()
            texts = [{k: v for k, v in vars(r).items() if v is not None} for r in references]
            (tmp_path / "paper" / "table1.yaml").write_text(yaml.safe_dump(texts))
        build("table1", results=tmp_path)
        return tuple((tmp_path / "tables" / f"table1.{suffix}").read_text() for suffix in ("md", "tex"))

    return show


def test_markdown_reads_like_a_papers_table(shown):
    cells = [
        cell(value=0.0781, n=98, undefined=2),
        cell(statistic="std", value=0.1636),
        cell(scorer="arcface_r50", value=0.5),
        cell(anonymizer="blur", value=0.4),
    ]
    markdown, _ = shown(cells, [paper(std=0.161), paper(scorer="arcface_r50"), paper(scorer="adaface_vit", value=0.05)])
    grid = lines_of(markdown, "### Anonymized: cosine similarity to the original, mean ± standard deviation")
    assert grid == [
        ["anonymizer", "protocol", "view", "", "n", "undefined", "facenet_vggface2 ↓", "arcface_r50 ↓", "adaface_vit ↓"],
        [
            "signflip", "authors", "anonymized", "measured", "98 to 100", "0 to 2",
            "0.07810 ± 0.1636 [0.06810, 0.08810]", "0.5000 [0.4900, 0.5100]", "not run",
        ],
        ["", "", "", "paper", "", "", "0.0755 ± 0.161 (within)", "0.0755 (outside)", "0.05"],
        ["blur", "authors", "anonymized", "measured", "100", "0", "0.4000 [0.3900, 0.4100]", "", ""],
    ]  # fmt: skip
    assert "Of 3 published numbers 1 within tolerance, 1 outside, 1 not run." in markdown
    assert "standard deviation\n\n|" in markdown
    assert markdown.count("### ") == 1  # the standard deviation stands behind the mean, not in a grid of its own
    assert "unconfirmed" in markdown.split("## Where the published numbers are from")[1]


def test_every_cell_is_shown_in_some_grid(shown):
    views = ["original", "anonymized", "recovered", "recovered_float", "jpeg75", "wrong_key", "nobody declared it"]
    scorers = ["psnr", "arcface_r50", "fid"]
    cells = [
        cell(view=view, scorer=scorer, statistic=statistic, value=100 + i * 10 + j + k / 10)
        for i, view in enumerate(views)
        for j, scorer in enumerate(scorers)
        for k, statistic in enumerate(["mean", "tar@far=0.001", "threshold@far=0.001"])
    ]
    markdown, latex = shown(cells)
    for row in cells:
        assert markdown.count(f" {row['value']:.1f} [") == 1
        assert latex.count(f" {row['value']:.1f} [") == 1


def test_an_undefined_number_and_a_missing_interval(shown):
    undefined = cell(value=NAN, n=0, undefined=100)
    markdown, _ = shown([undefined, cell(scorer="fid", statistic="set", value=12.5, low=NAN, high=NAN)])
    assert lines_of(markdown, "### Anonymized: cosine")[1] == [
        "signflip",
        "authors",
        "anonymized",
        "measured",
        "0",
        "100",
        "undefined",
    ]
    assert lines_of(markdown, "### Anonymized: picture measures, over the whole set")[1][-1] == "12.50"


def test_titles_carry_every_note_and_say_whom_it_is_about(shown):
    both, one = "random weights stand in for LDM-FFHQ", "8 of 30,000 pictures"
    cells = [cell(notes=f"{both}\n{one}"), cell(anonymizer="blur", notes=both), cell(dataset="lfw")]
    markdown, latex = shown(cells)
    assert f"## celebahq: {both}; {one} (signflip)\n" in markdown
    assert "## lfw\n" in markdown
    assert latex.count(f"{both}; {one} (signflip)") == latex.count("\\caption") - 1


TAR, EER = Summary("TAR", "alike"), Summary(direction="apart")


@pytest.mark.parametrize(
    ("role", "measure", "summary", "expected"),
    [
        ("anonymized", COSINE, Summary(), "↓"),
        ("recovered", COSINE, Summary(), "↑"),
        ("attacked", COSINE, TAR, "↓"),
        ("clean", COSINE, TAR, "↑"),
        ("anonymized", COSINE, EER, "↑"),
        ("recovered", COSINE, EER, "↓"),
        ("anonymized", COSINE, Summary(direction="lower"), "↓"),
        ("recovered", COSINE, Summary(direction="none"), ""),
        ("recovered", PSNR, Summary(), "↑"),
        ("clean", MAE, Summary(), "↓"),
        ("anonymized", PSNR, Summary(), ""),
        ("attacked", MAE, Summary(), ""),
        ("anonymized", Measure("picture", "", "lower"), Summary(), "↓"),
        ("anonymized", Measure("cost", "bytes", "lower"), Summary(), "↓"),
        ("recovered", Measure("detection", "", "higher"), Summary(), "↑"),
        ("recovered", PSNR, Summary("standard deviation", "none"), ""),
        ("noise", Measure("noise"), Summary(), ""),
        ("", COSINE, Summary(), ""),
        ("recovered", None, Summary(), ""),
        ("recovered", PSNR, None, ""),
    ],
)
def test_arrows(role, measure, summary, expected):
    assert arrow(role, measure, summary) == expected


def test_names_say_nothing_and_declarations_all(shown):
    """A recognizer called edgeface, a measure of any name, a view called resize75: each where it says that it belongs."""
    declared = DECLARED | Meanings(
        {"resize75": View("recovered", "resized to 75 %"), "jpeg_of_a_wrong_key": View("attacked")},
        {"edgeface": COSINE, "dlib_runtime": Measure("cost", "s", "lower", "time of a picture"), "anything": MAE},
    )
    markdown, latex = shown(
        [
            cell(view=view, scorer=scorer)
            for view in ("anonymized", "resize75", "jpeg_of_a_wrong_key")
            for scorer in ("edgeface", "dlib_runtime", "anything")
        ],
        declared=declared,
    )
    alike, others = "cosine similarity to the original, mean", "picture measures, mean"
    for place, view, edgeface, anything in (
        ("Anonymized", "anonymized", "edgeface ↓", "anything"),
        ("Recovered with the right key", "resized to 75 %", "edgeface ↑", "anything ↓"),
        ("Attacks and wrong keys", "jpeg_of_a_wrong_key", "edgeface ↓", "anything"),
    ):
        header, row = lines_of(markdown, f"### {place}: {alike}")
        assert (row[2], header[6:]) == (view, [edgeface])
        header, row = lines_of(markdown, f"### {place}: {others}")
        assert (row[2], header[6:]) == (view, [anything, "dlib_runtime ↓"])
    assert "dlib_runtime: time of a picture, in s" in markdown
    assert "Not declared" not in markdown
    assert r"resized to 75 \%" in latex


def test_names_that_nobody_declared_come_last_without_arrows_and_are_named(shown):
    cells = [cell(view=view, scorer=scorer) for view in ("recovered", "jpeg75") for scorer in ("psnr", "arcface_new")]
    markdown, _ = shown([*cells, cell(view="recovered", statistic="of its own")])
    assert "Not declared, and so without an arrow: jpeg75, arcface_new, of its own.\n" in markdown
    assert [line.split(" ", 1)[1] for line in markdown.splitlines() if line.startswith("### ")] == [
        "Recovered with the right key: picture measures, mean",
        "Recovered with the right key: of its own",
        "Views of no declared role: picture measures, mean",
    ]
    assert lines_of(markdown, "### Recovered with the right key: picture")[0][6:] == ["arcface_new", "psnr ↑"]
    assert lines_of(markdown, "### Views of no declared role")[0][6:] == ["arcface_new", "psnr"]


def test_what_runs_declare_is_committed_with_their_scores(tmp_path):
    run, other = (run_folder(tmp_path / name, anonymizer=name) for name in ("a", "b"))
    (run / "meanings.csv").write_bytes(Meanings({"recovered": View("recovered")}, {"psnr": MAE}).csv())
    (other / "meanings.csv").write_bytes(Meanings({"near": View("attacked")}, {"psnr": PSNR}).csv())
    changed(run)
    changed(other)
    build("quick", [run, other], tmp_path / "results")
    kept = read_meanings(tmp_path / "results" / "scores" / "quick.meanings.csv")
    assert kept == Meanings({"near": View("attacked"), "recovered": View("recovered")}, {"psnr": PSNR})  # the last word
    assert "psnr: peak signal-to-noise ratio, in dB" in (tmp_path / "results" / "tables" / "quick.md").read_text()


def test_a_bar_in_a_name_is_no_border_in_markdown(shown):
    markdown, _ = shown([cell(scorer="layout of |z|")])
    assert r"| layout of \|z\|" in markdown


def test_latex_escapes_what_would_break_it(shown):
    _, latex = shown([cell(notes="50% of {a}_b & c # $d ~ ^ \\x")])
    caption = next(line for line in latex.splitlines() if "caption" in line)
    assert r"50\% of \{a\}\_b \& c \# \$d \textasciitilde{} \^{} \textbackslash{}x" in caption
    assert r"facenet\_vggface2 $\downarrow$" in latex
    assert latex.isascii()


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="pdflatex is not installed")
def test_latex_compiles(shown, tmp_path):
    _, latex = shown([cell(notes="50% of a_b"), cell(statistic="std")], [paper(), paper(view="recovered", std=0.1)])
    document = r"\documentclass{article}\usepackage{booktabs,graphicx}\begin{document}%s\end{document}"
    (tmp_path / "t.tex").write_text(document % latex)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "t.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
