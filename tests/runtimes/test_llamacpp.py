"""What only the llama.cpp runtime has: files that it must not be given, and flaws of builds."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import foreign_gguf
import numpy as np
import pytest

import edgellm
from edgellm import hardware
from edgellm.artifact import Artifact, open_artifact
from edgellm.errors import (
    EdgeError,
    GenerationError,
    RuntimeMissing,
    SourceError,
    UnsupportedTarget,
)
from edgellm.hardware import Fact, Gpu, detect
from edgellm.quant.ggml_types import NAMED
from edgellm.runtimes import llamacpp, llamacpp_library, openmp
from edgellm.runtimes.llamacpp import LlamaCppRuntime
from edgellm.runtimes.llamacpp_library import miscompiled_amx
from edgellm.runtimes.llamacpp_memory import WORKING_BYTES, kv_token_bytes, layers_that_fit
from edgellm.runtimes.session import RunOptions
from edgellm.source.gguf_file import read_gguf_model

AMX = frozenset({"avx2", "amx_int8"})


def compiled_by(folder: Path, compiler: str, *, amx: bool = True) -> Path:
    symbol = b"_Z24ggml_backend_amx_mul_matPK" if amx else b"_Z4mulmat"
    content = b"\x7fELF\0" + symbol + b"\0" + compiler.encode() + b"\0"
    (folder / "libggml-cpu.so").write_bytes(content)
    return folder


@pytest.mark.parametrize(
    ("compiler", "broken"),
    [
        ("GCC: (Debian 12.2.0-14+deb12u1) 12.2.0", "GCC 12.2"),
        ("GCC: (Debian 12.4.0-2) 12.4.0", None),
        ("GCC: (Ubuntu 11.4.0-1ubuntu1) 11.4.0", "GCC 11.4"),
        ("GCC: (GNU) 10.3.1", "GCC 10.3"),
        ("GCC: (Ubuntu 13.2.0) 13.2.0", "GCC 13.2"),
        ("GCC: (GNU) 14.1.0", None),
        ("clang version 17.0.6", None),
    ],
)
def test_builds_whose_amx_code_crashes_are_known(
    tmp_path: Path, compiler: str, broken: str | None
) -> None:
    assert miscompiled_amx(compiled_by(tmp_path, compiler), AMX) == broken


def test_broken_amx_code_does_not_matter_where_it_is_not_run(tmp_path: Path) -> None:
    old = "GCC: (Debian 12.2.0-14) 12.2.0"
    assert miscompiled_amx(compiled_by(tmp_path, old), frozenset({"avx2"})) is None
    assert miscompiled_amx(compiled_by(tmp_path, old, amx=False), AMX) is None


def test_waiting_of_threads_is_shortened_and_the_environment_left_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in openmp.OPENMP_WAITING:
        monkeypatch.delenv(name, raising=False)
    pressure = tmp_path / "cpu"
    monkeypatch.setattr(hardware, "CPU_PRESSURE", pressure)
    for content, turns in (
        (None, openmp.BUSY_SPIN_COUNT),
        ("some avg10=0.40 avg60=9.00", openmp.QUIET_SPIN_COUNT),
        ("some avg10=62.10 avg60=0.00", openmp.BUSY_SPIN_COUNT),
    ):
        if content is not None:
            pressure.write_text(content)
        with openmp.short_spin():
            assert os.environ["GOMP_SPINCOUNT"] == turns
    assert "GOMP_SPINCOUNT" not in os.environ
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    with openmp.short_spin():
        assert "GOMP_SPINCOUNT" not in os.environ


def test_missing_library_is_said_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = LlamaCppRuntime().capabilities(detect())
    assert not found.available
    assert 'pip install "edgellm[llamacpp]"' in found.reason


def test_old_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llama_cpp", reason="llama_cpp is not installed")
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.3.9")
    found = LlamaCppRuntime().capabilities(detect())
    assert not found.available
    assert "0.3.9 is older than" in found.reason


def test_gpu_needs_a_build_and_a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llama_cpp", reason="llama_cpp is not installed")
    (tmp_path / "libggml-cuda.so").touch()
    monkeypatch.setattr("edgellm.runtimes.llamacpp.library_folder", lambda: tmp_path)
    assert LlamaCppRuntime().capabilities(detect()).devices == ("cpu",)
    with_card = replace(detect(), gpus=Fact((Gpu("a card", "NVIDIA"),), "test"))
    assert LlamaCppRuntime().capabilities(with_card).devices == ("cuda", "cpu")


@pytest.fixture(scope="module")
def gguf(artifact: Callable[[str, str], Artifact]) -> bytes:
    pytest.importorskip("llama_cpp", reason="llama_cpp is not installed")
    return artifact("llama", "gguf").main.read_bytes()


def open_bytes(folder: Path, content: bytes) -> None:
    path = folder / "model.gguf"
    path.write_bytes(content)
    plain = Artifact(path=path, main=path, container="gguf")
    LlamaCppRuntime().open(plain, RunOptions(context_tokens=32)).close()


def test_a_sound_file_opens(gguf: bytes, tmp_path: Path) -> None:
    open_bytes(tmp_path, gguf)


@pytest.mark.parametrize("part", [0.001, 0.01, 0.5, 0.999])
def test_file_cut_short_is_an_error_and_no_crash(gguf: bytes, tmp_path: Path, part: float) -> None:
    with pytest.raises(SourceError):
        open_bytes(tmp_path, gguf[: int(len(gguf) * part)])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0glama", "glama"),
        (b"llama.block_count", b"llama.block_counx", "block_count"),
        (b"token_embd.weight", b"token_embx.weight", "token_embd"),
        (b"blk.1.attn_k.weight", b"blk.1.attn_x.weight", "attn_k"),
    ],
)
def test_what_llamacpp_says_reaches_the_user(
    gguf: bytes, tmp_path: Path, old: bytes, new: bytes, message: str
) -> None:
    assert old in gguf
    with pytest.raises(EdgeError, match=message):
        open_bytes(tmp_path, gguf.replace(old, new, 1))


def test_other_containers_are_refused(tmp_path: Path) -> None:
    artifact = Artifact(path=tmp_path, main=tmp_path / "model.onnx", container="onnx")
    with pytest.raises(UnsupportedTarget, match="--runtime onnxruntime"):
        LlamaCppRuntime().open(artifact, RunOptions())


def test_half_precision_cache_is_the_default_and_half_as_large(
    artifact: Callable[[str, str], Artifact],
) -> None:
    pytest.importorskip("llama_cpp", reason="llama_cpp is not installed")
    model = artifact("llama", "gguf")
    sizes = []
    for kv_dtype in (None, "f32"):
        options = RunOptions(context_tokens=64, kv_dtype=kv_dtype)  # type: ignore[arg-type]
        session = LlamaCppRuntime().open(model, options)
        sizes.append(session.kv_bytes())
        session.close()
    assert sizes[0] * 2 == sizes[1]
    with pytest.raises(UnsupportedTarget, match="in f32, f16, bf16, q8_0, q4_0 here, not in int8"):
        LlamaCppRuntime().open(model, RunOptions(kv_dtype="int8"))


def test_error_is_the_last_words_of_llamacpp() -> None:
    llamacpp_library.forget_log()
    assert llamacpp_library.last_words() == "it gave no reason"
    llamacpp_library._remember(2, b"info\n", None)
    llamacpp_library._remember(4, b"first: no\n", None)
    llamacpp_library._remember(4, b"second: no\n", None)
    assert llamacpp_library.last_words() == "first: no second: no"
    llamacpp_library.forget_log()


def test_a_build_that_does_not_load_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = "raise RuntimeError('Failed to load shared library: no libgomp')"
    (tmp_path / "llama_cpp.py").write_text(broken)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "llama_cpp", raising=False)
    with pytest.raises(RuntimeMissing, match=r"does not load .*no libgomp.*--force-reinstall"):
        llamacpp_library.load_library()


def test_rounded_keys_and_values_take_less_and_answers_stay_near(
    artifact: Callable[..., Artifact],
) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    ids = list(range(5, 65))
    rows, sizes = {}, {}
    for kv_dtype in ("f32", "f16", "bf16", "q8_0", "q4_0"):
        session = LlamaCppRuntime().open(
            artifact("llama", "gguf"), RunOptions(context_tokens=256, kv_dtype=kv_dtype)
        )
        rows[kv_dtype] = session.prefill(ids, all_logits=True)
        sizes[kv_dtype] = session.kv_bytes()
        session.close()
    assert sizes["f32"] == 2 * sizes["f16"] == 2 * sizes["bf16"]
    assert sizes["q8_0"] * 32 == sizes["f16"] * 17
    assert sizes["q4_0"] * 32 == sizes["f16"] * 9
    spread = rows["f32"].std()
    errors = {kind: np.sqrt(np.mean((rows[kind] - rows["f32"]) ** 2)) / spread for kind in rows}
    assert errors["f16"] < 0.002
    assert errors["f16"] < errors["q8_0"] < 0.05
    assert errors["q8_0"] < errors["q4_0"] < 0.3


@pytest.mark.parametrize("kv_dtype", ["f32", "f16", "q8_0"])
def test_the_caches_size_is_known_from_the_header(
    kv_dtype: str, artifact: Callable[..., Artifact]
) -> None:
    """What llama.cpp writes down of a full cache is keys and values, and a little beside them."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    made = artifact("llama", "gguf")
    session = LlamaCppRuntime().open(
        made,
        RunOptions(context_tokens=256, kv_dtype=kv_dtype),  # type: ignore[arg-type]
    )
    session.prefill([token % 400 + 5 for token in range(256)])
    measured = session.save().data[0].nbytes
    predicted = 256 * sum(kv_token_bytes(read_gguf_model(made.main).metadata, NAMED[kv_dtype]))
    session.close()
    assert abs(predicted / measured - 1) < 0.05
    assert predicted == session_bytes(made, kv_dtype)


@pytest.mark.parametrize("kv_dtype", ["f32", "f16"])
@pytest.mark.parametrize("write", [foreign_gguf.write_deepseek2, foreign_gguf.write_gemma4])
def test_latent_narrow_and_shared_keys_are_counted_as_what_they_take(
    write: Callable[[Path, Path], Path],
    kv_dtype: str,
    artifact: Callable[..., Artifact],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Against the buffers that llama.cpp says it takes, in MiB to the hundredth."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    path = write(tmp_path / "model.gguf", artifact("llama", "gguf").main)
    said: list[str] = []
    keep = llama_cpp.llama_log_callback(lambda _, text, __: said.append(text.decode()))
    llamacpp_library.load_library()
    monkeypatch.setattr(llamacpp_library, "_log_callback", keep)
    session = LlamaCppRuntime().open(
        open_artifact(path),
        RunOptions(context_tokens=512, kv_dtype=kv_dtype),  # type: ignore[arg-type]
    )
    monkeypatch.undo()
    llamacpp_library.load_library()
    assert np.isfinite(session.prefill([token % 400 + 5 for token in range(512)])).all()
    session.close()
    buffers = re.findall(r"KV buffer size = +([\d.]+) MiB", "".join(said))
    predicted = 512 * sum(kv_token_bytes(read_gguf_model(path).metadata, NAMED[kv_dtype]))
    assert predicted / 2**20 == pytest.approx(sum(map(float, buffers)), abs=0.011)


def session_bytes(artifact: Artifact, kv_dtype: str) -> int:
    options = RunOptions(context_tokens=256, kv_dtype=kv_dtype)  # type: ignore[arg-type]
    session = LlamaCppRuntime().open(artifact, options)
    try:
        return session.kv_bytes()
    finally:
        session.close()


def test_layers_go_to_a_gpu_from_the_last_as_far_as_they_fit(
    artifact: Callable[..., Artifact],
) -> None:
    stored = read_gguf_model(artifact("llama", "gguf").main)
    layers = int(stored.metadata["llama.block_count"])
    kv = [1000] * layers
    output = sum(
        tensor.nbytes for name, tensor in stored.tensors.items() if name.startswith("output")
    )
    block = sum(
        tensor.nbytes
        for name, tensor in stored.tensors.items()
        if name.startswith(f"blk.{layers - 1}.")
    )
    for room, wanted in (
        (0, 0),
        (WORKING_BYTES + output - 1, 0),
        (WORKING_BYTES + output, 1),
        (WORKING_BYTES + output + block + 999, 1),
        (WORKING_BYTES + output + block + 1000, 2),
        (1 << 40, layers + 1),
    ):
        assert layers_that_fit(stored, kv, room) == wanted, room


def test_layers_for_a_gpu_without_one_are_refused(
    artifact: Callable[..., Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    with pytest.raises(UnsupportedTarget, match="--gpu-layers"):
        LlamaCppRuntime().open(artifact("llama", "gguf"), RunOptions(device="cpu", gpu_layers=3))
    with pytest.raises(UnsupportedTarget, match="--gpu-layers"):
        edgellm.open(artifact("llama", "onnx").path, gpu_layers=3)


def test_a_context_that_does_not_fit_is_refused_before_it_is_made(
    artifact: Callable[..., Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = artifact("llama", "gguf")
    token_bytes = sum(kv_token_bytes(read_gguf_model(made.main).metadata, NAMED["f32"]))
    monkeypatch.setattr(llamacpp, "free_memory_bytes", lambda: 40 * token_bytes)
    with pytest.raises(GenerationError, match=r"would take .* choose a smaller --context"):
        LlamaCppRuntime().open(made, RunOptions(context_tokens=41, kv_dtype="f32"))
    LlamaCppRuntime().open(made, RunOptions(context_tokens=40, kv_dtype="f32")).close()
    LlamaCppRuntime().open(made, RunOptions(context_tokens=41, kv_dtype="f16")).close()
