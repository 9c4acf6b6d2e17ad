"""In-context Transformers: golden numbers, the dense masked form, GPT-2 as an oracle, and the shared checks."""

import doctest
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTimeSeriesPrediction,
    GPT2Config,
    GPT2Model,
    set_seed,
)

from hf_models.in_context_transformer import (
    InContextTransformerConfig,
    InContextTransformerForPrediction,
    InContextTransformerModel,
    LowRankInContextTransformerConfig,
    LowRankInContextTransformerForSequenceClassification,
    LowRankInContextTransformerModel,
    configuration_in_context_transformer,
    convert_in_context_transformer,
    modeling_in_context_transformer,
)
from hf_models.in_context_transformer.modeling_in_context_transformer import (
    LowRankPositions,
    key_places,
    label_losses,
    make_attention_masks,
)
from tests.hf_models.model_tests import ModelTests

GOLDEN = Path(__file__).parents[1] / "golden" / "lowrank"
GOLDEN_NAMES = ("v3c3", "v4c2")

NUMBERS_ONLY = "prompts are numbers: there is no vocabulary"
NO_GENERATION = "predicts numbers, generates no tokens"
NOT_APPLICABLE = {
    "test_inputs_embeds_equal_input_ids": NUMBERS_ONLY,
    "test_resized_embeddings": NUMBERS_ONLY,
    "test_generation_with_cache_equals_without": NO_GENERATION,
    "test_generated_tokens_follow_the_forward_pass": NO_GENERATION,
    "test_generation_ignores_padding": NO_GENERATION,
    "test_generation_continues_padded_beginnings": NO_GENERATION,
    "test_forward_pass_in_two_parts": NO_GENERATION,
}
KEY_BIAS = {r"k_proj\.bias$": "a key bias adds one constant to all scores of a query, which softmax does not see"}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def padded(mask, row, size, padding_side):
    """Marks `size` real entries of a row of the mask."""
    length = mask.shape[1]
    mask[row, slice(length - size, None) if padding_side == "left" else slice(size)] = 1


class TestInContextTransformer(ModelTests):
    config_class = InContextTransformerConfig
    classes = {
        InContextTransformerModel: AutoModel,
        InContextTransformerForPrediction: AutoModelForTimeSeriesPrediction,
    }
    bad_configs = [
        ({"hidden_size": 18, "num_attention_heads": 4}, "hidden_size=18.*num_attention_heads=4"),
        ({"n_outputs": 4}, "n_outputs=4 must be at most n_dims=3"),
        ({"max_points": 0}, "max_points"),
    ]
    zero_gradient = KEY_BIAS
    not_applicable = {
        **NOT_APPLICABLE,
        **{
            f"test_save_and_load_restore_every_value[{name}-untied]": "no weights are tied"
            for name in ("InContextTransformerModel", "InContextTransformerForPrediction")
        },
    }
    num_points = 6

    def tiny_config(self, **overrides):
        sizes = {"n_dims": 3, "max_points": 6, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        return InContextTransformerConfig(**sizes | {"intermediate_size": 24} | overrides)

    def inputs(self, model_class, batch_size, config, padding_side=None):
        rows = range(batch_size)
        points = torch.stack([normal(self.num_points, config.n_dims, seed=row) for row in rows])
        values = torch.stack([normal(self.num_points, config.n_outputs, seed=100 + row) for row in rows])
        if config.n_outputs == 1:
            values = values.squeeze(-1)
        mask = torch.zeros(batch_size, self.num_points, dtype=torch.long)
        for row in rows:
            padded(mask, row, self.num_points - ((0, 3, 1)[row % 3] if padding_side else 0), padding_side)
        batch = {"input_values": points, "context_values": values, "attention_mask": mask}
        if self.classes[model_class] is AutoModel:
            return batch
        return batch | {"labels": values.masked_fill(mask.view(*mask.shape, *[1] * (values.ndim - 2)) == 0, -100)}

    def output_shapes(self, model_class, config, inputs):
        batch_size, num_points = inputs["attention_mask"].shape
        if self.classes[model_class] is AutoModel:
            return {"last_hidden_state": (batch_size, 2 * num_points, config.hidden_size)}
        return {"logits": (batch_size, num_points, config.n_outputs)}

    def per_sample(self, model_class):
        return {"last_hidden_state": "tokens"} if self.classes[model_class] is AutoModel else {"logits": "points"}

    @staticmethod
    def _mask(inputs, along):
        mask = inputs["attention_mask"].bool()
        return mask.repeat_interleave(2, dim=1) if along == "tokens" else mask

    def _unpadded(self, inputs, row):
        real = inputs["attention_mask"][row].bool()
        return {name: value[row : row + 1, real] for name, value in inputs.items()}

    def recorded(self, model_class, config, inputs):
        batch_size, length = inputs["attention_mask"].shape[0], 2 * inputs["attention_mask"].shape[1]
        layers, heads = config.num_hidden_layers, config.num_attention_heads
        return {
            "output_hidden_states": {"hidden_states": (layers + 1, (batch_size, length, config.hidden_size))},
            "output_attentions": {"attentions": (layers, (batch_size, heads, length, length))},
        }


class TestInContextTransformerWithOptions(TestInContextTransformer):
    """The same checks with every option on its other side."""

    bad_configs = [({"objective": "accuracy"}, "objective")]
    not_applicable = TestInContextTransformer.not_applicable | {
        "test_remote_code_in_a_fresh_process": "options change nothing about the code that is saved",
        "test_lora": "options change nothing about the linear maps",
        "test_resumed_run_equals_straight_run": "options add no state",
    }

    def tiny_config(self, **overrides):
        options = {
            "n_outputs": 2,
            "hidden_act": "relu",
            "objective": "binary_cross_entropy",
            "scale_residual_init": False,
        }
        return super().tiny_config(**options | overrides)


class TestLowRankInContextTransformer(ModelTests):
    config_class = LowRankInContextTransformerConfig
    classes = {
        LowRankInContextTransformerModel: AutoModel,
        LowRankInContextTransformerForSequenceClassification: AutoModelForSequenceClassification,
    }
    bad_configs = [
        ({"hidden_size": 18, "num_attention_heads": 4}, "hidden_size=18.*num_attention_heads=4"),
        ({"num_local_layers": 4}, r"num_local_layers=4 must lie in \[0, num_hidden_layers\).*num_hidden_layers=4"),
        ({"num_local_layers": -1}, "num_local_layers=-1"),
        ({"num_tail_tokens": 0}, "num_tail_tokens"),
        ({"block_loss_weight": -0.5}, "block_loss_weight"),
    ]
    zero_gradient = KEY_BIAS
    not_applicable = {
        **NOT_APPLICABLE,
        **{
            f"test_save_and_load_restore_every_value[{name}-untied]": "no weights are tied"
            for name in ("LowRankInContextTransformerModel", "LowRankInContextTransformerForSequenceClassification")
        },
    }
    num_blocks = 5

    def tiny_config(self, **overrides):
        sizes = {"n_dims": 3, "num_blocks": 5, "block_size": 3, "num_tail_tokens": 2, "hidden_size": 16}
        sizes |= {"num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 24}
        return LowRankInContextTransformerConfig(**sizes | overrides)

    def inputs(self, model_class, batch_size, config, padding_side=None):
        length = self.num_blocks * config.block_size + config.num_tail_tokens
        rows = range(batch_size)
        mask = torch.zeros(batch_size, self.num_blocks, dtype=torch.long)
        for row in rows:
            padded(mask, row, self.num_blocks - ((0, 3, 1)[row % 3] if padding_side else 0), padding_side)
        tokens = torch.stack([normal(length, config.n_dims, seed=row) for row in rows])
        batch = {"input_values": tokens, "attention_mask": mask}
        if self.classes[model_class] is AutoModel:
            return batch
        return batch | {"labels": torch.arange(batch_size) % 2}

    def output_shapes(self, model_class, config, inputs):
        batch_size, num_blocks = inputs["attention_mask"].shape
        if self.classes[model_class] is AutoModel:
            return {"last_hidden_state": (batch_size, num_blocks + config.num_tail_tokens, config.hidden_size)}
        return {"logits": (batch_size, 1)}

    def per_sample(self, model_class):
        return {"last_hidden_state": "keys"} if self.classes[model_class] is AutoModel else {"logits": None}

    def _mask(self, inputs, along):
        return nn.functional.pad(inputs["attention_mask"].bool(), (0, 2), value=True)

    def _unpadded(self, inputs, row):
        real = inputs["attention_mask"][row].bool()
        tokens = nn.functional.pad(real.repeat_interleave(3), (0, 2), value=True)
        columns = {"input_values": tokens, "attention_mask": real, "block_targets": real}
        return {
            name: value[row : row + 1, columns[name]] if name in columns else value[row : row + 1]
            for name, value in inputs.items()
        }

    def recorded(self, model_class, config, inputs):
        batch_size, length, _ = inputs["input_values"].shape
        layers, heads = config.num_hidden_layers, config.num_attention_heads
        return {
            "output_hidden_states": {"hidden_states": (layers + 1, (batch_size, length, config.hidden_size))},
            "output_attentions": {"attentions": (layers, (batch_size, heads, length, length))},
        }

    def test_trainer_trains_and_evaluates(self, head_class, tmp_path, monkeypatch):
        """As for all, but with internals recorded every token is computed: then the loss is equal up to rounding."""
        with monkeypatch.context() as patch:
            patch.setattr(self, "recorded", lambda *_: {})
            super().test_trainer_trains_and_evaluates(head_class, tmp_path)
        model = self.build(head_class)
        model.set_attn_implementation("eager")
        trainer = self._train(model, tmp_path, max_steps=1)
        expected = trainer.evaluate()["eval_loss"]
        for flag in self.recorded(head_class, model.config, self.inputs(head_class, 3, model.config)):
            setattr(model.config, flag, True)
            assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


class TestLowRankInContextTransformerWithOptions(TestLowRankInContextTransformer):
    """The same checks with every option on its other side, and a target for every block."""

    bad_configs = [
        ({"position_rank": 0}, "position_rank"),
        ({"learnable_masks": False}, "gate_cost_weight=0.1 needs learnable_masks=True"),
    ]
    not_applicable = TestLowRankInContextTransformer.not_applicable | {
        "test_remote_code_in_a_fresh_process": "options change nothing about the code that is saved",
        "test_lora": "options change nothing about the linear maps",
        "test_resumed_run_equals_straight_run": "options add no state",
    }

    def tiny_config(self, **overrides):
        options = {
            "num_local_layers": 1,
            "num_hidden_layers": 3,
            "position_rank": 2,
            "block_loss_weight": 0.5,
            "hidden_act": "gelu",
            "scale_residual_init": True,
            "learnable_masks": True,
            "gate_cost_weight": 0.1,
        }
        return super().tiny_config(**options | overrides)

    def inputs(self, model_class, batch_size, config, padding_side=None):
        batch = super().inputs(model_class, batch_size, config, padding_side)
        if "labels" in batch:
            targets = torch.arange(batch_size)[:, None] + torch.arange(self.num_blocks)
            batch["block_targets"] = (targets % 2).masked_fill(batch["attention_mask"] == 0, -100)
        return batch


def vary(model, scale=0.4):
    """Noise on every parameter, so that none is zero, constant or too small to matter."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype), alpha=scale)
    return model.eval()


def low_rank(model_class=LowRankInContextTransformerForSequenceClassification, implementation="eager", **overrides):
    """A small varied model in double precision."""
    set_seed(0)
    sizes = {"n_dims": 3, "hidden_size": 12, "num_attention_heads": 3, "num_hidden_layers": 4}
    config = LowRankInContextTransformerConfig(**sizes | overrides)
    config._attn_implementation = implementation
    return vary(model_class(config)).double()


def dense(model_class=InContextTransformerForPrediction, implementation="eager", **overrides):
    set_seed(0)
    sizes = {"n_dims": 3, "hidden_size": 12, "num_attention_heads": 3, "num_hidden_layers": 3, "max_points": 9}
    config = InContextTransformerConfig(**sizes | overrides)
    config._attn_implementation = implementation
    return vary(model_class(config)).double()


def prompts(config, num_blocks, batch_size=3, seed=1):
    length = num_blocks * config.block_size + config.num_tail_tokens
    return normal(batch_size, length, config.n_dims, seed=seed).double()


# Golden numbers, reached through the converter


@pytest.fixture(scope="module", params=GOLDEN_NAMES)
def golden(request, tmp_path_factory):
    """Name, stored numbers, and the folder that the converter's command wrote."""
    folder = GOLDEN / request.param
    output_dir = tmp_path_factory.mktemp("converted") / request.param
    arguments = [str(folder / "config.json"), str(folder / "weights.safetensors"), str(output_dir)]
    assert convert_in_context_transformer.main(arguments) == 0
    return request.param, load_file(folder / "io.safetensors"), output_dir


@pytest.mark.parametrize("outputs", ["label", "keys", "all"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_golden_outputs_and_gradients(golden, implementation, outputs):
    name, numbers, folder = golden
    model = AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation=implementation)
    result = model(numbers["xs"], labels=numbers["ys"], outputs=outputs)
    torch.testing.assert_close(result.logits[:, 0], numbers["label_logit"], rtol=0, atol=1e-5)
    torch.testing.assert_close(result.loss, numbers["loss"].view(()), rtol=0, atol=1e-5)
    if outputs == "keys":
        torch.testing.assert_close(result.token_logits, numbers["key_outputs"], rtol=0, atol=1e-5)
    elif outputs == "all":
        torch.testing.assert_close(
            result.token_logits[:, numbers["key_index"]], numbers["key_outputs"], rtol=0, atol=1e-5
        )
        every = numbers["trap.nonkey_outputs_zero_rows"]
        torch.testing.assert_close(result.token_logits, every, rtol=0, atol=1e-5)

    result.loss.backward()
    parameters = dict(model.named_parameters())
    expected = load_file(GOLDEN / name / "grads.safetensors")
    rows = torch.cat([expected.pop(f"grad.{name}") for name in ("pos_shared", "pos_last")])
    torch.testing.assert_close(parameters["model.positions.rows"].grad, rows, rtol=0, atol=1e-5)
    covered = {"model.positions.rows"}
    for theirs, (change, ours) in convert_in_context_transformer.expected_tensors(model.config).items():
        if change == "rows":
            continue
        actual = torch.cat([parameters[part].grad for part in ours])
        actual = actual.T if change == "transpose" else actual
        torch.testing.assert_close(actual, expected.pop(f"grad.{theirs}"), rtol=0, atol=1e-5, msg=theirs)
        covered.update(ours)
    assert not expected
    assert covered == parameters.keys()


def test_golden_states_and_masks(golden):
    name, numbers, folder = golden
    model = AutoModel.from_pretrained(folder)
    settings = json.loads((GOLDEN / name / "config.json").read_text())
    assert (model.config.sequence_length, model.config.num_key_tokens) == (
        settings["seq_len"],
        settings["key_positions"],
    )
    with torch.no_grad():
        result = model(numbers["xs"], output_hidden_states=True)
        positions = model.positions(model.config.num_blocks)
    torch.testing.assert_close(positions, numbers["positions"], rtol=0, atol=0)
    torch.testing.assert_close(result.hidden_states[0], numbers["embedded"], rtol=0, atol=1e-5)
    states = torch.stack(result.hidden_states, dim=1)[:, :, numbers["key_index"]]
    torch.testing.assert_close(states, numbers["key_hidden"], rtol=0, atol=1e-5)
    torch.testing.assert_close(result.last_hidden_state, numbers["key_final_norm"], rtol=0, atol=1e-5)

    config = model.config
    masks = make_attention_masks(config.num_blocks, config.block_size, config.num_tail_tokens)
    for actual, expected in zip(masks, (numbers["mask_first_two"], numbers["mask_later"]), strict=True):
        assert torch.equal(actual, expected.bool())
    places = key_places(config.sequence_length, config.block_size, config.num_tail_tokens)
    assert torch.equal(places, numbers["key_index"].long())


def test_counts_of_masks_and_positions():
    """V=20 tables of C=3 columns: 83 tokens, of which 23 are key tokens."""
    local, later = make_attention_masks(20, 4, 3)
    assert local.numel() == later.numel() == 83**2 == 6889
    assert local.sum() == 20 * 16 + 3 == 323
    assert later.sum() == 23**2 == 529
    for width, low, full in ((64, 448, 5312), (256, 1792, 21248)):
        config = LowRankInContextTransformerConfig(num_blocks=20, block_size=4, hidden_size=width)
        positions = LowRankPositions(config)
        assert sum(parameter.numel() for parameter in positions.parameters()) == low
        assert config.sequence_length * width == full


# The converter


def golden_tensors():
    return load_file(GOLDEN / "v3c3" / "weights.safetensors")


def golden_settings():
    return json.loads((GOLDEN / "v3c3" / "config.json").read_text(encoding="utf-8"))


def run_converter(tmp_path, settings, tensors, suffix=".safetensors"):
    config_path, weights_path = tmp_path / "config.json", tmp_path / f"weights{suffix}"
    config_path.write_text(settings if isinstance(settings, str) else json.dumps(settings), encoding="utf-8")
    if isinstance(tensors, bytes):
        weights_path.write_bytes(tensors)
    elif suffix == ".safetensors":
        save_file(tensors, weights_path)
    else:
        torch.save(tensors, weights_path)
    return convert_in_context_transformer.main([str(config_path), str(weights_path), str(tmp_path / "out")])


def test_converter_keeps_the_dtype_and_writes_into_an_empty_folder(tmp_path):
    tensors = {name: tensor.bfloat16() for name, tensor in golden_tensors().items()}
    (tmp_path / "out").mkdir()
    assert run_converter(tmp_path, {"config": golden_settings()}, tensors, suffix=".pt") == 0
    assert AutoModel.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "out", "weights.pt"]


class Original(nn.Module):
    """The dense model as its authors build it: GPT-2 between two linear maps."""

    def __init__(self, n_dims, n_positions, n_embd, n_layer, n_head):
        super().__init__()
        sizes = {"n_positions": 2 * n_positions, "n_embd": n_embd, "n_layer": n_layer, "n_head": n_head}
        config = GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, vocab_size=1)
        config._attn_implementation = "eager"
        self._read_in = nn.Linear(n_dims, n_embd)
        self._backbone = GPT2Model(config)
        self._read_out = nn.Linear(n_embd, 1)

    def forward(self, xs, ys):
        wide = nn.functional.pad(ys.unsqueeze(-1), (0, xs.shape[-1] - 1))
        tokens = torch.stack((xs, wide), dim=2).flatten(1, 2)
        # GPT-2 keeps its causal mask with eager attention only where a mask is given.
        mask = torch.ones(tokens.shape[:2], dtype=torch.long)
        states = self._backbone(inputs_embeds=self._read_in(tokens), attention_mask=mask).last_hidden_state
        return self._read_out(states)[:, ::2, 0]


def test_converted_dense_model_equals_gpt2(tmp_path):
    settings = {"n_dims": 3, "n_positions": 7, "n_embd": 12, "n_layer": 3, "n_head": 2}
    set_seed(0)
    original = vary(Original(**settings), scale=0.3)
    state = {"model_state_dict": original.state_dict(), "optimizer_state_dict": {}, "train_step": 5}
    assert run_converter(tmp_path, {"model": {"family": "gpt2"} | settings}, state, suffix=".pt") == 0
    model = AutoModelForTimeSeriesPrediction.from_pretrained(tmp_path / "out", dtype=torch.float64)
    original = original.double()
    xs, ys = normal(4, 7, 3, seed=1).double(), normal(4, 7, seed=2).double()
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        result = model(xs, ys, labels=ys)
        expected = original(xs, ys)
        torch.testing.assert_close(result.logits[..., 0], expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(result.loss, (expected - ys).square().mean(), rtol=0, atol=1e-12)

    model.zero_grad()
    model(xs, ys, labels=ys).loss.backward()
    (original(xs, ys) - ys).square().mean().backward()
    parameters, originals = dict(model.named_parameters()), dict(original.named_parameters())
    for theirs, (change, ours) in convert_in_context_transformer.expected_tensors(model.config).items():
        actual = torch.cat([parameters[part].grad for part in ours])
        actual = actual.T if change == "transpose" else actual
        torch.testing.assert_close(actual, originals[theirs].grad, rtol=0, atol=1e-12, msg=theirs)


def without(mapping, name):
    return {key: value for key, value in mapping.items() if key != name}


@pytest.mark.parametrize(
    ("settings", "tensors", "message"),
    [
        (golden_settings, lambda: without(golden_tensors(), "pos_last"), "missing tensor(s): pos_last"),
        (golden_settings, lambda: golden_tensors() | {"odd": torch.zeros(1)}, "unknown tensor(s): odd"),
        (lambda: golden_settings() | {"C": 4}, golden_tensors, "tensor pos_shared has shape [4, 12], the config says"),
        (
            lambda: golden_settings() | {"n_dims": 6},
            golden_tensors,
            "read_in.weight has shape [12, 7], the config says",
        ),
        (lambda: without(golden_settings(), "C"), golden_tensors, "missing key(s): C"),
        (lambda: without(without(golden_settings(), "C"), "V"), golden_tensors, "missing key(s): n_positions"),
        (lambda: golden_settings() | {"rope": True}, golden_tensors, "unknown key(s): rope"),
        (lambda: golden_settings() | {"activation": "relu"}, golden_tensors, "activation='relu' must be"),
        (lambda: golden_settings() | {"n_head": 5}, golden_tensors, "num_attention_heads=5"),
        (lambda: golden_settings() | {"C": "three"}, golden_tensors, "block_size"),
        (lambda: {"model": 3}, golden_tensors, "key 'model' must hold an object"),
        (lambda: "[1]", golden_tensors, "must hold a JSON object"),
        (lambda: "{", golden_tensors, "cannot be read as JSON"),
        (golden_settings, lambda: b"no weights", "cannot be read as weights"),
    ],
)
def test_converter_refuses(tmp_path, capsys, settings, tensors, message):
    assert run_converter(tmp_path, settings(), tensors()) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert str(tmp_path) in error
    assert not (tmp_path / "out").exists()


class Payload:
    def __reduce__(self):
        return (print, ("code was run",))


def test_converter_runs_no_code_and_overwrites_nothing(tmp_path, capsys):
    assert run_converter(tmp_path, golden_settings(), {"read_in.weight": Payload()}, suffix=".pt") == 2
    captured = capsys.readouterr()
    assert "cannot be read as weights" in captured.err
    assert captured.out == ""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("kept")
    assert run_converter(tmp_path, golden_settings(), golden_tensors()) == 2
    assert "is not an empty folder" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]


# The plain form: every token, every score, masks


def plain_logits(model, prompts, attention_mask=None):
    """The number read at every token, by the dense model with one mask for the local and one for the later layers."""
    config, parameters = model.config, dict(model.named_parameters())

    def linear(name, states):
        return states @ parameters[f"{name}.weight"].T + parameters[f"{name}.bias"]

    def norm(name, states):
        centred = states - states.mean(dim=-1, keepdim=True)
        scale = (centred.square().mean(dim=-1, keepdim=True) + config.layer_norm_eps).sqrt()
        return centred / scale * parameters[f"{name}.weight"] + parameters[f"{name}.bias"]

    def attention(name, states, mask, gate):
        query, key, value = (
            linear(f"{name}.{part}", states).unflatten(-1, (config.num_attention_heads, -1)).transpose(1, 2)
            for part in ("q_proj", "k_proj", "v_proj")
        )
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        weights = scores.exp() * mask[:, None]
        weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=1e-300) * gate
        return linear(f"{name}.out_proj", (weights @ value).transpose(1, 2).flatten(2))

    def gates(layer, length):
        """What the weights of a layer are multiplied with: looked up for each pair of tokens by itself."""
        logits = parameters[f"model.blocks.{layer}.attn.gates.logits"]
        block_size, tail_start = config.block_size, length - config.num_tail_tokens
        found = torch.zeros(length, length, dtype=logits.dtype)
        for query in range(length):
            for key in range(length):
                if layer < config.num_local_layers:
                    number = query % block_size * block_size + key % block_size
                    if query >= tail_start:
                        number = block_size**2 + query - tail_start
                else:
                    kinds = [max(0, place - tail_start + 1) for place in (query, key)]
                    number = kinds[0] * (1 + config.num_tail_tokens) + kinds[1]
                found[query, key] = number
        return logits.sigmoid()[found.long()]

    num_blocks = (prompts.shape[1] - config.num_tail_tokens) // config.block_size
    local, later = make_attention_masks(num_blocks, config.block_size, config.num_tail_tokens)
    masks = [mask.expand(len(prompts), -1, -1) for mask in (local, later)]
    if attention_mask is not None:
        visible = attention_mask.bool().repeat_interleave(config.block_size, dim=1)
        visible = nn.functional.pad(visible, (0, config.num_tail_tokens), value=True)
        masks[1] = masks[1] & visible[:, None]
    rows = parameters["model.positions.rows"]
    if config.position_rank is not None:
        rows = rows @ parameters["model.positions.directions"]
    positions = torch.cat([rows[: config.block_size]] * num_blocks + [rows[config.block_size :]])
    states = linear("model.read_in", prompts) + positions
    for layer in range(config.num_hidden_layers):
        name = f"model.blocks.{layer}"
        mask = masks[layer >= config.num_local_layers]
        gate = gates(layer, states.shape[1]) if config.learnable_masks else 1
        states = states + attention(f"{name}.attn", norm(f"{name}.ln_1", states), mask, gate)
        hidden = linear(f"{name}.feed_forward.fc1", norm(f"{name}.ln_2", states))
        states = states + linear(f"{name}.feed_forward.fc2", nn.functional.gelu(hidden, approximate="tanh"))
    return linear("read_out", norm("model.ln_f", states)).squeeze(-1)


SHAPES = [
    {"num_blocks": 4, "block_size": 3, "num_tail_tokens": 3, "num_local_layers": 2, "num_hidden_layers": 4},
    {"num_blocks": 20, "block_size": 4, "num_tail_tokens": 3, "num_local_layers": 2, "num_hidden_layers": 12},
    {"num_blocks": 3, "block_size": 2, "num_tail_tokens": 1, "num_local_layers": 1, "num_hidden_layers": 2},
    {"num_blocks": 3, "block_size": 2, "num_tail_tokens": 2, "num_local_layers": 0, "num_hidden_layers": 2},
    {"num_blocks": 2, "block_size": 4, "num_tail_tokens": 3, "num_local_layers": 3, "num_hidden_layers": 4},
    {"num_blocks": 5, "block_size": 1, "num_tail_tokens": 3, "num_local_layers": 2, "num_hidden_layers": 3},
    {"num_blocks": 1, "block_size": 5, "num_tail_tokens": 2, "num_local_layers": 1, "num_hidden_layers": 1 + 1},
    {"num_blocks": 4, "block_size": 3, "num_tail_tokens": 3, "num_hidden_layers": 4, "position_rank": 2},
    {"num_blocks": 4, "block_size": 3, "num_tail_tokens": 3, "num_hidden_layers": 4, "learnable_masks": True},
]


def relative_error(actual, expected):
    """Largest difference, in units of the largest expected value, or of 1 if that is less."""
    return ((actual - expected).abs().max() / expected.abs().max().clamp(min=1)).item()


@pytest.mark.parametrize("masked", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape.values())))
def test_sparse_execution_equals_dense_masked_form(shape, masked):
    model = low_rank(**shape)
    config = model.config
    inputs = prompts(config, config.num_blocks)
    mask = None
    if masked:
        mask = torch.rand(3, config.num_blocks, generator=torch.Generator().manual_seed(0)) < 0.6
    direction = normal(3, config.sequence_length, seed=3).double()
    places = {
        "label": torch.tensor([config.sequence_length - 1]),
        "keys": key_places(config.sequence_length, config.block_size, config.num_tail_tokens),
        "all": torch.arange(config.sequence_length),
    }
    expected = plain_logits(model, inputs, mask)
    for outputs, place in places.items():
        model.zero_grad()
        (expected[:, place] * direction[:, place]).sum().backward(retain_graph=True)
        gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        for implementation in ("eager", "sdpa"):
            model.set_attn_implementation(implementation)
            model.zero_grad()
            result = model(inputs, attention_mask=mask, outputs=outputs)
            actual = result.logits if outputs == "label" else result.token_logits
            assert relative_error(actual, expected[:, place]) < 1e-12, (outputs, implementation)
            assert torch.equal(result.logits[:, 0], actual[:, -1])
            (actual * direction[:, place]).sum().backward()
            for name, parameter in model.named_parameters():
                error = relative_error(parameter.grad, gradients[name])
                assert error < 1e-12, f"{outputs}, {implementation}, {name}: {error}"


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_query_without_keys_gets_zero_attention(implementation):
    module = dense().model.blocks[0].attn
    module.is_causal = False
    module.config._attn_implementation = implementation
    states = normal(2, 4, 12).double().requires_grad_()
    mask = torch.tensor([[True, False, True, True], [False] * 4, [True] * 4, [False, False, False, True]])
    output, weights = module.attend(states, states, states, mask[None, None])
    assert torch.equal(output[:, 1], torch.zeros(2, 12).double())
    assert (output[:, [0, 2, 3]] != 0).all()
    torch.testing.assert_close(output[:, 3], states[:, 3])
    output.sum().backward()
    assert states.grad.isfinite().all()
    if implementation == "eager":
        assert torch.equal(weights[:, :, 1], torch.zeros(2, 3, 4).double())
        assert (weights.masked_select(~mask) == 0).all()
        torch.testing.assert_close(weights.sum(dim=-1)[..., [0, 2, 3]], torch.ones(2, 3, 3).double())


def test_recorded_attention_lies_within_the_masks():
    model = low_rank(block_size=3)
    masks = make_attention_masks(5, 3, 3)
    maps = model(prompts(model.config, 5), output_attentions=True).attentions
    for layer, weights in enumerate(maps):
        mask = masks[layer >= model.config.num_local_layers]
        assert ((weights > 0) == mask).all()
        torch.testing.assert_close(weights.sum(dim=-1), mask.any(dim=-1).double().expand(3, 3, -1))


def test_work_is_that_of_the_key_tokens():
    """Floating-point operations of a label, counted by torch, against the formula."""
    for num_blocks, columns, layers in ((20, 3, 12), (50, 7, 5)):
        model = low_rank(block_size=columns + 1, num_hidden_layers=layers, hidden_size=24).eval()
        config, batch_size = model.config, 2
        inputs = prompts(config, num_blocks, batch_size=batch_size)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(inputs)
        n, k, d = inputs.shape[1], num_blocks + 3, config.hidden_size
        first = 24 * d**2 * n + 4 * d * num_blocks * (columns + 1) ** 2
        second = 4 * d**2 * n + 20 * d**2 * k + 4 * d * num_blocks * (columns + 1)
        middle = (layers - 3) * (24 * d**2 * k + 4 * d * k**2)
        last = 4 * d**2 * k + 20 * d**2 + 4 * d * k
        # Reading in and out; the three single tokens skip their queries and keys in layer 0, and their keys in layer 1,
        # where they and the keys of blocks alone have queries.
        ends = 2 * d * (config.n_dims * n + 1)
        skipped = 3 * 4 * d**2 + 3 * 4 * d**2
        assert counter.get_total_flops() == batch_size * (first + second + middle + last + ends - skipped)


# Properties of the low-rank model


def test_block_order_carries_no_information():
    model = low_rank(block_size=4)
    inputs = prompts(model.config, 7)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    blocks, tail = inputs[:, :-3].unflatten(1, (7, 4)), inputs[:, -3:]
    permuted = torch.cat((blocks[:, order].flatten(1, 2), tail), dim=1)
    with torch.no_grad():
        expected, actual = (model(values, outputs="keys").token_logits for values in (inputs, permuted))
    torch.testing.assert_close(actual[:, :7], expected[:, order], rtol=0, atol=1e-12)
    torch.testing.assert_close(actual[:, 7:], expected[:, 7:], rtol=0, atol=1e-12)


def test_a_block_is_alone_until_the_later_layers():
    model = low_rank(LowRankInContextTransformerModel, block_size=4)
    inputs = prompts(model.config, 5)
    changed = inputs.clone()
    changed[:, 4:7] += 1.0
    with torch.no_grad():
        states, other = (model(values, output_hidden_states=True).hidden_states for values in (inputs, changed))
    elsewhere = [place for place in range(23) if not 4 <= place < 8]
    keys = [place for place in elsewhere if place > 19 or place % 4 == 3]
    assert torch.equal(states[2][:, elsewhere], other[2][:, elsewhere])
    assert (states[2][:, 7] != other[2][:, 7]).all()
    assert (states[3][:, keys] != other[3][:, keys]).all()


def test_a_model_runs_at_any_number_of_blocks():
    model = low_rank(num_blocks=4)
    for num_blocks in (1, 4, 30):
        inputs = prompts(model.config, num_blocks)
        with torch.no_grad():
            torch.testing.assert_close(
                model(inputs).logits[:, 0], plain_logits(model, inputs)[:, -1], rtol=1e-12, atol=1e-12
            )


def test_rank_of_positions():
    config = LowRankInContextTransformerConfig(num_blocks=9, block_size=5, num_tail_tokens=3, hidden_size=32)
    for rank, expected in ((None, 8), (3, 3), (8, 8)):
        config.position_rank = rank
        set_seed(0)
        model = LowRankInContextTransformerModel(config)
        positions = model.positions(9)
        assert positions.shape == (48, 32)
        assert torch.linalg.matrix_rank(positions) == expected
        assert positions.std().item() == pytest.approx(config.initializer_range, rel=0.3)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((2, 10, 3), {}, "length 10; it must be V \\* block_size \\+ num_tail_tokens .* block_size=4"),
        ((2, 3, 3), {}, "length 3"),
        ((2, 11, 4), {}, r"\(2, 11, 4\) must be \(batch_size, length, n_dims\), where n_dims=3"),
        ((2, 11), {}, r"\(2, 11\) must be"),
        ((2, 11, 3), {"attention_mask": torch.ones(2, 3)}, r"attention_mask of shape \(2, 3\) must be .* \(2, 2\)"),
        ((2, 11, 3), {"outputs": "everything"}, "outputs='everything' must be 'label', 'keys' or 'all'"),
        ((2, 11, 3), {"labels": torch.ones(3)}, r"labels of shape \(3,\) must be \(batch_size,\) = \(2,\)"),
        ((2, 11, 3), {"block_targets": torch.ones(2, 3)}, r"block_targets of shape \(2, 3\) must be .* \(2, 2\)"),
    ],
)
def test_low_rank_model_refuses(shape, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        low_rank()(torch.zeros(shape), **options)
    assert "\n" not in str(caught.value)


def test_gates_close_edges_and_cost():
    settings = {"num_blocks": 4, "block_size": 3, "num_hidden_layers": 4}
    ungated, gated = low_rank(**settings), low_rank(**settings, learnable_masks=True, gate_cost_weight=0.5)
    gated.load_state_dict(ungated.state_dict(), strict=False)
    gate_logits = [parameter for name, parameter in gated.named_parameters() if name.endswith("gates.logits")]
    assert [len(logits) for logits in gate_logits] == [12, 12, 16, 16]
    inputs, labels = prompts(gated.config, 4), torch.tensor([1, 0, 1])
    with torch.no_grad():
        for logits in gate_logits:
            logits.fill_(60.0)
    plain, opened = ungated(inputs, labels=labels), gated(inputs, labels=labels)
    torch.testing.assert_close(opened.logits, plain.logits, rtol=0, atol=1e-12)
    torch.testing.assert_close(opened.gate_loss.item(), 1.0)
    torch.testing.assert_close(opened.loss, plain.loss + 0.5)
    assert plain.gate_loss is None
    # Without any edge of the last token, the label is blind to all others.
    with torch.no_grad():
        for logits in gate_logits[2:]:
            logits.view(4, 4)[3] = -800.0
    first, second = gated(inputs), gated(torch.cat((inputs[:, :-1].flip(0), inputs[:, -1:]), dim=1))
    torch.testing.assert_close(first.logits, second.logits, rtol=0, atol=1e-12)
    open_share = (24 + 32 - 2 * 4) / 56
    torch.testing.assert_close(gated(inputs, labels=labels).gate_loss.item(), open_share)
    # Parts of a batch carry their share of the cost.
    halves = [gated(inputs[rows], labels=labels[rows], num_items_in_batch=3) for rows in ([0, 1], [2])]
    torch.testing.assert_close(sum(half.gate_loss.item() for half in halves), open_share)
    assert "attentions" in gated(inputs, output_attentions=True)


def test_a_cost_closes_gates_that_nothing_needs():
    model = low_rank(num_blocks=3, block_size=2, num_hidden_layers=3, learnable_masks=True, gate_cost_weight=1.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    inputs, labels = prompts(model.config, 3), torch.tensor([1, 0, 1])
    costs = []
    for _ in range(60):
        outputs = model(inputs, labels=labels)
        optimizer.zero_grad()
        outputs.loss.backward()
        optimizer.step()
        costs.append(outputs.gate_loss.item())
    assert costs[0] > 0.5
    assert costs[-1] < 0.5 * costs[0]
    assert outputs.label_loss < 0.1


def test_losses_of_label_and_blocks():
    model = low_rank(block_loss_weight=0.25)
    inputs = prompts(model.config, 4, batch_size=3)
    labels = torch.tensor([1, -100, -1])
    targets = torch.tensor([[1, 0, -100, 1], [0, 0, 0, 1], [-100] * 4])
    result = model(inputs, labels=labels, block_targets=targets)
    numbers = model(inputs, outputs="keys").token_logits
    cross_entropy = nn.functional.binary_cross_entropy_with_logits
    label_loss = cross_entropy(numbers[[0, 2], -1], torch.tensor([1.0, 0.0]).double())
    first = cross_entropy(numbers[0, [0, 1, 3]], torch.tensor([1.0, 0.0, 1.0]).double())
    second = cross_entropy(numbers[1, :4], torch.tensor([0.0, 0.0, 0.0, 1.0]).double())
    torch.testing.assert_close(result.label_loss, label_loss)
    torch.testing.assert_close(result.block_loss, (first + second) / 2)
    torch.testing.assert_close(result.loss, label_loss + 0.25 * (first + second) / 2)
    torch.testing.assert_close(result.token_logits, numbers)
    everywhere = model(inputs, labels=labels, block_targets=targets, outputs="all")
    torch.testing.assert_close(everywhere.loss, result.loss)
    assert model(inputs, block_targets=targets).loss is None
    parts = [
        model(inputs[rows], labels=labels[rows], block_targets=targets[rows], num_items_in_batch=torch.tensor(2))
        for rows in (slice(0, 1), slice(1, 3))
    ]
    torch.testing.assert_close(parts[0].loss + parts[1].loss, result.loss)


# The dense model


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_prediction_sees_only_earlier_pairs_and_its_own_x(implementation):
    model = dense(implementation=implementation)
    xs, ys = normal(2, 9, 3, seed=1).double(), normal(2, 9, seed=2).double()
    with torch.no_grad():
        expected = model(xs, ys).logits
        for place in range(9):
            other_xs, other_ys = xs.clone(), ys.clone()
            other_xs[:, place + 1 :] += 1.0
            other_ys[:, place:] += 1.0
            actual = model(other_xs, other_ys).logits
            torch.testing.assert_close(actual[:, : place + 1], expected[:, : place + 1], rtol=0, atol=1e-12)
            if place < 8:
                assert ((actual - expected)[:, place + 1 :].abs() > 1e-9).all()
            shorter = model(xs[:, : place + 1], ys[:, :place]).logits
            torch.testing.assert_close(shorter, expected[:, : place + 1], rtol=0, atol=1e-12)


def test_losses_of_predictions():
    logits, labels = normal(2, 3, 1, seed=1), torch.tensor([[[1.5], [-100.0], [-1.0]], [[0.0], [2.0], [0.5]]])
    real = labels != -100
    squared = label_losses(logits, labels, "squared_error")
    assert torch.equal(squared[real], (logits - labels)[real] ** 2)
    assert squared[~real] == 0
    entropy = label_losses(logits, labels, "binary_cross_entropy")
    right = torch.where(labels > 0, logits, -logits)
    torch.testing.assert_close(entropy[real], nn.functional.softplus(-right[real]))
    assert entropy[~real] == 0

    model = dense()
    xs, ys = normal(2, 3, 3).double(), labels.double()[..., 0]
    result = model(xs, ys.clamp(min=-9), labels=ys)
    expected = (result.logits - labels)[real].square()
    torch.testing.assert_close(result.loss, expected.mean())
    shared = model(xs, ys.clamp(min=-9), labels=ys, num_items_in_batch=20).loss
    torch.testing.assert_close(shared, expected.sum() / 20)
    assert model(xs, ys, labels=torch.full_like(ys, -100)).loss == 0


@pytest.mark.parametrize(
    ("xs", "ys", "options", "message"),
    [
        ((2, 4, 5), (2, 4), {}, r"input_values of shape \(2, 4, 5\) must be .* n_dims=3"),
        ((2, 10, 3), (2, 10), {}, "input_values hold 10 points; there must be 1 to max_points=9"),
        ((2, 4, 3), (2, 2), {}, r"context_values of shape \(2, 2\) must be .* num_points=4"),
        ((2, 4, 3), (2, 4, 2), {}, "n_outputs=1"),
        (
            (2, 4, 3),
            (2, 4),
            {"attention_mask": torch.ones(2, 8)},
            r"attention_mask of shape \(2, 8\) must be .* \(2, 4\)",
        ),
        ((2, 4, 3), (2, 4), {"labels": torch.ones(2, 3)}, r"labels of shape \(2, 3\) must be \(2, 4, 1\)"),
    ],
)
def test_dense_model_refuses(xs, ys, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        dense()(torch.zeros(xs), torch.zeros(ys), **options)
    assert "\n" not in str(caught.value)


def test_models_compile_without_graph_breaks():
    model = low_rank(implementation="sdpa").float()
    inputs = prompts(model.config, 5).float()
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 0, 1, 1], [0, 0, 1, 1, 1]])
    labels = torch.tensor([1, 0, 1])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected, actual = (run(inputs, attention_mask=mask, labels=labels).loss for run in (model, compiled))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)

    model = dense(implementation="sdpa").float()
    xs, ys = normal(2, 9, 3), normal(2, 9, seed=2)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected, actual = (run(xs, ys, labels=ys).loss for run in (model, compiled))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "module",
    [configuration_in_context_transformer, modeling_in_context_transformer],
    ids=["configuration", "modeling"],
)
def test_examples_in_docstrings_run(module):
    finder = doctest.DocTestFinder(exclude_empty=True)
    examples = [test for test in finder.find(module) if test.examples]
    assert examples
    for example in examples:
        # The closing fence of a Markdown block is not output.
        for part in example.examples:
            part.want = part.want.replace("```\n", "")
        assert doctest.DocTestRunner().run(example).failed == 0
