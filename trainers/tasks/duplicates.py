"""Finding the same question twice: exactly, or nearly."""

import hashlib
import math
import re
import unicodedata
from collections.abc import Sequence

import numpy as np

SHINGLE_LENGTH = 5
# An odd multiplier mixes the characters of a piece into 64 bits (a polynomial hash, modulo 2^64).
_MULTIPLIER = 0x9E3779B97F4A7C15
_POWERS = np.array([pow(_MULTIPLIER, place, 2**64) for place in range(SHINGLE_LENGTH)], dtype=np.uint64)
_NO_WORD_CHARACTERS = re.compile(r"[\W_]+")
_NUMBERS = re.compile(r"\d+")


def question_key(text: str) -> bytes:
    """A hash under which two texts are the same question: equal apart from case, spacing and Unicode form."""
    return hashlib.sha256(" ".join(_folded(text).split()).encode()).digest()


def shingles(text: str) -> np.ndarray:
    """The set of pieces of five successive characters of a text, as sorted 64-bit hashes.

    Case, spacing and punctuation do not count; a text of nothing but punctuation is taken as it is. A shorter text is
    one piece.
    """
    folded = _folded(text)
    words = _NO_WORD_CHARACTERS.sub(" ", folded).strip() or folded.strip()
    points = np.frombuffer(words.encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint64)
    if len(points) < SHINGLE_LENGTH:
        points = np.pad(points, (0, SHINGLE_LENGTH - len(points)))
    pieces = np.lib.stride_tricks.sliding_window_view(points, SHINGLE_LENGTH)
    return np.unique((pieces * _POWERS).sum(axis=1, dtype=np.uint64))


class NearDuplicates:
    """Questions, stored as hashes of their pieces, that answer whether a new one nearly equals one of them.

    Two texts are near duplicates if the Jaccard similarity of their sets of five-character pieces (Broder 1997, "On the
    resemblance and containment of documents", section 2) reaches a threshold, and the same numbers stand in them in the
    same order: with other numbers a problem has another answer. The search is exact: by the prefix
    principle (Chaudhuri, Ganti and Kaushik 2006, "A primitive operator for similarity joins in data cleaning") a text
    that is similar enough shares m = ceil(threshold * n) of the n pieces of the new text, and so at least k of its
    `n - m + k` rarest ones; only the texts that do are compared in full.

    Args:
        texts: the questions to remember.
        threshold: least similarity of near duplicates, in (0, 1].
    """

    def __init__(self, texts: Sequence[str], threshold: float):
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold is {threshold}; it must lie in (0, 1]")
        self.threshold = threshold
        self._sets = [shingles(text) for text in texts]
        self._numbers = [_numbers_key(text) for text in texts]
        everything = np.concatenate([np.empty(0, np.uint64), *self._sets])
        owners = np.repeat(np.arange(len(self._sets)), [len(pieces) for pieces in self._sets])
        order = np.argsort(everything, kind="stable")
        self._pieces, starts, counts = np.unique(everything[order], return_index=True, return_counts=True)
        self._owners, self._starts, self._counts = owners[order], starts, counts

    def similarity(self, text: str) -> float:
        """The largest similarity, in [0, 1], to any of the remembered texts; 0 where all lie below the threshold."""
        pieces = shingles(text)
        if not len(self._pieces):
            return 0.0
        needed = math.ceil(self.threshold * len(pieces) - 1e-9)
        places = np.minimum(np.searchsorted(self._pieces, pieces), len(self._pieces) - 1)
        known = self._pieces[places] == pieces
        if known.sum() < needed:
            return 0.0
        # Pieces that occur nowhere are the rarest of all; they use up the prefix without giving a candidate.
        least = 1 + needed // 4
        rarity = np.where(known, self._counts[places], 0)
        prefix = np.argsort(rarity, kind="stable")[: len(pieces) - needed + least]
        owners = [
            self._owners[self._starts[place] : self._starts[place] + self._counts[place]]
            for place in places[prefix[known[prefix]]]
        ]
        met = np.bincount(np.concatenate([np.empty(0, int), *owners]), minlength=len(self._sets))
        numbers = _numbers_key(text)
        best = 0.0
        for row in np.flatnonzero(met >= least):
            other = self._sets[row]
            shorter, longer = sorted((len(pieces), len(other)))
            if shorter < self.threshold * longer - 1e-9 or self._numbers[row] != numbers:
                continue
            shared = len(np.intersect1d(pieces, other, assume_unique=True))
            best = max(best, shared / (len(pieces) + len(other) - shared))
        return best if best >= self.threshold - 1e-9 else 0.0

    def __contains__(self, text: str) -> bool:
        return self.similarity(text) > 0


def _numbers_key(text: str) -> bytes:
    """A hash of the numbers of a text, in order."""
    return question_key(" ".join(_NUMBERS.findall(text)))


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()
