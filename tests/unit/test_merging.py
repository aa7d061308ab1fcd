"""Adapters merged lazily: figures against plain numpy, independence of slabs, and refusals."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgellm.errors import AdapterError, TensorError
from edgellm.lora.adapter import Adapter
from edgellm.lora.binding import Combination
from edgellm.lora.merging import bindings, merged_source
from edgellm.source import ModelSource, open_source
from edgellm.tensors import TensorRef, constant

from .conftest import Tensors, WriteModel

RANK, ALPHA = 4, 6
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
SHAPES = {Q_PROJ: (32, 32), DOWN: (32, 48), EMBEDDING: (300, 32), HEAD: (300, 32)}
ROLES = {
    Q_PROJ: "blk.1.attn_q.weight",
    DOWN: "blk.0.ffn_down.weight",
    EMBEDDING: "token_embd.weight",
    HEAD: "output.weight",
}


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def factors(name: str, seed: int = 0) -> dict[str, TensorRef]:
    """A pair for one weight; an embedding's is stored turned round."""
    out, into = SHAPES[name]
    if name == EMBEDDING:
        return {
            "lora_embedding_A": constant("A", draw(seed, RANK, out)),
            "lora_embedding_B": constant("B", draw(seed + 1, into, RANK)),
        }
    return {
        "lora_A": constant("A", draw(seed, RANK, into)),
        "lora_B": constant("B", draw(seed + 1, out, RANK)),
    }


def delta(name: str, seed: int = 0) -> np.ndarray:
    """What such a pair adds, in float64."""
    out, into = SHAPES[name]
    a, b = (RANK, out), (into, RANK)
    if name != EMBEDDING:
        a, b = (RANK, into), (out, RANK)
    product = draw(seed + 1, *b).astype(np.float64) @ draw(seed, *a)
    return ALPHA / RANK * (product.T if name == EMBEDDING else product)


MakeAdapter = Callable[..., Adapter]


@pytest.fixture
def adapter(tmp_path: Path) -> MakeAdapter:
    """``adapter({weight: seed}, replaced={...}, name=..., ...)``, its file holding its name."""

    def make(
        seeds: dict[str, int] | None = None,
        *,
        replaced: dict[str, TensorRef] | None = None,
        name: str = "tuned",
        config: dict[str, Any] | None = None,
        **fields: Any,
    ) -> Adapter:
        file = tmp_path / f"{name}.safetensors"
        file.write_bytes(name.encode())
        return Adapter(
            name=name,
            path=tmp_path / name,
            kind="lora",
            config={"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, **(config or {})},
            parts={weight: factors(weight, seed) for weight, seed in (seeds or {}).items()},
            files=(file,),
            replaced=replaced or {},
            **fields,
        )

    return make


@pytest.fixture
def source(write_model: WriteModel, tensors: Tensors) -> ModelSource:
    return open_source(str(write_model(tensors)))


def values(ref: TensorRef) -> np.ndarray:
    return ref.load().reshape(ref.shape)


def test_the_change_is_added_and_nothing_else_differs(
    source: ModelSource, tensors: Tensors, adapter: MakeAdapter
) -> None:
    merged = merged_source(source, [adapter({Q_PROJ: 1, DOWN: 5})], Combination())
    assert merged.merge is not None
    assert set(merged.merge.changed) == {ROLES[Q_PROJ], ROLES[DOWN]}
    for role, before in source.tensors.items():
        after = merged.tensors[role]
        assert (after.name, after.role, after.dtype, after.shape) == (
            before.name,
            before.role,
            before.dtype,
            before.shape,
        )
        if role not in merged.merge.changed:
            np.testing.assert_array_equal(values(after), values(before))
    for name, seed in ((Q_PROJ, 1), (DOWN, 5)):
        wanted = tensors[name].astype(np.float64) + delta(name, seed)
        np.testing.assert_allclose(values(merged.tensors[ROLES[name]]), wanted, rtol=0, atol=1e-5)


def test_weights_scale_and_adapters_add_up(
    source: ModelSource, tensors: Tensors, adapter: MakeAdapter
) -> None:
    first = adapter({Q_PROJ: 1}, name="first", weight=0.5)
    second = adapter({Q_PROJ: 5, DOWN: 7}, name="second", weight=-2.0)
    merged = merged_source(source, [first, second], Combination())
    both = tensors[Q_PROJ] + 0.5 * delta(Q_PROJ, 1) - 2 * delta(Q_PROJ, 5)
    np.testing.assert_allclose(values(merged.tensors[ROLES[Q_PROJ]]), both, rtol=0, atol=2e-5)
    one = tensors[DOWN] - 2 * delta(DOWN, 7)
    np.testing.assert_allclose(values(merged.tensors[ROLES[DOWN]]), one, rtol=0, atol=2e-5)


def cuts(rows: int, step: int) -> Iterator[tuple[int, int]]:
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def test_the_bits_do_not_depend_on_the_slabs_and_the_record_says_them(
    source: ModelSource, adapter: MakeAdapter
) -> None:
    found = []
    for step in (1, 7, 32, 300):
        merged = merged_source(source, [adapter({Q_PROJ: 1, EMBEDDING: 3})], Combination())
        assert merged.merge is not None
        pieces = {
            role: np.concatenate(
                [merged.tensors[role].load(*cut) for cut in cuts(merged.tensors[role].rows, step)]
            )
            for role in merged.merge.changed
        }
        found.append((pieces, merged.merge.record.sha256()))
    for pieces, digest in found[1:]:
        assert digest == found[0][1]
        for role, rows in pieces.items():
            np.testing.assert_array_equal(rows, found[0][0][role])


def test_the_record_holds_norms_and_digests_of_each_change(
    source: ModelSource, tensors: Tensors, adapter: MakeAdapter
) -> None:
    merged = merged_source(source, [adapter({Q_PROJ: 1, DOWN: 5})], Combination())
    assert merged.merge is not None
    merged.tensors[ROLES[Q_PROJ]].load(3, 9)  # again below, and the other one never
    changes = merged.merge.record.complete()
    for name, seed in ((Q_PROJ, 1), (DOWN, 5)):
        change = changes[ROLES[name]]
        assert change.change_norm == pytest.approx(np.linalg.norm(delta(name, seed)), rel=1e-5)
        assert change.weight_norm == pytest.approx(np.linalg.norm(tensors[name]), rel=1e-5)
        rows = values(merged.tensors[ROLES[name]])
        digests = b"".join(hashlib.sha256(row.tobytes()).digest() for row in rows)
        assert change.sha256 == hashlib.sha256(digests).hexdigest()


@pytest.mark.parametrize("trained", [EMBEDDING, HEAD])
def test_one_side_of_a_tied_pair_unties_it(
    source: ModelSource, tensors: Tensors, adapter: MakeAdapter, trained: str
) -> None:
    assert source.decoder.tied_head
    merged = merged_source(source, [adapter({trained: 1})], Combination())
    assert not merged.decoder.tied_head
    assert merged.config["tie_word_embeddings"] is False
    assert any("two now" in note for note in merged.notes)
    for name in (EMBEDDING, HEAD):
        wanted = tensors[EMBEDDING] + (delta(name, 1) if name == trained else 0)
        np.testing.assert_allclose(values(merged.tensors[ROLES[name]]), wanted, rtol=0, atol=1e-5)


def test_a_larger_vocabulary_stays_tied_where_both_sides_are_the_same(
    source: ModelSource, adapter: MakeAdapter
) -> None:
    table = draw(9, 310, 32)
    tuned = adapter(
        {Q_PROJ: 1},
        replaced={EMBEDDING: constant("E", table), HEAD: constant("H", table.copy())},
    )
    merged = merged_source(source, [tuned], Combination())
    assert merged.decoder.vocab_size == merged.config["vocab_size"] == 310
    assert merged.decoder.tied_head
    assert "output.weight" not in merged.tensors
    ref = merged.tensors["token_embd.weight"]
    assert ref.shape == (310, 32)
    np.testing.assert_array_equal(values(ref), table)
    assert any("resized to 310" in note for note in merged.notes)
    assert any("310 rows for 257 tokens" in note for note in merged.notes)
    assert not any("300 rows for 257 tokens" in note for note in merged.notes)


def test_layers_are_repeated_and_each_copy_has_its_own_adapter(
    source: ModelSource, tensors: Tensors, adapter: MakeAdapter
) -> None:
    name = "model.layers.3.self_attn.q_proj.weight"
    SHAPES[name] = (32, 32)
    tuned = adapter({name: 1}, config={"layer_replication": [[0, 2], [0, 2]]})
    merged = merged_source(source, [tuned], Combination())
    assert len(merged.decoder.layers) == merged.config["num_hidden_layers"] == 4
    np.testing.assert_array_equal(values(merged.tensors["blk.1.attn_q.weight"]), tensors[Q_PROJ])
    wanted = tensors[Q_PROJ] + delta(name, 1)
    np.testing.assert_allclose(
        values(merged.tensors["blk.3.attn_q.weight"]), wanted, rtol=0, atol=1e-5
    )
    assert merged.tensors["blk.3.attn_q.weight"].name == name
    assert any("2 became 4" in note for note in merged.notes)


@pytest.mark.parametrize("ranges", [[[0, 3]], [[1, 1]], [0, 2], [[0, True]], "all"])
def test_layers_that_the_base_lacks_cannot_be_repeated(
    source: ModelSource, adapter: MakeAdapter, ranges: Any
) -> None:
    with pytest.raises(AdapterError, match="layer_replication"):
        merged_source(
            source, [adapter({Q_PROJ: 1}, config={"layer_replication": ranges})], Combination()
        )


def test_adapters_of_different_layers_are_not_merged_together(
    source: ModelSource, adapter: MakeAdapter
) -> None:
    first = adapter({Q_PROJ: 1}, name="first", config={"layer_replication": [[0, 2], [1, 2]]})
    with pytest.raises(AdapterError, match=r"first has layer_replication .* and second None"):
        merged_source(source, [first, adapter({Q_PROJ: 1}, name="second")], Combination())


def test_an_overflow_is_blamed_on_the_adapter_and_a_damaged_base_on_the_base(
    write_model: WriteModel, tensors: Tensors, adapter: MakeAdapter
) -> None:
    tuned = adapter({Q_PROJ: 1})
    tuned.parts[Q_PROJ]["lora_B"] = constant("B", draw(2, 32, RANK) * np.float32(1e38))
    source = open_source(str(write_model(tensors)))
    merged = merged_source(source, [tuned], Combination())
    with pytest.raises(AdapterError, match=f"merging makes {Q_PROJ} overflow"):
        merged.tensors[ROLES[Q_PROJ]].load()
    tensors[Q_PROJ][3, 5] = np.nan
    source = open_source(str(write_model(tensors)))
    merged = merged_source(source, [adapter({Q_PROJ: 1})], Combination())
    with pytest.raises(TensorError, match="row 3, column 5") as raised:
        merged.tensors[ROLES[Q_PROJ]].load()
    assert not isinstance(raised.value, AdapterError)


def test_what_matches_nothing_is_refused_with_its_name(
    source: ModelSource, adapter: MakeAdapter
) -> None:
    strange = "model.layers.7.self_attn.q_proj.weight"
    SHAPES[strange] = (32, 32)
    with pytest.raises(AdapterError, match=strange):
        merged_source(source, [adapter({strange: 1, Q_PROJ: 1})], Combination())
    bias = "model.layers.0.self_attn.q_proj.bias"
    with pytest.raises(AdapterError, match=bias):
        merged_source(
            source,
            [adapter({Q_PROJ: 1}, replaced={bias: constant(bias, np.zeros(32))})],
            Combination(),
        )


def test_whole_tensors_have_neither_weights_nor_sums(
    source: ModelSource, adapter: MakeAdapter
) -> None:
    norm = "model.norm.weight"
    first = adapter(replaced={norm: constant(norm, draw(1, 32))}, name="first")
    second = adapter(replaced={norm: constant(norm, draw(2, 32))}, name="second")
    with pytest.raises(AdapterError, match=f"first and second both replace {norm}"):
        merged_source(source, [first, second], Combination())
    with pytest.raises(AdapterError, match=norm):
        merged_source(source, [replace(first, weight=0.5)], Combination())
    merged = merged_source(source, [first], Combination())
    np.testing.assert_array_equal(values(merged.tensors["output_norm.weight"]), draw(1, 32))


def test_bindings_are_by_role(source: ModelSource, adapter: MakeAdapter) -> None:
    found = bindings(source, adapter({Q_PROJ: 1, HEAD: 2}, weight=0.5))
    assert found.keys() == {ROLES[Q_PROJ], ROLES[HEAD]}
    assert {binding.weight for binding in found.values()} == {0.5}
    np.testing.assert_allclose(
        found[ROLES[Q_PROJ]].edit.apply(np.zeros((32, 32), np.float32), 0, 32, 1.0),
        delta(Q_PROJ, 1),
        atol=1e-5,
    )


@pytest.fixture
def tokenizer_folder(tmp_path: Path, source: ModelSource) -> Path:
    """A folder with the base's own tokenizer, as a trainer saves it beside an adapter."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for name, content in source.tokenizer.files().items():
        (folder / name).write_bytes(content)
    return folder


def with_token(folder: Path, text: str) -> None:
    rules = json.loads((folder / "tokenizer.json").read_text())
    token = rules["added_tokens"][0]
    rules["added_tokens"].append({**token, "id": token["id"] + 1, "content": text})
    (folder / "tokenizer.json").write_text(json.dumps(rules))


def test_the_same_tokenizer_beside_an_adapter_changes_nothing(
    source: ModelSource, adapter: MakeAdapter, tokenizer_folder: Path
) -> None:
    tuned = adapter({Q_PROJ: 1}, tokenizer_folder=tokenizer_folder)
    assert merged_source(source, [tuned], Combination()).tokenizer is source.tokenizer


def test_added_tokens_and_templates_come_from_the_adapter(
    source: ModelSource, adapter: MakeAdapter, tokenizer_folder: Path
) -> None:
    with_token(tokenizer_folder, "<|call|>")
    tuned = adapter({Q_PROJ: 1}, tokenizer_folder=tokenizer_folder)
    merged = merged_source(source, [tuned], Combination())
    assert merged.tokenizer.encode("<|call|>") == [257]
    assert merged.tokenizer.eos_token_ids == source.tokenizer.eos_token_ids
    assert any(note.startswith("tokenizer from tuned: 1 tokens added") for note in merged.notes)
    other = adapter({Q_PROJ: 1}, name="other", tokenizer_folder=tokenizer_folder.with_name("b"))
    tokenizer_folder.with_name("b").mkdir()
    for file in tokenizer_folder.iterdir():
        (tokenizer_folder.with_name("b") / file.name).write_bytes(file.read_bytes())
    (tokenizer_folder.with_name("b") / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(AdapterError, match="tuned and other were trained with tokenizers"):
        merged_source(source, [tuned, other], Combination())


def test_tokens_without_a_row_are_refused(
    write_model: WriteModel, tensors: Tensors, adapter: MakeAdapter
) -> None:
    tensors[EMBEDDING] = tensors[EMBEDDING][:257].copy()
    folder = write_model(tensors, vocab_size=257)
    with_token(folder, "<|call|>")
    brought = folder.rename(folder.with_name("brought"))
    source = open_source(str(write_model(tensors, vocab_size=257)))
    tuned = adapter({Q_PROJ: 1}, tokenizer_folder=brought)
    with pytest.raises(AdapterError, match="token ids up to 257 and the merged embedding 257 rows"):
        merged_source(source, [tuned], Combination())


def test_a_template_that_the_adapter_lacks_is_the_bases(
    write_model: WriteModel, tensors: Tensors, adapter: MakeAdapter, tokenizer_folder: Path
) -> None:
    with_token(tokenizer_folder, "<|call|>")
    folder = write_model(tensors, folder="chatty")
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    base = open_source(str(folder))
    tuned = adapter({Q_PROJ: 1}, tokenizer_folder=tokenizer_folder)
    merged = merged_source(base, [tuned], Combination())
    assert merged.tokenizer.chat_template == "{{ messages[0].content }}"
    assert merged.tokenizer.files()["chat_template.jinja"] == b"{{ messages[0].content }}"
    assert any("chat template from the base" in note for note in merged.notes)


def test_another_end_of_answers_comes_from_the_adapter(
    source: ModelSource, adapter: MakeAdapter, tokenizer_folder: Path
) -> None:
    (tokenizer_folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "!"}))
    tuned = adapter({Q_PROJ: 1}, tokenizer_folder=tokenizer_folder)
    merged = merged_source(source, [tuned], Combination())
    (end,) = merged.tokenizer.encode("!")
    assert merged.tokenizer.eos_token_ids[0] == end
    assert any("other tokens end an answer" in note for note in merged.notes)
