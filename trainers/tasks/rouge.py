"""ROUGE-L: how much of a reference's word order a text keeps (Lin 2004, "ROUGE", section 3)."""

import re
from collections.abc import Sequence

_WORDS = re.compile(r"[^\W_]+")


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """The F1 measure of ROUGE-L, in [0, 1]; of several references, the best one counts.

    With the longest common subsequence of words, of length l: precision `l / words of the prediction`, recall
    `l / words of the reference`, and their harmonic mean (Lin 2004, equations 2 to 4, with beta = 1). Words are runs of
    letters and digits, in lower case, not stemmed; the whole text is one sequence. On ASCII text this is what the
    package `rouge_score` computes as `rougeL` without a stemmer.

    Args:
        prediction: the text to score. Without words it scores 0.
        references: at least one good text.

    Raises:
        ValueError: if there is no reference.
    """
    if not references:
        raise ValueError("ROUGE-L needs at least one reference")
    words = _words(prediction)
    return max(_f1(words, _words(reference)) for reference in references)


def _words(text: str) -> list[str]:
    return _WORDS.findall(text.lower())


def _f1(prediction: Sequence[str], reference: Sequence[str]) -> float:
    if not prediction or not reference:
        return 0.0
    # 2PR / (P + R) with P = l / m and R = l / n is 2l / (m + n).
    return 2 * common_subsequence(prediction, reference) / (len(prediction) + len(reference))


def common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence.

    A row of the usual table is kept as the bits of one integer, where a 0 marks a step of the row (Hyyrö 2004,
    "Bit-parallel LCS-length computation revisited").
    """
    places: dict[str, int] = {}
    for place, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << place
    full = (1 << len(first)) - 1
    row = full
    for word in second:
        matched = row & places.get(word, 0)
        row = (row + matched | row - matched) & full
    return len(first) - row.bit_count()
