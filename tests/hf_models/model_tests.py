"""One set of checks for every class of every architecture.

An architecture's test file subclasses `ModelTests` and says what there is to check:

```python
class TestVanillaTransformer(ModelTests):
    config_class = VanillaTransformerConfig
    classes = {
        VanillaTransformerModel: AutoModel,
        VanillaTransformerForConditionalGeneration: AutoModelForSeq2SeqLM,
    }
    bad_configs = [({"hidden_size": 30, "num_attention_heads": 4}, "hidden_size.*num_attention_heads")]

    def tiny_config(self, **overrides):
        sizes = {"vocab_size": 40, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
        return VanillaTransformerConfig(**(sizes | overrides))

    def recorded(self, model_class, config, inputs):
        length = inputs["input_ids"].shape[1]
        return {"output_hidden_states": {"encoder_hidden_states": (3, (2, length, config.hidden_size))}}
```

Every test then runs once for each class it concerns: `model_class` stands for all classes, `head_class` for those whose
inputs hold labels, `generating_class` for those with `generate`.

What to supply:

| name | meaning |
|---|---|
| `config_class` | the configuration class |
| `classes` | mapping from each model class to its Auto class; the body is the one under `AutoModel` |
| `tiny_config(**overrides)` | a configuration that runs in milliseconds, with unequal sizes wherever sizes may differ |
| `bad_configs` | combinations of fields that must be refused: `(overrides, pattern that the message must match)` |
| `recorded(model_class, config, inputs)` | the internals on request: `{flag: {output name: (number, shape of each)}}` |

What has a default for encoder-decoders over tokens, and their classification and multiple-choice heads; override it
for anything else:

| name | default |
|---|---|
| `inputs(model_class, batch_size, config, padding_side=None)` | token ids, mask, and labels or decoder inputs |
| `output_shapes(model_class, config, inputs)` | shape of `logits`, or of the body's `last_hidden_state` |
| `per_sample(model_class)` | outputs that belong to one sample, and the mask their second dimension runs along |
| `lora(model_class)` | `{"target_modules": ["q_proj", "v_proj"]}`; add `target_parameters` for bare parameters |
| `padding_sides` | `("left", "right")`; `()` for inputs that are never padded |
| `not_applicable` | `{}`: test name, or `test name[parameters]`, to the reason why it cannot apply |
| `zero_gradient` | `{}`: pattern of `ClassName.parameter.name` to the reason why that gradient is exactly zero |

`inputs` gives the same rows whatever the batch size: row i never changes, and is shortened to a length of its own when
a padding side is given. Row lengths are unequal, so the number of targets differs between micro-batches.

Declared exceptions are printed together at the end of a run, and each must hold: a name in `not_applicable` that is no
test of the class stops the collection, and a gradient declared zero must be zero.

Models under test come from `build`, which adds noise to every parameter. At their usual scale of 0.02 tiny weights
make nearly constant models: attention is uniform, biases are zero, and a leak of padding stays below any tolerance.

Tolerances are stated where they are used. "Equal" without one means bit for bit.
"""

import ast
import copy
import dataclasses
import difflib
import inspect
import json
import logging
import re
import subprocess
import sys
import types
import typing
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMultipleChoice,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.utils import ModelOutput

IGNORED_LABEL = -100
SHIPPED_IMPORTS = frozenset({"torch", "numpy", "transformers", "huggingface_hub"})

# Run by a fresh interpreter: loads, compares, saves and loads again every folder of a job, from remote code alone.
_CUSTOM_CODE_CHILD = r'''
import importlib.abc
import sys
from pathlib import Path

BLOCKED = {"hf_models", "trainers", "model_cards", "push_to_hub", "tests"}


class Absent(importlib.abc.MetaPathFinder):
    """Hides the packages of this project, which an editable install would offer in any working directory."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None


sys.meta_path.insert(0, Absent())

import torch
import transformers
from transformers import AutoConfig

torch.set_num_threads(1)
job = torch.load(sys.argv[1], weights_only=True)


def load(auto_name, folder):
    auto_class = getattr(transformers, auto_name)
    model, report = auto_class.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    where = type(model).__module__
    assert where.startswith("transformers_modules."), f"{auto_name} of {folder} came from {where}"
    return model.eval(), report


def compare(model, entry):
    with torch.no_grad():
        outputs = model(**entry["inputs"])
    for name, expected in entry["outputs"].items():
        torch.testing.assert_close(outputs[name], expected, rtol=0, atol=1e-6, msg=lambda text: f"{name}: {text}")


for entry in job["entries"]:
    config = AutoConfig.from_pretrained(entry["folder"], trust_remote_code=True)
    assert type(config).__name__ == job["config_class"], type(config)
    model, report = load(entry["auto_class"], entry["folder"])
    assert type(model).__name__ == entry["class"], type(model)
    assert not report["missing_keys"], f"{entry['class']} lacks {sorted(report['missing_keys'])}"
    compare(model, entry)
    if entry["generate"]:
        model.generate(**entry["generate"], max_new_tokens=3, do_sample=False)

    if job["body_class"]:
        body, report = load("AutoModel", entry["folder"])
        assert type(body).__name__ == job["body_class"], type(body)
        assert not report["missing_keys"], f"the body in {entry['class']} lacks {sorted(report['missing_keys'])}"

    again = Path(entry["folder"]).with_name(Path(entry["folder"]).name + "_saved_again")
    model.save_pretrained(again)
    assert list(again.glob("modeling_*.py")), f"{entry['class']}: saving a model of remote code wrote no code"
    model, report = load(entry["auto_class"], again)
    assert not report["missing_keys"], f"{entry['class']} saved again lacks {sorted(report['missing_keys'])}"
    compare(model, entry)

for auto_name, class_name in job["auto_classes"].items():
    model, _ = load(auto_name, job["every_class_from"])
    assert type(model).__name__ == class_name, type(model)

leaked = sorted(BLOCKED & {name.split(".")[0] for name in sys.modules})
assert not leaked, f"imported although hidden: {leaked}"
print("every class loaded from its remote code")
'''


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Makes torch fill memory it leaves uninitialised with NaN (integers: the largest value).

    A buffer that a load forgets to set is otherwise right by luck whenever it gets back the memory of an earlier model.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def assert_equal(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Asserts that two tensors agree in dtype, shape and every bit of their values (NaN equals nothing)."""
    assert actual.device == expected.device, f"{what} is on {actual.device}"
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, msg=lambda text: f"{what}: {text}")


def assert_close(actual: torch.Tensor, expected: torch.Tensor, what: str, rtol: float, atol: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol, msg=lambda text: f"{what}: {text}")


def assert_same_outputs(actual: ModelOutput, expected: ModelOutput, what: str) -> None:
    """Asserts that equal computations on equal weights agree.

    Loaded weights lie elsewhere in memory, which may change the last bit of a matrix product.
    """
    assert_close(main_output(actual), main_output(expected), what, rtol=1e-5, atol=1e-6)


def values_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer by name, tied and non-persistent ones included."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def tied_groups(model: nn.Module) -> list[set[str]]:
    """Groups of parameter names that share one memory."""
    groups: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), set()).add(name)
    return [names for names in groups.values() if len(names) > 1]


def admitted_types(annotation: Any) -> set[Any]:
    """The types and literal values that a field's annotation admits, unions and `Annotated` resolved."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return admitted_types(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return set().union(*(admitted_types(part) for part in typing.get_args(annotation)))
    return {annotation if origin is None or origin is typing.Literal else origin}


def imported_modules(source: str) -> tuple[set[str], set[str]]:
    """Top-level names of the absolute imports of a Python source, and the text of each relative import's module."""
    absolute, relative = set(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            absolute.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            relative.add("." * node.level + (node.module or ""))
        elif isinstance(node, ast.ImportFrom):
            absolute.add(node.module.split(".")[0])
    return absolute, relative


def main_output(outputs: ModelOutput) -> torch.Tensor:
    return outputs["logits"] if "logits" in outputs else outputs[0]


class ModelTests:
    config_class: type[PreTrainedConfig]
    classes: dict[type[PreTrainedModel], type]
    bad_configs: list[tuple[dict[str, Any], str]]
    padding_sides: tuple[str, ...] = ("left", "right")
    not_applicable: dict[str, str] = {}
    zero_gradient: dict[str, str] = {}

    # Longest rows of `inputs`. The row's own length is the longest one less an element of the third value, in turn.
    source_length, source_shortening = 7, (0, 3, 1)
    target_length, target_shortening = 5, (0, 1, 3)

    def tiny_config(self, **overrides: Any) -> PreTrainedConfig:
        raise NotImplementedError

    def recorded(
        self, model_class: type[PreTrainedModel], config: PreTrainedConfig, inputs: dict[str, torch.Tensor]
    ) -> dict[str, dict[str, tuple[int, tuple[int, ...]]]]:
        raise NotImplementedError

    def inputs(
        self,
        model_class: type[PreTrainedModel],
        batch_size: int,
        config: PreTrainedConfig,
        padding_side: str | None = None,
    ) -> dict[str, torch.Tensor]:
        """Inputs of `batch_size` rows: token ids, masks, and what the Auto class of `model_class` asks for besides.

        Left padding also pads the targets on the left and hands over the decoder inputs, as labels alone would be
        shifted behind the padding.
        """
        auto_class = self.classes[model_class]
        choices = 3 if auto_class is AutoModelForMultipleChoice else 1
        rows = [row for row in range(batch_size) for _ in range(choices)]
        source = self._tokens(rows, config.vocab_size, config, self.source_length, self.source_shortening, padding_side)
        batch = {"input_ids": source, "attention_mask": source.ne(config.pad_token_id).long()}
        if auto_class is AutoModelForMultipleChoice:
            batch = {name: value.view(batch_size, choices, -1) for name, value in batch.items()}
            return batch | {"labels": torch.arange(batch_size) % choices}
        if auto_class is AutoModelForSequenceClassification:
            return batch | {"labels": torch.arange(batch_size) % config.num_labels}

        vocab_size = getattr(config, "decoder_vocab_size", None) or config.vocab_size
        target = self._tokens(rows, vocab_size, config, self.target_length, self.target_shortening, padding_side)
        mask = target.ne(config.pad_token_id)
        decoder_input_ids = target.roll(1, dims=1)
        starts = mask.int().argmax(dim=1)
        decoder_input_ids[torch.arange(batch_size), starts] = config.decoder_start_token_id
        decoder_inputs = {
            "decoder_input_ids": decoder_input_ids.masked_fill(~mask, config.pad_token_id),
            "decoder_attention_mask": mask.long(),
        }
        if auto_class is AutoModel:
            return batch | decoder_inputs
        batch["labels"] = target.masked_fill(~mask, IGNORED_LABEL)
        return batch | decoder_inputs if padding_side == "left" else batch

    @staticmethod
    def _tokens(
        rows: list[int],
        vocab_size: int,
        config: PreTrainedConfig,
        length: int,
        shortening: tuple[int, ...],
        padding_side: str | None,
    ) -> torch.Tensor:
        lowest = 1 + max(config.pad_token_id, config.bos_token_id, config.eos_token_id)
        tokens = torch.full((len(rows), length), config.pad_token_id)
        for index, row in enumerate(rows):
            generator = torch.Generator().manual_seed(100 * row + index)
            size = length - (shortening[row % len(shortening)] if padding_side else 0)
            content = torch.randint(lowest, vocab_size, (length,), generator=generator)[:size]
            content[-1] = config.eos_token_id
            tokens[index, slice(length - size, None) if padding_side == "left" else slice(size)] = content
        return tokens

    def output_shapes(
        self, model_class: type[PreTrainedModel], config: PreTrainedConfig, inputs: dict[str, torch.Tensor]
    ) -> dict[str, tuple[int, ...]]:
        auto_class = self.classes[model_class]
        if auto_class is AutoModel:
            return {"last_hidden_state": (*inputs["decoder_input_ids"].shape, config.hidden_size)}
        if auto_class is AutoModelForSeq2SeqLM:
            vocab_size = getattr(config, "decoder_vocab_size", None) or config.vocab_size
            return {"logits": (*inputs["labels"].shape, vocab_size)}
        if auto_class is AutoModelForMultipleChoice:
            return {"logits": tuple(inputs["input_ids"].shape[:2])}
        return {"logits": (inputs["input_ids"].shape[0], config.num_labels)}

    def per_sample(self, model_class: type[PreTrainedModel]) -> dict[str, str | None]:
        """Outputs whose first dimension is the batch, each with `"source"`, `"target"` or None.

        The word names the mask that the second dimension runs along; padding positions are not compared.
        """
        if self.classes[model_class] is AutoModel:
            return {"last_hidden_state": "target", "encoder_last_hidden_state": "source"}
        if self.classes[model_class] is AutoModelForSeq2SeqLM:
            return {"logits": "target", "encoder_last_hidden_state": "source"}
        return {"logits": None}

    def lora(self, model_class: type[PreTrainedModel]) -> dict[str, Any]:
        return {"target_modules": ["q_proj", "v_proj"]}

    def vary(self, model: PreTrainedModel) -> None:
        """Adds seeded noise to every parameter, so that none is zero, constant or too small to matter."""
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                scale = 0.1 if parameter.ndim < 2 else 0.5 / parameter.shape[-1] ** 0.5
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=scale)

    def build(
        self, model_class: type[PreTrainedModel], config: PreTrainedConfig | None = None, seed: int = 0
    ) -> PreTrainedModel:
        """A model in eval mode, made after `set_seed(seed)` and varied."""
        set_seed(seed)
        model = model_class(config or self.tiny_config())
        self.vary(model)
        return model.eval()

    def dropout(self, probability: float) -> dict[str, float]:
        """Overrides that set every dropout field of the configuration."""
        fields = (field.name for field in dataclasses.fields(self.config_class))
        return {name: probability for name in fields if "dropout" in name}

    @classmethod
    def declarations(cls) -> dict[str, str]:
        """Every declared exception with its reason. Raises `pytest.UsageError` for a name that is no test."""
        for name in cls.not_applicable:
            if not hasattr(cls, name.partition("[")[0]):
                raise pytest.UsageError(f"{cls.__name__}.not_applicable names no test: {name!r}")
        declared = cls.not_applicable | {f"gradient of {name}": why for name, why in cls.zero_gradient.items()}
        return {f"{cls.__name__}: {what}": why for what, why in declared.items()}

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        wanted = {
            "model_class": lambda _: True,
            "head_class": lambda model_class: self.classes[model_class] is not AutoModel,
            "generating_class": lambda model_class: model_class.can_generate(),
        }
        for argument, belongs in wanted.items():
            if argument in metafunc.fixturenames:
                chosen = [model_class for model_class in self.classes if belongs(model_class)]
                metafunc.parametrize(argument, chosen, ids=[model_class.__name__ for model_class in chosen])

    # Configuration

    def test_config_defaults_are_valid(self):
        config = self.config_class()
        config.validate()
        assert type(config).model_type == config.to_dict()["model_type"]

    def test_config_survives_json(self, tmp_path):
        for config in (self.config_class(), self.tiny_config()):
            expected = config.to_dict()
            assert self.config_class.from_dict(json.loads(config.to_json_string())).to_dict() == expected
            assert self.config_class.from_dict(json.loads(config.to_json_string(use_diff=False))).to_dict() == expected
            config.save_pretrained(tmp_path)
            loaded = AutoConfig.from_pretrained(tmp_path)
            assert type(loaded) is self.config_class
            # Both are set by saving and loading.
            differing = {"auto_map", "_name_or_path"}
            actual = loaded.to_dict()
            assert {name: actual[name] for name in set(actual) - differing} == {
                name: expected[name] for name in set(expected) - differing
            }

    def test_config_refuses_wrong_types(self):
        annotations = inspect.get_annotations(self.config_class)
        assert annotations, f"{self.config_class.__name__} declares no fields of its own"
        for name, annotation in annotations.items():
            if typing.get_origin(annotation) is typing.ClassVar:
                continue
            admitted = admitted_types(annotation)
            assert float not in admitted or int in admitted, f"{name} refuses 1: write `float | int`"
            # A value that JSON or YAML may hold, of a type that the field does not have.
            wrong = {"not": "a value"} if dict not in admitted else [["not a value"]]
            with pytest.raises((StrictDataclassError, ValueError), match=name):
                self.tiny_config(**{name: wrong})

    def test_config_refuses_bad_combinations(self):
        assert self.bad_configs, "name at least one combination that is refused"
        for overrides, pattern in self.bad_configs:
            with pytest.raises((StrictDataclassError, ValueError)) as caught:
                self.tiny_config(**overrides)
            assert re.search(pattern, str(caught.value), flags=re.DOTALL), f"{overrides}: {caught.value}"

    def test_config_warns_of_unknown_key(self, caplog, tmp_path):
        own = [name for name in inspect.get_annotations(self.config_class) if len(name) > 8]
        misspelt = own[0][:3] + own[0][4:]
        assert difflib.get_close_matches(misspelt, own, n=1) == [own[0]]
        assert own[0] in self._warnings(caplog, lambda: self.tiny_config(**{misspelt: 4}), misspelt)
        for model_class in self.classes:
            folder = tmp_path / model_class.__name__
            model_class(self.tiny_config(num_labels=3)).save_pretrained(folder)
            assert not self._warnings(caplog, lambda folder=folder: self.config_class.from_pretrained(folder), "")

    @staticmethod
    def _warnings(caplog, action, word: str) -> str:
        """Text of the warnings that `action` gives through `warnings` or a logger and that hold `word`."""
        caplog.clear()
        # The library's `warning_once` drops messages that this process has given before.
        logging.Logger.warning_once.cache_clear()
        library = logging.getLogger("transformers")
        handler_added = not library.propagate
        if handler_added:
            library.addHandler(caplog.handler)
        try:
            with warnings.catch_warnings(record=True) as caught, caplog.at_level(logging.WARNING):
                warnings.simplefilter("always")
                action()
        finally:
            if handler_added:
                library.removeHandler(caplog.handler)
        messages = [str(warning.message) for warning in caught] + [record.getMessage() for record in caplog.records]
        return "\n".join(message for message in messages if word in message)

    def test_classes_are_registered(self, tmp_path):
        assert AutoConfig.for_model(self.config_class.model_type).__class__ is self.config_class
        assert self.config_class._auto_class == "AutoConfig"
        for model_class, auto_class in self.classes.items():
            assert model_class._auto_class == auto_class.__name__, f"register_for_auto_class of {model_class.__name__}"
            assert auto_class._model_mapping[self.config_class] is model_class
            folder = tmp_path / model_class.__name__
            self.build(model_class).save_pretrained(folder)
            assert type(auto_class.from_pretrained(folder)) is model_class

    # Saving and loading

    @pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
    def test_save_and_load_restore_every_value(self, model_class, tied, tmp_path):
        overrides = {} if tied else {"tie_word_embeddings": False}
        model = self.build(model_class, self.tiny_config(**overrides))
        model.save_pretrained(tmp_path)
        weight_files = [path.name for path in tmp_path.iterdir() if path.suffix not in (".json", ".py")]
        assert weight_files == ["model.safetensors"]

        groups = tied_groups(model)
        output_embeddings = model.get_output_embeddings()
        if output_embeddings is not None:
            names = {name for name, value in values_of(model).items() if value is output_embeddings.weight}
            assert (len(names) > 1) is tied, f"tie_word_embeddings={tied}, but the output embedding is {sorted(names)}"
        stored = load_file(tmp_path / "model.safetensors")
        for group in groups:
            assert len(group & set(stored)) == 1, f"of the tied {sorted(group)} the file holds {group & set(stored)}"
        persistent = model.state_dict()
        assert set(stored) == set(persistent) - set().union(*(group - set(stored) for group in groups))

        with poisoned_memory():
            loaded, report = model_class.from_pretrained(tmp_path, output_loading_info=True)
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
        assert not report["mismatched_keys"]
        expected, actual = values_of(model), values_of(loaded)
        assert set(actual) == set(expected)
        for name, value in expected.items():
            assert_equal(actual[name], value, name)
        assert sorted(map(sorted, tied_groups(loaded))) == sorted(map(sorted, groups))
        for module_name, module in loaded.named_modules():
            plain = [name for name, value in vars(module).items() if isinstance(value, torch.Tensor)]
            assert not plain, f"{module_name}: plain tensor attributes {plain} stay on the meta device"

        inputs = self.inputs(model_class, 2, model.config)
        with torch.no_grad():
            assert_same_outputs(loaded.eval()(**inputs), model(**inputs), "outputs")

    def test_buffers_do_not_depend_on_the_global_seed(self, model_class):
        first, second = (dict(self.build(model_class, seed=seed).named_buffers()) for seed in (0, 1))
        for name, value in first.items():
            assert_equal(second[name], value, name)

    def test_removed_keys_are_initialised_again(self, model_class, tmp_path):
        config = self.tiny_config()
        self.build(model_class, config).save_pretrained(tmp_path)
        stored = load_file(tmp_path / "model.safetensors")
        fresh = []
        for seed in (1, 2):
            set_seed(seed)
            fresh.append(values_of(model_class(config)))
        keys = sorted(stored)
        for removed in (keys[::2], keys[1::2]):
            kept = {name: value for name, value in stored.items() if name not in removed}
            save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
            set_seed(3)
            with poisoned_memory():
                loaded = values_of(model_class.from_pretrained(tmp_path))
            for name, value in kept.items():
                assert_equal(loaded[name], value, f"{name}, which the file holds,")
            for name in removed:
                self._assert_like_fresh(name, loaded[name], fresh[0][name], fresh[1][name])

    @staticmethod
    def _assert_like_fresh(name: str, value: torch.Tensor, one: torch.Tensor, other: torch.Tensor) -> None:
        """Equal to a fresh value where that is the same for every seed, else drawn from a like distribution."""
        if torch.equal(one, other):
            assert_equal(value, one, f"{name}, removed from the file,")
            return
        assert value.isfinite().all(), f"{name}, removed from the file, is not initialised"
        spread, expected = value.std(correction=0).item(), one.std(correction=0).item()
        # A factor of 2 lies far outside the sampling error of 32 values, and of 10 of that of a few.
        factor = 2 if value.numel() >= 32 else 10
        assert expected / factor < spread < expected * factor, f"{name}: standard deviation {spread}, fresh {expected}"
        assert abs(value.mean() - one.mean()) < factor * expected, f"{name}: mean {value.mean()}, fresh {one.mean()}"

    def test_bfloat16_load(self, model_class, tmp_path):
        model = self.build(model_class)
        model.save_pretrained(tmp_path / "float32")
        with poisoned_memory():
            loaded = model_class.from_pretrained(tmp_path / "float32", dtype=torch.bfloat16).eval()
        actual = values_of(loaded)
        for name, value in values_of(model).items():
            if value.is_floating_point() and name in dict(model.named_parameters(remove_duplicate=False)):
                assert_equal(actual[name], value.bfloat16(), name)
            else:
                assert_close(actual[name], value.to(actual[name].dtype), name, rtol=0, atol=0)
        with torch.no_grad():
            outputs = main_output(loaded(**self.inputs(model_class, 2, model.config)))
        assert outputs.isfinite().all()
        loaded.save_pretrained(tmp_path / "bfloat16")
        assert model_class.from_pretrained(tmp_path / "bfloat16").dtype == torch.bfloat16

    def test_body_loads_from_the_folder_of_a_head(self, head_class, tmp_path):
        head = self.build(head_class)
        head.save_pretrained(tmp_path)
        with poisoned_memory():
            body, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
        assert self.classes[type(body)] is AutoModel
        assert not report["missing_keys"]
        expected = values_of(head)
        for name, value in values_of(body).items():
            assert_equal(value, expected[f"{head.base_model_prefix}.{name}"], name)

    # Custom code

    def test_saved_code_is_complete(self, model_class, tmp_path):
        self.build(model_class).save_pretrained(tmp_path)
        self._assert_code_is_complete(tmp_path)

    def _assert_code_is_complete(self, folder: Path) -> None:
        auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
        expected = {"AutoConfig": self.config_class.__name__}
        expected |= {auto_class.__name__: model_class.__name__ for model_class, auto_class in self.classes.items()}
        assert {name: value.partition(".")[2] for name, value in auto_map.items()} == expected
        for value in auto_map.values():
            assert (folder / f"{value.partition('.')[0]}.py").is_file(), f"auto_map names {value}"
        for path in folder.glob("*.py"):
            absolute, relative = imported_modules(path.read_text())
            assert absolute <= SHIPPED_IMPORTS | sys.stdlib_module_names, f"{path.name} imports {absolute}"
            for module in relative:
                assert (folder / f"{module.removeprefix('.')}.py").is_file(), f"{path.name} imports {module}"

    def test_remote_code_in_a_fresh_process(self, tmp_path):
        entries, sizes = [], {}
        for model_class, auto_class in self.classes.items():
            model = self.build(model_class)
            folder = tmp_path / model_class.__name__
            model.save_pretrained(folder)
            inputs = self.inputs(model_class, 2, model.config)
            with torch.no_grad():
                outputs = model(**inputs)
            entries.append(
                {
                    "folder": str(folder),
                    "class": model_class.__name__,
                    "auto_class": auto_class.__name__,
                    "inputs": inputs,
                    "outputs": {name: value for name, value in outputs.items() if isinstance(value, torch.Tensor)},
                    "generate": self._prompt(inputs) if model_class.can_generate() else None,
                }
            )
            sizes[str(folder)] = model.num_parameters()
        auto_classes = {auto_class.__name__: model_class.__name__ for model_class, auto_class in self.classes.items()}
        job = {
            "entries": entries,
            "config_class": self.config_class.__name__,
            "body_class": auto_classes.get("AutoModel"),
            "auto_classes": auto_classes,
            "every_class_from": max(sizes, key=sizes.__getitem__),
        }
        torch.save(job, tmp_path / "job.pt")
        (tmp_path / "elsewhere").mkdir()
        child = subprocess.run(
            [sys.executable, "-I", "-W", "ignore", "-c", _CUSTOM_CODE_CHILD, str(tmp_path / "job.pt")],
            cwd=tmp_path / "elsewhere",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert child.returncode == 0, child.stderr[-4000:]
        assert "every class loaded" in child.stdout

    @staticmethod
    def _prompt(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The part of the inputs that `generate` takes."""
        return {name: value for name, value in inputs.items() if name != "labels" and not name.startswith("decoder_")}

    # Forward pass

    def test_output_shapes(self, model_class):
        model = self.build(model_class)
        inputs = self.inputs(model_class, 2, model.config)
        outputs = model(**inputs)
        assert isinstance(outputs, ModelOutput)
        for name, shape in self.output_shapes(model_class, model.config, inputs).items():
            assert tuple(outputs[name].shape) == shape, name
            assert outputs[name].isfinite().all(), name
        if "labels" in inputs:
            assert outputs.loss.shape == ()
            assert outputs.loss.isfinite()
            unlabelled = {name: value for name, value in inputs.items() if name != "labels"}
            if model_class.can_generate():
                unlabelled |= {"decoder_input_ids": inputs["labels"].clamp(min=0)}
            assert model(**unlabelled).loss is None

    def test_dummy_inputs_fit(self, model_class):
        """A model that reads no tokens says itself what it can be given."""
        model = self.build(model_class)
        if getattr(model.config, "vocab_size", None) is None:
            with torch.no_grad():
                outputs = model(**model.dummy_inputs)
            assert outputs[0].isfinite().all()
            assert len(model.dummy_inputs[model.main_input_name]) == 2

    def test_tuple_equals_dict(self, model_class):
        model = self.build(model_class)
        inputs = self.inputs(model_class, 2, model.config)
        with torch.no_grad():
            as_dict, as_tuple = model(**inputs), model(**inputs, return_dict=False)
        assert isinstance(as_tuple, tuple)
        assert len(as_tuple) == len(as_dict.to_tuple())
        for name, one, other in zip(as_dict.keys(), as_dict.to_tuple(), as_tuple, strict=True):
            assert type(one) is type(other), name
            if isinstance(one, torch.Tensor):
                assert_equal(other, one, name)

    def test_evaluation_is_deterministic(self, model_class):
        model = self.build(model_class, self.tiny_config(**self.dropout(0.5)))
        inputs = self.inputs(model_class, 2, model.config)
        results = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            before = torch.get_rng_state()
            with torch.no_grad():
                results.append(main_output(model(**inputs)))
            assert torch.equal(torch.get_rng_state(), before), "evaluation draws from the global generator"
        assert_equal(results[0], results[1], "outputs under two seeds")

    def test_batch_equals_single_samples(self, model_class):
        model = self.build(model_class)
        inputs = self.inputs(model_class, 2, model.config)
        with torch.no_grad():
            together = model(**inputs)
            for row in range(2):
                alone = model(**{name: value[row : row + 1] for name, value in inputs.items()})
                for name in self.per_sample(model_class):
                    # Another order of summation in float32; outputs are of order 1.
                    assert_close(together[name][row], alone[name][0], f"{name}, row {row}", rtol=1e-5, atol=1e-5)

    def test_padding_is_neutral(self, model_class):
        model = self.build(model_class)
        for padding_side in self.padding_sides:
            inputs = self.inputs(model_class, 3, model.config, padding_side)
            with torch.no_grad():
                padded = model(**inputs)
                for row in range(3):
                    alone = model(**self._unpadded(inputs, row))
                    for name, along in self.per_sample(model_class).items():
                        value = padded[name][row]
                        if along is not None:
                            value = value[self._mask(inputs, along)[row]]
                        what = f"{name}, row {row}, padding on the {padding_side}"
                        # As for batches; sums here also run over other numbers of terms.
                        assert_close(value, alone[name][0], what, rtol=1e-5, atol=1e-5)

    @staticmethod
    def _mask(inputs: dict[str, torch.Tensor], along: str) -> torch.Tensor:
        if along == "source":
            return inputs["attention_mask"].bool()
        if "decoder_attention_mask" in inputs:
            return inputs["decoder_attention_mask"].bool()
        return inputs["labels"].ne(IGNORED_LABEL)

    def _unpadded(self, inputs: dict[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
        """Row `row` as a batch of one, without its padding positions."""
        single = {name: value[row : row + 1] for name, value in inputs.items()}
        # The choices of one row are of one length.
        source = single["attention_mask"].bool().flatten(0, -2)[0]
        unpadded = {}
        for name, value in single.items():
            if name.startswith("decoder_") or (name == "labels" and value.ndim > 1):
                unpadded[name] = value[..., self._mask(single, "target")[0]]
            else:
                unpadded[name] = value if name == "labels" else value[..., source]
        return unpadded

    def test_recorded_internals(self, model_class):
        model = self.build(model_class)
        model.set_attn_implementation("eager")
        inputs = self.inputs(model_class, 2, model.config)
        recorded = self.recorded(model_class, model.config, inputs)
        assert recorded, f"{model_class.__name__} records nothing"
        names = {name for outputs in recorded.values() for name in outputs}
        with torch.no_grad():
            plain = model(**inputs)
            kept = sorted(name for name in names if plain.get(name) is not None)
            assert not kept, f"recorded without being asked for: {kept}"
            for flag, expected in recorded.items():
                outputs = model(**inputs, **{flag: True})
                for name, (number, shape) in expected.items():
                    assert len(outputs[name]) == number, f"{flag}: {name} holds {len(outputs[name])} tensors"
                    for value in outputs[name]:
                        assert tuple(value.shape) == tuple(shape), f"{flag}: {name} is of shape {tuple(value.shape)}"
                        assert value.isfinite().all(), f"{flag}: {name}"
                surplus = sorted(name for name in names - set(expected) if outputs.get(name) is not None)
                assert not surplus, f"{flag} also records {surplus}"
                # Recording may choose another order of the same operations.
                assert_same_outputs(outputs, plain, f"outputs with {flag}")

    def test_attention_implementations_agree(self, model_class):
        assert model_class._supports_sdpa
        model = self.build(model_class)
        for padding_side in (None, *self.padding_sides):
            inputs = self.inputs(model_class, 3, model.config, padding_side)
            results = {}
            for implementation in ("eager", "sdpa"):
                model.set_attn_implementation(implementation)
                with torch.no_grad():
                    results[implementation] = model(**inputs)
            for name, along in self.per_sample(model_class).items():
                eager, sdpa = results["eager"][name], results["sdpa"][name]
                if along is not None:
                    mask = self._mask(inputs, along)
                    eager, sdpa = eager[mask], sdpa[mask]
                what = f"{name}, padding on the {padding_side}"
                # Two orders of the same float32 operations.
                assert_close(sdpa, eager, what, rtol=1e-5, atol=1e-5)

    def test_inputs_embeds_equal_input_ids(self, model_class):
        assert "inputs_embeds" in inspect.signature(model_class.forward).parameters
        model = self.build(model_class)
        inputs = self.inputs(model_class, 2, model.config)
        embedded = {name: value for name, value in inputs.items() if name != "input_ids"}
        with torch.no_grad():
            embedded["inputs_embeds"] = model.get_input_embeddings()(inputs["input_ids"])
            assert_equal(main_output(model(**embedded)), main_output(model(**inputs)), "outputs")

    def test_resized_embeddings(self, model_class, tmp_path):
        model = self.build(model_class)
        size = model.config.vocab_size + 3
        groups = tied_groups(model)
        model.resize_token_embeddings(size)
        assert model.get_input_embeddings().num_embeddings == model.config.vocab_size == size
        assert sorted(map(sorted, tied_groups(model))) == sorted(map(sorted, groups))
        inputs = self.inputs(model_class, 2, model.config)
        inputs["input_ids"].flatten()[0] = size - 1
        with torch.no_grad():
            outputs = model(**inputs)
            for name, shape in self.output_shapes(model_class, model.config, inputs).items():
                assert tuple(outputs[name].shape) == shape, name
            model.save_pretrained(tmp_path)
            loaded = model_class.from_pretrained(tmp_path).eval()
            assert_same_outputs(loaded(**inputs), outputs, "outputs")

    # Gradients

    def _loss(self, model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """The model's loss, or for a body a fixed random projection of its main output.

        A plain sum or mean square will not do: behind a layer norm both are constant.
        """
        outputs = model(**inputs)
        if "labels" in inputs:
            return outputs.loss
        values = main_output(outputs)
        direction = torch.randn(values.shape, generator=torch.Generator().manual_seed(0)).to(values.dtype)
        return (values * direction).mean()

    def test_every_parameter_learns(self, model_class):
        # float64 separates a gradient that is zero but for rounding from a small one, even where a model computes a
        # softmax or a loss in float32: such rounding is 1e-7 of the largest gradient, real gradients are above 1e-4.
        model = self.build(model_class).double().train()
        inputs = self.inputs(model_class, 4, model.config, "right" if "right" in self.padding_sides else None)
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
        self._loss(model, inputs).backward()
        for name, parameter in model.named_parameters():
            assert_equal(parameter.detach(), before[name], f"{name} after forward and backward")
        missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
        assert not missing, f"no gradient at all: {missing}"
        size = {name: parameter.grad.abs().max().item() for name, parameter in model.named_parameters()}
        class_name = model_class.__name__
        declared = {
            name for name in size if any(re.search(pattern, f"{class_name}.{name}") for pattern in self.zero_gradient)
        }
        threshold = 1e-6 * max(size.values())
        dead = sorted(name for name, value in size.items() if not value > threshold and name not in declared)
        assert not dead, f"zero gradient: {dead}"
        alive = sorted(name for name in declared if size[name] > threshold)
        assert not alive, f"declared to have no gradient, but have one: {alive}"
        optimizer.step()
        still = [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
        assert set(still) <= declared, f"not moved by one optimizer step: {still}"

    def test_checkpointed_gradient_equals_plain(self, model_class):
        config = self.tiny_config(**self.dropout(0.1))
        inputs = self.inputs(model_class, 2, config)
        gradients, calls = [], []
        for checkpointed in (False, True):
            model = self.build(model_class, config).train()
            if checkpointed:
                enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
                enable()
            calls.append(0)

            def count(*_):
                calls[-1] += 1

            for module in model.modules():
                if isinstance(module, nn.Linear):
                    module.register_forward_hook(count)
            set_seed(1)
            self._loss(model, inputs).backward()
            gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
        assert calls[1] > calls[0], "nothing was computed again: activation checkpointing is not in effect"
        for name, plain in gradients[0].items():
            assert gradients[1][name] is not None, f"{name} has no gradient under checkpointing"
            assert_equal(gradients[1][name], plain, f"gradient of {name}")

    # Training with the library's own Trainer

    def _dataset(self, model_class: type[PreTrainedModel], config: PreTrainedConfig) -> list[dict[str, torch.Tensor]]:
        """Eight rows, padded to one length so that they can be stacked in any order."""
        inputs = self.inputs(model_class, 8, config, "right" if "right" in self.padding_sides else None)
        return [{name: value[row] for name, value in inputs.items()} for row in range(8)]

    def _train(
        self,
        model: PreTrainedModel,
        folder: Path,
        resume_from: Path | None = None,
        compute_metrics: typing.Callable | None = None,
        **arguments: Any,
    ) -> Trainer:
        dataset = self._dataset(type(model), model.config)
        settings = {"per_device_train_batch_size": 2, "logging_steps": 1, "save_strategy": "no", "use_cpu": True}
        settings |= {"report_to": [], "disable_tqdm": True, "dataloader_pin_memory": False, "seed": 5}
        trainer = Trainer(
            model=model,
            args=TrainingArguments(output_dir=str(folder), **(settings | arguments)),
            train_dataset=dataset,
            eval_dataset=dataset[:3],
            data_collator=default_data_collator,
            compute_metrics=compute_metrics,
        )
        trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
        return trainer

    @staticmethod
    def _history(trainer: Trainer, name: str) -> list[float]:
        return [entry[name] for entry in trainer.state.log_history if name in entry]

    def test_trainer_trains_and_evaluates(self, head_class, tmp_path):
        model = self.build(head_class)
        model.set_attn_implementation("eager")
        dataset = self._dataset(head_class, model.config)
        inputs = default_data_collator(dataset[:3])
        shape = self.output_shapes(head_class, model.config, inputs)["logits"]

        def compute_metrics(prediction):
            assert isinstance(prediction.predictions, np.ndarray), (
                f"{type(prediction.predictions)}: keys_to_ignore_at_inference must list every output but the logits"
            )
            assert prediction.predictions.shape == shape
            assert np.array_equal(prediction.label_ids, inputs["labels"].numpy())
            return {"seen": float(len(prediction.predictions))}

        trainer = self._train(model, tmp_path, max_steps=2, compute_metrics=compute_metrics)
        assert all(np.isfinite(self._history(trainer, "loss")))
        metrics = trainer.evaluate()
        assert metrics["eval_seen"] == 3
        with torch.no_grad():
            expected = model.eval()(**inputs).loss.item()
        # The mean over the evaluation's one batch; float32.
        assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-5)

        for flag in self.recorded(head_class, model.config, inputs):
            for module in model.modules():
                if isinstance(getattr(module, "config", None), PreTrainedConfig):
                    setattr(module.config, flag, True)
        assert trainer.evaluate()["eval_loss"] == metrics["eval_loss"]

    def test_accumulated_steps_equal_one_batch(self, head_class, tmp_path):
        config = self.tiny_config(**self.dropout(0.0))
        labels = [row["labels"] for row in self._dataset(head_class, config)]
        if labels[0].ndim:
            counts = {int(torch.stack(labels[start : start + 2]).ne(IGNORED_LABEL).sum()) for start in (0, 2, 4, 6)}
            assert len(counts) > 1, "micro-batches must differ in their number of targets"
        trainers = []
        for size, steps in ((8, 1), (2, 4)):
            trainers.append(
                self._train(
                    self.build(head_class, copy.deepcopy(config)),
                    tmp_path,
                    max_steps=3,
                    per_device_train_batch_size=size,
                    gradient_accumulation_steps=steps,
                    # Adam would hide a wrong scale of the gradient.
                    optim="sgd",
                    learning_rate=0.05,
                )
            )
        whole, parts = trainers
        for name in ("loss", "grad_norm"):
            expected = self._history(whole, name)
            assert len(expected) == 3
            # Another order of summation in float32.
            assert self._history(parts, name) == pytest.approx(expected, rel=1e-4), name
        expected = dict(whole.model.named_parameters())
        for name, parameter in parts.model.named_parameters():
            assert_close(parameter, expected[name], name, rtol=1e-4, atol=1e-6)

    def test_resumed_run_equals_straight_run(self, head_class, tmp_path):
        config = self.tiny_config(**self.dropout(0.1))
        # Four steps an epoch: the checkpoint falls within the first, the end within the second.
        steps = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
        straight = self._train(self.build(head_class, copy.deepcopy(config)), tmp_path / "straight", **steps)
        checkpoint = tmp_path / "straight" / "checkpoint-3"
        resumed = self._train(
            self.build(head_class, copy.deepcopy(config), seed=9), tmp_path / "resumed", resume_from=checkpoint, **steps
        )
        for name in ("loss", "grad_norm", "learning_rate"):
            assert self._history(resumed, name) == self._history(straight, name), name
            assert len(self._history(resumed, name)) == 6
        expected = values_of(straight.model)
        for name, value in values_of(resumed.model).items():
            assert_equal(value, expected[name], name)
        self._assert_code_is_complete(checkpoint)

    # Generation

    def _generate(self, model: PreTrainedModel, prompt: dict[str, torch.Tensor], **options: Any) -> Any:
        # As many tokens for every row, so that rows end together whatever they say.
        options = {"min_new_tokens": 6, "max_new_tokens": 6, "do_sample": False} | options
        return model.generate(**prompt, **options, return_dict_in_generate=True, output_logits=True)

    def test_generation_with_cache_equals_without(self, generating_class):
        model = self.build(generating_class)
        for padding_side in (None, *self.padding_sides):
            prompt = self._prompt(self.inputs(generating_class, 3, model.config, padding_side))
            for beams in (1, 2):
                cached, plain = (
                    self._generate(model, prompt, use_cache=use_cache, num_beams=beams) for use_cache in (True, False)
                )
                assert cached.past_key_values is not None
                assert plain.past_key_values is None
                assert torch.equal(cached.sequences, plain.sequences), f"{beams} beams, padding {padding_side}"
                for step, (one, other) in enumerate(zip(cached.logits, plain.logits, strict=True)):
                    # Matrix products of other shapes in float32; logits are of order 1 to 10.
                    assert_close(one, other, f"logits of step {step}, {beams} beams", rtol=1e-4, atol=1e-4)

    def test_generated_tokens_follow_the_forward_pass(self, generating_class):
        model = self.build(generating_class)
        inputs = self.inputs(generating_class, 3, model.config, "right" if self.padding_sides else None)
        prompt = self._prompt(inputs)
        generated = self._generate(model, prompt)
        with torch.no_grad():
            logits = model(**prompt, decoder_input_ids=generated.sequences[:, :-1]).logits
        # As between cached and plain generation.
        assert_close(torch.stack(generated.logits, dim=1), logits, "logits", rtol=1e-4, atol=1e-4)

    def test_generation_ignores_padding(self, generating_class):
        model = self.build(generating_class)
        for padding_side in self.padding_sides:
            inputs = self.inputs(generating_class, 3, model.config, padding_side)
            for beams in (1, 2):
                together = self._generate(model, self._prompt(inputs), num_beams=beams)
                for row in range(3):
                    alone = self._generate(model, self._prompt(self._unpadded(inputs, row)), num_beams=beams)
                    what = f"row {row}, padding on the {padding_side}, {beams} beams"
                    assert torch.equal(together.sequences[row], alone.sequences[0]), what
                    for one, other in zip(together.logits, alone.logits, strict=True):
                        rows = slice(row * beams, (row + 1) * beams)
                        # As between cached and plain generation.
                        assert_close(one[rows], other, what, rtol=1e-4, atol=1e-4)

    def test_generation_continues_padded_beginnings(self, generating_class):
        model = self.build(generating_class)
        inputs = self.inputs(generating_class, 3, model.config, "left")
        beginnings = {name: value for name, value in inputs.items() if name != "labels"}
        together = self._generate(model, beginnings)
        for row in range(3):
            alone = self._generate(model, self._unpadded(beginnings, row))
            for one, other in zip(together.logits, alone.logits, strict=True):
                # As between cached and plain generation.
                assert_close(one[row], other[0], f"row {row}", rtol=1e-4, atol=1e-4)

    def test_forward_pass_in_two_parts(self, generating_class):
        model = self.build(generating_class)
        inputs = self.inputs(generating_class, 3, model.config, "left")
        tokens, mask = inputs.pop("decoder_input_ids"), inputs.pop("decoder_attention_mask")
        source = self._prompt(inputs)
        with torch.no_grad():
            whole = model(**source, decoder_input_ids=tokens, decoder_attention_mask=mask).logits
            first = model(**source, decoder_input_ids=tokens[:, :3], decoder_attention_mask=mask[:, :3], use_cache=True)
            second = model(
                **source,
                decoder_input_ids=tokens[:, 3:],
                decoder_attention_mask=mask,
                past_key_values=first.past_key_values,
                use_cache=True,
            )
        parts = torch.cat((first.logits, second.logits), dim=1)
        # Matrix products of other shapes in float32.
        assert_close(parts[mask.bool()], whole[mask.bool()], "logits", rtol=1e-5, atol=1e-5)

    # Low-rank adapters

    @pytest.mark.parametrize("targets", ["named", "all-linear"])
    def test_lora(self, model_class, targets, tmp_path):
        from peft import LoraConfig, PeftModel, get_peft_model

        chosen = self.lora(model_class) if targets == "named" else {"target_modules": "all-linear"}
        base = self.build(model_class)
        base.save_pretrained(tmp_path / "base")
        task_type = {
            AutoModelForSeq2SeqLM: "SEQ_2_SEQ_LM",
            AutoModelForSequenceClassification: "SEQ_CLS",
        }.get(self.classes[model_class])
        set_seed(0)
        model = get_peft_model(base, LoraConfig(r=2, lora_dropout=0.0, task_type=task_type, **chosen))
        inputs = self.inputs(model_class, 2, base.config)
        names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        assert any("lora_" in name for name in names)
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        with torch.no_grad():
            plain = main_output(model.eval()(**inputs))
        optimizer = torch.optim.AdamW(
            (parameter for parameter in model.parameters() if parameter.requires_grad), lr=0.1
        )
        model.train()
        # At first the A factors have no gradient, as the B factors are zero.
        for _ in range(2):
            optimizer.zero_grad()
            self._loss(model, inputs).backward()
            optimizer.step()
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, before[name]) is not parameter.requires_grad, name

        model.eval().save_pretrained(tmp_path / "adapter")
        loaded_base = model_class.from_pretrained(tmp_path / "base")
        loaded = PeftModel.from_pretrained(loaded_base, tmp_path / "adapter").eval()
        with torch.no_grad():
            trained = model(**inputs)
            assert (main_output(trained) - plain).abs().max() > 1e-3
            assert_same_outputs(loaded(**inputs), trained, "outputs with the loaded adapter")
            merged = main_output(loaded.merge_and_unload()(**inputs))
            # The merged weight is rounded once more.
            assert_close(merged, main_output(trained), "outputs after merging", rtol=1e-4, atol=1e-4)
            if model_class.can_generate():
                model.generate(**self._prompt(inputs), max_new_tokens=3, do_sample=False)

    # Export

    def test_exported_forward_pass(self, model_class):
        """`torch.export` gives a program with the same outputs, also for inputs that it was not traced with."""
        model = self.build(model_class)
        inputs = self.inputs(model_class, 3, model.config)
        if "use_cache" in inspect.signature(model.forward).parameters:
            inputs["use_cache"] = False  # a cache is no tensor
        other = {name: value.flip(0) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
        other = {name: value[:2] if isinstance(value, torch.Tensor) else value for name, value in other.items()}
        inputs = {name: value[:2] if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
        with torch.no_grad():
            exported = torch.export.export(model, (), inputs).module()
            for batch in (inputs, other):
                expected, actual = model(**batch), exported(**batch)
                for name in self.output_shapes(model_class, model.config, batch):
                    assert_close(actual[name], expected[name], name, rtol=1e-5, atol=1e-6)

    # Half precision

    def test_bfloat16_autocast_trains(self, model_class):
        model = self.build(model_class, self.tiny_config(**self.dropout(0.0))).train()
        padding_side = self.padding_sides[0] if self.padding_sides else None
        inputs = self.inputs(model_class, 3, model.config, padding_side)
        expected = self._loss(model, inputs).item()
        with torch.autocast("cpu", torch.bfloat16):
            loss = self._loss(model, inputs)
        loss.backward()
        # bfloat16 keeps 8 bits: 0.4 % an operation, over some ten layers.
        assert loss.item() == pytest.approx(expected, rel=0.1, abs=0.05)
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name

    def test_float16_trains_with_loss_scaling(self, head_class):
        """The loss follows the one of float32 and falls; weights stay float32."""
        losses = {}
        for precision in (torch.float32, torch.float16):
            model = self.build(head_class, self.tiny_config(**self.dropout(0.0))).train()
            inputs = self.inputs(head_class, 3, model.config, self.padding_sides[0] if self.padding_sides else None)
            optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=precision is torch.float16)
            losses[precision] = []
            for _ in range(5):
                with torch.autocast("cpu", precision, enabled=precision is torch.float16):
                    loss = self._loss(model, inputs)
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                losses[precision].append(loss.item())
            assert all(parameter.dtype is torch.float32 for parameter in model.parameters())
        # float16 keeps 11 bits: 0.05 % an operation, over some ten layers and five updates.
        assert losses[torch.float16] == pytest.approx(losses[torch.float32], rel=0.02, abs=0.01)
        assert losses[torch.float16][-1] < losses[torch.float16][0]

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
    def test_half_precision_model(self, model_class, dtype):
        model = self.build(model_class).to(dtype)
        for padding_side in (None, *self.padding_sides):
            inputs = self.inputs(model_class, 3, model.config, padding_side)
            for implementation in ("eager", "sdpa"):
                model.set_attn_implementation(implementation)
                outputs = model(**inputs)
                for name in self.output_shapes(model_class, model.config, inputs):
                    assert outputs[name].isfinite().all(), f"{name}, padding {padding_side}, {implementation}"
                self._loss(model, inputs).backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
        if model_class.can_generate():
            model.generate(**self._prompt(inputs), max_new_tokens=3, do_sample=False)
