"""What the onnxruntime-genai runtime alone does: packages, folders of others, threads."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

import edgellm
from edgellm.answers import context_length
from edgellm.artifact import Artifact, open_artifact
from edgellm.errors import GenerationError, SourceError, UnsupportedTarget
from edgellm.hardware import Fact, Gpu, Hardware, detect
from edgellm.runtimes import genai, runtime_named, stepped
from edgellm.runtimes.huge_pages import HugePages, Ranges
from edgellm.runtimes.session import RunOptions

pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")

HERE = dataclasses.replace(detect(), gpus=Fact((), "test"))
CUDA = dataclasses.replace(HERE, gpus=Fact((Gpu("RTX", "NVIDIA"),), "test"))
IDS = [int(token) for token in np.random.default_rng(3).integers(0, 500, 40)]


@pytest.mark.parametrize(
    ("packages", "hardware", "devices"),
    [
        ({"onnxruntime-genai": "0.18.0"}, CUDA, ("cpu",)),
        ({"onnxruntime-genai-cuda": "0.18.0"}, CUDA, ("cuda", "cpu")),
        ({"onnxruntime-genai-cuda": "0.18.0"}, HERE, ("cpu",)),
        ({"onnxruntime-genai-directml": "0.18.0"}, HERE, ("directml", "cpu")),
        ({"onnxruntime-genai": "0.8.1"}, HERE, ()),
        ({}, CUDA, ()),
    ],
)
def test_packages_decide_what_it_can_do(
    packages: dict[str, str],
    hardware: Hardware,
    devices: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(genai, "installed_version", lambda package: packages.get(package, ""))
    found = genai.GenaiRuntime().capabilities(hardware)
    assert (found.available, found.devices) == (bool(devices), devices)
    if not devices:
        assert "pip install" in found.reason


@pytest.fixture
def foreign(artifact: Callable[..., Artifact], tmp_path: Path) -> Path:
    """A folder as genai's builder leaves it: no manifest, no model config."""
    folder = tmp_path / "foreign"
    shutil.copytree(artifact("llama", "onnx").path, folder)
    for name in ("manifest.json", "config.json", "generation_config.json"):
        (folder / name).unlink(missing_ok=True)
    return folder


def change_config(folder: Path, change: Callable[[dict], object]) -> None:  # type: ignore[type-arg]
    config = json.loads((folder / "genai_config.json").read_text())
    change(config)
    (folder / "genai_config.json").write_text(json.dumps(config))


def test_folders_of_others_run_and_say_that_they_are_unverified(
    foreign: Path, artifact: Callable[..., Artifact]
) -> None:
    with edgellm.open(artifact("llama", "onnx").path, runtime="onnxruntime", threads=1) as ours:
        wanted = ours.session.prefill(IDS).copy()
        said = ours.generate("two and two", raw=True, max_tokens=12).text
    with edgellm.open(foreign, threads=1) as chat:
        assert chat.session.runtime == "onnxruntime-genai"
        assert "foreign has no manifest: it runs, unverified" in chat.notes
        np.testing.assert_allclose(chat.session.prefill(IDS), wanted, rtol=0, atol=1e-4)
        assert chat.generate("two and two", raw=True, max_tokens=12).text == said
    limit = artifact("llama", "onnx").manifest.artifact.model.context_length  # type: ignore[union-attr]
    assert context_length(str(foreign), "onnxruntime-genai") == limit


def test_every_end_that_the_config_names_ends_an_answer(foreign: Path) -> None:
    with edgellm.open(foreign, threads=1) as chat:
        answer = chat.generate("two and two", raw=True, max_tokens=12)
        assert answer.finish_reason == "length"
        seventh = list(chat.session.tokens)[-6]
    change_config(foreign, lambda config: config["model"].update(eos_token_id=[2, seventh]))
    with edgellm.open(foreign, threads=1) as chat:
        shorter = chat.generate("two and two", raw=True, max_tokens=12)
        assert shorter.finish_reason == "stop"
        assert answer.text.startswith(shorter.text)


def test_graphs_that_give_all_positions_are_not_computed_one_by_one(
    foreign: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = runtime_named("onnxruntime-genai").open(open_artifact(foreign), RunOptions())
    wanted = session.prefill(IDS, all_logits=True)
    session.close()

    graph = onnx.load(foreign / "model.onnx", load_external_data=False)
    first = next(each for each in graph.graph.initializer if each.name == "logits_from")
    first.CopyFrom(onnx.numpy_helper.from_array(np.array([0], np.int64), "logits_from"))
    logits = next(each for each in graph.graph.output if each.name == "logits")
    logits.type.tensor_type.shape.dim[1].dim_param = "sequence_length"
    onnx.save(graph, foreign / "model.onnx")
    monkeypatch.setattr(stepped, "STEP_TOKENS", 16)
    session = runtime_named("onnxruntime-genai").open(open_artifact(foreign), RunOptions())
    steps: list[int] = []
    compute = session._compute

    def counted(token_ids: list[int], outputs: int) -> object:
        steps.append(len(token_ids))
        return compute(token_ids, outputs)

    monkeypatch.setattr(session, "_compute", counted)
    found = session.prefill(IDS, all_logits=True)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)
    assert steps == [16, 16, 8]
    session.close()


def test_the_size_of_its_cache_is_that_of_its_arrays(artifact: Callable[..., Artifact]) -> None:
    made = artifact("llama", "onnx")
    session = runtime_named("onnxruntime-genai").open(made, RunOptions(context_tokens=50))
    arrays = [
        session._generator.get_input(f"past_key_values.{layer}.{kind}")
        for layer in range(made.manifest.artifact.model.layer_count)  # type: ignore[union-attr]
        for kind in ("key", "value")
    ]
    assert session.kv_bytes() == sum(array.nbytes for array in arrays)
    session.close()


def test_restoring_computes_only_what_the_cache_does_not_hold(
    artifact: Callable[..., Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = runtime_named("onnxruntime-genai").open(artifact("llama", "onnx"), RunOptions())
    session.prefill(IDS[:30])
    state = session.save()
    session.prefill(IDS[30:])
    session.trim(10)
    computed: list[int] = []
    compute = session._compute

    def counted(token_ids: list[int], outputs: int) -> object:
        computed.extend(token_ids)
        return compute(token_ids, outputs)

    monkeypatch.setattr(session, "_compute", counted)
    session.restore(state)
    assert computed == IDS[10:30]
    session.close()


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lambda config: config.pop("model"), SourceError, "names no graph"),
        (lambda config: config["model"].update(vision={}), UnsupportedTarget, "vision beside"),
        (
            lambda config: config["model"].pop("context_length"),
            SourceError,
            "lacks model.context_length",
        ),
        (
            lambda config: config["model"]["decoder"].update(filename="none.onnx"),
            SourceError,
            "lacks none.onnx",
        ),
        (lambda config: config["model"].update(type="abacus"), GenerationError, "could not load"),
    ],
    ids=["empty", "vision", "context", "graph", "type"],
)
def test_configs_that_cannot_be_run_are_refused_in_words(
    change: Callable[[dict], object],  # type: ignore[type-arg]
    error: type[Exception],
    said: str,
    foreign: Path,
) -> None:
    change_config(foreign, change)
    with pytest.raises(error, match=said):
        edgellm.open(foreign)


def test_damaged_graphs_are_refused_in_words(foreign: Path) -> None:
    (foreign / "model.onnx").write_bytes(b"\x08\x0a" + bytes(100))
    with pytest.raises(GenerationError, match="onnxruntime-genai could not load"):
        edgellm.open(foreign)


def test_other_containers_are_refused(artifact: Callable[..., Artifact]) -> None:
    with pytest.raises(UnsupportedTarget, match="runs ONNX folders"):
        runtime_named("onnxruntime-genai").open(artifact("llama", "hf"), RunOptions())


def test_a_cache_of_another_type_is_refused(artifact: Callable[..., Artifact]) -> None:
    made = artifact("llama", "onnx")
    with pytest.raises(UnsupportedTarget, match="made to cache keys and values in f32"):
        runtime_named("onnxruntime-genai").open(made, RunOptions(kv_dtype="int8"))


def test_models_that_cannot_be_rewound_are_computed_anew(
    artifact: Callable[..., Artifact],
) -> None:
    class NoRewinding:
        def __init__(self, generator: object) -> None:
            self._generator = generator

        def rewind_to(self, length: int) -> None:
            raise RuntimeError("RewindTo is currently not supported for abacus")

        def __getattr__(self, name: str) -> object:
            return getattr(self._generator, name)

    session = runtime_named("onnxruntime-genai").open(artifact("llama", "onnx"), RunOptions())
    wanted = session.prefill(IDS[:20]).copy()
    session.prefill(IDS[20:])
    session._generator = NoRewinding(session._generator)
    session.trim(15)
    assert list(session.tokens) == IDS[:15]
    np.testing.assert_allclose(session.prefill(IDS[15:20]), wanted, rtol=0, atol=1e-4)
    session.close()


def test_combined_caches_are_refused_in_words(foreign: Path) -> None:
    change_config(
        foreign, lambda config: config["model"]["decoder"]["inputs"].update(past_names="past_%d")
    )
    with pytest.raises(UnsupportedTarget, match="past_names"):
        edgellm.open(foreign)


def test_huge_pages_change_no_token_and_hold_no_session_open(
    artifact: Callable[..., Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[HugePages] = []

    def kept(already: Ranges) -> HugePages:
        held.append(HugePages(already))
        return held[-1]

    def answer() -> str:
        with edgellm.open(artifact("llama", "onnx").path, runtime="onnxruntime-genai") as chat:
            return chat.generate("two and two", raw=True, max_tokens=12).text

    monkeypatch.setattr(genai, "HugePages", kept)
    # The weights alone do not fill a page: all memory of this process.
    monkeypatch.setattr(genai, "anonymous_ranges", frozenset)
    with_pages = answer()
    monkeypatch.setattr(genai, "anonymous_ranges", lambda: frozenset({(0, 1 << 63)}))
    assert with_pages == answer()
    asked, unasked = held
    asked.wait()
    assert asked.advised_bytes > 0 or not sys.platform.startswith("linux")
    assert unasked.advised_bytes == 0
    assert not [thread for thread in threading.enumerate() if "huge pages" in thread.name]


def test_what_asks_for_huge_pages_ends_where_opening_fails(
    artifact: Callable[..., Artifact],
) -> None:
    with pytest.raises(UnsupportedTarget, match="convert again with --kv-cache"):
        genai.GenaiRuntime().open(artifact("llama", "onnx"), RunOptions(kv_dtype="f16"))
    assert not [thread for thread in threading.enumerate() if "huge pages" in thread.name]
