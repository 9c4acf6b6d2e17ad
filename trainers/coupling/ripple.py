"""Does coupling predict what an edit does? Real edits of the target layers, measured on every piece, then undone.

For a step of length ε along a gradient h of the target weights, Δ log P(a_j|q_j) = ε cos(h, g_j) |g_j| + O(ε²). The
validation takes such steps, measures every piece, and sets measurement beside prediction for several lengths, so that
the range in which the prediction holds is seen, and beside baselines that need no gradient.

Where it ends, two predictions tell what is missing. Along the displacement d that the edit made, `second_order` adds
the curvature at the unedited weights, <d, g_j> + dᵀ H_j d / 2, and `path` takes the gradients along the way, the mean
of <d, g_j> at the start, the middle and the end of the edit by Simpson's rule, whose exact integral is the measured
change itself. Both know the edit and cost more than measuring it: they explain a ripple rather than foretell it.
"""

import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from scipy.stats import rankdata
from tqdm.auto import tqdm

from ..errors import UserError
from .analyzer import CouplingAnalyzer
from .capture import evaluation_mode, frozen
from .coupling import Coupling
from .directional import derivatives_along
from .encoding import EncodedPiece
from .pieces import KnowledgePiece
from .report import normalised

EditKind = Literal["answer", "replacement", "lora"]
# Predictions beside that of first order, which is always made.
PREDICTIONS = ("second_order", "path")
SIZES = (0.1, 0.3, 1.0, 3.0, 10.0)
# The size of an edit that goes on until the new answer is more probable than the old one.
FULL = math.inf
FULL_STEP = 0.5  # nats that one of its steps aims at
MOST_STEPS = 100
LORA_RANK = 8
RESAMPLES = 2000
CONFIDENCE = 0.95
# What "the prediction holds" means in the report.
HOLDS_SPEARMAN = 0.97
HOLDS_SIGNS = 0.95


def validate(
    analyzer: CouplingAnalyzer,
    pieces: Sequence[KnowledgePiece],
    count: int,
    edit: EditKind = "answer",
    sizes: Sequence[float] = SIZES,
    chosen_size: float = 0.3,
    coupling: Coupling | None = None,
    seed: int = 0,
    steps: int = 1,
    predictions: Sequence[str] = (),
) -> dict[str, Any]:
    """Edit pieces one after the other, measure all, and compare with the first-order prediction.

    The length of each step is chosen by its predicted own gain, ε = gain / |h|: edits of different pieces are then of
    comparable size. Every edit starts from the model's own weights, which are restored bit for bit, also when a
    measurement fails.

    Args:
        analyzer: holds the model; its target layers are what is edited.
        pieces: all pieces to measure.
        count: how many to edit, drawn at random.
        edit: `"answer"` steps along the gradient of the piece's own answer, `"replacement"` along that of its
            `new_answer`. `"lora"` raises the own answer too, but through `peft` adapters of rank 8 on the target
            layers: a step along the gradient of their matrices B, which start at zero. The prediction stays that of
            the full gradient, scaled to the same own gain.
        sizes: predicted own gains, in nats. `FULL` (infinity), for replacements only, takes steps of half a nat until
            the new answer is more probable than the old one, at most 100; the first-order prediction is then scaled to
            the own gain that was reached.
        chosen_size: the size whose pairs are listed and charted.
        coupling: the result of `analyzer.fit(pieces)`, to save computing it again.
        seed: of the draw and the intervals.
        steps: in how many steps each edit is made, every one along the gradient at the weights it starts from and
            aiming at `size / steps`, but from the second on at no more than half of what the log-probability lacks.
        predictions: kinds of `PREDICTIONS` to make beside that of first order; see the head of this module.

    Returns:
        Plain values: the settings, one entry per size, and the pairs of the chosen size. Intervals are bootstrap
        percentiles over edits, since the pairs of one edit are not independent.

    Raises:
        UserError: with fewer pieces to edit than `count`, fewer than three others, a bad size, an unknown prediction,
            or weights that cannot be edited.
    """
    sizes = sorted({float(size) for size in (*sizes, chosen_size)})
    if sizes[0] <= 0:
        raise UserError(f"the size of an edit is {sizes[0]}; it must be above 0")
    if sizes[-1] == FULL and edit != "replacement":
        raise UserError(f"the size of an edit is full; that needs new answers, and the edit is {edit!r}")
    if steps < 1:
        raise UserError(f"an edit is made in {steps} steps; it must be at least 1")
    if unknown := [name for name in predictions if name not in PREDICTIONS]:
        raise UserError(f"unknown prediction {unknown[0]!r}; known: {', '.join(PREDICTIONS)}")
    encoded = analyzer.encode(pieces)
    coupling = coupling or analyzer.fit(pieces)
    candidates = [
        index
        for index, piece in enumerate(pieces)
        if coupling.gradient_norms[index] > 0 and (edit != "replacement" or piece.new_answer is not None)
    ]
    if not 1 <= count <= len(candidates):
        what = "with a new answer" if edit == "replacement" else "with a gradient"
        raise UserError(f"--validate {count}: it must be between 1 and {len(candidates)}, the pieces {what}")
    if len(pieces) < 4:
        raise UserError(f"--validate: a ripple needs three other pieces to rank, and there are {len(pieces)} pieces")
    generator = np.random.default_rng(seed)
    edited = sorted(generator.choice(candidates, count, replace=False).tolist())
    directions = [encoded[index] for index in edited]
    coupled = coupling
    rows = list(edited)
    if edit == "replacement":
        directions = analyzer.encode(
            [
                replace(pieces[i], piece_id=f"{pieces[i].piece_id} (new)", answer=pieces[i].new_answer or "")
                for i in edited
            ]
        )
        coupled = analyzer.fit([*encoded, *directions])
        rows = list(range(len(pieces), len(pieces) + count))
    norms = coupled.gradient_norms
    everything = [*encoded, *(directions if edit == "replacement" else [])]
    measured = measure_edits(
        analyzer,
        directions,
        everything,
        sizes,
        lora_seed=seed if edit == "lora" else None,
        steps=steps,
        predictions=predictions,
        rivals=[encoded[index] for index in edited] if edit == "replacement" else None,
    )
    n = len(pieces)
    others = [np.array([j for j in range(n) if j != index]) for index in edited]
    predictors = {
        "first_order": [coupled.matrix[row, :n] * norms[:n] for row in rows],
        "coupling": [coupled.matrix[row, :n] for row in rows],
        **({} if coupled.balanced is None else {"balanced_coupling": [coupled.balanced[row, :n] for row in rows]}),
        **_baselines(analyzer, pieces, encoded, edited),
    }
    entries = []
    for s, size in enumerate(sizes):
        changes = measured["changes"][s]
        own = np.array([changes[k, row] for k, row in enumerate(rows)])
        taken = measured["steps"][s]
        made = (
            taken > 0 if taken.any() else np.ones(count, dtype=bool)
        )  # what a new answer that leads already needs not
        gains = own if size == FULL else np.full(count, size)
        first_order = [gains[k] / norms[row] * predictors["first_order"][k] for k, row in enumerate(rows)]
        kinds = {"first_order": first_order} | {
            name: list(values[s][:, :n]) for name, values in measured["kinds"].items()
        }
        predicted = {
            name: [row[other] for row, other in zip(kind, others, strict=True)] for name, kind in kinds.items()
        }
        actual = [changes[k, other] for k, other in enumerate(others)]
        scores = predictors | kinds
        entry = {
            "size": "full" if size == FULL else size,
            "predicted_own_gain": float(np.median(gains[made])),
            "own_gain": {
                "median": float(np.median(own[made])),
                "min": float(own[made].min()),
                "max": float(own[made].max()),
            },
            "made": int(made.sum()),
            "steps": {"median": float(np.median(taken[made])), "max": int(taken.max())},
            "median_ripple": float(np.median(np.abs(np.concatenate(actual)))),
            "spearman": {
                name: _median(np.array([spearman(values[k][other], actual[k]) for k, other in enumerate(others)]), seed)
                for name, values in scores.items()
            },
            **_agreement(predicted.pop("first_order"), actual, seed),
            "predictions": {name: _agreement(values, actual, seed) for name, values in predicted.items()},
            **_role_ranking(
                pieces,
                [edited[k] for k in np.flatnonzero(made)],
                {
                    name: [rows[k][:n] for k in np.flatnonzero(made)]
                    for name, rows in {**scores, "measured": changes}.items()
                },
                seed,
            ),
        }
        if edit == "replacement":
            old = coupling.log_probs[edited] + [changes[k, index] for k, index in enumerate(edited)]
            entry["replaced"] = float(np.mean(coupled.log_probs[rows] + own > old))
        entries.append(entry)
        if size == chosen_size:
            chosen = {
                **entry,
                "pairs": {
                    "edited": [pieces[edited[k]].piece_id for k, other in enumerate(others) for _ in other],
                    "measured_on": [pieces[j].piece_id for other in others for j in other],
                    "predicted": np.concatenate(
                        [row[other] for row, other in zip(first_order, others, strict=True)]
                    ).tolist(),
                    "measured": np.concatenate(actual).tolist(),
                },
            }
    return {
        "edit": edit,
        "edits": count,
        "steps": steps,
        "pieces": n,
        "edited": [pieces[index].piece_id for index in edited],
        "seed": seed,
        "confidence": CONFIDENCE,
        "method": f"bootstrap percentiles over edits, {RESAMPLES} resamples",
        "restored_bit_for_bit": measured["restored"],
        "gradient_norm_error": None
        if edit == "lora"  # the norms measured are those of the adapters' gradients
        else float(np.abs(measured["norms"] / norms[rows] - 1).max()),
        "holds_up_to_own_gain": _holds(entries, "first_order"),
        "predictions_hold_up_to_own_gain": {name: _holds(entries, name) for name in predictions},
        "holds_means": f"median Spearman >= {HOLDS_SPEARMAN} and share of right signs >= {HOLDS_SIGNS}",
        "sizes": entries,
        "chosen": chosen,
    }


def measure_edits(
    analyzer: CouplingAnalyzer,
    directions: Sequence[EncodedPiece],
    pieces: Sequence[EncodedPiece],
    gains: Sequence[float],
    lora_seed: int | None = None,
    steps: int = 1,
    predictions: Sequence[str] = (),
    rivals: Sequence[EncodedPiece] | None = None,
) -> dict[str, Any]:
    """The change of every piece's log-probability under edits of the target layers.

    Args:
        directions: the pieces along whose gradients the weights are moved, each by itself.
        pieces: what is measured.
        gains: predicted own gains in nats; a single step is `gain / |gradient|` long. `FULL` steps on until the
            direction's piece is more probable than its rival.
        lora_seed: edit through adapters that are drawn with this seed, instead of the weights themselves.
        steps: of each edit of a finite gain.
        predictions: kinds of `PREDICTIONS` to make as well.
        rivals: for `FULL`, the piece that each direction's is to overtake.

    Returns:
        `changes` (`np.ndarray` of shape `(gains, directions, pieces)`, nats), `kinds` (such an array for each of the
        predictions), `steps` (those made, `(gains, directions)`), `norms` (of the gradients at the unedited weights),
        and `restored`: whether every target tensor has the bits it had before.
    """
    targets = _parameters(analyzer)
    originals = [parameter.detach().clone() for parameter in targets]
    before = analyzer.log_probabilities(pieces)
    shape = len(gains), len(directions), len(pieces)
    changes, made, norms = np.zeros(shape), np.zeros(shape[:2], dtype=int), np.zeros(len(directions))
    kinds = {name: np.zeros(shape) for name in predictions}
    inside = nullcontext(targets) if lora_seed is None else _adapters(analyzer, lora_seed)
    bar = tqdm(total=len(directions) * len(gains), desc="edits", unit="edit", disable=not analyzer.progress)
    with inside as parameters:
        saved = originals if lora_seed is None else [parameter.detach().clone() for parameter in parameters]
        for k, direction in enumerate(directions):
            log_prob, gradient = _gradient(analyzer, direction, parameters)
            norms[k] = _squared_norm(gradient) ** 0.5
            edit = _Edit(analyzer, direction, rivals[k] if rivals else None, parameters, saved, log_prob, gradient)
            start: tuple[np.ndarray, np.ndarray | None] | None = None
            for s, gain in enumerate(gains):
                with edit.made(gain, steps):
                    changes[s, k] = analyzer.log_probabilities(pieces) - before
                    made[s, k] = edit.steps
                    moved = edit.displacement() if predictions else []
                    end = derivatives_along(analyzer, pieces, parameters, moved)[0] if "path" in predictions else None
                if not predictions:
                    bar.update()
                    continue
                # A single step goes along the gradient whatever its length, so one look from the start serves all.
                along = 1.0
                if edit.length is not None:
                    moved, along = gradient, edit.length
                if start is None or edit.length is None:
                    start = derivatives_along(analyzer, pieces, parameters, moved, "second_order" in predictions)
                slope, curvature = start
                if curvature is not None:
                    kinds["second_order"][s, k] = along * slope + along**2 * curvature / 2
                if end is not None:
                    with edit.shifted(moved, along / 2):
                        middle, _ = derivatives_along(analyzer, pieces, parameters, moved)
                    kinds["path"][s, k] = (along * (slope + 4 * middle) + end) / 6
                bar.update()
    bar.close()
    restored = all(torch.equal(parameter, old) for parameter, old in zip(targets, originals, strict=True))
    return {"changes": changes, "kinds": kinds, "steps": made, "norms": norms, "restored": restored}


class _Edit:
    """Edits of one piece of different sizes, each from the same weights.

    Attributes:
        steps: made by the last edit.
        length: of the last edit as a multiple of the first gradient, if it was made in a single step.
    """

    def __init__(
        self,
        analyzer: CouplingAnalyzer,
        piece: EncodedPiece,
        rival: EncodedPiece | None,
        parameters: Sequence[torch.nn.Parameter],
        saved: Sequence[torch.Tensor],
        log_prob: float,
        gradient: Sequence[torch.Tensor],
    ):
        self.analyzer = analyzer
        self.piece = piece
        self.rival = rival
        self.parameters = parameters
        self.saved = saved
        self.log_prob = log_prob
        self.gradient = gradient
        self.steps = 0
        self.length: float | None = None

    @contextmanager
    def made(self, gain: float, steps: int) -> Iterator[None]:
        """The edited weights inside; outside the saved values, copied and not subtracted, so that no bit differs."""
        self.steps, self.length = 0, None
        try:
            if gain == FULL:
                while self.steps < MOST_STEPS and not self._overtaken():
                    self._step(FULL_STEP, bounded=True)
            else:
                for step in range(steps):
                    self._step(gain / steps, bounded=step > 0)
            yield
        finally:
            self._restore()

    @contextmanager
    def shifted(self, direction: Sequence[torch.Tensor], length: float) -> Iterator[None]:
        """The weights moved along a direction inside; outside the saved values."""
        try:
            self._move(direction, length)
            yield
        finally:
            self._restore()

    def displacement(self) -> list[torch.Tensor]:
        """How far the weights are from the saved ones."""
        return [parameter.detach() - old for parameter, old in zip(self.parameters, self.saved, strict=True)]

    def _step(self, aim: float, bounded: bool) -> None:
        log_prob, gradient = self.log_prob, self.gradient
        if self.steps:
            log_prob, gradient = _gradient(self.analyzer, self.piece, self.parameters)
        # Near certainty gradients vanish, and a step that aimed beyond it would be as long as it is senseless.
        aim = min(aim, -log_prob / 2) if bounded else aim
        squared = _squared_norm(gradient)
        length = aim / squared if squared else 0.0
        self._move(gradient, length)
        self.steps += 1
        self.length = length if self.steps == 1 else None

    def _overtaken(self) -> bool:
        if self.rival is None:
            raise ValueError("a full edit needs the piece that is to be overtaken")
        own, rival = self.analyzer.log_probabilities([self.piece, self.rival])
        return bool(own > rival)

    def _move(self, direction: Sequence[torch.Tensor], length: float) -> None:
        with torch.no_grad():
            for parameter, part in zip(self.parameters, direction, strict=True):
                parameter.add_(part, alpha=length)

    def _restore(self) -> None:
        with torch.no_grad():
            for parameter, old in zip(self.parameters, self.saved, strict=True):
                parameter.copy_(old)


@contextmanager
def _adapters(analyzer: CouplingAnalyzer, seed: int) -> Iterator[list[torch.nn.Parameter]]:
    """Adapters on the target layers inside, which change nothing yet; their matrices B. Outside the model as it was."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise UserError("--edit lora: needs peft; pip install adaptive-reasoners[peft]") from error
    model = analyzer.model
    if hasattr(model, "peft_config"):
        raise UserError("--edit lora: the model has adapters already")
    targets = {id(module) for layer in analyzer.targets for module in layer.modules}
    names = [name for name, module in model.named_modules() if id(module) in targets]
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out")  # peft sets it right by itself
        torch.manual_seed(seed)
        config = LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=names)
        adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    try:
        yield [parameter for name, parameter in adapted.named_parameters() if ".lora_B." in name]
    finally:
        adapted.unload()
        if hasattr(model, "peft_config"):  # which some versions of peft leave behind
            del model.peft_config
        for parameter in asking:
            parameter.requires_grad_(True)


def ranking_quality(scores: np.ndarray, positive: np.ndarray) -> float:
    """Area under the ROC curve: the chance that a positive item scores above a negative one, ties counted half."""
    ranks = rankdata(scores)
    positives, negatives = int(positive.sum()), int((~positive).sum())
    return float((ranks[positive].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def spearman(one: np.ndarray, other: np.ndarray) -> float:
    """Rank correlation, NaN where one side is constant or undefined."""
    kept = ~(np.isnan(one) | np.isnan(other))
    one, other = rankdata(one[kept]), rankdata(other[kept])
    if len(one) < 3 or np.ptp(one) == 0 or np.ptp(other) == 0:
        return float("nan")
    return float(np.corrcoef(one, other)[0, 1])


def _parameters(analyzer: CouplingAnalyzer) -> list[torch.nn.Parameter]:
    found: dict[int, torch.nn.Parameter] = {}
    for layer in analyzer.targets:
        for parameter in (layer.weight, *(layer.biases if analyzer.capture.bias else [])):
            if not parameter.is_floating_point():
                raise UserError(f"layer {layer.name!r}: weights of type {parameter.dtype} cannot be edited")
            if parameter.is_meta:
                raise UserError(f"layer {layer.name!r}: its weights are not in memory and cannot be edited")
            found[id(parameter)] = parameter
    return list(found.values())


def _gradient(
    analyzer: CouplingAnalyzer, piece: EncodedPiece, parameters: Sequence[torch.nn.Parameter]
) -> tuple[float, list[torch.Tensor]]:
    """A piece's log-probability in nats and its gradient, at the present weights."""
    with evaluation_mode(analyzer.model), frozen(analyzer.model), torch.enable_grad():
        for parameter in parameters:
            parameter.requires_grad_(True)
        try:
            log_prob = analyzer.capture.log_probabilities_with_graph([piece]).sum()
            return float(log_prob.detach()), list(torch.autograd.grad(log_prob, parameters))
        finally:
            for parameter in parameters:
                parameter.requires_grad_(False)


def _squared_norm(gradient: Sequence[torch.Tensor]) -> float:
    return float(torch.stack([part.double().square().sum().cpu() for part in gradient]).sum())


def _holds(entries: Sequence[dict[str, Any]], kind: str) -> float | None:
    """The largest own gain, in nats, at which a prediction holds; `None` for none."""
    held = [
        entry["own_gain"]["median"]
        for entry in entries
        if (entry["spearman"][kind]["median"] or 0) >= HOLDS_SPEARMAN
        and entry["predictions"].get(kind, entry)["sign_agreement"]["value"] >= HOLDS_SIGNS
    ]
    return max(held, default=None)


def _agreement(predicted: Sequence[np.ndarray], actual: Sequence[np.ndarray], seed: int) -> dict[str, Any]:
    """How measured changes follow a prediction in sign and size; one array of each for every edit."""
    both = list(zip(predicted, actual, strict=True))
    # An edit that needed no step moved nothing, and agrees with nothing.
    signs = np.array([(np.sign(p) == np.sign(d)).mean() if d.any() else np.nan for p, d in both])
    error = np.array(
        [np.median(np.abs(d - p)) / max(np.median(np.abs(d)), 1e-300) if d.any() else np.nan for p, d in both]
    )
    all_predicted, all_actual = np.concatenate(predicted), np.concatenate(actual)
    squared = float(all_predicted @ all_predicted)
    slope = float(all_predicted @ all_actual) / squared if squared else None
    correlation = np.corrcoef(all_predicted, all_actual)[0, 1] if np.ptp(all_predicted) and np.ptp(all_actual) else None
    return {
        "sign_agreement": _mean(signs, seed),
        "linearity_error": {"what": "median |measured - predicted| / median |measured|", **_median(error, seed)},
        "slope": slope,
        "r_squared": None if correlation is None else float(correlation**2),
    }


def _role_ranking(
    pieces: Sequence[KnowledgePiece], edited: Sequence[int], scores: dict[str, list[np.ndarray]], seed: int
) -> dict[str, Any]:
    """Whether the queries that should change with an edit rank above those that should not, by each score.

    Args:
        pieces: all pieces.
        edited: positions of the edited ones.
        scores: name -> for each edit, one value for every piece.
        seed: of the intervals.
    """
    pots = np.array([piece.pot for piece in pieces])
    roles = np.array([piece.role for piece in pieces])
    contrasts = {
        "portability_above_locality": lambda own: (own & (roles == "portability"), own & (roles == "locality")),
        "portability_above_unrelated": lambda own: (own & (roles == "portability"), ~own & (roles == "portability")),
    }
    what = {
        "portability_above_locality": "an edit's portability queries against its locality queries",
        "portability_above_unrelated": "an edit's portability queries against those of other edits",
    }
    result = {}
    for contrast, choose in contrasts.items():
        found: dict[str, list[float]] = {name: [] for name in scores}
        for k, index in enumerate(edited):
            positive, negative = choose(pots == pots[index])
            asked = positive | negative
            if positive.any() and negative.any():
                for name, rows in scores.items():
                    found[name].append(ranking_quality(rows[k][asked], positive[asked]))
        if any(found.values()):
            result[contrast] = {
                "what": f"{what[contrast]}: area under the ROC curve, mean over edits",
                **{name: _mean(np.array(values), seed) for name, values in found.items()},
            }
    return result


def _baselines(
    analyzer: CouplingAnalyzer,
    pieces: Sequence[KnowledgePiece],
    encoded: Sequence[EncodedPiece],
    edited: Sequence[int],
) -> dict[str, list[np.ndarray]]:
    answers = np.array([normalised(piece.answer) for piece in pieces])
    groups = np.array([piece.group or piece.category for piece in pieces])
    words = [set(re.findall(r"\w+", f"{piece.prompt} {piece.answer}".lower())) for piece in pieces]
    states = _hidden_states(analyzer, encoded)
    return {
        "same_answer": [(answers == answers[index]).astype(float) for index in edited],
        "same_group": [(groups == groups[index]).astype(float) for index in edited],
        "lexical_overlap": [
            np.array([len(words[index] & other) / max(len(words[index] | other), 1) for other in words])
            for index in edited
        ],
        "hidden_state_similarity": [states @ states[index] for index in edited],
    }


def _hidden_states(analyzer: CouplingAnalyzer, encoded: Sequence[EncodedPiece]) -> np.ndarray:
    """Unit vectors `(n, hidden)`: the last layer's state where the answer begins, or the encoder's mean state."""
    model, rows = analyzer.model, []
    with evaluation_mode(model), torch.no_grad():
        for piece in encoded:
            tokens = torch.tensor([piece.prompt_ids], device=analyzer.capture.device)
            if model.config.is_encoder_decoder:
                state = model.get_encoder()(input_ids=tokens).last_hidden_state[0].mean(0)
            else:
                state = model(input_ids=tokens, output_hidden_states=True).hidden_states[-1][0, -1]
            rows.append(state.double().cpu().numpy())
    stacked = np.stack(rows)
    return stacked / np.maximum(np.linalg.norm(stacked, axis=1, keepdims=True), 1e-300)


def _median(values: np.ndarray, seed: int) -> dict[str, Any]:
    return {"median": _over_edits(values, np.median), **_spread(values, np.median, seed)}


def _mean(values: np.ndarray, seed: int) -> dict[str, Any]:
    return {"value": _over_edits(values, np.mean), **_spread(values, np.mean, seed)}


def _over_edits(values: np.ndarray, statistic: Callable) -> float | None:
    defined = values[~np.isnan(values)]
    return float(statistic(defined)) if len(defined) else None


def _spread(values: np.ndarray, statistic: Callable, seed: int) -> dict[str, Any]:
    """Bootstrap interval and smallest value over the edits for which there is one."""
    defined = values[~np.isnan(values)]
    if not len(defined):
        return {"interval": None, "min": None, "edits": 0}
    drawn = np.random.default_rng(seed).integers(0, len(defined), (RESAMPLES, len(defined)))
    tails = [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]
    interval = np.quantile(statistic(defined[drawn], axis=1), tails)
    return {"interval": interval.tolist(), "min": float(defined.min()), "edits": len(defined)}
