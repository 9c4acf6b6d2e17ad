"""`comparison.json` as CSV and LaTeX."""

import csv
import io
from collections.abc import Mapping
from typing import Any

COLUMNS = (
    "task",
    "train_size",
    "model",
    "metric",
    "score",
    "low",
    "high",
    "seeds",
    "test_examples",
    "trivial",
    "difference",
    "difference_low",
    "difference_high",
    "p_value",
    "p_value_holm",
    "cohens_h",
    "verdict",
    "parameters",
    "flops_per_example",
    "mean_steps",
    "train_seconds",
    "latency_seconds",
)
_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_LATEX |= {character: f"\\{character}" for character in "&%$#_{}"}


def rows(comparison: Mapping[str, Any], timings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for each task, training size and model; fields that a row lacks are `None`."""
    pairs = {(entry["task"], entry["train_size"], entry["first"]): entry for entry in comparison["comparisons"]}
    seconds = {(e["task"], e["train_size"], e["model"]): e["mean_seconds"] for e in timings.get("training", [])}
    latency = {(e["task"], e["model"]): e["latency_seconds"] for e in timings.get("latency", [])}
    found = []
    for entry in comparison["results"]:
        place = entry["task"], entry["train_size"], entry["model"]
        pair = pairs.get(place)
        trivial = entry["trivial"]
        row: dict[str, Any] = dict.fromkeys(COLUMNS)
        row |= {
            "task": entry["task"],
            "train_size": entry["train_examples"],
            "model": entry["model"],
            "metric": entry["metric"],
            "score": entry["score"]["value"],
            "low": entry["score"]["interval"][0],
            "high": entry["score"]["interval"][1],
            "seeds": len(entry["seeds"]),
            "test_examples": entry["score"]["n"],
            "trivial": None if trivial is None else trivial[entry["metric"]]["value"],
            "parameters": entry["parameters"]["trainable"],
            "flops_per_example": (entry.get("cost") or {}).get("flops_per_example"),
            "mean_steps": entry["mean_steps"],
            "train_seconds": seconds.get(place),
            "latency_seconds": latency.get((entry["task"], entry["model"])),
        }
        if pair is not None:
            row |= {
                "difference": pair["difference"]["value"],
                "difference_low": pair["difference"]["interval"][0],
                "difference_high": pair["difference"]["interval"][1],
                "p_value": pair["p_value"],
                "p_value_holm": pair["p_value_holm"],
                "cohens_h": pair.get("effect", {}).get("cohens_h"),
                "verdict": pair["verdict"],
            }
        found.append(row)
    return found


def csv_text(comparison: Mapping[str, Any], timings: Mapping[str, Any]) -> str:
    """All rows as CSV with a header; empty where there is nothing."""
    output = io.StringIO()
    writer = csv.DictWriter(output, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows(comparison, timings))
    return output.getvalue()


def latex_text(comparison: Mapping[str, Any]) -> str:
    """The table of a paper: models in columns, tasks in rows, with intervals, the trivial predictor and the test.

    Needs the package booktabs. Only results with all training examples are in it.
    """
    models = list(comparison["models"])
    entries = {(e["task"], e["model"]): e for e in comparison["results"] if e["train_size"] is None}
    pairs = [entry for entry in comparison["comparisons"] if entry["train_size"] is None]
    others = [model for model in models if model != comparison["against"]]
    tests = {(entry["task"], entry["first"]): entry["p_value_holm"] for entry in pairs}
    head = ["Task", "Trivial", *(_escape(model) for model in models), *(rf"$p$ ({_escape(model)})" for model in others)]
    lines = [
        r"\begin{tabular}{l" + "r" * (len(head) - 1) + "}",
        r"\toprule",
        " & ".join(head) + r" \\",
        r"\midrule",
    ]
    for task in comparison["tasks"]:
        cells = [_escape(task)]
        found = next((entries[task, model] for model in models if (task, model) in entries), None)
        trivial = found and found["trivial"]
        cells.append(f"{trivial[found['metric']]['value']:.3f}" if found and trivial else "--")
        for model in models:
            entry = entries.get((task, model))
            if entry is None:
                cells.append("--")
                continue
            low, high = entry["score"]["interval"]
            cells.append(f"{entry['score']['value']:.3f} [{low:.3f}, {high:.3f}]")
        cells += [_p_value(tests.get((task, model))) for model in others]
        lines.append(" & ".join(cells) + r" \\")
    level = 100 * comparison["statistics"]["confidence"]
    note = (
        f"% {level:g} % intervals over seeds and test examples; p-values against {comparison['against']}, corrected "
        "after Holm."
    )
    return "\n".join([note, *lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _p_value(value: float | None) -> str:
    if value is None:
        return "--"
    return "$<$0.001" if value < 0.001 else f"{value:.3f}"


def _escape(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)
