"""Layers quantized, packed and read back by gptqmodel: what made ``gptqmodel_layers.safetensors``.

Run by hand, in an environment of its own, since gptqmodel asks for a newer torch than the tests::

    pip install --no-deps gptqmodel==7.7.0 logbar tokenicer device-smi pypcre defuser pillow
    python tests/unit/make_gptqmodel_layers.py

Each layer holds its parts under their names in a checkpoint, ``qzeros`` in both versions of GPTQ's
format, and in ``expected`` the ``[out, in]`` weight that gptqmodel's own code makes of them. One
output of each layer is positive throughout, so that its zeros are 0 and borrow in version 1.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module
from safetensors.torch import save_file

INPUTS, OUTPUTS, GROUP = 64, 32, 32


def main() -> None:
    torch.manual_seed(0)
    layers: dict[str, torch.Tensor] = {}
    for bits in (2, 3, 4, 8):
        for act_order in (False, True):
            layers |= gptq(f"gptq{bits}{'_act_order' if act_order else ''}", bits, act_order)
    layers |= awq("awq4")
    save_file(layers, Path(__file__).with_name("gptqmodel_layers.safetensors"))


def linear() -> torch.nn.Linear:
    layer = torch.nn.Linear(INPUTS, OUTPUTS, bias=False)
    with torch.no_grad():
        layer.weight[1].abs_()
    return layer


def scales_and_zeros(
    weight: torch.Tensor, group: torch.Tensor, bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both ``[out, groups]``, by the smallest and the largest weight."""
    scales, zeros = [], []
    for number in range(INPUTS // GROUP):
        part = weight[:, group == number]
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        scale = ((high - low) / (2**bits - 1)).half().float()
        scales.append(scale)
        zeros.append(torch.round(-low / scale))
    return torch.stack(scales, 1), torch.stack(zeros, 1)


def gptq(name: str, bits: int, act_order: bool) -> dict[str, torch.Tensor]:
    layer = linear()
    module = TorchLinear(
        bits=bits,
        group_size=GROUP,
        sym=False,
        desc_act=act_order,
        in_features=INPUTS,
        out_features=OUTPUTS,
    )
    group = torch.arange(INPUTS) // GROUP
    if act_order:
        group = group[torch.randperm(INPUTS)]
    module.pack_original(layer, *scales_and_zeros(layer.weight.data, group, bits), group.int())
    module.post_init()
    parts = {part: getattr(module, part).clone() for part in ("qweight", "scales", "g_idx")}
    parts |= {"qzeros_v2": module.qzeros.clone(), "expected": module.dequantize_weight().T}
    convert_gptq_v2_to_v1_format_module(module, SimpleNamespace(bits=bits, pack_dtype=torch.int32))
    parts["qzeros_v1"] = module.qzeros.clone()
    return {f"{name}.{part}": value.contiguous() for part, value in parts.items()}


def awq(name: str) -> dict[str, torch.Tensor]:
    layer = linear()
    module = AwqTorchLinear(
        bits=4,
        group_size=GROUP,
        sym=False,
        desc_act=False,
        in_features=INPUTS,
        out_features=OUTPUTS,
    )
    group = torch.arange(INPUTS) // GROUP
    module.pack(layer, *scales_and_zeros(layer.weight.data, group, 4))
    parts = {part: getattr(module, part).clone() for part in ("qweight", "qzeros", "scales")}
    weight = dequantize_gemm(module.qweight, module.qzeros, module.scales, 4, GROUP)
    parts["expected"] = weight.T
    return {f"{name}.{part}": value.contiguous() for part, value in parts.items()}


if __name__ == "__main__":
    main()
