"""llama.cpp through the low-level functions of llama-cpp-python: GGUF on CPU, CUDA or Metal.

The high-level ``Llama`` class is not used: it copies logits and samples in Python. One context is
one session; token, position and logit buffers are made once, and logits are read in place.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgellm.architectures.rope_scaling import parse_scaling
from edgellm.artifact import Artifact
from edgellm.errors import GenerationError, UnsupportedTarget
from edgellm.hardware import Hardware, detect, free_memory_bytes
from edgellm.quant.ggml_types import NAMED
from edgellm.runtimes import limits
from edgellm.runtimes.checkpoints import Checkpoints, steps_of
from edgellm.runtimes.llamacpp_adapters import LlamaCppAdapters, summed
from edgellm.runtimes.llamacpp_batch import Batch
from edgellm.runtimes.llamacpp_library import (
    INSTALL,
    WITHOUT_AMX,
    forget_log,
    last_words,
    library_folder,
    load_library,
    miscompiled_amx,
)
from edgellm.runtimes.llamacpp_memory import kv_token_bytes, layers_that_fit
from edgellm.runtimes.llamacpp_operators import CLOCK, OperatorWatch
from edgellm.runtimes.llamacpp_rope import RopeSettings, rope_settings
from edgellm.runtimes.llamacpp_states import PartialStates, bytes_of
from edgellm.runtimes.operators import TracedStep
from edgellm.runtimes.session import AdapterFile, Capabilities, KvState, Logits, RunOptions
from edgellm.runtimes.versions import version_numbers

if TYPE_CHECKING:
    from edgellm.source.gguf_file import GgufFile

OLDEST = (0, 3, 36)
"""Where ``n_outputs_max`` and ``load_mode`` came in, on whose place in the structures we rely."""

BATCH_TOKENS = 512
"""Tokens that llama.cpp is given at a time; Ctrl-C is heard between two batches."""
OUTPUT_ROWS = 32
"""Positions whose logits are computed at once: llama.cpp reserves a row of the vocabulary each."""
DEFAULT_KV = "f16"
KV_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0")
ROUNDED_KV = ("q8_0", "q4_0")
"""Types of keys and values that llama.cpp reads in its flash attention alone."""
GPU_LIBRARIES = {"cuda": "ggml-cuda", "metal": "ggml-metal", "vulkan": "ggml-vulkan"}
ALL_LAYERS = -1

DECODE_FAILURES = {
    1: "no room in the KV cache",
    2: "it was aborted",
    -1: "it refused the batch",
    -2: "memory ran out",
    -3: "the computation failed",
}
"""What ``llama_decode`` returns, from llama.h."""


class LlamaCppRuntime:
    """Opens GGUF files with the llama.cpp that llama-cpp-python was built with."""

    name = "llamacpp"

    def capabilities(self, hardware: Hardware) -> Capabilities:
        """What the installed build can do, read from its files; the library is not loaded."""

        def found(
            available: bool, reason: str, version: str = "", devices: tuple[str, ...] = ()
        ) -> Capabilities:
            return Capabilities(
                runtime=self.name,
                available=available,
                reason=reason,
                version=version,
                install=INSTALL,
                containers=frozenset({"gguf"}),
                devices=devices,
                possible_devices=(*GPU_LIBRARIES, "cpu"),
                kv_dtypes=KV_TYPES,
                speed_rank=10,
                applies_adapters=True,
                splits_layers=True,
                scales_rope=True,
                traces_operators=True,
                tracing=CLOCK,
            )

        if importlib.util.find_spec("llama_cpp") is None:
            return found(False, f"llama-cpp-python is not installed: {INSTALL}")
        version = importlib.metadata.version("llama-cpp-python")
        if version_numbers(version) < OLDEST:
            oldest = ".".join(map(str, OLDEST))
            reason = f"llama-cpp-python {version} is older than {oldest}: {INSTALL} --upgrade"
            return found(False, reason, version)
        folder = library_folder()
        libraries = " ".join(file.name for file in folder.glob("*ggml*"))
        gpus = tuple(device for device, part in GPU_LIBRARIES.items() if part in libraries)
        usable = tuple(device for device in gpus if _has_gpu(hardware, device))
        build = f"built for {', '.join(gpus)}" if gpus else "built for the CPU"
        reason = f"llama-cpp-python {version}, {build}"
        if compiler := miscompiled_amx(folder, hardware.cpu_features.value):
            reason += (
                f"; its AMX code was made by {compiler}, which breaks it (GCC bug 114098), so "
                "weights are not repacked and it is slower: build it anew by a newer compiler, or "
                f"with {WITHOUT_AMX}"
            )
        return found(True, reason, version, (*usable, "cpu"))

    def open(self, artifact: Artifact, options: RunOptions) -> LlamaCppSession:
        """A session on a GGUF file whose header was read and found sound first."""
        if artifact.container != "gguf":
            raise UnsupportedTarget(
                f"llama.cpp runs GGUF files, and {artifact.path} is {artifact.container}: "
                "choose --runtime onnxruntime"
            )
        hardware = detect()
        found = self.capabilities(hardware)
        device = limits.chosen_device(found, options.device)
        if options.kv_dtype not in (None, *KV_TYPES):
            raise UnsupportedTarget(
                f"llama.cpp keeps keys and values in {', '.join(KV_TYPES)} here, not in "
                f"{options.kv_dtype}: choose one of those, or leave the choice out"
            )
        if device == "cpu" and options.gpu_layers:
            raise UnsupportedTarget(
                f"{options.gpu_layers} layers on a GPU: this is the CPU ({found.reason}); leave "
                "--gpu-layers out, or choose --device"
            )
        # A damaged header makes llama.cpp stop the whole process, so it is read here first.
        from edgellm.source.gguf_file import read_gguf_model

        stored = read_gguf_model(artifact.main)
        repack = not miscompiled_amx(library_folder(), hardware.cpu_features.value)
        threads = options.threads or hardware.physical_cores.value
        rope = None
        if options.rope_scaling is not None:
            rope = rope_settings(stored, parse_scaling(options.rope_scaling))
        kv_by_layer = _kv_by_layer(stored, options, rope, artifact.main)
        layers = 0
        if device != "cpu":
            layers = _gpu_layers(stored, options, hardware, kv_by_layer)
        if layers != ALL_LAYERS:  # how much a GPU has left is known to its driver alone
            _check_kv_memory(kv_by_layer[: max(0, len(kv_by_layer) + 1 - layers)])
        return LlamaCppSession(
            load_library(),
            artifact,
            stored,
            options,
            device=device,
            gpu_layers=layers,
            threads=threads,
            repack=repack,
            rope=rope,
        )


def _kv_by_layer(
    stored: GgufFile, options: RunOptions, rope: RopeSettings | None, path: Path
) -> list[int]:
    """Bytes of keys and values in each layer, all of which are taken at once."""
    arch = stored.metadata["general.architecture"]
    reach = rope.context if rope else stored.metadata.get(f"{arch}.context_length")
    if not reach:
        return []  # llama.cpp will say that it is missing
    room = limits.context_tokens(options.context_tokens, reach, path)
    kind = NAMED[options.kv_dtype or DEFAULT_KV]
    return [room * nbytes for nbytes in kv_token_bytes(stored.metadata, kind)]


def _gpu_layers(
    stored: GgufFile, options: RunOptions, hardware: Hardware, kv_by_layer: Sequence[int]
) -> int:
    """How many layers go to the GPU: as many as asked for, or as fit where its memory is known."""
    if options.gpu_layers is not None:
        return options.gpu_layers
    known = [gpu.memory_bytes for gpu in hardware.gpus.value if gpu.memory_bytes]
    if not known or not kv_by_layer:
        return ALL_LAYERS
    return layers_that_fit(stored, kv_by_layer, max(known))


def _check_kv_memory(kv_by_layer: Sequence[int]) -> None:
    """Raise ``GenerationError`` where the keys and values of these layers do not fit."""
    limits.check_kv_memory(
        sum(kv_by_layer), free_memory_bytes(), "a smaller --context, or --kv-cache q8_0 or q4_0"
    )


class LlamaCppSession:
    """One llama.cpp model and context, holding one sequence."""

    runtime = "llamacpp"

    def __init__(
        self,
        library: Any,
        artifact: Artifact,
        stored: GgufFile,
        options: RunOptions,
        *,
        device: str,
        gpu_layers: int,
        threads: int,
        repack: bool,
        rope: RopeSettings | None,
    ) -> None:
        """Raises ``GenerationError`` with llama.cpp's own words when it cannot load the file.

        ``gpu_layers``: counted from the end, the output being the last; ``ALL_LAYERS`` for all.
        ``repack``: let llama.cpp lay weights out anew for this CPU, which is faster.
        """
        self._library = library
        self._watch = OperatorWatch(library) if options.trace else None
        self.device = device
        self.kv_dtype = options.kv_dtype or DEFAULT_KV
        kv_type = NAMED[self.kv_dtype]
        forget_log()
        model_options = library.llama_model_default_params()
        model_options.n_gpu_layers = gpu_layers
        model_options.use_extra_bufts = repack
        model = library.llama_model_load_from_file(os.fsencode(artifact.main), model_options)
        if not model:
            raise GenerationError(f"llama.cpp could not load {artifact.main}: {last_words()}")
        self._free: Any = weakref.finalize(self, library.llama_model_free, model)

        context_options = library.llama_context_default_params()
        reach = int(library.llama_model_n_ctx_train(model))
        if rope is not None:
            if library.llama_model_rope_type(model) == library.LLAMA_ROPE_TYPE_NONE:
                raise UnsupportedTarget(
                    f"{artifact.main.name} has no rotary positions, so its context cannot be "
                    "stretched: leave --rope-scaling out"
                )
            rope.set_in(context_options, library)
            reach = rope.context
        self.context_tokens = limits.context_tokens(options.context_tokens, reach, artifact.main)
        self.vocab_size = int(library.llama_vocab_n_tokens(library.llama_model_get_vocab(model)))

        context_options.n_ctx = self.context_tokens
        context_options.n_batch = context_options.n_ubatch = min(BATCH_TOKENS, self.context_tokens)
        context_options.n_outputs_max = min(OUTPUT_ROWS, self.context_tokens)
        context_options.n_threads = context_options.n_threads_batch = threads
        context_options.type_k = context_options.type_v = kv_type.number
        if self.kv_dtype in ROUNDED_KV:
            context_options.flash_attn_type = library.LLAMA_FLASH_ATTN_TYPE_ENABLED
        if self.kv_dtype == "f32":
            # Flash attention rounds to f16 on its way, whatever the cache holds.
            context_options.flash_attn_type = library.LLAMA_FLASH_ATTN_TYPE_DISABLED
        # A window's cache that forgets old tokens could not be trimmed back to them.
        context_options.swa_full = True
        context_options.no_perf = True
        if self._watch is not None:
            self._watch.set_in(context_options)
        context = library.llama_init_from_model(model, context_options)
        if not context:
            raise GenerationError(
                f"llama.cpp could not make a context of {self.context_tokens} tokens for "
                f"{artifact.main}: {last_words()}. A smaller --context takes less memory"
            )
        self._free.detach()
        self._free = weakref.finalize(self, _free, library, context, model)

        self._context = context
        self._memory = library.llama_get_memory(context)
        self._kv_token_bytes = sum(kv_token_bytes(stored.metadata, kv_type))
        # llama.cpp cannot cut states of layers (those of convolutions and scans): see checkpoints.
        stateful = library.llama_model_is_recurrent(model) or library.llama_model_is_hybrid(model)
        self._states = PartialStates(library, context) if stateful else None
        self._checkpoints = Checkpoints()
        self._tokens: list[int] = []
        # The first of them, which the cache holds; all where nothing is to catch up.
        self._held = 0
        self._unsure = False
        self._row_at: dict[int, Logits] = {}
        self._batch = Batch(library, int(context_options.n_batch))
        self._adapters = LlamaCppAdapters(library, model, stored)

    @property
    def tokens(self) -> Sequence[int]:
        return self._tokens

    def prefill(self, token_ids: Sequence[int], *, all_logits: bool = False) -> Logits:
        self._check_open()
        limits.check_tokens(token_ids, len(self._tokens), self.context_tokens, self.vocab_size)
        rows = np.empty((len(token_ids), self.vocab_size), np.float32) if all_logits else None
        self._compute(token_ids, rows)
        return self._row(-1)[np.newaxis] if rows is None else rows

    def decode(self, token_id: int) -> Logits:
        self._check_open()
        limits.check_tokens((token_id,), len(self._tokens), self.context_tokens, self.vocab_size)
        if self._states is not None:
            self._compute((token_id,))
            return self._row(-1)
        self._settle()
        self._evaluate((token_id,), outputs="last")
        self._tokens.append(token_id)
        self._unsure = False
        return self._row(-1)

    def trim(self, length: int) -> None:
        self._check_open()
        limits.check_trim(length, len(self._tokens))
        if length < len(self._tokens) or self._unsure:
            del self._tokens[length:]
            self._forget_rest()

    def save(self) -> KvState:
        self._check_open()
        self._settle()
        if self._held < len(self._tokens):
            self._compute(())
        size = self._library.llama_state_seq_get_size(self._context, 0)
        buffer = np.empty(size, np.uint8)
        target = bytes_of(buffer)
        written = self._library.llama_state_seq_get_data(self._context, target, size, 0)
        if written != size:
            raise GenerationError(
                f"llama.cpp saved {written} of {size} bytes of its KV cache: {last_words()}"
            )
        kept = self._checkpoints.copies() if self._states else ()
        return KvState(self.runtime, tuple(self._tokens), (buffer, *kept), self._adapters.applied)

    def restore(self, state: KvState) -> None:
        # llama.cpp restores keys and values but no logits: asking for those of the last token would
        # give stale numbers in silence. A session gives logits only for tokens that it has just
        # computed, so the ones that follow are right.
        self._check_open()
        limits.check_state(state, self.runtime, self.context_tokens, self._adapters.applied)
        buffer: npt.NDArray[np.uint8] = np.ascontiguousarray(state.data[0])
        source = bytes_of(buffer)
        if (len(state.data) == 3) != (self._states is not None):
            raise GenerationError("this cache is of another model: it cannot be restored here")
        self._tokens.clear()
        self._checkpoints = Checkpoints()
        self._unsure = True
        if state.tokens:
            read = self._library.llama_state_seq_set_data(self._context, source, buffer.size, 0)
            if read != buffer.size:
                self._forget_rest()
                raise GenerationError(
                    f"llama.cpp did not take the saved KV cache back: {last_words()}"
                )
        else:
            self._forget_rest()
        if self._states is not None:
            self._checkpoints.take(state.data[1:])
        self._tokens.extend(state.tokens)
        self._held = len(self._tokens)
        self._unsure = False

    @property
    def adapters(self) -> Sequence[AdapterFile]:
        return self._adapters.applied

    def set_adapters(self, adapters: Sequence[AdapterFile]) -> None:
        self._check_open()
        wanted = summed(adapters)
        if wanted == self._adapters.applied:
            return
        self._adapters.load(wanted)
        self.trim(0)
        self._adapters.apply(self._context, wanted)

    def kv_bytes(self) -> int:
        self._check_open()
        keys_and_values = int(self._library.llama_n_ctx(self._context)) * self._kv_token_bytes
        states = self._states.nbytes + self._checkpoints.nbytes if self._states else 0
        return keys_and_values + states

    def finish_trace(self) -> Sequence[TracedStep]:
        self._check_open()
        if self._watch is None:
            raise limits.untraced()
        self.close()
        return self._watch.steps

    def close(self) -> None:
        self._row_at.clear()
        self._free()

    def _check_open(self) -> None:
        if not self._free.alive:
            raise limits.closed()

    def _forget_rest(self) -> None:
        held = len(self._tokens)
        if self._states is not None:
            held, state = self._checkpoints.back_to(held)
            if state is not None:
                self._states.write(state)
        if not self._library.llama_memory_seq_rm(self._memory, 0, held, -1):
            self._library.llama_memory_clear(self._memory, False)
            self._tokens.clear()
            self._held = 0
            self._checkpoints = Checkpoints()
            raise GenerationError(
                "this model cannot forget a part of its context: start the chat over (/clear)"
            )
        self._held = held
        self._unsure = False

    def _settle(self) -> None:
        """Make the cache hold ``tokens`` alone, where an interruption left it in doubt."""
        if self._unsure:
            self._forget_rest()

    def _compute(self, token_ids: Sequence[int], rows: Logits | None = None) -> None:
        """Compute ``token_ids`` in steps; on any failure, Ctrl-C as well, keep none of them.

        Tokens that states have to catch up with go first; ``rows`` are of the others.
        """
        self._settle()
        size = self._batch.room if rows is None else min(OUTPUT_ROWS, self._batch.room)
        start = len(self._tokens)
        behind = start - self._held
        work = (*self._tokens[self._held :], *token_ids) if behind else token_ids
        try:
            self._checkpoint(behind == 0 and len(work) > 1)
            for places in steps_of(behind, len(work), size):
                step = work[places.start : places.stop]
                last = places.stop == len(work)
                self._evaluate(
                    step, outputs="all" if rows is not None else "last" if last else "none"
                )
                if rows is not None:
                    for offset in range(max(0, behind - places.start), len(step)):
                        rows[places.start + offset - behind] = self._row(offset)
                self._checkpoint(len(step) > 1)
        except BaseException:  # Ctrl-C as well: the cache goes back to where it was
            del self._tokens[start:]
            self._unsure = True
            raise
        self._tokens.extend(token_ids)
        self._unsure = False

    def _checkpoint(self, wanted: bool) -> None:
        """Keep what the states are now, where it is ``wanted`` or none was kept for long."""
        if self._states and self._held and (wanted or self._checkpoints.due(self._held)):
            self._checkpoints.keep(self._held, self._states.read())

    def _evaluate(self, token_ids: Sequence[int], *, outputs: str) -> None:
        """Compute ``token_ids`` behind what is held; the cache is unsure until they are noted."""
        self._unsure = True
        batch = self._batch.fill(token_ids, self._held, outputs)
        if self._watch is not None:
            self._watch.begin()
        status = self._library.llama_decode(self._context, batch)
        if self._watch is not None:
            self._watch.end(len(token_ids))
        if status != 0:
            self._forget_rest()
            cause = DECODE_FAILURES.get(status, f"status {status}")
            raise GenerationError(
                f"llama.cpp could not compute {len(token_ids)} tokens: {cause}. {last_words()}"
            )
        self._held += len(token_ids)

    def _row(self, index: int) -> Logits:
        """Logits ``[vocab]`` of one computed position, a view into llama.cpp's buffer."""
        pointer = self._library.llama_get_logits_ith(self._context, index)
        if not pointer:
            raise GenerationError(f"llama.cpp gave no logits: {last_words()}")
        address = ctypes.addressof(pointer.contents)
        row = self._row_at.get(address)
        if row is None:
            if len(self._row_at) > 2 * OUTPUT_ROWS:
                self._row_at.clear()
            memory: Any = (ctypes.c_float * self.vocab_size).from_address(address)
            row = self._row_at[address] = np.frombuffer(memory, np.float32)
        return row


def _free(library: Any, context: Any, model: Any) -> None:
    library.llama_free(context)
    library.llama_model_free(model)


def _has_gpu(hardware: Hardware, device: str) -> bool:
    if device == "metal":
        return hardware.apple_silicon.value
    vendors = {gpu.vendor for gpu in hardware.gpus.value}
    return "NVIDIA" in vendors if device == "cuda" else bool(vendors)
