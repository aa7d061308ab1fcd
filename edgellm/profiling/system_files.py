"""Where a system keeps what it says of itself, as small text files."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class SystemFiles:
    """The name of the system, as ``platform.system`` has it, and the roots of Linux's files."""

    system: str = field(default_factory=platform.system)
    proc: Path = Path("/proc")
    sys: Path = Path("/sys")

    @property
    def linux(self) -> bool:
        return self.system == "Linux"

    def cpus(self) -> list[Path]:
        """The folder of each logical CPU."""
        folders = (self.sys / "devices/system/cpu").glob("cpu[0-9]*")
        return sorted(folders, key=lambda folder: int(folder.name.removeprefix("cpu")))


def text(path: Path) -> str | None:
    """What the file says, without space around it; None where it cannot be read."""
    try:
        return path.read_text(errors="replace").strip("\0 \n\t")
    except OSError:
        return None


def number(path: Path) -> float | None:
    """The number that the file says; None where it cannot be read, or says something else."""
    try:
        return float(text(path) or "")
    except ValueError:
        return None
