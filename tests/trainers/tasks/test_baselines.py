"""Predictors without a model against their plain forms, and prompts that differ from those of training."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from tests import skips
from trainers.tasks.in_context import BASELINES, CHANGES, FUNCTION_CLASSES, make_prompts
from trainers.tasks.in_context.baselines import averaging, least_squares, nearest_neighbours, network_descent, zero


def make(name="linear_regression", **options):
    return FUNCTION_CLASSES[name]({"n_dims": 4, "n_points": 9} | options)


@pytest.mark.parametrize("predict", [zero, least_squares, nearest_neighbours, averaging, network_descent])
def test_a_query_is_predicted_from_the_pairs_before_its_place(predict):
    prompts = make_prompts(make(), "test", range(3), "random_quadrant")
    found = predict(prompts.points, prompts.values, prompts.queries)
    assert found.shape == prompts.targets.shape
    assert (found[:, 0] == 0).all()
    for place in range(1, 9):
        points = torch.cat((prompts.points[:, :place], prompts.queries[:, place, None]), dim=1)
        values = torch.cat((prompts.values[:, :place], torch.full((3, 1), math.nan)), dim=1)
        # A value that was looked at would spread its NaN.
        values = values.nan_to_num(1e6)
        alone = predict(points, values, None)[:, -1]
        torch.testing.assert_close(found[:, place], alone, rtol=1e-4, atol=1e-4)


def test_network_descent_equals_training_one_network():
    task = make("relu_2nn_regression", hidden_size=3)
    prompts = make_prompts(task, "test", range(2))
    found = network_descent(prompts.points, prompts.values, hidden_size=6, steps=20)
    generator = torch.Generator().manual_seed(0)
    start = [
        (2 * torch.rand(*shape, generator=generator) - 1) / math.sqrt(inputs)
        for inputs, shape in ((4, (4, 6)), (4, (1, 6)), (6, (6, 1)), (6, (1, 1)))
    ]
    for row in range(2):
        for place in (1, 4, 8):
            weights = [nn.Parameter(part.clone()) for part in start]
            optimizer = torch.optim.Adam(weights, lr=5e-3)
            context = prompts.points[row, :place]

            def network(inputs, weights=weights):
                return (inputs @ weights[0] + weights[1]).relu() @ weights[2] + weights[3]

            for _ in range(20):
                loss = nn.functional.mse_loss(network(context)[:, 0], prompts.values[row, :place])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            expected = network(prompts.points[row, place, None])[0, 0]
            torch.testing.assert_close(found[row, place], expected, rtol=1e-3, atol=1e-4)


def test_network_descent_learns():
    task = make(n_points=16)
    prompts = make_prompts(task, "test", range(12))
    found = network_descent(prompts.points, prompts.values, hidden_size=30, steps=200)
    assert (found - prompts.targets)[:, -4:].square().mean() < 0.3 * prompts.targets.square().mean()


def test_missing_packages_are_known(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "xgboost" else object())
    assert not BASELINES["boosted trees"].is_available
    assert BASELINES["decision tree"].is_available
    assert BASELINES["least squares"].is_available


fits = pytest.mark.skipif(not BASELINES["decision tree"].is_available, reason=skips.NO_SCIKIT_LEARN)


@fits
def test_lasso_solves_its_problem():
    prompts = make_prompts(make(n_points=12), "test", range(2))
    found = BASELINES["lasso 0.1"].predict(prompts.points, prompts.values, None)
    points, values = prompts.points[0, :11].double().numpy(), prompts.values[0, :11].double().numpy()
    weights = np.zeros(4)
    for _ in range(5000):  # proximal gradient descent
        weights = weights - 0.05 * points.T @ (points @ weights - values) / 11
        weights = np.sign(weights) * np.clip(np.abs(weights) - 0.05 * 0.1, 0, None)
    assert found[0, 11].item() == pytest.approx(prompts.points[0, 11].double().numpy() @ weights, abs=1e-2)


@fits
def test_trees_remember_what_they_saw():
    prompts = make_prompts(make("decision_tree", depth=2), "test", range(2))
    seen = torch.cat((prompts.points[:, :1], prompts.points[:, :-1]), dim=1)
    found = BASELINES["decision tree"].predict(prompts.points, prompts.values, seen)
    torch.testing.assert_close(found[:, 1:], prompts.values[:, :-1], rtol=1e-5, atol=1e-5)


# Prompts


@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("name", ["linear_regression", "matrix_chain", "noisy_linear_regression"])
def test_prompts_depend_on_their_index_alone(kind, name):
    task = make(name)
    whole, part = make_prompts(task, "test", range(6), kind), make_prompts(task, "test", [4, 1], kind)
    for all_of_it, some in zip(whole, part, strict=True):
        if all_of_it is not None:
            torch.testing.assert_close(some, all_of_it[[4, 1]], rtol=1e-4, atol=1e-4)
    length = 4 if kind == "orthogonal_query" else 9
    assert whole.points.shape == (6, length, 4)
    assert whole.values.shape == whole.targets.shape == (6, length, *([4] if name == "matrix_chain" else []))


@pytest.mark.parametrize("kind", CHANGES)
def test_targets_are_the_functions_values_at_the_queries(kind):
    task = make(scale=2.0)
    prompts = make_prompts(task, "test", range(5), kind)
    weights = task.weights(task.streams("test", range(5), "functions"))
    queries = prompts.points if prompts.queries is None else prompts.queries
    torch.testing.assert_close(prompts.targets, 2 * (queries @ weights[:, :, None]).squeeze(-1), rtol=1e-4, atol=1e-4)
    noise = prompts.values - 2 * (prompts.points @ weights[:, :, None]).squeeze(-1)
    assert noise.abs().max() > 0.5 if kind == "noisy_values" else noise.abs().max() < 1e-4


def test_kinds_are_what_they_say():
    task = make(n_points=9)
    count = 400
    standard = make_prompts(task, "test", range(count)).points
    found = {kind: make_prompts(task, "test", range(count), kind) for kind in CHANGES}
    torch.testing.assert_close(found["scaled_x_3"].points, 3 * standard)
    quadrant = found["random_quadrant"]
    assert (quadrant.points.sign() == quadrant.points[:, :1].sign()).all()
    assert torch.equal(quadrant.queries, standard)
    assert len({tuple(signs) for signs in quadrant.points[:, 0].sign().tolist()}) == 16
    opposite = found["opposite_quadrants"]
    assert (opposite.queries.sign() == -opposite.points[:, :1].sign()).all()
    orthogonal = found["orthogonal_query"]
    products = orthogonal.queries @ orthogonal.points.transpose(1, 2)
    assert products.tril(diagonal=-1).abs().max() < 1e-4
    torch.testing.assert_close(orthogonal.queries.norm(dim=2), torch.full((count, 4), 2.0))
    assert (torch.linalg.matrix_rank(found["half_subspace"].points, tol=1e-4) == 2).all()
    spread = found["skewed"].points.square().sum(dim=2).mean()
    assert spread.item() == pytest.approx(4, rel=0.1)
    many = make_prompts(make(n_points=100), "test", range(100), "skewed").points
    values = torch.linalg.svdvals(many).square().mean(dim=0)
    np.testing.assert_allclose(values / values.sum(), np.array([1, 1 / 4, 1 / 9, 1 / 16]) / 1.4236, rtol=0.15)


def test_noise_is_in_what_is_shown_and_not_in_what_is_right():
    task = make("noisy_linear_regression", noise_std=0.5)
    prompts = make_prompts(task, "test", range(500))
    batch = task.batch("test", range(500))
    assert torch.equal(batch["labels"], prompts.values)
    noise = prompts.values - prompts.targets
    assert noise.std().item() == pytest.approx(0.5, rel=0.05)
    smaller = make_prompts(make("noisy_linear_regression", noise_std=0.5, renormalize=True), "test", range(500))
    factor = math.sqrt(1 + 0.25 / 4)
    torch.testing.assert_close(smaller.targets * factor, prompts.targets, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(smaller.values * factor, prompts.values, rtol=1e-4, atol=1e-4)
