"""GradSim against golden matrices and against one-example autograd, whatever the batch, padding, layout or stream."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import dispatch_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM

from trainers.coupling import Coupling, CouplingAnalyzer, EncodedPiece, KnowledgePiece
from trainers.coupling.capture import ENDS_WITH_MLP, LayerTerms
from trainers.coupling.gram import cheaper_way, layer_gram
from trainers.coupling.ripple import measure_edits
from trainers.errors import UserError

from .tools import ARCHITECTURES, PIECES, naive_gram, naive_log_prob, tiny_model

GOLDEN = Path(__file__).parents[2] / "golden" / "coupling"
CASES = json.loads((GOLDEN / "cases.json").read_text())
GOLDEN_PIECES = [
    EncodedPiece(piece["piece_id"], tuple(piece["question_ids"]), tuple(piece["answer_ids"]))
    for piece in CASES["pieces"]
]


def golden_model(name: str, dtype: torch.dtype):
    case = CASES["models"][name]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(case["arch"], **case["config"]))
    missing, unexpected = model.load_state_dict(load_file(GOLDEN / case["weights"]), strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}  # tied
    return model.to(dtype)


def assert_golden(found, expected: torch.Tensor, tolerance: float, relative: bool = False) -> None:
    expected = expected.numpy()
    scale = np.abs(expected).max() if relative else 1.0
    assert np.abs(found - expected).max() <= tolerance * scale


# The stock Llama computes RMSNorm and the rotary tables in float32 at any dtype.
@pytest.mark.parametrize(
    ("name", "dtype", "tolerance"),
    [
        ("tiny_gpt2", torch.float64, 1e-10),
        ("tiny_gpt2", torch.float32, 1e-5),
        ("tiny_llama", torch.float64, 1e-6),
        ("tiny_llama", torch.float32, 1e-5),
        ("tiny_llama_bias", torch.float64, 1e-6),
        ("tiny_llama_bias", torch.float32, 1e-5),
    ],
)
@pytest.mark.parametrize("answer", ["first", "full"])
def test_golden(name, dtype, tolerance, answer):
    model = golden_model(name, dtype)
    expected = load_file(GOLDEN / "expected.safetensors")
    expected = {key.split(".", 2)[2]: value for key, value in expected.items() if key.startswith(f"{name}.{answer}.")}
    for padding_side in ("right", "left"):
        for tokens_per_batch in (1, 24, 512):
            analyzer = CouplingAnalyzer(
                model, answer=answer, padding_side=padding_side, tokens_per_batch=tokens_per_batch
            )
            assert [layer.name for layer in analyzer.targets] == CASES["models"][name]["target_modules"]
            assert analyzer.dimension == CASES["models"][name]["gradient_dim"]
            coupling = analyzer.fit(GOLDEN_PIECES)
            assert coupling.piece_ids == [piece.piece_id for piece in GOLDEN_PIECES]
            assert_golden(coupling.matrix, expected["gradsim"], tolerance)
            assert_golden(coupling.layer_matrix(coupling.layers[-1]), expected["gradsim_last_layer"], tolerance)
            assert_golden(coupling.gram, expected["gram"], tolerance, relative=True)
            assert_golden(coupling.gram_per_layer, expected["gram_per_layer"], tolerance, relative=True)
            assert_golden(coupling.gradient_norms, expected["grad_norm"], tolerance, relative=True)
            assert_golden(coupling.log_probs, expected["logprob"], tolerance, relative=True)
            step = CASES["edit_step_l2"]
            assert_golden(coupling.ripple_matrix(step), expected["ripple_first_order"], tolerance, relative=True)
    weights = CouplingAnalyzer(model, answer=answer, bias=False).fit(GOLDEN_PIECES)
    assert_golden(weights.matrix, expected["gradsim_weight_only"], tolerance)


def check_against_naive(model, layers="auto", pieces=PIECES, answer="full", tolerance=1e-9, **arguments) -> Coupling:
    """Both forms on the same modules, so that what a library computes in float32 is the same in both."""
    analyzer = CouplingAnalyzer(model, layers=layers, answer=answer, **arguments)
    coupling = analyzer.fit(pieces)
    log_probs, grams = naive_gram(model, analyzer.targets, pieces, answer)
    np.testing.assert_allclose(coupling.log_probs, log_probs.numpy(), rtol=tolerance)
    scale = grams.abs().amax((1, 2), keepdim=True).clamp(min=1e-300).numpy()
    assert np.abs((coupling.gram_per_layer - grams.numpy()) / scale).max() < tolerance
    norms = grams.sum(0).diagonal().sqrt()
    np.testing.assert_allclose(coupling.matrix, (grams.sum(0) / norms[:, None] / norms).numpy(), atol=tolerance)
    return coupling


# Float32 islands in the library's norms and rotary tables make results depend on a batch's layout in the 8th digit.
FLOAT32_INSIDE = {"llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "t5", "phi", "gpt_neox"}


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_equals_autograd_on_every_architecture(model_type):
    model = tiny_model(model_type)
    tolerance = 3e-6 if model_type in FLOAT32_INSIDE else 1e-9
    # In float64 the library's eager softmax, which runs in float32, makes a row without a key NaN.
    for padding_side in ("right",) if model.config._attn_implementation == "eager" else ("right", "left"):
        check_against_naive(model, padding_side=padding_side, tolerance=tolerance)
    check_against_naive(model, answer="first", tokens_per_batch=20, tolerance=tolerance)


@pytest.mark.parametrize("model_type", sorted(ENDS_WITH_MLP))
def test_head_and_last_mlp_work_on_answers_only(model_type):
    model = tiny_model(model_type)
    analyzer = CouplingAnalyzer(model)
    last = model.get_submodule(analyzer.targets[-1].name.rpartition(".")[0])
    assert analyzer.capture._last_mlp is last
    seen = []
    handles = [
        module.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape[:2])))
        for module in (last.get_submodule(analyzer.targets[-1].name.rpartition(".")[2]), model.get_output_embeddings())
    ]
    analyzer.capture.terms(PIECES)
    longest = max(len(piece.answer_ids) for piece in PIECES)
    assert seen == [(len(PIECES), longest)] * 2
    for handle in handles:
        handle.remove()
    before = model(input_ids=torch.tensor([[5, 6, 7]])).logits
    assert before.shape[1] == 3  # and as ever outside


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "opt", "t5", "vanilla_transformer"])
def test_all_linear_layers(model_type):
    tolerance = 3e-6 if model_type in FLOAT32_INSIDE else 1e-9
    coupling = check_against_naive(tiny_model(model_type), layers="all-linear", tolerance=tolerance)
    assert not any("lm_head" in name for name in coupling.layers)
    assert len(coupling.layers) > 4


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "gemma2", "gemma3_text"])
def test_tied_head_counts_the_embedding_too(model_type):
    """One tensor, two uses: the gradient of the tied matrix is the sum over both, cross terms included."""
    model = tiny_model(model_type, tie_word_embeddings=True)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    pieces = [*PIECES, EncodedPiece("with the padding token", (5, 0, 6), (9, 7))]
    check_against_naive(model, layers="lm_head", pieces=pieces, tolerance=3e-6)
    name = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
    check_against_naive(model, layers=name, pieces=pieces, answer="first", tolerance=3e-6)


def test_untied_embedding():
    check_against_naive(tiny_model("opt", tie_word_embeddings=False), layers="*.embed_tokens")


def test_weight_shared_by_several_layers():
    model = tiny_model("gpt2")
    first, second = (block.mlp.c_proj for block in model.transformer.h)
    second.weight = first.weight  # two biases remain
    coupling = check_against_naive(model)
    assert coupling.layers == ["transformer.h.0.mlp.c_proj"]


def test_module_that_runs_several_times():
    model = tiny_model("gpt2")
    model.transformer.h[1] = model.transformer.h[0]
    assert len(check_against_naive(model).layers) == 1


def test_layer_whose_output_is_overwritten_in_place():
    model = tiny_model("gpt2")

    class Doubling(nn.Module):
        def __init__(self, mlp):
            super().__init__()
            self.mlp = mlp

        def forward(self, hidden_states):
            return self.mlp(hidden_states).mul_(2.0)

    for block in model.transformer.h:
        block.mlp = Doubling(block.mlp)
    check_against_naive(model, layers="*.c_proj")


def test_rows_that_are_mixed_go_one_at_a_time():
    """A layer that sees pieces and tokens in an order of its own, as an expert of a mixture does."""
    model = tiny_model("gpt2")

    class Half(nn.Module):
        def __init__(self, mlp):
            super().__init__()
            self.mlp = mlp

        def forward(self, hidden_states):
            flat = hidden_states.reshape(-1, hidden_states.shape[-1])
            chosen = flat[:, 0] > 0
            output = torch.zeros_like(flat)
            output[chosen] = self.mlp(flat[chosen])
            return output.view_as(hidden_states)

    for block in model.transformer.h:
        block.mlp = Half(block.mlp)
    check_against_naive(model, layers="*.mlp.c_proj")


def test_gradient_checkpointing():
    model = tiny_model("llama")
    expected = CouplingAnalyzer(model).fit(PIECES).gram
    model.gradient_checkpointing_enable()
    model.train()
    np.testing.assert_array_equal(CouplingAnalyzer(model).fit(PIECES).gram, expected)
    assert model.training
    assert model.is_gradient_checkpointing


def test_block_that_is_checkpointed_in_evaluation_too():
    model = tiny_model("gpt2")
    block = model.transformer.h[1]
    plain = block.mlp.forward
    block.mlp.forward = lambda hidden_states: checkpoint(plain, hidden_states, use_reentrant=False)
    check_against_naive(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", ["gpt2", "llama", "gemma2"])
def test_batches_do_not_matter(model_type, dtype):
    """Relative 1e-5 in float32; in bfloat16 the sums of a batch are rounded, and only roughly the same."""
    model = tiny_model(model_type).to(dtype)
    single = CouplingAnalyzer(model, tokens_per_batch=1).fit(PIECES)
    norms = np.outer(single.gradient_norms, single.gradient_norms)
    for padding_side in ("right", "left"):
        batched = CouplingAnalyzer(model, padding_side=padding_side).fit(PIECES)
        assert np.abs((batched.gram - single.gram) / norms).max() < (1e-5 if dtype == torch.float32 else 0.1)


def test_model_with_adapters():
    model = tiny_model("llama")
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    model.double()
    asking = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    coupling = check_against_naive(model, tolerance=3e-6)
    assert coupling.layers == [f"model.layers.{index}.mlp.down_proj" for index in range(2)]
    assert {name for name, p in model.named_parameters() if p.requires_grad} >= asking
    adapters = check_against_naive(model, layers="*.down_proj.lora_*", tolerance=3e-6)
    assert len(adapters.layers) == 4


class Int8Linear(nn.Module):
    """Weights of 8 bits with a scale for each row, as libraries for quantised inference have them."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.weight = nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.bias = None

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(inputs, self.weight.to(inputs.dtype) * self.scale)


def test_weights_of_eight_bits():
    """The gradient is that of the weights they stand for; they take part in it, and cannot be edited."""
    model, same = tiny_model("qwen2"), tiny_model("qwen2")
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "mlp" in name:
            quantised = Int8Linear(module)
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, quantised)
            same.get_submodule(name).weight.data = quantised.weight.double() * quantised.scale
    analyzer = CouplingAnalyzer(model)
    found, expected = analyzer.fit(PIECES), CouplingAnalyzer(same).fit(PIECES)
    assert found.layers == expected.layers == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    np.testing.assert_allclose(found.gram_per_layer, expected.gram_per_layer, rtol=1e-6)
    with pytest.raises(UserError, match=r"weights of type torch.int8 cannot be edited"):
        measure_edits(analyzer, PIECES[:1], PIECES, [0.1])


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_model_spread_by_a_device_map(model_type, tmp_path):
    """Blocks that wait on the disk, and are in memory only while they compute."""
    model = tiny_model(model_type)
    expected = CouplingAnalyzer(model).fit(PIECES)
    base, blocks = model.base_model_prefix, "h" if model_type == "gpt2" else "layers"
    places = {f"{base}.{name}": "cpu" for name, _ in model.base_model.named_children() if name != blocks}
    places |= {"lm_head": "cpu", f"{base}.{blocks}.0": "cpu", f"{base}.{blocks}.1": "disk"}
    spread = dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path)
    analyzer = CouplingAnalyzer(spread)
    assert analyzer.targets[1].weight.is_meta
    found = analyzer.fit(PIECES)
    np.testing.assert_allclose(found.gram_per_layer, expected.gram_per_layer, rtol=1e-9)
    with pytest.raises(UserError, match=r"h\.1|layers\.1.*not in memory and cannot be edited"):
        measure_edits(analyzer, PIECES[:1], PIECES, [0.1])


def test_model_is_left_as_it_was():
    model = tiny_model("gpt2").train()
    model.transformer.h[0].eval()
    model.transformer.wte.weight.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    asking = [parameter.requires_grad for parameter in model.parameters()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    CouplingAnalyzer(model).fit(PIECES)
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == asking
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_sum_and_first_token_agree_on_one_token():
    model = tiny_model("gpt2")
    pieces = [EncodedPiece(piece.piece_id, piece.prompt_ids, piece.answer_ids[:1]) for piece in PIECES]
    full, first = (CouplingAnalyzer(model, answer=answer).fit(pieces) for answer in ("full", "first"))
    np.testing.assert_allclose(full.gram, first.gram, rtol=1e-12)


def test_equal_pieces_have_coupling_one():
    pieces = [PIECES[0], EncodedPiece("again", PIECES[0].prompt_ids, PIECES[0].answer_ids), PIECES[2]]
    coupling = CouplingAnalyzer(tiny_model("gpt2")).fit(pieces)
    assert coupling.matrix[0, 1] == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(np.diagonal(coupling.matrix), 1, atol=1e-12)


def test_zero_gradient_is_shown_not_hidden():
    model = tiny_model("gpt2")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    coupling = CouplingAnalyzer(model).fit(PIECES)
    assert coupling.zero_gradients == [piece.piece_id for piece in PIECES]
    assert np.isnan(coupling.matrix).all()
    assert coupling.neighbours("p0") == []


@pytest.mark.parametrize("one_hot", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_both_ways_of_the_gram(monkeypatch, dtype, one_hot):
    monkeypatch.setattr("trainers.coupling.gram.BLOCK_TOKENS", 7)
    monkeypatch.setattr("trainers.coupling.gram.SLICE_ELEMENTS", 150)
    generator = torch.Generator().manual_seed(0)
    counts = torch.tensor([3, 0, 9, 1, 4])
    owner = torch.repeat_interleave(torch.arange(5), counts)
    left = torch.randn(17, 6, generator=generator, dtype=torch.float64).to(dtype)
    if one_hot:
        left = torch.randint(0, 6, (17,), generator=generator)
    right = torch.randn(17, 5, generator=generator, dtype=torch.float64).to(dtype)
    bias = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    dense = nn.functional.one_hot(left, 6) if one_hot else left
    gradients = torch.zeros(5, 6, 5, dtype=torch.float64)
    for token, piece in enumerate(owner):
        gradients[piece] += dense[token].double()[:, None] * right[token].double()
    expected = gradients.flatten(1) @ gradients.flatten(1).T + bias @ bias.T
    for way in ("tokens", "materialise", None):
        gram = layer_gram(LayerTerms(left, right, owner, [bias]), 6, 5, way)
        torch.testing.assert_close(gram, expected, rtol=0, atol=1e-12 if dtype == torch.float64 else 1e-4)


def test_the_cheaper_way():
    assert cheaper_way(tokens=20, count=20, rows=768, columns=3072) == "tokens"
    assert cheaper_way(tokens=20 * 90, count=20, rows=768, columns=3072) == "materialise"


def test_balanced_matrix_counts_each_layer_the_same():
    coupling = CouplingAnalyzer(tiny_model("gpt2")).fit(PIECES)
    layers = [coupling.layer_matrix(name) for name in coupling.layers]
    np.testing.assert_allclose(coupling.balanced, np.mean(layers, axis=0), atol=1e-14)
    assert coupling.layer_shares.sum() == pytest.approx(1)
    with pytest.raises(UserError, match="layer 'x' is no target"):
        coupling.layer_matrix("x")


def test_neighbours_and_saving(tmp_path):
    coupling = CouplingAnalyzer(tiny_model("gpt2")).fit(PIECES)
    nearest = coupling.neighbours("p1", 2)
    assert [neighbour.coupling for neighbour in nearest] == sorted(np.delete(coupling.matrix[1], 1))[:-3:-1]
    path = coupling.save(tmp_path)
    again = Coupling.load(path)
    assert again.piece_ids == coupling.piece_ids
    assert again.layers == coupling.layers
    np.testing.assert_array_equal(again.matrix, coupling.matrix)
    assert [file.name for file in tmp_path.iterdir()] == ["coupling.safetensors"]
    with pytest.raises(UserError, match="not among"):
        coupling.neighbours("p9")
    path.write_bytes(b"no")
    with pytest.raises(UserError, match="cannot be read"):
        Coupling.load(path)


def test_predicted_ripples(tmp_path):
    """Of an edit along one piece's gradient: its length, times the cosine, times the other's gradient norm."""
    analyzer = CouplingAnalyzer(tiny_model("gpt2"))
    coupling = analyzer.fit(PIECES)
    gram = naive_gram(analyzer.model, analyzer.targets, PIECES)[1].sum(dim=0).numpy()
    # 0.5 along g / |g|: the other's log-probability changes by the inner product over this one's norm.
    expected = 0.5 * gram[2] / gram[2, 2] ** 0.5
    np.testing.assert_allclose(coupling.ripple(coupling.piece_ids[2], 0.5), expected, rtol=1e-6)
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"other.safetensors: holds no 'piece_ids'; it is not a coupling file$"):
        Coupling.load(tmp_path / "other.safetensors")


def test_log_probabilities_equal_one_at_a_time():
    model = tiny_model("gpt2")
    found = CouplingAnalyzer(model, tokens_per_batch=20).log_probabilities(PIECES)
    expected = [naive_log_prob(model, piece.prompt_ids, piece.answer_ids).item() for piece in PIECES]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_not_finite():
    model = tiny_model("gpt2")
    with torch.no_grad():
        model.transformer.wte.weight[22] = float("nan")  # a token of p0 and p4
    with pytest.raises(UserError, match="piece 'p"):
        CouplingAnalyzer(model).fit(PIECES)
    model = tiny_model("llama")
    # Finite forward, infinite gradient of one piece.
    model.model.layers[1].mlp.down_proj.register_full_backward_pre_hook(
        lambda module, gradient: (gradient[0].index_fill(0, torch.tensor([1]), float("inf")),)
    )
    with pytest.raises(UserError, match=r"piece 'p.', layer 'model\.layers\.0\..*': the gradient is not finite"):
        CouplingAnalyzer(model).fit(PIECES)


def test_strongest_tokens():
    model = tiny_model("gpt2")
    exact = CouplingAnalyzer(model, stream="exact").fit(PIECES)
    everything = CouplingAnalyzer(model, stream="top-40", tokens_per_batch=20).fit(PIECES)
    np.testing.assert_allclose(everything.gram_per_layer, exact.gram_per_layer, atol=1e-12)
    assert everything.stream["error"] == {"pairs": 10, "rms": pytest.approx(0, abs=1e-12), "max": pytest.approx(0)}
    few = CouplingAnalyzer(model, stream="top-3", tokens_per_batch=30).fit(PIECES)
    difference = np.abs(few.matrix - exact.matrix)[np.triu_indices(5, 1)]
    assert few.stream["tokens_per_piece"] == 3
    assert few.stream["error"]["max"] == pytest.approx(difference.max())
    assert 0 < few.stream["error"]["rms"] == pytest.approx(np.sqrt((difference**2).mean()))
    assert few.cost["stored_bytes"] < exact.cost["stored_bytes"] / 2


def test_the_strongest_terms_of_each_piece():
    owner = torch.tensor([0, 0, 0, 2, 2])
    terms = LayerTerms(torch.tensor([[1.0], [3], [2], [1], [5]]), torch.ones(5, 2), owner, [torch.ones(3, 1)])
    kept = terms.strongest(2)
    assert kept.left.flatten().tolist() == [3, 2, 1, 5]
    assert kept.owner.tolist() == [0, 0, 2, 2]
    assert terms.of_pieces([1, 2]).owner.tolist() == [1, 1]
    assert terms.of_pieces([2]).left.flatten().tolist() == [1, 5]


def test_many_pieces_take_the_strongest_tokens(monkeypatch):
    monkeypatch.setattr("trainers.coupling.analyzer.EXACT_UP_TO", 4)
    model = tiny_model("gpt2")
    assert CouplingAnalyzer(model).fit(PIECES).stream["name"] == "top-8"
    assert CouplingAnalyzer(model).fit(PIECES[:4]).stream == {"name": "exact"}
    monkeypatch.setattr("trainers.coupling.analyzer.TOKENS_UP_TO", 4)
    assert CouplingAnalyzer(model).fit(PIECES).stream["name"] == "sketch-8192"


def test_batches_are_larger_where_only_upper_layers_count():
    model = tiny_model("gpt2")
    assert [CouplingAnalyzer(model, layers=layers).tokens_per_batch for layers in ("auto", "last-1")] == [128, 256]


def test_layer_that_some_pieces_do_not_reach():
    """An expert that only some tokens are sent to has a zero gradient for the others; one never used is an error."""
    model = tiny_model("gpt2")

    class Routed(nn.Module):
        def __init__(self, mlp, threshold):
            super().__init__()
            self.mlp = mlp
            self.threshold = threshold

        def forward(self, hidden_states):
            return self.mlp(hidden_states) if hidden_states.shape[1] > self.threshold else hidden_states

    model.transformer.h[0].mlp = Routed(model.transformer.h[0].mlp, threshold=6)
    coupling = CouplingAnalyzer(model, layers="*.0.mlp.*c_proj", tokens_per_batch=1).fit(PIECES)
    assert coupling.zero_gradients == ["p0", "p2"]
    assert np.isfinite(coupling.matrix[np.ix_([1, 3, 4], [1, 3, 4])]).all()
    model.transformer.h[0].mlp.threshold = 60
    with pytest.raises(UserError, match="the answers' probabilities do not depend on it"):
        CouplingAnalyzer(model, layers="*.0.mlp.*c_proj").fit(PIECES)


def test_wrong_arguments():
    model = tiny_model("gpt2")
    with pytest.raises(UserError, match="text and pieces of token ids cannot be compared"):
        CouplingAnalyzer(model).fit([PIECES[0], KnowledgePiece("k", "Who?", "I")])
    for arguments, message in [
        ({"tokens_per_batch": 0}, "at least 1"),
        ({"answer": "last"}, "'full' or 'first'"),
        ({"stream": "top-0"}, "must be auto, exact, top-"),
        ({"stream": "sketch-1"}, "sketch- and a number of at least 10"),
        ({"memory": 5}, "memory is 5 bytes; it must be at least 268435456"),
        ({"layers": "nothing.*"}, "no layer matches 'nothing.*'"),
    ]:
        with pytest.raises(UserError, match=message):
            CouplingAnalyzer(model, **arguments)
