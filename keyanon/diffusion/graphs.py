"""A network whose kernels are recorded once and launched at once, for a GPU: CUDA graphs without a compiler."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from keyanon.errors import BadSetting

WARMUPS = 3  # libraries choose and allocate at the first calls, which cannot be recorded


@dataclass(frozen=True)
class Output:
    """What diffusers' networks give; overwritten by the next call."""

    sample: Tensor


class Recorded:
    """`net(*inputs).sample`, recorded for each shape of the inputs and replayed after that.

    Precision and kernels are as at the first call of a shape. Each shape keeps the memory of its own work.
    BadSetting where the network is not on a GPU.
    """

    def __init__(self, net: torch.nn.Module) -> None:
        self.config: Any = net.config
        self._net = net
        self._graphs: dict[tuple[tuple[int, ...], ...], tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], Tensor]] = {}
        device = next(net.parameters()).device
        if device.type != "cuda":
            raise BadSetting(f"backbone.compile=graphs records CUDA graphs, on a GPU; the network is on {device}")

    def __call__(self, *inputs: Tensor) -> Output:
        shapes = tuple(tuple(given.shape) for given in inputs)
        if shapes not in self._graphs:
            self._graphs[shapes] = self._record(inputs)
        graph, held, out = self._graphs[shapes]
        for kept, given in zip(held, inputs, strict=True):
            kept.copy_(given)
        graph.replay()
        return Output(out)

    def _record(self, inputs: tuple[Tensor, ...]) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], Tensor]:
        held = tuple(given.clone() for given in inputs)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARMUPS):
                self._net(*held)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out: Tensor = self._net(*held).sample
        return graph, held, out
