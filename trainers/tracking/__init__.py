"""See inside a model while it trains, and take a trained one apart.

[`InternalsTracker`] is a `TrainerCallback` and a context manager: every so many update steps it measures attention,
queries, keys and values, the residual stream, gradients and updates, with memory that does not grow.
[`TransformerAnalyzer`] measures the same on given batches. Both work on any `PreTrainedModel` whose attention goes
through the library's attention interface; what they cannot reproduce exactly they name instead of showing it.

How a training run uses it:

    tracker = make_tracker(arguments.tracking, model, probe_batch, tokenizer, run_folder)   # None if tracking is off
    trainer.add_callback(tracker)
    trainer.train(...)
    write_internals(tracker, run_folder, trainer.state.log_history)
"""

from ..figures import save_figure
from .analyzer import TransformerAnalyzer
from .arguments import TrackingArguments
from .attention import attention_rollout, attention_statistics, head_class, head_similarity
from .gradients import gradient_flow
from .linear_probe import probe_layers
from .report import make_report, write_internals
from .residual import direct_logit_attribution
from .tracker import InternalsTracker, make_tracker

__all__ = [
    "InternalsTracker",
    "TrackingArguments",
    "TransformerAnalyzer",
    "attention_rollout",
    "attention_statistics",
    "direct_logit_attribution",
    "gradient_flow",
    "head_class",
    "head_similarity",
    "make_report",
    "make_tracker",
    "probe_layers",
    "save_figure",
    "write_internals",
]
