"""Folders of encoders and of sentence-transformers: what is read, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgellm.architectures import family_of
from edgellm.architectures.config import Config
from edgellm.architectures.encoder import ENCODER_HARMLESS, ENCODER_NEUTRAL, Encoder
from edgellm.architectures.encoders import ENCODERS, REFUSED_ENCODERS, SEQ2SEQ, encoder_family_of
from edgellm.encoders.finding import find_encoder
from edgellm.encoders.planning import NOT_FOR_ENCODERS, plan_encoder
from edgellm.errors import (
    EdgeError,
    SourceError,
    TensorError,
    UnsupportedModel,
    UnsupportedTarget,
    UnsupportedTokenizer,
    UsageError,
)
from edgellm.recipe import Recipe
from edgellm.source.encoder_folder import open_encoder_folder
from edgellm.source.encoder_model import EncoderSource
from edgellm.source.sentence_pipeline import read_pipeline

BERT: dict[str, Any] = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "vocab_size": 12,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 10,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
    "pad_token_id": 0,
}
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c", "##d", "é", "e", "!")

MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
]
NORMALIZE = {"idx": 2, "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}
MEAN = {"word_embedding_dimension": 8, "pooling_mode_mean_tokens": True}


def described(config: dict[str, Any], *, pooler: bool = False) -> Encoder:
    family = encoder_family_of(config)
    reader = Config(config, harmless=ENCODER_HARMLESS, neutral=ENCODER_NEUTRAL)
    return family.describe(reader, family.task_of(config["architectures"][0], "x"), pooler=pooler)


def write_folder(
    folder: Path,
    config: dict[str, Any] = BERT,
    *,
    prefix: str = "",
    drop: tuple[str, ...] = (),
    rename: tuple[str, str] = ("", ""),
    extra: dict[str, tuple[int, ...]] | None = None,
) -> Path:
    """An encoder of random weights with a ``vocab.txt``; ``extra`` tensors by shape."""
    folder.mkdir(parents=True, exist_ok=True)
    family = encoder_family_of(config)
    encoder = described(config, pooler=config["architectures"][0].endswith("Model"))
    draw = np.random.default_rng(0)
    tensors = {
        prefix + row.source.removeprefix(family.base_prefix): draw.standard_normal(row.shape)
        for row in family.tensors(encoder)
    }
    for name, shape in (extra or {}).items():
        tensors[name] = draw.standard_normal(shape)
    stored = {
        name.replace(*rename) if rename[0] else name: values.astype(np.float32)
        for name, values in tensors.items()
        if name not in drop
    }
    write_safetensors(folder / "model.safetensors", stored)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    return folder


def write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    header, data = {}, b""
    for name, values in tensors.items():
        content = values.tobytes()
        header[name] = {
            "dtype": "F32",
            "shape": list(values.shape),
            "data_offsets": [len(data), len(data) + len(content)],
        }
        data += content
    encoded = json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)


def write_pipeline(
    folder: Path, modules: Any = (*MODULES, NORMALIZE), pooling: Any = MEAN, **files: Any
) -> Path:
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


# --- families


@pytest.mark.parametrize("name", [*ENCODERS, *SEQ2SEQ, *REFUSED_ENCODERS])
def test_models_that_generate_no_text_are_refused_where_text_is_wanted(name: str) -> None:
    with pytest.raises(UnsupportedModel, match=name):
        family_of({"model_type": name})


def test_seq2seq_is_refused_with_what_is_possible() -> None:
    with pytest.raises(UnsupportedModel, match=r"seq2seq.*t5, mt5, bart"):
        family_of({"model_type": "pegasus"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "mish"}, "hidden_act is 'mish'"),
        ({"num_attention_heads": 3}, "divisor of hidden_size"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"is_decoder": True}, "is_decoder"),
        ({"add_cross_attention": True}, "add_cross_attention"),
        ({"attention_twist": 2}, "attention_twist = 2"),
        ({"layer_norm_eps": None}, "layer_norm_eps is missing"),
        ({"architectures": ["BertForQuestionAnswering"]}, "BertForQuestionAnswering.*converts"),
        ({"architectures": ["RobertaModel"]}, "RobertaModel"),
    ],
)
def test_what_is_not_understood_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        described(BERT | change)


def test_the_first_bert_configs_are_read() -> None:
    """multilingual BERT states a pooler that no class of transformers has."""
    described(BERT | {"directionality": "bidi", "pooler_type": "first_token_transform"})


def test_robertas_positions_begin_behind_the_padding() -> None:
    roberta = BERT | {
        "architectures": ["RobertaModel"],
        "model_type": "roberta",
        "pad_token_id": 1,
        "max_position_embeddings": 514,
    }
    assert described(roberta).context_length == 512
    with pytest.raises(UnsupportedModel, match="max_position_embeddings"):
        described(roberta | {"max_position_embeddings": 2})


@pytest.mark.parametrize(
    ("change", "labels", "scores"),
    [
        ({}, ("LABEL_0", "LABEL_1"), "softmax"),
        ({"id2label": {"1": "bad", "0": "good"}}, ("good", "bad"), "softmax"),
        ({"id2label": {"0": "score"}}, ("score",), "sigmoid"),
        ({"num_labels": 1, "problem_type": "regression"}, ("LABEL_0",), "none"),
        (
            {"num_labels": 3, "problem_type": "multi_label_classification"},
            ("LABEL_0", "LABEL_1", "LABEL_2"),
            "sigmoid",
        ),
        (
            {
                "id2label": {"0": "LABEL_0"},
                "sentence_transformers": {
                    "activation_fn": "torch.nn.modules.linear.Identity",
                    "version": "5.0.0",
                },
            },
            ("LABEL_0",),
            "none",
        ),
    ],
)
def test_labels_and_scores(change: dict[str, Any], labels: tuple[str, ...], scores: str) -> None:
    head = described(BERT | {"architectures": ["BertForSequenceClassification"]} | change).head
    assert (head.labels, head.scores) == (labels, scores)


def test_labels_with_a_gap_are_refused() -> None:
    config = BERT | {
        "architectures": ["BertForTokenClassification"],
        "id2label": {"0": "a", "2": "b"},
    }
    with pytest.raises(UnsupportedModel, match="id2label"):
        described(config)


# --- checkpoints


def opened(folder: Path) -> EncoderSource:
    source = find_encoder(Recipe(source=str(folder)))
    assert source is not None
    return source


@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"prefix": "bert."},
        {"rename": ("LayerNorm.weight", "LayerNorm.gamma")},
        {"rename": ("LayerNorm.bias", "LayerNorm.beta")},
        {"extra": {"embeddings.position_ids": (1, 10)}},
    ],
    ids=str,
)
def test_checkpoints_are_read_however_they_were_saved(layout: Any, tmp_path: Path) -> None:
    plain = opened(write_folder(tmp_path / "plain"))
    source = opened(write_folder(tmp_path / "other", **layout))
    assert source.tensors.keys() == plain.tensors.keys()
    for role, ref in source.tensors.items():
        np.testing.assert_array_equal(ref.load(), plain.tensors[role].load())


def test_a_checkpoint_without_a_pooler_has_no_pooler(tmp_path: Path) -> None:
    drop = ("pooler.dense.weight", "pooler.dense.bias")
    assert opened(write_folder(tmp_path, drop=drop)).encoder.head.dense is None


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path, drop=("embeddings.LayerNorm.weight",))
    with pytest.raises(TensorError, match=r"embeddings\.LayerNorm\.weight"):
        opened(tmp_path)


def test_a_foreign_tensor_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path, extra={"encoder.layer.1.gate.weight": (8, 8)})
    with pytest.raises(TensorError, match=r"encoder\.layer\.1\.gate\.weight"):
        opened(tmp_path)


def test_other_heads_are_left_out_and_named(tmp_path: Path) -> None:
    write_folder(tmp_path, prefix="bert.", extra={"cls.seq_relationship.weight": (2, 8)})
    assert any("cls.seq_relationship.weight" in note for note in opened(tmp_path).notes)


def test_a_head_without_a_class_is_not_guessed(tmp_path: Path) -> None:
    write_folder(tmp_path, prefix="bert.", extra={"classifier.weight": (2, 8)})
    config = {key: value for key, value in BERT.items() if key != "architectures"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match=r"classifier\.weight.*ForSequenceClassification"):
        opened(tmp_path)


def test_a_tied_head_that_is_stored_too_is_one_table(tmp_path: Path) -> None:
    config = BERT | {"architectures": ["BertForMaskedLM"]}
    write_folder(tmp_path, config)
    source = opened(tmp_path)
    assert source.encoder.head.tied
    assert "output.weight" not in source.tensors
    table, name = source.tensors["token_embd.weight"].load(), "cls.predictions.decoder.weight"
    stored = {ref.name: ref.load().reshape(ref.shape) for ref in source.tensors.values()}
    write_safetensors(tmp_path / "model.safetensors", stored | {name: table})
    assert opened(tmp_path).encoder.head.tied
    write_safetensors(tmp_path / "model.safetensors", stored | {name: table + 1})
    apart = opened(tmp_path)
    assert not apart.encoder.head.tied
    np.testing.assert_array_equal(apart.tensors["output.weight"].load(), table + 1)
    assert any("differ" in note for note in apart.notes)


def test_what_is_no_encoder_is_left_to_others(tmp_path: Path) -> None:
    assert find_encoder(Recipe(source=str(tmp_path / "nothing"))) is None
    assert find_encoder(Recipe(source=str(tmp_path))) is None
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert find_encoder(Recipe(source=str(tmp_path))) is None


# --- vocab.txt


def test_wordpiece_is_built_from_its_vocabulary(tmp_path: Path) -> None:
    tokenizer = opened(write_folder(tmp_path)).tokenizer
    assert tokenizer.encode("A cd É!", add_special=True) == [2, 5, 7, 8, 10, 11, 3]
    assert tokenizer.encode("[MASK] z") == [4, 1]
    assert tokenizer.settings.special_ids["pad"] == 0
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert opened(tmp_path).tokenizer.encode("a A é") == [5, 1, 9]


@pytest.mark.parametrize(
    ("config", "words", "kind", "message"),
    [
        ({"tokenizer_class": "BertJapaneseTokenizer"}, WORDS, UnsupportedTokenizer, "Japanese"),
        ({}, WORDS[:4], SourceError, r"\[MASK\]"),
        ({"mask_token": {"content": "<m>"}}, WORDS, SourceError, "<m>"),
    ],
)
def test_other_vocabularies_are_refused(
    config: Any, words: tuple[str, ...], kind: type[EdgeError], message: str, tmp_path: Path
) -> None:
    write_folder(tmp_path)
    (tmp_path / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(kind, match=message):
        opened(tmp_path)


def test_a_text_needs_room_for_a_token_of_its_own(tmp_path: Path) -> None:
    tokenizer = opened(write_folder(tmp_path)).tokenizer
    assert tokenizer.encode_whole("a b c", max_tokens=3).ids == (2, 5, 3)
    with pytest.raises(UsageError, match="at least 3"):
        tokenizer.encode_whole("a b c", max_tokens=2)


# --- sentence-transformers


def test_a_pipeline_is_read(tmp_path: Path) -> None:
    write_pipeline(
        write_folder(tmp_path),
        sentence_bert_config={"max_seq_length": 6, "do_lower_case": True},
        config_sentence_transformers={
            "__version__": {},
            "prompts": {"query": "Q: ", "document": ""},
            "default_prompt_name": "query",
            "similarity_fn_name": "cosine",
        },
    )
    source = opened(tmp_path)
    assert source.pipeline is not None
    assert source.pipeline.pooling == ("mean",)
    assert source.pipeline.normalize
    assert source.pipeline.lowercase
    assert source.pipeline.prompts == {"query": "Q: "}
    assert source.pipeline.default_prompt == "query"
    assert source.max_tokens == 6
    assert source.encoder.head.dense is None  # the pooler has no part in it
    assert {"modules.json", "1_Pooling/config.json"} <= source.files.keys()


def test_without_a_pipeline_the_mean_is_taken_and_said(tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 7}')
    source = opened(tmp_path)
    assert source.pipeline is not None
    assert source.pipeline.pooling == ("mean",)
    assert any("mean" in note for note in source.notes)
    assert source.max_tokens == 7


def test_several_vectors_stand_in_sentence_transformers_order(tmp_path: Path) -> None:
    flags = ("mean_sqrt_len_tokens", "mean_tokens", "max_tokens", "cls_token")
    write_pipeline(tmp_path, pooling={f"pooling_mode_{flag}": True for flag in flags})
    found = read_pipeline(tmp_path)
    assert found is not None
    assert found.pipeline.pooling == ("cls", "max", "mean", "mean_sqrt_len")


def test_a_pipeline_is_read_as_newer_versions_save_it(tmp_path: Path) -> None:
    """As sentence-transformers 6.2 wrote all-MiniLM-L6-v2 again, with two vectors."""
    new = "sentence_transformers"
    modules = [
        MODULES[0] | {"type": f"{new}.base.modules.transformer.Transformer"},
        MODULES[1] | {"type": f"{new}.sentence_transformer.modules.pooling.Pooling"},
        NORMALIZE | {"type": f"{new}.base.modules.normalize.Normalize"},
    ]
    write_pipeline(
        write_folder(tmp_path),
        modules,
        {
            "embedding_dimension": 8,
            "pooling_mode": ["mean_sqrt_len_tokens", "cls"],
            "include_prompt": True,
        },
        sentence_bert_config={
            "transformer_task": "feature-extraction",
            "modality_config": {
                "text": {"method": "forward", "method_output_name": "last_hidden_state"}
            },
            "module_output_name": "token_embeddings",
        },
        config_sentence_transformers={
            "__version__": {"pytorch": "2.13.0"},
            "default_prompt_name": None,
            "model_type": "SentenceTransformer",
            "prompts": {"document": "", "query": ""},
            "similarity_fn_name": "cosine",
        },
        tokenizer_config={"model_max_length": 9},
    )
    (tmp_path / "2_Normalize").mkdir()
    normalize = tmp_path / "2_Normalize" / "config.json"
    normalize.write_text('{"module_input_name": "sentence_embedding"}')
    source = opened(tmp_path)
    assert source.pipeline is not None
    assert source.pipeline.pooling == ("mean_sqrt_len", "cls")
    assert source.pipeline.normalize
    assert source.pipeline.prompts == {}
    assert source.max_tokens == 9
    normalize.write_text('{"module_input_name": "token_embeddings"}')
    with pytest.raises(UnsupportedModel, match="module_input_name"):
        opened(tmp_path)


def test_a_transformer_in_a_folder_of_its_own_is_found(tmp_path: Path) -> None:
    write_folder(tmp_path / "0_Transformer")
    write_pipeline(tmp_path, [MODULES[0] | {"path": "0_Transformer"}, MODULES[1]])
    assert opened(tmp_path).encoder.hidden_size == 8


DENSE = {"idx": 2, "path": "2_Dense", "type": "sentence_transformers.models.Dense"}


@pytest.mark.parametrize(
    ("modules", "pooling", "files", "message"),
    [
        ([*MODULES, NORMALIZE, DENSE], MEAN, {}, "Dense"),
        ([*MODULES, DENSE | {"type": "sentence_transformers.models.LSTM"}], MEAN, {}, "LSTM"),
        ([*MODULES[::-1]], MEAN, {}, "Transformer"),
        (MODULES, {"pooling_mode_lasttoken": True}, {}, "pooling_mode_lasttoken"),
        (MODULES, {"pooling_mode": "median"}, {}, "pooling_mode is 'median'"),
        (MODULES, {"pooling_mode_mean_tokens": False}, {}, "no way of pooling"),
        (MODULES, MEAN | {"pooling_twist": 1}, {}, "pooling_twist"),
        (MODULES, MEAN, {"sentence_bert_config": {"twist": 1}}, "twist"),
        (MODULES, MEAN, {"config_sentence_transformers": {"twist": 1}}, "twist"),
        (MODULES, MEAN, {"config_sentence_transformers": {"truncate_dim": 4}}, "truncate_dim"),
        (MODULES, MEAN, {"sentence_bert_config": {"query_length": 4}}, "query_length"),
    ],
)
def test_other_pipelines_are_refused_by_name(
    modules: Any, pooling: Any, files: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write_pipeline(write_folder(tmp_path), modules, pooling, **files)
    with pytest.raises(UnsupportedModel, match=message):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        (None, SourceError, "2_Dense lacks"),
        ({"in_features": 7}, SourceError, "vectors of 7 values"),
        ({"activation_function": "mine.Own"}, UnsupportedModel, "mine.Own"),
        ({"use_residual": True}, UnsupportedModel, "use_residual"),
        ({"out_features": 4}, TensorError, "linear.weight"),
    ],
)
def test_a_dense_that_does_not_fit_is_refused(
    settings: dict[str, Any] | None, kind: type[EdgeError], message: str, tmp_path: Path
) -> None:
    write_pipeline(write_folder(tmp_path), [*MODULES, DENSE])
    if settings is not None:
        (tmp_path / "2_Dense").mkdir()
        usual = {"in_features": 8, "out_features": 3, "bias": False}
        usual["activation_function"] = "torch.nn.modules.activation.Tanh"
        (tmp_path / "2_Dense" / "config.json").write_text(json.dumps(usual | settings))
        shape = (3, settings.get("in_features", 8))
        weights = {"linear.weight": np.ones(shape, np.float32)}
        write_safetensors(tmp_path / "2_Dense" / "model.safetensors", weights)
    with pytest.raises(kind, match=message):
        opened(tmp_path)


@pytest.mark.parametrize("path", ["../elsewhere", "/elsewhere"])
def test_a_module_outside_its_folder_is_refused(path: str, tmp_path: Path) -> None:
    write_pipeline(write_folder(tmp_path), [MODULES[0] | {"path": path}, MODULES[1]])
    with pytest.raises(SourceError, match="outside"):
        opened(tmp_path)


# --- plans

VALUES: dict[str, Any] = {
    "layout": "awq", "fit": "9MB", "bits": 4.0, "kv_cache": "int8", "compute": "f16",
    "rope_scaling": "yarn:4", "adapters": ("x",), "merge_base": "full", "check_text": "x",
    "check_tokens": 99, "max_kld": 0.1, "max_ppl_increase": 1.0, "calibration": "x",
    "calibration_tokens": 9, "calibrate_on": "float", "imatrix": "x", "seed": 1, "device": "cpu",
    "tune": 3,
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_FOR_ENCODERS)
def test_options_about_text_generation_are_refused(name: str, tmp_path: Path) -> None:
    source = open_encoder_folder(write_folder(tmp_path))
    recipe = Recipe(source=str(tmp_path), **{name: VALUES[name]})
    with pytest.raises(UsageError, match=name.replace("_", "-")):
        plan_encoder(recipe, source)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": "gguf"}, "--format gguf.*onnx"),
        ({"quant": "gptq:int8"}, "--quant gptq:int8.*--quant int8"),
        ({"quant": "awq"}, "--quant awq"),
        ({"quant": "q4_k_m"}, "--quant q4_k_m.*int4-g32"),
        ({"quant": "int8"}, "int8 has groups of 32 .*f32"),
    ],
)
def test_what_an_encoder_cannot_be_is_refused(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    source = open_encoder_folder(write_folder(tmp_path))
    with pytest.raises(UnsupportedTarget, match=message):
        plan_encoder(Recipe(source=str(tmp_path), **fields), source)


def test_a_head_that_is_not_there_has_no_grid(tmp_path: Path) -> None:
    source = open_encoder_folder(write_folder(tmp_path))
    with pytest.raises(UsageError, match="--head f16"):
        plan_encoder(Recipe(source=str(tmp_path), quant="f32", head="f16"), source)


def test_tensors_may_have_grids_of_their_own(tmp_path: Path) -> None:
    source = open_encoder_folder(write_folder(tmp_path))
    grids = {"blk.0.attn_*": "int8-dynamic", "token_embd.weight": "f16"}
    plan = plan_encoder(Recipe(source=str(tmp_path), quant="f32", tensor_grids=grids), source)
    found = {tensor.role: tensor.grid.name for tensor in plan.layout.tensors}
    assert found["blk.0.attn_q.weight"] == found["blk.0.attn_output.weight"] == "int8-dynamic"
    assert found["blk.0.ffn_up.weight"] == "f32"
    assert found["token_embd.weight"] == "f16"
    assert plan.layout.context_length == 10


def test_large_models_are_compared_on_fewer_texts() -> None:
    from edgellm.encoders.quality import affordable

    lengths = [100] * 39
    assert affordable(lengths, 22_000_000) == 39
    assert affordable(lengths, 335_000_000) == 8
    assert affordable(lengths, 10_000_000_000) == 6
