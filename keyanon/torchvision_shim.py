"""Make PyPI's torchvision importable beside a CPU build of torch.

PyPI serves one torchvision wheel, linked to CUDA. Beside CPU torch its compiled operators cannot load, `import torchvision`
raises "operator torchvision::nms does not exist", and with it `diffusers`, `torchmetrics`, `transformers` and `facenet_pytorch`
fail to import (pytorch/vision#9085). The only operator this project needs is non-maximum suppression, so we declare it
with a plain torch kernel when torchvision is first imported. With matching builds this module does nothing, and neither torch nor
torchvision is imported by it before somebody else asks for torchvision.
"""

import sys
from importlib import metadata
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_library: "torch.library.Library | None" = None  # torch forgets the operators when this is collected


def builds_differ() -> bool:
    """True where torch is a CPU build and torchvision is not (read from the version's local part; nothing is imported)."""
    try:
        vision = metadata.version("torchvision")
    except metadata.PackageNotFoundError:
        return False
    return "+" not in vision and metadata.version("torch").endswith("+cpu")


def nms(boxes: "torch.Tensor", scores: "torch.Tensor", iou_threshold: float) -> "torch.Tensor":
    """Indices (int64, best first) of the boxes (n 4: x1 y1 x2 y2) kept by greedy suppression; torchvision.ops.nms' contract."""
    import torch

    x1, y1, x2, y2 = boxes.unbind(1)
    areas = (x2 - x1) * (y2 - y1)
    order = scores.sort(descending=True, stable=True).indices
    keep: list[int] = []
    while order.numel() > 0:
        best, rest = order[0], order[1:]
        keep.append(int(best))
        width = (torch.minimum(x2[best], x2[rest]) - torch.maximum(x1[best], x1[rest])).clamp(min=0)
        height = (torch.minimum(y2[best], y2[rest]) - torch.maximum(y1[best], y1[rest])).clamp(min=0)
        overlap = width * height
        # 0 / 0 of two boxes without area is no overlap: not above the threshold
        order = rest[~(overlap / (areas[best] + areas[rest] - overlap) > iou_threshold)]
    return torch.tensor(keep, dtype=torch.int64, device=boxes.device)


def declare() -> None:
    """Declare the operators that torchvision's Python code asks for while it is imported."""
    global _library
    if _library is not None:
        return
    import torch

    _library = torch.library.Library("torchvision", "DEF")
    _library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _library.impl("nms", nms, "CPU")


class Loader(SourceFileLoader):
    """Imports torchvision with its operators declared."""

    def exec_module(self, module: ModuleType) -> None:
        for name in [name for name in sys.modules if name.startswith("torchvision.")]:
            del sys.modules[name]  # left half-initialized by an earlier failed import
        declare()
        super().exec_module(module)
        module.extension._has_ops = lambda: True


class Finder(MetaPathFinder):
    """Finds torchvision where the builds differ, and nothing else."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        """`path` is a list, None, or what a namespace package has, which is no Sequence."""
        if fullname != "torchvision" or not builds_differ():
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.origin is not None:
            spec.loader = Loader(fullname, spec.origin)
        return spec


def install() -> None:
    """Have torchvision imported with its operators. Safe to call twice; for a torchvision that is already here, too late."""
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, Finder())
