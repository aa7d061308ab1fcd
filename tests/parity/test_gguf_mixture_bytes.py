"""Every mixture equals llama.cpp's own quantizer, tensor by tensor and byte by byte."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest

from edgellm.architectures.decoder import Decoder, Experts, Layer, Norm
from edgellm.errors import UnsupportedTarget
from edgellm.export.gguf_chooser import Chooser, mixture_named
from edgellm.export.gguf_head import StoredTensor, gguf_head
from edgellm.export.gguf_mixture import MIXTURES
from edgellm.export.packing import PACKERS
from edgellm.quant import floats, ggml, imatrix
from edgellm.quant.grid import GRIDS, Grid, QTensor
from edgellm.tensors import Array

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")

from llamacpp_quantizer import quantize_with_llamacpp, types_of_llamacpp

ROWS = 4

Weights = dict[str, Array]


class Model:
    """Enough of a model for llama.cpp's quantizer, which reads names, row lengths and keys."""

    def __init__(
        self,
        *,
        arch: str = "llama",
        layers: int = 16,
        heads: int = 8,
        kv_heads: int = 2,
        width: int = 256,
        inner: int = 512,
        tied: bool = False,
        fused: bool = False,
        experts: int = 0,
        shared: bool = False,
        dense: int = 0,
    ) -> None:
        self.arch = arch
        mixture = Experts(experts, 2, inner, shared_width=inner * shared) if experts else None
        self.decoder = Decoder(
            family=arch,
            vocab_size=ROWS,
            hidden_size=width,
            ffn_size=inner,
            context_length=64,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=width // heads,
            layers=(Layer(),) * dense + (Layer(experts=mixture),) * (layers - dense),
            norm=Norm("rms", 1e-5),
            activation="silu",
            tied_head=tied,
        )
        random = np.random.default_rng(7)
        self.weights: Weights = {}
        for role, shape in self._shapes(fused):
            values = random.standard_normal(shape, dtype=np.float32)
            values *= np.exp(random.standard_normal(shape[-1:], dtype=np.float32))
            self.weights[role] = values

    def _shapes(self, fused: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
        width = self.decoder.hidden_size
        yield "token_embd.weight", (ROWS, width)
        for layer in range(len(self.decoder.layers)):
            yield f"blk.{layer}.attn_norm.weight", (width,)
            names = ("attn_qkv",) if fused else ("attn_q", "attn_k", "attn_v")
            for name in (*names, "attn_output"):
                yield f"blk.{layer}.{name}.weight", (ROWS, width)
            yield from self._feed_forward(layer, fused)
            yield f"blk.{layer}.ffn_down.bias", (width,)
        if fused:
            yield "position_embd.weight", (64, width)
        if not self.decoder.tied_head:
            yield "output.weight", (ROWS, width)

    def _feed_forward(self, layer: int, fused: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
        width, inner = self.decoder.hidden_size, self.decoder.ffn_size
        experts = self.decoder.layers[layer].experts
        stacks: list[tuple[str, tuple[int, ...]]] = [("", ())]
        if experts is not None:
            yield f"blk.{layer}.ffn_gate_inp.weight", (experts.count, width)
            stacks = [("_exps", (experts.count,))]
            stacks += [("_shexp", ())] if experts.shared_width else []
        for end, outer in stacks:
            for name in ("ffn_up", *(() if fused else ("ffn_gate",))):
                yield f"blk.{layer}.{name}{end}.weight", (*outer, ROWS, width)
            yield f"blk.{layer}.ffn_down{end}.weight", (*outer, ROWS, inner)

    def importance(self) -> Weights:
        """As calibration would find it: of the linears, not of the embedding and the head."""
        random = np.random.default_rng(11)
        return {
            role: np.exp(2 * random.standard_normal(values[..., 0, :].shape, dtype=np.float32))
            for role, values in self.weights.items()
            if role.startswith("blk.") and values.ndim >= 2
        }

    def metadata(self) -> dict[str, object]:
        decoder, arch = self.decoder, self.arch
        experts = decoder.layers[-1].experts
        counts = {"expert_count": experts.count, "expert_used_count": 2} if experts else {}
        return {
            **{f"{arch}.{key}": value for key, value in counts.items()},
            "general.architecture": arch,
            f"{arch}.block_count": len(decoder.layers),
            f"{arch}.context_length": decoder.context_length,
            f"{arch}.embedding_length": decoder.hidden_size,
            f"{arch}.feed_forward_length": decoder.ffn_size,
            f"{arch}.attention.head_count": decoder.heads,
            f"{arch}.attention.head_count_kv": decoder.kv_heads,
            f"{arch}.attention.layer_norm_rms_epsilon": 1e-5,
            f"{arch}.attention.layer_norm_epsilon": 1e-5,
            f"{arch}.vocab_size": decoder.vocab_size,
        }

    def write_f32(self, path: Path) -> None:
        entries = [
            StoredTensor(role, values.shape, 0, values.nbytes)
            for role, values in self.weights.items()
        ]
        head = gguf_head(self.metadata(), entries)
        content = np.zeros(head.total_bytes, np.uint8)
        content[: len(head.content)] = np.frombuffer(head.content, np.uint8)
        for values, offset in zip(self.weights.values(), head.offsets, strict=True):
            content[offset : offset + values.nbytes] = values.reshape(-1).view(np.uint8)
        content.tofile(path)


MODELS = {
    "grouped": {},
    "each head apart, tied": {"kv_heads": 8, "layers": 9, "tied": True},
    "rows of 288": {"width": 288, "inner": 256, "layers": 8},
    "rows of 96, tied": {"width": 96, "inner": 768, "layers": 8, "tied": True},
    "rows of 40": {"width": 40, "inner": 256, "layers": 3},
    "80 layers": {"layers": 80},
    "80 layers, each head apart": {"layers": 80, "kv_heads": 8, "tied": True},
    "qwen2, 80 layers": {"arch": "qwen2", "layers": 80, "kv_heads": 8},
    "eight experts": {"experts": 8, "layers": 9},
    "eight experts, rows of 96": {"experts": 8, "width": 96, "inner": 64, "layers": 2},
    "four experts and a shared one": {
        "arch": "qwen2moe",
        "experts": 4,
        "shared": True,
        "layers": 17,
        "kv_heads": 8,
    },
    "experts and a shared one behind a dense layer": {
        "arch": "qwen2moe",
        "experts": 4,
        "shared": True,
        "dense": 1,
        "layers": 17,
        "kv_heads": 8,
    },
    "gemma3": {"arch": "gemma3", "layers": 10, "tied": True},
    "gpt2": {"arch": "gpt2", "kv_heads": 8, "layers": 12, "tied": True, "fused": True},
}
CASES = [
    (name, title)
    for name in MIXTURES
    for title in MODELS
    # Vector codebooks take long, and no rule of theirs depends on 80 layers.
    if not (name.startswith(("iq1", "iq2", "iq3")) and "80 layers" in title)
]


WITH_IMPORTANCE = (
    "q8_0", "q6_k", "q5_k_m", "q5_1", "q5_0", "q4_k_s", "q4_1", "q4_0", "iq4_nl", "iq4_xs",
    "q3_k_m", "q2_k_s", "iq3_xs", "iq2_xxs",
)  # fmt: skip
"""Mixtures whose bytes are compared with importance: every type but those whose tables take ggml
half a minute to build (iq1_s, iq1_m, iq2_xs and iq2_s, which were compared once by hand)."""


def our_bytes(rows: Array, grid: Grid, importance: Array | None = None) -> QTensor:
    rows = rows.reshape(-1, rows.shape[-1])
    if importance is not None and importance.ndim > 1:  # a stack of experts
        each = zip(np.split(rows, len(importance)), importance, strict=True)
        pieces = [our_bytes(part, grid, weights).packed for part, weights in each]
        return QTensor(grid, rows.shape[-1], packed=np.concatenate(pieces))
    if grid.kind == "float":
        return floats.encode(rows, grid)
    return ggml.quantize(rows, grid, None if importance is None else imatrix.lifted(importance))


def assert_equal_to_ours(
    made: Path, model: Model, name: str, types: Chooser, importance: Weights | None = None
) -> None:
    reader = gguf.GGUFReader(made)
    assert reader.fields["general.file_type"].contents() == MIXTURES[name].file_type
    assert len(reader.tensors) == len(model.weights)
    for theirs in reader.tensors:
        values = model.weights[theirs.name]
        grid = types.choose(theirs.name, values.shape).grid
        assert grid.ggml_type == theirs.tensor_type, (theirs.name, grid.name)
        ours = our_bytes(values, grid, (importance or {}).get(theirs.name)).packed
        assert ours is not None
        assert np.array_equal(ours.reshape(-1), np.array(theirs.data).view(np.uint8).reshape(-1)), (
            theirs.name
        )


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Model, Path]]:
    folder = tmp_path_factory.mktemp("floats")
    made = {}
    for number, (title, fields) in enumerate(MODELS.items()):
        made[title] = Model(**fields), folder / f"{number}.gguf"
        made[title][0].write_f32(made[title][1])
    return made


@pytest.mark.parametrize(("name", "title"), CASES)
def test_mixture(
    name: str, title: str, sources: dict[str, tuple[Model, Path]], tmp_path: Path
) -> None:
    model, source = sources[title]
    types = Chooser(name, mixture_named(name), model.decoder, model.arch)
    if quantize_with_llamacpp(source, tmp_path / "made.gguf", name):
        assert_equal_to_ours(tmp_path / "made.gguf", model, name, types)
    else:
        with pytest.raises(UnsupportedTarget, match="importance"):
            {role: types.choose(role, values.shape) for role, values in model.weights.items()}


@pytest.mark.parametrize("name", [name for name in MIXTURES if name not in ("f32", "f16", "bf16")])
@pytest.mark.parametrize("title", MODELS)
def test_types_with_importance(
    name: str, title: str, sources: dict[str, tuple[Model, Path]]
) -> None:
    model, source = sources[title]
    types = Chooser(name, mixture_named(name), model.decoder, model.arch, solver="imatrix")
    theirs = types_of_llamacpp(source, name, model.importance())
    ours = {role: types.choose(role, rows.shape).grid.name for role, rows in model.weights.items()}
    assert theirs == {role: grid for role, grid in ours.items() if grid != "f32"}


@pytest.mark.parametrize("fields", [{}, {"experts": 3}], ids=["dense", "experts"])
@pytest.mark.parametrize("name", WITH_IMPORTANCE)
def test_bytes_with_importance(name: str, fields: dict[str, int], tmp_path: Path) -> None:
    model = Model(layers=8, kv_heads=8, **fields)
    model.write_f32(tmp_path / "float.gguf")
    weights = model.importance()
    made = tmp_path / "made.gguf"
    assert quantize_with_llamacpp(tmp_path / "float.gguf", made, name, importance=weights)
    types = Chooser(name, mixture_named(name), model.decoder, model.arch, solver="imatrix")
    assert_equal_to_ours(made, model, name, types, weights)


@pytest.mark.parametrize("name", ["q4_k_m", "f16"])
@pytest.mark.parametrize(("embed", "head"), [("q8_0", None), (None, "q5_k"), ("f16", "q4_0")])
def test_embedding_and_head_apart(
    name: str,
    embed: str | None,
    head: str | None,
    sources: dict[str, tuple[Model, Path]],
    tmp_path: Path,
) -> None:
    model, source = sources["grouped"]
    assert quantize_with_llamacpp(source, tmp_path / "made.gguf", name, embed=embed, head=head)
    types = Chooser(
        name,
        mixture_named(name),
        model.decoder,
        model.arch,
        GRIDS[embed] if embed else None,
        GRIDS[head] if head else None,
    )
    assert_equal_to_ours(tmp_path / "made.gguf", model, name, types)


@pytest.mark.parametrize(("embed", "head"), [("q8_0", None), (None, "q5_k")])
def test_tied_embedding_apart(
    embed: str | None,
    head: str | None,
    sources: dict[str, tuple[Model, Path]],
    tmp_path: Path,
) -> None:
    model, source = sources["each head apart, tied"]
    assert quantize_with_llamacpp(source, tmp_path / "made.gguf", "q4_0", embed=embed, head=head)
    types = Chooser(
        "q4_0",
        mixture_named("q4_0"),
        model.decoder,
        model.arch,
        GRIDS[embed] if embed else None,
        GRIDS[head] if head else None,
    )
    assert_equal_to_ours(tmp_path / "made.gguf", model, "q4_0", types)


def test_block_geometry_is_ggmls() -> None:
    for grid in GRIDS.values():
        if grid.kind != "ggml":
            continue
        kind = gguf.GGMLQuantizationType[grid.name.upper()]
        assert grid.ggml_type == kind
        block, nbytes = gguf.GGML_QUANT_SIZES[kind]
        assert (grid.block, PACKERS["ggml"].row_bytes(grid, 2 * block)) == (
            block,
            {"data": 2 * nbytes},
        )


@pytest.mark.parametrize("name", ["f32", "f16", "bf16"])
def test_float_grids_round_as_gguf_does(name: str) -> None:
    random = np.random.default_rng(3)
    bits = random.integers(0, 1 << 32, 1 << 16, dtype=np.uint32)
    values = bits.view(np.float32)
    values = values[np.isfinite(values) & (np.abs(values) < (6e4 if name == "f16" else 3e38))]
    halfway = np.array([1 + 2.0**-11, 1 + 3 * 2.0**-11, 1 + 2.0**-8, 1 + 3 * 2.0**-8, 0.0, -0.0])
    values = np.concatenate([values, halfway.astype(np.float32)])
    theirs = gguf.quants.quantize(values, gguf.GGMLQuantizationType[name.upper()])
    ours = floats.encode(values[None], GRIDS[name]).packed
    assert ours is not None
    assert np.array_equal(ours.reshape(-1), theirs.view(np.uint8).reshape(-1))


def test_grouping_of_rows_does_not_change_the_bytes() -> None:
    rows = np.random.default_rng(1).standard_normal((100, 256), dtype=np.float32)
    whole = ggml.quantize(rows, GRIDS["q4_k"]).packed
    parts = [ggml.quantize(rows[i : i + 7], GRIDS["q4_k"]).packed for i in range(0, 100, 7)]
    assert whole is not None
    assert np.array_equal(whole, np.concatenate(parts))
