"""Rules that every folder of `hf_models` keeps, so that it also runs alone as the code of a saved model."""

import ast
import importlib
import inspect
import sys
from pathlib import Path

import pytest
import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_relative_imports

import hf_models
from tests.hf_models.model_tests import SHIPPED_IMPORTS, imported_modules

ROOT = Path(hf_models.__file__).parent
ARCHITECTURES = sorted(path.parent.name for path in ROOT.glob("*/configuration_*.py"))
FILES = sorted(path for path in ROOT.glob("*/*.py") if path.name != "__init__.py")

AUTO_CLASS_OF_SUFFIX = {
    "Model": "AutoModel",
    "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForMultipleChoice": "AutoModelForMultipleChoice",
    "ForCausalLM": "AutoModelForCausalLM",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForImageClassification": "AutoModelForImageClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForPrediction": "AutoModelForTimeSeriesPrediction",
}


def relative_name(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def is_conversion(path: Path) -> bool:
    return path.name.startswith("convert_")


def without_main(path: Path) -> list[ast.stmt]:
    """The statements of a converter but its command."""
    body = ast.parse(path.read_text()).body
    return [node for node in body if not (isinstance(node, ast.FunctionDef) and node.name == "main")]


def defined_in(module, base: type) -> list[type]:
    return [
        value
        for _, value in inspect.getmembers(module, inspect.isclass)
        if issubclass(value, base) and value.__module__ == module.__name__
    ]


def test_every_folder_is_an_architecture():
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == set(ARCHITECTURES)
    assert ARCHITECTURES


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_folder_is_flat_and_named_alike(architecture):
    folder = ROOT / architecture
    assert (folder / "__init__.py").is_file()
    assert (folder / f"modeling_{architecture}.py").is_file()
    assert not [path for path in folder.iterdir() if path.is_dir() and path.name != "__pycache__"]
    for path in folder.glob("*.py"):
        assert path.name == "__init__.py" or path.stem.endswith(f"_{architecture}"), path.name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_classes_are_registered(architecture):
    # Importing the package suffices.
    assert architecture in vars(hf_models)
    configuration = importlib.import_module(f"hf_models.{architecture}.configuration_{architecture}")
    modeling = importlib.import_module(f"hf_models.{architecture}.modeling_{architecture}")

    configs = defined_in(configuration, PreTrainedConfig)
    assert architecture in [config.model_type for config in configs]
    for config in configs:
        assert type(AutoConfig.for_model(config.model_type)) is config
        assert config._auto_class == "AutoConfig"

    registered = set()
    for model_class in defined_in(modeling, PreTrainedModel):
        name = model_class.__name__
        if "For" not in name and (name.endswith("PreTrainedModel") or not name.endswith("Model")):
            continue
        suffix = "Model" if "For" not in name else name[name.index("For") :]
        assert suffix in AUTO_CLASS_OF_SUFFIX, f"{name}: no Auto class is known for a name that ends so"
        auto_class = getattr(transformers, AUTO_CLASS_OF_SUFFIX[suffix])
        assert auto_class._model_mapping[model_class.config_class] is model_class
        assert model_class._auto_class == auto_class.__name__, "register_for_auto_class, else no code is saved"
        registered.add(name)
    assert registered


@pytest.mark.parametrize("path", FILES, ids=relative_name)
def test_imports_can_be_shipped(path):
    absolute, relative = imported_modules(path.read_text())
    strangers = absolute - SHIPPED_IMPORTS - sys.stdlib_module_names
    if is_conversion(path):
        # Its command reads and writes files by what all converters share; the rest of it runs without.
        assert strangers == {"hf_models"}
        strangers = imported_modules("\n".join(map(ast.unparse, without_main(path))))[0] & {"hf_models"}
    assert not strangers, f"imports {sorted(strangers)}"
    modules = {module.removeprefix(".") for module in relative}
    # Nothing else is copied into a saved model: neither `from . import x` nor a module of another folder.
    absent = [module for module in modules if not (path.parent / f"{module}.py").is_file()]
    assert not absent, f"`from .{absent[0]} import` names no file of the folder"
    if not is_conversion(path):
        assert not [module for module in modules if module.startswith("convert_")]
        # The library finds relative imports by a regular expression, which also reads docstrings.
        assert set(get_relative_imports(path)) == modules


@pytest.mark.parametrize("path", [path for path in FILES if not is_conversion(path)], ids=relative_name)
def test_annotations_are_evaluated(path):
    # As strings they would switch off the configuration's type checks and hide the model's configuration class.
    futures = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    names = {alias.name for node in futures if node.module == "__future__" for alias in node.names}
    assert "annotations" not in names


def test_the_check_of_numbers_is_the_same_everywhere():
    """Folders share no code, so each configuration has a copy."""
    copies = set()
    for path in ROOT.glob("*/configuration_*.py"):
        (check,) = (node for node in ast.parse(path.read_text()).body if getattr(node, "name", None) == "check_finite")
        copies.add(ast.dump(check))
    assert len(copies) == 1
