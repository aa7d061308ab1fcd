"""Hugging Face folders: what is opened, and what is refused with which words."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from edgellm.errors import EdgeError, SourceError, TensorError, UnsupportedModel
from edgellm.source import open_source

Tensors = dict[str, npt.NDArray[Any]]
WriteModel = Callable[..., Path]
EMBEDDING = "model.embed_tokens.weight"
INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize("shards", [1, 3])
def test_a_folder_is_opened_with_every_tensor_in_its_role(
    shards: int, tensors: Tensors, write_model: WriteModel
) -> None:
    path = write_model(tensors, shards=shards)
    source = open_source(str(path))
    assert (source.kind, source.name, source.licence) == ("hf", "model", "apache-2.0")
    assert source.family.model_type == "llama"
    assert source.generation == {"temperature": 0.7}
    assert len(source.tensors) == len(tensors)
    assert "output.weight" not in source.tensors
    for role, name in {
        "token_embd.weight": EMBEDDING,
        "blk.1.attn_q.weight": "model.layers.1.self_attn.q_proj.weight",
        "blk.0.ffn_norm.weight": "model.layers.0.post_attention_layernorm.weight",
    }.items():
        ref = source.tensors[role]
        assert (ref.role, ref.name) == (role, name)
        np.testing.assert_array_equal(ref.load().reshape(ref.shape), tensors[name])


def test_padding_rows_of_the_embedding_are_noted(tensors: Tensors, write_model: WriteModel) -> None:
    source = open_source(str(write_model(tensors)))
    assert source.tokenizer.vocab_size == 257
    assert any("last 43 are padding" in note for note in source.notes)


def test_a_tokenizer_larger_than_the_embedding_is_refused(
    tensors: Tensors, write_model: WriteModel
) -> None:
    tensors[EMBEDDING] = tensors[EMBEDDING][:256]
    with pytest.raises(SourceError, match="ids up to 256 and the embedding 256 rows"):
        open_source(str(write_model(tensors, vocab_size=256)))


def test_a_vocab_size_that_the_weights_do_not_have_is_refused(
    tensors: Tensors, write_model: WriteModel
) -> None:
    with pytest.raises(TensorError, match=r"\[300, 32\].*\[320, 32\].*vocab_size"):
        open_source(str(write_model(tensors, vocab_size=320)))


def test_the_digest_covers_the_weights_and_not_their_folder(
    tensors: Tensors, write_model: WriteModel
) -> None:
    first = open_source(str(write_model(tensors)))
    content = (first.path / "model.safetensors").read_bytes()
    assert first.digest() == hashlib.sha256(content).hexdigest()
    second = open_source(str(write_model(tensors, folder="elsewhere", rope_theta=5e5)))
    assert second.digest() == first.digest()
    sharded = open_source(str(write_model(tensors, folder="sharded", shards=2)))
    parts = [hashlib.sha256(file.read_bytes()).digest() for file in sorted(sharded.weight_files)]
    assert sharded.digest() == hashlib.sha256(b"".join(parts)).hexdigest()
    assert sharded.digest() != first.digest()


def test_names_without_the_prefix_are_understood(tensors: Tensors, write_model: WriteModel) -> None:
    bare = {name.removeprefix("model."): array for name, array in tensors.items()}
    source = open_source(str(write_model(bare)))
    np.testing.assert_array_equal(source.tensors["token_embd.weight"].load(), tensors[EMBEDDING])


def test_a_tied_head_stored_twice_is_kept_once(tensors: Tensors, write_model: WriteModel) -> None:
    tensors["lm_head.weight"] = tensors[EMBEDDING].copy()
    source = open_source(str(write_model(tensors)))
    assert source.decoder.tied_head
    assert "output.weight" not in source.tensors


def test_a_tied_head_that_differs_is_kept_and_noted(
    tensors: Tensors, write_model: WriteModel
) -> None:
    tensors["lm_head.weight"] = tensors[EMBEDDING] + np.float32(1)
    source = open_source(str(write_model(tensors)))
    assert not source.decoder.tied_head
    assert source.config["tie_word_embeddings"] is False
    assert any("lm_head.weight" in note and "differ" in note for note in source.notes)
    np.testing.assert_array_equal(source.tensors["output.weight"].load(), tensors["lm_head.weight"])


def test_a_tied_embedding_stored_as_head_only(tensors: Tensors, write_model: WriteModel) -> None:
    expected = tensors[EMBEDDING]
    tensors["lm_head.weight"] = tensors.pop(EMBEDDING)
    source = open_source(str(write_model(tensors)))
    np.testing.assert_array_equal(source.tensors["token_embd.weight"].load(), expected)


def test_an_untied_head_is_required(tensors: Tensors, write_model: WriteModel) -> None:
    with pytest.raises(TensorError, match=r"missing: lm_head\.weight"):
        open_source(str(write_model(tensors, tie_word_embeddings=False)))


def test_missing_and_unknown_tensors_are_both_listed(
    tensors: Tensors, write_model: WriteModel
) -> None:
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(32, np.float32)
    with pytest.raises(TensorError) as caught:
        open_source(str(write_model(tensors)))
    assert "1 tensors are missing: model.layers.1.mlp.up_proj.weight" in str(caught.value)
    assert "model.layers.0.self_attn.q_proj.bias" in str(caught.value)


def test_tables_that_are_computed_anyway_are_ignored(
    tensors: Tensors, write_model: WriteModel
) -> None:
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)
    open_source(str(write_model(tensors)))


def test_a_wrong_shape_is_named(tensors: Tensors, write_model: WriteModel) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[name] = np.ascontiguousarray(tensors[name].T)
    with pytest.raises(TensorError, match=r"down_proj.*\[48, 32\].*\[32, 48\]"):
        open_source(str(write_model(tensors)))


def test_a_missing_config_key_is_named(tensors: Tensors, write_model: WriteModel) -> None:
    with pytest.raises(UnsupportedModel, match="intermediate_size"):
        open_source(str(write_model(tensors, intermediate_size=None)))


def test_an_unknown_key_is_refused_and_can_be_vouched_for(
    tensors: Tensors, write_model: WriteModel
) -> None:
    path = str(write_model(tensors, attention_twist=2))
    with pytest.raises(UnsupportedModel, match="attention_twist"):
        open_source(path)
    assert open_source(path, ignore_config_keys=("attention_twist",)).tensors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "rwkv"}, "rwkv"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized already.*gptq"),
    ],
)
def test_what_is_not_understood_is_refused(
    changes: dict[str, Any], message: str, tensors: Tensors, write_model: WriteModel
) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        open_source(str(write_model(tensors, **changes)))


def test_tensors_of_whole_numbers_are_refused(tensors: Tensors, write_model: WriteModel) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = np.zeros((48, 32), np.int32)
    with pytest.raises(TensorError, match=r"1 tensors as i32.*up_proj"):
        open_source(str(write_model(tensors)))


@pytest.mark.parametrize(
    "shard",
    [
        "../model.safetensors",
        "/etc/model.safetensors",
        "sub/model.safetensors",
        "..\\model.safetensors",
        "C:model.safetensors",
        "model.safetensors\0.safetensors",
        "..",
        "",
        "model.bin",
        7,
    ],
)
def test_a_shard_outside_the_folder_is_refused(
    shard: Any, tensors: Tensors, write_model: WriteModel
) -> None:
    path = write_model(tensors)
    (path.parent / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes())
    (path / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, shard)}))
    with pytest.raises(SourceError, match="unsafe or damaged"):
        open_source(str(path))


def test_a_link_out_of_the_folder_is_followed(tensors: Tensors, write_model: WriteModel) -> None:
    """The Hub's cache is made of them."""
    path = write_model(tensors)
    blob = path.parent / "blob"
    (path / "model.safetensors").rename(blob)
    try:
        (path / "model.safetensors").symlink_to(blob)
    except OSError as error:
        pytest.skip(f"this system makes no symbolic links: {error}")
    assert open_source(str(path)).tensors


def test_a_missing_shard_is_named(tensors: Tensors, write_model: WriteModel) -> None:
    path = write_model(tensors, shards=3)
    (path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(SourceError, match=r"lacks 1 of its 3 shards: model-00002-of-00003"):
        open_source(str(path))


def test_a_truncated_shard_is_named(tensors: Tensors, write_model: WriteModel) -> None:
    path = write_model(tensors, shards=3)
    shard = path / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(SourceError, match=r"model-00002-of-00003.safetensors is cut short"):
        open_source(str(path))


def test_an_index_that_names_a_tensor_nobody_has(tensors: Tensors, write_model: WriteModel) -> None:
    path = write_model(tensors, shards=2)
    index = json.loads((path / INDEX).read_text())
    index["weight_map"]["model.ghost.weight"] = "model-00001-of-00002.safetensors"
    (path / INDEX).write_text(json.dumps(index))
    with pytest.raises(SourceError, match=r"do not hold: model\.ghost\.weight"):
        open_source(str(path))


def test_a_tensor_that_the_index_hides_is_left_over(
    tensors: Tensors, write_model: WriteModel
) -> None:
    tensors["model.secret.weight"] = np.zeros(4, np.float32)
    path = write_model(tensors, shards=2)
    index = json.loads((path / INDEX).read_text())
    del index["weight_map"]["model.secret.weight"]
    (path / INDEX).write_text(json.dumps(index))
    with pytest.raises(TensorError, match=r"no place.*model\.secret\.weight"):
        open_source(str(path))


@pytest.mark.parametrize("index", ['{"metadata": {}}', "[]", "{", '{"weight_map": {}}'])
def test_a_damaged_index_is_refused(index: str, tensors: Tensors, write_model: WriteModel) -> None:
    path = write_model(tensors)
    (path / INDEX).write_text(index)
    with pytest.raises(SourceError, match=r"index\.json"):
        open_source(str(path))


@pytest.mark.parametrize("config", ["[]", "{", "\xff", ""])
def test_a_damaged_config_is_refused(
    config: str, tensors: Tensors, write_model: WriteModel
) -> None:
    path = write_model(tensors)
    (path / "config.json").write_text(config, encoding="latin-1")
    with pytest.raises(SourceError, match=r"config\.json"):
        open_source(str(path))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_pickles_are_refused_with_the_way_out(
    name: str, tensors: Tensors, write_model: WriteModel
) -> None:
    path = write_model(tensors)
    (path / "model.safetensors").unlink()
    (path / name).write_bytes(b"\x80\x02}.")
    for given in (path, path / name):
        with pytest.raises(SourceError, match=r"run any code.*save_pretrained"):
            open_source(str(given))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "has no config.json"),
        (["adapter_config.json", "adapter_model.safetensors"], "an adapter, not a model"),
        (["model.Q4_0.gguf"], "give one by its name"),
        (["config.json"], "model_type"),
        (["pytorch_model.bin"], "run any code"),
    ],
)
def test_folders_that_are_no_model_say_what_they_are(
    files: list[str], message: str, tmp_path: Path
) -> None:
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(EdgeError, match=message):
        open_source(str(tmp_path))


def test_several_files_without_an_index_are_refused(
    tensors: Tensors, write_model: WriteModel
) -> None:
    path = write_model(tensors, shards=2)
    (path / INDEX).unlink()
    with pytest.raises(SourceError, match="2 safetensors files"):
        open_source(str(path))


def test_a_single_file_of_a_folder_names_the_folder(
    tensors: Tensors, write_model: WriteModel
) -> None:
    path = write_model(tensors)
    with pytest.raises(SourceError, match="give its folder"):
        open_source(str(path / "model.safetensors"))


def test_what_is_neither_path_nor_hub_id_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no file or folder"):
        open_source(str(tmp_path / "nothing" / "here"))


def test_a_home_that_nobody_has_is_said() -> None:
    with pytest.raises(SourceError, match=r"~nobody-of-that-name/model: .*whole path"):
        open_source("~nobody-of-that-name/model")
