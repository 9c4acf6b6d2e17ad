"""The Trainer of in-context models: prompts that are generated in the order of use, losses by level."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import EvalPrediction
from transformers.trainer_utils import EvalLoopOutput

from hf_models.in_context_transformer.modeling_in_context_transformer import IGNORED_LABEL, label_losses

from ..arguments import RunTrainingArguments
from ..run_trainer import RunTrainer
from ..tasks.in_context import CurriculumPrompts

LOSS_PARTS = ("label", "block", "gate")


@dataclass
class InContextTrainingArguments(RunTrainingArguments):
    """`transformers.TrainingArguments` with early stopping, and what in-context models can learn from besides."""

    dense_labels: bool = field(
        default=False,
        metadata={
            "help": "Learn one more label for every block of a prompt: whether its table is connected to the first "
            "column asked for. Needs no further weight and changes nothing in the evaluation."
        },
    )


class InContextTrainer(RunTrainer):
    """`transformers.Trainer` for models that learn a task anew in every prompt.

    - **Order.** Training prompts come in the order of [`CurriculumPrompts`], which is a pure function of their index:
      a curriculum follows the update step, and a resumed run goes on with the very prompts that it would have seen.
    - **Loss.** Its parts are logged under their names. Beside them stands the loss of each level, averaged over the
      prompts since the last log: `loss_after_5` at the place with five pairs before it, `loss_path_2` of questions
      with a path of two tables, `loss_no_path` of those without.
    - **Curriculum.** The values of its variables are logged too.
    - **Evaluation.** `eval_loss` is the mean over all labels of the split, without the cost of gates, whatever the
      batches and processes they were spread over (the library's is a mean of batch means).

    Args:
        levels: name -> number of each level to log. Levels are numbers of pairs, or path lengths with -1 for none.
        kwargs: as for `transformers.Trainer`; `train_dataset` is a [`CurriculumPrompts`].
    """

    args: InContextTrainingArguments
    loss_parts = LOSS_PARTS
    train_dataset: CurriculumPrompts

    def __init__(self, *args, levels: dict[str, int] | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.levels = dict(levels or {})
        # One row for each level: sum of losses, and their number.
        self._level_losses = torch.zeros(len(self.levels), 2, dtype=torch.float32, device=self.args.device)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)  # type: ignore[arg-type]

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = [*(self._signature_columns or ()), "path_length"]  # type: ignore[assignment]

    def model_inputs(self, batch: Mapping[str, torch.Tensor], training: bool) -> dict[str, torch.Tensor]:
        """The columns of a batch that the model is given; it learns from blocks' labels only where it is trained."""
        left_out = {"path_length"} if self.args.dense_labels and training else {"path_length", "block_targets"}
        return {name: values for name, values in batch.items() if name not in left_out}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        path_length, labels = inputs.get("path_length"), inputs["labels"]
        inputs = self.model_inputs(inputs, model.training)
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if model.training:
            self._note_levels(outputs.logits.detach(), labels, path_length)
        return (loss, outputs) if return_outputs else loss

    def _note_levels(self, logits: torch.Tensor, labels: torch.Tensor, path_length: torch.Tensor | None) -> None:
        if not self.levels:
            return
        config = self.accelerator.unwrap_model(self.model).config
        objective = getattr(config, "objective", "binary_cross_entropy")
        labels = labels.view_as(logits)
        losses = label_losses(logits, labels, objective)
        counted = labels.ne(IGNORED_LABEL).to(losses)
        if path_length is None:
            losses, counted = (values.transpose(0, 1).flatten(1).sum(1) for values in (losses, counted))
            level = torch.arange(len(losses), device=losses.device)
        else:
            losses, counted, level = losses.squeeze(-1), counted.squeeze(-1), path_length
        numbers = torch.tensor(list(self.levels.values()), device=losses.device)
        member = (numbers[:, None] == level).to(losses)
        self._level_losses += torch.stack((member @ losses, member @ counted), dim=1)

    def whole_split(self, output: EvalLoopOutput) -> tuple[Any, float | None]:
        """The loss as a mean over labels."""
        logits, labels = (torch.as_tensor(values) for values in (output.predictions, output.label_ids))
        config = self.accelerator.unwrap_model(self.model).config
        losses = label_losses(logits.view_as(labels), labels, getattr(config, "objective", "binary_cross_entropy"))
        loss = losses.double().sum() / labels.ne(IGNORED_LABEL).sum().clamp(min=1)
        return output.predictions, loss.item()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            step = max(0, self.state.global_step - 1)
            logs |= {name: float(value) for name, value in self.train_dataset.curriculum.at(step).items()}
            if self.levels:
                sums, counts = self.accelerator.reduce(self._level_losses).cpu().unbind(dim=1)
                logs |= {
                    f"loss_{name}": total / count
                    for name, total, count in zip(self.levels, sums.tolist(), counts.tolist(), strict=True)
                    if count > 0
                }
                self._level_losses.zero_()
        super().log(logs, start_time)


def longest_prompt_metric(metric: str) -> Callable[[EvalPrediction], dict[str, float]]:
    """A `compute_metrics` for the Trainer that looks at the last prediction of every prompt.

    Args:
        metric: `"accuracy"`: the share of right signs, or `"error"`: the mean squared error against the labels.
    """

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        labels = np.asarray(prediction.label_ids)
        logits = np.asarray(prediction.predictions).reshape(labels.shape)
        if labels.ndim > 1:
            logits, labels = logits[:, -1], labels[:, -1]
        if metric == "accuracy":
            return {"accuracy": float(((logits > 0) == (labels > 0)).mean())}
        return {"error": float(np.square(logits - labels, dtype=np.float64).mean())}

    return compute
