"""T5, BART, mBART and Marian as ONNX in onnxruntime give transformers' logits and greedy answers.

Measured over several seeds: BART's logits, of a spread of 3 to 4, come within 7e-6 of its, those of
the first T5, of a spread of 0.5, within 3e-5. Scores that T5 does not scale make random weights
amplify rounding: with a gated feed-forward transformers' float32 is up to 2.7e-4 from its own
float64, and we are up to 3.6e-4 from its float32.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

import tiny_encoders  # noqa: E402
import tiny_models  # noqa: E402

import edgellm  # noqa: E402
from edgellm.architectures.config import Config  # noqa: E402
from edgellm.architectures.encoders import SEQ2SEQ, seq2seq_family_of  # noqa: E402
from edgellm.architectures.marian import sinusoids  # noqa: E402
from edgellm.architectures.seq2seq import (  # noqa: E402
    SEQ2SEQ_HARMLESS,
    SEQ2SEQ_NEUTRAL,
    Relative,
)
from edgellm.errors import (  # noqa: E402
    EdgeError,
    TensorError,
    UnsupportedModel,
    UnsupportedTarget,
    UsageError,
)
from edgellm.export.seq2seq_graph import buckets_of  # noqa: E402
from edgellm.sampling import SamplingOptions  # noqa: E402
from edgellm.seq2seq.model import Seq2SeqModel, open_seq2seq  # noqa: E402

# Of MarianTokenizer, which never calls it.
pytestmark = pytest.mark.filterwarnings("ignore:Recommended. pip install sacremoses")

TinyEncoder = Callable[[str], Path]
Command = Callable[..., Any]

TOLERANCE = 6e-4
CLOSE = {"t5": 1e-4, "bart": 5e-5, "bart-scaled": 5e-5, "marian": 5e-5, "mbart": 1e-4}
"""Where less is enough."""

TEXTS = [
    "The quick brown fox.",
    "A tokenizer splits a text into tokens, and a model turns the tokens into other tokens.",
    "12 apples",
]

STEPS: list[tuple[int, ...]] = [(30,), (1,) * 30, (7, 1, 1, 20, 1)]
"""Tokens of an answer at a time: all at once, one by one, chunks with a past."""


def converted(folder: Path, out: Path, **options: Any) -> Seq2SeqModel:
    edgellm.convert(folder, out, check=False, **options)
    return open_seq2seq(out, threads=1)


def reference_logits(model: Any, text: list[int], answer: list[int]) -> np.ndarray:
    import torch

    with torch.no_grad():
        found = model(
            input_ids=torch.tensor([text]), decoder_input_ids=torch.tensor([answer])
        ).logits
    logits: np.ndarray = found[0].numpy()
    return logits


@pytest.mark.parametrize("name", tiny_encoders.SEQ2SEQ)
def test_logits_equal_transformers(name: str, tiny_encoder: TinyEncoder, tmp_path: Path) -> None:
    reference = tiny_encoders.load(tiny_encoder(name))
    with converted(tiny_encoder(name), tmp_path / "out", quant="f32") as model:
        for length, steps in zip((1, 50, 33), STEPS, strict=True):
            text = tiny_encoders.some_ids(length)
            answer = tiny_encoders.some_ids(30, seed=1)
            wanted = reference_logits(reference, text, answer)
            model.graphs.read(text)
            got, done = [], 0
            for size in steps:
                got.append(model.graphs.step(answer[done : done + size]))
                done += size
            close = CLOSE.get(name, TOLERANCE)
            np.testing.assert_allclose(np.concatenate(got), wanted, rtol=0, atol=close)


@pytest.mark.parametrize("name", tiny_encoders.SEQ2SEQ)
def test_greedy_answers_equal_transformers(
    name: str, tiny_encoder: TinyEncoder, tmp_path: Path
) -> None:
    import torch

    folder = tiny_encoder(name)
    reference = tiny_encoders.load(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    answers = set()
    with converted(folder, tmp_path / "out", quant="f32") as model:
        written = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
        for text in TEXTS:
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            assert written(text)["input_ids"] == ids[0].tolist()
            wanted = reference.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=24,
                do_sample=False,
                num_beams=1,
            )[0].tolist()
            found = model.generate(text, max_tokens=24)
            assert [model.facts.start_token_id, *found.token_ids] == wanted
            assert found.prompt_tokens == ids.shape[1]
            assert found.text == tokenizer.decode(found.token_ids, skip_special_tokens=True)
            answers.add(found.token_ids)
    assert len(answers) > 1, "the answers do not depend on the text"


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_batches_are_padded_without_effect(
    name: str, tiny_encoder: TinyEncoder, tmp_path: Path
) -> None:
    """The graphs take several texts at once, which our runtime does not: others may."""
    import onnxruntime
    import torch

    reference = tiny_encoders.load(tiny_encoder(name))
    edgellm.convert(tiny_encoder(name), tmp_path / "out", quant="f32", check=False)
    encoder, decoder = (
        onnxruntime.InferenceSession(tmp_path / "out" / f"{side}_model.onnx")
        for side in ("encoder", "decoder")
    )
    text = tiny_encoders.some_batch((40, 3, 17), padding=1, vocab_size=301, types=1)
    ids, mask = text["input_ids"], text["attention_mask"]
    answers = np.asarray([tiny_encoders.some_ids(9, seed) for seed in range(3)])
    with torch.no_grad():
        wanted = reference(
            input_ids=torch.from_numpy(ids),
            attention_mask=torch.from_numpy(mask),
            decoder_input_ids=torch.from_numpy(answers),
        ).logits.numpy()
    names = [each.name for each in encoder.get_outputs()]
    crossed = encoder.run(names, {"input_ids": ids, "attention_mask": mask})
    given = dict(zip(names, crossed, strict=True))
    given |= {
        each.name: np.empty((3, each.shape[1], 0, each.shape[3]), np.float32)
        for each in decoder.get_inputs()
        if each.name.startswith("past.")
    }
    (got,) = decoder.run(
        ["logits"], {"input_ids": answers, "encoder_attention_mask": mask, **given}
    )
    np.testing.assert_allclose(got, wanted, rtol=0, atol=CLOSE[name])


@pytest.mark.parametrize("both_sides", [False, True])
@pytest.mark.parametrize(("buckets", "longest"), [(32, 128), (8, 20), (16, 100), (64, 512)])
def test_buckets_are_transformers(buckets: int, longest: int, both_sides: bool) -> None:
    import torch
    from transformers.models.t5.modeling_t5 import T5Attention

    distances = torch.arange(-longest, longest + 1)
    wanted = T5Attention._relative_position_bucket(
        distances, bidirectional=both_sides, num_buckets=buckets, max_distance=longest
    )
    got = buckets_of(Relative(buckets, longest), both_sides=both_sides)
    np.testing.assert_array_equal(got, wanted.numpy())


MISREADINGS = {
    "t5": [("relative_attention_max_distance", 40), ("scale_decoder_outputs", False)],
    "t5-gated": [("feed_forward_proj", "gated-relu"), ("scale_decoder_outputs", True)],
    "bart": [("scale_embedding", True), ("activation_function", "relu")],
    "marian": [("scale_embedding", False), ("activation_function", "relu")],
    "mbart": [("scale_embedding", False)],
}


@pytest.mark.parametrize("name", MISREADINGS)
def test_a_misread_config_would_show(name: str, tiny_encoder: TinyEncoder, tmp_path: Path) -> None:
    """The test against transformers sees each of these mistakes."""
    text, answer = tiny_encoders.some_ids(50), tiny_encoders.some_ids(30)

    def logits(folder: Path, out: Path) -> np.ndarray:
        with converted(folder, out, quant="f32") as model:
            model.graphs.read(text)
            return model.graphs.step(answer)

    right = logits(tiny_encoder(name), tmp_path / "right")
    for number, (key, value) in enumerate(MISREADINGS[name]):
        folder = tiny_models.copy_of(tiny_encoder(name), tmp_path / f"{number}")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {key: value}))
        wrong = logits(folder, tmp_path / f"out-{number}")
        assert np.abs(right - wrong).max() > 3 * TOLERANCE, (key, value)


# --- rounding


# T5 does not scale its scores, so that random weights look at single tokens and err by a lot.
ROUNDED = [
    ("t5-64", "int8", 0.01, 0.3),
    ("t5-64", "int4-g32", 1.0, 1.5),
    ("t5-64", "f16", 1e-5, 0.02),
    ("marian-64", "int8", 0.01, 0.1),
    ("mbart-64", "int8", 0.01, 0.1),
]
"""The most KL, and the most of the logits' spread that one step may be off."""


@pytest.mark.parametrize(("name", "quant", "most", "most_off"), ROUNDED)
def test_the_manifest_says_how_far_rounding_moved_the_answers(
    name: str, quant: str, most: float, most_off: float, tiny_encoder: TinyEncoder, tmp_path: Path
) -> None:
    artifact = edgellm.convert(tiny_encoder(name), tmp_path / "out", quant=quant)
    assert artifact.manifest is not None
    found = artifact.manifest.measured["quality"]
    assert found["texts"] == 39
    assert 0 < found["kld_mean"] < most
    # The same by transformers, for the source's own likeliest tokens after the first one.
    reference = tiny_encoders.load(tiny_encoder(name))
    with open_seq2seq(tmp_path / "out", threads=1) as model:
        text = tiny_encoders.some_ids(40)
        model.graphs.read(text)
        got = model.graphs.step([0])[0]
    wanted = reference_logits(reference, text, [0])[0]
    assert (got - wanted).std() / wanted.std() < most_off


def test_weights_are_stored_once(tiny_encoder: TinyEncoder, tmp_path: Path) -> None:
    artifact = edgellm.convert(tiny_encoder("t5"), tmp_path / "out", quant="f32", check=False)
    assert artifact.manifest is not None
    stored = sum(tensor.nbytes for tensor in artifact.manifest.artifact.tensors)
    reference = tiny_encoders.load(tiny_encoder("t5"))
    assert stored == 4 * sum(parameter.numel() for parameter in reference.parameters())


# --- what is read and what is refused


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_every_key_that_transformers_saves_is_known(name: str, tmp_path: Path) -> None:
    family = seq2seq_family_of({"model_type": name})
    assert family.model_type == name
    real = getattr(transformers, family.architecture)
    assert real.config_class.model_type == name
    config = transformers.AutoConfig.for_model(name)
    config.architectures = [family.architecture]
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    for values in (saved, config.to_dict() | {"torch_dtype": "float32"}):
        family.describe(Config(values, harmless=SEQ2SEQ_HARMLESS, neutral=SEQ2SEQ_NEUTRAL))


OLD_KEYS = {
    "_num_labels": 3,
    "activation_dropout": 0.0,
    "add_bias_logits": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "classif_dropout": 0.0,
    "classifier_dropout": 0.0,
    "decoder_layerdrop": 0.0,
    "dropout": 0.1,
    "encoder_layerdrop": 0.0,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"},
    "init_std": 0.02,
    "is_encoder_decoder": True,
    "label2id": {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2},
    "num_beams": 6,
    "num_hidden_layers": 6,
    "scale_embedding": True,
    "use_cache": True,
}
"""What configs of BART's kin have that were written when Marian's and mBART's were published."""


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        (
            "marian",
            {
                "activation_function": "swish",
                "add_final_layer_norm": False,
                "bad_words_ids": [[58100]],
                "decoder_start_token_id": 58100,
                "eos_token_id": 0,
                "max_length": 512,
                "max_position_embeddings": 512,
                "normalize_before": False,
                "normalize_embedding": False,
                "pad_token_id": 58100,
                "static_position_embeddings": True,
                "vocab_size": 58101,
            },
        ),
        (
            "mbart",
            {
                "activation_function": "relu",
                "add_final_layer_norm": True,
                "decoder_start_token_id": 2,
                "early_stopping": True,
                "eos_token_id": 2,
                "forced_eos_token_id": 2,
                "gradient_checkpointing": False,
                "max_length": 200,
                "max_position_embeddings": 1024,
                "normalize_before": True,
                "normalize_embedding": True,
                "output_past": True,
                "pad_token_id": 1,
                "static_position_embeddings": False,
                "tokenizer_class": "MBart50Tokenizer",
                "vocab_size": 250054,
            },
        ),
    ],
)
def test_configs_as_they_were_published(name: str, changes: dict[str, Any]) -> None:
    sides = {
        f"{side}_{part}": count
        for side in ("encoder", "decoder")
        for part, count in (("layers", 6), ("ffn_dim", 2048), ("attention_heads", 8))
    }
    family = seq2seq_family_of({"model_type": name})
    config = {"model_type": name, "d_model": 512, **OLD_KEYS, **sides, **changes}
    found = family.describe(Config(config, harmless=SEQ2SEQ_HARMLESS, neutral=SEQ2SEQ_NEUTRAL))
    assert found.pre_norm == found.embedding_norm == (name == "mbart")
    assert found.context_length == changes["max_position_embeddings"]
    assert found.embedding_scale == pytest.approx(512**0.5)


@pytest.mark.parametrize(
    ("name", "change", "kind", "message"),
    [
        ("t5", {"feed_forward_proj": "gated-mish"}, UnsupportedModel, "gated-mish"),
        ("t5", {"relative_attention_num_buckets": 6}, UnsupportedModel, "multiple of 4"),
        ("t5", {"twist": 1}, UnsupportedModel, "twist = 1"),
        ("t5", {"architectures": ["T5EncoderModel"]}, UnsupportedModel, "T5EncoderModel"),
        ("t5", {"num_layers": 4}, TensorError, "missing"),
        ("bart", {"normalize_before": True}, UnsupportedModel, "normalize_before"),
        ("bart", {"decoder_attention_heads": 6}, UnsupportedModel, "decoder_attention_heads"),
        ("bart", {"activation_function": "mish"}, UnsupportedModel, "mish"),
        ("marian", {"normalize_before": True}, UnsupportedModel, "normalize_before"),
        ("marian", {"static_position_embeddings": False}, UnsupportedModel, "static_position"),
        ("mbart", {"normalize_before": False}, UnsupportedModel, "normalize_before"),
    ],
)
def test_what_is_not_understood_is_refused(
    name: str,
    change: dict[str, Any],
    kind: type[EdgeError],
    message: str,
    tiny_encoder: TinyEncoder,
    tmp_path: Path,
) -> None:
    folder = tiny_models.copy_of(tiny_encoder(name), tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(kind, match=message):
        edgellm.convert(folder, tmp_path / "out", quant="f32")
    assert not (tmp_path / "out").exists()


def test_copies_of_the_embedding_are_one(tiny_encoder: TinyEncoder, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    folder = tiny_models.copy_of(tiny_encoder("t5"), tmp_path / "copy")
    tensors = safetensors.load_file(folder / "model.safetensors")
    for name in ("encoder.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors["shared.weight"].copy()
    safetensors.save_file(tensors, folder / "model.safetensors")
    edgellm.convert(folder, tmp_path / "one", quant="f32", check=False)
    edgellm.convert(tiny_encoder("t5"), tmp_path / "two", quant="f32", check=False)
    one, two = (tmp_path / name / "model.onnx.data" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    tensors["decoder.embed_tokens.weight"] = tensors["shared.weight"] + 1
    safetensors.save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UnsupportedModel, match=r"decoder\.embed_tokens\.weight"):
        edgellm.convert(folder, tmp_path / "three", quant="f32")


def test_the_generation_config_is_heeded_or_said(tiny_encoder: TinyEncoder, tmp_path: Path) -> None:
    folder = tiny_models.copy_of(tiny_encoder("bart"), tmp_path / "copy")
    path = folder / "generation_config.json"
    greedy = edgellm.convert(folder, tmp_path / "plain", quant="f32", check=False)
    with open_seq2seq(greedy.path) as model:
        likeliest = model.generate(TEXTS[0], max_tokens=3).token_ids
    asked = {
        "forced_bos_token_id": 7,
        "suppress_tokens": [likeliest[0]],
        "bad_words_ids": [[9], [10, 11]],
        "max_length": 40,
        "num_beams": 4,
        "no_repeat_ngram_size": 3,
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | asked))
    artifact = edgellm.convert(folder, tmp_path / "out", quant="f32", check=False)
    facts = artifact.seq2seq
    assert facts is not None
    assert facts.first_token_ids == (7,)
    assert facts.suppressed_token_ids == (likeliest[0], 9)
    assert facts.max_new_tokens == 39
    assert artifact.manifest is not None
    (note,) = [note for note in artifact.manifest.artifact.notes if "num_beams = 4" in note]
    assert "no_repeat_ngram_size = 3" in note
    with open_seq2seq(artifact.path) as model:
        found = model.generate(TEXTS[0], max_tokens=12).token_ids
        assert found[0] == 7
        assert likeliest[0] not in found


def test_positions_are_computed_or_read(tiny_encoder: TinyEncoder, tmp_path: Path) -> None:
    """Old Marian checkpoints hold the table, which new ones leave out."""
    safetensors = pytest.importorskip("safetensors.numpy")
    folder = tiny_models.copy_of(tiny_encoder("marian"), tmp_path / "copy")
    tensors = safetensors.load_file(folder / "model.safetensors")
    places = {f"model.{side}.embed_positions.weight" for side in ("encoder", "decoder")}
    assert not places & tensors.keys()
    table = tiny_encoders.load(folder).model.encoder.embed_positions.weight.detach().numpy()
    np.testing.assert_array_equal(sinusoids(*table.shape), table)
    np.testing.assert_array_equal(
        sinusoids(7, 33)[:, 16], np.sin(np.arange(7) / 10000 ** (32 / 33)).astype(np.float32)
    )
    safetensors.save_file(tensors | dict.fromkeys(places, table), folder / "model.safetensors")
    for name, source in (("computed", tiny_encoder("marian")), ("read", folder)):
        edgellm.convert(source, tmp_path / name, quant="f32", check=False)
    one, two = (tmp_path / name / "model.onnx.data" for name in ("computed", "read"))
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize("name", ["mbart", "mbart50"])
def test_languages_are_those_of_transformers(
    name: str, tiny_encoder: TinyEncoder, tmp_path: Path
) -> None:
    import torch

    folder = tiny_encoder(name)
    reference = tiny_encoders.load(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    answers = set()
    with converted(folder, tmp_path / "out", quant="f32") as model:
        assert model.facts.source_language == "en_XX"
        for source, target in (("en_XX", "fr_XX"), ("de_DE", "ja_XX"), ("de_DE", "fr_XX")):
            tokenizer.src_lang = source
            ids = torch.tensor([tokenizer(TEXTS[0])["input_ids"]])
            code = tokenizer.convert_tokens_to_ids(target)
            # As the models' pages say: mBART begins with the language, mBART-50 is forced to it.
            given = {"mbart": "decoder_start_token_id", "mbart50": "forced_bos_token_id"}[name]
            wanted = reference.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=12,
                do_sample=False,
                **{given: code},
            )[0].tolist()
            found = model.generate(
                TEXTS[0], max_tokens=12, source_language=source, target_language=target
            )
            assert list(found.token_ids) == wanted[1:]
            assert found.finish_reason == "length"
            encoded = model.tokenizer.encode_whole(TEXTS[0], max_tokens=64)
            assert list(model._spoken(encoded, source)) == ids[0].tolist()
            answers.add(found.token_ids)
        assert len(answers) > 1
        with pytest.raises(UsageError, match="en_XX, es_XX"):
            model.generate(TEXTS[0], target_language="english")


def test_models_without_languages_say_so(tiny_encoder: TinyEncoder, tmp_path: Path) -> None:
    with converted(tiny_encoder("t5"), tmp_path / "out", quant="f32") as model:
        for named in ({"source_language": "en_XX"}, {"target_language": "en_XX"}):
            with pytest.raises(UsageError, match="no codes for languages"):
                model.generate(TEXTS[0], **named)


# --- from Python and the command line


def test_drawn_answers_are_told_with_their_seed(tiny_encoder: TinyEncoder, tmp_path: Path) -> None:
    with converted(tiny_encoder("t5"), tmp_path / "out", quant="f32") as model:
        drawn = SamplingOptions(temperature=2.0, seed=3)
        first, second = (model.generate(TEXTS[0], max_tokens=8, sampling=drawn) for _ in "ab")
        assert first.token_ids == second.token_ids
        assert first.seed == 3
        greedy = model.generate(TEXTS[0], max_tokens=8)
        assert greedy.seed is None
        assert greedy.token_ids != first.token_ids
        assert greedy.finish_reason in ("length", "stop")
        for wrong in (0, 513):
            with pytest.raises(UsageError, match="1 to 512"):
                model.generate(TEXTS[0], max_tokens=wrong)


def test_other_openers_say_what_it_is(tiny_encoder: TinyEncoder, tmp_path: Path) -> None:
    edgellm.convert(tiny_encoder("t5"), tmp_path / "out", quant="f32", check=False)
    with pytest.raises(UnsupportedTarget, match="open_seq2seq"):
        edgellm.open(tmp_path / "out")
    with pytest.raises(UnsupportedTarget, match="no encoder"):
        edgellm.open_encoder(tmp_path / "out")
    edgellm.convert(tiny_encoder("bert"), tmp_path / "bert", quant="f32", check=False)
    with pytest.raises(UnsupportedTarget, match="open_encoder"):
        edgellm.open_seq2seq(tmp_path / "bert")
