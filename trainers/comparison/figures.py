"""Pictures of a comparison, drawn from `comparison.json`, `curves.json` and `timings.json`."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..figures import COLOURS, MARKERS, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def _style(models: Sequence[str]) -> dict[str, dict[str, Any]]:
    return {
        model: {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}
        for index, model in enumerate(models)
    }


def _full(comparison: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [entry for entry in comparison["results"] if entry["train_size"] is None]


def _metric(entries: Sequence[Mapping[str, Any]]) -> str:
    names = {entry["metric"] for entry in entries}
    return names.pop() if len(names) == 1 else "score"


def _errors(entry: Mapping[str, Any]) -> list[list[float]]:
    value, (low, high) = entry["score"]["value"], entry["score"]["interval"]
    return [[max(0.0, value - low)], [max(0.0, high - value)]]


def accuracy_chart(comparison: Mapping[str, Any]) -> "Figure":
    """Score of every model on every task with its interval, single seeds, and the trivial predictor."""
    entries, models, tasks = _full(comparison), list(comparison["models"]), list(comparison["tasks"])
    style = _style(models)
    figure = new_figure(max(5.0, 1.9 * len(tasks) + 1.5), 4.4)
    axes = figure.subplots()
    spread = 0.6 / max(1, len(models))
    for entry in entries:
        place = tasks.index(entry["task"]) + (models.index(entry["model"]) - (len(models) - 1) / 2) * spread
        look = style[entry["model"]]
        axes.scatter(
            np.full(len(entry["per_seed"]), place),
            entry["per_seed"],
            s=12,
            color=look["color"],
            alpha=0.35,
            linewidths=0,
        )
        axes.errorbar(
            [place], [entry["score"]["value"]], yerr=_errors(entry), capsize=4, markersize=7, linewidth=1.5, **look
        )
        if entry["trivial"] is not None:
            level = entry["trivial"][entry["metric"]]["value"]
            axes.hlines(level, place - spread / 2, place + spread / 2, color="0.35", linestyle=":", linewidth=1.5)
    for model in models:
        axes.plot([], [], linestyle="none", label=model, **style[model])
    axes.plot([], [], color="0.35", linestyle=":", label="trivial predictor")
    axes.set_xticks(range(len(tasks)), tasks)
    axes.set_xlim(-0.6, len(tasks) - 0.4)
    level = 100 * comparison["statistics"]["confidence"]
    axes.set_ylabel(f"test {_metric(entries)}")
    axes.set_title(f"Mean over seeds with {level:g} % interval; faint: single seeds", fontsize=10)
    axes.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=min(4, len(models) + 1), frameon=False)
    return figure


def _against(comparison: Mapping[str, Any], timings: Mapping[str, Any]) -> dict[str, dict[tuple[str, str], float]]:
    """Title of a horizontal axis -> its value for each task and model that has one."""
    entries = _full(comparison)
    latency = {(e["task"], e["model"]): 1000 * e["latency_seconds"] for e in timings.get("latency", [])}
    axes: dict[str, dict[tuple[str, str], float]] = {
        "trainable parameters (millions)": {
            (e["task"], e["model"]): e["parameters"]["trainable"] / 1e6 for e in entries
        },
        "operations of one forward pass (MFLOP)": {
            (e["task"], e["model"]): e["cost"]["flops_per_example"] / 1e6 for e in entries if e.get("cost")
        },
        "latency of one answer (ms)": latency,
        "mean reasoning steps": {
            (e["task"], e["model"]): e["mean_steps"] for e in entries if e["mean_steps"] is not None
        },
    }
    return {title: values for title, values in axes.items() if values}


def cost_chart(comparison: Mapping[str, Any], timings: Mapping[str, Any]) -> "Figure":
    """Score against parameters, operations, latency and mean reasoning steps: a column each, a row for each task."""
    entries, models, tasks = _full(comparison), list(comparison["models"]), list(comparison["tasks"])
    style, panels = _style(models), _against(comparison, timings)
    figure = new_figure(3.3 * len(panels), 2.3 * len(tasks) + 0.9)
    grid = figure.subplots(len(tasks), len(panels), squeeze=False, sharey="row", sharex="col")
    for column, (title, values) in enumerate(panels.items()):
        for row, task in enumerate(tasks):
            axes: Axes = grid[row][column]
            for entry in entries:
                place = values.get((task, entry["model"]))
                if entry["task"] == task and place is not None:
                    # Matched models fall on one place; the later ones are hollow and larger, so that all are seen.
                    rank = models.index(entry["model"])
                    axes.errorbar(
                        [place],
                        [entry["score"]["value"]],
                        yerr=_errors(entry),
                        capsize=3 + 2 * rank,
                        markersize=5 + 3 * rank,
                        fillstyle="none" if rank else "full",
                        **style[entry["model"]],
                    )
            axes.margins(x=0.25)
            axes.locator_params(axis="x", nbins=4)
            axes.grid(alpha=0.3)
            if column == 0:
                axes.set_ylabel(f"{task}\n{_metric([e for e in entries if e['task'] == task])}")
            if row == len(tasks) - 1:
                axes.set_xlabel(title)
    for rank, model in enumerate(models):
        grid[0][0].plot([], [], linestyle="none", label=model, fillstyle="none" if rank else "full", **style[model])
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    return figure


def curve_chart(comparison: Mapping[str, Any], curves: Mapping[str, Any]) -> "Figure | None":
    """Training loss and validation score over updates, mean and range over seeds; `None` if nothing was logged."""
    found = [entry for entry in curves["curves"] if entry["train_size"] is None]
    models, tasks = list(comparison["models"]), list(comparison["tasks"])
    metric = _metric(_full(comparison))
    panels = [("loss", "training loss"), (f"eval_{metric}", f"validation {metric}")]
    panels = [
        (name, title)
        for name, title in panels
        if any(name in point for entry in found for history in entry["history"].values() for point in history)
    ]
    if not panels:
        return None
    style = _style(models)
    figure = new_figure(3.3 * len(tasks), 2.6 * len(panels) + 0.6)
    grid = figure.subplots(len(panels), len(tasks), squeeze=False, sharex="col")
    for row, (name, title) in enumerate(panels):
        for column, task in enumerate(tasks):
            axes = grid[row][column]
            for entry in found:
                if entry["task"] != task:
                    continue
                points: dict[int, list[float]] = {}
                for history in entry["history"].values():
                    for point in history:
                        if name in point:
                            points.setdefault(point["step"], []).append(point[name])
                steps = sorted(points)
                if steps:
                    colour = style[entry["model"]]["color"]
                    axes.plot(
                        steps,
                        [np.mean(points[step]) for step in steps],
                        color=colour,
                        marker="." if len(steps) < 12 else None,
                    )
                    axes.fill_between(
                        steps,
                        [min(points[step]) for step in steps],
                        [max(points[step]) for step in steps],
                        color=colour,
                        alpha=0.2,
                        linewidth=0,
                    )
            axes.grid(alpha=0.3)
            if row == 0:
                axes.set_title(task, fontsize=10)
            if column == 0:
                axes.set_ylabel(title)
            if row == len(panels) - 1:
                axes.set_xlabel("updates")
    handles = [grid[0][0].plot([], [], color=style[model]["color"], label=model)[0] for model in models]
    figure.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False)
    return figure


def data_size_chart(comparison: Mapping[str, Any]) -> "Figure | None":
    """Score against the number of training examples; `None` unless several sizes were run."""
    if all(entry["train_size"] is None for entry in comparison["results"]):
        return None
    models, tasks = list(comparison["models"]), list(comparison["tasks"])
    style = _style(models)
    figure = new_figure(3.4 * len(tasks) + 0.4, 3.6)
    grid = figure.subplots(1, len(tasks), squeeze=False)[0]
    for axes, task in zip(grid, tasks, strict=True):
        trivial = None
        for model in models:
            line = [e for e in comparison["results"] if e["task"] == task and e["model"] == model]
            line.sort(key=lambda entry: entry["train_examples"])
            if line:
                errors = np.concatenate([_errors(entry) for entry in line], axis=1)
                sizes = [entry["train_examples"] for entry in line]
                axes.errorbar(
                    sizes,
                    [entry["score"]["value"] for entry in line],
                    yerr=errors,
                    capsize=3,
                    label=model,
                    **style[model],
                )
                trivial = line[-1]["trivial"] and line[-1]["trivial"][line[-1]["metric"]]["value"]
        if trivial is not None:
            axes.axhline(trivial, color="0.35", linestyle=":", label="trivial predictor")
        sizes = sorted({e["train_examples"] for e in comparison["results"] if e["task"] == task})
        axes.set_xscale("log")
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.minorticks_off()
        axes.set_title(task, fontsize=10)
        axes.set_xlabel("training examples")
        axes.grid(alpha=0.3)
    grid[0].set_ylabel(f"test {_metric(comparison['results'])}")
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def all_charts(
    comparison: Mapping[str, Any], curves: Mapping[str, Any], timings: Mapping[str, Any]
) -> dict[str, "Figure"]:
    """File name -> picture, of those there is something to draw for."""
    charts = {
        "accuracy.png": accuracy_chart(comparison),
        "cost.png": cost_chart(comparison, timings),
        "training_curves.png": curve_chart(comparison, curves),
        "data_size.png": data_size_chart(comparison),
    }
    return {name: chart for name, chart in charts.items() if chart is not None}
