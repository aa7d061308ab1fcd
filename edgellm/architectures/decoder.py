"""What a decoder-only language model computes, said once and read by every exporter and runtime.

A family file (``llama.py``, ``gpt2.py``) turns a ``config.json`` into a ``Decoder``. Exporters and
runtimes read the ``Decoder`` only, never the config, and refuse by name the features that they
cannot express (``Decoder.features() - EXPRESSIBLE``).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Literal

from edgellm.architectures.latent import Latent

Activation = Literal["silu", "gelu_tanh", "gelu", "relu"]


class Feature(enum.StrEnum):
    """One property of a network that an exporter or a runtime may be unable to express."""

    ROPE = "rotary positions"
    ROPE_LINEAR = "linear rope scaling"
    ROPE_YARN = "yarn rope scaling"
    ROPE_LLAMA3 = "llama3 rope scaling"
    ROPE_FACTORS = "rope frequencies divided by listed factors"
    ROPE_PER_LAYER = "rope frequencies that differ between layers"
    ROPE_PARTIAL = "rotary positions over a part of each head"
    LAYERS_WITHOUT_ROPE = "layers without rotary positions"
    LEARNED_POSITIONS = "learned positions"
    SKIPPED_POSITIONS = "learned positions behind unused rows of their table"
    ALIBI = "attention scores that fall with the distance (ALiBi)"
    SHORT_CONVOLUTION = "short convolutions in place of attention in some layers"
    CONVOLUTION_BIAS = "biases in short convolutions"
    STATE_SPACE = "state-space layers in place of attention"
    STATE_SPACE_BIAS = "biases in the products of state-space layers"
    NO_FEED_FORWARD = "no feed-forward"
    RMS_NORM = "RMS norm"
    LAYER_NORM = "layer norm"
    NORM_OFFSET = "norm weights stored less one"
    PLAIN_NORM = "norms without weights"
    UNBIASED_LAYER_NORM = "layer norms without biases"
    QK_NORM = "norms on queries and keys"
    QK_NORM_WHOLE = "norms on queries and keys over all heads together"
    QK_NORM_BY_HEAD = "norms on queries and keys with other weights for each head"
    LATENT_ATTENTION = "keys and values made of one latent vector (MLA)"
    POST_NORMS = "norms after attention and feed-forward"
    NO_PRE_NORMS = "no norms before attention and feed-forward"
    PARALLEL_BLOCK = "attention and feed-forward side by side"
    SHARED_NORM = "one norm before attention and feed-forward"
    SLIDING_WINDOW = "sliding-window attention in every layer"
    ALTERNATING_WINDOW = "local and global attention layers"
    ATTENTION_SOFTCAP = "soft-capped attention scores"
    LOGIT_SOFTCAP = "soft-capped logits"
    QKV_CLIP = "clipped queries, keys and values"
    GATED_MLP = "gated feed-forward"
    PLAIN_MLP = "plain feed-forward"
    QKV_BIAS = "biases on q, k and v"
    OUTPUT_BIAS = "a bias on the attention output"
    MLP_BIAS = "biases in the feed-forward"
    HEAD_BIAS = "a bias on the output head"
    EMBEDDING_SCALE = "scaled embeddings"
    EMBEDDING_NORM = "a norm on the embeddings"
    RESIDUAL_SCALE = "scaled residual branches"
    LOGIT_SCALE = "scaled logits"
    ATTENTION_SCALE = "an attention scale other than 1/sqrt(head_dim)"
    TIED_HEAD = "an output head tied to the embedding"
    EXPERTS = "a mixture of experts"
    DENSE_LAYERS = "layers without experts among those with"
    SHARED_EXPERTS = "experts that every token passes through"
    SHARED_EXPERT_GATE = "a gate on the shared expert"
    NORMALIZED_ROUTER = "router weights that sum to one"
    SCALED_ROUTER = "scaled router weights"
    SIGMOID_ROUTER = "router scores by sigmoid"
    ROUTER_BIAS = "a bias on the choice of experts"
    EXPERT_GROUPS = "experts chosen from the best groups"


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies are changed to reach beyond the trained context.

    ``linear``: positions divided by ``factor``. ``llama3``: NTK by parts (Llama 3.1's
    ``low_freq_factor``, ``high_freq_factor``). ``yarn``: arXiv 2309.00071, with
    ``attention_factor`` multiplied into cos and sin. ``factors``: every frequency divided by its
    own number of ``factors`` (``[dimensions / 2]``), which is all that a GGUF file keeps of llama3.
    """

    kind: Literal["linear", "yarn", "llama3", "factors"]
    factor: float = 1.0
    original_context: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True
    factors: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary positions over the first ``dimensions`` values of a head, in half-rotation order."""

    theta: float
    dimensions: int
    scaling: RopeScaling | None = None


@dataclass(frozen=True, slots=True)
class Norm:
    """``rms`` or ``layer`` norm; with ``offset`` the stored weight is used as ``weight + 1``.

    A layer norm may be without its ``bias``, and any without a ``weight``.
    """

    kind: Literal["rms", "layer"]
    epsilon: float
    offset: bool = False
    weight: bool = True
    bias: bool = True

    @property
    def biased(self) -> bool:
        """Whether a bias is stored."""
        return self.kind == "layer" and self.bias and self.weight


@dataclass(frozen=True, slots=True)
class Router:
    """How the experts of a token are chosen, and what their answers are weighed by.

    ``scores``: of the router's logits over all experts. The ``used`` largest are chosen, and each
    weighs its expert's answer: divided by their sum where ``normalized``, then times ``factor``. A
    softmax over the chosen logits alone is the same as a normalized one over all.

    ``bias``: a stored number for each expert is added to its score for the choice alone
    (DeepSeek-V3). ``groups``: experts stand in so many groups of equal size, and those outside the
    ``groups_used`` best cannot be chosen; a group is as good as its ``group_score`` says, its best
    expert (DeepSeek-V2) or the sum of its two best (V3).
    """

    scores: Literal["softmax", "sigmoid"] = "softmax"
    normalized: bool = False
    factor: float = 1.0
    bias: bool = False
    groups: int = 1
    groups_used: int = 1
    group_score: Literal["best", "two best"] = "best"


@dataclass(frozen=True, slots=True)
class Experts:
    """A feed-forward that is a mixture: ``count`` gated ones, of which each token passes ``used``.

    Each is ``width`` wide. Every token passes the shared one too, of ``shared_width`` (all shared
    experts together, which is the same; 0 for none), whose answer is multiplied by a sigmoid of
    the token where there is a ``shared_gate``. No product of them has a bias.

    Roles in layer N: ``blk.N.ffn_gate_inp.weight`` ``[count, hidden]`` is the router,
    ``blk.N.exp_probs_b.bias`` its bias, ``blk.N.ffn_gate_exps.E.weight`` (up, down) those of expert
    E, ``blk.N.ffn_gate_shexp.weight`` the shared one's, ``blk.N.ffn_gate_inp_shexp.weight``
    ``[1, hidden]`` its gate.
    """

    count: int
    used: int
    width: int
    router: Router = Router()
    shared_width: int = 0
    shared_gate: bool = False


@dataclass(frozen=True, slots=True)
class ShortConvolution:
    """A gated convolution over a token and the ``width`` - 1 before it, where others attend.

    One product (``shortconv.in_proj``) makes B, C and x of a token, as wide as the model each. B
    times x is convolved in time, every channel by itself (``shortconv.conv``, ``[hidden, 1,
    width]``, the token itself last), and C times that goes through ``shortconv.out_proj``.
    ``biased``: all three have biases.
    """

    width: int
    biased: bool = False


@dataclass(frozen=True, slots=True)
class StateSpace:
    """A selective state-space layer, where others have attention and a feed-forward.

    Of a token, ``inner`` values x go through a short convolution of ``width`` tokens with SiLU
    behind it, and into a state of ``state`` numbers for each, which decays by -exp of ``ssm_a``
    times the token's step. Mamba 1 (arXiv 2312.00752): a step for every value, made of
    ``step_rank`` numbers. Mamba 2 (arXiv 2405.21060): one for each of ``heads``, and ``groups`` of
    heads share what leads into the state and out of it; a norm stands before the output.
    ``biased``: the products in and out have biases.
    """

    inner: int
    state: int
    width: int
    heads: int = 0
    groups: int = 1
    step_rank: int = 0
    biased: bool = False
    convolution_bias: bool = True

    @property
    def convolved(self) -> int:
        """Channels of the convolution."""
        return self.inner + (2 * self.groups * self.state if self.heads else 0)

    @property
    def made(self) -> int:
        """Values that the product at the beginning makes of a token."""
        return self.inner + self.convolved + self.heads


@dataclass(frozen=True, slots=True)
class Layer:
    """What may differ between layers: the rope, the attention window, experts.

    With ``window`` w the token at position p sees positions p - w + 1 to p. Without ``experts`` the
    feed-forward is the decoder's own, of its ``ffn_size``. ``convolution`` or ``scan`` stands in
    the place of attention; both are None where there is attention.
    """

    window: int | None = None
    rope: Rope | None = None
    experts: Experts | None = None
    convolution: ShortConvolution | None = None
    scan: StateSpace | None = None

    @property
    def attends(self) -> bool:
        """Whether it has attention, and so keys and values."""
        return self.convolution is None and self.scan is None


@dataclass(frozen=True, slots=True)
class Decoder:
    """A decoder-only network, whole: shapes, norms, positions, attention, feed-forward.

    ``output_bias`` is the bias of the attention's output product. ``mlp_bias`` covers all products
    of the feed-forward. ``embedding_scale`` multiplies the embedding's rows after the look-up, and
    not the head. ``attention_scale`` multiplies query times key; None means 1/sqrt(head_dim).

    ``fused_gate_up``: gate above up in one tensor, ``ffn_up``. ``qk_norm_whole``: the norms go over
    all heads of queries (or keys) together; ``qk_norm_by_head``: over each, with a row of weights
    for each, and never a bias. ``latent``: keys and values are made of one vector; ``kv_heads`` is
    then ``heads``, and ``head_dim`` the width of a key. ``parallel``: attention and feed-forward
    both read the stream before the layer, after a norm each or, with ``shared_norm``, after the
    same one. ``residual_scale`` multiplies what each of the two adds to the stream,
    ``logit_scale`` the logits. Soft caps c turn x into c * tanh(x / c); ``qkv_clip`` keeps queries,
    keys and values within +-c. ``alibi``: by query head, how much the score of a key falls with
    each token that lies between, after the scale. ``embedding_norm``: a norm on what the embedding
    gives. ``skipped_positions``: rows of the table of positions before that of the first token.
    """

    family: str
    vocab_size: int
    hidden_size: int
    ffn_size: int
    context_length: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: tuple[Layer, ...]
    norm: Norm
    activation: Activation
    feed_forward: bool = True
    gated_mlp: bool = True
    fused_qkv: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    fused_gate_up: bool = False
    head_bias: bool = False
    qk_norm: bool = False
    qk_norm_whole: bool = False
    qk_norm_by_head: bool = False
    latent: Latent | None = None
    qkv_clip: float | None = None
    pre_norms: bool = True
    post_norms: bool = False
    parallel: bool = False
    shared_norm: bool = False
    learned_positions: int | None = None
    skipped_positions: int = 0
    alibi: tuple[float, ...] = ()
    embedding_scale: float = 1.0
    embedding_norm: bool = False
    attention_scale: float | None = None
    attention_softcap: float | None = None
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    tied_head: bool = False

    @property
    def query_size(self) -> int:
        """Values of all query heads of a token, which need not be ``hidden_size``."""
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Values of all key heads of a token (and of all value heads)."""
        return self.kv_heads * self.head_dim

    @property
    def attended_size(self) -> int:
        """Values of all heads that attention gives for a token, which ``attn_output`` takes."""
        return self.heads * (self.latent.value_dim if self.latent else self.head_dim)

    @property
    def cache_heads(self) -> int:
        """Heads whose keys, and values, an attention that is not expanded keeps of a token.

        One where a latent vector stands for all of them.
        """
        return 1 if self.latent else self.kv_heads

    @property
    def cache_dim(self) -> int:
        """Values of one of ``cache_heads``."""
        return self.latent.cache_dim if self.latent else self.head_dim

    @property
    def attending(self) -> tuple[Layer, ...]:
        """The layers that have attention, and so keys and values."""
        return tuple(layer for layer in self.layers if layer.attends)

    @property
    def softmax_scale(self) -> float:
        """What query times key is multiplied with before the softmax."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    def features(self) -> frozenset[Feature]:
        """The properties that an exporter or runtime has to be able to express."""
        windows = {layer.window for layer in self.attending}
        turned = {layer.rope for layer in self.attending}
        convolutions = [layer.convolution for layer in self.layers if layer.convolution]
        scans = [layer.scan for layer in self.layers if layer.scan]
        ropes = {rope for rope in turned if rope is not None}
        scalings = {rope.scaling.kind for rope in ropes if rope.scaling}
        mixtures = {layer.experts for layer in self.layers if layer.experts is not None}
        routers = {each.router for each in mixtures}
        chosen = {
            Feature.ROPE: bool(ropes),
            Feature.ROPE_PARTIAL: (
                not self.latent and any(rope.dimensions < self.head_dim for rope in ropes)
            ),
            Feature.LAYERS_WITHOUT_ROPE: None in turned and bool(ropes),
            Feature.ROPE_LINEAR: "linear" in scalings,
            Feature.ROPE_YARN: "yarn" in scalings,
            Feature.ROPE_LLAMA3: "llama3" in scalings,
            Feature.ROPE_FACTORS: "factors" in scalings,
            Feature.ROPE_PER_LAYER: len(ropes) > 1,
            Feature.LEARNED_POSITIONS: self.learned_positions is not None,
            Feature.SKIPPED_POSITIONS: self.skipped_positions > 0,
            Feature.ALIBI: bool(self.alibi),
            Feature.SHORT_CONVOLUTION: bool(convolutions),
            Feature.CONVOLUTION_BIAS: any(each.biased for each in convolutions),
            Feature.STATE_SPACE: bool(scans),
            Feature.STATE_SPACE_BIAS: any(each.biased for each in scans),
            Feature.RMS_NORM: self.norm.kind == "rms",
            Feature.LAYER_NORM: self.norm.kind == "layer",
            Feature.NORM_OFFSET: self.norm.offset,
            Feature.PLAIN_NORM: not self.norm.weight,
            Feature.UNBIASED_LAYER_NORM: (
                self.norm.kind == "layer" and self.norm.weight and not self.norm.bias
            ),
            Feature.QK_NORM: self.qk_norm,
            Feature.QK_NORM_WHOLE: self.qk_norm_whole,
            Feature.QK_NORM_BY_HEAD: self.qk_norm_by_head,
            Feature.LATENT_ATTENTION: self.latent is not None,
            Feature.QKV_CLIP: self.qkv_clip is not None,
            Feature.POST_NORMS: self.post_norms,
            Feature.NO_PRE_NORMS: not self.pre_norms,
            Feature.PARALLEL_BLOCK: self.parallel,
            Feature.SHARED_NORM: self.shared_norm,
            Feature.ATTENTION_SOFTCAP: self.attention_softcap is not None,
            Feature.LOGIT_SOFTCAP: self.logit_softcap is not None,
            Feature.SLIDING_WINDOW: windows != {None} and len(windows) == 1,
            Feature.ALTERNATING_WINDOW: len(windows) > 1,
            Feature.GATED_MLP: self.gated_mlp and self.feed_forward,
            Feature.PLAIN_MLP: not self.gated_mlp and self.feed_forward,
            Feature.NO_FEED_FORWARD: not self.feed_forward,
            Feature.QKV_BIAS: self.qkv_bias,
            Feature.OUTPUT_BIAS: self.output_bias,
            Feature.MLP_BIAS: self.mlp_bias,
            Feature.HEAD_BIAS: self.head_bias,
            Feature.EMBEDDING_SCALE: self.embedding_scale != 1.0,
            Feature.EMBEDDING_NORM: self.embedding_norm,
            Feature.RESIDUAL_SCALE: self.residual_scale != 1.0,
            Feature.LOGIT_SCALE: self.logit_scale != 1.0,
            Feature.ATTENTION_SCALE: self.attention_scale is not None,
            Feature.TIED_HEAD: self.tied_head,
            Feature.EXPERTS: bool(mixtures),
            Feature.DENSE_LAYERS: bool(mixtures) and any(not each.experts for each in self.layers),
            Feature.SHARED_EXPERTS: any(each.shared_width for each in mixtures),
            Feature.SHARED_EXPERT_GATE: any(each.shared_gate for each in mixtures),
            Feature.NORMALIZED_ROUTER: any(router.normalized for router in routers),
            Feature.SCALED_ROUTER: any(router.factor != 1.0 for router in routers),
            Feature.SIGMOID_ROUTER: any(router.scores == "sigmoid" for router in routers),
            Feature.ROUTER_BIAS: any(router.bias for router in routers),
            Feature.EXPERT_GROUPS: any(router.groups > 1 for router in routers),
        }
        return frozenset(feature for feature, present in chosen.items() if present)
