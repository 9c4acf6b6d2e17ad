"""Tasks whose rows are stored: on the Hub, or in local files with the same fields."""

import dataclasses
import hashlib
import json
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from ..errors import UserError
from ..hub import limit_silence
from .base import SPLITS, Example, SplitReport, Task, TaskArguments, check_split
from .duplicates import NearDuplicates, question_key
from .tokenization import byte_level_bpe

logger = logging.get_logger(__name__)

SUFFIXES = (".jsonl", ".json")
MAX_LISTED_NAMES = 10


@dataclass(frozen=True)
class Row:
    """One row of a data set, with readers that name file, row and field of a bad value.

    Attributes:
        source: the file or Hub data set.
        split: the split of the source that the row belongs to.
        number: counted from 1; the line of a `.jsonl` file, the position in a `.json` array or Hub split.
        values: field name -> value.
    """

    source: str
    split: str
    number: int
    values: Mapping[str, Any]

    @property
    def name(self) -> str:
        """An id for a row without one: "train-17"."""
        return f"{self.split}-{self.number}"

    def error(self, field: str, rule: str) -> UserError:
        """The error to raise for a field that breaks a rule."""
        return UserError(f"{self.source}, row {self.number}, {field}: {rule}")

    def get(self, field: str, kind: type, expected: str) -> Any:
        """The value of a field that must be present and exactly of the given type."""
        if field not in self.values:
            raise self.error(field, f"missing; the row has {', '.join(map(str, self.values)) or 'no fields'}")
        value = self.values[field]
        if type(value) is not kind:
            raise self.error(field, f"must be {expected}, got {_shown(value)}")
        return value

    def text(self, field: str) -> str:
        """A text with something in it, without white space around it."""
        return self.check_text(field, self.get(field, str, "text"))

    def check_text(self, field: str, value: Any) -> str:
        """The same for a value found inside a field."""
        if not isinstance(value, str):
            raise self.error(field, f"must be text, got {_shown(value)}")
        if not value.strip():
            raise self.error(field, "must not be empty")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise self.error(field, f"holds half of a surrogate pair at character {error.start}") from error
        return value.strip()


class LaterQuestions:
    """The questions of a split that earlier splits must not hold, as hashes of the whole and of their pieces."""

    def __init__(self, questions: Iterable[str], similarity: float):
        texts = list(questions)
        self.keys = frozenset(map(question_key, texts))
        self.near = NearDuplicates(list(dict.fromkeys(texts)), similarity) if similarity < 1 else None


class StoredTask(Task):
    """A task with rows on the Hub or, with `data_dir`, in local files.

    Splits. The test split is the source's own and is never part of another; only where `test_fraction` says so, for
    data without one, that share of train is held out instead. A validation split of the source is used as it is;
    without one, `validation_fraction` of train is held out, chosen by a hash of `split_seed` and the question
    (so neither the order of the rows nor a library's random generator matters), and equal questions stay on one side.
    A train example whose question, apart from case and spacing, also occurs in validation or test is dropped, and so
    is one of validation that occurs in test. The same befalls near duplicates: questions whose five-character pieces
    have a Jaccard similarity of `near_duplicate_similarity` or more with those of a question of a later split (see
    [`~trainers.tasks.duplicates.NearDuplicates`]). Both are counted in the report and told in a warning. For these
    checks alone, train and validation read the later splits, and keep nothing of them but hashes.

    Teacher. With `teacher_answers` the targets of train, and of train alone, are replaced by the answers that another
    model gave to the same ids (knowledge distillation at the level of sequences, Kim and Rush 2016, arXiv:1606.07947).
    Examples without one are dropped and counted.

    Local files. `<name>.jsonl` (an object a line) or `<name>.json` (an array of objects) in `data_dir`, with the name
    of the split, or another that `local_names` allows. `data_dir` goes before `hub_id`.
    """

    hub_id: ClassVar[str | None]
    hub_config: ClassVar[str | None] = None
    hub_revision: ClassVar[str | None] = None
    hub_has_validation: ClassVar[bool] = False
    hub_splits: ClassVar[dict[str, str]] = {split: split for split in SPLITS}
    """Names on the Hub of the splits that are taken for train, validation and test."""
    local_names: ClassVar[dict[str, tuple[str, ...]]] = {split: (split,) for split in SPLITS}
    id_field: ClassVar[str] = "id"
    near_duplicate_similarity: ClassVar[float] = 0.8
    max_source_length: ClassVar[int]
    max_target_length: ClassVar[int]

    def __init__(self, arguments: TaskArguments):
        super().__init__(arguments)
        self._splits: dict[str, list[Example]] = {}
        self._reports: dict[str, SplitReport] = {}
        self._later: dict[str, LaterQuestions] = {}

    def default_arguments(self) -> dict[str, Any]:
        return {
            "hub_id": self.hub_id,
            "hub_config": self.hub_config,
            "hub_revision": self.hub_revision,
            "near_duplicate_similarity": self.near_duplicate_similarity,
            "max_source_length": self.max_source_length,
            "max_target_length": self.max_target_length,
        }

    @property
    def source(self) -> str:
        if self.arguments.data_dir is not None:
            return f"local files with the fields of {self.hub_id}"
        config = f" ({self.arguments.hub_config})" if self.arguments.hub_config else ""
        revision = f" at {self.arguments.hub_revision}" if self.arguments.hub_revision else ""
        return f"{self.arguments.hub_id}{config}{revision}"

    @property
    def dataset_id(self) -> str | None:
        return self.arguments.hub_id if self.arguments.data_dir is None else None

    @abstractmethod
    def parse(self, row: Row) -> Example:
        """Check a row and turn it into an example.

        Raises:
            UserError: through [`Row.error`], if a field is missing or breaks a rule.
        """

    def question(self, example: Example) -> str:
        """The text by which two examples count as the same question."""
        return example.prompt

    def rows(self, split: str) -> list[Example]:
        check_split(split)
        if split not in self._splits:
            self._load(split)
        return self._splits[split]

    def report(self, split: str) -> SplitReport:
        self.rows(split)
        return self._reports[split]

    def build_tokenizer(self, train_examples: Sequence[Example], vocab_size: int) -> PreTrainedTokenizerFast:
        texts = (text for example in train_examples for text in (example.prompt, example.target))
        return byte_level_bpe(texts, vocab_size, model_max_length=self.source_limit)

    def gather(self, split: str, examples: list[Example]) -> list[Example]:
        """The examples of a split as they are kept; a task may join those of one question here."""
        return examples

    def _load(self, split: str) -> None:
        if split != "test" and not self._has_validation():
            self._hold_out()
        else:
            examples = self._candidates(split)
            later = [self._questions_of(name) for name in SPLITS[SPLITS.index(split) + 1 :]]
            self._keep(split, examples, self._leaks(examples, later))

    def _candidates(self, split: str) -> list[Example]:
        """The examples of a split before leaks are dropped."""
        fraction = self.arguments.test_fraction
        if fraction is None or split == "validation":
            return self._read(split)
        if self.arguments.data_dir is not None:
            found = find_file(Path(self.arguments.data_dir).expanduser(), self.local_names["test"])
            if found is not None:
                raise UserError(f"task.test_fraction: leave it out, since {found} is the test split")
        examples = self._read("train")
        keys = sorted(set(map(self._key, examples)), key=self._shuffled)
        count = round(len(keys) * fraction)
        if not 0 < count < len(keys):
            raise UserError(f"task.test_fraction: {fraction} of {len(keys)} questions leaves train or test empty")
        chosen = set(keys[:count])
        return [example for example in examples if (self._key(example) in chosen) == (split == "test")]

    def _hold_out(self) -> None:
        """Divide the train split into train and validation."""
        examples = self._candidates("train")
        test = self._questions_of("test")
        leaks = self._leaks(examples, [test])
        clean = {key for key in map(self._key, examples) if key not in leaks}
        if not clean:
            raise UserError(f"{self.name}: every train question occurs in the test split; nothing is left")
        count = round(len(clean) * self.arguments.validation_fraction)
        if not 0 < count < len(clean):
            raise UserError(
                f"task.validation_fraction: {self.arguments.validation_fraction} of {len(clean)} questions leaves "
                "train or validation empty"
            )
        held_out = set(sorted(clean, key=self._shuffled)[:count])
        validation = [example for example in examples if self._key(example) in held_out]
        train = [example for example in examples if self._key(example) not in held_out]
        clean_train = [example for example in train if self._key(example) not in leaks]
        leaks |= self._leaks(clean_train, [LaterQuestions(map(self.question, validation), self._similarity)])
        self._keep("train", train, leaks)
        self._keep("validation", validation, {})

    def _keep(self, split: str, examples: list[Example], leaks: Mapping[bytes, str]) -> None:
        kept = [example for example in examples if self._key(example) not in leaks]
        near_leaked = sum(leaks.get(self._key(example)) == "near" for example in examples)
        leaked = len(examples) - len(kept) - near_leaked
        if leaked:
            logger.warning(f"{self.name}: dropped {leaked} {split} example(s) whose question occurs in a later split")
        if near_leaked:
            logger.warning(
                f"{self.name}: dropped {near_leaked} {split} example(s) whose question nearly occurs in a later split "
                f"(similarity {self._similarity:g} or more; task.near_duplicate_similarity: 1 keeps them)"
            )
        if not kept:
            raise UserError(f"{self.name}: every {split} question occurs in a later split; nothing is left")
        kept = self.gather(split, kept)
        most = self.arguments.max_samples(split)
        if most is not None and most < len(kept):
            chosen = set(
                sorted((example.id for example in kept), key=lambda name: self._shuffled(name.encode()))[:most]
            )
            kept = [example for example in kept if example.id in chosen]
        found = len(kept)
        if split == "train" and self.arguments.teacher_answers is not None:
            kept = self._taught(kept, Path(self.arguments.teacher_answers).expanduser())
        self._splits[split] = kept
        self._reports[split] = SplitReport(
            examples=len(kept),
            leaked=leaked,
            repeated=len(kept) - len({self._key(example) for example in kept}),
            near_leaked=near_leaked,
            without_teacher=found - len(kept),
        )

    def _taught(self, examples: list[Example], path: Path) -> list[Example]:
        """The examples with a teacher's answers as their targets; those without one are left out."""
        if path.suffix != ".jsonl" or not path.is_file():
            raise UserError(f"task.teacher_answers: {path} is no .jsonl file")
        answers = {row.text("id"): row.get("prediction", str, "text").strip() for row in read_file(path, "train")}
        taught = []
        for example in examples:
            answer = answers.get(example.id)
            if answer and (self.arguments.teacher_filter == "all" or self.score(answer, example).correct):
                taught.append(dataclasses.replace(example, target=answer))
        if not taught:
            raise UserError(f"task.teacher_answers: {path} holds no usable answer to any train example of {self.name}")
        return taught

    @property
    def _similarity(self) -> float:
        similarity = self.arguments.near_duplicate_similarity
        return self.near_duplicate_similarity if similarity is None else similarity

    def _key(self, example: Example) -> bytes:
        return question_key(self.question(example))

    def _leaks(self, examples: Sequence[Example], later: "Sequence[LaterQuestions]") -> dict[bytes, str]:
        """Key of each question that occurs ("exact") or nearly occurs ("near") in a later split."""
        questions = {self._key(example): self.question(example) for example in examples} if later else {}
        found: dict[bytes, str] = {}
        for key, question in questions.items():
            if any(key in split.keys for split in later):
                found[key] = "exact"
            elif any(split.near is not None and question in split.near for split in later):
                found[key] = "near"
        return found

    def _questions_of(self, split: str) -> "LaterQuestions":
        """The questions of a split of the source, as hashes."""
        if split not in self._later:
            self._later[split] = LaterQuestions(map(self.question, self._candidates(split)), self._similarity)
        return self._later[split]

    def _shuffled(self, key: bytes) -> bytes:
        """Sort key of a seeded permutation."""
        return hashlib.sha256(f"{self.arguments.split_seed}:".encode() + key).digest()

    def _read(self, split: str) -> list[Example]:
        """Every row of a split of the source, checked."""
        examples: list[Example] = []
        rows: dict[str, int] = {}
        for row in self._source_rows(split):
            example = self.parse(row)
            if example.id in rows:
                raise row.error(self.id_field, f"{example.id!r} is also the id of row {rows[example.id]}")
            rows[example.id] = row.number
            examples.append(example)
        return examples

    def _has_validation(self) -> bool:
        """Whether the source has a validation split of its own."""
        if self.arguments.data_dir is None:
            return self.hub_has_validation
        return find_file(Path(self.arguments.data_dir).expanduser(), self.local_names["validation"]) is not None

    def _source_rows(self, split: str) -> Iterator[Row]:
        if self.arguments.data_dir is None:
            arguments = self.arguments
            if arguments.hub_id is None:
                raise UserError(f"task.data_dir: {self.name} needs a folder with the data, or task.hub_id")
            name = self.hub_splits[split]
            return read_hub(arguments.hub_id, arguments.hub_config, arguments.hub_revision, name, split)
        folder, names = Path(self.arguments.data_dir).expanduser(), self.local_names[split]
        path = find_file(folder, names)
        if path is None:
            wanted = " or ".join(name + suffix for name in names for suffix in SUFFIXES)
            raise UserError(f"{folder}: the {split} split of {self.name} needs {wanted}; there {_listing(folder)}")
        return read_file(path, split)


def find_file(folder: Path, names: Sequence[str]) -> Path | None:
    """The file of the first name that exists in the folder, with either suffix, or `None`.

    Raises:
        UserError: if the folder does not exist, or holds one name with both suffixes.
    """
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        nearest = next(parent for parent in folder.absolute().parents if parent.is_dir())
        raise UserError(f"task.data_dir: {folder} {what}; in {nearest} {_listing(nearest)}")
    for name in names:
        found = [folder / (name + suffix) for suffix in SUFFIXES if (folder / (name + suffix)).is_file()]
        if len(found) > 1:
            raise UserError(f"{folder}: holds both {found[0].name} and {found[1].name}; keep one of them")
        if found:
            return found[0]
    return None


def read_file(path: Path, split: str) -> Iterator[Row]:
    """The rows of a UTF-8 file: an object a line (`.jsonl`, empty lines are skipped) or one array of objects (`.json`).

    Raises:
        UserError: naming file and row (or line) of what cannot be read, and for a file without rows.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: not UTF-8: {error.reason}") from error
    if path.suffix == ".jsonl":
        # Not splitlines(): it also breaks at characters that JSON allows inside a string, such as U+2028.
        lines = text.split("\n")
        values = [(number, _parse_json(line, path, number)) for number, line in enumerate(lines, 1) if line.strip()]
    else:
        array = _parse_json(text, path, 1)
        if not isinstance(array, list):
            raise UserError(f"{path}: must be an array of objects, got {_shown(array)}")
        values = list(enumerate(array, 1))
    if not values:
        raise UserError(f"{path}: holds no rows")
    for number, value in values:
        if not isinstance(value, dict):
            raise UserError(f"{path}, row {number}: must be an object, got {_shown(value)}")
        yield Row(str(path), split, number, value)


def read_hub(
    hub_id: str, config: str | None, revision: str | None, hub_split: str, split: str | None = None
) -> Iterator[Row]:
    """The rows of a split of a data set on the Hub, or of its cached copy.

    Args:
        hub_split: the split's name on the Hub.
        split: the split it is taken for, where that differs.

    Raises:
        UserError: in one line, whatever goes wrong: no network, no such data set, configuration, revision or split; and
            for a split without rows.
    """
    import datasets  # takes seconds to import, and local files do without it

    limit_silence()
    name = f"{hub_id} ({hub_split})"
    try:
        rows = datasets.load_dataset(hub_id, config, revision=revision, split=hub_split)
    except Exception as error:  # a dozen unrelated classes: connection, HTTP, builder, parsing, missing files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{name}: could not be loaded from the Hub ({reason}); with local files of the same fields, use --data_dir"
        ) from error
    if not len(rows):
        raise UserError(f"{name}: holds no rows")
    for number, values in enumerate(rows, 1):
        yield Row(name, split or hub_split, number, values)


def _parse_json(text: str, path: Path, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise UserError(f"{path}, line {line}: not valid JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or thousands of brackets
        raise UserError(f"{path}, line {first_line}: cannot be read as JSON: {error}") from error


def _shown(value: Any) -> str:
    names = {
        str: "text",
        bool: "a truth value",
        int: "a whole number",
        float: "a number",
        list: "a list",
        dict: "an object",
    }
    kind = "null" if value is None else names.get(type(value), type(value).__name__)
    shown = repr(value)
    return kind if len(shown) > 40 or value is None else f"{kind} ({shown})"


def _listing(folder: Path) -> str:
    names = sorted(entry.name + ("/" if entry.is_dir() else "") for entry in folder.iterdir())
    more = f" and {len(names) - MAX_LISTED_NAMES} more" if len(names) > MAX_LISTED_NAMES else ""
    return f"is {', '.join(names[:MAX_LISTED_NAMES])}{more}" if names else "is nothing"
