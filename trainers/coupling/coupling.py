"""The result of an analysis: how strongly the gradients of knowledge pieces agree."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from ..errors import UserError
from ..files import replacing
from .pieces import KnowledgePiece

SCHEMA_VERSION = 2


@dataclass(frozen=True)
class Neighbour:
    """A piece beside another, with their coupling."""

    piece_id: str
    coupling: float


@dataclass
class Coupling:
    """Inner products of the gradients g_i = ∇ log P(a_i | q_i) over the target layers, and what follows from them.

    Attributes:
        piece_ids: n ids, the index of every array below.
        layers: names of the L target layers.
        gram_per_layer (`np.ndarray` of shape `(L, n, n)`, *optional*): <g_i, g_j> of each layer, float64; `None` where
            only the sum over layers is known, which is then in `total_gram`.
        log_probs (`np.ndarray` of shape `(n,)`): log P(a_i | q_i) in nats.
        answer: "full" or "first": the answer tokens that were differentiated.
        dimension: numbers in one whole gradient.
        pieces: the pieces, where they were given as text.
        stream: how the inner products were computed; for one that leaves terms out, its error on sampled pairs.
        cost: seconds and bytes that the analysis took, by part.
        total_gram (`np.ndarray` of shape `(n, n)`, *optional*): <g_i, g_j> over all target layers, where `None` stands
            for the sum of `gram_per_layer`.
        squared_norms (`np.ndarray` of shape `(L, n)`, *optional*): |g_i|² of each layer, exact whatever the stream;
            `None` for the diagonals of `gram_per_layer`.
    """

    piece_ids: list[str]
    layers: list[str]
    gram_per_layer: np.ndarray | None
    log_probs: np.ndarray
    answer: str
    dimension: int
    pieces: list[KnowledgePiece] = field(default_factory=list)
    stream: dict[str, Any] = field(default_factory=lambda: {"name": "exact"})
    cost: dict[str, Any] = field(default_factory=dict)
    total_gram: np.ndarray | None = None
    squared_norms: np.ndarray | None = None

    @cached_property
    def gram(self) -> np.ndarray:
        """<g_i, g_j> over all target layers, `(n, n)`."""
        if self.total_gram is not None:
            return self.total_gram
        assert self.gram_per_layer is not None  # one of the two always is
        return self.gram_per_layer.sum(0)

    @cached_property
    def layer_norms(self) -> np.ndarray:
        """|g_i|² of each layer, `(L, n)`."""
        if self.squared_norms is not None:
            return self.squared_norms
        assert self.gram_per_layer is not None  # whose diagonals they then are
        return np.diagonal(self.gram_per_layer, axis1=1, axis2=2)

    @cached_property
    def gradient_norms(self) -> np.ndarray:
        """|g_i| in nats per unit of weight, `(n,)`."""
        return np.sqrt(np.clip(self.layer_norms.sum(0), 0, None))

    @cached_property
    def matrix(self) -> np.ndarray:
        """GradSim: cos(g_i, g_j), `(n, n)`. Rows and columns of a piece whose gradient is zero are NaN."""
        return cosine(self.gram)

    @cached_property
    def balanced(self) -> np.ndarray | None:
        """The mean over layers of each layer's own cosine, `(n, n)`; `None` where single layers are not known.

        A few layers can hold most of the gradient's norm and then decide `matrix` alone; here each layer counts the
        same. A layer in which one of the two gradients is zero is left out of their mean.
        """
        if self.gram_per_layer is None:
            return None
        total, counted = np.zeros_like(self.gram), np.zeros_like(self.gram)
        for gram in self.gram_per_layer:
            layer = cosine(gram)
            defined = ~np.isnan(layer)
            total[defined] += layer[defined]
            counted += defined
        return np.divide(total, counted, out=np.full_like(total, np.nan), where=counted > 0)

    @cached_property
    def layer_shares(self) -> np.ndarray:
        """Share of each layer in the squared gradient norm, mean over pieces, `(L,)`; they sum to 1."""
        squared = self.layer_norms
        total = squared.sum(0)
        shares = squared[:, total > 0] / total[total > 0]
        return shares.mean(1) if shares.size else np.full(len(self.layers), np.nan)

    def subset(self, places: Sequence[int]) -> "Coupling":
        """The same for some of the pieces, given by their positions."""
        chosen = np.asarray(places)
        inside = np.ix_(chosen, chosen)
        return replace(
            self,
            piece_ids=[self.piece_ids[index] for index in chosen],
            pieces=[self.pieces[index] for index in chosen] if self.pieces else [],
            gram_per_layer=None if self.gram_per_layer is None else np.stack([g[inside] for g in self.gram_per_layer]),
            total_gram=None if self.total_gram is None else self.total_gram[inside],
            squared_norms=self.layer_norms[:, chosen],
            log_probs=self.log_probs[chosen],
        )

    @property
    def zero_gradients(self) -> list[str]:
        """Ids of the pieces whose gradient is exactly zero."""
        return [name for name, norm in zip(self.piece_ids, self.gradient_norms, strict=True) if norm == 0]

    def layer_matrix(self, layer: str) -> np.ndarray:
        """The cosine over one target layer alone, `(n, n)`."""
        if layer not in self.layers:
            raise UserError(f"layer {layer!r} is no target; the targets are {', '.join(self.layers)}")
        if self.gram_per_layer is None:
            raise UserError(f"layer {layer!r}: of so many pieces only the sum over layers was kept")
        return cosine(self.gram_per_layer[self.layers.index(layer)])

    def index(self, piece_id: str) -> int:
        """Position of a piece."""
        if piece_id not in self.piece_ids:
            raise UserError(f"piece {piece_id!r} is not among the {len(self.piece_ids)} analysed")
        return self.piece_ids.index(piece_id)

    def neighbours(self, piece_id: str, count: int = 10) -> list[Neighbour]:
        """The pieces most strongly coupled to one, strongest first, itself left out."""
        here = self.index(piece_id)
        row = self.matrix[here]
        order = [other for other in np.argsort(-row, kind="stable") if other != here and not np.isnan(row[other])]
        return [Neighbour(self.piece_ids[other], float(row[other])) for other in order[:count]]

    def ripple(self, piece_id: str, step: float) -> np.ndarray:
        """First-order prediction of the change of every piece's log-probability, in nats, `(n,)`.

        For an edit θ ← θ + ε g_i/|g_i| of the target layers, Δ log P(a_j|q_j) = ε cos(g_i, g_j) |g_j| + O(ε²).

        Args:
            piece_id: the piece that is edited.
            step: ε, the length of the edit in the target weights.
        """
        return self.ripple_matrix(step)[self.index(piece_id)]

    def ripple_matrix(self, step: float) -> np.ndarray:
        """`ripple` for every edited piece (row) and every other (column), `(n, n)`."""
        return step * self.matrix * self.gradient_norms

    def report(self, **facts: Any) -> dict[str, Any]:
        """The numbers of the report; see `trainers.coupling.report.make_report`."""
        from .report import make_report  # the report reads this class

        return make_report(self, **facts)

    def save(self, folder: str | Path) -> Path:
        """Write `coupling.safetensors`: all arrays, with ids and layer names in the metadata. Returns its path.

        Where single layers are not known, the inner products are left out: they follow from cosines and norms.
        """
        path = Path(folder) / "coupling.safetensors"
        tensors = {
            "gradsim": self.matrix,
            "squared_norms": self.layer_norms,
            "gradient_norm": self.gradient_norms,
            "log_prob": self.log_probs,
        }
        if self.gram_per_layer is not None and self.balanced is not None:
            tensors |= {
                "gradsim_balanced": self.balanced,
                "gram": self.gram,
                "gram_per_layer": self.gram_per_layer,
            }
        metadata = {
            "schema_version": str(SCHEMA_VERSION),
            "piece_ids": json.dumps(self.piece_ids, ensure_ascii=False),
            "layers": json.dumps(self.layers),
            "answer": self.answer,
            "stream": json.dumps(self.stream),
            "dimension": str(self.dimension),
        }
        with replacing(path) as aside:
            save_file({name: np.ascontiguousarray(values) for name, values in tensors.items()}, aside, metadata)
        return path

    @classmethod
    def load(cls, path: str | Path, pieces: Sequence[KnowledgePiece] = ()) -> "Coupling":
        """Read what `save` wrote. The pieces' texts are not in the file; give them again if they are needed.

        Raises:
            UserError: for a file that is missing or was not written by `save`.
        """
        from safetensors import SafetensorError, safe_open

        path = Path(path)
        try:
            with safe_open(path, "np") as file:
                metadata = file.metadata() or {}
            tensors = load_file(path)
            return cls(
                piece_ids=json.loads(metadata["piece_ids"]),
                layers=json.loads(metadata["layers"]),
                gram_per_layer=tensors.get("gram_per_layer"),
                total_gram=None if "gram_per_layer" in tensors else _inner_products(tensors),
                squared_norms=tensors["squared_norms"],
                log_probs=tensors["log_prob"],
                answer=metadata["answer"],
                dimension=int(metadata["dimension"]),
                pieces=list(pieces),
                stream=json.loads(metadata["stream"]),
            )
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: cannot be read: {error}") from error
        except KeyError as error:
            raise UserError(f"{path}: holds no {error}; it is not a coupling file") from error


def _inner_products(tensors: dict[str, np.ndarray]) -> np.ndarray:
    norms = tensors["gradient_norm"].astype(tensors["gradsim"].dtype)
    return np.nan_to_num(tensors["gradsim"]) * norms[:, None] * norms


def cosine(gram: np.ndarray) -> np.ndarray:
    """Cosines from inner products; NaN where a norm is zero. The diagonal is computed, not set."""
    norms = np.sqrt(np.clip(np.diagonal(gram), 0, None))
    safe = np.where(norms > 0, norms, np.nan)
    cosines = gram / safe[:, None]
    cosines /= safe[None, :]
    return cosines
