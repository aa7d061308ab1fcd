"""The README's table of runtimes, made from what they say of themselves."""

from __future__ import annotations

import re
from pathlib import Path

from edgellm.hardware import detect
from edgellm.runtimes import RUNTIMES, runtime_named

DOCUMENT = Path(__file__).resolve().parents[2] / "README.md"
MARKED = re.compile(r"(<!-- runtimes -->\n).*?(<!-- /runtimes -->)", re.DOTALL)

HEAD = (
    "runtime", "opens", "devices", "keys and values in", "adapters beside a model", "`--threads`",
)  # fmt: skip


def fill(text: str) -> str:
    """``text`` with the table made anew."""
    return MARKED.sub(lambda found: f"{found[1]}{_table()}\n{found[2]}", text)


def write() -> None:
    """Make the table in the document anew."""
    DOCUMENT.write_text(fill(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")


def _table() -> str:
    hardware = detect()
    rows = [HEAD]
    for name in RUNTIMES:
        found = runtime_named(name).capabilities(hardware)
        if found.automatic:
            rows.append(
                (
                    f"`{name}`",
                    " ".join(sorted(found.containers)),
                    " ".join(found.possible_devices),
                    " ".join(f"`{kind}`" for kind in found.kv_dtypes),
                    "yes" if found.applies_adapters else "no",
                    "yes" if found.sets_threads else "no",
                )
            )
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(HEAD) + "|", *lines[1:]])
