"""Vanilla Transformer: golden numbers of `torch.nn.Transformer`, a plain form of the paper, and the shared checks."""

import doctest
import json
import math
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from torch import nn
from torch._dynamo.utils import counters
from transformers import (
    AutoModel,
    AutoModelForMultipleChoice,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    DynamicCache,
    EncoderDecoderCache,
    set_seed,
)
from transformers.modeling_outputs import BaseModelOutput

from hf_models.vanilla_transformer import (
    VanillaTransformerConfig,
    VanillaTransformerForConditionalGeneration,
    VanillaTransformerForMultipleChoice,
    VanillaTransformerForSequenceClassification,
    VanillaTransformerModel,
    configuration_vanilla_transformer,
    convert_vanilla_transformer,
    modeling_vanilla_transformer,
)
from hf_models.vanilla_transformer.modeling_vanilla_transformer import (
    make_decoder_inputs,
    sinusoidal_positions,
    token_cross_entropy,
)
from tests.hf_models.model_tests import ModelTests

GOLDEN = Path(__file__).parents[1] / "golden" / "transformer"
GOLDEN_NAMES = ("paper_tiny", "torch_default_final_norm")

TINY = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_decoder_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}


class TestVanillaTransformer(ModelTests):
    config_class = VanillaTransformerConfig
    classes = {
        VanillaTransformerModel: AutoModel,
        VanillaTransformerForConditionalGeneration: AutoModelForSeq2SeqLM,
        VanillaTransformerForSequenceClassification: AutoModelForSequenceClassification,
        VanillaTransformerForMultipleChoice: AutoModelForMultipleChoice,
    }
    bad_configs = [
        ({"hidden_size": 18, "num_attention_heads": 4}, "hidden_size=18.*num_attention_heads=4"),
        ({"hidden_size": 15, "num_attention_heads": 5}, "hidden_size=15 must be even"),
        ({"eos_token_id": [2, 40]}, r"eos_token_id=40 must lie in \[0, vocab_size\)"),
        ({"pad_token_id": -1}, "pad_token_id=-1"),
    ]
    zero_gradient = {
        r"k_proj\.bias$": "a key bias adds one constant to all scores of a query, which softmax does not see",
    }

    def tiny_config(self, **overrides):
        return VanillaTransformerConfig(**TINY | {"num_labels": 5} | overrides)

    def recorded(self, model_class, config, inputs):
        source_length = inputs["input_ids"].shape[-1]
        rows = inputs["input_ids"].numel() // source_length
        heads, hidden_size = config.num_attention_heads, config.hidden_size
        states = (config.num_hidden_layers + 1, (rows, source_length, hidden_size))
        attentions = (config.num_hidden_layers, (rows, heads, source_length, source_length))
        if self.classes[model_class] not in (AutoModel, AutoModelForSeq2SeqLM):
            return {
                "output_hidden_states": {"hidden_states": states},
                "output_attentions": {"attentions": attentions},
            }
        length = inputs["labels" if "labels" in inputs else "decoder_input_ids"].shape[1]
        return {
            "output_hidden_states": {
                "encoder_hidden_states": states,
                "decoder_hidden_states": (config.num_decoder_layers + 1, (rows, length, hidden_size)),
            },
            "output_attentions": {
                "encoder_attentions": attentions,
                "decoder_attentions": (config.num_decoder_layers, (rows, heads, length, length)),
                "cross_attentions": (config.num_decoder_layers, (rows, heads, length, source_length)),
            },
        }


class TestVanillaTransformerPreNorm(TestVanillaTransformer):
    """The same checks with every option on its other side."""

    bad_configs = [({"max_position_embeddings": 0}, "max_position_embeddings")]
    not_applicable = {
        "test_remote_code_in_a_fresh_process": "options change nothing about the code that is saved",
    }

    def tiny_config(self, **overrides):
        options = {
            "norm_position": "pre",
            "hidden_act": "gelu",
            "position_embedding_type": "learned",
            "scale_embedding": False,
            "label_smoothing": 0.1,
        }
        return super().tiny_config(**options | overrides)


def build(model_class=VanillaTransformerForConditionalGeneration, attn_implementation="eager", **overrides):
    """A model in eval mode whose parameters are large enough to matter; dropout 0 unless given."""
    set_seed(0)
    config = VanillaTransformerConfig(**TINY | {"dropout": 0.0} | overrides)
    config._attn_implementation = attn_implementation
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.4)
    return model


def random_tokens(*shape, seed=1):
    return torch.randint(3, TINY["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


def pad(rows, side, value=0):
    """Rows of unequal length as one tensor, and their mask."""
    length = max(len(row) for row in rows)
    tokens = torch.full((len(rows), length), value)
    mask = torch.zeros_like(tokens)
    for index, row in enumerate(rows):
        where = slice(length - len(row), None) if side == "left" else slice(len(row))
        tokens[index, where], mask[index, where] = row, 1
    return tokens, mask


# Golden numbers of torch.nn.Transformer, reached through the converter


@pytest.fixture(scope="module", params=GOLDEN_NAMES)
def golden(request, tmp_path_factory):
    """Name, stored numbers, and the folder that the converter's command wrote."""
    folder = GOLDEN / request.param
    output_dir = tmp_path_factory.mktemp("converted") / request.param
    arguments = [str(folder / "config.json"), str(folder / "weights.safetensors"), str(output_dir)]
    assert convert_vanilla_transformer.main(arguments) == 0
    return request.param, load_file(folder / "io.safetensors"), output_dir


def golden_inputs(numbers):
    source, target, labels = numbers["src"], numbers["tgt_in"], numbers["labels"]
    return {
        "input_ids": source,
        "attention_mask": (source != 0).long(),
        "decoder_input_ids": target,
        "decoder_attention_mask": (target != 0).long(),
        "labels": labels.masked_fill(labels == 0, -100),
    }


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_golden_logits_and_loss(golden, attn_implementation):
    _, numbers, folder = golden
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, attn_implementation=attn_implementation)
    inputs = golden_inputs(numbers)
    outputs = model(**inputs)
    real = inputs["decoder_attention_mask"].bool()
    torch.testing.assert_close(outputs.logits[real], numbers["logits"][real], rtol=0, atol=1e-5)
    torch.testing.assert_close(outputs.loss, numbers["loss"].view(()), rtol=0, atol=1e-5)
    from_labels = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], labels=inputs["labels"])
    torch.testing.assert_close(from_labels.loss, numbers["loss"].view(()), rtol=0, atol=1e-5)
    nll_sum = token_cross_entropy(outputs.logits, inputs["labels"], num_items_in_batch=1)
    torch.testing.assert_close(nll_sum, numbers["nll_sum"].view(()), rtol=1e-6, atol=1e-5)


def test_golden_states_and_attention_maps(golden):
    _, numbers, folder = golden
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, attn_implementation="eager")
    inputs = golden_inputs(numbers)
    layer_outputs = {}
    for stack in ("encoder", "decoder"):
        for index, layer in enumerate(getattr(model.model, stack).layers):
            name = f"hidden.{stack}.{index}"
            layer.register_forward_hook(lambda _, __, output, name=name: layer_outputs.update({name: output}))
    with torch.no_grad():
        outputs = model(**inputs, output_hidden_states=True, output_attentions=True)
    expected_layers = {name for name in numbers if name.startswith("hidden.")}
    assert layer_outputs.keys() == expected_layers

    source, target = inputs["attention_mask"].bool(), inputs["decoder_attention_mask"].bool()
    states = layer_outputs | {
        "embedded_src": outputs.encoder_hidden_states[0],
        "embedded_tgt": outputs.decoder_hidden_states[0],
        "memory": outputs.encoder_last_hidden_state,
        "decoder_out": outputs.decoder_hidden_states[-1],
    }
    for name, actual in states.items():
        real = source if "encoder" in name or name in ("embedded_src", "memory") else target
        torch.testing.assert_close(actual[real], numbers[name][real], rtol=0, atol=1e-5, msg=lambda m, n=name: n + m)

    maps = {f"attn.encoder.{i}.self": (source, weights) for i, weights in enumerate(outputs.encoder_attentions)}
    maps |= {f"attn.decoder.{i}.self": (target, weights) for i, weights in enumerate(outputs.decoder_attentions)}
    maps |= {f"attn.decoder.{i}.cross": (target, weights) for i, weights in enumerate(outputs.cross_attentions)}
    assert maps.keys() == {name for name in numbers if name.startswith("attn.")}
    for name, (real, actual) in maps.items():
        actual, expected = (weights.transpose(1, 2)[real] for weights in (actual, numbers[name]))
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5, msg=lambda m, n=name: n + m)


def test_golden_gradients(golden):
    name, numbers, folder = golden
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, attn_implementation="sdpa")
    model(**golden_inputs(numbers)).loss.backward()
    parameters = dict(model.named_parameters())
    expected = load_file(GOLDEN / name / "grads.safetensors")
    covered = set()
    for theirs, ours in convert_vanilla_transformer.expected_tensors(model.config).items():
        actual = torch.cat([parameters[part].grad for part in ours])
        torch.testing.assert_close(actual, expected.pop(f"grad.{theirs}"), rtol=0, atol=1e-4, msg=theirs)
        covered.update(ours)
    assert not expected
    assert covered == parameters.keys()


def test_golden_positions(golden):
    _, numbers, folder = golden
    hidden_size = AutoModelForSeq2SeqLM.from_pretrained(folder).config.hidden_size
    expected = numbers["positions"]
    torch.testing.assert_close(
        sinusoidal_positions(torch.arange(len(expected)), hidden_size), expected, rtol=0, atol=1e-5
    )


# The converter


def golden_tensors():
    return load_file(GOLDEN / "paper_tiny" / "weights.safetensors")


def golden_settings():
    return json.loads((GOLDEN / "paper_tiny" / "config.json").read_text(encoding="utf-8"))


def run_converter(tmp_path, settings, tensors, suffix=".safetensors"):
    config_path, weights_path = tmp_path / "config.json", tmp_path / f"weights{suffix}"
    config_path.write_text(settings if isinstance(settings, str) else json.dumps(settings), encoding="utf-8")
    if isinstance(tensors, bytes):
        weights_path.write_bytes(tensors)
    elif suffix == ".safetensors":
        save_file(tensors, weights_path)
    else:
        torch.save(tensors, weights_path)
    return convert_vanilla_transformer.main([str(config_path), str(weights_path), str(tmp_path / "out")])


def test_converter_reads_pt_files_and_nested_settings(tmp_path):
    tensors = golden_tensors()
    assert run_converter(tmp_path, {"config": golden_settings()}, tensors, suffix=".pt") == 0
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")
    assert torch.equal(model.get_input_embeddings().weight, tensors["embed.weight"])
    assert model.config.dropout == 0.0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "out", "weights.pt"]


def test_converter_keeps_the_dtype_and_writes_into_an_empty_folder(tmp_path):
    tensors = {name: tensor.bfloat16() for name, tensor in golden_tensors().items()}
    (tmp_path / "out").mkdir()
    assert run_converter(tmp_path, golden_settings(), tensors) == 0
    assert AutoModel.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def without(mapping, name):
    return {key: value for key, value in mapping.items() if key != name}


@pytest.mark.parametrize(
    ("settings", "tensors", "message"),
    [
        (golden_settings, lambda: without(golden_tensors(), "embed.weight"), "missing tensor(s): embed.weight"),
        (golden_settings, lambda: golden_tensors() | {"odd": torch.zeros(1)}, "unknown tensor(s): odd"),
        (
            lambda: golden_settings() | {"final_norm": True},
            golden_tensors,
            "missing tensor(s): core.decoder.norm.bias, core.decoder.norm.weight, core.encoder.norm.bias",
        ),
        (
            lambda: golden_settings() | {"d_ff": 31},
            golden_tensors,
            "linear1.weight has shape [32, 16], the config says",
        ),
        (lambda: without(golden_settings(), "heads"), golden_tensors, "missing key(s): heads"),
        (lambda: golden_settings() | {"rope": True}, golden_tensors, "unknown key(s): rope"),
        (lambda: golden_settings() | {"heads": 3}, golden_tensors, "num_attention_heads=3"),
        (lambda: golden_settings() | {"norm": "sandwich"}, golden_tensors, "norm_position"),
        (lambda: golden_settings() | {"embedding_scale": 2.0}, golden_tensors, "embedding_scale=2.0 must be sqrt"),
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


def test_converter_runs_no_code_of_a_pt_file(tmp_path, capsys):
    assert run_converter(tmp_path, golden_settings(), {"embed.weight": Payload()}, suffix=".pt") == 2
    captured = capsys.readouterr()
    assert "cannot be read as weights" in captured.err
    assert captured.out == ""


def test_converter_overwrites_nothing(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("kept")
    assert run_converter(tmp_path, golden_settings(), golden_tensors()) == 2
    assert "is not an empty folder" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]


# The plain form: one sample, no masks to build, no cache, float64


class PlainForm:
    """The paper's equations over the parameters of a model, for one unpadded source and target."""

    def __init__(self, model):
        self.config = model.config
        self.parameters = dict(model.named_parameters(remove_duplicate=False))

    def linear(self, name, states):
        bias = self.parameters.get(f"{name}.bias", torch.zeros(()))
        return states @ self.parameters[f"{name}.weight"].T + bias

    def norm(self, name, states):
        centred = states - states.mean(-1, keepdim=True)
        scaled = centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + self.config.layer_norm_eps)
        return scaled * self.parameters[f"{name}.weight"] + self.parameters[f"{name}.bias"]

    def attention(self, name, queries, keys, causal):
        size = self.config.hidden_size // self.config.num_attention_heads
        heads = []
        for head in range(self.config.num_attention_heads):
            part = slice(head * size, (head + 1) * size)
            query = self.linear(f"{name}.q_proj", queries)[:, part]
            key = self.linear(f"{name}.k_proj", keys)[:, part]
            scores = query @ key.T / math.sqrt(size)
            if causal:
                scores = scores + torch.full_like(scores, -torch.inf).triu(1)
            heads.append(scores.softmax(-1) @ self.linear(f"{name}.v_proj", keys)[:, part])
        return self.linear(f"{name}.out_proj", torch.cat(heads, -1))

    def feed_forward(self, name, states):
        inner = self.linear(f"{name}.fc1", states)
        inner = inner.clamp(min=0) if self.config.hidden_act == "relu" else nn.functional.gelu(inner)
        return self.linear(f"{name}.fc2", inner)

    def sublayer(self, norm, states, function):
        if self.config.norm_position == "pre":
            return states + function(self.norm(norm, states))
        return self.norm(norm, states + function(states))

    def embed(self, stack, tokens):
        states = self.parameters[f"model.{stack}.embed_tokens.weight"][tokens]
        if self.config.scale_embedding:
            states = states * math.sqrt(self.config.hidden_size)
        if self.config.position_embedding_type == "learned":
            return states + self.parameters[f"model.{stack}.embed_positions.learned.weight"][: len(tokens)]
        size = self.config.hidden_size
        for position in range(len(tokens)):
            angles = [position / 10000 ** (2 * (i // 2) / size) for i in range(size)]
            signal = [math.sin(angle) if i % 2 == 0 else math.cos(angle) for i, angle in enumerate(angles)]
            states = states + torch.eye(len(tokens)).double()[:, position, None] * torch.tensor(
                signal, dtype=torch.float64
            )
        return states

    def stack(self, stack, tokens, num_layers, memory=None):
        states = self.embed(stack, tokens)
        for index in range(num_layers):
            layer = f"model.{stack}.layers.{index}"
            states = self.sublayer(
                f"{layer}.self_attn_norm",
                states,
                lambda x, layer=layer: self.attention(f"{layer}.self_attn", x, x, causal=memory is not None),
            )
            if memory is not None:
                states = self.sublayer(
                    f"{layer}.cross_attn_norm",
                    states,
                    lambda x, layer=layer: self.attention(f"{layer}.cross_attn", x, memory, causal=False),
                )
            states = self.sublayer(
                f"{layer}.feed_forward_norm",
                states,
                lambda x, layer=layer: self.feed_forward(f"{layer}.feed_forward", x),
            )
        return self.norm(f"model.{stack}.final_norm", states) if self.config.final_layer_norm else states

    def loss(self, source, labels):
        """Logits and the sum of the label-smoothed losses (section 5.4)."""
        target = torch.cat([torch.tensor([self.config.decoder_start_token_id]), labels[:-1]])
        memory = self.stack("encoder", source, self.config.num_hidden_layers)
        logits = self.linear("lm_head", self.stack("decoder", target, self.config.num_decoder_layers, memory))
        log_probabilities = logits - logits.logsumexp(-1, keepdim=True)
        smoothing = self.config.label_smoothing
        wanted = (1 - smoothing) * nn.functional.one_hot(labels, self.config.vocab_size).double()
        wanted = wanted + smoothing / self.config.vocab_size
        return logits, -(wanted * log_probabilities).sum()


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"final_layer_norm": True, "label_smoothing": 0.1},
        {"norm_position": "pre"},
        {"norm_position": "pre", "final_layer_norm": False, "hidden_act": "gelu", "tie_word_embeddings": False},
        {"position_embedding_type": "learned", "scale_embedding": False, "layer_norm_eps": 1e-2},
    ],
    ids=["paper", "final-norm", "pre-norm", "gelu-untied", "learned-unscaled"],
)
def test_model_equals_the_plain_form(options, attn_implementation):
    """A padded batch gives, in value and gradient, what the equations give sample by sample."""
    model = build(attn_implementation=attn_implementation, **options).double()
    sources = [random_tokens(length, seed=length) for length in (7, 4, 5)]
    targets = [random_tokens(length, seed=10 + length) for length in (3, 6, 1)]
    source, mask = pad(sources, "left")
    labels, target_mask = pad(targets, "right", value=-100)
    outputs = model(input_ids=source, attention_mask=mask, labels=labels)
    outputs.loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    model.zero_grad()
    plain = PlainForm(model)
    parts = [plain.loss(*pair) for pair in zip(sources, targets, strict=True)]
    loss = sum(part for _, part in parts) / target_mask.sum()
    loss.backward()
    torch.testing.assert_close(outputs.loss, loss, rtol=0, atol=1e-12)
    logits = torch.cat([logits for logits, _ in parts])
    torch.testing.assert_close(outputs.logits[target_mask.bool()], logits, rtol=0, atol=1e-11)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=0, atol=1e-10, msg=name)


# Positions


def test_sinusoidal_positions_follow_the_formula():
    positions = torch.tensor([[0, 1, 511], [512, 4000, 100_000]])
    encoded = sinusoidal_positions(positions, 6, torch.float64)
    for row in range(2):
        for column in range(3):
            for k in range(3):
                angle = positions[row, column].item() / 10000 ** (2 * k / 6)
                assert encoded[row, column, 2 * k].item() == pytest.approx(math.sin(angle), abs=1e-9)
                assert encoded[row, column, 2 * k + 1].item() == pytest.approx(math.cos(angle), abs=1e-9)
    half = sinusoidal_positions(positions, 6, torch.bfloat16)
    assert torch.equal(half, sinusoidal_positions(positions, 6).bfloat16())


def test_only_learned_positions_have_an_end():
    source, labels = random_tokens(2, 9), random_tokens(2, 4)
    assert build(max_position_embeddings=8)(input_ids=source, labels=labels).loss.isfinite()
    model = build(max_position_embeddings=8, position_embedding_type="learned")
    with pytest.raises(ValueError, match="longer than max_position_embeddings=8"):
        model(input_ids=source, labels=labels)
    mask = torch.ones_like(source)
    mask[:, :3] = 0
    padded = model(input_ids=source, attention_mask=mask, labels=labels)
    unpadded = model(input_ids=source[:, 3:], labels=labels)
    torch.testing.assert_close(padded.loss, unpadded.loss)


# Padding of labels and decoder inputs


def test_decoder_inputs_begin_before_the_first_label():
    labels = torch.tensor([[-100, -100, 7, 8, 2], [7, 8, 2, -100, -100], [-100] * 5])
    tokens, mask = make_decoder_inputs(labels, pad_token_id=0, decoder_start_token_id=1)
    assert tokens.tolist() == [[0, 0, 1, 7, 8], [1, 7, 8, 2, 0], [1, 0, 0, 0, 0]]
    assert mask.tolist() == [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1]]
    with pytest.raises(ValueError, match="pad_token_id=None"):
        make_decoder_inputs(labels, None, 1)


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_labels_may_be_padded_on_either_side(attn_implementation):
    model = build(attn_implementation=attn_implementation)
    source = random_tokens(3, 6)
    rows = [random_tokens(length, seed=length) for length in (2, 5, 4)]
    results = {}
    for side in ("left", "right"):
        labels, mask = pad(rows, side, value=-100)
        outputs = model(input_ids=source, labels=labels)
        results[side] = outputs.loss, outputs.logits[mask.bool()]
    torch.testing.assert_close(results["left"], results["right"], rtol=1e-5, atol=1e-5)


# Loss


def test_loss_of_parts_adds_up_to_the_loss_of_the_whole():
    model = build(label_smoothing=0.1)
    source = random_tokens(4, 6)
    labels, _ = pad([random_tokens(length, seed=length) for length in (1, 5, 4, 2)], "right", value=-100)
    whole = model(input_ids=source, labels=labels).loss
    count = (labels != -100).sum()
    for num_items in (count, int(count)):
        parts = [
            model(input_ids=source[rows], labels=labels[rows], num_items_in_batch=num_items).loss
            for rows in (slice(0, 1), slice(1, 4))
        ]
        torch.testing.assert_close(sum(parts), whole)


def test_loss_without_any_label_is_zero():
    loss = build()(input_ids=random_tokens(2, 4), labels=torch.full((2, 3), -100)).loss
    assert loss.item() == 0.0


# Generation


GENERATION = {
    "max_new_tokens": 8,
    "min_new_tokens": 8,
    # Untrained models like to repeat themselves, which would prove nothing.
    "no_repeat_ngram_size": 1,
    "output_scores": True,
    "return_dict_in_generate": True,
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "strategy",
    [
        {"do_sample": False},
        {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True},
        {"do_sample": True, "num_beams": 2},
        {"do_sample": False, "cache_implementation": "static"},
    ],
    ids=["greedy", "beams", "sampling", "beam-sampling", "static-cache"],
)
def test_cached_generation_equals_uncached(side, strategy):
    model = build(attn_implementation="sdpa")
    source, mask = pad([random_tokens(length, seed=length) for length in (7, 3)], side)
    results = []
    for use_cache in (True, False):
        options = strategy if use_cache else without(strategy, "cache_implementation")
        set_seed(3)
        results.append(model.generate(source, attention_mask=mask, use_cache=use_cache, **GENERATION, **options))
    cached, uncached = results
    assert torch.equal(cached.sequences, uncached.sequences)
    for step, (actual, expected) in enumerate(zip(cached.scores, uncached.scores, strict=True)):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4, msg=lambda m, s=step: f"step {s}: {m}")


@pytest.mark.parametrize("cache_implementation", ["dynamic", "static"])
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_generation_continues_left_padded_beginnings(cache_implementation, attn_implementation):
    model = build(attn_implementation=attn_implementation)
    sources = [random_tokens(length, seed=length) for length in (4, 6)]
    beginnings = [torch.tensor([1, 7, 8, 9, 10]), torch.tensor([1, 11])]
    alone = [
        model.generate(source[None], decoder_input_ids=beginning[None], max_new_tokens=5, min_new_tokens=5)[0]
        for source, beginning in zip(sources, beginnings, strict=True)
    ]
    source, mask = pad(sources, "right")
    beginning, beginning_mask = pad(beginnings, "left")
    together = model.generate(
        source,
        attention_mask=mask,
        decoder_input_ids=beginning,
        decoder_attention_mask=beginning_mask,
        max_new_tokens=5,
        min_new_tokens=5,
        cache_implementation=cache_implementation,
    )
    for row, expected in zip(together, alone, strict=True):
        assert row[-len(expected) :].tolist() == expected.tolist()


def test_cache_is_filled_once_for_the_source_and_grows_with_the_target():
    model = build()
    source, target = random_tokens(2, 5), random_tokens(2, 6)
    expected = model(input_ids=source, decoder_input_ids=target).logits
    encoder_outputs = model.get_encoder()(input_ids=source)
    cache = EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache(config=model.config))
    projected = []
    for layer in model.model.decoder.layers:
        layer.cross_attn.k_proj.register_forward_hook(lambda *_: projected.append(1))
    for start, end in ((0, 1), (1, 4), (4, 6)):
        outputs = model(encoder_outputs=encoder_outputs, decoder_input_ids=target[:, start:end], past_key_values=cache)
        assert outputs.past_key_values is cache
        assert cache.get_seq_length() == end
        torch.testing.assert_close(outputs.logits, expected[:, start:end], rtol=1e-5, atol=1e-5)
    assert len(projected) == model.config.num_decoder_layers


def test_encoder_outputs_may_be_a_tuple():
    model = build()
    source, target = random_tokens(2, 5), random_tokens(2, 3)
    encoder_outputs = model.get_encoder()(input_ids=source)
    assert isinstance(encoder_outputs, BaseModelOutput)
    expected = model(input_ids=source, decoder_input_ids=target)
    actual = model(encoder_outputs=encoder_outputs.to_tuple(), decoder_input_ids=target)
    assert torch.equal(actual.logits, expected.logits)
    assert torch.equal(actual.encoder_last_hidden_state, expected.encoder_last_hidden_state)


def test_a_trained_model_generates_what_it_learned():
    """Training through labels and generating through the cache are one and the same model."""
    set_seed(0)
    model = VanillaTransformerForConditionalGeneration(
        VanillaTransformerConfig(**TINY | {"hidden_size": 32, "dropout": 0.0, "num_decoder_layers": 2})
    )
    source = random_tokens(8, 6)
    labels = torch.cat([source.flip(1), torch.full((8, 1), 2)], dim=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(120):
        optimizer.zero_grad()
        model(input_ids=source, labels=labels).loss.backward()
        optimizer.step()
    generated = model.eval().generate(source, max_new_tokens=10)
    assert torch.equal(generated[:, 1:], labels)


# Heads


def test_classifier_reads_the_mean_of_the_real_tokens():
    model = build(VanillaTransformerForSequenceClassification, num_labels=3)
    rows = [random_tokens(length, seed=length) for length in (6, 3)]
    tokens, mask = pad(rows, "left")
    logits = model(input_ids=tokens, attention_mask=mask).logits
    for row, actual in zip(rows, logits, strict=True):
        states = model.model.encoder(input_ids=row[None]).last_hidden_state
        torch.testing.assert_close(actual, model.classifier(states[0].mean(dim=0)), rtol=1e-5, atol=1e-5)


def test_choices_are_scored_on_their_own():
    model = build(VanillaTransformerForMultipleChoice)
    choices = random_tokens(2, 4, 6)
    logits = model(input_ids=choices).logits
    reordered = model(input_ids=choices.flip(1)).logits
    torch.testing.assert_close(reordered.flip(1), logits)
    embedded = model(inputs_embeds=model.get_input_embeddings()(choices)).logits
    torch.testing.assert_close(embedded, logits)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()


@pytest.mark.parametrize(
    ("problem_type", "num_labels", "labels", "expected"),
    [
        ("single_label_classification", 3, torch.tensor([2, 0]), nn.functional.cross_entropy),
        ("regression", 1, torch.tensor([0.5, -1.0]), lambda x, y: nn.functional.mse_loss(x, y[:, None])),
        ("regression", 2, torch.tensor([[0.5, -1.0], [2.0, 0.0]]), nn.functional.mse_loss),
        (
            "multi_label_classification",
            3,
            torch.tensor([[0.0, 1.0, 1.0], [0.0, 0.0, 0.0]]),
            nn.functional.binary_cross_entropy_with_logits,
        ),
    ],
    ids=["classes", "one-number", "two-numbers", "several-labels"],
)
def test_classification_losses(problem_type, num_labels, labels, expected):
    tokens = random_tokens(2, 5)
    stated = build(VanillaTransformerForSequenceClassification, num_labels=num_labels, problem_type=problem_type)
    outputs = stated(input_ids=tokens, labels=labels)
    torch.testing.assert_close(outputs.loss, expected(outputs.logits, labels))
    count = labels.numel()
    parts = [
        stated(input_ids=tokens[row : row + 1], labels=labels[row : row + 1], num_items_in_batch=number).loss
        for row, number in ((0, count), (1, torch.tensor(count)))
    ]
    torch.testing.assert_close(sum(parts), outputs.loss)
    if (problem_type, num_labels) != ("regression", 2):
        derived = build(VanillaTransformerForSequenceClassification, num_labels=num_labels)
        torch.testing.assert_close(derived(input_ids=tokens, labels=labels).loss, outputs.loss)
        assert derived.config.problem_type is None


@pytest.mark.parametrize(
    "head_class", [VanillaTransformerForSequenceClassification, VanillaTransformerForMultipleChoice]
)
def test_encoder_heads_hold_no_decoder_and_start_from_a_pretrained_encoder(head_class, tmp_path):
    pretrained = build()
    pretrained.save_pretrained(tmp_path / "pretrained")
    head, report = head_class.from_pretrained(tmp_path / "pretrained", output_loading_info=True)
    assert report["missing_keys"] == {name for name, _ in head.named_parameters() if "classifier" in name}
    assert not report["unexpected_keys"]
    assert not any("decoder" in name or "lm_head" in name for name, _ in head.named_parameters())
    assert not head.config.is_encoder_decoder
    assert pretrained.config.is_encoder_decoder
    tokens = random_tokens(2, 5)
    expected = pretrained.model.encoder(input_ids=tokens).last_hidden_state
    head.save_pretrained(tmp_path / "head")
    body, report = AutoModel.from_pretrained(tmp_path / "head", output_loading_info=True, attn_implementation="eager")
    assert not report["missing_keys"]
    torch.testing.assert_close(body(input_ids=tokens).last_hidden_state, expected)


def test_encoder_alone_does_not_generate():
    config = VanillaTransformerConfig(**TINY, is_encoder_decoder=False)
    with pytest.raises(ValueError, match="is_encoder_decoder=True"):
        VanillaTransformerForConditionalGeneration(config)


# Configuration and embeddings


def test_config_fills_in_what_follows_from_other_fields():
    config = VanillaTransformerConfig(num_hidden_layers=4)
    assert (config.num_decoder_layers, config.final_layer_norm) == (4, False)
    assert VanillaTransformerConfig(norm_position="pre").final_layer_norm is True
    assert VanillaTransformerConfig(norm_position="pre", final_layer_norm=False).final_layer_norm is False
    config = VanillaTransformerConfig(num_hidden_layers=4, num_decoder_layers=2)
    assert config.get_text_config(decoder=True).num_hidden_layers == 2
    assert config.get_text_config(encoder=True).num_hidden_layers == 4
    assert config.get_text_config() is config


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", 0),
        ("num_decoder_layers", 0),
        ("dropout", 1.5),
        ("label_smoothing", 1.1),
        ("label_smoothing", -0.1),
        ("layer_norm_eps", 0),
        ("initializer_range", -0.02),
        ("norm_position", "middle"),
        ("hidden_act", "swish"),
    ],
)
def test_config_names_the_field_that_is_out_of_range(field, value):
    with pytest.raises(StrictDataclassError, match=field):
        VanillaTransformerConfig(**{field: value})


def test_number_of_parameters():
    """The paper's base model: one shared matrix, 6 + 6 layers (Table 3 states 65 million for it)."""
    with torch.device("meta"):
        model = VanillaTransformerForConditionalGeneration(VanillaTransformerConfig())
    width, inner = 512, 2048
    attention, norm, feed_forward = 4 * width * (width + 1), 2 * width, 2 * width * inner + width + inner
    expected = 37000 * width + 6 * (attention + feed_forward + 2 * norm) + 6 * (2 * attention + feed_forward + 3 * norm)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected == 63_082_496


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm_position": "pre", "position_embedding_type": "learned"},
        {"tie_word_embeddings": False, "num_decoder_layers": 1},
        {"num_labels": 5, "intermediate_size": 24},
    ],
)
def test_number_of_trainable_parameters(options):
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = VanillaTransformerConfig(**sizes | options)
    classes = {
        "ConditionalGeneration": VanillaTransformerForConditionalGeneration,
        "SequenceClassification": VanillaTransformerForSequenceClassification,
        "MultipleChoice": VanillaTransformerForMultipleChoice,
    }
    for head, model_class in classes.items():
        with torch.device("meta"):
            model = model_class(config)
        assert config.num_trainable_parameters(head) == model.num_parameters(only_trainable=True)
    alone = VanillaTransformerConfig(is_encoder_decoder=False, **sizes | options)
    with torch.device("meta"):
        encoder = VanillaTransformerModel(alone)
    assert alone.num_trainable_parameters() == encoder.num_parameters(only_trainable=True)
    with pytest.raises(ValueError, match="head='CausalLM'"):
        config.num_trainable_parameters("CausalLM")


def test_matched_to_a_number_of_parameters():
    matched = VanillaTransformerConfig.matched_to(3_000_000, vocab_size=1000, hidden_size=128, num_attention_heads=4)
    assert abs(matched.num_trainable_parameters() / 3_000_000 - 1) <= 0.01
    assert (matched.hidden_size, matched.num_attention_heads, matched.vocab_size) == (128, 4, 1000)
    assert 2 <= matched.intermediate_size / 128 <= 8
    assert (matched.norm_position, matched.position_embedding_type) == ("pre", "learned")
    fixed = {"num_hidden_layers": 3, "norm_position": "post", "position_embedding_type": "sinusoidal"}
    matched = VanillaTransformerConfig.matched_to(3_000_000, vocab_size=1000, tolerance=1e-3, **fixed)
    assert abs(matched.num_trainable_parameters() / 3_000_000 - 1) <= 1e-3
    assert {name: getattr(matched, name) for name in fixed} == fixed


def test_matched_to_another_configuration():
    class Other:
        vocab_size, hidden_size, num_attention_heads, num_decoder_layers, dropout = 300, 64, 4, 2, 0.0
        decoder_vocab_size = None
        eos_token_id = 7

        def num_trainable_parameters(self, head=None):
            return {None: 400_000, "MaskedLM": 200_000, "MultipleChoice": 150_000}[head]

    matched = VanillaTransformerConfig.matched_to(Other())
    assert abs(matched.num_trainable_parameters() / 400_000 - 1) <= 0.01
    shared = (matched.hidden_size, matched.num_decoder_layers, matched.dropout, matched.eos_token_id)
    assert shared == (64, 2, 0.0, 7)
    # Only the encoder-decoder answers in text.
    matched = VanillaTransformerConfig.matched_to(Other(), head="MaskedLM", dropout=0.2)
    assert abs(matched.num_trainable_parameters("ConditionalGeneration") / 200_000 - 1) <= 0.01
    assert (matched.dropout, matched.num_decoder_layers) == (0.2, matched.num_hidden_layers)
    matched = VanillaTransformerConfig.matched_to(Other(), head="MultipleChoice")
    assert abs(matched.num_trainable_parameters("MultipleChoice") / 150_000 - 1) <= 0.01
    Other.decoder_vocab_size = 40
    with pytest.raises(ValueError, match="vocab_size=300 and decoder_vocab_size=40"):
        VanillaTransformerConfig.matched_to(Other())


def test_matching_that_cannot_be():
    with pytest.raises(ValueError, match=r"no sizes with hidden_size=512, intermediate_size=8 .*10,000"):
        VanillaTransformerConfig.matched_to(10_000, hidden_size=512, intermediate_size=8)
    with pytest.raises(TypeError, match="str does not tell"):
        VanillaTransformerConfig.matched_to("base")


def test_untied_matrices_are_three_and_resize_together(tmp_path):
    model = build(tie_word_embeddings=False)
    matrices = [model.model.encoder.embed_tokens, model.model.decoder.embed_tokens, model.lm_head]
    assert len({matrix.weight.data_ptr() for matrix in matrices}) == 3
    model.resize_token_embeddings(45, mean_resizing=False)
    matrices = [model.model.encoder.embed_tokens, model.model.decoder.embed_tokens, model.lm_head]
    assert {matrix.weight.shape for matrix in matrices} == {(45, 16)}
    source, labels = torch.tensor([[44, 5]]), torch.tensor([[44, 2]])
    expected = model(input_ids=source, labels=labels).loss
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, attn_implementation="eager")
    torch.testing.assert_close(loaded(input_ids=source, labels=labels).loss, expected)


@pytest.mark.parametrize("positions", ["sinusoidal", "learned"])
def test_model_compiles_without_graph_breaks(positions):
    model = build(attn_implementation="sdpa", position_embedding_type=positions)
    source, mask = pad([random_tokens(length, seed=length) for length in (7, 3)], "left")
    labels, _ = pad([random_tokens(length, seed=length) for length in (2, 5)], "right", value=-100)
    expected = model(input_ids=source, attention_mask=mask, labels=labels)
    counters.clear()
    compiled = torch.compile(model, backend="aot_eager")
    actual = compiled(input_ids=source, attention_mask=mask, labels=labels)
    assert not counters["graph_break"]
    torch.compiler.reset()
    torch.testing.assert_close(actual.loss, expected.loss, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "module", [configuration_vanilla_transformer, modeling_vanilla_transformer], ids=["configuration", "modeling"]
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
