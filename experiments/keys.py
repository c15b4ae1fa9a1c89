"""Key files on the command line: `python -m experiments.keys new PATH`, `... fingerprint PATH`. Secrets are never printed."""

import argparse
import sys

from keyanon.keys import BadKey, read_key, write_new_key


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.keys", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    for name, action, text in (
        ("new", write_new_key, "draw a fresh master key into a new file that only you can read"),
        ("fingerprint", read_key, "print what tells this key from others and gives nothing away"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("path", help="the key file")
        command.set_defaults(action=action)
    args = parser.parse_args()
    try:
        print(args.action(args.path).fingerprint)
    except BadKey as error:
        sys.exit(f"keyanon: {error}")


if __name__ == "__main__":
    main()
