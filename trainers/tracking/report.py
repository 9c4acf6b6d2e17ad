"""What a tracked run leaves in `internals/`: numbers first, pictures drawn from them, one page that shows them all."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils import logging

from ..distributed import on_main_process
from ..errors import UserError
from ..figures import save_figure
from ..files import json_text, write_text
from . import figures
from .attention import class_counts
from .page import make_page
from .tracker import FOLDER, InternalsTracker

logger = logging.get_logger(__name__)

SCHEMA_VERSION = 1
REPORT = "analysis_report.json"
DEFINITIONS = {
    "entropy": "H = -sum_j P log P over the keys a query sees, in nats; rows of real queries that see 4 keys or more",
    "normalised_entropy": "H / log n: 0 is one key, 1 is uniform",
    "effective_keys": "exp(H)",
    "mean_distance": "sum_j P |i - j|, in tokens; in cross-attention of (position + 0.5) / length",
    "relative_distance": "mean distance over what uniform attention would give",
    "confidence": "largest weight of a row; corrected: (c - 1/n) / (1 - 1/n)",
    "local_mass": "weight within two tokens, less what uniform attention has there, over what is left of 1",
    "sink_mass": "weight on the first visible key",
    "class": "local if relative distance <= 0.5, else diffuse if normalised entropy >= 0.8, else focused if <= 0.5, "
    "else global",
    "similarity": "1 - Jensen-Shannon divergence (base 2) between the rows of two heads",
    "signed_share": "<x, r_L> / |r_L|^2 of a component x of the last state r_L; sums to 1 over components",
    "relative_write": "|x| / |r before|",
    "gradients": "before clipping, after unscaling, summed over processes; flags compare a layer with the median layer",
    "update_to_weight": "|w_new - w_old| / |w_old|; about 1e-3 is usual, below 1e-5 frozen, above 1e-2 unstable",
    "step": "numbers of step s belong to the weights before update s",
}


def make_report(tracker: InternalsTracker, loss_history: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """The content of `analysis_report.json`.

    Args:
        tracker: after training.
        loss_history: the Trainer's log; its steps, losses and scores are stored, so that curves can be redrawn.

    Returns:
        `schema_version`, `model`, `tracking` (what was watched, and its cost in this run), `first` and `last` record in
        full, `evolution` (a few numbers of every tracked step), `flags` (layers whose gradients are out of proportion,
        with their steps), `nonfinite` (modules that held NaN or infinity, with their steps; such numbers are null),
        `not_reproduced`, `training`, `definitions`.
    """
    records = tracker.records
    # A resumed run may have looked at its model for a part of the time only; records carry the whole.
    spent = sum(record["seconds"] for record in records)
    trained = records[-1]["training_seconds"] if records else 0.0
    return {
        "schema_version": SCHEMA_VERSION,
        "model": tracker.structure.describe(),
        "tracking": {
            "every": tracker.every,
            "filter": tracker.filter,
            "modules": len(tracker.names),
            "probe_examples": None if tracker.probe is None else tracker.examples,
            "steps": [record["step"] for record in records],
            "seconds": round(spent, 3),
            "training_seconds": trained,
            "share_of_training_time": spent / trained if trained else None,
        },
        "first": records[0] if records else None,
        "last": records[-1] if records else None,
        "evolution": [_overview(record) for record in records],
        "flags": [{"step": r["step"], **flag} for r in records for flag in r["gradients"]["flags"]],
        "nonfinite": [{"step": r["step"], **entry} for r in records for entry in r["nonfinite"]],
        "not_reproduced": records[-1]["not_reproduced"] if records else {},
        "training": [_curve_point(entry) for entry in loss_history if "step" in entry],
        "definitions": DEFINITIONS,
    }


def _overview(record: Mapping[str, Any]) -> dict[str, Any]:
    entropies = [value for summary in record["attention"].values() for value in summary["normalised_entropy"]]
    known = [value for value in entropies if value is not None]
    scores = [value for summary in record["attention"].values() for value in summary["scores"]["max"] or []]
    scores = [value for value in scores if value is not None]
    return {
        "step": record["step"],
        "classes": class_counts(record["attention"]),
        "mean_normalised_entropy": float(np.mean(known)) if known else None,
        # Entropy below 0.05 in most heads, or a maximum that grows without end, is the sign of entropy collapse.
        "collapsed_heads": sum(value < 0.05 for value in known),
        "max_score": max(scores, default=None),
        "gradient_slope": record["gradients"]["slope"],
        "decomposition_error": {stack: found["error"] for stack, found in (record.get("residual") or {}).items()},
        "seconds": record["seconds"],
    }


def _curve_point(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: value for key, value in entry.items() if isinstance(value, int | float) and not isinstance(value, bool)
    }


def write_internals(tracker: InternalsTracker, folder: Path, loss_history: Sequence[Mapping[str, Any]] = ()) -> None:
    """Write `internals/analysis_report.json`, the pictures and `index.html` of a tracked run.

    Call it on every process; the main one writes. A run too short for any tracked step writes nothing.

    Args:
        tracker: of the run, after training.
        folder: the run's folder.
        loss_history: `trainer.state.log_history`.
    """

    def write() -> None:
        report = make_report(tracker, loss_history)
        if report["last"] is None:
            logger.warning(f"{folder}: no step was tracked, so there are no internals to show")
            return
        place = Path(folder) / FOLDER
        place.mkdir(parents=True, exist_ok=True)
        write_text(place / REPORT, json_text(report))
        records = tracker.records
        order = list(records[-1]["attention"])
        maps = {
            step: {name: found[name] for name in order if name in found}
            for step, found in tracker.stored_maps().items()
        }
        draw(place, records, maps)

    on_main_process(write)


def draw(folder: Path, records: Sequence[Mapping[str, Any]], maps: Mapping[int, Mapping[str, Any]]) -> None:
    """Draw the pictures and the page of an `internals/` folder from what is stored in it.

    Args:
        folder: holds `analysis_report.json`; pictures are written beside it.
        records: of `steps.jsonl`.
        maps: step -> module -> weights, as [`InternalsTracker.stored_maps`] gives them.

    Raises:
        UserError: if the report is missing or of another schema.
    """
    try:
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{folder / REPORT}: cannot be read: {error}") from error
    if report.get("schema_version") != SCHEMA_VERSION:
        raise UserError(f"{folder / REPORT}: schema_version is {report.get('schema_version')!r}, not {SCHEMA_VERSION}")
    by_step = {record["step"]: record for record in records}
    drawn = {step: found for step, found in sorted(maps.items()) if found and step in by_step}
    pictures: dict[str, Any] = {}
    for step, found in drawn.items():
        pictures[f"attention_step_{step:08d}"] = lambda step=step, found=found: figures.attention_heat_maps(
            found, by_step[step]
        )
    if drawn:
        newest = max(drawn)
        pictures["attention_evolution"] = lambda: figures.attention_evolution(drawn, records)
        pictures["multi_head_comparison"] = lambda: figures.multi_head_comparison(drawn[newest], by_step[newest])
    if records[-1]["attention"]:
        pictures["attention_statistics"] = lambda: figures.attention_statistics_evolution(records)
    if records[-1]["states"]:
        pictures["qkv_evolution"] = lambda: figures.qkv_evolution(records)
    if any(found["components"] for record in records for found in (record.get("residual") or {}).values()):
        pictures["layer_contributions"] = lambda: figures.layer_contributions(records)
    if records[-1]["gradients"]["layers"]:
        pictures["gradient_flow"] = lambda: figures.gradient_flow_chart(records)
    if any("loss" in entry or "eval_loss" in entry for entry in report["training"]):
        pictures["training_curves"] = lambda: figures.training_curves(report["training"])
    for stale in folder.glob("*.png"):
        if stale.stem not in pictures:
            stale.unlink()
    for name, make in pictures.items():
        save_figure(make(), folder / f"{name}.png")
    images = {name: (folder / f"{name}.png").read_bytes() for name in pictures}
    write_text(folder / "index.html", make_page(report, images))
