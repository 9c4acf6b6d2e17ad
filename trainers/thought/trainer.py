"""The Trainer of models that think in ticks: the loss over ticks and its parts, and evaluation at every tick."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import nn
from transformers import EvalPrediction
from transformers.trainer_utils import EvalLoopOutput

from ..arguments import RunTrainingArguments
from ..run_trainer import RunTrainer
from .evaluation import (
    Thoughts,
    calibration,
    confidences_and_hits,
    ctc_losses,
    mean_loss,
    think_by_spelling,
    think_in_ticks,
)

LOSS_PARTS = ("best_tick", "certain_tick")


@dataclass
class ThoughtTrainingArguments(RunTrainingArguments):
    """[`RunTrainingArguments`]; the loss over ticks and its curriculum are fields of the model's configuration."""


class ThoughtTrainer(RunTrainer):
    """The Trainer for Continuous Thought Machines, and for the networks they are compared with.

    - **Loss.** With `loss="ticks"` the model's own: the mean of the cross entropy at each sample's best tick and at its
      most certain tick (arXiv 2505.05522), for mazes over the prefix that its curriculum has reached. Both
      parts are logged as `best_tick` and `certain_tick`. With `loss="ctc"` connectionist temporal classification of the
      answer that the ticks spell together.
    - **Evaluation.** `evaluate` and `predict` look at every tick: `predictions` is a
      [`Thoughts`][trainers.thought.evaluation.Thoughts]. `eval_loss` is the mean over all labels of the split, whatever
      the batches and processes they were spread over (the library's is a mean of batch means).

    Args:
        loss (`str`, *optional*, defaults to `"ticks"`):
            `"ticks"` or `"ctc"`.
        forward_kwargs (`dict`, *optional*):
            Arguments of the model's forward pass at evaluation: `iterations`, `certainty_threshold`.
        kwargs:
            As for `transformers.Trainer`.
    """

    args: ThoughtTrainingArguments
    loss_parts = LOSS_PARTS

    def __init__(
        self,
        *args,
        loss: Literal["ticks", "ctc"] = "ticks",
        forward_kwargs: dict[str, Any] | None = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.loss = loss
        self.forward_kwargs = dict(forward_kwargs or {})

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.loss == "ctc":
            inputs = dict(inputs)
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            total = labels.numel() if num_items_in_batch is None else num_items_in_batch
            loss = ctc_losses(outputs.predictions, labels).sum() / total * self.process_scale(num_items_in_batch)
            return (loss, outputs) if return_outputs else loss
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    @torch.no_grad()
    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ):
        """Think about a batch.

        Returns:
            `(None, thoughts, labels)` with the fields of [`Thoughts`][trainers.thought.evaluation.Thoughts] in order.
        """
        inputs = self._prepare_inputs(inputs)
        labels = inputs.pop("labels")
        module = self.accelerator.unwrap_model(model)
        with self.compute_loss_context_manager():
            outputs = module(**inputs, **self.forward_kwargs)
        if self.loss == "ctc":
            return None, think_by_spelling(outputs, labels), labels
        flat = labels.reshape(len(labels), -1)
        return None, think_in_ticks(outputs, labels, module.losses_by_tick(outputs.predictions, flat)), labels

    def whole_split(self, output: EvalLoopOutput) -> tuple[Any, float | None]:
        """Thoughts, and the loss as a mean over labels."""
        thoughts = Thoughts(*cast(tuple[np.ndarray, ...], output.predictions))
        return thoughts, mean_loss(thoughts)


def thought_metric(loss: Literal["ticks", "ctc"] = "ticks") -> Callable[[EvalPrediction], dict[str, float]]:
    """A `compute_metrics` for the Trainer: accuracy of whole answers and of positions at the answer's tick, accuracy of
    whole answers at the last tick, calibration error at the answer's tick, mean ticks used and mean tick of the answer.

    Args:
        loss: that of the Trainer.
    """

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        thoughts = Thoughts(*cast(tuple[np.ndarray, ...], prediction.predictions))
        labels = cast(np.ndarray, prediction.label_ids).reshape(len(thoughts.right), -1)
        answers = np.arange(len(thoughts.right)), thoughts.answer_ticks - 1
        return {
            "accuracy": float(thoughts.right[answers].mean()),
            "position_accuracy": float(thoughts.share[answers].mean()),
            "last_tick_accuracy": float(thoughts.right[:, -1].mean()),
            "calibration_error": calibration(*confidences_and_hits(thoughts, labels, loss == "ctc"))["ece"],
            "mean_steps": float(thoughts.ticks.mean()),
            "mean_answer_tick": float(thoughts.answer_ticks.mean()),
        }

    return compute
