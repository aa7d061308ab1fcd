"""Which files of a repository on the Hub are needed, by their names."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from difflib import get_close_matches

from edgellm.errors import AdapterError, HubError, SourceError
from edgellm.hub.ids import HubId
from edgellm.lora.base.training_evidence import is_settings_file
from edgellm.source.checkpoint import INDEX, SINGLE
from edgellm.source.gguf_file import SPLIT_NAME
from edgellm.source.matching import listed
from edgellm.source.pickles import PICKLES
from edgellm.tokenization.from_hf import TEMPLATE_FOLDER

CARD = "README.md"

SMALL_FILES = frozenset(
    {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "tokenizer.model",
        "chat_template.jinja",
        "chat_template.json",
        "processor_config.json",
        # Marian's, which no tokenizer.json replaces.
        "source.spm",
        "target.spm",
        "target_vocab.json",
        CARD,
        # Of encoders, and what sentence-transformers does around them.
        "modules.json",
        "config_sentence_transformers.json",
    }
)
SENTENCE_FILES = re.compile(
    r"sentence_[\w-]+_config\.json|\d+_[A-Za-z]+/config\.json|\d+_Dense/model\.safetensors"
)
"""What sentence-transformers adds to a model, by the number of its step."""
OLDER_TOKENIZERS = re.compile(
    r"spiece\.model|sentencepiece\.bpe\.model|tekken\.json|vocab\.txt|tiktoken\.model|[^/]+\.tiktoken"
)
"""Of folders without a tokenizer.json, beside those in ``SMALL_FILES``; some are large."""
SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
VARIANT = re.compile(r"model\.(?P<dtype>fp32|bf16|fp16)\.safetensors")
"""What transformers calls the only file of a model that was saved with ``variant=``."""
WIDEST_FIRST = ("fp32", "bf16", "fp16")
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

Needed = Callable[[HubId, Collection[str]], list[str]]


def needed_files(wanted: HubId, names: Collection[str]) -> list[str]:
    """Of the ``names`` in a repository, those that a conversion reads.

    Raises ``HubError`` when a GGUF must be named or is not there, ``SourceError`` for pickles
    alone.
    """
    ggufs = sorted(name for name in names if name.endswith(".gguf"))
    if wanted.file is not None:
        if wanted.file not in names:
            near = get_close_matches(wanted.file, ggufs, cutoff=0.3) or ggufs
            raise HubError(
                f"{wanted.repo} has no {wanted.file}; it has {listed(near) or 'no GGUF at all'}"
            )
        return [*_with_other_parts(wanted.file, names), *({CARD} & {*names})]
    weights = [name for name in names if name.endswith(".safetensors") and "/" not in name]
    if INDEX in names:
        chosen = [name for name in weights if SHARD.fullmatch(name)] or weights
        chosen.append(INDEX)
    else:
        chosen = [SINGLE] if SINGLE in names else _one_variant(wanted, weights)
    if chosen:
        templates = [name for name in names if name.startswith(f"{TEMPLATE_FOLDER}/")]
        older = [name for name in names if OLDER_TOKENIZERS.fullmatch(name)]
        around = [name for name in names if SENTENCE_FILES.fullmatch(name)]
        tokenizer = [] if "tokenizer.json" in names else older
        return sorted([*chosen, *templates, *around, *tokenizer, *SMALL_FILES.intersection(names)])
    if ggufs:
        raise HubError(
            f"{wanted.repo} holds {len(ggufs)} GGUF files: name one, such as "
            f"{wanted.repo}:{ggufs[0]} ({listed(ggufs)})"
        )
    pickles = [name for name in names if name.endswith(PICKLES)]
    if pickles:
        raise SourceError(
            f"{wanted.repo} holds pickles only ({listed(pickles)}), which can run any code when "
            "they are read, so edgellm does not fetch them. Look for a revision with safetensors "
            f"at {wanted.url}/discussions and name it ({wanted.repo}@refs/pr/1), or, where you "
            "trust it, save it again with transformers: "
            "AutoModelForCausalLM.from_pretrained(id).save_pretrained(folder)"
        )
    raise HubError(
        f"{wanted.repo} holds no weights (no safetensors, no GGUF): check the name at {wanted.url}"
    )


def needed_files_and_code(wanted: HubId, names: Collection[str]) -> list[str]:
    """As ``needed_files``, and Python beside the model, which somebody trusts."""
    python = (name for name in names if name.endswith(".py") and "/" not in name)
    return sorted({*needed_files(wanted, names), *python})


def _one_variant(wanted: HubId, weights: list[str]) -> list[str]:
    """Of files that hold the same weights in several ways, the one in the widest dtype.

    Raises ``HubError`` where the names do not say so.
    """
    by_dtype = {
        found["dtype"]: name for name in weights if (found := VARIANT.fullmatch(name)) is not None
    }
    best = next((by_dtype[dtype] for dtype in WIDEST_FIRST if dtype in by_dtype), None)
    if best is not None and len(by_dtype) == len(weights):
        return [best]
    if len(weights) > 1:
        raise HubError(
            f"{wanted.repo} holds {len(weights)} safetensors files ({listed(weights)}) and neither "
            f"{SINGLE} nor {INDEX} to say which make the model: fetch those that do into a folder "
            f"(`hf download {wanted.repo} --include FILE --local-dir FOLDER`) and give that"
        )
    return weights


def needed_adapter_files(wanted: HubId, names: Collection[str]) -> list[str]:
    """Of the ``names`` in a repository, those of the adapter in it.

    Raises ``AdapterError`` for a repository that holds none, or only a pickle; ``HubError`` as
    ``needed_files`` does for a GGUF file that was named.
    """
    if wanted.file is not None:
        return needed_files(wanted, names)
    wants = [ADAPTER_CONFIG, ADAPTER_WEIGHTS]
    missing = [name for name in wants if name not in names]
    if not missing:
        templates = [name for name in names if name.startswith(f"{TEMPLATE_FOLDER}/")]
        small = SMALL_FILES.intersection(names) - {"config.json", "generation_config.json"}
        # Settings of its training, which may say that the base was quantized.
        settings = [name for name in names if is_settings_file(name)]
        return sorted([*wants, *templates, *small, *settings])
    pickles = [name for name in names if name.endswith(PICKLES) and name.startswith("adapter")]
    if pickles and ADAPTER_CONFIG in names:
        raise AdapterError(
            f"{wanted.repo} holds its adapter as a pickle ({listed(pickles)}), which can run any "
            "code when it is read, so edgellm does not fetch it. Look for a revision with "
            f"safetensors at {wanted.url}/discussions and name it ({wanted.repo}@refs/pr/1), or, "
            "where you trust it, save it again with PEFT: PeftModel.from_pretrained(base, id)"
            ".save_pretrained(folder, safe_serialization=True)"
        )
    ggufs = sorted(name for name in names if name.endswith(".gguf"))
    if ggufs:
        raise AdapterError(
            f"{wanted.repo} holds GGUF files: where one of them is the adapter, name it, such as "
            f"{wanted.repo}:{ggufs[0]} ({listed(ggufs)})"
        )
    raise AdapterError(
        f"{wanted.repo} is no adapter that PEFT saved: it has no {' and no '.join(missing)}; check "
        f"the name at {wanted.url}"
    )


def _with_other_parts(file: str, names: Collection[str]) -> list[str]:
    """``file`` and, when it is one part of a split GGUF, the other parts."""
    part = SPLIT_NAME.fullmatch(file)
    if not part:
        return [file]
    ending = f"-of-{part['count']}.gguf"
    return sorted(
        name for name in names if name.startswith(part["stem"] + "-") and name.endswith(ending)
    )
