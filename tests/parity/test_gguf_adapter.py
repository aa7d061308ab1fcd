"""GGUF adapters against llama.cpp's converter and PEFT's own merge."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

peft = pytest.importorskip("peft", reason="peft is not installed")

from gguf_adapters import as_llamacpp_converts, contents, products  # noqa: E402
from gguf_files import write_gguf  # noqa: E402
from peft_adapters import PeftAdapter, make_adapter  # noqa: E402

from edgellm.architectures.gguf_rows import as_llamacpp_stores  # noqa: E402
from edgellm.architectures.row_order import as_network_takes  # noqa: E402
from edgellm.errors import AdapterError  # noqa: E402
from edgellm.export.gguf_adapter import write_gguf_adapter  # noqa: E402
from edgellm.lora.binding import Combination  # noqa: E402
from edgellm.lora.merging import merged_source  # noqa: E402
from edgellm.lora.reading.gguf_adapter import open_gguf_adapter  # noqa: E402
from edgellm.lora.reading.open import open_adapter  # noqa: E402
from edgellm.source import ModelSource, open_source  # noqa: E402
from edgellm.tensors import constant  # noqa: E402

TinyModel = Callable[[str], Path]

PATTERNS: dict[str, Any] = {
    "rank_pattern": {"layers.1.self_attn.q_proj": 8, "down_proj": 2, "h.1.attn.c_attn": 3},
    "alpha_pattern": {"k_proj": 64, "layers.0.mlp.up_proj": 3, "c_fc": 5},
}
SCALES: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": PATTERNS,
    "rslora with patterns": {"use_rslora": True, **PATTERNS},
}
MODELS = ("llama", "gemma3-pattern", "gpt2", "gpt_neox")
"""Rows in pairs, rows as they are, products that the checkpoint stores turned round, and rows that
it stores head by head."""


def lora(base: Path, **settings: Any) -> Any:
    gpt2 = "gpt2" in base.name
    targets = ["c_attn", "c_proj", "c_fc"] if gpt2 else "all-linear"
    options = {"r": 4, "lora_alpha": 16, "target_modules": targets, "fan_in_fan_out": gpt2}
    return peft.LoraConfig(**options | settings)


def expected_change(made: PeftAdapter, source: ModelSource) -> dict[str, np.ndarray]:
    """PEFT's merged weights less the base's, by role, rows as llama.cpp stores them."""
    changes = {}
    for row in source.family.tensors(source.decoder):
        name = row.source if row.source in made.merged else "lm_head.weight"
        change = made.merged[name].astype(np.float64) - made.base[name]
        if row.transposed:
            change = change.T
        if np.any(change):
            ordered = as_network_takes(constant(row.source, change), row)
            ref = as_llamacpp_stores(ordered, row, source.decoder, source.family.gguf_layout)
            changes[row.role] = ref.load()
    return changes


def check_products(path: Path, made: PeftAdapter, source: ModelSource) -> None:
    """PEFT merges in float32: a weight of about 5 and its change lose 5e-7 of it each."""
    expected = expected_change(made, source)
    found = products(path)
    assert found.keys() == expected.keys()
    for role, change in expected.items():
        np.testing.assert_allclose(found[role], change, atol=3e-6, err_msg=role)


@pytest.mark.parametrize("model", MODELS)
def test_every_scale_is_the_one_that_peft_merges_with(
    model: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    base = tiny_model(model)
    source = open_source(str(base))
    for kind, settings in SCALES.items():
        made = make_adapter(base, lora(base, **settings), tmp_path / kind)
        path = tmp_path / f"{kind}.gguf"
        write_gguf_adapter(source, open_adapter(str(made.folder)), path)
        check_products(path, made, source)


def test_plain_adapter_is_what_llamacpps_converter_writes(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    base = tiny_model("llama")
    made = make_adapter(base, lora(base, target_modules=LINEAR), tmp_path / "plain")
    write_gguf_adapter(open_source(str(base)), open_adapter(str(made.folder)), tmp_path / "ours")
    as_llamacpp_converts(made.folder, tmp_path / "theirs", heads=6, kv_heads=2)
    ours, tensors = contents(tmp_path / "ours")
    theirs, their_tensors = contents(tmp_path / "theirs")
    for key in ("general.architecture", "general.type", "adapter.type", "adapter.lora.alpha"):
        assert ours[key] == theirs[key]
    assert tensors.keys() == their_tensors.keys()
    for name, values in tensors.items():
        np.testing.assert_array_equal(values, their_tensors[name], err_msg=name)


LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def test_alpha_is_the_one_that_leaves_most_factors_as_they_were(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    base = tiny_model("llama")
    source = open_source(str(base))
    made = make_adapter(base, lora(base, use_rslora=True), tmp_path / "rslora")
    write_gguf_adapter(source, open_adapter(str(made.folder)), tmp_path / "rs.gguf")
    metadata, tensors = contents(tmp_path / "rs.gguf")
    assert metadata["adapter.lora.alpha"] == 32  # 16 / sqrt(4) * 4
    stored = open_adapter(str(made.folder)).parts["model.layers.0.mlp.up_proj.weight"]["lora_B"]
    np.testing.assert_array_equal(tensors["blk.0.ffn_up.weight.lora_b"], stored.load())


@pytest.mark.parametrize("kind", SCALES)
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_merging_the_gguf_adapter_gives_what_the_peft_folder_gives(
    model: str, kind: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    base = tiny_model(model)
    source = open_source(str(base))
    made = make_adapter(base, lora(base, **SCALES[kind]), tmp_path / "peft")
    folder = open_adapter(str(made.folder))
    write_gguf_adapter(source, folder, tmp_path / "adapter.gguf")
    file = open_adapter(str(tmp_path / "adapter.gguf"))
    assert file.naming == "gguf"
    merged = merged_source(source, [folder], Combination())
    again = merged_source(source, [file], Combination())
    assert again.tensors.keys() == merged.tensors.keys()
    for role, ref in merged.tensors.items():
        # A scale that went into B was rounded with it: half a unit in the last place.
        np.testing.assert_allclose(
            again.tensors[role].load(), ref.load(), rtol=0, atol=1e-6, err_msg=role
        )


def test_a_quantized_gguf_base_gives_the_same_file(tiny_model: TinyModel, tmp_path: Path) -> None:
    base = tiny_model("llama")
    made = make_adapter(base, lora(base, **SCALES["rslora with patterns"]), tmp_path / "peft")
    write_gguf(base, tmp_path / "base.gguf", "q8_0")
    adapter = open_adapter(str(made.folder))
    write_gguf_adapter(open_source(str(base)), adapter, tmp_path / "one.gguf")
    write_gguf_adapter(open_source(str(tmp_path / "base.gguf")), adapter, tmp_path / "two.gguf")
    one, two = contents(tmp_path / "one.gguf"), contents(tmp_path / "two.gguf")
    assert one[1].keys() == two[1].keys()
    for name, values in one[1].items():
        np.testing.assert_array_equal(values, two[1][name])


def test_loha_is_a_product_of_squared_rank(tiny_model: TinyModel, tmp_path: Path) -> None:
    base = tiny_model("llama")
    config = peft.LoHaConfig(r=3, alpha=6, target_modules=["q_proj", "down_proj"])
    made = make_adapter(base, config, tmp_path / "loha")
    source = open_source(str(base))
    write_gguf_adapter(source, open_adapter(str(made.folder)), tmp_path / "loha.gguf")
    assert contents(tmp_path / "loha.gguf")[1]["blk.0.attn_q.weight.lora_a"].shape == (9, 96)
    check_products(tmp_path / "loha.gguf", made, source)


def test_vera_is_folded_into_its_factors(tiny_model: TinyModel, tmp_path: Path) -> None:
    base = tiny_model("llama")
    config = peft.VeraConfig(r=5, target_modules=["v_proj"], save_projection=True)
    made = make_adapter(base, config, tmp_path / "vera")
    source = open_source(str(base))
    write_gguf_adapter(source, open_adapter(str(made.folder)), tmp_path / "vera.gguf")
    check_products(tmp_path / "vera.gguf", made, source)


def test_embedding_and_head_of_an_untied_model(tiny_model: TinyModel, tmp_path: Path) -> None:
    base = tiny_model("llama")
    config = lora(base, target_modules=["embed_tokens", "lm_head", "q_proj"], use_rslora=True)
    made = make_adapter(base, config, tmp_path / "tables")
    source = open_source(str(base))
    # PEFT has put both tables beside the factors, which are copies of the base's.
    write_gguf_adapter(source, open_adapter(str(made.folder)), tmp_path / "tables.gguf")
    shapes = {name: values.shape for name, values in contents(tmp_path / "tables.gguf")[1].items()}
    assert shapes["token_embd.weight.lora_a"] == (517, 4)
    assert shapes["token_embd.weight.lora_b"] == (96, 4)
    check_products(tmp_path / "tables.gguf", made, source)
    merged = merged_source(
        source, [open_adapter(str(tmp_path / "tables.gguf"))], Combination()
    ).tensors
    for role, name in (
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("output.weight", "lm_head.weight"),
    ):
        np.testing.assert_allclose(merged[role].load(), made.merged[name], atol=1e-6)


REFUSED = {
    "dora": (
        lambda: peft.LoraConfig(r=4, use_dora=True, target_modules=["q_proj"]),
        "llama",
        "changes blk.0.attn_q.weight by lora, not by a product",
    ),
    "saved whole": (
        lambda: peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]),
        "llama",
        "replaces whole tensors .lm_head.weight.",
    ),
    "bias": (
        lambda: peft.LoraConfig(r=4, target_modules=["q_proj"], bias="lora_only"),
        "llama-biased",
        "replaces whole tensors .model.layers.0.self_attn.q_proj.bias",
    ),
    "tied table": (
        lambda: peft.LoraConfig(r=4, target_modules=["embed_tokens"]),
        "llama-biased",
        "both as embedding and as head",
    ),
    "ia3": (
        lambda: peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
        "llama",
        "by ia3, not by a product",
    ),
    "lokr": (
        lambda: peft.LoKrConfig(r=4, target_modules=["q_proj"]),
        "llama",
        "by lokr, not by a product",
    ),
    "oft": (
        lambda: peft.OFTConfig(r=0, oft_block_size=8, target_modules=["q_proj"]),
        "llama",
        "by oft, not by a product",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_no_gguf_adapter_holds_is_refused_by_name(
    kind: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    config, model, message = REFUSED[kind]
    made = make_adapter(tiny_model(model), config(), tmp_path / "adapter")
    source = open_source(str(tiny_model(model)))
    with pytest.raises(AdapterError, match=f"{message}.*merge it into the weights"):
        write_gguf_adapter(source, open_adapter(str(made.folder)), tmp_path / "no.gguf")
    assert not (tmp_path / "no.gguf").exists()


def test_a_scale_of_zero_is_not_written_as_one(tiny_model: TinyModel, tmp_path: Path) -> None:
    """llama.cpp takes an alpha of 0 for a scale of 1."""
    base = tiny_model("llama")
    made = make_adapter(base, lora(base), tmp_path / "adapter")
    adapter = open_adapter(str(made.folder))
    adapter = replace(adapter, config={**adapter.config, "lora_alpha": 0})
    with pytest.raises(AdapterError, match="scale of 0 on every weight"):
        write_gguf_adapter(open_source(str(base)), adapter, tmp_path / "no.gguf")


def test_provenance_stands_in_the_file(tiny_model: TinyModel, tmp_path: Path) -> None:
    base = tiny_model("llama")
    made = make_adapter(base, lora(base), tmp_path / "adapter")
    adapter = open_adapter(str(made.folder))
    write_gguf_adapter(open_source(str(base)), adapter, tmp_path / "adapter.gguf")
    metadata, _ = contents(tmp_path / "adapter.gguf")
    assert metadata["edgellm.adapter.sha256"] == adapter.digest()
    assert metadata["general.base_model.0.name"] == "llama"
    assert metadata["general.name"] == "adapter"
    assert metadata["general.quantized_by"].startswith("edgellm ")
    assert open_gguf_adapter(tmp_path / "adapter.gguf").base_name == "llama"
