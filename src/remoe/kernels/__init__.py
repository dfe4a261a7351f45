"""Custom ops: each folder holds one op, its meaning in plain PyTorch (reference.py) and its kernels by device."""
