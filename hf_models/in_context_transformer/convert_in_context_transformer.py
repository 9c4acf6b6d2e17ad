"""
Converts an in-context Transformer made of GPT-2 blocks into a folder that `from_pretrained` loads:

    python -m hf_models.in_context_transformer.convert_in_context_transformer CONFIG.json WEIGHTS OUT_DIR

CONFIG.json holds the original's settings: with `V` and `C` those of a low-rank model, with `n_positions` those of a
dense one (see `convert_config`). WEIGHTS is a safetensors file or a PyTorch state dict, also one that lies under
`model_state_dict` in a training state. OUT_DIR must not exist or be empty; it appears whole or not at all. A mistake in
the input is reported in one line, with exit code 2.
"""

import re
import sys

import torch
from huggingface_hub.errors import StrictDataclassError

from .configuration_in_context_transformer import InContextTransformerConfig, LowRankInContextTransformerConfig
from .modeling_in_context_transformer import (
    InContextTransformerForPrediction,
    LowRankInContextTransformerForSequenceClassification,
)

SHARED_KEYS = {
    "n_dims": "n_dims",
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
}
LOW_RANK_KEYS = {"V": "num_blocks", "C": "block_size"}
DENSE_KEYS = {"n_positions": "max_points"}
OPTIONAL_KEYS = {"layer_norm_eps": "layer_norm_eps"}
# Keys that describe the original and its example data; their values are checked where the model depends on them.
DESCRIPTIVE_KEYS = {"name", "batch", "seed", "seq_len", "key_positions"}
FIXED_KEYS = {
    "family": ("gpt2",),
    "activation": ("gelu_new (tanh form)", "gelu_new"),
    "attention_scale": ("1/sqrt(head_dim)",),
}

LAYER_NAMES = {
    "ln_1": ["ln_1"],
    "attn.c_attn": ["attn.q_proj", "attn.k_proj", "attn.v_proj"],
    "attn.c_proj": ["attn.out_proj"],
    "ln_2": ["ln_2"],
    "mlp.c_fc": ["feed_forward.fc1"],
    "mlp.c_proj": ["feed_forward.fc2"],
}
# What GPT-2 keeps besides: a token embedding that a prompt of numbers never uses, and causal masks.
UNUSED_TENSORS = re.compile(r"_backbone\.(wte\.weight|h\.\d+\.attn\.(bias|masked_bias))")


def convert_config(original: dict) -> InContextTransformerConfig | LowRankInContextTransformerConfig:
    """
    Translates the original's settings.

    Args:
        original (`dict`):
            The settings, or a dict that holds them under `config` or `model`. `n_dims`, `n_embd`, `n_layer` and
            `n_head` are required; `V` (tables) and `C` (columns of a table) make it a low-rank model with three tail
            tokens and two local layers, `n_positions` (points in a prompt) a dense one. `layer_norm_eps` has this
            package's default; `family`, `activation` and `attention_scale` may only say what the model does.

    Returns:
        The configuration, without dropout.

    Raises:
        ValueError: a key is missing or unknown, or a value breaks a rule of the configuration.
    """
    for key in ("config", "model"):
        original = original.get(key, original)
        if not isinstance(original, dict):
            raise ValueError(f"key '{key}' must hold an object")
    is_dense = not LOW_RANK_KEYS.keys() & original.keys()
    required = SHARED_KEYS | (DENSE_KEYS if is_dense else LOW_RANK_KEYS)
    missing = sorted(required.keys() - original.keys())
    if missing:
        raise ValueError(f"missing key(s): {', '.join(missing)}")
    unknown = sorted(original.keys() - required.keys() - OPTIONAL_KEYS.keys() - DESCRIPTIVE_KEYS - FIXED_KEYS.keys())
    if unknown:
        raise ValueError(f"unknown key(s): {', '.join(unknown)}")
    for key, allowed in FIXED_KEYS.items():
        if original.get(key, allowed[0]) not in allowed:
            raise ValueError(f"{key}={original[key]!r} must be {' or '.join(map(repr, allowed))}")
    settings = {ours: original[theirs] for theirs, ours in (required | OPTIONAL_KEYS).items() if theirs in original}
    try:
        if is_dense:
            return InContextTransformerConfig(**settings)
        if isinstance(settings["block_size"], int):
            # A block is a table's name and its columns.
            settings["block_size"] += 1
        return LowRankInContextTransformerConfig(**settings)
    except StrictDataclassError as error:
        raise ValueError(" ".join(str(error).split())) from error


def expected_tensors(
    config: InContextTransformerConfig | LowRankInContextTransformerConfig,
) -> dict[str, tuple[str, list[str]]]:
    """
    The original's tensor names, each with what happens to it and the names of ours that it becomes:

    * `"same"`: renamed; `"transpose"`: transposed first, as GPT-2 stores matrices as `(inputs, outputs)`.
    * several names share it out in equal parts along dimension 0.
    * `"rows"`: one of several tensors that together, in order, are the rows of ours.
    """
    is_dense = isinstance(config, InContextTransformerConfig)
    names = {}
    if is_dense:
        names["_backbone.wpe.weight"] = ("same", ["model.embed_positions.weight"])
    else:
        names["pos_shared"] = ("rows", ["model.positions.rows"])
        names["pos_last"] = ("rows", ["model.positions.rows"])
    blocks, final = ("_backbone.h", "_backbone.ln_f") if is_dense else ("blocks", "ln_f")
    read = "_read" if is_dense else "read"
    for kind in ("weight", "bias"):
        for layer in range(config.num_hidden_layers):
            for theirs, ours in LAYER_NAMES.items():
                change = "transpose" if kind == "weight" and not theirs.startswith("ln_") else "same"
                names[f"{blocks}.{layer}.{theirs}.{kind}"] = (
                    change,
                    [f"model.blocks.{layer}.{name}.{kind}" for name in ours],
                )
        names[f"{final}.{kind}"] = ("same", [f"model.ln_f.{kind}"])
        names[f"{read}_in.{kind}"] = ("same", [f"model.read_in.{kind}"])
        names[f"{read}_out.{kind}"] = ("same", [f"read_out.{kind}"])
    return names


def convert_tensors(
    original: dict[str, torch.Tensor], config: InContextTransformerConfig | LowRankInContextTransformerConfig
) -> dict[str, torch.Tensor]:
    """
    Renames, transposes, splits and joins the original's tensors.

    Args:
        original (`dict[str, torch.Tensor]`): All tensors of the original, under its names.
        config ([`InContextTransformerConfig`] or [`LowRankInContextTransformerConfig`]): The translated configuration.

    Returns:
        `dict[str, torch.Tensor]`: every parameter of the model with its head.

    Raises:
        ValueError: a tensor is missing, unknown, or has another shape than the configuration says.
    """
    names = expected_tensors(config)
    missing = sorted(names.keys() - original.keys())
    unknown = sorted(name for name in original.keys() - names.keys() if not UNUSED_TENSORS.fullmatch(name))
    if missing or unknown:
        found = {"missing": missing, "unknown": unknown}
        raise ValueError(
            "; ".join(f"{kind} tensor(s): {', '.join(tensors)}" for kind, tensors in found.items() if tensors)
        )
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in model_class(config)(config).named_parameters()}
    num_rows = {"pos_shared": getattr(config, "block_size", 0), "pos_last": getattr(config, "num_tail_tokens", 0)}
    parts: dict[str, list[torch.Tensor]] = {}
    for theirs, (change, ours) in names.items():
        first = shapes[ours[0]]
        expected = [num_rows[theirs] if change == "rows" else first[0] * len(ours), *first[1:]]
        tensor = original[theirs]
        if change == "transpose":
            expected.reverse()
        if list(tensor.shape) != expected:
            raise ValueError(f"tensor {theirs} has shape {list(tensor.shape)}, the config says {expected}")
        if change == "transpose":
            tensor = tensor.T
        for name, part in zip(ours, tensor.chunk(len(ours), dim=0), strict=True):
            parts.setdefault(name, []).append(part)
    return {name: torch.cat(pieces).contiguous() for name, pieces in parts.items()}


def model_class(config: InContextTransformerConfig | LowRankInContextTransformerConfig) -> type:
    """The class with the head that an original has."""
    if isinstance(config, InContextTransformerConfig):
        return InContextTransformerForPrediction
    return LowRankInContextTransformerForSequenceClassification


def make_model(
    original: dict[str, torch.Tensor], config: InContextTransformerConfig | LowRankInContextTransformerConfig
) -> InContextTransformerForPrediction | LowRankInContextTransformerForSequenceClassification:
    """The model with the original's weights; raises `ValueError` if they do not fit."""
    tensors = convert_tensors(original, config)
    model = model_class(config)(config)
    model.to(tensors["read_out.weight"].dtype)
    model.load_state_dict(tensors)
    return model


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code, 0 or 2."""
    # The command is that of the installed package; all else here runs alone, as everything in this folder does.
    from hf_models.conversion import convert_command

    name = "hf_models.in_context_transformer.convert_in_context_transformer"
    description = "Convert an in-context Transformer made of GPT-2 blocks into a from_pretrained folder."
    return convert_command(convert_config, make_model, name, description, arguments)


if __name__ == "__main__":
    sys.exit(main())
