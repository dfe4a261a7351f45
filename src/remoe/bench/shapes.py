"""The layers that are measured: those of ReMoE's models, and of the papers of the peers."""

from dataclasses import dataclass

from remoe.errors import ConfigError, one_of

STAGE_1 = "stage1"
"""How the names of shapes begin that stand for the dense start: E/2 experts a token on average, 1 once it is over."""


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """One MoE layer call: T tokens of width H, E experts of width F, k of them a token (on average)."""

    name: str
    num_tokens: int
    hidden_size: int
    expert_size: int
    num_experts: int
    top_k: int
    has_fixed_k: bool = True
    """Whether Top-K routing has this shape too; ReLU's dense start (Stage I) has no Top-K counterpart."""
    steady_top_k: int = 1
    """Experts that a token uses once training has settled; above it only in the dense start."""
    target_ms: float | None = None
    """Forward and backward with variable counts, as issue 5 wants it on an H100."""

    @property
    def num_pairs(self) -> int:
        """Active (token, expert) pairs N."""
        return self.num_tokens * self.top_k

    @property
    def num_weights(self) -> int:
        """Numbers in all experts' matrices."""
        return 3 * self.num_experts * self.hidden_size * self.expert_size

    def flops(self, backward: bool = False) -> int:
        """Multiplications and additions of the active pairs, forward alone or with the backward pass."""
        return (18 if backward else 6) * self.num_pairs * self.hidden_size * self.expert_size

    def traffic(self, bytes_a_number: int, backward: bool = False) -> int:
        """Bytes that a layer must move when gathers, SwiGLU and its gradient are part of the matrix products.

        Forward: x, out, weights; pre-activations (2F a row) written, activations (F) and y (H) written and read.
        Backward: x, dx, dout twice, weights and their gradients; four passes over 2F, two over F, two over dx's rows.
        """
        token, weights = self.num_tokens * self.hidden_size, self.num_weights
        numbers = 2 * token + weights + self.num_pairs * (4 * self.expert_size + 2 * self.hidden_size)
        if backward:
            numbers += 4 * token + 2 * weights + self.num_pairs * (10 * self.expert_size + 2 * self.hidden_size)
        return numbers * bytes_a_number


def _shape(name: str, sizes: tuple[int, int, int, int, int], target_ms: float | None = None) -> LayerShape:
    num_tokens, hidden_size, expert_size, num_experts, top_k = sizes
    return LayerShape(
        name=name,
        num_tokens=num_tokens,
        hidden_size=hidden_size,
        expert_size=expert_size,
        num_experts=num_experts,
        top_k=top_k,
        has_fixed_k=not name.startswith(STAGE_1),
        steady_top_k=1 if name.startswith(STAGE_1) else top_k,
        target_ms=target_ms,
    )


GPU_SHAPES = {
    shape.name: shape
    for shape in (
        _shape("remoe182m_E8", (16384, 768, 3072, 8, 1), 1.75),
        _shape("remoe978m_E8", (16384, 1536, 6144, 8, 1), 5.1),
        _shape("remoe469m_E8", (16384, 1024, 4096, 8, 1)),
        _shape("remoe469m_E32", (16384, 1024, 4096, 32, 1), 3.0),
        _shape("remoe469m_E64", (16384, 1024, 4096, 64, 1), 3.6),
        _shape("remoe469m_E128", (16384, 1024, 4096, 128, 1), 4.8),
        _shape("remoe182m_G8", (16384, 768, 384, 64, 8), 2.5),
        _shape("remoe182m_G64", (16384, 768, 48, 512, 64), 6.0),
        _shape("sonic7b_n256", (24576, 1536, 256, 128, 8), 3.5),
        _shape("sonic7b_n1024", (24576, 1536, 1024, 32, 2), 2.9),
        _shape("stage1_182m_E8", (16384, 768, 3072, 8, 4), 7.0),
    )
}
CPU_SHAPES = {
    shape.name: shape
    for shape in (
        _shape("cpu_E8", (4096, 256, 1024, 8, 1)),
        _shape("cpu_E64", (4096, 256, 1024, 64, 1)),
        _shape("cpu_G8", (2048, 256, 128, 64, 8)),
        _shape("stage1_cpu_E8", (2048, 256, 1024, 8, 4)),
    )
}
OTHER_SHAPES = {
    shape.name: shape
    for shape in (
        _shape("tiny", (64, 32, 16, 8, 2)),
        _shape("tiny_E16", (48, 16, 24, 16, 1)),
        _shape("stage1_tiny", (64, 32, 16, 8, 4)),
    )
}
SHAPES = GPU_SHAPES | CPU_SHAPES | OTHER_SHAPES


def shapes_named(names: list[str], device_type: str) -> list[LayerShape]:
    """The shapes of these names; without names, those that suit the device."""
    if not names:
        return list((GPU_SHAPES if device_type == "cuda" else CPU_SHAPES).values())
    for name in names:
        if name not in SHAPES:
            raise ConfigError(f"--shapes has {name!r}, {one_of(name, list(SHAPES))}")
    return [SHAPES[name] for name in names]
