"""Outlier channels apart: each product of the graph is LLM.int8()'s, written out in numpy."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

import onnx
import onnxruntime
import tiny_models
from safetensors.numpy import load_file, save_file

import edgellm
from edgellm.artifact import Artifact
from edgellm.calibration.splitting import split_source
from edgellm.conversion import carry_out
from edgellm.errors import UnsupportedTarget, UsageError
from edgellm.plan import Plan, make_plan
from edgellm.quant.grid import GRIDS
from edgellm.quant.llm_int8 import outliers
from edgellm.quant.statistics import Statistics
from edgellm.recipe import Recipe
from edgellm.source import open_source

TinyModel = Callable[[str], Path]
Array = npt.NDArray[np.float32]

TOKENS = 1024

MODULES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.down_proj": "ffn_down",
}


def planned(source: Path, quant: str = "llm_int8:int8-dynamic", **fields: Any) -> Plan:
    given = {"format": "onnx", "calibration_tokens": TOKENS, **fields}
    return make_plan(Recipe(source=str(source), quant=quant, **given), threads=1)


def found(artifact: Artifact) -> dict[str, Any]:
    assert artifact.manifest is not None
    of_weights: dict[str, Any] = artifact.manifest.measured["calibration"]["outliers"]
    return of_weights


def in_bytes(x: Array) -> Array:
    """``x`` through ONNX's DynamicQuantizeLinear and back."""
    low, high = min(x.min(), np.float32(0)), max(x.max(), np.float32(0))
    step = np.float32((high - low) / np.float32(255))
    zero = np.clip(np.rint(-low / step), 0, 255)
    return ((np.clip(np.rint(x / step) + zero, 0, 255) - zero) * step).astype(np.float32)


def llm_int8(x: Array, weight: Array, channels: list[int]) -> npt.NDArray[np.float64]:
    """``x @ weight.T`` as in section 3.2 of the paper, weights with one step a row."""
    rest = np.setdiff1d(np.arange(x.shape[-1]), channels)
    steps = np.abs(weight[:, rest]).max(axis=1, keepdims=True) / np.float32(127)
    codes = np.rint(weight[:, rest] / steps)
    apart = x[..., channels] @ weight[:, channels].astype(np.float16).T.astype(np.float64)
    return apart + in_bytes(x[..., rest]).astype(np.float64) @ (codes * steps).T


def tapped(folder: Path, ids: list[int]) -> dict[str, tuple[Array, Array]]:
    """Input and output of each product that is taken apart, by its name, as onnxruntime has them.

    The output ends a sum, one side of which begins at the input less its outliers.
    """
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    made = {name: node for node in model.graph.node for name in node.output}
    products = {}
    for node in model.graph.node:
        if node.op_type == "Add" and node.input[0] in made:
            product = made[node.input[0]]
            if product.op_type == "DynamicQuantizeMatMul":
                products[node.output[0]] = made[product.input[0]].input[0]
    names = sorted({*products, *products.values()} - {"logits"})
    for name in names:
        model.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
        model.graph.output[-1].type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    onnx.save(model, folder / "tapped.onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(folder / "tapped.onnx", options)
    inputs: dict[str, Any] = {
        "input_ids": np.asarray([ids]),
        "attention_mask": np.ones((1, len(ids)), np.int64),
        "logits_from": np.zeros(1, np.int64),
    }
    for given in session.get_inputs():
        if given.name.startswith("past"):
            inputs[given.name] = np.zeros((1, given.shape[1], 0, given.shape[3]), np.float32)
    values = dict(zip([*names, "logits"], session.run([*names, "logits"], inputs), strict=True))
    return {product: (values[x], values[product]) for product, x in products.items()}


@pytest.mark.parametrize(
    ("name", "fields", "count"),
    [
        ("llama", {"head": "int8-dynamic"}, 3 * 5 + 1),
        ("llama-biased", {}, 3 * 5),
        ("qwen3", {}, 3 * 7),  # its queries, keys and values are three products of one input
        ("gpt2", {}, 3 * 4),
    ],
)
def test_products_are_those_of_the_paper(
    name: str, fields: dict[str, str], count: int, tiny_model: TinyModel, tmp_path: Path
) -> None:
    plan = planned(tiny_model(name), **fields)
    artifact = carry_out(plan, tmp_path / "out", check=False)
    tensors, cuts = plan.source.tensors, found(artifact)
    stacked = {"attn_qkv": ["attn_q", "attn_k", "attn_v"]}
    products = tapped(artifact.path, tiny_models.some_token_ids(30))
    assert len(products) == count
    for product, (x, y) in products.items():
        layer, _, part = product.rpartition(".")
        parts = [part] if f"{layer}.{part}.weight" in tensors else stacked.get(part, [])
        roles = [f"{layer}.{each}.weight" for each in parts] or ["output.weight"]
        weight = np.concatenate([tensors[role].load() for role in roles])
        channels = cuts[roles[0]]["channels"]
        wanted = llm_int8(x, weight, channels)
        if (bias := f"{layer}.{part}.bias") in tensors:
            wanted += tensors[bias].load()[0]
        elif name == "llama-biased" and part == "attn_qkv":
            wanted += np.concatenate([tensors[f"{layer}.{each}.bias"].load()[0] for each in parts])
        np.testing.assert_allclose(y, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())
        kept = llm_int8(x, weight, [])[..., : y.shape[-1]]
        assert np.abs(y - kept).max() > 1e-3 * np.abs(wanted).max()


def test_channels_are_the_largest_of_what_transformers_computes(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    import torch

    plan = planned(tiny_model("llama"))
    cuts = found(carry_out(plan, tmp_path / "out", check=False))
    assert plan.calibration is not None
    assert plan.calibration.text is not None
    model = tiny_models.load(tiny_model("llama"))
    largest: dict[str, npt.NDArray[np.float32]] = {}

    def watch(role: str) -> Callable[..., None]:
        def look(_: Any, inputs: tuple[torch.Tensor]) -> None:
            sizes = inputs[0].abs().flatten(0, -2).amax(0).numpy()
            largest[role] = np.maximum(largest.get(role, sizes), sizes)

        return look

    for path, module in model.named_modules():
        for suffix, part in MODULES.items():
            if path.endswith(suffix):
                (layer,) = re.findall(r"\d+", path)
                module.register_forward_pre_hook(watch(f"blk.{layer}.{part}.weight"))
    with torch.no_grad():
        for window in plan.calibration.text.windows:
            model(torch.tensor(np.asarray(window)[None]))
    assert len(largest) == 12
    for role, sizes in largest.items():
        count = -(-len(sizes) // 64)
        assert cuts[role]["channels"] == sorted(np.argsort(-sizes)[:count].tolist())
        assert cuts[role]["largest"] == pytest.approx(sizes.max(), rel=1e-4)
        assert cuts[role]["largest_left"] == pytest.approx(np.sort(sizes)[-count - 1], rel=1e-4)
    assert cuts["blk.1.attn_q.weight"] == cuts["blk.1.attn_v.weight"]


@pytest.fixture(scope="module")
def uneven(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that computes the same with two channels before attention a hundredfold."""
    folder = tiny_models.copy_of(tiny_model("llama"), tmp_path_factory.mktemp("uneven") / "model")
    weights = load_file(folder / "model.safetensors")
    for layer in range(3):
        name = f"model.layers.{layer}"
        weights[f"{name}.input_layernorm.weight"][[5, 40]] *= 100
        for part in "qkv":
            weights[f"{name}.self_attn.{part}_proj.weight"][:, [5, 40]] /= 100
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def error_of(source: Path, quant: str, out: Path) -> float:
    fields = {"calibration_tokens": TOKENS} if ":" in quant else {}
    edgellm.convert(source, out, format="onnx", quant=quant, check=False, threads=1, **fields)
    ids = tiny_models.some_token_ids(40)
    wanted = tiny_models.reference_logits(source, ids)
    with edgellm.open(out, threads=1, context_tokens=64) as session:
        got = session.session.prefill(ids, all_logits=True)
    return float(np.sqrt(np.mean((got - wanted) ** 2) / np.var(wanted)))


def test_outliers_spoil_nothing_once_they_are_apart(uneven: Path, tmp_path: Path) -> None:
    plain = error_of(uneven, "int8-dynamic", tmp_path / "plain")
    apart = error_of(uneven, "llm_int8:int8-dynamic", tmp_path / "apart")
    both = error_of(uneven, "smoothquant+llm_int8:int8-dynamic", tmp_path / "both")
    assert apart < 0.2 * plain
    assert both < 0.2 * plain


def test_columns_that_are_kept_as_floats_are_no_more_weights(tiny_model: TinyModel) -> None:
    source = tiny_model("llama")
    plain, apart = planned(source, "int8-dynamic", calibration_tokens=None), planned(source)
    assert apart.layout.weights == plain.layout.weights
    assert apart.bits_per_weight > plain.bits_per_weight


def test_a_solver_after_it_and_any_number_of_threads(tiny_model: TinyModel, tmp_path: Path) -> None:
    """gptq hands errors on to later columns, of which those that are cut out must stay zero."""
    made = []
    for threads in (1, 3):
        recipe = Recipe(
            source=str(tiny_model("llama")), format="onnx",
            quant="llm_int8+gptq:int8-dynamic", calibration_tokens=TOKENS,
        )  # fmt: skip
        plan = make_plan(recipe, threads=threads)
        made.append(carry_out(plan, tmp_path / str(threads), check=False))
    one, three = ((each.path / "model.onnx.data").read_bytes() for each in made)
    assert one == three
    cuts = found(made[0])
    for tensor in plan.layout.tensors:
        if tensor.grid.kind == "per_channel":
            codes = tensor.arrays[0]
            stored = np.frombuffer(one, np.int8, codes.nbytes, codes.offset)
            channels = cuts[tensor.parts[0].role]["channels"]
            assert not stored.reshape(tensor.rows, -1)[:, channels].any()
            assert stored.any()


def test_what_was_recorded_restores_the_cuts(tiny_model: TinyModel) -> None:
    source = open_source(str(tiny_model("llama")))
    role = "blk.1.ffn_down.weight"
    grids = {role: GRIDS["int8-dynamic"], "blk.1.ffn_up.weight": GRIDS["int4-g32"]}
    x = np.random.default_rng(0).standard_normal((50, 160)).astype(np.float32)
    given = Statistics(x.T @ x / np.float32(50), np.abs(x).max(axis=0), 50)
    split, splitting = split_source(source, outliers, grids)
    with pytest.raises(AssertionError, match=r"fill_layer\(1, ...\) first"):
        split.tensors[role].load()
    splitting.fill_layer(1, {role: given}, grids)
    again, restored = split_source(source, outliers, grids)
    restored.restore(1, splitting.factors(1))
    assert restored.figures() == splitting.figures()
    added = set(split.tensors) - set(source.tensors)
    assert added == {"blk.1.ffn_down.outliers", "blk.1.ffn_down.outlier_channels"}
    for each in (role, *added):
        np.testing.assert_array_equal(again.tensors[each].load(), split.tensors[each].load())


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"format": "gguf", "quant": "llm_int8:q8_0"}, UsageError, "leave it out of"),
        (
            {"format": "hf", "quant": "llm_int8:int8-dynamic"},
            UnsupportedTarget,
            "bitsandbytes looks for outliers when it runs",
        ),
        ({"quant": "llm_int8:int4-g32"}, UsageError, "--quant llm_int8:int8-dynamic"),
        ({"quant": "llm_int8+smoothquant:int8-dynamic"}, UsageError, r"smoothquant\+llm_int8"),
        ({"tune": 4}, UsageError, "--tune reads rounded weights back whole, and llm_int8"),
        (
            {"calibrate_on": "quantized", "quant": "llm_int8+gptq:int8-dynamic"},
            UsageError,
            "calibrate_on quantized reads rounded weights back whole",
        ),
    ],
)
def test_what_cannot_hold_it_is_refused(
    fields: dict[str, Any], error: type[Exception], message: str, tiny_model: TinyModel
) -> None:
    with pytest.raises(error, match=message):
        planned(tiny_model("llama"), **{"quant": "llm_int8:int8-dynamic", **fields})


def test_a_head_that_is_the_embedding_cannot_be_cut(tiny_model: TinyModel) -> None:
    with pytest.raises(UsageError, match="choose --head int8"):
        planned(tiny_model("qwen2"), head="int8-dynamic")


def test_bitsandbytes_takes_outliers_apart_by_the_threshold_of_the_folder(
    uneven: Path, tmp_path: Path
) -> None:
    """Its columns apart are of the rounded weight, which keeps some error here: a hundredth of the
    others' size is a step or two. On a CPU it takes them apart outside of training alone."""
    pytest.importorskip("bitsandbytes")
    torch = pytest.importorskip("torch")
    import transformers

    out = tmp_path / "out"
    edgellm.convert(uneven, out, format="hf", layout="bitsandbytes", quant="int8-dynamic")
    settings = json.loads((out / "config.json").read_text())["quantization_config"]
    assert settings["llm_int8_threshold"] == 6.0
    ids = tiny_models.some_token_ids(40)
    wanted = tiny_models.reference_logits(uneven, ids)
    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    for parameter in model.parameters():  # it keeps the dtype of the folder
        if parameter.dtype == torch.float16:
            parameter.data = parameter.data.float()
    model.eval()

    def error() -> float:
        with torch.no_grad():
            got = model(torch.tensor([ids]), use_cache=False).logits[0].numpy()
        return float(np.sqrt(np.mean((got - wanted) ** 2) / np.var(wanted)))

    states = [module.state for module in model.modules() if hasattr(module, "state")]
    assert [state.threshold for state in states] == [6.0] * (3 * 7)
    apart = error()
    for state in states:
        state.threshold = 0.0
    assert apart < 0.6 * error()
