"""The training command from recipe to run folder: complete output, resumption, and every way to misuse it."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer

from trainers.arguments import parse_recipe
from trainers.errors import UserError
from trainers.run import TrainingRun, check_same_recipe, record_recipe
from trainers.train import main

ROOT = Path(__file__).resolve().parents[2]
RECIPE = {
    "model": {
        "model_type": "connection_transformer",
        "hidden_size": 16,
        "num_slots": 8,
        "connection_rank": 4,
        "max_reasoning_steps": 3,
        "num_decoder_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
        "dropout": 0.1,
        "step_cost_weight": 0.1,
    },
    "task": {
        "name": "pointer_chase",
        "options": {"num_symbols": 6, "max_hops": 2, "num_train": 64, "num_validation": 20, "num_test": 30},
    },
    "training": {
        "num_train_epochs": 4,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 3.0e-3,
        "logging_steps": 3,
        "eval_strategy": "steps",
        "eval_steps": 6,
        "early_stopping_patience": 4,
        "step_cost_start": 0.25,
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 1,
    },
}
FILES = {
    "README.md",
    "config.json",
    "configuration_connection_transformer.py",
    "connections_connection_transformer.py",
    "generation_config.json",
    "internals",
    "metrics.json",
    "model.safetensors",
    "modeling_connection_transformer.py",
    "predictions.jsonl",
    "recipe.yaml",
    "tokenizer.json",
    "tokenizer_config.json",
}


def write_recipe(folder: Path, **changes) -> Path:
    sections = {name: {**RECIPE.get(name, {}), **changes.get(name, {})} for name in {**RECIPE, **changes}}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(sections))
    return path


def same_tensors(one: Path, other: Path) -> bool:
    """Whether two weight files hold the same tensors, bit for bit."""
    first, second = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)


def newest_checkpoint(folder: Path) -> Path:
    return max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, Path]:
    """A recipe and the folder of its finished run."""
    folder = tmp_path_factory.mktemp("run")
    recipe = write_recipe(folder)
    assert main([str(recipe), "--output_dir", str(folder / "out")]) == 0
    return recipe, folder / "out"


def test_run_folder_is_complete(run):
    _, out = run
    present = {path.name for path in out.iterdir() if not path.name.startswith("checkpoint-")}
    assert present == FILES
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["status"] == "finished"
    # Nothing is learnt in so few steps, so early stopping ends the run: a resumed one must have kept its counter.
    assert metrics["train"]["steps"] == 30
    assert metrics["train"]["examples"] == 64
    assert metrics["train"]["loss_parts"].keys() == {"cross_entropy", "orthogonality", "step_cost"}
    records = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    test = metrics["test"]
    assert len(records) == test["n"] == 30
    assert test["accuracy"]["value"] == sum(record["correct"] for record in records) / 30
    assert test["mean_steps"] == pytest.approx(sum(record["steps"] for record in records) / 30)
    assert sum(level["n"] for level in test["by_difficulty"]) == 30
    low, high = test["accuracy"]["interval"]
    assert low <= test["accuracy"]["value"] <= high
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    assert recipe["task"]["options"]["num_symbols"] == 6
    assert str(out.parent) not in (out / "recipe.yaml").read_text(), "a path of this machine is recorded"


def test_saved_model_makes_the_recorded_predictions(run):
    """The folder alone, through the Auto classes, gives the answers and steps of predictions.jsonl."""
    _, out = run
    tokenizer, model = AutoTokenizer.from_pretrained(out), AutoModelForSeq2SeqLM.from_pretrained(out)
    from trainers.tasks import TaskArguments, get_task

    task = get_task(TaskArguments(**yaml.safe_load((out / "recipe.yaml").read_text())["task"]))
    records = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    for record, example in zip(records, task.rows("test"), strict=True):
        inputs = tokenizer(example.prompt, return_tensors="pt")
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        text = tokenizer.decode(model.generate(**inputs)[0], skip_special_tokens=True).strip()
        assert text == record["prediction"]
        assert model.get_encoder()(**inputs).reasoning_steps.item() == record["steps"]


def test_result_is_shown(run, capsys):
    recipe, out = run
    assert main([str(recipe), "--output_dir", str(out), "--resume"]) == 0
    shown = capsys.readouterr().out
    assert "finished already" in shown
    lines = [line.split() for line in shown.splitlines()]
    assert ["difficulty", "n", "accuracy", "95", "%", "interval", "mean", "steps"] in lines
    for label in ("1", "2", "all", "trivial"):
        assert any(line[:1] == [label] for line in lines)
    assert "push_to_hub.py" in shown


def test_a_seed_gives_one_result(run, tmp_path):
    recipe, out = run
    assert main([str(recipe), "--output_dir", str(tmp_path / "again")]) == 0
    assert same_tensors(tmp_path / "again", out)
    assert (tmp_path / "again" / "predictions.jsonl").read_text() == (out / "predictions.jsonl").read_text()


@pytest.mark.parametrize("seed", [0, 1])
def test_kill_and_resume_is_the_same_run(run, tmp_path, seed):
    """SIGKILL at a random moment after the first checkpoint, mid-epoch, as often as it takes; then `--resume`.

    The best weights, the last weights, the predictions and the evaluation losses equal those of the run that was never
    killed, bit for bit.
    """
    recipe, out = run
    target = tmp_path / "out"
    command = [sys.executable, "-m", "trainers.train", str(recipe), "--output_dir", str(target)]
    draw = random.Random(seed)
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(target.glob("checkpoint-*/trainer_state.json")):
        time.sleep(0.005)
    time.sleep(draw.uniform(0, 0.3))
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    assert not (target / "metrics.json").exists()
    assert main([str(recipe), "--output_dir", str(target), "--resume"]) == 0
    assert same_tensors(target, out)
    assert newest_checkpoint(target).name == newest_checkpoint(out).name == "checkpoint-30"
    assert same_tensors(newest_checkpoint(target), newest_checkpoint(out))
    assert (target / "predictions.jsonl").read_text() == (out / "predictions.jsonl").read_text()
    history = [json.loads((folder / "metrics.json").read_text())["loss_history"] for folder in (out, target)]
    losses = [[(entry["step"], entry["eval_loss"]) for entry in entries if "eval_loss" in entry] for entries in history]
    assert losses[0] == losses[1]


def test_resume_after_an_unfinished_checkpoint(run, tmp_path):
    """The newest checkpoint is cut short: it is dropped and the run goes on from the one before."""
    recipe, out = run
    target = tmp_path / "out"
    shutil.copytree(out, target)
    for name in ("metrics.json", "README.md", "model.safetensors"):
        (target / name).unlink()
    seconds = json.loads((out / "metrics.json").read_text())["train"]["seconds"]
    state = newest_checkpoint(target) / "trainer_state.json"
    state.write_bytes(state.read_bytes()[:100])
    assert main([str(recipe), "--output_dir", str(target), "--resume"]) == 0
    assert same_tensors(newest_checkpoint(target), newest_checkpoint(out))
    assert 0 < json.loads((target / "metrics.json").read_text())["train"]["seconds"] < 10 * max(seconds, 1)


def test_pretrained_start(run, tmp_path):
    """A run can start from another run's weights and tokenizer."""
    _, out = run
    sections = {name: RECIPE[name] for name in ("task", "training")}
    sections["model"] = {"model_type": "connection_transformer", "pretrained": str(out)}
    sections["training"] = {**sections["training"], "max_steps": 1, "learning_rate": 0.0}
    recipe = tmp_path / "continue.yaml"
    recipe.write_text(yaml.safe_dump(sections))
    assert main([str(recipe), "--output_dir", str(tmp_path / "out")]) == 0
    assert same_tensors(tmp_path / "out", out)
    assert AutoConfig.from_pretrained(tmp_path / "out").hidden_size == 16


def questions(number: int, word: str = "Is", answer: bool = False) -> str:
    return "".join(json.dumps({"question": f"{word} it {index}?", "answer": answer}) + "\n" for index in range(number))


STRATEGYQA = {"name": "strategyqa", "options": {}, "max_source_length": 16}


@pytest.mark.parametrize(
    ("changes", "files", "message"),
    [
        ({"task": {"name": "pointer_chas"}}, {}, "did you mean 'pointer_chase'?"),
        ({"task": {"options": {"num_symbol": 3}}}, {}, "did you mean 'num_symbols'?"),
        ({"model": {"num_attention_heads": 3}}, {}, "num_attention_heads=3"),
        ({"model": {"vocab_size": 3}}, {}, "model.vocab_size: the recipe says 3, the tokenizer"),
        ({"model": {"max_position_embeddings": 5}}, {}, "model.max_position_embeddings is 5"),
        ({"tokenizer": {"name_or_path": "no/such-tokenizer"}}, {}, "tokenizer.name_or_path: cannot load the tokenizer"),
        ({"model": {"pretrained": "x"}}, {}, ": model.pretrained brings its own"),
        ({"task": STRATEGYQA}, {}, "data"),
        ({"task": STRATEGYQA}, {"train.json": "[{"}, "train.json"),
        (
            {"task": STRATEGYQA},
            {"train.jsonl": '{"question": "Is it?", "answer": true}\n{"question": "Is it not?", "answer": "maybe"}\n'},
            "train.jsonl, row 2, answer",
        ),
        ({"task": STRATEGYQA}, {"train.jsonl": "", "dev.jsonl": ""}, "train.jsonl: holds no rows"),
        (
            {"task": STRATEGYQA},
            {"train.jsonl": questions(5), "dev.jsonl": questions(5)},
            "every train question occurs in the test split; nothing is left",
        ),
        (
            {"task": {**STRATEGYQA, "max_target_length": 3}, "tokenizer": {"vocab_size": 260}},
            {"train.jsonl": questions(9), "dev.jsonl": questions(2, "Why", True)},
            "task.max_target_length: 3, but the target of example test-1 has 4 tokens",
        ),
        ({"task": {"options": {"num_symbols": 100000}}}, {}, "num_symbols is 100000; it must be at most"),
        ({"training": {"report_to": "wandbb"}}, {}, "training: wandbb is not supported"),
        ({"training": {"report_to": "swanlab"}}, {}, "training: "),
        ({"training": {"optim": "grokadamw"}}, {}, "training: Please install grokadamw"),
        ({"training": {"lr_scheduler_kwargs": {"peak": 1}}}, {}, "unexpected keyword argument 'peak'"),
        ({"training": {"optim_args": "fast"}}, {}, "training: "),
        (
            {"training": {"dataloader_drop_last": True, "per_device_train_batch_size": 100}},
            {},
            "training.dataloader_drop_last: 64 train examples fill no batch of 100",
        ),
        (
            {"training": {"metric_for_best_model": "rouge_l"}},
            {},
            "training.metric_for_best_model is rouge_l, but pointer_chase measures accuracy; name that, or loss",
        ),
        (
            {"model": {"is_encoder_decoder": False}, "evaluation": {"num_beams": 2}},
            {},
            "evaluation.num_beams: a model without a decoder answers in one pass; leave it out",
        ),
        ({"model": {"slot_seed": 2**70}}, {}, "model.slot_seed: expected a number of at most 63 bits"),
        ({"model": {"hidden_size": 2**30}}, {}, "model: "),
        ({"model": {"decoder_vocab_size": 4, "tie_word_embeddings": False}}, {}, "model.decoder_vocab_size"),
        (
            {"model": {"share_step_norm": False}, "evaluation": {"max_reasoning_steps": 9}},
            {},
            "evaluation.max_reasoning_steps is 9, but without model.share_step_norm there are only",
        ),
    ],
)
def test_mistakes_end_before_training(tmp_path, capsys, changes, files, message):
    """One line on stderr, exit code 2, and nothing left behind but an empty folder."""
    data = tmp_path / "data"
    data.mkdir()
    for name, content in files.items():
        (data / name).write_text(content)
    recipe = write_recipe(tmp_path, **changes)
    options = ["--data_dir", str(data)] if changes.get("task", {}).get("name") == "strategyqa" else []
    assert main([str(recipe), "--output_dir", str(tmp_path / "out"), *options]) == 2
    shown = capsys.readouterr().err.strip().splitlines()[-1]
    assert shown.startswith("error: ")
    assert message in shown
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_steps_of_a_model_without_steps(tmp_path, capsys):
    model = {"model_type": "vanilla_transformer", "hidden_size": 16, "num_attention_heads": 2}
    sections = RECIPE | {"model": model, "evaluation": {"max_reasoning_steps": 2}}
    sections["training"] = {name: value for name, value in RECIPE["training"].items() if name != "step_cost_start"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(sections))
    assert main([str(tmp_path / "recipe.yaml"), "--output_dir", str(tmp_path / "out")]) == 2
    rule = "evaluation.max_reasoning_steps: a vanilla_transformer has no reasoning steps; leave it out"
    assert capsys.readouterr().err.endswith(f"error: {rule}\n")


def test_answers_in_fewer_steps_than_were_learned(tmp_path):
    few = {"num_train_epochs": 1, "max_steps": 1, "early_stopping_patience": None}
    recipe = write_recipe(tmp_path, training=few, evaluation={"max_reasoning_steps": 1})
    assert main([str(recipe), "--output_dir", str(tmp_path / "out")]) == 0
    lines = (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()
    assert {json.loads(line)["steps"] for line in lines} == {1}


def test_output_folder_is_guarded(run, tmp_path, capsys):
    recipe, out = run

    def complaint(*options: str) -> str:
        assert main([str(recipe), *options]) == 2
        return capsys.readouterr().err.strip()

    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert "--resume continues it, --overwrite replaces it" in complaint("--output_dir", str(out))
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("years of work")
    assert "files that are no run" in complaint("--output_dir", str(other), "--overwrite")
    assert (other / "thesis.tex").read_text() == "years of work"
    file = tmp_path / "file"
    file.write_text("")
    assert "is a file" in complaint("--output_dir", str(file))
    assert "cannot write to the output folder" in complaint("--output_dir", str(file / "below"))
    assert "cannot write to the output folder" in complaint("--output_dir", str(tmp_path / ("x" * 300)))
    (other / "recipe.yaml").write_text("my: recipe")
    for option in ("--overwrite", "--resume"):
        assert "recipe.yaml: not the record of a run" in complaint("--output_dir", str(other), option)
    assert (other / "thesis.tex").read_text() == "years of work"
    assert "training.learning_rate is 0.5 but the run was started with 0.003" in complaint(
        "--output_dir", str(out), "--resume", "--learning_rate", "0.5"
    )
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_resume_refuses_other_data(run, tmp_path, capsys):
    recipe, out = run
    target = tmp_path / "out"
    shutil.copytree(out, target)
    (target / "metrics.json").unlink()
    record = target / "recipe.yaml"
    record.write_text(record.read_text().replace("data_fingerprint: ", "data_fingerprint: 0"))
    assert main([str(recipe), "--output_dir", str(target), "--resume"]) == 2
    assert "the training data differ" in capsys.readouterr().err


def test_overwrite_replaces_a_run(run, tmp_path):
    recipe, out = run
    target = tmp_path / "out"
    shutil.copytree(out, target)
    (target / "metrics.json").write_text("old")
    assert main([str(recipe), "--output_dir", str(target), "--overwrite", "--name_or_path", "no/such"]) == 2
    assert (target / "metrics.json").read_text() == "old", "a run was lost to one that could not start"
    assert main([str(recipe), "--output_dir", str(target), "--overwrite"]) == 0
    assert json.loads((target / "metrics.json").read_text())["status"] == "finished"
    assert same_tensors(target, out)


@pytest.mark.parametrize(
    ("changes", "damage", "message"),
    [
        ({"model": {"model_type": "vanilla_transformer"}}, {}, "model.model_type is vanilla_transformer, but"),
        ({"task": {"max_source_length": 500}}, {}, "model.max_position_embeddings is 16, but"),
        ({}, {"model.safetensors": "cut"}, "model.pretrained: cannot load"),
        ({}, {"tokenizer.json": "{}"}, "model.pretrained: cannot load the tokenizer"),
        ({}, {"config.json": '{"model_type": "bert"}'}, "model.pretrained: cannot load"),
        ({"tokenizer": {"name_or_path": "larger"}}, {}, "the tokenizer has 49 tokens, but the model of"),
    ],
)
def test_pretrained_folder_that_does_not_fit(run, tmp_path, capsys, changes, damage, message):
    _, out = run
    folder = tmp_path / "pretrained"
    shutil.copytree(out, folder, ignore=shutil.ignore_patterns("checkpoint-*"))
    for name, content in damage.items():
        (folder / name).write_text(content)
    if changes.get("tokenizer"):
        changes = {"tokenizer": {"name_or_path": str(out)}}
        model = AutoModelForSeq2SeqLM.from_pretrained(folder)
        model.resize_token_embeddings(20)
        model.save_pretrained(folder)
    sections = {name: {**RECIPE[name], **changes.get(name, {})} for name in ("task", "training")}
    model_section = {"model_type": "connection_transformer", "pretrained": str(folder), **changes.get("model", {})}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**sections, "model": model_section, "tokenizer": changes.get("tokenizer", {})}))
    assert main([str(recipe), "--output_dir", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert not list((tmp_path / "out").iterdir())


def test_recorded_recipe_is_a_recipe(run, tmp_path):
    """`recipe.yaml` of a run gives the run again; nothing in it tells the folders of this machine."""
    _, out = run
    folder = tmp_path / "a folder"
    assert main([str(out / "recipe.yaml"), f"--output_dir={folder}"]) == 0
    assert same_tensors(folder, out)
    recorded = (folder / "recipe.yaml").read_text()
    assert str(tmp_path) not in recorded
    assert "'--output_dir=a folder'" in yaml.safe_load(recorded)["provenance"]["command"]


def test_places_of_models_and_data_are_not_recorded(tmp_path):
    """Of a folder on this machine only its name is kept, in a form that is no name on the Hub; so a moved one is the
    same."""
    components = [{"name": "strategyqa", "data_dir": f"{tmp_path}/strategyqa"}, {"name": "gsm8k"}]
    sections = {
        "model": {"model_type": "vanilla_transformer", "pretrained": f"{tmp_path}/weights"},
        "task": {"name": "mixture", "options": {"components": components}},
        "tokenizer": {"name_or_path": f"{tmp_path}/tokenizer"},
        "training": {"output_dir": str(tmp_path), "use_cpu": True},
    }
    (tmp_path / "moved.yaml").write_text(yaml.safe_dump(sections))
    recipe = parse_recipe([str(tmp_path / "moved.yaml")], "train")
    record_recipe(recipe, [f"--pretrained={tmp_path}/weights"], "fingerprint")
    text = (tmp_path / "recipe.yaml").read_text()
    assert str(tmp_path) not in text
    record = yaml.safe_load(text)
    assert record["model"]["pretrained"] == "./weights"
    assert record["tokenizer"]["name_or_path"] == "./tokenizer"
    assert record["task"]["options"]["components"][0]["data_dir"] == "strategyqa"
    check_same_recipe(recipe, record)
    recipe.pretrained = "/elsewhere/weights"
    check_same_recipe(recipe, record)
    recipe.pretrained = "someone/weights"
    with pytest.raises(UserError, match=r"--resume: model\.pretrained is 'someone/weights' but the run"):
        check_same_recipe(recipe, record)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted; the same command with --resume continues the run"),
        (OSError(28, "No space left on device", "weights"), 2, "error: weights: No space left on device"),
        (torch.OutOfMemoryError("tried 1 GiB\nmore"), 2, "error: training.per_device_train_batch_size: too large"),
    ],
)
def test_what_ends_a_run_is_told_in_one_line(tmp_path, capsys, monkeypatch, error, code, message):
    def stop(self):
        raise error

    monkeypatch.setattr(TrainingRun, "train", stop)
    assert main([str(write_recipe(tmp_path)), "--output_dir", str(tmp_path / "out")]) == code
    shown = capsys.readouterr().err.strip()
    assert shown.startswith(message)
    assert "\n" not in shown


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(ValueError, match="cannot read the recipe"):
        main([str(tmp_path / "missing.yaml"), "--debug"])


def test_module_runs_as_a_command(tmp_path):
    """Exit code and message as a shell sees them."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "trainers.train", "missing.yaml"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.strip().splitlines()[-1] == (
        "error: missing.yaml: cannot read the recipe: No such file or directory"
    )
    assert "Traceback" not in result.stderr


def test_tracking_leaves_reports_and_the_same_weights(run, tmp_path):
    """A tracked run ends with the weights of the one that was not watched, and shows what it saw; the card links it."""
    recipe, out = run
    target = tmp_path / "out"
    assert (
        main([str(recipe), "--output_dir", str(target), "--tracking.every", "10", "--tracking.names", "decoder.*"]) == 0
    )
    assert same_tensors(target, out)
    report = json.loads((target / "internals" / "analysis_report.json").read_text())
    assert report["schema_version"] == 1
    assert (target / "internals" / "index.html").stat().st_size > 10_000
    assert "internals/index.html" in (target / "README.md").read_text()
    assert not (out / "internals" / "index.html").exists()
    assert "internals/connections.png" in (out / "README.md").read_text()


def test_reports_of_a_sharded_model_look_at_the_saved_one(run, tmp_path, monkeypatch):
    """One process alone cannot run what all hold together; what it loads in its place gives the same reports."""
    recipe, out = run
    monkeypatch.setattr(TrainingRun, "sharded", True)
    assert main([str(recipe), "--output_dir", str(tmp_path / "out")]) == 0
    name = Path("internals") / "connection_analysis.json"
    assert json.loads((tmp_path / "out" / name).read_text()) == json.loads((out / name).read_text())


def test_unknown_module_to_track(run, tmp_path, capsys):
    recipe, _ = run
    options = ["--output_dir", str(tmp_path / "out"), "--tracking.every", "2", "--tracking.names", "decodr.*"]
    assert main([str(recipe), *options]) == 2
    assert "decodr" in capsys.readouterr().err


def test_layerwise_learning_rate_of_an_optimizer_with_its_own_groups(tmp_path, capsys, monkeypatch):
    groups = staticmethod(lambda arguments, model=None: (torch.optim.SGD, {"params": [{"params": []}], "lr": 0.1}))
    monkeypatch.setattr("transformers.Trainer.get_optimizer_cls_and_kwargs", groups)
    recipe = write_recipe(tmp_path, training={"layerwise_lr_decay": 0.5, "optim": "sgd"})
    assert main([str(recipe), "--output_dir", str(tmp_path / "out")]) == 2
    assert re.search(
        r"^error: training.layerwise_lr_decay: [a-z_]+ makes its own parameter groups$", capsys.readouterr().err
    )


def test_the_best_checkpoint_of_a_moved_run_is_found(run, tmp_path):
    recipe, out = run
    target, aside = tmp_path / "moved", tmp_path / "aside"
    shutil.copytree(out, target)
    for name in ("metrics.json", "model.safetensors"):
        (target / name).unlink()
    out.rename(aside)  # the checkpoints tell the place of the best one, which is no longer there
    try:
        assert main([str(recipe), "--output_dir", str(target), "--resume"]) == 0
    finally:
        aside.rename(out)
    assert same_tensors(target, out)


def test_layerwise_learning_rate(tmp_path):
    """Lower layers get smaller rates, which the schedule scales together."""
    recipe = write_recipe(
        tmp_path, training={"layerwise_lr_decay": 0.5, "max_steps": 2, "early_stopping_patience": None}
    )
    assert main([str(recipe), "--output_dir", str(tmp_path / "out")]) == 0
    optimizer = torch.load(newest_checkpoint(tmp_path / "out") / "optimizer.pt", weights_only=True)
    rates = {group["initial_lr"] for group in optimizer["param_groups"]}
    assert len(rates) >= 2
    assert max(rates) == pytest.approx(3e-3)
    assert all(any(rate == pytest.approx(3e-3 * 0.5**depth) for depth in range(6)) for rate in rates)
