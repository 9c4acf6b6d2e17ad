"""What must not happen: code of a stranger's repository runs, a token gets out, a page runs what a data set holds."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import HfApi, constants, get_token
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, set_seed

from push_to_hub import collect_files
from push_to_hub import main as push
from tests.browser import PLANTED, document_of, is_planted
from tests.trainers.coupling.tools import word_tokenizer
from trainers.couple import main as couple
from trainers.errors import UserError
from trainers.evaluate import main as evaluate
from trainers.files import write_checksums
from trainers.loading import load_model
from trainers.run import shown_command
from trainers.trace import main as trace
from trainers.train import main as train

TOKEN = "hf_" + "PlAnTeDtOkEn" * 3
RECIPE = {
    "model": {"model_type": "vanilla_transformer", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    "task": {
        "name": "pointer_chase",
        "options": {"num_symbols": 5, "num_train": 32, "num_validation": 8, "num_test": 8},
    },
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


class Payload:
    """Writes a file when it is unpickled: the proof that code ran."""

    def __init__(self, proof: Path):
        self.proof = proof

    def __reduce__(self):
        return Path.touch, (self.proof,)


def write_recipe(path: Path, **changes) -> Path:
    path.write_text(yaml.safe_dump({name: {**content, **changes.get(name, {})} for name, content in RECIPE.items()}))
    return path


def ways_to_load(folder: Path, model: str) -> list[list[str]]:
    """The command lines of everything that loads a model, each with its command's name in front."""
    output = ["--output_dir", str(folder / "out")]
    start = {"model_type": "vanilla_transformer"}
    lines = [
        ["couple", "--model", model, "--dataset", str(write_pieces(folder)), "--output", str(folder / "out")],
        ["evaluate", model, "--task", "pointer_chase", *output],
        ["trace", model, "What is a ?"],
    ]
    for name, fields in {
        "pretrained": {**start, "pretrained": model},
        "embeddings": {**start, "embeddings_from": model},
        "reader": {"model_type": "connection_transformer", "reader": model, "max_position_embeddings": 64},
    }.items():
        recipe = folder / f"{name}.yaml"
        recipe.write_text(yaml.safe_dump({**RECIPE, "model": fields}))
        lines.append(["train", str(recipe), *output])
    tokenizer = folder / "tokenizer.yaml"
    tokenizer.write_text(yaml.safe_dump({**RECIPE, "tokenizer": {"name_or_path": model}}))
    return [*lines, ["train", str(tokenizer), *output]]


COMMANDS = {"couple": couple, "evaluate": evaluate, "trace": trace, "train": train}


def test_a_token_stays_where_it_is(tmp_path, monkeypatch, capfd, caplog):
    """A token in the environment, a stored one, one of another service: no command prints it or writes it into a file,
    not even when it fails."""
    stored, wandb = "a-stored-token-of-plain-words", "0123456789abcdef0123456789abcdef01234567"
    hidden = tmp_path.with_name(f"{tmp_path.name}-token")
    hidden.write_text(stored)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(hidden))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("WANDB_API_KEY", wandb)
    monkeypatch.chdir(tmp_path)
    caplog.set_level("DEBUG")
    assert get_token() == TOKEN
    Path("recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    pieces = ["--dataset", str(write_pieces(tmp_path))]
    assert train(["recipe.yaml", "--output_dir", "run"]) == 0
    assert train(["recipe.yaml", "--output_dir", "other", "--name_or_path", "someone/private"]) == 2
    assert couple(["--model", str(make_model(tmp_path / "model")), *pieces, "--output", "run/coupling"]) == 0
    assert couple(["--model", "someone/private", *pieces, "--output", "c"]) == 2
    assert evaluate(["run", "--split", "test", "--output_dir", "evaluation"]) == 0
    assert trace(["run", "1"]) == 0
    assert push(["run", "someone/model", "--dry-run"]) == 0
    shown = capfd.readouterr()
    assert shown.err.count("someone/private") == 2
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 15
    for secret in (TOKEN, stored, wandb):
        assert secret not in shown.out + shown.err + caplog.text
        for path in written:
            assert secret.encode() not in path.read_bytes(), path
            assert secret not in str(path)


@pytest.mark.parametrize(
    "address",
    [
        f"https://user:{TOKEN}@huggingface.co/a/b",
        f"https://{TOKEN}@huggingface.co/a/b",
        f"a/{TOKEN}",
        "x://u:secret99@h/m",
    ],
)
def test_a_token_in_a_name_is_not_repeated(tmp_path, capfd, caplog, address):
    """Whoever pastes an address with a token where a model's name belongs is told so without it."""
    caplog.set_level("DEBUG")
    for name, *words in ways_to_load(tmp_path, address):
        assert COMMANDS[name](words) == 2, words
    shown = capfd.readouterr()
    assert shown.err.count("error: ") == 7
    for secret in (TOKEN, "secret99"):
        assert secret not in shown.out + shown.err + caplog.text


def test_a_server_that_repeats_the_token_does_not_get_it_shown(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("HF_TOKEN", "plain-words-as-a-token")

    def refuse(*arguments, **options):
        raise OSError(f"who sends Bearer {get_token()} gets nothing")

    monkeypatch.setattr(HfApi, "model_info", refuse)
    for name, *words in ways_to_load(tmp_path, "someone/model"):
        assert COMMANDS[name](words) == 2, words
    shown = capfd.readouterr()
    assert shown.err.count("gets nothing") == 7
    assert "plain-words" not in shown.out + shown.err


def test_messages_leave_secrets_out_and_keep_the_rest():
    message = str(UserError(f"x: {TOKEN} and password=hunter2hunter2 in\n\x1b[31mred"))
    assert message == "x: <secret> and <secret> in\\n\\x1b[31mred"
    assert str(UserError("training.max_steps: expected int, got 'x'")) == "training.max_steps: expected int, got 'x'"


def test_the_recorded_command_holds_no_token():
    command = shown_command(["/home/ann/recipe.yaml", "--run_name", f"x-{TOKEN}", "--data_dir=/home/ann/data"])
    assert command == "recipe.yaml --run_name 'x-<secret>' --data_dir=data".replace("'", "")


def test_code_of_a_repository_does_not_run_unasked(tmp_path, capsys):
    """A folder whose configuration brings code: refused by everything that loads a model, and nothing has run."""
    folder = make_model(tmp_path / "model")
    proof = tmp_path / "it ran"
    (folder / "modeling_evil.py").write_text(f"from pathlib import Path\nPath({str(proof)!r}).touch()\n")
    config = json.loads((folder / "config.json").read_text())
    reference = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM"), "modeling_evil.Evil")
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "evil", "auto_map": reference}))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["modeling_evil.Evil", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    for name, *words in ways_to_load(tmp_path, str(folder)):
        assert COMMANDS[name](words) == 2, words
        assert capsys.readouterr().err.splitlines()[-1].startswith("error: "), words
    assert not proof.exists()


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_of_another_repository_never_runs(tmp_path, file):
    """A revision pins the code of its own repository only, so trust does not reach any other."""
    folder = make_model(tmp_path / "model")
    settings = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**settings, "auto_map": {"AutoModel": "other/repo--modeling.Evil"}}))
    with pytest.raises(UserError, match="takes its code from another repository, other/repo, at a"):
        load_model(str(folder), trust_remote_code=True)


def test_a_recipe_that_trusts_code_names_its_revision(tmp_path, capsys):
    model = {"model_type": "vanilla_transformer", "pretrained": "someone/model", "trust_remote_code": True}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**RECIPE, "model": model}))
    assert train([str(recipe), "--output_dir", str(tmp_path / "run")]) == 2
    rule = "model.pretrained: trust_remote_code runs the code that 'someone/model' brings; name the revision"
    assert f"error: {rule}" in capsys.readouterr().err


def test_weights_are_never_pickles(tmp_path, capsys):
    folder = make_model(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    torch.save(Payload(tmp_path / "it ran"), folder / "pytorch_model.bin")
    for name, *words in ways_to_load(tmp_path, str(folder)):
        if "tokenizer.yaml" not in words[0]:
            assert COMMANDS[name](words) == 2, words
            assert "are pickles (pytorch_model.bin), which can hold code" in capsys.readouterr().err, words
    assert not (tmp_path / "it ran").exists()


def test_the_state_of_a_run_is_read_as_plain_data(tmp_path, capsys):
    """A checkpoint in which any pickle was exchanged, checksums and all: told in one line, and nothing has run."""
    recipe = write_recipe(tmp_path / "recipe.yaml", training={"save_strategy": "steps", "save_steps": 1})
    assert train([str(recipe), "--output_dir", str(tmp_path / "run")]) == 0
    for name in ("metrics.json", "README.md"):
        (tmp_path / "run" / name).unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")  # there is an update left to make
    pickles = sorted(path.name for path in (tmp_path / "run" / "checkpoint-1").glob("*.[pb][ti]*"))
    assert pickles == ["optimizer.pt", "rng_state.pth", "scheduler.pt", "training_args.bin"]
    for name in [*pickles, "pytorch_model.bin"]:
        out = tmp_path / name
        checkpoint = shutil.copytree(tmp_path / "run", out) / "checkpoint-1"
        torch.save(Payload(tmp_path / "it ran"), checkpoint / name)
        if name == "pytorch_model.bin":
            (checkpoint / "model.safetensors").unlink()
            (checkpoint / "checksums.json").unlink()
        else:
            write_checksums(checkpoint, [checkpoint / name])
        code = train([str(recipe), "--output_dir", str(out), "--resume"])
        error = capsys.readouterr().err
        if name == "training_args.bin":  # nobody reads it
            assert code == 0
        else:
            rule = "are pickles" if name == "pytorch_model.bin" else "holds more than numbers, or is damaged"
            assert code == 2
            assert f"{checkpoint}" in error
            assert rule in error
    assert not (tmp_path / "it ran").exists()


def test_arrays_are_never_pickles(tmp_path, capsys):
    config = {"n_dims": 3, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    set_seed(0)
    AutoModel.from_config(AutoConfig.for_model("in_context_transformer", **config)).save_pretrained(tmp_path / "model")
    np.savez(tmp_path / "x.npz", input_values=np.array([Payload(tmp_path / "it ran")], dtype=object))
    assert trace([str(tmp_path / "model"), str(tmp_path / "x.npz")]) == 2
    assert "x.npz': Object arrays cannot be loaded" in capsys.readouterr().err
    torch.save(Payload(tmp_path / "it ran"), tmp_path / "x.npz")
    assert trace([str(tmp_path / "model"), str(tmp_path / "x.npz")]) == 2
    assert not (tmp_path / "it ran").exists()


def test_what_leaves_tells_nothing_of_this_machine(tmp_path, monkeypatch, capsys):
    """Data, model, output and working folder given by absolute paths: no file that a push would send holds one."""
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "data"
    data.mkdir()
    for split, number in (("train", 8), ("dev", 4)):
        rows = [{"question": f"Is {split} {index} odd?", "answer": index % 2 == 1} for index in range(number)]
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"name": "strategyqa", "data_dir": str(data), "max_source_length": 40, "near_duplicate_similarity": 1}
    model = {"model_type": "vanilla_transformer", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model["embeddings_from"] = str(make_model(tmp_path / "model"))
    sections = {"model": model, "task": task, "training": RECIPE["training"]}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(sections | {"tokenizer": {"vocab_size": 300}}))
    run = tmp_path / "run"
    assert train([str(recipe), "--output_dir", str(run), "--data_dir", str(data)]) == 0
    pieces = ["--dataset", str(write_pieces(tmp_path))]
    assert couple(["--model", model["embeddings_from"], *pieces, "--output", str(run / "coupling")]) == 0
    (run / ".env").write_text(f"HF_TOKEN={TOKEN}")
    capsys.readouterr()
    assert push([str(run), "someone/model", "--dry-run"]) == 0
    listed, _, rest = capsys.readouterr().out.partition("Stays on this machine: ")
    assert ".env" in rest.splitlines()[0]
    leaving = [run / line.split()[0] for line in listed.splitlines()[1:] if line.startswith("  ")]
    assert {run / "recipe.yaml", run / "coupling" / "coupling.html", run / "README.md"} <= {*leaving}
    for path in leaving:
        assert str(tmp_path).encode() not in path.read_bytes(), path
        assert str(Path.home()).encode() + b"/" not in path.read_bytes(), path
    suffixes = {path.suffix for path in leaving}
    assert suffixes == {".csv", ".html", ".json", ".jsonl", ".md", ".png", ".py", ".safetensors", ".yaml"} & suffixes


def test_data_steer_no_terminal(tmp_path, capfd):
    """Colours, titles, bells, a direction of writing: what data hold is shown by commands, and not obeyed."""
    bad = "\x1b]0;owned\x07\x1b[2J\u202eabc\x9b31m${\\frac{$"
    rows = [{"question": f"What is {index} ?", "answer": bad} for index in range(12)]
    for split, part in (("train", rows[:8]), ("validation", rows[8:10]), ("test", rows[10:])):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    options = {"question": "question", "answer": "answer", "splits": {"validation": "validation"}}
    task = {"name": "columns", "data_dir": str(tmp_path), "options": options, "max_target_length": 40}
    task |= {"max_source_length": 40, "near_duplicate_similarity": 1}
    model = {**RECIPE["model"], "max_position_embeddings": 64}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**RECIPE, "model": model, "task": task, "tokenizer": {"vocab_size": 300}}))
    assert train([str(recipe), "--output_dir", str(tmp_path / "run")]) == 0
    pieces = tmp_path / "pieces.jsonl"
    pieces.write_text(
        "".join(json.dumps({**piece, "id": f"{piece['id']}{bad}", "answer": f"a {bad}"}) + "\n" for piece in PIECES)
    )
    gpt2 = str(make_model(tmp_path / "model"))
    assert couple(["--model", gpt2, "--dataset", str(pieces), "--output", str(tmp_path / "out")]) == 0
    assert trace([str(tmp_path / "run"), f"What is {bad} ?"]) == 0
    assert trace([gpt2, "half of \ud800"]) == 2
    shown = capfd.readouterr()
    assert "\\x1b]0;owned\\x07" in shown.out
    assert "text: it is no text" in shown.err
    for character in "\x1b\x07\u202e\x9b":
        assert character not in shown.out + shown.err


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
    for file in collect_files(tmp_path / "run"):
        assert str(tmp_path).encode() not in file.source.read_bytes(), file.path
