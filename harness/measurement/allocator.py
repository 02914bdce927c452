"""How the C library keeps freed memory: set for what is measured (glibc; elsewhere no effect).

Left alone, it returns large blocks to the system when they are freed, or not, as the addresses of
a process happen to fall. A small convolutional network then spends up to half of its time in page
faults, more or less from one process to the next.
"""

from __future__ import annotations

import contextlib
import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
LARGEST_INT = 2**31 - 1


def _set(**options: int) -> None:
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        for name, value in options.items():
            library.mallopt(globals()[name], value)


def keep_freed_blocks() -> None:
    """For timing: freed memory stays with the process and is used again.

    A forward pass after the first ones causes no page faults; a server's allocator does the same.
    """
    _set(M_MMAP_MAX=0, M_TRIM_THRESHOLD=LARGEST_INT)


def map_every_block() -> None:
    """For memory: blocks from 64 KiB on are mapped and unmapped one by one.

    The resident size then follows the living tensors.
    """
    _set(M_MMAP_THRESHOLD=64 * 1024, M_TRIM_THRESHOLD=0)


def return_free_memory() -> None:
    """Give what is kept for later back to the system."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
