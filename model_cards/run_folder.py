"""Reading a run folder: the files that trainers leave, checked field by field."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

SCHEMA_VERSION = 1
REPORT_FOLDERS = ("internals", "coupling")
# What a report is made of; arrays and records beside it stay on the machine.
REPORT_SUFFIXES = (".json", ".csv", ".png", ".gif", ".html")


class CardError(ValueError):
    """A run folder or an option from which no card can be made. The message is one line: file, field and rule."""


class Fields:
    """A mapping read from a file, whose fields are fetched with their kind checked.

    A field that is missing or of another kind raises a [`CardError`] that names file and field. The `maybe_` forms
    return `None` for a missing or null field. Numbers are finite.

    Args:
        file: name of the file, for messages.
        content: the mapping.
        prefix: where in the file the mapping stands, for messages.
    """

    def __init__(self, file: str, content: Any, prefix: str = ""):
        self.file, self.prefix = file, prefix
        if not isinstance(content, Mapping):
            raise CardError(f"{file}: {prefix.rstrip('.') or 'the content'} must be a mapping")
        self.content = content

    def error(self, name: str, rule: str) -> CardError:
        """A `CardError` about one of the fields."""
        return CardError(f"{self.file}: {self.prefix}{name} {rule}")

    def maybe(self, name: str, kinds: type | tuple[type, ...], rule: str) -> Any:
        value = self.content.get(name)
        if value is None or (isinstance(value, kinds) and not isinstance(value, bool)):
            return value
        raise self.error(name, rule)

    def maybe_text(self, name: str) -> str | None:
        return self.maybe(name, str, "must be text")

    def text(self, name: str) -> str:
        return self._required(name, self.maybe_text(name))

    def maybe_number(self, name: str) -> float | None:
        value = self.maybe(name, (int, float), "must be a number")
        if value is not None and not math.isfinite(value):
            raise self.error(name, f"is {value}; it must be finite")
        return value

    def number(self, name: str) -> float:
        return self._required(name, self.maybe_number(name))

    def maybe_count(self, name: str) -> int | None:
        return self.maybe(name, int, "must be a whole number")

    def count(self, name: str) -> int:
        return self._required(name, self.maybe_count(name))

    def maybe_section(self, name: str) -> "Fields | None":
        return None if self.content.get(name) is None else self.section(name)

    def section(self, name: str) -> "Fields":
        return Fields(self.file, self._required(name, self.content.get(name)), f"{self.prefix}{name}.")

    def rows(self, name: str) -> "list[Fields]":
        """The mappings of a list; an empty list for a missing or null field."""
        rows = self.maybe(name, list, "must be a list") or []
        return [Fields(self.file, row, f"{self.prefix}{name}[{index}].") for index, row in enumerate(rows)]

    def _required(self, name: str, value: Any) -> Any:
        if value is None:
            raise self.error(name, "is missing")
        return value


@dataclass(frozen=True)
class Score:
    """What a split scored, with its interval: a share of right answers in [0, 1], or an error, of which less is better.

    Attributes:
        metric: `accuracy`, `error` or another name; what ends in `error` is an error, all else a share.
        value, low, high: the score and the ends of its interval.
        n: examples that it was measured on.
        confidence, method: of the interval.
    """

    metric: str
    value: float
    n: int
    low: float
    high: float
    confidence: float
    method: str

    @classmethod
    def read(cls, fields: Fields, metric: str) -> "Score":
        """Read the score `metric` of a split, a difficulty level or the trivial predictor."""
        return cls.parse(fields.section(metric), metric, fields.error(metric, f"must have {_shape(metric)}"))

    @classmethod
    def parse(cls, score: Fields, metric: str, complaint: CardError) -> "Score":
        """Read a score from its own mapping; raises `complaint` if it has another shape."""
        interval = score.maybe("interval", list, "must be a list")
        numbers = [score.number("value"), score.number("confidence"), *(interval or [])]
        if len(numbers) != 4 or not all(isinstance(x, (int, float)) and math.isfinite(x) for x in numbers):
            raise complaint
        value, confidence, low, high = numbers
        shares = [confidence] if is_error(metric) else numbers
        if not all(-1e-9 <= x <= 1 + 1e-9 for x in shares):
            raise complaint
        return cls(metric, value, score.count("n"), low, high, confidence, score.text("method"))

    @property
    def less_is_better(self) -> bool:
        """Whether it is an error."""
        return is_error(self.metric)

    def show(self, number: float) -> str:
        """A number on the scale of the score: shares with three decimals, errors with three digits."""
        return f"{number:.3g}" if self.less_is_better else f"{number:.3f}"

    @property
    def interval(self) -> str:
        """Both ends of the interval, in words."""
        return f"{self.show(self.low)} to {self.show(self.high)}"

    def __str__(self) -> str:
        return f"{self.show(self.value)} [{self.show(self.low)}, {self.show(self.high)}]"


def _read_reports(run_dir: Path) -> tuple[str, ...]:
    files = (file for folder in REPORT_FOLDERS for file in sorted((run_dir / folder).rglob("*")) if file.is_file())
    paths = (file.relative_to(run_dir) for file in files if file.suffix in REPORT_SUFFIXES)
    shown = (path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts))
    return tuple(sorted(shown, key=lambda path: not path.endswith(".html")))


def is_error(metric: str) -> bool:
    """Whether less of a metric is better."""
    return metric.endswith("error")


def _shape(metric: str) -> str:
    shape = "a value, a confidence and an interval of two ends"
    return f"{shape}, all finite" if is_error(metric) else f"{shape}, each in [0, 1]"


@dataclass(frozen=True)
class RunFolder:
    """The parsed files of a finished run.

    Attributes:
        path: the folder, as it was given.
        config, recipe, metrics: the content of config.json, recipe.yaml and metrics.json.
        steps: of each line of predictions.jsonl that has steps, their number and whether the answer is right.
        reports: the reports' files below internals/ and coupling/, as POSIX paths relative to the folder, pages
            first.
    """

    path: Path
    config: Fields
    recipe: Fields
    metrics: Fields
    steps: tuple[tuple[int, bool], ...]
    reports: tuple[str, ...]

    @classmethod
    def read(cls, path: str | Path) -> "RunFolder":
        """Read a run folder.

        Raises:
            CardError: if the folder or one of its three files is missing or unreadable, if metrics.json has another
                schema version than 1, or if the run is not finished.
        """
        path = Path(path)
        if not path.is_dir():
            raise CardError(f"{path}: no such folder; give the output folder of a finished run")
        metrics = Fields(*_load(path / "metrics.json", json.loads))
        if metrics.count("schema_version") != SCHEMA_VERSION:
            raise metrics.error("schema_version", f"is {metrics.count('schema_version')}; this version reads 1")
        if metrics.text("status") != "finished":
            raise metrics.error("status", f"is {metrics.text('status')!r}; only a finished run has a card")
        return cls(
            path=path,
            config=Fields(*_load(path / "config.json", json.loads)),
            recipe=Fields(*_load(path / "recipe.yaml", yaml.safe_load)),
            metrics=metrics,
            steps=_read_steps(path / "predictions.jsonl"),
            reports=_read_reports(path),
        )

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.path.resolve().name

    @property
    def metric(self) -> str:
        """Name of the task's metric, for example `accuracy`."""
        return self.metrics.section("task").text("metric")

    @property
    def metric_title(self) -> str:
        """The metric's name as the title of a column."""
        return "Squared error" if self.metric == "error" else self.metric.replace("_", " ").capitalize()


def _load(path: Path, parse: Callable[[str], Any]) -> tuple[str, Any]:
    try:
        return str(path), parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CardError(f"{path}: no such file; a card is drawn from a finished run") from error
    except OSError as error:
        raise CardError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CardError(f"{path}: must be UTF-8 text: {error.reason} at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise CardError(f"{path}: line {error.lineno}: not valid JSON: {error.msg}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        raise CardError(f"{path}: {line}not valid YAML: {getattr(error, 'problem', None) or 'unreadable'}") from error


def _read_steps(path: Path) -> tuple[tuple[int, bool], ...]:
    if not path.exists():
        return ()
    # Not splitlines: a string in JSON may hold a line separator that str.splitlines would break at.
    _, lines = _load(path, lambda content: content.split("\n"))
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = Fields(f"{path}: line {number}", json.loads(line))
        except json.JSONDecodeError as error:
            raise CardError(f"{path}: line {number}: not valid JSON: {error.msg}") from error
        steps = record.maybe_count("steps")
        if steps is not None:
            found.append((steps, record.content.get("correct") is True))
    return tuple(found)
