"""``edgellm eval``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, cast

import typer

from edgellm.cli import options, render
from edgellm.cli.progress_bar import progress_shown

if TYPE_CHECKING:
    from edgellm.evaluation_text import Score
    from edgellm.side_by_side import Evaluation


def eval_(
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH", help="An artifact, a GGUF, an ONNX or Hugging Face folder or a Hub id."
        ),
    ],
    text: Annotated[
        str,
        typer.Option(metavar="FILE", help="Plain text, .jsonl or .parquet; builtin: a short one."),
    ] = "builtin",
    reference: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="What it should answer like: any of what PATH can be."),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="Score so many tokens at most. Default: the whole text.")
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(metavar="TOKENS", help="Tokens computed together. Default: 512."),
    ] = None,
    score: Annotated[
        str | None,
        typer.Option(
            metavar="WHICH",
            help="half of a window or all. Default: half of one text, all of many.",
        ),
    ] = None,
    runtime: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Default: the fastest here; float: the weights' values."),
    ] = None,
    reference_runtime: Annotated[
        str | None, typer.Option(metavar="NAME", help="The same for the reference.")
    ] = None,
    ignore_config_key: options.IgnoreConfigKey = None,
    threads: Annotated[int | None, typer.Option(help="Default: the physical cores.")] = None,
    as_json: options.AsJson = False,
) -> None:
    """Measure a model on a text, and how far it is from another.

    Perplexity by token, word and byte, and with --reference the KL divergence from it, how often
    both find the same token likeliest, and how the probability of the text's own tokens changed,
    with standard errors. Both models compute one window after another, side by side; no logits
    are stored. An artifact or GGUF file runs as run would run it, other exporters' ONNX folders
    on onnxruntime; a Hugging Face folder is computed in float32, in the memory of a layer.

    Figures are defined as llama-perplexity's. WHICH half scores the tokens behind the middle of
    each window, as it does; all scores every token but a window's first. Perplexities of models
    with different tokenizers compare by word or byte; KL needs one and the same tokenizer.

    \b
    Examples:
      edgellm eval small
      edgellm eval small --reference ./my-model
      edgellm eval model-q4_0.gguf --reference model-f16.gguf --text wiki.txt
      edgellm eval small --reference ./my-model --text chats.jsonl --tokens 4096
      edgellm eval model.gguf --text wiki.txt --window 2048 --score all
      edgellm eval small --reference owner/name --json | jq .kld_mean
    """
    from edgellm.side_by_side import evaluate

    with progress_shown(quiet=as_json) as progress:
        found = evaluate(
            path,
            text,
            reference=reference,
            tokens=tokens,
            window_tokens=window,
            score=cast("Score | None", score),  # checked there, with the choices in the message
            runtime=runtime,
            reference_runtime=reference_runtime,
            threads=threads,
            ignore_config_keys=ignore_config_key or (),
            progress=progress,
        )
    if as_json:
        render.show_json(found)
    else:
        _show(found)


def _show(found: Evaluation) -> None:
    render.say_notes(found.notes)
    render.show_facts(
        [
            ("model", f"{found.path} ({found.runtime})"),
            (
                "reference",
                f"{found.reference} ({found.reference_runtime})" if found.reference else "",
            ),
            ("text", f"{found.text}, sha256 {found.corpus_sha256}"),
            (
                "scored",
                f"{found.tokens:,} tokens ({found.words:,} words, {found.text_bytes:,} bytes): "
                f"{found.scored}",
            ),
            ("tokenizer", f"sha256 {found.tokenizer_sha256}" if found.tokenizer_sha256 else ""),
        ]
    )
    print()
    render.show_facts(_perplexity_facts(found))
    if found.reference:
        print()
        render.show_facts(_divergence_facts(found))


def _perplexity_facts(found: Evaluation) -> list[tuple[str, str]]:
    return [
        ("perplexity", _with_error(found.perplexity, found.perplexity_stderr)),
        (
            "of the reference",
            _with_error(found.reference_perplexity, found.reference_perplexity_stderr),
        ),
        (
            "increase",
            _with_error(found.perplexity_increase, found.perplexity_increase_stderr, share=True),
        ),
        ("by word", _with_error(found.word_perplexity, found.word_perplexity_stderr)),
        (
            "by byte",
            _with_error(found.byte_perplexity, found.byte_perplexity_stderr)
            + ("" if found.bits_per_byte is None else f" ({found.bits_per_byte:.4f} bits)"),
        ),
    ]


def _divergence_facts(found: Evaluation) -> list[tuple[str, str]]:
    return [
        ("KL divergence", _with_error(found.kld_mean, found.kld_mean_stderr) + " nats"),
        ("its median", _with_error(found.kld_median)),
        ("99th percentile", _with_error(found.kld_p99)),
        ("its largest", _with_error(found.kld_max)),
        (
            "same likeliest token",
            _with_error(found.top1_agreement, found.top1_agreement_stderr, share=True),
        ),
        (
            "RMS of delta p",
            _with_error(found.rms_delta_p, found.rms_delta_p_stderr, share=True),
        ),
        (
            "mean delta p",
            _with_error(found.mean_delta_p, found.mean_delta_p_stderr, share=True),
        ),
    ]


def _with_error(value: float | None, error: float | None = None, *, share: bool = False) -> str:
    """``18.23 ± 0.41``, or of a ``share`` in percent; empty where there is no value."""
    if value is None:
        return ""
    if share:
        return f"{value:.2%}" + ("" if error is None else f" ± {error:.2%}")
    return f"{value:.4g}" + ("" if error is None else f" ± {error:.2g}")
