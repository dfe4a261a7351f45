"""Cutting sequences into segments whose tokens share one merged expert (Lory); shapes: J segments, B rows."""

from typing import NamedTuple

import torch
from torch import Tensor

from remoe.kernels.segment_starts import segment_starts


class Segments(NamedTuple):
    """Runs of neighbouring tokens. Masked tokens belong to one too, but do not count."""

    first_J: Tensor
    """Where each segment begins, int64; the first one at 0."""
    is_opening_J: Tensor
    """Bool: the first segment of its sequence."""
    segment_T: Tensor
    """Each token's segment, int64."""
    counted_T: Tensor
    """Bool: tokens that are not masked."""

    @property
    def members_JT(self) -> Tensor:
        """Bool: the tokens that count in each segment."""
        index_J1 = torch.arange(self.first_J.shape[0], device=self.segment_T.device)[:, None]
        return (self.segment_T == index_J1) & self.counted_T

    def means(self, hidden_TH: Tensor) -> Tensor:
        """Mean over the tokens that count of each segment, [J, H] in hidden_TH's dtype; 0 where none does."""
        return sums(self.members_JT, hidden_TH) / self.members_JT.sum(1, keepdim=True).clamp(min=1)


def sums(members_JT: Tensor, hidden_TH: Tensor) -> Tensor:
    """Sum over the members of each segment, [J, H], exact under autocast too; same bits each run: no atomics."""
    with torch.autocast(hidden_TH.device.type, enabled=False):
        return members_JT.to(hidden_TH.dtype) @ hidden_TH


def cut(sequence_start_T: Tensor, token_mask_T: Tensor | None, length: int) -> Segments:
    """Cut each sequence into segments of `length` tokens that count; the last may be shorter.

    Tokens before the first sequence (padding on the left) join its first segment.
    """
    counted_T = torch.ones_like(sequence_start_T) if token_mask_T is None else token_mask_T
    index_T = counted_T.long().cumsum(0) - counted_T.long()
    position_T = index_T - index_T.masked_fill(~sequence_start_T, 0).cummax(0).values
    begins_T = counted_T & (position_T % length == 0)
    is_front_T = torch.arange(len(begins_T), device=begins_T.device) == 0
    begins_T = is_front_T | (begins_T & (begins_T.long().cumsum(0) > 1))
    first_J = segment_starts(begins_T)
    return Segments(first_J, position_T[first_J] == 0, begins_T.long().cumsum(0) - 1, counted_T)


class RunningSegment(NamedTuple):
    """The segment that each of B rows is in while text is generated token by token."""

    logits_BE: Tensor
    """Router logits in force."""
    sum_BH: Tensor
    """Sum of the segment's tokens so far."""
    count_B: Tensor
    is_opening_B: Tensor
    """Bool: still in the first segment, which is routed by its own mean so far."""

    @classmethod
    def after(cls, segments: Segments, hidden_TH: Tensor, logits_JE: Tensor) -> "RunningSegment":
        """Where a prompt ends: the last segment of each row."""
        is_last_J = segments.is_opening_J.roll(-1)
        members_JT = segments.members_JT[is_last_J]
        return cls(
            logits_JE[is_last_J],
            sums(members_JT, hidden_TH),
            members_JT.sum(1),
            segments.is_opening_J[is_last_J],
        )

    @property
    def mean_BH(self) -> Tensor:
        """Mean of the segment's tokens so far."""
        return self.sum_BH / self.count_B.clamp(min=1)[:, None]
