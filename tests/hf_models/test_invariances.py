"""What an answer must not depend on, in any batch: rows beside it, their order, padding, the order of blocks."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.hf_models.model_tests import assert_close
from tests.hf_models.test_configurations import CASES
from tests.hf_models.test_in_context_transformer import low_rank, prompts

# Rows that batches are drawn from; those of a third of them are padded by three positions and of another by one.
NUM_ROWS = 9
QUICK = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
LONG = settings(QUICK, max_examples=300)
CLASSES = [(case, model_class) for case in CASES.values() for model_class in case.classes]
batches = st.lists(st.integers(0, NUM_ROWS - 1), min_size=1, max_size=12)


def named(cases):
    return [pytest.param(*each, id=f"{each[0].__name__} {each[1].__name__}") for each in cases]


def check_rows(case_class, model_class, examples: settings) -> None:
    """Every row of any batch, some rows twice, has the outputs that it has alone."""
    case = case_class()
    model = case.build(model_class)
    side = "right" if "right" in case.padding_sides else None
    inputs = case.inputs(model_class, NUM_ROWS, model.config, side)
    names = case.per_sample(model_class)
    alone = []
    for row in range(NUM_ROWS):
        single = case._unpadded(inputs, row) if side else {name: value[[row]] for name, value in inputs.items()}
        with torch.no_grad():
            alone.append(model(**single))

    @examples
    @given(batches)
    def agrees(rows: list[int]) -> None:
        batch = {name: value[rows] for name, value in inputs.items()}
        with torch.no_grad():
            outputs = model(**batch)
        for place, row in enumerate(rows):
            for name, along in names.items():
                value = outputs[name][place]
                if side and along is not None:
                    value = value[case._mask(batch, along)[place]]
                # Another order of summation in float32; outputs are of order 1.
                assert_close(value, alone[row][name][0], f"{name} of row {row}", rtol=1e-5, atol=1e-5)

    agrees()


@pytest.mark.parametrize(("case_class", "model_class"), named(CLASSES))
def test_rows_of_any_batch_are_as_alone(case_class, model_class):
    check_rows(case_class, model_class, QUICK)


@pytest.mark.long
@pytest.mark.parametrize(("case_class", "model_class"), named(CLASSES))
def test_rows_of_many_batches_are_as_alone(case_class, model_class):
    check_rows(case_class, model_class, LONG)


@settings(QUICK, max_examples=40)
@given(st.data())
def test_any_order_of_the_blocks(data):
    num_blocks = data.draw(st.integers(1, 9), label="blocks")
    block_size = data.draw(st.integers(1, 5), label="block size")
    order = data.draw(st.permutations(range(num_blocks)), label="order")
    model = low_rank(block_size=block_size)
    inputs = prompts(model.config, num_blocks)
    blocks, tail = inputs[:, :-3].unflatten(1, (num_blocks, block_size)), inputs[:, -3:]
    permuted = torch.cat((blocks[:, order].flatten(1, 2), tail), dim=1)
    with torch.no_grad():
        expected, actual = (model(values, outputs="keys").token_logits for values in (inputs, permuted))
    torch.testing.assert_close(actual[:, :num_blocks], expected[:, order], rtol=0, atol=1e-12)
    torch.testing.assert_close(actual[:, num_blocks:], expected[:, num_blocks:], rtol=0, atol=1e-12)


@QUICK
@given(st.sampled_from(CLASSES), st.integers(0, 2**32 - 1))
def test_any_seed_gives_its_own_model(case_and_class, seed):
    case_class, model_class = case_and_class
    one, same, other = (case_class().build(model_class, seed=each) for each in (seed, seed, (seed + 1) % 2**32))
    states = [model.state_dict() for model in (one, same, other)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert not all(torch.equal(value, states[2][name]) for name, value in states[0].items())
