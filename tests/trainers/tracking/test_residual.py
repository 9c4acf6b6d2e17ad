"""The residual stream taken apart: exact for pre- and post-norm layers, and said so where it is not possible."""

import copy

import pytest
import torch

from tests.trainers.tracking.tools import make_batch, make_model
from trainers.tracking import TransformerAnalyzer, direct_logit_attribution
from trainers.tracking.recorder import Recorder, Wanted
from trainers.tracking.residual import FrozenNorm, contributions, decompose
from trainers.tracking.structure import Structure

STACKS = {
    "post_norm": ("encoder.layers", "decoder.layers"),
    "pre_norm": ("encoder.layers", "decoder.layers"),
    "connection": ("decoder.layers",),
    "gpt2": ("h",),
    "llama": ("layers",),
    "gpt_neox": ("layers",),
    "bart": ("encoder.layers", "decoder.layers"),
}


def taken_apart(model, batch):
    structure = Structure(model)
    recorder = Recorder(structure, Wanted(set(structure.names), residual=True), {})
    with torch.no_grad(), recorder:
        outputs = model(**batch)
    stacks = structure.stacks()
    return {stack: decompose([recorder.calls[layer.name] for layer in stacks[stack]]) for stack in stacks}, outputs


def with_moved_norms(model):
    """Norms with weights and biases that are not 1 and 0, so that nothing is hidden by their initial values."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if "norm" in type(module).__name__.lower():
                for parameter in module.parameters():
                    parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


@pytest.mark.parametrize("name", STACKS)
def test_components_add_up(name):
    model = with_moved_norms(make_model(name)).double()
    found, _ = taken_apart(model, make_batch(model))
    assert tuple(found) == STACKS[name]
    for stack, decomposition in found.items():
        assert decomposition.components.dtype == torch.float64
        assert decomposition.error() < 1e-12
        assert decomposition.names[0] == "input"
        assert len(decomposition.writes) == {"encoder.layers": 4, "decoder.layers": 6}.get(stack, 4)
        assert ("bias" in "".join(decomposition.names)) == (name in ("post_norm", "bart"))
        numbers = contributions(decomposition)["components"]
        assert sum(entry["signed_share"] for entry in numbers.values()) == pytest.approx(1, abs=1e-12)
        assert sum(entry["norm_share"] for entry in numbers.values()) == pytest.approx(1, abs=1e-12)
    single = make_model(name)
    for decomposition in taken_apart(single, make_batch(single))[0].values():
        assert decomposition.error() < 1e-5


def test_numbers_of_a_sublayer():
    model = make_model("gpt2").double()
    batch = make_batch(model)
    found, _ = taken_apart(model, batch)
    kept = {}
    model.transformer.h[1].attn.register_forward_hook(lambda module, args, output: kept.update(x=output[0]))
    model.transformer.h[1].register_forward_pre_hook(lambda module, args: kept.update(r=args[0]))
    with torch.no_grad():
        model(**batch)
    real = batch["attention_mask"].bool()
    written, before, final = kept["x"][real], kept["r"][real], found["h"].final[real]
    entry = contributions(found["h"], real)["components"]["h.1.attn"]
    assert entry["relative_write"] == pytest.approx((written.norm(dim=-1) / before.norm(dim=-1)).mean().item())
    assert entry["cosine"] == pytest.approx(torch.cosine_similarity(written, before, dim=-1).mean().item())
    share = (written * final).sum(-1) / final.square().sum(-1)
    assert entry["signed_share"] == pytest.approx(share.mean().item())


@pytest.mark.parametrize(
    ("name", "final_norm", "head"),
    [
        ("gpt2", lambda model: model.transformer.ln_f, lambda model: model.lm_head),
        ("llama", lambda model: model.model.norm, lambda model: model.lm_head),
        ("post_norm", lambda model: model.model.decoder.final_norm, lambda model: model.lm_head),
    ],
)
def test_logit_attribution_sums_to_the_difference_of_logits(name, final_norm, head):
    model = with_moved_norms(make_model(name)).double()
    found, outputs = taken_apart(model, make_batch(model))
    decomposition = found[list(found)[-1]]
    weight = head(model).weight
    # Llama's norm computes in single precision whatever it is given.
    names, parts = direct_logit_attribution(decomposition, weight[7] - weight[11], final_norm(model))
    assert len(names) == len(parts)
    torch.testing.assert_close(parts.sum(0), outputs.logits[..., 7] - outputs.logits[..., 11], rtol=0, atol=1e-7)


@pytest.mark.parametrize("norm", [torch.nn.LayerNorm(8), torch.nn.RMSNorm(8, eps=1e-6)])
def test_frozen_norms(norm):
    norm = with_moved_norms(torch.nn.Sequential(copy.deepcopy(norm)))[0].double()
    parts = torch.randn(3, 5, 8, dtype=torch.float64)
    frozen = FrozenNorm(norm, parts.sum(0))
    torch.testing.assert_close(frozen(parts.sum(0)), norm(parts.sum(0)))
    bias = 0 if frozen.bias is None else frozen.bias
    torch.testing.assert_close(sum(frozen.linear(part) for part in parts) + bias, norm(parts.sum(0)))


@pytest.mark.parametrize("name", ["t5", "gemma2"])
def test_other_layers_say_so(name):
    model = make_model(name)
    report = TransformerAnalyzer(model).comprehensive_analysis(make_batch(model))
    for found in report["residual"].values():
        assert "does not add up" in found["problem"]
        assert found["components"] == {}
        assert found["error"] is None
