"""What must not happen: code of a stranger's repository runs, a token gets out, a page runs what a data set holds."""

import json
from pathlib import Path

import pytest
import yaml
from huggingface_hub import get_token
from transformers import AutoConfig, AutoModelForCausalLM, set_seed

from push_to_hub import main as push
from tests.browser import PLANTED, document_of, is_planted
from tests.trainers.coupling.tools import word_tokenizer
from trainers.couple import main as couple
from trainers.train import main as train

TOKEN = "hf_" + "PlAnTeDtOkEn" * 3
RECIPE = {
    "model": {"model_type": "vanilla_transformer", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    "task": {"name": "pointer_chase", "options": {"num_symbols": 5, "num_train": 32, "num_test": 8}},
    "training": {"max_steps": 2, "use_cpu": True, "disable_tqdm": True},
}
PIECES = [{"id": f"p{index}", "question": f"What is {word} ?", "answer": word} for index, word in enumerate("abcdef")]


def write_pieces(folder: Path) -> Path:
    path = folder / "pieces.jsonl"
    path.write_text("".join(json.dumps(piece) + "\n" for piece in PIECES))
    return path


def make_model(folder: Path) -> Path:
    """A folder with a tiny GPT-2 and a tokenizer for the pieces."""
    tokenizer = word_tokenizer([f"{piece['question']} {piece['answer']}" for piece in PIECES])
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": len(tokenizer)}
    set_seed(0)
    config = AutoConfig.for_model("gpt2", n_embd=16, n_layer=2, n_head=2, n_positions=64, **ids)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_token_stays_where_it_is(tmp_path, monkeypatch, capfd, caplog):
    """A token in the environment: no command prints it or writes it into a file, not even when it fails."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.chdir(tmp_path)
    caplog.set_level("DEBUG")
    assert get_token() == TOKEN
    Path("recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    pieces = ["--dataset", str(write_pieces(tmp_path))]
    assert train(["recipe.yaml", "--output_dir", "run"]) == 0
    assert train(["recipe.yaml", "--output_dir", "other", "--name_or_path", "someone/private"]) == 2
    assert couple(["--model", str(make_model(tmp_path / "model")), *pieces, "--output", "run/coupling"]) == 0
    assert couple(["--model", "someone/private", *pieces, "--output", "c"]) == 2
    assert push(["run", "someone/model", "--dry-run"]) == 0
    shown = capfd.readouterr()
    assert shown.err.count("someone/private") == 2
    assert TOKEN not in shown.out + shown.err + caplog.text
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 15
    for path in written:
        assert TOKEN.encode() not in path.read_bytes(), path
        assert TOKEN not in str(path)


def test_code_of_a_repository_does_not_run_unasked(tmp_path, capsys):
    """A folder whose configuration brings code: refused by every command that loads a model, and nothing has run."""
    folder = make_model(tmp_path / "model")
    proof = tmp_path / "it ran"
    (folder / "modeling_evil.py").write_text(f"from pathlib import Path\nPath({str(proof)!r}).touch()\n")
    config = json.loads((folder / "config.json").read_text())
    reference = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM"), "modeling_evil.Evil")
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "evil", "auto_map": reference}))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump({**RECIPE, "model": {"model_type": "vanilla_transformer", "pretrained": str(folder)}})
    )
    output = ["--output", str(tmp_path / "coupling")]
    assert couple(["--model", str(folder), "--dataset", str(write_pieces(tmp_path)), *output]) == 2
    assert train([str(recipe), "--output_dir", str(tmp_path / "run")]) == 2
    assert "error: " in capsys.readouterr().err
    assert not proof.exists()


@pytest.mark.parametrize("field", ["id", "question", "answer"])
def test_coupling_page_shows_data_and_runs_none(tmp_path, field):
    pieces = tmp_path / "pieces.jsonl"
    rows = [{**piece, field: f"{piece[field]} {PLANTED}"} for piece in PIECES]
    pieces.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = make_model(tmp_path / "<img src=x onerror=document.body.dataset.planted=1>")
    assert couple(["--model", str(model), "--dataset", str(pieces), "--output", str(tmp_path / "out")]) == 0
    document = document_of(tmp_path / "out" / "coupling.html")
    assert "<canvas" in document
    assert not is_planted(document)


def test_the_browser_would_have_run_it(tmp_path):
    page = tmp_path / "page.html"
    page.write_text(f"<!doctype html><title>x</title><body><p>{PLANTED}</p></body>")
    assert is_planted(document_of(page))


def test_internals_page_shows_data_and_runs_none(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for split, number in (("train", 8), ("dev", 4)):
        rows = [{"question": f"{PLANTED} {split} {index}?", "answer": index % 2 == 0} for index in range(number)]
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sections = {
        "model": {**RECIPE["model"], "max_position_embeddings": 128},
        "task": {"name": "strategyqa", "data_dir": str(data), "max_source_length": 100, "near_duplicate_similarity": 1},
        "tokenizer": {"vocab_size": 300},
        "training": RECIPE["training"],
        "tracking": {"every": 1},
    }
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(sections))
    assert train([str(recipe), "--output_dir", str(tmp_path / "run")]) == 0
    document = document_of(tmp_path / "run" / "internals" / "index.html")
    assert "data:image/png" in document
    assert not is_planted(document)
