"""What a setting can be: its annotation says so, and whoever takes it looks (`checked`). Nothing heavy is imported here."""

import functools
import inspect
import logging
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from keyanon.errors import BadSetting, UserError

log = logging.getLogger(__name__)
Part = TypeVar("Part", bound=Callable[..., Any])
FINITE = sys.float_info.max  # whole numbers beyond it overflow; NaN is not below it
SHOWN = 200  # characters of a value in a message
AUTO = "auto"  # of a device: the card where there is one that can be used, else the CPU
LATER = object()  # in the place of an argument that is not known yet
SEVERAL = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)


class BadArgument(BadSetting):
    """An argument that a class or a function does not take; `said` is the message less the place before it."""

    def __init__(self, place: str, said: str) -> None:
        super().__init__(place + said)
        self.said = said


@dataclass(frozen=True)
class Setting:
    """What a value has to be, in words, and whether it is; of an annotation, besides its type: Annotated[int, Setting(...)]."""

    wanted: str
    fits: Callable[[Any], object]


def whole(low: int = 1, high: int | None = None) -> Setting:
    """A whole number from `low` to `high`, or on."""
    end = "on" if high is None else f"to {high}"
    return Setting(
        f"a whole number from {low} {end}",
        lambda value: is_whole(value) and low <= value <= (value if high is None else high),
    )


def number(low: float, high: float) -> Setting:
    """A number from `low` to `high`."""
    return Setting(f"a number from {low:g} to {high:g}", lambda value: is_number(value) and low <= value <= high)


def is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and value is not True and value is not False


def is_number(value: Any) -> bool:
    return isinstance(value, Real) and value is not True and value is not False and abs(as_float(value)) <= FINITE


def as_float(value: Real) -> float:
    """Infinity for whole numbers beyond all floats."""
    try:
        return float(value)
    except OverflowError:
        return math.inf


def is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def is_text(value: Any) -> bool:
    """The system takes no path and no argument with a zero byte."""
    return isinstance(value, str) and "\0" not in value


def is_device(name: Any) -> bool:
    """Whether PyTorch knows a device of this kind; whether this machine has it shows when it is used."""
    import torch

    if name == AUTO:
        return True
    try:
        return isinstance(name, str) and bool(torch.device(name))
    except RuntimeError:
        return False


@functools.cache
def usable_device() -> str:
    """What `auto` stands for: cuda where a card is there and computes, else cpu. A card that does not compute is told."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    try:
        torch.ones(1, device="cuda").add(1).item()
    except RuntimeError as error:  # a driver too old, a card too old for this build, a card in another's exclusive use
        log.warning("device=auto: the card cannot be used, going on with the CPU: %s", " ".join(str(error).split()))
        return "cpu"
    return "cuda"


def device_of(name: str) -> str:
    """The device that a setting names: itself, or what `auto` stands for on this machine."""
    return usable_device() if name == AUTO else name


SOME_TEXT = Setting("a text that is not empty", lambda value: is_text(value) and bool(value.strip()))
OF_TYPE: Mapping[Any, Callable[[Any], bool]] = {int: is_whole, float: is_number, str: is_text}
DEVICE = Setting("a device that PyTorch knows, such as cpu, or auto", is_device)
SIZE = Setting("a whole number of pixels from 16 to 8192", lambda value: whole(16, 8192).fits(value))
CROP = Setting(
    "left, top, right, bottom as fractions of the picture",
    lambda crop: len(crop) == 4 and 0 <= crop[0] < crop[2] <= 1 and 0 <= crop[1] < crop[3] <= 1,
)

Count = Annotated[int, whole(1, 10**9)]
Pixels = Annotated[int, whole(1, 8192)]
Size = Annotated[int, SIZE]  # of a picture's side
Bits = Annotated[int, whole(0, 10**9)]
Share = Annotated[float, number(0, 1)]
Factor = Annotated[float, number(-1000, 1000)]
Positive = Annotated[float, number(1e-6, 1e6)]
Quality = Annotated[int, whole(1, 100)]  # of a JPEG
Name = Annotated[str, SOME_TEXT]
Device = Annotated[str, DEVICE]
Counts = Annotated[Sequence[Count], Setting("a list of whole numbers from 1 on, at least one", len)]
Shares = Annotated[Sequence[Share], Setting("a list of numbers from 0 to 1, at least one", len)]
Names = Annotated[Sequence[Name], Setting("a list of texts that are not empty, at least one", len)]
Crop = Annotated[Sequence[float], CROP]


def checked(part: Part) -> Part:
    """A class or a function whose arguments are what its annotations say: else it raises BadSetting, before anything else.

    A device `auto` is by then the one that it stands for. Of a class the outermost decorator, above @dataclass.
    """
    signature = inspect.signature(part)
    work = part.__init__ if isinstance(part, type) else part  # type: ignore[misc]
    own = int(isinstance(part, type))  # self

    @functools.wraps(work)
    def look_first(*args: Any, **settings: Any) -> Any:
        check_arguments(part, part.__name__, args[own:], settings, signature)
        if "device" in settings:
            settings["device"] = device_of(settings["device"])
        return work(*args, **settings)

    if isinstance(part, type):
        part.__init__ = look_first  # type: ignore[misc]
        return part
    return look_first  # type: ignore[return-value]


def check_arguments(
    part: Callable[..., Any],
    place: str,
    args: Sequence[Any],
    settings: Mapping[str, Any],
    signature: inspect.Signature | None = None,
    some: bool = False,
) -> None:
    """Raises BadSetting where a class or a function does not take these arguments; with `some`, others may follow."""
    signature = inspect.signature(part) if signature is None else signature
    try:
        bound = (signature.bind_partial if some else signature.bind)(*args, **settings).arguments
    except TypeError as error:
        known = ", ".join(signature.parameters) or "nothing"
        raise BadArgument(place, f": {error}; {part.__name__} takes {known}") from None
    hints = hints_of(part)
    for name, value in bound.items():
        hint, several = hints.get(name, Any), signature.parameters[name].kind in SEVERAL
        if value is not LATER and not several and not fits(hint, value):
            raise BadArgument(place, f".{name}{refusal(value, hint)}")


@functools.cache
def hints_of(part: Callable[..., Any]) -> dict[str, Any]:
    # a class that is no dataclass says in its constructor what it takes
    known = part.__init__ if isinstance(part, type) and not is_dataclass(part) else part  # type: ignore[misc]
    return get_type_hints(known, include_extras=True)


def refuse(name: str, value: Any, hint: Any) -> None:
    """Raises BadSetting where a value is not what its annotation says."""
    if not fits(hint, value):
        raise BadSetting(name + refusal(value, hint))


def refusal(value: Any, hint: Any) -> str:
    return f"={repr(value)[:SHOWN]}: expected {words(hint)}"


def fits(hint: Any, value: Any) -> bool:
    """Whether a value is what an annotation says. A bool is no number here, and NaN none either."""
    kind, inner = get_origin(hint), get_args(hint)
    if isinstance(hint, Setting):
        return bool(hint.fits(value))
    if kind is Annotated:
        return all(fits(one, value) for one in (inner[0], *hint.__metadata__))
    if kind is Literal:
        return any(type(one) is type(value) and one == value for one in inner)
    if kind in (Union, UnionType):
        return any(fits(one, value) for one in inner)
    if kind is tuple and inner[-1] is not Ellipsis and len(inner) > 1:
        return is_list(value) and len(value) == len(inner) and all(map(fits, inner, value))
    if kind in (tuple, list, Sequence):
        return is_list(value) and all(fits(inner[0], one) for one in value)
    if kind in (dict, Mapping):
        return isinstance(value, Mapping) and all(
            map(fits, inner * len(value), (x for item in value.items() for x in item))
        )
    if kind is Callable:
        return callable(value)
    if hint is Any:
        return True
    try:
        return OF_TYPE[hint](value) if hint in OF_TYPE else isinstance(value, kind or hint)
    except UserError:
        return True  # Python 3.11 asks for the properties of a Protocol: one that needs what is not on this machine is there


def words(hint: Any) -> str:
    """What an annotation wants, for a message."""
    kind, inner = get_origin(hint), get_args(hint)
    if isinstance(hint, Setting):
        return hint.wanted
    if kind is Annotated:
        return words(hint.__metadata__[0])
    if kind is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if kind in (Union, UnionType):
        return " or ".join(map(words, sorted(inner, key=lambda one: one is NoneType)))
    if kind is tuple and inner[-1] is not Ellipsis and len(inner) > 1:
        return f"a list of {', '.join(map(words, inner))}"
    if kind in (tuple, list, Sequence):
        return f"a list, of {words(inner[0])} each"
    if kind in (dict, Mapping):
        return f"names, with {words(inner[1])} each"
    own = {int: "a whole number", float: "a number", str: "text", bool: "true or false", NoneType: "null"}
    return own.get(hint) or f"a part that is a {getattr(hint, '__name__', hint)}"
