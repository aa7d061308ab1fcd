"""An ONNX model being written down: nodes, small constants, and tensors that live in a data file.

Weights are never held: each is an ``OutputTensor`` with its place in the data file, and the model
refers to the bytes there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgellm.export.layout import OutputTensor, StoredArray
from edgellm.export.packing import PACKERS
from edgellm.quant.grid import Grid
from edgellm.tensors import TensorRef

OPSET = 21
IR_VERSION = 10
CONTRIB = "com.microsoft"
CONTRIB_OPSET = 1

DATA_FILE = "model.onnx.data"

PAGE_BYTES = 4096
"""Arrays begin on pages, so that a runtime can map them; ONNX's specification asks for 4096."""

SMALL_BYTES = 16384
"""Arrays below this are aligned for vector loads only: a page each would waste too much."""

VECTOR_BYTES = 64


class GraphBuilder:
    """Collects a graph; every ``node`` call returns the names of the values that it computes.

    ``element``: the type that the graph computes in, ``TensorProto.FLOAT`` or ``FLOAT16``.
    ``name`` is the graph's own. ``data_bytes``: what another graph has of the data file.
    """

    def __init__(
        self,
        producer_version: str,
        element: int = TensorProto.FLOAT,
        name: str = "decoder",
        *,
        data_bytes: int = 0,
    ) -> None:
        self.producer_version = producer_version
        self.name = name
        self.element = element
        self.tensors: list[OutputTensor] = []
        self.data_bytes = data_bytes
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._cast: set[str] = set()

    def input(self, name: str, element: int, shape: Sequence[int | str]) -> str:
        """Declare an input of the model."""
        self._inputs.append(helper.make_tensor_value_info(name, element, shape))
        return name

    def output(self, name: str, element: int, shape: Sequence[int | str]) -> None:
        """Declare that the value ``name`` leaves the model."""
        self._outputs.append(helper.make_tensor_value_info(name, element, shape))

    def node(
        self,
        operator: str,
        inputs: Sequence[str],
        name: str,
        *,
        outputs: Sequence[str] = (),
        contrib: bool = False,
        **attributes: Any,
    ) -> str:
        """Add a node; returns its first output: ``name``, or the first of ``outputs``."""
        names = list(outputs) or [name]
        domain = CONTRIB if contrib else ""
        self._nodes.append(
            helper.make_node(operator, list(inputs), names, name=name, domain=domain, **attributes)
        )
        return names[0]

    def has(self, value: str) -> bool:
        """Whether a node computes ``value`` already."""
        return any(value in node.output for node in self._nodes)

    def constant(self, name: str, values: npt.NDArray[Any]) -> str:
        """A small constant kept inside the model file; the same name is stored once."""
        if name not in self._initializers:
            self._initializers[name] = numpy_helper.from_array(values, name)
        return name

    def floats(self, name: str, values: npt.NDArray[np.float32]) -> str:
        """A small constant of the type that the graph computes in."""
        return self.constant(name, values.astype(helper.tensor_dtype_to_np_dtype(self.element)))

    def computed(self, stored: str, element: int = TensorProto.FLOAT) -> str:
        """The stored value of type ``element`` in the type that the graph computes in.

        A cast of what never changes, which onnxruntime does once, when it opens the model.
        """
        if element == self.element:
            return stored
        name = f"{stored}.computed"
        if name not in self._cast:
            self._cast.add(name)
            self.node("Cast", [stored], name, to=self.element)
        return name

    def integers(self, *values: int) -> str:
        """A vector of int64."""
        label = "_".join(map(str, values))
        return self.constant(f"int64_{label}", np.asarray(values, np.int64))

    def default_input(self, name: str, values: npt.NDArray[Any]) -> str:
        """An input that callers may leave out: an initializer that is listed as an input too."""
        element = helper.np_dtype_to_tensor_dtype(values.dtype)
        self.input(name, element, values.shape)
        return self.constant(name, values)

    def store(
        self,
        role: str,
        parts: Sequence[TensorRef],
        grid: Grid,
        packer: str,
        note: str = "",
        *,
        experts: int = 1,
        in_turns: bool = False,
    ) -> OutputTensor:
        """Give a tensor its place in the data file; its arrays follow one another there.

        ``experts`` and ``in_turns`` are as ``OutputTensor`` has them.
        """
        rows = sum(part.rows for part in parts)
        arrays: list[StoredArray] = []
        for component, row_bytes in PACKERS[packer].row_bytes(grid, parts[0].columns).items():
            name = role if component == "data" else f"{role}.{component}"
            offset = self._allocate(row_bytes * rows)
            arrays.append(StoredArray(name, component, DATA_FILE, offset, row_bytes, rows))
        tensor = OutputTensor(
            role,
            role,
            tuple(parts),
            grid,
            packer,
            tuple(arrays),
            note,
            experts=experts,
            in_turns=in_turns,
        )
        self.tensors.append(tensor)
        return tensor

    def stored(self, array: StoredArray, element: int, shape: Sequence[int], name: str = "") -> str:
        """Refer to an array of the data file as an initializer; the same name refers once.

        Two names with different shapes may refer to the same bytes.
        """
        name = name or array.name
        if name not in self._initializers:
            tensor = TensorProto(name=name, data_type=element, dims=shape)
            tensor.data_location = TensorProto.EXTERNAL
            place: Mapping[str, object] = {
                "location": array.file,
                "offset": array.offset,
                "length": array.nbytes,
            }
            for key, value in place.items():
                tensor.external_data.add(key=key, value=str(value))
            self._initializers[name] = tensor
        return name

    def graph(self) -> onnx.GraphProto:
        """The graph as it is now."""
        initializers = list(self._initializers.values())
        return helper.make_graph(self._nodes, self.name, self._inputs, self._outputs, initializers)

    def opsets(self) -> list[onnx.OperatorSetIdProto]:
        """The operator sets that the nodes come from."""
        return [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, CONTRIB_OPSET)]

    def serialize(self, metadata: Mapping[str, str]) -> bytes:
        """The model file; the same graph gives the same bytes."""
        model = helper.make_model(
            self.graph(),
            opset_imports=self.opsets(),
            ir_version=IR_VERSION,
            producer_name="edgellm",
            producer_version=self.producer_version,
        )
        helper.set_model_props(model, dict(metadata))
        return bytes(model.SerializeToString(deterministic=True))

    def _allocate(self, nbytes: int) -> int:
        alignment = PAGE_BYTES if nbytes >= SMALL_BYTES else VECTOR_BYTES
        offset = -(-self.data_bytes // alignment) * alignment
        self.data_bytes = offset + nbytes
        return offset
