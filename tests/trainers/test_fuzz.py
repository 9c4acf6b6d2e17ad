"""Whatever a recipe, a data file or a prompt holds: it is accepted, or refused in one line by the right error."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForSeq2SeqLM

import hf_models  # noqa: F401 - registers our architectures
from tests.trainers.tasks.tools import DATA, FOLDERS
from trainers.arguments import SECTIONS, kinds, parse_recipe, section_fields
from trainers.coupling import READERS, read_pieces
from trainers.errors import UserError
from trainers.tasks import TASKS, StoredTask, TaskArguments, get_task
from trainers.tasks.loading import read_file
from trainers.tasks.tokenization import byte_level_bpe

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
LONG = settings(QUICK, max_examples=500)
FIELDS = sorted({name for kind in kinds() for section in kind.sections for name in section_fields(section, kind, None)})

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**12), 10**12),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(["1e-4", "connection_transformer", "pointer_chase", "../x", "{{"]),
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)
sections = st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=10), values, max_size=4)
section_names = st.sampled_from([*SECTIONS, "inherit", "provenance"]) | st.text(max_size=6)
recipes = st.dictionaries(section_names, sections | values, max_size=5)
options = st.sampled_from(["--", "-", "=", "--max_steps", "--seed=1", "--overwrite"]) | st.text(max_size=8)
VALID = {
    "model": {"model_type": "vanilla_transformer", "hidden_size": 16, "num_attention_heads": 2},
    "task": {"name": "pointer_chase"},
}


def one_line_at_most(call) -> bool:
    """Call it; a `UserError` must be one line of text. Returns whether it was accepted."""
    message = None
    try:
        call()
    except UserError as error:
        message = str(error)
    assert message is None or (message.strip() and "\n" not in message)
    return message is None


def check_recipe(folder: Path, content, text: str | None = None) -> None:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content) if text is None else text, encoding="utf-8")
    one_line_at_most(lambda: parse_recipe([str(path)], prog="train"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def over(valid: dict, changes: dict) -> dict:
    """A valid recipe with the mappings of another one laid over it, so that what lies behind the first check is met."""
    merged = {section: dict(content) for section, content in valid.items()}
    for section, content in changes.items():
        if isinstance(content, dict) and section in SECTIONS:
            merged.setdefault(section, {}).update(content)
    return merged


def fuzz_recipes(folder, content):
    check_recipe(folder, content)
    check_recipe(folder, over(VALID, content))


@QUICK
@given(content=recipes)
def test_recipes(folder, content):
    fuzz_recipes(folder, content)


@pytest.mark.long
@LONG
@given(content=recipes)
def test_recipes_at_length(folder, content):
    fuzz_recipes(folder, content)


@QUICK
@given(text=st.text(max_size=60))
def test_recipe_files_of_any_text(folder, text):
    check_recipe(folder, None, text.replace("\ud800", ""))


@QUICK
@given(words=st.lists(options, max_size=4))
def test_command_lines(folder, words):
    path = folder / "valid.yaml"
    path.write_text(yaml.safe_dump(VALID))
    words = [word for word in words if word not in ("-h", "--help")]
    one_line_at_most(lambda: parse_recipe([str(path), *words], prog="train"))


STORED = sorted(name for name, task in TASKS.items() if issubclass(task, StoredTask) and name != "columns")
NAMES = ["question", "answer", "context", "options", "label", "id", "choices", "facts", "answerKey", "text"]
rows = st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=4), values, max_size=6)


def fuzz_rows(folder, name, content):
    data = folder / "data"
    data.mkdir(exist_ok=True)
    lines = (json.dumps(row) for row in content)
    (data / "train.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    (data / "test.jsonl").write_text((data / "train.jsonl").read_text(encoding="utf-8"), encoding="utf-8")
    accepted = one_line_at_most(lambda: get_task(TaskArguments(name=name, data_dir=str(data))).rows("train"))
    assert not accepted or content, "a file without rows was accepted"


@QUICK
@given(name=st.sampled_from(STORED), content=st.lists(rows, max_size=3))
def test_data_rows(folder, name, content):
    fuzz_rows(folder, name, content)


@pytest.mark.long
@LONG
@given(name=st.sampled_from(STORED), content=st.lists(rows, max_size=3))
def test_data_rows_at_length(folder, name, content):
    fuzz_rows(folder, name, content)


def good_rows() -> dict[tuple[str, str], tuple[str, dict]]:
    """(what reads it, its name) -> the file that a small data set of the tests lies in, and its first row."""
    found = {}
    for name in STORED:
        folder = DATA / FOLDERS.get(name, name)
        names = [name for names in TASKS[name].local_names.values() for name in names]
        found["task", name] = next(path for path in sorted(folder.glob("*train.json*")) if path.stem in names)
    for name in READERS:
        folder = DATA / "coupling" / name
        found["reader", name] = next(iter(sorted(folder.rglob("*.json*"))), DATA / "coupling" / "facts.jsonl")
    rows = {}
    for key, path in found.items():
        lines = path.read_text(encoding="utf-8")
        rows[key] = (path.stem, json.loads(lines.split("\n")[0]) if path.suffix == ".jsonl" else json.loads(lines)[0])
    return rows


GOOD = good_rows()
hostile = st.one_of(
    values,
    st.sampled_from(["\ud800", "[" * 3000, "9" * 5000, "\0", "{}", "[[", "#### ", "\u202e\u2028"]),
    st.lists(st.lists(scalars, max_size=2), max_size=2),
    st.dictionaries(
        st.sampled_from(["text", "label", "str", "title", "sentences", "prompt", "answer"]), values, max_size=3
    ),
)


def changed(data, value, depth: int = 0):
    """A value of a good row with one thing inside it taken away or exchanged."""
    inner = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    if not inner or (depth > 0 and data.draw(st.integers(0, 2)) == 0):
        return data.draw(hostile)
    key = data.draw(st.sampled_from(inner))
    copy = dict(value) if isinstance(value, dict) else list(value)
    if data.draw(st.integers(0, 5)) == 0:
        del copy[key]
    else:
        copy[key] = changed(data, copy[key], depth + 1)
    return copy


def fuzz_good_row(folder, kind, name, data):
    stem, row = GOOD[kind, name]
    path = folder / f"{kind}-{name}" / f"{stem}.jsonl"
    path.parent.mkdir(exist_ok=True)
    rows = [changed(data, row), row] if data.draw(st.booleans()) else [changed(data, changed(data, row))]
    path.write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    if kind == "reader":
        one_line_at_most(lambda: read_pieces(name, path))
        return
    task = get_task(TaskArguments(name=name, data_dir=str(path.parent)))
    one_line_at_most(lambda: [task.parse(each) for each in read_file(path, "train")])


@pytest.mark.parametrize(("kind", "name"), GOOD)
@settings(QUICK, max_examples=25)
@given(data=st.data())
def test_good_rows_with_a_change(folder, kind, name, data):
    fuzz_good_row(folder, kind, name, data)


@pytest.mark.long
@pytest.mark.parametrize(("kind", "name"), GOOD)
@settings(QUICK, max_examples=300)
@given(data=st.data())
def test_good_rows_with_a_change_at_length(folder, kind, name, data):
    fuzz_good_row(folder, kind, name, data)


MODELS = {
    "connection_transformer": {"num_slots": 4, "connection_rank": 2, "max_reasoning_steps": 2},
    "vanilla_transformer": {"num_hidden_layers": 1, "intermediate_size": 24},
}


@pytest.fixture(scope="module", params=MODELS)
def reader(request):
    """A task's tokenizer trained on ASCII questions, and a model for it."""
    tokenizer = byte_level_bpe([f"Is it question number {number}?" for number in range(20)], 300, model_max_length=64)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_decoder_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64}
    config = AutoConfig.for_model(request.param, vocab_size=len(tokenizer), **sizes, **MODELS[request.param])
    return tokenizer, AutoModelForSeq2SeqLM.from_config(config).eval()


@QUICK
@given(prompt=st.text(max_size=30), other=st.text(max_size=30))
@example(prompt="", other="\0")
@example(prompt="\u202e\u05d0\u0628\u202c", other="a" + "\u0301" * 40)
@example(prompt="\U0001f468\u200d\U0001f469\u200d\U0001f467", other="x" * 2000)
@example(prompt="\ufeff\ud800", other="<eos><pad><unk>")
def test_prompts_of_any_unicode(reader, prompt, other):
    """Text survives the tokenizer, and an answer to it does not depend on what else is in the batch."""
    tokenizer, model = reader
    prompt, other = (re.sub(r"[\ud800-\udfff]", "?", text) for text in (prompt, other))
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == prompt
    inputs = tokenizer([prompt, other], padding=True, truncation=True, max_length=60, return_tensors="pt")
    alone = tokenizer([prompt], truncation=True, max_length=60, return_tensors="pt")
    start = torch.full((2, 1), tokenizer.bos_token_id)
    with torch.no_grad():
        both = model(inputs["input_ids"], inputs["attention_mask"], decoder_input_ids=start)
        single = model(alone["input_ids"], alone["attention_mask"], decoder_input_ids=start[:1])
    torch.testing.assert_close(both.logits[:1], single.logits, atol=2e-5, rtol=1e-4)
    if "reasoning_steps" in both:
        assert both.reasoning_steps[0] == single.reasoning_steps[0]
