"""llama.cpp's own side of a comparison of GGUF files, and the judge of both sides."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.measure import fresh, output_of, run
from benchmarks.places import LOOPS, edgellm, shown
from benchmarks.text import Text

IMATRIX = "imatrix.gguf"
FLOAT = "float"


class LlamaCppFiles:
    """What `llama_model_quantize` makes of a model, all of it with one importance matrix.

    The matrix is made of the text that our solvers calibrate on. ``commands``: what was run, by
    what it is for.
    """

    def __init__(self, model: Path, calibration_tokens: int) -> None:
        fresh(FLOAT)
        convert = [*edgellm(), "convert", model.name, "--format", "gguf", "--quant", "bf16"]
        run([*convert, "--out", FLOAT, "--no-check"])
        weigh = [sys.executable, str(LOOPS / "importance.py"), model.name, IMATRIX]
        weigh.append(str(calibration_tokens))
        run(weigh)
        self.commands = {"peer, importance": shown(weigh)}

    def make(self, type_name: str, file: str, *role: str) -> None:
        """Write ``file`` in llama.cpp's type of that name; of ``role``'s matrices alone."""
        fresh(file)
        quantize = [sys.executable, str(LOOPS / "llamacpp_quantize.py"), f"{FLOAT}/model.gguf"]
        quantize += [file, type_name, IMATRIX, *role]
        run(quantize)
        self.commands[f"peer, {type_name}"] = shown(quantize)


def divergences(model: Path, text: Text, files: Iterable[str]) -> tuple[dict[str, Any], str]:
    """What llama.cpp finds of each file against the float model on ``text``, and the command."""
    judge = [sys.executable, str(LOOPS / "divergences.py"), model.name, text.path.name, *files]
    return output_of(judge), shown(judge)
