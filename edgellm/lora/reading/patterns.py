"""Settings of an adapter that differ from module to module: ``rank_pattern``, ``alpha_pattern``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from edgellm.errors import AdapterError


def setting(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first of ``patterns`` that means ``module``, else ``default``.

    ``module`` is a module's name in the base model (``model.layers.0.self_attn.q_proj``), or a
    parameter's with ``target_parameters``. A pattern is a regular expression for its end, dot by
    dot; PEFT's ``get_pattern_key`` (peft 0.21.2, ``utils/other.py``). Raises ``AdapterError`` for
    one that is no regular expression.
    """
    for pattern, value in (patterns or {}).items():
        try:
            found = re.match(rf"(.*\.)?({pattern})$", module)
        except re.error as error:
            raise AdapterError(
                f"adapter_config.json: {pattern!r} in rank_pattern or alpha_pattern is no regular "
                f"expression ({error}): correct it"
            ) from error
        if found:
            return value
    return (patterns or {}).get(module, default)
