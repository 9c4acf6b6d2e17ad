"""
Converts a Transformer made of `torch.nn.Transformer` layers into a folder that `from_pretrained` loads:

    python -m hf_models.vanilla_transformer.convert_vanilla_transformer CONFIG.json WEIGHTS.safetensors OUT_DIR

CONFIG.json holds the original's settings (see `convert_config`). WEIGHTS is a safetensors file or a PyTorch state dict
with the names `embed.weight` and `core.{encoder,decoder}.layers.{i}…` of `torch.nn.Transformer`. OUT_DIR must not exist
or be empty; it appears whole or not at all. A mistake in the input is reported in one line, with exit code 2.
"""

import math
import sys

import torch
from huggingface_hub.errors import StrictDataclassError

from .configuration_vanilla_transformer import VanillaTransformerConfig
from .modeling_vanilla_transformer import VanillaTransformerForConditionalGeneration

REQUIRED_KEYS = {
    "vocab": "vocab_size",
    "d_model": "hidden_size",
    "heads": "num_attention_heads",
    "enc_layers": "num_hidden_layers",
    "dec_layers": "num_decoder_layers",
    "d_ff": "intermediate_size",
    "final_norm": "final_layer_norm",
}
OPTIONAL_KEYS = {
    "norm": "norm_position",
    "activation": "hidden_act",
    "dropout": "dropout",
    "label_smoothing": "label_smoothing",
    "layer_norm_eps": "layer_norm_eps",
    "max_len": "max_position_embeddings",
    "pad_id": "pad_token_id",
    "bos_id": "bos_token_id",
    "eos_id": "eos_token_id",
}
# Keys that describe the original and its example data, and that its tensors or `convert_config` check where needed.
DESCRIPTIVE_KEYS = {"name", "seed", "batch", "src_len", "tgt_len", "pad_step", "tied", "embedding_scale"}

ATTENTION_NAMES = {"self_attn": "self_attn", "multihead_attn": "cross_attn"}
OTHER_NAMES = {
    "encoder": {
        "linear1": "feed_forward.fc1",
        "linear2": "feed_forward.fc2",
        "norm1": "self_attn_norm",
        "norm2": "feed_forward_norm",
    },
    "decoder": {
        "linear1": "feed_forward.fc1",
        "linear2": "feed_forward.fc2",
        "norm1": "self_attn_norm",
        "norm2": "cross_attn_norm",
        "norm3": "feed_forward_norm",
    },
}


def convert_config(original: dict) -> VanillaTransformerConfig:
    """
    Translates the original's settings.

    Args:
        original (`dict`):
            The settings, or a dict that holds them under `config`. `vocab`, `d_model`, `heads`, `enc_layers`,
            `dec_layers`, `d_ff` and `final_norm` are required; `norm`, `activation`, `dropout`, `label_smoothing`,
            `layer_norm_eps`, `max_len`, `pad_id`, `bos_id` and `eos_id` have this package's defaults, except that an
            original which states no dropout has none; `embedding_scale` is `sqrt(d_model)`, the default, or 1.

    Returns:
        [`VanillaTransformerConfig`], with `bos_id` as first token of the decoder.

    Raises:
        ValueError: a key is missing or unknown, or a value breaks a rule of the configuration.
    """
    original = original.get("config", original)
    if not isinstance(original, dict):
        raise ValueError("key 'config' must hold an object")
    missing = sorted(REQUIRED_KEYS.keys() - original.keys())
    if missing:
        raise ValueError(f"missing key(s): {', '.join(missing)}")
    unknown = sorted(original.keys() - REQUIRED_KEYS.keys() - OPTIONAL_KEYS.keys() - DESCRIPTIVE_KEYS)
    if unknown:
        raise ValueError(f"unknown key(s): {', '.join(unknown)}")
    settings = {"dropout": 0.0} | {
        ours: original[theirs] for theirs, ours in (REQUIRED_KEYS | OPTIONAL_KEYS).items() if theirs in original
    }
    if "bos_token_id" in settings:
        settings["decoder_start_token_id"] = settings["bos_token_id"]
    try:
        config = VanillaTransformerConfig(**settings)
    except StrictDataclassError as error:
        raise ValueError(" ".join(str(error).split())) from error
    scale = original.get("embedding_scale", math.sqrt(config.hidden_size))
    if not isinstance(scale, (int, float)) or not any(
        math.isclose(scale, allowed, rel_tol=1e-6) for allowed in (1.0, math.sqrt(config.hidden_size))
    ):
        raise ValueError(f"embedding_scale={scale!r} must be sqrt(d_model)={math.sqrt(config.hidden_size)} or 1")
    config.scale_embedding = math.isclose(scale, math.sqrt(config.hidden_size), rel_tol=1e-6)
    return config


def expected_tensors(config: VanillaTransformerConfig) -> dict[str, list[str]]:
    """The original's tensor names, each with the names of ours that it is split into, in order, along dimension 0."""
    names = {"embed.weight": ["model.encoder.embed_tokens.weight"]}
    for stack, num_layers in (("encoder", config.num_hidden_layers), ("decoder", config.num_decoder_layers)):
        for layer in range(num_layers):
            theirs, ours = f"core.{stack}.layers.{layer}", f"model.{stack}.layers.{layer}"
            for their_attention, our_attention in ATTENTION_NAMES.items():
                if stack == "encoder" and our_attention == "cross_attn":
                    continue
                for kind in ("weight", "bias"):
                    names[f"{theirs}.{their_attention}.in_proj_{kind}"] = [
                        f"{ours}.{our_attention}.{projection}.{kind}" for projection in ("q_proj", "k_proj", "v_proj")
                    ]
                    names[f"{theirs}.{their_attention}.out_proj.{kind}"] = [f"{ours}.{our_attention}.out_proj.{kind}"]
            for their_module, our_module in OTHER_NAMES[stack].items():
                for kind in ("weight", "bias"):
                    names[f"{theirs}.{their_module}.{kind}"] = [f"{ours}.{our_module}.{kind}"]
        if config.final_layer_norm:
            for kind in ("weight", "bias"):
                names[f"core.{stack}.norm.{kind}"] = [f"model.{stack}.final_norm.{kind}"]
    return names


def convert_tensors(original: dict[str, torch.Tensor], config: VanillaTransformerConfig) -> dict[str, torch.Tensor]:
    """
    Renames the original's tensors and splits its stacked query, key and value projections.

    Args:
        original (`dict[str, torch.Tensor]`): All tensors of the original, under its names.
        config ([`VanillaTransformerConfig`]): The translated configuration.

    Returns:
        `dict[str, torch.Tensor]`: the parameters of [`VanillaTransformerForConditionalGeneration`] that are not tied to
        another one.

    Raises:
        ValueError: a tensor is missing, unknown, or has another shape than the configuration says.
    """
    names = expected_tensors(config)
    missing, unknown = sorted(names.keys() - original.keys()), sorted(original.keys() - names.keys())
    if missing or unknown:
        parts = [
            f"{kind} tensor(s): {', '.join(found)}" for kind, found in (("missing", missing), ("unknown", unknown))
        ]
        raise ValueError("; ".join(part for part, found in zip(parts, (missing, unknown), strict=True) if found))
    with torch.device("meta"):
        shapes = {
            name: parameter.shape
            for name, parameter in VanillaTransformerForConditionalGeneration(config).named_parameters()
        }
    converted = {}
    for theirs, ours in names.items():
        expected = [sum(shapes[name][0] for name in ours), *shapes[ours[0]][1:]]
        if list(original[theirs].shape) != expected:
            raise ValueError(f"tensor {theirs} has shape {list(original[theirs].shape)}, the config says {expected}")
        for name, part in zip(ours, original[theirs].chunk(len(ours), dim=0), strict=True):
            converted[name] = part.clone()
    return converted


def make_model(
    original: dict[str, torch.Tensor], config: VanillaTransformerConfig
) -> VanillaTransformerForConditionalGeneration:
    """The model with the original's weights; raises `ValueError` if they do not fit."""
    tensors = convert_tensors(original, config)
    model = VanillaTransformerForConditionalGeneration(config)
    model.to(tensors["model.encoder.embed_tokens.weight"].dtype)
    # What is missing here is exactly what is tied, as convert_tensors has checked every name.
    model.load_state_dict(tensors, strict=False)
    return model


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code, 0 or 2."""
    # The command is that of the installed package; all else here runs alone, as everything in this folder does.
    from hf_models.conversion import convert_command

    name = "hf_models.vanilla_transformer.convert_vanilla_transformer"
    description = "Convert a Transformer made of torch.nn.Transformer layers into a from_pretrained folder."
    return convert_command(convert_config, make_model, name, description, arguments)


if __name__ == "__main__":
    sys.exit(main())
