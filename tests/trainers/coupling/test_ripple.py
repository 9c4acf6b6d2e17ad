"""Ripples: edits measured on tiny models, golden changes, exact restoration, and the statistics."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from trainers.coupling import CouplingAnalyzer, KnowledgePiece
from trainers.coupling.figures import ripple_chart
from trainers.coupling.ripple import FULL, PREDICTIONS, measure_edits, ranking_quality, spearman, validate
from trainers.errors import UserError

from .test_gradsim import CASES, GOLDEN, GOLDEN_PIECES, golden_model
from .tools import PIECES, naive_log_prob, tiny_model, word_tokenizer

TEXTS = [KnowledgePiece(f"k{i}", f"w{i} w{i % 3} w{i % 5}", f"w{i % 4}", group=str(i % 2)) for i in range(10)]


def text_analyzer(model_type: str = "gpt2", **changes) -> CouplingAnalyzer:
    tokenizer = word_tokenizer([f"{piece.prompt} {piece.answer} old new" for piece in TEXTS])
    return CouplingAnalyzer(tiny_model(model_type, vocab_size=len(tokenizer), **changes), tokenizer)


@pytest.mark.parametrize("answer", ["first", "full"])
@pytest.mark.parametrize(("name", "tolerance"), [("tiny_gpt2", 1e-9), ("tiny_llama_bias", 5e-6)])
def test_golden_edits(name, tolerance, answer):
    """A difference of two log-probabilities keeps all of the rounding in what Llama computes in float32."""
    model = golden_model(name, torch.float64)
    analyzer = CouplingAnalyzer(model, answer=answer)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    expected = load_file(GOLDEN / "expected.safetensors")[f"{name}.{answer}.ripple_actual"].numpy()
    norms = analyzer.fit(GOLDEN_PIECES).gradient_norms
    found = []
    for piece, norm in zip(GOLDEN_PIECES, norms, strict=True):
        # The step is gain / norm long.
        result = measure_edits(analyzer, [piece], GOLDEN_PIECES, [CASES["edit_step_l2"] * norm])
        assert result["norms"][0] == pytest.approx(norm)
        assert result["restored"]
        found.append(result["changes"][0, 0])
    assert np.abs(np.stack(found) - expected).max() < tolerance
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "t5"])
def test_small_edits_follow_the_prediction(model_type):
    analyzer = text_analyzer(model_type)
    result = validate(analyzer, TEXTS, 4, sizes=(1e-3, 1e-2), chosen_size=1e-3)
    small, larger = result["sizes"]
    assert small["spearman"]["first_order"]["median"] > 0.99
    assert small["sign_agreement"]["value"] > 0.97
    assert small["linearity_error"]["median"] < larger["linearity_error"]["median"] < 0.05
    assert small["slope"] == pytest.approx(1, abs=0.01)
    assert small["own_gain"]["median"] == pytest.approx(1e-3, rel=0.01)
    assert result["gradient_norm_error"] < 1e-5
    assert result["restored_bit_for_bit"]
    assert result["holds_up_to_own_gain"] == larger["own_gain"]["median"]
    pairs = result["chosen"]["pairs"]
    assert {len(values) for values in pairs.values()} == {4 * 9}
    assert all(one != other for one, other in zip(pairs["edited"], pairs["measured_on"], strict=True))
    assert set(small["spearman"]) == {
        "first_order",
        "coupling",
        "balanced_coupling",
        "same_answer",
        "same_group",
        "lexical_overlap",
        "hidden_state_similarity",
    }
    json.dumps(result, allow_nan=False)
    assert len(ripple_chart(result).axes) == 2


@pytest.mark.parametrize("edit", ["answer", "lora"])
def test_predictions_along_the_edit(edit):
    """Each is better than the one before it by a power of the edit's size."""
    analyzer = text_analyzer(activation_function="gelu")
    arguments = {"edit": edit, "chosen_size": 0.01, "predictions": PREDICTIONS}
    result = validate(analyzer, TEXTS, 3, sizes=(0.02,), **arguments)
    small, large = result["sizes"]
    for size in (small, large):
        second, path = (size["predictions"][name] for name in ("second_order", "path"))
        errors = [one["linearity_error"]["median"] for one in (size, second, path)]
        assert errors[0] > 3 * errors[1] > 9 * errors[2]
        assert second["slope"] == pytest.approx(1, abs=1e-2)
        assert path["slope"] == pytest.approx(1, abs=1e-4)
        assert size["spearman"]["path"]["median"] == pytest.approx(1)
    growth = [
        large["predictions"][name]["linearity_error"]["median"]
        / small["predictions"][name]["linearity_error"]["median"]
        for name in PREDICTIONS
    ]
    assert growth[0] == pytest.approx(4, rel=0.2)  # errors of third order, beside changes of first
    assert growth[1] > 8  # of fifth order
    assert result["predictions_hold_up_to_own_gain"] == dict.fromkeys(PREDICTIONS, large["own_gain"]["median"])
    assert result["restored_bit_for_bit"]
    assert len(ripple_chart(result).axes[1].lines) == 5
    json.dumps(result, allow_nan=False)


def test_edits_in_several_steps():
    """Steps along the gradient of where they start: ascent as it is trained, whose own gain adds up."""
    analyzer = text_analyzer()
    encoded = analyzer.encode(TEXTS)
    model, parameters = analyzer.model, [p for layer in analyzer.targets for p in (layer.weight, *layer.biases)]
    saved = [parameter.detach().clone() for parameter in parameters]
    result = measure_edits(analyzer, encoded[:1], encoded, [0.6], steps=3, predictions=["path"])
    assert result["steps"].tolist() == [[3]]
    before = analyzer.log_probabilities(encoded)
    for _ in range(3):
        log_prob = naive_log_prob(model, encoded[0].prompt_ids, encoded[0].answer_ids)
        gradient = torch.autograd.grad(log_prob, parameters)
        squared = sum(part.square().sum() for part in gradient)
        assert log_prob < -0.4  # or steps would be shorter
        with torch.no_grad():
            for parameter, part in zip(parameters, gradient, strict=True):
                parameter += 0.2 / squared * part
    expected = analyzer.log_probabilities(encoded) - before
    with torch.no_grad():
        for parameter, old in zip(parameters, saved, strict=True):
            parameter.copy_(old)
    np.testing.assert_allclose(result["changes"][0, 0], expected, atol=1e-12)
    np.testing.assert_allclose(result["kinds"]["path"][0, 0], expected, atol=1e-3)
    single = measure_edits(analyzer, encoded[:1], encoded, [0.6])["changes"][0, 0]
    assert abs(expected[0] - 0.6) < abs(single[0] - 0.6)


def test_a_step_does_not_aim_beyond_certainty():
    analyzer = text_analyzer()
    encoded = analyzer.encode(TEXTS)
    lacking = -analyzer.log_probabilities(encoded)[0]
    gain = measure_edits(analyzer, encoded[:1], encoded, [100 * lacking], steps=100)["changes"][0, 0, 0]
    assert 0 < gain < lacking


def test_replacement_until_the_new_answer_wins():
    pieces = [replace(piece, role="portability" if i % 2 else "locality", pot="one") for i, piece in enumerate(TEXTS)]
    for index in (0, 4, 7):
        pieces[index] = replace(pieces[index], new_answer=f"w{(index + 1) % 4}", role="edit")
    analyzer = text_analyzer()
    result = validate(analyzer, pieces, 3, edit="replacement", sizes=(FULL,), chosen_size=0.1, predictions=["path"])
    small, full = result["sizes"]
    assert (small["size"], full["size"]) == (0.1, "full")
    assert small["replaced"] < full["replaced"] == 1
    assert full["steps"]["max"] > 1
    assert full["made"] == full["sign_agreement"]["edits"] == 1  # the other two new answers lead already
    assert small["portability_above_locality"]["measured"]["edits"] == 3
    assert full["portability_above_locality"]["measured"]["edits"] == 1
    assert full["predicted_own_gain"] == full["own_gain"]["median"]
    assert full["predictions"]["path"]["linearity_error"]["median"] < full["linearity_error"]["median"]
    json.dumps(result, allow_nan=False)
    assert result["restored_bit_for_bit"]
    # A new answer that is the more probable one already needs no edit, and leaves no ripple to rank.
    easy = [replace(piece, new_answer="w0" if piece.answer != "w0" else "w1") for piece in TEXTS]
    new = analyzer.encode([replace(piece, answer=piece.new_answer) for piece in easy])
    ahead = analyzer.log_probabilities(new) > analyzer.log_probabilities(analyzer.encode(TEXTS))
    found = measure_edits(analyzer, new, new, [FULL], rivals=analyzer.encode(TEXTS))
    assert ((found["steps"][0] == 0) == ahead).all()
    assert ahead.any()
    with pytest.raises(ValueError, match="needs the piece that is to be overtaken"):
        measure_edits(analyzer, new, new, [FULL])


def test_replacement_edits_raise_the_new_answer():
    pieces = [replace(piece, role="portability" if i % 2 else "locality", pot="one") for i, piece in enumerate(TEXTS)]
    for index in (0, 4, 7):
        pieces[index] = replace(pieces[index], new_answer="new", role="edit")
    result = validate(text_analyzer(), pieces, 3, edit="replacement", sizes=(1e-4,), chosen_size=1e-4)
    assert result["edited"] == ["k0", "k4", "k7"]
    (size,) = result["sizes"]
    assert size["own_gain"]["min"] == pytest.approx(1e-4, rel=0.02)  # of the new answer
    assert size["spearman"]["first_order"]["median"] > 0.99
    ranking = size["portability_above_locality"]
    assert ranking["first_order"]["edits"] == 3
    assert ranking["first_order"]["value"] == pytest.approx(ranking["measured"]["value"], abs=0.1)


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "t5"])
def test_edits_by_adapters(model_type):
    analyzer = text_analyzer(model_type)
    model = analyzer.model
    model.get_input_embeddings().weight.requires_grad_(False)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    asking = [parameter.requires_grad for parameter in model.parameters()]
    state = torch.get_rng_state()
    result = validate(analyzer, TEXTS, 4, edit="lora", sizes=(1e-3,), chosen_size=1e-3)
    (size,) = result["sizes"]
    assert size["own_gain"]["median"] == pytest.approx(1e-3, rel=0.02)
    assert size["spearman"]["first_order"]["median"] > 0.5  # the adapters see a random part of the gradient
    assert result["restored_bit_for_bit"]
    assert dict.fromkeys(weights, True) == {
        key: torch.equal(value, weights[key]) for key, value in model.state_dict().items()
    }
    assert [parameter.requires_grad for parameter in model.parameters()] == asking
    assert torch.equal(torch.get_rng_state(), state)
    again = validate(analyzer, TEXTS, 4, edit="lora", sizes=(1e-3,), chosen_size=1e-3)
    assert again["sizes"] == result["sizes"]
    model.peft_config = {}
    with pytest.raises(UserError, match="has adapters already"):
        validate(analyzer, TEXTS, 4, edit="lora")


def test_the_adapters_step_follows_their_own_gradients():
    """What the prediction from the full gradient misses is the choice of directions, not the order of the effect."""
    analyzer = text_analyzer("gpt2")
    encoded = analyzer.encode(TEXTS)
    small = measure_edits(analyzer, encoded[:1], encoded, [1e-4], lora_seed=0)
    larger = measure_edits(analyzer, encoded[:1], encoded, [1e-3], lora_seed=0)
    np.testing.assert_allclose(larger["changes"], 10 * small["changes"], atol=1e-5)
    assert larger["changes"][0, 0, 0] == pytest.approx(1e-3, rel=0.01)


def test_weights_come_back_when_a_measurement_fails(monkeypatch):
    model = tiny_model("gpt2")
    analyzer = CouplingAnalyzer(model)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    plain, calls = analyzer.log_probabilities, []

    def failing(pieces):
        name = "transformer.h.0.mlp.c_proj.weight"
        calls.append(not torch.equal(model.get_parameter(name), weights[name]))
        if len(calls) > 1:
            raise KeyboardInterrupt
        return plain(pieces)

    monkeypatch.setattr(analyzer, "log_probabilities", failing)
    with pytest.raises(KeyboardInterrupt):
        measure_edits(analyzer, PIECES[:1], PIECES, [10.0])
    assert calls == [False, True]
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_what_cannot_be_validated():
    analyzer = text_analyzer()
    for arguments, message in [
        ({"count": 0}, "between 1 and 10, the pieces with a gradient"),
        ({"count": 11}, "between 1 and 10"),
        ({"count": 1, "edit": "replacement"}, "between 1 and 0, the pieces with a new answer"),
        ({"count": 1, "sizes": (0.0,)}, "must be above 0"),
        ({"count": 1, "sizes": (FULL,)}, "needs new answers, and the edit is 'answer'"),
        ({"count": 1, "steps": 0}, "in 0 steps; it must be at least 1"),
        ({"count": 1, "predictions": ["third_order"]}, "unknown prediction 'third_order'; known: second_order, path"),
    ]:
        with pytest.raises(UserError, match=message):
            validate(analyzer, TEXTS, **arguments)
    with pytest.raises(UserError, match="needs three other pieces"):
        validate(analyzer, TEXTS[:3], 1)


def test_statistics():
    assert spearman(np.array([1.0, 2, 3, 4]), np.array([1.0, 8, 27, 64])) == pytest.approx(1)
    assert spearman(np.array([1.0, 2, 3, np.nan]), np.array([3.0, 2, 1, 9])) == pytest.approx(-1)
    assert np.isnan(spearman(np.ones(4), np.arange(4.0)))
    positive = np.array([True, True, False, False])
    assert ranking_quality(np.array([4.0, 3, 2, 1]), positive) == 1
    assert ranking_quality(np.array([1.0, 1, 1, 1]), positive) == 0.5
    assert ranking_quality(np.array([4.0, 1, 2, 3]), positive) == 0.5
