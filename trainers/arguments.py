"""What a recipe may say: YAML file + command-line overrides -> typed, checked arguments.

A recipe is a YAML mapping with the sections below; `inherit: other.yaml` (a path relative to the recipe) takes another
recipe as the starting point. The command line beats the recipe: `--max_steps 5`, or with the section in front where a
name stands in two sections, `--training.max_steps 5`. Values on the command line are read as YAML (`[1, 2]`, `true`).

| section | fields |
|---|---|
| `model` | `model_type`, optionally `pretrained`, `embeddings_from` or `reader`, any field of its configuration |
| `task` | name, data source, sizes, the task's own `options` |
| `tokenizer` | where the tokenizer comes from, for models that read text |
| `training` | everything of `transformers.TrainingArguments`, and our own fields |
| `evaluation` | how the finished model is measured |
| `tracking` | [`TrackingArguments`][trainers.tracking.TrackingArguments]: what is watched inside while it trains |

The architecture decides which fields `task`, `training` and `evaluation` have, see [`Kind`].
"""

import argparse
import contextlib
import dataclasses
import enum
import importlib
import inspect
import math
import os
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
import yaml
from huggingface_hub.dataclasses import strict, type_validator
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig, TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

import hf_models  # noqa: F401  (registers the architectures)

from .command import CommandParser
from .errors import UserError, did_you_mean, field_of, one_line
from .recipe_files import named_recipe, parse_yaml, read_yaml
from .tracking.arguments import TrackingArguments

if TYPE_CHECKING:
    from .run import TrainingRun

SECTIONS = ("model", "task", "tokenizer", "training", "evaluation", "tracking")
# The modules that define a kind of run each, see `Kind`. The first one's fields are those that `--help` lists.
KIND_MODULES = ("sequence_to_sequence", "in_context.run", "thought.run")


@dataclass(frozen=True)
class Kind:
    """What a family of architectures is trained on, and how. A module of [`KIND_MODULES`] holds one as `KIND`.

    Attributes:
        name: its name.
        model_types: the architectures.
        sections: the dataclass of every section of a recipe but `model` and `tracking`, by the section's name.
        run: the class that takes such a recipe from data to run folder.
        metrics: what `training.metric_for_best_model` may name; the first is the default. Of a metric whose name ends
            in `loss` or `error` less is better.
    """

    name: str
    model_types: tuple[str, ...]
    sections: Mapping[str, type]
    run: "type[TrainingRun]"
    metrics: tuple[str, ...]


def kinds() -> list[Kind]:
    """All kinds, the default one first."""
    return [importlib.import_module(f".{module}", __package__).KIND for module in KIND_MODULES]


@strict
@dataclass(kw_only=True)
class EvaluationArguments:
    """How predictions are scored."""

    confidence: float | int = field(default=0.95, metadata={"help": "Confidence level of the reported intervals."})

    def validate_confidence(self) -> None:
        if not 0 < self.confidence < 1:
            raise ValueError(f"evaluation.confidence is {self.confidence}; it must lie between 0 and 1")


# Fields of `transformers.TrainingArguments` that these commands decide themselves, and what to use in their place.
REFUSED_FIELDS = {
    "do_train": "the command trains",
    "do_eval": "eval_strategy says when evaluations happen",
    "do_predict": "the test split is always predicted",
    "resume_from_checkpoint": "use --resume",
    "debug": "use --debug",
    "label_smoothing_factor": "it is the model's: model.label_smoothing",
    "prediction_loss_only": "evaluation generates",
    "batch_eval_metrics": "an evaluation is scored as a whole",
    "include_for_metrics": "an evaluation is scored by its generated answers",
    "label_names": "the labels are the task's",
    **dict.fromkeys(
        (
            "push_to_hub",
            "hub_model_id",
            "hub_strategy",
            "hub_token",
            "hub_private_repo",
            "hub_always_push",
            "hub_revision",
        ),
        "push_to_hub.py uploads a finished run",
    ),
}
# What the library takes without complaint, and then fails on or ignores: a test for each rule, and the rule in words.
_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(
        (
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
            "early_stopping_patience",
        ),
        (lambda value: value >= 1, "be at least 1"),
    ),
    **dict.fromkeys(
        ("num_train_epochs", "logging_steps", "eval_steps", "save_steps"), (lambda value: value > 0, "be above 0")
    ),
    **dict.fromkeys(
        (
            "learning_rate",
            "weight_decay",
            "max_grad_norm",
            "adam_epsilon",
            "warmup_steps",
            "dataloader_num_workers",
        ),
        (lambda value: value >= 0, "not be negative"),
    ),
    "layerwise_lr_decay": (lambda value: 0 < value <= 1, "lie in (0, 1]"),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), (lambda value: 0 <= value < 1, "lie in [0, 1)")),
    **dict.fromkeys(("seed", "data_seed"), (lambda value: 0 <= value < 2**32, "lie in [0, 2**32)")),
    "max_steps": (lambda value: value >= 1 or value == -1, "be at least 1, or -1 to count epochs"),
}


@dataclass
class RunTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` with early stopping and layer-wise decay of the learning rate.

    Changed defaults: a log every 10 steps, warm-up over 5 % of training, at most two checkpoints kept, callback states
    restored on resume. One process drives one device: several GPUs are used through `accelerate launch`.

    Raises:
        ValueError: naming a field whose value is out of range.
    """

    logging_steps: float = field(default=10, metadata={"help": "Log every so many update steps."})
    warmup_steps: float = field(
        default=0.05, metadata={"help": "Linear warm-up over so many steps, or over this share of training if below 1."}
    )
    save_total_limit: int | None = field(default=2, metadata={"help": "Most checkpoints kept; older ones are deleted."})
    restore_callback_states_from_checkpoint: bool = field(
        default=True, metadata={"help": "Restore early stopping's counter and the like on resume."}
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "Stop after so many evaluations without a better validation metric. Default: never."},
    )
    layerwise_lr_decay: float | None = field(
        default=None,
        metadata={"help": "Factor of the learning rate from each layer to the one below it, in (0, 1]. Default: 1."},
    )

    def __post_init__(self):
        for name, (accepts, rule) in {**_RANGES, **self.ranges()}.items():
            value = getattr(self, name)
            if value is not None and not accepts(value):
                raise ValueError(f"training.{name} is {value}; it must {rule}")
        for option in dataclasses.fields(self):
            choices = option.metadata.get("choices")
            value = getattr(self, option.name)
            if choices is not None and isinstance(value, str) and value not in choices:
                raise ValueError(f"training.{option.name}: {value!r} is not one of {', '.join(map(str, choices))}")
        if not torch.accelerator.is_available() or self.use_cpu:
            self.dataloader_pin_memory = False  # pinning serves copies to an accelerator; without one torch warns
        super().__post_init__()
        splitting = cast(AcceleratorConfig, self.accelerator_config)
        if not splitting.even_batches or splitting.dispatch_batches:
            raise ValueError(
                "training.accelerator_config: even_batches and dispatch_batches must keep their defaults; every "
                "process reads its own part of a batch, and examples repeated to fill the last one do not count"
            )
        # With several GPUs in sight and no launcher the library would fall back to `DataParallel`.
        self._n_gpu = min(self.n_gpu, 1)

    @classmethod
    def ranges(cls) -> dict[str, tuple[Callable[[Any], bool], str]]:
        """For fields of a subclass: field name -> a test of its value, and the rule in words ("be at least 1")."""
        return {}


# Fields that only name where a run lives or how it is shown. They may differ between a run and its resumption, and are
# left out of the recorded recipe or of its comparison.
UNRECORDED_FIELDS = ("output_dir",)
DISPLAY_FIELDS = (
    "logging_steps",
    "logging_first_step",
    "disable_tqdm",
    "report_to",
    "run_name",
    "log_level",
    "project",
)


@dataclass
class Recipe:
    """A resolved recipe: every section typed and checked.

    Attributes:
        path: the YAML file it came from.
        kind: what sort of run it describes.
        model_values: the model's configuration as written, without what tokenizer or task decide.
        embeddings_from: folder or Hub id of a model whose token embeddings the model starts with, or `None`.
        reader: folder, `.gguf` file or Hub id of a model that reads the source, with its tokenizer, or `None`.
        reader_layers: keep only so many of the reader's first layers.
        pretrained: folder or Hub id whose weights training starts from, or `None` to start from scratch.
        task, tokenizer, evaluation, tracking: those sections; `tokenizer` is `None` for a kind that has none.
        training, training_values: the `training` section, and what was written of it (YAML and command line).
        resume, overwrite, debug: what the command line said.
    """

    path: Path
    kind: Kind
    model_type: str
    model_values: dict[str, Any]
    pretrained: str | None
    pretrained_revision: str | None
    trust_remote_code: bool
    embeddings_from: str | None
    embeddings_revision: str | None
    reader: str | None
    reader_revision: str | None
    reader_layers: int | None
    task: Any
    tokenizer: Any
    training: Any
    training_values: dict[str, Any]
    evaluation: Any
    tracking: TrackingArguments
    output_dir: Path
    resume: bool = False
    overwrite: bool = False
    debug: bool = False

    def model_config(self, decided_by: str = "tokenizer", **decided: Any) -> PreTrainedConfig:
        """Build the model's configuration.

        Args:
            decided_by: what decides the values that follow.
            decided: fields that tokenizer or task decide. A value in the recipe for one of them is an error unless it
                agrees.
        """
        for name, value in decided.items():
            if name in self.model_values and self.model_values[name] != value:
                raise UserError(
                    f"model.{name}: the recipe says {self.model_values[name]!r}, the {decided_by} {value!r}; "
                    "leave it out"
                )
        with user_errors_from_validation("model"):
            return AutoConfig.for_model(self.model_type, **{**self.model_values, **decided})

    def as_dict(self) -> dict[str, Any]:
        """The resolved recipe as plain values, ready for YAML."""
        model: dict[str, Any] = {"model_type": self.model_type}
        if self.pretrained:
            model |= {"pretrained": self.pretrained, "pretrained_revision": self.pretrained_revision}
        if self.embeddings_from:
            model |= {"embeddings_from": self.embeddings_from, "embeddings_revision": self.embeddings_revision}
        if self.reader:
            names = ("reader", "reader_revision", "reader_layers")
            model |= {name: getattr(self, name) for name in names}
        sections = {
            name: {k: v for k, v in self.training_values.items() if k not in UNRECORDED_FIELDS}
            if name == "training"
            else dataclasses.asdict(getattr(self, name))
            for name in (*self.kind.sections, "tracking")
        }
        return {"model": model | self.model_values} | sections


class user_errors_from_validation:
    """Context manager: turns a validation error of a configuration or dataclass into a one-line `UserError`."""

    def __init__(self, section: str):
        self.section = section

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        # The library raises `RuntimeError` and `ImportError` for packages and devices that are not there.
        kinds = (StrictDataclassError, ValueError, TypeError, RuntimeError, ImportError, OSError)
        if isinstance(error, kinds) and not isinstance(error, UserError):
            message = one_line(error)
            if not message.startswith((f"{self.section}.", f"{self.section}:")):
                message = f"{self.section}{'.' if field_of(error) else ': '}{message}"
            raise UserError(message) from error
        return False


def load_yaml(path: Path) -> dict[str, Any]:
    """Read a recipe and what it inherits from.

    Raises:
        UserError: if a file is missing, is no YAML mapping, names an unknown section, or inherits in a circle.
    """
    return _load_yaml(path, ())


def _load_yaml(path: Path, chain: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in chain:
        raise UserError(f"{path}: `inherit` runs in a circle: {' -> '.join(p.name for p in (*chain, path))}")
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise UserError(f"{path}: a recipe is a mapping with the sections {', '.join(SECTIONS)}")
    parent_name = values.pop("inherit", None)
    values.pop("provenance", None)  # a run's recorded recipe is a recipe
    for section, content in values.items():
        if section not in SECTIONS:
            raise UserError(f"{path}: unknown section {section!r}{did_you_mean(str(section), [*SECTIONS, 'inherit'])}")
        if content is None:
            values[section] = {}
        elif not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
            raise UserError(f"{path}: section {section!r} must be a mapping of field names to values")
    if parent_name is None:
        return values
    parent_path = named_recipe(path, "inherit", parent_name)
    parent = _load_yaml(parent_path, (*chain, path.resolve()))
    return {section: merge(parent.get(section, {}), values.get(section, {})) for section in {**parent, **values}}


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over`; mappings in mappings are merged the same way."""
    merged = dict(base)
    for name, value in over.items():
        inner = merged.get(name)
        merged[name] = merge(inner, value) if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
    return merged


def model_fields(model_type: str) -> dict[str, Any]:
    """Field name -> type of an architecture's own configuration, without what every `PreTrainedConfig` has."""
    lineage = [kind for kind in type(AutoConfig.for_model(model_type)).__mro__ if issubclass(kind, PreTrainedConfig)]
    # A configuration inherits fields from another architecture's.
    own = [kind for kind in reversed(lineage) if kind is not PreTrainedConfig]
    return {name: expected for kind in own for name, expected in inspect.get_annotations(kind).items()}


def kind_of(model_type: str) -> Kind:
    """The kind of run that trains an architecture.

    Raises:
        UserError: for an unknown one, naming the nearest.
    """
    known = {name: kind for kind in kinds() for name in kind.model_types}
    if not isinstance(model_type, str) or model_type not in known:
        raise UserError(
            f"model.model_type: unknown architecture {model_type!r}{did_you_mean(str(model_type), list(known))}; "
            f"known: {', '.join(sorted(known))}"
        )
    return known[model_type]


def section_fields(section: str, kind: Kind, model_type: str | None) -> dict[str, Any]:
    """Field name -> type of a section."""
    if section == "model":
        extra = {
            "model_type": str,
            "pretrained": str | None,
            "pretrained_revision": str | None,
            "trust_remote_code": bool,
            "embeddings_from": str | None,
            "embeddings_revision": str | None,
            "reader": str | None,
            "reader_revision": str | None,
            "reader_layers": int | None,
        }
        return extra | (model_fields(model_type) if model_type else {})
    arguments = _arguments_of(section, kind)
    hints = typing.get_type_hints(arguments)
    refused = REFUSED_FIELDS if section == "training" else {}
    fields = dataclasses.fields(arguments)
    return {option.name: hints[option.name] for option in fields if option.init and option.name not in refused}


def _arguments_of(section: str, kind: Kind) -> Any:
    return TrackingArguments if section == "tracking" else kind.sections[section]


def _help_of(section: str, name: str, kind: Kind) -> str:
    if section == "model":
        return "Field of the model's configuration."
    found = next(option for option in dataclasses.fields(_arguments_of(section, kind)) if option.name == name)
    text = " ".join(str(found.metadata.get("help", "")).split())
    return text if section != "training" else text.replace("%", "%%").replace("%%%%", "%%")


def _show_type(expected: Any) -> str:
    return expected.__name__ if isinstance(expected, type) else str(expected).replace("typing.", "")


def _accepts(expected: Any, kind: type) -> bool:
    if typing.get_origin(expected) in (typing.Union, types.UnionType):
        return any(_accepts(option, kind) for option in typing.get_args(expected))
    return expected is kind or (kind is str and isinstance(expected, type) and issubclass(expected, str))


def _from_command_line(raw: str, expected: Any) -> Any:
    """Read a command-line value: text stays text where the field takes nothing else, the rest is YAML."""
    if expected is str:
        return raw
    try:
        value = parse_yaml(raw)
    except yaml.YAMLError:
        return raw
    if isinstance(value, str) and _accepts(expected, float):
        try:
            return float(value)  # YAML 1.1 reads 1e-4 as text
        except ValueError:
            return value
    if not isinstance(value, str) and value is not None and not _fits(value, expected) and _accepts(expected, str):
        return raw
    return value


def _fits(value: Any, expected: Any) -> bool:
    try:
        type_validator("value", value, expected)
    except TypeError:
        return False
    return True


def check_value(name: str, value: Any, expected: Any) -> Any:
    """Check one value against its field's type; whole numbers are welcome where a float is meant.

    Raises:
        UserError: naming the field, the type it takes and the value given.
    """
    if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
        raise UserError(f"{name}: {value!r} is no text: a character is half of a surrogate pair, or not UTF-8")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{name}: expected a finite number, got {value}")
    if isinstance(value, int) and abs(value) >= 2**63:
        raise UserError(f"{name}: expected a number of at most 63 bits, got one of {value.bit_length()}")
    if isinstance(value, int) and not isinstance(value, bool) and _accepts(expected, float):
        return value
    for option in typing.get_args(expected):
        if isinstance(value, str) and isinstance(option, type) and issubclass(option, enum.Enum):
            choices = [member.value for member in option]
            if value not in choices:
                raise UserError(f"{name}: {value!r} is not one of {', '.join(map(str, choices))}")
    if _fits(value, expected):
        return value
    hint = ""
    if isinstance(value, str) and (_accepts(expected, float) or _accepts(expected, int)):
        with contextlib.suppress(ValueError):
            hint = f" (in YAML a number with an exponent needs a point and a sign: {float(value):.1e})"
    raise UserError(f"{name}: expected {_show_type(expected)}, got {value!r}{hint}")


def parse_recipe(argv: list[str], prog: str) -> Recipe:
    """Turn a command line into a checked recipe. Reads the recipe, touches nothing else.

    Args:
        argv: arguments without the program's name.
        prog: how the command is called, for its help text.

    Raises:
        UserError: for an unreadable recipe, an unknown or ambiguous field, or a value that breaks a rule.
        SystemExit: with code 0 for `--help`.
    """
    first = CommandParser(add_help=False)
    first.add_argument("recipe", nargs="?")
    first.add_argument("--model_type", "--model.model_type", dest="model_type")
    known, _ = first.parse_known_args(argv)
    values: dict[str, dict[str, Any]] = {}
    # The options are not known yet, so a value may look like the recipe; its suffix tells them apart.
    named = next((word for word in argv if word.endswith((".yaml", ".yml")) and word[0] != "-"), known.recipe)
    if named is not None:
        values = load_yaml(Path(named))
    model_type = known.model_type or values.get("model", {}).get("model_type")
    kind = kinds()[0] if model_type is None else kind_of(model_type)
    sections = ("model", *kind.sections, "tracking")
    fields = {section: section_fields(section, kind, model_type) for section in sections}
    owners: dict[str, list[str]] = {}
    for section, names in fields.items():
        for name in names:
            owners.setdefault(name, []).append(section)

    parser = CommandParser(
        prog=prog,
        description="Train a model from a recipe, evaluate it by generation, and write its run folder and card.",
        epilog="Example: accelerate launch -m trainers.train recipes/quickstart.yaml --max_steps 50",
    )
    parser.add_argument("recipe", help="YAML file; see recipes/README.md")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="continue the run in the output folder")
    existing.add_argument("--overwrite", action="store_true", help="replace the run in the output folder")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    for section in sections:
        group = parser.add_argument_group(section)
        for name, expected in fields[section].items():
            flags = [f"--{section}.{name}"]
            if len(owners[name]) == 1:
                flags.insert(0, f"--{name}")
            optional_value: dict[str, Any] = {"nargs": "?", "const": "true"} if _accepts(expected, bool) else {}
            group.add_argument(
                *flags,
                dest=f"{section}.{name}",
                default=argparse.SUPPRESS,
                metavar=_show_type(expected).replace("%", "%%"),
                help=_help_of(section, name, kind),
                **optional_value,
            )
    try:
        namespace, unknown = parser.parse_known_args(argv)
    except UserError as error:
        if named is not None and str(error).endswith("required: recipe"):  # an option took it for its value
            raise UserError(f"{named}: give the recipe before the options") from error
        raise
    if unknown:
        name = unknown[0].split("=")[0].lstrip("-")
        shared = owners.get(name)
        if shared:
            choices = " or ".join(f"--{section}.{name}" for section in shared)
            raise UserError(f"--{name}: the name stands in several sections; write {choices}")
        if name.removeprefix("training.") in REFUSED_FIELDS:
            raise UserError(_refusal(name.removeprefix("training.")))
        everything = [*owners, *(f"{section}.{n}" for section in sections for n in fields[section])]
        raise UserError(f"unknown option {unknown[0]!r}{did_you_mean(name, everything)}")
    if namespace.recipe != named:
        raise UserError(f"{named!r} or {namespace.recipe!r}: give the recipe before the options")
    for key, raw in vars(namespace).items():
        section, _, name = key.partition(".")
        if name:
            values.setdefault(section, {})[name] = _from_command_line(raw, fields[section][name])
    return _build(Path(namespace.recipe), kind, values, fields, namespace)


def _build(
    path: Path, kind: Kind, values: dict[str, dict[str, Any]], fields: dict, namespace: argparse.Namespace
) -> Recipe:
    if values.get("model", {}).get("model_type") is None:
        known = sorted(name for each in kinds() for name in each.model_types)
        raise UserError(f"{path}: model.model_type is missing; choose one of {', '.join(known)}")
    for section in values:
        if section not in fields:
            raise UserError(f"{path}: a {values['model']['model_type']} has no section {section!r}; leave it out")
        for name, value in values.get(section, {}).items():
            if section == "training" and name in REFUSED_FIELDS:
                raise UserError(_refusal(name))
            if name not in fields[section]:
                raise UserError(f"{path}: unknown field {section}.{name}{did_you_mean(name, fields[section])}")
            values[section][name] = check_value(f"{section}.{name}", value, fields[section][name])
    model = dict(values["model"])
    model_type = model.pop("model_type")
    if "name" not in values.get("task", {}):
        raise UserError(f"{path}: task.name is missing")
    pretrained, pretrained_revision = model.pop("pretrained", None), model.pop("pretrained_revision", None)
    trust_remote_code = model.pop("trust_remote_code", False)
    embeddings_from, embeddings_revision = model.pop("embeddings_from", None), model.pop("embeddings_revision", None)
    reader, reader_revision = model.pop("reader", None), model.pop("reader_revision", None)
    reader_layers = model.pop("reader_layers", None)
    if pretrained is None and pretrained_revision is not None:
        raise UserError("model.pretrained_revision is set, but model.pretrained is not")
    if embeddings_from is not None and pretrained is not None:
        raise UserError("model.embeddings_from: model.pretrained brings its own embeddings; leave one of them out")
    if embeddings_revision is not None and embeddings_from is None:
        raise UserError("model.embeddings_revision is set, but model.embeddings_from is not")
    if reader is not None:
        for name, value, why in (
            ("model.pretrained", pretrained, "it brings its own weights, those of its reader with them"),
            ("model.embeddings_from", embeddings_from, "the reader brings its own embeddings"),
            ("model.reader_config", model.get("reader_config"), "the reader brings its own configuration"),
            ("tokenizer.name_or_path", values.get("tokenizer", {}).get("name_or_path"), "the reader brings its own"),
        ):
            if value is not None:
                raise UserError(f"{name} and model.reader exclude each other: {why}; leave one of them out")
        if "reader_config" not in fields["model"]:
            raise UserError(f"model.reader: a {model_type} takes no reader; leave it out")
    for name, value in (("reader_revision", reader_revision), ("reader_layers", reader_layers)):
        if value is not None and reader is None:
            raise UserError(f"model.{name} is set, but model.reader is not")
    if reader_layers is not None and reader_layers < 1:
        raise UserError(f"model.reader_layers is {reader_layers}; it must be at least 1")
    if pretrained is not None and model:
        raise UserError(f"model.{next(iter(model))}: model.pretrained brings its own configuration; leave it out")
    training_values = dict(values.get("training", {}))
    output_dir = Path(os.path.expanduser(training_values.get("output_dir") or Path("outputs") / default_run_name(path)))
    built: dict[str, Any] = {"tokenizer": None}
    for section in (*kind.sections, "tracking"):
        if section != "training":
            with user_errors_from_validation(section):
                built[section] = _arguments_of(section, kind)(**values.get(section, {}))
    check_precision(training_values)
    return Recipe(
        path=path,
        kind=kind,
        model_type=model_type,
        pretrained=pretrained,
        pretrained_revision=pretrained_revision,
        trust_remote_code=trust_remote_code,
        embeddings_from=embeddings_from,
        embeddings_revision=embeddings_revision,
        reader=reader,
        reader_revision=reader_revision,
        reader_layers=reader_layers,
        model_values=model,
        training=build_training_arguments(kind, training_values, output_dir),
        training_values=training_values,
        output_dir=output_dir,
        resume=namespace.resume,
        overwrite=namespace.overwrite,
        debug=namespace.debug,
        **built,
    )


def _refusal(name: str) -> str:
    return f"training.{name} cannot be set here: {REFUSED_FIELDS[name]}"


def default_run_name(recipe: Path) -> str:
    """`recipes/vanilla_transformer/strategyqa/small.yaml` -> `vanilla_transformer-strategyqa-small`."""
    parts = recipe.with_suffix("").parts
    if "recipes" in parts:
        return "-".join(parts[len(parts) - parts[::-1].index("recipes") :])
    return recipe.stem


def check_precision(training: dict[str, Any]) -> None:
    """Refuse fp16 and bf16 where the device cannot train in them; on the CPU, make bf16 possible.

    The library trains in plain fp32 on a CPU when asked for fp16, without a word.
    """
    accelerator = torch.accelerator.is_available() and not training.get("use_cpu", False)
    if training.get("fp16") and not accelerator:
        raise UserError("training.fp16: fp16 training needs a GPU and this run uses the CPU; use bf16 or leave it out")
    if training.get("bf16"):
        if not accelerator:
            training["use_cpu"] = True
        elif torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
            raise UserError("training.bf16: this GPU has no bf16; use fp16 or leave it out")


def build_training_arguments(kind: Kind, values: dict[str, Any], output_dir: Path) -> RunTrainingArguments:
    """A kind's training arguments from a section's values; the library's own complaints become one line."""
    values = {k: v for k, v in values.items() if k != "output_dir"}
    metric = values.get("metric_for_best_model")
    if metric is not None and metric.removeprefix("eval_") not in kind.metrics:
        raise UserError(f"training.metric_for_best_model is {metric}; it must be one of {', '.join(kind.metrics)}")
    patience = values.get("early_stopping_patience")
    best = values.get("load_best_model_at_end", patience is not None)
    values["load_best_model_at_end"] = best
    if best or patience is not None:
        wish = "load_best_model_at_end" if best else "early_stopping_patience"
        metric = values.setdefault("metric_for_best_model", kind.metrics[0])
        values.setdefault("greater_is_better", not metric.endswith(("loss", "error")))
        if values.setdefault("eval_strategy", "epoch") == "no":
            raise UserError(f"training.eval_strategy is no, but {wish} needs evaluations")
        values.setdefault("save_strategy", values["eval_strategy"])
        if values["eval_strategy"] == "steps" and "eval_steps" in values:
            values.setdefault("save_steps", values["eval_steps"])
    with user_errors_from_validation("training"):
        arguments = kind.sections["training"](output_dir=str(output_dir), **values)
    # The library takes a multiple; but then the best evaluation may be of weights that were never saved.
    if best and arguments.save_strategy == "steps" and arguments.save_steps != arguments.eval_steps:
        raise UserError(
            f"training.save_steps is {arguments.save_steps} and eval_steps {arguments.eval_steps}; with "
            "load_best_model_at_end they must be equal, or save_strategy best"
        )
    return arguments


Precision = Literal["fp32", "bf16", "fp16"]


def precision_of(training: TrainingArguments) -> Precision:
    """The number format that training computes in."""
    return "bf16" if training.bf16 else "fp16" if training.fp16 else "fp32"
