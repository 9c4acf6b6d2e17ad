"""Pictures of thinking in ticks: accuracy and certainty over ticks, early stopping, neurons, attention."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ..figures import COLOURS, new_figure, whole_numbers
from ..files import replacing
from .watching import MOST_NEURONS, MOST_PAIRS, Watched, most_varying

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

POSITIONS, CERTAINTY, ACCURACY = COLOURS[:3]
STRIP_FRAMES = 8
STRIP_COLUMNS = 4
FRAME_SECONDS = 0.35
LAST_FRAME_SECONDS = 2.0


def label_ticks(axes: "Axes") -> None:
    """Give an axis of ticks its name and whole numbers."""
    axes.set_xlabel("tick")
    whole_numbers(axes.xaxis)


def tick_figure(test: dict[str, Any]) -> "Figure":
    """Accuracy of whole answers and of positions, and mean certainty, after each tick.

    Args:
        test: the section of `metrics.json`.
    """
    per_tick = test["per_tick"]
    ticks = range(1, len(per_tick["accuracy"]) + 1)
    figure = new_figure()
    axes = figure.add_subplot()
    marker = "o" if len(ticks) == 1 else ""
    axes.plot(ticks, per_tick["accuracy"], color=ACCURACY, label="answers with every position right", marker=marker)
    if not np.allclose(per_tick["position_accuracy"], per_tick["accuracy"]):
        axes.plot(ticks, per_tick["position_accuracy"], color=POSITIONS, label="positions right", marker=marker)
    axes.plot(ticks, per_tick["certainty"], color=CERTAINTY, linestyle="--", label="mean certainty", marker=marker)
    axes.axhline(test["accuracy"]["value"], color="#999999", linewidth=0.8, label="each example at its answer's tick")
    label_ticks(axes)
    axes.set_ylabel("share of the test split")
    axes.set_ylim(-0.02, 1.02)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    axes.set_title(f"Over ticks, {test['n']:,} test examples")
    return figure


def stopping_figure(stopping: dict[str, Any]) -> "Figure":
    """Accuracy and wall time against the mean number of ticks used, for each certainty threshold."""
    curve = sorted(stopping["curve"], key=lambda entry: entry["mean_steps"])
    ticks = [entry["mean_steps"] for entry in curve]
    values = np.array([[entry["accuracy"]["value"], *entry["accuracy"]["interval"]] for entry in curve])
    figure = new_figure(8, 6)
    above, below = figure.subplots(2, 1, sharex=True)
    above.fill_between(ticks, values[:, 1], values[:, 2], color=ACCURACY, alpha=0.15, linewidth=0)
    above.plot(ticks, values[:, 0], color=ACCURACY, marker="o", markersize=4)
    below.plot(ticks, [entry["seconds"] for entry in curve], color=CERTAINTY, marker="o", markersize=4)
    last = None
    for entry in curve:
        # Labels of thresholds that stop at nearly the same tick would cover each other.
        if last is not None and entry["mean_steps"] - last < 0.04 * max(ticks):
            continue
        last = entry["mean_steps"]
        name = "no threshold" if entry["threshold"] is None else f"{entry['threshold']:g}"
        above.annotate(
            name, (last, entry["accuracy"]["value"]), xytext=(0, -13), textcoords="offset points", fontsize=7
        )
    above.set_ylabel("accuracy")
    above.margins(x=0.08, y=0.15)
    below.set_ylabel(f"seconds for {stopping['n']:,} examples")
    below.set_xlabel("mean ticks used")
    below.set_ylim(bottom=0)
    for axes in (above, below):
        axes.grid(alpha=0.3)
    above.set_title("Stopping at a certainty: labels are thresholds")
    return figure


def neuron_figure(watched: Watched) -> "Figure":
    """Post-activations of the neurons that vary most, one line each on its own scale."""
    chosen = most_varying(watched.states, MOST_NEURONS)
    states = watched.states[:, chosen]
    ticks = np.arange(1, len(states) + 1)
    low, high = states.min(axis=0), states.max(axis=0)
    lines = (states - low) / np.maximum(high - low, 1e-9) * 0.85
    figure = new_figure(8, 7)
    axes = figure.add_subplot()
    for place in range(len(chosen)):
        axes.plot(ticks, place + lines[:, place], color=f"C{place % 10}", linewidth=1.2)
    ranges = zip(chosen, low, high, strict=True)
    names = [f"{neuron}: {lowest:.2g} to {highest:.2g}" for neuron, lowest, highest in ranges]
    axes.set_yticks(np.arange(len(chosen)) + 0.42, names, fontsize=7)
    label_ticks(axes)
    axes.set_ylabel("neuron: range of its post-activation")
    axes.set_title(f"Neurons that vary most. {watched.title}")
    return figure


def synchronisation_figure(watched: Watched) -> "Figure":
    """Synchronisation of the output's pairs that vary most, as a map over ticks, every pair on its own scale."""
    chosen = most_varying(watched.synchronisation, MOST_PAIRS)
    values = watched.synchronisation[:, chosen].T
    largest = np.abs(values).max(axis=1)
    figure = new_figure(8, 6.5)
    axes = figure.add_subplot()
    image = axes.imshow(
        values / np.maximum(largest, 1e-9)[:, None],
        aspect="auto",
        cmap="RdBu_r",
        vmin=-1,
        vmax=1,
        extent=(0.5, values.shape[1] + 0.5, len(chosen) - 0.5, -0.5),
        interpolation="nearest",
    )
    figure.colorbar(image, label="synchronisation, relative to the pair's largest")
    names = [f"{pair}: {size:.2g}" for pair, size in zip(chosen, largest, strict=True)]
    axes.set_yticks(range(len(chosen)), names, fontsize=6)
    axes.set_ylabel("pair of neurons: its largest synchronisation")
    label_ticks(axes)
    axes.set_title(f"Synchronisation of the output. {watched.title}")
    return figure


def weight_figure(watched: Watched) -> "Figure":
    """The context of each tick, and the size of the dynamic weights that it makes."""
    assert watched.contexts is not None
    figure = new_figure(8, 6)
    above, below = figure.subplots(2, 1, sharex=True)
    ticks = np.arange(1, len(watched.contexts) + 1)
    for place, values in enumerate(watched.contexts[:, :-1].T):
        above.plot(ticks, values, linewidth=1, color=f"C{place % 10}")
    above.set_ylabel("entries of the context")
    for place, (name, values) in enumerate((watched.dynamic_norms or {}).items()):
        below.plot(ticks, values, linewidth=1, label=name, color=f"C{place % 10}")
    below.set_ylabel("Frobenius norm of dynamic weights")
    label_ticks(below)
    if watched.dynamic_norms:
        below.legend(fontsize=5, ncols=2)
    above.set_title(f"Dynamic weights. {watched.title}")
    return figure


def _draw_tick(axes: "Axes", watched: Watched, tick: int) -> None:
    """The picture, attention over it, and in a maze the walk that the answer of this tick makes."""
    assert watched.picture is not None
    height, width = watched.picture.shape[:2]
    axes.imshow(watched.picture, interpolation="nearest")
    heat = watched.attention[tick]
    # With padding, the token in row i of a map with stride s looks at the surroundings of the pixel in row s i.
    down, right = round(height / heat.shape[0]), round(width / heat.shape[1])
    axes.imshow(
        heat,
        extent=(-right / 2, right * (heat.shape[1] - 0.5), down * (heat.shape[0] - 0.5), -down / 2),
        cmap="inferno",
        alpha=(heat - heat.min()) / max(float(np.ptp(heat)), 1e-9) * 0.75,
        interpolation="nearest",
        vmin=0,
    )
    if watched.walks is not None:
        walk = np.array(watched.walks[tick])
        axes.plot(walk[:, 1], walk[:, 0], color="#1f78ff", linewidth=2)
        axes.plot(walk[-1, 1], walk[-1, 0], color="#1f78ff", marker="o", markersize=4)
    answer = "" if watched.walks is not None else f"{watched.answers[tick]}, "
    verdict = "right" if watched.right[tick] else "wrong"
    axes.set_title(f"tick {tick + 1}: {answer}{verdict}\ncertainty {watched.certainty[tick]:.2f}", fontsize=8)
    axes.set_xlim(-0.5, width - 0.5)
    axes.set_ylim(height - 0.5, -0.5)
    axes.set_axis_off()


def attention_strip(watched: Watched) -> "Figure":
    """Attention, averaged over heads: some ticks over the picture, or all ticks as a map over positions."""
    num_ticks = len(watched.certainty)
    if watched.picture is None:
        figure = new_figure(8, 5)
        axes = figure.add_subplot()
        image = axes.imshow(
            watched.attention.T,
            aspect="auto",
            cmap="inferno",
            vmin=0,
            extent=(0.5, num_ticks + 0.5, watched.attention.shape[1] + 0.5, 0.5),
            interpolation="nearest",
        )
        figure.colorbar(image, label="attention, mean over heads")
        label_ticks(axes)
        axes.set_ylabel("position in the input")
        axes.set_title(f"Attention. {watched.title}")
        return figure
    ticks = np.unique(np.linspace(0, num_ticks - 1, STRIP_FRAMES).round().astype(int))
    rows = -(-len(ticks) // STRIP_COLUMNS)
    figure = new_figure(2.3 * STRIP_COLUMNS, 2.7 * rows + 0.5)
    for place, tick in enumerate(ticks):
        _draw_tick(figure.add_subplot(rows, STRIP_COLUMNS, place + 1), watched, tick)
    walk = ", blue: the way the answer takes" if watched.walks is not None else ""
    figure.suptitle(f"{watched.title}. Bright: attention{walk}", fontsize=9)
    return figure


def attention_frames(watched: Watched) -> Iterator[Image.Image]:
    """One image for each tick, as in `attention_strip`."""
    for tick in range(len(watched.certainty)):
        figure = new_figure(3, 3.4)
        _draw_tick(figure.add_subplot(), watched, tick)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=80)
        yield Image.open(buffer).convert("RGB")


def write_animation(path: Path, frames: Iterator[Image.Image]) -> None:
    """Write frames as an animated GIF that repeats; the last one stays for longer."""
    first, *others = frames
    durations = [int(1000 * FRAME_SECONDS)] * len(others) + [int(1000 * LAST_FRAME_SECONDS)]
    with replacing(path) as aside:
        first.save(aside, format="GIF", save_all=True, append_images=others, duration=durations, loop=0)
