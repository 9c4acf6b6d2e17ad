"""Coupling against the plain form: one example at a time, whole gradients kept.

    python -m tests.benchmarks.bench_coupling --model gpt2 --pieces 20 [--layers last-4] [--answer first] [--repeats 3]
    python -m tests.benchmarks.bench_coupling --model llama --pieces 400 --stream top-8 --forms exact --repeats 1
    python -m tests.benchmarks.bench_coupling --model tiny --pieces 10000 --stream sketch --blocks 512 --forms exact
    python -m tests.benchmarks.bench_coupling --model llama --pieces 8 --tools captum,kronfluence,trak --skip_memory
    python -m tests.benchmarks.bench_coupling --model tiny --growth [--repeats 3]

Speed: the forms in one process, in turn, medians of CPU seconds over the repeats, and how many times as long `plain`
takes (the first form, where `plain` is left out), with the least and most of a repeat.
`exact` is what the analyzer does, by the stream that is named; `medium` is the same with torch free to choose how it
multiplies float32 matrices (`--matmul_precision medium`), and `bfloat16` with the model in that format; `capture` is
the first part of it alone, and `floor` one batched forward and backward of the frozen model, with the head at the
answer positions. `--tools` adds other programs, as far as they can do the same work. With `--blocks` the work goes by
blocks on disk, bounded by so many MiB.
Memory: each form in a process of its own, peak above what the loaded model takes. `--growth` takes the time against the
number of pieces instead, by the streams that scale. Models are of the named sizes, with
random weights; tokens are random; nothing is downloaded.
"""

import argparse
import copy
import tempfile
from collections.abc import Callable

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from trainers.coupling import Coupling, CouplingAnalyzer, EncodedPiece
from trainers.coupling.capture import evaluation_mode, frozen

from .coupling_tools import TOOLS, name_and_version
from .measuring import in_new_process, interleaved, note, note_growth, note_memory, note_speed, peak_of

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
    "tiny": {
        "model_type": "gpt2",
        "n_embd": 64,
        "n_layer": 4,
        "n_head": 4,
        "vocab_size": 40001,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
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
GROWTH_PIECES = (32, 64, 128, 256)
HALVES: dict[int, PreTrainedModel] = {}


def peak_memory(form: str, options: argparse.Namespace) -> int:
    """Bytes that a form takes above the loaded model; to be called in a new process."""
    torch.set_num_threads(1)
    vars(OPTIONS).update(vars(options))
    model, pieces = make_model(options.model), make_pieces(options.pieces)
    return peak_of(lambda: FORMS[form](model, pieces, options.layers, options.answer))


def measure_growth(options: argparse.Namespace) -> None:
    model = make_model(options.model)

    def action(count: int, stream: str) -> Callable[[], object]:
        pieces = make_pieces(count)
        return lambda: CouplingAnalyzer(model, layers=options.layers, answer=options.answer, stream=stream).fit(pieces)

    streams = ("exact", "sketch")
    actions = {count: {stream: action(count, stream) for stream in streams} for count in GROWTH_PIECES}
    note_growth(f"{options.model}, layers {options.layers}", "pieces", actions, options.repeats)


def measure(options: argparse.Namespace) -> None:
    tools = [name for name in options.tools.split(",") if name]
    forms = [*options.forms.split(","), *tools]
    model, pieces = make_model(options.model), make_pieces(options.pieces)
    if "bfloat16" in forms:
        bfloat16(model, pieces[:1], options.layers, options.answer)  # makes the copy
    results: dict[str, object] = {}

    def action(form: str) -> Callable[[], None]:
        def run() -> None:
            results[form] = FORMS[form](model, pieces, options.layers, options.answer)

        return run

    comparison = interleaved({form: action(form) for form in forms}, options.repeats, warm_up=False)
    settings = f"{options.model}, {options.pieces} pieces, layers {options.layers}, answer {options.answer}"
    if options.blocks:
        settings += f", blocks of {options.blocks} MiB"
    baseline = "plain" if "plain" in forms else forms[0]
    note_speed(settings, comparison, baseline)
    rates = {form: options.pieces / comparison.median(form) for form in forms}
    note(
        "pieces per CPU second: " + ", ".join(f"{form} {rate:.2f}" for form, rate in rates.items()),
        what=settings,
        pieces_per_cpu_second=rates,
    )
    if {"capture", "floor"} <= set(forms):
        ratio, low, high = comparison.ratio("floor", "capture")
        note(f"capture over floor: {ratio:.2f} ({low:.2f} to {high:.2f})", capture_over_floor=[ratio, low, high])
    for form in ("exact", "medium", "bfloat16"):
        found = results.get(form)
        if not isinstance(found, Coupling):
            continue
        products = found.cost["gram_cpu_seconds"] / found.cost["capture_cpu_seconds"]
        line = f"{form}: stream {found.stream['name']}, products take {products:.2f} of the gradients' time"
        if error := found.stream.get("error"):
            line += f", error {error['rms']:.4f} (rms) and {error['max']:.4f} (most) of {error['pairs']} pairs"
        figures: dict[str, object] = {"form": form, "stream": found.stream, "products_over_gradients": products}
        if "plain" in forms:
            rms, largest = differences(results["plain"], torch.from_numpy(found.matrix))
            line += f", differs from plain by {rms:.1e} (rms) and {largest:.1e} (most)"
            figures |= {"rms_difference": rms, "largest_difference": largest}
        note(line, **figures)
    if tools:
        for form in tools:
            line = name_and_version(form)
            figures = {"form": line}
            if "exact" in forms:
                ratio, low, high = comparison.ratio("exact", form)
                line += f": {ratio:.1f} times as long as exact ({low:.1f} to {high:.1f})"
                figures["over_exact"] = [ratio, low, high]
            if "plain" in forms:
                rms, largest = differences(results["plain"], results[form])
                line += f", differs from plain by {rms:.1e} (rms) and {largest:.1e} (most)"
                figures |= {"rms_difference": rms, "largest_difference": largest}
            note(line, **figures)
    measured = [form for form in forms if form in ("plain", "exact")]
    if measured and not options.skip_memory:
        peaks = {form: in_new_process(peak_memory, form, options) for form in measured}
        note_memory("peak memory above the model", peaks, measured[0])


def differences(one: torch.Tensor, other: torch.Tensor) -> tuple[float, float]:
    """Root mean square and most, over pairs: the long sums of `plain` in float32 are off by some thousandths in the
    norms."""
    apart = (one - other)[tuple(torch.triu_indices(*one.shape, 1))]
    return apart.square().mean().sqrt().item(), apart.abs().max().item()


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
    parser.add_argument("--growth", action="store_true", help="time against the number of pieces")
    options = parser.parse_args(namespace=OPTIONS)
    torch.set_num_threads(1)
    (measure_growth if options.growth else measure)(options)


if __name__ == "__main__":
    main()
