"""Networks of recognizers that are published as PyTorch weights alone: InsightFace's iresnet and CVLface's vision transformer.

A network has the sizes of the weights that it is made from, and their names. The weights are looked at by name and by size: others
raise WrongWeights. Pictures are 112 px, RGB; what comes out is not of length 1.
"""

import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from keyanon.weights import WrongWeights

Net = TypeVar("Net", bound=nn.Module)
SIDE = 112  # pixels of a picture
HEAD = 32  # numbers of an attention head in CVLface's "base" (512 / 16), which its weights do not tell


class IResNet(nn.Module):
    """A residual network of He et al.'s pre-activated kind as ArcFace's authors train it (arXiv 1801.07698, section 2.2).

    Written from the layers of InsightFace's recognition/arcface_torch/backbones/iresnet.py.

    Args:
        stem: channels of the first convolution.
        stages: (width, blocks) of the four stages, each of which halves the picture's side.
        dimension: of the embedding.
    """

    def __init__(self, stem: int, stages: Sequence[tuple[int, int]], dimension: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, stem, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.prelu = nn.PReLU(stem)
        widths = [stem, *(width for width, _ in stages)]
        stacks = [
            nn.Sequential(IResNetBlock(before, width, 2), *(IResNetBlock(width, width, 1) for _ in range(blocks - 1)))
            for before, (width, blocks) in zip(widths, stages, strict=False)
        ]
        self.layer1, self.layer2, self.layer3, self.layer4 = stacks
        self.bn2 = nn.BatchNorm2d(widths[-1])
        self.fc = nn.Linear(widths[-1] * (SIDE // 16) ** 2, dimension)
        self.features = nn.BatchNorm1d(dimension)
        self.dimension = dimension

    def forward(self, pictures: Tensor) -> Tensor:
        """(n, 3, 112, 112) in [-1, 1] to (n, dimension)."""
        x = self.prelu(self.bn1(self.conv1(pictures)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        rows: Tensor = self.features(self.fc(self.bn2(x).flatten(1)))
        return rows


class IResNetBlock(nn.Module):
    """Two convolutions between three normalizations; the second has the stride."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(before)
        self.conv1 = nn.Conv2d(before, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.prelu = nn.PReLU(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.downsample: nn.Module = nn.Identity()
        if stride > 1:
            self.downsample = nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.conv2(self.prelu(self.bn2(self.conv1(self.bn1(x)))))
        return self.bn3(inner) + self.downsample(x)  # type: ignore[no-any-return]


class FaceTransformer(nn.Module):
    """CVLface's vision transformer without a class token: all tokens of a face together become its embedding.

    Written from the layers of cvlface/research/recognition/code/run_v1/models/vit/vit.py.

    Args:
        patch: side of a patch in pixels.
        width: numbers of a token.
        hidden: of the widest layer between two attentions.
        dimension: of the embedding.
    """

    def __init__(self, patch: int, width: int, depth: int, hidden: int, dimension: int) -> None:
        super().__init__()
        tokens = (SIDE // patch) ** 2
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(3, width, patch, patch)))
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, width))
        self.blocks = nn.Sequential(*(TransformerBlock(width, hidden) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.feature = nn.Sequential(
            nn.Linear(tokens * width, width, bias=False),
            nn.BatchNorm1d(width, eps=2e-5),
            nn.Linear(width, dimension, bias=False),
            nn.BatchNorm1d(dimension, eps=2e-5),
        )
        self.dimension = dimension

    def forward(self, pictures: Tensor) -> Tensor:
        """(n, 3, 112, 112) in [-1, 1] to (n, dimension)."""
        tokens = self.patch_embed(pictures).flatten(2).transpose(1, 2) + self.pos_embed
        rows: Tensor = self.feature(self.norm(self.blocks(tokens)).flatten(1))
        return rows


class TransformerBlock(nn.Module):
    """Attention and a two-layer perceptron, each normalized before and added to what it was given."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            OrderedDict(fc1=nn.Linear(width, hidden), act=nn.ReLU6(), fc2=nn.Linear(hidden, width))
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Of tokens to each other, in heads of 32 numbers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        queries, keys, values = self.qkv(x).view(n, tokens, 3, width // HEAD, HEAD).permute(2, 0, 3, 1, 4)
        seen = scaled_dot_product_attention(queries, keys, values)
        mixed: Tensor = self.proj(seen.transpose(1, 2).flatten(2))
        return mixed


def load_iresnet(path: Path) -> IResNet:
    """The network of an InsightFace backbone.pth, in single precision."""
    with reading(path, "a backbone of InsightFace's arcface_torch"):
        state = torch.load(path, map_location="cpu", weights_only=True)
        stages = [(len(state[f"layer{n}.0.conv1.weight"]), count(state, rf"layer{n}\.(\d+)\.")) for n in (1, 2, 3, 4)]
        with torch.device("meta"):
            net = IResNet(len(state["conv1.weight"]), stages, len(state["features.weight"]))
        return filled(net, state)


def load_face_transformer(path: Path) -> FaceTransformer:
    """The network of a CVLface model.safetensors, in single precision."""
    from safetensors.torch import load_file

    with reading(path, "a vision transformer of CVLface"):
        state = {name.removeprefix("model.net."): value for name, value in load_file(path).items()}
        width, _, patch, _ = state["patch_embed.proj.weight"].shape
        hidden, dimension = len(state["blocks.0.mlp.fc1.weight"]), len(state["feature.3.weight"])
        with torch.device("meta"):
            net = FaceTransformer(patch, width, count(state, r"blocks\.(\d+)\."), hidden, dimension)
        return filled(net, state)


@contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Whatever goes wrong in this block is told as that the file is not `what`."""
    try:
        yield
    except Exception as error:  # of pickle's, safetensors' and torch's own kinds, which have no class in common
        raise WrongWeights(f"{path}: not {what} ({' '.join(str(error).split())[:300]})") from error


def count(state: Mapping[str, Tensor], numbered: str) -> int:
    """How many parts are numbered, from 0 on, in the names that begin so."""
    return 1 + max(int(found[1]) for name in state if (found := re.match(numbered, name)))


def filled(net: Net, state: Mapping[str, Tensor]) -> Net:
    """A network without numbers with those of a file, all of them and no other, to compute and not to train."""
    net.load_state_dict(state, assign=True)
    return net.float().eval().requires_grad_(False)
