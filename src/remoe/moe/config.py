"""Settings of one MoE layer; the one place where granularity is resolved."""

from typing import Any

from remoe.config import check_choice, check_size, config_class, setting
from remoe.errors import ConfigError
from remoe.kernels.expert_mlp import backends

_KEPT_ROWS = 1.5  # times k rows a token: more than a router in its steady state uses, far less than all experts


@config_class
class MoEConfig:
    """Sizes and router of one layer, in the paper's units: E experts of width F, k active, before granularity G."""

    hidden_size: int = setting(256, "width H of the residual stream")
    intermediate_size: int = setting(512, "width F of one expert before granularity splits it")
    num_experts: int = setting(8, "experts E before granularity")
    top_k: int = setting(1, "experts k per token before granularity (an average for ReLU routing)")
    granularity: int = setting(1, "G: E*G experts of width F/G, k*G active (ReMoE eq. 12)")
    router: str | dict[str, Any] = setting("relu", "router name, or {name: NAME, option: value, ...}")
    vocab_size: int | None = setting(None, "token ids, for routers with a table of them (balanced hashing)")
    init_std: float = setting(0.01, "standard deviation of the initial weights (ReMoE's scripts: 0.01)")
    experts: str = setting("swiglu", "swiglu, or relu: two matrices with biases (RMoE's character models)")
    dropout: float = setting(0.0, "dropout inside relu experts")
    kernels: str = setting("auto", "how swiglu experts are run: auto, triton, quack, grouped_mm or plain")

    def __post_init__(self) -> None:
        if not isinstance(self.router, str) and "name" not in self.router:
            raise ConfigError(f"router is {self.router!r}, must be a name or {{name: NAME, option: value, ...}}")
        for key in ("hidden_size", "intermediate_size", "num_experts", "granularity"):
            check_size(key, getattr(self, key))
        check_choice("experts", self.experts, ("swiglu", "relu"))
        check_choice("kernels", self.kernels, backends.NAMES)
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout is {self.dropout}, must be at least 0 and below 1")
        if self.dropout and self.experts != "relu":
            raise ConfigError(f"dropout is {self.dropout}, must be 0 with experts {self.experts}; relu experts have it")
        if not 1 <= self.top_k <= self.num_experts:
            raise ConfigError(f"top_k is {self.top_k}, must be between 1 and num_experts = {self.num_experts}")
        if self.intermediate_size % self.granularity:
            raise ConfigError(
                f"granularity is {self.granularity}, must divide intermediate_size = {self.intermediate_size}"
            )

    @property
    def routed_experts(self) -> int:
        """Experts that the router sees: E*G."""
        return self.num_experts * self.granularity

    @property
    def routed_top_k(self) -> int:
        """Experts a token uses (on average): k*G."""
        return self.top_k * self.granularity

    @property
    def expert_size(self) -> int:
        """Width of one routed expert: F/G."""
        return self.intermediate_size // self.granularity

    @property
    def router_name(self) -> str:
        """The router's registered name."""
        return self.router if isinstance(self.router, str) else str(self.router.get("name"))

    @property
    def router_options(self) -> dict[str, Any]:
        """The router's own options."""
        if isinstance(self.router, str):
            return {}
        return {key: value for key, value in self.router.items() if key != "name"}

    @property
    def kept_rows_per_token(self) -> float:
        """Rows that swiglu experts keep for the backward pass at most, a token; with more they work in chunks."""
        return _KEPT_ROWS * self.routed_top_k
