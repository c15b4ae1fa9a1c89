"""Rivals as their authors run them: a program of others, or the pictures that it left in a folder.

    x  --PNG-->  {images}/NAME.png  --the program, with the key of {key}-->  {output}/NAME.png  --checked-->  x'

A program is a list of words in which {images}, {output} and {key} stand for paths; no shell reads them. It is started in
`folder`, is given an empty {output}, has no input, and ends with exit code 0. NAME is a whole number, as some official scripts take
names for numbers. What else it leaves in {output} counts for nothing.

Of the environment it gets what `ENVIRONMENT` names and what its YAML asks for (`environment`), and nothing else: a password or a
token may be in any other variable.

{key} is a file without a name in any folder, which the program opens as /dev/fd/N: the words of a command are shown to all in the
list of processes, and a named file would stay behind if keyanon were killed. It holds the key (`Secret`): one line, or a line
"NAME.png KEY" for each picture. It can be read again and again (once on macOS), also by what the program starts, if that keeps its
open files: Python's subprocess does with close_fds=False alone. What the program prints is kept in `logs`, less the keys as they
stand in that file. All that it started ends with it; after `timeout` seconds they are killed. If keyanon itself is killed, the
program runs on, and {images} and {output} stay in the folder for temporary files: originals, readable by their owner alone.

A program starts once for each batch of the run (batch_size), and where it reads one key for all its pictures once for each key
(nonce=one_for_all: one). The run's costs include its start.
"""

import hashlib
import os
import re
import shutil
import signal
import subprocess
import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from time import perf_counter, strftime
from typing import Annotated, ClassVar, Literal

import numpy as np
import PIL.Image
import torch

from keyanon.channel.description import opened
from keyanon.channel.headers import BadHeader, Header, seal
from keyanon.channel.keys import KEY_BYTES, MasterKey
from keyanon.channel.nonces import Nonces, contexts_of, nonce_for
from keyanon.channel.pixels import open_rgb, to_bytes, to_floats, write_png
from keyanon.channel.streams import ciphered
from keyanon.channel.whole import write_whole
from keyanon.context import Context
from keyanon.errors import BadSetting, UserError
from keyanon.faces.layouts import SUFFIXES
from keyanon.settings import Name, Names, Pixels, Positive, checked, whole
from keyanon.types import About, BadPicture, Bytes, Image, Key, PictureBytes, Published, Source

PLACES = {"images", "output", "key"}
# What a program needs to start at all: where things are, in which language it speaks, which cards and threads it may take.
ENVIRONMENT = (
    "PATH", "HOME", "TMPDIR", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "VIRTUAL_ENV",
    "CONDA_PREFIX", "CUDA_HOME", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS",
)  # fmt: skip
SHOWN_LINES, SHOWN_FILES = 10, 5  # in a message
ID_BYTES = 255  # of an encrypted id, as long as most file systems let names be


class BadMethod(UserError, ValueError):
    """A program of others that failed, or pictures of one that cannot be used: the message names method, place and remedy."""


@checked
@dataclass(frozen=True)
class Secret:
    """What a program takes for a key, drawn from the key's stream for the picture's nonce.

    Args:
        bits: its length; a search goes through 2 ** bits keys at most.
        format: `hex` digits, the decimal `digits` of a whole number (a seed), or `bits`, each 0 or 1; a password is any of them.
        per_picture: the program reads a key for each picture, else one key for all pictures that it is given.
    """

    bits: Annotated[int, whole(1, 10**6)]
    format: Literal["hex", "digits", "bits"] = "hex"
    per_picture: bool = True

    def of(self, key: Key, context: Context, method: str) -> str:
        """The key of one picture for a method, as the program reads it."""
        number = int.from_bytes(key.stream(context, f"external|{method}", -(-self.bits // 8)), "big") % 2**self.bits
        match self.format:
            case "hex":
                return f"{number:0{-(-self.bits // 4)}x}"
            case "digits":
                return str(number)
            case "bits":
                return f"{number:0{self.bits}b}"


@checked
@dataclass(frozen=True, kw_only=True)
class External:
    """An irreversible method, by the program of its authors.

    Args:
        name: of the method, in messages, logs and the derivation of its keys.
        about: what it needs and gives.
        command: the program and its arguments, one a word.
        folder: where the official code lies; None says that it is not here.
        needs: scripts and checkpoints that have to be in `folder`.
        obtain: where code and checkpoints are to be had, for the message when they are missing.
        secret: what it takes for a key; None where it takes none.
        nonces: which pictures share a key.
        size: in pixels, of the square pictures that the program reads and writes; others are resized (Lanczos) on the way there and
            back. None: as they are.
        outputs: a picture's file below {output}, less its suffix; any format will do.
        environment: names of variables that the program gets besides `ENVIRONMENT`, as of a proxy or of a cache of weights.
        timeout: seconds that one start may take.
        logs: folder of what the program printed, a file each start.
    """

    name: Name
    about: About
    command: Names
    folder: str | None
    obtain: str
    needs: Sequence[Name] = ()
    secret: Secret | None = None
    nonces: Nonces = nonce_for
    size: Pixels | None = None
    outputs: Name = "{name}"
    environment: Sequence[Name] = ()
    timeout: Positive = 3600
    logs: Name

    def __post_init__(self) -> None:
        wanted = PLACES if self.secret is not None else PLACES - {"key"}
        for command in self.commands:
            found = set(re.findall(r"\{(\w+)\}", " ".join(command)))
            if found != wanted:
                raise BadSetting(
                    f"{self.name}: the command {' '.join(command)!r} has the places {', '.join(sorted(found)) or 'none'}; expected "
                    f"{', '.join(sorted(wanted))}, each in braces"
                )
        if isinstance(self.environment, str):
            raise BadSetting(
                f"{self.name}: environment={self.environment!r} is no list of names, as [{self.environment}] is"
            )
        if "{name}" not in self.outputs:
            raise BadSetting(f"{self.name}: outputs={self.outputs!r} does not say where a picture's {{name}} stands")

    @property
    def commands(self) -> list[Sequence[str]]:
        return [self.command]

    def sources(self, id: str) -> list[Source]:
        """The program: all Python files of `folder`, and what command and `needs` name, all files of folders among it."""
        home = Path(self.folder or "")
        words = [*self.needs, *(word for command in self.commands for word in command)]
        named = [home / word for word in words if "{" not in word]
        named += [Path(program) for command in self.commands if (program := shutil.which(command[0]))]
        inside = [file for path in named if path.is_dir() for file in path.rglob("*")]
        found = [*(home.rglob("*.py") if self.folder else ()), *named, *inside]
        return [Source(path) for path in sorted(set(found)) if path.is_file()]

    def missing(self) -> str | None:
        """What a preflight says where the official code, a checkpoint or a program is not here; None where all are."""
        if self.folder is None or not (folder := Path(self.folder)).is_dir():
            lacking = [f"folder {self.folder}" if self.folder else "official code (anonymizer.folder)"]
        else:
            lacking = [f"file {folder / need}" for need in self.needs if not (folder / need).exists()]
            programs = {command[0]: None for command in self.commands}
            lacking += [f"program {word}" for word in programs if not (shutil.which(word) or (folder / word).is_file())]
        return f"{self.name}: not here: {', '.join(lacking)}. {self.obtain}" if lacking else None

    def anonymize(self, images: Image, keys: Sequence[Key], ids: Sequence[str]) -> Published:
        """Raises BadMethod."""
        pixels = to_bytes(images).cpu()
        contexts = contexts_of(self, self.nonces, keys, ids, to_floats(pixels))
        return Published(self.changed(pixels, keys, contexts, ids), (b"",) * len(ids))

    def changed(self, pixels: Bytes, keys: Sequence[Key], contexts: Sequence[Context], ids: Sequence[str]) -> Bytes:
        """What the program makes of the pictures."""
        names = [whole_number(id.encode("utf-8", "surrogateescape")) for id in ids]
        return self.run("anonymize", self.command, pixels, names, self.secrets(keys, contexts), ids)

    def secrets(self, keys: Sequence[Key], contexts: Sequence[Context]) -> list[str]:
        """The key of each picture; none where the method takes no key."""
        if self.secret is None:
            return []
        return [self.secret.of(key, each, self.name) for key, each in zip(keys, contexts, strict=True)]

    def run(
        self,
        action: str,
        command: Sequence[str],
        pixels: Bytes,
        names: Sequence[str],
        secrets: Sequence[str],
        labels: Sequence[str],
    ) -> Bytes:
        """What the program makes of each picture, in the order given. A name that stands there twice is one picture."""
        if message := self.missing():
            raise BadMethod(message)
        pictures, label = dict(zip(names, pixels, strict=True)), dict(zip(names, labels, strict=True))
        secret = dict(zip(names, secrets, strict=True)) if secrets else {}
        starts: dict[str, list[str]] = {}
        for name in pictures:
            shared = secret[name] if self.secret is not None and not self.secret.per_picture else ""
            starts.setdefault(shared, []).append(name)
        made: dict[str, PictureBytes] = {}
        for together in starts.values():
            made |= self.start(
                action,
                command,
                {name: pictures[name] for name in together},
                {name: secret[name] for name in together if secret},
                label,
            )
        return torch.stack([made[name] for name in names])

    def start(
        self,
        action: str,
        command: Sequence[str],
        pictures: Mapping[str, PictureBytes],
        secrets: Mapping[str, str],
        label: Mapping[str, str],
    ) -> dict[str, PictureBytes]:
        """Start the program once; its pictures by name."""
        with (
            TemporaryDirectory(prefix="keyanon-") as place,  # for its owner's eyes only
            TemporaryFile("w", encoding="ascii") as key,
        ):
            places = {name: Path(place, name) for name in ("images", "output")}
            for folder in places.values():
                folder.mkdir()
            places["key"] = Path("/dev/fd", str(key.fileno()))
            sizes = {name: self.size_for(picture) for name, picture in pictures.items()}
            for name, picture in pictures.items():
                write_png(places["images"] / f"{name}.png", resized(picture, sizes[name]))
            if self.secret is not None:
                each = [f"{name}.png {text}" for name, text in secrets.items()]
                lines = each if self.secret.per_picture else list(secrets.values())[:1]
                key.writelines(f"{line}\n" for line in lines)
                key.seek(0)  # writes what is in the buffer, too

            words = [re.sub(r"\{(\w+)\}", lambda found: str(places[found[1]]), word) for word in command]
            log = self.watch(action, words, Path(place, "printed"), secrets, key.fileno())
            out = {name: self.picture(places["output"], name, sizes[name], label[name], log) for name in pictures}
        return {name: resized(picture, pictures[name].shape[1:]) for name, picture in out.items()}

    def size_for(self, picture: PictureBytes) -> Sequence[int]:
        return picture.shape[1:] if self.size is None else (self.size, self.size)

    def watch(self, action: str, words: Sequence[str], printed: Path, secrets: Mapping[str, str], key: int) -> Path:
        """Start a command and wait for its end; its log. BadMethod where it fails or takes too long."""
        handed_on = (*ENVIRONMENT, *self.environment)
        environment = {name: os.environ[name] for name in handed_on if name in os.environ}
        environment["PYTHONUNBUFFERED"] = "1"  # so that the log of a program that was killed has its last lines
        begun = perf_counter()
        try:
            with printed.open("wb") as file:
                process = subprocess.Popen(
                    words,
                    cwd=self.folder,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    pass_fds=[key],
                )
        except OSError as error:
            raise BadMethod(
                f"{self.name}: {words[0]} cannot be started in {self.folder} ({error.strerror}); the first word of "
                "anonymizer.command is a program"
            ) from error
        code = end_of(process, self.timeout)
        seconds = perf_counter() - begun

        text = without(printed.read_text("utf-8", errors="replace"), secrets.values())
        end = f"killed after {self.timeout:g} s" if code is None else f"exit code {code} after {seconds:.1f} s"
        Path(self.logs).mkdir(parents=True, exist_ok=True)
        log = Path(self.logs) / f"{self.name}-{action}-{strftime('%Y%m%dT%H%M%S')}-{uuid.uuid4().hex[:8]}.log"
        write_whole(log, f"{text.rstrip()}\n[{' '.join(words)}: {end}]\n".encode())
        if code != 0:
            last = "".join(f"\n  {line}" for line in text.splitlines()[-SHOWN_LINES:])
            remedy = "; anonymizer.timeout gives it longer" if code is None else ""
            raise BadMethod(f"{self.name}: its program to {action} failed, {end}{remedy}. The end of {log}:{last}")
        return log

    def picture(self, output: Path, name: str, size: Sequence[int], label: str, log: Path) -> PictureBytes:
        """The picture of `name` that the program left, checked."""
        stem = self.outputs.replace("{name}", name)
        return one_picture(f"{self.name}, {label}", output, stem, size, f"what it printed is in {log}")


@checked
@dataclass(frozen=True, kw_only=True)
class ReversibleExternal(External):
    """A method that recovers, by the programs of its authors.

    What is published carries the nonce of the picture's key in its header, and nothing where the method takes no key. A
    published picture has another name at recovery than the original had: nothing but its pixels and the key comes from the sender.

    Args:
        recovery: the command that recovers, with the same places.
        authenticate: publish with a tag, and refuse to recover without a good one; not where the method takes no key.
    """

    recovery: Names
    authenticate: bool = True
    senders: ClassVar = ("command", "recovery")  # each has the programs of their own machine

    @property
    def commands(self) -> list[Sequence[str]]:
        return [self.command, self.recovery]

    def anonymize(self, images: Image, keys: Sequence[Key], ids: Sequence[str]) -> Published:
        """Raises BadMethod."""
        pixels, sealed = to_bytes(images).cpu(), (b"",) * len(ids)
        contexts = contexts_of(self, self.nonces, keys, ids, to_floats(pixels))
        out = self.changed(pixels, keys, contexts, ids)
        if self.secret is not None:
            headers = [Header(each.nonce, description=each.description) for each in contexts]
            sealed = seal(headers, out, keys, self.authenticate)
        # no file of others has what it would publish unrounded
        return Published(out, sealed, to_floats(out))

    def recover(self, published: Published, keys: Sequence[Key]) -> Image:
        """Raises BadHeader and BadMethod."""
        pixels = published.images
        secrets: list[str] = []
        if self.secret is not None:
            headers = opened(published, keys, self, self.authenticate)
            secrets = self.secrets(keys, [header.context for header in headers])
        names = [
            # under the key: the name is shown, and must not be a test of guessed keys
            whole_number(
                key.stream(Context(hashlib.sha256(picture.numpy().tobytes() + header).digest()), "external|name", 8)
            )
            for key, picture, header in zip(keys, pixels, published.headers, strict=True)
        ]
        labels = [f"picture {i + 1} of {len(names)}" for i in range(len(names))]
        return to_floats(self.run("recover", self.recovery, pixels, names, secrets, labels))

    def without_key(self, published: Published) -> Image:
        """All that a method without a key recovers; else the published pictures, since its program asks for a key."""
        if self.secret is not None:
            return to_floats(published.images)
        anybody = MasterKey(bytes(KEY_BYTES))  # for the files' names
        return self.recover(published, [anybody] * len(published.images))


@checked
@dataclass(frozen=True, kw_only=True)
class Ready:
    """An irreversible method of which only the pictures are here: ready-made, by id.

    Args:
        about: what the method needs and gives.
        anonymized: folder of the anonymized pictures.
        files: a picture's file below the folder, less its suffix; any format will do.
        size: in pixels, of the square pictures there where it is not the dataset's; they are resized (Lanczos).
    """

    about: About
    anonymized: str | None
    files: Name = "{id}"
    size: Pixels | None = None

    def __post_init__(self) -> None:
        if "{id}" not in self.files:
            raise BadSetting(f"anonymizer.files={self.files!r} does not say where a picture's {{id}} stands")

    @property
    def folders(self) -> dict[str, str | None]:
        return {"anonymizer.anonymized": self.anonymized}

    def sources(self, id: str) -> list[Source]:
        """The ready-made pictures."""
        stem = self.files.replace("{id}", id)
        paths = [Path(folder) / f"{stem}{suffix}" for folder in self.folders.values() if folder for suffix in SUFFIXES]
        return [Source(path) for path in paths if path.is_file()]

    def missing(self) -> str | None:
        """What a preflight says where a folder is not here; None where all are."""
        lacking = [f"{name}={path}" for name, path in self.folders.items() if path is None or not Path(path).is_dir()]
        source = f"make its pictures with the authors' code ({self.about.source}), named by the dataset's ids"
        return f"ready-made pictures: no folder {', '.join(lacking)}; {source}" if lacking else None

    def anonymize(self, images: Image, keys: Sequence[Key], ids: Sequence[str]) -> Published:
        """Raises BadMethod."""
        size = images.shape[-2:]
        return Published(torch.stack([self.picture(self.anonymized, id, size) for id in ids]), (b"",) * len(ids))

    def picture(self, folder: str | None, id: str, size: Sequence[int]) -> PictureBytes:
        if message := self.missing():
            raise BadMethod(message)
        stem = self.files.replace("{id}", id)
        there = size if self.size is None else (self.size, self.size)
        remedy = "or leave the picture out with a list of the dataset's own (dataset.list)"
        return resized(one_picture(f"ready-made, {id}", Path(str(folder)), stem, there, remedy), size)


@checked
@dataclass(frozen=True, kw_only=True)
class ReversibleReady(Ready):
    """Ready-made pictures with ready-made recoveries.

    The header says, encrypted, whose picture it is. Its tag is always looked at, and the pixels have to be the published ones: what
    comes back under another key, or from a damaged file, is in no folder.

    Args:
        recovered: folder of the recovered pictures. Nobody here can tell whether they were made from the published files.
    """

    recovered: str | None
    senders: ClassVar = ("files", "size")

    @property
    def folders(self) -> dict[str, str | None]:
        return {"anonymizer.anonymized": self.anonymized, "anonymizer.recovered": self.recovered}

    def anonymize(self, images: Image, keys: Sequence[Key], ids: Sequence[str]) -> Published:
        """Raises BadMethod."""
        out = super().anonymize(images, keys, ids).images
        contexts = contexts_of(self, nonce_for, keys, ids, to_floats(out))
        headers = [
            Header(each.nonce, sent=ciphered(padded(id), key, each, "id"), description=each.description)
            for each, key, id in zip(contexts, keys, ids, strict=True)
        ]
        return Published(out, seal(headers, out, keys, authenticate=True))

    def recover(self, published: Published, keys: Sequence[Key]) -> Image:
        """Raises BadHeader and BadMethod."""
        try:
            headers = opened(published, keys, self, authenticate=True)
        except BadHeader as error:
            raise BadHeader(
                f"ready-made pictures come back from the published file with the right key alone; start with attacks=[] ({error})"
            ) from error
        ids = [id_of(header, key) for header, key in zip(headers, keys, strict=True)]
        return to_floats(torch.stack([self.picture(self.recovered, id, published.images.shape[-2:]) for id in ids]))


def padded(id: str) -> bytes:
    """A picture's id with nothing to be seen of its length, but for ids of more than 253 bytes."""
    data = id.encode("utf-8", "surrogateescape")
    return len(data).to_bytes(2, "little") + data.ljust(ID_BYTES - 2, b"\0")


def id_of(header: Header, key: Key) -> str:
    """The id in a header of ready-made pictures, which is in clear in header version 2; BadHeader where there is none."""
    data = header.sent
    if header.description is not None:
        told = ciphered(data, key, header.context, "id")
        data = told[2 : 2 + int.from_bytes(told[:2], "little")]
    id = data.decode("utf-8", "surrogateescape")
    if not id or not set(id).isdisjoint("\0") or Path(id).is_absolute() or ".." in Path(id).parts:
        raise BadHeader("the header names no picture: the file was published by another method")
    return id


def one_picture(what: str, folder: Path, stem: str, size: Sequence[int], remedy: str) -> PictureBytes:
    """The picture `stem` of any format below `folder`, of `size` (rows, columns); BadMethod says `what` it is of."""
    found = [path for suffix in SUFFIXES if (path := folder / f"{stem}{suffix}").is_file()]
    if len(found) != 1:
        others = ", ".join(path.name for path in found or islice(folder.rglob("*.*"), SHOWN_FILES)) or "no files"
        raise BadMethod(
            f"{what}: expected one picture {folder / stem} with a suffix of {', '.join(SUFFIXES)}, found {len(found)}; there are: "
            f"{others}. Each picture needs one, also where the method finds no face; {remedy}"
        )
    try:
        picture = open_rgb(found[0])
    except BadPicture as error:
        raise BadMethod(f"{what}: {error}; {remedy}") from error
    if (picture.height, picture.width) != tuple(size):
        raise BadMethod(
            f"{what}: {found[0]} has {picture.height}x{picture.width} pixels, expected {size[0]}x{size[1]}; anonymizer.size says "
            f"what the method reads and writes; {remedy}"
        )
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def resized(picture: PictureBytes, size: Sequence[int]) -> PictureBytes:
    """The picture at `size` (rows, columns), Lanczos; itself where it has that size."""
    if picture.shape[1:] == torch.Size(size):
        return picture
    small = PIL.Image.fromarray(picture.permute(1, 2, 0).numpy())
    height, width = size
    return torch.from_numpy(np.array(small.resize((width, height), PIL.Image.Resampling.LANCZOS))).permute(2, 0, 1)


def whole_number(data: bytes) -> str:
    """A name for anything, of digits only: below 2 ** 60."""
    return str(int.from_bytes(hashlib.sha256(data).digest()[:8], "big") >> 4)


def end_of(process: subprocess.Popen[bytes], timeout: float) -> int | None:
    """The exit code, None for a program that had to be killed. However the waiting ends, what the program started (but for sessions
    of their own) ends with it.
    """
    try:
        return process.wait(timeout)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with suppress(ProcessLookupError):  # the usual case: all have ended
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def without(text: str, secrets: Iterable[str]) -> str:
    """A text in which [key] stands for each of the secrets."""
    longest = sorted(set(secrets), key=len, reverse=True)
    return re.sub("|".join(map(re.escape, longest)), "[key]", text, flags=re.IGNORECASE) if longest else text
