"""The report of an analysis as plain numbers: nine sections, every threshold stated beside what it decides."""

import heapq
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from .coupling import SCHEMA_VERSION, Coupling
from .pieces import KnowledgePiece

HIGH_COUPLING = 0.4
LOW_COUPLING = 0.1
TOP_PAIRS = 10
MAX_EXPERIMENTS = 5
PERMUTATIONS = 1000
MOST_REPORTED = 1500  # pieces; of more, a sample is tested and drawn


def make_report(
    coupling: Coupling,
    metadata: dict[str, Any] | None = None,
    device: dict[str, Any] | None = None,
    files: Sequence[str] = (),
    high: float = HIGH_COUPLING,
    low: float = LOW_COUPLING,
    max_pairs: int = 1000,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> dict[str, Any]:
    """The report as plain values, ready for JSON.

    Pairs are unordered, each counted once, and never a piece with itself. Pairs with a zero gradient have no coupling
    and are counted apart. Of more than 1,500 pieces the counts of pairs, their mean, standard deviation and extremes
    and the list of high pairs take in all; everything else is that of a drawn sample, as the report says.

    Args:
        coupling: the result to report; pieces of text add questions, categories and comparisons of groups.
        metadata: model, data set and settings, as the caller knows them.
        device: what the computation ran on and took.
        files: names of the files written beside the report.
        high: pairs with at least this coupling are high.
        low: pairs below this are low; those between are moderate.
        max_pairs: the list of high pairs ends after so many; their count does not.
        permutations: of the group labels, for each permutation test.
        seed: of the permutations.

    Returns:
        `schema_version` and the sections `metadata`, `knowledge_pieces`, `gradient_analysis`, `coupling_analysis`,
        `high_coupling_pairs`, `cross_pot_analysis`, `generated_files`, `gpu_performance`, `experiment_readiness`.
    """
    count = len(coupling.piece_ids)
    everything, coupling = coupling, representatives(coupling, seed)
    matrix = coupling.matrix
    first, second = np.triu_indices(len(matrix), 1)
    values = matrix[first, second]
    known = ~np.isnan(values)
    first, second, values = first[known], second[known], values[known]
    pairs = _high_pairs(coupling, first, second, values, high)
    report: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "metadata": {"pieces": count, "answer": coupling.answer, "layers": coupling.layers, **(metadata or {})},
        "knowledge_pieces": _pieces(coupling),
        "gradient_analysis": _gradients(coupling),
        "coupling_analysis": {
            "thresholds": {"high": f"coupling >= {high}", "moderate": f"{low} <= coupling < {high}", "low": f"< {low}"},
            "total_pairs": len(values),
            "undefined_pairs": int((~known).sum()),
            "high_pairs": int((values >= high).sum()),
            "moderate_pairs": int(((values >= low) & (values < high)).sum()),
            "low_pairs": int((values < low).sum()),
            "high_ratio": float((values >= high).mean()) if len(values) else None,
            **summary(values),
            "balanced": _balanced(coupling, first, second, values),
            "same_answer": _same_answer(coupling, first, second, values),
        },
        "high_coupling_pairs": {
            "threshold": high,
            "count": len(pairs),
            "listed": min(len(pairs), max_pairs),
            "pairs": [pair[:3] for pair in pairs[:max_pairs]],
            "top": [_described(coupling, *pair) for pair in pairs[:TOP_PAIRS]],
        },
        "cross_pot_analysis": _groups(coupling, high, permutations, seed),
        "generated_files": list(files),
        "gpu_performance": {**(device or {}), **coupling.cost},
        "experiment_readiness": _experiments(coupling, pairs, high),
    }
    if coupling is not everything:
        report["metadata"]["sampled_pieces"] = len(matrix)
        report["knowledge_pieces"]["count"] = count
        report["gradient_analysis"]["gradients"] = count
        counted, highest = _all_pairs(everything.matrix, high, low, max_pairs)
        report["coupling_analysis"] |= counted
        pairs = [(everything.piece_ids[i], everything.piece_ids[j], value) for value, i, j in highest]
        report["high_coupling_pairs"] |= {
            "count": counted["high_pairs"],
            "listed": len(pairs),
            "pairs": pairs,
            "top": [_described(everything, *pair) for pair in pairs[:TOP_PAIRS]],
        }
    return report


def representatives(coupling: Coupling, seed: int = 0) -> Coupling:
    """The same result, or that of a drawn sample of 1,500 pieces where there are more."""
    count = len(coupling.piece_ids)
    if count <= MOST_REPORTED:
        return coupling
    return coupling.subset(np.sort(np.random.default_rng(seed).choice(count, MOST_REPORTED, replace=False)).tolist())


def summary(values: np.ndarray) -> dict[str, float | None]:
    """Mean, standard deviation, quartiles and extremes, NaN left out; `None` where there is no value."""
    names = ("mean", "std", "min", "lower_quartile", "median", "upper_quartile", "max")
    values = values[~np.isnan(values)]
    if not len(values):
        return dict.fromkeys(names)
    quartiles = np.quantile(values, [0, 0.25, 0.5, 0.75, 1])
    return dict(zip(names, [float(values.mean()), float(values.std()), *map(float, quartiles)], strict=True))


def permutation_test(
    matrix: np.ndarray, labels: Sequence[str], permutations: int, seed: int, usable: np.ndarray | None = None
) -> dict[str, Any] | None:
    """Whether couplings within groups exceed those across groups by more than chance.

    The labels are permuted among the pieces; the p-value is the share of permutations, the observed labelling
    included, whose difference of means is at least as large as the observed one (one-sided).

    Args:
        matrix: couplings `(n, n)`; NaN where undefined.
        labels: group of each piece.
        permutations: number of permutations besides the observed labelling.
        seed: of the permutations.
        usable: pairs to look at, a symmetric mask `(n, n)`; default all.

    Returns:
        Counts and summaries within and across, their difference and the p-value; `None` without pairs on both sides.
    """
    first, second = np.triu_indices(len(matrix), 1)
    kept = ~np.isnan(matrix[first, second])
    if usable is not None:
        kept &= usable[first, second]
    first, second = first[kept], second[kept]
    values = matrix[first, second]
    group = np.unique(np.asarray(labels), return_inverse=True)[1]
    within = group[first] == group[second]
    if not within.any() or within.all():
        return None

    def difference(inside: np.ndarray) -> float:
        return values[inside].mean() - values[~inside].mean()

    observed = difference(within)
    generator = np.random.default_rng(seed)
    as_large, done = 1, 1
    for _ in range(permutations):
        shuffled = generator.permutation(group)
        inside = shuffled[first] == shuffled[second]
        if inside.any() and not inside.all():
            done += 1
            as_large += difference(inside) >= observed - 1e-12
    return {
        "groups": int(group.max()) + 1,
        "within": {"pairs": int(within.sum()), **summary(values[within])},
        "across": {"pairs": int((~within).sum()), **summary(values[~within])},
        "difference": float(observed),
        "p_value": float(as_large / done),
        "permutations": done - 1,
        "method": "labels permuted among pieces, one-sided, the observed labelling counted",
    }


def normalised(answer: str) -> str:
    """An answer apart from case, spacing and a final stop."""
    return " ".join(answer.casefold().split()).rstrip(".")


def _pieces(coupling: Coupling) -> dict[str, Any]:
    listed = [
        {
            "piece_id": piece.piece_id,
            "question": piece.question,
            "prompt": piece.prompt,
            "answer": piece.answer,
            "supporting_fact": piece.supporting_fact,
            "category": piece.category,
            "pot": piece.pot,
            "group": piece.group,
            "role": piece.role,
            "log_prob": float(log_prob),
            "gradient_norm": float(norm),
        }
        for piece, log_prob, norm in zip(coupling.pieces, coupling.log_probs, coupling.gradient_norms, strict=False)
    ]
    return {
        "count": len(coupling.piece_ids),
        "categories": dict(Counter(piece.category for piece in coupling.pieces).most_common()),
        "roles": dict(Counter(piece.role for piece in coupling.pieces).most_common()),
        "pieces": listed or [{"piece_id": name} for name in coupling.piece_ids],
    }


def _gradients(coupling: Coupling) -> dict[str, Any]:
    shares = coupling.layer_shares
    order = np.argsort(-shares)
    reached = np.cumsum(shares[order])
    diagonal = np.diagonal(coupling.matrix)
    return {
        "gradients": len(coupling.piece_ids),
        "dimension": coupling.dimension,
        "target_layers": len(coupling.layers),
        "layer_names": coupling.layers,
        "stream": coupling.stream,
        "norm": summary(coupling.gradient_norms),
        "log_prob": summary(coupling.log_probs),
        "zero_gradients": coupling.zero_gradients,
        "largest_diagonal_error": None if np.isnan(diagonal).all() else float(np.nanmax(np.abs(diagonal - 1))),
        "share_of_squared_norm": {name: _number(share) for name, share in zip(coupling.layers, shares, strict=True)},
        "layers_holding_three_quarters": None
        if np.isnan(reached).any()
        else [coupling.layers[index] for index in sorted(order[: int(np.searchsorted(reached, 0.75)) + 1])],
    }


def _all_pairs(
    matrix: np.ndarray, high: float, low: float, most: int
) -> tuple[dict[str, Any], list[tuple[float, int, int]]]:
    """Counts and moments over all pairs, a row at a time, and the `most` highest pairs at or above `high`."""
    total = highs = lows = undefined = 0
    mean = squares = 0.0
    smallest, largest = np.inf, -np.inf
    heap: list[tuple[float, int, int]] = []
    for i in range(len(matrix) - 1):
        row = matrix[i, i + 1 :].astype(float)
        columns = np.flatnonzero(~np.isnan(row))
        undefined += len(row) - len(columns)
        row = row[columns]
        if not len(row):
            continue
        # Mean and squared deviations of two sets from those of each.
        difference = row.mean() - mean
        squares += row.var() * len(row) + difference**2 * total * len(row) / (total + len(row))
        total += len(row)
        mean += difference * len(row) / total
        smallest, largest = min(smallest, row.min()), max(largest, row.max())
        highs += int((row >= high).sum())
        lows += int((row < low).sum())
        for place in np.flatnonzero(row >= (heap[0][0] if len(heap) == most else high)):
            item = (float(row[place]), i, i + 1 + int(columns[place]))
            if len(heap) < most:
                heapq.heappush(heap, item)
            else:
                heapq.heappushpop(heap, item)
    counts = {
        "total_pairs": total,
        "undefined_pairs": undefined,
        "high_pairs": highs,
        "moderate_pairs": total - highs - lows,
        "low_pairs": lows,
        "high_ratio": highs / total if total else None,
    }
    if total:
        counts |= {"mean": mean, "std": float(np.sqrt(squares / total)), "min": float(smallest), "max": float(largest)}
    return counts, sorted(heap, key=lambda item: (-item[0], item[1:]))


def _balanced(coupling: Coupling, first: np.ndarray, second: np.ndarray, values: np.ndarray) -> dict[str, Any] | None:
    if coupling.balanced is None:
        return None
    balanced = coupling.balanced[first, second]
    return {
        "what": "mean over layers of each layer's own cosine",
        **summary(balanced),
        "spearman_with_coupling": _spearman(balanced, values),
    }


def _same_answer(
    coupling: Coupling, first: np.ndarray, second: np.ndarray, values: np.ndarray
) -> dict[str, Any] | None:
    if not coupling.pieces:
        return None
    answers = np.array([normalised(piece.answer) for piece in coupling.pieces])
    same = answers[first] == answers[second]
    return {
        "what": "pairs whose answers are the same text, which raises coupling by itself, apart from the others",
        "same": {"pairs": int(same.sum()), **summary(values[same])},
        "different": {"pairs": int((~same).sum()), **summary(values[~same])},
    }


def _high_pairs(
    coupling: Coupling, first: np.ndarray, second: np.ndarray, values: np.ndarray, high: float
) -> list[tuple[str, str, float]]:
    chosen = np.flatnonzero(values >= high)
    chosen = chosen[np.argsort(-values[chosen], kind="stable")]
    ids = coupling.piece_ids
    return [(ids[first[index]], ids[second[index]], float(values[index])) for index in chosen]


def _described(coupling: Coupling, one: str, other: str, value: float) -> dict[str, Any]:
    described: dict[str, Any] = {"pieces": [one, other], "coupling": value}
    if coupling.pieces:
        both = [coupling.pieces[coupling.index(name)] for name in (one, other)]
        described |= {
            "questions": [piece.question for piece in both],
            "answers": [piece.answer for piece in both],
            "categories": [piece.category for piece in both],
            "same_answer": normalised(both[0].answer) == normalised(both[1].answer),
            "same_pot": both[0].pot == both[1].pot,
        }
    return described


def _groups(coupling: Coupling, high: float, permutations: int, seed: int) -> dict[str, Any] | None:
    if not coupling.pieces:
        return None
    pieces, matrix = coupling.pieces, coupling.matrix
    answers = np.array([normalised(piece.answer) for piece in pieces])
    different = answers[:, None] != answers[None, :]
    pots = np.array([piece.pot for piece in pieces])
    across = (pots[:, None] != pots[None, :]) & np.triu(np.ones_like(different), 1)
    labellings: dict[str, Callable[[KnowledgePiece], str | None]] = {
        "pots": lambda piece: piece.pot,
        "groups": lambda piece: piece.group,
        "categories": lambda piece: piece.category,
    }
    found: dict[str, Any] = {}
    for name, label in labellings.items():
        labels = [value for piece in pieces if (value := label(piece)) is not None]
        if len(labels) < len(pieces):
            found[name] = None  # not every piece has one
            continue
        found[name] = permutation_test(matrix, labels, permutations, seed)
        found[f"{name}_different_answers"] = permutation_test(matrix, labels, permutations, seed, different)
    return {
        "what": "couplings within and across questions (pots), groups and categories; with all pairs, and with those of"
        " different answers only",
        "pots": len(set(pots)),
        "high_pairs_across_pots": int((matrix[across] >= high).sum()),
        "threshold": high,
        "tests": found,
    }


def _experiments(coupling: Coupling, pairs: Sequence[tuple[str, str, float]], high: float) -> dict[str, Any]:
    candidates = pairs
    if coupling.pieces:
        answers = {piece.piece_id: normalised(piece.answer) for piece in coupling.pieces}
        candidates = [pair for pair in pairs if answers[pair[0]] != answers[pair[1]]]
    return {
        "ready": bool(candidates),
        "rule": f"pairs with coupling >= {high} and different answers",
        "candidates": len(candidates),
        "recommended": [pair[:3] for pair in candidates[:MAX_EXPERIMENTS]],
        "next_steps": [
            "edit a piece and measure all others: --validate 12",
            "compare with the balanced matrix, in which every layer counts the same",
        ]
        if candidates
        else ["take more pieces with --max_samples: no pair is above the threshold with two different answers"],
    }


def _spearman(one: np.ndarray, other: np.ndarray) -> float | None:
    kept = ~(np.isnan(one) | np.isnan(other))
    one, other = one[kept], other[kept]
    if len(one) < 3 or np.ptp(one) == 0 or np.ptp(other) == 0:
        return None
    return float(spearmanr(one, other).statistic)


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
