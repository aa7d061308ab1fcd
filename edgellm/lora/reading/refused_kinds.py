"""Methods of PEFT that are not merged: each with the reason, and what to do instead."""

from __future__ import annotations

from typing import NoReturn

from edgellm.errors import AdapterError

_PROMPT = (
    "it trains vectors that stand before the prompt and changes no weight of the model: run it "
    "with PEFT, or train a LoRA on the same data"
)
_ROUTED = (
    "it chooses or mixes adapters anew for every input, and no change of the weights does the "
    "same: merge the single adapters that it mixes, or run it with PEFT"
)
_NETWORK = (
    "it adds something to the network that the model's architecture has no place for: run it with "
    "PEFT, or train a LoRA on the same data"
)
_BY_PEFT = (
    "PEFT merges it and edgellm does not: PeftModel.from_pretrained(base, adapter)"
    ".merge_and_unload().save_pretrained(folder), then give edgellm that folder"
)

# Those whose ``layer.py`` has a ``merge``.
_LEFT_TO_PEFT = """
    ADAMSS BEFT BONE DEFT DELORA FOURIERFT FROD GLORA GRALORA LILY OSF PEANUT PSOFT PVERA RANDLORA
    ROAD SHIRA SUPERTUNING TINYLORA UNILORA WAVEFT
"""

REFUSED = {
    "PROMPT_TUNING": _PROMPT,
    "MULTITASK_PROMPT_TUNING": _PROMPT,
    "P_TUNING": _PROMPT,
    "PREFIX_TUNING": _PROMPT,
    "CPT": _PROMPT,
    "CARTRIDGE": _PROMPT,
    "ADAPTION_PROMPT": _NETWORK,
    "SHADOW": _NETWORK,
    "XLORA": _ROUTED,
    "POLY": _ROUTED,
    **dict.fromkeys(_LEFT_TO_PEFT.split(), _BY_PEFT),
}
"""``peft_type`` of peft 0.21.2 and before, each with why it is not merged and what to do."""


def refuse_kind(where: str, kind: str) -> NoReturn:
    """Raise ``AdapterError`` for the ``peft_type`` of an adapter that is not merged."""
    known = REFUSED.get(kind.upper())
    if known is not None:
        raise AdapterError(f"{where}: an adapter of the kind {kind} cannot be merged: {known}")
    raise AdapterError(
        f"{where}: adapters of the kind {kind!r} are not known, so they are not merged. Where PEFT "
        "knows it: PeftModel.from_pretrained(base, adapter).merge_and_unload()"
        ".save_pretrained(folder), then give edgellm that folder"
    )
