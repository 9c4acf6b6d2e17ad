"""
Speed and memory of the Connection Transformer's reasoning, against plain forms of the same mathematics:

    python -m tests.benchmarks.bench_connection_transformer [quick] [base] [forms] [scalar] [halting] [growth] [matched]
        [--rounds 5]

- `quick` (128/64/16, 3 steps, batch 32), `base` (256/128/32, 6 steps, batch 8): width/slots/rank of per-pair
  connections, against einsum over all pairs as the original writes it (`einsum_influence` of the tests).
- `forms`: block and diagonal connections against per-pair connections, at the base size.
- `scalar`: the exact orthogonality penalty against the original's, which samples pairs (512 slots, rank 1).
- `halting`: seconds per example against mean steps of 64 samples that stop at different steps (quick size).
- `growth`: a forward pass against the number of slots, for each form of connections (width 128, rank 16, batch 8).
- `matched`: the Vanilla Transformer of as many parameters for the usual sizes, and the operations of both for a source
  of 256 tokens and one target token, every step taken. Nothing is timed.

All forms of a comparison run in one process on one thread, in turn; times are medians of CPU seconds, ratios come with
the least and most of a round, and a large matrix product is measured beside them. Memory is the peak above what the
process holds before, each form in a process of its own. Weights and states are random.
"""

import argparse
import os
from collections.abc import Callable

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

from .measuring import (
    Comparison,
    in_new_process,
    interleaved,
    note,
    note_growth,
    note_memory,
    note_speed,
    peak_of,
    significant,
)

SIZES = {
    "quick": {"hidden_size": 128, "num_slots": 64, "connection_rank": 16, "max_reasoning_steps": 3, "batch_size": 32},
    "base": {"hidden_size": 256, "num_slots": 128, "connection_rank": 32, "max_reasoning_steps": 6, "batch_size": 8},
}
CASES = ("quick", "base", "forms", "scalar", "halting", "growth", "matched")
PARTS = ("forward", "training step")


def make_reasoning(
    size: str, connection_type: str, **changes: int
) -> tuple[ConnectionTransformerReasoning, torch.Tensor]:
    """The loop with all its steps, as in the original: no injection, no stop; and slot states to begin with.

    Args:
        changes: what differs from the sizes of that name.
    """
    sizes = SIZES[size] | changes
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


def reasoning_action(part: str, size: str, connection_type: str, **changes: int) -> Callable[[], object]:
    reasoning, states = make_reasoning(size, connection_type, **changes)
    return action(part, lambda: fast(reasoning, states), reasoning.zero_grad)


# Floating point operations of `matrix_product`.
PRODUCT_OPERATIONS = 4 * 2 * 1024**3


def matrix_product() -> Callable[[], object]:
    """Square products of float32, large enough to show what the processor can do."""
    one, other = torch.randn(2, 1024, 1024).unbind()
    return lambda: [one @ other for _ in range(4)]


def peak_memory(form: str, size: str, part: str) -> int:
    """Bytes that one run of a form takes on top of the model; to be called in a process of its own."""
    torch.set_num_threads(1)
    reasoning, states = make_reasoning(size, "per_pair")
    run, zero_grad = (lambda: fast(reasoning, states)), reasoning.zero_grad
    if form == "plain":
        plain = Plain(reasoning)
        run, zero_grad = (lambda: plain(states)), plain.zero_grad
    # The libraries' own buffers are no part of what is compared.
    torch.bmm(states[:, :4, :4], states[:, :4, :4])
    products(torch.randn(1, 8, 256), torch.randn(1, 256, 256))
    return peak_of(action(part, run, zero_grad))


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
            actions["plain with a mask"] = action(part, lambda: masked(states), masked.zero_grad)
        comparison = interleaved({**actions, "product": matrix_product()}, rounds)
        rate = PRODUCT_OPERATIONS / comparison.median("product")
        del comparison.seconds["product"]
        # Products: one pass forward, the same again for the states' gradients and for the weights'.
        passes = config.max_reasoning_steps * (1 if part == "forward" else 3)
        masked_seconds = comparison.seconds.pop("plain with a mask", None)
        share = {name: operations * passes / comparison.median(name) / rate for name in ("plain", "fast")}
        note_speed(
            f"{size}, {part}",
            comparison,
            "plain",
            f"; of the {rate / 1e9:.0f} GFLOP/s of a large product the plain form reaches {share['plain']:.0%}, the "
            f"fast form {share['fast']:.0%}",
        )
        if masked_seconds:
            against = Comparison({"plain with a mask": masked_seconds, "fast": comparison.seconds["fast"]})
            note_speed(f"{size}, {part}", against, "plain with a mask")
    for part in PARTS:
        peaks = {form: in_new_process(peak_memory, form, size, part) for form in ("plain", "fast")}
        note_memory(f"{size}, {part}, extra memory", peaks, "plain")


def measure_forms(rounds: int) -> None:
    for part in PARTS:
        actions = {name: reasoning_action(part, "base", name) for name in ("per_pair", "block", "diagonal")}
        note_speed(f"base, {part}", interleaved(actions, rounds, {"block": 4, "diagonal": 16}), "per_pair")


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
    comparison = interleaved(actions, rounds, {"exact": 10})
    step = significant(comparison.median("reasoning"))
    del comparison.seconds["reasoning"]
    remark = f"; one reasoning step on 8 samples, forward and backward: {step} s"
    note_speed("scalar, penalty forward and backward", comparison, "sampled", remark)


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
    comparison = interleaved(actions, rounds)
    whole = comparison.median("0.0")
    for name, taken in steps.items():
        seconds = comparison.median(name)
        saved_steps, saved_seconds = 1 - taken.mean().item() / config.max_reasoning_steps, 1 - seconds / whole
        line = (
            f"halting, threshold {float(name):.3g}: steps {taken.mean():.2f} of {config.max_reasoning_steps} "
            f"({taken.min():.0f} to {taken.max():.0f}), {significant(seconds / 64 * 1e3)} ms per example"
        )
        figures = {"threshold": float(name), "mean_steps": taken.mean().item(), "seconds": comparison.seconds[name]}
        if saved_steps > 0:
            figures["time_saved_over_steps_saved"] = saved_seconds / saved_steps
            line += (
                f"; steps fall by {saved_steps:.0%}, seconds by {saved_seconds:.0%}: {saved_seconds / saved_steps:.2f}"
            )
        note(line, **figures)


def measure_growth(rounds: int) -> None:
    actions: dict[float, dict[str, Callable[[], object]]] = {}
    for num_slots in (32, 64, 128, 256):
        actions[num_slots] = {
            name: reasoning_action("forward", "quick", name, num_slots=num_slots, batch_size=8)
            for name in ("per_pair", "block", "diagonal", "scalar")
        }
    note_growth("forward", "slots", actions, rounds)


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
            note(
                f"{size} {connection_type}: {wanted:,} parameters, {operations / 1e9:.2f} GFLOP; matched {found:,} "
                f"({found / wanted - 1:+.2%}), width {matched.hidden_size}, {matched.num_hidden_layers} + "
                f"{matched.num_decoder_layers} layers, inner {matched.intermediate_size}, {others / 1e9:.2f} GFLOP",
                parameters={"connection": wanted, "matched": found},
                operations={"connection": operations, "matched": others},
            )


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed and memory of the Connection Transformer's reasoning.")
    parser.add_argument("cases", nargs="*", metavar="case", help=f"what to measure: {', '.join(CASES)}; default all")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each form")
    options = parser.parse_args()
    if unknown := set(options.cases) - set(CASES):
        parser.error(f"unknown case(s) {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    torch.set_num_threads(1)
    for case in options.cases or CASES:
        if case in SIZES:
            measure_per_pair(case, options.rounds)
        else:
            measures = {
                "forms": measure_forms,
                "scalar": measure_scalar,
                "halting": measure_halting,
                "growth": measure_growth,
                "matched": measure_matched,
            }
            measures[case](options.rounds)


if __name__ == "__main__":
    main()
