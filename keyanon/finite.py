"""A number that is NaN or infinite ends a run, named by picture, step and method: it never becomes a black picture or a score.

Whoever calls a network says `finite(out, "the decoder")`. Whoever knows more says so around it, as `with within("sampling")`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from jaxtyping import Shaped
from torch import Tensor

from keyanon.errors import UserError

REMEDY = (
    "Remedy: make sure of the weights (fetch them again) and of the picture; with a lower backbone.precision try fp32"
)
SHOWN = 5


class NotFinite(UserError):
    """NaN or infinity in some pictures of a batch.

    Args:
        rows: which of the batch; none where the numbers belong to no picture.
        places: where they came up, the innermost first.
        names: of the rows, as whoever knows them calls them; by default their place in the batch, from 0 on.
    """

    def __init__(self, rows: Sequence[int], places: Sequence[str], names: Sequence[str] = ()) -> None:
        self.rows, self.places, self.names = list(rows), list(places), list(names)
        pictures = self.names or [f"{row} of its batch (counted from 0)" for row in self.rows]
        more = f" and {len(pictures) - SHOWN} more" if len(pictures) > SHOWN else ""
        which = f" for picture {', '.join(pictures[:SHOWN])}{more}" if pictures else ""
        super().__init__(f"{', '.join(reversed(self.places))}: NaN or infinity{which}. {REMEDY}")


def finite(values: Shaped[Tensor, "..."], place: str) -> Tensor:
    """`values`, one entry a picture, if all are finite; raises NotFinite. On an accelerator the host waits once."""
    return checked(values, values.isfinite(), place)


def bounded(values: Shaped[Tensor, "..."], place: str) -> Tensor:
    """As `finite`, for numbers of which NaN says that they cannot be measured: only infinity is refused."""
    return checked(values, ~values.isinf(), place)


def checked(values: Tensor, good: Tensor, place: str) -> Tensor:
    if not bool(good.all()):
        bad = ~good.flatten(1).all(1) if good.dim() > 1 else ~good.reshape(-1)
        raise NotFinite(bad.nonzero()[:, 0].tolist(), [place])
    return values


@contextmanager
def within(place: str, names: Sequence[str] = (), rows: Tensor | slice = slice(None)) -> Iterator[None]:
    """Say of numbers that turn out not to be finite in this block where that was.

    Args:
        place: step or part, in words.
        names: the pictures' ids, one for each entry of the batch; where the batch is filled up beyond them, the last.
        rows: which entries of the whole batch the block works on.
    """
    try:
        yield
    except NotFinite as error:
        whole = error.rows if isinstance(rows, slice) else rows[error.rows].tolist()
        called = error.names or [names[min(row, len(names) - 1)] for row in whole if names]
        raise NotFinite(whole, [*error.places, place], list(dict.fromkeys(called))) from error
