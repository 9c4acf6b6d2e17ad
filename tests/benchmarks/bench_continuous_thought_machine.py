"""
Speed and memory of the Continuous Thought Machine against a plain rewrite of the published way of computing it:

    python -m tests.benchmarks.bench_continuous_thought_machine [maze] [parity] [stopping] [growth] [--rounds 5]

All forms run in one process on one thread, in turn; the times are medians of CPU seconds, the ratios those of the
medians with the least and most of a round. The
plain form shares the model's weights, projects keys and values and predictions in every tick, and computes the
neuron-level models by einsum over weights stored neurons last. "Recomputing" is the fast form under activation
checkpointing. Peak memory is what a training step adds to the resident memory of a process that holds the model and
its gradients, each form in a process of its own.

`stopping` is about early stopping, at the sizes of the small recipes and, with 32 samples, those above: what share of
the forward pass's time is saved, over the share of the ticks that is saved, by a threshold at which samples use three
quarters, half or a quarter of the ticks on average. The weights are random, with a readout large enough to become
certain; the mazes' pictures differ in contrast, which spreads the ticks at which samples stop.

`growth` is a forward pass against the number of ticks, at the sizes of `parity`.
"""

import argparse
import itertools
from collections.abc import Callable

import torch

from hf_models.continuous_thought_machine import (
    ContinuousThoughtMachineConfig,
    ContinuousThoughtMachineForTokenClassification,
    ContinuousThoughtMachineModel,
)
from tests.hf_models.test_continuous_thought_machine import plain_machine

from .measuring import (
    Comparison,
    checkpointing,
    in_new_process,
    interleaved,
    note,
    note_growth,
    note_memory,
    note_speed,
    peak_of,
)

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


def build(case: str, **changes: float):
    """A model, its input and labels.

    Args:
        changes: settings that differ from those of `CASES`.
    """
    settings, shape = CASES[case]
    torch.manual_seed(0)
    config = ContinuousThoughtMachineConfig(**settings | {"dropout": 0.0} | changes)
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
        checkpointing(model, recomputing)
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


def measure(case: str, rounds: int) -> dict[str, Comparison]:
    """CPU seconds of the forward pass and of a training step's forward and backward pass, by form."""
    model, inputs, labels = build(case)
    forward = forward_passes(model.eval(), inputs)
    plain = forward["plain"]()
    difference = (forward["fast"]() - plain).abs().max() / plain.abs().max()
    if difference > 1e-4:
        raise AssertionError(f"the two ways differ by {difference:.1e} of the largest logit")
    seconds = {"forward": interleaved(forward, rounds)}
    for what, dropout in (("training step", 0.0), ("training step, dropout 0.1", 0.1)):
        model, inputs, labels = build(case, dropout=dropout)
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
        comparison = interleaved(actions, rounds)
    everything, encoder = comparison.median("all"), comparison.median("encoder")
    what = f"stopping, {name}, batch {batch_size}"
    note(
        f"{what}: all {model.config.iterations} ticks {1e3 * everything:.1f} ms, of which {1e3 * encoder:.1f} ms to "
        "encode the input",
        what=what,
        seconds=comparison.seconds,
    )
    for share, threshold in thresholds.items():
        ticks, taken = think(threshold).ticks, comparison.median(str(share))
        ticks_saved = 1 - ticks.double().mean().item() / model.config.iterations
        time_saved = 1 - taken / everything
        note(
            f"  {ticks.double().mean():.1f} ticks ({ticks.min()} to {ticks.max()}): {1e3 * taken:.1f} ms, "
            f"{time_saved:.0%} of the time saved with {ticks_saved:.0%} of the ticks, "
            f"ratio {time_saved / ticks_saved:.2f}",
            what=what,
            share=share,
            time_saved_over_ticks_saved=time_saved / ticks_saved,
        )


def measure_growth(rounds: int) -> None:
    actions = {}
    for iterations in (10, 20, 40, 80):
        model, inputs, _ = build("parity", iterations=iterations)
        actions[iterations] = forward_passes(model.eval(), inputs)
    note_growth("parity, forward", "ticks", actions, rounds)


def peak_memory(case: str, form: str) -> int:
    """Bytes that a training step of one form adds; to be called in a new process."""
    torch.set_num_threads(1)
    model, inputs, labels = build(case)
    step = training_steps(model.train(), inputs, labels)[form]
    # Gradients and the libraries' buffers come with a step of one tick.
    iterations, model.config.iterations = model.config.iterations, 1
    step()
    model.config.iterations = iterations
    return peak_of(step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument(
        "cases", nargs="*", choices=[[], *CASES, "stopping", "growth"], default=[], help="what to measure, default all"
    )
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each form")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for case in options.cases or [*CASES, "stopping", "growth"]:
        if case == "stopping":
            for name, batch_size in itertools.product(STOPPING, (32, 128)):
                small = name in RECIPES
                if small or batch_size == 32:
                    measure_stopping(name, batch_size, (4 if small else 1) * options.rounds)
        elif case == "growth":
            measure_growth(options.rounds)
        else:
            peaks = {form: in_new_process(peak_memory, case, form) for form in ("plain", "fast", "recomputing")}
            for what, comparison in measure(case, options.rounds).items():
                note_speed(f"{case}, {what}", comparison, "plain")
            note_memory(f"{case}, peak memory of a training step", peaks, "plain")


if __name__ == "__main__":
    main()
