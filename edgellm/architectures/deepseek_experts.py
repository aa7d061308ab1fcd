"""DeepSeek's mixtures of experts: dense layers first, shared experts, experts in groups."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from edgellm.architectures import gguf_experts
from edgellm.architectures.config import Config
from edgellm.architectures.decoder import Decoder, Experts, Feature, Router
from edgellm.architectures.experts import Spelling, read_counts, skip_training, with_experts
from edgellm.architectures.family import GgufFacts, Value
from edgellm.errors import UnsupportedModel

SPELLING = Spelling(shared="mlp.shared_experts")

FEATURES = frozenset(
    {
        Feature.EXPERTS,
        Feature.DENSE_LAYERS,
        Feature.SHARED_EXPERTS,
        Feature.NORMALIZED_ROUTER,
        Feature.SCALED_ROUTER,
        Feature.SIGMOID_ROUTER,
        Feature.ROUTER_BIAS,
        Feature.EXPERT_GROUPS,
    }
)

GATING = {"softmax": 1, "sigmoid": 2}
"""llama.cpp's numbers of what makes scores (``llama_expert_gating_func_type``)."""

KEYS = (
    "n_routed_experts", "num_local_experts", "n_shared_experts", "num_experts_per_tok",
    "moe_intermediate_size", "n_group", "topk_group", "routed_scaling_factor", "topk_method",
    "norm_topk_prob", "scoring_func",
)  # fmt: skip
"""What means nothing where no layer has experts."""

TRAINING = (
    "aux_loss_alpha", "seq_aux", "ep_size", "num_nextn_predict_layers", "num_mtp_layers",
)  # fmt: skip
"""Of the loss, of places that experts are computed in, and of layers that guess further tokens,
whose tensors no checkpoint may have."""


def with_mixture(config: Config, decoder: Decoder, *, third: bool) -> Decoder:
    """``decoder`` with the experts that ``config`` states in the layers behind its dense ones.

    ``third``: as in DeepSeek-V3, whose router has sigmoids, a bias and groups that are as good as
    their two best experts.
    """
    config.skip(*TRAINING)
    skip_training(config)
    config.neutral("moe_layer_freq", 1)
    layers = len(decoder.layers)
    dense = config.integer("first_k_dense_replace", 0, minimum=0)
    if dense >= layers:
        config.skip(*KEYS)
        return decoder
    count, used = read_counts(config, "n_routed_experts", "num_local_experts")
    width = config.integer("moe_intermediate_size")
    experts = Experts(
        count,
        used,
        width,
        _third(config) if third else _second(config),
        shared_width=width * config.integer("n_shared_experts"),
    )
    sparse = [index >= dense for index in range(layers)]
    return replace(decoder, layers=with_experts(decoder.layers, _grouped(config, experts), sparse))


def _second(config: Config) -> Router:
    """transformers multiplies scores by the factor and never divides them by their sum."""
    config.neutral("norm_topk_prob", False)
    config.neutral("scoring_func", "softmax")
    return Router(factor=config.number("routed_scaling_factor", 1.0, above=0))


def _third(config: Config) -> Router:
    config.neutral("scoring_func", "sigmoid")
    config.neutral("topk_method", "noaux_tc")
    return Router(
        scores="sigmoid",
        normalized=config.flag("norm_topk_prob", True),
        factor=config.number("routed_scaling_factor", 1.0, above=0),
        bias=True,
        group_score="two best",
    )


def _grouped(config: Config, experts: Experts) -> Experts:
    """``experts`` in the groups that the config states, if these keep any from being chosen."""
    if not experts.router.bias:
        limits = {"greedy": False, "group_limited_greedy": True}
        if not config.choice("topk_method", limits, "greedy"):
            config.skip("n_group", "topk_group")
            return experts
    groups = config.integer("n_group")
    chosen = config.integer("topk_group", maximum=groups)
    least = 2 if experts.router.bias else 1
    if experts.count % groups or experts.count // groups < least:
        raise config.refusal(
            "n_group", groups, f"a divisor of the {experts.count} experts, {least} or more to each"
        )
    if experts.used > experts.count // groups * chosen:
        raise config.refusal(
            "topk_group", chosen, f"groups that hold the {experts.used} experts of a token"
        )
    if chosen == groups:
        return experts
    return replace(experts, router=replace(experts.router, groups=groups, groups_used=chosen))


def gguf_keys(decoder: Decoder) -> dict[str, Value]:
    """llama.cpp wants a width of experts and a number of shared ones even where there are none."""
    dense = sum(layer.experts is None for layer in decoder.layers)
    keys: dict[str, Value] = {"leading_dense_block_count": dense}
    if dense == len(decoder.layers):
        return keys | {"expert_feed_forward_length": decoder.ffn_size, "expert_shared_count": 0}
    experts = gguf_experts.mixture_of(decoder)
    router = experts.router
    if router.groups > 1:
        keys["expert_group_count"] = router.groups
        keys["expert_group_used_count"] = router.groups_used
    return keys | {
        **gguf_experts.expert_keys(decoder),
        "expert_feed_forward_length": experts.width,
        "expert_shared_count": experts.shared_width // experts.width,
        "expert_weights_scale": router.factor,
        "expert_weights_norm": router.normalized,
        "expert_gating_func": GATING[router.scores],
    }


def differences(decoder: Decoder) -> Iterator[str]:
    """What llama.cpp's graph cannot be told, in words."""
    if all(layer.experts is None for layer in decoder.layers):
        return
    yield from gguf_experts.differences(decoder)
    router = gguf_experts.mixture_of(decoder).router
    if router.groups > 1 and router.group_score != "two best":
        yield "groups of experts that are as good as their best one (it adds the two best)"


def from_gguf(facts: GgufFacts, layers: int) -> dict[str, Any]:
    """The keys of a config, the type of the model among them, which the router tells."""
    keys = facts.keys
    dense = keys.integer("leading_dense_block_count", 0, minimum=0)
    if dense >= layers:
        keys.skip("expert_feed_forward_length", "expert_shared_count")
        return {"first_k_dense_replace": dense}
    count, used = gguf_experts.counts(facts)
    scores = keys.integer("expert_gating_func", GATING["softmax"])
    known = {number: name for name, number in GATING.items()}
    if scores not in known:
        raise keys.refusal("expert_gating_func", scores, "1 (softmax) or 2 (sigmoid)")
    normalized = keys.flag("expert_weights_norm", False)
    groups = keys.integer("expert_group_count", 0, minimum=0) or 1
    biased = any(name.endswith("exp_probs_b.bias") for name in facts.names)
    third = known[scores] == "sigmoid"
    if third != biased or (not third and (normalized or groups > 1)):
        raise UnsupportedModel(
            "GGUF of the architecture deepseek2: its router is neither DeepSeek-V2's (softmax, "
            "weights that are not divided by their sum, no groups) nor V3's (sigmoid and a bias)"
        )
    config = {
        "first_k_dense_replace": dense,
        "n_routed_experts": count,
        "num_experts_per_tok": used,
        "moe_intermediate_size": keys.integer("expert_feed_forward_length"),
        "n_shared_experts": keys.integer("expert_shared_count"),
        "routed_scaling_factor": keys.number("expert_weights_scale", 0.0) or 1.0,
    }
    if not third:
        return config | {"topk_method": "greedy"}
    return config | {
        "model_type": "deepseek_v3",
        "norm_topk_prob": normalized,
        "n_group": groups,
        "topk_group": keys.integer("expert_group_used_count", 1),
    }
