"""transformers on torch: Hugging Face folders, on a CPU, CUDA or Apple's Metal (torch's ``mps``).

Folders of floats are loaded by transformers. Quantized ones (GPTQ, AWQ, bitsandbytes,
compressed-tensors) are computed with the values that their codes stand for, read by edgellm, so
that no kernel library is needed; they take the memory of floats. On a CPU all compute in float32.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgellm.artifact import Artifact
from edgellm.errors import GenerationError, SourceError, UnsupportedTarget
from edgellm.hardware import Hardware, detect
from edgellm.json_file import read_json
from edgellm.runtimes import limits
from edgellm.runtimes.openmp import short_spin
from edgellm.runtimes.operators import TracedStep
from edgellm.runtimes.quiet_transformers import quiet
from edgellm.runtimes.session import Capabilities, KvState, Logits, RunOptions
from edgellm.runtimes.stepped import SteppedSession
from edgellm.runtimes.versions import installed_version, version_numbers
from edgellm.source.matching import listed

if TYPE_CHECKING:
    from edgellm.runtimes.torch_operators import OperatorWatch

INSTALL = "pip install 'edgellm[torch]'"

OLDEST = (5, 0, 0)
"""Of transformers: where caches came to consist of layers."""

DEVICES = {"cuda": "cuda", "metal": "mps", "cpu": "cpu"}
"""Our devices as torch names them."""

KV_TYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
ROUNDED_KV = ("int8", "int4")
"""What keys and values may be rounded to; they are taken back layer by layer for attention."""

ERRORS = (RuntimeError, ValueError, KeyError, TypeError, OSError, ImportError, AttributeError)
"""What torch and transformers raise as they load, which have no exceptions of their own."""

CLOCK = "torch's functions as Python calls them, one by one"
"""Whose time a traced session tells (``torch_operators``)."""

COMPUTE_ERRORS = (RuntimeError, ValueError, MemoryError)


class TorchRuntime:
    """Opens Hugging Face folders with transformers."""

    name = "torch"

    def capabilities(self, hardware: Hardware) -> Capabilities:
        """What the installed packages can do; none is imported."""
        torch, transformers = installed_version("torch"), installed_version("transformers")
        refusal = ""
        if not torch or not transformers:
            refusal = f"torch and transformers are not installed: {INSTALL}"
        elif version_numbers(transformers) < OLDEST:
            oldest = ".".join(map(str, OLDEST))
            refusal = f"transformers {transformers} is older than {oldest}: {INSTALL} --upgrade"
        nvidia = any(gpu.vendor == "NVIDIA" for gpu in hardware.gpus.value)
        found = {
            "cuda": nvidia and not torch.endswith("+cpu"),
            "metal": hardware.apple_silicon.value,
            "cpu": True,
        }
        return Capabilities(
            runtime=self.name,
            available=not refusal,
            reason=refusal or f"transformers {transformers} on torch {torch}",
            version=transformers,
            install=INSTALL,
            containers=frozenset({"hf"}),
            devices=() if refusal else tuple(device for device in found if found[device]),
            possible_devices=tuple(DEVICES),
            kv_dtypes=(*KV_TYPES.values(), *ROUNDED_KV),
            speed_rank=40,
            scales_rope=True,
            traces_operators=True,
            tracing=CLOCK,
        )

    def open(self, artifact: Artifact, options: RunOptions) -> TorchSession:
        """A session on a Hugging Face folder, whoever made it."""
        if artifact.container != "hf":
            raise UnsupportedTarget(
                f"torch runs Hugging Face folders, and {artifact.path} is {artifact.container}: "
                "choose another --runtime, or convert it with --format hf"
            )
        hardware = detect()
        device = limits.chosen_device(self.capabilities(hardware), options.device)
        threads = options.threads or hardware.physical_cores.value
        return TorchSession(artifact, options, device=device, threads=threads)


class TorchSession(SteppedSession):
    """One model of transformers and the cache of one sequence."""

    runtime = "torch"

    def __init__(
        self, artifact: Artifact, options: RunOptions, *, device: str, threads: int
    ) -> None:
        """Raises ``GenerationError`` with transformers' own words when it cannot load the folder.

        ``threads`` are torch's, which all of its sessions in a process share.
        """
        with short_spin():
            import torch

        from edgellm.runtimes.torch_cache import check_layers, growing_cache

        super().__init__()
        self.device = device
        self._torch = torch
        if device == "cuda" and not torch.cuda.is_available():
            raise UnsupportedTarget(
                f"this torch ({torch.__version__}) finds no CUDA device: install the build for "
                "your driver (pytorch.org), or choose --device cpu"
            )
        torch.set_num_threads(threads)
        folder = artifact.main.parent
        try:
            with quiet():
                dtype = None if device == "cpu" else "auto"
                self._model: Any = _load(folder, dtype, options.rope_scaling)
            self._model.to(DEVICES[device]).eval()
        except ERRORS as error:
            said = limits.explained(error, self.device)
            raise GenerationError(f"transformers could not load {folder}: {said}") from error
        kept = KV_TYPES[str(self._model.dtype).removeprefix("torch.")]
        if options.kv_dtype not in (None, kept, *ROUNDED_KV):
            raise UnsupportedTarget(
                f"torch keeps keys and values in the type that the model computes in, {kept} here, "
                f"or in {' or '.join(ROUNDED_KV)}, not in {options.kv_dtype}: choose one of those, "
                "or leave the choice out"
            )
        self.kv_dtype = options.kv_dtype or kept
        config = self._model.config
        check_layers(config)
        self.context_tokens = limits.context_tokens(
            options.context_tokens, _reach(config, artifact.path), artifact.path
        )
        self.vocab_size = int(config.vocab_size)
        self._cache: Any = growing_cache(config, self.context_tokens, self.kv_dtype)
        self._keeps = "logits_to_keep" in inspect.signature(self._model.forward).parameters
        self._watch: OperatorWatch | None = None
        if options.trace:
            from edgellm.runtimes.torch_operators import OperatorWatch

            self._watch = OperatorWatch(self._model, DEVICES[device])

    def save(self) -> KvState:
        self._check_open()
        held = [each for layer in self._cache.layers for each in layer.held()]
        copies = tuple(map(self._to_numpy, held)) if self._tokens else ()
        return KvState(self.runtime, tuple(self._tokens), copies)

    def restore(self, state: KvState) -> None:
        self._check_open()
        limits.check_state(state, self.runtime, self.context_tokens)
        used = len(state.tokens)
        if used:
            self._check_kind(state.data)
        self._keep(0)
        with self._torch.inference_mode():
            copies = iter(state.data)
            for layer in self._cache.layers if used else ():
                layer.append(tuple(self._from_numpy(next(copies), each) for each in layer.buffers))
        self._tokens = list(state.tokens)

    def kv_bytes(self) -> int:
        self._check_open()
        return sum(each.nbytes for layer in self._cache.layers for each in layer.buffers)

    def finish_trace(self) -> Sequence[TracedStep]:
        self._check_open()
        if self._watch is None:
            raise limits.untraced()
        self.close()
        return self._watch.steps

    def close(self) -> None:
        self._closed = True
        self._model = self._cache = None
        self._tokens = []

    def _compute(self, token_ids: Sequence[int], outputs: int) -> Logits | None:
        torch = self._torch
        outputs = max(outputs, 1)  # none would mean all, to transformers
        kept = {"logits_to_keep": outputs} if self._keeps else {}
        try:
            watched = self._watch.step(len(token_ids)) if self._watch else nullcontext()
            with torch.inference_mode(), watched:
                ids = torch.tensor([list(token_ids)], device=self._model.device)
                found = self._model(ids, past_key_values=self._cache, use_cache=True, **kept)
                logits: Logits = found.logits[0, -outputs:].float().cpu().numpy()
        except COMPUTE_ERRORS as error:
            said = limits.explained(error, self.device)
            raise GenerationError(
                f"torch could not compute {len(token_ids)} tokens: {said}"
            ) from error
        return logits

    def _forget(self, length: int) -> None:
        for layer in self._cache.layers:
            layer.used = min(layer.used, length)

    def _to_numpy(self, tensor: Any) -> npt.NDArray[Any]:
        """A copy; numbers of bf16, which numpy lacks, as whole ones."""
        torch = self._torch
        whole = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
        copy: npt.NDArray[Any] = whole.cpu().numpy().copy()
        return copy

    def _from_numpy(self, array: npt.NDArray[Any], like: Any) -> Any:
        tensor = self._torch.from_numpy(np.ascontiguousarray(array))
        return tensor.view(like.dtype).to(self._model.device)

    def _check_kind(self, data: Sequence[npt.NDArray[Any]]) -> None:
        """Raise ``GenerationError`` where saved keys and values are another model's."""
        if not self._cache.layers[0].buffers:
            self._compute((0,), 0)
            self._forget(0)
        layers = self._cache.layers
        likes = [self._to_numpy(each[:, :, :1]) for layer in layers for each in layer.buffers]
        kinds = [
            [(each.dtype, each.shape[1], each.shape[3]) for each in arrays]
            for arrays in (data, likes)
        ]
        if kinds[0] != kinds[1]:
            raise GenerationError("this cache is of another model: it cannot be restored here")


def _load(folder: Path, dtype: str | None, rope_scaling: str | None) -> Any:
    """The model of ``folder``, in float32 or, with ``auto``, as its floats are stored."""
    import torch
    import transformers

    from edgellm.source.checkpoint import read_checkpoint

    read_checkpoint(folder)  # damaged files are found here, and said in our words
    config = read_json(folder / "config.json")
    if "quantization_config" in config:
        model, found = _with_values(folder, dtype, rope_scaling)
    else:
        load: Any = transformers.AutoModelForCausalLM.from_pretrained
        model, found = load(
            folder,
            config=_config(folder, rope_scaling),
            dtype=dtype or torch.float32,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,  # nor asked whether
            output_loading_info=True,
        )
    lost = sorted({*found["missing_keys"], *map(str, found["mismatched_keys"])})
    if lost:
        raise SourceError(
            f"{folder} lacks {len(lost)} weights of a {config.get('model_type')} model, which "
            f"transformers would draw at random: {listed(lost)}; fetch it again"
        )
    return model


def _config(folder: Path, rope_scaling: str | None) -> Any:
    """What transformers makes of the config of ``folder``, or of one with another rope."""
    import transformers

    from edgellm.source import open_source

    if rope_scaling is None:
        return transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    config = open_source(str(folder), quantized=True, rope_scaling=rope_scaling).config
    return transformers.AutoConfig.for_model(**config)


def _reach(config: Any, folder: Path) -> int:
    """The tokens that a model reaches, which ALiBi's configs have no key of that name for."""
    from edgellm.source import open_source

    stated = getattr(config, "max_position_embeddings", None)
    return int(stated or open_source(str(folder), quantized=True).decoder.context_length)


def _with_values(folder: Path, dtype: str | None, rope_scaling: str | None) -> tuple[Any, Any]:
    """The model of a quantized folder, with the values that its codes stand for."""
    import torch
    import transformers

    from edgellm.architectures.row_order import as_checkpoint_has
    from edgellm.source import open_source
    from edgellm.tensors import transposed

    source = open_source(str(folder), quantized=True)
    floats = {stored: name for name, stored in KV_TYPES.items()}
    embedding = source.tensors["token_embd.weight"].dtype
    kind = getattr(torch, floats.get(embedding, "float16") if dtype else "float32")
    values: dict[str, Any] = {}
    for row in source.family.tensors(source.decoder):
        ref = source.tensors.get(row.role)
        if ref is not None:
            ref = as_checkpoint_has(ref, row)
            ref = transposed(ref) if row.transposed else ref
            whole = torch.from_numpy(ref.load()).reshape(ref.shape).to(kind)
            if row.pieces:
                values |= zip(row.pieces, whole, strict=True)
            else:
                values[row.source] = whole
    config = _config(folder, rope_scaling)
    config.quantization_config = None
    config.tie_word_embeddings = source.decoder.tied_head
    family = getattr(transformers, source.family.architecture)
    made: tuple[Any, Any] = family.from_pretrained(
        None, config=config, state_dict=values, dtype=kind, output_loading_info=True
    )
    return made
