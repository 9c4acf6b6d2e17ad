"""The tracker during training: it changes nothing, misses nothing, and costs no memory that grows."""

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from transformers import Trainer, TrainingArguments
from transformers.modeling_utils import AttentionInterface

from tests.trainers.tracking.tools import make_batch, make_model
from trainers.errors import UserError
from trainers.tracking import InternalsTracker, TrackingArguments, make_tracker
from trainers.tracking.arguments import TrackingArguments as ArgumentsClass
from trainers.tracking.tracker import TIMES, NonFiniteError, read_records

ROOT = Path(__file__).resolve().parents[3]


def train(model, batches, tracker=None, clip=None, micro=1, steps=4):
    """A plain loop; `micro` micro-batches make one update. Returns losses and the gradients of every step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses, gradients = [], []

    def one_step(step):
        for part in range(micro):
            batch = batches[(step * micro + part) % len(batches)]
            loss = model(**batch).loss / micro
            loss.backward()
            losses.append(loss.detach().clone())
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        gradients.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
        optimizer.step()
        optimizer.zero_grad()

    for step in range(steps):
        if tracker is None:
            one_step(step)
        else:
            with tracker.step(step + 1, optimizer):
                one_step(step)
    return losses, gradients


def same(one, other):
    return all(a is b is None or torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", ["post_norm", "connection", "gpt2", "llama"])
def test_training_is_bit_identical(name):
    """With dropout, so that the random numbers must agree too."""
    dropout = {"post_norm": {"dropout": 0.2, "attention_dropout": 0.2}, "connection": {"dropout": 0.2}}
    results = []
    for tracked in (False, True):
        model = make_model(name, **dropout.get(name, {})).train()
        batches = [make_batch(model, seed=seed) for seed in range(3)]
        torch.manual_seed(5)
        if tracked:
            with InternalsTracker(model, every=2, probe=make_batch(model, seed=9)) as tracker:
                found = train(model, batches, tracker)
            assert [record["step"] for record in tracker.records] == [1, 2, 4]
            assert model.training
        else:
            found = train(model, batches)
        results.append((*found, list(model.state_dict().values()), torch.random.get_rng_state()))
    one, other = results
    assert same(one[0], other[0])
    assert all(same(*pair) for pair in zip(one[1], other[1], strict=True))
    assert same(one[2], other[2])
    assert torch.equal(one[3], other[3])


def hooks(model):
    return sum(
        len(getattr(module, kind))
        for module in model.modules()
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    )


def test_no_hook_between_tracked_steps():
    model = make_model("post_norm")
    before, interface, clip = hooks(model), AttentionInterface.get_interface, torch.nn.utils.clip_grad_norm_
    batch = make_batch(model)
    with InternalsTracker(model, every=3, probe=batch) as tracker:
        for step in range(1, 4):
            with tracker.step(step) as tracked:
                assert (hooks(model) > before) == tracked == (step != 2)
                assert (torch.nn.utils.clip_grad_norm_ is not clip) == tracked
                model(**batch).loss.backward()
            assert hooks(model) == before
        with pytest.raises(ZeroDivisionError), tracker.step(6):
            raise ZeroDivisionError
    assert hooks(model) == before
    assert AttentionInterface.get_interface is interface
    assert torch.nn.utils.clip_grad_norm_ is clip
    assert make_tracker(TrackingArguments(), model, batch, None, Path("unused")) is None


def without_times(record):
    return {key: value for key, value in record.items() if key not in TIMES}


def close(one, other, path="", tolerance=1e-5, skip=("zeros",)):
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one.keys() - set(skip):
            close(one[key], other[key], f"{path}.{key}", tolerance, skip)
    elif isinstance(one, list):
        for index, pair in enumerate(zip(one, other, strict=True)):
            close(*pair, f"{path}[{index}]", tolerance, skip)
    elif isinstance(one, float):
        assert one == pytest.approx(other, abs=tolerance, rel=tolerance), path
    else:
        assert one == other, path


def record_of(model, batches, micro=1, **options):
    with InternalsTracker(model, examples=99, **options) as tracker:
        train(model, batches, tracker, micro=micro, steps=1)
    return without_times(tracker.records[0])


def test_micro_batches_are_the_whole_batch():
    """Four micro-batches of one row each, equal in targets, against the batch of four."""
    whole = make_batch(make_model("post_norm"))
    whole["labels"] = whole["labels"].masked_fill(whole["labels"] == -100, 3)
    parts = [{name: values[row : row + 1] for name, values in whole.items()} for row in range(4)]
    one = record_of(make_model("post_norm").train(), [whole])
    four = record_of(make_model("post_norm").train(), parts, micro=4)
    # Which rows stand for the similarity of heads depends on the batch they are drawn from.
    close(one, four, skip=("zeros", "similarity"))
    assert one["attention"]["encoder.layers.0.self_attn"]["rows"] == 34


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_counts_once(reentrant):
    model = make_model("post_norm").train()
    plain = record_of(model, [make_batch(model)])
    model = make_model("post_norm").train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    found = record_of(model, [make_batch(model)])
    close(plain, found)
    assert len(found["activation_gradients"]) == 4


def test_autocast():
    model = make_model("post_norm").train()
    plain = record_of(model, [make_batch(model)])
    model = make_model("post_norm").train()
    with torch.autocast("cpu", torch.bfloat16):
        found = record_of(model, [make_batch(model)])
    assert found["not_reproduced"] == {}
    assert found["nonfinite"] == []
    for name, states in plain["states"].items():
        for what in ("query", "key", "value"):
            assert found["states"][name][what]["rms"] == pytest.approx(states[what]["rms"], rel=0.02)


def test_half_precision_does_not_overflow():
    """Sums of squares beyond 65504 in float16."""
    from trainers.tracking.capture import RunningSums

    sums = RunningSums()
    sums.moments("x.query", torch.full((10, 2, 64), 300.0, dtype=torch.float16))
    assert sums.to_host()["sum", "x.query"][:, 2] == pytest.approx([300.0**2 * 640] * 2)


def test_moments_against_numpy():
    from trainers.tracking.recorder import summarise
    from trainers.tracking.structure import Structure

    model = make_model("gpt2")
    structure = Structure(model)
    from trainers.tracking.capture import RunningSums

    generator = torch.Generator().manual_seed(0)
    states = torch.randn(50, 4, 16, generator=generator) * 3 + 100  # a mean far from 0 is hard on the variance
    sums = RunningSums()
    for part in states.split([7, 20, 23]):
        sums.moments("h.0.attn.query", part)
    found = summarise(sums.to_host(), structure)["states"]["h.0.attn"]["query"]
    precise = states.double().transpose(0, 1).reshape(4, -1)
    assert found["mean"] == pytest.approx(precise.mean(1).tolist(), rel=1e-7)
    assert found["std"] == pytest.approx(precise.std(1).tolist(), rel=1e-4)
    assert found["min"] == pytest.approx(precise.amin(1).tolist())
    assert found["max"] == pytest.approx(precise.amax(1).tolist())
    assert found["rms"] == pytest.approx(precise.square().mean(1).sqrt().tolist(), rel=1e-7)


def test_gradients_before_clipping_and_updates():
    model = make_model("pre_norm").train()
    batch = make_batch(model)
    model(**batch).loss.backward()
    wanted = {name: p.grad.norm().item() for name, p in model.named_parameters()}
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.zero_grad()
    with InternalsTracker(model) as tracker:
        train(model, [batch], tracker, clip=1e-3, steps=1)
    parameters = tracker.records[0]["gradients"]["parameters"]
    assert len(parameters) == len(wanted)
    for name, value in wanted.items():
        found = parameters[name.removeprefix("model.")]
        assert found["gradient"] == pytest.approx(value, rel=1e-5)
        assert found["weight"] == pytest.approx(weights[name].norm().item(), rel=1e-5)
        moved = (dict(model.named_parameters())[name].detach() - weights[name]).norm().item()
        if found["weight"]:
            assert found["update_to_weight"] == pytest.approx(moved / weights[name].norm().item(), rel=1e-5)
    layers = tracker.records[0]["gradients"]["layers"]
    inside = [value for name, value in wanted.items() if name.startswith("model.encoder.layers.0.")]
    assert layers["encoder.layers.0"]["norm"] == pytest.approx(math.hypot(*inside), rel=1e-5)
    assert layers["encoder.layers.0"]["index"] == 0


def test_updates_of_large_weights_are_sampled(monkeypatch):
    from trainers.tracking import gradients

    exact, sampled = [], []
    for found, size in ((exact, 10**6), (sampled, 64)):
        monkeypatch.setattr(gradients, "SAMPLED_WEIGHTS", size)
        model = make_model("gpt2").train()
        with InternalsTracker(model) as tracker:
            train(model, [make_batch(model)], tracker, steps=1)
        parameters = tracker.records[0]["gradients"]["parameters"]
        found += [parameters[f"h.0.{name}.weight"]["update_to_weight"] for name in ("mlp.c_fc", "attn.c_attn")]
    assert sampled != exact
    assert sampled == pytest.approx(exact, rel=0.3)


def test_activation_gradients():
    model = make_model("gpt2")
    batch = make_batch(model)
    kept = {}

    def keep(module, args, output):
        states = output[0] if isinstance(output, tuple) else output
        states.retain_grad()
        kept["states"] = states

    handle = model.transformer.h[0].register_forward_hook(keep)
    model(**batch).loss.backward()
    handle.remove()
    model.zero_grad()
    record = record_of(model, [batch])
    assert record["activation_gradients"]["h.0"]["norm"] == pytest.approx(kept["states"].grad.norm().item(), rel=1e-5)


def test_flags():
    from trainers.tracking.gradients import gradient_flags, log_slope

    def layer(rms, nonfinite=0):
        return {"rms": rms, "nonfinite": nonfinite}

    layers = {"a": layer(1.0), "b": layer(2.0), "c": layer(1e-4), "d": layer(3e3), "e": layer(0.0)}
    layers["f"] = layer(math.nan, 3)
    flags = {flag["layer"]: flag["flag"] for flag in gradient_flags(layers)}
    assert flags == {"c": "vanishing", "d": "exploding", "e": "zero", "f": "nonfinite"}
    assert log_slope([(0, 1.0), (1, math.e), (2, math.e**2)]) == pytest.approx(1.0)
    assert log_slope([(0, 1.0), (1, 0.0)]) is None


def poison(model):
    with torch.no_grad():
        model.model.encoder.layers[1].feed_forward.fc1.weight[0, 0] = math.nan


@pytest.mark.parametrize("stop", [False, True])
def test_nan_is_reported(stop, tmp_path, caplog):
    model = make_model("post_norm").train()
    poison(model)
    batch = make_batch(model)
    tracker = InternalsTracker(model, probe=batch, folder=tmp_path, stop_on_nonfinite=stop)
    with tracker:
        if stop:
            with pytest.raises(NonFiniteError, match=r"step 1: NaN in the output of encoder\.layers\.1\.feed_forward"):
                train(model, [batch], tracker, steps=1)
        else:
            train(model, [batch], tracker, steps=2)
    text = (tmp_path / "steps.jsonl").read_text()
    assert "NaN, " not in text.replace('"NaN"', "")
    record = json.loads(text.splitlines()[0])
    first = {"module": "encoder.layers.1.feed_forward.activation", "what": "output", "kind": "NaN"}
    assert record["nonfinite"][0] == first
    assert record["activations"]["encoder.layers.1"]["mean"] is None
    assert record["attention"]["decoder.layers.0.cross_attn"]["entropy"] == [None] * 4
    assert record["attention"]["encoder.layers.0.self_attn"]["entropy"][0] > 0
    assert {flag["flag"] for flag in record["gradients"]["flags"]} == {"nonfinite"}
    assert hooks(model) == hooks(make_model("post_norm"))


def test_a_gradient_alone_that_is_nan_stops(tmp_path):
    """Every number of the forward pass is finite, and so are the gradients at the layers' outputs."""
    model = make_model("post_norm").train()
    model.model.decoder.layers[0].self_attn.v_proj.bias.register_hook(lambda gradient: gradient * math.nan)
    batch = make_batch(model)
    rule = r"step 1: NaN or infinity in the gradient of decoder\.layers\.0$"
    tracker = InternalsTracker(model, folder=tmp_path, stop_on_nonfinite=True)
    with tracker, pytest.raises(NonFiniteError, match=rule):
        train(model, [batch], tracker, steps=1)
    record = json.loads((tmp_path / "steps.jsonl").read_text())
    assert record["nonfinite"] == []
    assert record["gradients"]["parameters"]["decoder.layers.0.self_attn.v_proj.bias"]["nonfinite"] == 16


def test_what_a_tracker_is_asked_wrongly(tmp_path):
    model = make_model("gpt2")
    with pytest.raises(UserError, match=r"^tracking.every is 0; it must be at least 1$"):
        InternalsTracker(model, every=0)
    tracker = InternalsTracker(model)
    with pytest.raises(RuntimeError, match="end_step without begin_step"):
        tracker.end_step()
    assert tracker.stored_maps() == {}, "maps are kept in a folder only"


def test_memory_does_not_grow(tmp_path):
    model = make_model("gpt2")
    batch = make_batch(model)
    with InternalsTracker(model, keep=3) as tracker:
        train(model, [batch], tracker, steps=6)
    assert [record["step"] for record in tracker.records] == [4, 5, 6]
    with InternalsTracker(model, probe=batch, folder=tmp_path, maps=4) as tracker:
        for steps in range(1, 14):
            with tracker.step(steps):
                model(**batch).loss.backward()
            assert len(tracker.stored_maps()) <= 4
    assert list(tracker.stored_maps()) == [1, 9, 13] or list(tracker.stored_maps()) == [1, 5, 9, 13]
    assert len(tracker.records) == 13
    weights = tracker.stored_maps()[13]["h.0.attn"].float()
    assert weights.shape == (4, 10, 10)
    torch.testing.assert_close(weights.sum(-1), torch.ones(4, 10), atol=2e-3, rtol=0)


class Rows(torch.utils.data.Dataset):
    def __init__(self, batch):
        self.batch = batch

    def __len__(self):
        return len(self.batch["input_ids"])

    def __getitem__(self, index):
        return {name: values[index] for name, values in self.batch.items()}


def trainer_for(folder, tracker_options, **options):
    model = make_model("post_norm", dropout=0.1).train()
    tracker = InternalsTracker(
        model, every=2, probe=make_batch(model, 2, seed=3), folder=folder / "internals", maps=3, **tracker_options
    )
    values = {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "use_cpu": True}
    values |= {"report_to": "none", "disable_tqdm": True, "save_steps": 3, "logging_steps": 2, "seed": 1} | options
    arguments = TrainingArguments(str(folder), **values)
    rows = Rows(make_batch(model, rows=32, seed=4))
    return Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[tracker]), tracker


def test_trainer_and_resume(tmp_path):
    """Six steps in one go, and six with a crash after the fifth, resumed from the third: the same records and maps."""
    straight, tracker = trainer_for(tmp_path / "straight", {})
    straight.train()
    records = tracker.records
    assert [record["step"] for record in records] == [1, 2, 4, 6]
    assert all(record["seconds"] <= record["training_seconds"] for record in records)

    class Crash(Exception):
        pass

    broken, _ = trainer_for(tmp_path / "broken", {})
    original = broken.training_step

    def crash(*arguments, **options):
        if broken.state.global_step == 5:
            raise Crash
        return original(*arguments, **options)

    broken.training_step = crash
    with pytest.raises(Crash):
        broken.train()
    left = tmp_path / "broken" / "internals" / "steps.jsonl"
    assert [record["step"] for record in read_records(left)] == [1, 2, 4]
    with open(left, "a", encoding="utf-8") as file:
        file.write('{"step": 5, "cut off')
    assert [record["step"] for record in read_records(left)] == [1, 2, 4]
    again, resumed = trainer_for(tmp_path / "broken", {})
    again.train(resume_from_checkpoint=True)
    assert [without_times(record) for record in resumed.records] == [without_times(record) for record in records]
    maps, resumed_maps = tracker.stored_maps(), resumed.stored_maps()
    assert list(maps) == list(resumed_maps)
    for step, found in maps.items():
        assert found.keys() == resumed_maps[step].keys()
        assert all(torch.equal(weights, resumed_maps[step][name]) for name, weights in found.items())
    assert same(straight.model.state_dict().values(), again.model.state_dict().values())


def test_trainer_with_accumulation_measures_unclipped_gradients(tmp_path):
    found = []
    for size, parts, clip in ((4, 1, 1.0), (2, 2, 1e-4)):
        trainer, tracker = trainer_for(
            tmp_path / str(size),
            {},
            per_device_train_batch_size=size,
            gradient_accumulation_steps=parts,
            max_grad_norm=clip,
            max_steps=1,
        )
        trainer.model.eval()  # dropout would differ between the two
        for module in trainer.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        trainer.train()
        found.append(tracker.records[0])
    one, other = found
    close(one["states"], other["states"])
    close(one["activations"], other["activations"])
    for name, layer in one["gradients"]["layers"].items():
        assert other["gradients"]["layers"][name]["norm"] == pytest.approx(layer["norm"], rel=1e-4)
    for name, entry in one["activation_gradients"].items():
        assert other["activation_gradients"][name]["norm"] == pytest.approx(entry["norm"], rel=1e-4)


def parallel_batch(model):
    batch = make_batch(model)
    # Equal numbers of targets on both processes, so that the mean of their losses is the loss of the whole.
    return batch | {"labels": batch["labels"].masked_fill(batch["labels"] == -100, 3)}


def worker(rank, port, folder):
    """One of two processes; each has half of the batch."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    PartialState(cpu=True)
    model = make_model("post_norm").train()
    part = {name: values[rank * 2 : rank * 2 + 2] for name, values in parallel_batch(model).items()}
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with InternalsTracker(model, examples=99, folder=folder) as tracker, tracker.step(1, optimizer):
        wrapped(**part).loss.backward()
        optimizer.step()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_processes_are_merged_exactly(tmp_path):
    model = make_model("post_norm").train()
    alone = record_of(model, [parallel_batch(model)])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    code = (
        "import sys; from tests.trainers.tracking.test_tracker import worker; worker(int(sys.argv[1]), *sys.argv[2:])"
    )
    command = [sys.executable, "-c", code]
    processes = [
        subprocess.Popen([*command, str(rank), port, str(tmp_path)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    records = read_records(tmp_path / "steps.jsonl")
    assert len(records) == 1
    close(alone, without_times(records[0]), skip=("zeros", "similarity"))


def test_arguments():
    assert ArgumentsClass().every is None
    assert ArgumentsClass(every=50, names=["decoder.*"]).names == ["decoder.*"]
    for values, message in (
        ({"names": "decoder.*"}, "tracking.names is set, but tracking.every is not"),
        ({"every": 0}, "tracking.every is 0; it must be at least 1"),
        ({"every": 1, "probe_examples": 0}, "tracking.probe_examples is 0"),
        ({"every": 1, "maps": 1}, "tracking.maps is 1; it must be at least 2"),
        ({"every": 1, "names": []}, "it must be a name or a list of names"),
        ({"every": 1.5}, "every"),
    ):
        with pytest.raises(Exception, match=message):
            ArgumentsClass(**values)
