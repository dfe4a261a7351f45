"""The native language model."""

from remoe.model.cache import KVCache
from remoe.model.config import ReMoEConfig
from remoe.model.decoder import ModelOutput, ReMoEForCausalLM

__all__ = ["KVCache", "ModelOutput", "ReMoEConfig", "ReMoEForCausalLM"]
