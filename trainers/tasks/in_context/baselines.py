"""Predictors without a trained model, to stand beside one (Garg et al. 2022, arXiv:2208.01066, appendix A.3).

Each takes points `(B, n, d)` and their values, `(B, n)` or `(B, n, outputs)`, and predicts from the pairs before each
place the value at that place's query; queries, of the shape of the points, are by default the points. At the first
place, where there are no pairs, all of them say 0. The result has the type and shape of the values.
"""

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

Predictor = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


@dataclass(frozen=True)
class Baseline:
    """A predictor with what a report needs to know of it.

    Attributes:
        predict: the predictor.
        package: a package outside the requirements that it needs, or `None`.
        is_slow: whether it fits a model of its own for every place of every prompt, one after another.
    """

    predict: Predictor
    package: str | None = None
    is_slow: bool = False

    @property
    def is_available(self) -> bool:
        """Whether its package is installed."""
        return self.package is None or importlib.util.find_spec(self.package) is not None


def zero(points: torch.Tensor, values: torch.Tensor, queries: torch.Tensor | None = None) -> torch.Tensor:
    """0 everywhere: the mean of all values of the symmetric function classes."""
    return torch.zeros_like(values)


def least_squares(points: torch.Tensor, values: torch.Tensor, queries: torch.Tensor | None = None) -> torch.Tensor:
    """The linear function of least squared error, and of several the one with the smallest weights.

    Computed in double precision.
    """
    inputs = points.double()
    targets = inputs if queries is None else queries.double()
    outputs = values.double().reshape(*values.shape[:2], -1)
    predictions = torch.zeros_like(outputs)
    for place in range(1, points.shape[1]):
        weights = torch.linalg.lstsq(inputs[:, :place], outputs[:, :place], driver="gelsd").solution
        predictions[:, place] = (targets[:, place, None] @ weights).squeeze(1)
    return predictions.to(values.dtype).view_as(values)


def nearest_neighbours(
    points: torch.Tensor, values: torch.Tensor, queries: torch.Tensor | None = None, count: int = 3
) -> torch.Tensor:
    """The mean value of the `count` nearest points before, or of all if there are fewer."""
    num_points = points.shape[1]
    # The matrix-product form would lose the small distances to rounding.
    apart = torch.cdist(points if queries is None else queries, points, compute_mode="donot_use_mm_for_euclid_dist")
    later = torch.ones(num_points, num_points, dtype=torch.bool).triu()
    nearest = apart.masked_fill(later, math.inf).topk(min(count, num_points), dim=2, largest=False)
    weights = torch.zeros_like(apart).scatter(2, nearest.indices, nearest.values.isfinite().to(apart.dtype))
    return _weighted_mean(weights, values)


def averaging(points: torch.Tensor, values: torch.Tensor, queries: torch.Tensor | None = None) -> torch.Tensor:
    """`w . x` with w the mean of `y x` over the pairs before: least squares without decorrelation."""
    earlier = torch.ones(points.shape[1], points.shape[1], dtype=points.dtype).tril(diagonal=-1)
    queries = points if queries is None else queries
    return _weighted_mean(queries @ points.transpose(1, 2) * earlier, values, counts=earlier.sum(dim=1))


def _weighted_mean(weights: torch.Tensor, values: torch.Tensor, counts: torch.Tensor | None = None) -> torch.Tensor:
    """Sums of the values with weights `(B, n, n)`, over their number."""
    counts = weights.sum(dim=2) if counts is None else counts.expand(weights.shape[:2])
    outputs = values.reshape(*values.shape[:2], -1).to(weights.dtype)
    return (weights @ outputs / counts.clamp(min=1)[:, :, None]).to(values.dtype).view_as(values)


def network_descent(
    points: torch.Tensor,
    values: torch.Tensor,
    queries: torch.Tensor | None = None,
    hidden_size: int = 100,
    steps: int = 100,
    learning_rate: float = 5e-3,
    seed: int = 0,
) -> torch.Tensor:
    """A two-layer ReLU network trained by Adam on the pairs before each place, all of them in each step.

    The networks of all places and prompts are trained side by side. They start from the same weights, uniform within
    `1 / sqrt(inputs)` of each layer as `torch.nn.Linear` draws them.

    Args:
        hidden_size: hidden units.
        steps: updates.
        learning_rate: Adam's.
        seed: seed of the starting weights.
    """
    batch_size, num_points, n_dims = points.shape
    outputs = values.float().reshape(batch_size, num_points, -1)
    generator = torch.Generator().manual_seed(seed)

    def start(inputs: int, *shape: int) -> torch.Tensor:
        drawn = (2 * torch.rand(*shape, generator=generator) - 1) / math.sqrt(inputs)
        return drawn.repeat(batch_size, num_points, *[1] * len(shape)).requires_grad_()

    first = start(n_dims, n_dims, hidden_size), start(n_dims, 1, hidden_size)
    second = start(hidden_size, hidden_size, outputs.shape[2]), start(hidden_size, 1, outputs.shape[2])

    def network(inputs: torch.Tensor) -> torch.Tensor:
        return (inputs @ first[0] + first[1]).relu() @ second[0] + second[1]

    # Of every place, the pairs before it: the mean of their squared errors is the loss of its network.
    earlier = torch.ones(num_points, num_points).tril(diagonal=-1)
    weights = (earlier / earlier.sum(dim=1, keepdim=True).clamp(min=1) / outputs.shape[2])[None, :, :, None]
    context = points.float()[:, None].expand(-1, num_points, -1, -1)
    optimizer = torch.optim.Adam([*first, *second], lr=learning_rate)
    with torch.enable_grad():
        for _ in range(steps):
            loss = (weights * (network(context) - outputs[:, None]).square()).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        predictions = network((points if queries is None else queries).float()[:, :, None]).squeeze(2)
    predictions[:, 0] = 0
    return predictions.to(values.dtype).view_as(values)


def _fitted(make: Callable[[], Any]) -> Predictor:
    """A predictor that fits a new model of scikit-learn's kind, with `fit` and `predict`, at every place."""

    def predict(points: torch.Tensor, values: torch.Tensor, queries: torch.Tensor | None = None) -> torch.Tensor:
        inputs, targets = points.double().numpy(), (points if queries is None else queries).double().numpy()
        outputs = values.double().reshape(*values.shape[:2], -1).numpy()
        predictions = np.zeros_like(outputs)
        for row in range(len(inputs)):
            for place in range(1, inputs.shape[1]):
                for output in range(outputs.shape[2]):
                    model = make().fit(inputs[row, :place], outputs[row, :place, output])
                    predictions[row, place, output] = model.predict(targets[row, place, None])[0]
        return torch.from_numpy(predictions).to(values.dtype).view_as(values)

    return predict


def lasso(strength: float) -> Predictor:
    """Least squares with a penalty on the sum of absolute weights, `strength` times, without intercept.

    Minimises `sum of squares / (2 n) + strength * |w|_1`. Needs scikit-learn.
    """

    def make():
        from sklearn.linear_model import Lasso

        return Lasso(alpha=strength, fit_intercept=False, max_iter=5000)

    def predict(points: torch.Tensor, values: torch.Tensor, queries: torch.Tensor | None = None) -> torch.Tensor:
        import warnings

        from sklearn.exceptions import ConvergenceWarning

        with warnings.catch_warnings():
            # A weak penalty on few points converges slowly; what is reached after all iterations is the prediction.
            warnings.simplefilter("ignore", ConvergenceWarning)
            return _fitted(make)(points, values, queries)

    return predict


def decision_tree(depth: int | None) -> Predictor:
    """A tree grown greedily by squared error, at most `depth` decisions deep. Needs scikit-learn."""

    def make():
        from sklearn.tree import DecisionTreeRegressor

        return DecisionTreeRegressor(max_depth=depth, random_state=0)

    return _fitted(make)


def boosted_trees(trees: int = 50, depth: int = 4, learning_rate: float = 0.1) -> Predictor:
    """Gradient-boosted trees. Needs xgboost."""

    def make():
        from xgboost import XGBRegressor

        return XGBRegressor(n_estimators=trees, max_depth=depth, learning_rate=learning_rate, n_jobs=1, verbosity=0)

    return _fitted(make)


BASELINES: dict[str, Baseline] = {
    "always 0": Baseline(zero),
    "least squares": Baseline(least_squares),
    "3 nearest neighbours": Baseline(nearest_neighbours),
    "averaging": Baseline(averaging),
    "gradient descent on a network": Baseline(network_descent, is_slow=True),
    **{
        f"lasso {strength:g}": Baseline(lasso(strength), package="sklearn", is_slow=True)
        for strength in (1.0, 0.1, 0.01, 0.001)
    },
    "decision tree, depth 4": Baseline(decision_tree(4), package="sklearn", is_slow=True),
    "decision tree": Baseline(decision_tree(None), package="sklearn", is_slow=True),
    "boosted trees": Baseline(boosted_trees(), package="xgboost", is_slow=True),
}
