"""What models are profiled at: the task of each, what it is asked, and which figures it has not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from edgellm.errors import UsageError
from edgellm.profiling.document import Task

if TYPE_CHECKING:
    from edgellm.artifact import Artifact
    from edgellm.profiling.matrix import Asked

RUNTIME: Final = "onnxruntime"
"""What runs every model that is no language model."""

ENCODERS: Final[dict[str, Task]] = {
    "embeddings": "embed",
    "sequence_classification": "label",
    "token_classification": "label",
    "masked_lm": "fill",
}
"""Tasks by those of encoders' manifests."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of a prompt or text, and of its answer."""

    prompt_tokens: int
    new_tokens: int


_TEXT: Final = Lengths(128, 0)
USUAL: Final[dict[Task, Lengths]] = {
    "generate": Lengths(512, 128),
    "translate": Lengths(128, 64),
    "embed": _TEXT,
    "label": _TEXT,
    "fill": _TEXT,
}
"""What is asked where nobody says."""

KINDS: Final[dict[Task, str]] = {
    "generate": "a language model",
    "translate": "an encoder with a decoder",
    "embed": "an encoder",
    "label": "an encoder",
    "fill": "an encoder",
}
"""Models that are measured together, in words."""

_NO_ANSWER: Final = "an encoder writes no tokens"
_ENCODER: Final = {
    **dict.fromkeys(
        (
            "time_to_first_token_s", "inter_token_latency_s", "decode_tokens_per_s", "sampling_s",
            "detokenization_s", "end_to_end_s",
        ),
        _NO_ANSWER,
    ),
    "prefill_tokens_per_s": "an encoder only reads: tokens_per_s",
    "encode_s": "there is no decoder that waits for it: latency_s",
    "energy": "joules are counted by the tokens of an answer",
    "roofline": "what a text reads of the weights is not counted",
    "operators": "they are watched while a language model writes",
}  # fmt: skip
_TRANSLATOR: Final = {
    "prefill_tokens_per_s": "the encoder reads the text whole: encode_s",
    **dict.fromkeys(
        ("latency_s", "texts_per_s", "tokens_per_s"), "texts are answered one by one: end_to_end_s"
    ),
    "roofline": "what a token reads of two graphs is not counted",
    "operators": "they are watched while a language model writes",
}
ABSENT: Final[dict[Task, dict[str, str]]] = {
    "generate": {},
    "translate": _TRANSLATOR,
    "embed": _ENCODER,
    "label": _ENCODER,
    "fill": _ENCODER,
}
"""Figures that a task has not, and why."""


def task_of(artifact: Artifact) -> Task:
    """What ``artifact`` is for."""
    if artifact.encoder is not None:
        return ENCODERS[artifact.encoder.task]
    return "translate" if artifact.seq2seq is not None else "generate"


def check_together(artifacts: Sequence[Artifact]) -> None:
    """Raise ``UsageError`` where not all are of one kind: no figure would compare them."""
    kinds = [KINDS[task_of(artifact)] for artifact in artifacts]
    for artifact, kind in zip(artifacts, kinds, strict=True):
        if kind != kinds[0]:
            raise UsageError(
                f"{artifacts[0].path} is of another kind ({kinds[0]}) than {artifact.path} "
                f"({kind}): they are measured apart; name one kind"
            )


def check_heeded(artifact: Artifact, task: Task, asked: Asked, *, operators: bool = False) -> None:
    """Raise ``UsageError`` for what was ``asked`` and means nothing to a model of this kind."""
    generates = task == "generate"
    other = [name for name in asked.runtimes if name not in (None, "all", RUNTIME)]
    unheeded = {
        "--batch": tuple(asked.batches) != (1,) and KINDS[task] != "an encoder",
        "--new-tokens": asked.new_tokens is not None and KINDS[task] == "an encoder",
        "--depth": not generates and any(asked.depth_tokens),
        "--kv-cache": not generates and any(asked.kv_caches),
        "--operators": not generates and operators,
    }
    if not generates and other:
        raise UsageError(
            f"--runtime {other[0]}: {artifact.path} is {KINDS[task]}, which runs on {RUNTIME}; "
            "leave it out"
        )
    for option, given in unheeded.items():
        if given:
            raise UsageError(
                f"{option} is about other models: {artifact.path} is {KINDS[task]}; leave it out"
            )


def too_long(artifact: Artifact, prompt_tokens: int, new_tokens: int) -> str:
    """Why so long a text, or its answer, cannot be; empty where it can, or where nobody knows."""
    facts = artifact.encoder or artifact.seq2seq
    if facts is None or max(prompt_tokens, new_tokens) <= facts.max_tokens:
        return ""
    return (
        f"a text of {prompt_tokens} tokens and {new_tokens} of an answer are not possible: choose "
        f"at most {facts.max_tokens} of each"
    )
