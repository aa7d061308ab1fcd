"""Large pages for memory that is read whole for every token.

Decoding streams all weights once a token. In pages of 4 KiB a good part of that time goes into
address translation; in pages of 2 MiB it does not (SmolLM2-135M int4 in onnxruntime, one core of a
2023 server: 1.2 times the tokens a second). Where Linux leaves the choice to programs
(``transparent_hugepage`` is ``madvise``, as most distributions set it), somebody has to ask.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path

HUGE_PAGE_BYTES = 2 << 20

MADV_HUGEPAGE = 14
MADV_COLLAPSE = 25
"""Linux 6.1: gather a range into huge pages now. Older kernels refuse it and do so by and by."""


def use_huge_pages(already: frozenset[tuple[int, int]] = frozenset()) -> int:
    """Bytes of this process's private memory that now lie in huge pages, or will by and by.

    Call it once a model is loaded. ``already``: ranges (``anonymous_ranges`` from before loading)
    to leave alone. Does nothing elsewhere than on Linux; never raises: it is advice to the kernel.
    """
    if not sys.platform.startswith("linux"):
        return 0
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    advised = 0
    for start, stop in anonymous_ranges() - already:
        first = -(-start // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
        nbytes = (stop - first) // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
        if nbytes > 0 and madvise(first, nbytes, MADV_HUGEPAGE) == 0:
            madvise(first, nbytes, MADV_COLLAPSE)
            advised += nbytes
    return advised


def anonymous_ranges() -> frozenset[tuple[int, int]]:
    """Private writable memory of this process that no file backs, stacks left out; Linux only."""
    if not sys.platform.startswith("linux"):
        return frozenset()
    return frozenset(_ranges(Path("/proc/self/maps").read_text()))


def _ranges(maps: str) -> Iterator[tuple[int, int]]:
    for line in maps.splitlines():
        # "start-stop permissions offset device inode name"; a name only where there is one.
        place, permissions, _, _, inode, *name = line.split()
        named = name and not name[0].startswith(("[heap", "[anon"))
        if permissions == "rw-p" and inode == "0" and not named:
            start, stop = (int(part, 16) for part in place.split("-"))
            yield start, stop
