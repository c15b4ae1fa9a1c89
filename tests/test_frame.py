"""What holds of the repository as a whole, whoever changes it: read from the files that git tracks."""

import ast
import importlib.util
import io
import os
import re
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

LAYOUT = [
    ".ci/run", ".gitignore", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md",
    "benchmarks", "conf", "constraints.txt", "docs", "experiments", "keyanon", "pyproject.toml", "results/README.md",
    "results/paper", "results/tables", "tests",
]  # fmt: skip
NOT_FOR_THE_LIBRARY = {"benchmarks", "experiments", "hydra", "omegaconf", "pandas", "wandb"}
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "results/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "keyanon" / "assets").glob("*/README.md")),
]
# Faces that a model drew, and what methods make of these: the bundled ones and no others.
SYNTHETIC = ("keyanon/assets/", "tests/published/", "docs/images/example.webp")
JUNK_DRAWERS = {"common", "helper", "helpers", "misc", "util", "utils"}
BINARY = {".onnx", ".parquet", ".png", ".safetensors", ".webp"}
PICTURES = {".bmp", ".gif", ".jpeg", ".jpg", ".pdf", ".png", ".svg", ".tif", ".tiff", ".webp"}
PICTURE_MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"II*\0", b"MM\0*", b"BM", b"%PDF")
PICKLES = {".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth"}
PICKLE_MAGIC = tuple(bytes([0x80, protocol]) for protocol in range(2, 6))
MACHINE_PATH = re.compile(rb"(?<![\w.:~/-])/(?:home|mnt|opt|root|scratch|srv|Users|work)/[\w.][^\s\"']*")
REGISTRY = re.compile(rb"(?:pypi|pythonhosted|npmjs|debian|ubuntu)\.(?:com|org)\b|registry\.(?:npm|yarn)\w*\.")


def tracked() -> list[Path]:
    if not (ROOT / ".git").exists():
        return []
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    paths = [ROOT / name for name in listing.split("\0") if name]
    return [path for path in paths if path.is_file()]


FILES = tracked()
needs_git = pytest.mark.skipif(not FILES, reason="not a git checkout")


def names(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


def targets(makefile: str) -> dict[str, str]:
    """The help text of every target that is written out in a Makefile."""
    rules = re.findall(r"^([a-z][\w-]*):(?!=)([^\n]*)$", makefile, re.MULTILINE)
    return {name: rule.partition("## ")[2] for name, rule in rules}


def code(text: str) -> str:
    """What a document sets as code: indented lines, fenced ones, and what is between backticks."""
    return "\n".join(re.findall(r"^ {4}.*$|^```[\s\S]*?^```|`[^`\n]+`", text, re.MULTILINE))


def library_imports(source: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.partition(".")[0])
    return found


def holds_pickle(path: Path) -> bool:
    data = path.read_bytes()
    if path.suffix in PICKLES or data.startswith(PICKLE_MAGIC):
        return True
    if data.startswith(b"PK"):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return any(Path(name).suffix in PICKLES for name in archive.namelist())
    return False


@pytest.mark.parametrize("name", LAYOUT)
def test_layout(name):
    assert (ROOT / name).exists()


def test_no_junk_drawers():
    source = [path for folder in ("keyanon", "experiments") for path in (ROOT / folder).rglob("*.py")]
    assert source
    assert [path for path in names(source) if JUNK_DRAWERS & set(Path(path).with_suffix("").parts)] == []


NAMING_A_DEVICE = {"settings.py", "diffusion/graphs.py"}  # where `auto` is told, and what only such a device can do


@pytest.mark.parametrize("path", sorted((ROOT / "keyanon").rglob("*.py")), ids=lambda path: path.name)
def test_the_library_names_no_device_and_knows_no_harness(path):
    source = path.read_text("utf-8")
    assert ("cuda" in source) == (path.relative_to(ROOT / "keyanon").as_posix() in NAMING_A_DEVICE)
    assert library_imports(source) & NOT_FOR_THE_LIBRARY == set()


def test_the_import_check_sees_every_form():
    source = "import hydra.core as h\ndef f():\n    from pandas.api import x\nfrom . import wandb\nimport os, wandb"
    assert library_imports(source) == {"hydra", "pandas", "os", "wandb"}


def test_every_make_target_has_help():
    helps = targets((ROOT / "Makefile").read_text())
    wanted = {
        "help",
        "quickstart",
        "test",
        "check",
        "tables",
        "reproduce-table1",
        "reproduce-table2",
        "reproduce-all",
        "bench",
    }
    assert wanted <= helps.keys()
    assert [name for name, text in helps.items() if not text.strip()] == []


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
def test_make_without_a_target_prints_the_help():
    printed = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name, text in targets((ROOT / "Makefile").read_text()).items():
        assert re.search(rf"^{re.escape(name)} +{re.escape(text)}$", printed, re.MULTILINE)


def test_ci_is_executable_and_stops_at_the_first_failure():
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert "set -euo pipefail" in (ROOT / ".ci" / "run").read_text()


@needs_git
def test_no_path_of_a_machine_and_no_registry_is_tracked():
    found = {}
    for path in FILES:
        data = path.read_bytes()
        if path.suffix == ".safetensors":  # text is in the header alone, and the numbers are long to search
            data = data[: 8 + int.from_bytes(data[:8], "little")]
        if hits := MACHINE_PATH.findall(data) + [match.group() for match in REGISTRY.finditer(data)]:
            found[str(path.relative_to(ROOT))] = hits
    assert found == {}


@pytest.mark.parametrize("bad", ["x = '/" + "home/me/faces'", "see (/" + "root/.cache/x)", "root: /" + "work/main"])
def test_the_path_check_sees_a_machine_path(bad):
    assert MACHINE_PATH.search(bad.encode())


@pytest.mark.parametrize("good", ["../work/x", "https://host.org/home/page", "results/work/a", "~/home/x", "a/opt/b"])
def test_the_path_check_lets_others_pass(good):
    assert not MACHINE_PATH.search(good.encode())


@needs_git
def test_no_pickle_is_tracked():
    assert names([path for path in FILES if holds_pickle(path)]) == []


@needs_git
def test_the_only_pictures_tracked_are_synthetic_faces_and_plots():
    pictures = [
        path for path in FILES if path.suffix.lower() in PICTURES or path.read_bytes().startswith(PICTURE_MAGIC)
    ]
    plots = [path for path in pictures if path.suffix == ".svg" and path.parent == ROOT / "results" / "plots"]
    assert [path for path in names(set(pictures) - set(plots)) if not path.startswith(SYNTHETIC)] == []
    # A plot of numbers is lines and letters; a face in one would be an embedded image.
    assert [path for path in names(plots) if b"<image" in (ROOT / path).read_bytes()] == []


@needs_git
def test_nothing_generated_is_tracked():
    generated = re.compile(
        r"(^|/)(__pycache__|\.ipynb_checkpoints|[^/]+\.egg-info|wandb|outputs|multirun)/|^results/runs/|\.py[co]$"
    )
    assert [path for path in names(FILES) if generated.search(path) and not path.startswith("conf/")] == []


@needs_git
def test_text_is_utf_8_with_unix_line_ends():
    faults = {}
    for path in FILES:
        data = path.read_bytes()
        if path.suffix in BINARY or not data:
            continue
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            faults[path.name] = str(error)
            continue
        if "\r" in text or text.startswith("\ufeff") or not text.endswith("\n"):
            faults[path.name] = "carriage return, byte order mark or no newline at the end"
    assert faults == {}


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 120


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_of_a_document_leads_somewhere(document):
    links = re.findall(r"\]\(([^)\s]+)\)", document.read_text("utf-8"))
    places = [link.partition("#")[0] for link in links if not re.match(r"https?:", link)]
    assert [place for place in places if place and not (document.parent / place).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_of_a_document_exists(document):
    written = code(document.read_text("utf-8"))
    modules = set(re.findall(r"python -m ([\w.]+\w)", written))
    assert [module for module in sorted(modules) if importlib.util.find_spec(module) is None] == []
    makefile = targets((ROOT / "Makefile").read_text())
    papers, experiments = (
        {p.stem for p in ROOT.glob(f"{folder}/*.yaml")} for folder in ("results/paper", "conf/experiment")
    )
    known = makefile.keys() | {f"reproduce-{name}" for name in papers & experiments}
    assert set(re.findall(r"(?:^|`|&& )(?: {4})?make ([a-z][\w-]*)", written, re.MULTILINE)) - known == set()


def test_the_command_check_sees_code_alone():
    text = "We make tea.\n    python -m a.b x=1\n    make test && make check\n`make bench` or `python -m c`.\n"
    assert code(text).splitlines() == [
        "    python -m a.b x=1",
        "    make test && make check",
        "`make bench`",
        "`python -m c`",
    ]
