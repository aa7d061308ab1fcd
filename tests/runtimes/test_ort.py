"""What only the onnxruntime runtime has: graphs that do not load, and refusals."""

from __future__ import annotations

import dataclasses
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

import edgellm
from edgellm.artifact import Artifact
from edgellm.errors import GenerationError, UnsupportedTarget
from edgellm.hardware import Fact, Gpu, detect
from edgellm.runtimes import kv_buffers, limits, ort, ort_caches, ort_package
from edgellm.runtimes.ort import OnnxRuntime
from edgellm.runtimes.ort_caches import DeviceCaches
from edgellm.runtimes.ort_package import OrtPackage
from edgellm.runtimes.session import RunOptions

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

PLAIN_MACHINE = dataclasses.replace(
    detect(), apple_silicon=Fact(False, "test"), gpus=Fact((), "test")
)
CUDA_MACHINE = dataclasses.replace(PLAIN_MACHINE, gpus=Fact((Gpu("RTX", "NVIDIA"),), "test"))
MAC = dataclasses.replace(PLAIN_MACHINE, apple_silicon=Fact(True, "test"))


@pytest.fixture
def copied(artifact: Callable[[str, str], Artifact], tmp_path: Path) -> Artifact:
    """An artifact of its own that a test may damage."""
    original = artifact("llama", "onnx")
    folder = tmp_path / "copy"
    shutil.copytree(original.path, folder)
    return msgspec.structs.replace(original, path=folder, main=folder / original.main.name)


def damage_graph(artifact: Artifact) -> None:
    artifact.main.write_bytes(artifact.main.read_bytes()[:1000])


def empty_graph(artifact: Artifact) -> None:
    artifact.main.write_bytes(b"")


def remove_graph(artifact: Artifact) -> None:
    artifact.main.unlink()


def remove_data(artifact: Artifact) -> None:
    for file in artifact.path.glob("*.data"):
        file.unlink()


def cut_data(artifact: Artifact) -> None:
    for file in artifact.path.glob("*.data"):
        file.write_bytes(file.read_bytes()[:1000])


@pytest.mark.parametrize("harm", [damage_graph, empty_graph, remove_graph, remove_data, cut_data])
def test_damage_is_an_error_with_the_next_step(
    copied: Artifact, harm: Callable[[Artifact], None]
) -> None:
    harm(copied)
    with pytest.raises(GenerationError, match=r"could not load .*edgellm verify"):
        OnnxRuntime().open(copied, RunOptions())


def test_what_it_cannot_do_is_refused_with_a_way_out(
    artifact: Callable[[str, str], Artifact], tmp_path: Path
) -> None:
    model = artifact("llama", "onnx")
    with pytest.raises(UnsupportedTarget, match=r"run on llama\.cpp"):
        OnnxRuntime().open(model, RunOptions(device="cuda"))
    with pytest.raises(UnsupportedTarget, match="f32"):
        OnnxRuntime().open(model, RunOptions(kv_dtype="f16"))
    plain = Artifact(path=tmp_path, main=tmp_path / "model.gguf", container="gguf")
    with pytest.raises(UnsupportedTarget, match="--runtime llamacpp"):
        OnnxRuntime().open(plain, RunOptions())


def test_cache_of_another_model_is_refused(artifact: Callable[[str, str], Artifact]) -> None:
    one = OnnxRuntime().open(artifact("llama", "onnx"), RunOptions(context_tokens=32))
    other = OnnxRuntime().open(artifact("gemma3", "onnx"), RunOptions(context_tokens=32))
    other.prefill([1, 2])
    one.prefill([1])
    with pytest.raises(GenerationError, match="another model"):
        one.restore(other.save())
    assert list(one.tokens) == [1]
    one.close()
    other.close()


def test_caches_are_written_in_place(artifact: Callable[[str, str], Artifact]) -> None:
    session = OnnxRuntime().open(artifact("llama", "onnx"), RunOptions(context_tokens=32))
    caches = session._caches._arrays  # type: ignore[attr-defined]
    session.prefill([5, 6])
    for cache in caches:
        assert cache[:, :, :2].any()
        assert not cache[:, :, 2:].any()
    session.decode(7)
    assert session._caches._arrays is caches  # type: ignore[attr-defined]
    for cache in caches:
        assert cache[:, :, 2].any()
        assert not cache[:, :, 3:].any()
    session.close()


def test_int8_cache_is_a_quarter_and_no_other_is_taken_for_it(
    artifact: Callable[..., Artifact],
) -> None:
    models = [artifact("llama", "onnx"), artifact("llama", "onnx", "int8")]
    full, small = (OnnxRuntime().open(model, RunOptions(context_tokens=32)) for model in models)
    assert full.kv_bytes() == 4 * small.kv_bytes()
    full.prefill([1, 2])
    small.prefill([1])
    with pytest.raises(GenerationError, match="another model"):
        small.restore(full.save())
    assert list(small.tokens) == [1]
    full.close()
    small.close()
    for model, wanted in zip(models, ("int8", "f32"), strict=True):
        with pytest.raises(UnsupportedTarget, match="convert again with --kv-cache"):
            OnnxRuntime().open(model, RunOptions(kv_dtype=wanted))  # type: ignore[arg-type]


def test_huge_pages_change_no_token_and_hold_no_session_open(
    artifact: Callable[[str, str], Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer() -> list[int]:
        session = OnnxRuntime().open(artifact("llama", "onnx"), RunOptions(context_tokens=32))
        logits = session.prefill([5, 6, 7])[-1]
        tokens = []
        for _ in range(20):
            tokens.append(int(logits.argmax()))
            logits = session.decode(tokens[-1])
        session.close()
        return tokens

    with_pages = answer()
    assert not [thread for thread in threading.enumerate() if "huge pages" in thread.name]
    monkeypatch.setattr(ort, "anonymous_ranges", lambda: frozenset({(0, 1 << 63)}))
    assert with_pages == answer()


def test_missing_library_is_said_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = OnnxRuntime().capabilities(detect())
    assert not found.available
    assert "pip install onnxruntime" in found.reason


def test_the_cache_grows_with_the_sequence_and_changes_no_logits(
    artifact: Callable[[str, str], Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = artifact("llama", "onnx")
    whole = OnnxRuntime().open(model, RunOptions(context_tokens=64))
    monkeypatch.setattr(kv_buffers, "FIRST_TOKENS", 4)
    growing = OnnxRuntime().open(model, RunOptions(context_tokens=64))
    token_bytes = whole.kv_bytes() // 64
    rooms = []
    np.testing.assert_array_equal(growing.prefill([5, 6, 7]), whole.prefill([5, 6, 7]))
    for token in range(40):
        np.testing.assert_array_equal(growing.decode(token), whole.decode(token))
        rooms.append(growing.kv_bytes() // token_bytes)
    assert sorted(set(rooms)) == [4, 8, 16, 32, 64]
    state = growing.save()
    fresh = OnnxRuntime().open(model, RunOptions(context_tokens=64))
    fresh.restore(state)
    np.testing.assert_array_equal(fresh.decode(3), whole.decode(3))
    for session in (whole, growing, fresh):
        session.close()


def test_no_memory_for_a_longer_cache_keeps_what_is_there(
    artifact: Callable[[str, str], Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_buffers, "FIRST_TOKENS", 4)
    session = OnnxRuntime().open(artifact("llama", "onnx"), RunOptions(context_tokens=64))
    session.prefill([5, 6, 7])

    def refuse(*_: object) -> None:
        raise OSError("Cannot allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr(kv_buffers.mmap, "mmap", refuse)
        with pytest.raises(GenerationError, match="no memory"):
            session.prefill([1, 2, 3])
    assert list(session.tokens) == [5, 6, 7]
    again = OnnxRuntime().open(artifact("llama", "onnx"), RunOptions(context_tokens=64))
    again.prefill([5, 6, 7])
    np.testing.assert_array_equal(session.decode(1), again.decode(1))
    session.close()
    again.close()


def test_caches_in_a_devices_memory_give_the_same_logits(
    artifact: Callable[..., Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The code of CUDA and DirectML, with the computer's memory as onnxruntime allocates it."""
    monkeypatch.setattr(kv_buffers, "FIRST_TOKENS", 16)
    ids = [int(token) for token in np.random.default_rng(4).integers(0, 500, 60)]
    for kv_cache in (None, "int8"):
        model = artifact("llama", "onnx", kv_cache)
        plain = OnnxRuntime().open(model, RunOptions(context_tokens=90))
        with monkeypatch.context() as patch:
            patch.setattr(ort, "IN_HOST_MEMORY", ())
            patch.setattr(ort, "MEMORIES", {"cpu": "cpu"})
            session = OnnxRuntime().open(model, RunOptions(context_tokens=90))
            assert isinstance(session._caches, DeviceCaches)
            for one in (plain, session):
                one.prefill(ids[:10])
            for token in ids[10:40]:  # past the first room, and the second
                np.testing.assert_array_equal(session.decode(token), plain.decode(token))
            assert session.kv_bytes() == plain.kv_bytes()
            state = session.save()
            for mine, theirs in zip(state.data, plain.save().data, strict=True):
                np.testing.assert_array_equal(mine, theirs)
            for one in (plain, session):
                one.trim(20)
            rows = [one.prefill(ids[40:], all_logits=True).copy() for one in (plain, session)]
            np.testing.assert_array_equal(*rows)
            session.restore(state)
            plain.restore(state)
            np.testing.assert_array_equal(session.decode(7), plain.decode(7))
            session.close()
        plain.close()


def test_a_provider_that_is_not_used_is_no_silent_cpu(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This onnxruntime has no CUDA and falls back by itself, with no more than a warning."""
    has_gpu = OrtPackage("onnxruntime-gpu", "1.32.0")
    monkeypatch.setattr(ort, "found_package", lambda: has_gpu)
    monkeypatch.setattr(ort, "detect", lambda: CUDA_MACHINE)
    assert OnnxRuntime().capabilities(CUDA_MACHINE).devices == ("cuda", "cpu")
    halves, floats = (
        edgellm.convert(
            tiny_model("llama"), tmp_path / compute, format="onnx", quant="f32", compute=compute,
            check=False,
        )
        for compute in ("f16", "f32")
    )  # fmt: skip
    with pytest.raises(GenerationError, match="cannot use its CUDAExecutionProvider"):
        OnnxRuntime().open(halves, RunOptions())
    with pytest.raises(UnsupportedTarget, match="halves alone"):
        OnnxRuntime().open(floats, RunOptions(device="cuda"))
    session = OnnxRuntime().open(floats, RunOptions())
    assert session.device == "cpu", "by itself it takes what computes the graph"
    session.close()


@pytest.mark.parametrize(
    ("package", "hardware", "devices"),
    [
        ("onnxruntime", "plain", ("cpu",)),
        ("onnxruntime", "cuda", ("cpu",)),
        ("onnxruntime", "mac", ("cpu", "coreml")),
        ("onnxruntime-gpu", "cuda", ("cuda", "cpu")),
        ("onnxruntime-gpu", "plain", ("cpu",)),
        ("onnxruntime-directml", "plain", ("directml", "cpu")),
    ],
)
def test_package_and_machine_decide_on_the_devices(
    package: str, hardware: str, devices: tuple[str, ...]
) -> None:
    machine = {"plain": PLAIN_MACHINE, "cuda": CUDA_MACHINE, "mac": MAC}[hardware]
    assert OrtPackage(package, "1.32.0").devices(machine) == devices


def test_two_packages_that_overwrite_each_other_are_found_and_explained(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    both = {"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.32.0"}
    monkeypatch.setattr(ort_package, "installed_version", lambda name: both.get(name, ""))
    found = ort_package.found_package()
    assert found.name == "onnxruntime", "the build that is really there, by its own word"
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in found.clash
    assert "then pip install onnxruntime-gpu" in found.clash
    reason = OnnxRuntime().capabilities(CUDA_MACHINE).reason
    assert found.clash in reason
    assert OnnxRuntime().capabilities(CUDA_MACHINE).devices == ("cpu",)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "memory ran out"),
        (RuntimeError("Failed to allocate memory for requested buffer of size 9"), "memory ran"),
        (MemoryError(), "memory ran out"),
        (RuntimeError("DXGI_ERROR_DEVICE_REMOVED"), "the device went away"),
        (RuntimeError("shape mismatch"), "^shape mismatch$"),
    ],
)
def test_what_backends_say_is_explained(error: Exception, said: str) -> None:
    assert re.search(said, limits.explained(error))


def test_keys_and_values_that_do_not_fit_are_refused_before_they_are_made(
    artifact: Callable[..., Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_buffers, "FIRST_TOKENS", 16)
    session = OnnxRuntime().open(artifact("llama", "onnx"), RunOptions(context_tokens=90))
    session.prefill(list(range(16)))
    token_bytes = session.kv_bytes() // 16
    monkeypatch.setattr(ort_caches, "free_memory_bytes", lambda: 16 * token_bytes)
    with pytest.raises(GenerationError, match=r"would take .* choose a smaller --context"):
        session.decode(5)
    assert (len(session.tokens), session.kv_bytes()) == (16, 16 * token_bytes)
    monkeypatch.setattr(ort_caches, "free_memory_bytes", lambda: 31 * token_bytes)
    session.decode(5)
    assert session.kv_bytes() == 17 * token_bytes, "no more than must be, where twice does not fit"
    session.close()
