"""Where a number comes from: the signature that names a run folder, and the record that lies beside its results."""

import hashlib
import json
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import torch

# What decides where and how fast a picture is made, or where a thing lies, but not how it looks.
PRESENTATION = {"device", "root", "source", "subfolder", "revision", "licence", "weights", "names"}
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
)


def signature(question: Mapping[str, Any]) -> str:
    """8 hex digits of what was asked: the same question gives the same folder, and is resumed."""

    def decisive(node: Any) -> Any:
        if isinstance(node, Mapping):
            return {name: decisive(value) for name, value in node.items() if name not in PRESENTATION}
        return [decisive(value) for value in node] if isinstance(node, list) else node

    return hashlib.sha256(json.dumps(decisive(question), sort_keys=True).encode()).hexdigest()[:8]


def record() -> dict[str, Any]:
    """Versions and machine; no path, no user, no host name."""
    return {
        "commit": commit(),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in PACKAGES if installed(name)},
        "processor": platform.machine(),
        "accelerator": torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "none",  # type: ignore[union-attr]
        "threads": torch.get_num_threads(),
    }


def installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def commit() -> str:
    """The git commit, with "+" for local changes; "unknown" outside a checkout."""
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        dirty = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if dirty.strip() else "")
