"""Prompts of the function classes that differ from those of training (Garg et al. 2022, arXiv:2208.01066, section 4).

A prompt shows points with their values; at every place the value at a query is asked for, with the pairs before that
place as context.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from .function_classes import FunctionClass
from .streams import Streams

NOISE_STD = 1.0


class Prompts(NamedTuple):
    """A batch of B prompts with n places each.

    Attributes:
        points: `(B, n, d)`, the points of the context.
        values: `(B, n)` or `(B, n, outputs)`, the values that the context shows.
        queries: `(B, n, d)`, the point asked for at each place, or `None` where these are the points.
        targets: the right values at the queries, of the shape of `values`, without noise.
    """

    points: torch.Tensor
    values: torch.Tensor
    queries: torch.Tensor | None
    targets: torch.Tensor


Points = tuple[torch.Tensor, torch.Tensor | None]


def _scaled(factor: float) -> Callable[[torch.Tensor, Streams], Points]:
    def change(points: torch.Tensor, streams: Streams) -> Points:
        return factor * points, None

    return change


def _signs(points: torch.Tensor, streams: Streams) -> torch.Tensor:
    """The signs of a random quadrant for each prompt, `(B, 1, d)`."""
    return torch.from_numpy(streams.integers(2, 1, points.shape[2])).to(points.dtype) * 2 - 1


def _random_quadrant(points: torch.Tensor, streams: Streams) -> Points:
    return points.abs() * _signs(points, streams), points


def _opposite_quadrants(points: torch.Tensor, streams: Streams) -> Points:
    signs = _signs(points, streams)
    return points.abs() * signs, -points.abs() * signs


def _orthogonal(points: torch.Tensor, streams: Streams) -> Points:
    num_points, n_dims = points.shape[1:]
    points = points[:, : min(num_points, n_dims)]
    # Column i of Q is what point i has that is orthogonal to all points before it.
    queries = torch.linalg.qr(points.double().transpose(1, 2)).Q.transpose(1, 2) * math.sqrt(n_dims)
    return points, queries.to(points.dtype)


def _along_axes(weights: Callable[[int], torch.Tensor]) -> Callable[[torch.Tensor, Streams], Points]:
    def change(points: torch.Tensor, streams: Streams) -> Points:
        n_dims = points.shape[2]
        square = torch.from_numpy(streams.normal(n_dims, n_dims)).double()
        axes = torch.linalg.qr(square).Q.to(points.dtype)
        return points * weights(n_dims).to(points.dtype) @ axes.transpose(1, 2), None

    return change


def _half(n_dims: int) -> torch.Tensor:
    return (torch.arange(n_dims) < max(1, n_dims // 2)).double()


def _falling(n_dims: int) -> torch.Tensor:
    spread = 1 / torch.arange(1, n_dims + 1).double().square()
    return (spread * n_dims / spread.sum()).sqrt()


CHANGES: dict[str, tuple[Callable[[torch.Tensor, Streams], Points], str]] = {
    "standard": (_scaled(1.0), "as in training"),
    "scaled_x_0.5": (_scaled(0.5), "all points times 0.5"),
    "scaled_x_2": (_scaled(2.0), "all points times 2"),
    "scaled_x_3": (_scaled(3.0), "all points times 3"),
    "noisy_values": (_scaled(1.0), f"normal noise of standard deviation {NOISE_STD:g} on the values of the context"),
    "random_quadrant": (_random_quadrant, "the context from a random quadrant, the query from anywhere"),
    "opposite_quadrants": (_opposite_quadrants, "the context from a random quadrant, the query from the opposite one"),
    "orthogonal_query": (_orthogonal, "the query orthogonal to the context, of length sqrt(d)"),
    "half_subspace": (_along_axes(_half), "all points in a random subspace of d / 2 dimensions"),
    "skewed": (_along_axes(_falling), "variances that fall as 1 / i^2 along random axes, their sum d"),
}
"""Kinds of prompts: how points and queries come from standard normal points, and what that is in words."""


def make_prompts(task: FunctionClass, split: str, indices: Sequence[int], kind: str = "standard") -> Prompts:
    """The prompts with these indices, changed as `kind` says.

    Raises:
        KeyError: for an unknown kind; the known ones are the keys of [`CHANGES`].
    """
    change, _ = CHANGES[kind]
    points, queries = change(task.points(split, indices), task.streams(split, indices, f"prompts/{kind}"))
    if queries is None:
        targets, values = task.values_at(points, split, indices)
    else:
        right, shown = task.values_at(torch.cat((points, queries), dim=1), split, indices)
        targets, values = right[:, points.shape[1] :], shown[:, : points.shape[1]]
    if kind == "noisy_values":
        streams = task.streams(split, indices, "noise")
        values = values + NOISE_STD * torch.from_numpy(streams.normal(*values.shape[1:]))
    return Prompts(points, values, queries, targets)
