"""The checker of annotations for `make shapes`: beartype, to which jaxtyping gives the shapes (tests/conftest.py)."""

from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype

CONF = BeartypeConf(is_pep484_tower=True)  # an int will do where a float is asked for


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Constructors check what they get themselves, with messages for users."""
    return function if getattr(function, "__name__", "") == "__init__" else beartype(function, conf=CONF)
