"""Connection Transformer: the shared checks, the original's golden data, and the properties of the reasoning loop."""

import doctest
import inspect
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    DynamicCache,
    EncoderDecoderCache,
)
from transformers.utils.output_capturing import OutputRecorder

from hf_models import vanilla_transformer
from hf_models.connection_transformer import (
    ConnectionTransformerConfig,
    ConnectionTransformerForConditionalGeneration,
    ConnectionTransformerForMaskedLM,
    ConnectionTransformerForMultipleChoice,
    ConnectionTransformerForSequenceClassification,
    ConnectionTransformerModel,
    connections_connection_transformer,
)
from hf_models.connection_transformer import convert_connection_transformer as conversion
from hf_models.connection_transformer.connections_connection_transformer import (
    CONNECTION_TYPES,
    LARGE_MATRIX,
    ConnectionTransformerPerPairConnections,
    ConnectionTransformerScalarConnections,
    PassMemory,
    onednn_linear,
    products,
    send_messages,
)
from hf_models.connection_transformer.modeling_connection_transformer import (
    halting_chances,
    orthonormal_slots,
    ponder_divergence,
    shift_right,
    token_positions,
)
from hf_models.vanilla_transformer import VanillaTransformerConfig
from tests.hf_models.model_tests import ModelTests

GOLDEN = Path(__file__).parent.parent / "golden" / "connection"
# Agreement that two independent implementations reach on the golden data, with a margin of 5.
TOLERANCE = {"atol": 5e-5, "rtol": 1e-4}


class TestConnectionTransformer(ModelTests):
    config_class = ConnectionTransformerConfig
    classes = {
        ConnectionTransformerModel: AutoModel,
        ConnectionTransformerForConditionalGeneration: AutoModelForSeq2SeqLM,
        ConnectionTransformerForSequenceClassification: AutoModelForSequenceClassification,
        ConnectionTransformerForMultipleChoice: AutoModelForMultipleChoice,
        ConnectionTransformerForMaskedLM: AutoModelForMaskedLM,
    }
    bad_configs = [
        ({"hidden_size": 30, "num_attention_heads": 4}, "hidden_size=30.*num_attention_heads=4"),
        ({"decoder_vocab_size": 41}, "tie_word_embeddings=True.*vocab_size=40.*decoder_vocab_size=41"),
        ({"step_cost_target": 0.5}, "step_cost_target=0.5"),
        ({"eos_token_id": [2, 40]}, "eos_token_id=40.*vocab_size=40"),
        ({"tie_word_embeddings": False, "decoder_vocab_size": 2}, "eos_token_id=2.*decoder_vocab_size=2"),
        ({"num_hidden_layers": "two"}, "num_decoder_layers='two'"),
        ({"num_slots": 1}, "num_slots"),
        ({"connection_type": "full"}, "connection_type"),
        ({"initial_update_ratio": 0}, "initial_update_ratio=0"),
        ({"halting": "learned"}, "halting='learned'.*deep_supervision must be above 0"),
        ({"halting": "ponder"}, "halting='ponder'.*deep_supervision must be above 0"),
        ({"ponder_prior": 1}, "ponder_prior"),
    ]

    zero_gradient = {r"_attn\.k_proj\.bias$": "adds the same to all scores of a query, which the softmax takes away"}

    def tiny_config(self, **overrides):
        sizes = {
            "vocab_size": 40,
            "hidden_size": 16,
            "num_slots": 6,
            "connection_rank": 3,
            "max_reasoning_steps": 4,
            "num_decoder_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "max_position_embeddings": 20,
        }
        # No sample stops: with and without recording the same operations run, which the shared checks compare bit for
        # bit. The step cost has no weight here, as it is exact under accumulation only where the number of sequences
        # is given, which the library's Trainer does not do. Both have tests of their own below.
        others = {"halting_threshold": 1e-3, "orthogonality_weight": 0.1, "label_smoothing": 0.1}
        return ConnectionTransformerConfig(**(sizes | others | overrides))

    def inputs(self, model_class, batch_size, config, padding_side=None):
        if model_class is not ConnectionTransformerForMaskedLM:
            return super().inputs(model_class, batch_size, config, padding_side)
        batch = super().inputs(ConnectionTransformerForSequenceClassification, batch_size, config, padding_side)
        # A token for every real position.
        labels = (3 * batch["input_ids"] + 1) % config.vocab_size
        return batch | {"labels": labels.masked_fill(batch["attention_mask"] == 0, -100)}

    def output_shapes(self, model_class, config, inputs):
        if model_class is ConnectionTransformerForMaskedLM:
            return {"logits": (*inputs["input_ids"].shape, config.vocab_size)}
        return super().output_shapes(model_class, config, inputs)

    def per_sample(self, model_class):
        steps = {"reasoning_steps": None, "expected_steps": None}
        if model_class is ConnectionTransformerForMaskedLM:
            return {"logits": "source"} | steps
        slots = {"encoder_last_hidden_state": None} if model_class in list(self.classes)[:2] else {}
        return super().per_sample(model_class) | slots | steps

    def recorded(self, model_class, config, inputs):
        source_length, num_steps = inputs["input_ids"].shape[-1], config.max_reasoning_steps
        rows = inputs["input_ids"].shape[:-1].numel()
        states = (rows, config.num_slots, config.hidden_size)
        internals = {
            "output_slot_updates": {"slot_updates": (num_steps, states)},
            "output_halting_measures": {"halting_measures": (num_steps, (rows,))},
            "output_compression_weights": {"compression_weights": (1, (rows, source_length, config.num_slots))},
        }
        if model_class not in list(self.classes)[:2]:
            return internals | {"output_hidden_states": {"hidden_states": (num_steps + 1, states)}}
        target_length = (inputs.get("labels") if "labels" in inputs else inputs["decoder_input_ids"]).shape[1]
        target = (rows, target_length, config.hidden_size)
        heads, layers = config.num_attention_heads, config.num_decoder_layers
        return internals | {
            "output_hidden_states": {
                "encoder_hidden_states": (num_steps + 1, states),
                "decoder_hidden_states": (layers + 1, target),
            },
            "output_attentions": {
                "decoder_attentions": (layers, (rows, heads, target_length, target_length)),
                "cross_attentions": (layers, (rows, heads, target_length, config.num_slots)),
            },
        }


class TestConnectionTransformerPerPair(TestConnectionTransformer):
    """The same checks with a source and a target matrix for every pair of slots."""

    connection_type = "per_pair"
    not_applicable = {"test_remote_code_in_a_fresh_process": "the connection type changes nothing about the saved code"}

    def tiny_config(self, **overrides):
        return super().tiny_config(**{"connection_type": self.connection_type} | overrides)


class TestConnectionTransformerBlock(TestConnectionTransformerPerPair):
    connection_type = "block"


class TestConnectionTransformerDiagonal(TestConnectionTransformerPerPair):
    connection_type = "diagonal"


class TestConnectionTransformerReader(TestConnectionTransformer):
    """The same checks with a decoder of the library, which is trained too, as the reader of the source."""

    not_applicable = {
        "test_save_and_load_restore_every_value[ConnectionTransformerForMaskedLM-tied]": "with a reader the head that "
        "predicts at the source's positions always has a matrix of its own"
    }
    bad_configs = [
        ({"reader_config": {"hidden_size": 8}}, "reader_config has no model_type"),
        ({"reader_config": {"model_type": "lama"}}, "lama"),
        ({"reader_config": {"model_type": "t5"}}, "a t5 has a decoder"),
        ({"reader_config": {"model_type": "vit"}}, "a vit has no vocab_size"),
        ({"reader_config": {"model_type": "llama", "vocab_size": 39}}, "vocab_size=40.*reader_config.vocab_size=39"),
        (
            {"reader_config": {"model_type": "gpt2", "n_positions": 19}},
            "max_position_embeddings=20.*reader_config.max_position_embeddings=19",
        ),
    ]

    def tiny_config(self, **overrides):
        reader = {
            "model_type": "llama",
            "vocab_size": 40,
            "hidden_size": 12,
            "intermediate_size": 20,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
        }
        return super().tiny_config(**{"reader_config": reader, "freeze_reader": False} | overrides)


READERS = {
    "llama": {"hidden_size": 12, "intermediate_size": 20, "num_attention_heads": 2, "num_key_value_heads": 1},
    "gpt2": {"n_embd": 12, "n_head": 2, "n_positions": 32},
    "bert": {"hidden_size": 12, "intermediate_size": 20, "num_attention_heads": 2, "max_position_embeddings": 32},
    "roberta": {"hidden_size": 12, "intermediate_size": 20, "num_attention_heads": 2, "max_position_embeddings": 32},
    "distilbert": {"dim": 12, "hidden_dim": 20, "n_heads": 2, "n_layers": 2, "max_position_embeddings": 32},
}


def reader_config(model_type="llama", **overrides):
    """A tiny reader with two layers, which drops out in training."""
    layers = {} if model_type == "distilbert" else {"num_hidden_layers": 2}
    dropout = {"gpt2": "resid_pdrop", "llama": "attention_dropout", "distilbert": "dropout"}.get(
        model_type, "hidden_dropout_prob"
    )
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    sizes = {"vocab_size": 40} | layers | READERS[model_type] | {dropout: 0.5}
    return {"model_type": model_type} | sizes | special | overrides


@pytest.mark.parametrize("model_type", READERS)
def test_reader_reads_every_row_as_it_would_alone(model_type):
    model = small_model(ConnectionTransformerModel, reader_config=reader_config(model_type))
    reader, projection = model.encoder.reader.model, model.encoder.reader.projection
    input_ids = torch.randint(3, 40, (4, 8), generator=torch.Generator().manual_seed(0))
    columns = torch.arange(8)
    # Padding on the right, on the left, on both sides with a gap, and none.
    mask = torch.stack([columns < 5, columns >= 3, (columns % 3 == 1) & (columns > 0), columns >= 0]).long()
    input_ids = torch.where(mask == 1, input_ids, model.config.pad_token_id)
    with torch.no_grad():
        together = model.encoder(input_ids=input_ids, attention_mask=mask, return_token_states=True)
        embedded = model.encoder(
            inputs_embeds=model.get_input_embeddings()(input_ids), attention_mask=mask, return_token_states=True
        )
        for row in range(4):
            tokens = input_ids[row][mask[row] == 1].unsqueeze(0)
            expected = projection(reader(tokens).last_hidden_state)[0]
            for outputs in (together, embedded):
                torch.testing.assert_close(outputs.token_states[row][mask[row] == 1], expected, rtol=1e-5, atol=1e-5)
            alone = model.encoder(input_ids=tokens)
            torch.testing.assert_close(
                together.last_hidden_state[row], alone.last_hidden_state[0], rtol=1e-5, atol=1e-5
            )


def test_frozen_reader_stays_as_it_is(tmp_path):
    options = {"reader_config": reader_config(), "dropout": 0.0, "halting": "none"}
    small_model(**options).save_pretrained(tmp_path)
    model = ConnectionTransformerForConditionalGeneration.from_pretrained(tmp_path)
    reader = model.get_encoder().reader
    frozen = {f"model.encoder.reader.model.{name}" for name, _ in reader.model.named_parameters()}
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train()
        assert not any(module.training for module in reader.model.modules())
        model.zero_grad()
        batch = random_batch()
        first, second = model(**batch), model(**batch)
        assert torch.equal(first.logits, second.logits), "the reader drops nothing out"
        first.loss.backward()
        without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
        assert without == frozen == {name for name, p in model.named_parameters() if not p.requires_grad}
        assert reader.projection.weight.grad.abs().sum() > 0
    assert model.eval().train().training


@pytest.mark.parametrize("eos_token_id", [0, [2, 0]], ids=str)
def test_padding_that_also_ends_a_sequence_is_learnt(eos_token_id):
    """Tokenizers of decoders often have one token for both; with a zero row the model could hardly learn to end."""
    plain, both = small_config(), small_config(eos_token_id=eos_token_id)
    for config, expected in ((plain, 0), (both, 1)):
        model = ConnectionTransformerForConditionalGeneration(config)
        assert model.lm_head.weight[0].norm().item() == pytest.approx(expected, abs=0.5 * expected)
        tokens = torch.tensor([[3, 0, 4]])
        model(input_ids=tokens, decoder_input_ids=tokens).logits[..., 1:].sum().backward()
        assert (model.lm_head.weight.grad[0].norm() > 0).item() is bool(expected)


def test_adapters_inside_a_frozen_reader_learn():
    from peft import LoraConfig, get_peft_model

    model = small_model(reader_config=reader_config())
    model = get_peft_model(model, LoraConfig(r=2, target_modules=r".*reader\.model.*q_proj"))
    model(**random_batch()).loss.backward()
    gradients = [p.grad for name, p in model.named_parameters() if "lora_B" in name]
    assert len(gradients) == 2
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": False}, {"hidden_size": 12}], ids=str)
def test_number_of_trainable_parameters_with_a_frozen_reader(options):
    config = small_config(**{"hidden_size": 16, "reader_config": reader_config(hidden_size=12)} | options)
    for model_class in list(TestConnectionTransformer.classes)[1:]:
        head = model_class.__name__.removeprefix("ConnectionTransformerFor")
        model = model_class(config)
        assert model.num_parameters(only_trainable=True) == config.num_trainable_parameters(head), head
        assert isinstance(model.model.encoder.reader.projection, torch.nn.Identity) is (config.hidden_size == 12)
    with pytest.raises(ValueError, match="freeze_reader=False"):
        small_config(reader_config=reader_config(), freeze_reader=False).num_trainable_parameters()


@pytest.fixture(scope="module", params=[1, 2], ids=["form1", "form2"])
def golden(request):
    path = GOLDEN / f"form{request.param}_tiny"
    return json.loads(path.with_suffix(".json").read_text()), load_file(path.with_suffix(".safetensors"))


only_form_2 = pytest.mark.parametrize("golden", [2], indirect=True, ids=["form2"])


@pytest.fixture(scope="module")
def converted(golden, tmp_path_factory):
    """Folders written by the converter: the golden model, and the same with the golden's shrinking step norms."""
    config, tensors = golden
    folder = tmp_path_factory.mktemp("converted")
    config_path = GOLDEN / f"form{config['form']}_tiny.json"
    weights_path = config_path.with_suffix(".safetensors")
    assert conversion.main([str(config_path), str(weights_path), str(folder / "plain")]) == 0
    shrinking = {name: value for name, value in tensors.items() if name.startswith("decay.state_dict.")}
    assert len(shrinking) == 2 * config["config"]["max_reasoning_steps"]
    replaced = {name.removeprefix("decay."): value.clone() for name, value in shrinking.items()}
    save_file(tensors | replaced, folder / "decay.safetensors")
    assert conversion.main([str(config_path), str(folder / "decay.safetensors"), str(folder / "decay")]) == 0
    return {"plain": folder / "plain", "decay": folder / "decay"}


CASES = ("nomask", "mask", "ones_mask", "halt_all", "halt_mixed", "decay_full", "decay_mixed")


def golden_model(golden, converted, case, halting):
    folder = converted["decay" if case.startswith("decay") else "plain"]
    threshold = golden[0]["cases"][case]["convergence_threshold"]
    auto_class = AutoModelForMaskedLM if golden[0]["form"] == 1 else AutoModelForSeq2SeqLM
    return auto_class.from_pretrained(folder, halting=halting, halting_threshold=threshold).eval()


def golden_inputs(golden, case):
    inputs = {}
    for name, stored in golden[0]["cases"][case]["inputs"].items():
        name = name.removeprefix("src_").replace("tgt_", "decoder_")
        if stored == "all ones":
            inputs[name] = torch.ones_like(inputs["input_ids"])
        elif stored is not None:
            inputs[name] = golden[1][stored]
    return inputs


def slot_states(outputs):
    """Recorded states of the slots, from a model with or without a decoder."""
    return torch.stack(outputs.get("encoder_hidden_states") or outputs.hidden_states)


@pytest.mark.parametrize("case", CASES)
def test_golden_case(golden, converted, case):
    tensors, steps = golden[1], golden[0]["cases"][case]["steps_taken"]
    model, inputs = golden_model(golden, converted, case, "global_update_norm"), golden_inputs(golden, case)
    with torch.no_grad():
        recorded = model(**inputs, output_hidden_states=True, output_slot_updates=True, output_halting_measures=True)
        plain = model(**inputs)
    assert recorded.reasoning_steps.tolist() == plain.reasoning_steps.tolist() == [steps] * len(inputs["input_ids"])
    states = slot_states(recorded)
    norms = torch.stack(recorded.slot_updates).norm(dim=-1)[:steps]
    torch.testing.assert_close(recorded.logits, tensors[f"{case}.logits"], **TOLERANCE)
    torch.testing.assert_close(plain.logits, tensors[f"{case}.logits"], **TOLERANCE)
    torch.testing.assert_close(states[: steps + 1], tensors[f"{case}.slot_states"], **TOLERANCE)
    torch.testing.assert_close(states[steps:], states[-1:].expand_as(states[steps:]), rtol=0, atol=0)
    torch.testing.assert_close(norms, tensors[f"{case}.update_norms"], **TOLERANCE)
    torch.testing.assert_close(norms[-1], tensors[f"{case}.update_norm_last"], **TOLERANCE)
    largest = norms.amax(dim=(1, 2))
    torch.testing.assert_close(torch.stack(recorded.halting_measures)[:steps, 0], largest, **TOLERANCE)


@pytest.mark.parametrize("case", [case for case in CASES if case not in ("halt_mixed", "decay_mixed")])
def test_golden_case_where_both_rules_agree(golden, converted, case):
    model, inputs = golden_model(golden, converted, case, "update_norm"), golden_inputs(golden, case)
    with torch.no_grad():
        outputs = model(**inputs)
    assert outputs.reasoning_steps.tolist() == [golden[0]["cases"][case]["steps_taken"]] * len(inputs["input_ids"])
    torch.testing.assert_close(outputs.logits, golden[1][f"{case}.logits"], **TOLERANCE)


@pytest.mark.parametrize("case", ["halt_mixed", "decay_mixed"])
@pytest.mark.parametrize("recording", [False, True], ids=["compacted", "masked"])
def test_golden_samples_stop_as_they_would_alone(golden, converted, case, recording):
    model, inputs = golden_model(golden, converted, case, "update_norm"), golden_inputs(golden, case)
    with torch.no_grad():
        outputs = model(**inputs, output_hidden_states=recording)
        final_states = model.model(**inputs, output_hidden_states=recording)
    final_states = final_states.get("encoder_last_hidden_state", final_states.last_hidden_state)
    assert outputs.reasoning_steps.tolist() == golden[0]["cases"][case]["alone_steps"]
    for row in range(len(inputs["input_ids"])):
        alone = {name: golden[1][f"{case}.alone.{row}.{name}"][0] for name in ("logits", "final_state")}
        torch.testing.assert_close(outputs.logits[row], alone["logits"], **TOLERANCE)
        torch.testing.assert_close(final_states[row], alone["final_state"], **TOLERANCE)


def test_golden_loss_and_gradients(golden, converted):
    config, tensors = golden
    model = golden_model(golden, converted, "mask", "global_update_norm")
    labels = tensors["input.labels"]
    if config["form"] == 1:
        # The original leaves out the padding token.
        outputs = model(**golden_inputs(golden, "mask"), labels=labels.masked_fill(labels == 0, -100))
        expected_loss, expected_parts = config["loss"]["value"], {"cross_entropy_loss": config["loss"]["value"]}
        assert outputs.orthogonality_loss is None
    else:
        outputs = model(**golden_inputs(golden, "mask"), labels=labels)
        expected_loss, expected_parts = (
            config["loss"]["total"],
            {"cross_entropy_loss": config["loss"]["ce"], "orthogonality_loss": config["loss"]["orth"]},
        )
    for name, expected in {"loss": expected_loss, **expected_parts}.items():
        torch.testing.assert_close(outputs[name], torch.tensor(expected), **TOLERANCE)
    outputs.loss.backward()
    names = conversion.expected_tensors(model.config)
    parameters = dict(model.named_parameters())
    checked = set()
    pairs = {}
    if config["form"] == 1:
        connections = model.model.encoder.reasoning.step.connections
        gradients = (connections.source_weight.grad, connections.target_weight.grad)
        pairs = dict(zip(("W_source", "W_target"), connections.unpack(*gradients), strict=True))
    for name, expected in tensors.items():
        if name.startswith("grad."):
            ours = names[name.removeprefix("grad.")]
            gradient = pairs.get(name.removeprefix("grad."))
            if gradient is None:
                gradient = torch.cat([parameters[part].grad for part in ours])
            torch.testing.assert_close(gradient, expected, **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")
            checked.update(ours)
    assert checked == set(parameters)


def test_golden_connection_matrix(golden, converted):
    config, tensors = golden
    model = golden_model(golden, converted, "mask", "none")
    matrix = model.model.encoder.reasoning.step.connections.connection_matrix()
    torch.testing.assert_close(matrix, tensors["connection_matrix"], **TOLERANCE)
    assert torch.equal(matrix.diagonal(), torch.zeros(len(matrix)))
    assert model.num_parameters(only_trainable=True) == config["n_params"]
    if config["form"] == 1:
        statistics = config["connection"]
        torch.testing.assert_close(matrix.max(), torch.tensor(statistics["max_connection"]), **TOLERANCE)
        torch.testing.assert_close(matrix.mean(), torch.tensor(statistics["mean_connection"]), **TOLERANCE)
        penalty = model.model.encoder.reasoning.step.connections.orthogonality_penalty()
        torch.testing.assert_close(penalty, torch.tensor(config["orth_reg_per_pair"]["value"]), **TOLERANCE)


def test_converted_config(golden, converted):
    config = AutoConfig.from_pretrained(converted["plain"])
    assert config.connection_type == ("per_pair" if golden[0]["form"] == 1 else "scalar")
    assert config.orthogonality_weight == (0.0 if golden[0]["form"] == 1 else 0.01)
    assert config.is_encoder_decoder is (golden[0]["form"] == 2)
    assert config.halting == "update_norm"
    assert config.halting_threshold == 0.01
    assert (config.decoder_start_token_id, config.pad_token_id, config.eos_token_id) == (0, 0, 1)
    assert (config.share_step_norm, config.inject_input, config.tie_word_embeddings) == (False, False, False)


@pytest.mark.parametrize("container", ["plain", "checkpoint"])
def test_converter_reads_pytorch_files(golden, converted, container, tmp_path):
    state = {
        name.removeprefix("state_dict."): value for name, value in golden[1].items() if name.startswith("state_dict.")
    }
    torch.save(state if container == "plain" else {"model_state_dict": state, "epoch": 3}, tmp_path / "model.pt")
    # The settings alone, as the original saves them.
    (tmp_path / "config.json").write_text(json.dumps(golden[0]["config"]))
    assert conversion.main([str(tmp_path / name) for name in ("config.json", "model.pt", "out")]) == 0
    expected, actual = (load_file(folder / "model.safetensors") for folder in (converted["plain"], tmp_path / "out"))
    assert expected.keys() == actual.keys()
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"form": 1}, "config.json: form 1 misses key(s): vocab_size"),
        ({"form": 3}, "config.json: form=3 must be 1 "),
        ({"config": {"num_slots": None}}, "config.json: form 2 misses key(s): num_slots"),
        ({"config": {"slots": 8}}, "config.json: form 2 has no key(s): slots"),
        ({"config": {"num_heads": 3}}, "num_attention_heads=3"),
        ({"config": {"num_slots": "8"}}, "'num_slots' expected int"),
        ({"config": {"src_pad_token_id": 1}}, "src_pad_token_id=1 and tgt_pad_token_id=0"),
        ({"config": {"num_slots": 9}}, "tensor H has shape [8, 16], the config says [9, 16]"),
        ({"config": {"max_reasoning_steps": 3}}, "unknown tensor(s): reasoning_norms.3.bias, reasoning_norms.3.weight"),
        ({"drop": "state_dict.H"}, "weights.safetensors: missing tensor(s): H"),
        ({"drop": "everything"}, "missing tensor(s)"),
        ({"replace": ("state_dict.H", torch.full((8, 16), math.nan))}, "tensor H must hold finite"),
        (
            {"replace": ("state_dict.W_source", torch.ones(8, 8, 16, 3))},
            "tensor W_source has shape [8, 8, 16, 3], the config says [8, 8, 3]",
        ),
        ({"weights": b"no weights"}, "weights.safetensors: cannot be read as weights"),
        ({"settings": b"{"}, "config.json: cannot be read as JSON"),
        ({"settings": b"[]"}, "config.json: must hold a JSON object"),
        ({"occupied": True}, "out: exists already and is not an empty folder"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
@only_form_2
def test_converter_refuses(golden, change, message, tmp_path, capsys):
    settings = json.loads(json.dumps(golden[0])) | {name: change[name] for name in ("form",) if name in change}
    settings["config"] |= change.get("config", {})
    settings["config"] = {name: value for name, value in settings["config"].items() if value is not None}
    tensors = dict(golden[1])
    if "drop" in change:
        tensors = {name: value for name, value in tensors.items() if change["drop"] not in (name, "everything")}
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


def small_config(**overrides):
    sizes = {
        "vocab_size": 40,
        "hidden_size": 16,
        "num_slots": 6,
        "connection_rank": 3,
        "max_reasoning_steps": 5,
        "num_decoder_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 20,
        "dropout": 0.0,
    }
    return ConnectionTransformerConfig(**(sizes | overrides))


def small_model(model_class=ConnectionTransformerForConditionalGeneration, seed=0, **overrides):
    """A model in eval mode whose samples differ: larger weights, and step norms that shrink if they are separate."""
    torch.manual_seed(seed)
    model = model_class(small_config(**overrides)).eval()
    base = model if model_class is ConnectionTransformerModel else model.model
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Embedding):
                module.weight.normal_()
            elif isinstance(module, torch.nn.Linear):
                module.weight.normal_(std=2 / module.in_features**0.5)
        for step, norm in enumerate(base.encoder.reasoning.step.layer_norms):
            norm.weight.fill_(0.6**step).mul_(torch.rand(norm.weight.shape) + 0.5)
            norm.bias.normal_(std=0.1)
    return model


def random_batch(batch_size=12, source_length=8, target_length=4, vocab_size=40, seed=0):
    """Sources of unequal lengths, padded on the right, with targets of unequal lengths."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, vocab_size, (batch_size, source_length), generator=generator)
    lengths = torch.randint(2, source_length + 1, (batch_size, 1), generator=generator)
    attention_mask = (torch.arange(source_length) < lengths).long()
    labels = torch.randint(3, vocab_size, (batch_size, target_length), generator=generator)
    target_lengths = torch.randint(1, target_length + 1, (batch_size, 1), generator=generator)
    return {
        "input_ids": input_ids * attention_mask,
        "attention_mask": attention_mask,
        "labels": labels.masked_fill(torch.arange(target_length) >= target_lengths, -100),
    }


def spread_threshold(model, batch):
    """Sets a threshold that the samples meet at different steps, in the middle of a gap between their measures."""
    model.config.halting_threshold = 0
    with torch.no_grad():
        measures = torch.stack(model(**batch, output_halting_measures=True).halting_measures)
    values = measures.flatten().sort().values
    # Gaps far above the rounding error of float32, so that a step count does not depend on the order of a sum.
    wide = values[1:] / values[:-1] > 1.002
    candidates = (values[1:] * values[:-1]).sqrt()[wide]
    last = torch.ones(1, measures.shape[1], dtype=torch.bool)
    stops = [torch.cat([measures[:-1] <= threshold, last]).int().argmax(dim=0) for threshold in candidates]
    spread = torch.stack([steps.float().std() for steps in stops])
    assert spread.max() > 0
    model.config.halting_threshold = candidates[spread.argmax()].item()


def rows_of(batch, rows):
    return {name: value[rows] for name, value in batch.items()}


DYNAMICS = {
    "default": {},
    "own norms": {"share_step_norm": False},
    "original": {"share_step_norm": False, "inject_input": False, "halting": "update_norm"},
    "scaled": {"update_scale": 0.3, "halting_temperature": 0.5},
    "slot_change": {"halting": "slot_change"},
    "per_pair": {"connection_type": "per_pair"},
    "original per_pair": {
        "connection_type": "per_pair",
        "share_step_norm": False,
        "inject_input": False,
        "halting": "update_norm",
    },
    "block": {"connection_type": "block"},
    "diagonal": {"connection_type": "diagonal"},
}
dynamics = pytest.mark.parametrize("overrides", DYNAMICS.values(), ids=DYNAMICS)


def pair_matrices(connections):
    """The matrix by which slot i acts on slot j, of shape `(num_slots, num_slots, hidden_size, hidden_size)`."""
    source, target = per_pair_factors(connections)
    return torch.einsum("ijdk,ijke->ijde", source, target)


def per_pair_factors(connections):
    """Per-pair matrices `S_ij` and `T_ij`, `[source, target]`, that say the same as connections of another type."""
    source, target = connections.source_weight, connections.target_weight
    if isinstance(connections, ConnectionTransformerPerPairConnections):
        return connections.unpack(source, target)
    num_slots, hidden_size, rank = source.shape
    if connections.core_weight.ndim == 2:
        cores = connections.core_weight.view(num_slots, rank, num_slots, rank)
        target = torch.einsum("ikjl,jld->ijkd", cores, target)
    else:
        target = torch.einsum("kij,jkd->ijkd", connections.core_weight, target)
    return source[:, None].expand(num_slots, num_slots, hidden_size, rank), target


def einsum_influence(states, source, target):
    """Influence on every slot as the original computes it, with a tensor of shape `(batch, slots, slots, width)`."""
    messages = torch.einsum("bid,ijdk->bijk", states, source)
    influences = torch.einsum("bijk,ijkd->bijd", messages, target)
    influences[:, torch.eye(states.shape[1], dtype=torch.bool)] = 0
    return influences.sum(1)


def plain_reasoning(model, initial_states):
    """The loop for one sample of shape `(num_slots, hidden_size)`, slot by slot: final states, steps, soft steps."""
    config, step_module = model.config, model.model.encoder.reasoning.step
    if config.connection_type == "scalar":
        connections = step_module.connections
        products = (connections.source_weight * connections.target_weight).sum(-1)
        matrices = products[:, :, None, None] * torch.eye(config.hidden_size, dtype=products.dtype)
    else:
        matrices = pair_matrices(step_module.connections)
    slots, threshold = range(config.num_slots), config.halting_threshold
    states, survival, expected_steps = initial_states, torch.ones(()), torch.ones(())
    for step in range(config.max_reasoning_steps):
        norm = step_module.layer_norms[0 if config.share_step_norm else step]
        updates, candidates = [], []
        for j in slots:
            influence = sum(states[i] @ matrices[i, j] for i in slots if i != j)
            updates.append(influence.clamp(min=0))
            before_norm = states[j] + config.update_scale * updates[-1]
            if config.inject_input:
                before_norm = before_norm + initial_states[j]
            centred = before_norm - before_norm.mean()
            deviation = ((centred**2).mean() + config.layer_norm_eps).sqrt()
            candidates.append(centred / deviation * norm.weight + norm.bias)
        candidates, updates = torch.stack(candidates), torch.stack(updates)
        if config.halting == "state_change":
            measure = ((candidates - states) ** 2).sum().sqrt() / (candidates**2).sum().sqrt()
        elif config.halting == "slot_change":
            measure = max(((candidates[j] - states[j]) ** 2).sum().sqrt() / candidates[j].norm() for j in slots)
        else:
            measure = max((update**2).sum().sqrt() for update in updates)
        states = candidates
        halt = 1 / (1 + ((measure.log() - math.log(threshold)) / config.halting_temperature).exp())
        survival = survival * (1 - halt)
        if step + 1 < config.max_reasoning_steps:
            expected_steps = expected_steps + survival
        if measure <= threshold:
            break
    return states, step + 1, expected_steps


@dynamics
def test_compacted_equals_masked_equals_alone_equals_plain(overrides):
    model, batch = small_model(**overrides), random_batch()
    spread_threshold(model, batch)
    with torch.no_grad():
        compacted = model(**batch)
        masked = model(**batch, output_hidden_states=True)
        trained = model.train()(**batch)
        model.eval()
        assert len(set(compacted.reasoning_steps.tolist())) > 1
        for other in (masked, trained):
            assert torch.equal(other.reasoning_steps, compacted.reasoning_steps)
            # The same operations on other numbers of rows, in float32.
            torch.testing.assert_close(other.logits, compacted.logits, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(other.expected_steps, compacted.expected_steps, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(
                other.encoder_last_hidden_state, compacted.encoder_last_hidden_state, rtol=1e-5, atol=1e-5
            )
        for row in range(len(batch["input_ids"])):
            alone = model(**rows_of(batch, slice(row, row + 1)))
            assert alone.reasoning_steps.item() == compacted.reasoning_steps[row]
            torch.testing.assert_close(alone.logits[0], compacted.logits[row], rtol=1e-5, atol=1e-5)
            states, steps, expected_steps = plain_reasoning(model, masked.encoder_hidden_states[0][row])
            assert steps == compacted.reasoning_steps[row]
            torch.testing.assert_close(expected_steps, compacted.expected_steps[row], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(states, compacted.encoder_last_hidden_state[row], rtol=1e-5, atol=1e-5)


@dynamics
def test_gradients_of_compacted_and_masked_equal_plain(overrides):
    model, batch = small_model(**overrides).double(), random_batch(batch_size=5)
    spread_threshold(model, batch)
    parameters = dict(model.model.encoder.reasoning.named_parameters())
    direction = torch.randn(6, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def gradients(states, expected_steps):
        total = (states * direction).sum() + expected_steps.sum()
        # The norms of steps that no sample has taken have no gradient.
        return torch.autograd.grad(total, list(parameters.values()), allow_unused=True, materialize_grads=True)

    masked = model(**batch, output_hidden_states=True)
    compacted = model(**batch)
    plain = [plain_reasoning(model, states) for states in masked.encoder_hidden_states[0].detach()]
    expected = gradients(torch.stack([part[0] for part in plain]), torch.stack([part[2] for part in plain]))
    for outputs in (masked, compacted):
        actual = gradients(outputs.encoder_last_hidden_state, outputs.expected_steps)
        for name, one, other in zip(parameters, actual, expected, strict=True):
            # float64.
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


@dynamics
def test_gradient_of_expected_steps_equals_finite_differences(overrides):
    model, batch = small_model(**overrides).double().train(), random_batch()
    spread_threshold(model, batch)
    parameters = {name: parameter for name, parameter in model.model.encoder.named_parameters() if "embed" not in name}
    assert len(parameters) >= 7
    gradients = torch.autograd.grad(
        model(**batch).expected_steps.sum(), list(parameters.values()), allow_unused=True, materialize_grads=True
    )
    for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        values = []
        with torch.no_grad():
            for sign in (1, -1):
                parameter.add_(direction, alpha=sign * 1e-7)
                values.append(model(**batch).expected_steps.sum().item())
                parameter.sub_(direction, alpha=sign * 1e-7)
        slope = (values[0] - values[1]) / 2e-7
        # Central differences in float64: rounding makes an error of about 1e-8. A longer step would make it smaller,
        # but meets more of the ReLUs' kinks.
        assert (gradient * direction).sum().item() == pytest.approx(slope, rel=1e-6, abs=1e-6), name


def test_expected_steps_become_the_hard_count():
    model, batch = small_model(halting_temperature=1e-6), random_batch()
    spread_threshold(model, batch)
    with torch.no_grad():
        outputs = model(**batch)
    assert torch.equal(outputs.expected_steps, outputs.reasoning_steps.float())


def test_without_halting_every_sample_takes_all_steps():
    batch = random_batch()
    never, zero = small_model(halting="none"), small_model(halting_threshold=0)
    with torch.no_grad():
        outputs, others = never(**batch), zero(**batch)
    assert outputs.reasoning_steps.tolist() == others.reasoning_steps.tolist() == [5] * 12
    assert outputs.expected_steps.tolist() == others.expected_steps.tolist() == [5.0] * 12
    torch.testing.assert_close(outputs.logits, others.logits, rtol=1e-5, atol=1e-5)


def test_a_settled_state_has_finite_gradients():
    # With a LayerNorm that always gives the same state, the second step changes nothing at all: a measure of zero.
    model = small_model()
    norm = model.model.encoder.reasoning.step.layer_norms[0]
    torch.nn.init.zeros_(norm.weight)
    outputs = model.train()(**random_batch(), step_cost_weight=1.0)
    assert outputs.reasoning_steps.tolist() == [2] * 12
    outputs.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_global_rule_depends_on_the_batch_and_the_rule_per_sample_does_not():
    model, batch = small_model(halting="update_norm", share_step_norm=False), random_batch()
    spread_threshold(model, batch)
    with torch.no_grad():
        steps = model(**batch).reasoning_steps
        model.config.halting = "global_update_norm"
        together = model(**batch).reasoning_steps
        alone = [model(**rows_of(batch, slice(row, row + 1))).reasoning_steps.item() for row in range(12)]
    assert together.tolist() == [max(steps.tolist())] * 12
    assert alone == steps.tolist()


def test_order_of_the_batch_is_irrelevant():
    model, batch = small_model(), random_batch()
    spread_threshold(model, batch)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        outputs, permuted = model(**batch), model(**rows_of(batch, order))
    assert torch.equal(permuted.reasoning_steps, outputs.reasoning_steps[order])
    torch.testing.assert_close(permuted.logits, outputs.logits[order], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(permuted.loss, outputs.loss, rtol=1e-5, atol=1e-5)


def count_rows(model):
    """Records the number of samples in every reasoning step from now on."""
    rows = []
    step_module = model.model.encoder.reasoning.step
    step_module.register_forward_hook(lambda module, arguments, outputs: rows.append(len(arguments[0])))
    return rows


def test_stopped_samples_cost_nothing_at_inference_and_training_makes_all_passes():
    model, batch = small_model(), random_batch()
    spread_threshold(model, batch)
    rows = count_rows(model)
    with torch.no_grad():
        steps = model(**batch).reasoning_steps
        assert rows == [(steps > step).sum().item() for step in range(steps.max())]
        rows.clear()
        model(**batch, output_hidden_states=True)
        assert rows == [12] * 5
    rows.clear()
    model.train()(**batch)
    assert rows == [12] * 5


def test_bound_on_the_steps():
    model, batch = small_model(), random_batch()
    spread_threshold(model, batch)
    with torch.no_grad():
        outputs = model(**batch)
        for bound in (1, 2, 9):
            bounded = model(**batch, max_reasoning_steps=bound)
            same = outputs.reasoning_steps.clamp(max=bound) == bounded.reasoning_steps
            # Beyond the configuration's bound, only samples that had not stopped by themselves go on.
            assert (same | (outputs.reasoning_steps == 5)).all()
            assert bounded.reasoning_steps.max() <= bound
            settled = outputs.reasoning_steps < min(bound, 5)
            torch.testing.assert_close(bounded.logits[settled], outputs.logits[settled], rtol=1e-5, atol=1e-5)
        recorded = model(**batch, max_reasoning_steps=9, output_hidden_states=True)
    assert len(recorded.encoder_hidden_states) == 10
    for bound in (0, -1, True, 2.0):
        with pytest.raises(ValueError, match=f"max_reasoning_steps={bound} must be a positive int"):
            model(**batch, max_reasoning_steps=bound)
    separate = small_model(share_step_norm=False)
    assert separate(**batch, max_reasoning_steps=4).reasoning_steps.max() <= 4
    with pytest.raises(ValueError, match=r"max_reasoning_steps=6 exceeds the configuration's 5.*share_step_norm=False"):
        separate(**batch, max_reasoning_steps=6)


@pytest.mark.parametrize("training", [False, True], ids=["compacted", "masked"])
def test_a_measure_at_the_threshold_stops(monkeypatch, training):
    """A sample stops after the first step whose measure is at most the threshold: also at the very threshold."""
    model, batch = small_model(halting_threshold=0.25).train(training), random_batch()
    step = model.model.encoder.reasoning.step

    def measure(slot_states, candidate, update):
        return torch.full((len(candidate),), 0.25)

    monkeypatch.setattr(step, "halting_measure", measure)
    with torch.no_grad():
        assert (model(**batch).reasoning_steps == 1).all()


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_passes_the_bound_and_reads_the_source_once(beams):
    model, batch = small_model(), random_batch()
    spread_threshold(model, batch)
    prompt = {name: batch[name] for name in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams}
    rows = count_rows(model)
    generated = {bound: model.generate(**prompt, **options, max_reasoning_steps=bound) for bound in (1, 9)}
    with torch.no_grad():
        steps = [model.get_encoder()(**prompt, max_reasoning_steps=bound).reasoning_steps for bound in (1, 9)]
    expected = [(part > step).sum().item() for part in steps for step in range(part.max())]
    assert rows == expected * 2
    for bound, tokens in generated.items():
        # What the encoder returns can be handed over, with its step counts.
        with torch.no_grad():
            encoder_outputs = model.get_encoder()(**prompt, max_reasoning_steps=bound)
        assert torch.equal(model.generate(encoder_outputs=encoder_outputs, **options), tokens)


def test_generation_with_static_cache():
    model, batch = small_model(), random_batch(batch_size=3)
    prompt = {name: batch[name] for name in ("input_ids", "attention_mask")}
    dynamic, static = (
        model.generate(**prompt, max_new_tokens=5, do_sample=False, cache_implementation=implementation)
        for implementation in (None, "static")
    )
    assert torch.equal(dynamic, static)


def test_given_cache_is_used_and_returned():
    model, batch = small_model(), random_batch(batch_size=2)
    cache = EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache(config=model.config))
    tokens = torch.randint(3, 40, (2, 6))
    with torch.no_grad():
        whole = model(batch["input_ids"], batch["attention_mask"], tokens).logits
        parts = [
            model(batch["input_ids"], batch["attention_mask"], part, past_key_values=cache, use_cache=True).logits
            for part in tokens.split([3, 1, 2], dim=1)
        ]
    assert cache.get_seq_length() == 6
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_source_mask_never_masks_slots(side):
    # A source as long as there are slots: passed on to cross-attention, its mask would fit and hide slots in silence.
    model, batch = small_model(), random_batch(source_length=6)
    if side == "left":
        batch = {name: value.flip(1) if name != "labels" else value for name, value in batch.items()}
    assert len(set(batch["attention_mask"].sum(1).tolist())) > 1
    with torch.no_grad():
        outputs = model(**batch)
        for row in range(12):
            real = batch["attention_mask"][row] == 1
            alone = model(input_ids=batch["input_ids"][row, real][None], labels=batch["labels"][row][None])
            torch.testing.assert_close(outputs.logits[row], alone.logits[0], rtol=1e-5, atol=1e-5)
            assert outputs.reasoning_steps[row] == alone.reasoning_steps
    generated = model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=4)
    alone = model.generate(batch["input_ids"][:1, batch["attention_mask"][0] == 1], max_new_tokens=4)
    assert torch.equal(generated[0], alone[0])


def test_labels_may_be_padded_on_the_left():
    model, batch = small_model(), random_batch(batch_size=4)
    lengths = batch["labels"].ne(-100).sum(1).tolist()
    left = torch.full_like(batch["labels"], -100)
    for row, length in enumerate(lengths):
        left[row, 4 - length :] = batch["labels"][row, :length]
    with torch.no_grad():
        outputs, shifted = model(**batch), model(**(batch | {"labels": left}))
    torch.testing.assert_close(shifted.loss, outputs.loss, rtol=1e-5, atol=1e-5)
    for row, length in enumerate(lengths):
        torch.testing.assert_close(shifted.logits[row, 4 - length :], outputs.logits[row, :length])


def test_shift_right():
    labels = torch.tensor([[7, 8, 2], [9, 2, -100], [-100, 9, 2]])
    input_ids, attention_mask = shift_right(labels, decoder_start_token_id=1, pad_token_id=0)
    assert input_ids.tolist() == [[1, 7, 8], [1, 9, 2], [0, 1, 9]]
    assert attention_mask.tolist() == [[1, 1, 1], [1, 1, 1], [0, 1, 1]]


def test_token_positions():
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [0, 1, 0, 1, 0]])
    # Padding before a token does not move it; padding after the last token continues the count.
    assert token_positions(mask).tolist() == [[0, 1, 2, 3, 4], [0, 1, 0, 1, 2], [0, 0, 1, 1, 2]]


def test_orthogonality_penalty_equals_its_definition():
    connections = small_model(ConnectionTransformerModel).encoder.reasoning.step.connections.double()
    with torch.no_grad():
        for parameter in connections.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))

    def definition():
        total = 0
        for weight in (connections.source_weight, connections.target_weight):
            vectors = [weight[i, j] for i in range(6) for j in range(6) if i != j]
            lengths = torch.stack([(vector.norm() - 1) ** 2 for vector in vectors])
            products = torch.stack([(one @ two) ** 2 for one in vectors for two in vectors if one is not two])
            total = total + 0.5 * (lengths.mean() + 0.1 * products.mean())
        return total

    actual, expected = connections.orthogonality_penalty(), definition()
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
    parameters = list(connections.parameters())
    for one, other in zip(
        torch.autograd.grad(actual, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-14)
        assert one.diagonal().eq(0).all()


def test_orthogonality_penalty_stays_exact_under_autocast():
    connections = small_model(ConnectionTransformerModel).encoder.reasoning.step.connections
    expected = connections.orthogonality_penalty()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(connections.orthogonality_penalty(), expected)


def test_connection_matrix_has_no_diagonal_whatever_the_weights():
    config = small_config()
    connections = ConnectionTransformerScalarConnections(config)
    for parameter in connections.parameters():
        torch.nn.init.normal_(parameter)
    matrix = connections.connection_matrix()
    assert matrix.diagonal().eq(0).all()
    assert matrix.count_nonzero() == 30
    matrix.square().sum().backward()
    assert connections.source_weight.grad.diagonal().eq(0).all()


MATRIX_TYPES = ("per_pair", "block", "diagonal")
matrix_types = pytest.mark.parametrize("connection_type", MATRIX_TYPES)


def random_connections(connection_type, **overrides):
    """Connections of one type in float64 with normal weights, also where a slot would act on itself."""
    config = small_config(connection_type=connection_type, **overrides)
    connections = CONNECTION_TYPES[connection_type](config).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in connections.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return connections


def assert_gradients_equal(one, other, inputs):
    """The gradients of two equal scalars, in float64; returns them."""
    gradients = torch.autograd.grad(one, inputs)
    for actual, expected in zip(gradients, torch.autograd.grad(other, inputs), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    return gradients


@matrix_types
@pytest.mark.parametrize("batch_size", [1, 4])
def test_connections_equal_their_per_pair_form(connection_type, batch_size):
    connections = random_connections(connection_type)
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(batch_size, 6, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(batch_size, 6, 16, generator=generator, dtype=torch.float64)
    actual = connections(states, connections.prepare(1)[0])
    expected = einsum_influence(states, *per_pair_factors(connections))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    inputs = (states, *connections.parameters())
    gradients = dict(
        zip(
            ("states", *(name for name, _ in connections.named_parameters())),
            assert_gradients_equal((actual * direction).sum(), (expected * direction).sum(), inputs),
            strict=True,
        )
    )
    # What would let a slot act on itself has no effect, to the bit.
    if connection_type == "per_pair":
        source, target = connections.unpack(gradients["source_weight"], gradients["target_weight"])
        dead = (source.diagonal(), target.diagonal())
    elif connection_type == "block":
        dead = (gradients["core_weight"].view(6, 3, 6, 3).diagonal(dim1=0, dim2=2),)
    else:
        dead = (gradients["core_weight"].diagonal(dim1=1, dim2=2),)
    assert all(gradient.eq(0).all() for gradient in dead)
    assert connections(states[:0], connections.prepare(1)[0]).shape == (0, 6, 16)


class LargestTensor(TorchDispatchMode):
    """Keeps the largest number of elements that an operation has returned."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for part in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(part, torch.Tensor):
                self.largest = max(self.largest, part.numel())
        return result


@matrix_types
def test_no_tensor_over_pairs_and_channels(connection_type):
    batch_size, num_slots, hidden_size, rank = 9, 6, 32, 2
    connections = random_connections(connection_type, hidden_size=hidden_size, connection_rank=rank)
    states = torch.randn(batch_size, num_slots, hidden_size, dtype=torch.float64, requires_grad=True)
    with LargestTensor() as record:
        connections(states, connections.prepare(1)[0]).sum().backward()
    largest_weight = max(parameter.numel() for parameter in connections.parameters())
    assert record.largest <= max(largest_weight, states.numel(), batch_size * num_slots**2 * rank)
    with LargestTensor() as record:
        einsum_influence(states, *per_pair_factors(connections))
    assert record.largest >= batch_size * num_slots**2 * hidden_size


@pytest.mark.parametrize("num_steps", [1, 3])
def test_weight_gradient_of_all_steps_together(num_steps):
    connections = random_connections("per_pair")
    generator = torch.Generator().manual_seed(1)
    initial = torch.randn(4, 6, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(4, 6, 16, generator=generator, dtype=torch.float64)
    weights = tuple(connections.parameters())

    def total(step):
        states = initial
        for _ in range(num_steps):
            states = states + torch.tanh(0.1 * step(states))
        return (states * direction).sum()

    prepared = iter(connections.prepare(num_steps, 4))
    together = total(lambda states: connections(states, next(prepared)))
    expected = total(lambda states: einsum_influence(states, *per_pair_factors(connections)))
    torch.testing.assert_close(together, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(total(connections), expected, rtol=1e-12, atol=0)

    wanted = torch.autograd.grad(expected, (initial, *weights))
    # In part, twice, and whole: no run leaves anything behind for the next.
    for inputs in ((initial,), weights[:1], weights[1:], (initial, *weights), (initial, *weights)):
        actual = torch.autograd.grad(together, inputs, retain_graph=True)
        positions = [one for one, name in enumerate((initial, *weights)) if any(name is other for other in inputs)]
        for gradient, position in zip(actual, positions, strict=True):
            torch.testing.assert_close(gradient, wanted[position], rtol=1e-10, atol=1e-12)


def test_weight_gradient_of_steps_that_do_not_count():
    connections = random_connections("per_pair")
    states = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights = tuple(connections.parameters())
    prepared = connections.prepare(3, 2)
    # The first step's result is not used, the third step is never taken.
    connections(states, prepared[0])
    assert_gradients_equal(connections(states, prepared[1]).sum(), connections(states).sum(), weights)
    connections.source_weight.requires_grad_(False)
    one, other = connections(states, connections.prepare(1, 2)[0]).sum(), connections(states).sum()
    assert_gradients_equal(one, other, weights[1:])
    connections.target_weight.requires_grad_(False)
    assert connections.prepare(1, 2) == [None]
    with torch.no_grad():
        assert random_connections("per_pair").prepare(1, 2) == [None]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_weight_gradient_under_checkpointing(reentrant, autocast):
    batch, gradients = random_batch(batch_size=4), []
    for checkpointed in (False, True):
        model = small_model(connection_type="per_pair").train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(**batch).loss
        loss.backward()
        gradients.append([parameter.grad for parameter in model.model.encoder.reasoning.parameters()])
    for one, other in zip(*gradients, strict=True):
        # In bfloat16 the gradients of the steps are rounded one by one instead of together.
        tolerance = 0.02 if autocast else 1e-5
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * other.abs().max().item())


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_large_products_by_the_other_library(one_thread, count, transposed):
    generator = torch.Generator().manual_seed(0)
    shape = (count, LARGE_MATRIX // 256, 256)
    left, right = torch.randn(count, 5, shape[1], generator=generator), torch.randn(shape, generator=generator)
    if transposed:
        left = left.transpose(1, 2).contiguous().transpose(1, 2)
        right = right.transpose(1, 2).contiguous().transpose(1, 2)
    assert onednn_linear(left, right) is not None
    expected = torch.bmm(left.double(), right.double())
    torch.testing.assert_close(products(left, right).double(), expected, rtol=1e-4, atol=1e-4)
    # Where it is not the faster one, or cannot be used.
    for one, other in ((left.double(), right.double()), (left[:, :0], right), (left[:, :, :2], right[:, :2])):
        assert onednn_linear(one, other) is None
        torch.testing.assert_close(products(one, other), torch.bmm(one, other), rtol=0, atol=0)
    torch.set_num_threads(2)
    assert onednn_linear(left, right) is None


def test_large_steps_by_the_other_library(one_thread):
    """At a size where it takes part, all steps with their gradients equal the plain form."""
    sizes = {"hidden_size": 64, "num_slots": 16, "connection_rank": 64}
    connections = random_connections("per_pair", **sizes).float()
    assert connections.source_weight[0].numel() == LARGE_MATRIX
    generator = torch.Generator().manual_seed(1)
    initial = torch.randn(3, 16, 64, generator=generator, requires_grad=True)
    direction = torch.randn(3, 16, 64, generator=generator)
    inputs = (initial, *connections.parameters())

    def total(step):
        states = initial
        for _ in range(2):
            states = states + torch.tanh(0.1 * step(states))
        return (states * direction).sum()

    prepared = iter(connections.prepare(2, 3))
    together = total(lambda states: connections(states, next(prepared)))
    actual = torch.autograd.grad(together, inputs)
    expected = torch.autograd.grad(
        total(lambda states: einsum_influence(states, *per_pair_factors(connections))), inputs
    )
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * other.abs().max().item())
    with torch.no_grad():
        plain = einsum_influence(initial, *per_pair_factors(connections))
        torch.testing.assert_close(connections(initial, None), plain, rtol=1e-4, atol=1e-4 * plain.abs().max().item())


@pytest.mark.parametrize("connection_type", ["scalar", "per_pair", "block", "diagonal"])
@pytest.mark.parametrize("threads", [1, 2])
def test_operations_are_counted_whatever_the_library(one_thread, connection_type, threads):
    torch.set_num_threads(threads)
    slots, width, rank, rows = 16, 64, 64, 3
    connections = random_connections(connection_type, hidden_size=width, num_slots=slots, connection_rank=rank).float()
    states = torch.randn(rows, slots, width)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        connections(states, connections.prepare(1)[0])
    expected = {
        "scalar": 2 * slots**2 * width,
        "per_pair": 4 * slots**2 * width * rank,
        # What a slot would say to itself is computed twice, to be taken off.
        "block": 4 * slots * width * rank + 2 * slots**2 * rank**2 + 2 * slots * rank**2,
        "diagonal": 4 * slots * width * rank + 2 * slots**2 * rank,
    }[connection_type]
    assert counter.get_total_flops() == rows * expected


def test_messages_of_all_steps_lie_together():
    memory, weight = PassMemory(batch_size=2, num_steps=3), torch.randn(4, 5, 8)
    places = [memory.rows("received", step, weight) for step in range(3)]
    states = torch.randn(3, 4, 2, 5)
    for place, one in zip(places, states, strict=True):
        send_messages(one, weight, place)
    together = connections_connection_transformer.side_by_side(tuple(places))
    assert together.data_ptr() == places[0].data_ptr()
    assert torch.equal(together, torch.cat(places, dim=1))
    apart = tuple(place.clone() for place in places)
    assert torch.equal(connections_connection_transformer.side_by_side(apart), together)
    reversed_places = connections_connection_transformer.side_by_side(tuple(reversed(places)))
    assert torch.equal(reversed_places, torch.cat(list(reversed(places)), dim=1))
    messages = torch.einsum("ibd,idjk->jbik", states[0], weight.view(4, 5, 4, 2))
    messages.diagonal(dim1=0, dim2=2).zero_()
    torch.testing.assert_close(places[0], messages.flatten(2))


@pytest.mark.parametrize("connection_type", ["per_pair", "block", "diagonal"])
def test_inference_and_training_say_the_same(connection_type):
    """Through all three ways: prepared gradients, operations that autograd knows, no gradients; own entries filled."""
    connections = random_connections(connection_type)
    states = torch.randn(4, 6, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = einsum_influence(states, *per_pair_factors(connections))
    for batch_size in (None, 4):
        torch.testing.assert_close(connections(states, connections.prepare(1, batch_size)[0]), expected)
    with torch.no_grad():
        torch.testing.assert_close(connections(states, connections.prepare(1)[0]), expected)


def test_memory_of_a_pass_is_given_back():
    connections = random_connections("per_pair")
    states = torch.randn(2, 6, 16, dtype=torch.float64)
    prepared = connections.prepare(2, 2)
    memory = prepared[0][2]
    loss = connections(connections(states, prepared[0]), prepared[1]).sum()
    assert list(memory.tensors) == ["received"]
    loss.backward()
    assert not memory.tensors


@pytest.mark.parametrize("ratio", [None, 0.5])
@pytest.mark.parametrize("connection_type", ["scalar", "per_pair", "block", "diagonal"])
def test_first_update_is_as_large_as_expected(connection_type, ratio):
    torch.manual_seed(0)
    config = ConnectionTransformerConfig(
        hidden_size=64,
        num_slots=48,
        connection_rank=24,
        connection_type=connection_type,
        initial_update_ratio=ratio,
        num_attention_heads=4,
    )
    connections = CONNECTION_TYPES[connection_type](config)
    connections.initialise()
    states = torch.nn.functional.layer_norm(torch.randn(8, 48, 64), (64,))
    with torch.no_grad():
        update = torch.relu(connections(states, connections.prepare(1)[0]))
    assert update.norm() / states.norm() == pytest.approx(config.expected_update_ratio, rel=0.1)
    if ratio is not None:
        assert config.expected_update_ratio == ratio


def test_original_start_overwrites_the_state_at_the_base_size():
    config = ConnectionTransformerConfig(connection_type="per_pair")
    assert config.expected_update_ratio == pytest.approx(5.0, abs=0.05)


@pytest.mark.parametrize("connection_type", ["scalar", "per_pair", "block", "diagonal"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"share_step_norm": False},
        {"tie_word_embeddings": False},
        {"num_labels": 5},
        {"halting": "learned", "deep_supervision": 1},
        {"halting": "ponder", "deep_supervision": 1},
    ],
    ids=["default", "own norms", "untied", "labels", "learned halting", "ponder"],
)
def test_number_of_trainable_parameters(connection_type, options):
    config = small_config(connection_type=connection_type, **options)
    classes = {
        "ConditionalGeneration": ConnectionTransformerForConditionalGeneration,
        "MaskedLM": ConnectionTransformerForMaskedLM,
        "SequenceClassification": ConnectionTransformerForSequenceClassification,
        "MultipleChoice": ConnectionTransformerForMultipleChoice,
    }
    for head, model_class in classes.items():
        with torch.device("meta"):
            model = model_class(config)
        assert config.num_trainable_parameters(head) == model.num_parameters(only_trainable=True)
    assert config.num_trainable_parameters() == config.num_trainable_parameters("ConditionalGeneration")
    alone = small_config(connection_type=connection_type, is_encoder_decoder=False, **options)
    with torch.device("meta"):
        encoder = ConnectionTransformerModel(alone)
    assert alone.num_trainable_parameters() == encoder.num_parameters(only_trainable=True)
    with pytest.raises(ValueError, match="head='CausalLM'"):
        config.num_trainable_parameters("CausalLM")


USUAL_SIZES = {
    "quick": {"hidden_size": 128, "num_slots": 64, "connection_rank": 16, "max_reasoning_steps": 3},
    "base": {"hidden_size": 256, "num_slots": 128, "connection_rank": 32, "max_reasoning_steps": 6},
    "large": {"hidden_size": 512, "num_slots": 256, "connection_rank": 64, "max_reasoning_steps": 8},
}


@pytest.mark.parametrize("connection_type", ["scalar", "per_pair", "block", "diagonal"])
@pytest.mark.parametrize("size", USUAL_SIZES)
def test_matched_baseline(size, connection_type):
    """The Vanilla Transformer of as many parameters, counted on the real modules."""
    config = ConnectionTransformerConfig(
        vocab_size=32128, connection_type=connection_type, num_labels=3, **USUAL_SIZES[size]
    )
    heads = {
        "ConditionalGeneration": (ConnectionTransformerForConditionalGeneration,) * 2,
        "MaskedLM": (ConnectionTransformerForMaskedLM, ConnectionTransformerForConditionalGeneration),
        "SequenceClassification": (ConnectionTransformerForSequenceClassification,) * 2,
    }
    for head, (model_class, counterpart) in heads.items():
        matched = VanillaTransformerConfig.matched_to(config, head=head)
        name = counterpart.__name__.replace("Connection", "Vanilla")
        with torch.device("meta"):
            wanted = model_class(config).num_parameters(only_trainable=True)
            found = getattr(vanilla_transformer, name)(matched).num_parameters(only_trainable=True)
        assert abs(found / wanted - 1) <= 0.01, (head, found, wanted)
        assert matched.num_hidden_layers <= 24
        assert matched.vocab_size == config.vocab_size


def test_packed_weights():
    source, target = torch.randn(3, 3, 5, 2), torch.randn(3, 3, 2, 5)
    packed = ConnectionTransformerPerPairConnections.pack(source, target)
    assert [tuple(weight.shape) for weight in packed] == [(3, 5, 6), (3, 6, 5)]
    assert torch.equal(packed[0][1, :, 4:6], source[1, 2])
    assert torch.equal(packed[1][2, 2:4], target[1, 2])
    for one, other in zip(ConnectionTransformerPerPairConnections.unpack(*packed), (source, target), strict=True):
        assert torch.equal(one, other)


@matrix_types
def test_strengths_are_frobenius_norms(connection_type):
    connections = random_connections(connection_type)
    others = 1 - torch.eye(6, dtype=torch.float64)
    actual, expected = connections.connection_matrix(), pair_matrices(connections).norm(dim=(2, 3)) * others
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=0)
    assert_gradients_equal(actual.sum(), expected.sum(), tuple(connections.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(connections.float().connection_matrix(), connections.connection_matrix())


@matrix_types
def test_orthogonality_penalty_of_matrices_equals_its_definition(connection_type):
    connections = random_connections(connection_type)
    source, target = connections.source_weight, connections.target_weight
    if connection_type == "per_pair":
        source, target = connections.unpack(source, target)
        pairs = [(i, j) for i in range(6) for j in range(6) if i != j]
        parts = [(source[pair], target[pair].T) for pair in pairs]
    else:
        parts = [(source[slot], target[slot].T) for slot in range(6)]
    identity = torch.eye(3, dtype=torch.float64)
    expected = torch.stack(
        [((part.T @ part - identity) ** 2).mean() / 2 for factors in parts for part in factors]
    ).sum() / len(parts)
    actual = connections.orthogonality_penalty()
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
    inputs = (connections.source_weight, connections.target_weight)
    assert_gradients_equal(actual, expected, inputs)


def test_penalty_without_a_weight_is_reported_where_it_is_cheap():
    batch = random_batch(batch_size=2)
    for connection_type in CONNECTION_TYPES:
        model = small_model(connection_type=connection_type)
        outputs = model(**batch)
        assert (outputs.orthogonality_loss is None) is (connection_type == "per_pair")
        model.config.orthogonality_weight = 0.2
        weighted = model(**batch)
        torch.testing.assert_close(weighted.loss, outputs.loss + 0.2 * weighted.orthogonality_loss)


@matrix_types
def test_initial_matrices(connection_type):
    torch.manual_seed(0)
    config = small_config(connection_type=connection_type, num_slots=20, hidden_size=24, connection_rank=8)
    connections = ConnectionTransformerModel(config).encoder.reasoning.step.connections
    others = ~torch.eye(20, dtype=torch.bool)
    if connection_type == "per_pair":
        factors = connections.unpack(connections.source_weight, connections.target_weight)
        for weight in factors:
            assert weight[~others].eq(0).all()
        factors = [weight[others] for weight in factors]
    else:
        factors = [connections.source_weight, connections.target_weight]
        if connection_type == "block":
            cores = connections.core_weight.view(20, 8, 20, 8).transpose(1, 2)
        else:
            cores = connections.core_weight.permute(1, 2, 0)
        assert cores[~others].eq(0).all()
        deviation = 1.0 if connection_type == "diagonal" else 8**-0.5
        assert cores[others].std().item() == pytest.approx(deviation, rel=0.05)
    for weight in factors:
        assert weight.std().item() == pytest.approx((2 / 32) ** 0.5, rel=0.05)


BASE = {"num_slots": 128, "hidden_size": 256, "connection_rank": 32}
LARGE = {"num_slots": 256, "hidden_size": 512, "connection_rank": 64}


@pytest.mark.parametrize("connection_type", CONNECTION_TYPES)
@pytest.mark.parametrize("sizes", [{}, BASE, LARGE], ids=["small", "base", "large"])
def test_number_of_connection_weights(connection_type, sizes):
    config = small_config(connection_type=connection_type, **sizes)
    with torch.device("meta"):
        connections = CONNECTION_TYPES[connection_type](config)
    assert connections.num_weights(config) == sum(parameter.numel() for parameter in connections.parameters())


def test_sizes_beyond_the_memory_are_refused(monkeypatch):
    sizes = {"num_slots": 512, "hidden_size": 256, "connection_rank": 64}
    too_large = small_config(**sizes, connection_type="per_pair")
    monkeypatch.setattr(connections_connection_transformer, "memory_size", lambda device: 2**33)
    with pytest.raises(ValueError, match=r"'per_pair' with num_slots=512.* has 8,589,934,592 ") as caught:
        ConnectionTransformerModel(too_large)
    assert "'block' has 1,090,519,040 or 'diagonal' has 33,554,432 weights" in str(caught.value)
    assert "\n" not in str(caught.value)
    # Shapes alone take no memory, and where the limit is unknown there is nothing to compare with.
    with torch.device("meta"):
        monkeypatch.undo()
        ConnectionTransformerModel(too_large)
    monkeypatch.setattr(connections_connection_transformer, "memory_size", lambda device: None)
    ConnectionTransformerModel(small_config(connection_type="per_pair"))


def test_sizes_that_cannot_be_trained_give_a_warning(monkeypatch, caplog):
    config = small_config(connection_type="per_pair")
    weights = 4 * 2 * 6 * 6 * 16 * 3
    for memory, refused in ((weights - 1, True), (weights, False), (4 * weights - 1, False), (4 * weights, False)):
        monkeypatch.setattr(connections_connection_transformer, "memory_size", lambda device, memory=memory: memory)
        warned = []
        monkeypatch.setattr(connections_connection_transformer.logger, "warning_once", warned.append)
        if refused:
            with pytest.raises(ValueError, match="'block' has 900 or 'diagonal' has 684 weights"):
                ConnectionTransformerPerPairConnections(config)
        else:
            ConnectionTransformerPerPairConnections(config)
            assert len(warned) == (memory < 4 * weights)


def test_memory_of_this_machine_is_known():
    size = connections_connection_transformer.memory_size(torch.device("cpu"))
    assert size is None or size > 2**28
    assert connections_connection_transformer.memory_size(torch.device("meta")) is None


def test_answers_at_the_sources_positions():
    model, batch = small_model(ConnectionTransformerForMaskedLM), random_batch()
    with torch.no_grad():
        outputs = model(**batch)
        encoded = model.model(batch["input_ids"], batch["attention_mask"], return_token_states=True)
        queries = model.expansion.q_proj(encoded.token_states)
        keys = model.expansion.k_proj(encoded.last_hidden_state)
        values = model.expansion.v_proj(encoded.last_hidden_state)
        read = torch.nn.functional.scaled_dot_product_attention(queries, keys, values)
        torch.testing.assert_close(outputs.logits, model.lm_head(read), rtol=1e-5, atol=1e-5)
        # The label of a column is that column's token, not the next one's.
        expected = torch.nn.functional.cross_entropy(outputs.logits[:, :4].flatten(0, 1), batch["labels"].flatten())
        torch.testing.assert_close(outputs.loss, expected)
        whole = torch.nn.functional.pad(batch["labels"], (0, 4), value=-100)
        torch.testing.assert_close(model(**(batch | {"labels": whole})).loss, expected)
    assert not model.can_generate()
    with pytest.raises(ValueError, match=r"labels have 9 columns.* source, which has 8"):
        model(**(batch | {"labels": torch.zeros(12, 9, dtype=torch.long)}))
    with pytest.raises(ValueError, match="vocab_size=40 and decoder_vocab_size=23"):
        small_model(ConnectionTransformerForMaskedLM, tie_word_embeddings=False, decoder_vocab_size=23)


SUPERVISED = {"deep_supervision": 0.75, "connection_type": "diagonal"}


def answers_of_steps(model, batch):
    """Logits that the model gives when it is stopped after each step, of shape `(steps, batch, length, vocabulary)`."""
    halting, model.config.halting = model.config.halting, "none"
    source = {name: batch[name] for name in ("input_ids", "attention_mask")}
    steps = range(1, model.config.max_reasoning_steps + 1)
    logits = torch.stack([model.eval()(**source, max_reasoning_steps=bound).logits for bound in steps])
    model.config.halting = halting
    return logits


@pytest.mark.parametrize("halting", ["state_change", "slot_change", "none"])
def test_deep_supervision_is_a_mean_over_the_steps(halting):
    model, batch = small_model(ConnectionTransformerForMaskedLM, halting=halting, **SUPERVISED), random_batch()
    model.double()
    if halting != "none":
        spread_threshold(model, batch)
    logits = answers_of_steps(model, batch)[:, :, :4]
    expected = [torch.nn.functional.cross_entropy(step.flatten(0, 1), batch["labels"].flatten()) for step in logits]
    expected = 0.75 * torch.stack(expected).mean() + 0.25 * expected[-1]
    loss = model.train()(**batch).cross_entropy_loss
    torch.testing.assert_close(loss, expected)
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = [
        torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True) for value in (loss, expected)
    ]
    for name, one, other in zip(names, *gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")
    # At inference nothing is supervised, and samples stop.
    assert model.eval()(**batch).hidden_states is None
    if halting != "none":
        assert len(set(model(**batch).reasoning_steps.tolist())) > 1


def test_step_targets_take_the_place_of_the_labels():
    model, batch = small_model(ConnectionTransformerForMaskedLM, **SUPERVISED).double(), random_batch()
    # Two rows of targets for five steps: the second holds from the second step on; nothing is told about some.
    step_targets = torch.stack([(batch["labels"] * 7 + 1) % 40, batch["labels"]], dim=1)
    step_targets[batch["labels"].eq(-100)[:, None].expand_as(step_targets)] = -100
    step_targets[::2, 0] = -100
    logits = answers_of_steps(model, batch)[:, :, :4]
    total, count = 0, batch["labels"].ne(-100).sum()
    for step, answer in enumerate(logits):
        labels = step_targets[:, min(step, 1)].flatten()
        total = total + torch.nn.functional.cross_entropy(answer.flatten(0, 1), labels, reduction="sum") / count
    last = torch.nn.functional.cross_entropy(logits[-1].flatten(0, 1), batch["labels"].flatten())
    loss = model.train()(**batch, step_targets=step_targets).cross_entropy_loss
    torch.testing.assert_close(loss, 0.75 * total / 5 + 0.25 * last)
    for wrong in (batch["labels"], step_targets[:, :, :3], step_targets[:5]):
        with pytest.raises(ValueError, match=r"step_targets must be of shape \(12, num_targets, 4\)"):
            model(**batch, step_targets=wrong)


def test_learned_halting():
    """The head learns whether the answer after each step is right, and the slots learn nothing from it."""
    model = small_model(ConnectionTransformerForMaskedLM, halting="learned", **SUPERVISED).double()
    batch = random_batch()
    logits = answers_of_steps(model, batch)
    # Some answers are made right, and some only at the end.
    batch["labels"] = logits[-1, :, :4].argmax(-1).masked_fill(batch["labels"] == -100, -100)
    batch["labels"][::3, 0] = 39
    given = batch["labels"] != -100
    right = ((logits[:, :, :4].argmax(-1) == batch["labels"]) | ~given).all(-1)
    assert 0 < right.float().mean() < 1
    measures = torch.stack(model(**batch, output_halting_measures=True).halting_measures)
    outputs = model.train()(**batch)
    expected = torch.nn.functional.binary_cross_entropy(torch.stack(outputs.halting_measures), 1 - right.double())
    torch.testing.assert_close(outputs.halting_loss, expected)
    torch.testing.assert_close(outputs.loss, outputs.cross_entropy_loss + 0.5 * expected)
    gradients = {
        name: gradient
        for name, gradient in zip(
            dict(model.named_parameters()),
            torch.autograd.grad(outputs.halting_loss, model.parameters(), allow_unused=True),
            strict=True,
        )
        if gradient is not None
    }
    assert set(gradients) == {name for name, _ in model.named_parameters() if "halting_head" in name}
    assert all(gradient.abs().sum() > 0 for gradient in gradients.values())
    # Where no sample has stopped yet, training and inference estimate the same.
    torch.testing.assert_close(measures[0], outputs.halting_measures[0])


def test_ponder():
    """The loss of every step counts by the chance to stop there; the chances are drawn to a geometric distribution."""
    settings = SUPERVISED | {
        "deep_supervision": 1,
        "halting": "ponder",
        "ponder_prior": 0.3,
        "halting_loss_weight": 0.1,
    }
    model, batch = small_model(ConnectionTransformerForMaskedLM, **settings).double(), random_batch()
    logits = answers_of_steps(model, batch)
    outputs = model.train()(**batch)
    measures = torch.stack(outputs.halting_measures)
    steps, size = measures.shape
    expected_loss = divergence = 0.0
    for row in range(size):
        left, prior_left = 1.0, 1.0
        for step in range(steps):
            is_last = step == steps - 1
            chance = left if is_last else left * (1 - measures[step, row])
            prior = prior_left if is_last else prior_left * 0.3
            left, prior_left = left - chance, prior_left - prior
            answer, labels = logits[step, row, :4], batch["labels"][row]
            expected_loss = expected_loss + chance * torch.nn.functional.cross_entropy(answer, labels, reduction="sum")
            divergence = divergence + chance * torch.log(chance / prior) / size
    torch.testing.assert_close(outputs.cross_entropy_loss, expected_loss / batch["labels"].ne(-100).sum())
    torch.testing.assert_close(outputs.halting_loss, divergence)
    torch.testing.assert_close(outputs.loss, outputs.cross_entropy_loss + 0.1 * divergence)
    outputs.halting_loss.backward()
    weights = model.model.encoder.reasoning.step.connections.parameters()
    assert all(weight.grad.abs().sum() > 0 for weight in weights), "the slots learn from the chances"


def test_ponder_chances():
    measures = torch.tensor([[0.7, 0.0, 1.0], [0.7, 0.5, 1.0], [0.7, 0.5, 1.0]], requires_grad=True)
    chances = halting_chances(measures)
    torch.testing.assert_close(chances.detach()[:, 0], torch.tensor([0.3, 0.21, 0.49]))
    assert chances[:, 1:].tolist() == [[1, 0], [0, 0], [0, 1]]
    assert ponder_divergence(chances[:, :1], 0.3).item() == pytest.approx(0, abs=1e-6)
    (gradient,) = torch.autograd.grad(ponder_divergence(chances, 0.3), measures)
    assert gradient.isfinite().all(), "also where the head is sure"


@pytest.mark.parametrize("halting", ["learned", "ponder"])
@pytest.mark.parametrize("connection_type", ["scalar", "diagonal"])
def test_learned_halting_is_the_same_alone_in_a_batch_and_padded(connection_type, halting):
    settings = {"halting": halting, "deep_supervision": 1, "connection_type": connection_type}
    model, batch = small_model(ConnectionTransformerForMaskedLM, **settings), random_batch()
    spread_threshold(model, batch)
    source = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        compacted, masked = model(**source), model(**source, output_hidden_states=True)
        assert len(set(compacted.reasoning_steps.tolist())) > 1
        assert torch.equal(masked.reasoning_steps, compacted.reasoning_steps)
        torch.testing.assert_close(masked.logits, compacted.logits, rtol=1e-5, atol=1e-5)
        for row in range(12):
            length = int(source["attention_mask"][row].sum())
            for place in (slice(row, row + 1), slice(None, length)):
                ids = source["input_ids"][row : row + 1, :length] if place.start is None else None
                alone = model(input_ids=ids) if ids is not None else model(**rows_of(source, place))
                assert alone.reasoning_steps.item() == compacted.reasoning_steps[row]
                torch.testing.assert_close(
                    alone.logits[0, :length], compacted.logits[row, :length], rtol=1e-5, atol=1e-5
                )


@pytest.mark.parametrize("halting", ["learned", "ponder"])
def test_deep_supervision_adds_up_over_micro_batches(halting):
    settings = SUPERVISED | {"halting": halting, "step_cost_weight": 0.3}
    model, batch = small_model(ConnectionTransformerForMaskedLM, **settings).double().train(), random_batch()
    spread_threshold(model, batch)
    batch["labels"] = batch["labels"].where(
        torch.arange(12)[:, None] % 2 == 0, model.eval()(**batch).logits[:, :4].argmax(-1)
    )
    model.train()
    names = ("loss", "cross_entropy_loss", "halting_loss", "step_cost_loss")
    whole = model(**batch)
    parts = [
        model(
            **rows_of(batch, rows),
            num_items_in_batch=batch["labels"].ne(-100).sum(),
            num_sequences_in_batch=torch.tensor(12),
        )
        for rows in (slice(0, 1), slice(1, 4), slice(4, 12))
    ]
    for name in names:
        torch.testing.assert_close(sum(part[name] for part in parts), whole[name], rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "model_class", [ConnectionTransformerForConditionalGeneration, ConnectionTransformerForSequenceClassification]
)
def test_heads_that_answer_once_refuse_deep_supervision(model_class):
    model, batch = small_model(model_class, deep_supervision=0.5), random_batch()
    if model_class is ConnectionTransformerForSequenceClassification:
        batch["labels"] = torch.arange(12) % 2
    with pytest.raises(ValueError, match=r"deep_supervision=0\.5 needs an answer after every step"):
        model(**batch)


def test_initial_gain_of_the_compression():
    """A larger gain sends every token to fewer slots."""
    entropies = []
    for gain in (1, 8):
        torch.manual_seed(0)
        model = ConnectionTransformerForMaskedLM(small_config(initial_compression_gain=gain, num_slots=16)).eval()
        compression = model.model.encoder.compression
        for projection, size in ((compression.q_proj, gain), (compression.k_proj, 1), (compression.v_proj, 1)):
            values = torch.linalg.svdvals(projection.weight)
            torch.testing.assert_close(values, torch.full_like(values, size))
        ids = torch.arange(3, 19)[:, None]
        weights = (
            compression.q_proj((model.model.encoder.embed_tokens(ids) + model.model.encoder.embed_positions(ids)) * 4)
            @ compression.k_proj(compression.slots).T
            / 4
        )
        chances = weights.softmax(-1)
        entropies.append((-chances * chances.log()).sum(-1).mean().item())
    assert entropies[1] < 0.6 * entropies[0]


def test_initial_weights():
    encoder = ConnectionTransformerModel(small_config()).encoder
    for weight in encoder.reasoning.step.connections.parameters():
        lengths = weight.norm(dim=-1)
        torch.testing.assert_close(lengths, 1 - torch.eye(6), rtol=0, atol=1e-6)
    for projection in (encoder.compression.q_proj, encoder.compression.k_proj, encoder.compression.v_proj):
        torch.testing.assert_close(projection.weight @ projection.weight.T, torch.eye(16), rtol=0, atol=1e-5)
    # A token is about as long as a slot.
    lengths = encoder.embed_tokens.weight[1:].norm(dim=-1)
    assert 0.8 < lengths.mean() < 1.2
    assert encoder.embed_tokens.weight[0].eq(0).all()


@pytest.mark.parametrize(("num_slots", "hidden_size"), [(3, 8), (8, 8), (19, 8)])
def test_slots_are_orthonormal(num_slots, hidden_size):
    slots = orthonormal_slots(num_slots, hidden_size, seed=3)
    for start in range(0, num_slots, hidden_size):
        block = slots[start : start + hidden_size]
        torch.testing.assert_close(block @ block.T, torch.eye(len(block)), rtol=0, atol=1e-5)
    assert torch.equal(slots, orthonormal_slots(num_slots, hidden_size, seed=3))
    assert not torch.allclose(slots, orthonormal_slots(num_slots, hidden_size, seed=4))
    if num_slots > 2 * hidden_size:
        # Blocks are drawn one after the other, not repeated.
        assert not torch.allclose(slots[:hidden_size], slots[hidden_size : 2 * hidden_size])


def test_compression_norm():
    batch = random_batch()
    unpadded = {"input_ids": batch["input_ids"].clamp(min=3), "labels": batch["labels"]}
    masked = unpadded | {"attention_mask": torch.ones_like(unpadded["input_ids"])}
    with torch.no_grad():
        mean, original = small_model(), small_model(compression_norm="sum_without_mask")
        torch.testing.assert_close(mean(**unpadded).logits, mean(**masked).logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(original(**masked).logits, mean(**masked).logits, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(original(**unpadded).logits, mean(**unpadded).logits, atol=1e-2)
        weights = mean(**batch, output_compression_weights=True).compression_weights[0]
    # Less than one by what is added to the divisor, which shows where all tokens avoid a slot.
    torch.testing.assert_close(weights.sum(1), torch.ones(12, 6), rtol=0, atol=1e-4)
    assert weights[batch["attention_mask"] == 0].eq(0).all()


LOSS_PARTS = ("loss", "cross_entropy_loss", "orthogonality_loss", "step_cost_loss")
LOSSES = {"orthogonality_weight": 0.2, "step_cost_weight": 0.3, "label_smoothing": 0.1}


def accumulated(model, batch, num_items, slices, **keywords):
    """Sums of the loss parts over micro-batches, and the accumulated gradients."""
    model.zero_grad()
    sums = dict.fromkeys(LOSS_PARTS, 0)
    for rows in slices:
        outputs = model(**rows_of(batch, rows), num_items_in_batch=num_items, **keywords)
        outputs.loss.backward()
        sums = {name: value + outputs[name].detach() for name, value in sums.items()}
    return sums, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("target", [None, 2], ids=["mean", "excess"])
@pytest.mark.parametrize(
    "model_class",
    [
        ConnectionTransformerForConditionalGeneration,
        ConnectionTransformerForSequenceClassification,
        ConnectionTransformerForMultipleChoice,
        ConnectionTransformerForMaskedLM,
    ],
)
def test_loss_parts_add_up_over_micro_batches(model_class, target):
    model = small_model(model_class, **LOSSES, step_cost_target=target).double().train()
    batch = random_batch()
    if model_class is ConnectionTransformerForSequenceClassification:
        batch["labels"] = torch.arange(12) % 2
    elif model_class is ConnectionTransformerForMultipleChoice:
        batch = {name: value.view(4, 3, -1) for name, value in batch.items()} | {"labels": torch.tensor([0, 2, 1, 1])}
    spread_threshold(model, batch)
    num_sequences, num_items = len(batch["labels"]), batch["labels"].ne(-100).sum()
    whole, expected = accumulated(model, batch, None, [slice(None)])
    assert all(value > 0 for value in whole.values())
    unequal = [slice(0, 1), slice(1, 3), slice(3, num_sequences)]
    for items, sequences in ((num_items, num_sequences), (num_items.item(), torch.tensor(num_sequences))):
        sums, gradients = accumulated(model, batch, items, unequal, num_sequences_in_batch=sequences)
        for name, value in whole.items():
            # The shares are float32.
            torch.testing.assert_close(
                sums[name], value, rtol=1e-6, atol=0, msg=lambda text, name=name: f"{name}: {text}"
            )
        for name, gradient in expected.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-6, atol=1e-8)
    # With the number of labels alone the shares are counted in labels; they still sum to one.
    sums, _ = accumulated(model, batch, num_items, unequal)
    for name in ("cross_entropy_loss", "orthogonality_loss"):
        torch.testing.assert_close(sums[name], whole[name], rtol=1e-6, atol=0)


def test_loss_is_the_weighted_sum_of_its_parts():
    model, batch = small_model(**LOSSES), random_batch()
    spread_threshold(model, batch)
    with torch.no_grad():
        outputs = model(**batch)
        log_probabilities = outputs.logits.log_softmax(-1)
        real = batch["labels"] != -100
        likelihood = -log_probabilities[real].gather(1, batch["labels"][real][:, None])
        smoothed = 0.9 * likelihood.mean() - 0.1 * log_probabilities[real].mean()
        torch.testing.assert_close(outputs.cross_entropy_loss, smoothed)
        torch.testing.assert_close(outputs.step_cost_loss, outputs.expected_steps.mean())
        parts = outputs.cross_entropy_loss + 0.2 * outputs.orthogonality_loss
        torch.testing.assert_close(outputs.loss, parts + 0.3 * outputs.step_cost_loss)
        torch.testing.assert_close(model(**batch, step_cost_weight=0).loss, parts)
        torch.testing.assert_close(model(**batch, step_cost_weight=2).loss, parts + 2 * outputs.step_cost_loss)
        # Some samples think for less than the target, which costs nothing.
        target = outputs.expected_steps.mean().item()
        model.config.step_cost_target = target
        assert outputs.expected_steps.min() < target - 0.01
        excess = (outputs.expected_steps - target).clamp(min=0).square().mean()
        torch.testing.assert_close(model(**batch).step_cost_loss, excess)


def test_batch_without_labels_has_a_finite_loss():
    model, batch = small_model(), random_batch(batch_size=2)
    outputs = model(**(batch | {"labels": torch.full((2, 4), -100)}))
    assert outputs.loss == 0
    outputs.loss.backward()


def test_step_cost_moves_only_what_it_may():
    model, batch = small_model().train(), random_batch()
    model.config.step_cost_weight = 1.0
    outputs = model(**batch)
    (outputs.loss - outputs.cross_entropy_loss).backward()
    decoder = [
        parameter.grad for name, parameter in model.named_parameters() if name.startswith("model.decoder.layers")
    ]
    assert all(gradient is None or gradient.eq(0).all() for gradient in decoder)
    assert model.model.encoder.reasoning.step.connections.source_weight.grad.abs().sum() > 0
    assert model.model.encoder.compression.q_proj.weight.grad.abs().sum() > 0


def test_foreign_encoder_outputs():
    model, batch = small_model(), random_batch(batch_size=2)
    inputs = {"encoder_outputs": (torch.randn(2, 6, 16),), "labels": batch["labels"]}
    outputs = model(**inputs)
    assert outputs.reasoning_steps is None
    assert outputs.step_cost_loss is None
    with pytest.raises(ValueError, match="hold no expected_steps"):
        model(**inputs, step_cost_weight=0.1)


@pytest.mark.parametrize(
    ("problem_type", "told", "num_labels", "labels"),
    [
        ("regression", False, 1, torch.linspace(-1, 1, 12)),
        ("regression", True, 3, torch.linspace(-1, 1, 36).view(12, 3)),
        ("multi_label_classification", False, 3, (torch.arange(36).view(12, 3) % 2).float()),
        ("single_label_classification", False, 3, torch.arange(12) % 3),
    ],
)
def test_classification_losses(problem_type, told, num_labels, labels):
    model = small_model(ConnectionTransformerForSequenceClassification, num_labels=num_labels)
    model.config.problem_type = problem_type if told else None
    batch = random_batch() | {"labels": labels}
    with torch.no_grad():
        outputs = model(**batch)
        logits = outputs.logits
        expected = {
            "regression": lambda: (logits.view_as(labels) - labels).square().mean(),
            "multi_label_classification": lambda: torch.nn.BCEWithLogitsLoss()(logits, labels),
            "single_label_classification": lambda: torch.nn.CrossEntropyLoss()(logits, labels),
        }[problem_type]()
        torch.testing.assert_close(outputs.loss, expected)
        model.config.problem_type = problem_type
        assert torch.equal(model(**batch).loss, outputs.loss)


def test_choices_keep_their_shape():
    model = small_model(ConnectionTransformerForMultipleChoice)
    batch = {name: value.view(4, 3, -1) for name, value in random_batch().items() if name != "labels"}
    outputs = model(**batch)
    assert outputs.logits.shape == outputs.reasoning_steps.shape == outputs.expected_steps.shape == (4, 3)


@pytest.mark.parametrize(
    ("model_class", "new"),
    [
        (ConnectionTransformerForSequenceClassification, "classifier"),
        (ConnectionTransformerForMultipleChoice, "classifier"),
        (ConnectionTransformerForMaskedLM, "expansion"),
    ],
)
def test_encoder_heads_hold_no_decoder(model_class, new, tmp_path):
    config = small_config()
    head = model_class(config)
    assert config.is_encoder_decoder
    assert not head.config.is_encoder_decoder
    assert not [name for name, _ in head.named_parameters() if "decoder" in name or "lm_head" in name]
    assert (head.get_output_embeddings() is None) is (new == "classifier")
    whole = small_model()
    whole.save_pretrained(tmp_path / "whole")
    loaded, report = model_class.from_pretrained(tmp_path / "whole", output_loading_info=True)
    assert {name.split(".")[0] for name in report["missing_keys"]} == {new}
    assert not report["unexpected_keys"]
    for name, parameter in loaded.model.named_parameters():
        assert torch.equal(parameter, whole.model.get_parameter(name)), name


def test_classifier_folder_gives_a_new_decoder(tmp_path):
    head = small_model(ConnectionTransformerForSequenceClassification)
    head.save_pretrained(tmp_path)
    model, report = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, output_loading_info=True)
    assert model.config.is_encoder_decoder
    missing = {name for name in report["missing_keys"] if not name.startswith("model.decoder.")}
    assert missing <= {"lm_head.weight"}
    assert torch.equal(model.get_encoder().embed_tokens.weight, head.model.encoder.embed_tokens.weight)
    assert model(**random_batch(batch_size=2)).loss.isfinite()


def test_selected_hidden_states():
    # More steps than decoder layers: the last state is not where `num_hidden_layers` would have it.
    model, batch = small_model(halting="none"), random_batch(batch_size=2)
    # Versions of the library without negative indices do not count the state before the first step either.
    last = -1 if hasattr(OutputRecorder, "num_hidden_layers_key") else 4
    outputs = model.get_encoder()(batch["input_ids"], batch["attention_mask"], output_hidden_states=[last])
    assert all(states is None for states in outputs.hidden_states[:-1])
    assert torch.equal(outputs.hidden_states[-1], outputs.last_hidden_state)


def test_untied_vocabularies(tmp_path):
    model = small_model(tie_word_embeddings=False, decoder_vocab_size=23)
    assert model.config.get_text_config(decoder=True).vocab_size == 23
    assert model.config.get_text_config() is model.config
    batch = random_batch(batch_size=3, vocab_size=20)
    outputs = model(**batch)
    assert outputs.logits.shape == (3, 4, 23)
    assert model.generate(batch["input_ids"], max_new_tokens=4).max() < 23
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(**batch).logits, outputs.logits)
    with pytest.raises(ValueError, match="vocab_size=40 and decoder_vocab_size=23"):
        model.resize_token_embeddings(50)


def test_resizing_untied_embeddings(tmp_path):
    model, batch = small_model(tie_word_embeddings=False), random_batch(batch_size=3)
    with torch.no_grad():
        before = model(**batch).logits
    model.resize_token_embeddings(44)
    encoder, decoder = model.get_encoder().embed_tokens, model.get_decoder().embed_tokens
    sizes = {encoder.num_embeddings, decoder.num_embeddings, model.lm_head.out_features, len(decoder.weight)}
    assert sizes == {44} == {model.config.vocab_size}
    assert encoder.weight is not decoder.weight
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits[..., :40], before)
    model.save_pretrained(tmp_path)
    _, report = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]


def test_input_errors():
    model, batch = small_model(), random_batch(batch_size=2)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(labels=batch["labels"])
    with pytest.raises(ValueError, match="exactly one of decoder_input_ids and decoder_inputs_embeds"):
        model(input_ids=batch["input_ids"])
    with pytest.raises(ValueError, match="source has 21 columns, max_position_embeddings is 20"):
        model(input_ids=torch.ones(1, 21, dtype=torch.long), labels=batch["labels"])
    with pytest.raises(ValueError, match="source is empty"):
        model(input_ids=torch.ones(1, 0, dtype=torch.long), labels=batch["labels"])
    masks = torch.tensor([[1] * 8, [0] * 8])
    with pytest.raises(ValueError, match=r"attention_mask is zero in all of row\(s\) \[1\]"):
        model(**batch | {"attention_mask": masks})
    with pytest.raises(ValueError, match="target has 21 tokens, max_position_embeddings is 20"):
        model(input_ids=batch["input_ids"], decoder_input_ids=torch.ones(2, 21, dtype=torch.long))
    with pytest.raises(ValueError, match="decoder_start_token_id=None and pad_token_id=0 must both be set"):
        small_model(decoder_start_token_id=None)(**batch)
    with pytest.raises(ValueError, match=r"attention_mask must be of shape .* got \(2, 1, 1, 8\)"):
        model(**(batch | {"attention_mask": batch["attention_mask"][:, None, None]}))


def test_flex_attention_agrees():
    model, batch = small_model(), random_batch(batch_size=3)
    with torch.no_grad():
        expected = model(**batch).logits
        model.set_attn_implementation("flex_attention")
        torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("connection_type", CONNECTION_TYPES)
def test_training_step_compiles_into_one_graph(connection_type):
    model = small_model(max_reasoning_steps=2, connection_type=connection_type).train()
    batch = random_batch(batch_size=3)
    expected = model(**batch).loss
    counters.clear()
    compiled = torch.compile(model, backend="aot_eager")(**batch).loss
    assert not counters["graph_break"]
    torch.testing.assert_close(compiled, expected, rtol=1e-5, atol=1e-5)
    torch.compiler.reset()


@pytest.mark.parametrize(
    "documented",
    [
        ConnectionTransformerConfig,
        ConnectionTransformerModel,
        ConnectionTransformerForConditionalGeneration,
        ConnectionTransformerForMaskedLM,
    ],
)
def test_docstring_examples_run(documented):
    example = inspect.getdoc(documented).split("```python\n")[1].split("```")[0]
    test = doctest.DocTestParser().get_doctest(example, {}, documented.__name__, None, 0)
    assert doctest.DocTestRunner().run(test) == (0, len(test.examples))
