"""Keeping small problems on one thread."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Problems up to this size, in rows and columns, are worked on by one thread.
SERIAL = 1024


@contextmanager
def one_thread_if_small(size: int) -> Iterator[None]:
    """Within the block, torch uses one CPU thread where ``size`` is at most SERIAL.

    Algorithms that go column by column synchronise their threads at every step. On small problems that gains
    little at best, and on a busy machine it costs many times the work itself.
    """
    threads = torch.get_num_threads()
    if size > SERIAL or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
