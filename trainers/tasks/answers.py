"""Rules that read an answer out of a model's text.

Every rule returns `None` where the text holds no answer. A prediction is right when the answer read from it equals the
gold answer in its canonical form; an empty prediction is therefore never right.
"""

import re
import string
import unicodedata
from collections.abc import Sequence
from fractions import Fraction

FINAL_ANSWER_MARK = "####"
MAX_NUMBER_LENGTH = 100
MAX_EXPONENT = 100

# A word stands alone unless a letter or digit touches it, directly or through an apostrophe or hyphen ("no-one").
_BEFORE_WORD = r"(?<!\w)(?<!\w['\u2019-])"
_AFTER_WORD = r"(?!['\u2019-]?\w)"
_YES_OR_NO = re.compile(f"{_BEFORE_WORD}(yes|no){_AFTER_WORD}", re.IGNORECASE)

# Possessive quantifiers: a number is read whole or not at all, never as a shorter one that happens to fit.
_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})++(?![0-9])|[0-9]++)"
_NUMBER = re.compile(
    r"(?:(?<![\w)])(?P<sign>[-\u2212+]))?\$?(?P<inner_sign>(?<=\$)[-\u2212+])?(?<!\w)"
    rf"(?:(?P<whole>{_DIGITS})(?P<decimals>\.[0-9]++)?+|(?P<bare_decimals>\.[0-9]++))"
    rf"(?:[eE](?P<exponent>[-+]?[0-9]++))?+(?:/(?P<denominator>{_DIGITS}))?+%?"
)
_MINUS_SIGNS = ("-", "\u2212")


def read_yes_no(text: str) -> str | None:
    """The first whole word "yes" or "no", in any case, as `"Yes"` or `"No"`.

    "incorrect", "know" and "no-one" hold neither word.
    """
    match = _YES_OR_NO.search(text)
    return match.group(1).capitalize() if match else None


def read_option_letter(text: str, letters: str = "ABCD") -> str | None:
    """The first of the given capital letters that stands alone, in parentheses or not: "(B)", "B.", "Answer: B".

    Small letters are not read, since "a" is a word. A capital "A" that begins a sentence is read as the letter, and so
    is "I" where there are nine options or more.
    """
    match = re.search(f"{_BEFORE_WORD}([{letters}]){_AFTER_WORD}", text)
    return match.group(1) if match else None


def read_label(text: str, labels: Sequence[str]) -> str | None:
    """The first of some one-word labels that stands alone in the text, in any case, spelled as it is in `labels`."""
    match = re.search(f"{_BEFORE_WORD}({'|'.join(map(re.escape, labels))}){_AFTER_WORD}", text, re.IGNORECASE)
    return next(label for label in labels if label.lower() == match.group(1).lower()) if match else None


def read_number(text: str) -> str | None:
    """The final number of a text, in canonical form (see [`canonical_number`]).

    After the last "####" the first number counts; a text without that mark gives its last number. A mark without a
    number behind it gives `None`: no other number is taken in its place.

    A number is digits, with or without commas between groups of three, with or without decimals ("1,000", "18.00",
    ".5", "18."), a fraction ("1/2") or a power of ten ("1e3"). A minus sign counts when it touches the number (or its
    dollar sign) and does not follow a letter, digit or closing parenthesis: "-3" and "-$3" are negative, "10-3" ends in
    3. A dollar sign before and a percent sign or unit after the number are dropped, so "50%" is 50. Digits behind a
    letter ("x3") are no number. Mixed numbers ("1 1/2") are not understood.
    """
    _, mark, tail = text.rpartition(FINAL_ANSWER_MARK)
    matches = list(_NUMBER.finditer(tail))
    if not matches:
        return None
    value = _value(matches[0 if mark else -1])
    return None if value is None else canonical_number(value)


def plain_text(text: str) -> str:
    """A short answer as exact match compares it: without case, punctuation at the ends, and spacing of its own.

    Unicode forms are folded (NFKC). Words are left alone: "the cat" and "cat" differ.
    """
    folded = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return folded.strip(string.punctuation + " ") or folded


def parse_number(text: str) -> Fraction | None:
    """The exact value of a text that is one number and nothing else, or `None`. Same grammar as [`read_number`]."""
    match = _NUMBER.fullmatch(text.strip())
    return None if match is None else _value(match)


def canonical_number(value: Fraction) -> str:
    """One spelling for each value: "1000", "-3", "3.5"; a value without finite decimals as "1/3"."""
    twos = fives = 0
    rest = value.denominator
    while rest % 2 == 0:
        rest, twos = rest // 2, twos + 1
    while rest % 5 == 0:
        rest, fives = rest // 5, fives + 1
    if rest != 1:
        return f"{value.numerator}/{value.denominator}"
    places = max(twos, fives)
    digits = str(abs(value.numerator) * 10**places // value.denominator).zfill(places + 1)
    sign = "-" if value < 0 else ""
    return sign + (f"{digits[:-places]}.{digits[-places:]}" if places else digits)


def _value(match: re.Match) -> Fraction | None:
    """The value of a matched number; `None` if it divides by zero or is absurdly long."""
    if len(match.group()) > MAX_NUMBER_LENGTH:
        return None
    parts = {name: part.replace(",", "") for name, part in match.groupdict(default="").items()}
    exponent = int(parts["exponent"] or 0)
    denominator = int(parts["denominator"] or 1)
    if abs(exponent) > MAX_EXPONENT or denominator == 0:
        return None
    value = Fraction((parts["whole"] or "0") + (parts["decimals"] or parts["bare_decimals"]))
    value *= Fraction(10) ** exponent / denominator
    negative = (parts["sign"] in _MINUS_SIGNS) != (parts["inner_sign"] in _MINUS_SIGNS)
    return -value if negative else value
