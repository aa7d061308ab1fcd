"""Adapters on disk: which keys are understood, what configs are refused, what is found damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgellm.errors import AdapterError, UsageError
from edgellm.lora.adapter import AdapterSpec
from edgellm.lora.edit import Target
from edgellm.lora.kinds import KINDS
from edgellm.lora.kinds.lora import bind
from edgellm.lora.reading.open import open_adapter
from edgellm.lora.reading.peft_config import READERS
from edgellm.lora.reading.peft_keys import PARTS
from edgellm.lora.reading.refused_kinds import REFUSED
from edgellm.tensors import constant

WriteAdapter = Callable[..., Path]

Q = "model.layers.0.self_attn.q_proj"
A, B = np.ones((2, 6), np.float32), np.full((4, 2), 0.5, np.float32)
KEY_A, KEY_B = f"base_model.model.{Q}.lora_A.weight", f"base_model.model.{Q}.lora_B.weight"
PAIR = {KEY_A: A, KEY_B: B}
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}


@pytest.fixture
def write_adapter(tmp_path: Path, to_safetensors: Callable[..., bytes]) -> WriteAdapter:
    """``write_adapter(tensors, key=value...)``: a PEFT folder; None takes a key away."""

    def write(tensors: dict[str, Any] = PAIR, **changes: Any) -> Path:
        folder = tmp_path / "adapter"
        folder.mkdir(exist_ok=True)
        config = {key: value for key, value in (CONFIG | changes).items() if value is not None}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        (folder / "adapter_model.safetensors").write_bytes(to_safetensors(tensors))
        return folder

    return write


def test_a_folder_is_read_without_applying_it(write_adapter: WriteAdapter) -> None:
    folder = write_adapter(base_model_name_or_path="org/base", revision="main")
    adapter = open_adapter(AdapterSpec(str(folder), 0.5))
    assert (adapter.name, adapter.kind, adapter.weight) == ("adapter", "lora", 0.5)
    assert (adapter.base_name, adapter.base_revision) == ("org/base", "main")
    assert adapter.tokenizer_folder is None
    assert adapter.replaced == {}
    assert adapter.notes == ()
    parts = adapter.parts[f"{Q}.weight"]
    assert np.array_equal(parts["lora_A"].load(), A)
    assert np.array_equal(parts["lora_B"].load(), B)
    assert {path.name for path in adapter.files} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert open_adapter(f"{folder}=-2").weight == -2.0


def test_a_tokenizer_in_the_folder_is_told(write_adapter: WriteAdapter) -> None:
    folder = write_adapter()
    (folder / "tokenizer_config.json").write_text("{}")  # alone it makes no tokenizer
    assert open_adapter(str(folder)).tokenizer_folder is None
    (folder / "tokenizer.json").write_text("{}")
    assert open_adapter(str(folder)).tokenizer_folder == folder


WEIGHT = f"{Q}.weight"


def test_two_keys_of_one_meaning_are_an_error(write_adapter: WriteAdapter) -> None:
    other = {f"base_model.model.{Q}.lora_A.second.weight": A}
    with pytest.raises(AdapterError, match=r"second.weight.* same lora_A of .*two adapters"):
        open_adapter(str(write_adapter(PAIR | other)))


@pytest.mark.parametrize(
    ("tensors", "changes", "message"),
    [
        ({}, {}, "no tensors of an adapter"),
        ({KEY_A: A}, {}, "lora_A and no lora_B"),
        ({KEY_B: B}, {}, "lora_B and no lora_A"),
        (PAIR | {KEY_A: A * np.nan}, {}, r"lora_A.weight holds nan at row 0, column 0"),
        (PAIR | {KEY_B: B * np.inf}, {}, "lora_B.weight holds inf"),
        (PAIR | {KEY_A: np.zeros((0, 6), np.float32)}, {}, r"ZeRO-3"),
        (PAIR | {KEY_A: A.astype(np.int32)}, {}, "stored as I32"),
        (PAIR, {"use_dora": True}, "use_dora is True"),
        (
            PAIR | {f"base_model.model.{Q}.lora_magnitude_vector": np.ones(4, np.float32)},
            {},
            "use_dora is False",
        ),
        (PAIR, {"lora_bias": True}, "lora_B has a bias in 0 places"),
        (
            PAIR | {f"base_model.model.{Q}.lora_B.bias": np.ones(4, np.float32)},
            {},
            "lora_bias is False",
        ),
        (PAIR, {"trainable_token_indices": [1]}, r"trained rows of tokens are there for 0"),
    ],
)
def test_damaged_weights(
    tensors: dict[str, Any], changes: dict[str, Any], message: str, write_adapter: WriteAdapter
) -> None:
    with pytest.raises(AdapterError, match=message):
        open_adapter(str(write_adapter(tensors, **changes)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": None}, "peft_type is None"),
        ({"peft_type": "FANCY"}, "kind 'FANCY' are not known"),
        ({"peft_type": None, "fine_tune_type": "lora"}, "mlx_lm.fuse"),
        ({"r": 0}, "r is 0, expected a whole number from 1"),
        ({"r": -4}, "r is -4"),
        ({"r": 2.0}, "r is 2.0, expected a whole number"),
        ({"r": True}, "r is True"),
        ({"r": "2"}, "r is '2'"),
        ({"r": None}, "the key r is missing"),
        ({"lora_alpha": None}, "the key lora_alpha is missing"),
        ({"lora_alpha": 0}, "lora_alpha is 0"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern.q_proj is 0"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern is .*an object of numbers"),
        ({"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern.q_proj is 'x'"),
        ({"use_dora": "yes"}, "use_dora is 'yes'"),
        ({"use_fancy": 3}, "does not know use_fancy = 3.*ignore"),
        ({"alora_invocation_tokens": [1, 2]}, "activated LoRA"),
        ({"use_qalora": True}, "QALoRA"),
        ({"arrow_config": {"top_k": 2}}, "token by token"),
        ({"use_bdlora": {"nblocks": 2}}, "block-diagonal"),
        ({"kasa_config": {"beta": 1}}, "singular values"),
        ({"enable_lora": [True, False]}, "MergedLinear"),
        ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "olora"}, "path_initial_model"),
        ({"init_lora_weights": "loftq"}, "path_initial_model"),
        ({"init_lora_weights": "fancy"}, "init_lora_weights is 'fancy'"),
        ({"task_type": "SEQ_CLS"}, "classifier"),
        ({"trainable_token_indices": [3, 3]}, "each once"),
        ({"trainable_token_indices": {"embed_tokens": [-1]}}, "each once"),
        ({"target_parameters": "q_proj.weight"}, "a list of strings"),
        ({"modules_to_save": 3}, "modules_to_save is 3, expected a list of strings"),
    ],
)
def test_configs_that_are_refused(
    changes: dict[str, Any], message: str, write_adapter: WriteAdapter
) -> None:
    with pytest.raises(AdapterError, match=message):
        open_adapter(str(write_adapter(**changes)))


REASONS = {
    "PROMPT_TUNING": "changes no weight",
    "PREFIX_TUNING": "changes no weight",
    "P_TUNING": "changes no weight",
    "MULTITASK_PROMPT_TUNING": "changes no weight",
    "ADAPTION_PROMPT": "adds something to the network",
    "XLORA": "anew for every input",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_kinds_that_cannot_be_merged(kind: str, write_adapter: WriteAdapter) -> None:
    reason = REASONS.get(kind, "PEFT|changes no weight")
    with pytest.raises(AdapterError, match=f"kind {kind} cannot be merged: .*({reason})"):
        open_adapter(str(write_adapter(peft_type=kind)))


def test_what_is_harmless_passes(write_adapter: WriteAdapter) -> None:
    """Values as peft 0.21 and the first versions wrote them."""
    folder = write_adapter(
        inference_mode=True,
        bias="none",
        enable_lora=None,
        merge_weights=False,
        init_lora_weights="gaussian",
        eva_config={"rho": 2.0},
        megatron_core="megatron.core",
        auto_mapping={"base_model_class": "LlamaForCausalLM", "unsloth_fixed": True},
        task_type="CAUSAL_LM",
        use_qalora=False,
        qalora_group_size=16,
        lora_dropout=0.1,
    )
    assert open_adapter(str(folder)).notes == ()


def test_keys_that_the_user_vouches_for(write_adapter: WriteAdapter) -> None:
    folder = write_adapter(use_fancy=3, init_lora_weights="pissa")
    adapter = open_adapter(str(folder), ignore_config_keys=("use_fancy", "init_lora_weights"))
    assert adapter.notes == ("the base is taken to be what pissa left of it, as you said",)
    with pytest.raises(UsageError, match="only unknown keys can be ignored"):
        open_adapter(str(folder), ignore_config_keys=("use_fancy", "init_lora_weights", "r"))


def test_modules_without_tensors_are_told(write_adapter: WriteAdapter) -> None:
    folder = write_adapter(target_modules=["q_proj", "lm_head"], modules_to_save=["norm"])
    (note,) = open_adapter(str(folder)).notes
    assert "lm_head (target_modules), norm (modules_to_save)" in note


def test_every_kind_has_its_keys() -> None:
    assert KINDS.keys() == READERS.keys() == PARTS.keys()
    assert not {kind.upper() for kind in KINDS} & REFUSED.keys()
    assert REASONS.keys() <= REFUSED.keys()


def test_folders_that_are_none(tmp_path: Path, write_adapter: WriteAdapter) -> None:
    folder = write_adapter()
    with pytest.raises(AdapterError, match=r"holds 1 adapters .*name one, such as .*adapter"):
        open_adapter(str(tmp_path))
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    for path in (folder, folder / "adapter_model.bin"):
        with pytest.raises(AdapterError, match=r"pickle.*safe_serialization=True"):
            open_adapter(str(path))
    (folder / "adapter_model.bin").rename(folder / "adapters.safetensors")
    with pytest.raises(AdapterError, match=r"no adapter_model.safetensors; it holds adapters"):
        open_adapter(str(folder))
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(AdapterError, match="is not JSON"):
        open_adapter(str(folder))
    (folder / "adapter_config.json").unlink()
    with pytest.raises(AdapterError, match=r"has no adapter_config.json"):
        open_adapter(str(folder))
    (folder / "config.json").write_text("{}")
    with pytest.raises(AdapterError, match="is a model, not an adapter"):
        open_adapter(str(folder))
    with pytest.raises(AdapterError, match="neither a folder that PEFT wrote nor a GGUF"):
        open_adapter(str(folder / "config.json"))
    with pytest.raises(AdapterError, match="does not read like a Hub id"):
        open_adapter("./nowhere")


def test_a_damaged_file_is_an_adapter_error(write_adapter: WriteAdapter) -> None:
    folder = write_adapter()
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(AdapterError, match="cut short"):
        open_adapter(str(folder))


def ref(values: Any) -> Any:
    return constant("x", values)


@pytest.mark.parametrize(
    ("shape", "parts", "changes", "message"),
    [
        ((4, 6), {"lora_A": A}, {}, "no lora_B"),
        ((4, 6), {"lora_A": A, "lora_B": B.T}, {}, r"lora_B \[2, 4\]"),
        ((6, 4), {"lora_A": A, "lora_B": B}, {}, r"change of shape \[4, 6\]"),
        ((4, 6), {"lora_A": A, "lora_B": B}, {"r": 3}, "rank 2 and adapter_config.json says 3"),
        (
            (4, 6),
            {"lora_A": A, "lora_B": B},
            {"rank_pattern": {"q_proj": 8}},
            "rank 2 and adapter_config.json says 8",
        ),
        ((4, 6), {"lora_A": A, "lora_B": B}, {"rank_pattern": {"(": 8}}, "no regular expression"),
        (
            (4, 6),
            {"lora_A": A, "lora_B": B, "lora_magnitude_vector": np.ones(6)},
            {},
            "6 values and 4 are needed",
        ),
        ((4, 6), {"lora_A": A, "lora_B": B, "lora_embedding_A": A}, {}, "does not belong"),
        (
            (4, 6),
            {"trainable_tokens_delta": np.ones((2, 6))},
            {"trainable_token_indices": [0, 4]},
            "has 4 rows and the adapter trains token 4",
        ),
        (
            (4, 6),
            {"trainable_tokens_delta": np.ones((2, 6))},
            {"trainable_token_indices": [0]},
            "1 tokens of width 6",
        ),
        (
            (4, 6),
            {"trainable_tokens_delta": np.ones((2, 6))},
            {"trainable_token_indices": {"wte": [0, 1]}},
            "names wte",
        ),
    ],
)
def test_parts_that_do_not_fit(
    shape: tuple[int, ...], parts: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    target = Target(WEIGHT, shape, "linear")
    with pytest.raises(AdapterError, match=message):
        bind(target, {name: ref(value) for name, value in parts.items()}, CONFIG | changes)


def test_dora_on_a_row_without_a_direction() -> None:
    """PEFT divides by zero there; a row that also has no length stays as it is."""
    b = np.array([[1, 0], [0, 0]], np.float32)
    target = Target(WEIGHT, (2, 6), "linear")
    rows = np.zeros((2, 6), np.float32)
    for length, error in ((0.0, False), (3.0, True)):
        magnitude = np.array([2.0, length], np.float32)
        parts = {"lora_A": ref(A), "lora_B": ref(b), "lora_magnitude_vector": ref(magnitude)}
        edit = bind(target, parts, CONFIG)
        if error:
            with pytest.raises(AdapterError, match="row 1 is all zeros"):
                edit.apply(rows.copy(), 0, 2, 1.0)
        else:
            after = edit.apply(rows.copy(), 0, 2, 1.0)
            assert np.allclose(np.linalg.norm(after, axis=1), [2.0, 0.0])
