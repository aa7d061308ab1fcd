"""What is said of the base that an adapter was trained on, and which base is chosen from it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from edgellm.errors import AdapterError, UsageError
from edgellm.hub.ids import parse_hub_id
from edgellm.hub.needed import needed_adapter_files
from edgellm.lora.adapter import Adapter
from edgellm.lora.base.bases import common_base, training_base
from edgellm.lora.base.rounded_base import KEPT_SCALES, METHODS, dequantized_base
from edgellm.lora.base.training_evidence import evidence
from edgellm.quant import bnb_4bit, bnb_absmax
from edgellm.source import ModelSource, open_source
from edgellm.tensors import TensorRef

WriteModel = Callable[..., Path]
Tensors = dict[str, npt.NDArray[Any]]

PEFT_CARD = """---
library_name: peft
---
## Training procedure

The following `bitsandbytes` quantization config was used during training:
- quant_method: bitsandbytes
- load_in_8bit: False
- load_in_4bit: True
- llm_int8_threshold: 6.0
- llm_int8_skip_modules: None
- bnb_4bit_quant_type: nf4
- bnb_4bit_use_double_quant: {double}
- bnb_4bit_compute_dtype: bfloat16

### Framework versions

- PEFT 0.6.0
"""

AXOLOTL_CARD = """# out
<details><summary>See axolotl config</summary>

```yaml
base_model: NousResearch/Llama-2-7b-hf
load_in_8bit: false
load_in_4bit: true
adapter: qlora
```
</details>
"""

UNSLOTH_CARD = """---
base_model: unsloth/mistral-7b-bnb-4bit
---
# Uploaded model
"""


@pytest.fixture
def adapter(tmp_path: Path) -> Callable[..., Adapter]:
    """``adapter(base_name, {file name: text})``: an adapter whose folder holds these files."""

    def make(base_name: str = "", files: dict[str, str] | None = None, name: str = "a") -> Adapter:
        folder = tmp_path / name
        folder.mkdir()
        for file, text in (files or {}).items():
            (folder / file).write_text(text)
        return Adapter(name, folder, "lora", {}, {}, (), base_name=base_name)

    return make


@pytest.fixture
def full(tensors: Tensors, write_model: WriteModel) -> ModelSource:
    return open_source(str(write_model(tensors)))


@pytest.mark.parametrize(
    ("base_name", "files", "method", "said"),
    [
        ("unsloth/llama-3-8b-bnb-4bit", {}, "nf4-dq", "base_model_name_or_path unsloth/llama-3"),
        ("unsloth/Qwen3-4B-unsloth-bnb-4bit/", {}, "nf4-dq", "unsloth-bnb-4bit"),
        ("some/model-bnb-8bit", {}, "int8", "bnb-8bit"),
        ("", {"README.md": PEFT_CARD.format(double="True")}, "nf4-dq", "card says load_in_4bit"),
        ("", {"README.md": PEFT_CARD.format(double="False")}, "nf4", "card says load_in_4bit"),
        ("", {"README.md": AXOLOTL_CARD}, "nf4-dq", "load_in_4bit: true"),
        ("", {"README.md": UNSLOTH_CARD}, "nf4-dq", "base_model unsloth/mistral"),
        ("", {"axolotl_config.yaml": "adapter: qlora\n"}, "nf4-dq", "axolotl_config.yaml says"),
        ("", {"llama3_lora_sft.yaml": "quantization_bit: 4\n"}, "nf4-dq", "quantization_bit: 4"),
        (
            "",
            {"train.yaml": "quantization_bit: 4\ndouble_quantization: false\n"},
            "nf4",
            "quantization_bit: 4",
        ),
        ("", {"train.yml": "quantization_bit: 8\n"}, "int8", "quantization_bit: 8"),
        ("", {"training_config.json": '{"a": [{"load_in_8bit": true}]}'}, "int8", "load_in_8bit"),
        # BitsAndBytesConfig's own default is fp4, rounded once.
        (
            "",
            {"training_config.json": '{"quant_method": "bitsandbytes",\n "load_in_4bit": true}'},
            "fp4",
            "load_in_4bit",
        ),
        ("", {"adapter_config.json": '{\n "load_in_4bit": true\n}'}, "nf4-dq", "adapter_config"),
    ],
)
def test_each_piece_of_evidence_is_found_and_said(
    base_name: str,
    files: dict[str, str],
    method: str,
    said: str,
    adapter: Callable[..., Adapter],
    full: ModelSource,
) -> None:
    base = training_base(adapter(base_name, files), full)
    assert (base.kind, base.method, base.stored) == ("dequantized", method, False)
    assert base.reason.startswith("merged into dequantized ")
    assert said in base.reason
    assert ("double quantization" in base.reason) == method.endswith("-dq")


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "nothing that comes with the adapter says"),
        ({"README.md": "# A model\nRun it with load_in_4bit=True to save memory.\n"}, "nothing"),
        ({"README.md": "```python\nload_in_4bit = True\n```\n"}, "nothing"),
        ({"train.yaml": "# load_in_4bit: true\n"}, "nothing"),
        ({"train.yaml": "load_in_4bit:\ntrue\n"}, "nothing"),
        # Lines that a careless pattern would take hours for.
        ({"README.md": "\n" * (1 << 20)}, "nothing"),
        ({"README.md": "adapter:" + " " * (1 << 19) + "x" + " " * (1 << 18) + "y"}, "nothing"),
        ({"training_args.bin": "x"}, "training_args.bin was not opened: it is a pickle"),
        ({"train.yaml": "load_in_4bit: false\nadapter: lora\n"}, "train.yaml says load_in_4bit"),
    ],
)
def test_without_evidence_the_full_weights_are_merged_into(
    files: dict[str, str], said: str, adapter: Callable[..., Adapter], full: ModelSource
) -> None:
    base = training_base(adapter("meta/Llama-3-8B", files), full)
    assert (base.kind, base.method, base.notes) == ("full", "", ())
    assert said in base.reason
    assert base.of(full) is full


def test_settings_that_are_spelled_out_count_more_than_a_name(
    adapter: Callable[..., Adapter], full: ModelSource
) -> None:
    files = {"README.md": PEFT_CARD.format(double="False")}
    base = training_base(adapter("unsloth/m-bnb-4bit", files), full)
    assert (base.method, base.notes) == ("nf4", ())


def test_evidence_that_contradicts_itself_is_said(
    adapter: Callable[..., Adapter], full: ModelSource
) -> None:
    files = {"train.yaml": "load_in_8bit: true\n"}
    base = training_base(adapter("unsloth/m-bnb-4bit", files), full)
    assert base.method == "nf4-dq"
    (note,) = base.notes
    assert "train.yaml says load_in_8bit: true" in note
    assert "unsloth/m-bnb-4bit: the latter was followed" in note


def test_unsloths_dynamic_base_is_asked_for(
    adapter: Callable[..., Adapter], full: ModelSource
) -> None:
    base = training_base(adapter("unsloth/m-unsloth-bnb-4bit"), full)
    assert "leaves some layers unrounded" in base.notes[0]


@pytest.mark.parametrize(
    ("base_name", "files"),
    [
        ("TheBloke/Llama-2-7B-GPTQ", {}),
        ("org/model-AWQ", {}),
        ("", {"README.md": "- quant_method: gptq\n- bits: 4\n"}),
        ("", {"training_config.json": '{"quantization_config": {"quant_method": "hqq"}}'}),
    ],
)
def test_a_base_that_cannot_be_made_is_asked_for(
    base_name: str, files: dict[str, str], adapter: Callable[..., Adapter], full: ModelSource
) -> None:
    found = adapter(base_name, files)
    for asked in (None, "dequantized"):
        with pytest.raises(AdapterError, match=r"give that base itself.*--merge-base full"):
            training_base(found, full, asked)
    base = training_base(found, full, "full")
    assert base.kind == "full"
    assert "--merge-base full was asked for" in base.notes[0]


def test_what_is_asked_for_wins_and_the_rest_is_said(
    adapter: Callable[..., Adapter], full: ModelSource
) -> None:
    found = adapter("", {"README.md": PEFT_CARD.format(double="True")})
    base = training_base(found, full, "full")
    assert (base.kind, base.reason) == (
        "full",
        "merged into the full-precision weights: --merge-base full",
    )
    assert "card says load_in_4bit: True, and --merge-base full was asked for" in base.notes[0]
    assert training_base(found, full, "nf4").notes == ()
    assert training_base(found, full, "int8").method == "int8"
    assert training_base(found, full, "dequantized").method == "nf4-dq"
    with pytest.raises(UsageError, match="choose full, dequantized, nf4"):
        training_base(found, full, "nf5")


def test_dequantized_without_a_word_on_how_is_refused(
    adapter: Callable[..., Adapter], full: ModelSource
) -> None:
    with pytest.raises(UsageError, match="--merge-base nf4 or nf4-dq"):
        training_base(adapter(), full, "dequantized")


def stored_as(source: ModelSource, dtype: str) -> ModelSource:
    """``source`` with linear weights that say they are stored as ``dtype``."""
    from dataclasses import replace

    tensors = {
        role: replace(ref, dtype=dtype) if ".attn_" in role and len(ref.shape) == 2 else ref
        for role, ref in source.tensors.items()
    }
    return replace(source, tensors=tensors)


@pytest.mark.parametrize(
    ("dtype", "base_name", "noted"),
    [
        ("nf4-dq", "unsloth/m-bnb-4bit", False),
        ("gptq-4bit", "org/m-GPTQ", False),
        ("q4_k", "", False),
        ("q4_k", "unsloth/m-bnb-4bit", True),
        ("gptq-4bit", "org/m-AWQ", True),
    ],
)
def test_a_base_that_is_quantized_is_merged_into_as_it_is(
    dtype: str,
    base_name: str,
    noted: bool,
    adapter: Callable[..., Adapter],
    full: ModelSource,
) -> None:
    source = stored_as(full, dtype)
    found = adapter(base_name)
    for asked in (None, "dequantized"):
        base = training_base(found, source, asked)
        assert (base.kind, base.method, base.stored) == ("dequantized", dtype, True)
        assert base.of(source) is source
        assert bool(base.notes) == noted
        assert ("and adapter_config.json says" in base.reason) == (bool(base_name) and not noted)
    for asked in ("full", "int8"):
        with pytest.raises(UsageError, match="give the full-precision model"):
            training_base(found, source, asked)


def test_adapters_of_several_bases_are_not_merged_together(
    adapter: Callable[..., Adapter], full: ModelSource
) -> None:
    one, two = adapter("unsloth/m-bnb-4bit"), adapter("meta/m", name="b")
    with pytest.raises(UsageError, match=r"nf4 \(double.*b merged into the full.*choose one base"):
        common_base([one, two], full)
    assert common_base([one, two], full, "nf4").method == "nf4"
    assert common_base([one, one], full).method == "nf4-dq"


def test_settings_of_the_training_are_fetched_from_the_hub() -> None:
    names = ["adapter_config.json", "adapter_model.safetensors", "README.md", "axolotl.yml"]
    others = ["training_args.bin", "optimizer.pt", "trainer_state.json", "runs/config.yaml"]
    wanted = parse_hub_id("org/adapter")
    assert wanted is not None
    assert needed_adapter_files(wanted, [*names, *others]) == sorted(names)


def test_a_gguf_adapter_has_its_name_alone_to_tell(tmp_path: Path, full: ModelSource) -> None:
    path = tmp_path / "a.gguf"
    path.write_text("")
    found = Adapter("a", path, "lora", {}, {}, (), naming="gguf", base_name="m-bnb-4bit")
    assert [item.method for item in evidence(found)] == ["nf4-dq"]


@pytest.mark.parametrize("method", METHODS)
def test_rounding_does_not_depend_on_the_slabs(method: str, full: ModelSource) -> None:
    """Rows of 48 values: blocks of 64 straddle them."""
    role = "blk.1.ffn_down.weight"
    ref = dequantized_base(full, method).tensors[role]
    whole = ref.load()
    assert not np.array_equal(whole, full.tensors[role].load())
    slabs = [ref.load(start, min(start + 5, ref.rows)) for start in range(0, ref.rows, 5)]
    np.testing.assert_array_equal(np.concatenate(slabs), whole)
    np.testing.assert_array_equal(ref.load_columns(3, 7), whole[:, 3:7])


def test_rounding_twice_is_the_rounding_of_blocks_with_rounded_scales(full: ModelSource) -> None:
    role = "blk.0.attn_q.weight"
    values = full.tensors[role].load().reshape(-1)
    absmax = bnb_4bit.block_absmax(values)
    twice = bnb_absmax.quantize(absmax)
    scales = bnb_absmax.dequantize(twice.codes, twice.absmax, twice.offset)
    expected = bnb_4bit.dequantize(bnb_4bit.quantize(values, absmax, "nf4"), scales, "nf4")
    found = dequantized_base(full, "nf4-dq").tensors[role].load().reshape(-1)
    np.testing.assert_array_equal(found, expected)
    assert not np.array_equal(scales, absmax)


def test_scales_are_read_once_while_a_tensor_is_worked_on(full: ModelSource) -> None:
    from dataclasses import replace

    role = "blk.0.attn_q.weight"
    reads: list[tuple[int, int]] = []

    def counted(ref: TensorRef) -> TensorRef:
        def load_rows(start: int, stop: int) -> npt.NDArray[np.float32]:
            reads.append((start, stop))
            return ref.load_rows(start, stop)

        return replace(ref, load_rows=load_rows)

    tensors = {name: counted(ref) for name, ref in full.tensors.items()}
    rounded = dequantized_base(replace(full, tensors=tensors), "nf4-dq").tensors
    for start in range(0, 32, 8):
        rounded[role].load(start, start + 8)
    assert reads == [(0, 8), (0, 32), (8, 16), (16, 24), (24, 32)]
    # Once others have taken their place, they are read again.
    later = [name for name in rounded if name.startswith("blk.1.")] + ["blk.0.attn_k.weight"]
    assert sum(len(rounded[name].shape) == 2 for name in later) == KEPT_SCALES
    for name in later:
        rounded[name].load()
    reads.clear()
    rounded[role].load(0, 8)
    assert reads == [(0, 8), (0, 32)]
