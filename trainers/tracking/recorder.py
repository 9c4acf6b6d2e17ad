"""Hooks for the forward and backward passes of one tracked step, and the numbers they leave."""

import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from .attention import attention_summary, attention_sums, divergence_sums, head_similarity, wide
from .capture import AttentionCall, Geometries, RunningSums, TokenMasks, attention_tap, in_backward
from .residual import LayerCalls, NotDecomposableError, contributions, decompose
from .structure import Structure

SIMILARITY_ROWS = 32
MAP_TOKENS = 64


@dataclass
class Wanted:
    """What a recorder takes.

    Attributes:
        names: modules to look at.
        stream: moments of queries, keys, values and module outputs.
        gradients: gradients at the layers' outputs.
        attention: attention statistics.
        residual: decomposition of the residual stream; wants a pass without dropout.
        maps: attention weights of the first example.
        examples: attention of at most so many examples of a batch; all if `None`.
        similarity_rows: compare heads on at most so many rows of a batch; all if `None`.
    """

    names: set[str]
    stream: bool = False
    gradients: bool = False
    attention: bool = False
    residual: bool = False
    maps: bool = False
    examples: int | None = None
    similarity_rows: int | None = SIMILARITY_ROWS


class Recorder:
    """Registers hooks when entered, and removes them when left. What they compute leaves the model's results alone.

    Args:
        structure: the model's parts.
        wanted: what to take.
        checked: module -> what is wrong with its reproduced attention, `None` if nothing. Modules that are not in it
            are checked, and put into it; weights of a module with something wrong are never shown.

    Attributes:
        sums: everything that adds up over batches and processes.
        maps (`dict[str, torch.Tensor]`): module -> weights of the first example, `(heads, queries, keys)`, padding cut.
        seconds: time spent in the hooks.
    """

    def __init__(self, structure: Structure, wanted: Wanted, checked: dict[str, str | None]):
        self.structure = structure
        self.wanted = wanted
        self.checked = checked
        self.sums = RunningSums()
        self.maps: dict[str, torch.Tensor] = {}
        self.calls: dict[str, LayerCalls] = {}
        self.tokens = TokenMasks(structure)
        self.seconds = 0.0
        self.called: set[str] = set()
        self._geometries = Geometries(self.tokens)
        self._open = ExitStack()

    def __enter__(self) -> "Recorder":
        attentions = {name: module for name, module in self.structure.attentions.items() if name in self.wanted.names}
        self._open.enter_context(attention_tap(attentions, self._timed(self._on_attention)))
        for handle in self.tokens.hooks():
            self._open.callback(handle.remove)
        wanted = self.wanted
        for layer in self.structure.layers.values():
            if wanted.residual:
                self._hook(layer.module, self._on_layer_residual, layer.name)
                for kind, modules in (("sublayer", layer.sublayers), ("norm", layer.norms)):
                    for key, module in modules.items():
                        self._hook(module, self._on_part, layer.name, kind, key)
            if layer.name in wanted.names and wanted.gradients:
                self._hook(layer.module, self._on_layer_gradient, layer.name)
            if wanted.stream:
                for key, module in layer.sublayers.items():
                    if f"{layer.name}.{key}" in wanted.names:
                        self._hook(module, self._on_output, f"{layer.name}.{key}", False)
                if layer.name in wanted.names:
                    self._hook(layer.module, self._on_output, layer.name, False)
        if wanted.stream:
            for name, module in self.structure.rectifiers.items():
                if name in wanted.names:
                    self._hook(module, self._on_output, name, True)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._open.close()

    def _hook(self, module: nn.Module, function: Callable, *context: Any) -> None:
        timed = self._timed(function)

        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            states = output[0] if isinstance(output, tuple | list) else output
            if isinstance(states, torch.Tensor):
                entering = next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)), None)
                timed(*context, module, entering, states)

        self._open.callback(module.register_forward_hook(hook, with_kwargs=True).remove)

    def _timed(self, function: Callable) -> Callable:
        def timed(*arguments: Any) -> None:
            started = time.perf_counter()
            function(*arguments)
            self.seconds += time.perf_counter() - started

        return timed

    @torch.no_grad()
    def _on_output(self, name: str, zeros: bool, module: nn.Module, entering: Any, states: torch.Tensor) -> None:
        if in_backward() or states.dim() != 3 or not states.is_floating_point():
            return
        with torch.autocast(states.device.type, enabled=False):
            rows = self.tokens.real_rows(states, self.tokens.side(name))
            self.sums.moments(name, states.detach().flatten(0, 1)[:, None], rows, zeros)

    def _on_layer_gradient(self, name: str, module: nn.Module, entering: Any, states: torch.Tensor) -> None:
        # On the repetition of a checkpointed pass too: with reentrant checkpoints only that one has a graph, with the
        # other kind its graph is never used.
        if not states.requires_grad:
            return
        width = states.shape[-1]
        tokens = self.tokens.mask_for(self.tokens.side(name), *states.shape[:2]) if states.dim() == 3 else None
        count = states.new_tensor(states.numel() / width, dtype=torch.float32) if tokens is None else tokens.sum()

        def keep(gradient: torch.Tensor) -> None:
            started = time.perf_counter()
            with torch.no_grad(), torch.autocast(gradient.device.type, enabled=False):
                rows = gradient.detach().flatten(0, -2)
                rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
                squares = torch.linalg.vector_norm(rows, dim=-1).to(wide(rows)).square().sum()
                self.sums.put("sum", f"{name}.gradient", torch.stack([squares, count.to(squares) * width]))
            self.seconds += time.perf_counter() - started

        states.register_hook(keep)

    def _on_layer_residual(self, name: str, module: nn.Module, entering: Any, states: torch.Tensor) -> None:
        call = self._layer_calls(name)
        call.entered, call.left = (None if entering is None else entering.detach()), states.detach()

    def _on_part(self, name: str, kind: str, key: str, module: nn.Module, entering: Any, states: torch.Tensor) -> None:
        if entering is not None:
            event = (kind, key, module, entering.detach(), states.detach())
            self._layer_calls(name).events.append(event)

    def _layer_calls(self, name: str) -> LayerCalls:
        if name not in self.calls:
            self.calls[name] = LayerCalls(self.structure.layers[name])
        return self.calls[name]

    def _on_attention(self, call: AttentionCall) -> None:
        self.called.add(call.name)
        if self.wanted.stream:
            is_cross = self.tokens.is_cross(call.name)
            side = self.tokens.side(call.name)
            for what, states in (("query", call.query), ("key", call.key), ("value", call.value)):
                states_side = "source" if is_cross and what != "query" else side
                states = states.transpose(1, 2)
                rows = self.tokens.real_rows(states, states_side)
                self.sums.moments(f"{call.name}.{what}", states.flatten(0, 1), rows)
        if self.wanted.attention and self.checked.get(call.name) is None:
            self._take_attention(call)

    def _take_attention(self, call: AttentionCall) -> None:
        batch = call.query.shape[0]
        examples = batch if self.wanted.examples is None else min(batch, self.wanted.examples)
        geometry = self._geometries.of(call, examples)
        if geometry is None:
            self.checked[call.name] = "its mask is of a form that cannot be read"
            return
        scores, weights = call.weights(examples, geometry.visible)
        if call.name not in self.checked:
            self.checked[call.name] = call.check(weights, geometry.used)
            if self.checked[call.name] is not None:
                return
        self.sums.put("sum", f"{call.name}.attention", attention_sums(weights, geometry))
        rows = self.wanted.similarity_rows
        self.sums.put("sum", f"{call.name}.divergence", divergence_sums(weights, geometry.used, rows))
        counted = (geometry.visible & geometry.used[..., None])[:, None]
        seen = scores.masked_fill(~counted, 0).to(wide(scores))
        count = counted.sum().to(seen).expand(scores.shape[1])
        totals = torch.stack([count, seen.sum((0, 2, 3)), seen.square().sum((0, 2, 3))], dim=-1)
        self.sums.put("sum", f"{call.name}.scores", totals)
        self.sums.put("max", f"{call.name}.scores", scores.masked_fill(~counted, -math.inf).amax((0, 2, 3)))
        if self.wanted.maps:
            self.maps[call.name] = self._first_example(call, weights)

    def _first_example(self, call: AttentionCall, weights: torch.Tensor) -> torch.Tensor:
        side, is_cross = self.tokens.side(call.name), self.tokens.is_cross(call.name)
        first = weights[0]
        for axis, part in ((1, side), (2, "source" if is_cross else side)):
            mask = self.tokens.mask_for(part, call.query.shape[0], first.shape[axis])
            if mask is not None:
                first = first.index_select(axis, mask[0].nonzero()[:, 0])
        return first[:, :MAP_TOKENS, :MAP_TOKENS].contiguous()

    def sides(self, name: str) -> list[str]:
        """The sides that an attention module's queries and keys are of: "source" or "target", or "" for other keys."""
        side = self.tokens.side(name)
        if not self.tokens.is_cross(name):
            return [side, side]
        source = self.tokens.masks.get("source")
        aligned = (
            source is not None
            and name in self.maps
            and self.maps[name].shape[-1] == min(MAP_TOKENS, int(source[0].sum()))
        )
        return [side, "source" if aligned else ""]

    def residual(self) -> dict[str, Any]:
        """The decomposition of every stack that was called; a stack that cannot be taken apart says why."""
        result: dict[str, Any] = {}
        for stack, layers in self.structure.stacks().items():
            calls = [self.calls[layer.name] for layer in layers if layer.name in self.calls]
            if len(calls) < len(layers):
                continue
            try:
                found = decompose(calls)
            except NotDecomposableError as error:
                result[stack] = {"error": None, "components": {}, "problem": str(error)}
                continue
            real = self.tokens.mask_for(self.tokens.side(layers[0].name), *found.final.shape[:2])
            result[stack] = contributions(found, real) | {"problem": None}
        return result


def summarise(
    host: dict[tuple[str, str], np.ndarray], structure: Structure, gradient_scale: float = 1.0
) -> dict[str, Any]:
    """The numbers of one tracked step from its merged sums.

    Args:
        host: as [`RunningSums.to_host`] gives it.
        structure: the model's parts.
        gradient_scale: what gradients at layer outputs are to be divided by.

    Returns:
        `attention`: module -> see [`attention_summary`], with `similarity` (heads x heads) and `scores` (`mean`, `std`,
        `max` per head, before the softmax); `states`: module -> `query`, `key`, `value` -> moments per head;
        `activations`: module -> moments of its output; `activation_gradients`: layer -> `norm` and `rms` of dL/dh;
        `nonfinite`: modules with NaN or infinity, in the order of the forward pass.
    """
    attention: dict[str, Any] = {}
    states: dict[str, dict[str, Any]] = {}
    activations: dict[str, Any] = {}
    gradients: dict[str, Any] = {}
    for (kind, name), values in host.items():
        if kind != "sum":
            continue
        module, _, part = name.rpartition(".")
        if part == "attention" and module in structure.attentions:
            attention[module] = attention_summary(values)
            attention[module]["similarity"] = head_similarity(host["sum", f"{module}.divergence"])
            attention[module]["scores"] = _score_moments(host, f"{module}.scores")
        elif part in ("query", "key", "value") and module in structure.attentions:
            states.setdefault(module, {})[part] = _moments(host, name, per_group=True)
        elif part == "gradient" and module in structure.layers:
            norm = math.sqrt(values[0]) / gradient_scale if values[0] >= 0 else math.nan
            gradients[module] = {"norm": norm, "rms": norm / math.sqrt(values[1]) if values[1] else None}
        elif name in structure.layers or name in structure.rectifiers or part not in ("divergence", "scores"):
            activations[name] = _moments(host, name, per_group=False)
            if name in structure.rectifiers:
                activations[name]["zero_share"] = float(values[0, 3] / values[0, 0])
    return {
        "attention": attention,
        "states": states,
        "activations": activations,
        "activation_gradients": gradients,
        "nonfinite": _nonfinite(host, structure),
    }


def _moments(host: dict[tuple[str, str], np.ndarray], name: str, per_group: bool) -> dict[str, Any]:
    count, total, squares, _ = host["sum", name].T
    with np.errstate(invalid="ignore", divide="ignore"):
        variance = np.maximum(squares - total**2 / count, 0) / np.maximum(count - 1, 1)
        found = {
            "mean": total / count,
            "std": np.sqrt(variance),
            "min": host["min", name],
            "max": host["max", name],
            "rms": np.sqrt(squares / count),
        }
    if per_group:
        return {key: values.tolist() for key, values in found.items()}
    return {key: float(values[0]) for key, values in found.items()}


def _score_moments(host: dict[tuple[str, str], np.ndarray], name: str) -> dict[str, Any]:
    count, total, squares = host["sum", name].T
    if not count[0]:
        return {"mean": None, "std": None, "max": None}
    with np.errstate(invalid="ignore"):
        variance = np.maximum(squares - total**2 / count, 0) / np.maximum(count - 1, 1)
        return {
            "mean": (total / count).tolist(),
            "std": np.sqrt(variance).tolist(),
            "max": host["max", name].tolist(),
        }


def _nonfinite(host: dict[tuple[str, str], np.ndarray], structure: Structure) -> list[dict[str, str]]:
    found = []
    for (kind, name), values in host.items():
        if kind != "sum" or np.isfinite(values).all():
            continue
        extremes = np.concatenate([host[other, name] for other in ("min", "max") if (other, name) in host] or [values])
        if np.isfinite(extremes).all():
            continue  # a sum of squares that left the range; every number is finite
        module, _, part = name.rpartition(".")
        parts = ("query", "key", "value", "attention", "scores", "divergence", "gradient")
        known = part in parts and (module in structure.attentions or module in structure.layers)
        if part in ("divergence", "scores") and known:
            continue  # said by the attention weights already
        found.append(
            {
                "module": module if known else name,
                "what": part if known else "output",
                "kind": "NaN" if np.isnan(extremes).any() else "infinity",
            }
        )
    return found
