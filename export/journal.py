"""What a long run has done so far, so that the next one like it goes on there.

A journal lies in a folder of its own inside the staged output, with whatever else is needed to go
on, and goes when the output is whole. Its lines are JSON, each on the disk before work goes on: the
first holds a key, which says what the run makes of what; a line that was cut off does not count.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec

FOLDER = ".resume"
FILE = "journal.jsonl"


class Journal:
    """The journal of the staged output in ``staged``; ``OSError`` where it cannot be written."""

    def __init__(self, staged: Path) -> None:
        self.folder = staged / FOLDER
        self.file = self.folder / FILE

    def key(self) -> str:
        """What the run that began it makes; empty where there is none."""
        lines = self._lines()
        return str(lines[0].get("key", "")) if lines else ""

    def entries(self) -> list[dict[str, Any]]:
        """What was done, in order."""
        return self._lines()[1:]

    def begin(self, key: str) -> None:
        """Start an empty one."""
        self.folder.mkdir(exist_ok=True)
        self.file.unlink(missing_ok=True)
        self.append({"key": key})

    def append(self, entry: dict[str, Any]) -> None:
        """Add a line; it is on the disk when this returns."""
        with self.file.open("ab") as file:
            file.write(msgspec.json.encode(entry) + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def repair(self) -> None:
        """Drop a last line that was cut off, so that another can follow."""
        content = self.file.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            with self.file.open("r+b") as file:
                file.truncate(len(whole))

    def _lines(self) -> list[dict[str, Any]]:
        try:
            content = self.file.read_bytes()
        except OSError:
            return []
        whole = content[: content.rfind(b"\n") + 1]
        try:
            return [msgspec.json.decode(line, type=dict[str, Any]) for line in whole.splitlines()]
        except msgspec.DecodeError:
            return []  # not one of ours: nothing to go on from
