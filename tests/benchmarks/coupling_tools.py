"""GradSim by other tools that compute per-example gradients, for comparison: TRAK, captum and kronfluence.

    pip install -e '.[coupling-tools]'
    python -m tests.benchmarks.bench_coupling --model llama --pieces 8 --tools captum,kronfluence,trak --skip_memory

None of them has GradSim as such. Each is asked for what is nearest and divided by the norms here: TRAK for the
gradients of each example (its scores take no cosine), captum and kronfluence for inner products of gradients. All get
the answer's first token, the same padded batches, and the head at one position of each piece.
"""

import tempfile
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import PreTrainedModel

from trainers.coupling import CouplingAnalyzer, EncodedPiece

BATCH = 4
PACKAGES = {"trak": "traker", "captum": "captum", "kronfluence": "kronfluence"}


class NextToken(nn.Module):
    """The logits at one position of each row of right-padded tokens; causal attention needs no mask for these."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        states = self.model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        index = at[:, None, None].expand(-1, 1, states.shape[-1])
        return self.model.get_output_embeddings()(states.gather(1, index)[:, 0])


def trak(model: PreTrainedModel, pieces: list[EncodedPiece], layers: str, answer: str) -> torch.Tensor:
    """Its gradients of a batch of examples, kept for the target layers, and one product of all."""
    from trak.gradient_computers import FunctionalGradientComputer
    from trak.modelout_functions import AbstractModelOutput

    class LogProbability(AbstractModelOutput):
        def __init__(self):
            pass

        @staticmethod
        def get_output(module, weights, buffers, tokens, at, target):
            inputs = (tokens[None], at[None])
            logits = torch.func.functional_call(module, (weights, buffers), inputs)
            return logits.log_softmax(-1)[0].gather(0, target[None])[0]

        def get_out_to_loss_grad(self, *arguments):
            raise NotImplementedError  # of TRAK's scores, which are not asked for

    names, module = _targets(model, layers), NextToken(model)
    kept = [f"{name}.weight" for name in names] + [f"{name}.bias" for name in names]
    computer = FunctionalGradientComputer(module, LogProbability, 0, torch.float32, torch.device("cpu"), grad_wrt=kept)
    rows = []
    for batch in _batches(pieces, answer):
        gradients = computer.compute_per_sample_grad(batch)
        rows.append(torch.cat([part.detach().flatten(1) for part in gradients.values()], 1))
    stacked = torch.cat(rows)
    return _cosine(stacked @ stacked.T)


def captum(model: PreTrainedModel, pieces: list[EncodedPiece], layers: str, answer: str) -> torch.Tensor:
    """TracInCP with one checkpoint, the model as it is, and its sample-wise trick for linear layers."""
    from captum.influence import TracInCP

    module, batches = NextToken(model), _batches(pieces, answer)
    influence = TracInCP(
        module,
        DataLoader(_Batches(batches), batch_size=None),
        checkpoints=["the model as it is"],
        checkpoints_load_func=lambda module, path: 1.0,
        layers=_targets(model, layers),
        loss_fn=nn.CrossEntropyLoss(reduction="sum"),
        sample_wise_grads_per_batch=True,
    )
    return _cosine(torch.cat([influence.influence(batch).detach() for batch in batches]))


def kronfluence(model: PreTrainedModel, pieces: list[EncodedPiece], layers: str, answer: str) -> torch.Tensor:
    """Pairwise scores with the identity in place of a Hessian. It replaces modules, so it gets a copy of the model."""
    import copy

    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments
    from kronfluence.task import Task

    names = _targets(model, layers)

    class NextTokenTask(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> torch.Tensor:
            tokens, at, target = batch
            return nn.functional.cross_entropy(model(tokens, at), target, reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> torch.Tensor:
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str]:
            return names

    task = NextTokenTask()
    prepared = prepare_model(NextToken(copy.deepcopy(model)), task)
    # It makes its own batches: all pieces padded to the same length.
    (whole,) = _batches(pieces, answer, len(pieces))
    rows = TensorDataset(*whole)
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer("gradsim", prepared, task, cpu=True, output_dir=folder, disable_tqdm=True)
        analyzer.fit_all_factors("identity", rows, BATCH, factor_args=FactorArguments(strategy="identity"))
        analyzer.compute_pairwise_scores("scores", "identity", rows, rows, BATCH, BATCH)
        found = analyzer.load_pairwise_scores("scores")["all_modules"]
    return _cosine(found)


TOOLS: dict[str, Callable] = {"trak": trak, "captum": captum, "kronfluence": kronfluence}


def name_and_version(tool: str) -> str:
    return f"{PACKAGES[tool]} {version(PACKAGES[tool])}"


class _Batches(torch.utils.data.Dataset):
    """Batches that are made already."""

    def __init__(self, batches: list[tuple[torch.Tensor, ...]]):
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        return self.batches[index]


def _targets(model: PreTrainedModel, layers: str) -> list[str]:
    """Names of the target modules inside `NextToken`."""
    return [f"model.{layer.name}" for layer in CouplingAnalyzer(model, layers=layers).targets]


def _batches(pieces: list[EncodedPiece], answer: str, size: int = BATCH) -> list[tuple[torch.Tensor, ...]]:
    """(tokens, position, target) of each batch, in the order of the pieces."""
    if answer != "first":
        raise ValueError("the other tools are asked for the first token of an answer only")
    batches = []
    for start in range(0, len(pieces), size):
        batch = pieces[start : start + size]
        tokens = torch.zeros(len(batch), max(len(piece.prompt_ids) for piece in batch), dtype=torch.long)
        for row, piece in enumerate(batch):
            tokens[row, : len(piece.prompt_ids)] = torch.tensor(piece.prompt_ids)
        at = torch.tensor([len(piece.prompt_ids) - 1 for piece in batch])
        batches.append((tokens, at, torch.tensor([piece.answer_ids[0] for piece in batch])))
    return batches


def _cosine(gram: torch.Tensor) -> torch.Tensor:
    norms = gram.diagonal().sqrt()
    return gram / norms[:, None] / norms
