"""Every family of encoders as ONNX in onnxruntime gives what transformers gives.

Measured: outputs, of a spread of 1 to 3, come within 2e-5 of transformers' in every case below.
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
from edgellm.architectures.encoder import (  # noqa: E402
    ENCODER_HARMLESS,
    ENCODER_NEUTRAL,
    RERANKERS,
    TASKS,
)
from edgellm.architectures.encoders import ENCODERS, encoder_family_of  # noqa: E402
from edgellm.artifact import open_artifact  # noqa: E402
from edgellm.encoders.model import EncoderModel, open_encoder  # noqa: E402
from edgellm.export.to_onnx import GRID_NAMES  # noqa: E402
from edgellm.quant.dequantize import dequantize  # noqa: E402
from edgellm.quant.grid import GRIDS  # noqa: E402
from edgellm.quant.rtn import solve  # noqa: E402
from edgellm.source.encoder_folder import open_encoder_folder  # noqa: E402

TinyEncoder = Callable[[str], Path]

TOLERANCE = 1e-4

BATCHES: list[tuple[int, ...]] = [(1,), (7,), (66,), (5, 5, 5), (64, 3, 17, 1), (2, 40)]
"""Lengths of the texts of a batch: one token, as many as the tables hold, padded a lot."""


def converted(folder: Path, out: Path, **options: Any) -> EncoderModel:
    """The encoder in ``folder`` as an artifact, opened."""
    edgellm.convert(folder, out, check=False, **options)
    return open_encoder(out, threads=1)


def run(model: EncoderModel, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    found = model.graph.run(batch, model.facts.outputs)
    return dict(zip(model.facts.outputs, found, strict=True))


@pytest.mark.parametrize("name", sorted(tiny_encoders.MODELS))
def test_outputs_equal_transformers(name: str, tiny_encoder: TinyEncoder, tmp_path: Path) -> None:
    folder = tiny_encoder(name)
    reference = tiny_encoders.load(folder)
    config = reference.config
    with converted(folder, tmp_path / "out", quant="f32") as model:
        for seed, lengths in enumerate(BATCHES):
            batch = tiny_encoders.some_batch(
                lengths,
                padding=config.pad_token_id,
                vocab_size=config.vocab_size,
                types=getattr(config, "type_vocab_size", 0),
                seed=seed,
            )
            wanted = tiny_encoders.outputs(reference, batch)
            got = run(model, batch)
            embedding = got.pop("sentence_embedding", None)
            assert got.keys() == wanted.keys()
            seen = batch["attention_mask"] == 1
            for output, values in wanted.items():
                close = {"rtol": 0, "atol": TOLERANCE, "err_msg": f"{output}, {lengths}"}
                if values.ndim == 3:  # what stands at padding means nothing
                    np.testing.assert_allclose(got[output][seen], values[seen], **close)
                else:
                    np.testing.assert_allclose(got[output], values, **close)
            if embedding is not None:
                weights = seen[..., None]
                mean = (wanted["last_hidden_state"] * weights).sum(1) / weights.sum(1)
                np.testing.assert_allclose(embedding, mean, rtol=0, atol=TOLERANCE)


def pooled(hidden: np.ndarray, kind: str) -> np.ndarray:
    """What sentence-transformers makes of the vectors ``[tokens, hidden]`` of one text."""
    return {
        "cls": hidden[0],
        "max": hidden.max(0),
        "mean": hidden.mean(0),
        "mean_sqrt_len_tokens": hidden.sum(0) / len(hidden) ** 0.5,
    }[kind]


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    "kinds", [["cls"], ["max"], ["mean"], ["mean_sqrt_len_tokens"], ["mean", "cls", "max"]], ids=str
)
def test_vectors_are_pooled_as_sentence_transformers_does(
    kinds: list[str], normalize: bool, tiny_encoder: TinyEncoder, tmp_path: Path
) -> None:
    folder = tiny_models.copy_of(tiny_encoder("bert"), tmp_path / "copy")
    modules = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")]
    listed = [{"type": f"sentence_transformers.models.{kind}", "path": at} for kind, at in modules]
    (folder / "modules.json").write_text(json.dumps(listed if normalize else listed[:2]))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": kinds}))
    batch = tiny_encoders.some_batch((30, 1, 11), padding=0, vocab_size=301, types=2)
    hidden = tiny_encoders.outputs(tiny_encoders.load(folder), batch)["last_hidden_state"]
    rows = []
    for values, mask in zip(hidden, batch["attention_mask"], strict=True):
        row = np.concatenate([pooled(values[mask == 1], kind) for kind in kinds])
        rows.append(row / np.linalg.norm(row) if normalize else row)
    with converted(folder, tmp_path / "out", quant="f32") as model:
        assert model.facts.embedding_size == 60 * len(kinds)
        got = run(model, batch)["sentence_embedding"]
    np.testing.assert_allclose(got, rows, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("activation", "biased"), [("activation.Tanh", True), ("linear.Identity", False)]
)
def test_products_behind_the_pooling_are_computed(
    activation: str, biased: bool, tiny_encoder: TinyEncoder, tmp_path: Path
) -> None:
    """Two of sentence-transformers' Dense, and a vector of length 1 behind them."""
    safetensors = pytest.importorskip("safetensors.numpy")
    folder = tiny_models.copy_of(tiny_encoder("bert"), tmp_path / "copy")
    kinds = ("Transformer", "Pooling", "Dense", "Dense", "Normalize")
    listed = [
        {"type": f"sentence_transformers.models.{kind}", "path": f"{place}_{kind}" if place else ""}
        for place, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(listed))
    draw = np.random.default_rng(0)
    batch = tiny_encoders.some_batch((30, 1, 11), padding=0, vocab_size=301, types=2)
    hidden = tiny_encoders.outputs(tiny_encoders.load(folder), batch)["last_hidden_state"]
    rows = [
        values[mask == 1].mean(0)
        for values, mask in zip(hidden, batch["attention_mask"], strict=True)
    ]
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    wanted = np.stack(rows)
    for place, (into, out) in ((2, (60, 33)), (3, (33, 20))):
        inner = folder / f"{place}_Dense"
        inner.mkdir()
        settings = {"in_features": into, "out_features": out, "bias": biased}
        settings["activation_function"] = f"torch.nn.modules.{activation}"
        (inner / "config.json").write_text(json.dumps(settings))
        tensors = {"linear.weight": draw.standard_normal((out, into)).astype(np.float32) / 8}
        if biased:
            tensors["linear.bias"] = draw.standard_normal(out).astype(np.float32)
        safetensors.save_file(tensors, inner / "model.safetensors")
        wanted = wanted @ tensors["linear.weight"].T + tensors.get("linear.bias", 0)
        wanted = np.tanh(wanted) if "Tanh" in activation else wanted
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    with converted(folder, tmp_path / "out", quant="f32") as model:
        assert model.facts.embedding_size == 20
        got = run(model, batch)["sentence_embedding"]
        first = model.artifact
    np.testing.assert_allclose(got, wanted, rtol=0, atol=TOLERANCE)
    # The digest of the source covers their weights too.
    tensors["linear.weight"][0, 0] += 1
    safetensors.save_file(tensors, folder / "3_Dense" / "model.safetensors")
    with converted(folder, tmp_path / "other", quant="f32") as model:
        second = model.artifact
    assert first is not None
    assert second is not None
    assert first.manifest is not None
    assert second.manifest is not None
    assert first.manifest.artifact.base.sha256 != second.manifest.artifact.base.sha256


def test_what_padding_holds_is_without_effect(tiny_encoder: TinyEncoder, tmp_path: Path) -> None:
    with converted(tiny_encoder("bert"), tmp_path / "out", quant="f32") as model:
        batch = tiny_encoders.some_batch((9, 4), padding=0, vocab_size=301, types=2)
        first = run(model, batch)["sentence_embedding"]
        batch["input_ids"][1, 4:] = 17
        np.testing.assert_array_equal(run(model, batch)["sentence_embedding"], first)


MISREADINGS = {
    "bert": [
        ("hidden_act", "gelu_new"),
        ("hidden_act", "relu"),
        ("layer_norm_eps", 1e-1),
        ("num_attention_heads", 6),
    ],
    "roberta": [("pad_token_id", 0)],
    "distilbert": [("activation", "relu"), ("n_heads", 2)],
    "bert-classes": [("hidden_act", "silu")],
    "bert-masked": [("hidden_act", "relu")],
}


@pytest.mark.parametrize("name", MISREADINGS)
def test_a_misread_config_would_show(name: str, tiny_encoder: TinyEncoder, tmp_path: Path) -> None:
    """The test against transformers sees each of these mistakes."""
    batch = tiny_encoders.some_batch((60, 30), padding=1, vocab_size=301, types=2)
    with converted(tiny_encoder(name), tmp_path / "right", quant="f32") as model:
        right = run(model, batch)[model.facts.outputs[-1]]
    for number, (key, value) in enumerate(MISREADINGS[name]):
        folder = tiny_models.copy_of(tiny_encoder(name), tmp_path / f"{number}")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {key: value}))
        with converted(folder, tmp_path / f"out-{number}", quant="f32") as model:
            wrong = run(model, batch)[model.facts.outputs[-1]]
        assert np.abs(right - wrong).max() > 3 * TOLERANCE, (key, value)


# --- rounding


def on_grid(rows: np.ndarray, name: str) -> np.ndarray:
    """``rows`` as a container that has them on the grid ``name`` stands for them."""
    if name in ("f32", "f16"):
        return rows.astype({"f32": np.float32, "f16": np.float16}[name]).astype(np.float32)
    return dequantize(solve(rows, GRIDS[name]))


@pytest.mark.parametrize("grid", [name for name in GRID_NAMES if "128" not in name])
def test_every_grid_computes_what_its_values_stand_for(
    grid: str, tiny_encoder: TinyEncoder, tmp_path: Path
) -> None:
    """Against transformers with the very weights that the codes stand for.

    What is left is the rounding of activations to 8 bits, in the products that do it.
    """
    import torch

    folder = tiny_encoder("bert-64")
    source = open_encoder_folder(folder)
    reference = tiny_encoders.load(folder)
    with converted(folder, tmp_path / "out", quant=grid, format="onnx") as model:
        assert model.artifact is not None
        assert model.artifact.manifest is not None
        grids = {tensor.role: tensor.grid for tensor in model.artifact.manifest.artifact.tensors}
        assert grids["blk.1.ffn_up.weight"] == grid
        stored = dict(reference.named_parameters())
        with torch.no_grad():
            for row in source.family.tensors(source.encoder):
                if row.role in grids:
                    values = on_grid(source.tensors[row.role].load(), grids[row.role])
                    parameter = stored[row.source.removeprefix("bert.")]
                    parameter.copy_(torch.from_numpy(values.reshape(parameter.shape)))
        batch = tiny_encoders.some_batch((50, 12, 33), padding=0, vocab_size=301, types=2)
        wanted = tiny_encoders.outputs(reference, batch)["last_hidden_state"]
        got = run(model, batch)["last_hidden_state"]
    seen = batch["attention_mask"] == 1
    off = (got[seen] - wanted[seen]).std() / wanted[seen].std()
    exact = grid in ("f32", "f16", "nf4")
    assert off < (1e-5 if exact else 0.03)


@pytest.mark.parametrize(("name", "quant"), [("bert-64", "int8"), ("bert-64-masked", "int4-g32")])
def test_the_manifest_says_how_far_rounding_moved_the_outputs(
    name: str, quant: str, tiny_encoder: TinyEncoder, tmp_path: Path
) -> None:
    artifact = edgellm.convert(tiny_encoder(name), tmp_path / "out", quant=quant)
    assert artifact.manifest is not None
    found = artifact.manifest.measured["quality"]
    assert found["texts"] == 39
    assert found["cosine_min"] <= found["cosine_mean"] < 1
    assert found["cosine_mean"] > (0.999 if quant == "int8" else 0.9)
    assert found["max_difference"] > 0
    assert (found["top1_agreement"] if "masked" in name else 1) > 0.5
    assert open_artifact(tmp_path / "out").encoder == artifact.encoder


# --- configs that transformers saves


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("ending", TASKS)
def test_every_key_that_transformers_saves_is_known(name: str, ending: str, tmp_path: Path) -> None:
    family = encoder_family_of({"model_type": name})
    assert family.model_type == name
    real = getattr(transformers, f"{family.class_prefix}{ending}")
    assert real.config_class.model_type == name
    assert family.base_prefix == f"{real.base_model_prefix}."
    config = transformers.AutoConfig.for_model(name, num_labels=3)
    config.architectures = [real.__name__]
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    task = family.task_of(real.__name__, "here")
    for values in (saved, config.to_dict() | {"torch_dtype": "float32"}):
        reader = Config(values, harmless=ENCODER_HARMLESS, neutral=ENCODER_NEUTRAL)
        encoder = family.describe(reader, task, pooler=True)
        assert len(encoder.head.labels) == (3 if "classification" in task else 0)


def test_rerankers_name_torchs_classes() -> None:
    import torch

    for name in RERANKERS:
        module, _, attribute = name.rpartition(".")
        assert module.startswith("torch.nn.modules")
        assert issubclass(getattr(torch.nn, attribute), torch.nn.Module)
