"""
Converts a model of the public implementation `YeoJune/conn_trans` into a folder that `from_pretrained` loads:

    python -m hf_models.connection_transformer.convert_connection_transformer CONFIG.json WEIGHTS.safetensors OUT_DIR

Form 1, with per-pair connections and one token predicted per source position, becomes a
`ConnectionTransformerForMaskedLM`; form 2, with scalar connections and a decoder, a
`ConnectionTransformerForConditionalGeneration`.

CONFIG.json holds the original's settings (see `convert_config`). WEIGHTS is a safetensors file or a PyTorch state dict
with the original's tensor names, as they are or after the prefix `state_dict.`; with the prefix, all other tensors of
the file are ignored. OUT_DIR must not exist or be empty; it appears whole or not at all. A mistake in the input is
reported in one line, with exit code 2.
"""

import sys

import torch
from huggingface_hub.errors import StrictDataclassError

from .configuration_connection_transformer import ConnectionTransformerConfig
from .connections_connection_transformer import ConnectionTransformerPerPairConnections
from .modeling_connection_transformer import (
    ConnectionTransformerForConditionalGeneration,
    ConnectionTransformerForMaskedLM,
    ConnectionTransformerPreTrainedModel,
)

COMMON_KEYS = {
    "d_model": "hidden_size",
    "num_slots": "num_slots",
    "bilinear_rank": "connection_rank",
    "max_reasoning_steps": "max_reasoning_steps",
    "convergence_threshold": "halting_threshold",
    "max_seq_len": "max_position_embeddings",
}
REQUIRED_KEYS = {
    1: COMMON_KEYS | {"vocab_size": "vocab_size"},
    2: COMMON_KEYS
    | {
        "src_vocab_size": "vocab_size",
        "tgt_vocab_size": "decoder_vocab_size",
        "num_decoder_layers": "num_decoder_layers",
        "num_heads": "num_attention_heads",
    },
}
# The source's padding token must be the target's; `dropout` sets every dropout of the decoder layers.
OPTIONAL_KEYS = {
    1: {"dropout", "pad_token_id", "bos_token_id", "eos_token_id"},
    2: {"dropout", "src_pad_token_id", "tgt_pad_token_id", "bos_token_id", "eos_token_id"},
}

STATE_DICT_PREFIX = "state_dict."

COMMON_NAMES = {
    "H": "model.encoder.compression.slots",
    "W_q_input.weight": "model.encoder.compression.q_proj.weight",
    "W_k_slots.weight": "model.encoder.compression.k_proj.weight",
    "W_v_input.weight": "model.encoder.compression.v_proj.weight",
    "W_source": "model.encoder.reasoning.step.connections.source_weight",
    "W_target": "model.encoder.reasoning.step.connections.target_weight",
    "output_projection.weight": "lm_head.weight",
}
PER_PAIR_NAMES = {
    "token_embedding.weight": "model.encoder.embed_tokens.weight",
    "pos_embedding.weight": "model.encoder.embed_positions.weight",
    "W_q_output.weight": "expansion.q_proj.weight",
    "W_k_final.weight": "expansion.k_proj.weight",
    "W_v_final.weight": "expansion.v_proj.weight",
}
DECODER_NAMES = {
    "src_token_embedding.weight": "model.encoder.embed_tokens.weight",
    "src_pos_embedding.weight": "model.encoder.embed_positions.weight",
    "tgt_token_embedding.weight": "model.decoder.embed_tokens.weight",
    "tgt_pos_embedding.weight": "model.decoder.embed_positions.weight",
    "output_norm.weight": "model.decoder.layer_norm.weight",
    "output_norm.bias": "model.decoder.layer_norm.bias",
}
LAYER_NAMES = {
    "linear1": "fc1",
    "linear2": "fc2",
    "norm1": "self_attn_layer_norm",
    "norm2": "cross_attn_layer_norm",
    "norm3": "feed_forward_layer_norm",
    "self_attn.out_proj": "self_attn.out_proj",
    "multihead_attn.out_proj": "cross_attn.out_proj",
}
ATTENTION_NAMES = {"self_attn": "self_attn", "multihead_attn": "cross_attn"}


def convert_config(original: dict) -> ConnectionTransformerConfig:
    """
    Translates the original's settings and adds what its code fixes: one LayerNorm per step, no injected input, a sum
    over tokens when no mask is given, and the loss's label smoothing (0.1) and, in form 2, orthogonality weight (0.01).
    Form 1's cost of the steps has no gradient and is left out.

    Its stop rule becomes `halting="update_norm"`, which lets each sample stop as it would alone; the original's own
    rule over the whole batch is `"global_update_norm"`. The original counts padding in its positions, this model does
    not: the two agree without padding and with padding on the right.

    Args:
        original (`dict`):
            The settings, or a dict that holds them under `config` and may name the `form`, 1 or 2; without it the
            settings are of form 1 if they have a `vocab_size` and no `src_vocab_size`. `d_model`, `num_slots`,
            `bilinear_rank`, `max_reasoning_steps`, `convergence_threshold` and `max_seq_len` are required, with
            `vocab_size` in form 1, and `src_vocab_size`, `tgt_vocab_size`, `num_decoder_layers` and `num_heads` in
            form 2. `dropout` is 0.1 by default, padding tokens (`pad_token_id` in form 1, `src_pad_token_id` and
            `tgt_pad_token_id` in form 2) are 0, `bos_token_id` none and `eos_token_id` 1, as in the T5 vocabulary that
            the original uses. The decoder of form 2 starts with the padding token.

    Returns:
        [`ConnectionTransformerConfig`].

    Raises:
        ValueError: the form is neither 1 nor 2, a key is missing or unknown, the two padding tokens differ, or a value
            breaks a rule of the configuration.
    """
    form = original.get("form")
    original = original.get("config", original)
    if not isinstance(original, dict):
        raise ValueError("key 'config' must hold an object")
    if form is None:
        form = 1 if "vocab_size" in original and "src_vocab_size" not in original else 2
    if form not in (1, 2):
        raise ValueError(f"form={form!r} must be 1 (per-pair connections) or 2 (scalar connections and a decoder)")
    missing = sorted(REQUIRED_KEYS[form].keys() - original.keys())
    if missing:
        raise ValueError(f"form {form} misses key(s): {', '.join(missing)}")
    unknown = sorted(original.keys() - REQUIRED_KEYS[form].keys() - OPTIONAL_KEYS[form])
    if unknown:
        raise ValueError(f"form {form} has no key(s): {', '.join(unknown)}")
    if form == 1:
        pad = original.get("pad_token_id", 0)
        # Without a decoder nothing has heads.
        own = {"connection_type": "per_pair", "is_encoder_decoder": False, "num_attention_heads": 1}
    else:
        pad, target_pad = original.get("src_pad_token_id", 0), original.get("tgt_pad_token_id", 0)
        if pad != target_pad:
            raise ValueError(f"src_pad_token_id={pad!r} and tgt_pad_token_id={target_pad!r} must be equal")
        own = {"connection_type": "scalar", "orthogonality_weight": 0.01}
    dropout = original.get("dropout", 0.1)
    try:
        return ConnectionTransformerConfig(
            **{ours: original[theirs] for theirs, ours in REQUIRED_KEYS[form].items()},
            **own,
            halting="update_norm",
            share_step_norm=False,
            inject_input=False,
            compression_norm="sum_without_mask",
            scale_embedding=False,
            dropout=dropout,
            attention_dropout=dropout,
            activation_dropout=dropout,
            label_smoothing=0.1,
            pad_token_id=pad,
            bos_token_id=original.get("bos_token_id"),
            eos_token_id=original.get("eos_token_id", 1),
            decoder_start_token_id=pad,
            tie_word_embeddings=False,
        )
    except StrictDataclassError as error:
        raise ValueError(" ".join(str(error).split())) from error


def model_class(config: ConnectionTransformerConfig) -> type[ConnectionTransformerPreTrainedModel]:
    """The class of the model that a translated configuration describes."""
    return (
        ConnectionTransformerForConditionalGeneration if config.is_encoder_decoder else ConnectionTransformerForMaskedLM
    )


def expected_tensors(config: ConnectionTransformerConfig) -> dict[str, list[str]]:
    """The original's tensor names, each with the names of ours that it is split into, in order, along dimension 0."""
    own = DECODER_NAMES if config.is_encoder_decoder else PER_PAIR_NAMES
    names = {theirs: [ours] for theirs, ours in (COMMON_NAMES | own).items()}
    for kind in ("weight", "bias"):
        for step in range(config.max_reasoning_steps):
            names[f"reasoning_norms.{step}.{kind}"] = [f"model.encoder.reasoning.step.layer_norms.{step}.{kind}"]
        for layer in range(config.num_decoder_layers if config.is_encoder_decoder else 0):
            theirs, ours = f"decoder.layers.{layer}", f"model.decoder.layers.{layer}"
            for their_module, our_module in LAYER_NAMES.items():
                names[f"{theirs}.{their_module}.{kind}"] = [f"{ours}.{our_module}.{kind}"]
            for their_attention, our_attention in ATTENTION_NAMES.items():
                names[f"{theirs}.{their_attention}.in_proj_{kind}"] = [
                    f"{ours}.{our_attention}.{projection}.{kind}" for projection in ("q_proj", "k_proj", "v_proj")
                ]
    return names


def convert_tensors(original: dict[str, torch.Tensor], config: ConnectionTransformerConfig) -> dict[str, torch.Tensor]:
    """
    Renames the original's tensors, splits its stacked query, key and value projections, packs its per-pair matrices.

    Args:
        original (`dict[str, torch.Tensor]`): The original's tensors, under its names or after `state_dict.`.
        config ([`ConnectionTransformerConfig`]): The translated configuration.

    Returns:
        `dict[str, torch.Tensor]`: the state dict of the model that `model_class` names.

    Raises:
        ValueError: a tensor is missing, unknown, of another shape than the configuration says, or not made of finite
            floating-point numbers.
    """
    if any(name.startswith(STATE_DICT_PREFIX) for name in original):
        original = {
            name.removeprefix(STATE_DICT_PREFIX): tensor
            for name, tensor in original.items()
            if name.startswith(STATE_DICT_PREFIX)
        }
    names = expected_tensors(config)
    missing, unknown = sorted(names.keys() - original.keys()), sorted(original.keys() - names.keys())
    problems = [
        f"{kind} tensor(s): {', '.join(found)}" for kind, found in (("missing", missing), ("unknown", unknown)) if found
    ]
    if problems:
        raise ValueError("; ".join(problems))
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in model_class(config)(config).state_dict().items()}
    pairs = {}
    if config.connection_type == "per_pair":
        pairs = {
            "W_source": [config.num_slots, config.num_slots, config.hidden_size, config.connection_rank],
            "W_target": [config.num_slots, config.num_slots, config.connection_rank, config.hidden_size],
        }
    converted = {}
    for theirs, ours in names.items():
        tensor = original[theirs]
        expected = pairs.get(theirs) or [sum(shapes[name][0] for name in ours), *shapes[ours[0]][1:]]
        if list(tensor.shape) != expected:
            raise ValueError(f"tensor {theirs} has shape {list(tensor.shape)}, the config says {expected}")
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise ValueError(f"tensor {theirs} must hold finite floating-point numbers")
        if theirs in pairs:
            continue
        for name, part in zip(ours, tensor.chunk(len(ours), dim=0), strict=True):
            converted[name] = part.clone()
    if pairs:
        packed = ConnectionTransformerPerPairConnections.pack(original["W_source"], original["W_target"])
        converted |= {names[theirs][0]: tensor for theirs, tensor in zip(pairs, packed, strict=True)}
    return converted


def make_model(
    original: dict[str, torch.Tensor], config: ConnectionTransformerConfig
) -> ConnectionTransformerPreTrainedModel:
    """The model with the original's weights; raises `ValueError` if they do not fit."""
    tensors = convert_tensors(original, config)
    model = model_class(config)(config)
    model.to(tensors["lm_head.weight"].dtype)
    model.load_state_dict(tensors)
    return model


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code, 0 or 2."""
    # The command is that of the installed package; all else here runs alone, as everything in this folder does.
    from hf_models.conversion import convert_command

    name = "hf_models.connection_transformer.convert_connection_transformer"
    description = "Convert a model of YeoJune/conn_trans into a from_pretrained folder."
    return convert_command(convert_config, make_model, name, description, arguments)


if __name__ == "__main__":
    sys.exit(main())
