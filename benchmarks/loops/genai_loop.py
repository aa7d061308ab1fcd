"""Prefill and greedy decode through onnxruntime-genai, one round for each line on stdin.

Arguments: FOLDER TOKENS.json THREADS NEW_TOKENS [waiting-as-ours]. Making the generator, which
takes its KV cache, is not timed. No token ends the text, so that every round decodes as many. With
the last argument onnxruntime's threads wait for each other as those of our sessions do.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime_genai as og

folder, tokens, threads, new_tokens, *waiting = sys.argv[1:]
prompt = np.array(json.loads(Path(tokens).read_text())["prompt"], np.int32)
count = int(new_tokens)
config = og.Config(folder)
session_options: dict[str, str | int] = {"intra_op_num_threads": int(threads)}
if waiting:
    from edgellm.runtimes.ort import session_settings
    from edgellm.runtimes.ort_package import found_package

    session_options = session_settings(found_package().version, int(threads))
config.overlay(json.dumps({"model": {"decoder": {"session_options": session_options}}}))
model = og.Model(config)
print(json.dumps({"device": model.device_type}), flush=True)

for _ in sys.stdin:
    parameters = og.GeneratorParams(model)
    # min_length forbids the end-of-text token before it is reached.
    length = len(prompt) + count + 1
    parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
    generator = og.Generator(model, parameters)
    started = time.perf_counter()
    generator.append_tokens(prompt)
    generator.generate_next_token()
    prefilled = time.perf_counter()
    for _ in range(count):
        generator.generate_next_token()
    ended = time.perf_counter()
    produced = [int(token) for token in generator.get_sequence(0)[len(prompt) :]]
    if len(produced) != count + 1:
        raise SystemExit(f"made {len(produced)} tokens instead of {count + 1}")
    answer = {
        "prefill_tokens_per_s": len(prompt) / (prefilled - started),
        "decode_tokens_per_s": count / (ended - prefilled),
        "tokens": produced,
    }
    print(json.dumps(answer), flush=True)
    del generator
