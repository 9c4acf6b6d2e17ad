"""Streams that keep less, and work in blocks on disk: the same matrix whatever the memory, kills and processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from trainers.coupling import Coupling, CouplingAnalyzer, EncodedPiece
from trainers.coupling import analyzer as analyzer_module
from trainers.coupling.capture import LayerTerms
from trainers.coupling.gram import layer_gram, squared_norms
from trainers.coupling.layers import TargetLayer
from trainers.coupling.report import make_report
from trainers.coupling.sketch import TensorSketch
from trainers.coupling.store import DiskStore, fingerprint
from trainers.errors import UserError

from .tools import PIECES, tiny_model

ROOT = Path(__file__).resolve().parents[3]
ACCELERATE = ROOT / "recipes" / "accelerate_configs" / "multi_cpu.yaml"


def many_pieces(count: int, seed: int = 0) -> list[EncodedPiece]:
    generator = torch.Generator().manual_seed(seed)

    def tokens(low: int, high: int) -> tuple[int, ...]:
        length = int(torch.randint(low, high, (), generator=generator))
        return tuple(torch.randint(3, 48, (length,), generator=generator).tolist())

    return [EncodedPiece(f"p{index}", tokens(3, 14), tokens(1, 4)) for index in range(count)]


@pytest.fixture
def small_blocks(monkeypatch):
    """Memory so small that twenty pieces make several shards and blocks."""
    monkeypatch.setattr(analyzer_module, "SMALLEST_MEMORY", 1)

    def analyzer(model, memory: int = 300_000, **arguments) -> CouplingAnalyzer:
        return CouplingAnalyzer(model, memory=memory, tokens_per_batch=32, **arguments)

    return analyzer


def random_terms(counts: list[int], seed: int, one_hot: bool = False) -> LayerTerms:
    generator = torch.Generator().manual_seed(seed)
    owner = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    left = torch.randn(len(owner), 6, generator=generator, dtype=torch.float64)
    if one_hot:
        left = torch.randint(0, 6, (len(owner),), generator=generator)
    right = torch.randn(len(owner), 5, generator=generator, dtype=torch.float64)
    return LayerTerms(left, right, owner, [torch.randn(len(counts), 6, generator=generator, dtype=torch.float64)])


def materialised(terms: LayerTerms, count: int) -> torch.Tensor:
    gradients = torch.zeros(count, 6, 5, dtype=torch.float64)
    left = torch.nn.functional.one_hot(terms.left, 6).double() if terms.left.dim() == 1 else terms.left
    for token, piece in enumerate(terms.owner):
        gradients[piece] += left[token][:, None] * terms.right[token]
    return gradients


@pytest.mark.parametrize("one_hot", [False, True])
def test_inner_products_between_two_sets(monkeypatch, one_hot):
    monkeypatch.setattr("trainers.coupling.gram.BLOCK_TOKENS", 4)
    monkeypatch.setattr("trainers.coupling.gram.SLICE_ELEMENTS", 60)
    one, other = random_terms([3, 0, 7], 0, one_hot), random_terms([2, 5, 1, 4], 1, one_hot)
    expected = materialised(one, 3).flatten(1) @ materialised(other, 4).flatten(1).T
    expected += one.biases[0] @ other.biases[0].T
    for way in ("tokens", "materialise", None):
        found = layer_gram(one, 6, 3, way, other, 4)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    norms = materialised(one, 3).flatten(1).square().sum(1) + one.biases[0].square().sum(1)
    torch.testing.assert_close(squared_norms(one, 6, 3), norms, rtol=1e-12, atol=0)


@pytest.mark.parametrize("one_hot", [False, True])
def test_sketch_equals_its_definition(monkeypatch, one_hot):
    """Entry (row, column) goes to bucket h(row) + h'(column) mod D with sign s(row) s'(column); layers add up."""
    monkeypatch.setattr("trainers.coupling.sketch.CHUNK_TOKENS", 3)
    modules = [torch.nn.Linear(5, 6) for _ in range(2)]
    layers = [TargetLayer(f"l{index}", (module,), 6, 5) for index, module in enumerate(modules)]
    sketch = TensorSketch(layers, 11, seed=3)
    terms = [random_terms([3, 0, 7], 0, one_hot), random_terms([2, 5, 1], 1, one_hot)]
    expected = torch.zeros(3, 11, dtype=torch.float64)
    for part, (rows, columns, (bias,)) in zip(terms, sketch.layers, strict=True):
        gradients = materialised(part, 3)
        for row in range(6):
            expected[:, bias[0][row]] += bias[1][row] * part.biases[0][:, row]
            for column in range(5):
                bucket = (rows[0][row] + columns[0][column]) % 11
                expected[:, bucket] += rows[1][row] * columns[1][column] * gradients[:, row, column]
    torch.testing.assert_close(sketch.sketch(terms, 3), expected, rtol=0, atol=1e-12)


def test_sketch_estimates_inner_products_without_bias():
    layers = [TargetLayer("l", (torch.nn.Linear(5, 6),), 6, 5)]
    terms = random_terms([3, 4, 7], 0)
    exact = layer_gram(terms, 6, 3)
    sketches = [TensorSketch(layers, 64, seed).sketch([terms], 3) for seed in range(300)]
    estimates = torch.stack([sketch @ sketch.T for sketch in sketches])
    norms = exact.diagonal().sqrt()
    error = (estimates - exact) / norms[:, None] / norms
    assert error.mean(0).abs().max() < 4 * error.std(0).max() / 300**0.5
    assert error.std(0).max() < 2 / 64**0.5
    with pytest.raises(ValueError, match="at least 2"):
        TensorSketch(layers, 1)


def test_sketch_stream(tmp_path):
    model, pieces = tiny_model("gpt2"), many_pieces(20)
    exact = CouplingAnalyzer(model, stream="exact").fit(pieces)
    found = CouplingAnalyzer(model, stream="sketch-16384").fit(pieces)
    pairs = np.triu_indices(20, 1)
    difference = (found.matrix - exact.matrix)[pairs]
    assert 0 < np.sqrt((difference**2).mean()) < 0.1
    assert found.stream["name"] == "sketch-16384"
    assert found.stream["error"]["pairs"] == 55
    assert 0 < found.stream["error"]["rms"] < 0.1
    # Norms do not come from the sketch.
    np.testing.assert_allclose(found.gradient_norms, exact.gradient_norms, rtol=1e-10)
    np.testing.assert_allclose(found.layer_shares, exact.layer_shares, rtol=1e-10)
    assert found.balanced is None
    assert found.cost["stored_bytes"] == 20 * 16384 * 8
    with pytest.raises(UserError, match="only the sum over layers"):
        found.layer_matrix(found.layers[0])
    report = make_report(found, permutations=5)
    assert report["coupling_analysis"]["balanced"] is None
    again = Coupling.load(found.save(tmp_path))
    np.testing.assert_array_equal(again.matrix.round(5), found.matrix.round(5))
    np.testing.assert_array_equal(again.gradient_norms, found.gradient_norms)


@pytest.mark.parametrize("stream", ["exact", "top-3", "sketch-1024"])
@pytest.mark.parametrize("model_type", ["gpt2", "llama", "t5"])
def test_blocks_give_the_matrix_of_one_piece(model_type, stream, small_blocks, tmp_path):
    model, pieces = tiny_model(model_type), many_pieces(20)
    whole = CouplingAnalyzer(model, stream=stream, tokens_per_batch=32).fit(pieces)
    analyzer = small_blocks(model, stream=stream)
    found = analyzer.fit(pieces, tmp_path)
    parts = sorted(path.stem for path in analyzer.blocks_folder(pieces, tmp_path).iterdir())
    assert sum(name.startswith("gradients-") for name in parts) > (2 if stream == "exact" else 0)
    assert sum(name.startswith("products-") for name in parts) >= 3
    np.testing.assert_allclose(found.matrix, whole.matrix, atol=1e-6 if stream.startswith("sketch") else 1e-11)
    np.testing.assert_allclose(found.log_probs, whole.log_probs, rtol=1e-12)
    np.testing.assert_allclose(found.gradient_norms, whole.gradient_norms, rtol=1e-10)
    if stream == "top-3":
        assert found.stream["error"] == pytest.approx(whole.stream["error"], rel=1e-9)
    again = analyzer.fit(pieces, tmp_path)
    assert again.cost["blocks_found"] == len(parts)
    np.testing.assert_array_equal(again.matrix, found.matrix)


def test_only_the_sum_over_layers_of_many_pieces(small_blocks, tmp_path):
    model, pieces = tiny_model("gpt2"), many_pieces(20)
    whole = CouplingAnalyzer(model).fit(pieces)
    found = small_blocks(model, memory=20_000).fit(pieces, tmp_path)
    assert found.gram_per_layer is None
    assert found.gram.dtype == np.float32
    np.testing.assert_allclose(found.matrix, whole.matrix, atol=1e-6)
    np.testing.assert_allclose(found.layer_shares, whole.layer_shares, rtol=1e-10)


def test_adapters_tied_weights_and_biases_by_blocks(small_blocks, tmp_path):
    model = tiny_model("gemma2", tie_word_embeddings=True)
    for layers in ("lm_head", "all-linear"):
        whole = CouplingAnalyzer(model, layers=layers, tokens_per_batch=32).fit(PIECES)
        found = small_blocks(model, layers=layers).fit(PIECES, tmp_path)
        np.testing.assert_allclose(found.matrix, whole.matrix, atol=1e-11)


def test_another_analysis_has_a_folder_of_its_own(small_blocks, tmp_path):
    model, pieces = tiny_model("gpt2"), many_pieces(4)
    folders = {
        small_blocks(model, **changes).blocks_folder(pieces[:count], tmp_path)
        for changes, count in (({}, 4), ({}, 3), ({"answer": "first"}, 4), ({"memory": 10**6}, 4), ({"bias": False}, 4))
    }
    before = fingerprint(model, {})
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.weight[3, 4] += 1e-6
    assert fingerprint(model, {}) != before
    folders.add(small_blocks(model).blocks_folder(pieces, tmp_path))
    assert len(folders) == 6


def test_a_full_disk_leaves_the_finished_blocks(small_blocks, tmp_path, monkeypatch):
    model, pieces = tiny_model("gpt2"), many_pieces(20)
    analyzer = small_blocks(model)
    expected = analyzer.fit(pieces, tmp_path / "whole")
    plain, calls = analyzer_module.DiskStore.save, []

    def fills_up(self, name, tensors):
        calls.append(name)
        if len(calls) == 4:
            monkeypatch.setattr("trainers.coupling.store.save_file", full)
        plain(self, name, tensors)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(analyzer_module.DiskStore, "save", fills_up)
        with pytest.raises(UserError, match="No space left on device; the blocks finished before are kept"):
            analyzer.fit(pieces, tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(analyzer_module, "SMALLEST_MEMORY", 1)
    folder = analyzer.blocks_folder(pieces, tmp_path)
    assert sorted(path.stem for path in folder.iterdir()) == calls[:3]
    # A file that was cut short is not taken for finished.
    cut = folder / f"{calls[0]}.safetensors"
    cut.write_bytes(cut.read_bytes()[:-9])
    (folder / ".gradients-000001.safetensors.k3_x9ab0.safetensors").write_bytes(b"half")
    found = analyzer.fit(pieces, tmp_path)
    assert found.cost["blocks_found"] == 2
    assert not list(folder.glob(".*"))
    np.testing.assert_array_equal(found.gram_per_layer, expected.gram_per_layer)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="cannot keep blocks there"):
        DiskStore(tmp_path / "file" / "blocks")


def test_more_pieces_than_are_reported(monkeypatch):
    coupling = CouplingAnalyzer(tiny_model("gpt2")).fit(many_pieces(20))
    full = make_report(coupling, max_pairs=7, permutations=5)
    monkeypatch.setattr("trainers.coupling.report.MOST_REPORTED", 8)
    sampled = make_report(coupling, max_pairs=7, permutations=5)
    assert (sampled["metadata"]["pieces"], sampled["metadata"]["sampled_pieces"]) == (20, 8)
    assert len(sampled["knowledge_pieces"]["pieces"]) == 8
    for key in ("total_pairs", "undefined_pairs", "high_pairs", "moderate_pairs", "low_pairs", "high_ratio"):
        assert sampled["coupling_analysis"][key] == full["coupling_analysis"][key]
    for key in ("mean", "std", "min", "max"):
        assert sampled["coupling_analysis"][key] == pytest.approx(full["coupling_analysis"][key], rel=1e-12)
    assert sampled["high_coupling_pairs"]["pairs"] == [tuple(pair) for pair in full["high_coupling_pairs"]["pairs"]]
    json.dumps(sampled, allow_nan=False)


SCRIPT = """
import sys, time
from pathlib import Path
import numpy as np
from tests.trainers.coupling.test_blocks import many_pieces
from tests.trainers.coupling.tools import tiny_model
from trainers.coupling import CouplingAnalyzer, analyzer
analyzer.SMALLEST_MEMORY = 1
plain = analyzer.CouplingAnalyzer._shard
def slow(self, *arguments):
    time.sleep(float(sys.argv[2]))
    return plain(self, *arguments)
analyzer.CouplingAnalyzer._shard = slow
from accelerate import PartialState
coupling = CouplingAnalyzer(tiny_model("gpt2"), memory=300_000, tokens_per_batch=32).fit(many_pieces(20), sys.argv[1])
if PartialState().is_main_process:
    np.savez(Path(sys.argv[1]) / "result.npz", gram=coupling.gram_per_layer, found=coupling.cost["blocks_found"])
    print(PartialState().num_processes, "processes")
PartialState().destroy_process_group()
"""


def test_a_killed_run_goes_on_from_its_blocks(small_blocks, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    expected = small_blocks(tiny_model("gpt2")).fit(many_pieces(20), tmp_path / "whole")
    process = subprocess.Popen([sys.executable, str(script), str(tmp_path / "cut"), "0.3"], env=environment)
    while not list((tmp_path / "cut").glob("blocks-*/gradients-000001.safetensors")):
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "cut" / "result.npz").exists()
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "cut").glob("blocks-*/gradients-*.safetensors")}
    assert len(finished) >= 2
    done = subprocess.run([sys.executable, str(script), str(tmp_path / "cut"), "0"], env=environment)
    assert done.returncode == 0
    assert all(path.stat().st_mtime_ns == when for path, when in finished.items())
    result = np.load(tmp_path / "cut" / "result.npz")
    assert result["found"] == len(finished)
    np.testing.assert_array_equal(result["gram"], expected.gram_per_layer)


@pytest.mark.long
def test_two_processes_give_the_matrix_of_one(small_blocks, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ACCELERATE)]
    command += ["--main_process_port", "0", "--quiet", str(script), str(tmp_path / "two"), "0"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "2 processes"
    expected = small_blocks(tiny_model("gpt2")).fit(many_pieces(20), tmp_path / "one")
    np.testing.assert_array_equal(np.load(tmp_path / "two" / "result.npz")["gram"], expected.gram_per_layer)
