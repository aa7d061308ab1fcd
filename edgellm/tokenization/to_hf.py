"""A tokenizer as the files of a Hugging Face folder, for one that came out of a GGUF file."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgellm.tokenization.tokenizer import Tokenizer


def files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """``tokenizer.json``, ``tokenizer_config.json`` and ``special_tokens_map.json``.

    The class is the one that takes tokenizer.json as it is; classes named after a model build their
    own rules and would split text differently.
    """
    special = tokenizer.special_tokens
    config: dict[str, Any] = {
        "add_bos_token": bool(tokenizer.settings.prefix_ids),
        "add_eos_token": bool(tokenizer.settings.suffix_ids),
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,  # transformers' "no limit"
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
    }
    templates = tokenizer.settings.chat_templates
    if set(templates) == {"default"}:
        config["chat_template"] = templates["default"]
    elif templates:
        config["chat_template"] = [
            {"name": name, "template": text} for name, text in templates.items()
        ]
    return {
        "tokenizer.json": tokenizer.backend.to_str(pretty=True).encode(),
        "tokenizer_config.json": _json(config),
        "special_tokens_map.json": _json(special),
    }


def _json(value: Any) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=2, sort_keys=True) + "\n").encode()
