"""SentencePiece models, whatever file they came from, as tokenizers."""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from edgellm.errors import SourceError, UnsupportedTokenizer
from edgellm.tokenization.vocabulary import TokenType, Vocabulary

SPACE = "▁"


@dataclass(frozen=True, slots=True)
class Pieces:
    """A SentencePiece model: its pieces, and what is done to a text before it is cut into them.

    ``unigram``: the likeliest cut is taken; otherwise neighbours are merged, best score first.
    ``space_prefix``: a space is put before a text, and behind each special token in it unless it
    ``prefixes_once`` (then a text that begins with a space gets none). ``squeezes_spaces``: spaces
    at both ends go, and several become one. ``charsmap``: SentencePiece's compiled table of
    replaced characters, empty for none. ``byte_fallback``: what no piece holds is written as bytes.
    ``where`` is for messages.
    """

    vocabulary: Vocabulary
    unk_id: int | None
    unigram: bool = False
    space_prefix: bool = True
    prefixes_once: bool = False
    squeezes_spaces: bool = False
    charsmap: bytes = b""
    byte_fallback: bool = True
    where: str = "the SentencePiece model"


def backend_of(pieces: Pieces) -> Backend:
    """The tokenizer that cuts text as ``pieces`` say; without tokens before or after a text.

    Raises ``UnsupportedTokenizer`` where the order of merges is lost.
    """
    backend = Backend(_unigram(pieces) if pieces.unigram else _bpe(pieces))
    backend.normalizer = _normalizer(pieces)
    if pieces.space_prefix and pieces.prefixes_once:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, "first", split=False)
    steps: list[decoders.Decoder] = [
        decoders.Replace(SPACE, " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    if pieces.space_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(steps)
    add_cut_tokens(backend, pieces.vocabulary)
    return backend


def add_cut_tokens(backend: Backend, vocabulary: Vocabulary) -> None:
    """Have the special and user-defined tokens cut out of a text before anything else splits it."""
    special = vocabulary.of_type(TokenType.CONTROL, TokenType.UNKNOWN)
    own = vocabulary.of_type(TokenType.USER_DEFINED)
    for ids, is_special in ((special, True), (own, False)):
        backend.add_tokens(
            [
                AddedToken(vocabulary.tokens[index], normalized=False, special=is_special)
                for index in ids
            ]
        )


def _normalizer(pieces: Pieces) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = []
    if pieces.charsmap:
        try:
            steps.append(normalizers.Precompiled(pieces.charsmap))
        except BaseException as error:
            # The library raises bare ``Exception``, or panics.
            if type(error) not in (Exception, ValueError) and "Panic" not in type(error).__name__:
                raise
            raise SourceError(
                f"{pieces.where}: its table of replaced characters is damaged: {error}"
            ) from error
    if pieces.squeezes_spaces:
        # SentencePiece writes spaces as ▁ before it cuts the end.
        steps.append(normalizers.Replace(Regex(rf"\A +|[ {SPACE}]+\z"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if pieces.space_prefix and not pieces.prefixes_once:
        # Run on each stretch of text between special tokens, so each gets its own space.
        steps.append(normalizers.Prepend(SPACE))
    steps.append(normalizers.Replace(" ", SPACE))
    return steps[0] if len(steps) == 1 else normalizers.Sequence(steps)


def _unigram(pieces: Pieces) -> models.Unigram:
    vocabulary = pieces.vocabulary
    scored = list(zip(vocabulary.tokens, vocabulary.scores, strict=False))
    return models.Unigram(scored, unk_id=pieces.unk_id, byte_fallback=pieces.byte_fallback)


def _bpe(pieces: Pieces) -> models.BPE:
    vocabulary = pieces.vocabulary
    unk = pieces.unk_id
    return bpe_model(
        {token: index for index, token in enumerate(vocabulary.tokens)},
        merges_by_score(vocabulary, pieces.where),
        pieces.where,
        byte_fallback=pieces.byte_fallback,
        fuse_unk=True,
        unk_token=None if unk is None else vocabulary.tokens[unk],
    )


def bpe_model(
    vocab: dict[str, int],
    merges: list[tuple[str, str]],
    where: str,
    *,
    ignore_merges: bool = False,
    byte_fallback: bool = False,
    fuse_unk: bool = False,
    unk_token: str | None = None,
) -> models.BPE:
    """A BPE model; raises ``SourceError`` when a merge names a token that is not there."""
    try:
        return models.BPE(
            vocab=vocab,
            merges=merges,
            ignore_merges=ignore_merges,
            byte_fallback=byte_fallback,
            fuse_unk=fuse_unk,
            unk_token=unk_token,
        )
    except Exception as error:
        # The library raises bare ``Exception`` and nothing narrower.
        if type(error) not in (Exception, ValueError):
            raise
        raise SourceError(f"{where}: merges and tokens do not fit: {error}") from error


def merges_by_score(vocabulary: Vocabulary, where: str) -> list[tuple[str, str]]:
    """Every split of every normal token into two, tokens of better score first.

    Among equals SentencePiece (and llama.cpp) merges from left to right. For runs of one letter
    (Llama's spaces) that is what the longer left side first comes to; for anything else a list of
    merges cannot say it, and ``UnsupportedTokenizer`` is raised.
    """
    normal = vocabulary.of_type(TokenType.NORMAL)
    known = {vocabulary.tokens[index] for index in normal}
    splits: list[tuple[float, int, int, str]] = []
    whose: dict[float, str] = {}
    for index in normal:
        token, score = vocabulary.tokens[index], vocabulary.scores[index]
        cuts = [
            cut for cut in range(1, len(token)) if token[:cut] in known and token[cut:] in known
        ]
        if not cuts:
            continue
        equal = whose.setdefault(score, token)
        if equal is not token and len({*equal, *token}) > 1:
            raise UnsupportedTokenizer(
                f"{where} gives {equal!r} and {token!r} the same score {score}, so the order of "
                "merges is lost (an older converter wrote this file): run a GGUF file with "
                "--runtime llamacpp, which splits text by its own tokenizer, or take the model's "
                "tokenizer.json"
            )
        splits += [(-score, -cut, cut - len(token), token) for cut in cuts]
    splits.sort()
    return [(token[:-cut], token[-cut:]) for _, cut, _, token in splits]
