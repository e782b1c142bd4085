"""Head-wise memory as Triton kernels."""
