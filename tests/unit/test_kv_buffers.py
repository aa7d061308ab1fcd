"""Memory for keys and values: zeros, aligned, apart from each other, and refused in words."""

from __future__ import annotations

import numpy as np
import pytest

from edgellm.errors import GenerationError
from edgellm.runtimes.huge_pages import HUGE_PAGE_BYTES
from edgellm.runtimes.kv_buffers import ALIGNMENT_BYTES, FIRST_TOKENS, allocate, next_room


def test_room_doubles_up_to_the_context() -> None:
    assert next_room(0, 1, 8192) == FIRST_TOKENS
    assert next_room(FIRST_TOKENS, FIRST_TOKENS + 1, 8192) == 2 * FIRST_TOKENS
    assert next_room(FIRST_TOKENS, 5000, 8192) == 5000
    assert next_room(5000, 5001, 8192) == 8192
    assert next_room(0, 1, 32) == 32


def test_arrays_are_zero_aligned_and_apart() -> None:
    shapes = [(1, 3, 7, 5), (1, 1, 1, 1), (1, 2, 33, 16)]
    arrays = allocate(shapes, [np.float32, np.int8, np.float32])
    assert arrays[0].ctypes.data % HUGE_PAGE_BYTES == 0
    for array, shape, kind in zip(arrays, shapes, "fbf", strict=True):
        assert array.shape == shape
        assert array.dtype == np.dtype(kind)
        assert array.ctypes.data % ALIGNMENT_BYTES == 0
        assert not array.any()
    for number, array in enumerate(arrays, start=1):
        array[...] = number
    assert [set(array.ravel()) for array in arrays] == [{1}, {2}, {3}]


@pytest.mark.parametrize("tokens", [1 << 44, 1 << 62])
def test_too_much_is_refused_with_the_next_step(tokens: int) -> None:
    with pytest.raises(GenerationError, match=r"no memory for .* MB .*smaller --context"):
        allocate([(1, 8, tokens, 64)], [np.float32])
