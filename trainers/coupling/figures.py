"""Pictures of a coupling matrix, drawn from its numbers."""

from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.cluster.hierarchy import leaves_list, linkage, optimal_leaf_ordering
from scipy.spatial.distance import squareform

from ..figures import new_figure, printable
from .coupling import Coupling
from .report import HIGH_COUPLING, LOW_COUPLING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_LABELLED = 40
MOST_ORDERED = 300  # optimal leaf ordering takes cubic time


def cluster_order(matrix: np.ndarray) -> np.ndarray:
    """Positions of the pieces such that coupled ones stand side by side: average linkage on 1 - coupling."""
    if len(matrix) < 3:
        return np.arange(len(matrix))
    distance = 1 - np.nan_to_num(matrix, nan=0.0)
    distance = np.clip((distance + distance.T) / 2, 0, None)
    np.fill_diagonal(distance, 0)
    condensed = squareform(distance, checks=False)
    tree = linkage(condensed, "average")
    return leaves_list(optimal_leaf_ordering(tree, condensed) if len(matrix) <= MOST_ORDERED else tree)


def heat_map(coupling: Coupling) -> "Figure":
    """The matrix with pieces ordered by clustering; blue is negative, red positive, grey undefined."""
    order = cluster_order(coupling.matrix)
    size = float(np.clip(len(order) * 0.16, 6, 16))
    figure = new_figure(size + 1.5, size)
    axes = figure.add_subplot()
    axes.set_facecolor("0.7")
    image = axes.imshow(coupling.matrix[np.ix_(order, order)], cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
    figure.colorbar(image, ax=axes, label="coupling (cosine of gradients)", shrink=0.8)
    if len(order) <= MOST_LABELLED:
        names = [_short(coupling.piece_ids[index]) for index in order]
        axes.set_xticks(range(len(order)), names, rotation=90, fontsize=7)
        axes.set_yticks(range(len(order)), names, fontsize=7)
    else:
        axes.set_xlabel("piece, in clustered order")
        axes.set_ylabel("piece, in clustered order")
    axes.set_title(f"Coupling of {len(order)} knowledge pieces")
    return figure


def distribution(coupling: Coupling, high: float = HIGH_COUPLING, low: float = LOW_COUPLING) -> "Figure":
    """How many pairs have which coupling, within one question and across questions, with both thresholds."""
    first, second = np.triu_indices(len(coupling.piece_ids), 1)
    values = coupling.matrix[first, second]
    figure = new_figure(7, 4)
    axes = figure.add_subplot()
    bins = np.linspace(min(-0.2, np.nanmin(values, initial=0)), 1, 61)
    groups = [("all pairs", np.ones(len(values), dtype=bool))]
    if coupling.pieces:
        pots = np.array([piece.pot for piece in coupling.pieces])
        within = pots[first] == pots[second]
        if within.any():
            groups = [("across questions", ~within), ("within a question", within)]
    for name, chosen in groups:
        kept = values[chosen & ~np.isnan(values)]
        if len(kept):
            axes.hist(kept, bins.tolist(), density=True, alpha=0.6, label=f"{name} ({len(kept)} pairs)")
    for threshold, name in ((high, "high"), (low, "low")):
        axes.axvline(threshold, color="0.3", linestyle="--", linewidth=1)
        axes.annotate(name, (threshold, 0.98), xycoords=("data", "axes fraction"), va="top", fontsize=8)
    axes.set_xlabel("coupling (cosine of gradients)")
    axes.set_ylabel("density of pairs")
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    return figure


def ripple_chart(validation: dict[str, Any]) -> "Figure":
    """Measured against predicted ripples, and how far the prediction holds as the edit grows."""
    sizes = validation["sizes"]
    chosen = validation["chosen"]
    figure = new_figure(10, 4.2)
    calibration, validity = figure.subplots(1, 2)
    predicted, measured = (np.array(chosen["pairs"][name]) for name in ("predicted", "measured"))
    limit = max(1e-12, np.abs(np.concatenate([predicted, measured])).max()) * 1.05
    calibration.plot([-limit, limit], [-limit, limit], color="0.6", linewidth=1, label="exact prediction")
    calibration.scatter(predicted, measured, s=6, alpha=0.5)
    calibration.set_xlabel("predicted change of log-probability (nats)")
    calibration.set_ylabel("measured change (nats)")
    calibration.set_title(f"own gain {chosen['own_gain']['median']:.2f} nats, slope {chosen['slope']:.2f}")
    calibration.legend()
    gains = [size["predicted_own_gain"] for size in sizes]
    curves = {"first_order": "first-order prediction", "coupling": "coupling alone"}
    curves |= {name: name.replace("_", " ") for name in sizes[0]["predictions"]}
    for key, label in curves.items():
        validity.plot(
            gains, [size["spearman"][key]["median"] for size in sizes], marker="o", label=f"Spearman, {label}"
        )
    signs = [size["sign_agreement"]["value"] for size in sizes]
    # Hollow and larger, since the prediction's curve often lies under it.
    hollow = {"marker": "s", "markersize": 10, "markerfacecolor": "none", "linestyle": "--"}
    validity.plot(gains, signs, label="share of right signs", **hollow)
    validity.axvspan(0.1, 0.5, color="0.9", label="small edits")
    validity.set_xscale("log")
    validity.set_ylim(-0.1, 1.05)
    validity.set_xlabel("size of the edit: predicted own gain (nats)")
    validity.set_ylabel("median over edits")
    validity.legend(fontsize=8)
    return figure


def _short(text: str, most: int = 24) -> str:
    return printable(text if len(text) <= most else f"…{text[-most + 1 :]}", 4 * most)
