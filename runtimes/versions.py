"""Versions of backends, in an order."""

from __future__ import annotations


def version_numbers(version: str) -> tuple[int, ...]:
    """Major, minor and patch release of ``1.32.0``, as far as they are numbers."""
    return tuple(int(part) for part in version.split(".")[:3] if part.isdigit())
