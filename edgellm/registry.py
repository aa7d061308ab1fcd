"""Names to code: literal tables of ``"module:attribute"``, and third parties' entry points."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from edgellm.errors import UsageError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoints


def known_names(table: Mapping[str, str], group: str) -> list[str]:
    """Every name that ``load`` takes: the table's own, then those of the entry-point ``group``."""
    return list(dict.fromkeys((*table, *(point.name for point in _points(group)))))


def load(table: Mapping[str, str], group: str, name: str, noun: str) -> Any:
    """The object that ``name`` stands for, imported now; the table wins over entry points.

    Raises ``UsageError`` with the nearest names for one that nobody registered.
    """
    if name in table:
        return attribute(table[name])
    for point in _points(group):
        if point.name == name:
            return point.load()
    names = known_names(table, group)
    near = get_close_matches(name, names)
    hint = f"did you mean {' or '.join(near)}?" if near else f"choose {', '.join(names)}"
    raise UsageError(f"no {noun} named {name!r}: {hint}")


def attribute(path: str) -> Any:
    """The object at ``"module:attribute"``, its module imported now."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def _points(group: str) -> EntryPoints:
    from importlib.metadata import entry_points  # slow to import, and rarely needed

    return entry_points(group=group)
