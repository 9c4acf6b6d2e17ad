"""From a model and knowledge pieces to their coupling."""

import itertools
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..errors import UserError
from .capture import AnswerTokens, Capture, LayerTerms, RowsLostError
from .coupling import SCHEMA_VERSION, Coupling, cosine
from .encoding import EncodedPiece, check_encoded, encode_pieces
from .gram import layer_gram, squared_norms
from .layers import TargetLayer, find_layers, linear_shape
from .pieces import KnowledgePiece
from .sketch import TensorSketch
from .store import DiskStore, MemoryStore, Parts, Store, fingerprint, joined, pack, unpack

logger = logging.get_logger(__name__)

EXACT_UP_TO = 500
TOKENS_UP_TO = 5000
DEFAULT_TOKENS = 8
DEFAULT_SKETCH = 8192
CHECKED_PIECES = 11  # 55 pairs
TOKENS_PER_BATCH = 128
DEFAULT_MEMORY = 2 * 2**30
SMALLEST_MEMORY = 2**28
PER_LAYER_BYTES = 2**31  # of the matrices of single layers, beyond which their sum alone is kept


@dataclass(frozen=True)
class Stream:
    """What is kept of each piece's gradient: everything, its strongest terms, or a sketch of those.

    Attributes:
        name: as the user writes it.
        tokens: terms kept of each piece and layer; `None` for all.
        size: numbers of a sketch; `None` for none.
    """

    name: str
    tokens: int | None = None
    size: int | None = None

    @classmethod
    def parse(cls, text: str, count: int) -> "Stream":
        """The stream that a user asked for, for a number of pieces.

        Raises:
            UserError: for a text of another form.
        """
        found = re.fullmatch(r"(auto)|exact|top-([1-9]\d*)|sketch(?:-([1-9]\d+))?", text)
        if found is None:
            raise UserError(
                f"stream is {text!r}; it must be auto, exact, top- and a number of tokens, like top-8, or sketch, or"
                " sketch- and a number of at least 10 numbers, like sketch-8192"
            )
        if found[1]:
            text = "exact" if count <= EXACT_UP_TO else f"top-{DEFAULT_TOKENS}" if count <= TOKENS_UP_TO else "sketch"
            return cls.parse(text, count)
        if text.startswith("sketch"):
            size = int(found[3] or DEFAULT_SKETCH)
            return cls(f"sketch-{size}", DEFAULT_TOKENS, size)
        return cls(text, int(found[2]) if found[2] else None)


@dataclass(frozen=True)
class Plan:
    """How the work on a set of pieces is cut up. The same pieces and settings give the same plan.

    Attributes:
        order: positions of the pieces, shortest first; all places below count in this order.
        shards: (first, last) of the pieces whose gradients are kept together.
        groups: (first, last) of the shards between two of which one block of the matrix is computed.
        per_layer: whether the matrices of single layers are kept.
    """

    order: list[int]
    shards: list[tuple[int, int]]
    groups: list[tuple[int, int]]
    per_layer: bool

    def pieces_of(self, group: int) -> tuple[int, int]:
        """(first, last) of a group's pieces."""
        first, last = self.groups[group]
        return self.shards[first][0], self.shards[last - 1][1]

    def blocks(self) -> list[tuple[int, int]]:
        """Pairs of groups that make up the upper triangle of the matrix."""
        return [(i, j) for i in range(len(self.groups)) for j in range(i, len(self.groups))]


class CouplingAnalyzer:
    """Measures GradSim(i, j) = cos(∇ log P(a_i|q_i), ∇ log P(a_j|q_j)) between knowledge pieces.

    The gradients are those of the target layers' weights and biases, at the model's present weights, in evaluation
    mode. They are never formed for all pieces at once: layer inputs and output gradients of each token are kept, and
    inner products are computed from those (see `trainers.coupling.capture` and `trainers.coupling.gram`). The result
    depends neither on the batches nor on padding. The model's weights, modes and gradient flags are left as they were.

    Args:
        model (`PreTrainedModel`): causal or encoder-decoder language model, also one wrapped by `peft`, whose weights
            below the adapters are then the targets.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): needed for pieces of text.
        layers (`str`, *optional*, defaults to `"auto"`): see `trainers.coupling.layers.find_layers`.
        answer (`str`, *optional*, defaults to `"full"`): `"full"` sums the log-probabilities of all answer tokens,
            `"first"` takes the first one alone.
        stream (`str`, *optional*, defaults to `"auto"`): `"exact"` keeps the terms of all tokens, `"top-8"` of each
            piece and layer the eight largest, `"sketch"` (or `"sketch-4096"`) so many numbers of each piece, made of
            those eight (see `trainers.coupling.sketch`). The last two bound memory and time, and are measured on
            sampled pairs against the exact values. `"auto"` is exact up to 500 pieces, `"top-8"` up to 5,000 and
            `"sketch"` beyond.
        bias (`bool`, *optional*, defaults to `True`): whether biases of the target layers belong to the gradient.
        tokens_per_batch (`int`, *optional*): tokens of a forward pass, padding included. By default 128, and 256 where
            all target layers lie in the upper half of the model: nothing is kept of the layers below them.
        padding_side (`str`, *optional*, defaults to `"right"`): side that is filled up in a batch.
        memory (`int`, *optional*): bytes that the work on inner products may take in each process, besides the model,
            a batch's own activations and the result. It counts where `fit` is given a folder, and is 2 GiB by default.
        progress (`bool`, *optional*, defaults to `False`): whether to show progress bars.

    Raises:
        UserError: if no layer matches, `tokens_per_batch` is below 1 or `memory` below 256 MiB.

    Example:

        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from trainers.coupling import CouplingAnalyzer, EncodedPiece
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=4))
        >>> pieces = [EncodedPiece("a", (1, 2, 3), (4,)), EncodedPiece("b", (1, 2, 5), (4, 6))]
        >>> CouplingAnalyzer(model).fit(pieces).matrix.shape
        (2, 2)
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        layers: str = "auto",
        answer: AnswerTokens = "full",
        stream: str = "auto",
        bias: bool = True,
        tokens_per_batch: int | None = None,
        padding_side: Literal["right", "left"] = "right",
        memory: int | None = None,
        progress: bool = False,
    ):
        if tokens_per_batch is not None and tokens_per_batch < 1:
            raise UserError(f"tokens_per_batch is {tokens_per_batch}; it must be at least 1")
        if answer not in ("full", "first"):
            raise UserError(f"answer is {answer!r}; it must be 'full' or 'first'")
        if memory is not None and memory < SMALLEST_MEMORY:
            raise UserError(f"memory is {memory} bytes; it must be at least {SMALLEST_MEMORY} (256MiB)")
        Stream.parse(stream, 0)
        self.stream = stream
        self.memory = memory
        self.model = model
        self.tokenizer = tokenizer
        self.targets: list[TargetLayer] = find_layers(model, layers)
        self.capture = Capture(model, self.targets, answer, padding_side, bias)
        self.tokens_per_batch = tokens_per_batch or self._default_tokens()
        self.progress = progress
        self._one_by_one = False

    @property
    def dimension(self) -> int:
        """Numbers in one whole gradient."""
        weights = sum(layer.rows * layer.columns for layer in self.targets)
        return weights + sum(bias.numel() for layer in self.targets for bias in layer.biases if self.capture.bias)

    def _default_tokens(self) -> int:
        linear = [module for module in self.model.modules() if linear_shape(module) is not None]
        targets = {id(module) for layer in self.targets for module in layer.modules}
        lowest = next((place for place, module in enumerate(linear) if id(module) in targets), 0)
        return TOKENS_PER_BATCH * 2 if lowest >= len(linear) / 2 else TOKENS_PER_BATCH

    def encode(self, pieces: Sequence[KnowledgePiece] | Sequence[EncodedPiece]) -> list[EncodedPiece]:
        """Token ids of pieces, checked; pieces that are token ids already are only checked.

        Raises:
            UserError: naming the piece that the model cannot take.
        """
        encoded = [piece for piece in pieces if isinstance(piece, EncodedPiece)]
        if len(encoded) == len(pieces):
            check_encoded(encoded, self.model.config)
            return encoded
        if encoded:
            raise UserError("pieces of text and pieces of token ids cannot be compared in one analysis")
        if self.tokenizer is None:
            raise UserError("a tokenizer is needed for pieces of text")
        texts = [piece for piece in pieces if isinstance(piece, KnowledgePiece)]
        return encode_pieces(texts, self.tokenizer, self.model.config)

    def fit(
        self, pieces: Sequence[KnowledgePiece] | Sequence[EncodedPiece], folder: str | Path | None = None
    ) -> Coupling:
        """Analyse pieces.

        Args:
            pieces: at least one, all of text or all of token ids.
            folder: where finished blocks are kept. Without it all work is done in memory. With it the work is cut into
                blocks that `memory` bounds, a run that was killed goes on from the blocks it had finished, and the
                processes that `accelerate launch` has started share the work; each of them gets the result. The
                blocks stay in a folder below `folder` that belongs to this model, these pieces and settings; see
                `blocks_folder`.

        Raises:
            UserError: naming the piece or layer, for pieces the model cannot take and for values that are not finite;
                naming the file, for a disk that is full.
        """
        encoded = self.encode(pieces)
        stream = Stream.parse(self.stream, len(encoded))
        plan = self._plan(encoded, stream, folder is not None)
        processes: PartialState | None = None
        store: Store = MemoryStore()
        if folder is not None:
            processes = started_processes()
            store = on_disk = DiskStore(self.blocks_folder(encoded, folder))
            if processes.is_main_process:
                on_disk.remove_leftovers()
            processes.wait_for_everyone()
        clock = _Clock()
        found = self._capture_all(encoded, plan, stream, store, processes)
        clock.lap("capture")
        found += self._gram_all(plan, stream, store, processes)
        coupling = self._assemble(encoded, plan, stream, store)
        clock.lap("gram")
        coupling.pieces = [piece for piece in pieces if isinstance(piece, KnowledgePiece)]
        coupling.cost |= clock.seconds
        coupling.cost["gradient_bytes_avoided"] = self.dimension * len(encoded) * 4
        if processes is not None:
            processes.wait_for_everyone()
            coupling.cost |= {"processes": processes.num_processes, "blocks_found": found}
        return coupling

    def blocks_folder(self, pieces: Sequence[EncodedPiece], folder: str | Path) -> Path:
        """The folder below `folder` for the blocks of these pieces with this model and these settings."""
        facts = {
            "schema_version": SCHEMA_VERSION,
            "layers": [(layer.name, layer.rows, layer.columns) for layer in self.targets],
            "answer": self.capture.answer,
            "bias": self.capture.bias,
            "stream": Stream.parse(self.stream, len(pieces)).name,
            "padding_side": self.capture.padding_side,
            "tokens_per_batch": self.tokens_per_batch,
            "memory": self.memory,
            "pieces": [(piece.piece_id, piece.prompt_ids, piece.answer_ids) for piece in pieces],
        }
        return Path(folder) / f"blocks-{fingerprint(self.model, facts)}"

    def term_bytes(self, pieces: Sequence[EncodedPiece]) -> int:
        """Bytes that the stream keeps of all pieces together, before it is known which tokens have a gradient."""
        stream = Stream.parse(self.stream, len(pieces))
        return sum(stream.size * 4 if stream.size else self._term_bytes(piece, stream) for piece in pieces)

    def _term_bytes(self, piece: EncodedPiece, stream: Stream) -> int:
        tokens = min(_length(piece), stream.tokens or _length(piece))
        return tokens * sum(layer.rows + layer.columns for layer in self.targets) * self.model.dtype.itemsize

    def _plan(self, pieces: Sequence[EncodedPiece], stream: Stream, on_disk: bool) -> Plan:
        order = shortest_first(pieces)
        held = [self._term_bytes(pieces[index], stream) for index in order]
        memory = self.memory or DEFAULT_MEMORY
        places = np.cumsum([0, *(len(batch) for batch in self.batches(pieces))]).tolist()
        batches = list(itertools.pairwise(places))
        matrices = len(self.targets) * len(pieces) ** 2 * 8
        if not on_disk:  # each batch by itself, and one block
            return Plan(order, batches, [(0, len(batches))], matrices <= PER_LAYER_BYTES)
        per_layer = matrices <= memory // 4
        shards = _runs([sum(held[first:last]) for first, last in batches], memory // 8)
        ranges = [(batches[first][0], batches[last - 1][1]) for first, last in shards]
        # A block takes the terms of two groups for one layer, or their sketches, and what it adds up.
        widest = max(layer.rows + layer.columns for layer in self.targets)
        share = widest / sum(layer.rows + layer.columns for layer in self.targets)
        kept = [stream.size * 4 if stream.size else size * share for size in held]
        summed = (len(self.targets) if per_layer else 1) * 8
        # At least four groups, so that several processes have blocks to share.
        most = max(1, min(int((memory / 4 / summed) ** 0.5), -(-len(pieces) // 4)))
        sizes = [max(sum(kept[first:last]) / (memory / 4), (last - first) / most) for first, last in ranges]
        return Plan(order, ranges, _runs(sizes, 1), per_layer)

    def _capture_all(
        self,
        pieces: Sequence[EncodedPiece],
        plan: Plan,
        stream: Stream,
        store: Store,
        processes: PartialState | None,
    ) -> int:
        """Capture what is not in the store. Returns the number of shards that were."""
        sketch = TensorSketch(self.targets, stream.size) if stream.size else None

        wants_norms = stream.tokens is not None or not plan.per_layer  # else they are on the diagonals

        def compute(shard: int) -> None:
            first, last = plan.shards[shard]
            # Pieces whose terms are also kept whole, to measure what leaving terms out costs.
            chosen = [place - first for place in _checked_inside(len(pieces), first, last)] if stream.tokens else []
            inside = [pieces[index] for index in plan.order[first:last]]
            store.save(_shard_name(shard), self._shard(inside, chosen, stream, sketch, wants_norms))

        names = [_shard_name(shard) for shard in range(len(plan.shards))]
        sizes = [last - first for first, last in plan.shards]
        return self._share(names, compute, sizes, store, processes, "gradients", "piece")

    def _shard(
        self,
        pieces: Sequence[EncodedPiece],
        checked: Sequence[int],
        stream: Stream,
        sketch: TensorSketch | None,
        wants_norms: bool,
    ) -> Parts:
        """What is kept of some pieces, sorted by length; of those in `checked` also all terms."""
        count = len(self.targets)
        kept: list[list[LayerTerms]] = [[] for _ in range(count)]
        whole: list[list[LayerTerms]] = [[] for _ in range(count)]
        log_probs, norms, sizes, checked_sizes = [], [], [], []
        done = 0
        self.capture.reached.clear()
        for values, terms, size in self._captured(pieces):
            log_probs.append(values.double().cpu())
            here = [place - done for place in checked if done <= place < done + size]
            if wants_norms:
                norms.append(
                    torch.stack(
                        [squared_norms(part, layer.rows, size) for part, layer in zip(terms, self.targets, strict=True)]
                    )
                )
            for index, part in enumerate(terms):
                if here:
                    whole[index].append(part.of_pieces(here))
                kept[index].append(part.strongest(stream.tokens) if stream.tokens else part)
            sizes.append(size)
            checked_sizes += [len(here)] if here else []
            done += size
        parts: dict[str, torch.Tensor] = {
            "log_probs": torch.cat(log_probs),
            "reached": torch.tensor([layer.name in self.capture.reached for layer in self.targets]),
        }
        if norms:
            parts["squared_norms"] = torch.cat(norms, 1)
        layers = [joined(chunks, sizes) for chunks in kept]
        if sketch is not None:
            stored: dict[str, torch.Tensor] = {"sketch": sketch.sketch(layers, len(pieces))}
        else:
            stored = {}
            for index, layer_terms in enumerate(layers):
                stored |= pack(index, layer_terms)
        for index, chunks in enumerate(whole):
            if chunks:
                parts |= pack(index, joined(chunks, checked_sizes), "whole.")
        parts["stored_bytes"] = torch.tensor(sum(value.nbytes for value in stored.values()))
        return parts | stored

    def _gram_all(self, plan: Plan, stream: Stream, store: Store, processes: PartialState | None) -> int:
        """Compute the blocks of the matrix that are not in the store. Returns the number of those that were."""
        blocks = plan.blocks()

        def compute(block: int) -> None:
            i, j = blocks[block]
            store.save(_block_name(i, j), {"gram": self._gram_block(plan, stream, store, i, j)})

        names = [_block_name(i, j) for i, j in blocks]
        return self._share(names, compute, [1] * len(names), store, processes, "inner products", "block")

    def _gram_block(self, plan: Plan, stream: Stream, store: Store, i: int, j: int) -> torch.Tensor:
        """Inner products between the pieces of two groups, `(layers, pieces, pieces)`, or `(1, pieces, pieces)`."""
        groups = [i] if i == j else [i, j]
        names = [[_shard_name(shard) for shard in range(*plan.groups[group])] for group in groups]
        sizes = [[last - first for first, last in plan.shards[slice(*plan.groups[group])]] for group in groups]
        counts = [sum(each) for each in sizes]
        with store.opened([name for each in names for name in each]) as opened:
            parts = [opened[: len(names[0])], opened[len(names[0]) :]][: len(groups)]
            if stream.size:
                sketches = [torch.cat([part["sketch"] for part in side]) for side in parts]
                return (sketches[0] @ sketches[-1].T).double()[None]
            total = torch.zeros(len(self.targets) if plan.per_layer else 1, counts[0], counts[-1], dtype=torch.float64)
            for index, layer in enumerate(self.targets):
                sides = [
                    joined([unpack(index, part) for part in side], size)
                    for side, size in zip(parts, sizes, strict=True)
                ]
                other = None if i == j else sides[1]
                gram = layer_gram(sides[0], layer.rows, counts[0], other=other, other_count=counts[-1])
                total[index if plan.per_layer else 0] += gram
        return total

    def _share(
        self,
        names: Sequence[str],
        compute: Callable[[int], None],
        sizes: Sequence[int],
        store: Store,
        processes: PartialState | None,
        what: str,
        unit: str,
    ) -> int:
        """Compute the parts that are missing, in turn with the other processes, and wait for them."""
        missing = [index for index, name in enumerate(names) if name not in store]
        mine = missing
        if processes is not None:
            processes.wait_for_everyone()  # all must have seen the same parts missing
            mine = missing[processes.process_index :: processes.num_processes]
        bar = tqdm(total=sum(sizes[index] for index in mine), desc=what, unit=unit, disable=not self.progress)
        for index in mine:
            compute(index)
            bar.update(sizes[index])
        bar.close()
        if processes is not None:
            processes.wait_for_everyone()
        return len(names) - len(missing)

    def _assemble(self, pieces: Sequence[EncodedPiece], plan: Plan, stream: Stream, store: Store) -> Coupling:
        n, layers = len(pieces), len(self.targets)
        place = np.array(plan.order)
        log_probs, norms = np.zeros(n), None
        reached, stored = torch.zeros(layers, dtype=torch.bool), 0
        whole: list[list[LayerTerms]] = [[] for _ in range(layers)]
        checked_sizes = []
        for shard, (first, last) in enumerate(plan.shards):
            with store.opened([_shard_name(shard)]) as (part,):
                log_probs[place[first:last]] = part["log_probs"].numpy()
                reached |= part["reached"]
                stored += int(part["stored_bytes"])
                if "squared_norms" in part:
                    norms = np.zeros((layers, n)) if norms is None else norms
                    norms[:, place[first:last]] = part["squared_norms"].numpy()
                if "whole.0.owner" in part:
                    checked_sizes.append(len(_checked_inside(n, first, last)))
                    for index in range(layers):
                        whole[index].append(unpack(index, part, "whole."))
        for layer, is_reached in zip(self.targets, reached.tolist(), strict=True):
            if not is_reached:
                raise UserError(f"layer {layer.name!r}: the answers' probabilities do not depend on it")
        by_layer = plan.per_layer and not stream.size
        kept = np.zeros((layers, n, n)) if by_layer else np.zeros((1, n, n), np.float32)
        for i, j in plan.blocks():
            rows, columns = (place[slice(*plan.pieces_of(group))] for group in (i, j))
            with store.opened([_block_name(i, j)]) as (part,):
                for index, block in enumerate(part["gram"].numpy()):
                    kept[index][np.ix_(rows, columns)] = block
                    kept[index][np.ix_(columns, rows)] = block.T
        facts: dict[str, Any] = {"name": stream.name}
        if stream.tokens:
            facts["tokens_per_piece"] = stream.tokens
            if stream.size:
                facts["numbers_per_piece"] = stream.size
            chosen = place[_sample(n, CHECKED_PIECES)]
            exact = torch.zeros(len(chosen), len(chosen), dtype=torch.float64)
            for chunks, layer in zip(whole, self.targets, strict=True):
                exact += layer_gram(joined(chunks, checked_sizes), layer.rows, len(chosen))
            found_here = np.stack([matrix[np.ix_(chosen, chosen)] for matrix in kept]).sum(0)
            facts["error"] = _error(cosine(found_here), cosine(exact.numpy()))
        return Coupling(
            piece_ids=[piece.piece_id for piece in pieces],
            layers=[layer.name for layer in self.targets],
            gram_per_layer=kept if by_layer else None,
            log_probs=log_probs,
            answer=self.capture.answer,
            dimension=self.dimension,
            stream=facts,
            total_gram=None if by_layer else kept[0],
            squared_norms=norms,
            cost={"stored_bytes": stored},
        )

    def log_probabilities(self, pieces: Sequence[EncodedPiece]) -> np.ndarray:
        """log P(a|q) of each piece at the model's present weights, in nats, `(n,)`."""
        values = np.zeros(len(pieces))
        order, done = shortest_first(pieces), 0
        for batch in self.batches(pieces):
            values[order[done : done + len(batch)]] = self.capture.log_probabilities(batch).double().cpu().numpy()
            done += len(batch)
        return values

    def _captured(self, pieces: Sequence[EncodedPiece]) -> Iterator[tuple[torch.Tensor, list[LayerTerms], int]]:
        for batch in self.batches(pieces):
            parts = [[piece] for piece in batch] if self._one_by_one else [batch]
            try:
                results = [(*self.capture.terms(part), len(part)) for part in parts]
            except RowsLostError as error:
                logger.warning_once(f"layer {error} mixes the rows of a batch; going on one piece at a time")
                self._one_by_one = True
                results = [(*self.capture.terms([piece]), 1) for piece in batch]
            yield from results

    def batches(self, pieces: Sequence[EncodedPiece]) -> Iterator[list[EncodedPiece]]:
        """The pieces in the order of `shortest_first`: as many as fit into `tokens_per_batch`, at least one."""
        batch: list[EncodedPiece] = []
        for index in shortest_first(pieces):
            if batch and (len(batch) + 1) * _length(pieces[index]) > self.tokens_per_batch:
                yield batch
                batch = []
            batch.append(pieces[index])
        yield batch


def shortest_first(pieces: Sequence[EncodedPiece]) -> list[int]:
    """Positions of pieces by length: batches of nearly equal lengths carry little padding."""
    return sorted(range(len(pieces)), key=lambda index: _length(pieces[index]))


def _length(piece: EncodedPiece) -> int:
    return len(piece.prompt_ids) + len(piece.answer_ids)


def _checked_inside(count: int, first: int, last: int) -> list[int]:
    return [place for place in _sample(count, CHECKED_PIECES) if first <= place < last]


def _shard_name(shard: int) -> str:
    return f"gradients-{shard:06d}"


def _block_name(i: int, j: int) -> str:
    return f"products-{i:05d}-{j:05d}"


def _runs(sizes: Sequence[float], most: float) -> list[tuple[int, int]]:
    """Cut a sequence into runs (first, last) whose sizes add up to `most` at the utmost; one alone may be larger."""
    runs, first, total = [], 0, 0.0
    for index, size in enumerate(sizes):
        if index > first and total + size > most:
            runs.append((first, index))
            first, total = index, 0.0
        total += size
    return [*runs, (first, len(sizes))]


def started_processes(on_cpu: bool = False) -> PartialState:
    """This process among those that `accelerate launch` has started, or by itself.

    Args:
        on_cpu: take no accelerator, even if the launcher does not ask for that.
    """
    on_cpu = on_cpu or parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    # One process may wait for another as long as that works on its share.
    return PartialState(cpu=on_cpu, timeout=timedelta(days=7))


class _Clock:
    """Seconds of a wall clock and of this process's CPU time since the last lap."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter(), time.process_time()

    def lap(self, name: str) -> None:
        now = time.perf_counter(), time.process_time()
        self.seconds |= {f"{name}_seconds": now[0] - self._last[0], f"{name}_cpu_seconds": now[1] - self._last[1]}
        self._last = now


def _sample(count: int, most: int) -> list[int]:
    """Ascending positions, the same for the same count."""
    return sorted(np.random.default_rng(0).choice(count, min(count, most), replace=False).tolist())


def _error(found: np.ndarray, exact: np.ndarray) -> dict[str, Any]:
    """How far cosines are from the exact ones, over the pairs of the checked pieces."""
    pairs = np.triu_indices(len(exact), 1)
    difference = (found - exact)[pairs]
    difference = difference[~np.isnan(difference)]
    if not len(difference):
        return {"pairs": 0, "rms": None, "max": None}
    return {
        "pairs": len(difference),
        "rms": float(np.sqrt(np.mean(difference**2))),
        "max": float(np.abs(difference).max()),
    }
