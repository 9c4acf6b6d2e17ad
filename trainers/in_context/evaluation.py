"""What an in-context model can do: scores by number of examples or path length, beside predictors without a model."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch
from transformers import PreTrainedModel

from ..statistics import mean, proportion
from ..tasks.in_context import BASELINES, FunctionClass, Prompts, TableConnectivity, make_prompts
from ..tasks.in_context.table_connectivity import UNREACHABLE, Questions, at_most, majority, within_hops

LONGEST_RULE = 5


def in_batches(size: int, batch_size: int) -> list[range]:
    """The numbers below `size`, in order, in ranges of at most `batch_size`."""
    return [range(start, min(start + batch_size, size)) for start in range(0, size, batch_size)]


# Function classes


@torch.no_grad()
def predict_values(model: PreTrainedModel, prompts: Prompts) -> torch.Tensor:
    """The model's prediction at every place, of the shape of `prompts.targets`.

    Where queries differ from the points, the model reads one prompt for every place: the pairs before it, then the
    query.
    """
    device = next(model.parameters()).device
    points, values = prompts.points.to(device), prompts.values.to(device)
    if prompts.queries is None:
        logits = model(input_values=points, context_values=values).logits
    else:
        queries = prompts.queries.to(device)
        logits = torch.cat(
            [
                model(
                    input_values=torch.cat((points[:, :place], queries[:, place, None]), dim=1),
                    context_values=values[:, :place],
                ).logits[:, -1:]
                for place in range(points.shape[1])
            ],
            dim=1,
        )
    return logits.float().cpu().view_as(prompts.targets)


def scores_by_place(task: FunctionClass, predictions: torch.Tensor, targets: torch.Tensor) -> np.ndarray:
    """Of every prediction its squared error, averaged over outputs, or for signs whether it is right: `(B, n)`."""
    if task.metric == "accuracy":
        return ((predictions > 0) == (targets > 0)).double().numpy()
    errors = (predictions.double() - targets.double()).square()
    return errors.reshape(*errors.shape[:2], -1).mean(dim=2).numpy()


def score(task: FunctionClass, scores: np.ndarray, confidence: float) -> dict[str, Any]:
    """The mean of `(B,)` scores with its interval: a share of right signs, or an error."""
    if task.metric == "accuracy":
        return proportion(int(scores.sum()), len(scores), confidence)
    return mean(scores, confidence)


def evaluate_prompts(
    model: PreTrainedModel,
    task: FunctionClass,
    split: str,
    size: int,
    kind: str = "standard",
    baselines: Sequence[str] = (),
    slow_size: int = 0,
    batch_size: int = 256,
    confidence: float = 0.95,
) -> tuple[dict[str, Any], torch.Tensor, torch.Tensor]:
    """Scores at every place of the prompts of one kind, of the model and of predictors without one.

    Args:
        size: prompts that are scored.
        kind: a key of [`trainers.tasks.in_context.CHANGES`].
        baselines: keys of [`trainers.tasks.in_context.BASELINES`].
        slow_size: prompts that slow predictors are scored on; those with 0 are left out.

    Returns:
        `{"in_context_examples": [0, 1, ...], "model": [score of each place], "baselines": {name: [...]}}`, and the
        model's predictions and their targets, `(size, n)` or `(size, n, outputs)`.
    """
    names = [name for name in baselines if not BASELINES[name].is_slow or slow_size > 0]
    found: dict[str, list[np.ndarray]] = {"model": [], **{name: [] for name in names}}
    predictions, targets = [], []
    model.eval()
    for rows in in_batches(size, batch_size):
        prompts = make_prompts(task, split, rows, kind)
        predictions.append(predict_values(model, prompts))
        targets.append(prompts.targets)
        found["model"].append(scores_by_place(task, predictions[-1], prompts.targets))
        for name in names:
            kept = min(max(0, slow_size - rows.start), len(rows)) if BASELINES[name].is_slow else len(rows)
            if kept == 0:
                continue
            queries = None if prompts.queries is None else prompts.queries[:kept]
            guesses = BASELINES[name].predict(prompts.points[:kept], prompts.values[:kept], queries)
            found[name].append(scores_by_place(task, guesses, prompts.targets[:kept]))
    by_place = {
        name: [score(task, column, confidence) for column in np.concatenate(parts).T] for name, parts in found.items()
    }
    curve = {
        "in_context_examples": list(range(len(by_place["model"]))),
        "model": by_place.pop("model"),
        "baselines": by_place,
    }
    return curve, torch.cat(predictions), torch.cat(targets)


def summarise_curve(task: FunctionClass, curve: dict[str, Any]) -> dict[str, Any]:
    """The section of a split in `metrics.json`: the score at the longest prompt, and the whole curve."""

    def last(scores: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {task.metric: scores[-1]}

    trivial = "always 0" if task.metric == "error" else "always -1"
    zero = curve["baselines"].get("always 0")
    return {
        "n": curve["model"][-1]["n"],
        task.metric: curve["model"][-1],
        "trivial": None if zero is None else {"name": trivial, **last(zero)},
        "baselines": [{"name": name, **last(scores)} for name, scores in curve["baselines"].items()],
        "by_position": curve,
        "by_difficulty": None,
        "mean_steps": None,
    }


# Table connectivity


@torch.no_grad()
def answer_questions(
    model: PreTrainedModel, task: TableConnectivity, split: str, size: int, batch_size: int = 256
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The model's log odds for the first questions of a split, `(size,)`, and the batches' other columns."""
    model.eval()
    device = next(model.parameters()).device
    logits, columns = [], []
    for rows in in_batches(size, batch_size):
        batch = task.batch(split, rows)
        inputs = {name: batch[name].to(device) for name in ("input_values", "attention_mask") if name in batch}
        logits.append(model(**inputs).logits.squeeze(-1).float().cpu().numpy())
        columns.append({name: batch[name].numpy() for name in ("labels", "path_length")})
    return np.concatenate(logits), {name: np.concatenate([part[name] for part in columns]) for name in columns[0]}


def _at_most(length: int) -> Callable[[Questions], torch.Tensor]:
    return lambda questions: at_most(questions, length)


RULES: dict[str, Callable[[Questions], torch.Tensor]] = {
    "the tables asked for share a column (1 hop)": lambda questions: within_hops(questions, 1),
    "they are at most 2 hops apart": lambda questions: within_hops(questions, 2),
    "they are at most 3 hops apart": lambda questions: within_hops(questions, 3),
    **{f"path length at most {length}": _at_most(length) for length in range(LONGEST_RULE + 1)},
}
"""What can be told by looking so many steps far; each looks at the graph itself."""


def rule_scores(
    task: TableConnectivity, split: str, size: int, confidence: float, batch_size: int = 1024
) -> list[dict[str, Any]]:
    """The accuracy of every rule on the first questions of a split. Prompts of several sizes have no rules."""
    if task.options.min_tables not in (None, task.options.num_tables):
        return []
    right = dict.fromkeys(RULES, 0)
    for rows in in_batches(size, batch_size):
        questions = task.questions(split, rows)
        for name, rule in RULES.items():
            right[name] += int((rule(questions) == questions.connected).sum())
    return [{"name": name, "accuracy": proportion(count, size, confidence)} for name, count in right.items()]


def evaluate_questions(
    model: PreTrainedModel,
    task: TableConnectivity,
    split: str,
    size: int,
    train_labels: torch.Tensor,
    batch_size: int = 256,
    confidence: float = 0.95,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The section of a split in `metrics.json`, and one record for each question.

    Args:
        train_labels: labels of training prompts, which the constant answer is chosen by.
    """
    logits, columns = answer_questions(model, task, split, size, batch_size)
    connected, path_length = columns["labels"] > 0, columns["path_length"]
    right = (logits > 0) == connected

    def accuracy(rows: np.ndarray) -> dict[str, Any]:
        return proportion(int(right[rows].sum()), int(rows.sum()), confidence)

    levels = [(str(length), path_length == length) for length in sorted(set(path_length[connected].tolist()))]
    levels += [("no path", ~connected)] if not connected.all() else []
    constant = majority(train_labels)
    words = {1: "connected", -1: "not connected"}
    section = {
        "n": size,
        "accuracy": accuracy(np.ones(size, dtype=bool)),
        "trivial": {
            "name": f'always "{words[constant]}" (most frequent label of training prompts)',
            "accuracy": proportion(int((connected == (constant > 0)).sum()), size, confidence),
        },
        "baselines": rule_scores(task, split, size, confidence),
        "by_difficulty": [
            {"difficulty": name, "n": int(rows.sum()), "accuracy": accuracy(rows), "mean_steps": None}
            for name, rows in levels
        ],
        "mean_steps": None,
    }
    records = [
        {
            "id": f"{split}-{index}",
            "target": words[1 if is_connected else -1],
            "prediction": words[1 if logit > 0 else -1],
            "parsed": words[1 if logit > 0 else -1],
            "correct": bool(is_right),
            "log_odds": round(float(logit), 4),
            "steps": None,
            "difficulty": str(int(length)) if is_connected else "no path",
        }
        for index, (logit, is_connected, is_right, length) in enumerate(
            zip(logits, connected, right, path_length, strict=True)
        )
    ]
    return section, records


@torch.no_grad()
def follow_paths(
    model: PreTrainedModel,
    task: TableConnectivity,
    split: str,
    size: int,
    batch_size: int = 256,
    confidence: float = 0.95,
) -> dict[str, Any]:
    """Let the model walk from the first column to the second, table by table, on the connected questions of a split.

    In every step it reads the whole prompt again, with the table reached last in the place of the first column, and
    goes to the table whose number is largest. A walk ends at a table that holds the second column, where it has
    arrived, or at one that is no neighbour of the last, or after V steps.

    Returns:
        Shares of walks that arrive and of those that are as short as can be, over all questions with a path of at
        least one table and for each length of the shortest.
    """
    model.eval()
    device, block_logits = next(model.parameters()).device, cast(Any, model).block_logits
    found: list[tuple[int, bool, bool]] = []
    for indices in in_batches(size, batch_size):
        questions = task.questions(split, indices)
        ids = task.token_ids(questions, task.streams(split, indices, "names of tables"))
        kept = questions.path_length > 0
        questions, ids = Questions(*(part[kept] for part in questions)), ids[kept]
        rows = torch.arange(len(ids))
        table = torch.full((len(ids),), UNREACHABLE)
        holds_goal = (questions.columns == questions.query[:, 1:, None]).any(dim=2)
        arrived, lost, taken = (torch.zeros(len(ids), dtype=kind) for kind in (torch.bool, torch.bool, torch.long))
        for _ in range(task.options.num_tables):
            walks = ~arrived & ~lost
            if not walks.any():
                break
            outputs = model(input_values=task.names[ids].to(device), outputs="keys")
            choice = block_logits(outputs.token_logits, "keys").argmax(dim=1).cpu()
            lost |= walks & ~task.next_tables(questions, table)[rows, choice]
            walks &= ~lost
            taken += walks.long()
            arrived |= walks & holds_goal[rows, choice]
            table = torch.where(walks, choice, table)
            ids[walks, -2] = ids[rows, choice * (task.options.num_columns + 1)][walks]
        shortest = arrived & (taken == questions.path_length)
        found += zip(questions.path_length.tolist(), arrived.tolist(), shortest.tolist(), strict=True)

    def shares(walks: Sequence[tuple[int, bool, bool]]) -> dict[str, Any]:
        return {
            "n": len(walks),
            "arrives": proportion(sum(arrives for _, arrives, _ in walks), len(walks), confidence),
            "shortest": proportion(sum(is_shortest for _, _, is_shortest in walks), len(walks), confidence),
        }

    lengths = sorted({length for length, _, _ in found})
    by_length = [{"length": length, **shares([walk for walk in found if walk[0] == length])} for length in lengths]
    return {**(shares(found) if found else {"n": 0}), "by_length": by_length}
