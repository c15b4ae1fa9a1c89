"""The baseline that every learned method has to beat: any irreversible method, and the pixels it took away encrypted in the header.

    x'   = V(x),  V any anonymizer                                              what everyone sees
    sent = iv (12) | AES-256-GCM_K(place | WebP of x where x' differs from x)   RFC 5116, 9649
    K    = the key's stream for the picture's nonce,    iv = a keyed digest of what is encrypted (the idea of RFC 5297)

Recovery is exact, or as good as `quality` says, and the picture shows nothing of the original but what V leaves. It pays in bytes:
the header has the size of the compressed face. All that it tells of the face is that size.

AES-GCM commits to no key; the header's tag does (keyanon/channel/headers.py), and refuses a wrong one. With
`authenticate=False` a wrong
key leaves x' as it is: no stranger's face that could be taken for the original, as methods give it that turn keys into faces.
"""

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import numpy as np
import PIL.Image
import torch
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from keyanon.channel.description import opened
from keyanon.channel.headers import MAX_PARTS, BadHeader, Header, seal
from keyanon.channel.nonces import Nonces, contexts_of, nonce_for
from keyanon.channel.pixels import UNREADABLE, to_bytes, to_floats
from keyanon.context import Context
from keyanon.errors import BadSetting
from keyanon.methods.baselines.classical import bounds
from keyanon.settings import checked, whole
from keyanon.types import About, Anonymizer, Image, Key, PictureBytes, Published

IV_BYTES, GCM_TAG_BYTES = 12, 16


@checked
@dataclass(frozen=True)
class EncryptedCrop:
    """`visible` with the original face encrypted beside it.

    Args:
        visible: what is shown; headers of its own are not published.
        quality: of lossy WebP, 0 to 100; None compresses without loss.
        nonces: which pictures share a key stream; also a shared one gives nothing away here.
        authenticate: publish with a tag, and refuse to recover without a good one.
    """

    visible: Anonymizer
    quality: Annotated[int, whole(0, 100)] | None = None
    nonces: Nonces = nonce_for
    authenticate: bool = True
    senders: ClassVar = ("visible", "quality")

    @property
    def about(self) -> About:
        return About("keyed", "8-bit file + header", 256, 256, "-", "-", "RFC 5116")

    def anonymize(self, images: Image, keys: Sequence[Key], ids: Sequence[str]) -> Published:
        """BadSetting where a crop is too large for a header."""
        originals = to_bytes(images).cpu()
        contexts = contexts_of(self, self.nonces, keys, ids, to_floats(originals))
        shown = self.visible.anonymize(images, keys, ids).images
        headers = []
        for key, id, context, original, published in zip(keys, ids, contexts, originals, shown, strict=True):
            sent = encrypted(packed(original, published, self.quality), key, context)
            if len(sent) > MAX_PARTS:
                raise BadSetting(
                    f"{id}: its encrypted face has {len(sent)} bytes, a header has room for {MAX_PARTS}; take a lower "
                    "anonymizer.quality (null is lossless, try 90) or a smaller dataset.size"
                )
            headers.append(Header(context.nonce, sent=sent, description=context.description))
        # what would be published unrounded is just the same
        return Published(shown, seal(headers, shown, keys, self.authenticate), to_floats(shown))

    def recover(self, published: Published, keys: Sequence[Key]) -> Image:
        """Raises BadHeader; where `authenticate` is False a picture whose crop the key does not open stays as it is."""
        headers = opened(published, keys, self, self.authenticate)
        out = []
        for picture, header, key in zip(published.images, headers, keys, strict=True):
            crop = decrypted(header.sent, key, header.context)
            if crop is None and self.authenticate:
                raise BadHeader("the header carries no encrypted face: the file was published by another method")
            out.append(picture if crop is None else with_crop(picture, crop))
        return to_floats(torch.stack(out))


def packed(original: PictureBytes, published: PictureBytes, quality: int | None) -> bytes:
    """Top (2) | left (2) | WebP of the original's pixels that were changed, the others transparent; b"" where none was."""
    changed = (original != published).any(0)
    if not changed.any():
        return b""
    rows, columns = bounds(changed)
    crop = torch.cat([original, 255 * changed[None].to(torch.uint8)])[:, rows, columns].permute(1, 2, 0)
    buffer = io.BytesIO()
    options = {"lossless": True, "quality": 100} if quality is None else {"quality": quality}
    PIL.Image.fromarray(crop.numpy()).save(buffer, "WEBP", **options)
    place = b"".join(int(side.start).to_bytes(2, "little") for side in (rows, columns))
    return place + buffer.getvalue()


def with_crop(picture: PictureBytes, crop: bytes) -> PictureBytes:
    """The picture with a packed crop put back; raises BadHeader where it is none, or reaches beyond the picture."""
    if not crop:
        return picture
    top, left = int.from_bytes(crop[:2], "little"), int.from_bytes(crop[2:4], "little")
    out = picture.clone()
    try:
        with PIL.Image.open(io.BytesIO(crop[4:]), formats=["WEBP"]) as opened:
            place = out[:, top : top + opened.height, left : left + opened.width]
            if place.shape[1:] != (opened.height, opened.width):
                raise BadHeader(
                    "the encrypted face reaches beyond the picture: it was resized or cropped after it was published"
                )
            rgba = torch.from_numpy(np.array(opened.convert("RGBA"))).permute(2, 0, 1)
    except UNREADABLE as error:
        raise BadHeader(f"the encrypted face cannot be read ({error}): the file was made by another program") from error
    place[:] = torch.where(rgba[3] > 0, rgba[:3], place)
    return out


def encrypted(plain: bytes, key: Key, context: Context) -> bytes:
    """The vector is a function of the plain bytes: none comes twice for different ones, also where pictures share a nonce."""
    iv = key.stream(replace(context, nonce=hashlib.sha256(plain).digest()), "crop|iv", IV_BYTES)
    return iv + AESGCM(key.stream(context, "crop", 32)).encrypt(iv, plain, None)


def decrypted(sent: bytes, key: Key, context: Context) -> bytes | None:
    """None where `sent` is not the key's."""
    if len(sent) < IV_BYTES + GCM_TAG_BYTES:
        return None
    try:
        return AESGCM(key.stream(context, "crop", 32)).decrypt(sent[:IV_BYTES], sent[IV_BYTES:], None)
    except InvalidTag:
        return None
