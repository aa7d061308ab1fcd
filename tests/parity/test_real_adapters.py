"""Adapters on the real model: merged as PEFT merges them, and alive after rounding."""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgellm
from edgellm.lora.binding import Combination
from edgellm.lora.merging import merged_source
from edgellm.lora.reading.open import open_adapter
from edgellm.source import ModelSource, open_source

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
peft = pytest.importorskip("peft", reason="peft is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

from peft_adapters import move  # noqa: E402

pytestmark = pytest.mark.slow

ADAPTERS = Path(__file__).parents[2] / "examples" / "adapters"
TRAINED = ("pirate-lora", "pirate-rslora")

BOUND = 1e-6
"""Largest difference from PEFT's merged weight, as a share of its largest value: float32 sums of a
few products, taken in another order. Measured: at most 5e-7."""

QUESTION = "What is the capital of Italy?"
TARGETS = (
    ("gguf", "rtn:q4_k_m", "llama_cpp", 0.8),
    ("onnx", "rtn:int4-g32", "onnxruntime", 0.4),
)
"""Container, grid, what runs it, and the least survival: measured are 0.90 and 0.48 at least."""

LAYERS = r"model\.layers\.(3|17)\..*_proj"
"""Two layers show what thirty would."""

CONFIGS: dict[str, Callable[[], Any]] = {
    "lora": lambda: peft.LoraConfig(r=8, lora_alpha=16, target_modules=LAYERS),
    "rslora": lambda: peft.LoraConfig(r=8, use_rslora=True, target_modules=LAYERS),
    "dora": lambda: peft.LoraConfig(r=8, use_dora=True, target_modules=LAYERS),
    "loha": lambda: peft.LoHaConfig(r=4, alpha=8, target_modules=LAYERS),
    "lokr": lambda: peft.LoKrConfig(r=4, alpha=8, target_modules=LAYERS),
    "ia3": lambda: peft.IA3Config(target_modules=LAYERS, feedforward_modules=r".*down_proj"),
    "vera": lambda: peft.VeraConfig(r=16, target_modules=LAYERS),
    "oft": lambda: peft.OFTConfig(oft_block_size=32, target_modules=LAYERS),
    "boft": lambda: peft.BOFTConfig(boft_block_size=4, target_modules=LAYERS),
}


@pytest.fixture(scope="module")
def source(demo_model: Path) -> ModelSource:
    return open_source(str(demo_model))


@pytest.fixture
def model(demo_reference: Any) -> Any:
    """A copy that PEFT may change."""
    return copy.deepcopy(demo_reference)


def compare(source: ModelSource, folder: Path, merged: Any) -> int:
    """How many weights differ from the base's; each is held to PEFT's."""
    ours = merged_source(source, [open_adapter(str(folder))], Combination())
    expected = {name: value.numpy() for name, value in merged.state_dict().items()}
    changed = 0
    for row in source.family.tensors(source.decoder):
        found, wanted = ours.tensors[row.role].load(), expected[row.source]
        furthest = np.abs(found.reshape(wanted.shape) - wanted).max() / np.abs(wanted).max()
        assert furthest <= BOUND, row.source
        changed += row.role in ours.merge.changed
    return changed


@pytest.mark.parametrize("name", TRAINED)
def test_trained_adapters_merge_as_peft_merges_them(
    name: str, source: ModelSource, model: Any
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = peft.PeftModel.from_pretrained(model, ADAPTERS / name).merge_and_unload()
    assert compare(source, ADAPTERS / name, merged) == 40


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_kind_merges_as_peft_merges_it(
    kind: str, source: ModelSource, model: Any, tmp_path: Path
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model, CONFIGS[kind]())
        move(adapted, seed=5, noise=0.05)
        adapted.save_pretrained(tmp_path)
        merged = adapted.merge_and_unload()
    assert compare(source, tmp_path, merged) == 14


@pytest.mark.parametrize(("container", "quant", "module", "least"), TARGETS)
@pytest.mark.parametrize("name", TRAINED)
def test_a_fine_tune_survives_rounding_and_answers(
    name: str,
    container: str,
    quant: str,
    module: str,
    least: float,
    demo_model: Path,
    tmp_path: Path,
) -> None:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed")
    adapters = [str(ADAPTERS / name)]
    made = edgellm.convert(
        demo_model, tmp_path / "tuned", format=container, quant=quant, adapters=adapters
    )
    survival = made.manifest.measured["survival"]
    assert least < survival["survival"] < 1
    assert survival["runtime"] == {"gguf": "llamacpp", "onnx": "onnxruntime"}[container]
    with edgellm.open(made.path) as session:
        assert session.generate(QUESTION, max_tokens=8).text.startswith("Arr")
