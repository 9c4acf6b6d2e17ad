"""The parts of a model that can be watched, found by their names and classes."""

import fnmatch
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..errors import UserError, did_you_mean

NamesFilter = str | Iterable[str] | Callable[[str], bool] | None


@dataclass
class Layer:
    """One layer of a stack.

    Attributes:
        name: its name, without the prefix that all names of the model share.
        stack: name of the list of layers it stands in.
        index: its place there, from 0.
        module: itself.
        sublayers: its direct children that have weights and are no norm, by name.
        norms: its direct children that normalise, by name.
    """

    name: str
    stack: str
    index: int
    module: nn.Module
    sublayers: dict[str, nn.Module] = field(default_factory=dict)
    norms: dict[str, nn.Module] = field(default_factory=dict)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a LayerNorm, an RMSNorm or the like, by the name of its class."""
    return "norm" in type(module).__name__.lower()


class Structure:
    """Attention modules, layers and rectifiers of a model, under short names.

    Attention modules are the innermost modules whose class is called `...Attention` and that hold weights. A layer is
    an element of a `ModuleList` that holds attention modules. Short names leave out the prefix of the model's body
    (`model.`, `transformer.`).

    Args:
        model: any model of the library.

    Attributes:
        attentions (`dict[str, nn.Module]`), layers (`dict[str, Layer]`), rectifiers (`dict[str, nn.Module]`).

    Raises:
        UserError: if the model has no attention module at all.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.prefix = f"{model.base_model_prefix}." if hasattr(model, model.base_model_prefix or "?") else ""
        modules = dict(model.named_modules())
        holding = {name for name, module in modules.items() if "attention" in type(module).__name__.lower() and name}
        holding = {name for name in holding if any(True for _ in modules[name].parameters())}
        innermost = {name for name in holding if not any(other.startswith(f"{name}.") for other in holding)}
        self.attentions = {self.short(name): modules[name] for name in modules if name in innermost}
        if not self.attentions:
            raise UserError(f"{type(model).__name__} has no attention modules: there is no attention to track")
        self.layers: dict[str, Layer] = {}
        found: list[str] = []
        for name, module in modules.items():
            inside_layer = any(name.startswith(f"{layer}.") for layer in found)
            if not isinstance(module, nn.ModuleList) or inside_layer:
                continue
            elements = [f"{name}.{index}" for index in range(len(module))]
            if not any(part.startswith(f"{element}.") for element in elements for part in innermost):
                continue
            for index, element in enumerate(elements):
                found.append(element)
                children = dict(module[index].named_children())
                self.layers[self.short(element)] = Layer(
                    name=self.short(element),
                    stack=self.short(name),
                    index=index,
                    module=module[index],
                    sublayers={
                        key: child
                        for key, child in children.items()
                        if not is_norm(child) and any(True for _ in child.parameters())
                    },
                    norms={key: child for key, child in children.items() if is_norm(child)},
                )
        self.rectifiers = {
            self.short(name): module
            for name, module in modules.items()
            if "relu" in type(module).__name__.lower() and any(name.startswith(f"{layer}.") for layer in found)
        }

    def short(self, name: str) -> str:
        return name.removeprefix(self.prefix)

    @property
    def names(self) -> list[str]:
        """Everything that can be watched, in the order of the model."""
        sublayers = [f"{layer.name}.{key}" for layer in self.layers.values() for key in layer.sublayers]
        return list(dict.fromkeys([*self.layers, *sublayers, *self.attentions, *self.rectifiers]))

    def stacks(self) -> dict[str, list[Layer]]:
        """The layers by stack, each in order."""
        stacks: dict[str, list[Layer]] = {}
        for layer in self.layers.values():
            stacks.setdefault(layer.stack, []).append(layer)
        return stacks

    def layer_of(self, name: str) -> str | None:
        """The layer that a module or parameter stands in, or `None`."""
        short = self.short(name)
        return next((layer for layer in self.layers if short == layer or short.startswith(f"{layer}.")), None)

    def select(self, names: NamesFilter) -> set[str]:
        """The names that a filter lets through.

        Args:
            names: a name, a glob such as `decoder.*`, several of these, a function of the name, or `None` for all.
                Short names are meant; whole ones (`model.decoder.*`) are understood.

        Raises:
            UserError: if one of them matches nothing, naming what is near.
        """
        known = self.names
        if names is None:
            return set(known)
        if callable(names):
            chosen = {name for name in known if names(name)}
            if not chosen:
                raise UserError(f"tracking.names: the filter matches none of {len(known)} modules{_some(known)}")
            return chosen
        chosen = set()
        for pattern in [names] if isinstance(names, str) else list(names):
            short = self.short(pattern)
            matches = {name for name in known if fnmatch.fnmatchcase(name, short) or fnmatch.fnmatchcase(name, pattern)}
            if not matches:
                hint = did_you_mean(pattern, known) or did_you_mean(pattern.rstrip(".*"), [*known, *self._parents()])
                raise UserError(f"tracking.names: {pattern!r} matches no module{hint}{_some(known)}")
            chosen |= matches
        return chosen

    def _parents(self) -> list[str]:
        """What a glob may begin with."""
        return sorted({name[: place + 1].rstrip(".") for name in self.names for place in _dots(name)})

    def describe(self) -> dict[str, Any]:
        """Sizes of the model, for a report."""
        return {
            "class": type(self.model).__name__,
            "model_type": self.model.config.model_type,
            "parameters": self.model.num_parameters(),
            "kernel": self.model.config._attn_implementation,
            "layers": {stack: len(layers) for stack, layers in self.stacks().items()},
            "attention_modules": list(self.attentions),
        }


def _dots(name: str) -> list[int]:
    return [place for place, character in enumerate(name) if character == "."]


def _some(known: list[str], most: int = 6) -> str:
    more = f" and {len(known) - most} more" if len(known) > most else ""
    return f"; there are {', '.join(known[:most])}{more}"
