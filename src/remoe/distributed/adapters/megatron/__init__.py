"""ReLU and recurrent routers for models of megatron-core (tried on 0.16.1).

`Routers` is all that a training script meets: it changes a layer spec, and is called once after `optimizer.step`.
"""

import importlib.util

from remoe.errors import MissingExtraError

if importlib.util.find_spec("megatron") is None or importlib.util.find_spec("megatron.core") is None:
    raise MissingExtraError("megatron-core", "megatron")

from remoe.distributed.adapters.megatron.routers import Routers as Routers
from remoe.distributed.adapters.megatron.settings import RouterSettings as RouterSettings
