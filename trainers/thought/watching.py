"""Watching a Continuous Thought Machine think about single examples: what it attends to, its neurons, its answers."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hf_models.continuous_thought_machine import ContinuousThoughtMachinePreTrainedModel

from ..tasks.thought import MazeExamples, ThoughtExamples, ThoughtTask
from .evaluation import IGNORED_LABEL, spell

# Neurons and pairs shown in a picture: those whose values vary most over the ticks.
MOST_NEURONS = 24
MOST_PAIRS = 48
DECIMALS = 5


@dataclass(frozen=True)
class Watched:
    """
    What a machine did with one example over T ticks.

    Attributes:
        identity, title: name of the example, and a line about target and answer.
        picture: what is to be seen, uint8 of shape `(height, width, 3)`, or `None`.
        attention: weights averaged over heads, `(T, rows, columns)` for pictures, else `(T, positions)`.
        states: post-activations after each tick, `(T, neurons)`.
        synchronisation: of the output after each tick, `(T, pairs)`.
        certainty: after each tick, `(T,)`.
        right: whether the whole answer is right after each tick, `(T,)`.
        answers: answer after each tick in words, T of them.
        walks: for mazes, the pixels that the answer of each tick walks through.
        contexts: for dynamic weights, what they are made from, `(T, size)`, and
        dynamic_norms: Frobenius norm of each dynamic layer's weights after each tick, by the layer's name, `(T,)`.
    """

    identity: str
    title: str
    picture: np.ndarray | None
    attention: np.ndarray
    states: np.ndarray
    synchronisation: np.ndarray
    certainty: np.ndarray
    right: np.ndarray
    answers: list[str]
    walks: list[list[tuple[int, int]]] | None = None
    contexts: np.ndarray | None = None
    dynamic_norms: dict[str, np.ndarray] | None = None

    def numbers(self) -> dict[str, dict[str, Any]]:
        """What the pictures are drawn from, as plain values."""
        common = {"example": self.identity, "certainty": _plain(self.certainty), "right": self.right.tolist()}
        neurons, pairs = most_varying(self.states, MOST_NEURONS), most_varying(self.synchronisation, MOST_PAIRS)
        numbers = {
            "neurons": {"neurons": neurons.tolist(), "states": _plain(self.states[:, neurons])},
            "synchronisation": {"pairs": pairs.tolist(), "synchronisation": _plain(self.synchronisation[:, pairs])},
            "attention": {"attention": _plain(self.attention), "answers": self.answers},
        }
        if self.contexts is not None:
            norms = {name: _plain(values) for name, values in (self.dynamic_norms or {}).items()}
            numbers["contexts"] = {"contexts": _plain(self.contexts), "norms": norms}
        return {name: {**common, **values} for name, values in numbers.items()}


def _plain(values: np.ndarray) -> list:
    return np.round(values.astype(np.float64), DECIMALS).tolist()


def most_varying(values: np.ndarray, most: int) -> np.ndarray:
    """Numbers of the columns of `(T, n)` with the largest standard deviation over the ticks, in ascending order."""
    return np.sort(np.argsort(-values.std(axis=0), kind="stable")[:most])


@contextlib.contextmanager
def without_stopping(model: Any) -> Iterator[None]:
    """Context in which a machine stops early only if a call asks for it, whatever its configuration says."""
    threshold, model.config.certainty_threshold = model.config.certainty_threshold, None
    try:
        yield
    finally:
        model.config.certainty_threshold = threshold


@torch.no_grad()
def watch(
    model: ContinuousThoughtMachinePreTrainedModel,
    task: ThoughtTask,
    examples: ThoughtExamples,
    indices: Sequence[int],
) -> Iterator[Watched]:
    """Let a head think about some examples, one at a time and for all ticks, and keep what it does.

    Args:
        model: a head of the machine; it is left in evaluation mode.
        task, examples, indices: what it is shown.
    """
    model.eval()
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")  # the others form no weights
    try:
        for index in indices:
            with without_stopping(model):
                watched = _watch_one(model, task, examples, index)
            yield watched
    finally:
        model.set_attn_implementation(implementation)


def _watch_one(model: Any, task: ThoughtTask, examples: ThoughtExamples, index: int) -> Watched:
    device = next(model.parameters()).device
    inputs = {task.input_name: examples[index][task.input_name].unsqueeze(0).to(device)}
    labels = np.atleast_1d(examples.labels(index))
    outputs = model(
        **inputs,
        output_attentions=True,
        output_hidden_states=True,
        output_synchronisation_out=True,
        **({"output_contexts": True} if hasattr(model.config, "hyper_layers") else {}),
    )
    attention = torch.stack([weights[0].mean(dim=(0, 1)) for weights in outputs.attentions]).float()
    if task.input_name == "pixel_values":
        height, width = model.model.encoder.backbone(inputs["pixel_values"].to(model.dtype)).shape[-2:]
        attention = attention.unflatten(-1, (height, width))
    logits = outputs.predictions[0].T.float().cpu().numpy()
    if task.loss == "ctc":
        path = logits.argmax(-1)
        classes = [np.array(spell(path[: tick + 1]), dtype=np.int64) for tick in range(len(path))]
        right = np.array([answer.tolist() == labels.tolist() for answer in classes])
        answers = [" ".join(task.classes[number] for number in answer) for answer in classes]
    else:
        classes = list(logits.reshape(len(logits), len(labels), -1).argmax(-1))
        right = np.array([((answer == labels) | (labels == IGNORED_LABEL)).all() for answer in classes])
        answers = [task.reading(answer, labels) for answer in classes]
    # The answer is that of the last tick for a spelling, else of the head's own choice.
    chosen = len(answers) - 1 if task.loss == "ctc" else int(outputs.certain_tick[0])
    contexts = norms = None
    if outputs.contexts:
        stacked = torch.stack([context[0] for context in outputs.contexts])
        contexts, norms = stacked.float().cpu().numpy(), dynamic_norms(model, stacked)
    return Watched(
        identity=examples.identity(index),
        title=f"{examples.identity(index)}: {'right' if right[chosen] else 'wrong'} at tick {chosen + 1}",
        picture=examples.picture(index),
        attention=attention.cpu().numpy(),
        states=torch.stack([state[0] for state in outputs.hidden_states[1:]]).float().cpu().numpy(),
        synchronisation=torch.stack([synch[0] for synch in outputs.synchronisation_out]).float().cpu().numpy(),
        certainty=outputs.certainties[0, 1].float().cpu().numpy(),
        right=right,
        answers=answers,
        walks=[examples.maze(index).walk(answer) for answer in classes] if isinstance(examples, MazeExamples) else None,
        contexts=contexts,
        dynamic_norms=norms,
    )


@torch.no_grad()
def dynamic_norms(model: torch.nn.Module, contexts: torch.Tensor) -> dict[str, np.ndarray]:
    """
    Size of the dynamic part of the weights in the course of thinking.

    Args:
        contexts (`torch.FloatTensor` of shape `(T, size + 1)`): What the weights are made from, with a final 1.

    Returns:
        Layer name -> Frobenius norm of its dynamic weights after each tick, of shape `(T,)`.
    """
    return {
        name.removeprefix("model.tick."): layer.dynamic_weight(contexts).flatten(1).norm(dim=1).float().cpu().numpy()
        for name, layer in model.named_modules()
        if hasattr(layer, "dynamic_weight")
    }
