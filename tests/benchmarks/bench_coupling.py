"""Coupling against the plain form: one example at a time, whole gradients kept.

    python -m tests.benchmarks.bench_coupling --model gpt2 --pieces 20 [--layers last-4] [--answer first] [--repeats 3]
    python -m tests.benchmarks.bench_coupling --model llama --pieces 400 --stream top-8 --forms exact --repeats 1
    python -m tests.benchmarks.bench_coupling --model tiny --pieces 10000 --stream sketch --blocks 512 --forms exact
    python -m tests.benchmarks.bench_coupling --model llama --pieces 8 --tools captum,kronfluence,trak --skip_memory

Speed: the forms in one process, in turn, medians of CPU seconds over the repeats, and ratios of `plain` to the others.
`exact` is what the analyzer does, by the stream that is named; `medium` is the same with torch free to choose how it
multiplies float32 matrices (`--matmul_precision medium`), and `bfloat16` with the model in that format; `capture` is
the first part of it alone, and `floor` one batched forward and backward of the frozen model, with the head at the
answer positions. `--tools` adds other programs, as far as they can do the same work. With `--blocks` the work goes by
blocks on disk, bounded by so many MiB.
Memory: each form in a process of its own, peak above what the loaded model takes. Models are of the named sizes, with
random weights; tokens are random; nothing is downloaded.
"""

import argparse
import copy
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from trainers.coupling import Coupling, CouplingAnalyzer, EncodedPiece
from trainers.coupling.capture import evaluation_mode, frozen

from .coupling_tools import TOOLS, tool_versions

# GPT-2 small, and a Llama of 135 million parameters in the shape of SmolLM2-135M.
SIZES = {
    "gpt2": {"model_type": "gpt2"},
    "llama": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "tiny_llama": {
        "model_type": "llama",
        "vocab_size": 40001,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    },
    "tiny": {"model_type": "gpt2", "n_embd": 64, "n_layer": 4, "n_head": 4, "vocab_size": 40001},
}


def make_model(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**SIZES[name])).eval()


def make_pieces(count: int) -> list[EncodedPiece]:
    """Prompts of 30 to 62 tokens, answers of 1 to 3."""
    generator = torch.Generator().manual_seed(0)

    def tokens(low: int, high: int) -> tuple[int, ...]:
        length = int(torch.randint(low, high + 1, (), generator=generator))
        return tuple(torch.randint(5, 40000, (length,), generator=generator).tolist())

    return [EncodedPiece(f"p{index}", tokens(30, 62), tokens(1, 3)) for index in range(count)]


def plain(model: PreTrainedModel, pieces: list[EncodedPiece], layers: str, answer: str) -> torch.Tensor:
    """One backward per piece through the whole model, all gradients held, one product at the end."""
    targets = CouplingAnalyzer(model, layers=layers).targets
    parameters = [parameter for layer in targets for parameter in (layer.weight, *layer.biases)]
    kept = []
    for piece in pieces:
        wanted = torch.tensor(piece.answer_ids if answer == "full" else piece.answer_ids[:1])
        tokens = torch.tensor([[*piece.prompt_ids, *wanted[:-1].tolist()]])
        logits = model(input_ids=tokens, use_cache=False).logits[0, len(piece.prompt_ids) - 1 :]
        model.zero_grad(set_to_none=True)
        logits.log_softmax(-1).gather(1, wanted[:, None]).sum().backward()
        gradient = torch.cat([parameter.grad.flatten() for parameter in parameters])
        kept.append(gradient / gradient.norm())
    model.zero_grad(set_to_none=True)
    stacked = torch.stack(kept)
    return stacked @ stacked.T


def exact(model: PreTrainedModel, pieces: list[EncodedPiece], layers: str, answer: str) -> Coupling:
    memory = OPTIONS.blocks * 2**20 if OPTIONS.blocks else None
    analyzer = CouplingAnalyzer(model, layers=layers, answer=answer, stream=OPTIONS.stream, memory=memory)
    if not OPTIONS.blocks:
        return analyzer.fit(pieces)
    with tempfile.TemporaryDirectory() as folder:
        return analyzer.fit(pieces, folder)


def bfloat16(model: PreTrainedModel, pieces: list[EncodedPiece], layers: str, answer: str) -> Coupling:
    return exact(HALVES.setdefault(id(model), copy.deepcopy(model).bfloat16()), pieces, layers, answer)


def medium(model: PreTrainedModel, pieces: list[EncodedPiece], layers: str, answer: str) -> Coupling:
    torch.set_float32_matmul_precision("medium")
    try:
        return exact(model, pieces, layers, answer)
    finally:
        torch.set_float32_matmul_precision("highest")


def capture(model: PreTrainedModel, pieces: list[EncodedPiece], layers: str, answer: str) -> None:
    analyzer = CouplingAnalyzer(model, layers=layers, answer=answer)
    for batch in analyzer.batches(pieces):
        analyzer.capture.terms(batch)


def floor(model: PreTrainedModel, pieces: list[EncodedPiece], layers: str, answer: str) -> None:
    """The same batches through the frozen model, backward to the output of the first block's inputs and no hooks."""
    analyzer = CouplingAnalyzer(model, layers=layers, answer=answer)
    first = analyzer.targets[0].modules[0]
    with evaluation_mode(model), frozen(model), torch.enable_grad():
        handle = first.register_forward_hook(lambda module, args, output: output.detach().requires_grad_() + 0)
        for batch in analyzer.batches(pieces):
            analyzer.capture.log_probabilities_with_graph(batch).sum().backward()
        handle.remove()


FORMS: dict[str, Callable] = {
    "plain": plain,
    "exact": exact,
    "capture": capture,
    "floor": floor,
    "medium": medium,
    "bfloat16": bfloat16,
    **TOOLS,
}
OPTIONS = argparse.Namespace(stream="exact", blocks=0)
HALVES: dict[int, PreTrainedModel] = {}


def resident(field: str) -> int:
    """Bytes of this process: `VmRSS` now, `VmHWM` at most since the peak was last reset (Linux)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def measure_memory(arguments: argparse.Namespace) -> None:
    model, pieces = make_model(arguments.model), make_pieces(arguments.pieces)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # building the model had a peak of its own
    FORMS[arguments.memory_of](model, pieces, arguments.layers, arguments.answer)
    print(json.dumps({"above_model": resident("VmHWM") - before}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=SIZES, default="gpt2")
    parser.add_argument("--pieces", type=int, default=20)
    parser.add_argument("--layers", default="auto")
    parser.add_argument("--answer", choices=("full", "first"), default="first")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--stream", default="exact")
    parser.add_argument("--blocks", type=int, default=0, help="MiB of memory for work by blocks on disk")
    parser.add_argument("--forms", default="plain,exact,capture,floor", help="which, by commas")
    parser.add_argument(
        "--tools", default="", help="other programs to compare with, by commas: captum,kronfluence,trak"
    )
    parser.add_argument("--skip_memory", action="store_true")
    parser.add_argument("--memory_of", choices=FORMS, help=argparse.SUPPRESS)
    arguments = parser.parse_args(namespace=OPTIONS)
    torch.set_num_threads(1)
    if arguments.memory_of:
        measure_memory(arguments)
        return
    tools = [name for name in arguments.tools.split(",") if name]
    forms = [*arguments.forms.split(","), *tools]
    model, pieces = make_model(arguments.model), make_pieces(arguments.pieces)
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    results = {}
    for repeat in range(arguments.repeats):
        for name in forms:
            if name == "bfloat16" and not repeat:
                bfloat16(model, pieces[:1], arguments.layers, arguments.answer)  # makes the copy
            started = time.process_time()
            results[name] = FORMS[name](model, pieces, arguments.layers, arguments.answer)
            seconds[name].append(time.process_time() - started)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    record = {
        **{name: getattr(arguments, name) for name in ("model", "pieces", "layers", "answer", "stream", "blocks")},
        "cpu_seconds": medians,
        "pieces_per_cpu_second": {name: arguments.pieces / value for name, value in medians.items()},
        "plain_over": {name: medians["plain"] / medians[name] for name in forms if "plain" in forms},
    }
    if {"capture", "floor"} <= set(forms):
        record["capture_over_floor"] = medians["capture"] / medians["floor"]
    for name in ("exact", "medium", "bfloat16"):
        if name in forms:
            cost = results[name].cost
            record[f"{name}_products_over_gradients"] = cost["gram_cpu_seconds"] / cost["capture_cpu_seconds"]
            record[f"{name}_stream"] = results[name].stream
            if "plain" in forms:
                difference = results["plain"] - torch.from_numpy(results[name].matrix)
                pairs = difference[tuple(torch.triu_indices(*difference.shape, 1))]
                record[f"{name}_difference"] = {
                    "rms": pairs.square().mean().sqrt().item(),
                    "max": pairs.abs().max().item(),
                }
    if tools:
        record["versions"] = tool_versions(tools)
        if "exact" in forms:
            record["over_exact"] = {name: medians[name] / medians["exact"] for name in tools}
        if "plain" in forms:
            # Of pairs: the long sums of `plain` in float32 are off by some thousandths in the norms.
            pairs = tuple(torch.triu_indices(len(pieces), len(pieces), 1))
            record["largest_difference"] = {
                name: (results["plain"] - results[name])[pairs].abs().max().item() for name in tools
            }
    if not arguments.skip_memory:
        peaks = {}
        for name in forms:
            if name in ("plain", "exact"):
                command = [sys.executable, "-m", "tests.benchmarks.bench_coupling", *sys.argv[1:], "--memory_of", name]
                output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                peaks[name] = json.loads(output)["above_model"]
        record["peak_bytes_above_model"] = peaks
        if len(peaks) == 2:
            record["memory_ratio"] = peaks["plain"] / peaks["exact"]
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
