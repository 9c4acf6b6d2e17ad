"""Gradients and updates of every weight and layer, from a few calls and one transfer to the host."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from .structure import Structure

VANISHING = 1e-3
EXPLODING = 1e3
# A whole copy of the weights would cost more than all the rest: of large ones a part is kept.
SAMPLED_WEIGHTS = 16384


class WeightMeter:
    """Norms of weights, gradients and updates.

    Args:
        structure: the model's parts; its parameters are grouped by layer, the others by their module.
    """

    def __init__(self, structure: Structure):
        self.structure = structure
        self._before: dict[str, torch.Tensor] | None = None
        self._measured: dict[str, np.ndarray] = {}
        self._names: list[str] = []
        self._scale = 1.0

    def _parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.structure.model.named_parameters() if p.requires_grad}

    def measure_gradients(self, scale: float = 1.0) -> None:
        """Take the gradients as they stand.

        Args:
            scale: what the loss was multiplied with (loss scaling of fp16), if the gradients still are.
        """
        parameters = {name: p for name, p in self._parameters().items() if p.grad is not None}
        self._names, self._scale = list(parameters), scale
        if not parameters:
            self._measured = {}
            return
        gradients = [_local(p.grad) for p in parameters.values() if p.grad is not None]
        weights = [_local(p.detach()) for p in parameters.values()]
        norms = torch.stack([*_norms(gradients), *_norms(weights)]).to("cpu", torch.float64).numpy().reshape(2, -1)
        zeros = torch.stack([gradient.numel() - torch.count_nonzero(gradient) for gradient in gradients]).cpu()
        self._measured = {"gradient": norms[0] / scale, "weight": norms[1], "zeros": zeros.numpy()}
        bad = np.flatnonzero(~np.isfinite(norms[0]))
        self._measured["nonfinite"] = np.zeros(len(gradients), dtype=np.int64)
        for index in bad:
            self._measured["nonfinite"][index] = int((~torch.isfinite(gradients[index])).sum())

    def before_update(self) -> None:
        """Keep weights, so that [`after_update`] can tell how far they moved.

        Of a tensor with more than twice [`SAMPLED_WEIGHTS`] elements, evenly spaced ones are kept.
        """
        parameters = self._parameters()
        self._before = {name: _sample(parameters[name]).clone() for name in self._names}

    def after_update(self) -> None:
        """Measure how far the kept weights moved, relative to themselves."""
        if not self._before:
            return
        parameters = self._parameters()
        before = list(self._before.values())
        moved = [_sample(parameters[name]) - old for name, old in zip(self._before, before, strict=True)]
        norms = torch.stack([*_norms(moved), *_norms(before)]).to("cpu", torch.float64).numpy().reshape(2, -1)
        self._measured["update"] = norms
        self._before = None

    def report(self) -> dict[str, Any]:
        """What was measured, by weight and by layer; see [`gradient_flow`] for the layers.

        Returns:
            `parameters`: name -> `gradient`, `weight` (norms), `gradient_to_weight`, `update_to_weight` (see
            [`before_update`] for large tensors), `zeros`
            (elements whose gradient is exactly 0), `nonfinite` (elements that are NaN or infinite), `count`;
            `layers`, `slope` and `flags`: see [`gradient_flow`].
        """
        if not self._measured:
            return {"parameters": {}, "layers": {}, "slope": {}, "flags": []}
        sizes = {name: p.numel() for name, p in self._parameters().items()}
        updates = self._measured.get("update")
        parameters = {}
        for index, name in enumerate(self._names):
            gradient, weight = float(self._measured["gradient"][index]), float(self._measured["weight"][index])
            ratio = None
            if updates is not None and updates[1, index]:
                ratio = float(updates[0, index] / updates[1, index])
            parameters[self.structure.short(name)] = {
                "count": sizes[name],
                "gradient": gradient,
                "weight": weight,
                "gradient_to_weight": gradient / weight if weight else None,
                "update_to_weight": ratio,
                "zeros": int(self._measured["zeros"][index]),
                "nonfinite": int(self._measured["nonfinite"][index]),
            }
        return {"parameters": parameters} | gradient_flow(parameters, self.structure)


def gradient_flow(parameters: Mapping[str, Mapping[str, Any]], structure: Structure) -> dict[str, Any]:
    """Gradients by layer: g_l = sqrt(sum of squares over its weights), and rms_l = g_l / sqrt(number of weights).

    Args:
        parameters: name -> at least `gradient`, `count`; see [`WeightMeter.report`].
        structure: gives the layers.

    Returns:
        `layers`: name -> `norm`, `rms`, `weight`, `update_to_weight`, `zeros`, `nonfinite`, `count`, and in a stack
            `stack` and `index`; `slope`: stack -> slope of log g_l over depth, per layer (`None` below two layers);
        `flags`: one entry per layer whose rms is below 1e-3 of the median layer's ("vanishing") or above 1e3 of it
        ("exploding"), that has NaN or infinite gradients ("nonfinite"), or none but zeros ("zero").
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for name, entry in parameters.items():
        groups.setdefault(structure.layer_of(name) or name.rpartition(".")[0] or name, []).append(entry)
    layers: dict[str, dict[str, Any]] = {}
    for name, entries in groups.items():
        count = sum(entry["count"] for entry in entries)
        norm = math.sqrt(_square_sum(entry["gradient"] for entry in entries))
        weight = math.sqrt(_square_sum(entry["weight"] for entry in entries))
        # Weights that are all 0 (biases at the start) have no ratio and no share in the layer's.
        known = [e for e in entries if e.get("update_to_weight") is not None]
        moved = math.sqrt(_square_sum(e["update_to_weight"] * e["weight"] for e in known))
        layer = structure.layers.get(name)
        layers[name] = {
            "norm": norm,
            "rms": norm / math.sqrt(count),
            "weight": weight,
            "update_to_weight": moved / weight if known and weight else None,
            "zeros": sum(entry["zeros"] for entry in entries),
            "nonfinite": sum(entry["nonfinite"] for entry in entries),
            "count": count,
            "stack": None if layer is None else layer.stack,
            "index": None if layer is None else layer.index,
        }
    slope = {}
    for stack in structure.stacks():
        inside = [(entry["index"], entry["norm"]) for entry in layers.values() if entry["stack"] == stack]
        slope[stack] = log_slope(inside)
    return {"layers": layers, "slope": slope, "flags": gradient_flags(layers)}


def log_slope(points: Sequence[tuple[float, float]]) -> float | None:
    """Slope of log value over depth by least squares; `None` unless two values at least are positive and finite."""
    kept = [(depth, math.log(value)) for depth, value in points if value > 0 and math.isfinite(value)]
    if len({depth for depth, _ in kept}) < 2:
        return None
    return float(np.polyfit([depth for depth, _ in kept], [value for _, value in kept], 1)[0])


def gradient_flags(layers: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Layers whose gradients are out of proportion to the median layer's, not finite, or all zero."""
    finite = [entry["rms"] for entry in layers.values() if math.isfinite(entry["rms"])]
    median = float(np.median(finite)) if finite else 0.0
    flags = []
    for name, entry in layers.items():
        if entry["nonfinite"] or not math.isfinite(entry["rms"]):
            flags.append({"layer": name, "flag": "nonfinite", "elements": entry["nonfinite"]})
        elif entry["rms"] == 0:
            flags.append({"layer": name, "flag": "zero", "ratio_to_median": 0.0})
        elif median and entry["rms"] < VANISHING * median:
            flags.append({"layer": name, "flag": "vanishing", "ratio_to_median": entry["rms"] / median})
        elif median and entry["rms"] > EXPLODING * median:
            flags.append({"layer": name, "flag": "exploding", "ratio_to_median": entry["rms"] / median})
    return flags


def _square_sum(values: Any) -> float:
    return float(sum(value * value for value in values))


def _norms(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Norm of each tensor, in single precision at least: squares of half-precision numbers overflow."""
    precise = [t if t.dtype in (torch.float32, torch.float64) else t.float() for t in tensors]
    # Devices may differ where a model is spread over several.
    if len({t.device for t in precise}) > 1 or len({t.dtype for t in precise}) > 1:
        return [t.norm().to("cpu", torch.float64) for t in precise]
    return list(torch._foreach_norm(precise))


def _sample(parameter: torch.Tensor) -> torch.Tensor:
    """The weights, or evenly spaced ones of many. An odd step meets all columns of a matrix of even width."""
    flat = _local(parameter.detach()).flatten()
    return flat if flat.numel() <= 2 * SAMPLED_WEIGHTS else flat[:: (flat.numel() // SAMPLED_WEIGHTS) | 1]


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor that is spread over processes."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
