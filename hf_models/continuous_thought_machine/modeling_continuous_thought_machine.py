"""Continuous Thought Machine: neurons with models of their own history that think in ticks, and its Hyper variant."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import ModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, is_torchdynamo_compiling
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_continuous_thought_machine import (
    ContinuousThoughtMachineConfig,
    HyperContinuousThoughtMachineConfig,
)
from .encoder_continuous_thought_machine import (
    ContinuousThoughtMachineEncoder,
    ContinuousThoughtMachineFourierEmbedding,
    ContinuousThoughtMachineMultiFourierEmbedding,
    ContinuousThoughtMachineRotationalEmbedding,
    at_least_float32,
)
from .loop_continuous_thought_machine import TickSettings, run_ticks

IGNORED_LABEL = -100
# Decay rates are kept in [0, MAX_DECAY] per tick.
MAX_DECAY = 15.0
NARROWEST_SYNAPSE = 16
# From so many samples on, neuron-level models are faster batch last (measured on a CPU).
MANY_SAMPLES = 16
# Samples that have stopped are left out of the batch when they are so many of it: moving the others costs time too.
COMPACTED_SHARE = 1 / 8


@dataclass
class ContinuousThoughtMachineModelOutput(ModelOutput):
    """
    What the machine returns. T is the bound on the ticks of the call.

    Args:
        predictions (`torch.FloatTensor` of shape `(batch_size, out_dims, T)`):
            Logits at each tick. After the tick at which a sample has stopped thinking they stay as they are.
        certainties (`torch.FloatTensor` of shape `(batch_size, 2, T)`):
            At each tick the normalised entropy of the prediction, in [0, 1], and 1 minus it, the certainty.
        synchronisation (`torch.FloatTensor` of shape `(batch_size, synch_size_out)`):
            Output synchronisation after each sample's last tick.
        ticks (`torch.LongTensor` of shape `(batch_size,)`):
            Ticks each sample used, in [1, T].
        hidden_states (`tuple(torch.FloatTensor)`, *optional*, filled when `output_hidden_states=True`):
            Post-activations before the first and after each tick, each of shape `(batch_size, d_model)`.
        attentions (`tuple(torch.FloatTensor)`, *optional*, filled when `output_attentions=True`):
            Per tick the attention weights, of shape `(batch_size, heads, 1, number of key tokens)`.
        pre_activations (`tuple(torch.FloatTensor)`, *optional*, filled when `output_pre_activations=True`):
            Per tick what the synapse model sends to the neurons, of shape `(batch_size, d_model)`.
        synchronisation_action (`tuple(torch.FloatTensor)`, *optional*, filled when
            `output_synchronisation_action=True`): Per tick the synchronisation that its query is made from, of shape
            `(batch_size, synch_size_action)`.
        synchronisation_out (`tuple(torch.FloatTensor)`, *optional*, filled when `output_synchronisation_out=True`):
            Per tick the synchronisation that its prediction is read from, of shape `(batch_size, synch_size_out)`.
        contexts (`tuple(torch.FloatTensor)`, *optional*, filled when `output_contexts=True`):
            Per tick the context that makes the dynamic weights, with a final 1, of shape
            `(batch_size, hyper_context_size + 1)`; only of a machine with dynamic weights.

    Recorded internals hold all T ticks, also those after a sample has stopped.
    """

    predictions: torch.FloatTensor | None = None
    certainties: torch.FloatTensor | None = None
    synchronisation: torch.FloatTensor | None = None
    ticks: torch.LongTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    pre_activations: tuple[torch.FloatTensor, ...] | None = None
    synchronisation_action: tuple[torch.FloatTensor, ...] | None = None
    synchronisation_out: tuple[torch.FloatTensor, ...] | None = None
    contexts: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class ContinuousThoughtMachineClassifierOutput(ModelOutput):
    """
    What the heads return: the fields of [`ContinuousThoughtMachineModelOutput`], and

    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*, filled when `labels` is given):
            Mean of `best_tick_loss` and `certain_tick_loss`.
        logits (`torch.FloatTensor` of shape `(batch_size, *prediction_shape)`):
            Each sample's prediction at its `certain_tick`: `(batch_size, num_labels)` for one class per sample.
        certain_tick (`torch.LongTensor` of shape `(batch_size,)`):
            Tick, from 0, of the answer: the most certain one, or the last if `config.answer_tick` says so.
        best_tick (`torch.LongTensor` of shape `(batch_size,)`, *optional*, filled when `labels` is given):
            Tick, from 0, with the smallest loss.
        best_tick_loss (`torch.FloatTensor` of shape `()`, *optional*, filled when `labels` is given):
            Cross entropy at `best_tick`, in nats per label.
        certain_tick_loss (`torch.FloatTensor` of shape `()`, *optional*, filled when `labels` is given):
            Cross entropy at `certain_tick`, in nats per label.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    predictions: torch.FloatTensor | None = None
    certainties: torch.FloatTensor | None = None
    synchronisation: torch.FloatTensor | None = None
    ticks: torch.LongTensor | None = None
    certain_tick: torch.LongTensor | None = None
    best_tick: torch.LongTensor | None = None
    best_tick_loss: torch.FloatTensor | None = None
    certain_tick_loss: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    pre_activations: tuple[torch.FloatTensor, ...] | None = None
    synchronisation_action: tuple[torch.FloatTensor, ...] | None = None
    synchronisation_out: tuple[torch.FloatTensor, ...] | None = None
    contexts: tuple[torch.FloatTensor, ...] | None = None


def draw_neurons(config: ContinuousThoughtMachineConfig) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """
    The neurons selected on the left and on the right of each synchronisation. The same for the same configuration,
    whatever the global random state.

    Args:
        config ([`ContinuousThoughtMachineConfig`]): Configuration.

    Returns:
        `dict`: for `"action"` and `"out"`, two `torch.LongTensor` of shape `(n_synch,)` on the CPU.
    """
    generator = torch.Generator(device="cpu").manual_seed(config.pairing_seed)

    def draw(number: int) -> torch.Tensor:
        return torch.randint(config.d_model, (number,), generator=generator, device="cpu")

    selected = {}
    for kind, number in (("action", config.n_synch_action), ("out", config.n_synch_out)):
        if config.neuron_select_type == "first-last":
            start = 0 if kind == "out" else config.d_model - number
            left = right = torch.arange(start, start + number, device="cpu")
        else:
            left = draw(number)
            itself = config.n_random_pairing_self
            right = torch.cat((left[:itself], draw(number - itself)))
        selected[kind] = (left, right)
    return selected


class SynchronisationPlan(NamedTuple):
    """
    What all ticks of a forward pass share of one synchronisation.

    Args:
        pairs (`torch.LongTensor` of shape `(2 * size,)`): The left neurons of all pairs, then the right ones.
        factor (`torch.FloatTensor` of shape `(size,)`): What a history is multiplied with before a state is added (r).
        scales (`torch.FloatTensor` of shape `(num_states, size)`): `1 / sqrt(β)` after each state.
    """

    pairs: torch.LongTensor
    factor: torch.Tensor
    scales: torch.Tensor


class Shared(NamedTuple):
    """
    What all ticks of a forward pass share: both synchronisations' plans and the neuron-level models' weights; and if
    the ticks run as one function instead of module by module, its settings and the tensors that stay the same.
    """

    action: SynchronisationPlan
    output: SynchronisationPlan
    neuron_weights: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    settings: TickSettings | None = None
    tensors: dict[str, torch.Tensor] | None = None


class Thought(NamedTuple):
    """
    Where the samples of a batch are between two ticks, and the input they look at.

    Args:
        state (`torch.FloatTensor` of shape `(batch_size, d_model)`): Post-activations.
        trace (`torch.FloatTensor` of shape `(d_model, memory_length, batch_size)`): Pre-activations, the newest last.
        accumulated (`torch.FloatTensor` of shape `(batch_size, synch_size_action)`): α of the action.
        output_accumulated (`torch.FloatTensor` of shape `(batch_size, synch_size_out)`): α of the output.
        key, value (`torch.FloatTensor` of shape `(batch_size, heads, length, head_dim)`): The input.
    """

    state: torch.Tensor
    trace: torch.Tensor
    accumulated: torch.Tensor
    output_accumulated: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor

    def select(self, rows: torch.LongTensor) -> "Thought":
        """The same of some samples."""
        selected = {
            name: tensor.index_select(-1 if name == "trace" else 0, rows) for name, tensor in self._asdict().items()
        }
        return Thought(**selected)


def first_certain(entropies: torch.Tensor, threshold: float) -> torch.LongTensor:
    """
    When samples become certain.

    Args:
        entropies (`torch.FloatTensor` of shape `(num_ticks, batch_size)`): Normalised entropies.
        threshold (`float`): Certainty that suffices.

    Returns:
        `torch.LongTensor` of shape `(batch_size,)`: Ticks until then, or all ticks.
    """
    is_certain = 1 - entropies >= threshold
    return torch.where(is_certain.any(dim=0), is_certain.int().argmax(dim=0) + 1, len(entropies))


class ContinuousThoughtMachineSynchronisation(nn.Module):
    """
    Synchronisation of selected pairs of neurons (paper, section 3.4): the inner product of the two neurons' histories
    of post-activations, with a learned exponential decay per pair, over the root of the decayed number of entries.

    With `r = exp(-decay)`, `α_t = r α_{t-1} + z_left z_right` and `β_t = r β_{t-1} + 1`, it is `α_t / sqrt(β_t)`. As β
    depends on no data it is computed for all ticks at once.

    Args:
        config ([`ContinuousThoughtMachineConfig`]): Configuration.
        kind (`str`): `"action"` or `"out"`.
    """

    def __init__(self, config: ContinuousThoughtMachineConfig, kind: str):
        super().__init__()
        self.kind = kind
        self.is_dense = config.neuron_select_type != "random-pairing"
        number, size = (
            (config.n_synch_out, config.synch_size_out)
            if kind == "out"
            else (config.n_synch_action, config.synch_size_action)
        )
        self.register_buffer("left_indices", torch.empty(number, dtype=torch.long))
        self.register_buffer("right_indices", torch.empty(number, dtype=torch.long))
        self.decay = nn.Parameter(torch.empty(size))

    def pairs(self) -> torch.LongTensor:
        """The left neurons of all pairs, then the right ones: shape `(2 * size,)`."""
        left, right = self.left_indices, self.right_indices
        if self.is_dense:
            rows, columns = torch.triu_indices(len(left), len(right), device=left.device)
            left, right = left[rows], right[columns]
        return torch.cat((left, right))

    def prepare(self, num_states: int) -> SynchronisationPlan:
        """
        What all ticks of one forward pass share, for histories of up to `num_states` states. In training the stored
        decays are first put back into their range.
        """
        if self.training:
            with torch.no_grad():
                self.decay.clamp_(0, MAX_DECAY)
        decay = self.decay.to(at_least_float32(self.decay.dtype))
        # The clamp does not stop the gradient: decays start at 0, on the edge of their range.
        decay = decay + (decay.clamp(0, MAX_DECAY) - decay).detach()
        ages = torch.arange(num_states, device=decay.device, dtype=decay.dtype).unsqueeze(1)
        return SynchronisationPlan(self.pairs(), torch.exp(-decay), torch.exp(-decay * ages).cumsum(0).rsqrt())

    @staticmethod
    def products(states: torch.Tensor, pairs: torch.LongTensor) -> torch.Tensor:
        """Products of all pairs, in float32 or better: shape `(..., size)` for states of shape `(..., d_model)`."""
        left, right = states.index_select(-1, pairs).chunk(2, dim=-1)
        return left.to(at_least_float32(left.dtype)) * right

    def forward(
        self,
        state: torch.Tensor,
        accumulated: torch.Tensor,
        pairs: torch.LongTensor,
        factor: torch.Tensor,
        scale: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Adds one state to the histories.

        Args:
            state (`torch.FloatTensor` of shape `(batch_size, d_model)`): Post-activations.
            accumulated (`torch.FloatTensor` of shape `(batch_size, size)`): α before, at first zeros.
            pairs, factor: As from `prepare`.
            scale (`torch.FloatTensor` of shape `(size,)`): `1 / sqrt(β)` of this state.

        Returns:
            Synchronisation and α, both of shape `(batch_size, size)`.
        """
        accumulated = torch.addcmul(self.products(state, pairs), accumulated, factor)
        return (accumulated * scale).to(state.dtype), accumulated

    def scan(
        self,
        states: torch.Tensor,
        accumulated: torch.Tensor,
        pairs: torch.LongTensor,
        factor: torch.Tensor,
        scale: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Adds several states, each as `forward` does.

        Args:
            states (`torch.FloatTensor` of shape `(num_states, batch_size, d_model)`): Post-activations.
            scale (`torch.FloatTensor` of shape `(num_states, size)`): `1 / sqrt(β)` of each state.

        Returns:
            Synchronisation after each state, of shape `(num_states, batch_size, size)`, and the last α.
        """
        history = []
        for product in self.products(states, pairs).unbind(0):
            accumulated = torch.addcmul(product, accumulated, factor)
            history.append(accumulated)
        return (torch.stack(history) * scale.unsqueeze(1)).to(states.dtype), accumulated


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
    scores = torch.matmul(query * scaling, key.transpose(2, 3))
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=at_least_float32(scores.dtype)).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class ContinuousThoughtMachineAttentionProjection(nn.Linear):
    """Projection to queries, keys or values: a class of its own, as it is initialised unlike other linear maps."""


class ContinuousThoughtMachineAttentionOutput(nn.Linear):
    """Output projection of attention: a class of its own, as its bias starts at zero."""


class ContinuousThoughtMachineAttention(nn.Module):
    """Multi-head attention of one query per sample over keys and values that are the same in every tick."""

    def __init__(self, config: ContinuousThoughtMachineConfig):
        super().__init__()
        self.config = config
        self.is_causal = False
        self.head_dim = config.d_input // config.heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.dropout
        self.q_proj = ContinuousThoughtMachineAttentionProjection(config.d_input, config.d_input)
        self.k_proj = ContinuousThoughtMachineAttentionProjection(config.d_input, config.d_input)
        self.v_proj = ContinuousThoughtMachineAttentionProjection(config.d_input, config.d_input)
        self.out_proj = ContinuousThoughtMachineAttentionOutput(config.d_input, config.d_input)

    def split_heads(self, states: torch.Tensor) -> torch.Tensor:
        return states.unflatten(-1, (-1, self.head_dim)).transpose(-3, -2)

    def project(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of shape `(batch_size, heads, length, head_dim)`, laid out for the loop's products."""
        return (
            self.split_heads(self.k_proj(tokens)).contiguous(),
            self.split_heads(self.v_proj(tokens)).contiguous(),
        )

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            query (`torch.FloatTensor` of shape `(batch_size, d_input)`): What is looked for.
            key, value (`torch.FloatTensor` of shape `(batch_size, heads, length, head_dim)`): As from `project`.

        Returns:
            What is found, of shape `(batch_size, d_input)`, and the weights of shape `(batch_size, heads, 1, length)`
            if the implementation forms them.
        """
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention(
            self,
            self.split_heads(self.q_proj(query).unsqueeze(1)),
            key,
            value,
            None,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
        )
        return self.out_proj(output.reshape(query.shape)), weights


class ContinuousThoughtMachineContext(nn.Module):
    """What the dynamic weights of one tick are made from: a short code of the synapse model's input, and a final 1."""

    def __init__(self, config: HyperContinuousThoughtMachineConfig):
        super().__init__()
        self.projection = nn.Linear(config.d_input + config.d_model, config.hyper_context_size)
        self.norm = nn.LayerNorm(config.hyper_context_size)

    def forward(self, synapse_input: torch.Tensor) -> torch.Tensor:
        """Contexts of shape `(batch_size, hyper_context_size + 1)`."""
        code = nn.functional.silu(self.norm(self.projection(synapse_input)))
        # The constant carries the biases of the heads that make the weights.
        return torch.cat((code, code.new_ones(len(code), 1)), dim=-1)


class ContinuousThoughtMachineHyperLinear(nn.Linear):
    """
    Linear layer with low-rank dynamic weights: `y = W x + b + g U(c) V(c)ᵀ x`, where U and V are linear in the context
    c and g is a learned number that starts at 0.

    As U and V are linear in c, no weight matrix is formed per sample: with the heads' weights `hyper_v` and `hyper_u`,
    two ordinary products and two contractions with c give the same.

    Args:
        in_features (`int`): Width of the input.
        out_features (`int`): Width of the output.
        rank (`int`): Rank r of the dynamic weights.
        context_size (`int`): Length of the context, the final 1 included.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, context_size: int):
        super().__init__(in_features, out_features)
        self.rank = rank
        self.hyper_v = nn.Parameter(torch.empty(rank * context_size, in_features))
        self.hyper_u = nn.Parameter(torch.empty(out_features, rank * context_size))
        self.gate = nn.Parameter(torch.empty(1))  # a scalar could not be sharded

    def forward(self, inputs: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """Outputs for inputs of shape `(batch_size, in_features)` and contexts `(batch_size, context_size)`."""
        context = context.unsqueeze(1)
        reduced = (nn.functional.linear(inputs, self.hyper_v).unflatten(-1, (self.rank, -1)) * context).sum(-1)
        expanded = (reduced.unsqueeze(-1) * context).flatten(1) * self.gate
        return super().forward(inputs) + nn.functional.linear(expanded, self.hyper_u)

    def dynamic_weight(self, context: torch.Tensor) -> torch.Tensor:
        """What is added to `weight` for each context: shape `(batch_size, out_features, in_features)`."""
        context = context.unsqueeze(-1)
        left = (self.hyper_u.unflatten(1, (self.rank, -1)) @ context.unsqueeze(1)).squeeze(-1)
        right = (self.hyper_v.unflatten(0, (self.rank, -1)).transpose(1, 2) @ context.unsqueeze(1)).squeeze(-1)
        return self.gate * (left @ right)


class ContinuousThoughtMachineSynapseBlock(nn.Module):
    """Dropout, linear layer, LayerNorm and SiLU."""

    def __init__(self, linear: nn.Linear, dropout: float):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.linear = linear
        self.norm = nn.LayerNorm(linear.out_features)

    def forward(self, states: torch.Tensor, *context: torch.Tensor) -> torch.Tensor:
        return nn.functional.silu(self.norm(self.linear(self.dropout(states), *context)))


class ContinuousThoughtMachineSynapse(nn.Module):
    """
    U-Net that mixes the neurons' activations and what attention has found (paper, section 3.2 and appendix).

    Widths fall from `d_model` to 16 in `synapse_depth` steps and rise again, with a LayerNorm over each sum with the
    state of the same width on the way down.
    """

    def __init__(self, config: ContinuousThoughtMachineConfig):
        super().__init__()
        # In double precision and truncated, as published: an integer formula differs by one in rare cases.
        widths = [int(width) for width in np.linspace(config.d_model, NARROWEST_SYNAPSE, config.synapse_depth)]
        levels = range(config.synapse_depth - 1)
        hyper_layers = getattr(config, "hyper_layers", "none")
        innermost = levels[-2:] if hyper_layers == "bottleneck" else ()
        self.dynamic_down = set(levels if hyper_layers in ("down", "all") else innermost)
        self.dynamic_up = set(levels if hyper_layers in ("up", "all") else innermost)

        def block(in_features: int, out_features: int, is_dynamic: bool) -> ContinuousThoughtMachineSynapseBlock:
            if is_dynamic:
                linear = ContinuousThoughtMachineHyperLinear(
                    in_features, out_features, config.hyper_rank, config.hyper_context_size + 1
                )
            else:
                linear = nn.Linear(in_features, out_features)
            return ContinuousThoughtMachineSynapseBlock(linear, config.dropout)

        first = nn.Linear(config.d_input + config.d_model, widths[0])
        self.first_projection = ContinuousThoughtMachineSynapseBlock(first, dropout=0.0)
        self.down_projections = nn.ModuleList(
            block(widths[level], widths[level + 1], level in self.dynamic_down) for level in levels
        )
        self.up_projections = nn.ModuleList(
            block(widths[level + 1], widths[level], level in self.dynamic_up) for level in levels
        )
        self.skip_norms = nn.ModuleList(nn.LayerNorm(widths[level]) for level in levels)

    def forward(self, states: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        """Pre-activations of shape `(batch_size, d_model)` for inputs of shape `(batch_size, d_input + d_model)`."""
        states = self.first_projection(states)
        descent = []
        for level, projection in enumerate(self.down_projections):
            descent.append(states)
            states = projection(states, context) if level in self.dynamic_down else projection(states)
        for level in reversed(range(len(self.up_projections))):
            projection = self.up_projections[level]
            states = projection(states, context) if level in self.dynamic_up else projection(states)
            states = self.skip_norms[level](states + descent[level])
        return states


class ContinuousThoughtMachineShallowSynapse(nn.Module):
    """Synapse model of depth 1: dropout, one gated linear layer and LayerNorm."""

    def __init__(self, config: ContinuousThoughtMachineConfig):
        super().__init__()
        self.dropout = nn.Dropout(config.dropout)
        self.linear = nn.Linear(config.d_input + config.d_model, 2 * config.d_model)
        self.norm = nn.LayerNorm(config.d_model)

    def forward(self, states: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        """As [`ContinuousThoughtMachineSynapse`]; there are no dynamic weights."""
        return self.norm(nn.functional.glu(self.linear(self.dropout(states)), dim=-1))


class ContinuousThoughtMachineNeuronLayer(nn.Module):
    """
    One gated layer of the neuron-level models: each neuron has weights of its own, `GLU((x W_n + b_n) / T)`.

    Args:
        num_neurons (`int`): Number of neurons.
        in_features (`int`): Numbers per neuron that come in.
        out_features (`int`): Numbers per neuron that go out, after the gate.
        dropout (`float`): Dropout probability on the input.
        layer_norm (`bool`): Whether the input is normalised, with one gain and bias for all neurons.
    """

    def __init__(self, num_neurons: int, in_features: int, out_features: int, dropout: float, layer_norm: bool):
        super().__init__()
        # Neurons first: the products of all neurons are then one batched matrix product.
        self.weight = nn.Parameter(torch.empty(num_neurons, in_features, 2 * out_features))
        self.bias = nn.Parameter(torch.empty(num_neurons, 1, 2 * out_features))
        self.temperature = nn.Parameter(torch.empty(1))
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(in_features) if layer_norm else None

    def prepare(self, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """
        What all ticks of a forward pass share: weights and biases over the temperature, laid out for `batch_size`.

        The products are faster features last for a few samples with several outputs, and batch last otherwise; there
        the last two dimensions are exchanged.
        """
        weight, bias = self.weight / self.temperature, self.bias / self.temperature
        if batch_size >= MANY_SAMPLES or weight.shape[2] == 2:
            return weight.transpose(1, 2).contiguous(), bias.transpose(1, 2)
        return weight, bias

    def normalise(self, inputs: torch.Tensor) -> torch.Tensor:
        inputs = self.dropout(inputs)
        return inputs if self.norm is None else self.norm(inputs.transpose(1, 2)).transpose(1, 2)

    @staticmethod
    def project(inputs: torch.Tensor, prepared: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Values and then gates, of shape `(num_neurons, 2 * out_features, batch_size)`."""
        weight, bias = prepared
        if bias.shape[1] == 1:
            return torch.baddbmm(bias, inputs.transpose(1, 2), weight).transpose(1, 2)
        return torch.baddbmm(bias, weight, inputs)

    def forward(self, inputs: torch.Tensor, prepared: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """
        Args:
            inputs (`torch.FloatTensor` of shape `(num_neurons, in_features, batch_size)`): What comes in.
            prepared: As from `prepare`.

        Returns:
            `torch.FloatTensor` of shape `(num_neurons, out_features, batch_size)`.
        """
        return nn.functional.glu(self.project(self.normalise(inputs), prepared), dim=1)


class ContinuousThoughtMachineHyperNeuronLayer(ContinuousThoughtMachineNeuronLayer):
    """
    [`ContinuousThoughtMachineNeuronLayer`] with dynamic weights: before the gate, neuron n adds `γ_n (x V(c)) U(c)ᵀ`,
    with V and U linear in the context and the same for all neurons, and γ_n a learned number that starts at 0.

    Args:
        rank (`int`): Rank of V and U.
        context_size (`int`): Length of the context, the final 1 included.
    """

    def __init__(
        self,
        num_neurons: int,
        in_features: int,
        out_features: int,
        dropout: float,
        layer_norm: bool,
        rank: int,
        context_size: int,
    ):
        super().__init__(num_neurons, in_features, out_features, dropout, layer_norm)
        self.rank = rank
        self.hyper_v = nn.Parameter(torch.empty(rank * context_size, in_features))
        self.hyper_u = nn.Parameter(torch.empty(2 * out_features, rank * context_size))
        self.gate = nn.Parameter(torch.empty(num_neurons))

    def forward(
        self, inputs: torch.Tensor, prepared: tuple[torch.Tensor, torch.Tensor], context: torch.Tensor
    ) -> torch.Tensor:
        """As the base class, with contexts of shape `(batch_size, context_size)`."""
        inputs = self.normalise(inputs)
        projected = self.project(inputs, prepared)
        context = context.unsqueeze(-1)
        # V of shape (batch, in, rank), U of shape (batch, rank, out).
        reduce = (self.hyper_v.unflatten(0, (self.rank, -1)).permute(2, 0, 1) @ context.unsqueeze(1)).squeeze(-1)
        expand = (self.hyper_u.unflatten(1, (self.rank, -1)).transpose(0, 1) @ context.unsqueeze(1)).squeeze(-1)
        added = torch.bmm(torch.bmm(inputs.permute(2, 0, 1).contiguous(), reduce), expand) * self.gate.unsqueeze(1)
        return nn.functional.glu(projected + added.permute(1, 2, 0), dim=1)


class ContinuousThoughtMachineNeuronModels(nn.Module):
    """Neuron-level models (paper, section 3.3): each neuron's post-activation from its last M pre-activations."""

    def __init__(self, config: ContinuousThoughtMachineConfig):
        super().__init__()
        widths = [config.memory_length, config.memory_hidden_dims, 1] if config.deep_nlms else [config.memory_length, 1]
        dropout = config.dropout if config.dropout_nlm is None else config.dropout_nlm
        self.is_dynamic = getattr(config, "hyper_nlms", False)

        def layer(in_features: int, out_features: int) -> ContinuousThoughtMachineNeuronLayer:
            sizes = (config.d_model, in_features, out_features, dropout, config.do_layernorm_nlm)
            if not self.is_dynamic:
                return ContinuousThoughtMachineNeuronLayer(*sizes)
            return ContinuousThoughtMachineHyperNeuronLayer(
                *sizes, config.hyper_nlm_rank, config.hyper_context_size + 1
            )

        self.layers = nn.ModuleList(map(layer, widths[:-1], widths[1:]))

    def prepare(self, batch_size: int) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
        """What all ticks of a forward pass over `batch_size` samples share; right, if slower, for any number."""
        return tuple(layer.prepare(batch_size) for layer in self.layers)

    def forward(
        self,
        trace: torch.Tensor,
        prepared: tuple[tuple[torch.Tensor, torch.Tensor], ...],
        context: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Args:
            trace (`torch.FloatTensor` of shape `(d_model, memory_length, batch_size)`):
                Pre-activations, the newest last.
            prepared: As from `prepare`.
            context (`torch.FloatTensor` of shape `(batch_size, hyper_context_size + 1)`, *optional*): For dynamic
                weights.

        Returns:
            Post-activations, `torch.FloatTensor` of shape `(batch_size, d_model)`.
        """
        states = trace
        for layer, weights in zip(self.layers, prepared, strict=True):
            states = layer(states, weights, context) if self.is_dynamic else layer(states, weights)
        return states.squeeze(1).T


class ContinuousThoughtMachineTick(GradientCheckpointingLayer):
    """One tick of thought: look at the input, exchange between neurons, let each neuron answer to its history."""

    def __init__(self, config: ContinuousThoughtMachineConfig):
        super().__init__()
        self.synchronisation = ContinuousThoughtMachineSynchronisation(config, "action")
        self.query_projection = nn.Linear(config.synch_size_action, config.d_input)
        self.attention = ContinuousThoughtMachineAttention(config)
        synapse = (
            ContinuousThoughtMachineShallowSynapse if config.synapse_depth == 1 else ContinuousThoughtMachineSynapse
        )
        self.synapse = synapse(config)
        self.neuron_models = ContinuousThoughtMachineNeuronModels(config)
        is_dynamic = getattr(config, "hyper_layers", "none") != "none" or self.neuron_models.is_dynamic
        self.context = ContinuousThoughtMachineContext(config) if is_dynamic else None

    def forward(
        self,
        hidden_state: torch.Tensor,
        trace: torch.Tensor,
        accumulated: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        synchronising: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        neuron_weights: tuple[tuple[torch.Tensor, torch.Tensor], ...],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """
        Args:
            hidden_state (`torch.FloatTensor` of shape `(batch_size, d_model)`): Post-activations before the tick.
            trace (`torch.FloatTensor` of shape `(d_model, memory_length, batch_size)`):
                Pre-activations, the newest last.
            accumulated (`torch.FloatTensor` of shape `(batch_size, synch_size_action)`):
                α of the action, at first zeros.
            key, value (`torch.FloatTensor` of shape `(batch_size, heads, length, head_dim)`): The input.
            synchronising: Pairs, factors and this tick's scale for [`ContinuousThoughtMachineSynchronisation.forward`].
            neuron_weights: Prepared weights of the neuron-level models.

        Returns:
            The first three as they are after the tick; the tick's pre-activations; its attention weights, if formed;
            and its action synchronisation.
        """
        synchronisation, accumulated = self.synchronisation(hidden_state, accumulated, *synchronising)
        attended, weights = self.attention(self.query_projection(synchronisation), key, value)
        synapse_input = torch.cat((attended, hidden_state), dim=-1)
        context = None if self.context is None else self.context(synapse_input)
        pre_activation = self.synapse(synapse_input, context)
        trace = torch.cat((trace[:, 1:], pre_activation.T.unsqueeze(1)), dim=1)
        hidden_state = self.neuron_models(trace, neuron_weights, context)
        return hidden_state, trace, accumulated, pre_activation, weights, synchronisation


POST_ACTIVATIONS = OutputRecorder(ContinuousThoughtMachineTick, index=0)
# Versions of the library that can select hidden states by negative indices count them by this field.
POST_ACTIVATIONS.num_hidden_layers_key = "iterations"


class ContinuousThoughtMachineReadout(nn.Module):
    """Predictions and certainties from the output synchronisation, for several ticks at once."""

    def __init__(self, config: ContinuousThoughtMachineConfig):
        super().__init__()
        self.num_classes = config.prediction_shape[-1]
        self.synchronisation = ContinuousThoughtMachineSynchronisation(config, "out")
        self.projection = nn.Linear(config.synch_size_out, config.out_dims)

    def forward(
        self,
        states: torch.Tensor,
        accumulated: torch.Tensor,
        synchronising: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Args:
            states (`torch.FloatTensor` of shape `(num_ticks, batch_size, d_model)`): Post-activations after each tick.
            accumulated (`torch.FloatTensor` of shape `(batch_size, synch_size_out)`): α before these ticks.
            synchronising: Pairs, factors and these ticks' scales for [`ContinuousThoughtMachineSynchronisation.scan`].

        Returns:
            Predictions of shape `(num_ticks, batch_size, out_dims)`, normalised entropies of shape
            `(num_ticks, batch_size)`, synchronisation of shape `(num_ticks, batch_size, synch_size_out)`, and α after
            these ticks.
        """
        synchronisation, accumulated = self.synchronisation.scan(states, accumulated, *synchronising)
        return *self.read(synchronisation), synchronisation, accumulated

    def read(self, synchronisation: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The first two of `forward` from the third."""
        predictions = self.projection(synchronisation)
        return predictions, self.normalised_entropy(predictions)

    def normalised_entropy(self, predictions: torch.Tensor) -> torch.Tensor:
        """Entropy over the classes relative to that of the uniform distribution, mean over positions, in [0, 1]."""
        logits = predictions.unflatten(-1, (-1, self.num_classes))
        log_probabilities = logits.log_softmax(dim=-1, dtype=at_least_float32(logits.dtype))
        negative_entropies = (log_probabilities.exp() * log_probabilities).sum(dim=(-2, -1))
        return negative_entropies / (-math.log(self.num_classes) * logits.shape[-2])


# What [`run_ticks`] computes without calling it.
KNOWN_PARTS = {
    ContinuousThoughtMachineAttention,
    ContinuousThoughtMachineAttentionOutput,
    ContinuousThoughtMachineAttentionProjection,
    ContinuousThoughtMachineNeuronLayer,
    ContinuousThoughtMachineNeuronModels,
    ContinuousThoughtMachineReadout,
    ContinuousThoughtMachineShallowSynapse,
    ContinuousThoughtMachineSynapse,
    ContinuousThoughtMachineSynapseBlock,
    ContinuousThoughtMachineSynchronisation,
    ContinuousThoughtMachineTick,
    nn.Dropout,
    nn.LayerNorm,
    nn.Linear,
    nn.ModuleList,
}


def is_known(module: nn.Module) -> bool:
    """Whether [`run_ticks`] computes what this part of a machine does, and nothing else has a say in it."""
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return (
        type(module) in KNOWN_PARTS
        and "forward" not in vars(module)
        and not (isinstance(module, ContinuousThoughtMachineNeuronLayer) and module.norm is not None)
        # The library leaves its recording hooks in place; they do nothing unless internals are asked for.
        and all(hook.__module__ == capture_outputs.__module__ for group in hooks for hook in group.values())
    )


class ContinuousThoughtMachinePreTrainedModel(PreTrainedModel):
    """
    Initialisation and saving shared by all classes.

    Everything starts as published: linear maps and convolutions as in PyTorch, attention's input projections as one
    Xavier uniform matrix with zero biases, neurons' weights uniform in ±1/sqrt(in + out), the start state in
    ±sqrt(1/D), the start trace in ±sqrt(1/(D + M)), decays at 0. Dynamic weights start without effect: gates at 0,
    heads such that the products behind the gates are of order 1.
    """

    config: ContinuousThoughtMachineConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    # The whole body is one unit: what all ticks share is computed from their parameters before the first.
    _no_split_modules = ["ContinuousThoughtMachineModel"]
    _supports_sdpa = True

    @property
    def dummy_inputs(self) -> dict[str, torch.Tensor]:
        """Two inputs of a size that the model takes, always the same."""
        generator, config = torch.Generator().manual_seed(0), self.config
        if config.backbone_type == "parity_backbone":
            length = config.prediction_shape[0] if config.prediction_shape else 8
            inputs = torch.randint(2, (2, length), generator=generator) * 2.0 - 1
        else:
            size = config.image_size or (4 if config.backbone_type == "none" else 32)
            sizes = size if isinstance(size, list) else [size] * 2
            inputs = torch.randn(2, config.num_channels, *sizes, generator=generator)
        return {config.input_name: inputs.to(self.device)}

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            fan_in = module.weight[0].numel()
            bound = fan_in**-0.5
            bias_bound = bound
            if isinstance(module, ContinuousThoughtMachineAttentionProjection):
                # Query, key and value projections are parts of one matrix of 3E rows and E columns.
                bound, bias_bound = math.sqrt(6 / (4 * fan_in)), 0.0
            elif isinstance(module, ContinuousThoughtMachineAttentionOutput):
                bias_bound = 0.0
            init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.uniform_(module.bias, -bias_bound, bias_bound)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight)
        else:
            super()._init_weights(module)

        if isinstance(module, ContinuousThoughtMachineSynchronisation):
            init.zeros_(module.decay)
            left, right = draw_neurons(self.config)[module.kind]
            init.copy_(module.left_indices, left)
            init.copy_(module.right_indices, right)
        elif isinstance(module, ContinuousThoughtMachineNeuronLayer):
            bound = (module.weight.shape[1] + module.weight.shape[2]) ** -0.5
            init.uniform_(module.weight, -bound, bound)
            init.zeros_(module.bias)
            init.ones_(module.temperature)
        elif isinstance(module, ContinuousThoughtMachineFourierEmbedding):
            init.normal_(module.frequencies, std=module.scale**-2)
        elif isinstance(module, ContinuousThoughtMachineMultiFourierEmbedding):
            init.ones_(module.combination)
        elif isinstance(module, ContinuousThoughtMachineRotationalEmbedding):
            init.copy_(module.start_vector, torch.tensor((0.0, 1.0)))
        elif isinstance(module, ContinuousThoughtMachineModel):
            neurons, memory = self.config.d_model, self.config.memory_length
            init.uniform_(module.start_state, -math.sqrt(1 / neurons), math.sqrt(1 / neurons))
            init.uniform_(module.start_trace, -math.sqrt(1 / (neurons + memory)), math.sqrt(1 / (neurons + memory)))

        if isinstance(module, (ContinuousThoughtMachineHyperLinear, ContinuousThoughtMachineHyperNeuronLayer)):
            # With gates and heads both at 0 nothing would ever move.
            init.zeros_(module.gate)
            init.normal_(module.hyper_v, std=module.hyper_v.shape[1] ** -0.5)
            init.normal_(module.hyper_u, std=module.hyper_u.shape[1] ** -0.5)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs):
        # A saved head names only its own class; with the complete map every Auto class can open its folder.
        if self._auto_class is not None:
            suffix = "continuous_thought_machine"
            name = "ContinuousThoughtMachine"
            if self.config.model_type != suffix:
                name = f"Hyper{name}"
            self.config.auto_map = {
                **(getattr(self.config, "auto_map", None) or {}),
                "AutoConfig": f"configuration_{suffix}.{name}Config",
                "AutoModel": f"modeling_{suffix}.{name}Model",
                "AutoModelForImageClassification": f"modeling_{suffix}.{name}ForImageClassification",
                "AutoModelForTokenClassification": f"modeling_{suffix}.{name}ForTokenClassification",
            }
        super().save_pretrained(save_directory, **kwargs)


class ContinuousThoughtMachineModel(ContinuousThoughtMachinePreTrainedModel):
    """
    Continuous Thought Machine (Darlow et al., "Continuous Thought Machines", arXiv 2505.05522): the whole of the
    published model, predictions and certainties included.

    Different from the published code: each sample can stop thinking by its own certainty, the random pairs of neurons
    come from a seed of their own, and what is the same in every tick is computed once.

    Args:
        config ([`ContinuousThoughtMachineConfig`]): Configuration.

    Example:

    ```python
    >>> import torch
    >>> from hf_models.continuous_thought_machine import ContinuousThoughtMachineConfig, ContinuousThoughtMachineModel

    >>> config = ContinuousThoughtMachineConfig(
    ...     iterations=5, d_model=32, d_input=16, heads=2, n_synch_out=8, n_synch_action=8, synapse_depth=2,
    ...     memory_length=4, memory_hidden_dims=4, out_dims=10,
    ... )
    >>> model = ContinuousThoughtMachineModel(config).eval()
    >>> outputs = model(pixel_values=torch.rand(2, 3, 20, 20))
    >>> outputs.predictions.shape, outputs.certainties.shape
    (torch.Size([2, 10, 5]), torch.Size([2, 2, 5]))
    ```
    """

    _can_record_outputs = {
        "hidden_states": POST_ACTIVATIONS,
        "pre_activations": OutputRecorder(ContinuousThoughtMachineTick, index=3),
        "attentions": OutputRecorder(ContinuousThoughtMachineTick, index=4),
        "synchronisation_action": OutputRecorder(ContinuousThoughtMachineTick, index=5),
        "contexts": OutputRecorder(ContinuousThoughtMachineContext),
    }

    def __init__(self, config: ContinuousThoughtMachineConfig):
        super().__init__(config)
        self.main_input_name = config.input_name
        self.encoder = ContinuousThoughtMachineEncoder(config)
        self.start_state = nn.Parameter(torch.empty(config.d_model))
        self.start_trace = nn.Parameter(torch.empty(config.d_model, config.memory_length))
        self.tick = ContinuousThoughtMachineTick(config)
        self.readout = ContinuousThoughtMachineReadout(config)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.projection

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        pixel_values: torch.FloatTensor | None = None,
        input_values: torch.FloatTensor | None = None,
        input_features: torch.FloatTensor | None = None,
        iterations: int | None = None,
        certainty_threshold: float | None = None,
        output_synchronisation_out: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ContinuousThoughtMachineModelOutput:
        r"""
        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch_size, num_channels, height, width)`, *optional*):
                Images, for the image backbones.
            input_values (`torch.FloatTensor` of shape `(batch_size, length)`, *optional*):
                Numbers, for the parity backbone, which asks of each whether it is 1.
            input_features (`torch.FloatTensor` of shape `(batch_size, num_channels, positions…)`, *optional*):
                Features with at least one axis of positions, for `backbone_type="none"`.
            iterations (`int`, *optional*):
                Bound on the ticks of this call, instead of the configuration's; it may exceed that.
            certainty_threshold (`float`, *optional*):
                Threshold of this call, in [0, 1], instead of the configuration's. Without effect in training, where all
                samples take all ticks.
            output_synchronisation_out (`bool`, *optional*):
                Whether to return the output synchronisation of every tick.

        Returns:
            [`ContinuousThoughtMachineModelOutput`].

        Raises:
            ValueError: not exactly the backbone's input is given, the input has the wrong shape, or the bound or the
                threshold is out of range.
        """
        given = {"pixel_values": pixel_values, "input_values": input_values, "input_features": input_features}
        inputs = self.checked_input({name: value for name, value in given.items() if value is not None})
        num_ticks, threshold = self.checked_bounds(iterations, certainty_threshold)
        if output_synchronisation_out is None:
            output_synchronisation_out = getattr(self.config, "output_synchronisation_out", False)
        records_ticks = any(
            kwargs.get(f"output_{key}", getattr(self.config, f"output_{key}", False))
            for key in self._can_record_outputs
        )
        recording = output_synchronisation_out or records_ticks

        key, value = self.tick.attention.project(self.encoder(inputs))
        batch_size = len(key)
        state = self.start_state.expand(batch_size, -1)
        trace = self.start_trace.unsqueeze(-1).expand(-1, -1, batch_size)
        action = self.tick.synchronisation.prepare(num_ticks)
        output = self.readout.synchronisation.prepare(num_ticks + 1)
        # The start state counts in the output synchronisation too.
        output_accumulated = self.readout.synchronisation.products(state, output.pairs)
        thought = Thought(
            state, trace, action.factor.new_zeros(batch_size, len(action.factor)), output_accumulated, key, value
        )
        shared = Shared(action, output, self.tick.neuron_models.prepare(batch_size))
        if not records_ticks and self.can_think_at_once(key):
            shared = self.prepare_at_once(shared)

        stops = threshold is not None and not self.training
        # In training the number of passes must not depend on the data: all ranks make the same ones.
        if stops and not (recording or is_torchdynamo_compiling()):
            predictions, entropies, synchronisation, ticks = self.think_compacted(thought, shared, num_ticks, threshold)
            recorded_synchronisation = None
        else:
            _, predictions, entropies, history = self.think(thought, shared, 0, num_ticks)
            ticks = torch.full((batch_size,), num_ticks, device=predictions.device)
            synchronisation = history[-1]
            if stops:
                # A sample that has stopped keeps its answer.
                ticks = first_certain(entropies, threshold)
                numbers = torch.arange(num_ticks, device=ticks.device).unsqueeze(1)
                last, rows = torch.minimum(numbers, ticks - 1), torch.arange(batch_size, device=ticks.device)
                predictions, entropies, synchronisation = (
                    predictions[last, rows],
                    entropies[last, rows],
                    history[ticks - 1, rows],
                )
            recorded_synchronisation = history.unbind(0) if output_synchronisation_out else None
        return ContinuousThoughtMachineModelOutput(
            predictions=predictions.permute(1, 2, 0),
            certainties=torch.stack((entropies, 1 - entropies)).permute(2, 0, 1),
            synchronisation=synchronisation,
            ticks=ticks,
            synchronisation_out=recorded_synchronisation,
        )

    def think(
        self, thought: Thought, shared: Shared, start: int, number: int
    ) -> tuple[Thought, torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Some ticks of all samples.

        Args:
            thought (`Thought`): Where the samples are.
            shared (`Shared`): What is the same in all ticks.
            start (`int`): Number of the first tick, from 0.
            number (`int`): Number of ticks.

        Returns:
            Where the samples are then; and for these ticks predictions of shape `(number, batch_size, out_dims)`,
            normalised entropies of shape `(number, batch_size)` and output synchronisation of shape
            `(number, batch_size, synch_size_out)`.
        """
        if shared.settings is not None:
            return self.think_at_once(thought, shared, start, number)
        pairs, factor, scales = shared.action
        state, trace, accumulated = thought.state, thought.trace, thought.accumulated
        states = []
        for scale in scales[start : start + number].unbind(0):
            state, trace, accumulated, *_ = self.tick(
                state, trace, accumulated, thought.key, thought.value, (pairs, factor, scale), shared.neuron_weights
            )
            states.append(state)
        pairs, factor, scales = shared.output
        predictions, entropies, synchronisation, output_accumulated = self.readout(
            torch.stack(states),
            thought.output_accumulated,
            # The start state has the first entry.
            (pairs, factor, scales[start + 1 : start + number + 1]),
        )
        thought = thought._replace(
            state=state, trace=trace, accumulated=accumulated, output_accumulated=output_accumulated
        )
        return thought, predictions, entropies, synchronisation

    def think_at_once(
        self, thought: Thought, shared: Shared, start: int, number: int
    ) -> tuple[Thought, torch.Tensor, torch.Tensor, torch.Tensor]:
        """As `think`, in less time and memory, with [`run_ticks`]."""
        tensors = {
            **thought._asdict(),
            **shared.tensors,
            "action.scales": shared.action.scales[start : start + number],
            # The start state has the first entry.
            "output.scales": shared.output.scales[start + 1 : start + number + 1],
        }
        synchronisation, carry = run_ticks(tensors, shared.settings)
        predictions, entropies = self.readout.read(synchronisation)
        return thought._replace(**carry._asdict()), predictions, entropies, synchronisation

    def prepare_at_once(self, shared: Shared) -> Shared:
        """With what `think_at_once` needs besides."""
        tick = self.tick
        tensors = {"action.factor": shared.action.factor, "output.factor": shared.output.factor}
        for name in ("query_projection", "attention.q_proj", "attention.out_proj", "synapse"):
            tensors |= tick.get_submodule(name).named_parameters(prefix=name)
        for index, (weight, bias) in enumerate(shared.neuron_weights):
            tensors |= {f"neuron_models.layers.{index}.weight": weight, f"neuron_models.layers.{index}.bias": bias}
        dropouts = {name: module.p for name, module in tick.named_modules() if isinstance(module, nn.Dropout)}
        dropouts["attention.dropout"] = tick.attention.attention_dropout
        settings = TickSettings(
            synapse_levels=self.config.synapse_depth - 1,
            neuron_layers=len(shared.neuron_weights),
            scaling=tick.attention.scaling,
            action_pairs=shared.action.pairs,
            output_pairs=shared.output.pairs,
            dropouts=dropouts if self.training else {},
            recomputes=self.training and tick.gradient_checkpointing,
        )
        return shared._replace(settings=settings, tensors=tensors)

    def can_think_at_once(self, key: torch.Tensor) -> bool:
        """
        Whether `think_at_once` does the same for this input as the modules one by one: not if a part is of another
        kind, in another mode or watched by hooks, in half precision, or where PyTorch follows each operation.
        """
        device = key.device.type
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return False
        if not torch.amp.is_autocast_available(device) or torch.is_autocast_enabled(device):
            return False
        if torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0:
            return False
        parts = [*self.tick.modules(), self.readout, self.readout.synchronisation]
        tensors = [key, *self.tick.parameters(), *self.readout.parameters()]
        return (
            self.config._attn_implementation in ("eager", "sdpa")
            and not torch.nn.modules.module._has_any_global_hook()
            and all(is_known(part) and part.training == self.training for part in parts)
            and all(type(tensor) in (torch.Tensor, nn.Parameter) for tensor in tensors)
            and {tensor.dtype for tensor in tensors} in ({torch.float32}, {torch.float64})
        )

    def think_compacted(
        self, thought: Thought, shared: Shared, num_ticks: int, threshold: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Ticks of the samples that are not certain yet, until there are none or all ticks are made.

        Args:
            thought, shared: As in `think`.
            num_ticks (`int`): Bound on the ticks.
            threshold (`float`): Certainty at which a sample stops.

        Returns:
            Predictions of shape `(num_ticks, batch_size, out_dims)` and normalised entropies of shape
            `(num_ticks, batch_size)`, both as they were at a sample's last tick from there on; the output
            synchronisation after that tick, of shape `(batch_size, synch_size_out)`; and ticks used, of shape
            `(batch_size,)`.
        """
        device, batch_size = thought.state.device, len(thought.state)
        # What is known of the samples is kept on the CPU, where small steps cost least: one transfer for each look.
        rows, waiting = np.arange(batch_size), np.ones(batch_size, dtype=bool)
        ticks = np.full(batch_size, num_ticks)
        interval, computed = self.config.certainty_check_interval, []
        for start in range(0, num_ticks, interval):
            number = min(interval, num_ticks - start)
            thought, predictions, entropies, synchronisation = self.think(thought, shared, start, number)
            computed.append((rows, predictions, entropies, synchronisation))
            is_certain = (1 - entropies >= threshold).cpu().numpy()
            stops = is_certain.any(axis=0) & waiting
            if not stops.any():
                continue
            ticks[rows[stops]] = start + 1 + is_certain[:, stops].argmax(axis=0)
            waiting &= ~stops
            (kept,) = waiting.nonzero()
            if len(kept) == 0:
                break
            if len(kept) <= (1 - COMPACTED_SHARE) * len(rows) and start + number < num_ticks:
                rows, waiting = rows[kept], waiting[kept]
                thought = thought.select(torch.from_numpy(kept).to(device))

        # Where in all that was computed each tick of each sample lies.
        places, size = np.zeros((num_ticks, batch_size), dtype=np.int64), 0
        for number, (rows, _, entropies, _) in enumerate(computed):
            added = np.arange(size, size + entropies.numel()).reshape(len(entropies), -1)
            places[number * interval : number * interval + len(entropies), rows] = added
            size += entropies.numel()
        last = np.minimum(np.arange(num_ticks)[:, None], ticks - 1)
        chosen = torch.from_numpy(np.take_along_axis(places, last, axis=0)).to(device)
        _, *results = zip(*computed, strict=True)
        predictions, entropies, synchronisation = (
            torch.cat([part.flatten(0, 1) for part in parts]) for parts in results
        )
        return (
            predictions.index_select(0, chosen.flatten()).unflatten(0, chosen.shape),
            entropies.index_select(0, chosen.flatten()).unflatten(0, chosen.shape),
            synchronisation.index_select(0, chosen[-1]),
            torch.from_numpy(ticks).to(device),
        )

    def checked_input(self, given: dict[str, torch.Tensor]) -> torch.Tensor:
        """The backbone's input, or a `ValueError` that names what is given instead."""
        if list(given) != [self.config.input_name]:
            raise ValueError(
                f"backbone_type={self.config.backbone_type!r} reads {self.config.input_name}, "
                f"got {' and '.join(given) or 'no input'}"
            )
        return given[self.config.input_name]

    def checked_bounds(
        self, iterations: int | None, certainty_threshold: float | None
    ) -> tuple[int, float | int | None]:
        """Bound and threshold for one call, or a `ValueError` that names the rule they break."""
        num_ticks = self.config.iterations if iterations is None else iterations
        if type(num_ticks) is not int or num_ticks < 1:
            raise ValueError(f"iterations={num_ticks!r} must be a positive int")
        threshold = self.config.certainty_threshold if certainty_threshold is None else certainty_threshold
        if threshold is not None and not 0 <= threshold <= 1:
            raise ValueError(f"certainty_threshold={threshold!r} must lie in [0, 1]")
        return num_ticks, threshold


def longest_prefix(correct: torch.Tensor) -> torch.Tensor:
    """Number of true entries before the first false one along the last dimension."""
    return correct.long().cumprod(dim=-1).sum(dim=-1)


class ContinuousThoughtMachineClassifier(ContinuousThoughtMachinePreTrainedModel):
    """
    What the heads have in common: the answer's tick, and the loss over ticks.

    Args:
        config ([`ContinuousThoughtMachineConfig`]): Configuration; `prediction_reshaper` says how many classes and how
            many positions an answer has.
    """

    body_class = ContinuousThoughtMachineModel

    def __init__(self, config: ContinuousThoughtMachineConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.main_input_name = config.input_name
        self.model = self.body_class(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.FloatTensor | None = None,
        input_values: torch.FloatTensor | None = None,
        input_features: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        iterations: int | None = None,
        certainty_threshold: float | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ContinuousThoughtMachineClassifierOutput:
        r"""
        Args as in [`ContinuousThoughtMachineModel.forward`], and:
            labels (`torch.LongTensor` of shape `(batch_size, *positions)`, *optional*):
                Classes, -100 where there is none; `positions` is the prediction's shape without its last entry, so that
                one class per sample takes labels of shape `(batch_size,)`.
            num_items_in_batch (`int` or `torch.Tensor`, *optional*):
                Number of labels that the loss is divided by, instead of that of this call.

        The cross entropy of a sample at a tick is the mean over its labelled positions; over samples it is weighted by
        their numbers of labels.

        Returns:
            [`ContinuousThoughtMachineClassifierOutput`].

        Raises:
            ValueError: as in [`ContinuousThoughtMachineModel.forward`], or the labels do not have the shape of the
                answer.
        """
        outputs = self.model(
            pixel_values=pixel_values,
            input_values=input_values,
            input_features=input_features,
            iterations=iterations,
            certainty_threshold=certainty_threshold,
            **kwargs,
        )
        shape = self.config.prediction_shape
        batch_size, _, num_ticks = outputs.predictions.shape
        rows = torch.arange(batch_size, device=outputs.predictions.device)
        if self.config.answer_tick == "last":
            certain_tick = torch.full_like(outputs.ticks, num_ticks - 1)
        else:
            certain_tick = outputs.certainties[:, 1].argmax(dim=-1)
        logits = outputs.predictions[rows, :, certain_tick].view(batch_size, *shape)

        loss = best_tick = best_tick_loss = certain_tick_loss = None
        if labels is not None:
            if list(labels.shape) != [batch_size, *shape[:-1]]:
                raise ValueError(
                    f"labels must be of shape {(batch_size, *shape[:-1])}, as prediction_reshaper="
                    f"{self.config.prediction_reshaper} says, got {tuple(labels.shape)}"
                )
            labels = labels.to(logits.device).reshape(batch_size, -1)
            losses = self.losses_by_tick(outputs.predictions, labels)
            best_tick = losses.argmin(dim=0)
            num_labels = (labels != IGNORED_LABEL).sum(dim=1)
            total = num_labels.sum().clamp_min(1) if num_items_in_batch is None else num_items_in_batch
            best_tick_loss = (losses[best_tick, rows] * num_labels).sum() / total
            certain_tick_loss = (losses[certain_tick, rows] * num_labels).sum() / total
            loss = (best_tick_loss + certain_tick_loss) / 2
        return ContinuousThoughtMachineClassifierOutput(
            loss=loss,
            logits=logits,
            predictions=outputs.predictions,
            certainties=outputs.certainties,
            synchronisation=outputs.synchronisation,
            ticks=outputs.ticks,
            certain_tick=certain_tick,
            best_tick=best_tick,
            best_tick_loss=best_tick_loss,
            certain_tick_loss=certain_tick_loss,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            pre_activations=outputs.pre_activations,
            synchronisation_action=outputs.synchronisation_action,
            synchronisation_out=outputs.synchronisation_out,
            contexts=outputs.contexts,
        )

    def losses_by_tick(self, predictions: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """
        Cross entropy of every tick (paper, section 3.5), under the curriculum of routes if there is one.

        Args:
            predictions (`torch.FloatTensor` of shape `(batch_size, out_dims, T)`): Logits.
            labels (`torch.LongTensor` of shape `(batch_size, number of positions)`): Classes, -100 where there is none.

        Returns:
            `torch.FloatTensor` of shape `(T, batch_size)`, in nats per label.
        """
        num_positions, lookahead = labels.shape[1], self.config.curriculum_lookahead
        logits = predictions.permute(2, 0, 1).unflatten(-1, (num_positions, -1))
        labels = labels.expand(len(logits), -1, -1)
        is_labelled = labels != IGNORED_LABEL
        if lookahead is not None:
            right = longest_prefix((logits.argmax(dim=-1) == labels) | ~is_labelled)
            reach = (right.amax(dim=0) - 1).clamp_min(0) + lookahead
            is_labelled = is_labelled & (torch.arange(num_positions, device=labels.device) < reach.unsqueeze(-1))
        losses = nn.functional.cross_entropy(
            logits.flatten(0, 2).to(at_least_float32(logits.dtype)),
            labels.flatten(),
            ignore_index=IGNORED_LABEL,
            reduction="none",
        ).view(labels.shape)
        return (losses * is_labelled).sum(dim=-1) / is_labelled.sum(dim=-1).clamp_min(1)


class ContinuousThoughtMachineForImageClassification(ContinuousThoughtMachineClassifier):
    """
    Continuous Thought Machine that names the class of an image: `logits` of shape `(batch_size, num_labels)` are each
    sample's prediction at its most certain tick.

    Args:
        config ([`ContinuousThoughtMachineConfig`]): Configuration.

    Example:

    ```python
    >>> import torch
    >>> from hf_models.continuous_thought_machine import (
    ...     ContinuousThoughtMachineConfig, ContinuousThoughtMachineForImageClassification
    ... )

    >>> config = ContinuousThoughtMachineConfig(
    ...     iterations=5, d_model=32, d_input=16, heads=2, n_synch_out=8, n_synch_action=8, synapse_depth=2,
    ...     memory_length=4, memory_hidden_dims=4, num_labels=10,
    ... )
    >>> model = ContinuousThoughtMachineForImageClassification(config)
    >>> outputs = model(pixel_values=torch.rand(2, 3, 20, 20), labels=torch.tensor([3, 7]))
    >>> outputs.logits.shape
    torch.Size([2, 10])
    ```
    """


class ContinuousThoughtMachineForTokenClassification(ContinuousThoughtMachineClassifier):
    """
    Continuous Thought Machine that gives one class to every position of an answer: the parities of a sequence
    (`prediction_reshaper=[length, 2]`), or the moves through the picture of a maze (`[length of the route, 5]`, with
    `curriculum_lookahead=5`). `logits` of shape `(batch_size, positions, num_labels)` are each sample's prediction at
    its most certain tick.

    Args:
        config ([`ContinuousThoughtMachineConfig`]): Configuration.

    Example:

    ```python
    >>> import torch
    >>> from hf_models.continuous_thought_machine import (
    ...     ContinuousThoughtMachineConfig, ContinuousThoughtMachineForTokenClassification
    ... )

    >>> config = ContinuousThoughtMachineConfig(
    ...     iterations=5, d_model=32, d_input=16, heads=2, n_synch_out=8, n_synch_action=8, synapse_depth=1,
    ...     memory_length=4, memory_hidden_dims=4, backbone_type="parity_backbone",
    ...     positional_embedding_type="custom-rotational-1d", prediction_reshaper=[6, 2],
    ... )
    >>> model = ContinuousThoughtMachineForTokenClassification(config)
    >>> signs = torch.tensor([[1.0, -1.0, -1.0, 1.0, 1.0, -1.0]])
    >>> outputs = model(input_values=signs, labels=(signs == -1).long().cumsum(1) % 2)
    >>> outputs.logits.shape
    torch.Size([1, 6, 2])
    ```
    """


class HyperContinuousThoughtMachineModel(ContinuousThoughtMachineModel):
    """
    [`ContinuousThoughtMachineModel`] in which a short code of each tick's synapse input makes low-rank weights for
    chosen layers. At initialisation they have no effect, and the parameters of the plain machine keep their names, so
    that its checkpoints load.

    Args:
        config ([`HyperContinuousThoughtMachineConfig`]): Configuration.
    """

    config: HyperContinuousThoughtMachineConfig
    _no_split_modules = ["HyperContinuousThoughtMachineModel"]


class HyperContinuousThoughtMachineForImageClassification(ContinuousThoughtMachineForImageClassification):
    """
    [`ContinuousThoughtMachineForImageClassification`] with dynamic weights.

    Args:
        config ([`HyperContinuousThoughtMachineConfig`]): Configuration.
    """

    config: HyperContinuousThoughtMachineConfig
    _no_split_modules = ["HyperContinuousThoughtMachineModel"]
    body_class = HyperContinuousThoughtMachineModel


class HyperContinuousThoughtMachineForTokenClassification(ContinuousThoughtMachineForTokenClassification):
    """
    [`ContinuousThoughtMachineForTokenClassification`] with dynamic weights.

    Args:
        config ([`HyperContinuousThoughtMachineConfig`]): Configuration.
    """

    config: HyperContinuousThoughtMachineConfig
    _no_split_modules = ["HyperContinuousThoughtMachineModel"]
    body_class = HyperContinuousThoughtMachineModel


__all__ = [
    "ContinuousThoughtMachineForImageClassification",
    "ContinuousThoughtMachineForTokenClassification",
    "ContinuousThoughtMachineModel",
    "ContinuousThoughtMachinePreTrainedModel",
    "HyperContinuousThoughtMachineForImageClassification",
    "HyperContinuousThoughtMachineForTokenClassification",
    "HyperContinuousThoughtMachineModel",
]
