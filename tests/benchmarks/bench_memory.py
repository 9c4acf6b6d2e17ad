"""
Memory of a training step with and without activation checkpointing, and what half precision does to the loss:

    python -m tests.benchmarks.bench_memory [vanilla_transformer …] [--updates 5]

One line for each architecture and measure. Peak memory is what a forward and backward pass adds to the resident memory
of a process that holds the model and its gradients, each form in a process of its own on one thread (Linux). "bfloat16"
and "float16" are autocast over weights in float32, float16 with a scaled loss. The losses are those of AdamW on two
samples of that batch from the same weights; the difference is the largest over the updates, relative to float32.
"""

import argparse
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTimeSeriesPrediction,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

import hf_models  # noqa: F401 - registers the architectures with the Auto classes

from .measuring import checkpointing, in_new_process, note, note_memory, peak_of

TEXT = {
    "vocab_size": 1000,
    "hidden_size": 128,
    "num_decoder_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "dropout": 0.0,
}
TICKS = {
    "iterations": 50,
    "d_model": 128,
    "d_input": 64,
    "heads": 4,
    "n_synch_out": 32,
    "n_synch_action": 32,
    "synapse_depth": 1,
    "memory_length": 10,
    "memory_hidden_dims": 8,
    "backbone_type": "parity_backbone",
    "positional_embedding_type": "custom-rotational-1d",
    "prediction_reshaper": [16, 2],
}
CONTEXT = {"n_dims": 20, "hidden_size": 128, "num_hidden_layers": 12, "num_attention_heads": 4}
# Auto class, settings, batch size. All without dropout, so that the precisions see the same network.
CASES: dict[str, tuple[Any, dict[str, Any], int]] = {
    "vanilla_transformer": (
        AutoModelForSeq2SeqLM,
        {**TEXT, "num_hidden_layers": 4, "intermediate_size": 512},
        16,
    ),
    "connection_transformer": (
        AutoModelForSeq2SeqLM,
        {
            **TEXT,
            "num_slots": 64,
            "connection_rank": 16,
            "max_reasoning_steps": 6,
        },
        16,
    ),
    "continuous_thought_machine": (AutoModelForTokenClassification, {**TICKS, "dropout": 0.0}, 32),
    "hyper_continuous_thought_machine": (
        AutoModelForTokenClassification,
        {**TICKS, "synapse_depth": 3, "dropout": 0.0},
        32,
    ),
    "in_context_transformer": (AutoModelForTimeSeriesPrediction, {**CONTEXT, "max_points": 41, "dropout": 0.0}, 32),
    "low_rank_in_context_transformer": (
        AutoModelForSequenceClassification,
        {**CONTEXT, "num_blocks": 20, "block_size": 4, "dropout": 0.0},
        16,
    ),
}
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
LEARNING_RATE = 3e-4


def make_model(name: str, **changes: Any) -> PreTrainedModel:
    """The architecture with random weights, always the same, in training mode.

    Args:
        changes: settings that differ from those of `CASES`.
    """
    auto_class, settings, _ = CASES[name]
    torch.manual_seed(0)
    return auto_class.from_config(AutoConfig.for_model(name, **settings | changes)).train()


def make_batch(name: str) -> dict[str, torch.Tensor]:
    """Random inputs and labels, always the same."""
    auto_class, settings, size = CASES[name]
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(size, *shape, generator=generator)

    def integers(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, (size, *shape), generator=generator)

    if auto_class is AutoModelForSeq2SeqLM:
        length = settings["max_position_embeddings"]
        return {
            "input_ids": integers(settings["vocab_size"], length),
            "labels": integers(settings["vocab_size"], length),
        }
    if auto_class is AutoModelForTokenClassification:
        length, classes = settings["prediction_reshaper"]
        return {"input_values": integers(2, length) * 2.0 - 1, "labels": integers(classes, length)}
    if auto_class is AutoModelForTimeSeriesPrediction:
        values = normal(settings["max_points"])
        return {
            "input_values": normal(settings["max_points"], settings["n_dims"]),
            "context_values": values,
            "labels": values,
        }
    model = make_model(name)
    length = settings["num_blocks"] * settings["block_size"] + model.config.num_tail_tokens
    return {"input_values": normal(length, settings["n_dims"]), "labels": integers(2)}


def peak_memory(name: str, checkpointed: bool, precision: str) -> int:
    """Bytes that a training step adds; to be called in a process of its own."""
    torch.set_num_threads(1)
    model, batch = make_model(name), make_batch(name)
    checkpointing(model, checkpointed)
    # Gradients and the libraries' buffers come with a step on a single sample.
    loss_of(model, {key: value[:1] for key, value in batch.items()}, precision).backward()
    return peak_of(lambda: loss_of(model, batch, precision).backward())


def loss_of(model: PreTrainedModel, batch: dict[str, torch.Tensor], precision: str) -> torch.Tensor:
    dtype = PRECISIONS[precision]
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        return model(**batch).loss


def losses(name: str, precision: str, updates: int) -> list[float]:
    """The losses before each of so many updates."""
    torch.set_num_threads(1)
    model, batch = make_model(name), make_batch(name)
    batch = {key: value[:2] for key, value in batch.items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=precision == "float16")
    found = []
    for _ in range(updates):
        loss = loss_of(model, batch, precision)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("cases", nargs="*", choices=[[], *CASES], default=[], help="architectures, default all")
    parser.add_argument("--updates", type=int, default=5, help="updates over which losses are compared")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.cases or CASES:
        memory = {
            f"{precision}{' checkpointed' if checkpointed else ''}": in_new_process(
                peak_memory, name, checkpointed, precision, method="fork"
            )
            for precision in ("float32", "bfloat16")
            for checkpointed in (False, True)
        }
        note_memory(f"{name}, peak memory of a training step", memory, "float32")
        found = {form: in_new_process(losses, name, form, options.updates, method="fork") for form in PRECISIONS}
        exact, cells, differences = found["float32"], [], {}
        for precision, values in found.items():
            if precision != "float32":
                relative = [abs(value - other) / abs(other) for value, other in zip(values, exact, strict=True)]
                differences[precision] = max(relative)
                cells.append(f"{precision} {values[-1]:.4f} (differs by {max(relative):.3%} at most)")
        what = f"{name}, loss over {options.updates} updates"
        line = f"{what}: float32 {exact[0]:.4f} to {exact[-1]:.4f}, {', '.join(cells)}"
        note(line, what=what, losses=found, differences=differences)


if __name__ == "__main__":
    main()
