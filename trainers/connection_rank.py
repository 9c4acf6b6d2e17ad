"""How large a rank learnt connections need: their energy, a model cut to a smaller rank, and what that costs."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from .connection_analysis import connections_of
from .errors import UserError

ENERGIES = (0.9, 0.95, 0.99, 0.999)


def _factors(connections: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Source and target factors in float64, per pair as `[source, target]` or per slot."""
    source, target = connections.source_weight.detach().double(), connections.target_weight.detach().double()
    if hasattr(connections, "core_weight"):
        return source, target
    return connections.unpack(source, target)


def _triangles(source: torch.Tensor, target: torch.Tensor):
    """QR of the sources and of the transposed targets."""
    return (*torch.linalg.qr(source), *torch.linalg.qr(target.transpose(-1, -2)))


def _block_bases(connections: Any) -> tuple[torch.Tensor, ...]:
    """
    Block connections in orthonormal coordinates of their slots, most important first: with `U_i = Q_i R_i` and
    `V_j = L_jᵀ P_jᵀ` the cores become `R_i C_ij L_jᵀ`, and each slot's coordinates are turned to the main axes of its
    cores over all other slots.

    Returns:
        Bases of the sources `(slots, width, rank)`, of the targets likewise, cores `(slots, slots, rank, rank)`, and
        the energies of the sources' and the targets' axes, `(slots, rank)` each.
    """
    source, target = _factors(connections)
    left_basis, left, right_basis, right = _triangles(source, target)
    num_slots, rank = connections.num_slots, connections.rank
    cores = connections.core_weight.detach().double().view(num_slots, rank, num_slots, rank).transpose(1, 2)
    cores = torch.einsum("iab,ijbc,jdc->ijad", left, cores, right)
    cores[torch.arange(num_slots), torch.arange(num_slots)] = 0
    # `eigh` gives ascending order.
    left_energy, left_axes = torch.linalg.eigh(torch.einsum("ijab,ijcb->iac", cores, cores))
    right_energy, right_axes = torch.linalg.eigh(torch.einsum("ijab,ijac->jbc", cores, cores))
    left_axes, right_axes = left_axes.flip(-1), right_axes.flip(-1)
    cores = torch.einsum("iab,ijac,jcd->ijbd", left_axes, cores, right_axes)
    return left_basis @ left_axes, right_basis @ right_axes, cores, left_energy.flip(-1), right_energy.flip(-1)


def _diagonal_energy(connections: Any) -> torch.Tensor:
    """`Σ_ij ‖u_ik‖² g_ij² ‖v_jk‖²` of each component k of diagonal connections, shape `(rank,)`."""
    source, target = _factors(connections)
    cores = connections.core_weight.detach().double().clone()
    cores.diagonal(dim1=1, dim2=2).zero_()
    return torch.einsum("ik,kij,jk->k", source.square().sum(1), cores.square(), target.square().sum(2))


@torch.no_grad()
def kept_energy(model: PreTrainedModel) -> torch.Tensor:
    """
    Share of the connections' energy `Σ_{i≠j} ‖M_ij‖²` that a model cut to rank 1, 2, … keeps, shape `(rank,)`.

    Exact for per-pair and scalar connections. For block connections each rank's share is that of the projection that
    [`truncated`] makes; for diagonal ones that of the components it keeps, whose overlaps are left aside.
    """
    connections = connections_of(model)
    kind = model.config.connection_type
    if kind == "scalar":
        # One number for each pair, whatever the vectors' length.
        return torch.ones(model.config.connection_rank, dtype=torch.float64)
    if kind == "per_pair":
        total = torch.zeros(connections.rank, dtype=torch.float64, device=connections.source_weight.device)
        source, target = _factors(connections)
        for slot, (one, other) in enumerate(zip(source, target, strict=True)):
            _, left, _, right = _triangles(one, other)
            values = torch.linalg.svdvals(left @ right.transpose(-1, -2)).square()
            values[slot] = 0
            total[: values.shape[1]] += values.sum(0)
        energy = total.cumsum(0)
    elif kind == "block":
        cores = _block_bases(connections)[2].square().sum(dim=(0, 1))
        energy = torch.stack([cores[: rank + 1, : rank + 1].sum() for rank in range(connections.rank)])
    else:
        energy = _diagonal_energy(connections).sort(descending=True).values.cumsum(0)
    whole = energy[-1].clamp_min(torch.finfo(torch.float64).tiny)
    return (energy / whole).cpu()


def choose_rank(model: PreTrainedModel, energy: float = 0.99) -> int:
    """The smallest rank whose [`kept_energy`] is at least `energy`.

    Raises:
        UserError: `energy` lies outside (0, 1].
    """
    if not 0 < energy <= 1:
        raise UserError(f"energy: {energy} must lie in (0, 1]")
    enough = kept_energy(model) >= energy - 1e-12
    return int(enough.float().argmax()) + 1


@torch.no_grad()
def truncated(model: PreTrainedModel, rank: int) -> PreTrainedModel:
    """
    A copy of a Connection Transformer whose connections have a smaller rank; all else is the same.

    Per-pair connections keep the best approximation of every `M_ij` (Eckart and Young 1936). Block connections keep,
    for each slot, the main axes of what it sends to and receives from all others; diagonal ones their strongest
    components. Scalar connections lose nothing.

    Raises:
        UserError: the rank is not in `[1, connection_rank]`.
    """
    connections, kind = connections_of(model), model.config.connection_type
    if not 1 <= rank <= model.config.connection_rank:
        raise UserError(f"rank: {rank} must lie in [1, {model.config.connection_rank}], the model's connection_rank")
    weights: dict[str, torch.Tensor] = {}
    if kind == "scalar":
        matrix = connections.connection_matrix().double()
        root = matrix.abs().sqrt()[..., None] / rank**0.5
        weights["source_weight"] = root.expand(*matrix.shape, rank)
        weights["target_weight"] = (root * matrix.sign()[..., None]).expand(*matrix.shape, rank)
    elif kind == "per_pair":
        sources, targets = [], []
        for one, other in zip(*_factors(connections), strict=True):
            left_basis, left, right_basis, right = _triangles(one, other)
            axes, values, others = torch.linalg.svd(left @ right.transpose(-1, -2))
            root = values[:, None, :rank].sqrt()
            kept = min(rank, values.shape[1])
            padding = (0, rank - kept)
            source = left_basis @ axes[:, :, :kept] * root
            target = right_basis @ others.transpose(-1, -2)[:, :, :kept] * root
            sources.append(torch.nn.functional.pad(source, padding))
            targets.append(torch.nn.functional.pad(target, padding).transpose(-1, -2))
        packed = connections.pack(torch.stack(sources), torch.stack(targets))
        weights["source_weight"], weights["target_weight"] = packed
    elif kind == "block":
        source, target, cores, _, _ = _block_bases(connections)
        weights["source_weight"] = source[:, :, :rank]
        weights["target_weight"] = target[:, :, :rank].transpose(1, 2)
        size = connections.num_slots * rank
        weights["core_weight"] = cores[:, :, :rank, :rank].transpose(1, 2).reshape(size, size)
    else:
        kept = _diagonal_energy(connections).topk(rank).indices.sort().values
        weights["source_weight"] = connections.source_weight[:, :, kept]
        weights["target_weight"] = connections.target_weight[:, kept]
        weights["core_weight"] = connections.core_weight[kept]
    config = copy.deepcopy(model.config)
    config.connection_rank = rank
    smaller = type(model)(config).to(device=model.device, dtype=model.dtype)  # type: ignore[call-arg]
    state = model.state_dict()
    prefix = next(name for name, module in model.named_modules() if module is connections)
    state.update({f"{prefix}.{name}": weight.to(state[f"{prefix}.{name}"]) for name, weight in weights.items()})
    smaller.load_state_dict(state)
    if hasattr(model, "generation_config"):
        smaller.generation_config = copy.deepcopy(model.generation_config)
    return smaller.train(model.training)


def rank_report(
    model: PreTrainedModel, score: Callable[[PreTrainedModel], Any], energies: Sequence[float] = ENERGIES
) -> dict[str, Any]:
    """
    What smaller ranks cost: for each share of energy the rank chosen, and the score before and after.

    Args:
        model: a trained Connection Transformer.
        score: measures a model, for example its accuracy by generation on a validation split.
        energies: shares of the energy to keep, in (0, 1].

    Returns:
        A dict for JSON: `before` with `rank`, `parameters` and `score`; `after`, a list with `energy`, `rank`,
        `energy_kept`, `parameters` and `score` for each rank that some share asks for, each measured once.
    """
    kept = kept_energy(model)
    before = {
        "rank": model.config.connection_rank,
        "parameters": model.num_parameters(only_trainable=True),
        "score": score(model),
    }
    after: dict[int, dict[str, Any]] = {}
    for energy in sorted(energies):
        rank = choose_rank(model, energy)
        if rank not in after:
            smaller = truncated(model, rank)
            after[rank] = {
                "rank": rank,
                "energy_kept": float(kept[rank - 1]),
                "parameters": smaller.num_parameters(only_trainable=True),
                "score": score(smaller),
            }
        # The largest share that this rank was chosen for.
        after[rank]["energy"] = energy
    return {"before": before, "after": list(after.values())}
