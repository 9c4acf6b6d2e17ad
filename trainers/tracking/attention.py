"""What a map of attention weights says about its heads: statistics, classes, similarity of heads, rollout.

All of it is made of sums over rows (one row = one query of one head), so that parts of a batch, micro-batches and
processes add up to exactly the numbers of the whole. Only rows of real queries that see at least
[`MIN_KEYS`] keys count, and each of them counts alike, whatever the length of its sequence.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

MIN_KEYS = 4
WINDOW = 2
# Heads are sorted by two averages that do not move with the length of the text: relative distance and normalised
# entropy.
LOCAL_DISTANCE = 0.5
DIFFUSE_ENTROPY = 0.8
FOCUSED_ENTROPY = 0.5
HEAD_CLASSES = ("local", "diffuse", "focused", "global")

# name -> (column of the sum, column of the number of rows it runs over)
_COLUMNS = {
    "entropy": (1, 0),
    "normalised_entropy": (2, 0),
    "effective_keys": (3, 0),
    "confidence": (4, 0),
    "corrected_confidence": (5, 0),
    "sink_mass": (6, 0),
    "mean_distance": (7, 0),
    "relative_distance": (8, 0),
    "diagonal": (9, 14),
    "local_mass": (10, 13),
    "previous_token": (11, 12),
}
NUM_COLUMNS = 15
STATISTICS = tuple(_COLUMNS)
_SEEN_WEIGHTED = 4  # distance, diagonal, window, previous: what the weights are multiplied with


@dataclass
class RowGeometry:
    """Which rows of a map count, and where its queries and keys stand. Layers with the same masks share it.

    Attributes:
        visible (`torch.BoolTensor` of shape `(batch, queries, keys)`): keys that each query may attend to.
        used (`torch.BoolTensor` of shape `(batch, queries)`): rows that count.
        keys_seen (`torch.Tensor` of shape `(batch, queries)`): n, the number of visible keys.
        kernels (`torch.Tensor` of shape `(batch, queries, keys, 4)`): distance; 1 on the diagonal; 1 within the
            window; 1 on the previous token.
        uniform (`torch.Tensor` of shape `(batch, queries, 4)`): the kernels' means over the visible keys, which is
            what uniform attention would give.
        first (`torch.LongTensor` of shape `(batch, queries)`): the first visible key.
        has_positions: whether keys stand in an order that distances can be told from.
        is_cross: whether queries and keys are of different sequences.
    """

    visible: torch.Tensor
    used: torch.Tensor
    keys_seen: torch.Tensor
    kernels: torch.Tensor
    uniform: torch.Tensor
    first: torch.Tensor
    has_positions: bool
    is_cross: bool

    @classmethod
    def of(
        cls,
        visible: torch.Tensor,
        real_queries: torch.Tensor | None = None,
        real_keys: torch.Tensor | None = None,
        is_cross: bool = False,
        has_positions: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> "RowGeometry":
        """
        Args:
            visible (`torch.BoolTensor` of shape `(batch, queries, keys)`): what the model's mask leaves visible.
            real_queries (`torch.Tensor` of shape `(batch, queries)`, *optional*): 0 marks padding. All by default.
            real_keys (`torch.Tensor` of shape `(batch, keys)`, *optional*): the same for the keys.
            is_cross: measure distances between positions (i + 0.5) / length, both in [0, 1], with the real lengths of
                query and key sequence; otherwise in tokens.
            has_positions: whether distances mean anything.
            dtype: of the kernels.
        """
        batch, queries, keys = visible.shape
        device = visible.device
        real_queries = torch.ones(batch, queries, device=device) if real_queries is None else real_queries.to(device)
        real_keys = torch.ones(batch, keys, device=device) if real_keys is None else real_keys.to(device)
        visible = visible & real_keys.bool()[:, None]
        seen = visible.sum(-1)
        used = real_queries.bool() & (seen >= MIN_KEYS)
        if is_cross:
            query_places, key_places = (_relative_places(real, dtype) for real in (real_queries, real_keys))
        else:
            # Queries are the last ones of the keys when some were cached.
            query_places = torch.arange(keys - queries, keys, device=device, dtype=dtype).expand(batch, -1)
            key_places = torch.arange(keys, device=device, dtype=dtype).expand(batch, -1)
        offset = query_places[:, :, None] - key_places[:, None]
        distance = offset.abs()
        kernels = torch.stack([distance, offset == 0, distance <= WINDOW, offset == 1], dim=-1).to(dtype)
        n = seen.clamp(min=1).to(dtype)
        uniform = torch.einsum("bqk,bqkm->bqm", visible.to(dtype), kernels) / n[..., None]
        return cls(visible, used, n, kernels, uniform, visible.int().argmax(-1), has_positions, is_cross)


def _relative_places(real: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    real = real.to(dtype)
    return (real.cumsum(-1) - 0.5) / real.sum(-1, keepdim=True).clamp(min=1)


def attention_sums(weights: torch.Tensor, geometry: RowGeometry) -> torch.Tensor:
    """The statistics of every head, summed over the rows that count.

    Args:
        weights (`torch.Tensor` of shape `(batch, heads, queries, keys)`): attention weights; 0 on hidden keys.
        geometry: of the same batch.

    Returns:
        `torch.DoubleTensor` of shape `(heads, NUM_COLUMNS)` (single precision on devices without double): sums to be
        added up and handed to [`attention_summary`].
    """
    used = geometry.used[:, None]
    n = geometry.keys_seen[:, None]
    entropy = torch.special.entr(weights).sum(-1)
    confidence = weights.amax(-1)
    sink = weights.gather(-1, geometry.first[:, None, :, None].expand(-1, weights.shape[1], -1, -1))[..., 0]
    # One product for all four: (batch, queries, heads, keys) x (batch, queries, keys, 4).
    weighted = torch.matmul(weights.transpose(1, 2), geometry.kernels).permute(3, 0, 2, 1)
    distance, diagonal, window, previous = weighted
    uniform_distance, _, uniform_window, _ = geometry.uniform.permute(2, 0, 1)[:, :, None]
    beyond_window = used & (uniform_window < 1)
    has_previous = used & (geometry.uniform[:, None, :, 3] > 0)
    has_diagonal = used & (geometry.uniform[:, None, :, 1] > 0)
    everywhere = torch.ones_like(entropy, dtype=torch.bool)
    columns = [
        (torch.ones_like(entropy), used),
        (entropy, used),
        (entropy / n.clamp(min=2).log(), used),
        (entropy.exp(), used),
        (confidence, used),
        ((confidence - 1 / n) / (1 - 1 / n).clamp(min=1e-9), used),
        (sink, used),
        (distance, used),
        (distance / uniform_distance.clamp(min=1e-9), used),
        (diagonal, has_diagonal),
        ((window - uniform_window) / (1 - uniform_window).clamp(min=1e-9), beyond_window),
        (previous, has_previous),
        (everywhere.to(entropy.dtype), has_previous),
        (everywhere.to(entropy.dtype), beyond_window),
        (everywhere.to(entropy.dtype), has_diagonal),
    ]
    per_row = torch.stack([value.masked_fill(~rows, 0) for value, rows in columns], dim=-1)
    if not geometry.has_positions:
        per_row[..., 7:] = 0
    elif geometry.is_cross:
        per_row[..., 9:] = 0  # fractions of two lengths have no neighbours
    return per_row.to(wide(per_row)).sum((0, 2))


def wide(values: torch.Tensor) -> torch.dtype:
    """Double precision where the device has it."""
    return torch.float32 if values.device.type == "mps" else torch.float64


def attention_summary(sums: np.ndarray) -> dict[str, Any]:
    """Averages over rows from [`attention_sums`].

    Args:
        sums (array of shape `(heads, NUM_COLUMNS)`).

    Returns:
        `rows` (number of rows that counted), each of [`STATISTICS`] as a list with a number per head (`None` where no
        row has one: neighbours in cross-attention, distances to keys without an order), and `class`, `range` and
        `sharpness` of each head. Entropies in nats, distances in tokens, or in fractions of the length in
        cross-attention.
    """
    summary: dict[str, Any] = {"rows": int(sums[0, 0])}
    has_distance = bool(np.any(sums[:, 8] != 0)) or bool(np.any(sums[:, 14] > 0))
    for name, (column, count) in _COLUMNS.items():
        missing = name in ("mean_distance", "relative_distance") and not has_distance
        summary[name] = [float(row[column] / row[count]) if row[count] > 0 and not missing else None for row in sums]
    pairs = list(zip(summary["normalised_entropy"], summary["relative_distance"], strict=True))
    summary["class"] = [head_class(entropy, distance) for entropy, distance in pairs]
    summary["range"] = [
        None if distance is None else "local" if distance <= LOCAL_DISTANCE else "far" for _, distance in pairs
    ]
    summary["sharpness"] = [sharpness(entropy) for entropy, _ in pairs]
    return summary


def head_class(normalised_entropy: float | None, relative_distance: float | None) -> str | None:
    """One of local, diffuse, focused and global, from a head's averages; `None` without any row."""
    if normalised_entropy is None or not math.isfinite(normalised_entropy):
        return None
    if relative_distance is not None and relative_distance <= LOCAL_DISTANCE:
        return "local"
    kind = sharpness(normalised_entropy)
    return "global" if kind == "mixed" else kind


def sharpness(normalised_entropy: float | None) -> str | None:
    """How a head spreads its attention: focused (on few keys), mixed or diffuse."""
    if normalised_entropy is None or not math.isfinite(normalised_entropy):
        return None
    if normalised_entropy >= DIFFUSE_ENTROPY:
        return "diffuse"
    return "focused" if normalised_entropy <= FOCUSED_ENTROPY else "mixed"


def attention_statistics(
    weights: torch.Tensor,
    visible: torch.Tensor | None = None,
    real_queries: torch.Tensor | None = None,
    real_keys: torch.Tensor | None = None,
    is_cross: bool = False,
) -> dict[str, Any]:
    """The statistics of a map of attention weights.

    Args:
        weights (`torch.Tensor` of shape `(batch, heads, queries, keys)`): attention weights.
        visible (`torch.BoolTensor` of shape `(batch, queries, keys)`, *optional*): `False` on keys that are masked, for
            instance later ones. All keys by default.
        real_queries, real_keys (`torch.Tensor` of shape `(batch, queries)` and `(batch, keys)`, *optional*): 0 on
            padding.
        is_cross: whether queries and keys are of different sequences.

    Returns:
        See [`attention_summary`].
    """
    if visible is None:
        visible = torch.ones(weights.shape[0], *weights.shape[2:], dtype=torch.bool, device=weights.device)
    geometry = RowGeometry.of(visible, real_queries, real_keys, is_cross, dtype=weights.dtype)
    return attention_summary(attention_sums(weights, geometry).cpu().numpy())


def divergence_sums(weights: torch.Tensor, used: torch.Tensor, most_rows: int | None = None) -> torch.Tensor:
    """Jensen-Shannon divergences between the heads' rows, base 2, summed over rows.

    Args:
        weights (`torch.Tensor` of shape `(batch, heads, queries, keys)`): attention weights.
        used (`torch.BoolTensor` of shape `(batch, queries)`): rows that count.
        most_rows: take at most so many rows, evenly spread; the cost grows with the square of the number of heads.

    Returns:
        Tensor of shape `(heads, heads + 1)`: the sums, and in the last column the number of rows.
    """
    heads = weights.shape[1]
    rows = used.nonzero()
    if most_rows is not None and len(rows) > most_rows:
        spread = torch.linspace(0, len(rows) - 1, most_rows, dtype=torch.float64).round().long()
        rows = rows[spread.to(rows.device)]
    chosen = weights[rows[:, 0], :, rows[:, 1]]  # (rows, heads, keys)
    first, second = torch.triu_indices(heads, heads, 1, device=weights.device)
    mixed = torch.special.entr((chosen[:, first] + chosen[:, second]) / 2).sum(-1)
    entropy = torch.special.entr(chosen).sum(-1)
    divergence = (mixed - (entropy[:, first] + entropy[:, second]) / 2) / math.log(2)
    sums = torch.zeros(heads, heads + 1, dtype=wide(weights), device=weights.device)
    total = divergence.clamp(min=0).to(sums.dtype).sum(0)
    sums[first, second] = total
    sums[second, first] = total
    sums[:, -1] = len(rows)
    return sums


def head_similarity(sums: np.ndarray) -> list[list[float | None]]:
    """1 - the average Jensen-Shannon divergence between heads, from [`divergence_sums`]: 1 alike, 0 disjoint."""
    rows = sums[0, -1]
    if rows == 0:
        return [[None] * len(sums) for _ in sums]
    return (1 - sums[:, :-1] / rows).tolist()


def attention_rollout(maps: Sequence[torch.Tensor], real: torch.Tensor | None = None) -> torch.Tensor:
    """How much of each input position reaches each position of the last layer, if only attention carried it.

    Abnar and Zuidema 2020 (arXiv:2005.00928), section 3: A_l = (mean over heads of P_l + I) / 2 with rows renormalised,
    rollout = A_L ... A_1. It ignores values and feed-forward networks.

    Args:
        maps: per layer, attention weights `(batch, heads, length, length)`, the first layer first.
        real (`torch.Tensor` of shape `(batch, length)`, *optional*): 0 on padding, whose rows stay the identity.

    Returns:
        Tensor of shape `(batch, length, length)`, whose rows sum to 1.
    """
    identity = torch.eye(maps[0].shape[-1], dtype=maps[0].dtype, device=maps[0].device)
    rolled = identity.expand(maps[0].shape[0], -1, -1)
    for weights in maps:
        layer = (weights.mean(1) + identity) / 2
        layer = layer / layer.sum(-1, keepdim=True)
        if real is not None:
            layer = torch.where(real.bool()[:, :, None], layer, identity)
        rolled = layer @ rolled
    return rolled


def source_relevance(
    encoder: Sequence[torch.Tensor],
    decoder: Sequence[torch.Tensor],
    cross: Sequence[torch.Tensor],
    real_source: torch.Tensor | None = None,
    real_target: torch.Tensor | None = None,
) -> torch.Tensor:
    """Relevance of each source position for each target position: decoder rollout x mean cross-attention x encoder
    rollout, of shape `(batch, target, source)`; its rows sum to 1. What [`attention_rollout`] ignores, this does too.
    """
    middle = torch.stack([weights.mean(1) for weights in cross]).mean(0)
    return attention_rollout(decoder, real_target) @ middle @ attention_rollout(encoder, real_source)


def class_counts(summaries: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """How many heads fall into each class, over all attention modules."""
    found = [name for summary in summaries.values() for name in summary.get("class", [])]
    return {name: found.count(name) for name in HEAD_CLASSES}
