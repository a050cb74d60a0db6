r"""Digests of a checkpoint that do not depend on how it is cut into files.

A digest is the SHA-256 of one line per tensor, sorted by name: ``name dtype shape sha256\n``, with the
shape as ``2x3`` and the inner SHA-256 over the tensor's bytes (`content_digest`) or
over a fixed sample of them (`sample_digest`). Both are written as ``sha256:`` and 64 hex digits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

from vllm_prinmix.format.checkpoint import Checkpoint

Visitor = Callable[[str, bytes], None]

PIECES = 64
PIECE_BYTES = 64
READERS = 32


def tensor_digests(checkpoint: Checkpoint, visit: Visitor = lambda name, chunk: None) -> dict[str, str]:
    """SHA-256 (hex) of every tensor's bytes, by name.

    ``visit(name, chunk)`` sees every piece of at most 16 MiB that is read (whole elements), so that one
    pass over the files can do more than the digest.
    """
    digests = {}
    for name in sorted(checkpoint.tensors):
        digest = hashlib.sha256()
        for chunk in checkpoint.chunks(name):
            digest.update(chunk)
            visit(name, chunk)
        digests[name] = digest.hexdigest()
    return digests


def combine(checkpoint: Checkpoint, digests: Mapping[str, str]) -> str:
    """The digest of the whole checkpoint from those of its tensors."""
    whole = hashlib.sha256()
    for name in sorted(checkpoint.tensors):
        stored = checkpoint.tensors[name]
        shape = "x".join(map(str, stored.shape))
        whole.update(f"{name} {stored.dtype} {shape} {digests[name]}\n".encode())
    return "sha256:" + whole.hexdigest()


def content_digest(checkpoint: Checkpoint, visit: Visitor = lambda name, chunk: None) -> str:
    """The digest over every byte of every tensor; ``visit`` as for `tensor_digests`."""
    return combine(checkpoint, tensor_digests(checkpoint, visit))


def sample_digest(checkpoint: Checkpoint) -> str:
    """The digest over names, dtypes, shapes and a sample of each tensor's bytes: seconds for 15 GB.

    The sample is the 64 pieces of 64 bytes that begin at ``i * (nbytes - 64) // 63``, i = 0 to 63, so the
    first and the last bytes belong to it; a tensor of at most 4096 bytes is read whole.
    """
    # Small reads wait for the disk, not for the processor: many at once take a fraction of the time.
    with ThreadPoolExecutor(READERS) as readers:
        digests = readers.map(lambda name: _sample(checkpoint, name), checkpoint.tensors)
        return combine(checkpoint, dict(zip(checkpoint.tensors, digests, strict=True)))


GENERATED = "generated:"


def generated_digest(checkpoint: Checkpoint) -> str:
    """Stands for both digests of a base without weights, from its config alone; never equal to a real one."""
    config = json.dumps(checkpoint.config, sort_keys=True)
    return GENERATED + hashlib.sha256(config.encode()).hexdigest()


def _sample(checkpoint: Checkpoint, name: str) -> str:
    stored = checkpoint.tensors[name]
    digest = hashlib.sha256()
    if stored.nbytes <= PIECES * PIECE_BYTES:
        digest.update(checkpoint.read(name))
    else:
        with stored.file.open("rb", buffering=0) as file:
            for i in range(PIECES):
                file.seek(stored.begin + i * (stored.nbytes - PIECE_BYTES) // (PIECES - 1))
                digest.update(file.read(PIECE_BYTES))
    return digest.hexdigest()
