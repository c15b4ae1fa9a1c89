"""From one master key to the secret signs of each picture.

    info  = length, purpose | length, nonce | length, description                 lengths in 8 bytes
    K_img = HKDF-SHA256(master, salt = "keyanon/3", info)                         RFC 5869
    bits  = ChaCha20(K_img, 0) keystream                                          RFC 8439
    k     = 2 b - 1 in {-1, +1}^d                                                 arXiv 2510.01031, eq. 3

The master key is 32 random bytes, or comes from a password:

    master = Argon2id(password in UTF-8, salt, passes, memory, lanes)             RFC 9106

Integer arithmetic only, so a key gives the same bits on every device and platform. Nonce and description are public: the nonce
differs from picture to picture, the description says how the file is made (keyanon/channel/description.py). One known pair of a
reused key stream would give the signs away (recovery = original, for all its pictures); two methods that shared one would unlock
each other.
"""

import hashlib
import logging
import os
import stat
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path

from argon2.exceptions import HashingError
from argon2.low_level import ARGON2_VERSION, Type, hash_secret_raw
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from keyanon.context import Context, joined
from keyanon.errors import UserError
from keyanon.settings import checked

log = logging.getLogger(__name__)
KEY_BYTES = 32
SALT_BYTES = 16
RECIPE_BYTES = 8 + SALT_BYTES
MAX_PASSES, MAX_MEMORY, MAX_LANES = 1000, 4 * 2**20, 64  # KiB
MAX_WORK = 16 * 2**20  # KiB written over all passes: about a minute
PASSES, MEMORY, LANES = 3, 64 * 2**10, 4  # RFC 9106's second recommendation


class BadKey(UserError):
    """A key file that is missing, malformed or readable by others; a password or recipe that gives no key."""


@checked
@dataclass(frozen=True)
class Recipe:
    """How a master key comes from a password: public, it travels in the header. By default RFC 9106's second recommendation.

    Recipes are read from strangers' files: BadKey refuses, before anything is allocated, what would cost a receiver more
    than 4 GiB or about a minute.

    Args:
        salt: 16 random bytes.
        passes: over the memory.
        memory: KiB.
        lanes: computed in parallel.
    """

    salt: bytes
    passes: int = PASSES
    memory: int = MEMORY
    lanes: int = LANES

    def __post_init__(self) -> None:
        if len(self.salt) != SALT_BYTES:
            raise BadKey(f"a password's salt has {SALT_BYTES} bytes, this one {len(self.salt)}")
        for name, value, low, high in (
            ("lanes", self.lanes, 1, MAX_LANES),
            ("passes", self.passes, 1, MAX_PASSES),
            ("KiB of memory", self.memory, 8 * self.lanes, MAX_MEMORY),
            ("KiB of memory times passes", self.memory * self.passes, 0, MAX_WORK),
        ):
            if not low <= value <= high:
                raise BadKey(f"the password's recipe asks for {value} {name}; it can be {low} to {high}")

    @property
    def weak(self) -> bool:
        """Whether a guess at the password costs less than by default, in memory or in what is written over all passes."""
        return self.memory < MEMORY or self.memory * self.passes < MEMORY * PASSES

    @property
    def weakness(self) -> str:
        """What is told of a weak recipe."""
        return (
            f"its password goes through Argon2id with {self.passes} passes over {self.memory} KiB, and guesses are cheap; the "
            f"default is {PASSES} passes over {MEMORY} KiB (python -m experiments.keys derive)"
        )

    def derive(self, password: str) -> "MasterKey":
        """The key of a password, which counts in Unicode's composed form (NFC), however it was typed."""
        if not password:
            raise BadKey("the password is empty")
        try:
            secret = unicodedata.normalize("NFC", password).encode()
        except UnicodeEncodeError:  # whose message shows a part of it
            raise BadKey("the password is not text") from None
        try:
            raw = hash_secret_raw(secret, self.salt, self.passes, self.memory, self.lanes, KEY_BYTES, Type.ID)
        except HashingError as error:
            raise BadKey(f"no key from the password with {self.memory} KiB of memory: {error}") from None
        return MasterKey(raw, self)

    def pack(self) -> bytes:
        """Argon2's version (1) | lanes (1) | passes (2) | memory (4) | salt (16)."""
        numbers = bytes([ARGON2_VERSION, self.lanes]) + self.passes.to_bytes(2, "little")
        return numbers + self.memory.to_bytes(4, "little") + self.salt

    @staticmethod
    def unpack(data: bytes) -> "Recipe":
        if len(data) != RECIPE_BYTES:
            raise BadKey(f"a password's recipe has {RECIPE_BYTES} bytes, this one {len(data)}")
        if data[0] != ARGON2_VERSION:
            raise BadKey(f"the password's recipe is for version {data[0]} of Argon2, this program has {ARGON2_VERSION}")
        return Recipe(data[8:], int.from_bytes(data[2:4], "little"), int.from_bytes(data[4:8], "little"), data[1])


@dataclass(frozen=True)
class MasterKey:
    """32 secret bytes. They are kept out of repr, and nothing here writes them anywhere but to a key file.

    `recipe` says how they came from a password, None where they are random.
    """

    secret: bytes = field(repr=False)
    recipe: Recipe | None = None

    def __post_init__(self) -> None:
        if len(self.secret) != KEY_BYTES:
            raise BadKey(f"a master key has {KEY_BYTES} bytes, this one {len(self.secret)}")

    def stream(self, context: Context, purpose: str, size: int) -> bytes:
        """`size` pseudorandom bytes for this context and purpose; those of other ones have nothing in common with them."""
        if context.description is None:
            salt, info = context.nonce, b"keyanon/1|" + purpose.encode()
        else:
            salt, info = b"keyanon/3", joined(purpose.encode(), context.nonce, context.description)
        key = HKDF(hashes.SHA256(), KEY_BYTES, salt=salt, info=info).derive(self.secret)
        return Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor().update(bytes(size))

    @property
    def fingerprint(self) -> str:
        """16 hex digits that tell keys apart; the only thing of a key that is ever logged.

        It gives nothing of a random key away. A guessed password can be checked against it, as against a picture's tag,
        at Argon2id's price for each guess.
        """
        return self.stream(Context(b""), "fingerprint", 8).hex()

    def with_bit_flipped(self, bit: int = 0) -> "MasterKey":
        """The nearest wrong key: one bit of the secret differs."""
        flipped = bytearray(self.secret)
        flipped[bit // 8] ^= 1 << (bit % 8)
        return MasterKey(bytes(flipped))


def experiment_key(seed: int = 0) -> MasterKey:
    """A key that anyone can compute from its seed: experiments on public data repeat with it, and it protects nobody."""
    return MasterKey(hashlib.sha256(b"keyanon experiment key %d" % seed).digest())


def read_key(path: str | Path) -> MasterKey:
    """The master key of a key file: 64 hex digits, then the recipe if it came from a password; readable by its owner alone."""
    path = Path(path)
    malformed = f"key.path: {path} is not a key file ({2 * KEY_BYTES} hex digits)"
    try:
        text, mode = path.read_text(encoding="ascii").strip(), path.stat().st_mode
    except FileNotFoundError:
        raise BadKey(f"key.path: no key file {path}; make one with: python -m experiments.keys new {path}") from None
    except UnicodeDecodeError:
        raise BadKey(malformed) from None
    except (OSError, ValueError) as error:
        raise BadKey(f"key.path: {str(path)!r} cannot be read ({error})") from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise BadKey(f"key.path: {path} can be read by others; run: chmod 600 {path}")
    first, _, second = text.partition("\n")
    try:
        secret, recipe = bytes.fromhex(first), bytes.fromhex(second)
    except ValueError:
        raise BadKey(malformed) from None
    if len(secret) != KEY_BYTES:
        size = f"{path} holds {len(secret)} bytes, a master key has {KEY_BYTES}"
        raise BadKey(f"key.path: {size}; make one with: python -m experiments.keys new PATH")
    return MasterKey(secret, Recipe.unpack(recipe) if recipe else None)


def write_new_key(path: str | Path) -> MasterKey:
    """Draw a fresh master key and write it to a new key file."""
    return write_key(path, MasterKey(os.urandom(KEY_BYTES)))


def write_key(path: str | Path, key: MasterKey) -> MasterKey:
    """Write `key` to a new file that only its owner can read; an existing file is refused."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise BadKey(f"{path} exists; a key file is never overwritten") from None
    with os.fdopen(descriptor, "w") as file:
        file.write(key.secret.hex() + "\n" + (key.recipe.pack().hex() + "\n" if key.recipe else ""))
    return key


@dataclass(frozen=True)
class Nobody:
    """Stands where a key is asked for and none is there; what draws from it is not the way of one without a key."""

    def stream(self, context: Context, purpose: str, size: int) -> bytes:
        raise BadKey(f"there is no key here to draw {purpose} from")
