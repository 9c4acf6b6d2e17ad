"""Runs of models that think in ticks: measures, Trainer, baselines, and the command from recipe to run folder."""

import itertools
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForTokenClassification,
    default_data_collator,
    pipeline,
    set_seed,
)

from hf_models.continuous_thought_machine import (
    ContinuousThoughtMachineConfig,
    ContinuousThoughtMachineForTokenClassification,
    HyperContinuousThoughtMachineConfig,
    HyperContinuousThoughtMachineForTokenClassification,
)
from tests.trainers.tasks.test_thought import images_in, task
from trainers.arguments import parse_recipe
from trainers.thought.baselines import (
    ThoughtFeedForwardConfig,
    ThoughtLSTMConfig,
    machine_config,
    num_parameters,
    with_matched_width,
)
from trainers.thought.evaluation import (
    Thoughts,
    calibration,
    ctc_losses,
    make_records,
    mean_loss,
    spell,
    stop_at,
    summarise_thoughts,
    think_by_spelling,
    think_in_ticks,
)
from trainers.thought.trainer import ThoughtTrainer, ThoughtTrainingArguments, thought_metric
from trainers.thought.watching import dynamic_norms, watch
from trainers.train import main

ROOT = Path(__file__).resolve().parents[2]
TINY = {
    "iterations": 5,
    "d_model": 16,
    "d_input": 8,
    "heads": 2,
    "n_synch_out": 8,
    "n_synch_action": 8,
    "synapse_depth": 1,
    "memory_length": 3,
    "memory_hidden_dims": 4,
}
PARITY = {**TINY, "backbone_type": "parity_backbone", "positional_embedding_type": "custom-rotational-1d"}
IMAGES = {**TINY, "synapse_depth": 2, "backbone_type": "resnet18-1"}


@pytest.fixture(scope="module")
def parity():
    return task("parity", {"length": 6, "num_train": 32, "num_validation": 6, "num_test": 6})


def make_machine(parity, **changes):
    set_seed(0)
    config = ContinuousThoughtMachineConfig(**PARITY | parity.config_values() | changes)
    return ContinuousThoughtMachineForTokenClassification(config)


def make_batch(examples, number=6):
    return default_data_collator([examples[index] for index in range(number)])


def thoughts_of(model, batch, **options):
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    model.eval()
    with torch.no_grad():
        outputs = model(**inputs, **options)
        losses = model.losses_by_tick(outputs.predictions, batch["labels"])
        return Thoughts(*(field.numpy() for field in think_in_ticks(outputs, batch["labels"], losses)))


class TestMeasures:
    def test_thoughts_by_loops(self, parity):
        model, batch = make_machine(parity), make_batch(parity.examples("train"))
        batch["labels"][0, 3:] = -100
        thoughts = thoughts_of(model, batch)
        with torch.no_grad():
            outputs = model(**batch)
        for row in range(6):
            labels = batch["labels"][row].tolist()
            answer_tick = outputs.certainties[row, 1].tolist().index(max(outputs.certainties[row, 1].tolist()))
            assert thoughts.answer_ticks[row] == answer_tick + 1
            for tick in range(5):
                classes, sure = [], []
                for position in range(6):
                    logits = [outputs.predictions[row, 2 * position + k, tick].item() for k in (0, 1)]
                    classes.append(int(logits[1] > logits[0]))
                    sure.append(1 / (1 + math.exp(-abs(logits[1] - logits[0]))))
                hits = [a == b for a, b in zip(classes, labels, strict=True) if b != -100]
                assert thoughts.right[row, tick] == all(hits)
                assert thoughts.share[row, tick] == pytest.approx(sum(hits) / len(hits))
                if tick == answer_tick:
                    assert thoughts.answers[row].tolist() == classes
                    np.testing.assert_allclose(thoughts.confidences[row], sure, rtol=1e-5)
                if tick == 4:
                    assert thoughts.last_answers[row].tolist() == classes
        assert mean_loss(thoughts) == pytest.approx(outputs.loss.item(), rel=1e-5)
        assert thoughts.num_labels.tolist() == [3, 6, 6, 6, 6, 6]

    def test_calibration_by_loops(self):
        rng = np.random.default_rng(0)
        confidences = np.concatenate((rng.random(200), [0.0, 1.0, 1 / 15, 2 / 15]))
        right = rng.random(204) < confidences
        total = 0.0
        for number in range(15):
            low, high = number / 15, (number + 1) / 15
            inside = [i for i, p in enumerate(confidences) if low < p <= high or (number == 0 and p == 0)]
            if inside:
                gap = np.mean([confidences[i] for i in inside]) - np.mean([right[i] for i in inside])
                total += len(inside) / 204 * abs(gap)
        found = calibration(confidences, right)
        assert found["ece"] == pytest.approx(total)
        assert sum(entry["n"] for entry in found["bins"]) == 204
        assert calibration(np.ones(4), np.array([True] * 4))["ece"] == 0
        assert calibration(np.ones(4), np.array([True, False] * 2))["ece"] == 0.5

    @pytest.mark.parametrize("quantile", [0.0, 0.3, 0.7, 1.0])
    def test_stopping_is_what_the_model_does(self, parity, quantile):
        """What all ticks of a full pass foretell of stopping equals a pass that stops."""
        model, batch = make_machine(parity), make_batch(parity.examples("train"), 20)
        with torch.no_grad():
            model.model.readout.projection.weight.mul_(5)
        full = thoughts_of(model, batch)
        threshold = float(np.quantile(full.certainties.max(axis=1), quantile)) * 0.999
        ticks, right = stop_at(full, threshold)
        stopped = thoughts_of(model, batch, certainty_threshold=threshold)
        assert stopped.ticks.tolist() == ticks.tolist()
        assert stopped.right[np.arange(20), stopped.answer_ticks - 1].tolist() == right.tolist()
        assert quantile in (0.0, 1.0) or len(set(ticks.tolist())) > 1

    def test_spelling(self):
        assert spell([0, 2, 2, 0, 1, 1, 3, 0, 3]) == [2, 1, 3, 3]
        assert spell([0, 0]) == []

    def test_ctc_by_all_paths(self):
        torch.manual_seed(0)
        predictions, labels = torch.randn(4, 3, 4, dtype=torch.float64), torch.tensor([[1, 2], [2, 1], [2, 0], [0, 0]])
        labels = labels.masked_fill(labels == 0, -100)  # short answers
        probabilities = predictions.softmax(dim=1)
        for row in range(4):
            total = sum(
                math.prod(probabilities[row, label, tick].item() for tick, label in enumerate(path))
                for path in itertools.product(range(3), repeat=4)
                if spell(path) == [label for label in labels[row].tolist() if label > 0]
            )
            loss = ctc_losses(predictions, labels)[row].item()
            assert loss == pytest.approx(-math.log(total), rel=1e-5)

    def test_thoughts_of_a_spelling(self):
        classes = [[1, 0, 2, 2], [2, 1, 2, 0]]
        predictions = torch.nn.functional.one_hot(torch.tensor(classes), 3).transpose(1, 2) * 10.0
        outputs = type("Outputs", (), {})()
        outputs.predictions, outputs.ticks = predictions, torch.tensor([4, 4])
        outputs.certainties = torch.ones(2, 2, 4)
        thoughts = Thoughts(*(f.numpy() for f in think_by_spelling(outputs, torch.tensor([[1, 2], [2, 1]]))))
        assert thoughts.right.tolist() == [[False, False, True, True], [False, True, False, False]]
        assert thoughts.share[0].tolist() == [0.5, 0.5, 1, 1]
        assert thoughts.answers.tolist() == [[1, 2], [2, 1]]
        assert thoughts.answer_ticks.tolist() == [4, 4]

    def test_summary(self, parity):
        model, examples = make_machine(parity), parity.examples("test")
        thoughts = thoughts_of(model, make_batch(examples))
        records = make_records(parity, examples, thoughts)
        trivial = parity.trivial_prediction(parity.examples("train"))
        summary = summarise_thoughts(parity, examples, thoughts, records, trivial, 0.95)
        assert summary["accuracy"]["value"] == np.mean([record["correct"] for record in records])
        assert [record["correct"] for record in records] == [
            record["prediction"] == record["target"] for record in records
        ]
        assert summary["at_tick"]["most_certain"] == summary["accuracy"]
        assert summary["at_tick"]["best"]["value"] >= max(summary["per_tick"]["accuracy"])
        assert summary["at_tick"]["last"]["value"] == summary["per_tick"]["accuracy"][-1]
        assert sum(level["n"] for level in summary["by_difficulty"]) == summary["n"] == 6
        words = [parity.reading(trivial[1], trivial[1])] * 6
        equal = [record["target"] == word for record, word in zip(records, words, strict=True)]
        assert summary["trivial"]["accuracy"]["value"] == np.mean(equal)


def make_trainer(model, parity, folder, **changes):
    arguments = {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 4,
        "logging_steps": 1,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
    }
    return ThoughtTrainer(
        model=model,
        args=ThoughtTrainingArguments(**arguments | changes),
        train_dataset=parity.examples("train"),
        eval_dataset=parity.examples("validation"),
        data_collator=default_data_collator,
        compute_metrics=thought_metric(),
    )


class TestTrainer:
    def test_parts_of_the_loss_are_logged(self, parity, tmp_path):
        trainer = make_trainer(make_machine(parity), parity, tmp_path)
        trainer.train()
        entries = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert len(entries) == 2
        for entry in entries:
            assert entry["loss"] == pytest.approx((entry["best_tick"] + entry["certain_tick"]) / 2, abs=1e-6)
            assert entry["best_tick"] <= entry["certain_tick"]

    def test_accumulation_changes_nothing(self, parity, tmp_path):
        histories = []
        for changes in ({}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}):
            trainer = make_trainer(make_machine(parity), parity, tmp_path, **changes)
            trainer.train()
            histories.append([entry for entry in trainer.state.log_history if "loss" in entry])
        for whole, parts in zip(*histories, strict=True):
            for name in ("loss", "best_tick", "certain_tick", "grad_norm"):
                assert parts[name] == pytest.approx(whole[name], rel=1e-4)

    def test_evaluation_does_not_depend_on_batches(self, parity, tmp_path):
        model = make_machine(parity)
        found = [
            make_trainer(model, parity, tmp_path, per_device_eval_batch_size=size).evaluate() for size in (1, 4, 6)
        ]
        for name in ("eval_loss", "eval_accuracy", "eval_position_accuracy", "eval_calibration_error"):
            values = [metrics[name] for metrics in found]
            assert values == pytest.approx([values[0]] * 3, rel=1e-5)
        with torch.no_grad():
            loss = model(**make_batch(parity.examples("validation"))).loss.item()
        assert found[0]["eval_loss"] == pytest.approx(loss, rel=1e-5)


class TestBaselines:
    @pytest.mark.parametrize("config_class", [ThoughtLSTMConfig, ThoughtFeedForwardConfig])
    def test_width_matches_the_machine(self, parity, config_class, tmp_path):
        batch = make_batch(parity.examples("train"))
        labels = batch.pop("labels")
        config = with_matched_width(config_class(**PARITY | parity.config_values()), "token", batch)
        machine = make_machine(parity).num_parameters()
        assert num_parameters(machine_config(config), "token") == machine
        sizes = {}
        for width in (config.width - 1, config.width, config.width + 1):
            values = {**PARITY, **parity.config_values(), "width": width}
            sizes[width] = num_parameters(with_matched_width(config_class(**values), "token", batch), "token")
        assert min(sizes, key=lambda width: abs(sizes[width] - machine)) == config.width
        model = AutoModelForTokenClassification.from_config(config)
        assert model.num_parameters() == sizes[config.width]
        outputs = model(**batch, labels=labels)
        outputs.loss.backward()
        assert all(
            parameter.grad.abs().sum() > 0 or name.endswith("k_proj.bias")
            for name, parameter in model.named_parameters()
        )
        model.eval().save_pretrained(tmp_path)
        again = AutoModelForTokenClassification.from_pretrained(tmp_path)
        assert again(**batch).logits.equal(model(**batch).logits)
        assert not list(tmp_path.glob("*.py"))
        assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())

    def test_lstm_by_hand(self, parity):
        """Tick by tick, with PyTorch's cell and attention module."""
        config = ThoughtLSTMConfig(**PARITY | parity.config_values(), width=7)
        model = AutoModelForTokenClassification.from_config(config).eval()
        body = model.model
        cell = torch.nn.LSTMCell(8, 7)
        cell.load_state_dict({name.removesuffix("_l0"): value for name, value in body.lstm.state_dict().items()})
        attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)
        projections = [getattr(body.attention, f"{name}_proj") for name in "qkv"]
        attention.in_proj_weight.data = torch.cat([projection.weight for projection in projections])
        attention.in_proj_bias.data = torch.cat([projection.bias for projection in projections])
        attention.out_proj.load_state_dict(body.attention.out_proj.state_dict())
        values = make_batch(parity.examples("train"))["input_values"]
        with torch.no_grad():
            tokens = body.encoder(values)
            hidden, state = body.start_hidden.expand(6, -1), body.start_cell.expand(6, -1)
            for tick in range(5):
                found, _ = attention(body.query(hidden).unsqueeze(1), tokens, tokens)
                hidden, state = cell(found.squeeze(1), (hidden, state))
                predictions = model(input_values=values).predictions[:, :, tick]
                torch.testing.assert_close(predictions, body.projection(hidden), rtol=1e-5, atol=1e-6)

    def test_machine_too_small(self, parity):
        batch = {"input_values": torch.ones(1, 6)}
        tiny = {"d_input": 64, "d_model": 2, "heads": 1, "n_synch_out": 1, "n_synch_action": 1, "memory_length": 1}
        config = ThoughtLSTMConfig(**PARITY | parity.config_values() | tiny, num_layers=60)
        with pytest.raises(ValueError, match=r"width: even 1 makes .* parameters, more than the machine's"):
            with_matched_width(config, "token", batch)

    def test_wrong_number_of_tokens(self, parity):
        config = with_matched_width(
            ThoughtFeedForwardConfig(**PARITY | parity.config_values()), "token", {"input_values": torch.ones(1, 6)}
        )
        model = AutoModelForTokenClassification.from_config(config)
        with pytest.raises(ValueError, match="the input makes 7 tokens, num_tokens=6"):
            model(input_values=torch.ones(1, 7))


def run(tmp_path, model, task_section, training=None, evaluation=None, expect=0, name="out"):
    """Write a recipe and run it. Returns the run folder."""
    recipe = {
        "model": model,
        "task": task_section,
        "training": {
            "max_steps": 3,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "logging_steps": 1,
            "use_cpu": True,
            "disable_tqdm": True,
            "seed": 0,
            **(training or {}),
        },
        "evaluation": {"stopping_samples": 4, "shown_examples": 1, **(evaluation or {})},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    assert main([str(path), "--output_dir", str(tmp_path / name)]) == expect
    return tmp_path / name


SIZES = {"num_train": 12, "num_validation": 4, "num_test": 6}
MAZES = {"name": "mazes", "options": {"cells": 4, "max_moves": 6, **SIZES}}


class TestRun:
    def test_mazes(self, tmp_path, capsys):
        model = {"model_type": "hyper_continuous_thought_machine", **IMAGES, "curriculum_lookahead": 5}
        folder = run(
            tmp_path, {**model, "hyper_rank": 2}, MAZES, {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2}
        )
        metrics = json.loads((folder / "metrics.json").read_text())
        test = metrics["test"]
        assert test["n"] == 6
        assert len(test["per_tick"]["accuracy"]) == 5
        assert test["reaches_goal"]["value"] >= test["accuracy"]["value"]
        assert [entry["threshold"] for entry in test["stopping"]["curve"]][-2:] == [0.999, None]
        assert test["stopping"]["curve"][-1]["mean_steps"] == 5
        assert set(metrics["train"]["loss_parts"]) == {"best_tick", "certain_tick"}
        names = {file.name for file in (folder / "internals").iterdir()}
        pictures = ("ticks", "stopping", "neurons_0", "synchronisation_0", "attention_0", "dynamic_weights_0")
        assert {f"{name}.{end}" for name in pictures for end in ("png", "json")} | {"attention_0.gif"} == names
        assert Image.open(folder / "internals" / "attention_0.gif").n_frames == 5
        records = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
        assert len(records) == 6
        assert all(record["steps"] == 5 and 1 <= record["answer_tick"] <= 5 for record in records)
        out = capsys.readouterr().out
        assert "reaches the goal" in out
        assert "stopping at 0.9 " in out
        card = (folder / "README.md").read_text()
        assert "pipeline_tag: other" in card
        assert "| Certainty | Accuracy |" in card
        self.run_snippet(card, folder)

    @staticmethod
    def run_snippet(card, folder):
        snippet = card.split("```python\n")[1].split("```")[0]
        name = next(line for line in snippet.splitlines() if line.startswith("name = "))
        exec(snippet.replace(name, f"name = {str(folder)!r}"), {})

    def test_images_and_pipeline(self, tmp_path, capsys):
        images_in(tmp_path / "data", "train", number=6)
        images_in(tmp_path / "data", "test")
        section = {"name": "images", "data_dir": str(tmp_path / "data"), "validation_fraction": 0.25}
        folder = run(tmp_path, {"model_type": "continuous_thought_machine", **IMAGES}, section)
        classify = pipeline("image-classification", model=str(folder))
        picture = tmp_path / "data" / "test" / "red" / "0.png"
        answers = classify(str(picture))
        assert {answer["label"] for answer in answers} == {"blue", "red"}
        records = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
        red = next(record for record in records if record["target"] == "red")
        assert answers[0]["label"] == red["prediction"]
        assert "pipeline_tag: image-classification" in (folder / "README.md").read_text()
        self.run_snippet((folder / "README.md").read_text(), folder)
        model = AutoModelForImageClassification.from_pretrained(folder)
        assert model.config.id2label == {0: "blue", 1: "red"}

    def test_baselines(self, tmp_path, capsys):
        section = {"name": "parity", "options": {"length": 6, "num_train": 12, "num_validation": 4, "num_test": 6}}
        for number, model_type in enumerate(("thought_lstm", "thought_feed_forward")):
            folder = run(tmp_path, {"model_type": model_type, **PARITY}, section, name=model_type)
            assert "the machine of these settings has" in capsys.readouterr().out
            metrics = json.loads((folder / "metrics.json").read_text())
            assert len(metrics["test"]["per_tick"]["accuracy"]) == (5, 1)[number]
            assert "stopping" not in metrics["test"]
            assert AutoConfig.from_pretrained(folder).width is not None
            self.run_snippet((folder / "README.md").read_text(), folder)

    def test_sorting(self, tmp_path, capsys):
        section = {"name": "sorting", "options": {"length": 3, **SIZES}}
        folder = run(tmp_path, {"model_type": "continuous_thought_machine", **TINY, "backbone_type": "none"}, section)
        test = json.loads((folder / "metrics.json").read_text())["test"]
        assert len(test["per_tick"]["accuracy"]) == 5
        assert test["accuracy"]["value"] == test["per_tick"]["accuracy"][-1]
        self.run_snippet((folder / "README.md").read_text(), folder)

    def test_resume_equals_straight(self, tmp_path, capsys):
        section = {"name": "parity", "options": {"length": 6, "num_train": 12, "num_validation": 4, "num_test": 6}}
        model = {"model_type": "continuous_thought_machine", **PARITY, "dropout": 0.1}
        training, quick = {"max_steps": 4, "save_steps": 2}, {"shown_examples": 0, "stopping_samples": 0}
        straight = run(tmp_path, model, section, training, quick, name="straight")
        broken = shutil.copytree(straight, tmp_path / "broken")
        for path in (broken / "metrics.json", broken / "README.md"):
            path.unlink()
        shutil.rmtree(broken / "checkpoint-4")
        assert main([str(tmp_path / "recipe.yaml"), "--output_dir", str(broken), "--resume"]) == 0
        first, second = (json.loads((folder / "metrics.json").read_text()) for folder in (straight, broken))
        assert first["loss_history"] == second["loss_history"]
        assert first["test"]["per_tick"] == second["test"]["per_tick"]

    @pytest.mark.parametrize(
        ("model", "section", "evaluation", "message"),
        [
            ({"iterations": 0}, {}, {}, r"error: model.iterations"),
            ({"memory_length": 0}, {}, {}, r"error: model.memory_length"),
            ({"backbone_type": "resnet18-1", "positional_embedding_type": "none"}, {}, {}, "reads pixel_values, but"),
            ({"d_modell": 3}, {}, {}, r"unknown field model.d_modell; did you mean 'd_model'\?"),
            ({"prediction_reshaper": [5, 2]}, {}, {}, r"model.prediction_reshaper: the recipe says \[5, 2\], the task"),
            ({"n_synch_out": 20, "neuron_select_type": "first-last"}, {}, {}, "n_synch_out=20"),
            ({}, {"options": {"lenght": 5}}, {}, r"unknown option 'lenght'; did you mean 'length'\?"),
            ({}, {"options": {"length": 3, **SIZES}}, {}, "num_test is 6, but length 3 gives only 1"),
            ({}, {}, {"iterations": 0}, "evaluation.iterations is 0; it must be at least 1"),
            ({}, {}, {"certainty_threshold": 2}, "evaluation.certainty_threshold: 2 is no certainty"),
            ({}, {}, {"stopping_thresholds": ["high"]}, "evaluation.stopping_thresholds: 'high' is no certainty"),
            ({}, {}, {"shown_examples": -1}, "evaluation.shown_examples is -1; it must not be negative"),
            (
                {"model_type": "thought_lstm"},
                {},
                {"certainty_threshold": 0.5},
                "evaluation.certainty_threshold: a thought_lstm does not stop early",
            ),
            (
                {"backbone_type": "none", "positional_embedding_type": "none"},
                {"name": "sorting", "options": {"length": 6, **SIZES}},
                {},
                "model.iterations: 5 ticks cannot spell the 6 classes",
            ),
            (
                {**IMAGES, "positional_embedding_type": "none", "num_channels": 1},
                MAZES,
                {},
                r"model: pixel_values must be of shape \(batch_size, num_channels=1",
            ),
            (
                {**IMAGES, "positional_embedding_type": "none", "image_size": 8},
                MAZES,
                {},
                "model: pixel_values must be images of image_size=8x8, got 9x9",
            ),
            (
                {**IMAGES, "positional_embedding_type": "none"},
                {"name": "mazes", "options": {"cells": 4, "max_moves": 8, "route_length": 4, **SIZES}},
                {},
                "routes of up to 8 moves do not fit route_length = 4",
            ),
        ],
    )
    def test_mistakes_are_one_line(self, tmp_path, capsys, model, section, evaluation, message):
        parity = {"name": "parity", "options": {"length": 6, "num_train": 12, "num_validation": 4, "num_test": 6}}
        run(
            tmp_path,
            {"model_type": "continuous_thought_machine", **PARITY, **model},
            parity | section,
            evaluation=evaluation,
            expect=2,
        )
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert re.search(message, error), error
        assert not (tmp_path / "out" / "metrics.json").exists()

    def test_curriculum_of_one_position(self, tmp_path, capsys):
        images_in(tmp_path / "data", "train", number=6)
        images_in(tmp_path / "data", "test")
        section = {"name": "images", "data_dir": str(tmp_path / "data")}
        model = {"model_type": "continuous_thought_machine", **IMAGES, "curriculum_lookahead": 5}
        run(tmp_path, model, section, expect=2)
        assert "model.curriculum_lookahead: an answer of the task images has one position" in capsys.readouterr().err

    def test_pretrained(self, tmp_path, capsys, parity):
        make_machine(parity).save_pretrained(tmp_path / "before")
        section = {"name": "parity", "options": {"length": 6, "num_train": 12, "num_validation": 4, "num_test": 6}}
        model = {"model_type": "continuous_thought_machine", "pretrained": str(tmp_path / "before")}
        quick = {"shown_examples": 0, "stopping_samples": 0, "certainty_threshold": 0.0}
        metrics = json.loads((run(tmp_path, model, section, evaluation=quick) / "metrics.json").read_text())
        assert metrics["parameters"]["total"] == make_machine(parity).num_parameters()
        assert (metrics["test"]["mean_steps"], metrics["test"]["max_steps"]) == (1, 5)
        run(tmp_path, model, {"name": "parity", "options": {"length": 5, **SIZES, "num_validation": 1, "num_test": 1}},
            expect=2, name="other")  # fmt: skip
        assert "answers in the shape [6, 2], the task parity in [5, 2]" in capsys.readouterr().err


RECIPES = sorted((ROOT / "recipes").glob("*continuous_thought_machine/*/*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: "/".join(path.parts[-3:]))
def test_recipe_builds(path):
    recipe = parse_recipe([str(path)], prog="train")
    about = recipe.kind.run.make_task(recipe.task)
    # Without a look at the data, which may be on the Hub.
    values = {"prediction_reshaper": [10]} if about.head == "image" else about.config_values()
    config = recipe.model_config("task", **values)
    assert config.input_name == about.input_name
    assert num_parameters(machine_config(config), about.head) > 0
    if path.stem == "paper":
        assert recipe.training.learning_rate == 1e-4
    if path.parts[-3].startswith("hyper"):
        assert num_parameters(config, about.head) > num_parameters(machine_config(config), about.head)


def test_watching_equals_a_plain_pass(parity):
    # What is watched thinks to the end, whatever the configuration says.
    model, examples = make_machine(parity, certainty_threshold=0.0), parity.examples("test")
    implementation = model.config._attn_implementation
    (watched,) = watch(model, parity, examples, [2])
    assert model.config._attn_implementation == implementation
    assert model.config.certainty_threshold == 0.0
    model.config.certainty_threshold = None
    with torch.no_grad():
        outputs = model(input_values=examples[2]["input_values"].unsqueeze(0))
    np.testing.assert_allclose(watched.certainty, outputs.certainties[0, 1], rtol=1e-4, atol=1e-6)
    assert watched.attention.shape == (5, 6)
    np.testing.assert_allclose(watched.attention.sum(axis=1), 1, rtol=1e-5)
    assert watched.states.shape == (5, 16)
    assert watched.synchronisation.shape == (5, 8)
    np.testing.assert_allclose(watched.synchronisation[-1], outputs.synchronisation[0], rtol=1e-4, atol=1e-6)


def test_dynamic_norms():
    mazes = task(MAZES["name"], MAZES["options"])
    config = HyperContinuousThoughtMachineConfig(**IMAGES | mazes.config_values(), hyper_rank=2)
    model = HyperContinuousThoughtMachineForTokenClassification(config)
    contexts = torch.randn(4, config.hyper_context_size + 1)
    assert all((norms == 0).all() for norms in dynamic_norms(model, contexts).values())
    layers = [layer for layer in model.modules() if hasattr(layer, "dynamic_weight")]
    with torch.no_grad():
        layers[0].gate.fill_(1.0)
    norms = list(dynamic_norms(model, contexts).values())
    assert len(norms) == len(layers) == 2
    expected = [layers[0].dynamic_weight(context[None])[0].norm().item() for context in contexts]
    np.testing.assert_allclose(norms[0], expected, rtol=1e-5)
