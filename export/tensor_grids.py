"""Grids that a recipe names for tensors one by one, by role or by a pattern of roles."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from difflib import get_close_matches
from fnmatch import fnmatchcase

from edgellm.errors import UsageError


def grids_by_role(asked: Mapping[str, str], roles: Collection[str]) -> dict[str, str]:
    """The grid's name of each of ``roles`` that ``asked`` names, by its name or by a pattern.

    ``roles`` are those that can stand on a grid; patterns are the shell's (``blk.*.attn_v.weight``,
    ``blk.[0-3].*``). A name goes before any pattern, so that the order of a table means nothing.
    Raises ``UsageError`` for names and patterns that match nothing, and for patterns that disagree.
    """
    named = {role: grid for role, grid in asked.items() if role in roles}
    by_pattern: dict[str, tuple[str, str]] = {}
    for pattern, grid in asked.items():
        if pattern in named:
            continue
        matched = [role for role in roles if fnmatchcase(role, pattern)]
        if not matched:
            near = get_close_matches(pattern, sorted(roles), n=2)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise UsageError(
                f"tensor_grids: {pattern!r} matches no weight that can be rounded: {hint}"
                "edgellm convert --dry-run lists them by role"
            )
        for role in matched:
            other, its_grid = by_pattern.setdefault(role, (pattern, grid))
            if its_grid != grid and role not in named:
                raise UsageError(
                    f"tensor_grids: {other!r} makes {role} {its_grid} and {pattern!r} makes it "
                    f"{grid}: name {role!r} itself, or narrow one of them"
                )
    return {**{role: grid for role, (_, grid) in by_pattern.items()}, **named}
