"""GGUF adapters as files: what is understood, and what is refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf_adapters import pair, write_adapter

from edgellm.errors import AdapterError
from edgellm.lora.adapter import Adapter
from edgellm.lora.reading.gguf_adapter import check_fits, open_gguf_adapter
from edgellm.source.gguf_file import read_gguf

Q = "blk.0.attn_q.weight"
NORM = "blk.0.attn_norm.weight"
CONVOLUTION, BY_HEAD = "blk.0.shortconv.conv.weight", "blk.0.attn_q_norm.weight"
ROUTER, SHARED_GATE = "blk.0.ffn_gate_inp.weight", "blk.0.ffn_gate_inp_shexp.weight"


def test_a_pair_is_read_as_it_lies_there(tmp_path: Path) -> None:
    factors = pair(Q, 8, 6)
    adapter = open_gguf_adapter(write_adapter(tmp_path / "my-lora.gguf", factors, alpha=12.0))
    assert (adapter.name, adapter.kind, adapter.naming) == ("my-lora", "lora", "gguf")
    assert adapter.config["lora_alpha"] == 12
    assert adapter.config["r"] == 4
    for part in ("lora_a", "lora_b"):
        np.testing.assert_array_equal(adapter.parts[Q][part].load(), factors[f"{Q}.{part}"])
    assert adapter.notes == ()


def test_what_it_says_of_itself_is_kept(tmp_path: Path) -> None:
    path = write_adapter(
        tmp_path / "adapter.gguf",
        pair(Q, 8, 6),
        alpha=None,
        general__base_model__0__repo_url="https://huggingface.co/someone/base",
        general__base_model__0__version="main",
        adapter__lora__prompt_prefix="Answer briefly:",
    )
    adapter = open_gguf_adapter(path)
    assert (adapter.base_name, adapter.base_revision) == ("someone/base", "main")
    assert "states no alpha" in adapter.notes[0]
    assert "'Answer briefly:'" in adapter.notes[1]


def test_norms_beside_the_pairs_are_whole_tensors(tmp_path: Path) -> None:
    tensors = {**pair(Q, 8, 6), NORM: np.ones(6, np.float32)}
    adapter = open_gguf_adapter(write_adapter(tmp_path / "a.gguf", tensors))
    assert list(adapter.replaced) == [NORM]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "model"}, "is a GGUF model, not an adapter"),
        ({"adapter_type": "dora"}, "of the type 'dora'"),
        ({"arch": "controlvector"}, "is a control vector"),
        ({"adapter__alora__invocation_tokens": [5, 6]}, "is an activated LoRA"),
        ({"alpha": float("nan")}, "adapter.lora.alpha is nan"),
    ],
)
def test_other_files_are_refused(options: dict[str, object], message: str, tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "a.gguf", pair(Q, 8, 6), **options)  # type: ignore[arg-type]
    with pytest.raises(AdapterError, match=message):
        open_gguf_adapter(path)


def without(tensors: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    return {key: values for key, values in tensors.items() if key != name}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (without(pair(Q, 8, 6), f"{Q}.lora_b"), "without the other half"),
        ({}, "holds no pair"),
        ({**pair(Q, 8, 6), f"{Q}.lora_b": np.full((8, 4), np.nan, np.float32)}, "nan at row 0"),
        ({**pair(Q, 8, 6), "x.weight": np.ones(3, np.float32)}, "x.weight, which is neither"),
        ({**pair(Q, 8, 6), f"{Q}.lora_a": np.ones((3, 6), np.float32)}, "whose ranks differ"),
        (
            {f"{Q}.lora_a": np.ones((2, 4, 6), np.float32), f"{Q}.lora_b": np.ones((2, 8, 4))},
            "stacked experts",
        ),
    ],
)
def test_damaged_files_are_refused(
    tensors: dict[str, np.ndarray], message: str, tmp_path: Path
) -> None:
    with pytest.raises(AdapterError, match=message):
        open_gguf_adapter(write_adapter(tmp_path / "a.gguf", tensors))


def base_file(path: Path, *, tied: bool = True) -> Path:
    """What ``check_fits`` looks at of a model: its architecture, names and shapes."""
    tensors = {
        "token_embd.weight": np.zeros((10, 6), np.float32),
        "position_embd.weight": np.zeros((12, 6), np.float32),
        Q: np.zeros((8, 6), np.float32),
        NORM: np.zeros(6, np.float32),
        CONVOLUTION: np.zeros((6, 3), np.float32),
        BY_HEAD: np.zeros((2, 4), np.float32),
        ROUTER: np.zeros((5, 6), np.float32),
        SHARED_GATE: np.zeros(6, np.float32),
    }
    if not tied:
        tensors["output.weight"] = np.zeros((10, 6), np.float32)
    return write_adapter(path, tensors, kind="model")


def table_pair(tokens: int, width: int) -> dict[str, np.ndarray]:
    return {
        "token_embd.weight.lora_a": np.ones((tokens, 4), np.float32),
        "token_embd.weight.lora_b": np.ones((width, 4), np.float32),
    }


def opened(path: Path, tensors: dict[str, np.ndarray], **options: object) -> Adapter:
    return open_gguf_adapter(write_adapter(path, tensors, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_of_the_base_fits(tied: bool, tmp_path: Path) -> None:
    base = read_gguf(base_file(tmp_path / "base.gguf", tied=tied))
    check_fits(opened(tmp_path / "a.gguf", pair(Q, 8, 6)), base)
    check_fits(opened(tmp_path / "r.gguf", {**pair(ROUTER, 5, 6), **pair(SHARED_GATE, 1, 6)}), base)
    if not tied:
        check_fits(opened(tmp_path / "b.gguf", table_pair(10, 6)), base)


@pytest.mark.parametrize(
    ("tensors", "options", "message"),
    [
        (
            pair(Q, 8, 6),
            {"arch": "qwen2"},
            "for the architecture 'qwen2', and base.gguf is 'llama'",
        ),
        (pair("blk.1.attn_q.weight", 8, 6), {}, "blk.1.attn_q.weight, which base.gguf does not"),
        (pair(Q, 8, 7), {}, r"as \[8, 7\], and base.gguf has \[8, 6\]"),
        (pair(Q, 9, 6), {}, r"as \[9, 6\], and base.gguf has \[8, 6\]"),
        (pair(NORM, 6, 6), {}, "adds no product to"),
        (pair("position_embd.weight", 12, 6), {}, "adds no product to"),
        (pair(CONVOLUTION, 6, 3), {}, "adds no product to"),
        (pair(BY_HEAD, 2, 4), {}, "adds no product to"),
        (table_pair(10, 6), {}, "both as embedding and as head"),
        ({**pair(Q, 8, 6), NORM: np.ones(6, np.float32)}, {}, "passes over in silence"),
    ],
)
def test_what_llamacpp_would_drop_or_stop_over_is_refused(
    tensors: dict[str, np.ndarray], options: dict[str, object], message: str, tmp_path: Path
) -> None:
    base = read_gguf(base_file(tmp_path / "base.gguf"))
    with pytest.raises(AdapterError, match=message):
        check_fits(opened(tmp_path / "a.gguf", tensors, **options), base)
