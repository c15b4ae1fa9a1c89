"""Training where the host is slow and the accelerator fast: the whole step is recorded once and replayed.

A step draws its pictures, augments, encodes, goes forward and back, clips, steps and averages: some thousand short kernels.
To launch them one by one is what takes the time. Recorded as one CUDA graph they are launched at once. So a step reads nothing on
the host: draws, learning rate, averaging and the sum of losses live on the device.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from experiments.harness.training import moved
from keyanon.channel.pixels import to_floats
from keyanon.errors import UserError
from keyanon.types import Bytes, Image

WARMUP_STEPS = 200
READ_STEPS = 200  # between two looks at the loss, each of which makes the host wait
REPLAYS = 10  # between two looks at the clock
MEASURED_SECONDS = 60
AVERAGED = 0.08  # of the time: how far back the average of the weights reaches

Row = dict[str, float]


class Diverged(UserError):
    """A loss that is not finite."""


@dataclass(frozen=True)
class Pictures:
    """Training pictures (n 3 h w) on the device, drawn with replacement there."""

    pixels: Bytes

    def draw(self, count: int, scale: tuple[float, float], shift: float) -> Image:
        """`count` pictures in [-1, 1], mirrored, zoomed and shifted as `training.augment` does."""
        device = self.pixels.device
        chosen = self.pixels[torch.randint(len(self.pixels), (count,), device=device)]
        zoom = torch.rand(count, device=device) * (scale[1] - scale[0]) + scale[0]
        flip = torch.randint(0, 2, (count,), device=device) * 2.0 - 1
        move = (torch.rand(count, 2, device=device) * 2 - 1) * 2 * shift
        return moved(to_floats(chosen), zoom, flip, move)


@dataclass
class Fit:
    """What is trained, the running average of it, and the step.

    Args:
        parameters: those of one network that are trained, on one device.
        loss: draws a batch of its own and gives its loss, on the device alone.
    """

    parameters: list[torch.nn.Parameter]
    loss: Callable[[], Tensor]
    average: list[Tensor] = field(init=False)
    total: Tensor = field(init=False)
    """The sum of the losses since it was last set to zero."""

    def __post_init__(self) -> None:
        device = self.parameters[0].device
        self.average = [parameter.detach().clone() for parameter in self.parameters]
        self.total, self._rate, self._toward = torch.zeros(3, device=device).unbind()
        on_gpu = device.type == "cuda"
        self._optimizer = torch.optim.AdamW(
            self.parameters, lr=self._rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True, capturable=on_gpu
        )
        self._graph: torch.cuda.CUDAGraph | None = None
        if on_gpu:
            self._graph = self._recorded()
        else:
            self._warm()

    def run(self, rate: float, toward: float, steps: int) -> None:
        """Take `steps` steps at the learning rate `rate`; each moves the average by `toward`, 0 to 1, to the weights. Waits."""
        self._rate.fill_(rate)
        self._toward.fill_(toward)
        for _ in range(steps):
            if self._graph is None:
                self._step()
            else:
                self._graph.replay()
        if self._graph is not None:
            torch.cuda.synchronize()

    def swap(self) -> None:
        """Exchange the weights and their average; twice leaves all as it was."""
        for parameter, average in zip(self.parameters, self.average, strict=True):
            weights = parameter.detach().clone()
            parameter.data.copy_(average)
            average.copy_(weights)

    def _step(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None
        loss = self.loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
        self._optimizer.step()
        for parameter, average in zip(self.parameters, self.average, strict=True):
            average.lerp_(parameter.detach(), self._toward)
        self.total.add_(loss.detach())

    def _warm(self) -> None:
        """Steps that leave nothing behind: the optimizer's state exists and cuDNN has chosen before a step is recorded."""
        before = [parameter.detach().clone() for parameter in self.parameters]
        for _ in range(3):
            self._step()
        for parameter, average, weights in zip(self.parameters, self.average, before, strict=True):
            parameter.data.copy_(weights)
            average.copy_(weights)
            for moment in self._optimizer.state[parameter].values():
                moment.zero_()
        self.total.zero_()

    def _recorded(self) -> torch.cuda.CUDAGraph:
        """The step as a graph, recorded on the stream that has warmed up."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._warm()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            self._step()
        torch.cuda.synchronize()
        return graph


def training(
    fit: Fit, batch: int, rate: float, minutes: float, measure: Callable[[], Mapping[str, float]]
) -> Iterator[Row]:
    """Train for `minutes`; a row of the report at the beginning, every 200 steps, every minute and at the end.

    The learning rate rises to `rate` in 200 steps and falls as a cosine of the time to zero. The average of the weights reaches
    back 8 % of the time. At the beginning, every minute and at the end the row has what `measure` says of the average.
    The network holds it while that row is out: then it can be kept.

    Raises Diverged.
    """
    yield {"seconds": 0.0, "step": 0, "pictures": 0, **measure()}
    begin = measured = read = now = time.monotonic()
    step = read_step = 0
    while now < begin + minutes * 60:
        passed = (now - begin) / (minutes * 60)
        here = rate * min(1, (step + 1) / WARMUP_STEPS) * (1 + math.cos(math.pi * passed)) / 2
        fit.run(here, min(0.02, passed / step / AVERAGED) if step else 0.02, REPLAYS)
        step += REPLAYS
        now = time.monotonic()
        if step % READ_STEPS == 0:
            loss, speed = fit.total.item() / READ_STEPS, (step - read_step) * batch / (now - read)
            fit.total.zero_()
            if not math.isfinite(loss):
                raise Diverged(f"the loss is {loss} after {step} steps; a learning rate below {rate} may help")
            yield {
                "seconds": now - begin, "step": step, "pictures": step * batch, "loss": loss, "learning_rate": here,
                "pictures_per_second": speed,
            }  # fmt: skip
            read, read_step = now, step
        last = now >= begin + minutes * 60
        if last or now - measured > MEASURED_SECONDS:
            fit.swap()
            yield {"seconds": now - begin, "step": step, "pictures": step * batch, **measure()}
            fit.swap()
            measured = read = now = time.monotonic()
            read_step = step
