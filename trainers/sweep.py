"""Train a recipe over a grid of settings, and show what each setting does.

    accelerate launch -m trainers.sweep recipes/connection_transformer/logiqa/small.yaml --data_dir path/to/logiqa \\
        --over model.num_slots=16,32,64 model.connection_rank=4,16 --seeds 0 1 2
    accelerate launch -m trainers.sweep recipes/sweep/slots.yaml --data_dir path/to/logiqa

Every point of the grid and every seed is a run of the training command with a run folder of its own. The same
command again goes on where it was stopped. Below the output folder: `sweep.json`, `.csv`, `.md`, `sweep.png`,
`timings.json` and `runs/`. A setting is chosen by its validation score; the test score of the chosen one is then an
honest number, those of the others are there to be looked at.
"""

import argparse
import csv
import io
import itertools
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from huggingface_hub.dataclasses import strict

from model_cards.markdown import code, table, text
from model_cards.run_folder import is_error
from model_cards.words import duration

from .arguments import load_yaml, merge
from .command import CommandParser, interruptible, run_command
from .comparison.cells import Cell, CellFolder, Outcome, Worker, check_recorded, run_cells
from .comparison.matching import check_recipe, text_task
from .comparison.plan import DEBUG_SAMPLES, DEBUG_SEEDS, DEBUG_STEPS, build, sample_limits
from .comparison.results import RunResult, read_run, summary_of, timings
from .errors import UserError, did_you_mean, one_line
from .figures import COLOURS, MARKERS, new_figure, printable, save_figure
from .files import json_text, write_text
from .recipe_files import named_recipe, parse_yaml, read_yaml

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONFIDENCE, RESAMPLES = 0.95, 4000


@strict
@dataclass(kw_only=True)
class SweepPlan:
    """A sweep recipe.

    Attributes:
        recipe: the training recipe, as a path relative to the sweep recipe.
        over: `section.field` -> its values.
        seeds: of training.
        fields: sections of a recipe over those of `recipe`, for all points.
    """

    recipe: str
    over: dict
    seeds: list[int] = field(default_factory=lambda: [0])
    fields: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Point:
    """One setting of the grid: `(section.field, value)` pairs in the order of the axes."""

    values: tuple[tuple[str, Any], ...]

    def __hash__(self) -> int:
        return hash(self.name)  # a value may be a list or a mapping, which have none

    @property
    def name(self) -> str:
        parts = (f"{key.rpartition('.')[2]}={value}" for key, value in self.values)
        return re.sub(r"[^A-Za-z0-9_.=,+-]", "_", ",".join(parts))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line.

    Raises:
        UserError: for an unknown option or a value of the wrong type.
    """
    parser = CommandParser(
        prog="python -m trainers.sweep",
        description="Train a recipe over a grid of settings; one table and one plot.",
        epilog="Example: accelerate launch -m trainers.sweep recipes/quickstart.yaml --over model.num_slots=16,32",
    )
    parser.add_argument("recipe", type=Path, help="training recipe, or sweep recipe with `recipe` and `over` (YAML)")
    parser.add_argument(
        "--over",
        nargs="+",
        default=[],
        metavar="FIELD=VALUE,VALUE",
        help="fields and their values; all combinations are run. The section may be left out where the recipe holds "
        "the name in one section only; values are read as YAML",
    )
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="default: 0, or those of the sweep recipe")
    parser.add_argument("--data_dir", metavar="FOLDER", help="local files of the task")
    parser.add_argument("--output_dir", type=Path, help="default: outputs/sweep-<name of the recipe>")
    parser.add_argument("--max_samples", type=int, help="use at most so many examples of every split")
    parser.add_argument(
        "--debug",
        action="store_true",
        help="rehearse: at most two seeds, two updates, at most 32 examples, an output folder of its own, tracebacks",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace finished runs that another recipe made")
    return parser.parse_args(argv)


def parse_axis(word: str, sections: Mapping[str, Mapping[str, Any]]) -> tuple[str, list[Any]]:
    """`model.num_slots=16,32` -> `("model.num_slots", [16, 32])`.

    Args:
        word: of the command line. A list is written as YAML writes it: `training.adam_beta1=[0.9, 0.95]`.
        sections: of the recipe, to find the section of a bare field name.

    Raises:
        UserError: if the word is no assignment, or the section cannot be told.
    """
    name, equals, raw = word.partition("=")
    if not equals or not raw:
        raise UserError(f"--over {word}: expected FIELD=VALUE,VALUE")
    if "." not in name:
        owners = [section for section, content in sections.items() if name in content]
        if len(owners) != 1:
            known = [key for content in sections.values() for key in content]
            rule = f"stands in {' and '.join(owners)}" if owners else f"is not in the recipe{did_you_mean(name, known)}"
            raise UserError(f"--over {name}: the name {rule}; write it with its section, like model.{name}")
        name = f"{owners[0]}.{name}"
    try:
        values = parse_yaml(raw if raw.startswith("[") else f"[{raw}]")
    except yaml.YAMLError as error:
        raise UserError(f"--over {word}: cannot read the values: {one_line(error)}") from error
    return name, [_number(value) for value in values]


def _number(value: Any) -> Any:
    """YAML 1.1 reads `1e-4` as text."""
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        return float(value)
    return value


def read_sweep(options: argparse.Namespace) -> tuple[dict[str, dict[str, Any]], dict[str, list[Any]], list[int]]:
    """The recipe's sections, the axes and the seeds of a sweep.

    Raises:
        UserError: naming the file, option or field.
    """
    path = options.recipe
    values = read_yaml(path)
    axes: dict[str, list[Any]] = {}
    seeds = options.seeds
    if isinstance(values, dict) and "over" in values:
        plan = build(SweepPlan, values, str(path))
        sections = load_yaml(named_recipe(path, "recipe", plan.recipe))
        sections = merge(sections, plan.fields)
        axes = {name: list(found) if isinstance(found, list) else [found] for name, found in plan.over.items()}
        seeds = seeds or plan.seeds
    else:
        sections = load_yaml(path)
    axes |= dict(parse_axis(word, sections) for word in options.over)
    seeds = seeds or [0]
    if not axes:
        raise UserError("--over is missing: name fields and their values, like --over model.num_slots=16,32")
    for name, found in axes.items():
        section, _, rest = str(name).partition(".")
        if not section or not rest:
            raise UserError(f"{path}: over: {name!r} is no section.field")
        if name == "training.seed":
            raise UserError("--over training.seed: seeds are repetitions; use --seeds")
        if not found or len({json.dumps(value, default=str) for value in found}) != len(found):
            raise UserError(f"--over {name}: the values {found} must be different ones, at least one")
    if len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise UserError(f"--seeds: {seeds} must be different numbers that are not negative")
    return sections, axes, seeds


def grid(
    sections: Mapping[str, Mapping[str, Any]], axes: Mapping[str, Sequence[Any]], seeds: Sequence[int]
) -> dict[tuple[Point, int], Cell]:
    """All cells. Seeds change slowest, so that a part already covers the grid."""
    cells = {}
    points = [Point(tuple(zip(axes, values, strict=True))) for values in itertools.product(*axes.values())]
    for seed in seeds:
        for point in points:
            recipe: dict[str, Any] = merge(sections, {})
            for name, value in point.values:
                section, *inner = name.split(".")
                nested: Any = value
                for part in reversed(inner):
                    nested = {part: nested}
                recipe = merge(recipe, {section: nested})
            recipe = merge(recipe, {"training": {"seed": seed, "disable_tqdm": True}})
            cells[point, seed] = Cell(f"{point.name}/seed-{seed}", recipe, group=(point.name,))
    return cells


def gather(
    axes: Mapping[str, Sequence[Any]],
    cells: Mapping[tuple[Point, int], Cell],
    folder: CellFolder,
    outcomes: Mapping[str, Outcome],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The content of `sweep.json` and `timings.json`, from the finished runs.

    Raises:
        UserError: if nothing is finished.
    """
    rows: list[dict[str, Any]] = []
    everything: dict[tuple[str, str, int | None, int], RunResult] = {}
    for point in dict.fromkeys(point for point, _ in cells):
        runs = {
            seed: read_run(folder.run(cell))
            for (other, seed), cell in cells.items()
            if other == point and folder.is_finished(cell)
        }
        everything |= {(point.name, "", None, seed): run for seed, run in runs.items()}
        if runs:
            rows.append({"point": dict(point.values), **summary_of(runs, point.name, CONFIDENCE, RESAMPLES)})
    failed = [
        {"cell": name, "reason": outcome.reason} for name, outcome in outcomes.items() if outcome.status == "failed"
    ]
    if not rows:
        reasons = sorted({str(entry["reason"]) for entry in failed})
        raise UserError(f"{folder.path}: no run is finished{': ' if reasons else ''}{'; '.join(reasons)}")
    known = [row for row in rows if row["validation"] is not None]
    best = (min if is_error(rows[0]["metric"]) else max)(known, key=lambda row: row["validation"]) if known else None
    for row in rows:
        row["chosen"] = row is best
    task = next(iter(everything.values())).metrics["task"]
    content = {
        "schema_version": 1,
        "axes": {name: list(values) for name, values in axes.items()},
        "seeds": sorted({seed for _, seed in cells}),
        "task": task,
        "confidence": CONFIDENCE,
        "points": rows,
        "failed": failed,
    }
    clock = timings(everything, {})
    for entry in clock["training"]:
        entry["point"] = entry.pop("model")
        del entry["task"], entry["train_size"]
    return content, clock


def csv_text(content: Mapping[str, Any]) -> str:
    """One line for each point of the grid."""
    output = io.StringIO()
    names = list(content["axes"])
    columns = ["score", "low", "high", "validation", "chosen", "seeds", "parameters", "mean_steps"]
    writer = csv.writer(output, lineterminator="\n")
    writer.writerow([*names, *columns])
    for row in content["points"]:
        measured = [
            row["score"]["value"],
            *row["score"]["interval"],
            row["validation"],
            row["chosen"],
            len(row["seeds"]),
        ]
        writer.writerow(
            [*(row["point"][name] for name in names), *measured, row["parameters"]["trainable"], row["mean_steps"]]
        )
    return output.getvalue()


def _validation(row: Mapping[str, Any]) -> str:
    if row["validation"] is None:
        return ""
    return f"{row['validation']:.3f}" + (" (best)" if row["chosen"] else "")


def markdown(content: Mapping[str, Any], clock: Mapping[str, Any]) -> str:
    """The table of the sweep, and what it was run on."""
    names = list(content["axes"])
    seconds = {entry["point"]: entry["mean_seconds"] for entry in clock["training"]}
    header = [*(code(name) for name in names), "Validation", "Test", "Seeds", "Parameters", "Mean steps", "Seconds"]
    rows = []
    for row in content["points"]:
        point, (low, high) = Point(tuple(row["point"].items())), row["score"]["interval"]
        rows.append(
            [
                *(code(row["point"][name]) for name in names),
                _validation(row),
                f"{row['score']['value']:.3f} [{low:.3f}, {high:.3f}]",
                str(len(row["seeds"])),
                f"{row['parameters']['trainable']:,}",
                "" if row["mean_steps"] is None else f"{row['mean_steps']:.2f}",
                f"{seconds[point.name]:,.0f}",
            ]
        )
    first, task = content["points"][0], content["task"]
    metric, trivial = first["metric"], first["trivial"]
    words = [
        f"Mean {text(metric)} over seeds on {text(task['name'])} ({text(task['source'])}), "
        f"{first['score']['n']:,} test examples, {100 * content['confidence']:g} % intervals. The best is chosen by "
        "the validation score alone; the test scores of the others are no basis for a choice."
    ]
    if trivial is not None:
        words.append(f"Trivial ({text(trivial['name'])}): {trivial[metric]['value']:.3f}.")
    words.append(f"Hardware: {'; '.join(text(name) for name in clock['hardware'])}.")
    parts = ["# Sweep", table(header, rows, numeric=range(len(names), len(header))), " ".join(words)]
    if content["failed"]:
        lines = "\n".join(f"- {code(entry['cell'])}: {text(entry['reason'])}" for entry in content["failed"])
        parts.append(f"## Failed runs\n\n{lines}")
    return "\n\n".join([*parts, "![Score over the settings](sweep.png)"]) + "\n"


def chart(content: Mapping[str, Any]) -> "Figure":
    """Test score over the first axis: a line for each value of the second, a panel for each value of the others."""
    first, *others = content["axes"]
    lines, panels = others[:1], others[1:]
    combinations = list(itertools.product(*(content["axes"][name] for name in panels)))
    columns = min(3, len(combinations))
    rows = math.ceil(len(combinations) / columns)
    figure = new_figure(4.2 * columns + 0.6, 3.2 * rows + 0.8)
    grid_of_axes = figure.subplots(rows, columns, squeeze=False, sharey=True)
    positions = content["axes"][first]
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in positions)
    for axes, combination in zip(grid_of_axes.flat, combinations, strict=False):
        for index, value in enumerate(content["axes"][lines[0]] if lines else [None]):
            wanted = dict(zip(panels, combination, strict=True)) | ({lines[0]: value} if lines else {})
            found = [
                row for row in content["points"] if all(row["point"][name] == given for name, given in wanted.items())
            ]
            if not found:
                continue
            places = [row["point"][first] if numeric else positions.index(row["point"][first]) for row in found]
            scores = np.array([[row["score"]["value"], *row["score"]["interval"]] for row in found])
            axes.errorbar(
                places,
                scores[:, 0],
                yerr=np.maximum(0, [scores[:, 0] - scores[:, 1], scores[:, 2] - scores[:, 0]]),
                color=COLOURS[index % len(COLOURS)],
                marker=MARKERS[index % len(MARKERS)],
                capsize=3,
                label=None if not lines else f"{lines[0]} = {printable(str(value), 24)}",
            )
        if numeric:
            if min(positions) > 0 and max(positions) >= 4 * min(positions):
                axes.set_xscale("log")
            axes.set_xticks(positions, [f"{value:g}" for value in positions])
            axes.minorticks_off()
        else:
            axes.set_xticks(range(len(positions)), [printable(str(value), 24) for value in positions])
        axes.set_xlabel(first)
        axes.set_title(
            ", ".join(f"{name} = {printable(str(value), 24)}" for name, value in zip(panels, combination, strict=True)),
            fontsize=9,
        )
        axes.grid(alpha=0.3)
    for axes in list(grid_of_axes.flat)[len(combinations) :]:
        axes.remove()
    trivial, metric = content["points"][0]["trivial"], content["points"][0]["metric"]
    for axes in list(grid_of_axes.flat)[: len(combinations)]:
        if trivial is not None:
            axes.axhline(trivial[metric]["value"], color="0.35", linestyle=":", label="trivial predictor")
    for row in range(rows):
        grid_of_axes[row][0].set_ylabel(f"test {metric}")
    handles, labels = grid_of_axes[0][0].get_legend_handles_labels()
    if labels:
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return figure


def run(options: argparse.Namespace) -> int:
    """Run the grid and write the report. Returns the exit code: 1 if a run failed."""
    worker = Worker.from_environment()
    sections, axes, seeds = read_sweep(options)
    if options.data_dir is not None:
        if not Path(options.data_dir).is_dir():
            raise UserError(f"--data_dir: no folder {options.data_dir}")
        sections = merge(sections, {"task": {"data_dir": options.data_dir}})
    if options.max_samples is not None:
        sections = merge(sections, {"task": sample_limits(sections, options.max_samples)})
    if options.debug:
        few = sample_limits(sections, DEBUG_SAMPLES)
        sections = merge(sections, {"task": few, "training": {"max_steps": DEBUG_STEPS}})
        seeds = seeds[:DEBUG_SEEDS]
    output = options.output_dir or Path("outputs") / f"sweep-{options.recipe.stem}{'-debug' if options.debug else ''}"
    folder, cells = CellFolder(output), grid(sections, axes, seeds)
    if len({cell.name for cell in cells.values()}) != len(cells):
        raise UserError("--over: two values give runs of the same name; write them differently")
    checked = False
    for (point, seed), cell in cells.items():
        if seed == seeds[0]:
            recipe = check_recipe(cell.recipe, point.name)
            if not checked or any(name.startswith("task.") for name in axes):
                text_task(recipe, point.name)
                checked = True
    check_recorded(folder, list(cells.values()), options.overwrite)
    output.mkdir(parents=True, exist_ok=True)
    if worker.rank == 0:
        done = sum(folder.is_finished(cell) for cell in cells.values())
        print(
            f"{len(cells) // len(seeds)} settings, {len(seeds)} seeds; {len(cells)} runs, {done} of them finished; "
            f"output in {output}",
            flush=True,
        )
    outcomes = run_cells(folder, list(cells.values()), worker, options.overwrite)
    if worker.rank != 0:
        return 0
    content, clock = gather(axes, cells, folder, outcomes)
    write_text(output / "sweep.json", json_text(content))
    write_text(output / "timings.json", json_text(clock))
    write_text(output / "sweep.csv", csv_text(content))
    write_text(output / "sweep.md", markdown(content, clock))
    save_figure(chart(content), output / "sweep.png")
    spent = sum(outcome.seconds for outcome in outcomes.values() if outcome.status == "finished")
    print(
        f"\nreport  {output / 'sweep.md'}" + (f"; {duration(spent)} in runs finished now" if spent else ""), flush=True
    )
    if content["failed"]:
        print(f"failed  {len(content['failed'])} runs; the same command tries them again", flush=True)
    return 1 if content["failed"] else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code: 0, 1 if a run failed, 2 for a mistake the user can mend, 130 for Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)

    def work() -> int:
        options = parse(argv)
        with interruptible():
            return run(options)

    return run_command(work, after_interrupt="the same command goes on where it stopped", debug="--debug" in argv)


if __name__ == "__main__":
    sys.exit(main())
