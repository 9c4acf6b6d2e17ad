"""How the benchmarks measure and report: forms in turn in one process, CPU seconds, medians with their spread."""

import json
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

# Names a file that `note` adds its figures to, one JSON object a line.
RECORDS = "ADAPTIVE_REASONERS_BENCHMARK_RECORDS"


def cpu_seconds(action: Callable[[], object]) -> float:
    start = time.process_time()
    action()
    return time.process_time() - start


@dataclass
class Comparison:
    """CPU seconds of several forms of one computation, measured in turn.

    Attributes:
        seconds: of each form, one figure a round.
    """

    seconds: dict[str, list[float]]

    def median(self, form: str) -> float:
        return statistics.median(self.seconds[form])

    def ratio(self, form: str, baseline: str) -> tuple[float, float, float]:
        """How many times as long as `form` the baseline takes: of the medians, and the least and most of a round.

        The two figures of a round lie side by side in time, so what slows a whole round leaves its ratio alone.
        """
        rounds = [slow / fast for slow, fast in zip(self.seconds[baseline], self.seconds[form], strict=True)]
        return self.median(baseline) / self.median(form), min(rounds), max(rounds)


def interleaved(
    actions: dict[str, Callable[[], object]],
    rounds: int,
    repeats: dict[str, int] | None = None,
    warm_up: bool = True,
) -> Comparison:
    """Run the actions in turn, so many rounds.

    Args:
        repeats: how often an action runs in a round, default once; its figure is the mean.
        warm_up: whether a round that does not count comes first.
    """
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(-warm_up, rounds):
        for name, action in actions.items():
            count = (repeats or {}).get(name, 1)
            taken = cpu_seconds(lambda action=action, count=count: [action() for _ in range(count)])
            if number >= 0:
                seconds[name].append(taken / count)
    return Comparison(seconds)


def note(text: str, **figures: Any) -> None:
    """Print a line of results, and add its figures to the file of records if there is one."""
    print(text, flush=True)
    if file := os.environ.get(RECORDS):
        with open(file, "a", encoding="utf-8") as records:
            records.write(json.dumps({"text": text, **figures}) + "\n")


def significant(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}" if value else "0"


def note_speed(what: str, comparison: Comparison, baseline: str, remark: str = "") -> None:
    """One line: the seconds of each form, and how many times as long the baseline takes."""
    cells, ratios = [f"{baseline} {significant(comparison.median(baseline))} s"], {}
    for form in comparison.seconds:
        if form != baseline:
            ratio, low, high = ratios[form] = comparison.ratio(form, baseline)
            spread = f", {significant(low)} to {significant(high)}" if len(comparison.seconds[form]) > 1 else ""
            cells.append(f"{form} {significant(comparison.median(form))} s ({significant(ratio)}x{spread})")
    note(f"{what}: {', '.join(cells)}{remark}", what=what, baseline=baseline, seconds=comparison.seconds, ratios=ratios)


def note_memory(what: str, peaks: dict[str, float], baseline: str) -> None:
    """One line: the peak of each form in MiB, and its share of the baseline's.

    Args:
        peaks: bytes of each form.
    """
    cells = [f"{baseline} {peaks[baseline] / 2**20:,.0f} MiB"]
    shares = {form: peak / peaks[baseline] for form, peak in peaks.items() if form != baseline}
    cells += [f"{form} {peaks[form] / 2**20:,.0f} MiB ({share:.2f} of it)" for form, share in shares.items()]
    note(f"{what}: {', '.join(cells)}", what=what, baseline=baseline, bytes=peaks, shares=shares)


def slope(sizes: list[float], values: list[float]) -> float:
    """Of the line by least squares through the logarithms: the power of the size that the values grow with."""
    return statistics.linear_regression([math.log(size) for size in sizes], [math.log(value) for value in values]).slope


def note_growth(
    what: str, size_name: str, actions: dict[float, dict[str, Callable[[], object]]], rounds: int
) -> dict[str, float]:
    """One line for each form: its seconds against a size, and the slope of both on logarithmic scales.

    Args:
        actions: of each size, the forms' actions. All run in turn.

    Returns:
        the slope of each form.
    """
    flat = {f"{size} {form}": action for size, forms in actions.items() for form, action in forms.items()}
    comparison = interleaved(flat, rounds)
    sizes, slopes = list(actions), {}
    for form in actions[sizes[0]]:
        medians = [comparison.median(f"{size} {form}") for size in sizes]
        slopes[form] = slope(sizes, medians)
        figures = ", ".join(f"{size:,}: {significant(value)} s" for size, value in zip(sizes, medians, strict=True))
        note(
            f"{what}, {form}, against {size_name} {figures}; slope {slopes[form]:.2f}",
            what=what,
            form=form,
            sizes=sizes,
            seconds=medians,
            slope=slopes[form],
        )
    return slopes


def resident(field: str = "VmRSS") -> int:
    """Bytes of this process: `VmRSS` now, `VmHWM` at most since the peak was last reset (Linux)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def peak_of(action: Callable[[], object]) -> int:
    """Bytes by which the resident memory of this process rises above what it is now while the action runs (Linux)."""
    before = resident()
    Path("/proc/self/clear_refs").write_text("5")
    action()
    return resident("VmHWM") - before


def checkpointing(model: PreTrainedModel, enabled: bool) -> None:
    """Turn activation checkpointing on or off, by either of the names that versions of the library have for it."""
    turn = "enable" if enabled else "disable"
    newer, older = f"activation_checkpointing_{turn}", f"gradient_checkpointing_{turn}"
    getattr(model, newer if hasattr(model, newer) else older)()


def in_new_process(function: Callable, *arguments: Any, method: str = "spawn") -> Any:
    """The result of a call in a process that has run nothing before; with `fork`, no more than this one has."""
    with multiprocessing.get_context(method).Pool(1) as pool:
        return pool.apply(function, arguments)
