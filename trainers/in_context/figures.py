"""Pictures of in-context models, drawn from their numbers.

    python -m trainers.in_context.figures attention_masks.png --num_tables 20 --num_columns 3

draws who attends to whom in the low-rank model, with counts of entries and of position parameters, and writes the
numbers beside it as JSON.
"""

import itertools
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_models.in_context_transformer.modeling_in_context_transformer import make_attention_masks

from ..command import CommandParser, run_command
from ..errors import UserError
from ..figures import COLOURS, new_figure, save_with_numbers, whole_numbers
from ..files import json_text
from ..tasks.in_context.table_connectivity import NUM_TAIL_TOKENS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTHS = (64, 256)
GREY = "#666666"
# Predictors without a model have many curves: each colour once in each style. The model's is black.
LINES = list(itertools.product(("--", ":", "-."), COLOURS[:6]))


def interval_band(scores: Sequence[dict[str, Any]]) -> tuple[list[float], list[float], list[float]]:
    """Values, lower and upper ends of scores."""
    low, high = zip(*(score["interval"] for score in scores), strict=True)
    return [score["value"] for score in scores], list(low), list(high)


def context_curve(axes, curve: dict[str, Any], metric: str, legend: bool = True) -> None:
    """Draw a score against the number of in-context examples, the model's with its interval.

    Args:
        curve: as [`evaluate_prompts`][trainers.in_context.evaluation.evaluate_prompts] returns it.
        metric: `"accuracy"` or `"error"`.
    """
    places = curve["in_context_examples"]
    for (name, scores), (style, colour) in zip(curve["baselines"].items(), itertools.cycle(LINES), strict=False):
        values = [score["value"] for score in scores]
        axes.plot(places, values, color=colour, linewidth=1, linestyle=style, label=f"{name} (n {scores[0]['n']})")
    values, low, high = interval_band(curve["model"])
    axes.plot(places, values, color="black", linewidth=2, label=f"model (n {curve['model'][0]['n']})")
    axes.fill_between(places, low, high, color="black", alpha=0.15, linewidth=0)
    axes.set_xlabel("in-context examples")
    whole_numbers(axes.xaxis)
    if metric == "error":
        axes.set_ylabel("squared error")
        # A predictor that fails badly would press all others onto the axis.
        scale = max(score["value"] for score in curve["baselines"].get("always 0", curve["model"]))
        axes.set_ylim(0, 1.3 * scale)
    else:
        axes.set_ylabel("accuracy")
        axes.set_ylim(min(0.4, *low) - 0.02, 1.02)
    axes.grid(alpha=0.3)
    if legend:
        axes.legend(fontsize=7, ncols=2)


def curve_figure(curve: dict[str, Any], metric: str, title: str) -> "Figure":
    """[`context_curve`] by itself."""
    figure = new_figure(8, 5)
    axes = figure.add_subplot()
    context_curve(axes, curve, metric)
    axes.set_title(title)
    return figure


def prompts_figure(curves: dict[str, dict[str, Any]], metric: str, words: dict[str, str]) -> "Figure":
    """[`context_curve`] of every kind of prompt, side by side."""
    columns = min(3, len(curves))
    rows = math.ceil(len(curves) / columns)
    figure = new_figure(4.4 * columns, 3.4 * rows)
    for place, (kind, curve) in enumerate(curves.items(), start=1):
        axes = figure.add_subplot(rows, columns, place)
        context_curve(axes, curve, metric, legend=place == 1)
        axes.set_title(f"{kind}\n{words[kind]}", fontsize=8)
    return figure


def path_length_figure(section: dict[str, Any], title: str) -> "Figure":
    """Accuracy at each path length, and on questions without a path, with intervals.

    Args:
        section: a split as [`evaluate_questions`][trainers.in_context.evaluation.evaluate_questions] returns it.
    """
    levels = section["by_difficulty"]
    values, low, high = interval_band([level["accuracy"] for level in levels])
    figure = new_figure(7, 4.2)
    axes = figure.add_subplot()
    reach = np.abs(np.array([low, high]) - values)
    axes.errorbar(range(len(levels)), values, yerr=reach, fmt="o", color="black", capsize=4, label="model")
    axes.axhline(section["accuracy"]["value"], color="black", linewidth=1, label="model, all questions")
    for name, colour in (("1 hop", COLOURS[1]), ("2 hops", COLOURS[0])):
        found = [rule for rule in section["baselines"] if name in rule["name"]]
        for rule in found:
            axes.axhline(
                rule["accuracy"]["value"], color=colour, linewidth=1, linestyle="--", label=f"{name}, all questions"
            )
    axes.set_xticks(range(len(levels)), [f"{level['difficulty']}\nn {level['n']}" for level in levels])
    axes.set_xlabel("tables on the shortest path")
    axes.set_ylabel("accuracy")
    axes.set_ylim(-0.03, 1.06)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    axes.set_title(title)
    return figure


def tables_figure(points: Sequence[dict[str, Any]], trained_at: int, title: str) -> "Figure":
    """Accuracy against the number of tables, beside rules that need no model.

    Args:
        points: `{"num_tables", "rho", "accuracy", "baselines"}` of each number of tables.
        trained_at: number of tables in training.
    """
    figure = new_figure(7, 4.2)
    axes = figure.add_subplot()
    sizes = [point["num_tables"] for point in points]
    values, low, high = interval_band([point["accuracy"] for point in points])
    reach = np.abs(np.array([low, high]) - values)
    axes.errorbar(sizes, values, yerr=reach, fmt="o-", color="black", capsize=4, label="model")
    for name, colour in (("1 hop", COLOURS[1]), ("2 hops", COLOURS[0]), ("3 hops", COLOURS[2])):
        rules = [[rule for rule in point["baselines"] if name in rule["name"]] for point in points]
        if all(rules):
            shares = [rule[0]["accuracy"]["value"] for rule in rules]
            axes.plot(sizes, shares, linestyle="--", marker=".", color=colour, label=f"rule: {name}")
    axes.axhline(0.5, color=GREY, linestyle=":", label="constant answer")
    axes.axvline(trained_at, color=GREY, linewidth=0.8)
    axes.annotate("trained here", (trained_at, 0.42), fontsize=8, rotation=90, ha="right")
    axes.set_xticks(sizes, [f"{point['num_tables']}\nrho {point['rho']:.3g}" for point in points])
    axes.set_xlabel("tables in a prompt")
    axes.set_ylabel("accuracy")
    axes.set_ylim(min(0.4, *low) - 0.02, 1.03)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    axes.set_title(title)
    return figure


def mask_numbers(num_blocks: int, block_size: int, num_tail_tokens: int, widths: Sequence[int]) -> dict[str, Any]:
    """How sparse the low-rank model is: entries of its masks, counted in them, and parameters of its positions.

    Returns:
        Tokens, key tokens, entries of a full map, of the local and of the later layers with their shares, and for each
        width the position parameters of one row per token and of the shared rows.
    """
    masks = make_attention_masks(num_blocks, block_size, num_tail_tokens)
    tokens = masks[0].shape[0]
    entries = {name: int(mask.sum()) for name, mask in zip(("local", "later"), masks, strict=True)}
    rows = block_size + num_tail_tokens
    return {
        "num_blocks": num_blocks,
        "block_size": block_size,
        "num_tail_tokens": num_tail_tokens,
        "tokens": tokens,
        "key_tokens": num_blocks + num_tail_tokens,
        "entries": {"full": tokens**2, **entries},
        "shares": {name: count / tokens**2 for name, count in entries.items()},
        "positions": [
            {"width": width, "one_row_per_token": tokens * width, "shared_rows": rows * width} for width in widths
        ],
    }


def mask_figure(numbers: dict[str, Any]) -> "Figure":
    """The two masks, the positions that tokens share, and the numbers of [`mask_numbers`]."""
    from matplotlib.colors import ListedColormap

    shape = numbers["num_blocks"], numbers["block_size"], numbers["num_tail_tokens"]
    local, later = (mask.numpy() for mask in make_attention_masks(*shape))
    num_blocks, block_size, num_tail_tokens = shape
    figure = new_figure(13, 5)
    panels = figure.subplots(1, 3, width_ratios=(1, 1, 0.75))
    full = numbers["entries"]["full"]
    for axes, mask, name, title in (
        (panels[0], local, "local", "Local layers: within a block"),
        (panels[1], later, "later", "Later layers: among key tokens"),
    ):
        axes.imshow(mask, cmap=ListedColormap(["#f2f2f2", "#08519c"]), interpolation="nearest")
        count, share = numbers["entries"][name], numbers["shares"][name]
        axes.set_title(f"{title}\n{count:,} of {full:,} entries, {100 * share:.2f} %", fontsize=10)
        axes.set_xlabel("token attended to")
        axes.set_ylabel("token")
    row = np.concatenate([np.tile(np.arange(block_size), num_blocks), block_size + np.arange(num_tail_tokens)])
    shared = row[:, None] == np.arange(block_size + num_tail_tokens)
    panels[2].imshow(shared, cmap=ListedColormap(["#f2f2f2", "#006d2c"]), aspect="auto", interpolation="nearest")
    panels[2].set_xlabel("position row")
    panels[2].set_ylabel("token")
    lines = [
        f"width {entry['width']}: {entry['shared_rows']:,} parameters, not {entry['one_row_per_token']:,}"
        for entry in numbers["positions"]
    ]
    panels[2].set_title(f"Positions: {shared.shape[1]} rows for {len(row)} tokens\n" + "\n".join(lines), fontsize=10)
    figure.suptitle(
        f"Low-rank In-context Transformer: {num_blocks} blocks of {block_size} and {num_tail_tokens} tail tokens, "
        f"{numbers['key_tokens']} of {numbers['tokens']} tokens are key tokens"
    )
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the masks. Returns the exit code: 0, 2 for a mistake the user can mend, 130 for Ctrl-C."""

    def work() -> int:
        parser = CommandParser(
            prog="python -m trainers.in_context.figures", description="Draw the masks of the low-rank model."
        )
        parser.add_argument("path", type=Path, help="PNG file to write; a JSON file of the same name goes beside it")
        parser.add_argument("--num_tables", type=int, default=20, help="tables in a prompt (default: %(default)s)")
        parser.add_argument("--num_columns", type=int, default=3, help="columns of a table (default: %(default)s)")
        options = parser.parse_args(argv)
        for name in ("num_tables", "num_columns"):
            if getattr(options, name) < 1:
                raise UserError(f"--{name} is {getattr(options, name)}; it must be at least 1")
        if options.path.suffix != ".png" or not options.path.parent.is_dir():
            raise UserError(f"{options.path}: must be a .png file in a folder that exists")
        numbers = mask_numbers(options.num_tables, options.num_columns + 1, NUM_TAIL_TOKENS, WIDTHS)
        save_with_numbers(mask_figure(numbers), options.path, numbers)
        print(json_text(numbers), end="")
        return 0

    return run_command(work)


if __name__ == "__main__":
    sys.exit(main())
