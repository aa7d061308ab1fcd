"""A ``config.json`` read key by key, so that no key which could change the maths goes unread."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

from edgellm.architectures.decoder import Activation
from edgellm.errors import SourceError, UnsupportedModel, UsageError

# Far above any real model; a damaged config must not make us build a list of a billion layers.
LARGEST_INTEGER: Final = 2**31 - 1


# transformers' names (ACT2FN) of the activations that we know; its several tanh forms of GELU
# are the same function.
ACTIVATIONS: Final[Mapping[str, Activation]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "relu": "relu",
}

MOST_LAYERS: Final = 4096
WINDOWED: Final = "sliding_attention"
LAYER_TYPES: Final = ("full_attention", WINDOWED)
"""Kinds of attention as ``layer_types`` of a config names them."""


class _Required:
    """The default of a key that has none."""


REQUIRED: Final = _Required()

# What transformers (saved from every config class of our families), Hub tools and training
# frameworks write, and what does not touch the result of a forward pass.
_HARMLESS = """
    architectures model_type _name_or_path name_or_path _commit_hash transformers_version
    torch_dtype dtype transformers.js_config is_llama_config unsloth_fixed unsloth_version
    attn_implementation _attn_implementation _attn_implementation_internal
    _attn_implementation_autoset _experts_implementation _experts_implementation_internal
    _flash_attn_2_enabled experts_implementation

    initializer_range attention_dropout attn_pdrop embd_pdrop resid_pdrop hidden_dropout
    gradient_checkpointing use_cache cache_implementation reorder_and_upcast_attn
    chunk_size_feed_forward torchscript use_bfloat16 keys_to_ignore_at_inference

    bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id decoder_start_token_id
    tokenizer_class prefix task_specific_params

    output_attentions output_hidden_states return_dict use_return_dict problem_type
    id2label label2id num_labels finetuning_task tie_last_hidden_states
    summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout

    max_length min_length do_sample early_stopping num_beams temperature top_k top_p min_p
    typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores
    return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens epsilon_cutoff
    eta_cutoff encoder_repetition_penalty num_assistant_tokens num_assistant_tokens_schedule
    assistant_confidence_threshold assistant_lookbehind target_lookbehind num_beam_groups
    diversity_penalty max_new_tokens
"""
HARMLESS_KEYS: Final = frozenset(_HARMLESS.split())

# Keys that any family's config may carry, and the values that leave the maths alone.
NEUTRAL_VALUES: Final[Mapping[str, tuple[Any, ...]]] = {
    "is_encoder_decoder": (False,),
    "is_decoder": (False, True),
    "add_cross_attention": (False,),
    "tie_encoder_decoder": (False,),
    "cross_attention_hidden_size": (),
    "pruned_heads": ({},),
    "pretraining_tp": (1,),
    "rope_interleaved": (False,),
    "use_mrope": (False,),
    "per_layer_config": ({},),
}


class Config:
    """A mapping that remembers which of its keys were read.

    ``ignore``: keys that the user vouches for (``rope_scaling.finetuned`` names one inside a
    section). ``context``: the context length that the model is wanted for, where the maths depends
    on it (dynamic rope); None where the user named none. ``where`` is what messages call the
    mapping. ``null`` counts as absent, as it does for transformers.
    """

    def __init__(
        self,
        values: Any,
        *,
        ignore: Collection[str] = (),
        context: int | None = None,
        where: str = "config.json",
        harmless: Collection[str] = HARMLESS_KEYS,
        neutral: Mapping[str, tuple[Any, ...]] = NEUTRAL_VALUES,
    ) -> None:
        if not isinstance(values, Mapping):
            raise SourceError(f"{where}: expected an object with keys, got {values!r}")
        self.context = context
        self.where = where
        self.notes: list[str] = []
        self._values = values
        self._ignore = frozenset(ignore)
        self._harmless = harmless
        self._neutral = neutral
        self._prefix = ""
        self._read: set[str] = set()
        self._sections: list[Config] = []

    def has(self, key: str) -> bool:
        """Whether ``key`` is there and not null; does not count as reading it."""
        return self._values.get(key) is not None

    def states(self, key: str) -> bool:
        """Whether ``key`` is there at all, be it null."""
        return key in self._values

    def spelled(self, *names: str) -> str:
        """The first of ``names``, spellings of one key, that is there; else the first of all."""
        return next((name for name in names if self.has(name)), names[0])

    def note(self, text: str) -> None:
        """Record a fact about the description that the user should be shown."""
        self.notes.append(text)

    def integer(
        self,
        key: str,
        default: int | _Required = REQUIRED,
        *,
        minimum: int = 1,
        maximum: int = LARGEST_INTEGER,
    ) -> int:
        """The whole number at ``key``, within ``minimum`` to ``maximum``."""
        value = self._take(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.refusal(key, value, "a whole number")
        if not minimum <= value <= maximum:
            raise self.refusal(key, value, f"a whole number from {minimum} to {maximum}")
        return value

    def number(
        self, key: str, default: float | _Required = REQUIRED, *, above: float = -math.inf
    ) -> float:
        """The finite number at ``key``, larger than ``above``."""
        value = self._take(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.refusal(key, value, "a number")
        if not math.isfinite(value) or value <= above:
            limit = "" if above == -math.inf else f" above {above:g}"
            raise self.refusal(key, value, f"a finite number{limit}")
        return float(value)

    def flag(self, key: str, default: bool | _Required = REQUIRED) -> bool:
        """The true or false at ``key``."""
        value = self._take(key, default)
        if not isinstance(value, bool):
            raise self.refusal(key, value, "true or false")
        return value

    def text(self, key: str, default: str | _Required = REQUIRED) -> str:
        """The string at ``key``."""
        value = self._take(key, default)
        if not isinstance(value, str):
            raise self.refusal(key, value, "a string")
        return value

    def choice(
        self, key: str, choices: Mapping[str, Any], default: str | _Required = REQUIRED
    ) -> Any:
        """What ``choices`` holds for the string at ``key``."""
        value = self.text(key, default)
        if value not in choices:
            raise self.refusal(key, value, f"one of {', '.join(choices)}")
        return choices[value]

    def texts(self, key: str) -> tuple[str, ...]:
        """The list of strings at ``key``."""
        value = self._take(key, REQUIRED)
        if not self.lists(key) or not all(isinstance(item, str) for item in value):
            raise self.refusal(key, value, "a list of strings")
        return tuple(value)

    def says(self, key: str, word: str) -> bool:
        """Whether ``key`` holds this text; does not count as reading it."""
        return bool(self._values.get(key) == word)

    def lists(self, key: str) -> bool:
        """Whether ``key`` holds a list; does not count as reading it."""
        value = self._values.get(key)
        return isinstance(value, Sequence) and not isinstance(value, str)

    def flags(self, key: str) -> tuple[bool, ...]:
        """The list of true or false at ``key``; whole numbers count as in C."""
        value = self._take(key, REQUIRED)
        if not self.lists(key) or not all(isinstance(item, bool | int) for item in value):
            raise self.refusal(key, value, "a list of true and false")
        return tuple(bool(item) for item in value)

    def integers(self, key: str) -> tuple[int, ...]:
        """The list of whole numbers at ``key``."""
        value = self._take(key, REQUIRED)
        if not self.lists(key) or not all(type(item) is int for item in value):
            raise self.refusal(key, value, "a list of whole numbers")
        return tuple(value)

    def numbers(self, key: str) -> tuple[float, ...]:
        """The list of finite numbers at ``key``."""
        value = self._take(key, REQUIRED)
        if not self.lists(key):
            raise self.refusal(key, value, "a list of numbers")
        for item in value:
            if isinstance(item, bool) or not isinstance(item, int | float):
                raise self.refusal(key, value, "a list of numbers")
            if not math.isfinite(item):
                raise self.refusal(key, value, "a list of finite numbers")
        return tuple(float(item) for item in value)

    def mapping(self, key: str) -> dict[str, Any]:
        """The object at ``key`` as it is, its keys not tracked."""
        value = self._take(key, REQUIRED)
        if not isinstance(value, Mapping):
            raise self.refusal(key, value, "an object")
        return {str(name): item for name, item in value.items()}

    def section(self, key: str) -> Config:
        """The object at ``key``, whose keys are tracked too."""
        inner = Config(
            self._take(key, REQUIRED),
            ignore=self._ignore,
            context=self.context,
            where=self.where,
            harmless=(),
            neutral={},
        )
        inner._prefix = f"{self._prefix}{key}."
        inner.notes = self.notes
        self._sections.append(inner)
        return inner

    def neutral(self, key: str, *allowed: Any) -> None:
        """Refuse ``key`` unless it is absent, null, one of ``allowed``, or vouched for."""
        if self._prefix + key in self._ignore:
            return
        value = self._values.get(key)
        self._read.add(key)
        if value is not None and not any(_same(value, item) for item in allowed):
            expected = ", ".join(repr(item) for item in allowed) or "null"
            raise self.refusal(
                key, value, f"{expected}; it changes the maths in a way that edgellm cannot follow"
            )

    def skip(self, *keys: str) -> None:
        """Mark ``keys`` as understood although their values play no part here."""
        self._read.update(keys)

    def refusal(self, key: str, value: Any, expected: str) -> UnsupportedModel:
        """An error that says what ``key`` holds and what it may hold."""
        shown = repr(value)
        if len(shown) > 200:
            shown = shown[:200] + "..."
        return UnsupportedModel(
            f"{self.where}: {self._prefix}{key} is {shown}, expected {expected}"
        )

    def refuse_unread(self) -> None:
        """Raise ``UnsupportedModel`` with every key that was not read and may change the maths.

        Raises ``UsageError`` for an ignored key whose value was needed.
        """
        if self.has("quantization_config") and "quantization_config" not in self._ignore:
            method = self._values["quantization_config"]
            raise UnsupportedModel(
                f"{self.where}: the checkpoint is quantized already (quantization_config = "
                f"{method!r}); convert the float model that it was made from"
            )
        unknown = self._unread()
        if not unknown:
            return
        names = ", ".join(f"{key} = {value!r}" for key, value in unknown)
        raise UnsupportedModel(
            f"{self.where}: edgellm does not know {names}, and what it does not know could change "
            f"the results. If they don't matter, pass --ignore-config-key for each "
            f"(in Python: ignore_config_keys={tuple(key for key, _ in unknown)!r})"
        )

    def _unread(self) -> list[tuple[str, Any]]:
        for key, allowed in self._neutral.items():
            if key not in self._read:
                self.neutral(key, *allowed)
        unknown = []
        for key, value in self._values.items():
            path = self._prefix + str(key)
            known = key in self._read or key in self._harmless or path in self._ignore
            if not known and value is not None:
                unknown.append((path, value))
        for inner in self._sections:
            unknown.extend(inner._unread())
        return unknown

    def _take(self, key: str, default: Any) -> Any:
        if self._prefix + key in self._ignore:
            raise UsageError(
                f"{self._prefix}{key} is a config key that edgellm knows and needs: only unknown "
                f"keys can be ignored; take it out of ignore_config_keys"
            )
        self._read.add(key)
        value = self._values.get(key)
        if value is not None:
            return value
        if default is REQUIRED:
            raise UnsupportedModel(
                f"{self.where}: the key {self._prefix}{key} is missing; edgellm does not guess it: "
                f"add the value that the model was trained with"
            )
        return default


def _same(left: Any, right: Any) -> bool:
    """Equal, without Python's ``True == 1``."""
    return isinstance(left, bool) == isinstance(right, bool) and bool(left == right)
