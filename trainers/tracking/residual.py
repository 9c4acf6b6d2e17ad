"""What every sublayer adds to the residual stream, exactly, for layers that normalise before or after their sublayers.

Before (pre-norm): the last state is r_0 plus all sublayers' outputs. After (post-norm): each norm turns r + x into
g * (r + x - mean) / s + b. With s frozen at its value for this very input, the map is linear up to b: every earlier
component is centred, divided by s and multiplied by g, and b becomes a component of its own. Either way the components
add up to the last state, which is checked.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import torch
from torch import nn

from .structure import Layer

# Relative to the largest state; a layer of another form is off by a large part of it.
TOLERANCE = 1e-4
_MOST_SUBLAYERS = 8


@dataclass
class LayerCalls:
    """What happened in one layer: `events` are (kind, key, module, input, output) in order."""

    layer: Layer
    entered: torch.Tensor | None = None
    left: torch.Tensor | None = None
    events: list[tuple[str, str, nn.Module, torch.Tensor, torch.Tensor]] = field(default_factory=list)


@dataclass
class Decomposition:
    """The last state of a stack as a sum.

    Attributes:
        names: of the components: "input", then "<layer>.<sublayer>" and "<layer>.<norm>.bias" in order.
        components (`torch.Tensor` of shape `(components, batch, length, hidden)`).
        final (`torch.Tensor` of shape `(batch, length, hidden)`): the last layer's output, equal to their sum.
        writes: "<layer>.<sublayer>" -> the sublayer's output and the stream before it, as they were computed.
    """

    names: list[str]
    components: torch.Tensor
    final: torch.Tensor
    writes: dict[str, tuple[torch.Tensor, torch.Tensor]]

    def error(self) -> float:
        """Largest difference between the sum and the last state, relative to the largest state."""
        return _relative_error(self.components.sum(0), self.final)


class NotDecomposableError(ValueError):
    """A layer's residual stream does not add up from its sublayers."""


def decompose(calls: Sequence[LayerCalls]) -> Decomposition:
    """Components of a stack's last state.

    Args:
        calls: what was recorded in each layer, in order, without dropout.

    Raises:
        NotDecomposableError: naming the layer that is neither pre- nor post-norm, or that changes the stream's shape.
    """
    first = calls[0].entered
    if first is None:
        raise NotDecomposableError(f"{calls[0].layer.name} was not called")
    names, components = ["input"], [first.double() if _precise(first) else first.float()]
    writes: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for call in calls:
        name, entered, left = call.layer.name, call.entered, call.left
        if entered is None or left is None or entered.shape != left.shape:
            raise NotDecomposableError(f"{name} does not return states of the shape it takes")
        entered, left = entered.to(components[0].dtype), left.to(components[0].dtype)
        sublayers = [(key, output.to(entered.dtype)) for kind, key, _, _, output in call.events if kind == "sublayer"]
        chosen = _pre_norm(entered, left, sublayers)
        if chosen is not None:
            before = entered
            for key, output in chosen:
                names.append(f"{name}.{key}")
                components.append(output)
                writes[f"{name}.{key}"] = (output, before)
                before = before + output
            continue
        if not _post_norm(call, entered, left, names, components, writes):
            raise NotDecomposableError(f"the residual stream of {name} does not add up from its sublayers")
    return Decomposition(names, torch.stack(components), calls[-1].left.to(components[0].dtype), writes)  # type: ignore[union-attr]


def _pre_norm(entered, left, sublayers) -> list[tuple[str, torch.Tensor]] | None:
    """The sublayers whose outputs lead from one state to the next; inner ones, such as a first linear map, do not."""
    fitting = [(key, output) for key, output in sublayers if output.shape == entered.shape][:_MOST_SUBLAYERS]
    for size in range(len(fitting), 0, -1):
        for chosen in combinations(fitting, size):
            if _relative_error(entered + sum(output for _, output in chosen), left) < TOLERANCE:
                return list(chosen)
    return None


def _post_norm(call: LayerCalls, entered, left, names, components, writes) -> bool:
    state, pending = entered, []
    made_names, made = list(names), list(components)
    made_writes = {}
    for kind, key, module, taken, output in call.events:
        taken, output = taken.to(entered.dtype), output.to(entered.dtype)
        if kind == "sublayer":
            pending.append((key, output))
            continue
        if taken.shape != state.shape:
            return False
        chosen = _pre_norm(state, taken, pending)
        if chosen is None:
            return False
        pending = []
        for sublayer, written in chosen:
            made_names.append(f"{call.layer.name}.{sublayer}")
            made.append(written)
            made_writes[made_names[-1]] = (written, state)
        frozen = FrozenNorm(module, taken)
        made = [frozen.linear(component) for component in made]
        if frozen.bias is not None:
            made_names.append(f"{call.layer.name}.{key}.bias")
            made.append(frozen.bias.to(state.dtype).expand_as(state))
        if _relative_error(frozen(taken), output) >= TOLERANCE:
            return False
        state = output
    if pending or _relative_error(state, left) >= TOLERANCE:
        return False
    names[:], components[:] = made_names, made
    writes.update(made_writes)
    return True


class FrozenNorm:
    """A LayerNorm or RMSNorm with its divisor held at the value it has for one input: then it is linear up to a bias.

    Args:
        norm: the module; an RMSNorm is one whose class says so, and does not centre.
        states (`torch.Tensor` of shape `(..., hidden)`): the input.
    """

    def __init__(self, norm: nn.Module, states: torch.Tensor):
        self.centres = "rms" not in type(norm).__name__.lower()
        eps = getattr(norm, "eps", None) or getattr(norm, "variance_epsilon", None) or 0.0
        weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
        self.weight = None if weight is None else weight.detach().to(states.dtype)
        self.bias = None if bias is None else bias.detach().to(states.dtype)
        self.scale = (self._centred(states).square().mean(-1, keepdim=True) + eps).sqrt()

    def _centred(self, states: torch.Tensor) -> torch.Tensor:
        return states - states.mean(-1, keepdim=True) if self.centres else states

    def linear(self, states: torch.Tensor) -> torch.Tensor:
        """The norm's linear part, of shape `(..., hidden)`."""
        states = self._centred(states) / self.scale
        return states if self.weight is None else states * self.weight

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        states = self.linear(states)
        return states if self.bias is None else states + self.bias


def direct_logit_attribution(
    decomposition: Decomposition, unembedding: torch.Tensor, final_norm: nn.Module | None = None
) -> tuple[list[str], torch.Tensor]:
    """How much each component of the last state adds to logits, or to a difference of logits.

    Args:
        decomposition: of the stack that the head reads.
        unembedding (`torch.Tensor` of shape `(hidden,)`): a row of the head's weight, or the difference of two rows.
        final_norm: the norm between the last layer and the head, if there is one; its divisor is frozen.

    Returns:
        Names (one more, "final_norm.bias", where that norm has a bias), and a tensor of shape
        `(components, batch, length)` that sums over components to `head(final_norm(state)) @ unembedding`.
    """
    names, components = list(decomposition.names), decomposition.components
    if final_norm is not None and not isinstance(final_norm, nn.Identity):
        frozen = FrozenNorm(final_norm, decomposition.final)
        components = frozen.linear(components)
        if frozen.bias is not None:
            names.append("final_norm.bias")
            components = torch.cat([components, frozen.bias.expand_as(components[:1])])
    return names, components @ unembedding.detach().to(components.dtype)


def contributions(decomposition: Decomposition, real: torch.Tensor | None = None) -> dict[str, Any]:
    """Numbers of a decomposition, averaged over real tokens.

    Args:
        decomposition: of one stack.
        real (`torch.Tensor` of shape `(batch, length)`, *optional*): 0 on padding.

    Returns:
        `error` (see [`Decomposition.error`]) and `components`: name -> `signed_share` (<x, r_L> / |r_L|², sums to 1),
        `norm_share` (|x| / sum of all |x|), and for sublayers `relative_write` (|x| / |r before|) and `cosine` (x with
        r before; negative erases).
    """
    final = decomposition.final
    rows = torch.ones(final.shape[:2], dtype=torch.bool, device=final.device) if real is None else real.bool()
    final, parts = final[rows], decomposition.components[:, rows]
    signed = (parts * final).sum(-1) / final.square().sum(-1)
    norms = parts.norm(dim=-1)
    shares = torch.stack([signed, norms / norms.sum(0)]).mean(-1).tolist()
    result: dict[str, Any] = {
        name: {"signed_share": shares[0][index], "norm_share": shares[1][index]}
        for index, name in enumerate(decomposition.names)
    }
    for name, (written, before) in decomposition.writes.items():
        written, before = written[rows], before[rows]
        relative = (written.norm(dim=-1) / before.norm(dim=-1)).mean()
        cosine = nn.functional.cosine_similarity(written, before, dim=-1).mean()
        result[name]["relative_write"], result[name]["cosine"] = torch.stack([relative, cosine]).tolist()
    return {"error": decomposition.error(), "components": result}


def _precise(states: torch.Tensor) -> bool:
    return states.dtype == torch.float64


def _relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12)).item()
