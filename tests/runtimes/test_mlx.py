"""What the mlx runtime alone does: packages and devices, types of the cache, precision on a CPU."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import edgellm
from edgellm.answers import open_answers
from edgellm.artifact import Artifact, open_artifact
from edgellm.errors import GenerationError, UnsupportedTarget
from edgellm.evaluation_text import Passage
from edgellm.hardware import Fact, Gpu, Hardware, detect
from edgellm.runtimes import mlx, runtime_named
from edgellm.runtimes.session import RunOptions

HERE = dataclasses.replace(detect(), apple_silicon=Fact(False, "test"), gpus=Fact((), "test"))
MAC = dataclasses.replace(HERE, apple_silicon=Fact(True, "test"))
CUDA = dataclasses.replace(HERE, gpus=Fact((Gpu("RTX", "NVIDIA"),), "test"))
BOTH = {"mlx": "0.32.4", "mlx-lm": "0.32.2"}


@pytest.mark.parametrize(
    ("packages", "hardware", "devices", "said"),
    [
        ({**BOTH, "mlx-metal": "0.32.4"}, MAC, ("metal", "cpu"), "mlx-lm 0.32.2 on mlx 0.32.4"),
        ({**BOTH, "mlx-cpu": "0.32.4"}, HERE, ("cpu",), "mlx-lm 0.32.2 on mlx 0.32.4"),
        ({**BOTH, "mlx-cuda-13": "0.32.4"}, CUDA, ("cuda", "cpu"), "mlx-lm"),
        ({**BOTH, "mlx-cuda-13": "0.32.4"}, HERE, (), "mlx-cpu"),
        (BOTH, HERE, (), "lacks what it computes with"),
        ({"mlx": "0.32.4"}, HERE, (), "not installed: pip install"),
        ({**BOTH, "mlx-lm": "0.28.1", "mlx-cpu": "0.32.4"}, HERE, (), "older than 0.32.0"),
    ],
)
def test_packages_decide_what_it_can_do(
    packages: dict[str, str],
    hardware: Hardware,
    devices: tuple[str, ...],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mlx, "installed_version", lambda package: packages.get(package, ""))
    found = mlx.MlxRuntime().capabilities(hardware)
    assert found.devices == devices
    assert found.available == bool(devices)
    assert said in found.reason
    assert found.available <= (found.quick == (devices != ("cpu",)))


@pytest.fixture(scope="module")
def folder(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
    out = tmp_path_factory.mktemp("mlx") / "out"
    return edgellm.convert(tiny_model("llama"), out, format="mlx", quant="bf16", check=False)


@pytest.mark.parametrize(
    ("kv_dtype", "said"), [("f16", "f32 here, or in int8 or int4"), ("bf16", "leave it out")]
)
def test_a_cache_in_another_float_type_is_refused(
    kv_dtype: str, said: str, folder: Artifact
) -> None:
    with pytest.raises(UnsupportedTarget, match=said):
        runtime_named("mlx").open(folder, RunOptions(device="cpu", kv_dtype=kv_dtype))


def test_a_cache_of_four_bits_is_smaller_and_near(folder: Artifact) -> None:
    ids = list(range(5, 65))
    rows, sizes = {}, {}
    for kv_dtype in (None, "int8", "int4"):
        session = runtime_named("mlx").open(folder, RunOptions(device="cpu", kv_dtype=kv_dtype))
        rows[kv_dtype] = session.prefill(ids, all_logits=True)
        sizes[kv_dtype] = session.kv_bytes()
        session.close()
    assert sizes["int4"] < sizes["int8"] < sizes[None] / 2
    spread = rows[None].std()
    errors = {kind: np.sqrt(np.mean((rows[kind] - rows[None]) ** 2)) / spread for kind in rows}
    assert 0 < errors["int8"] < 0.02
    assert errors["int8"] < errors["int4"] < 0.3


def test_a_cache_is_refused_before_it_takes_more_than_there_is(
    folder: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert folder.manifest is not None
    for kv_dtype in ("f32", "int8", "int4"):
        token_bytes = mlx.kv_token_bytes(folder.manifest.artifact.model, kv_dtype, "f32")
        options = RunOptions(device="cpu", kv_dtype=kv_dtype)  # type: ignore[arg-type]
        session = runtime_named("mlx").open(folder, options)
        monkeypatch.setattr(mlx, "free_memory_bytes", lambda lacks=256 * token_bytes - 1: lacks)
        with pytest.raises(GenerationError, match=r"would take .* choose a smaller --context"):
            session.prefill([7] * 100)
        assert (len(session.tokens), session.kv_bytes()) == (0, 0)
        monkeypatch.setattr(mlx, "free_memory_bytes", lambda fits=256 * token_bytes: fits)
        session.prefill([7] * 100)
        assert session.kv_bytes() == 256 * token_bytes, "as predicted"
        session.close()


def test_on_a_cpu_it_computes_in_float32(folder: Artifact) -> None:
    """Halves of these weights would differ from float32 by a hundred times as much."""
    session = runtime_named("mlx").open(folder, RunOptions(device="cpu"))
    ids = list(range(5, 65))
    found = session.prefill(ids, all_logits=True)
    with edgellm.open(folder.path, threads=3) as chat:
        assert any("3 are not heeded" in note for note in chat.notes)
        assert chat.session.device == "cpu"
    answers = open_answers(str(folder.path), runtime="float")
    wanted = next(iter(answers.logits([Passage(tuple(ids), 0)])))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-3)


def test_a_missing_weight_is_said_in_words(folder: Artifact, tmp_path: Path) -> None:
    out = Path(shutil.copytree(folder.path, tmp_path / "copy"))
    (out / "model.safetensors").write_bytes(b"\0" * 64)
    with pytest.raises(GenerationError, match="mlx could not load"):
        runtime_named("mlx").open(open_artifact(out), RunOptions(device="cpu"))
