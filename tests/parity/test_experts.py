"""Mixtures of experts from checkpoint to answer, against transformers and llama.cpp."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

import onnx_files
import reference_decoder
import tiny_models
from gguf_files import write_gguf

import edgellm
from edgellm.architectures import family_of
from edgellm.architectures.config import Config
from edgellm.architectures.decoder import Router
from edgellm.architectures.experts import active_weights, expert_of, stack_of
from edgellm.calibration import cost, passes, routing, running
from edgellm.calibration.passes import CalibrationPass
from edgellm.calibration.stored_layers import as_stored
from edgellm.conversion import convert
from edgellm.errors import (
    AdapterError,
    SourceError,
    TensorError,
    UnsupportedModel,
    UnsupportedTarget,
)
from edgellm.export import feed_forward_graph
from edgellm.export.to_onnx import lay_out
from edgellm.export.writer import StagedFolder
from edgellm.plan import make_plan
from edgellm.profiling.matrices import counted, of_gguf, of_manifest
from edgellm.quant import rtn
from edgellm.quant.grid import GRIDS
from edgellm.quant.statistics import Statistics
from edgellm.recipe import Recipe
from edgellm.slabs import values_of, write_tensors
from edgellm.source import open_source
from edgellm.source.gguf_file import read_gguf
from edgellm.source.model import ModelSource
from edgellm.tensors import constant

TinyModel = Callable[[str], Path]

FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "granitemoeshared")

TOLERANCE = 2e-4

WINDOWS = [tiny_models.some_token_ids(length, seed=length) for length in (40, 17, 1, 33)]


# --- sources


@pytest.mark.parametrize("name", FAMILIES)
def test_both_spellings_of_a_checkpoint_are_one_model(
    name: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """One tensor for each expert, as on the Hub, and transformers' own stacks."""
    folder = tiny_model(name)
    model = tiny_models.load(folder)
    stacked = tiny_models.copy_of(folder, tmp_path / "stacked")
    model.save_pretrained(stacked, save_original_format=False)
    source, other = open_source(str(folder)), open_source(str(stacked))
    names = {ref.name for ref in other.tensors.values()}
    assert any("gate_up_proj, expert 3" in name for name in names)
    assert source.tensors.keys() == other.tensors.keys()
    for role, ref in source.tensors.items():
        np.testing.assert_array_equal(ref.load(), other.tensors[role].load(), err_msg=role)
        np.testing.assert_array_equal(ref.load(1, 3), other.tensors[role].load(1, 3)) if (
            ref.rows > 3
        ) else None


@pytest.mark.parametrize("name", FAMILIES)
def test_a_gguf_file_is_read_back_as_the_checkpoint_was(
    name: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    folder, path = tiny_model(name), tmp_path / "model.gguf"
    write_gguf(folder, path)
    source, again = open_source(str(folder)), open_source(str(path))
    assert source.decoder.layers == again.decoder.layers
    assert again.family.model_type == {"mixtral": "mixtral"}.get(name, name)
    assert source.tensors.keys() == again.tensors.keys()
    for role, ref in source.tensors.items():
        assert again.tensors[role].shape == ref.shape
        np.testing.assert_array_equal(again.tensors[role].load(), ref.load(), err_msg=role)


def _without(folder: Path, to: Path, dropped: Callable[[str], bool]) -> Path:
    from safetensors.numpy import load_file, save_file

    copy = tiny_models.copy_of(folder, to)
    tensors = load_file(copy / "model.safetensors")
    kept = {name: values for name, values in tensors.items() if not dropped(name)}
    save_file(kept, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def _with_config(folder: Path, to: Path, **changes: object) -> Path:
    copy = tiny_models.copy_of(folder, to)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | changes))
    return copy


def test_missing_experts_are_listed_in_runs(tiny_model: TinyModel, tmp_path: Path) -> None:
    copy = _without(
        tiny_model("mixtral"),
        tmp_path / "copy",
        lambda name: (
            ".1.block_sparse_moe.experts." in name and ".w1." in name and ".3." not in name
        ),
    )
    with pytest.raises(
        TensorError, match=r"4 tensors are missing: \S+\.experts\.0-2,4\.w1\.weight"
    ):
        open_source(str(copy))


def test_a_config_of_more_experts_than_there_are(tiny_model: TinyModel, tmp_path: Path) -> None:
    apart = _with_config(tiny_model("mixtral"), tmp_path / "apart", num_local_experts=8)
    with pytest.raises(TensorError, match=r"27 tensors are missing: .*experts\.5-7\.w1\.weight"):
        open_source(str(apart))
    stacked = _with_config(tiny_model("granitemoe"), tmp_path / "stacked", num_local_experts=8)
    with pytest.raises(TensorError, match=r"config says 8 experts and the weights are of 5"):
        open_source(str(stacked))


def test_more_experts_a_token_than_there_are(tiny_model: TinyModel, tmp_path: Path) -> None:
    copy = _with_config(tiny_model("olmoe"), tmp_path / "copy", num_experts_per_tok=10)
    with pytest.raises(UnsupportedModel, match="per_tok is 10, expected at most the 9 experts"):
        open_source(str(copy))


def test_a_stack_cut_short_in_a_gguf_file(tiny_model: TinyModel, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(tiny_model("mixtral"), path)
    content = path.read_bytes()
    path.write_bytes(content[:-4096])
    with pytest.raises(SourceError, match="cut short"):
        open_source(str(path))


@pytest.mark.parametrize("last", [0, 2, 5])
def test_windows_of_configs_that_do_not_list_them(last: int) -> None:
    import transformers

    real = transformers.Qwen2MoeConfig(
        num_hidden_layers=5, use_sliding_window=True, sliding_window=64, max_window_layers=last
    )
    saved = real.to_dict()
    types = saved.pop("layer_types")
    decoder = family_of(saved).describe(Config(saved))
    assert [layer.window for layer in decoder.layers] == [
        64 if kind == "sliding_attention" else None for kind in types
    ]


# --- what calibration knows


class Sent:
    """What transformers gives each expert, and the stream before and after each layer."""

    def __init__(self, folder: Path) -> None:
        import torch

        self.inputs: dict[str, list[np.ndarray]] = {}
        self.places: dict[str, list[np.ndarray]] = {}
        self.streams: dict[int, tuple[list[np.ndarray], list[np.ndarray]]] = {}
        self.first = 0
        model = tiny_models.load(folder)
        for index, layer in enumerate(model.model.layers):
            self.streams[index] = ([], [])
            layer.register_forward_hook(self._watch_layer(index))
            block = getattr(layer, "mlp", None) or layer.block_sparse_moe
            if hasattr(block, "experts"):
                block.experts.register_forward_pre_hook(self._watch(index))
        with torch.no_grad():
            for window in WINDOWS:
                model(torch.tensor([window]), use_cache=False)
                self.first += len(window)

    def _watch_layer(self, index: int) -> Callable[..., None]:
        def hook(module: object, given: tuple, out: object) -> None:
            stream = out[0] if isinstance(out, tuple) else out
            before, after = self.streams[index]
            before.append(given[0].reshape(-1, given[0].shape[-1]).numpy().copy())
            after.append(stream.reshape(-1, stream.shape[-1]).numpy().copy())

        return hook

    def _watch(self, index: int) -> Callable[..., None]:
        import torch

        def hook(module: torch.nn.Module, given: tuple) -> None:
            x, chosen, _ = given
            for expert in range(len(module.down_proj)):
                rows = torch.where((chosen == expert).any(dim=-1))[0]
                gate, up = (x[rows] @ module.gate_up_proj[expert].T).chunk(2, dim=-1)
                inner = module.act_fn(gate) * up
                for part, values in (("gate", x[rows]), ("up", x[rows]), ("down", inner)):
                    role = f"blk.{index}.ffn_{part}_exps.{expert}.weight"
                    self.inputs.setdefault(role, []).append(values.numpy().copy())
                    self.places.setdefault(role, []).append(rows.numpy() + self.first)

        return hook


def gathered(source: ModelSource, threads: int, **options: object) -> dict[str, Statistics]:
    run = CalibrationPass(source, WINDOWS, threads=threads, **options)
    run.begin()
    found: dict[str, Statistics] = {}
    for index in range(len(source.decoder.layers)):
        found |= run.layer(index)
    return found


@pytest.mark.parametrize("name", [*FAMILIES, "qwen3_moe-dense"])
def test_statistics_are_of_the_tokens_that_an_expert_is_sent(
    name: str, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "CHUNK_TOKENS", 50)  # several chunks
    monkeypatch.setattr(routing, "FEW_TOKENS", 1)
    folder = tiny_model(name)
    source, sent = open_source(str(folder)), Sent(folder)
    found = gathered(source, threads=2)
    experts = {role for role in source.tensors if stack_of(role)}
    assert experts
    assert experts == sent.inputs.keys()
    for role in experts:
        x = np.concatenate(sent.inputs[role]).astype(np.float64)
        places = np.concatenate(sent.places[role])
        statistics = found[role]
        assert statistics.tokens == len(x), role
        before, after = (np.concatenate(each) for each in sent.streams[int(role.split(".")[1])])
        counts = passes.token_weights(before, after)[1][places].astype(np.float64)
        wanted = (x * counts[:, None]).T @ x / counts.sum()
        scale = wanted.max()
        np.testing.assert_allclose(statistics.hessian, wanted, rtol=0, atol=TOLERANCE * scale)
        np.testing.assert_allclose(statistics.largest, np.abs(x).max(axis=0), rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(
            statistics.mean_squares, np.square(x).mean(axis=0), rtol=1e-2, atol=TOLERANCE * scale
        )


def test_bits_do_not_depend_on_threads(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "CHUNK_TOKENS", 20)
    source = open_source(str(tiny_model("qwen2_moe")))
    one, other = gathered(source, threads=1), gathered(source, threads=3)
    for role, statistics in one.items():
        np.testing.assert_array_equal(statistics.hessian, other[role].hessian, err_msg=role)


def test_experts_hardly_reached_are_rounded_by_what_is_known_of_all(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(str(tiny_model("mixtral")))
    monkeypatch.setattr(routing, "FEW_TOKENS", 1)
    counts = {role: each.tokens for role, each in gathered(source, 1).items()}
    few = sorted(counts[role] for role in counts if "_down_exps" in role)[3]
    monkeypatch.setattr(routing, "FEW_TOKENS", few)
    found = gathered(source, 1)
    for role, statistics in found.items():
        if not stack_of(role):
            continue
        layer = role.split(".")[1]
        whole = found[f"blk.{layer}.ffn_gate_inp.weight"]
        if not statistics.instead:
            assert statistics.tokens >= few
        elif "_down_exps" in role:
            np.testing.assert_array_equal(statistics.hessian, np.eye(len(statistics.hessian)))
        else:
            np.testing.assert_array_equal(statistics.hessian, whole.hessian)
    assert {expert_of(role) for role, each in found.items() if each.instead}


# --- conversions


def converted(folder: Path, out: Path, quant: str, format: str, **options: object) -> object:
    return edgellm.convert(str(folder), out, quant=quant, format=format, **options)


def test_what_cannot_be_done_with_experts_is_refused_by_name(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    folder, out = tiny_model("mixtral"), tmp_path / "out"
    with pytest.raises(UnsupportedTarget, match="experts of a layer as one tensor"):
        converted(folder, out, "int4-g32-sym", "hf")
    with pytest.raises(UnsupportedTarget, match="--tune trains dense networks, and mixtral"):
        converted(folder, out, "q4_0", "gguf", tune=10)
    with pytest.raises(UnsupportedTarget, match="not known of experts that few tokens pass"):
        converted(folder, out, "gptq", "gguf", bits=4.0)
    with pytest.raises(UnsupportedTarget, match="mlx-lm's mixtral is not understood"):
        converted(folder, out, "int8", "mlx")
    assert not out.exists()


BOUNDS = {"f16": 5e-3, "int8": 0.15, "int8-dynamic": 0.3, "int4-g64": 0.8, "nf4": 0.8}
"""As those of ``test_every_grid``; a token that goes to another expert shows at once."""


@pytest.mark.parametrize("quant", BOUNDS)
def test_every_kind_of_grid_answers_nearly_as_the_original(
    quant: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """One operator for all experts where there is one for the grid, and plain ones elsewhere."""
    folder, ids = tiny_model("olmoe"), tiny_models.some_token_ids(40)
    wanted = tiny_models.reference_logits(folder, ids)
    converted(folder, tmp_path / "out", f"rtn:{quant}", "onnx", check=False)
    operators = edgellm.inspect(tmp_path / "out" / "model.onnx").metadata["operators"]
    assert ("QMoE" in operators) == (quant in ("int8", "int4-g64"))
    for steps in ((), (3,)):
        got = onnx_files.logits(tmp_path / "out", ids, steps)
        error = np.sqrt(np.mean((got - wanted) ** 2) / np.var(wanted))
        assert error < BOUNDS[quant], steps


@pytest.mark.parametrize("quant", ["int4-g32", "int4-g32-sym", "int8"])
@pytest.mark.parametrize("name", FAMILIES)
def test_one_operator_answers_as_the_plain_ones(
    name: str,
    quant: str,
    tiny_model: TinyModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same codes: rows of gate and up are where the operator looks for them.

    Products round what they are given to int8, so that a bit of difference now and then becomes a
    step; texts of one token keep it from reaching others.
    """
    folder, ids = tiny_model(name), tiny_models.some_token_ids(20)
    converted(folder, tmp_path / "one", f"rtn:{quant}", "onnx", check=False)
    monkeypatch.setattr(feed_forward_graph, "for_one_operator", lambda *_: None)
    converted(folder, tmp_path / "plain", f"rtn:{quant}", "onnx", check=False)
    one, plain = (
        np.stack([onnx_files.logits(tmp_path / each, [token])[0] for token in ids])
        for each in ("one", "plain")
    )
    off = np.abs(one - plain).max(axis=1)
    assert np.quantile(off, 0.7) < TOLERANCE
    assert off.max() < 0.5


@pytest.mark.parametrize("quant", ["f32", "int8", "int8-dynamic"])
def test_a_token_reads_the_weights_of_its_experts_alone(
    quant: str, tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All others are NaN, which would be in the answers had they been computed, weighed or not."""
    folder, token = tiny_model("olmoe"), tiny_models.some_token_ids(1, seed=2)[0]
    made = converted(folder, tmp_path / "out", quant, "onnx", check=False)
    wanted = onnx_files.logits(made.path, [token])
    monkeypatch.setattr(sys.modules[__name__], "WINDOWS", [[token]])
    sent = Sent(folder)
    spoilt = 0
    with (made.path / "model.onnx.data").open("r+b") as file:
        for tensor in made.manifest.artifact.tensors:
            if "_exps" not in tensor.role:
                continue
            _, offset, nbytes = tensor.arrays[-1 if quant == "int8" else 0]
            count = 9 if len(tensor.shape) == 3 else 1
            if quant == "int8-dynamic":
                _, offset, nbytes = tensor.arrays[1]  # the scales
            for expert in range(count):
                role = tensor.role.replace("gate_up", "gate")
                if count > 1:
                    role = role.replace("_exps.", f"_exps.{expert}.")
                if not len(np.concatenate(sent.inputs[role])):
                    file.seek(offset + expert * nbytes // count)
                    file.write(b"\xff" * (nbytes // count))
                    spoilt += 1
    assert spoilt == 3 * 5 * (2 if quant == "int8" else 3)
    np.testing.assert_array_equal(onnx_files.logits(made.path, [token]), wanted)


@pytest.mark.parametrize("quant", ["f32", "int8"])
def test_padding_goes_to_experts_and_changes_nothing(
    quant: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """Two prompts of different lengths in one batch answer as each does alone."""
    import onnxruntime

    folder = tiny_model("qwen3_moe")
    converted(folder, tmp_path / "out", quant, "onnx", check=False)
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    texts = [tiny_models.some_token_ids(n, seed=n) for n in (20, 12)]

    def answers(batch: list[list[int]]) -> np.ndarray:
        longest = max(map(len, batch))
        ids = np.zeros((len(batch), longest), np.int64)
        for row, text in zip(ids, batch, strict=True):
            row[: len(text)] = text
        mask = np.arange(longest) < np.asarray([len(text) for text in batch])[:, np.newaxis]
        past = {
            each.name: np.zeros((len(batch), each.shape[1], 0, each.shape[3]), np.float32)
            for each in session.get_inputs()
            if each.name.startswith("past_key_values.")
        }
        given = {"input_ids": ids, "attention_mask": mask.astype(np.int64)}
        whole = {"logits_from": np.zeros(1, np.int64)}
        found: np.ndarray = session.run(["logits"], given | whole | past)[0]
        return found

    together = answers(texts)
    for found, text in zip(together, texts, strict=True):
        alone = answers([text])[0]
        np.testing.assert_allclose(found[: len(text)], alone, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    "router",
    [
        Router("sigmoid", normalized=True, factor=2.5),
        Router("sigmoid", normalized=True, bias=True),
        Router("sigmoid", bias=True, groups=3, groups_used=2, group_score="two best", factor=1.5),
        Router("softmax", groups=3, groups_used=1),
    ],
    ids=["sigmoid", "bias", "two best of a group", "best of a group"],
)
@pytest.mark.parametrize("quant", ["f32", "int8"])
def test_routers_of_deepseek(
    router: Router, quant: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """No family of ours has them yet: against the description in numpy."""
    source = open_source(str(tiny_model("olmoe")))
    layers = tuple(
        replace(layer, experts=replace(layer.experts, router=router, used=3))
        for layer in source.decoder.layers
    )
    tensors = dict(source.tensors)
    draw = np.random.default_rng(3)
    for index in range(len(layers)):
        role = f"blk.{index}.exp_probs_b.bias"
        tensors[role] = constant(role, draw.standard_normal(9).astype(np.float32))
    changed = replace(source, decoder=replace(source.decoder, layers=layers), tensors=tensors)
    layout = lay_out(changed, Recipe(source="", format="onnx", quant=quant))
    values = {
        role: ref.load().reshape(ref.shape).astype(np.float64) for role, ref in tensors.items()
    }
    with StagedFolder(tmp_path / "out") as staged:
        for name, content in layout.files.items():
            staged.write_file(name, content)
        for name, nbytes in layout.data_files.items():
            staged.create_data_file(name, nbytes)
        write_tensors(layout.tensors, rtn.solve, 1, staged)
        ids = tiny_models.some_token_ids(20)
        got = onnx_files.logits(staged.path, ids)
        apart = np.stack([onnx_files.logits(staged.path, [token])[0] for token in ids])
    if quant == "f32":
        wanted = reference_decoder.logits(changed.decoder, values, ids)
        np.testing.assert_allclose(got, wanted, rtol=0, atol=TOLERANCE)
        return
    wanted = np.stack([reference_decoder.logits(changed.decoder, values, [n])[0] for n in ids])
    off = np.sqrt(np.mean((apart - wanted) ** 2, axis=1) / np.var(wanted))
    assert np.median(off) < 0.1  # where no token goes to another expert


def test_adapters_of_experts_do_not_stay_apart(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Those of attention do: ``test_lora_merge`` has what is merged."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    import peft_adapters

    base = tiny_model("mixtral")
    config = peft.LoraConfig(
        r=2, lora_alpha=8, target_modules=["q_proj"], target_parameters=["experts.down_proj"]
    )
    adapter = peft_adapters.make_adapter(base, config, tmp_path / "adapter")
    with pytest.raises(AdapterError, match=r"ffn_down_exps\.0\.weight, which is no weight of its"):
        edgellm.convert(
            str(base),
            tmp_path / "out",
            quant="f32",
            format="gguf",
            adapters=[str(adapter.folder)],
            keep_adapters=True,
        )


@pytest.mark.parametrize(("format", "quant"), [("gguf", "q4_0"), ("onnx", "int4-g32")])
@pytest.mark.parametrize("name", ["mixtral", "granitemoeshared"])
def test_solvers_leave_less_error_than_rounding(
    name: str, format: str, quant: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """Of what each tensor gives on the calibration text, experts' stacks as well."""
    errors: dict[str, dict[str, float]] = {}
    for solver in ("imatrix", "gptq"):
        out = tmp_path / solver
        made = converted(tiny_model(name), out, f"{solver}:{quant}", format, check=False)
        errors[solver] = made.manifest.measured["calibration"]["output_error_by_tensor"]
    stacks = [each for each in errors["gptq"] if "_exps" in each]
    parts = {each.split(".")[2] for each in stacks}
    joined = {"ffn_gate_up_exps", "ffn_down_exps"}
    assert parts == (
        {"ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"} if format == "gguf" else joined
    )
    for each in stacks:
        assert errors["gptq"][each] < errors["imatrix"][each]


@pytest.mark.parametrize(("format", "quant"), [("gguf", "q4_0"), ("onnx", "int4-g32")])
def test_rounded_experts_are_read_back_as_they_were_stored(
    format: str, quant: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """Later layers may be calibrated behind them: stacks, and rows that are stored in turns."""
    recipe = Recipe(source=str(tiny_model("qwen3_moe")), format=format, quant=f"rtn:{quant}")
    convert(recipe, tmp_path / "out", check=False)
    plan = make_plan(recipe)
    again = as_stored(plan.source, plan.layout, tmp_path / "out")
    for role, ref in plan.source.tensors.items():
        if not stack_of(role):
            continue
        wanted = values_of(rtn.solve(ref.load(), GRIDS[quant]))
        np.testing.assert_allclose(again.tensors[role].load(), wanted, rtol=0, atol=1e-3)


def test_experts_that_the_text_hardly_reaches_are_named_in_the_manifest(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routing, "FEW_TOKENS", 400)
    monkeypatch.setattr(running, "FEW_TOKENS", 400)
    made = converted(
        tiny_model("olmoe"), tmp_path / "out", "gptq:q4_0", "gguf", calibration_tokens=1024
    )
    notes = [note for note in made.manifest.artifact.notes if "fewer than 400 tokens" in note]
    assert any(
        re.search(r"reached blk\.0\.ffn_gate_exps\.[\d,-]+\.weight, blk\.0\.ffn_up_exps\S+: rounded"
                  r" by the inputs of the whole layer", note)
        for note in notes
    )  # fmt: skip
    assert any("all channels of the input counted alike" in note for note in notes)


def test_importance_of_each_expert_goes_through_a_file(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    """As llama.cpp has it: a row for each expert, and how many tokens it was sent."""
    import gguf

    folder, file = tiny_model("qwen2_moe"), tmp_path / "imatrix.gguf"
    recipe = Recipe(source=str(folder), format="gguf", quant="imatrix:q4_0")
    solved = convert(recipe, tmp_path / "solved", check=False, save_imatrix=file)
    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(file).tensors}
    counts = stored["blk.1.ffn_down_exps.weight.counts"]
    assert counts.shape == (6, 1)
    assert counts.sum() == 3 * solved.manifest.artifact.calibration.tokens
    assert stored["blk.1.ffn_down_exps.weight.in_sum2"].shape == (6, 64)
    assert stored["blk.1.ffn_gate_exps.weight.in_sum2"].shape == (6, 192)
    recipe = Recipe(source=str(folder), format="gguf", quant="imatrix:q4_0", imatrix=str(file))
    given = convert(recipe, tmp_path / "given", check=False)
    assert not [note for note in given.manifest.artifact.notes if "says nothing about" in note]
    ours, theirs = (gguf.GGUFReader(each.main).tensors for each in (solved, given))
    for one, other in zip(ours, theirs, strict=True):
        assert np.mean(one.data == other.data) > 0.999, one.name


def test_memory_is_counted_for_every_expert(tiny_model: TinyModel) -> None:
    source = open_source(str(tiny_model("qwen3_moe")))
    (experts,) = {layer.experts for layer in source.decoder.layers}
    inputs = cost.layer_inputs(source.decoder, source.decoder.layers[0])
    assert [(each.width, each.each, each.sums) for each in inputs] == [
        (96, 1, 1), (192, 1, 1), (96, 1, 1), (96, 3, 7), (64, 3, 7),
    ]  # fmt: skip
    weights = sum(ref.size for ref in source.tensors.values())
    each = 3 * 96 * experts.width
    assert weights - active_weights(source.decoder, source.tensors) == 3 * 4 * each


@pytest.mark.parametrize("name", ["granitemoe", "granitemoeshared"])
def test_granites_stacks_are_experts(name: str, tiny_model: TinyModel) -> None:
    folder = tiny_model(name)
    source = open_source(str(folder))
    active = active_weights(source.decoder, source.tensors)
    assert edgellm.inspect(folder).active_weights == active
    assert active < sum(ref.size for ref in source.tensors.values())


def test_plan_and_inspect_say_what_a_token_passes(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder, out = tiny_model("qwen3_moe"), tmp_path / "out"
    source = open_source(str(folder))
    total = sum(ref.size for ref in source.tensors.values())
    active = active_weights(source.decoder, source.tensors)
    made = converted(folder, out, "q8_0", "gguf", check=False)
    for place in (out, made.main, folder):
        found = edgellm.inspect(place)
        assert (found.weights, found.active_weights) == (total, active)
    facts = made.manifest.artifact.model.experts
    assert (facts.count, facts.used) == (7, 3)
    read = counted(of_manifest(made.manifest.artifact)).bytes_per_token
    assert read == counted(of_gguf(read_gguf(made.main))).bytes_per_token
    assert read < 0.8 * made.main.stat().st_size


@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_of_floats_is_what_transformers_loads(
    name: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    converted(tiny_model(name), tmp_path / "out", "f32", "hf", check=False)
    ids = tiny_models.some_token_ids(30)
    got = tiny_models.reference_logits(tmp_path / "out", ids)
    wanted = tiny_models.reference_logits(tiny_model(name), ids)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-6)
