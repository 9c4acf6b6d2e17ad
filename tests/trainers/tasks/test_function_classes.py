"""Function classes: each function is what its name says, prompts depend on their index alone, predictors are right."""

import math

import numpy as np
import pytest
import torch

from trainers.errors import UserError
from trainers.tasks.in_context import FUNCTION_CLASSES, IN_CONTEXT_TASKS
from trainers.tasks.in_context.baselines import averaging, least_squares, nearest_neighbours


def make(name, seed=0, **options):
    return FUNCTION_CLASSES[name]({"n_dims": 5, "n_points": 12} | options, seed=seed)


def drawn(name, count=200, split="train", **options):
    batch = make(name, **options).batch(split, range(count))
    return batch["input_values"].double(), batch["labels"].double()


def fit_residual(points, values):
    """Largest residual of the best linear map of each prompt."""
    values = values.reshape(*values.shape[:2], -1)
    weights = torch.linalg.lstsq(points, values, driver="gelsd").solution
    return (points @ weights - values).abs().max(), weights


@pytest.mark.parametrize("name", FUNCTION_CLASSES)
def test_prompts_depend_on_seed_split_and_index_alone(name):
    task = make(name)
    whole = task.batch("train", range(30))
    outputs = [task.n_outputs] if task.n_outputs > 1 else []
    assert whole["input_values"].shape == (30, 12, 5)
    assert whole["labels"].shape == whole["context_values"].shape == (30, 12, *outputs)
    assert {values.dtype for values in whole.values()} == {torch.float32}
    for indices in ([3], [29, 0, 11, 11]):
        for key, values in task.batch("train", indices).items():
            # Matrix products of other batch sizes may round differently.
            torch.testing.assert_close(values, whole[key][indices], rtol=1e-5, atol=1e-5)
        assert torch.equal(task.batch("train", indices)["input_values"], whole["input_values"][indices])
    for other in (make(name, seed=1).batch("train", range(30)), task.batch("test", range(30))):
        assert not torch.equal(other["input_values"], whole["input_values"])
        assert not torch.equal(other["labels"], whole["labels"])
    assert IN_CONTEXT_TASKS[name] is type(task)


@pytest.mark.parametrize("name", FUNCTION_CLASSES)
def test_a_function_does_not_depend_on_the_number_of_points(name):
    task = make(name)
    values = task.batch("train", [4], n_points=7)
    assert values["input_values"].shape[1] == values["labels"].shape[1] == 7
    whole = task.batch("train", [4])
    torch.testing.assert_close(values["labels"], whole["labels"][:, :7])
    fewer = task.batch("train", [4], n_dims=2)["input_values"]
    assert (fewer[:, :, 2:] == 0).all()
    assert torch.equal(fewer[:, :, :2], whole["input_values"][:, :, :2])
    for wrong in ({"n_points": 13}, {"n_dims": 6}, {"n_points": 0}):
        with pytest.raises(UserError, match=r"must lie in \[1, "):
            task.batch("train", [0], **wrong)


def test_points_are_standard_normal():
    points, _ = drawn("linear_regression", count=2000)
    assert abs(points.mean()) < 0.02
    covariance = torch.cov(points.flatten(0, 1).T)
    assert (covariance - torch.eye(5)).abs().max() < 0.05


# Largest residual that single precision leaves behind.
EXACT = 1e-4


def test_linear_functions():
    points, values = drawn("linear_regression", count=2000)
    residual, weights = fit_residual(points, values)
    assert residual < EXACT
    assert abs(weights.var() - 1) < 0.05
    assert abs(values.square().mean() - 5) < 0.4
    _, doubled = drawn("linear_regression", count=2000, scale=2)
    torch.testing.assert_close(doubled, 2 * values)


def test_sparse_functions():
    points, values = drawn("sparse_linear_regression", count=1000, sparsity=2)
    residual, weights = fit_residual(points, values)
    assert residual < EXACT
    task = make("sparse_linear_regression", sparsity=2)
    exact = task.weights(task.streams("train", range(1000), "functions"))
    torch.testing.assert_close(weights.squeeze(-1), exact.double(), rtol=0, atol=1e-3)
    counts = exact != 0
    assert (counts.sum(dim=1) == 2).all()
    assert (counts.double().mean(dim=0) - 0.4).abs().max() < 0.06


def test_noise():
    _, clean = drawn("linear_regression", count=4000)
    points, noisy = drawn("noisy_linear_regression", count=4000, noise_std=2, n_points=40)
    weights = torch.linalg.lstsq(points, noisy[:, :, None], driver="gelsd").solution
    residual = (points @ weights).squeeze(-1) - noisy
    # Five of the forty degrees of freedom go into the fit.
    assert residual.square().mean() == pytest.approx(4 * 35 / 40, rel=0.03)
    _, renormalized = drawn("noisy_linear_regression", count=4000, noise_std=2, renormalize=True)
    assert renormalized.square().mean() == pytest.approx(5, rel=0.06)
    assert clean.square().mean() == pytest.approx(5, rel=0.06)


def test_quadratic_functions():
    points, values = drawn("quadratic_regression", count=2000)
    residual, weights = fit_residual(points.square(), values)
    assert residual < 1e-3
    assert abs(weights.var() * 3 - 1) < 0.06
    assert values.square().mean() == pytest.approx(5, rel=0.1)


def test_linear_classes():
    task = make("linear_classification")
    batch = task.batch("train", range(500))
    assert set(batch["labels"].unique().tolist()) == {1.0, -1.0}
    weights = task.weights(task.streams("train", range(500), "functions"))
    sides = (batch["input_values"] @ weights[:, :, None]).squeeze(-1)
    assert ((sides > 0) == (batch["labels"] > 0)).all()
    assert task.objective == "binary_cross_entropy"
    assert task.metric == "accuracy"


def test_networks_are_positively_homogeneous_and_not_linear():
    task = make("relu_2nn_regression", hidden_size=7)
    points = task.points("train", range(300))
    values, larger, opposite = (
        task.values(factor * points, task.streams("train", range(300), "functions")) for factor in (1.0, 3.0, -1.0)
    )
    torch.testing.assert_close(larger, 3 * values, rtol=1e-4, atol=1e-4)
    assert (opposite + values).abs().mean() > 0.5
    _, values = drawn("relu_2nn_regression", count=1000)
    assert values.square().mean() == pytest.approx(5, rel=0.15)


def test_trees_equal_a_walk_from_the_root():
    task = make("decision_tree", depth=3)
    batch = task.batch("train", range(20))
    streams = task.streams("train", range(20), "functions")
    coordinates, leaves = streams.integers(5, 7), streams.normal(8)
    assert set(coordinates.flatten().tolist()) == set(range(5))
    for row in range(20):
        for point, value in zip(batch["input_values"][row], batch["labels"][row], strict=True):
            node = 0
            while node < 7:
                node = 2 * node + (2 if point[coordinates[row, node]] > 0 else 1)
            assert value == leaves[row, node - 7]


def test_matrix_chains():
    task = make("matrix_chain", num_matrices=3)
    batch = task.batch("train", range(400))
    points, values = batch["input_values"].double(), batch["labels"].double()
    residual, weights = fit_residual(points, values)
    assert residual < 1e-3
    first = torch.from_numpy(task.streams("train", [7], "functions").normal(3, 5, 5))[0].double() / math.sqrt(5)
    torch.testing.assert_close(weights[7], first[0] @ first[1] @ first[2], rtol=1e-3, atol=1e-4)
    # Every factor keeps the variance.
    assert values.square().mean() == pytest.approx(1, rel=0.2)
    assert task.n_outputs == 5


# Predictors


def plain_predictions(rule, points, values):
    """The rule at every place by itself, from the pairs before it; 0 without any."""
    predictions = torch.zeros_like(values)
    for row in range(len(points)):
        for place in range(1, points.shape[1]):
            predictions[row, place] = rule(points[row, :place], values[row, :place], points[row, place])
    return predictions


def plain_least_squares(points, values, point):
    return point @ torch.linalg.pinv(points) @ values


def plain_nearest(points, values, point):
    nearest = (points - point).norm(dim=1).argsort()[:3]
    return values[nearest].mean(dim=0)


def plain_averaging(points, values, point):
    return point @ (points.T @ values) / len(points)


RULES = {
    "least squares": (least_squares, plain_least_squares),
    "3 nearest neighbours": (nearest_neighbours, plain_nearest),
    "averaging": (averaging, plain_averaging),
}


@pytest.mark.parametrize(("rule", "plain"), RULES.values(), ids=RULES)
@pytest.mark.parametrize("name", ["linear_regression", "matrix_chain", "decision_tree"])
def test_predictors_equal_their_plain_form(rule, plain, name):
    points, values = drawn(name, count=6)
    torch.testing.assert_close(rule(points, values), plain_predictions(plain, points, values), rtol=1e-8, atol=1e-8)
    single = rule(points.float(), values.float())
    assert single.dtype == torch.float32
    assert single.shape == values.shape


def error_by_position(predictions, values):
    return (predictions - values).square().mean(dim=0).numpy()


def test_least_squares_solves_linear_functions():
    points, values = drawn("linear_regression", count=400)
    errors = error_by_position(least_squares(points, values), values)
    assert (errors[5:] < 1e-8).all()
    # Without as many points as coordinates, i of the d directions of w are known.
    np.testing.assert_allclose(errors[:5], 5 - np.arange(5), rtol=0.3)
    model_free = error_by_position(torch.zeros_like(values), values)
    for rule in (nearest_neighbours, averaging):
        assert error_by_position(rule(points, values), values)[-1] < model_free[-1]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("linear_regression", {"n_dims": 0}, "n_dims is 0; it must be at least 1"),
        ("linear_regression", {"n_points": -3}, "n_points is -3; it must be at least 1"),
        ("linear_regression", {"noise": 1}, "unknown option 'noise'"),
        ("sparse_linear_regression", {"sparsity": 6}, r"sparsity is 6; it must lie in \[1, n_dims=5\]"),
        ("noisy_linear_regression", {"noise_std": -1}, "noise_std is -1; it must be at least 0"),
        ("relu_2nn_regression", {"hidden_size": 0}, "hidden_size is 0"),
        ("decision_tree", {"depth": 0}, "depth is 0"),
        ("matrix_chain", {"num_matrices": 0}, "num_matrices is 0"),
        ("linear_regression", {"scale": "large"}, "scale"),
    ],
)
def test_bad_options_are_refused(name, options, message):
    with pytest.raises(UserError, match=message) as caught:
        make(name, **options)
    assert "\n" not in str(caught.value)
