"""Attention written out from what a kernel was given, and shown only if it gives what the kernel returned."""

from dataclasses import dataclass

import torch

from ..tracking.capture import AttentionCall

# Largest deviation of two computations of the same thing, relative to the largest entry.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Recomputation:
    """Attention written out from the inputs of a call.

    Attributes:
        scores: `query · keyᵀ · scaling` before bias and mask, of shape `(batch_size, num_heads, query_length,
            key_length)`; `None` if the recomputation does not agree.
        bias: what is added to the scores of visible keys, if anything.
        visible: `True` where a query may look at a key; of the shape of the scores, `None` where they are.
        weights: rows that sum to 1, or to 0 without a visible key; the kernel's own where only it can give them.
        difference: largest deviation of `weights · value` from the kernel's output, relative to its largest entry.
        remark: why scores or weights are missing; empty if they are not.
    """

    scores: torch.Tensor | None
    bias: torch.Tensor | None
    visible: torch.Tensor | None
    weights: torch.Tensor | None
    difference: float
    remark: str = ""


def relative_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest absolute difference relative to the largest absolute entry of `expected`; infinite if NaN appears."""
    dtype = torch.promote_types(expected.dtype, torch.float32)
    found, expected = found.to(dtype), expected.to(dtype)
    if expected.numel() == 0:
        return 0.0
    scale = expected.abs().max().clamp_min(torch.finfo(dtype).tiny)
    difference = ((found - expected).abs().max() / scale).item()
    return float("inf") if difference != difference else difference


def agrees(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two computations of the same thing differ by no more than rounding in the type of `expected`."""
    return found.shape == expected.shape and relative_difference(found, expected) <= TOLERANCES[expected.dtype]


@torch.no_grad()
def recompute(call: AttentionCall) -> Recomputation:
    """Write an attention call out, and compare with what the model's kernel returned.

    `softmax(query · keyᵀ · scaling + bias + mask) · value` (Vaswani et al. 2017, equation 1), with the soft cap of the
    scores and the position bias that the library hands to its kernels. Any other change that a kernel makes, such as
    attention sinks, shows as a difference: then there are no scores, and weights only if the kernel itself returns some
    that give its output.
    """
    dtype = torch.promote_types(call.query.dtype, torch.float32)
    query, key, value = (tensor.to(dtype) for tensor in (call.query, call.key, call.value))
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    expected = call.output.transpose(1, 2)
    tolerance = TOLERANCES[call.output.dtype]

    scaling, softcap = call.options.get("scaling"), call.options.get("softcap")
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    difference, remark = float("inf"), f"the {call.kernel} kernel's mask has a form of its own"
    visible = call.visible(len(query))
    if visible is not None:
        visible = visible[:, None].expand(scores.shape)
        bias = added_bias(call, scores, visible)
        total = scores if bias is None else scores + bias
        # A row without a visible key has no attention.
        weights = total.masked_fill(~visible, float("-inf")).softmax(dim=-1).nan_to_num(0.0)
        difference = relative_difference(weights @ value, expected)
        if difference <= tolerance:
            return Recomputation(scores, bias, visible, weights, difference)
        remark = f"written out, weights · v differs from the kernel's output by {difference:.1e} of its largest entry"
    own = call.function(call.module, call.query, call.key, call.value, call.mask, **call.options)[1]
    if (
        own is not None
        and own.shape == scores.shape
        and relative_difference(own.to(dtype) @ value, expected) <= tolerance
    ):
        remark = f"the kernel's own; no scores are shown: {remark}"
        return Recomputation(None, None, None, own, difference, remark)
    return Recomputation(None, None, None, None, difference, remark)


def added_bias(call: AttentionCall, scores: torch.Tensor, visible: torch.Tensor) -> torch.Tensor | None:
    """What a call adds to the scores of visible keys, of the shape of the scores; `None` for nothing."""
    bias = torch.zeros_like(scores)
    position_bias = call.options.get("position_bias")
    if position_bias is not None:
        bias = bias + position_bias[..., : scores.shape[-1]]
    if isinstance(call.mask, torch.Tensor) and call.mask.is_floating_point() and call.mask.dim() == 4:
        bias = bias + call.mask[..., : scores.shape[-1]].to(bias.dtype)
    bias = bias.where(visible, 0)
    return bias if bias.any() else None
