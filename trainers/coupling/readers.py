"""Knowledge pieces from data sets: one reader for each, every row checked.

Each reader takes the fields of the data set as they stand on the Hub or in the original release. A mistake in a row is
a `UserError` that names file, row and field. A supporting fact that points outside its context, which the published
sets contain, is no mistake of the user: it is left out and counted.
"""

import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from transformers.utils import logging

from ..errors import UserError, did_you_mean
from ..tasks.loading import SUFFIXES, Row, read_file, read_hub
from .pieces import CATEGORIES, KnowledgePiece, check_unique, find_phrase, make_cloze

logger = logging.get_logger(__name__)


@dataclass
class PieceSet:
    """What a reader returns.

    Attributes:
        pieces: in the order of the rows.
        source: data set or files they came from.
        rows: number of rows read.
        left_out: reason -> number of facts of the source that gave no piece.
    """

    pieces: list[KnowledgePiece]
    source: str
    rows: int
    left_out: dict[str, int] = field(default_factory=dict)


class Reader(ABC):
    """Turns the rows of one data set into knowledge pieces.

    Class attributes:
        name: as `--dataset` takes it.
        about: what the pieces are, in one line.
        hub_id, hub_config: where `datasets.load_dataset` finds it; no `hub_id` means local files only.
        files: glob patterns of local files below `data_dir`; `{split}` stands for the split.
        default_split: the split taken when none is asked for.
        id_fields: names of the field that identifies a row, the first present counts; none: the row's number.
    """

    name: ClassVar[str]
    about: ClassVar[str]
    hub_id: ClassVar[str | None] = None
    hub_config: ClassVar[str | None] = None
    files: ClassVar[tuple[str, ...]] = ("{split}.jsonl", "{split}.json")
    default_split: ClassVar[str] = "validation"
    id_fields: ClassVar[tuple[str, ...]] = ("id", "_id")

    def __init__(self):
        self.left_out: Counter[str] = Counter()
        self._facts: set[tuple[str, str]] = set()

    @abstractmethod
    def parse(self, row: Row) -> Iterator[KnowledgePiece]:
        """The pieces of one row.

        Raises:
            UserError: through `Row.error`, if a field is missing or breaks a rule.
        """

    def read(
        self, data_dir: str | Path | None = None, split: str | None = None, max_samples: int | None = None
    ) -> PieceSet:
        """Read pieces from the Hub, or from local files with the same fields.

        Args:
            data_dir: folder with the data set's files, or one file.
            split: default is the reader's own.
            max_samples: take the pieces of the first so many rows.

        Raises:
            UserError: for a missing folder, file or split, a row that breaks a rule, or a set without pieces.
        """
        split = split or self.default_split
        rows, source = self._rows(data_dir, split)
        pieces: list[KnowledgePiece] = []
        ids: dict[str, int] = {}
        count = 0
        for row in rows:
            if max_samples is not None and count >= max_samples:
                break
            count += 1
            name = self.row_id(row)
            if name in ids:
                raise row.error("id", f"{name!r} is also the id of row {ids[name]}")
            ids[name] = row.number
            pieces.extend(self.parse(row))
        what = ", ".join(f"{number} {reason}" for reason, number in sorted(self.left_out.items()))
        if not pieces:
            left_out = f"; left out {what}" if what else ""
            raise UserError(f"{source}: {count} row(s) gave no knowledge piece{left_out}")
        check_unique(pieces)
        if what:
            logger.info(f"{self.name}: left out {what}")
        return PieceSet(pieces, source, count, dict(self.left_out))

    def row_id(self, row: Row) -> str:
        """The id that a row gives itself, else a name from split and number."""
        for name in self.id_fields:
            if name in row.values:
                value = row.values[name]
                if type(value) is int:
                    return str(value)
                return row.text(name)
        return row.name

    def is_new(self, prompt: str, answer: str) -> bool:
        """Whether the fact has not been seen before; a repeated one is counted. Used where rows share their hops."""
        if (prompt, answer) in self._facts:
            self.left_out["repeated facts"] += 1
            return False
        self._facts.add((prompt, answer))
        return True

    def _rows(self, data_dir: str | Path | None, split: str) -> tuple[Iterator[Row], str]:
        if data_dir is None:
            if self.hub_id is None:
                raise UserError(f"--dataset {self.name}: needs --data_dir, a folder or file with its rows")
            return read_hub(self.hub_id, self.hub_config, None, split), f"{self.hub_id} ({split})"
        paths = self._paths(Path(data_dir).expanduser(), split)
        source = f"local files of {self.name}: {', '.join(path.name for path in paths)}"
        return (
            Row(row.source, path.stem if len(paths) > 1 else split, row.number, row.values)
            for path in paths
            for row in read_file(path, split)
        ), source

    def _paths(self, where: Path, split: str) -> list[Path]:
        if where.is_file():
            if where.suffix not in SUFFIXES:
                raise UserError(f"--data_dir: {where} is neither .jsonl nor .json")
            return [where]
        if not where.is_dir():
            raise UserError(f"--data_dir: {where} does not exist")
        patterns = [pattern.format(split=split) for pattern in self.files]
        for pattern in patterns:
            found = sorted(path for path in where.glob(pattern) if path.is_file())
            if found:
                return found
        there = sorted(path.relative_to(where).as_posix() for path in where.rglob("*.json*"))[:10]
        raise UserError(
            f"--data_dir: {where} holds no {' or '.join(patterns)} for {self.name}; there is {', '.join(there) or 'no'}"
            " JSON file"
        )


class HotpotQA(Reader):
    """One piece for each supporting sentence (Yang et al. 2018, arXiv:1809.09600).

    If the answer occurs in the sentence, the piece is the sentence with the answer blanked. Otherwise, in a bridge
    question, the title of another supporting paragraph that occurs in it is the hop's own answer and is blanked. Else
    the question is asked with the sentence in front. A row without context gives its question as the one piece.
    """

    name = "hotpotqa"
    about = "supporting sentences with the answer, or the bridge to the next hop, blanked"
    hub_id, hub_config = "hotpotqa/hotpot_qa", "distractor"

    def parse(self, row: Row) -> Iterator[KnowledgePiece]:
        pot, question, answer = self.row_id(row), row.text("question"), row.text("answer")
        kind = row.text("type") if "type" in row.values else None
        if "context" not in row.values:
            yield KnowledgePiece(f"{pot}_question", question, answer, pot=pot, group=kind)
            return
        context = _paragraphs(row)
        facts = _supporting_facts(row)
        titles = list(dict.fromkeys(title for title, _ in facts))
        hop = 0
        for title, index in facts:
            if title not in context or not 0 <= index < len(context[title]):
                self.left_out["supporting facts outside their context"] += 1
                continue
            sentence = context[title][index].strip()
            if not sentence:
                self.left_out["empty supporting sentences"] += 1
                continue
            hop_answer = answer
            asked = make_cloze(sentence, answer)
            if asked is None and kind != "comparison":
                for other in titles:
                    found = find_phrase(other, sentence) if other != title else None
                    if found:
                        hop_answer, asked = found.group(), make_cloze(sentence, other)
                        break
            yield KnowledgePiece(
                f"{pot}_hop_{hop}",
                asked or f"{sentence} {question}",
                hop_answer,
                supporting_fact=sentence,
                pot=pot,
                group=kind,
                role="hop",
            )
            hop += 1


class MuSiQue(Reader):
    """One piece for each single-hop question of the decomposition (Trivedi et al. 2022, arXiv:2108.00573).

    "#1" in a later hop is replaced by the answer of the first, and "subject >> relation" is put as a question.
    """

    name = "musique"
    about = "single-hop questions of the decomposition, each with its own answer"
    hub_id = "dgslibisey/MuSiQue"

    def parse(self, row: Row) -> Iterator[KnowledgePiece]:
        pot = self.row_id(row)
        row.text("question")
        paragraphs = row.get("paragraphs", list, "a list of paragraphs") if "paragraphs" in row.values else []
        answers: list[str] = []
        for number, hop in enumerate(_items(row, "question_decomposition")):
            where = f"question_decomposition[{number}]"
            question = row.check_text(f"{where}.question", hop.get("question"))
            answer = row.check_text(f"{where}.answer", hop.get("answer"))
            for earlier in range(len(answers), 0, -1):
                question = question.replace(f"#{earlier}", answers[earlier - 1])
            answers.append(answer)
            subject, arrow, relation = question.partition(">>")
            if arrow:
                question = _relation_question(subject, relation)
            yield KnowledgePiece(
                f"{pot}_hop_{number}",
                question,
                answer,
                supporting_fact=self._paragraph(row, f"{where}.paragraph_support_idx", hop, paragraphs),
                pot=pot,
                group=f"{len(row.values['question_decomposition'])} hops",
                role="hop",
            )

    def _paragraph(self, row: Row, where: str, hop: dict[str, Any], paragraphs: list[Any]) -> str | None:
        index = hop.get("paragraph_support_idx")
        if index is None or not paragraphs:
            return None
        if type(index) is not int or not 0 <= index < len(paragraphs):
            raise row.error(where, f"must be the number of one of the {len(paragraphs)} paragraphs, got {index!r}")
        paragraph = paragraphs[index]
        if not isinstance(paragraph, dict):
            raise row.error(f"paragraphs[{index}]", "must be an object with paragraph_text")
        return row.check_text(f"paragraphs[{index}].paragraph_text", paragraph.get("paragraph_text"))


class TwoWikiMultiHopQA(Reader):
    """One piece for each evidence triple (Ho et al. 2020, arXiv:2011.01060).

    (subject, relation, object) becomes "What is the relation of subject?" with the object as the answer; the
    supporting sentence that holds the object is kept beside it.
    """

    name = "2wikimultihopqa"
    about = "evidence triples as single-hop questions, each with its own answer"
    hub_id = "framolfese/2WikiMultihopQA"

    def parse(self, row: Row) -> Iterator[KnowledgePiece]:
        pot = self.row_id(row)
        row.text("question")
        sentences = []
        if "context" in row.values and "supporting_facts" in row.values:
            context = _paragraphs(row)
            for title, index in _supporting_facts(row):
                if title in context and 0 <= index < len(context[title]):
                    sentences.append(context[title][index].strip())
                else:
                    self.left_out["supporting facts outside their context"] += 1
        triples = row.get("evidences", list, "a list of [subject, relation, object]")
        for number, triple in enumerate(triples):
            where = f"evidences[{number}]"
            if not isinstance(triple, list) or len(triple) != 3:
                raise row.error(where, f"must be [subject, relation, object], got {triple!r}"[:200])
            subject, relation, answer = (row.check_text(where, value) for value in triple)
            yield KnowledgePiece(
                f"{pot}_hop_{number}",
                _relation_question(subject, relation),
                answer,
                supporting_fact=next((sentence for sentence in sentences if find_phrase(answer, sentence)), None),
                pot=pot,
                group=relation,
                role="hop",
            )


class WikiHop(Reader):
    """One piece for each query (Welbl et al. 2018, arXiv:1710.06481), whose first word is the relation."""

    name = "wikihop"
    about = "relation and subject as a question; a support document with the answer beside it"

    def parse(self, row: Row) -> Iterator[KnowledgePiece]:
        pot, answer = self.row_id(row), row.text("answer")
        relation, _, subject = row.text("query").partition(" ")
        if not subject.strip():
            raise row.error("query", f"must be a relation, a space and a subject, got {relation!r}")
        relation = relation.replace("_", " ")
        supports = row.get("supports", list, "a list of texts") if "supports" in row.values else []
        texts = [row.check_text(f"supports[{number}]", text) for number, text in enumerate(supports)]
        yield KnowledgePiece(
            f"{pot}_question",
            _relation_question(subject, relation),
            answer,
            supporting_fact=next((text for text in texts if find_phrase(answer, text)), None),
            pot=pot,
            group=relation,
        )


class Bamboogle(Reader):
    """One piece for each question (Press et al. 2022, arXiv:2210.03350)."""

    name = "bamboogle"
    about = "two-hop questions as they are"
    hub_id = "chiayewken/bamboogle"
    default_split = "test"
    id_fields = ("id",)

    def parse(self, row: Row) -> Iterator[KnowledgePiece]:
        name = self.row_id(row)
        yield KnowledgePiece(name, row.text("Question"), row.text("Answer"), pot=name)


class MQuAKE(Reader):
    """Edits, single hops and multi-hop questions (Zhong et al. 2023, arXiv:2305.14795).

    A case gives one piece for each requested edit (`new_answer` is its target), one for each single hop that is not
    an edit's own prompt, and one for the first phrasing of its question, whose `new_answer` holds after all edits.
    A fact that an earlier case gave already is left out.
    """

    name = "mquake"
    about = "edits with single hops and multi-hop questions that they ripple to"
    files = ("MQuAKE*.json", "{split}.json", "{split}.jsonl")
    id_fields = ("case_id",)

    def parse(self, row: Row) -> Iterator[KnowledgePiece]:
        pot = f"case-{self.row_id(row)}"
        for number, edit in enumerate(_items(row, "requested_rewrite")):
            where = f"requested_rewrite[{number}]"
            template = row.check_text(f"{where}.prompt", edit.get("prompt"))
            subject = row.check_text(f"{where}.subject", edit.get("subject"))
            if template.count("{}") != 1:
                raise row.error(f"{where}.prompt", f"must hold {{}} once, got {template!r}")
            prompt = template.replace("{}", subject)
            old, new = (_named(row, f"{where}.{side}", edit.get(side)) for side in ("target_true", "target_new"))
            if self.is_new(prompt, old):
                question = edit.get("question")
                yield KnowledgePiece(
                    f"{pot}_edit_{number}",
                    row.check_text(f"{where}.question", question) if question is not None else prompt,
                    old,
                    prompt=prompt,
                    pot=pot,
                    group=edit.get("relation_id"),
                    role="edit",
                    new_answer=new,
                )
        for number, hop in enumerate(_items(row, "single_hops")):
            where = f"single_hops[{number}]"
            prompt = row.check_text(f"{where}.cloze", hop.get("cloze"))
            answer = row.check_text(f"{where}.answer", hop.get("answer"))
            question = row.check_text(f"{where}.question", hop.get("question"))
            if self.is_new(prompt, answer):
                yield KnowledgePiece(f"{pot}_hop_{number}", question, answer, prompt=prompt, pot=pot, role="hop")
        questions = row.get("questions", list, "a list of texts")
        if not questions:
            raise row.error("questions", "must not be empty")
        question, answer = row.check_text("questions[0]", questions[0]), row.text("answer")
        if self.is_new(question, answer):
            new = row.text("new_answer")
            yield KnowledgePiece(f"{pot}_question", question, answer, pot=pot, role="portability", new_answer=new)


class KnowEdit(Reader):
    """Edits with queries that should follow (portability) and queries that should not (locality).

    Zhang et al. 2024, arXiv:2401.01286. The answer of an edit is the old one where a row has it, else the new one.
    A portability query's answer is the one that holds after the edit. Of several accepted answers the first is taken.
    """

    name = "knowedit"
    about = "edits with portability and locality queries (ZsRE, wiki_counterfact, wiki_recent)"
    files = ("{split}.json", "{split}.jsonl", "*.json", "*/*.json")
    id_fields = ()

    def parse(self, row: Row) -> Iterator[KnowledgePiece]:
        pot = row.name
        prompt, new = row.text("prompt"), row.text("target_new")
        row.text("subject")
        old = _first_text(row, "ground_truth", row.values["ground_truth"]) if "ground_truth" in row.values else None
        if self.is_new(prompt, old or new):
            yield KnowledgePiece(
                f"{pot}_edit", prompt, old or new, prompt=prompt, pot=pot, role="edit", new_answer=new if old else None
            )
        for role in ("portability", "locality"):
            if row.values.get(role) is None:
                continue
            for kind, queries in row.get(role, dict, "an object of lists").items():
                if not isinstance(queries, list):
                    raise row.error(f"{role}.{kind}", "must be a list of {prompt, ground_truth}")
                for number, query in enumerate(queries):
                    where = f"{role}.{kind}[{number}]"
                    if not isinstance(query, dict):
                        raise row.error(where, "must be an object with prompt and ground_truth")
                    asked = row.check_text(f"{where}.prompt", query.get("prompt"))
                    answer = _first_text(row, f"{where}.ground_truth", query.get("ground_truth"))
                    if answer is None:
                        self.left_out["queries without an answer"] += 1
                    elif self.is_new(asked, answer):
                        name = f"{pot}_{role}_{kind}_{number}"
                        yield KnowledgePiece(name, asked, answer, prompt=asked, pot=pot, group=kind, role=role)


class KnownFacts(Reader):
    """One piece for each known fact of ROME (Meng et al. 2022, arXiv:2202.05262), grouped by relation."""

    name = "known_1000"
    about = "single facts as prompts to continue, grouped by relation"
    files = ("known_1000.json", "{split}.json", "{split}.jsonl")
    id_fields = ("known_id",)

    def parse(self, row: Row) -> Iterator[KnowledgePiece]:
        name = f"known-{self.row_id(row)}"
        prompt, group = row.text("prompt"), row.text("relation_id")
        yield KnowledgePiece(name, prompt, row.text("attribute"), prompt=prompt, pot=name, group=group)


class PlainJsonLines(Reader):
    """Rows of the user's own: `question` and `answer`, and optionally the other fields of a piece."""

    name = "jsonl"
    about = "your own rows: question, answer; optional id, prompt, group, pot, category, supporting_fact, new_answer"
    files = ("*.jsonl", "*.json")
    optional: ClassVar[tuple[str, ...]] = (
        "prompt",
        "group",
        "pot",
        "category",
        "supporting_fact",
        "new_answer",
    )

    def parse(self, row: Row) -> Iterator[KnowledgePiece]:
        known = ("question", "answer", "id", *self.optional)
        for name in row.values:
            if name not in known:
                raise row.error(name, f"unknown field{did_you_mean(name, known)}; known: {', '.join(known)}")
        values = {name: row.text(name) for name in self.optional if row.values.get(name) is not None}
        if values.get("category", CATEGORIES[0]) not in CATEGORIES:
            raise row.error("category", f"{values['category']!r} is not one of {', '.join(CATEGORIES)}")
        yield KnowledgePiece(self.row_id(row), row.text("question"), row.text("answer"), **values)


READERS: dict[str, type[Reader]] = {
    reader.name: reader
    for reader in (
        HotpotQA,
        MuSiQue,
        TwoWikiMultiHopQA,
        WikiHop,
        Bamboogle,
        MQuAKE,
        KnowEdit,
        KnownFacts,
        PlainJsonLines,
    )
}


def read_pieces(
    dataset: str, data_dir: str | Path | None = None, split: str | None = None, max_samples: int | None = None
) -> PieceSet:
    """Read knowledge pieces by data set name, or from a `.jsonl` file of the user's own.

    Args:
        dataset: a key of `READERS`, or the path of a `.jsonl` or `.json` file with the fields of `jsonl`.
        data_dir: folder or file with the rows; without it they come from the Hub.
        split: default is the reader's own.
        max_samples: take the pieces of the first so many rows.

    Raises:
        UserError: for an unknown name and whatever is wrong with the rows.
    """
    if max_samples is not None and max_samples < 1:
        raise UserError(f"--max_samples is {max_samples}; it must be at least 1")
    if dataset not in READERS and dataset.endswith(SUFFIXES):
        dataset, data_dir = "jsonl", dataset
    if dataset not in READERS:
        raise UserError(
            f"--dataset: unknown data set {dataset!r}{did_you_mean(dataset, READERS)}; known: {', '.join(READERS)}, or "
            "the path of a .jsonl file"
        )
    return READERS[dataset]().read(data_dir, split, max_samples)


def _relation_question(subject: str, relation: str) -> str:
    """A relation as a question: a noun ("capital") is asked for, a participle ("located in") is completed."""
    subject, relation = subject.strip(), relation.strip()
    if relation.partition(" ")[0].endswith("ed"):
        return f"{subject} is {relation} what?"
    return f"What is the {relation} of {subject}?"


def _items(row: Row, name: str) -> list[dict[str, Any]]:
    items = row.get(name, list, "a list of objects")
    if not items:
        raise row.error(name, "must not be empty")
    for number, item in enumerate(items):
        if not isinstance(item, dict):
            raise row.error(f"{name}[{number}]", "must be an object")
    return items


def _named(row: Row, where: str, value: Any) -> str:
    if not isinstance(value, dict):
        raise row.error(where, "must be an object with the text under `str`")
    return row.check_text(f"{where}.str", value.get("str"))


def _first_text(row: Row, where: str, value: Any) -> str | None:
    """The first text of a value that is a text, or a list, or a list of lists of accepted answers."""
    while isinstance(value, list):
        if not value:
            return None
        value = value[0]
    if isinstance(value, str) and not value.strip():
        return None
    return row.check_text(where, value)


def _decoded(row: Row, name: str) -> Any:
    """A field that some copies of a data set store as JSON text."""
    value = row.values.get(name)
    if isinstance(value, str):
        try:
            return json.loads(value)
        except (ValueError, RecursionError) as error:
            raise row.error(name, f"must be a list, an object or JSON text of one: {error}") from error
    return value


def _paragraphs(row: Row) -> dict[str, list[str]]:
    """Title -> sentences, from the Hub's columns or the original release's pairs."""
    value = _decoded(row, "context")
    if isinstance(value, dict):
        names = next((key for key in ("sentences", "content") if key in value), None)
        if names is None or not isinstance(value.get("title"), list) or not isinstance(value[names], list):
            raise row.error("context", "must hold the lists `title` and `sentences`")
        if len(value["title"]) != len(value[names]):
            raise row.error("context", f"has {len(value['title'])} titles but {len(value[names])} lists of sentences")
        pairs = list(zip(value["title"], value[names], strict=True))
    elif isinstance(value, list):
        pairs = value
    else:
        raise row.error("context", "must be a list of [title, sentences], or an object with those two lists")
    paragraphs: dict[str, list[str]] = {}
    for number, pair in enumerate(pairs):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not isinstance(pair[1], list):
            raise row.error(f"context[{number}]", "must be [title, list of sentences]")
        title, sentences = pair
        if not isinstance(title, str) or not all(isinstance(sentence, str) for sentence in sentences):
            raise row.error(f"context[{number}]", "title and sentences must be texts")
        paragraphs.setdefault(title, sentences)
    return paragraphs


def _supporting_facts(row: Row) -> list[tuple[str, int]]:
    """(title, sentence number) pairs without repetitions, from the Hub's columns or the original release's pairs."""
    value = _decoded(row, "supporting_facts")
    if isinstance(value, dict):
        titles, numbers = value.get("title"), value.get("sent_id")
        if not isinstance(titles, list) or not isinstance(numbers, list) or len(titles) != len(numbers):
            raise row.error("supporting_facts", "must hold the lists `title` and `sent_id`, equally long")
        pairs = list(zip(titles, numbers, strict=True))
    elif isinstance(value, list):
        pairs = [tuple(pair) if isinstance(pair, list) else pair for pair in value]
    else:
        raise row.error("supporting_facts", "must be a list of [title, number], or an object with those two lists")
    for number, pair in enumerate(pairs):
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) and type(pair[1]) is int):
            raise row.error(f"supporting_facts[{number}]", "must be a title and the number of a sentence")
    return list(dict.fromkeys(pairs))
