"""Starting from pretrained weights: all of a model's, its token embeddings where the vocabulary is another, or a whole
model as the reader of the source."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from tokenizers import processors
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .arguments import Recipe
from .errors import UserError, one_line
from .loading import LOADING_ERRORS, load_model, locate, source_options

SPECIAL_ROLES = ("pad_token", "bos_token", "eos_token", "unk_token")


def pretrained_model(recipe: Recipe, auto_class: Any) -> PreTrainedModel:
    """The model that a recipe's `model.pretrained` names, in float32.

    Args:
        recipe: of any kind.
        auto_class: loads the head that its task needs.

    Raises:
        UserError: if it cannot be loaded, or is of another architecture than the recipe says.
    """
    assert recipe.pretrained is not None  # what this is called for
    trust, field = recipe.trust_remote_code, "model.pretrained"
    options = source_options(recipe.pretrained, recipe.pretrained_revision, trust_remote_code=trust, option=field)
    try:
        model = auto_class.from_pretrained(recipe.pretrained, **options, use_safetensors=True, dtype=torch.float32)
    except Exception as error:  # a damaged file raises whatever its reader happens to meet
        raise UserError(f"{field}: cannot load {recipe.pretrained!r}: {one_line(error)[:300]}") from error
    if model.config.model_type != recipe.model_type:
        raise UserError(
            f"model.model_type is {recipe.model_type}, but {recipe.pretrained!r} holds a {model.config.model_type}"
        )
    return model


def reader_fields(recipe: Recipe) -> dict[str, Any]:
    """The fields of a model's configuration that its reader decides: its own one; none without `model.reader`.

    Raises:
        UserError: if the reader's configuration cannot be loaded, or has fewer layers than are to be kept.
    """
    if recipe.reader is None:
        return {}
    field = "model.reader"
    name, options = locate(recipe.reader, field)
    options |= source_options(name, recipe.reader_revision, weights=False, option=field)
    try:
        config = AutoConfig.from_pretrained(name, **options)
    except LOADING_ERRORS as error:
        raise UserError(f"{field}: cannot load {recipe.reader!r}: {one_line(error)[:300]}") from error
    if recipe.reader_layers is not None:
        layers = getattr(config, "num_hidden_layers", None)
        if not isinstance(layers, int) or layers < recipe.reader_layers:
            held = f"{layers} layers" if isinstance(layers, int) else "no num_hidden_layers"
            raise UserError(f"model.reader_layers is {recipe.reader_layers}, but {recipe.reader!r} has {held}")
        config.num_hidden_layers = recipe.reader_layers
        kinds = getattr(config, "layer_types", None)
        if kinds is not None:
            config.layer_types = kinds[: recipe.reader_layers]
    config.name_or_path = ""  # a place on this machine
    return {"reader_config": config}


def reader_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The tokenizer of `model.reader`. One without an end or padding token takes the nearest that it has for it, and
    every text ends with the end token, as sources do in training.

    Raises:
        UserError: if it cannot be loaded, or has no token that can end a text.
    """
    assert recipe.reader is not None
    field = "model.reader"
    name, options = locate(recipe.reader, field)
    options |= source_options(name, recipe.reader_revision, weights=False, option=field)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    except Exception as error:  # a damaged file raises whatever its reader happens to meet
        message = f"{field}: cannot load the tokenizer of {recipe.reader!r}: {one_line(error)[:300]}"
        raise UserError(message) from error
    for token, stand_in in (("bos_token", "cls_token"), ("eos_token", "sep_token"), ("pad_token", "eos_token")):
        if getattr(tokenizer, token) is None and getattr(tokenizer, stand_in) is not None:
            setattr(tokenizer, token, getattr(tokenizer, stand_in))
    if tokenizer.eos_token is None:
        raise UserError(f"{field}: the tokenizer of {recipe.reader!r} has no eos_token, which source and target need")
    if tokenizer.is_fast:
        end = tokenizer.eos_token
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"$A {end}", pair=f"$A {end} $B:1 {end}:1", special_tokens=[(end, tokenizer.eos_token_id)]
        )
    return tokenizer


@torch.no_grad()
def fill_reader(model: PreTrainedModel, recipe: Recipe) -> int:
    """Give a model's reader the weights of `model.reader`.

    Args:
        model: with a reader of the configuration that [`reader_fields`] gives.
        recipe: names the weights.

    Returns:
        The number of parameters of the reader.

    Raises:
        UserError: if the weights cannot be loaded, or the reader has one that they do not hold.
    """
    assert recipe.reader is not None
    reader = model.get_encoder().reader.model
    held = reader.state_dict().keys()
    pretrained, _ = load_model(
        recipe.reader,
        auto_class=AutoModel,
        revision=recipe.reader_revision,
        dtype=torch.float32,
        device="cpu",
        needs_tokenizer=False,
        # Layers that are not kept, and what makes a state of the whole row, are left over.
        may_lack=lambda name: name not in held,
        option="model.reader",
    )
    reader.load_state_dict({name: value for name, value in pretrained.state_dict().items() if name in held})
    return reader.num_parameters()


@dataclass(frozen=True)
class CopiedEmbeddings:
    """What became of the rows of an embedding matrix.

    Attributes:
        copied: tokens whose text is one token of the source, and special tokens that it has too: they take its row.
        averaged: tokens whose text is several tokens of the source: they take the mean of these rows.
        kept: the others, for instance bytes that are no text by themselves: they keep their initial values.
    """

    copied: int
    averaged: int
    kept: int


@torch.no_grad()
def embeddings_from(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> CopiedEmbeddings:
    """Set a model's input embeddings by those of a pretrained model, token by token.

    The text of each token is read by the source's tokenizer; its embedding becomes the mean of the source's embeddings
    of what was read. For a text that the source knows as one token this is a copy. Special tokens go by their role
    (padding, start, end, unknown). The rows set are then scaled by one common factor, so that they have the root mean
    square that the model's own initialisation gave them: a model that multiplies embeddings by a constant, or ties them
    to its output, is made for that size. Directions, and lengths relative to each other, are the source's. Output
    weights that are tied follow; untied ones stay.

    Args:
        model: with input embeddings `(vocab_size, hidden_size)` in the order of `tokenizer`.
        tokenizer: the model's.
        source: folder or Hub id of a model with its tokenizer.
        revision: Hub revision of the source.
        trust_remote_code: whether code that the source's repository brings may run.

    Returns:
        How many rows were set in which way.

    Raises:
        UserError: in one line, if the source cannot be loaded, its embeddings have another width, or no token's text
            can be read by its tokenizer.
    """
    field = "model.embeddings_from"
    pretrained, reader = load_model(
        source,
        auto_class=AutoModel,
        revision=revision,
        trust_remote_code=trust_remote_code,
        dtype=torch.float32,
        device="cpu",
        may_lack=lambda name: "pooler" in name,  # which a checkpoint with a language-model head is saved without
        option=field,
    )
    assert reader is not None  # `load_model` raises without one
    target = cast(nn.Embedding, model.get_input_embeddings()).weight
    rows = cast(nn.Embedding, pretrained.get_input_embeddings()).weight
    if rows.shape[1] != target.shape[1]:
        raise UserError(
            f"{field}: the embeddings of {source!r} have width {rows.shape[1]}, and model.hidden_size is "
            f"{target.shape[1]}; they must be equal"
        )
    readings = [read_token(tokenizer, reader, token) for token in range(len(tokenizer))]
    found = [token for token, pieces in enumerate(readings) if pieces]
    if not found:
        raise UserError(f"{field}: the tokenizer of {source!r} can read none of the model's tokens")
    values = torch.stack([rows[readings[token]].mean(dim=0) for token in found])
    initial = target[found].float().square().mean().sqrt()
    values *= initial / values.square().mean().sqrt()
    target[found] = values.to(target)
    lengths = [len(readings[token]) for token in found]
    copied = lengths.count(1)
    return CopiedEmbeddings(copied=copied, averaged=len(found) - copied, kept=target.shape[0] - len(found))


def read_token(tokenizer: PreTrainedTokenizerBase, reader: PreTrainedTokenizerBase, token: int) -> list[int]:
    """The tokens of another tokenizer for the text of a token; none if it has no text that the other can read.

    Args:
        tokenizer: whose token it is.
        reader: the other tokenizer.
        token: id of the token.
    """
    if token in tokenizer.all_special_ids:
        roles = [role for role in SPECIAL_ROLES if getattr(tokenizer, f"{role}_id") == token]
        ids = [getattr(reader, f"{role}_id") for role in roles]
        return [found for found in ids if found is not None][:1]
    text = tokenizer.decode([token], clean_up_tokenization_spaces=False)
    if not text or "\N{REPLACEMENT CHARACTER}" in text:
        return []  # a byte that is part of a character
    pieces = reader(text, add_special_tokens=False, verbose=False)["input_ids"]
    return [] if reader.unk_token_id in pieces else pieces
