"""How much each token counts while a layer is calibrated."""

from __future__ import annotations

import numpy as np
import pytest

from edgellm.calibration.passes import feeds_attention, token_weights

HIDDEN = 64


def stream(*sizes: float) -> np.ndarray:
    """Tokens ``[tokens, HIDDEN]`` of these root mean squares."""
    signs = np.resize([1.0, -1.0], HIDDEN)
    return np.outer(sizes, signs).astype(np.float32)


def test_attention_counts_the_size_and_other_products_the_growth() -> None:
    attention, others = token_weights(stream(1, 100, 2), stream(3, 100, 40))
    np.testing.assert_allclose(attention, [3, 100, 40], rtol=1e-5)
    np.testing.assert_allclose(others, [3, 1, 20], rtol=1e-5)


def test_a_token_that_begins_as_nothing_does_not_outweigh_all_others() -> None:
    _, others = token_weights(stream(0, 1), stream(5, 5))
    np.testing.assert_allclose(others, [1000, 5], rtol=1e-5)


@pytest.mark.parametrize(
    ("roles", "whether"),
    [
        (["blk.0.attn_q.weight", "blk.0.attn_k.weight", "blk.0.attn_v.weight"], True),
        (["blk.3.attn_qkv.weight"], True),
        (["blk.3.attn_output.weight"], False),
        (["blk.3.ffn_gate.weight", "blk.3.ffn_up.weight"], False),
        (["blk.3.ffn_up.weight", "blk.3.attn_qkv.weight"], True),  # one norm before both
    ],
)
def test_an_input_is_attentions_where_keys_are_made_of_it(roles: list[str], whether: bool) -> None:
    assert feeds_attention(roles) is whether
