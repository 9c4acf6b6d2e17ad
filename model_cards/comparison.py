"""The report of a comparison as Markdown, drawn from `comparison.json` and `timings.json` of its folder.

    python -m model_cards.comparison outputs/compare-small > model_cards/comparison.md

The same text is written as `comparison.md` into that folder.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .markdown import code, table, text
from .run_folder import CardError

CAPTIONS = {
    "accuracy.png": "Test score of every model with its interval; faint points are single seeds",
    "cost.png": "Test score against parameters, operations, latency and reasoning steps",
    "training_curves.png": "Training loss and validation score over updates; the band spans the seeds",
    "data_size.png": "Test score against the number of training examples",
}


def comparison_card(
    comparison: Mapping[str, Any],
    timings: Mapping[str, Any],
    pictures: Sequence[str] = (),
    command: str | None = None,
    title: str | None = None,
) -> str:
    """The report as Markdown.

    Args:
        comparison: content of `comparison.json`.
        timings: content of `timings.json`.
        pictures: paths of picture files, from the folder of the report.
        command: the command that made it.
        title: of the page.
    """
    parts = [
        f"# {text(title or 'Comparison: ' + comparison['name'])}",
        _opening(comparison),
        *([f"    {command}"] if command else []),
        "## Verdicts",
        _verdicts(comparison),
        "## Results",
        _results(comparison),
        _claims(comparison),
        "## Cost",
        _costs(comparison, timings),
        _power(comparison),
        "## How it was compared",
        _method(comparison, timings),
        _training(comparison),
        _troubles(comparison),
        "\n\n".join(f"![{text(CAPTIONS.get(Path(name).name, name))}]({name})" for name in pictures),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _opening(comparison: Mapping[str, Any]) -> str:
    models = ", ".join(
        f"{code(name)}" + (f" ({text(about['architecture'])})" if about.get("architecture") else "")
        for name, about in comparison["models"].items()
    )
    tasks = ", ".join(text(name) for name in comparison["tasks"])
    planned, counts = len(comparison["seeds"]), sorted({len(entry["seeds"]) for entry in comparison["results"]})
    fewest, most = (counts[0], counts[-1]) if counts else (planned, planned)
    seeds = f"{fewest}" if fewest == most else f"{fewest} to {most}"
    seeds += " seeds each" if fewest == planned else f" of {planned} seeds each"
    return (
        f"{models} on {tasks}; {seeds}. Every number is measured by generating or "
        "predicting on a test split that neither training nor the choice of a checkpoint has seen."
    )


def _place(entry: Mapping[str, Any]) -> str:
    size = entry["train_size"]
    return text(entry["task"]) + ("" if size is None else f", {size:,} training examples")


def _span(interval: Sequence[float], signed: bool = False) -> str:
    sign = "+" if signed else ""
    return f"[{interval[0]:{sign}.3f}, {interval[1]:{sign}.3f}]"


def _p_value(value: float) -> str:
    return "below 0.001" if value < 0.001 else f"{value:.3f}"


def _verdicts(comparison: Mapping[str, Any]) -> str:
    entries = comparison["comparisons"]
    if not entries:
        return "There are no two models with finished runs of the same seed to compare."
    header = ["Task", "Difference", "Value", "Interval", "p", "p (Holm)", "Cohen's h", "Verdict"]
    rows = []
    for entry in entries:
        effect = entry.get("effect")
        rows.append(
            [
                _place(entry),
                f"{code(entry['first'])} - {code(entry['second'])}",
                f"{entry['difference']['value']:+.3f}",
                _span(entry["difference"]["interval"], signed=True),
                _p_value(entry["p_value"]),
                _p_value(entry["p_value_holm"]),
                "" if effect is None else f"{effect['cohens_h']:+.2f}",
                text(entry["verdict"]),
            ]
        )
    judged = [entry for entry in entries if not entry["verdict"].startswith("not judged")]
    found = [entry for entry in judged if entry["verdict"].endswith("is better")]
    if not judged:
        words = "Nothing is judged: there are too few seeds."
    elif not found:
        words = "No difference is significant after correction for the number of comparisons."
    else:
        words = (
            f"{len(found)} of {len(judged)} differences are significant at the {comparison['statistics']['level']:.2g} "
            "level after correction for the number of comparisons."
        )
    return f"{words}\n\n{table(header, rows, numeric=range(2, 7))}"


def _results(comparison: Mapping[str, Any]) -> str:
    header = [
        "Task",
        "Model",
        "Test score",
        "Seeds",
        "Test examples",
        "Deviation of seeds",
        "Trivial",
        "Beats trivial",
        "Unparseable",
        "Mean steps",
    ]
    rows = []
    for entry in comparison["results"]:
        trivial, metric = entry["trivial"], entry["metric"]
        beats = {True: "yes", False: "no", None: ""}[entry["beats_trivial"]]
        bound = f" of {entry['max_steps']}" if entry["max_steps"] is not None else ""
        deviation = entry["standard_deviation_of_seeds"]
        rows.append(
            [
                _place(entry),
                code(entry["model"]),
                f"{text(metric)} {entry['score']['value']:.3f} {_span(entry['score']['interval'])}",
                str(len(entry["seeds"])),
                f"{entry['score']['n']:,}",
                "" if deviation is None else f"{deviation:.3f}",
                "" if trivial is None else f"{trivial[metric]['value']:.3f} {_span(trivial[metric]['interval'])}",
                beats,
                "" if entry["unparseable"] is None else f"{entry['unparseable']:.1f}",
                "" if entry["mean_steps"] is None else f"{entry['mean_steps']:.2f}{bound}",
            ]
        )
    names = {
        entry["task"]: text(entry["trivial"]["name"])
        for entry in comparison["results"]
        if entry["trivial"] is not None and entry["train_size"] is None
    }
    trivials = "; ".join(f"{text(task)}: {name}" for task, name in names.items())
    level = 100 * comparison["statistics"]["confidence"]
    reading = (
        f"Scores are means over seeds with {level:g} % intervals over seeds and test examples. A model beats the "
        "trivial predictor where its whole interval does."
    )
    return f"{table(header, rows, numeric=range(2, 10))}\n\n{reading}" + (
        f" Trivial is, {trivials}." if trivials else ""
    )


def _claims(comparison: Mapping[str, Any]) -> str:
    parts = []
    kinds = (
        ("published", "Numbers published by others", "measured by them, with their data, sizes and rules"),
        ("claimed", "Numbers claimed by others", "stated, not known to be measured by any command"),
    )
    for kind, title, what in kinds:
        for entry in comparison[kind]:
            names = list(dict.fromkeys(name for scores in entry["results"].values() for name in scores))
            rows = [
                [text(model), *("" if scores.get(name) is None else f"{scores[name]}" for name in names)]
                for model, scores in entry["results"].items()
            ]
            source = text(entry["source"]) if not entry["url"] else f"[{text(entry['source'])}]({entry['url']})"
            note = f" {text(entry['note'])}" if entry["note"] else ""
            parts.append(
                f"### {title}\n\nTheirs, not ours ({what}): {source}.{note}\n\n"
                f"{table(['Model', *(text(name) for name in names)], rows, numeric=range(1, len(names) + 1))}"
            )
    return "\n\n".join(parts)


def _costs(comparison: Mapping[str, Any], timings: Mapping[str, Any]) -> str:
    seconds = {(e["task"], e["train_size"], e["model"]): e["mean_seconds"] for e in timings.get("training", [])}
    latency = {(e["task"], e["model"]): e for e in timings.get("latency", [])}
    matches = {(e["task"], e["train_size"], e["model"]): e for e in comparison["parameters"]}
    header = [
        "Task",
        "Model",
        "Trainable parameters",
        "Against the baseline",
        "MFLOP of a forward pass",
        "Training seconds a run",
        "Updates",
        "Latency of one answer, ms",
        "In a batch, ms",
    ]
    rows = []
    for entry in comparison["results"]:
        place = entry["task"], entry["train_size"], entry["model"]
        match, clock, cost = matches.get(place), latency.get((entry["task"], entry["model"])), entry.get("cost")
        if entry["train_size"] is not None:
            clock = None
        outside = "" if match is None or match["within_tolerance"] else " (not matched)"
        rows.append(
            [
                _place(entry),
                code(entry["model"]),
                f"{entry['parameters']['trainable']:,}",
                "" if match is None else f"{100 * match['relative_difference']:+.2f} %{outside}",
                "" if not cost else f"{cost['flops_per_example'] / 1e6:,.1f}",
                f"{seconds[place]:,.0f}" if place in seconds else "",
                "" if entry["updates"] is None else f"{entry['updates']:,.0f}",
                "" if clock is None else f"{1000 * clock['latency_seconds']:,.1f}",
                "" if clock is None else f"{1000 * clock['batch_seconds_per_example']:,.1f}",
            ]
        )
    total = timings.get("total_training_seconds", 0) / 60
    hardware = "; ".join(text(name) for name in timings.get("hardware", []))
    words = (
        "Operations count matrix products of one forward pass over source and target, an example at a time; latency is "
        "that of generating an answer. Equal parameters are not equal compute. "
        f"Hardware: {hardware}; {total:,.0f} minutes of training in all."
    )
    return f"{table(header, rows, numeric=range(2, 9))}\n\n{words}"


def _power(comparison: Mapping[str, Any]) -> str:
    entries = [entry for entry in comparison["comparisons"] if entry.get("power")]
    if not entries:
        return ""
    header = [
        "Task",
        "Models",
        "Chance to find the wished difference",
        "Seeds for it",
        "Seeds for the observed difference",
    ]

    def seeds(value: int | None, observed: float) -> str:
        if value is not None:
            return f"{value:,}"
        return "" if observed == 0 else "no number: more test examples are needed"

    rows = [
        [
            _place(entry),
            f"{code(entry['first'])}, {code(entry['second'])}",
            f"{entry['power']['chance_with_these_seeds']:.2f}",
            seeds(entry["power"]["seeds_for_wished"], 1.0),
            seeds(entry["power"]["seeds_for_observed"], entry["difference"]["value"]),
        ]
        for entry in entries
    ]
    first = entries[0]["power"]
    words = (
        f"What this comparison could have found: the chance that a true difference of {first['wished_difference']:g} "
        f"would have been significant on its own with the seeds at hand, and the seeds each model needs for a chance "
        f"of {first['wished_chance']:g}. Computed from the variance components of the observed differences."
    )
    return f"### Power\n\n{words}\n\n{table(header, rows, numeric=range(2, 5))}"


def _method(comparison: Mapping[str, Any], timings: Mapping[str, Any]) -> str:
    statistics = comparison["statistics"]
    same = all(about.get("same_data", True) for about in comparison["tasks"].values())
    stops = any("early_stopping_patience" in about["training"] for about in comparison["tasks"].values())
    budget = "the same largest budget and rule for stopping early" if stops else "the same budget"
    data = (
        "All runs of a task had the same training, validation and test examples (by fingerprint), the same batches in "
        f"the same order for the same seed, and {budget}."
        if same
        else "The runs of a task did **not** all have the same data: the fingerprints differ."
    )
    own = [
        f"{code(name)} {', '.join(f'{text(key)} {text(value)}' for key, value in about['own_training'].items())}"
        for name, about in comparison["models"].items()
        if about["own_training"]
    ]
    tuning = f" Settings of their own: {'; '.join(own)}." if own else " No model had settings of its own."
    taught = [code(name) for name, about in comparison["models"].items() if about.get("taught")]
    if taught:
        data += f" In the place of the gold targets of training, {', '.join(taught)} learned another model's answers."
    versions = "; ".join(
        ", ".join(f"{text(name)} {text(value)}" for name, value in entry.items())
        for entry in timings.get("versions", [])
    )
    sources = "\n".join(
        f"- {text(name)}: {text(about['source'])}; licence {text(about['license'])}; "
        f"{about['test_examples']:,} test examples."
        for name, about in comparison["tasks"].items()
    )
    return (
        f"{data}{tuning}\n\n"
        f"Intervals: {text(statistics['interval'])}, {statistics['resamples']:,} resamples. Test: "
        f"{text(statistics['test'])}. A difference is called significant where the corrected p-value is at most "
        f"{statistics['level']:.2g}; with fewer than five seeds nothing is judged.\n\n{sources}\n\n"
        f"Versions: {versions}."
    )


def _training(comparison: Mapping[str, Any]) -> str:
    lines = []
    for name, about in comparison["tasks"].items():
        settings = ", ".join(f"{text(key)} {text(value)}" for key, value in about["training"].items())
        lines.append(f"- {text(name)}: {settings}.")
    for name, about in comparison["models"].items():
        seen: dict[str, list[str]] = {}
        for task, fields in about["configuration"].items():
            if fields:
                seen.setdefault(", ".join(f"{text(key)} {text(value)}" for key, value in fields.items()), []).append(
                    task
                )
        for fields_text, tasks in seen.items():
            where = "" if len(tasks) == len(comparison["tasks"]) else f" on {', '.join(text(task) for task in tasks)}"
            lines.append(f"- {code(name)}{where}: {fields_text}.")
    return "Training settings, then model configurations (what differs from the defaults):\n\n" + "\n".join(lines)


def _troubles(comparison: Mapping[str, Any]) -> str:
    parts = []
    if comparison["failed"]:
        failed = "\n".join(f"- {code(entry['cell'])}: {text(entry['reason'])}" for entry in comparison["failed"])
        parts.append(f"## Failed runs\n\n{failed}")
    if comparison["missing"]:
        names = ", ".join(code(name) for name in comparison["missing"])
        parts.append(f"## Not run\n\n{len(comparison['missing'])} runs are missing from these numbers: {names}.")
    return "\n\n".join(parts)


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """`comparison.json` and `timings.json` of a comparison's folder.

    Raises:
        CardError: if one cannot be read, or has another schema.
    """
    contents = []
    for name in ("comparison.json", "timings.json"):
        try:
            content = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CardError(f"{folder / name}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
        if not isinstance(content, dict) or content.get("schema_version") != 1:
            raise CardError(f"{folder / name}: not a comparison of schema version 1")
        contents.append(content)
    return contents[0], contents[1]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the page. Returns the exit code: 0, or 2 for a mistake the user can mend."""
    parser = argparse.ArgumentParser(prog="python -m model_cards.comparison", description="Render a comparison.")
    parser.add_argument("folder", type=Path, help="output folder of trainers.compare")
    parser.add_argument("--command", help="the command that made it, shown on the page")
    parser.add_argument("--title", help="heading of the page")
    parser.add_argument(
        "--pictures", nargs="+", default=[], metavar="FILE", help="pictures to show, as the page links them"
    )
    options = parser.parse_args(argv)
    try:
        comparison, timings = read_folder(options.folder)
        page = comparison_card(comparison, timings, options.pictures, command=options.command, title=options.title)
        print(page, end="")
    except CardError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
