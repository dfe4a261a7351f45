"""ReLU routing for MoE models of torchtitan. Experimental: tried on 0.3.0, whose MoE interface still moves."""

import importlib.util

from remoe.errors import RemoeError

if importlib.util.find_spec("torchtitan") is None:
    raise RemoeError(
        "torchtitan is not installed; pip install torchtitan==0.3.0, in an environment of its own: it needs an older "
        "datasets than remoe's extras"
    )

from remoe.distributed.adapters.torchtitan.spec import with_relu_routing as with_relu_routing
