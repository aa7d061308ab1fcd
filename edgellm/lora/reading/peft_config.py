"""``adapter_config.json`` read key by key: nothing that could change the maths goes unread.

The keys are those of peft 0.21.2's config classes and of the versions before it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from edgellm.architectures.config import Config
from edgellm.errors import AdapterError, SourceError, UnsupportedModel
from edgellm.json_file import read_json
from edgellm.lora.kinds import KINDS
from edgellm.lora.reading.refused_kinds import refuse_kind

CONFIG = "adapter_config.json"

# What tells where an adapter came from or how it was trained and started, and what is seen from
# its tensors (which modules were trained) better than from its config.
_HARMLESS = """
    peft_type peft_version auto_mapping base_model_name_or_path revision inference_mode
    runtime_config target_modules exclude_modules layers_to_transform layers_pattern
    modules_to_save fan_in_fan_out unsloth_fixed unsloth_version
"""
HARMLESS_KEYS = frozenset(_HARMLESS.split())

_LORA_HARMLESS = """
    lora_dropout bias loftq_config eva_config corda_config lora_ga_config velora_config
    megatron_config megatron_core qalora_group_size merge_weights layer_replication
    ensure_weight_tying lora_dtype lorap_lr_ratio lorap_emb_lr
"""

_CONVERT = (
    "let PEFT make a plain LoRA of it (save_pretrained with path_initial_model_for_weight_"
    "conversion), or, where the base that you give is what that start left of it, pass "
    "--ignore-config-key init_lora_weights"
)
RESIDUAL_STARTS = ("pissa", "olora", "corda", "lora_ga", "loftq")
"""Values of ``init_lora_weights`` with which training took a part out of the base's weights."""

PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal", "mica")

VARIANTS = {
    "alora_invocation_tokens": "an activated LoRA works from its invocation tokens on, and no "
    "change of the weights does the same: run it with PEFT or vLLM, or train a plain LoRA",
    "arrow_config": "Arrow chooses among adapters token by token, and no change of the weights "
    "does the same: give the adapters that it chooses from, one by one",
    "use_qalora": "QALoRA works on inputs averaged in groups and PEFT does not merge it either: "
    "run it with PEFT on its GPTQ base, or train a plain LoRA",
    "use_bdlora": "BD-LoRA's factors are block-diagonal, which edgellm does not merge: merge it "
    "with PEFT (merge_and_unload, save_pretrained) and give edgellm the result",
    "kasa_config": "KaSA takes the smallest singular values out of the base's weights: merge it "
    "with PEFT (merge_and_unload, save_pretrained) and give edgellm the result",
    "monteclora_config": "Monteclora samples its weights anew at each step: merge it with PEFT "
    "(merge_and_unload, save_pretrained) and give edgellm the result",
    "enable_lora": "it says which of several stacked layers were trained, as the first versions "
    "of PEFT did (MergedLinear): merge it with the version that trained it",
}
"""Keys of LoRA configs that ask for something else than ``B @ A``, each with why and what to do."""

HEADED_TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")


def read_config(
    folder: Path, *, ignore: Collection[str] = ()
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The adapter's config as it stands, checked, and notes for the user.

    ``ignore``: keys that the user vouches for. Its ``peft_type`` is a row of ``KINDS`` in upper
    case. Raises ``AdapterError`` for a config that is missing, damaged, or asks for what cannot be
    merged; ``UsageError`` for an ignored key whose value is needed.
    """
    path = folder / CONFIG
    if not path.exists():
        raise AdapterError(
            f"{folder} has no {CONFIG}, without which rank and scale are unknown: give the folder "
            "that PEFT's save_pretrained wrote, or fetch that file too"
        )
    try:
        config = read_json(path)
    except SourceError as error:
        raise AdapterError(str(error)) from error
    kind = _kind(path, config)
    reader = Config(
        config, ignore=ignore, where=str(path), harmless=HARMLESS_KEYS | {"task_type"}, neutral={}
    )
    try:
        READERS[kind](reader, config, ignore)
        _check_task(reader)
        if reader.has("modules_to_save"):
            reader.texts("modules_to_save")
        reader.refuse_unread()
    except UnsupportedModel as error:
        raise AdapterError(str(error)) from error
    return {**config, "peft_type": kind.upper()}, tuple(reader.notes)


def _kind(path: Path, config: Mapping[str, Any]) -> str:
    """The row of ``KINDS``; refuses all others by name."""
    stated = config.get("peft_type")
    if not isinstance(stated, str):
        if "lora_parameters" in config or "fine_tune_type" in config:
            raise AdapterError(
                f"{path} was written by mlx-lm, whose adapters have other names and orientations "
                "than PEFT's: fuse it with mlx_lm.fuse and give edgellm the result"
            )
        raise AdapterError(
            f"{path}: peft_type is {stated!r}, expected the name of a PEFT method such as 'LORA': "
            "add the one that it was trained with"
        )
    kind = stated.lower()
    if kind not in KINDS:
        refuse_kind(str(path), stated)
    return kind


def _check_task(reader: Config) -> None:
    task = reader.text("task_type", "")
    if task in HEADED_TASKS:
        raise AdapterError(
            f"{reader.where}: task_type is {task}: the adapter was trained with a classifier in "
            "the place of the model's head, which a language model has no place for: run it with "
            "PEFT and transformers"
        )
    if task not in ("", "CAUSAL_LM"):
        reader.note(f"the adapter was trained for the task {task}, not for CAUSAL_LM")


def _lora(reader: Config, config: Mapping[str, Any], ignore: Collection[str]) -> None:
    reader.skip(*_LORA_HARMLESS.split())
    for key, reason in VARIANTS.items():
        reader.skip(key)
        if config.get(key) not in (None, False) and key not in ignore:
            raise AdapterError(f"{reader.where} sets {key}: {reason}")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(RESIDUAL_STARTS):
        if "init_lora_weights" not in ignore:
            raise AdapterError(
                f"{reader.where}: init_lora_weights is {start!r}, so the adapter was trained on "
                "what that start left of the base's weights, and added to the base itself it "
                f"would be wrong: {_CONVERT}"
            )
        reader.note(f"the base is taken to be what {start} left of it, as you said")
    reader.neutral("init_lora_weights", *PLAIN_STARTS)
    reader.integer("r")
    reader.number("lora_alpha", above=0.0)
    _patterns(reader, config)
    for key in ("use_rslora", "use_dora", "lora_bias"):
        reader.flag(key, default=False)
    if reader.has("target_parameters"):
        reader.texts("target_parameters")
    stated = config.get("trainable_token_indices")
    reader.skip("trainable_token_indices")
    if stated is not None:
        lists = stated.values() if isinstance(stated, Mapping) else (stated,)
        for indices in lists:
            _check_tokens(reader, "trainable_token_indices", indices)


def _lycoris(reader: Config, config: Mapping[str, Any], ignore: Collection[str]) -> None:
    """LoHa and LoKr."""
    reader.skip("rank_dropout", "module_dropout", "rank_dropout_scale", "init_weights")
    reader.skip("use_effective_conv2d", "decompose_both", "decompose_factor")
    reader.integer("r")
    reader.number("alpha", above=0.0)
    _patterns(reader, config)


def _ia3(reader: Config, config: Mapping[str, Any], ignore: Collection[str]) -> None:
    reader.skip("feedforward_modules", "init_ia3_weights")


def _vera(reader: Config, config: Mapping[str, Any], ignore: Collection[str]) -> None:
    reader.skip("vera_dropout", "d_initial", "bias", "init_weights")
    reader.skip("projection_prng_key", "save_projection")
    reader.integer("r")


def _oft(reader: Config, config: Mapping[str, Any], ignore: Collection[str]) -> None:
    reader.skip("module_dropout", "bias", "init_weights", "coft", "eps", "block_share")
    reader.skip("use_cayley_neumann", "num_cayley_neumann_terms", "rank_pattern", "alpha_pattern")
    reader.skip("alpha")
    reader.integer("r", default=0, minimum=0)
    reader.integer("oft_block_size", default=0, minimum=0)


def _boft(reader: Config, config: Mapping[str, Any], ignore: Collection[str]) -> None:
    reader.skip("boft_dropout", "bias", "init_weights")
    reader.integer("boft_block_size", default=4, minimum=0)
    reader.integer("boft_block_num", default=0, minimum=0)
    reader.integer("boft_n_butterfly_factor", default=1, minimum=0)


def _adalora(reader: Config, config: Mapping[str, Any], ignore: Collection[str]) -> None:
    """LoRA's config and its own; of ``rank_pattern``, the masks of what was not saved."""
    reader.skip(*_LORA_HARMLESS.split(), "r", "init_lora_weights", "rank_pattern")
    reader.skip("tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step")
    reader.skip("target_r")
    reader.integer("init_r", default=12)
    reader.number("lora_alpha", above=0.0)
    for key in (*VARIANTS, "use_dora", "lora_bias", "use_rslora", "alpha_pattern"):
        reader.skip(key)
        if config.get(key):
            raise AdapterError(
                f"{reader.where} sets {key}, which PEFT does not have for AdaLoRA: the config "
                "belongs to another adapter, or was put together by hand; fetch both again"
            )
    for key in ("target_parameters", "trainable_token_indices"):
        reader.skip(key)


def _c3a(reader: Config, config: Mapping[str, Any], ignore: Collection[str]) -> None:
    """The blocks' size is seen from the tensors."""
    reader.skip("block_size", "block_size_pattern", "bias", "init_weights")


def _hira(reader: Config, config: Mapping[str, Any], ignore: Collection[str]) -> None:
    reader.skip("hira_dropout", "init_weights")
    reader.integer("r", default=32)
    _patterns(reader, config)


def _hra(reader: Config, config: Mapping[str, Any], ignore: Collection[str]) -> None:
    reader.skip("bias", "init_weights")
    reader.integer("r", default=8)
    reader.flag("apply_GS", default=False)


def _miss(reader: Config, config: Mapping[str, Any], ignore: Collection[str]) -> None:
    reader.skip("miss_dropout", "bias")
    reader.neutral("init_weights", True, False, "bat", "mini")
    reader.integer("r", default=64)
    reader.integer("mini_r", default=1)


def _vblora(reader: Config, config: Mapping[str, Any], ignore: Collection[str]) -> None:
    reader.skip("num_vectors", "vector_length", "vblora_dropout", "bias")
    reader.skip("init_vector_bank_bound", "init_logits_std")
    reader.integer("r", default=4)
    reader.integer("topk", default=2)
    if reader.flag("save_only_topk_weights", default=False):
        raise AdapterError(
            f"{reader.where} sets save_only_topk_weights, a form of the weights that edgellm does "
            "not read: load the adapter with PEFT, set it to false in its config, and save it again"
        )


def _ln_tuning(reader: Config, config: Mapping[str, Any], ignore: Collection[str]) -> None:
    """All that it trains are whole tensors."""


def _trainable_tokens(reader: Config, config: Mapping[str, Any], ignore: Collection[str]) -> None:
    reader.skip("token_indices", "init_weights")
    _check_tokens(reader, "token_indices", config.get("token_indices"))


Reader = Callable[[Config, Mapping[str, Any], Collection[str]], None]
READERS: Mapping[str, Reader] = {
    "lora": _lora,
    "loha": _lycoris,
    "lokr": _lycoris,
    "ia3": _ia3,
    "vera": _vera,
    "oft": _oft,
    "boft": _boft,
    "adalora": _adalora,
    "c3a": _c3a,
    "hira": _hira,
    "hra": _hra,
    "miss": _miss,
    "vblora": _vblora,
    "ln_tuning": _ln_tuning,
    "trainable_tokens": _trainable_tokens,
}
"""For each row of ``KINDS``, what reads its keys."""


def _patterns(reader: Config, config: Mapping[str, Any]) -> None:
    """``rank_pattern`` and ``alpha_pattern``: objects of positive numbers by pattern."""
    for key in ("rank_pattern", "alpha_pattern"):
        if not reader.has(key):
            reader.skip(key)
            continue
        if not isinstance(config[key], Mapping):
            raise reader.refusal(key, config[key], "an object of numbers by pattern")
        section = reader.section(key)
        for pattern in config[key]:
            if key == "rank_pattern":
                section.integer(pattern)
            else:
                section.number(pattern, above=0.0)


def _check_tokens(reader: Config, key: str, indices: Any) -> None:
    whole = isinstance(indices, list) and all(type(i) is int and i >= 0 for i in indices)
    if not whole or not indices or len(set(indices)) != len(indices):
        raise reader.refusal(key, indices, "a list of token ids, each once")
