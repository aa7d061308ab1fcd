"""Prefill and greedy decode through onnxruntime-genai, one round for each line on stdin.

Arguments: FOLDER TOKENS.json THREADS NEW_TOKENS.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og


def measured(model: Any, prompt: Sequence[int], count: int) -> dict[str, Any]:
    """One round of ``count`` tokens behind ``prompt`` and the first one.

    Making the generator, which takes its KV cache, is not timed. No token ends the text, so that
    every round decodes as many.
    """
    parameters = og.GeneratorParams(model)
    # min_length forbids the end-of-text token before it is reached.
    length = len(prompt) + count + 1
    parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
    generator = og.Generator(model, parameters)
    ids = np.array(prompt, np.int32)
    started = time.perf_counter()
    generator.append_tokens(ids)
    generator.generate_next_token()
    prefilled = time.perf_counter()
    for _ in range(count):
        generator.generate_next_token()
    ended = time.perf_counter()
    produced = [int(token) for token in generator.get_sequence(0)[len(prompt) :]]
    if len(produced) != count + 1:
        raise SystemExit(f"made {len(produced)} tokens instead of {count + 1}")
    return {
        "prefill_tokens_per_s": len(prompt) / (prefilled - started),
        "decode_tokens_per_s": count / (ended - prefilled),
        "tokens": produced,
    }


if __name__ == "__main__":
    folder, tokens, threads, new_tokens = sys.argv[1:]
    config = og.Config(folder)
    options = {"intra_op_num_threads": int(threads)}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
    loaded = og.Model(config)
    print(json.dumps({"device": loaded.device_type}), flush=True)
    text = json.loads(Path(tokens).read_text())["prompt"]
    for _ in sys.stdin:
        print(json.dumps(measured(loaded, text, int(new_tokens))), flush=True)
