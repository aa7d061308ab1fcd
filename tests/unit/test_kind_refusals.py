"""What an adapter must not do: parts missing or misshapen, configs that contradict the weights."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from edgellm.errors import AdapterError
from edgellm.lora.edit import Edit, Target
from edgellm.lora.kinds import bind_of
from edgellm.lora.kinds.ia3 import weighted
from edgellm.tensors import TensorRef, constant

Q_PROJ = Target("model.layers.0.self_attn.q_proj.weight", (12, 8), "linear")
CONV1D = Target("h.0.attn.c_attn.weight", (12, 8), "linear", transposed=True)
EMBEDDING = Target("model.embed_tokens.weight", (12, 8), "embedding")

LOHA = {"hada_w1_a": (12, 3), "hada_w1_b": (3, 8), "hada_w2_a": (12, 3), "hada_w2_b": (3, 8)}
LOKR = {"lokr_w1": (3, 2), "lokr_w2_a": (4, 3), "lokr_w2_b": (3, 4)}
VERA = {"vera_A": (3, 9), "vera_B": (12, 3), "vera_lambda_b": (12,), "vera_lambda_d": (3,)}
OFT = {"oft_R": (2, 6)}
BOFT = {"boft_R": (1, 2, 4, 4), "boft_s": (12, 1)}
LYCORIS = {"r": 3, "alpha": 6}
ADALORA = {"lora_A": (3, 8), "lora_B": (12, 3), "lora_E": (3, 1)}
ADALORA_CONFIG = {"init_r": 4, "lora_alpha": 8}
MISS = {"miss_block": (3, 12)}
VBLORA = {
    "vblora_logits_A": (2, 2, 5),
    "vblora_logits_B": (3, 2, 5),
    "vblora_vector_bank": (5, 4),
}
VBLORA_CONFIG = {"r": 2, "topk": 2}
OFT_CONFIG = {"oft_block_size": 4, "peft_version": "0.21.2"}

Shapes = dict[str, tuple[int, ...]]


def drawn(shapes: Shapes, factor: float = 1.0) -> dict[str, TensorRef]:
    random = np.random.default_rng(0)
    return {
        name: constant(name, factor * random.standard_normal(shape))
        for name, shape in shapes.items()
    }


def bound(kind: str, shapes: Shapes, config: dict[str, Any], target: Target = Q_PROJ) -> Edit:
    return bind_of(kind)(target, drawn(shapes), config)


@pytest.mark.parametrize(
    ("kind", "shapes", "config"),
    [
        ("loha", LOHA, LYCORIS),
        ("lokr", LOKR, LYCORIS),
        ("ia3", {"ia3_l": (12, 1)}, {}),
        ("vera", VERA, {"r": 3}),
        ("oft", OFT, OFT_CONFIG),
        ("boft", BOFT, {}),
        ("adalora", ADALORA, ADALORA_CONFIG),
        ("c3a", {"c3a_kernel": (3, 2, 4)}, {}),
        ("hira", {"hira_A": (3, 8), "hira_B": (12, 3)}, {}),
        ("hra", {"hra_u": (8, 3)}, {"r": 3}),
        ("miss", MISS, {"r": 3}),
        ("vblora", VBLORA, VBLORA_CONFIG),
    ],
)
def test_what_fits_is_bound(kind: str, shapes: Shapes, config: dict[str, Any]) -> None:
    edit = bound(kind, shapes, config)
    rows = np.ones((12, 8), dtype=np.float32)
    assert not np.array_equal(edit.apply(rows.copy(), 0, 12, 1.0), rows)


@pytest.mark.parametrize(
    ("kind", "shapes", "config", "message"),
    [
        ("loha", LOHA | {"hada_w1_b": (3, 9)}, LYCORIS, r"hada_w1_b has shape \[3, 9\]"),
        ("loha", LOHA, LYCORIS | {"r": 4}, r"hada_w1_a has shape \[12, 3\] and needs \[12, 4\]"),
        ("loha", LOHA, LYCORIS | {"rank_pattern": {"q_proj": 2}}, r"needs \[12, 2\]"),
        ("loha", LOHA, LYCORIS | {"r": 0}, "rank 0"),
        ("loha", {"hada_w1_a": (12, 3)}, LYCORIS, "hada_w1_a for it, and .* is needed"),
        ("loha", LOHA | {"hada_t1": (3, 3)}, LYCORIS, "hada_t1 for it"),
        ("lokr", LOKR, LYCORIS | {"r": 2}, "gives rank 2"),
        ("lokr", LOKR | {"lokr_w1": (3, 3)}, LYCORIS, r"a change of shape \[12, 12\]"),
        ("lokr", {"lokr_w1": (3, 2)}, LYCORIS, r"lokr_w2_a \+ lokr_w2_b is needed"),
        ("lokr", LOKR | {"lokr_w2": (4, 4)}, LYCORIS, r"lokr_w1 \+ lokr_w2 is needed"),
        ("lokr", LOKR | {"lokr_t2": (3, 3, 1, 1)}, LYCORIS, "for convolutions"),
        ("ia3", {"ia3_l": (8, 1)}, {}, r"needs \[12, 1\] or \[1, 8\]"),
        ("ia3", {"ia3_l": (1, 8)}, {"feedforward_modules": ["down_proj"]}, "scales its inputs"),
        ("ia3", {"ia3_l": (12, 1)}, {"feedforward_modules": ".*q_proj"}, "scales its outputs"),
        ("vera", {"vera_lambda_b": (12,), "vera_lambda_d": (3,)}, {"r": 3}, "save_projection"),
        ("vera", VERA | {"vera_B": (11, 3)}, {"r": 3}, "larger than the projections"),
        ("vera", VERA | {"vera_lambda_d": (4,)}, {"r": 3}, r"vera_lambda_d has shape \[4\]"),
        ("vera", VERA, {"r": 4}, "gives rank 4"),
        ("oft", {"oft_r": (2, 4, 4)}, OFT_CONFIG, "before 0.16"),
        ("oft", OFT, {"r": 2}, "before 0.16"),
        ("oft", {"oft_R": (2, 7)}, OFT_CONFIG, r"shape \[2, 7\]"),
        ("oft", {"oft_R": (1, 6)}, OFT_CONFIG, r"shape \[1, 6\]"),
        ("oft", OFT, OFT_CONFIG | {"block_share": True}, "block_share"),
        ("oft", OFT, OFT_CONFIG | {"peft_version": "0.17.2.dev0@abc"}, "which of the two"),
        ("boft", BOFT | {"boft_s": (8, 1)}, {}, r"boft_s has shape \[8, 1\]"),
        ("boft", BOFT | {"boft_R": (1, 3, 4, 4)}, {}, r"boft_R has shape \[1, 3, 4, 4\]"),
        ("boft", BOFT | {"boft_R": (3, 2, 4, 4)}, {}, "more than one factor"),
        ("adalora", ADALORA, ADALORA_CONFIG | {"init_r": 2}, "at most init_r"),
        ("adalora", ADALORA | {"lora_E": (2, 1)}, ADALORA_CONFIG, "lora_A has shape"),
        ("c3a", {"c3a_kernel": (3, 2, 3)}, {}, "one block size"),
        ("hira", {"hira_A": (3, 8), "hira_B": (12, 2)}, {}, r"needs \[12, 3\]"),
        ("hra", {"hra_u": (8, 3)}, {"r": 2}, r"needs \[8, 2\]"),
        ("miss", MISS, {"r": 4}, r"needs \[4, 12\]"),
        ("miss", {"miss_block": (3, 5)}, {"r": 3, "init_weights": "mini", "mini_r": 5}, "be cut"),
        ("miss", {"miss_block": (4, 3, 3)}, {"r": 3, "init_weights": "bat"}, "be cut"),
        ("vblora", VBLORA | {"vblora_vector_bank": (5, 3)}, VBLORA_CONFIG, "divide by"),
        ("vblora", VBLORA, VBLORA_CONFIG | {"topk": 6}, "topk = 6 vectors"),
        ("vblora", VBLORA, VBLORA_CONFIG | {"r": 3}, r"needs \[3, 2, 5\]"),
    ],
)
def test_what_does_not_fit_is_refused(
    kind: str, shapes: Shapes, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(AdapterError, match=message) as caught:
        bound(kind, shapes, config)
    assert kind == "oft" or Q_PROJ.name.removesuffix(".weight") in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "shapes", "config"),
    [
        ("loha", LOHA, LYCORIS),
        ("lokr", LOKR, LYCORIS),
        ("oft", OFT, OFT_CONFIG),
        ("boft", BOFT, {}),
    ],
)
def test_layers_that_peft_cannot_train_are_refused(
    kind: str, shapes: Shapes, config: dict[str, Any]
) -> None:
    with pytest.raises(AdapterError, match="is a Conv1D"):
        bound(kind, shapes, config, CONV1D)


@pytest.mark.parametrize(("kind", "shapes"), [("loha", LOHA), ("ia3", {"ia3_l": (12, 1)})])
def test_an_embedding_is_no_linear_layer(kind: str, shapes: Shapes) -> None:
    with pytest.raises(AdapterError, match="no linear layer"):
        bound(kind, shapes, LYCORIS, EMBEDDING)


@pytest.mark.parametrize(
    ("kind", "shapes", "config"),
    [
        ("ia3", {"ia3_l": (1, 8)}, {}),
        ("oft", OFT, OFT_CONFIG),
        ("boft", BOFT, {}),
        ("hra", {"hra_u": (8, 3)}, {"r": 3}),
    ],
)
def test_half_of_a_multiplication_is_refused(
    kind: str, shapes: Shapes, config: dict[str, Any]
) -> None:
    edit = bound(kind, shapes, config)
    with pytest.raises(AdapterError, match=r"0\.5 times as strong is not defined"):
        edit.apply(np.ones((12, 8), dtype=np.float32), 0, 12, 0.5)


@pytest.mark.parametrize(
    ("kind", "shapes", "config"), [("loha", LOHA, LYCORIS), ("lokr", LOKR, LYCORIS)]
)
def test_an_addition_is_as_strong_as_its_weight(
    kind: str, shapes: Shapes, config: dict[str, Any]
) -> None:
    edit: Any = bound(kind, shapes, config)
    rows = np.zeros((12, 8), dtype=np.float32)
    np.testing.assert_array_equal(edit.apply(rows, 0, 12, -0.25), -0.25 * edit.delta(0, 12))


def test_ia3_adapters_must_scale_the_same_side() -> None:
    outputs, inputs = bound("ia3", {"ia3_l": (12, 1)}, {}), bound("ia3", {"ia3_l": (1, 8)}, {})
    for edits in ([outputs, inputs], [outputs, None]):
        with pytest.raises(AdapterError, match="the same side of the same weights"):
            weighted(edits, [0.5, 0.5], Q_PROJ.name)


@pytest.mark.parametrize("terms", [2, 3, 4, 7])
def test_the_series_before_peft_0_18_counts_each_term_twice(terms: int) -> None:
    """Configs name no version then; its formula, ``I + 2Q + 2Q^2 + ...``, on a single 2 x 2 block.

    Powers of the skew-symmetric [[0, q], [-q, 0]] are q^n times turns by n right angles.
    """
    target = Target("q_proj.weight", (3, 2), "linear")
    q = 0.3
    config = {"oft_block_size": 2, "num_cayley_neumann_terms": terms}
    edit = bind_of("oft")(target, {"oft_R": constant("oft_R", [[q]])}, config)
    along = 1 + 2 * sum(q**n * math.cos(n * math.pi / 2) for n in range(1, terms))
    across = 2 * sum(q**n * math.sin(n * math.pi / 2) for n in range(1, terms))
    got = edit.apply(np.array([[1, 0], [0, 1], [1, 1]], dtype=np.float32), 0, 3, 1.0)
    # W R^T with R = [[along, across], [-across, along]].
    expected = [[along, -across], [across, along], [along + across, along - across]]
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)


def test_a_large_rotation_by_the_exact_cayley_transform_keeps_lengths() -> None:
    config = OFT_CONFIG | {"use_cayley_neumann": False}
    edit = bind_of("oft")(Q_PROJ, drawn(OFT, factor=30.0), config)
    rows = np.random.default_rng(1).standard_normal((12, 8)).astype(np.float32)
    turned = edit.apply(rows.copy(), 0, 12, 1.0)
    np.testing.assert_allclose(
        np.linalg.norm(turned, axis=1), np.linalg.norm(rows, axis=1), rtol=1e-6
    )
    assert not np.allclose(turned, rows)


@pytest.mark.parametrize("orthogonal", [False, True])
def test_a_reflection_without_a_direction_is_refused(orthogonal: bool) -> None:
    """A vector of zeros; with Gram-Schmidt's method nothing may be left of a repeated one, too."""
    vectors = np.zeros((8, 2), dtype=np.float32)
    vectors[0, 0] = 1.0
    vectors[:, 1] = vectors[:, 0] if orthogonal else 0.0
    edit = bind_of("hra")(
        Q_PROJ, {"hra_u": constant("hra_u", vectors)}, {"r": 2, "apply_GS": orthogonal}
    )
    with pytest.raises(AdapterError, match="vector 1 of hra_u"):
        edit.apply(np.ones((12, 8), dtype=np.float32), 0, 12, 1.0)
