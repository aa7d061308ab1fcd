"""Tuning: gradients as torch's own, numbers read back as they were trained, better answers.

The files are read by code that knows nothing of tuning: gguf's for GGUF, the packers' for ONNX.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

import tiny_models
import torch
from torch.nn import functional

from edgellm import forward
from edgellm.calibration.texts import CalibrationText
from edgellm.conversion import quantize_tensors
from edgellm.evaluation import compare
from edgellm.export.packing import PACKERS
from edgellm.export.writer import StagedFolder
from edgellm.plan import Plan, make_plan
from edgellm.quant import floats
from edgellm.quant.dequantize import dequantize
from edgellm.quant.grid import GRIDS, Grid, QTensor
from edgellm.quant.qtensor_rows import rows_of, stacked
from edgellm.quant.rtn import solve
from edgellm.recipe import make_recipe
from edgellm.source import ModelSource, open_source
from edgellm.tune.divergence import head_divergence
from edgellm.tune.planning import Tuning
from edgellm.tune.products import quick_products
from edgellm.tune.settings import Settings, split
from edgellm.tune.stored import StoredModel
from edgellm.tune.tuning import tune
from edgellm.tune.weights import Matrix, StudentWeights
from edgellm.tune.whole import batches_by_step

TOO_FAR = 0.03

TinyModel = Callable[[str], Path]

SCALAR = (
    "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k",
    "iq4_nl", "iq4_xs", "int4-g32", "int4-g64-sym", "int8", "int8-dynamic", "nf4",
)  # fmt: skip


def rounded(grid: Grid, rows: int = 6, columns: int = 512, seed: int = 0) -> QTensor:
    """Random rows on ``grid``, codes and scales apart, as they come out of a file."""
    values = np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)
    packer = PACKERS[
        {"ggml": "ggml", "affine": "nbits", "per_channel": "dynamic", "codebook": "bnb4"}[grid.kind]
    ]
    return packer.unpack(packer.pack(solve(values, grid)), grid, columns)


@pytest.mark.parametrize("name", SCALAR)
def test_a_matrix_stands_for_the_values_that_were_stored(name: str) -> None:
    tensor = rounded(GRIDS[name])
    matrix = Matrix(tensor)
    identity = torch.eye(tensor.columns)
    weights = {"blk.0.ffn_up.weight": tensor}
    decoder = open_decoder()
    student = StudentWeights(weights, decoder, norms_offset=False)
    with torch.no_grad():
        found = student.product("blk.0.ffn_up", identity).T.numpy()
        some = matrix.lookup(torch.tensor([[4, 0], [5, 5]])).numpy()
    wanted = dequantize(tensor)
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(some, wanted[[[4, 0], [5, 5]]])


@pytest.mark.parametrize("name", SCALAR)
def test_what_is_trained_survives_the_container(name: str) -> None:
    """Scales and minima that moved are packed and read back to the very values trained with."""
    matrix = Matrix(rounded(GRIDS[name]))
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for z in matrix.parameters():
            z.copy_(0.05 * torch.randn(z.shape, generator=draw))
        student = matrix.lookup(torch.arange(matrix.rows)).numpy()
    moved = matrix.stored()
    packer = PACKERS[
        {"ggml": "ggml", "affine": "nbits", "per_channel": "dynamic", "codebook": "bnb4"}[
            moved.grid.kind
        ]
    ]
    read = packer.unpack(packer.pack(moved), moved.grid, moved.columns)
    np.testing.assert_array_equal(dequantize(read), student)
    assert (student != dequantize(matrix.tensor)).mean() > 0.5
    np.testing.assert_array_equal(read.codes, matrix.tensor.codes)


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q4_k", "int4-g32", "nf4"])
def test_gradients_are_those_of_the_plain_product(name: str) -> None:
    """Against autograd through ``levels * scale + min``, all of it kept."""
    tensor = rounded(GRIDS[name])
    matrix = Matrix(tensor)
    x = torch.randn(9, tensor.columns, generator=torch.Generator().manual_seed(2))
    role = "blk.0.ffn_up"
    student = StudentWeights({f"{role}.weight": tensor}, open_decoder(), norms_offset=False)
    ours, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    student.product(role, ours).square().sum().backward()
    weight = matrix.lookup(torch.arange(matrix.rows))
    functional.linear(plain, weight).square().sum().backward()
    assert plain.grad is not None
    torch.testing.assert_close(ours.grad, plain.grad)
    wanted = [z.grad for z in matrix.parameters()]
    assert len(wanted) == (2 if name in ("q4_1", "q4_k") else 1)
    for z, gradient in zip(student.parameters(), wanted, strict=True):
        torch.testing.assert_close(z.grad, gradient, rtol=2e-4, atol=1e-3)


@pytest.mark.parametrize(("biased", "cap"), [(False, None), (True, None), (True, 5.0)])
def test_divergence_is_torchs_with_its_gradients(biased: bool, cap: float | None) -> None:
    """Over more positions than a slab holds; the head's scales get gradients too."""
    draw = torch.Generator().manual_seed(3)
    matrix = Matrix(rounded(GRIDS["q8_0"], rows=50, columns=64))
    hidden = torch.randn(3, 100, 64, generator=draw)
    wanted = hidden + 0.1 * torch.randn(hidden.shape, generator=draw)
    teacher = torch.randn(50, 64, generator=draw)
    bias = torch.randn(50, generator=draw) if biased else None
    ours, plain = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    loss = head_divergence(ours, matrix, wanted, teacher, bias=bias, cap=cap)
    (3 * loss).backward()
    found = [z.grad for z in matrix.parameters()]
    matrix.zero_grad()
    weight = matrix.lookup(torch.arange(matrix.rows))

    def answers(states: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        logits = functional.linear(states, head, bias)
        return torch.log_softmax(logits if cap is None else cap * torch.tanh(logits / cap), -1)

    reference = functional.kl_div(
        answers(plain, weight),
        answers(wanted, teacher),
        reduction="sum",
        log_target=True,
    )
    (3 * reference).backward()
    torch.testing.assert_close(loss, reference)
    torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-4, atol=1e-5)
    for got, z in zip(found, matrix.parameters(), strict=True):
        torch.testing.assert_close(got, z.grad, rtol=1e-4, atol=1e-4)


def test_quick_products_are_near_and_leave_nothing_behind() -> None:
    """Gradients in bfloat16 by those in float32: what 8 significant bits allow."""
    draw = torch.Generator().manual_seed(4)
    decoder, role = open_decoder(), "blk.0.ffn_up"
    weights = {f"{role}.weight": rounded(GRIDS["q4_k"], rows=64)}
    student = StudentWeights(weights, decoder, norms_offset=False)
    head = Matrix(rounded(GRIDS["q8_0"], rows=50, columns=64, seed=1))
    x = torch.randn(300, 512, generator=draw)
    wanted, teacher = torch.randn(300, 64, generator=draw), torch.randn(50, 64, generator=draw)

    def gradients(products: str) -> list[torch.Tensor]:
        with quick_products(student, products):
            given = x.clone().requires_grad_()
            hidden = 0.1 * student.product(role, given)
            head_divergence(hidden, head, wanted, teacher, products=student.products).backward()
        found = [given.grad, *(z.grad for part in (student, head) for z in part.parameters())]
        student.zero_grad()
        head.zero_grad()
        assert all(each is not None for each in found)
        return [each for each in found if each is not None]

    for near, exact in zip(gradients("bfloat16"), gradients("float32"), strict=True):
        error = float((near - exact).norm() / exact.norm())
        assert 1e-5 < error < 2e-2
    assert student.products == torch.float32
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_step_takes_batches_until_it_has_its_tokens_and_each_in_turn() -> None:
    sizes = [512, 512, 300, 512, 512, 512, 48]
    steps = batches_by_step(sizes, 6, 1024, seed=1)
    for chosen in steps:
        assert sum(sizes[place] for place in chosen) >= 1024
        assert sum(sizes[place] for place in chosen[:-1]) < 1024
    flat = [place for chosen in steps for place in chosen]
    for start in range(0, len(flat) - len(sizes), len(sizes)):
        assert sorted(flat[start : start + len(sizes)]) == list(range(len(sizes)))
    assert steps != batches_by_step(sizes, 6, 1024, seed=2)


def test_rows_are_parted_and_stacked_with_all_that_belongs_to_them() -> None:
    whole = rounded(GRIDS["q4_k"])
    parts = [rows_of(whole, slice(0, 2)), rows_of(whole, np.asarray([5, 4, 3, 2]))]
    back = stacked([parts[0], rows_of(parts[1], np.asarray([3, 2, 1, 0]))])
    np.testing.assert_array_equal(
        PACKERS["ggml"].pack(back)["data"], PACKERS["ggml"].pack(whole)["data"]
    )
    np.testing.assert_array_equal(dequantize(parts[1]), dequantize(whole)[5:1:-1])


def open_decoder():
    from edgellm.architectures.decoder import Decoder, Layer, Norm

    return Decoder("llama", 50, 64, 64, 64, 1, 1, 64, (Layer(),), Norm("rms", 1e-5), "silu")


# --- whole artifacts -----------------------------------------------------------------------------


WINDOWS = [tiny_models.some_token_ids(48, seed=seed) for seed in range(32)]
TEST_WINDOWS = [tiny_models.some_token_ids(48, seed=100 + seed) for seed in range(4)]


def plan_of(folder: Path, quant: str, format: str = "gguf") -> Plan:
    return make_plan(make_recipe({"source": str(folder), "quant": quant, "format": format}))


@contextmanager
def staged_artifact(plan: Plan, out: Path, key: str = "") -> Iterator[StagedFolder]:
    with StagedFolder(out, resume_key=key) as staged:
        for name, nbytes in plan.layout.data_files.items():
            staged.create_data_file(name, nbytes)
            staged.write_at(name, 0, plan.layout.files.get(name, b""))
        quantize_tensors(plan, staged)
        yield staged


def data_of(plan: Plan, staged: StagedFolder) -> bytes:
    (name,) = plan.layout.data_files
    return (staged.path / name).read_bytes()


def read_back(plan: Plan, staged: StagedFolder) -> ModelSource:
    """The network in the file: read by gguf's own code, or from ONNX by the packers."""
    source = plan.source
    if plan.layout.container == "gguf":
        return open_source(str(staged.path / plan.layout.main_file), quantized=True)
    stored = StoredModel(plan.layout, source, staged.path)
    found = {
        role: dequantize(weight)
        if tensor.grid.kind != "float"
        else floats.decode(weight.packed, tensor.grid.name).reshape(source.tensors[role].rows, -1)
        for tensor, by_role in stored.under("")
        for role, weight in by_role.items()
    }
    tensors = {
        role: replace(ref, load_rows=lambda a, b, role=role: found[role][a:b].copy())
        if role in found
        else ref
        for role, ref in source.tensors.items()
    }
    return replace(source, tensors=tensors)


def kl(plan: Plan, staged: StagedFolder) -> float:
    """Of what lies in the file, on text that tuning does not see."""
    reference = forward.window_logits(plan.source, TEST_WINDOWS, threads=1)
    found = forward.window_logits(read_back(plan, staged), TEST_WINDOWS, threads=1)
    return compare(reference, found, TEST_WINDOWS).kl


HF = [
    ("gptq", "int4-g32-sym"),
    ("gptq_v2", "int4-g64"),
    ("awq", "int4-g64"),
    ("compressed-tensors", "int4-g32"),
    ("compressed-tensors", "int8"),
    ("compressed-tensors", "int8-dynamic"),
    ("bitsandbytes", "nf4"),
    ("bitsandbytes", "nf4-dq"),
    ("bitsandbytes", "int8-dynamic"),
]


@pytest.mark.parametrize(("layout", "grid"), HF)
def test_a_hugging_face_folder_is_read_moved_and_written_alike(
    layout: str, grid: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """What moved comes back as it was trained; where nothing moved, every byte stays."""
    choice = {"source": str(tiny_model("llama-256")), "format": "hf"}
    plan = make_plan(make_recipe({**choice, "quant": f"rtn:{grid}", "layout": layout}))
    with staged_artifact(plan, tmp_path / "out") as staged:
        stored = StoredModel(plan.layout, plan.source, staged.path)
        untouched = data_of(plan, staged)
        for tensor, by_role in stored.under(""):
            stored.write(tensor, by_role, staged)
        assert data_of(plan, staged) == untouched
        found = {role: each for _, by_role in stored.under("") for role, each in by_role.items()}
        assert found.keys() == plan.source.tensors.keys()
        student = StudentWeights(found, plan.source.decoder, norms_offset=stored.norms_offset)
        with torch.no_grad():
            for z in student.parameters():
                z.fill_(0.1)
        for tensor, by_role in stored.under("blk.1."):
            stored.write(tensor, {role: student.stored(role) for role in by_role}, staged)
        moved = data_of(plan, staged)
        again = {role: each for _, by_role in stored.under("") for role, each in by_role.items()}
        back = StudentWeights(again, plan.source.decoder, norms_offset=stored.norms_offset)
    assert moved != untouched
    for name in ("attn_q", "ffn_down"):
        wanted, got = (each.matrix(f"blk.1.{name}.weight") for each in (student, back))
        rows = torch.arange(wanted.rows)
        # bitsandbytes stores 127 times the scale of int8, which rounds once more.
        exact = (layout, grid) != ("bitsandbytes", "int8-dynamic")
        with torch.no_grad():
            torch.testing.assert_close(
                got.lookup(rows), wanted.lookup(rows), rtol=0 if exact else 3e-7, atol=0
            )


def test_rows_of_a_folder_are_read_in_the_order_of_the_network(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    """GPT-NeoX's queries, keys and values, written head by head, and the same bytes put back."""
    choice = {"source": str(tiny_model("gpt_neox")), "format": "hf", "layout": "gptq"}
    plan = make_plan(make_recipe({**choice, "quant": "rtn:int4-g32-sym"}))
    with staged_artifact(plan, tmp_path / "out") as staged:
        stored = StoredModel(plan.layout, plan.source, staged.path)
        untouched = data_of(plan, staged)
        for tensor, by_role in stored.under("blk.1.attn_qkv"):
            stored.write(tensor, by_role, staged)
        assert data_of(plan, staged) == untouched
        found = {role: each for _, by_role in stored.under("") for role, each in by_role.items()}
    role = "blk.1.attn_qkv"
    ref = plan.source.tensors[f"{role}.weight"]
    grid = found[f"{role}.weight"].grid
    np.testing.assert_allclose(
        dequantize(found[f"{role}.weight"]), dequantize(solve(ref.load(), grid)), atol=1e-3
    )
    student = StudentWeights(found, plan.source.decoder, norms_offset=stored.norms_offset)
    bias = student.vector(f"{role}.bias")
    assert bias is not None
    wanted = plan.source.tensors[f"{role}.bias"].load()[0]
    np.testing.assert_allclose(bias.detach().numpy(), wanted, atol=1e-3)


def tuning(whole: bool = True, recompute: bool = False, **settings: float) -> Tuning:
    """What the plan would say, without its text and memory."""
    defaults = {"steps": 40, "step_tokens": 96, "rate": 4e-3, "norm_rate": 4e-3}
    text = CalibrationText(
        name="ids",
        windows=tuple(map(tuple, WINDOWS)),
        sha256="",
        text_sha256="",
        tokens=sum(map(len, WINDOWS)),
        seed=0,
    )
    return Tuning(Settings(**{**defaults, **settings}), text, whole, recompute, 0, 0.0)


@pytest.mark.parametrize(
    ("name", "quant", "format"),
    [
        ("llama", "rtn:q4_0", "gguf"),
        ("bloom", "rtn:int4-g32", "onnx"),
        ("gptj", "rtn:int4-g32", "onnx"),
        ("llama-256", "rtn:q3_k_s", "gguf"),
        ("llama-biased", "rtn:int4-g32", "onnx"),
    ],
)
def test_tuning_brings_answers_closer_on_other_text(
    name: str, quant: str, format: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """Random models answer at random: that scales fit them better shows on any text."""
    plan = plan_of(tiny_model(name), quant, format)
    with staged_artifact(plan, tmp_path / "out") as staged:
        before = kl(plan, staged)
        tuned = tune(plan.layout, plan.source, staged, tuning(), 1)
        assert tuned.kl_before is not None
        assert tuned.kl_after is not None
        assert tuned.kl_after < 0.95 * tuned.kl_before
        assert kl(plan, staged) < 0.95 * before


@pytest.mark.parametrize(
    ("name", "quant", "format"), [("llama", "rtn:q4_0", "gguf"), ("phi3", "rtn:int4-g32", "onnx")]
)
def test_what_is_trained_end_to_end_is_what_lies_in_the_file(
    name: str, quant: str, format: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """The divergence that was measured while training is that of the file, read by others."""
    plan = plan_of(tiny_model(name), quant, format)
    with staged_artifact(plan, tmp_path / "out") as staged:
        tuned = tune(plan.layout, plan.source, staged, tuning(steps=10), 1)
        assert tuned.kept_share
        _, held_out = split(WINDOWS)
        reference = forward.window_logits(plan.source, held_out, threads=1)
        found = forward.window_logits(read_back(plan, staged), held_out, threads=1)
        wanted = compare(reference, found, held_out).kl
    assert tuned.kl_after == pytest.approx(wanted, rel=1e-4)


def test_a_head_stored_apart_from_its_embedding_is_the_one_that_answers(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    """Tied in the source; in the artifact 4 bits answer and 8 are looked up."""
    source = str(tiny_model("llama-biased"))
    choice = {"source": source, "format": "onnx", "quant": "rtn:f32", "embed": "f32"}
    divergences = {}
    for head in ("f32", "int4-g32"):
        plan = make_plan(make_recipe({**choice, "head": head}))
        with staged_artifact(plan, tmp_path / head) as staged:
            tuned = tune(plan.layout, plan.source, staged, tuning(steps=4), 1)
            divergences[head] = tuned.kl_before
    assert divergences["f32"] == pytest.approx(0, abs=1e-6)
    assert divergences["int4-g32"] > 1e-3


def test_blocks_alone_fall_in_error_and_are_written(tiny_model: TinyModel, tmp_path: Path) -> None:
    plan = plan_of(tiny_model("llama"), "rtn:q4_0")
    with staged_artifact(plan, tmp_path / "out") as staged:
        before, untouched = kl(plan, staged), data_of(plan, staged)
        tuned = tune(plan.layout, plan.source, staged, tuning(False, steps=0, block_steps=20), 1)
        assert tuned.blocks == 3
        assert tuned.kl_before is None
        assert data_of(plan, staged) != untouched
        assert kl(plan, staged) < before


def test_what_does_not_help_is_not_kept(tiny_model: TinyModel, tmp_path: Path) -> None:
    """At a rate at which everything breaks, every byte stays."""
    plan = plan_of(tiny_model("llama"), "rtn:q4_0")
    with staged_artifact(plan, tmp_path / "out") as staged:
        untouched = data_of(plan, staged)
        wild = tuning(steps=10, block_steps=4, rate=3.0, norm_rate=3.0, block_rate=3.0)
        tuned = tune(plan.layout, plan.source, staged, wild, 1)
        assert (tuned.kept_share, tuned.blocks) == (0, 0)
        assert tuned.kl_after == tuned.kl_before
        assert data_of(plan, staged) == untouched


def test_of_a_change_that_goes_too_far_a_share_is_kept(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    """One step of the right direction, much too long."""
    plan = plan_of(tiny_model("llama"), "rtn:q4_0")
    with staged_artifact(plan, tmp_path / "out") as staged:
        before = kl(plan, staged)
        long = tuning(steps=1, step_tokens=1000, rate=TOO_FAR, norm_rate=TOO_FAR)
        tuned = tune(plan.layout, plan.source, staged, long, 1)
        assert 0 < tuned.kept_share < 1
        assert kl(plan, staged) < before


def test_recomputing_and_repeating_give_the_same_bytes(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    plan = plan_of(tiny_model("gemma3"), "rtn:q4_0")
    contents = []
    for place, recompute in enumerate((False, True)):
        with staged_artifact(plan, tmp_path / str(place)) as staged:
            wanted = tuning(recompute=recompute, steps=6, block_steps=2)
            tune(plan.layout, plan.source, staged, wanted, 1)
            contents.append(data_of(plan, staged))
    assert contents[0] == contents[1]


def test_a_run_that_was_killed_while_writing_writes_what_it_had_found(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the file holds tuned scales then, so training again would begin elsewhere."""
    plan = plan_of(tiny_model("llama"), "rtn:q4_0")
    with staged_artifact(plan, tmp_path / "whole") as staged:
        wanted = tune(plan.layout, plan.source, staged, tuning(steps=6), 1)
        content = data_of(plan, staged)
    write, left = StoredModel.write, [7]

    def dies(stored: StoredModel, *arguments: Any) -> None:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        write(stored, *arguments)

    monkeypatch.setattr(StoredModel, "write", dies)
    out = tmp_path / "out"

    def run() -> None:
        with staged_artifact(plan, out, "key") as staged:
            tune(plan.layout, plan.source, staged, tuning(steps=6), 1)

    with pytest.raises(KeyboardInterrupt):
        run()
    monkeypatch.setattr(StoredModel, "write", write)
    with StagedFolder(out, resume_key="key") as staged:
        assert data_of(plan, staged) != content
        for name, nbytes in plan.layout.data_files.items():
            staged.create_data_file(name, nbytes)
        assert tune(plan.layout, plan.source, staged, tuning(steps=6), 1) == wanted
        assert data_of(plan, staged) == content
