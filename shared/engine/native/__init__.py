"""The CPU kernels: C++ sources, how they are built, and the fused decoder that runs on them."""
