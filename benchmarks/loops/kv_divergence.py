"""What a rounded KV cache costs: KL divergence of answers to those of another, on windows.

Arguments: RUNTIME TOKENS.json WINDOWS ARTIFACT=TYPE ARTIFACT=TYPE..., the first being what the
others are compared with, on so many windows. Prints JSON: the figures of ``edgellm eval`` and the
cache's bytes, by type.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np
import numpy.typing as npt

from edgellm.artifact import open_artifact
from edgellm.evaluation import Comparison
from edgellm.runtimes import runtime_named
from edgellm.runtimes.session import KvDtype, RunOptions

runtime, tokens, count, *named = sys.argv[1:]
windows = json.loads(Path(tokens).read_text())["windows"][: int(count)]
sizes: dict[str, int] = {}


def answers(artifact: str, kind: str) -> Iterator[npt.NDArray[np.float32]]:
    """Logits of each window, with one session open at a time."""
    options = RunOptions(context_tokens=max(map(len, windows)), kv_dtype=cast(KvDtype, kind))
    session = runtime_named(runtime).open(open_artifact(Path(artifact)), options)
    for window in windows:
        session.trim(0)
        yield session.prefill(window, all_logits=True).copy()
    sizes[kind] = session.kv_bytes()
    session.close()


(first, base), *others = (each.rsplit("=", 1) for each in named)
wanted = [logits.astype(np.float16) for logits in answers(first, base)]
found: dict[str, Any] = {}
for artifact, kind in others:
    comparison = Comparison()
    for window, reference, logits in zip(windows, wanted, answers(artifact, kind), strict=True):
        comparison.add(reference.astype(np.float32), logits, window)
    figures = msgspec.to_builtins(comparison.figures(1, 1))
    found[kind] = {**figures, "bytes": sizes[kind], "base_bytes": sizes[base]}
print(json.dumps(found))
