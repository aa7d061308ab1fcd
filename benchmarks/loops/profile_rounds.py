"""What `edgellm profile` measures, a round for each line on stdin, by the program of its cells.

Arguments: RUNTIME ARTIFACT THREADS NEW_TOKENS PREFILL_PROMPT DECODE_PROMPT. Prefill is that of one
cell and decoding that of another, or of the same where both prompts have one length. Decoding is
given without what it took to turn tokens into text, which no bare loop does.
"""

from __future__ import annotations

import json
import sys

from edgellm.profiling.exchange import Job
from edgellm.profiling.worker import LoadedCell

runtime, artifact, threads, new_tokens, *lengths = sys.argv[1:]
cells = {
    length: LoadedCell(
        Job(
            path=artifact,
            runtime=runtime,
            device="cpu",
            threads=int(threads),
            kv_cache=None,
            prompt_tokens=int(length),
            new_tokens=int(new_tokens) + 1,
            depth_tokens=0,
        )
    )
    for length in lengths
}
print(json.dumps({"device": "cpu"}), flush=True)

for _ in sys.stdin:
    rounds = {length: cell.round() for length, cell in cells.items()}
    decoded = rounds[lengths[1]]
    latencies = decoded.latencies_s
    decode_s = sum(latencies) - len(latencies) * decoded.detokenization_s
    answer = {
        "prefill_tokens_per_s": int(lengths[0]) / rounds[lengths[0]].prefill_s,
        "decode_tokens_per_s": len(latencies) / decode_s,
        "tokens": [],
    }
    print(json.dumps(answer), flush=True)
