"""
The connections between slots, one class for each `connection_type`.

Per-pair, block and diagonal connections run as batched matrix products; in training, the gradients of their weights
come from one product over all steps of a pass, see [`WeightGradients`].
"""

import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import flop_registry, register_flop_formula
from transformers import initialization as init
from transformers.utils import is_torchdynamo_compiling, logging

from .configuration_connection_transformer import ConnectionTransformerConfig

logger = logging.get_logger(__name__)


def memory_size(device: torch.device) -> int | None:
    """Bytes of memory that the device or, for the CPU, this process can have at most; `None` where that is unknown."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type != "cpu":
        return None
    limits = []
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    # A container's limit, under either version of the control groups.
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            with open(path, encoding="ascii") as file:
                limits.append(int(file.read()))
        except (OSError, ValueError):
            continue
    return min(limits, default=None)


def check_memory(config: ConnectionTransformerConfig) -> None:
    """
    Compares the connection weights, before any is allocated, with the memory of the device they are to lie on. Gives a
    warning if training them with Adam (weights, gradients and two moments) takes more than that.

    Args:
        config ([`ConnectionTransformerConfig`]): Configuration of the connections.

    Raises:
        ValueError: the weights alone take more than there is.
    """
    device = torch.empty(0).device
    available = memory_size(device)
    if available is None:
        return
    dtype = torch.get_default_dtype()
    num_weights = CONNECTION_TYPES[config.connection_type].num_weights(config)
    needed = num_weights * dtype.itemsize
    if 4 * needed <= available:
        return
    smaller = [
        f"{name!r} has {count:,}"
        for name in ("block", "diagonal")
        if (count := CONNECTION_TYPES[name].num_weights(config)) < num_weights
    ]
    report = (
        f"connection_type={config.connection_type!r} with num_slots={config.num_slots}, "
        f"hidden_size={config.hidden_size} and connection_rank={config.connection_rank} has {num_weights:,} connection "
        f"weights: {needed / 2**30:.1f} GiB in {str(dtype).removeprefix('torch.')}, "
        f"{4 * needed / 2**30:.1f} GiB in training with Adam; the {device.type} has {available / 2**30:.1f} GiB"
    )
    if smaller:
        report += f"; connection_type {' or '.join(smaller)} weights"
    if needed > available:
        raise ValueError(report)
    logger.warning_once(report)


def off_diagonal(num_slots: int, device: torch.device) -> torch.Tensor:
    """Mask of shape `(num_slots, num_slots)`, true where source and target differ."""
    return ~torch.eye(num_slots, dtype=torch.bool, device=device)


def gram_error(matrices: torch.Tensor) -> torch.Tensor:
    """
    Mean squared difference of `MᵀM` from the identity, for each matrix M of shape `(rows, rank)`.

    Args:
        matrices (`torch.FloatTensor` of shape `(count, rows, rank)`): The matrices; computed in float32 or better.

    Returns:
        `torch.FloatTensor` of shape `(count,)`.
    """
    matrices = matrices.to(torch.promote_types(matrices.dtype, torch.float32))
    with torch.autocast(matrices.device.type, enabled=False):
        grams = torch.bmm(matrices.transpose(1, 2), matrices)
    return (grams - torch.eye(grams.shape[-1], dtype=grams.dtype, device=grams.device)).square().mean(dim=(1, 2))


class ConnectionTransformerScalarConnections(nn.Module):
    """
    Connections of one number each: slot i acts on slot j by adding `c_ij` times its state, where `c_ij` is the inner
    product of a source vector and a target vector of length `connection_rank`. No slot acts on itself.

    A connection type offers `num_weights(config)`; `prepare(num_steps, batch_size)`, called once per pass, which
    gives what each step needs (the batch size is `None` if samples may leave the batch); `forward(slot_states,
    prepared)`, called once per step; `connection_matrix()`; `orthogonality_penalty()`, and in `has_cheap_penalty`
    whether that takes little time beside a forward pass; and `initialise()`.
    """

    has_cheap_penalty = True

    def __init__(self, config: ConnectionTransformerConfig):
        super().__init__()
        check_memory(config)
        shape = (config.num_slots, config.num_slots, config.connection_rank)
        self.source_weight = nn.Parameter(torch.empty(shape))
        self.target_weight = nn.Parameter(torch.empty(shape))
        self.initial_length = 1.0
        if config.initial_update_ratio is not None:
            # Unit vectors give an update of √((N - 1) / 2r) times the state.
            unit = ((config.num_slots - 1) / (2 * config.connection_rank)) ** 0.5
            self.initial_length = (config.initial_update_ratio / unit) ** 0.5

    @staticmethod
    def num_weights(config: ConnectionTransformerConfig) -> int:
        """Number of connection weights: 2N²r."""
        return 2 * config.num_slots**2 * config.connection_rank

    def initialise(self):
        """Random unit vectors, or as short as the configuration wants them, zero on the diagonal."""
        others = off_diagonal(self.source_weight.shape[0], torch.device("cpu")).unsqueeze(-1)
        for weight in (self.source_weight, self.target_weight):
            directions = nn.functional.normalize(torch.randn(weight.shape, dtype=torch.float32), dim=-1)
            init.copy_(weight, directions * self.initial_length * others.to(directions.device))

    def connection_matrix(self) -> torch.Tensor:
        """
        Strength and sign of every connection.

        Returns:
            `torch.FloatTensor` of shape `(num_slots, num_slots)`, indexed `[source, target]`, with a zero diagonal.
        """
        products = (self.source_weight * self.target_weight).sum(-1)
        return products.where(off_diagonal(products.shape[0], products.device), 0)

    def prepare(self, num_steps: int, batch_size: int | None = None) -> list[torch.Tensor]:
        """For every step of one forward pass the same connection matrix."""
        return [self.connection_matrix()] * num_steps

    def forward(self, slot_states: torch.Tensor, prepared: torch.Tensor) -> torch.Tensor:
        """
        Args:
            slot_states (`torch.FloatTensor` of shape `(batch_size, num_slots, hidden_size)`): States of all slots.
            prepared (`torch.FloatTensor` of shape `(num_slots, num_slots)`): One item of `prepare()`.

        Returns:
            `torch.FloatTensor` of shape `(batch_size, num_slots, hidden_size)`: influence of all slots on each slot.
        """
        batch_size, num_slots, hidden_size = slot_states.shape
        # One matrix product for the whole batch; `slot_major` memory needs no copy here.
        columns = slot_states.transpose(0, 1).reshape(num_slots, batch_size * hidden_size)
        return (prepared.T @ columns).view(num_slots, batch_size, hidden_size).transpose(0, 1)

    def orthogonality_penalty(self) -> torch.Tensor:
        """
        For source and target vectors w_p of the P = N(N-1) connections,
        `1/2 Σ_{source, target} [mean_p (‖w_p‖ - 1)² + 0.1 mean_{p≠q} ⟨w_p, w_q⟩²]`.

        The second mean is exact and takes O(P r²): with the rows w_p stacked into S, the sum of all squared inner
        products is `‖SᵀS‖_F²`, and the p = q terms in it are `Σ_p ‖w_p‖⁴`.

        Returns:
            `torch.FloatTensor` of shape `()`.
        """
        num_slots = self.source_weight.shape[0]
        others = off_diagonal(num_slots, self.source_weight.device).unsqueeze(-1)
        num_vectors = num_slots * (num_slots - 1)
        penalty = 0.0
        for weight in (self.source_weight, self.target_weight):
            vectors = weight.to(torch.promote_types(weight.dtype, torch.float32)) * others
            lengths = torch.linalg.vector_norm(vectors, dim=-1)
            length_error = ((lengths - 1) ** 2 * others.squeeze(-1)).sum() / num_vectors
            rows = vectors.flatten(0, 1)
            with torch.autocast(rows.device.type, enabled=False):
                products = (rows.T @ rows).square().sum() - (lengths**4).sum()
            penalty = penalty + 0.5 * (length_error + 0.1 * products / (num_vectors * (num_vectors - 1)))
        return penalty


class ConnectionTransformerMatrixConnections(nn.Module):
    """
    What the types share whose connections are matrices: slot i adds its state times `M_ij`, of shape
    `(hidden_size, hidden_size)` and rank `connection_rank` at most, to slot j. No slot acts on itself.

    With D the hidden size and r the rank, the factors next to the states start as normal with variance `2 / (D + r)`,
    as in the original implementation, or with `ρ √(2 / (D (N - 1) r))` for an update of ρ times the state.
    """

    def __init__(self, config: ConnectionTransformerConfig):
        super().__init__()
        check_memory(config)
        self.num_slots, self.rank = config.num_slots, config.connection_rank
        self.initial_variance = 2 / (config.hidden_size + self.rank)
        if config.initial_update_ratio is not None:
            products = config.hidden_size * (self.num_slots - 1) * self.rank
            self.initial_variance = config.initial_update_ratio * (2 / products) ** 0.5

    def initialise_factors(self):
        """Draws `source_weight` and `target_weight`."""
        for weight in (self.source_weight, self.target_weight):
            init.normal_(weight, std=self.initial_variance**0.5)

    def squared_strengths(self) -> torch.Tensor:
        """`‖M_ij‖_F²` of all connections, `[source, target]`, in float32 or better; anything on the diagonal."""
        raise NotImplementedError

    def connection_matrix(self) -> torch.Tensor:
        """
        Strength of every connection: the Frobenius norm of `M_ij`, from Gram matrices of shape `(rank, rank)`.

        Returns:
            `torch.FloatTensor` of shape `(num_slots, num_slots)`, indexed `[source, target]`, with a zero diagonal.
        """
        with torch.autocast(self.source_weight.device.type, enabled=False):
            squares = self.squared_strengths()
        others = off_diagonal(self.num_slots, squares.device)
        # The root has no slope at zero: the diagonal must not reach it.
        return squares.where(others, 1).clamp_min(0).sqrt().where(others, 0)


# Entries of a matrix from which on oneDNN's product pays for being called matrix by matrix.
LARGE_MATRIX = 2**16


def onednn_linear(states: torch.Tensor, weight: torch.Tensor) -> Callable | None:
    """
    oneDNN's product of a matrix with a transposed one, as an operator of torch, if it is the fastest way to multiply
    each of `states` with each of `weight`: for large matrices in float32, on one thread of a CPU. (Over several threads
    `torch.bmm` spreads the slots, and this would spread each small product.)
    """
    if (
        states.device.type != "cpu"
        or states.dtype != torch.float32
        or states.numel() == 0
        or weight[0].numel() < LARGE_MATRIX
        or torch.get_num_threads() > 1
        or is_torchdynamo_compiling()
        or not torch.backends.mkldnn.is_available()
    ):
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def linear_flops(rows_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    """Operations of [`onednn_linear`]'s product, which torch's own counter does not know."""
    return 2 * math.prod(rows_shape) * weight_shape[0]


if hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch.ops.mkldnn._linear_pointwise not in flop_registry:
    register_flop_formula(torch.ops.mkldnn._linear_pointwise)(linear_flops)


def products(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`torch.bmm(left, right)` by the fastest way there is. Gives nothing for autograd to follow."""
    linear = onednn_linear(left, right)
    if linear is None:
        return torch.bmm(left, right)
    if len(left) == 1:
        return linear(left[0], right[0].t(), None, "none", [], "").unsqueeze(0)
    result = left.new_empty(left.shape[0], left.shape[1], right.shape[2])
    for place, one, other in zip(result.unbind(0), left.unbind(0), right.unbind(0), strict=True):
        place.copy_(linear(one, other.t(), None, "none", [], ""))
    return result


def side_by_side(parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """`torch.cat(parts, dim=1)`, as a view where the parts already lie so in memory."""
    first = parts[0]
    length = first.shape[1] * first.stride(1)
    together = all(
        part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        and part.stride() == first.stride()
        and part.storage_offset() == first.storage_offset() + index * length
        for index, part in enumerate(parts)
    )
    if not together:
        return torch.cat(parts, dim=1)
    return first.as_strided((first.shape[0], len(parts) * first.shape[1], first.shape[2]), first.stride())


class PassMemory:
    """
    Memory that all steps of one pass share: rows of the same kind and of all steps, one step's after the other's, as
    the products for the weights' gradients read them.

    Args:
        batch_size (`int`): Rows of one step.
        num_steps (`int`): Number of steps.
    """

    def __init__(self, batch_size: int, num_steps: int):
        self.batch_size, self.num_steps = batch_size, num_steps
        self.tensors: dict[str, torch.Tensor] = {}

    def rows(self, kind: str, step: int, weight: torch.Tensor) -> torch.Tensor:
        """The place of one step, of shape `(groups, batch_size, columns)` for a weight `(groups, ..., columns)`."""
        if kind not in self.tensors:
            shape = (weight.shape[0], self.num_steps, self.batch_size, weight.shape[-1])
            self.tensors[kind] = weight.new_empty(shape)
        # Outside autograd's count of changes: writing one step's place leaves the other steps' alone.
        return self.tensors[kind][:, step].data


class WeightGradients(torch.autograd.Function):
    """
    Gradients of weights that are used once in every step, from all steps together: one matrix product over
    `num_steps * batch_size` rows per weight, instead of adding a tensor of the weight's size in every step.

    Every weight, of shape `(groups, in, out)`, takes part in a product `torch.bmm(rows, weight)`, which gives it no
    gradient. Forward returns for each step and weight two empty places; into these the backward of the step's product
    puts, as what autograd takes for their gradients, the rows and the gradient of the result. When all steps that take
    part have done so, autograd calls the backward here. Which steps those are is told by the graph alone, so that a
    graph can be run backward twice or in part; [`PassMemory`] only says where a step may write.

    Args:
        memory ([`PassMemory`]): Memory of the pass.
        dead (`tuple`): For each weight `None`, or what gives the view of its gradient on the entries without effect.
        weights (`torch.FloatTensor` of shape `(groups, in, out)`): The weights.
    """

    @staticmethod
    def forward(ctx, memory, dead, *weights):
        ctx.set_materialize_grads(False)
        ctx.memory, ctx.dead = memory, dead
        nothing = weights[0].new_zeros(())
        shapes = [(weight.shape[0], memory.batch_size, size) for weight in weights for size in weight.shape[1:]]
        # Views of one number: they take no memory.
        return tuple(nothing.expand(shape) for shape in shapes * memory.num_steps)

    @staticmethod
    @once_differentiable
    def backward(ctx, *places):
        # A run that follows begins with memory of its own.
        ctx.memory.tensors.clear()
        gradients = []
        for index, dead in enumerate(ctx.dead):
            every = slice(2 * index, None, 2 * len(ctx.dead))
            rows = tuple(place for place in places[every] if place is not None)
            results = tuple(place for place in places[every.start + 1 :: every.step] if place is not None)
            if not (rows and ctx.needs_input_grad[2 + index]):
                gradients.append(None)
                continue
            gradient = products(side_by_side(rows).transpose(1, 2), side_by_side(results))
            if dead is not None:
                dead(gradient).zero_()
            gradients.append(gradient)
        return None, None, *gradients


def route_messages(messages: torch.Tensor, rank: int) -> torch.Tensor:
    """
    Hands the messages over from the slots that send to those that receive; applied twice, it gives them back. What a
    slot would send to itself becomes zero.

    Args:
        messages (`torch.FloatTensor` of shape `(num_slots, batch_size, num_slots * rank)`):
            For each slot, its messages to all.
        rank (`int`): Length of a message.

    Returns:
        `torch.FloatTensor` of the same shape, in memory of its own: for each slot, the messages of all to it.
    """
    num_slots, batch_size, _ = messages.shape
    messages = messages.view(num_slots, batch_size, num_slots, rank).permute(2, 1, 0, 3)
    # The copy is needed for the next matrix product, and may be written to.
    messages = messages.clone(memory_format=torch.contiguous_format)
    messages.diagonal(dim1=0, dim2=2).zero_()
    return messages.flatten(2)


def send_messages(states: torch.Tensor, weight: torch.Tensor, received: torch.Tensor) -> None:
    """
    Writes the messages that slots send, the products of their states with their weights, to where they are received:
    `route_messages(torch.bmm(states, weight), rank)`, without a tensor of all messages on the way where possible. Gives
    nothing for autograd to follow.

    Args:
        states (`torch.FloatTensor` of shape `(num_slots, batch_size, hidden_size)`): States of the slots that send.
        weight (`torch.FloatTensor` of shape `(num_slots, hidden_size, num_slots * rank)`): Weights of these slots.
        received (`torch.FloatTensor` of shape `(num_slots, batch_size, num_slots * rank)`):
            Filled in; its last dimension is contiguous.
    """
    num_slots, batch_size, columns = received.shape
    places = received.unflatten(2, (num_slots, columns // num_slots))
    linear = onednn_linear(states, weight)
    if linear is None:
        places.copy_(torch.bmm(states, weight).view(places.shape).permute(2, 1, 0, 3))
    else:
        # A slot's messages are still in the cache when they are handed over.
        for place, one, other in zip(places.unbind(2), states.unbind(0), weight.unbind(0), strict=True):
            sent = linear(one, other.t(), None, "none", [], "")
            place.copy_(sent.view(batch_size, num_slots, -1).transpose(0, 1))
    places.diagonal(dim1=0, dim2=2).zero_()


class PerPairStep(torch.autograd.Function):
    """One step of per-pair connections, slot-major, whose weights get their gradients by [`WeightGradients`]."""

    @staticmethod
    def forward(ctx, states, source_weight, target_weight, memory, step, *places):
        received = memory.rows("received", step, source_weight)
        send_messages(states, source_weight, received)
        ctx.memory, ctx.step = memory, step
        ctx.save_for_backward(states, received, source_weight, target_weight)
        return products(received, target_weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_influence):
        states, received, source_weight, target_weight = ctx.saved_tensors
        grad_sent = ctx.memory.rows("grad_sent", ctx.step, source_weight)
        send_messages(grad_influence, target_weight.transpose(1, 2), grad_sent)
        grad_states = products(grad_sent, source_weight.transpose(1, 2)) if ctx.needs_input_grad[0] else None
        return grad_states, None, None, None, None, states, grad_sent, received, grad_influence


class StepProduct(torch.autograd.Function):
    """
    `torch.bmm(rows, weight)` in one step, with a gradient for the rows; the weight gets its own by
    [`WeightGradients`]. Given `num_slots`, rows and weight are of one group and concern all slots, and what lies in the
    weight between a slot and itself is left out.
    """

    @staticmethod
    def forward(ctx, rows, weight, num_slots, *places):
        ctx.num_slots = num_slots
        ctx.save_for_backward(rows, weight)
        return StepProduct.product(rows, weight, num_slots)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_result):
        rows, weight = ctx.saved_tensors
        # The products for the weight's gradient, too, are faster on contiguous memory.
        grad_result = grad_result.contiguous()
        grad_rows = None
        if ctx.needs_input_grad[0]:
            grad_rows = StepProduct.product(grad_result, weight.transpose(1, 2), ctx.num_slots)
        return grad_rows, None, None, rows, grad_result

    @staticmethod
    def product(rows: torch.Tensor, weight: torch.Tensor, num_slots: int | None = None) -> torch.Tensor:
        result = products(rows, weight)
        if num_slots is not None:
            # Taken off afterwards: a copy of the weight without these entries would take as long as the product.
            own = own_cores(weight, num_slots).permute(2, 0, 1)
            by_slot = (rows.shape[1], num_slots, -1)
            shares = torch.bmm(rows.view(by_slot).transpose(0, 1), own).transpose(0, 1)
            result.view(by_slot).sub_(shares)
        return result


def own_cores(weight: torch.Tensor, num_slots: int) -> torch.Tensor:
    """
    What lies between each slot and itself.

    Args:
        weight (`torch.FloatTensor` of shape `(1, num_slots * rank, num_slots * rank)`): Cores of all pairs.
        num_slots (`int`): Number of slots.

    Returns:
        View of shape `(rank, rank, num_slots)`.
    """
    rank = weight.shape[-1] // num_slots
    return weight[0].unflatten(1, (num_slots, rank)).unflatten(0, (num_slots, rank)).diagonal(dim1=0, dim2=2)


def plain_product(rows: torch.Tensor, weight: torch.Tensor, num_slots: None = None) -> torch.Tensor:
    """`torch.bmm(rows, weight)`, which autograd and autocast know."""
    return torch.bmm(rows, weight)


def autocast_enabled(device_type: str) -> bool:
    """Whether autocast is on for this kind of device; off where there is none, as on the meta device."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def learning_together(weights: Sequence[torch.Tensor], batch_size: int | None) -> bool:
    """Whether the weights' gradients of a pass over a batch of this size (`None`: not fixed) come from all steps."""
    needed = torch.is_grad_enabled() and any(weight.requires_grad for weight in weights)
    return needed and batch_size is not None and not is_torchdynamo_compiling()


def as_under_autocast(weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The weights in the type in which autocast, if it is on, would multiply them."""
    device_type = weights[0].device.type
    if not autocast_enabled(device_type):
        return list(weights)
    return [weight.to(torch.get_autocast_dtype(device_type)) for weight in weights]


def plainly_differentiable(states: torch.Tensor) -> bool:
    """Whether a pass without prepared gradients must run through operations that autograd and autocast know."""
    return torch.is_grad_enabled() or is_torchdynamo_compiling() or autocast_enabled(states.device.type)


class ConnectionTransformerPerPairConnections(ConnectionTransformerMatrixConnections):
    """
    A source matrix `S_ij` (D x r) and a target matrix `T_ij` (r x D) for every pair: `M_ij = S_ij T_ij`.

    Both are stored as the two batched matrix products of a step read them: `source_weight[i]` of shape `(D, N r)` holds
    `S_ij` in columns `j r` to `(j + 1) r`, `target_weight[j]` of shape `(N r, D)` holds `T_ij` in rows `i r` to
    `(i + 1) r`. The entries of pairs i = j are there and without effect.
    """

    # N²Dr² operations: at the usual sizes a good part of a training step.
    has_cheap_penalty = False

    def __init__(self, config: ConnectionTransformerConfig):
        super().__init__(config)
        columns = config.num_slots * config.connection_rank
        self.source_weight = nn.Parameter(torch.empty(config.num_slots, config.hidden_size, columns))
        self.target_weight = nn.Parameter(torch.empty(config.num_slots, columns, config.hidden_size))

    @staticmethod
    def num_weights(config: ConnectionTransformerConfig) -> int:
        """Number of connection weights: 2N²Dr."""
        return 2 * config.num_slots**2 * config.hidden_size * config.connection_rank

    @staticmethod
    def pack(source: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            source (`torch.FloatTensor` of shape `(num_slots, num_slots, hidden_size, rank)`):
                `S_ij`, indexed `[source, target]`.
            target (`torch.FloatTensor` of shape `(num_slots, num_slots, rank, hidden_size)`):
                `T_ij`, indexed `[source, target]`.

        Returns:
            `source_weight` and `target_weight`, in memory of their own.
        """
        num_slots, _, hidden_size, rank = source.shape
        packed_source = source.new_empty(num_slots, hidden_size, num_slots, rank).copy_(source.transpose(1, 2))
        packed_target = target.new_empty(num_slots, num_slots, rank, hidden_size).copy_(target.transpose(0, 1))
        return packed_source.flatten(2), packed_target.flatten(1, 2)

    @staticmethod
    def unpack(source_weight: torch.Tensor, target_weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The inverse of `pack`, as views."""
        num_slots, hidden_size, _ = source_weight.shape
        source = source_weight.view(num_slots, hidden_size, num_slots, -1).transpose(1, 2)
        return source, target_weight.view(num_slots, num_slots, -1, hidden_size).transpose(0, 1)

    def initialise(self):
        """Normal, zero where a slot would act on itself."""
        self.initialise_factors()
        source, target = self.unpack(self.source_weight, self.target_weight)
        for weight, matrices in ((self.source_weight, source), (self.target_weight, target)):
            # The view does not carry the mark of a loaded weight.
            if not getattr(weight, "_is_hf_initialized", False):
                init.zeros_(matrices.diagonal())

    def prepare(self, num_steps: int, batch_size: int | None = None) -> list[tuple[Any, ...] | None]:
        """
        In training, for each step what [`PerPairStep`] takes besides the states. Otherwise `None`: the weights are
        stored as a step reads them.
        """
        if not learning_together((self.source_weight, self.target_weight), batch_size):
            return [None] * num_steps
        weights = as_under_autocast((self.source_weight, self.target_weight))
        memory = PassMemory(batch_size, num_steps)
        places = WeightGradients.apply(memory, (None, None), *weights)
        weights = [weight.detach() for weight in weights]
        return [(*weights, memory, step, *places[4 * step : 4 * step + 4]) for step in range(num_steps)]

    def forward(self, slot_states: torch.Tensor, prepared: tuple[Any, ...] | None = None) -> torch.Tensor:
        """
        Args:
            slot_states (`torch.FloatTensor` of shape `(batch_size, num_slots, hidden_size)`): States of all slots.
            prepared (`tuple`, *optional*): One item of `prepare()`, for one step.

        Returns:
            `torch.FloatTensor` of the same shape: influence of all slots on each slot. The largest tensor on the way
            is of shape `(batch_size, num_slots, num_slots, rank)`.
        """
        states = slot_states.transpose(0, 1)
        if prepared is not None:
            return PerPairStep.apply(states.to(prepared[0].dtype), *prepared).transpose(0, 1)
        if plainly_differentiable(states):
            received = route_messages(torch.bmm(states, self.source_weight), self.rank)
            return torch.bmm(received, self.target_weight).transpose(0, 1)
        received = states.new_empty(*states.shape[:2], self.source_weight.shape[2])
        send_messages(states, self.source_weight, received)
        return products(received, self.target_weight).transpose(0, 1)

    def squared_strengths(self) -> torch.Tensor:
        source, target = self.unpack(self.source_weight, self.target_weight)
        dtype = torch.promote_types(source.dtype, torch.float32)
        rows = []
        # One source slot at a time: the Gram matrices of all pairs would be as large as the weights.
        for one, other in zip(source.unbind(0), target.unbind(0), strict=True):
            one, other = one.to(dtype), other.to(dtype)
            rows.append((one.transpose(1, 2) @ one * (other @ other.transpose(1, 2))).sum(dim=(1, 2)))
        return torch.stack(rows)

    def orthogonality_penalty(self) -> torch.Tensor:
        """
        `1/2 mean (S_ijᵀ S_ij - I)² + 1/2 mean (T_ij T_ijᵀ - I)²`, over the entries of all pairs i ≠ j.

        Returns:
            `torch.FloatTensor` of shape `()`.
        """
        source, target = self.unpack(self.source_weight, self.target_weight)
        # By the first dimension of the stored weights, so that backward puts each gradient together once.
        errors = torch.stack([gram_error(one) for one in source.unbind(0)])
        errors = errors + torch.stack([gram_error(one.transpose(1, 2)) for one in target.unbind(1)], dim=1)
        others = off_diagonal(self.num_slots, errors.device)
        return 0.5 * (errors * others).sum() / (self.num_slots * (self.num_slots - 1))


class ConnectionTransformerFactoredConnections(ConnectionTransformerMatrixConnections):
    """
    Connections through one small space per slot: `M_ij = U_i C_ij V_j`, with `source_weight[i] = U_i` (D x r) and
    `target_weight[j] = V_j` (r x D) shared by all connections of a slot, and a core `C_ij` (r x r) of its own for each
    pair. A special case of per-pair connections with far fewer weights.
    """

    has_cheap_penalty = True

    def __init__(self, config: ConnectionTransformerConfig):
        super().__init__(config)
        num_slots, hidden_size, rank = config.num_slots, config.hidden_size, config.connection_rank
        self.source_weight = nn.Parameter(torch.empty(num_slots, hidden_size, rank))
        self.target_weight = nn.Parameter(torch.empty(num_slots, rank, hidden_size))

    def orthogonality_penalty(self) -> torch.Tensor:
        """
        `1/2 mean (U_iᵀ U_i - I)² + 1/2 mean (V_j V_jᵀ - I)²`, over the entries of all slots. The cores are free.

        Returns:
            `torch.FloatTensor` of shape `()`.
        """
        return 0.5 * (gram_error(self.source_weight).mean() + gram_error(self.target_weight.transpose(1, 2)).mean())

    def masked_cores(self) -> torch.Tensor:
        """The cores without what lies between a slot and itself, as `mix` takes them."""
        raise NotImplementedError

    def prepared_cores(self) -> torch.Tensor:
        """The cores of the shape `(groups, in, out)`, as the products of prepared gradients take them."""
        raise NotImplementedError

    def mix(self, messages: torch.Tensor, product: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """
        What the slots receive.

        Args:
            messages (`torch.FloatTensor` of shape `(num_slots, batch_size, rank)`): What the slots send.
            product (`Callable`): Multiplies rows of shape `(groups, batch_size, in)` with the cores.

        Returns:
            `torch.FloatTensor` of the shape of `messages`, contiguous.
        """
        raise NotImplementedError

    # What `WeightGradients` takes for the cores, and `StepProduct` for the product with them.
    dead_cores: Callable[[torch.Tensor], torch.Tensor] | None = None
    left_out: int | None = None

    def prepare(self, num_steps: int, batch_size: int | None = None) -> list[tuple[Any, ...]]:
        """
        In training, for each step what the three [`StepProduct`] take besides the rows; otherwise a product of rows
        with a weight, and what it takes to be that with the cores.
        """
        weights = (self.source_weight, self.core_weight, self.target_weight)
        if plainly_differentiable(self.core_weight) and not learning_together(weights, batch_size):
            return [(plain_product, (self.masked_cores(), None))] * num_steps
        if not torch.is_grad_enabled():
            return [(StepProduct.product, (self.prepared_cores().detach(), self.left_out))] * num_steps
        weights = as_under_autocast((self.source_weight, self.prepared_cores(), self.target_weight))
        places = WeightGradients.apply(PassMemory(batch_size, num_steps), (None, self.dead_cores, None), *weights)
        source, cores, target = (weight.detach() for weight in weights)
        steps = []
        for step in range(num_steps):
            own = places[6 * step : 6 * step + 6]
            steps.append(((source, None, *own[:2]), (cores, self.left_out, *own[2:4]), (target, None, *own[4:])))
        return steps

    def forward(self, slot_states: torch.Tensor, prepared: tuple[Any, ...]) -> torch.Tensor:
        """
        Args:
            slot_states (`torch.FloatTensor` of shape `(batch_size, num_slots, hidden_size)`): States of all slots.
            prepared (`tuple`): One item of `prepare()`, for one step.

        Returns:
            `torch.FloatTensor` of the shape of `slot_states`: influence of all slots on each slot.
        """
        states = slot_states.transpose(0, 1)
        if len(prepared) == 3:
            source, cores, target = prepared
            messages = StepProduct.apply(states.to(source[0].dtype), *source)
            received = self.mix(messages, lambda rows: StepProduct.apply(rows, *cores))
            return StepProduct.apply(received, *target).transpose(0, 1)
        product, cores = prepared
        received = self.mix(product(states, self.source_weight), lambda rows: product(rows, *cores))
        return product(received, self.target_weight).transpose(0, 1)

    def grams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`U_iᵀ U_i` and `V_j V_jᵀ`, both of shape `(num_slots, rank, rank)`, in float32 or better."""
        dtype = torch.promote_types(self.source_weight.dtype, torch.float32)
        source, target = self.source_weight.to(dtype), self.target_weight.to(dtype)
        return source.transpose(1, 2) @ source, target @ target.transpose(1, 2)


class ConnectionTransformerBlockConnections(ConnectionTransformerFactoredConnections):
    """
    Factored connections with full cores: `core_weight` of shape `(N r, N r)` holds `C_ij` in rows `i r` to
    `(i + 1) r` and columns `j r` to `(j + 1) r`. The entries of pairs i = j are there and without effect.
    """

    def __init__(self, config: ConnectionTransformerConfig):
        super().__init__(config)
        size = config.num_slots * config.connection_rank
        self.core_weight = nn.Parameter(torch.empty(size, size))

    @staticmethod
    def num_weights(config: ConnectionTransformerConfig) -> int:
        """Number of connection weights: 2NDr + N²r²."""
        size = config.num_slots * config.connection_rank
        return 2 * config.hidden_size * size + size**2

    def cores(self) -> torch.Tensor:
        """View of shape `(num_slots, rank, num_slots, rank)`: `C_ij` in `[i, :, j, :]`."""
        return self.core_weight.view(self.num_slots, self.rank, self.num_slots, self.rank)

    def initialise(self):
        """Cores start as normal with variance `1 / r`, zero where a slot would act on itself."""
        self.initialise_factors()
        init.normal_(self.core_weight, std=self.rank**-0.5)
        # The view does not carry the mark of a loaded weight.
        if not getattr(self.core_weight, "_is_hf_initialized", False):
            init.zeros_(self.cores().diagonal(dim1=0, dim2=2))

    @property
    def left_out(self) -> int:
        return self.num_slots

    def dead_cores(self, weight: torch.Tensor) -> torch.Tensor:
        return own_cores(weight, self.num_slots)

    def masked_cores(self) -> torch.Tensor:
        others = off_diagonal(self.num_slots, self.core_weight.device)[:, None, :, None]
        return self.cores().where(others, 0).view(1, *self.core_weight.shape)

    def prepared_cores(self) -> torch.Tensor:
        return self.core_weight.unsqueeze(0)

    def mix(self, messages: torch.Tensor, product: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        mixed = product(messages.transpose(0, 1).flatten(1).unsqueeze(0))
        return mixed.view(messages.transpose(0, 1).shape).transpose(0, 1).contiguous()

    def squared_strengths(self) -> torch.Tensor:
        source, target = self.grams()
        rows = []
        # One source slot at a time, as for per-pair connections.
        for gram, cores in zip(source, self.cores().unbind(0), strict=True):
            cores = cores.to(gram.dtype).transpose(0, 1)
            rows.append((cores.transpose(1, 2) @ gram @ cores * target).sum(dim=(1, 2)))
        return torch.stack(rows)


class ConnectionTransformerDiagonalConnections(ConnectionTransformerFactoredConnections):
    """
    Factored connections with diagonal cores: `core_weight` of shape `(r, N, N)` holds r matrices that mix the slots,
    with the diagonal of `C_ij` in `[:, i, j]`. The entries of pairs i = j are there and without effect.
    """

    def __init__(self, config: ConnectionTransformerConfig):
        super().__init__(config)
        self.core_weight = nn.Parameter(torch.empty(config.connection_rank, config.num_slots, config.num_slots))

    @staticmethod
    def num_weights(config: ConnectionTransformerConfig) -> int:
        """Number of connection weights: 2NDr + N²r."""
        return config.num_slots * config.connection_rank * (2 * config.hidden_size + config.num_slots)

    def initialise(self):
        """Cores start as standard normal, zero where a slot would act on itself."""
        self.initialise_factors()
        init.normal_(self.core_weight)
        # The view does not carry the mark of a loaded weight.
        if not getattr(self.core_weight, "_is_hf_initialized", False):
            init.zeros_(self.core_weight.diagonal(dim1=1, dim2=2))

    def masked_cores(self) -> torch.Tensor:
        return self.core_weight.where(off_diagonal(self.num_slots, self.core_weight.device), 0)

    def prepared_cores(self) -> torch.Tensor:
        return self.masked_cores()

    def mix(self, messages: torch.Tensor, product: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        return product(messages.permute(2, 1, 0).contiguous()).permute(2, 1, 0).contiguous()

    def squared_strengths(self) -> torch.Tensor:
        source, target = self.grams()
        rows = []
        # One source slot at a time, as for per-pair connections.
        for gram, cores in zip(source, self.core_weight.unbind(1), strict=True):
            cores = cores.to(gram.dtype).T
            rows.append((cores[:, :, None] * gram * cores[:, None, :] * target).sum(dim=(1, 2)))
        return torch.stack(rows)


CONNECTION_TYPES = {
    "scalar": ConnectionTransformerScalarConnections,
    "per_pair": ConnectionTransformerPerPairConnections,
    "block": ConnectionTransformerBlockConnections,
    "diagonal": ConnectionTransformerDiagonalConnections,
}
