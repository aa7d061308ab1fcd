"""A cell of `edgellm profile` and another's way to measure the same, in turn, on one loaded model.

Arguments: PEER ARTIFACT THREADS NEW_TOKENS PROMPT_TOKENS; PEER is a row of ``PEERS``. A round of
both for each line on stdin; their order changes each time. In one process they have the same
memory: all that differs is what is done for a token, and which times are taken.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from edgellm.profiling.exchange import Job
from edgellm.profiling.worker import LoadedCell

Measured = Callable[[Any, Sequence[int], int], dict[str, Any]]


def _llamacpp_bare(session: Any, prompt: Sequence[int], count: int) -> dict[str, Any]:
    from benchmarks.loops import llamacpp_bare

    return llamacpp_bare.measured(session._context, session.vocab_size, prompt, count)


def _llamabench(random: bool) -> Measured:
    def measured(session: Any, prompt: Sequence[int], count: int) -> dict[str, Any]:
        from benchmarks.loops import llamabench_loop

        context, vocabulary = session._context, session.vocab_size
        return llamabench_loop.measured(context, vocabulary, prompt, count, random=random)

    return measured


def _genai(session: Any, prompt: Sequence[int], count: int) -> dict[str, Any]:
    from benchmarks.loops import genai_loop

    return genai_loop.measured(session._model, prompt, count)


PEERS: dict[str, tuple[str, Measured]] = {
    "llamacpp-bare": ("llamacpp", _llamacpp_bare),
    "llama-bench-of-text": ("llamacpp", _llamabench(random=False)),
    "llama-bench": ("llamacpp", _llamabench(random=True)),
    "genai": ("onnxruntime-genai", _genai),
}
"""The runtime, and what measures on the model or context of its session, whose cache is empty."""


def main(peer: str, artifact: str, threads: int, new_tokens: int, prompt_tokens: int) -> None:
    """Measure until stdin ends."""
    runtime, measured = PEERS[peer]
    cell = LoadedCell(
        Job(
            path=artifact,
            runtime=runtime,
            device="cpu",
            threads=threads,
            kv_cache=None,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens + 1,
            depth_tokens=0,
        )
    )

    def ours() -> dict[str, Any]:
        found = cell.round()
        count = len(found.latencies_s)
        # Without what it took to turn tokens into text, which none of the others does.
        decode_s = sum(found.latencies_s) - count * found.detokenization_s
        return {
            "prefill_tokens_per_s": prompt_tokens / found.prefill_s,
            "decode_tokens_per_s": count / decode_s,
        }

    def theirs() -> dict[str, Any]:
        cell.session.trim(0)
        return measured(cell.session, cell.prompt.ids, new_tokens)

    turns = {"ours": ours, "peer": theirs}
    print(json.dumps({"device": "cpu"}), flush=True)
    for _ in sys.stdin:
        print(json.dumps({name: turn() for name, turn in turns.items()}), flush=True)
        turns = dict(reversed(turns.items()))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
