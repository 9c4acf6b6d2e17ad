"""Compare models on data sets, with the same data, budget and seeds for all, and say what the differences are worth.

    accelerate launch -m trainers.compare recipes/compare/small.yaml --data_dir path/to/data
    accelerate launch -m trainers.compare recipes/compare/small.yaml --data_dir strategyqa=path/to/strategyqa --debug

Every cell (model, task, training size, seed) is a run of the training command with a run folder of its own. The same
command again goes on where it was stopped; finished runs are kept, failed ones tried again. Started with several
processes, each trains cells of its own. `--help` lists the options.

Below the output folder: `comparison.json` (the numbers, the same bit for bit when one process on a CPU repeats them),
`timings.json` (what a clock measured), `curves.json`, `comparison.md`, `.csv` and `.tex`, pictures, and `runs/`.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from model_cards.comparison import comparison_card
from model_cards.words import duration

from .command import CommandParser, interruptible, run_command
from .comparison.cells import Cell, CellFolder, Outcome, Worker, check_recorded, run_cells
from .comparison.cost import measure
from .comparison.figures import all_charts
from .comparison.matching import prepare
from .comparison.plan import (
    LEAST_SEEDS,
    Comparison,
    apply_data_dirs,
    limit_samples,
    read_comparison,
    rehearse,
)
from .comparison.results import Key, gather, timings
from .comparison.tables import csv_text, latex_text
from .errors import UserError, did_you_mean
from .figures import save_figure
from .files import json_text, write_text
from .recipe_files import read_yaml


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line.

    Raises:
        UserError: for an unknown option or a value of the wrong type.
    """
    parser = CommandParser(
        prog="python -m trainers.compare",
        description="Train and compare several models on several tasks with several seeds.",
        epilog="Example: accelerate launch -m trainers.compare recipes/compare/small.yaml --data_dir path/to/data",
    )
    parser.add_argument("recipe", type=Path, help="comparison recipe (YAML); see recipes/README.md")
    parser.add_argument(
        "--data_dir",
        nargs="+",
        default=[],
        metavar="[TASK=]FOLDER",
        help="local files: a folder for a task, or one folder that holds a folder named like each task",
    )
    parser.add_argument("--output_dir", type=Path, help="default: outputs/compare-<name of the recipe>")
    parser.add_argument("--max_samples", type=int, help="use at most so many examples of every split")
    parser.add_argument(
        "--debug",
        action="store_true",
        help="rehearse: two seeds, two updates, at most 32 examples, an output folder of its own, tracebacks",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace finished runs that another recipe made")
    parser.add_argument(
        "--tasks", nargs="+", metavar="TASK", help="run only these now; the report holds all that exist"
    )
    parser.add_argument("--models", nargs="+", metavar="MODEL", help="run only these now")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="run only these of the recipe's now")
    parser.add_argument("--report_only", action="store_true", help="run nothing; write the report of what is finished")
    return parser.parse_args(argv)


def chosen(options: argparse.Namespace, comparison: Comparison, cells: Mapping[Key, Cell]) -> dict[Key, Cell]:
    """The cells to run now.

    Raises:
        UserError: if an option names what the recipe does not.
    """
    known: dict[str, Sequence[Any]] = {
        "tasks": list(comparison.tasks),
        "models": list(comparison.models),
        "seeds": comparison.plan.seeds,
    }
    for name, all_of_them in known.items():
        for value in getattr(options, name) or ():
            if value not in all_of_them:
                hint = did_you_mean(value, all_of_them) if isinstance(value, str) else ""
                raise UserError(f"--{name}: the recipe has no {value!r}{hint}")
    if options.report_only:
        return {}
    return {
        (model, task, size, seed): cell
        for (model, task, size, seed), cell in cells.items()
        if (options.tasks is None or task in options.tasks)
        and (options.models is None or model in options.models)
        and (options.seeds is None or seed in options.seeds)
    }


def costs(
    comparison: Comparison, cells: Mapping[Key, Cell], folder: CellFolder
) -> dict[tuple[str, str], tuple[dict[str, Any], dict[str, Any]]]:
    """Operations and latency of each model on each task, of the first finished seed; kept in its run's cell files."""
    found = {}
    for task in comparison.tasks:
        for model in comparison.models:
            mine = [cell for key, cell in cells.items() if key[:3] == (model, task, None) and folder.is_finished(cell)]
            if not mine:
                continue
            kept, metrics = folder.file(mine[0], "cost.json"), folder.run(mine[0]) / "metrics.json"
            if not kept.exists() or kept.stat().st_mtime < metrics.stat().st_mtime:
                measured = measure(folder.run(mine[0]), folder.file(mine[0], "yaml"))
                write_text(kept, json_text(measured))
            value = json.loads(kept.read_text(encoding="utf-8"))
            if value is not None:
                found[model, task] = (value[0], value[1])
    return found


def write_report(
    comparison: Comparison, cells: Mapping[Key, Cell], folder: CellFolder, outcomes: Mapping[str, Outcome]
) -> dict[str, Any]:
    """Write numbers, tables and pictures of what is finished. Returns the content of `comparison.json`.

    Raises:
        UserError: if nothing is finished.
    """
    content, curves, runs = gather(comparison, cells, folder, outcomes)
    if not runs:
        reasons = sorted({outcome.reason for outcome in outcomes.values() if outcome.reason})
        raise UserError(f"{folder.path}: no run is finished{': ' if reasons else ''}{'; '.join(reasons)}")
    measured = costs(comparison, cells, folder)
    for entry in content["results"]:
        cost = measured.get((entry["model"], entry["task"]))
        entry["cost"] = cost[0] if cost is not None and entry["train_size"] is None else None
    clock = timings(runs, {(model, task): pair[1] for (model, task), pair in measured.items()})
    path = folder.path
    for name, value in (("comparison", content), ("curves", curves), ("timings", clock)):
        write_text(path / f"{name}.json", json_text(value))
    write_text(path / "comparison.csv", csv_text(content, clock))
    write_text(path / "comparison.tex", latex_text(content))
    charts = all_charts(content, curves, clock)
    for name, figure in charts.items():
        save_figure(figure, path / name)
    write_text(path / "comparison.md", comparison_card(content, clock, pictures=list(charts)))
    return content


def run(options: argparse.Namespace) -> int:
    """Run the cells and write the report. Returns the exit code: 1 if a cell failed."""
    worker = Worker.from_environment()
    comparison = read_comparison(options.recipe)
    apply_data_dirs(comparison, options.data_dir)
    if options.max_samples is not None:
        limit_samples(comparison, options.max_samples)
    if options.debug:
        rehearse(comparison)
    output = options.output_dir or Path("outputs") / f"compare-{comparison.name}{'-debug' if options.debug else ''}"
    folder, cells = CellFolder(output), comparison.cells()
    to_run = chosen(options, comparison, cells)
    if to_run:
        # What matching solves belongs to a cell's recipe, so it comes before recorded recipes are compared.
        prepare(comparison, cells, list(dict.fromkeys(task for _, task, _, _ in to_run)))
        check_recorded(folder, list(to_run.values()), options.overwrite)
        output.mkdir(parents=True, exist_ok=True)
        if worker.rank == 0:
            seeds = len(comparison.plan.seeds)
            few = "" if seeds >= LEAST_SEEDS else f" (a verdict needs at least {LEAST_SEEDS})"
            done = sum(folder.is_finished(cell) for cell in to_run.values())
            print(
                f"{comparison.name}: {len(comparison.models)} models, {len(comparison.tasks)} tasks, {seeds} seeds"
                f"{few}; {len(to_run)} runs, {done} of them finished; output in {output}",
                flush=True,
            )
            write_text(output / "compare.yaml", yaml.safe_dump(read_yaml(options.recipe), sort_keys=False))
    outcomes = run_cells(folder, list(to_run.values()), worker, options.overwrite, comparison.plan.keep_checkpoints)
    if worker.rank != 0:
        return 0
    content = write_report(comparison, cells, folder, outcomes)
    print(f"\n{summary(content)}\n\nreport  {output / 'comparison.md'}", flush=True)
    spent = sum(outcome.seconds for outcome in outcomes.values() if outcome.status == "finished")
    if spent:
        print(f"time    {duration(spent)} in runs finished now", flush=True)
    failed = content["failed"]
    if failed:
        print(f"failed  {len(failed)} runs; the same command tries them again", flush=True)
    return 1 if failed else 0


def summary(content: Mapping[str, Any]) -> str:
    """Results and verdicts as lines of text."""
    lines = []
    for entry in content["results"]:
        place = entry["task"] if entry["train_size"] is None else f"{entry['task']}@{entry['train_size']}"
        low, high = entry["score"]["interval"]
        lines.append(
            f"{place:24} {entry['model']:20} {entry['metric']} {entry['score']['value']:.3f} [{low:.3f}, {high:.3f}]"
        )
    for entry in content["comparisons"]:
        place = entry["task"] if entry["train_size"] is None else f"{entry['task']}@{entry['train_size']}"
        low, high = entry["difference"]["interval"]
        lines.append(
            f"{place:24} {entry['first']} - {entry['second']}: {entry['difference']['value']:+.3f} "
            f"[{low:+.3f}, {high:+.3f}], p {entry['p_value_holm']:.3f} (Holm): {entry['verdict']}"
        )
    return "\n".join(lines)


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
