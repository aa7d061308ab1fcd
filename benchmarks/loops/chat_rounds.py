"""Answers of one chat that stays loaded, one for each line on stdin.

Arguments: ARTIFACT TOKENS.json THREADS NEW_TOKENS plain|lookup|cold|prefix. With ``plain`` and
``lookup`` a round copies a passage that it was given, greedily; with ``cold`` and ``prefix`` it
begins an answer to another question on the same long text, with an empty cache of its own.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import edgellm

PASSAGE_TOKENS = 256
BEGINNING_TOKENS = 16
LONG_TOKENS = 2048

artifact, tokens, threads, new_tokens, kind = sys.argv[1:]
windows = json.loads(Path(tokens).read_text())["windows"]
chat = edgellm.open(
    artifact,
    threads=int(threads),
    draft="lookup" if kind == "lookup" else None,
    prefix_cache=edgellm.PrefixCache() if kind == "prefix" else None,
)
text = "".join(chat.tokenizer.decode(window) for window in windows[: LONG_TOKENS // 512])
print(json.dumps({"device": chat.session.device}), flush=True)

for number, _ in enumerate(sys.stdin):
    if kind in ("cold", "prefix"):
        prompt = f"{text}\n\nQuestion {number} about this text:"
        chat.session.trim(0)
    else:
        passage = windows[number % len(windows)][:PASSAGE_TOKENS]
        begun = chat.tokenizer.decode(passage[:BEGINNING_TOKENS])
        prompt = f"{chat.tokenizer.decode(passage)}\n\nOnce more, word by word:\n\n{begun}"
    answer = chat.generate(prompt, raw=True, max_tokens=int(new_tokens))
    found = {
        "time_to_first_token_s": answer.time_to_first_token_s,
        "decode_tokens_per_s": answer.decode_tokens_per_s,
        "tokens": answer.token_ids,
        "prompt_tokens": answer.prompt_tokens,
        "prefilled_tokens": answer.prefilled_tokens,
        "drafted_tokens": answer.drafted_tokens,
        "accepted_tokens": answer.accepted_tokens,
    }
    print(json.dumps(found), flush=True)
chat.close()
