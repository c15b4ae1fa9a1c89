"""Keys on the command line: `python -m experiments.keys new PATH`, `... derive PATH`, `... fingerprint PATH`.

Secrets are never printed, and a password is never an argument: it is asked for twice, or is one line of standard input.
"""

import argparse
import getpass
import logging
import os
import re
import sys
from pathlib import Path

from keyanon.channel.keys import SALT_BYTES, BadKey, MasterKey, Recipe, read_key, write_key, write_new_key
from keyanon.channel.whole import write_first, write_whole
from keyanon.errors import UserError
from keyanon.settings import Count, Name, checked

log = logging.getLogger(__name__)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.keys", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    for name, action, text in (
        ("new", new, "draw a fresh master key into a new file that only you can read"),
        ("derive", derive, "make a master key from a password, into a new file that only you can read"),
        ("fingerprint", fingerprint, "print what tells this key from others"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("path", type=Path, help="the key file")
        command.set_defaults(action=action)
        if action is derive:
            default = Recipe(bytes(SALT_BYTES))
            command.add_argument("--passes", type=int, default=default.passes, help="Argon2id's (default: %(default)s)")
            command.add_argument("--memory", type=int, default=default.memory, help="KiB (default: %(default)s)")
            command.add_argument("--lanes", type=int, default=default.lanes, help="in parallel (default: %(default)s)")
            source = command.add_mutually_exclusive_group()
            source.add_argument("--salt", help=f"of an earlier key: {2 * SALT_BYTES} hex digits (default: a fresh one)")
            source.add_argument("--picture", type=Path, help="a published picture: derive the key that recovers it")
            command.add_argument(
                "--weak", action="store_true", help="also by a recipe that makes guesses cheaper than the default"
            )
    args = parser.parse_args()
    try:
        print(args.action(args).fingerprint)
    except (UserError, OSError) as error:  # a file that cannot be read or written
        sys.exit(f"keyanon: {error}")


def new(args: argparse.Namespace) -> MasterKey:
    return write_new_key(args.path)


def fingerprint(args: argparse.Namespace) -> MasterKey:
    return read_key(args.path)


def derive(args: argparse.Namespace) -> MasterKey:
    if args.picture is not None:
        return write_key(args.path, key_of(args.picture, asked_password(), args.weak))
    salt = os.urandom(SALT_BYTES) if args.salt is None else salt_of("--salt", args.salt)
    recipe = strong(Recipe(salt, args.passes, args.memory, args.lanes), args.weak)
    return write_key(args.path, recipe.derive(asked_password()))


def key_of(picture: Path, password: str, weak: bool = False) -> MasterKey:
    """The key of a published picture, by the recipe in its header.

    BadKey where the recipe is weaker than the default, unless `weak` is said, or where no tag vouches for it: whoever writes a
    recipe into a file chooses the salt and the price of guesses. BadHeader if the tag says that this is not the password.
    """
    from keyanon.channel.headers import Header, unseal  # they import torch: seconds, that the other commands do without
    from keyanon.channel.pixels import read_png

    pixels, packed = read_png(picture)
    header = Header.unpack(packed)
    if header.recipe is None:
        raise BadKey(f"{picture}: its key does not come from a password")
    if not header.tag:
        raise BadKey(
            f"{picture}: no tag tells who wrote the recipe of its key, which may be made to give your password away; take another "
            "picture, or the salt that you know: --salt"
        )
    key = strong(header.recipe, weak).derive(password)
    unseal([packed], pixels[None], [key], authenticate=True)
    return key


def strong(recipe: Recipe, weak: bool = False) -> Recipe:
    """The recipe; BadKey where it is weaker than the default and `weak` does not allow for that."""
    if recipe.weak and not weak:
        raise BadKey(
            f"{recipe.weakness}; --weak derives it all the same, to recover with: nothing is published under it"
        )
    return recipe


def salt_of(name: str, digits: str | None) -> bytes:
    """A salt as it is written in a setting; BadKey."""
    if not re.fullmatch(f"[0-9a-fA-F]{{{2 * SALT_BYTES}}}", digits or ""):
        raise BadKey(f"{name}: expected {2 * SALT_BYTES} hex digits, found {digits!r}")
    return bytes.fromhex(str(digits))


@checked
def password_key(
    variable: Name, salt: str | None, kept: Name | None, passes: Count, memory: Count, lanes: Count
) -> MasterKey:
    """The key of the password in an environment variable, or of the one that is asked for. See keyanon.channel.keys.Recipe.

    Without a `salt` that of the file `kept` is taken, which the first of a run's processes writes. BadKey where guesses would cost
    less than by default.
    """
    where = "key.salt" if salt is not None else f"key.kept: {kept}"
    salt = salt_of_run(Path(kept)) if salt is None and kept is not None else salt
    recipe = Recipe(salt_of(where, salt), passes, memory, lanes)
    if recipe.weak:
        raise BadKey(f"key.passes={passes}, key.memory={memory}: {recipe.weakness}")
    if variable not in os.environ and not sys.stdin.isatty():
        raise BadKey(f"key=password: no password; set the environment variable {variable}, or start from a terminal")
    return recipe.derive(os.environ[variable] if variable in os.environ else asked_password())


def salt_of_run(path: Path) -> str:
    """The salt in a file, which is drawn where there is none: of processes that do so at once, all get the same."""
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_first(path, lambda drawn: write_whole(drawn, os.urandom(SALT_BYTES).hex().encode() + b"\n"))
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError as error:
        raise BadKey(f"key.kept={path}: no file to keep the password's salt in ({error.strerror})") from None


def asked_password() -> str:
    """From the terminal, asked for twice; else the first line of standard input."""
    if not sys.stdin.isatty():
        return sys.stdin.readline().rstrip("\r\n")
    password = getpass.getpass("password: ")
    if password != getpass.getpass("once more: "):
        raise BadKey("the two passwords differ")
    return password


if __name__ == "__main__":
    main()
