"""Kinds of adapter other than LoRA against PEFT's own ``merge_and_unload`` in float32.

Adapters are made, saved and merged by PEFT on tiny models; their files are read here, bound and
applied row by row to the base weights. ``BOUNDS`` is what the documentation lists.
"""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import peft
import pytest
import tiny_models
import torch
from peft.utils.warning import PeftWarning
from peft_adapters import PeftAdapter, make_adapter, move, state_of, trained

from edgellm.lora.binding import Combination
from edgellm.lora.combine.combined import combined
from edgellm.lora.edit import Edit, Target
from edgellm.lora.kinds import bind_of
from edgellm.lora.kinds.ia3 import scales_outputs
from edgellm.lora.merging import merged_source
from edgellm.lora.reading.open import open_adapter
from edgellm.source import open_source
from edgellm.source.safetensors_file import read_safetensors
from edgellm.tensors import TensorRef

Figure = Callable[[str, str, float], None]

BOUNDS = {
    "loha": 1e-6,  # measured: 0
    "lokr": 1e-6,  # 1.6e-7, 0 where both factors are whole
    "ia3": 0.0,  # 0
    "vera": 1e-6,  # 5.8e-8
    "oft": 1e-6,  # 4.9e-7
    "boft": 1e-6,  # 4.0e-7
    "adalora": 1e-6,  # 1.2e-7
    "c3a": 1e-6,  # 7.4e-8: PEFT's own rounding, in Fourier's space
    "hira": 1e-6,  # 0
    "hra": 2e-6,  # 7.6e-7, over six reflections
    "miss": 1e-6,  # 1.3e-7 with "bat", else 0
    "vblora": 1e-6,  # 1.0e-7
}
"""Largest difference from PEFT's merged weights, as a share of the weight's largest value.

IA3 multiplies each value once, so it is equal bit by bit. The others add in another order.
"""

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
ODD_RANKS = {"rank_pattern": {"q_proj": 7, "layers.1.mlp.up_proj": 3, r"layers.0.*o_proj": 1}}
ODD_ALPHAS = {"alpha_pattern": {"k_proj": 5, r".*\.1\.mlp\.up_proj": 24}}

CASES: dict[str, tuple[str, str, Callable[[], peft.PeftConfig]]] = {
    "loha": ("loha", "llama", lambda: peft.LoHaConfig(r=5, alpha=9, target_modules=ALL)),
    "loha-patterns": (
        "loha",
        "llama",
        lambda: peft.LoHaConfig(
            r=4, alpha=8, target_modules=ALL, rank_dropout=0.2, **ODD_RANKS, **ODD_ALPHAS
        ),
    ),
    "lokr": ("lokr", "llama", lambda: peft.LoKrConfig(r=3, alpha=7, target_modules=ALL)),
    "lokr-both": (
        "lokr",
        "llama",
        lambda: peft.LoKrConfig(r=2, alpha=7, target_modules=ALL, decompose_both=True),
    ),
    "lokr-whole": ("lokr", "llama", lambda: peft.LoKrConfig(r=200, alpha=7, target_modules=ALL)),
    "lokr-factor": (
        "lokr",
        "llama",
        lambda: peft.LoKrConfig(
            r=4, alpha=3, target_modules=ALL, decompose_factor=4, **ODD_RANKS, **ODD_ALPHAS
        ),
    ),
    "lokr-large-factor": (
        "lokr",
        "llama",
        lambda: peft.LoKrConfig(
            r=2, alpha=8, target_modules=ALL, decompose_factor=32, decompose_both=True
        ),
    ),
    "ia3": (
        "ia3",
        "llama-biased",
        lambda: peft.IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
        ),
    ),
    "ia3-pattern": (
        "ia3",
        "llama-biased",
        lambda: peft.IA3Config(target_modules=ALL, feedforward_modules=r".*\.1\.mlp\..*"),
    ),
    "ia3-conv1d": (
        "ia3",
        "gpt2",
        lambda: peft.IA3Config(
            target_modules=["c_attn", "mlp.c_proj"],
            feedforward_modules=["mlp.c_proj"],
            fan_in_fan_out=True,
        ),
    ),
    "vera": (
        "vera",
        "llama",
        lambda: peft.VeraConfig(r=13, target_modules=ALL, save_projection=True, d_initial=0.3),
    ),
    "vera-conv1d": (
        "vera",
        "gpt2",
        lambda: peft.VeraConfig(
            r=8, target_modules=["c_attn", "c_fc"], save_projection=True, fan_in_fan_out=True
        ),
    ),
    "oft": ("oft", "llama", lambda: peft.OFTConfig(oft_block_size=32, target_modules=ALL)),
    "oft-adjusted": ("oft", "llama", lambda: peft.OFTConfig(oft_block_size=13, target_modules=ALL)),
    "oft-blocks": (
        "oft",
        "llama",
        lambda: peft.OFTConfig(r=3, oft_block_size=0, target_modules=ALL, module_dropout=0.1),
    ),
    "oft-shared": (
        "oft",
        "llama",
        lambda: peft.OFTConfig(oft_block_size=16, target_modules=ALL, block_share=True),
    ),
    "oft-exact": (
        "oft",
        "llama",
        lambda: peft.OFTConfig(oft_block_size=24, target_modules=ALL, use_cayley_neumann=False),
    ),
    "oft-constrained": (
        "oft",
        "llama",
        lambda: peft.OFTConfig(oft_block_size=8, target_modules=ALL, coft=True, eps=0.5),
    ),
    "oft-embedding": (
        "oft",
        "llama",
        lambda: peft.OFTConfig(oft_block_size=8, target_modules=["embed_tokens", "q_proj"]),
    ),
    **{
        f"oft-{terms}-terms": (
            "oft",
            "llama",
            lambda terms=terms: peft.OFTConfig(
                oft_block_size=8, target_modules=["q_proj"], num_cayley_neumann_terms=terms
            ),
        )
        for terms in (1, 2, 3, 6)
    },
    "boft": (
        "boft",
        "llama-biased",
        lambda: peft.BOFTConfig(boft_block_size=8, target_modules=ALL, boft_dropout=0.1),
    ),
    "boft-blocks": (
        "boft",
        "llama",
        lambda: peft.BOFTConfig(boft_block_size=0, boft_block_num=32, target_modules=ALL),
    ),
    "adalora": (
        "adalora",
        "llama",
        lambda: peft.AdaLoraConfig(target_modules=ALL, init_r=5, lora_alpha=9, total_step=10),
    ),
    "adalora-conv1d": (
        "adalora",
        "gpt2",
        lambda: peft.AdaLoraConfig(
            target_modules=["c_attn"], init_r=3, total_step=10, fan_in_fan_out=True
        ),
    ),
    "c3a": ("c3a", "llama", lambda: peft.C3AConfig(block_size=32, target_modules=ALL)),
    "c3a-pattern": (
        "c3a",
        "llama",
        lambda: peft.C3AConfig(
            block_size=4, block_size_pattern={"q_proj": 3}, target_modules=ATTENTION
        ),
    ),
    "hira": ("hira", "llama", lambda: peft.HiraConfig(r=5, target_modules=ALL, **ODD_RANKS)),
    "hira-conv1d": (
        "hira",
        "gpt2",
        lambda: peft.HiraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True),
    ),
    "hira-embedding": (
        "hira",
        "llama",
        lambda: peft.HiraConfig(r=4, target_modules=["embed_tokens", "q_proj"]),
    ),
    "hra": ("hra", "llama", lambda: peft.HRAConfig(r=5, target_modules=ALL)),
    "hra-orthogonal": (
        "hra",
        "llama",
        lambda: peft.HRAConfig(r=6, apply_GS=True, target_modules=ALL),
    ),
    "miss": ("miss", "llama", lambda: peft.MissConfig(r=7, target_modules=ALL)),
    "miss-mini": (
        "miss",
        "llama",
        lambda: peft.MissConfig(r=16, mini_r=8, init_weights="mini", target_modules=ALL),
    ),
    "miss-bat": (
        "miss",
        "llama",
        lambda: peft.MissConfig(r=16, init_weights="bat", target_modules=ALL),
    ),
    "vblora": (
        "vblora",
        "llama",
        lambda: peft.VBLoRAConfig(
            r=3, num_vectors=20, vector_length=16, topk=3, target_modules=ALL
        ),
    ),
    "vblora-conv1d": (
        "vblora",
        "gpt2",
        lambda: peft.VBLoRAConfig(
            num_vectors=9, vector_length=8, target_modules=["c_attn"], fan_in_fan_out=True
        ),
    ),
}
"""Name: kind, tiny model, config. Shapes are 96 x 160, 192 x 96, 64 x 96 and their like."""


BUTTERFLIES = {
    "boft-butterfly-2": {"boft_block_size": 8, "boft_n_butterfly_factor": 2},
    "boft-butterfly-4": {"boft_block_size": 4, "boft_n_butterfly_factor": 4},
    "boft-butterfly-odd": {
        "boft_block_size": 0,
        "boft_block_num": 16,
        "boft_n_butterfly_factor": 3,
    },
}
"""Configs that PEFT trains with its CUDA extension only."""


@pytest.fixture(scope="module")
def adapter_of(
    tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], PeftAdapter]:
    """``adapter_of(case)``, made once."""

    @functools.cache
    def make(case: str) -> PeftAdapter:
        _, model, config = CASES[case]
        folder = tmp_path_factory.mktemp("adapters") / case
        return make_adapter(tiny_model(model), config(), folder, noise=0.2)

    return make


KINDS = [name for name in CASES if "-" not in name]


@pytest.mark.parametrize("case", CASES)
def test_merged_weights_are_those_of_peft(
    case: str, adapter_of: Callable[[str], PeftAdapter], figure: Figure
) -> None:
    kind, model, _ = CASES[case]
    adapter = adapter_of(case)
    furthest = worst_share(kind, adapter, model)
    assert furthest <= BOUNDS[kind]
    figure("kinds", kind, furthest)


@pytest.mark.parametrize("case", CASES)
def test_every_weight_that_peft_changes_is_bound(
    case: str, adapter_of: Callable[[str], PeftAdapter]
) -> None:
    kind, model, _ = CASES[case]
    adapter = adapter_of(case)
    changed = {
        name
        for name, value in adapter.merged.items()
        if not np.array_equal(value, adapter.base[name])
    }
    if case == "oft-1-terms":
        assert not changed  # the first term of the series is the identity
    else:
        assert changed == {name for name, _, _ in edits(kind, adapter, model)}


@pytest.mark.parametrize(
    "case",
    [*KINDS, "ia3-conv1d", "oft-embedding"],
)
def test_a_model_is_merged_from_the_folder_that_peft_saved(
    case: str, adapter_of: Callable[[str], PeftAdapter], tiny_model: Callable[[str], Path]
) -> None:
    kind, model, _ = CASES[case]
    made = adapter_of(case)
    base = open_source(str(tiny_model(model)))
    merged = merged_source(base, [open_adapter(str(made.folder))], Combination())
    for row in base.family.tensors(base.decoder):
        got = merged.tensors[row.role].load()
        expected = made.merged[row.source]
        expected = expected.T if row.transposed else expected.reshape(got.shape)
        assert share(got, expected) <= BOUNDS[kind], row.source


@pytest.mark.parametrize("case", CASES)
def test_rows_have_the_same_bits_in_every_slab(
    case: str, adapter_of: Callable[[str], PeftAdapter]
) -> None:
    kind, model, _ = CASES[case]
    seen: set[tuple[int, ...]] = set()
    for name, edit, base in edits(kind, adapter_of(case), model):
        if base.shape in seen:
            continue
        seen.add(base.shape)
        whole = edit.apply(base.copy(), 0, len(base), 1.0)
        for step in (1, 13, 50):
            slabs = [
                edit.apply(base[i : i + step].copy(), i, min(i + step, len(base)), 1.0)
                for i in range(0, len(base), step)
            ]
            np.testing.assert_array_equal(np.concatenate(slabs), whole, err_msg=name)


@pytest.mark.parametrize("case", BUTTERFLIES)
def test_butterflies_of_several_factors_are_those_of_peft(
    case: str, tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT's own code, save the CUDA kernel that lays blocks on a diagonal."""

    class BlockDiagonal:
        @staticmethod
        def forward(blocks: torch.Tensor) -> list[torch.Tensor]:
            return [torch.stack([torch.block_diag(*each) for each in blocks])]

    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: BlockDiagonal)
    config = peft.BOFTConfig(target_modules=ATTENTION, **BUTTERFLIES[case])
    adapter = make_adapter(tiny_model("llama"), config, tmp_path / "adapter", noise=0.2)
    factors = {parts["boft_R"].shape[0] for parts in parts_by_weight(adapter.folder).values()}
    assert factors == {config.boft_n_butterfly_factor}
    assert worst_share("boft", adapter, "llama") <= BOUNDS["boft"]


def test_weighted_ia3_adapters_are_those_of_peft(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    config = peft.IA3Config(target_modules=ALL, feedforward_modules=["down_proj"])
    model = trained(tiny_model("llama-biased"), config, seed=1, noise=0.3, adapter_name="a")
    model.add_adapter("b", config)
    model.set_adapter("b")
    move(model, seed=2, noise=0.3)
    model.save_pretrained(tmp_path)
    before = state_of(tiny_models.load(tiny_model("llama-biased")))
    weights = [0.75, -0.5]
    model.base_model.add_weighted_adapter(["a", "b"], weights, "sum")
    model.set_adapter("sum")
    expected = PeftAdapter(tmp_path, before, state_of(model.merge_and_unload()))
    each = [
        edits("ia3", PeftAdapter(tmp_path / name, before, before), "llama") for name in ("a", "b")
    ]
    linear = Combination("linear")
    for (name, first, base), (_, second, _) in zip(*each, strict=True):
        target = Target(name, base.shape, "bias" if len(base) == 1 else "linear")
        edit = combined([first, second], weights, linear, target)
        got = edit.apply(base.copy(), 0, len(base), 1.0)
        assert share(got, canonical(expected.merged, name, "llama")) <= BOUNDS["ia3"]


def test_ranks_that_adalora_gave_up_change_nothing(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """PEFT leaves them out of the file, whole layers among them, and scales as at the start."""
    config = peft.AdaLoraConfig(target_modules=["q_proj"], init_r=4, lora_alpha=9, total_step=10)
    model = trained(tiny_model("llama"), config, noise=0.2)
    masks = [[True, False, True, True], [False] * 4, [True] * 4]
    model.peft_config["default"].rank_pattern = {
        f"model.layers.{layer}.self_attn.q_proj.lora_E.default": mask
        for layer, mask in enumerate(masks)
    }
    with pytest.warns(PeftWarning, match="invalid shape"):  # of its own kind's making
        model.save_pretrained(tmp_path)
    base = tiny_models.load(tiny_model("llama"))
    before = state_of(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it ignores the masks, and does not
        loaded = peft.PeftModel.from_pretrained(base, tmp_path)
    adapter = PeftAdapter(tmp_path, before, state_of(loaded.merge_and_unload()))
    assert [edit.rank for _, edit, _ in edits("adalora", adapter, "llama")] == [3, 0, 4]
    assert worst_share("adalora", adapter, "llama") <= BOUNDS["adalora"]
    source = open_source(str(tiny_model("llama")))
    merged = merged_source(source, [open_adapter(str(tmp_path))], Combination())
    assert len(merged.merge.bindings[0]) == 3


def worst_share(kind: str, adapter: PeftAdapter, model: str) -> float:
    """The largest difference from PEFT over all changed weights, as ``BOUNDS`` counts it."""
    worst = 0.0
    for name, edit, base in edits(kind, adapter, model):
        got = edit.apply(base.copy(), 0, len(base), 1.0)
        worst = max(worst, share(got, canonical(adapter.merged, name, model)))
        unchanged = edit.apply(base.copy(), 0, len(base), 0.0)
        np.testing.assert_array_equal(unchanged, base)
    print(f"{kind}: {worst:.1e}")
    return worst


def share(got: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference as a share of the largest value of ``expected``."""
    return float(np.abs(got - expected).max() / np.abs(expected).max())


def edits(kind: str, adapter: PeftAdapter, model: str) -> list[tuple[str, Edit, np.ndarray]]:
    """Every weight that the saved adapter changes: name, its edit, its canonical base values."""
    config = json.loads((adapter.folder / "adapter_config.json").read_text())
    found = []
    for name, parts in parts_by_weight(adapter.folder).items():
        base = canonical(adapter.base, name, model)
        found.append((name, bind_of(kind)(target(name, base, model), parts, config), base))
        bias = name.removesuffix("weight") + "bias"
        if kind == "ia3" and scales_outputs(parts) and bias in adapter.base:
            vector = adapter.base[bias]
            bias_target = Target(bias, vector.shape, "bias")
            found.append((bias, bind_of(kind)(bias_target, parts, config), vector[None, :]))
    return found


def target(name: str, base: np.ndarray, model: str) -> Target:
    kind = "embedding" if "embed_tokens" in name else "linear"
    return Target(name, base.shape, kind, transposed=model == "gpt2")


def canonical(state: dict[str, np.ndarray], name: str, model: str) -> np.ndarray:
    """A weight as ``[out, in]``, a bias as one row."""
    value = state[name]
    if value.ndim == 1:
        return value[None, :]
    return np.ascontiguousarray(value.T) if model == "gpt2" else value


def parts_by_weight(folder: Path) -> dict[str, dict[str, TensorRef]]:
    """The tensors of ``adapter_model.safetensors`` by weight and part, shared ones with each."""
    shared: dict[str, TensorRef] = {}
    found: dict[str, dict[str, TensorRef]] = {}
    file = read_safetensors(folder / "adapter_model.safetensors")
    for key in file.tensors:
        ref = file.ref(key)
        path = key.removesuffix(".weight").split(".")
        if len(path) == 2:  # base_model.vera_A
            shared[path[1]] = ref
        elif path[-1] != "base_layer":  # the base's own embedding, which PEFT saves too
            name = ".".join(path[2:-1]) + ".weight"
            found.setdefault(name, {})[path[-1]] = ref
    return {name: parts | shared for name, parts in found.items()}
