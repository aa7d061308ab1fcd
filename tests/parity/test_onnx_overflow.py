"""Products of bytes are exact on processors that add pairs of them up in 16 bits, too."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnx", reason="onnx is not installed")

import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from edgellm.runtimes.ort import session_options


def test_unsigned_by_signed_bytes_do_not_overflow() -> None:
    """Inputs that lie at the upper end of their range, as beside one large negative outlier.

    Two neighbours of about 250 by 127 make 63,500, and 16 bits end at 32,767.
    """
    draw = np.random.default_rng(0)
    x = draw.uniform(0, 1, (3, 64)).astype(np.float32)
    x[:, 0] = -50
    codes = draw.integers(90, 128, (64, 16)).astype(np.int8)
    scale = np.full(16, 0.01, np.float32)
    node = helper.make_node(
        "DynamicQuantizeMatMul", ["x", "codes", "scale"], ["y"], domain="com.microsoft"
    )
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [3, 16])],
        [numpy_helper.from_array(codes, "codes"), numpy_helper.from_array(scale, "scale")],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), session_options(onnxruntime, 1)
    )
    (y,) = session.run(None, {"x": x})
    step = np.float32((x.max() + 50) / np.float32(255))
    zero = np.rint(50 / step)
    wanted = (np.rint(x / step)) * step @ (codes * scale)
    assert zero > 240
    np.testing.assert_allclose(y, wanted, rtol=1e-4)
