"""Where a number comes from: what a part of a run is made of, the signature that names a folder, the record beside results."""

import ast
import hashlib
import importlib.util
import json
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from experiments.harness.preflight import walk
from keyanon.sources import sha256
from keyanon.types import Model, NeedsWeights, Source, TakesWeights
from keyanon.weights import resolve

# What decides where and how fast a picture is made, or where a thing lies, but not how it looks.
PRESENTATION = {"device", "root", "source", "subfolder", "revision", "licence", "weights", "names"}
RUNNER = "keyanon.runner"  # hands everything its pictures; of its own imports a part needs what it imports itself
OURS = {"keyanon", "experiments"}
PACKAGES = (
    "keyanon",
    "torch",
    "diffusers",
    "torchmetrics",
    "onnxruntime",
    "facenet-pytorch",
    "insightface",
    "numpy",
    "pillow",
    "scipy",
    "scikit-image",
    "dlib-bin",
    "dlib",
    "face_recognition_models",
    "torchvision",
    "opencv-python",
    "opencv-python-headless",
    "transformers",
    "safetensors",
)


def signature(question: Mapping[str, Any]) -> str:
    """8 hex digits of what was asked: the same question gives the same folder, and is resumed."""

    def decisive(node: Any) -> Any:
        if isinstance(node, Mapping):
            return {name: decisive(value) for name, value in node.items() if name not in PRESENTATION}
        return [decisive(value) for value in node] if isinstance(node, list) else node

    return hashlib.sha256(json.dumps(decisive(question), sort_keys=True).encode()).hexdigest()[:8]


def made_of(settings: Any, *parts: Any) -> dict[str, Any]:
    """What decides the outcome of some parts: their `settings`, the weights they run on, the code that they are, its packages."""
    return {
        "settings": settings,
        "sha256": weights_of(parts),
        "code": {**code_of(parts), RUNNER: digest_of(RUNNER)},
        "packages": {name: version for name, version in packages().items() if name != "keyanon"},
    }


def digest_of(name: str) -> str:
    """The digest of one of our own modules."""
    read = module(name)
    assert read is not None, name
    return read[0]


def weights_of(parts: Iterable[Any]) -> list[str | None]:
    """SHA-256 of all weights that parts run on, however deep in them."""
    found: dict[str | None, None] = {}
    for part in walk(list(parts)):
        if isinstance(part, Model):
            found[part.sha256] = None
        if isinstance(part, NeedsWeights):
            for place, card in enumerate(part.cards()):
                path = part.weights if place == 0 and isinstance(part, TakesWeights) else None
                found[card.sha256 or sha256_of(resolve(card, path))] = None
    return list(found)


def sha256_of(path: Path) -> str:
    """Of a file, or of all files in a folder."""
    files = sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]
    return signature({str(file.relative_to(path)): sha256(Source(file)) for file in files})


def code_of(parts: Iterable[Any]) -> dict[str, str]:
    """Digests of the modules that parts are in, and of those that these import from their own package, by name.

    What a comment, a docstring or a line break changes counts for nothing. Packages that are installed have versions instead.
    """
    found: dict[str, str] = {}
    left = [module_of(part) for part in walk(list(parts))]
    while left:
        if (name := left.pop()) not in found and (read := module(name)) is not None:
            found[name], imported = read
            left += imported
    return dict(sorted(found.items()))


def module_of(part: Any) -> str:
    """The module of a part's class, or of the function that it is."""
    while isinstance(part, partial):
        part = part.func
    return str(part.__module__ if hasattr(part, "__qualname__") else type(part).__module__)


@cache
def module(name: str) -> tuple[str, list[str]] | None:
    """The digest of a module's code and what it imports from its own package; None of packages that are installed."""
    package = name.partition(".")[0]
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        return None
    installed = {"site-packages", "dist-packages"} & set(Path(spec.origin).parts)
    if package in sys.stdlib_module_names or (installed and package not in OURS):
        return None
    tree = Undocumented().visit(ast.parse(Path(spec.origin).read_bytes()))
    imported: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            imported += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    ours = [each for each in imported if each.partition(".")[0] == package]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:16], ours


class Undocumented(ast.NodeTransformer):
    """Takes docstrings out, and what only type checkers import."""

    def visit(self, node: ast.AST) -> Any:
        body = getattr(node, "body", None)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and body:
            first = body[0]
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                node.body = body[1:] or [ast.Pass()]
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return None
        return self.generic_visit(node)


def record() -> dict[str, Any]:
    """Versions and machine; no path, no user, no host name."""
    return {
        "commit": commit(),
        "python": platform.python_version(),
        "packages": packages(),
        "processor": platform.machine(),
        "accelerator": torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "none",  # type: ignore[union-attr]
        "threads": torch.get_num_threads(),
    }


@cache
def packages() -> dict[str, str]:
    """The versions of those of PACKAGES that are installed."""
    found: dict[str, str] = {}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def commit() -> str:
    """The git commit, with "+" for local changes; "unknown" outside a checkout."""
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        dirty = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if dirty.strip() else "")
