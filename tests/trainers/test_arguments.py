"""Recipes and command lines: what is accepted, what is refused, and in which words."""

from pathlib import Path

import pytest
import yaml

from trainers.arguments import default_run_name, load_yaml, parse_recipe
from trainers.errors import UserError

RECIPE = {
    "model": {
        "model_type": "connection_transformer",
        "hidden_size": 16,
        "num_slots": 8,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
    },
    "task": {"name": "pointer_chase", "options": {"num_symbols": 4, "max_hops": 2}},
    "training": {"max_steps": 2, "learning_rate": 1.0e-3},
}


def write(folder: Path, name: str = "recipe.yaml", **sections) -> Path:
    path = folder / name
    path.write_text(yaml.safe_dump(sections))
    return path


def parse(folder: Path, *options: str, **changes):
    sections = {section: {**RECIPE.get(section, {}), **changes.get(section, {})} for section in {**RECIPE, **changes}}
    return parse_recipe([str(write(folder, **sections)), *options], prog="train")


def test_command_line_beats_recipe(tmp_path):
    recipe = parse(tmp_path, "--max_steps", "7", "--model.hidden_size=32", "--learning_rate", "1e-4", "--bf16")
    assert recipe.training.max_steps == 7
    assert recipe.model_values["hidden_size"] == 32
    assert recipe.training.learning_rate == 1e-4
    assert recipe.training.bf16
    assert recipe.model_config(vocab_size=20).hidden_size == 32


def test_whole_numbers_are_floats_too(tmp_path):
    assert parse(tmp_path, training={"num_train_epochs": 2}).training.num_train_epochs == 2


def test_inherit_stays_among_the_recipes(tmp_path):
    folder = tmp_path / "recipes" / "one"
    folder.mkdir(parents=True)
    write(tmp_path, "outside.yaml", **RECIPE)
    write(tmp_path / "recipes", "base.yaml", **RECIPE)
    child = write(folder, "child.yaml", inherit="../base.yaml")
    assert load_yaml(child) == RECIPE
    for name in ("../../outside.yaml", str(tmp_path / "outside.yaml"), "../../../../../../../etc/hostname"):
        with pytest.raises(UserError, match="leaves the recipes' folder, recipes/"):
            load_yaml(write(folder, "child.yaml", inherit=name))
    with pytest.raises(UserError, match="leaves the recipes' folder"):
        load_yaml(write(tmp_path / "recipes", "x.yaml", inherit="../outside.yaml"))


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"training": {"learning_rat": 1}}, (), "unknown field training.learning_rat; did you mean 'learning_rate'?"),
        ({"model": {"hiden_size": 4}}, (), "unknown field model.hiden_size; did you mean 'hidden_size'?"),
        ({"task": {"data": "x"}}, (), "unknown field task.data; did you mean 'data_dir'?"),
        ({"modle": {}}, (), "unknown section 'modle'; did you mean 'model'?"),
        ({"model": {"model_type": "conection_transformer"}}, (), "did you mean 'connection_transformer'?"),
        ({"training": {"learning_rate": "1e-4x"}}, (), "training.learning_rate: expected float, got '1e-4x'"),
        ({"training": {"learning_rate": "1e-4"}}, (), "needs a point and a sign: 1.0e-04"),
        ({"training": {"max_steps": "many"}}, (), "training.max_steps: expected int, got 'many'"),
        ({"model": {"halting": "never"}}, (), "model.halting: expected "),
        ({"model": {"hidden_size": 15}}, (), "hidden_size=15"),
        ({"training": {"step_cost_start": 2}}, (), "training.step_cost_start is 2; it must lie in [0, 1]"),
        (
            {"training": {"eval_strategy": "sometimes"}},
            (),
            "training.eval_strategy: 'sometimes' is not one of no, steps, epoch",
        ),
        ({"training": {"fp16": True}}, ("--use_cpu",), "fp16 training needs a GPU"),
        ({"evaluation": {"num_beams": 0}}, (), "evaluation.num_beams is 0; it must be at least 1"),
        ({"tokenizer": {"vocab_size": "big"}}, (), "tokenizer.vocab_size: expected int, got 'big'"),
        ({}, ("--learning_rat", "1"), "unknown option '--learning_rat'; did you mean 'learning_rate'?"),
        ({}, ("--max_steps", "x"), "training.max_steps: expected int, got 'x'"),
        (
            {"training": {"learning_rate": float("nan")}},
            (),
            "training.learning_rate: expected a finite number, got nan",
        ),
        ({}, ("--learning_rate", "-1"), "training.learning_rate is -1; it must not be negative"),
        (
            {},
            ("--per_device_train_batch_size", "0"),
            "training.per_device_train_batch_size is 0; it must be at least 1",
        ),
        ({}, ("--gradient_accumulation_steps", "-2"), "it must be at least 1"),
        ({}, ("--max_steps", "0"), "training.max_steps is 0; it must be at least 1, or -1 to count epochs"),
        ({}, ("--max_steps", "-5"), "training.max_steps is -5"),
        ({}, ("--num_train_epochs", "0"), "training.num_train_epochs is 0; it must be above 0"),
        ({}, ("--eval_steps", "0"), "training.eval_steps is 0; it must be above 0"),
        ({}, ("--seed", "-1"), "training.seed is -1; it must lie in [0, 2**32)"),
        ({}, ("--adam_beta1", "1"), "training.adam_beta1 is 1; it must lie in [0, 1)"),
        ({}, ("--log_level", "loud"), "training.log_level: 'loud' is not one of detail, debug"),
        ({}, ("--metric_for_best_model", "bleu"), "training.metric_for_best_model is bleu; it must be one of accuracy"),
        ({}, ("--accelerator_config", "no.json"), "training: [Errno 2] No such file or directory: 'no.json'"),
        (
            {"training": {"accelerator_config": {"even_batches": False}}},
            (),
            "training.accelerator_config: even_batches and dispatch_batches must keep their defaults",
        ),
        ({}, ("--hub_token", "hf_x"), "training.hub_token cannot be set here: push_to_hub.py uploads a finished run"),
        ({"training": {"push_to_hub": True}}, (), "training.push_to_hub cannot be set here"),
        ({"training": {"label_smoothing_factor": 0.1}}, (), "it is the model's: model.label_smoothing"),
        (
            {"training": {"early_stopping_patience": 2, "eval_strategy": "no"}},
            (),
            "training.eval_strategy is no, but load_best_model_at_end needs evaluations",
        ),
        (
            {"training": {"early_stopping_patience": 2, "eval_strategy": "steps", "eval_steps": 5, "save_steps": 10}},
            (),
            "training.save_steps is 10 and eval_steps 5; with load_best_model_at_end they must be equal",
        ),
        ({"model": {"hidden_size": 0}}, (), "model.hidden_size: Value must be a positive integer, got 0"),
        ({"model": {"dropout": float("inf")}}, (), "model.dropout: expected a finite number, got inf"),
        ({"model": {"model_type": None}}, (), "model.model_type is missing"),
        ({"model": {"pretrained_revision": "v1"}}, (), "model.pretrained_revision is set, but model.pretrained is not"),
        ({"tokenizer": {"revision": "v1"}}, (), "tokenizer.revision is set, but tokenizer.name_or_path is not"),
        ({"evaluation": {"max_reasoning_steps": 0}}, (), "evaluation.max_reasoning_steps is 0; it must be at least 1"),
        ({}, ("--resume", "--overwrite"), "not allowed with argument --resume"),
        ({}, ("--confidence", "1"), "evaluation.confidence is 1; it must lie between 0 and 1"),
        ({}, ("--num_slots", "[8"), "model.num_slots: expected int, got '[8'"),
        ({}, ("--learning_rate", "high"), "training.learning_rate: expected float, got 'high'"),
        ({"model": {"embeddings_revision": "v1"}}, (), "model.embeddings_revision is set, but model.embeddings_from"),
        (
            {"model": {"embeddings_from": "ann/a", "pretrained": "ann/b"}},
            (),
            "model.embeddings_from: model.pretrained brings its own embeddings; leave one of them out",
        ),
    ],
)
def test_mistakes_are_named_in_one_line(tmp_path, changes, options, message):
    with pytest.raises(UserError) as error:
        parse(tmp_path, *options, **changes).model_config(vocab_size=20)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("missing", ["model", "task"])
def test_a_recipe_needs_model_and_task(tmp_path, missing):
    sections = {name: content for name, content in RECIPE.items() if name != missing}
    with pytest.raises(UserError, match=missing):
        parse_recipe([str(write(tmp_path, **sections))], prog="train")


def test_inherit_merges_and_refuses_circles(tmp_path):
    write(tmp_path, "base.yaml", **RECIPE)
    child = write(tmp_path, "child.yaml", inherit="base.yaml", model={"hidden_size": 32}, evaluation={"num_beams": 2})
    values = load_yaml(child)
    assert values["model"] == {**RECIPE["model"], "hidden_size": 32}
    assert values["task"] == RECIPE["task"]
    assert values["evaluation"] == {"num_beams": 2}
    write(tmp_path, "a.yaml", inherit="b.yaml")
    circle = write(tmp_path, "b.yaml", inherit="a.yaml")
    with pytest.raises(UserError, match=r"circle: b\.yaml -> a\.yaml -> b\.yaml"):
        load_yaml(circle)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read the recipe: No such file"),
        ("model: [1", "line 1: not valid YAML"),
        ("- 1\n", "a recipe is a mapping"),
        ("model: 3\n", "section 'model' must be a mapping"),
        ("model: !!python/object/apply:os.system ['echo']\n", "not valid YAML"),
        (b"\xff\xfe\x00", "a recipe is UTF-8 text"),
        ("model: {}\ntask: {}\nmodel: {}\n", "line 3: not valid YAML: the key 'model' stands there twice"),
        ("", "a recipe is a mapping"),
    ],
)
def test_unreadable_recipes(tmp_path, content, message):
    path = tmp_path / "recipe.yaml"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        load_yaml(path)


def test_best_checkpoint_needs_evaluations(tmp_path):
    training = parse(tmp_path, training={"early_stopping_patience": 2}).training
    assert training.load_best_model_at_end
    assert training.metric_for_best_model == "accuracy"
    assert training.eval_strategy == training.save_strategy == "epoch"


def test_early_stopping_without_the_best_checkpoint(tmp_path):
    training = parse(tmp_path, training={"early_stopping_patience": 2, "load_best_model_at_end": False}).training
    assert not training.load_best_model_at_end
    assert training.metric_for_best_model == "accuracy"
    assert training.eval_strategy == "epoch"


def test_recipe_may_stand_behind_options(tmp_path):
    path = write(tmp_path, **RECIPE)
    assert parse_recipe(["--max_steps", "9", str(path)], prog="train").training.max_steps == 9


def test_a_second_recipe_is_none(tmp_path):
    other, path = write(tmp_path, "other.yaml", **RECIPE), write(tmp_path, **RECIPE)
    with pytest.raises(UserError, match=r"other.yaml' or .*recipe.yaml': give the recipe before the options"):
        parse_recipe(["--data_dir", str(other), str(path)], prog="train")
    with pytest.raises(UserError, match=r"other.yaml: give the recipe before the options"):
        parse_recipe(["--bf16", str(other)], prog="train")


def test_text_on_the_command_line_stays_text(tmp_path):
    for given in ("[draft", "2024", "007", "2024-01-01"):
        recipe = parse(tmp_path, "--data_dir", given, "--task.hub_revision", given)
        assert (recipe.task.data_dir, recipe.task.hub_revision) == (given, given)


def test_a_section_may_be_empty(tmp_path):
    path = write(tmp_path, **RECIPE, evaluation=None)
    assert load_yaml(path)["evaluation"] == {}
    assert parse_recipe([str(path)], prog="train").evaluation.confidence == 0.95


def test_a_section_of_another_kind_of_run(tmp_path):
    sections = {"model": {"model_type": "continuous_thought_machine"}, "task": {"name": "parity"}}
    path = write(tmp_path, **sections, tokenizer={"vocab_size": 300})
    with pytest.raises(UserError, match=r"a continuous_thought_machine has no section 'tokenizer'; leave it out$"):
        parse_recipe([str(path)], prog="train")


def test_output_folder_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = parse(tmp_path, "--output_dir", "~/run")
    assert recipe.output_dir == Path(recipe.training.output_dir) == tmp_path / "run"


def test_run_names():
    assert default_run_name(Path("recipes/vanilla_transformer/strategyqa/small.yaml")) == (
        "vanilla_transformer-strategyqa-small"
    )
    assert default_run_name(Path("somewhere/recipes/quickstart.yaml")) == "quickstart"
    assert default_run_name(Path("mine.yaml")) == "mine"


def test_help_lists_every_section(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_recipe(["--help", "--model_type", "connection_transformer"], prog="python -m trainers.train")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for option in ("--num_slots", "--data_dir", "--training.output_dir", "--num_beams", "--resume", "--overwrite"):
        assert option in text
