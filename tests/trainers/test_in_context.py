"""Runs of in-context models: from recipe to run folder, resumption, losses by level, evaluation, mistakes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn
from transformers import default_data_collator, set_seed

from hf_models.in_context_transformer import (
    InContextTransformerConfig,
    InContextTransformerForPrediction,
    LowRankInContextTransformerConfig,
    LowRankInContextTransformerForSequenceClassification,
)
from model_cards.card import render_card
from trainers.errors import UserError
from trainers.in_context.evaluation import (
    RULES,
    evaluate_prompts,
    evaluate_questions,
    follow_paths,
    predict_values,
    summarise_curve,
)
from trainers.in_context.figures import main as draw_masks
from trainers.in_context.figures import mask_numbers
from trainers.in_context.trainer import (
    InContextTrainer,
    InContextTrainingArguments,
    longest_prompt_metric,
)
from trainers.tasks.in_context import (
    FUNCTION_CLASSES,
    Curriculum,
    CurriculumPrompts,
    TableConnectivity,
    make_prompts,
)
from trainers.tasks.in_context.table_connectivity import distances
from trainers.train import main

ROOT = Path(__file__).resolve().parents[2]
COMMON = {
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "max_steps": 12,
    "learning_rate": 3.0e-3,
    "logging_steps": 3,
    "eval_strategy": "steps",
    "eval_steps": 4,
    "save_strategy": "steps",
    "save_steps": 4,
    "use_cpu": True,
    "disable_tqdm": True,
    "seed": 1,
}
FUNCTIONS = {
    "model": {
        "model_type": "in_context_transformer",
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_points": 7,
        "dropout": 0.1,
    },
    "task": {
        "name": "linear_regression",
        "num_validation": 16,
        "num_test": 24,
        "options": {"n_dims": 3, "n_points": 6},
        "curriculum": {
            "n_dims": {"start": 1, "increment": 1, "interval": 3},
            "n_points": {"start": 3, "increment": 1, "interval": 2},
        },
    },
    "training": COMMON,
    "evaluation": {"slow_baseline_prompts": 3, "prompts_of_each_kind": 6},
}
CONNECTIVITY = {
    "model": {
        "model_type": "low_rank_in_context_transformer",
        "hidden_size": 16,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "dropout": 0.1,
    },
    "task": {
        "name": "table_connectivity",
        "num_validation": 16,
        "num_test": 40,
        "options": {"num_tables": 5, "n_dims": 24, "max_tables": 8, "rho": 0.25},
        "curriculum": {"num_tables": {"start": 3, "increment": 1, "interval": 3}},
    },
    "training": COMMON | {"dense_labels": True},
    "evaluation": {"num_tables": [5, 8], "questions_of_each_size": 20},
}
RECIPES = {"functions": FUNCTIONS, "connectivity": CONNECTIVITY}


def edited(recipe, **changes):
    """A copy of a recipe; `section__field=value` sets a field, `...` deletes it."""
    recipe = json.loads(json.dumps(recipe))
    for place, value in changes.items():
        *path, name = place.split("__")
        section = recipe
        for part in path:
            section = section.setdefault(part, {})
        if value is ...:
            del section[name]
        else:
            section[name] = value
    return recipe


def write(tmp_path, recipe, name="recipe.yaml"):
    path = tmp_path / name
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return str(path)


def run(tmp_path, recipe, *options, folder="out"):
    assert main([write(tmp_path, recipe), "--output_dir", str(tmp_path / folder), *options, "--debug"]) == 0
    return tmp_path / folder


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


# Runs


@pytest.fixture(scope="module", params=RECIPES)
def finished(request, tmp_path_factory):
    return request.param, run(tmp_path_factory.mktemp(request.param), RECIPES[request.param])


def test_a_run_leaves_everything(finished):
    name, folder = finished
    pictures = {
        "functions": {"in_context_curve", "other_prompts", "loss_by_level"},
        "connectivity": {"accuracy_by_path_length", "accuracy_by_tables", "attention_masks", "loss_by_level"},
    }[name]
    assert {path.name for path in (folder / "internals").iterdir()} == {
        f"{picture}.{suffix}" for picture in pictures for suffix in ("png", "json")
    }
    metrics = metrics_of(folder)
    metric = metrics["task"]["metric"]
    test = metrics["test"]
    assert metrics["status"] == "finished"
    assert metrics["train"]["examples"] == 12 * 8
    assert test["n"] == test[metric]["n"] == {"functions": 24, "connectivity": 40}[name]
    for score in (test[metric], test["trivial"][metric], *(entry[metric] for entry in test["baselines"])):
        assert score["interval"][0] <= score["value"] <= score["interval"][1]
    records = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert len(records) == test["n"]
    if name == "functions":
        errors = [(record["prediction"] - record["target"]) ** 2 for record in records]
        assert test["error"]["value"] == pytest.approx(np.mean(errors), rel=1e-4)
        assert len(test["by_position"]["model"]) == 6
    else:
        assert test["accuracy"]["value"] == np.mean([record["correct"] for record in records])
        assert test["trivial"]["accuracy"]["value"] == 0.5
        assert sum(level["n"] for level in test["by_difficulty"]) == 40
        assert [entry["num_tables"] for entry in test["by_tables"]] == [5, 8]
        assert [entry["rho"] for entry in test["by_tables"]] == [0.25, 0.15625]
        assert all({"label", "block"} <= set(entry) for entry in metrics["loss_history"] if "loss" in entry)


def test_the_card_of_a_run(finished, monkeypatch):
    name, folder = finished
    card = render_card(folder)
    titles = {"functions": "| Squared error |", "connectivity": "| Accuracy |"}
    assert titles[name] in card
    assert "generates" not in card
    if name == "functions":
        assert "Squared error on the test split, by the number of examples that the prompt holds" in card
        assert "| `orthogonal_query` | 2 |" in card
        assert "| Without a model: least squares | test |" in card
        assert card.count("always 0") == 1
    else:
        assert "The model at other numbers of tables, without further training; it was trained at 5" in card
        assert "| no path | 20 |" in card
        assert "share a column (1 hop)" in card
    code = card.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(folder)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    if name == "functions":
        assert result.stdout.startswith("value: [")
        assert "prediction: [" in result.stdout
    else:
        assert result.stdout.strip() in ("answer: connected", "answer: not connected")


def test_the_snippet_asks_what_the_task_asked(finished, monkeypatch, capsys):
    name, folder = finished
    if name == "functions":
        return
    model = LowRankInContextTransformerForSequenceClassification.from_pretrained(folder)
    task = TableConnectivity(CONNECTIVITY["task"]["options"])
    with torch.no_grad():
        expected = model(input_values=task.batch("validation", [0])["input_values"]).logits.item()
    code = render_card(folder).split("```python\n")[1].split("```")[0].replace('"."', repr(str(folder)))
    scope = {}
    monkeypatch.chdir(folder)
    exec(code, scope)
    assert scope["log_odds"] == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("name", RECIPES)
def test_kill_and_resume_is_the_same_run(name, tmp_path):
    """Dropout, a curriculum and accumulation in between: every weight, prediction and logged loss is the same."""
    recipe = edited(RECIPES[name], training__logging_steps=4)
    if name == "functions":
        recipe["evaluation"] = {"slow_baseline_prompts": 0, "prompts": ["random_quadrant"], "prompts_of_each_kind": 4}
    straight = run(tmp_path, recipe, folder="straight")
    path, folder = write(tmp_path, recipe), tmp_path / "broken"
    command = [sys.executable, "-m", "trainers.train", path, "--output_dir", str(folder)]
    slow = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=os.environ | slow, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not (folder / "checkpoint-4" / "trainer_state.json").exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    if process.poll() is None:
        process.send_signal(signal.SIGKILL)
    process.wait()
    # Wherever it was killed: what came after the first checkpoint is taken away.
    for left in ("metrics.json", "README.md", "predictions.jsonl", "model.safetensors"):
        (folder / left).unlink(missing_ok=True)
    for later in folder.glob("checkpoint-*"):
        if later.name != "checkpoint-4":
            subprocess.run(["rm", "-r", str(later)], check=True)
    assert main([path, "--output_dir", str(folder), "--resume", "--debug"]) == 0
    weights = [load_file(place / "model.safetensors") for place in (straight, folder)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(tensor, weights[1][key]) for key, tensor in weights[0].items())
    assert (straight / "predictions.jsonl").read_text() == (folder / "predictions.jsonl").read_text()
    first, second = (metrics_of(place) for place in (straight, folder))
    assert first["test"] == second["test"]
    assert first["loss_history"] == second["loss_history"]


# The Trainer


def linear_task():
    return FUNCTION_CLASSES["linear_regression"]({"n_dims": 3, "n_points": 6})


def make_trainer(tmp_path, task, model, levels, curriculum=None, **arguments):
    settings = {"output_dir": str(tmp_path), "max_steps": 2, "per_device_train_batch_size": 6, "logging_steps": 2}
    args = InContextTrainingArguments(
        **settings | {"use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True} | arguments
    )
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
    data = CurriculumPrompts(task, Curriculum.read(curriculum or {}, task), batch, args.max_steps)
    return InContextTrainer(
        model=model,
        args=args,
        train_dataset=data,
        eval_dataset=task.dataset("validation", 10),
        data_collator=default_data_collator,
        compute_metrics=longest_prompt_metric(task.metric),
        levels=levels,
    )


def dense_model():
    set_seed(0)
    return InContextTransformerForPrediction(
        InContextTransformerConfig(
            n_dims=3, max_points=6, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, initializer_range=0.5
        )
    )


def low_rank_model():
    set_seed(0)
    return LowRankInContextTransformerForSequenceClassification(
        LowRankInContextTransformerConfig(
            n_dims=24,
            num_blocks=5,
            block_size=3,
            hidden_size=8,
            num_hidden_layers=3,
            num_attention_heads=1,
            initializer_range=0.5,
        )
    )


def test_losses_by_place(tmp_path):
    task, model = linear_task(), dense_model()
    trainer = make_trainer(tmp_path, task, model, {"after_0": 0, "after_5": 5}, learning_rate=0.0)
    trainer.train()
    logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
    batch = task.batch("train", range(12))
    with torch.no_grad():
        outputs = model(**batch)
    errors = (outputs.logits[..., 0] - batch["labels"]).square().mean(dim=0)
    assert logged["loss_after_0"] == pytest.approx(errors[0].item(), rel=1e-4)
    assert logged["loss_after_5"] == pytest.approx(errors[5].item(), rel=1e-4)
    assert logged["loss"] == pytest.approx(errors.mean().item(), rel=1e-4)


@pytest.mark.parametrize("dense_labels", [False, True])
def test_losses_by_path_length_and_parts(tmp_path, dense_labels):
    task, model = TableConnectivity({"num_tables": 5, "n_dims": 24, "max_tables": 8, "rho": 0.3}), low_rank_model()
    levels = {"no_path": -1, "path_0": 0, "path_1": 1, "path_5": 5}
    trainer = make_trainer(
        tmp_path, task, model, levels, learning_rate=0.0, dense_labels=dense_labels, per_device_train_batch_size=40
    )
    trainer.train()
    logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
    batch = task.batch("train", range(80))
    with torch.no_grad():
        outputs = model(batch["input_values"], labels=batch["labels"], block_targets=batch["block_targets"])
    losses = nn.functional.binary_cross_entropy_with_logits(
        outputs.logits[:, 0], (batch["labels"] > 0).float(), reduction="none"
    )
    for name, length in levels.items():
        rows = batch["path_length"] == length
        if rows.any():
            assert logged[f"loss_{name}"] == pytest.approx(losses[rows].mean().item(), rel=1e-4)
        else:
            assert f"loss_{name}" not in logged
    assert logged["label"] == pytest.approx(losses.mean().item(), rel=1e-4)
    if dense_labels:
        assert logged["block"] == pytest.approx(outputs.block_loss.item(), rel=1e-4)
        assert logged["loss"] == pytest.approx(logged["label"] + logged["block"], rel=1e-4)
    else:
        assert "block" not in logged
        assert logged["loss"] == pytest.approx(logged["label"], rel=1e-4)


def test_accumulation_changes_nothing(tmp_path):
    found = []
    for size, count in ((12, 1), (3, 4)):
        task = TableConnectivity({"num_tables": 5, "n_dims": 24, "max_tables": 8, "rho": 0.3, "min_tables": 3})
        trainer = make_trainer(
            tmp_path / str(size),
            task,
            low_rank_model(),
            {"no_path": -1},
            per_device_train_batch_size=size,
            gradient_accumulation_steps=count,
            dense_labels=True,
            max_steps=3,
            logging_steps=1,
        )
        trainer.train()
        found.append([entry for entry in trainer.state.log_history if "loss" in entry])
    for whole, parts in zip(*found, strict=True):
        for name in ("loss", "grad_norm", "label", "block"):
            assert whole[name] == pytest.approx(parts[name], rel=1e-3), name
        # Some micro-batches may hold no question without a path; the mean over questions is the same.
        assert whole["loss_no_path"] == pytest.approx(parts["loss_no_path"], rel=1e-3)


def test_the_curriculum_is_logged_and_followed(tmp_path):
    trainer = make_trainer(
        tmp_path,
        linear_task(),
        dense_model(),
        {},
        curriculum={"n_points": {"start": 2, "increment": 2, "interval": 2}},
        max_steps=6,
        logging_steps=1,
    )
    seen = []
    handle = trainer.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_values"].shape[1]), with_kwargs=True
    )
    trainer.train()
    handle.remove()
    assert seen == [2, 2, 4, 4, 6, 6]
    assert [entry["n_points"] for entry in trainer.state.log_history if "loss" in entry] == seen


def test_evaluation_during_training(tmp_path):
    task, model = linear_task(), dense_model()
    trainer = make_trainer(tmp_path, task, model, {})
    found = trainer.evaluate()
    batch = task.batch("validation", range(10))
    with torch.no_grad():
        errors = (model(**batch).logits[..., 0] - batch["labels"]).square()
    assert found["eval_loss"] == pytest.approx(errors.mean().item(), rel=1e-4)
    assert found["eval_error"] == pytest.approx(errors[:, -1].mean().item(), rel=1e-4)


def test_queries_are_asked_one_by_one():
    task, model = linear_task(), dense_model().eval()
    prompts = make_prompts(task, "test", range(4), "random_quadrant")
    found = predict_values(model, prompts)
    for place in (0, 2, 5):
        points = torch.cat((prompts.points[:, :place], prompts.queries[:, place, None]), dim=1)
        with torch.no_grad():
            alone = model(points, torch.cat((prompts.values[:, :place], torch.full((4, 1), 9.0)), dim=1)).logits
        torch.testing.assert_close(found[:, place], alone[:, -1, 0], rtol=1e-4, atol=1e-5)
    same = prompts._replace(queries=prompts.points)
    torch.testing.assert_close(
        predict_values(model, same), predict_values(model, prompts._replace(queries=None)), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("name", ["linear_regression", "linear_classification", "matrix_chain"])
def test_scores_of_all_kinds_of_values(name):
    task = FUNCTION_CLASSES[name]({"n_dims": 3, "n_points": 6})
    set_seed(0)
    model = InContextTransformerForPrediction(
        InContextTransformerConfig(
            n_dims=3, n_outputs=task.n_outputs, max_points=6, hidden_size=8, num_hidden_layers=1, num_attention_heads=1
        )
    )
    names = ["always 0", "least squares"]
    curve, predictions, targets = evaluate_prompts(model, task, "test", 30, baselines=names, batch_size=7)
    summary = summarise_curve(task, curve)
    assert predictions.shape == targets.shape == (30, 6, *([3] if name == "matrix_chain" else []))
    assert summary["n"] == 30
    assert curve["in_context_examples"] == list(range(6))
    if name == "linear_classification":
        right = (predictions[:, -1] > 0) == (targets[:, -1] > 0)
        assert summary["accuracy"]["value"] == pytest.approx(right.double().mean().item())
        assert summary["accuracy"]["method"] == "Wilson score"
        assert curve["baselines"]["least squares"][-1]["value"] > 0.7
    else:
        errors = (predictions[:, -1] - targets[:, -1]).square().reshape(30, -1).mean(dim=1)
        assert summary["error"]["value"] == pytest.approx(errors.mean().item(), rel=1e-5)
        assert curve["baselines"]["least squares"][-1]["value"] < 1e-8
        assert summary["trivial"]["error"]["value"] == pytest.approx(targets[:, -1].square().mean().item(), rel=1e-5)


class Oracle(nn.Module):
    """Answers rightly: it looks the prompts up."""

    def __init__(self, task, split, size):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        batch = task.batch(split, range(size))
        self.known = {prompt.numpy().tobytes(): label for prompt, label in zip(*map(batch.get, NAMES), strict=True)}

    def forward(self, input_values, attention_mask=None):
        answers = [self.known[prompt.numpy().tobytes()] for prompt in input_values]
        return type("Output", (), {"logits": torch.stack(answers).float()[:, None]})


NAMES = ("input_values", "labels")


def test_questions_are_scored_by_path_length_beside_rules():
    task = TableConnectivity({"num_tables": 6, "n_dims": 24, "rho": 0.25, "max_tables": 8})
    section, records = evaluate_questions(Oracle(task, "test", 300), task, "test", 300, torch.tensor([1, -1, -1]))
    assert section["accuracy"]["value"] == 1.0
    assert all(record["correct"] for record in records)
    assert section["trivial"]["name"].startswith('always "not connected"')
    assert section["trivial"]["accuracy"]["value"] == 0.5
    rules = {entry["name"]: entry["accuracy"]["value"] for entry in section["baselines"]}
    assert list(rules) == list(RULES)
    steps = [rules[f"path length at most {length}"] for length in range(6)]
    assert steps == sorted(steps)
    lengths = {level["difficulty"]: level["n"] for level in section["by_difficulty"]}
    assert lengths["no path"] == 150
    assert steps[0] == (150 + lengths["0"]) / 300
    assert steps[1] == (150 + lengths["0"] + lengths["1"]) / 300


def test_prompts_of_several_sizes_are_evaluated():
    task = TableConnectivity({"num_tables": 5, "n_dims": 24, "rho": 0.3, "max_tables": 8, "min_tables": 3})
    section, _ = evaluate_questions(low_rank_model(), task, "test", 40, torch.tensor([1]))
    assert section["n"] == 40
    assert section["baselines"] == []


class Guide(nn.Module):
    """Knows the way: it looks up which neighbour is nearest to the goal, or if `wrong`, any table nearest to it."""

    def __init__(self, task, split, size, wrong=False):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.task, self.questions, self.wrong = task, task.questions(split, range(size)), wrong
        ids = task.token_ids(self.questions, task.streams(split, range(size), "names of tables"))
        self.rows = {task.names[row[:-3]].numpy().tobytes(): place for place, row in enumerate(ids)}

    def forward(self, input_values, outputs):
        rows = [self.rows[prompt[:-3].numpy().tobytes()] for prompt in input_values]
        questions = type(self.questions)(*(part[rows] for part in self.questions))
        to_goal, _ = distances(questions.columns, questions.query[:, 1], self.task.num_columns_named)
        names = input_values[:, :-3].unflatten(1, (-1, 3))[:, :, 0]
        at = (names == input_values[:, -2, None]).all(dim=2)
        table = torch.where(at.any(dim=1), at.int().argmax(dim=1), -1)
        scores = -to_goal.float()
        if not self.wrong:
            scores = scores.masked_fill(~self.task.next_tables(questions, table) | (to_goal < 0), -100)
        return type("Output", (), {"token_logits": scores})

    def block_logits(self, token_logits, outputs):
        return token_logits


def test_walks_follow_paths():
    options = {"num_tables": 6, "n_dims": 24, "rho": 0.25, "max_tables": 8, "autoregressive": True}
    task = TableConnectivity(options)
    length = task.questions("test", range(200)).path_length
    right = follow_paths(Guide(task, "test", 200), task, "test", 200, batch_size=64)
    assert right["n"] == (length > 0).sum()
    assert right["arrives"]["value"] == right["shortest"]["value"] == 1.0
    assert {entry["length"]: entry["n"] for entry in right["by_length"]} == {
        int(value): int((length == value).sum()) for value in length[length > 0].unique()
    }
    # Who points straight to the goal's own tables is lost as soon as they are no neighbours.
    wrong = follow_paths(Guide(task, "test", 200, wrong=True), task, "test", 200, batch_size=64)
    assert wrong["shortest"]["value"] < 1.0


def test_a_run_that_learns_paths(tmp_path):
    recipe = edited(
        CONNECTIVITY, task__options__autoregressive=True, task__curriculum={}, evaluation={}, training__max_steps=4
    )
    paths = metrics_of(run(tmp_path, recipe))["test"]["paths"]
    assert paths["n"] == sum(entry["n"] for entry in paths["by_length"]) > 0
    with pytest.raises(UserError, match="the labels of blocks tell the path"):
        main(
            [
                write(tmp_path, edited(recipe, training__dense_labels=False)),
                "--output_dir",
                str(tmp_path / "b"),
                "--debug",
            ]
        )


# Pictures


def test_counts_of_the_original_setting(tmp_path, capsys):
    numbers = mask_numbers(20, 4, 3, (64, 256))
    assert numbers["entries"] == {"full": 6889, "local": 323, "later": 529}
    assert [numbers["tokens"], numbers["key_tokens"]] == [83, 23]
    assert [(entry["shared_rows"], entry["one_row_per_token"]) for entry in numbers["positions"]] == [
        (448, 5312),
        (1792, 21248),
    ]
    assert round(numbers["shares"]["local"], 4) == 0.0469
    assert draw_masks([str(tmp_path / "masks.png")]) == 0
    assert json.loads((tmp_path / "masks.json").read_text())["entries"] == numbers["entries"]
    assert json.loads(capsys.readouterr().out)["entries"] == numbers["entries"]
    assert (tmp_path / "masks.png").read_bytes()[:4] == b"\x89PNG"
    for wrong in (["masks.pdf"], [str(tmp_path / "none" / "masks.png")], ["masks.png", "--num_tables", "0"]):
        assert draw_masks(wrong) == 2
        assert capsys.readouterr().err.count("\n") == 1


# Mistakes


@pytest.mark.parametrize(
    ("recipe", "changes", "message"),
    [
        (FUNCTIONS, {"training__max_steps": ...}, "training.max_steps: must be set"),
        (FUNCTIONS, {"training__max_steps": 3}, "task.curriculum takes 6 update steps to arrive, but"),
        (FUNCTIONS, {"task__options__n_dims": 0}, "n_dims is 0; it must be at least 1"),
        (FUNCTIONS, {"task__name": "table_connectivity", "task__options": {}, "task__curriculum": {}}, "function cl"),
        (FUNCTIONS, {"task__name": "linear"}, "task.name: unknown task 'linear'"),
        (FUNCTIONS, {"task__data_dir": "x"}, "unknown field task.data_dir"),
        (FUNCTIONS, {"model__n_dims": 4}, "model.n_dims: the recipe says 4, the task 3; leave it out"),
        (FUNCTIONS, {"model__max_points": 5}, "model.max_points is 5, but task.options.n_points is 6"),
        (FUNCTIONS, {"evaluation__baselines": ["least square"]}, "'least square' is unknown; did you mean 'least sq"),
        (FUNCTIONS, {"evaluation__prompts": ["skew"]}, "prompts: 'skew' is unknown; did you mean 'skewed'"),
        (FUNCTIONS, {"evaluation__num_tables": [3]}, "evaluation.num_tables: linear_regression has no tables"),
        (FUNCTIONS, {"evaluation__prompts_of_each_kind": 1}, "prompts_of_each_kind is 1; it must be at least 2"),
        (FUNCTIONS, {"evaluation__slow_baseline_prompts": 1}, "slow_baseline_prompts is 1; it must be 0, or at least"),
        (FUNCTIONS, {"task__num_test": 1}, "num_test is 1; it must be at least 2"),
        (FUNCTIONS, {"model__pretrained": "nowhere"}, "leave it out"),
        (CONNECTIVITY, {"task__options__rho": 1.5}, r"rho is 1.5; it must lie in \[0, 1\]"),
        (CONNECTIVITY, {"task__options__num_columns": 0}, "num_columns is 0; it must be at least 1"),
        (CONNECTIVITY, {"task__options__n_dims": 10}, "n_dims is 10; 24 orthogonal names"),
        (CONNECTIVITY, {"model__block_size": 4}, "model.block_size: the recipe says 4, the task 3"),
        (CONNECTIVITY, {"evaluation__num_tables": [9]}, "evaluation.num_tables: 9: .*max_tables is 8"),
        (CONNECTIVITY, {"evaluation__num_tables": ["a"]}, "num_tables: must be whole numbers, got 'a'"),
        (CONNECTIVITY, {"evaluation__rho": [0.1]}, "rho: must be as many numbers as num_tables"),
        (CONNECTIVITY, {"evaluation__num_tables": [5], "evaluation__rho": ["a"]}, "rho: must be numbers, got 'a'"),
        (CONNECTIVITY, {"task__options__num_columns": 20000}, "columns; at most 65536 columns"),
        (CONNECTIVITY, {"evaluation__prompts": ["skewed"]}, "evaluation.prompts: is for function classes"),
        (CONNECTIVITY, {"training__metric_for_best_model": "f1"}, "metric_for_best_model"),
    ],
)
def test_mistakes_are_one_line_before_any_work(tmp_path, capsys, recipe, changes, message):
    path = write(tmp_path, edited(recipe, **changes))
    assert main([path, "--output_dir", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert __import__("re").search(message, error), error
    assert not (tmp_path / "out" / "recipe.yaml").exists()


def test_one_sided_labels_are_told(tmp_path, capsys):
    options = {"num_tables": 20, "num_columns": 3, "rho": 0.5, "n_dims": 8, "names": "random", "balanced": False}
    recipe = edited(CONNECTIVITY, task__options=options, task__curriculum={}, evaluation={})
    folder = run(tmp_path, recipe, "--max_steps", "1", "--num_test", "200")
    assert "of the labels are alike: a constant answer is as often right" in capsys.readouterr().out
    assert metrics_of(folder)["test"]["trivial"]["accuracy"]["value"] > 0.97


def test_training_goes_on_from_a_finished_model(tmp_path):
    first = run(tmp_path, edited(CONNECTIVITY, training__max_steps=8), folder="first")
    recipe = edited(CONNECTIVITY, model={"model_type": "low_rank_in_context_transformer", "pretrained": str(first)})
    recipe["training"] |= {"max_steps": 8, "learning_rate": 0.0}
    second = run(tmp_path, recipe, folder="second")
    before, after = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    wrong = edited(recipe, task__options__num_columns=1)
    with pytest.raises(UserError, match="has block_size=3, the task 2"):
        main([write(tmp_path, wrong), "--output_dir", str(tmp_path / "third"), "--debug"])
