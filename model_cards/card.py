"""Draw the model card (README.md) of a finished run from its folder, without a network and without the model.

    python -m model_cards.card outputs/my-run
    python -m model_cards.card outputs/my-run --repo_id user/name --revision 1a2b3c4d

The first form is for the folder where it lies, the second for a copy of it on the Hub at that revision.
"""

import argparse
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .architectures import Architecture, architecture_of
from .further_results import further_results
from .markdown import code, one_line, python_string, table, text
from .run_folder import CardError, Fields, RunFolder, Score
from .snippets import snippet
from .words import duration, thin

TEMPLATE = Path(__file__).with_name("model_card_template.md.jinja")

MOST_LOSS_ROWS = 12
MOST_LISTED_REPORTS = 30
# What of a recipe's model is not new, and the words for it.
STARTING_POINTS = {
    "pretrained": "starting from {}",
    "embeddings_from": "from random weights and the embeddings of {}",
    "reader": "from random weights, its input read by {}",
}


def render_card(
    run_dir: str | Path, repo_id: str | None = None, revision: str | None = None, license: str = "mit"
) -> str:
    """The model card of a finished run, as the text of its README.md.

    Only files of the run folder are read. The same folder and options give the same text.

    Args:
        run_dir: output folder of a finished run.
        repo_id: the Hub repository (`user/name`) the card is for; the loading example then loads from there. Without it
            the example loads the folder: by its path from the working directory if it lies below that, else as `.`.
        revision: commit hash, tag or branch of `repo_id` to load; `main` if left out.
        license: licence of the published model, as the Hub writes it: `mit`, `cc-by-nc-sa-4.0`, ...

    Returns:
        YAML front matter and Markdown, ending in a line break.

    Raises:
        CardError: if a file is missing or malformed, the run is not finished, or the options contradict each other. The
            message is one line that names the file and field, or the option, and the rule.
    """
    if repo_id is not None:
        try:
            validate_repo_id(repo_id)
        except HFValidationError as error:
            raise CardError(f"repo_id: {one_line(error)}") from error
        if repo_id.count("/") != 1:
            raise CardError(f"repo_id: is {repo_id!r}; it must be user/name")
    elif revision is not None:
        raise CardError("revision: names a revision of a Hub repository; give repo_id too")
    run = RunFolder.read(run_dir)
    architecture = architecture_of(run.config)
    card = ModelCard.from_template(
        _metadata(run, architecture, repo_id, license),
        template_path=str(TEMPLATE),
        **_body(run, architecture, repo_id, revision),
    )
    return str(card).rstrip("\n") + "\n"


def write_card(
    run_dir: str | Path, repo_id: str | None = None, revision: str | None = None, license: str = "mit"
) -> Path:
    """Write the card of [`render_card`] as README.md into the run folder, all of it or nothing.

    Returns:
        The path of the written file.

    Raises:
        CardError: as `render_card`, or if the folder cannot be written.
    """
    content = render_card(run_dir, repo_id, revision, license)
    target = Path(run_dir) / "README.md"
    try:
        handle, aside = tempfile.mkstemp(dir=target.parent, prefix=".README.md.", suffix=".md")
        try:
            with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
                file.write(content)
            os.chmod(aside, 0o644)
            os.replace(aside, target)
        except BaseException:
            os.unlink(aside)
            raise
    except OSError as error:
        raise CardError(f"{target}: cannot be written: {error.strerror}") from error
    return target


def compare_scores(model: Score, trivial: Score) -> str:
    """How a model's score stands to the trivial predictor's: `better`, `worse`, or `not distinguishable` when their
    intervals share a point."""
    above, below = ("worse", "better") if model.less_is_better else ("better", "worse")
    if model.low > trivial.high:
        return above
    return below if model.high < trivial.low else "not distinguishable"


def _metadata(run: RunFolder, architecture: Architecture, repo_id: str | None, license: str) -> ModelCardData:
    task, data = run.metrics.section("task"), run.recipe.section("task")
    model_type, task_name = run.config.text("model_type"), one_line(task.text("name"))
    hub_task = architecture.hub_task(run.metrics.text("architecture"))
    hub_id = None if data.maybe_text("data_dir") else data.maybe_text("hub_id")
    dataset = hub_id if hub_id and _is_repo_id(hub_id) else None
    model = run.recipe.section("model")
    # A revision stands beside Hub ids only; without one the name may be a folder.
    bases = (model.maybe_text(name) for name in ("pretrained", "reader") if model.maybe_text(f"{name}_revision"))
    base_model = next(bases, None)
    result = EvalResult(
        task_type=hub_task,
        task_name=task_name,
        dataset_type=dataset or task_name,
        dataset_name=task_name,
        dataset_config=data.maybe_text("hub_config") if dataset else None,
        dataset_revision=data.maybe_text("hub_revision") if dataset else None,
        dataset_split="test",
        metric_type=run.metric,
        metric_name=run.metric_title,
        metric_value=float(f"{Score.read(run.metrics.section('test'), run.metric).value:.4g}"),
    )
    tags = [*(["adaptive-computation"] if architecture.halting else []), *architecture.tags]
    return ModelCardData(
        license=license,
        library_name="transformers",
        pipeline_tag=hub_task,
        tags=["adaptive-reasoners", model_type, *tags, task_name],
        datasets=[dataset] if dataset else None,
        base_model=base_model if base_model and _is_repo_id(base_model) else None,
        metrics=[run.metric],
        model_name=repo_id.split("/")[-1] if repo_id else one_line(run.name),
        eval_results=[result],
    )


def _is_repo_id(value: str) -> bool:
    try:
        validate_repo_id(value)
    except HFValidationError:
        return False
    return True


def _body(run: RunFolder, architecture: Architecture, repo_id: str | None, revision: str | None) -> dict[str, Any]:
    """The template's variables: Markdown with all data escaped, or `None` for what is left out."""
    metrics, test = run.metrics, run.metrics.section("test")
    score = Score.read(test, run.metric)
    trivial = _trivial(test, run.metric)
    verdict = compare_scores(score, trivial) if trivial else None
    return {
        "title": text(repo_id.split("/")[-1] if repo_id else run.name),
        "introduction": _introduction(run, architecture),
        "description": architecture.description,
        "sources": _sources(run, architecture),
        "results_table": _results_table(run, score, trivial),
        "verdict": _verdict(score, trivial, verdict) if trivial and verdict else None,
        "results_notes": _results_notes(run, architecture, score),
        "loading_place": _loading_place(run, repo_id, revision),
        "place": "repository" if repo_id else "folder",
        "snippet": _snippet(run, architecture, repo_id, revision),
        "parameters": _parameters(metrics),
        "architecture_table": _architecture_table(run, architecture),
        "steps_rule": architecture.stopping_rule(run.config) if architecture.halting else None,
        "difficulty_table": _difficulty_table(run),
        "further_results": further_results(run),
        "steps_observed": _steps_observed(run) if architecture.halting else None,
        "steps_table": _steps_table(run) if architecture.halting else None,
        "data": _data(run),
        "data_table": _data_table(run),
        "training": _training(run),
        "hyperparameters_table": _hyperparameters_table(metrics),
        "loss_table": _loss_table(metrics),
        "limits": _limits(run, architecture, score, verdict),
        "reports": _reports(run),
        "versions_table": _versions_table(run),
        "citation": _citation(run, architecture),
    }


def _trivial(split: Fields, metric: str) -> Score | None:
    trivial = split.maybe_section("trivial")
    return Score.read(trivial, metric) if trivial else None


def _level(score: Score) -> str:
    return f"{100 * score.confidence:g} %"


def _introduction(run: RunFolder, architecture: Architecture) -> str:
    total = run.metrics.section("parameters").count("total")
    task = run.metrics.section("task").text("name")
    start = "from random weights"
    for field, words in STARTING_POINTS.items():
        source = run.recipe.section("model").maybe_text(field)
        if source:
            if os.path.isabs(source) or source.startswith("./"):
                source = Path(source).name  # the rest of the path tells only about one machine
            start = words.format(code(source))
    if run.config.content.get("reader_config"):
        start += " that stayed as it was" if run.config.content.get("freeze_reader") else " that was trained with it"
    version = run.metrics.section("versions").maybe_text("adaptive_reasoners")
    tool = "`adaptive-reasoners`" + (f" {text(version)}" if version else "")
    return (
        f"{architecture.name[0].upper()}{architecture.name[1:]} with {total:,} parameters, trained {start} on the task "
        f"{code(task)} with {tool}."
    )


def _sources(run: RunFolder, architecture: Architecture) -> str:
    lines = [
        f"- [{source.title}]({source.url}), {source.authors} {source.year} ({source.role})"
        for source in architecture.sources
        if source.applies(run.config)
    ]
    return "\n".join(["Sources:", "", *lines])


def _results_table(run: RunFolder, score: Score, trivial: Score | None) -> str:
    def row(label: str, split: str, entry: Score) -> list[str]:
        return [label, split, entry.show(entry.value), entry.interval, f"{entry.n:,}"]

    rows = [row("**This model**", "test", score)]
    if trivial:
        name = run.metrics.section("test").section("trivial").text("name")
        rows.append(row(f"Trivial predictor: {text(name)}", "test", trivial))
    for baseline in run.metrics.section("test").rows("baselines"):
        name = baseline.text("name")
        if not trivial or name != run.metrics.section("test").section("trivial").text("name"):
            rows.append(row(f"Without a model: {text(name)}", "test", Score.read(baseline, run.metric)))
    validation = run.metrics.maybe_section("validation")
    if validation:
        rows.append(row("This model", "validation", Score.read(validation, run.metric)))
    header = ["", "Split", text(run.metric_title), f"{_level(score)} interval", "Examples"]
    return table(header, rows, numeric=(2, 3, 4))


def _verdict(score: Score, trivial: Score, verdict: str) -> str:
    caution = ""
    if verdict == "not distinguishable":
        caution = " The rule is strict: a small difference can hide from it, above all with few examples."
    return (
        f"On the test split this model is **{verdict} {'from' if caution else 'than'} the trivial predictor** "
        f"({score.show(score.value)} against {trivial.show(trivial.value)}). Rule: two scores count as different only "
        f"if their {_level(score)} intervals share no point.{caution}"
    )


def _results_notes(run: RunFolder, architecture: Architecture, score: Score) -> str:
    test = run.metrics.section("test")
    method = (
        f"{architecture.scoring} Neither training nor the choice of a checkpoint saw the test split. Intervals: "
        f"{text(score.method)}; they cover the choice of test examples, not the variation between training runs. This "
        f"is one run, with seed {run.metrics.count('seed')}."
    )
    notes = []
    unparseable = test.maybe_count("unparseable")
    if unparseable is not None:
        notes.append(
            f"{unparseable:,} of {score.n:,} generated texts held no answer that could be read; they count as wrong."
            if unparseable
            else "Every generated text held an answer that could be read."
        )
    truncated = test.maybe_count("truncated_inputs")
    if truncated:
        notes.append(f"{truncated:,} inputs of the test split were longer than the model reads and were cut.")
    mean_steps, most = test.maybe_number("mean_steps"), test.maybe_count("max_steps")
    if mean_steps is not None:
        bound = f", of at most {most}" if most is not None else ""
        notes.append(f"Mean number of reasoning steps: {mean_steps:.2f}{bound}.")
    return "\n\n".join([method, " ".join(notes)] if notes else [method])


def _local_path(run: RunFolder) -> str:
    """The folder's path from the working directory, or `.` if it does not lie below that."""
    try:
        return run.path.resolve().relative_to(Path.cwd()).as_posix()
    except ValueError:
        return "."


def _loading_place(run: RunFolder, repo_id: str | None, revision: str | None) -> str:
    if repo_id is None:
        if _local_path(run) == ".":
            return "Run this inside the folder that holds this card."
        return "The path is relative to the folder in which training was started."
    if revision is None:
        return (
            "This loads the newest commit. To keep to files that you have seen, put the hash of their commit in the "
            "place of `main`."
        )
    return "The revision pins the files: a later change of the repository does not reach you."


def _snippet(run: RunFolder, architecture: Architecture, repo_id: str | None, revision: str | None) -> str:
    options = f"revision={python_string(revision or 'main')}, " if repo_id else ""
    options += "trust_remote_code=True"
    return snippet(run, architecture, python_string(repo_id or _local_path(run)), options)


def _parameters(metrics: Fields) -> str:
    parameters = metrics.section("parameters")
    total, trainable = parameters.count("total"), parameters.count("trainable")
    trained = "all of them trained" if trainable == total else f"{trainable:,} of them trained"
    return f"Class {code(metrics.text('architecture'))}, {total:,} parameters, {trained}. A shared matrix counts once."


def _architecture_table(run: RunFolder, architecture: Architecture) -> str:
    values = [(label, name, run.config.content.get(name)) for label, name in architecture.shape]
    rows = [[label, _value(value), code(name)] for label, name, value in values if value is not None]
    return table(["Property", "Value", "Field of config.json"], rows)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value) if isinstance(value, float) else code(value)


def _difficulty_table(run: RunFolder) -> str | None:
    levels = run.metrics.section("test").rows("by_difficulty")
    if not levels:
        return None
    scores = [Score.read(level, run.metric) for level in levels]
    steps = [level.maybe_number("mean_steps") for level in levels]
    with_steps = any(mean is not None for mean in steps)
    header = ["Difficulty", "Examples", run.metric_title, f"{_level(scores[0])} interval"]
    rows = []
    for level, score, mean in zip(levels, scores, steps, strict=True):
        name = level.content.get("difficulty")
        row = [text(name), f"{score.n:,}", score.show(score.value), score.interval]
        rows.append([*row, "" if mean is None else f"{mean:.2f}"] if with_steps else row)
    caption = "Test split, by the difficulty that the task gives each example:"
    columns = [text(title) for title in header] + (["Mean steps"] if with_steps else [])
    return f"{caption}\n\n{table(columns, rows, numeric=range(1, 5))}"


def _steps_observed(run: RunFolder) -> str | None:
    test = run.metrics.section("test")
    bound, mean = test.maybe_count("max_steps"), test.maybe_number("mean_steps")
    sentences = []
    configured = run.config.count("max_reasoning_steps")
    if bound is not None and bound != configured:
        sentences.append(f"In the evaluation the upper bound was {bound} steps.")
    used = {steps for steps, _ in run.steps}
    if len(used) == 1:
        sentences.append(
            f"**Every test example took the same number of steps, {min(used)}: in this run the depth did not adapt to "
            "the input.**"
        )
    elif mean is not None and bound is not None and mean >= bound:
        sentences.append("**Every test example took all the steps it was allowed: nothing halted early in this run.**")
    return " ".join(sentences) or None


def _steps_table(run: RunFolder) -> str | None:
    counts = Counter(steps for steps, _ in run.steps)
    if len(counts) < 2:
        return None
    right = Counter(steps for steps, correct in run.steps if correct)
    rows = [
        [str(steps), f"{count:,}", f"{100 * count / len(run.steps):.1f} %", f"{right[steps] / count:.3f}"]
        for steps, count in sorted(counts.items())
    ]
    header = ["Steps taken", "Test examples", "Share", "Answered correctly"]
    return f"How many test examples took how many steps:\n\n{table(header, rows, numeric=range(4))}"


def _data(run: RunFolder) -> str:
    task, train = run.metrics.section("task"), run.metrics.section("train")
    counts = [f"{train.count('examples'):,} training examples"]
    for split in ("validation", "test"):
        fields = run.metrics.maybe_section(split)
        if fields:
            counts.append(f"{fields.count('n'):,} {split} examples")
    sentences = [
        f"Task {code(task.text('name'))}. Source: {text(task.text('source').rstrip('. '))}.",
        f"Licence of the data, as its source states it: {text(task.text('license').rstrip('. '))}.",
        f"{', '.join(counts[:-1])} and {counts[-1]}." if len(counts) > 1 else f"{counts[0]}.",
    ]
    truncated = train.maybe_count("truncated_inputs")
    if truncated:
        sentences.append(f"{truncated:,} training inputs were cut to the longest length the recipe allows.")
    return " ".join(sentences)


def _data_table(run: RunFolder) -> str | None:
    """The recipe's choices about the data; where it lay on one machine is of no use to others."""
    task = run.recipe.section("task")
    values = {name: value for name, value in task.content.items() if name not in ("name", "data_dir", "options")}
    options = task.maybe_section("options")
    values |= {f"options.{name}": value for name, value in (options.content.items() if options else ())}
    rows = [[code(name), code(value)] for name, value in values.items() if value is not None]
    return table(["Field of the recipe's task section", "Value"], rows) if rows else None


def _training(run: RunFolder) -> str:
    train = run.metrics.section("train")
    epochs = train.maybe_number("epochs")
    passes = f" ({epochs:g} epochs)" if epochs is not None else ""
    sentences = [
        f"{train.count('steps'):,} update steps{passes} in {duration(train.number('seconds'))} on "
        f"{text(train.text('hardware'))}, in {text(train.text('precision'))}.",
    ]
    best = train.maybe_count("best_step")
    if best is not None:
        sentences.append(f"The weights are those of step {best:,}, which did best on the validation split.")
    final, parts = train.content.get("final_loss"), train.maybe_section("loss_parts")
    if final is not None:
        listed = (
            [f"{text(name.replace('_', ' '))} {_loss(value)}" for name, value in parts.content.items()] if parts else []
        )
        shown = f" (parts, unweighted: {', '.join(listed)})" if len(listed) > 1 else ""
        sentences.append(f"Last training loss: {_loss(final)}{shown}.")
    return " ".join(sentences)


def _hyperparameters_table(metrics: Fields) -> str | None:
    values = metrics.section("train").maybe_section("hyperparameters")
    if not values or not values.content:
        return None
    return table(["Setting", "Value"], [[code(name), code(value)] for name, value in values.content.items()])


def _loss_table(metrics: Fields) -> str | None:
    """Losses by step, thinned; training and evaluation entries of one step share a row."""
    merged: dict[int, dict[str, Any]] = {}
    for entry in metrics.rows("loss_history"):
        values = {str(name): value for name, value in entry.content.items() if name != "step"}
        merged.setdefault(entry.count("step"), {}).update(values)
    columns = list(dict.fromkeys(name for values in merged.values() for name in values))
    if not columns:
        return None
    steps = sorted(merged)
    evaluated = [step for step in steps if any(name.startswith("eval_") for name in merged[step])]
    if evaluated:
        steps = sorted({steps[0], *evaluated, steps[-1]})
    rows = [[f"{step:,}", *(_loss(merged[step].get(name)) for name in columns)] for step in thin(steps, MOST_LOSS_ROWS)]
    header = ["Step", *(text(name.replace("eval_", "validation ").replace("_", " ").capitalize()) for name in columns)]
    note = "Loss by update step" + (" (some of the logged steps):" if len(rows) < len(merged) else ":")
    return f"{note}\n\n{table(header, rows, numeric=range(len(header)))}"


def _loss(value: Any) -> str:
    """A loss, which may be infinite or not a number after a run that diverged."""
    return f"{value:.4g}" if isinstance(value, (int, float)) else "" if value is None else text(value)


def _limits(run: RunFolder, architecture: Architecture, score: Score, verdict: str | None) -> str:
    task, train = run.metrics.section("task"), run.metrics.section("train")
    half_width = (score.high - score.low) / 2
    reach = f"{half_width:.2g}" if score.less_is_better else f"{100 * half_width:.1f} percentage points"
    points = [
        f"Intended for studying this architecture on {code(task.text('name'))} and for comparison with other runs. Not "
        "intended for decisions about people, or where a wrong answer does harm.",
    ]
    if verdict in ("worse", "not distinguishable"):
        points.append(
            "Nothing here shows that its answers are better than those of the trivial predictor. Do not rely on them."
        )
    if not any(run.recipe.section("model").maybe_text(field) for field in STARTING_POINTS):
        points.append(
            f"It has seen nothing but the {train.count('examples'):,} training examples of this one task. On any other "
            "input its output means nothing."
        )
    points += [
        f"The test split has {score.n:,} examples, so its score is known to about ±{reach} "
        f"({_level(score)} interval). "
        "One training run was made; how much another seed would change the score is not known.",
        *architecture.limits,
    ]
    return "\n".join(f"- {point}" for point in points)


def _reports(run: RunFolder) -> str | None:
    if not run.reports:
        return None
    shown = run.reports[:MOST_LISTED_REPORTS]
    lines = [f"- [{text(path)}]({quote(path)})" for path in shown]
    if len(run.reports) > len(shown):
        lines.append(f"- and {len(run.reports) - len(shown)} more files in the same folders")
    return "\n".join(lines)


def _versions_table(run: RunFolder) -> str:
    rows = [
        [text(name.replace("_", "-")), code(value)] for name, value in run.metrics.section("versions").content.items()
    ]
    provenance = run.recipe.maybe_section("provenance")
    for label, name in (("source revision", "git_revision"), ("recipe", "recipe"), ("command", "command")):
        value = provenance.maybe_text(name) if provenance else None
        if value is not None:
            rows.append([label, code(value)])
    rows.append(["seed", str(run.metrics.count("seed"))])
    return table(["", "Value"], rows)


def _citation(run: RunFolder, architecture: Architecture) -> str:
    entries = [source.bibtex for source in architecture.sources if source.applies(run.config)]
    version = run.metrics.section("versions").maybe_text("adaptive_reasoners") or ""
    number = f",\n  version = {{{version}}}" if re.fullmatch(r"[\w.+-]+", version) else ""
    entries.append(
        "@software{adaptive_reasoners,\n  title   = {adaptive-reasoners: models that think in steps},\n"
        f"  author  = {{{{The adaptive-reasoners authors}}}}{number}\n}}"
    )
    return "```bibtex\n" + "\n\n".join(entries) + "\n```"


def main(argv: Sequence[str] | None = None) -> int:
    """Redraw a run's README.md. Returns the exit code: 0, or 2 for a mistake the user can mend."""
    parser = argparse.ArgumentParser(prog="python -m model_cards.card", description="Redraw the model card of a run.")
    parser.add_argument("run_dir", help="output folder of a finished run")
    parser.add_argument("--repo_id", help="draw the card for this Hub repository (user/name)")
    parser.add_argument("--revision", help="commit, tag or branch of the repository that the loading example pins")
    parser.add_argument("--license", default="mit", help="licence of the published model (default: %(default)s)")
    arguments = parser.parse_args(argv)
    try:
        print(write_card(arguments.run_dir, arguments.repo_id, arguments.revision, arguments.license))
    except CardError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
