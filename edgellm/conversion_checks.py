"""Checks that end a conversion: its tokenizer, what sampling it suggests, and whether it runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgellm.artifact import Artifact
from edgellm.errors import GenerationError, RuntimeMissing, UnsupportedTarget, VerificationError
from edgellm.generation_defaults import lost_suggestions
from edgellm.manifest import Parity
from edgellm.plan import Plan
from edgellm.tokenization import artifact_parity

CHECK_PROMPT = "The capital of France is"
CHECK_TOKENS = 8
CHECK_CONTEXT_TOKENS = 64


def prove_parity(plan: Plan, folder: Path) -> Parity:
    """The verdict on the tokenizer of the artifact in ``folder`` against the source's.

    Raises ``VerificationError`` with examples when they split text differently, and for sampling
    that the artifact suggests otherwise.
    """
    main_file, container = folder / plan.layout.main_file, plan.layout.container
    parity = artifact_parity(
        plan.source.tokenizer, main_file, container, plan.layout.tokenizer_limits
    )
    check_suggestions(plan.source.generation, main_file, container)
    if parity.mismatches:
        raise VerificationError(
            "the artifact's tokenizer splits text differently from the source's, so its answers "
            f"would differ: {'; '.join(parity.mismatches)}"
        )
    return parity


def check_suggestions(generation: Mapping[str, Any], main_file: Path, container: str) -> None:
    """Raise ``VerificationError`` where an artifact suggests another sampling than the source."""
    if lost := lost_suggestions(generation, main_file, container):
        raise VerificationError(f"what was made is not kept: {'; '.join(lost)}")


def check_artifact(artifact: Artifact) -> dict[str, Any]:
    """What a few greedy tokens of a new artifact look like, on the runtime that ``run`` would pick.

    Where no runtime here can open it, the reason stands in ``skipped``. Raises
    ``VerificationError`` when it does not run, or its logits are not finite.
    """
    from edgellm.chat import open as open_model  # a backend takes longer to import than to convert

    assert artifact.manifest is not None
    if artifact.container == "hf":
        return {"skipped": "torch would hold all weights as floats at once (edgellm run asks it)"}
    room = min(CHECK_CONTEXT_TOKENS, artifact.manifest.artifact.model.context_length)
    prompt = CHECK_PROMPT
    try:
        with open_model(artifact.path, verify=False, context_tokens=room) as session:
            while len(session.tokenizer.encode(prompt, add_special=True)) >= room > 1:
                prompt = prompt[: len(prompt) // 2]
            result = session.generate(prompt, max_tokens=CHECK_TOKENS, raw=True)
    except (RuntimeMissing, UnsupportedTarget) as error:
        return {"skipped": str(error)}
    except GenerationError as error:
        raise VerificationError(
            f"what was made does not run, and is not kept (--no-check would): {error}"
        ) from error
    return {
        "prompt": prompt,
        "text": result.text,
        "token_ids": list(result.token_ids),
        "runtime": result.runtime,
    }
