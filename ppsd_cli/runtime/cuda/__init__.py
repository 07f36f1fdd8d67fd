"""The CUDA engine: Triton kernels, static buffers, and one graph a tick."""
