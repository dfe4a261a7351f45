"""The native language model."""

from remoe.model.cache import KVCache
from remoe.model.causal_lm import ModelOutput, ReMoEForCausalLM
from remoe.model.config import ReMoEConfig

__all__ = ["KVCache", "ModelOutput", "ReMoEConfig", "ReMoEForCausalLM"]
