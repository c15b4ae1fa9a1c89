"""What a key stream is for: one file of one method. Nothing heavy is imported here, so that keys can be made in a moment."""

from dataclasses import dataclass

NONCE_BYTES = 24


@dataclass(frozen=True)
class Context:
    """What selects a key stream, besides its purpose.

    Args:
        nonce: public; of a picture, unless several are meant to share a key stream.
        description: how the file is made, as its header says it (keyanon/channel/description.py); None for a file of header
            version 2, which does not say.
    """

    nonce: bytes
    description: bytes | None = b""


def joined(*parts: bytes) -> bytes:
    """Byte strings in one, each after its length: two lists of strings never give the same."""
    return b"".join(len(part).to_bytes(8, "little") + part for part in parts)
