"""Connection Transformer: slots that act on each other through learned connections until they settle."""

import copy
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPastAndCrossAttentions,
    ModelOutput,
    Seq2SeqLMOutput,
    Seq2SeqModelOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, is_torchdynamo_compiling, logging, torch_compilable_check
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_connection_transformer import ConnectionTransformerConfig
from .connections_connection_transformer import CONNECTION_TYPES

logger = logging.get_logger(__name__)


@dataclass
class ConnectionTransformerEncoderOutput(ModelOutput):
    """
    What the encoder returns. Every tensor is batch-first, so that `generate` can repeat it for its beams.

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(batch_size, num_slots, hidden_size)`):
            Slot states after each sample's last reasoning step.
        reasoning_steps (`torch.LongTensor` of shape `(batch_size,)`):
            Number of reasoning steps each sample took, in [1, bound].
        expected_steps (`torch.FloatTensor` of shape `(batch_size,)`):
            Soft count of the steps, in [1, bound], differentiable in the parameters.
        hidden_states (`tuple(torch.FloatTensor)`, *optional*, filled when `output_hidden_states=True`):
            Slot states before the first and after each of the bound's steps, each of shape
            `(batch_size, num_slots, hidden_size)`. A sample that has stopped keeps its state.
        slot_updates (`tuple(torch.FloatTensor)`, *optional*, filled when `output_slot_updates=True`):
            Rectified influence on each slot in each step, before the LayerNorm; same shape. In the steps after a
            sample has stopped, its entries are what the next step would have been.
        halting_measures (`tuple(torch.FloatTensor)`, *optional*, filled when `output_halting_measures=True`):
            Per step, the quantity compared with `halting_threshold`, of shape `(batch_size,)`. Empty when
            `halting="none"`; the remark on stopped samples holds here too.
        compression_weights (`tuple(torch.FloatTensor)`, *optional*, filled when `output_compression_weights=True`):
            One tensor of shape `(batch_size, sequence_length, num_slots)`: the weight of each token in each slot.
        token_states (`torch.FloatTensor`, *optional*, filled when `return_token_states=True`):
            What compression reads: embedded tokens with positions, of shape
            `(batch_size, sequence_length, hidden_size)`.
    """

    last_hidden_state: torch.FloatTensor | None = None
    reasoning_steps: torch.LongTensor | None = None
    expected_steps: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    slot_updates: tuple[torch.FloatTensor, ...] | None = None
    halting_measures: tuple[torch.FloatTensor, ...] | None = None
    compression_weights: tuple[torch.FloatTensor, ...] | None = None
    token_states: torch.FloatTensor | None = None


@dataclass
class ConnectionTransformerModelOutput(Seq2SeqModelOutput):
    """
    [`~transformers.modeling_outputs.Seq2SeqModelOutput`] with the encoder's `reasoning_steps`, `expected_steps`,
    `slot_updates`, `halting_measures` and `compression_weights` (see [`ConnectionTransformerEncoderOutput`]).
    `encoder_last_hidden_state` and `encoder_hidden_states` are slot states.
    """

    reasoning_steps: torch.LongTensor | None = None
    expected_steps: torch.FloatTensor | None = None
    slot_updates: tuple[torch.FloatTensor, ...] | None = None
    halting_measures: tuple[torch.FloatTensor, ...] | None = None
    compression_weights: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class ConnectionTransformerSeq2SeqLMOutput(Seq2SeqLMOutput):
    """
    [`~transformers.modeling_outputs.Seq2SeqLMOutput`] with the encoder's steps and recorded internals as in
    [`ConnectionTransformerModelOutput`], and with the parts of the loss.

    Args:
        cross_entropy_loss (`torch.FloatTensor` of shape `()`, *optional*, filled when `labels` is given):
            Cross entropy of the labels, in nats per label.
        orthogonality_loss (`torch.FloatTensor` of shape `()`, *optional*, filled when `labels` is given):
            Penalty on the connection weights, before its weight. `None` where it has no weight and takes long.
        step_cost_loss (`torch.FloatTensor` of shape `()`, *optional*, filled when `labels` is given):
            Cost of the soft step count, before its weight.

    Each part is scaled by this micro-batch's share of the whole batch, so that parts summed over the micro-batches of
    an accumulated step are the parts of the whole batch.
    """

    reasoning_steps: torch.LongTensor | None = None
    expected_steps: torch.FloatTensor | None = None
    slot_updates: tuple[torch.FloatTensor, ...] | None = None
    halting_measures: tuple[torch.FloatTensor, ...] | None = None
    compression_weights: tuple[torch.FloatTensor, ...] | None = None
    cross_entropy_loss: torch.FloatTensor | None = None
    orthogonality_loss: torch.FloatTensor | None = None
    step_cost_loss: torch.FloatTensor | None = None


@dataclass
class ConnectionTransformerClassifierOutput(ModelOutput):
    """
    What the heads without a decoder return.

    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*, filled when `labels` is given):
            Sum of the weighted parts.
        logits (`torch.FloatTensor`):
            Scores before the softmax, of shape `(batch_size, num_labels)`, `(batch_size, num_choices)` from the choice
            head, or `(batch_size, sequence_length, vocab_size)` from the head that predicts tokens.
        reasoning_steps, expected_steps:
            As in [`ConnectionTransformerEncoderOutput`], of shape `(batch_size,)`, or `(batch_size, num_choices)` from
            the choice head, where each choice is read on its own.
        hidden_states, slot_updates, halting_measures, compression_weights:
            As in [`ConnectionTransformerEncoderOutput`], over `batch_size * num_choices` rows from the choice head.
        cross_entropy_loss, orthogonality_loss, step_cost_loss:
            As in [`ConnectionTransformerSeq2SeqLMOutput`]; in regression the first holds the squared error.
        halting_loss (`torch.FloatTensor` of shape `()`, *optional*, filled in training with `halting="learned"`):
            Binary cross entropy of the halting head's estimates, in nats per sample and step, before its weight.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    reasoning_steps: torch.LongTensor | None = None
    expected_steps: torch.FloatTensor | None = None
    slot_updates: tuple[torch.FloatTensor, ...] | None = None
    halting_measures: tuple[torch.FloatTensor, ...] | None = None
    compression_weights: tuple[torch.FloatTensor, ...] | None = None
    cross_entropy_loss: torch.FloatTensor | None = None
    orthogonality_loss: torch.FloatTensor | None = None
    step_cost_loss: torch.FloatTensor | None = None
    halting_loss: torch.FloatTensor | None = None


def orthonormal_slots(num_slots: int, hidden_size: int, seed: int) -> torch.Tensor:
    """
    Fixed slot vectors: orthonormal rows, in independent orthonormal blocks of `hidden_size` rows where there are more
    slots than dimensions. The same for the same arguments, whatever the global random state.

    Args:
        num_slots (`int`): Number of rows.
        hidden_size (`int`): Number of columns.
        seed (`int`): Seed of the generator that the blocks are drawn with.

    Returns:
        `torch.FloatTensor` of shape `(num_slots, hidden_size)`, in float32 on the CPU.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    blocks = []
    for start in range(0, num_slots, hidden_size):
        rows = min(hidden_size, num_slots - start)
        gaussian = torch.randn(hidden_size, rows, generator=generator, dtype=torch.float32, device="cpu")
        orthonormal, triangular = torch.linalg.qr(gaussian)
        # QR fixes the columns up to their signs; a positive diagonal makes the result unique.
        blocks.append((orthonormal * triangular.diagonal().sign()).T)
    return torch.cat(blocks)


def token_positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """
    Positions that do not depend on padding: a token's position is the number of tokens before it. Padding after the
    tokens continues the count, so that right-padded rows have the positions of their columns.

    Args:
        attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`): 1 for tokens, 0 for padding.

    Returns:
        `torch.LongTensor` of shape `(batch_size, sequence_length)`.
    """
    is_token = (attention_mask != 0).long()
    padding_before_last_token = ((1 - is_token).cumsum(1) * is_token).cummax(1).values
    return torch.arange(is_token.shape[1], device=is_token.device) - padding_before_last_token


def padding_index(config: ConnectionTransformerConfig) -> int | None:
    """Row of the embeddings that starts at zero and is never moved: that of padding, unless it also ends a sequence."""
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    return None if config.pad_token_id in ends else config.pad_token_id


def shift_right(
    labels: torch.LongTensor, decoder_start_token_id: int | None, pad_token_id: int | None
) -> tuple[torch.LongTensor, torch.LongTensor]:
    """
    Decoder input for teacher forcing: the start token followed by all labels but the last. Where a row begins with
    -100, the start token takes the place of the first label's predecessor and what precedes it is masked.

    Args:
        labels (`torch.LongTensor` of shape `(batch_size, target_length)`): Label tokens, -100 where there is none.
        decoder_start_token_id (`int`): Token that every row starts with.
        pad_token_id (`int`): Token that stands in for -100.

    Returns:
        Decoder input ids and their mask, both `torch.LongTensor` of the shape of `labels`.

    Raises:
        ValueError: one of the two tokens is `None`.
    """
    if decoder_start_token_id is None or pad_token_id is None:
        raise ValueError(
            f"labels cannot be shifted: decoder_start_token_id={decoder_start_token_id} and "
            f"pad_token_id={pad_token_id} must both be set in the config"
        )
    columns = torch.arange(labels.shape[1], device=labels.device)
    start = (labels != -100).long().argmax(dim=1, keepdim=True)
    shifted = labels.roll(1, dims=1).masked_fill(columns == start, decoder_start_token_id)
    shifted = shifted.masked_fill((shifted == -100) | (columns < start), pad_token_id)
    return shifted, (columns >= start).long()


def slot_major(states: torch.Tensor) -> torch.Tensor:
    """The same tensor of shape `(batch_size, num_slots, hidden_size)`, laid out in memory with the slots first."""
    return states.transpose(0, 1).contiguous().transpose(0, 1)


def select_samples(states: torch.Tensor, rows: torch.LongTensor) -> torch.Tensor:
    """The samples `rows` of slot-major states, again slot-major."""
    return states.transpose(0, 1).index_select(1, rows).transpose(0, 1)


def sample_norm(states: torch.Tensor) -> torch.Tensor:
    """Norm of each sample over all slots and channels, of shape `(batch_size,)`."""
    # In two steps, the first along contiguous memory: one step over a slot-major tensor takes three times as long.
    return torch.linalg.vector_norm(torch.linalg.vector_norm(states, dim=-1), dim=-1)


class ConnectionTransformerProjection(nn.Linear):
    """
    Linear map of the compression and the expansion, which starts as an orthogonal matrix times a factor: a class of its
    own so that it is known.
    """

    def __init__(self, in_features: int, out_features: int, gain: float = 1.0):
        super().__init__(in_features, out_features, bias=False)
        self.gain = gain


class ConnectionTransformerReader(nn.Module):
    """
    A model of the library that reads the source; see `reader_config` in [`ConnectionTransformerConfig`]. Each row is
    read with its tokens first and its padding behind them, where every model knows how to leave padding out, so that a
    token's state does not depend on it.
    """

    def __init__(self, config: ConnectionTransformerConfig):
        super().__init__()
        self.frozen = config.freeze_reader
        self.model = AutoModel.from_config(config.reader_config, dtype=torch.get_default_dtype())
        self.model.config.use_cache = False  # a source is read once
        if getattr(self.model, "pooler", None) is not None:
            self.model.pooler = None  # a state of the whole row, which nothing here reads
        width = config.reader_config.hidden_size
        self.projection = (
            nn.Identity() if width == config.hidden_size else ConnectionTransformerProjection(width, config.hidden_size)
        )
        self.freeze()

    def freeze(self):
        """Take the reader out of training if the configuration says so."""
        if self.frozen:
            self.model.requires_grad_(False).eval()

    def train(self, mode: bool = True):
        super().train(mode)
        if self.frozen:
            self.model.eval()
        return self

    def forward(
        self,
        input_ids: torch.LongTensor | None,
        inputs_embeds: torch.FloatTensor | None,
        attention_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Source tokens. Either these or `inputs_embeds`.
            inputs_embeds (`torch.FloatTensor` of shape `(batch_size, sequence_length, reader_width)`, *optional*):
                Source tokens in the reader's embedding.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
                1 for tokens, 0 for padding.

        Returns:
            `torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`.
        """
        inputs = {"input_ids": input_ids} if inputs_embeds is None else {"inputs_embeds": inputs_embeds}
        back = None
        if attention_mask is not None:
            is_token = (attention_mask != 0).long()
            order = is_token.argsort(dim=1, descending=True, stable=True)
            back = order.argsort(dim=1)
            rows = torch.arange(order.shape[0], device=order.device).unsqueeze(1)
            inputs = {name: value[rows, order] for name, value in inputs.items()}
            inputs["attention_mask"] = is_token[rows, order]
        # Nothing can learn from a frozen reader but adapters inside it, and whoever asks about its inputs. Under
        # activation checkpointing the library would record its passes all the same.
        learns = inputs_embeds is not None or any(parameter.requires_grad for parameter in self.model.parameters())
        with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
            states = self.model(**inputs, return_dict=True).last_hidden_state
        return self.projection(states if back is None else states[rows, back])


class ConnectionTransformerCompression(GradientCheckpointingLayer):
    """
    Reads a token sequence into the slots by single-head attention: each token spreads its weight over the slots
    (softmax over slots), then each slot takes the weighted mean of the values of its tokens.
    """

    def __init__(self, config: ConnectionTransformerConfig):
        super().__init__()
        self.config = config
        self.register_buffer(
            "slots",
            orthonormal_slots(config.num_slots, config.hidden_size, config.slot_seed).to(torch.get_default_dtype()),
        )
        self.q_proj = ConnectionTransformerProjection(
            config.hidden_size, config.hidden_size, config.initial_compression_gain
        )
        self.k_proj = ConnectionTransformerProjection(config.hidden_size, config.hidden_size)
        self.v_proj = ConnectionTransformerProjection(config.hidden_size, config.hidden_size)

    def forward(
        self, token_states: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            token_states (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`):
                Embedded tokens.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
                1 for tokens, 0 for padding.

        Returns:
            Slot states of shape `(batch_size, num_slots, hidden_size)` and weights of shape
            `(batch_size, sequence_length, num_slots)`.
        """
        scores = self.q_proj(token_states) @ self.k_proj(self.slots).T * self.config.hidden_size**-0.5
        weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
        if attention_mask is not None:
            weights = weights * (attention_mask != 0).unsqueeze(-1)
        if attention_mask is not None or self.config.compression_norm == "mean":
            weights = weights / (weights.sum(dim=1, keepdim=True) + 1e-8)
        values = self.v_proj(token_states)
        return self.slots + weights.to(values.dtype).transpose(1, 2) @ values, weights


# The rules of `config.halting` that a head of its own learns.
LEARNED_RULES = ("learned", "ponder")


def halting_chances(measures: torch.Tensor) -> torch.Tensor:
    """
    Chance of a sample to stop after each step, `p_t = λ_t Π_{s<t} (1 - λ_s)`, where the last step takes what is left
    (Banino et al., "PonderNet", arXiv:2107.05407, equation 2).

    Args:
        measures (`torch.FloatTensor` of shape `(num_steps, batch_size)`): Chances 1 - λ_t to go on after each step.

    Returns:
        `torch.FloatTensor` of the same shape, which sums to 1 over the steps.
    """
    reached = torch.cat([torch.ones_like(measures[:1]), measures[:-1].cumprod(dim=0)])
    stops = torch.cat([1 - measures[:-1], torch.ones_like(measures[:1])])
    return reached * stops


def ponder_divergence(chances: torch.Tensor, prior: float) -> torch.Tensor:
    """
    Kullback-Leibler divergence of the chances to stop from a geometric distribution that is cut off at the last step
    (PonderNet, equation 5), mean over samples.

    Args:
        chances (`torch.FloatTensor` of shape `(num_steps, batch_size)`): As [`halting_chances`] returns them.
        prior (`float`): Chance to stop after each step of the geometric distribution.

    Returns:
        `torch.FloatTensor` of shape `()`.
    """
    expected = halting_chances(torch.full_like(chances[:, :1], 1 - prior))
    # Where a chance is zero the logarithm has no slope.
    logarithms = chances.clamp_min(torch.finfo(chances.dtype).tiny).log()
    return (chances * (logarithms - expected.log())).sum(dim=0).mean()


class ConnectionTransformerHaltingHead(nn.Module):
    """
    Estimates from the slots and their last change how likely it is that the sample should go on. With
    `halting="learned"` that is how likely the answer that would be read out now is wrong, and the head looks at
    detached states: the slots learn nothing from it. With `halting="ponder"` it is 1 - λ of PonderNet, and they do.
    """

    def __init__(self, config: ConnectionTransformerConfig):
        super().__init__()
        self.detached = config.halting == "learned"
        self.hidden_proj = nn.Linear(2 * config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, 1)

    def forward(self, slot_states: torch.Tensor, previous_states: torch.Tensor) -> torch.Tensor:
        """
        Args:
            slot_states (`torch.FloatTensor` of shape `(batch_size, num_slots, hidden_size)`): States after a step.
            previous_states (`torch.FloatTensor` of the same shape): States before it.

        Returns:
            Probability to go on in float32 or better, of shape `(batch_size,)`.
        """
        if self.detached:
            slot_states, previous_states = slot_states.detach(), previous_states.detach()
        # Transposed, slot-major states are contiguous.
        states, previous_states = slot_states.transpose(0, 1), previous_states.transpose(0, 1)
        features = torch.relu(self.hidden_proj(torch.cat([states, states - previous_states], dim=-1)))
        # One slot that is not done is enough to go on: the largest over the slots, where a mean would drown it.
        features = features.amax(dim=0)
        scores = self.out_proj(features).squeeze(-1)
        return torch.sigmoid(-scores.to(torch.promote_types(scores.dtype, torch.float32)))


class ConnectionTransformerReasoningStep(GradientCheckpointingLayer):
    """
    One reasoning step, `LayerNorm(x + α ReLU(influence(x)) [+ x₀])`, and the measure that decides about the next one.
    """

    def __init__(self, config: ConnectionTransformerConfig):
        super().__init__()
        self.config = config
        self.connections = CONNECTION_TYPES[config.connection_type](config)
        num_norms = 1 if config.share_step_norm else config.max_reasoning_steps
        self.layer_norms = nn.ModuleList(
            nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) for _ in range(num_norms)
        )
        if config.halting in LEARNED_RULES:
            self.halting_head = ConnectionTransformerHaltingHead(config)

    def forward(
        self,
        slot_states: torch.Tensor,
        initial_states: torch.Tensor,
        prepared: Any,
        active: torch.Tensor | None,
        step: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """
        Args:
            slot_states (`torch.FloatTensor` of shape `(batch_size, num_slots, hidden_size)`): States before the step.
            initial_states (`torch.FloatTensor` of the same shape): States before the first step.
            prepared: What the connections prepared for this step.
            active (`torch.BoolTensor` of shape `(batch_size,)`, *optional*): Samples that have not stopped; the others
                keep their states. `None`: all.
            step (`int`): Index of the step, from 0.

        Returns:
            States after the step; rectified influence, both of the shape of `slot_states`; and the measure of shape
            `(batch_size,)`, or `None` when `halting="none"`.
        """
        # In place where nothing needs what was there before.
        update = torch.relu_(self.connections(slot_states, prepared))
        candidate = torch.add(slot_states, update, alpha=self.config.update_scale)
        if self.config.inject_input:
            candidate = candidate.add_(initial_states)
        layer_norm = self.layer_norms[0 if self.config.share_step_norm else step]
        # The norm would copy a transposed tensor.
        candidate = layer_norm(candidate.transpose(0, 1)).transpose(0, 1)
        measure = self.halting_measure(slot_states, candidate, update)
        if active is not None:
            candidate = torch.where(active[:, None, None], candidate, slot_states)
        return candidate, update, measure

    def halting_measure(
        self, slot_states: torch.Tensor, candidate: torch.Tensor, update: torch.Tensor
    ) -> torch.Tensor | None:
        """The measure of `config.halting` for one step, in float32 or better: shape `(batch_size,)`."""
        halting = self.config.halting
        if halting == "none":
            return None
        if halting in LEARNED_RULES:
            return self.halting_head(candidate, slot_states)
        dtype = torch.promote_types(candidate.dtype, torch.float32)
        if halting in ("state_change", "slot_change"):
            candidate = candidate.to(dtype)
            change = candidate - slot_states.to(dtype)
            if halting == "state_change":
                return sample_norm(change) / sample_norm(candidate).clamp_min(torch.finfo(dtype).tiny)
            sizes = torch.linalg.vector_norm(candidate, dim=-1).clamp_min(torch.finfo(dtype).tiny)
            return (torch.linalg.vector_norm(change, dim=-1) / sizes).amax(dim=1)
        largest = torch.linalg.vector_norm(update.to(dtype), dim=-1).amax(dim=1)
        if halting == "global_update_norm" and largest.numel() > 0:
            largest = largest.amax().expand_as(largest)
        return largest


SLOT_STATES = OutputRecorder(ConnectionTransformerReasoningStep, index=0)
# Versions of the library that can select hidden states by negative indices count them by this field.
SLOT_STATES.num_hidden_layers_key = "max_reasoning_steps"


class ConnectionTransformerReasoning(nn.Module):
    """
    The loop of reasoning steps with a stop per sample.

    A sample takes step t if it has not stopped; it stops after the first step whose measure m_t is at most the
    threshold τ, and after the bound K at the latest. Its soft step count is `1 + Σ_{t<K} Π_{s≤t} (1 - λ_s)` with
    `λ_s = sigmoid((ln τ - ln m_s) / Θ)`, or `1 - m_s` with `halting="ponder"`, and λ_s = 1 in the steps after it has
    stopped.
    """

    def __init__(self, config: ConnectionTransformerConfig):
        super().__init__()
        self.config = config
        self.step = ConnectionTransformerReasoningStep(config)

    def forward(
        self, slot_states: torch.Tensor, max_steps: int, compact: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Args:
            slot_states (`torch.FloatTensor` of shape `(batch_size, num_slots, hidden_size)`): Initial states.
            max_steps (`int`): Bound on the steps (K).
            compact (`bool`): Whether samples that have stopped leave the batch, so that they cost nothing more. The
                number of passes then depends on the data. Otherwise there are always `max_steps` passes in which
                stopped samples keep their states.

        Returns:
            Final states, steps taken of shape `(batch_size,)`, and soft step counts of shape `(batch_size,)`.
        """
        prepared = self.step.connections.prepare(max_steps, None if compact else slot_states.shape[0])
        loop = self.compacted_loop if compact else self.masked_loop
        slot_states, steps, expected_steps = loop(slot_major(slot_states), prepared, max_steps)
        return slot_states.contiguous(), steps, expected_steps

    def continuation(self, measure: torch.Tensor) -> torch.Tensor:
        """Soft probability 1 - λ to go on after a step with this measure, elementwise."""
        if self.config.halting == "ponder":
            return measure
        threshold = self.config.halting_threshold
        log_threshold = math.log(threshold) if threshold > 0 else -math.inf
        log_measure = measure.clamp_min(torch.finfo(measure.dtype).tiny).log()
        return torch.sigmoid((log_measure - log_threshold) / self.config.halting_temperature)

    def masked_loop(self, slot_states, prepared, max_steps):
        """As `forward`: `max_steps` passes over the whole batch."""
        initial_states = slot_states
        batch_size, dtype = slot_states.shape[0], torch.promote_types(slot_states.dtype, torch.float32)
        active = torch.ones(batch_size, dtype=torch.bool, device=slot_states.device)
        steps = torch.zeros(batch_size, dtype=torch.long, device=slot_states.device)
        survival = torch.ones(batch_size, dtype=dtype, device=slot_states.device)
        expected_steps = survival
        # With every step supervised a sample goes on, so that what it says after it could have stopped is learnt too.
        go_on = self.config.halting == "none" or (self.training and self.config.deep_supervision > 0)
        for step in range(max_steps):
            still = None if go_on else active
            slot_states, _, measure = self.step(slot_states, initial_states, prepared[step], still, step)
            steps = steps + active
            if measure is not None:
                survival = torch.where(active, survival * self.continuation(measure), 0.0)
                active = active & (measure > self.config.halting_threshold)
            if step + 1 < max_steps:
                expected_steps = expected_steps + survival
        return slot_states, steps, expected_steps

    def compacted_loop(self, slot_states, prepared, max_steps):
        """As `forward`: each pass over the samples that have not stopped, until there are none."""
        initial_states = slot_states
        batch_size, dtype = slot_states.shape[0], torch.promote_types(slot_states.dtype, torch.float32)
        rows = torch.arange(batch_size, device=slot_states.device)
        survival = torch.ones(batch_size, dtype=dtype, device=slot_states.device)
        expected_steps = survival
        finished = []
        for step in range(max_steps):
            slot_states, _, measure = self.step(slot_states, initial_states, prepared[step], None, step)
            if step + 1 == max_steps:
                break
            survival = survival * self.continuation(measure)
            expected_steps = expected_steps + survival
            active = measure > self.config.halting_threshold
            kept = active.nonzero().squeeze(1)
            if kept.shape[0] == rows.shape[0]:
                continue
            stopped = active.logical_not().nonzero().squeeze(1)
            steps = torch.full_like(stopped, step + 1)
            finished.append((rows[stopped], select_samples(slot_states, stopped), steps, expected_steps[stopped]))
            rows, survival, expected_steps = rows[kept], survival[kept], expected_steps[kept]
            slot_states, initial_states = select_samples(slot_states, kept), select_samples(initial_states, kept)
            if rows.shape[0] == 0:
                break
        finished.append((rows, slot_states, torch.full_like(rows, step + 1), expected_steps))
        order = torch.cat([part[0] for part in finished]).argsort()
        _, slot_states, steps, expected_steps = (torch.cat(tensors)[order] for tensors in zip(*finished, strict=True))
        return slot_states, steps, expected_steps


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out; `query`, `key` and `value` are of shape `(batch_size, num_heads, length, head_dim)`."""
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    weights = nn.functional.dropout(weights.to(query.dtype), p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class ConnectionTransformerAttention(nn.Module):
    """Multi-head attention with biases: causal over the target, or, given `key_value_states`, over the slots."""

    def __init__(self, config: ConnectionTransformerConfig, layer_idx: int, is_causal: bool):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = is_causal
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def split_heads(self, states: torch.Tensor) -> torch.Tensor:
        return states.view(*states.shape[:-1], -1, self.head_dim).transpose(1, 2)

    def forward(
        self,
        hidden_states: torch.Tensor,
        key_value_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        is_cross_attention = key_value_states is not None
        cache = None
        if past_key_values is not None:
            cache = (
                past_key_values.cross_attention_cache if is_cross_attention else past_key_values.self_attention_cache
            )
        if is_cross_attention and cache is not None and past_key_values.is_updated.get(self.layer_idx):
            # The slots do not change while the target grows.
            key, value = cache.layers[self.layer_idx].keys, cache.layers[self.layer_idx].values
        else:
            source = key_value_states if is_cross_attention else hidden_states
            key, value = self.split_heads(self.k_proj(source)), self.split_heads(self.v_proj(source))
            if cache is not None:
                key, value = cache.update(key, value, self.layer_idx)
                if is_cross_attention:
                    past_key_values.is_updated[self.layer_idx] = True

        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention(
            self,
            self.split_heads(self.q_proj(hidden_states)),
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.out_proj(output.reshape(hidden_states.shape)), weights


class ConnectionTransformerDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm decoder layer: causal self-attention, cross-attention to the slots, feed-forward network."""

    def __init__(self, config: ConnectionTransformerConfig, layer_idx: int):
        super().__init__()
        self.self_attn_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = ConnectionTransformerAttention(config, layer_idx, is_causal=True)
        self.cross_attn_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.cross_attn = ConnectionTransformerAttention(config, layer_idx, is_causal=False)
        self.feed_forward_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation_fn = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(config.dropout)
        self.activation_dropout = nn.Dropout(config.activation_dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        attended, _ = self.self_attn(
            self.self_attn_layer_norm(hidden_states),
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
        hidden_states = hidden_states + self.dropout(attended)
        # Every slot is real: the source's padding mask has nothing to say here.
        attended, _ = self.cross_attn(
            self.cross_attn_layer_norm(hidden_states),
            key_value_states=encoder_hidden_states,
            past_key_values=past_key_values,
            **kwargs,
        )
        hidden_states = hidden_states + self.dropout(attended)
        inner = self.activation_dropout(self.activation_fn(self.fc1(self.feed_forward_layer_norm(hidden_states))))
        return hidden_states + self.dropout(self.fc2(inner))


class ConnectionTransformerPreTrainedModel(PreTrainedModel):
    """
    Initialisation, saving and resizing shared by all classes.

    Scalar connections start as products of random unit vectors, as in the original implementation, the others as their
    classes say, all with a zero diagonal; the projections of compression and expansion start as orthogonal matrices.
    Embeddings start as normal with standard deviation
    `hidden_size ** -0.5`, padding as zero: a token then has about the length of a slot, which is 1. (At the original's
    0.02 the slots drown the tokens, and training starts slowly.) LayerNorms start as identity, biases as zero, all
    other weights as normal with standard deviation `initializer_range`.
    """

    config: ConnectionTransformerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ConnectionTransformerDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, ConnectionTransformerCompression):
            init.copy_(
                module.slots, orthonormal_slots(self.config.num_slots, self.config.hidden_size, self.config.slot_seed)
            )
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=self.config.hidden_size**-0.5)
            # The slice does not carry the mark of a loaded weight.
            if module.padding_idx is not None and not getattr(module.weight, "_is_hf_initialized", False):
                init.zeros_(module.weight[module.padding_idx])
        elif isinstance(module, ConnectionTransformerProjection):
            init.orthogonal_(module.weight, gain=module.gain)
        elif isinstance(module, tuple(CONNECTION_TYPES.values())):
            module.initialise()

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs):
        # A saved head names only its own class; with the complete map every Auto class can open its folder.
        if self._auto_class is not None:
            module_name = "modeling_connection_transformer"
            self.config.auto_map = {
                **(getattr(self.config, "auto_map", None) or {}),
                "AutoConfig": "configuration_connection_transformer.ConnectionTransformerConfig",
                "AutoModel": f"{module_name}.ConnectionTransformerModel",
                "AutoModelForSeq2SeqLM": f"{module_name}.ConnectionTransformerForConditionalGeneration",
                "AutoModelForSequenceClassification": f"{module_name}.ConnectionTransformerForSequenceClassification",
                "AutoModelForMultipleChoice": f"{module_name}.ConnectionTransformerForMultipleChoice",
                "AutoModelForMaskedLM": f"{module_name}.ConnectionTransformerForMaskedLM",
            }
        super().save_pretrained(save_directory, **kwargs)

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        loaded = super().from_pretrained(*args, **kwargs)
        # The library makes new parameters of the weights it reads, all of them trainable.
        for module in (loaded[0] if isinstance(loaded, tuple) else loaded).modules():
            if isinstance(module, ConnectionTransformerReader):
                module.freeze()
        return loaded

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """
        As in the library; source embedding, target embedding and output projection are resized together.

        Raises:
            ValueError: source and target have vocabularies of different sizes.
        """
        if self.config.decoder_vocab_size not in (None, self.config.vocab_size):
            raise ValueError(
                f"resize_token_embeddings needs one vocabulary, but vocab_size={self.config.vocab_size} and "
                f"decoder_vocab_size={self.config.decoder_vocab_size} differ"
            )
        embeddings = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        if self.config.decoder_vocab_size is not None:
            self.config.decoder_vocab_size = self.config.vocab_size
        if self.config.reader_config is not None:
            self.config.reader_config.vocab_size = embeddings.num_embeddings
        return embeddings

    def _resize_token_embeddings(self, new_num_tokens, pad_to_multiple_of=None, mean_resizing=True):
        embeddings = super()._resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        decoder = self.get_decoder()
        if isinstance(decoder, ConnectionTransformerDecoder):
            decoder.embed_tokens = self._get_resized_embeddings(
                decoder.embed_tokens, embeddings.num_embeddings, mean_resizing=mean_resizing
            )
        return embeddings


class ConnectionTransformerEncoder(ConnectionTransformerPreTrainedModel):
    """
    Embeds the source, reads it into the slots and lets the slots reason.

    Args:
        config ([`ConnectionTransformerConfig`]): Configuration.
    """

    _can_record_outputs = {
        "hidden_states": SLOT_STATES,
        "slot_updates": OutputRecorder(ConnectionTransformerReasoningStep, index=1),
        "halting_measures": OutputRecorder(ConnectionTransformerReasoningStep, index=2),
        "compression_weights": OutputRecorder(ConnectionTransformerCompression, index=1),
    }

    def __init__(self, config: ConnectionTransformerConfig):
        super().__init__(config)
        if config.reader_config is not None:
            self.reader = ConnectionTransformerReader(config)
        else:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, padding_index(config))
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
            self.embed_scale = config.hidden_size**0.5 if config.scale_embedding else 1.0
        self.dropout = nn.Dropout(config.dropout)
        self.compression = ConnectionTransformerCompression(config)
        self.reasoning = ConnectionTransformerReasoning(config)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed_tokens if self.config.reader_config is None else self.reader.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Embedding):
        if self.config.reader_config is None:
            self.embed_tokens = value
        else:
            self.reader.model.set_input_embeddings(value)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        max_reasoning_steps: int | None = None,
        return_token_states: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ConnectionTransformerEncoderOutput:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Source tokens. Either these or `inputs_embeds`.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
                1 for tokens, 0 for padding. `None`: no padding.
            inputs_embeds (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`, *optional*):
                Embedded source tokens, without positions; with a reader, in its embedding and of its width.
            max_reasoning_steps (`int`, *optional*):
                Bound on the steps of this call, instead of the configuration's.
            return_token_states (`bool`, *optional*, defaults to `False`):
                Whether to return the embedded tokens too, for a head that reads the slots out at their positions.

        Raises:
            ValueError: neither or both inputs are given, the mask is not two-dimensional, a source has no token or more
                than `max_position_embeddings` columns, or the bound is not positive or needs more LayerNorms than there
                are.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        max_steps = self.checked_bound(max_reasoning_steps)
        source = input_ids if inputs_embeds is None else inputs_embeds
        source_length = source.shape[1]
        if source_length > self.config.max_position_embeddings:
            raise ValueError(
                f"the source has {source_length} columns, max_position_embeddings is "
                f"{self.config.max_position_embeddings}"
            )
        if source_length == 0:
            raise ValueError("the source is empty; every sequence needs at least one token")
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError(
                f"attention_mask must be of shape (batch_size, sequence_length), got {tuple(attention_mask.shape)}"
            )
        if attention_mask is not None:
            has_token = (attention_mask != 0).any(dim=1)
            if is_torchdynamo_compiling():
                # The library's check asks for a number, at which a compiled graph ends.
                torch._assert_async(has_token.all(), "attention_mask is zero in all of a row")
            else:
                torch_compilable_check(
                    has_token,
                    lambda: (
                        f"attention_mask is zero in all of row(s) {(~has_token).nonzero().flatten().tolist()}; every "
                        "sequence needs at least one token"
                    ),
                )
        if self.config.reader_config is not None:
            token_states = self.reader(input_ids, inputs_embeds, attention_mask)
        else:
            if inputs_embeds is None:
                inputs_embeds = self.embed_tokens(input_ids)
            if attention_mask is None:
                positions = torch.arange(source_length, device=source.device)
            else:
                positions = token_positions(attention_mask)
            token_states = (inputs_embeds + self.embed_positions(positions)) * self.embed_scale
        token_states = self.dropout(token_states)
        slot_states, _ = self.compression(token_states, attention_mask)

        recording = any(
            kwargs.get(f"output_{key}", getattr(self.config, f"output_{key}", False))
            for key in self._can_record_outputs
        )
        # In training the number of passes must not depend on the data: all ranks make the same ones.
        compact = not (self.training or recording or self.config.halting == "none" or is_torchdynamo_compiling())
        slot_states, steps, expected_steps = self.reasoning(slot_states, max_steps, compact)
        return ConnectionTransformerEncoderOutput(
            last_hidden_state=slot_states,
            reasoning_steps=steps,
            expected_steps=expected_steps,
            token_states=token_states if return_token_states else None,
        )

    def checked_bound(self, max_reasoning_steps: int | None) -> int:
        """The bound for one call, or a `ValueError` that names the rule it breaks."""
        bound = self.config.max_reasoning_steps if max_reasoning_steps is None else max_reasoning_steps
        if isinstance(bound, bool) or not isinstance(bound, int) or bound < 1:
            raise ValueError(f"max_reasoning_steps={bound!r} must be a positive int")
        if not self.config.share_step_norm and bound > self.config.max_reasoning_steps:
            raise ValueError(
                f"max_reasoning_steps={bound} exceeds the configuration's {self.config.max_reasoning_steps}, and with "
                "share_step_norm=False no later step has a LayerNorm"
            )
        return bound


class ConnectionTransformerDecoder(ConnectionTransformerPreTrainedModel):
    """
    Pre-norm Transformer decoder that attends to the slots.

    Args:
        config ([`ConnectionTransformerConfig`]): Configuration.
    """

    _can_record_outputs = {
        "hidden_states": ConnectionTransformerDecoderLayer,
        "attentions": OutputRecorder(ConnectionTransformerAttention, index=1, layer_name="self_attn"),
        "cross_attentions": OutputRecorder(ConnectionTransformerAttention, index=1, layer_name="cross_attn"),
    }

    def __init__(self, config: ConnectionTransformerConfig):
        super().__init__(config)
        vocab_size = config.decoder_vocab_size or config.vocab_size
        self.embed_tokens = nn.Embedding(vocab_size, config.hidden_size, padding_index(config))
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.embed_scale = config.hidden_size**0.5 if config.scale_embedding else 1.0
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(
            ConnectionTransformerDecoderLayer(config, layer_idx) for layer_idx in range(config.num_decoder_layers)
        )
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.FloatTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, target_length)`, *optional*):
                Target tokens. Either these or `inputs_embeds`.
            attention_mask (`torch.Tensor` of shape `(batch_size, past_length + target_length)`, *optional*):
                1 for tokens, 0 for padding, over cached and given tokens. `None`: no padding.
            encoder_hidden_states (`torch.FloatTensor` of shape `(batch_size, num_slots, hidden_size)`):
                Slot states.
            past_key_values (`EncoderDecoderCache`, *optional*):
                Keys and values of earlier calls.
            inputs_embeds (`torch.FloatTensor` of shape `(batch_size, target_length, hidden_size)`, *optional*):
                Embedded target tokens, without positions.
            use_cache (`bool`, *optional*):
                Whether to return keys and values for the next call.

        Raises:
            ValueError: neither or both inputs are given, or the target grows beyond `max_position_embeddings`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of decoder_input_ids and decoder_inputs_embeds must be given")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = EncoderDecoderCache(DynamicCache(config=self.config), DynamicCache(config=self.config))

        target_length = inputs_embeds.shape[1]
        past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
        if not is_torchdynamo_compiling() and past_length + target_length > self.config.max_position_embeddings:
            raise ValueError(
                f"the target has {int(past_length) + target_length} tokens, max_position_embeddings is "
                f"{self.config.max_position_embeddings}"
            )
        if attention_mask is not None and attention_mask.ndim == 2:
            positions = token_positions(attention_mask)[:, -target_length:]
        else:
            positions = torch.arange(target_length, device=inputs_embeds.device) + past_length

        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values.self_attention_cache if past_key_values is not None else None,
        )
        hidden_states = self.dropout((inputs_embeds + self.embed_positions(positions)) * self.embed_scale)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                encoder_hidden_states,
                attention_mask=causal_mask,
                past_key_values=past_key_values,
                **kwargs,
            )
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=self.dropout(self.layer_norm(hidden_states)), past_key_values=past_key_values
        )


class ConnectionTransformerModel(ConnectionTransformerPreTrainedModel):
    """
    Encoder and decoder without a head; the encoder alone if `config.is_encoder_decoder` is `False`.

    The architecture of the public implementation `YeoJune/conn_trans`: with a decoder and scalar connections its later
    form; its earlier one, without a decoder, is [`ConnectionTransformerForMaskedLM`]. Different from it by default:
    samples stop on their own relative state change, one LayerNorm serves all steps, the slots' initial state is added
    at every step, compression takes a mean with or without a mask, embeddings are tied.

    Args:
        config ([`ConnectionTransformerConfig`]): Configuration.

    Example:

    ```python
    >>> import torch
    >>> from hf_models.connection_transformer import ConnectionTransformerConfig, ConnectionTransformerModel

    >>> config = ConnectionTransformerConfig(
    ...     vocab_size=100, hidden_size=16, num_slots=8, num_attention_heads=2, num_decoder_layers=1
    ... )
    >>> model = ConnectionTransformerModel(config).eval()
    >>> outputs = model(input_ids=torch.tensor([[5, 6, 7, 2]]), decoder_input_ids=torch.tensor([[1, 8]]))
    >>> outputs.last_hidden_state.shape
    torch.Size([1, 2, 16])
    >>> outputs.reasoning_steps.shape
    torch.Size([1])
    ```
    """

    _tied_weights_keys = {"decoder.embed_tokens.weight": "encoder.embed_tokens.weight"}

    def __init__(self, config: ConnectionTransformerConfig):
        super().__init__(config)
        self.encoder = ConnectionTransformerEncoder(config)
        if config.reader_config is not None or not config.is_encoder_decoder:
            self._tied_weights_keys = None
        if config.is_encoder_decoder:
            self.decoder = ConnectionTransformerDecoder(config)
        else:
            # The encoder alone can be loaded from the folder of a whole model.
            self._keys_to_ignore_on_load_unexpected = [r"^(model\.)?decoder\.", r"^lm_head\.", r"^expansion\."]
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.encoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Embedding):
        self.encoder.set_input_embeddings(value)
        tied = self.config.tie_word_embeddings and self.config.reader_config is None
        if self.config.is_encoder_decoder and tied:
            self.decoder.embed_tokens.weight = value.weight
            self.decoder.embed_tokens.num_embeddings = value.num_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: ConnectionTransformerEncoderOutput | tuple | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        decoder_inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        max_reasoning_steps: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ConnectionTransformerModelOutput | ConnectionTransformerEncoderOutput:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Source tokens. Either these, `inputs_embeds` or `encoder_outputs`.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
                1 for source tokens, 0 for padding. `None`: no padding.
            decoder_input_ids (`torch.LongTensor` of shape `(batch_size, target_length)`, *optional*):
                Target tokens. Either these or `decoder_inputs_embeds`.
            decoder_attention_mask (`torch.Tensor` of shape `(batch_size, past_length + target_length)`, *optional*):
                1 for target tokens, 0 for padding. `None`: no padding.
            encoder_outputs ([`ConnectionTransformerEncoderOutput`] or `tuple`, *optional*):
                What the encoder has returned for the source, whose inputs are then ignored.
            past_key_values (`EncoderDecoderCache`, *optional*):
                Keys and values of earlier calls.
            inputs_embeds (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`, *optional*):
                Embedded source tokens, without positions.
            decoder_inputs_embeds (`torch.FloatTensor` of shape `(batch_size, target_length, hidden_size)`, *optional*):
                Embedded target tokens, without positions.
            use_cache (`bool`, *optional*):
                Whether to return keys and values for the next call.
            max_reasoning_steps (`int`, *optional*):
                Bound on the reasoning steps of this call, instead of the configuration's. May be larger than that when
                `share_step_norm` is set.

        Returns:
            [`ConnectionTransformerModelOutput`], or [`ConnectionTransformerEncoderOutput`] from an encoder alone.

        Raises:
            ValueError: as the encoder and the decoder do.
        """
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids=input_ids,
                attention_mask=attention_mask,
                inputs_embeds=inputs_embeds,
                max_reasoning_steps=max_reasoning_steps,
                **kwargs,
            )
        elif not isinstance(encoder_outputs, ModelOutput):
            encoder_outputs = ConnectionTransformerEncoderOutput(*encoder_outputs[:3])
        if not self.config.is_encoder_decoder:
            return encoder_outputs

        decoder_outputs = self.decoder(
            input_ids=decoder_input_ids,
            attention_mask=decoder_attention_mask,
            encoder_hidden_states=encoder_outputs[0],
            past_key_values=past_key_values,
            inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        return ConnectionTransformerModelOutput(
            last_hidden_state=decoder_outputs.last_hidden_state,
            past_key_values=decoder_outputs.past_key_values,
            decoder_hidden_states=decoder_outputs.hidden_states,
            decoder_attentions=decoder_outputs.attentions,
            cross_attentions=decoder_outputs.cross_attentions,
            encoder_last_hidden_state=encoder_outputs[0],
            encoder_hidden_states=encoder_outputs.get("hidden_states"),
            reasoning_steps=encoder_outputs.get("reasoning_steps"),
            expected_steps=encoder_outputs.get("expected_steps"),
            slot_updates=encoder_outputs.get("slot_updates"),
            halting_measures=encoder_outputs.get("halting_measures"),
            compression_weights=encoder_outputs.get("compression_weights"),
        )


def auxiliary_losses(
    model: ConnectionTransformerModel,
    expected_steps: torch.Tensor | None,
    share: torch.Tensor | float,
    step_cost_weight: float | None,
    every_step: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """
    The parts of the loss besides the task's own.

    Args:
        model ([`ConnectionTransformerModel`]): Holds the connections and the configuration.
        expected_steps (`torch.FloatTensor` of shape `(batch_size,)`, *optional*): Soft step counts.
        share (`float` or `torch.Tensor` of shape `()`): Share of this micro-batch in the whole batch, in (0, 1].
        step_cost_weight (`float`, *optional*): Weight for this call, instead of the configuration's.
        every_step (`bool`, *optional*, defaults to `False`): Whether the head reads an answer out after every step.

    Returns:
        Orthogonality penalty and step cost, both unweighted and scaled by `share`, and their weighted sum. The penalty
        is `None` if it has no weight and is not cheap, the step cost is `None` without `expected_steps`.

    Raises:
        ValueError: the step cost has a weight, but `expected_steps` is `None`; or every step is to be supervised, but
            the head reads out only the last.
    """
    config = model.config
    if config.deep_supervision > 0 and not every_step:
        raise ValueError(
            f"deep_supervision={config.deep_supervision} needs an answer after every step, which only "
            "ConnectionTransformerForMaskedLM gives"
        )
    step_cost_weight = config.step_cost_weight if step_cost_weight is None else step_cost_weight
    connections = model.encoder.reasoning.step.connections
    weight = connections.source_weight
    orthogonality = None
    total = torch.zeros((), dtype=torch.promote_types(weight.dtype, torch.float32), device=weight.device)
    if config.orthogonality_weight > 0:
        orthogonality = connections.orthogonality_penalty() * share
        total = total + config.orthogonality_weight * orthogonality
    elif connections.has_cheap_penalty:
        with torch.no_grad():
            orthogonality = connections.orthogonality_penalty() * share
    if expected_steps is None:
        if step_cost_weight > 0:
            raise ValueError("step_cost_weight is set, but the given encoder_outputs hold no expected_steps")
        return orthogonality, None, total
    if config.step_cost_target is None:
        step_cost = expected_steps.mean() * share
    else:
        step_cost = (expected_steps - config.step_cost_target).clamp_min(0).square().mean() * share
    if step_cost_weight > 0:
        total = total + step_cost_weight * step_cost
    return orthogonality, step_cost, total


def batch_share(
    sequences: int,
    items: torch.Tensor,
    num_sequences_in_batch: torch.Tensor | int | None,
    num_items_in_batch: torch.Tensor | int | None,
) -> torch.Tensor | float:
    """
    Share of a micro-batch in the whole batch: by sequences if their total is given, else by labels if their total is
    given, else 1.

    Args:
        sequences (`int`): Sequences in this micro-batch.
        items (`torch.LongTensor` of shape `()`): Labels in this micro-batch.
        num_sequences_in_batch (`int` or `torch.Tensor`, *optional*): Sequences in the whole batch.
        num_items_in_batch (`int` or `torch.Tensor`, *optional*): Labels in the whole batch.
    """
    if num_sequences_in_batch is not None:
        return sequences / num_sequences_in_batch
    if num_items_in_batch is not None:
        return items / num_items_in_batch
    return 1.0


def config_for(config: ConnectionTransformerConfig, is_encoder_decoder: bool) -> ConnectionTransformerConfig:
    """The configuration itself or, if it describes the other kind of model, a copy for this kind."""
    if config.is_encoder_decoder == is_encoder_decoder:
        return config
    config = copy.deepcopy(config)
    config.is_encoder_decoder = is_encoder_decoder
    return config


class ConnectionTransformerForConditionalGeneration(ConnectionTransformerPreTrainedModel, GenerationMixin):
    """
    Connection Transformer with a language modelling head on the decoder; see [`ConnectionTransformerModel`].

    Args:
        config ([`ConnectionTransformerConfig`]): Configuration.

    Example:

    ```python
    >>> import torch
    >>> from hf_models.connection_transformer import (
    ...     ConnectionTransformerConfig,
    ...     ConnectionTransformerForConditionalGeneration,
    ... )

    >>> config = ConnectionTransformerConfig(
    ...     vocab_size=100, hidden_size=16, num_slots=8, num_attention_heads=2, num_decoder_layers=1
    ... )
    >>> model = ConnectionTransformerForConditionalGeneration(config).eval()
    >>> input_ids = torch.tensor([[5, 6, 7, 2]])
    >>> outputs = model(input_ids=input_ids, labels=torch.tensor([[8, 9, 2]]))
    >>> outputs.logits.shape
    torch.Size([1, 3, 100])
    >>> generated = model.generate(input_ids, max_reasoning_steps=2, max_new_tokens=3)
    ```
    """

    _tied_weights_keys = {"lm_head.weight": "model.encoder.embed_tokens.weight"}

    def __init__(self, config: ConnectionTransformerConfig):
        config = config_for(config, is_encoder_decoder=True)
        super().__init__(config)
        self.model = ConnectionTransformerModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.decoder_vocab_size or config.vocab_size, bias=False)
        if config.reader_config is not None:
            self._tied_weights_keys = {"lm_head.weight": "model.decoder.embed_tokens.weight"}
        self.post_init()

    def prepare_decoder_input_ids_from_labels(self, labels: torch.LongTensor) -> torch.LongTensor:
        """Decoder input ids for teacher forcing, of the shape of `labels`; see [`shift_right`]."""
        return shift_right(labels, self.config.decoder_start_token_id, self.config.pad_token_id)[0]

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: ConnectionTransformerEncoderOutput | tuple | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        decoder_inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        max_reasoning_steps: int | None = None,
        step_cost_weight: float | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        num_sequences_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ConnectionTransformerSeq2SeqLMOutput:
        r"""
        Args as in [`ConnectionTransformerModel.forward`], and:
            labels (`torch.LongTensor` of shape `(batch_size, target_length)`, *optional*):
                Target tokens, not shifted, -100 where there is none. Without decoder inputs they are made from these.
            step_cost_weight (`float`, *optional*):
                Weight of the step cost in this call, instead of the configuration's.
            num_items_in_batch (`int` or `torch.Tensor` of shape `()`, *optional*):
                Number of labels in the whole batch when this is one of several micro-batches: the cross entropy is
                summed and divided by it. Otherwise the mean over the labels is taken.
            num_sequences_in_batch (`int` or `torch.Tensor` of shape `()`, *optional*):
                Number of sequences in the whole batch: the other parts of the loss are scaled by this micro-batch's
                share of it. Without it the share is counted in labels.

        Returns:
            [`ConnectionTransformerSeq2SeqLMOutput`], with the loss `cross entropy + orthogonality_weight *
            orthogonality + step_cost_weight * step cost` when `labels` is given.

        Raises:
            ValueError: as [`ConnectionTransformerModel.forward`] does, or the step cost has a weight and
                `encoder_outputs` without `expected_steps` are given.
        """
        if labels is not None:
            use_cache = False
            if decoder_input_ids is None and decoder_inputs_embeds is None:
                decoder_input_ids, shifted_mask = shift_right(
                    labels, self.config.decoder_start_token_id, self.config.pad_token_id
                )
                if decoder_attention_mask is None:
                    decoder_attention_mask = shifted_mask
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            encoder_outputs=encoder_outputs,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            max_reasoning_steps=max_reasoning_steps,
            **kwargs,
        )
        logits = self.lm_head(outputs.last_hidden_state)

        loss = cross_entropy = orthogonality = step_cost = None
        if labels is not None:
            labels = labels.to(logits.device)
            num_labels = (labels != -100).sum()
            cross_entropy = nn.functional.cross_entropy(
                logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1),
                labels.flatten(),
                ignore_index=-100,
                label_smoothing=self.config.label_smoothing,
                reduction="sum",
            ) / (num_labels.clamp_min(1) if num_items_in_batch is None else num_items_in_batch)
            share = batch_share(labels.shape[0], num_labels, num_sequences_in_batch, num_items_in_batch)
            orthogonality, step_cost, auxiliary = auxiliary_losses(
                self.model, outputs.expected_steps, share, step_cost_weight
            )
            loss = cross_entropy + auxiliary
        return ConnectionTransformerSeq2SeqLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            decoder_hidden_states=outputs.decoder_hidden_states,
            decoder_attentions=outputs.decoder_attentions,
            cross_attentions=outputs.cross_attentions,
            encoder_last_hidden_state=outputs.encoder_last_hidden_state,
            encoder_hidden_states=outputs.encoder_hidden_states,
            reasoning_steps=outputs.reasoning_steps,
            expected_steps=outputs.expected_steps,
            slot_updates=outputs.slot_updates,
            halting_measures=outputs.halting_measures,
            compression_weights=outputs.compression_weights,
            cross_entropy_loss=cross_entropy,
            orthogonality_loss=orthogonality,
            step_cost_loss=step_cost,
        )


class ConnectionTransformerForSequenceClassification(ConnectionTransformerPreTrainedModel):
    """
    Encoder of the Connection Transformer with a linear classifier on the mean of the slots. It has no decoder: its copy
    of the configuration says `is_encoder_decoder=False`.

    Args:
        config ([`ConnectionTransformerConfig`]): Configuration; `num_labels` is the number of classes (1: regression).
    """

    _keys_to_ignore_on_load_unexpected = [r"^model\.decoder\.", r"^lm_head\.", r"^expansion\."]

    def __init__(self, config: ConnectionTransformerConfig):
        config = config_for(config, is_encoder_decoder=False)
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = ConnectionTransformerModel(config)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        max_reasoning_steps: int | None = None,
        step_cost_weight: float | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        num_sequences_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ConnectionTransformerClassifierOutput:
        r"""
        Args as in [`ConnectionTransformerForConditionalGeneration.forward`], but:
            labels (`torch.Tensor`, *optional*):
                Classes of shape `(batch_size,)`, -100 where there is none; numbers of shape `(batch_size,)` or
                `(batch_size, num_labels)` for regression; zeros and ones of shape `(batch_size, num_labels)` when
                several classes can hold. Which of these: `config.problem_type`, or else the labels' type.

        Returns:
            [`ConnectionTransformerClassifierOutput`].
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            max_reasoning_steps=max_reasoning_steps,
            **kwargs,
        )
        logits = self.classifier(self.dropout(outputs.last_hidden_state.mean(dim=1)))

        loss = task_loss = orthogonality = step_cost = None
        if labels is not None:
            task_loss, num_labels = self.task_loss(logits, labels.to(logits.device))
            task_loss = task_loss / (num_labels.clamp_min(1) if num_items_in_batch is None else num_items_in_batch)
            share = batch_share(labels.shape[0], num_labels, num_sequences_in_batch, num_items_in_batch)
            orthogonality, step_cost, auxiliary = auxiliary_losses(
                self.model, outputs.expected_steps, share, step_cost_weight
            )
            loss = task_loss + auxiliary
        return ConnectionTransformerClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            reasoning_steps=outputs.reasoning_steps,
            expected_steps=outputs.expected_steps,
            slot_updates=outputs.slot_updates,
            halting_measures=outputs.halting_measures,
            compression_weights=outputs.compression_weights,
            cross_entropy_loss=task_loss,
            orthogonality_loss=orthogonality,
            step_cost_loss=step_cost,
        )

    def task_loss(self, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum of the losses of all labels and their number, by `config.problem_type` or else the labels' type."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        problem_type = self.config.problem_type
        if problem_type is None:
            if self.num_labels == 1:
                problem_type = "regression"
            elif labels.is_floating_point():
                problem_type = "multi_label_classification"
            else:
                problem_type = "single_label_classification"
        if problem_type == "single_label_classification":
            labels = labels.view(-1)
            loss = nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
            return loss, (labels != -100).sum()
        labels = labels.view_as(logits).to(logits.dtype)
        count = torch.tensor(labels.numel(), device=logits.device)
        if problem_type == "regression":
            return nn.functional.mse_loss(logits, labels, reduction="sum"), count
        return nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="sum"), count


class ConnectionTransformerForMultipleChoice(ConnectionTransformerPreTrainedModel):
    """
    Encoder of the Connection Transformer with one score per choice, from the mean of the slots. Each choice is read on
    its own. It has no decoder: its copy of the configuration says `is_encoder_decoder=False`.

    Args:
        config ([`ConnectionTransformerConfig`]): Configuration.
    """

    _keys_to_ignore_on_load_unexpected = [r"^model\.decoder\.", r"^lm_head\.", r"^expansion\."]

    def __init__(self, config: ConnectionTransformerConfig):
        config = config_for(config, is_encoder_decoder=False)
        super().__init__(config)
        self.model = ConnectionTransformerModel(config)
        self.dropout = nn.Dropout(config.dropout)
        # A bias would add the same to every choice.
        self.classifier = nn.Linear(config.hidden_size, 1, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        max_reasoning_steps: int | None = None,
        step_cost_weight: float | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        num_sequences_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ConnectionTransformerClassifierOutput:
        r"""
        Args as in [`ConnectionTransformerForConditionalGeneration.forward`], but:
            input_ids (`torch.LongTensor` of shape `(batch_size, num_choices, sequence_length)`, *optional*):
                Tokens of every choice.
            attention_mask (`torch.Tensor` of shape `(batch_size, num_choices, sequence_length)`, *optional*):
                1 for tokens, 0 for padding.
            inputs_embeds (`torch.FloatTensor` of shape `(batch_size, num_choices, sequence_length, hidden_size)`,
                *optional*): Embedded tokens, without positions.
            labels (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
                Index of the right choice, -100 where there is none.

        Returns:
            [`ConnectionTransformerClassifierOutput`].
        """
        choices = input_ids if input_ids is not None else inputs_embeds
        if choices is None:
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        batch_size, num_choices = choices.shape[:2]
        outputs = self.model(
            input_ids=input_ids.flatten(0, 1) if input_ids is not None else None,
            attention_mask=attention_mask.flatten(0, 1) if attention_mask is not None else None,
            inputs_embeds=inputs_embeds.flatten(0, 1) if inputs_embeds is not None else None,
            max_reasoning_steps=max_reasoning_steps,
            **kwargs,
        )
        logits = self.classifier(self.dropout(outputs.last_hidden_state.mean(dim=1))).view(batch_size, num_choices)

        loss = cross_entropy = orthogonality = step_cost = None
        if labels is not None:
            labels = labels.to(logits.device).view(-1)
            num_labels = (labels != -100).sum()
            cross_entropy = nn.functional.cross_entropy(
                logits.to(torch.promote_types(logits.dtype, torch.float32)),
                labels,
                ignore_index=-100,
                reduction="sum",
            ) / (num_labels.clamp_min(1) if num_items_in_batch is None else num_items_in_batch)
            share = batch_share(batch_size, num_labels, num_sequences_in_batch, num_items_in_batch)
            orthogonality, step_cost, auxiliary = auxiliary_losses(
                self.model, outputs.expected_steps, share, step_cost_weight
            )
            loss = cross_entropy + auxiliary
        return ConnectionTransformerClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            reasoning_steps=outputs.reasoning_steps.view(batch_size, num_choices),
            expected_steps=outputs.expected_steps.view(batch_size, num_choices),
            slot_updates=outputs.slot_updates,
            halting_measures=outputs.halting_measures,
            compression_weights=outputs.compression_weights,
            cross_entropy_loss=cross_entropy,
            orthogonality_loss=orthogonality,
            step_cost_loss=step_cost,
        )


class ConnectionTransformerExpansion(nn.Module):
    """
    Reads the slots out at the positions of a token sequence by single-head attention: the embedded tokens ask, the
    final slots answer.
    """

    def __init__(self, config: ConnectionTransformerConfig):
        super().__init__()
        self.scaling = config.hidden_size**-0.5
        self.q_proj = ConnectionTransformerProjection(config.hidden_size, config.hidden_size)
        self.k_proj = ConnectionTransformerProjection(config.hidden_size, config.hidden_size)
        self.v_proj = ConnectionTransformerProjection(config.hidden_size, config.hidden_size)

    def forward(self, token_states: torch.Tensor, slot_states: torch.Tensor) -> torch.Tensor:
        """
        Args:
            token_states (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`):
                Embedded tokens.
            slot_states (`torch.FloatTensor` of shape `(batch_size, num_slots, hidden_size)`): Final slot states.

        Returns:
            `torch.FloatTensor` of the shape of `token_states`.
        """
        scores = self.q_proj(token_states) @ self.k_proj(slot_states).transpose(1, 2) * self.scaling
        weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
        values = self.v_proj(slot_states)
        return weights.to(values.dtype) @ values


class ConnectionTransformerForMaskedLM(ConnectionTransformerPreTrainedModel):
    """
    Connection Transformer that answers in one forward pass: compression, reasoning, expansion, and one token predicted
    at every position of the source. It has no decoder and does not generate: its copy of the configuration says
    `is_encoder_decoder=False`. The flow of the public implementation `YeoJune/conn_trans` in its form with per-pair
    connections.

    Args:
        config ([`ConnectionTransformerConfig`]): Configuration.

    Raises:
        ValueError: `decoder_vocab_size` differs from `vocab_size`.

    Example:

    ```python
    >>> import torch
    >>> from hf_models.connection_transformer import ConnectionTransformerConfig, ConnectionTransformerForMaskedLM

    >>> config = ConnectionTransformerConfig(
    ...     vocab_size=100, hidden_size=16, num_slots=8, connection_rank=4, connection_type="per_pair"
    ... )
    >>> model = ConnectionTransformerForMaskedLM(config).eval()
    >>> outputs = model(input_ids=torch.tensor([[5, 6, 7, 2]]), labels=torch.tensor([[8, 2, -100, -100]]))
    >>> outputs.logits.shape
    torch.Size([1, 4, 100])
    ```
    """

    _keys_to_ignore_on_load_unexpected = [r"^model\.decoder\.", r"^classifier\."]
    _tied_weights_keys = {"lm_head.weight": "model.encoder.embed_tokens.weight"}

    def __init__(self, config: ConnectionTransformerConfig):
        config = config_for(config, is_encoder_decoder=False)
        if config.decoder_vocab_size not in (None, config.vocab_size):
            raise ValueError(
                "answers at the source's positions need one vocabulary, but "
                f"vocab_size={config.vocab_size} and decoder_vocab_size={config.decoder_vocab_size} differ"
            )
        super().__init__(config)
        self.model = ConnectionTransformerModel(config)
        self.expansion = ConnectionTransformerExpansion(config)
        self.dropout = nn.Dropout(config.dropout)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.reader_config is not None:
            self._tied_weights_keys = None  # the reader's embedding may have another width, and may be frozen
        self.post_init()

    def read_out(self, token_states: torch.Tensor, slot_states: torch.Tensor) -> torch.Tensor:
        """What the slots say at the positions of the tokens: `(batch_size, sequence_length, vocab_size)` logits."""
        return self.lm_head(self.dropout(self.expansion(token_states, slot_states)))

    def summed_cross_entropy(
        self, logits: torch.Tensor, labels: torch.Tensor, reduction: Literal["sum", "none"] = "sum"
    ) -> torch.Tensor:
        """Cross entropy of the labels at the first positions, in float32 or better: one sum, or that of each label."""
        predicted = logits[:, : labels.shape[1]]
        return nn.functional.cross_entropy(
            predicted.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1),
            labels.flatten(),
            ignore_index=-100,
            label_smoothing=self.config.label_smoothing,
            reduction=reduction,
        )

    @staticmethod
    def right_answers(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Whether the most likely token is the label wherever there is one: shape `(batch_size,)`."""
        predicted = logits[:, : labels.shape[1]].argmax(dim=-1)
        return ((predicted == labels) | (labels == -100)).all(dim=1)

    @staticmethod
    def labels_of_steps(labels: torch.Tensor, step_targets: torch.Tensor | None, num_steps: int) -> torch.Tensor:
        """What every step is to predict, step after step: shape `(num_steps * batch_size, target_length)`."""
        if step_targets is None:
            return labels.repeat(num_steps, 1)
        if step_targets.ndim != 3 or step_targets[:, 0].shape != labels.shape:
            raise ValueError(
                f"step_targets must be of shape ({labels.shape[0]}, num_targets, {labels.shape[1]}) beside these "
                f"labels, got {tuple(step_targets.shape)}"
            )
        places = torch.arange(num_steps, device=labels.device).clamp_max(step_targets.shape[1] - 1)
        return step_targets.to(labels.device)[:, places].transpose(0, 1).flatten(0, 1)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        step_targets: torch.LongTensor | None = None,
        max_reasoning_steps: int | None = None,
        step_cost_weight: float | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        num_sequences_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ConnectionTransformerClassifierOutput:
        r"""
        Args as in [`ConnectionTransformerForConditionalGeneration.forward`], but:
            labels (`torch.LongTensor` of shape `(batch_size, target_length)`, *optional*):
                The token to predict at each position, not shifted, -100 where there is none. Column t belongs to column
                t of the source, padding included; `target_length` is at most `sequence_length`.
            step_targets (`torch.LongTensor` of shape `(batch_size, num_targets, target_length)`, *optional*):
                For deep supervision in training: the tokens to predict after each step in place of `labels`, -100
                where there are none; the last ones hold for all later steps. Steps of an algorithm given so are called
                hints (Veličković et al. 2022, arXiv:2205.15659, section 2).

        Returns:
            [`ConnectionTransformerClassifierOutput`].

        Raises:
            ValueError: as the encoder does, or there are more labels than positions, or the step targets are not of the
                labels' batch and length.
        """
        deep_supervision = self.config.deep_supervision if self.training and labels is not None else 0
        if deep_supervision > 0:
            kwargs |= {"output_hidden_states": True, "output_halting_measures": True}
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            max_reasoning_steps=max_reasoning_steps,
            return_token_states=True,
            **kwargs,
        )
        logits = self.read_out(outputs.token_states, outputs.last_hidden_state)

        loss = cross_entropy = orthogonality = step_cost = halting_loss = None
        if labels is not None:
            labels = labels.to(logits.device)
            if labels.shape[1] > logits.shape[1]:
                raise ValueError(
                    f"labels have {labels.shape[1]} columns, but an answer has at most one token per column of the "
                    f"source, which has {logits.shape[1]}"
                )
            num_labels = (labels != -100).sum()
            cross_entropy = self.summed_cross_entropy(logits, labels)
            share = batch_share(labels.shape[0], num_labels, num_sequences_in_batch, num_items_in_batch)
            if deep_supervision > 0:
                step_states = outputs.hidden_states[1:]
                step_logits = self.read_out(outputs.token_states.repeat(len(step_states), 1, 1), torch.cat(step_states))
                step_labels = self.labels_of_steps(labels, step_targets, len(step_states))
                if self.config.halting == "ponder":
                    chances = halting_chances(torch.stack(outputs.halting_measures))
                    losses = self.summed_cross_entropy(step_logits, step_labels, reduction="none")
                    step_loss = (chances * losses.view(*chances.shape, -1).sum(dim=-1)).sum()
                    halting_loss = ponder_divergence(chances, self.config.ponder_prior) * share
                else:
                    step_loss = self.summed_cross_entropy(step_logits, step_labels) / len(step_states)
                if self.config.halting == "learned":
                    right = self.right_answers(step_logits, labels.repeat(len(step_states), 1))
                    wrong = torch.cat(outputs.halting_measures)
                    halting_loss = nn.functional.binary_cross_entropy(wrong, 1 - right.to(wrong.dtype)) * share
                cross_entropy = torch.lerp(cross_entropy, step_loss, float(deep_supervision))
            cross_entropy = cross_entropy / (
                num_labels.clamp_min(1) if num_items_in_batch is None else num_items_in_batch
            )
            orthogonality, step_cost, auxiliary = auxiliary_losses(
                self.model, outputs.expected_steps, share, step_cost_weight, every_step=True
            )
            loss = cross_entropy + auxiliary
            if halting_loss is not None:
                loss = loss + self.config.halting_loss_weight * halting_loss
        return ConnectionTransformerClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            reasoning_steps=outputs.reasoning_steps,
            expected_steps=outputs.expected_steps,
            slot_updates=outputs.slot_updates,
            halting_measures=outputs.halting_measures,
            compression_weights=outputs.compression_weights,
            cross_entropy_loss=cross_entropy,
            orthogonality_loss=orthogonality,
            step_cost_loss=step_cost,
            halting_loss=halting_loss,
        )


__all__ = [
    "ConnectionTransformerForConditionalGeneration",
    "ConnectionTransformerForMaskedLM",
    "ConnectionTransformerForMultipleChoice",
    "ConnectionTransformerForSequenceClassification",
    "ConnectionTransformerModel",
    "ConnectionTransformerPreTrainedModel",
]
