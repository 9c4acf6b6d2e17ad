"""What each of two processes does for `test_distributed.py`, all in one launch, since starting them takes longest.

    accelerate launch --config_file recipes/accelerate_configs/multi_cpu.yaml -m tests.trainers.two_processes FOLDER

`FOLDER/commands.json` holds lists of arguments of `trainers.train`; these commands are run one after the other. Then
the models of `SHARDED` are sharded over the processes by FSDP2, and `FOLDER/sharded.json` says what came of it.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from tests.benchmarks.bench_memory import CASES, make_batch, make_model
from trainers.train import main

# Sizes in place of those of `CASES`.
TEXT = {"hidden_size": 16, "num_attention_heads": 2, "num_decoder_layers": 1}
TICKS = {"iterations": 4, "d_model": 32, "d_input": 16}
SHARDED: dict[str, dict[str, Any]] = {
    "vanilla_transformer": {**TEXT, "num_hidden_layers": 1, "intermediate_size": 32},
    "connection_transformer": {
        **TEXT,
        "num_slots": 8,
        "connection_rank": 4,
        "orthogonality_weight": 0.1,
        "step_cost_weight": 0.1,
    },
    "continuous_thought_machine": TICKS,
    "hyper_continuous_thought_machine": TICKS,
    "in_context_transformer": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
    "low_rank_in_context_transformer": {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2},
}


def gradients(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gradient of the loss by parameter, whole."""
    model(**batch).loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in found.items()}


def shard(name: str) -> dict[str, Any]:
    """Shard a model as `accelerate_configs/fsdp2.yaml` says, each process with a sample of its own.

    Returns:
        `modules`: how many were sharded by themselves; `difference`: the largest between a gradient and that of the
        whole model for both samples, relative to the largest gradient.
    """
    model, batch = make_model(name, **SHARDED[name]), make_batch(name)
    samples = [{key: value[index : index + 1] for key, value in batch.items()} for index in range(2)]
    first = {key: grad.clone() for key, grad in gradients(model, samples[0]).items()}
    model.zero_grad()
    second = gradients(model, samples[1])
    expected = {key: (first[key] + second[key]) / 2 for key in first}

    model = make_model(name, **SHARDED[name])
    mesh = init_device_mesh("cpu", (2,))
    parts = [part for part in model.modules() if type(part).__name__ in model._no_split_modules]
    for part in (*parts, model):
        fully_shard(part, mesh=mesh)
    found = gradients(model, samples[distributed.get_rank()])
    assert found.keys() == expected.keys()
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    largest = max(grad.abs().max() for grad in expected.values())
    difference = max((found[key] - expected[key]).abs().max() for key in expected) / largest
    return {"modules": len(parts), "difference": difference.item()}


def run(folder: Path) -> None:
    # A command takes leave of the other process at its end; here more follows.
    with mock.patch("torch.distributed.destroy_process_group"):
        for command in json.loads((folder / "commands.json").read_text()):
            if main(command) != 0:
                sys.exit(f"failed: {command}")
    assert CASES.keys() == SHARDED.keys()
    sharded = {name: shard(name) for name in SHARDED}
    if distributed.get_rank() == 0:
        (folder / "sharded.json").write_text(json.dumps(sharded))
    distributed.barrier()
    sys.stdout.flush()
    # All is done and written. Threads of the library that still run have been seen to abort a process that takes
    # everything down in order.
    os._exit(0)


if __name__ == "__main__":
    run(Path(sys.argv[1]))
