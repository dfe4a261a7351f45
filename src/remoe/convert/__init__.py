"""Checkpoints with other routing: Top-K or dense models with ReLU gates, and models of Megatron as ours."""
