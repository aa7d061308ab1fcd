"""What `edgellm profile` measures, a round for each line on stdin, by the program of its cells.

Arguments: RUNTIME ARTIFACT THREADS NEW_TOKENS PREFILL_PROMPT DECODE_PROMPT. Prefill is that of one
cell and decoding that of another, or of the same where both prompts have one length.
"""

from __future__ import annotations

import json
import sys

from edgellm.profiling.exchange import Job, Round
from edgellm.profiling.worker import LoadedCell


def cell_of(
    runtime: str, artifact: str, *, threads: int, new_tokens: int, prompt_tokens: int
) -> LoadedCell:
    """A cell that decodes ``new_tokens`` behind the first one."""
    return LoadedCell(
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


def decode_tokens_per_s(found: Round) -> float:
    """Without what it took to turn tokens into text, which no bare loop does."""
    count = len(found.latencies_s)
    return count / (sum(found.latencies_s) - count * found.detokenization_s)


def main(runtime: str, artifact: str, threads: str, new_tokens: str, *prompts: str) -> None:
    """Measure until stdin ends; ``prompts``: for prefill and for decoding."""
    cells = {
        length: cell_of(
            runtime,
            artifact,
            threads=int(threads),
            new_tokens=int(new_tokens),
            prompt_tokens=int(length),
        )
        for length in prompts
    }
    print(json.dumps({"device": "cpu"}), flush=True)
    prefilled, decoded = prompts
    for _ in sys.stdin:
        rounds = {length: cell.round() for length, cell in cells.items()}
        answer = {
            "prefill_tokens_per_s": int(prefilled) / rounds[prefilled].prefill_s,
            "decode_tokens_per_s": decode_tokens_per_s(rounds[decoded]),
            "tokens": [],
        }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
