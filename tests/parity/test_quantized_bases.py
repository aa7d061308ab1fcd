"""Bases that bitsandbytes quantized, and those that we round like it, against bitsandbytes itself.

Its kernels for AVX512 repack weights at the first forward in eval mode and compute in bf16: weights
are compared before any forward, logits in train mode, which is how adapters are trained.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models

from edgellm.errors import EdgeError, SourceError, UnsupportedModel
from edgellm.lora.adapter import Adapter
from edgellm.lora.base.bases import training_base
from edgellm.lora.base.rounded_base import dequantized_base
from edgellm.lora.binding import Combination
from edgellm.lora.merging import merged_source
from edgellm.lora.reading.open import open_adapter
from edgellm.quant import bnb_4bit, bnb_absmax, bnb_int8
from edgellm.source import ModelSource, open_source
from edgellm.source.quantized import bnb
from edgellm.source.safetensors_file import RawTensor, StoredTensor, read_safetensors
from edgellm.source.weight_file import WeightFile

torch = pytest.importorskip("torch")
functional = pytest.importorskip("bitsandbytes.functional")

METHODS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-dq": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "fp4-dq": {"load_in_4bit": True, "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}


@pytest.fixture(autouse=True)
def uncompiled() -> Iterator[None]:
    """bitsandbytes compiles some kernels for every new shape, which takes seconds each."""
    before = torch._dynamo.config.disable
    torch._dynamo.config.disable = True
    yield
    torch._dynamo.config.disable = before


@pytest.fixture(scope="module", autouse=True)
def kernels_without_avx512() -> Iterator[None]:
    """Blocks are multiplied by bitsandbytes' own kernel for devices without one of their own.

    Its kernel for AVX512 gives blocks that begin within a row the maximum of another block.
    """
    kernel = torch.library.get_kernel("bitsandbytes::dequantize_4bit", "XPU")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    library = torch.library.Library("bitsandbytes", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the kernel that this one takes the place of
        library.impl(
            "dequantize_4bit",
            lambda *arguments: kernel.call_boxed(keys, *arguments),
            "CPU",
            allow_override=True,
        )
    yield
    library._destroy()


def quantized(folder: Path, dtype: str, settings: dict[str, Any]) -> Any:
    """The model of ``folder`` loaded in ``dtype`` and quantized by bitsandbytes."""
    import transformers

    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            attn_implementation="eager",
            quantization_config=transformers.BitsAndBytesConfig(**settings),
        )


def save(model: Any, folder: Path, original: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    for file in original.glob("*token*"):
        shutil.copy(file, folder)
    return folder


def read_back(model: Any) -> dict[str, np.ndarray]:
    """Every quantized weight by its name, as bitsandbytes dequantizes it."""
    import bitsandbytes

    result = {}
    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            values = functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        elif isinstance(module, bitsandbytes.nn.Linear8bitLt):
            values = functional.int8_vectorwise_dequant(module.weight.data, module.weight.SCB)
        else:
            continue
        result[f"{name}.weight"] = values.float().numpy()
    return result


def by_name(source: ModelSource) -> dict[str, np.ndarray]:
    """The linear weights of ``source`` by their names in a checkpoint, loaded in uneven slabs."""
    result = {}
    for row in source.family.tensors(source.decoder):
        if row.kind == "linear":
            ref = source.tensors[row.role]
            slabs = [ref.load(at, min(at + 13, ref.rows)) for at in range(0, ref.rows, 13)]
            result[row.source] = np.concatenate(slabs)
    return result


@pytest.mark.parametrize(
    ("name", "dtype", "method", "extra"),
    [
        ("llama", "bfloat16", "nf4", {}),
        ("llama", "bfloat16", "nf4-dq", {}),
        ("llama", "float32", "fp4", {}),
        ("llama", "float16", "fp4-dq", {}),
        ("llama", "bfloat16", "int8", {}),
        # Words of FSDP's making, and Conv1D weights, which are turned round before.
        ("llama", "bfloat16", "nf4-dq", {"bnb_4bit_quant_storage": "bfloat16"}),
        ("gpt2", "float16", "nf4-dq", {}),
        ("gpt2", "float16", "int8", {}),
    ],
)
def test_a_quantized_folder_has_the_values_of_bitsandbytes(
    name: str,
    dtype: str,
    method: str,
    extra: dict[str, Any],
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    original = tiny_model(name)
    model = quantized(original, dtype, METHODS[method] | extra)
    source = open_source(str(save(model, tmp_path, original)), quantized=True)
    expected = read_back(model)
    found = by_name(source)
    assert found.keys() == expected.keys()
    for weight, values in expected.items():
        np.testing.assert_array_equal(found[weight], values, err_msg=weight)
    assert {ref.dtype for ref in source.tensors.values() if len(ref.shape) == 2} >= {method}
    # What is not quantized is as it was.
    theirs = model.get_input_embeddings().weight.detach().float().numpy()
    np.testing.assert_array_equal(source.tensors["token_embd.weight"].load(), theirs)


def weights(shape: tuple[int, ...], dtype: str, seed: int = 0) -> Any:
    """Normal weights with a zero row and an outlier, a torch tensor of ``dtype``."""
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=draw)
    values[2] = 0
    values[3, 4] = 30
    return values.to(getattr(torch, dtype))


@pytest.mark.parametrize("block", [32, 64, 4096])
@pytest.mark.parametrize("shape", [(96, 160), (33, 50), (7, 13)])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_codes_and_values_of_blocks_are_those_of_bitsandbytes(
    kind: str, shape: tuple[int, int], block: int
) -> None:
    values = weights(shape, "float32")
    flat = values.numpy().reshape(-1)
    # A first block of size 1, with values that lie half way between two levels.
    levels = np.sort(bnb_4bit.LEVELS[kind])
    flat[:64] *= 0.01
    flat[:15], flat[15] = (levels[:-1] + levels[1:]) / np.float32(2), 1
    packed, state = functional.quantize_4bit(values, quant_type=kind, blocksize=block)
    absmax = bnb_4bit.block_absmax(flat, block)
    np.testing.assert_array_equal(absmax, state.absmax.numpy())
    codes = bnb_4bit.quantize(flat, absmax, kind, block)
    np.testing.assert_array_equal(bnb_4bit.unpack(packed.numpy().reshape(-1))[: len(codes)], codes)
    np.testing.assert_array_equal(
        bnb_4bit.dequantize(codes, absmax, kind, block),
        functional.dequantize_4bit(packed, state).numpy().reshape(-1),
    )


def test_the_levels_of_scales_are_those_of_bitsandbytes() -> None:
    np.testing.assert_array_equal(bnb_absmax.LEVELS, functional.create_dynamic_map().numpy())


def as_on_a_gpu(values: Any) -> tuple[Any, Any]:
    """8-bit codes and scales by bitsandbytes' own kernel for devices without one of their own.

    It looks for the nearest level, as the CUDA kernel does; the CPU's looks it up in a table.
    """
    kernel = torch.library.get_kernel("bitsandbytes::quantize_blockwise", "XPU")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    return kernel.call_boxed(keys, values, functional.create_dynamic_map(), 256)


def test_scales_are_rounded_twice_as_bitsandbytes_does_it() -> None:
    values = weights((300, 1024), "float32")
    _, state = functional.quantize_4bit(values, quant_type="nf4", compress_statistics=True)
    absmax = bnb_4bit.block_absmax(values.numpy().reshape(-1))
    # The mean depends on the order of the sum, which is the device's own; ours is the exact one.
    ours = bnb_absmax.quantize(absmax)
    assert abs(ours.offset - state.offset.numpy()) <= np.spacing(ours.offset)
    rest = bnb_absmax.quantize(absmax, np.float32(state.offset))
    codes, scales = as_on_a_gpu(torch.from_numpy(absmax) - state.offset)
    np.testing.assert_array_equal(rest.codes, codes.numpy())
    np.testing.assert_array_equal(rest.absmax, scales.numpy())
    # Its kernel for the CPU takes the neighbour where a value lies half way between two.
    differ = rest.codes != state.absmax.numpy()
    assert differ.mean() < 0.01
    np.testing.assert_array_equal(
        bnb_absmax.dequantize(state.absmax.numpy(), rest.absmax, rest.offset),
        (functional.dequantize_blockwise(state.absmax, state.state2) + state.offset).numpy(),
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_int8_rows_are_those_of_bitsandbytes(dtype: str) -> None:
    for seed in range(20):  # values half way between two codes are rare
        values = weights((64, 100), dtype, seed)
        codes, absmax, _ = functional.int8_vectorwise_quant(values.to(torch.float16))
        ours, scales = bnb_int8.quantize(values.float().numpy())
        np.testing.assert_array_equal(ours, codes.numpy())
        np.testing.assert_array_equal(scales, absmax.numpy())
        np.testing.assert_array_equal(
            bnb_int8.dequantize(ours, scales), functional.int8_vectorwise_dequant(codes, absmax)
        )


def stored_in(dtype: str, original: Path, folder: Path) -> Path:
    """The model of ``original`` saved in ``dtype``."""
    return save(tiny_models.load(original).to(getattr(torch, dtype)), folder, original)


@pytest.mark.parametrize(
    ("name", "dtype", "method"),
    [
        ("llama", "float32", "nf4"),
        ("llama", "bfloat16", "nf4"),
        ("llama", "bfloat16", "fp4"),
        ("llama", "bfloat16", "int8"),
        ("gpt2", "float16", "nf4"),
    ],
)
def test_rounding_a_base_is_what_loading_it_with_bitsandbytes_does(
    name: str, dtype: str, method: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = stored_in(dtype, tiny_model(name), tmp_path)
    expected = read_back(quantized(folder, dtype, METHODS[method]))
    source = open_source(str(folder))
    found = by_name(dequantized_base(source, method))
    assert found.keys() == expected.keys()
    for weight, values in expected.items():
        np.testing.assert_array_equal(found[weight], values, err_msg=weight)
    head = source.tensors.get("output.weight", source.tensors["token_embd.weight"])
    after = dequantized_base(source, method).tensors[head.role]
    np.testing.assert_array_equal(after.load(), head.load())


def test_rounding_twice_differs_from_bitsandbytes_by_the_kernel_of_its_cpu_alone(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = stored_in("bfloat16", tiny_model("llama"), tmp_path)
    expected = read_back(quantized(folder, "bfloat16", METHODS["nf4-dq"]))
    once = by_name(dequantized_base(open_source(str(folder)), "nf4"))
    found = by_name(dequantized_base(open_source(str(folder)), "nf4-dq"))
    total = sum(values.size for values in expected.values())
    differ = sum(np.count_nonzero(found[name] != expected[name]) for name in expected)
    assert differ / total < 0.02
    assert sum(np.count_nonzero(once[name] != expected[name]) for name in expected) / total > 0.2
    for name, values in expected.items():
        assert np.abs(found[name] - values).max() <= 2**-7 * np.abs(values).max()


def test_modules_that_were_skipped_are_left_as_they_are(tiny_model: Callable[[str], Path]) -> None:
    skipped = ["self_attn.k_proj", "model.layers.1", "lm_head"]
    folder = tiny_model("llama")
    expected = read_back(
        quantized(folder, "float32", METHODS["nf4"] | {"llm_int8_skip_modules": skipped})
    )
    source = open_source(str(folder))
    before, found = by_name(source), by_name(dequantized_base(source, "nf4", skipped))
    changed = {name for name in before if not np.array_equal(before[name], found[name])}
    assert changed == expected.keys()
    for weight, values in expected.items():
        np.testing.assert_array_equal(found[weight], values)


@pytest.fixture(scope="module")
def stored(
    tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, RawTensor]]:
    """The tensors of the tiny llama in nf4 (rounded twice) and in int8, not yet understood."""
    result = {}
    for method in ("nf4-dq", "int8"):
        original = tiny_model("llama")
        model = quantized(original, "bfloat16", METHODS[method])
        folder = save(model, tmp_path_factory.mktemp(method), original)
        file = read_safetensors(folder / "model.safetensors")
        result[method] = {name: file.raw(name) for name in file.tensors}
    return result


WEIGHT = "model.layers.1.self_attn.q_proj.weight"
STATE = f"{WEIGHT}.quant_state.bitsandbytes__nf4"


def first_bytes(tensor: RawTensor, nbytes: int) -> RawTensor:
    return replace(tensor, stored=replace(tensor.stored, nbytes=nbytes))


@pytest.mark.parametrize(
    ("damage", "error", "said"),
    [
        (lambda raw: raw.pop(f"{WEIGHT}.absmax"), SourceError, r"absmax is missing"),
        (lambda raw: raw.pop(f"{WEIGHT}.nested_quant_map"), SourceError, "quant_map is missing"),
        # Scales that were rounded twice are taken for plain ones.
        (lambda raw: raw.pop(f"{WEIGHT}.nested_absmax"), SourceError, "takes 288 bytes.* 1152"),
        (lambda raw: raw.pop(WEIGHT), SourceError, "q_proj.weight is missing"),
        (
            lambda raw: raw.update({WEIGHT: raw[WEIGHT.replace("q_proj", "k_proj")]}),
            SourceError,
            "takes 3072 bytes and the quantization state gives it 9216",
        ),
        (
            lambda raw: raw.update({STATE: raw[WEIGHT]}),
            SourceError,
            "unreadable quantization state",
        ),
        (
            lambda raw: raw.update(
                {f"{WEIGHT}.quant_map": first_bytes(raw[f"{WEIGHT}.nested_quant_map"], 64)}
            ),
            UnsupportedModel,
            "levels that bitsandbytes does not use",
        ),
    ],
)
def test_damaged_4_bit_weights_are_refused(
    damage: Callable[[dict[str, RawTensor]], Any],
    error: type[EdgeError],
    said: str,
    stored: dict[str, dict[str, RawTensor]],
) -> None:
    raw = dict(stored["nf4-dq"])
    assert bnb.read(raw, {}, "here")[WEIGHT].dtype == "nf4-dq"
    damage(raw)
    with pytest.raises(error, match=said):
        bnb.read(raw, {}, "here")


@pytest.mark.parametrize(
    "text",
    [
        b'{"shape": [96, 96], "blocksize": 64}',
        b'{"shape": [96, Infinity], "blocksize": 64, "dtype": "float32"}',
        b'{"shape": [-96, -96], "blocksize": 64, "dtype": "float32"}',
    ],
)
def test_damaged_quantization_states_are_refused(
    text: bytes, stored: dict[str, dict[str, RawTensor]], tmp_path: Path
) -> None:
    (tmp_path / "state").write_bytes(text)
    file = WeightFile(tmp_path / "state")
    state = RawTensor(file, StoredTensor(STATE, "U8", (len(text),), 0, len(text)))
    with pytest.raises(SourceError, match="quantization state"):
        bnb.read({**stored["nf4-dq"], STATE: state}, {}, "here")


def test_damaged_8_bit_weights_are_refused(stored: dict[str, dict[str, RawTensor]]) -> None:
    raw = stored["int8"]
    module = WEIGHT.removesuffix(".weight")
    scales = first_bytes(raw[f"{module}.SCB"], 4)
    with pytest.raises(SourceError, match="SCB takes 4 bytes"):
        bnb.read(raw | {f"{module}.SCB": scales}, {}, "here")
    with pytest.raises(SourceError, match="has SCB scales and is BF16"):
        bnb.read(raw | {WEIGHT: raw["model.embed_tokens.weight"]}, {}, "here")
    with pytest.raises(SourceError, match="has SCB scales and is missing"):
        bnb.read({name: raw[name] for name in raw if name != WEIGHT}, {}, "here")
    with pytest.raises(UnsupportedModel, match="layout for one kind of GPU"):
        bnb.read(raw | {f"{module}.weight_format": scales}, {}, "here")


PROMPT = tiny_models.some_token_ids(24)


@pytest.fixture(scope="module")
def qlora(tiny_model: Callable[[str], Path], tmp_path_factory: Any) -> dict[str, Any]:
    """An adapter trained (as far as a draw is that) on a base loaded in nf4: both on disk, and the
    logits of the two together, unmerged."""
    import peft

    original = tiny_model("llama")
    root = tmp_path_factory.mktemp("qlora")
    model = quantized(original, "float32", METHODS["nf4-dq"])
    base = save(model, root / "base", original)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False
    )
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trained = peft.get_peft_model(model, config).train()
        trained.save_pretrained(root / "adapter")
    with torch.no_grad():
        logits = trained(torch.tensor([PROMPT]), use_cache=False).logits[0].float().numpy()
    return {"original": original, "base": base, "adapter": root / "adapter", "logits": logits}


def logits_of(source: ModelSource, original: Path) -> np.ndarray:
    """transformers' logits of the weights of ``source``, float32."""
    model = tiny_models.load(original)
    state = {
        row.source: torch.from_numpy(source.tensors[row.role].load().reshape(row.shape))
        for row in source.family.tensors(source.decoder)
    }
    model.load_state_dict(state, strict=False)
    with torch.no_grad():
        result: np.ndarray = model(torch.tensor([PROMPT]), use_cache=False).logits[0].numpy()
    return result


def merged(adapter: Adapter, source: ModelSource, asked: str | None = None) -> ModelSource:
    base = training_base(adapter, source, asked)
    return merged_source(base.of(source), [adapter], Combination())


def test_merging_into_the_base_of_training_gives_the_answers_of_training(
    qlora: dict[str, Any],
) -> None:
    adapter = open_adapter(str(qlora["adapter"]))
    full = open_source(str(qlora["original"]))
    stored = open_source(str(qlora["base"]), quantized=True)

    def distance(source: ModelSource) -> float:
        difference = logits_of(source, qlora["original"]) - qlora["logits"]
        return float(np.sqrt(np.mean(difference**2)) / np.std(qlora["logits"]))

    # Into the quantized base itself: only the order of float32 sums is left.
    assert distance(merged(adapter, stored)) < 1e-5
    # Into the full-precision one, rounded as training did: and the CPU kernel's half-way codes.
    assert distance(merged(adapter, full, "nf4-dq")) < 1e-3
    # Into the full-precision one, as tools that do not ask would.
    assert distance(merged(adapter, full, "full")) > 0.05
