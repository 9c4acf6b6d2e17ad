"""Table connectivity: stored cases, graph libraries as oracles, balanced labels, and the rules a model has to beat."""

import hashlib
import itertools
import json
import math
from pathlib import Path

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from hf_models.in_context_transformer import (
    LowRankInContextTransformerConfig,
    LowRankInContextTransformerForSequenceClassification,
)
from trainers.errors import UserError
from trainers.tasks.in_context import IN_CONTEXT_TASKS, TableConnectivity
from trainers.tasks.in_context.table_connectivity import (
    UNREACHABLE,
    adjacency,
    at_most,
    closure,
    components,
    distances,
    hand_over,
    majority,
    members,
    search,
    shortest_paths,
    within_hops,
)

CASES = json.loads((Path(__file__).parents[2] / "golden" / "lowrank" / "table_connectivity_cases.json").read_text())


def tables(**options):
    return TableConnectivity({"names": "random", "n_dims": 6} | options)


def graph_of(columns):
    """Tables and columns as nodes, joined where a table holds a column."""
    graph = nx.Graph()
    for table, held in enumerate(columns):
        graph.add_node(("table", table))
        graph.add_edges_from((("table", table), ("column", column)) for column in held)
    return graph


# Stored cases


@pytest.mark.parametrize("case", CASES, ids=[case.get("note", str(number)) for number, case in enumerate(CASES)])
def test_stored_case(case):
    columns, query = torch.tensor([case["columns"]]), torch.tensor([case["query"]])
    num_ids = case["V"] * case["C"]
    _, to_columns = distances(columns, query[:, 0], num_ids)
    length = to_columns[0, query[0, 1]].item()
    assert (1 if length != UNREACHABLE else -1) == case["label"]
    assert length == (UNREACHABLE if case["tables_on_path"] is None else case["tables_on_path"])
    if "writes_u_v_slotv_slotu" in case:
        writes = np.array(case["writes_u_v_slotv_slotu"], dtype=np.int64).reshape(-1, 4)
        initial = np.array(case["initial_columns"])[:, :, None]
        final = hand_over(initial, [(np.zeros(len(writes), dtype=np.int64), *writes.T)])
        np.testing.assert_array_equal(final[:, :, 0], case["columns"])


def test_labels_of_drawn_graphs_would_be_wrong():
    """A later write may destroy an earlier link: the reason for labels from the final columns."""
    drawn = [case for case in CASES if "connected_in_drawn_graph" in case]
    for case in drawn:
        graph = nx.Graph()
        graph.add_nodes_from(range(case["V"]))
        graph.add_edges_from(write[:2] for write in case["writes_u_v_slotv_slotu"])
        assert nx.has_path(graph, *case["query_tables"]) == case["connected_in_drawn_graph"]
    assert len(drawn) == 60
    assert sum(case["connected_in_drawn_graph"] != (case["label"] == 1) for case in drawn) == 8


# Oracles


@given(num_tables=st.integers(2, 9), num_columns=st.integers(1, 4), rho=st.floats(0, 1), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_handing_over_equals_writing_one_by_one(num_tables, num_columns, rho, seed):
    generator = np.random.default_rng(seed)
    batch_size = 3
    initial = generator.permuted(np.tile(np.arange(num_tables * num_columns)[:, None], batch_size), axis=0)
    initial = initial.reshape(num_tables, num_columns, batch_size)
    expected, blocks = initial.copy(), []
    for row in range(batch_size):
        writes = []
        for source in range(num_tables):
            for target in range(source + 1, num_tables):
                if generator.random() < rho:
                    slot, source_slot = generator.integers(num_columns, size=2)
                    writes.append((row, source, target, slot, source_slot))
                    expected[target, slot, row] = expected[source, source_slot, row]
        blocks.append(np.array(writes, dtype=np.int64).reshape(-1, 5).T)
    np.testing.assert_array_equal(hand_over(initial, blocks), expected)


@given(num_tables=st.integers(2, 9), num_columns=st.integers(1, 4), num_ids=st.integers(1, 30), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_components_distances_and_paths_equal_those_of_networkx(num_tables, num_columns, num_ids, seed):
    generator = torch.Generator().manual_seed(seed)
    columns = torch.randint(num_ids, (3, num_tables, num_columns), generator=generator)
    query = torch.randint(num_ids, (3, 2), generator=generator)
    labels = components(columns, num_ids)
    to_tables, to_columns = distances(columns, query[:, 0], num_ids)
    paths = shortest_paths(columns, query, num_ids)
    for row in range(3):
        graph = graph_of(columns[row].tolist())
        for component in nx.connected_components(graph):
            members = sorted(number for kind, number in component if kind == "table")
            assert set(labels[row, members].tolist()) == {members[0]}
        start, end = (("column", column) for column in query[row].tolist())
        graph.add_nodes_from([start, end])
        steps = nx.single_source_shortest_path_length(graph, start)
        # Every second node on the way is a table.
        expected = [steps.get(("table", table), -1) for table in range(num_tables)]
        assert to_tables[row].tolist() == [(step + 1) // 2 if step >= 0 else UNREACHABLE for step in expected]
        expected = [steps.get(("column", column), -2) for column in range(num_ids)]
        assert to_columns[row].tolist() == [step // 2 for step in expected]

        path = [number for number in paths[row].tolist() if number != UNREACHABLE]
        if end not in steps:
            assert path == []
            continue
        nodes = [("table" if place % 2 else "column", number) for place, number in enumerate(path)]
        assert (nodes[0], nodes[-1], len(nodes)) == (start, end, steps[end] + 1)
        assert all(graph.has_edge(*pair) for pair in itertools.pairwise(nodes))


@pytest.mark.parametrize("num_tables", [2, 8, 9, 33, 64])
@pytest.mark.parametrize("num_ids", [3, 40, 300])
def test_sets_of_tables_say_what_the_general_search_says(num_tables, num_ids):
    """The sets fill their numbers to the last bit; with few ids all tables are connected, with many hardly any."""
    columns = torch.randint(num_ids, (50, num_tables, 2), generator=torch.Generator().manual_seed(num_tables))
    query = columns.flatten(1)[:, [0, -1]]
    tables_last, query_last = (tensor.permute(*range(1, tensor.ndim), 0).numpy() for tensor in (columns, query))
    connected = closure(adjacency(tables_last, num_ids))
    labels = components(columns, num_ids)
    for table, row in enumerate(members(connected.reshape(-1), num_tables).reshape(num_tables, num_tables, 50)):
        np.testing.assert_array_equal(row.T, labels == labels[:, [table]])
    length, reached = search(tables_last, query_last, num_ids)
    to_tables, to_columns = distances(columns, query[:, 0], num_ids)
    np.testing.assert_array_equal(length, to_columns.gather(1, query[:, 1:]).squeeze(1))
    np.testing.assert_array_equal(reached.T, to_tables != UNREACHABLE)


@pytest.mark.parametrize(
    "options",
    [
        {"num_tables": 20, "num_columns": 3, "rho": 0.1},
        {"num_tables": 5, "num_columns": 1, "rho": 0.3},
        {"num_tables": 6, "num_columns": 3, "rho": 0.3, "path_length": 3},
        {"num_tables": 4, "num_columns": 2, "rho": 0.5, "balanced": False},
        {"num_tables": 6, "num_columns": 2, "max_tables": 9},
        {"num_tables": 70, "num_columns": 2, "rho": 0.02},
        {"num_tables": 5, "num_columns": 2, "rho": 1.0, "balanced": False},
    ],
    ids=str,
)
def test_questions_are_answered_right(options):
    task = tables(**options)
    questions = task.questions("train", range(60))
    for row in range(60):
        columns, query = questions.columns[row].tolist(), questions.query[row].tolist()
        graph = graph_of(columns)
        assert nx.has_path(graph, *(("column", column) for column in query)) == questions.connected[row]
        first, second = questions.query_tables[row].tolist()
        assert query[0] in columns[first]
        assert query[1] in columns[second]
        if options.get("path_length") is None:
            assert first != second
        elif questions.connected[row]:
            assert questions.path_length[row] == options["path_length"]
        for table, connected in enumerate(questions.tables_connected[row].tolist()):
            assert nx.has_path(graph, ("column", query[0]), ("table", table)) == connected
        if options.get("balanced", True):
            assert nx.number_connected_components(graph) > 1


# What a prompt depends on


def test_a_prompt_depends_on_seed_split_and_index_alone():
    task = tables(num_tables=5)
    whole = task.batch("train", range(40))
    for indices in ([7], [39, 0, 13, 13], list(range(39, 4, -5)), []):
        part = task.batch("train", indices)
        for name, values in part.items():
            assert torch.equal(values, whole[name][indices]), name
    again = tables(num_tables=5).batch("train", range(40))
    assert all(torch.equal(values, again[name]) for name, values in whole.items())
    for other in (
        TableConnectivity(task.options.__dict__, seed=1).batch("train", range(40)),
        task.batch("test", range(40)),
    ):
        assert not torch.equal(other["input_values"], whole["input_values"])
    with pytest.raises(ValueError, match="unknown split"):
        task.batch("dev", [0])


# Of the 100 first test prompts and of 20 far ones, in every number but those of the names.
STORED_PROMPTS = [
    ({}, "d1e018a8f10bb66d"),
    ({"num_tables": 20, "num_columns": 3, "rho": 0.1}, "257c75270d61ea6a"),
    ({"num_tables": 20, "num_columns": 3, "rho": 0.5, "balanced": False}, "4f54dcd8a80f3fa7"),
    ({"num_tables": 20, "num_columns": 3, "rho": 0.6}, "9b06aae60b2eedf6"),
    ({"num_tables": 6, "num_columns": 3, "rho": 0.3, "path_length": 3}, "653061228b990c95"),
    ({"num_columns": 3, "max_path_length": 2, "max_tables": 12}, "6d3c83639b2e53d5"),
    ({"autoregressive": True}, "acbdc4f694a559cb"),
    ({"num_tables": 70, "num_columns": 2, "rho": 0.02}, "0aa9086e56d05072"),
]


@pytest.mark.parametrize(("options", "digest"), STORED_PROMPTS, ids=str)
def test_prompts_stay_what_they_are(options, digest):
    """Runs are repeated from their recipes: the prompts of a seed are a promise."""
    assert prompts_digest(tables(**options), list(range(100)) + list(range(10**9, 10**9 + 20))) == digest


def prompts_digest(task, indices):
    questions = task.questions("test", indices)
    ids = task.token_ids(questions, task.streams("test", indices, "names of tables"))
    batch = task.batch("test", indices)
    parts = [*questions, ids, *(batch[name] for name in ("labels", "block_targets", "path_length"))]
    return hashlib.sha256(b"".join(part.long().numpy().astype("<i8").tobytes() for part in parts)).hexdigest()[:16]


def test_a_data_loader_gets_the_same_prompts():
    dataset = tables().dataset("validation", 10)
    assert len(dataset) == 10
    whole = dataset.task.batch("validation", range(10))
    batches = list(DataLoader(dataset, batch_size=4))
    for name, values in whole.items():
        assert torch.equal(torch.cat([batch[name] for batch in batches]), values)
    assert torch.equal(dataset[-1]["labels"], whole["labels"][9])
    with pytest.raises(IndexError):
        dataset[10]


# Labels


@pytest.mark.parametrize("path_length", [None, 2])
def test_labels_are_balanced_by_construction(path_length):
    task = tables(num_tables=6, rho=0.3, path_length=path_length)
    labels = task.batch("train", range(2000))["labels"]
    assert set(labels.tolist()) == {1, -1}
    assert (labels.view(-1, 2).sum(dim=1) == 0).all()
    # Neither kind comes first by rule.
    assert 0.45 < (labels[::2] == 1).double().mean() < 0.55


def test_a_graph_says_nothing_about_its_label():
    """Numbers of different columns and of components are alike for both labels, up to chance."""
    questions = tables(num_tables=6, rho=0.25).questions("train", range(8000))
    distinct = torch.tensor([len(row.unique()) for row in questions.columns]).double()
    num_components = (components(questions.columns, 12) == torch.arange(6)).sum(dim=1).double()
    for statistic in (distinct, num_components):
        gap = statistic[questions.connected].mean() - statistic[~questions.connected].mean()
        assert abs(gap) < 4 * statistic.std() * math.sqrt(2 / 4000)


# Accuracies of rules on balanced questions, as another implementation of the sampling measured them.
KNOWN_RULES = [
    ({"num_tables": 6, "num_columns": 2, "rho": 0.2}, {1: 0.918, 2: 0.990}, {}),
    ({"num_tables": 6, "num_columns": 2, "rho": 0.25}, {}, {0: 0.609, 1: 0.835, 2: 0.970, 3: 0.997}),
    ({"num_tables": 8, "num_columns": 2, "rho": 0.2}, {1: 0.858, 2: 0.968}, {0: 0.592, 1: 0.806, 2: 0.946, 3: 0.992}),
    ({"num_tables": 8, "num_columns": 3, "rho": 0.2}, {1: 0.825, 2: 0.953}, {0: 0.535, 1: 0.699, 2: 0.896}),
    ({"num_tables": 20, "num_columns": 3, "rho": 0.1}, {1: 0.662, 2: 0.799, 3: 0.895}, {1: 0.611, 2: 0.759, 5: 0.976}),
]


@pytest.mark.parametrize(("options", "hops", "lengths"), KNOWN_RULES, ids=lambda value: str(value))
def test_rules_reach_their_known_accuracy(options, hops, lengths):
    questions = tables(**options).questions("test", range(6000))
    # Four standard errors of 6,000 answers, and rounding of the known value.
    for rule, known in ((within_hops, hops), (at_most, lengths)):
        for limit, accuracy in known.items():
            reached = (rule(questions, limit) == questions.connected).double().mean().item()
            assert reached == pytest.approx(accuracy, abs=4 * math.sqrt(0.25 / 6000) + 1e-3), (rule, limit)


@pytest.mark.parametrize(
    ("num_tables", "num_columns", "rho", "share"),
    [(20, 3, 0.5, 0.993), (20, 3, 0.1, 0.470), (8, 2, 0.2, 0.384), (6, 2, 0.3, 0.481)],
)
def test_free_questions_have_the_known_share_of_yes(num_tables, num_columns, rho, share):
    task = tables(num_tables=num_tables, num_columns=num_columns, rho=rho, balanced=False)
    labels = task.batch("train", range(4000))["labels"]
    reached = (labels == 1).double().mean().item()
    # Four standard errors, at most.
    assert reached == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / 4000) + 1e-3)
    if share > 0.9:
        assert f"{reached:.1%} of the labels are alike" in task.warning(labels)
    else:
        assert task.warning(labels) is None
    assert majority(labels) == (1 if reached >= 0.5 else -1)


# Prompts


def test_layout_of_a_prompt():
    task = TableConnectivity({"num_tables": 4, "num_columns": 2, "n_dims": 20, "max_tables": 6})
    batch, questions = task.batch("train", range(30)), task.questions("train", range(30))
    assert batch["input_values"].shape == (30, 4 * 3 + 3, 20)
    apart = torch.cdist(batch["input_values"], task.names)
    ids = apart.argmin(dim=-1)
    assert torch.equal(task.names[ids], batch["input_values"])
    blocks = ids[:, :12].view(30, 4, 3)
    assert torch.equal(blocks[:, :, 1:], questions.columns)
    table_names = blocks[:, :, 0] - 12
    assert set(table_names.flatten().tolist()) == set(range(6))
    assert all(len(set(row)) == 4 for row in table_names.tolist())
    assert (batch["input_values"][:, 12] == 0).all()
    assert torch.equal(ids[:, 13:], questions.query)
    assert set(questions.columns.flatten().tolist()) == set(range(12))
    assert torch.equal(batch["block_targets"] > 0, questions.tables_connected)
    assert torch.equal(batch["path_length"], questions.path_length)


def test_orthogonal_names():
    names = TableConnectivity({"num_tables": 8, "num_columns": 2, "n_dims": 24}).names
    products = names[:-1] @ names[:-1].T
    torch.testing.assert_close(products, 24 * torch.eye(24), rtol=0, atol=1e-4)
    other = TableConnectivity({"num_tables": 8, "num_columns": 2, "n_dims": 24, "names_seed": 1}).names
    assert not torch.equal(names, other)


def test_a_model_takes_a_batch():
    options = {"num_tables": 5, "num_columns": 3, "n_dims": 20}
    batch = TableConnectivity(options).batch("train", range(8))
    config = LowRankInContextTransformerConfig(
        n_dims=20, num_blocks=5, block_size=4, hidden_size=8, num_hidden_layers=3, num_attention_heads=2
    )
    length = batch.pop("path_length")
    assert length.shape == (8,)
    result = LowRankInContextTransformerForSequenceClassification(config)(**batch)
    assert result.logits.shape == (8, 1)
    assert result.loss.item() == pytest.approx(2 * math.log(2), rel=0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_tables": 1}, "num_tables is 1; it must be at least 2"),
        ({"num_columns": 0}, "num_columns is 0; it must be at least 1"),
        ({"rho": 1.5}, r"rho is 1.5; it must lie in \[0, 1\]"),
        ({"rho": -0.1}, "rho is -0.1"),
        ({"names": "orthogonal", "n_dims": 23}, "n_dims is 23; 24 orthogonal names"),
        ({"n_dims": 0}, "n_dims is 0"),
        ({"max_tables": 7}, "max_tables is 7; it must be at least num_tables=8"),
        ({"path_length": 9}, r"path_length is 9; it must lie in \[0, num_tables=8\]"),
        ({"path_length": 2, "balanced": False}, "path_length needs balanced=true"),
        ({"num_table": 3}, "unknown option 'num_table'; did you mean 'num_tables'?"),
        ({"num_tables": "8"}, "num_tables"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(UserError, match=message) as caught:
        tables(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("count", [1, 50])
@pytest.mark.parametrize("options", [{"rho": 0.0}, {"rho": 0.2, "path_length": 8}], ids=str)
def test_impossible_questions_are_refused(options, count):
    with pytest.raises(UserError, match="offer no pairs of both kinds") as caught:
        tables(num_columns=1, **options).batch("train", range(count))
    assert "\n" not in str(caught.value)


def test_rare_graphs_are_found():
    """Three graphs in a hundred will do: every prompt gets one, and alone the same as in company."""
    task = tables(num_tables=20, num_columns=3, rho=0.7)
    whole = task.questions("train", range(60))
    assert whole.connected.sum() == 30
    for index in (0, 41):
        assert torch.equal(task.questions("train", [index]).columns[0], whole.columns[index])


def test_the_task_says_what_it_is():
    task = tables(num_tables=5)
    assert IN_CONTEXT_TASKS["table_connectivity"] is TableConnectivity
    assert "num_tables=5" in task.source
    assert "seed 0" in task.source


# Paths, table by table


def test_questions_on_the_way_along_a_path():
    task = tables(num_tables=7, rho=0.2, max_tables=9, autoregressive=True)
    plain = tables(num_tables=7, rho=0.2, max_tables=9)
    batch, whole = (each.batch("train", range(300)) for each in (task, plain))
    questions = task.questions("train", range(300))
    assert torch.equal(batch["labels"], whole["labels"])
    same = (batch["input_values"] == whole["input_values"]).all(dim=2)
    assert same[:, :-2].all()
    assert same[:, -1].all()
    seen = set()
    for row in range(300):
        left, length = batch["path_length"][row].item(), questions.path_length[row].item()
        nexts = {table for table in range(7) if batch["block_targets"][row, table] > 0}
        graph = graph_of(questions.columns[row].tolist())
        first, second = (("column", column) for column in questions.query[row].tolist())
        if length <= 0:
            assert (nexts, left) == (set(), length)
            continue
        seen.add((length, left))
        start = first
        if not same[row, -2]:
            names = batch["input_values"][row, :21:3]
            (place,) = torch.nonzero((names == batch["input_values"][row, -2]).all(dim=1)).tolist()
            start = ("table", place[0])
            assert nx.shortest_path_length(graph, first, start) == 2 * (length - left) - 1
        assert (start == first) == (left == length)
        paths = nx.all_shortest_paths(graph, start, second)
        steps = {next(name for kind, name in path[1:] if kind == "table") for path in paths}
        assert nexts == steps
        assert nx.shortest_path_length(graph, start, second) == 2 * left + (start != first)
    assert {(1, 1), (2, 2), (2, 1), (3, 1)} <= seen
