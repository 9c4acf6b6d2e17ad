"""What a Connection Transformer has learnt: its connections, and how its slots reason.

    python -m trainers.connection_analysis outputs/<run>/internals/connection_analysis.json

draws the pictures of a finished analysis again. Training writes numbers and pictures itself.
"""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .command import CommandParser, run_command
from .errors import UserError, one_line
from .figures import COLOURS, new_figure, printable, save_figure, whole_numbers
from .files import json_text, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCHEMA_VERSION = 1
RELATIVE_THRESHOLDS = (0.01, 0.03, 0.1, 0.3, 1.0)
# Singular values below this share of the largest do not count for the rank.
RANK_CUTOFF = 0.01
# Pairs whose singular values are computed, at most; spread evenly over all pairs.
MAX_PAIRS = 4096
FILE_NAME = "connection_analysis.json"


def connections_of(model: PreTrainedModel) -> Any:
    """The connections of a Connection Transformer, whatever its head.

    Raises:
        UserError: the model is another one.
    """
    if getattr(model.config, "model_type", None) != "connection_transformer":
        raise UserError(f"model: a {getattr(model.config, 'model_type', type(model).__name__)} has no connections")
    return encoder_of(model).reasoning.step.connections


def encoder_of(model: PreTrainedModel) -> Any:
    """The encoder of a Connection Transformer with any head."""
    return getattr(model, "model", model).encoder


def pair_cores(connections: Any, sources: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Small matrices with the singular values of `M_ij = S T`.

    With `S = Q R` and `Tᵀ = P L`, both Q and P with orthonormal columns, `S T = Q (R Lᵀ) Pᵀ` has the singular values of
    the matrix `R Lᵀ` of shape `(rank, rank)`.

    Args:
        connections: per-pair, block or diagonal connections.
        sources, targets (`torch.LongTensor` of shape `(pairs,)`): The slots i and j.

    Returns:
        `torch.FloatTensor` of shape `(pairs, rank, rank)`, in float64.
    """

    def triangle(matrices: torch.Tensor) -> torch.Tensor:
        return torch.linalg.qr(matrices.double(), mode="r").R

    source_weight, target_weight = connections.source_weight.detach(), connections.target_weight.detach()
    if not hasattr(connections, "core_weight"):
        source, target = connections.unpack(source_weight, target_weight)
        left = triangle(source[sources, targets])
        right = triangle(target[sources, targets].transpose(1, 2))
        return left @ right.transpose(1, 2)
    left, right = triangle(source_weight), triangle(target_weight.transpose(1, 2))
    cores = connections.core_weight.detach().double()
    if cores.ndim == 2:
        rank = connections.rank
        cores = cores.unflatten(0, (-1, rank)).unflatten(2, (-1, rank))[sources, :, targets]
    else:
        cores = torch.diag_embed(cores[:, sources, targets].T)
    return left[sources] @ cores @ right[targets].transpose(1, 2)


def traces(connections: Any) -> torch.Tensor:
    """`trace(M_ij)` of all pairs, `[source, target]`: whether a message, on the whole, agrees with the state sent."""
    source, target = connections.source_weight.detach().float(), connections.target_weight.detach().float()
    if not hasattr(connections, "core_weight"):
        source, target = connections.unpack(source, target)
        rows = [(one.transpose(1, 2) * other).sum(dim=(1, 2)) for one, other in zip(source, target, strict=True)]
        return torch.stack(rows)
    cores = connections.core_weight.detach().float()
    rows = []
    for index, one in enumerate(source):
        overlaps = target @ one  # V_j U_i, of shape (slots, rank, rank)
        if cores.ndim == 2:
            rank = connections.rank
            own = cores.view(len(source), rank, len(source), rank)[index]  # (rank, slots, rank)
            rows.append(torch.einsum("kjl,jlk->j", own, overlaps))
        else:
            rows.append((cores[:, index].T * overlaps.diagonal(dim1=1, dim2=2)).sum(1))
    return torch.stack(rows)


def effective_rank(singular_values: np.ndarray) -> dict[str, float]:
    """How many directions matter, averaged over matrices.

    Args:
        singular_values (`np.ndarray` of shape `(matrices, rank)`): In descending order.

    Returns:
        `counted`: those above [`RANK_CUTOFF`] times the largest; `entropy`: exp of the entropy of the values' shares
        (Roy and Vetterli 2007, "The effective rank").
    """
    largest = singular_values[:, :1]
    alive = singular_values[largest[:, 0] > 0]
    if len(alive) == 0:
        return {"counted": 0.0, "entropy": 0.0}
    shares = alive / alive.sum(axis=1, keepdims=True)
    entropy = -(shares * np.log(np.where(shares > 0, shares, 1.0))).sum(axis=1)
    counted = (alive > RANK_CUTOFF * alive[:, :1]).sum(axis=1)
    return {"counted": float(counted.mean()), "entropy": float(np.exp(entropy).mean())}


def clustered_order(strengths: np.ndarray) -> list[int]:
    """Slots in an order that puts those with similar connections, out and in, beside each other."""
    from scipy.cluster.hierarchy import leaves_list, linkage

    profiles = np.concatenate([strengths, strengths.T], axis=1)
    lengths = np.linalg.norm(profiles, axis=1, keepdims=True)
    profiles = profiles / np.where(lengths > 0, lengths, 1.0)
    return [int(leaf) for leaf in leaves_list(linkage(profiles, method="average", optimal_ordering=True))]


@torch.no_grad()
def connection_structure(model: PreTrainedModel) -> dict[str, Any]:
    """The connections as numbers; nothing is run.

    Returns:
        A dict for JSON. `matrix`: strength of every connection, `[source, target]`; with scalar connections with its
        sign, otherwise the Frobenius norm of `M_ij`. `order`: slots clustered by their connections. Over all i ≠ j:
        `sparsity`: share of strengths below each multiple of the median strength; `entropy`: of the strengths' shares,
        divided by the logarithm of their number, 1 where all are equal; `positive_share`: of the scalars, or of the
        matrices' traces; `rank`: effective rank, of the matrices or with scalar connections of the one matrix of all;
        `energy_by_rank`: share of `Σ ‖M_ij‖²` that the best approximations of each rank keep. `orthogonality_error`:
        the penalty of the training loss before its weight, exactly.
    """
    connections, config = connections_of(model), model.config
    matrix = connections.connection_matrix().float().cpu().numpy()
    num_slots = len(matrix)
    others = ~np.eye(num_slots, dtype=bool)
    strengths = np.abs(matrix)
    values = strengths[others].astype(np.float64)
    median = float(np.median(values))
    total = values.sum()
    shares = values / total if total > 0 else values
    entropy = float(-(shares * np.log(np.where(shares > 0, shares, 1.0))).sum() / math.log(len(values)))
    if config.connection_type == "scalar":
        signs = matrix[others]
        singular = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)[None]
        pairs = 1
    else:
        signs = traces(connections).cpu().numpy()[others]
        indices = np.argwhere(others)
        picked = indices[np.unique(np.linspace(0, len(indices) - 1, min(MAX_PAIRS, len(indices))).astype(int))]
        sources, targets = torch.from_numpy(picked.T.copy()).to(connections.source_weight.device)
        singular = torch.linalg.svdvals(pair_cores(connections, sources, targets)).cpu().numpy()
        pairs = len(picked)
    energy = np.cumsum((singular**2).sum(axis=0))
    return {
        "connection_type": config.connection_type,
        "num_slots": num_slots,
        "connection_rank": config.connection_rank,
        "matrix": [[float(f"{entry:.5g}") for entry in row] for row in matrix],
        "order": clustered_order(strengths),
        "median_strength": median,
        "mean_strength": float(values.mean()),
        "max_strength": float(values.max()),
        "sparsity": [
            {"relative_threshold": threshold, "share": float((values < threshold * median).mean())}
            for threshold in RELATIVE_THRESHOLDS
        ],
        "entropy": entropy,
        "orthogonality_error": float(connections.orthogonality_penalty()),
        "positive_share": float((signs > 0).mean()),
        "negative_share": float((signs < 0).mean()),
        "rank": {**effective_rank(singular), "of_pairs": pairs},
        "energy_by_rank": [float(share) for share in energy / energy[-1]] if energy[-1] > 0 else [],
    }


def batches_of(
    features: Sequence[Mapping[str, Any]], pad_token_id: int, batch_size: int, device: torch.device
) -> list[dict[str, torch.Tensor]]:
    """Encoded examples, of which `input_ids` are used, as batches padded on the right."""
    batches = []
    for start in range(0, len(features), batch_size):
        rows = [list(feature["input_ids"]) for feature in features[start : start + batch_size]]
        width = max(map(len, rows))
        ids = torch.tensor([row + [pad_token_id] * (width - len(row)) for row in rows], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


@torch.no_grad()
def reasoning_patterns(
    model: PreTrainedModel,
    features: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase | None = None,
    batch_size: int = 32,
    max_reasoning_steps: int | None = None,
    trajectories: int = 6,
) -> dict[str, Any]:
    """How the slots reason about given inputs.

    Args:
        model: a Connection Transformer with any head.
        features: encoded examples; `input_ids` of each are read, without padding.
        tokenizer: gives the tokens' texts; without it their numbers stand for them.
        batch_size: examples at a time; changes nothing about the result.
        max_reasoning_steps: bound on the steps, by default the configuration's.
        trajectories: number of examples whose paths are kept.

    Returns:
        A dict for JSON. `steps`: number of examples by steps taken, their mean, `early_share`: share that stopped
        before the bound, `efficiency`: bound divided by mean. `change`: for each step quantiles over the examples that
        took it of the state's change relative to the new state. `activity`: mean length of each slot's update by step,
        over the examples that took the step, `[slot][step]`, for the steps that any took. `slots`: for each slot the
        entropy of the weight with which it reads the kinds of tokens, divided by the logarithm of their number (0: one
        kind only, 1: all alike), and the kinds that it reads most beyond their frequency. `trajectories`: states
        before the first and after each step taken, mean over the slots, on the two main axes of all examples' states.
    """
    if not features:
        raise UserError("features: the analysis of the reasoning needs at least one example")
    config, encoder = model.config, encoder_of(model)
    bound = config.max_reasoning_steps if max_reasoning_steps is None else max_reasoning_steps
    was_training = model.training
    model.eval()
    steps: list[int] = []
    changes: list[list[float]] = [[] for _ in range(bound)]
    activity = np.zeros((config.num_slots, bound))
    taken = np.zeros(bound)
    weight_by_token = np.zeros((config.num_slots, config.vocab_size))
    tokens_seen = np.zeros(config.vocab_size)
    paths: list[np.ndarray] = []
    try:
        for batch in batches_of(features, config.pad_token_id or 0, batch_size, encoder.device):
            outputs = encoder(
                **batch,
                max_reasoning_steps=bound,
                output_hidden_states=True,
                output_slot_updates=True,
                output_compression_weights=True,
            )
            used = outputs.reasoning_steps.cpu().numpy()
            states = torch.stack(outputs.hidden_states).double()
            relative = (states[1:] - states[:-1]).flatten(2).norm(dim=-1) / states[1:].flatten(2).norm(dim=-1)
            lengths = torch.stack(outputs.slot_updates).double().norm(dim=-1).cpu().numpy()
            for step in range(bound):
                took = used > step
                changes[step] += relative[step].cpu().numpy()[took].tolist()
                activity[:, step] += lengths[step][took].sum(axis=0)
                taken[step] += took.sum()
            means = states.mean(dim=2).cpu().numpy()
            paths += [means[: count + 1, row] for row, count in enumerate(used)]
            steps += used.tolist()
            weights = outputs.compression_weights[0].double() * batch["attention_mask"].unsqueeze(-1)
            ids = batch["input_ids"].flatten().cpu().numpy()
            real = batch["attention_mask"].flatten().cpu().numpy() > 0
            np.add.at(weight_by_token.T, ids[real], weights.flatten(0, 1).cpu().numpy()[real])
            np.add.at(tokens_seen, ids[real], 1.0)
    finally:
        model.train(was_training)
    counts = np.bincount(steps, minlength=bound + 1)[1:]
    return {
        "examples": len(steps),
        "bound": bound,
        "halting": config.halting,
        "halting_threshold": config.halting_threshold,
        "steps": {
            "histogram": [{"steps": step + 1, "examples": int(count)} for step, count in enumerate(counts)],
            "mean": float(np.mean(steps)),
            "early_share": float(np.mean(np.array(steps) < bound)),
            "efficiency": bound / float(np.mean(steps)),
        },
        "change": [
            {"step": step + 1, "examples": len(values), **_quantiles(values)} for step, values in enumerate(changes)
        ],
        "activity": (activity[:, taken > 0] / taken[taken > 0]).round(6).tolist(),
        "slots": _specialisation(weight_by_token, tokens_seen, tokenizer),
        "trajectories": _main_axes(paths, steps, trajectories),
    }


def _quantiles(values: Sequence[float]) -> dict[str, float | None]:
    names = ("low", "lower", "median", "upper", "high")
    if not values:
        return dict.fromkeys(names)
    return dict(zip(names, map(float, np.quantile(values, [0.05, 0.25, 0.5, 0.75, 0.95])), strict=True))


def _specialisation(
    weights: np.ndarray, seen: np.ndarray, tokenizer: PreTrainedTokenizerBase | None
) -> list[dict[str, Any]]:
    """What each slot reads, from its weight on each kind of token."""
    kinds = np.flatnonzero(seen)
    weights, frequency = weights[:, kinds], seen[kinds] / seen.sum()
    texts = [str(kind) for kind in kinds]
    if tokenizer is not None:
        texts = [str(text) for text in tokenizer.convert_ids_to_tokens(kinds.tolist())]
    slots = []
    for row in weights:
        share = row / row.sum() if row.sum() > 0 else frequency
        entropy = -(share * np.log(np.where(share > 0, share, 1.0))).sum() / max(math.log(len(kinds)), 1e-12)
        excess = share / frequency
        most = np.argsort(-excess, kind="stable")[:3]
        slots.append(
            {
                "entropy": float(entropy) if len(kinds) > 1 else 0.0,
                "reads_most": [{"token": texts[index], "times_its_share": float(excess[index])} for index in most],
            }
        )
    return slots


def _main_axes(paths: Sequence[np.ndarray], steps: Sequence[int], count: int) -> dict[str, Any]:
    """Paths of some examples, with different numbers of steps where there are, on the two main axes of all paths."""
    points = np.concatenate(paths)
    centre = points.mean(axis=0)
    _, singular, axes = np.linalg.svd(points - centre, full_matrices=False)
    energy = (singular**2).sum()
    by_steps: dict[int, list[int]] = {}
    for index, taken in enumerate(steps):
        by_steps.setdefault(taken, []).append(index)
    chosen: list[int] = []
    while len(chosen) < min(count, len(paths)):
        for group in by_steps.values():
            if group and len(chosen) < count:
                chosen.append(group.pop(0))
    return {
        "explained": [float(value**2 / energy) if energy > 0 else 0.0 for value in singular[:2]],
        "paths": [
            {
                "example": index,
                "steps": int(steps[index]),
                "points": ((paths[index] - centre) @ axes[:2].T).round(6).tolist(),
            }
            for index in sorted(chosen)
        ],
    }


def analyse(
    model: PreTrainedModel,
    features: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase | None = None,
    **options: Any,
) -> dict[str, Any]:
    """[`connection_structure`] and [`reasoning_patterns`] of a model, as `connection_analysis.json` holds them."""
    return {
        "schema_version": SCHEMA_VERSION,
        "connections": connection_structure(model),
        "reasoning": reasoning_patterns(model, features, tokenizer, **options),
    }


def connection_figure(connections: Mapping[str, Any]) -> "Figure":
    """The connections: matrix with the slots clustered, strengths, sparsity by threshold, energy by rank."""
    order = connections["order"]
    matrix = np.array(connections["matrix"])[np.ix_(order, order)]
    signed = connections["connection_type"] == "scalar"
    values = matrix[~np.eye(len(matrix), dtype=bool)]
    figure = new_figure(12, 7)
    left, right = figure.subfigures(1, 2, width_ratios=[1.35, 1], squeeze=False)[0]
    axes = left.subplots()
    largest = float(np.abs(values).max()) or 1.0
    limits = {"vmin": -largest, "vmax": largest, "cmap": "RdBu_r"} if signed else {"vmin": 0, "vmax": largest}
    image = axes.imshow(matrix, interpolation="nearest", **limits)
    axes.set_xlabel("target slot, clustered")
    axes.set_ylabel("source slot, clustered")
    axes.set_title(f"{connections['connection_type']} connections of {len(matrix)} slots")
    if len(order) <= 40:
        axes.set_xticks(range(len(order)), order, fontsize=6, rotation=90)
        axes.set_yticks(range(len(order)), order, fontsize=6)
    left.colorbar(image, ax=axes, shrink=0.8, label="connection" if signed else "strength (Frobenius norm)")
    strengths, sparsity, energy = right.subplots(3, 1)
    strengths.hist(values, bins=60, color="#555555")
    strengths.set_xlabel("connection" if signed else "strength")
    strengths.set_ylabel("pairs")
    kind = "values" if signed else "traces"
    strengths.set_title(
        f"{kind}: {connections['positive_share']:.0%} positive; H / ln n = {connections['entropy']:.3f}; "
        f"orthogonality error {connections['orthogonality_error']:.3g}",
        fontsize=9,
    )
    thresholds = [entry["relative_threshold"] for entry in connections["sparsity"]]
    sparsity.semilogx(thresholds, [entry["share"] for entry in connections["sparsity"]], "o-", color=COLOURS[2])
    sparsity.set_xlabel("threshold, relative to the median strength")
    sparsity.set_ylabel("share of pairs below")
    sparsity.set_ylim(-0.03, 1.03)
    sparsity.grid(alpha=0.3)
    shares = connections["energy_by_rank"]
    energy.plot(range(1, len(shares) + 1), shares, "o-" if len(shares) <= 64 else "-", markersize=3, color=COLOURS[1])
    energy.set_xlabel("rank" if not signed else "rank of the matrix of all connections")
    energy.set_ylabel("share of the energy kept")
    energy.set_ylim(-0.03, 1.03)
    whole_numbers(energy.xaxis)
    energy.grid(alpha=0.3)
    rank = connections["rank"]
    energy.set_title(
        f"effective rank {rank['entropy']:.1f}, {rank['counted']:.1f} above {RANK_CUTOFF:.0%} of the largest",
        fontsize=9,
    )
    return figure


def reasoning_figure(reasoning: Mapping[str, Any]) -> "Figure":
    """The reasoning: change per step, steps taken, activity of the slots, paths."""
    figure = new_figure(12, 8)
    (change, steps), (activity, paths) = figure.subplots(2, 2)
    taken = [entry for entry in reasoning["change"] if entry["examples"]]
    places = [entry["step"] for entry in taken]
    change.fill_between(
        places,
        [entry["low"] for entry in taken],
        [entry["high"] for entry in taken],
        alpha=0.2,
        color=COLOURS[0],
        linewidth=0,
        label="5 to 95 % of the examples",
    )
    change.plot(places, [entry["median"] for entry in taken], "o-", color=COLOURS[0], label="median")
    if reasoning["halting"] == "state_change":
        change.axhline(reasoning["halting_threshold"], color="black", linestyle="--", linewidth=1, label="threshold")
    change.set_yscale("log")
    change.set_xlabel("step")
    change.set_ylabel("change of the state, relative")
    change.legend(fontsize=8)
    change.grid(alpha=0.3)
    whole_numbers(change.xaxis)
    counts = reasoning["steps"]["histogram"]
    steps.bar([entry["steps"] for entry in counts], [entry["examples"] for entry in counts], color=COLOURS[2])
    steps.set_xlabel(f"steps taken, of at most {reasoning['bound']}")
    steps.set_ylabel("examples")
    whole_numbers(steps.xaxis)
    steps.set_title(
        f"mean {reasoning['steps']['mean']:.2f}; {reasoning['steps']['early_share']:.0%} stopped early", fontsize=10
    )
    lengths = np.array(reasoning["activity"])
    order = np.argsort(-lengths.sum(axis=1), kind="stable")
    image = activity.imshow(
        lengths[order].T,
        aspect="auto",
        interpolation="nearest",
        origin="lower",
        extent=(-0.5, len(lengths) - 0.5, 0.5, lengths.shape[1] + 0.5),
    )
    activity.set_xlabel("slot, most active first")
    activity.set_ylabel("step")
    whole_numbers(activity.yaxis)
    figure.colorbar(image, ax=activity, label="mean length of the update")
    for path in reasoning["trajectories"]["paths"]:
        points = np.array(path["points"])
        (line,) = paths.plot(points[:, 0], points[:, 1], ".-", linewidth=1, label=f"{path['steps']} steps")
        paths.plot(*points[0], "o", color=line.get_color(), markerfacecolor="white")
        paths.plot(*points[-1], "s", color=line.get_color())
    first, second = (f"{share:.0%}" for share in [*reasoning["trajectories"]["explained"], 0.0, 0.0][:2])
    paths.set_xlabel(f"first main axis ({first} of the variance)")
    paths.set_ylabel(f"second main axis ({second})")
    paths.set_title("mean state of the slots: from circle to square", fontsize=10)
    paths.legend(fontsize=7)
    return figure


def slot_figure(reasoning: Mapping[str, Any]) -> "Figure":
    """What each slot reads: activity and entropy of all, and the tokens of the most specialised ones."""
    slots = reasoning["slots"]
    figure = new_figure(12, 5)
    scatter, table = figure.subplots(1, 2)
    lengths = np.array(reasoning["activity"]).mean(axis=1)
    scatter.scatter(lengths, [slot["entropy"] for slot in slots], s=14, color=COLOURS[3])
    scatter.set_xlabel("mean length of the slot's updates")
    scatter.set_ylabel("entropy over kinds of tokens, 1 = no preference")
    scatter.set_ylim(-0.03, 1.05)
    scatter.grid(alpha=0.3)
    special = sorted(range(len(slots)), key=lambda index: slots[index]["entropy"])[:12]
    for index in special[:6]:
        scatter.annotate(str(index), (lengths[index], slots[index]["entropy"]), fontsize=7)
    cells = [
        [
            str(index),
            f"{slots[index]['entropy']:.2f}",
            ",  ".join(
                f"{printable(entry['token'], 14)} ({entry['times_its_share']:.1f}x)"
                for entry in slots[index]["reads_most"]
            ),
        ]
        for index in special
    ]
    table.axis("off")
    drawn = table.table(
        cells,
        colLabels=["slot", "entropy", "reads most, against the tokens' own share"],
        colWidths=[0.08, 0.12, 0.8],
        loc="center",
        cellLoc="left",
    )
    drawn.auto_set_font_size(False)
    drawn.set_fontsize(8)
    drawn.scale(1, 1.4)
    table.set_title("the most specialised slots", fontsize=10)
    return figure


def figures(analysis: Mapping[str, Any]) -> dict[str, "Figure"]:
    """All pictures of an analysis, by file name."""
    return {
        "connections.png": connection_figure(analysis["connections"]),
        "reasoning.png": reasoning_figure(analysis["reasoning"]),
        "slots.png": slot_figure(analysis["reasoning"]),
    }


def write_figures(analysis: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write the pictures of an analysis into a folder."""
    paths = []
    for name, figure in figures(analysis).items():
        save_figure(figure, folder / name)
        paths.append(folder / name)
    return paths


def write_connection_analysis(
    model: PreTrainedModel,
    features: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    examples: int = 256,
    **options: Any,
) -> dict[str, Any]:
    """Analyse a model on the first examples, and write `connection_analysis.json` and the pictures drawn from it.

    Args:
        model, features, tokenizer, options: as for [`analyse`].
        folder: where to; created if need be.
        examples: number of examples at most.
    """
    folder.mkdir(parents=True, exist_ok=True)
    first = [features[index] for index in range(min(examples, len(features)))]
    analysis = analyse(model, first, tokenizer, **options)
    text = json_text(analysis)
    write_text(folder / FILE_NAME, text)
    write_figures(json.loads(text), folder)
    return analysis


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the pictures of an analysis again. Returns the exit code: 0, 2 for a mistake the user can mend, 130 for
    Ctrl-C."""

    def work() -> int:
        parser = CommandParser(
            prog="python -m trainers.connection_analysis", description="Draw the pictures of an analysis again."
        )
        parser.add_argument("file", type=Path, help=f"a run's internals/{FILE_NAME}")
        path = parser.parse_args(argv).file
        try:
            analysis = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path}: cannot be read: {one_line(error)}") from error
        version = analysis.get("schema_version") if isinstance(analysis, dict) else None
        if version != SCHEMA_VERSION:
            raise UserError(f"{path}: schema_version is {version!r}; this version draws {SCHEMA_VERSION}")
        for written in write_figures(analysis, path.parent):
            print(written)
        return 0

    return run_command(work)


if __name__ == "__main__":
    sys.exit(main())
