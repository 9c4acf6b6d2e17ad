"""Derivatives along a movement of the weights, against finite differences, autograd on the weights, and each other."""

import numpy as np
import pytest
import torch
from torch.func import functional_call, hessian

from trainers.coupling import CouplingAnalyzer
from trainers.coupling.capture import Capture, RowsLostError
from trainers.coupling.directional import derivatives_along
from trainers.coupling.ripple import _parameters

from .test_gradsim import FLOAT32_INSIDE
from .tools import ARCHITECTURES, PIECES, naive_log_prob, tiny_model


def a_direction(analyzer: CouplingAnalyzer, scale: float = 0.1):
    generator = torch.Generator().manual_seed(3)
    parameters = _parameters(analyzer)
    return parameters, [scale * torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]


def differences(analyzer, parameters, direction, step):
    """Central differences of every piece's log-probability, and of its derivative."""
    saved = [parameter.detach().clone() for parameter in parameters]
    values, slopes = [], []
    for times in (-1, 1):
        with torch.no_grad():
            for parameter, old, part in zip(parameters, saved, direction, strict=True):
                parameter.copy_(old + times * step * part)
        values.append(analyzer.log_probabilities(PIECES))
        slopes.append(derivatives_along(analyzer, PIECES, parameters, direction)[0])
    with torch.no_grad():
        for parameter, old in zip(parameters, saved, strict=True):
            parameter.copy_(old)
    return [(after - before) / (2 * step) for before, after in (values, slopes)]


def check(analyzer, parameters, direction, step=1e-3, tolerance=1e-5) -> np.ndarray:
    first, second = derivatives_along(analyzer, PIECES, parameters, direction, second=True)
    expectations = differences(analyzer, parameters, direction, step)
    for found, expected in zip((first, second), expectations, strict=True):
        assert np.abs(expected).max() > 1e-3
        assert np.abs(found - expected).max() < tolerance * np.abs(expected).max()
    return first


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_equals_finite_differences(model_type):
    # Across the kinks of ReLU differences tell nothing.
    smooth = {"t5": {"feed_forward_proj": "gelu"}, "opt": {"activation_function": "gelu"}}
    analyzer = CouplingAnalyzer(tiny_model(model_type, **smooth.get(model_type, {})), tokens_per_batch=24)
    parameters, direction = a_direction(analyzer)
    # Where a library rounds to float32 inside, the step must be long enough for differences to stand out.
    step, tolerance = (1e-2, 5e-3) if model_type in FLOAT32_INSIDE else (1e-3, 1e-5)
    first = check(analyzer, parameters, direction, step, tolerance)
    alone, none = derivatives_along(analyzer, PIECES, parameters, direction)
    assert none is None
    np.testing.assert_allclose(alone, first, rtol=1e-5, atol=1e-7)


def test_equals_the_hessian():
    """The whole Hessian of each piece's log-probability, in float64."""
    model = tiny_model("gpt2", n_embd=8, n_layer=1, n_head=2, n_inner=6)
    analyzer = CouplingAnalyzer(model)
    parameters, direction = a_direction(analyzer)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    shapes = [parameter.shape for parameter in parameters]
    flat = torch.cat([parameter.detach().flatten() for parameter in parameters])
    moved = torch.cat([part.flatten() for part in direction])

    class LogProb(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, piece):
            return naive_log_prob(self.model, piece.prompt_ids, piece.answer_ids)

    first, second = derivatives_along(analyzer, PIECES, parameters, direction, second=True)
    model.set_attn_implementation("eager")  # the fused form has no second derivative
    for index, piece in enumerate(PIECES):

        def log_prob(values, piece=piece):
            parts = values.split([shape.numel() for shape in shapes])
            weights = {
                f"model.{names[id(parameter)]}": part.view(shape)
                for parameter, part, shape in zip(parameters, parts, shapes, strict=True)
            }
            return functional_call(LogProb(), weights, (piece,))

        gradient = torch.func.grad(log_prob)(flat).detach()
        matrix = hessian(log_prob)(flat)
        assert first[index] == pytest.approx(float(gradient @ moved), rel=1e-6)
        assert second[index] == pytest.approx(float(moved @ matrix @ moved), rel=1e-5)


def test_every_use_of_a_tied_weight_moves():
    model = tiny_model("opt", tie_word_embeddings=True)
    analyzer = CouplingAnalyzer(model, layers="lm_head")
    parameters, direction = a_direction(analyzer)
    assert parameters[0] is model.get_input_embeddings().weight
    check(analyzer, parameters, direction)


def test_a_bias_by_itself_moves():
    analyzer = CouplingAnalyzer(tiny_model("gpt2"))
    both = zip(*a_direction(analyzer), strict=True)
    biases, direction = zip(*((bias, part) for bias, part in both if bias.dim() == 1), strict=True)
    check(analyzer, biases, direction)


def test_layers_that_mix_rows_go_one_piece_at_a_time(monkeypatch):
    analyzer = CouplingAnalyzer(tiny_model("gpt2"))
    parameters, direction = a_direction(analyzer)
    expected, _ = derivatives_along(analyzer, PIECES, parameters, direction)
    plain = Capture.by_piece

    def mixing(self, layer, values, count):
        if count > 1:
            raise RowsLostError(layer)
        return plain(self, layer, values, count)

    monkeypatch.setattr(Capture, "by_piece", mixing)
    found, _ = derivatives_along(analyzer, PIECES, parameters, direction)
    np.testing.assert_allclose(found, expected, rtol=1e-9)
