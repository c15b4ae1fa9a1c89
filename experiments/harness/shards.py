"""What became of each shard of a run: `shards/3of8.json` in its folder.

Each shard writes its own file and no other's. One that ends and finds none running makes the table, of those that are done.
"""

import json
import logging
import shlex
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from hydra.errors import CompactHydraException

from keyanon.channel.whole import write_whole
from keyanon.errors import BadSetting, UserError

log = logging.getLogger(__name__)

MISSING, RUNNING, DONE, FAILED = "missing", "running", "done", "failed"
Seen = TypeVar("Seen")


def numbers(shard: str) -> tuple[int, int]:
    """(i, n) of shard=i/n."""
    try:
        i, n = (int(part) for part in shard.split("/"))
    except ValueError:
        raise BadSetting(f"shard={shard}: expected i/n, as 1/3") from None
    if not 1 <= i <= n:
        raise BadSetting(f"shard={shard}: i goes from 1 to n")
    return i, n


def sharded(ids: Sequence[str], shard: str) -> list[str]:
    """Every n-th id from the i-th on, for shard i/n."""
    i, n = numbers(shard)
    return list(ids[i - 1 :: n])


@dataclass(frozen=True)
class Shards:
    """The `count` shards of a run folder. What was asked of it may change (more pictures, other scorers): only the
    shards that were `asked` the same, as a signature says, make up one table.
    """

    folder: Path
    count: int
    asked: str

    def path(self, shard: str) -> Path:
        return self.folder / "shards" / f"{shard.replace('/', 'of')}.json"

    @contextmanager
    def recorded(self, shard: str) -> Iterator[dict[str, Any]]:
        """Keep what becomes of the block: running, then done or failed. The block adds what there is to say of it."""
        spent = self.status(shard).get("seconds", 0.0)  # when it was asked before
        status = {"state": RUNNING, "asked": self.asked, "host": socket.gethostname(), "started": now(), "error": ""}
        status |= {"seconds": spent}
        self.path(shard).parent.mkdir(parents=True, exist_ok=True)
        self.write(shard, status)
        try:
            yield status
        except BaseException as error:
            self.write(shard, status | {"state": FAILED, "ended": now(), "error": one_line(error)})
            raise
        self.write(shard, status | {"state": DONE, "ended": now()})

    def write(self, shard: str, status: Mapping[str, Any]) -> None:
        write_whole(self.path(shard), json.dumps(status, indent=2).encode() + b"\n")

    def read(self) -> dict[str, dict[str, Any]]:
        """The status of each shard, of which `state` is always there."""
        found: dict[str, dict[str, Any]] = {}
        for i in range(1, self.count + 1):
            shard = f"{i}/{self.count}"
            status = self.status(shard)
            found[shard] = status if status.get("asked") == self.asked else {"state": MISSING}
        return found

    def status(self, shard: str) -> dict[str, Any]:
        """What its file says, whatever it was asked; nothing of a file that is missing or damaged, which is removed."""
        path = self.path(shard)
        try:
            status: dict[str, Any] = json.loads(path.read_text("utf-8"))
            if status.keys() >= {"state", "asked", "host", "started", "error", "seconds"}:
                return status
        except FileNotFoundError:
            return {}
        except (ValueError, AttributeError):
            pass
        log.warning("%s is damaged and was removed: shard %s counts as not done", path, shard)
        path.unlink(missing_ok=True)
        return {}

    def closed(self) -> list[str]:
        """The shards that are done; none as long as one is running."""
        states = {shard: status["state"] for shard, status in self.read().items()}
        return [] if RUNNING in states.values() else [shard for shard, state in states.items() if state == DONE]

    def unfinished(self, arguments: Sequence[str]) -> list[str]:
        """A line for each shard that is not done, with the command that runs it alone: `arguments`, and which shard."""
        return [
            f"shard {shard} {described(status)}: {shlex.join([*arguments, f'shard={shard}'])}"
            for shard, status in self.read().items()
            if status["state"] != DONE
        ]


class Incomplete(UserError):
    """Pictures of shards that were done, and of which something is lost or their files have changed since."""

    def __init__(self, ids: Sequence[str]) -> None:
        super().__init__(ids)
        self.ids = ids

    def __str__(self) -> str:
        return f"{len(self.ids)} pictures, such as {self.ids[0]}, change while the run goes on; start it again when they do not"


class FailedShard(CompactHydraException):
    """A shard of a sweep failed. Hydra reads it out after all have ended, so it names every shard that is to be run again."""

    def __init__(self, problem: str, shards: Shards, arguments: Sequence[str]) -> None:
        super().__init__(problem, shards, arguments)

    def __str__(self) -> str:
        problem, shards, arguments = self.args
        return "\n- ".join([f"{problem}\nnot done:", *shards.unfinished(arguments)])


def described(status: Mapping[str, Any]) -> str:
    if status["state"] == FAILED:
        return f"failed ({status['error']}); again"
    if status["state"] == RUNNING:
        return f"runs on {status['host']} since {status['started']}; should it have died"
    return "is missing"


def until_unchanged(read: Callable[[], Seen], act: Callable[[Seen], object]) -> None:
    """Act on what is read until it reads the same afterwards: of all that do so at once, the last has seen what the others did."""
    seen = None
    while (found := read()) != seen:
        act(found)
        seen = found


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
