"""Files appear whole or not at all, and hold what was written."""

import json

import pytest

from trainers.files import json_text, read_records, replacing, write_records, write_text


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "notes.txt"
    write_text(path, "first\nsecond\n")
    assert path.stat().st_mode & 0o777 == 0o644

    def write_half():
        with replacing(path) as aside:
            aside.write_text("half")
            raise RuntimeError("full")

    with pytest.raises(RuntimeError, match="full"):
        write_half()
    assert path.read_text() == "first\nsecond\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["notes.txt"]


def test_json_has_no_nan():
    text = json_text({"loss": float("nan"), "history": [1.0, float("-inf")], "name": "é"})
    assert json.loads(text) == {"loss": None, "history": [1.0, None], "name": "é"}
    assert "é" in text


def test_records_come_back_whatever_characters_they_hold(tmp_path):
    records = [{"prediction": "a\u2028b\x85c\nd"}, {"prediction": float("nan")}]
    write_records(tmp_path / "predictions.jsonl", records)
    assert read_records(tmp_path / "predictions.jsonl") == [records[0], {"prediction": None}]
    assert "\u2028" in (tmp_path / "predictions.jsonl").read_text(encoding="utf-8")
