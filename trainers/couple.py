"""Measure the knowledge coupling of a language model and write a report.

    python -m trainers.couple --model gpt2 --dataset hotpotqa --max_samples 100 --output coupling/
    python -m trainers.couple --model outputs/run --dataset facts.jsonl --output outputs/run/coupling --validate 12
    accelerate launch --num_processes 2 -m trainers.couple --model gpt2 --dataset musique --memory 4GB

`--help` lists every option, `--list` every data set.
"""

import argparse
import contextlib
import dataclasses
import math
import os
import platform
import re
import resource
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedModel

from .arguments import check_value
from .command import CommandParser, run_command
from .coupling import READERS, Coupling, CouplingAnalyzer, PieceSet, read_pieces
from .coupling.analyzer import DEFAULT_MEMORY, SMALLEST_MEMORY, started_processes
from .coupling.figures import distribution, heat_map, ripple_chart
from .coupling.page import make_page
from .coupling.report import HIGH_COUPLING, LOW_COUPLING, make_report, representatives
from .coupling.ripple import FULL, PREDICTIONS, SIZES, EditKind, validate
from .distributed import on_main_process
from .errors import UserError, did_you_mean, one_line, plain
from .figures import save_figure
from .files import json_text, only_user_of, write_text
from .loading import language_model_class, load_model
from .run import versions

REPORT = "coupling_report.json"
AFTER_INTERRUPT = "with --memory the same command goes on from the blocks it has finished, else it starts again"


@strict
@dataclass(kw_only=True)
class CoupleArguments:
    """What the command may be told."""

    model: str = field(metadata={"help": "Hub id, folder, run folder or .gguf file of a language model."})
    dataset: str = field(metadata={"help": "A data set of --list, or a .jsonl file with question and answer."})
    output: str = field(
        default="coupling",
        metadata={"also": ["--output_dir"], "help": "Folder for the report; made if it does not exist."},
    )
    data_dir: str | None = field(default=None, metadata={"help": "Folder or file with the data set's rows."})
    split: str | None = field(default=None, metadata={"help": "Split of the data set; default is its own."})
    max_samples: int = field(default=100, metadata={"help": "Take the pieces of the first so many rows."})
    layers: str = field(
        default="auto",
        metadata={
            "help": "Target layers: auto (MLP output projections), last-4 (the last four of them), all-linear, or name "
            "patterns separated by commas."
        },
    )
    answer: Literal["full", "first"] = field(
        default="full", metadata={"help": "Differentiate the whole answer, or its first token."}
    )
    stream: str = field(
        default="auto",
        metadata={
            "help": "exact; top-8: eight tokens per piece and layer; sketch or sketch-4096: so many numbers per piece; "
            "auto: exact up to 500 pieces, top-8 up to 5000, sketch beyond."
        },
    )
    memory: str | None = field(
        default=None,
        metadata={
            "help": "Memory for gradients and inner products in each process, such as 4GB, besides the model and the "
            "result. The work is then cut into blocks on disk, from which a killed run goes on. Default: all in memory "
            "if that takes less than half of the machine's, else blocks of 2GiB."
        },
    )
    bias: bool = field(default=True, metadata={"help": "Count the biases of the target layers."})
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = field(
        default="float32", metadata={"help": "Number format of the model; inner products are float32 at least."}
    )
    matmul_precision: Literal["highest", "high", "medium"] = field(
        default="highest",
        metadata={
            "help": "How torch may round inside products of float32 matrices: the lower, the faster on some devices."
        },
    )
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, cuda:1, ...; default is a GPU if any."})
    device_map: str | None = field(
        default=None, metadata={"help": "auto, balanced, ...: spread a large model over all devices, in place of one."}
    )
    tokens_per_batch: int | None = field(
        default=None,
        metadata={
            "help": "Tokens of a forward pass, padding included. Default: 128, or 256 if all target "
            "layers lie in the upper half."
        },
    )
    revision: str | None = field(default=None, metadata={"help": "Hub revision of the model."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that the model's repository brings."})
    high: float | int = field(default=HIGH_COUPLING, metadata={"help": "Pairs with at least this coupling are high."})
    low: float | int = field(default=LOW_COUPLING, metadata={"help": "Pairs below this coupling are low."})
    # `validate` itself is a name that strict dataclasses keep for themselves.
    edits: int = field(
        default=0, metadata={"flag": "validate", "help": "Really edit so many pieces and measure the ripples."}
    )
    edit: EditKind = field(
        default="answer",
        metadata={"help": "answer: along its gradient; replacement: along that of the new answer; lora: by adapters."},
    )
    edit_sizes: str = field(
        default=",".join(map(str, SIZES)),
        metadata={
            "help": "Predicted own gains of the edits, in nats, by commas; full: replace until the new answer is more "
            "probable than the old one."
        },
    )
    edit_steps: int = field(default=1, metadata={"help": "Make each edit in so many steps."})
    ripple_prediction: str = field(
        default="first_order",
        metadata={
            "help": "Predictions of the ripples, by commas: first_order, which is always made; second_order adds the "
            "curvature; path takes the gradients at start, middle and end of the edit."
        },
    )
    edit_size: float | int = field(default=0.3, metadata={"help": "Predicted own gain of the charted edits, in nats."})
    seed: int = field(default=0, metadata={"help": "Of permutations, of the draw of edits and of their intervals."})

    def validate_ranges(self) -> None:
        for name in ("max_samples", "tokens_per_batch"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}; it must be at least 1")
        if not -1 <= self.low <= self.high <= 1:
            raise ValueError(f"--low {self.low} and --high {self.high} must satisfy -1 <= low <= high <= 1")
        if self.edits < 0:
            raise ValueError(f"--validate is {self.edits}; it must be at least 0")
        if self.edit_size <= 0:
            raise ValueError(f"--edit_size is {self.edit_size}; it must be above 0")
        if FULL in sizes_of(self.edit_sizes) and self.edit != "replacement":
            raise ValueError(f"--edit_sizes full: needs new answers, --edit replacement; --edit is {self.edit}")
        if self.edit_steps < 1:
            raise ValueError(f"--edit_steps is {self.edit_steps}; it must be at least 1")
        predictions_of(self.ripple_prediction)
        if self.memory is not None:
            bytes_of(self.memory)
        if self.device is not None and self.device_map is not None:
            raise ValueError("--device and --device_map cannot be given together")
        if self.device is not None:
            try:
                torch.device(self.device)
            except RuntimeError as error:
                raise ValueError(f"--device {self.device}: {one_line(error)}") from error


def bytes_of(text: str) -> int:
    """A number of bytes from a text such as "4GB", "512MiB" or "2e9".

    Raises:
        ValueError: for another text, or less than the smallest amount.
    """
    found = re.fullmatch(r"(\d+(?:\.\d*)?(?:e\d+)?)\s*(?:([kmgt])(i?))?b?", text.strip().lower())
    if found is None:
        raise ValueError(f"--memory is {text!r}; it must be a number of bytes, or a number with a unit, like 4GB")
    base = 1024 if found[3] else 1000
    value = int(float(found[1]) * base ** (" kmgt".index(found[2] or " ")))
    if value < SMALLEST_MEMORY:
        raise ValueError(f"--memory is {text}; it must be at least {SMALLEST_MEMORY >> 20}MiB")
    return value


def sizes_of(text: str) -> list[float]:
    """The sizes of edits from a text such as "0.1,0.3,full".

    Raises:
        ValueError: for a text that is no list of numbers above 0 and "full".
    """
    words = [word.strip() for word in text.split(",")]
    try:
        sizes = [float(word) for word in words if word != "full"]
    except ValueError:
        sizes = [0.0]
    if not all(0 < size < math.inf for size in sizes):
        raise ValueError(f"--edit_sizes is {text!r}; it must be numbers above 0, or full, separated by commas")
    return [*sizes, *([FULL] if "full" in words else [])]


def predictions_of(text: str) -> list[str]:
    """The predictions of ripples beside that of first order, from a text such as "second_order,path".

    Raises:
        ValueError: for an unknown one.
    """
    known = ("first_order", *PREDICTIONS)
    words = [word.strip() for word in text.split(",")]
    for word in words:
        if word not in known:
            hint = did_you_mean(word, known)
            raise ValueError(f"--ripple_prediction: unknown prediction {word!r}{hint}; known: {', '.join(known)}")
    return [name for name in PREDICTIONS if name in words]


def parse(argv: Sequence[str]) -> CoupleArguments:
    """A command line as checked arguments.

    Raises:
        UserError: for an unknown option, or a value that breaks a rule.
        SystemExit: with code 0 for `--help` and `--list`.
    """
    parser = CommandParser(prog="python -m trainers.couple", description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", default=argparse.SUPPRESS, help="the same as --model")
    parser.add_argument("--list", action="store_true", help="show the data sets and end")
    fields = {item.metadata.get("flag", item.name): item for item in dataclasses.fields(CoupleArguments)}
    for name, item in fields.items():
        switch: dict[str, Any] = {"nargs": "?", "const": "true"} if item.type is bool else {}
        default = "" if item.default in (dataclasses.MISSING, None) else f" Default: {item.default}."
        parser.add_argument(
            f"--{name}",
            *item.metadata.get("also", ()),
            default=argparse.SUPPRESS,
            dest=name,
            metavar=name.upper(),
            help=item.metadata["help"] + default,
            **switch,
        )
    found, unknown = parser.parse_known_args(argv)
    if unknown:
        option = unknown[0].split("=")[0]
        raise UserError(f"unknown option {unknown[0]!r}{did_you_mean(option, [f'--{name}' for name in fields])}")
    if found.list:
        print(list_datasets())
        raise SystemExit(0)
    values = {
        fields[flag].name: _value(flag, raw, fields[flag].type) for flag, raw in vars(found).items() if flag in fields
    }
    for name in ("model", "dataset"):
        if name not in values:
            raise UserError(f"--{name} is missing")
    try:
        return CoupleArguments(**values)
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise UserError(one_line(error)) from error


def list_datasets() -> str:
    """One line for each data set: name, source, what its pieces are."""
    width = max(map(len, READERS))
    lines = [f"{name:{width}}  {reader.hub_id or 'local files':28}  {reader.about}" for name, reader in READERS.items()]
    return "\n".join(lines)


def run(arguments: CoupleArguments, command: Sequence[str] = ()) -> dict[str, Any]:
    """Analyse, and write every file of the report into the output folder.

    Returns:
        The report; nothing in a process that only helps the first one.

    Raises:
        UserError: naming option, file, row, piece or layer; nothing that stood in the folder is damaged.
    """
    with contextlib.ExitStack() as claim:
        return _run(arguments, command, claim)


def _run(arguments: CoupleArguments, command: Sequence[str], claim: contextlib.ExitStack) -> dict[str, Any]:
    folder = Path(arguments.output).expanduser()
    found = read_pieces(arguments.dataset, arguments.data_dir, arguments.split, arguments.max_samples)
    processes = started_processes(arguments.device == "cpu")
    on_main_process(lambda: prepare(folder, claim))
    torch.set_float32_matmul_precision(arguments.matmul_precision)
    device = arguments.device or (None if arguments.device_map else str(processes.device))
    model, tokenizer = load_model(
        arguments.model,
        auto_class=language_model_class,
        revision=arguments.revision,
        trust_remote_code=arguments.trust_remote_code,
        dtype=getattr(torch, arguments.dtype),
        device=device,
        device_map=arguments.device_map,
        option="--model",
    )
    memory = bytes_of(arguments.memory) if arguments.memory else None
    analyzer = CouplingAnalyzer(
        model,
        tokenizer,
        layers=arguments.layers,
        answer=arguments.answer,
        stream=arguments.stream,
        bias=arguments.bias,
        tokens_per_batch=arguments.tokens_per_batch,
        memory=memory,
        progress=sys.stderr.isatty() and processes.is_main_process,
    )
    encoded = analyzer.encode(found.pieces)
    stored = analyzer.term_bytes(encoded)
    by_blocks = memory is not None or processes.num_processes > 1 or stored > physical_memory() / 2
    if by_blocks:
        on_main_process(lambda: check_space(folder, stored))
    if processes.is_main_process:
        print(f"pieces   {len(found.pieces)} of {found.rows} rows: {found.source}")
        for reason, number in found.left_out.items():
            print(plain(f"         {number} {reason}"))
        print(
            f"model    {type(model).__name__}, {model.num_parameters():,} parameters, {model.device}, {arguments.dtype}"
        )
        layers = analyzer.targets
        print(f"layers   {len(layers)} x {layers[-1].name}, {analyzer.dimension:,} numbers per gradient")
        if by_blocks:
            print(
                f"blocks   up to {stored / 1e9:.1f} GB on disk, {(memory or DEFAULT_MEMORY) / 1e9:.1f} GB in memory for"
                f" each of {processes.num_processes} process(es)"
            )
    started = time.perf_counter()
    coupling = analyzer.fit(found.pieces, folder if by_blocks else None)
    seconds = time.perf_counter() - started
    if not processes.is_main_process:
        return {}
    validation = None
    if arguments.edits:
        validation = validate(
            analyzer,
            found.pieces,
            arguments.edits,
            edit=arguments.edit,
            sizes=sizes_of(arguments.edit_sizes),
            chosen_size=arguments.edit_size,
            coupling=coupling,
            seed=arguments.seed,
            steps=arguments.edit_steps,
            predictions=predictions_of(arguments.ripple_prediction),
        )
    report = write_report(folder, arguments, found, coupling, device_facts(model, seconds), validation, command)
    if by_blocks:
        shutil.rmtree(analyzer.blocks_folder(encoded, folder), ignore_errors=True)
    return report


def physical_memory() -> int:
    """Bytes of the machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_space(folder: Path, needed: int) -> None:
    """Refuse to begin what the disk cannot hold.

    Raises:
        UserError: if the folder's disk has less room than what is to be stored.
    """
    held = sum(path.stat().st_size for path in folder.glob("blocks-*/*.safetensors"))
    free = shutil.disk_usage(folder).free + held
    if needed > free:
        raise UserError(
            f"--output: {folder} has room for {free / 1e9:.1f} GB, and the blocks take up to {needed / 1e9:.1f} GB;"
            " take fewer layers or pieces, or --stream sketch"
        )


def write_report(
    folder: Path,
    arguments: CoupleArguments,
    found: PieceSet,
    coupling: Coupling,
    device: dict[str, Any],
    validation: dict[str, Any] | None,
    command: Sequence[str],
) -> dict[str, Any]:
    """Write matrices, pictures, page and, last, the report itself. Returns the report."""
    files = ["coupling.safetensors", "heat_map.png", "distribution.png", "coupling.html", REPORT]
    if validation is not None:
        files[-1:] = ["ripple.png", "ripple_report.json", REPORT]
    model_name = Path(arguments.model).name if os.path.isabs(arguments.model) else arguments.model
    metadata = {
        "model": model_name,
        "revision": arguments.revision,
        "dtype": arguments.dtype,
        "matmul_precision": arguments.matmul_precision,
        "dataset": Path(arguments.dataset).name,
        "source": found.source,
        "rows": found.rows,
        "left_out": found.left_out,
        "max_samples": arguments.max_samples,
        "layer_selection": arguments.layers,
        "bias": arguments.bias,
        "seed": arguments.seed,
        "memory": arguments.memory,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": versions(),
        "command": " ".join(
            ["python -m trainers.couple", *(Path(word).name if os.path.isabs(word) else word for word in command)]
        ),
    }
    report = make_report(coupling, metadata, device, files, high=arguments.high, low=arguments.low, seed=arguments.seed)
    if validation is not None:
        report["ripple_validation"] = {key: value for key, value in validation.items() if key != "chosen"}
    try:
        coupling.save(folder)
        shown = representatives(coupling, arguments.seed)
        save_figure(heat_map(shown), folder / "heat_map.png")
        save_figure(distribution(shown, arguments.high, arguments.low), folder / "distribution.png")
        write_text(folder / "coupling.html", make_page(coupling, report))
        if validation is not None:
            save_figure(ripple_chart(validation), folder / "ripple.png")
            write_text(folder / "ripple_report.json", json_text(validation))
        write_text(folder / REPORT, json_text(report))
    except OSError as error:
        raise UserError(f"--output: cannot write to {folder}: {error.strerror}") from error
    return report


def prepare(folder: Path, claim: contextlib.ExitStack) -> None:
    """Make the output folder, try to write to it, and claim it, before any long work.

    Args:
        folder: the folder.
        claim: no other analysis enters it before this is closed.

    Raises:
        UserError: if it cannot be written, or another process is at work in it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        claim.enter_context(only_user_of(folder))
    except OSError as error:
        raise UserError(f"--output: cannot write to {folder}: {error.strerror}") from error


def device_facts(model: PreTrainedModel, seconds: float) -> dict[str, Any]:
    """What the analysis ran on, its time and its memory."""
    device = model.device
    facts: dict[str, Any] = {"device": str(device), "threads": torch.get_num_threads(), "seconds": seconds}
    if device.type == "cuda":
        facts |= {
            "name": torch.cuda.get_device_name(device),
            "peak_allocated_bytes": torch.cuda.max_memory_allocated(device),
            "peak_reserved_bytes": torch.cuda.max_memory_reserved(device),
        }
    else:
        unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        facts |= {"name": f"{platform.machine()} CPU, {os.cpu_count()} cores", "peak_resident_bytes": peak}
    return facts


def print_summary(report: dict[str, Any], folder: Path) -> None:
    """The report in a few lines."""
    analysis, device = report["coupling_analysis"], report["gpu_performance"]
    thresholds = analysis["thresholds"]
    print(f"time     {device['capture_seconds']:.1f} s gradients, {device['gram_seconds']:.1f} s inner products")
    stream = report["gradient_analysis"]["stream"]
    if "error" in stream and stream["error"]["pairs"]:
        error = stream["error"]
        print(f"stream   {stream['name']}: error {error['rms']:.4f} RMS, {error['max']:.4f} at most,", end=" ")
        print(f"on {error['pairs']} sampled pairs")
    print(f"pairs    {analysis['total_pairs']}; {analysis['high_pairs']} with {thresholds['high']}", end="")
    print(f", {analysis['moderate_pairs']} with {thresholds['moderate']}, {analysis['low_pairs']} below")
    if analysis["mean"] is not None:
        print(f"         mean {analysis['mean']:.3f}, standard deviation {analysis['std']:.3f}")
    zero = report["gradient_analysis"]["zero_gradients"]
    if zero:
        print(plain(f"warning  {len(zero)} piece(s) with a zero gradient have no coupling: {', '.join(zero[:3])}"))
    for pair in report["high_coupling_pairs"]["top"][:3]:
        print(plain(f"  {pair['coupling']:.3f}  {' | '.join(pair.get('answers', pair['pieces']))}"))
    validation = report.get("ripple_validation")
    if validation:
        print(f"ripples  {validation['edits']} edits, weights restored: {validation['restored_bit_for_bit']}")
        print("         own gain  first-order  coupling  right signs  linearity error")
        for size in validation["sizes"]:
            values = [size["own_gain"]["median"]]
            values += [size["spearman"][key]["median"] for key in ("first_order", "coupling")]
            _print_row(
                [*values, size["sign_agreement"]["value"], size["linearity_error"]["median"]], (8, 11, 8, 11, 15)
            )
        for kind in validation["predictions_hold_up_to_own_gain"]:
            print(f"         own gain  {kind.replace('_', '-'):>12}  right signs  linearity error")
            for size in validation["sizes"]:
                values = [size["own_gain"]["median"], size["spearman"][kind]["median"]]
                found = size["predictions"][kind]
                values += [found["sign_agreement"]["value"], found["linearity_error"]["median"]]
                _print_row(values, (8, 12, 11, 15))
    print(f"report   {folder / REPORT}\npage     {folder / 'coupling.html'}")


def _print_row(values: Sequence[float | None], widths: Sequence[int]) -> None:
    cells = ["-" if value is None else f"{value:.3f}" for value in values]
    print("         " + "  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)))


def _value(name: str, raw: str, expected: Any) -> Any:
    """A command-line word as the type of its field."""
    value: Any = raw
    if expected is bool:
        if raw.lower() not in ("true", "false"):
            raise UserError(f"--{name}: expected true or false, got {raw!r}")
        return raw.lower() == "true"
    for kind in (int, float):
        if expected is kind or kind in getattr(expected, "__args__", ()):
            try:
                value = kind(raw)
                break
            except ValueError:
                continue
    return check_value(f"--{name}", value, expected)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code: 0 on success, 2 for a mistake the user can mend, 130 for Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)

    def work() -> int:
        arguments = parse(argv)
        report = run(arguments, argv)
        if report:
            print_summary(report, Path(arguments.output))
        return 0

    return run_command(work, after_interrupt=AFTER_INTERRUPT, batch_option="--tokens_per_batch")


if __name__ == "__main__":
    sys.exit(main())
