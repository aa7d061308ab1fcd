"""``edgellm run``."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from edgellm.cli import options, render
from edgellm.errors import UsageError
from edgellm.writing_places import check_file_place

if TYPE_CHECKING:
    from edgellm.chat import ChatSession
    from edgellm.generate import ContextPolicy
    from edgellm.runtimes.session import Device, KvDtype

REPEAT_PENALTY = 1.1
"""Small models, above all in 4 bits, easily repeat one sentence for ever without it."""

NO_ADAPTERS = "none"
"""Given as an adapter: not even those that were kept beside the model."""

STOPPED = 130
"""What a shell reports for a program that Ctrl-C ended: 128 + 2."""


def run(
    parameters: typer.Context,
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="A folder made by convert, or any .gguf file.")
    ],
    prompt: Annotated[
        str | None,
        typer.Argument(
            metavar="PROMPT", help="The question; - reads it from stdin. Without one: a chat."
        ),
    ] = None,
    words: Annotated[list[str] | None, typer.Argument(metavar="WORD", hidden=True)] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Stop after so many tokens. Default: when the model ends.")
    ] = None,
    temperature: Annotated[
        float, typer.Option(help="0 always takes the most likely token; higher varies more.")
    ] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest that sum to this.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Draw from so many of the likeliest; 0: all.")] = 0,
    min_p: Annotated[
        float, typer.Option(help="Leave out what is less likely than this share of the best.")
    ] = 0.0,
    repeat_penalty: Annotated[
        float, typer.Option(help="Above 1 makes recent tokens less likely; 1: off.")
    ] = REPEAT_PENALTY,
    seed: Annotated[
        int | None, typer.Option(help="The same seed gives the same answer. Default: a new one.")
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="End before this text. Repeatable.")
    ] = None,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="The system message of the chat template.")
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the text as it is, without a chat template.")
    ] = False,
    context: Annotated[
        int | None, typer.Option(metavar="TOKENS", help="Room for prompt and answer.")
    ] = None,
    rope_scaling: options.RopeScaling = None,
    context_policy: Annotated[
        str,
        typer.Option(
            metavar="POLICY",
            help="When the context is full: stop, or forget the oldest (shift, sinks).",
        ),
    ] = "stop",
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH[=WEIGHT]",
            help="A LoRA adapter to apply beside the model; none: not even kept ones. Repeatable.",
        ),
    ] = None,
    ignore_config_key: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", help="A key of adapters' configs that you vouch for."),
    ] = None,
    runtime: Annotated[
        str | None, typer.Option(metavar="NAME", help="Default: the fastest here (edgellm doctor).")
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="auto, cpu, cuda, metal, vulkan, directml or coreml; see doctor."
        ),
    ] = "auto",
    gpu_layers: Annotated[
        str | None,
        typer.Option(
            metavar="auto|N", help="Layers that a GPU computes. Default: auto, as many as fit."
        ),
    ] = None,
    kv_cache: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            help="Keys and values in f32, f16, bf16, q8_0, q4_0, int8 or int4; see doctor.",
        ),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Default: the physical cores.")] = None,
    draft: Annotated[
        str | None,
        typer.Option(
            metavar="lookup|PATH",
            help="Guess tokens ahead, from the text so far or by a smaller model.",
        ),
    ] = None,
    source_lang: Annotated[
        str | None,
        typer.Option(metavar="CODE", help="A translator: the language of the text, as en_XX."),
    ] = None,
    target_lang: Annotated[
        str | None,
        typer.Option(metavar="CODE", help="A translator: the language of the answer, as de_DE."),
    ] = None,
    load_session: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Go on with a conversation that was saved."),
    ] = None,
    save_session: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Save the conversation at the end, keys and values too."),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Check the artifact's checksums first.")
    ] = True,
    stats: Annotated[
        bool, typer.Option("--stats", help="Speed and memory on stderr after the answer.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON document on stdout when the answer is whole.")
    ] = False,
) -> None:
    """Ask an artifact or a GGUF file, or chat with it.

    The prompt is put into the model's chat template, unless --raw. The answer streams to stdout,
    everything else goes to stderr. Without a prompt, on a terminal, it is a chat: Ctrl-C stops the
    answer, /help lists what else can be typed. A pipe into stdin is taken as the prompt.

    An encoder takes texts, each an argument or a line of stdin, and gives a line of JSON for each:
    its embedding, its labels with scores, or the words for what is masked. One with a decoder (T5,
    mT5, BART, mBART, Marian) answers a text with another, the likeliest unless --temperature is
    given.

    \b
    Examples:
      edgellm run small "Why is the sky blue?"
      edgellm run small
      edgellm run small --temperature 0.8 --top-p 0.95 --seed 7 "Write a haiku."
      git diff | edgellm run small --system "Write a commit message."
      edgellm run model.gguf --raw "The capital of France is" --max-tokens 5
      edgellm run small --adapter ./my-lora=0.8 "Tell me about your work."
      cat page.md | edgellm run small --system "Correct it." --draft lookup
      edgellm run small --load-session talk --save-session talk
      edgellm run small "Name a prime." --json | jq .decode_tokens_per_s
      edgellm run embedder "A text." "Another one." | jq .embedding
      edgellm run mbart --source-lang en_XX --target-lang de_DE "Hello."
    """
    from edgellm.cli.run_encoder import is_encoder, run_encoder

    if is_encoder(path):
        run_encoder(
            parameters,
            path,
            [*([] if prompt is None else [prompt]), *(words or ())],
            device=device,
            threads=threads,
            verify=verify,
            runtime=runtime,
            stats=stats,
            as_json=as_json,
        )
        return
    if prompt and words:  # a question without quotes
        prompt = " ".join((prompt, *words))
    from edgellm.cli.run_seq2seq import is_seq2seq, run_seq2seq
    from edgellm.sampling import SamplingOptions

    sampling = SamplingOptions(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repeat_penalty=repeat_penalty,
        seed=seed,
    )
    if is_seq2seq(path):
        given = parameters.get_parameter_source("repeat_penalty")
        if given is None or given.name == "DEFAULT":  # such a model repeats its text's words
            sampling = replace(sampling, repeat_penalty=1.0)
        run_seq2seq(
            parameters,
            path,
            prompt,
            sampling,
            max_tokens=max_tokens,
            source_language=source_lang,
            target_language=target_lang,
            device=device,
            threads=threads,
            verify=verify,
            runtime=runtime,
            stats=stats,
            as_json=as_json,
        )
        return
    if source_lang or target_lang:
        raise UsageError(
            "--source-lang and --target-lang are for translators (mBART), which this model is not: "
            "leave them out"
        )
    if prompt == "-" or (prompt is None and not sys.stdin.isatty()):
        prompt = sys.stdin.read().strip()
        if not prompt:
            raise UsageError("the prompt on stdin is empty: give a PROMPT, or type in a terminal")
    if prompt is None and as_json:
        raise UsageError("--json needs a PROMPT (or one on stdin): a chat has no single answer")
    if raw and (load_session or save_session):
        raise UsageError("--raw has no conversation to load or save: leave one of them out")
    if prompt is None and raw:
        raise UsageError("--raw needs a PROMPT (or one on stdin): a chat uses the chat template")
    if save_session is not None:
        check_file_place(save_session)
    adapters = _adapters(adapter)
    from edgellm.chat import open as open_model

    answering: dict[str, Any] = {
        "sampling": sampling,
        "max_tokens": max_tokens,
        "stop": tuple(stop or ()),
    }
    with (
        open_model(
            path,
            runtime=runtime,
            device=cast("Device", device),  # checked there, with the choices in the message
            context_tokens=context,
            threads=threads,
            rope_scaling=rope_scaling,
            context_policy=cast("ContextPolicy", context_policy),
            gpu_layers=_layers(gpu_layers),
            kv_dtype=cast("KvDtype | None", kv_cache),
            verify=verify,
            system=system,
            adapters=adapters,
            draft=draft,
            ignore_config_keys=ignore_config_key or (),
        ) as session,
        ExitStack() as ending,
    ):
        if not as_json:
            render.say_notes(session.notes)
        if load_session is not None:
            _load(session, load_session)
        if save_session is not None:
            ending.callback(_save, session, save_session)
        if prompt is None:
            from edgellm.cli.chat import Chat

            Chat(session, answering, show_stats=stats).run()
            return
        if as_json:
            render.show_json(session.generate(prompt, raw=raw, **answering).as_dict())
            return
        answer = render.show_stream(session.stream(prompt, raw=raw, **answering))
        why = render.why_cut(answer, max_tokens, session.context_tokens)
        if why and answer.new_tokens != max_tokens:  # that many were asked for: no news
            render.say_notes([f"cut: {why}"])
        if answer.forgotten_tokens:
            forgotten = render.count(answer.forgotten_tokens, "token")
            render.say_notes([f"the context was full: the oldest {forgotten} were forgotten"])
        if stats or answer.finish_reason == "cancelled":
            render.say_notes(render.answer_facts(answer))
        if answer.finish_reason == "cancelled":
            raise typer.Exit(STOPPED)


def _layers(given: str | None) -> int | None:
    if given in (None, "auto"):
        return None
    if not given.isdecimal():
        raise UsageError(f"--gpu-layers {given}: choose auto, or a number of layers")
    return int(given)


def _load(session: ChatSession, path: Path) -> None:
    from edgellm.session_file import load_session

    tokens = load_session(session, path)
    render.say_notes([f"goes on with {path}: {render.count(tokens, 'token')} in its cache"])


def _save(session: ChatSession, path: Path) -> None:
    from edgellm.session_file import save_session

    render.say_notes([f"saved in {path}: {render.size(save_session(session, path))}"])


def _adapters(given: list[str] | None) -> list[str] | None:
    """The adapters to apply; None where nothing was said, which takes those kept beside it."""
    if given and NO_ADAPTERS in given:
        if len(given) > 1:
            raise UsageError(
                f"--adapter {NO_ADAPTERS} leaves all adapters out, and another is named beside it: "
                "leave one of the two out"
            )
        return []
    return given or None
