"""What the Trainers of all kinds of models share: the parts of a loss in the log, the run folder, its checkpoints."""

import contextlib
import math
import os
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from accelerate.utils import find_batch_size, slice_tensors
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, get_last_checkpoint, sort_checkpoints
from transformers.training_args import OptimizerNames
from transformers.utils import logging

from .arguments import RunTrainingArguments
from .errors import UserError
from .files import CHECKSUMS_NAME, damaged_file, write_checksums, writing_to
from .optimization import layerwise_parameter_groups

logger = logging.get_logger(__name__)

TRAINER_STATE_NAME = "trainer_state.json"
NEVER = 2**62
IGNORED_LABEL = -100


class RunTrainer(Trainer):
    """`transformers.Trainer` in a run folder.

    - `layerwise_lr_decay` makes the learning rate fall from the head down, see [`layerwise_parameter_groups`].
    - The parts of the loss that `loss_parts` names are logged beside `loss`, averaged over the same updates and
      processes; a subclass may note others with [`note_loss_part`].
    - Every example of an epoch counts once, on any number of processes, see [`get_batch_samples`].
    - A loss that is not finite ends the training with a [`UserError`] that says at which update and what to change.
      It does so before anything is logged, measured or saved after it. (In fp16 the library's loss scaling skips such
      updates, and training goes on.)
    - A checkpoint knows the checksums of its files, see [`last_complete_checkpoint`], and holds weights that are
      finite numbers. The oldest by their updates are deleted, whatever the clock said when they were written.
    - A file that cannot be written raises an `OSError`, whichever library wrote it.
    - No card but our own is ever written, and only for a finished run.
    - The best checkpoint is found again if the run's folder was moved in between.
    - Training that had come to its end when it was interrupted makes no further update when it is resumed.
    """

    args: RunTrainingArguments
    loss_parts: ClassVar[tuple[str, ...]] = ()
    """Parts of the loss that the model's output holds as `{name}_loss`."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._loss_parts: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros((), device=self.args.device))
        self._loss_parts_since: int | None = None
        # The first update whose loss was not finite, kept on the device: looking at every loss would wait for it.
        self._broken_update = torch.full((), NEVER, device=self.args.device)
        self._repeated_batch: Mapping[str, Any] | None = None
        self.in_repeated_batch = False
        self._had_ended = False

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        if self.optimizer is not None or self.args.layerwise_lr_decay is None:
            return super().create_optimizer(model)
        model = self.model if model is None else model
        optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
        if not isinstance(optimizer_class, type) or {"params", "model", "optimizer_dict"} & options.keys():
            name = OptimizerNames(self.args.optim).value
            raise UserError(f"training.layerwise_lr_decay: {name} makes its own parameter groups")
        groups = layerwise_parameter_groups(
            model,
            self.args.learning_rate,
            self.args.weight_decay,
            self.args.layerwise_lr_decay,
            self.get_decay_parameter_names(model),
        )
        self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        """As the library's, without the examples that accelerate repeats.

        In an epoch's last batch there may be too few examples for all processes, and accelerate fills up with those
        that the epoch began with (`even_batches`; without it the processes with nothing left would keep the others
        waiting). Here they are taken out again, so that the batches of an update hold the same examples on one process
        as on many, and its loss is divided by their labels. A process that is left with none keeps one example to stay
        in step: its labels are ignored, and [`training_step`] lets it count for nothing.
        """
        self._repeated_batch = None
        return super().get_batch_samples(map(self._without_repeats, epoch_iterator), num_batches, device)

    def _without_repeats(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        processes = self.accelerator.num_processes
        is_last = self.accelerator.gradient_state.end_of_dataloader
        if processes == 1 or not is_last or self.args.dataloader_drop_last:
            return batch
        size = find_batch_size(batch)
        left = len(self.train_dataset) % (size * processes)  # type: ignore[arg-type]
        if left == 0:
            return batch
        # The examples fill one process's batch after the other's.
        own = min(max(left - size * self.accelerator.process_index, 0), size)
        batch = slice_tensors(batch, slice(max(own, 1)))
        if own == 0:
            batch["labels"] = torch.full_like(batch["labels"], IGNORED_LABEL)  # type: ignore[index]
            self._repeated_batch = batch
        return batch

    def process_scale(self, num_items_in_batch: torch.Tensor | int | None) -> int:
        """What a process multiplies its share of a loss with, so that the mean over processes is the whole.

        A loss that was divided by the count over all processes calls for a sum over them, and both the averaged
        gradients and the log take their mean.
        """
        counted_together = num_items_in_batch is not None and self.args.average_tokens_across_devices
        return self.accelerator.num_processes if counted_together else 1

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if model.training:
            for name in self.loss_parts:
                part = outputs.get(f"{name}_loss")
                if part is not None:
                    self.note_loss_part(name, part * self.process_scale(num_items_in_batch))
        return (loss, outputs) if return_outputs else loss

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As the library's, over all predictions, with `{metric_key_prefix}_loss` as [`whole_split`] gives it."""
        output = super().evaluation_loop(dataloader, description, False, ignore_keys, metric_key_prefix)
        predictions, loss = self.whole_split(output)
        metrics = dict(output.metrics or {})
        if loss is not None:
            metrics[f"{metric_key_prefix}_loss"] = loss
        return output._replace(predictions=predictions, metrics=metrics)

    def whole_split(self, output: EvalLoopOutput) -> tuple[Any, float | None]:
        """The predictions of a split that are handed on, and its loss, whatever its batches were.

        Args:
            output: the library's, with what `prediction_step` returned for all batches.

        Returns:
            Predictions and loss; `None` leaves the library's loss, a mean over batches.
        """
        return output.predictions, None

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.in_repeated_batch = inputs is self._repeated_batch
        if self.in_repeated_batch:
            # Every part of the loss is divided by it, and so is every gradient.
            num_items_in_batch = torch.full((), math.inf, device=self.args.device)
        loss = super().training_step(model, inputs, num_items_in_batch)
        update = torch.where(torch.isfinite(loss), NEVER, self.state.global_step + 1)
        self._broken_update = torch.minimum(self._broken_update, update)
        return loss

    def _stop_if_broken(self) -> None:
        if self.args.fp16:
            return
        update = int(self.accelerator.gather(self._broken_update.reshape(1)).min())
        if update < NEVER:
            self._end_broken("the loss is not a finite number", update)

    def stop_if_weights_are_broken(self) -> None:
        """Look for weights that are not finite: an update may break them although its own loss still was finite.

        Raises:
            UserError: if there are any, on every process.
        """
        whole = torch.ones((), dtype=torch.bool, device=self.args.device)
        assert self.model is not None  # a Trainer is given one
        for parameter in self.model.parameters():
            local = parameter.detach()
            local = local.to_local() if hasattr(local, "to_local") else local  # of a model that processes share
            whole &= torch.isfinite(local).all().to(whole.device)
        if not self.accelerator.gather(whole.reshape(1)).all():
            self._end_broken("weights are not finite numbers", self.state.global_step)

    def _end_broken(self, what: str, update: int) -> None:
        raise UserError(
            f"training: {what} at update {update}; lower training.learning_rate (now {self.args.learning_rate:g}) or "
            f"training.max_grad_norm (now {self.args.max_grad_norm:g}), or use a longer training.warmup_steps; "
            "checkpoints from before it are kept"
        )

    def _maybe_log_save_evaluate(self, *args, **kwargs) -> None:
        if self.control.should_log or self.control.should_evaluate or self.control.should_save:
            self._stop_if_broken()
        if self.control.should_save:
            self.stop_if_weights_are_broken()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _save_rng_state(self, output_dir: str) -> None:
        # The last thing that every process saves; the trainer's state, which makes a checkpoint complete, comes after.
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            written = (path for path in Path(output_dir).iterdir() if path.name != CHECKSUMS_NAME)
            write_checksums(Path(output_dir), (path for path in written if path.is_file()))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        with writing_to(Path(output_dir or self.run_dir)):
            super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model, trial) -> None:
        folder = self.run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        # The library goes by dates when it deletes old checkpoints; a clock that was set back would turn them around.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            with writing_to(folder):
                super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save and (folder / CHECKSUMS_NAME).exists():
            write_checksums(folder, [folder / TRAINER_STATE_NAME])
        self.delete_old_checkpoints()

    def delete_old_checkpoints(self) -> None:
        """Keep `save_total_limit` checkpoints, the newest and the best one among them."""
        if not self.args.save_total_limit or not self.args.should_save:
            return
        best = Path(self.state.best_model_checkpoint or "").name
        checkpoints = [Path(path) for path in sort_checkpoints(str(self.run_dir))]
        spare = [path for path in checkpoints[:-1] if path.name != best]
        for path in spare[: max(0, len(checkpoints) - self.args.save_total_limit)]:
            with contextlib.suppress(OSError):  # what cannot be deleted takes room, and harms nothing
                delete_checkpoint(path)

    def note_loss_part(self, name: str, part: torch.Tensor) -> None:
        """Add one micro-batch's share of a part of the loss (a scalar), unweighted, to what is logged under `name`."""
        if self._loss_parts_since is None:
            self._loss_parts_since = self.state.global_step
        self._loss_parts[name] += part.detach().float()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._loss_parts and self._loss_parts_since is not None:
            updates = max(1, self.state.global_step - self._loss_parts_since)
            self._loss_parts_since = None
            for name, total in self._loss_parts.items():
                logs[name] = self.accelerator.gather(total.reshape(1)).mean().item() / updates
                total.zero_()
        super().log(logs, start_time)

    def create_model_card(self, *args, **kwargs) -> None:
        """Write the card of a finished run; the library's own template is never used.

        `Trainer` calls this when it pushes. Before the run is finished there are no results to tell, and no card.
        """
        from model_cards.card import write_card

        if self.is_world_process_zero() and (self.run_dir / "metrics.json").exists():
            write_card(self.run_dir)

    @property
    def run_dir(self) -> Path:
        """The run's output folder."""
        assert self.args.output_dir is not None  # the arguments fill in a default
        return Path(self.args.output_dir)

    def _issue_warnings_after_load(self, load_result) -> None:
        # A tied weight is stored once; the library would report its other names as missing.
        tied = getattr(self.model, "all_tied_weights_keys", {})
        load_result.missing_keys[:] = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(load_result)

    def _init_training_state(self, *args, **kwargs) -> tuple[int, int]:
        trained = super()._init_training_state(*args, **kwargs)
        # The last checkpoint may be one from within an epoch, whose rest the library would train on.
        callbacks = cast(dict[str, Any], self.state.stateful_callbacks)
        stopping = callbacks.get("EarlyStoppingCallback", {}).get("attributes", {})
        without_gain, patience = stopping.get("early_stopping_patience_counter", 0), self.args.early_stopping_patience
        self._had_ended = self.state.global_step >= self.state.max_steps or (
            patience is not None and without_gain >= patience
        )
        if self.args.load_best_model_at_end and self.state.best_global_step:
            # The state stores the path the run had when the checkpoint was written; the folder may have moved since.
            best = self.run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
            self.state.best_model_checkpoint = str(best)
            self._check_best(best)  # now, and not when everything is trained
        return trained

    def _run_epoch(self, *args, **kwargs) -> None:
        if self._had_ended:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _check_best(self, folder: Path) -> None:
        if not folder.exists():
            raise UserError(f"{folder}: the best checkpoint of the run is gone; restore it, or use --overwrite")
        damaged = damaged_file(folder)
        if damaged is not None:
            raise UserError(
                f"{folder / damaged}: damaged since it was written, and the best weights of the run with it; "
                "--overwrite starts again"
            )

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None  # the library calls this only if there is one
        self._check_best(Path(self.state.best_model_checkpoint))
        super()._load_best_model()


def delete_checkpoint(folder: Path) -> None:
    """Delete a checkpoint; what makes it complete goes first, so that none that is half gone is taken for whole."""
    (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
    shutil.rmtree(folder)


def last_complete_checkpoint(run_dir: str | os.PathLike) -> str | None:
    """The newest checkpoint of a run that was written to its end and is undamaged; others are deleted with a warning.

    A process killed while it saves leaves a folder without a readable `trainer_state.json`, which is written last. A
    file that was cut or changed later no longer has the checksum that the checkpoint notes.

    Args:
        run_dir: a run's output folder.

    Returns:
        The checkpoint's path, or `None` if the run has none yet.
    """
    while (checkpoint := get_last_checkpoint(str(run_dir))) is not None:
        try:
            TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME))
            damaged = damaged_file(Path(checkpoint))
            if damaged is None:
                return checkpoint
            reason = f"{damaged} is damaged"
        except (OSError, ValueError, TypeError):
            reason = "it was not written to its end"
        logger.warning(f"{checkpoint} is dropped: {reason}; the run goes on from the one before")
        delete_checkpoint(Path(checkpoint))
    return None
