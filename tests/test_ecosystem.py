"""
What the libraries do with any model they do with ours: adapters from the first step to the Hub and back, pipelines,
weights of 8 bits, and the options of `generate`. Compilation and export are tested with each architecture.
"""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    StoppingCriteria,
    StoppingCriteriaList,
    TorchAoConfig,
    pipeline,
    set_seed,
)

from tests import hub_server, skips
from tests.benchmarks.bench_memory import CASES, make_batch, make_model
from tests.hf_models.test_text_to_text_pipeline import TEXTS, tokenizer

hub = hub_server.hub
ROOT = Path(__file__).resolve().parents[1]
WIDE = {"hidden_size": 64}
TICKS = {"iterations": 4, "d_model": 64, "d_input": 32}
SMALL = {
    "vanilla_transformer": {**WIDE, "num_hidden_layers": 1, "num_decoder_layers": 1, "intermediate_size": 128},
    "connection_transformer": {**WIDE, "num_decoder_layers": 1, "num_slots": 16},
    "continuous_thought_machine": TICKS,
    "hyper_continuous_thought_machine": TICKS,
    "in_context_transformer": {**WIDE, "num_hidden_layers": 2},
    "low_rank_in_context_transformer": {**WIDE, "num_hidden_layers": 3},
}
GENERATING = ("vanilla_transformer", "connection_transformer")


def test_every_architecture_is_here():
    assert SMALL.keys() == CASES.keys()


def small_batch(name: str) -> dict[str, torch.Tensor]:
    return {key: value[:2] for key, value in make_batch(name).items()}


def adapt(name: str, folder: Path) -> None:
    """From a model on the Hub to an adapter on the Hub, and from both to a model that needs no peft."""
    auto_class, batch = CASES[name][0], small_batch(name)
    make_model(name, **SMALL[name]).push_to_hub(f"ada/{name}")
    set_seed(0)
    base = auto_class.from_pretrained(f"ada/{name}")
    adapted = get_peft_model(base, LoraConfig(r=2, lora_dropout=0.0, target_modules="all-linear")).train()
    trained = {key: value for key, value in adapted.named_parameters() if value.requires_grad}
    assert trained
    assert all("lora_" in key for key in trained)
    optimizer, losses = torch.optim.AdamW(trained.values(), lr=1e-2), []
    for _ in range(6):
        loss = adapted(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]

    adapted.eval().push_to_hub(f"ada/{name}-adapter")
    loaded = PeftModel.from_pretrained(auto_class.from_pretrained(f"ada/{name}"), f"ada/{name}-adapter").eval()
    with torch.no_grad():
        expected = adapted(**batch).logits
        assert torch.equal(loaded(**batch).logits, expected)
        loaded.merge_and_unload().save_pretrained(folder / name)
        merged = auto_class.from_pretrained(folder / name).eval()
        # The merged weight is rounded once more.
        torch.testing.assert_close(merged(**batch).logits, expected, rtol=1e-4, atol=1e-4)
    print("merged", name)


def test_adapters_are_trained_pushed_loaded_and_merged(hub, tmp_path):
    """For every architecture, by the unmodified client in a process whose Hub is the server."""
    child = subprocess.run(
        [sys.executable, "-c", f"from {__name__} import *\nfor name in SMALL: adapt(name, Path.cwd())"],
        cwd=tmp_path,
        env=hub.environment(tmp_path / "home", token=hub.user.token, PYTHONPATH=str(ROOT)),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr[-3000:]
    assert re.findall(r"^merged (.*)", child.stdout, re.MULTILINE) == list(SMALL)
    for name in SMALL:
        files = hub.files(f"ada/{name}-adapter")
        assert {"adapter_config.json", "adapter_model.safetensors"} <= files.keys()
        assert "model.safetensors" not in files
        assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == f"ada/{name}"


@pytest.mark.parametrize("name", GENERATING)
def test_classifier_answers_in_a_pipeline(name, tmp_path):
    """Rows of unequal length come together in a batch; the library pads them."""
    words = tokenizer()
    labels = {0: "no", 1: "yes", 2: "open"}
    config = make_model(name, **SMALL[name]).config
    config.update({"vocab_size": len(words), "id2label": labels, "label2id": {v: k for k, v in labels.items()}})
    set_seed(0)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    model.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    answers = pipeline("text-classification", model=str(tmp_path), top_k=None)(TEXTS, batch_size=3)
    for text, found in zip(TEXTS, answers, strict=True):
        with torch.no_grad():
            chances = model(torch.tensor([words(text)["input_ids"]])).logits[0].softmax(-1)
        expected = {labels[index]: chance for index, chance in enumerate(chances.tolist())}
        assert {entry["label"]: entry["score"] for entry in found} == pytest.approx(expected, abs=1e-5)


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason=skips.NO_TORCHAO)
@pytest.mark.parametrize("name", SMALL)
def test_loads_with_weights_of_8_bits(name, tmp_path):
    """The linear maps hold whole numbers, the outputs stay near, and the model can be saved and loaded as it is."""
    from torchao.quantization import Int8WeightOnlyConfig

    model = make_model(name, **SMALL[name]).eval()
    model.save_pretrained(tmp_path / "float32")
    batch = small_batch(name)
    options = {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig())}
    quantised = CASES[name][0].from_pretrained(tmp_path / "float32", **options)
    linear = [module for module in quantised.modules() if type(module) is torch.nn.Linear]
    held = [module for module in linear if "Int8" in type(module.weight).__name__]
    assert len(held) >= len(linear) - 1 > 1  # the library leaves an output layer as it is
    with torch.no_grad():
        exact, near = model(**batch).logits, quantised(**batch).logits
        assert not torch.equal(near, exact)
        torch.testing.assert_close(near, exact, rtol=0, atol=0.05 * exact.abs().max().item())
        quantised.save_pretrained(tmp_path / "int8")
        again = CASES[name][0].from_pretrained(tmp_path / "int8")
        torch.testing.assert_close(again(**batch).logits, near)
        if quantised.can_generate():
            assert quantised.generate(batch["input_ids"], max_new_tokens=3, min_new_tokens=3).shape == (2, 4)


@pytest.fixture(scope="module", params=GENERATING)
def writer(request):
    """A model that writes text, and what it reads."""
    return make_model(request.param, **SMALL[request.param]).eval(), make_batch(request.param)["input_ids"][:2, :12]


def score(model, source: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probability of every written sequence after its first token."""
    with torch.no_grad():
        logits = model(source, decoder_input_ids=tokens[:, :-1]).logits
    return logits.log_softmax(-1).gather(-1, tokens[:, 1:, None]).sum((1, 2))


def test_beams_find_no_less_likely_answer(writer):
    model, source = writer
    length = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    greedy = model.generate(source, num_beams=1, **length)
    beams = model.generate(source, num_beams=4, length_penalty=0.0, **length)
    assert (score(model, source, beams) >= score(model, source, greedy) - 1e-4).all()


def test_sampling_follows_its_seed_and_its_options(writer):
    model, source = writer
    length = {"max_new_tokens": 6, "min_new_tokens": 6}

    def sample(seed: int, **options) -> torch.Tensor:
        set_seed(seed)
        return model.generate(source, do_sample=True, **length, **options)

    assert torch.equal(sample(1), sample(1))
    assert not torch.equal(sample(1), sample(2))
    greedy = model.generate(source, do_sample=False, **length)
    assert torch.equal(sample(1, top_k=1), greedy)
    assert torch.equal(sample(1, top_p=1e-6), greedy)


class AfterThree(StoppingCriteria):
    """Ends every sequence once it has three tokens."""

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= 3)


def test_generation_stops_as_asked(writer):
    model, source = writer
    whole = model.generate(source, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert whole.shape[1] == 9
    stopped = model.generate(source, max_new_tokens=8, stopping_criteria=StoppingCriteriaList([AfterThree()]))
    assert torch.equal(stopped, whole[:, :3])
    # The token that comes third ends the first sequence, as if it were the end of text.
    end = whole[0, 3].item()
    place = whole[0].tolist().index(end, 1)
    ended = model.generate(source[:1], max_new_tokens=8, do_sample=False, eos_token_id=[end])
    assert torch.equal(ended, whole[:1, : place + 1])
    assert model.generate(source, max_length=4, do_sample=False).shape[1] <= 4
