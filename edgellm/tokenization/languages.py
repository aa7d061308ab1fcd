"""Languages that a tokenizer marks texts with: mBART's codes, each a token of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import tokenizers

from edgellm.errors import SourceError
from edgellm.tokenization.tokenizer import Tokenizer, add_surroundings

MBART: Final = (
    "ar_AR", "cs_CZ", "de_DE", "en_XX", "es_XX", "et_EE", "fi_FI", "fr_XX", "gu_IN", "hi_IN",
    "it_IT", "ja_XX", "kk_KZ", "ko_KR", "lt_LT", "lv_LV", "my_MM", "ne_NP", "nl_XX", "ro_RO",
    "ru_RU", "si_LK", "tr_TR", "vi_VN", "zh_CN",
)  # fmt: skip
"""Behind the vocabulary of mBART, in this order (transformers' ``MBartTokenizer``)."""

MBART50: Final = (
    *MBART,
    "af_ZA", "az_AZ", "bn_IN", "fa_IR", "he_IL", "hr_HR", "id_ID", "ka_GE", "km_KH", "mk_MK",
    "ml_IN", "mn_MN", "mr_IN", "pl_PL", "ps_AF", "pt_XX", "sv_SE", "sw_KE", "ta_IN", "te_IN",
    "th_TH", "tl_XX", "uk_UA", "ur_PK", "xh_ZA", "gl_ES", "sl_SI",
)  # fmt: skip
"""Of mBART-50 (transformers' ``MBart50Tokenizer``)."""

SOURCE: Final = "en_XX"
"""What transformers' tokenizers put beside a text where nothing says its language."""

END: Final = "</s>"
"""What stands between a text and its code, or behind it."""


@dataclass(frozen=True, slots=True)
class Languages:
    """Codes of languages by name with their ids; that of a text where nobody says is ``source``.

    ``behind_text``: it stands behind the text and its end (mBART), not before it (mBART-50).
    """

    ids: dict[str, int] = field(default_factory=dict)
    source: str = ""
    behind_text: bool = False


def languages_of(tokenizer: Tokenizer) -> Languages:
    """The languages that ``tokenizer`` has codes for."""
    ids = {}
    for code in MBART50:
        found = tokenizer.backend.token_to_id(code)
        if found is not None:
            ids[code] = found
    names = {token_id: code for code, token_id in ids.items()}
    before, behind = (
        next((names[token_id] for token_id in around if token_id in names), "")
        for around in (tokenizer.settings.prefix_ids, tokenizer.settings.suffix_ids)
    )
    return Languages(ids, before or behind, behind_text=bool(behind))


def mark(backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> bool:
    """Have ``backend`` put the code of the config's language around a text; whether it does.

    Only tokenizers of mBART's classes do, which go by ``src_lang`` and not by what a tokenizer.json
    says, in transformers too. Raises ``SourceError`` for a language without a token.
    """
    kind = str(config.get("tokenizer_class") or "").removesuffix("Fast")
    if kind not in ("MBartTokenizer", "MBart50Tokenizer"):
        return False
    language = config.get("src_lang") or SOURCE
    code, end = backend.token_to_id(str(language)), backend.token_to_id(END)
    if code is None or end is None:
        raise SourceError(
            f"the tokenizer's src_lang is {language!r}, and it has no token for it or none that "
            f"ends a text ({END}): fetch its files again"
        )
    before, behind = ((), (end, code)) if kind == "MBartTokenizer" else ((code,), (end,))
    add_surroundings(backend, before, behind)
    return True
