"""Whatever number stands in a configuration: it is refused by the field's name, or it is kept and the model runs."""

import inspect
import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedConfig

from tests.hf_models import (
    test_connection_transformer,
    test_continuous_thought_machine,
    test_in_context_transformer,
    test_vanilla_transformer,
)
from tests.hf_models.model_tests import ModelTests
from tests.hf_models.test_package import ARCHITECTURES

QUICK = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
LONG = settings(QUICK, max_examples=600)
MODULES = (
    test_connection_transformer,
    test_continuous_thought_machine,
    test_in_context_transformer,
    test_vanilla_transformer,
)
CASES = {
    value.config_class: value
    for module in MODULES
    for value in reversed(vars(module).values())
    if isinstance(value, type) and issubclass(value, ModelTests) and value is not ModelTests
}
odd = st.one_of(
    st.sampled_from(
        [-1, 0, 1, 2, 3, 2**31, 2**63, -(2**63), 10**30, math.inf, -math.inf, math.nan, 1e39, -0.0, 1e-320]
    ),
    st.integers(-3, 40),
    st.floats(),
    st.booleans(),
    st.none(),
    st.text(max_size=3),
    st.lists(st.integers(-2, 9), max_size=3),
)
small = st.one_of(st.integers(1, 12), st.floats(0, 2), st.sampled_from([0, -1, 1.0, 0.5, 1e-30, 1e30]))


def own_fields(config_class: type) -> list[str]:
    """The fields of a configuration that hold a number, or that could be given one by mistake."""
    lineage = [kind for kind in config_class.__mro__ if issubclass(kind, PreTrainedConfig)]
    return sorted({name for kind in lineage if kind is not PreTrainedConfig for name in inspect.get_annotations(kind)})


def numbers(config_class: type) -> list[str]:
    """Those whose value shapes the model's computation, without the ids of special tokens and without a vocabulary."""
    tiny = CASES[config_class]().tiny_config()
    hints = {name: str(hint) for kind in config_class.__mro__ for name, hint in inspect.get_annotations(kind).items()}
    return [
        name
        for name in own_fields(config_class)
        if ("int" in hints[name] or "float" in hints[name])
        and not name.endswith(("token_id", "vocab_size"))
        and not isinstance(getattr(tiny, name), list)
    ]


def names(error: Exception, name: str) -> bool:
    """Whether an error is about a field, as every refusal must be."""
    return name in str(error)


def accepted(config_class: type, name: str, value) -> PreTrainedConfig | None:
    """The tiny configuration with one field changed, or `None` where that is refused by the field's name."""
    try:
        return CASES[config_class]().tiny_config(**{name: value})
    except (StrictDataclassError, ValueError, TypeError) as error:
        if not names(error, name):
            raise
        return None


def check_kept(config_class: type, folder, data) -> None:
    name, value = data.draw(st.sampled_from(own_fields(config_class))), data.draw(odd)
    config = accepted(config_class, name, value)
    if config is None:
        return
    if isinstance(value, float):
        assert math.isfinite(value), f"{name}={value} was accepted"
    config.save_pretrained(folder)
    loaded = config_class.from_pretrained(folder)
    assert loaded.to_dict() == config.to_dict()
    assert "NaN" not in (folder / "config.json").read_text()


def check_runs(config_class: type, data) -> None:
    case = CASES[config_class]()
    name, value = data.draw(st.sampled_from(numbers(config_class))), data.draw(small)
    config = accepted(config_class, name, value)
    if config is None:
        return
    body = next(iter(case.classes))
    try:
        model = body(config).eval()
        with torch.no_grad():
            outputs = model(**case.inputs(body, 2, config))
    except (StrictDataclassError, ValueError) as error:  # inputs longer than the positions, for instance
        if not names(error, name):
            raise
        return
    assert outputs[0].shape[0] == 2


def test_every_architecture_is_tried():
    folders = {config_class.__module__.split(".")[1] for config_class in CASES}
    assert folders == set(ARCHITECTURES)
    assert len(CASES) == 6
    for config_class in CASES:
        assert len(numbers(config_class)) >= 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("config")


@pytest.mark.parametrize("config_class", CASES)
@QUICK
@given(data=st.data())
def test_any_value_is_refused_by_name_or_kept(config_class, folder, data):
    check_kept(config_class, folder, data)


@pytest.mark.parametrize("config_class", CASES)
@settings(QUICK, max_examples=30)
@given(data=st.data())
def test_accepted_numbers_run(config_class, data):
    check_runs(config_class, data)


@pytest.mark.long
@pytest.mark.parametrize("config_class", CASES)
@LONG
@given(data=st.data())
def test_any_value_is_refused_by_name_or_kept_at_length(config_class, folder, data):
    check_kept(config_class, folder, data)


@pytest.mark.long
@pytest.mark.parametrize("config_class", CASES)
@settings(QUICK, max_examples=300)
@given(data=st.data())
def test_accepted_numbers_run_at_length(config_class, data):
    check_runs(config_class, data)


@pytest.mark.parametrize("config_class", CASES)
def test_no_field_takes_a_number_that_is_not_finite(config_class):
    for name in numbers(config_class):
        for value in (math.nan, math.inf, -math.inf, 1e39, 2**63):
            assert accepted(config_class, name, value) is None, f"{name}={value}"


def test_a_slip_in_the_number_of_classes_ends_at_once():
    config_class = next(kind for kind in CASES if kind.model_type == "continuous_thought_machine")
    with pytest.raises(StrictDataclassError, match=r"out_dims=1000000000 .* makes 1000000000 classes"):
        config_class(out_dims=10**9)


def test_a_bad_shape_is_not_told_of_the_field_that_follows_from_it():
    config_class = next(kind for kind in CASES if kind.model_type == "continuous_thought_machine")
    with pytest.raises(StrictDataclassError, match=r"prediction_reshaper=\[0\] must hold positive sizes"):
        config_class(prediction_reshaper=[0], out_dims=None)
