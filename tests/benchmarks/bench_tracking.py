"""What a tracked training step costs, against the same step untracked.

    python -m tests.benchmarks.bench_tracking [--size reference|tutorial] [--rounds 9] [--batch 16]

One model, one process, one thread. Each round makes four update steps of the same batch, in turn: without any tracker,
with a tracker that is not due, with one that takes the streaming parts and the attention of two examples of the batch,
and with one that looks at two probe examples too. Medians of CPU seconds over the rounds. What a step costs more is the
median of the differences within a round, with the least and most of a round; at every N steps it is the N-th part.
Hooks are counted between tracked steps.

Memory: `--memory` tracks 240 steps of a small model and prints by how much resident memory grows in parts of them.
"""

import argparse
import gc
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM, PreTrainedModel

import hf_models  # noqa: F401 - registers the architecture
from trainers.tracking import InternalsTracker

from .measuring import cpu_seconds, note, resident, significant

SIZES = {
    "reference": {
        "vocab_size": 8000,
        "hidden_size": 512,
        "num_hidden_layers": 6,
        "num_decoder_layers": 6,
        "num_attention_heads": 8,
        "intermediate_size": 2048,
    },
    "tutorial": {
        "vocab_size": 800,
        "hidden_size": 96,
        "num_hidden_layers": 2,
        "num_decoder_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 192,
    },
}
LENGTHS = {"reference": (64, 64), "tutorial": (24, 10)}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}


def make_model(size: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model("vanilla_transformer", norm_position="pre", **SIZES[size], **TOKENS)
    return AutoModelForSeq2SeqLM.from_config(config).train()


def make_batch(size: str, rows: int) -> dict[str, torch.Tensor]:
    """Random tokens; every second row ends in padding."""
    generator = torch.Generator().manual_seed(0)
    (source, target), vocabulary = LENGTHS[size], SIZES[size]["vocab_size"]
    ids = torch.randint(3, vocabulary, (rows, source), generator=generator)
    mask = torch.ones_like(ids)
    mask[1::2, source * 3 // 4 :] = 0
    labels = torch.randint(3, vocabulary, (rows, target), generator=generator)
    labels[1::2, target * 3 // 4 :] = -100
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def count_hooks(model: PreTrainedModel) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def measure_speed(size: str, rows: int, rounds: int) -> None:
    model, batch = make_model(size), make_batch(size, rows)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    own_hooks = count_hooks(model)

    def update() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        never = InternalsTracker(model, every=10**9, folder=f"{folder}/never")
        streaming = InternalsTracker(model, every=1, folder=f"{folder}/streaming")
        probing = InternalsTracker(model, every=1, probe=make_batch(size, 2), folder=f"{folder}/probing")
        left = 0

        def tracked(tracker: InternalsTracker) -> Callable[[int], None]:
            def step(number: int) -> None:
                with tracker.step(number, optimizer):
                    update()

            return step

        variants: dict[str, Callable[[int], None]] = {
            "no tracker": lambda number: update(),
            "not due": tracked(never),
            "tracked": tracked(streaming),
            "tracked with probe": tracked(probing),
        }
        for number in range(2, rounds + 3):
            for name, step in variants.items():
                gc.collect()
                taken = cpu_seconds(lambda step=step, number=number: step(number))
                if number > 2:  # the first round warms up
                    seconds.setdefault(name, []).append(taken)
                left = max(left, count_hooks(model) - own_hooks)
        kept = sum(path.stat().st_size for path in Path(f"{folder}/probing").rglob("*") if path.is_file())
    untracked = statistics.median(seconds["no tracker"])
    what = f"{size}, {model.num_parameters():,} parameters, batch {rows}"
    note(f"{what}: no tracker {significant(untracked)} s a step", what=what, rounds=rounds, seconds=seconds)
    for name in ("not due", "tracked", "tracked with probe"):
        extra = [a - b for a, b in zip(seconds[name], seconds["no tracker"], strict=True)]
        percent, low, high = (100 * value / untracked for value in (statistics.median(extra), min(extra), max(extra)))
        line = f"{name}: {percent:+.1f} % of a step ({low:+.1f} to {high:+.1f})"
        if name != "not due":
            line += f", {percent / 50:.2f} % every 50 steps, {percent / 10:.2f} % every 10"
        note(line, what=what, form=name, percent_of_a_step=[percent, low, high])
    note(f"hooks while not due: {left}", hooks_when_not_due=left)
    note(f"on disk: {kept // (rounds + 1):,} bytes a tracked step", bytes_on_disk_per_tracked_step=kept // (rounds + 1))


def measure_memory() -> None:
    model, batch = make_model("tutorial"), make_batch("tutorial", 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    grown, before = {}, 0
    with tempfile.TemporaryDirectory() as folder:
        tracker = InternalsTracker(model, probe=make_batch("tutorial", 2), folder=folder)
        for number in range(1, 241):
            with tracker.step(number, optimizer):
                model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            if number in (20, 40, 240):
                gc.collect()
                grown[number] = resident() - before
                before = resident()
    figures = ", ".join(
        f"steps {first} to {last} {grown[last] / 2**20:+.1f} MiB" for first, last in ((21, 40), (41, 240))
    )
    note(f"resident memory: {figures}", resident_growth=grown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="reference")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--memory", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.memory:
        measure_memory()
    else:
        measure_speed(arguments.size, arguments.batch, arguments.rounds)


if __name__ == "__main__":
    main()
