"""Checkpoints of other programs as remoe models."""
