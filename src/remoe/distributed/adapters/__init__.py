"""Our routers, losses and sparsity controller inside other trainers."""
