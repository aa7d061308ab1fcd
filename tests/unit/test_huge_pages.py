"""Memory is advised into huge pages where the kernel leaves that to us, and stays as it was."""

from __future__ import annotations

import ctypes
import sys
import time
from types import SimpleNamespace

import numpy as np
import psutil
import pytest

from edgellm.runtimes import huge_pages
from edgellm.runtimes.huge_pages import (
    HUGE_PAGE_BYTES,
    PIECE_BYTES,
    HugePages,
    _pieces,
    _ranges,
    anonymous_ranges,
    without,
)

MAPS = """\
55d0-55e0 rw-p 00000000 00:00 0                          [heap]
7f00-7f10 rw-p 00000000 00:00 0
7f10-7f20 rw-p 00000000 00:00 0                          [anon:cache]
7f20-7f30 r--p 00000000 00:00 0
7f30-7f40 rw-p 00001000 fe:01 1234                       /usr/lib/a library.so
7f40-7f50 rw-p 00000000 00:00 0                          [stack]
7f50-7f60 rw-s 00000000 00:01 77                         /dev/zero (deleted)
"""


def test_private_writable_memory_without_a_file_is_meant() -> None:
    assert list(_ranges(MAPS)) == [(0x55D0, 0x55E0), (0x7F00, 0x7F10), (0x7F10, 0x7F20)]


def test_what_was_there_before_is_left_alone_where_ranges_have_grown_together() -> None:
    now = frozenset({(0, 100), (200, 300), (400, 500)})
    before = frozenset({(10, 20), (20, 30), (90, 120), (200, 300), (440, 600)})
    assert without(now, before) == [(0, 10), (30, 90), (400, 440)]
    assert without(now, frozenset()) == sorted(now)


def test_pieces_are_whole_pages_within_the_ranges() -> None:
    page = HUGE_PAGE_BYTES
    found = list(_pieces([(page - 5, 11 * page + 7), (20 * page + 1, 22 * page - 1)]))
    assert found == [(page, PIECE_BYTES), (page + PIECE_BYTES, 2 * page)]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux has /proc")
def test_contents_stay_as_they_were() -> None:
    before = anonymous_ranges()
    values = np.arange(8 * HUGE_PAGE_BYTES, dtype=np.uint8)
    pages = HugePages(before)
    pages.wait()
    np.testing.assert_array_equal(values, np.arange(8 * HUGE_PAGE_BYTES, dtype=np.uint8))
    again = HugePages(anonymous_ranges())
    again.wait()
    assert again.advised_bytes == 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux has /proc")
def test_untouched_memory_is_not_filled() -> None:
    before = anonymous_ranges()
    lazy = np.zeros(64 * HUGE_PAGE_BYTES, dtype=np.uint8)
    process = psutil.Process()
    resident = process.memory_info().rss
    HugePages(before).wait()
    assert process.memory_info().rss - resident < 8 * HUGE_PAGE_BYTES
    assert not lazy[-1]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="nothing is asked elsewhere")
def test_stopping_is_at_once_and_may_be_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    def madvise(start: int, nbytes: int, advice: int) -> int:
        time.sleep(0.001)
        return 0

    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(madvise=madvise))
    # Two minutes of pieces, were nobody to stop it.
    monkeypatch.setattr(huge_pages, "anonymous_ranges", lambda: frozenset({(0, 1 << 40)}))
    pages = HugePages(frozenset())
    started = time.perf_counter()
    pages.stop()
    pages.stop()
    assert time.perf_counter() - started < 10
    assert pages.advised_bytes < 1 << 38


def test_it_does_nothing_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    pages = HugePages(frozenset({(0, 1 << 40)}))
    pages.wait()
    assert pages.advised_bytes == 0
