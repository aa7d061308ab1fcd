"""docs/quantization.md has the matrix that the tables in the code make."""

from __future__ import annotations

import quantization_cells


def test_the_matrix_is_the_code_s() -> None:
    text = quantization_cells.DOCUMENT.read_text(encoding="utf-8")
    assert quantization_cells.MARKED.search(text)
    assert text == quantization_cells.fill(text)
