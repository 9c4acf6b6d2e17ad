"""The coupling command from model folder to report folder, and every way to misuse it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, set_seed

from tests.trainers.coupling.tools import word_tokenizer
from trainers.couple import bytes_of, main
from trainers.coupling import Coupling, CouplingAnalyzer, read_pieces

ROOT = Path(__file__).resolve().parents[2]
ACCELERATE = ROOT / "recipes" / "accelerate_configs" / "multi_cpu.yaml"
FACTS = ROOT / "tests" / "data" / "coupling" / "facts.jsonl"
FILES = {"coupling.html", "coupling.safetensors", "coupling_report.json", "distribution.png", "heat_map.png"}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Folders with a tiny GPT-2 and a tiny model of our own, each with a tokenizer of the facts' words."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = word_tokenizer([f"{piece.prompt} {piece.answer}" for piece in read_pieces(str(FACTS)).pieces])
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": len(tokenizer)}
    set_seed(0)
    gpt2 = AutoConfig.for_model("gpt2", n_embd=16, n_layer=2, n_head=2, n_positions=32, **ids)
    AutoModelForCausalLM.from_config(gpt2).save_pretrained(folder / "gpt2")
    own = AutoConfig.for_model(
        "vanilla_transformer", hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, **ids
    )
    AutoModelForSeq2SeqLM.from_config(own).save_pretrained(folder / "own")
    for name in ("gpt2", "own"):
        tokenizer.save_pretrained(folder / name)
    return folder


def test_report_folder(models, tmp_path, capsys):
    output = tmp_path / "coupling"
    command = ["--model", str(models / "gpt2"), "--dataset", str(FACTS), "--output", str(output), "--validate", "3"]
    assert main(command) == 0
    assert {path.name for path in output.iterdir()} == FILES | {"ripple.png", "ripple_report.json"}
    report = json.loads((output / "coupling_report.json").read_text())
    assert sorted(report["generated_files"]) == sorted(path.name for path in output.iterdir())
    assert report["metadata"]["pieces"] == report["metadata"]["rows"] == 24
    assert report["metadata"]["model"] == "gpt2"
    assert str(tmp_path) not in json.dumps(report)  # nothing about the machine's folders
    assert report["metadata"]["layers"] == [f"transformer.h.{index}.mlp.c_proj" for index in range(2)]
    assert report["gpu_performance"]["peak_resident_bytes"] > 0
    assert report["ripple_validation"]["restored_bit_for_bit"]
    assert len(json.loads((output / "ripple_report.json").read_text())["chosen"]["pairs"]["measured"]) == 3 * 23
    matrix = load_file(output / "coupling.safetensors")["gradsim"]
    model, pieces = AutoModelForCausalLM.from_pretrained(models / "gpt2"), read_pieces(str(FACTS)).pieces
    tokenizer = word_tokenizer([f"{piece.prompt} {piece.answer}" for piece in pieces])
    np.testing.assert_allclose(matrix, CouplingAnalyzer(model, tokenizer).fit(pieces).matrix, atol=1e-6)
    assert Coupling.load(output / "coupling.safetensors").piece_ids == [piece.piece_id for piece in pieces]
    printed = capsys.readouterr().out
    for text in ("24 of 24 rows", "weights restored: True", "coupling_report.json"):
        assert text in printed


def test_a_model_of_our_own_and_options(models, tmp_path):
    command = ["--model", str(models / "own"), "--dataset", "jsonl", "--data_dir", str(FACTS), "--max_samples", "9"]
    command += ["--answer", "first", "--layers", "all-linear", "--bias", "false", "--dtype", "float64", "--high", "0.9"]
    assert main([*command, "--output", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == FILES
    report = json.loads((tmp_path / "coupling_report.json").read_text())
    assert report["metadata"]["pieces"] == 9
    assert (report["metadata"]["answer"], report["metadata"]["bias"]) == ("first", False)
    assert report["high_coupling_pairs"]["threshold"] == 0.9
    assert any("decoder.layers.0.cross_attn" in name for name in report["metadata"]["layers"])


def test_what_is_printed_of_other_predictions(models, tmp_path, capsys):
    command = ["--model", str(models / "gpt2"), "--dataset", "knowedit", "--data_dir", str(FACTS.parent / "knowedit")]
    command += ["--validate", "2", "--ripple_prediction", "path,second_order", "--output", str(tmp_path / "out")]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "\n         1 queries without an answer\n" in printed
    validation = json.loads((tmp_path / "out" / "coupling_report.json").read_text())["ripple_validation"]
    for kind in ("path", "second_order"):
        (head,) = [line for line in printed.splitlines() if line.split()[:3] == ["own", "gain", kind.replace("_", "-")]]
        row = printed[printed.index(head) + len(head) :].splitlines()[1]
        first = validation["sizes"][0]
        found = first["predictions"][kind]
        numbers = [first["own_gain"], first["spearman"][kind], found["sign_agreement"], found["linearity_error"]]
        values = [number.get("median", number.get("value")) for number in numbers]
        assert row.split() == [f"{value:.3f}" for value in values]


def test_list_and_help(capsys):
    for option in ("--list", "--help"):
        with pytest.raises(SystemExit) as end:
            main([option])
        assert end.value.code == 0
    printed = capsys.readouterr().out
    assert "2wikimultihopqa" in printed
    assert "--tokens_per_batch" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--model is missing"),
        (["--model", "m"], "--dataset is missing"),
        (["--modle", "m"], "unknown option '--modle'; did you mean '--model'?"),
        (["--max_samples"], "expected one argument"),
        (["--max_samples", "few"], "--max_samples: expected int, got 'few'"),
        (["--max_samples", "0"], "--max_samples is 0; it must be at least 1"),
        (["--answer", "last"], "--answer"),
        (["--bias", "maybe"], "--bias: expected true or false"),
        (["--high", "0.05"], "must satisfy -1 <= low <= high <= 1"),
        (["--device", "abacus"], "--device abacus"),
        (["--edit_size", "0"], "--edit_size is 0"),
        (["--edit_sizes", "0.1,-1"], "--edit_sizes is '0.1,-1'; it must be numbers above 0"),
        (["--edit_sizes", "0.1,ful"], "it must be numbers above 0, or full"),
        (["--edit_sizes", "full"], "--edit_sizes full: needs new answers, --edit replacement; --edit is answer"),
        (["--edit_steps", "0"], "--edit_steps is 0; it must be at least 1"),
        (["--ripple_prediction", "secondorder"], "unknown prediction 'secondorder'; did you mean 'second_order'?"),
        (["--memory", "plenty"], "--memory is 'plenty'; it must be a number of bytes"),
        (["--memory", "1MB"], "--memory is 1MB; it must be at least 256MiB"),
        (["--device", "cpu", "--device_map", "auto"], "--device and --device_map cannot be given together"),
        (["--stream", "most"], "stream is 'most'; it must be auto, exact"),
        (["--model", "no-such/model", "--trust_remote_code"], "name the revision whose code you have read"),
        (["--validate", "-1"], "--validate is -1"),
        (["--validate", "25"], "--validate 25: it must be between 1 and 24"),
        (["--dataset", "hotpot"], "unknown data set 'hotpot'; did you mean 'hotpotqa'"),
        (["--dataset", "musique"], "could not be loaded from the Hub"),
        (["--layers", "*.down_proj"], "no layer matches '*.down_proj'"),
        (["--model", "no-such/model"], "--model: cannot load 'no-such/model'"),
        (["--model", "no.gguf"], "no.gguf does not exist"),
        (["--model", "."], "--model: cannot load '.'"),
    ],
)
def test_mistakes_are_one_line(models, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    base = []
    if message not in ("--model is missing", "--dataset is missing"):
        base = ["--model", str(models / "gpt2"), "--dataset", str(FACTS), "--output", str(tmp_path / "out")]
    assert main([*base, *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert not (tmp_path / "out" / "coupling_report.json").exists()


def test_long_question_is_named_before_the_output_changes(models, tmp_path, capsys):
    facts = tmp_path / "facts.jsonl"
    facts.write_text(json.dumps({"id": "long", "question": "capital " * 40, "answer": "Rome"}))
    assert main(["--model", str(models / "gpt2"), "--dataset", str(facts), "--output", str(tmp_path / "out")]) == 2
    assert "piece 'long': prompt and answer has" in capsys.readouterr().err


def test_output_that_cannot_be_written(models, tmp_path, capsys):
    taken = tmp_path / "file"
    taken.write_text("mine")
    assert main(["--model", str(models / "gpt2"), "--dataset", str(FACTS), "--output", str(taken)]) == 2
    assert "--output: cannot write to" in capsys.readouterr().err
    assert taken.read_text() == "mine"


def test_disk_full_leaves_the_old_report(models, tmp_path, capsys, monkeypatch):
    command = ["--model", str(models / "gpt2"), "--dataset", str(FACTS), "--output", str(tmp_path)]
    assert main(command) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trainers.coupling.coupling.save_file", full)
    assert main(command) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_in_blocks(models, tmp_path, monkeypatch, capsys):
    command = ["--model", str(models / "gpt2"), "--dataset", str(FACTS), "--stream", "sketch-512"]
    assert main([*command, "--output", str(tmp_path / "whole")]) == 0
    seen = []
    plain = CouplingAnalyzer.fit

    def spy(self, pieces, folder=None):
        coupling = plain(self, pieces, folder)
        seen.extend(path.name.split("-")[0] for path in Path(folder).glob("blocks-*/*"))
        return coupling

    monkeypatch.setattr(CouplingAnalyzer, "fit", spy)
    assert main([*command, "--output", str(tmp_path / "blocks"), "--memory", "300MB"]) == 0
    assert set(seen) == {"gradients", "products"}
    assert {path.name for path in (tmp_path / "blocks").iterdir()} == FILES  # the blocks have served
    one, two = (load_file(tmp_path / name / "coupling.safetensors")["gradsim"] for name in ("whole", "blocks"))
    np.testing.assert_allclose(one, two, atol=1e-5)
    printed = capsys.readouterr().out
    assert "0.3 GB in memory for each of 1 process(es)" in printed
    assert "stream   sketch-512: error 0." in printed
    report = json.loads((tmp_path / "blocks" / "coupling_report.json").read_text())
    assert report["metadata"]["memory"] == "300MB"
    assert report["gradient_analysis"]["stream"]["numbers_per_piece"] == 512


def test_no_room_for_the_blocks(models, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10))
    command = ["--model", str(models / "gpt2"), "--dataset", str(FACTS), "--output", str(tmp_path), "--memory", "1GB"]
    assert main(command) == 2
    assert "has room for 0.0 GB, and the blocks take up to 0.0 GB" in capsys.readouterr().err


def test_amounts_of_memory():
    for text, value in {"4GB": 4e9, "4GiB": 2**32, "2e9": 2e9, "1.5 gb": 1.5e9, "300m": 3e8, "1t": 1e12}.items():
        assert bytes_of(text) == value


@pytest.mark.long
def test_two_processes_write_one_report(models, tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ACCELERATE)]
    command += ["--main_process_port", "0", "--quiet", "-m", "trainers.couple", "--model", str(models / "gpt2")]
    command += ["--dataset", str(FACTS)]
    output = tmp_path / "two"
    done = subprocess.run([*command, "--output", str(output)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("each of 2 process(es)") == done.stdout.count("report   ") == 1
    assert {path.name for path in output.iterdir()} == FILES
    assert main(["--model", str(models / "gpt2"), "--dataset", str(FACTS), "--output", str(tmp_path / "one")]) == 0
    one, two = (load_file(tmp_path / name / "coupling.safetensors")["gradsim"] for name in ("one", "two"))
    np.testing.assert_allclose(one, two, atol=1e-6)


def test_as_a_command(models, tmp_path):
    facts = tmp_path / "facts.jsonl"
    shutil.copy(FACTS, facts)
    command = [sys.executable, "-m", "trainers.couple", "--model", str(models / "gpt2"), "--dataset", str(facts)]
    done = subprocess.run([*command, "--output", str(tmp_path / "out")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    failed = subprocess.run([*command, "--layers", "x"], cwd=ROOT, capture_output=True, text=True)
    assert failed.returncode == 2
    assert failed.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "Traceback" not in failed.stderr
