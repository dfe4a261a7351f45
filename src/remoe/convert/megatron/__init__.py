"""Checkpoints of ReMoE's released code, and of other Megatron GPT models with our routers, as remoe models."""
