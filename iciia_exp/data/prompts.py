"""Prompts as arrays: their UTF-8 bytes.

Legend: B prompts, L bytes.
"""

import logging

import torch
from torch import Tensor

__all__ = ["LENGTH", "as_bytes", "as_text"]

log = logging.getLogger(__name__)

#: Bytes of a prompt; longer ones are cut.
LENGTH = 512


def as_bytes(prompt: str) -> Tensor:
    """Return a prompt as UTF-8, uint8 [LENGTH], padded with 0 and cut at a whole character."""
    encoded = prompt.encode()
    if len(encoded) > LENGTH:
        log.warning("prompt %r... has %s bytes and is cut to %d", prompt[:40], f"{len(encoded):,}", LENGTH)
        encoded = encoded[:LENGTH].decode(errors="ignore").encode()
    return torch.frombuffer(bytearray(encoded.ljust(LENGTH, b"\0")), dtype=torch.uint8)


def as_text(bytes_BL: Tensor) -> list[str]:
    """Return the prompts of a batch."""
    return [bytes(row.tolist()).rstrip(b"\0").decode() for row in bytes_BL.to(torch.uint8).cpu()]
