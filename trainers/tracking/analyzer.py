"""Take a trained model apart on given batches: the tracker's numbers without training."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..coupling.capture import evaluation_mode
from ..errors import UserError
from .attention import class_counts
from .gradients import WeightMeter
from .linear_probe import probe_layers
from .recorder import Recorder, Wanted, summarise
from .structure import NamesFilter, Structure

Batch = Mapping[str, torch.Tensor]


class TransformerAnalyzer:
    """Attention, queries, keys and values, residual stream and gradient flow of a model on given batches.

    Batches are dictionaries as the model takes them (`input_ids`, `attention_mask`, `labels`, ...), one or several.
    Padding never counts. The model's weights, gradients and mode are left as they were; there is no dropout.

    Example:

    >>> import torch
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> from trainers.tracking import TransformerAnalyzer

    >>> model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=100))
    >>> batch = {"input_ids": torch.arange(24).reshape(2, 12)}
    >>> report = TransformerAnalyzer(model).analyze_attention_patterns(batch)
    >>> sorted(report["modules"])
    ['h.0.attn', 'h.1.attn']
    >>> len(report["modules"]["h.0.attn"]["entropy"])
    4

    Args:
        model: any model of the library.
        tokenizer: turns texts into batches, see [`encode`].
        names: modules to look at; see [`Structure.select`].

    Raises:
        UserError: if the model has no attention modules, or `names` matches nothing.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None, names: NamesFilter = None
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.structure = Structure(model)
        self.names = self.structure.select(names)
        self.not_reproduced: dict[str, str | None] = {}

    def encode(self, texts: Sequence[str], targets: Sequence[str] | None = None) -> dict[str, torch.Tensor]:
        """Texts as one padded batch; with targets, for an encoder-decoder, their tokens are the labels.

        Raises:
            UserError: without a tokenizer, for an empty text, or for one longer than the model's positions.
        """
        if self.tokenizer is None:
            raise UserError("texts need a tokenizer; give TransformerAnalyzer one")
        batch = self._encode(texts, "text")
        if targets is not None:
            labels = self._encode(targets, "target")
            batch["labels"] = labels["input_ids"].masked_fill(labels["attention_mask"] == 0, -100)
        return batch

    def _encode(self, texts: Sequence[str], what: str) -> dict[str, torch.Tensor]:
        assert self.tokenizer is not None
        rows = [self.tokenizer(text, verbose=False)["input_ids"] for text in texts]
        limit = getattr(self.model.config, "max_position_embeddings", None)
        for number, (text, row) in enumerate(zip(texts, rows, strict=True), 1):
            if not text.strip() or not row:
                raise UserError(f"{what} {number} is empty")
            if limit is not None and len(row) > limit:
                raise UserError(f"{what} {number} has {len(row)} tokens, but the model has {limit} positions")
        width = max(map(len, rows))
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        return {"input_ids": ids, "attention_mask": mask}

    def comprehensive_analysis(
        self, batches: Batch | Iterable[Batch], probe_labels: Sequence[Any] | None = None
    ) -> dict[str, Any]:
        """Everything below in one report.

        Args:
            batches: the examples; with `labels` in each of them, gradients are taken too.
            probe_labels: one per example: a property that linear probes try to read from each layer.

        Returns:
            `schema_version`, `model` (sizes), `attention`, `states`, `residual`, `gradients` (`None` without labels),
            `probes` (`None` without `probe_labels`), `not_reproduced` and `nonfinite`.
        """
        kept = _as_list(batches)
        wanted = Wanted(self.names, stream=True, attention=True, residual=True, similarity_rows=None)
        found, residual = self._run(kept, wanted)
        has_labels = all(batch.get("labels") is not None for batch in kept)
        return {
            "schema_version": 1,
            "model": self.structure.describe(),
            "attention": self._patterns(found),
            "states": found["states"],
            "activations": found["activations"],
            "residual": residual,
            "gradients": self.analyze_gradient_flow(kept) if has_labels else None,
            "probes": None if probe_labels is None else probe_layers(self.model, kept, probe_labels),
            "not_reproduced": {name: why for name, why in self.not_reproduced.items() if why is not None},
            "nonfinite": found["nonfinite"],
        }

    def analyze_attention_patterns(self, batches: Batch | Iterable[Batch]) -> dict[str, Any]:
        """Statistics and class of every head.

        Returns:
            `modules`: name -> see [`attention_summary`], with `similarity` of heads and `scores`; `classes`: how many
            heads of each class; `not_reproduced`: modules whose weights cannot be told exactly, and why.
        """
        found, _ = self._run(_as_list(batches), Wanted(self.names, attention=True, similarity_rows=None))
        return self._patterns(found)

    def analyze_qkv_statistics(self, batches: Batch | Iterable[Batch]) -> dict[str, Any]:
        """Module -> `query`, `key`, `value` -> `mean`, `std`, `min`, `max` and `rms` of each head, over real tokens.

        The states are those that enter the kernel: split into heads, after rotary positions and norms.
        """
        return self._run(_as_list(batches), Wanted(self.names, stream=True))[0]["states"]

    def analyze_gradient_flow(self, batches: Batch | Iterable[Batch]) -> dict[str, Any]:
        """Gradients of the mean loss of the batches, by weight and layer, and at the layers' outputs.

        Returns:
            See [`WeightMeter.report`], with `activations`: layer -> `norm` and `rms` of dL/dh.

        Raises:
            UserError: if a batch gives no loss.
        """
        kept = _as_list(batches)
        recorder = Recorder(self.structure, Wanted(self.names, gradients=True), self.not_reproduced)
        meter = WeightMeter(self.structure)
        with evaluation_mode(self.model), own_gradients(self.model), torch.enable_grad(), recorder:
            for batch in kept:
                loss = getattr(self.model(**self._moved(batch)), "loss", None)
                if loss is None:
                    raise UserError("gradients need a loss: give the batches labels")
                (loss / len(kept)).backward()
            meter.measure_gradients()
        report = meter.report()
        found = summarise(recorder.sums.to_host(), self.structure)
        return report | {"activations": found["activation_gradients"]}

    def _patterns(self, found: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "modules": found["attention"],
            "classes": class_counts(found["attention"]),
            "not_reproduced": {name: why for name, why in self.not_reproduced.items() if why is not None},
        }

    def _run(self, batches: Sequence[Batch], wanted: Wanted) -> tuple[dict[str, Any], dict[str, Any]]:
        recorder = Recorder(self.structure, wanted, self.not_reproduced)
        residual: dict[str, Any] = {}
        with evaluation_mode(self.model), torch.no_grad(), recorder:
            for number, batch in enumerate(batches):
                recorder.calls.clear()
                self.model(**self._moved(batch))
                if number == 0 and wanted.residual:
                    residual = recorder.residual()
        if wanted.attention or wanted.stream:
            for name in set(self.structure.attentions) & self.names - recorder.called:
                self.not_reproduced[name] = "its attention does not go through the library's interface"
        return summarise(recorder.sums.to_host(), self.structure), residual

    def _moved(self, batch: Batch) -> dict[str, torch.Tensor]:
        device = next(self.model.parameters()).device
        return {name: values.to(device) for name, values in batch.items()}


@contextmanager
def own_gradients(model: torch.nn.Module) -> Iterator[None]:
    """Gradients begin at none inside; afterwards those that were there before are back."""
    before = {name: parameter.grad for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = None
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.grad = before[name]


def _as_list(batches: Batch | Iterable[Batch]) -> list[Batch]:
    kept = [batches] if isinstance(batches, Mapping) else list(batches)
    if not kept:
        raise UserError("there is no batch to analyse")
    return kept
