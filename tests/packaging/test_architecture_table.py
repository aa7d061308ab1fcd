"""The document of architectures says what the code is and what was measured."""

from __future__ import annotations

import json

import architecture_table
import tiny_models


def test_the_tables_are_those_of_the_code() -> None:
    text = architecture_table.DOCUMENT.read_text(encoding="utf-8")
    assert len(architecture_table.MARKED.findall(text)) == 2
    assert text == architecture_table.fill(text)


def test_every_model_was_measured() -> None:
    measured = json.loads(architecture_table.MEASURED.read_text(encoding="utf-8"))
    assert measured.keys() == tiny_models.MODELS.keys()
