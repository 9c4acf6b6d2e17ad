"""The same weights through several implementations of attention: differences by layer, speed and memory."""

import copy
import gc
import json
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from ..errors import UserError, one_line
from .torch_transformer import TorchTransformer
from .walk import copies, first_tensor, roles

TORCH = "torch"
IMPLEMENTATIONS = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", TORCH)


@dataclass
class Variant:
    """One implementation with the shared weights.

    Attributes:
        name: of the implementation.
        layers: its layers by the name they have in the comparison, in order.
        run: one forward pass without gradients; returns the logits.
    """

    name: str
    layers: dict[str, nn.Module]
    run: Callable[[], torch.Tensor]
    seconds: list[float] = field(default_factory=list)


def layers_of(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The layers of a model in order, named `encoder.0`, `decoder.1` or `layer.2`."""
    found: dict[str, nn.Module] = {}
    blocks: list[str] = []
    for name, role in roles(model).items():
        if role == "block" and not any(name.startswith(f"{block}.") for block in blocks):
            blocks.append(name)
            stack = next((part for part in reversed(name.split(".")) if part in ("encoder", "decoder")), "layer")
            found[f"{stack}.{name.rpartition('.')[2]}"] = model.get_submodule(name)
    return found


def make_variants(model: PreTrainedModel, names: list[str], arguments: dict[str, Any]) -> list[Variant]:
    """The implementations to compare, all with the given model's weights.

    Args:
        model: in evaluation mode.
        names: of `IMPLEMENTATIONS`.
        arguments: of the model's `forward`.

    Raises:
        UserError: the model cannot run with one of them.
    """
    variants = []
    for name in names:
        if name == TORCH:
            core = TorchTransformer(model)
            layers = {f"encoder.{index}": layer for index, layer in enumerate(core.core.encoder.layers)}
            layers |= {f"decoder.{index}": layer for index, layer in enumerate(core.core.decoder.layers)}
            tokens = (arguments["input_ids"], arguments["decoder_input_ids"])
            variants.append(Variant(name, layers, partial(core, *tokens)))
            continue
        # Modules of its own, so that each variant has its own configuration; the weights are shared.
        twin = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
        try:
            twin.set_attn_implementation(name)
        except (ValueError, ImportError) as error:
            raise UserError(
                f"compare: {type(model).__name__} does not run with {name!r}: {one_line(error)[:200]}"
            ) from error
        variants.append(Variant(name, layers_of(twin), partial(logits_of, twin, arguments)))
    return variants


def logits_of(model: PreTrainedModel, arguments: dict[str, Any]) -> torch.Tensor:
    """The logits of one pass, or the last states of a model without a head."""
    outputs = model(**arguments)
    logits = getattr(outputs, "logits", None)
    return outputs[0] if logits is None else logits


@torch.no_grad()
def compare(variants: list[Variant], device: torch.device, repeats: int = 20) -> dict[str, Any]:
    """Run every variant on the same inputs.

    Args:
        variants: at least two; the first is the one that the others are measured against.
        device: where the weights are.
        repeats: timed passes of each, taken in turn, after two that are not timed.

    Returns:
        `layers`: for each layer, and for the logits, the largest entry of the first variant, and for every other one
        the largest absolute difference from it; `variants`: for each `milliseconds` (median and quartiles of a forward
        pass), `ratio` (of the medians, the first's over its own), and `peak_bytes`: what a pass allocates at most
        beside the weights.

    Raises:
        UserError: an implementation does not run on this machine, or not in the weights' number format.
    """
    states = [layer_outputs(variant) for variant in variants]
    logits = []
    for variant in variants:
        # Without hooks: torch's layers have a fused path that they leave when they are watched.
        logits.append(variant.run())
    rows = []
    for name in (*variants[0].layers, "logits"):
        tensors = logits if name == "logits" else [outputs[name] for outputs in states]
        differences = {
            variant.name: (tensor - tensors[0]).abs().max().item()
            for variant, tensor in zip(variants[1:], tensors[1:], strict=True)
        }
        rows.append({"layer": name, "largest": tensors[0].abs().max().item(), "difference": differences})
    measure_time(variants, device, repeats)
    # What an earlier pass has left in cycles must not be freed while memory is counted.
    gc.collect()
    first = median(variants[0].seconds)
    summary = []
    for variant in variants:
        low, middle, high = quantiles(variant.seconds, n=4, method="inclusive")
        summary.append(
            {
                "name": variant.name,
                "milliseconds": {"median": 1000 * middle, "quartiles": [1000 * low, 1000 * high]},
                "ratio": first / middle,
                "peak_bytes": peak_bytes(variant.run, device),
            }
        )
    return {"reference": variants[0].name, "repeats": repeats, "layers": rows, "variants": summary}


def layer_outputs(variant: Variant) -> dict[str, torch.Tensor]:
    """What each layer of a variant returns in one pass.

    Raises:
        UserError: the implementation does not run on this machine, or not in this number format.
    """
    outputs: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable:
        def hook(module, args, output):
            tensor = first_tensor(copies(output))
            assert tensor is not None
            outputs[name] = tensor

        return hook

    with ExitStack() as stack:
        for name, layer in variant.layers.items():
            stack.callback(layer.register_forward_hook(keep(name)).remove)
        try:
            variant.run()
        except (RuntimeError, ValueError, ImportError) as error:
            raise UserError(f"compare: {variant.name!r} does not run here: {one_line(error)[:200]}") from error
    return outputs


def measure_time(variants: list[Variant], device: torch.device, repeats: int) -> None:
    """Fill `seconds` of each variant, in turn, so that all see the same machine."""
    for turn in range(-2, repeats):
        for variant in variants:
            synchronise(device)
            started = time.perf_counter()
            variant.run()
            synchronise(device)
            if turn >= 0:
                variant.seconds.append(time.perf_counter() - started)


def synchronise(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """The most memory that a call holds at a time beyond what was held before, as the allocator counts it."""
    if device.type != "cpu":
        before = torch.accelerator.memory_allocated(device)
        torch.accelerator.reset_peak_memory_stats(device)
        run()
        synchronise(device)
        return torch.accelerator.max_memory_allocated(device) - before
    # The profiler would otherwise write two lines about itself to the terminal.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    handle, path = tempfile.mkstemp(suffix=".json")
    os.close(handle)
    try:
        profiler.export_chrome_trace(path)
        events = json.loads(Path(path).read_text(encoding="utf-8"))["traceEvents"]
    finally:
        os.unlink(path)
    moments = sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"])
    held = peak = 0
    for event in moments:
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def comparison_lines(result: dict[str, Any]) -> list[str]:
    """The comparison as one readable table."""
    names = [variant["name"] for variant in result["variants"]]
    head = ["", *(f"{name}" for name in names)]
    table = [head]
    for row in result["layers"]:
        cells = [f"{row['largest']:.4g}", *(f"{row['difference'][name]:.1e}" for name in names[1:])]
        table.append([f"{row['layer']}", *cells])
    table.append(
        ["forward pass, ms"]
        + [
            "{:.2f} ({:.2f} to {:.2f})".format(variant["milliseconds"]["median"], *variant["milliseconds"]["quartiles"])
            for variant in result["variants"]
        ]
    )
    table.append([f"speed, {names[0]} = 1", *(f"{variant['ratio']:.2f}" for variant in result["variants"])])
    table.append(["peak memory, KiB", *(f"{variant['peak_bytes'] / 1024:.0f}" for variant in result["variants"])])
    widths = [max(len(row[column]) for row in table) for column in range(len(head))]
    lines = [
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]
    return [
        f"first column: largest entry with {names[0]}; others: largest absolute difference from it",
        *lines,
        f"times: median of {result['repeats']} passes taken in turn, with quartiles; memory: beside the weights",
    ]
