"""`python -m trainers.evaluate`: runs and foreign models, batches, interruption, limits, results and card."""

import json
import shutil

import datasets
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from tokenizers import processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
    set_seed,
)

from tests.trainers.tasks.tools import DATA, make_task
from trainers import evaluate
from trainers.evaluate import Generator, main, make_plan, parse
from trainers.tasks.tokenization import byte_level_bpe
from trainers.train import main as train

ROOT = DATA.parents[1]
TASK = ["--task", "strategyqa", "--data_dir", str(DATA / "strategyqa")]


def text_tokenizer(ends_with_eos: bool, max_length: int):
    tokenizer = byte_level_bpe([e.prompt for e in make_task("strategyqa").rows("train")], 300, max_length)
    if not ends_with_eos:
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel()
    return tokenizer


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folder of each model: a run of this package, and small models of the library."""
    folder = tmp_path_factory.mktemp("models")
    recipe = ROOT / "recipes" / "connection_transformer" / "strategyqa" / "smoke.yaml"
    data = str(DATA / "strategyqa")
    options = ["--max_steps", "2", "--disable_tqdm", "--num_beams", "2", "--confidence", "0.9"]
    assert train([str(recipe), "--data_dir", data, "--output_dir", str(folder / "run"), *options]) == 0
    set_seed(0)
    tokenizer = text_tokenizer(True, 512)
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    size = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=len(tokenizer), decoder_start_token_id=0, **size, **ids))
    t5.save_pretrained(folder / "t5")
    tokenizer.save_pretrained(folder / "t5")
    plain = text_tokenizer(False, 10**30)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=len(plain), n_positions=256, n_embd=16, n_layer=1, n_head=2, **ids))
    gpt2.save_pretrained(folder / "gpt2")
    plain.save_pretrained(folder / "gpt2")
    bert = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), **bert)).save_pretrained(folder / "bert")
    tokenizer.save_pretrained(folder / "bert")
    return folder


def results(folder):
    lines = (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8")), [json.loads(line) for line in lines]


def error_of(capsys, *words) -> str:
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0].removeprefix("error: ")


def generator_of(*words) -> Generator:
    plan = make_plan(*parse([str(word) for word in words]))
    model, tokenizer = evaluate.load_model(plan.arguments.model)
    return Generator(model, tokenizer, plan.task, plan, several_lines=False)


def test_a_run_gives_again_what_its_training_reported(models, capsys):
    run = models / "run"
    assert main([str(run), "--data_dir", str(DATA / "strategyqa"), "--batch_size", "5"]) == 0
    assert "trivial = always" in capsys.readouterr().out
    metrics, _ = results(run / "evaluations" / "strategyqa-test")
    assert metrics["test"] == json.loads((run / "metrics.json").read_text())["test"]
    assert metrics["test"]["accuracy"]["confidence"] == 0.9
    assert metrics["generation"]["num_beams"] == 2
    again = run / "evaluations" / "strategyqa-test" / "predictions.jsonl"
    assert again.read_bytes() == (run / "predictions.jsonl").read_bytes()


@pytest.mark.parametrize("name", ["t5", "gpt2"])
def test_foreign_models(models, tmp_path, name):
    assert main([str(models / name), *TASK, "--output_dir", str(tmp_path / "out"), "--batch_size", "4"]) == 0
    metrics, records = results(tmp_path / "out")
    task = make_task("strategyqa")
    assert [record["id"] for record in records] == [example.id for example in task.rows("test")]
    assert metrics["test"]["n"] == 12
    assert metrics["test"]["mean_steps"] is None
    assert metrics["model"]["architecture"] in ("T5ForConditionalGeneration", "GPT2LMHeadModel")
    assert metrics["test"]["trivial"]["accuracy"]["value"] == pytest.approx(8 / 12)


def test_a_configuration_that_names_no_class_is_of_a_model_that_writes(models, tmp_path):
    """As a GGUF file's."""
    folder = shutil.copytree(models / "gpt2", tmp_path / "gpt2")
    config = json.loads((folder / "config.json").read_text())
    del config["architectures"]
    (folder / "config.json").write_text(json.dumps(config))
    assert main([str(folder), *TASK, "--limit", "2", "--output_dir", str(tmp_path / "out")]) == 0
    assert results(tmp_path / "out")[0]["model"]["architecture"] == "GPT2LMHeadModel"


@pytest.mark.parametrize("name", ["run", "t5", "gpt2"])
def test_an_answer_does_not_depend_on_its_batch(models, name):
    generator = generator_of(models / name, *TASK, "--max_new_tokens", 6)
    inputs = [generator.encode(example)[0] for example in generator.task.rows("test")[:5]]
    assert len({len(tokens) for tokens in inputs}) > 1
    together, steps = generator.answer(inputs)
    apart = [generator.answer([tokens]) for tokens in inputs]
    assert together == [texts[0] for texts, _ in apart]
    assert steps == [used[0] for _, used in apart]
    assert (steps[0] > 0) == (name == "run")


def test_generation_is_the_librarys_own(models):
    """Against `generate` on a single prompt, without encoder outputs, masks and padding of our own."""
    for name in ("t5", "gpt2"):
        generator = generator_of(models / name, *TASK, "--max_new_tokens", 6, "--stop", "")
        example = generator.task.rows("test")[0]
        tokens = generator.encode(example)[0]
        written = generator.model.generate(torch.tensor([tokens]), max_new_tokens=6, do_sample=False)
        start = 1 if name == "t5" else len(tokens)
        text = generator.tokenizer.decode(written[0, start:], skip_special_tokens=True).strip()
        assert generator.answer([tokens])[0] == [text]


def test_an_interrupted_evaluation_goes_on_to_the_same_result(models, tmp_path, monkeypatch, capsys):
    command = [str(models / "gpt2"), *TASK, "--batch_size", "3", "--max_new_tokens", "8"]
    assert main([*command, "--output_dir", str(tmp_path / "straight")]) == 0
    answer, calls = Generator.answer, []

    def killed(self, inputs):
        calls.append(len(inputs))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return answer(self, inputs)

    monkeypatch.setattr(Generator, "answer", killed)
    folder = tmp_path / "broken"
    assert main([*command, "--output_dir", str(folder)]) == 130
    assert "the same command goes on" in capsys.readouterr().err
    partial = folder / "predictions.partial.jsonl"
    assert len(partial.read_text().splitlines()) == 2
    assert not (folder / "metrics.json").exists()
    with partial.open("a") as file:
        file.write('{"batch": 2, "answers": [["torn by the k')
    assert main([*command, "--output_dir", str(folder)]) == 0
    assert calls == [3, 3, 3, 3, 3]
    assert not partial.exists()
    for name in ("predictions.jsonl", "metrics.json"):
        assert (folder / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()
    assert main([*command, "--output_dir", str(folder)]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert len(calls) == 5


def test_a_folder_is_continued_only_under_the_same_settings(models, tmp_path, capsys):
    command = [models / "gpt2", *TASK, "--limit", 2, "--max_new_tokens", 2]
    out = ["--output_dir", tmp_path / "out"]
    assert main([str(word) for word in (*command, *out)]) == 0
    message = error_of(capsys, *command, *out, "--num_beams", 2)
    assert "holds an evaluation with num_beams 1, and now it is 2; choose another folder, or --overwrite" in message
    assert main([str(word) for word in (*command, *out, "--num_beams", 2, "--overwrite")]) == 0
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").touch()
    assert "holds files that are no evaluation" in error_of(
        capsys, *command, "--output_dir", tmp_path / "other", "--overwrite"
    )
    assert (tmp_path / "other" / "thesis.txt").exists()


def test_limit_draws_the_recipes_own_subset(models, tmp_path):
    assert main([str(models / "t5"), *TASK, "--limit", "3", "--output_dir", str(tmp_path / "out")]) == 0
    metrics, records = results(tmp_path / "out")
    expected = make_task("strategyqa", max_test_samples=3).rows("test")
    assert [record["id"] for record in records] == [example.id for example in expected]
    assert metrics["data"]["examples"] == 3


def test_a_causal_model_gets_a_template_and_its_answer_is_cut(models):
    generator = generator_of(models / "gpt2", *TASK)
    tokens, cut = generator.encode(generator.task.rows("test")[0])
    assert generator.tokenizer.decode(tokens) == generator.task.rows("test")[0].prompt + "\nAnswer:"
    assert not cut
    assert generator.stop == "\n"
    generator = generator_of(models / "gpt2", *TASK, "--template", "Q: {prompt} {x}", "--stop", "\\n\\n")
    assert generator.tokenizer.decode(generator.encode(generator.task.rows("test")[0])[0]).endswith(" {x}")
    assert generator.stop == "\n\n"
    spoken = "No.\nQ: Why?"
    generator.model.generate = lambda **inputs: torch.cat(
        [inputs["input_ids"], torch.tensor([generator.tokenizer(spoken)["input_ids"]])], dim=1
    )
    assert generator.answer([tokens])[0] == [spoken]
    generator.stop = "\n"
    assert generator.answer([tokens])[0] == ["No."]


def test_prompts_longer_than_the_model_reads_lose_their_beginning(models, tmp_path, capsys):
    words = ["--task", "gsm8k", "--data_dir", str(DATA / "gsm8k"), "--max_new_tokens", "150"]
    generator = generator_of(models / "gpt2", *words)
    assert generator.source_limit == 256 - 150
    cut = 0
    for example in generator.task.rows("test"):
        tokens, was_cut = generator.encode(example)
        assert len(tokens) <= generator.source_limit
        text = generator.tokenizer.decode(tokens)
        assert text.endswith(example.prompt[-40:] + "\nAnswer:")
        assert was_cut == (text != example.prompt + "\nAnswer:")
        cut += was_cut
    assert cut > 0
    assert main([str(models / "gpt2"), *words, "--output_dir", str(tmp_path / "out"), "--limit", "4"]) == 0
    assert "prompts are longer than the 106 tokens read, and were cut" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        (["gpt2", *TASK, "--max_new_tokens", "255"], "--max_new_tokens: 255 leaves no room for a prompt in the 256"),
        (["run", *TASK, "--max_new_tokens", "64"], "--max_new_tokens: 64, but"),
        (["gpt2", *TASK, "--max_new_tokens", "250"], "the model reads at most 6 tokens here"),
        (["bert", *TASK], "a BertForSequenceClassification does not write text; this command needs one"),
        (["t5", *TASK, "--max_reasoning_steps", "3"], "--max_reasoning_steps: a t5 has no reasoning steps"),
        (["t5"], "--task is missing, and the model is no run of a task"),
        (["t5", "--task", "gsm8"], "task.name: unknown task 'gsm8'; did you mean 'gsm8k'?"),
        (["t5", *TASK, "--limits", "3"], "unknown option '--limits'; did you mean '--limit'?"),
        (["t5", *TASK, "--limit", "0"], "--limit is 0; it must be at least 1"),
        (["t5", *TASK, "--confidence", "1"], "--confidence is 1; it must lie between 0 and 1"),
        (["t5", *TASK, "--limit", "many"], "--limit: expected int"),
        (["t5", *TASK, "--template", "Question:"], "it must hold {prompt} once"),
        (["t5", *TASK, "--split", "dev"], "--split: 'dev' is not one of train, validation, test"),
        (["t5", *TASK, "--options", "{target: answer}"], "task.options: unknown option 'target'"),
        (["t5", *TASK, "--write_card"], "holds no README.md"),
        (
            ["run", *TASK, "--write_card", "--split", "validation"],
            "--write_card is for results on the whole test split",
        ),
        (["run", *TASK, "--write_card", "--limit", "3"], "on the whole test split, and --limit is 3"),
        (["t5", "--task", "gsm8k", "--data_dir", str(DATA / "arc")], "the test split of gsm8k needs test.jsonl"),
        (["nowhere", *TASK], "cannot load"),
    ],
)
def test_mistakes_are_one_line(models, tmp_path, capsys, words, rule):
    message = error_of(capsys, models / words[0], *words[1:], "--output_dir", tmp_path / "out")
    assert rule in message
    assert not (tmp_path / "out").exists()


def test_python_files_that_a_record_names_are_not_run_unasked(tmp_path, capsys):
    file, run = tmp_path / "task.py", tmp_path / "run"
    file.write_text(f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n")
    run.mkdir()
    mixture = {"name": "mixture", "options": {"components": [{"name": str(file)}, {"name": "gsm8k"}]}}
    for task, option in (({"name": str(file)}, "--task"), (mixture, "--options")):
        record = {"task": task, "provenance": {"data_fingerprint": ""}}
        (run / "recipe.yaml").write_text(yaml.safe_dump(record))
        assert f"{option} is missing: the run's task is the Python file {file}" in error_of(capsys, run)
        assert not (tmp_path / "ran").exists()
    assert "must define one task" in error_of(capsys, run, "--task", file)
    assert (tmp_path / "ran").exists()


def test_without_a_training_split_there_is_no_trivial_predictor(models, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "test.jsonl").write_text('{"question": "Is it?", "answer": true}\n')
    words = ["--task", "strategyqa", "--data_dir", str(tmp_path / "data"), "--output_dir", str(tmp_path / "out")]
    assert main([str(models / "t5"), *words]) == 0
    assert "no trivial predictor without a training split" in capsys.readouterr().out
    assert results(tmp_path / "out")[0]["test"]["trivial"] is None


def test_a_metric_of_degrees(models, tmp_path, capsys):
    words = ["--task", "commongen", "--data_dir", str(DATA / "commongen"), "--output_dir", str(tmp_path / "out")]
    assert main([str(models / "t5"), *words]) == 0
    metrics, records = results(tmp_path / "out")
    test = metrics["test"]
    assert metrics["task"]["metric"] == "rouge_l"
    assert test["rouge_l"]["n"] == test["trivial"]["rouge_l"]["n"] == 5
    assert test["rouge_l"]["value"] == pytest.approx(sum(record["score"] for record in records) / 5)
    assert all(record["correct"] is None for record in records)
    assert "rouge_l" in capsys.readouterr().out


def test_write_card(models, tmp_path):
    run, data = models / "run", str(DATA / "strategyqa")
    before = (run / "README.md").read_text(encoding="utf-8")
    arc = ["--task", "arc_easy", "--data_dir", str(DATA / "arc"), "--max_new_tokens", "4"]
    for words, name in ((arc, "arc_easy"), (["--data_dir", data], "own"), (["--data_dir", data], "own")):
        assert main([str(run), *words, "--write_card", "--output_dir", str(tmp_path / name)]) == 0
    card = ModelCard((run / "README.md").read_text(encoding="utf-8"))
    found = {result.task_name: result for result in card.data.eval_results}
    assert len(card.data.eval_results) == 2
    assert found["arc_easy"].metric_value == round(results(tmp_path / "arc_easy")[0]["test"]["accuracy"]["value"], 4)
    assert found["arc_easy"].dataset_split == "test"
    assert card.data.license == "mit"
    assert card.content.split("---", 2)[2] == before.split("---", 2)[2]
    assert not (run / ".eval_results").exists()  # local files are no data set of the Hub


def test_a_result_on_data_of_the_hub_is_written_for_its_leaderboard(models, tmp_path, monkeypatch):
    def load_dataset(path, name=None, *, revision=None, split=None):
        lines = (DATA / "gsm8k" / f"{split}.jsonl").read_text().splitlines()
        return datasets.Dataset.from_list([json.loads(line) for line in lines])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    run = models / "run"
    assert main([str(run), "--task", "gsm8k", "--write_card", "--output_dir", str(tmp_path / "out")]) == 0
    value = round(results(tmp_path / "out")[0]["test"]["accuracy"]["value"], 4)
    text = (run / ".eval_results" / "gsm8k.yaml").read_text()
    (entry,) = yaml.safe_load(text)
    notes = entry.pop("notes")
    assert entry == {"dataset": {"id": "openai/gsm8k", "task_id": "main"}, "value": value}
    assert notes.startswith("accuracy, n = 12, 90 % interval")
    card = ModelCard((run / "README.md").read_text(encoding="utf-8"))
    assert next(r for r in card.data.eval_results if r.task_name == "gsm8k").dataset_type == "openai/gsm8k"


def test_answers_to_the_training_split_teach_another_model(models, tmp_path):
    """What `--split train` writes is what `task.teacher_answers` reads."""
    words = [*TASK, "--split", "train", "--limit", "10", "--stop", ""]
    assert main([str(models / "gpt2"), *words, "--output_dir", str(tmp_path / "out")]) == 0
    metrics, records = results(tmp_path / "out")
    assert metrics["split"] == "train"
    assert metrics["train"]["n"] == 10
    given = {record["id"]: record["prediction"] for record in records if record["prediction"]}
    assert len(given) > 5
    taught = make_task("strategyqa", teacher_answers=str(tmp_path / "out" / "predictions.jsonl"))
    assert {example.id: example.target for example in taught.rows("train")} == given
    assert taught.report("train").without_teacher == len(make_task("strategyqa").rows("train")) - len(given)


def test_lengths_are_cut_as_in_training(models):
    """A run's own prompts, cut from the left to its `max_source_length` by the task itself."""
    run = yaml.safe_load((models / "run" / "recipe.yaml").read_text())["task"]
    generator = generator_of(models / "run", "--data_dir", DATA / "strategyqa")
    assert generator.source_limit == run["max_source_length"] == 64
    generator = generator_of(models / "run", "--data_dir", DATA / "strategyqa", "--max_source_length", 9)
    for example in generator.task.rows("test"):
        whole = generator.tokenizer(example.prompt, verbose=False)["input_ids"]
        assert generator.encode(example) == (whole[-9:], len(whole) > 9)
    foreign = generator_of(models / "t5", *TASK)
    assert foreign.source_limit == 512  # the task's default is meant for its own tokenizer
