"""Watch a model's inside while it trains: statistics at some steps, with bounded memory and a known cost."""

import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.utils import logging

from ..coupling.capture import evaluation_mode
from ..errors import UserError
from ..files import json_line, replacing, write_text
from .arguments import TrackingArguments
from .capture import merge
from .gradients import WeightMeter
from .recorder import MAP_TOKENS, Recorder, Wanted, summarise
from .structure import NamesFilter, Structure

logger = logging.get_logger(__name__)

FOLDER = "internals"
RECORDS = "steps.jsonl"
# What tells how long things took, and differs between two runs that are otherwise the same.
TIMES = ("seconds", "training_seconds")


class NonFiniteError(UserError):
    """NaN or infinity inside the model, where the run was asked to stop at it."""


class InternalsTracker(TrainerCallback):
    """Measures what goes on inside a model at some update steps; between them no hook is registered.

    On a tracked step it takes
    - from the training batch, over all its micro-batches and processes: moments of queries, keys, values and of the
      outputs of sublayers and layers, real tokens only; norms of the gradients at the layers' outputs; norms of all
      gradients before clipping, and by how much the update moved the weights;
    - from fixed `probe` examples, run once more without dropout before the step: attention statistics, attention maps
      and the exact decomposition of the residual stream. Without `probe`, attention statistics are those of the first
      `examples` of each micro-batch, and there are no maps and no decomposition.

    Losses, gradients, updates and the random numbers of training are the same as without it, bit for bit.

    As a callback it serves `transformers.Trainer`. In a loop of one's own:

    ```python
    with InternalsTracker(model, every=50, probe=batch) as tracker:
        for number, batch in enumerate(batches, 1):
            with tracker.step(number, optimizer):
                model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
    tracker.records[-1]["attention"]["encoder.layers.0.self_attn"]["entropy"]
    ```

    Args:
        model: any model of the library whose attention goes through the library's attention interface. Modules whose
            attention does not, or cannot be reproduced to 1e-4, are named in every record under `not_reproduced`.
        every: track the first step and every multiple of this.
        names: modules to look at, see [`Structure.select`]. Weights and gradients are always taken from all.
        probe: a batch as the model takes it, labels included.
        tokenizer: gives the tokens on the axes of the maps.
        folder: where `steps.jsonl` and `maps/` are written; nothing is written before the first tracked step. Without
            it the last `keep` records stay in memory.
        examples: attention of at most so many examples of a batch is taken.
        maps: most steps whose maps are kept.
        updates: whether to measure by how much updates move the weights.
        stop_on_nonfinite: raise [`NonFiniteError`] when a tracked step meets NaN or infinity.
        keep: number of records in memory.

    Raises:
        UserError: if the model has no attention modules, is compiled, or `names` matches nothing.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        every: int = 1,
        names: NamesFilter = None,
        probe: Mapping[str, torch.Tensor] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        folder: Path | str | None = None,
        examples: int = 2,
        maps: int = 12,
        updates: bool = True,
        stop_on_nonfinite: bool = False,
        keep: int = 1000,
    ):
        if hasattr(model, "_orig_mod"):
            raise UserError("tracking: a compiled model skips hooks that come later; track it without torch.compile")
        if every < 1:
            raise UserError(f"tracking.every is {every}; it must be at least 1")
        self.structure = Structure(model)
        self.names = self.structure.select(names)
        self.filter = names if isinstance(names, str) or names is None else "function" if callable(names) else [*names]
        self.every = every
        self.probe = None if probe is None else {k: v for k, v in probe.items() if isinstance(v, torch.Tensor)}
        self.tokenizer = tokenizer
        self.folder = None if folder is None else Path(folder)
        self.examples = examples
        self.maps = maps
        self.updates = updates
        self.stop_on_nonfinite = stop_on_nonfinite
        self._kept: deque[dict[str, Any]] = deque(maxlen=keep)
        self._checked: dict[str, str | None] = {}
        self._recorder: Recorder | None = None
        self._meter = WeightMeter(self.structure)
        self._probe_sums: dict[tuple[str, str], Any] = {}
        self._present: dict[str, Any] = {}
        self._measured_gradients = False
        self._clip: Callable | None = None
        self._started = time.perf_counter()
        self._earlier = 0.0
        self._seconds = 0.0

    def __enter__(self) -> "InternalsTracker":
        self.resume(0)
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    @contextmanager
    def step(self, number: int, optimizer: torch.optim.Optimizer | None = None) -> Iterator[bool]:
        """Forward and backward passes and the update of one step belong inside. Yields whether it is tracked.

        Args:
            number: of the update step, from 1.
            optimizer: gives the moment before and after the update; without it there are no `update_to_weight`.
        """
        if not self.wants(number):
            yield False
            return
        handles = []
        self.begin_step(number)
        try:
            if optimizer is not None:
                handles.append(optimizer.register_step_pre_hook(lambda *_: self.before_update()))
                handles.append(optimizer.register_step_post_hook(lambda *_: self.after_update()))
            yield True
            self.end_step()
        finally:
            for handle in handles:
                handle.remove()
            self.close()

    def wants(self, number: int) -> bool:
        """Whether an update step, counted from 1, is tracked."""
        return number == 1 or number % self.every == 0

    def begin_step(self, number: int, **facts: Any) -> None:
        """Look at the probe examples and register the hooks for the step's passes."""
        started = time.perf_counter()
        self.close()
        self._seconds = 0.0
        self._measured_gradients = False
        self._meter = WeightMeter(self.structure)
        self._present = {"step": number, **facts}
        self._probe_sums = {}
        if self.probe is not None:
            self._look_at_probe(number)
        wanted = Wanted(self.names, stream=True, gradients=True, attention=self.probe is None, examples=self.examples)
        self._recorder = Recorder(self.structure, wanted, self._checked)
        self._recorder.__enter__()
        self._watch_clipping()
        self._seconds += time.perf_counter() - started

    def before_update(self, scale: float = 1.0) -> None:
        """Measure gradients, unless that was done before they were clipped, and note the weights.

        Args:
            scale: what the loss, and with it the gradients, is multiplied with.
        """
        if self._recorder is None:
            return
        started = time.perf_counter()
        self._stop_watching_clipping()
        self._present["gradient_scale"] = scale
        self._measure_gradients(scale)
        if self.updates:
            self._meter.before_update()
        self._seconds += time.perf_counter() - started

    def after_update(self) -> None:
        """Measure by how much the weights moved."""
        started = time.perf_counter()
        if self._recorder is not None and self.updates:
            self._meter.after_update()
        self._seconds += time.perf_counter() - started

    def end_step(self) -> dict[str, Any]:
        """Remove the hooks, merge what all processes saw, and write the record. Returns it.

        Raises:
            NonFiniteError: if the step met NaN or infinity and the tracker was asked to stop then.
        """
        if self._recorder is None:
            raise RuntimeError("end_step without begin_step")
        started = time.perf_counter()
        recorder = self._recorder
        self.close()
        self._measure_gradients(1.0)
        # In the order of the training pass, so that the first module with NaN stands first.
        host = merged_over_processes({**recorder.sums.to_host(), **self._probe_sums})
        scale = self._present.pop("gradient_scale", 1.0) * _processes()
        record = self._present | summarise(host, self.structure, scale)
        silent = set(self.structure.attentions) & self.names - recorder.called - set(self._checked)
        problems = {name: problem for name, problem in self._checked.items() if problem is not None}
        problems |= dict.fromkeys(sorted(silent), "its attention does not go through the library's interface")
        record["not_reproduced"] = problems
        record["gradients"] = self._meter.report()
        for entry in record["nonfinite"]:
            logger.warning(f"step {record['step']}: {entry['kind']} in the {entry['what']} of {entry['module']}")
        self._seconds += time.perf_counter() - started + recorder.seconds
        record["seconds"] = round(self._seconds, 6)
        record["training_seconds"] = round(self._earlier + time.perf_counter() - self._started, 3)
        self._keep(record)
        if self.stop_on_nonfinite and (record["nonfinite"] or _nonfinite_gradients(record)):
            where = (record["nonfinite"] or _nonfinite_gradients(record))[0]
            raise NonFiniteError(
                f"tracking.stop_on_nonfinite: step {record['step']}: {where['kind']} in the {where['what']} of "
                f"{where['module']}"
            )
        return record

    def close(self) -> None:
        """Remove every hook that is still registered."""
        self._stop_watching_clipping()
        if self._recorder is not None:
            self._recorder.__exit__()
            self._recorder = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.resume(state.global_step)

    def on_step_begin(self, args, state, control, **kwargs):
        if self.wants(state.global_step + 1):
            self.begin_step(state.global_step + 1, epoch=state.epoch)

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        if self._recorder is not None:
            self.before_update(_loss_scale(optimizer))

    def on_optimizer_step(self, args, state, control, **kwargs):
        if self._recorder is not None:
            self.after_update()
            self.end_step()

    def on_train_end(self, args, state, control, **kwargs):
        self.close()

    def resume(self, step: int) -> None:
        """Begin, or go on after an update step: what was recorded after it is dropped and will be recorded again."""
        self._started = time.perf_counter()
        self._kept.clear()
        records = [record for record in self._stored() if record["step"] <= step]
        self._earlier = records[-1]["training_seconds"] if records else 0.0
        self._kept.extend(records)
        if self.folder is not None and _is_main_process() and (self.folder / RECORDS).exists():
            write_text(self.folder / RECORDS, "".join(map(json_line, records)))
            for path in self._map_files():
                if _step_of(path) > step:
                    path.unlink()

    @property
    def records(self) -> list[dict[str, Any]]:
        """The records so far, the oldest first: all of them with a folder, else the last `keep`."""
        return self._stored() if self.folder is not None else list(self._kept)

    def stored_maps(self) -> dict[int, dict[str, torch.Tensor]]:
        """Step -> module -> attention weights of the first probe example, `(heads, queries, keys)`."""
        if self.folder is None:
            return {}
        return {_step_of(path): load_file(path) for path in self._map_files()}

    def _look_at_probe(self, number: int) -> None:
        model = self.structure.model
        device = next(model.parameters()).device
        batch = {name: values.to(device) for name, values in (self.probe or {}).items()}
        wanted = Wanted(self.names, attention=True, residual=True, maps=True, examples=self.examples)
        recorder = Recorder(self.structure, wanted, self._checked)
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices), evaluation_mode(model), torch.no_grad(), recorder:
            model(**batch)
        self._probe_sums = recorder.sums.to_host()
        self._present["residual"] = recorder.residual()
        self._present["tokens"] = self._token_texts(recorder)
        self._present["sides"] = {name: recorder.sides(name) for name in recorder.maps}
        if self.folder is not None and _is_main_process():
            folder = self.folder / "maps"
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"step-{number:08d}.safetensors"
            with replacing(path) as aside:
                save_file({name: weights.half().cpu() for name, weights in recorder.maps.items()}, aside)
            self._thin_out(number)

    def _token_texts(self, recorder: Recorder) -> dict[str, list[str]]:
        texts = {}
        for side, tokens in recorder.tokens.tokens.items():
            mask = recorder.tokens.mask_for(side, *tokens.shape)
            first = tokens[0] if mask is None else tokens[0][mask[0]]
            ids = first[:MAP_TOKENS].tolist()
            texts[side] = [self._token_text(token) for token in ids]
        return texts

    def _token_text(self, token: int) -> str:
        if self.tokenizer is None:
            return str(token)
        text = str(self.tokenizer.decode([token]))
        if text.strip():
            return text
        # White space alone would leave an axis without a label.
        return repr(text)[1:-1].replace(" ", "␣")

    def _thin_out(self, number: int) -> None:
        """Keep at most `maps` files: those of every 2^k-th tracked step, and the newest."""
        tracked = [1, *range(self.every, number + 1, self.every)] if self.every > 1 else list(range(1, number + 1))
        stride = 1
        while math.ceil(len(tracked) / stride) + 1 > self.maps:
            stride *= 2
        wanted = {*tracked[::stride], number}
        for path in self._map_files():
            if _step_of(path) not in wanted:
                path.unlink()

    def _map_files(self) -> list[Path]:
        return [] if self.folder is None else sorted((self.folder / "maps").glob("step-*.safetensors"))

    def _watch_clipping(self) -> None:
        """Gradients are to be measured before they are clipped, of which no callback tells."""
        original = torch.nn.utils.clip_grad_norm_

        def clip_grad_norm_(*args: Any, **kwargs: Any) -> torch.Tensor:
            started = time.perf_counter()
            self._measure_gradients(1.0)
            self._seconds += time.perf_counter() - started
            return original(*args, **kwargs)

        self._clip = original
        torch.nn.utils.clip_grad_norm_ = clip_grad_norm_

    def _stop_watching_clipping(self) -> None:
        if self._clip is not None:
            torch.nn.utils.clip_grad_norm_ = self._clip
            self._clip = None

    def _measure_gradients(self, scale: float) -> None:
        if not self._measured_gradients:
            self._meter.measure_gradients(scale)
            self._measured_gradients = True

    def _stored(self) -> list[dict[str, Any]]:
        if self.folder is None or not (self.folder / RECORDS).exists():
            return []
        return read_records(self.folder / RECORDS)

    def _keep(self, record: dict[str, Any]) -> None:
        # What is read back from the file and what is in memory are the same: NaN is null in both.
        line = json_line(record)
        if self.folder is None:
            self._kept.append(json.loads(line))
        elif _is_main_process():
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.folder / RECORDS, "a", encoding="utf-8") as file:
                file.write(line)


def make_tracker(
    arguments: TrackingArguments,
    model: PreTrainedModel,
    probe: Mapping[str, torch.Tensor] | None,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
) -> InternalsTracker | None:
    """The tracker of a training run.

    Args:
        arguments: the recipe's `tracking` section.
        model: what is trained.
        probe: a collated batch, labels included, of the first `arguments.probe_examples` validation examples.
        tokenizer: of the task, if it has one.
        folder: the run's folder; the tracker writes below `internals/`, and nothing before the first tracked step.

    Returns:
        A callback for the Trainer, or `None` if tracking is off.

    Raises:
        UserError: if `arguments.names` matches nothing, or the model cannot be tracked.
    """
    if arguments.every is None:
        return None
    return InternalsTracker(
        model,
        every=arguments.every,
        names=arguments.names,
        probe=probe,
        tokenizer=tokenizer,
        folder=folder / FOLDER,
        examples=arguments.probe_examples,
        maps=arguments.maps,
        updates=arguments.updates,
        stop_on_nonfinite=arguments.stop_on_nonfinite,
    )


def merged_over_processes(host: dict[tuple[str, str], Any]) -> dict[tuple[str, str], Any]:
    """The same groups with the numbers of all processes in them, on every process."""
    if _processes() == 1:
        return host
    merged: dict[tuple[str, str], Any] = {}
    for part in gather_object([host]):
        for (kind, name), values in part.items():
            known = merged.get((kind, name))
            merged[kind, name] = values if known is None else merge(kind, known, values)
    return merged


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a `steps.jsonl`; a last line that was not written to its end is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def _nonfinite_gradients(record: Mapping[str, Any]) -> list[dict[str, str]]:
    flags = record["gradients"]["flags"]
    return [
        {"module": f["layer"], "what": "gradient", "kind": "NaN or infinity"} for f in flags if f["flag"] == "nonfinite"
    ]


def _loss_scale(optimizer: Any) -> float:
    scaler = getattr(optimizer, "scaler", None)
    return float(scaler.get_scale()) if scaler is not None and scaler.is_enabled() else 1.0


def _processes() -> int:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if distributed else 1


def _is_main_process() -> bool:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not distributed or torch.distributed.get_rank() == 0


def _step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))
