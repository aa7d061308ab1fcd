"""Models whose layers are not all attention, on the ways that no other test takes them.

GGUF files read back, llama.cpp's own choice of types, solvers on GGUF, tuning, adapters merged and
kept beside the model, and folders of codes that transformers loads.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

import llamacpp_logits
import onnx_files
import tiny_models
from gguf_files import write_gguf
from llamacpp_quantizer import types_of_llamacpp

import edgellm
from edgellm.errors import UnsupportedTarget
from edgellm.export.to_gguf import lay_out
from edgellm.plan import make_plan
from edgellm.recipe import Recipe
from edgellm.source import open_source

TinyModel = Callable[[str], Path]

MODELS = ("lfm2", "lfm2-untied", "mamba", "mamba2", "mamba2-tied")
TOLERANCE = 2e-4

ROUNDED_BOUND = 0.2
"""Part of the spread of logits that weights and activations in 8 bits may take."""


@pytest.mark.parametrize("name", MODELS)
def test_a_gguf_file_reads_back_as_the_model_it_was(
    name: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    folder, path = tiny_model(name), tmp_path / "model.gguf"
    write_gguf(folder, path)
    first, again = open_source(str(folder)), open_source(str(path))
    assert again.decoder == first.decoder
    for role, ref in first.tensors.items():
        assert again.tensors[role].shape == ref.shape
        # Decays come back by a logarithm.
        bound = 1e-6 if role.endswith("ssm_a") else 0.0
        np.testing.assert_allclose(again.tensors[role].load(), ref.load(), rtol=bound, atol=bound)
    onnx_files.write_onnx(path, tmp_path / "onnx")
    ids = tiny_models.some_token_ids(50)
    wanted = tiny_models.reference_logits(folder, ids)
    np.testing.assert_allclose(
        onnx_files.logits(tmp_path / "onnx", ids), wanted, rtol=0, atol=TOLERANCE
    )


@pytest.mark.parametrize("mixture", ["q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_k_s", "q3_k_m"])
@pytest.mark.parametrize("name", ["lfm2", "lfm2-untied", "mamba", "mamba2"])
def test_types_are_those_that_llamacpp_chooses(
    name: str, mixture: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """Values are counted among the layers that have any, and no convolution is rounded."""
    folder, path = tiny_model(name), tmp_path / "float.gguf"
    write_gguf(folder, path)
    theirs = types_of_llamacpp(path, mixture)
    layout = lay_out(open_source(str(folder)), Recipe(source=str(folder), quant=mixture))
    ours = {
        tensor.name: tensor.grid.name
        for tensor in layout.tensors
        if tensor.name in theirs or tensor.grid.name != "f32"
    }
    assert ours == theirs


@pytest.mark.parametrize("name", ["lfm2", "mamba", "mamba2"])
def test_solved_gguf_files_answer_nearer_than_rounded_ones(
    name: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """In llama.cpp itself: measured, 0.10, 0.6 and 0.66 nats for 0.20, 1.1 and 0.96."""
    divergence = {}
    for quant in ("rtn:q5_0", "awq+gptq:q5_0"):
        made = edgellm.convert(
            tiny_model(name),
            tmp_path / quant.partition(":")[0],
            format="gguf",
            quant=quant,
            threads=1,
            check_tokens=512,
            **({} if quant.startswith("rtn") else {"calibration_tokens": 4096}),
        )
        assert made.manifest is not None
        divergence[quant] = made.manifest.measured["quality"]["kld_mean"]
    assert divergence["awq+gptq:q5_0"] < 0.8 * divergence["rtn:q5_0"]


@pytest.mark.parametrize(("name", "container"), [("lfm2", "gguf"), ("mamba", "onnx")])
def test_bits_are_spent_on_products_alone(
    name: str, container: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    made = edgellm.convert(
        tiny_model(name), tmp_path / "out", format=container, bits=7, threads=1, check=False,
        calibration_tokens=2048,
    )  # fmt: skip
    assert made.manifest is not None
    grids = {tensor.role: tensor.grid for tensor in made.manifest.artifact.tensors}
    for role in ("blk.0.shortconv.conv.weight", "blk.0.ssm_conv1d.weight", "blk.0.ssm_dt.weight"):
        assert grids.get(role, "f32") == "f32"
    assert len(set(grids.values())) > 2


def test_convolutions_are_tuned_and_scans_refused_by_name(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    found = {}
    for tune in (None, 8):
        out = tmp_path / f"tuned-{tune}"
        made = edgellm.convert(
            tiny_model("lfm2"), out, format="onnx", quant="rtn:int4-g32", tune=tune, threads=1,
            check_tokens=256,
        )  # fmt: skip
        assert made.manifest is not None
        found[tune] = made.manifest.measured["quality"]["kld_mean"]
    assert found[8] < found[None]
    refused: dict[str, Any] = {"format": "onnx", "quant": "rtn:int4-g32", "tune": 8}
    with pytest.raises(UnsupportedTarget, match=r"state-space layers in place .* does not train"):
        edgellm.convert(tiny_model("mamba2"), tmp_path / "refused", **refused)
    assert not (tmp_path / "refused").exists()


def test_scans_are_refused_before_torch_is_asked_for(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is none, nobody is told to install it in vain."""
    folder = tiny_model("mamba2")
    monkeypatch.setitem(sys.modules, "torch", None)
    recipe = Recipe(source=str(folder), format="onnx", quant="rtn:int4-g32", tune=8)
    with pytest.raises(UnsupportedTarget, match=r"state-space layers in place .* does not train"):
        make_plan(recipe)


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("lfm2", ["in_proj", "out_proj", "q_proj", "w2"]),
        ("mamba", ["in_proj", "x_proj"]),
        ("mamba2", ["in_proj"]),
    ],
)
def test_adapters_are_merged_as_peft_merges_them(
    name: str, targets: list[str], tiny_model: TinyModel, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    from peft_adapters import make_adapter

    folder = tiny_model(name)
    settings = peft.LoraConfig(r=4, lora_alpha=16, target_modules=targets)
    made = make_adapter(folder, settings, tmp_path / "adapter")
    edgellm.convert(
        folder, tmp_path / "merged", format="hf", quant="f32", adapters=[str(made.folder)],
        check=False,
    )  # fmt: skip
    merged = open_source(str(tmp_path / "merged"))
    changed = 0
    for ref in merged.tensors.values():
        wanted = made.merged[ref.name]
        changed += int(not np.array_equal(wanted, made.base[ref.name]))
        got = ref.load().reshape(wanted.shape)
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())
    assert changed >= len(targets)


def test_an_adapter_beside_the_model_reaches_its_convolutions(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    from peft_adapters import make_adapter

    from edgellm.runtimes.session import AdapterFile

    folder = tiny_model("lfm2")
    settings = peft.LoraConfig(r=4, lora_alpha=16, target_modules=["in_proj", "out_proj"])
    made = make_adapter(folder, settings, tmp_path / "adapter")
    options: dict[str, Any] = {
        "quant": "f32", "adapters": [str(made.folder)], "check": False, "threads": 1,
    }  # fmt: skip
    edgellm.convert(folder, tmp_path / "merged", format="gguf", **options)
    edgellm.convert(folder, tmp_path / "beside", format="gguf", keep_adapters=True, **options)
    ids = tiny_models.some_token_ids(40)
    wanted = llamacpp_logits.logits(tmp_path / "merged" / "model.gguf", ids)
    plain = tiny_models.reference_logits(folder, ids)
    assert np.abs(wanted - plain).max() > 0.1
    with edgellm.open(tmp_path / "beside", threads=1, kv_dtype="f32") as chat:
        session: Any = chat.session
        (file,) = (tmp_path / "beside").glob("*dapter*.gguf")
        session.set_adapters([AdapterFile(file)])
        rows = session.prefill(ids, all_logits=True).copy()
        session.set_adapters([])
        without = session.prefill(ids, all_logits=True)
        np.testing.assert_allclose(without, plain, rtol=0, atol=1e-3)
    np.testing.assert_allclose(rows, wanted, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "parts"),
    [("mamba", ["ssm_dt", "ssm_x"]), ("qwen2_moe", ["ffn_gate_inp", "ffn_gate_inp_shexp"])],
)
def test_adapters_of_products_in_float_are_added_by_llamacpp(
    name: str, parts: list[str], tiny_model: TinyModel, tmp_path: Path
) -> None:
    """To routers and the steps of states, as where they are merged; each of them alone."""
    from gguf_adapters import pair, write_adapter

    from edgellm.runtimes.session import AdapterFile

    folder = tiny_model(name)
    source = open_source(str(folder))
    ids = tiny_models.some_token_ids(40)
    plain = tiny_models.reference_logits(folder, ids)
    for part in parts:
        pairs: dict[str, np.ndarray] = {}
        for layer in range(len(source.decoder.layers)):
            role = f"blk.{layer}.{part}.weight"
            pairs |= pair(role, *source.tensors[role].shape, rank=2, seed=layer)
        pairs = {role: values * 8 for role, values in pairs.items()}
        given = write_adapter(tmp_path / f"{part}.gguf", pairs, arch=source.family.gguf_layout.arch)
        options: dict[str, Any] = {
            "quant": "f32", "adapters": [str(given)], "check": False, "threads": 1,
        }  # fmt: skip
        merged, beside = tmp_path / f"{part}-merged", tmp_path / f"{part}-beside"
        edgellm.convert(folder, merged, format="gguf", **options)
        edgellm.convert(folder, beside, format="gguf", keep_adapters=True, **options)
        wanted = llamacpp_logits.logits(merged / "model.gguf", ids)
        assert np.abs(wanted - plain).max() > 0.01
        with edgellm.open(beside, threads=1, kv_dtype="f32") as chat:
            session: Any = chat.session
            (file,) = beside.glob("adapter*.gguf")
            session.set_adapters([AdapterFile(file)])
            rows = session.prefill(ids, all_logits=True).copy()
        np.testing.assert_allclose(rows, wanted, rtol=0, atol=1e-3)


@pytest.mark.parametrize("layout", ["gptq", "compressed-tensors"])
def test_folders_of_codes_are_what_they_stand_for(
    layout: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """The convolution stays float in them, as transformers has it."""
    made = edgellm.convert(
        tiny_model("lfm2"), tmp_path / "out", format="hf", quant="rtn:int4-g32-sym",
        layout=layout, threads=1, check=False,
    )  # fmt: skip
    source = open_source(str(made.path), quantized=True)
    kernel = source.tensors["blk.0.shortconv.conv.weight"]
    exact = open_source(str(tiny_model("lfm2"))).tensors["blk.0.shortconv.conv.weight"]
    assert kernel.shape == exact.shape == (96, 1, 3)
    np.testing.assert_allclose(kernel.load(), exact.load(), rtol=0, atol=2e-3)


def test_bitsandbytes_leaves_the_products_of_steps_alone(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    """``dt_proj`` is a ``Linear`` in transformers, and a float in the folder."""
    pytest.importorskip("bitsandbytes", exc_type=ImportError)
    import torch

    made = edgellm.convert(
        tiny_model("mamba"), tmp_path / "out", format="hf", quant="rtn:int8-dynamic",
        layout="bitsandbytes", embed="f32", threads=1, check=False,
    )  # fmt: skip
    exact = tiny_models.load(tiny_model("mamba"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = tiny_models.load(made.path)
    for index in range(3):
        name = f"backbone.layers.{index}.mixer.dt_proj"
        module = model.get_submodule(name)
        assert type(module) is torch.nn.Linear
        assert torch.equal(module.weight, exact.get_submodule(name).weight)
    ids = torch.tensor([tiny_models.some_token_ids(24)])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found, wanted = (each(ids, use_cache=False).logits.numpy() for each in (model, exact))
    distance = np.sqrt(np.mean((found - wanted) ** 2) / np.var(wanted))
    assert distance < ROUNDED_BOUND


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
@pytest.mark.parametrize("layout", ["gptq", "awq", "compressed-tensors"])
def test_layouts_without_weights_refuse_state_spaces(
    layout: str, name: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedTarget, match="choose --layout bitsandbytes"):
        edgellm.convert(
            tiny_model(name), tmp_path / "out", format="hf", layout=layout, check=False,
            quant="rtn:int4-g32-sym",
        )  # fmt: skip
    assert not (tmp_path / "out").exists()
