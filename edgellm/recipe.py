"""Recipe: everything that a user asked for and that changes the bytes of the artifact."""

from __future__ import annotations

import msgspec


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What to convert and how; read from a TOML file, flags override it.

    ``quant`` reads ``[solver:]grid``; ``embed`` and ``head`` name other grids for the embedding and
    the output head. ``context``: cap on the context length. ``ignore_config_keys``: config keys
    that edgellm does not know and the user vouches for.
    """

    source: str
    format: str | None = None
    quant: str | None = None
    embed: str | None = None
    head: str | None = None
    context: int | None = None
    ignore_config_keys: tuple[str, ...] = ()
