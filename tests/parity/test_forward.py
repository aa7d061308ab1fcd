"""The float network run layer by layer answers as transformers does, on every family.

Measured: within 1.1e-4 of transformers' logits, whose spread is 3 to 5, as the whole ONNX graph is;
where there are state-space layers within 3.3e-4.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

import tiny_models

from edgellm import forward
from edgellm.errors import TensorError, UsageError
from edgellm.source import open_source
from edgellm.tensors import TensorRef, derived

TinyModel = Callable[[str], Path]

TOLERANCE = 2e-4
"""As for the whole graph in ``test_onnx_logits.py``."""

SCANNED = 5e-4
"""Of state-space layers: transformers' own float32 lies up to 2e-4 beside its float64 there."""

LENGTHS = (100, 1, 7)
"""Longer than every window and than the trained contexts of the scaled ropes; and short ones."""


@pytest.mark.parametrize("name", sorted(tiny_models.MODELS))
def test_every_window_equals_transformers(name: str, tiny_model: TinyModel) -> None:
    folder = tiny_model(name)
    windows = [tiny_models.some_token_ids(n, seed=n) for n in LENGTHS]
    found = list(forward.window_logits(open_source(str(folder)), windows, threads=1))
    assert len(found) == len(windows)
    tolerance = SCANNED if name.startswith("mamba") else TOLERANCE
    for window, got in zip(windows, found, strict=True):
        wanted = tiny_models.reference_logits(folder, window)
        np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance)


def test_one_session_serves_the_layers_of_equal_settings(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gemma 3 has two kinds of layers, and the norm before the head is a graph of its own."""
    made: list[forward.Sessions] = []
    start = forward.Sessions.__init__

    def remember(sessions: forward.Sessions, threads: int | None = None) -> None:
        start(sessions, threads)
        made.append(sessions)

    monkeypatch.setattr(forward.Sessions, "__init__", remember)
    source = open_source(str(tiny_model("gemma3")))
    assert len(source.decoder.layers) == 4
    forward.hidden_states(source, [[5, 6, 7]])
    (sessions,) = made
    assert len(sessions._opened) == 2 + 1


def test_weights_are_loaded_one_layer_at_a_time_and_by_slabs(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In slabs of a few rows the answers are the same, and no load is larger than a slab."""
    source = open_source(str(tiny_model("llama")))
    window = tiny_models.some_token_ids(12)
    (wanted,) = forward.window_logits(source, [window])
    monkeypatch.setattr(forward, "SLAB_BYTES", 7 * 4 * 96)
    loads: list[tuple[str, int]] = []

    def watched(ref: TensorRef) -> TensorRef:
        def load_rows(start: int, stop: int) -> np.ndarray:
            loads.append((ref.role, stop - start))
            return ref.load_rows(start, stop)

        return replace(ref, load_rows=load_rows)

    slow = replace(source, tensors={role: watched(ref) for role, ref in source.tensors.items()})
    (got,) = forward.window_logits(slow, [window])
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5)
    assert max(rows for role, rows in loads if role.endswith(".weight")) <= 7
    order = [int(role.split(".")[1]) for role, _ in loads if role.startswith("blk.")]
    assert order == sorted(order)


def test_nan_in_a_weight_is_refused_by_name(tiny_model: TinyModel) -> None:
    source = open_source(str(tiny_model("llama")))
    role = "blk.1.ffn_up.weight"
    broken = derived(source.tensors[role], lambda rows: rows * np.float32("nan"))
    damaged = replace(source, tensors={**source.tensors, role: broken})
    with pytest.raises(TensorError, match=r"layers\.1\.mlp\.up_proj\.weight holds nan"):
        forward.hidden_states(damaged, [[5, 6]])


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        ([], "no tokens"),
        ([[5], []], "no tokens"),
        ([[5] * 257], "257 tokens is longer than the model's context of 256"),
        ([[5, 517]], "token 517, the model has 517"),
    ],
)
def test_windows_that_cannot_be_computed(
    windows: list[list[int]], message: str, tiny_model: TinyModel
) -> None:
    source = open_source(str(tiny_model("llama")))
    with pytest.raises(UsageError, match=message):
        forward.hidden_states(source, windows)


def test_longrope_beyond_the_trained_length(tiny_model: TinyModel) -> None:
    """transformers takes the frequencies of long texts for one of more than 128 tokens."""
    folder = tiny_model("phi3-longrope")
    ids = tiny_models.some_token_ids(150)
    source = open_source(str(folder), context=256)
    assert source.decoder.context_length == 256
    (found,) = forward.window_logits(source, [ids])
    np.testing.assert_allclose(
        found, tiny_models.reference_logits(folder, ids), rtol=0, atol=TOLERANCE
    )
    within = forward.window_logits(open_source(str(folder)), [ids[:100]])
    assert np.abs(next(within) - found[:100]).max() > 0.1
