"""Embeddings of a pretrained model as the starting point of another, and whole models as its reader."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    PreTrainedTokenizerFast,
    T5Config,
    T5Model,
    set_seed,
)

from hf_models.vanilla_transformer import VanillaTransformerConfig, VanillaTransformerForConditionalGeneration
from tests.trainers.tasks.tools import make_task
from trainers import train
from trainers.arguments import parse_recipe
from trainers.comparison.matching import configuration, trainable_parameters
from trainers.errors import UserError
from trainers.pretrained import CopiedEmbeddings, embeddings_from, read_token, reader_fields, reader_tokenizer
from trainers.sequence_to_sequence import make_model, make_tokenizer
from trainers.tasks.tokenization import byte_level_bpe


def source_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, with other merges and other special tokens than the package's own."""
    words = ["Ġthe", "Ġcat", "Ġd", "og"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "t"), ("Ġt", "h"), ("Ġth", "e"), ("Ġ", "c"), ("Ġc", "a"), ("Ġca", "t"), ("Ġ", "d"), ("o", "g")]
    tokens = ["<|end|>", *alphabet, *dict.fromkeys([*("".join(pair) for pair in merges), *words])]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", bos_token="<|end|>")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    set_seed(0)
    tokenizer = source_tokenizer()
    GPT2Model(GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def small_model(tokenizer, hidden_size=16, **options):
    set_seed(1)
    config = VanillaTransformerConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        **options,
    )
    return VanillaTransformerForConditionalGeneration(config)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level_bpe(["the cat saw the dog and the cat"] * 3, 300, 64)


def test_every_token_takes_the_mean_of_what_the_source_reads(source, tokenizer):
    model = small_model(tokenizer)
    before = model.get_input_embeddings().weight.detach().clone()
    counts = embeddings_from(model, tokenizer, str(source))
    after = model.get_input_embeddings().weight.detach()
    rows = GPT2Model.from_pretrained(source).get_input_embeddings().weight.detach()
    reader = source_tokenizer()
    plain, kept = {}, []
    for token in range(len(tokenizer)):
        pieces = read_token(tokenizer, reader, token)
        if pieces:
            plain[token] = sum(rows[piece] for piece in pieces) / len(pieces)
        else:
            kept.append(token)
    set_rows = sorted(plain)
    values = torch.stack([plain[token] for token in set_rows])
    factor = before[set_rows].norm() / values.norm()
    torch.testing.assert_close(after[set_rows], values * factor, rtol=1e-5, atol=1e-6)
    assert torch.equal(after[kept], before[kept])
    torch.testing.assert_close(after[set_rows].norm(), before[set_rows].norm())
    lengths = [len(read_token(tokenizer, reader, token)) for token in set_rows]
    assert counts == CopiedEmbeddings(lengths.count(1), len(lengths) - lengths.count(1), len(kept))
    assert counts.copied > 100
    assert counts.averaged > 0
    assert counts.kept > 100  # bytes that are no text by themselves, and the padding


def test_what_the_source_reads(tokenizer):
    reader = source_tokenizer()

    def reading(text):
        return reader.convert_ids_to_tokens(read_token(tokenizer, reader, tokenizer.convert_tokens_to_ids(text)))

    assert reading("Ġcat") == ["Ġcat"]
    assert reading("Ġdog") == ["Ġd", "og"]
    assert reading("<eos>") == reading("<bos>") == ["<|end|>"]
    assert reading("<pad>") == reading("<unk>") == []


def test_tied_outputs_follow_and_the_model_trains(source, tokenizer):
    model = small_model(tokenizer, tie_word_embeddings=True)
    embeddings_from(model, tokenizer, str(source))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    task = make_task("strategyqa")
    batch = torch.tensor([task.encode(task.rows("test")[0], tokenizer)["labels"]])
    model(input_ids=batch, labels=batch).loss.backward()
    assert model.get_input_embeddings().weight.grad.abs().sum() > 0


def test_mistakes_are_one_line(source, tokenizer, tmp_path):
    with pytest.raises(UserError) as caught:
        embeddings_from(small_model(tokenizer, hidden_size=32), tokenizer, str(source))
    assert str(caught.value) == (
        f"model.embeddings_from: the embeddings of {str(source)!r} have width 16, and model.hidden_size is 32; "
        "they must be equal"
    )
    with pytest.raises(UserError, match=r"^model.embeddings_from: cannot load"):
        embeddings_from(small_model(tokenizer), tokenizer, str(tmp_path / "nowhere"))


MODEL = (
    "model_type: connection_transformer, hidden_size: 8, num_slots: 4, connection_rank: 2, max_reasoning_steps: 2, "
    "num_decoder_layers: 1, num_attention_heads: 2, max_position_embeddings: 64"
)


def recipe_with_reader(folder, reader, *options):
    path = folder / "reader.yaml"
    path.write_text(
        f"model: {{{MODEL}, reader: {str(reader)!r}}}\n"
        "task: {name: strategyqa, data_dir: tests/data/strategyqa, max_source_length: 64}\n"
        "training: {max_steps: 2, per_device_train_batch_size: 4, learning_rate: 0.01, use_cpu: true}\n"
    )
    return [str(path), *options]


def reading_model(folder, reader, *options):
    recipe = parse_recipe(recipe_with_reader(folder, reader, *options), prog="train")
    tokenizer = make_tokenizer(recipe, None, [])
    return recipe, tokenizer, make_model(recipe, tokenizer)


def test_reader_takes_configuration_weights_and_tokenizer(source, tmp_path):
    recipe, tokenizer, model = reading_model(tmp_path, source, "--reader_layers", "1")
    assert tokenizer.get_vocab() == source_tokenizer().get_vocab()
    assert tokenizer.pad_token == tokenizer.eos_token == "<|end|>"
    whole = GPT2Model.from_pretrained(source).state_dict()
    reader = model.get_encoder().reader.model
    assert reader.config.num_hidden_layers == 1
    assert str(source.parent) not in json.dumps(model.config.to_dict())
    for name, value in reader.state_dict().items():
        torch.testing.assert_close(value, whole[name], rtol=0, atol=0)
    assert any(name.startswith("h.1.") for name in whole), "a layer was left out"
    # A comparison counts the same without loading the weights.
    assert trainable_parameters(configuration(recipe, tokenizer)) == model.num_parameters(only_trainable=True)
    assert (
        reader_fields(parse_recipe(recipe_with_reader(tmp_path, source), prog="train"))[
            "reader_config"
        ].num_hidden_layers
        == 2
    )


def test_frozen_reader_through_a_whole_run(source, tmp_path):
    """Trained, scored, saved: the folder holds the reader's weights as they were, and the recipe can be resumed."""
    out = tmp_path / "out"
    command = recipe_with_reader(tmp_path, source, "--output_dir", str(out), "--disable_tqdm")
    assert train.main(command) == 0
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    for name, value in before.items():
        torch.testing.assert_close(after[f"model.encoder.reader.model.{name}"], value, rtol=0, atol=0)
    metrics = json.loads((out / "metrics.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(out)
    plain = source_tokenizer()("a cat")["input_ids"]
    assert tokenizer("a cat")["input_ids"] == [*plain, tokenizer.eos_token_id], "as sources end in training"
    card = (out / "README.md").read_text()
    assert f"from random weights, its input read by `{source.name}` that stayed as it was on the task" in card
    assert "seen nothing but" not in card
    assert metrics["parameters"]["total"] - metrics["parameters"]["trainable"] == sum(map(torch.numel, before.values()))
    model = AutoModelForSeq2SeqLM.from_pretrained(out)
    assert model.num_parameters(only_trainable=True) == metrics["parameters"]["trainable"]
    assert str(source.parent) not in (out / "recipe.yaml").read_text() + (out / "config.json").read_text()
    assert train.main([*command, "--resume"]) == 0
    # The finished run is a starting point itself.
    again = tmp_path / "again.yaml"
    again.write_text(
        f"model: {{model_type: connection_transformer, pretrained: {str(out)!r}}}\n"
        "task: {name: strategyqa, data_dir: tests/data/strategyqa, max_source_length: 64}\n"
    )
    recipe = parse_recipe([str(again)], prog="train")
    assert make_model(recipe, make_tokenizer(recipe, None, [])).get_encoder().reader.frozen


def test_reader_that_is_trained(source, tmp_path):
    _, _, model = reading_model(tmp_path, source, "--freeze_reader", "false")
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_an_encoder_as_the_reader_lends_its_own_tokens(tmp_path):
    """BERT's tokenizer has no end of a text and its model a state of the whole row: neither is needed."""
    tokenizer = source_tokenizer()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer, sep_token="<|end|>", cls_token="Ġcat", pad_token="Ġd"
    )
    tokenizer.save_pretrained(tmp_path)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    set_seed(0)
    BertModel(config).save_pretrained(tmp_path)
    recipe, tokenizer, model = reading_model(tmp_path, tmp_path)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("Ġcat", "<|end|>", "Ġd")
    assert reader_tokenizer(recipe).eos_token_id == model.config.eos_token_id
    assert not [name for name, _ in model.named_parameters() if "pooler" in name]


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        (["--reader_layers", "3"], "model.reader_layers is 3, but .* has 2 layers"),
        (["--reader_layers", "0"], "model.reader_layers is 0; it must be at least 1"),
        (["--max_position_embeddings", "2000"], "must not exceed reader_config.max_position_embeddings=1024"),
        (["--reader", "nowhere.gguf"], "model.reader: nowhere.gguf does not exist"),
        (["--reader", "tests"], "model.reader: cannot load 'tests': the folder holds no config.json"),
        (["--tokenizer.name_or_path", "x"], "tokenizer.name_or_path and model.reader exclude each other"),
        (["--embeddings_from", "x"], "model.embeddings_from and model.reader exclude each other"),
        (["--pretrained", "x"], "model.pretrained and model.reader exclude each other"),
        (["--reader_config", "{model_type: gpt2}"], "model.reader_config and model.reader exclude each other"),
    ],
)
def test_mistakes_with_a_reader_are_one_line(source, tmp_path, options, rule):
    with pytest.raises(UserError, match=rule) as caught:
        reading_model(tmp_path, source, *options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model", "rule"),
    [
        (f"{MODEL}, reader_layers: 2", "model.reader_layers is set, but model.reader is not"),
        ("model_type: vanilla_transformer, reader: x", "model.reader: a vanilla_transformer takes no reader"),
    ],
)
def test_recipes_that_have_no_place_for_a_reader(tmp_path, model, rule):
    path = tmp_path / "plain.yaml"
    path.write_text(f"model: {{{model}}}\ntask: {{name: strategyqa}}\n")
    with pytest.raises(UserError, match=rule):
        parse_recipe([str(path)], prog="train")


def test_readers_that_do_not_fit(source, tmp_path):
    T5Model(T5Config(vocab_size=300, d_model=8, d_kv=4, num_heads=2, d_ff=8, num_layers=1)).save_pretrained(tmp_path)
    source_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"model: reader_config: a t5 has a decoder"):
        reading_model(tmp_path, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"model.reader: cannot load the tokenizer"):
        reading_model(tmp_path, tmp_path)
