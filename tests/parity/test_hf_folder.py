"""Folders in every layout, from the model to the logits of the libraries that read them.

Each is loaded by transformers with the library that the layout belongs to, and answers as the
original does with the values that the codes stand for. GPTQ and AWQ need gptqmodel for that, which
asks for a newer torch than the other tests: those skip where it is missing. To run them::

    pip install optimum==2.3.0 pypcre logbar tokenicer device-smi defuser datasets dill pillow
    pip install --no-deps gptqmodel==7.7.0 torchao
    GPTQMODEL_CPU_WORKERS=2 pytest tests/parity/test_hf_folder.py -W default
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tiny_models
from safetensors import safe_open

import edgellm
from edgellm import slabs
from edgellm.artifact import open_artifact, verify
from edgellm.errors import EdgeError, UnsupportedTarget, UsageError
from edgellm.export import checkpoint_shards
from edgellm.export.hf_layouts import LAYOUTS
from edgellm.export.layout import OutputTensor
from edgellm.plan import Plan, make_plan
from edgellm.quant import floats
from edgellm.quant.dequantize import dequantize
from edgellm.quant.rtn import solve
from edgellm.recipe import Recipe
from edgellm.source import open_source
from edgellm.tensors import stacked_rows

torch = pytest.importorskip("torch")

TinyModel = Callable[[str], Path]

CELLS = (
    ("gptq", "int4-g32-sym"),
    ("gptq_v2", "int4-g64"),
    ("gptq_v2", "int4-g128-sym"),
    ("awq", "int4-g128"),
    ("awq", "int4-g64-sym"),
    ("compressed-tensors", "int4-g32"),
    ("compressed-tensors", "int4-g64-sym"),
    ("compressed-tensors", "int8"),
    ("compressed-tensors", "int8-dynamic"),
    ("bitsandbytes", "nf4"),
    ("bitsandbytes", "nf4-dq"),
    ("bitsandbytes", "int8-dynamic"),
)
"""Each layout with each kind of storage; the other groups differ by a number."""

NEEDS = {
    "gptq": "gptqmodel",
    "gptq_v2": "gptqmodel",
    "awq": "gptqmodel",
    "compressed-tensors": "compressed_tensors",
    "bitsandbytes": "bitsandbytes",
}

DEQUANTIZED_FIRST = ("compressed-tensors", "int4-g32")
"""transformers 5.23 loads zeros of this layout no other way, whoever wrote them: in f16."""

BOUNDS = {"gptqmodel": 3e-3, "compressed_tensors": 1e-5, "bitsandbytes": 1e-5}
"""How far logits may lie from those of the values, as a part of their spread: float32 where the
library computes in it, products in f16 with gptqmodel."""

DYNAMIC_BOUND = 0.06
"""Where activations are rounded to 8 bits too, a token at a time."""

TOKENS = tiny_models.some_token_ids(24)


@pytest.fixture(autouse=True)
def uncompiled() -> Iterator[None]:
    """The libraries compile kernels for every new shape, which takes seconds each."""
    before = torch._dynamo.config.disable
    torch._dynamo.config.disable = True
    yield
    torch._dynamo.config.disable = before


def converted(source: Path, out: Path, layout: str | None, grid: str, **options: Any) -> Path:
    edgellm.convert(
        source, out, format="hf", layout=layout, quant=f"rtn:{grid}", threads=2, check=False,
        **options,
    )  # fmt: skip
    return out


@pytest.fixture(scope="module")
def folder(
    tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Path]:
    """The llama whose rows every group divides, in a layout, converted once."""
    made: dict[tuple[str, str], Path] = {}

    def convert(layout: str, grid: str) -> Path:
        if (layout, grid) not in made:
            out = tmp_path_factory.mktemp("hf") / f"{layout}-{grid}"
            made[layout, grid] = converted(tiny_model("llama-256"), out, layout, grid)
        return made[layout, grid]

    return convert


def plan_of(source: Path, layout: str | None, grid: str) -> Plan:
    quant = f"rtn:{grid}"
    return make_plan(Recipe(source=str(source), format="hf", layout=layout, quant=quant))


def values_of(tensor: OutputTensor) -> npt.NDArray[np.float32]:
    """What ``tensor`` stands for, in the shape of the model's; from the solver, not from a file."""
    rows = stacked_rows(tensor.parts, 0, tensor.rows)
    solved = solve(rows, tensor.grid)
    if solved.packed is not None:
        return floats.decode(solved.packed, tensor.grid.name).reshape(tensor.shape)
    return dequantize(solved)


def float_model(source: Path, layout: str | None, grid: str) -> Any:
    """The original in float32, its weights those that the codes stand for."""
    model = tiny_models.load(source)
    state = {
        tensor.name: torch.from_numpy(values_of(tensor).copy())
        for tensor in plan_of(source, layout, grid).layout.tensors
    }
    model.load_state_dict(state, strict=False)
    return model


def logits_of(model: Any) -> npt.NDArray[np.float32]:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found: npt.NDArray[np.float32] = (
            model(torch.tensor([TOKENS]), use_cache=False).logits[0].float().numpy()
        )
    return found


def loaded(path: Path, layout: str, dtype: str = "float32") -> Any:
    """The model of ``path`` as transformers and the library of ``layout`` load it."""
    import transformers

    settings: dict[str, Any] = {"dtype": getattr(torch, dtype), "attn_implementation": "eager"}
    if layout == "compressed-tensors":
        settings["quantization_config"] = transformers.CompressedTensorsConfig(
            dequantize=path.name == "-".join(DEQUANTIZED_FIRST)
        )
    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(path, **settings)
    if layout != "bitsandbytes":
        return model.eval()
    for parameter in model.parameters():  # it keeps the dtype of the folder, whatever is asked for
        if parameter.dtype == torch.float16:
            parameter.data = parameter.data.float()
    model.eval()
    for module in model.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = torch.float32
            module.train()  # in eval mode its kernels for AVX512 compute in bf16
    return model


def distance(found: npt.NDArray[np.float32], wanted: npt.NDArray[np.float32]) -> float:
    return float(np.sqrt(np.mean((found - wanted) ** 2) / np.var(wanted)))


@pytest.mark.parametrize(("layout", "grid"), CELLS)
def test_the_libraries_answer_as_the_values_do(
    layout: str, grid: str, folder: Callable[[str, str], Path], tiny_model: TinyModel
) -> None:
    library = NEEDS[layout]
    pytest.importorskip(library, exc_type=ImportError)
    if library == "gptqmodel":
        pytest.importorskip("optimum.gptq", exc_type=ImportError)
    model = loaded(folder(layout, grid), layout, "float16" if library == "gptqmodel" else "float32")
    source = tiny_model("llama-256")
    reference = float_model(source, layout, grid)
    if (layout, grid) == DEQUANTIZED_FIRST:
        for module in reference.model.layers.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.data = module.weight.data.half().float()
    wanted = logits_of(reference)
    bound = DYNAMIC_BOUND if grid == "int8-dynamic" else BOUNDS[library]
    assert distance(logits_of(model), wanted) < bound
    if grid != "int8-dynamic":  # the bound tells these values from the original's
        assert distance(logits_of(tiny_models.load(source)), wanted) > 2 * bound


@pytest.mark.parametrize(("layout", "grid"), CELLS)
def test_our_own_readers_get_the_values_back(
    layout: str, grid: str, folder: Callable[[str, str], Path], tiny_model: TinyModel
) -> None:
    source = open_source(str(folder(layout, grid)), quantized=True)
    for tensor in plan_of(tiny_model("llama-256"), layout, grid).layout.tensors:
        found, expected = source.tensors[tensor.role].load(), values_of(tensor)
        if tensor.packer == "bnb_int8":  # in another order of products (test_hf_packing)
            np.testing.assert_array_max_ulp(found, expected, 3)
        else:
            rounded = floats.rounded(expected, "f16").reshape(found.shape)
            np.testing.assert_array_equal(found, rounded, err_msg=tensor.name)


@pytest.mark.parametrize(
    ("name", "layout", "grid"),
    [
        ("llama-256", None, "bf16"),
        ("llama-biased", None, "f16"),
        ("gpt2", None, "f32"),
        ("gpt_neox", None, "f32"),
        ("falcon-grouped", None, "f32"),
        ("opt", None, "f32"),
        ("bloom", None, "f32"),
        ("mpt", None, "f32"),
        ("gptj", None, "f32"),
        ("gemma3", None, "f32"),
    ],
)
def test_floats_are_what_transformers_loads(
    name: str, layout: None, grid: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    source = tiny_model(name)
    out = converted(source, tmp_path / "out", layout, grid)
    found, wanted = tiny_models.load(out), tiny_models.load(source)
    config = json.loads((out / "config.json").read_text())
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}[grid]
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    assert "quantization_config" not in config
    for key, value in wanted.state_dict().items():
        assert torch.equal(found.state_dict()[key], value.to(dtype).float()), key


@pytest.mark.parametrize(
    ("layout", "grid"), [("gptq", "int4-g32-sym"), ("bitsandbytes", "int8-dynamic")]
)
def test_matrices_that_a_checkpoint_turns_round(
    layout: str, grid: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """GPT-2's Conv1D, which every layout quantizes as ``[out, in]``."""
    source = tiny_model("gpt2")
    out = converted(source, tmp_path / "out", layout, grid)
    read = open_source(str(out), quantized=True)
    tensors = plan_of(source, layout, grid).layout.tensors
    for tensor in tensors:
        found, expected = read.tensors[tensor.role].load(), values_of(tensor)
        if tensor.packer == "bnb_int8":
            np.testing.assert_array_max_ulp(found, expected, 3)
        else:
            rounded = floats.rounded(expected, "f16").reshape(found.shape)
            np.testing.assert_array_equal(found, rounded, err_msg=tensor.name)
    if layout == "bitsandbytes":
        wanted = logits_of(tiny_models.load(source))
        assert distance(logits_of(loaded(out, layout)), wanted) < DYNAMIC_BOUND


@pytest.mark.parametrize(
    ("layout", "grid"), [("bitsandbytes", "nf4"), ("compressed-tensors", "int8")]
)
def test_rows_that_a_checkpoint_has_in_another_order(
    layout: str, grid: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """GPT-NeoX's queries, keys and values, which a checkpoint has head by head."""
    source = tiny_model("gpt_neox")
    out = converted(source, tmp_path / "out", layout, grid)
    read = open_source(str(out), quantized=True)
    for tensor in plan_of(source, layout, grid).layout.tensors:
        expected = values_of(tensor).reshape(tensor.shape)
        row = next(row for row in read.family.tensors(read.decoder) if row.role == tensor.role)
        if row.order is not None:
            expected = expected[row.order.places()]
        rounded = floats.rounded(expected, "f16")
        found = read.tensors[tensor.role].load().reshape(tensor.shape)
        np.testing.assert_array_equal(found, rounded, err_msg=tensor.name)
    wanted = logits_of(float_model(source, layout, grid))
    assert distance(logits_of(loaded(out, layout)), wanted) < 1e-2


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.iterdir() if path.name != "manifest.json")
    return {path.name: path.read_bytes() for path in files}


@pytest.mark.parametrize(
    ("layout", "grid"),
    [("gptq", "int4-g32-sym"), ("awq", "int4-g128"), ("compressed-tensors", "int4-g32")],
)
def test_slabs_and_threads_change_no_byte(
    layout: str,
    grid: str,
    folder: Callable[[str, str], Path],
    tiny_model: TinyModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(slabs, "SLAB_BYTES", 4 * 256 * 9)  # nine rows: eight are taken
    tensors = plan_of(tiny_model("llama-256"), layout, grid).layout.tensors
    cut = {tensor.packer: slabs.slab_rows(tensor) for tensor in tensors if tensor.columns == 256}
    assert set(cut.values()) == {8, 9}
    out = converted(tiny_model("llama-256"), tmp_path / "out", layout, grid)
    assert contents(out) == contents(folder(layout, grid))


def test_the_file_is_one_that_safetensors_reads_and_every_tensor_is_aligned(
    folder: Callable[[str, str], Path],
) -> None:
    for layout, grid in CELLS:
        path = folder(layout, grid) / "model.safetensors"
        with safe_open(path, "np") as file:
            names = set(file.keys())
            assert file.metadata() == {"format": "pt"}
        with path.open("rb") as raw:
            header = json.loads(raw.read(int.from_bytes(raw.read(8), "little")))
        header.pop("__metadata__")
        assert names == set(header)
        for entry in header.values():
            item = {"I64": 8, "I32": 4, "F32": 4, "F16": 2, "U8": 1, "I8": 1}[entry["dtype"]]
            assert entry["data_offsets"][0] % item == 0


def test_a_large_model_is_cut_into_shards(
    folder: Callable[[str, str], Path],
    tiny_model: TinyModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layout, grid = "bitsandbytes", "nf4"
    monkeypatch.setattr(checkpoint_shards, "SHARD_BYTES", 300_000)
    out = converted(tiny_model("llama-256"), tmp_path / "out", layout, grid)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(shards) == 5
    assert shards[0] == "model-00001-of-00005.safetensors"
    assert sorted(set(index["weight_map"].values())) == shards
    verify(open_artifact(out))
    whole = open_source(str(folder(layout, grid)), quantized=True)
    read = open_source(str(out), quantized=True)
    for role, ref in whole.tensors.items():
        np.testing.assert_array_equal(read.tensors[role].load(), ref.load())
    if pytest.importorskip("bitsandbytes"):
        one, many = (logits_of(loaded(each, layout)) for each in (folder(layout, grid), out))
        np.testing.assert_array_equal(one, many)


def test_the_folder_says_what_it_is(folder: Callable[[str, str], Path]) -> None:
    out = folder("awq", "int4-g128")
    artifact = open_artifact(out)
    verify(artifact)
    assert artifact.manifest is not None
    made = artifact.manifest.artifact
    assert (made.container, made.recipe["layout"]) == ("hf", "awq")
    assert {tensor.grid for tensor in made.tensors} == {"int4-g128", "f16"}
    assert any("transformers loads it with gptqmodel" in note for note in made.notes)
    with pytest.raises(EdgeError, match=r"quantized already \(awq\)"):
        open_source(str(out))
    (out.parent / "changed").mkdir()
    for name, content in contents(out).items():
        (out.parent / "changed" / name).write_bytes(content)
    (out.parent / "changed" / "manifest.json").write_bytes((out / "manifest.json").read_bytes())
    file = out.parent / "changed" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[made.tensors[3].arrays[0][1]] ^= 1
    file.write_bytes(data)
    with pytest.raises(EdgeError, match=f"differs in {made.tensors[3].name}"):
        verify(open_artifact(out.parent / "changed"))


REFUSALS: tuple[tuple[Mapping[str, Any], type[EdgeError], str], ...] = (
    ({"layout": "gtpq"}, UsageError, "did you mean gptq"),
    ({"quant": "int4-g32", "layout": "gptq"}, UnsupportedTarget, "--layout awq or compressed"),
    ({"quant": "nf4", "layout": "awq"}, UnsupportedTarget, "--layout bitsandbytes, or int4-g32"),
    ({"quant": "f16", "layout": "awq"}, UnsupportedTarget, "cannot hold f16"),
    ({"quant": "q4_0"}, UnsupportedTarget, "the same values are int4-g32-sym"),
    ({"quant": "q4_k"}, UnsupportedTarget, "blocks like ggml's"),
    ({"quant": "int5"}, EdgeError, "no grid of that name"),
    ({"quant": "int4-g32-sym", "embed": "bf16"}, UnsupportedTarget, "--embed bf16.*are f16"),
    ({"quant": "nf4", "embed": "int8"}, UnsupportedTarget, "f16 or bf16 or f32"),
    ({"quant": "nf4", "embed": "bf16", "head": "f32"}, UsageError, "one dtype"),
    ({"quant": "nf4", "kv_cache": "int8"}, UnsupportedTarget, "--kv-cache"),
    ({"quant": "nf4", "context": 32}, UnsupportedTarget, "--context 32"),
    ({"format": "onnx", "layout": "awq"}, UsageError, "onnx lays codes out in one way"),
)


@pytest.mark.parametrize(("asked", "error", "said"), REFUSALS)
def test_what_cannot_be_is_refused_before_a_weight_is_read(
    asked: Mapping[str, Any], error: type[EdgeError], said: str, tiny_model: TinyModel
) -> None:
    recipe = Recipe(**{"source": str(tiny_model("llama-256")), "format": "hf", **asked})
    with pytest.raises(error, match=said):
        make_plan(recipe)


def test_groups_and_layers_that_do_not_fit_are_named(tiny_model: TinyModel) -> None:
    with pytest.raises(UnsupportedTarget, match=r"q_proj.weight \(96\).*Choose .*int4-g32"):
        plan_of(tiny_model("llama"), "awq", "int4-g128")
    with pytest.raises(UnsupportedTarget, match="Conv1D: choose --layout gptq"):
        plan_of(tiny_model("gpt2"), "awq", "int4-g32-sym")
    with pytest.raises(UnsupportedTarget, match="Conv1D: choose a grid that gptq or bitsandbytes"):
        plan_of(tiny_model("gpt2"), "compressed-tensors", "int8")


def test_layouts_go_by_the_grid_where_none_is_named(tiny_model: TinyModel) -> None:
    source = str(tiny_model("llama-256"))
    found = {
        grid: make_plan(Recipe(source=source, format="hf", quant=grid)).recipe.layout
        for grid in ("int4-g32-sym", "int4-g32", "int8", "int8-dynamic", "nf4", "nf4-dq", "f16")
    }
    assert found == {
        "int4-g32-sym": "gptq",
        "int4-g32": "awq",
        "int8": "compressed-tensors",
        "int8-dynamic": "compressed-tensors",
        "nf4": "bitsandbytes",
        "nf4-dq": "bitsandbytes",
        "f16": None,
    }
    plan = make_plan(Recipe(source=source, layout="gptq"))
    assert (plan.recipe.format, plan.recipe.grid) == ("hf", "int4-g64-sym")


def test_every_cell_is_one_of_the_table() -> None:
    assert {layout for layout, _ in CELLS} == set(LAYOUTS)
    for layout, grid in CELLS:
        assert grid in LAYOUTS[layout]
    stored = {id(LAYOUTS[layout][grid]) for layout, grid in CELLS}
    assert stored == {id(storage) for held in LAYOUTS.values() for storage in held.values()}
