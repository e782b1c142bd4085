"""Head-wise memory as Triton kernels; importing this package imports no Triton."""
