"""What a finished run costs: multiply-adds of a forward pass, which are exact, and latency, which is not."""

import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, DataCollatorForSeq2Seq, PreTrainedModel
from transformers.utils import logging

from ..arguments import parse_recipe
from ..tasks import Task

COUNTED_EXAMPLES = 16
BATCH = 32


def forward_flops(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> int:
    """Floating-point operations of one forward pass without gradients.

    Matrix products, convolutions and attention are counted, two operations a multiply-add; sums, norms and activations
    are not. For a model that stops early only the steps taken count.
    """
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs)
    return counter.get_total_flops()


def _seconds(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> float:
    begun = time.perf_counter()
    model.generate(**inputs)  # type: ignore[operator]
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def measure(run: Path, recipe: Path) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Cost of a run's model on the first examples of its test split.

    Args:
        run: the run folder of a sequence-to-sequence model.
        recipe: the recipe of its cell, which knows where the data are.

    Returns:
        `({"flops_per_example", "examples"}, {"latency_seconds", "batch_seconds_per_example", "batch", "device"})`:
        operations of one forward pass over source and target, mean over single examples, so that no padding counts;
        median seconds to generate one answer alone, and seconds per answer in a batch. `None` for another kind of
        model.
    """
    parsed = parse_recipe([str(recipe)], prog="python -m trainers.train")
    task = parsed.kind.run.make_task(parsed.task)
    if not isinstance(task, Task):
        return None
    tokenizer = AutoTokenizer.from_pretrained(run)
    shows_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = AutoModelForSeq2SeqLM.from_pretrained(run).eval()
    finally:
        if shows_bars:
            logging.enable_progress_bar()
    accelerated = torch.accelerator.is_available() and not parsed.training.use_cpu
    model = model.to(torch.accelerator.current_accelerator() if accelerated else "cpu")  # type: ignore[arg-type]
    examples = task.rows("test")[:BATCH]
    features = [task.encode(example, tokenizer) for example in examples]
    collate = DataCollatorForSeq2Seq(tokenizer)

    def batch(chosen: list[dict[str, list[int]]], labels: bool) -> dict[str, torch.Tensor]:
        rows = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in chosen]
        inputs = collate(rows)
        names = ("input_ids", "attention_mask", *(("labels",) if labels else ()))
        return {name: inputs[name].to(model.device) for name in names}

    singles = features[:COUNTED_EXAMPLES]
    flops = [forward_flops(model, batch([row], labels=True)) for row in singles]
    _seconds(model, batch(features[:1], labels=False))  # the first call sets up what later ones find
    alone = [_seconds(model, batch([row], labels=False)) for row in singles]
    together = median(_seconds(model, batch(features, labels=False)) for _ in range(3)) / len(features)
    return (
        {"flops_per_example": sum(flops) / len(flops), "examples": len(flops)},
        {
            "latency_seconds": median(alone),
            "batch_seconds_per_example": together,
            "batch": len(features),
            "device": model.device.type,
        },
    )
