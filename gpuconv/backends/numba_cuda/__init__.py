"""Hand-written CUDA kernels in Numba."""
