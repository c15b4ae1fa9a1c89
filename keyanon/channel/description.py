"""How a file was made, as its header says it: the method with all that its receiver has to set alike, as JSON.

    {"keyanon": version of the code,  "method": {"class": ..., its fields},  "sender": {what else the sender used, by class}}

Models and weights are their SHA-256, 32 hex digits of it. A field that says where or how fast something runs is left out, and so
is what the sender alone uses: a class names these fields in `senders`. So no path and no name of a picture stands in a header.
A field that a class got later is left out at its default: a class names it in `added_fields`, and older files stay what they are.

A key stream belongs to the description as it stands in the header (keyanon/context.py). What is left out is in the nonce, which is
a function of everything (keyanon/channel/nonces.py).
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from numbers import Real
from typing import Any

from keyanon.channel.headers import BadHeader, Header, canonical, placed, unseal
from keyanon.errors import BadSetting
from keyanon.types import Key, Model, Published
from keyanon.version import __version__
from keyanon.weights import Card, named

# Where a thing lies, how fast it runs, what is said of it: not what comes out, but for rounding.
PLACES = frozenset(
    {"device", "chunk", "compile", "weights", "source", "subfolder", "revision", "licence", "root", "names"}
    | {"folder", "needs", "outputs", "obtain", "about", "logs", "timeout", "environment", "anonymized", "recovered"}
)
# What chooses among pictures, or adds to the file, and changes none of them.
CHOICES = frozenset({"authenticate", "floor", "attempts", "nonces"})
DIGITS = 32  # hex digits of a SHA-256
SHOWN, LONGEST = 3, 60  # differences in a message, characters of a value


def described(method: Any) -> bytes:
    """The description of a method's files: canonical JSON in ASCII."""
    parts = ((name, getattr(method, name)) for name in senders(method))
    about = {
        "keyanon": __version__,
        "method": settings(method, public=True),
        "sender": {name: type(part).__name__ for name, part in parts if is_dataclass(part)},
    }
    return canonical(about)


def everything(method: Any) -> bytes:
    """All that decides which picture a method makes of another one, secret or not: for the nonce, not for a header."""
    return canonical({"keyanon": __version__, "method": settings(method, public=False)})


def senders(part: Any) -> Sequence[str]:
    """The fields that a receiver needs nothing of."""
    return getattr(part, "senders", ())


def added_fields(part: Any) -> Sequence[str]:
    """The fields that a class got after files were published with it: their default is what it did before, and is not told."""
    return getattr(part, "added_fields", ())


def settings(part: Any, public: bool) -> Any:
    """What decides the outcome of a part, as JSON has it; `public` leaves out what the sender alone uses.

    BadSetting for a value that cannot be told: two that differ must never be told alike.
    """
    if part is None or isinstance(part, bool | str):
        return part
    if isinstance(part, Real):
        number = float(part)
        if not math.isfinite(number):
            raise BadSetting(f"{part} among a method's settings: a file cannot say that it was made with it")
        return int(part) if number.is_integer() else number  # type: ignore[call-overload]  # 1.0 is 1, numpy's too
    if isinstance(part, Card):
        return part.sha256[:DIGITS] if part.sha256 else part.name
    if isinstance(part, Mapping):
        return {str(name): settings(value, public) for name, value in part.items()}
    if isinstance(part, Sequence):
        return [settings(value, public) for value in part]
    if isinstance(part, partial):
        given = {name: value for name, value in part.keywords.items() if name not in PLACES}
        return {"class": name_of(part.func), "args": settings(part.args, public), **settings(given, public)}
    out: dict[str, Any] = {"class": name_of(part)}
    if isinstance(part, Model):
        out["sha256"] = part.sha256[:DIGITS]
    if not is_dataclass(part):
        if "<" in out["class"] or not hasattr(part, "__qualname__"):
            raise BadSetting(
                f"{out['class']} among a method's settings: a file cannot say how it was made with it; make it a dataclass"
            )
        return out
    left_out = PLACES | CHOICES | (set(senders(part)) if public else set())
    for field in fields(part):
        value = getattr(part, field.name)
        as_before = field.name in added_fields(part) and value == field.default
        if field.init and field.name not in left_out and not as_before:
            out[field.name] = settings(named(value) if field.name == "card" else value, public)
    return out


def name_of(part: Any) -> str:
    """Of a function or of an object's class; with its module where it is none of ours."""
    kind = part if hasattr(part, "__qualname__") else type(part)
    return kind.__qualname__ if kind.__module__.startswith("keyanon.") else f"{kind.__module__}.{kind.__qualname__}"


def match(header: Header, own: bytes) -> None:
    """Raises BadHeader, which names the differences, unless a file says the same of its method as `own`, a description.

    Files of header version 2 do not say how they were made.
    """
    if header.description is None:
        return
    there, here = (dict(leaves(json.loads(each).get("method"))) for each in (header.description, own))
    names = [name for name in sorted(there.keys() | here.keys()) if there.get(name) != here.get(name)]
    if not names:
        return
    if ("class",) in names:
        other = shown(there[("class",)]) if ("class",) in there else "which it does not name"
        raise BadHeader(f"the file was published by another method: {other}, not {shown(here[('class',)])}")
    told = "; ".join(
        f"{'.'.join(map(shown, name))}={shown(there.get(name, 'nothing'))}, here {shown(here.get(name, 'nothing'))}"
        for name in names[:SHOWN]
    )
    more = f"; and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    raise BadHeader(
        f"the file was published with other settings: {told}{more}; recover it with the anonymizer's settings of then"
    )


def leaves(node: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """The values of nested JSON, each as JSON, by the names that lead to it."""
    if isinstance(node, dict) and node:
        for name, value in node.items():
            yield from leaves(value, (*path, name))
    else:
        yield path, json.dumps(node)


def shown(text: str) -> str:
    """Short and printable, whoever wrote it."""
    plain = text.encode("ascii", "backslashreplace").decode()
    plain = "".join(letter if letter.isprintable() else "?" for letter in plain)
    return plain if len(plain) <= LONGEST else f"{plain[:LONGEST]}..."


def opened(published: Published, keys: Sequence[Key], method: Any, authenticate: bool) -> list[Header]:
    """The headers of files that this method can recover; BadHeader, which names the picture's place, where one is not such a file.

    With `authenticate` each has to have a tag that fits header, pixels and key.
    """
    headers, own = unseal(published.headers, published.images, keys, authenticate), described(method)
    for i, header in enumerate(headers):
        try:
            match(header, own)
        except BadHeader as error:
            raise BadHeader(f"{placed(i, len(headers))}{error}") from None
    return headers
