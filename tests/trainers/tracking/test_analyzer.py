"""The analyzer on given batches, and linear probes."""

import doctest
import json

import pytest
import torch

from tests.trainers.tracking.tools import make_batch, make_model
from trainers.errors import UserError
from trainers.files import json_text
from trainers.tracking import TransformerAnalyzer, analyzer, probe_layers
from trainers.tracking.linear_probe import fit_classifier, layer_states


def test_the_example_runs():
    assert doctest.testmod(analyzer).failed == 0


def test_everything_is_left_as_it_was():
    model = make_model("post_norm", dropout=0.1).train()
    batch = make_batch(model)
    model(**batch).loss.backward()
    before = {name: (p.detach().clone(), p.grad.clone()) for name, p in model.named_parameters()}
    state = torch.random.get_rng_state()
    report = TransformerAnalyzer(model).comprehensive_analysis([batch, make_batch(model, seed=1)])
    assert model.training
    assert torch.equal(state, torch.random.get_rng_state())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][0])
        assert torch.equal(parameter.grad, before[name][1])
    assert json.loads(json_text(report)) == report  # nothing but plain numbers, and all of them finite
    assert report["schema_version"] == 1
    assert report["model"]["layers"] == {"encoder.layers": 2, "decoder.layers": 2}
    assert sum(report["attention"]["classes"].values()) == 24


def test_gradient_flow_is_that_of_the_mean_loss():
    model = make_model("gpt2")
    batches = [make_batch(model), make_batch(model, seed=1)]
    report = TransformerAnalyzer(model).analyze_gradient_flow(batches)
    (sum(model(**batch).loss for batch in batches) / 2).backward()
    wanted = model.transformer.h[1].mlp.c_fc.weight.grad.norm().item()
    assert report["parameters"]["h.1.mlp.c_fc.weight"]["gradient"] == pytest.approx(wanted, rel=1e-5)
    assert set(report["activations"]) == {"h.0", "h.1"}
    assert report["slope"]["h"] is not None


def test_a_filter_narrows_what_is_reported():
    model = make_model("post_norm")
    chosen = TransformerAnalyzer(model, names="decoder.*")
    assert set(chosen.analyze_qkv_statistics(make_batch(model))) == {
        f"decoder.layers.{layer}.{kind}_attn" for layer in (0, 1) for kind in ("self", "cross")
    }
    assert all(name.startswith("decoder.") for name in chosen.analyze_attention_patterns(make_batch(model))["modules"])


def test_batches_without_labels_or_without_anything():
    model = make_model("gpt2")
    batch = {name: values for name, values in make_batch(model).items() if name != "labels"}
    assert TransformerAnalyzer(model).comprehensive_analysis(batch)["gradients"] is None
    with pytest.raises(UserError, match="gradients need a loss"):
        TransformerAnalyzer(model).analyze_gradient_flow(batch)
    with pytest.raises(UserError, match="no batch"):
        TransformerAnalyzer(model).analyze_attention_patterns([])


def labelled(model, rows=60):
    """Whether the first token is below 20: a property of the input that mean states hold, blurred by the others."""
    batch = make_batch(model, rows=rows, length=6)
    low = torch.arange(rows) % 2 == 0
    batch["input_ids"][:, :3] = torch.where(low, 5, 30)[:, None]
    return batch, ["low" if value else "high" for value in low.tolist()]


@pytest.mark.parametrize("name", ["gpt2", "post_norm"])
def test_a_probe_reads_what_is_there_and_not_what_is_not(name):
    model = make_model(name)
    batch, labels = labelled(model)
    found = probe_layers(model, [batch], labels)
    stack = "h" if name == "gpt2" else "encoder.layers"
    assert {f"{stack}.input", f"{stack}.0", f"{stack}.1"} <= set(found["layers"])
    assert found["train"] + found["test"] == 60
    assert found["majority"] == 0.5
    entry = found["layers"][f"{stack}.1"]
    assert entry["accuracy"]["value"] == 1.0
    assert entry["control"]["value"] < 0.9
    assert entry["selectivity"] == entry["accuracy"]["value"] - entry["control"]["value"]
    assert probe_layers(model, [batch], labels) == found


def test_states_leave_padding_out():
    model = make_model("gpt2")
    batch = make_batch(model)
    states = layer_states(model, [batch])
    short = {name: values[1:2, :7] for name, values in batch.items()}
    torch.testing.assert_close(layer_states(model, [short])["h.1"], states["h.1"][1:2], rtol=1e-4, atol=1e-5)


def test_the_classifier_is_at_the_minimum():
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(40, 3, generator=generator), torch.randint(3, (40,), generator=generator)
    classifier = fit_classifier(features, labels, 3)
    classifier.zero_grad()
    loss = torch.nn.functional.cross_entropy(classifier(features.double()), labels)
    (loss + 1e-3 * classifier.weight.square().sum()).backward()
    assert classifier.weight.grad.abs().max() < 1e-6


@pytest.mark.parametrize(
    ("labels", "message"),
    [(["a"] * 3, "3, but the batches hold 4"), (["a"] * 4, "two different"), (["a", "a", "a", "b"], "'b' occurs once")],
)
def test_labels_that_cannot_be_probed(labels, message):
    model = make_model("gpt2")
    with pytest.raises(UserError, match=message):
        probe_layers(model, [make_batch(model)], labels)
