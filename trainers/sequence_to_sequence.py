"""Runs of models that read a text and write one: tasks of examples with prompt and target, scored by generation."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
from huggingface_hub.dataclasses import strict
from torch.utils.data import Dataset
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from hf_models.connection_transformer import ConnectionTransformerConfig

from .adaptive_reasoning_trainer import LOSS_PARTS, AdaptiveReasoningTrainer, ReasoningTrainingArguments
from .arguments import EvaluationArguments, Kind, Recipe, user_errors_from_validation
from .connection_analysis import write_connection_analysis
from .errors import UserError, one_line
from .evaluation import (
    accuracy_metric,
    decode_predictions,
    results_table,
    score_predictions,
    score_trivial,
    summarise,
)
from .loading import source_options
from .pretrained import embeddings_from, fill_reader, pretrained_model, reader_fields, reader_tokenizer
from .run import Evaluation, TrainingRun, say
from .stability import ExplodingLoss
from .tasks import Example, Task, TaskArguments, get_task


@strict
@dataclass(kw_only=True)
class TokenizerArguments:
    """Where the tokenizer comes from."""

    name_or_path: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub id of a tokenizer. Without it one is trained on the train split."},
    )
    revision: str | None = field(default=None, metadata={"help": "Hub revision of the named tokenizer."})
    vocab_size: int = field(default=8000, metadata={"help": "Largest vocabulary of a trained tokenizer."})

    def validate_revision(self) -> None:
        if self.revision is not None and self.name_or_path is None:
            raise ValueError("tokenizer.revision is set, but tokenizer.name_or_path is not")


@strict
@dataclass(kw_only=True)
class GenerationArguments(EvaluationArguments):
    """How predictions are made and scored."""

    num_beams: int = field(default=1, metadata={"help": "Beams of the search that generates an answer; 1 is greedy."})
    max_reasoning_steps: int | None = field(
        default=None,
        metadata={"help": "Upper bound of reasoning steps at evaluation; default is the configuration's."},
    )

    def validate_ranges(self) -> None:
        if self.num_beams < 1:
            raise ValueError(f"evaluation.num_beams is {self.num_beams}; it must be at least 1")
        if self.max_reasoning_steps is not None and self.max_reasoning_steps < 1:
            raise ValueError(f"evaluation.max_reasoning_steps is {self.max_reasoning_steps}; it must be at least 1")


class EncodedExamples(Dataset):
    """A map-style dataset of encoded examples; the encoding is done once, up front, and its truncations counted."""

    def __init__(self, task: Task, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase):
        self.features = [task.encode(example, tokenizer) for example in examples]
        self.truncated = task.truncated(examples)

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return {**self.features[index], "attention_mask": [1] * len(self.features[index]["input_ids"])}


def make_tokenizer(recipe: Recipe, task: Task, train: Sequence[Example]) -> PreTrainedTokenizerBase:
    """The recipe's named tokenizer, that of its reader, or one trained on the train split alone.

    Raises:
        UserError: if the named one cannot be loaded or lacks a special token the models need.
    """
    if recipe.reader is not None:
        return reader_tokenizer(recipe)
    name = recipe.tokenizer.name_or_path or recipe.pretrained
    if name is None:
        return task.build_tokenizer(train, recipe.tokenizer.vocab_size)
    named = recipe.tokenizer.name_or_path is not None
    field = "tokenizer.name_or_path" if named else "model.pretrained"
    revision = recipe.tokenizer.revision if named else recipe.pretrained_revision
    trust = recipe.trust_remote_code and not named
    options = source_options(name, revision, weights=False, trust_remote_code=trust, option=field)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    except Exception as error:  # a damaged file raises whatever its reader happens to meet
        raise UserError(f"{field}: cannot load the tokenizer of {name!r}: {one_line(error)[:300]}") from error
    for token in ("pad_token", "eos_token"):
        if getattr(tokenizer, token) is None:
            raise UserError(f"{field}: the tokenizer of {name!r} has no {token}, which source and target need")
    return tokenizer


def make_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A model from the recipe's configuration, or the pretrained one it names.

    Raises:
        UserError: if it cannot be loaded or built, or does not fit the tokenizer or the task's lengths.
    """
    if recipe.pretrained is not None:
        model = pretrained_model(recipe, AutoModelForSeq2SeqLM)
        known = model.get_input_embeddings().num_embeddings
        if len(tokenizer) > known:
            raise UserError(
                f"tokenizer.name_or_path: the tokenizer has {len(tokenizer)} tokens, but the model of "
                f"{recipe.pretrained!r} knows only {known}"
            )
    else:
        token_ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
        bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.pad_token_id
        token_ids |= {"bos_token_id": bos, "decoder_start_token_id": bos}
        config = recipe.model_config(vocab_size=len(tokenizer), **token_ids, **reader_fields(recipe))
        if getattr(config, "decoder_vocab_size", None) not in (None, len(tokenizer)):
            raise UserError("model.decoder_vocab_size: source and target share the task's tokenizer; leave it out")
        with user_errors_from_validation("model"):
            # Without a decoder the answer is what one forward pass predicts at the positions of the input.
            head = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForMaskedLM
            model = head.from_config(config)
        if recipe.reader is not None:
            count = fill_reader(model, recipe)
            learning = "frozen" if config.freeze_reader else "trained"
            say(f"reader    {config.reader_config.model_type} from {recipe.reader}, {count:,} parameters, {learning}")
    source_length, target_length = recipe.task.max_source_length, recipe.task.max_target_length
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and source_length is not None and target_length is not None:
        longest = max(source_length, target_length + 1)
        if longest > limit:
            raise UserError(
                f"model.max_position_embeddings is {limit}, but task.max_source_length and max_target_length need "
                f"{longest}"
            )
    if not model.can_generate() and recipe.evaluation.num_beams > 1:
        raise UserError("evaluation.num_beams: a model without a decoder answers in one pass; leave it out")
    bound = recipe.evaluation.max_reasoning_steps
    most = getattr(model.config, "max_reasoning_steps", None)
    if bound is not None and most is None:
        raise UserError(f"evaluation.max_reasoning_steps: a {recipe.model_type} has no reasoning steps; leave it out")
    if bound is not None and most is not None and bound > most and not getattr(model.config, "share_step_norm", True):
        raise UserError(
            f"evaluation.max_reasoning_steps is {bound}, but without model.share_step_norm there are only "
            f"model.max_reasoning_steps = {most} steps"
        )
    return model


class SequenceToSequenceRun(TrainingRun):
    """A run on a [`Task`][trainers.tasks.Task]."""

    loss_parts = LOSS_PARTS
    task: Task
    trainer: AdaptiveReasoningTrainer

    @staticmethod
    def make_task(arguments: TaskArguments) -> Task:
        return get_task(arguments)

    def build(self) -> None:
        recipe, training = self.recipe, self.recipe.training
        best = (training.metric_for_best_model or "loss").removeprefix("eval_")
        if best not in ("loss", self.task.metric):
            raise UserError(
                f"training.metric_for_best_model is {best}, but {self.task.name} measures {self.task.metric}; "
                "name that, or loss"
            )
        self.splits = {"train": self.task.rows("train"), "validation": self.task.rows("validation")}
        # Read and encoded now so that a bad row stops the run before training; nothing uses it before the end.
        self.splits["test"] = self.task.rows("test")
        set_seed(training.seed)
        self.tokenizer = make_tokenizer(recipe, self.task, self.splits["train"])
        self.data = {
            split: EncodedExamples(self.task, examples, self.tokenizer) for split, examples in self.splits.items()
        }
        self.train_examples, self.truncated_inputs = len(self.data["train"]), self.data["train"].truncated
        set_seed(training.seed)
        self.model = make_model(recipe, self.tokenizer)
        if recipe.embeddings_from is not None:
            copied = embeddings_from(
                self.model, self.tokenizer, recipe.embeddings_from, revision=recipe.embeddings_revision
            )
            say(
                f"embedding {copied.copied} rows copied from {recipe.embeddings_from}, {copied.averaged} averaged, "
                f"{copied.kept} kept as initialised"
            )
        if self.model.can_generate():
            self.model.generation_config.max_new_tokens = recipe.task.max_target_length
            self.model.generation_config.max_length = None
        self.max_steps = recipe.evaluation.max_reasoning_steps or getattr(
            self.model.config, "max_reasoning_steps", None
        )
        say(
            f"examples  {', '.join(f'{len(data)} {split}' for split, data in self.data.items())}; "
            f"{self.truncated_inputs} train inputs cut"
        )
        say(
            f"model     {type(self.model).__name__}, {self.model.num_parameters():,} parameters, "
            f"vocabulary {len(self.tokenizer)}"
        )
        with user_errors_from_validation("training"):
            self.trainer = AdaptiveReasoningTrainer(
                model=self.model,
                args=training,
                train_dataset=self.data["train"],
                eval_dataset=self.data["validation"],
                processing_class=self.tokenizer,
                data_collator=DataCollatorForSeq2Seq(self.tokenizer),
                compute_metrics=accuracy_metric(self.task, self.splits["validation"], self.tokenizer),
                generation_kwargs=self._generation_kwargs(),
            )

        self.trainer.add_callback(ExplodingLoss())

    def _generation_kwargs(self) -> dict[str, Any]:
        kwargs = {"num_beams": self.recipe.evaluation.num_beams, "do_sample": False}
        if self.recipe.evaluation.max_reasoning_steps is not None:
            kwargs["max_reasoning_steps"] = self.recipe.evaluation.max_reasoning_steps
        return kwargs

    def fingerprint_rows(self) -> Iterable[Any]:
        for examples in self.splits.values():
            for example in examples:
                yield [example.id, example.prompt, example.target]

    def predict(self, split: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Generate an answer to each example. Returns the records of `predictions.jsonl` and the split's summary."""
        self.trainer.compute_metrics = None
        examples, data = self.splits[split], self.data[split]
        tokens, steps = cast(tuple[np.ndarray, ...], self.trainer.predict(data).predictions)
        confidence = float(self.recipe.evaluation.confidence)
        trivial = score_trivial(self.task, self.task.trivial_predictor(self.splits["train"]), examples, confidence)
        records = score_predictions(self.task, examples, decode_predictions(tokens, self.tokenizer), steps)
        return records, summarise(records, confidence, trivial, self.max_steps, data.truncated, self.task)

    def evaluate(self) -> Evaluation:
        _, validation = self.predict("validation")
        records, test = self.predict("test")
        example = self.splits["validation"][0]
        return Evaluation(validation, test, records, {"prompt": example.prompt, "target": example.target})

    def write_reports(self, folder: Path, metrics: dict[str, Any]) -> None:
        if isinstance(self.model.config, ConnectionTransformerConfig):
            write_connection_analysis(
                self.model,
                self.data["test"].features,
                self.tokenizer,
                folder / "internals",
                max_reasoning_steps=self.max_steps,
            )

    @staticmethod
    def results_table(metrics: dict[str, Any]) -> str:
        how = "in one pass" if metrics["architecture"].endswith("ForMaskedLM") else "by generation"
        title = f"test split, answers {how} ({metrics['task']['metric']}):"
        return f"{title}\n{results_table(metrics['test'], metrics['task']['metric'])}"


KIND = Kind(
    name="sequence_to_sequence",
    model_types=("connection_transformer", "vanilla_transformer"),
    sections={
        "task": TaskArguments,
        "tokenizer": TokenizerArguments,
        "training": ReasoningTrainingArguments,
        "evaluation": GenerationArguments,
    },
    run=SequenceToSequenceRun,
    metrics=("accuracy", "loss", "rouge_l", "mean_score"),
)
