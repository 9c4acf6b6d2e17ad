"""A trace shows the model's own values: golden numbers, the library's own outputs, plain forms, and every misuse."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    set_seed,
)
from transformers.models.gpt2.modeling_gpt2 import eager_attention_forward

import hf_models  # noqa: F401 - registers our own architectures with the Auto classes
from hf_models.connection_transformer.connections_connection_transformer import CONNECTION_TYPES
from hf_models.vanilla_transformer import VanillaTransformerConfig, convert_vanilla_transformer
from trainers.errors import UserError
from trainers.tasks.tokenization import word_level
from trainers.trace import main, trace
from trainers.tracing import ModelInputs, prepare, recorded, statistics_of
from trainers.tracing.compare import compare, make_variants
from trainers.tracing.explain import strongest_connections
from trainers.tracing.torch_transformer import TorchTransformer, convert_to_torch

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "transformer"
IDS = {"vocab_size": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL = {
    **IDS,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
SLOTS = {"num_slots": 8, "connection_rank": 4, "num_decoder_layers": 2, "num_attention_heads": 4, "hidden_size": 16}
THOUGHT = {"d_model": 32, "d_input": 16, "heads": 2, "n_synch_out": 8, "n_synch_action": 8, "synapse_depth": 2}
THOUGHT |= {"iterations": 5, "memory_length": 4, "memory_hidden_dims": 4, "out_dims": 10, "num_labels": 10}
# model_type -> Auto class, configuration, prefix of its layers.
TEXT_MODELS = {
    "gpt2": (AutoModelForCausalLM, {**IDS, "n_embd": 16, "n_layer": 2, "n_head": 4}, "layer"),
    "llama": (AutoModelForCausalLM, {**SMALL, "num_key_value_heads": 2}, "layer"),
    "qwen3": (AutoModelForCausalLM, {**SMALL, "num_key_value_heads": 2, "head_dim": 8}, "layer"),
    "gemma2": (AutoModelForCausalLM, {**SMALL, "num_key_value_heads": 2, "head_dim": 8}, "layer"),
    "gpt_neox": (AutoModelForCausalLM, SMALL, "layer"),
    "olmo2": (AutoModelForCausalLM, {**SMALL, "num_key_value_heads": 2}, "layer"),
    "opt": (AutoModelForCausalLM, {**SMALL, "ffn_dim": 24, "word_embed_proj_dim": 16}, "decoder"),
    "bert": (AutoModelForSequenceClassification, SMALL, "encoder"),
    "t5": (
        AutoModelForSeq2SeqLM,
        {**IDS, "d_model": 16, "d_ff": 24, "d_kv": 4, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
        "encoder",
    ),
    "vanilla_transformer": (AutoModelForSeq2SeqLM, SMALL, "encoder"),
    "connection_transformer": (AutoModelForSeq2SeqLM, {**IDS, **SLOTS}, "decoder"),
}


def build(auto_class, model_type: str, **settings):
    set_seed(0)
    options = settings.pop("options", {})
    return auto_class.from_config(AutoConfig.for_model(model_type, **settings), **options).eval()


def with_large_weights(model):
    """Weights so large that attention is far from uniform: then a wrong scale, mask or cap shows."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and re.search("attn|attention", name, re.IGNORECASE):
                parameter.mul_(20)
    return model


def values(walk, block: str, start: str) -> list[torch.Tensor]:
    """Tensors of the lines of one layer whose text begins like this."""
    return [record.tensor for record in walk.records if record.block == block and record.what.startswith(start)]


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["paper_tiny", "torch_default_final_norm"])
def test_golden_values(name, kernel, tmp_path):
    """Embeddings, layer outputs and every attention map of `torch.nn.Transformer`, padded batch included."""
    folder = GOLDEN / name
    arguments = [str(folder / "config.json"), str(folder / "weights.safetensors"), str(tmp_path / "model")]
    assert convert_vanilla_transformer.main(arguments) == 0
    numbers = load_file(folder / "io.safetensors")
    source, target = numbers["src"], numbers["tgt_in"]
    masks = {"attention_mask": (source != 0).long(), "decoder_attention_mask": (target != 0).long()}
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "model", attn_implementation=kernel)
    walk, facts = trace(model, None, ModelInputs({"input_ids": source, "decoder_input_ids": target, **masks}))
    attention = facts["attention"]
    assert attention["calls"] == attention["reproduced"] == len(walk.checks) > 0
    real = {"encoder": source != 0, "decoder": target != 0}
    for stack, layers in (("encoder", model.config.num_hidden_layers), ("decoder", model.config.num_decoder_layers)):
        start = values(walk, f"{stack}.0", "inputs of the layer")[0]
        embedded = numbers["embedded_src" if stack == "encoder" else "embedded_tgt"]
        torch.testing.assert_close(start[real[stack]], embedded[real[stack]], atol=1e-5, rtol=0)
        for index in range(layers):
            block = f"{stack}.{index}"
            (state,) = values(walk, block, "output of the layer")
            expected = numbers[f"hidden.{stack}.{index}"]
            torch.testing.assert_close(state[real[stack]], expected[real[stack]], atol=1e-5, rtol=0)
            maps = values(walk, block, "attention weights")
            kinds = ["self"] if stack == "encoder" else ["self", "cross"]
            for found, kind in zip(maps, kinds, strict=True):
                rows = real[stack][:, None, :, None].expand_as(found)
                expected = numbers[f"attn.{stack}.{index}.{kind}"]
                torch.testing.assert_close(found[rows], expected[rows], atol=1e-5, rtol=0)


@pytest.mark.parametrize("model_type", TEXT_MODELS)
def test_text_models(model_type):
    """Under the fused kernel every call is reproduced, and weights are those that the written-out kernel returns."""
    auto_class, settings, prefix = TEXT_MODELS[model_type]
    kernel = "eager" if model_type == "gemma2" else "sdpa"
    model = with_large_weights(build(auto_class, model_type, **settings, options={"attn_implementation": kernel}))
    target = "9 10 2" if model.config.is_encoder_decoder else None
    inputs = prepare(model, None, "5 6 7 8 9 2", target, ids=True)
    walk, facts = trace(model, None, inputs)
    assert facts["attention"]["calls"] == facts["attention"]["reproduced"] == len(walk.checks) >= 2
    stages = {record.stage for record in walk.records}
    assert stages >= {"embedding", "norm", "attention", "residual", "feed_forward", "input", "layer", "output"}
    for start in ("q after", "k after", "v after", "after the activation", "residual sum", "before ", "after "):
        assert values(walk, f"{prefix}.0", start) or (model_type == "gpt_neox" and start[0] in "qkv"), start
    written_out = build(auto_class, model_type, **settings, options={"attn_implementation": "eager"})
    written_out.load_state_dict(model.state_dict())
    with torch.no_grad():
        outputs = written_out(**inputs.arguments, output_attentions=True, output_hidden_states=True)
    kinds = ("encoder_attentions", "decoder_attentions", "attentions")
    expected = [found for kind in kinds for found in getattr(outputs, kind, None) or ()]
    found = [
        record.tensor for record in walk.records if record.what == "attention weights" and record.stage == "attention"
    ]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
        assert other.std() > 0.01 or other.shape[-1] == 1  # far from uniform, or the comparison says little
    crossed = [
        record.tensor
        for record in walk.records
        if (record.stage, record.what) == ("cross_attention", "attention weights")
    ]
    for one, other in zip(crossed, getattr(outputs, "cross_attentions", None) or (), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    (logits,) = (record.tensor for record in walk.records if record.what.startswith("logits"))
    torch.testing.assert_close(logits, outputs.logits, atol=1e-5, rtol=1e-4)


def test_each_line_of_a_layer_follows_from_those_before_it():
    model = with_large_weights(build(AutoModelForSeq2SeqLM, "vanilla_transformer", **SMALL)).double()
    walk, _ = trace(model, None, prepare(model, None, "5 6 7 8 2", "9 10 2", ids=True))
    layer = model.model.decoder.layers[1]
    records = [record for record in walk.records if record.block == "decoder.1"]
    assert [record.stage for record in records[:2]] == ["input", "attention"]

    def line(start: str, stage: str) -> torch.Tensor:
        return next(record.tensor for record in records if record.what.startswith(start) and record.stage == stage)

    def near(one: torch.Tensor, other: torch.Tensor) -> None:
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-10)

    inputs = line("inputs of the layer", "input")
    for stage, attention, read in (
        ("attention", layer.self_attn, inputs),
        ("cross_attention", layer.cross_attn, values(walk, "encoder.1", "output of the layer")[0]),
    ):
        state = inputs if stage == "attention" else line("after self_attn_norm", "norm")
        near(line("q after q_proj", stage), attention.q_proj(state))
        near(line("k after k_proj", stage), attention.k_proj(read))
        assert line("q reshaped", stage).shape == (1, 4, 3, 4)
        near(line("q reshaped", stage), line("q after", stage).view(1, 3, 4, 4).transpose(1, 2))
        scores = line("q reshaped", stage) @ line("k reshaped", stage).transpose(-1, -2) / 2
        near(line("scores", stage), scores)
        visible = line("mask", stage)
        assert visible.dtype == torch.bool
        assert visible.sum() == (4 * 6 if stage == "attention" else 4 * 3 * 5)
        near(line("attention weights", stage), scores.masked_fill(~visible, -torch.inf).softmax(-1))
        heads = line("attention weights", stage) @ line("v reshaped", stage)
        near(line("attention per head", stage), heads)
        near(line("heads merged", stage), heads.transpose(1, 2).flatten(2))
        near(line("attention output", stage), attention.out_proj(line("heads merged", stage)))
    near(line("residual sum: inputs + attention output", "residual"), inputs + line("attention output", "attention"))
    near(line("before self_attn_norm", "norm"), line("residual sum", "residual"))
    near(line("after self_attn_norm", "norm"), layer.self_attn_norm(line("before self_attn_norm", "norm")))
    near(line("after fc1: before", "feed_forward"), layer.feed_forward.fc1(line("after cross_attn_norm", "norm")))
    near(line("after the activation", "feed_forward"), line("after fc1", "feed_forward").relu())
    total = line("residual sum: output of cross_attn_norm + feed-forward output", "residual")
    near(total, line("after cross_attn_norm", "norm") + line("after fc2", "feed_forward"))
    near(line("output of the layer", "layer"), layer.feed_forward_norm(total))
    outer = [record for record in walk.records if not record.block and record.stack == "encoder"]
    assert [record.what for record in outer] == [
        "embedding (embed_tokens)",
        "token embedding times 4",
        "positions (sinusoidal)",
        "embedding and positions added",
    ]
    near(outer[1].tensor + outer[2].tensor, outer[3].tensor)
    assert [record.what for record in walk.records[-2:]] == ["logits, after lm_head", "loss"]


def test_a_kernel_that_does_something_else_is_not_shown_as_if_it_did_not():
    """Scores changed inside the kernel: no scores are shown, and weights only if the kernel returns its own."""

    def sharper(module, query, key, value, attention_mask, scaling=None, **options):
        options.pop("dropout", None)
        return eager_attention_forward(module, query, key, value, attention_mask, scaling=2 * scaling, **options)

    def silent(*args, **options):
        return sharper(*args, **options)[0], None

    settings = TEXT_MODELS["gpt2"][1]
    for name, kernel in (("sharper", sharper), ("silent", silent)):
        AttentionInterface.register(name, kernel)
        try:
            model = with_large_weights(build(AutoModelForCausalLM, "gpt2", **settings))
            model.config._attn_implementation = name
            walk, facts = trace(model, None, prepare(model, None, "5 6 7 8", ids=True))
        finally:
            del AttentionInterface._global_mapping[name]
        assert (facts["attention"]["calls"], facts["attention"]["reproduced"]) == (2, 0)
        assert not values(walk, "layer.0", "scores:")
        (weights,) = values(walk, "layer.0", "attention weights") or [None]
        notes = [record.note for record in walk.records if record.note]
        assert len(notes) == 2
        assert "differs from the kernel's output by" in notes[0]
        if name == "silent":
            assert weights is None
        else:
            (query,), (key,) = values(walk, "layer.0", "q reshaped"), values(walk, "layer.0", "k reshaped")
            torch.testing.assert_close(weights, (query @ key.transpose(-1, -2)).softmax(-1), atol=1e-5, rtol=0)


def test_models_whose_attention_cannot_be_seen():
    model = build(AutoModelForCausalLM, "bloom", **IDS, hidden_size=16, n_layer=2, n_head=4)
    walk, facts = trace(model, None, prepare(model, None, "5 6 7", ids=True))
    assert facts["attention"] == {"calls": 0, "reproduced": 0, "largest_difference": None}
    notes = [record.note for record in walk.records if record.note]
    assert len(notes) == 2
    assert "does not use the library's attention interface" in notes[0]


def test_nothing_of_the_model_changes():
    model = build(*TEXT_MODELS["vanilla_transformer"][:1], "vanilla_transformer", **SMALL)
    inputs = prepare(model, None, "5 6 7 2", "8 2", ids=True)
    interface = AttentionInterface.get_interface
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    with torch.no_grad():
        before = model(**inputs.arguments).logits
        with recorded(model):
            watched = model(**inputs.arguments).logits
        after = model(**inputs.arguments).logits
    assert torch.equal(before, watched)
    assert torch.equal(before, after)
    assert hooks == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    assert AttentionInterface.get_interface is interface


def test_statistics():
    found = statistics_of(torch.tensor([[1.0, 2.0], [3.0, 6.0]]))
    assert (found.mean, found.min, found.max, found.non_finite) == (3.0, 1.0, 6.0, 0)
    assert found.std == pytest.approx(np.std([1, 2, 3, 6], ddof=1))
    broken = statistics_of(torch.tensor([torch.nan, 1.0, torch.inf, 3.0], dtype=torch.bfloat16))
    assert (broken.mean, broken.min, broken.max, broken.non_finite) == (2.0, 1.0, 3.0, 2)
    assert statistics_of(torch.tensor([torch.nan])).mean is None
    assert statistics_of(torch.tensor(2)).std is None
    assert statistics_of(torch.tensor([True, False])).mean == 0.5


@pytest.mark.parametrize("connection_type", CONNECTION_TYPES)
def test_messages_between_slots(connection_type):
    """Messages add up to the influence, and what they carry equals `x_i M_ij` written out through the rectifier."""
    settings = {**IDS, **SLOTS, "connection_type": connection_type}
    model = build(AutoModelForSeq2SeqLM, "connection_transformer", **settings).double()
    connections = model.model.encoder.reasoning.step.connections
    states = torch.randn(1, 8, 16, dtype=torch.float64)
    identity = torch.eye(16, dtype=torch.float64)
    matrices = torch.zeros(8, 8, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        prepared = connections.prepare(1, None)[0]
        for source in range(8):
            probes = torch.zeros(16, 8, 16, dtype=torch.float64)
            probes[:, source] = identity
            matrices[source] = connections(probes, prepared).transpose(0, 1)
        update = connections(states, prepared)[0].relu()
    messages = torch.einsum("id,ijde->ije", states[0], matrices) * (update > 0)
    torch.testing.assert_close(messages.sum(0), update)
    strength = messages.norm(dim=-1)
    share = torch.einsum("ije,je->ij", messages, update) / update.square().sum(-1)
    torch.testing.assert_close(share.sum(0), torch.ones(8, dtype=torch.float64))
    found = strongest_connections(connections, states, 8 * 7)
    assert [item["carried"] for item in found] == sorted((item["carried"] for item in found), reverse=True)
    assert len({(item["source"], item["target"]) for item in found}) == 8 * 7
    for item in found:
        place = item["source"], item["target"]
        assert item["source"] != item["target"] or item["carried"] == 0
        assert item["carried"] == pytest.approx(strength[place].item(), abs=1e-12)
        assert item["share"] == pytest.approx(share[place].item(), abs=1e-12)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"halting_threshold": 0.3}, r"stopped after step \d: the relative change of the slots was .* at most .* 0.3"),
        (
            {"halting_threshold": 0.0, "max_reasoning_steps": 2},
            "took all 2 steps that it may: the relative change .* 0$",
        ),
        ({"halting": "update_norm", "halting_threshold": 99}, "stopped after step 1: the largest update of a slot was"),
        ({"halting": "none", "max_reasoning_steps": 3}, "took all 3 steps: halting is off"),
    ],
)
def test_explanation_of_an_answer(settings, reason):
    model = build(AutoModelForSeq2SeqLM, "connection_transformer", **{**IDS, **SLOTS, **settings})
    inputs = prepare(model, None, "5 6 7 8 9 2", "10 2", ids=True)
    walk, facts = trace(model, None, inputs, top=3)
    explanation = facts["explanation"]
    options = {"output_halting_measures": True, "output_compression_weights": True}
    with torch.no_grad():
        outputs = model(**inputs.arguments, **options)
    steps = int(outputs.reasoning_steps[0])
    assert explanation["halting"]["steps"] == len(explanation["steps"]) == steps
    assert re.search(reason, explanation["halting"]["reason"])
    for number, step in enumerate(explanation["steps"]):
        if settings.get("halting") == "none":
            assert step["measure"] is None
        else:
            assert step["measure"] == pytest.approx(outputs.halting_measures[number].item(), rel=1e-4)
        assert len(step["connections"]) == 3
    weights = outputs.compression_weights[0][0]
    for slot in explanation["slots"]:
        for item in slot["tokens"]:
            assert item["weight"] == pytest.approx(weights[item["position"], slot["slot"]].item(), rel=1e-5)
            assert item["token"] == inputs.source[item["position"]]
        assert slot["tokens"][0]["weight"] == pytest.approx(weights[:, slot["slot"]].max().item(), rel=1e-5)
    assert [row["token"] for row in explanation["read"]] == ["10", "2"]
    model.set_attn_implementation("eager")
    with torch.no_grad():
        crossed = model(**inputs.arguments, output_attentions=True).cross_attentions
    reading = torch.stack(crossed)[:, 0].mean(dim=(0, 1))
    for row, expected in zip(explanation["read"], reading, strict=True):
        for item in row["slots"]:
            assert item["weight"] == pytest.approx(expected[item["slot"]].item(), abs=1e-6)
    listed = {slot["slot"] for slot in explanation["slots"]}
    assert reading.mean(dim=0).argmax().item() in listed
    assert len(listed) == len(explanation["slots"])
    shown = {record.block for record in walk.records if record.stage == "reasoning"}
    assert shown == {f"step.{number + 1}" for number in range(steps)}
    assert "scores: q · k, scaled (tokens by slots)" in {record.what for record in walk.records}


def test_the_head_that_answers_in_one_pass():
    model = build(AutoModelForMaskedLM, "connection_transformer", **{**IDS, **SLOTS})
    walk, facts = trace(model, None, prepare(model, None, "5 6 7 2", ids=True))
    shown = [record.what for record in walk.records if record.stage == "expansion"]
    assert shown[-3:] == [
        "scores: q · k, scaled (tokens by slots)",
        "weights of the slots for each token",
        "slots read out at the tokens' positions",
    ]
    assert facts["explanation"]["read"] == []
    assert facts["answer"]["kind"] == "tokens"
    assert len(facts["answer"]["tokens"]) == 4


@pytest.mark.parametrize(
    ("threshold", "reason"), [(None, "took all 5 ticks"), (0.0, "stopped after tick 1"), (1.0, "stayed")]
)
def test_ticks(threshold, reason):
    model = build(
        AutoModelForImageClassification, "continuous_thought_machine", **THOUGHT, certainty_threshold=threshold
    )
    inputs = prepare(model, None, "random:1")
    walk, facts = trace(model, None, inputs)
    with torch.no_grad():
        outputs = model(**inputs.arguments)
    explanation = facts["explanation"]
    assert reason in explanation["halting"]["reason"]
    assert [row["tick"] for row in explanation["ticks"]] == list(range(1, int(outputs.ticks[0]) + 1))
    for row in explanation["ticks"]:
        assert row["certainty"] == pytest.approx(outputs.certainties[0, 1, row["tick"] - 1].item(), abs=1e-6)
        assert row["answer"] == [outputs.predictions[0, :, row["tick"] - 1].argmax().item()]
        assert row["looked_at"][0]["weight"] >= row["looked_at"][-1]["weight"]
    stages = {record.stage for record in walk.records if record.block == "tick.1"}
    assert stages == {"synchronisation", "attention", "synapse", "neurons"}
    assert facts["attention"]["calls"] == facts["attention"]["reproduced"] > 0
    again = prepare(model, None, "random:1").arguments["pixel_values"]
    assert torch.equal(again, inputs.arguments["pixel_values"])


def test_models_that_read_numbers(tmp_path):
    parity = {**THOUGHT, "out_dims": 16, "prediction_reshaper": [8, 2], "num_labels": 2}
    parity |= {"backbone_type": "parity_backbone", "positional_embedding_type": "custom-rotational-1d"}
    model = build(AutoModelForTokenClassification, "continuous_thought_machine", **parity)
    walk, facts = trace(model, None, prepare(model, None, "1 -1 1 1, -1 1 -1 1"))
    assert len(facts["explanation"]["ticks"][0]["answer"]) == 8
    assert any(record.stage == "positions" for record in walk.records)
    drawn = [prepare(model, None, text).arguments["input_values"] for text in ("random:3", "random:3", "random:4")]
    assert drawn[0].shape == (1, 8), "a sign for each pair of logits"
    assert set(drawn[0].flatten().tolist()) == {-1, 1}
    assert drawn[0].equal(drawn[1])
    assert not drawn[0].equal(drawn[2])
    with pytest.raises(
        UserError, match=r"^text: .*TokenClassification reads numbers, got '1 x'; give numbers, random or"
    ):
        prepare(model, None, "1 x")
    features = {"backbone_type": "none", "positional_embedding_type": "none", "num_channels": 5}
    features = build(AutoModel, "continuous_thought_machine", **THOUGHT, **features)
    assert prepare(features, None, "random").arguments["input_features"].shape[:2] == (1, 5)

    dense = build(
        AutoModel, "in_context_transformer", n_dims=3, hidden_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    points = np.random.default_rng(0).normal(size=(1, 4, 3))
    np.savez(tmp_path / "prompt.npz", input_values=points, context_values=points.sum(-1))
    inputs = prepare(dense, None, str(tmp_path / "prompt.npz"))
    walk, facts = trace(dense, None, inputs)
    with torch.no_grad():
        expected = dense(**inputs.arguments).last_hidden_state
    assert torch.equal(walk.records[-1].tensor, expected)
    assert facts["attention"]["reproduced"] == 2
    sparse = {"n_dims": 3, "block_size": 4, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
    for name, settings in (("in_context_transformer", {}), ("low_rank_in_context_transformer", sparse)):
        model = build(AutoModel, name, **settings) if settings else dense
        _, facts = trace(model, None, prepare(model, None, "random"))
        assert facts["attention"]["calls"] == facts["attention"]["reproduced"] > 0

    with pytest.raises(
        UserError, match=r"^text: LowRankInContextTransformerModel cannot read it: input_values of shape"
    ):
        trace(model, None, prepare(model, None, "1 2 3"))

    np.savez(tmp_path / "other.npz", values=points)
    np.savez(tmp_path / "none.npz", input_values=points, context_values=points[:, :0, 0])
    np.savez(tmp_path / "half.npz", context_values=points.sum(-1))
    (tmp_path / "no.npz").write_text("nothing")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "half.npz").read_bytes()[:100])
    (tmp_path / "empty.npz").touch()
    for text, message in {
        "a cat": "reads input_values; give random",
        str(tmp_path / "other.npz"): "array 'values' is unknown; InContextTransformerModel takes input_values",
        str(tmp_path / "half.npz"): "array 'input_values' is missing",
        str(tmp_path / "no.npz"): "cannot read",
        str(tmp_path / "gone.npz"): "cannot read",
        str(tmp_path / "none.npz"): "none.npz: array 'context_values' holds no numbers",
        str(tmp_path / "cut.npz"): "cannot read",
        str(tmp_path / "empty.npz"): "cannot read",
    }.items():
        with pytest.raises(UserError, match=re.escape(message)):
            prepare(dense, None, text)
    with pytest.raises(UserError, match="takes no target text"):
        prepare(dense, None, "random", "target")


@pytest.mark.parametrize("norm_position", ["post", "pre"])
@pytest.mark.parametrize("final_layer_norm", [False, True])
def test_torch_transformer_gives_the_same(norm_position, final_layer_norm):
    settings = {**SMALL, "num_decoder_layers": 3, "norm_position": norm_position, "final_layer_norm": final_layer_norm}
    hidden_act = "gelu" if final_layer_norm else "relu"
    positions = "learned" if norm_position == "pre" else "sinusoidal"
    settings |= {"hidden_act": hidden_act, "position_embedding_type": positions}
    model = build(AutoModelForSeq2SeqLM, "vanilla_transformer", **settings).double()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms that are not zero and one
            parameter.add_(0.05 * torch.randn_like(parameter))
    source, target = torch.randint(3, 48, (3, 7)), torch.randint(3, 48, (3, 5))
    with torch.no_grad():
        expected = model(input_ids=source, decoder_input_ids=target).logits
        found = TorchTransformer(model)(source, target)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)


def test_comparison():
    model = build(AutoModelForSeq2SeqLM, "vanilla_transformer", **{**SMALL, "num_decoder_layers": 3}).double()
    arguments = {"input_ids": torch.randint(3, 48, (3, 7)), "decoder_input_ids": torch.randint(3, 48, (3, 5))}
    result = compare(make_variants(model, ["eager", "sdpa", "torch"], arguments), model.device, repeats=2)
    names = ["encoder.0", "encoder.1", "decoder.0", "decoder.1", "decoder.2", "logits"]
    assert [row["layer"] for row in result["layers"]] == names
    for row in result["layers"]:
        assert row["largest"] > 0.1
        assert set(row["difference"]) == {"sdpa", "torch"}
        assert max(row["difference"].values()) < 1e-12
    assert [variant["name"] for variant in result["variants"]] == ["eager", "sdpa", "torch"]
    assert all(variant["peak_bytes"] > 0 for variant in result["variants"])


def test_converter_to_torch_inverts_the_converter_from_torch():
    folder = GOLDEN / "torch_default_final_norm"
    original = load_file(folder / "weights.safetensors")
    config = convert_vanilla_transformer.convert_config(json.loads((folder / "config.json").read_text()))
    ours = convert_vanilla_transformer.convert_tensors(original, config)
    back = convert_to_torch(ours, config)
    expected = {name.removeprefix("core."): value for name, value in original.items() if name.startswith("core.")}
    assert back.keys() == expected.keys()
    assert all(torch.equal(back[name], value) for name, value in expected.items())


def test_peak_memory_tells_the_kernels_apart():
    """Written-out attention holds scores and weights of all heads at once; the fused kernel does not."""
    model = build(AutoModelForCausalLM, "gpt2", **{**TEXT_MODELS["gpt2"][1], "n_positions": 256, "vocab_size": 50})
    inputs = {"input_ids": torch.randint(50, (2, 256)), "use_cache": False}
    result = compare(make_variants(model, ["eager", "sdpa"], inputs), model.device, repeats=2)
    eager, fused = (variant["peak_bytes"] for variant in result["variants"])
    one_map = 2 * 4 * 256 * 256 * 4
    assert eager > 2 * one_map > fused
    assert max(row["difference"]["sdpa"] for row in result["layers"]) < 1e-4


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """Folders as runs leave them, with a tokenizer of words."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = word_level(["the", "cat", "sat", "on", "a", "mat", "who", "is", "there", "dog"], 64)
    ids = {**IDS, "vocab_size": len(tokenizer)}
    small = {**SMALL, **ids, "max_position_embeddings": 12}
    made = {
        "vanilla": build(AutoModelForSeq2SeqLM, "vanilla_transformer", **small),
        "learned": build(AutoModelForSeq2SeqLM, "vanilla_transformer", **small, position_embedding_type="learned"),
        "classes": build(AutoModelForSequenceClassification, "vanilla_transformer", **small, num_labels=3),
        "choice": build(AutoModelForMultipleChoice, "vanilla_transformer", **small),
        "body": build(AutoModel, "vanilla_transformer", **small),
        "slots": build(AutoModelForSeq2SeqLM, "connection_transformer", **{**ids, **SLOTS}),
        "gpt2": build(AutoModelForCausalLM, "gpt2", **{**TEXT_MODELS["gpt2"][1], **ids, "n_positions": 12}),
        "mamba": build(
            AutoModelForCausalLM, "mamba", **ids, hidden_size=16, num_hidden_layers=1, state_size=4, expand=1
        ),
        "ctm": build(AutoModelForImageClassification, "continuous_thought_machine", **THOUGHT),
        "bare": build(AutoModelForCausalLM, "gpt2", **{**TEXT_MODELS["gpt2"][1], **ids}),
    }
    with torch.no_grad():
        made["bare"].transformer.h[1].mlp.c_fc.weight[0, 0] = torch.nan
    for name, model in made.items():
        model.save_pretrained(folder / name)
        if name not in ("ctm", "bare"):
            tokenizer.save_pretrained(folder / name)
    return folder


def test_the_printed_walk(folders, capsys):
    assert main([str(folders / "vanilla"), "the cat sat", "who is", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    number = r"-?\d[\d.e+-]*"
    four = rf"{number} {number} {number} {number}"
    place = lines.index("encoder.0")
    for pattern in (
        rf"input inputs of the layer \[1, 4, 16\] {four}",
        rf"attention q after q_proj \[1, 4, 16\] {four}",
        rf"attention q reshaped per head \[1, 4, 4, 4\] {four}",
        rf"attention attention weights \[1, 4, 4, 4\] 0.25 {number} {number} {number}",
        rf"attention attention output, after out_proj \[1, 4, 16\] {four}",
        rf"residual residual sum: inputs \+ attention output \[1, 4, 16\] {four}",
        rf"feed_forward after the activation \[1, 4, 24\] {four}",
    ):
        place = next(index for index in range(place, len(lines)) if re.fullmatch(pattern, lines[index]))
    assert lines[1] == "source 4 tokens: 'the' 'cat' 'sat' '<eos>'"
    assert lines[2] == "target 3 tokens: 'who' 'is' '<eos>'"
    assert any(line.startswith("attention 6 of 6 calls of the kernel, written out, agree") for line in lines)
    assert any(re.match(r"target 'who' 0\.\d+, 'is' 0\.\d+, '<eos>' 0\.\d+", line) for line in lines)


def test_json(folders, capsys):
    assert main([str(folders / "slots"), "who is there", "--json", "--layer", "step.1,1", "--top", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["schema_version"] == 1
    assert found["model"]["class"] == "ConnectionTransformerForConditionalGeneration"
    assert {record["block"] for record in found["records"]} == {"step.1", "decoder.1"}
    record = found["records"][0]
    assert record.keys() == {
        "stage",
        "stack",
        "block",
        "what",
        "module",
        "shape",
        "dtype",
        "mean",
        "std",
        "min",
        "max",
    } | {"non_finite"}
    assert "greedy answer" in found["inputs"]["remark"]
    assert 2 <= len(found["explanation"]["slots"]) <= 4
    assert found["attention"]["calls"] == found["attention"]["reproduced"] == 4


@pytest.mark.parametrize(
    ("name", "words", "texts"),
    [
        (
            "gpt2",
            ["the cat", "--only", "attention", "--layer", "1"],
            ["layer.1", "next token", "scores: q · k, scaled"],
        ),
        ("gpt2", ["the cat", "sat"], ["target", "'sat'", "loss"]),
        ("gpt2", ["5 6 7", "--ids"], ["source     3 tokens: 'cat' 'sat' 'on'"]),
        ("classes", ["the cat", "--only", "encoder"], ["classes    0.", "encoder.1"]),
        ("choice", ["the cat"], ["the text is read as the only choice"]),
        ("body", ["the cat", "sat", "--only", "cross_attention"], ["decoder.0", "k after k_proj"]),
        ("slots", ["who is there", "a cat"], ["why this answer", "slot ", "halting measure", "decoder read"]),
        ("ctm", ["random:2", "--only", "synapse,neurons"], ["random inputs, seed 2", "tick.5", "pre-activations"]),
        ("ctm", ["random"], ["looked at places", "the answer is that of tick"]),
        ("bare", ["5 6 7", "--ids"], ["not finite", "warning    ", "in layer.1 (transformer.h.1.mlp.c_fc)"]),
        ("mamba", ["the cat", "--dtype", "float64"], ["float64", "logits"]),
    ],
)
def test_commands(folders, capsys, name, words, texts):
    assert main([str(folders / name), *words, "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    for text in texts:
        assert text in printed


def test_values_that_are_not_finite_become_null(folders, capsys):
    assert main([str(folders / "bare"), "5 6 7", "--ids", "--json", "--only", "output"]) == 0
    (record,) = json.loads(capsys.readouterr().out)["records"]
    assert record["mean"] is None
    assert record["non_finite"] > 0


def test_comparison_command(folders, capsys):
    model = str(folders / "vanilla")
    assert (
        main(["--compare", "eager", "sdpa", "torch", model, "the cat", "sat", "--repeats", "2", "--dtype", "float64"])
        == 0
    )
    printed = capsys.readouterr().out
    for text in (
        "encoder.0",
        "decoder.1",
        "logits",
        "forward pass, ms",
        "speed, eager = 1",
        "peak memory, KiB",
        "[8, 3]",
    ):
        assert text in printed
    assert main(["--compare=sdpa,eager", str(folders / "gpt2"), "--length", "10", "--repeats", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["reference"] == "sdpa"
    assert found["arguments"]["input_ids"] == [8, 10]
    assert [row["layer"] for row in found["layers"]] == ["layer.0", "layer.1", "logits"]
    few = ["--repeats", "2", "--length", "4", "--batch_size", "1"]
    assert main(["--compare", "eager", "sdpa", "torch", *few]) == 0
    assert "no model is named: random weights" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "model is missing"),
        (["vanilla"], "text is missing"),
        (["vanilla", ""], "text: it is empty"),
        (["vanilla", "  "], "text: it is empty"),
        (["vanilla", "the cat", ""], "target: it is empty"),
        (["vanilla", "the", "cat", "sat"], "'sat': there is one text and one target"),
        (["vanilla", "the", "--layr", "1"], "unknown option '--layr'; did you mean '--layer'?"),
        (["vanilla", "the", "--layer"], "expected one argument"),
        (
            ["vanilla", "the cat", "--layer", "2"],
            "--layer '2': VanillaTransformerForConditionalGeneration has encoder.0,",
        ),
        (["vanilla", "the cat", "--layer", "step.1"], "--layer 'step.1'"),
        (["vanilla", "the cat", "--only", "atention"], "unknown stage; did you mean 'attention'?"),
        (["vanilla", "the cat", "--only", "reasoning"], "has no such stage; it has embedding, positions"),
        (["slots", "the cat", "--only", "expansion", "--layer", "0"], "--only expansion: "),
        (["slots", "the cat", "--only", "reasoning", "--layer", "0"], "--layer 0 has no stage reasoning"),
        (["mamba", "the cat", "--only", "attention"], "--only attention: MambaForCausalLM has no such stage"),
        (["learned", "the " * 12], "text: it has 13 tokens, the model has 12 positions"),
        (["learned", "the cat", "the " * 12], "target: it has 13 tokens, the model has 12 positions"),
        (["gpt2", "the " * 12], "text: it has 13 tokens, the model has 12 positions"),
        (["gpt2", "the " * 6, "cat " * 6], "text and target: it has 13 tokens, the model has 12 positions"),
        (["gpt2", "5 400", "--ids"], "token id 400 must lie in [0, 14)"),
        (["gpt2", "5 x", "--ids"], "text: with --ids it must hold whole numbers, got '5 x'"),
        (["bare", "the cat"], "text: the model has no tokenizer; give token ids and --ids"),
        (["classes", "the cat", "sat"], "VanillaTransformerForSequenceClassification writes no text"),
        (["body", "the cat"], "VanillaTransformerModel reads a target and cannot write one; give it one"),
        (["ctm", "the cat"], "reads pixel_values; give random"),
        (["no-such-folder", "the cat"], "cannot load"),
        (["vanilla", "the cat", "--device", "abacus"], "--device abacus"),
        (["vanilla", "the cat", "--dtype", "float7"], "invalid choice: 'float7'"),
        (["vanilla", "the cat", "--attention", "abacus"], "cannot load"),
        (["vanilla", "the cat", "--top", "0"], "--top is 0; it must be at least 1"),
        (["--compare", "eager", "vanilla"], "--compare needs at least two different ones"),
        (["--compare", "eager", "sdpp"], "did you mean 'sdpa'?"),
        (["--compare=eager,sdpp", "vanilla"], "unknown implementation 'sdpp'; did you mean 'sdpa'?"),
        (["--compare", "eager", "eager", "vanilla"], "--compare needs at least two different ones"),
        (["--compare", "eager", "torch", "gpt2", "the cat"], "not of a GPT2LMHeadModel"),
        (["--compare", "eager", "flash_attention_2", "vanilla", "the cat"], "does not run with 'flash_attention_2'"),
        (["--compare", "eager", "sdpa", "ctm"], "text is missing"),
    ],
)
def test_misuse(folders, capsys, words, message):
    """One line on stderr that names what is wrong, and exit code 2."""
    known = {path.name for path in folders.iterdir()}
    assert main([str(folders / word) if word in known else word for word in words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert captured.err.rstrip().endswith(errors[0])


def test_help(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    for text in ("--layer", "--only", "--compare", "--trust_remote_code", "cross_attention"):
        assert text in printed


def test_compare_needs_no_particular_configuration():
    config = VanillaTransformerConfig(**SMALL, dropout=0.3, attention_dropout=0.2)
    model = AutoModelForSeq2SeqLM.from_config(config).eval()
    inputs = {"input_ids": torch.tensor([[5, 6, 2]]), "decoder_input_ids": torch.tensor([[1, 7]])}
    variants = make_variants(model, ["sdpa", "eager", "torch"], inputs)
    for variant in variants[:2]:
        weight = variant.layers["encoder.0"].self_attn.q_proj.weight
        assert weight is model.model.encoder.layers[0].self_attn.q_proj.weight
    with torch.no_grad():
        logits = [variant.run() for variant in variants]
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0], atol=1e-5, rtol=0)
    assert model.config._attn_implementation == "sdpa"
