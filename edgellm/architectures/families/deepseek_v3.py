"""DeepSeek-V3: V2 with a router of sigmoids, a bias on the choice of experts, and groups."""

from __future__ import annotations

from dataclasses import replace

from edgellm.architectures.config import Config
from edgellm.architectures.decoder import Decoder
from edgellm.architectures.deepseek_experts import with_mixture
from edgellm.architectures.families import deepseek_v2
from edgellm.architectures.family import Family


def read(config: Config) -> Decoder:
    config.neutral("rope_interleave", True)
    return with_mixture(config, deepseek_v2.read_dense(config, "deepseek_v3"), third=True)


assert deepseek_v2.FAMILY.gguf is not None

FAMILY = Family(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    read=read,
    tensors=deepseek_v2.tensors,
    # A file is read as V2's, which the router's keys tell apart.
    gguf=replace(deepseek_v2.FAMILY.gguf, config=None),
    base_prefix="model.",
    ignored_tensors=deepseek_v2.FAMILY.ignored_tensors,
    guessing_layers="num_nextn_predict_layers",
)
