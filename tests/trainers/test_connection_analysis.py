"""Analysis of connections and reasoning: every number against its definition, and files that can be drawn again."""

import json
import math

import numpy as np
import pytest
import torch

from hf_models.connection_transformer import (
    ConnectionTransformerConfig,
    ConnectionTransformerForConditionalGeneration,
    ConnectionTransformerForSequenceClassification,
)
from hf_models.vanilla_transformer import VanillaTransformerConfig, VanillaTransformerForConditionalGeneration
from tests.hf_models.test_connection_transformer import pair_matrices
from trainers import connection_analysis
from trainers.connection_analysis import (
    analyse,
    clustered_order,
    connection_structure,
    connections_of,
    effective_rank,
    reasoning_patterns,
    write_connection_analysis,
)
from trainers.errors import UserError

TYPES = ("scalar", "per_pair", "block", "diagonal")
MATRIX_TYPES = TYPES[1:]


def make_model(connection_type="scalar", model_class=ConnectionTransformerForConditionalGeneration, **overrides):
    torch.manual_seed(0)
    settings = {
        "vocab_size": 30,
        "hidden_size": 12,
        "num_slots": 6,
        "connection_rank": 3,
        "max_reasoning_steps": 5,
        "num_decoder_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
        "connection_type": connection_type,
    }
    model = model_class(ConnectionTransformerConfig(**settings | overrides)).eval()
    with torch.no_grad():
        for parameter in connections_of(model).parameters():
            parameter.normal_(std=0.5)
    return model


def make_features(count=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 12, (count,), generator=generator).tolist()
    return [{"input_ids": torch.randint(3, 30, (length,), generator=generator).tolist()} for length in lengths]


def matrices_and_others(model):
    matrices = pair_matrices(connections_of(model)).detach().double()
    return matrices, ~torch.eye(len(matrices), dtype=torch.bool)


@pytest.mark.parametrize("connection_type", MATRIX_TYPES)
def test_structure_of_matrices(connection_type):
    model = make_model(connection_type)
    structure = connection_structure(model)
    matrices, others = matrices_and_others(model)
    strengths = matrices.flatten(2).norm(dim=-1).where(others, 0)
    np.testing.assert_allclose(structure["matrix"], strengths.numpy(), rtol=1e-4, atol=1e-5)
    traces = matrices.diagonal(dim1=2, dim2=3).sum(-1)[others]
    assert structure["positive_share"] == pytest.approx((traces > 0).double().mean().item())
    assert structure["positive_share"] + structure["negative_share"] == pytest.approx(1)
    values = torch.linalg.svdvals(matrices[others])[:, :3]
    energy = values.square().sum(0).cumsum(0)
    np.testing.assert_allclose(structure["energy_by_rank"], (energy / energy[-1]).numpy(), rtol=1e-5)
    shares = values / values.sum(1, keepdim=True)
    expected = (-(shares * shares.log()).sum(1)).exp().mean().item()
    assert structure["rank"] == {
        "counted": pytest.approx((values > 0.01 * values[:, :1]).double().sum(1).mean().item()),
        "entropy": pytest.approx(expected, rel=1e-5),
        "of_pairs": 30,
    }


@pytest.mark.parametrize("connection_type", TYPES)
def test_numbers_of_all_types(connection_type):
    model = make_model(connection_type)
    structure = connection_structure(model)
    matrix = connections_of(model).connection_matrix().detach().double()
    values = matrix[~torch.eye(6, dtype=torch.bool)].abs()
    median = values.quantile(0.5).item()
    assert structure["median_strength"] == pytest.approx(median)
    assert structure["max_strength"] == pytest.approx(values.max().item())
    for entry in structure["sparsity"]:
        below = (values < entry["relative_threshold"] * median).double().mean().item()
        assert entry["share"] == pytest.approx(below)
    shares = values / values.sum()
    assert structure["entropy"] == pytest.approx(-(shares * shares.log()).sum().item() / math.log(30), rel=1e-5)
    error = connections_of(model).orthogonality_penalty().item()
    assert structure["orthogonality_error"] == pytest.approx(error)
    assert sorted(structure["order"]) == list(range(6))
    assert structure["energy_by_rank"][-1] == pytest.approx(1)
    json.dumps(structure, allow_nan=False)


def test_signs_and_rank_of_scalars():
    model = make_model("scalar")
    matrix = connections_of(model).connection_matrix().detach()
    structure = connection_structure(model)
    np.testing.assert_allclose(structure["matrix"], matrix.numpy(), rtol=1e-4, atol=1e-6)
    positive = (matrix[~torch.eye(6, dtype=torch.bool)] > 0).double().mean().item()
    assert structure["positive_share"] == pytest.approx(positive)
    assert structure["rank"]["of_pairs"] == 1
    assert len(structure["energy_by_rank"]) == 6


def test_connections_that_are_all_zero():
    model = make_model("per_pair")
    with torch.no_grad():
        connections_of(model).source_weight.zero_()
    structure = connection_structure(model)
    assert (structure["max_strength"], structure["entropy"], structure["energy_by_rank"]) == (0, 0, [])
    assert structure["rank"]["counted"] == 0


def test_effective_rank():
    assert effective_rank(np.array([[1.0, 1.0, 1.0, 0.0]])) == {"counted": 3.0, "entropy": pytest.approx(3)}
    assert effective_rank(np.array([[5.0, 0.04]]))["counted"] == 1
    assert effective_rank(np.zeros((2, 3))) == {"counted": 0.0, "entropy": 0.0}


def test_clustered_slots_lie_beside_each_other():
    groups = np.array([0, 1, 0, 1, 0, 1])
    strengths = np.where(groups[:, None] == groups[None, :], 5.0, 0.1) * (1 - np.eye(6))
    order = groups[clustered_order(strengths)]
    assert np.abs(np.diff(order)).sum() == 1


def test_patterns_equal_what_single_examples_show():
    model, features = make_model("per_pair", halting_threshold=0.3), make_features()
    connections = connections_of(model)
    with torch.no_grad():
        for parameter in connections.parameters():
            parameter.mul_(0.4)
    patterns = reasoning_patterns(model, features, batch_size=7)
    alone = [
        model.model.encoder(
            input_ids=torch.tensor([feature["input_ids"]]),
            output_hidden_states=True,
            output_slot_updates=True,
            output_halting_measures=True,
            output_compression_weights=True,
        )
        for feature in features
    ]
    steps = [outputs.reasoning_steps.item() for outputs in alone]
    assert len(set(steps)) > 1
    assert [entry["examples"] for entry in patterns["steps"]["histogram"]] == [steps.count(one) for one in range(1, 6)]
    assert patterns["steps"]["mean"] == pytest.approx(sum(steps) / len(steps))
    assert patterns["steps"]["early_share"] == pytest.approx(sum(one < 5 for one in steps) / len(steps))
    assert patterns["steps"]["efficiency"] == pytest.approx(5 * len(steps) / sum(steps))
    for index, entry in enumerate(patterns["change"]):
        measures = [
            outputs.halting_measures[index].item() for outputs, one in zip(alone, steps, strict=True) if one > index
        ]
        assert entry["examples"] == len(measures)
        if measures:
            assert entry["median"] == pytest.approx(float(np.median(measures)), rel=1e-4)
    updates = [outputs.slot_updates[1][0].norm(dim=-1) for outputs, one in zip(alone, steps, strict=True) if one > 1]
    activity = torch.tensor(patterns["activity"])
    assert activity.shape == (6, max(steps))
    torch.testing.assert_close(activity[:, 1], torch.stack(updates).mean(0), rtol=1e-4, atol=1e-5)
    read = torch.zeros(6, 30)
    seen = torch.zeros(30)
    for feature, outputs in zip(features, alone, strict=True):
        for position, token in enumerate(feature["input_ids"]):
            read[:, token] += outputs.compression_weights[0][0, position]
            seen[token] += 1
    for slot, row in zip(patterns["slots"], read, strict=True):
        share = row / row.sum()
        excess = (share / (seen / seen.sum())).nan_to_num(0)
        assert slot["reads_most"][0]["token"] == str(excess.argmax().item())
        assert slot["reads_most"][0]["times_its_share"] == pytest.approx(excess.max().item(), rel=1e-4)
        entropy = -(share * share.clamp_min(1e-30).log()).sum() / math.log((seen > 0).sum())
        assert slot["entropy"] == pytest.approx(entropy.item(), rel=1e-4)
    paths = patterns["trajectories"]["paths"]
    assert len(paths) == 6
    assert {path["steps"] for path in paths} == set(steps)
    for path in paths:
        assert len(path["points"]) == path["steps"] + 1 == steps[path["example"]] + 1
    json.dumps(patterns, allow_nan=False)


def test_more_steps_than_configured_and_heads_without_a_decoder():
    model = make_model(model_class=ConnectionTransformerForSequenceClassification, halting_threshold=0.0)
    model.train()
    patterns = reasoning_patterns(model, make_features(3), max_reasoning_steps=7)
    assert model.training
    assert patterns["steps"]["histogram"][-1] == {"steps": 7, "examples": 3}
    assert patterns["steps"]["early_share"] == 0


@pytest.mark.parametrize("connection_type", ["scalar", "per_pair"])
def test_files_and_drawing_again(connection_type, tmp_path, capsys):
    model = make_model(connection_type)
    folder = tmp_path / "internals"
    analysis = write_connection_analysis(model, make_features(), None, folder, examples=5)
    assert analysis["reasoning"]["examples"] == 5
    pictures = ["connections.png", "reasoning.png", "slots.png"]
    assert sorted(path.name for path in folder.iterdir()) == sorted([*pictures, "connection_analysis.json"])
    assert json.loads((folder / "connection_analysis.json").read_text()) == analysis
    for name in pictures:
        (folder / name).unlink()
    assert connection_analysis.main([str(folder / "connection_analysis.json")]) == 0
    assert [(folder / name).read_bytes()[:4] for name in pictures] == [b"\x89PNG"] * 3
    assert str(folder / "slots.png") in capsys.readouterr().out


def test_mistakes_are_named(tmp_path, capsys):
    vanilla = VanillaTransformerForConditionalGeneration(
        VanillaTransformerConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    with pytest.raises(UserError, match="vanilla_transformer has no connections"):
        analyse(vanilla, make_features())
    with pytest.raises(UserError, match="features"):
        analyse(make_model(), [])
    for content, message in (("{}", "schema_version is None"), ("[]", "schema_version"), ("{", "line 1")):
        (tmp_path / "file.json").write_text(content)
        assert connection_analysis.main([str(tmp_path / "file.json")]) == 2
        assert message in capsys.readouterr().err
    assert connection_analysis.main([str(tmp_path / "none.json")]) == 2
