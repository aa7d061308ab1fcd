"""Recipe: everything that a user asked for and that changes the bytes of the artifact."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from edgellm.errors import OutputError, UnknownGrid, UsageError
from edgellm.quant import SOLVERS

DEFAULT_SOLVER = "rtn"

LOWERED = ("format", "quant", "embed", "head", "kv_cache")
"""Fields that hold names, which are compared in lower case."""


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What to convert and how; read from a TOML file, flags override it.

    ``quant`` reads ``[solver:]grid``; ``embed`` and ``head`` name other grids for the embedding and
    the output head. ``kv_cache``: what keys and values are cached in, where the container fixes it.
    ``context``: cap on the context length in tokens. ``ignore_config_keys``: config keys that
    edgellm does not know and the user vouches for.
    """

    source: str
    format: str | None = None
    quant: str | None = None
    embed: str | None = None
    head: str | None = None
    kv_cache: str | None = None
    context: int | None = None
    ignore_config_keys: tuple[str, ...] = ()

    @property
    def solver(self) -> str:
        """The solver's name; ``rtn`` when none was named."""
        return split_quant(self.quant or "")[0]

    @property
    def grid(self) -> str:
        """The grid's or mixture's name, without the solver; empty when none was chosen yet."""
        return split_quant(self.quant or "")[1]

    def sha256(self) -> str:
        """Digest of the choices, the same wherever the source lies."""
        return hashlib.sha256(msgspec.json.encode(self.choices(), order="sorted")).hexdigest()

    def choices(self) -> dict[str, Any]:
        """The recipe without ``source``, which the manifest describes by digest instead of path."""
        fields: dict[str, Any] = msgspec.to_builtins(self)
        return {name: value for name, value in fields.items() if name != "source"}


def split_quant(text: str) -> tuple[str, str]:
    """``(solver, grid)`` of ``[solver:]grid``; raises ``UnknownGrid`` for a solver not known."""
    solver, colon, grid = text.strip().lower().rpartition(":")
    solver = solver if colon else DEFAULT_SOLVER
    if solver not in SOLVERS:
        raise UnknownGrid(
            f"no solver named {solver!r} in --quant {text!r}: choose {', '.join(sorted(SOLVERS))}, "
            f"or leave the solver out (--quant {grid or 'GRID'})"
        )
    return solver, grid


def load_recipe(path: Path, overrides: Mapping[str, Any]) -> Recipe:
    """The recipe of a TOML file, with those ``overrides`` that are not None put over it.

    A relative ``source`` that exists beside the file is taken from there. Raises ``UsageError`` for
    a file that cannot be read, keys that are not known and values of the wrong type.
    """
    try:
        fields = msgspec.toml.decode(path.read_bytes(), type=dict[str, Any])
    except OSError as error:
        raise UsageError(f"cannot read the recipe {path}: {error.strerror}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"the recipe {path} is not TOML: {error}") from error
    beside = path.parent / str(fields.get("source", ""))
    if "source" in fields and beside.exists():
        fields["source"] = str(beside)
    return make_recipe({**fields, **_given(overrides)}, origin=str(path))


def make_recipe(fields: Mapping[str, Any], origin: str = "the options") -> Recipe:
    """A validated recipe of plain values, names in lower case.

    Raises ``UsageError`` naming the field at fault.
    """
    try:
        recipe = msgspec.convert(_given(fields), Recipe)
    except msgspec.ValidationError as error:
        known = ", ".join(Recipe.__struct_fields__)
        raise UsageError(f"{origin}: {error}. A recipe has the keys {known}") from error
    if recipe.context is not None and recipe.context < 1:
        raise UsageError(f"{origin}: context must be at least 1 token, got {recipe.context}")
    if recipe.quant is not None:
        split_quant(recipe.quant)
    names = {name: getattr(recipe, name) for name in LOWERED}
    return msgspec.structs.replace(
        recipe, **{name: text.strip().lower() for name, text in names.items() if text is not None}
    )


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write ``recipe`` as TOML that ``load_recipe`` reads back (a relative source apart).

    Raises ``OutputError`` when the file cannot be written.
    """
    fields = {
        name: value for name, value in _given(msgspec.to_builtins(recipe)).items() if value != []
    }
    try:
        path.write_bytes(msgspec.toml.encode(fields))
    except OSError as error:
        raise OutputError(
            f"cannot write the recipe {path} ({error.strerror}): choose another --save-recipe"
        ) from error


def _given(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}
