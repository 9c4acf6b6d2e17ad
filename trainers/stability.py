"""Stops a training whose loss explodes, and says what to change."""

import math
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .errors import UserError


class ExplodingLoss(TrainerCallback):
    """Ends a run at the first logged loss that is not a number or far above the first one.

    Training on would cost time and could not bring the weights back. The library's Trainer leaves losses that are not
    finite out of what it logs, so the norm of the gradient is looked at as well.

    Args:
        factor: how many times the first logged loss is too much.

    Raises:
        UserError: from `on_log`; names the update, the loss, and the settings that calm the training.
    """

    def __init__(self, factor: float = 5.0):
        self.factor = factor
        self.first: float | None = None
        self.last: tuple[int, float] | None = None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs:
            return
        loss, norm = float(logs["loss"]), float(logs.get("grad_norm") or 0.0)
        if self.first is None and math.isfinite(loss):
            self.first = loss
        # In float16 an infinite gradient is how loss scaling finds its scale; that update is skipped.
        finite = math.isfinite(loss) and (math.isfinite(norm) or args.fp16)
        if finite and self.first is not None and loss <= self.factor * max(self.first, 1.0):
            self.last = (state.global_step, loss)
            return
        found = f"loss {loss:.4g}" if not math.isfinite(loss) or finite else f"gradient norm {norm:.4g}"
        before = "" if self.last is None else f"; {self.last[1]:.4g} at update {self.last[0]}"
        raise UserError(
            f"training.learning_rate: the loss exploded by update {state.global_step} ({found}{before}); "
            f"{self.advice(args, getattr(model, 'config', None))}"
        )

    @staticmethod
    def advice(args: TrainingArguments, config: Any) -> str:
        """What to change, in the order of what it usually takes."""
        changes = [f"a learning_rate below {args.learning_rate:g}", f"a warm-up longer than {args.warmup_steps:g}"]
        reason = ""
        ratio = getattr(config, "expected_update_ratio", None)
        if ratio is not None and ratio > 1:
            reason = (
                f"connections of rank {config.connection_rank} between {config.num_slots} slots start with updates of "
                f"{ratio:.1f} times the state, so "
            )
            changes[:0] = ["model.initial_update_ratio 0.5", "a smaller model.connection_rank"]
        if not args.max_grad_norm:
            changes.append("training.max_grad_norm 1.0")
        return f"{reason}try {', '.join(changes[:-1])} or {changes[-1]}"
