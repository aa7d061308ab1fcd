"""Rope scaling at run time, by the settings of llama.cpp's context."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgellm.architectures.rope_scaling import AskedScaling, raised_theta
from edgellm.errors import UnsupportedTarget

if TYPE_CHECKING:
    from edgellm.source.gguf_file import GgufFile

FREQUENCIES = "rope_freqs.weight"
"""A tensor whose divisors llama.cpp applies whatever its context is told."""

DEFAULT_THETA = 10000.0
"""Of llama.cpp, where a file names none."""

ALWAYS_APPLIED = ("attn_factor", "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow",
                  "yarn_ext_factor", "yarn_log_multiplier")  # fmt: skip
"""Keys of a file's own scaling that stay in force beside what a context is told."""


@dataclass(frozen=True, slots=True)
class RopeSettings:
    """What a context is told: ``context`` tokens are then reached. Zeros are as the file has it."""

    context: int
    kind: str
    freq_base: float = 0.0
    freq_scale: float = 0.0
    original_context: int = 0

    def set_in(self, context_options: Any, library: Any) -> None:
        """Write them into llama.cpp's own structure."""
        kind = f"LLAMA_ROPE_SCALING_TYPE_{self.kind.upper()}"
        context_options.rope_scaling_type = getattr(library, kind)
        context_options.rope_freq_base = self.freq_base
        context_options.rope_freq_scale = self.freq_scale
        context_options.yarn_orig_ctx = self.original_context


def rope_settings(stored: GgufFile, asked: AskedScaling) -> RopeSettings:
    """What llama.cpp is told for ``asked``, by the file's header.

    Raises ``UnsupportedTarget`` for what it cannot be told beside the file.
    """
    metadata = stored.metadata
    arch = metadata["general.architecture"]

    def stated(key: str, default: Any = None) -> Any:
        return metadata.get(f"{arch}.{key}", default)

    again = f"convert the original again with --rope-scaling {asked}"
    if asked.kind == "llama3":
        raise UnsupportedTarget(
            f"llama.cpp takes llama3's frequencies from the file alone: {again}"
        )
    if FREQUENCIES in stored.tensors:
        raise UnsupportedTarget(
            f"the file's own rope scaling ({FREQUENCIES}) would be applied as well: {again}"
        )
    kept = [key for key in ALWAYS_APPLIED if stated(f"rope.scaling.{key}") is not None]
    if kept:
        raise UnsupportedTarget(
            f"the file's own rope scaling ({', '.join(kept)}) would stay in force: {again}"
        )
    if asked.kind == "yarn" and stated("attention.sliding_window"):
        raise UnsupportedTarget(
            "llama.cpp would apply yarn to the layers with a window as well, whose rope is "
            "another: choose linear or ntk, or convert with --format onnx"
        )
    factor = stated("rope.scaling.factor") or stated("rope.scale_linear") or 1.0
    # To llama.cpp a missing type means linear.
    kind = stated("rope.scaling.type", "none" if factor == 1.0 else "linear")
    trained = stated("rope.scaling.original_context_length", 0)
    if kind not in ("none", "yarn") or (kind == "yarn" and not trained):
        raise UnsupportedTarget(
            f"the file has {kind} rope scaling already, and does not say for how many tokens the "
            f"model was trained before: {again}"
        )
    trained = int(trained or stated("context_length", 0))
    if asked.kind == "ntk":
        heads = stated("attention.head_count", 1)
        width = stated("rope.dimension_count") or stated("attention.key_length")
        width = width or stated("embedding_length") // heads
        theta = raised_theta(float(stated("rope.freq_base", DEFAULT_THETA)), width, asked.factor)
        return RopeSettings(asked.context(trained), "none", freq_base=theta)
    return RopeSettings(
        asked.context(trained),
        asked.kind,
        freq_scale=1 / asked.factor,
        original_context=trained,
    )
