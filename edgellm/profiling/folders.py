"""What errors say, without the names of folders: those tell of people and machines."""

from __future__ import annotations

import os
import re
from pathlib import Path

ABSOLUTE = re.compile(
    r"(?<![\w.~/\\-])(?:~|[A-Za-z]:)?"  # where a path begins, and no fraction, unit or address
    r"(?:[/\\][^\s/\\:;,'\"()<>|]+)+[/\\](?=[^\s/\\])"
)
"""The folders of an absolute path that has any."""


def without_folders(text: str, path: Path | None = None) -> str:
    """``text`` with the last part alone of each path: of ``path``, of absolute and home ones."""
    known = [] if path is None else [path.resolve().parent, path.absolute().parent, path.parent]
    for folder in (*known, Path.home()):
        if folder.name:  # neither the current folder nor the root
            text = text.replace(f"{folder}{os.sep}", "")
    return ABSOLUTE.sub("", text)
