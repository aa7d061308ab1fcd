"""What calibration knows of a product's inputs is what transformers' own modules are given."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

import tiny_models

from edgellm.calibration import passes, sums
from edgellm.calibration.passes import CalibrationPass
from edgellm.errors import GenerationError
from edgellm.quant.statistics import Statistics
from edgellm.source import open_source
from edgellm.source.model import ModelSource
from edgellm.tensors import derived

TinyModel = Callable[[str], Path]

WINDOWS = [tiny_models.some_token_ids(length, seed=length) for length in (40, 17, 1, 33)]

LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)$")
"""What transformers calls a layer."""

TOLERANCE = 2e-4
"""Of the largest value of a Hessian: twice what logits may be off by, as inputs are squared."""


def gathered(source: ModelSource, threads: int = 1, **options: object) -> dict[str, Statistics]:
    """Of every product, by role of the weight, the head's too."""
    run = CalibrationPass(source, WINDOWS, threads=threads, **options)
    run.begin()
    found: dict[str, Statistics] = {}
    for index in range(len(source.decoder.layers)):
        found |= run.layer(index)
    head = "token_embd.weight" if source.decoder.tied_head else "output.weight"
    return {**found, head: run.head()}


def seen_by_transformers(folder: Path) -> dict[str, np.ndarray]:
    """The inputs of every product, all windows below each other, by module.

    And under ``blk.N`` what each layer gives, under ``blk.N, before`` what it is given.
    """
    import torch

    model = tiny_models.load(folder)
    seen: dict[str, list[np.ndarray]] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: object, given: tuple[torch.Tensor, ...], _: object) -> None:
            # OPT lays the tokens of all texts below each other before its feed-forward.
            x = given[0].reshape(-1, given[0].shape[-1])
            seen.setdefault(name, []).append(x.numpy().copy())

        return hook

    def watch_layer(name: str) -> Callable[..., None]:
        def hook(module: object, given: tuple[torch.Tensor, ...], out: object) -> None:
            seen.setdefault(f"{name}, before", []).append(given[0][0].numpy().copy())
            stream = out[0] if isinstance(out, tuple) else out
            seen.setdefault(name, []).append(stream[0].numpy().copy())

        return hook

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D":
            module.register_forward_hook(watch(name))
        elif layer := LAYER.search(name):
            module.register_forward_hook(watch_layer(f"blk.{layer[1]}"))
    with torch.no_grad():
        for window in WINDOWS:
            model(torch.tensor([window]), use_cache=False)
    return {name: np.concatenate(found) for name, found in seen.items()}


DENSE = [
    name
    for name, tiny in tiny_models.MODELS.items()
    if "moe" not in name and name != "mixtral" and "moe_intermediate_size" not in tiny.settings
]
"""What experts are given is looked at in ``test_experts``."""


@pytest.mark.parametrize("name", sorted(DENSE))
def test_statistics_are_of_the_inputs_that_transformers_has(
    name: str, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "CHUNK_TOKENS", 50)  # several chunks
    monkeypatch.setattr(sums, "STRIP_COLUMNS", 64)  # and strips
    folder = tiny_model(name)
    source = open_source(str(folder))
    inputs = seen_by_transformers(folder)
    found = gathered(source, threads=2)
    products = [
        role
        for role, ref in source.tensors.items()
        if len(ref.shape) == 2
        and role.endswith(".weight")
        and role not in ("token_embd.weight", "position_embd.weight")
        and not role.endswith("norm.weight")
    ]
    assert set(products) <= set(found)
    for role, statistics in found.items():
        head = role in ("token_embd.weight", "output.weight")
        module = "lm_head" if head else source.tensors[role].name.removesuffix(".weight")
        if role.endswith("ssm_dt.weight"):  # by a weight whose module transformers does not call
            made = source.tensors[role.replace("ssm_dt", "ssm_x")]
            made_of = inputs[made.name.removesuffix(".weight")]
            x = (made_of @ made.load().T)[:, : source.tensors[role].columns].astype(np.float64)
        else:
            x = inputs[module].astype(np.float64)
        if head and source.decoder.family == "minicpm3":  # which scales what the head is given
            x /= source.decoder.logit_scale
        counts = np.ones(len(x))
        if role.startswith("blk."):
            layer = ".".join(role.split(".")[:2])
            counts = np.square(inputs[layer].astype(np.float64)).mean(axis=1)
            attention = re.fullmatch("attn_(q|k|v|qkv|q_a|q_b|kv_a_mqa|kv_b)", role.split(".")[2])
            shared = source.decoder.shared_norm and role.split(".")[2] in ("ffn_gate", "ffn_up")
            if not (attention or shared):
                counts /= np.square(inputs[f"{layer}, before"].astype(np.float64)).mean(axis=1)
            counts **= passes.TOKEN_POWER
        wanted = (x * counts[:, None]).T @ x / counts.sum()
        scale = wanted.max()
        np.testing.assert_allclose(statistics.hessian, wanted, rtol=0, atol=TOLERANCE * scale)
        np.testing.assert_allclose(
            statistics.mean_squares, np.square(x).mean(axis=0), rtol=0, atol=TOLERANCE * scale
        )
        np.testing.assert_allclose(statistics.largest, np.abs(x).max(axis=0), rtol=1e-3, atol=1e-5)
        assert statistics.tokens == sum(map(len, WINDOWS))
        np.testing.assert_array_equal(statistics.hessian, statistics.hessian.T)
    up = found.get("blk.0.ffn_up.weight")
    assert up is found.get("blk.0.ffn_gate.weight", up)


@pytest.mark.parametrize("options", [{"threads": 3}, {"threads": 2, "budget_bytes": 0}])
def test_bits_do_not_depend_on_threads_nor_on_where_the_stream_is_kept(
    options: dict[str, int], tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "CHUNK_TOKENS", 20)
    source = open_source(str(tiny_model("llama")))
    one, other = gathered(source, threads=1), gathered(source, spool=tmp_path, **options)
    assert len(list(tmp_path.iterdir())) == (2 if "budget_bytes" in options else 0)
    for role, statistics in one.items():
        assert statistics.hessian.tobytes() == other[role].hessian.tobytes()
        assert statistics.largest.tobytes() == other[role].largest.tobytes()


def test_importance_alone_is_the_diagonal(tiny_model: TinyModel) -> None:
    source = open_source(str(tiny_model("qwen3")))
    whole, diagonal = gathered(source), gathered(source, importance_only=True)
    for role, statistics in diagonal.items():
        assert statistics.hessian.ndim == 1
        np.testing.assert_allclose(statistics.importance, whole[role].mean_squares, rtol=1e-5)
    weighed = gathered(source, importance_only=True, weighs=True)
    for role, statistics in weighed.items():
        np.testing.assert_allclose(statistics.importance, whole[role].importance, rtol=1e-5)
        np.testing.assert_allclose(statistics.mean_squares, whole[role].mean_squares, rtol=1e-5)


@pytest.mark.parametrize("spooled", [False, True])
def test_a_pass_goes_on_from_a_saved_stream(
    spooled: bool, tiny_model: TinyModel, tmp_path: Path
) -> None:
    source = open_source(str(tiny_model("llama")))

    def begun() -> CalibrationPass:
        return CalibrationPass(
            source, WINDOWS, threads=1, spool=tmp_path, budget_bytes=0 if spooled else 1 << 30
        )

    first = begun()
    first.begin()
    first.pass_by(0)
    files = first.save(tmp_path)
    wanted = first.layer(1)
    second = begun()
    second.resume(1, files)
    found = second.layer(1)
    for role, statistics in wanted.items():
        assert statistics.hessian.tobytes() == found[role].hessian.tobytes()


def test_values_that_overflow_are_laid_to_their_layer(tiny_model: TinyModel) -> None:
    source = open_source(str(tiny_model("llama")))
    role = "blk.1.attn_norm.weight"
    huge = derived(source.tensors[role], lambda rows: rows * np.float32(1e30))
    damaged = replace(source, tensors={**source.tensors, role: huge})
    run = CalibrationPass(damaged, WINDOWS, threads=2)
    run.begin()
    run.layer(0)
    with pytest.raises(GenerationError, match=r"blk\.1\.attn_q\.weight.* not finite"):
        run.layer(1)
