"""Names to code: literal tables of ``"module:attribute"``, and third parties' entry points."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from edgellm.errors import UsageError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint, EntryPoints


def known_names(table: Mapping[str, str], group: str) -> list[str]:
    """Every name that ``load`` takes: the table's own, then those of the entry-point ``group``."""
    return list(dict.fromkeys((*table, *(point.name for point in _points(group)))))


def load(table: Mapping[str, str], group: str, name: str, noun: str) -> Any:
    """The object that ``name`` stands for, imported now; the table wins over entry points.

    Raises ``UsageError`` with the nearest names for one that nobody registered, and for one whose
    package is broken.
    """
    if name in table:
        return attribute(table[name])
    for point in _points(group):
        if point.name == name:
            return _loaded(point, noun)
    raise UsageError(f"no {noun} named {name!r}: {suggestion(name, known_names(table, group))}")


def suggestion(wrong: str, names: Iterable[str]) -> str:
    """What to type instead of ``wrong``: the ``names`` nearest to it, or all where none is near."""
    known = list(names)
    near = get_close_matches(wrong, known, n=4, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"choose {', '.join(known)}"


def _loaded(point: EntryPoint, noun: str) -> Any:
    try:
        return point.load()
    except (ImportError, AttributeError) as error:
        package = point.dist.name if point.dist else point.value
        raise UsageError(
            f"the {noun} {point.name!r} of the package {package} cannot be loaded ({error}): "
            "mend that package, or take it out"
        ) from error


def attribute(path: str) -> Any:
    """The object at ``"module:attribute"``, its module imported now."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def _points(group: str) -> EntryPoints:
    from importlib.metadata import entry_points  # slow to import, and rarely needed

    return entry_points(group=group)
