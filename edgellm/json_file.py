"""Objects in JSON files that others wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edgellm.errors import SourceError

MAX_JSON_BYTES = 64 << 20


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; raises ``SourceError`` when it is none."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise SourceError(f"{path} has more than {MAX_JSON_BYTES >> 20} MB: it is damaged")
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path} is not JSON ({error}): fetch it again") from error
    if not isinstance(value, dict):
        raise SourceError(f"{path} holds {type(value).__name__}, not an object: fetch it again")
    return value
