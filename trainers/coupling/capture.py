"""One frozen forward and backward per batch gives all that per-example gradients are made of.

For a linear layer y = W x + b the gradient of one piece's log-probability is Σ_t g_t x_tᵀ (and Σ_t g_t for the bias),
over the piece's tokens t, with x_t the layer's input and g_t the gradient at its output (Goodfellow 2015,
arXiv:1510.01799). Pieces of a batch are independent, so the gradient of their summed log-probability holds every
piece's own g_t, and no weight gradient is ever computed.
"""

import inspect
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import UserError
from .encoding import EncodedPiece
from .layers import TargetLayer

AnswerTokens = Literal["full", "first"]

# Decoders whose last block ends with an MLP that works on each position by itself, with nothing after it but a norm and
# the head: where no answer token is predicted its output is never used.
ENDS_WITH_MLP = frozenset(
    ("gemma2", "gemma3_text", "gpt2", "gpt_neox", "llama", "mistral", "phi", "phi3", "qwen2", "qwen3")
)
_BLOCK_MLP = re.compile(r"\.(\d+)\.mlp$")


@dataclass
class LayerTerms:
    """Rank-one terms whose sum over a piece's tokens is the gradient of one weight: G_i = Σ_t left_t right_tᵀ.

    `left` runs over the rows of the weight as it is stored, `right` over its columns, so that modules that share a
    weight can be of different kinds. Tokens are sorted by piece.

    Attributes:
        left (`torch.Tensor` of shape `(tokens, rows)`, or integer of shape `(tokens,)`): the latter for an embedding,
            whose left factor is a unit vector.
        right (`torch.Tensor` of shape `(tokens, columns)`).
        owner (`torch.LongTensor` of shape `(tokens,)`): position of the piece of each token.
        biases (list of `torch.Tensor` of shape `(pieces, outputs)`): gradients of the distinct bias tensors.
    """

    left: torch.Tensor
    right: torch.Tensor
    owner: torch.Tensor
    biases: list[torch.Tensor] = field(default_factory=list)

    def strongest(self, count: int) -> "LayerTerms":
        """The `count` terms of each piece with the largest |left| |right|; biases stay whole."""
        strength = self.right.float().norm(dim=-1)
        if self.left.dim() == 2:
            strength = strength * self.left.float().norm(dim=-1)
        order = strength.argsort(descending=True, stable=True)
        owner, by_piece = self.owner[order].sort(stable=True)
        order = order[by_piece]
        first = torch.searchsorted(owner, owner)  # where the piece of each token begins
        kept = order[torch.arange(len(owner), device=owner.device) - first < count].sort().values
        return LayerTerms(self.left[kept], self.right[kept], self.owner[kept], self.biases)

    def of_pieces(self, pieces: list[int]) -> "LayerTerms":
        """The terms of some pieces, in ascending order of their positions, which are counted anew."""
        chosen = torch.tensor(sorted(pieces), device=self.owner.device)
        kept = torch.isin(self.owner, chosen)
        place = torch.searchsorted(chosen, self.owner[kept])
        return LayerTerms(self.left[kept], self.right[kept], place, [bias[chosen] for bias in self.biases])


@dataclass
class _Call:
    """What a module read in one call, and the gradient at what it wrote, where that reaches an answer."""

    inputs: torch.Tensor
    gradient: torch.Tensor | None = None


class RowsLostError(RuntimeError):
    """A target layer works on rows that no longer tell which piece they belong to."""


class Capture:
    """Log-probabilities of pieces, and the terms of their gradients for target layers.

    Args:
        model: causal or encoder-decoder language model; its weights and modes are left as they were.
        layers: target layers.
        answer: differentiate the log-probability of the whole answer, or of its first token.
        padding_side: where shorter pieces of a batch are filled up. The result does not depend on it.
        bias: take the gradient of biases too.

    Attributes:
        reached: names of the target layers that some answer's probability was found to depend on.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Sequence[TargetLayer],
        answer: AnswerTokens = "full",
        padding_side: Literal["right", "left"] = "right",
        bias: bool = True,
    ):
        self.model = model
        self.layers = layers
        self.answer = answer
        self.padding_side = padding_side
        self.bias = bias
        adapted = getattr(model, "get_base_model", None)
        base = adapted() if adapted else model
        self._accepted = set(inspect.signature(base.forward).parameters)
        self._last_mlp = _last_mlp(base)
        # Models that take `logits_to_keep` apply the head to hidden states, and work on single logits from there on.
        head = base.get_output_embeddings() if "logits_to_keep" in self._accepted else None
        is_target = any(module is head for layer in layers for module in layer.modules)
        self._head = None if is_target else head
        self._records: dict[int, list[_Call]] = {}
        self.reached: set[str] = set()
        self._in_backward = False
        self._widths: set[int] = set()

    @property
    def device(self) -> torch.device:
        return cast(torch.Tensor, self.model.get_input_embeddings().weight).device

    def log_probabilities(self, pieces: Sequence[EncodedPiece]) -> torch.Tensor:
        """Summed log-probability of each piece's answer tokens, in nats, shape `(pieces,)`; no gradient."""
        with evaluation_mode(self.model), torch.no_grad():
            return self.log_probabilities_with_graph(pieces)

    def terms(self, pieces: Sequence[EncodedPiece]) -> tuple[torch.Tensor, list[LayerTerms]]:
        """Forward and backward of one batch.

        Returns:
            Log-probabilities `(pieces,)`, and for each target layer the terms of its gradients.

        Raises:
            RowsLostError: if a layer's rows cannot be told apart by piece; a batch of one piece always works.
            UserError: if a log-probability or gradient is not finite, naming the piece.
        """
        self._records = {}
        with evaluation_mode(self.model), frozen(self.model), self._hooks(), torch.enable_grad():
            log_probs = self.log_probabilities_with_graph(pieces)
            for piece, value in zip(pieces, log_probs.tolist(), strict=True):
                if not value - value == 0:
                    raise UserError(f"piece {piece.piece_id!r}: its log-probability is {value}")
            if log_probs.requires_grad:
                self._in_backward = True
                try:
                    log_probs.sum().backward()
                finally:
                    self._in_backward = False
        terms = [self._layer_terms(layer, pieces) for layer in self.layers]
        return log_probs.detach(), terms

    def log_probabilities_with_graph(self, pieces: Sequence[EncodedPiece]) -> torch.Tensor:
        """The same in whatever mode the model and autograd are in."""
        self._widths = set()
        answers = [piece.answer_ids if self.answer == "full" else piece.answer_ids[:1] for piece in pieces]
        if self.model.config.is_encoder_decoder:
            logits, at = self._seq2seq_logits(pieces, answers)
        else:
            logits, at = self._causal_logits(pieces, answers)
        owner = torch.tensor([row for row, answer in enumerate(answers) for _ in answer], device=logits.device)
        token = torch.tensor([token for answer in answers for token in answer], device=logits.device)
        chosen = logits[owner, torch.tensor(at, device=logits.device)]
        # Half precision loses small gradients in the softmax.
        chosen = chosen if chosen.dtype == torch.float64 else chosen.float()
        per_token = chosen.log_softmax(-1).gather(-1, token[:, None])[:, 0]
        return torch.zeros(len(pieces), dtype=per_token.dtype, device=per_token.device).index_add(0, owner, per_token)

    def _causal_logits(self, pieces: Sequence[EncodedPiece], answers: Sequence[Sequence[int]]):
        rows = [[*piece.prompt_ids, *answer[:-1]] for piece, answer in zip(pieces, answers, strict=True)]
        tokens, mask = self._pad(rows, self.padding_side)
        width = tokens.shape[1]
        # Of each row a window as long as the longest answer: the positions that predict an answer token, and others.
        longest = max(map(len, answers))
        first = [len(piece.prompt_ids) - 1 for piece in pieces]
        if self.padding_side == "left":
            first = [width - len(row) + place for row, place in zip(rows, first, strict=True)]
        starts = [min(place, width - longest) for place in first]
        window = torch.tensor([list(range(start, start + longest)) for start in starts], device=tokens.device)
        inputs: dict[str, Any] = {"input_ids": tokens, "attention_mask": mask}
        if "position_ids" in self._accepted:
            inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        if "use_cache" in self._accepted:
            inputs["use_cache"] = False
        columns = None
        if self._head is None and "logits_to_keep" in self._accepted:
            columns = sorted(set(window.flatten().tolist()))
            inputs["logits_to_keep"] = torch.tensor(columns, device=tokens.device)
        with self._at_answers(window, width) as applied:
            logits = self.model(**inputs).logits
        if self._head is not None and applied["head"]:
            first = [place - start for place, start in zip(first, starts, strict=True)]
        elif columns is not None:
            first = [columns.index(place) for place in first]
        return logits, [
            place + step for place, answer in zip(first, answers, strict=True) for step in range(len(answer))
        ]

    @contextmanager
    def _at_answers(self, window: torch.Tensor, width: int) -> Iterator[dict[str, bool]]:
        """Inside, the head and the last block's MLP work where an answer token is predicted only.

        The head is a fifth to a third of a small model's work; together they bring a run over the last few layers 7 %.

        Args:
            window: columns of each row, `(pieces, longest answer)`.
            width: number of columns.

        Yields:
            Whether the head was, once the model has run.
        """
        applied = {"head": False}

        def chosen(args: tuple) -> torch.Tensor | None:
            values = args[0] if len(args) == 1 else None
            if not isinstance(values, torch.Tensor) or values.dim() != 3 or values.shape[:2] != (len(window), width):
                return None
            return values.gather(1, _across(window, values))

        def before_head(module: nn.Module, args: tuple):
            values = chosen(args)
            applied["head"] = values is not None
            return None if values is None else (values,)

        def before_mlp(module: nn.Module, args: tuple):
            values = chosen(args)
            return None if values is None else (values,)

        def after_mlp(module: nn.Module, args: tuple, output: Any):
            if not isinstance(output, torch.Tensor) or output.shape[:2] != window.shape or window.shape[1] == width:
                return None
            whole = output.new_zeros(len(window), width, output.shape[-1])
            return whole.scatter(1, _across(window, output), output)

        handles = [] if self._head is None else [self._head.register_forward_pre_hook(before_head)]
        if self._last_mlp is not None:
            handles.append(self._last_mlp.register_forward_pre_hook(before_mlp))
            handles.append(self._last_mlp.register_forward_hook(after_mlp))
        try:
            yield applied
        finally:
            for handle in handles:
                handle.remove()

    def _seq2seq_logits(self, pieces: Sequence[EncodedPiece], answers: Sequence[Sequence[int]]):
        tokens, mask = self._pad([piece.prompt_ids for piece in pieces], self.padding_side)
        start = self.model.config.decoder_start_token_id
        if start is None:
            raise UserError(f"{type(self.model).__name__}: its configuration has no decoder_start_token_id")
        decoder_tokens, decoder_mask = self._pad([[start, *answer[:-1]] for answer in answers], "right")
        inputs: dict[str, Any] = {"input_ids": tokens, "attention_mask": mask, "decoder_input_ids": decoder_tokens}
        if "decoder_attention_mask" in self._accepted:
            inputs["decoder_attention_mask"] = decoder_mask
        if "use_cache" in self._accepted:
            inputs["use_cache"] = False
        return self.model(**inputs).logits, [step for answer in answers for step in range(len(answer))]

    def _pad(self, rows: Sequence[Sequence[int]], side: str) -> tuple[torch.Tensor, torch.Tensor]:
        width = max(map(len, rows))
        self._widths.add(width)
        pad = self.model.config.get_text_config().pad_token_id or 0
        # A pad id outside the vocabulary (some configurations say -1) would break the embedding.
        tokens = torch.full((len(rows), width), max(pad, 0))
        mask = torch.zeros_like(tokens)
        for index, row in enumerate(rows):
            where = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
            tokens[index, where] = torch.tensor(row)
            mask[index, where] = 1
        return tokens.to(self.device), mask.to(self.device)

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        modules = {id(module): module for layer in self.layers for module in layer.modules}
        handles = [module.register_forward_hook(self._record, with_kwargs=True) for module in modules.values()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _record(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: torch.Tensor):
        if self._in_backward:
            return None  # a checkpointed block computes its forward again; the first one is already recorded
        entering = args[0] if args else next(iter(kwargs.values()))
        changed = None
        if not output.requires_grad:
            output = output.detach().requires_grad_()  # the first target: everything before it ran without a graph
        if output.is_leaf or output._is_view():
            changed = output + 0  # a leaf cannot be overwritten in place, and a view that is would lose its hook
        call = _Call(entering.detach())
        self._records.setdefault(id(module), []).append(call)

        def keep(gradient: torch.Tensor) -> None:
            call.gradient = gradient.detach()

        # A hook on the tensor, not on the module: it sees the gradient of this value even if the value is overwritten.
        output.register_hook(keep)
        return changed

    def _layer_terms(self, layer: TargetLayer, pieces: Sequence[EncodedPiece]) -> LayerTerms:
        lefts, rights, owners = [], [], []
        weight = layer.weight
        # The weights themselves may wait elsewhere: on the disk, or spread over devices.
        reached = [call.gradient for module in layer.modules for call in self._records.get(id(module), [])]
        device = next((gradient.device for gradient in reached if gradient is not None), self.device)
        totals = {
            id(bias): torch.zeros(len(pieces), bias.numel(), dtype=_accumulation_dtype(bias), device=device)
            for bias in (layer.biases if self.bias else [])
        }
        for module in layer.modules:
            for call in self._records.pop(id(module), []):
                if call.gradient is None:
                    continue  # its output does not reach the answer
                self.reached.add(layer.name)
                gradient, inputs = self.by_piece(layer.name, call.gradient, len(pieces)), call.inputs
                if not isinstance(module, nn.Embedding):
                    inputs = self.by_piece(layer.name, inputs, len(pieces))
                self._check_finite(layer, gradient, inputs, pieces)
                bias = getattr(module, "bias", None)
                if id(bias) in totals:
                    totals[id(bias)] += gradient.sum(1, dtype=totals[id(bias)].dtype)
                left, right, owner = _factors(module, inputs, gradient)
                lefts.append(left)
                rights.append(right)
                owners.append(owner)
        if not owners:  # an expert, say, that no token of these pieces was sent to: the gradient is zero
            dtype = weight.dtype if weight.is_floating_point() else torch.float32
            left, right = (torch.zeros(0, size, dtype=dtype, device=device) for size in (layer.rows, layer.columns))
            return LayerTerms(left, right, torch.zeros(0, dtype=torch.long, device=device), list(totals.values()))
        if len({left.dim() for left in lefts}) > 1:
            lefts = [left if left.dim() == 2 else one_hot(left, layer.rows, rights[0].dtype) for left in lefts]
        left, right, owner = (
            tensors[0] if len(tensors) == 1 else torch.cat(tensors) for tensors in (lefts, rights, owners)
        )
        if len(owners) > 1:
            owner, order = owner.sort(stable=True)
            left, right = left[order], right[order]
        return LayerTerms(left, right, owner, list(totals.values()))

    def by_piece(self, layer: str, values: torch.Tensor, count: int) -> torch.Tensor:
        """What a layer reads or writes, `(rows..., features)`, as `(pieces, tokens, features)`.

        Raises:
            RowsLostError: with the layer's name, if the rows cannot be told apart by piece.
        """
        if count == 1 or (values.dim() > 1 and values.shape[0] == count):
            return values.reshape(count, -1, values.shape[-1])
        # Some blocks (OPT's) flatten pieces and tokens into one dimension.
        if values.dim() == 2 and values.shape[0] in {count * width for width in self._widths}:
            return values.reshape(count, -1, values.shape[-1])
        raise RowsLostError(layer)

    def _check_finite(
        self, layer: TargetLayer, gradient: torch.Tensor, inputs: torch.Tensor, pieces: Sequence[EncodedPiece]
    ) -> None:
        for what, values in (("gradient", gradient), ("input", inputs)):
            if values.is_floating_point() and not torch.isfinite(values.sum()):
                finite = torch.isfinite(values).flatten(1).all(1).tolist()
                for piece, good in zip(pieces, finite, strict=True):
                    if not good:
                        raise UserError(f"piece {piece.piece_id!r}, layer {layer.name!r}: the {what} is not finite")


def _across(window: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Columns as an index for all features of `(pieces, tokens, features)`."""
    return window.to(values.device)[:, :, None].expand(-1, -1, values.shape[-1])


def _last_mlp(model: PreTrainedModel) -> nn.Module | None:
    """The MLP of the last block of one of the library's own decoders, if it serves that block alone."""
    if model.config.model_type not in ENDS_WITH_MLP or not type(model).__module__.startswith("transformers.models."):
        return None
    found = {
        int(match[1]): module
        for name, module in model.named_modules(remove_duplicate=False)
        if (match := _BLOCK_MLP.search(name))
    }
    last = found.pop(model.config.num_hidden_layers - 1, None)
    return None if any(module is last for module in found.values()) else last


def one_hot(index: torch.Tensor, size: int, dtype: torch.dtype) -> torch.Tensor:
    """Unit vectors `(tokens, size)`."""
    return torch.zeros(len(index), size, dtype=dtype, device=index.device).scatter_(1, index[:, None], 1)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """No dropout inside; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient inside; afterwards the same ones do as before."""
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


def _accumulation_dtype(values: torch.Tensor) -> torch.dtype:
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def _factors(
    module: nn.Module, inputs: torch.Tensor, gradient: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The terms of one call of a module, without the tokens whose gradient is exactly zero.

    Padding is among those: nothing that is attended to or predicted depends on it. So are, in the last layer of a
    decoder, all positions before the answer.
    """
    kept = gradient.ne(0).any(-1)
    if isinstance(module, nn.Embedding):
        index = inputs.reshape(kept.shape)
        if module.padding_idx is not None:
            kept = kept & index.ne(module.padding_idx)  # this row's gradient is zero by definition
        right = gradient[kept] * getattr(module, "embed_scale", 1.0)
        return index[kept], right, kept.nonzero()[:, 0]
    owner = kept.nonzero()[:, 0]
    if isinstance(module, Conv1D):
        return inputs[kept], gradient[kept], owner
    return gradient[kept], inputs[kept], owner
