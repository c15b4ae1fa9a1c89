"""A batch in parts: one size for all on a CPU, halves where the memory is too small elsewhere."""

import logging
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

log = logging.getLogger(__name__)

PROGRESS = 0.5 if sys.stderr.isatty() else 20  # seconds between lines: a log file is read later
CHUNK = 8  # on faces128 a picture costs a sixth less than by 4, and less again by 16, which small batches would pay for

Begun = TypeVar("Begun")


def in_chunks(
    f: Callable[..., Tensor],
    *batch: Tensor,
    chunk: int = CHUNK,
    fits: dict[str, int] | None = None,
    few_sizes: bool = False,
) -> Tensor:
    """f(*batch), by parts of the batch.

    On a CPU f always sees `chunk` pictures at a time, the last ones filled up with copies: kernels are chosen by the batch's size
    and round differently, and the loop amplifies that to visible pixels. Elsewhere it sees the whole batch, or where this is too
    much for the memory half of it, a quarter, ...

    `fits` remembers by f's name how many were not too many, for the next time; `few_sizes` fills up to a power of two, where f
    costs much at the first batch of a size.

    Raises:
        torch.OutOfMemoryError: not even one fits; or gradients are wanted of the outcome, where smaller parts do not help and
            whoever asks for the gradients can take fewer pictures.
    """
    on_cpu, count, name = batch[0].device.type == "cpu", len(batch[0]), f.__qualname__
    size = chunk if on_cpu else 1 << (count - 1).bit_length() if few_sizes else count
    if fits is not None:
        size = min(size, fits.get(name, size))
    while True:
        try:
            parts = zip(*(cut(tensor, size, on_cpu or few_sizes) for tensor in batch), strict=True)
            return torch.cat([f(*part) for part in parts])[:count]
        except torch.OutOfMemoryError:
            if size == 1 or any(tensor.requires_grad for tensor in batch):
                raise
        size //= 2  # here, where the error no longer holds the tensors of f
        log.warning("%s: %d pictures at once do not fit the memory, going on with %d", name, 2 * size, size)
        if fits is not None:
            fits[name] = size


def cut(batch: Tensor, size: int, fill: bool) -> list[Tensor]:
    """Parts of `size`, the last one smaller or filled up."""
    return [padded(part, size) if fill else part for part in batch.split(size)]


def padded(batch: Tensor, size: int) -> Tensor:
    """The batch filled up to `size` with copies of its last entry: kernels may round differently for other shapes."""
    return torch.cat([batch, batch[-1:].expand(size - len(batch), *batch.shape[1:])])


def begun_ahead(
    ids: Sequence[str], size: int, title: str, begin: Callable[[list[str]], Begun]
) -> Iterator[tuple[list[str], Begun]]:
    """As batches(), each with what `begin` began for it: that of the next batch is begun before a batch is handed out."""
    upcoming = (list(ids[start : start + size]) for start in range(0, len(ids), size))
    begun = deque(begin(batch) for batch in islice(upcoming, 1))
    for batch in batches(ids, size, title):
        begun += (begin(following) for following in islice(upcoming, 1))
        yield batch, begun.popleft()


def batches(ids: Sequence[str], size: int, title: str) -> Iterator[list[str]]:
    """Consecutive batches, with a progress bar that counts pictures."""
    with tqdm(total=len(ids), desc=title, unit="image", disable=not ids, mininterval=PROGRESS) as bar:
        for start in range(0, len(ids), size):
            batch = list(ids[start : start + size])
            yield batch
            bar.update(len(batch))


def filled(ids: Sequence[str], size: int) -> list[str]:
    """The ids filled up to `size` with copies of the last, as `padded` fills their pictures."""
    return [*ids, *[ids[-1]] * (size - len(ids))]
