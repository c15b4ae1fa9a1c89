"""The public header: what a receiver needs besides pixels and key, carried in the PNG.

"KA" | version (1) | flags (1) | nonce (24) | length (2) | zlib(description) | [password recipe (24)] | [length (2) | sent bytes]
     | [length (2) | seam bytes] | [length (2) | residual bytes] | [rows - 1 (1) | columns - 1 (1) | zlib(mask bits, row by row)]
     | [tag (32)]

    tag = HMAC-SHA256(K_tag, length of what is before the tag (4) | what is before it | height (4) | width (4) | pixels)

with K_tag from the key's stream for nonce and description (keyanon/channel/keys.py). Version 2 had no description, and is read as
before. docs/file-format.md is the specification.

The tag commits to the key: a file that two keys accept would be a collision of HMAC-SHA256, or of HKDF and ChaCha20 on the way to
K_tag. The tags of AES-GCM and ChaCha20-Poly1305 commit to no key: they are polynomials, one file can be made that thousands of
keys accept, and a receiver's yes or no tests as many passwords at once (Len, Grubbs and Ristenpart, Partitioning oracle attacks,
USENIX Security 2021).

With a tag anyone can check guesses of a password, at Argon2id's price. Without one (`authenticate=False`) a wrong key, or a
changed picture, gives some plausible face and no message.
"""

import hmac
import io
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from keyanon.channel.keys import RECIPE_BYTES, BadKey, MasterKey, Recipe
from keyanon.context import NONCE_BYTES, Context
from keyanon.errors import UserError
from keyanon.types import Bytes, Key, PictureBytes

MAGIC = b"KA"
VERSION, SILENT_VERSION = 3, 2  # the second says nothing of how its files were made
HAS_MASK, HAS_SENT, HAS_SEAM, HAS_RECIPE, HAS_TAG, HAS_RESIDUAL = 1, 2, 4, 8, 16, 32
START = len(MAGIC) + 2
FIXED = START + NONCE_BYTES
TAG_BYTES = 32
MAX_BYTES = 2**16  # of a header; those of real pictures have some hundreds
MAX_DESCRIPTION = 2**12  # bytes, before they are compressed
MAX_PARTS = MAX_BYTES - 13 * 2**10  # of sent, seam and residual; all the rest is less than 13 KiB


class BadHeader(UserError):
    """A published file without a header, with one that cannot be read, or with one that the key does not accept."""


@dataclass(frozen=True)
class Header:
    """What travels with a picture.

    The nonce of its key stream, how it was made (keyanon/channel/description.py; None in a file of version 2) and, where the
    method keeps them, the face mask (1 u v) at latent size, what the keyed transform sends along (keyanon/methods/transforms.py),
    the jumps at the face's border (keyanon/methods/seams.py), what the pixels lack of the latent (keyanon/methods/residuals.py),
    how the key comes from a password, and the tag.
    """

    nonce: bytes
    mask: Bool[Tensor, "1 u v"] | None = None
    sent: bytes = b""
    seam: bytes = b""
    recipe: Recipe | None = None
    tag: bytes = b""
    residual: bytes = b""
    description: bytes | None = b"{}"

    @property
    def context(self) -> Context:
        """What selects the file's key streams."""
        return Context(self.nonce, self.description)

    def pack(self) -> bytes:
        parts = {HAS_SENT: self.sent, HAS_SEAM: self.seam, HAS_RESIDUAL: self.residual}
        if (size := sum(map(len, parts.values()))) > MAX_PARTS:
            raise BadHeader(f"no room in a header for {size} bytes from transform, seam and residual")
        there = {HAS_MASK: self.mask is not None, HAS_RECIPE: self.recipe is not None, HAS_TAG: self.tag} | parts
        version = SILENT_VERSION if self.description is None else VERSION
        packed = MAGIC + bytes([version, sum(flag for flag, has in there.items() if has)]) + self.nonce
        if self.description is not None:
            if len(self.description) > MAX_DESCRIPTION:
                raise BadHeader(f"no room in a header for {len(self.description)} bytes that say how the file is made")
            told = zlib.compress(self.description, 9)
            packed += len(told).to_bytes(2, "little") + told
        packed += self.recipe.pack() if self.recipe is not None else b""
        for part in parts.values():
            packed += len(part).to_bytes(2, "little") + part if part else b""
        if self.mask is not None:
            _, u, v = self.mask.shape
            packed += bytes([u - 1, v - 1]) + zlib.compress(np.packbits(self.mask.cpu().numpy()).tobytes(), 9)
        return packed + self.tag

    @staticmethod
    def unpack(data: bytes) -> "Header":
        """Any bytes give a header or BadHeader, at the cost of reading them; the tag is not checked here."""
        if not data:
            raise BadHeader(
                "the file carries no keyanon header: it was not published by keyanon, or an editor removed it"
            )
        if len(data) > MAX_BYTES:
            raise BadHeader(f"the keyanon header has {len(data)} bytes; it can have at most {MAX_BYTES}")
        if len(data) < START or not data.startswith(MAGIC):
            raise BadHeader("the keyanon header is damaged: it does not begin as one")
        version, flags = data[2], data[3]
        if version not in (SILENT_VERSION, VERSION):
            raise BadHeader(
                f"keyanon header version {version}: this program reads versions {SILENT_VERSION} and {VERSION}; "
                "recover the picture with the keyanon that published it"
            )
        if flags >= 2 * HAS_RESIDUAL:
            raise BadHeader(f"the keyanon header is damaged: flags {flags} mean nothing")
        end = len(data) - (TAG_BYTES if flags & HAS_TAG else 0)
        if end < FIXED:
            raise BadHeader("the keyanon header is damaged: it is cut short")
        rest = io.BytesIO(data[START:end])

        def take(size: int) -> bytes:
            taken = rest.read(size)
            if len(taken) < size:
                raise BadHeader("the keyanon header is damaged: it is cut short")
            return taken

        nonce = take(NONCE_BYTES)
        told = take(int.from_bytes(take(2), "little")) if version == VERSION else None
        description = None if told is None else unpacked_description(told)
        try:
            recipe = Recipe.unpack(take(RECIPE_BYTES)) if flags & HAS_RECIPE else None
        except BadKey as error:
            raise BadHeader(f"the keyanon header is damaged: {error}") from None
        sent, seam, residual = (
            take(int.from_bytes(take(2), "little")) if flags & flag else b""
            for flag in (HAS_SENT, HAS_SEAM, HAS_RESIDUAL)
        )
        mask = unpacked_mask(take(2), rest.read()) if flags & HAS_MASK else None
        if rest.read(1):
            raise BadHeader("the keyanon header is damaged: it does not end where it should")
        return Header(nonce, mask, sent, seam, recipe, data[end:], residual, description)


def unpacked_description(data: bytes) -> bytes:
    """Inflates no more than a byte too many; what is not one JSON object, written in the one way it can be, is refused."""
    text = inflated(data, MAX_DESCRIPTION)
    try:
        told = json.loads(text) if text is not None else None
        whole = isinstance(told, dict) and canonical(told) == text
    except (ValueError, RecursionError):
        whole = False
    if text is None or not whole:
        raise BadHeader("the keyanon header is damaged: what it says of how the file was made cannot be read")
    return text


def canonical(about: object) -> bytes:
    """JSON in the one way it is written in headers; raises ValueError for NaN."""
    return json.dumps(about, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def inflated(data: bytes, most: int) -> bytes | None:
    """The bytes of a whole zlib stream, None where it is none or has more than `most`; inflates no more than a byte too many."""
    inflating = zlib.decompressobj()
    try:
        out = inflating.decompress(data, most + 1)
    except zlib.error:
        return None
    return out if len(out) <= most and inflating.eof and not inflating.unused_data else None


def unpacked_mask(last: bytes, data: bytes) -> Bool[Tensor, "1 u v"]:
    u, v = last[0] + 1, last[1] + 1
    size = -(-u * v // 8)
    bits = inflated(data, size)
    if bits is None or len(bits) != size:
        raise BadHeader("the keyanon header is damaged: its mask cannot be read")
    mask = np.unpackbits(np.frombuffer(bits, np.uint8))[: u * v].reshape(1, u, v)
    return torch.from_numpy(mask.astype(bool))


def face_masks(headers: Sequence[Header], size: tuple[int, int]) -> Bool[Tensor, "b 1 u v"]:
    """The masks of headers that have them; BadHeader where one is missing, or has not this size (rows, columns)."""
    found = []
    for header in headers:
        if header.mask is None:
            raise BadHeader("the header carries no face mask: the file was published by another method")
        if header.mask.shape != (1, *size):
            there, here = "x".join(map(str, header.mask.shape[1:])), "x".join(map(str, size))
            raise BadHeader(
                f"the header's mask has {there} cells, a picture of this size {here}: "
                "it was resized or cropped after it was published"
            )
        found.append(header.mask)
    return torch.stack(found)


def seal(headers: Sequence[Header], images: Bytes, keys: Sequence[Key], authenticate: bool) -> tuple[bytes, ...]:
    """The bytes of published pictures' headers, with the keys' recipes and, if asked, their tags.

    BadKey where a password's recipe is weaker than the default: whoever has the file could try passwords at its price.
    """
    sealed = []
    for header, pixels, key in zip(headers, images, keys, strict=True):
        if isinstance(key, MasterKey) and key.recipe is not None and key.recipe.weak:
            raise BadKey(f"nothing is published under this key: {key.recipe.weakness}")
        header = replace(header, recipe=key.recipe if isinstance(key, MasterKey) else None, tag=b"")
        if authenticate:
            body = replace(header, tag=bytes(TAG_BYTES)).pack()[:-TAG_BYTES]
            sealed.append(body + tag(key, header.context, body, pixels))
        else:
            sealed.append(header.pack())
    return tuple(sealed)


def unseal(data: Sequence[bytes], images: Bytes, keys: Sequence[Key], authenticate: bool) -> list[Header]:
    """The headers of published pictures. BadHeader, which names the picture's place, where one cannot be read or, if asked
    to look at tags, lacks one that fits header, pixels and key.
    """
    headers = []
    for i, (packed, pixels, key) in enumerate(zip(data, images, keys, strict=True)):
        try:
            headers.append(header := Header.unpack(packed))
            if authenticate:
                check(header, packed, pixels, key)
        except BadHeader as error:
            raise BadHeader(f"{placed(i, len(data))}{error}") from None
    return headers


def placed(i: int, count: int) -> str:
    """The beginning of a message about one of several pictures."""
    return f"picture {i + 1} of {count}: " if count > 1 else ""


def check(header: Header, packed: bytes, pixels: PictureBytes, key: Key) -> None:
    """Raises BadHeader unless the tag is the key's, for these bytes and pixels."""
    if not header.tag:
        raise BadHeader(
            "the header carries no tag, so nothing tells whether key and picture are right; "
            "anonymizer.authenticate=false recovers some face all the same"
        )
    if not hmac.compare_digest(header.tag, tag(key, header.context, packed[:-TAG_BYTES], pixels)):
        raise BadHeader(
            "this is not the picture's key, or picture or header were changed after publishing (edited, resized, saved as JPEG); "
            "the tag cannot tell which"
        )


def tag(key: Key, context: Context, body: bytes, pixels: PictureBytes) -> bytes:
    _, height, width = pixels.shape
    length, *size = (number.to_bytes(4, "little") for number in (len(body), height, width))
    message = b"".join([length, body, *size, pixels.cpu().numpy().tobytes()])
    return hmac.digest(key.stream(context, "tag", TAG_BYTES), message, "sha256")
