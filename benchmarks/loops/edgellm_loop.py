"""Prefill and greedy decode through an edgellm runtime, one round for each line on stdin.

Arguments: RUNTIME ARTIFACT TOKENS.json THREADS NEW_TOKENS.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from edgellm.artifact import open_artifact
from edgellm.runtimes import runtime_named
from edgellm.runtimes.session import RunOptions

runtime, artifact, tokens, threads, new_tokens = sys.argv[1:]
prompt = json.loads(Path(tokens).read_text())["prompt"]
count = int(new_tokens)
options = RunOptions(context_tokens=len(prompt) + count + 1, threads=int(threads))
session = runtime_named(runtime).open(open_artifact(Path(artifact)), options)
print(json.dumps({"device": session.device}), flush=True)

for _ in sys.stdin:
    session.trim(0)
    started = time.perf_counter()
    token = int(session.prefill(prompt)[-1].argmax())
    prefilled = time.perf_counter()
    produced = [token]
    for _ in range(count):
        token = int(session.decode(token).argmax())
        produced.append(token)
    ended = time.perf_counter()
    answer = {
        "prefill_tokens_per_s": len(prompt) / (prefilled - started),
        "decode_tokens_per_s": count / (ended - prefilled),
        "tokens": produced,
    }
    print(json.dumps(answer), flush=True)
session.close()
