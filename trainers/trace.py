"""Walk through one forward pass of a model, stage by stage.

    python -m trainers.trace outputs/run "some text" "target text"
    python -m trainers.trace gpt2 "some text" --layer 0,3 --only attention
    python -m trainers.trace --compare eager sdpa torch outputs/run "some text" "target text"

Each line is a value of the model's own: its place, its shape, and mean, standard deviation, minimum and maximum over
all entries. `--help` lists every option.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel, set_seed
from transformers import PreTrainedTokenizerBase as Tokenizer

from hf_models.vanilla_transformer import VanillaTransformerConfig

from .command import CommandParser, run_command
from .errors import UserError, did_you_mean, one_line, plain
from .files import json_text
from .loading import load_model
from .tracing import STAGES, ModelInputs, Record, Walk, prepare, recorded
from .tracing.compare import IMPLEMENTATIONS, compare, comparison_lines, make_variants
from .tracing.explain import explain, explanation_lines
from .tracing.inputs import decoder_inputs, words

SCHEMA_VERSION = 1
DTYPES = ("float32", "bfloat16", "float16", "float64")
# What is compared where no model is named: a model with random weights, and a vocabulary so small that the memory of
# the logits does not hide that of attention.
EXAMPLE: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 1024,
}


def make_parser() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = CommandParser(
        prog="python -m trainers.trace",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", nargs="?", help="run folder, model folder, .gguf file or Hub id")
    parser.add_argument(
        "text",
        nargs="?",
        help="what the model reads; for a model that reads numbers: numbers, random, random:SEED or an .npz file",
    )
    parser.add_argument(
        "target",
        nargs="?",
        help="an encoder-decoder's target (by default it writes one), or a language model's continuation",
    )
    parser.add_argument(
        "--layer",
        help="show these layers only, separated by commas: 0, decoder.1, step.2 (a reasoning step), tick.3; layers "
        "count from 0, steps and ticks from 1",
    )
    parser.add_argument(
        "--only", help=f"show these stages only, separated by commas: {', '.join(STAGES)}, or encoder, decoder"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--ids", action="store_true", help="text and target are token ids; needs no tokenizer")
    parser.add_argument("--max_new_tokens", type=int, default=32, help="longest target that the model writes itself")
    parser.add_argument("--top", type=int, default=5, help="length of the lists in an explanation")
    parser.add_argument("--attention", help="attention kernel, for instance eager; default is the library's choice")
    parser.add_argument("--dtype", choices=DTYPES, help="number format of the model; default is the saved one")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; default is a GPU if any")
    parser.add_argument("--revision", help="Hub revision of the model")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that the model's repository brings")
    parser.add_argument(
        "--compare",
        metavar="IMPLEMENTATION",
        help=f"instead, run the same weights through several of {', '.join(IMPLEMENTATIONS)}: differences by layer, "
        "speed and memory; torch is torch.nn.Transformer",
    )
    parser.add_argument("--repeats", type=int, default=20, help="timed passes of each implementation")
    parser.add_argument("--batch_size", type=int, default=8, help="rows of a comparison")
    parser.add_argument("--length", type=int, default=128, help="tokens of a comparison without a text")
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """A command line as checked options; `compare` becomes a list of implementations, or `None`.

    Raises:
        UserError: for an unknown option, or a value that breaks a rule.
        SystemExit: with code 0 for `--help`.
    """
    implementations, rest = take_implementations(list(argv))
    parser = make_parser()
    options, unknown = parser.parse_known_args(rest)
    known = [name for action in parser._actions for name in action.option_strings]
    if unknown:
        word = unknown[0].split("=")[0]
        raise UserError(
            f"unknown option {unknown[0]!r}{did_you_mean(word, known)}"
            if word.startswith("-")
            else f"{unknown[0]!r}: there is one text and one target; put a text with spaces into quotes"
        )
    options.compare = implementations
    for name, least in (("max_new_tokens", 1), ("top", 1), ("repeats", 2), ("batch_size", 1), ("length", 1)):
        if getattr(options, name) < least:
            raise UserError(f"--{name} is {getattr(options, name)}; it must be at least {least}")
    if options.device is not None:
        try:
            torch.device(options.device)
        except RuntimeError as error:
            raise UserError(f"--device {options.device}: {one_line(error)[:200]}") from error
    if implementations is None and options.model is None:
        raise UserError("model is missing: give a run folder, a model folder or a Hub id, and a text")
    if implementations is None and options.text is None:
        raise UserError("text is missing: give the text that the model reads")
    return options


def take_implementations(argv: list[str]) -> tuple[list[str] | None, list[str]]:
    """Take `--compare` and the implementations behind it out of a command line; the model may follow them.

    Raises:
        UserError: fewer than two are named, or one of them twice.
    """
    place = next((place for place, word in enumerate(argv) if word.split("=")[0] == "--compare"), None)
    if place is None:
        return None, argv
    given = argv[place].partition("=")[2]
    found = [word for word in given.split(",") if word]
    end = place + 1
    while end < len(argv) and all(word in IMPLEMENTATIONS for word in argv[end].split(",")):
        found += argv[end].split(",")
        end += 1
    unknown = [word for word in found if word not in IMPLEMENTATIONS]
    if unknown:
        raise UserError(f"--compare: unknown implementation {unknown[0]!r}{did_you_mean(unknown[0], IMPLEMENTATIONS)}")
    if len(found) < 2 or len(set(found)) < len(found):
        following = argv[end] if end < len(argv) else ""
        hint = did_you_mean(following, IMPLEMENTATIONS)
        raise UserError(f"--compare needs at least two different ones of {', '.join(IMPLEMENTATIONS)}{hint}")
    return found, argv[:place] + argv[end:]


def load(options: argparse.Namespace) -> tuple[PreTrainedModel, Tokenizer | None]:
    """The model of a command line, and its tokenizer if it has one."""
    return load_model(
        options.model,
        revision=options.revision,
        trust_remote_code=options.trust_remote_code,
        dtype=options.dtype and getattr(torch, options.dtype),
        device=options.device,
        attn_implementation=options.attention,
        needs_tokenizer=False,
    )


def trace(
    model: PreTrainedModel, tokenizer: Tokenizer | None, inputs: ModelInputs, top: int = 5
) -> tuple[Walk, dict[str, Any]]:
    """Run one forward pass and put it into words.

    Args:
        model: in evaluation mode.
        tokenizer: to show the answer as text; its tokens' numbers are shown without one.
        inputs: as `prepare` makes them.
        top: length of lists.

    Returns:
        The walk, whose `records` are the lines of the trace, and a dict: `answer`, `explanation` (or `None`), and
        `attention` (how many calls there were, how many the recomputation reproduces, and the largest difference).

    Raises:
        UserError: the model refuses the inputs.
    """
    with torch.no_grad(), recorded(model) as events:
        try:
            outputs = model(**inputs.arguments)
        except ValueError as error:
            raise UserError(f"text: {type(model).__name__} cannot read it: {one_line(error)[:300]}") from error
    walk = Walk().read(events)
    walk.finish(outputs)
    shown = [check for *_, check in walk.checks if check.scores is not None]
    facts = {
        "answer": answer_of(model, tokenizer, inputs, outputs, top),
        "explanation": explain(model, inputs, events, walk, outputs, top),
        "attention": {
            "calls": len(walk.checks),
            "reproduced": len(shown),
            "largest_difference": max((check.difference for check in shown), default=None),
        },
    }
    return walk, facts


def answer_of(
    model: PreTrainedModel, tokenizer: Tokenizer | None, inputs: ModelInputs, outputs: Any, top: int
) -> dict[str, Any] | None:
    """What the logits say: of each target token its probability; else the next token, a class, or every token."""
    logits = getattr(outputs, "logits", None)
    if not isinstance(logits, torch.Tensor) or "input_ids" not in inputs.arguments:
        return None
    chances = logits[0].double().softmax(dim=-1)

    def likely(row: torch.Tensor) -> list[dict[str, Any]]:
        order = row.topk(min(top, len(row))).indices
        texts = words(tokenizer, order.unsqueeze(0))
        return [
            {"token": text, "probability": row[index].item()} for text, index in zip(texts, order.tolist(), strict=True)
        ]

    if logits.dim() == 2:
        return {"kind": "class", "probabilities": chances.tolist()}
    labels = inputs.arguments.get("labels")
    if labels is not None:
        number = len(inputs.target)
        # A decoder's rows stand at their labels; a language model's one place before.
        rows = chances if model.config.is_encoder_decoder else chances[-number - 1 : -1]
        tokens = labels[0, -number:]
        probabilities = rows.gather(1, tokens.unsqueeze(1))[:, 0].tolist()
        listed = [
            {"token": text, "probability": value} for text, value in zip(inputs.target, probabilities, strict=True)
        ]
        return {"kind": "target", "tokens": listed}
    if model.can_generate():
        return {"kind": "next token", "tokens": likely(chances[-1])}
    return {"kind": "tokens", "tokens": words(tokenizer, chances.argmax(dim=-1).unsqueeze(0))}


def select(records: Sequence[Record], layer: str | None, only: str | None, model: PreTrainedModel) -> list[Record]:
    """The lines that `--layer` and `--only` leave.

    Raises:
        UserError: a layer or a stage that is unknown, or that the model does not have.
    """
    chosen = list(records)
    blocks = list(dict.fromkeys(record.block for record in records if record.block))
    if layer is not None:
        wanted: set[str] = set()
        for word in layer.split(","):
            layers = [block for block in blocks if not block.startswith(("step.", "tick."))]
            matches = [block for block in layers if block.rpartition(".")[2] == word.strip()]
            matches += [block for block in blocks if block == word.strip()]
            if not matches:
                listed = ", ".join(blocks) or "no layers"
                raise UserError(f"--layer {word!r}: {type(model).__name__} has {listed}")
            wanted.update(matches)
        chosen = [record for record in chosen if record.block in wanted]
    if only is None:
        return chosen
    kept: list[Record] = []
    for word in only.split(","):
        name = word.strip()
        if name not in (*STAGES, "encoder", "decoder"):
            known = [*STAGES, "encoder", "decoder"]
            raise UserError(f"--only {word!r}: unknown stage{did_you_mean(name, known)}; there are {', '.join(known)}")
        names = {name, "cross_attention"} if name == "attention" else {name}
        if not any(record.stage in names or record.stack in names for record in records):
            found = ", ".join(dict.fromkeys(record.stage for record in records))
            raise UserError(f"--only {name}: {type(model).__name__} has no such stage; it has {found}")
        kept += [record for record in chosen if record.stage in names or record.stack in names]
    order = {id(record): place for place, record in enumerate(chosen)}
    kept = sorted({id(record): record for record in kept}.values(), key=lambda record: order[id(record)])
    if not kept:
        raise UserError(f"--layer {layer} has no stage {only}")
    return kept


def table_lines(records: Sequence[Record]) -> list[str]:
    """The lines of a trace, aligned, with a heading for each layer, step or tick."""
    entries = [record.entry() for record in records]
    wide = max((len(record.what) for record in records), default=0)
    stage = max((len(record.stage) for record in records), default=0)
    shapes = [str(entry.get("shape", "")) for entry in entries]
    shape = max(map(len, [*shapes, "shape"]))

    def number(value: float | None) -> str:
        return ("-" if value is None else f"{value:.4g}").rjust(11)

    lines = [
        "  ".join(["", "stage".ljust(stage), "what".ljust(wide), "shape".ljust(shape)])
        + "".join(name.rjust(11) for name in ("mean", "std", "min", "max"))
    ]
    heading = None
    for record, entry, size in zip(records, entries, shapes, strict=True):
        place = record.block or record.stack
        if place != heading:
            lines.append(place or "model")
            heading = place
        line = "  ".join(["", record.stage.ljust(stage), record.what.ljust(wide), size.ljust(shape)])
        if record.tensor is not None:
            line += "".join(number(entry[name]) for name in ("mean", "std", "min", "max"))
            if entry["non_finite"]:
                line += f"  {entry['non_finite']} not finite"
        lines.append(f"{line.rstrip()}{'  ' if record.note else ''}{record.note}")
    return lines


def head_lines(model: PreTrainedModel, inputs: ModelInputs) -> list[str]:
    """Model and inputs, in a few lines."""
    lines = [f"model      {describe(model)}"]
    for name, tokens in (("source", inputs.source), ("target", inputs.target)):
        if tokens:
            remark = f" ({inputs.remark})" if inputs.remark and name == "target" else ""
            lines.append(f"{name}     {len(tokens)} tokens{remark}: {' '.join(map(repr, tokens))}")
    if inputs.remark and not inputs.target:
        lines.append(f"inputs     {inputs.remark}")
    for name, value in inputs.arguments.items():
        if isinstance(value, torch.Tensor):
            lines.append(f"argument   {name}: {str(value.dtype).removeprefix('torch.')}, {list(value.shape)}")
    return lines


def describe(model: PreTrainedModel) -> str:
    """Class, size, number format and kernel of a model."""
    dtype = str(model.dtype).removeprefix("torch.")
    kernel = model.config._attn_implementation
    return f"{type(model).__name__}, {model.num_parameters():,} parameters, {dtype}, {model.device}, kernel {kernel}"


def tail_lines(records: Sequence[Record], facts: dict[str, Any]) -> list[str]:
    """What there is to say below the table."""
    lines = []
    attention = facts["attention"]
    if attention["calls"]:
        counts = f"{attention['reproduced']} of {attention['calls']}"
        line = f"attention  {counts} calls of the kernel, written out, agree with what it returned"
        if attention["largest_difference"] is not None:
            line += f"; largest difference {attention['largest_difference']:.1e} of an output's largest entry"
        lines.append(line)
    broken = [record for record in records if record.entry().get("non_finite")]
    if broken:
        first = broken[0]
        place = first.block or first.stack or "model"
        lines.append(
            f"warning    {len(broken)} lines have values that are not finite; the first is {first.what!r} in {place} "
            f"({first.module})"
        )
    answer = facts["answer"]
    if answer is not None and answer["kind"] == "class":
        lines.append(f"classes    {', '.join(f'{value:.4f}' for value in answer['probabilities'])}")
    elif answer is not None and answer["kind"] == "tokens":
        lines.append(f"predicted  {' '.join(map(repr, answer['tokens']))}")
    elif answer is not None:
        listed = ", ".join(f"{item['token']!r} {item['probability']:.4f}" for item in answer["tokens"])
        lines.append(f"{answer['kind']:10} {listed} (probabilities)")
    return lines


def explanation_block(facts: dict[str, Any]) -> list[str]:
    """The explanation of the answer under its heading; nothing for a model that does not think in steps."""
    if facts["explanation"] is None:
        return []
    return ["", "why this answer", *(f"  {line}" for line in explanation_lines(facts["explanation"]))]


def run_trace(options: argparse.Namespace) -> None:
    """Trace and print."""
    model, tokenizer = load(options)
    inputs = prepare(
        model, tokenizer, options.text, options.target, ids=options.ids, max_new_tokens=options.max_new_tokens
    )
    walk, facts = trace(model, tokenizer, inputs, options.top)
    records = select(walk.records, options.layer, options.only, model)
    if options.json:
        values = {
            "schema_version": SCHEMA_VERSION,
            "model": {
                "name": options.model,
                "class": type(model).__name__,
                "model_type": model.config.model_type,
                "parameters": model.num_parameters(),
                "dtype": str(model.dtype).removeprefix("torch."),
                "kernel": model.config._attn_implementation,
            },
            "inputs": {"source": inputs.source, "target": inputs.target, "remark": inputs.remark or None},
            "records": [record.entry() for record in records],
            **facts,
        }
        print(json_text(values), end="")
        return
    lines = [*head_lines(model, inputs), "", *table_lines(records), "", *tail_lines(records, facts)]
    if options.layer is None and options.only is None:
        lines += explanation_block(facts)
    print("\n".join(map(plain, lines)))


def run_compare(options: argparse.Namespace) -> None:
    """Compare implementations and print."""
    if options.model is None:
        set_seed(0)
        model = AutoModelForSeq2SeqLM.from_config(VanillaTransformerConfig(**EXAMPLE))
        model = model.to(options.device or "cpu", getattr(torch, options.dtype or "float32")).eval()
        tokenizer, remark = None, "no model is named: random weights, seed 0"
    else:
        (model, tokenizer), remark = load(options), ""
    if options.text is None:
        if model.main_input_name != "input_ids":
            raise UserError(f"text is missing: give what {type(model).__name__} reads")
        shape = (options.batch_size, options.length)
        generator = torch.Generator().manual_seed(0)
        embeddings: Any = model.get_input_embeddings()
        vocabulary = embeddings.weight.shape[0]
        drawn = torch.randint(vocabulary, shape, generator=generator)
        text = " ".join(map(str, drawn[0].tolist()))
        inputs = prepare(model, None, text, text if model.config.is_encoder_decoder else None, ids=True)
        inputs.arguments["input_ids"] = drawn.to(model.device)
        if "labels" in inputs.arguments:
            inputs.arguments["labels"] = drawn.to(model.device)
    else:
        inputs = prepare(
            model, tokenizer, options.text, options.target, ids=options.ids, max_new_tokens=options.max_new_tokens
        )
        inputs.arguments = {
            name: value.expand(options.batch_size, *value.shape[1:]) if isinstance(value, torch.Tensor) else value
            for name, value in inputs.arguments.items()
        }
    labels = inputs.arguments.pop("labels", None)
    if labels is not None and model.config.is_encoder_decoder:
        inputs.arguments["decoder_input_ids"] = decoder_inputs(model, labels)
    result = compare(make_variants(model, options.compare, inputs.arguments), model.device, options.repeats)
    if options.json:
        facts = {"model": type(model).__name__, "parameters": model.num_parameters(), "device": str(model.device)}
        shapes = {name: list(value.shape) for name, value in inputs.arguments.items() if hasattr(value, "shape")}
        print(json_text({"schema_version": SCHEMA_VERSION, **facts, "arguments": shapes, **result}), end="")
        return
    shown = describe(model).rpartition(", kernel")[0]
    print(f"model      {shown}{'; ' if remark else ''}{remark}")
    for name, value in inputs.arguments.items():
        if isinstance(value, torch.Tensor):
            print(f"argument   {name}: {str(value.dtype).removeprefix('torch.')}, {list(value.shape)}")
    print("\n".join(["", *comparison_lines(result)]))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code: 0 on success, 2 for a mistake the user can mend, 130 for Ctrl-C."""

    def work() -> int:
        options = parse(sys.argv[1:] if argv is None else argv)
        if options.compare:
            run_compare(options)
        else:
            run_trace(options)
        return 0

    return run_command(work)


if __name__ == "__main__":
    sys.exit(main())
