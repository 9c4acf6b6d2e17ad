"""
Converts a model of the published Continuous Thought Machine into a folder that `from_pretrained` loads:

    python -m hf_models.continuous_thought_machine.convert_continuous_thought_machine CONFIG.json WEIGHTS OUT_DIR

CONFIG.json holds the published constructor's arguments (see `convert_config`). WEIGHTS is a safetensors file, a PyTorch
state dict or a training checkpoint of the published code, with its tensor names, as they are or after the prefix
`model.`; with the prefix, all other tensors of the file are ignored. OUT_DIR must not exist or be empty; it appears
whole or not at all. A mistake in the input is reported in one line, with exit code 2.
"""

import argparse
import re
import sys

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError

from .configuration_continuous_thought_machine import ContinuousThoughtMachineConfig
from .modeling_continuous_thought_machine import (
    ContinuousThoughtMachineForImageClassification,
    ContinuousThoughtMachineForTokenClassification,
    ContinuousThoughtMachineModel,
)

STATE_DICT_PREFIX = "model."

REQUIRED_KEYS = {
    "iterations",
    "d_model",
    "d_input",
    "heads",
    "n_synch_out",
    "n_synch_action",
    "synapse_depth",
    "memory_length",
    "deep_nlms",
    "memory_hidden_dims",
    "backbone_type",
    "positional_embedding_type",
    "out_dims",
}
# The rest of the published constructor, and `num_channels`, which the published code finds out from its first input.
OPTIONAL_KEYS = {
    "do_layernorm_nlm",
    "prediction_reshaper",
    "dropout",
    "dropout_nlm",
    "neuron_select_type",
    "n_random_pairing_self",
    "num_channels",
}

# Our names, as patterns, with the published ones. The first pattern that fits counts.
NAMES = [
    (r"start_state", "start_activated_state"),
    (r"start_trace", "start_trace"),
    (r"tick\.synchronisation\.decay", "decay_params_action"),
    (r"readout\.synchronisation\.decay", "decay_params_out"),
    (r"tick\.synchronisation\.(left|right)_indices", r"action_neuron_indices_\1"),
    (r"readout\.synchronisation\.(left|right)_indices", r"out_neuron_indices_\1"),
    (r"encoder\.projection\.(\w+)", r"kv_proj.0.\1"),
    (r"encoder\.norm\.(\w+)", r"kv_proj.1.\1"),
    (r"tick\.query_projection\.(\w+)", r"q_proj.\1"),
    (r"tick\.attention\.[qkv]_proj\.(\w+)", r"attention.in_proj_\1"),
    (r"tick\.attention\.out_proj\.(\w+)", r"attention.out_proj.\1"),
    (r"readout\.projection\.(\w+)", r"output_projector.0.\1"),
    (r"encoder\.backbone\.initial_rgb\.(\w+)", r"initial_rgb.\1"),
    (r"encoder\.backbone\.stem\.convolution\.(\w+)", r"backbone.conv1.\1"),
    (r"encoder\.backbone\.stem\.normalization\.(\w+)", r"backbone.bn1.\1"),
    (r"encoder\.backbone\.(layers|embedding)\.(.+)", r"backbone.\1.\2"),
    (r"encoder\.positional_embedding\.(.*)frequencies", r"positional_embedding.\1Wr.weight"),
    (r"encoder\.positional_embedding\.(.+)", r"positional_embedding.\1"),
    (r"tick\.synapse\.linear\.(\w+)", r"synapses.1.\1"),
    (r"tick\.synapse\.norm\.(\w+)", r"synapses.3.\1"),
    (r"tick\.synapse\.first_projection\.linear\.(\w+)", r"synapses.first_projection.0.\1"),
    (r"tick\.synapse\.first_projection\.norm\.(\w+)", r"synapses.first_projection.1.\1"),
    (r"tick\.synapse\.(down|up)_projections\.(\d+)\.linear\.(\w+)", r"synapses.\1_projections.\2.1.\3"),
    (r"tick\.synapse\.(down|up)_projections\.(\d+)\.norm\.(\w+)", r"synapses.\1_projections.\2.2.\3"),
    (r"tick\.synapse\.skip_norms\.(\d+)\.(\w+)", r"synapses.skip_lns.\1.\2"),
]
RESNET_LAYER = (
    r"encoder\.backbone\.encoder\.stages\.(\d+)\.layers\.(\d+)\."
    r"(layer\.(\d+)|shortcut)\.(convolution|normalization)\.(\w+)"
)
NEURON_LAYER = r"tick\.neuron_models\.layers\.(\d+)\.(weight|bias|temperature|norm\.\w+)"
NEURON_TENSORS = {"weight": "w1", "bias": "b1", "temperature": "T"}


def convert_config(original: dict) -> ContinuousThoughtMachineConfig:
    """
    Translates the published constructor's arguments.

    Args:
        original (`dict`):
            The arguments, or a dict that holds them under `config`. `do_layernorm_nlm`, `prediction_reshaper`,
            `dropout`, `dropout_nlm`, `neuron_select_type` and `n_random_pairing_self` have the published defaults.
            `num_channels` is 3 by default; the weights override it where they tell. A `task` of `"maze"` beside
            `config` turns the curriculum of routes on, with its `curriculum_lookahead` (default 5).

    Returns:
        [`ContinuousThoughtMachineConfig`].

    Raises:
        ValueError: a key is missing or unknown, or a value breaks a rule of the configuration.
    """
    task, lookahead = original.get("task"), original.get("curriculum_lookahead", 5)
    original = original.get("config", original)
    if not isinstance(original, dict):
        raise ValueError("key 'config' must hold an object")
    missing = sorted(REQUIRED_KEYS - original.keys())
    if missing:
        raise ValueError(f"missing key(s): {', '.join(missing)}")
    unknown = sorted(original.keys() - REQUIRED_KEYS - OPTIONAL_KEYS)
    if unknown:
        raise ValueError(f"unknown key(s): {', '.join(unknown)}")
    try:
        return ContinuousThoughtMachineConfig(
            **original, **({"curriculum_lookahead": lookahead} if task == "maze" else {})
        )
    except (StrictDataclassError, ValueError) as error:
        raise ValueError(" ".join(str(error).split())) from error


def published_name(name: str, config: ContinuousThoughtMachineConfig) -> str:
    """The published name of the tensor that `name` of [`ContinuousThoughtMachineModel`] comes from."""
    found = re.fullmatch(RESNET_LAYER, name)
    if found:
        stage, layer, _, number, kind, tensor = found.groups()
        is_convolution = kind == "convolution"
        if number is None:
            module = f"downsample.{0 if is_convolution else 1}"
        else:
            module = f"{'conv' if is_convolution else 'bn'}{int(number) + 1}"
        return f"backbone.layer{int(stage) + 1}.{layer}.{module}.{tensor}"
    found = re.fullmatch(NEURON_LAYER, name)
    if found:
        layer, tensor = found.groups()
        # A gate stands between the published layers.
        return f"trace_processor.0.{2 * int(layer)}.{NEURON_TENSORS.get(tensor, tensor.replace('norm', 'layernorm'))}"
    if config.positional_embedding_type == "custom-rotational":
        name = name.replace("positional_embedding.projection", "positional_embedding.projection.0")
    for pattern, replacement in NAMES:
        found = re.fullmatch(pattern, name)
        if found:
            return found.expand(replacement)
    raise KeyError(name)


def to_published_layout(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of ours with its dimensions in the published order: neuron-level weights are stored neurons last."""
    found = re.fullmatch(NEURON_LAYER, name)
    if found and found[2] == "weight":
        return tensor.permute(1, 2, 0)
    if found and found[2] == "bias":
        return tensor.permute(1, 0, 2)
    return tensor


def from_published_layout(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The inverse of `to_published_layout`."""
    found = re.fullmatch(NEURON_LAYER, name)
    if found and found[2] == "weight":
        return tensor.permute(2, 0, 1)
    if found and found[2] == "bias":
        return tensor.permute(1, 0, 2)
    return tensor


def published_tensors(config: ContinuousThoughtMachineConfig) -> dict[str, list[str]]:
    """The published names, each with the names of ours that it is split into, in order, along dimension 0."""
    with torch.device("meta"):
        own = ContinuousThoughtMachineModel(config).state_dict()
    names: dict[str, list[str]] = {}
    for name in own:
        names.setdefault(published_name(name, config), []).append(name)
    return names


def set_channels(config: ContinuousThoughtMachineConfig, original: dict[str, torch.Tensor]) -> None:
    """Sets `num_channels` as the weights say it; the published code finds it out from its first input."""
    for name in ("initial_rgb.weight", "backbone.layers.0.weight"):
        if name in original and original[name].ndim == 4:
            config.num_channels = original[name].shape[1]
    if config.backbone_type == "none" and "kv_proj.0.weight" in original and original["kv_proj.0.weight"].ndim == 2:
        config.num_channels = original["kv_proj.0.weight"].shape[1]


def without_prefix(original: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors after the prefix `model.`, or all of them if none has it."""
    named = {name: value for name, value in original.items() if name.startswith(STATE_DICT_PREFIX)}
    return {name.removeprefix(STATE_DICT_PREFIX): value for name, value in named.items()} or original


def convert_tensors(
    original: dict[str, torch.Tensor], config: ContinuousThoughtMachineConfig
) -> dict[str, torch.Tensor]:
    """
    Renames the published tensors, splits the packed projection of attention and puts neurons first.

    Args:
        original (`dict[str, torch.Tensor]`): The tensors, under their published names.
        config ([`ContinuousThoughtMachineConfig`]): The translated configuration.

    Returns:
        `dict[str, torch.Tensor]`: the state dict of [`ContinuousThoughtMachineModel`].

    Raises:
        ValueError: a tensor is missing, unknown, of another shape than the configuration says, not made of finite
            numbers, or an index of a neuron that does not exist.
    """
    names = published_tensors(config)
    missing, unknown = sorted(names.keys() - original.keys()), sorted(original.keys() - names.keys())
    problems = [
        f"{kind} tensor(s): {', '.join(found)}" for kind, found in (("missing", missing), ("unknown", unknown)) if found
    ]
    if problems:
        raise ValueError("; ".join(problems))
    with torch.device("meta"):
        own = ContinuousThoughtMachineModel(config).state_dict()
    converted = {}
    for theirs, ours in names.items():
        tensor = original[theirs]
        expected = list(to_published_layout(ours[0], own[ours[0]]).shape)
        if len(ours) > 1:
            expected[0] = sum(own[name].shape[0] for name in ours)
        if list(tensor.shape) != expected:
            raise ValueError(f"tensor {theirs} has shape {list(tensor.shape)}, the config says {expected}")
        if own[ours[0]].dtype == torch.long:
            if tensor.dtype != torch.long:
                raise ValueError(f"tensor {theirs} must hold 64-bit integers")
            if theirs.endswith(("_left", "_right")) and not (tensor.ge(0) & tensor.lt(config.d_model)).all():
                raise ValueError(f"tensor {theirs} must hold numbers of neurons in [0, d_model={config.d_model})")
        elif not tensor.is_floating_point() or not tensor.isfinite().all():
            raise ValueError(f"tensor {theirs} must hold finite floating-point numbers")
        parts = tensor.chunk(len(ours), dim=0) if len(ours) > 1 else [tensor]
        for name, part in zip(ours, parts, strict=True):
            converted[name] = from_published_layout(name, part).clone(memory_format=torch.contiguous_format)
    return converted


# What a training checkpoint of the published code holds besides tensors and plain Python values: its command line's
# arguments, and numbers and the generator's state from numpy. None of these runs code. Numpy 2 renamed the module of
# two functions; a checkpoint may come from either version.
RECONSTRUCT, SCALAR = np.empty(0).__reduce__()[0], np.float64(0).__reduce__()[0]
CHECKPOINT_TYPES = [
    argparse.Namespace,
    np.ndarray,
    np.dtype,
    np.dtypes.UInt32DType,
    np.dtypes.Float32DType,
    np.dtypes.Float64DType,
    *((RECONSTRUCT, f"numpy.{module}.multiarray._reconstruct") for module in ("core", "_core")),
    *((SCALAR, f"numpy.{module}.multiarray.scalar") for module in ("core", "_core")),
]


def make_model(
    original: dict[str, torch.Tensor], config: ContinuousThoughtMachineConfig
) -> ContinuousThoughtMachineForImageClassification | ContinuousThoughtMachineForTokenClassification:
    """
    The model with the published weights: an image classifier if an answer is one class, else a classifier of positions;
    raises `ValueError` if the weights do not fit.
    """
    original = without_prefix(original)
    set_channels(config, original)
    tensors = convert_tensors(original, config)
    head = (
        ContinuousThoughtMachineForImageClassification
        if len(config.prediction_shape) == 1
        else ContinuousThoughtMachineForTokenClassification
    )
    model = head(config)
    model.to(tensors["start_state"].dtype)
    model.model.load_state_dict(tensors)
    return model


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code, 0 or 2."""
    # The command is that of the installed package; all else here runs alone, as everything in this folder does.
    from hf_models.conversion import convert_command

    name = "hf_models.continuous_thought_machine.convert_continuous_thought_machine"
    description = "Convert a published Continuous Thought Machine into a from_pretrained folder."
    return convert_command(
        convert_config,
        make_model,
        name,
        description,
        arguments,
        "the published constructor's arguments",
        CHECKPOINT_TYPES,
    )


if __name__ == "__main__":
    sys.exit(main())
