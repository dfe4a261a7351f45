"""The model in transformers: classes for the same checkpoints, registered with its Auto classes on import.

The import also registers our kernels as experts implementation "remoe", for these classes and for other mixtures of
experts there. Raises MissingExtraError where transformers is not installed.
"""

from remoe.errors import MissingExtraError

try:
    import transformers
except ImportError:
    raise MissingExtraError("transformers", "hf") from None

from remoe.hf import experts
from remoe.hf.modeling_remoe import ReMoEConfig, ReMoEForCausalLM, ReMoEModel
from remoe.hf.native import from_native, to_native
from remoe.hf.sparsity import SparsityCallback, SparsityTracker

__all__ = [
    "ReMoEConfig", "ReMoEForCausalLM", "ReMoEModel", "SparsityCallback", "SparsityTracker", "from_native", "to_native",
]  # fmt: skip

transformers.AutoConfig.register(ReMoEConfig.model_type, ReMoEConfig, exist_ok=True)
transformers.AutoModel.register(ReMoEConfig, ReMoEModel, exist_ok=True)
transformers.AutoModelForCausalLM.register(ReMoEConfig, ReMoEForCausalLM, exist_ok=True)
experts.register()
