"""A model's own Python, loaded by transformers; only for those who said that they trust it."""

from __future__ import annotations

from typing import Any, Final

from edgellm.errors import RuntimeMissing, SourceError
from edgellm.remote.finding import AUTO_MAP, MODEL, OPTION, TOKENIZER, RemoteCode
from edgellm.runtimes.quiet_transformers import quiet

INSTALL: Final = "pip install 'edgellm[torch]'"

LOADING_ERRORS: Final = (
    RuntimeError, ValueError, KeyError, TypeError, OSError, ImportError, AttributeError, NameError,
    SyntaxError, NotImplementedError, IndexError, AssertionError,
)  # fmt: skip
"""What transformers and the code of strangers raise as they load."""


def load_tokenizer(code: RemoteCode) -> Any:
    """The tokenizer that the code makes of its folder.

    Raises ``RuntimeMissing`` without transformers and ``SourceError`` where it does not load here.
    """
    transformers = _transformers()
    return _loaded(code, TOKENIZER, lambda: transformers.AutoTokenizer, {})


def load_model(code: RemoteCode) -> Any:
    """The model that the code makes of its folder, in float32 on the CPU; raises likewise."""
    transformers = _transformers()
    import torch

    settings = {"dtype": torch.float32, "use_safetensors": True}
    return _loaded(code, MODEL, lambda: transformers.AutoModelForCausalLM, settings).eval()


def _loaded(code: RemoteCode, kind: str, loader: Any, settings: dict[str, Any]) -> Any:
    if code.elsewhere:
        raise SourceError(
            f"{code.folder} names Python in other repositories ({', '.join(code.elsewhere)}), "
            f"which are not fetched: put their files beside it and name them in {AUTO_MAP}"
        )
    code.digests()  # what is not there is said before anything runs
    try:
        with quiet():
            return loader().from_pretrained(
                code.folder, trust_remote_code=True, local_files_only=True, **settings
            )
    except LOADING_ERRORS as error:
        said = " ".join(str(error).split())[:300]
        raise SourceError(
            f"{code.classes[kind]}, the model's own Python, does not load here "
            f"({type(error).__name__}: {said}): install what it needs, or leave {OPTION} out"
        ) from error


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise RuntimeMissing(
            f"{OPTION} runs a model's own Python by transformers, which is not installed: {INSTALL}"
        ) from error
    return transformers
