"""Words as labels: one spelling of each, and what is no word."""

import unicodedata
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache

_SILENCE = {"sil", "sp", "spn", "nsn", "<eps>", "<unk>", "<sil>", "<s>", "</s>"}
_BRACKETS = {"[": "]", "(": ")", "<": ">", "{": "}"}  # a remark, as [music], or an aligner's sign
_APOSTROPHES = str.maketrans("’‘ʼ＇`´", "''''''")
_MAX_LETTERS = 100  # of a word: more is no word but a file of another kind


@lru_cache(1 << 16)
def normalise(word: str, case: str = "upper") -> str | None:
    """One spelling of a word: `case` upper, lower or keep, no punctuation round it; None for silence and noise.

    >>> [normalise(w) for w in (" “Don’t,", "well-known...", "[Music]", "sil", "--")]
    ["DON'T", 'WELL-KNOWN', None, None, None]
    """
    word = word.strip()
    if not word or word.lower() in _SILENCE or _BRACKETS.get(word[0]) == word[-1]:
        return None
    word = unicodedata.normalize("NFC", word).translate(_APOSTROPHES)
    # Soft hyphens, marks of direction and the like, which nobody sees, would make two labels of one word.
    word = "".join(c for c in word if unicodedata.category(c)[0] != "C" or c in "\u200c\u200d")
    inner = [n for n, c in enumerate(word) if unicodedata.category(c)[0] in "LNM"]
    if not inner or not word[inner[0]].isprintable() or inner[-1] - inner[0] >= _MAX_LETTERS:
        return None
    word = " ".join(word[inner[0] : inner[-1] + 1].split())
    return word.upper() if case == "upper" else word.lower() if case == "lower" else word


def script(words: Iterable[str]) -> str | None:
    """The script that most letters of some words are of, as Unicode calls it; None without letters.

    >>> script(["ДА", "OK", "НЕТ"])
    'CYRILLIC'
    """
    letters = Counter(c for word in words for c in word if c.isalpha())
    scripts: Counter[str] = Counter()
    for letter, count in letters.items():
        scripts[unicodedata.name(letter, "UNKNOWN").partition(" ")[0]] += count
    return scripts.most_common(1)[0][0] if scripts else None
