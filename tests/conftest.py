"""Fixtures that several folders of tests share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# Test files are imported by path, so modules that they share need a place to be found.
sys.path.append(str(Path(__file__).parent / "parity"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``tiny_model(name)``: the folder of a model of ``tiny_models.MODELS``, built at first use."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    from tiny_models import builder

    return builder(tmp_path_factory.mktemp("tiny"))
