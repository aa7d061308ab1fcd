"""Qwen 3 (dense): Qwen 2 with norms on queries and keys, heads of a size of their own."""

from __future__ import annotations

from edgellm.architectures import llama, qwen2
from edgellm.architectures.config import Config
from edgellm.architectures.decoder import Decoder
from edgellm.architectures.family import Family, GgufLayout


def read(config: Config) -> Decoder:
    shape = llama.read_shape(config, head_dim_required=True)
    bias = config.flag("attention_bias", False)
    return llama.read_decoder(
        config,
        shape,
        "qwen3",
        windows=qwen2.read_windows(config, shape.layers),
        qkv_bias=bias,
        output_bias=bias,
        qk_norm=True,
    )


FAMILY = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    read=read,
    tensors=llama.tensors,
    gguf=GgufLayout("qwen3"),
    base_prefix="model.",
    ignored_tensors=llama.IGNORED_TENSORS,
)
