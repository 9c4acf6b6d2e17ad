"""How reports show what they hold: a time in words, a few of many rows, rows as aligned text."""

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def duration(seconds: float) -> str:
    """`41.2 s`, `1 min 41 s` or `2 h 05 min`."""
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def thin(rows: Sequence[T], most: int) -> list[T]:
    """At most `most` (2 or more) of the rows, evenly spaced, with the first and the last."""
    if len(rows) <= most:
        return list(rows)
    return [rows[round(index * (len(rows) - 1) / (most - 1))] for index in range(most)]


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as text, every column aligned to the right and two spaces apart.

    Args:
        rows: of equally many cells, the titles first.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
