"""Ours and the peers that are installed, in one process: how fast, how much memory, and whether they agree."""
