"""A cell of `edgellm profile` and its backend's bare loop in turn, on one loaded model.

Arguments: RUNTIME ARTIFACT THREADS NEW_TOKENS PROMPT_TOKENS. A round of both for each line on
stdin; their order changes each time. In one process they have the same memory: all that differs is
what is done for a token.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from benchmarks.loops.profile_rounds import cell_of, decode_tokens_per_s


def bare(runtime: str, session: Any, prompt: tuple[int, ...], count: int) -> dict[str, Any]:
    """A round of the loop that knows nothing of edgellm, on what ``session`` has loaded."""
    session.trim(0)
    if runtime == "onnxruntime-genai":
        from benchmarks.loops import genai_loop

        return genai_loop.measured(session._model, prompt, count)
    from benchmarks.loops import llamacpp_bare

    return llamacpp_bare.measured(session._context, session.vocab_size, prompt, count)


def main(runtime: str, artifact: str, threads: int, new_tokens: int, prompt_tokens: int) -> None:
    """Measure until stdin ends."""
    cell = cell_of(
        runtime, artifact, threads=threads, new_tokens=new_tokens, prompt_tokens=prompt_tokens
    )

    def ours() -> dict[str, Any]:
        found = cell.round()
        return {
            "prefill_tokens_per_s": prompt_tokens / found.prefill_s,
            "decode_tokens_per_s": decode_tokens_per_s(found),
        }

    turns = {"ours": ours, "peer": lambda: bare(runtime, cell.session, cell.prompt.ids, new_tokens)}
    print(json.dumps({"device": "cpu"}), flush=True)
    for _ in sys.stdin:
        print(json.dumps({name: turn() for name, turn in turns.items()}), flush=True)
        turns = dict(reversed(turns.items()))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
