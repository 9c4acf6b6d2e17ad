"""Pictures of a tracked run, drawn from its stored records and maps."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from model_cards.words import thin

from ..figures import MARKERS, new_figure, printable, whole_numbers
from .attention import HEAD_CLASSES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = Mapping[str, Any]
Maps = Mapping[str, Any]

MOST_TOKENS = 28
MOST_MODULES = 12
MOST_HEADS = 32
MOST_STEPS = 6
_COLOURS = {"local": "#1b7837", "focused": "#b2182b", "global": "#2166ac", "diffuse": "#777777"}


def attention_heat_maps(maps: Maps, record: Record) -> "Figure":
    """Attention of the first probe example at one step: every module, averaged over its heads.

    Args:
        maps: module -> weights `(heads, queries, keys)`.
        record: of the same step; gives the tokens.
    """
    names = list(maps)[:MOST_MODULES]
    columns = min(3, len(names))
    figure, grid = _grid(len(names), columns, 4.3, 3.9)
    image = None
    for axes, name in zip(grid, names, strict=False):
        weights = _array(maps[name]).mean(0)
        image = _draw_map(axes, weights, *_axis_tokens(record, name))
        axes.set_title(name, fontsize=10)
    if image is not None:
        figure.colorbar(image, ax=grid, label="attention weight, mean over heads (0 to 1)", shrink=0.7)
    left_out = f"; {len(maps) - len(names)} more modules not drawn" if len(maps) > len(names) else ""
    figure.suptitle(f"Attention before update {record['step']}{left_out}")
    return figure


def attention_evolution(maps: Mapping[int, Maps], records: Sequence[Record]) -> "Figure":
    """The same heads over the steps, on one colour scale: of each module the head whose entropy changed most.

    Args:
        maps: step -> module -> weights.
        records: of the run.
    """
    by_step = {record["step"]: record for record in records}
    steps = thin([step for step in sorted(maps) if step in by_step], MOST_STEPS)
    names = [name for name in maps[steps[0]] if all(name in maps[step] for step in steps)][:MOST_MODULES]
    figure, grid = _grid(len(names) * len(steps), len(steps), 2.3, 2.4, titled=1.1)
    image = None
    for row, name in enumerate(names):
        entropies = np.array(
            [by_step[step]["attention"][name]["normalised_entropy"] for step in steps], dtype=np.float64
        )
        change = np.nan_to_num(np.ptp(entropies, axis=0), nan=-1.0)
        head = int(change.argmax())
        for column, step in enumerate(steps):
            axes = grid[row * len(steps) + column]
            weights = _array(maps[step][name])[head][:MOST_TOKENS, :MOST_TOKENS]
            image = axes.imshow(weights, cmap="viridis", vmin=0, vmax=1, interpolation="nearest", aspect="auto")
            if column == 0:
                _label_tokens(axes, weights.shape, *_axis_tokens(by_step[step], name), size=5)
            else:
                axes.set_xticks([])
                axes.set_yticks([])
            entropy = entropies[column, head]
            axes.set_title((f"step {step}\n" if row == 0 else "") + f"Hn {entropy:.2f}", fontsize=8)
            if column == 0:
                axes.set_ylabel(f"{_abbreviated(name)}\nhead {head}\nquery", fontsize=8)
                axes.set_xlabel("key", fontsize=8)
    if image is not None:
        figure.colorbar(image, ax=grid, label="attention weight (0 to 1)", shrink=0.6)
    figure.suptitle("Attention over training: of each module the head whose entropy changed most")
    return figure


def multi_head_comparison(maps: Maps, record: Record) -> "Figure":
    """Every head of the model at one step, sorted by class and, within a class, by how sharp it is."""
    heads = []
    for name, weights in maps.items():
        summary = record["attention"].get(name)
        if summary is None:
            continue
        for head, kind in enumerate(summary["class"]):
            if kind is not None:
                heads.append((HEAD_CLASSES.index(kind), summary["normalised_entropy"][head], name, head, weights[head]))
    heads.sort(key=lambda entry: entry[:2])
    shown = heads[:: max(1, -(-len(heads) // MOST_HEADS))]
    columns = min(8, max(1, len(shown)))
    figure, grid = _grid(len(shown), columns, 1.9, 2.2, titled=0.9)
    image = None
    for axes, (kind, entropy, name, head, weights) in zip(grid, shown, strict=False):
        colour = _COLOURS[HEAD_CLASSES[kind]]
        image = axes.imshow(
            _array(weights)[:MOST_TOKENS, :MOST_TOKENS],
            cmap="viridis",
            vmin=0,
            vmax=1,
            interpolation="nearest",
            aspect="auto",
        )
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set_color(colour)
            spine.set_linewidth(2)
        axes.set_title(
            f"{_abbreviated(name)}, head {head}\n{HEAD_CLASSES[kind]}, Hn {entropy:.2f}", fontsize=8, color=colour
        )
    if image is not None:
        figure.colorbar(image, ax=grid, label="attention weight (0 to 1)", shrink=0.7)
    note = "" if len(shown) == len(heads) else f" (every {-(-len(heads) // MOST_HEADS)}th of {len(heads)})"
    figure.suptitle(f"Heads before update {record['step']}, by class{note}; rows are queries, columns keys")
    return figure


def attention_statistics_evolution(records: Sequence[Record]) -> "Figure":
    """Normalised entropy and relative distance of every head, and the number of heads of each class, over the steps."""
    steps = [record["step"] for record in records]
    names = [name for name in records[-1]["attention"] if all(name in record["attention"] for record in records)]
    figure, grid = _grid(3, 3, 4.6, 3.9)
    for axes, key, label in (
        (grid[0], "normalised_entropy", "normalised entropy Hn (0 one key, 1 uniform)"),
        (grid[1], "relative_distance", "relative distance R (0 itself, 1 as uniform)"),
    ):
        for index, name in enumerate(names):
            values = np.array([record["attention"][name][key] for record in records], dtype=np.float64)
            for head in range(values.shape[1]):
                axes.plot(
                    steps,
                    values[:, head],
                    color=f"C{index % 10}",
                    alpha=0.7,
                    linewidth=1,
                    marker="." if len(steps) < 3 else None,
                    label=_abbreviated(name) if head == 0 else None,
                )
        axes.set_xlabel("update step")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
    grid[0].legend(fontsize=7, title="one line per head", title_fontsize=7)
    counts = [_class_counts(record) for record in records]
    bottom = np.zeros(len(steps))
    places = np.arange(len(steps))
    for kind in HEAD_CLASSES:
        values = np.array([count[kind] for count in counts], dtype=np.float64)
        grid[2].bar(places, values, 0.9, bottom=bottom, color=_COLOURS[kind], label=kind)
        bottom += values
    shown = thin(list(places), 8)
    grid[2].set_xticks(shown, [str(steps[place]) for place in shown])
    grid[2].set_xlabel("update step")
    grid[2].set_ylabel("number of heads")
    grid[2].legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=4, frameon=False)
    figure.suptitle("Attention of the probe examples over training")
    return figure


def qkv_evolution(records: Sequence[Record]) -> "Figure":
    """Mean of queries, keys and values over the steps, with a band of one standard deviation to either side."""
    steps = [record["step"] for record in records]
    names = list(records[-1]["states"])[:MOST_MODULES]
    figure, grid = _grid(len(names) * 3, 3, 3.6, 1.9, titled=1.0)
    for row, name in enumerate(names):
        for column, what in enumerate(("query", "key", "value")):
            axes = grid[row * 3 + column]
            found = [record["states"].get(name, {}).get(what) for record in records]
            mean = np.array([np.mean(_numbers(entry, "mean")) for entry in found])
            spread = np.array([np.sqrt(np.mean(_numbers(entry, "std") ** 2)) for entry in found])
            axes.plot(steps, mean, color=f"C{column}", marker="." if len(steps) < 15 else None)
            axes.fill_between(steps, mean - spread, mean + spread, color=f"C{column}", alpha=0.25, linewidth=0)
            axes.axhline(0, color="0.6", linewidth=0.6)
            if row == 0:
                axes.set_title(what)
            if column == 0:
                axes.set_ylabel(f"{_abbreviated(name)}\nvalue", fontsize=8)
            if row == len(names) - 1:
                axes.set_xlabel("update step")
    figure.suptitle("Queries, keys and values of real tokens: mean over heads, band of one standard deviation")
    return figure


def layer_contributions(records: Sequence[Record]) -> "Figure":
    """Signed share of the last state that each component writes; the shares of a stack sum to 1."""
    last = [record for record in records if record.get("residual")]
    stacks = {stack: found for stack, found in last[-1]["residual"].items() if found["components"]} if last else {}
    if not stacks:
        raise ValueError("no record holds a decomposition of the residual stream")
    rows = max(len(found["components"]) for found in stacks.values())
    figure, grid = _grid(len(stacks), len(stacks), 6.2, max(2.6, 0.34 * rows + 1.2))
    for axes, (stack, found) in zip(grid, stacks.items(), strict=True):
        names = list(found["components"])
        now = np.array([found["components"][name]["signed_share"] for name in names], dtype=np.float64)
        first = last[0]["residual"].get(stack, {"components": {}})["components"]
        then = np.array([first.get(name, {}).get("signed_share") for name in names], dtype=np.float64)
        places = np.arange(len(names))[::-1]
        axes.barh(places, now, color=["#b2182b" if value < 0 else "#2166ac" for value in now], height=0.7)
        if len(last) > 1:
            axes.plot(then, places, "d", color="black", markersize=4, label=f"step {last[0]['step']}")
            axes.legend(fontsize=8)
        axes.set_yticks(places, [name.removeprefix(f"{stack}.") for name in names], fontsize=8)
        axes.axvline(0, color="0.3", linewidth=0.8)
        axes.set_xlabel("signed share of the last state (sums to 1)")
        axes.set_title(f"{stack}: before update {last[-1]['step']}", fontsize=10)
    figure.suptitle("What each sublayer adds to the residual stream (probe examples, real tokens)")
    return figure


def gradient_flow_chart(records: Sequence[Record]) -> "Figure":
    """Gradients by depth at several steps, gradients at the layers' outputs, and the size of the updates."""
    import matplotlib

    figure, grid = _grid(3, 3, 4.8, 3.9)
    chosen = thin(list(range(len(records))), MOST_STEPS)
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(chosen)))
    stacks = list(dict.fromkeys(e["stack"] for e in records[-1]["gradients"]["layers"].values() if e["stack"]))
    markers = dict(zip(stacks, MARKERS, strict=False))
    for colour, index in zip(colours, chosen, strict=True):
        record = records[index]
        for stack in stacks:
            inside = [
                (e["index"], name, e["rms"])
                for name, e in record["gradients"]["layers"].items()
                if e["stack"] == stack and e["rms"]
            ]
            inside.sort()
            style = {"color": colour, "marker": markers.get(stack, "o"), "markersize": 4, "linewidth": 1}
            label = f"step {record['step']}" if stack == stacks[0] else None
            grid[0].plot([place for place, _, _ in inside], [rms for *_, rms in inside], label=label, **style)
            norms = [(record["activation_gradients"].get(name) or {}).get("norm") or np.nan for _, name, _ in inside]
            grid[1].plot([place for place, _, _ in inside], norms, **style)
    steps = [record["step"] for record in records]
    for index, name in enumerate(records[-1]["gradients"]["layers"]):
        values = [(r["gradients"]["layers"].get(name) or {}).get("update_to_weight") for r in records]
        values = [value if value else np.nan for value in values]
        grid[2].plot(steps, values, color=f"C{index % 10}", linewidth=1, marker=".", label=_abbreviated(name))
    grid[2].axhspan(1e-5, 1e-2, color="0.93", zorder=0)
    for axes, label, across in (
        (grid[0], "root mean square gradient of the weights", "layer (0 is next to the input)"),
        (grid[1], "norm of dL/dh at the layer's output", "layer (0 is next to the input)"),
        (grid[2], "|update| / |weight|  (grey: 1e-5 to 1e-2)", "update step"),
    ):
        if any(np.isfinite(np.asarray(line.get_ydata(), dtype=np.float64)).any() for line in axes.lines):
            axes.set_yscale("log")
        axes.set_xlabel(across)
        axes.set_ylabel(label)
        if axes is not grid[2]:
            whole_numbers(axes.xaxis)
    for stack in stacks:
        grid[1].plot([], [], color="0.3", marker=markers.get(stack, "o"), markersize=4, linewidth=1, label=stack)
    for axes in grid:
        axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, frameon=False)
    figure.suptitle("Gradient flow")
    return figure


def training_curves(loss_history: Sequence[Mapping[str, Any]]) -> "Figure":
    """Training and validation loss, and whatever score the validation gave, over the steps."""
    figure, grid = _grid(2, 2, 5.5, 3.9)
    for key, label in (("loss", "training"), ("eval_loss", "validation")):
        points = [(entry["step"], entry[key]) for entry in loss_history if entry.get(key) is not None]
        if points:
            grid[0].plot(*zip(*points, strict=True), marker="." if len(points) < 40 else None, label=label)
    grid[0].set_ylabel("loss (nats per target)")
    skipped = ("eval_loss", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "eval_mean_steps")
    names = dict.fromkeys(
        key for entry in loss_history for key in entry if key.startswith("eval_") and key not in skipped
    )
    for key in names:
        points = [(entry["step"], entry[key]) for entry in loss_history if isinstance(entry.get(key), int | float)]
        grid[1].plot(*zip(*points, strict=True), marker=".", label=key.removeprefix("eval_"))
    if names:
        grid[1].set_ylabel("score on the validation split")
    else:
        points = [(entry["step"], entry["learning_rate"]) for entry in loss_history if "learning_rate" in entry]
        if points:
            grid[1].plot(*zip(*points, strict=True), color="C2", label="learning rate")
        grid[1].set_ylabel("learning rate")
    for axes in grid:
        axes.set_xlabel("update step")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    figure.suptitle("Training curves")
    return figure


def _grid(count: int, columns: int, width: float, height: float, titled: float = 0.6) -> tuple["Figure", "list[Axes]"]:
    rows = max(1, -(-count // max(1, columns)))
    figure = new_figure(columns * width + 0.8, rows * height + titled)
    axes = list(figure.subplots(rows, max(1, columns), squeeze=False).flat)
    for unused in axes[count:]:
        unused.set_axis_off()
    return figure, axes


def _draw_map(axes: "Axes", weights: np.ndarray, queries: Sequence[str], keys: Sequence[str]):
    weights = weights[:MOST_TOKENS, :MOST_TOKENS]
    image = axes.imshow(weights, cmap="viridis", vmin=0, vmax=1, interpolation="nearest", aspect="auto")
    _label_tokens(axes, weights.shape, queries, keys, size=7 if max(weights.shape) <= 20 else 6)
    axes.set_xlabel("key", fontsize=8)
    axes.set_ylabel("query", fontsize=8)
    return image


def _label_tokens(
    axes: "Axes", shape: tuple[int, ...], queries: Sequence[str], keys: Sequence[str], size: float
) -> None:
    for count, texts, set_ticks, rotation in (
        (shape[1], keys, axes.set_xticks, 90),
        (shape[0], queries, axes.set_yticks, 0),
    ):
        labels = [printable(text) for text in texts[:count]] or [str(place) for place in range(count)]
        set_ticks(range(len(labels)), labels, fontsize=size, rotation=rotation)


def _axis_tokens(record: Record, name: str) -> tuple[Sequence[str], Sequence[str]]:
    tokens = record.get("tokens") or {}
    queries, keys = (record.get("sides") or {}).get(name, ["source", "source"])
    return tokens.get(queries, []), tokens.get(keys, [])


def _class_counts(record: Record) -> dict[str, int]:
    found = [kind for summary in record["attention"].values() for kind in summary["class"]]
    return {kind: found.count(kind) for kind in HEAD_CLASSES}


def _numbers(entry: Mapping[str, Any] | None, key: str) -> np.ndarray:
    return np.array([np.nan] if entry is None else entry[key], dtype=np.float64)


def _array(weights: Any) -> np.ndarray:
    return weights.float().numpy() if hasattr(weights, "float") else np.asarray(weights, dtype=np.float64)


def _abbreviated(name: str) -> str:
    return name.replace("encoder.layers.", "enc ").replace("decoder.layers.", "dec ")


__all__ = [
    "attention_evolution",
    "attention_heat_maps",
    "attention_statistics_evolution",
    "gradient_flow_chart",
    "layer_contributions",
    "multi_head_comparison",
    "qkv_evolution",
    "training_curves",
]
