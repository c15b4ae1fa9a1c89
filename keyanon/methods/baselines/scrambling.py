"""The lock of the early literature: the face cut in square blocks, and these put in a secret order.

    b_1 .. b_n the blocks of the face,    b'_i = S_i b_p(i),    p a secret order
    S_i does nothing or, if asked for, puts the pixels of the block in a secret order and inverts it (x -> 255 - x) or not

Bytes only move, so the key brings every bit back from the 8-bit file. Which blocks are the face's is in the public header. Only an
order is hidden: everyone sees which colours the face has and, of whole blocks, what is in them. Without the key these are put
together again as a jigsaw puzzle is, even inverted ones (Chuman, Kurihara and Kiya, On the security of block scrambling-based EtC
systems against extended jigsaw puzzle solver attacks, IEICE Transactions on Information and Systems, 2018).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Int64, UInt8
from torch import Tensor

from keyanon.channel.description import opened
from keyanon.channel.headers import BadHeader, Header, seal
from keyanon.channel.nonces import Nonces, contexts_of, nonce_for
from keyanon.channel.pixels import to_bytes, to_floats
from keyanon.channel.streams import orders, signs
from keyanon.context import Context
from keyanon.errors import BadSetting
from keyanon.settings import Pixels, checked
from keyanon.types import About, Bytes, FaceParser, Image, Key, Published

MAX_CELLS = 256  # a side: what a header's mask can have


@checked
@dataclass(frozen=True)
class Scrambling:
    """Keyed block scrambling; a wrong key, where `authenticate` is False, gives another scrambled face.

    Args:
        parser: what finds the face; asked for masks of one cell a block.
        block: side of a block in pixels; 1 puts all pixels of the face in one secret order. BadSetting where a picture is
            no whole number of blocks.
        inside: put the pixels of each block in an order of its own.
        negative: invert half of the blocks, by a secret bit each.
        nonces: which pictures share a key stream. With one shared, a known pair gives the order away.
        authenticate: publish with a tag, and refuse to recover without a good one.
    """

    parser: FaceParser
    block: Pixels = 8
    inside: bool = False
    negative: bool = False
    nonces: Nonces = nonce_for
    authenticate: bool = True
    senders: ClassVar = ("parser",)  # the mask is in the header

    @property
    def about(self) -> About:
        return About("keyed", "8-bit file + header", 256, 256, "-", "-", "Chuman, Kurihara and Kiya, IEICE 2018")

    def anonymize(self, images: Image, keys: Sequence[Key], ids: Sequence[str]) -> Published:
        pixels = to_bytes(images).cpu()
        images = to_floats(pixels)
        contexts = contexts_of(self, self.nonces, keys, ids, images)
        mask = self.parser.mask(images, self.grid(images)).cpu()
        blocks = cut(pixels, self.block)
        for picture, cells, key, context in zip(blocks, mask[:, 0], keys, contexts, strict=True):
            face = picture[cells]
            order, inner, inverted = self.lock(key, context, face)
            face = face[order].gather(1, inner)
            picture[cells] = torch.where(inverted, 255 - face, face)
        published = joined(blocks, self.block)
        headers = [
            Header(each.nonce, cells, description=each.description) for each, cells in zip(contexts, mask, strict=True)
        ]
        # what would be published unrounded is just the same
        return Published(published, seal(headers, published, keys, self.authenticate), to_floats(published))

    def recover(self, published: Published, keys: Sequence[Key]) -> Image:
        """The originals, to the bit where the files are as published; raises BadHeader."""
        headers = opened(published, keys, self, self.authenticate)
        grid = self.grid(published.images)
        blocks = cut(published.images, self.block).clone()  # with blocks of one pixel it would be a view
        for picture, header, key in zip(blocks, headers, keys, strict=True):
            if header.mask is None or header.mask.shape[1:] != grid:
                raise BadHeader(
                    f"the header carries no mask of the {grid[0]}x{grid[1]} blocks of this picture: the file was published by "
                    "another method or with other anonymizer.block, or resized after it was published"
                )
            cells = header.mask[0]
            face = picture[cells]
            order, inner, inverted = self.lock(key, header.context, face)
            face = torch.where(inverted, 255 - face, face)
            face = face.scatter(1, inner, face)
            picture[cells] = torch.empty_like(face).index_copy_(0, order, face)
        return to_floats(joined(blocks, self.block))

    def lock(
        self, key: Key, context: Context, face: UInt8[Tensor, "n p 3"]
    ) -> tuple[Int64[Tensor, " n"], Int64[Tensor, "n p 3"], Bool[Tensor, "n 1 1"]]:
        """The order of the face's n blocks, that of the p pixels of each, and which of them are inverted."""
        n, p, _ = face.shape
        inner = orders(key, context, "scrambling|pixels", n, p) if self.inside else torch.arange(p).expand(n, p)
        inverted = signs(key, context, (n,)) < 0 if self.negative else torch.zeros(n, dtype=torch.bool)
        return (
            orders(key, context, "scrambling|blocks", 1, n)[0],
            inner[..., None].expand(n, p, 3),
            inverted[:, None, None],
        )

    def wrong_size(self, size: int) -> str | None:
        """What a preflight says of pictures that do not consist of blocks."""
        return self.misfit(size, size)

    def misfit(self, height: int, width: int) -> str | None:
        if height % self.block == width % self.block == 0 and max(height, width) <= MAX_CELLS * self.block:
            return None
        return (
            f"anonymizer.block={self.block}: a picture of {height}x{width} pixels does not consist of such blocks, at most "
            f"{MAX_CELLS} a side; take another dataset.size or anonymizer.block"
        )

    def grid(self, images: Image | Bytes) -> tuple[int, int]:
        """Rows and columns of blocks."""
        height, width = images.shape[-2:]
        if message := self.misfit(height, width):
            raise BadSetting(message)
        return height // self.block, width // self.block


def cut(pixels: UInt8[Tensor, "b 3 h w"], block: int) -> UInt8[Tensor, "b rows columns p 3"]:
    """Pictures as blocks, each its pixels row by row."""
    b, _, height, width = pixels.shape
    apart = pixels.reshape(b, 3, height // block, block, width // block, block)
    return apart.permute(0, 2, 4, 3, 5, 1).reshape(b, height // block, width // block, block**2, 3)


def joined(blocks: UInt8[Tensor, "b rows columns p 3"], block: int) -> UInt8[Tensor, "b 3 h w"]:
    b, rows, columns, _, _ = blocks.shape
    apart = blocks.reshape(b, rows, columns, block, block, 3)
    return apart.permute(0, 5, 1, 3, 2, 4).reshape(b, 3, rows * block, columns * block)
