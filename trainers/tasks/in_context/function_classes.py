"""The function classes of in-context learning (Garg et al. 2022, arXiv:2208.01066).

A prompt is a function drawn from a class and points drawn from a normal distribution; the model predicts the value at
every point from the points before it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from huggingface_hub.dataclasses import strict

from ...errors import UserError
from .base import InContextTask
from .streams import Streams


@strict
@dataclass(kw_only=True)
class FunctionClassOptions:
    """Options that all function classes have."""

    n_dims: int = field(default=20, metadata={"help": "Coordinates of a point x."})
    n_points: int = field(default=41, metadata={"help": "Points in a prompt."})
    scale: float | int = field(default=1.0, metadata={"help": "Factor of every value."})

    def validate_ranges(self) -> None:
        for name in ("n_dims", "n_points"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")


@strict
@dataclass(kw_only=True)
class SparseOptions(FunctionClassOptions):
    """Options of sparse linear functions."""

    sparsity: int = field(default=3, metadata={"help": "Coordinates that count."})

    def validate_sparsity(self) -> None:
        if not 1 <= self.sparsity <= self.n_dims:
            raise ValueError(f"sparsity is {self.sparsity}; it must lie in [1, n_dims={self.n_dims}]")


@strict
@dataclass(kw_only=True)
class NoisyOptions(FunctionClassOptions):
    """Options of linear functions with noise."""

    noise_std: float | int = field(default=1.0, metadata={"help": "Standard deviation of the noise of every value."})
    renormalize: bool = field(
        default=False,
        metadata={"help": "Divide values by sqrt(1 + noise_std^2 / n_dims), so that their variance is n_dims again."},
    )

    def validate_noise(self) -> None:
        if not self.noise_std >= 0:
            raise ValueError(f"noise_std is {self.noise_std}; it must be at least 0")


@strict
@dataclass(kw_only=True)
class NetworkOptions(FunctionClassOptions):
    """Options of two-layer networks."""

    hidden_size: int = field(default=100, metadata={"help": "Hidden units of the network."})

    def validate_hidden_size(self) -> None:
        if self.hidden_size < 1:
            raise ValueError(f"hidden_size is {self.hidden_size}; it must be at least 1")


@strict
@dataclass(kw_only=True)
class TreeOptions(FunctionClassOptions):
    """Options of decision trees."""

    depth: int = field(default=4, metadata={"help": "Decisions on the way from the root to a leaf."})

    def validate_depth(self) -> None:
        if not 1 <= self.depth <= 16:
            raise ValueError(f"depth is {self.depth}; it must lie in [1, 16]")


@strict
@dataclass(kw_only=True)
class ChainOptions(FunctionClassOptions):
    """Options of matrix chains."""

    num_matrices: int = field(default=2, metadata={"help": "Matrices that a point is multiplied with in turn."})

    def validate_num_matrices(self) -> None:
        if self.num_matrices < 1:
            raise ValueError(f"num_matrices is {self.num_matrices}; it must be at least 1")


class FunctionClass(InContextTask):
    """A class of functions from R^d to R.

    A subclass draws functions and evaluates them. Every number of a prompt comes from the prompt's own streams, so that
    it depends on nothing but seed, split and index.
    """

    metric: ClassVar[str] = "error"
    options_class = FunctionClassOptions
    curriculum_variables = ("n_points", "n_dims")
    objective: ClassVar[str] = "squared_error"
    """The loss a model is trained with: the `objective` of its configuration."""

    @property
    def n_outputs(self) -> int:
        """Coordinates of a value."""
        return 1

    def values(self, points: torch.Tensor, streams: Streams) -> torch.Tensor:
        """Values of a function of each prompt at its points, before `scale`.

        Args:
            points: `(B, n_points, n_dims)`.
            streams: from which the functions are drawn.

        Returns:
            `(B, n_points)`, or `(B, n_points, n_outputs)` for several outputs.
        """
        raise NotImplementedError

    def observe(self, values: torch.Tensor, streams: Streams) -> tuple[torch.Tensor, torch.Tensor]:
        """The values that are right and those that a prompt shows, of the same shape; here the same."""
        return values, values

    def points(self, split: str, indices: Sequence[int]) -> torch.Tensor:
        """The points of these prompts: standard normal, of shape `(B, n_points, n_dims)`."""
        streams = self.streams(split, indices, "points")
        return torch.from_numpy(streams.normal(self.options.n_points, self.options.n_dims))

    def values_at(self, points: torch.Tensor, split: str, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """The right and the shown values of the functions with these indices, at points `(B, any number, n_dims)`."""
        streams = self.streams(split, indices, "functions")
        right, shown = self.observe(self.values(points, streams), streams)
        return self.options.scale * right, self.options.scale * shown

    def batch(  # type: ignore[override]  # the variables by name
        self, split: str, indices: Sequence[int], n_points: int | None = None, n_dims: int | None = None
    ) -> dict[str, torch.Tensor]:
        """The prompts with these indices.

        Args:
            n_points: leaves out the points behind so many.
            n_dims: sets the coordinates behind so many to 0.

        Returns:
            `input_values` `(B, n_points, n_dims)`, and `context_values` and `labels`, both the values that are shown.

        Raises:
            UserError: if there are fewer points or coordinates than asked for.
        """
        for name, wanted in (("n_points", n_points), ("n_dims", n_dims)):
            largest = getattr(self.options, name)
            if wanted is not None and not 1 <= wanted <= largest:
                raise UserError(f"{name}: {wanted} must lie in [1, {largest}], the task's {name}")
        points = self.points(split, indices)
        if n_dims is not None:
            points[:, :, n_dims:] = 0
        _, values = self.values_at(points, split, indices)
        points, values = points[:, :n_points], values[:, :n_points]
        return {"input_values": points, "context_values": values, "labels": values}


class LinearRegression(FunctionClass):
    """`f(x) = w . x` with standard normal w."""

    name = "linear_regression"

    def weights(self, streams: Streams) -> torch.Tensor:
        """w of each function, `(B, n_dims)`."""
        return torch.from_numpy(streams.normal(self.options.n_dims))

    def values(self, points: torch.Tensor, streams: Streams) -> torch.Tensor:
        return (points @ self.weights(streams)[:, :, None]).squeeze(-1)


class SparseLinearRegression(LinearRegression):
    """`f(x) = w . x`, where all but `sparsity` random coordinates of w are 0."""

    name = "sparse_linear_regression"
    options_class = SparseOptions

    def weights(self, streams: Streams) -> torch.Tensor:
        weights = super().weights(streams)
        kept = torch.from_numpy(streams.subset(self.options.n_dims, self.options.sparsity))
        return torch.zeros_like(weights).scatter(1, kept, weights.gather(1, kept))


class NoisyLinearRegression(LinearRegression):
    """`f(x) = w . x` plus normal noise, which is part of what the model reads and predicts."""

    name = "noisy_linear_regression"
    options_class = NoisyOptions

    def observe(self, values: torch.Tensor, streams: Streams) -> tuple[torch.Tensor, torch.Tensor]:
        factor = 1.0
        if self.options.renormalize:
            factor = 1 / math.sqrt(1 + self.options.noise_std**2 / self.options.n_dims)
        noise = self.options.noise_std * torch.from_numpy(streams.normal(values.shape[1]))
        return factor * values, factor * (values + noise)


class QuadraticRegression(LinearRegression):
    """`f(x) = w . (x_1^2, ..., x_d^2) / sqrt(3)`: of the size of a linear function, as E x^4 = 3."""

    name = "quadratic_regression"

    def values(self, points: torch.Tensor, streams: Streams) -> torch.Tensor:
        return super().values(points.square(), streams) / math.sqrt(3)


class LinearClassification(LinearRegression):
    """`f(x) = sign(w . x)`, 1 or -1."""

    name = "linear_classification"
    metric = "accuracy"
    objective = "binary_cross_entropy"

    def values(self, points: torch.Tensor, streams: Streams) -> torch.Tensor:
        return super().values(points, streams).ge(0).to(points.dtype) * 2 - 1


class ReluNetworkRegression(FunctionClass):
    """`f(x) = sqrt(2 / h) * W2 relu(W1 x)` with h hidden units and standard normal weights."""

    name = "relu_2nn_regression"
    options_class = NetworkOptions

    def values(self, points: torch.Tensor, streams: Streams) -> torch.Tensor:
        hidden_size = self.options.hidden_size
        first = torch.from_numpy(streams.normal(self.options.n_dims, hidden_size))
        second = torch.from_numpy(streams.normal(hidden_size, 1))
        return math.sqrt(2 / hidden_size) * ((points @ first).relu() @ second).squeeze(-1)


class DecisionTree(FunctionClass):
    """A full binary tree that goes right at a node if a random coordinate is above 0, with normal values at its leaves.

    Node 0 is the root; the children of node i are 2 i + 1 and, to the right, 2 i + 2.
    """

    name = "decision_tree"
    options_class = TreeOptions

    def values(self, points: torch.Tensor, streams: Streams) -> torch.Tensor:
        num_inner = 2**self.options.depth - 1
        coordinates = torch.from_numpy(streams.integers(self.options.n_dims, num_inner))
        leaves = torch.from_numpy(streams.normal(num_inner + 1))
        goes_right = points > 0
        node = torch.zeros(points.shape[:2], dtype=torch.long)
        for _ in range(self.options.depth):
            decided_by = coordinates.gather(1, node)
            node = 2 * node + 1 + goes_right.gather(2, decided_by[:, :, None]).squeeze(2).long()
        return leaves.gather(1, node - num_inner)


class MatrixChain(FunctionClass):
    """`f(x) = x A_1 A_2 ...`, a row times a chain of square matrices with normal entries of variance 1 / d.

    The points are the rows of a matrix X, so that the values are those of `X A_1 A_2 ...`.
    """

    name = "matrix_chain"
    options_class = ChainOptions

    @property
    def n_outputs(self) -> int:
        return self.options.n_dims

    def values(self, points: torch.Tensor, streams: Streams) -> torch.Tensor:
        n_dims = self.options.n_dims
        matrices = torch.from_numpy(streams.normal(self.options.num_matrices, n_dims, n_dims)) / math.sqrt(n_dims)
        for matrix in matrices.unbind(dim=1):
            points = points @ matrix
        return points


FUNCTION_CLASSES: dict[str, type[FunctionClass]] = {
    function_class.name: function_class
    for function_class in (
        LinearRegression,
        SparseLinearRegression,
        NoisyLinearRegression,
        QuadraticRegression,
        LinearClassification,
        ReluNetworkRegression,
        DecisionTree,
        MatrixChain,
    )
}
