"""Versions of backends, in an order."""

from __future__ import annotations

import importlib.metadata


def installed_version(package: str) -> str:
    """The version of a package that is installed, without importing it; empty where it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def version_numbers(version: str) -> tuple[int, ...]:
    """Major, minor and patch release of ``1.32.0``, as far as they are numbers."""
    return tuple(int(part) for part in version.split(".")[:3] if part.isdigit())
