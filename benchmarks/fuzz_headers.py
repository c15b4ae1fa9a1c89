"""What the header's parser makes of bytes that were never published: `python -m benchmarks.fuzz_headers [--each N]`.

Six kinds of input, N of each, go through unseal() with the right key, as in a recovery: random bytes; random bytes after a right
beginning; a published header cut short; one with bytes added, some beyond any limit; one with 1 to 8 bits flipped; and the headers
of other pictures. Anything but a header or a BadHeader of one line ends the run. Counted: how many can be read ("parsed": their tag
is looked at), and how many of these lead to a recovery. Measured: results/benchmarks/fuzz_headers.csv.
"""

import argparse
import csv
import random
import re
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable

import torch

from keyanon.channel.headers import (
    MAGIC,
    MAX_BYTES,
    SILENT_VERSION,
    VERSION,
    BadHeader,
    Header,
    canonical,
    seal,
    unseal,
)
from keyanon.channel.keys import MasterKey, Recipe, experiment_key
from keyanon.context import NONCE_BYTES

KEY = MasterKey(experiment_key().secret, Recipe(bytes(16)))
PIXELS = torch.arange(192, dtype=torch.uint8).view(1, 3, 8, 8)
BOMB = zlib.compress(bytes(50_000_000), 9)  # 49 KB
COLUMNS = ["kind", "inputs", "parsed", "recovered", "slowest_ms"]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz_headers", description=__doc__)
    parser.add_argument("--each", type=int, default=20_000, help="inputs of each kind (default: %(default)s)")
    args = parser.parse_args()
    start = time.perf_counter()
    rows, messages = fuzz(args.each)
    report(rows, messages, start)


def report(rows: list[dict[str, object]], messages: Counter[str], start: float) -> None:
    """The rows as CSV on standard output; on standard error the messages, the commonest first, and the time since `start`."""
    writer = csv.DictWriter(sys.stdout, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    for message, count in messages.most_common():
        print(f"{count:8d}  {message}", file=sys.stderr)
    print(f"{sum(messages.values())} refused, {time.perf_counter() - start:.0f} s", file=sys.stderr)


def fuzz(each: int, seed: int = 0) -> tuple[list[dict[str, object]], Counter[str]]:
    """A row for each kind, and the messages of all refusals, their numbers taken out."""
    rows: list[dict[str, object]] = []
    messages: Counter[str] = Counter()
    for kind, make in KINDS.items():
        draw, parsed, recovered, slowest = random.Random(f"{seed} {kind}"), 0, 0, 0.0
        for _ in range(each):
            data = make(draw)
            start = time.perf_counter()
            try:
                unseal([data], PIXELS, [KEY], authenticate=True)
                recovered += 1
            except BadHeader as error:
                message = re.sub(r"\d+", "N", str(error))
                assert message
                assert message.isprintable()
                messages[message] += 1
            slowest = max(slowest, time.perf_counter() - start)
            parsed += can_be_read(data)
        values = (kind, each, parsed, recovered, round(1000 * slowest, 1))
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows, messages


def can_be_read(data: bytes) -> bool:
    try:
        Header.unpack(data)
    except BadHeader:
        return False
    return True


def specimen(nonce: bytes = bytes(24)) -> bytes:
    """A header with every part, as PIXELS would be published with."""
    mask = torch.zeros(1, 16, 16, dtype=torch.bool)
    mask[:, 4:12, 4:12] = True
    told = canonical({"method": {"class": "Any", "solver": {"steps": 50}}})
    header = Header(nonce, mask, bytes(63), bytes(96), residual=bytes(range(80)), description=told)
    return seal([header], PIXELS, [KEY], authenticate=True)[0]


SPECIMEN = specimen()


def anything(draw: random.Random) -> bytes:
    return draw.randbytes(draw.randrange(300))


def begun(draw: random.Random) -> bytes:
    return (
        MAGIC
        + bytes([draw.choice([SILENT_VERSION, VERSION]), draw.randrange(64)])
        + draw.randbytes(draw.randrange(300))
    )


def truncated(draw: random.Random) -> bytes:
    return SPECIMEN[: draw.randrange(len(SPECIMEN))]


def oversized(draw: random.Random) -> bytes:
    """Bytes added, up to beyond the limit; or a mask or a description that would inflate to 50 MB."""
    if draw.random() < 0.1:
        start = MAGIC + bytes([SILENT_VERSION, 1]) + draw.randbytes(NONCE_BYTES + 2)
        told = MAGIC + bytes([VERSION, 0]) + draw.randbytes(NONCE_BYTES) + len(BOMB).to_bytes(2, "little")
        return draw.choice([start, told]) + BOMB
    size = draw.choice([10, 1000, MAX_BYTES, 4 * MAX_BYTES])
    return SPECIMEN + draw.randbytes(1 + draw.randrange(size))


def flipped(draw: random.Random) -> bytes:
    changed = bytearray(SPECIMEN)
    for bit in draw.sample(range(8 * len(SPECIMEN)), draw.randint(1, 8)):
        changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def replayed(draw: random.Random) -> bytes:
    """A good header, of another picture."""
    nonce = draw.randbytes(24)
    return seal([Header(nonce, None, bytes(63))], draw.choice(OTHERS), [KEY], authenticate=True)[0]


OTHERS = [PIXELS + 1, PIXELS.flip(-1), PIXELS.view(1, 3, 4, 16)]
KINDS: dict[str, Callable[[random.Random], bytes]] = {
    "random": anything,
    "begun": begun,
    "truncated": truncated,
    "oversized": oversized,
    "flipped": flipped,
    "replayed": replayed,
}


if __name__ == "__main__":
    main()
