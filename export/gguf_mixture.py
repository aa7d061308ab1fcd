"""llama.cpp's own mixtures of ggml types, as tables; ``gguf_chooser`` applies them to a model.

A mixture such as ``q4_k_m`` names a type for most tensors and gives more bits to those whose
rounding hurts most. The choices are those of ``llama_model_quantize``, with an importance matrix
where the solver weighs by importance and without one else (llama.cpp, src/llama-quant.cpp);
``tests/parity`` compares both byte by byte.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from edgellm.architectures.experts import ROUTER

EMBEDDING, HEAD = "token_embd.weight", "output.weight"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor stands: its layer of how many, and how many heads share a key/value head.

    ``weighed``: the solver weighs columns by their importance. ``experts``: how many a layer has.
    ``down``: how many products lie before it that lead out of a feed-forward, a shared expert's
    among them.
    """

    layer: int
    layers: int
    sharing: int
    weighed: bool = False
    experts: int = 0
    down: int = 0


Condition = Callable[[Place], bool]
Rules = tuple[tuple[str, Condition], ...]


def always(place: Place) -> bool:
    return True


def shared_by_four(place: Place) -> bool:
    """Keys and values are small beside the queries, so that bits for them are cheap."""
    return place.sharing >= 4


def eight_experts(place: Place) -> bool:
    """What llama.cpp takes for Mixtral."""
    return place.experts == 8


def cheap_values(place: Place) -> bool:
    """Keys and values are small beside the queries, or beside the experts."""
    return shared_by_four(place) or place.experts >= 4


def first_downs(place: Place) -> bool:
    """The first eighth, as llama.cpp counts: with a shared expert, a layer counts twice."""
    return place.down < place.layers // 8


def first(count: int) -> Condition:
    return lambda place: place.layer < count


def first_part(parts: int) -> Condition:
    return lambda place: place.layer < place.layers // parts


def weighed(condition: Condition) -> Condition:
    """``condition``, and only with importance."""
    return lambda place: place.weighed and condition(place)


def unweighed(condition: Condition) -> Condition:
    """``condition``, and only without importance."""
    return lambda place: not place.weighed and condition(place)


def middle(place: Place) -> bool:
    return place.layers // 8 <= place.layer < 7 * place.layers // 8


def ends_and_thirds(place: Place) -> bool:
    """The first and the last eighth, and every third layer between."""
    return not middle(place) or (place.layer - place.layers // 8) % 3 == 2


def more_for_eight(place: Place) -> bool:
    return eight_experts(place) and ends_and_thirds(place)


@dataclass(frozen=True, slots=True)
class Mixture:
    """One row: ``file_type`` is llama.cpp's number of it (``general.file_type``).

    ``grid`` is the type where nothing else is said. The other columns are rules for one kind of
    tensor, of which the first that holds counts; ``value`` is for attn_v, and for attn_qkv and
    attn_kv_b, which make values among others.
    ``head`` is the output head, and the embedding too where the two are one tensor. ``needs``: the
    types that are garbage without importance in this mixture alone (``NEED_IMPORTANCE``: in all).
    ``more_for_70b``: values of models of that size get more bits, keys and values of those with
    eight experts too.
    """

    file_type: int
    grid: str
    value: Rules = ()
    key: Rules = ()
    query: Rules = ()
    attention_output: Rules = ()
    gate_and_up: Rules = ()
    down: Rules = ()
    embedding: Rules = ()
    head: Rules = (("q6_k", always),)
    needs: tuple[str, ...] = ()
    more_for_70b: bool = True


_MORE = (("q6_k", ends_and_thirds),)
_AS_GRID: Rules = ()


def _iq4(file_type: int, grid: str) -> Mixture:
    return Mixture(
        file_type,
        grid,
        value=(("q5_k", shared_by_four),),
        down=(("q5_k", unweighed(first_part(8))),),
    )


def _iq1_or_2(
    file_type: int, grid: str, more: str, embedding: str, attention_output: Rules = ()
) -> Mixture:
    """The mixtures below three bits differ in the type of what gets ``more`` bits."""
    return Mixture(
        file_type,
        grid,
        value=(("q4_k", cheap_values), (more, always)),
        key=(("q4_k", eight_experts),),
        attention_output=(("q5_k", eight_experts), *attention_output),
        down=((more, first_downs),),
        embedding=((embedding, always),),
        head=(("q5_k", always),),
        more_for_70b=False,
    )


MIXTURES: dict[str, Mixture] = {
    "f32": Mixture(0, "f32", head=_AS_GRID),
    "f16": Mixture(1, "f16", head=_AS_GRID),
    "bf16": Mixture(32, "bf16", head=_AS_GRID),
    "q8_0": Mixture(7, "q8_0", head=_AS_GRID),
    "q6_k": Mixture(18, "q6_k"),
    "q5_k_m": Mixture(17, "q5_k", value=_MORE, down=_MORE),
    "q5_k_s": Mixture(16, "q5_k"),
    "q5_1": Mixture(9, "q5_1"),
    "q5_0": Mixture(8, "q5_0", down=(("q5_1", weighed(first_part(8))),)),
    "q4_k_m": Mixture(15, "q4_k", value=_MORE, down=_MORE),
    "q4_k_s": Mixture(14, "q4_k", value=(("q5_k", first(4)),), down=(("q5_k", first_part(8)),)),
    "q4_1": Mixture(3, "q4_1"),
    "q4_0": Mixture(2, "q4_0", down=(("q4_1", weighed(first_part(8))),)),
    "iq4_nl": _iq4(25, "iq4_nl"),
    "iq4_xs": _iq4(30, "iq4_xs"),
    "q3_k_l": Mixture(
        13,
        "q3_k",
        value=(("q5_k", always),),
        attention_output=(("q5_k", always),),
        down=(("q5_k", always),),
    ),
    "q3_k_m": Mixture(
        12,
        "q3_k",
        value=(("q5_k", first(2)), ("q4_k", always)),
        attention_output=(("q4_k", always),),
        down=(("q5_k", first_part(16)), ("q4_k", always)),
    ),
    "q3_k_s": Mixture(11, "q3_k"),
    "q2_k": Mixture(
        10,
        "q2_k",
        value=(("q4_k", shared_by_four), ("q3_k", always)),
        attention_output=(("q3_k", always),),
        down=(("q3_k", always),),
    ),
    "q2_k_s": Mixture(
        21,
        "q2_k",
        value=(("q4_k", shared_by_four),),
        down=(("q4_k", first_part(8)),),
        needs=("q2_k",),
    ),
    "iq3_m": Mixture(
        27,
        "iq3_s",
        value=(("q4_k", always),),
        attention_output=(("q4_k", always),),
        down=(("q4_k", first_part(8)), ("q4_k", more_for_eight)),
    ),
    "iq3_s": Mixture(26, "iq3_s", value=(("q4_k", shared_by_four),)),
    "iq3_xs": Mixture(
        22,
        "iq3_s",
        value=(("q4_k", shared_by_four),),
        key=(("iq3_xxs", always),),
        query=(("iq3_xxs", always),),
        gate_and_up=(("iq3_xxs", middle),),
    ),
    "iq3_xxs": Mixture(
        23,
        "iq3_xxs",
        value=(("q4_k", shared_by_four), ("iq3_s", unweighed(always))),
        key=(("iq2_s", always),),
        query=(("iq2_s", always),),
        attention_output=(("iq3_s", always),),
        down=(("q4_k", unweighed(first_part(8))), ("q3_k", unweighed(always))),
        embedding=(("iq3_s", always),),
        head=(("q5_k", always),),
    ),
    "iq2_m": _iq1_or_2(29, "iq2_s", "iq3_s", "iq3_s", (("iq3_s", always),)),
    "iq2_s": _iq1_or_2(28, "iq2_xs", "iq3_s", "iq3_s", (("iq3_s", always),)),
    "iq2_xs": _iq1_or_2(20, "iq2_xs", "q2_k", "q2_k"),
    "iq2_xxs": _iq1_or_2(19, "iq2_xxs", "q2_k", "q2_k"),
    "iq1_m": _iq1_or_2(31, "iq1_m", "q2_k", "q2_k", (("iq2_xxs", always),)),
    "iq1_s": _iq1_or_2(24, "iq1_s", "q2_k", "q2_k", (("iq2_xxs", always),)),
}

KINDS = {
    "attn_v.weight": "value",
    "attn_qkv.weight": "value",
    "attn_kv_b.weight": "value",
    "attn_k.weight": "key",
    "attn_q.weight": "query",
    "attn_output.weight": "attention_output",
    "ffn_gate.weight": "gate_and_up",
    "ffn_up.weight": "gate_and_up",
    "ffn_down.weight": "down",
    "ffn_gate_exps.weight": "gate_and_up",
    "ffn_up_exps.weight": "gate_and_up",
    "ffn_down_exps.weight": "down",
    "ffn_gate_shexp.weight": "gate_and_up",
    "ffn_up_shexp.weight": "gate_and_up",
    "ffn_down_shexp.weight": "down",
    EMBEDDING: "embedding",
    HEAD: "head",
}
"""The column of ``Mixture`` for a role without its ``blk.N.``."""

OUTPUT_OF_EIGHT = (
    "q2_k", "q3_k_s", "q3_k_m", "q4_k_s", "q4_k_m", "iq3_xxs", "iq3_xs", "iq3_s", "iq3_m", "iq4_nl",
    "iq4_xs",
)  # fmt: skip
"""Mixtures that give attention's output five bits where there are eight experts, and else the
mixture's own type, beside keys and values of eight bits."""

FLOATS = ("_norm.weight", ROUTER, "shortconv.conv.weight", "ssm_conv1d.weight")
"""Ends of the roles of what stays float whatever its shape."""

FALLBACKS = {
    "iq1_s": "iq4_nl",
    "iq1_m": "iq4_nl",
    "iq2_xxs": "iq4_nl",
    "iq2_xs": "iq4_nl",
    "iq2_s": "iq4_nl",
    "iq3_xxs": "iq4_nl",
    "iq3_s": "iq4_nl",
    "iq4_xs": "iq4_nl",
    "q2_k": "q4_0",
    "q3_k": "q4_0",
    "q4_k": "q5_0",
    "q5_k": "q5_1",
    "q6_k": "q8_0",
}
"""What takes the place of a type of blocks of 256 where they do not divide a row."""

NEED_IMPORTANCE = ("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs")
"""Types that are garbage without an importance matrix, except for the embedding and the head."""

NO_GUESS = ("iq1_s", "iq2_xxs", "iq2_xs")
"""Those of them that ggml cannot round to at all without (``ggml_quantize_requires_imatrix``)."""
