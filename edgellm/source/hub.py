"""Models from the Hugging Face Hub, through ``huggingface_hub``'s cache: only the files needed.

``HF_HOME``, ``HF_TOKEN``, ``HF_ENDPOINT`` and ``HF_HUB_OFFLINE`` count as in every other program.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import TracebackType
from typing import Any

from edgellm.errors import AdapterError, HubError, SourceError
from edgellm.lora.base.training_evidence import is_settings_file
from edgellm.progress import Progress, ProgressEvent
from edgellm.source.checkpoint import INDEX, SINGLE
from edgellm.source.gguf_file import SPLIT_NAME
from edgellm.source.matching import listed
from edgellm.source.pickles import PICKLES
from edgellm.tokenization.from_hf import TEMPLATE_FOLDER

HUB_ID = re.compile(
    r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^:@\s]+))?(?::(?P<file>[^:\s]+\.gguf))?"
)
SMALL_FILES = frozenset(
    {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "tokenizer.model",
        "chat_template.jinja",
        "chat_template.json",
        "README.md",
        # Of encoders, and what sentence-transformers does around them.
        "vocab.txt",
        "modules.json",
        "config_sentence_transformers.json",
    }
)
SENTENCE_FILES = re.compile(
    r"sentence_[\w-]+_config\.json|\d+_[A-Za-z]+/config\.json|\d+_Dense/model\.safetensors"
)
SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True, slots=True)
class HubId:
    """A model on the Hub: ``repo`` is ``org/name``, ``file`` a GGUF in it, if one was named."""

    repo: str
    revision: str | None = None
    file: str | None = None

    @property
    def url(self) -> str:
        """Its page, whatever mirror it is fetched from."""
        return f"https://huggingface.co/{self.repo}"


Needed = Callable[[HubId, Collection[str]], list[str]]


@dataclass(frozen=True, slots=True)
class Download:
    """What is on disk now: ``path`` is a folder or a GGUF file, ``revision`` the full commit."""

    path: Path
    revision: str
    licence: str = ""
    notes: tuple[str, ...] = ()


def parse_hub_id(text: str) -> HubId | None:
    """``org/name[@revision][:file.gguf]`` as a ``HubId``, or None for anything else."""
    found = HUB_ID.fullmatch(text)
    return HubId(found["repo"], found["revision"], found["file"]) if found else None


def download(wanted: HubId, progress: Progress, *, needed: Needed | None = None) -> Download:
    """The model's files, from the cache where they are there already.

    ``needed`` chooses among the names in the repository; None for ``needed_files``, a model's.
    When the Hub cannot be reached, or must not be (``HF_HUB_OFFLINE``), the cached snapshot is
    taken, with a note. Raises ``HubError`` with the next step, ``SourceError`` for a repository
    that holds nothing safe to read.
    """
    from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        with _translated(wanted):
            info = HfApi().model_info(wanted.repo, revision=wanted.revision, files_metadata=True)
    except HubError as error:
        cause = error.__cause__
        if not isinstance(cause, OfflineModeIsEnabled) and not _unreachable(cause):
            raise
        return _cached(wanted, error)
    sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or []}
    names = (needed or needed_files)(wanted, sizes)
    absent = [
        name
        for name in names
        if not isinstance(try_to_load_from_cache(wanted.repo, name, revision=info.sha), str)
    ]
    bar = _bar(wanted.repo, sum(sizes[name] for name in absent), progress)
    with _translated(wanted):
        folder = Path(
            snapshot_download(
                wanted.repo, revision=wanted.revision, allow_patterns=names, tqdm_class=bar
            )
        )
    card = info.card_data
    licence = str(card.get("license") or "") if card else ""
    return Download(folder / (wanted.file or ""), folder.name, licence)


def needed_files(wanted: HubId, names: Collection[str]) -> list[str]:
    """Of the ``names`` in a repository, those that a conversion reads.

    Raises ``HubError`` when a GGUF must be named or is not there, ``SourceError`` for pickles
    alone.
    """
    ggufs = sorted(name for name in names if name.endswith(".gguf"))
    if wanted.file is not None:
        if wanted.file not in names:
            near = get_close_matches(wanted.file, ggufs, cutoff=0.3) or ggufs
            raise HubError(
                f"{wanted.repo} has no {wanted.file}; it has {listed(near) or 'no GGUF at all'}"
            )
        return _with_other_parts(wanted.file, names)
    weights = [name for name in names if name.endswith(".safetensors") and "/" not in name]
    if INDEX in names:
        chosen = [name for name in weights if SHARD.fullmatch(name)] or weights
        chosen.append(INDEX)
    else:
        chosen = [SINGLE] if SINGLE in names else weights
    if chosen:
        templates = [name for name in names if name.startswith(f"{TEMPLATE_FOLDER}/")]
        around = [name for name in names if SENTENCE_FILES.fullmatch(name)]
        return sorted([*chosen, *templates, *around, *SMALL_FILES.intersection(names)])
    if ggufs:
        raise HubError(
            f"{wanted.repo} holds {len(ggufs)} GGUF files: name one, such as "
            f"{wanted.repo}:{ggufs[0]} ({listed(ggufs)})"
        )
    pickles = [name for name in names if name.endswith(PICKLES)]
    if pickles:
        raise SourceError(
            f"{wanted.repo} holds pickles only ({listed(pickles)}), which can run any code when "
            "they are read, so edgellm does not fetch them. Look for a revision with safetensors "
            f"at {wanted.url}/discussions and name it ({wanted.repo}@refs/pr/1), or, where you "
            "trust it, save it again with transformers: "
            "AutoModelForCausalLM.from_pretrained(id).save_pretrained(folder)"
        )
    raise HubError(
        f"{wanted.repo} holds no weights (no safetensors, no GGUF): check the name at {wanted.url}"
    )


def needed_adapter_files(wanted: HubId, names: Collection[str]) -> list[str]:
    """Of the ``names`` in a repository, those of the adapter in it.

    Raises ``AdapterError`` for a repository that holds none, or only a pickle; ``HubError`` as
    ``needed_files`` does for a GGUF file that was named.
    """
    if wanted.file is not None:
        return needed_files(wanted, names)
    wants = [ADAPTER_CONFIG, ADAPTER_WEIGHTS]
    missing = [name for name in wants if name not in names]
    if not missing:
        templates = [name for name in names if name.startswith(f"{TEMPLATE_FOLDER}/")]
        small = SMALL_FILES.intersection(names) - {"config.json", "generation_config.json"}
        # Settings of its training, which may say that the base was quantized.
        settings = [name for name in names if is_settings_file(name)]
        return sorted([*wants, *templates, *small, *settings])
    pickles = [name for name in names if name.endswith(PICKLES) and name.startswith("adapter")]
    if pickles and ADAPTER_CONFIG in names:
        raise AdapterError(
            f"{wanted.repo} holds its adapter as a pickle ({listed(pickles)}), which can run any "
            "code when it is read, so edgellm does not fetch it. Look for a revision with "
            f"safetensors at {wanted.url}/discussions and name it ({wanted.repo}@refs/pr/1), or, "
            "where you trust it, save it again with PEFT: PeftModel.from_pretrained(base, id)"
            ".save_pretrained(folder, safe_serialization=True)"
        )
    ggufs = sorted(name for name in names if name.endswith(".gguf"))
    if ggufs:
        raise AdapterError(
            f"{wanted.repo} holds GGUF files: where one of them is the adapter, name it, such as "
            f"{wanted.repo}:{ggufs[0]} ({listed(ggufs)})"
        )
    raise AdapterError(
        f"{wanted.repo} is no adapter that PEFT saved: it has no {' and no '.join(missing)}; check "
        f"the name at {wanted.url}"
    )


def _with_other_parts(file: str, names: Collection[str]) -> list[str]:
    """``file`` and, when it is one part of a split GGUF, the other parts."""
    part = SPLIT_NAME.fullmatch(file)
    if not part:
        return [file]
    ending = f"-of-{part['count']}.gguf"
    return sorted(
        name for name in names if name.startswith(part["stem"] + "-") and name.endswith(ending)
    )


def _cached(wanted: HubId, error: HubError) -> Download:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(
            snapshot_download(wanted.repo, revision=wanted.revision, local_files_only=True)
        )
    except LocalEntryNotFoundError:
        raise error from error.__cause__
    path = folder / (wanted.file or "")
    if not path.exists():
        raise HubError(
            f"{wanted.file} of {wanted.repo} is not in the cache, and {error}"
        ) from error
    note = f"the Hub was not asked for a newer {wanted.repo}: taken from the cache"
    return Download(path, folder.name, notes=(note,))


def _unreachable(error: BaseException | None) -> bool:
    """Whether the connection failed, as opposed to an answer that says no."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code >= 500
    return not isinstance(error, HFValidationError)


@contextmanager
def _translated(wanted: HubId) -> Iterator[None]:
    """What ``huggingface_hub`` raises, as ``HubError`` with the next step."""
    from huggingface_hub import errors

    # The first base is the HTTP library's own root of errors (httpx's, whose name has changed
    # between versions); an OSError is a broken connection or a full disk.
    failures: tuple[type[BaseException], ...] = (
        errors.HfHubHTTPError.__bases__[0],
        OSError,
        errors.HFValidationError,
    )
    at = f"revision {wanted.revision} of {wanted.repo}" if wanted.revision else wanted.repo
    try:
        yield
    except errors.GatedRepoError as error:
        raise HubError(
            f"{wanted.repo} is gated: accept its terms at {wanted.url}, then run `hf auth login` "
            "or set HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"neither a file or folder {wanted.repo} here nor a model of that name on the Hub: "
            f"check the spelling at {wanted.url}; if it is private, run `hf auth login` or set "
            "HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(
            f"the Hub has no {at}: see {wanted.url}/commits for those there are"
        ) from error
    except errors.OfflineModeIsEnabled as error:
        raise HubError(
            f"{at} is not in the cache and HF_HUB_OFFLINE forbids to fetch it: unset "
            "HF_HUB_OFFLINE, or give a folder"
        ) from error
    except failures as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise HubError(
            f"{at} could not be fetched from the Hub ({reason}): check the connection and run the "
            "same command again; what has arrived is kept"
        ) from error


def _bar(repo: str, total_bytes: int, progress: Progress) -> Any:
    """A class that ``huggingface_hub`` drives like tqdm, reporting to ``progress``."""
    furthest = 0

    class DownloadBar:
        def __init__(self, *args: Any, **options: Any) -> None:
            self.n = options.get("initial") or 0
            self.total = options.get("total")
            self.counts_bytes = options.get("unit") == "B"
            self.format_dict: dict[str, Any] = {}

        def update(self, n: float | None = 1) -> None:
            # One bar counts what the network brings, another what the disk holds: the further one
            # is shown.
            nonlocal furthest
            self.n += int(n or 0)
            if self.counts_bytes and self.n > furthest:
                furthest = self.n
                progress(ProgressEvent("download", repo, furthest, max(total_bytes, furthest)))

        def __enter__(self) -> DownloadBar:
            return self

        def __exit__(
            self,
            kind: type[BaseException] | None,
            error: BaseException | None,
            trace: TracebackType | None,
        ) -> None:
            """Nothing to close."""

        def _ignore(self, *args: Any, **options: Any) -> None:
            """A bar is drawn by whoever watches ``progress``."""

        close = refresh = set_description = set_description_str = set_postfix_str = _ignore

    return DownloadBar
