"""Every family through a calibrated conversion: nearer to the source than plain rounding.

And as a Hugging Face folder of floats, in which transformers finds the model that it knew.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

import tiny_models

import edgellm
from edgellm.architectures import FAMILIES, family_named
from edgellm.json_file import read_json

TinyModel = Callable[[str], Path]

ONE_EACH = {
    next(
        name
        for name, tiny in tiny_models.MODELS.items()
        if tiny_models.model_type_of(tiny) == family
    )
    for family in FAMILIES
}
"""The first model of each family."""


@pytest.mark.parametrize("name", sorted(ONE_EACH))
def test_a_solver_is_nearer_than_plain_rounding(
    name: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    divergence = {}
    for quant in ("rtn:int4-g32", "awq+gptq:int4-g32"):
        artifact = edgellm.convert(
            tiny_model(name),
            tmp_path / quant.partition(":")[0],
            format="onnx",
            quant=quant,
            check_tokens=256,
            threads=1,
            **({} if quant.startswith("rtn") else {"calibration_tokens": 2048}),
        )
        assert artifact.manifest is not None
        divergence[quant] = artifact.manifest.measured["quality"]["kld_mean"]
    assert divergence["awq+gptq:int4-g32"] < divergence["rtn:int4-g32"]


@pytest.mark.parametrize("name", sorted(ONE_EACH))
def test_a_folder_of_floats_is_the_model_it_was(
    name: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    folder = tiny_model(name)
    edgellm.convert(folder, tmp_path / "out", format="hf", quant="f32", check=False)
    ids = tiny_models.some_token_ids(40)
    np.testing.assert_array_equal(
        tiny_models.reference_logits(tmp_path / "out", ids),
        tiny_models.reference_logits(folder, ids),
    )
    config = read_json(tmp_path / "out" / "config.json")
    assert config["architectures"] == [family_named(config["model_type"]).architecture]
