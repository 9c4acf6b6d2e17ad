"""Reading YAML that somebody else may have written: refused in one line, whatever it holds, and never run or expanded.

YAML's safe loader builds plain values only. Beside that, a recipe
* names no key twice, since the first value would be lost without a word;
* is no longer with its aliases written out than a person would write: a few lines of aliases to aliases stand for more
  values than memory holds, and one to a value that it lies in, for endlessly many;
* holds text alone: no half of a surrogate pair, which no file can hold;
* names no other recipe outside of the recipes' folder, and no Python file outside of that and the working folder.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from .errors import UserError, one_line

MOST_CHARACTERS = 1_000_000
MOST_LEVELS = 50


class RecipeLoader(yaml.SafeLoader):
    """YAML's safe loader with the rules above; whatever is wrong is a `yaml.YAMLError`."""

    def get_single_node(self) -> yaml.Node | None:
        try:
            root = super().get_single_node()
        except RecursionError as error:
            raise yaml.composer.ComposerError(None, None, "the values are nested too deeply") from error
        if root is not None:
            _written_out(root, {}, ())
        return root

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        # What a scalar raises that is not of the kind its tag or its form says: a 99th month, 5000 digits.
        except (ValueError, LookupError, AttributeError, TypeError, OverflowError) as error:
            kind = node.tag.rpartition(":")[2]
            shown = node.value[:40] if isinstance(node.value, str) else "this"
            raise yaml.constructor.ConstructorError(
                None, None, f"{shown!r} cannot be read as {kind}", node.start_mark
            ) from error

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} stands there twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _written_out(node: yaml.Node, counted: dict[yaml.Node, int], above: tuple[yaml.Node, ...]) -> int:
    """The length of a value in characters with every alias written out, as far as its scalars go.

    Raises:
        yaml.YAMLError: if it is too long, nested too deeply, lies in itself, or holds what is no text.
    """
    if node in above:
        raise yaml.composer.ComposerError(None, None, "an alias stands inside the value it names", node.start_mark)
    if len(above) > MOST_LEVELS:
        raise yaml.composer.ComposerError(None, None, "the values are nested too deeply", node.start_mark)
    if node not in counted:
        if isinstance(node, yaml.CollectionNode):
            parts = [part for item in node.value for part in (item if isinstance(item, tuple) else (item,))]
            counted[node] = 1 + sum(_written_out(part, counted, (*above, node)) for part in parts)
        else:
            if any("\ud800" <= character <= "\udfff" for character in node.value):
                raise yaml.composer.ComposerError(None, None, "holds half of a surrogate pair", node.start_mark)
            counted[node] = 1 + len(node.value)
    if counted[node] > MOST_CHARACTERS:
        raise yaml.composer.ComposerError(
            None, None, f"with its aliases written out it has more than {MOST_CHARACTERS:,} characters", node.start_mark
        )
    return counted[node]


def parse_yaml(text: str) -> Any:
    """A YAML text as plain values.

    Raises:
        yaml.YAMLError: if it is none, or breaks a rule of this module.
    """
    return yaml.load(text, RecipeLoader)


def read_yaml(path: Path) -> Any:
    """A UTF-8 file of YAML as plain values.

    Raises:
        UserError: naming the file, and the line where there is one, if it cannot be read or breaks a rule of this
            module.
    """
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot read the recipe: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: a recipe is UTF-8 text: {error.reason} at byte {error.start}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or one_line(error)
        raise UserError(f"{path}: {line}not valid YAML: {problem}") from error
    for name in code_files(values):
        file = Path(name.replace("\0", "")).expanduser().resolve()
        if not any(file.is_relative_to(root) for root in (_root(path), Path.cwd().resolve())):
            raise UserError(
                f"{path}: the Python file {name!r} lies outside of the recipes' folder and of the working folder; what "
                "it holds is run only if you name it yourself: --task.name"
            )
    return values


def code_files(values: Any) -> Iterator[str]:
    """The Python files that task sections name, wherever they stand; naming a task by its file runs the file."""
    if isinstance(values, dict):
        name = values.get("name")
        if isinstance(name, str) and name.endswith(".py"):
            yield name
    for value in values.values() if isinstance(values, dict) else values if isinstance(values, list) else ():
        yield from code_files(value)


def _root(path: Path) -> Path:
    """The folder that a recipe may take others from: the outermost one called `recipes` above it, else its own."""
    folder = path.resolve().parent
    return next((above for above in reversed([folder, *folder.parents]) if above.name == "recipes"), folder)


def named_recipe(path: Path, field: str, name: Any) -> Path:
    """The file of another recipe that a recipe names, relative to itself.

    Raises:
        UserError: if it lies, links followed, outside of the outermost folder called `recipes` above the recipe, or of
            the recipe's own where there is none.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise UserError(f"{path}: {field} must be a path, got {name!r}")
    root = _root(path)
    named = path.parent / name
    if not named.resolve().is_relative_to(root):
        raise UserError(f"{path}: {field}: {name!r} leaves the recipes' folder, {root.name}/")
    return named
