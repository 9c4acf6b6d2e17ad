"""The Trainer of every sequence-to-sequence model here: a loss of several parts, and evaluation by generation."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from transformers.trainer_utils import EvalLoopOutput

from .arguments import RunTrainingArguments
from .run_trainer import RunTrainer

LOSS_PARTS = ("cross_entropy", "orthogonality", "step_cost", "halting")


@dataclass
class ReasoningTrainingArguments(RunTrainingArguments):
    """[`RunTrainingArguments`] with the schedule of the step cost."""

    step_cost_start: float = field(
        default=0.0,
        metadata={"help": "Share of training, in [0, 1], after which the cost of reasoning steps sets in."},
    )
    step_cost_ramp: float = field(
        default=0.0,
        metadata={
            "help": "Share of training, in [0, 1], over which the cost grows linearly from 0 to the configuration's "
            "`step_cost_weight`."
        },
    )

    @classmethod
    def ranges(cls):
        return dict.fromkeys(("step_cost_start", "step_cost_ramp"), (lambda value: 0 <= value <= 1, "lie in [0, 1]"))


class AdaptiveReasoningTrainer(RunTrainer):
    """The Trainer for models that reason in steps, and for the Transformers they are compared with.

    - **Loss.** The model returns cross-entropy, orthogonality and step-cost parts, each scaled so that parts summed
      over the micro-batches of one update are the parts of the whole batch, whatever the numbers of targets in each.
      Every part is logged under its name, unweighted, beside `loss`.
    - **Step cost.** Its weight follows a schedule over the update steps: 0 until `step_cost_start`, then a linear ramp
      of length `step_cost_ramp` up to the configuration's `step_cost_weight`. It depends on the step alone, so a
      resumed run continues it exactly.
    - **Evaluation.** `evaluate` and `predict` generate; of a model without a decoder they take what one forward pass
      predicts at the positions of the input, up to the first end-of-sequence token. `predictions` is the tuple
      `(tokens, steps)` with the answers' tokens `(examples, length)` padded with -100, and the reasoning steps of each
      example `(examples,)`, or -1 for a model without steps. Nothing is teacher-forced except `eval_loss`, the mean
      cross-entropy of all targets of the split, whatever the batches and processes they were spread over (the library's
      is a mean of batch means).

    Args:
        generation_kwargs (`dict`, *optional*):
            Arguments of `generate` at evaluation, for example `num_beams` or `max_reasoning_steps`.
        kwargs:
            As for `transformers.Trainer`.
    """

    args: ReasoningTrainingArguments
    loss_parts = LOSS_PARTS

    def __init__(self, *args, generation_kwargs: dict[str, Any] | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.generation_kwargs = dict(generation_kwargs or {})
        config = self.accelerator.unwrap_model(self.model).config
        self._step_cost_weight = getattr(config, "step_cost_weight", None)
        self._num_sequences_in_batch: torch.Tensor | int | None = None

    @property
    def reasons_in_steps(self) -> bool:
        """Whether the model has a step cost to schedule."""
        return self._step_cost_weight is not None

    def step_cost_weight(self) -> float:
        """Weight of the step cost at the present update step."""
        if self._step_cost_weight is None:
            return 0.0
        start = self.args.step_cost_start * self.state.max_steps
        ramp = self.args.step_cost_ramp * self.state.max_steps
        past = self.state.global_step - start
        if past < 0:
            return 0.0
        return float(self._step_cost_weight * (min(1.0, past / ramp) if ramp > 0 else 1.0))

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        batch_samples, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        own = (batch for batch in batch_samples if batch is not self._repeated_batch)
        count = torch.tensor(sum(len(batch["labels"]) for batch in own), device=device)
        if self.args.world_size > 1 and self.args.average_tokens_across_devices:
            count = self.accelerator.gather(count).sum()
        self._num_sequences_in_batch = count
        return batch_samples, num_items_in_batch

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.reasons_in_steps:
            inputs = {**inputs, "step_cost_weight": self.step_cost_weight()}
            if num_items_in_batch is not None:
                inputs["num_sequences_in_batch"] = math.inf if self.in_repeated_batch else self._num_sequences_in_batch
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self.reasons_in_steps and self._step_cost_weight:
            logs["step_cost_weight"] = self.step_cost_weight()
        super().log(logs, start_time)

    @torch.no_grad()
    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ):
        """Generate an answer for every example of a batch.

        Returns:
            `(None, (tokens, steps, losses, targets), labels)`: the generated tokens `(batch, length)` without the start
            token; the steps used `(batch,)`; the teacher-forced cross-entropy of each example, summed over its targets
            `(batch,)`, and the number of these `(batch,)`; the labels `(batch, target_len)`. `whole_split` makes
            the loss of the split from the last two, and hands on the first two.
        """
        inputs = self._prepare_inputs(inputs)
        labels = inputs.get("labels")
        module = self.accelerator.unwrap_model(model)
        source = {name: inputs[name] for name in ("input_ids", "attention_mask") if name in inputs}
        encoder_kwargs = {}
        if "max_reasoning_steps" in self.generation_kwargs:
            encoder_kwargs["max_reasoning_steps"] = self.generation_kwargs["max_reasoning_steps"]
        if not module.config.is_encoder_decoder:
            return self._answers_in_one_pass(module, source, labels, encoder_kwargs)
        with self.compute_loss_context_manager():
            encoder_outputs = module.get_encoder()(**source, **encoder_kwargs)
            losses = targets = torch.zeros(len(source["input_ids"]), device=source["input_ids"].device)
            if labels is not None:
                mask = source.get("attention_mask")
                logits = module(attention_mask=mask, encoder_outputs=encoder_outputs, labels=labels).logits
                losses = nn.functional.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none").sum(1)
                targets = labels.ne(-100).sum(1)
            generate_kwargs = {k: v for k, v in self.generation_kwargs.items() if k not in encoder_kwargs}
            tokens = module.generate(
                encoder_outputs=encoder_outputs, attention_mask=source.get("attention_mask"), **generate_kwargs
            )[:, 1:]
        pad_token_id = module.generation_config.pad_token_id
        tokens = torch.where(tokens == pad_token_id, -100, tokens)
        steps = getattr(encoder_outputs, "reasoning_steps", None)
        if steps is None:
            steps = torch.full((tokens.shape[0],), -1, device=tokens.device)
        return None, (tokens, steps, losses, targets), labels

    def _answers_in_one_pass(self, module, source, labels, options):
        """As `prediction_step`, of a model that predicts a token at every position of its input."""
        with self.compute_loss_context_manager():
            outputs = module(**source, **options)
        tokens = outputs.logits.argmax(dim=-1)
        losses = targets = torch.zeros(len(tokens), device=tokens.device)
        if labels is not None:
            logits = outputs.logits[:, : labels.shape[1]].float()
            losses = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none").sum(1)
            targets = labels.ne(-100).sum(1)
        ends = tokens == module.config.eos_token_id
        after_end = ends.cumsum(dim=1) > ends.long()
        tokens = torch.where(after_end | (tokens == module.config.pad_token_id), -100, tokens)
        return None, (tokens, outputs.reasoning_steps, losses, targets), labels

    def whole_split(self, output: EvalLoopOutput) -> tuple[Any, float | None]:
        """Tokens and steps, and the loss as a mean over targets."""
        tokens, steps, losses, targets = cast(tuple[np.ndarray, ...], output.predictions)
        loss = float(losses.sum(dtype=np.float64) / targets.sum()) if targets.sum() > 0 else None
        return (tokens, steps), loss
