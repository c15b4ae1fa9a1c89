import subprocess
import sys
from importlib import metadata

import pytest
import torch

from keyanon import torchvision_shim
from keyanon.torchvision_shim import nms


def brute_force(boxes: list[list[float]], scores: list[float], threshold: float) -> list[int]:
    """torchvision.ops.nms as documented: drop a box that overlaps a kept, better one by more than the threshold."""

    def area(box: list[float]) -> float:
        return (box[2] - box[0]) * (box[3] - box[1])

    def overlap(a: list[float], b: list[float]) -> float:
        width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
        shared = max(width, 0) * max(height, 0)
        union = area(a) + area(b) - shared
        return shared / union if union else float("nan")

    kept: list[int] = []
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        if not any(overlap(boxes[i], boxes[j]) > threshold for j in kept):
            kept.append(i)
    return kept


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_nms_agrees_with_brute_force(seed, threshold):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(60, 2, generator=generator, dtype=torch.float64) * 20
    size = torch.rand(60, 2, generator=generator, dtype=torch.float64) * 15 + 1
    boxes, scores = torch.cat([corner, corner + size], 1), torch.rand(60, generator=generator, dtype=torch.float64)
    kept = nms(boxes, scores, threshold)
    assert kept.dtype == torch.int64
    assert kept.tolist() == brute_force(boxes.tolist(), scores.tolist(), threshold)


def test_an_overlap_equal_to_the_threshold_is_kept():
    boxes = torch.tensor([[0.0, 0, 2, 2], [0, 0, 2, 1]])  # overlap 1/2
    scores = torch.tensor([0.9, 0.8])
    assert nms(boxes, scores, 0.5).tolist() == [0, 1]
    assert nms(boxes, scores, 0.4999).tolist() == [0]


def test_boxes_without_area_suppress_nothing():
    boxes = torch.tensor([[1.0, 1, 1, 1], [1, 1, 1, 1]])  # overlap 0 / 0, which is not greater than any threshold
    assert nms(boxes, torch.tensor([0.9, 0.8]), 0.5).tolist() == [0, 1]


def test_no_boxes():
    kept = nms(torch.zeros(0, 4), torch.zeros(0), 0.5)
    assert (kept.shape, kept.dtype) == ((0,), torch.int64)


def test_best_first_and_the_first_of_equals():
    boxes = torch.tensor([[0.0, 0, 1, 1], [5, 5, 6, 6], [0, 0, 1, 1]])
    assert nms(boxes, torch.tensor([0.5, 0.9, 0.5]), 0.5).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("torch_version", "torchvision_version", "differ"),
    [
        ("2.13.0+cpu", "0.28.0", True),
        ("2.13.0+cpu", "0.28.0+cpu", False),
        ("2.13.0", "0.28.0", False),
        ("2.13.0+cu130", "0.28.0+cu130", False),
    ],
)
def test_builds_differ_only_for_cpu_torch_beside_the_plain_wheel(
    monkeypatch, torch_version, torchvision_version, differ
):
    versions = {"torch": torch_version, "torchvision": torchvision_version}
    monkeypatch.setattr(metadata, "version", versions.__getitem__)
    assert torchvision_shim.builds_differ() is differ


def test_nothing_is_declared_where_torchvision_is_absent(monkeypatch):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    assert torchvision_shim.builds_differ() is False


def test_with_matching_builds_the_ordinary_loader_is_found(monkeypatch):
    monkeypatch.setattr(torchvision_shim, "builds_differ", lambda: False)
    assert torchvision_shim.Finder().find_spec("torchvision", None) is None
    monkeypatch.setattr(torchvision_shim, "builds_differ", lambda: True)
    assert isinstance(torchvision_shim.Finder().find_spec("torchvision", None).loader, torchvision_shim.Loader)
    assert torchvision_shim.Finder().find_spec("torch", None) is None


def test_install_twice_changes_nothing():
    before = list(sys.meta_path)  # `import keyanon` has installed it
    torchvision_shim.install()
    assert sys.meta_path == before
    assert sum(isinstance(finder, torchvision_shim.Finder) for finder in before) == 1


def test_the_packages_behind_it_import_and_use_it():
    code = """
import torch
try:
    import torchmetrics.image  # before the shim: with differing builds this fails and leaves half a torchvision behind
except (ImportError, RuntimeError):
    pass
import keyanon
import diffusers, torchmetrics.image, torchvision
from diffusers import UNet2DModel
boxes = torch.tensor([[0.0, 0, 2, 2], [0, 0, 2, 1.9], [5, 5, 6, 6]])
print(torchvision.ops.nms(boxes, torch.tensor([0.8, 0.9, 0.7]), 0.5).tolist())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[1, 2]"


def test_it_imports_nothing_before_torchvision_is_asked_for():
    code = """
import sys, keyanon, importlib.util
importlib.util.find_spec("torchvision")  # as packages do that can live without it
assert not {"torch", "torchvision"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
