"""Attention statistics: golden numbers, a plain form in loops, and what must not change them."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from trainers.tracking.attention import (
    RowGeometry,
    attention_rollout,
    attention_statistics,
    attention_summary,
    attention_sums,
    divergence_sums,
    head_class,
    head_similarity,
    source_relevance,
)

GOLDEN = Path(__file__).parents[2] / "golden" / "transformer"
NAMES = {
    "entropy_norm": "normalised_entropy",
    "mean_distance": "mean_distance",
    "relative_distance": "relative_distance",
    "confidence": "confidence",
    "effective_keys": "effective_keys",
}


def test_golden_patterns():
    """Every synthetic map, n = 8, 16 and 48, full and causal: the numbers, and a class that does not move with n."""
    maps = load_file(GOLDEN / "attention_patterns" / "maps.safetensors")
    expected = json.loads((GOLDEN / "attention_patterns" / "expected.json").read_text())
    assert set(maps) == set(expected)
    for name, patterns in expected.items():
        length = maps[name].shape[-1]
        visible = torch.ones(1, length, length, dtype=torch.bool)
        found = attention_statistics(maps[name].double()[None], visible.tril() if "causal" in name else visible)
        for head, (pattern, wanted) in enumerate(patterns.items()):
            for golden, ours in NAMES.items():
                if golden in wanted:
                    assert found[ours][head] == pytest.approx(wanted[golden], abs=2e-6), (name, pattern, golden)
            assert found["class"][head] == wanted["class"], (name, pattern)


@pytest.mark.parametrize("name", ["paper_tiny", "torch_default_final_norm"])
def test_golden_maps(name):
    """The maps of `torch.nn.Transformer` models: encoder, decoder and cross-attention, padding on either side."""
    tensors = load_file(GOLDEN / name / "io.safetensors")
    expected = json.loads((GOLDEN / name / "attention_stats.json").read_text())
    source, target = tensors["src"] != 0, tensors["tgt_in"] != 0
    assert any("cross" in key for key in expected)
    for key, wanted in expected.items():
        weights, is_cross, decodes = tensors[key].double(), "cross" in key, "decoder" in key
        visible = torch.ones(weights.shape[0], *weights.shape[2:], dtype=torch.bool)
        if decodes and not is_cross:
            visible = visible.tril()
        queries, keys = (target if decodes else source), (target if decodes and not is_cross else source)
        found = attention_statistics(weights, visible, queries, keys, is_cross)
        assert found["rows"] == wanted["rows_used"]
        for golden, ours in NAMES.items():
            assert found[ours] == pytest.approx(wanted[golden], abs=2e-6), (key, golden)
        assert found["class"] == wanted["class"]


def random_weights(batch, heads, queries, keys, visible, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(batch, heads, queries, keys, generator=generator, dtype=torch.float64) * 2
    return scores.masked_fill(~visible[:, None], -math.inf).softmax(-1).nan_to_num(0)


def plain(weights, visible, real_queries, is_cross):
    """The definitions, one row at a time."""
    batch, heads, queries, keys = weights.shape
    rows = {
        name: [[] for _ in range(heads)]
        for name in (
            "entropy",
            "normalised_entropy",
            "effective_keys",
            "mean_distance",
            "relative_distance",
            "confidence",
            "corrected_confidence",
            "sink_mass",
            "diagonal",
            "previous_token",
            "local_mass",
        )
    }
    for b in range(batch):
        for i in range(queries):
            seen = [j for j in range(keys) if visible[b, i, j]]
            n = len(seen)
            if not real_queries[b, i] or n < 4:
                continue
            for h in range(heads):
                p = {j: weights[b, h, i, j].item() for j in seen}
                entropy = -sum(value * math.log(value) for value in p.values() if value > 0)
                rows["entropy"][h].append(entropy)
                rows["normalised_entropy"][h].append(entropy / math.log(n))
                rows["effective_keys"][h].append(math.exp(entropy))
                top = max(p.values())
                rows["confidence"][h].append(top)
                rows["corrected_confidence"][h].append((top - 1 / n) / (1 - 1 / n))
                rows["sink_mass"][h].append(p[seen[0]])
                distance = {j: abs(i - j) for j in seen}
                mean = sum(p[j] * distance[j] for j in seen)
                rows["mean_distance"][h].append(mean)
                rows["relative_distance"][h].append(mean / (sum(distance.values()) / n))
                share = sum(distance[j] <= 2 for j in seen) / n
                if share < 1:
                    mass = sum(p[j] for j in seen if distance[j] <= 2)
                    rows["local_mass"][h].append((mass - share) / (1 - share))
                if i in p:
                    rows["diagonal"][h].append(p[i])
                if i - 1 in p:
                    rows["previous_token"][h].append(p[i - 1])
    return {name: [sum(v) / len(v) if v else None for v in per_head] for name, per_head in rows.items()}


@pytest.mark.parametrize("causal", [False, True])
def test_every_statistic_against_loops(causal):
    real = torch.ones(3, 9, dtype=torch.bool)
    real[1, 7:] = False
    real[2, :2] = False  # padding on the left
    visible = torch.ones(3, 9, 9, dtype=torch.bool) & real[:, None]
    visible = visible.tril() if causal else visible
    weights = random_weights(3, 2, 9, 9, visible)
    found = attention_statistics(weights, visible, real, real)
    for name, wanted in plain(weights, visible, real, False).items():
        assert found[name] == pytest.approx(wanted, abs=1e-12), name


def test_parts_add_up_to_the_whole():
    """Sums of two halves are the sums of all: rows are weighed alike, however long their sequences are."""
    real = torch.ones(4, 8, dtype=torch.bool)
    real[0, 3:] = real[3, 6:] = False
    visible = (torch.ones(4, 8, 8, dtype=torch.bool) & real[:, None]).tril()
    weights = random_weights(4, 3, 8, 8, visible)

    def sums(rows):
        geometry = RowGeometry.of(visible[rows], real[rows], real[rows], dtype=torch.float64)
        return attention_sums(weights[rows], geometry), divergence_sums(weights[rows], geometry.used)

    whole, parts = sums(slice(None)), [sums(slice(0, 1)), sums(slice(1, 4))]
    for index in range(2):
        torch.testing.assert_close(parts[0][index] + parts[1][index], whole[index], rtol=1e-12, atol=1e-12)
    alone = attention_summary(sums(slice(0, 1))[0].numpy())
    assert alone["rows"] == 0
    assert alone["entropy"] == [None] * 3
    assert alone["class"] == [None] * 3


def test_cross_attention_without_an_order_has_no_distances():
    weights = torch.full((1, 2, 5, 6), 1 / 6, dtype=torch.float64)
    visible = torch.ones(1, 5, 6, dtype=torch.bool)
    geometry = RowGeometry.of(visible, is_cross=True, has_positions=False, dtype=torch.float64)
    found = attention_summary(attention_sums(weights, geometry).numpy())
    assert found["relative_distance"] == found["previous_token"] == found["diagonal"] == [None, None]
    assert found["class"] == ["diffuse", "diffuse"]
    assert found["range"] == [None, None]


def test_monotone_cross_attention_is_near_the_diagonal_of_real_lengths():
    """Four real queries on eight real keys, the rest padding: query i looks at keys 2i and 2i + 1."""
    weights = torch.zeros(1, 1, 6, 10, dtype=torch.float64)
    for query in range(4):
        weights[0, 0, query, 2 * query : 2 * query + 2] = 0.5
    queries, keys = torch.tensor([[1, 1, 1, 1, 0, 0]]), torch.tensor([[1] * 8 + [0] * 2])
    found = attention_statistics(weights, None, queries, keys, is_cross=True)
    assert found["rows"] == 4
    assert found["mean_distance"][0] == pytest.approx(1 / 16)
    assert found["class"] == ["local"]


def test_classes_at_their_borders():
    assert [head_class(h, r) for h, r in ((0.9, 0.5), (0.8, 0.51), (0.5, 1), (0.79, 1))] == [
        "local",
        "diffuse",
        "focused",
        "global",
    ]
    assert head_class(math.nan, 1.0) is None


def test_similarity_is_one_minus_the_divergence():
    visible = torch.ones(2, 6, 6, dtype=torch.bool)
    weights = random_weights(2, 4, 6, 6, visible)
    weights[:, 1] = weights[:, 0]
    weights[:, 2] = torch.eye(6)
    weights[:, 3] = torch.eye(6).roll(1, 0)
    used = torch.ones(2, 6, dtype=torch.bool)
    used[1, 4:] = False
    found = head_similarity(divergence_sums(weights, used).numpy())
    total = 0.0
    for p, q in zip(weights[:, 0][used], weights[:, 2][used], strict=True):
        middle = (p + q) / 2
        for side in (p, q):
            total += sum(0.5 * v * math.log2(v / m) for v, m in zip(side, middle, strict=True) if v)
    assert found[0][1] == pytest.approx(1)
    assert found[2][3] == pytest.approx(0)
    assert found[0][2] == found[2][0] == pytest.approx(1 - total / int(used.sum()))
    few = divergence_sums(weights, used, most_rows=3)
    assert few[0, -1] == 3


def test_rollout():
    visible = torch.ones(2, 5, 5, dtype=torch.bool)
    maps = [random_weights(2, 3, 5, 5, visible, seed) for seed in range(3)]
    real = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    wanted = torch.eye(5, dtype=torch.float64).expand(2, 5, 5)
    for weights in maps:
        layer = 0.5 * weights.mean(1) + 0.5 * torch.eye(5)
        layer[1, 3:] = torch.eye(5, dtype=torch.float64)[3:]
        wanted = layer @ wanted
    rolled = attention_rollout(maps, real)
    torch.testing.assert_close(rolled, wanted)
    torch.testing.assert_close(rolled.sum(-1), torch.ones(2, 5, dtype=torch.float64))
    cross = [random_weights(2, 3, 4, 5, torch.ones(2, 4, 5, dtype=torch.bool))]
    decoder = [random_weights(2, 3, 4, 4, torch.ones(2, 4, 4, dtype=torch.bool).tril())]
    relevance = source_relevance(maps, decoder, cross, real)
    assert relevance.shape == (2, 4, 5)
    torch.testing.assert_close(relevance.sum(-1), torch.ones(2, 4, dtype=torch.float64))
