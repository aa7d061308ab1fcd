"""README.md has the table of runtimes that their capabilities make."""

from __future__ import annotations

import runtime_table


def test_the_table_is_the_code_s() -> None:
    text = runtime_table.DOCUMENT.read_text(encoding="utf-8")
    assert runtime_table.MARKED.search(text)
    assert text == runtime_table.fill(text)
