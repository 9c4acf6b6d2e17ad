"""Embeddings of a pretrained model as the starting point of another."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2Model, PreTrainedTokenizerFast, set_seed

from hf_models.vanilla_transformer import VanillaTransformerConfig, VanillaTransformerForConditionalGeneration
from tests.trainers.tasks.tools import make_task
from trainers.errors import UserError
from trainers.pretrained import CopiedEmbeddings, embeddings_from, read_token
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
    GPT2Model(GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2)).save_pretrained(folder)
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
