"""Joins what the ranks of a Megatron run hold of one model: tensor, pipeline and expert parallel parts."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from remoe.errors import CheckpointError

Tensors = dict[str, Tensor]
_LAYER = re.compile(r"(.*\blayers\.)(\d+)(\..+)")
_EXPERT = re.compile(r"(.*\bmlp\.experts\.local_experts\.)(\d+)(\..+)")
_GROUPED = re.compile(r"(.*\bmlp\.experts\.)(?:weight([12])|linear_fc([12])\.weight(\d+))")
_BY_ROWS = ("word_embeddings.weight", "output_layer.weight", "linear_qkv.weight")
_BY_COLUMNS = ("linear_proj.weight", "linear_fc2.weight")
_BY_HALVES = ("linear_fc1.weight",)  # each rank holds its part of the gate rows, then of the up rows

_ONE_ROW_AN_EXPERT = ("mlp.router.weight", "mlp.router.head")


class Rank(NamedTuple):
    """Place of a rank in each kind of parallelism, from 0."""

    tensor: int = 0
    pipeline: int = 0
    expert: int = 0


def join(parts: Mapping[Rank, Sequence[Tensors]]) -> Tensors:
    """One model from the model chunks (one without a virtual pipeline) of all ranks, named as on a single one.

    Experts become `local_experts.N`, whatever module held them. Raises CheckpointError for ranks that are missing,
    and for parts that should be equal and are not.
    """
    sizes = Rank(*(1 + max(numbers) for numbers in zip(*parts, strict=True)))
    stages = {
        (tensor, expert): _joined_stages(parts, Rank(tensor, sizes.pipeline, expert))
        for tensor in range(sizes.tensor)
        for expert in range(sizes.expert)
    }
    by_expert_rank = []
    for expert in range(sizes.expert):
        ranks = [_with_single_experts(stages[tensor, expert], expert, sizes.expert) for tensor in range(sizes.tensor)]
        by_expert_rank.append(_joined_tensor_ranks(ranks))
    joined: Tensors = {}
    for tensors in by_expert_rank:
        _add(joined, tensors)
    return joined


def _joined_stages(parts: Mapping[Rank, Sequence[Tensors]], place: Rank) -> Tensors:
    """The layers of all pipeline stages, numbered through: chunk by chunk, and in each stage by stage."""
    ranks = [place._replace(pipeline=stage) for stage in range(place.pipeline)]
    missing = [rank for rank in ranks if rank not in parts]
    if missing:
        raise CheckpointError(f"the checkpoint has no part of {missing[0]}; copy the files of all ranks")
    joined: Tensors = {}
    num_layers = 0
    for chunk in range(len(parts[ranks[0]])):
        for rank in ranks:
            tensors = parts[rank][chunk]
            _add(joined, {_renumbered(_LAYER, name, num_layers): tensor for name, tensor in tensors.items()})
            num_layers += 1 + max((int(match[2]) for match in map(_LAYER.match, tensors) if match), default=-1)
    return joined


def _with_single_experts(tensors: Tensors, expert_rank: int, num_ranks: int) -> Tensors:
    """Each local expert by its number in the whole layer, as SequentialMLP would hold it: [out, in]."""
    single: Tensors = {}
    for name, tensor in tensors.items():
        if name.endswith(_ONE_ROW_AN_EXPERT):
            num_local = tensor.shape[0] // num_ranks
            break
    else:
        return tensors  # a dense model
    for name, tensor in tensors.items():
        for expert_name, matrix in _experts_of(name, tensor, num_local):
            single[_renumbered(_EXPERT, expert_name, expert_rank * num_local)] = matrix
    return single


def _experts_of(name: str, tensor: Tensor, num_local: int) -> Iterator[tuple[str, Tensor]]:
    grouped = _GROUPED.fullmatch(name)
    if grouped is None:
        yield name, tensor
    elif grouped[4] is not None:
        yield f"{grouped[1]}local_experts.{grouped[4]}.linear_fc{grouped[3]}.weight", tensor
    else:  # GroupedMLP keeps [H, n*2F] and [n*F, H] in memory as n matrices [in, out]
        first_size = tensor.shape[0] if grouped[2] == "1" else tensor.shape[0] // num_local
        matrices = tensor.contiguous().view(num_local, first_size, -1).transpose(1, 2)
        for number, matrix in enumerate(matrices):
            yield f"{grouped[1]}local_experts.{number}.linear_fc{grouped[2]}.weight", matrix


def _joined_tensor_ranks(ranks: Sequence[Tensors]) -> Tensors:
    names = ranks[0].keys()
    if any(tensors.keys() != names for tensors in ranks):
        raise CheckpointError("the checkpoint's tensor parallel ranks hold different tensors; it is not complete")
    return {name: _joined(name, [tensors[name] for tensors in ranks]) for name in names}


def _joined(name: str, parts: Sequence[Tensor]) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    if name.endswith(_BY_ROWS):
        return torch.cat(list(parts))
    if name.endswith(_BY_COLUMNS):
        return torch.cat(list(parts), dim=1)
    if name.endswith(_BY_HALVES):
        gates, ups = zip(*(part.chunk(2) for part in parts), strict=True)
        return torch.cat(gates + ups)
    _check_equal(name, parts)
    return parts[0]


def _add(joined: Tensors, tensors: Tensors) -> None:
    """Parts that several ranks hold must be equal: one is kept."""
    for name in joined.keys() & tensors.keys():
        _check_equal(name, (joined[name], tensors[name]))
    joined |= tensors


def _check_equal(name: str, parts: Sequence[Tensor]) -> None:
    if not all(torch.equal(part, parts[0]) for part in parts[1:]):
        raise CheckpointError(f"the checkpoint's ranks hold different copies of {name!r}; their training had diverged")


def _renumbered(pattern: re.Pattern[str], name: str, offset: int) -> str:
    return pattern.sub(lambda match: f"{match[1]}{int(match[2]) + offset}{match[3]}", name)
