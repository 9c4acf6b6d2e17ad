"""
Speed and memory of the Connection Transformer's reasoning, against plain forms of the same mathematics:

    python -m tests.benchmarks.bench_connection_transformer [quick] [base] [forms] [scalar] [halting] [matched]
        [--rounds 5]

- `quick` (128/64/16, 3 steps, batch 32), `base` (256/128/32, 6 steps, batch 8): width/slots/rank of per-pair
  connections, against einsum over all pairs as the original writes it (`einsum_influence` of the tests).
- `forms`: block and diagonal connections against per-pair connections, at the base size.
- `scalar`: the exact orthogonality penalty against the original's, which samples pairs (512 slots, rank 1).
- `halting`: seconds per example against mean steps of 64 samples that stop at different steps (quick size).
- `matched`: the Vanilla Transformer of as many parameters for the usual sizes, and the operations of both for a source
  of 256 tokens and one target token, every step taken. Nothing is timed.

All forms of a comparison run in one process on one thread, in turn; times are medians of CPU seconds, the speed of a
large matrix product is measured between them. Memory is the peak above what the process holds before, each form in a
process of its own. Weights and states are random.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForSeq2SeqLM, PreTrainedConfig

from hf_models.connection_transformer import ConnectionTransformerConfig, ConnectionTransformerModel
from hf_models.connection_transformer.connections_connection_transformer import (
    ConnectionTransformerScalarConnections,
    products,
)
from hf_models.connection_transformer.modeling_connection_transformer import ConnectionTransformerReasoning
from hf_models.vanilla_transformer import VanillaTransformerConfig
from tests.hf_models.test_connection_transformer import USUAL_SIZES, einsum_influence, per_pair_factors

SIZES = {
    "quick": {"hidden_size": 128, "num_slots": 64, "connection_rank": 16, "max_reasoning_steps": 3, "batch_size": 32},
    "base": {"hidden_size": 256, "num_slots": 128, "connection_rank": 32, "max_reasoning_steps": 6, "batch_size": 8},
}
CASES = ("quick", "base", "forms", "scalar", "halting", "matched")
PARTS = ("forward", "training step")


def make_reasoning(size: str, connection_type: str) -> tuple[ConnectionTransformerReasoning, torch.Tensor]:
    """The loop with all its steps, as in the original: no injection, no stop; and slot states to begin with."""
    sizes = dict(SIZES[size])
    batch_size = sizes.pop("batch_size")
    torch.manual_seed(0)
    config = ConnectionTransformerConfig(
        **sizes, connection_type=connection_type, share_step_norm=False, inject_input=False, halting="none"
    )
    reasoning = ConnectionTransformerReasoning(config)
    reasoning.step.connections.initialise()
    return reasoning, torch.randn(batch_size, config.num_slots, config.hidden_size)


def fast(reasoning: ConnectionTransformerReasoning, states: torch.Tensor) -> torch.Tensor:
    return reasoning(states, reasoning.config.max_reasoning_steps, compact=False)[0]


def masked_influence(states: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """`einsum_influence` with a product by zero in place of the assignment, which autograd would copy for."""
    messages = torch.einsum("bid,ijdk->bijk", states, source)
    influences = torch.einsum("bijk,ijkd->bijd", messages, target)
    others = 1 - torch.eye(states.shape[1], dtype=states.dtype)
    return (influences * others[:, :, None]).sum(1)


class Plain:
    """The same loop over per-pair matrices stored pair by pair, as the original stores them."""

    def __init__(self, reasoning: ConnectionTransformerReasoning, influence: Callable = einsum_influence):
        self.influence = influence
        factors = per_pair_factors(reasoning.step.connections)
        self.source, self.target = (factor.detach().contiguous().requires_grad_() for factor in factors)
        self.norms = reasoning.step.layer_norms

    def zero_grad(self) -> None:
        self.source.grad = self.target.grad = None

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        for norm in self.norms:
            states = norm(states + torch.relu(self.influence(states, self.source, self.target)))
        return states


def action(part: str, run: Callable[[], torch.Tensor], zero_grad: Callable[[], None]) -> Callable[[], object]:
    """One forward pass, or a forward and backward pass from gradients that are not there yet."""

    @torch.no_grad()
    def forward():
        return run()

    def training_step():
        zero_grad()
        run().square().sum().backward()

    return forward if part == "forward" else training_step


def reasoning_action(part: str, size: str, connection_type: str) -> Callable[[], object]:
    reasoning, states = make_reasoning(size, connection_type)
    return action(part, lambda: fast(reasoning, states), reasoning.zero_grad)


def matrix_product() -> float:
    """Floating point operations per CPU second of a square product of float32."""
    one, other = torch.randn(2, 1024, 1024).unbind()
    start = time.process_time()
    for _ in range(4):
        one @ other
    return 4 * 2 * 1024**3 / (time.process_time() - start)


def interleaved(
    actions: dict[str, Callable[[], object]], rounds: int, repeats: dict[str, int] | None = None
) -> tuple[dict[str, float], float]:
    """Median CPU seconds of each action, in turn after a round that does not count, and the rate of a product."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    rates = []
    for _ in range(rounds + 1):
        rates.append(matrix_product())
        for name, one in actions.items():
            count = (repeats or {}).get(name, 1)
            start = time.process_time()
            for _ in range(count):
                one()
            times[name].append((time.process_time() - start) / count)
    return {name: statistics.median(measured[1:]) for name, measured in times.items()}, statistics.median(rates[1:])


def resident(field: str) -> int:
    """Bytes of this process: `VmRSS` now, `VmHWM` at most since the peak was last reset (Linux)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def peak_memory(form: str, size: str, part: str) -> None:
    """Prints the bytes that one run of a form takes on top of the model."""
    reasoning, states = make_reasoning(size, "per_pair")
    run, zero_grad = (lambda: fast(reasoning, states)), reasoning.zero_grad
    if form == "plain":
        plain = Plain(reasoning)
        run, zero_grad = (lambda: plain(states)), plain.zero_grad
    one = action(part, run, zero_grad)
    # The libraries' own buffers are no part of what is compared.
    torch.bmm(states[:, :4, :4], states[:, :4, :4])
    products(torch.randn(1, 8, 256), torch.randn(1, 256, 256))
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    one()
    print(json.dumps(resident("VmHWM") - before))


def extra_bytes(form: str, size: str, part: str) -> int:
    command = [sys.executable, "-m", "tests.benchmarks.bench_connection_transformer", "--memory_of", form, size, part]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure_per_pair(size: str, rounds: int) -> None:
    reasoning, states = make_reasoning(size, "per_pair")
    plain, masked = Plain(reasoning), Plain(reasoning, masked_influence)
    with torch.no_grad():
        expected = plain(states)
        difference = (fast(reasoning, states) - expected).abs().max() / expected.abs().max()
    if difference > 1e-4:
        raise AssertionError(f"the two forms differ by {difference:.1e} of the largest state")
    config = reasoning.config
    operations = 4 * len(states) * config.num_slots**2 * config.hidden_size * config.connection_rank
    for part in PARTS:
        actions = {
            "fast": action(part, lambda: fast(reasoning, states), reasoning.zero_grad),
            "plain": action(part, lambda: plain(states), plain.zero_grad),
        }
        if size == "quick":
            actions["masked"] = action(part, lambda: masked(states), masked.zero_grad)
        seconds, rate = interleaved(actions, rounds)
        # Products: one pass forward, the same again for the states' gradients and for the weights'.
        passes = config.max_reasoning_steps * (1 if part == "forward" else 3)
        share = {name: operations * passes / value / rate for name, value in seconds.items()}
        print(
            f"{size}, {part}: plain {seconds['plain']:.3f} s, fast {seconds['fast']:.3f} s, "
            f"{seconds['plain'] / seconds['fast']:.1f}x; of the {rate / 1e9:.0f} GFLOP/s of a large product the plain "
            f"form reaches {share['plain']:.0%}, the fast form {share['fast']:.0%}",
            flush=True,
        )
        if "masked" in seconds:
            print(
                f"{size}, {part}: plain with a mask for what a slot says to itself {seconds['masked']:.3f} s, "
                f"{seconds['masked'] / seconds['fast']:.1f}x",
                flush=True,
            )
    for part in PARTS:
        extra = {form: extra_bytes(form, size, part) for form in ("plain", "fast")}
        print(
            f"{size}, {part}, extra memory: plain {extra['plain'] / 1e6:.0f} MB, fast {extra['fast'] / 1e6:.0f} MB, "
            f"{extra['plain'] / extra['fast']:.1f}x less",
            flush=True,
        )


def measure_forms(rounds: int) -> None:
    for part in PARTS:
        actions = {name: reasoning_action(part, "base", name) for name in ("per_pair", "block", "diagonal")}
        seconds, _ = interleaved(actions, rounds, {"block": 4, "diagonal": 16})
        for name in ("block", "diagonal"):
            print(
                f"base, {part}: per_pair {seconds['per_pair']:.3f} s, {name} {seconds[name]:.4f} s, "
                f"{seconds['per_pair'] / seconds[name]:.1f}x",
                flush=True,
            )


def sampled_penalty(connections: ConnectionTransformerScalarConnections, num_pairs: int = 500) -> torch.Tensor:
    """The penalty with the mean over pairs of vectors estimated as in the original, each pair from a permutation."""
    num_slots = len(connections.source_weight)
    others = ~torch.eye(num_slots, dtype=torch.bool)
    penalty = torch.zeros(())
    for weight in (connections.source_weight, connections.target_weight):
        vectors = weight[others]
        length_error = (vectors.norm(dim=-1) - 1).square().mean()
        products = []
        for _ in range(num_pairs):
            one, other = torch.randperm(len(vectors))[:2]
            products.append((vectors[one] * vectors[other]).sum().square())
        penalty = penalty + 0.5 * (length_error + 0.1 * torch.stack(products).mean())
    return penalty


def measure_scalar(rounds: int) -> None:
    config = ConnectionTransformerConfig(hidden_size=512, num_slots=512, connection_rank=1, max_reasoning_steps=1)
    torch.manual_seed(0)
    reasoning = ConnectionTransformerReasoning(config)
    connections = reasoning.step.connections
    connections.initialise()
    states = torch.randn(8, config.num_slots, config.hidden_size)
    actions = {
        "sampled": lambda: sampled_penalty(connections).backward(),
        "exact": lambda: connections.orthogonality_penalty().backward(),
        "reasoning": lambda: fast(reasoning, states).sum().backward(),
    }
    seconds, _ = interleaved(actions, rounds, {"exact": 10})
    print(
        f"scalar, penalty forward and backward: sampled {seconds['sampled']:.3f} s, exact {seconds['exact']:.4f} s, "
        f"{seconds['sampled'] / seconds['exact']:.0f}x; one reasoning step on 8 samples {seconds['reasoning']:.3f} s"
    )


@torch.no_grad()
def measure_halting(rounds: int) -> None:
    sizes = {name: value for name, value in SIZES["quick"].items() if name != "batch_size"}
    torch.manual_seed(0)
    config = ConnectionTransformerConfig(
        **sizes | {"max_reasoning_steps": 8},
        vocab_size=1000,
        num_decoder_layers=1,
        connection_type="per_pair",
        update_scale=0.02,
        is_encoder_decoder=False,
    )
    encoder = ConnectionTransformerModel(config).eval().get_encoder()
    # Sources of very different lengths settle at different speeds.
    lengths = torch.linspace(1, 64, 64).long()[:, None]
    attention_mask = (torch.arange(64) < lengths).long()
    batch = {"input_ids": torch.randint(3, 1000, (64, 64)) * attention_mask, "attention_mask": attention_mask}
    measures = torch.stack(encoder(**batch, output_halting_measures=True).halting_measures)
    thresholds = [0.0, *measures.flatten().quantile(torch.tensor([0.1, 0.25, 0.4, 0.55, 0.7])).tolist()]
    actions, steps = {}, {}
    for threshold in thresholds:

        def run(threshold=threshold):
            encoder.config.halting_threshold = threshold
            return encoder(**batch).reasoning_steps

        actions[str(threshold)], steps[str(threshold)] = run, run().float()
    seconds, _ = interleaved(actions, rounds)
    whole = seconds["0.0"]
    for name, taken in steps.items():
        saved_steps, saved_seconds = 1 - taken.mean().item() / config.max_reasoning_steps, 1 - seconds[name] / whole
        line = (
            f"halting, threshold {float(name):.3g}: steps {taken.mean():.2f} of {config.max_reasoning_steps} "
            f"({taken.min():.0f} to {taken.max():.0f}), {seconds[name] / 64 * 1e3:.2f} ms per example"
        )
        if saved_steps > 0:
            line += (
                f"; steps fall by {saved_steps:.0%}, seconds by {saved_seconds:.0%}: {saved_seconds / saved_steps:.2f}"
            )
        print(line, flush=True)


def forward_operations(config: PreTrainedConfig) -> int:
    """Operations of the matrix products for one source of 256 tokens and one target token, counted without memory."""
    with torch.device("meta"):
        # The slots are drawn on the CPU whatever the device.
        model = AutoModelForSeq2SeqLM.from_config(config).to("meta").eval()
        source, target = torch.zeros(1, 256, dtype=torch.long), torch.zeros(1, 1, dtype=torch.long)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(input_ids=source, decoder_input_ids=target, use_cache=False)
    return counter.get_total_flops()


def measure_matched(rounds: int) -> None:
    # On the meta device there are no positions to check.
    os.environ["TRANSFORMERS_DISABLE_TORCH_CHECK"] = "1"
    for size, sizes in USUAL_SIZES.items():
        for connection_type in ("per_pair", "block", "diagonal", "scalar"):
            config = ConnectionTransformerConfig(
                vocab_size=32128, connection_type=connection_type, halting="none", **sizes
            )
            matched = VanillaTransformerConfig.matched_to(config)
            wanted, found = config.num_trainable_parameters(), matched.num_trainable_parameters()
            operations, others = forward_operations(config), forward_operations(matched)
            print(
                f"{size} {connection_type}: {wanted:,} parameters, {operations / 1e9:.2f} GFLOP; matched {found:,} "
                f"({found / wanted - 1:+.2%}), width {matched.hidden_size}, {matched.num_hidden_layers} + "
                f"{matched.num_decoder_layers} layers, inner {matched.intermediate_size}, {others / 1e9:.2f} GFLOP",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed and memory of the Connection Transformer's reasoning.")
    parser.add_argument("cases", nargs="*", metavar="case", help=f"what to measure: {', '.join(CASES)}; default all")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each form")
    parser.add_argument("--memory_of", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.cases) - set(CASES):
        parser.error(f"unknown case(s) {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    torch.set_num_threads(1)
    if options.memory_of:
        peak_memory(*options.memory_of)
        return
    for case in options.cases or CASES:
        if case in SIZES:
            measure_per_pair(case, options.rounds)
        else:
            measures = {
                "forms": measure_forms,
                "scalar": measure_scalar,
                "halting": measure_halting,
                "matched": measure_matched,
            }
            measures[case](options.rounds)


if __name__ == "__main__":
    main()
