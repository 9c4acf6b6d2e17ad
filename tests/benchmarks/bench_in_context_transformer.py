"""
Speed of the low-rank In-context Transformer and of its generator against plain ways of doing the same:

    python -m tests.benchmarks.bench_in_context_transformer [step] [memory] [generator] [growth] [--rounds 5]

`step`: forward and backward pass against the library's GPT-2 blocks with the same weights, all tokens and boolean masks
under sdpa. `memory`: the same passes, peak memory above the model against those blocks with eager attention (Linux).
`generator`: prompts, with labels balanced or of pairs drawn freely, against a loop over samples with networkx graphs.
`growth`: the passes of `step` against the number of tables.

All forms of a comparison run in one process on one thread, in turn (memory: in a process each); times are medians of
CPU seconds, ratios those of the medians with the least and most of a round.
"""

import argparse
import random
from collections.abc import Callable

import networkx as nx
import torch
from torch import nn
from transformers import GPT2Config
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

from hf_models.in_context_transformer import (
    LowRankInContextTransformerConfig,
    LowRankInContextTransformerForSequenceClassification,
)
from hf_models.in_context_transformer.modeling_in_context_transformer import make_attention_masks
from trainers.tasks.in_context import TableConnectivity

from .measuring import in_new_process, interleaved, note, note_growth, note_memory, note_speed, peak_of, significant

# Tables, columns, prompts in a batch.
SHAPES = ((20, 3, 16), (100, 7, 1), (400, 3, 1))
MEMORY_SHAPE = (100, 7, 2)
N_DIMS = 20


def make_model(num_tables: int, num_columns: int) -> LowRankInContextTransformerForSequenceClassification:
    torch.manual_seed(0)
    config = LowRankInContextTransformerConfig(
        n_dims=N_DIMS,
        num_blocks=num_tables,
        block_size=num_columns + 1,
        hidden_size=256,
        num_hidden_layers=12,
        num_attention_heads=8,
    )
    return LowRankInContextTransformerForSequenceClassification(config)


class DenseMasked(nn.Module):
    """The same function by the library's GPT-2 blocks, which compute every token and every score."""

    def __init__(self, model: LowRankInContextTransformerForSequenceClassification, implementation: str):
        super().__init__()
        config = model.config
        settings = GPT2Config(
            n_embd=config.hidden_size,
            n_layer=config.num_hidden_layers,
            n_head=config.num_attention_heads,
            activation_function=config.hidden_act,
            layer_norm_epsilon=config.layer_norm_eps,
            **dict.fromkeys(("resid_pdrop", "attn_pdrop", "embd_pdrop"), 0.0),
        )
        settings._attn_implementation = implementation
        self.blocks = nn.ModuleList(GPT2Block(settings, place) for place in range(config.num_hidden_layers))
        self.model, self.num_local_layers = model, config.num_local_layers
        masks = make_attention_masks(config.num_blocks, config.block_size, config.num_tail_tokens)
        if implementation == "eager":
            # Added to the scores; a row without keys becomes uniform, which no key token ever reads.
            lowest = torch.finfo(torch.float32).min
            masks = tuple(torch.zeros(mask.shape).masked_fill(~mask, lowest) for mask in masks)
        self.masks = [mask[None, None] for mask in masks]
        with torch.no_grad():
            for theirs, ours in zip(self.blocks, model.model.blocks, strict=True):
                attention, feed_forward = ours.attn, ours.feed_forward
                parts = attention.q_proj, attention.k_proj, attention.v_proj
                theirs.attn.c_attn.weight.copy_(torch.cat([part.weight.T for part in parts], dim=1))
                theirs.attn.c_attn.bias.copy_(torch.cat([part.bias for part in parts]))
                for conv, linear in (
                    (theirs.attn.c_proj, attention.out_proj),
                    (theirs.mlp.c_fc, feed_forward.fc1),
                    (theirs.mlp.c_proj, feed_forward.fc2),
                ):
                    conv.weight.copy_(linear.weight.T)
                    conv.bias.copy_(linear.bias)

    def forward(self, prompts: torch.Tensor) -> torch.Tensor:
        body = self.model.model
        states = body.read_in(prompts) + body.positions(body.config.num_blocks)
        for place, block in enumerate(self.blocks):
            mask = self.masks[place >= self.num_local_layers].expand(len(prompts), -1, -1, -1)
            states = block(states, attention_mask=mask)
        return self.model.read_out(body.ln_f(states))[:, -1]


def make_steps(
    num_tables: int, num_columns: int, batch_size: int, implementation: str, check: bool = True
) -> dict[str, Callable]:
    """Forward and backward pass of both forms over the same batch.

    Args:
        check: whether to see first that their outputs agree, which leaves memory behind that a step would use again.
    """
    model = make_model(num_tables, num_columns)
    dense = DenseMasked(model, implementation)
    prompts = torch.randn(batch_size, model.config.sequence_length, N_DIMS)
    labels = (torch.arange(batch_size) % 2).float()

    def sparse_step() -> None:
        model(input_values=prompts, labels=labels).loss.backward()

    def dense_step() -> None:
        nn.functional.binary_cross_entropy_with_logits(dense(prompts)[:, 0], labels).backward()

    if not check:
        return {"sparse": sparse_step, "dense": dense_step}
    with torch.no_grad():
        difference = (dense(prompts) - model(input_values=prompts).logits).abs().max().item()
    if difference > 1e-4:
        raise AssertionError(f"the two forms differ by {difference:.1e}")
    return {"sparse": sparse_step, "dense": dense_step}


def peak_memory(form: str) -> int:
    """Bytes of one step above what the process held before it; to be called in a new process."""
    torch.set_num_threads(1)
    return peak_of(make_steps(*MEMORY_SHAPE, "eager", check=False)[form])


def loop_over_samples(
    names: torch.Tensor, count: int, num_tables: int, num_columns: int, rho: float, balanced: bool
) -> list[dict]:
    """Prompts one by one: draw and overwrite in order, then ask a graph for components and path lengths."""
    draw, prompts = random.Random(0), []
    num_ids = num_tables * num_columns
    while len(prompts) < count:
        ids = list(range(num_ids))
        draw.shuffle(ids)
        columns = [ids[table * num_columns : (table + 1) * num_columns] for table in range(num_tables)]
        for source in range(num_tables):
            for target in range(source + 1, num_tables):
                if draw.random() < rho:
                    columns[target][draw.randrange(num_columns)] = columns[source][draw.randrange(num_columns)]
        graph = nx.Graph()
        for table, held in enumerate(columns):
            graph.add_edges_from((("table", table), ("column", column)) for column in held)
        if balanced:
            component = {node: number for number, part in enumerate(nx.connected_components(graph)) for node in part}
            pairs = {True: [], False: []}
            for first in range(num_tables):
                for second in range(first + 1, num_tables):
                    pairs[component["table", first] == component["table", second]].append((first, second))
            if not (pairs[True] and pairs[False]):
                continue
            first, second = draw.choice(pairs[draw.random() < 0.5])
        else:
            first, second = draw.sample(range(num_tables), 2)
        query = draw.choice(columns[first]), draw.choice(columns[second])
        reached = nx.single_source_shortest_path_length(graph, ("column", query[0]))
        tables = draw.sample(range(num_tables), num_tables)
        tokens = [token for table, held in zip(tables, columns, strict=True) for token in (num_ids + table, *held)]
        prompts.append(
            {
                "input_values": names[[*tokens, len(names) - 1, *query]],
                "labels": 1 if ("column", query[1]) in reached else -1,
                "block_targets": [1 if ("table", table) in reached else -1 for table in range(num_tables)],
                "path_length": reached.get(("column", query[1]), -2) // 2,
            }
        )
    return prompts


def measure_generator(rounds: int, count: int = 1024) -> None:
    for num_tables, num_columns, rho, balanced in ((20, 3, 0.5, False), (20, 3, 0.1, True), (8, 2, 0.2, True)):
        shape = {"num_tables": num_tables, "num_columns": num_columns, "rho": rho, "balanced": balanced}
        task = TableConnectivity(shape | {"n_dims": N_DIMS, "names": "random"})
        comparison = interleaved(
            {
                "loop": lambda task=task, shape=shape: loop_over_samples(task.names, count // 4, **shape),
                "vectorised": lambda task=task: task.batch("train", range(count)),
            },
            rounds,
        )
        rates = {"loop": count // 4 / comparison.median("loop"), "vectorised": count / comparison.median("vectorised")}
        _, low, high = (4 * value for value in comparison.ratio("vectorised", "loop"))
        ratio = rates["vectorised"] / rates["loop"]
        what = f"generator, V={num_tables}, C={num_columns}, rho={rho}, {'balanced' if balanced else 'free pairs'}"
        note(
            f"{what}: loop {rates['loop']:,.0f} prompts per second, vectorised {rates['vectorised']:,.0f} "
            f"({significant(ratio)}x, {significant(low)} to {significant(high)})",
            what=what,
            baseline="loop",
            prompts_per_second=rates,
            ratios={"vectorised": [ratio, low, high]},
        )


def measure_growth(rounds: int) -> None:
    actions = {num_tables: make_steps(num_tables, 3, 1, "sdpa") for num_tables in (25, 50, 100, 200, 400)}
    note_growth("training step, C=3, batch 1", "tables", actions, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument(
        "parts", nargs="*", choices=[[], "step", "memory", "generator", "growth"], default=[], help="default: all"
    )
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each form")
    options = parser.parse_args()
    torch.set_num_threads(1)
    parts = options.parts or ["step", "memory", "generator", "growth"]
    if "step" in parts:
        for num_tables, num_columns, batch_size in SHAPES:
            steps = make_steps(num_tables, num_columns, batch_size, "sdpa")
            what = f"training step, V={num_tables}, C={num_columns}, batch {batch_size}"
            note_speed(what, interleaved(steps, options.rounds), "dense")
    if "memory" in parts:
        peaks = {form: in_new_process(peak_memory, form) for form in ("sparse", "dense")}
        num_tables, num_columns, batch_size = MEMORY_SHAPE
        what = f"peak memory of a step, V={num_tables}, C={num_columns}, batch {batch_size}, dense form with eager"
        note_memory(what, peaks, "dense")
    if "generator" in parts:
        measure_generator(options.rounds)
    if "growth" in parts:
        measure_growth(options.rounds)


if __name__ == "__main__":
    main()
