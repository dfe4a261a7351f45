"""Many processes as one run: meshes, FSDP2, expert-parallel exchange, and what the trainer asks of its ranks."""
