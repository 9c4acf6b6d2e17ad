"""Models with the same number of trainable parameters: sizes are solved, and checked on the real modules.

The vocabulary of a trained tokenizer depends on the task and on its training examples, and so do the parameters of the
embeddings. So models are matched anew for each task and training size.
"""

import inspect
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForSeq2SeqLM, PreTrainedConfig, PreTrainedTokenizerBase

from ..arguments import (
    Recipe,
    check_value,
    kind_of,
    model_fields,
    parse_recipe,
    section_fields,
    user_errors_from_validation,
)
from ..errors import UserError, did_you_mean, one_line
from ..pretrained import reader_fields
from ..sequence_to_sequence import KIND, make_tokenizer
from ..tasks import Task
from .cells import Cell
from .plan import Comparison


def check_recipe(sections: dict[str, dict[str, Any]], name: str) -> Recipe:
    """The checked recipe of a cell, as the training command will read it; of a text model the configuration as well.

    Raises:
        UserError: with the cell's name in front.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(yaml.safe_dump(sections), encoding="utf-8")
        try:
            recipe = parse_recipe([str(path)], prog="python -m trainers.train")
            if recipe.kind is KIND and recipe.pretrained is None:
                recipe.model_config()
            return recipe
        except UserError as error:
            raise UserError(f"{name}: {str(error).removeprefix(f'{path}: ')}") from error


def text_task(recipe: Recipe, name: str) -> Task | None:
    """The recipe's task, its splits read and checked, or `None` if it is not one of prompts and targets."""
    try:
        task = recipe.kind.run.make_task(recipe.task)
        if not isinstance(task, Task):
            return None
        for split in ("train", "validation", "test"):
            if not task.rows(split):
                raise UserError(f"the {split} split is empty")
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    return task


def configuration(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """The configuration that the training command will build; token ids, which cost no parameters, left out."""
    return recipe.model_config(vocab_size=len(tokenizer), **reader_fields(recipe))


def trainable_parameters(config: PreTrainedConfig) -> int:
    """Number of trainable parameters of the real module, built without memory."""
    with torch.device("meta"), user_errors_from_validation("model"):
        return AutoModelForSeq2SeqLM.from_config(config).num_parameters(only_trainable=True)


def matched_fields(fields: dict[str, Any], reference: PreTrainedConfig) -> dict[str, Any]:
    """Fields of a configuration with as many trainable parameters as another has.

    Args:
        fields: `model_type` and what the user fixed.
        reference: the other's configuration, with its vocabulary.

    Raises:
        UserError: if a field is unknown or of another type, or the architecture cannot be matched to another, or not
            with these fields.
    """
    model_type = fields["model_type"]
    known = section_fields("model", kind_of(model_type), model_type)
    for name, value in fields.items():
        if name not in known:
            raise UserError(f"unknown field model.{name}{did_you_mean(name, known)}")
        check_value(f"model.{name}", value, known[name])
    fixed = {name: value for name, value in fields.items() if name != "model_type"}
    config_class, of_config = type(AutoConfig.for_model(model_type)), model_fields(model_type)
    solve = getattr(config_class, "matched_to", None)
    if solve is None:
        raise UserError(f"matched_to: a {model_type} cannot be matched to another model; give its sizes")
    accepted = inspect.signature(solve).parameters
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in accepted.values())
    passed = {name: value for name, value in fixed.items() if name in of_config and (takes_any or name in accepted)}
    try:
        config = solve(reference, **passed)
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise UserError(f"matched_to: {one_line(error)}") from error
    defaults, decided = config_class(), {"vocab_size", *(name for name in of_config if "token_id" in name)}
    solved = {
        name: getattr(config, name)
        for name in of_config
        if name not in decided and getattr(config, name) != getattr(defaults, name)
    }
    return {"model_type": model_type, **solved, **{name: fixed[name] for name in fixed if name not in passed}}


def prepare(
    comparison: Comparison, cells: dict[tuple[str, str, int | None, int], Cell], tasks: Collection[str]
) -> None:
    """Check every kind of cell before any is run, and solve the sizes of matched models.

    Reads the data of the named tasks. Their cells of matched models get the solved fields.

    Raises:
        UserError: for a recipe that the training command would refuse, bad data, or models whose parameters differ by
            more than the plan allows.
    """
    first_seed = comparison.plan.seeds[0]
    read: dict[str, Task | None] = {}
    for task_name in tasks:
        names = [model for model in comparison.models if comparison.takes_part(model, task_name)]
        # Models that are matched to another come after it.
        names.sort(key=lambda model: comparison.models[model].matched_to is not None)
        for size in comparison.sizes:
            counts: dict[str, int] = {}
            configs: dict[str, PreTrainedConfig] = {}
            tokenizers: dict[tuple[str, str | None], PreTrainedTokenizerBase] = {}
            for model in names:
                cell = cells[model, task_name, size, first_seed]
                where = f"{task_name}, {model}"
                sections, reference = cell.recipe, comparison.models[model].matched_to
                if reference is not None:
                    if reference not in configs:
                        raise UserError(f"{where}: matched_to: {reference} does not take part or is no text model")
                    fields = _or_refuse(where, sections["model"], configs[reference])
                    for seed in comparison.plan.seeds:
                        cells[model, task_name, size, seed].recipe["model"] = fields
                recipe = check_recipe(sections, where)
                key = yaml.safe_dump([recipe.kind.name, sections["task"], sections.get("tokenizer")])
                if key not in read:
                    read[key] = text_task(recipe, where)
                task = read[key]
                if task is None or recipe.pretrained is not None:
                    continue
                if (key, recipe.reader) not in tokenizers:
                    tokenizers[key, recipe.reader] = make_tokenizer(recipe, task, task.rows("train"))
                configs[model] = configuration(recipe, tokenizers[key, recipe.reader])
                counts[model] = trainable_parameters(configs[model])
            if comparison.plan.parameters == "matched":
                _check_counts(comparison, task_name, counts)


def _or_refuse(where: str, fields: dict[str, Any], reference: PreTrainedConfig) -> dict[str, Any]:
    try:
        return matched_fields(fields, reference)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _check_counts(comparison: Comparison, task: str, counts: dict[str, int]) -> None:
    base = comparison.against
    if base not in counts:
        return
    for model, count in counts.items():
        off = count / counts[base] - 1
        if abs(off) > comparison.plan.tolerance:
            raise UserError(
                f"{task}: {model} has {count:,} trainable parameters and {base} {counts[base]:,} ({100 * off:+.1f} %), "
                f"more than {100 * comparison.plan.tolerance:g} % apart; match them, or say `parameters: free`"
            )
