"""One line of a trace: a tensor's place in the forward pass, its shape and its statistics."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

# In the order in which a forward pass usually meets them.
STAGES = (
    "input",
    "embedding",
    "positions",
    "compression",
    "reasoning",
    "expansion",
    "synchronisation",
    "norm",
    "attention",
    "cross_attention",
    "synapse",
    "neurons",
    "residual",
    "feed_forward",
    "layer",
    "output",
)


@dataclass(frozen=True)
class Statistics:
    """Numbers over all entries of a tensor, in double precision.

    Attributes:
        mean, std, min, max: over the finite entries; `std` is bias-corrected. `None` where there are too few.
        non_finite: number of entries that are NaN or infinite.
    """

    mean: float | None
    std: float | None
    min: float | None
    max: float | None
    non_finite: int


def statistics_of(tensor: torch.Tensor) -> Statistics:
    """Statistics of a tensor of any shape and type; booleans count as 0 and 1."""
    values = tensor.detach().flatten().to("cpu", torch.float64)
    finite = values[values.isfinite()]
    non_finite = values.numel() - finite.numel()
    if finite.numel() == 0:
        return Statistics(None, None, None, None, non_finite)
    std = finite.std().item() if finite.numel() > 1 else None
    return Statistics(finite.mean().item(), std, finite.min().item(), finite.max().item(), non_finite)


@dataclass(frozen=True)
class Record:
    """One line of a trace.

    Attributes:
        stage: one of `STAGES`.
        stack: `"encoder"`, `"decoder"` or `""`.
        block: layer, reasoning step or tick, for instance `"encoder.0"`, `"step.2"`; `""` outside of any.
        what: the quantity in words.
        module: name of the module that computed it.
        tensor: the model's own value, or `None` where it cannot be shown and `note` says why.
        note: a remark.
    """

    stage: str
    stack: str
    block: str
    what: str
    module: str
    tensor: torch.Tensor | None
    note: str = ""

    def entry(self) -> dict[str, Any]:
        """The record as JSON, without the tensor itself."""
        values: dict[str, Any] = {
            "stage": self.stage,
            "stack": self.stack or None,
            "block": self.block or None,
            "what": self.what,
            "module": self.module or None,
        }
        if self.tensor is not None:
            values |= {"shape": list(self.tensor.shape), "dtype": str(self.tensor.dtype).removeprefix("torch.")}
            values |= dataclasses.asdict(statistics_of(self.tensor))
        if self.note:
            values["note"] = self.note
        return values
