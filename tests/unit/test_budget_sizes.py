"""Sizes as people write them."""

from __future__ import annotations

import pytest

from edgellm.budget.sizes import bytes_of
from edgellm.errors import UsageError


@pytest.mark.parametrize(
    ("text", "nbytes"), [("90MB", 90_000_000), ("1.5 GiB", 1_610_612_736), ("123456", 123_456)]
)
def test_units(text: str, nbytes: int) -> None:
    assert bytes_of(text) == nbytes


@pytest.mark.parametrize("text", ["", "0MB", "-5MB", "many", "90XB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match="is no size"):
        bytes_of(text)


def test_a_unit_that_was_forgotten() -> None:
    with pytest.raises(UsageError, match="was 90MB meant"):
        bytes_of("90")
