"""One file per kernel; `KERNELS` in table.py lists them."""
