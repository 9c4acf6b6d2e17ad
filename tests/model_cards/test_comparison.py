"""The page of a comparison: text of others stays text, and nothing is said that the numbers do not hold."""

import json
from pathlib import Path

from markdown_it import MarkdownIt

from model_cards.comparison import comparison_card, main

SCORE = {"value": 0.5, "n": 40, "seeds": 5, "interval": [0.4, 0.6], "confidence": 0.95, "method": "-"}
TRIVIAL = {"name": 'always "A|B" <b>', "accuracy": {**SCORE, "value": 0.45}}


def result(model: str, **changes) -> dict:
    return {
        "task": "qa",
        "train_size": None,
        "model": model,
        "seeds": [0, 1, 2, 3, 4],
        "metric": "accuracy",
        "score": SCORE,
        "per_seed": [0.5] * 5,
        "standard_deviation_of_seeds": 0.01,
        "validation": 0.5,
        "trivial": TRIVIAL,
        "beats_trivial": False,
        "unparseable": 0.0,
        "mean_steps": None,
        "max_steps": None,
        "parameters": {"total": 1000, "trainable": 1000},
        "train_examples": 100,
        "updates": 10.0,
        "cost": {"flops_per_example": 3e6, "examples": 16},
    } | changes


def content(**changes) -> dict:
    about = {
        "architecture": "A",
        "model_type": "a",
        "matched_to": None,
        "own_training": {},
        "configuration": {"qa": {"hidden_size": 3}},
    }
    pair = {
        "task": "qa",
        "train_size": None,
        "first": "ours",
        "second": "theirs",
        "seeds": [0, 1, 2, 3, 4],
        "difference": {**SCORE, "value": 0.0, "interval": [-0.1, 0.1]},
        "p_value": 0.9,
        "p_value_holm": 0.9,
        "effect": {"cohens_h": 0.0},
        "verdict": "no significant difference",
        "power": {
            "level": 0.05,
            "wished_difference": 0.05,
            "chance_with_these_seeds": 0.31,
            "seeds_for_wished": None,
            "seeds_for_observed": None,
            "wished_chance": 0.8,
        },
    }
    return {
        "schema_version": 1,
        "name": "made",
        "models": {"ours": about, "theirs": about | {"own_training": {"learning_rate": 0.1}}},
        "against": "theirs",
        "tasks": {
            "qa": {
                "source": "a | b",
                "license": "MIT",
                "test_examples": 40,
                "training": {"max_steps": 5},
                "same_data": True,
            }
        },
        "seeds": [0, 1, 2, 3, 4],
        "statistics": {"confidence": 0.95, "level": 0.05, "resamples": 100, "interval": "i", "test": "t"},
        "results": [result("ours", mean_steps=2.0, max_steps=3), result("theirs")],
        "comparisons": [pair],
        "parameters": [
            {
                "task": "qa",
                "train_size": None,
                "model": "ours",
                "against": "theirs",
                "relative_difference": 0.2,
                "within_tolerance": False,
            }
        ],
        "failed": [],
        "missing": [],
        "published": [],
        "claimed": [],
    } | changes


def tables(page: str) -> list[list[str]]:
    """The cells of every table row, as a Markdown reader sees them."""
    rows: list[list[str]] = []
    for token in MarkdownIt().enable("table").parse(page):
        if token.type == "tr_open":
            rows.append([])
        elif token.type == "inline" and rows and token.level > 2:
            rows[-1].append(token.content)
    return rows


def test_every_table_row_is_whole():
    page = comparison_card(content(), {"hardware": ["CPU"]})
    lines = [line for line in page.splitlines() if line.startswith("|")]
    assert len(tables(page)) == len([line for line in lines if not line.startswith("| ---")])
    assert {len(row) for row in tables(page)} == {8, 10, 9, 5}
    assert "<b>" not in page


def test_words_follow_the_numbers():
    page = comparison_card(content(), {})
    assert "No difference is significant" in page
    assert "+20.00 % (not matched)" in page
    assert "no number: more test examples are needed" in page
    assert "Settings of their own: `theirs` learning" in page
    assert "same largest budget" not in page
    assert "2.00 of 3" in page
    tasks = content()["tasks"]
    tasks["qa"]["same_data"] = False
    assert "did **not** all have the same data" in comparison_card(content(tasks=tasks), {})
    tasks["qa"]["training"]["early_stopping_patience"] = 3
    tasks["qa"]["same_data"] = True
    assert "same largest budget and rule for stopping early" in comparison_card(content(tasks=tasks), {})


def test_empty_comparison_is_said_to_be_empty():
    page = comparison_card(content(comparisons=[], parameters=[], missing=["qa/x/seed-1"]), {})
    assert "no two models" in page
    assert "1 runs are missing" in page
    assert "### Power" not in page


def test_command_reads_the_folder(tmp_path: Path, capsys):
    for name, value in (("comparison", content()), ("timings", {"schema_version": 1, "hardware": ["one core"]})):
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    assert main([str(tmp_path)]) == 0
    assert "Hardware: one core" in capsys.readouterr().out
    assert main([str(tmp_path), "--pictures", "pictures/accuracy.png"]) == 0
    assert "![Test score of every model with its interval; faint points are single seeds](pictures/accuracy.png)" in (
        capsys.readouterr().out
    )
    (tmp_path / "timings.json").write_text("[")
    assert main([str(tmp_path)]) == 2
    assert "timings.json: cannot be read" in capsys.readouterr().err
