"""The loading example of a card, for each kind of head. Every one runs with torch and transformers alone."""

import json
from collections.abc import Callable

from .architectures import Architecture
from .markdown import one_line, python_string
from .run_folder import Fields, RunFolder


def snippet(run: RunFolder, architecture: Architecture, place: str, options: str) -> str:
    """Python code that loads the model of a run and asks it something.

    Args:
        place: what `from_pretrained` is given, as a Python expression.
        options: its keyword arguments, as they stand in a call.

    Raises:
        CardError: for a head that there is no example for.
    """
    head = run.metrics.text("architecture")
    write = next((write for suffix, write in SNIPPETS.items() if head.endswith(suffix)), None)
    if write is None:
        known = ", ".join(f"...{suffix}" for suffix in SNIPPETS)
        raise run.metrics.error("architecture", f"is {head!r}; cards are drawn for {known}")
    return "\n".join(write(run, architecture, place, options))


def _text_to_text(run: RunFolder, architecture: Architecture, place: str, options: str) -> list[str]:
    prompt, target = "Write the prompt here.", None
    example = run.metrics.maybe_section("example")
    if example:
        prompt, target = example.text("prompt"), example.maybe_text("target")
    task, evaluation = run.recipe.section("task"), run.recipe.section("evaluation")
    longest = task.maybe_count("max_source_length") or run.config.maybe_count("max_position_embeddings")
    cut = f", truncation=True, max_length={longest}" if longest else ""
    beams = evaluation.maybe_count("num_beams") or 1
    search = f", num_beams={beams}" if beams > 1 else ""
    lines = [
        "import torch",
        "from transformers import AutoModelForSeq2SeqLM, AutoTokenizer",
        "",
        f"name = {place}",
        # The tokenizer is the library's own, but it reads the model's configuration, whose class is custom code.
        f'tokenizer = AutoTokenizer.from_pretrained(name, {options}, truncation_side="left")',
        f"model = AutoModelForSeq2SeqLM.from_pretrained(name, {options})",
        "",
        f"prompt = {python_string(prompt)}",
        *([f"# The expected answer is {python_string(one_line(target))}."] if target is not None else []),
        f'inputs = tokenizer(prompt, return_tensors="pt"{cut})',
        "with torch.no_grad():",
    ]
    if architecture.halting:
        bound = evaluation.maybe_count("max_reasoning_steps")
        lines += [
            f"    slots = model.get_encoder()(**inputs{f', max_reasoning_steps={bound}' if bound else ''})",
            f'    tokens = model.generate(encoder_outputs=slots, attention_mask=inputs["attention_mask"]{search})',
        ]
    else:
        lines += [f"    tokens = model.generate(**inputs{search})"]
    lines += ['print("answer:", tokenizer.decode(tokens[0], skip_special_tokens=True))']
    if architecture.halting:
        lines += ['print("reasoning steps:", slots.reasoning_steps.item())']
    return lines


def _tokens_in_one_pass(run: RunFolder, architecture: Architecture, place: str, options: str) -> list[str]:
    prompt, target = "Write the prompt here.", None
    example = run.metrics.maybe_section("example")
    if example:
        prompt, target = example.text("prompt"), example.maybe_text("target")
    bound = run.recipe.section("evaluation").maybe_count("max_reasoning_steps")
    return [
        "import torch",
        "from transformers import AutoModelForMaskedLM, AutoTokenizer",
        "",
        f"name = {place}",
        f"tokenizer = AutoTokenizer.from_pretrained(name, {options})",
        f"model = AutoModelForMaskedLM.from_pretrained(name, {options})",
        "",
        f"prompt = {python_string(prompt)}",
        *([f"# The expected answer is {python_string(one_line(target))}."] if target is not None else []),
        'inputs = tokenizer(prompt, return_tensors="pt")',
        "with torch.no_grad():",
        f"    outputs = model(**inputs{f', max_reasoning_steps={bound}' if bound else ''})",
        "tokens = outputs.logits[0].argmax(-1).tolist()",
        "if model.config.eos_token_id in tokens:",
        "    tokens = tokens[: tokens.index(model.config.eos_token_id)]",
        'print("answer:", tokenizer.decode(tokens, skip_special_tokens=True))',
        'print("reasoning steps:", outputs.reasoning_steps.item())',
    ]


def _task_options(run: RunFolder) -> Fields:
    return run.recipe.section("task").section("options")


def _points_and_values(run: RunFolder, architecture: Architecture, place: str, options: str) -> list[str]:
    n_dims, n_outputs = run.config.count("n_dims"), run.config.count("n_outputs")
    n_points = _task_options(run).count("n_points")
    is_sign = run.config.text("objective") == "binary_cross_entropy"
    kind = "The sign of a linear function" if is_sign else "A linear function"
    values = "(points @ weights)" + (".sign()" if is_sign else "")
    return [
        "import torch",
        "from transformers import AutoModelForTimeSeriesPrediction",
        "",
        f"model = AutoModelForTimeSeriesPrediction.from_pretrained({place}, {options})",
        "",
        f"# {kind}, shown at {n_points - 1} points and asked for at one more.",
        "generator = torch.Generator().manual_seed(0)",
        f"points = torch.randn(1, {n_points}, {n_dims}, generator=generator)",
        f"weights = torch.randn({n_dims}, {n_outputs}, generator=generator)",
        f"values = {values}",
        "with torch.no_grad():",
        "    prediction = model(input_values=points, context_values=values[:, :-1]).logits[0, -1]",
        'print("value:", values[0, -1].tolist())',
        f'print("{"log odds that it is 1" if is_sign else "prediction"}:", prediction.tolist())',
    ]


def _tables(run: RunFolder, architecture: Architecture, place: str, options: str) -> list[str]:
    settings, n_dims = _task_options(run), run.config.count("n_dims")
    tables = settings.maybe_count("max_tables") or settings.count("num_tables")
    num_names = tables * (settings.count("num_columns") + 1)
    example = run.metrics.section("example")
    try:
        ids = [int(number) for number in json.loads(example.text("prompt"))]
    except (ValueError, TypeError) as error:
        raise example.error("prompt", "must be a list of whole numbers") from error
    if settings.text("names") == "orthogonal":
        names = [
            f"square = torch.randn({n_dims}, {n_dims}, generator=generator, dtype=torch.float64)",
            f"names = torch.linalg.qr(square).Q[:{num_names}].float() * {n_dims} ** 0.5",
        ]
    else:
        names = [f"names = torch.randn({num_names}, {n_dims}, generator=generator)"]
    return [
        "import torch",
        "from transformers import AutoModelForSequenceClassification",
        "",
        f"model = AutoModelForSequenceClassification.from_pretrained({place}, {options})",
        "",
        "# The vectors that stand for columns and tables, as in training, and zeros for the separator.",
        f"generator = torch.Generator().manual_seed({settings.count('names_seed')})",
        *names,
        f"names = torch.cat((names, torch.zeros(1, {n_dims})))",
        "# Each table's columns behind its name, the separator, and the two columns asked for.",
        f"ids = {ids}",
        f"# The expected answer is {python_string(one_line(example.text('target')))}.",
        "with torch.no_grad():",
        "    log_odds = model(input_values=names[ids][None]).logits.item()",
        'print("answer:", "connected" if log_odds > 0 else "not connected")',
    ]


def _ticks(run: RunFolder, architecture: Architecture, place: str, options: str) -> list[str]:
    head, backbone = run.metrics.text("architecture"), run.config.text("backbone_type")
    auto = f"AutoModelFor{head.rpartition('For')[2]}"
    example = run.metrics.maybe_section("example")
    target = example.maybe_text("target") if example else None
    expected = [f"# The expected answer is {python_string(one_line(target))}."] if target is not None else []
    imports, prepare = [f"from transformers import {auto}"], []
    if backbone == "parity_backbone":
        signs = example.text("prompt") if example else "[1, -1, -1, 1]"
        inputs = [f"signs = {signs}", *expected, 'inputs = {"input_values": torch.tensor([signs], dtype=torch.float)}']
    elif backbone == "none":
        number = run.config.count("num_channels") - 1
        inputs = [
            f"numbers = torch.randn(1, {number})",
            f'inputs = {{"input_features": torch.cat((numbers, torch.eye({number})))[None]}}',
        ]
    else:
        width, _, height = (example.text("prompt") if example else "32x32").partition("x")
        imports = ["from PIL import Image", f"from transformers import AutoImageProcessor, {auto}"]
        prepare = [f"processor = AutoImageProcessor.from_pretrained(name, {options})"]
        inputs = [
            "# Put your own picture here, of this size; this one is black.",
            f'image = Image.new("RGB", ({width}, {height}))',
            'inputs = processor(image, return_tensors="pt")',
        ]
    spells = run.metrics.section("task").text("name") == "sorting"
    path = "outputs.predictions[0].argmax(0)" if spells else "outputs.logits.argmax(-1).flatten()"
    answer = f'" ".join(model.config.id2label[number] for number in {path}.tolist())'
    return [
        "import torch",
        *imports,
        *(["import trainers.thought.baselines"] if architecture.tags == ("baseline",) else []),
        "",
        f"name = {place}",
        *prepare,
        f"model = {auto}.from_pretrained(name, {options})",
        "",
        *inputs,
        "with torch.no_grad():",
        "    outputs = model(**inputs)",
        f'print("{"class of every tick" if spells else "answer"}:", {answer})',
        'print("tick of the answer:", outputs.certain_tick.item() + 1, "of", outputs.predictions.shape[-1])',
    ]


SNIPPETS: dict[str, Callable[[RunFolder, Architecture, str, str], list[str]]] = {
    "ForConditionalGeneration": _text_to_text,
    "ForMaskedLM": _tokens_in_one_pass,
    "InContextTransformerForPrediction": _points_and_values,
    "InContextTransformerForSequenceClassification": _tables,
    "ForImageClassification": _ticks,
    "ForTokenClassification": _ticks,
}
"""The end of a head's class name -> what writes the lines of its example."""
