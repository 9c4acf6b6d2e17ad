"""Readers: what pieces each data set gives, and a clear line for every row that breaks a rule."""

import copy
import json
from pathlib import Path

import pytest

from trainers.coupling import READERS, read_pieces
from trainers.errors import UserError

DATA = Path(__file__).parents[2] / "data" / "coupling"


def read(name: str, **arguments):
    return read_pieces(name, DATA / name, **arguments)


def test_hotpotqa():
    found = read("hotpotqa")
    assert found.rows == 2
    assert found.left_out == {"supporting facts outside their context": 1}
    first, second, third, fourth = found.pieces
    # The hop's own answer is the title of the other paragraph.
    assert first.prompt == "Fill in the blank: Grenmill Press was founded by ___. Answer:"
    assert (first.answer, first.role, first.pot, first.group) == ("Ada Thorne", "hop", "h1", "bridge")
    assert second.question == "Fill in the blank: She lives in the town of ___; ___ lies north."
    assert second.answer == "Oakhaven"
    # A comparison offers no blank: the question with the fact in front.
    assert third.question == "Lake Ure lies near Lake Sill. Are Lake Ure and Lake Sill in the same country?"
    assert (third.answer, fourth.answer) == ("no", "no")
    assert [piece.piece_id for piece in found.pieces] == ["h1_hop_0", "h1_hop_1", "h2_hop_0", "h2_hop_1"]


def test_hotpotqa_original_layout_and_without_context(tmp_path):
    row = json.loads((DATA / "hotpotqa" / "validation.jsonl").read_text().splitlines()[0])
    facts, context = row["supporting_facts"], row["context"]
    original = row | {
        "_id": row.pop("id"),
        "supporting_facts": [list(pair) for pair in zip(facts["title"], facts["sent_id"], strict=True)],
        "context": [list(pair) for pair in zip(context["title"], context["sentences"], strict=True)],
    }
    as_text = original | {"_id": "t", "context": json.dumps(original["context"])}
    bare = {key: row[key] for key in ("question", "answer", "type")}
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([original, as_text, bare]))
    pieces = read_pieces("hotpotqa", path).pieces
    assert [piece.prompt for piece in pieces[:2]] == [piece.prompt for piece in read("hotpotqa").pieces[:2]]
    assert [piece.prompt for piece in pieces[2:4]] == [piece.prompt for piece in pieces[:2]]
    assert (pieces[4].piece_id, pieces[4].question) == ("validation-3_question", row["question"])


def test_musique():
    found = read("musique")
    assert found.rows == 2
    assert len(found.pieces) == 4
    first, second = found.pieces[:2]
    assert (
        first.question == "Gmina Stężyca, Lublin Voivodeship is located in the administrative territorial entity what?"
    )
    assert first.answer == "Ryki County"
    assert second.question == "What is the contains administrative territorial entity of Ryki County?"
    assert found.pieces[3].question == "Where is Golestan Province located?"  # "#1" is the first hop's answer
    assert all(piece.supporting_fact for piece in found.pieces)
    assert first.pot == second.pot != found.pieces[2].pot


def test_2wikimultihopqa():
    found = read("2wikimultihopqa")
    assert [(piece.question, piece.answer, piece.supporting_fact) for piece in found.pieces] == [
        ("What is the director of The Tin Lark?", "Ola Brandt", "The Tin Lark is a film by Ola Brandt."),
        ("What is the date of birth of Ola Brandt?", "3 May 1951", "Ola Brandt was born on 3 May 1951."),
    ]
    assert found.left_out == {"supporting facts outside their context": 1}


def test_bamboogle_and_wikihop():
    assert [piece.answer for piece in read("bamboogle").pieces] == ["Ada Thorne", "Lake Ure"]
    (piece,) = read("wikihop").pieces
    assert piece.question == "lake sill is located in what?"
    assert (piece.answer, piece.group) == ("norland", "located in")
    assert piece.supporting_fact == "Lake Sill is a lake in Norland ."


def test_mquake():
    found = read("mquake")
    assert found.rows == 2
    facts = [(piece.piece_id, piece.role, piece.prompt, piece.answer, piece.new_answer) for piece in found.pieces]
    home, asked = "The home town of {} is", "What is the home town of the director of {}? Answer:"
    assert facts == [
        ("case-11_edit_0", "edit", "The Tin Lark was directed by", "Ola Brandt", "Ada Thorne"),
        ("case-11_edit_1", "edit", home.format("Ada Thorne"), "Moss End", "Oakhaven"),
        ("case-11_hop_1", "hop", home.format("Ola Brandt"), "Sill", None),
        ("case-11_question", "portability", asked.format("The Tin Lark"), "Sill", "Oakhaven"),
        ("case-12_edit_0", "edit", "Green Moss was directed by", "Ola Brandt", "Ada Thorne"),
        ("case-12_question", "portability", asked.format("Green Moss"), "Sill", "Oakhaven"),
    ]
    # Each case repeats an edit's prompt as a hop; the second repeats an edit and a hop of the first as well.
    assert found.left_out == {"repeated facts": 4}


def test_knowedit():
    found = read("knowedit")
    assert found.rows == 3  # three files below the folder
    assert len({piece.pot for piece in found.pieces}) == 3
    first = found.pieces[0]
    assert (first.prompt, first.answer, first.new_answer) == (
        "Which family does Urefish belong to?",
        "Uridae",
        "Sillidae",
    )
    roles = [piece.role for piece in found.pieces if piece.pot == first.pot]
    assert roles == ["edit", "portability", "locality", "locality"]
    recent = [piece for piece in found.pieces if piece.pot.startswith("recent_train")]
    assert (recent[0].answer, recent[0].new_answer) == ("publisher", None)  # no old answer is given
    assert recent[1].answer == "Oakhaven"  # the first of a list of lists
    assert found.left_out == {"queries without an answer": 1}


def test_known_1000():
    found = read("known_1000", max_samples=2)
    assert len(found.pieces) == found.rows == 2
    assert [(piece.prompt, piece.answer, piece.group) for piece in found.pieces] == [
        ("The capital of France is", "Paris", "P1"),
        ("The capital of Italy is", "Rome", "P1"),
    ]


def test_plain_json_lines(tmp_path):
    path = tmp_path / "facts.jsonl"
    rows = [
        {"question": "Who wrote Emma?", "answer": "Jane Austen", "group": "books"},
        {"id": "x", "question": "Emma's author", "answer": " Jane Austen ", "prompt": "Emma was written by"},
    ]
    path.write_text("\n\n".join(map(json.dumps, rows)))
    for found in (read_pieces(str(path)), read_pieces("jsonl", path), read_pieces("jsonl", tmp_path)):
        first, second = found.pieces
        assert (first.piece_id, first.group, first.prompt) == ("validation-1", "books", "Who wrote Emma? Answer:")
        assert (second.piece_id, second.answer, second.prompt) == ("x", "Jane Austen", "Emma was written by")


BROKEN = [
    ("jsonl", {"qestion": "q"}, "qestion: unknown field; did you mean 'question'?"),
    ("jsonl", {"category": "Fish"}, "category: 'Fish' is not one of Person"),
    ("jsonl", {"answer": "  "}, "answer: must not be empty"),
    ("jsonl", {"answer": 3}, r"answer: must be text, got a whole number \(3\)"),
    ("hotpotqa", {"answer": None}, "answer: must be text, got null"),
    ("hotpotqa", {"context": 4}, "context: must be a list of"),
    ("hotpotqa", {"context": "[1"}, "context: must be a list, an object or JSON text"),
    ("hotpotqa", {"context": {"title": ["a"], "sentences": []}}, "context: has 1 titles but 0 lists"),
    ("hotpotqa", {"context": [["a", "b"]]}, r"context\[0\]: must be \[title, list of sentences\]"),
    ("hotpotqa", {"supporting_facts": {"title": ["a"]}}, "supporting_facts: must hold the lists"),
    ("hotpotqa", {"supporting_facts": [["a", "0"]]}, r"supporting_facts\[0\]: must be a title and the number"),
    ("musique", {"question_decomposition": []}, "question_decomposition: must not be empty"),
    ("musique", {"question_decomposition": [{"question": "q"}]}, r"question_decomposition\[0\]\.answer: must be text"),
    (
        "musique",
        {"question_decomposition": [{"question": "q", "answer": "a", "paragraph_support_idx": 99}]},
        r"question_decomposition\[0\]\.paragraph_support_idx: must be the number of one of the 20 paragraphs, got 99",
    ),
    ("2wikimultihopqa", {"evidences": [["a", "b"]]}, r"evidences\[0\]: must be \[subject, relation, object\]"),
    ("wikihop", {"query": "capital"}, "query: must be a relation, a space and a subject"),
    ("bamboogle", {"Answer": ""}, "Answer: must not be empty"),
    ("mquake", {"questions": []}, "questions: must not be empty"),
    ("mquake", {"requested_rewrite": [{"prompt": "x", "subject": "s"}]}, r"\[0\]\.prompt: must hold {} once, got 'x'"),
    ("knowedit", {"locality": {"Kind": [{"prompt": 1}]}}, r"locality\.Kind\[0\]\.prompt: must be text"),
    ("knowedit", {"portability": {"Kind": "x"}}, r"portability\.Kind: must be a list"),
    ("known_1000", {"relation_id": None}, "relation_id: must be text"),
    ("hotpotqa", {"context": {"titles": []}}, "context: must hold the lists `title` and `sentences`"),
    ("hotpotqa", {"context": [["a", [3]]]}, r"context\[0\]: title and sentences must be texts"),
    ("hotpotqa", {"supporting_facts": 3}, r"supporting_facts: must be a list of \[title, number\], or an object"),
    ("musique", {"question_decomposition": ["q"]}, r"question_decomposition\[0\]: must be an object"),
    ("musique", {"paragraphs": ["x"] * 20}, r"paragraphs\[\d+\]: must be an object with paragraph_text"),
    (
        "mquake",
        {"requested_rewrite": [{"prompt": "of {}", "subject": "s", "target_new": "x", "target_true": {"str": "y"}}]},
        r"requested_rewrite\[0\]\.target_new: must be an object with the text under `str`",
    ),
    ("knowedit", {"locality": {"Kind": ["x"]}}, r"locality\.Kind\[0\]: must be an object with prompt and ground_truth"),
]


@pytest.mark.parametrize(("name", "change", "message"), BROKEN)
def test_a_broken_row_is_named(tmp_path, name, change, message):
    if name == "jsonl":
        row = {"question": "q", "answer": "a"}
    else:
        path = next(path for path in sorted((DATA / name).rglob("*.json*")))
        text = path.read_text()
        row = json.loads(text.splitlines()[0]) if path.suffix == ".jsonl" else json.loads(text)[0]
    good = copy.deepcopy(row)
    for key in ("id", "_id", "case_id", "known_id"):
        if key in good:
            good[key] = 999 if isinstance(good[key], int) else "another"
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([good, row | change]))
    with pytest.raises(UserError, match=rf"rows\.json, row 2, .*{message}"):
        read_pieces(name, path)


def test_what_holds_no_fact_is_left_out_and_counted(tmp_path):
    path = tmp_path / "validation.json"
    row = {"id": "a", "question": "Who?", "answer": "Ada", "context": [["T", [" ", "Ada wrote."]]]}
    path.write_text(json.dumps([row | {"supporting_facts": [["T", 0], ["T", 1]]}]))
    found = read_pieces("hotpotqa", tmp_path)
    assert [piece.question for piece in found.pieces] == ["Fill in the blank: ___ wrote."]
    assert found.left_out == {"empty supporting sentences": 1}
    path.write_text(json.dumps([row | {"supporting_facts": [["T", 0]]}]))
    with pytest.raises(
        UserError, match=r"validation.json: 1 row\(s\) gave no knowledge piece; left out 1 empty supporting sentences$"
    ):
        read_pieces("hotpotqa", tmp_path)
    edit = {"prompt": "Ada lives in", "subject": "Ada", "target_new": "Sill", "ground_truth": [["  ", "Oakhaven"]]}
    queries = [{"prompt": "p", "ground_truth": " "}, {"prompt": "p", "ground_truth": [[]]}]
    path.write_text(json.dumps([edit | {"portability": None, "locality": {"Kind": queries}}]))
    found = read_pieces("knowedit", tmp_path)
    assert [(piece.answer, piece.new_answer) for piece in found.pieces] == [("Sill", None)], "without an old answer"
    assert found.left_out == {"queries without an answer": 2}
    hop = {"question": "q", "answer": "a", "paragraph_support_idx": 0}
    path.write_text(json.dumps([{"id": "a", "question": "q", "paragraphs": [], "question_decomposition": [hop]}]))
    assert read_pieces("musique", tmp_path).pieces[0].supporting_fact is None


def test_repeated_row_ids(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": "a", "question": "q", "answer": "x"}\n' * 2)
    with pytest.raises(UserError, match="row 2, id: 'a' is also the id of row 1"):
        read_pieces("jsonl", path)


def test_wrong_sources(tmp_path):
    (tmp_path / "other.json").write_text("[]")
    for arguments, message in [
        (("hotpot",), "unknown data set 'hotpot'; did you mean 'hotpotqa'"),
        (("mquake",), "--dataset mquake: needs --data_dir"),
        (("musique", tmp_path / "no"), "does not exist"),
        (("musique", tmp_path), r"holds no validation\.jsonl or validation\.json for musique; there is other\.json"),
        (("musique", tmp_path / "other.json"), "holds no rows"),
        (("musique", DATA / "README.md"), "neither .jsonl nor .json"),
        (("musique", None, None, 0), "at least 1"),
    ]:
        with pytest.raises(UserError, match=message):
            read_pieces(*arguments)


def test_every_reader_says_what_it_reads():
    assert all(reader.name == name and reader.about for name, reader in READERS.items())
