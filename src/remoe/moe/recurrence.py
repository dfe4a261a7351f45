"""Settings of the recurrent routers, and what of the previous layer's state a layer gets to see (RMoE §3, §6.8)."""

import torch
from torch import Tensor

from remoe.config import check_choice, check_range, config_class, setting
from remoe.errors import ConfigError
from remoe.moe.cells import CELLS, Cell, LeakySumCell, WeightedCell
from remoe.moe.routing import RouterContext


@config_class
class RecurrentOptions:
    """How x_i becomes logits: u = P x, h = cell(u, h before), logits = G N(h). Widths: H hidden, P state, E experts."""

    state_size: int = setting(128, "width P of h (RMoE: 128)")
    cell: str = setting("gru", "gru, rnn, lstm, leaky (h = u + leak h) or identity (h = u)")
    projector: str = setting("layer", "layer: u = P_i x; shared: the cell reads x itself (S-proj)")
    bias: bool = setting(False, "biases on projector and head (RMoE's small runs: true)")
    cell_bias: bool = setting(True, "the cell's own biases")
    leak: float = setting(0.5, "leaky cell: share of h that is kept")
    learned_leak: str = setting("no", "leaky cell: no, scalar or vector (one a unit)")
    passing: str = setting("full", "state between layers: full, detach, gradient_only, none (NP) or shuffle")
    norm: str = setting("none", "N(h): none, or rms without gain")
    norm_eps: float = setting(1e-6, "epsilon of N; h of the first layer is small")
    scale: float = setting(1.0, "factor s on N(h)")
    gate: str = setting("topk", "topk (softmax) or relu")
    renormalize: bool | None = setting(None, "topk gate: divide the k probabilities by their sum; null: from k = 2 on")
    head: str = setting("linear", "linear, or cosine: XMoE's head on h (XMoE+GRU)")
    head_size: int = setting(16, "cosine head: width of the space it compares in")
    temperature: float = setting(0.3, "cosine head: first value of the learned temperature")
    input_residual: bool = setting(False, "add W x to the logits; the head then starts at 0: a linear router at first")
    residual_coef: float = setting(0.0, "r-alpha: share of the previous layer's logits that is added")
    residual_mode: str = setting("accumulated", "r-alpha: accumulated, or one_step (without what was added there)")
    detach_residual: bool = setting(False, "r-alpha: no gradient through the added logits (detach-r)")
    initial: str = setting("normal", "normal (init_std, the cell as torch's), library (all as torch's), or matched")

    def __post_init__(self) -> None:
        check_range("router.state_size", self.state_size, 1)
        check_range("router.head_size", self.head_size, 1)
        check_range("router.norm_eps", self.norm_eps, 0)
        check_choice("router.cell", self.cell, tuple(CELLS))
        check_choice("router.projector", self.projector, ("layer", "shared"))
        check_choice("router.learned_leak", self.learned_leak, ("no", "scalar", "vector"))
        check_choice("router.passing", self.passing, ("full", "detach", "gradient_only", "none", "shuffle"))
        check_choice("router.norm", self.norm, ("none", "rms"))
        check_choice("router.gate", self.gate, ("topk", "relu"))
        check_choice("router.head", self.head, ("linear", "cosine"))
        check_choice("router.residual_mode", self.residual_mode, ("accumulated", "one_step"))
        check_choice("router.initial", self.initial, ("normal", "library", "matched"))
        if self.initial == "matched" and self.norm == "none":
            raise ConfigError("router.initial is 'matched', needs router.norm: rms; without it h has no known scale")
        for key in ("bias", "input_residual"):
            if self.head == "cosine" and getattr(self, key):
                raise ConfigError(f"router.{key} is true, must be false with router.head: cosine")
        if self.temperature <= 0:
            raise ConfigError(f"router.temperature is {self.temperature}, must be above 0; try 0.3")


def build_cell(options: RecurrentOptions, hidden_size: int) -> Cell:
    """The cell that the options ask for, without values."""
    input_size = hidden_size if options.projector == "shared" else options.state_size
    cell_class = CELLS[options.cell]
    if issubclass(cell_class, WeightedCell):
        bias = "zero" if options.initial == "matched" else "library"
        return cell_class(input_size, options.state_size, bias if options.cell_bias else "none")
    if input_size != options.state_size:
        raise ConfigError(
            f"router.state_size is {options.state_size}, must be hidden_size = {hidden_size} for router.projector: "
            f"shared with router.cell: {options.cell}, which has no weights"
        )
    if issubclass(cell_class, LeakySumCell):
        return cell_class(input_size, options.state_size, options.leak, options.learned_leak)
    return cell_class(input_size, options.state_size)


def given_state(context: RouterContext, hidden_TH: Tensor, state_size: int) -> Tensor:
    """The context's state in the dtype of `hidden_TH`, or zeros at the first layer; ConfigError for another shape.

    The zeros are one row for all tokens, [1, P]: the cell multiplies its hidden matrix once, not T times.
    """
    if context.state_TP is None:
        return hidden_TH.new_zeros(1, state_size)
    expected, shape = [hidden_TH.shape[0], state_size], list(context.state_TP.shape)
    if shape != expected:
        raise ConfigError(f"state_TP has shape {shape}, must be {expected}: the state of the layer before")
    return context.state_TP.to(hidden_TH.dtype)


def passed(state_TP: Tensor, passing: str, context: RouterContext) -> Tensor:
    """What the next cell step sees of the previous layer's state: value and gradient, one of them, or neither.

    [T, P], or [1, P] where it is 0 for all tokens.
    """
    if passing == "detach":
        return state_TP.detach()
    if passing == "gradient_only":
        return state_TP - state_TP.detach()
    if passing == "none":
        return state_TP.new_zeros(1, state_TP.shape[1])
    if passing == "shuffle":
        source_T = token_of_another_sequence(context)
        return state_TP if context.state_TP is None else state_TP[source_T]
    return state_TP


def token_of_another_sequence(context: RouterContext) -> Tensor:
    """For each token the one at the same position of the next sequence that is long enough: int64 [T].

    Positions are kept because another order within a sequence would tell a token of later ones. A sequence that is
    alone with its length keeps its own states. Raises ConfigError without `sequence_start_T`.
    """
    starts_T, mask_T = context.sequence_start_T, context.token_mask_T
    if starts_T is None:
        raise ConfigError("router.passing is 'shuffle', needs RouterContext.sequence_start_T to find other sequences")
    index_T = torch.arange(len(starts_T), device=starts_T.device)
    position_T = index_T - _last_marked(index_T, starts_T)
    if mask_T is not None:
        position_T = position_T.masked_fill(~mask_T, len(starts_T))  # padding trades with padding only
    position_T, order_T = position_T.sort(stable=True)
    changes_T = torch.ones_like(starts_T)
    changes_T[1:] = position_T[1:] != position_T[:-1]
    following_T = torch.where(changes_T.roll(-1), _last_marked(index_T, changes_T), index_T + 1)
    return torch.empty_like(order_T).scatter(0, order_T, order_T[following_T])


def normalized(h_TP: Tensor, eps: float) -> Tensor:
    """RMSNorm without gain: the logits' scale is then the head's alone."""
    return h_TP * torch.rsqrt(h_TP.square().mean(dim=-1, keepdim=True) + eps)


def _last_marked(index_T: Tensor, marked_T: Tensor) -> Tensor:
    """The largest index up to each place at which `marked_T` is true; 0 before the first."""
    return index_T.masked_fill(~marked_T, 0).cummax(0).values
