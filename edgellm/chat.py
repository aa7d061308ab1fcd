"""Open a model and talk to it: a conversation over a session, its cache kept from turn to turn."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self, cast, get_args

from edgellm.architectures.rope_scaling import parse_scaling
from edgellm.artifact import Artifact, open_artifact, refuse_encoders
from edgellm.artifact import verify as verify_artifact
from edgellm.drafting import LOOKUP, Drafter, DraftModel, PromptLookup
from edgellm.errors import RuntimeMissing, UnsupportedTarget, UsageError
from edgellm.generate import Answer, AnswerStream, ContextPolicy, Decoding
from edgellm.hardware import Choice, detect, pick
from edgellm.lora.apart import ApartAdapters, kept_adapters
from edgellm.prefix_cache import PrefixCache
from edgellm.runtimes import runtime_named, runtime_names
from edgellm.runtimes.session import AdaptingSession, Device, KvDtype, RunOptions, Session
from edgellm.sampling import SamplingOptions
from edgellm.token_times import clock
from edgellm.tokenization.parity import check_parity

ANSWER_TOKENS = 256
"""Room that a prompt leaves to its answer where older messages may be forgotten for it."""


class ChatTokenizer(Decoding, Protocol):
    """What a conversation needs of a tokenizer."""

    @property
    def chat_template(self) -> str | None: ...

    @property
    def special_texts(self) -> tuple[str, ...]: ...

    def encode(
        self, text: str, *, add_special: bool = False, parse_special: bool = True
    ) -> list[int]: ...

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str: ...

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> str: ...


def open(
    path: str | Path,
    runtime: str | None = None,
    device: Device = "auto",
    context_tokens: int | None = None,
    threads: int | None = None,
    verify: bool = True,
    *,
    system: str | None = None,
    kv_dtype: KvDtype | None = None,
    gpu_layers: int | None = None,
    adapters: Sequence[str | Path] | None = None,
    draft: str | Path | None = None,
    prefix_cache: PrefixCache | None = None,
    context_policy: ContextPolicy = "stop",
    rope_scaling: str | None = None,
    ignore_config_keys: Collection[str] = (),
) -> ChatSession:
    """A conversation with the model at ``path``: an artifact folder, or any GGUF file.

    ``verify`` checks an artifact's checksums (files that passed before and did not change since are
    not read again); a plain file has none, which ``notes`` says. ``runtime`` None takes the fastest
    one installed that runs it. ``gpu_layers`` is how many of the last layers a GPU computes, None
    as many as fit into it. ``adapters`` are LoRA adapters to apply beside the model, each
    ``PATH[=WEIGHT]`` or the name of one that was kept beside it; None takes those that were kept,
    an empty list none. ``draft`` guesses tokens ahead, which makes answers faster and no worse:
    ``lookup`` from the text so far, or the path of a smaller model with the same tokens.
    ``prefix_cache`` remembers prompts: one that begins as another did, in this session or another
    that shares it, starts behind that. ``context_policy`` says what happens when the context is
    full (``generate.ContextPolicy``). ``rope_scaling`` (``yarn:4``) reaches further than the model
    was trained for, where the runtime can be told (``architectures.rope_scaling``).
    ``ignore_config_keys`` are keys of adapters' configs that edgellm does not know and the user
    vouches for. Raises ``SourceError`` (``AdapterError``), ``VerificationError``,
    ``RuntimeMissing``, ``UnsupportedTarget`` or ``GenerationError``.
    """
    if device not in get_args(Device):
        raise UsageError(f"no device named {device!r}: choose {', '.join(get_args(Device))}")
    if kv_dtype not in (None, *get_args(KvDtype)):
        allowed = ", ".join(get_args(KvDtype))
        raise UsageError(f"no type of cache named {kv_dtype!r}: choose {allowed}")
    if context_policy not in get_args(ContextPolicy):
        allowed = ", ".join(get_args(ContextPolicy))
        raise UsageError(f"no context policy named {context_policy!r}: choose {allowed}")
    if threads is not None and threads < 1:
        raise UsageError(f"--threads must be at least 1, got {threads}")
    artifact = open_artifact(Path(path))
    refuse_encoders(artifact)
    notes = []
    if artifact.manifest is None:
        notes.append(f"{artifact.path.name} has no manifest: it runs, unverified")
    elif verify:
        verify_artifact(artifact, trust_unchanged=True)
    hardware = detect()
    names = runtime_names() if runtime is None else [runtime]
    found = {name: runtime_named(name) for name in names}
    capabilities = [one.capabilities(hardware) for one in found.values()]
    try:
        choice = pick(
            artifact.container,
            hardware,
            capabilities,
            runtime=runtime,
            device=device,
            kv_dtype=kv_dtype,
            adapters=bool(adapters if adapters is not None else kept_adapters(artifact)),
            compute=artifact.compute,
        )
    except (RuntimeMissing, UnsupportedTarget) as refusal:
        if artifact.container != "hf":
            raise
        raise type(refusal)(
            f"{refusal}. Or make one that runs here: edgellm convert {artifact.path} --out DIR"
        ) from None
    deaf = {one.runtime for one in capabilities if not one.sets_threads}
    if threads is not None and choice.runtime in deaf:
        notes.append(f"{choice.runtime} chooses its threads itself: {threads} are not heeded")
    chosen = cast("Device", choice.device)  # one that the runtime itself named
    splits = {one.runtime for one in capabilities if one.splits_layers}
    if gpu_layers is not None and choice.runtime not in splits:
        raise UnsupportedTarget(
            f"{choice.runtime} computes all layers on one device: leave --gpu-layers out"
        )
    if rope_scaling is not None:
        rope_scaling = str(parse_scaling(rope_scaling))
        able = sorted(
            one.runtime
            for one in capabilities
            if one.scales_rope and artifact.container in one.containers
        )
        if choice.runtime not in able:
            others = f", or choose --runtime {' or '.join(able)}" if able else ""
            raise UnsupportedTarget(
                f"{choice.runtime} takes rope scaling from the artifact alone: convert the model "
                f"again with --rope-scaling {rope_scaling}{others}"
            )
        notes.append(
            f"rope scaling {rope_scaling} as asked: the model was not trained with it, and may "
            "answer worse, also in short texts"
        )
    if prefix_cache is not None and not any(
        one.restores for one in capabilities if one.runtime == choice.runtime
    ):
        notes.append(f"{choice.runtime} takes no cache back: no prefix is reused across sessions")
        prefix_cache = None
    options = RunOptions(chosen, context_tokens, threads, kv_dtype, gpu_layers, rope_scaling)
    from edgellm.tokenization.artifact import artifact_tokenizer

    tokenizer = artifact_tokenizer(artifact.main, artifact.container)
    session = found[choice.runtime].open(artifact, options)
    apart = None
    if any(one.applies_adapters for one in capabilities if one.runtime == choice.runtime):
        try:
            apart = ApartAdapters(
                artifact,
                cast("AdaptingSession", session),
                ignore_config_keys=ignore_config_keys,
            )
            _apply(apart, adapters)
        except BaseException:
            session.close()
            raise
    chat = ChatSession(
        session,
        tokenizer,
        choice=choice,
        artifact=artifact,
        system=system,
        notes=notes,
        apart=apart,
    )
    chat.prefix_cache = prefix_cache
    chat.context_policy = context_policy
    chat.rope_scaling = rope_scaling
    if draft is not None:
        try:
            chat.drafter = _drafter(draft, chat, device, threads, verify)
        except BaseException:
            chat.close()
            raise
    return chat


def _drafter(
    draft: str | Path, chat: ChatSession, device: Device, threads: int | None, verify: bool
) -> Drafter:
    """Who guesses tokens for ``chat``; raises ``UsageError`` for a model with other tokens."""
    if str(draft) == LOOKUP:
        return PromptLookup()
    smaller = open(draft, device=device, threads=threads, verify=verify, adapters=[])
    parity = check_parity(chat.tokenizer, smaller.tokenizer, method="tokens of a draft model")
    if parity.equal and smaller.session.vocab_size == chat.session.vocab_size:
        return DraftModel(smaller.session)
    smaller.close()
    raise UsageError(
        f"{draft} has other tokens than the model, so it cannot guess for it: choose a draft model "
        f"of the same family, or --draft {LOOKUP}"
    )


def _apply(apart: ApartAdapters, adapters: Sequence[str | Path] | None) -> None:
    """Apply those that are wanted of a session that was just opened; None takes the kept ones."""
    try:
        if adapters is None:
            apart.apply_kept()
        else:
            apart.apply([str(adapter) for adapter in adapters])
    except BaseException:
        apart.close()
        raise


class ChatSession:
    """One conversation with one model; use it in a ``with`` block, or ``close`` it.

    ``messages`` is the conversation so far, ``said`` its text and ``said_ids`` its tokens, both
    empty where they do not agree. ``forgotten``: how many of the oldest messages left it because
    the context was full.
    """

    def __init__(
        self,
        session: Session,
        tokenizer: ChatTokenizer,
        *,
        choice: Choice,
        artifact: Artifact | None = None,
        system: str | None = None,
        notes: Sequence[str] = (),
        apart: ApartAdapters | None = None,
    ) -> None:
        self.session = session
        self.tokenizer = tokenizer
        self.choice = choice
        self.artifact = artifact
        self._notes = tuple(notes)
        self._apart = apart
        self.drafter: Drafter | None = None
        self.prefix_cache: PrefixCache | None = None
        self.context_policy: ContextPolicy = "stop"
        self.rope_scaling: str | None = None
        self.forgotten = 0
        self._bound: str | None = None
        self.system = system
        self.messages: list[dict[str, str]] = []
        self.said = ""
        self.said_ids: tuple[int, ...] = ()
        self.clear()

    @property
    def notes(self) -> tuple[str, ...]:
        """What whoever runs it should know, the adapters that are applied among it."""
        if self._apart is None:
            return self._notes
        return (*self._notes, *self._apart.notes, *self._apart.lines())

    @property
    def adapter_notes(self) -> tuple[str, ...]:
        """What should be known of the adapters that were opened so far, the newest last."""
        return tuple(self._apart.notes) if self._apart else ()

    @property
    def adapters(self) -> dict[str, float]:
        """How strongly each adapter that is known is applied, 0 for those that are off."""
        return self._apart.weights if self._apart else {}

    def add_adapter(self, adapter: str | Path) -> str:
        """Apply a LoRA adapter beside those that are applied already; its name in ``adapters``.

        ``adapter`` is ``PATH[=WEIGHT]`` (a PEFT folder, a GGUF adapter or a Hub id), or a name that
        is known. Raises ``AdapterError`` for one that is damaged, of another base, or cannot be
        applied beside a model, and ``UnsupportedTarget`` where the runtime applies none.
        """
        apart = self._adapting()
        name, weight = apart.add(str(adapter))
        apart.set({**apart.weights, name: weight})
        return name

    def set_adapters(self, weights: Mapping[str, float]) -> None:
        """Apply the adapters that are named, as strongly as said, and no others, from now on.

        The conversation goes on; its keys and values are computed anew. Raises ``UsageError`` for a
        name that is not in ``adapters`` and ``UnsupportedTarget`` where the runtime applies none.
        """
        self._adapting().set(weights)

    def _adapting(self) -> ApartAdapters:
        if self._apart is None:
            raise UnsupportedTarget(
                f"{self.choice.runtime} applies no adapters beside a model: merge them into it "
                "(edgellm convert --adapter), or convert with --format gguf for llama.cpp"
            )
        return self._apart

    @property
    def used_tokens(self) -> int:
        """Tokens in the cache."""
        return len(self.session.tokens)

    @property
    def context_tokens(self) -> int:
        """Tokens that the cache has room for."""
        return self.session.context_tokens

    def generate(
        self,
        prompt: str,
        *,
        sampling: SamplingOptions | None = None,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        raw: bool = False,
    ) -> Answer:
        """The whole answer to ``prompt``; see ``stream``."""
        options: dict[str, Any] = {"max_tokens": max_tokens, "stop": stop, "raw": raw}
        return self.stream(prompt, sampling=sampling, **options).answer()

    def stream(
        self,
        prompt: str,
        *,
        sampling: SamplingOptions | None = None,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        raw: bool = False,
    ) -> AnswerStream:
        """The answer to ``prompt`` as it comes, in pieces of text.

        ``prompt`` is the next message of the conversation, in the model's chat template; only what
        the cache does not hold yet is computed. With ``raw``, or for a model without a template,
        the text is continued as it is, outside any conversation. ``max_tokens`` None: until the
        model ends or the context is full. The answer enters ``messages`` when the stream ends, a
        cancelled one as far as it came.

        Raises ``GenerationError`` when the conversation does not fit the context any more.
        """
        started_s = clock()
        beginning = 0
        if raw or self.tokenizer.chat_template is None:
            if not raw and self.system:
                raise UsageError(
                    "this model has no chat template, so it takes no system message: leave it out"
                )
            text, prompt_ids = "", tuple(self.tokenizer.encode(prompt, add_special=True))
        else:
            text, prompt_ids = self._fitting_prompt(prompt)
            if self.context_policy == "shift":
                beginning = self._beginning(prompt_ids)

        def remember(stream: AnswerStream) -> None:
            if text and (stream.token_ids or stream.finish_reason != "cancelled"):
                self._remember(prompt, text, prompt_ids, stream)

        return AnswerStream(
            self.session,
            self.tokenizer,
            prompt_ids,
            sampling=sampling,
            max_tokens=max_tokens,
            stop=stop,
            reuse_cache=bool(text and self.messages),
            prefixes=self.prefix_cache,
            owner=self._owner() if self.prefix_cache is not None else "",
            drafter=self.drafter,
            context_policy=self.context_policy,
            beginning_tokens=beginning,
            started_s=started_s,
            reason=self.choice.reason,
            on_end=remember,
        )

    def clear(self) -> None:
        """Forget the conversation; the system message stays."""
        self.messages.clear()
        self.said, self.said_ids = "", ()

    def resume(
        self,
        messages: Sequence[dict[str, str]],
        system: str | None,
        said: str,
        said_ids: Sequence[int],
    ) -> None:
        """Go on with a conversation whose keys and values the session holds already."""
        self.messages[:] = [dict(message) for message in messages]
        self.system, self.said, self.said_ids = system, said, tuple(said_ids)

    def close(self) -> None:
        """Give the memory back; using the session afterwards raises ``GenerationError``."""
        self.session.close()
        if self.drafter is not None:
            self.drafter.close()
        if self._apart is not None:
            self._apart.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _owner(self) -> str:
        """What makes keys and values alike: the model, what computes it, adapters beside it."""
        from edgellm.session_file import bound_of

        if self._bound is None or self._apart is not None:
            self._bound = f"{bound_of(self)} on {self.session.device}"
        return self._bound

    def _fitting_prompt(self, message: str) -> tuple[str, tuple[int, ...]]:
        """``_next_prompt``, with the oldest messages forgotten where that makes it fit."""
        text, prompt_ids = self._next_prompt(message)
        room = self.context_tokens - min(ANSWER_TOKENS, self.context_tokens // 4)
        while self.context_policy != "stop" and len(prompt_ids) > room and self.messages:
            del self.messages[:2]
            self.forgotten += 2
            self.said, self.said_ids = "", ()
            text, prompt_ids = self._next_prompt(message)
        return text, prompt_ids

    def _beginning(self, prompt_ids: Sequence[int]) -> int:
        """How many tokens of a prompt are the system message's, whatever is said after it."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        other = [*system, {"role": "user", "content": "\x00"}]
        ids = self.tokenizer.encode(self.tokenizer.render_chat(other))
        pairs = zip(ids, prompt_ids, strict=False)
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))

    def _next_prompt(self, message: str) -> tuple[str, tuple[int, ...]]:
        """The conversation with ``message`` added, as text and as tokens.

        Where the new text begins with what was said, the tokens do too: an answer read back as text
        may be split into other tokens than those that the model chose, and would be computed again.
        """
        system = [{"role": "system", "content": self.system}] if self.system else []
        conversation = [*system, *self.messages, {"role": "user", "content": message}]
        text = self.tokenizer.render_chat(conversation)
        rest = text.removeprefix(self.said)
        # Only at a special token is the split of the rest the same alone as in the whole.
        if self.said and rest != text and rest.startswith(self.tokenizer.special_texts):
            return text, (*self.said_ids, *self.tokenizer.encode(rest))
        return text, tuple(self.tokenizer.encode(text))

    def _remember(
        self, message: str, text: str, prompt_ids: Sequence[int], stream: AnswerStream
    ) -> None:
        self.messages.append({"role": "user", "content": message})
        self.messages.append({"role": "assistant", "content": stream.text})
        whole = self.tokenizer.decode(stream.token_ids) == stream.text
        self.said = text + stream.text if whole else ""
        self.said_ids = (*prompt_ids, *stream.token_ids) if whole else ()
