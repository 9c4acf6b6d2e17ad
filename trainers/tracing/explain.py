"""Why a model that thinks in steps gave its answer: what it read, what acted on what, and when it stopped."""

from typing import Any

import torch
from transformers import PreTrainedModel

from .inputs import ModelInputs
from .walk import Event, Walk

# Sources whose messages are computed together: bounds the memory to so many times one sample's slot states, squared.
SOURCES_AT_ONCE = 16


def explain(
    model: PreTrainedModel, inputs: ModelInputs, events: list[Event], walk: Walk, outputs: Any, top: int = 5
) -> dict[str, Any] | None:
    """The explanation of one answer, as JSON; `None` for a model that does not think in steps.

    Args:
        model, inputs, outputs: one forward pass, batch of one.
        events, walk: what was recorded of it.
        top: length of the lists.
    """
    if any(event.role == "step" for event in events):
        return explain_slots(model, inputs, events, walk, top)
    if any(event.role == "tick" for event in events):
        return explain_ticks(model, events, walk, outputs, top)
    return None


def explain_slots(
    model: PreTrainedModel, inputs: ModelInputs, events: list[Event], walk: Walk, top: int
) -> dict[str, Any]:
    """Which tokens filled which slots, which connections carried the most in each step, why reasoning stopped, and
    which slots the decoder read."""
    config = model.config
    compression = next(event for event in events if event.kind == "exit" and event.role == "compression")
    states, weights = compression.outputs
    filled = torch.linalg.vector_norm(states[0] - compression.module.slots, dim=-1)
    reading = slots_read(config, walk)
    chosen = filled.topk(min(top, len(filled))).indices.tolist()
    if reading is not None:
        most_read = reading.mean(dim=0).topk(min(top, len(filled))).indices.tolist()
        chosen += [slot for slot in most_read if slot not in chosen]
    slots = []
    for slot in chosen:
        shares = weights[0, :, slot]
        order = shares.topk(min(top, len(shares))).indices.tolist()
        tokens = [{"position": place, "token": token(inputs, place), "weight": shares[place].item()} for place in order]
        slots.append({"slot": slot, "filled": filled[slot].item(), "tokens": tokens})

    entries = [event for event in events if event.kind == "enter" and event.role == "step"]
    exits = [event for event in events if event.kind == "exit" and event.role == "step"]
    steps: list[dict[str, Any]] = []
    for number, (entry, leaving) in enumerate(zip(entries, exits, strict=True), start=1):
        carried = strongest_connections(entry.module.connections, entry.inputs[0], top)
        measure = leaving.outputs[2].item() if len(leaving.outputs) > 2 else None
        steps.append({"step": number, "measure": measure, "connections": carried})
    return {
        "kind": "slots",
        "slots": slots,
        "steps": steps,
        "halting": {
            "rule": config.halting,
            "threshold": config.halting_threshold,
            "bound": config.max_reasoning_steps,
            "steps": len(steps),
            "reason": halting_reason(config, [step["measure"] for step in steps]),
        },
        "read": [] if reading is None else read_by_token(reading, inputs, top),
    }


def token(inputs: ModelInputs, position: int) -> str:
    """The source token at a position."""
    return inputs.source[position] if position < len(inputs.source) else str(position)


@torch.no_grad()
def strongest_connections(connections: Any, states: torch.Tensor, top: int) -> list[dict[str, Any]]:
    """The connections that carried the most in one step.

    The influence on a slot is a sum of one message from each other slot, so that the messages of a slot are what the
    module returns when all other slots are zero. Of a message only the channels count in which the sum is positive,
    since the others are rectified away.

    Args:
        connections: any of the Connection Transformer's connection modules.
        states (`torch.FloatTensor` of shape `(1, num_slots, hidden_size)`): slot states before the step.
        top: length of the list.

    Returns:
        For each connection its `source`, its `target`, `carried` (the norm of what passes), and `share`: its signed
        part of the target's update, `⟨message, update⟩ / ‖update‖²`. The shares in one target sum to 1.
    """
    num_slots = states.shape[1]
    prepared = connections.prepare(1, None)[0]
    update = connections(states, prepared)[0].relu()
    passes, squares = update > 0, update.square().sum(dim=-1)
    carried, shares = [], []
    for sources in torch.arange(num_slots, device=states.device).split(SOURCES_AT_ONCE):
        alone = states.new_zeros(len(sources), *states.shape[1:])
        alone[torch.arange(len(sources)), sources] = states[0, sources]
        messages = connections(alone, prepared) * passes
        carried.append(torch.linalg.vector_norm(messages, dim=-1))
        shares.append((messages * update).sum(dim=-1) / squares.clamp_min(torch.finfo(squares.dtype).tiny))
    strength, share = torch.cat(carried), torch.cat(shares)
    order = strength.flatten().topk(min(top, num_slots * (num_slots - 1))).indices.tolist()
    return [
        {
            "source": index // num_slots,
            "target": index % num_slots,
            "carried": strength.flatten()[index].item(),
            "share": share.flatten()[index].item(),
        }
        for index in order
    ]


def halting_reason(config: Any, measures: list[float | None]) -> str:
    """When reasoning stopped and why, in a sentence."""
    number, last, threshold = len(measures), measures[-1], config.halting_threshold
    plural = "step" if number == 1 else "steps"
    if last is None:
        return f"took all {number} {plural}: halting is off"
    is_change = config.halting == "state_change"
    quantity = "the relative change of the slots" if is_change else "the largest update of a slot"
    if last <= threshold:
        return f"stopped after step {number}: {quantity} was {last:.4g}, at most the threshold {threshold:g}"
    return f"took all {number} {plural} that it may: {quantity} was still {last:.4g}, above the threshold {threshold:g}"


def slots_read(config: Any, walk: Walk) -> torch.Tensor | None:
    """How much the decoder's cross-attention looked at each slot for each target token, mean over layers and heads.

    Returns:
        `torch.FloatTensor` of shape `(target_length, num_slots)`, whose rows sum to 1; `None` without a decoder.
    """
    maps = [
        found.weights[0].mean(dim=0)
        for _, name, _, found in walk.checks
        if "cross" in name and found.weights is not None and found.weights.shape[-1] == config.num_slots
    ]
    return torch.stack(maps).mean(dim=0) if maps else None


def read_by_token(reading: torch.Tensor, inputs: ModelInputs, top: int) -> list[dict[str, Any]]:
    """For each target token the slots that were read the most."""
    rows = []
    for place, row in enumerate(reading):
        order = row.topk(min(top, len(row))).indices.tolist()
        text = inputs.target[place] if place < len(inputs.target) else str(place)
        rows.append({"token": text, "slots": [{"slot": slot, "weight": row[slot].item()} for slot in order]})
    return rows


def explain_ticks(model: PreTrainedModel, events: list[Event], walk: Walk, outputs: Any, top: int) -> dict[str, Any]:
    """Certainty, answer and most attended places of each tick, and why thinking stopped."""
    config = model.config
    used = int(outputs.ticks[0])
    certainties = outputs.certainties[0, 1].tolist()
    answers = outputs.predictions[0].T.unflatten(-1, (-1, config.prediction_shape[-1])).argmax(dim=-1).tolist()
    looked = [found.weights[0, :, 0].mean(dim=0) for _, _, _, found in walk.checks if found.weights is not None]
    ticks = []
    for number in range(used):
        row: dict[str, Any] = {"tick": number + 1, "certainty": certainties[number], "answer": answers[number]}
        if number < len(looked):
            order = looked[number].topk(min(top, len(looked[number]))).indices.tolist()
            row["looked_at"] = [{"place": place, "weight": looked[number][place].item()} for place in order]
        ticks.append(row)
    threshold, bound = config.certainty_threshold, len(certainties)
    last = certainties[used - 1]
    if threshold is None:
        reason = f"took all {used} ticks: no certainty threshold is set"
    elif used < bound or last >= threshold:
        reason = f"stopped after tick {used}: certainty {last:.4g} reached the threshold {threshold:g}"
    else:
        reason = f"took all {used} ticks: certainty {last:.4g} stayed below the threshold {threshold:g}"
    certain = getattr(outputs, "certain_tick", None)
    return {
        "kind": "ticks",
        "ticks": ticks,
        "answer_tick": None if certain is None else int(certain[0]) + 1,
        "halting": {"threshold": threshold, "bound": bound, "ticks": used, "reason": reason},
    }


def explanation_lines(explanation: dict[str, Any]) -> list[str]:
    """The explanation in readable lines."""
    if explanation["kind"] == "ticks":
        lines = []
        for tick in explanation["ticks"]:
            answer = " ".join(map(str, tick["answer"][:16])) + (" ..." if len(tick["answer"]) > 16 else "")
            places = ", ".join(f"{item['place']} ({item['weight']:.3f})" for item in tick.get("looked_at", []))
            line = f"tick {tick['tick']}: certainty {tick['certainty']:.4f}, answer {answer}"
            lines.append(line + (f"; looked at places {places}" if places else ""))
        if explanation["answer_tick"] is not None:
            lines.append(f"the answer is that of tick {explanation['answer_tick']}")
        return [*lines, explanation["halting"]["reason"]]
    lines = [
        "slots that the tokens filled or the answer read the most: how far they were filled, and the tokens' weights:"
    ]
    for slot in explanation["slots"]:
        tokens = ", ".join(f"{item['token']!r} at {item['position']} ({item['weight']:.3f})" for item in slot["tokens"])
        lines.append(f"  slot {slot['slot']}: {slot['filled']:.3f} from {tokens}")
    for step in explanation["steps"]:
        measure = "" if step["measure"] is None else f" (halting measure {step['measure']:.4g})"
        lines.append(f"step {step['step']}{measure}: the connections that carried the most, share of the update behind")
        for item in step["connections"]:
            lines.append(f"  slot {item['source']} to {item['target']}: {item['carried']:.3f} ({item['share']:+.0%})")
    lines.append(explanation["halting"]["reason"])
    if explanation["read"]:
        lines.append("slots that the decoder read for each token of the answer, mean over layers and heads:")
        for row in explanation["read"]:
            slots = ", ".join(f"{item['slot']} ({item['weight']:.3f})" for item in row["slots"])
            lines.append(f"  {row['token']!r}: {slots}")
    return lines
