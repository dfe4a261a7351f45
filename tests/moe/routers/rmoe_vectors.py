"""The generator of RMoE's worked vectors (spec §9)."""

import torch
from torch import Tensor, nn

from remoe import build_router


def mat(c: int, rows: int, columns: int) -> Tensor:
    """Mat(c, r, m)[a][b] = (((7a + 3b + c) mod 11) - 5) / 10."""
    return torch.tensor(
        [[((7 * a + 3 * b + c) % 11 - 5) / 10 for b in range(columns)] for a in range(rows)], dtype=torch.float64
    )


def vec(c: int, size: int) -> Tensor:
    """Vec(c, r)[a] = (((7a + c) mod 11) - 5) / 10."""
    return mat(c, size, 1).squeeze(1)


def x(layer: int) -> Tensor:
    """x_i of layer 1, 2 or 3 as one token [1, 3]."""
    return 2 * vec(50 + layer, 3)[None]


def router_of(
    name: str,
    weights: dict[str, Tensor],
    dtype: torch.dtype = torch.float64,
    sizes: tuple[int, int] = (3, 4),
    **options,
) -> nn.Module:
    """A router of top_k 2, for `sizes` (H, E), in this dtype and with these parameters; the others stay as drawn."""
    router = build_router(name, *sizes, 2, **options).to(dtype)
    with torch.no_grad():
        for key, value in weights.items():
            router.get_parameter(key).copy_(value)
    return router


def assert_logits(router: nn.Module, hidden_TH: Tensor, expected: list[float]) -> None:
    """One token's logits, to 1e-9 in float64 and 1e-5 in float32."""
    dtype = next(router.parameters()).dtype
    logits = router(hidden_TH.to(dtype)).logits_TE
    assert logits.dtype == dtype
    atol = 1e-9 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(logits, torch.tensor([expected], dtype=dtype), rtol=0, atol=atol)


def count(name: str, hidden_size: int, num_layers: int, **options) -> int:
    """Parameters of `num_layers` routers over 16 experts, as in the tables of RMoE's small runs (spec §5)."""
    with torch.device("meta"):
        router = build_router(name, hidden_size, 16, 2, **options)
    return num_layers * sum(parameter.numel() for parameter in router.parameters())
