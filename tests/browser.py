"""A page as a reader's browser shows it: headless Chromium, without network."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests import skips

PLANTED = "<script>document.body.dataset.planted=1</script><img src=x onerror=document.body.dataset.planted=1>"
"""What a data set, a model or a name may hold. Where a page lets it through, it marks the page's body."""


def browser() -> str:
    """The browser's path; skips the test where none is installed."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip(skips.NO_BROWSER)
    return found


def document_of(page: Path, size: tuple[int, int] = (1280, 900)) -> str:
    """The page's document after its scripts have run, as HTML."""
    profile = page.parent / ".profile"
    command = [browser(), "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    command += [f"--user-data-dir={profile}", f"--window-size={size[0]},{size[1]}", "--virtual-time-budget=3000"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", "--dump-dom", page.resolve().as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    shutil.rmtree(profile, ignore_errors=True)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


def is_planted(document: str) -> bool:
    """Whether what stands in `PLANTED` was run as code."""
    return "data-planted" in document[document.index("<body") :].partition(">")[0]
