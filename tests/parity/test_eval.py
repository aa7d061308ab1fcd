"""``eval`` against llama-perplexity's formulas, on logits of llama.cpp and of transformers.

The formulas are written here anew, one token after another in Python's own floats, from
tools/perplexity/perplexity.cpp of llama.cpp; its rounding of the reference to 16 bits is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")


import llamacpp_logits
import tiny_models

import edgellm
from edgellm.side_by_side import Evaluation, evaluate
from edgellm.tokenization.llamacpp import LlamaCppTokenizer

TinyModel = Callable[[str], Path]

TEXT = tiny_models.TEXT * 2
WINDOW = 64


@dataclass(frozen=True)
class Made:
    """A tiny model as a folder, as f32 and q4_0 GGUF, and as int4 ONNX."""

    source: Path
    floats: Path
    gguf: Path
    onnx: Path
    text: Path

    @property
    def gguf_file(self) -> Path:
        (file,) = self.gguf.glob("*.gguf")
        return file

    @property
    def float_file(self) -> Path:
        (file,) = self.floats.glob("*.gguf")
        return file


@pytest.fixture(scope="module")
def made(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("eval")
    source = tiny_model("llama")
    for name, container, quant in (
        ("floats", "gguf", "f32"),
        ("gguf", "gguf", "rtn:q4_0"),
        ("onnx", "onnx", "rtn:int4-g32"),
    ):
        edgellm.convert(source, folder / name, format=container, quant=quant, check=False)
    text = folder / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    return Made(source, folder / "floats", folder / "gguf", folder / "onnx", text)


def chunks(file: Path) -> list[list[int]]:
    """llama-perplexity's: all tokens with the begin token before, each chunk begun with it."""
    tokenizer = LlamaCppTokenizer(file)
    tokens = tokenizer.encode(TEXT, add_special=True, parse_special=False)
    found = [tokens[n * WINDOW : (n + 1) * WINDOW] for n in range(len(tokens) // WINDOW)]
    if tokenizer.add_bos:
        found = [[tokenizer.bos_token_id, *chunk[1:]] for chunk in found]
    tokenizer.close()
    return found


Rows = Sequence[Sequence[float]]


def log_probabilities(row: Sequence[float]) -> list[float]:
    highest = max(row)
    log_sum = math.log(math.fsum(math.exp(value - highest) for value in row))
    return [value - highest - log_sum for value in row]


class Sums:
    """``kl_divergence_result``: sums over the tokens of the second half of each chunk."""

    def __init__(self) -> None:
        self.nll: list[float] = []
        self.base: list[float] = []
        self.kld: list[float] = []
        self.p_diff: list[float] = []
        self.same_top = 0

    def add(self, chunk: list[int], logits: Rows, base_logits: Rows) -> None:
        for place in range(len(chunk) // 2, len(chunk) - 1):
            self.count(logits[place], base_logits[place], chunk[place + 1])

    def count(self, row: Sequence[float], base_row: Sequence[float], token: int) -> None:
        ours, base = log_probabilities(row), log_probabilities(base_row)
        self.nll.append(-ours[token])
        self.base.append(-base[token])
        self.kld.append(math.fsum(math.exp(b) * (b - a) for a, b in zip(ours, base, strict=True)))
        self.p_diff.append(math.exp(ours[token]) - math.exp(base[token]))
        self.same_top += ours.index(max(ours)) == base.index(max(base))


def mean_and_uncertainty(values: Sequence[float]) -> tuple[float, float]:
    count = len(values)
    mean = math.fsum(values) / count
    spread = math.fsum(value * value for value in values) / count - mean * mean
    return mean, math.sqrt(spread / (count - 1))


def percentile(values: Sequence[float], fraction: float) -> float:
    place = fraction * (len(values) - 1)
    low = int(place)
    rest = place - low
    ordered = sorted(values)
    return (1 - rest) * ordered[low] + rest * ordered[min(low + 1, len(values) - 1)]


def assert_equal(found: Evaluation, sums: Sums, rel: float, flips: int = 0) -> None:
    """``flips``: places where the likeliest token may differ, two being nearly as likely."""
    count = len(sums.nll)
    nll, nll_error = mean_and_uncertainty(sums.nll)
    base, base_error = mean_and_uncertainty(sums.base)
    both = math.fsum(a * b for a, b in zip(sums.nll, sums.base, strict=True)) / count
    covariance = (both - nll * base) / (count - 1)
    ratio = math.exp(nll - base)
    ratio_error = ratio * math.sqrt(nll_error**2 + base_error**2 - 2 * covariance)
    kld, kld_error = mean_and_uncertainty(sums.kld)
    p_diff, p_diff_error = mean_and_uncertainty(sums.p_diff)
    square, square_error = mean_and_uncertainty([value * value for value in sums.p_diff])
    top = sums.same_top / count
    wanted = {
        "tokens": count,
        "perplexity": math.exp(nll),
        "perplexity_stderr": math.exp(nll) * nll_error,
        "reference_perplexity": math.exp(base),
        "reference_perplexity_stderr": math.exp(base) * base_error,
        "perplexity_increase_stderr": ratio_error,
        "kld_mean": kld,
        "kld_mean_stderr": kld_error,
        "kld_median": percentile(sums.kld, 0.5),
        "kld_p99": percentile(sums.kld, 0.99),
        "kld_max": max(sums.kld),
        "mean_delta_p_stderr": p_diff_error,
        "rms_delta_p": math.sqrt(square),
        "rms_delta_p_stderr": 0.5 / math.sqrt(square) * square_error,
    }
    for name, value in wanted.items():
        assert getattr(found, name) == pytest.approx(value, rel=rel), name
    assert found.perplexity_increase == pytest.approx(ratio - 1, abs=rel * ratio)
    assert found.top1_agreement == pytest.approx(top, abs=flips / count)
    top = found.top1_agreement
    error = math.sqrt(top * (1 - top) / (count - 1))
    assert found.top1_agreement_stderr == pytest.approx(error, rel=1e-12)
    assert found.mean_delta_p == pytest.approx(p_diff, abs=4 * rel * p_diff_error)


def test_two_gguf_files_as_llama_perplexity(made: Made) -> None:
    """Both sides by llama.cpp, the test's logits by its own functions without our session.

    Our session lets it lay weights out anew and takes a window in pieces, and a random model makes
    much of what f16 keys round: that is the bound.
    """
    found = evaluate(
        made.gguf_file, made.text, reference=made.float_file, window_tokens=WINDOW, threads=1
    )
    sums = Sums()
    pieces = chunks(made.gguf_file)
    for chunk in pieces:
        ours, base = (
            llamacpp_logits.logits(file, chunk, as_shipped=True).tolist()
            for file in (made.gguf_file, made.float_file)
        )
        sums.add(chunk, ours, base)
    assert found.window_count == len(pieces) >= 4
    assert found.runtime == found.reference_runtime == "llamacpp"
    assert "as llama-perplexity does" in found.scored
    assert_equal(found, sums, rel=0.05, flips=2)


def test_against_a_folder_through_transformers(made: Made) -> None:
    """The artifact's weights in float, and its source: both are transformers' logits exactly."""
    found = evaluate(
        made.gguf, made.text, reference=made.source, window_tokens=WINDOW, runtime="float"
    )
    assert (found.runtime, found.reference_runtime) == ("float", "float")
    rounded = llamacpp_values(made)
    sums = Sums()
    for chunk in chunks(made.gguf_file):
        base = tiny_models.reference_logits(made.source, chunk)
        sums.add(chunk, transformers_logits(made.source, rounded, chunk), base.tolist())
    assert_equal(found, sums, rel=2e-4)


def llamacpp_values(made: Made) -> dict[str, np.ndarray]:
    """The weights of the q4_0 file as gguf dequantizes them, by their names in the checkpoint."""
    import gguf

    from edgellm.source import open_source

    names = {role: ref.name for role, ref in open_source(str(made.source)).tensors.items()}
    heads = {"attn_q": 6, "attn_k": 2}
    values = {}
    for tensor in gguf.GGUFReader(made.gguf_file).tensors:
        if tensor.name not in names:
            continue
        value = gguf.dequantize(tensor.data, tensor.tensor_type)
        for kind, count in heads.items():
            if kind in tensor.name:  # llama.cpp's order of rotated pairs, put back
                rows, columns = value.shape
                pairs = value.reshape(count, rows // count // 2, 2, columns)
                value = pairs.swapaxes(1, 2).reshape(rows, columns)
        values[names[tensor.name]] = value
    return values


def transformers_logits(source: Path, state: dict[str, np.ndarray], chunk: list[int]) -> Rows:
    import torch

    model = tiny_models.load(source)
    model.load_state_dict({name: torch.tensor(value) for name, value in state.items()})
    with torch.no_grad():
        rows: Rows = model(torch.tensor([chunk]), use_cache=False).logits[0].tolist()
    return rows


def test_an_onnx_artifact_against_a_gguf_file(made: Made) -> None:
    """Two runtimes side by side; by parts, each side equals what it is against the source."""
    both = evaluate(made.onnx, made.text, reference=made.float_file, window_tokens=WINDOW)
    assert (both.runtime, both.reference_runtime) == ("onnxruntime", "llamacpp")
    to_source = evaluate(made.onnx, made.text, reference=made.source, window_tokens=WINDOW)
    assert both.windows_sha256 == to_source.windows_sha256
    assert both.kld_mean == pytest.approx(to_source.kld_mean, rel=0.02)
    assert both.perplexity == to_source.perplexity
    assert both.reference_perplexity == pytest.approx(to_source.reference_perplexity, rel=0.01)


def test_words_and_bytes_of_the_whole_text(made: Made) -> None:
    """Everything is scored but the very first token, which nothing comes before."""
    found = evaluate(made.onnx, made.text, window_tokens=WINDOW, score="all")
    assert found.kld_mean is None
    nll = math.log(found.perplexity) * found.tokens
    assert found.word_perplexity == pytest.approx(math.exp(nll / found.words), rel=1e-9)
    assert found.byte_perplexity == pytest.approx(math.exp(nll / found.text_bytes), rel=1e-9)
    assert found.bits_per_byte == pytest.approx(nll / found.text_bytes / math.log(2), rel=1e-9)
    unscored = found.window_count  # the first token of each, where no begin token comes before it
    assert found.text_bytes <= len(TEXT.encode())
    assert found.text_bytes >= len(TEXT.encode()) - 16 * unscored
    assert len(TEXT.split()) - unscored <= found.words <= len(TEXT.split())


def test_the_reference_is_not_the_model(made: Made) -> None:
    """KL is not symmetric: the reference's probabilities weigh."""
    there = evaluate(made.gguf, made.text, reference=made.onnx, window_tokens=WINDOW, tokens=60)
    back = evaluate(made.onnx, made.text, reference=made.gguf, window_tokens=WINDOW, tokens=60)
    assert there.tokens == back.tokens == 60
    assert there.perplexity == back.reference_perplexity
    assert there.kld_mean != pytest.approx(back.kld_mean, rel=1e-3)
    assert there.top1_agreement == back.top1_agreement
    assert there.rms_delta_p == back.rms_delta_p
