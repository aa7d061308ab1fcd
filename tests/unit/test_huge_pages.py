"""Memory is advised into huge pages where the kernel leaves that to us, and stays as it was."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from edgellm.runtimes.huge_pages import HUGE_PAGE_BYTES, _ranges, anonymous_ranges, use_huge_pages

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


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux has /proc")
def test_contents_stay_and_what_was_there_before_is_left_alone() -> None:
    before = anonymous_ranges()
    values = np.arange(8 * HUGE_PAGE_BYTES, dtype=np.uint8)
    assert use_huge_pages(before) >= 0
    np.testing.assert_array_equal(values, np.arange(8 * HUGE_PAGE_BYTES, dtype=np.uint8))
    assert use_huge_pages(anonymous_ranges()) == 0


def test_it_does_nothing_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert use_huge_pages() == 0
