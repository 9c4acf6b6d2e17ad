"""Layer-wise learning rates: every parameter in one group, with the rate of its depth."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

import hf_models  # noqa: F401 - registers our architectures
from trainers.optimization import layer_depths, layerwise_parameter_groups


def gpt2():
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model("gpt2", n_embd=8, n_layer=3, n_head=2, n_positions=8, vocab_size=10)
    )


def vanilla():
    sizes = {"vocab_size": 10, "hidden_size": 8, "num_hidden_layers": 2, "num_decoder_layers": 3}
    return AutoModelForSeq2SeqLM.from_config(
        AutoConfig.for_model("vanilla_transformer", num_attention_heads=2, intermediate_size=8, **sizes)
    )


def test_depths():
    depths = layer_depths(gpt2())
    assert depths["transformer.wte.weight"] == depths["transformer.wpe.weight"] == 4
    assert [depths[f"transformer.h.{layer}.attn.c_attn.weight"] for layer in range(3)] == [3, 2, 1]
    assert depths["transformer.ln_f.weight"] == 0
    depths = layer_depths(vanilla())
    assert depths["model.encoder.embed_tokens.weight"] == 4
    assert [depths[f"model.encoder.layers.{layer}.self_attn.q_proj.weight"] for layer in range(2)] == [2, 1]
    assert [depths[f"model.decoder.layers.{layer}.self_attn.q_proj.weight"] for layer in range(3)] == [3, 2, 1]


def test_groups():
    model = gpt2()
    model.transformer.wpe.weight.requires_grad_(False)
    decaying = [name for name, p in model.named_parameters() if p.dim() > 1]
    groups = layerwise_parameter_groups(model, 1e-2, 0.1, 0.5, decaying)
    found = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert len(found) == sum(len(group["params"]) for group in groups)
    assert set(found) == {id(p) for p in model.parameters() if p.requires_grad}
    assert found[id(model.transformer.h[0].mlp.c_fc.weight)] == (1e-2 * 0.5**3, 0.1)
    assert found[id(model.transformer.h[2].ln_1.bias)] == (1e-2 * 0.5, 0.0)
    assert found[id(model.transformer.wte.weight)] == (1e-2 * 0.5**4, 0.1)
    assert found[id(model.transformer.ln_f.weight)] == (1e-2, 0.0)


def test_a_factor_of_one_is_plain_training():
    torch.manual_seed(0)
    one, other = vanilla().eval(), vanilla().eval()
    other.load_state_dict(one.state_dict())
    batch = {"input_ids": torch.arange(4, 8)[None], "labels": torch.arange(3, 6)[None]}
    names = [name for name, _ in one.named_parameters()]
    optimizers = [
        torch.optim.AdamW(one.parameters(), lr=1e-2, weight_decay=0.1),
        torch.optim.AdamW(layerwise_parameter_groups(other, 1e-2, 0.1, 1.0, names), lr=1e-2),
    ]
    for model, optimizer in zip((one, other), optimizers, strict=True):
        for _ in range(2):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-7)


@pytest.mark.parametrize("decay", [0.0, -1.0, 1.5])
def test_a_factor_out_of_range(decay):
    with pytest.raises(ValueError, match="layerwise_lr_decay"):
        layerwise_parameter_groups(gpt2(), 1e-2, 0.0, decay, [])
