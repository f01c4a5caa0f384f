"""Memory of a process that makes and drops large tensors again and again."""

from __future__ import annotations

import ctypes
import gc
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt (malloc.h)."""
KEPT_BYTES = 2**30
"""Freed memory at the end of a heap up to which nothing is given back."""
LARGEST_BYTES = 32 * 2**20
"""Blocks below this size come from a heap, which is kept, and not from pages of their own; glibc allows no more."""


def keep_freed_memory() -> None:
    """Let this process keep up to 1 GiB of what it frees, instead of giving it back to the system at once.

    A network on a CPU frees and wants the same megabytes at every layer. By default glibc gives them back each time,
    above all where it computes in a thread that is not the main one, and the system then finds and clears the pages
    anew: up to a quarter of the time of a small network. Elsewhere than on glibc this does nothing.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST_BYTES)


def free_circles() -> None:
    """Free what refers to itself in circles, as DeepSpeed's engines do.

    Python looks for circles when there are many new objects, however many bytes hang on the few. Finalizers open
    further circles, hence two passes.
    """
    gc.collect()
    gc.collect()
