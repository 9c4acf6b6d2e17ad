"""Tables of a card for what some tasks measure besides one score: by examples in the prompt, other prompts, sizes."""

from collections.abc import Sequence

from .markdown import code, table, text
from .run_folder import Fields, RunFolder, Score
from .words import thin

MOST_PLACES = 8
MOST_BASELINES = 4


def further_results(run: RunFolder) -> str | None:
    """Markdown of the tables that the run has numbers for, or `None`."""
    test = run.metrics.section("test")
    blocks = []
    curve = test.maybe_section("by_position")
    if curve:
        blocks.append(_curve_table(curve, run.metric, run.metric_title))
    prompts = test.maybe_section("prompts")
    if prompts and prompts.content:
        blocks.append(_prompts_table(prompts, run.metric, run.metric_title))
    sizes = test.rows("by_tables")
    if sizes:
        blocks.append(_sizes_table(sizes, run))
    ticks = test.maybe_section("at_tick")
    if ticks:
        blocks.append(_ticks_table(ticks, test, run.metric))
    stopping = test.maybe_section("stopping")
    if stopping:
        blocks.append(_stopping_table(stopping, run.metric))
    return "\n\n".join(blocks) or None


def _scores(curve: Fields, name: str, metric: str) -> list[Score]:
    rule = "must be a list of scores"
    return [Score.parse(score, metric, curve.error(name, rule)) for score in curve.rows(name)]


def _baselines(curve: Fields, metric: str) -> dict[str, list[Score]]:
    """The first few predictors without a model that look at the prompt."""
    fields = curve.section("baselines")
    names = [name for name in fields.content if not name.startswith("always")][:MOST_BASELINES]
    return {name: _scores(fields, name, metric) for name in names}


def _curve_table(curve: Fields, metric: str, title: str) -> str:
    model, baselines = _scores(curve, "model", metric), _baselines(curve, metric)
    places = thin(range(len(model)), MOST_PLACES)
    rows = [
        [
            str(place),
            model[place].show(model[place].value),
            model[place].interval,
            *(scores[place].show(scores[place].value) for scores in baselines.values()),
        ]
        for place in places
    ]
    header = ["Examples in the prompt", "Model", f"{100 * model[0].confidence:g} % interval", *map(text, baselines)]
    note = f"{text(title)} on the test split, by the number of examples that the prompt holds"
    return f"{note}{_some(places, model)}:\n\n{table(header, rows, numeric=range(len(header)))}"


def _prompts_table(prompts: Fields, metric: str, title: str) -> str:
    rows: list[list[str]] = []
    names: list[str] = []
    for kind in prompts.content:
        curve = prompts.section(kind)
        model, baselines = _scores(curve, "model", metric), _baselines(curve, metric)
        names = names or list(baselines)
        found = [baselines[name][-1] if name in baselines else None for name in names]
        rows.append(
            [
                code(kind),
                str(len(model) - 1),
                model[-1].show(model[-1].value),
                model[-1].interval,
                *("" if score is None else score.show(score.value) for score in found),
            ]
        )
    header = ["Prompts", "Examples", "Model", "Interval", *map(text, names)]
    note = f"{text(title)} at the end of prompts that differ from those of training:"
    return f"{note}\n\n{table(header, rows, numeric=range(1, len(header)))}"


def _sizes_table(sizes: Sequence[Fields], run: RunFolder) -> str:
    trained = run.recipe.section("task").section("options").maybe_count("num_tables")
    rules = [baseline.text("name") for baseline in sizes[0].rows("baselines")][:MOST_BASELINES]
    rows = []
    for size in sizes:
        score = Score.read(size, run.metric)
        found = {baseline.text("name"): Score.read(baseline, run.metric).value for baseline in size.rows("baselines")}
        rows.append(
            [
                f"{size.count('num_tables'):,}",
                f"{size.number('rho'):g}",
                f"{score.n:,}",
                score.show(score.value),
                score.interval,
                *(score.show(found[name]) if name in found else "" for name in rules),
            ]
        )
    header = ["Tables", "rho", "Questions", run.metric_title, "Interval", *(f"Rule: {text(name)}" for name in rules)]
    at = f"; it was trained at {trained}" if trained else ""
    note = f"The model at other numbers of tables, without further training{at}:"
    return f"{note}\n\n{table(header, rows, numeric=range(len(header)))}"


def _ticks_table(ticks: Fields, test: Fields, metric: str) -> str:
    kinds = {"most_certain": "its most certain tick", "last": "the last tick", "best": "any tick, chosen by the labels"}
    rows = []
    for name, words in kinds.items():
        score = Score.parse(ticks.section(name), metric, ticks.error(name, "must be a score"))
        rows.append([words, score.show(score.value), score.interval])
    error = test.section("calibration").section("answer_tick").number("ece")
    note = (
        f"Test split, every example at one tick. Expected calibration error of the answers: {error:.3f}; share of "
        f"positions right: {test.number('position_accuracy'):.4f}; mean tick of the answer: "
        f"{test.number('mean_answer_tick'):.1f} of {test.count('max_steps')}."
    )
    return f"{note}\n\n{table(['Read at', metric.capitalize(), 'Interval'], rows, numeric=(1, 2))}"


def _stopping_table(stopping: Fields, metric: str) -> str:
    rows = []
    for entry in stopping.rows("curve"):
        score, threshold = Score.read(entry, metric), entry.maybe_number("threshold")
        rows.append(
            [
                "none" if threshold is None else f"{threshold:g}",
                score.show(score.value),
                score.interval,
                f"{entry.number('mean_steps'):.2f}",
                f"{entry.number('seconds'):.2f}",
            ]
        )
    note = (
        f"Thinking that stops at a certainty, on {stopping.count('n'):,} test examples in batches of "
        f"{stopping.count('batch_size')}:"
    )
    header = ["Certainty", metric.capitalize(), "Interval", "Mean ticks", "Seconds"]
    return f"{note}\n\n{table(header, rows, numeric=range(len(header)))}"


def _some(shown: Sequence[int], all_of_them: Sequence[Score]) -> str:
    return " (some of them)" if len(shown) < len(all_of_them) else ""
