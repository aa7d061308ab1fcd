"""onnxruntime-genai: ONNX folders that edgellm makes, and those of genai's own builder.

Its ``Generator`` is driven token by token, and never samples. Two things it cannot do: it hands out
copies of its cache but takes none back, so that ``restore`` computes the tokens anew; and where a
graph gives the last position's logits alone, all of them cost a step each.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgellm.artifact import GENAI_CONFIG, Artifact
from edgellm.errors import GenerationError, SourceError, UnsupportedTarget
from edgellm.hardware import Hardware, detect, free_memory_bytes
from edgellm.json_file import read_json
from edgellm.runtimes import limits
from edgellm.runtimes.huge_pages import HugePages, anonymous_ranges
from edgellm.runtimes.operators import TracedStep
from edgellm.runtimes.ort import session_settings
from edgellm.runtimes.ort_package import HALVES_ON, check_compute, found_package
from edgellm.runtimes.ort_trace import CLOCK, OrtTrace
from edgellm.runtimes.session import Capabilities, KvState, Logits, RunOptions
from edgellm.runtimes.stepped import STEP_TOKENS, SteppedSession
from edgellm.runtimes.token_prefix import shared_length
from edgellm.runtimes.versions import installed_version, version_numbers

INSTALL = "pip install 'edgellm[genai]'"

OLDEST = (0, 9, 0)
"""Where ``Config.overlay`` and ``Generator.rewind_to`` had come."""

DISTRIBUTIONS = {
    "onnxruntime-genai": "cpu",
    "onnxruntime-genai-cuda": "cuda",
    "onnxruntime-genai-directml": "directml",
}
"""Packages that bring the module ``onnxruntime_genai``, and the device that each is for."""

PROVIDERS = {"cuda": "cuda", "directml": "dml"}
"""Our devices as genai names what computes on them; the CPU has no name there."""

ATTENTION = ("full_attention", "sliding_attention")
"""Kinds of layers that have keys and values, as genai names them."""

KV_TYPES = {"float32": "f32", "float16": "f16", "int8": "int8"}

ERRORS = (RuntimeError, ValueError, MemoryError)
"""What genai raises, which has no exceptions of its own."""


class GenaiRuntime:
    """Opens ONNX folders with a ``genai_config.json``, whoever made them."""

    name = "onnxruntime-genai"

    def capabilities(self, hardware: Hardware) -> Capabilities:
        """What the installed package can do; it is not imported."""
        found = {name: installed_version(name) for name in DISTRIBUTIONS}
        version = next(filter(None, found.values()), "")
        refusal = ""
        if not version:
            refusal = f"onnxruntime-genai is not installed: {INSTALL}"
        elif version_numbers(version) < OLDEST:
            oldest = ".".join(map(str, OLDEST))
            refusal = f"onnxruntime-genai {version} is older than {oldest}: {INSTALL} --upgrade"
        clash = found_package().clash
        nvidia = any(gpu.vendor == "NVIDIA" for gpu in hardware.gpus.value)
        here = {
            "cuda": bool(found["onnxruntime-genai-cuda"]) and nvidia,
            "directml": bool(found["onnxruntime-genai-directml"]),
            "cpu": True,
        }
        return Capabilities(
            runtime=self.name,
            available=not refusal,
            reason=refusal or "; ".join(filter(None, (f"onnxruntime-genai {version}", clash))),
            version=version,
            install=INSTALL,
            containers=frozenset({"onnx", "genai"}),
            devices=() if refusal else tuple(device for device in here if here[device]),
            possible_devices=tuple(here),
            kv_dtypes=tuple(KV_TYPES.values()),
            halves_only=HALVES_ON,
            speed_rank=25,
            restores=False,
            traces_operators=True,
            tracing=CLOCK,
        )

    def open(self, artifact: Artifact, options: RunOptions) -> GenaiSession:
        """A session on an ONNX folder of edgellm's or of genai's own builder."""
        if artifact.container not in ("onnx", "genai"):
            raise UnsupportedTarget(
                f"onnxruntime-genai runs ONNX folders, and {artifact.path} is "
                f"{artifact.container}: choose another --runtime, or convert it with --format onnx"
            )
        hardware = detect()
        device = limits.chosen_device(
            self.capabilities(hardware), options.device, compute=artifact.compute
        )
        check_compute(artifact, device)
        threads = options.threads or hardware.physical_cores.value
        return GenaiSession(artifact, options, device=device, threads=threads)


class GenaiSession(SteppedSession):
    """One model of genai and the generator of one sequence."""

    runtime = "onnxruntime-genai"

    def __init__(
        self, artifact: Artifact, options: RunOptions, *, device: str, threads: int
    ) -> None:
        """Raises ``SourceError`` for a folder that is no decoder's, and ``GenerationError`` with
        genai's own words when it cannot load it."""
        import onnxruntime_genai as genai

        super().__init__()
        self._trace = OrtTrace(device, ("cpu",)) if options.trace else None
        folder = artifact.main.parent
        config = read_json(folder / GENAI_CONFIG)
        model = _decoder_of(config, artifact)
        self.device = device
        self.context_tokens = limits.context_tokens(
            options.context_tokens, int(model["context_length"]), artifact.path
        )
        self.vocab_size = int(model["vocab_size"])
        self._decoder: dict[str, Any] = model["decoder"]
        types = self._decoder.get("layer_types", ())
        self._attending = [index for index, kind in enumerate(types) if kind in ATTENTION]
        if not types:
            self._attending = list(range(int(self._decoder["num_hidden_layers"])))
        if not self._attending:
            raise UnsupportedTarget(
                f"{artifact.path} has no attention, and onnxruntime-genai runs no decoder without: "
                "choose --runtime onnxruntime"
            )
        self._shares = bool(config.get("search", {}).get("past_present_share_buffer", False))
        past = self._decoder["inputs"].get("past_key_names", "past_key_values.%d.key")
        before = anonymous_ranges()
        try:
            settings = genai.Config(str(folder))
            settings.clear_providers()
            if device in PROVIDERS:
                settings.append_provider(PROVIDERS[device])
            ours = session_settings(found_package().version, threads)
            if self._trace is not None:
                ours["enable_profiling"] = self._trace.prefix
            settings.overlay(json.dumps({"model": {"decoder": {"session_options": ours}}}))
            self._genai, self._model = genai, genai.Model(settings)
            first = self._new_generator(1).get_input(past % self._attending[0])
        except (*ERRORS, TypeError) as error:
            said = limits.explained(error, device)
            raise GenerationError(
                f"onnxruntime-genai could not load {artifact.path}: "
                f"{said}. Check an artifact with `edgellm verify`; other "
                "folders may need another --device"
            ) from error
        # Begun before the cache is made, whose untouched places must not be filled.
        self._pages = HugePages(before)
        try:
            self._prepare(first.dtype, options.kv_dtype, artifact.path)
        except BaseException:
            self._pages.stop()
            raise

    def _prepare(self, cached: np.dtype[Any], wanted: str | None, path: Path) -> None:
        """Make the generator; raises as ``__init__``, and ``UnsupportedTarget`` where keys and
        values are not ``wanted``."""
        self._one_by_one = False
        self._value_bytes = cached.itemsize
        self.kv_dtype = KV_TYPES.get(str(cached), str(cached))
        if wanted not in (None, self.kv_dtype):
            raise UnsupportedTarget(
                f"{path} was made to cache keys and values in {self.kv_dtype}, not {wanted}: leave "
                "the choice out, or convert again with --kv-cache"
            )
        if self.device == "cpu":
            limits.check_kv_memory(self.kv_bytes(), free_memory_bytes(), "a smaller --context")
        self._generator: Any = self._new_generator(self.context_tokens)

    def _new_generator(self, tokens: int) -> Any:
        """One with room for ``tokens``, which is taken at once where past and present share it."""
        params = self._genai.GeneratorParams(self._model)
        params.set_search_options(max_length=tokens, min_length=0, do_sample=False, num_beams=1)
        try:
            return self._genai.Generator(self._model, params)
        except ERRORS as error:
            said = limits.explained(error, self.device)
            raise GenerationError(
                f"onnxruntime-genai could not make room for {tokens} tokens: {said}"
            ) from error

    def save(self) -> KvState:
        self._check_open()
        return KvState(self.runtime, tuple(self._tokens), ())

    def restore(self, state: KvState) -> None:
        """As ``Session.restore``; the tokens are computed anew."""
        self._check_open()
        limits.check_state(state, self.runtime, self.context_tokens)
        shared = shared_length(self._tokens, state.tokens)
        self._keep(shared)
        if len(state.tokens) > shared:
            self.prefill(state.tokens[shared:])

    def kv_bytes(self) -> int:
        self._check_open()
        decoder = self._decoder
        values = 2 * len(self._attending) * decoder["num_key_value_heads"]
        values *= decoder["head_size"] * self._value_bytes
        return int(values * (self.context_tokens if self._shares else len(self._tokens)))

    def finish_trace(self) -> Sequence[TracedStep]:
        self._check_open()
        if self._trace is None:
            raise limits.untraced()
        trace, self._trace = self._trace, None
        self.close()  # with its model, genai's session goes, which ends the profile as it does
        return trace.steps()

    def close(self) -> None:
        self._closed = True
        self._pages.stop()
        self._generator = self._model = None
        self._tokens = []
        if self._trace is not None:
            self._trace.discard()

    def _compute(self, token_ids: Sequence[int], outputs: int) -> Logits | None:
        try:
            if self._one_by_one and outputs > 1:
                return np.concatenate([self._append((token,), 1) for token in token_ids])
            rows = self._append(token_ids, outputs)
            if len(rows) >= outputs:
                return rows[len(rows) - outputs :].astype(np.float32, copy=False)
            # The graph computes the last position only: once more, one by one.
            self._one_by_one = True
            self._forget(len(self._tokens))
            return np.concatenate([self._append((token,), 1) for token in token_ids])
        except ERRORS as error:
            said = limits.explained(error, self.device)
            raise GenerationError(
                f"onnxruntime-genai could not compute {len(token_ids)} tokens: {said}"
            ) from error

    def _append(self, token_ids: Sequence[int], outputs: int) -> Logits:
        """Compute these tokens; logits of the last, or of more where ``outputs`` are wanted."""
        self._generator.append_tokens(np.asarray([token_ids], np.int32))
        if self._trace is not None:
            self._trace.ran(len(token_ids))
        logits: Logits = (
            self._generator.get_logits() if outputs < 2 else self._generator.get_output("logits")
        )
        found: Logits = logits[0]
        return found

    def _forget(self, length: int) -> None:
        if self._generator.token_count() <= length:
            return
        try:
            self._generator.rewind_to(length)
        except ERRORS:  # states cannot be cut: the tokens are computed anew
            self._generator = self._new_generator(self.context_tokens)
            kept = self._tokens[:length]
            for first in range(0, len(kept), STEP_TOKENS):
                self._compute(kept[first : first + STEP_TOKENS], 0)


def _decoder_of(config: dict[str, Any], artifact: Artifact) -> dict[str, Any]:
    """The part ``model`` of a ``genai_config.json``.

    Raises ``SourceError`` where it lacks what a decoder's has, and ``UnsupportedTarget`` for models
    that take more than text.
    """
    model = config.get("model")
    more = sorted({"encoder", "vision", "speech", "embedding"} & set(model or ()))
    if more:
        raise UnsupportedTarget(
            f"{artifact.path} has {' and '.join(more)} beside its decoder, and edgellm runs models "
            "of text alone: use onnxruntime-genai itself"
        )
    decoder = model.get("decoder") if isinstance(model, dict) else None
    if decoder and "past_names" in decoder.get("inputs", {}):
        raise UnsupportedTarget(
            f"{artifact.path} has keys and values of a layer in one input (past_names), as "
            "GPT-2's builds: convert the model itself with edgellm"
        )
    wanted = ("inputs", "num_hidden_layers", "num_key_value_heads", "head_size")
    lacks = [f"model.{key}" for key in ("context_length", "vocab_size") if key not in (model or ())]
    lacks += [f"model.decoder.{key}" for key in wanted if key not in (decoder or ())]
    if lacks:
        raise SourceError(
            f"{artifact.path}: {GENAI_CONFIG} lacks {', '.join(lacks)}: fetch the folder again, or "
            "make it anew"
        )
    assert isinstance(model, dict)
    return model
