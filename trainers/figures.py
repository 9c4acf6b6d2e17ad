"""What the pictures of all reports share: colours, writing beside the numbers, text that may stand in a picture."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import plain
from .files import json_text, replacing, write_text

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

SCHEMA_VERSION = 1
DOTS_PER_INCH = 130
MARKERS = "osD^vP*X"
# Okabe and Ito's colours, told apart with any colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")


def new_figure(width: float = 8, height: float = 4.5) -> "Figure":
    """An empty figure of a size in inches. It belongs to no window and needs no closing."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a PNG aside, then rename it.

    Raises:
        OSError: if it cannot be written; an older picture is then left as it was.
    """
    with replacing(path) as aside:
        figure.savefig(aside, dpi=DOTS_PER_INCH, format="png")


def save_with_numbers(figure: "Figure", path: Path, numbers: Mapping[str, Any]) -> None:
    """[`save_figure`], with the numbers that the picture is drawn from beside it under the suffix `.json`."""
    write_text(path.with_suffix(".json"), json_text({"schema_version": SCHEMA_VERSION, **numbers}))
    save_figure(figure, path)


def whole_numbers(axis: "Axis") -> None:
    """Let an axis of counts have ticks at whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True))


def printable(text: str, most: int = 12) -> str:
    """Text from data as a picture may hold it: on one line, at most so long, and no formula."""
    text = plain(text).replace("\n", "\\n")
    text = text if len(text) <= most else f"{text[: most - 1]}…"
    return text.replace("$", r"\$")
