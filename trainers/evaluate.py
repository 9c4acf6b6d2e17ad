"""Measure a model on a task: answers by generation, their score with its interval, and the trivial predictor beside it.

    python -m trainers.evaluate outputs/my-run
    python -m trainers.evaluate outputs/my-run --task strategyqa --data_dir path/to/strategyqa --limit 100
    python -m trainers.evaluate google/flan-t5-small --task gsm8k --template "Solve: {prompt}" --batch_size 32

The model is one of our run folders, or any sequence-to-sequence or causal language model, by folder or Hub id. A run is
measured on the task it was trained on, as it was then, unless options say otherwise. An evaluation that was interrupted
goes on when the same command is given again, to the same result. `--help` lists every option.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import sys
import time
import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
import transformers
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .arguments import check_value
from .command import CommandParser, run_command
from .errors import UserError, did_you_mean, one_line
from .evaluation import decode_predictions, results_table, score_predictions, score_trivial, summarise
from .files import LOCK_NAME, json_text, only_user_of, write_records, write_text, writing_to
from .loading import language_model_class, load_model, saved_class
from .recipe_files import parse_yaml
from .run import empty_folder, read_record, say, versions
from .tasks import Example, Task, TaskArguments, get_task
from .tasks.base import tokenize

SETTINGS = "evaluation.yaml"
PARTIAL = "predictions.partial.jsonl"
PROMPT = "{prompt}"
# Beyond this a tokenizer states no limit: the library's placeholder is 1e30.
NO_LIMIT = 10**9


@strict
@dataclass(kw_only=True)
class EvaluateArguments:
    """What the command may be told, besides the fields of a recipe's `task` section."""

    model: str = field(metadata={"help": "Run folder, model folder or Hub id."})
    task: str | None = field(default=None, metadata={"help": "Name of the task; default is the run's own."})
    split: Literal["train", "validation", "test"] = field(default="test", metadata={"help": "Split to measure on."})
    limit: int | None = field(
        default=None, metadata={"help": "Measure on a random subset of this size, drawn by split_seed."}
    )
    batch_size: int = field(default=16, metadata={"help": "Examples in a batch."})
    output_dir: str | None = field(
        default=None,
        metadata={"help": "Folder for the results; default is evaluations/ in a run, else one in outputs/."},
    )
    template: str | None = field(
        default=None,
        metadata={
            "help": "Text around the prompt, with {prompt} in it. Default: the prompt alone for models that have an "
            "encoder, and a line 'Answer:' behind it for others."
        },
    )
    stop: str | None = field(
        default=None,
        metadata={
            "help": "Cut an answer where this text begins (\\n is read as a line break). Default: a line break for a "
            "causal model, or an empty line if training targets have several lines; nothing for others."
        },
    )
    max_new_tokens: int | None = field(
        default=None, metadata={"help": "Longest answer in tokens; default is the task's max_target_length."}
    )
    num_beams: int | None = field(default=None, metadata={"help": "Beams; default is the run's, else 1 (greedy)."})
    max_reasoning_steps: int | None = field(
        default=None, metadata={"help": "Upper bound of reasoning steps; default is the run's or the model's."}
    )
    confidence: float | int | None = field(
        default=None, metadata={"help": "Level of the intervals; default is the run's, else 0.95."}
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "Number format of the weights; auto is the one they are stored in."}
    )
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, ...; default is a GPU if there is one."})
    revision: str | None = field(default=None, metadata={"help": "Hub revision of the model."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that the model's repository brings."})
    write_card: bool = field(
        default=False, metadata={"help": "Add the result to the card (README.md) in the model's folder."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace what the output folder holds."})

    def validate_ranges(self) -> None:
        for name in ("limit", "batch_size", "max_new_tokens", "num_beams", "max_reasoning_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} is {value}; it must be at least 1")
        if self.confidence is not None and not 0 < self.confidence < 1:
            raise ValueError(f"--confidence is {self.confidence}; it must lie between 0 and 1")
        if self.template is not None and self.template.count(PROMPT) != 1:
            raise ValueError(f"--template is {self.template!r}; it must hold {PROMPT} once")
        if self.write_card and (self.split != "test" or self.limit is not None):
            given = f"--split is {self.split}" if self.split != "test" else f"--limit is {self.limit}"
            raise ValueError(f"--write_card is for results on the whole test split, and {given}")


def parse(argv: Sequence[str]) -> tuple[EvaluateArguments, dict[str, Any]]:
    """A command line as checked arguments, and the fields of the task section among them.

    Raises:
        UserError: for an unknown option, or a value that breaks a rule.
        SystemExit: with code 0 for `--help`.
    """
    parser = CommandParser(prog="python -m trainers.evaluate", description=__doc__.split("\n")[0])
    parser.add_argument("model", help=EvaluateArguments.__dataclass_fields__["model"].metadata["help"])
    sections: dict[str, type] = {"evaluation": EvaluateArguments, "task": TaskArguments}
    types = {}
    for section, kind in sections.items():
        group = parser.add_argument_group(section)
        hints = typing.get_type_hints(kind)
        for item in dataclasses.fields(kind):
            if item.name in ("model", "name"):
                continue
            types[item.name] = (section, hints[item.name])
            flag: dict[str, Any] = {"nargs": "?", "const": "true"} if item.type is bool else {}
            text = str(item.metadata["help"]).replace("%", "%%")
            name = item.name.upper()
            group.add_argument(f"--{item.name}", default=argparse.SUPPRESS, metavar=name, help=text, **flag)
    found, unknown = parser.parse_known_args(argv)
    if unknown:
        option = unknown[0].split("=")[0]
        raise UserError(f"unknown option {unknown[0]!r}{did_you_mean(option, [f'--{name}' for name in types])}")
    values: dict[str, dict[str, Any]] = {"evaluation": {"model": found.model}, "task": {}}
    for name, raw in vars(found).items():
        if name != "model":
            section, expected = types[name]
            values[section][name] = _value(name, raw, expected)
    try:
        return EvaluateArguments(**values["evaluation"]), values["task"]
    except StrictDataclassError as error:
        raise UserError(one_line(error)) from error


def _value(name: str, raw: str, expected: Any) -> Any:
    """A command-line word as the type of its field: text stays text, everything else is read as YAML."""
    choices = typing.get_args(expected) if typing.get_origin(expected) is Literal else ()
    if choices:
        if raw not in choices:
            raise UserError(f"--{name}: {raw!r} is not one of {', '.join(choices)}")
        return raw
    if expected is str or (str in typing.get_args(expected) and not {int, float} & set(typing.get_args(expected))):
        return raw
    try:
        value = parse_yaml(raw)
    except yaml.YAMLError:
        value = raw
    return check_value(f"--{name}", value, expected)


@dataclass(frozen=True)
class Plan:
    """All that shapes the result of an evaluation, checked, before a model is loaded.

    Attributes:
        arguments: the command line.
        task: what is measured.
        output: folder of the results.
        run: the record of the run, or an empty mapping if the model is no run.
        num_beams, max_reasoning_steps, confidence: as given, else the run's, else the defaults.
        source_limit: longest input in tokens, as given, else the run's if it was trained on this task; `None` leaves it
            to the model, since another tokenizer counts other tokens than the task's default is meant for.
    """

    arguments: EvaluateArguments
    task: Task
    output: Path
    run: dict[str, Any]
    num_beams: int
    max_reasoning_steps: int | None
    confidence: float
    source_limit: int | None


def make_plan(arguments: EvaluateArguments, task_values: dict[str, Any]) -> Plan:
    """Complete the command line by the run's record.

    Raises:
        UserError: for a missing or unknown task, an argument it does not take, or a folder that cannot be written.
    """
    folder = Path(arguments.model).expanduser()
    run = read_record(folder / "recipe.yaml") if (folder / "recipe.yaml").is_file() else {}
    recorded = dict(run.get("task") or {})
    name = arguments.task or recorded.get("name")
    if name is None:
        raise UserError("--task is missing, and the model is no run of a task")
    _refuse_code_of(run, arguments, task_values)
    known = {item.name for item in dataclasses.fields(TaskArguments)}
    values = {key: value for key, value in recorded.items() if key in known} if recorded.get("name") == name else {}
    # A teacher's answers are there to learn from. Of an absolute path to the data only the last part is recorded.
    for key in ("teacher_answers", "teacher_filter"):
        values.pop(key, None)
    place = Path(values.get("data_dir") or "")
    if len(place.parts) < 2 or not place.is_dir():
        values.pop("data_dir", None)
    values |= {"name": name} | task_values
    if arguments.limit is not None:
        values[f"max_{arguments.split}_samples"] = arguments.limit
    try:
        task = get_task(TaskArguments(**values))
    except StrictDataclassError as error:
        raise UserError(f"task: {one_line(error)}") from error
    if arguments.write_card and not (folder / "README.md").is_file():
        raise UserError(f"--write_card: {folder} holds no README.md to write the result into")
    label = Path(name).stem + f"-{arguments.split}" + (f"-{arguments.limit}" if arguments.limit else "")
    if arguments.output_dir is not None:
        output = Path(arguments.output_dir).expanduser()
    elif run:
        output = folder / "evaluations" / label
    else:
        output = Path("outputs") / f"evaluate-{folder.name}-{label}"
    evaluation = run.get("evaluation") or {}
    return Plan(
        arguments=arguments,
        task=task,
        output=output,
        run=run,
        num_beams=arguments.num_beams or evaluation.get("num_beams") or 1,
        max_reasoning_steps=arguments.max_reasoning_steps or evaluation.get("max_reasoning_steps"),
        confidence=float(arguments.confidence or evaluation.get("confidence") or 0.95),
        source_limit=values.get("max_source_length"),
    )


def _refuse_code_of(run: dict[str, Any], arguments: EvaluateArguments, task_values: dict[str, Any]) -> None:
    """A run may come from somebody else: Python files that its record names are run only if the user names them.

    Raises:
        UserError: if such a file would be run.
    """
    recorded = run.get("task") or {}
    options = recorded.get("options")
    components = options.get("components") if isinstance(options, dict) else None
    inside = [part.get("name") for part in components or () if isinstance(part, dict)]
    another = arguments.task not in (None, recorded.get("name"))
    for option, names, given in (
        ("task", [recorded.get("name")], arguments.task is not None),
        ("options", inside, another or "options" in task_values),
    ):
        file = next((name for name in names if isinstance(name, str) and name.endswith(".py")), None)
        if file is not None and not given:
            raise UserError(
                f"--{option} is missing: the run's task is the Python file {file}; what it holds is run only if you "
                f"name it in --{option}"
            )


class Generator:
    """A model with all it takes to answer prompts: its limits, the text around a prompt, batches, generation.

    Args:
        model: with an encoder, or causal.
        tokenizer: its own.
        task: cuts prompts that are too long.
        plan: the rest.
        several_lines: whether answers may have several lines.

    Raises:
        UserError: if the model does not write text, or has no room for an answer or a prompt.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        task: Task,
        plan: Plan,
        several_lines: bool,
    ):
        arguments, config = plan.arguments, model.config
        if not model.can_generate():
            raise UserError(f"{arguments.model}: a {type(model).__name__} does not write text; this command needs one")
        self.model, self.tokenizer, self.task = model, tokenizer, task
        self.has_encoder = bool(config.is_encoder_decoder)
        if tokenizer.eos_token_id is None:
            raise UserError(f"{arguments.model}: the tokenizer has no eos_token, which ends an answer")
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.template = arguments.template or (PROMPT if self.has_encoder else f"{PROMPT}\nAnswer:")
        stop = arguments.stop
        if stop is None:
            stop = "" if self.has_encoder else "\n\n" if several_lines else "\n"
        self.stop = stop.replace("\\n", "\n")
        self.max_new_tokens = arguments.max_new_tokens or task.target_limit
        self.max_reasoning_steps = plan.max_reasoning_steps
        most = getattr(config, "max_reasoning_steps", None)
        if self.max_reasoning_steps is not None and most is None:
            raise UserError(f"--max_reasoning_steps: a {config.model_type} has no reasoning steps; leave it out")
        self.source_limit = self._source_limit(plan)
        generation = model.generation_config
        generation.do_sample, generation.num_beams = False, plan.num_beams
        generation.temperature = generation.top_p = generation.top_k = None
        generation.max_new_tokens, generation.max_length = self.max_new_tokens, None
        generation.pad_token_id = tokenizer.pad_token_id
        # What special tokens and the template add around a prompt.
        self._around = len(self._tokens(""))
        # The form in which our own models are trained; a prompt is then cut exactly as it was in training.
        probe = tokenize("a", tokenizer)
        self._ends_plainly = self.template == PROMPT and self._tokens("a") == [*probe, tokenizer.eos_token_id]
        if self.source_limit <= self._around:
            raise UserError(
                f"{arguments.model}: the model reads at most {self.source_limit} tokens here, and the template alone "
                f"takes {self._around}; shorten --template or --max_new_tokens"
            )

    def _source_limit(self, plan: Plan) -> int:
        """Longest input in tokens."""
        config, name = self.model.config, plan.arguments.model
        positions = getattr(config, "max_position_embeddings", None) or NO_LIMIT
        if self.has_encoder:
            if self.max_new_tokens + 1 > positions:
                raise UserError(
                    f"--max_new_tokens: {self.max_new_tokens}, but {name} has {positions} positions for start token "
                    "and answer"
                )
            room = positions
        else:
            room = positions - self.max_new_tokens
            if room < 2:
                raise UserError(
                    f"--max_new_tokens: {self.max_new_tokens} leaves no room for a prompt in the {positions} positions "
                    f"of {name}"
                )
        stated = self.tokenizer.model_max_length
        room = min(room, int(stated) if stated < NO_LIMIT else NO_LIMIT)
        return min(room, plan.source_limit or NO_LIMIT)

    def _tokens(self, prompt: str) -> list[int]:
        return self.tokenizer(self.template.replace(PROMPT, prompt), verbose=False)["input_ids"]

    def encode(self, example: Example) -> tuple[list[int], bool]:
        """Token ids of an example's input, and whether its prompt was cut to fit.

        Raises:
            UserError: if the task refuses to cut the prompt.
        """
        tokens = self._tokens(example.prompt)
        if len(tokens) <= self.source_limit:
            return tokens, False
        room = self.source_limit - self._around
        if self._ends_plainly:
            return [*self.task.shorten(example, room, self.tokenizer), self.tokenizer.eos_token_id], True
        while room > 0:
            kept = self.task.shorten(example, room, self.tokenizer)
            tokens = self._tokens(str(self.tokenizer.decode(kept, skip_special_tokens=True)))
            if len(tokens) <= self.source_limit:
                return tokens, True
            room -= len(tokens) - self.source_limit  # a text may take more tokens than those it was cut from
        raise UserError(
            f"{example.id}: the prompt cannot be cut to the {self.source_limit} tokens that the model reads"
        )

    @torch.no_grad()
    def answer(self, inputs: Sequence[list[int]]) -> tuple[list[str], list[int]]:
        """Answers to a batch of encoded prompts, and the reasoning steps used for each, -1 where there are none."""
        width = max(map(len, inputs))
        pad = self.tokenizer.pad_token_id
        ids = torch.full((len(inputs), width), pad)
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(inputs):
            # A causal model goes on from the last position, so its padding is on the left.
            place = slice(0, len(tokens)) if self.has_encoder else slice(width - len(tokens), width)
            ids[row, place], mask[row, place] = torch.tensor(tokens), 1
        ids, mask = ids.to(self.model.device), mask.to(self.model.device)
        steps = [-1] * len(inputs)
        if self.has_encoder:
            bound = self.max_reasoning_steps
            extra = {} if bound is None else {"max_reasoning_steps": bound}
            encoded = cast(Any, self.model).get_encoder()(input_ids=ids, attention_mask=mask, **extra)
            if getattr(encoded, "reasoning_steps", None) is not None:
                steps = encoded.reasoning_steps.tolist()
            written = cast(Any, self.model).generate(encoder_outputs=encoded, attention_mask=mask)[:, 1:]
        else:
            written = cast(Any, self.model).generate(input_ids=ids, attention_mask=mask)[:, width:]
        texts = decode_predictions(written.cpu().numpy(), self.tokenizer)
        return [text.split(self.stop)[0].strip() if self.stop else text for text in texts], steps


def run(plan: Plan) -> dict[str, Any]:
    """Evaluate, and write `predictions.jsonl` and `metrics.json` into the output folder.

    Returns:
        The content of `metrics.json`.

    Raises:
        UserError: naming option, file or row; results that stand in the folder are not damaged.
    """
    with contextlib.ExitStack() as claim:
        return _run(plan, claim)


def _run(plan: Plan, claim: contextlib.ExitStack) -> dict[str, Any]:
    arguments, task, folder = plan.arguments, plan.task, plan.output
    examples = list(task.rows(arguments.split))
    train = _train_rows(task)
    say(f"task      {task.name}: {task.source}; {len(examples)} {arguments.split} examples")
    if not examples:
        raise UserError(f"{task.name}: the {arguments.split} split holds no examples")
    dtype = "auto" if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    model, tokenizer = load_model(
        arguments.model,
        # A GGUF file names no class.
        auto_class=lambda config: saved_class(config) if config.architectures else language_model_class(config),
        revision=arguments.revision,
        trust_remote_code=arguments.trust_remote_code,
        dtype=dtype,
        device=arguments.device,
    )
    assert tokenizer is not None  # `load_model` raises without one
    several_lines = any("\n" in example.target for example in train or ())
    generator = Generator(model, tokenizer, task, plan, several_lines)
    encoded = [generator.encode(example) for example in examples]
    truncated = sum(cut for _, cut in encoded)
    settings = _settings(plan, generator, examples)
    if _prepare(folder, settings, arguments.overwrite, claim):
        say(f"{folder} is finished already; nothing to do")
        return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    say(f"model     {type(model).__name__}, {model.num_parameters():,} parameters, {model.dtype}, {model.device}")
    if truncated:
        say(f"lengths   {truncated} prompts are longer than the {generator.source_limit} tokens read, and were cut")
    started = time.perf_counter()
    answers, steps = _answer_all(generator, [tokens for tokens, _ in encoded], arguments.batch_size, folder / PARTIAL)
    say(f"time      {time.perf_counter() - started:.1f} s")
    records = score_predictions(task, examples, answers, np.array(steps))
    trivial = score_trivial(task, task.trivial_predictor(train), examples, plan.confidence) if train else None
    most = plan.max_reasoning_steps or getattr(model.config, "max_reasoning_steps", None)
    metrics = {
        "schema_version": 1,
        "status": "finished",
        "model": {
            "name": settings["model"],
            "model_type": model.config.model_type,
            "architecture": type(model).__name__,
            "parameters": model.num_parameters(),
            "revision": settings["model_revision"],
        },
        "task": {"name": task.name, "source": task.source, "license": task.license, "metric": task.metric},
        "split": arguments.split,
        arguments.split: summarise(records, plan.confidence, trivial, most, truncated, task),
        "data": dataclasses.asdict(task.report(arguments.split)),
        "generation": {key: settings[key] for key in ("template", "stop", "max_new_tokens", "num_beams", "dtype")},
        "versions": versions(),
    }
    write_records(folder / "predictions.jsonl", records)
    write_text(folder / "metrics.json", json_text(metrics))
    (folder / PARTIAL).unlink()
    return metrics


def _train_rows(task: Task) -> Sequence[Example] | None:
    """The training examples, on which the trivial predictor is chosen, or `None` if the data have none."""
    try:
        return task.rows("train")
    except UserError as error:
        say(f"warning   no trivial predictor without a training split: {error}")
        return None


def _settings(plan: Plan, generator: Generator, examples: Iterable[Example]) -> dict[str, Any]:
    """What the result depends on; an evaluation is continued only under the same."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps([example.id, example.prompt, example.answers]).encode())
    arguments, model = plan.arguments, generator.model
    folder = Path(arguments.model).expanduser()
    return {
        "model": folder.name if folder.is_absolute() else arguments.model,
        "model_revision": getattr(model.config, "_commit_hash", None),
        "weights": _weights_digest(folder) if folder.is_dir() else None,
        "task": plan.task.name,
        "split": arguments.split,
        "data_fingerprint": digest.hexdigest(),
        "source_limit": generator.source_limit,
        "template": generator.template,
        "stop": generator.stop,
        "max_new_tokens": generator.max_new_tokens,
        "num_beams": plan.num_beams,
        "max_reasoning_steps": plan.max_reasoning_steps,
        "confidence": plan.confidence,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "batch_size": arguments.batch_size,
        "transformers": transformers.__version__,
        "torch": str(torch.__version__),
    }


def _weights_digest(folder: Path) -> str:
    """SHA-256 over the configuration and the weight files of a model's folder."""
    digest = hashlib.sha256()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        if path.is_file():
            with path.open("rb") as file:
                digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _prepare(folder: Path, settings: dict[str, Any], overwrite: bool, claim: contextlib.ExitStack) -> bool:
    """Make and claim the output folder, or check that it holds the same evaluation. Returns whether that is finished.

    Args:
        claim: no other evaluation enters the folder before it is closed.

    Raises:
        UserError: if it holds anything else and `overwrite` is not set, if another process is at work in it, or it
            cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        claim.enter_context(only_user_of(folder))
        held = {entry.name for entry in folder.iterdir() if entry.name != LOCK_NAME}
        if held and SETTINGS not in held:
            raise UserError(f"--output_dir: {folder} holds files that are no evaluation; choose another folder")
        if held and not overwrite:
            recorded = yaml.safe_load((folder / SETTINGS).read_text(encoding="utf-8"))
            for name, now in settings.items():
                then = recorded.get(name) if isinstance(recorded, dict) else None
                if then != now:
                    raise UserError(
                        f"--output_dir: {folder} holds an evaluation with {name} {then!r}, and now it is {now!r}; "
                        "choose another folder, or --overwrite"
                    )
            if "metrics.json" in held:
                (folder / PARTIAL).unlink(missing_ok=True)  # a kill may have come before it was deleted
                return True
            return False
        empty_folder(folder, SETTINGS)
        write_text(folder / SETTINGS, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"--output_dir: cannot use {folder}: {one_line(error)}") from error
    return False


def _answer_all(
    generator: Generator, inputs: Sequence[list[int]], batch_size: int, partial: Path
) -> tuple[list[str], list[int]]:
    """Answers and steps for all inputs, in their order.

    Batches hold inputs of like length, longest first. Each one is written down as it is done, so that after a kill the
    same batches are formed and only those not yet written are computed: a result never depends on the interruption.
    """
    order = sorted(range(len(inputs)), key=lambda index: (-len(inputs[index]), index))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    done = _read_partial(partial)
    answers, steps = [""] * len(inputs), [-1] * len(inputs)
    with writing_to(partial), partial.open("a", encoding="utf-8") as file:
        for number, batch in enumerate(tqdm(batches, desc="batches", disable=not sys.stderr.isatty())):
            if number not in done:
                done[number] = list(zip(*generator.answer([inputs[index] for index in batch]), strict=True))
                file.write(json.dumps({"batch": number, "answers": done[number]}, ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
            for index, (text, used) in zip(batch, done[number], strict=True):
                answers[index], steps[index] = text, used
    return answers, steps


def _read_partial(path: Path) -> dict[int, list[Any]]:
    """The finished batches of an interrupted evaluation; a line that was torn by the interruption is cut off."""
    if not path.exists():
        return {}
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    entries = [json.loads(line) for line in whole.decode("utf-8").split("\n") if line]
    return {entry["batch"]: entry["answers"] for entry in entries}


def write_results_to_card(folder: Path, metrics: dict[str, Any], task: Task) -> None:
    """Add a test result to a model's card: to `model-index` in the front matter of README.md.

    A result of the same task, data and metric is replaced. For data on the Hub the same number is written to
    `.eval_results/<task>.yaml`, from which the Hub takes it to the data set's leaderboard.
    """
    measured = metrics["test"][task.metric]
    arguments, dataset = task.arguments, task.dataset_id
    result = EvalResult(
        task_type="text-generation",
        task_name=task.name,
        dataset_type=dataset or task.name,
        dataset_name=task.name,
        dataset_config=arguments.hub_config if dataset else None,
        dataset_revision=arguments.hub_revision if dataset else None,
        dataset_split="test",
        metric_type=task.metric,
        metric_name=task.metric.replace("_", " ").capitalize(),
        metric_value=round(measured["value"], 4),
    )
    path = folder / "README.md"
    card = ModelCard(path.read_text(encoding="utf-8"))
    data = cast(ModelCardData, card.data)
    data.eval_results = [old for old in data.eval_results or [] if not old.is_equal_except_value(result)] + [result]
    data.model_name = data.model_name or folder.resolve().name
    write_text(path, str(card).rstrip("\n") + "\n")
    if dataset is not None:
        low, high = measured["interval"]
        level = f"{100 * measured['confidence']:g} %"
        entry = {
            "dataset": {"id": dataset, "task_id": arguments.hub_config or "default"},
            "value": round(measured["value"], 4),
            "notes": f"{task.metric}, n = {measured['n']}, {level} interval {low:.4f} to {high:.4f}",
        }
        (folder / ".eval_results").mkdir(exist_ok=True)
        text = yaml.safe_dump([entry], sort_keys=False)
        write_text(folder / ".eval_results" / f"{task.name}.yaml", text)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code: 0 on success, 2 for a mistake the user can mend, 130 for Ctrl-C."""

    def work() -> int:
        arguments, task_values = parse(list(sys.argv[1:] if argv is None else argv))
        plan = make_plan(arguments, task_values)
        metrics = run(plan)
        say(f"\n{arguments.split} split, answers by generation ({plan.task.metric}):")
        say(results_table(metrics[arguments.split], plan.task.metric))
        say(f"\nresults   {plan.output}")
        if arguments.write_card:
            folder = Path(arguments.model).expanduser()
            write_results_to_card(folder, metrics, plan.task)
            say(f"card      {folder / 'README.md'}")
        return 0

    return run_command(work, after_interrupt="the same command goes on")


if __name__ == "__main__":
    sys.exit(main())
