"""Continuous Thought Machine: the shared checks, the published model's golden data, and the properties of thinking."""

import argparse
import doctest
import inspect
import json
import math
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForTokenClassification,
    ResNetConfig,
    ResNetForImageClassification,
)

from hf_models.continuous_thought_machine import (
    ContinuousThoughtMachineConfig,
    ContinuousThoughtMachineForImageClassification,
    ContinuousThoughtMachineForTokenClassification,
    ContinuousThoughtMachineModel,
    HyperContinuousThoughtMachineConfig,
    HyperContinuousThoughtMachineForImageClassification,
    HyperContinuousThoughtMachineForTokenClassification,
    HyperContinuousThoughtMachineModel,
    configuration_continuous_thought_machine,
    modeling_continuous_thought_machine,
)
from hf_models.continuous_thought_machine import convert_continuous_thought_machine as conversion
from hf_models.continuous_thought_machine.encoder_continuous_thought_machine import POSITIONAL_EMBEDDINGS
from hf_models.continuous_thought_machine.modeling_continuous_thought_machine import (
    ContinuousThoughtMachineHyperLinear,
    ContinuousThoughtMachineHyperNeuronLayer,
    draw_neurons,
    first_certain,
)
from tests.hf_models.model_tests import ModelTests, assert_close, assert_equal

GOLDEN = Path(__file__).parent.parent / "golden" / "ctm"
CASES = ("cifar_pairing", "parity_random", "maze_firstlast")

NO_TOKENS = "reads no tokens"
NO_GENERATION = "does not generate"


class TestContinuousThoughtMachine(ModelTests):
    config_class = ContinuousThoughtMachineConfig
    classes = {
        ContinuousThoughtMachineModel: AutoModel,
        ContinuousThoughtMachineForImageClassification: AutoModelForImageClassification,
        ContinuousThoughtMachineForTokenClassification: AutoModelForTokenClassification,
    }
    bad_configs = [
        ({"d_input": 9}, "d_input=9.*heads=2"),
        ({"hidden_size": "wide"}, "d_model='wide'"),
        ({"num_attention_heads": 0}, "heads=0"),
        ({"neuron_select_type": "first-last", "n_synch_out": 9}, "n_synch_out=9.*n_synch_action=10.*d_model=18"),
        ({"n_random_pairing_self": 10}, "n_synch_action=10.*n_random_pairing_self=10"),
        ({"neuron_select_type": "random", "n_random_pairing_self": 1}, "n_random_pairing_self=1.*random-pairing"),
        ({"iterations": 0}, "iterations"),
        ({"memory_length": 0}, "memory_length"),
        ({"backbone_type": "resnet19-1"}, "backbone_type='resnet19-1'.*resnet18"),
        ({"backbone_type": "resnet18-5"}, "backbone_type='resnet18-5'"),
        ({"positional_embedding_type": "learnable-fourier"}, "positional_embedding_type.*backbone_type"),
        ({"prediction_reshaper": [5, -1, -1]}, "prediction_reshaper=.*one of which"),
        ({"prediction_reshaper": []}, "prediction_reshaper"),
        ({"out_dims": 11}, "prediction_reshaper=.*out_dims=11"),
        ({"out_dims": 15, "num_labels": 2}, "3 classes, but num_labels=2"),
        ({"out_dims": 5}, "at least 2 classes"),
        ({"certainty_threshold": 1.5}, "certainty_threshold=1.5"),
        ({"dropout_nlm": -0.5}, "dropout_nlm=-0.5"),
        ({"image_size": [9, 0]}, "image_size=.9, 0."),
        ({"image_size": [9, 9, 9]}, "image_size=.9, 9, 9."),
    ]
    padding_sides = ()
    not_applicable = {
        "test_padding_is_neutral": "inputs are of one size",
        "test_inputs_embeds_equal_input_ids": NO_TOKENS,
        "test_resized_embeddings": NO_TOKENS,
        "test_generation_with_cache_equals_without": NO_GENERATION,
        "test_generated_tokens_follow_the_forward_pass": NO_GENERATION,
        "test_generation_ignores_padding": NO_GENERATION,
        "test_generation_continues_padded_beginnings": NO_GENERATION,
        "test_forward_pass_in_two_parts": NO_GENERATION,
    }
    zero_gradient = {
        r"attention\.k_proj\.bias$": "adds the same to all scores of a query, which the softmax takes away"
    }

    def tiny_config(self, **overrides):
        sizes = {
            "iterations": 4,
            "d_model": 18,
            "d_input": 8,
            "heads": 2,
            "n_synch_out": 11,
            "n_synch_action": 10,
            "synapse_depth": 3,
            "memory_length": 3,
            "memory_hidden_dims": 5,
            "backbone_type": "parity_backbone",
            "positional_embedding_type": "custom-rotational-1d",
            "prediction_reshaper": [5, -1],
            # The most certain tick may be the first, which knows nothing of the action's decays.
            "answer_tick": "last",
        }
        return self.config_class(**(sizes | overrides))

    def vary(self, model):
        super().vary(model)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # Decays below 0 are put back to 0 before the first training step.
                if name.endswith("decay"):
                    parameter.abs_()

    def inputs(self, model_class, batch_size, config, padding_side=None):
        rows = [torch.Generator().manual_seed(row) for row in range(batch_size)]
        if config.backbone_type == "parity_backbone":
            inputs = {"input_values": torch.stack([torch.randint(2, (7,), generator=row) * 2.0 - 1 for row in rows])}
        else:
            inputs = {
                "input_features": torch.stack([torch.randn(config.num_channels, 3, 2, generator=row) for row in rows])
            }
        if self.classes[model_class] is AutoModel:
            return inputs
        positions, classes = config.prediction_shape
        labels = torch.stack([torch.randint(classes, (positions,), generator=row) for row in rows])
        # Rows have 5, 3, 4, 5, … labels.
        unlabelled = torch.tensor([0, 2, 1])[torch.arange(batch_size) % 3]
        return inputs | {"labels": labels.masked_fill(torch.arange(positions) >= positions - unlabelled[:, None], -100)}

    def output_shapes(self, model_class, config, inputs):
        batch_size, num_ticks = len(next(iter(inputs.values()))), config.iterations
        shapes = {
            "predictions": (batch_size, config.out_dims, num_ticks),
            "certainties": (batch_size, 2, num_ticks),
            "synchronisation": (batch_size, config.synch_size_out),
            "ticks": (batch_size,),
        }
        if self.classes[model_class] is AutoModel:
            return shapes
        return shapes | {"logits": (batch_size, *config.prediction_shape)}

    def per_sample(self, model_class):
        names = ["predictions", "certainties", "synchronisation", "ticks"]
        return dict.fromkeys(names if self.classes[model_class] is AutoModel else [*names, "logits", "best_tick"])

    def recorded(self, model_class, config, inputs):
        (batch_size, *_), num_ticks = next(iter(inputs.values())).shape, config.iterations
        tokens = 7 if config.backbone_type == "parity_backbone" else 6
        neurons = (batch_size, config.d_model)
        return {
            "output_hidden_states": {"hidden_states": (num_ticks + 1, neurons)},
            "output_pre_activations": {"pre_activations": (num_ticks, neurons)},
            "output_attentions": {"attentions": (num_ticks, (batch_size, config.heads, 1, tokens))},
            "output_synchronisation_action": {
                "synchronisation_action": (num_ticks, (batch_size, config.synch_size_action))
            },
            "output_synchronisation_out": {"synchronisation_out": (num_ticks, (batch_size, config.synch_size_out))},
        }


class TestHyperContinuousThoughtMachine(TestContinuousThoughtMachine):
    config_class = HyperContinuousThoughtMachineConfig
    classes = {
        HyperContinuousThoughtMachineModel: AutoModel,
        HyperContinuousThoughtMachineForImageClassification: AutoModelForImageClassification,
        HyperContinuousThoughtMachineForTokenClassification: AutoModelForTokenClassification,
    }
    bad_configs = [
        ({"hyper_layers": "down", "synapse_depth": 1}, "hyper_layers='down'.*synapse_depth=1"),
        ({"d_input": 9}, "d_input=9.*heads=2"),
    ]

    def tiny_config(self, **overrides):
        others = {
            "hyper_rank": 2,
            "hyper_context_size": 3,
            "hyper_nlms": True,
            "hyper_nlm_rank": 2,
            "backbone_type": "none",
            "positional_embedding_type": "none",
            "num_channels": 6,
            "neuron_select_type": "random",
            "n_synch_out": 4,
            "n_synch_action": 3,
        }
        return super().tiny_config(**(others | overrides))

    def recorded(self, model_class, config, inputs):
        shape = (len(next(iter(inputs.values()))), config.hyper_context_size + 1)
        return super().recorded(model_class, config, inputs) | {
            "output_contexts": {"contexts": (config.iterations, shape)}
        }


def golden_settings(case):
    return json.loads((GOLDEN / f"{case}.json").read_text())


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module", params=CASES)
def golden(request, tmp_path_factory):
    """A published model's settings and tensors, and the folder that the converter makes of them."""
    folder = tmp_path_factory.mktemp("converted") / request.param
    paths = [GOLDEN / f"{request.param}.{suffix}" for suffix in ("json", "safetensors")]
    assert conversion.main([*map(str, paths), str(folder)]) == 0
    return golden_settings(request.param), load_file(paths[1]), folder


def golden_model(golden, **overrides):
    settings, _, folder = golden
    auto_class = AutoModelForImageClassification if settings["task"] == "image" else AutoModelForTokenClassification
    return auto_class.from_pretrained(folder, **overrides).eval()


def golden_inputs(golden, model):
    return {model.config.input_name: golden[1]["input"]}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_golden_outputs(golden, implementation):
    settings, tensors, _ = golden
    model = golden_model(golden, attn_implementation=implementation)
    assert model.num_parameters() == settings["n_parameters"]
    with torch.no_grad():
        outputs = model(**golden_inputs(golden, model))
        longer = model(**golden_inputs(golden, model), iterations=settings["config"]["iterations"] + 3)
        shorter = model(**golden_inputs(golden, model), iterations=2)
    # The original differs from itself in float64 by up to 1e-5.
    assert_close(outputs.predictions, tensors["out.predictions"], "predictions", rtol=0, atol=3e-5)
    assert_close(outputs.predictions, tensors["out64.predictions"], "predictions in float64", rtol=0, atol=3e-5)
    assert_close(outputs.certainties, tensors["out.certainties"], "certainties", rtol=0, atol=2e-6)
    assert_close(outputs.synchronisation, tensors["out.synch_last"], "synchronisation", rtol=0, atol=3e-5)
    assert outputs.certain_tick.tolist() == settings["most_certain_tick"]
    assert outputs.ticks.tolist() == [settings["config"]["iterations"]] * len(tensors["input"])
    # Ticks do not depend on how many follow.
    assert_close(longer.predictions[..., :-3], outputs.predictions, "with more ticks", rtol=0, atol=1e-6)
    assert_close(shorter.predictions, outputs.predictions[..., :2], "with fewer ticks", rtol=0, atol=1e-6)


def test_golden_internals(golden):
    _, tensors, _ = golden
    model = golden_model(golden, attn_implementation="eager")
    flags = ("hidden_states", "attentions", "pre_activations", "synchronisation_action", "synchronisation_out")
    with torch.no_grad():
        outputs = model(**golden_inputs(golden, model), **{f"output_{name}": True for name in flags})
    for name, recorded in (
        ("post_activations", outputs.hidden_states[1:]),
        ("attention", outputs.attentions),
        ("pre_activations", outputs.pre_activations),
        ("synch_action", outputs.synchronisation_action),
        ("synch_out", outputs.synchronisation_out),
    ):
        assert_close(torch.stack(recorded), tensors[f"track.{name}"], name, rtol=0, atol=5e-5)


def test_golden_losses_and_gradients(golden):
    settings, tensors, _ = golden
    model = golden_model(golden)
    inputs = golden_inputs(golden, model) | {"labels": tensors["target"]}
    outputs = model(**inputs)
    assert outputs.loss.item() == pytest.approx(settings["loss_use_most_certain"], abs=3e-6)
    outputs.loss.backward()
    names = conversion.published_tensors(model.config)
    parameters = dict(model.model.named_parameters())
    checked = set()
    for name, expected in tensors.items():
        if name.startswith("grad."):
            ours = names[name.removeprefix("grad.")]
            gradient = torch.cat([conversion.to_published_layout(part, parameters[part].grad) for part in ours])
            # Relative to the largest entry: the gradient of the key bias is zero but for rounding.
            assert_close(gradient, expected, name, rtol=0, atol=1e-4 * expected.abs().max().item())
            checked.update(ours)
    left_out = {name for name in parameters if name not in checked}
    assert all(name.endswith("weight") for name in left_out), left_out
    assert len(checked) > len(left_out) * 5
    model.config.answer_tick = "last"
    assert model(**inputs).loss.item() == pytest.approx(settings["loss_use_last_tick"], abs=3e-6)


def test_golden_training_mode(golden):
    _, tensors, _ = golden
    model = golden_model(golden).train()
    if "train.predictions" not in tensors:
        assert not [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        return
    with torch.no_grad():
        predictions = model(**golden_inputs(golden, model)).predictions
    mean = model.model.encoder.backbone.stem.normalization.running_mean
    assert_close(predictions, tensors["train.predictions"], "predictions", rtol=0, atol=3e-5)
    assert_close(mean, tensors["train.bn1_running_mean_after"], "running mean", rtol=0, atol=1e-6)


def test_golden_curriculum():
    settings, tensors = golden_settings("maze_firstlast"), load_file(GOLDEN / "maze_firstlast.safetensors")
    config = conversion.convert_config(settings)
    assert config.curriculum_lookahead == settings["curriculum_lookahead"]
    right = tensors["out.predictions"].unflatten(1, (10, 5)).argmax(2) == tensors["target"].unsqueeze(-1)
    prefix = modeling_continuous_thought_machine.longest_prefix(right.transpose(1, 2)).amax(dim=1)
    assert ((prefix - 1).clamp_min(0) + 5).tolist() == settings["curriculum_upto"]


def rename_numpy_core(path):
    """Makes a file that names numpy's functions as numpy 1 did."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            if name.endswith("data.pkl"):
                assert b"numpy._core.multiarray" in content or b"numpy.core.multiarray" in content
                content = content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
            archive.writestr(name, content)


def training_checkpoint(state):
    """What the published trainers save: tensors, lists, and the states of three generators."""
    return {
        "model_state_dict": state,
        "iteration": 3,
        "train_losses": [0.5, np.float64(0.25), np.float32(0.125)],
        "args": argparse.Namespace(d_model=64, prediction_reshaper=[-1]),
        "torch_rng_state": torch.get_rng_state(),
        "numpy_rng_state": np.random.RandomState(0).get_state(),
        "random_rng_state": random.Random(0).getstate(),
    }


@pytest.mark.parametrize("container", ["plain", "checkpoint", "checkpoint of numpy 1"])
def test_converter_reads_pytorch_files(golden, container, tmp_path):
    settings, tensors, folder = golden
    state = conversion.without_prefix(tensors)
    torch.save(state if container == "plain" else training_checkpoint(state), tmp_path / "model.pt")
    if container == "checkpoint of numpy 1":
        rename_numpy_core(tmp_path / "model.pt")
    (tmp_path / "config.json").write_text(json.dumps(settings["config"]))
    assert conversion.main([str(tmp_path / name) for name in ("config.json", "model.pt", "out")]) == 0
    expected, actual = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "out"))
    assert expected.keys() == actual.keys()
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": {"d_model": None}}, "config.json: missing key(s): d_model"),
        ({"config": {"d_models": 8}}, "config.json: unknown key(s): d_models"),
        ({"config": {"heads": 5}}, "config.json: Class validation error"),
        ({"config": {"heads": "4"}}, "'heads' expected int"),
        ({"config": {"backbone_type": "resnet1-1"}}, "backbone_type='resnet1-1'"),
        ({"config": {"memory_length": 5}}, "tensor start_trace has shape [48, 4], the config says [48, 5]"),
        ({"config": {"deep_nlms": True}}, "missing tensor(s): trace_processor.0.2.T"),
        ({"config": {"positional_embedding_type": "none"}}, "unknown tensor(s): positional_embedding.projection.bias"),
        ({"drop": "model.q_proj.bias"}, "weights.safetensors: missing tensor(s): q_proj.bias"),
        ({"drop": "model."}, "weights.safetensors: missing tensor(s)"),
        ({"replace": ("model.q_proj.bias", torch.full((32,), math.nan))}, "tensor q_proj.bias must hold finite"),
        ({"replace": ("model.out_neuron_indices_left", torch.full((7,), 48))}, "[0, d_model=48)"),
        ({"replace": ("model.out_neuron_indices_left", torch.ones(7))}, "must hold 64-bit integers"),
        ({"weights": b"no weights"}, "weights.safetensors: cannot be read as weights"),
        ({"settings": b"{"}, "config.json: cannot be read as JSON"),
        ({"settings": b"[]"}, "config.json: must hold a JSON object"),
        ({"settings": b'{"config": []}'}, "config.json: key 'config' must hold an object"),
        ({"occupied": True}, "out: exists already and is not an empty folder"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_converter_refuses(change, message, tmp_path, capsys):
    settings = golden_settings("parity_random")
    settings["config"] |= change.get("config", {})
    settings["config"] = {name: value for name, value in settings["config"].items() if value is not None}
    tensors = load_file(GOLDEN / "parity_random.safetensors")
    if "drop" in change:
        tensors = {name: value for name, value in tensors.items() if not name.startswith(change["drop"])}
    tensors |= [change["replace"]] if "replace" in change else []
    (tmp_path / "config.json").write_bytes(change.get("settings", json.dumps(settings).encode()))
    save_file(tensors, tmp_path / "weights.safetensors")
    if "weights" in change:
        (tmp_path / "weights.safetensors").write_bytes(change["weights"])
    if "occupied" in change:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "kept").write_text("mine")
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    assert conversion.main([str(tmp_path / name) for name in ("config.json", "weights.safetensors", "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            {"backbone_type": "resnet50-2", "num_channels": 1},
            {
                "initial_rgb.weight": (3, 1, 1, 1),
                "backbone.layer1.0.conv3.weight": (256, 64, 1, 1),
                "backbone.layer1.0.downsample.0.weight": (256, 64, 1, 1),
                "backbone.layer2.0.downsample.1.running_var": (512,),
                "backbone.layer2.3.bn3.weight": (512,),
                "kv_proj.0.weight": (8, 512),
            },
        ),
        (
            {"backbone_type": "shallow-wide", "positional_embedding_type": "custom-rotational"},
            {
                "backbone.layers.0.weight": (4096, 3, 3, 3),
                "backbone.layers.3.weight": (4096, 64, 3, 3),
                "backbone.layers.5.running_mean": (2048,),
                "positional_embedding.start_vector": (2,),
                "positional_embedding.projection.0.weight": (2048, 4),
            },
        ),
        (
            {"backbone_type": "resnet34-1", "positional_embedding_type": "learnable-fourier"},
            {
                "positional_embedding.Wr.weight": (128, 2),
                "positional_embedding.mlp.0.weight": (128, 256),
                "positional_embedding.mlp.3.bias": (64,),
            },
        ),
        (
            {"backbone_type": "resnet18-1", "positional_embedding_type": "multi-learnable-fourier"},
            {"positional_embedding.embedders.9.Wr.weight": (128, 2), "positional_embedding.combination": (10,)},
        ),
        ({"do_layernorm_nlm": True}, {"trace_processor.0.2.layernorm.weight": (5,), "trace_processor.0.2.T": (1,)}),
    ],
    ids=["bottleneck", "shallow-wide", "fourier", "multi-fourier", "normalised-neurons"],
)
def test_published_names(overrides, expected):
    config = small_config(**overrides)
    with torch.device("meta"):
        own = ContinuousThoughtMachineModel(config).state_dict()
    names = conversion.published_tensors(config)
    for name, shape in expected.items():
        assert tuple(conversion.to_published_layout(names[name][0], own[names[name][0]]).shape) == shape, name
    parts = [name for ours in names.values() for name in ours]
    assert sorted(parts) == sorted(own)
    published = {
        name: torch.cat(
            [conversion.to_published_layout(part, torch.zeros_like(own[part], device="cpu")) for part in ours]
        )
        if len(ours) > 1
        else conversion.to_published_layout(ours[0], torch.zeros_like(own[ours[0]], device="cpu"))
        for name, ours in names.items()
    }
    conversion.set_channels(config, published)
    assert config.num_channels == overrides.get("num_channels", 3)
    converted = conversion.convert_tensors(published, config)
    assert {name: value.shape for name, value in converted.items()} == {
        name: value.shape for name, value in own.items()
    }


def small_config(config_class=ContinuousThoughtMachineConfig, **overrides):
    sizes = {
        "iterations": 5,
        "d_model": 20,
        "d_input": 8,
        "heads": 2,
        "n_synch_out": 6,
        "n_synch_action": 7,
        "synapse_depth": 3,
        "memory_length": 4,
        "memory_hidden_dims": 5,
        "backbone_type": "none",
        "prediction_reshaper": [4, 3],
    }
    return config_class(**(sizes | overrides))


def varied(model):
    """The model in float64 with noise on every parameter, so that none is zero, constant or too small to matter."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.double().parameters():
            scale = 0.2 if parameter.ndim < 2 else 0.7 / parameter.shape[-1] ** 0.5
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64), alpha=scale)
    return model.eval()


def features(batch_size=3, positions=(3, 2)):
    return torch.randn(batch_size, 3, *positions, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def plain_machine(model, inputs, num_ticks):
    """
    Predictions and certainties, computed as the published code does: keys and values, predictions and certainties anew
    in every tick, neuron-level models as sums over weights stored neurons last.
    """
    config, tick, readout = model.config, model.tick, model.readout
    batch_size, attention = len(inputs), tick.attention
    tokens = model.encoder(inputs).transpose(0, 1)
    packed = {
        kind: torch.cat([getattr(getattr(attention, f"{name}_proj"), kind) for name in "qkv"])
        for kind in ("weight", "bias")
    }
    layers = [
        (layer, layer.weight.permute(1, 2, 0).contiguous(), layer.bias.permute(1, 0, 2).contiguous())
        for layer in tick.neuron_models.layers
    ]

    def synchronise(module, state, past):
        left, right = state[:, module.left_indices], state[:, module.right_indices]
        if config.neuron_select_type == "random-pairing":
            product = left * right
        else:
            rows, columns = torch.triu_indices(len(module.left_indices), len(module.right_indices))
            product = (left.unsqueeze(2) * right.unsqueeze(1))[:, rows, columns]
        rate = torch.exp(-module.decay.clamp(0, 15))
        total, weight = (
            (product, torch.ones_like(product)) if past is None else (rate * past[0] + product, rate * past[1] + 1)
        )
        return total / weight.sqrt(), (total, weight)

    state = model.start_state.expand(batch_size, -1)
    trace = model.start_trace.expand(batch_size, -1, -1)
    action, output = None, synchronise(readout.synchronisation, state, None)[1]
    predictions, certainties = [], []
    for _ in range(num_ticks):
        synchronisation, action = synchronise(tick.synchronisation, state, action)
        attended, _ = nn.functional.multi_head_attention_forward(
            tick.query_projection(synchronisation)[None],
            tokens,
            tokens,
            config.d_input,
            config.heads,
            packed["weight"],
            packed["bias"],
            None,
            None,
            False,
            attention.attention_dropout,
            attention.out_proj.weight,
            attention.out_proj.bias,
            training=model.training,
            average_attn_weights=False,
        )
        pre_activation = tick.synapse(torch.cat((attended[0], state), dim=-1))
        trace = torch.cat((trace[..., 1:], pre_activation.unsqueeze(-1)), dim=-1)
        states = trace
        for layer, weight, bias in layers:
            states = layer.dropout(states)
            states = states if layer.norm is None else layer.norm(states)
            states = nn.functional.glu(
                (torch.einsum("bdm,mhd->bdh", states, weight) + bias) / layer.temperature, dim=-1
            )
        state = states.squeeze(-1)
        synchronisation, output = synchronise(readout.synchronisation, state, output)
        prediction = readout.projection(synchronisation)
        log_probabilities = prediction.view(batch_size, *config.prediction_shape).log_softmax(-1)
        entropy = -(log_probabilities.exp() * log_probabilities).sum(-1).view(batch_size, -1).mean(1)
        entropy = entropy / math.log(config.num_labels)
        predictions.append(prediction)
        certainties.append(torch.stack((entropy, 1 - entropy), dim=1))
    return torch.stack(predictions, dim=-1), torch.stack(certainties, dim=-1)


@pytest.mark.parametrize(
    "overrides",
    [
        {"n_random_pairing_self": 2},
        {"neuron_select_type": "first-last", "do_layernorm_nlm": True},
        {"neuron_select_type": "random", "deep_nlms": False, "synapse_depth": 1},
        {"memory_length": 1, "heads": 1, "synapse_depth": 2, "prediction_reshaper": [-1], "out_dims": 6},
    ],
    ids=["random-pairing", "first-last", "random", "smallest"],
)
@pytest.mark.parametrize("batch_size", [3, 17])
def test_machine_equals_its_definition(overrides, batch_size):
    model = varied(ContinuousThoughtMachineModel(small_config(**overrides)))
    with torch.no_grad():
        model.tick.synchronisation.decay.abs_()
        model.readout.synchronisation.decay.abs_()
    outputs = model(input_features=features(batch_size))
    predictions, certainties = plain_machine(model, features(batch_size), 5)
    assert_close(outputs.predictions, predictions, "predictions", rtol=1e-10, atol=1e-12)
    assert_close(outputs.certainties, certainties, "certainties", rtol=1e-10, atol=1e-12)
    direction = torch.randn(predictions.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    parameters = dict(model.named_parameters())
    fast, plain = (
        torch.autograd.grad((values * direction).sum() + measures[:, 1].square().sum(), list(parameters.values()))
        for values, measures in ((outputs.predictions, outputs.certainties), (predictions, certainties))
    )
    for name, one, other in zip(parameters, fast, plain, strict=True):
        assert_close(one, other, name, rtol=1e-8, atol=1e-11)


# All ticks as one function


@pytest.fixture
def passes(monkeypatch):
    """The settings of each call of `run_ticks`."""
    calls = []
    run_ticks = modeling_continuous_thought_machine.run_ticks

    def counted(tensors, settings):
        calls.append(settings)
        return run_ticks(tensors, settings)

    monkeypatch.setattr(modeling_continuous_thought_machine, "run_ticks", counted)
    return calls


def unclamped(model):
    """The model with positive decays: below 0 training would put them back."""
    with torch.no_grad():
        model.tick.synchronisation.decay.abs_()
        model.readout.synchronisation.decay.abs_()
    return model


def module_by_module(model):
    """Makes the model run its ticks through its modules, as hooks on them would."""
    model.tick.register_forward_hook(lambda *_: None)
    return model


def differentiated(model, inputs, **options):
    """Predictions, and the gradients of the input and of all parameters, with equal random numbers in every call."""
    torch.manual_seed(3)
    inputs = inputs.clone().requires_grad_()
    outputs = model(input_features=inputs, **options)
    direction = torch.randn(outputs.predictions.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    total = (outputs.predictions * direction).sum() + outputs.certainties[:, 1].square().sum()
    named = {"input": inputs} | dict(model.named_parameters())
    gradients = torch.autograd.grad(total, list(named.values()))
    return outputs.predictions, dict(zip(named, gradients, strict=True))


@pytest.mark.parametrize("batch_size", [3, 17])
@pytest.mark.parametrize(
    ("overrides", "mode"),
    [
        ({"dropout": 0.3}, "training"),
        ({"dropout": 0.3, "dropout_nlm": 0.1, "synapse_depth": 1, "neuron_select_type": "first-last"}, "training"),
        ({"synapse_depth": 2, "memory_length": 1, "heads": 1}, "training"),
        ({"deep_nlms": False, "neuron_select_type": "random"}, "evaluation"),
        ({"certainty_check_interval": 3}, "stopping"),
    ],
    ids=["u-net", "depth-1", "smallest", "linear", "in-parts"],
)
def test_ticks_at_once_equal_the_modules(overrides, mode, batch_size, passes):
    inputs = features(batch_size)
    options = {"certainty_threshold": 1.0} if mode == "stopping" else {}

    def machine():
        torch.manual_seed(0)
        config = small_config(iterations=7, **overrides)
        return unclamped(varied(ContinuousThoughtMachineModel(config))).train(mode == "training")

    fast = differentiated(machine(), inputs, **options)
    assert len(passes) == (3 if mode == "stopping" else 1), "the ticks did not run as one function"
    plain = differentiated(module_by_module(machine()), inputs, **options)
    assert len(passes) == (3 if mode == "stopping" else 1)
    checkpointed = machine()
    enable = (
        getattr(checkpointed, "activation_checkpointing_enable", None) or checkpointed.gradient_checkpointing_enable
    )
    enable()
    recomputed = differentiated(checkpointed, inputs, **options)
    assert passes[-1].recomputes is (mode == "training")

    assert_close(fast[0], plain[0], "predictions", rtol=1e-10, atol=1e-12)
    assert_equal(recomputed[0], fast[0], "predictions when ticks are recomputed")
    for name, gradient in fast[1].items():
        assert_close(gradient, plain[1][name], name, rtol=1e-10, atol=1e-11)
        assert_close(recomputed[1][name], gradient, f"{name} when ticks are recomputed", rtol=1e-10, atol=1e-11)


def tiny_machine(**overrides):
    sizes = {"d_model": 5, "d_input": 2, "heads": 1, "n_synch_out": 2, "n_synch_action": 2, "synapse_depth": 2}
    others = {"memory_length": 2, "memory_hidden_dims": 2, "prediction_reshaper": [1, 2], "iterations": 3}
    torch.manual_seed(0)
    return unclamped(varied(ContinuousThoughtMachineModel(small_config(**(sizes | others | overrides)))))


def test_ticks_at_once_have_the_numerical_gradient(passes):
    model = tiny_machine(dropout=0.3).train()
    parameters = dict(model.named_parameters())
    sizes = [parameter.numel() for parameter in parameters.values()]

    def outputs(vector):
        torch.manual_seed(0)
        parts = zip(parameters.items(), vector.split(sizes), strict=True)
        # Clones, as training clamps the decays in place.
        given = {name: part.view_as(parameter).clone() for (name, parameter), part in parts}
        result = torch.func.functional_call(model, given, kwargs={"input_features": features(2, (2,))})
        return torch.cat((result.predictions.flatten(), result.synchronisation.flatten()))

    start = torch.nn.utils.parameters_to_vector(parameters.values()).detach().requires_grad_()
    assert torch.autograd.gradcheck(outputs, (start,), fast_mode=True, check_undefined_grad=False)
    assert passes


def test_gradients_of_ticks_at_once_have_gradients(passes):
    def second_order(model):
        torch.manual_seed(0)
        parameters = list(model.parameters())
        predictions = model(input_features=features(2, (2,))).predictions
        gradients = torch.autograd.grad(predictions.square().sum(), parameters, create_graph=True)
        return torch.autograd.grad(sum(gradient.square().sum() for gradient in gradients), parameters)

    fast = second_order(tiny_machine(dropout=0.3).train())
    assert len(passes) == 1
    plain = second_order(module_by_module(tiny_machine(dropout=0.3).train()))
    for (name, _), one, other in zip(tiny_machine().named_parameters(), fast, plain, strict=True):
        assert_close(one, other, name, rtol=1e-9, atol=1e-11)


def test_ticks_at_once_run_backward_twice():
    model = tiny_machine(dropout=0.3).train()
    loss = model(input_features=features(2, (2,))).predictions.square().sum()
    first, second = (torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for _ in range(2))
    for (name, _), one, other in zip(model.named_parameters(), first, second, strict=True):
        assert_equal(one, other, name)


class WatchedLinear(nn.Linear):
    """A linear map of another class, as adapters and quantisation put in the place of the model's."""


def replace_linear(model):
    linear = model.tick.query_projection
    model.tick.query_projection = WatchedLinear(linear.in_features, linear.out_features).double()
    model.tick.query_projection.load_state_dict(linear.state_dict())


def wrap_forward(model):
    forward = model.tick.synapse.forward
    model.tick.synapse.forward = lambda *args: forward(*args)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.tick.synapse.register_forward_pre_hook(lambda *_: None),
        lambda model: model.tick.attention.q_proj.register_full_backward_hook(lambda *_: None),
        lambda model: model.readout.register_forward_hook(lambda *_: None),
        lambda model: model.tick.neuron_models.eval() if model.training else model.tick.neuron_models.train(),
        replace_linear,
        wrap_forward,
    ],
    ids=["pre-hook", "backward-hook", "readout-hook", "other-mode", "other-class", "other-forward"],
)
def test_changed_machines_run_module_by_module(change):
    model = tiny_machine()
    key = torch.zeros(1, dtype=torch.float64)
    assert model.can_think_at_once(key)
    change(model)
    assert not model.can_think_at_once(key)


def test_what_is_followed_runs_module_by_module(passes):
    model, inputs = tiny_machine(), features(2, (2,))
    expected = model(input_features=inputs).predictions
    (gradient,) = torch.autograd.grad(expected.sum(), model.start_state)
    assert len(passes) == 1

    def predict(start_state):
        return torch.func.functional_call(
            model, {"start_state": start_state}, kwargs={"input_features": inputs}
        ).predictions

    start, direction = model.start_state.detach(), torch.ones_like(model.start_state)
    by_transform = torch.func.grad(lambda state: predict(state).sum())(start)
    assert_close(by_transform, gradient, "functional gradient", rtol=1e-9, atol=1e-12)
    # The library's fused attention has no forward differentiation.
    model.set_attn_implementation("eager")
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(start, direction)
        tangent = torch.autograd.forward_ad.unpack_dual(predict(dual)).tangent
    assert tangent.sum().item() == pytest.approx(gradient.sum().item(), rel=1e-9)
    with torch.nn.modules.module.register_module_forward_hook(lambda *_: None), torch.no_grad():
        assert_close(model(input_features=inputs).predictions, expected, "hook on all", rtol=1e-10, atol=1e-12)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        model.float()(input_features=inputs.float())
    model.bfloat16()(input_features=inputs)
    for options in ({"do_layernorm_nlm": True}, {"hyper_nlms": True}):
        config_class, model_class = ContinuousThoughtMachineConfig, ContinuousThoughtMachineModel
        if "hyper_nlms" in options:
            config_class, model_class = HyperContinuousThoughtMachineConfig, HyperContinuousThoughtMachineModel
        model_class(small_config(config_class, **options))(input_features=features().float())
    assert len(passes) == 1


def test_recording_once_leaves_the_fast_way_open(passes):
    model = tiny_machine()
    model(input_features=features(2, (2,)), output_hidden_states=True)
    assert not passes
    model(input_features=features(2, (2,)), output_synchronisation_out=True)
    assert len(passes) == 1


def test_what_is_the_same_in_every_tick_is_computed_once():
    model = ContinuousThoughtMachineModel(small_config())
    calls = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda *_, name=name: calls.update({name: calls.get(name, 0) + 1}))
    model(input_features=features().float())
    once = {"encoder.projection", "tick.attention.k_proj", "tick.attention.v_proj", "readout.projection"}
    assert {name for name, number in calls.items() if number == 1} == once
    assert {number for name, number in calls.items() if name not in once} == {5}


def test_decays_stay_in_their_range():
    model = varied(ContinuousThoughtMachineModel(small_config()))
    decays = model.tick.synchronisation.decay, model.readout.synchronisation.decay
    with torch.no_grad():
        for decay in decays:
            decay[:3] = torch.tensor([-0.5, 20.0, 3.0])
    stored = [decay.detach().clone() for decay in decays]
    expected = model(input_features=features()).predictions
    for decay, value in zip(decays, stored, strict=True):
        assert torch.equal(decay, value), "evaluation changes no parameter"
    predictions = model.train()(input_features=features()).predictions
    assert_close(predictions, expected, "predictions", rtol=1e-12, atol=1e-12)
    predictions.square().sum().backward()
    for decay in decays:
        assert decay[:3].tolist() == [0.0, 15.0, 3.0]
        assert decay.grad[0] != 0, "the clamp must not stop the gradient"


# Thinking as long as needed


def spread_threshold(model, inputs):
    """A threshold at which the samples use different numbers of ticks; no certainty is near enough to be in doubt."""
    certainties = model(input_features=inputs).certainties[:, 1]
    running = certainties.cummax(dim=1).values.flatten().sort().values
    for certainty in running.unique().flip(0).tolist():
        threshold = certainty - 1e-8
        ticks = torch.where(
            (certainties >= threshold).any(1), (certainties >= threshold).int().argmax(1) + 1, certainties.shape[1]
        )
        if len(ticks.unique()) >= 4:
            return threshold
    raise AssertionError("no threshold spreads the ticks")


@pytest.mark.parametrize("interval", [1, 3, 100])
@pytest.mark.parametrize("hyper", [False, True], ids=["plain", "hyper"])
def test_samples_stop_when_certain(interval, hyper):
    if hyper:
        config = small_config(HyperContinuousThoughtMachineConfig, hyper_nlms=True, iterations=9)
        model = varied(HyperContinuousThoughtMachineForTokenClassification(config))
    else:
        model = varied(ContinuousThoughtMachineForTokenClassification(small_config(iterations=9)))
    model.config.certainty_check_interval = interval
    inputs = features(batch_size=12)
    with torch.no_grad():
        threshold = spread_threshold(model.model, inputs)
        everything = model(input_features=inputs)
        counted = []
        handle = model.model.tick.register_forward_hook(lambda _, args, __: counted.append(len(args[0])))
        outputs = model(input_features=inputs, certainty_threshold=threshold)
        handle.remove()
        recorded = model(input_features=inputs, certainty_threshold=threshold, output_synchronisation_out=True)
        alone = [model(input_features=row[None], certainty_threshold=threshold) for row in inputs]

    ticks = outputs.ticks.tolist()
    assert len(set(ticks)) >= 4
    # Samples are computed up to the look at which enough of them are seen to be certain.
    expected, size = [], 12
    for tick in range(min(9, math.ceil(max(ticks) / interval) * interval)):
        waiting = sum(used > tick // interval * interval for used in ticks)
        if tick % interval == 0 and waiting <= 7 / 8 * size:
            size = waiting
        expected.append(size)
    assert counted == expected
    for row, used in enumerate(ticks):
        certainties = everything.certainties[row, 1]
        assert (certainties[: used - 1] < threshold).all()
        assert used == 9 or certainties[used - 1] >= threshold
        for name in ("predictions", "certainties"):
            values, expected = outputs[name][row], everything[name][row]
            assert_close(values[:, :used], expected[:, :used], name, rtol=1e-10, atol=1e-12)
            assert torch.equal(values[:, used:], values[:, used - 1 : used].expand(-1, 9 - used)), name
        last = recorded.synchronisation_out[used - 1][row]
        assert_close(outputs.synchronisation[row], last, "synchronisation", rtol=1e-10, atol=1e-12)
    for name in ("logits", "predictions", "certainties", "synchronisation", "ticks", "certain_tick"):
        assert_close(outputs[name], recorded[name], f"{name}, recorded", rtol=1e-10, atol=1e-12)
        together = torch.cat([output[name] for output in alone])
        assert_close(outputs[name], together, f"{name}, alone", rtol=1e-10, atol=1e-12)


def test_a_certainty_at_the_threshold_suffices():
    """Normalised entropies of one half, a quarter and none against a certainty of one half, then of three quarters."""
    entropies = torch.tensor([[0.5], [0.25], [0.0]])
    for threshold, tick in ((0.5, 1), (0.75, 2), (1.0, 3)):
        assert first_certain(entropies, threshold).tolist() == [tick]
    assert first_certain(entropies[:2], 0.9).tolist() == [2], "never certain: all ticks"


def test_bounds_of_thinking():
    model = varied(ContinuousThoughtMachineForTokenClassification(small_config())).float()
    inputs = {"input_features": features().float()}
    with torch.no_grad():
        model.config.certainty_threshold = 0
        assert model(**inputs).ticks.tolist() == [1, 1, 1]
        outputs = model(**inputs, certainty_threshold=1.0, iterations=8)
        assert outputs.ticks.tolist() == [8, 8, 8]
        assert outputs.predictions.shape == (3, 12, 8)
        assert model.train()(**inputs).ticks.tolist() == [5, 5, 5], "training takes all ticks"
    labels = torch.zeros(3, 4, dtype=torch.long)
    model.eval()(**inputs, labels=labels).loss.backward()
    assert model.model.tick.query_projection.weight.grad.abs().sum() > 0, "the compacted loop has gradients"


# Losses


def test_loss_of_routes_and_tags():
    predictions = torch.randn(3, 12, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(3, (3, 4), generator=torch.Generator().manual_seed(1))
    labels[0, 2:] = -100
    # One tick of the second sample has a right prefix of 2, another of 1.
    for position in range(2):
        predictions[1].view(4, 3, 5)[position, labels[1, position], 3] = 9.0
    head = ContinuousThoughtMachineForTokenClassification(small_config())
    for lookahead in (None, 1, 2, 9):
        head.config.curriculum_lookahead = lookahead
        losses = head.losses_by_tick(predictions, labels)
        for row in range(3):
            logits = predictions[row].view(4, 3, 5).permute(2, 0, 1)
            real = int((labels[row] != -100).sum())
            prefixes = []
            for tick in range(5):
                right = (logits[tick].argmax(-1) == labels[row])[:real].tolist() + [True] * (4 - real)
                prefixes.append([*right, False].index(False))
            covered = real if lookahead is None else min(max(max(prefixes) - 1, 0) + lookahead, real)
            for tick in range(5):
                expected = nn.functional.cross_entropy(logits[tick, :covered], labels[row, :covered])
                torch.testing.assert_close(losses[tick, row], expected)


@pytest.mark.parametrize("answer_tick", ["most_certain", "last"])
def test_loss_over_ticks(answer_tick):
    model = varied(ContinuousThoughtMachineForTokenClassification(small_config(answer_tick=answer_tick)))
    labels = torch.randint(3, (3, 4), generator=torch.Generator().manual_seed(1))
    labels[1, 1:] = -100
    outputs = model(input_features=features(), labels=labels)
    losses = torch.stack(
        [
            torch.stack(
                [
                    nn.functional.cross_entropy(outputs.predictions[row, :, tick].view(4, 3), labels[row])
                    for tick in range(5)
                ]
            )
            for row in range(3)
        ]
    )
    certain = outputs.certainties[:, 1].argmax(1) if answer_tick == "most_certain" else torch.tensor([4, 4, 4])
    rows, weights = torch.arange(3), torch.tensor([4, 1, 4]) / 9
    assert torch.equal(outputs.certain_tick, certain)
    assert torch.equal(outputs.best_tick, losses.argmin(1))
    torch.testing.assert_close(outputs.best_tick_loss, (losses.amin(1) * weights).sum())
    torch.testing.assert_close(outputs.certain_tick_loss, (losses[rows, certain] * weights).sum())
    torch.testing.assert_close(outputs.loss, (outputs.best_tick_loss + outputs.certain_tick_loss) / 2)
    torch.testing.assert_close(outputs.logits, outputs.predictions[rows, :, certain].view(3, 4, 3))
    parts = [
        model(input_features=features()[row : row + 1], labels=labels[row : row + 1], num_items_in_batch=9)
        for row in rows
    ]
    for name in ("loss", "best_tick_loss", "certain_tick_loss"):
        torch.testing.assert_close(sum(part[name] for part in parts), outputs[name])


def test_batch_without_labels_has_a_finite_loss():
    model = ContinuousThoughtMachineForTokenClassification(small_config())
    outputs = model(input_features=features().float(), labels=torch.full((3, 4), -100))
    assert outputs.loss == 0
    outputs.loss.backward()


# The Hyper variant

PAPER_SIZES = {
    "d_model": 1024,
    "d_input": 256,
    "heads": 4,
    "synapse_depth": 8,
    "memory_length": 25,
    "memory_hidden_dims": 32,
    "n_synch_out": 128,
    "n_synch_action": 128,
    "prediction_reshaper": [50, 5],
}


def test_hyper_parameter_counts():
    with torch.device("meta"):
        plain = ContinuousThoughtMachineModel(ContinuousThoughtMachineConfig(**PAPER_SIZES))
        extra = {}
        for layers in ("none", "bottleneck", "down", "up", "all"):
            config = HyperContinuousThoughtMachineConfig(**PAPER_SIZES, hyper_layers=layers)
            model = HyperContinuousThoughtMachineModel(config)
            extra[layers] = model.num_parameters() - plain.num_parameters()
            assert plain.state_dict().keys() <= model.state_dict().keys()
        config = HyperContinuousThoughtMachineConfig(**PAPER_SIZES, hyper_layers="none", hyper_nlms=True)
        neurons = HyperContinuousThoughtMachineModel(config).tick.neuron_models.layers
    # The published mazes-small model.
    assert plain.num_parameters() == 8_511_992
    assert extra == {"none": 0, "bottleneck": 102_428, "down": 534_431, "up": 534_431, "all": 1_058_598}
    own = [
        sum(p.numel() for name, p in layer.named_parameters() if "hyper" in name or name == "gate") for layer in neurons
    ]
    assert own == [4 * (25 + 64) * 9 + 1024, 4 * (32 + 2) * 9 + 1024]


@pytest.mark.parametrize("layers", ["none", "bottleneck", "down", "up", "all"])
def test_hyper_machine_starts_as_the_plain_one(layers, tmp_path):
    plain = ContinuousThoughtMachineForTokenClassification(small_config(synapse_depth=4)).eval()
    plain.save_pretrained(tmp_path)
    config = small_config(
        HyperContinuousThoughtMachineConfig, synapse_depth=4, hyper_layers=layers, hyper_nlms=layers == "all"
    )
    model = HyperContinuousThoughtMachineForTokenClassification(config).eval()
    report = model.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert not report.unexpected_keys
    assert all(".context." in name or ".hyper_" in name or name.endswith(".gate") for name in report.missing_keys)
    assert bool(report.missing_keys) is (layers != "none")
    levels = {"none": 0, "bottleneck": 4, "down": 3, "up": 3, "all": 6}[layers]
    dynamic = [module for module in model.modules() if isinstance(module, ContinuousThoughtMachineHyperLinear)]
    assert len(dynamic) == levels
    assert (model.model.tick.context is None) is (layers == "none")
    # Recording makes both run module by module, as dynamic weights do anyway.
    inputs = {"input_features": features().float(), "output_hidden_states": True}
    with torch.no_grad():
        for name in ("predictions", "certainties", "synchronisation"):
            assert_equal(model(**inputs)[name], plain(**inputs)[name], name)


def test_hyper_gates_move_first_and_heads_second():
    model = HyperContinuousThoughtMachineForTokenClassification(
        small_config(HyperContinuousThoughtMachineConfig, hyper_nlms=True)
    ).double()
    labels = torch.randint(3, (3, 4), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(2):
        optimizer.zero_grad()
        model(input_features=features(), labels=labels).loss.backward()
        for name, parameter in model.named_parameters():
            if name.endswith(".gate"):
                assert (parameter.grad != 0).all(), name
            elif ".hyper_" in name:
                assert bool((parameter.grad != 0).any()) is (step == 1), name
        optimizer.step()


def test_dynamic_weights_equal_their_definition():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    linear = ContinuousThoughtMachineHyperLinear(6, 5, rank=3, context_size=4).double()
    neurons = ContinuousThoughtMachineHyperNeuronLayer(7, 6, 2, 0.0, False, rank=3, context_size=4).double()
    with torch.no_grad():
        for parameter in [*linear.parameters(), *neurons.parameters()]:
            parameter.copy_(draw(*parameter.shape))
        context, inputs, traces = draw(2, 4), draw(2, 6), draw(7, 6, 2)
        output, neuron_output = linear(inputs, context), neurons(traces, neurons.prepare(2), context)
        for row in range(2):
            left = (linear.hyper_u.view(5, 3, 4) * context[row]).sum(-1)
            right = (linear.hyper_v.view(3, 4, 6) * context[row][:, None]).sum(1).T
            added = linear.gate * left @ right.T
            torch.testing.assert_close(linear.dynamic_weight(context)[row], added)
            torch.testing.assert_close(output[row], (linear.weight + added) @ inputs[row] + linear.bias)
            left = (neurons.hyper_u.view(4, 3, 4) * context[row]).sum(-1)
            right = (neurons.hyper_v.view(3, 4, 6) * context[row][:, None]).sum(1).T
            for neuron in range(7):
                state = traces[neuron, :, row]
                before = (state @ neurons.weight[neuron] + neurons.bias[neuron, 0]) / neurons.temperature
                before = before + neurons.gate[neuron] * (state @ right @ left.T)
                expected = nn.functional.glu(before, dim=0)
                torch.testing.assert_close(neuron_output[neuron, :, row], expected)


# Inputs


@pytest.mark.parametrize("name", sorted(POSITIONAL_EMBEDDINGS))
def test_positional_embeddings_equal_their_definition(name):
    backbone = "parity_backbone" if name.endswith("1d") else "resnet18-1"
    model = varied(ContinuousThoughtMachineModel(small_config(backbone_type=backbone, positional_embedding_type=name)))
    embedding = model.encoder.positional_embedding
    height, width = (4, 4) if name == "custom-rotational" else (3, 5)

    def fourier(module, y, x):
        angles = module.frequencies @ torch.tensor([x / (width - 1), y / (height - 1)], dtype=torch.float64)
        return module.mlp(torch.cat((angles.cos(), angles.sin())) / 16)

    def turned(start, position, number):
        angle = math.pi * position / (number - 1)
        rotation = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        return rotation.double() @ start

    def cell(y, x):
        if name == "learnable-fourier":
            return fourier(embedding, y, x)
        if name == "multi-learnable-fourier":
            codes = torch.stack([fourier(module, y, x) for module in embedding.embedders])
            return embedding.combination.softmax(0) @ codes
        start = embedding.start_vector
        return embedding.projection(torch.cat((turned(start, y, height), turned(start, x, width))))

    with torch.no_grad():
        if backbone == "parity_backbone":
            start = torch.tensor([0.0, 1.0], dtype=torch.float64)
            codes = embedding(torch.zeros(2, 8, 6))
            expected = torch.stack([embedding.projection(turned(start, i, 6)) for i in range(6)], dim=1)
        else:
            codes = embedding(torch.zeros(2, 64, height, width))
            rows = [torch.stack([cell(y, x) for x in range(width)], dim=1) for y in range(height)]
            expected = torch.stack(rows, dim=1)
    # The angles are computed in float32.
    assert_close(codes, expected, name, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("backbone", "shape", "tokens"),
    [
        ("resnet18-1", (2, 3, 13, 18), 7 * 9),
        ("resnet34-2", (2, 1, 20, 20), 25),
        ("resnet50-1", (2, 3, 8, 8), 16),
        ("shallow-wide", (1, 2, 7, 9), 20),
        ("parity_backbone", (2, 9), 9),
        ("none", (2, 3, 5), 5),
        ("none", (2, 3, 2, 3, 4), 24),
    ],
)
def test_backbones(backbone, shape, tokens):
    channels = shape[1] if len(shape) > 2 else 3
    config = small_config(backbone_type=backbone, num_channels=channels, iterations=2)
    model = ContinuousThoughtMachineModel(config).eval()
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert model.encoder(inputs).shape == (shape[0], tokens, 8)
        assert model(**{config.input_name: inputs}).predictions.shape == (shape[0], 12, 2)
        if backbone == "parity_backbone":
            assert torch.equal(model.encoder(inputs.sign()), model.encoder(inputs.sign().clamp_min(0)))


def test_pretrained_stages_fit_the_backbone():
    config = ResNetConfig(hidden_sizes=[64, 128], depths=[2, 2], layer_type="basic", embedding_size=64)
    resnet = ResNetForImageClassification(config).eval()
    backbone = ContinuousThoughtMachineModel(small_config(backbone_type="resnet18-2")).eval().encoder.backbone
    backbone.load_stages(resnet)
    inputs = torch.randn(1, 64, 6, 6)
    with torch.no_grad():
        expected = resnet.resnet.encoder(inputs).last_hidden_state
        assert torch.equal(backbone.encoder(inputs).last_hidden_state, expected)
    for depth in ("resnet18-3", "resnet50-2"):
        other = ContinuousThoughtMachineModel(small_config(backbone_type=depth)).encoder.backbone
        with pytest.raises(ValueError, match=r"does not fit the backbone: encoder\.stages"):
            other.load_stages(resnet)
    with pytest.raises(ValueError, match="Linear does not fit"):
        backbone.load_stages(nn.Linear(1, 1))


def test_shapes_of_the_published_maze_model():
    config = ContinuousThoughtMachineConfig(
        iterations=50,
        d_model=64,
        d_input=32,
        heads=4,
        n_synch_out=16,
        n_synch_action=16,
        synapse_depth=4,
        memory_length=25,
        deep_nlms=True,
        memory_hidden_dims=4,
        do_layernorm_nlm=False,
        backbone_type="resnet18-2",
        positional_embedding_type="none",
        out_dims=250,
        prediction_reshaper=[50, 5],
        dropout=0.1,
        neuron_select_type="first-last",
    )
    with torch.no_grad():
        outputs = ContinuousThoughtMachineModel(config).eval()(torch.rand(4, 3, 99, 99))
    assert outputs.predictions.shape == (4, 250, 50)
    assert outputs.certainties.shape == (4, 2, 50)


def test_input_errors():
    model = ContinuousThoughtMachineForTokenClassification(small_config(backbone_type="resnet18-1", image_size=[9, 12]))
    images = torch.zeros(1, 3, 9, 12)
    with pytest.raises(ValueError, match="reads pixel_values, got no input"):
        model()
    with pytest.raises(ValueError, match="'resnet18-1' reads pixel_values, got input_values"):
        model(input_values=torch.zeros(1, 5))
    with pytest.raises(ValueError, match="reads pixel_values, got pixel_values and input_features"):
        model(pixel_values=images, input_features=images)
    with pytest.raises(ValueError, match=r"num_channels=3, height, width\), got \(1, 1, 9, 12\)"):
        model(images[:, :1])
    with pytest.raises(ValueError, match=r"got \(3, 9, 12\)"):
        model(images[0])
    with pytest.raises(ValueError, match="image_size=9x12, got 12x9"):
        model(images.transpose(2, 3))
    for iterations in (0, 2.5, True):
        with pytest.raises(ValueError, match=f"iterations={iterations} must be a positive int"):
            model(images, iterations=iterations)
    with pytest.raises(ValueError, match=r"certainty_threshold=2 must lie in \[0, 1\]"):
        model(images, certainty_threshold=2)
    with pytest.raises(ValueError, match=r"labels must be of shape \(1, 4\), .*\[4, 3\] says, got \(1, 5\)"):
        model(images, labels=torch.zeros(1, 5, dtype=torch.long))
    parity = ContinuousThoughtMachineModel(small_config(backbone_type="parity_backbone"))
    with pytest.raises(ValueError, match=r"input_values must be of shape \(batch_size, length\), got \(5,\)"):
        parity(input_values=torch.zeros(5))
    plain = ContinuousThoughtMachineModel(small_config())
    with pytest.raises(ValueError, match=r"num_channels=3, positions…\), got \(1, 3\)"):
        plain(input_features=torch.zeros(1, 3))
    square = small_config(backbone_type="resnet18-1", positional_embedding_type="custom-rotational")
    with pytest.raises(ValueError, match="square features, the image makes 5x6"):
        ContinuousThoughtMachineModel(square)(images)


def test_labels_follow_from_the_prediction():
    config = small_config(prediction_reshaper=[-1, 5], out_dims=50)
    assert (config.num_labels, config.prediction_shape) == (5, [10, 5])
    config = small_config(prediction_reshaper=[-1], num_labels=10)
    assert (config.out_dims, config.prediction_shape) == (10, [10])
    config = small_config(prediction_reshaper=[-1], id2label={0: "cat", 1: "dog", 2: "owl"})
    assert (config.out_dims, config.id2label[2]) == (3, "owl")


def test_image_classification_pipeline(tmp_path):
    from PIL import Image
    from transformers import ViTImageProcessor, pipeline

    labels = {0: "cat", 1: "dog", 2: "owl"}
    config = small_config(backbone_type="resnet18-1", prediction_reshaper=[-1], id2label=labels, image_size=12)
    model = ContinuousThoughtMachineForImageClassification(config).eval()
    model.save_pretrained(tmp_path)
    processor = ViTImageProcessor(size={"height": 12, "width": 12})
    processor.save_pretrained(tmp_path)
    image = Image.fromarray(np.random.RandomState(0).randint(0, 256, (20, 31, 3), dtype=np.uint8))
    answers = pipeline("image-classification", model=str(tmp_path), top_k=3)(image)
    with torch.no_grad():
        scores = model(**processor(image, return_tensors="pt")).logits.softmax(-1)[0]
    assert {answer["label"] for answer in answers} == set(labels.values())
    for answer in answers:
        index = {name: number for number, name in labels.items()}[answer["label"]]
        assert answer["score"] == pytest.approx(scores[index].item(), abs=1e-5)


# Initial values


def test_initial_weights():
    config = small_config(
        HyperContinuousThoughtMachineConfig,
        d_model=64,
        d_input=32,
        synapse_depth=2,
        hyper_nlms=True,
        backbone_type="resnet18-1",
        positional_embedding_type="multi-learnable-fourier",
    )
    model = HyperContinuousThoughtMachineModel(config)
    attention, layer = model.tick.attention, model.tick.neuron_models.layers[0]
    linear = model.tick.synapse.down_projections[0].linear
    uniform = [
        (model.encoder.projection.weight, 64**-0.5),
        (model.encoder.projection.bias, 64**-0.5),
        (model.encoder.backbone.stem.convolution.weight, 27**-0.5),
        (attention.q_proj.weight, (6 / 128) ** 0.5),
        (attention.v_proj.weight, (6 / 128) ** 0.5),
        (attention.out_proj.weight, 32**-0.5),
        (layer.weight, (4 + 10) ** -0.5),
        (linear.weight, 64**-0.5),
        (model.start_state, 64**-0.5),
        (model.start_trace, (64 + 4) ** -0.5),
    ]
    for tensor, bound in uniform:
        assert 0.8 * bound < tensor.abs().max() <= bound, tuple(tensor.shape)
    zero = (attention.k_proj.bias, attention.out_proj.bias, layer.bias, layer.gate, linear.gate)
    for tensor in (*zero, model.tick.synchronisation.decay, model.readout.synchronisation.decay):
        assert tensor.eq(0).all()
    assert layer.temperature.eq(1).all()
    for embedder, scale in zip(model.encoder.positional_embedding.embedders, np.linspace(1, 0.1, 10), strict=True):
        assert embedder.frequencies.std().item() == pytest.approx(scale**-2, rel=0.2)
    for tensor, variance in ((linear.hyper_v, 1 / 64), (linear.hyper_u, 1 / 72), (layer.hyper_u, 1 / 36)):
        assert tensor.var().item() == pytest.approx(variance, rel=0.25)


def test_neuron_pairs():
    config = small_config(n_synch_out=6, n_synch_action=9, n_random_pairing_self=3)
    pairs = draw_neurons(config)
    for kind, number in (("out", 6), ("action", 9)):
        left, right = pairs[kind]
        assert left.shape == right.shape == (number,)
        assert torch.equal(left[:3], right[:3])
        assert not torch.equal(left[3:], right[3:])
        assert ((left >= 0) & (left < 20)).all()
    again = draw_neurons(config)
    assert all(torch.equal(one, other) for kind in pairs for one, other in zip(pairs[kind], again[kind], strict=True))
    config.pairing_seed = 1
    assert not torch.equal(draw_neurons(config)["out"][0], pairs["out"][0])
    ends = draw_neurons(small_config(neuron_select_type="first-last"))
    assert ends["out"][0].tolist() == ends["out"][1].tolist() == list(range(6))
    assert ends["action"][0].tolist() == list(range(13, 20))
    # More pairs than neurons are fine where neurons are drawn with replacement, as in the published settings.
    assert len(draw_neurons(small_config(n_synch_out=50))["out"][0]) == 50


@pytest.mark.parametrize(
    "model_class",
    [ContinuousThoughtMachineForTokenClassification, HyperContinuousThoughtMachineForTokenClassification],
)
def test_training_step_compiles_into_one_graph(model_class):
    model = model_class(small_config(model_class.config_class, iterations=2)).train()
    batch = {"input_features": features().float(), "labels": torch.zeros(3, 4, dtype=torch.long)}
    expected = model(**batch).loss
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(**batch).loss
    torch.testing.assert_close(compiled, expected, rtol=1e-5, atol=1e-5)
    torch.compiler.reset()


@pytest.mark.parametrize(
    "module", [configuration_continuous_thought_machine, modeling_continuous_thought_machine], ids=lambda m: m.__name__
)
def test_examples_in_docstrings(module, capsys):
    classes = [value for _, value in inspect.getmembers(module, inspect.isclass) if value.__module__ == module.__name__]
    examples = {value.__name__: value.__doc__.replace("```", "") for value in classes if ">>>" in (value.__doc__ or "")}
    assert examples
    for name, text in examples.items():
        example = doctest.DocTestParser().get_doctest(text, {}, name, module.__file__, None)
        assert doctest.DocTestRunner().run(example).failed == 0, capsys.readouterr().out
