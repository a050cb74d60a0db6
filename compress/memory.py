"""Giving freed memory back to the system."""

from __future__ import annotations

import ctypes


def trim() -> None:
    """Return what the C library's allocator keeps of freed tensors; does nothing where it is not glibc.

    glibc keeps freed blocks below 32 MB for reuse, but in holes that the next layer's tensors do not fit: a
    run would grow by up to a layer's size with every layer.
    """
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)
