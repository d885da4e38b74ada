"""Words of texts in any script, for retrieval and for scores that compare words."""

import unicodedata
from functools import cache
from itertools import pairwise
from typing import Any

UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\p{Yi}\p{Line_Break=SA}ーｰ"
"""Characters of scripts that put no spaces between words: Chinese, Japanese, Yi, and those of South-East Asia such as
Thai, Lao, Khmer and Burmese (Unicode line breaking class SA)."""


@cache
def _patterns() -> tuple[Any, Any]:
    """Patterns for an unspaced run or a word (letters, digits, _ and their marks), and for one character."""
    import regex  # here, so that other methods do not wait for it

    marks = r"\p{M}\p{Join_Control}"
    letters = rf"[[\w\p{{N}}]--[{UNSPACED}{marks}]--[\p{{Pc}}--_]]"
    run, word = rf"[{UNSPACED}][{UNSPACED}{marks}]*", rf"{letters}(?:{letters}|[{marks}])*"
    return regex.compile(rf"(?V1)(?P<run>{run})|{word}"), regex.compile(r"\X")


def words(text: str, pairs: bool = True) -> list[str]:
    """Return the words of a text in lower case, of any length and none left out.

    For scripts without spaces between words, single characters are used instead.

    Args:
        text: the text.
        pairs: also use pairs of neighbours of such characters.
    """
    pattern, character = _patterns()
    found = []
    for match in pattern.finditer(unicodedata.normalize("NFC", text.lower())):
        if not match["run"]:
            found.append(match[0])
            continue
        letters = [part for part in character.findall(match[0]) if any(map(str.isalnum, part))]
        found += letters
        found += [one + after for one, after in pairwise(letters)] if pairs else []
    return found
