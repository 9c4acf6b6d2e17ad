"""Which weights the gradient is taken over: target layers found by structure, by name, or all linear ones."""

import fnmatch
import re
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import UserError, did_you_mean

# Attention output projections have the same shape as an MLP's; only their place tells them apart.
_ATTENTION = re.compile(r"att(ention|n)", re.IGNORECASE)
_WRAPPERS = re.compile(r"^base_model\.model\.|\.base_layer$")
MAX_LISTED_LAYERS = 12


@dataclass(frozen=True)
class TargetLayer:
    """A weight tensor, with every module that uses it.

    Attributes:
        name: dotted name of the module that was selected, without the prefixes that an adapter library adds.
        modules: the modules that hold the weight: one, or several where weights are tied or a module is shared.
        rows, columns: shape of the weight as it is stored.
    """

    name: str
    modules: tuple[nn.Module, ...]
    rows: int
    columns: int

    @property
    def weight(self) -> nn.Parameter:
        return cast(nn.Parameter, self.modules[0].weight)

    @property
    def biases(self) -> list[nn.Parameter]:
        """The distinct bias tensors of the modules."""
        found = [getattr(module, "bias", None) for module in self.modules]
        return list({id(bias): cast(nn.Parameter, bias) for bias in found if isinstance(bias, torch.Tensor)}.values())


def find_layers(model: nn.Module, layers: str = "auto") -> list[TargetLayer]:
    """Select target layers, in the order in which the model defines them.

    Args:
        model: any model; one wrapped by `peft` gives the weights below the adapters.
        layers: `"auto"` for the output projection of every MLP, found by structure: the linear layer that leads back
            from the MLP's width to the hidden size, outside attention. `"last-4"` for the last four of those.
            `"all-linear"` for every linear layer but the output head. Otherwise name patterns, separated by commas,
            such as `"*.mlp.down_proj"` or `"model.layers.1?.self_attn.*"`.

    Raises:
        UserError: if nothing matches; the message lists candidates.
    """
    linear = {_clean(name): module for name, module in model.named_modules() if linear_shape(module) is not None}
    auto = [_clean(name) for name in _mlp_outputs(model)]
    last = re.fullmatch(r"last-(\d+)", layers)
    if layers == "auto":
        names = auto
    elif last:
        count = int(last.group(1))
        if not 1 <= count <= max(len(auto), 1):
            raise UserError(f"--layers {layers}: the model has {len(auto)} MLP output projections")
        names = auto[-count:]
    elif layers == "all-linear":
        getter = getattr(model, "get_output_embeddings", None)
        head = getter() if getter else None
        names = [name for name, module in linear.items() if module is not head]
    else:
        patterns = [pattern.strip() for pattern in layers.split(",") if pattern.strip()]
        selectable = linear | {
            _clean(name): module for name, module in model.named_modules() if isinstance(module, nn.Embedding)
        }
        for pattern in patterns:
            if not fnmatch.filter(selectable, pattern):
                hint = did_you_mean(pattern, [*selectable, "auto", "all-linear", "last-4"])
                raise UserError(f"--layers: no layer matches {pattern!r}{hint}; {_candidates(linear)}")
        names = [name for name in selectable if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
        linear = selectable
    if not names:
        raise UserError(f"--layers {layers}: found no target layer in {type(model).__name__}; {_candidates(linear)}")
    return _group_by_weight(model, {name: linear[name] for name in names})


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(inputs, outputs) of a linear layer in any of its forms, `None` for every other module.

    A layer that an adapter library has wrapped does not count, the one inside it does.
    """
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.weight.shape[1]
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    # Quantised layers of other libraries.
    is_linear = all(hasattr(module, name) for name in ("in_features", "out_features", "weight"))
    if is_linear and not hasattr(module, "base_layer"):
        return cast(int, module.in_features), cast(int, module.out_features)
    return None


def _mlp_outputs(model: nn.Module) -> list[str]:
    found = []
    for parent_name, parent in model.named_modules():
        if _ATTENTION.search(f"{parent_name} {type(parent).__name__}") or not re.search(r"\.\d+(\.|$)", parent_name):
            continue
        children = []
        for name, child in parent.named_children():
            inner = getattr(child, "base_layer", child)
            shape = linear_shape(inner)
            if shape is not None:
                suffix = ".base_layer" if inner is not child else ""
                children.append((f"{parent_name}.{name}{suffix}", *shape))
        # An up projection may hold a gate as well, and is then twice as wide.
        outputs = [
            name
            for name, inputs, outputs in children
            if any(other != name and i == outputs and o in (inputs, 2 * inputs) for other, i, o in children)
        ]
        if outputs:
            found.append(outputs[-1])
    return found


def _group_by_weight(model: nn.Module, selected: dict[str, nn.Module]) -> list[TargetLayer]:
    """One target for each distinct weight, with all modules of the model that use it."""
    users: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.Tensor) and (linear_shape(module) is not None or isinstance(module, nn.Embedding)):
            users.setdefault(id(weight), []).append(module)
    targets: dict[int, TargetLayer] = {}
    for name, module in selected.items():
        key = id(module.weight)
        if key not in targets:
            rows, columns = _stored_shape(module)
            targets[key] = TargetLayer(name, tuple(users[key]), rows, columns)
    return list(targets.values())


def _stored_shape(module: nn.Module) -> tuple[int, int]:
    if isinstance(module, (nn.Embedding, Conv1D)):
        return module.weight.shape[0], module.weight.shape[1]
    shape = linear_shape(module)
    assert shape is not None  # targets are linear layers or embeddings
    return shape[1], shape[0]


def _clean(name: str) -> str:
    return _WRAPPERS.sub("", _WRAPPERS.sub("", name))


def _candidates(linear: dict[str, nn.Module]) -> str:
    patterns = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in linear))
    if not patterns:
        return "the model has no linear layer"
    more = f" and {len(patterns) - MAX_LISTED_LAYERS} more" if len(patterns) > MAX_LISTED_LAYERS else ""
    return f"candidates: {', '.join(patterns[:MAX_LISTED_LAYERS])}{more}"
