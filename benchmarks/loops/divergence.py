"""How far a quantized model's answers moved from the unquantized one's, on the held-out windows.

Arguments: edgellm|genai FOLDER TOKENS.json REFERENCE.npy. Prints JSON: ``kl``, the mean over all
positions of KL(reference || model) in nats; ``top1``, the share of equal best tokens; perplexities.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.float32]


def through_edgellm(folder: Path, window_tokens: int) -> Callable[[Sequence[int]], Logits]:
    """All logits of a window, by our runtime."""
    from edgellm.artifact import open_artifact
    from edgellm.runtimes import runtime_named
    from edgellm.runtimes.session import RunOptions

    artifact = open_artifact(folder)
    runtime = {"onnx": "onnxruntime", "gguf": "llamacpp"}[artifact.container]
    session = runtime_named(runtime).open(artifact, RunOptions(context_tokens=window_tokens))

    def logits(window: Sequence[int]) -> Logits:
        session.trim(0)
        return session.prefill(window, all_logits=True)

    return logits


def through_genai(folder: Path, window_tokens: int) -> Callable[[Sequence[int]], Logits]:
    """All logits of a window, from a graph of onnxruntime-genai's builder, by plain onnxruntime."""
    import onnxruntime as ort

    session = ort.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    config = json.loads((folder / "genai_config.json").read_text())
    head_size = config["model"]["decoder"]["head_size"]
    past = {
        node.name: np.zeros((1, node.shape[1], 0, head_size), np.float32)
        for node in session.get_inputs()
        if node.name.startswith("past")
    }

    def logits(window: Sequence[int]) -> Logits:
        ids = np.array([window], np.int64)
        given = {"input_ids": ids, "attention_mask": np.ones_like(ids), **past}
        found: Logits = session.run(["logits"], given)[0][0]
        return found

    return logits


which, folder, tokens, reference = sys.argv[1:]
windows = json.loads(Path(tokens).read_text())["windows"]
opened = {"edgellm": through_edgellm, "genai": through_genai}[which](Path(folder), len(windows[0]))
expected = np.load(reference, mmap_mode="r")
divergences, agreements, own_loss, reference_loss = [], [], [], []
for window, wanted in zip(windows, expected, strict=True):
    logits = opened(window)
    if logits.shape != wanted.shape:
        raise SystemExit(f"logits of shape {logits.shape} instead of {wanted.shape}")
    logits = logits - logits.max(axis=-1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    divergences.append((np.exp(wanted) * (wanted - logits)).sum(axis=-1))
    agreements.append(wanted.argmax(axis=-1) == logits.argmax(axis=-1))
    following = np.array(window[1:])[:, None]
    own_loss.append(-np.take_along_axis(logits[:-1], following, axis=-1))
    reference_loss.append(-np.take_along_axis(np.asarray(wanted[:-1]), following, axis=-1))
answer = {
    "kl": float(np.mean(divergences)),
    "top1": float(np.mean(agreements)),
    "perplexity": float(np.exp(np.mean(own_loss))),
    "reference_perplexity": float(np.exp(np.mean(reference_loss))),
    "positions": int(np.size(divergences)),
}
print(json.dumps(answer))
