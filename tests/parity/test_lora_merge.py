"""``convert BASE --adapter``: the merged model answers as the unmerged PEFT model does.

The reference is the live PEFT model, adapters apart: its own merge is wrong where weights are
shared (repeated layers, one side of a tied pair). Measured: logits, whose standard deviation is 2.4
to 3.2, come within 4.5e-5 of it in every case below, no further than without an adapter.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

pytest.importorskip("peft", reason="peft is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

import onnx_files
import peft
import peft_adapters
import tiny_models
import torch
import transformers

from edgellm import slabs
from edgellm.artifact import Artifact
from edgellm.conversion import convert
from edgellm.manifest import read_manifest
from edgellm.parallel import one_blas_thread
from edgellm.recipe import Recipe

if TYPE_CHECKING:
    from peft_adapters import Prepare

TinyModel = Callable[[str], Path]

TOLERANCE = {"onnx": 2e-4, "gguf": 3e-4}
"""As without adapters, in test_onnx_logits.py and test_gguf_logits.py."""

LENGTH = 40
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Case:
    """A base, the settings of a ``LoraConfig``, and whether head and embedding end up tied."""

    model: str
    settings: dict[str, Any]
    tied: bool
    prepare: Prepare | None = None
    layers: int | None = None
    containers: tuple[str, ...] = ("onnx", "gguf")


def with_more_tokens(model: transformers.PreTrainedModel) -> None:
    """Five rows more than the base has, drawn like the others."""
    torch.manual_seed(5)
    size = model.config.vocab_size
    model.resize_token_embeddings(size + 5, mean_resizing=False)
    with torch.no_grad():
        for table in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
            table[size:] = 0.3 * torch.randn(5, table.shape[1])


CASES = {
    "linear": Case("llama", {"target_modules": LINEAR}, tied=False),
    "rslora and patterns": Case(
        "qwen3",
        {
            "target_modules": LINEAR,
            "use_rslora": True,
            "rank_pattern": {"q_proj": 8, "layers.1.mlp.up_proj": 2},
            "alpha_pattern": {"v_proj": 3},
        },
        tied=False,
    ),
    "dora": Case("llama", {"target_modules": LINEAR, "use_dora": True}, tied=False),
    "conv1d": Case(
        "gpt2",
        {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
        tied=True,
        containers=("onnx",),  # llama.cpp looks GELU up in a table of halves
    ),
    "q, k and v stored head by head": Case(
        "gpt_neox",
        {"target_modules": ["query_key_value", "dense", "lm_head"], "use_dora": True},
        tied=False,
        containers=("onnx",),
    ),
    "rows in pairs": Case(
        "gptj",
        {"target_modules": ["q_proj", "k_proj", "v_proj", "fc_in"]},
        tied=False,
        containers=("onnx",),
    ),
    "biases": Case("llama-biased", {"target_modules": LINEAR, "bias": "all"}, tied=True),
    "bias of B": Case("llama-biased", {"target_modules": LINEAR, "lora_bias": True}, tied=True),
    "experts and their router": Case(
        "mixtral",
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["experts.gate_up_proj", "experts.down_proj", "mlp.gate.weight"],
        },
        tied=False,
    ),
    "experts of a stack": Case(
        "granitemoe",
        {"target_modules": ["v_proj"], "target_parameters": ["experts.down_proj"]},
        tied=True,
    ),
    "a shared expert": Case(
        "qwen2_moe",
        {"target_modules": ["gate_proj", "down_proj", "shared_expert_gate"]},
        tied=False,
    ),
    "norms whole": Case(
        "llama", {"target_modules": ["q_proj"], "modules_to_save": ["norm", "down_proj"]}, False
    ),
    "head": Case("llama", {"target_modules": ["lm_head", "v_proj"]}, tied=False),
    "head of a tied pair": Case("llama-biased", {"target_modules": ["lm_head"]}, tied=False),
    "embedding of a tied pair": Case(
        "llama-biased", {"target_modules": ["embed_tokens"]}, tied=False
    ),
    "both of a tied pair": Case(
        "llama-biased", {"target_modules": ["embed_tokens", "lm_head"]}, tied=False
    ),
    "a tied pair kept tied": Case(
        "llama-biased",
        {"target_modules": ["embed_tokens", "v_proj"], "ensure_weight_tying": True},
        tied=True,
    ),
    "whole head of a tied pair": Case(
        "llama-biased", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, tied=False
    ),
    "whole embedding of a tied pair": Case(
        "llama-biased",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        tied=False,
    ),
    "a tied pair whole and kept tied": Case(
        "llama-biased",
        {
            "target_modules": ["q_proj"],
            "modules_to_save": ["embed_tokens"],
            "ensure_weight_tying": True,
        },
        tied=True,
    ),
    "trained tokens": Case(
        "llama", {"target_modules": ["q_proj"], "trainable_token_indices": [7, 500, 3]}, tied=False
    ),
    "trained tokens of a tied pair": Case(
        "llama-biased",
        {"target_modules": ["q_proj"], "trainable_token_indices": [7, 500, 3]},
        tied=True,
    ),
    "added tokens": Case(
        "llama", {"target_modules": ["q_proj"]}, tied=False, prepare=with_more_tokens
    ),
    "added tokens of a tied pair": Case(
        "llama-biased", {"target_modules": ["q_proj"]}, tied=True, prepare=with_more_tokens
    ),
    "added and trained tokens": Case(
        "llama-biased",
        {"target_modules": ["q_proj"], "trainable_token_indices": [517, 520, 8]},
        tied=True,
        prepare=with_more_tokens,
    ),
    "embedding with added tokens": Case(
        "llama-biased",
        {"target_modules": ["embed_tokens", "q_proj"]},
        tied=False,
        prepare=with_more_tokens,
    ),
    "repeated layers": Case(
        "llama",
        {"target_modules": LINEAR, "layer_replication": [[0, 2], [1, 3]]},
        tied=False,
        layers=4,
    ),
}


def logits_of(model: torch.nn.Module, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        found: np.ndarray = model(torch.tensor([ids]), use_cache=False).logits[0].numpy()
    return found


def artifact_logits(artifact: Artifact, ids: list[int]) -> np.ndarray:
    if artifact.container == "onnx":
        return onnx_files.logits(artifact.path, ids)
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    import llamacpp_logits

    return llamacpp_logits.logits(artifact.main, ids)


@pytest.mark.parametrize("name", CASES)
def test_merged_answers_equal_those_of_peft(
    name: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    case = CASES[name]
    base, folder = tiny_model(case.model), tmp_path / "adapter"
    config = peft.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **case.settings)
    live = peft_adapters.trained(base, config, prepare=case.prepare)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        live.save_pretrained(folder)
    ids = tiny_models.some_token_ids(LENGTH)
    if case.prepare is not None:
        ids += [517, 519, 521]
    ids += [3, 7, 499]
    wanted = logits_of(live, ids)
    before = tiny_models.reference_logits(base, [min(token, 516) for token in ids])
    assert np.abs(wanted[:, :517] - before).max() > 0.1  # the adapter does something
    for container in case.containers:
        recipe = Recipe(source=str(base), adapters=(str(folder),), format=container, quant="f32")
        artifact = convert(recipe, tmp_path / container, check=False)
        made = read_manifest(artifact.path).artifact
        assert ("an output head tied to the embedding" in made.model.features) == case.tied
        assert case.layers in (None, made.model.layer_count)
        got = artifact_logits(artifact, ids)
        np.testing.assert_allclose(got, wanted, rtol=0, atol=TOLERANCE[container])


def test_several_adapters_are_the_weighted_sum(tiny_model: TinyModel, tmp_path: Path) -> None:
    """PEFT's ``cat``; the second adapter leaves half of the weights alone."""
    base, weights = tiny_model("llama"), (0.7, -0.4)
    configs = {
        "first": peft.LoraConfig(r=4, lora_alpha=6, target_modules=LINEAR),
        "second": peft.LoraConfig(r=8, lora_alpha=8, target_modules=LINEAR[:3], use_rslora=True),
    }
    live = peft_adapters.trained(base, configs["first"], adapter_name="first")
    live.add_adapter("second", configs["second"])
    live.set_adapter("second")
    peft_adapters.move(live, seed=9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        live.save_pretrained(tmp_path)
        live.add_weighted_adapter(list(configs), list(weights), "both", combination_type="cat")
    live.set_adapter("both")
    ids = tiny_models.some_token_ids(LENGTH)
    wanted = logits_of(live, ids)
    adapters = tuple(
        f"{tmp_path / name}={weight}" for name, weight in zip(configs, weights, strict=True)
    )
    recipe = Recipe(source=str(base), adapters=adapters, format="onnx", quant="f32")
    artifact = convert(recipe, tmp_path / "out", check=False)
    got = artifact_logits(artifact, ids)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=TOLERANCE["onnx"])


@pytest.mark.parametrize("model", ["llama", "qwen3", "mistral-no-window", "gpt_neox"])
def test_a_gguf_adapter_merges_as_the_folder_that_it_was_made_from(
    tiny_model: TinyModel, tmp_path: Path, model: str
) -> None:
    """Rows are stored in another order there, for Llama and Mistral, or in checkpoints."""
    base, folder = tiny_model(model), tmp_path / "adapter"
    targets = "all-linear" if model == "gpt_neox" else LINEAR
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=targets, use_rslora=True, task_type="CAUSAL_LM"
    )
    live = peft_adapters.trained(base, config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        live.save_pretrained(folder)
    apart = Recipe(
        source=str(base), adapters=(str(folder),), format="gguf", quant="q8_0", keep_adapters=True
    )
    kept = convert(apart, tmp_path / "kept", check=False)
    assert kept.manifest is not None
    (beside,) = kept.manifest.artifact.kept_adapters
    stored = str(kept.path / beside.file)
    recipe = Recipe(source=str(base), adapters=(stored,), format="onnx", quant="f32")
    ids = tiny_models.some_token_ids(LENGTH)
    got = artifact_logits(convert(recipe, tmp_path / "out", check=False), ids)
    np.testing.assert_allclose(got, logits_of(live, ids), rtol=0, atol=TOLERANCE["onnx"])


@pytest.fixture(scope="module")
def wide_adapter(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Changes of every linear weight and of the embedding, one of them DoRA."""
    folder = tmp_path_factory.mktemp("wide") / "adapter"
    config = peft.LoraConfig(
        r=16,
        lora_alpha=24,
        task_type="CAUSAL_LM",
        target_modules=[*LINEAR, "embed_tokens"],
        use_dora=True,
    )
    live = peft_adapters.trained(tiny_model("llama-256"), config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        live.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("container", "quant"), [("gguf", "f32"), ("gguf", "rtn:q4_k_m"), ("onnx", "rtn:int4-g32")]
)
def test_the_same_bytes_whatever_the_threads_and_slabs(
    tiny_model: TinyModel,
    wide_adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    container: str,
    quant: str,
) -> None:
    source = str(tiny_model("llama-256"))
    recipe = Recipe(source=source, adapters=(str(wide_adapter),), format=container, quant=quant)
    found = []
    for threads, slab_bytes in ((1, None), (2, None), (2, None), (3, 20_000), (2, 7_000)):
        if slab_bytes is not None:
            monkeypatch.setattr(slabs, "SLAB_BYTES", slab_bytes)
        out = tmp_path / f"{len(found)}"
        found.append(read_manifest(convert(recipe, out, threads=threads, check=False).path))
    assert len({manifest.sha256 for manifest in found}) == 1


def test_the_merged_weights_have_one_checksum_in_every_container(
    tiny_model: TinyModel, wide_adapter: Path, tmp_path: Path
) -> None:
    digests = set()
    for container, quant in (("gguf", "rtn:q4_0"), ("gguf", "f16"), ("onnx", "int8")):
        recipe = Recipe(
            source=str(tiny_model("llama-256")),
            adapters=(str(wide_adapter),),
            format=container,
            quant=quant,
        )
        merge = read_manifest(
            convert(recipe, tmp_path / f"{container}-{quant}", check=False).path
        ).artifact.merge
        assert merge is not None
        digests.add(merge.merged_sha256)
    assert len(digests) == 1
    assert len(digests.pop()) == 64


def test_numpy_multiplies_on_one_thread_while_converting() -> None:
    from threadpoolctl import threadpool_info

    with one_blas_thread():
        counts = {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}
    assert counts <= {1}
