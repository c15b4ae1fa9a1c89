"""Make PyPI's torchvision importable beside a CPU build of torch.

PyPI serves one torchvision wheel, linked to CUDA. Beside CPU torch its compiled operators cannot load, `import torchvision`
raises "operator torchvision::nms does not exist", and with it `diffusers`, `torchmetrics`, `transformers` and `facenet_pytorch`
fail to import (pytorch/vision#9085). The only operator this project needs is non-maximum suppression, so we declare it
with a plain torch kernel before torchvision is first imported. With matching builds this module does nothing.
"""

import importlib.util
import sys
from importlib import metadata

import torch

_library: torch.library.Library | None = None  # torch forgets the operators when this is collected


def builds_differ() -> bool:
    """True where torch is a CPU build and torchvision is not (read from the version's local part; nothing is imported)."""
    if importlib.util.find_spec("torchvision") is None:
        return False
    return metadata.version("torch").endswith("+cpu") and "+" not in metadata.version("torchvision")


def nms(boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    """Indices (int64, best first) of the boxes (n 4: x1 y1 x2 y2) kept by greedy suppression; torchvision.ops.nms' contract."""
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


def install() -> bool:
    """Declare the missing operator if the builds differ; True if it had to. Safe to call twice."""
    global _library
    if _library is not None or not builds_differ():
        return False
    _library = torch.library.Library("torchvision", "DEF")
    _library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _library.impl("nms", nms, "CPU")
    for name in [module for module in sys.modules if module.partition(".")[0] == "torchvision"]:
        del sys.modules[name]  # left half-initialized by an earlier failed import
    import torchvision.extension

    torchvision.extension._has_ops = lambda: True
    return True
