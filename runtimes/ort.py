"""onnxruntime: our own loop over one graph, keys and values written in place (``ort_caches``).

States of layers are written in place too (``ort_states``), and kept now and then to go back to.

Inputs and outputs are bound by address once; a token copies nothing but itself. On a device,
onnxruntime takes its copy of an input as it is bound, so ids and mask are bound for every step.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from edgellm.artifact import Artifact, refuse_encoders
from edgellm.errors import GenerationError, UnsupportedTarget
from edgellm.hardware import Hardware, detect
from edgellm.runtimes import limits
from edgellm.runtimes.checkpoints import Checkpoints, steps_of
from edgellm.runtimes.huge_pages import HugePages, anonymous_ranges
from edgellm.runtimes.operators import TracedStep
from edgellm.runtimes.ort_caches import Caches, DeviceCaches, HostCaches, pasts_of
from edgellm.runtimes.ort_package import HALVES_ON, INSTALL, PROVIDERS, check_compute, found_package
from edgellm.runtimes.ort_states import States, states_of
from edgellm.runtimes.ort_trace import CLOCK, OrtTrace
from edgellm.runtimes.session import Capabilities, KvState, Logits, RunOptions
from edgellm.runtimes.versions import version_numbers

STEP_TOKENS = 128
"""Tokens computed at once: bounds the memory of a long prompt, and keeps a layer's values in a
core's cache (512 tokens of SmolLM2 int4 took 1.14x and 1.05x as long in one step, on 1 and 2
threads). Ctrl-C is heard between steps."""

SPIN_US = "20"
"""How long threads wait for the next operator before they sleep. Milliseconds a token of SmolLM2
int4 on two cores, nearly idle and shared with others: 10.7 and 12.7 without spinning, 6.9 and 14.8
with 20 us, 6.8 and 27 with onnxruntime's default of a millisecond."""
SHORT_SPIN_SINCE = (1, 32)
"""The oldest release that is known to heed ``spin_duration_us``; older ones do not spin here."""

IN_HOST_MEMORY = ("cpu", "coreml")
"""Devices that work on the computer's own memory."""

MEMORIES = {"cuda": "cuda", "directml": "dml"}
"""Of the others, as onnxruntime names them."""

ERROR_NAMES = (
    "EPFail", "EngineError", "Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf",
    "ModelLoaded", "NoModel", "NoSuchFile", "NotImplemented", "RuntimeException",
)  # fmt: skip
"""onnxruntime's exceptions, which have no root of their own."""


def errors_of(onnxruntime: ModuleType) -> tuple[type[Exception], ...]:
    """What the library raises, to be caught and translated."""
    state = onnxruntime.capi.onnxruntime_pybind11_state
    named = (getattr(state, name) for name in ERROR_NAMES if hasattr(state, name))
    return (RuntimeError, *named)


class OnnxRuntime:
    """Opens ONNX artifacts with onnxruntime."""

    name = "onnxruntime"

    def capabilities(self, hardware: Hardware) -> Capabilities:
        """What the installed package can do; it is not imported."""
        package = found_package()
        reason = f"onnxruntime is not installed: {INSTALL}"
        if package.name:
            reason = f"{package.name} {package.version}"
        return Capabilities(
            runtime=self.name,
            available=bool(package.name),
            reason=f"{reason}; {package.clash}" if package.clash else reason,
            version=package.version,
            install=INSTALL,
            containers=frozenset({"onnx"}),
            devices=package.devices(hardware),
            possible_devices=tuple(PROVIDERS),
            kv_dtypes=("f32", "f16", "int8"),
            halves_only=HALVES_ON,
            speed_rank=20,
            traces_operators=True,
            tracing=CLOCK,
        )

    def open(self, artifact: Artifact, options: RunOptions) -> OnnxSession:
        """A session on an ONNX artifact; the manifest says what the graph alone does not."""
        if artifact.container != "onnx" or artifact.manifest is None:
            raise UnsupportedTarget(
                f"onnxruntime runs ONNX artifacts made by edgellm, and {artifact.path} is "
                f"{artifact.container}: choose --runtime llamacpp, or convert it with --format onnx"
            )
        refuse_encoders(artifact)
        hardware = detect()
        device = limits.chosen_device(
            self.capabilities(hardware),
            options.device,
            "convert with --format gguf and run on llama.cpp",
            artifact.compute,
        )
        check_compute(artifact, device)
        kv_dtype = str(artifact.manifest.artifact.recipe.get("kv_cache") or artifact.compute)
        if options.kv_dtype not in (None, kv_dtype):
            raise UnsupportedTarget(
                f"{artifact.path} was made to cache keys and values in {kv_dtype}, not "
                f"{options.kv_dtype}: leave the choice out, or convert again with --kv-cache int8, "
                "--compute f16, or --format gguf for llama.cpp"
            )
        trained = artifact.manifest.artifact.model.context_length
        room = limits.context_tokens(options.context_tokens, trained, artifact.path)
        threads = options.threads or hardware.physical_cores.value
        trace = OrtTrace(device, IN_HOST_MEMORY) if options.trace else None
        return OnnxSession(artifact.main, room, threads, kv_dtype, device, trace)


class OnnxSession:
    """One ONNX decoder graph and the buffers of one sequence."""

    runtime = "onnxruntime"

    def __init__(
        self,
        path: Path,
        context_tokens: int,
        threads: int,
        kv_dtype: str,
        device: str = "cpu",
        trace: OrtTrace | None = None,
    ) -> None:
        """Raises ``GenerationError`` with onnxruntime's own words when it cannot load the graph."""
        import onnxruntime

        self.device = device
        self._trace = trace
        self._errors = errors_of(onnxruntime)
        before = anonymous_ranges()
        try:
            settings = session_options(onnxruntime, threads)
            if trace is not None:
                settings.enable_profiling = True
                settings.profile_file_prefix = trace.prefix
            providers = list(dict.fromkeys((PROVIDERS[device], PROVIDERS["cpu"])))
            self._session: Any = open_graph(onnxruntime, path, settings, providers)
        except self._errors as error:
            said = limits.explained(error, self.device)
            raise GenerationError(
                f"onnxruntime could not load {path}: {said}. Check the "
                "artifact with `edgellm verify`"
            ) from error
        # Begun before the caches are made, whose untouched places must not be filled.
        self._pages = HugePages(before)
        try:
            self._prepare(context_tokens, kv_dtype)
        except BaseException:
            self._pages.stop()
            raise

    def _prepare(self, context_tokens: int, kv_dtype: str) -> None:
        """Make what the graph is bound to; raises ``GenerationError`` where it does not fit."""
        self.context_tokens = context_tokens
        self.kv_dtype = kv_dtype
        shapes = {output.name: output.shape for output in self._session.get_outputs()}
        self.vocab_size = int(shapes["logits"][-1])
        self._tokens: list[int] = []
        # The first of them, which the caches and states hold; all where nothing is to catch up.
        self._held = 0
        self._checkpoints = Checkpoints()
        self._step_ids: npt.NDArray[np.int64] = np.zeros(
            (1, min(STEP_TOKENS, context_tokens)), np.int64
        )
        self._mask = np.ones((1, context_tokens), np.int64)
        self._logits_from = np.array([-1], np.int64)
        self._logits: Logits = np.empty((1, 1, self.vocab_size), np.float32)
        self._binding: Any = self._session.io_binding()
        self._bound_step = 0
        on_host = self.device in IN_HOST_MEMORY
        pasts = pasts_of(self._session, in_one=on_host)
        self._caches: Caches = (
            HostCaches(self._binding, pasts)
            if on_host
            else DeviceCaches(self._binding, pasts, MEMORIES[self.device])
        )
        self._reserve(1)
        memory = "cpu" if on_host else MEMORIES[self.device]
        self._states = States(self._binding, states_of(self._session), memory)
        self._bind_input("logits_from", self._logits_from, (1,))
        self._bind_output("logits", self._logits)
        # Among the outputs, in the order in which they were bound.
        self._logits_place = len(self._caches) + len(self._states)

    def _reserve(self, total: int) -> None:
        try:
            self._caches.reserve(total, len(self._tokens), self.context_tokens)
        except self._errors as error:
            said = limits.explained(error, self.device)
            raise GenerationError(f"no room for {total} tokens on {self.device}: {said}") from error

    def _bind_input(self, name: str, array: npt.NDArray[Any], shape: tuple[int, ...]) -> None:
        self._binding.bind_input(name, "cpu", 0, array.dtype.type, shape, array.ctypes.data)

    def _bind_output(self, name: str, array: npt.NDArray[Any]) -> None:
        element = array.dtype.type
        self._binding.bind_output(name, "cpu", 0, element, array.shape, array.ctypes.data)

    @property
    def tokens(self) -> Sequence[int]:
        return self._tokens

    def prefill(self, token_ids: Sequence[int], *, all_logits: bool = False) -> Logits:
        self._check_open()
        limits.check_tokens(token_ids, len(self._tokens), self.context_tokens, self.vocab_size)
        self._reserve(len(self._tokens) + len(token_ids))
        if not all_logits:
            self._run_steps(token_ids)
            return self._last()[np.newaxis]
        rows: Logits = np.empty((len(token_ids), self.vocab_size), np.float32)
        try:
            self._run_steps(token_ids, rows)
        finally:
            self._logits_from[0] = -1
            self._bind_output("logits", self._logits)
        return rows

    def decode(self, token_id: int) -> Logits:
        self._check_open()
        limits.check_tokens((token_id,), len(self._tokens), self.context_tokens, self.vocab_size)
        self._reserve(len(self._tokens) + 1)
        if len(self._states):
            self._run_steps((token_id,))
        else:
            self._held = len(self._tokens)
            self._run((token_id,))
            self._tokens.append(token_id)
        return self._last()

    def trim(self, length: int) -> None:
        # What lies behind the last token is never read, so forgetting is only a shorter list.
        self._check_open()
        limits.check_trim(length, len(self._tokens))
        if length < len(self._tokens):
            self._keep(length)

    def save(self) -> KvState:
        self._check_open()
        if self._held < len(self._tokens):
            self._run_steps(())
        data: tuple[npt.NDArray[Any], ...] = self._caches.read(len(self._tokens))
        if len(self._states):
            data = (*data, self._states.read(), *self._checkpoints.copies())
        return KvState(self.runtime, tuple(self._tokens), data)

    def restore(self, state: KvState) -> None:
        self._check_open()
        limits.check_state(state, self.runtime, self.context_tokens)
        cached, states = state.data[: len(self._caches)], state.data[len(self._caches) :]
        if not self._caches.takes(cached) or not self._takes_states(states):
            raise GenerationError("this cache is of another model: it cannot be restored here")
        self._reserve(len(state.tokens))
        if states:
            self._checkpoints.take(states[1:])
        self._tokens.clear()
        self._held = 0
        self._caches.write(cached)
        if states:
            self._states.write(states[0])
        self._tokens.extend(state.tokens)
        self._held = len(self._tokens)

    def _takes_states(self, states: Sequence[npt.NDArray[Any]]) -> bool:
        """Whether ``states`` are what ``save`` puts behind keys and values of this model."""
        if not len(self._states):
            return not states
        return len(states) == 3 and self._states.takes(states[0]) and states[1].dtype == np.uint32

    def kv_bytes(self) -> int:
        self._check_open()
        return self._caches.nbytes + self._states.nbytes + self._checkpoints.nbytes

    def finish_trace(self) -> Sequence[TracedStep]:
        self._check_open()
        if self._trace is None:
            raise limits.untraced()
        trace, self._trace = self._trace, None
        self._session.end_profiling()
        self.close()
        return trace.steps()

    def close(self) -> None:
        self._pages.stop()
        self._binding = self._session = None
        self._caches = HostCaches(None, [])
        self._states, self._checkpoints = States(None, [], "cpu"), Checkpoints()
        self._tokens, self._held = [], 0
        if self._trace is not None:
            self._trace.discard()

    def _last(self) -> Logits:
        return self._logits.reshape(self.vocab_size)

    def _check_open(self) -> None:
        if self._session is None:
            raise limits.closed()

    def _run_steps(self, token_ids: Sequence[int], rows: Logits | None = None) -> None:
        """Compute ``token_ids`` in steps; on any failure, Ctrl-C as well, keep none of them.

        Tokens that states have to catch up with go first; ``rows`` are of the others.
        """
        start, size = len(self._tokens), self._step_ids.shape[1]
        behind = start - self._held
        work = [*self._tokens[self._held :], *token_ids]
        try:
            self._checkpoint(behind == 0 and len(work) > 1)
            for places in steps_of(behind, len(work), size):
                step = work[places.start : places.stop]
                skipped = max(0, behind - places.start)
                if rows is not None:
                    self._logits_from[0] = min(skipped, len(step) - 1)
                    # The graph declares one position: more come only in memory that is not ours.
                    self._binding.bind_output("logits", "cpu")
                self._run(step)
                if rows is not None and skipped < len(step):
                    computed = self._binding.get_outputs()[self._logits_place].numpy()
                    place = places.start + skipped - behind
                    rows[place : place + len(step) - skipped] = computed[0]
                self._checkpoint(len(step) > 1)
        except BaseException:
            self._keep(start)
            raise
        self._tokens.extend(token_ids)

    def _checkpoint(self, wanted: bool) -> None:
        """Keep what the states are now, where it is ``wanted`` or none was kept for long."""
        if len(self._states) and self._held and (wanted or self._checkpoints.due(self._held)):
            self._checkpoints.keep(self._held, self._states.read())

    def _keep(self, length: int) -> None:
        """Leave the first ``length`` tokens, where a step may have been interrupted."""
        del self._tokens[length:]
        self._held = length
        if len(self._states):
            self._held, state = self._checkpoints.back_to(length)
            self._states.write(state)

    def _run(self, token_ids: Sequence[int]) -> None:
        count, total = len(token_ids), self._held + len(token_ids)
        self._step_ids[0, :count] = token_ids
        copies = self.device not in IN_HOST_MEMORY
        if copies or count != self._bound_step:
            self._bind_input("input_ids", self._step_ids, (1, count))
            self._bound_step = count
        if copies:
            self._bind_input("logits_from", self._logits_from, (1,))
        self._bind_input("attention_mask", self._mask, (1, total))
        try:
            self._session.run_with_iobinding(self._binding)
        except self._errors as error:
            said = limits.explained(error, self.device)
            raise GenerationError(
                f"onnxruntime could not compute {count} tokens: {said}"
            ) from error
        self._held = total
        if self._trace is not None:
            self._trace.ran(count)


def open_graph(onnxruntime: Any, path: Path, settings: Any, providers: list[str]) -> Any:
    """A session that really has the first of ``providers``, for onnxruntime falls back in silence.

    Raises ``GenerationError`` where it has not.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the provider is missing, which is said below
        session = onnxruntime.InferenceSession(str(path), settings, providers=providers)
    if session.get_providers()[0] != providers[0]:
        raise GenerationError(
            f"this onnxruntime cannot use its {providers[0]}: for CUDA, the driver, CUDA and cuDNN "
            "of the versions that it was built for must be installed (pip install "
            "'onnxruntime-gpu[cuda,cudnn]' brings the last two); or choose --device cpu"
        )
    return session


def session_settings(version: str, threads: int) -> dict[str, str | int]:
    """How onnxruntime of this version computes for us, as ``genai_config.json`` words it."""
    short_spin = version_numbers(version) >= SHORT_SPIN_SINCE
    settings: dict[str, str | int] = {
        "intra_op_num_threads": threads,
        "inter_op_num_threads": 1,
        "log_severity_level": 4,
        # Without VNNI, pairs of unsigned by signed bytes are summed in 16 bits and overflow: one
        # large activation spoils every answer of int8-dynamic. Exact sums cost such processors
        # time alone.
        "session.x64quantprecision": "1",
        "session.intra_op.allow_spinning": str(int(short_spin)),
    }
    if short_spin:
        settings["session.intra_op.spin_duration_us"] = SPIN_US
    return settings


def session_options(onnxruntime: Any, threads: int) -> Any:
    """``session_settings`` as onnxruntime takes them."""
    options = onnxruntime.SessionOptions()
    for name, value in session_settings(onnxruntime.__version__, threads).items():
        if isinstance(value, str):
            options.add_session_config_entry(name, value)
        else:
            setattr(options, name, value)
    # Its cache of memory plans is keyed by shapes, and every token has a new one.
    options.enable_mem_pattern = False
    return options
