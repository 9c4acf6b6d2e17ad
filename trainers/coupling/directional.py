"""How log-probabilities change along a movement of the weights, exactly, for every piece of a batch by itself.

For θ(t) = θ + t d let φ_j(t) = log P(a_j|q_j) at θ(t). Then φ_j'(t) = <d, ∇ log P(a_j|q_j)> and φ_j''(t) = dᵀ H_j d,
with H_j the Hessian of that log-probability. Each piece gets a t of its own, which multiplies what the movement adds to
the outputs of the layers that move: y = W x + t_j D x. One backward pass to the vector of all t_j gives all first
derivatives of a batch; another one through it (Pearlmutter 1994, Neural Computation 6) gives the second derivatives. No
gradient of a weight is formed.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.pytorch_utils import Conv1D

from .analyzer import CouplingAnalyzer, shortest_first
from .capture import Capture, RowsLostError, evaluation_mode, frozen
from .encoding import EncodedPiece


def derivatives_along(
    analyzer: CouplingAnalyzer,
    pieces: Sequence[EncodedPiece],
    parameters: Sequence[nn.Parameter],
    direction: Sequence[torch.Tensor],
    second: bool = False,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Derivatives of every piece's log-probability along a direction, at the model's present weights.

    Args:
        analyzer: holds the model; its choice of answer tokens and its batches are used.
        pieces: what is differentiated.
        parameters: weights and biases of linear layers and embeddings that move.
        direction: for each of them a tensor of its shape.
        second: also give the second derivatives. Attention is then computed in its plain form, since the fused ones
            can be differentiated once only.

    Returns:
        First derivatives in nats per unit of t, `(n,)`, and the second ones in nats per unit of t², or `None`.
    """
    moves = {id(parameter): part for parameter, part in zip(parameters, direction, strict=True)}
    found = np.zeros((2, len(pieces)))
    order, done = shortest_first(pieces), 0
    for batch in analyzer.batches(pieces):
        try:
            values = _of_batch(analyzer.capture, batch, moves, second)
        except RowsLostError:  # a layer that mixes the rows of a batch
            values = torch.cat([_of_batch(analyzer.capture, [piece], moves, second) for piece in batch], 1)
        found[:, order[done : done + len(batch)]] = values.double().cpu().numpy()
        done += len(batch)
    return found[0], found[1] if second else None


def _of_batch(
    capture: Capture, pieces: Sequence[EncodedPiece], moves: Mapping[int, torch.Tensor], second: bool
) -> torch.Tensor:
    """First and second derivatives, `(2, pieces)`; the latter zero if they are not asked for."""
    model = capture.model
    precise = any(part.dtype == torch.float64 for part in moves.values())
    dtype = torch.float64 if precise else torch.float32
    steps = torch.zeros(len(pieces), dtype=dtype, device=capture.device, requires_grad=True)
    attention = sdpa_kernel(SDPBackend.MATH) if second else nullcontext()
    with evaluation_mode(model), frozen(model), attention, _moving(capture, moves, steps), torch.enable_grad():
        log_probs = capture.log_probabilities_with_graph(pieces)
        (slopes,) = torch.autograd.grad(log_probs.sum(), steps, create_graph=second)
        curvatures = torch.zeros_like(slopes)
        if second and slopes.requires_grad:  # else the log-probabilities are linear in t
            (curvatures,) = torch.autograd.grad(slopes.sum(), steps)
    return torch.stack([slopes.detach(), curvatures])


@contextmanager
def _moving(capture: Capture, moves: Mapping[int, torch.Tensor], steps: torch.Tensor) -> Iterator[None]:
    """The outputs of every module that holds a moving weight or bias, as functions of the pieces' steps."""

    def add(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: torch.Tensor) -> torch.Tensor:
        entering = args[0] if args else next(iter(kwargs.values()))
        by_piece = capture.by_piece(type(module).__name__, output, len(steps))
        added = _added(module, entering, moves).reshape(by_piece.shape)
        return output + (steps.to(added.device)[:, None, None] * added).to(output.dtype).reshape(output.shape)

    handles = [
        module.register_forward_hook(add, with_kwargs=True)
        for module in capture.model.modules()
        if any(id(parameter) in moves for parameter in module.parameters(recurse=False))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _added(module: nn.Module, entering: torch.Tensor, moves: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """What a unit step adds to a module's output."""
    weight = moves.get(id(module.weight))
    bias = moves.get(id(getattr(module, "bias", None)))
    if weight is None:
        assert bias is not None  # one of the two moves
        return bias.expand(*entering.shape[:-1], len(bias))
    if isinstance(module, nn.Embedding):
        return F.embedding(entering, weight) * getattr(module, "embed_scale", 1.0)
    return F.linear(entering, weight.T if isinstance(module, Conv1D) else weight, bias)
