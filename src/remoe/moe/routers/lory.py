"""Lory: each segment of a sequence has one expert, merged by the routing of the segment before (Zhong et al. 2024)."""

import torch
from torch import Tensor, nn

from remoe.config import check_choice, check_range
from remoe.errors import ConfigError
from remoe.moe import gates, initial
from remoe.moe.routing import Merging, RouterContext, Routing, without_masked_tokens
from remoe.moe.segments import RunningSegment, Segments, cut


class LoryRouter(nn.Module):
    """e_j = softmax(W mean of segment j); segment j uses e_{j-1}, the first one its own without its gradient.

    The first segment's own mean leaks its later tokens to its earlier ones, in training and in scoring alike. With a
    cache, `generation` = segments goes on in the same way (the first segment by its mean so far), and prompt routes
    once by the mean over the prompt and keeps that for all of it and what follows. `top_k` is not used.
    """

    state_size = 0
    penalty = "none"
    experts = "merged"
    mixes_tokens = True

    def __init__(
        self, hidden_size: int, num_experts: int, top_k: int, *,
        segment_length: int = 256, generation: str = "segments", init_std: float = 0.01,
    ) -> None:  # fmt: skip
        super().__init__()
        check_range("router option segment_length", segment_length, 1)
        check_choice("router option generation", generation, ("segments", "prompt"))
        self.segment_length = segment_length
        self.generation = generation
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        initial.reset(self, init_std)

    def forward(self, hidden_TH: Tensor, context: RouterContext | None = None) -> Routing:
        """Weights with which each token's expert is merged, the same over its segment; in fp32 or wider."""
        if context is None or context.sequence_start_T is None:
            raise ConfigError("router 'lory' cuts sequences; give sequence_start_T in its RouterContext")
        hidden_TH = hidden_TH.to(torch.promote_types(self.weight.dtype, torch.float32))
        memory = context.cache
        running = None if memory is None else memory.get(context.layer_index)
        if running is not None:
            return self._go_on(hidden_TH, context, running)
        from_prompt = memory is not None and self.generation == "prompt"
        length = max(1, len(hidden_TH)) if from_prompt else self.segment_length
        segments = cut(context.sequence_start_T, context.token_mask_T, length)
        logits_JE = self._shifted(segments, hidden_TH)
        if memory is not None:
            memory[context.layer_index] = RunningSegment.after(segments, hidden_TH, logits_JE)
        return _routing(logits_JE, segments, context)

    def _shifted(self, segments: Segments, hidden_TH: Tensor) -> Tensor:
        own_JE = gates.linear_logits(segments.means(hidden_TH), self.weight)
        before_J = (torch.arange(len(own_JE), device=own_JE.device) - 1).clamp(min=0)  # roll() breaks torch.compile
        return torch.where(segments.is_opening_J[:, None], own_JE.detach(), own_JE.index_select(0, before_J))

    def _go_on(self, hidden_TH: Tensor, context: RouterContext, running: RunningSegment) -> Routing:
        """Route new tokens of B rows, one after the other, from where each row stands."""
        hidden_BSH = hidden_TH.view(len(running.logits_BE), -1, hidden_TH.shape[1])
        mask_T = context.token_mask_T
        counted_T = torch.ones_like(hidden_TH[:, 0], dtype=torch.bool) if mask_T is None else mask_T
        logits: list[Tensor] = []
        for new_BH, counted_B in zip(hidden_BSH.unbind(1), counted_T.view(hidden_BSH.shape[:2]).unbind(1), strict=True):
            if self.generation == "segments":
                running = self._advanced(running, new_BH, counted_B)
            logits.append(running.logits_BE)
        context.cache[context.layer_index] = running
        index_T = torch.arange(len(hidden_TH), device=hidden_TH.device)
        each_alone = Segments(index_T, torch.zeros_like(counted_T), index_T, counted_T)
        return _routing(torch.stack(logits, dim=1).flatten(0, 1), each_alone, context)

    def _advanced(self, running: RunningSegment, new_BH: Tensor, counted_B: Tensor) -> RunningSegment:
        is_full_B = running.count_B == self.segment_length
        is_full_B1 = is_full_B[:, None]
        running = RunningSegment(
            torch.where(is_full_B1, gates.linear_logits(running.mean_BH, self.weight), running.logits_BE),
            running.sum_BH.masked_fill(is_full_B1, 0) + new_BH * counted_B[:, None],
            running.count_B.masked_fill(is_full_B, 0) + counted_B,
            running.is_opening_B & ~is_full_B,
        )
        own_BE = gates.linear_logits(running.mean_BH, self.weight)
        return running._replace(logits_BE=torch.where(running.is_opening_B[:, None], own_BE, running.logits_BE))


def _routing(logits_JE: Tensor, segments: Segments, context: RouterContext) -> Routing:
    weights_JE = logits_JE.softmax(dim=-1)
    weights_TE = weights_JE.index_select(0, segments.segment_T)
    routing = Routing(
        weights_TE,
        torch.ones_like(weights_TE, dtype=torch.bool),
        logits_JE.index_select(0, segments.segment_T),
        merging=Merging(segments.first_J, weights_JE, segments.counted_T),
    )
    return without_masked_tokens(routing, context)
