"""What looks like a token, a key or a password, wherever it stands; none of it may be shown or leave the machine."""

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from huggingface_hub import constants

# Letters and digits soon follow: a random string, not a word or a number. Bounded, as lines may be megabytes long.
_MIXED = r"(?=[^\s\"']{0,40}[0-9])(?=[^\s\"']{0,40}[A-Za-z])"
SECRET_PATTERNS = {
    "a Hugging Face token": r"\b(?:hf_(?:oauth_|jwt_)?|api_org_)[A-Za-z0-9]{20,}",
    "an AWS access key": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "a GitHub token": r"\b(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{22,})",
    "a GitLab token": r"\bglpat-[A-Za-z0-9_-]{20,}",
    "an API key": r"(?<![A-Za-z0-9])sk-[A-Za-z0-9_-]{20,}",
    "a Google API key": r"(?<![A-Za-z0-9+/_-])AIza[0-9A-Za-z_-]{35}(?![A-Za-z0-9+/_-])",
    "a Slack token": r"\bxox[abeoprs]-[A-Za-z0-9-]{10,}",
    "a Stripe key": r"\b[rs]k_live_[A-Za-z0-9]{16,}",
    "a JSON web token": r"\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a bearer token": r"(?i)\bbearer\s+(?=\S{0,40}\d)[A-Za-z0-9._~+/-]{20,}",
    "a password in an address": r"\b[a-z][a-z0-9+.-]{0,20}://[^/\s:@\"']{1,100}:[^/\s:@\"']{6,200}@",
    "a key or token": (
        r"(?i)(?:api|access|secret|auth|hub|private|refresh)[_-]?(?:access[_-]?)?(?:key|token|secret)"
        rf"[\"']?\s*[:=]\s*[\"']?{_MIXED}[A-Za-z0-9+/_.~-]{{16,}}"
    ),
    "a password": rf"(?i)(?:password|passwd)[\"']?\s*[:=]\s*[\"']?{_MIXED}[^\s\"'<>]{{8,}}",
    "a token as an option": (
        rf"(?i)--[\w-]{{0,40}}(?:token|key|secret|password)[ =][\"']?{_MIXED}[A-Za-z0-9+/_.~-]{{12,}}"
    ),
}
ANY_SECRET = re.compile("|".join(f"(?:{pattern.removeprefix('(?i)')})" for pattern in SECRET_PATTERNS.values()), re.I)
TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")


def known_tokens(token: str | None = None) -> list[str]:
    """Every token of the user that can be known without a connection, with one more."""
    tokens = [token, *map(os.environ.get, TOKEN_VARIABLES)]
    stored = Path(constants.HF_TOKEN_PATH)
    if stored.is_file():
        tokens.append(stored.read_text(encoding="utf-8", errors="replace"))
    # A string of a few letters is no token, and would be found everywhere.
    return sorted({token.strip() for token in tokens if token and len(token.strip()) >= 8})


def secrets_in(text: str, tokens: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Line number and kind of everything in a text that looks like a secret, one for each line."""
    for number, line in enumerate(text.split("\n"), start=1):
        if any(token in line for token in tokens):
            yield number, "your own token"
            continue
        for kind, pattern in SECRET_PATTERNS.items():
            if re.search(pattern, line):
                yield number, kind
                break


def redact(text: str, *tokens: str | None) -> str:
    """A text without these tokens and without anything that looks like one."""
    for token in filter(None, tokens):
        text = text.replace(token, "<token>")
    return ANY_SECRET.sub("<secret>", text)
