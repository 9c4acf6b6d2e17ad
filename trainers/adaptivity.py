"""Does choosing the number of steps per sample pay? Accuracy against mean steps, beside fixed numbers of steps.

    python -m trainers.adaptivity RUN [RUN ...] --fixed RUN [RUN ...] --output_dir DIR
    python -m trainers.adaptivity RUN --task_options '{min_distance: 9, max_distance: 12}' --bound 20 --output_dir DIR

Each RUN is the folder of a run that answers in one pass. Its model is measured on the different questions of the test
split, each counted once: with its stopping rule at several thresholds, and with the rule off at every number of steps
up to the bound (the same weights, cut off). `--fixed` names runs that were trained with a fixed number of steps.
Written are `adaptivity.json` and `adaptivity.png`: accuracy against mean steps, steps against difficulty, time against
mean steps.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import yaml
from scipy.stats import spearmanr

from .command import CommandParser, run_command
from .errors import UserError
from .evaluation import decode_predictions
from .figures import COLOURS, MARKERS, new_figure, printable, save_with_numbers, whole_numbers
from .loading import load_model
from .recipe_files import code_files, parse_yaml
from .run import read_record, say
from .statistics import proportion
from .tasks import Example, Task, TaskArguments, get_task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESAMPLES = 1000


def rank_correlation(steps: np.ndarray, difficulty: np.ndarray, confidence: float = 0.95) -> dict[str, Any]:
    """Spearman's correlation of steps and difficulty, with a percentile bootstrap interval over examples.

    Args:
        steps, difficulty: one number per example, `(examples,)`.
        confidence: level of the interval, in (0, 1).

    Returns:
        `{"value", "n", "interval", "confidence", "method"}`; value and interval are `None` where either does not vary.
    """
    method = f"percentile bootstrap over examples, {RESAMPLES} resamples"
    result: dict[str, Any] = {"value": None, "n": len(steps), "interval": None, "confidence": confidence}
    result["method"] = method
    if len(np.unique(steps)) < 2 or len(np.unique(difficulty)) < 2:
        return result
    random = np.random.default_rng(0)
    values = []
    for _ in range(RESAMPLES):
        chosen = random.integers(0, len(steps), size=len(steps))
        if len(np.unique(steps[chosen])) > 1 and len(np.unique(difficulty[chosen])) > 1:
            values.append(spearmanr(steps[chosen], difficulty[chosen]).statistic)
    tail = (1 - confidence) / 2
    result["value"] = float(spearmanr(steps, difficulty).statistic)
    result["interval"] = [float(value) for value in np.quantile(values, [tail, 1 - tail])]
    return result


class OnePassModel:
    """A trained model and the test examples of its task, measured under any stopping rule.

    Args:
        run: folder of a finished run.
        task_options: options of the task that replace those of the run.
        batch_size: samples in a batch.

    Raises:
        UserError: the folder holds no run, or one whose model does not answer in one pass.
    """

    def __init__(self, run: Path, task_options: dict[str, Any], batch_size: int):
        record = read_record(run / "recipe.yaml")
        self.run, self.batch_size = run, batch_size
        self.model, tokenizer = load_model(str(run), device="cpu")
        assert tokenizer is not None  # needed by default
        self.tokenizer = tokenizer
        if not type(self.model).__name__.endswith("ForMaskedLM") or not hasattr(self.model.config, "halting"):
            raise UserError(f"{run}: a {type(self.model).__name__} does not answer in one pass with a stopping rule")
        arguments = dict(record["task"])
        for name in code_files(arguments):
            raise UserError(f"{run}: its task is the Python file {name}, which this command does not run")
        arguments["options"] = {**arguments.get("options", {}), **task_options}
        # The lengths follow from the options again.
        arguments["max_source_length"] = arguments["max_target_length"] = None
        self.task: Task = get_task(TaskArguments(**arguments))
        # A map may have been drawn twice: what a share of examples tells is about different ones.
        self.examples: list[Example] = list({example.prompt: example for example in self.task.rows("test")}.values())
        if any(not isinstance(example.difficulty, int) for example in self.examples):
            raise UserError(f"{run}: the examples of {self.task.name} have no number for their difficulty")
        self.difficulty = np.array([example.difficulty for example in self.examples])
        ids = [self.task.encode(example, self.tokenizer)["input_ids"] for example in self.examples]
        if len({len(row) for row in ids}) > 1:
            raise UserError(f"{run}: the prompts of {self.task.name} differ in length; this command takes equal ones")
        self.inputs = torch.tensor(ids)
        self.halting, self.threshold = self.model.config.halting, self.model.config.halting_threshold

    @torch.no_grad()
    def measure(self, halting: str, threshold: float, bound: int) -> dict[str, np.ndarray | float]:
        """Answers under a stopping rule.

        Returns:
            `right` and `steps`, one per example, and `seconds` of processor time for an example.
        """
        config = self.model.config
        config.halting, config.halting_threshold = halting, threshold
        tokens, steps, seconds = [], [], 0.0
        for batch in self.inputs.split(self.batch_size):
            started = time.process_time()
            outputs = self.model(input_ids=batch, max_reasoning_steps=bound)
            seconds += time.process_time() - started
            tokens.append(outputs.logits.argmax(dim=-1))
            steps.append(outputs.reasoning_steps)
        config.halting, config.halting_threshold = self.halting, self.threshold
        answers = torch.cat(tokens)
        ends = answers == config.eos_token_id
        answers = torch.where(ends.cumsum(dim=1) > ends.long(), -100, answers)
        texts = decode_predictions(answers.numpy(), self.tokenizer)
        right = [self.task.score(text, example).value for text, example in zip(texts, self.examples, strict=True)]
        return {"right": np.array(right), "steps": torch.cat(steps).numpy(), "seconds": seconds / len(self.inputs)}

    def entry(self, halting: str, threshold: float, bound: int) -> dict[str, Any]:
        """One point of a curve, as `adaptivity.json` holds it."""
        measured = self.measure(halting, threshold, bound)
        right, steps = np.asarray(measured["right"]), np.asarray(measured["steps"])
        levels = np.unique(self.difficulty)
        return {
            "halting": halting,
            "threshold": None if halting == "none" else threshold,
            "bound": bound,
            "mean_steps": float(steps.mean()),
            "accuracy": proportion(int(right.sum()), len(right)),
            "milliseconds_per_example": 1000 * float(measured["seconds"]),
            "steps_and_difficulty": rank_correlation(steps, self.difficulty),
            "by_difficulty": [
                {
                    "difficulty": int(level),
                    "n": int((own := self.difficulty == level).sum()),
                    "accuracy": float(right[own].mean()),
                    "mean_steps": float(steps[own].mean()),
                    "low_steps": float(np.quantile(steps[own], 0.05)),
                    "high_steps": float(np.quantile(steps[own], 0.95)),
                }
                for level in levels
            ],
        }


def at_equal_steps(curve: Sequence[dict[str, Any]], mean_steps: float) -> float | None:
    """Accuracy of a curve of fixed numbers of steps at a mean number of steps, by linear interpolation.

    A mixture of samples that take k and samples that take k + 1 steps, chosen by chance, has that accuracy and that
    mean. `None` outside the curve.
    """
    points = sorted((entry["mean_steps"], entry["accuracy"]["value"]) for entry in curve)
    if not points or not points[0][0] <= mean_steps <= points[-1][0]:
        return None
    return float(np.interp(mean_steps, [steps for steps, _ in points], [value for _, value in points]))


def report(
    runs: Sequence[Path],
    fixed: Sequence[Path],
    thresholds: Sequence[float],
    bound: int | None,
    task_options: dict[str, Any],
    batch_size: int,
) -> dict[str, Any]:
    """The numbers of `adaptivity.json`: for each run its curves, and for each fixed run its one point."""
    own_curves, points = [], []
    for folder in runs:
        model = OnePassModel(folder, task_options, batch_size)
        if model.halting == "none":
            raise UserError(f"{folder}: the run has no stopping rule; name it after --fixed")
        most = bound or model.model.config.max_reasoning_steps
        say(f"{folder}: {len(model.examples)} test examples, at most {most} steps")
        model.measure(model.halting, model.threshold, most)  # the first pass of a process takes longer
        adaptive = [model.entry(model.halting, value, most) for value in sorted({*thresholds, model.threshold})]
        cut = [model.entry("none", 0.0, steps) for steps in range(1, most + 1)]
        for entry in adaptive:
            entry["cut_off_at_equal_steps"] = at_equal_steps(cut, entry["mean_steps"])
        own_curves.append(
            {
                "run": folder.name,
                "source": model.task.source,
                "trained_steps": model.model.config.max_reasoning_steps,
                "threshold": model.threshold,
                "adaptive": adaptive,
                "cut_off": cut,
            }
        )
    for folder in fixed:
        model = OnePassModel(folder, task_options, batch_size)
        if model.halting != "none":
            raise UserError(f"{folder}: the run has a stopping rule; only runs with model.halting none are fixed")
        model.measure("none", 0.0, model.model.config.max_reasoning_steps)
        points.append({"run": folder.name, **model.entry("none", 0.0, model.model.config.max_reasoning_steps)})
        say(f"{folder}: {points[-1]['mean_steps']:.0f} steps, accuracy {points[-1]['accuracy']['value']:.3f}")
    return {"batch_size": batch_size, "task_options": task_options, "runs": own_curves, "fixed": points}


def chosen(curve: dict[str, Any]) -> dict[str, Any]:
    """The point of a run at the threshold it was trained with."""
    return next(entry for entry in curve["adaptive"] if entry["threshold"] == curve["threshold"])


def draw(numbers: dict[str, Any]) -> "Figure":
    """Three pictures: accuracy against mean steps, steps against difficulty, time against mean steps."""
    figure = new_figure(15, 4.6)
    accuracy, difficulty, duration = figure.subplots(1, 3)
    for index, curve in enumerate(numbers["runs"]):
        first = index == 0
        for entries, colour, style, text in (
            (curve["cut_off"], COLOURS[1], "--", "the same weights, cut off at K"),
            (curve["adaptive"], COLOURS[0], "-", "stopping rule, several thresholds"),
        ):
            entries = sorted(entries, key=lambda entry: entry["mean_steps"])
            places = [entry["mean_steps"] for entry in entries]
            values = [entry["accuracy"]["value"] for entry in entries]
            accuracy.plot(
                places, values, f".{style}", color=colour, alpha=0.6, linewidth=1, label=text if first else None
            )
            times = [entry["milliseconds_per_example"] for entry in entries]
            duration.plot(places, times, ".", color=colour, alpha=0.7, label=text if first else None)
        point = chosen(curve)
        accuracy.plot(
            point["mean_steps"], point["accuracy"]["value"], MARKERS[2], color=COLOURS[0], markersize=8,
            label="stopping rule, threshold of the recipe" if first else None,
        )  # fmt: skip
        levels = point["by_difficulty"]
        levels_at = np.array([level["difficulty"] for level in levels]) + 0.08 * (
            index - (len(numbers["runs"]) - 1) / 2
        )
        means = np.array([level["mean_steps"] for level in levels])
        spread = np.array([[level["low_steps"], level["high_steps"]] for level in levels]).T
        correlation = point["steps_and_difficulty"]["value"]
        difficulty.errorbar(
            levels_at, means, yerr=np.clip([means - spread[0], spread[1] - means], 0, None),
            fmt=f"{MARKERS[index % len(MARKERS)]}-", color=COLOURS[index % len(COLOURS)], capsize=2, linewidth=1,
            label=f"{printable(curve['run'], 40)}: Spearman "
            + ("undefined" if correlation is None else f"{correlation:.2f}"),
        )  # fmt: skip
    for index, entry in enumerate(numbers["fixed"]):
        low, high = entry["accuracy"]["interval"]
        value = entry["accuracy"]["value"]
        accuracy.errorbar(
            entry["mean_steps"], value, yerr=[[value - low], [high - value]], fmt=MARKERS[1], color=COLOURS[2],
            capsize=2, label="trained with K steps" if index == 0 else None,
        )  # fmt: skip
    accuracy.set(xlabel="mean steps", ylabel="accuracy on the test split", ylim=(0, 1.02))
    difficulty.set(xlabel="difficulty", ylabel="steps: mean, 5 to 95 % of the examples")
    duration.set(xlabel="mean steps", ylabel="processor time for an example, ms")
    duration.set_ylim(bottom=0)
    for axes in (accuracy, difficulty, duration):
        axes.grid(alpha=0.3)
        whole_numbers(axes.xaxis)
        axes.legend(fontsize=8)
    return figure


def table(numbers: dict[str, Any]) -> str:
    """The points of all runs as lines of text."""
    lines = []
    for curve in numbers["runs"]:
        for entry in curve["adaptive"]:
            correlation = entry["steps_and_difficulty"]
            told = "steps do not vary"
            if correlation["value"] is not None:
                low, high = correlation["interval"]
                told = f"Spearman {correlation['value']:.3f} [{low:.3f}, {high:.3f}]"
            equal = entry["cut_off_at_equal_steps"]
            mark = " (recipe)" if entry["threshold"] == curve["threshold"] else ""
            lines.append(
                f"{curve['run']}: threshold {entry['threshold']:g}{mark}: accuracy {entry['accuracy']['value']:.3f} at "
                f"{entry['mean_steps']:.2f} steps, cut off at equal steps "
                f"{'-' if equal is None else format(equal, '.3f')}; {told}; "
                f"{entry['milliseconds_per_example']:.3f} ms"
            )
        cut = "  ".join(f"{entry['bound']}: {entry['accuracy']['value']:.3f}" for entry in curve["cut_off"])
        lines.append(f"{curve['run']}: cut off at  {cut}")
    for entry in numbers["fixed"]:
        low, high = entry["accuracy"]["interval"]
        value = entry["accuracy"]["value"]
        lines.append(f"{entry['run']}: {entry['bound']} steps: accuracy {value:.3f} [{low:.3f}, {high:.3f}]")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code: 0, or 2 for a mistake the user can mend."""
    return run_command(lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: Sequence[str]) -> int:
    parser = CommandParser(prog="python -m trainers.adaptivity", description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="Folder of a run with a stopping rule.")
    parser.add_argument("--fixed", nargs="+", type=Path, default=[], metavar="RUN", help="Runs with a fixed number.")
    parser.add_argument(
        "--thresholds", nargs="+", type=float, default=[0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7], metavar="VALUE",
        help="Thresholds of the stopping rule beside the recipe's own.",
    )  # fmt: skip
    parser.add_argument("--bound", type=int, help="Most steps; default is the run's max_reasoning_steps.")
    parser.add_argument("--task_options", default="{}", help="Options of the task in place of the run's, as YAML.")
    parser.add_argument("--batch_size", type=int, default=64, help="Samples in a batch.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Where the report goes.")
    arguments = parser.parse_args(argv)
    try:
        options = parse_yaml(arguments.task_options)
    except yaml.YAMLError as error:
        raise UserError(f"--task_options: not valid YAML: {arguments.task_options}") from error
    if not isinstance(options, dict):
        raise UserError(f"--task_options: must be a mapping such as '{{max_distance: 12}}', got {options!r}")
    for name in ("bound", "batch_size"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name}: {value}; it must be at least 1")
    if min(arguments.thresholds) < 0:
        raise UserError(f"--thresholds: {min(arguments.thresholds)}; they must not be negative")
    numbers = report(
        arguments.runs, arguments.fixed, arguments.thresholds, arguments.bound, options, arguments.batch_size
    )
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    save_with_numbers(draw(numbers), arguments.output_dir / "adaptivity.png", numbers)
    print(table(numbers))
    return 0


if __name__ == "__main__":
    sys.exit(main())
