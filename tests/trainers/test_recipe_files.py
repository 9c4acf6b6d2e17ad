"""YAML that somebody else wrote: one line for whatever breaks a rule, at once, and nothing of it runs."""

import time

import pytest
import yaml

from trainers.arguments import parse_recipe
from trainers.compare import main as compare
from trainers.errors import UserError
from trainers.recipe_files import MOST_CHARACTERS, MOST_LEVELS, parse_yaml, read_yaml
from trainers.sweep import main as sweep
from trainers.train import main as train

HEAD = "model: {model_type: vanilla_transformer}\ntask: {name: pointer_chase}\n"
# Nine levels of ten aliases each: a billion values in a few hundred bytes.
LEVELS = "".join(f"    a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9))
BOMB = HEAD + "training:\n  lr_scheduler_kwargs:\n    a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + LEVELS
MERGES = "".join(f"    a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}\n" for n in range(1, 9))
REFUSED = {
    "aliases of aliases": (BOMB, "with its aliases written out it has more than 1,000,000 characters"),
    "aliases in a value": (BOMB + "  max_steps: *a8\n", "with its aliases written out"),
    "merges of merges": (HEAD + "training:\n  lr_scheduler_kwargs:\n    a0: &a0 {k: v}\n" + MERGES, "written out"),
    "a long text, often": (f"a: &a {'x' * 10**4}\nb: [{', '.join(['*a'] * 101)}]", "written out"),
    "a list in itself": (HEAD + "training: {lr_scheduler_kwargs: &a [*a]}", "line 3: .* an alias stands inside"),
    "a section in itself": (HEAD + "training: &a {lr_scheduler_kwargs: *a}", "an alias stands inside the value"),
    "a deep list": (f"a: {'[' * 600}{']' * 600}", "nested too deeply"),
    "a deep mapping": ("a: " + "{a: " * (MOST_LEVELS + 1) + "1" + "}" * (MOST_LEVELS + 1), "nested too deeply"),
    "an object": ("a: !!python/object/apply:os.system ['true']", "could not determine a constructor for the tag"),
    "a name": ("a: !!python/name:os.system", "could not determine a constructor for the tag"),
    "a class": ("!!python/object/new:subprocess.Popen [[true]]", "could not determine a constructor for the tag"),
    "no month": ("a: 2024-99-99", "line 1: not valid YAML: '2024-99-99' cannot be read as timestamp"),
    "no date": ("a: !!timestamp x", "'x' cannot be read as timestamp"),
    "too many digits": (f"a: {'9' * 5000}", "'9{40}' cannot be read as int"),
    "no number": ("a: !!int ''", "'' cannot be read as int"),
    "no float": ("a: !!float x", "'x' cannot be read as float"),
    "no truth": ("a: !!bool x", "'x' cannot be read as bool"),
    "a zero byte": ("a: \0", "special characters are not allowed"),
    "half a character": ('a: "\\ud800"', "line 1: not valid YAML: holds half of a surrogate pair"),
    "a key twice": ("a: 1\nb: 2\na: 3", "line 3: not valid YAML: the key 'a' stands there twice"),
    "a list as a key": ("? [1]\n: 2", "found unhashable key"),
    "two documents": ("a: 1\n---\nb: 2", "found another document"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_file_may_not_hold(tmp_path, name):
    text, rule = REFUSED[name]
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    begun = time.monotonic()
    for read in (lambda: read_yaml(path), lambda: parse_recipe([str(path)], prog="train")):
        with pytest.raises(UserError, match=rule) as raised:
            read()
        assert len(str(raised.value)) < 400 + len(str(path))
    with pytest.raises(yaml.YAMLError):
        parse_yaml(text)
    assert time.monotonic() - begun < 10


def test_what_a_file_may_hold(tmp_path):
    assert parse_yaml("a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: [*a, *a]") == {
        "a": {"x": 1},
        "b": {"x": 1, "y": 2},
        "c": [{"x": 1}, {"x": 1}],
    }
    assert parse_yaml(f"a: {'x' * (MOST_CHARACTERS - 10)}")["a"].startswith("x")
    (tmp_path / "bom.yaml").write_bytes(b"\xef\xbb\xbfa: 1\n")
    assert read_yaml(tmp_path / "bom.yaml") == {"a": 1}
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe4\n")
    with pytest.raises(UserError, match=r"latin\.yaml: a recipe is UTF-8 text: .* at byte 3$"):
        read_yaml(tmp_path / "latin.yaml")


@pytest.mark.parametrize(
    "value", ["2024-99-99", "9" * 5000, "!!bool x", "&a [*a]", "[" * 600, "!!python/name:os.system"]
)
def test_values_on_the_command_line(tmp_path, value):
    path = tmp_path / "recipe.yaml"
    path.write_text(HEAD)
    with pytest.raises(UserError, match=r"^training\.max_steps: expected int, got '"):
        parse_recipe([str(path), "--max_steps", value], prog="train")


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        (
            "training: {learning_rate: 1" + "0" * 400 + "}",
            "training.learning_rate: expected a number of at most 63 bits",
        ),
        ("training: {max_steps: 1" + "0" * 20 + "}", "training.max_steps: expected a number of at most 63 bits"),
        ('inherit: "a\\0b"', "inherit must be a path, got 'a\\\\x00b'"),
        ("inherit: ''", "inherit must be a path, got ''"),
        ("inherit: [a]", "inherit must be a path"),
    ],
)
def test_values_that_nothing_can_hold(tmp_path, line, rule):
    path = tmp_path / "recipe.yaml"
    path.write_text(HEAD + line)
    with pytest.raises(UserError, match=rule):
        parse_recipe([str(path)], prog="train")


@pytest.mark.parametrize("model_type", ["[a]", "{a: 1}", "1", "true"])
def test_a_model_type_that_is_no_name(tmp_path, model_type):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"model: {{model_type: {model_type}}}\ntask: {{name: pointer_chase}}")
    with pytest.raises(UserError, match=r"^model.model_type: unknown architecture"):
        parse_recipe([str(path)], prog="train")


OUTSIDE = ["../secret.yaml", "{absolute}", "link.yaml", "linked/secret.yaml", "../recipes/../secret.yaml"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_no_recipe_is_taken_from_elsewhere(tmp_path, name, capsys):
    """Not by `..`, not by an absolute path, not by a link: in a training recipe, a comparison and a sweep."""
    folder, secret = tmp_path / "recipes", tmp_path / "secret.yaml"
    folder.mkdir()
    secret.write_text(HEAD)
    (folder / "link.yaml").symlink_to(secret)
    (folder / "linked").symlink_to(tmp_path)
    name = name.format(absolute=secret)
    (folder / "recipe.yaml").write_text(f"inherit: {name}\n")
    with pytest.raises(UserError, match=r"inherit: '.*' leaves the recipes' folder, recipes/"):
        parse_recipe([str(folder / "recipe.yaml")], prog="train")
    model, task = {"model": {"model_type": "vanilla_transformer"}}, {"task": {"name": "pointer_chase"}}
    for part, plan in (
        ("models.x.recipe", {"models": {"x": {"recipe": name}}, "tasks": {"y": task}}),
        ("tasks.y.recipe", {"models": {"x": model}, "tasks": {"y": {"recipe": name}}}),
    ):
        (folder / "compare.yaml").write_text(yaml.safe_dump(plan | {"seeds": [0]}))
        assert compare([str(folder / "compare.yaml"), "--output_dir", str(tmp_path / "out")]) == 2
        assert f"{part}: {name!r} leaves the recipes' folder" in capsys.readouterr().err
    (folder / "sweep.yaml").write_text(yaml.safe_dump({"recipe": name, "over": {"model.hidden_size": [16]}}))
    assert sweep([str(folder / "sweep.yaml"), "--output_dir", str(tmp_path / "out")]) == 2
    assert f"recipe: {name!r} leaves the recipes' folder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_circles_of_recipes_are_found_through_links(tmp_path):
    (tmp_path / "a.yaml").write_text("inherit: b.yaml\n")
    (tmp_path / "b.yaml").symlink_to(tmp_path / "a.yaml")
    with pytest.raises(UserError, match=r"`inherit` runs in a circle: a\.yaml -> b\.yaml"):
        parse_recipe([str(tmp_path / "a.yaml")], prog="train")


def test_python_files_from_elsewhere_are_not_run(tmp_path, monkeypatch, capsys):
    """A recipe may bring a task's file with it; one that lies anywhere else runs only if the user names it."""
    folder, file = tmp_path / "recipes", tmp_path / "task.py"
    folder.mkdir()
    file.write_text(f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n")
    (folder / "link.py").symlink_to(file)
    model = {"model": {"model_type": "vanilla_transformer"}}
    for name in (str(file), "../task.py", str(folder / "link.py")):
        monkeypatch.chdir(folder)
        components = {"name": "mixture", "options": {"components": [{"name": "gsm8k"}, {"name": name}]}}
        for task in ({"name": name}, components):
            (folder / "recipe.yaml").write_text(yaml.safe_dump(model | {"task": task}))
            assert train(["recipe.yaml", "--output_dir", str(tmp_path / "out")]) == 2
            assert f"the Python file {name!r} lies outside of the recipes' folder" in capsys.readouterr().err
        plan = {"models": {"x": model}, "tasks": {"y": {"task": {"name": name}}}, "seeds": [0]}
        (folder / "compare.yaml").write_text(yaml.safe_dump(plan))
        assert compare(["compare.yaml", "--output_dir", str(tmp_path / "out")]) == 2
        assert "lies outside" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
    (folder / "recipe.yaml").write_text(yaml.safe_dump(model | {"task": {"name": "gsm8k"}}))
    assert train(["recipe.yaml", "--task.name", str(file), "--output_dir", str(tmp_path / "out")]) == 2
    assert "must define one task" in capsys.readouterr().err
    assert (tmp_path / "ran").exists()
