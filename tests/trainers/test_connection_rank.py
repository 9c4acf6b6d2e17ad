"""Ranks of learnt connections: energies and cut models against full matrices."""

import pytest
import torch

from tests.trainers.test_connection_analysis import TYPES, make_features, make_model, matrices_and_others
from trainers.connection_analysis import batches_of, connections_of
from trainers.connection_rank import choose_rank, kept_energy, rank_report, truncated
from trainers.errors import UserError


def logits(model):
    batch = batches_of(make_features(4), 0, 4, model.device)[0]
    with torch.no_grad():
        return model(**batch, decoder_input_ids=torch.tensor([[1, 5, 7]] * 4)).logits


@pytest.mark.parametrize("connection_type", TYPES)
def test_the_full_rank_changes_nothing(connection_type):
    model = make_model(connection_type)
    same = truncated(model, 3)
    assert same is not model
    torch.testing.assert_close(logits(same), logits(model), rtol=1e-3, atol=1e-4)
    assert kept_energy(model)[-1] == pytest.approx(1)


@pytest.mark.parametrize("rank", [1, 2])
def test_per_pair_connections_keep_the_best_approximation(rank):
    model = make_model("per_pair")
    matrices, others = matrices_and_others(model)
    left, values, right = torch.linalg.svd(matrices)
    best = left[..., :rank] * values[..., None, :rank] @ right[..., :rank, :]
    cut, _ = matrices_and_others(truncated(model, rank))
    torch.testing.assert_close(cut[others], best[others], rtol=1e-4, atol=1e-5)
    energy = best[others].square().sum() / matrices[others].square().sum()
    assert kept_energy(model)[rank - 1].item() == pytest.approx(energy.item(), rel=1e-5)


def test_block_connections_keep_the_energy_they_say():
    model = make_model("block")
    matrices, others = matrices_and_others(model)
    for rank in (1, 2):
        cut, _ = matrices_and_others(truncated(model, rank))
        energy = cut[others].square().sum() / matrices[others].square().sum()
        assert kept_energy(model)[rank - 1].item() == pytest.approx(energy.item(), rel=1e-4)
        # A projection: what is cut off is orthogonal to what is kept.
        rest = (matrices - cut)[others].square().sum() / matrices[others].square().sum()
        assert rest.item() == pytest.approx(1 - energy.item(), rel=1e-3)


@pytest.mark.parametrize("connection_type", ["per_pair", "block", "diagonal"])
def test_rank_that_is_not_used_is_found_and_left_out(connection_type):
    model = make_model(connection_type)
    connections = connections_of(model)
    with torch.no_grad():
        # The second of three components of every slot does nothing.
        if connection_type == "per_pair":
            source, _ = connections.unpack(connections.source_weight, connections.target_weight)
            source[..., 1] = 0
        else:
            connections.source_weight[:, :, 1] = 0
            connections.target_weight[:, 1] = 0
    assert choose_rank(model, 1.0) == 2
    smaller = truncated(model, 2)
    assert smaller.config.connection_rank == 2
    assert smaller.num_parameters() < model.num_parameters()
    torch.testing.assert_close(logits(smaller), logits(model), rtol=1e-3, atol=1e-4)


def test_scalars_need_rank_one():
    model = make_model("scalar")
    assert choose_rank(model, 1.0) == 1
    torch.testing.assert_close(logits(truncated(model, 1)), logits(model), rtol=1e-3, atol=1e-4)


def test_diagonal_components_by_their_energy():
    model = make_model("diagonal")
    with torch.no_grad():
        connections_of(model).core_weight[0] *= 1e-3
    cut, original = connections_of(truncated(model, 2)), connections_of(model)
    assert torch.equal(cut.core_weight, original.core_weight[1:])
    assert torch.equal(cut.source_weight, original.source_weight[:, :, 1:])


def test_rank_larger_than_the_width():
    model = make_model("per_pair", connection_rank=20)
    assert choose_rank(model, 1.0) <= 12
    torch.testing.assert_close(logits(truncated(model, 14)), logits(model), rtol=1e-3, atol=1e-3)


def test_report_measures_each_rank_once():
    model, measured = make_model("per_pair"), []

    def score(one):
        measured.append(one.config.connection_rank)
        return one.config.connection_rank / 10

    report = rank_report(model, score, energies=(0.01, 0.02, 1.0))
    assert report["before"] == {"rank": 3, "parameters": model.num_parameters(), "score": 0.3}
    assert [(entry["energy"], entry["rank"]) for entry in report["after"]] == [(0.02, 1), (1.0, 3)]
    assert report["after"][0]["energy_kept"] == pytest.approx(kept_energy(model)[0].item())
    assert report["after"][0]["parameters"] < report["before"]["parameters"]
    assert measured == [3, 1, 3]


@pytest.mark.parametrize("energy", [0, -1, 1.5])
def test_energy_out_of_range(energy):
    with pytest.raises(UserError, match="energy"):
        choose_rank(make_model(), energy)


@pytest.mark.parametrize("rank", [0, 4])
def test_rank_out_of_range(rank):
    with pytest.raises(UserError, match="rank"):
        truncated(make_model(), rank)
