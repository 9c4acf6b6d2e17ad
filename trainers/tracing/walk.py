"""From a forward pass to the lines of a trace: what happened, in the order in which it happened.

While a pass runs, hooks note what goes into and comes out of the modules that matter, and every call of an attention
kernel. Afterwards the notes are read in order and put into words; what is not a module's input or output, such as a
residual sum, is shown only where it is found to be the sum of two values that were seen.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_models.vanilla_transformer.modeling_vanilla_transformer import sinusoidal_positions

from ..tracking.capture import AttentionCall, attention_tap
from .attention import Recomputation, agrees, recompute, relative_difference
from .records import Record

QUERY = {"q_proj", "query", "q", "q_lin", "q_attn", "wq", "to_q", "query_proj", "Wq"}
KEY = {"k_proj", "key", "k", "k_lin", "wk", "to_k", "key_proj", "Wk"}
VALUE = {"v_proj", "value", "v", "v_lin", "wv", "to_v", "value_proj", "Wv"}
ATTENTION = re.compile(r"Attention|Attn")
CROSS_ATTENTION = re.compile(r"cross|encoder_attn|encdec|enc_dec", re.IGNORECASE)
FEED_FORWARD = re.compile(r"MLP|Mlp|FeedForward|FF|Ffn|FFN|MoE|Moe|Expert|Intermediate|Output|DenseAct")
POSITIONS = re.compile(r"pos|wpe|rotary|relative", re.IGNORECASE)
ACTIVATION_MODULES = ("transformers.activations", "torch.nn.modules.activation")


@dataclass(frozen=True)
class Event:
    """Something that happened in a forward pass.

    Attributes:
        kind: `"enter"` and `"exit"` of a module that holds others, `"leaf"` for one that is seen as a whole,
            `"attention"` for a call of a kernel.
        name, module: the module's.
        role: what kind of module it is; see `roles`.
        inputs: tensors and numbers that went in, in order, keyword arguments last.
        outputs: tensors that came out.
        call: the kernel's call.
    """

    kind: str
    name: str
    # Any of a model's modules, whose own attributes are read by its role.
    module: Any
    role: str
    inputs: tuple[Any, ...] = ()
    outputs: tuple[torch.Tensor, ...] = ()
    call: AttentionCall | None = None


def roles(model: PreTrainedModel) -> dict[str, str]:
    """What each module is for, by its type and its place: name to role. Modules without a role are not looked at.

    Roles: `stack` (encoder or decoder), `block` (a layer), `attention`, `feed_forward`, and the parts that think in
    steps (`compression`, `step`, `connections`, `expansion`, `tick`, `neurons`, `synapse`, `synchronisation`,
    `readout`, `backbone`); and of modules that are seen as a whole `embedding`, `positions`, `norm`, `linear` and
    `activation`.
    """
    found: dict[str, str] = {}
    modules = dict(model.named_modules())
    closed: list[str] = []
    for name, module in modules.items():
        if not name or any(name.startswith(f"{prefix}.") for prefix in closed):
            continue
        parent = modules[name.rpartition(".")[0]]
        role = role_of(name, module, parent)
        if role is None:
            continue
        found[name] = role
        if role in ("neurons", "synapse", "backbone", "connections", "positions"):
            closed.append(name)
    return found


def role_of(name: str, module: nn.Module, parent: nn.Module) -> str | None:
    """The role of one module, or `None`."""
    kind, leaf = type(module).__name__, name.rpartition(".")[2]
    for known, role in (
        ("ConnectionTransformerCompression", "compression"),
        ("ConnectionTransformerReasoningStep", "step"),
        ("ConnectionTransformerExpansion", "expansion"),
        ("ContinuousThoughtMachineTick", "tick"),
        ("ContinuousThoughtMachineNeuronModels", "neurons"),
        ("ContinuousThoughtMachineSynapse", "synapse"),
        ("ContinuousThoughtMachineShallowSynapse", "synapse"),
        ("ContinuousThoughtMachineSynchronisation", "synchronisation"),
        ("ContinuousThoughtMachineReadout", "readout"),
    ):
        if kind == known:
            return role
    if kind.startswith("ConnectionTransformer") and kind.endswith("Connections"):
        return "connections"
    if kind.startswith("ContinuousThoughtMachine") and kind.endswith(("Backbone", "Embedding", "Embedding1D")):
        return "backbone" if kind.endswith("Backbone") else "positions"
    is_leaf = next(module.children(), None) is None
    if isinstance(module, nn.Embedding) or (is_leaf and kind.endswith("Embedding") and not kind.startswith("Rotary")):
        place = ".".join(name.split(".")[-2:])
        return "positions" if POSITIONS.search(place) or POSITIONS.search(kind) else "embedding"
    if "PositionalEncoding" in kind or kind.endswith(("Positions", "RotaryEmbedding")):
        return "positions"
    if is_leaf and ("Norm" in kind):
        return "norm"
    if isinstance(module, nn.Linear | Conv1D) or (is_leaf and "Linear" in kind):
        return "linear"
    if is_leaf and (type(module).__module__ in ACTIVATION_MODULES or leaf in ("act", "act_fn", "activation")):
        return "activation"
    if leaf in ("encoder", "decoder") and not is_leaf:
        return "stack"
    if leaf.isdigit() and isinstance(parent, nn.ModuleList) and not is_leaf:
        return "block"
    if ATTENTION.search(kind) and not is_leaf:
        return "attention"
    if FEED_FORWARD.search(kind) and not is_leaf:
        return "feed_forward"
    return None


@contextmanager
def recorded(model: PreTrainedModel) -> Iterator[list[Event]]:
    """While the context is open, everything of interest in the model's forward passes is noted, as copies."""
    events: list[Event] = []
    found = roles(model)
    containers = {
        "stack",
        "block",
        "attention",
        "feed_forward",
        "compression",
        "step",
        "expansion",
        "tick",
        "readout",
    }

    def on_call(call: AttentionCall) -> None:
        events.append(Event("attention", call.name, call.module, "attention", call=call))

    def enter(name: str, role: str) -> Callable:
        def hook(module, args, kwargs):
            events.append(Event("enter", name, module, role, copies((*args, *kwargs.values()))))

        return hook

    def leave(name: str, role: str) -> Callable:
        def hook(module, args, kwargs, output):
            inputs, outputs = copies((*args, *kwargs.values())), copies(output)
            kind = "exit" if role in containers else "leaf"
            tensors = tuple(value for value in outputs if isinstance(value, torch.Tensor))
            events.append(Event(kind, name, module, role, inputs, tensors))

        return hook

    with ExitStack() as stack:
        for name, role in found.items():
            module = model.get_submodule(name)
            if role in containers:
                stack.callback(module.register_forward_pre_hook(enter(name, role), with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(leave(name, role), with_kwargs=True).remove)
        stack.enter_context(attention_tap(dict(model.named_modules()), on_call))
        yield events


def copies(values: Any) -> tuple[Any, ...]:
    """Tensors of an argument list or a result as copies, and the whole numbers among them."""
    if isinstance(values, torch.Tensor):
        return (values.detach().clone(),)
    if isinstance(values, dict):
        values = values.values()
    if not isinstance(values, tuple | list) and not hasattr(values, "__iter__"):
        return ()
    return tuple(
        value.detach().clone() if isinstance(value, torch.Tensor) else value
        for value in values
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and not isinstance(value, bool))
    )


def first_tensor(values: tuple[Any, ...]) -> torch.Tensor | None:
    """The first floating-point tensor, or `None`."""
    return next((value for value in values if isinstance(value, torch.Tensor) and value.is_floating_point()), None)


@dataclass
class AttentionState:
    """What is known of one attention module while its events are read."""

    projections: dict[str, torch.Tensor] = field(default_factory=dict)
    call: AttentionCall | None = None


@dataclass
class Walk:
    """The events of one forward pass, put into words.

    Attributes:
        records: the lines, in order of execution.
        checks: for each attention call its block, module, kernel and `Recomputation`.
    """

    records: list[Record] = field(default_factory=list)
    checks: list[tuple[str, str, str, Recomputation]] = field(default_factory=list)

    def __post_init__(self):
        self.stack, self.block = "", ""
        self.containers: list[tuple[str, str]] = []
        self.attentions: dict[str, AttentionState] = {}
        self.started: set[str] = set()
        # Candidates for the two sides of a residual sum, and the results of unfinished sublayers by module.
        self.stream: list[tuple[str, torch.Tensor]] = []
        self.pending: dict[str, tuple[str, torch.Tensor]] = {}
        self.normed: tuple[str, torch.Tensor] | None = None
        self.ticks = self.blocks_seen = 0

    def read(self, events: list[Event]) -> "Walk":
        """Put all events into words."""
        self.events = events
        for index, event in enumerate(events):
            self.index = index
            if event.kind == "attention":
                self.kernel(event)
            else:
                getattr(self, f"{event.kind}_{event.role}")(event)
        return self

    def finish(self, outputs: Any) -> None:
        """Add what the model as a whole returns."""
        logits, loss = getattr(outputs, "logits", None), getattr(outputs, "loss", None)
        if isinstance(logits, torch.Tensor):
            last = self.records[-1] if self.records else None
            if last is not None and last.stage == "output" and last.tensor is not None and same(last.tensor, logits):
                self.records.pop()
                self.add("output", f"logits, {last.what}", last.tensor, last.module)
            else:
                self.add("output", "logits", logits.detach(), "")
        if isinstance(loss, torch.Tensor):
            self.add("output", "loss", loss.detach(), "")

    def add(self, stage: str, what: str, tensor: torch.Tensor | None, name: str, note: str = "") -> None:
        self.records.append(Record(stage, self.stack, self.block, what, name, tensor, note))

    def inside(self, role: str) -> str:
        """Name of the outermost open module of a role, or an empty string."""
        return next((name for name, open_role in self.containers if open_role == role), "")

    def open(self, event: Event) -> None:
        self.containers.append((event.name, event.role))

    def close(self, event: Event) -> None:
        while self.containers and self.containers.pop() != (event.name, event.role):
            continue

    def sublayer_stage(self, name: str) -> str:
        return "cross_attention" if CROSS_ATTENTION.search(name) else "attention"

    def enter_stack(self, event: Event) -> None:
        self.open(event)
        self.stack = event.name.rpartition(".")[2]

    def exit_stack(self, event: Event) -> None:
        self.close(event)
        outer = [name for name, role in self.containers if role == "stack"]
        self.stack = outer[-1].rpartition(".")[2] if outer else ""

    def enter_block(self, event: Event) -> None:
        if self.block:
            self.open(event)
            return
        self.open(event)
        inputs = first_tensor(event.inputs)
        is_first = self.stack not in self.started
        self.started.add(self.stack)
        seen = [record.tensor for record in self.records if record.stage in ("embedding", "positions")]
        if is_first and inputs is not None and not any(tensor is not None and same(tensor, inputs) for tensor in seen):
            self.add("embedding", "embedded tokens: what the first layer reads", inputs, event.name)
        self.block = f"{self.stack or 'layer'}.{event.name.rpartition('.')[2]}"
        self.stream, self.pending, self.normed = [], {}, None
        self.blocks_seen += 1
        if inputs is not None:
            self.add("input", "inputs of the layer", inputs, event.name)
            self.stream = [("inputs", inputs)]

    def exit_block(self, event: Event) -> None:
        self.close(event)
        if self.inside("block"):
            return
        output = first_tensor(event.outputs)
        if output is not None:
            self.residual(output, event.name)
            self.add("layer", "output of the layer", output, event.name)
        self.block, self.stream, self.pending, self.attentions = "", [], {}, {}

    def enter_attention(self, event: Event) -> None:
        self.open(event)

    def exit_attention(self, event: Event) -> None:
        self.close(event)
        if self.inside("attention"):
            return
        state = self.attentions.setdefault(event.name, AttentionState())
        if state.call is None:
            note = "this module does not use the library's attention interface: what its kernel does is not seen"
            self.add(self.sublayer_stage(event.name), "scores and weights are not shown", None, event.name, note)

    def enter_feed_forward(self, event: Event) -> None:
        self.open(event)

    def exit_feed_forward(self, event: Event) -> None:
        self.close(event)
        output = first_tensor(event.outputs)
        if not self.block or output is None or self.inside("feed_forward") or self.inside("attention"):
            return
        last = self.records[-1].tensor
        if last is None or not same(last, output):
            self.add("feed_forward", "feed-forward output", output, event.name)
        self.pending["feed-forward"] = ("feed-forward output", output)

    def leaf_embedding(self, event: Event) -> None:
        for tensor in event.outputs:
            self.add("embedding", f"embedding ({event.name.rpartition('.')[2]})", tensor, event.name)

    def leaf_positions(self, event: Event) -> None:
        if type(event.module).__name__.endswith("TransformerPositionalEncoding"):
            self.scaled_positions(event)
            return
        if len(event.outputs) == 2:
            for what, tensor in zip(("cosines", "sines"), event.outputs, strict=True):
                self.add("positions", f"{what} of the rotary positions", tensor, event.name)
            return
        for tensor in event.outputs:
            self.add("positions", f"positions ({event.name.rpartition('.')[2]})", tensor, event.name)

    def scaled_positions(self, event: Event) -> None:
        """The Vanilla Transformer's `embedding * sqrt(d) + positions`, whose parts are shown if they add up."""
        embeddings, position_ids = event.inputs[:2]
        (output,) = event.outputs
        scaled = embeddings * event.module.scale
        if event.module.learned is None:
            positions, kind = sinusoidal_positions(position_ids, embeddings.shape[-1], embeddings.dtype), "sinusoidal"
        else:
            positions, kind = event.module.learned(position_ids).detach(), "learned"
        if agrees(scaled + positions, output):
            self.add("embedding", f"token embedding times {event.module.scale:.4g}", scaled, event.name)
            self.add("positions", f"positions ({kind})", positions, event.name)
        self.add("positions", "embedding and positions added", output, event.name)

    def leaf_norm(self, event: Event) -> None:
        before, after = first_tensor(event.inputs), first_tensor(event.outputs)
        name = event.name.rpartition(".")[2]
        name = ".".join(event.name.split(".")[-2:]) if name.isdigit() else name
        in_attention = bool(self.inside("attention")) and not self.is_sublayer_end(event)
        if self.block and not in_attention and before is not None:
            self.residual(before, event.name)
        label = "final norm" if not self.block and self.blocks_seen else name
        if before is not None:
            self.add("norm", f"before {label}", before, event.name)
        if after is not None:
            self.add("norm", f"after {label}", after, event.name)
            if self.block and not in_attention:
                if before is not None and not any(same(state, before) for _, state in self.stream):
                    self.stream.append((f"input of {name}", before))
                self.stream.append((f"output of {name}", after))
                self.normed = (f"output of {name}", after)

    def is_sublayer_end(self, event: Event) -> bool:
        """Whether a norm inside an attention module stands behind the kernel, as in post-norm blocks of the library."""
        state = self.attentions.get(self.inside("attention"))
        return state is not None and state.call is not None

    def residual(self, total: torch.Tensor, name: str) -> None:
        """Show `total` as a residual sum if it is one of the stream's states plus the results of sublayers."""
        if any(same(total, state) for _, state in self.stream):
            return
        parts = list(self.pending.values())
        combinations = [[part] for part in reversed(parts)] + ([parts] if len(parts) > 1 else [])
        # Some blocks norm a sublayer's result before they add it.
        combinations += [[self.normed]] if self.normed is not None else []
        rounding = 4 * torch.finfo(total.dtype).eps
        for label, state in reversed(self.stream):
            for chosen in combinations:
                addends = [tensor for _, tensor in chosen]
                # Some blocks flatten the batch on the way.
                if any(tensor.numel() != total.numel() for tensor in (state, *addends)):
                    continue
                addends = [tensor.reshape(total.shape) for tensor in (state, *addends)]
                if relative_difference(sum(addends[1:], addends[0]), total) <= rounding:
                    what = " + ".join([label, *(text for text, _ in chosen)])
                    self.add("residual", f"residual sum: {what}", total, name)
                    self.stream.append(("sum above", total))
                    self.pending, self.normed = {}, None
                    return

    def leaf_activation(self, event: Event) -> None:
        before, after = first_tensor(event.inputs), first_tensor(event.outputs)
        if not self.block or before is None or after is None:
            return
        last = self.records[-1]
        if last.tensor is not None and same(last.tensor, before):
            self.records[-1] = Record(
                "feed_forward", last.stack, last.block, f"{last.what}: before the activation", last.module, last.tensor
            )
        else:
            self.add("feed_forward", "before the activation", before, event.name)
        self.add("feed_forward", "after the activation", after, event.name)

    def leaf_linear(self, event: Event) -> None:
        inputs, output = first_tensor(event.inputs), first_tensor(event.outputs)
        if inputs is None or output is None:
            return
        name = event.name.rpartition(".")[2]
        part = next((part for part, known in (("q", QUERY), ("k", KEY), ("v", VALUE)) if name in known), None)
        owner = next((open_name for open_name, role in self.containers if role in ("compression", "expansion")), "")
        if owner:
            stage = "compression" if self.inside("compression") else "expansion"
            self.attentions.setdefault(owner, AttentionState()).projections[part or name] = output
            self.add(stage, f"{part or name} after {name}", output, event.name)
            return
        attention = self.attention_of(event.name)
        if attention:
            self.attention_linear(event, attention, part, inputs, output)
        elif self.block.startswith("tick"):
            is_query = name == "query_projection"
            what = "query made from the synchronisation" if is_query else f"context of the dynamic weights ({name})"
            self.add("synchronisation" if is_query else "synapse", what, output, event.name)
        elif self.inside("readout"):
            return
        elif self.block:
            parent = event.name.rpartition(".")[0].rpartition(".")[2]
            is_known = self.inside("feed_forward") or parent.isdigit()
            stage, label = ("feed_forward", "feed-forward output") if is_known else ("layer", f"output of {parent}")
            known = [record.tensor for record in self.records if record.block == self.block]
            if not any(tensor is not None and same(tensor.reshape(-1), inputs.reshape(-1)) for tensor in known):
                number = len(self.records)
                self.residual(inputs, event.name)
                if len(self.records) == number:
                    self.add(stage, f"inputs of {name}", inputs, event.name)
            self.add(stage, f"after {name}", output, event.name)
            self.pending["feed-forward"] = (label, output)
        elif self.blocks_seen == 0 and not self.ticks:
            self.add("embedding", f"inputs read in ({name})", output, event.name)
        else:
            self.add("output", f"after {name}", output, event.name)

    def attention_of(self, name: str) -> str:
        """The outermost open attention module, or the one that owns a projection that is called from outside of it."""
        found = self.inside("attention")
        if found:
            return found
        later = (event for event in self.events[self.index :] if event.kind == "attention")
        owner = next((event.name for event in later if name.startswith(f"{event.name}.")), "")
        return owner if not self.block else ""

    def next_call(self, attention: str) -> AttentionCall | None:
        """The next kernel call of an attention module."""
        for event in self.events[self.index :]:
            if event.kind == "attention" and (event.name == attention or event.name.startswith(f"{attention}.")):
                return event.call
            if event.kind == "exit" and event.name == attention:
                return None
        return None

    def attention_linear(self, event: Event, attention: str, part: str | None, inputs, output) -> None:
        """A linear map of an attention module: the projections before the kernel, and those after it."""
        state = self.attentions.setdefault(attention, AttentionState())
        stage, name = self.sublayer_stage(attention), event.name.rpartition(".")[2]
        if part is not None:
            state.projections[part] = output
            self.add(stage, f"{part} after {name}", output, event.name)
        elif state.call is None:
            self.fused_projection(event, attention, state, output)
        else:
            merged = state.call.output
            if merged.numel() == inputs.numel() and same(merged.reshape(inputs.shape), inputs):
                self.add(stage, "heads merged", inputs, event.name)
            else:
                self.add(stage, f"inputs of {name}", inputs, event.name)
            self.add(stage, f"attention output, after {name}", output, event.name)
            if self.block:
                label = "cross-attention output" if stage == "cross_attention" else "attention output"
                self.pending[attention] = (label, output)

    def fused_projection(self, event: Event, attention: str, state: AttentionState, output: torch.Tensor) -> None:
        """One map that gives queries, keys and values: taken apart where the kernel's inputs are its thirds."""
        stage, name = self.sublayer_stage(attention), event.name.rpartition(".")[2]
        call = self.next_call(attention)
        if call is not None and output.shape[-1] % 3 == 0:
            thirds = output.chunk(3, dim=-1)
            seen = (call.query, call.key, call.value)
            if all(
                third.numel() == heads.numel() and same(third.reshape(merged(heads).shape), merged(heads))
                for third, heads in zip(thirds, seen, strict=True)
            ):
                for part, third in zip("qkv", thirds, strict=True):
                    state.projections[part] = third
                    self.add(stage, f"{part} after {name}", third, event.name)
                return
        self.add(stage, f"after {name}", output, event.name)

    def kernel(self, event: Event) -> None:
        """One call of an attention kernel: heads, scores, mask, weights and what they give."""
        call = event.call
        assert call is not None
        attention = self.inside("attention") or event.name
        state = self.attentions.setdefault(attention, AttentionState())
        state.call = call
        stage = self.sublayer_stage(attention)
        for part, heads in zip("qkv", (call.query, call.key, call.value), strict=True):
            projection = state.projections.get(part)
            split = None
            if projection is not None and projection.numel() == heads.numel():
                split = projection.reshape(merged(heads).shape).unflatten(-1, (heads.shape[1], -1)).transpose(1, 2)
                self.add(stage, f"{part} reshaped per head", split, event.name)
            if split is None:
                self.add(stage, f"{part} per head", heads, event.name)
            elif not same(split, heads):
                self.add(stage, f"{part} per head as the kernel gets it", heads, event.name)
        found = recompute(call)
        self.checks.append((self.block, event.name, call.kernel, found))
        if found.scores is not None:
            self.add(stage, "scores: q · k, scaled", found.scores, event.name)
        if found.bias is not None:
            self.add(stage, "bias of the scores", found.bias, event.name)
        if found.visible is not None:
            self.add(stage, "mask: 1 visible, 0 hidden", found.visible, event.name)
        if found.weights is not None:
            self.add(stage, "attention weights", found.weights, event.name, found.remark)
        else:
            self.add(stage, "scores and weights are not shown", None, event.name, found.remark)
        self.add(stage, "attention per head: weights · v", call.output.transpose(1, 2), event.name)

    def enter_compression(self, event: Event) -> None:
        self.open(event)
        self.add("compression", "embedded tokens: what the slots read", first_tensor(event.inputs), event.name)

    def exit_compression(self, event: Event) -> None:
        self.close(event)
        slots, weights = event.outputs
        projections = self.attentions.pop(event.name).projections
        scores = projections["q"] @ projections["k"].T * event.module.config.hidden_size**-0.5
        spread = scores.softmax(dim=-1)
        values = event.module.slots + weights.to(slots.dtype).transpose(1, 2) @ projections["v"]
        # The weights over tokens are those over slots, each slot's divided by its sum (without a mask, by option, not).
        normalised = spread / (spread.sum(dim=1, keepdim=True) + 1e-8)
        if agrees(values, slots) and (agrees(normalised, weights) or agrees(spread, weights)):
            self.add("compression", "scores: q · k, scaled (tokens by slots)", scores, event.name)
            self.add("compression", "weights of each token over the slots", spread, event.name)
        else:
            note = "scores written out do not give the module's weights"
            self.add("compression", "scores are not shown", None, event.name, note)
        self.add("compression", "weights of the tokens in each slot", weights, event.name)
        self.add("compression", "fixed slot vectors", event.module.slots, event.name)
        self.add("compression", "slot states before the first step", slots, event.name)

    def enter_expansion(self, event: Event) -> None:
        self.open(event)

    def exit_expansion(self, event: Event) -> None:
        self.close(event)
        projections = self.attentions.pop(event.name).projections
        scores = projections["q"] @ projections["k"].transpose(1, 2) * event.module.scaling
        weights = scores.softmax(dim=-1)
        (output,) = event.outputs
        if agrees(weights @ projections["v"], output):
            self.add("expansion", "scores: q · k, scaled (tokens by slots)", scores, event.name)
            self.add("expansion", "weights of the slots for each token", weights, event.name)
        else:
            note = "scores written out do not give the module's output"
            self.add("expansion", "scores are not shown", None, event.name, note)
        self.add("expansion", "slots read out at the tokens' positions", output, event.name)
        self.blocks_seen += 1

    def enter_step(self, event: Event) -> None:
        self.open(event)
        number = next(value for value in reversed(event.inputs) if isinstance(value, int))
        self.block = f"step.{number + 1}"
        self.stream, self.pending, self.normed = [], {}, None
        self.add("reasoning", "slot states before the step", first_tensor(event.inputs), event.name)

    def leaf_connections(self, event: Event) -> None:
        influence = first_tensor(event.outputs)
        assert influence is not None
        self.add("reasoning", "influence of all slots on each", influence, event.name)
        self.add("reasoning", "update: influence, rectified", influence.relu(), event.name)

    def exit_step(self, event: Event) -> None:
        self.close(event)
        self.add("reasoning", "slot states after the step", event.outputs[0], event.name)
        if len(event.outputs) > 2:
            config = event.module.config
            what = f"halting measure ({config.halting}), threshold {config.halting_threshold:g}"
            self.add("reasoning", what, event.outputs[2], event.name)
        self.block = ""
        self.blocks_seen += 1

    def enter_tick(self, event: Event) -> None:
        self.open(event)
        if self.ticks == 0:
            self.blocks_seen += 1
        self.ticks += 1
        self.block = f"tick.{self.ticks}"
        self.add("neurons", "post-activations before the tick", first_tensor(event.inputs), event.name)

    def exit_tick(self, event: Event) -> None:
        self.close(event)
        self.block = ""

    def leaf_synchronisation(self, event: Event) -> None:
        self.add("synchronisation", "synchronisation of pairs of neurons", event.outputs[0], event.name)

    def leaf_synapse(self, event: Event) -> None:
        self.add("synapse", "inputs: what attention found, and the neurons", first_tensor(event.inputs), event.name)
        self.add("synapse", "pre-activations", event.outputs[0], event.name)

    def leaf_neurons(self, event: Event) -> None:
        self.add("neurons", "memory: the newest pre-activations of each neuron", event.inputs[0], event.name)
        self.add("neurons", "post-activations after the tick", event.outputs[0], event.name)

    def enter_readout(self, event: Event) -> None:
        self.open(event)

    def exit_readout(self, event: Event) -> None:
        self.close(event)
        predictions, entropies, synchronisation, _ = event.outputs
        self.add("synchronisation", "synchronisation of the output, by tick", synchronisation, event.name)
        self.add("output", "predictions, by tick", predictions, event.name)
        self.add("output", "certainties, by tick", 1 - entropies, event.name)

    def leaf_backbone(self, event: Event) -> None:
        self.add("embedding", "features of the backbone", event.outputs[0], event.name)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors hold the same numbers, NaN counting as equal to itself."""
    return one.shape == other.shape and bool(
        torch.equal(one, other) or torch.equal(one.nan_to_num(nan=0.5), other.to(one.dtype).nan_to_num(nan=0.5))
    )


def merged(heads: torch.Tensor) -> torch.Tensor:
    """`(batch_size, num_heads, length, head_dim)` to `(batch_size, length, num_heads * head_dim)`."""
    return heads.transpose(1, 2).flatten(2)
