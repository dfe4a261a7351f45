"""The routers by name. A new one is one file and one line here."""

import dataclasses
import importlib
import inspect
from typing import Any, cast, get_type_hints

from torch import nn

from remoe.config import LARGEST_SIZE, check_range, check_type
from remoe.errors import ConfigError, nearest, one_of

ROUTERS = {
    "cosine": "remoe.moe.routers.cosine:CosineRouter",
    "expert_choice": "remoe.moe.routers.expert_choice:ExpertChoiceRouter",
    "hash": "remoe.moe.routers.hash:HashRouter",
    "hyper": "remoe.moe.routers.hyper:HyperRouter",
    "lory": "remoe.moe.routers.lory:LoryRouter",
    "loss_free": "remoe.moe.routers.loss_free:LossFreeRouter",
    "mlp": "remoe.moe.routers.mlp:MLPRouter",
    "random": "remoe.moe.routers.random:RandomRouter",
    "recurrent_relu": "remoe.moe.routers.recurrent:RecurrentReLURouter",
    "relu": "remoe.moe.routers.relu:ReLURouter",
    "rmoe": "remoe.moe.routers.recurrent:RMoERouter",
    "sparsemixer": "remoe.moe.routers.sparsemixer:SparseMixerRouter",
    "stablemoe": "remoe.moe.routers.stablemoe:StableMoERouter",
    "topk": "remoe.moe.routers.topk:TopKRouter",
    "xmoe": "remoe.moe.routers.xmoe:XMoERouter",
}


def router_class(name: str) -> type[nn.Module]:
    """The class of a registered router; ConfigError names the nearest for an unknown one."""
    if name not in ROUTERS:
        raise ConfigError(f"router is {name!r}, {one_of(name, list(ROUTERS))}")
    module, _, attribute = ROUTERS[name].partition(":")
    return cast(type[nn.Module], getattr(importlib.import_module(module), attribute))


def build_router(name: str, hidden_size: int, num_experts: int, top_k: int, **options: Any) -> nn.Module:
    """Build a router that maps hidden_TH to a Routing over num_experts (after granularity).

    Raises ConfigError for an unknown name or option, an option of the wrong type, or top_k outside 1..num_experts.
    """
    check_range("top_k", top_k, 1, num_experts, fix="it is the (average) number of experts a token uses")
    cls = router_class(name)
    known = option_names(name)
    unknown = [option for option in options if option not in known]
    if unknown:
        raise ConfigError(f"router {name!r} has no option {unknown[0]!r}; {nearest(unknown[0], known)}")
    kinds = get_type_hints(cls.__init__)
    checked = {key: check_type(f"router option {key}", value, kinds.get(key, Any)) for key, value in options.items()}
    for key, value in checked.items():
        if isinstance(value, int | float) and key != "seed":
            check_range(f"router option {key}", value, -LARGEST_SIZE, LARGEST_SIZE)
    return cls(hidden_size, num_experts, top_k, **checked)


def option_names(name: str) -> list[str]:
    """A router's keyword-only arguments, and the fields of the config class `options` of a router that has many."""
    cls = router_class(name)
    parameters = inspect.signature(cls).parameters.values()
    names = [parameter.name for parameter in parameters if parameter.kind is inspect.Parameter.KEYWORD_ONLY]
    many = getattr(cls, "options", None)
    return names if many is None else names + [field.name for field in dataclasses.fields(many)]
