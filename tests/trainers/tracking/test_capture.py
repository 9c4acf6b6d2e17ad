"""Weights, masks and names as captured from models of several kinds, and what is said of those that cannot be."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, BertConfig, BertModel, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from hf_models.in_context_transformer import (
    InContextTransformerConfig,
    InContextTransformerForPrediction,
    LowRankInContextTransformerConfig,
    LowRankInContextTransformerForSequenceClassification,
)
from hf_models.vanilla_transformer import convert_vanilla_transformer
from tests.trainers.tracking.tools import make_batch, make_model
from trainers.errors import UserError
from trainers.tracking import InternalsTracker, TransformerAnalyzer
from trainers.tracking.capture import AttentionCall
from trainers.tracking.recorder import Recorder, Wanted
from trainers.tracking.structure import Structure

GOLDEN = Path(__file__).parents[2] / "golden" / "transformer"


@pytest.mark.parametrize("name", ["paper_tiny", "torch_default_final_norm"])
@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_golden_models(name, kernel, tmp_path):
    """The golden models loaded by the converter, looked at from outside: statistics and classes of every map."""
    folder = GOLDEN / name
    arguments = [str(folder / "config.json"), str(folder / "weights.safetensors"), str(tmp_path)]
    convert_vanilla_transformer.main(arguments)
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, attn_implementation=kernel)
    tensors = load_file(folder / "io.safetensors")
    batch = {
        "input_ids": tensors["src"],
        "attention_mask": (tensors["src"] != 0).long(),
        "decoder_input_ids": tensors["tgt_in"],
        "decoder_attention_mask": (tensors["tgt_in"] != 0).long(),
    }
    found = TransformerAnalyzer(model).analyze_attention_patterns(batch)
    assert found["not_reproduced"] == {}
    for key, wanted in json.loads((folder / "attention_stats.json").read_text()).items():
        _, side, layer, kind = key.split(".")
        ours = found["modules"][f"{side}.layers.{layer}.{kind}_attn"]
        assert ours["rows"] == wanted["rows_used"]
        assert ours["normalised_entropy"] == pytest.approx(wanted["entropy_norm"], abs=1e-5)
        for name in ("mean_distance", "relative_distance", "confidence", "effective_keys"):
            assert ours[name] == pytest.approx(wanted[name], abs=2e-5), (key, name)
        assert ours["class"] == wanted["class"]


KINDS = ("pre_norm", "connection", "gpt2", "llama", "gpt_neox", "bart", "t5")


@pytest.mark.parametrize(("name", "kernel"), [(n, k) for n in KINDS for k in ("eager", "sdpa")] + [("gemma2", "eager")])
def test_weights_are_those_of_the_model(name, kernel):
    """The first example's weights, padding cut, against what the model itself returns under its eager kernel."""
    model = make_model(name, kernel)
    batch = make_batch(model)
    structure = Structure(model)
    recorder = Recorder(structure, Wanted(set(structure.names), attention=True, maps=True), checked := {})
    with torch.no_grad(), recorder:
        model(**batch)
    assert checked == dict.fromkeys(structure.attentions)
    written_out = make_model(name, "eager")
    written_out.set_attn_implementation("eager")
    written_out.load_state_dict(model.state_dict())
    with torch.no_grad():
        outputs = written_out(**batch, output_attentions=True)
    if model.config.is_encoder_decoder:
        sides = {"decoder": outputs.decoder_attentions, "cross": outputs.cross_attentions}
        if name != "connection":
            sides["encoder"] = outputs.encoder_attentions
    else:
        sides = {"decoder": outputs.attentions}
    wanted = [weights[0] for kind in sides.values() for weights in kind]
    assert len(recorder.maps) == len(wanted)
    for map_name, found in recorder.maps.items():
        same = [
            other[: found.shape[0], : found.shape[1], : found.shape[2]]
            for other in wanted
            if all(one >= two for one, two in zip(other.shape, found.shape, strict=True))
        ]
        assert any(torch.allclose(found, other, atol=1e-5) for other in same), map_name


def test_in_context_models_are_reproduced():
    config = InContextTransformerConfig(n_dims=3, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    model = InContextTransformerForPrediction(config).eval()
    values = torch.randn(2, 6, 3)
    found = TransformerAnalyzer(model).analyze_attention_patterns(
        {"input_values": values, "context_values": torch.randn(2, 6)}
    )
    assert found["not_reproduced"] == {}
    assert len(found["modules"]) == 2
    assert all(len(summary["class"]) == 2 for summary in found["modules"].values())


def test_eager_and_sdpa_agree():
    found = {}
    for kernel in ("eager", "sdpa"):
        model = make_model("post_norm", kernel)
        found[kernel] = TransformerAnalyzer(model).comprehensive_analysis(make_batch(model))
        assert found[kernel]["model"]["kernel"] == kernel
    for section in ("attention", "states", "activations", "residual", "gradients"):
        assert_close(found["eager"][section], found["sdpa"][section])


def assert_close(one, other, tolerance=1e-5):
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one.keys() - {"zeros"}:  # whether a gradient of 1e-10 is 0 is a matter of rounding
            assert_close(one[key], other[key], tolerance)
    elif isinstance(one, list):
        for pair in zip(one, other, strict=True):
            assert_close(*pair, tolerance)
    elif isinstance(one, float):
        assert one == pytest.approx(other, abs=tolerance, rel=tolerance)
    else:
        assert one == other


def test_padding_changes_nothing():
    """The same examples with more padding, on either side of the source."""
    model = make_model("post_norm")
    batch = make_batch(model)
    wider = {
        "input_ids": torch.nn.functional.pad(batch["input_ids"], (4, 3)),
        "attention_mask": torch.nn.functional.pad(batch["attention_mask"], (4, 3)),
        "labels": torch.nn.functional.pad(batch["labels"], (0, 5), value=-100),
    }
    one, other = (TransformerAnalyzer(model).comprehensive_analysis(b) for b in (batch, wider))
    for section in ("attention", "states", "residual"):
        assert_close(one[section], other[section])


def test_attention_outside_the_interface_is_named():
    model = make_model("bloom")
    found = TransformerAnalyzer(model).analyze_attention_patterns(make_batch(model))
    assert found["modules"] == {}
    assert set(found["not_reproduced"]) == {"h.0.self_attention", "h.1.self_attention"}
    assert "library's interface" in found["not_reproduced"]["h.0.self_attention"]


def test_a_kernel_that_does_something_else_is_named(monkeypatch):
    """Scores with a bias of its own: no map is shown rather than a wrong one."""

    def biased(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
        scores = query @ key.transpose(-1, -2) * scaling + torch.arange(key.shape[2])
        return (scores.softmax(-1) @ value).transpose(1, 2), None

    monkeypatch.setitem(AttentionInterface._global_mapping, "biased", biased)
    model = make_model("gpt2")
    model.config._attn_implementation = "biased"
    found = TransformerAnalyzer(model).analyze_attention_patterns(make_batch(model))
    assert found["modules"] == {}
    assert "differ from the kernel's result" in found["not_reproduced"]["h.0.attn"]


def call_with(mask, kernel="sdpa", queries=3, keys=3, **options):
    """A call of two examples and two heads, of which only mask and kernel matter."""
    query, key = torch.zeros(2, 2, queries, 4), torch.zeros(2, 2, keys, 4)
    return AttentionCall("a", torch.nn.Module(), query, key, key, mask, kernel, options, query, lambda *args: None)


def test_what_a_kernel_lets_a_query_see():
    """The forms of masks that kernels take, among them those that only run on a GPU."""
    lower = torch.ones(3, 3).tril().bool()
    assert call_with(None, is_causal=True).visible(1)[0].equal(lower)
    assert call_with(None, kernel="eager", is_causal=True).visible(1).all(), "it takes a mask and no flag"
    # Flash attention aligns the last query with the last key, and its window reaches back from there.
    flash = {"kernel": "flash_attention_2", "is_causal": True}
    assert call_with(None, queries=2, **flash).visible(1)[0].int().tolist() == [[1, 1, 0], [1, 1, 1]]
    window = call_with(None, sliding_window=2, **flash).visible(1)[0].int().tolist()
    assert window == [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    padding = torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert call_with(padding, **flash).visible(2)[0].int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 0]]
    additive = torch.zeros(2, 1, 3, 3).masked_fill(~lower, torch.finfo(torch.float32).min)
    assert call_with(additive).visible(2)[1].equal(lower)
    for unknown in (
        object(),  # a block mask
        padding,  # of a kernel that is not known to take such a one
        lower,
        torch.zeros(2, 1, 5, 3),
        torch.stack([lower, ~lower]).expand(2, 2, 3, 3),  # heads that see different keys
    ):
        if isinstance(unknown, torch.Tensor) and unknown is lower:
            unknown = lower[None]
        assert call_with(unknown).visible(2) is None


def test_other_models_and_later_calls_are_left_alone():
    original = AttentionInterface.get_interface
    model, other = make_model("gpt2"), make_model("llama")
    with InternalsTracker(model) as tracker, tracker.step(1):
        assert AttentionInterface.get_interface is not original
        other(**make_batch(other))
        model(**make_batch(model)).loss.backward()
    assert AttentionInterface.get_interface is original
    assert "get_interface" not in vars(ALL_ATTENTION_FUNCTIONS)
    assert set(tracker.records[0]["attention"]) == {"h.0.attn", "h.1.attn"}


def test_names():
    structure = Structure(make_model("post_norm"))
    assert structure.select("decoder.*") == {name for name in structure.names if name.startswith("decoder.")}
    assert structure.select("model.decoder.layers.0") == {"decoder.layers.0"}
    assert structure.select(["*.self_attn", "encoder.layers.1"]) == {
        *(name for name in structure.names if name.endswith(".self_attn")),
        "encoder.layers.1",
    }
    assert structure.select(lambda name: name.endswith("cross_attn")) == {
        "decoder.layers.0.cross_attn",
        "decoder.layers.1.cross_attn",
    }
    with pytest.raises(UserError, match=r"'decodr\.\*' matches no module; did you mean 'decoder"):
        structure.select("decodr.*")
    with pytest.raises(UserError, match=r"'encoder\.layers\.0\.self_att' .* did you mean 'encoder.layers.0.self_attn'"):
        structure.select("encoder.layers.0.self_att")
    with pytest.raises(UserError, match="the filter matches none of"):
        structure.select(lambda name: False)


def test_a_model_without_attention_is_refused():
    class Plain(PreTrainedModel):
        config_class = BertConfig

        def __init__(self, config):
            super().__init__(config)
            self.linear = torch.nn.Linear(4, 4)
            self.post_init()

    with pytest.raises(UserError, match="Plain has no attention modules"):
        TransformerAnalyzer(Plain(BertConfig()))


def test_a_compiled_model_is_refused():
    with pytest.raises(UserError, match="compiled"):
        InternalsTracker(torch.compile(make_model("gpt2")))


def test_texts_that_cannot_be_read(tmp_path):
    from trainers.tasks.tokenization import word_level

    analyzer = TransformerAnalyzer(make_model("post_norm"), word_level(["a", "b"], 32))
    batch = analyzer.encode(["a b a", "b"], ["b", "a a"])
    assert batch["attention_mask"].sum(1).tolist() == [4, 2]
    assert (batch["labels"] == -100).sum().item() == 1
    with pytest.raises(UserError, match="text 2 is empty"):
        analyzer.encode(["a", "  "])
    with pytest.raises(UserError, match="text 1 has 41 tokens, but the model has 32 positions"):
        analyzer.encode(["a " * 40])
    with pytest.raises(UserError, match="tokenizer"):
        TransformerAnalyzer(make_model("post_norm")).encode(["a"])


def test_low_rank_in_context_model_is_reproduced_and_its_shrinking_stream_is_named():
    """Blocks stand in the batch dimension of its local attention; only key tokens live on after it."""
    config = LowRankInContextTransformerConfig(hidden_size=16, num_attention_heads=2, num_blocks=6)
    model = LowRankInContextTransformerForSequenceClassification(config).eval()
    values = torch.randn(2, config.sequence_length, config.n_dims)
    found = TransformerAnalyzer(model).comprehensive_analysis({"input_values": values})
    assert found["not_reproduced"] == {}
    assert set(found["attention"]["modules"]) == set(Structure(model).attentions)
    (stream,) = found["residual"].values()
    assert "does not return states of the shape it takes" in stream["problem"]


def test_bert_blocks_do_not_add_up_and_say_so():
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=40)
    model = BertModel(config).eval()
    report = TransformerAnalyzer(model).comprehensive_analysis({"input_ids": torch.arange(12).reshape(2, 6)})
    assert report["not_reproduced"] == {}
    assert "does not add up" in report["residual"]["encoder.layer"]["problem"]
    assert report["gradients"] is None
