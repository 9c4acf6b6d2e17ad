"""Queries, keys, values and masks of every attention call, taken where the library hands them to its kernel.

No fast kernel returns its weights, and `output_attentions=True` gives an empty tuple under it. But all models of
the library fetch their kernel from one place, the attention interface, and hand it queries and keys to which positions
and norms have been applied already, with the mask and scale to use. From these the weights follow exactly, whichever
kernel runs; whether they do is checked once for every module against the kernel's own result.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_utils import AttentionInterface

from .attention import RowGeometry, wide
from .structure import Structure

TOLERANCE = 1e-4


@dataclass
class AttentionCall:
    """One call of an attention kernel. Tensors are references to those of the forward pass, detached.

    Attributes:
        name: short name of the attention module.
        query (`torch.Tensor` of shape `(batch, heads, queries, head_dim)`).
        key, value (`torch.Tensor` of shape `(batch, key_heads, keys, head_dim)`): fewer heads where heads share them.
        mask: what the kernel got: `None`, additive or boolean of shape `(batch or 1, heads or 1, queries, keys)`, or
            boolean of shape `(batch, keys)`.
        kernel: the name of the implementation.
        options: scale, soft cap and the like.
        output (`torch.Tensor` of shape `(batch, queries, heads, head_dim)`): the kernel's result.
        repeat: calls the same kernel again on part of the batch, without dropout.
    """

    name: str
    module: nn.Module
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: Any
    kernel: str
    options: dict[str, Any]
    output: torch.Tensor
    function: Callable = field(repr=False)

    def visible(self, examples: int) -> torch.Tensor | None:
        """Keys each query may attend to, `(examples, queries, keys)`; `None` if the mask is of an unknown form."""
        queries, keys = self.query.shape[2], self.key.shape[2]
        device = self.query.device
        is_causal = self.options.get("is_causal")
        is_causal = getattr(self.module, "is_causal", False) if is_causal is None else is_causal
        visible = torch.ones(examples, queries, keys, dtype=torch.bool, device=device)
        flash = "flash" in self.kernel
        if self.mask is None or flash:
            if is_causal and queries > 1 and self.kernel != "eager":
                visible = visible.tril(keys - queries if flash else 0)
                window = self.options.get("sliding_window") if flash else None
                if window is not None:
                    visible = visible.triu(keys - queries - window + 1)
            if self.mask is None:
                return visible
        if not isinstance(self.mask, torch.Tensor):
            return None
        if self.mask.dim() == 2:
            return visible & self.mask[:examples, None, -keys:].bool() if flash else None
        if self.mask.dim() != 4 or self.mask.shape[-1] < keys or self.mask.shape[-2] not in (1, queries):
            return None
        mask = self.mask[:examples, :, :, :keys]
        seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        if seen.shape[1] > 1 and not bool((seen == seen[:, :1]).all()):
            return None
        return visible & seen[:, 0]

    def weights(self, examples: int, visible: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores before the softmax and weights before dropout, in single precision.

        Both are of shape `(examples, heads, queries, keys)`; hidden keys score -inf and weigh 0.
        """
        precise = torch.promote_types(self.query.dtype, torch.float32)
        query, key = self.query[:examples].to(precise), self._shared(self.key[:examples].to(precise))
        scaling = self.options.get("scaling")
        scores = torch.matmul(query, key.transpose(-1, -2))
        scores = scores * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        softcap = self.options.get("softcap")
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        position_bias = self.options.get("position_bias")
        if isinstance(position_bias, torch.Tensor):
            scores = scores + position_bias[:examples].to(precise)
        if isinstance(self.mask, torch.Tensor) and self.mask.dim() == 4 and self.mask.dtype != torch.bool:
            scores = scores + self.mask[:examples, :, :, : key.shape[2]].to(precise)
        scores = scores.masked_fill(~visible[:, None], -math.inf)
        # A row that sees nothing has no softmax; it counts nowhere.
        return scores, scores.softmax(-1).masked_fill(~visible[:, None], 0)

    def _shared(self, states: torch.Tensor) -> torch.Tensor:
        return states.repeat_interleave(self.query.shape[1] // states.shape[1], dim=1)

    def check(self, weights: torch.Tensor, used: torch.Tensor) -> str | None:
        """What is wrong with weights that do not give the kernel's own result on the rows that count, or `None`."""
        examples = len(weights)
        output = self.output[:examples]
        if self.options.get("dropout"):
            with torch.no_grad():
                options = self.options | {"dropout": 0.0}
                mask = self.mask[:examples] if isinstance(self.mask, torch.Tensor) else self.mask
                states = (states[:examples] for states in (self.query, self.key, self.value))
                output = self.function(self.module, *states, mask, **options)[0]
        expected = torch.matmul(weights, self._shared(self.value[:examples].to(weights.dtype))).transpose(1, 2)
        if output.shape != expected.shape:
            return f"its kernel returns {tuple(output.shape)}, not (batch, queries, heads, head_dim)"
        error = (output.to(weights.dtype) - expected)[used].abs()
        scale = expected[used].abs()
        if error.numel() == 0:
            return None
        worst, largest = torch.stack([error.max(), scale.max()]).tolist()
        tolerance = max(TOLERANCE, 8 * torch.finfo(self.output.dtype).eps) * max(1.0, largest)
        if math.isfinite(largest) and not worst <= tolerance:
            return f"weights x values differ from the kernel's result by {worst:.1e}"
        return None


def in_backward() -> bool:
    """Whether autograd is running: then a forward pass is the repetition of a checkpointed one."""
    return torch._C._current_graph_task_id() != -1


@contextmanager
def attention_tap(modules: Mapping[str, nn.Module], on_call: Callable[[AttentionCall], None]) -> Iterator[None]:
    """Calls `on_call` after every attention call of the given modules. Nothing the model computes changes.

    The interface's look-up is wrapped while the context is open; other models pass through untouched.
    """
    names = {id(module): name for name, module in modules.items()}
    original = AttentionInterface.get_interface

    def get_interface(interface, implementation, default):
        function = original(interface, implementation, default)

        def attend(module, query, key, value, attention_mask=None, *args, **kwargs):
            result = function(module, query, key, value, attention_mask, *args, **kwargs)
            name = names.get(id(module))
            if name is not None and not in_backward():
                with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
                    on_call(
                        AttentionCall(
                            name,
                            module,
                            query.detach(),
                            key.detach(),
                            value.detach(),
                            attention_mask,
                            implementation or "eager",
                            kwargs,
                            result[0].detach(),
                            function,
                        )
                    )
            return result

        return attend

    AttentionInterface.get_interface = get_interface  # type: ignore[method-assign]
    try:
        yield
    finally:
        AttentionInterface.get_interface = original  # type: ignore[method-assign]


class TokenMasks:
    """Which positions of the present batch are real tokens, and which tokens they are, for each side of a model.

    Attributes:
        masks (`dict[str, torch.Tensor]`): side ("source" or "target") -> 1 for real tokens, `(batch, length)`.
        tokens (`dict[str, torch.LongTensor]`): the same for token ids, where the model reads any.
        passes: number of forward passes seen.
    """

    def __init__(self, structure: Structure):
        model: PreTrainedModel = structure.model
        self.is_encoder_decoder = bool(model.config.is_encoder_decoder)
        self.masks: dict[str, torch.Tensor] = {}
        self.tokens: dict[str, torch.Tensor] = {}
        self.passes = 0
        self._index: dict[str, torch.Tensor] = {}
        self._labels: torch.Tensor | None = None
        self._model = model
        self._decoder = model.get_decoder() if self.is_encoder_decoder else None
        self._decoder_prefix = ""
        if self._decoder is not None:
            found = (name for name, module in model.named_modules() if module is self._decoder)
            self._decoder_prefix = structure.short(next(found)) + "."

    def hooks(self) -> list[Any]:
        """Registers what notes the inputs of the model and of its decoder. Returns the handles."""
        handles = [self._model.register_forward_pre_hook(self._enter_model, with_kwargs=True)]
        if self._decoder is not None:
            handles.append(self._decoder.register_forward_pre_hook(self._enter_decoder, with_kwargs=True))
        return handles

    def _enter_model(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if in_backward():
            return
        self.masks, self.tokens, self._index, self._labels = {}, {}, {}, kwargs.get("labels")
        self.passes += 1
        tokens = kwargs.get("input_ids", args[0] if args and isinstance(args[0], torch.Tensor) else None)
        self._note("source", tokens, kwargs.get("attention_mask"))

    def _enter_decoder(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if in_backward():
            return
        tokens = kwargs.get("input_ids", args[0] if args and isinstance(args[0], torch.Tensor) else None)
        mask = kwargs.get("attention_mask")
        labels = self._labels
        if tokens is not None and labels is not None and labels.shape == tokens.shape:
            # Padding at the end needs no mask under causal attention: only the labels tell it.
            real = labels.ne(-100)
            mask = real if mask is None else mask.bool() & real
        self._note("target", tokens, mask)

    def _note(self, side: str, tokens: torch.Tensor | None, mask: torch.Tensor | None) -> None:
        if tokens is not None and not tokens.is_floating_point() and tokens.dim() == 2:
            self.tokens[side] = tokens
        if mask is None and side in self.tokens:
            mask = torch.ones_like(self.tokens[side])
        if mask is not None and mask.dim() == 2:
            self.masks[side] = mask.bool()

    def side(self, name: str) -> str:
        """The side that a module works on."""
        return "target" if self.is_encoder_decoder and name.startswith(self._decoder_prefix) else "source"

    def is_cross(self, name: str) -> bool:
        """Whether an attention module looks from the target at the source."""
        return self.side(name) == "target" and any(word in name.lower() for word in ("cross", "encoder_attn", "encdec"))

    def mask_for(self, side: str, batch: int, length: int) -> torch.Tensor | None:
        """The mask of a side, if states of this shape are aligned with it."""
        mask = self.masks.get(side)
        return mask if mask is not None and tuple(mask.shape) == (batch, length) else None

    def real_rows(self, states: torch.Tensor, side: str) -> torch.Tensor | None:
        """Rows of real tokens in states `(batch, length, ...)` whose first two dimensions are flattened to one.

        `None` if all are real, or the masks are not those of these states.
        """
        mask = self.mask_for(side, *states.shape[:2])
        if mask is None:
            return None
        if side not in self._index:  # found once for all modules: it waits for the device
            self._index[side] = mask.flatten().nonzero()[:, 0]
        index = self._index[side]
        return None if len(index) == mask.numel() else index


class Geometries:
    """One [`RowGeometry`] for all calls of a forward pass that have the same masks."""

    def __init__(self, masks: TokenMasks):
        self.masks = masks
        self._kept: dict[tuple, tuple[Any, RowGeometry]] = {}
        self._pass = 0

    def of(self, call: AttentionCall, examples: int) -> RowGeometry | None:
        """The rows of a call that count, or `None` if its mask cannot be read."""
        if self._pass != self.masks.passes:
            self._kept, self._pass = {}, self.masks.passes
        side, is_cross = self.masks.side(call.name), self.masks.is_cross(call.name)
        shape = (call.query.shape[0], call.query.shape[2], call.key.shape[2])
        key = (id(call.mask), side, is_cross, shape, call.kernel, getattr(call.module, "is_causal", None))
        if key in self._kept:
            return self._kept[key][1]
        visible = call.visible(examples)
        if visible is None:
            return None
        batch, queries, keys = shape
        key_side = "source" if is_cross else side
        real_queries = self.masks.mask_for(side, batch, queries)
        real_keys = self.masks.mask_for(key_side, batch, keys)
        geometry = RowGeometry.of(
            visible,
            None if real_queries is None else real_queries[:examples],
            None if real_keys is None else real_keys[:examples],
            is_cross=is_cross,
            # Keys of cross-attention that are not the source's tokens (slots, image patches) have no order.
            has_positions=not is_cross or real_keys is not None,
        )
        self._kept[key] = (call.mask, geometry)  # the mask is kept, so that its id stays its own
        return geometry


class RunningSums:
    """Named sums, minima and maxima on the device, which move to the host in one piece.

    A group is a tensor of any shape; its elements are added up, or their minimum or maximum is taken.
    """

    def __init__(self) -> None:
        self.groups: dict[tuple[str, str], torch.Tensor] = {}

    def put(self, kind: str, name: str, values: torch.Tensor) -> None:
        """Merge values into a group. `kind` is "sum", "min" or "max"."""
        values = values.to(wide(values))
        known = self.groups.get((kind, name))
        self.groups[kind, name] = values if known is None else merge(kind, known, values)

    def moments(self, name: str, states: torch.Tensor, rows: torch.Tensor | None = None, zeros: bool = False) -> None:
        """Count, sum, sum of squares, minimum and maximum of states, for each group.

        Args:
            name: of the group of sums.
            states (`torch.Tensor` of shape `(tokens, groups, width)`).
            rows (`torch.LongTensor`, *optional*): tokens that count; all by default.
            zeros: count the elements that are exactly 0 too.
        """
        if states.shape[0] == 0 or (rows is not None and len(rows) == 0):
            return
        width = states.shape[2]
        states = states.to(torch.promote_types(states.dtype, torch.float32))
        double = wide(states)
        # Sums over a token are short and stay in single precision; those over tokens are taken in double. Padding is
        # left out after the first, which spares a copy of the states.
        # Two passes for the extremes: along one dimension they are ten times faster than `aminmax`.
        parts = [states.sum(-1), torch.linalg.vector_norm(states, dim=-1), states.amin(-1), states.amax(-1)]
        if zeros:
            parts.append(width - torch.count_nonzero(states, dim=-1))
        if rows is not None:
            parts = [part.index_select(0, rows) for part in parts]
        total, squares = parts[0].to(double).sum(0), parts[1].to(double).square().sum(0)
        count = torch.full_like(total, parts[0].shape[0] * width)
        none = parts[4].sum(0).to(double) if zeros else torch.zeros_like(total)
        self.put("sum", name, torch.stack([count, total, squares, none], dim=-1))
        self.put("min", name, parts[2].amin(0))
        self.put("max", name, parts[3].amax(0))

    def to_host(self) -> dict[tuple[str, str], Any]:
        """All groups as arrays, in the order in which they were first met, with a single transfer."""
        if not self.groups:
            return {}
        flat = torch.cat([values.flatten() for values in self.groups.values()]).cpu().numpy()
        result, start = {}, 0
        for key, values in self.groups.items():
            result[key] = flat[start : start + values.numel()].reshape(values.shape)
            start += values.numel()
        return result


def merge(kind: str, one: Any, other: Any) -> Any:
    """Two groups of the same name as one; NaN stays NaN."""
    if kind == "sum":
        return one + other
    if isinstance(one, torch.Tensor):
        return torch.minimum(one, other) if kind == "min" else torch.maximum(one, other)
    return np.minimum(one, other) if kind == "min" else np.maximum(one, other)
