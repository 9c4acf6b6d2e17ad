"""What the Trainers of all kinds of models share: the parts of a loss in the log, the run folder, its checkpoints."""

import os
import shutil
from collections import defaultdict
from pathlib import Path

import torch
from transformers import Trainer, TrainerState
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from .errors import UserError

logger = logging.get_logger(__name__)


class RunTrainer(Trainer):
    """`transformers.Trainer` in a run folder.

    - The parts of a loss that a subclass notes with [`note_loss_part`] are logged beside `loss`, averaged over the same
      updates and processes.
    - No card but our own is ever written, and only for a finished run.
    - The best checkpoint is found again if the run's folder was moved in between.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._loss_parts: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros((), device=self.args.device))
        self._loss_parts_since: int | None = None

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

    def _load_best_model(self) -> None:
        # The state stores the path the run had when the checkpoint was written; the folder may have moved since.
        assert self.state.best_model_checkpoint is not None  # the library calls this only if there is one
        stored = Path(self.state.best_model_checkpoint)
        moved = self.run_dir / stored.name
        if not stored.exists():
            if not moved.exists():
                raise UserError(f"{moved}: the best checkpoint of the run is gone; restore it, or use --overwrite")
            self.state.best_model_checkpoint = str(moved)
        super()._load_best_model()


def last_complete_checkpoint(run_dir: str | os.PathLike) -> str | None:
    """The newest checkpoint of a run that was written to its end; unfinished ones are deleted.

    A process killed while it saves leaves a folder without a readable `trainer_state.json`, which is written last.

    Args:
        run_dir: a run's output folder.

    Returns:
        The checkpoint's path, or `None` if the run has none yet.
    """
    while (checkpoint := get_last_checkpoint(str(run_dir))) is not None:
        try:
            TrainerState.load_from_json(os.path.join(checkpoint, "trainer_state.json"))
            return checkpoint
        except (OSError, ValueError, TypeError):
            logger.warning(f"{checkpoint} was not written to its end and is dropped")
            shutil.rmtree(checkpoint)
    return None
