"""The documents list the bounds that the tests hold, and figures within them."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("peft", reason="peft is not installed")

import adapter_tables


def test_documents_show_bounds_and_figures_of_the_tests() -> None:
    figures = json.loads(adapter_tables.FIGURES.read_text())
    marked = 0
    for document in adapter_tables.DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        assert text == adapter_tables.fill(text, figures), document.name
        marked += len(adapter_tables.MARKED.findall(text))
    assert marked == len(figures) == 2


def test_what_was_measured_lies_within_the_bounds() -> None:
    figures = json.loads(adapter_tables.FIGURES.read_text())
    for table, rows in adapter_tables.bounds().items():
        assert rows.keys() == figures[table].keys()
        for row, bound in rows.items():
            assert figures[table][row] <= bound, row


def test_every_kind_is_listed() -> None:
    from edgellm.lora.kinds import KINDS

    assert set(KINDS) <= adapter_tables.KINDS.keys() == adapter_tables.bounds()["kinds"].keys()
