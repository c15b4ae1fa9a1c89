"""Who may import whom, read from the sources; and what a command must not import before it has read its arguments."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Of the library. A room imports only rooms above it; the first and the last line are files.
ROOMS = [
    {
        "sheets",
        "errors",
        "version",
        "context",
        "torchvision_shim",
        "types",
        "finite",
        "batching",
        "settings",
        "weights",
    },
    {"channel"},
    {"faces"},
    {"diffusion"},
    {"measures"},
    {"methods"},
    {"attacks"},
    {"parts", "sources", "run_folder", "runner"},
]
MOVED = {"block_dct"}  # the old place of a class, which the files of earlier models name
COMMANDS = {
    "run",
    "tables",
    "security",
    "pairs",
    "claims",
    "gaussianity",
    "diversity",
    "train",
    "train_gpu",
    "train_proface_s",
    "faces",
    "keys",
    "fetch",
    "brought",
}
LIGHT = [
    "keyanon",
    "keyanon.errors",
    "keyanon.settings",
    "keyanon.weights",
    "keyanon.channel.keys",
    "keyanon.context",
    "experiments.keys",
    "experiments.run",
    "experiments.harness.command",
    "experiments.harness.preflight",
    "experiments.harness.shards",
]
HEAVY = {"torch", "torchvision", "numpy", "pandas", "scipy", "matplotlib", "diffusers", "transformers", "insightface"}


def imports(source: str, package: str) -> set[str]:
    """The parts of `package` that a module imports, wherever in it: a for `package.a.b`."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        parts = [module.split(".") for module in modules]
        found |= {part[1] for part in parts if part[0] == package and len(part) > 1}
    return found


def room(name: str) -> int:
    """Its place in the order of rooms."""
    return next(place for place, names in enumerate(ROOMS) if name in names)


def part_of(path: Path, package: str) -> str:
    return path.relative_to(ROOT / package).with_suffix("").parts[0]


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import keyanon", set()),
        ("import keyanon.channel.keys as k, os, keyanonymous.faces", {"channel"}),
        ("from keyanon import runner, weights", {"runner", "weights"}),
        ("def f():\n    from keyanon.faces.onnx import open_onnx", {"faces"}),
    ],
)
def test_the_check_sees_every_form(source, found):
    assert imports(source, "keyanon") == found


def test_every_part_of_the_library_has_its_place():
    parts = {part_of(path, "keyanon") for path in (ROOT / "keyanon").rglob("*.py")}
    assert parts - {"__init__"} - MOVED <= set.union(*ROOMS)


@pytest.mark.parametrize("path", sorted((ROOT / "keyanon").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_room_imports_only_rooms_above_it(path):
    own = part_of(path, "keyanon")
    if own in MOVED | {"__init__"}:
        return
    needed = imports(path.read_text("utf-8"), "keyanon")
    assert {name for name in needed if room(name) > room(own)} == set()
    assert not needed & MOVED


@pytest.mark.parametrize(
    "path", sorted((ROOT / "experiments").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT))
)
def test_no_command_is_imported(path):
    assert imports(path.read_text("utf-8"), "experiments") & COMMANDS == set()


def test_what_a_command_needs_to_answer_wrong_arguments_is_light():
    lines = [
        "import sys",
        *(f"import {name}" for name in LIGHT),
        "print(*{name.partition('.')[0] for name in sys.modules})",
    ]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert set(done.stdout.split()) & HEAVY == set()
