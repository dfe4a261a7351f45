"""Continuations of one context side by side in a row: the context is computed once, as the trunk of a tree."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from remoe.model.placement import Placement

SHORT = 256
"""Tokens of branches that a row may always have; longer contexts allow as many as they have themselves."""
_PADDING = -1


class Branch(NamedTuple):
    """A continuation, and the number of the request that asks for it."""

    request: int
    tokens: tuple[int, ...]


class Tree(NamedTuple):
    """A context and the continuations to score after it; the last token of each is predicted only, never read."""

    context: tuple[int, ...]
    branches: list[Branch]

    @property
    def length(self) -> int:
        """Tokens that the model reads."""
        return len(self.context) + sum(len(branch.tokens) - 1 for branch in self.branches)


class Rows(NamedTuple):
    """Trees as a batch: what the model reads, and where it is asked for which token."""

    tokens_BS: Tensor
    placement: Placement
    place_M: Tensor
    """int64: indices into the flattened batch, after which the labels come."""
    label_M: Tensor
    request_M: Tensor
    """int64, on the CPU: the request that each label belongs to."""


def plant(requests: Iterable[tuple[tuple[int, ...], tuple[int, ...]]], share: bool) -> Iterator[Tree]:
    """Trees of (context, continuation) pairs; with `share` the continuations of equal contexts grow on one.

    A tree whose branches would be longer together than the context (or SHORT) is closed: attention reads every pair
    of a row's tokens.
    """
    open_trees: dict[tuple[int, ...], Tree] = {}
    for number, (context, continuation) in enumerate(requests):
        tree = open_trees.get(context)
        if tree is not None and not (share and _has_room(tree, continuation)):
            yield open_trees.pop(context)
            tree = None
        if tree is None:
            tree = open_trees[context] = Tree(context, [])
        tree.branches.append(Branch(number, continuation))
    yield from open_trees.values()


def lay_out(trees: Sequence[Tree], device: torch.device) -> Rows:
    """One row a tree, padded on the right; a token sees the context and its own branch up to itself."""
    length = max(tree.length for tree in trees)
    table_BCS = torch.tensor([_columns(tree, length) for tree in trees], dtype=torch.int64)
    reads = [
        (row * length + place, label, branch.request)
        for row, tree in enumerate(trees)
        for branch, places in _places(tree)
        for place, label in zip(places, branch.tokens, strict=True)
    ]
    place_M, label_M, request_M = torch.tensor(reads, dtype=torch.int64).unbind(1)
    tokens_BS, position_BS, branch_BS = table_BCS.to(device).unbind(1)
    placement = _placement(position_BS, branch_BS, branches_meet=bool((table_BCS[:, 2] > 1).any()))
    return Rows(tokens_BS, placement, place_M.to(device), label_M.to(device), request_M)


def _has_room(tree: Tree, continuation: tuple[int, ...]) -> bool:
    size = len(tree.context)
    return tree.length + len(continuation) - 1 <= size + max(size, SHORT)


def _columns(tree: Tree, length: int) -> list[list[int]]:
    """Token, position and branch (0: the context) of each place of a row."""
    tokens, positions = list(tree.context), list(range(len(tree.context)))
    branches = [0] * len(tree.context)
    for number, branch in enumerate(tree.branches, start=1):
        read = branch.tokens[:-1]
        tokens += read
        positions += range(len(tree.context), len(tree.context) + len(read))
        branches += [number] * len(read)
    missing = length - len(tokens)
    return [tokens + [0] * missing, positions + [0] * missing, branches + [_PADDING] * missing]


def _places(tree: Tree) -> Iterator[tuple[Branch, list[int]]]:
    """Where in the row each token of a branch is predicted: at the context's end, then along the branch."""
    start = len(tree.context)
    for branch in tree.branches:
        end = start + len(branch.tokens) - 1
        yield branch, [len(tree.context) - 1, *range(start, end)]
        start = end


def _placement(position_BS: Tensor, branch_BS: Tensor, branches_meet: bool) -> Placement:
    """Plain causal attention where no row has a second branch to read: padding stands after all that counts."""
    counted_BS = branch_BS != _PADDING
    starts_BS = (position_BS == 0) & counted_BS
    return Placement(position_BS, starts_BS, None, _tree_mask(branch_BS) if branches_meet else None, counted_BS)


def _tree_mask(branch_BS: Tensor) -> Tensor:
    """Bool [B, 1, S, S]: a key is seen by what comes after it on its own branch, and one of the context by all."""
    length = branch_BS.shape[1]
    is_past = torch.ones(length, length, dtype=torch.bool, device=branch_BS.device).tril()
    key_B1S, query_BS1 = branch_BS[:, None, :], branch_BS[:, :, None]
    return (is_past & ((key_B1S == 0) | (key_B1S == query_BS1)))[:, None]
