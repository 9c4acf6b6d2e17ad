"""The one exception for mistakes a user can mend: commands print it as a single line and exit with code 2."""

import difflib
import re
from collections.abc import Iterable

from huggingface_hub.errors import StrictDataclassError

from .redaction import known_tokens, redact


class UserError(ValueError):
    """A mistake in a recipe, an option, a data file or a folder.

    The message is one line that names the field, file or row and states the rule that was broken. What it repeats from
    a user's file or a server may hold anything: characters that break lines or steer a terminal are shown escaped,
    and what looks like a token or a password is left out.
    """

    def __init__(self, message: str):
        super().__init__(plain(redact(message, *known_tokens())).replace("\n", "\\n"))


def plain(text: str) -> str:
    """Text from data as a terminal may show it: what would steer the terminal, line breaks apart, is shown escaped."""
    return "".join(char if char.isprintable() or char == "\n" else repr(char)[1:-1] for char in text)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"`, or an empty string when nothing known is near."""
    nearest = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""


def one_line(error: BaseException) -> str:
    """The message of an exception without line breaks and the validator's boilerplate, its field's name in front."""
    cause = error.__cause__ if isinstance(error, StrictDataclassError) and error.__cause__ else error
    message = " ".join(str(cause).split()) or type(cause).__name__
    name = field_of(error)
    return message if name is None else f"{name}: {message}"


def field_of(error: BaseException) -> str | None:
    """The field that a strict dataclass or configuration complains about, or `None` if it is about several."""
    found = (
        re.match("Validation error for field '(.+?)'", str(error)) if isinstance(error, StrictDataclassError) else None
    )
    return found[1] if found else None
