"""LoRA and its variants against PEFT's own merge in float32, weight by weight."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("peft", reason="peft is not installed")

from peft_adapters import PeftAdapter, loaded, make_adapter, state_of, trained

from edgellm.lora.adapter import Adapter
from edgellm.lora.edit import Edit, Target
from edgellm.lora.kinds import KINDS, bind_of
from edgellm.lora.reading.open import open_adapter
from edgellm.lora.reading.peft_config import read_config
from edgellm.lora.reading.refused_kinds import REFUSED
from edgellm.source import open_source
from edgellm.source.matching import embedding_row, head_row
from edgellm.source.model import ModelSource
from edgellm.tensors import Array

TinyModel = Callable[[str], Path]
Figure = Callable[[str, str, float], None]

BOUNDS = {
    "lora": 1e-6,  # measured: 1.0e-7
    "rslora": 1e-6,  # 2.4e-7
    "patterns": 1e-6,  # 1.4e-7
    "dora": 1e-6,  # 3.9e-7
    "embedding": 1e-6,  # 1.6e-7
    "bias": 0.0,  # 0
    "lora_bias": 1e-6,  # 7.9e-8
    "modules_to_save": 0.0,  # 0
    "target_parameters": 1e-6,  # 9.4e-8
    "trainable_tokens": 0.0,  # 0
    "ln_tuning": 0.0,  # 0
}
"""Largest difference from PEFT's merged weight, as a share of that weight's largest value.

Whole tensors and rows are copied, so they are equal; plain LoRA on other weights of such a case is
held to LoRA's own bound. The others add float32 values up in another order, and take DoRA's norm in
float64.
"""

WHOLE = ("bias", "modules_to_save", "trainable_tokens")
"""Kinds of which a case also has plain LoRA on other weights."""

LLAMA, GPT2, GEMMA, BIASED = "llama", "gpt2", "gemma3", "llama-biased"
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GPT2_ALL = ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"]
PATTERNS = {
    "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.(gate|up)_proj": 3, "^v_proj": 7},
    "alpha_pattern": {"model.layers.0.self_attn.q_proj": 5, ".*down_proj": 1.5, "proj": 99},
}


def lora(**settings: Any) -> Any:
    import peft

    return peft.LoraConfig(**{"r": 12, "lora_alpha": 7, **settings})


def ln_tuning(**settings: Any) -> Any:
    import peft

    return peft.LNTuningConfig(**settings)


def tokens(**settings: Any) -> Any:
    import peft

    return peft.TrainableTokensConfig(**settings)


Q = ["q_proj"]
CASES: dict[str, tuple[str, str, Callable[[], Any]]] = {
    "plain": ("lora", LLAMA, lambda: lora(target_modules=ALL)),
    "all-linear": (
        "lora",
        LLAMA,
        lambda: lora(target_modules="all-linear", task_type="CAUSAL_LM"),
    ),
    "conv1d": ("lora", GPT2, lambda: lora(target_modules=GPT2_ALL, fan_in_fan_out=True)),
    "conv1d unsaid": ("lora", GPT2, lambda: lora(target_modules=GPT2_ALL)),
    "some layers": ("lora", LLAMA, lambda: lora(target_modules=Q, layers_to_transform=[1])),
    "head": ("lora", LLAMA, lambda: lora(target_modules=["lm_head", "q_proj"])),
    "velora": ("lora", LLAMA, lambda: lora(target_modules=Q, velora_config={"num_groups": 4})),
    "mica": ("lora", LLAMA, lambda: lora(target_modules=Q, init_lora_weights="mica")),
    "rslora": ("rslora", LLAMA, lambda: lora(target_modules=ALL, use_rslora=True)),
    "patterns": ("patterns", LLAMA, lambda: lora(target_modules=ALL, **PATTERNS)),
    "patterns, rslora": (
        "patterns",
        LLAMA,
        lambda: lora(target_modules=ALL, use_rslora=True, **PATTERNS),
    ),
    "dora": ("dora", LLAMA, lambda: lora(target_modules=[*ALL, "lm_head"], use_dora=True)),
    "dora, rslora": (
        "dora",
        GEMMA,
        lambda: lora(target_modules=ALL, use_dora=True, use_rslora=True),
    ),
    "dora conv1d": ("dora", GPT2, lambda: lora(target_modules=GPT2_ALL, use_dora=True)),
    "dora embedding": (
        "dora",
        LLAMA,
        lambda: lora(target_modules=["embed_tokens", "q_proj"], use_dora=True),
    ),
    "dora positions": ("dora", GPT2, lambda: lora(target_modules=["wpe", "c_fc"], use_dora=True)),
    "embedding": ("embedding", LLAMA, lambda: lora(target_modules=["embed_tokens", "q_proj"])),
    "tied embedding": (
        "embedding",
        GEMMA,
        lambda: lora(target_modules=["embed_tokens", "q_proj"]),
    ),
    "positions": ("embedding", GPT2, lambda: lora(target_modules=["wpe", "c_attn"])),
    "bias all": ("bias", BIASED, lambda: lora(target_modules=Q, bias="all")),
    "bias lora_only": ("bias", BIASED, lambda: lora(target_modules=ALL, bias="lora_only")),
    "bias conv1d": ("bias", GPT2, lambda: lora(target_modules=["c_attn"], bias="all")),
    "lora_bias": (
        "lora_bias",
        BIASED,
        lambda: lora(target_modules=ALL, lora_bias=True, rank_pattern={"q_proj": 2}),
    ),
    "tables and norms saved": (
        "modules_to_save",
        LLAMA,
        lambda: lora(target_modules=Q, modules_to_save=["embed_tokens", "lm_head", "norm"]),
    ),
    "norms saved": (
        "modules_to_save",
        GPT2,
        lambda: lora(target_modules=["c_attn"], modules_to_save=["ln_1", "ln_f"]),
    ),
    "target_parameters": (
        "target_parameters",
        LLAMA,
        lambda: lora(
            target_modules=[],
            target_parameters=["q_proj.weight", "embed_tokens.weight", "down_proj.weight"],
            rank_pattern={"q_proj.weight": 2, "down_proj": 7},
        ),
    ),
    # Taken as it is stored, [in, out]; the second is square, so that no shape says which way.
    "target_parameters conv1d": (
        "target_parameters",
        GPT2,
        lambda: lora(target_modules=[], target_parameters=["c_attn.weight", "attn.c_proj.weight"]),
    ),
    "tokens": (
        "trainable_tokens",
        LLAMA,
        lambda: lora(target_modules=Q, trainable_token_indices=[500, 3, 40]),
    ),
    "tokens of two tables": (
        "trainable_tokens",
        LLAMA,
        lambda: lora(
            target_modules=Q,
            trainable_token_indices={"embed_tokens": [7, 2], "lm_head": [8, 1, 516]},
        ),
    ),
    "tokens, tied": (
        "trainable_tokens",
        GEMMA,
        lambda: lora(target_modules=Q, trainable_token_indices=[3, 40]),
    ),
    "tokens alone": (
        "trainable_tokens",
        LLAMA,
        lambda: tokens(token_indices=[9, 4], target_modules=["embed_tokens"]),
    ),
    "ln_tuning": (
        "ln_tuning",
        LLAMA,
        lambda: ln_tuning(target_modules=["input_layernorm", "norm"]),
    ),
    "ln_tuning with biases": ("ln_tuning", GPT2, lambda: ln_tuning(target_modules=["ln_1"])),
}


def targets(source: ModelSource) -> Iterator[tuple[Target, Array]]:
    """Every weight of a model by its Hugging Face name, the tied head among them."""
    rows = list(source.family.tensors(source.decoder))
    if source.decoder.tied_head:
        rows.append(head_row(source.family, source.decoder))
    table = embedding_row(source.family, source.decoder)
    for row in rows:
        ref = source.tensors.get(row.role, source.tensors[table.role])
        yield Target(row.source, row.shape, row.kind, row.transposed, ref), ref.load()


def in_slabs(edit: Edit, rows: Array, step: int) -> Array:
    """What ``edit`` makes of a weight when it is asked for slab by slab."""
    slabs = range(0, len(rows), step)
    return np.concatenate(
        [
            edit.apply(rows[start : start + step].copy(), start, min(start + step, len(rows)), 1.0)
            for start in slabs
        ]
    )


def merged(source: ModelSource, adapter: Adapter, step: int) -> dict[str, np.ndarray]:
    """All weights that ``adapter`` changes, as the checkpoint would store them."""
    bind = bind_of(adapter.kind)
    changed = {}
    for target, rows in targets(source):
        name = target.name
        if name in adapter.replaced:
            rows = adapter.replaced[name].load()
        if name in adapter.parts:
            rows = in_slabs(bind(target, adapter.parts[name], adapter.config), rows, step)
        if name in adapter.parts or name in adapter.replaced:
            whole = rows.reshape(target.shape)
            changed[name] = whole.T if target.transposed and name in adapter.parts else whole
    return changed


def distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    assert ours.shape == theirs.shape
    return float(np.abs(ours.astype(np.float64) - theirs).max() / np.abs(theirs).max())


def compare(reference: PeftAdapter, source: ModelSource, step: int = 100) -> dict[str, float]:
    """The distance of each changed weight from PEFT's; the two must change the same weights."""
    ours = merged(source, open_adapter(str(reference.folder)), step)
    theirs = {
        name
        for name, value in reference.merged.items()
        if not np.array_equal(value, reference.base[name])
    }
    if source.decoder.tied_head:
        # PEFT's merge changes the table that both share; whose it was is settled elsewhere.
        theirs &= {row.source for row in source.family.tensors(source.decoder)} | set(ours)
    assert theirs == {n for n, v in ours.items() if not np.array_equal(v, reference.base[n])}
    assert theirs
    return {name: distance(value, reference.merged[name]) for name, value in ours.items()}


@pytest.mark.parametrize("case", CASES)
def test_merges_as_peft_does(
    case: str, tiny_model: TinyModel, tmp_path: Path, figure: Figure
) -> None:
    kind, model, config = CASES[case]
    base = tiny_model(model)
    reference = make_adapter(base, config(), tmp_path / "adapter", seed=3)
    adapter = open_adapter(str(reference.folder))
    furthest: dict[str, float] = {}
    for name, far in compare(reference, open_source(str(base))).items():
        factors = any(part.startswith("lora") for part in adapter.parts.get(name, {}))
        held_to = "lora" if factors and kind in WHOLE else kind
        assert far <= BOUNDS[held_to], f"{name}: {far}"
        furthest[held_to] = max(far, furthest.get(held_to, 0.0))
    for held_to, far in furthest.items():
        figure("kinds", held_to, far)


@pytest.mark.parametrize("case", ["plain", "dora", "dora embedding", "embedding", "tokens"])
def test_rows_do_not_depend_on_the_slab(case: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    _, model, config = CASES[case]
    base = tiny_model(model)
    adapter = open_adapter(str(make_adapter(base, config(), tmp_path / "adapter").folder))
    source = open_source(str(base))
    whole, cut = merged(source, adapter, 1000), merged(source, adapter, 7)
    assert whole.keys() == cut.keys()
    for name, value in whole.items():
        assert np.array_equal(value, cut[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_every_key_that_peft_writes_is_known(kind: str, tmp_path: Path) -> None:
    """A version of PEFT with keys of its own fails here, so that someone looks what they mean."""
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind.upper())]
    needed = {"trainable_tokens": {"token_indices": [1]}, "adalora": {"total_step": 9}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config_class(**needed.get(kind, {})).save_pretrained(tmp_path)
    config, notes = read_config(tmp_path)
    assert (config["peft_type"], notes) == (kind.upper(), ())


def test_every_kind_of_peft_is_merged_or_refused_by_name() -> None:
    from peft import PeftType

    assert {kind.value for kind in PeftType} <= {kind.upper() for kind in KINDS} | REFUSED.keys()


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module."])
def test_what_trainers_save_by_themselves(
    prefix: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """The live model's own names: the adapter's among them, and originals beside what was saved."""
    from safetensors.torch import save_file

    base = tiny_model(LLAMA)
    config = lora(target_modules=Q, use_dora=True, modules_to_save=["norm", "lm_head"])
    live = trained(base, config, adapter_name="mine" if prefix else "default")
    state = {
        prefix + name: value.clone()
        for name, value in live.state_dict().items()
        if any(word in name for word in ("lora_", "modules_to_save", "original_module"))
    }
    if prefix:  # only PEFT's usual name can be told from a module's
        state = {name.replace("to_save.mine.", "to_save.default."): state[name] for name in state}
    config.save_pretrained(tmp_path)
    save_file(state, tmp_path / "adapter_model.safetensors")
    expected = state_of(live.merge_and_unload())
    ours = merged(open_source(str(base)), open_adapter(str(tmp_path)), 100)
    assert len(ours) == 11  # three of DoRA, seven norms, the head
    for name, value in ours.items():
        assert distance(value, expected[name]) < BOUNDS["dora"]


def test_factors_in_bfloat16(tiny_model: TinyModel, tmp_path: Path) -> None:
    """PEFT computes with them in float32, as here."""
    import torch
    from safetensors.torch import load_file, save_file

    base = tiny_model(LLAMA)
    folder = make_adapter(base, lora(target_modules=Q), tmp_path / "adapter").folder
    file = folder / "adapter_model.safetensors"
    save_file({name: value.to(torch.bfloat16) for name, value in load_file(file).items()}, file)
    expected = state_of(loaded(base, folder).merge_and_unload())
    for name, value in merged(open_source(str(base)), open_adapter(str(folder)), 100).items():
        assert distance(value, expected[name]) < BOUNDS["lora"]


def test_a_weight_moves_between_the_base_and_peft(tiny_model: TinyModel, tmp_path: Path) -> None:
    """DoRA too: at weight 0 nothing happens, and at 0.5 half of what PEFT's merge does."""
    base = tiny_model(LLAMA)
    settings = {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}
    reference = make_adapter(base, lora(**settings), tmp_path / "adapter")
    adapter = open_adapter(str(reference.folder))
    bind = bind_of("lora")
    for target, rows in targets(open_source(str(base))):
        if target.name not in adapter.parts:
            continue
        edit = bind(target, adapter.parts[target.name], adapter.config)
        assert np.array_equal(edit.apply(rows.copy(), 0, len(rows), 0.0), rows)
        half = (reference.base[target.name] + reference.merged[target.name]) / 2
        assert distance(edit.apply(rows.copy(), 0, len(rows), 0.5), half) < BOUNDS["dora"]


def test_scale_and_rank_can_be_read(tiny_model: TinyModel, tmp_path: Path) -> None:
    """What PEFT's own layers say, with patterns of both."""
    base = tiny_model(LLAMA)
    config = lora(target_modules=ALL, use_rslora=True, **PATTERNS)
    layers = {
        name.removeprefix("base_model.model.") + ".weight": (module.r, module.scaling)
        for name, module in trained(base, config).named_modules()
        if hasattr(module, "lora_A")
    }
    reference = make_adapter(base, config, tmp_path / "adapter")
    adapter = open_adapter(str(reference.folder))
    assert len({scaling["default"] for _, scaling in layers.values()}) > 4
    for target, _ in targets(open_source(str(base))):
        if target.name in adapter.parts:
            edit = bind_of("lora")(target, adapter.parts[target.name], adapter.config)
            rank, scaling = layers[target.name]
            assert (edit.rank, edit.scale) == (rank["default"], scaling["default"])


def test_a_resized_vocabulary_comes_with_its_table(tiny_model: TinyModel, tmp_path: Path) -> None:
    """PEFT saves the resized tables beside the change; the change starts from them."""

    def resize(model: Any) -> None:
        model.resize_token_embeddings(530, mean_resizing=False)

    settings = {"target_modules": ["q_proj", "embed_tokens"]}
    reference = make_adapter(
        tiny_model(LLAMA), lora(**settings), tmp_path / "adapter", prepare=resize
    )
    adapter = open_adapter(str(reference.folder))
    name = "model.embed_tokens.weight"
    table = adapter.replaced[name]
    assert np.array_equal(table.load(), reference.base[name])
    target = Target(name, table.shape, "embedding")
    edit = bind_of("lora")(target, adapter.parts[name], adapter.config)
    assert distance(in_slabs(edit, table.load(), 100), reference.merged[name]) < BOUNDS["embedding"]
