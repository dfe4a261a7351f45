"""What a comparison runs: routers x seeds, each trial a config that differs from its neighbours in the router alone.

Everything of an arm comes from here: one base config gives data order, precision, optimizer, experts and balance
coefficients to all; `differing_settings` says where an arm that is a recipe brings its own.
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from remoe.config import apply_overrides, check_choice, from_dict, to_dict
from remoe.errors import ConfigError, nearest
from remoe.recipes.catalog import load, merge, names, read_values
from remoe.recipes.results import differences

if TYPE_CHECKING:
    from remoe.training.config import TrainConfig

ROUTER_SECTIONS = ("name", "model", "losses", "sparsity")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What to compare. A router is a registered name, `dense`, or a recipe whose model and losses are taken."""

    name: str
    config: str
    routers: Sequence[str]
    seeds: Sequence[int] = (0,)
    overrides: Sequence[str] = ()
    equal: str = "steps"
    """steps, or flops: after equal steps, runs are trained to the FLOPs that the first router's run was measured at."""

    def __post_init__(self) -> None:
        check_choice("--equal", self.equal, ("steps", "flops"))
        for key, values in (("--routers", self.routers), ("--seeds", self.seeds)):
            if not values:
                raise ConfigError(f"{key} is empty, must name at least one")
            repeated = [value for value in values if list(values).count(value) > 1]
            if repeated:
                raise ConfigError(f"{key} names {repeated[0]} twice, must name each once")


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run of a comparison."""

    router: str
    seed: int
    config: "TrainConfig"


def trials(plan: Plan) -> list[Trial]:
    """Every run of a plan, seed by seed, in the order of its routers."""
    return [Trial(router, seed, _trial_config(plan, router, seed)) for seed in plan.seeds for router in plan.routers]


def _trial_config(plan: Plan, router: str, seed: int) -> "TrainConfig":
    from remoe.training.config import TrainConfig

    values = read_values(plan.config)
    if router in names():
        recipe = load(router)
        vocabulary = {"model": {"vocab_size": values.get("model", {}).get("vocab_size")}}  # the batches' own
        values = merge(values, {key: recipe[key] for key in ("model", "losses", "sparsity") if key in recipe})
        values = merge(values, vocabulary)
    values = apply_overrides(values, plan.overrides) | {"name": f"{plan.name}/{router}-seed{seed}", "seed": seed}
    config = from_dict(TrainConfig, values)
    if router in names():
        return config
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **_routed_by(config, router)))


def _routed_by(config: "TrainConfig", router: str) -> dict[str, Any]:
    """The model's settings that change with the router; a dense MLP is as wide as the experts that a token uses."""
    from remoe.moe.routers import ROUTERS

    model = config.model
    if router == "dense":
        return {"moe_layers": "none", "intermediate_size": model.intermediate_size * model.top_k}
    if router not in ROUTERS:
        hint = nearest(router, ("dense", *ROUTERS, *names()), otherwise="`remoe recipes` lists the recipes")
        raise ConfigError(f"--routers names {router!r}, must be dense, {', '.join(ROUTERS)} or a recipe; {hint}")
    own_options = model.moe.router_name == router
    return {
        "router": model.router if own_options else router,
        "moe_layers": "all" if model.moe_layers == "none" else model.moe_layers,
    }


def settings_of_batches(config: "TrainConfig") -> dict[str, Any]:
    """All settings but the router's; runs that are equal in these see the same batches in the same order."""
    settings = {key: value for key, value in to_dict(config).items() if key not in ROUTER_SECTIONS}
    return settings | {"vocab_size": config.model.vocab_size}


def differing_settings(planned: Sequence[Trial]) -> dict[str, dict[str, tuple[Any, Any]]]:
    """For each router the settings in which its runs differ from the first router's: {dotted key: (first, own)}."""
    of_router = {trial.router: to_dict(trial.config) for trial in reversed(planned)}
    first = of_router[planned[0].router]
    routers = list(dict.fromkeys(trial.router for trial in planned))
    found = {router: differences(first, of_router[router]) for router in routers}
    return {router: {key: pair for key, pair in changed.items() if key != "name"} for router, changed in found.items()}
