"""Every family as ONNX f32 in onnxruntime answers as transformers does, with cache and without.

Measured: logits, whose spread is 3 to 5, come within 1.1e-4 of transformers' in every case below,
the most with yarn, whose angles transformers takes in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

import onnx_files
import tiny_models

from edgellm.export.onnx_graph import DATA_FILE, GraphBuilder

TinyModel = Callable[[str], Path]

TOLERANCE = 2e-4

LENGTH = 100
"""Tokens: more than every window, and than the trained contexts of the scaled ropes."""

WAYS: list[tuple[int, ...]] = [(), (3,), (40, 17), (1, 60)]
"""Tokens at a time: the whole prompt; one by one after a short one; chunks with a past."""


@pytest.mark.parametrize("name", sorted(tiny_models.MODELS))
def test_logits_equal_transformers(name: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    folder = tiny_model(name)
    onnx_files.write_onnx(folder, tmp_path)
    ids = tiny_models.some_token_ids(LENGTH)
    wanted = tiny_models.reference_logits(folder, ids)
    for steps in WAYS:
        got = onnx_files.logits(tmp_path, ids, steps)
        np.testing.assert_allclose(got, wanted, rtol=0, atol=TOLERANCE, err_msg=str(steps))


def test_the_last_positions_are_given_by_default_and_any_when_asked(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    folder = tiny_model("llama")
    onnx_files.write_onnx(folder, tmp_path)
    ids = tiny_models.some_token_ids(20)
    wanted = tiny_models.reference_logits(folder, ids)
    for start, expected in ((None, wanted[-1:]), (-3, wanted[-3:]), (5, wanted[5:]), (0, wanted)):
        got = onnx_files.Graph(tmp_path, 20).step(ids, start)
        np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    "name",
    [
        "bloom",
        "gpt_neox-sequential",
        "minicpm3",
        "minicpm3-plain",
        "deepseek_v3",
        "lfm2",
        "lfm2-untied",
        "mamba",
        "mamba2",
    ],
)
def test_places_are_counted_for_each_sequence_of_a_batch(
    name: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """Two prompts of different lengths, the shorter one padded behind, then a token each."""
    import onnxruntime

    folder = tiny_model(name)
    onnx_files.write_onnx(folder, tmp_path)
    texts = [tiny_models.some_token_ids(n, seed=n) for n in (20, 12)]
    wanted = [tiny_models.reference_logits(folder, text) for text in texts]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", options)
    lengths, step = [len(text) - 1 for text in texts], max(map(len, texts)) - 1
    past = {
        each.name: np.zeros(
            (2, *(0 if size == onnx_files.PAST else size for size in each.shape[1:])), np.float32
        )
        for each in session.get_inputs()
        if onnx_files.PAST_NAME.match(each.name)
    }
    prompts = np.zeros((2, step), np.int64)
    for row, text, length in zip(prompts, texts, lengths, strict=True):
        row[:length] = text[:length]
    mask = np.arange(step) < np.asarray(lengths)[:, np.newaxis]
    given = {"input_ids": prompts, "attention_mask": mask.astype(np.int64)}
    whole = {"logits_from": np.zeros(1, np.int64)}
    names = [each.name for each in session.get_outputs()]
    outputs = dict(zip(names, session.run(names, given | whole | past), strict=True))
    logits = outputs.pop("logits")
    for found, expected, length in zip(logits, wanted, lengths, strict=True):
        np.testing.assert_allclose(found[:length], expected[:length], rtol=0, atol=TOLERANCE)
    mask = np.arange(step + 1) <= np.asarray(lengths)[:, np.newaxis]
    given = {
        "input_ids": np.asarray([[text[-1]] for text in texts], np.int64),
        "attention_mask": mask.astype(np.int64),
    }
    held = {name: outputs[onnx_files.PAST_NAME.sub("present.", name)] for name in past}
    found = session.run(["logits"], given | whole | held)[0]
    for step_logits, expected in zip(found, wanted, strict=True):
        np.testing.assert_allclose(step_logits[0], expected[-1], rtol=0, atol=TOLERANCE)


def test_f16_weights_answer_as_the_same_weights_in_transformers(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    import torch

    folder = tiny_model("llama-256")
    onnx_files.write_onnx(folder, tmp_path, "f16")
    model = tiny_models.load(folder)
    ids = tiny_models.some_token_ids(LENGTH)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(parameter.half().float())
        wanted = model(torch.tensor([ids]), use_cache=False).logits[0].numpy()
    got = onnx_files.logits(tmp_path, ids)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=TOLERANCE)


def test_weights_beyond_4_gb_are_found(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A data file with a hole: all tensors but the first lie where 32 bits do not reach."""
    allocate = GraphBuilder._allocate

    def far_away(graph: GraphBuilder, nbytes: int) -> int:
        if 0 < graph.data_bytes < FAR_BYTES:
            graph.data_bytes = FAR_BYTES
        return allocate(graph, nbytes)

    monkeypatch.setattr(GraphBuilder, "_allocate", far_away)
    folder = tiny_model("llama-256")
    layout = onnx_files.write_onnx(folder, tmp_path, quant="int4-g32", embed="f32", head="f32")
    assert layout.data_files[DATA_FILE] > FAR_BYTES
    assert (tmp_path / DATA_FILE).stat().st_blocks * 512 < 1 << 26
    far = onnx_files.logits(tmp_path, tiny_models.some_token_ids(8))
    monkeypatch.undo()
    onnx_files.write_onnx(folder, tmp_path / "near", quant="int4-g32", embed="f32", head="f32")
    near = onnx_files.logits(tmp_path / "near", tiny_models.some_token_ids(8))
    np.testing.assert_array_equal(far, near)


FAR_BYTES = (4 << 30) + (1 << 20)
