"""What models that think in ticks are measured by: answers at every tick, certainty, calibration, early stopping."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from ..run_trainer import IGNORED_LABEL
from ..statistics import proportion
from ..tasks.thought import ThoughtExamples, ThoughtTask

NOTHING = 0
CALIBRATION_BINS = 15


class Thoughts(NamedTuple):
    """
    What a model thought of n examples, over T ticks, with answers of P positions.

    Args:
        answers, last_answers (`(n, P)`, int): Classes at the answer's tick and at the last; -1 behind a spelt answer's
            end.
        confidences, last_confidences (`(n, P)`, float): Probability of each of those classes. For a spelt answer, in
            the first position, that of the whole spelling.
        right (`(n, T)`, bool): Whether the whole answer is right after each tick.
        share (`(n, T)`, float): Share of the labelled positions that are right after each tick.
        certainties (`(n, T)`, float): Certainty after each tick, in [0, 1].
        ticks (`(n,)`, int): Ticks used.
        answer_ticks (`(n,)`, int): Tick of the answer, counted from 1.
        losses (`(n,)`, float): The loss, summed over an example's labels, in nats.
        num_labels (`(n,)`, int): Number of labels.
    """

    answers: np.ndarray
    last_answers: np.ndarray
    confidences: np.ndarray
    last_confidences: np.ndarray
    right: np.ndarray
    share: np.ndarray
    certainties: np.ndarray
    ticks: np.ndarray
    answer_ticks: np.ndarray
    losses: np.ndarray
    num_labels: np.ndarray


def think_in_ticks(outputs: Any, labels: torch.Tensor, losses_by_tick: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """
    The fields of [`Thoughts`] for a batch whose ticks each give a whole answer.

    Args:
        outputs: of a head of the Continuous Thought Machine.
        labels (`torch.LongTensor` of shape `(batch_size,)` or `(batch_size, P)`): Classes, -100 where there is none.
        losses_by_tick (`torch.FloatTensor` of shape `(T, batch_size)`): In nats per label.
    """
    batch_size, _, num_ticks = outputs.predictions.shape
    labels = labels.reshape(batch_size, -1)
    rows = torch.arange(batch_size, device=labels.device)
    logits = outputs.predictions.transpose(1, 2).unflatten(-1, (labels.shape[1], -1)).float()
    confidences, classes = logits.softmax(dim=-1).max(dim=-1)
    is_labelled = (labels != IGNORED_LABEL).unsqueeze(1)
    hits = (classes == labels.unsqueeze(1)) & is_labelled
    num_labels = is_labelled.sum(dim=-1)
    answer, last = outputs.certain_tick, torch.full_like(outputs.certain_tick, num_ticks - 1)
    losses = (losses_by_tick[losses_by_tick.argmin(dim=0), rows] + losses_by_tick[answer, rows]) / 2
    return (
        classes[rows, answer],
        classes[rows, last],
        confidences[rows, answer],
        confidences[rows, last],
        hits.sum(dim=-1) == num_labels,
        hits.sum(dim=-1) / num_labels.clamp_min(1),
        outputs.certainties[:, 1],
        outputs.ticks,
        answer + 1,
        losses * num_labels.squeeze(1),
        num_labels.squeeze(1),
    )


def spell(classes: np.ndarray) -> list[int]:
    """The answer that a class per tick spells: repetitions count once, and then class 0 falls out (Graves et al. 2006,
    section 3.1)."""
    return [
        int(here)
        for here, before in zip(classes, [NOTHING, *classes[:-1]], strict=True)
        if here not in (before, NOTHING)
    ]


def ctc_losses(predictions: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """
    Negative log probability of each example's labels under connectionist temporal classification (Graves et al. 2006),
    with class 0 for nothing.

    Args:
        predictions (`torch.FloatTensor` of shape `(batch_size, classes, T)`): Logits.
        labels (`torch.LongTensor` of shape `(batch_size, P)`): Classes without 0, -100 behind the end of an answer.

    Returns:
        `torch.FloatTensor` of shape `(batch_size,)`, in nats.
    """
    batch_size, _, num_ticks = predictions.shape
    return nn.functional.ctc_loss(
        predictions.permute(2, 0, 1).float().log_softmax(dim=-1),
        labels,
        torch.full((batch_size,), num_ticks),
        (labels != IGNORED_LABEL).sum(dim=1),
        blank=NOTHING,
        reduction="none",
        zero_infinity=True,
    )


def think_by_spelling(outputs: Any, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """
    The fields of [`Thoughts`] for a batch whose ticks together spell an answer. What counts after a tick is the
    spelling up to it; the answer's tick is the last.

    Args: as for [`think_in_ticks`].
    """
    batch_size, _, num_ticks = outputs.predictions.shape
    confidences, classes = outputs.predictions.float().softmax(dim=1).max(dim=1)
    answers = torch.full_like(labels, -1)
    right = torch.zeros(batch_size, num_ticks, dtype=torch.bool, device=labels.device)
    share = torch.zeros(batch_size, num_ticks, device=labels.device)
    for row, (path, target) in enumerate(zip(classes.tolist(), labels.tolist(), strict=True)):
        for tick in range(num_ticks):
            spelt = spell(path[: tick + 1])
            right[row, tick] = spelt == target
            same = [a == b for a, b in zip(spelt, target, strict=False)]
            share[row, tick] = (same.index(False) if False in same else len(same)) / len(target)
        answers[row, : len(spelt)] = torch.tensor(spelt[: len(target)])
    whole = torch.ones(labels.shape, device=labels.device)
    whole[:, 0] = confidences.log().sum(dim=1).exp()
    last = torch.full_like(outputs.ticks, num_ticks)
    return (
        answers,
        answers,
        whole,
        whole,
        right,
        share,
        outputs.certainties[:, 1],
        outputs.ticks,
        last,
        ctc_losses(outputs.predictions, labels),
        torch.full_like(last, labels.shape[1]),
    )


def calibration(confidences: np.ndarray, right: np.ndarray) -> dict[str, Any]:
    """
    Expected calibration error: the mean distance between confidence and share of right answers over equal bins of
    confidence, weighted by their sizes (Guo et al., arXiv 1706.04599, equation 3).

    Args:
        confidences (`np.ndarray` of shape `(n,)`): Probabilities of the answers, in [0, 1].
        right (`np.ndarray` of shape `(n,)`): Whether they are right.

    Returns:
        `{"ece": …, "bins": [{"from", "to", "n", "confidence", "accuracy"}, …]}`; empty bins are left out.
    """
    edges = np.linspace(0, 1, CALIBRATION_BINS + 1)
    numbers = np.clip(np.ceil(confidences * CALIBRATION_BINS).astype(int) - 1, 0, CALIBRATION_BINS - 1)
    bins, error = [], 0.0
    for number in np.unique(numbers):
        chosen = numbers == number
        confidence, accuracy = float(confidences[chosen].mean()), float(right[chosen].mean())
        error += chosen.mean() * abs(confidence - accuracy)
        bins.append(
            {
                "from": float(edges[number]),
                "to": float(edges[number + 1]),
                "n": int(chosen.sum()),
                "confidence": confidence,
                "accuracy": accuracy,
            }
        )
    return {"ece": float(error), "bins": bins}


def confidences_and_hits(
    thoughts: Thoughts, labels: np.ndarray, spelt: bool, last: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """
    What calibration compares.

    Args:
        thoughts: of n examples.
        labels (`np.ndarray` of shape `(n, P)`): Classes, -100 where there is none.
        spelt: whether the ticks together spell one answer.
        last: look at the last tick instead of the answer's.

    Returns:
        Probabilities given to the answers, and whether these are right, both of shape `(m,)`: for every labelled
        position, or for every spelt answer.
    """
    confidences = thoughts.last_confidences if last else thoughts.confidences
    if spelt:
        return confidences[:, 0], thoughts.right[:, -1]
    is_labelled = labels != IGNORED_LABEL
    answers = thoughts.last_answers if last else thoughts.answers
    return confidences[is_labelled], (answers == labels)[is_labelled]


def make_records(task: ThoughtTask, examples: ThoughtExamples, thoughts: Thoughts) -> list[dict[str, Any]]:
    """One record per example, as `predictions.jsonl` holds them."""
    records = []
    for index in range(len(examples)):
        labels = np.atleast_1d(examples.labels(index))
        answer = thoughts.answers[index]
        prediction = task.reading(answer[answer >= 0], labels[answer >= 0])
        correct = bool(thoughts.right[index, thoughts.answer_ticks[index] - 1])
        records.append(
            {
                "id": examples.identity(index),
                "target": task.reading(labels, labels),
                "prediction": prediction,
                "parsed": prediction,
                "correct": correct,
                "steps": int(thoughts.ticks[index]),
                "answer_tick": int(thoughts.answer_ticks[index]),
                "difficulty": examples.difficulty(index),
                **task.extra_scores(answer, labels),
            }
        )
    return records


def summarise_thoughts(
    task: ThoughtTask,
    examples: ThoughtExamples,
    thoughts: Thoughts,
    records: Sequence[dict[str, Any]],
    trivial: tuple[str, np.ndarray],
    confidence: float,
) -> dict[str, Any]:
    """
    The numbers of one split.

    Args:
        task, examples: what was asked.
        thoughts: what the model made of it, in the order of the examples.
        records: as `make_records` returns them.
        trivial: the trivial predictor's rule and answer.
        confidence: level of the intervals, in (0, 1).

    Returns:
        Section of `metrics.json`. `accuracy` is the share of examples with every position right at the answer's tick,
        `at_tick` the same at the most certain, at the last and at the best tick (which only the labels tell);
        `per_tick` has a value for every tick.
    """

    def share(successes: Any) -> dict[str, Any]:
        return proportion(int(np.sum(successes)), len(successes), confidence)

    n, num_ticks = thoughts.right.shape
    labels = np.stack([np.atleast_1d(examples.labels(index)) for index in range(n)])
    is_labelled = labels != IGNORED_LABEL
    rows = np.arange(n)
    groups: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        if record["difficulty"] is not None:
            groups[record["difficulty"]].append(record)
    name, answer = trivial
    trivially_right = ((labels == answer) | ~is_labelled).all(axis=1)
    spelt = task.loss == "ctc"
    extra = {key: share([record[key] for record in records]) for key in task.extra_scores(answer, labels[0])}
    return {
        "n": n,
        "accuracy": share([record["correct"] for record in records]),
        "position_accuracy": float(thoughts.share[rows, thoughts.answer_ticks - 1].mean()),
        **extra,
        "mean_steps": float(thoughts.ticks.mean()),
        "max_steps": num_ticks,
        "mean_answer_tick": float(thoughts.answer_ticks.mean()),
        "trivial": {"name": name, "accuracy": share(trivially_right)},
        "by_difficulty": [
            {
                "difficulty": level,
                "n": len(group),
                "accuracy": share([record["correct"] for record in group]),
                "mean_steps": float(np.mean([record["steps"] for record in group])),
                "mean_answer_tick": float(np.mean([record["answer_tick"] for record in group])),
            }
            for level, group in sorted(groups.items())
        ]
        or None,
        "at_tick": {
            "most_certain": share(thoughts.right[rows, thoughts.certainties.argmax(axis=1)]),
            "last": share(thoughts.right[:, -1]),
            "best": share(thoughts.right.any(axis=1)),
        },
        "per_tick": {
            "accuracy": thoughts.right.mean(axis=0).tolist(),
            "position_accuracy": thoughts.share.mean(axis=0).tolist(),
            "certainty": thoughts.certainties.mean(axis=0).tolist(),
        },
        "calibration": {
            "answer_tick": calibration(*confidences_and_hits(thoughts, labels, spelt)),
            "last_tick": calibration(*confidences_and_hits(thoughts, labels, spelt, last=True)),
        },
    }


def stop_at(thoughts: Thoughts, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """
    What stopping at a certainty would have done to examples that thought for all ticks.

    Returns:
        Ticks used, `(n,)`, and whether the answer is right, `(n,)`: an example stops after its first tick with at least
        that certainty and answers there; without one it answers at its most certain tick.
    """
    certain = thoughts.certainties >= threshold
    stops = certain.any(axis=1)
    ticks = np.where(stops, certain.argmax(axis=1) + 1, thoughts.certainties.shape[1])
    answer = np.where(stops, ticks - 1, thoughts.certainties.argmax(axis=1))
    return ticks, thoughts.right[np.arange(len(ticks)), answer]


def mean_loss(thoughts: Thoughts) -> float:
    """Loss per label, over all examples, in nats."""
    return float(thoughts.losses.sum(dtype=np.float64) / max(1, thoughts.num_labels.sum()))
