"""One profile as its own JSON."""

from __future__ import annotations

from collections.abc import Sequence

from edgellm.errors import UsageError
from edgellm.profiling.document import Profile, to_json


def json_text(profiles: Sequence[Profile]) -> str:
    """The document as ``edgellm profile`` writes it; raises ``UsageError`` for several."""
    check_single(len(profiles))
    return to_json(profiles[0]).decode()


def check_single(profiles: int) -> None:
    """Raise ``UsageError`` unless there is exactly one profile."""
    if profiles != 1:
        raise UsageError(
            f"a .json file holds one profile, and there are {profiles}: write each to a file of "
            "its own, or all to one .html, .md, .csv or .prom"
        )
