"""
The ticks of a Continuous Thought Machine as one differentiable function with a backward pass of its own.

It computes what the modules compute when they are called tick by tick, in less time and memory: nothing is recorded per
operation, the history of pre-activations lies in one buffer whose windows are never copied, and the gradients of all
weights of the synapse model and of attention come from one product over all ticks.
"""

from collections import deque
from collections.abc import Iterator, MutableSequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import get_device_states, set_device_states

aten = torch.ops.aten

# Ticks that are computed again together where memory is to be saved.
RECOMPUTED_TICKS = 5


class TickSettings(NamedTuple):
    """
    What the ticks need to know besides their tensors.

    Args:
        synapse_levels (`int`): Levels of the synapse U-Net; 0 for the synapse model of depth 1.
        neuron_layers (`int`): Layers of the neuron-level models.
        scaling (`float`): What queries are multiplied with.
        action_pairs, output_pairs (`torch.LongTensor` of shape `(2 * size,)`):
            Neurons that synchronise: the left ones of all pairs, then the right ones.
        dropouts (`dict[str, float]`): Dropout probabilities by name of the module; 0 where there is none.
        recomputes (`bool`): Whether the backward pass computes the ticks again, a few at a time, instead of keeping
            what it needs of all of them.
    """

    synapse_levels: int
    neuron_layers: int
    scaling: float
    action_pairs: torch.LongTensor
    output_pairs: torch.LongTensor
    dropouts: dict[str, float]
    recomputes: bool


class Weights:
    """
    Tensors by name, and gradients that start at zero when they are first asked for.

    Args:
        tensors (`dict[str, torch.Tensor]`): The tensors.
    """

    def __init__(self, tensors: dict[str, torch.Tensor]):
        self.tensors = tensors
        self.gradients: dict[str, torch.Tensor] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def gradient(self, name: str) -> torch.Tensor:
        if name not in self.gradients:
            self.gradients[name] = torch.zeros_like(self.tensors[name], memory_format=torch.contiguous_format)
        return self.gradients[name]


# Every part of a tick below has a `forward`, which puts what `backward` needs at the end of a tape, and a `backward`,
# which takes it from there and turns the gradient ("error") of the part's output into that of its input. Ticks run
# backward from the last to the first, and the parts of a tick likewise, so that each finds its own at the end.
# `collect` then adds the gradients of a part's weights for all ticks that ran backward since the last time.
Tape = MutableSequence[torch.Tensor]


def forgetful_tape() -> Tape:
    """For ticks that will not run backward."""
    return deque(maxlen=0)


class Linear:
    """`y = x Wᵀ + b`, for inputs of shape `(batch_size, in_features)`."""

    def __init__(self, weights: Weights, name: str):
        self.weights, self.name = weights, name
        self.rows: list[tuple[torch.Tensor, torch.Tensor]] = []

    def forward(self, inputs: torch.Tensor, tape: Tape) -> torch.Tensor:
        tape.append(inputs)
        return nn.functional.linear(inputs, self.weights[f"{self.name}.weight"], self.weights[f"{self.name}.bias"])

    def backward(self, error: torch.Tensor, tape: Tape) -> torch.Tensor:
        self.rows.append((tape.pop(), error))
        return error @ self.weights[f"{self.name}.weight"]

    def collect(self) -> None:
        inputs, errors = (torch.cat(rows) for rows in zip(*self.rows, strict=True))
        self.rows.clear()
        self.weights.gradient(f"{self.name}.weight").addmm_(errors.T, inputs)
        self.weights.gradient(f"{self.name}.bias").add_(errors.sum(dim=0))


class LayerNorm:
    """LayerNorm over the last dimension."""

    def __init__(self, weights: Weights, name: str):
        self.weights, self.name = weights, name
        self.rows: list[tuple[torch.Tensor, ...]] = []

    @property
    def affine(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.weights[f"{self.name}.weight"], self.weights[f"{self.name}.bias"]

    def forward(self, inputs: torch.Tensor, tape: Tape) -> torch.Tensor:
        output, mean, inverse_deviation = torch.native_layer_norm(inputs, inputs.shape[-1:], *self.affine, 1e-5)
        tape.extend((inputs, mean, inverse_deviation))
        return output

    def backward(self, error: torch.Tensor, tape: Tape) -> torch.Tensor:
        inverse_deviation, mean, inputs = tape.pop(), tape.pop(), tape.pop()
        self.rows.append((error, inputs, mean, inverse_deviation))
        return self._backward([True, False, False], *self.rows[-1])[0]

    def collect(self) -> None:
        rows = (torch.cat(parts) for parts in zip(*self.rows, strict=True))
        _, weight, bias = self._backward([False, True, True], *rows)
        self.rows.clear()
        self.weights.gradient(f"{self.name}.weight").add_(weight)
        self.weights.gradient(f"{self.name}.bias").add_(bias)

    def _backward(self, wanted, error, inputs, mean, inverse_deviation):
        return aten.native_layer_norm_backward(
            error, inputs, inputs.shape[-1:], mean, inverse_deviation, *self.affine, wanted
        )


class SiLU:
    """`x sigmoid(x)`."""

    def forward(self, inputs: torch.Tensor, tape: Tape) -> torch.Tensor:
        tape.append(inputs)
        return nn.functional.silu(inputs)

    def backward(self, error: torch.Tensor, tape: Tape) -> torch.Tensor:
        return aten.silu_backward(error, tape.pop())

    def collect(self) -> None:
        """There are no weights."""


class GLU:
    """One half of the inputs times the sigmoid of the other, over the last dimension."""

    def forward(self, inputs: torch.Tensor, tape: Tape) -> torch.Tensor:
        tape.append(inputs)
        return nn.functional.glu(inputs, dim=-1)

    def backward(self, error: torch.Tensor, tape: Tape) -> torch.Tensor:
        return aten.glu_backward(error, tape.pop(), -1)

    def collect(self) -> None:
        """There are no weights."""


class Dropout:
    """Dropout, with the random numbers that `nn.functional.dropout` would draw here; nothing where there is none."""

    def __init__(self, dropouts: dict[str, float], name: str):
        self.probability = dropouts.get(f"{name}.dropout", 0.0)

    def forward(self, inputs: torch.Tensor, tape: Tape) -> torch.Tensor:
        if self.probability == 0:
            return inputs
        mask = nn.functional.dropout(torch.ones_like(inputs), self.probability)
        tape.append(mask)
        return inputs * mask

    def backward(self, error: torch.Tensor, tape: Tape) -> torch.Tensor:
        return error if self.probability == 0 else error * tape.pop()

    def collect(self) -> None:
        """There are no weights."""


class Chain:
    """Parts one after the other."""

    def __init__(self, *parts: Any):
        self.parts = parts

    def forward(self, inputs: torch.Tensor, tape: Tape) -> torch.Tensor:
        for part in self.parts:
            inputs = part.forward(inputs, tape)
        return inputs

    def backward(self, error: torch.Tensor, tape: Tape) -> torch.Tensor:
        for part in reversed(self.parts):
            error = part.backward(error, tape)
        return error

    def collect(self) -> None:
        for part in self.parts:
            part.collect()


class UNet:
    """The synapse model: down through narrower and narrower layers, and up again with LayerNorms over sums."""

    def __init__(self, weights: Weights, settings: TickSettings):
        def block(name: str) -> Chain:
            name = f"synapse.{name}"
            return Chain(
                Dropout(settings.dropouts, name),
                Linear(weights, f"{name}.linear"),
                LayerNorm(weights, f"{name}.norm"),
                SiLU(),
            )

        levels = range(settings.synapse_levels)
        self.first = block("first_projection")
        self.down = [block(f"down_projections.{level}") for level in levels]
        self.up = [block(f"up_projections.{level}") for level in levels]
        self.skips = [LayerNorm(weights, f"synapse.skip_norms.{level}") for level in levels]

    def forward(self, states: torch.Tensor, tape: Tape) -> torch.Tensor:
        descent = [self.first.forward(states, tape)]
        for part in self.down:
            descent.append(part.forward(descent[-1], tape))
        states = descent.pop()
        for part, skip in zip(reversed(self.up), reversed(self.skips), strict=True):
            states = skip.forward(part.forward(states, tape) + descent.pop(), tape)
        return states

    def backward(self, error: torch.Tensor, tape: Tape) -> torch.Tensor:
        descent_errors = []
        for part, skip in zip(self.up, self.skips, strict=True):
            error = skip.backward(error, tape)
            descent_errors.append(error)
            error = part.backward(error, tape)
        for part in reversed(self.down):
            error = part.backward(error, tape) + descent_errors.pop()
        return self.first.backward(error, tape)

    def collect(self) -> None:
        parts: list[Chain | LayerNorm] = [self.first, *self.down, *self.up, *self.skips]
        for part in parts:
            part.collect()


class Attention:
    """What one query per sample finds: `queries` of shape `(batch_size, d_input)`, and so is what is returned."""

    def __init__(self, weights: Weights, settings: TickSettings):
        self.weights, self.scaling = weights, settings.scaling
        self.dropout = Dropout(settings.dropouts, "attention")
        # Of shape (batch_size * heads, length, head_dim).
        self.key, self.value = weights["key"].flatten(0, 1), weights["value"].flatten(0, 1)
        self.rows: list[tuple[torch.Tensor, ...]] = []

    def forward(self, queries: torch.Tensor, tape: Tape) -> torch.Tensor:
        query = (queries * self.scaling).view(len(self.key), 1, -1)
        attention = torch.bmm(query, self.key.transpose(1, 2)).softmax(dim=-1)
        tape.extend((query, attention))
        dropped = self.dropout.forward(attention, tape)
        tape.append(dropped)
        return torch.bmm(dropped, self.value).view(queries.shape)

    def backward(self, error: torch.Tensor, tape: Tape) -> torch.Tensor:
        dropped, value_error = tape.pop(), error.reshape(len(self.key), 1, -1)
        attention_error = self.dropout.backward(torch.bmm(value_error, self.value.transpose(1, 2)), tape)
        attention, query = tape.pop(), tape.pop()
        score_error = aten._softmax_backward_data(attention_error, attention, -1, attention.dtype)
        self.rows.append((query, score_error, dropped, value_error))
        return torch.bmm(score_error, self.key).view(error.shape) * self.scaling

    def collect(self) -> None:
        query, score_error, dropped, value_error = (torch.cat(rows, dim=1) for rows in zip(*self.rows, strict=True))
        self.rows.clear()
        self.weights.gradient("key").flatten(0, 1).baddbmm_(score_error.transpose(1, 2), query)
        self.weights.gradient("value").flatten(0, 1).baddbmm_(dropped.transpose(1, 2), value_error)


class Synchronisation:
    """Synchronisation of selected pairs of neurons: `α ← r α + z_left z_right`, times a scale per tick."""

    def __init__(self, weights: Weights, name: str, pairs: torch.LongTensor):
        self.weights, self.name, self.pairs = weights, name, pairs
        self.factor, self.scales = weights[f"{name}.factor"], weights[f"{name}.scales"]
        self.rows: list[tuple[torch.Tensor, torch.Tensor]] = []

    def forward(
        self, state: torch.Tensor, accumulated: torch.Tensor, tick: int, tape: Tape
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Synchronisation and α of shape `(batch_size, size)`, for states of shape `(batch_size, d_model)`."""
        selected = state.index_select(-1, self.pairs)
        left, right = selected.chunk(2, dim=-1)
        total = torch.addcmul(left * right, accumulated, self.factor)
        tape.extend((selected, accumulated, total))
        return total * self.scales[tick], total

    def backward(
        self, error: torch.Tensor | None, total_error: torch.Tensor, tick: int, tape: Tape
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """From the gradients of the synchronisation and of α those of the state and of the α before."""
        total, accumulated, selected = tape.pop(), tape.pop(), tape.pop()
        if error is not None:
            self.weights.gradient(f"{self.name}.scales")[tick] = (error * total).sum(dim=0)
            total_error = torch.addcmul(total_error, error, self.scales[tick])
        self.rows.append((total_error, accumulated))
        left, right = selected.chunk(2, dim=-1)
        selected_error = torch.cat((total_error * right, total_error * left), dim=-1)
        state_error = torch.zeros_like(self.weights["state"], memory_format=torch.contiguous_format)
        return state_error.index_add_(1, self.pairs, selected_error), total_error * self.factor

    def collect(self) -> None:
        total_error, accumulated = (torch.cat(rows) for rows in zip(*self.rows, strict=True))
        self.rows.clear()
        self.weights.gradient(f"{self.name}.factor").add_((total_error * accumulated).sum(dim=0))


class NeuronLayer:
    """
    One gated layer of the neuron-level models, for inputs of shape `(num_neurons, in_features, batch_size)`.

    Its weights come laid out as the modules lay them out for the batch: `(num_neurons, in_features, 2 * out_features)`
    with biases `(num_neurons, 1, 2 * out_features)`, or both with the last two dimensions exchanged.
    """

    def __init__(self, weights: Weights, name: str, dropouts: dict[str, float]):
        self.weights, self.name = weights, name
        self.weight, self.bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
        self.features_last = self.bias.shape[1] == 1
        self.dropout = Dropout(dropouts, name)

    def forward(self, inputs: torch.Tensor, tape: Tape) -> torch.Tensor:
        inputs = self.dropout.forward(inputs, tape)
        if self.features_last:
            gated = torch.baddbmm(self.bias, inputs.transpose(1, 2), self.weight)
            output = nn.functional.glu(gated, dim=2).transpose(1, 2)
        else:
            gated = torch.baddbmm(self.bias, self.weight, inputs)
            output = nn.functional.glu(gated, dim=1)
        tape.extend((inputs, gated))
        return output

    def backward(self, error: torch.Tensor, tape: Tape) -> torch.Tensor:
        gated, inputs = tape.pop(), tape.pop()
        weight_gradient = self.weights.gradient(f"{self.name}.weight")
        bias_gradient = self.weights.gradient(f"{self.name}.bias")
        # Every product is written such that its result is contiguous in the layout that the next step reads.
        if self.features_last:
            gated_error = aten.glu_backward(error.transpose(1, 2), gated, 2)
            weight_gradient.baddbmm_(inputs, gated_error)
            bias_gradient.add_(gated_error.sum(dim=1, keepdim=True))
            input_error = torch.bmm(self.weight, gated_error.transpose(1, 2))
        else:
            gated_error = aten.glu_backward(error, gated, 1)
            weight_gradient.baddbmm_(gated_error, inputs.transpose(1, 2))
            bias_gradient.add_(gated_error.sum(dim=2, keepdim=True))
            if inputs.stride(1) == 1:
                input_error = torch.bmm(gated_error.transpose(1, 2), self.weight).transpose(1, 2)
            else:
                input_error = torch.bmm(self.weight.transpose(1, 2), gated_error)
        return self.dropout.backward(input_error, tape)

    def collect(self) -> None:
        """The gradients are added in every tick already: they are too large to be put off."""


class Carry(NamedTuple):
    """
    What one tick leaves to the next, or the gradients of it.

    Args:
        state (`torch.FloatTensor` of shape `(batch_size, d_model)`): Post-activations.
        trace (`torch.FloatTensor` of shape `(d_model, memory_length, batch_size)`): Pre-activations, the newest last.
        accumulated (`torch.FloatTensor` of shape `(batch_size, synch_size_action)`): α of the action.
        output_accumulated (`torch.FloatTensor` of shape `(batch_size, synch_size_out)`): α of the output.
    """

    state: torch.Tensor
    trace: torch.Tensor
    accumulated: torch.Tensor
    output_accumulated: torch.Tensor


class TickLoop:
    """
    All parts of a tick, run forward and backward over several ticks.

    Args:
        tensors (`dict[str, torch.Tensor]`): As in [`run_ticks`].
        settings ([`TickSettings`]): Settings.
    """

    def __init__(self, tensors: dict[str, torch.Tensor], settings: TickSettings):
        weights = self.weights = Weights(tensors)
        self.start = Carry(*(tensors[name] for name in Carry._fields))
        self.ticks = range(len(tensors["action.scales"]))
        self.action = Synchronisation(weights, "action", settings.action_pairs)
        self.look = Chain(
            Linear(weights, "query_projection"),
            Linear(weights, "attention.q_proj"),
            Attention(weights, settings),
            Linear(weights, "attention.out_proj"),
        )
        self.synapse: UNet | Chain
        if settings.synapse_levels:
            self.synapse = UNet(weights, settings)
        else:
            self.synapse = Chain(
                Dropout(settings.dropouts, "synapse"),
                Linear(weights, "synapse.linear"),
                GLU(),
                LayerNorm(weights, "synapse.norm"),
            )
        names = (f"neuron_models.layers.{number}" for number in range(settings.neuron_layers))
        self.neurons = Chain(*(NeuronLayer(weights, name, settings.dropouts) for name in names))
        self.output = Synchronisation(weights, "output", settings.output_pairs)

    def forward(self, carry: Carry, ticks: range, tape: Tape) -> tuple[list[torch.Tensor], Carry]:
        """Runs `ticks`: the output synchronisation after each, and what they leave."""
        state, trace, accumulated, output_accumulated = carry
        memory = trace.shape[1]
        in_place = not torch.is_grad_enabled()
        if in_place:
            columns = torch.cat((trace, trace.new_empty(len(trace), len(ticks), trace.shape[2])), dim=1)
        outputs = []
        for number, tick in enumerate(ticks):
            synchronisation, accumulated = self.action.forward(state, accumulated, tick, tape)
            attended = self.look.forward(synchronisation, tape)
            pre_activation = self.synapse.forward(torch.cat((attended, state), dim=-1), tape)
            if in_place:
                columns[:, memory + number] = pre_activation.T
                trace = columns[:, number + 1 : number + 1 + memory]
            else:
                trace = torch.cat((trace[:, 1:], pre_activation.T.unsqueeze(1)), dim=1)
            state = self.neurons.forward(trace, tape).squeeze(1).T.contiguous()
            synchronisation, output_accumulated = self.output.forward(state, output_accumulated, tick, tape)
            outputs.append(synchronisation)
        return outputs, Carry(state, trace, accumulated, output_accumulated)

    def backward(self, output_errors: torch.Tensor | None, errors: Carry, ticks: range, tape: Tape) -> Carry:
        """
        Runs `ticks` backward and adds the gradients of all weights.

        Args:
            output_errors (`torch.FloatTensor` of shape `(num_ticks, batch_size, synch_size_out)`, *optional*):
                Gradients of the output synchronisation of all ticks.
            errors ([`Carry`]): Gradients of what these ticks leave.

        Returns:
            [`Carry`]: Gradients of what these ticks are given.
        """
        state_error, trace_error, accumulated_error, output_accumulated_error = errors
        memory, d_input = trace_error.shape[1], len(self.weights["attention.out_proj.bias"])
        before = trace_error.new_zeros(len(trace_error), len(ticks), trace_error.shape[2])
        columns = torch.cat((before, trace_error), dim=1)
        for number, tick in reversed(list(enumerate(ticks))):
            read_error, output_accumulated_error = self.output.backward(
                None if output_errors is None else output_errors[tick], output_accumulated_error, tick, tape
            )
            trace_error = self.neurons.backward((state_error + read_error).T.unsqueeze(1), tape)
            columns[:, number + 1 : number + 1 + memory] += trace_error
            # No earlier tick has seen this pre-activation: its gradient is complete.
            input_error = self.synapse.backward(columns[:, memory + number].T.contiguous(), tape)
            attended_error, state_error = input_error.tensor_split((d_input,), dim=-1)
            read_error, accumulated_error = self.action.backward(
                self.look.backward(attended_error, tape), accumulated_error, tick, tape
            )
            state_error = state_error + read_error
        for part in (self.action, self.look, self.synapse, self.neurons, self.output):
            part.collect()
        return Carry(state_error, columns[:, :memory], accumulated_error, output_accumulated_error)


class RandomState:
    """The state of the random generators that serve a tensor's device, to draw the same numbers again."""

    def __init__(self, tensor: torch.Tensor):
        self.device_type = tensor.device.type
        self.cpu_state = torch.get_rng_state()
        self.devices, self.device_states = get_device_states(tensor)

    @contextmanager
    def restored(self) -> Iterator[None]:
        # Without devices the type means nothing, but it must be that of an accelerator.
        device_type = "cuda" if self.device_type == "cpu" else self.device_type
        with torch.random.fork_rng(self.devices, device_type=device_type):
            torch.set_rng_state(self.cpu_state)
            set_device_states(self.devices, self.device_states, device_type=device_type)
            yield


class Chunk(NamedTuple):
    """Ticks that run backward together, and what they were given."""

    ticks: range
    carry: Carry
    random_state: RandomState


class TickLoopFunction(torch.autograd.Function):
    """The ticks as one node of the graph; see [`run_ticks`]."""

    @staticmethod
    def forward(ctx, settings, names, *tensors):
        loop = TickLoop(dict(zip(names, tensors, strict=True)), settings)
        interval = RECOMPUTED_TICKS if settings.recomputes else len(loop.ticks)
        tape: Tape = forgetful_tape() if settings.recomputes else []
        carry, chunks, outputs = loop.start, [], []
        for start in range(0, len(loop.ticks), interval):
            ticks = loop.ticks[start : start + interval]
            chunks.append(Chunk(ticks, carry, RandomState(carry.state)))
            new_outputs, carry = loop.forward(carry, ticks, tape)
            # The trace is a view of these ticks' buffer, which is not to be kept, and a node must not hold its own
            # outputs.
            carry = Carry(*(tensor.clone() for tensor in carry))
            outputs.extend(new_outputs)
        ctx.settings, ctx.names, ctx.chunks = settings, names, chunks
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *tape)
        return torch.stack(outputs), *carry

    @staticmethod
    def backward(ctx, output_errors, *errors):
        number = len(ctx.names)
        tensors = dict(zip(ctx.names, ctx.saved_tensors[:number], strict=True))
        if torch.is_grad_enabled():
            random_state = ctx.chunks[0].random_state
            gradients = differentiable_gradients(tensors, ctx.settings, (output_errors, *errors), random_state)
            return None, None, *(gradients.get(name) for name in ctx.names)
        loop, tape = TickLoop(tensors, ctx.settings), list(ctx.saved_tensors[number:])
        carry_errors = Carry(
            *(
                torch.zeros_like(given) if error is None else error
                for given, error in zip(loop.start, errors, strict=True)
            )
        )
        for ticks, carry, random_state in reversed(ctx.chunks):
            if ctx.settings.recomputes:
                with random_state.restored():
                    loop.forward(carry, ticks, tape)
            carry_errors = loop.backward(output_errors, carry_errors, ticks, tape)
        loop.weights.gradients |= carry_errors._asdict()
        return None, None, *(loop.weights.gradients.get(name) for name in ctx.names)


def differentiable_gradients(
    tensors: dict[str, torch.Tensor],
    settings: TickSettings,
    errors: tuple[torch.Tensor | None, ...],
    random_state: RandomState,
) -> dict[str, torch.Tensor | None]:
    """Gradients by name that have gradients themselves: the library differentiates the same ticks."""
    # Some tensors depend on others. As views of their own they do not, and each gets its own part only.
    tensors = {name: tensor.view_as(tensor) for name, tensor in tensors.items()}
    loop = TickLoop(tensors, settings)
    with random_state.restored():
        outputs, carry = loop.forward(loop.start, loop.ticks, forgetful_tape())
    pairs = zip((torch.stack(outputs), *carry), errors, strict=True)
    results, errors = zip(*((result, error) for result, error in pairs if error is not None), strict=True)
    wanted = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
    gradients = torch.autograd.grad(results, list(wanted.values()), errors, create_graph=True, allow_unused=True)
    return dict(zip(wanted, gradients, strict=True))


def run_ticks(tensors: dict[str, torch.Tensor], settings: TickSettings) -> tuple[torch.Tensor, Carry]:
    """
    Several ticks. Gradients flow to all tensors, and have gradients themselves.

    Args:
        tensors (`dict[str, torch.FloatTensor]`), by name:
            The fields of [`Carry`]; `key` and `value` of shape `(batch_size, heads, length, head_dim)`;
            `action.factor` and `output.factor` of shape `(size,)`, and `action.scales` and `output.scales` of shape
            `(num_ticks, size)`, of the two synchronisations; the parameters of the modules `query_projection`,
            `attention.q_proj`, `attention.out_proj` and `synapse` under their own names; and of the neuron-level
            models `neuron_models.layers.{number}.weight` and `.bias`, laid out for the batch.
        settings ([`TickSettings`]): Settings.

    Returns:
        Output synchronisation after each tick, of shape `(num_ticks, batch_size, synch_size_out)`, and what is left to
        further ticks.
    """
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors.values()):
        outputs, *carry = TickLoopFunction.apply(settings, tuple(tensors), *tensors.values())
        return outputs, Carry(*carry)
    loop = TickLoop(tensors, settings)
    with torch.no_grad():
        outputs, carry = loop.forward(loop.start, loop.ticks, forgetful_tape())
    return torch.stack(outputs), carry
