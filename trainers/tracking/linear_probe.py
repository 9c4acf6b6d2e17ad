"""Linear probes: what can be read off the states of each layer by a linear map.

Alain and Bengio 2016 (arXiv:1610.01644). A probe that reads a property may have learned it by itself; a control with
shuffled labels shows how much it can learn from nothing (in the spirit of Hewitt and Liang 2019, arXiv:1909.03368:
selectivity = accuracy - control accuracy).
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from ..coupling.capture import evaluation_mode
from ..errors import UserError
from ..statistics import proportion
from .capture import TokenMasks
from .structure import Structure


def layer_states(model: PreTrainedModel, batches: Iterable[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Mean state of the real tokens of every example after every layer, and before the first ("<stack>.input").

    Args:
        model: run without dropout and without gradients.
        batches: as the model takes them.

    Returns:
        Name -> `torch.FloatTensor` of shape `(examples, hidden)`, on the CPU.
    """
    structure = Structure(model)
    masks = TokenMasks(structure)
    found: dict[str, list[torch.Tensor]] = {}

    def keep(name: str, states: torch.Tensor) -> None:
        mask = masks.mask_for(masks.side(name), *states.shape[:2])
        weights = torch.ones(states.shape[:2], device=states.device) if mask is None else mask.float()
        mean = (states.float() * weights[..., None]).sum(1) / weights.sum(1, keepdim=True).clamp(min=1)
        found.setdefault(name, []).append(mean.cpu())

    def hook(name: str, first: str | None):
        def after(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            if first is not None:
                keep(first, args[0] if args else next(iter(kwargs.values())))
            keep(name, output[0] if isinstance(output, tuple | list) else output)

        return after

    handles = masks.hooks()
    for layer in structure.layers.values():
        first = f"{layer.stack}.input" if layer.index == 0 else None
        handles.append(layer.module.register_forward_hook(hook(layer.name, first), with_kwargs=True))
    device = next(model.parameters()).device
    try:
        with evaluation_mode(model), torch.no_grad():
            for batch in batches:
                model(**{name: values.to(device) for name, values in batch.items()})
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


def fit_classifier(
    features: torch.Tensor, labels: torch.Tensor, classes: int, penalty: float = 1e-3, most_iterations: int = 200
) -> nn.Linear:
    """Multinomial logistic regression by L-BFGS, in double precision: the minimum of a convex function.

    Args:
        features (`torch.Tensor` of shape `(examples, width)`).
        labels (`torch.LongTensor` of shape `(examples,)`): in [0, classes).
        classes: their number.
        penalty: weight of the sum of squared weights beside the mean cross-entropy.
        most_iterations: of the optimizer.
    """
    features = features.double()
    classifier = nn.Linear(features.shape[1], classes).double()
    nn.init.zeros_(classifier.weight)
    nn.init.zeros_(classifier.bias)
    optimizer = torch.optim.LBFGS(
        classifier.parameters(),
        max_iter=most_iterations,
        tolerance_grad=1e-8,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(classifier(features), labels) + penalty * classifier.weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    return classifier


def probe_layers(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, torch.Tensor]],
    labels: Sequence[Any],
    test_share: float = 0.3,
    seed: int = 0,
    penalty: float = 1e-3,
    confidence: float = 0.95,
) -> dict[str, Any]:
    """How well a property of the examples can be read from each layer, against shuffled labels and the majority.

    Args:
        model: run without dropout; its weights stay as they are.
        batches: the examples.
        labels: one per example, in the same order, of any hashable kind; a label seen once cannot be tested and is
            refused.
        test_share: share of the examples that probes are scored on, in (0, 1); drawn within each label.
        seed: of that draw and of the shuffling.
        penalty: see [`fit_classifier`].
        confidence: level of the intervals, in (0, 1).

    Returns:
        `classes`, `train`, `test` (numbers of examples), `majority` (accuracy of the most frequent label), and
        `layers`: name -> `accuracy` and `control` (each value, n, interval; the control is trained and scored on
        shuffled labels) and `selectivity`, their difference.

    Raises:
        UserError: if labels and examples differ in number, or a label occurs only once, or there is only one.
    """
    states = layer_states(model, batches)
    count = len(next(iter(states.values()))) if states else 0
    if count != len(labels):
        raise UserError(f"labels: {len(labels)}, but the batches hold {count} examples")
    names = sorted(set(labels), key=str)
    if len(names) < 2:
        raise UserError("labels: a probe needs two different labels at least")
    target = torch.tensor([names.index(label) for label in labels])
    numbers = torch.bincount(target)
    if int(numbers.min()) < 2:
        raise UserError(f"labels: {names[int(numbers.argmin())]!r} occurs once; it cannot be learned and tested")
    generator = np.random.default_rng(seed)
    test = torch.zeros(count, dtype=torch.bool)
    for index in range(len(names)):
        members = generator.permutation(np.flatnonzero(target.numpy() == index))
        test[members[: min(max(1, round(test_share * len(members))), len(members) - 1)]] = True
    shuffled = target[torch.from_numpy(generator.permutation(count))]
    majority = int(torch.bincount(target[~test], minlength=len(names)).argmax())
    tested = int(test.sum())

    def score(features: torch.Tensor, wanted: torch.Tensor) -> dict[str, Any]:
        classifier = fit_classifier(features[~test], wanted[~test], len(names), penalty)
        with torch.no_grad():
            right = classifier(features[test].double()).argmax(-1) == wanted[test]
        return proportion(int(right.sum()), tested, confidence)

    layers = {}
    for name, features in states.items():
        mean, std = features[~test].mean(0), features[~test].std(0).clamp(min=1e-6)
        features = (features - mean) / std
        accuracy, control = score(features, target), score(features, shuffled)
        layers[name] = {
            "accuracy": accuracy,
            "control": control,
            "selectivity": accuracy["value"] - control["value"],
        }
    return {
        "classes": [str(name) for name in names],
        "train": count - tested,
        "test": tested,
        "majority": float((target[test] == majority).float().mean()),
        "layers": layers,
    }
