"""
Speed and memory of the Continuous Thought Machine against a plain rewrite of the published way of computing it:

    python -m tests.benchmarks.bench_continuous_thought_machine [maze] [parity] [stopping] [--rounds 5]

All forms run in one process on one thread, in turn; the times are CPU seconds, the ratios those of the medians. The
plain form shares the model's weights, projects keys and values and predictions in every tick, and computes the
neuron-level models by einsum over weights stored neurons last. "Recomputing" is the fast form under activation
checkpointing. Peak memory is what a training step adds to the resident memory of a process that holds the model and
its gradients, each form in a process of its own.

`stopping` is about early stopping, at the sizes of the small recipes and, with 32 samples, those above: what share of
the forward pass's time is saved, over the share of the ticks that is saved, by a threshold at which samples use three
quarters, half or a quarter of the ticks on average. The weights are random, with a readout large enough to become
certain; the mazes' pictures differ in contrast, which spreads the ticks at which samples stop.
"""

import argparse
import itertools
import multiprocessing
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from hf_models.continuous_thought_machine import (
    ContinuousThoughtMachineConfig,
    ContinuousThoughtMachineForTokenClassification,
    ContinuousThoughtMachineModel,
)
from tests.hf_models.test_continuous_thought_machine import plain_machine

# Published settings: small mazes, and parity at half its width.
MAZE = {
    "iterations": 50,
    "d_model": 1024,
    "d_input": 256,
    "heads": 4,
    "n_synch_out": 128,
    "n_synch_action": 128,
    "synapse_depth": 8,
    "memory_length": 25,
    "memory_hidden_dims": 32,
    "backbone_type": "resnet18-1",
    "prediction_reshaper": [50, 5],
}
PARITY = {
    "iterations": 75,
    "d_model": 512,
    "d_input": 256,
    "heads": 8,
    "n_synch_out": 32,
    "n_synch_action": 32,
    "neuron_select_type": "random",
    "synapse_depth": 1,
    "memory_length": 25,
    "memory_hidden_dims": 16,
    "backbone_type": "parity_backbone",
    "positional_embedding_type": "custom-rotational-1d",
    "prediction_reshaper": [64, 2],
}
# The models of the small recipes and those of `CASES`, with the shape of an input.
STOPPING = {
    "parity": (
        {
            "iterations": 16,
            "d_model": 128,
            "d_input": 64,
            "heads": 4,
            "n_synch_out": 32,
            "n_synch_action": 32,
            "neuron_select_type": "first-last",
            "synapse_depth": 1,
            "memory_length": 10,
            "memory_hidden_dims": 4,
            "backbone_type": "parity_backbone",
            "positional_embedding_type": "custom-rotational-1d",
            "prediction_reshaper": [12, 2],
        },
        (12,),
    ),
    "digits": (
        {
            "iterations": 15,
            "d_model": 128,
            "d_input": 64,
            "heads": 4,
            "n_synch_out": 64,
            "n_synch_action": 64,
            "neuron_select_type": "random-pairing",
            "synapse_depth": 2,
            "memory_length": 8,
            "memory_hidden_dims": 8,
            "backbone_type": "resnet18-1",
            "positional_embedding_type": "none",
            "num_channels": 1,
            "out_dims": 10,
        },
        (1, 8, 8),
    ),
    "mazes": (
        {
            "iterations": 25,
            "d_model": 256,
            "d_input": 64,
            "heads": 4,
            "n_synch_out": 32,
            "n_synch_action": 32,
            "neuron_select_type": "first-last",
            "synapse_depth": 2,
            "memory_length": 10,
            "memory_hidden_dims": 8,
            "backbone_type": "resnet18-1",
            "positional_embedding_type": "learnable-fourier",
            "prediction_reshaper": [16, 5],
        },
        (3, 9, 9),
    ),
    "large mazes": (MAZE, (3, 39, 39)),
    "long parity": (PARITY, (64,)),
}
RECIPES = ("parity", "digits", "mazes")
# Times the weights of the readout that a model starts with.
LOUD = 200
CASES = {"maze": (MAZE, (8, 3, 39, 39)), "parity": (PARITY, (32, 64))}


def cpu_seconds(action: Callable[[], object]) -> float:
    start = time.process_time()
    action()
    return time.process_time() - start


def interleaved(actions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median CPU seconds of each action, run in turn after one round that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds + 1):
        for name, action in actions.items():
            times[name].append(cpu_seconds(action))
    return {name: statistics.median(measured[1:]) for name, measured in times.items()}


def build(case: str, dropout: float = 0.0):
    """A model, its input and labels."""
    settings, shape = CASES[case]
    torch.manual_seed(0)
    config = ContinuousThoughtMachineConfig(**settings, dropout=dropout)
    model = ContinuousThoughtMachineForTokenClassification(config)
    inputs = torch.randn(shape).sign() if case == "parity" else torch.randn(shape)
    labels = torch.randint(config.num_labels, (shape[0], config.prediction_shape[0]))
    return model, inputs, labels


def training_steps(
    model: ContinuousThoughtMachineForTokenClassification, inputs: torch.Tensor, labels: torch.Tensor
) -> dict[str, Callable[[], None]]:
    """Forward and backward pass of each form; the gradients keep their memory between steps."""
    name, rows = model.config.input_name, torch.arange(len(labels))

    def fast(recomputing: bool = False) -> None:
        model.zero_grad(set_to_none=False)
        if recomputing:
            model.activation_checkpointing_enable()
        else:
            model.activation_checkpointing_disable()
        model(**{name: inputs}, labels=labels).loss.backward()

    def plain() -> None:
        model.zero_grad(set_to_none=False)
        predictions, certainties = plain_machine(model.model, inputs, model.config.iterations)
        losses = model.losses_by_tick(predictions, labels)
        (losses.amin(0).mean() + losses[certainties[:, 1].argmax(-1), rows].mean()).div(2).backward()

    return {"plain": plain, "fast": fast, "recomputing": lambda: fast(recomputing=True)}


def forward_passes(model: ContinuousThoughtMachineForTokenClassification, inputs: torch.Tensor):
    """Predictions by each form."""
    forms = {
        "plain": lambda: plain_machine(model.model, inputs, model.config.iterations)[0],
        "fast": lambda: model.model(**{model.config.input_name: inputs}).predictions,
    }
    return {name: torch.no_grad()(form) for name, form in forms.items()}


def measure(case: str, rounds: int) -> dict[str, dict[str, float]]:
    """CPU seconds of the forward pass and of a training step's forward and backward pass, by form."""
    model, inputs, labels = build(case)
    forward = forward_passes(model.eval(), inputs)
    plain = forward["plain"]()
    difference = (forward["fast"]() - plain).abs().max() / plain.abs().max()
    if difference > 1e-4:
        raise AssertionError(f"the two ways differ by {difference:.1e} of the largest logit")
    seconds = {"forward": interleaved(forward, rounds)}
    for what, dropout in (("training step", 0.0), ("training step, dropout 0.1", 0.1)):
        model, inputs, labels = build(case, dropout)
        seconds[what] = interleaved(training_steps(model.train(), inputs, labels), rounds)
    return seconds


def ticks_used(certainties: torch.Tensor, threshold: float) -> torch.Tensor:
    """Ticks until each sample of `(batch_size, T)` is certain, or T."""
    certain = certainties >= threshold
    return torch.where(certain.any(dim=1), certain.int().argmax(dim=1) + 1, certainties.shape[1])


def threshold_for(certainties: torch.Tensor, mean_ticks: float) -> float:
    """The lowest threshold at which samples use at least so many ticks on average."""
    values = certainties.flatten().sort().values
    low, high = 0, len(values) - 1
    while low < high:
        middle = (low + high) // 2
        if ticks_used(certainties, values[middle].item()).double().mean() < mean_ticks:
            low = middle + 1
        else:
            high = middle
    return values[low].item()


def measure_stopping(name: str, batch_size: int, rounds: int) -> None:
    """Prints the time of a forward pass with all ticks, and with fewer of them by early stopping."""
    settings, shape = STOPPING[name]
    torch.manual_seed(0)
    model = ContinuousThoughtMachineModel(ContinuousThoughtMachineConfig(**settings)).eval()
    inputs = torch.randn(batch_size, *shape)
    if name.endswith("parity"):
        inputs = inputs.sign()
    if name.endswith("mazes"):
        inputs *= torch.logspace(-1, 1, batch_size).view(-1, *[1] * len(shape))
    with torch.no_grad():
        model.readout.projection.weight *= LOUD
        certainties = model(**{model.config.input_name: inputs}).certainties[:, 1]

    def think(threshold: float | None = None):
        with torch.no_grad():
            return model(**{model.config.input_name: inputs}, certainty_threshold=threshold)

    shares = (0.75, 0.5, 0.25)
    thresholds = {share: threshold_for(certainties, share * model.config.iterations) for share in shares}
    actions: dict[str, Callable[[], object]] = {"all": think}
    actions |= {str(share): lambda threshold=threshold: think(threshold) for share, threshold in thresholds.items()}
    with torch.no_grad():
        actions["encoder"] = lambda: model.tick.attention.project(model.encoder(inputs))
        seconds = interleaved(actions, rounds)
    everything = seconds["all"]
    print(
        f"stopping, {name}, batch {batch_size}: all {model.config.iterations} ticks {1e3 * everything:.1f} ms, "
        f"of which {1e3 * seconds['encoder']:.1f} to encode the input"
    )
    for share, threshold in thresholds.items():
        ticks, taken = think(threshold).ticks, seconds[str(share)]
        ticks_saved = 1 - ticks.double().mean().item() / model.config.iterations
        time_saved = 1 - taken / everything
        print(
            f"  {ticks.double().mean():.1f} ticks ({ticks.min()} to {ticks.max()}): {1e3 * taken:.1f} ms, "
            f"{time_saved:.0%} of the time saved with {ticks_saved:.0%} of the ticks, "
            f"ratio {time_saved / ticks_saved:.2f}",
            flush=True,
        )


def resident(field: str) -> float:
    """Resident memory of this process in MB, now (`VmRSS`) or at its peak (`VmHWM`). Linux only."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) / 1024


def peak_memory(case: str, form: str) -> float:
    """MB that a training step of one form adds; to be called in a new process."""
    torch.set_num_threads(1)
    model, inputs, labels = build(case)
    step = training_steps(model.train(), inputs, labels)[form]
    # Gradients and the libraries' buffers come with a step of one tick.
    iterations, model.config.iterations = model.config.iterations, 1
    step()
    model.config.iterations = iterations
    before = resident("VmRSS")
    step()
    return resident("VmHWM") - before


def table_row(case: str, what: str, unit: str, measured: dict[str, float], digits: int, inverse: bool) -> str:
    """Each form's figure and its ratio to the plain form's: times faster, or share of the memory."""
    cells = []
    for form, value in measured.items():
        ratio = value / measured["plain"] if inverse else measured["plain"] / value
        cells.append(f"{form} {value:.{digits}f} {unit}" + ("" if form == "plain" else f" ({ratio:.2f}x)"))
    return f"{case}, {what}: {', '.join(cells)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument(
        "cases", nargs="*", choices=[[], *CASES, "stopping"], default=[], help="what to measure, default all"
    )
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each form")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cases = options.cases or [*CASES, "stopping"]
    if "stopping" in cases:
        cases.remove("stopping")
        for name, batch_size in itertools.product(STOPPING, (32, 128)):
            small = name in RECIPES
            if small or batch_size == 32:
                measure_stopping(name, batch_size, (4 if small else 1) * options.rounds)
    for case in cases:
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            memory = {form: pool.apply(peak_memory, (case, form)) for form in ("plain", "fast", "recomputing")}
        for what, seconds in measure(case, options.rounds).items():
            print(table_row(case, what, "s", seconds, digits=2, inverse=False), flush=True)
        print(table_row(case, "peak memory of a training step", "MB", memory, digits=0, inverse=True), flush=True)


if __name__ == "__main__":
    main()
