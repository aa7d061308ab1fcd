"""Bases that are quantized already, and adapters trained on one, from the command line."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest

import edgellm
from edgellm.manifest import read_manifest

from .conftest import Command
from .test_convert_adapter import write_adapter

CARD = """## Training procedure

The following `bitsandbytes` quantization config was used during training:
- quant_method: bitsandbytes
- load_in_4bit: True
- bnb_4bit_quant_type: nf4
- bnb_4bit_use_double_quant: True
"""

SAID = (
    "merged into dequantized nf4 (double quantization): the adapter's model card says "
    "load_in_4bit: True"
)


@pytest.fixture(scope="module")
def quantized(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny llama as bitsandbytes stores it in nf4 with double quantization."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("bitsandbytes")
    import transformers

    folder = tmp_path_factory.mktemp("quantized") / "llama-bnb-4bit"
    settings: dict[str, Any] = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers.AutoModelForCausalLM.from_pretrained(
            model,
            dtype=torch.float32,
            quantization_config=transformers.BitsAndBytesConfig(**settings),
        ).save_pretrained(folder)
    for file in model.glob("*token*"):
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="module")
def gptq(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny llama as a GPTQ folder that somebody else made."""
    folder = tmp_path_factory.mktemp("quantized") / "llama-gptq"
    edgellm.convert(
        model, folder, format="hf", layout="gptq", quant="rtn:int4-g32-sym", check=False
    )
    (folder / "manifest.json").unlink()
    return folder


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "lora")


def test_a_quantized_model_keeps_its_codes_where_the_container_has_them(
    command: Command, gptq: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = command("convert", gptq, "--format", "gguf", "--no-check", "-o", out)
    assert done.code == 0, done.err
    said = " ".join(done.err.split())
    assert "grid q4_0: keeps the source's codes of 4 bits as they are" in said
    made = read_manifest(out).artifact
    assert (made.recipe["quant"], made.calibration) == ("q4_0", None)
    kept = "the codes of 21 stored weights are kept as they are, as q4_0"
    assert kept in said
    assert kept in made.notes
    asked = ("--merge-base", "dequantized", "-q", "q4_0", "--dry-run")
    done = command("convert", gptq, *asked, "-o", tmp_path / "again")
    assert done.code == 0, done.err
    said = " ".join((done.out + done.err).split())
    assert "rounded again" in said
    assert "--merge-base dequantized asks for it" in said


def test_an_adapter_leaves_the_codes_of_other_weights(
    command: Command, gptq: Path, lora: Path, tmp_path: Path
) -> None:
    """It changes q and v of three layers; the other fifteen weights are as they were."""
    asked = ("--format", "gguf", "-q", "rtn:q4_0", "--no-check")
    done = command("convert", gptq, *asked, "-o", tmp_path / "bare")
    assert done.code == 0, done.err
    done = command("convert", gptq, "--adapter", lora, *asked, "-o", tmp_path / "merged")
    assert done.code == 0, done.err
    assert "the codes of 15 stored weights are kept as they are" in " ".join(done.err.split())
    bare, merged = (
        {tensor.name: tensor.sha256 for tensor in read_manifest(tmp_path / out).artifact.tensors}
        for out in ("bare", "merged")
    )
    assert {name for name in bare if bare[name] != merged[name]} == {
        f"blk.{layer}.attn_{each}.weight" for layer in range(3) for each in "qv"
    }


def test_channels_stay_as_they_are_beside_adapters_and_where_codes_are_kept(
    command: Command, model: Path, gptq: Path, lora: Path
) -> None:
    """Elsewhere they are scaled for llama.cpp where no solver is named, below 8 bits."""

    def quant(*options: object, grid: str = "q4_0", format: str = "gguf") -> str:
        given = (*options, "--format", format, "-q", grid, "--dry-run", "--json")
        chosen: str = command("convert", *given).json()["recipe"]["quant"]
        return chosen

    assert quant(model) == "awq+gptq:q4_0"
    assert quant(model, "--adapter", lora) == "awq+gptq:q4_0"
    assert quant(model, "--adapter", lora, "--keep-adapters") == "gptq:q4_0"
    assert quant(model, grid="int4-g32", format="onnx") == "gptq:int4-g32"
    assert quant(gptq, "--adapter", lora) == "gptq:q4_0"
    assert quant(gptq, "--adapter", lora, grid="iq4_nl") == "awq+gptq:iq4_nl"


def test_a_quantized_model_is_dequantized_where_nothing_holds_its_codes(
    command: Command, quantized: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    asked = ("--format", "gguf", "-q", "q8_0", "--no-check")
    done = command("convert", quantized, *asked, "-o", out)
    assert done.code == 0, done.err
    said = " ".join(done.err.split())
    assert "weights are stored as nf4-dq" in said
    assert "stored weights are dequantized and rounded again" in said
    assert "their codes do not lie along rows" in said
    assert any("stored as nf4-dq" in note for note in read_manifest(out).artifact.notes)


def test_merge_base_without_adapters_means_a_quantized_base_alone(
    command: Command, model: Path, tmp_path: Path
) -> None:
    done = command("convert", model, "--merge-base", "nf4", "-o", tmp_path / "out")
    assert done.code == 2
    assert "merge_base is about adapters and there are none" in done.err
    done = command("convert", model, "--merge-base", "dequantized", "-o", tmp_path / "out")
    assert done.code == 2
    assert "in full precision: leave it out" in " ".join(done.err.split())


def test_an_adapter_is_merged_into_the_quantized_base_that_is_given(
    command: Command, quantized: Path, lora: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    asked = ("--adapter", lora, "--format", "gguf", "-q", "q8_0", "--no-check")
    done = command("convert", quantized, *asked, "-o", out)
    assert done.code == 0, done.err
    said = "merged into dequantized nf4 (double quantization): llama-bnb-4bit is stored so"
    assert said in " ".join(done.err.split())
    merge = read_manifest(out).artifact.merge
    assert merge is not None
    assert merge.base == "dequantized nf4-dq"


def test_an_adapter_stays_apart_from_a_quantized_base(
    command: Command, quantized: Path, model: Path, lora: Path, tmp_path: Path
) -> None:
    asked = ("--adapter", lora, "--keep-adapters", "--quant", "q8_0", "--no-check")
    again = ("--merge-base", "dequantized")
    done = command("convert", quantized, *asked, "-o", tmp_path / "out")
    assert done.code == 0, done.err
    made = read_manifest(tmp_path / "out").artifact
    assert [entry.file for entry in made.kept_adapters] == ["adapter-lora.gguf"]
    assert any("stored as nf4-dq" in note for note in made.notes)
    done = command("convert", model, *asked, *again, "-o", tmp_path / "full")
    assert (done.code, "leave one of the two out" in done.err) == (2, True), done.err


@pytest.mark.parametrize(
    ("merge_base", "said", "recorded"),
    [
        ((), SAID, "dequantized nf4-dq"),
        (("--merge-base", "nf4"), "dequantized nf4: --merge-base nf4", "dequantized nf4"),
        (("--merge-base", "full"), "full-precision weights: --merge-base full", "full"),
    ],
)
def test_an_adapter_is_merged_into_the_base_that_it_was_trained_on(
    merge_base: tuple[str, ...],
    said: str,
    recorded: str,
    command: Command,
    model: Path,
    lora: Path,
    tmp_path: Path,
) -> None:
    (lora / "README.md").write_text(CARD)
    out = tmp_path / "out"
    asked = ("--adapter", lora, *merge_base, "--format", "gguf", "-q", "q8_0", "--no-check")
    done = command("convert", model, *asked, "-o", out)
    assert done.code == 0, done.err
    assert said in " ".join(done.err.split())
    merge = read_manifest(out).artifact.merge
    assert merge is not None
    assert merge.base == recorded


def test_a_base_that_no_option_can_make_is_refused(
    command: Command, model: Path, lora: Path, tmp_path: Path
) -> None:
    (lora / "README.md").write_text(CARD.replace("bitsandbytes\n", "gptq\n"))
    done = command("convert", model, "--adapter", lora, "-o", tmp_path / "out")
    assert done.code == 3
    assert "give that base itself" in done.err
