"""MLX on Apple Silicon, and by the same code on Linux: folders of the ``mlx`` container.

The models are mlx-lm's. On a CPU they compute in float32, whatever the folder holds: MLX has no
quick halves there (SmolLM2 took 34 times as long in f16), and the values are then exactly those
that were solved. mlx-lm's caches of sliding windows forget what they cannot be trimmed back to, so
every layer has one that keeps all, and the window is a mask alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from edgellm.artifact import Artifact
from edgellm.errors import GenerationError, UnsupportedTarget
from edgellm.hardware import Hardware, detect, free_memory_bytes
from edgellm.manifest import ModelFacts
from edgellm.runtimes import limits
from edgellm.runtimes.session import Capabilities, KvState, Logits, RunOptions
from edgellm.runtimes.stepped import SteppedSession
from edgellm.runtimes.versions import installed_version, version_numbers

INSTALL = "pip install 'edgellm[mlx]'"

OLDEST = (0, 32, 0)
"""Of mlx-lm: where the state of a cache came to hold its length."""

BACKENDS = {"mlx-metal": "metal", "mlx-cuda-13": "cuda", "mlx-cuda-12": "cuda", "mlx-cpu": "cpu"}
"""Packages that mlx computes with, and the device that each brings."""

FLOATS = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
FLOAT_BYTES = {"f32": 4, "f16": 2, "bf16": 2}
KV_BITS = {"int8": 8, "int4": 4}
KV_GROUPS = (64, 32)
"""Values of a key that share a scale in a quantized cache: the first that divides a head."""

UNTRACED = "mlx computes whole graphs at once and tells nobody what an operator took"

GROWS_BY = 256
"""Tokens that mlx-lm's caches make room for at once."""

ERRORS = (RuntimeError, ValueError, KeyError, TypeError, OSError, MemoryError)
"""What mlx and mlx-lm raise as they load, which have no exceptions of their own."""

COMPUTE_ERRORS = (RuntimeError, ValueError, MemoryError)


class MlxRuntime:
    """Opens folders of the ``mlx`` container with mlx-lm."""

    name = "mlx"

    def capabilities(self, hardware: Hardware) -> Capabilities:
        """What the installed packages can do; none is imported."""
        version, devices = installed_version("mlx-lm"), _devices(hardware)
        refusal = _refusal(version, devices)
        return Capabilities(
            runtime=self.name,
            available=not refusal,
            reason=refusal or f"mlx-lm {version} on mlx {installed_version('mlx')}",
            version=version,
            install=INSTALL,
            containers=frozenset({"mlx"}),
            devices=() if refusal else devices,
            possible_devices=tuple(dict.fromkeys(BACKENDS.values())),
            kv_dtypes=(*FLOATS.values(), *KV_BITS),
            speed_rank=15 if "metal" in devices else 30,
            sets_threads=False,
            quick=devices != ("cpu",),
            tracing=UNTRACED,
        )

    def open(self, artifact: Artifact, options: RunOptions) -> MlxSession:
        """A session on a folder that edgellm made; the manifest says what its context is."""
        if artifact.container != "mlx" or artifact.manifest is None:
            raise UnsupportedTarget(
                f"mlx runs folders made with --format mlx, and {artifact.path} is "
                f"{artifact.container}: choose another --runtime, or convert it with --format mlx"
            )
        if options.trace:
            raise UnsupportedTarget(f"{UNTRACED}: measure its tokens whole")
        device = limits.chosen_device(self.capabilities(detect()), options.device)
        return MlxSession(artifact, options, device)


class MlxSession(SteppedSession):
    """One model of mlx-lm and the caches of one sequence."""

    runtime = "mlx"

    def __init__(self, artifact: Artifact, options: RunOptions, device: str) -> None:
        """Raises ``GenerationError`` with mlx's own words when it cannot load the folder."""
        import mlx.core as mx
        from mlx_lm.utils import load_model

        super().__init__()
        assert artifact.manifest is not None
        facts = artifact.manifest.artifact.model
        self.device = device
        self.context_tokens = limits.context_tokens(
            options.context_tokens, facts.context_length, artifact.path
        )
        self.vocab_size = facts.vocab_size
        self._mx = mx
        self._where = mx.Device(mx.cpu if device == "cpu" else mx.gpu)
        try:
            with mx.stream(self._where):
                self._model, config = load_model(artifact.main.parent)
                if device == "cpu":
                    self._model.set_dtype(mx.float32)
        except ERRORS as error:
            said = limits.explained(error, self.device)
            raise GenerationError(
                f"mlx could not load {artifact.path}: {said}. Check the "
                "artifact with `edgellm verify`"
            ) from error
        kept = "f32" if device == "cpu" else FLOATS[config["dtype"]]
        self.kv_dtype = options.kv_dtype or kept
        self._caches = _caches(len(self._model.layers), facts.head_dim, self.kv_dtype, kept)
        self._token_bytes = kv_token_bytes(facts, self.kv_dtype, kept)

    def save(self) -> KvState:
        self._check_open()
        used = len(self._tokens)
        arrays = [array for cache in self._caches for array in _arrays(cache)] if used else []
        with self._mx.stream(self._where):
            copies = tuple(self._to_numpy(array[..., :used, :]) for array in arrays)
        return KvState(self.runtime, tuple(self._tokens), copies)

    def restore(self, state: KvState) -> None:
        self._check_open()
        limits.check_state(state, self.runtime, self.context_tokens)
        used = len(state.tokens)
        if used:
            likes = self._arrays_of_caches()
            if _kinds(state.data) != _kinds([self._to_numpy(array) for array in likes]):
                raise GenerationError("this cache is of another model: it cannot be restored here")
        self._keep(0)
        each = len(state.data) // len(self._caches)
        for place, cache in enumerate(self._caches if used else ()):
            of_cache = slice(place * each, (place + 1) * each)
            copies = list(map(self._from_numpy, state.data[of_cache], likes[of_cache]))
            cache.keys = copies[0] if each == 2 else copies[: each // 2]
            cache.values = copies[1] if each == 2 else copies[each // 2 :]
            cache.offset = used
        self._tokens = list(state.tokens)

    def kv_bytes(self) -> int:
        self._check_open()
        return sum(array.nbytes for cache in self._caches for array in _arrays(cache))

    def close(self) -> None:
        self._closed = True
        self._model = None
        self._caches, self._tokens = [], []
        self._mx.clear_cache()

    def _compute(self, token_ids: Sequence[int], outputs: int) -> Logits | None:
        mx = self._mx
        self._check_memory(len(token_ids))
        # What nobody looks at goes through the layers only, not through the head.
        unseen = len(token_ids) - outputs
        try:
            with mx.stream(self._where):
                if unseen:
                    self._model(mx.array([token_ids[:unseen]]), cache=self._caches)
                    mx.eval([_arrays(cache) for cache in self._caches])
                if not outputs:
                    return None
                logits = self._model(mx.array([token_ids[unseen:]]), cache=self._caches)
                found: Logits = np.array(logits[0].astype(mx.float32))
        except COMPUTE_ERRORS as error:
            said = limits.explained(error, self.device)
            raise GenerationError(
                f"mlx could not compute {len(token_ids)} tokens: {said}"
            ) from error
        return found

    def _check_memory(self, count: int) -> None:
        """Raise ``GenerationError`` where the caches would grow beyond what is free."""
        if self.device == "cuda":
            return  # how much it has left is known to its driver alone
        needed = -(-(len(self._tokens) + count) // GROWS_BY) * GROWS_BY * self._token_bytes
        if needed > self.kv_bytes():
            smaller = "a smaller --context, or --kv-cache int8 or int4"
            limits.check_kv_memory(needed, free_memory_bytes(), smaller)

    def _forget(self, length: int) -> None:
        for cache in self._caches:
            cache.trim(max(0, cache.offset - length))

    def _to_numpy(self, array: Any) -> npt.NDArray[Any]:
        """A copy; numbers of bf16, which numpy lacks, as whole ones."""
        mx = self._mx
        return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)

    def _from_numpy(self, array: npt.NDArray[Any], like: Any) -> Any:
        return self._mx.array(array).view(like.dtype)

    def _arrays_of_caches(self) -> list[Any]:
        """Keys and values of all layers; of one token where nothing was held yet."""
        if self._caches[0].keys is None:
            self._compute((0,), 0)
            self._forget(0)
        return [array[..., :1, :] for cache in self._caches for array in _arrays(cache)]


def kv_token_bytes(facts: ModelFacts, kv_dtype: str, kept: str) -> int:
    """Bytes of one token's keys and values in all layers; ``kept``: the type of their scales."""
    values = 2 * facts.layer_count * facts.kv_head_count * facts.head_dim
    if kv_dtype not in KV_BITS:
        return values * FLOAT_BYTES[kv_dtype]
    group = next(group for group in KV_GROUPS if not facts.head_dim % group)
    return values * KV_BITS[kv_dtype] // 8 + 2 * values // group * FLOAT_BYTES[kept]


def _caches(layers: int, head_dim: int, kv_dtype: str, kept: str) -> list[Any]:
    """One for each layer, all of whose tokens stay.

    Raises ``UnsupportedTarget`` for a type that the model's caches cannot have.
    """
    from mlx_lm.models.cache import KVCache, QuantizedKVCache

    if kv_dtype == kept:
        return [KVCache() for _ in range(layers)]
    if kv_dtype not in KV_BITS:
        raise UnsupportedTarget(
            f"mlx keeps keys and values in the type that the model computes in, {kept} here, or in "
            f"{' or '.join(KV_BITS)}, not in {kv_dtype}: choose one of those, or leave it out"
        )
    group = next((group for group in KV_GROUPS if not head_dim % group), None)
    if group is None:
        raise UnsupportedTarget(
            f"keys and values in {kv_dtype} have scales by {' or '.join(map(str, KV_GROUPS))} "
            f"values, which do not divide this model's heads of {head_dim}: leave the choice out"
        )
    return [QuantizedKVCache(group_size=group, bits=KV_BITS[kv_dtype]) for _ in range(layers)]


def _arrays(cache: Any) -> list[Any]:
    """All arrays of a cache: none before the first token, six where it is quantized, else two."""
    if cache.keys is None:
        return []
    if isinstance(cache.keys, (list, tuple)):
        return [*cache.keys, *cache.values]
    return [cache.keys, cache.values]


def _kinds(arrays: Sequence[npt.NDArray[Any]]) -> list[Any]:
    """What caches of one model share: the types, the heads and their width."""
    return [(array.dtype, array.shape[1], array.shape[3]) for array in arrays]


def _refusal(version: str, devices: tuple[str, ...]) -> str:
    """Why nothing can be opened, with the next step; empty where it can."""
    if not version or not installed_version("mlx"):
        return f"mlx and mlx-lm are not installed: {INSTALL}"
    if version_numbers(version) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        return f"mlx-lm {version} is older than {oldest}: {INSTALL} --upgrade"
    if not devices:
        return f"mlx lacks what it computes with ({' or '.join(BACKENDS)}): {INSTALL}"
    return ""


def _devices(hardware: Hardware) -> tuple[str, ...]:
    """What can be computed on, the fastest first; Metal's package brings the CPU's code too."""
    found = [device for package, device in BACKENDS.items() if installed_version(package)]
    if "metal" in found and not hardware.apple_silicon.value:
        found.remove("metal")
    if "cuda" in found and not any(gpu.vendor == "NVIDIA" for gpu in hardware.gpus.value):
        found.remove("cuda")
    gpus = [device for device in dict.fromkeys(found) if device != "cpu"]
    return (*gpus, "cpu") if found else ()
