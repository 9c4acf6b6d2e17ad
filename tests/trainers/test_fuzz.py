"""Whatever a recipe, a data file or a prompt holds: it is accepted, or refused in one line by the right error."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_models.connection_transformer import ConnectionTransformerConfig, ConnectionTransformerForConditionalGeneration
from trainers.arguments import SECTIONS, kinds, parse_recipe, section_fields
from trainers.errors import UserError
from trainers.tasks import TASKS, StoredTask, TaskArguments, get_task
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


@pytest.fixture(scope="module")
def reader():
    """A task's tokenizer trained on ASCII questions, and a model for it."""
    tokenizer = byte_level_bpe([f"Is it question number {number}?" for number in range(20)], 300, model_max_length=64)
    torch.manual_seed(0)
    config = ConnectionTransformerConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_slots=4, connection_rank=2, max_reasoning_steps=2,
        num_decoder_layers=1, num_attention_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return tokenizer, ConnectionTransformerForConditionalGeneration(config).eval()


@QUICK
@given(prompt=st.text(min_size=1, max_size=30), other=st.text(min_size=1, max_size=30))
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
    assert both.reasoning_steps[0] == single.reasoning_steps[0]
