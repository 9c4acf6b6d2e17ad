"""One way to load a model: each kind of folder, the class that was saved, and every mistake in one line."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTimeSeriesPrediction,
    PreTrainedConfig,
    set_seed,
)

from trainers.errors import UserError
from trainers.loading import language_model_class, load_model, saved_class
from trainers.tasks.tokenization import word_level

IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
VANILLA = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 9,
}
CLASSES = {
    "gpt2": (AutoModelForCausalLM, {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 9}),
    "bert": (AutoModelForSequenceClassification, VANILLA),
    "vanilla_transformer": (AutoModelForSeq2SeqLM, VANILLA),
    "connection_transformer": (
        AutoModelForSequenceClassification,
        {"hidden_size": 16, "num_slots": 4, "connection_rank": 2, "num_attention_heads": 2, "vocab_size": 9},
    ),
    "in_context_transformer": (
        AutoModelForTimeSeriesPrediction,
        {"n_dims": 3, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    ),
    "hyper_continuous_thought_machine": (
        AutoModel,
        {"iterations": 2, "d_model": 16, "d_input": 8, "heads": 2, "n_synch_out": 4, "n_synch_action": 4}
        | {"synapse_depth": 2, "memory_length": 3, "memory_hidden_dims": 4, "out_dims": 5, "num_labels": 5},
    ),
}


def save(folder: Path, model_type: str, tokenizer: bool = False) -> torch.nn.Module:
    auto_class, settings = CLASSES[model_type]
    ids = IDS if "vocab_size" in settings else {}
    set_seed(0)
    model = auto_class.from_config(AutoConfig.for_model(model_type, **settings, **ids))
    model.save_pretrained(folder)
    if tokenizer:
        word_level(["a", "b", "c", "d", "e"], 16).save_pretrained(folder)
    return model


@pytest.mark.parametrize("model_type", CLASSES)
def test_the_saved_class_is_loaded(model_type, tmp_path):
    saved = save(tmp_path, model_type)
    model, tokenizer = load_model(str(tmp_path), needs_tokenizer=False, device="cpu")
    assert type(model) is type(saved)
    assert tokenizer is None
    assert not model.training
    for name, value in saved.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_options(tmp_path):
    save(tmp_path, "vanilla_transformer", tokenizer=True)
    model, tokenizer = load_model(str(tmp_path), dtype=torch.float64, attn_implementation="eager", device="cpu")
    assert (model.dtype, model.config._attn_implementation) == (torch.float64, "eager")
    assert tokenizer("a b")["input_ids"] == [4, 5, 2]
    new_head = {"auto_class": AutoModelForSequenceClassification, "device": "cpu"}
    encoder, _ = load_model(str(tmp_path), may_lack=lambda name: name.startswith("classifier."), **new_head)
    assert type(encoder).__name__ == "VanillaTransformerForSequenceClassification"
    model, _ = load_model(str(tmp_path), auto_class=language_model_class, device="cpu")
    assert type(model).__name__ == "VanillaTransformerForConditionalGeneration"


def test_weights_without_a_tensor_are_refused(tmp_path):
    """Random values in its place would be scored, traced and analysed like learned ones."""
    save(tmp_path, "vanilla_transformer")
    weights = load_file(tmp_path / "model.safetensors")
    first, second = sorted(weights)[:2]
    lacking = {name: value for name, value in weights.items() if name not in (first, second)}
    save_file(lacking, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError) as caught:
        load_model(str(tmp_path), needs_tokenizer=False, device="cpu")
    assert str(caught.value) == (
        f"model: the weights of {str(tmp_path)!r} lack {first} and 1 more, which a "
        "VanillaTransformerForConditionalGeneration has; random values would stand in for them"
    )
    with pytest.raises(UserError, match=f"lack {second}, which"):
        load_model(str(tmp_path), needs_tokenizer=False, device="cpu", may_lack=lambda name: name == first)


def test_a_configuration_without_a_known_class():
    assert saved_class(AutoConfig.for_model("gpt2")) is AutoModel
    assert saved_class(AutoConfig.for_model("gpt2", architectures=["SomebodyElses"])) is AutoModel
    remote = AutoConfig.for_model("gpt2", architectures=["New"], auto_map={"AutoModelForCausalLM": "modeling.New"})
    assert saved_class(remote) is AutoModelForCausalLM


def test_mistakes(tmp_path):
    save(tmp_path / "run", "vanilla_transformer")
    (tmp_path / "empty").mkdir()
    (tmp_path / "unfinished").mkdir()
    shutil.copytree(tmp_path / "run", tmp_path / "unfinished" / "checkpoint-5")
    shutil.copytree(tmp_path / "run", tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"nothing")
    shutil.copytree(tmp_path / "run", tmp_path / "strange")
    (tmp_path / "strange" / "config.json").write_text(json.dumps({"model_type": "unheard_of"}))
    shutil.copytree(tmp_path / "run", tmp_path / "tokens")
    (tmp_path / "tokens" / "tokenizer.json").write_text("{}")
    for name, message in {
        "": "model: the name is empty",
        "no-such/model": "model: cannot load 'no-such/model': there is no such folder, and as a Hub id:",
        "none.gguf": "model: none.gguf does not exist",
        str(tmp_path / "empty"): "the folder holds no config.json",
        str(tmp_path / "unfinished"): "no config.json; its last checkpoint is",
        str(tmp_path / "broken"): "model: cannot load",
        str(tmp_path / "strange"): "unheard_of",
        str(tmp_path / "tokens"): "model: cannot load the tokenizer of",
    }.items():
        with pytest.raises(UserError) as raised:
            load_model(name, needs_tokenizer=False, device="cpu")
        assert message in str(raised.value), name
        assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match="--model: cannot load the tokenizer"):
        load_model(str(tmp_path / "run"), option="--model", device="cpu")
    with pytest.raises(UserError, match="--device: cannot put the model on xla"):
        load_model(str(tmp_path / "run"), needs_tokenizer=False, device="xla")


def test_code_of_a_repository_runs_only_when_trusted(tmp_path):
    folder = tmp_path / "own"
    save(folder, "vanilla_transformer", tokenizer=True)
    config = json.loads((folder / "config.json").read_text())
    # Under another name the package does not know the model, so that its code is needed.
    path = folder / "configuration_vanilla_transformer.py"
    path.write_text(path.read_text().replace('model_type = "vanilla_transformer"', 'model_type = "other"'))
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "other"}))
    with pytest.raises(UserError, match=r"it brings code of its own, which runs only with trust_remote_code$"):
        load_model(str(folder), device="cpu")
    model, tokenizer = load_model(str(folder), trust_remote_code=True, device="cpu")
    assert type(model).__name__ == "VanillaTransformerForConditionalGeneration"
    assert type(model).__module__.startswith("transformers_modules.")
    assert len(tokenizer) == 9


def test_a_hub_id_is_asked_for_at_its_revision(monkeypatch):
    asked = []

    def refuse(name, **options):
        asked.append((name, options))
        raise OSError("not there\nat all")

    monkeypatch.setattr(AutoConfig, "from_pretrained", refuse)
    with pytest.raises(UserError, match=r"^model: cannot load 'ann/model': .*as a Hub id: not there at all$"):
        load_model("ann/model", revision="v1")
    assert asked == [("ann/model", {"revision": "v1", "trust_remote_code": False})]


def test_code_of_the_hub_runs_at_a_named_revision_only(monkeypatch, capsys):
    def found(name, **options):
        return {"model_type": "gpt2", "_commit_hash": "0123abc"}, {}

    def refuse(name, **options):
        shown.append(capsys.readouterr().err)  # by now, before any of the code runs
        raise OSError("no network")

    monkeypatch.setattr(PreTrainedConfig, "get_config_dict", found)
    monkeypatch.setattr(AutoConfig, "from_pretrained", refuse)
    shown = []
    with pytest.raises(UserError, match=r"^--model: trust_remote_code runs the code that 'ann/model' brings; name the"):
        load_model("ann/model", trust_remote_code=True, option="--model")
    assert capsys.readouterr().err == ""
    for revision, place in (("v1", "v1 (commit 0123abc)"), ("0123abc", "0123abc")):
        with pytest.raises(UserError, match="no network"):
            load_model("ann/model", trust_remote_code=True, revision=revision)
        assert shown.pop() == f"model: code of ann/model may run, at revision {place}\n"


def test_a_map_of_devices(tmp_path, monkeypatch):
    save(tmp_path, "gpt2")
    asked = []
    plain = AutoModelForCausalLM.from_pretrained

    def spy(name, **options):
        asked.append(options["device_map"])
        return plain(name, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", spy)
    monkeypatch.setattr(torch.nn.Module, "to", None)  # a model that is spread must not be moved
    model, _ = load_model(str(tmp_path), auto_class=AutoModelForCausalLM, device_map={"": "cpu"}, needs_tokenizer=False)
    assert asked == [{"": "cpu"}]
    assert not model.training


def test_home_folders_are_understood(tmp_path, monkeypatch):
    save(tmp_path / "run", "vanilla_transformer", tokenizer=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert os.path.expanduser("~") == str(tmp_path)
    assert len(load_model("~/run", device="cpu")[1]) == 9


def test_the_baselines_of_the_machines_are_known(tmp_path):
    """In a new process, which has trained none of them."""
    config = AutoConfig.for_model("thought_lstm", width=8, iterations=2, d_model=8, d_input=8, heads=2, num_labels=4)
    AutoModel.from_config(config).save_pretrained(tmp_path)
    code = "import sys; from trainers.loading import load_model; "
    code += "print(type(load_model(sys.argv[1], needs_tokenizer=False)[0]).__name__)"
    root = Path(__file__).resolve().parents[2]
    child = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=root, capture_output=True, text=True)
    assert child.stdout.split() == ["ThoughtLSTMModel"], child.stderr
