"""Groups of parameters with learning rates of their own."""

from collections.abc import Collection
from typing import Any

from torch import nn


def layer_depths(model: nn.Module) -> dict[str, int]:
    """How many steps each trainable parameter lies below the head.

    0 for the head and whatever else stands outside the stacks; 1 for the last layer of a stack, 2 for the one before,
    and so on, each stack counted by itself; one more than the deepest layer for embeddings, also where the head shares
    their weight. A stack is an outermost `ModuleList`.
    """
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    stacks = {
        name: len(model.get_submodule(name))  # type: ignore[arg-type]
        for name in lists
        if not any(name.startswith(f"{other}.") for other in lists)
    }
    embeddings = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters()
    }
    deepest = max(stacks.values(), default=0) + 1
    depths = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        stack = next((stack for stack in stacks if name.startswith(f"{stack}.")), None)
        if stack is not None:
            index = int(name[len(stack) + 1 :].split(".")[0])
            depths[name] = stacks[stack] - index
        else:
            depths[name] = deepest if id(parameter) in embeddings else 0
    return depths


def layerwise_parameter_groups(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float,
    decay: float,
    decay_parameters: Collection[str],
) -> list[dict[str, Any]]:
    """Optimizer groups whose learning rate falls from the head down: learning_rate * decay^depth.

    Layers near the input hold what carries over from one task to the next, so they are moved less ("discriminative
    fine-tuning": Howard and Ruder 2018, arXiv:1801.06146, section 3.2, which divides by 2.6 from layer to layer).
    A schedule multiplies the rate of every group, so the proportions stay as they are.

    Args:
        model: what is trained.
        learning_rate: of the head, above 0.
        weight_decay: of the parameters named in `decay_parameters`; the others have none.
        decay: factor from one layer to the one below it, in (0, 1]; 1 gives all the same rate.
        decay_parameters: names of parameters that weight decay applies to, as `Trainer.get_decay_parameter_names`
            gives them.

    Returns:
        Groups with `params`, `lr` and `weight_decay`, from the head down; every trainable parameter stands in one.

    Raises:
        ValueError: if `decay` is not in (0, 1].
    """
    if not 0 < decay <= 1:
        raise ValueError(f"training.layerwise_lr_decay is {decay}; it must lie in (0, 1]")
    decaying = set(decay_parameters)
    parameters = dict(model.named_parameters())
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, depth in layer_depths(model).items():
        groups.setdefault((depth, name in decaying), []).append(parameters[name])
    return [
        {"params": members, "lr": learning_rate * decay**depth, "weight_decay": weight_decay if decays else 0.0}
        for (depth, decays), members in sorted(groups.items(), key=lambda item: (item[0][0], not item[0][1]))
    ]
