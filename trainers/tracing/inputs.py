"""From what a user types to what a model reads."""

import inspect
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from hf_models.continuous_thought_machine import ContinuousThoughtMachineConfig

from ..errors import UserError, one_line

RANDOM = re.compile(r"random(?::(\d+))?")


@dataclass
class ModelInputs:
    """What one forward pass is given.

    Attributes:
        arguments: keyword arguments of the model's `forward`, batch of one.
        source: the tokens it reads, as text; empty for a model that reads numbers.
        target: the tokens it is asked for, as text.
        remark: what was done in place of something that was not given.
    """

    arguments: dict[str, Any]
    source: list[str] = field(default_factory=list)
    target: list[str] = field(default_factory=list)
    remark: str = ""


def prepare(
    model: PreTrainedModel,
    tokenizer: Tokenizer | None,
    text: str,
    target: str | None = None,
    *,
    ids: bool = False,
    max_new_tokens: int = 32,
) -> ModelInputs:
    """Turn the words of a command line into the arguments of one forward pass.

    Args:
        model: decides what is needed.
        tokenizer: the model's; not needed with `ids`, or for a model that reads numbers.
        text: what the model reads. For a model that reads numbers: numbers, `random`, `random:SEED` or an `.npz` file.
        target: an encoder-decoder's target, or a language model's continuation. An encoder-decoder without it writes
            its own.
        ids: whether text and target are token ids.
        max_new_tokens: longest target that an encoder-decoder writes.

    Raises:
        UserError: text or target is empty, longer than the model's positions, or not what the model reads.
    """
    if not text.strip():
        raise UserError("text: it is empty; the model needs something to read")
    if target is not None and not target.strip():
        raise UserError("target: it is empty; leave it out to have none")
    if input_name(model) != "input_ids":
        if target is not None:
            raise UserError(f"target: {type(model).__name__} reads numbers and takes no target text")
        return read_numbers(model, text)
    source = encode(model, tokenizer, text, "text", ids)
    if model.config.is_encoder_decoder:
        return encoder_decoder(model, tokenizer, source, target, ids, max_new_tokens)
    if target is None:
        return plain(model, tokenizer, source)
    if not model.can_generate():
        raise UserError(f"target: {type(model).__name__} writes no text; leave the target out")
    continuation = encode(model, tokenizer, target, "target", ids, special=False)
    joined = torch.cat((source, continuation), dim=1)
    check_length(model, joined, "text and target")
    labels = joined.clone()
    labels[:, : source.shape[1]] = -100
    found = plain(model, tokenizer, joined)
    found.arguments["labels"] = labels
    found.target = words(tokenizer, continuation)
    return found


def input_name(model: PreTrainedModel) -> str:
    """Name of the argument that a model reads, such as `input_ids`."""
    return getattr(model.config, "input_name", model.main_input_name)


def plain(model: PreTrainedModel, tokenizer: Tokenizer | None, source: torch.Tensor) -> ModelInputs:
    """The arguments of a model that reads one text and has no decoder."""
    shown = words(tokenizer, source)
    if type(model).__name__.endswith("ForMultipleChoice"):
        return ModelInputs({"input_ids": source.unsqueeze(1)}, shown, remark="the text is read as the only choice")
    arguments: dict[str, Any] = {"input_ids": source}
    if "use_cache" in inspect.signature(model.forward).parameters:
        arguments["use_cache"] = False
    return ModelInputs(arguments, shown)


def encoder_decoder(
    model: PreTrainedModel,
    tokenizer: Tokenizer | None,
    source: torch.Tensor,
    target: str | None,
    ids: bool,
    max_new_tokens: int,
) -> ModelInputs:
    """The arguments of an encoder-decoder: with the target given, or with the one that it writes."""
    arguments: dict[str, Any] = {"input_ids": source}
    remark = ""
    if target is not None:
        labels = encode(model, tokenizer, target, "target", ids)
    else:
        if not model.can_generate():
            raise UserError(f"target: {type(model).__name__} reads a target and cannot write one; give it one")
        limit = position_limit(model)
        longest = max_new_tokens if limit is None else max(1, min(max_new_tokens, limit - 1))
        writer: Any = model
        with torch.no_grad():
            written = writer.generate(input_ids=source, max_new_tokens=longest, do_sample=False, num_beams=1)
        labels = written[:, 1:]
        remark = "no target is given: this is the model's own greedy answer"
    if type(model).__name__.endswith(("ForConditionalGeneration", "LMHeadModel")):
        arguments["labels"] = labels
    else:
        arguments["decoder_input_ids"] = decoder_inputs(model, labels)
    if "use_cache" in inspect.signature(model.forward).parameters:
        arguments["use_cache"] = False
    return ModelInputs(arguments, words(tokenizer, source), words(tokenizer, labels), remark)


def decoder_inputs(model: PreTrainedModel, labels: torch.Tensor) -> torch.Tensor:
    """What a decoder reads to write `labels` of shape `(batch_size, length)`, none of them padding."""
    start = labels.new_full((len(labels), 1), model.config.decoder_start_token_id)
    return torch.cat((start, labels[:, :-1]), dim=1)


def encode(
    model: PreTrainedModel, tokenizer: Tokenizer | None, text: str, name: str, ids: bool, special: bool = True
) -> torch.Tensor:
    """Text, or with `ids` the numbers in it, as tokens of shape `(1, length)` on the model's device.

    Raises:
        UserError: no tokenizer, what is no Unicode text, no token, an id outside of the vocabulary, or more tokens than
            positions.
    """
    embeddings: Any = model.get_input_embeddings()
    vocabulary = embeddings.weight.shape[0]
    if ids:
        try:
            numbers = [int(word) for word in text.replace(",", " ").split()]
        except ValueError as error:
            raise UserError(f"{name}: with --ids it must hold whole numbers, got {text!r}") from error
    elif tokenizer is None:
        raise UserError(f"{name}: the model has no tokenizer; give token ids and --ids")
    elif any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError(f"{name}: it is no text: a character is half of a surrogate pair, or a byte that is not UTF-8")
    else:
        numbers = tokenizer(text, add_special_tokens=special)["input_ids"]
    if not numbers:
        raise UserError(f"{name}: {text!r} has no tokens")
    outside = [number for number in numbers if not 0 <= number < vocabulary]
    if outside:
        raise UserError(f"{name}: token id {outside[0]} must lie in [0, {vocabulary}), the model's vocabulary")
    tokens = torch.tensor([numbers], device=model.device)
    check_length(model, tokens, name)
    return tokens


def position_limit(model: PreTrainedModel) -> int | None:
    """The longest sequence that the model has positions for, in tokens; `None` if there is no limit."""
    config = model.config.get_text_config()
    if getattr(config, "position_embedding_type", None) == "sinusoidal":
        return None
    limit = getattr(config, "max_position_embeddings", None)
    # Models without a limit may state -1.
    return limit if limit is None or limit > 0 else None


def check_length(model: PreTrainedModel, tokens: torch.Tensor, name: str) -> None:
    """Raises the `UserError` about too many tokens."""
    limit = position_limit(model)
    if limit is not None and tokens.shape[1] > limit:
        raise UserError(f"{name}: it has {tokens.shape[1]} tokens, the model has {limit} positions")


def words(tokenizer: Tokenizer | None, tokens: torch.Tensor) -> list[str]:
    """Each token of a batch of one as readable text; its number where there is no tokenizer."""
    numbers: Sequence[int] = tokens[0].tolist()
    if tokenizer is None:
        return [str(number) for number in numbers]
    return [str(tokenizer.decode([number], clean_up_tokenization_spaces=False)) for number in numbers]


def read_numbers(model: PreTrainedModel, text: str) -> ModelInputs:
    """The arguments of a model that reads numbers: from an `.npz` file, drawn at random, or typed.

    Raises:
        UserError: the file cannot be read or names an unknown argument, or the numbers do not fit.
    """
    parameters = inspect.signature(model.forward).parameters
    drawn = RANDOM.fullmatch(text.strip())
    remark = ""
    if text.strip().endswith(".npz"):
        try:
            with np.load(Path(text.strip()).expanduser()) as file:
                arrays = {name: torch.from_numpy(file[name]) for name in file.files}
        except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"text: cannot read {text.strip()!r}: {one_line(error)[:200]}") from error
        unknown = sorted(arrays.keys() - parameters.keys())
        if unknown or input_name(model) not in arrays:
            known = ", ".join(name for name in parameters if name not in ("kwargs", "labels"))
            what = f"array {unknown[0]!r} is unknown" if unknown else f"array {input_name(model)!r} is missing"
            raise UserError(f"text: {text.strip()}: {what}; {type(model).__name__} takes {known}")
        empty = next((name for name, values in arrays.items() if not values.numel()), None)
        if empty is not None:
            raise UserError(f"text: {text.strip()}: array {empty!r} holds no numbers")
    elif drawn:
        seed = int(drawn[1] or 0)
        arrays = random_numbers(model, seed)
        remark = f"random inputs, seed {seed}"
    elif input_name(model) == "input_values" and "context_values" not in parameters:
        try:
            numbers = [float(word) for word in text.replace(",", " ").split()]
        except ValueError as error:
            message = f"text: {type(model).__name__} reads numbers, got {text!r}; give numbers, random or an .npz file"
            raise UserError(message) from error
        arrays = {"input_values": torch.tensor([numbers])}
    else:
        raise UserError(
            f"text: {type(model).__name__} reads {input_name(model)}; give random, random:SEED or an .npz file "
            "with arrays named like its arguments"
        )
    arguments = {
        name: value.to(model.device, model.dtype) if value.is_floating_point() else value.to(model.device)
        for name, value in arrays.items()
    }
    return ModelInputs(arguments, remark=remark)


def random_numbers(model: PreTrainedModel, seed: int) -> dict[str, torch.Tensor]:
    """Inputs of the right shape: standard normal, or ±1 for parities; the values of a prompt are a linear function."""
    config, generator = model.config, torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    if config.model_type == "in_context_transformer":
        points = normal(1, min(config.max_points, 2 * config.n_dims + 1), config.n_dims)
        values = points @ normal(config.n_dims, config.n_outputs) * config.n_dims**-0.5
        return {"input_values": points, "context_values": values}
    if config.model_type == "low_rank_in_context_transformer":
        return {"input_values": normal(1, 3 * config.block_size + config.num_tail_tokens, config.n_dims)}
    if isinstance(config, ContinuousThoughtMachineConfig):  # that of a baseline as well
        if config.input_name == "input_values":
            length = config.out_dims // 2
            return {"input_values": torch.randint(2, (1, length), generator=generator) * 2.0 - 1.0}
        if config.input_name == "input_features":
            return {"input_features": normal(1, config.num_channels, 4)}
        size = config.image_size or 32
        sides = size if isinstance(size, list) else [size, size]
        return {"pixel_values": normal(1, config.num_channels, *sides)}
    raise UserError(f"text: no rule for random inputs of {type(model).__name__}; give an .npz file")
